"""Train the tiny model: on the simulated world, on the pre-edit beliefs of any stream, or to rewrite answers.

    python -m testbed.pretrain --stream world-yearly --out DIR
    python -m testbed.pretrain --stream okedit-yearly --data-root FILES --out DIR
    python -m testbed.pretrain --stream world-yearly --course rewriting --out DIR

The first trains from nothing (the committed weights took 57 minutes on two busy cores), the others start from the committed weights
(ten minutes). The first two save a folder that `--model DIR` of `testbed.run` takes, the third one for `--set postedit.model=DIR`,
with a model card that holds the gates, measured by free generation after the weights were read back.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from streams.base import BadStream, MissingImages, Stream, StreamConfig
from streams.world.facts import World, world
from testbed.core.registry import STREAMS, UnknownName
from testbed.experiment.config import BadConfig, set_fields
from testbed.pretraining import stages as _courses
from testbed.pretraining.evaluation import GateRow

if TYPE_CHECKING:
    from testbed.pretraining.stages import Progress as Report

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class PretrainConfig:
    """Train the tiny model on the simulated world or on a stream's beliefs."""

    stream: str
    """Name of a stream, as `python -m testbed.run --list` shows them."""
    out: Path
    """Folder for weights, tokenizer, processor and model card."""
    course: Literal["stream", "rewriting"] = "stream"
    """`stream`: what the stream is about. `rewriting`: bringing answers into line with stated facts, for a post-editor."""
    data_root: Path | None = None
    """Folder of the stream's official files; without it the simulated world is learned."""
    start: Path = ASSETS
    """Folder of the weights that a course of beliefs or of rewriting starts from."""
    seed: int = 0
    """Seed of weights, lessons and crops."""
    steps: int = 0
    """Optimiser steps; 0 is the course's own number."""
    minutes: float = 0.0
    """Wall-clock limit of the training in minutes; the rate falls to zero by then. 0 is the course's own."""
    threads: int = 2
    """Threads of torch."""
    questions: int = 1000
    """Questions a row of the gates."""
    world_seed: int = 0
    """Which simulated world."""
    world_size: int = 0
    """Its number of entities; 0 is the default."""
    missing_images: MissingImages = "skip"
    """Records without their picture, as the run will treat them: the beliefs are those of the questions it asks."""
    reading: float = 0.0
    """Share of the rows of beliefs in words that state facts before the question, for editors that work through the
    prompt (a third is enough). Beliefs about pictures always have some."""
    set: tuple[str, ...] = ()
    """stream.field=value, as for the run; may name several."""

    def stream_config(self) -> StreamConfig:
        """What the run's stream depends on. Raises `BadConfig` for a `set` that cannot be."""
        base = StreamConfig(
            data_root=self.data_root,
            seed=self.seed,
            missing_images=self.missing_images,
            world_seed=self.world_seed,
            world_size=self.world_size,
        )
        given = [item.partition("=") for item in self.set]
        if odd := [a + b + c for a, b, c in given if not b or not a.startswith("stream.")]:
            raise BadConfig(f"--set {', '.join(map(repr, odd))}: expected stream.field=value")
        return set_fields(base, {a.removeprefix("stream."): c for a, _, c in given})

    def problems(self) -> list[str]:
        """Every mistake in the values, as sentences."""
        out = [
            f"--{name} must be {least} or more, got {getattr(self, name)}"
            for name, least in (("threads", 1), ("questions", 1), ("seed", 0))
            if getattr(self, name) < least
        ]
        if self.steps < 0 or not self.minutes >= 0:
            out.append(f"--steps and --minutes must be 0 (the course's own) or more, got {self.steps} and {self.minutes}")
        if not 0 <= self.reading <= 0.9:
            out.append(f"--reading must lie in [0, 0.9], got {self.reading}")
        if self.out.exists() and not self.out.is_dir():
            out.append(f"--out {self.out} is a file: give a folder")
        try:
            out += self.stream_config().problems()
        except BadConfig as e:
            out += str(e).splitlines()
        return out


class BadPretrain(ValueError):
    """A course that cannot be given; the message lists every reason."""


def evaluate_gates(model_dir: Path, questions: int = 1000, of: World | None = None) -> list[GateRow]:
    """Measure a saved model against the table of gates of the simulated world.

    Args:
        model_dir: folder with weights, tokenizer and processor.
        questions: questions a row (fewer where the world has fewer, as for two-hop).
        of: the world; by default the one that the committed weights know.
    """
    return _courses.world_gates(model_dir, of or world(0, 0), questions)


def pretrain(config: PretrainConfig, report: Report = lambda stage, done, loss: None) -> list[GateRow]:
    """Run a course, write folder and model card, return the gates.

    Raises `BadPretrain` for a configuration or stream that cannot be learned, `UnknownName` for a stream
    that does not exist, `BadStream` for data that cannot be read.
    """
    if problems := config.problems():
        raise BadPretrain("; ".join(problems))
    stream: Stream = STREAMS.get(config.stream)(config.stream_config())
    began = time.monotonic()
    try:
        with _threads(config.threads):
            course = _run_course(config, stream, report)
    except ValueError as e:
        raise BadPretrain(str(e)) from e
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "README.md").write_text(model_card(config, stream, course, (time.monotonic() - began) / 60))
    return course.rows


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Threads of torch for the length of a course; whoever calls goes on with its own, on which rounding depends."""
    own = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _run_course(config: PretrainConfig, stream: Stream, report: Report) -> _courses.Course:
    try:
        known = world(stream.config.world_seed, stream.config.world_size)
    except ValueError as e:
        raise BadPretrain(str(e)) from e
    if config.course == "rewriting":
        return _rewriting(config, known, report)
    if stream.data_hash() == known.content_hash():
        legs = _courses.cut_legs(_courses.WORLD, config.steps, config.minutes)
        return _courses.teach_world(known, config.out, config.seed, legs, config.questions, report)
    beliefs = list(stream.beliefs())
    if not beliefs:
        raise BadPretrain(f"stream {config.stream} says nothing about what a model believes before its edits, so there is nothing to learn")
    _require_start(config)
    schedule = _courses.cut(_courses.BELIEFS, config.steps, config.minutes)
    course = _courses.BeliefCourse(config.start, known, config.seed, schedule, config.reading)
    return _courses.teach_beliefs(course, beliefs, config.out, report)


def _rewriting(config: PretrainConfig, known: World, report: Report) -> _courses.Course:
    _require_start(config)
    schedule = _courses.cut(_courses.REWRITING, config.steps, config.minutes)
    return _courses.teach_rewriting(config.start, known, config.out, config.seed, schedule, config.questions, report)


def _require_start(config: PretrainConfig) -> None:
    if not (config.start / "config.json").is_file():
        raise BadPretrain(
            f"no model lies in {config.start}: make one with python -m testbed.pretrain --stream world-yearly --out {config.start}"
        )


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the folder's weight file (64 hex digits)."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def command_of(config: PretrainConfig) -> str:
    """The command that gives this configuration."""
    parts = [f"python -m testbed.pretrain --stream {config.stream} --out {config.out} --seed {config.seed}"]
    parts += [f"--course {config.course}"] if config.course != "stream" else []
    parts += [f"--start {config.start}"] if config.start != ASSETS else []
    for name in ("data_root", "steps", "minutes", "world_seed", "world_size", "reading"):
        if value := getattr(config, name):
            parts.append(f"--{name.replace('_', '-')} {value}")
    parts += [f"--missing-images {config.missing_images}"] if config.missing_images != "skip" else []
    parts += [f"--set {' '.join(map(shlex.quote, config.set))}"] if config.set else []
    return " ".join(parts)


def model_card(config: PretrainConfig, stream: Stream, course: _courses.Course, minutes: float) -> str:
    """The model card as Markdown: how it was made, what it holds, its gates."""
    lines = [
        "# Tiny image-text model",
        "",
        "`LlavaForConditionalGeneration` (CLIP tower 3x96, Llama 4x192), byte-level BPE tokenizer, PIL image processor;",
        "48x48 pictures, 36 image tokens. Weights are stored in bf16 and load as fp32.",
        "",
        f"- Made by: `{command_of(config)}`",
        f"- Learned: {course.learned or stream.origin}",
        f"- Seed {config.seed}; {course.steps:,} steps after the tower; {minutes:.1f} minutes in all, on {config.threads} threads",
        f"- SHA-256 of `model.safetensors`: `{weights_sha256(config.out)}`",
        f"- Licence: MIT, as the project. {stream.licence}",
        *(f"- {note}" for note in course.notes),
        "",
        "Sums of bf16 products depend on the machine, so another one gives other weights from the same command; the gates are",
        "what must hold. Answers below are free greedy generation and exact match, n questions a row.",
        "",
        *gate_table(course.rows),
        "",
    ]
    return "\n".join(lines)


def gate_table(rows: Sequence[GateRow]) -> list[str]:
    """The gates as a Markdown table, a line each."""
    out = ["| ability | value | gate | n | |", "|---|---|---|---|---|"]
    for r in rows:
        passed = {True: "met", False: "MISSED", None: "reported"}[r.passed]
        out.append(f"| {r.ability} ({r.unit}) | {r.value:.3f} | {'' if r.gate is None else r.gate} | {r.n:,} | {passed} |")
    return out


@contextmanager
def _bars(console: Console) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: float, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0, loss=loss)
            progress.update(tasks[stage], completed=done, loss=loss)

        yield report


def show(rows: Sequence[GateRow], console: Console) -> None:
    """Print the gates."""
    table = Table("ability", "value", "gate", "n", "")
    for r in rows:
        colour = {True: "green", False: "red", None: "dim"}[r.passed]
        table.add_row(
            r.ability,
            f"{r.value:.3f}",
            "" if r.gate is None else f"{r.gate}",
            f"{r.n:,}",
            {True: "met", False: "MISSED", None: ""}[r.passed],
            style=colour,
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when every gate is met, 1 when one is missed, 2 for a configuration that cannot be used."""
    config = tyro.cli(PretrainConfig, args=None if argv is None else list(argv), prog="python -m testbed.pretrain")
    console = Console()
    try:
        with _bars(console) as report:
            rows = pretrain(config, report)
    except (BadPretrain, BadStream, UnknownName) as e:
        console.print(f"pretrain: {e}", style="red", markup=False, soft_wrap=True)
        return 2
    show(rows, console)
    missed = [r.ability for r in rows if r.passed is False]
    console.print(f"Model and card are in {config.out}. " + (f"Missed: {'; '.join(missed)}." if missed else "Every gate is met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
