"""Editors rebuilt from a run folder: the stored configuration, data and model, and the editor after any of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from testbed.editors.base import Editor
from testbed.experiment import runner
from testbed.experiment.config import LOCATIONS, BadConfig, RunConfig, stored_config
from testbed.experiment.loop import Context, apply_step
from testbed.experiment.runner import PreparedRun
from testbed.storage.files import StoreError
from testbed.storage.run_folder import RunFolder


@dataclass(frozen=True)
class StoredRun:
    """A run folder with its stream, schedule and model loaded again."""

    run: PreparedRun
    folder: RunFolder

    @property
    def n_steps(self) -> int:
        return len(self.run.schedule.steps)

    def names(self, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """The wanted editors; all of the run for an empty list. Raises `BadConfig` for an editor that the run lacks."""
        missing = [n for n in wanted if n not in self.run.config.editor]
        if missing:
            raise BadConfig(f"{self.folder.path} has no editor {', '.join(map(repr, missing))}; it has {', '.join(self.run.config.editor)}")
        return tuple(wanted) or self.run.config.editor

    def context(self) -> Context:
        """The context for `apply_step` and `ask_step`. Raises `StoreError` without the answers of the unedited model."""
        base = self.folder.base_answers()
        if not base:
            raise StoreError(f"{self.folder.path / 'base'} holds no readable answers: go on with --resume {self.folder.path}")
        return self.run.context(base)

    def fresh(self, name: str) -> Editor:
        """The editor before its first edit. Raises `BadConfig` for an editor that the run lacks."""
        return self.run.editor(self.names([name])[0])

    def newest(self, name: str) -> tuple[int, Editor]:
        """The newest saved step and the editor after it. Raises `StoreError` where nothing was saved."""
        editor = self.fresh(name)
        step, state = self.folder.editor(name).newest()
        editor.load_state_dict(state)
        return step, editor

    def at(self, name: str, step: int) -> Editor:
        """The editor after a step: from its newest state if that is not later, else from the first edit on."""
        editor = self.fresh(name)
        saved, state = self.folder.editor(name).newest()
        if saved <= step:
            editor.load_state_dict(state)
        self.advance(editor, saved if saved <= step else 0, step)
        return editor

    def advance(self, editor: Editor, after: int, upto: int) -> None:
        """Apply the steps after + 1 to upto, as the run did."""
        context = self.context()
        for step in self.run.schedule.steps[after:upto]:
            apply_step(context, editor, step)


def rebuild(out: Path, changed: dict[str, Any] | None = None) -> StoredRun:
    """Load a run folder again.

    changed: new values of the fields that locate data and model (`data_root`, `model`, `benchmarks`), and of `device`.
    Raises `StoreError` where the folder is no run, or data or model differ from those of the run.
    """
    config = replace(stored_config(out), **(changed or {}))
    run, folder = runner.prepare(config.resolve()), RunFolder(out)
    folder.check_same(run.manifest, runner.SAME, [f"config.{name}" for name in (*LOCATIONS, "device")], RunConfig().stored())
    return StoredRun(run, folder)
