"""An edited model out of a run folder: the same configuration, data and model, the editor after any of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from testbed.editors.base import Editor
from testbed.experiment import runner
from testbed.experiment.config import PLACES, BadConfig, RunConfig
from testbed.experiment.loop import Context, apply_step
from testbed.experiment.runner import Plan
from testbed.storage.files import StoreError
from testbed.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Stored:
    """A run folder with its stream, schedule and model loaded again."""

    plan: Plan
    folder: RunFolder

    @property
    def steps(self) -> int:
        return len(self.plan.schedule.steps)

    def context(self) -> Context:
        """What `apply_step` and `ask_step` need. Raises `StoreError` where the unedited model's answers are gone."""
        base = self.folder.base_answers()
        if not base:
            raise StoreError(f"{self.folder.path / 'base'} holds no readable answers: go on with --resume {self.folder.path}")
        plan = self.plan
        shared = (plan.manifest["run"], plan.config.seed, plan.handle, plan.stream, plan.schedule)
        return Context(*shared, base, plan.config.max_new_tokens)

    def fresh(self, name: str) -> Editor:
        """The editor before its first edit. Raises `BadConfig` for one that the run does not have."""
        if name not in self.plan.config.editor:
            raise BadConfig(f"{self.folder.path} has no editor {name!r}; it has {', '.join(self.plan.config.editor)}")
        editor = runner.make_editor(self.plan.config, name)
        editor.prepare(self.plan.handle, self.plan.stream.train_pool())
        return editor

    def newest(self, name: str) -> tuple[int, Editor]:
        """The editor as it was saved last, and after which step that was. Raises `StoreError` where nothing was saved."""
        editor = self.fresh(name)
        step, state = self.folder.editor(name).newest()
        editor.load_state_dict(state)
        return step, editor

    def at(self, name: str, step: int) -> Editor:
        """The editor after a step, made again from its newest state up to there, or from the start."""
        editor = self.fresh(name)
        saved, state = self.folder.editor(name).newest()
        if saved <= step:
            editor.load_state_dict(state)
        self.go(editor, saved if saved <= step else 0, step)
        return editor

    def go(self, editor: Editor, after: int, upto: int) -> None:
        """Apply steps after+1 to upto, as the run did."""
        context = self.context()
        for step in self.plan.schedule.steps[after:upto]:
            apply_step(context, editor, step)


def rebuild(out: Path, places: dict[str, Any] | None = None) -> Stored:
    """A run folder, ready to rebuild its editors.

    Args:
        places: where data or model lie now, if they have moved (`data_root`, `model`, `benchmarks`), and `device`.

    Raises `StoreError` where the folder is no run, or data or model are not those it was made with.
    """
    config: RunConfig = replace(runner.resumed(out), **(places or {}))
    plan, folder = runner.prepare(config), RunFolder(out)
    folder.check_same(plan.manifest, runner.SAME, [f"config.{name}" for name in (*PLACES, "device")])
    return Stored(plan, folder)


def names(stored: Stored, wanted: Sequence[str]) -> tuple[str, ...]:
    """The editors that were asked for, or all of the run. Raises `BadConfig` for one it does not have."""
    missing = [n for n in wanted if n not in stored.plan.config.editor]
    if missing:
        raise BadConfig(f"{stored.folder.path} has no editor {', '.join(missing)}; it has {', '.join(stored.plan.config.editor)}")
    return tuple(wanted) or stored.plan.config.editor
