"""The command that a report prints makes the same run, and the manifest says what code made it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.reading.load import load_run
from analysis.reporting import page
from testbed.experiment.config import RunConfig
from testbed.experiment.manifest import command_of, files_hash, git_commit
from testbed.run import parse
from tests.helpers.resumed_runs import assert_same, uninterrupted
from tests.helpers.warm_process import command

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9)
CONFIGS = st.builds(
    RunConfig,
    stream=st.sampled_from(["okedit-yearly", "jsonl:a b.jsonl"]),
    editor=st.sampled_from([("noop",), ("noop", "balancedit[revision=zone,caps=true]"), ("oracle", "memit+blue")]),
    edits=st.integers(1, 10**6),
    seed=st.integers(0, 99),
    batch=st.integers(1, 50),
    set=st.lists(WORDS.map(lambda w: f"finetune.note={w}"), max_size=3).map(tuple),
    data_root=st.none() | st.just(Path("a folder/$HOME")),
)


@settings(max_examples=40, deadline=None)
@given(CONFIGS)
def test_the_words_give_the_configuration_again(config: RunConfig) -> None:
    words = shlex.split(shlex.join(command_of(config)))
    assert words[:3] == ["python", "-m", "testbed.run"]
    assert parse(words[3:]).stored() == config.stored()


def test_the_printed_command_makes_the_run_again(tmp_path: Path) -> None:
    words = shlex.split(page.command_of(load_run(uninterrupted())))
    assert words[-2:] == ["--out", "run"]
    done = command(*words[3:-2], "--out", tmp_path / "run", "--save-every", 5, figures=False)
    assert done.code == 0, done.err
    assert_same(tmp_path / "run")


def test_a_commit_is_that_of_a_repository_that_tracks_the_package(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "testbed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_commit(package) is None
    here = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    subprocess.run([*here, "init", "-q"], check=True)
    subprocess.run([*here, "commit", "-q", "--allow-empty", "-m", "Begin"], check=True)
    assert git_commit(package) is None
    subprocess.run([*here, "add", "site-packages"], check=True)
    subprocess.run([*here, "commit", "-q", "-m", "Add"], check=True)
    commit = git_commit(package)
    assert commit
    (package / "__init__.py").write_text("changed = 1\n")
    assert git_commit(package) == f"{commit}+"


def test_the_hash_of_the_files_changes_with_a_file(tmp_path: Path) -> None:
    for name in ("testbed", "streams", "analysis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(name)
    before = files_hash(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert files_hash(tmp_path / "copy") == before
    (tmp_path / "streams" / "__init__.py").write_text("else")
    assert files_hash(tmp_path) != before
