"""The common part of the editors with a codebook: one layer, a row and one trained tensor for each edit, undo by removal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from testbed.core.events import EditBatch
from testbed.editors.base import BadEditor, Editor, need
from testbed.editors.codebook.gate import Gate, Hits
from testbed.model.encoding import Batch
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.prefix_cache import ImagePrefixes


class CodebookEditor(Editor):
    """An editor whose entries answer at one down-projection for prompts near their keys."""

    book: Any
    _key: Callable[[Tensor, Batch], Tensor]
    """Inputs of the layer (B, T, f) and their batch to (B, width) float32 keys of prompts."""

    def _prepare_layer(self) -> None:
        self.layer = self.handle.layer_index(self.config.layer)
        self.module, weight_name = self.handle.down(self.layer), self.handle.down_weight(self.layer)
        self.weight = self.handle.parameter(weight_name).detach().float()
        self._prefixes = ImagePrefixes(self.handle, self.module)
        self._own = {"model": self.handle.hash, "layer": weight_name}
        self.tensors: dict[str, Tensor] = {}
        """By edit, the tensor that its entry answers with."""

    @abstractmethod
    def _answer(self, hits: Hits, book: Any) -> Tensor:
        """(h, T, d) the layer's output for rows that hit."""

    def gate(self, book: Any) -> Gate:
        """A gate around the layer that answers with the tensors of a codebook's entries."""
        return Gate(self.handle, [(self.module, lambda hits: self._answer(hits, book))], book, self._key)

    def predictor(self) -> Predictor:
        return self._predictor_with(self.book)

    def _predictor_with(self, book: Any) -> Predictor:
        gate = self.gate(book)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def _add_tensors(self, batch: EditBatch, trained: Tensor) -> None:
        self.tensors = {**self.tensors, **{e.id: t for e, t in zip(batch.events, trained)}}

    def revert(self, event_ids: Iterable[str]) -> None:
        """Take edits out of the codebook; what they had displaced comes back. Raises `BadEditor` for an unknown id."""
        try:
            self.book.remove(event_ids)
        except KeyError as e:
            raise BadEditor(f"cannot undo: {e.args[0]}") from e

    def _state(self) -> dict[str, Any]:
        return {**self.book.state(), **self._own, **self.tensors}

    def _load_tensors(self, state: dict[str, Any], event_ids: Iterable[str], shape: tuple[int, ...]) -> None:
        self.tensors = {i: need(state, i, shape).to(self.weight.device) for i in event_ids}
        self._prefixes.kept.clear()  # of pictures that this state may never have met

    def state_bytes(self) -> int:
        """Bytes of the tensors in the state: those of the codebook, and one tensor of the same shape for each edit."""
        return self.book.nbytes + len(self.tensors) * next((t.nbytes for t in self.tensors.values()), 0)
