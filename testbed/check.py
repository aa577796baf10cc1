"""Check a plug-in against the contracts that the testbed's own classes keep: `testbed check my_editor.py`.

Editors and streams are tried on everything that the shared tests ask of them; then a small run with all classes of the plug-in
is made twice, once stopped and resumed. It takes a minute or two, needs no download, and leaves nothing behind.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from testbed.core import threads

    threads.prepare()

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from streams.base import Stream, StreamConfig
from testbed.checks import editors, random_models, small_run, streams
from testbed.checks.contract import Outcome, outcome, title
from testbed.core import variants
from testbed.core.plugins import REGISTRIES, load_plugins
from testbed.core.registry import EDITORS, METRICS, PROBES, STREAMS, WRAPPERS
from testbed.core.terminal import ended_by_its_reader
from testbed.experiment.command import run_command
from testbed.experiment.config import BadConfig, RunConfig
from testbed.model.handle import ModelHandle
from testbed.model.loading import load


@dataclass(frozen=True)
class CheckConfig:
    """Run the shared contract suite on the classes that a plug-in registers."""

    plugin: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Python files or modules."""
    set: tuple[str, ...] = ()
    """editor.field=value or stream.field=value, for what the class cannot do without, separated by commas."""
    data_root: Path | None = None
    """Folder of the files that a stream reads."""
    argument: str = ""
    """What follows the colon in the name of a stream that takes its source there."""
    model_streams: tuple[str, ...] = ("okedit-yearly", "world-yearly")
    """Streams whose edits editors are tried on: one for the model that reads pictures, one for the text model."""
    editor: tuple[str, ...] = ("noop", "oracle")
    """Editors of the small run for a plug-in without one, separated by commas."""


def registered_by(plugins: Sequence[str]) -> dict[str, list[str]]:
    """By kind, the names that the plug-ins add. Raises `BadPlugin`."""
    before = {r.kind: set(r.names()) for r in REGISTRIES}
    load_plugins(plugins)
    return {r.kind: sorted(set(r.names()) - before[r.kind]) for r in REGISTRIES}


def outcomes(config: CheckConfig) -> Iterator[Outcome]:
    """Every check of every class of the plug-ins, as it is done. Raises `BadPlugin`, and `BadConfig` where it adds nothing."""
    new = registered_by(config.plugin)
    if not any(new.values()):
        raise BadConfig(f"{', '.join(config.plugin)} registers nothing that the installed packages do not have already")
    names = [*new[EDITORS.kind], *(f"{_host(WRAPPERS.get(w))}+{w}" for w in new[WRAPPERS.kind])]
    yield from _of_editors(config, names)
    for name in new[STREAMS.kind]:
        yield from _of_stream(config, _with_source(config, name))
    yield from _of_a_run(config, new, names)


def _of_editors(config: CheckConfig, names: Sequence[str]) -> Iterator[Outcome]:
    for kind, stream_name in zip(random_models.BUILDERS, config.model_streams):
        handle, stream = _random(kind), _stream(stream_name)
        for name in names:
            case = editors.EditorCase(name, handle, stream, _settings(config, name))
            for check in editors.CHECKS:
                yield outcome(f"{name} on {kind}", title(check), partial(check, case))
    for name in [n for n in names if EDITORS.get(n).traits.learns == "context"]:
        stream = _stream(config.model_streams[0])
        editor = editors.EditorCase(name, load("tiny", device="cpu"), stream, _settings(config, name)).make()
        learns = partial(editors.check_learns, editor, stream, editors.two_subjects(stream)[0])
        yield outcome(f"{name} on tiny", "a fact in the prompt makes its target likelier", learns)


def _of_stream(config: CheckConfig, name: str) -> Iterator[Outcome]:
    """Raises `BadConfig` where the stream takes a source in its name and none was given."""
    made = RunConfig(stream=name, data_root=config.data_root, set=_owned(config, "stream")).resolve_stream()
    case = streams.StreamCase(lambda **fields: made.cls(replace(made.config, **fields)))
    for check in streams.CHECKS:
        yield outcome(name, title(check), partial(check, case))


def _of_a_run(config: CheckConfig, new: dict[str, list[str]], names: Sequence[str]) -> Iterator[Outcome]:
    """What a small run shows of all classes together."""
    stream = _with_source(config, new[STREAMS.kind][0]) if new[STREAMS.kind] else config.model_streams[0]
    run = RunConfig(
        stream=stream,
        editor=tuple(names) or config.editor,
        data_root=config.data_root,
        plugin=config.plugin,
        set=config.set,
        edits=8,
        batch=2,
        probe_budget=200,
        max_new_tokens=4,
        save_every=2,
        device="cpu",
    )
    subject = "a run with everything"
    with ExitStack() as stack:
        cases: list[small_run.RunCase] = []
        yield outcome(
            subject, "a run goes through, is stopped and goes on", lambda: cases.append(stack.enter_context(small_run.run_case(run)))
        )
        if not cases:
            return
        for check in small_run.CHECKS:
            yield outcome(subject, title(check), partial(check, cases[0]))
        for registry, check in ((PROBES, small_run.a_probe_asks_something), (METRICS, small_run.a_metric_has_a_value)):
            for name in new[registry.kind]:
                yield outcome(name, title(check), partial(check, cases[0], name))


def _with_source(config: CheckConfig, name: str) -> str:
    if name.endswith(":") and not config.argument:
        raise BadConfig(f"the stream {name} takes its source in its name: give it with --argument")
    return name + config.argument if name.endswith(":") else name


def _host(wrapper: Any) -> str:
    """The first editor that a wrapper takes."""
    return next(name for name, cls in EDITORS.items() if issubclass(cls, wrapper.hosts))


def _stream(name: str) -> Stream:
    return STREAMS.get(name)(StreamConfig(revert=0, retire=0))


def _random(kind: str) -> ModelHandle:
    with tempfile.TemporaryDirectory(prefix="testbed-check-") as folder:
        random_models.save(kind, Path(folder))
        return load(folder, device="cpu")


def _owned(config: CheckConfig, owner: str) -> tuple[str, ...]:
    return tuple(s for s in config.set if s.startswith(f"{owner}."))


def _settings(config: CheckConfig, name: str) -> dict[str, Any]:
    """All fields of the editor's configuration, with those that were set. Raises `BadConfig`."""
    resolved = RunConfig(set=_owned(config, name)).resolve_editor(name).config
    return {f.name: getattr(resolved, f.name) for f in fields(resolved)}


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 where every check passed, 1 where one failed, 2 for a mistake of the user."""
    args = [part for a in (sys.argv[1:] if argv is None else argv) for part in variants.names(a)]
    config = tyro.cli(CheckConfig, args=args, prog="testbed check")
    console, failed = Console(), list[Outcome]()
    code, _ = run_command(lambda: failed.extend(o for o in outcomes(config) if _show(console, o)), "the same command")
    if code == 0:
        console.print(f"{len(failed)} checks failed" if failed else "every check passed", highlight=False)
    return code or (1 if failed else 0)


def _show(console: Console, done: Outcome) -> bool:
    """Print the outcome; whether the check failed."""
    end = f"FAILED: {done.problem}" if done.problem else "passed"
    console.print(f"{done.subject}: {done.check}: {end}", markup=False, highlight=False, soft_wrap=True)
    return bool(done.problem)


if __name__ == "__main__":
    sys.exit(main())
