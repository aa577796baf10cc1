"""Ask an edited model any question: `python -m testbed.ask OUT --editor NAME --as-of STEP [--image FILE] "question"`.

The editor is rebuilt from the run folder in its state after that step. The command prints its answer, the answer of the
unedited model, and the edits that acted on the answer.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from testbed.core import threads

    threads.prepare()

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from streams.files.pictures import FilePicture
from testbed.core.events import Ask, EditEvent
from testbed.core.terminal import ended_by_its_reader
from testbed.editors.base import Editor
from testbed.experiment.command import run_command
from testbed.experiment.config import BadConfig
from testbed.experiment.rebuild import StoredRun, rebuild
from testbed.model.encoding import prompt_inputs
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor
from testbed.storage.run_folder import RunFolder


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
    """An edit that acted on an answer. `event` and `step` are None for a part of the editor that belongs to no single edit."""

    name: str
    event: EditEvent | None = None
    step: int | None = None

    def __str__(self) -> str:
        event = self.event
        return f"{event.prompt} -> {event.target} (step {self.step}, year {event.year}, edit {event.id})" if event else self.name


@dataclass(frozen=True)
class AskResult:
    """The answers of the edited and of the unedited model.

    fired: the edits that acted on the answer; () where the editor left the question to the unedited model; None for an
    editor without a gate, whose changes act on every question. extras: the notes of the editor, as in records.
    """

    editor: str
    step: int
    answer: str
    unedited: str
    fired: tuple[Fired, ...] | None
    extras: Mapping[str, Any]


def ask(config: AskConfig, stored: StoredRun | None = None) -> AskResult:
    """Rebuild an editor and ask it a question. stored: the run of the folder where it is rebuilt already.

    Raises `BadConfig` for an unknown editor or step, a question that does not fit, or an editor that needs the right
    answers; `BadPicture` for the image; and what `rebuild` raises.
    """
    if not config.question.strip():
        raise BadConfig("the question is empty")
    _check_step(config.as_of, RunFolder(config.out).n_steps())
    stored = stored or rebuild(config.out, {"device": config.device})
    _check_step(config.as_of, stored.n_steps)  # the stored schedule may be damaged, and is then planned again
    step = stored.n_steps if config.as_of is None else config.as_of
    prompt = _prompt(config, stored.run.handle)
    return answer(stored, stored.at(_editor_name(stored, config.editor), step), step, prompt, config.max_new_tokens)


def answer(stored: StoredRun, editor: Editor, step: int, prompt: Ask, max_new_tokens: int = 16) -> AskResult:
    """Ask an editor in its state after a step (see `StoredRun.at`); it can be asked again."""
    predictor = editor.predictor()
    edited = predictor.respond([prompt], [None], max_new_tokens)[0]
    unedited = ModelPredictor(stored.run.handle).generate([prompt], max_new_tokens)[0]
    fired = () if predictor.fingerprint == "base" else _fired(stored, editor, edited.extras)
    return AskResult(editor.name, step, edited.generated, unedited, fired, edited.extras)


def _check_step(step: int | None, last: int | None) -> None:
    if step is not None and last is not None and not 0 <= step <= last:
        raise BadConfig(f"--as-of {step} is no step of the run: there are 0 (before the first edit) to {last}")


def _editor_name(stored: StoredRun, name: str) -> str:
    if not name and len(stored.names()) > 1:
        raise BadConfig(f"--editor must say which of {', '.join(stored.names())}")
    chosen = stored.names([name] if name else ())[0]
    if stored.run.resolved.editors[chosen].create().traits.told_truth:
        raise BadConfig(f"{chosen} is told the right answers of the run's own questions, and there is none for yours: ask another editor")
    return chosen


def _prompt(config: AskConfig, handle: ModelHandle) -> Ask:
    """The question with its picture. Raises `BadConfig` for a question that the model cannot read."""
    if config.image is not None and not handle.reads_pictures:
        raise BadConfig(f"{handle.name} reads no pictures: leave --image out")
    prompt = Ask(config.question, FilePicture(config.image.parent, config.image.name) if config.image is not None else None)
    length = prompt_inputs(handle, prompt)["input_ids"].shape[1] + config.max_new_tokens
    if length > handle.window:
        raise BadConfig(f"the question and its answer take {length} tokens, {handle.name} reads {handle.window}: ask in fewer words")
    return prompt


def _fired(stored: StoredRun, editor: Editor, extras: Mapping[str, Any]) -> tuple[Fired, ...] | None:
    """The edits in the notes of the editor: `used` (facts in the prompt) or `entry` (the codebook entry that answered)."""
    if not editor.traits.gated and "used" not in extras and "entry" not in extras:
        return None
    names = extras.get("used", [extras.get("entry")])
    made = {a.event.id: (a.event, s.checkpoint.step) for s in stored.run.schedule.steps for a in s.edits}
    return tuple(Fired(n, *made.get(n, (None, None))) for n in names if n is not None)


def lines(result: AskResult) -> list[tuple[str, str]]:
    """Labels and texts for the command line."""
    fired = [str(f) for f in result.fired or ()]
    if result.fired is None:
        fired = ["no single edit: all that was changed acts on every question"]
    elif not fired:
        fired = ["no edit: the question was left to the unedited model"]
    return [("edited", result.answer), ("unedited", result.unedited), *(("fired", text) for text in fired)]


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 answered, 2 for a mistake of the user, printed as a plain line."""
    config = tyro.cli(AskConfig, args=argv, prog="python -m testbed.ask")
    code, result = run_command(lambda: ask(config))
    if result is None:
        return code
    console = Console()
    console.print(f"{result.editor} after step {result.step}", markup=False, highlight=False)
    for label, text in lines(result):
        console.print(f"{label + ':':<10}{text}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
