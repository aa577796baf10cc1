"""T-Patcher (Huang et al., ICLR 2023, arXiv 2301.09785): a neuron for each token that an edit gets wrong, put into the last MLP.

With h the input of the MLP, its activation function a, and the patches j = 1..n of all edits,

    MLP(h) <- MLP(h) + sum_j v_j a(k_j h + b_j) .                                                            (1)

An edit gets a patch for each token of its answer that is not the likeliest, five at most. With q the input of the MLP where that
token is predicted, a patch begins as k = q / |q|^2 and b = 0, so that k q + b = 1. Its own patches alone are trained, on

    L = L_CE + c_a L_act + c_m L_mem ,        S_n(x) = mean of the n largest exp(x) ,                        (2)
    L_act = S_5(-(k q + b)) ,                                                                                (3)
    L_mem = S_1000((k m + b) - (k q + b) + 3) + S_1000((k m + b) + 3) ,                                      (4)

where m are inputs of the MLP on text that no edit is about: a patch is to be high at its own query and under -3 elsewhere. The
patches of earlier edits act, and stay as they are. A patch is 2 d + 1 numbers.

Published for MLPs of two matrices. In a gated MLP a patch stands beside the gates: its activation function is the gate's, and what it
gives is added to the output. SiLU and GELU are not zero under zero, so that a patch acts a little everywhere; `activation=relu` gives
prompts at which no patch is above zero the numbers of the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, content_id
from testbed.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters.lowrank import TargetModule, find_target_modules
from testbed.editors.base import BadEditor, Editor, EditorConfig, appended, need, require_finite_loss, require_same
from testbed.editors.locate.core import refuse_routed
from testbed.editors.traits import Traits
from testbed.editors.work import Work
from testbed.model.answer_loss import answer_loss
from testbed.model.encoding import Batch, answer_ids, collate, text_batch, text_tokens
from testbed.model.handle import ModelHandle, project
from testbed.model.layout import adds_as_it_is
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.suffix import suffix_from_down_projection

_QUERIES, _MEMORIES = 5, 1_000
"""n of S_n in equations 3 and 4 (paper)."""
_ROWS = 32
"""Prompts or texts of the train pool in one forward."""
_TOKENS = 3.0
"""Patches of an edit, for the estimate of its cost."""
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "activation")
"""Where a model's configuration names the activation function of its MLPs, tried in this order."""


@dataclass(frozen=True)
class TPatcherConfig(EditorConfig):
    layer: int = -1
    """Decoder layer whose MLP is patched; negative counts from the last (paper: the last)."""
    activation: Literal["own", "relu"] = "own"
    """a: the MLP's own activation function (paper), or ReLU."""
    patches: PositiveInt = 5
    """Patches of an edit at most (released: 5)."""
    lr: PositiveFloat = 1e-2
    """Adam's step size (released: 0.01)."""
    steps: PositiveInt = 100
    """Steps an edit at most (ours; released: 2,000, ended by a look at stored inputs that are held out)."""
    check_every: PositiveInt = 20
    """Steps between two looks at the loss: the step size is halved where it fell by less than a twentieth in two of them (released: 1
    look in which it did not; the number of steps is ours)."""
    stop: NonNegativeFloat = 0.1
    """L_act under which training ends before its last step (released), once every token of the answer is the likeliest and no stored
    input is above zero (ours)."""
    c_act: NonNegativeFloat = 1.0
    """c_a (released: 1)."""
    c_memory: NonNegativeFloat = 10.0
    """c_m (released: 10 for zsRE, 5 for FEVER)."""
    margin: NonNegativeFloat = 3.0
    """What equation 4 adds (released: 3)."""
    amplify: PositiveFloat = 10.0
    """Start of a trained factor at each entry of v (released: 10)."""
    spread: PositiveFloat = 0.01
    """Standard deviation of v before the factor (ours; released: 1, many times the size of these models' hidden states)."""
    memory: NonNegativeInt = 2_000
    """Inputs of the MLP on questions and texts of the train pool that are stored (released: 50,000); 0 leaves L_mem out."""


@dataclass(frozen=True)
class Patches:
    """N neurons: keys (N, d), biases (N,) and values (N, d), float32, with their activation function."""

    keys: Tensor
    biases: Tensor
    values: Tensor
    activation: Callable[[Tensor], Tensor]

    def before_activation(self, h: Tensor) -> Tensor:
        """(.., N) float32 k h + b for inputs (.., d)."""
        return h.float() @ self.keys.mT + self.biases

    def __call__(self, h: Tensor) -> Tensor:
        """(.., d) float32 the sum of equation 1 for inputs (.., d)."""
        return self.activation(self.before_activation(h)) @ self.values


@EDITORS.register("tpatcher")
class TPatcher(Editor):
    """The patches of all edits.

    State: keys (N, d), biases (N,), values (N, d), float32, and owners: the edit of each patch. The stored inputs of the MLP are made
    again from the train pool.
    """

    summary = "a trained neuron in the last MLP for each wrong token (T-Patcher)"
    traits = Traits(undo=True, short_targets=True, uses=frozenset({"train_pool"}))
    Config = TPatcherConfig

    def work(self, batch: int) -> Work:
        """Each edit trains alone, the layers above its patches; half of the steps are taken, as a guess."""
        layer, own = self.handle.layer_index(self.config.layer), _TOKENS * (2 * self.handle.width + 1)
        above = float(self.handle.n_layers - 1 - layer)
        return Work(forwards=1.0, steps=self.config.steps / 2, layers=above, trained_per_edit=own, state_per_edit=own)

    def _prepare(self, pool: TrainPool) -> None:
        self.layer = self.handle.layer_index(self.config.layer)
        refuse_routed(self.name, self.handle, [self.layer])
        self.down, self.weight_name = self.handle.down(self.layer), self.handle.down_weight(self.layer)
        self.entry = entry_of(self.handle, self.layer)
        self.activation = torch.relu if self.config.activation == "relu" else own_activation(self.handle)
        adds_as_it_is(self.handle, self.layer)  # found out once, so that no later forward is for it
        d = torch.zeros(0, self.handle.width, device=self.handle.layer_device(self.layer))
        self.stored = self._stored(pool).to(d.device)
        self._take([], d, d[:, 0], d)

    @timed("memory")
    @torch.no_grad()
    def _stored(self, pool: TrainPool) -> Tensor:
        """(M, d) float32 inputs of the MLP on questions with their answers and on texts, in an order that is drawn, every position."""
        asked = [q for q in pool.questions if q.answer and (self.handle.reads_pictures or q.image is None)]
        known: dict[str, Tensor] = self.handle.cache.setdefault("inputs of an MLP", {})
        key = content_id(self.entry.name, self.config.memory, [q.id for q in asked], pool.texts)
        if key not in known:
            rows: list[Tensor] = []
            for batch in self._batches([(q.ask(), q.answer or "") for q in asked], pool.texts):
                if sum(map(len, rows)) >= self.config.memory:
                    break
                seen: list[Tensor] = []
                with self.handle.hooked(self.entry.module, lambda m, args, seen=seen: seen.append(args[0]), pre=True):
                    self.handle.model(**batch.inputs, use_cache=False)
                real = (batch.prompt | batch.answer).to(seen[0].device)
                rows.append(seen[0].reshape(*real.shape, -1)[real].float())
            known[key] = torch.cat(rows)[: self.config.memory] if rows else torch.zeros(0, self.handle.width)
        if self.config.memory and not len(known[key]):
            self.notes.append("the stream has no train pool: nothing holds the patches down elsewhere (L_mem is 0)")
        return known[key]

    def _batches(self, asked: Sequence[tuple[Ask, str]], texts: Sequence[str]) -> Iterator[Batch]:
        """Questions and texts in turn, `_ROWS` at a time, each in an order that does not depend on the editor's seed."""
        generator = torch.Generator().manual_seed(0)
        orders: list[list[int]] = [torch.randperm(len(of), generator=generator).tolist() for of in (asked, texts)]
        pairs, lines = [asked[i] for i in orders[0]], [texts[i] for i in orders[1]]
        for at in range(0, max(len(pairs), len(lines)), _ROWS):
            part = pairs[at : at + _ROWS]
            if part:
                yield collate(self.handle, [a for a, _ in part], [answer_ids(self.handle, a, x) for a, x in part])
            if lines[at : at + _ROWS]:
                yield text_batch(self.handle, [text_tokens(self.handle, x) for x in lines[at : at + _ROWS]])

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        generator = self.generator(batch.step)
        notes = [self._add(event, generator) for event in batch.events]
        return {name: sum(n[name] for n in notes) / len(notes) for name in notes[0]}

    @timed("train")
    def _add(self, event: EditEvent, generator: torch.Generator) -> dict[str, float]:
        """Train and append the patches of one edit. Raises `EditFailed` where a loss is not finite."""
        task = PatchTask(self, event)
        wrong = task.wrong()[: self.config.patches]
        if not len(wrong):
            return {"patches": 0.0, "steps": 0.0, "loss": 0.0}
        new, loss, steps = self._trained(task, wrong, generator)
        rows = (new.keys, new.biases, new.values)
        keys, biases, values = (self._longer(name, old, own) for name, old, own in zip(("k", "b", "v"), self._tensors(), rows))
        self.keys, self.biases, self.values = keys, biases, values
        self.owners = [*self.owners, *[event.id] * len(wrong)]
        return {"patches": float(len(wrong)), "steps": float(steps), "loss": loss}

    def _trained(self, task: PatchTask, wrong: Tensor, generator: torch.Generator) -> tuple[Patches, float, int]:
        """Minimise equation 2 for the queries `wrong` (J,): (the patches, the last cross-entropy in nats a token, the steps)."""
        h, query = self.config, task.queries[wrong]
        k, b = fresh_keys(query).requires_grad_(True), query.new_zeros(len(query), requires_grad=True)
        v = (h.spread * torch.randn(query.shape, generator=generator)).to(query.device).requires_grad_(True)
        a = torch.full_like(query, h.amplify, requires_grad=True)
        adam = torch.optim.Adam([k, b, v, a], lr=h.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5, patience=1, threshold=0.05)
        new, loss, step = Patches(k, b, v * a, self.activation), torch.nan, 0
        for step in range(h.steps + 1):
            new = Patches(k, b, v * a, self.activation)
            nll, right = task.losses(new)
            own = (new.keys * query).sum(1) + new.biases
            others = new.before_activation(self.stored)
            l_act, l_memory = activation_loss(own), memory_loss(others, own, h.margin)
            total = nll + h.c_act * l_act.to(nll) + h.c_memory * l_memory.to(nll)
            require_finite_loss(total, h.lr)
            loss = float(nll.detach())
            done = right and float(l_act.detach()) < h.stop and not bool((others > 0).any())
            if done or step == h.steps:
                break
            adam.zero_grad()
            total.backward()
            adam.step()
            if step % h.check_every == 0:
                plateau.step(float(total.detach()))
        return Patches(new.keys.detach(), new.biases.detach(), new.values.detach(), self.activation), loss, step

    def _longer(self, name: str, old: Tensor, rows: Tensor) -> Tensor:
        """All rows with the new ones; what was handed out before does not change."""
        self._rooms[name] = appended(self._rooms.get(name, old), len(old), rows)
        return self._rooms[name][: len(old) + len(rows)]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.biases, self.values

    def patches(self) -> Patches:
        """All patches as they are now; later edits do not change them."""
        return Patches(*self._tensors(), self.activation)

    def predictor(self) -> Predictor:
        """The model with the patches as they are now; without any, the unedited model."""
        if not self.owners:
            return ModelPredictor(self.handle)
        patches = self.patches()
        return ModelPredictor(self.handle, lambda batch: patched(self.handle, self.entry, self.down, patches))

    def revert(self, event_ids: Iterable[str]) -> None:
        """Drop the patches of these edits; the others stay as they were trained. An edit without patches is nothing to undo.

        Raises `BadEditor` for an unknown id.
        """
        gone = set(event_ids)
        if unknown := gone - {*self.owners, *self._revises}:
            raise BadEditor(f"{self.name} made no edit {', '.join(sorted(unknown))}")
        kept = [i for i, owner in enumerate(self.owners) if owner not in gone]
        self._take([self.owners[i] for i in kept], *(t[kept] for t in self._tensors()))

    def _take(self, owners: list[str], keys: Tensor, biases: Tensor, values: Tensor) -> None:
        self.owners, self.keys, self.biases, self.values = owners, keys, biases, values
        self._rooms: dict[str, Tensor] = {}

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "layer": self.weight_name, "activation": self.config.activation}

    def _state(self) -> dict[str, Any]:
        return {"keys": self.keys, "biases": self.biases, "values": self.values, "owners": list(self.owners), **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        n, d = len(state["owners"]), self.handle.width
        shapes: dict[str, tuple[int | None, ...]] = {"keys": (n, d), "biases": (n,), "values": (n, d)}
        keys, biases, values = (need(state, name, shape).to(self.keys.device) for name, shape in shapes.items())
        self._take(list(state["owners"]), keys, biases, values)


class PatchTask:
    """One edit above the MLP that is patched. The patches of earlier edits act at every position.

    queries: (n, d) float32 the input of the MLP where each of the n tokens of the answer, its end token included, is predicted.
    """

    def __init__(self, editor: TPatcher, event: EditEvent) -> None:
        handle, seen = editor.handle, list[Tensor]()
        with handle.hooked(editor.entry.module, lambda m, args: seen.append(args[0].detach()), pre=True):
            self.suffix = suffix_from_down_projection(handle, [event.ask()], [event.target], editor.layer)
        position = self.suffix.position
        h = seen[0].reshape(1, -1, seen[0].shape[-1]).float()
        self.h = h.gather(1, position[..., None].to(h.device).expand(*position.shape, h.shape[-1]))
        self.queries = self.h[self.suffix.at(self.suffix.batch.before_answer)]
        self.ids = self.suffix.batch.answer_ids
        with torch.no_grad():
            out = project(editor.down, self.suffix.act, handle.parameter(editor.weight_name))
            self.out = out.float() + editor.patches()(self.h) if editor.owners else out

    def losses(self, new: Patches | None) -> tuple[Tensor, bool]:
        """The cross-entropy (nats a token) with the new patches, and whether every token is the likeliest."""
        nll, right = self._tokens(new)
        return nll.mean(), bool(right.all())

    def wrong(self) -> Tensor:
        """(J,) int64 the tokens of the answer that are not the likeliest."""
        with torch.no_grad():
            return (~self._tokens(None)[1]).nonzero()[:, 0].to(self.queries.device)

    def _tokens(self, new: Patches | None) -> tuple[Tensor, Tensor]:
        act, out = self.suffix.act, self.out if new is None else self.out.float() + new(self.h)
        return answer_loss(self.suffix.upper.handle, self.suffix.final_hidden(lambda _: out.to(act.dtype)), self.ids)


def fresh_keys(queries: Tensor) -> Tensor:
    """(J, d) keys q / |q|^2, whose product with their own query (J, d) is 1."""
    return queries / queries.square().sum(1, keepdim=True)


def activation_loss(own: Tensor) -> Tensor:
    """Equation 3 for k q + b (J,)."""
    return _mean_of_largest(-own, _QUERIES)


def memory_loss(others: Tensor, own: Tensor, margin: float) -> Tensor:
    """Equation 4 for k m + b (M, J) and k q + b (J,); 0 without stored inputs."""
    if not others.numel():
        return own.new_zeros(())
    return _mean_of_largest(others - own + margin, _MEMORIES) + _mean_of_largest(others + margin, _MEMORIES)


def _mean_of_largest(x: Tensor, n: int) -> Tensor:
    flat = x.flatten()
    return flat.topk(min(n, len(flat))).values.exp().mean()


def entry_of(handle: ModelHandle, layer: int) -> TargetModule:
    """The linear map that reads a layer's MLP's input: the first to run of those beside its down-projection. Raises `BadEditor`."""
    down = handle.down_weight(layer).removesuffix(".weight")
    beside = down.rpartition(".")[0].replace(".", r"\.")
    found = find_target_modules(handle, rf"^{beside}\.[^.]+$")[0]
    if found.name == down or found.f != handle.width:
        raise BadEditor(
            f"the first linear map beside {down} is {found.name} with inputs {found.f} wide, expected one that reads hidden states "
            f"{handle.width} wide: the MLP of {handle.name} cannot be patched, so choose another layer or method"
        )
    return found


def own_activation(handle: ModelHandle) -> Callable[[Tensor], Tensor]:
    """The activation function of the model's MLPs, as its configuration names it. Raises `BadEditor` where it names none."""
    text = handle.model.config.get_text_config()
    name = next((getattr(text, n) for n in _ACTIVATIONS if isinstance(getattr(text, n, None), str)), None)
    if name not in ACT2FN:
        raise BadEditor(
            f"the configuration of {handle.name} names no activation function that transformers knows in {', '.join(_ACTIVATIONS)} "
            f"(found {name!r}): use activation=relu"
        )
    return ACT2FN[name]


@contextmanager
def patched(handle: ModelHandle, entry: TargetModule, down: torch.nn.Module, patches: Patches) -> Iterator[None]:
    """Equation 1 for the length of a forward; an output to which the patches add nothing stays the tensor that it is."""
    entering: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        entering[:] = [args[0]]

    def add(module: Any, args: Any, output: Tensor) -> Tensor | None:
        more = patches(entering[0]).reshape(output.shape)
        return (output.float() + more).to(output.dtype) if more.any() else None

    with handle.hooked(entry.module, keep, pre=True), handle.hooked(down, add):
        yield
