"""Ask an edited model anything: `python -m testbed.ask OUT --editor NAME --as-of STEP [--image FILE] "question"`.

The editor is made again out of the run folder as it was after that step; the answer stands beside the unedited
model's own and the edits that the editor let act on it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from streams.files.pictures import FilePicture
from testbed.core.events import Ask, EditEvent
from testbed.editors.base import Editor
from testbed.experiment.config import BadConfig
from testbed.experiment.rebuild import Stored, rebuild
from testbed.model.encoding import prompt_inputs
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor


@dataclass(frozen=True)
class AskConfig:
    """Ask the edited model of a run folder, as it was after any step."""

    out: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    question: Annotated[str, tyro.conf.Positional]
    """What to ask, in the words that the model is to read."""
    editor: str = ""
    """Editor of the run; not needed where there is one."""
    as_of: int | None = None
    """The step after which to ask, 0 for none; the last by default."""
    image: Path | None = None
    """Picture that the question is about."""
    max_new_tokens: int = 16
    """Longest answer, in tokens."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


@dataclass(frozen=True)
class Fired:
    """An edit that acted on an answer. `event` and `step` are None where the editor names a part of its own that is no edit."""

    name: str
    event: EditEvent | None = None
    step: int | None = None


@dataclass(frozen=True)
class Answered:
    """What came back.

    fired: the edits that the editor let act; () where it left the question to the unedited model; None where it does
    not decide (what it changed acts on every question). extras: all that the editor noted, as records keep it.
    """

    editor: str
    step: int
    answer: str
    unedited: str
    fired: tuple[Fired, ...] | None
    extras: Mapping[str, Any]


def ask(config: AskConfig) -> Answered:
    """Rebuild the editor and ask it.

    Raises `BadConfig` for an unknown editor or step, a question that does not fit, or an editor that is told the
    answers of the run's own questions; `BadPicture` for the image; and what `rebuild` raises.
    """
    stored = rebuild(config.out, {"device": config.device})
    step = stored.steps if config.as_of is None else config.as_of
    if not 0 <= step <= stored.steps:
        raise BadConfig(f"--as-of {step} is no step of the run: there are 0 (before the first edit) to {stored.steps}")
    asked = _asked(config, stored.plan.handle)
    return answer(stored, stored.at(_editor(stored, config.editor), step), step, asked, config.max_new_tokens)


def answer(stored: Stored, editor: Editor, step: int, asked: Ask, max_new_tokens: int = 16) -> Answered:
    """Ask an editor that stands after a step (`Stored.at`); for many questions to one model."""
    predictor = editor.predictor()
    edited = predictor.respond([asked], [None], max_new_tokens)[0]
    unedited = ModelPredictor(stored.plan.handle).generate([asked], max_new_tokens)[0]
    fired = () if predictor.fingerprint == "base" else _fired(stored, editor, edited.extras)
    return Answered(editor.name, step, edited.generated, unedited, fired, edited.extras)


def _editor(stored: Stored, name: str) -> str:
    """The editor to ask. Raises `BadConfig`."""
    there = list(stored.plan.config.editor)
    if not name and len(there) > 1:
        raise BadConfig(f"--editor must say which of {', '.join(there)}")
    chosen = name or there[0]
    if chosen in there and stored.plan.config.editor_class(chosen).traits.told_truth:
        raise BadConfig(f"{chosen} is told the right answers of the run's own questions, and there is none for yours: ask another editor")
    return chosen


def _asked(config: AskConfig, handle: ModelHandle) -> Ask:
    """The question as the model gets it. Raises `BadConfig` for one that it cannot read."""
    if not config.question.strip():
        raise BadConfig("the question is empty")
    if config.image is not None and not handle.reads_pictures:
        raise BadConfig(f"{handle.name} reads no pictures: leave --image out")
    picture = FilePicture(config.image.parent, config.image.name) if config.image is not None else None
    asked = Ask(config.question, picture)
    length = prompt_inputs(handle, asked)["input_ids"].shape[1] + config.max_new_tokens
    if length > handle.window:
        raise BadConfig(f"the question and its answer take {length} tokens, {handle.name} reads {handle.window}: ask in fewer words")
    return asked


def _fired(stored: Stored, editor: Editor, extras: Mapping[str, Any]) -> tuple[Fired, ...] | None:
    """Read from what gated and retrieval editors note: `used`, the facts put before the question, or `entry`, the one that answered."""
    if not editor.traits.gated and "used" not in extras and "entry" not in extras:
        return None
    names = extras["used"] if "used" in extras else [extras.get("entry")]
    made = {a.event.id: (a.event, s.moment.step) for s in stored.plan.schedule.steps for a in s.edits}
    return tuple(Fired(n, *made.get(n, (None, None))) for n in names if n is not None)


def lines(found: Answered) -> list[tuple[str, str]]:
    """What the command line prints: labels and texts."""
    out = [("edited", found.answer), ("unedited", found.unedited)]
    if found.fired is None:
        return [*out, ("fired", "no single edit: all that was changed acts on every question")]
    if not found.fired:
        return [*out, ("fired", "no edit: the question was left to the unedited model")]
    return [*out, *(("fired", _told(f)) for f in found.fired)]


def _told(fired: Fired) -> str:
    if fired.event is None:
        return fired.name
    return f"{fired.event.prompt} -> {fired.event.target} (step {fired.step}, year {fired.event.year}, edit {fired.event.id})"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 answered, 2 for a mistake of the user's, said in plain words."""
    from testbed.experiment.command import run_command

    config = tyro.cli(AskConfig, args=argv, prog="python -m testbed.ask")
    code, found = run_command(lambda: ask(config))
    if found is None:
        return code
    console = Console()
    console.print(f"{found.editor} after step {found.step}", markup=False, highlight=False)
    for label, text in lines(found):
        console.print(f"{label + ':':<10}{text}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
