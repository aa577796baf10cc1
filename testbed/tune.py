"""Choose an editor's settings for a model: `python -m testbed.tune --model M --editor E`.

Up to sixteen settings are tried on twelve development edits, which no reported run makes or asks about. The best ones go to a
YAML file that `python -m testbed.run --config` reads; it also says what each setting did.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from testbed.core import threads

    threads.prepare()

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
import yaml
from rich.console import Console

from streams.base import MissingImages
from testbed.core import variants
from testbed.core.ranges import NonNegativeInt, PositiveFloat, PositiveInt, out_of_range
from testbed.core.terminal import ended_by_its_reader
from testbed.experiment.command import run_command
from testbed.experiment.config import BadConfig, Resolved, RunConfig
from testbed.experiment.runner import ask_in_form
from testbed.model.loading import load
from testbed.storage.files import replacing
from testbed.tuning.search import EDITS, MOST_SETTINGS, DevelopmentSet, Settings, Trial, grid, search, try_settings


@dataclass(frozen=True)
class TuneConfig:
    """Choose the settings of editors for a model on development edits."""

    model: str
    """Model to edit: a folder, a .gguf file, a hub id or an alias (smollm2)."""
    editor: tuple[str, ...]
    """Editors, separated by commas."""
    stream: str = "countries-yearly"
    """Stream whose development part is edited."""
    data_root: Path | None = None
    """Folder of the stream's files."""
    edits: PositiveInt = EDITS
    """Development edits of each setting."""
    batch: PositiveInt = 1
    """Edits in one step."""
    minutes: PositiveFloat = 20.0
    """CPU minutes for each editor, after which no further setting is begun."""
    plugin: tuple[str, ...] = ()
    """Python files or modules with editors or streams of your own."""
    values: tuple[str, ...] = ()
    """field=value,value: values to try in the place of the table's (testbed/tuning/grids.yaml), field by field in this order."""
    out: Path | None = None
    """YAML file; by default MODEL.yaml. Settings of other editors in it are kept."""
    seed: NonNegativeInt = 0
    """Seed of the stream's order."""
    device: str = "auto"
    dtype: str = "auto"
    missing_images: MissingImages = "skip-absent"

    def problems(self) -> list[str]:
        """Every mistake in the values, as sentences."""
        wrong = [f"--values {item!r} is not of the form field=value,value" for item in self.values if not all(item.partition("="))]
        return [f"--{line}" for line in out_of_range(self)] + wrong

    def fields(self, editor: str, n_layers: int) -> dict[str, Any]:
        """By field the values to try. Raises `BadConfig` for an editor about which nothing is known."""
        given = {name: values.split(",") for name, _, values in (item.partition("=") for item in self.values)}
        found = given or grid(editor, n_layers)
        if not found:
            raise BadConfig(f"nothing is known about what to try for {editor}: give it with --values field=value,value")
        return found

    def run(self) -> RunConfig:
        """The run whose stream and editors are used."""
        names = {"model": self.model, "stream": self.stream, "data_root": self.data_root, "seed": self.seed, "batch": self.batch}
        names["plugin"] = self.plugin
        return RunConfig(**names, editor=self.editor, missing_images=self.missing_images, set=("stream.development=true",))


def tune(config: TuneConfig, console: Console) -> dict[str, list[Trial]]:
    """The trials of every editor, in their order; each editor's settings are written as soon as they are found.

    Raises `BadConfig`, `BadStream`, `BadModel`, `BadEditor`.
    """
    if problems := config.problems():
        raise BadConfig("\n".join(problems))
    resolved = config.run().resolve()
    stream = resolved.stream.create()
    handle = load(config.model, config.device, config.dtype)
    handle.data_root = config.data_root
    events = [e for e in stream.events(10 * config.edits) if e.kind == "add"][: config.edits]
    if not events:
        raise BadConfig(f"{config.stream} ({stream.origin}) has no development edits")
    console.print(ask_in_form(resolved, stream, 10 * config.edits, handle).line, markup=False, highlight=False, soft_wrap=True)
    data, out = DevelopmentSet(handle, stream, events, config.batch), dict[str, list[Trial]]()
    for name, editor in resolved.editors.items():
        fields, out[name] = config.fields(name, handle.n_layers), []
        for trial in search(fields, partial(_measure, data, config.run(), editor), 60 * config.minutes):
            out[name].append(trial)
            console.print(f"{name}: {describe(trial)}", markup=False, highlight=False, soft_wrap=True)
        write(config, name, out[name])
    return out


def _measure(data: DevelopmentSet, run: RunConfig, editor: Resolved[Any], settings: Settings) -> Trial:
    own = tuple(f"{editor.cls.name.partition('[')[0]}.{name}={_text(value)}" for name, value in settings.items())
    chosen = replace(run, set=(*run.set, *own)).resolve_editor(editor.cls.name)
    return try_settings(data, chosen.create, settings)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def describe(trial: Trial) -> str:
    """A trial in a line."""
    numbers = f"success {trial.success:.2f}, generality {trial.generality:.2f}, locality {trial.locality:.2f}"
    settings = " ".join(f"{k}={_text(v)}" for k, v in trial.settings.items()) or "defaults"
    failed = f", {trial.failed} failed" if trial.failed else ""
    cost = f"perplexity x {trial.perplexity:.2f}, {trial.seconds:.2g} CPU s an edit{failed}"
    return f"score {trial.score:.3f} with {settings} ({numbers}, {cost})"


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score, the earliest of equal ones."""
    return max(trials, key=lambda t: (t.score, t.success))


def write(config: TuneConfig, editor: str, trials: Sequence[Trial]) -> Path:
    """Put an editor's best settings into the YAML file, with every trial as a comment in front of them."""
    path = config.out or Path(f"{Path(config.model).stem}.yaml")
    text = path.read_text(encoding="utf-8") if path.exists() else "# Settings found by python -m testbed.tune\nset:\n"
    owner, best = editor.partition("[")[0], best_of(trials)
    kept = [line for line in text.splitlines() if not line.startswith((f"  - {owner}.", f"  # {owner}:"))]
    about = f"  # {owner}: {config.stream}, {config.edits} development edits, batch {config.batch}, {len(trials)} settings"
    lines = [about, *(f"  # {owner}:   {describe(t)}" for t in trials)]
    lines += [f"  - {owner}.{name}={_text(value)}" for name, value in best.settings.items()]
    with replacing(path) as temporary:
        temporary.write_text("\n".join([*kept, *lines]) + "\n", encoding="utf-8")
    yaml.safe_load(path.read_text(encoding="utf-8"))
    return path


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a mistake of the user, printed as a plain line, 130 interrupted."""
    given = sys.argv[1:] if argv is None else argv
    args = [part for a in given for part in ([a] if re.match(r"\w+=", a) else variants.names(a))]  # values keep their commas
    config = tyro.cli(TuneConfig, args=args, prog="python -m testbed.tune")
    console = Console()
    code, found = run_command(lambda: tune(config, console), "the same command; finished editors are in the file")
    for name, trials in (found or {}).items():
        console.print(f"{name}: best {describe(best_of(trials))} (of at most {MOST_SETTINGS} settings)", markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
