"""Knowledge Neurons (Dai et al., ACL 2022, arXiv 2104.08696): the activations that a fact's answer rests on, and their columns rewritten.

A neuron is an entry of w, the input of a layer's down-projection W (d, f), at the position that predicts the answer. With the whole
layer scaled at once, its share in the probability of the old answer is

    Attr_i = w_i / m sum_{k=1..m} dP(y_old | x; w := (k / m) w) / dw_i .                                     (1)

A prompt finds the neurons of all layers whose share is at least `threshold` of the largest. A fact has those that `share` of its
differently worded prompts find, three prompts at least where there are as many; `share` moves by .05, at most six times, until they
are two to five. Neurons that more than `common` of other prompts find too are dropped. The edit rewrites column i of W,

    W_:i <- W_:i - lambda1 |W_:i| / |e_old| e_old + lambda2 |W_:i| / |e_new| e_new ,                         (2)

with e the rows of the output embeddings. The paper's formula lacks the norms; they are in the released code.

A fact without neurons is passed over, as in the released code, and counted. Where the old answer is not known, equation 1 takes the
token that the model finds likeliest.

Published for BERT and answers of one token. Here y_old and y_new are the first tokens in which both answers differ (their end tokens
count), and the tokens before them are read with the prompt: nothing but that token is written. The method has no sign: where an
activation is negative, as it often is in gated models, equation 2 makes the new answer less likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, content_id
from testbed.core.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import BadEditor, EditFailed, EditorConfig, WeightEditor, need, require_same
from testbed.editors.locate.core import refuse_routed
from testbed.editors.traits import Traits
from testbed.editors.work import Work
from testbed.model.encoding import answer_ids, collate
from testbed.model.handle import ModelHandle, as_matrix, as_stored
from testbed.model.layout import LAYOUT_PROMPT, added_at, layout_verified
from testbed.model.suffix import ModelSuffix, suffix_from_down_projection, suffix_from_layer

_MOVE, _ROUNDS, _FEWEST, _MOST, _PROMPTS = 0.05, 6, 2, 5, 3
"""Of the refinement in the released code (src/2_get_kn.py): by how much `share` moves, how often it is tried, the fewest and the most
neurons that are aimed at, and the fewest prompts that must find a neuron."""
Neuron = tuple[int, int]
"""Decoder layer and column of its down-projection."""


@dataclass(frozen=True)
class KNConfig(EditorConfig):
    layers: tuple[int, ...] | None = None
    """Decoder layers in which neurons are looked for; None is all (paper)."""
    steps: PositiveInt = 20
    """m, points of the sum in equation 1 (paper: 20)."""
    threshold: Fraction = 0.2
    """Share of the largest attribution from which a prompt finds a neuron (paper: 0.2)."""
    share: Fraction = 0.7
    """Share of a fact's prompts that must find a neuron (paper: 0.7)."""
    prompts: PositiveInt = 9
    """Prompts of a fact at most, its own first (paper: 8.6 on average)."""
    common: Fraction = 0.1
    """Share of other prompts over which a neuron is not the fact's own (paper: 0.1 of the facts of its relation)."""
    negatives: NonNegativeInt = 20
    """Questions of the train pool that stand for those other prompts; 0 drops no neuron."""
    lambda1: NonNegativeFloat = 1.0
    """lambda1, of the old answer (released: 1)."""
    lambda2: NonNegativeFloat = 8.0
    """lambda2, of the new answer (released: 8)."""


class Prediction(NamedTuple):
    """A prompt, the tokens of the answer that are read behind it, and the token that comes next."""

    ask: Ask
    read: tuple[int, ...]
    token: int


@EDITORS.register("kn")
class KnowledgeNeurons(WeightEditor):
    """The neurons of each edit with both tokens and the norm of the column, from which equation 2 follows.

    State: neurons (N, 4) int64 (layer, column, old token, new token) and norms (N,) float32, in the order of the edits; owners: the
    edit of each; passed: edits that have none.
    """

    summary = "rewrites the columns of the neurons that an old answer is attributed to (Knowledge Neurons)"
    traits = Traits(weights=True, undo=True, learns="rule", short_targets=True, uses=frozenset({"paraphrase", "previous", "train_pool"}))
    Config = KNConfig

    def work(self, batch: int) -> Work:
        """Each prompt is read once, and each layer's points are run at one token position."""
        prompts, points = float(self.config.prompts), float(self.config.prompts * self.config.steps)
        return Work(forwards=points, steps=1.0, rows=prompts, layers=float(len(self._layers())))

    def _layers(self) -> tuple[int, ...]:
        chosen = range(self.handle.n_layers) if self.config.layers is None else self.config.layers
        return tuple(sorted({self.handle.layer_index(n) for n in chosen}))

    def _prepare(self, pool: TrainPool) -> None:
        self.layers = self._layers()
        if not self.layers:
            raise BadEditor("layers names no decoder layer, expected one at least: leave it out for all of them")
        refuse_routed(self.name, self.handle, self.layers)
        self.embeddings = output_embeddings(self.handle)
        last = self.handle.n_layers - 1
        if not layout_verified(self.handle, last):
            suffix_from_down_projection(self.handle, [LAYOUT_PROMPT], ["yes"], last)
        self.shared = self._shared(pool)
        self.passed: list[str] = []
        self._take(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0), [])

    @timed("negatives")
    def _shared(self, pool: TrainPool) -> frozenset[Neuron]:
        """Neurons that more than `common` of the pool's questions find in the unedited model, each for its own answer."""
        questions = [q for q in pool.questions if q.answer and (self.handle.reads_pictures or q.image is None)][: self.config.negatives]
        if self.config.negatives and not questions:
            self.notes.append("the stream has no train pool: no neuron is dropped as one of many facts")
        known: dict[str, frozenset[Neuron]] = self.handle.cache.setdefault("shared neurons", {})
        key = content_id([q.id for q in questions], {**asdict(self.config), "layers": self.layers})
        if key not in known:
            asked = [Prediction(q.ask(), (), self._ids(q.ask(), q.answer or "")[0]) for q in questions]
            parts = (asked[at : at + self.config.prompts] for at in range(0, len(asked), self.config.prompts))
            counts = Counter(n for part in parts for of_prompt in self._found(part) for n in of_prompt)
            known[key] = frozenset(n for n, count in counts.items() if count > self.config.common * len(questions))
        return known[key]

    def _ids(self, ask: Ask, answer: str) -> list[int]:
        """The answer's tokens and the end token."""
        return [*answer_ids(self.handle, ask, answer), self.handle.tokenizer.eos_token_id]

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        before, passed = len(self.owners), len(self.passed)
        for event in batch.events:
            more = (Ask(p, event.image, relation=event.relation or "") for p in batch.paraphrases.get(event.id, ()))
            asks = [event.ask(), *more][: self.config.prompts]
            with self.handle.swapped(self.edited_weights()):
                predictions = [self._old(a, event) for a in asks]
                own = self._neurons(predictions)
            if own:
                new = self._differing(event.ask(), event.target, event.previous)[1]
                self._write(event, own, predictions[0].token, new)
            else:
                self.passed = [*self.passed, event.id]
        return {"neurons": (len(self.owners) - before) / len(batch), "without_neurons": float(len(self.passed) - passed)}

    def _differing(self, ask: Ask, new: str, old: str | None) -> tuple[tuple[int, ...], int, int | None]:
        """The tokens that both answers begin with, and the first of the new and of the old answer behind them; no old token where
        the old answer is not known. Of equal answers it is the first."""
        ids = self._ids(ask, new)
        if old is None:
            return (), ids[0], None
        before = self._ids(ask, old)
        at = next((i for i, (a, b) in enumerate(zip(ids, before)) if a != b), 0)
        return tuple(ids[:at]), ids[at], before[at]

    def _old(self, ask: Ask, event: EditEvent) -> Prediction:
        """What equation 1 attributes: the old answer's token; where it is not known, the one that the model finds likeliest."""
        read, _, token = self._differing(ask, event.target, event.previous)
        if token is None:
            batch = collate(self.handle, [ask], side="left")
            with torch.no_grad():
                token = int(self.handle.model(**batch.inputs, use_cache=False).logits[0, -1].argmax())
        return Prediction(ask, read, token)

    def _found(self, predictions: Sequence[Prediction]) -> list[set[Neuron]]:
        """The neurons that each prompt finds, under the weights as they are. Raises `EditFailed` where an attribution is not finite."""
        by_layer = attributions(self.handle, predictions, self.layers, self.config.steps)
        largest = torch.stack([a.amax(1).to(self.handle.device) for a in by_layer.values()]).amax(0)
        if not torch.isfinite(largest).all():
            raise EditFailed("the attribution of a neuron is not finite, so that no neuron can be chosen")
        found: list[set[Neuron]] = [set() for _ in predictions]
        for layer, a in by_layer.items():
            least = largest.to(a.device)[:, None]
            for row, column in ((a >= self.config.threshold * least) & (least > 0)).nonzero().tolist():
                found[row].add((layer, column))
        return found

    @timed("attribute")
    def _neurons(self, predictions: Sequence[Prediction]) -> list[Neuron]:
        """The neurons of a fact, from its prompts."""
        counts = Counter(n for of_prompt in self._found(predictions) for n in of_prompt)
        return [n for n in refined(counts, len(predictions), self.config.share) if n not in self.shared]

    def _write(self, event: EditEvent, own: Sequence[Neuron], old: int, new: int) -> None:
        """Add equation 2 for these neurons. Raises `EditFailed` where a column is no longer finite."""
        norms = torch.stack([self._matrix(layer)[:, column].norm() for layer, column in own]).cpu()
        if not torch.isfinite(norms).all():
            raise EditFailed("the column of a neuron that edits share is no longer finite: each edit of a neuron multiplies its norm")
        rows = torch.tensor([(layer, column, old, new) for layer, column in own])
        self.neurons, self.norms = torch.cat([self.neurons, rows]), torch.cat([self.norms, norms])
        self.owners = [*self.owners, *[event.id] * len(own)]
        first = len(self.norms) - len(own)
        changed = {layer: self._matrix(layer).clone() for layer, _ in own}
        for i in range(first, len(self.norms)):
            changed[own[i - first][0]][:, own[i - first][1]] += self._addition(i)
        self.matrices = {**self.matrices, **changed}

    def _matrix(self, layer: int) -> Tensor:
        """(d, f) float32 the down-projection of a layer as it is."""
        if layer in self.matrices:
            return self.matrices[layer]
        return as_matrix(self.handle.down(layer), self.handle.parameter(self.handle.down_weight(layer)).detach()).float()

    def _addition(self, row: int) -> Tensor:
        """(d,) float32 what equation 2 adds to the column of a row of the state."""
        layer, _, old, new = self.neurons[row].tolist()
        e_old, e_new = (self.embeddings[token].detach().float() for token in (old, new))
        change = self.config.lambda2 / e_new.norm() * e_new - self.config.lambda1 / e_old.norm() * e_old
        return (float(self.norms[row]) * change).to(self.handle.layer_device(layer))

    def _take(self, neurons: Tensor, norms: Tensor, owners: Sequence[str]) -> None:
        """Take over these rows, and add them to the unedited columns one after another."""
        self.neurons, self.norms, self.owners, self.matrices = neurons, norms, list(owners), {}
        changed = {layer: self._matrix(layer).clone() for layer in dict.fromkeys(neurons[:, 0].tolist())}
        for row, (layer, column) in enumerate(neurons[:, :2].tolist()):
            changed[layer][:, column] += self._addition(row)
        self.matrices = changed

    def revert(self, event_ids: Iterable[str]) -> None:
        """Remove what these edits added: each column is the unedited one and what the others add. Raises `BadEditor` for an unknown id."""
        gone = set(event_ids)
        if unknown := gone - {*self.owners, *self.passed}:
            raise BadEditor(f"{self.name} made no edit {', '.join(sorted(unknown))}")
        kept = [row for row, owner in enumerate(self.owners) if owner not in gone]
        self.passed = [owner for owner in self.passed if owner not in gone]
        self._take(self.neurons[kept], self.norms[kept], [self.owners[row] for row in kept])

    def edited_weights(self) -> dict[str, Tensor]:
        """The down-projections that hold a rewritten column; the first one that is looked at where none is rewritten."""
        matrices = self.matrices or {self.layers[0]: self._matrix(self.layers[0])}
        return {self.handle.down_weight(n): as_stored(self.handle.down(n), matrix) for n, matrix in matrices.items()}

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "lambdas": [self.config.lambda1, self.config.lambda2]}

    def _state(self) -> dict[str, Any]:
        return {"neurons": self.neurons, "norms": self.norms, "owners": list(self.owners), "passed": list(self.passed), **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        n, self.passed = len(state["owners"]), list(state["passed"])
        self._take(need(state, "neurons", (n, 4)).cpu(), need(state, "norms", (n,)).cpu(), state["owners"])


def output_embeddings(handle: ModelHandle) -> Tensor:
    """(V, d) the rows of the head. Raises `BadEditor` for a head that does not read the decoder's hidden states."""
    rows: Tensor = handle.head.weight
    if rows.shape[1] != handle.width:
        raise BadEditor(
            f"the output embeddings of {handle.name} are {rows.shape[1]} wide and its hidden states {handle.width}: a row cannot be "
            "added to a column of a down-projection, so choose another method"
        )
    return rows


def attributions(handle: ModelHandle, predictions: Sequence[Prediction], layers: Sequence[int], steps: int) -> dict[int, Tensor]:
    """Equation 1 for every neuron, (P, f) float32 by layer for P predictions, under the weights as they are."""
    batch = collate(handle, [p.ask for p in predictions for _ in range(steps)], [p.read for p in predictions for _ in range(steps)], "left")
    at = batch.prompt.shape[1] - 1  # all rows end in one column
    tokens = torch.tensor([p.token for p in predictions], device=handle.device).repeat_interleave(steps)
    suffix = suffix_from_layer(handle, batch, layers[0], positions=(at, at + 1))
    found, hidden = dict[int, Tensor](), suffix.hidden
    for layer in range(layers[0], layers[-1] + 1):
        acts: list[Tensor] = []
        with torch.no_grad(), handle.hooked(handle.down(layer), lambda m, args, acts=acts: acts.append(args[0]), pre=True):
            entering, hidden = hidden, suffix.layer(layer, hidden)
        if layer in layers:
            act = acts[0].reshape(len(tokens), -1, acts[0].shape[-1])[::steps, -1].float()
            found[layer] = _of_layer(suffix, layer, entering, act, tokens)
    return found


def _of_layer(suffix: ModelSuffix, layer: int, entering: Tensor, act: Tensor, tokens: Tensor) -> Tensor:
    """(P, f) equation 1 at one layer for activations `act` (P, f) in the last position.

    entering: (P m, L, d) the layer's input, m rows a prediction, of which row k gets (k / m) act. tokens: (P m,) what they predict.
    """
    handle, steps = suffix.handle, len(tokens) // len(act)
    weight = as_matrix(handle.down(layer), handle.parameter(handle.down_weight(layer)).detach()).float()
    scale = torch.arange(1, steps + 1, device=act.device) / steps
    add = ((scale - 1)[None, :, None] * (act @ weight.mT)[:, None]).flatten(0, 1).requires_grad_(True)
    with torch.enable_grad(), handle.hooked(handle.down(layer), added_at(-1, add)):
        final = handle.norm(suffix.run(entering, layer)[:, -1])
        probability = handle.logits(final).float().softmax(-1).gather(1, tokens[:, None])
    (gradient,) = torch.autograd.grad(probability.sum(), add)
    return act * (gradient.unflatten(0, (-1, steps)).mean(1) @ weight)


def refined(counts: Counter[Neuron], prompts: int, share: float) -> list[Neuron]:
    """The neurons that `share` of the prompts find, with the share moved as in the released code; in order of layer and column.

    counts: how many of the prompts found each neuron.
    """
    kept: list[Neuron] = []
    for _ in range(_ROUNDS):
        least = max(share * prompts, min(_PROMPTS, prompts))
        kept = sorted(n for n, count in counts.items() if count >= least - 1e-9)
        if _FEWEST <= len(kept) <= _MOST:
            break
        share += _MOVE if len(kept) > _MOST else -_MOVE
    return kept
