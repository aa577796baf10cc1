"""Train the tiny model: on the simulated world, on the pre-edit beliefs of any stream, or to rewrite answers.

    python -m testbed.pretrain --stream world-yearly --out DIR
    python -m testbed.pretrain --stream okedit-yearly --data-root FILES --out DIR
    python -m testbed.pretrain --stream world-yearly --course rewriting --out DIR

The first trains from nothing (the committed weights took 57 minutes on two busy cores); the others start from the
committed weights (ten minutes). The first two save a folder for `--model DIR` of `testbed.run`, the third one for `--set
postedit.model=DIR`. Its model card holds the scores of the saved weights, beside their acceptance thresholds.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from testbed.core import threads

    threads.prepare()

import dataclasses
import hashlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from streams.base import BadStream, MissingImages, Stream, StreamConfig
from streams.data import table
from streams.world.facts import world
from testbed.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, out_of_range
from testbed.core.registry import STREAMS, UnknownName
from testbed.core.terminal import ended_by_its_reader
from testbed.experiment.config import BadConfig, set_fields
from testbed.pretraining import stages
from testbed.pretraining.evaluation import AbilityScore

ASSETS = Path(__file__).parent / "assets"
_CARD: str = table(stages.__file__, "model_card.yaml")["text"]


@dataclass(frozen=True)
class PretrainConfig:
    """Train the tiny model on the simulated world or on a stream's beliefs."""

    stream: str
    """Name of a stream, as `python -m testbed.run --list` shows them."""
    out: Path
    """Folder for weights, tokenizer, processor and model card."""
    course: Literal["stream", "rewriting"] = "stream"
    """`stream`: the facts or beliefs of the stream. `rewriting`: bringing answers into line with stated facts, for a post-editor."""
    data_root: Path | None = None
    """Folder of the stream's official files; without it the simulated world is learned."""
    start: Path = ASSETS
    """Folder of the weights from which a training on beliefs or on rewriting starts."""
    seed: NonNegativeInt = 0
    """Seed of weights, training examples and crops."""
    steps: NonNegativeInt = 0
    """Optimiser steps; 0 is the training's own number."""
    minutes: NonNegativeFloat = 0.0
    """Wall-clock limit of the training in minutes, by which the learning rate falls to zero; 0 is the training's own."""
    threads: PositiveInt = 2
    """Threads of torch."""
    questions: PositiveInt = 1000
    """Questions for each score."""
    world_seed: int = 0
    """Seed of the simulated world."""
    world_size: int = 0
    """Number of its entities; 0 is the default."""
    missing_images: MissingImages = "skip-absent"
    """Treatment of records without their picture. Give the run's, so that the beliefs are those of the questions that it asks."""
    reading: Annotated[float, Range(least=0, most=0.9)] = 0.0
    """Share of the belief rows without a picture that state facts before the question, for editors that work through the
    prompt (a third is enough). Beliefs about pictures always have some."""
    set: tuple[str, ...] = ()
    """stream.field=value, as for the run; may name several."""

    def stream_config(self) -> StreamConfig:
        """The part of the configuration on which the run's stream depends. Raises `BadConfig` for a bad value of `set`."""
        shared = ("data_root", "seed", "missing_images", "world_seed", "world_size")
        base = StreamConfig(**{name: getattr(self, name) for name in shared})
        given = [item.partition("=") for item in self.set]
        if odd := [a + b + c for a, b, c in given if not b or not a.startswith("stream.")]:
            raise BadConfig(f"--set {', '.join(map(repr, odd))}: expected stream.field=value")
        return set_fields(base, {a.removeprefix("stream."): c for a, _, c in given})

    def problems(self) -> list[str]:
        """Every mistake in the values, as sentences."""
        out = [f"--{line}" for line in out_of_range(self)]
        if self.out.exists() and not self.out.is_dir():
            out.append(f"--out {self.out} is a file: give a folder")
        try:
            out += self.stream_config().problems()
        except BadConfig as e:
            out += str(e).splitlines()
        return out


class BadPretrain(ValueError):
    """A training that is not possible; the message lists every reason."""


def pretrain(config: PretrainConfig, report: stages.StageReport = lambda stage, done, loss: None) -> list[AbilityScore]:
    """Train, write the folder and its model card, and return the scores of the saved model.

    Raises `BadPretrain` for a configuration or a stream that cannot be learned, `UnknownName` for a stream that does not
    exist, and `BadStream` for data that cannot be read.
    """
    if problems := config.problems():
        raise BadPretrain("; ".join(problems))
    stream: Stream = STREAMS.get(config.stream)(config.stream_config())
    began = time.monotonic()
    try:
        with _threads(config.threads):
            result = _train(config, stream, report)
    except ValueError as e:
        raise BadPretrain(str(e)) from e
    (config.out / "README.md").write_text(model_card(config, stream, result, (time.monotonic() - began) / 60))
    return result.scores


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Set torch's number of threads, on which rounding depends, and restore the caller's afterwards."""
    own = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _train(config: PretrainConfig, stream: Stream, report: stages.StageReport) -> stages.TrainingResult:
    known = world(stream.config.world_seed, stream.config.world_size)
    if config.course == "stream" and stream.data_hash() == known.content_hash():
        phases = stages.shorten_phases(stages.WORLD, config.steps, config.minutes)
        return stages.train_on_world(known, config.out, config.seed, phases, config.questions, report)
    beliefs = list(stream.beliefs()) if config.course == "stream" else []
    if config.course == "stream" and not beliefs:
        raise BadPretrain(f"stream {config.stream} says nothing about what a model believes before its edits, so there is nothing to learn")
    if not (config.start / "config.json").is_file():
        make_one = f"python -m testbed.pretrain --stream world-yearly --out {config.start}"
        raise BadPretrain(f"no model lies in {config.start}: make one with {make_one}")
    if config.course == "rewriting":
        schedule = stages.shorten(stages.REWRITING, config.steps, config.minutes)
        return stages.train_rewriting(config.start, known, config.out, config.seed, schedule, config.questions, report)
    schedule = stages.shorten(stages.BELIEFS, config.steps, config.minutes)
    training = stages.BeliefTraining(config.start, known, config.seed, schedule, config.reading)
    return stages.train_on_beliefs(training, beliefs, config.out, report)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the folder's weight file (64 hex digits)."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def command_of(config: PretrainConfig) -> str:
    """The command that gives this configuration; options with their default are left out, but for the seed."""
    parts = ["python -m testbed.pretrain"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default or field.name == "seed":
            values = value if isinstance(value, tuple) else (value,)
            parts.append(f"--{field.name.replace('_', '-')} {' '.join(shlex.quote(str(v)) for v in values)}")
    return " ".join(parts)


def model_card(config: PretrainConfig, stream: Stream, result: stages.TrainingResult, minutes: float) -> str:
    """The model card as Markdown: how the model was made, what it has learned, and its scores."""
    notes = "".join(f"- {note}\n" for note in result.notes)
    made = {"config": config, "result": result, "stream": stream, "minutes": minutes, "command": command_of(config), "notes": notes}
    learned, scores = result.learned or stream.origin, "\n".join(score_table(result.scores))
    return _CARD.format(**made, learned=learned, sha256=weights_sha256(config.out), scores=scores)


def score_table(scores: Sequence[AbilityScore]) -> list[str]:
    """The lines of a Markdown table of the scores and their acceptance thresholds."""
    out = ["| ability | value | threshold | n | |", "|---|---|---|---|---|"]
    for s in scores:
        verdict = {True: "met", False: "MISSED", None: "reported"}[s.passed]
        out.append(f"| {s.ability} ({s.unit}) | {s.value:.3f} | {'' if s.threshold is None else s.threshold} | {s.n:,} | {verdict} |")
    return out


@contextmanager
def _bars(console: Console) -> Iterator[stages.StageReport]:
    """Progress bars, one for each stage; nothing where the output is no terminal."""
    loss = TextColumn("{task.percentage:>3.0f}%  loss {task.fields[loss]:.3f}")
    columns = (TextColumn("{task.description:>14}"), BarColumn(), loss, TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(stage: str, done: float, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0, loss=loss)
            progress.update(tasks[stage], completed=done, loss=loss)

        yield report


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 where every threshold is met, 1 where one is missed, 2 for a configuration that cannot be used."""
    config = tyro.cli(PretrainConfig, args=None if argv is None else list(argv), prog="python -m testbed.pretrain")
    console = Console()
    try:
        with _bars(console) as report:
            scores = pretrain(config, report)
    except (BadPretrain, BadStream, UnknownName) as e:
        console.print(f"pretrain: {e}", style="red", markup=False, soft_wrap=True)
        return 2
    for line in score_table(scores):
        console.print(line, style="red" if "MISSED" in line else None, markup=False, highlight=False, soft_wrap=True)
    missed = [s.ability for s in scores if s.passed is False]
    verdict = f"Missed: {'; '.join(missed)}." if missed else "Every threshold is met."
    console.print(f"Model and card are in {config.out}. {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
