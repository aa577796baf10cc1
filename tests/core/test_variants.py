"""Variants of an editor: how they are named, configured, stored, and distinguished in one run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.core import variants
from testbed.core.schema import folder_name
from testbed.experiment.config import RunConfig
from testbed.experiment.runner import PreparedRun
from testbed.run import parse
from tests.helpers.models import folder
from tests.helpers.warm_process import command

words = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
values = st.lists(st.from_regex(r"[a-z0-9.]{1,5}", fullmatch=True), min_size=1, max_size=3).map(",".join)


@given(words, st.dictionaries(words, values, min_size=1, max_size=4))
def test_what_is_written_is_read(base: str, settings: dict[str, str]) -> None:
    name = f"{base}[{','.join(f'{k}={v}' for k, v in settings.items())}]"
    assert variants.split(name) == (base, settings)
    assert variants.names(f"{base},{name}, {base}2") == [base, name, f"{base}2"]
    assert folder_name(folder_name(name)) == folder_name(name)
    assert not set(folder_name(name)) & set("[]/:* '\"")


ODD_NAMES = {
    "jsonl:../../x y.jsonl": "jsonl-..-..-x-y.jsonl",
    "jsonl:/etc/passwd": "jsonl-etc-passwd",
    "hub:org/data:config:train": "hub-org-data-config-train",
    "csv:C:\\a\\b.csv": "csv-C-a-b.csv",
    "jsonl:städte 東京.jsonl": "jsonl-städte-東京.jsonl",
    "jsonl:a\n\0\x1b[2J\u202e.jsonl": "jsonl-a-2J-.jsonl",
    "merged:okedit-yearly+jsonl:~/$(rm x);`y`": "merged-okedit-yearly+jsonl-rm-x-y",
    "..": "-",
    "../..": "-",
    "": "-",
}


@pytest.mark.parametrize("name", [*ODD_NAMES, "jsonl:" + "x" * 5000, "jsonl:" + "東" * 300 + ".jsonl"])
def test_a_run_of_any_stream_lies_right_under_runs(name: str, tmp_path: Path) -> None:
    run = SimpleNamespace(config=RunConfig(stream=name, seed=2**31 - 1), manifest={"run": "0123456789abcdef"})
    out = PreparedRun.out.fget(run)  # type: ignore[misc]
    slug = folder_name(name)
    assert slug == ODD_NAMES.get(name, slug) == folder_name(slug)
    assert out == Path("runs", f"{slug}-2147483647-01234567") and len(out.parts) == 2
    (tmp_path / out).mkdir(parents=True)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [out.name]


def test_long_names_with_one_beginning_have_folders_of_their_own() -> None:
    assert folder_name("jsonl:" + "x" * 300) != folder_name("jsonl:" + "x" * 301)


def test_a_name_without_brackets_has_no_settings() -> None:
    assert variants.split("alphaedit+blue") == ("alphaedit+blue", {})
    assert variants.split("a[x=1]") == ("a", {"x": "1"})


WRONG = {
    "memit[history]": "sets nothing",
    "memit[]": "sets nothing",
    "memit[=1]": "sets nothing",
    "memit[history=true,history=false]": "sets a field twice",
    "memit[history=true": r"not of the form editor\[field=value",
    "memit[history=true]+blue": r"behind any \+wrapper",
    "[history=true]": r"not of the form editor\[field=value",
    "memit[histroy=true]": "MemitConfig has no field 'histroy'",
    "memit[history=perhaps]": "expected true or false",
    "memit[lam=-1]": "lam must be positive",
    "memti[lam=1]": "Did you mean memit",
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_variant_is_reported(name: str) -> None:
    problems = RunConfig(editor=(name,)).problems()
    assert len(problems) == 1
    assert re.search(WRONG[name], problems[0]), problems


def test_two_names_for_one_folder_are_refused() -> None:
    assert "share a folder" in RunConfig(editor=("finetune[lr=1]", "finetune[[lr=1]")).problems()[0]
    assert "twice" in RunConfig(editor=("finetune[lr=1]", "finetune[lr=1]")).problems()[0]


def test_brackets_win_over_set_and_set_holds_for_all_variants() -> None:
    names = ("memit", "memit[lam=2]", "memit+blue[layers=0,1]")
    config = RunConfig(editor=names, set=("memit.lam=3", "memit.steps=7"))
    assert config.problems() == []
    plain, own, wrapped = (config.resolve_editor(n).config for n in names)
    assert (plain.lam, plain.steps) == (3, 7)
    assert (own.lam, own.steps) == (2, 7)
    assert (wrapped.lam, wrapped.layers) == (None, (0, 1))
    made = config.resolve_editor(names[1]).create()
    assert made.name == names[1]
    assert type(made).__mro__[1] is config.resolve_editor("memit").cls


def test_command_lines_keep_brackets_together() -> None:
    names = ("memit", "memit[layers=0,1,history=true]", "noop")
    assert parse(["--editor", ",".join(names)]).editor == names
    assert parse([f"--editor={','.join(names)}"]).editor == names


def test_variants_run_side_by_side_and_a_cut_run_goes_on(tmp_path: Path) -> None:
    names = ("finetune", "finetune[lr=0.05,steps=2]")
    small = ("--edits", 6, "--save-every", 2, "--max-new-tokens", 2, "--probe-budget", 10, "--device", "cpu", "--set", "finetune.steps=3")
    out = tmp_path / "run"
    start = ("--model", folder("llava"), "--out", out, "--editor", ",".join(names), *small)
    dry = command(*start, "--dry-run")
    assert dry.code == 0, dry.err
    assert names[1] in dry.out
    assert command(*start, kill="rename 2", figures=False).code == -9
    done = command("--resume", out, figures=False)
    assert done.code == 0, done.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["editors"] == list(names)
    assert [manifest["editor_configs"][n]["steps"] for n in names] == [3, 2]
    summary = json.loads((out / "summary.json").read_text())["editors"]
    assert set(summary) == set(names)
    assert summary[names[0]] != summary[names[1]]
    for name in names:
        part = next((out / folder_name(name) / "records").glob("*.parquet"))
        assert set(pq.read_table(part)["editor"].to_pylist()) == {name}
