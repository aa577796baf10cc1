"""The floor of every comparison: nothing is edited, so that every number is the unedited model's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.editors.base import Editor, EditorConfig, Traits
from testbed.model.predictor import ModelPredictor, Predictor


@EDITORS.register("noop")
class Noop(Editor):
    """Ignores every edit."""

    summary = "changes nothing: the unedited model, the floor of every comparison"
    traits = Traits(undo=True, learns="no")
    Config = EditorConfig

    def _prepare(self, pool: TrainPool) -> None:
        self._predictor: Predictor = ModelPredictor(self.handle)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        return {}

    def predictor(self) -> Predictor:
        return self._predictor

    def revert(self, event_ids: Iterable[str]) -> None:
        """Undo nothing, because no edit changed anything."""

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        """The state is empty."""
