"""The configuration of a run: one dataclass, checked as a whole, with every mistake reported at once, before a model loads."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_type_hints

from streams.base import MissingImages, Stream, StreamConfig
from testbed.benchmarks import files as benchmarks
from testbed.benchmarks.files import BadBenchmark, BenchmarkConfig
from testbed.core import variants
from testbed.core.plugins import BadPlugin, load_plugins, refuse_changed
from testbed.core.ranges import NonNegativeInt, PositiveInt, Seed, out_of_range
from testbed.core.registry import EDITORS, STREAMS, WRAPPERS, UnknownName
from testbed.core.schema import folder_name
from testbed.experiment.protocols import ProtocolName, probes_of, prompt_of
from testbed.experiment.schedule import ScheduleConfig
from testbed.experiment.track import missing
from testbed.probes.base import ProbeConfig
from testbed.storage.files import StoreError
from testbed.storage.run_folder import RunFolder

if TYPE_CHECKING:  # an editor's module loads torch, and a configuration is read without it
    from testbed.editors.base import Editor

D = TypeVar("D")
T = TypeVar("T")
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class BadConfig(ValueError):
    """A configuration is wrong; the message has one line per mistake."""


@dataclass(frozen=True)
class RunConfig:
    """Run sequential editors over a stream of fact changes and ask fixed panels of questions along the way."""

    stream: str = "okedit-yearly"
    """Stream of edits (see --list)."""
    editor: tuple[str, ...] = ("noop", "oracle", "finetune", "balancedit", "elder", "alphaedit", "scr")
    """Editors, separated by commas; settings in brackets make a variant: 'memit,memit[history=true]'."""
    model: str = "tiny"
    """`tiny`, a folder written by save_pretrained, or a hub id."""
    data_root: Path | None = None
    """Folder of the stream's official files; without it the simulated world stands in, where it can."""
    edits: PositiveInt = 500
    """Number of edits."""
    protocol: tuple[ProtocolName, ...] = ()
    """Protocols of papers, whose tables are printed besides: published, wild (docs/protocols.md)."""
    batch: PositiveInt = 1
    """Edits per step."""
    seed: Seed = 0
    """Seed of the order of the stream, the panels and the editors."""
    prompt: Literal["auto", "bare", "question", "examples", "chat"] = "auto"
    """How a text model is asked: bare, as a question, after two examples of the relation, or by its chat template. auto asks a
    base or chat model in the form in which it knows most old answers; a family with a template of its own keeps it."""
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
    missing_images: MissingImages = "skip-absent"
    """Records without their picture: skip them, ask without a picture, or put the caption in its place. skip skips those with a
    broken picture too, at which the run ends otherwise."""
    probe_budget: PositiveInt = 8000
    """Questions per editor and 500 edits; panels shrink to fit."""
    benchmarks: tuple[Path, ...] = ()
    """Files or folders of benchmarks to ask besides, or the suites default (of --data-root or the hub) and editing (of --data-root),
    separated by commas (docs/benchmarks.md; settings: --set benchmarks.field=value)."""
    plugin: tuple[str, ...] = ()
    """Python files or modules with editors, streams, probes or monitors of your own, separated by commas."""
    max_new_tokens: PositiveInt = 16
    """Longest free generation, in tokens."""
    jobs: NonNegativeInt = 0
    """Editors at a time, each in a process of its own, on a CPU. 0: in a command of 100 edits or more one for each free core, else 1."""
    save_every: PositiveInt = 50
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

    def __post_init__(self) -> None:
        """Take values as the command line takes them: text for a path or a number, one name for a list. Raises `BadConfig`."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        hints = type_hints(type(self))
        odd = {name: value for name, value in given.items() if not _fits(value, hints[name])}
        wrong = []
        for name, value in odd.items():
            try:
                object.__setattr__(self, name, parse_value(value, hints[name]))
            except ValueError as e:
                wrong.append(f"--{name.replace('_', '-')} {value!r}: {e}")
        if wrong:
            raise BadConfig("\n".join(wrong))

    def resolve(self) -> ResolvedRun:
        """Look up the stream and the editors and read the benchmarks. Raises `BadConfig` with every mistake at once."""
        problems = self._field_problems()
        plugins = _attempt(problems, lambda: load_plugins(self.plugin))
        stream = _attempt(problems, self.resolve_stream)
        loaded = _attempt(problems, self._load_benchmarks)
        _attempt(problems, self.resolve_probes)
        problems += missing(self.track) if self.track else []
        editors = {name: e for name in self.editor if (e := _attempt(problems, lambda name=name: self.resolve_editor(name))) is not None}
        problems += self._set_problems()
        if problems or stream is None or loaded is None:
            raise BadConfig("\n".join(problems))
        prompt = (prompt_of(self.protocol) if self.prompt == "auto" else None) or self.prompt
        return ResolvedRun(replace(self, prompt=prompt), stream, editors, loaded, plugins or {})

    def problems(self) -> list[str]:
        """Every mistake as a sentence; empty when the run can start."""
        problems: list[str] = []
        _attempt(problems, self.resolve)
        return problems

    def resolve_stream(self) -> Resolved[Stream]:
        """The class of the stream and its configuration with `--set stream.*`. Raises `BadConfig`."""
        problems: list[str] = []
        cls: Any = _attempt(problems, lambda: STREAMS.get(self.stream))
        base = StreamConfig(data_root=self.data_root, seed=self.seed, missing_images=self.missing_images)
        config = _attempt(problems, lambda: set_fields(base, self._settings("stream")))
        problems += config.problems() if config is not None else []
        if problems or config is None:
            raise BadConfig("\n".join(problems))
        return Resolved(cls, config, partial(cls, config))

    def resolve_editor(self, name: str) -> Resolved[Editor]:
        """The class of an editor and its configuration: `--set`, then its brackets. Raises `BadConfig` or `UnknownName`."""
        try:
            base, settings = variants.split(name)
        except ValueError as e:
            raise BadConfig(f"--editor {e}") from e
        began_as = self._began_as(name, base)
        cls = EDITORS.get(began_as)
        config = set_fields(cls.Config(), self._settings(base) | settings)
        problems = [f"{name}: {problem}" for problem in config.problems()]
        limit = cls.traits.max_batch
        if limit is not None and self.batch > limit:
            problems.append(f"{name} takes at most {limit} edits at once, got --batch {self.batch}")
        if problems:
            raise BadConfig("\n".join(problems))
        named = cls if began_as == name else type(cls.__name__, (cls,), {"name": name, "__doc__": cls.__doc__})
        note = "" if began_as == base else f"{name} goes on as {began_as}, which had that name in the version that began the run"
        return Resolved(named, config, partial(named, config, self.seed), note)

    def _began_as(self, name: str, base: str) -> str:
        """The editor for which a name stood in the version that began the run: its configuration lacks fields of a wrapper's new form."""
        stored = RunFolder(self.resume).manifest().get("editor_configs", {}).get(name) if self.resume else None
        if stored is None:
            return base
        host, *wrappers = base.split("+")
        classes = {w: WRAPPERS.get(w) for w in wrappers}
        return "+".join([host, *(w if set(type_hints(c.Config)) <= stored.keys() else c.former or w for w, c in classes.items())])

    def resolve_probes(self) -> ProbeConfig:
        """What is asked, with `--set probes.*`. Raises `BadConfig`."""
        config = set_fields(ProbeConfig(), self._settings("probes"))
        if problems := config.problems():
            raise BadConfig("\n".join(f"probes: {p}" for p in problems))
        return replace(config, also=tuple(dict.fromkeys((*config.also, *probes_of(self.protocol)))))

    def _load_benchmarks(self) -> benchmarks.LoadedBenchmarks:
        config = set_fields(BenchmarkConfig(), self._settings("benchmarks"))
        if problems := config.problems():
            raise BadConfig("\n".join(f"benchmarks: {p}" for p in problems))
        return benchmarks.load(self.benchmarks, config, self.data_root)

    def _settings(self, owner: str) -> dict[str, str]:
        """The `--set` fields of one editor, of `stream`, of `benchmarks` or of `probes`, as text."""
        items = [item.partition("=") for item in self.set if setting_owner(item) == owner]
        return {left.partition(".")[2]: value for left, _, value in items}

    def _field_problems(self) -> list[str]:
        """Mistakes that the fields alone show."""
        out = [f"--{name.replace('_', '-')} {rest}" for name, rest in (p.split(" ", 1) for p in out_of_range(self))]
        if not self.editor:
            out.append("--editor names no editor; see --list")
        if len(set(self.editor)) < len(self.editor):
            out.append(f"--editor names one editor twice: {', '.join(self.editor)}")
        elif len(set(map(folder_name, self.editor))) < len(self.editor):
            out.append(f"--editor names two editors that would share a folder: {', '.join(self.editor)}")
        if self.data_root is not None and not self.data_root.is_dir():
            out.append(f"--data-root {self.data_root} is not a folder")
        for name, path in (("out", self.out), ("save-model", self.save_model), ("cache", self.cache), ("log", self.log)):
            if path is not None and not _can_hold(path.parent if name == "log" else path, exists=name == "log"):
                out.append(f"--{name} {path} cannot be written: make the folder, or choose another one")
        return out

    def _set_problems(self) -> list[str]:
        owners = {*COMMON, *(name.partition("[")[0] for name in self.editor)}
        out: list[str] = []
        for item in self.set:
            owner = setting_owner(item)
            if not owner:
                out.append(f"--set {item!r} is not of the form editor.field=value")
            elif owner not in owners:
                out.append(f"--set {item!r} names {owner!r}, which takes no part in this run ({', '.join(sorted(owners))})")
        return out

    def stored(self) -> dict[str, Any]:
        """The fields that a manifest keeps: all but output folders, logs and switches of the command line."""
        skip = {"out", "resume", "config", "log", "dry_run", "list", "save_model", "save_every", "cache", "track", "jobs"}
        skip |= set() if self.protocol else {"protocol"}
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in skip}

    def identity(self) -> dict[str, Any]:
        """The stored fields that identify the run: all but those in `LOCATIONS`."""
        return {k: v for k, v in self.stored().items() if k not in LOCATIONS}


COMMON = ("stream", "benchmarks", "probes")
"""Owners of settings that every editor shares."""
LOCATIONS = ("data_root", "model", "benchmarks", "plugin")
"""Fields that say where data, a model or a plug-in lie. They may move between two processes of a run; hashes identify their content."""


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A plug-in of a run: its class (of a variant, under its whole name), its checked configuration, and its constructor."""

    cls: type[T]
    config: Any
    create: Callable[[], T]
    note: str = ""
    """A line for the user: what the name stands for in a run that an older version began."""


@dataclass(frozen=True)
class ResolvedRun:
    """A checked configuration with the plug-ins and files that its fields name."""

    config: RunConfig
    stream: Resolved[Stream]
    editors: dict[str, Resolved[Editor]]
    """By name, in the order of the configuration."""
    benchmarks: benchmarks.LoadedBenchmarks
    plugins: dict[str, str] = field(default_factory=dict)
    """SHA-256 by plug-in as it was given."""

    def schedule_config(self) -> ScheduleConfig:
        """What the schedule depends on beside the edits."""
        config = self.config
        return ScheduleConfig(config.batch, config.seed, config.probe_budget, self.benchmarks.every, config.resolve_probes())


def _attempt(problems: list[str], check: Callable[[], T]) -> T | None:
    """The result of a check; None, and its message among the problems, where it raises."""
    try:
        return check()
    except (UnknownName, BadConfig, BadBenchmark, BadPlugin) as e:
        problems += str(e).splitlines()
        return None


def stored_config(out: Path) -> RunConfig:
    """The configuration of a run folder, set to resume it. Raises `StoreError`, and `BadPlugin` for a plug-in that changed."""
    manifest = RunFolder(out).manifest()
    stored = manifest.get("config")
    if not isinstance(stored, dict):
        raise StoreError(f"{out / 'manifest.json'} holds no configuration: it is not the manifest of a run")
    refuse_changed(stored.get("plugin", ()), manifest.get("plugins", ()), manifest.get("entry_points", {}))
    known = {f.name for f in dataclasses.fields(RunConfig)}
    return replace(set_fields(RunConfig(), {k: v for k, v in stored.items() if k in known}), resume=out)


def setting_owner(item: str) -> str:
    """The owner in owner.field=value; "" for text of another form."""
    left, equals, _ = item.partition("=")
    owner, dot, _ = left.partition(".")
    return owner if equals and dot else ""


def plain(value: Any) -> Any:
    """The value in JSON types."""

    def convert(x: Any) -> Any:
        if dataclasses.is_dataclass(x):
            return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return list(x) if isinstance(x, frozenset) else str(x)

    return json.loads(json.dumps(value, default=convert))


type_hints = cache(get_type_hints)
"""The types of a dataclass's fields, evaluated once: that takes longer than all else that a configuration needs."""


def set_fields(config: D, values: Mapping[str, Any]) -> D:
    """A dataclass with fields set from text. Raises `BadConfig` that names every unknown field and every wrong value."""
    hints = type_hints(type(config))
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
    return replace(config, **out)  # type: ignore[type-var]


def _can_hold(folder: Path, exists: bool) -> bool:
    """Whether files can be written into a folder that is there or, unless it must exist, one that can be made."""
    while not exists and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of a field, text for a path and a whole number for a text not counted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def parse_value(text: Any, hint: Any) -> Any:
    """Text (or a YAML value) as the type of a field. Raises ValueError with the expected form."""
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
    """The items of a list or of comma-separated text."""
    if isinstance(text, str):
        return variants.names(text)
    if not isinstance(text, (list, tuple, frozenset)):
        raise ValueError("expected a list")
    return list(text)


def _number(text: Any, hint: type) -> int | float:
    """Text as a number: a fraction is no whole number, and "nan" is no number."""
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
