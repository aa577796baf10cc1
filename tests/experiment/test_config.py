"""The configuration: values as text, and every mistake reported at once before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.experiment.config import BadConfig, RunConfig, parse_value, plain, set_fields
from testbed.run import parse, read_yaml

VALUES: list[tuple[Any, Any, Any]] = [
    ("3", int, 3),
    (3.0, int, 3),
    ("-2", int, -2),
    ("2.5e-3", float, 0.0025),
    (1, float, 1.0),
    ("true", bool, True),
    ("No", bool, False),
    (True, bool, True),
    ("a,b", tuple[str, ...], ("a", "b")),
    ("a, b,", tuple[str, ...], ("a", "b")),
    (["a", "b"], tuple[str, ...], ("a", "b")),
    ("1,2", tuple[int, ...], (1, 2)),
    ("", tuple[str, ...], ()),
    ("none", Path | None, None),
    (None, Path | None, None),
    ("/x", Path | None, Path("/x")),
    ("7", int | None, 7),
    ("text", Literal["skip", "text"], "text"),
    (5, str, "5"),
]


@pytest.mark.parametrize(("text", "hint", "want"), VALUES)
def test_values(text: Any, hint: Any, want: Any) -> None:
    found = parse_value(text, hint)
    assert (found, type(found)) == (want, type(want))


WRONG: list[tuple[Any, Any, str]] = [
    ("3.5", int, "expected a whole number"),
    (3.5, int, "expected a whole number"),
    (True, int, "expected a whole number"),
    ("many", int, "expected a whole number"),
    ("many", float, "expected a number"),
    ("nan", float, "expected a number"),
    (None, int, "expected one value, got None"),
    ([1], float, "expected one value"),
    ({"a": 1}, str, "expected one value"),
    ("perhaps", bool, "expected true or false"),
    ("other", Literal["skip", "text"], "expected one of skip, text"),
    ("1,x", tuple[int, ...], "expected a whole number"),
    (None, tuple[str, ...], "expected a list"),
]


@pytest.mark.parametrize(("text", "hint", "message"), WRONG)
def test_wrong_values_say_what_was_expected(text: Any, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_value(text, hint)


@given(st.integers(), st.floats(allow_nan=False), st.booleans())
def test_numbers_come_back_as_they_were_written(i: int, f: float, b: bool) -> None:
    assert parse_value(str(i), int) == i
    assert parse_value(repr(f), float) == f
    assert parse_value(str(b), bool) is b


@dataclass(frozen=True)
class Two:
    size: int = 1
    rate: float = 0.5


def test_fields_are_set_and_all_wrong_ones_named() -> None:
    assert set_fields(Two(), {"size": "4"}) == Two(4, 0.5)
    with pytest.raises(BadConfig) as caught:
        set_fields(Two(), {"sise": "4", "rate": "fast", "size": "x"})
    assert str(caught.value).splitlines() == [
        "Two has no field 'sise'; there are rate, size",
        "rate='fast': expected a number",
        "size='x': expected a whole number",
    ]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"edits": 0}, "--edits must be 1 or more, got 0"),
    ({"batch": -1}, "--batch must be 1 or more, got -1"),
    ({"probe_budget": 0}, "--probe-budget must be 1 or more"),
    ({"max_new_tokens": 0}, "--max-new-tokens must be 1 or more"),
    ({"save_every": 0}, "--save-every must be 1 or more"),
    ({"editor": ()}, "--editor names no editor"),
    ({"editor": ("noop", "noop")}, "--editor names one editor twice"),
    ({"editor": ("finetun",)}, "no editor is called 'finetun'. Did you mean finetune"),
    ({"stream": "okedit"}, "no stream is called 'okedit'. Did you mean okedit-yearly"),
    ({"data_root": Path("/no/such")}, "--data-root /no/such is not a folder"),
    ({"set": ("finetune.steps",)}, "is not of the form editor.field=value"),
    ({"set": ("steps=3",)}, "is not of the form"),
    (
        {"editor": ("noop", "finetune"), "set": ("wise.steps=3",)},
        "'wise', which takes no part in this run (benchmarks, finetune, noop, probes, stream)",
    ),
    ({"set": ("finetune.step=3",)}, "FinetuneConfig has no field 'step'"),
    ({"set": ("finetune.steps=x",)}, "steps='x': expected a whole number"),
    ({"set": ("finetune.lr=-1",)}, "finetune: lr must be positive"),
    ({"set": ("finetune.lr=nan",)}, "lr='nan': expected a number"),
    ({"set": ("stream.revise=2",)}, "stream.revise must be between 0 and 1, got 2.0"),
    ({"set": ("stream.year=2",)}, "StreamConfig has no field 'year'"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_reported(changes: dict[str, Any], message: str) -> None:
    problems = RunConfig(**changes).problems()
    assert any(message in p for p in problems), problems


def test_the_defaults_are_fine() -> None:
    assert RunConfig().problems() == []


def test_all_mistakes_are_reported_at_once() -> None:
    changes = {k: v for c, _ in MISTAKES[:5] for k, v in c.items()}
    config = RunConfig(**changes, editor=("finetun", "finetune"), stream="okedit", set=("finetune.steps=x", "wise.a=1"))
    with pytest.raises(BadConfig) as caught:
        config.resolve()
    assert len(str(caught.value).splitlines()) == 5 + 4


def test_a_batch_over_an_editors_limit_is_reported_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from testbed.core.registry import EDITORS

    cls = EDITORS.get("finetune")
    monkeypatch.setattr(cls, "traits", replace(cls.traits, max_batch=2))
    assert RunConfig(batch=2).problems() == []
    assert RunConfig(batch=3).problems() == ["finetune takes at most 2 edits at once, got --batch 3"]


def test_identity_leaves_out_places_and_switches_and_goes_through_json() -> None:
    a = RunConfig(out=Path("/a"), log=Path("/l"), save_every=7, dry_run=True, data_root=Path("/moved"), model="/moved too")
    assert a.identity() == RunConfig().identity()
    assert RunConfig(edits=7).identity() != a.identity()
    assert json.loads(json.dumps(a.identity())) == a.identity()
    stored = set_fields(RunConfig(), json.loads(json.dumps(RunConfig(data_root=Path("/d"), set=("finetune.steps=2",)).stored())))
    assert (stored.data_root, stored.set) == (Path("/d"), ("finetune.steps=2",))


def test_plain_is_json() -> None:
    value = {"a": Two(), "b": (1, frozenset({2})), "c": Path("/x"), "d": None}
    assert plain(value) == {"a": {"size": 1, "rate": 0.5}, "b": [1, [2]], "c": "/x", "d": None}


COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("--editor noop,oracle --edits 9", {"editor": ("noop", "oracle"), "edits": 9}),
    ("--editor=noop --seed=3", {"editor": ("noop",), "seed": 3}),
    ("--set finetune.steps=2", {"set": ("finetune.steps=2",)}),
    ("--set finetune.steps=2 finetune.lr=1e-3 --edits 5", {"set": ("finetune.steps=2", "finetune.lr=1e-3"), "edits": 5}),
    ("--set finetune.steps=2 --set=stream.revise=0.1", {"set": ("finetune.steps=2", "stream.revise=0.1")}),
    ("--missing-images caption --dry-run --out x", {"missing_images": "caption", "dry_run": True, "out": Path("x")}),
]


@pytest.mark.parametrize(("line", "changes"), COMMANDS)
def test_command_lines(line: str, changes: dict[str, Any]) -> None:
    assert parse(line.split()) == RunConfig(**changes)


def test_a_yaml_file_fills_in_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("edits: 7\neditor: [noop, oracle]\nmissing-images: text\nset:\n - stream.revise=0.1\nout: null\n")
    config = parse(["--config", str(file), "--edits", "8"])
    assert config == RunConfig(edits=8, editor=("noop", "oracle"), missing_images="text", set=("stream.revise=0.1",), config=file)
    file.write_text("editor: noop,finetune\n")
    assert parse([f"--config={file}"]).editor == ("noop", "finetune")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold fields and values, found list"),
        ("", "must hold fields and values, found NoneType"),
        ("a: [", "cannot be read"),
        ("edit: 3\nbach: 2\n", "(?s)RunConfig has no field 'edit'.*RunConfig has no field 'bach'"),
        ("edits: many\n", "edits='many': expected a whole number"),
        ("edits:\n", "edits=None: expected one value"),
        ("editor:\n", "editor=None: expected a list"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(BadConfig, match=message):
        set_fields(RunConfig(), read_yaml(file))


def test_an_absent_or_binary_yaml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadConfig, match="cannot be read"):
        read_yaml(tmp_path / "b.yaml")


def test_values_are_taken_as_the_command_line_takes_them(tmp_path: Path) -> None:
    given: dict[str, Any] = {"data_root": str(tmp_path), "out": "x", "model": Path("m"), "editor": "noop", "edits": "2", "batch": 3.0}
    config = RunConfig(**given)
    assert config == RunConfig(data_root=tmp_path, out=Path("x"), model="m", editor=("noop",), edits=2, batch=3)
    several: Any = ["noop", "finetune"]
    assert RunConfig(editor=several).editor == ("noop", "finetune")
    wrong: dict[str, Any] = {"edits": "many", "seed": 1.5, "prompt": "loud"}
    with pytest.raises(BadConfig) as e:
        RunConfig(**wrong)
    assert str(e.value).splitlines() == [
        "--edits 'many': expected a whole number",
        "--seed 1.5: expected a whole number",
        "--prompt 'loud': expected one of auto, bare, question, examples, chat",
    ]


@pytest.mark.parametrize("seed", [-1, 2**63 - 1])
def test_a_seed_out_of_range_is_refused_with_the_range(seed: int) -> None:
    assert RunConfig(seed=seed).problems() == [f"--seed must be between 0 and 4294967295, got {seed}"]


def test_places_that_cannot_be_written_are_named_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = RunConfig(log=tmp_path / "absent" / "log.txt", out=tmp_path / "file" / "run", save_model=tmp_path / "new" / "models")
    assert config.problems() == [
        f"--out {tmp_path / 'file' / 'run'} cannot be written: make the folder, or choose another one",
        f"--log {tmp_path / 'absent' / 'log.txt'} cannot be written: make the folder, or choose another one",
    ]


def test_what_probes_ask_is_set_and_checked() -> None:
    assert RunConfig(editor=("noop",)).resolve_probes().paraphrases == 1
    assert RunConfig(editor=("noop",), set=("probes.paraphrases=10",)).resolve_probes().paraphrases == 10
    assert RunConfig(editor=("noop",), set=("probes.paraphrases=10",)).problems() == []
    assert RunConfig(editor=("noop",), set=("probes.paraphrases=0",)).problems() == ["probes: paraphrases must be 1 or more, got 0"]
    assert any("rephrasings" in p for p in RunConfig(editor=("noop",), set=("probes.rephrasings=2",)).problems())
