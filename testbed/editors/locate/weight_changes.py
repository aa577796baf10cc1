"""The state of a locate-then-edit editor: low-rank deltas of down-projections, and the keys of past edits.

The base weights are never written. A change of one step is `left^T right` (n rows of d and of f); the weights
are the base plus the changes in the order of the steps, in at least float32, so that a loaded state gives the
same bits and the weights after any step can be rebuilt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from testbed.editors.base import BadEditor, appended, need
from testbed.model.handle import ModelHandle, as_matrix, as_stored


class WeightDeltas:
    """WeightDeltas of the down-projections of some layers. W is (d, f) whatever the storage order of the model.

    left: (N, d), right: (N, f), keys: (N, f) by layer, one row an edit; keys stay empty without history.
    facts: by layer the hash of the fact of each key; a state of an older version has none, and its keys are never superseded.
    dense: (d, f) by layer, the sum of changes that have no factors.
    blocks: by layer the [step, rows] of each change.
    """

    def __init__(self, handle: ModelHandle, layers: Sequence[int]) -> None:
        self.handle, self.layers = handle, tuple(layers)
        self.names = {n: handle.down_weight(n) for n in self.layers}
        # read once: while edited weights are laid over the model, it would give these
        self.bases = {name: handle.parameter(name).data for name in self.names.values()}
        self._clear()

    def _clear(self) -> None:
        self.left: dict[int, Tensor] = {}
        self.right: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.facts: dict[int, list[str]] = {}
        self.dense: dict[int, Tensor] = {}
        self.blocks: dict[int, list[list[int]]] = {}
        self.current: dict[int, Tensor] = {}
        self._rooms: dict[tuple[str, int], Tensor] = {}

    def base(self, layer: int) -> Float[Tensor, "d f"]:
        """(d, f) unedited weight in at least float32."""
        w = self.bases[self.names[layer]]
        w = w if w.dtype == torch.float64 else w.float()
        return as_matrix(self.handle.down(layer), w)

    def weight(self, layer: int) -> Float[Tensor, "d f"]:
        """(d, f) edited weight."""
        return self.current.get(layer, self.base(layer))

    def parameters(self) -> dict[str, Tensor]:
        """The edited weights under their names, in the model's storage order; only those that were changed."""
        return {self.names[n]: self._stored(n, w) for n, w in self.current.items()}

    def _stored(self, layer: int, w: Tensor) -> Tensor:
        return as_stored(self.handle.down(layer), w)

    def add(
        self, layer: int, step: int, left: Float[Tensor, "n d"], right: Float[Tensor, "n f"], keys: Float[Tensor, "n f"] | None
    ) -> None:
        """A change in factors, and the keys to remember where there is history."""
        self.current = {**self.current, layer: _applied(self.weight(layer), left.float(), right.float())}
        self.left = self._grown("left", layer, left.float())
        self.right = self._grown("right", layer, right.float())
        self._close(layer, step, len(left), keys)

    def add_dense(self, layer: int, step: int, change: Float[Tensor, "d f"], keys: Float[Tensor, "n f"] | None, rows: int) -> None:
        """A change (d, f) that has no factors."""
        total = self.dense[layer] + change if layer in self.dense else change
        self.dense = {**self.dense, layer: total}
        self.current = {**self.current, layer: self.base(layer) + total.to(self.base(layer).dtype)}
        self._close(layer, step, rows, keys)

    def _grown(self, name: str, layer: int, rows: Tensor) -> dict[int, Tensor]:
        """The factors or keys of this name with rows more; nothing that was handed out changes."""
        kept: dict[int, Tensor] = getattr(self, name)
        old = kept.get(layer, rows[:0])
        room = appended(self._rooms.get((name, layer), old), len(old), rows)
        self._rooms[name, layer] = room
        return {**kept, layer: room[: len(old) + len(rows)]}

    def _close(self, layer: int, step: int, rows: int, keys: Tensor | None) -> None:
        if keys is not None:
            self.keys = self._grown("keys", layer, keys.float())
        self.blocks = {**self.blocks, layer: [*self.blocks.get(layer, []), [step, rows]]}

    def at(self, step: int) -> dict[str, Tensor]:
        """The weights as they were after a step. Raises `BadEditor` where changes were kept without factors."""
        if self.dense:
            raise BadEditor("the changes were kept as a sum, so an earlier step cannot be rebuilt from the state")
        return {self.names[n]: self._stored(n, self._replayed(n, step)) for n in self.left}

    def _replayed(self, layer: int, step: int | None = None) -> Tensor:
        w, at = self.base(layer), 0
        for made, rows in self.blocks[layer]:
            if step is None or made <= step:
                w = _applied(w, self.left[layer][at : at + rows], self.right[layer][at : at + rows])
            at += rows
        return w

    def name_keys(self, layer: int, facts: Sequence[str]) -> None:
        """Say which facts the newest keys are about."""
        self.facts = {**self.facts, layer: [*self._facts(layer, len(facts)), *facts]}

    def _facts(self, layer: int, newest: int = 0) -> list[str]:
        """The fact of each key but the newest ones, "" where it is not known."""
        named, keys = self.facts.get(layer, []), len(self.keys.get(layer, ())) - newest
        return [""] * (keys - len(named)) + named

    def past(self, layer: int, changed: Collection[str] = ()) -> list[Tensor]:
        """(n, f) keys of each step, in order, without those of facts that were changed again later, or that change now."""
        if layer not in self.keys:
            return []
        facts = self._facts(layer)
        newest = {fact: row for row, fact in enumerate(facts)}
        holds = torch.tensor([not fact or (newest[fact] == row and fact not in changed) for row, fact in enumerate(facts)])
        rows = [rows for _, rows in self.blocks[layer]]
        kept = [keys[live.to(keys.device)] for keys, live in zip(self.keys[layer].split(rows), holds.split(rows))]
        return [keys for keys in kept if len(keys)]

    def knows(self, layer: int, facts: Collection[str]) -> bool:
        """Whether a key of one of these facts is remembered."""
        return not set(facts).isdisjoint(self.facts.get(layer, ()))

    def state(self) -> dict[str, Any]:
        out: dict[str, Any] = {"blocks": {str(n): b for n, b in self.blocks.items()}}
        out["facts"] = {str(n): facts for n, facts in self.facts.items()}
        for name in ("left", "right", "keys", "dense"):
            out.update({f"{name}.{n}": t for n, t in getattr(self, name).items()})
        return out

    def load(self, state: dict[str, Any]) -> None:
        """The reverse. Raises `BadEditor` for tensors of another model or set of layers."""
        self._clear()
        for key, blocks in state["blocks"].items():
            layer = int(key)
            if layer not in self.names:
                raise BadEditor(f"the state changes layer {layer}, the config edits layers {', '.join(map(str, self.layers))}")
            d, f = self.base(layer).shape
            self.blocks[layer] = blocks
            if facts := state.get("facts", {}).get(key):
                self.facts[layer] = list(facts)
            wanted = {"left": (None, d), "right": (None, f), "keys": (None, f), "dense": (d, f)}
            for name, shape in wanted.items():
                if f"{name}.{layer}" in state:
                    getattr(self, name)[layer] = need(state, f"{name}.{layer}", shape).to(self.base(layer).device)
            self._restore(layer)

    def _restore(self, layer: int) -> None:
        if layer in self.dense:
            w = self.base(layer)
            self.current[layer] = w + self.dense[layer].to(w.dtype)
        else:
            self.current[layer] = self._replayed(layer)


def _applied(w: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return w + (left.T @ right).to(w.dtype)
