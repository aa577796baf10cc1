"""`testbed check` in an empty folder: a plug-in that keeps its contract passes, and what breaks it is said in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.figures import catalogue
from streams.base import StreamConfig
from testbed import check as command
from testbed.__main__ import main
from testbed.checks import editors, small_run, streams
from testbed.checks.contract import CheckFailed, outcome, refused
from testbed.core.plugins import REGISTRIES
from testbed.core.registry import EDITORS, STREAMS
from tests.helpers.models import build
from tests.helpers.plain_stream import plain

ROOT = Path(__file__).parents[2]
EDITOR = (ROOT / "docs" / "templates" / "editor.py").read_text("utf-8")
METRIC = (ROOT / "docs" / "templates" / "metric.py").read_text("utf-8")


@pytest.fixture
def registered() -> Iterator[None]:
    """Takes back what a plug-in registers in this process."""
    before = {r.kind: set(r.names()) for r in REGISTRIES}
    yield
    for r in REGISTRIES:
        for name in set(r.names()) - before[r.kind]:
            r._entries.pop(name)


@pytest.mark.ci
@pytest.mark.usefixtures("registered")
def test_the_templates_pass_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogue, "draw_all", lambda context: {})
    Path("mine.py").write_text(EDITOR.replace('"sgd-edit"', '"my-edit"'))
    Path("words.py").write_text(METRIC)
    code, lines = main(["check", "mine.py,words.py", "--set", "my-edit.steps=12"]), capsys.readouterr().out.splitlines()
    assert code == 0, lines
    assert lines[-1] == "every check passed"
    assert sum(line.startswith("my-edit on ") for line in lines) == 2 * len(editors.CHECKS)
    assert "answer_words: a metric has a value: passed" in lines
    assert sum(line.startswith("a run with everything: ") for line in lines) == 1 + len(small_run.CHECKS)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["mine.py", "words.py"]


LAST = "self.weight = weight.detach()"
WRITES = "self.handle.parameter(self.weight_name).data.add_(1)"
BREAKS = {
    "the base model's weights changed": (LAST, f"{LAST}\n        {WRITES}"),
    "_state lacks something": ('return {"weight": self.weight}', 'return {"weight": torch.zeros_like(self.weight)}'),
    "never change them in place": (LAST, "self.weight.copy_(weight.detach())"),
}
FIRST = {
    "the base model's weights changed": editors.editing_and_probing_leave_the_base_and_the_state_bit_identical,
    "_state lacks something": editors.a_stored_state_answers_alike,
    "never change them in place": editors.a_failed_edit_leaves_the_state_and_is_reported,
}


@pytest.mark.parametrize("said", BREAKS)
def test_an_editor_that_breaks_the_contract_is_told_how(said: str, tmp_path: Path) -> None:
    old, new = BREAKS[said]
    assert old in EDITOR
    name = f"broken-{list(BREAKS).index(said)}"
    (tmp_path / "mine.py").write_text(EDITOR.replace('"sgd-edit"', f'"{name}"').replace(old, new))
    handle = build("gpt2", seed=7)
    weights = {n: p.detach().clone() for n, p in handle.model.named_parameters()}
    try:
        assert command.registered_by([str(tmp_path / "mine.py")])["editor"] == [name]
        found = outcome(name, "", lambda: FIRST[said](editors.EditorCase(name, handle, plain(24), {"steps": 3})))
        assert said in found.problem
    finally:
        EDITORS._entries.pop(name)
        for n, p in handle.model.named_parameters():
            p.data.copy_(weights[n])


def test_a_stream_that_breaks_the_contract_is_told_how() -> None:
    class Leaking(STREAMS.get("world-yearly")):
        def paraphrases(self, event):
            return tuple(q.prompt for q in self.questions(event) if q.split == "text_generality")

    case = streams.StreamCase(lambda **fields: Leaking(StreamConfig(**fields)))
    with pytest.raises(CheckFailed, match="what an editor may learn from is asked"):
        streams.paraphrases_are_not_asked(case)


def test_mistakes_are_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path / "absent.py")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert command.main(["json"]) == 2
    assert "registers nothing that the installed packages do not have already" in " ".join(capsys.readouterr().err.split())


def test_an_expected_refusal_that_does_not_come_fails() -> None:
    with pytest.raises(CheckFailed, match="nothing was raised"), refused(ValueError, "x"):
        pass
    with pytest.raises(CheckFailed, match="must say 'x'"), refused(ValueError, "x"):
        raise ValueError("y")
