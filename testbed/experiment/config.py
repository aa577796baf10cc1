"""One dataclass for a run. It is checked as a whole before anything is loaded, all mistakes at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from streams.base import MissingImages, StreamConfig
from testbed.benchmarks import files as benchmarks
from testbed.benchmarks.files import BadBenchmark, BenchmarkConfig
from testbed.core import variants
from testbed.core.registry import EDITORS, STREAMS, UnknownName
from testbed.core.schema import folder_name
from testbed.experiment.track import missing

D = TypeVar("D")
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class BadConfig(ValueError):
    """Everything that is wrong with a configuration, one line each."""


@dataclass(frozen=True)
class RunConfig:
    """Run sequential editors over a stream of fact changes and ask fixed panels of questions along the way."""

    stream: str = "okedit-yearly"
    """Stream of edits (see --list)."""
    editor: tuple[str, ...] = ("noop", "oracle", "finetune", "balancedit")
    """Editors, separated by commas; settings in brackets make a variant: 'memit,memit[history=true]'."""
    model: str = "tiny"
    """`tiny`, a folder written by save_pretrained, or a hub id."""
    data_root: Path | None = None
    """Folder of the stream's official files; without it the simulated world stands in, where it can."""
    edits: int = 500
    """Number of edits."""
    batch: int = 1
    """Edits per step."""
    seed: int = 0
    """Seed of the order of the stream, the panels and the editors."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    device_map: str | None = None
    """Spread the model over several GPUs: auto, balanced, sequential, or a JSON file of parts and devices (needs accelerate)."""
    dtype: str = "auto"
    """auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16."""
    out: Path | None = None
    """Run folder; by default runs/STREAM-SEED-HASH."""
    resume: Path | None = None
    """Go on with a run folder; its configuration is taken from its manifest."""
    set: tuple[str, ...] = ()
    """editor.field=value or stream.field=value; may be given many times."""
    missing_images: MissingImages = "skip"
    """Records without their picture: skip them, ask without a picture, or put the caption in its place."""
    probe_budget: int = 8000
    """Questions per editor and 500 edits; panels shrink to fit."""
    benchmarks: tuple[Path, ...] = ()
    """Files or folders of benchmarks to ask besides, separated by commas (docs/benchmarks.md; settings: --set benchmarks.field=value)."""
    max_new_tokens: int = 16
    """Longest free generation, in tokens."""
    save_every: int = 50
    """Edits between saved states, rounded up to whole steps; a stopped run goes on from the newest one."""
    save_model: Path | None = None
    """Write the edited model of every editor that changes weights to this folder with save_pretrained."""
    cache: Path | None = None
    """Folder that keeps what runs of one model share: its unedited answers to the same questions, second moments."""
    track: Tracker | None = None
    """Show the numbers of the run, as it goes, to tensorboard, wandb (offline) or mlflow (a local file) as well."""
    config: Path | None = None
    """YAML file with any of these fields; the command line wins."""
    log: Path | None = None
    """Append each phase (apply, probe, write, rename, resume) to this file as it begins."""
    dry_run: bool = False
    """Print what would run and what it would cost, and stop."""
    list: bool = False
    """Print every editor, stream and probe with one line each, and stop."""

    def overrides(self, name: str) -> dict[str, str]:
        """Fields set for one editor (or for `stream`), as text."""
        out: dict[str, str] = {}
        for item in self.set:
            left, _, value = item.partition("=")
            owner, _, key = left.partition(".")
            if owner == name:
                out[key] = value
        return out

    def stream_config(self) -> StreamConfig:
        """The stream's own configuration with `--set stream.*` applied. Raises `BadConfig`."""
        base = StreamConfig(data_root=self.data_root, seed=self.seed, missing_images=self.missing_images)
        return set_fields(base, self.overrides("stream"))

    def benchmark_config(self) -> BenchmarkConfig:
        """How benchmarks are asked, with `--set benchmarks.*` applied. Raises `BadConfig`."""
        return set_fields(BenchmarkConfig(), self.overrides("benchmarks"))

    def editor_class(self, name: str) -> Any:
        """The class of one editor, a variant's under its whole name. Raises `BadConfig` or `UnknownName`."""
        base, _ = _split(name)
        cls = EDITORS.get(base)
        return cls if base == name else type(cls.__name__, (cls,), {"name": name, "__doc__": cls.__doc__})

    def editor_config(self, name: str) -> Any:
        """The configuration of one editor: `--set`, then what stands in its brackets. Raises `BadConfig` or `UnknownName`."""
        base, settings = _split(name)
        return set_fields(EDITORS.get(base).Config(), self.overrides(base) | settings)

    def problems(self) -> list[str]:
        """Every mistake, as sentences; empty when the run can start."""
        out = [f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}" for name in _POSITIVE if getattr(self, name) < 1]
        if not self.editor:
            out.append("--editor names no editor; see --list")
        if len(set(self.editor)) < len(self.editor):
            out.append(f"--editor names one editor twice: {', '.join(self.editor)}")
        elif len(set(map(folder_name, self.editor))) < len(self.editor):
            out.append(f"--editor names two editors that would share a folder: {', '.join(self.editor)}")
        if self.data_root is not None and not self.data_root.is_dir():
            out.append(f"--data-root {self.data_root} is not a folder")
        out += _tried(lambda: STREAMS.get(self.stream))
        out += _tried(lambda: self.stream_config().problems())
        out += _tried(self._benchmark_problems)
        out += missing(self.track) if self.track else []
        for name in self.editor:
            out += _tried(lambda name=name: self._editor_problems(name))
        out += self._set_problems()
        return out

    def _benchmark_problems(self) -> list[str]:
        config = self.benchmark_config()
        problems = [f"benchmarks: {p}" for p in config.problems()]
        if not problems:
            benchmarks.load(self.benchmarks, config)
        return problems

    def _editor_problems(self, name: str) -> list[str]:
        out = [f"{name}: {problem}" for problem in self.editor_config(name).problems()]
        limit = self.editor_class(name).traits.max_batch
        if limit is not None and self.batch > limit:
            out.append(f"{name} takes at most {limit} edits at once, got --batch {self.batch}")
        return out

    def _set_problems(self) -> list[str]:
        owners = {"stream", "benchmarks", *(name.partition("[")[0] for name in self.editor)}
        out = []
        for item in self.set:
            owner = item.partition("=")[0].partition(".")[0]
            if "=" not in item or "." not in item.partition("=")[0]:
                out.append(f"--set {item!r} is not of the form editor.field=value")
            elif owner not in owners:
                out.append(f"--set {item!r} names {owner!r}, which takes no part in this run ({', '.join(sorted(owners))})")
        return out

    def stored(self) -> dict[str, Any]:
        """What a manifest keeps: everything but output places, logs and switches of the command line."""
        skip = {"out", "resume", "config", "log", "dry_run", "list", "save_model", "save_every", "cache", "track"}
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in skip}

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run. Data and model may have moved: their hashes stand for them."""
        return {k: v for k, v in self.stored().items() if k not in PLACES}


PLACES = ("data_root", "model", "benchmarks")
"""Fields that say where something lies; its content is hashed."""
_POSITIVE = ("edits", "batch", "probe_budget", "max_new_tokens", "save_every")


def _split(name: str) -> tuple[str, dict[str, str]]:
    try:
        return variants.split(name)
    except ValueError as e:
        raise BadConfig(f"--editor {e}") from e


def _tried(check: Any) -> list[str]:
    """Problems that a check returns or raises."""
    try:
        result = check()
    except (UnknownName, BadConfig, BadBenchmark) as e:
        return str(e).splitlines()
    return result if isinstance(result, list) else []


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: plain(v) for k, v in dataclasses.asdict(value).items()}
    if isinstance(value, (tuple, list, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def set_fields(config: D, values: typing.Mapping[str, Any]) -> D:
    """A dataclass with fields set from text. Raises `BadConfig` naming every unknown field and wrong value."""
    hints = get_type_hints(type(config))
    out, wrong = {}, []
    for name, text in values.items():
        if name not in hints:
            wrong.append(f"{type(config).__qualname__} has no field {name!r}; there are {', '.join(sorted(hints)) or 'none'}")
            continue
        try:
            out[name] = parse_value(text, hints[name])
        except ValueError as e:
            wrong.append(f"{name}={text!r}: {e}")
    if wrong:
        raise BadConfig("\n".join(wrong))
    return dataclasses.replace(config, **out)  # type: ignore[type-var]


def parse_value(text: Any, hint: Any) -> Any:
    """Text (or a YAML value) as the type of a field. Raises ValueError that says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if str(text).lower() in ("none", "null", ""):
            return None
        return parse_value(text, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if text not in args:
            raise ValueError(f"expected one of {', '.join(map(str, args))}")
        return text
    if origin in (tuple, frozenset):
        return origin(parse_value(p, args[0]) for p in _parts(text) if p != "")
    if text is None or isinstance(text, (list, tuple, dict)):
        raise ValueError(f"expected one value, got {text!r}")
    if hint is bool:
        if str(text).lower() not in _BOOLS:
            raise ValueError("expected true or false")
        return _BOOLS[str(text).lower()]
    return _number(text, hint) if hint in (int, float) else hint(str(text))


def _parts(text: Any) -> list[Any]:
    """The items of a list, or of text separated by commas."""
    if isinstance(text, str):
        return variants.names(text)
    if not isinstance(text, (list, tuple, frozenset)):
        raise ValueError("expected a list")
    return list(text)


def _number(text: Any, hint: type) -> int | float:
    """A number as it was written: a fraction is no whole number, and "nan" is none at all."""
    wanted = "a whole number" if hint is int else "a number"
    if isinstance(text, bool) or (hint is int and isinstance(text, float) and not text.is_integer()):
        raise ValueError(f"expected {wanted}")
    try:
        value = hint(text)
    except (ValueError, OverflowError) as e:
        raise ValueError(f"expected {wanted}") from e
    if value != value:
        raise ValueError(f"expected {wanted}")
    return value


_BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
