"""NeuralDB (Fei et al., ICLR 2026, arXiv 2507.18028): edits as entries of a key-value store beside one down-projection.

Locate-then-edit weights come near to a lookup over edited keys; here the lookup is explicit. Edit i has MEMIT's key k_i (the
subject's last token, averaged over contexts) and the residual r_i = v_i* - W k_i of MEMIT's target, both at one layer of the
unedited model. At every token, with x the input of the down-projection,

    j = argmax_i cos(x, k_i) ,        FFN(x) <- FFN(x) + r_j 1[cos(x, k_j) > gamma] .

No statistics of general text are needed, and no entry depends on another one: an edit that changes a fact again takes the place
of the old entry, and undo removes a row. Two facts whose keys are alike (prompts that begin with the same subject) share the
newest entry. The store acts at one layer, whose keys it does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from streams.base import TrainPool
from testbed.core.events import EditBatch, content_id
from testbed.core.ranges import Range
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import BadEditor, EditFailed, Editor, appended, need, require_same
from testbed.editors.codebook.nearest import Keys, Nearest
from testbed.editors.hyperparameters import SHALLOW, Values, model_key
from testbed.editors.locate import memit
from testbed.editors.locate.core import DEFAULTS, LocateEditor, TargetConfig, derived_layers, refuse_routed
from testbed.editors.locate.keys import KeyComputation, ask_of, contexts_that_fit, draw_contexts
from testbed.editors.locate.targets import TargetTask, notes_on_products, search, unchanged_outputs
from testbed.editors.traits import Traits
from testbed.editors.work import Work, down_shape
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.suffix import suffix_from_down_projection


@dataclass(frozen=True)
class NeuralDBConfig(TargetConfig):
    layer: int | None = None
    """Decoder layer beside whose down-projection the store lies: the last of MEMIT's critical layers."""
    gamma: Annotated[float, Range(least=-1, most=1)] = 0.65
    """gamma: cosine over which a token gets the residual of its nearest key."""


@dataclass(frozen=True)
class StoreRow:
    """The edit of a row of the store, and a hash of the fact that it is about."""

    event: str
    fact: str


class TokenGate:
    """Adds the nearest key's residual to the output of a module, at every token over the threshold; other tokens keep their numbers.

    find: from inputs (n, f) to the row of the store, or -1, and the cosine distance. residuals: (N, d).
    """

    def __init__(self, handle: ModelHandle, module: nn.Module, find: Nearest, residuals: Tensor, entries: Sequence[StoreRow]) -> None:
        self.handle, self.module, self.find, self.residuals, self.entries = handle, module, find, residuals, entries
        self.decided: list[dict[str, Any]] = []

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Keep the gate in place for the length of one batch."""
        self.decided = []
        if not self.entries:
            yield
            return
        with self.handle.hooked(self.module, lambda m, args, out: self._call(args[0], out, batch)):
            yield

    def _call(self, act: Tensor, output: Tensor, batch: Batch) -> Tensor | None:
        row, distance = self.find(act.reshape(-1, act.shape[-1]).float())
        if not self.decided:
            self._remember(row, distance, batch.on(row.device))
        at = (row >= 0).nonzero()[:, 0]
        if not len(at):
            return None  # the very tensor that the base produced
        out = output.reshape(-1, output.shape[-1]).clone()
        out[at] += self.residuals[row[at]].to(out)
        return out.reshape(output.shape)

    def _remember(self, row: Tensor, distance: Tensor, batch: Batch) -> None:
        """For each prompt the entry of its nearest token, at prefill."""
        shape = batch.prompt.shape
        if row.numel() != batch.prompt.numel():
            return
        row, distance = row.reshape(shape), distance.reshape(shape).masked_fill(~batch.prompt, torch.inf)
        least, at = distance.min(1)
        best = row.gather(1, at[:, None])[:, 0].tolist()
        self.decided = [
            {"entry": self.entries[i].event if i >= 0 else None, "distance": round(d, 6) if d < float("inf") else None}
            for i, d in zip(best, least.tolist())
        ]

    def explain(self, batch: Batch) -> list[dict[str, Any]]:
        """For each prompt the entry that answered at the token nearest to a key, or null, and its cosine distance."""
        return self.decided or [{} for _ in batch.asks]


@EDITORS.register("neuraldb")
class NeuralDB(Editor):
    """A row an edit: its key, its residual, its fact. The newest row of a fact answers."""

    summary = "keys and residuals of edits in a store, looked up at every token (NeuralDB)"
    traits = Traits(gated=True, undo=True, short_targets=True)
    Config = NeuralDBConfig
    defaults = DEFAULTS
    bare_share = LocateEditor.bare_share

    def _derived(self) -> Values:
        """The layer and the search of MEMIT on the same model."""
        row, depth = memit.PUBLISHED.get(model_key(self.handle)), self.handle.n_layers
        own = LocateEditor.shallow if depth < SHALLOW else LocateEditor.deep
        found = dict(row.values) if row else {"layers": derived_layers(depth), **own}
        return {"layer": found.pop("layers")[-1], **{k: v for k, v in found.items() if k != "lam"}}

    def work(self, batch: int) -> Work:
        """A search of targets above the layer, as MEMIT's, and no solve."""
        d, contexts = self.handle.width, self.hyper.contexts
        above = float(self.handle.n_layers - 1 - self.handle.layer_index(self.hyper.layer))
        _, f = down_shape(self.handle, self.hyper.layer)
        counts = {"forwards": 2.0 * (contexts + 1), "steps": float(self.hyper.steps), "rows": contexts + 2.0, "layers": above}
        return Work(**counts, trained_per_edit=float(d), state_per_edit=float(d + f))

    def _prepare(self, pool: TrainPool) -> None:
        self.layer = self.handle.layer_index(self.hyper.layer)
        refuse_routed(self.name, self.handle, [self.layer])
        self.notes += notes_on_products(self.handle, self.config.products)
        if self.layer >= self.handle.n_layers - 1:
            raise BadEditor(
                f"{self.name} cannot act beside layer {self.layer} of {self.handle.name}: what is written at the subject reaches the "
                f"answer through attention above it, so the highest layer is {self.handle.n_layers - 2}"
            )
        self.module = self.handle.down(self.layer)
        self.weight_name = self.handle.down_weight(self.layer)
        weight = self.handle.parameter(self.weight_name)
        self.contexts: list[str] = []
        width = weight.numel() // self.handle.width
        self._take([], torch.zeros(0, width, device=weight.device), torch.zeros(0, self.handle.width, device=weight.device))

    def _take(self, entries: list[StoreRow], keys: Tensor, residuals: Tensor) -> None:
        """Let the store hold these rows."""
        self.entries, self.keys, self.residuals = entries, keys, residuals
        self._rooms = {"keys": keys, "residuals": residuals}
        self._search: Nearest | None = None

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        events = batch.events
        if not self.contexts:
            suffix_from_down_projection(self.handle, [ask_of(events[0])], [events[0].target], self.layer)
            self.contexts = ["", *draw_contexts(self.handle, self.hyper.contexts, self.hyper.context_tokens, self.generator(0))]
        contexts = contexts_that_fit(self.handle, events, self.contexts, self.notes, self.config.end)
        task = TargetTask(self.handle, events, self.layer, contexts, self.config.end)
        with timed("targets"):
            found = search(task, self.hyper, unchanged_outputs(self.handle, events, self.layer).norm(dim=1))
        with timed("keys"), torch.no_grad():
            keys = KeyComputation(self.handle, events, contexts, (self.layer,), self.bare_share).keys(self.layer)
        if not (torch.isfinite(found.delta).all() and torch.isfinite(keys).all()):
            raise EditFailed("the key or the residual of an edit is not finite")
        self.keys, self.residuals = self._longer("keys", keys), self._longer("residuals", found.delta)
        self.entries = [*self.entries, *(StoreRow(e.id, content_id(*e.fact)) for e in events)]
        self._search = None
        return {"loss": float(found.loss.mean()), "target_steps": float(found.steps.mean()), "entries": float(len(self._live()))}

    def _longer(self, name: str, rows: Tensor) -> Tensor:
        """All rows with the new ones; what was handed out before does not change."""
        n = len(self.entries)
        self._rooms[name] = appended(self._rooms[name], n, rows.to(self._rooms[name]))
        return self._rooms[name][: n + len(rows)]

    def _live(self) -> list[int]:
        """The newest row of each fact."""
        return sorted({entry.fact: row for row, entry in enumerate(self.entries)}.values())

    def revert(self, event_ids: Iterable[str]) -> None:
        """Remove the rows of these edits; an older row of the same fact answers again. Raises `BadEditor` for an unknown id."""
        gone = set(event_ids)
        if unknown := gone - {entry.event for entry in self.entries}:
            raise BadEditor(f"{self.name} made no edit {', '.join(sorted(unknown))}")
        kept = [row for row, entry in enumerate(self.entries) if entry.event not in gone]
        self._take([self.entries[row] for row in kept], self.keys[kept], self.residuals[kept])

    def predictor(self) -> Predictor:
        """The model with the store as it is now; later edits do not change this predictor."""
        live = self._live()
        radii = torch.full((len(live),), 1 - self.config.gamma, dtype=torch.float64, device=self.keys.device)
        find = self._search or Nearest(Keys(self.keys[live], "cosine"), radii, newest=True)
        self._search = find
        gate = TokenGate(self.handle, self.module, find, self.residuals[live], [self.entries[row] for row in live])
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "layer": self.weight_name}

    def _state(self) -> dict[str, Any]:
        rows = [[entry.event, entry.fact] for entry in self.entries]
        return {"keys": self.keys, "residuals": self.residuals, "entries": rows, "contexts": self.contexts, **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        entries = [StoreRow(event, fact) for event, fact in state["entries"]]
        keys = need(state, "keys", (len(entries), self.keys.shape[1]))
        residuals = need(state, "residuals", (len(entries), self.handle.width))
        self.contexts = list(state["contexts"])
        self._take(entries, keys.to(self.residuals.device), residuals.to(self.residuals.device))
