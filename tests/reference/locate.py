"""Locate-then-edit methods written out plainly, for the tests: float64, one prompt a forward, dense matrices, no cache.

From the papers' formulas; shares nothing with the editors but the tokenizer, the lookup position and the solve's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from testbed.core.events import Ask, EditEvent
from testbed.editors.locate.keys import ask_of, lookup, subject_of
from testbed.model.encoding import answer_ids, prompt_inputs
from testbed.model.handle import ModelHandle


@dataclass
class Settings:
    """What a search and a solve are told; the fields are those of the papers."""

    layers: Sequence[int]
    contexts: Sequence[str]
    steps: int
    lr: float
    decay: float
    clamp: float
    kl: float
    stop: float
    bare: float = 0.5
    within: bool = False
    """The change is one of the MLP's output, because the layer does more to that than add it."""


@dataclass
class PlainLocate:
    """A float64 model with changed down-projections W (d, f)."""

    handle: ModelHandle
    s: Settings
    weights: dict[int, Tensor] = field(default_factory=dict)
    past: dict[int, list[Tensor]] = field(default_factory=dict)

    def weight(self, layer: int) -> Tensor:
        if layer not in self.weights:
            w = self.handle.parameter(self.handle.down_weight(layer)).detach().clone()
            self.weights[layer] = w if isinstance(self.handle.down(layer), nn.Linear) else w.T.contiguous()
        return self.weights[layer]

    def changed(self) -> AbstractContextManager[None]:
        """The changed weights laid over the model; gradients must be taken inside, too."""
        stored = {n: w if isinstance(self.handle.down(n), nn.Linear) else w.T.contiguous() for n, w in self.weights.items()}
        return self.handle.swapped({self.handle.down_weight(n): w for n, w in stored.items()})

    def run(self, ids: Tensor, hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Tensor:
        """(T, V) logits of one row."""
        taken = [m.register_forward_hook(h) for m, h in hooks]
        try:
            return self.handle.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            for h in taken:
                h.remove()

    def row(self, event: EditEvent, context: str, answer: bool) -> tuple[Tensor, int, int]:
        """Token ids (1, T), the lookup position, and the number of prompt tokens."""
        ask = ask_of(event, context)
        ids = prompt_inputs(self.handle, ask)["input_ids"][0].tolist()
        more = [*answer_ids(self.handle, ask_of(event), event.target), self.handle.tokenizer.eos_token_id] if answer else []
        return torch.tensor([ids + more]), lookup(self.handle, ask, subject_of(event)), len(ids)

    @torch.no_grad()
    def seen(self, module: nn.Module, event: EditEvent, context: str, entering: bool) -> Tensor:
        """What enters (or leaves) a module at the lookup position."""
        kept: list[Tensor] = []
        ids, at, _ = self.row(event, context, False)

        def keep(m: nn.Module, args: Any, out: Any) -> None:
            x = args[0] if entering else out[0] if isinstance(out, tuple) else out
            kept.append(x.reshape(ids.shape[1], -1)[at])

        with self.changed():
            self.run(ids, [(module, keep)])
        return kept[0]

    def key(self, event: EditEvent, layer: int) -> Tensor:
        down = self.handle.down(layer)
        bare, *others = [self.seen(down, event, c, True) for c in self.s.contexts]
        return self.s.bare * bare + (1 - self.s.bare) * torch.stack(others).mean(0) if others else bare

    def search(self, event: EditEvent, places: Sequence[nn.Module], scales: Sequence[float], pmet: bool = False) -> list[Tensor]:
        """A change of each place's output at the lookup position, by torch's Adam on the loss of the whole model."""
        with self.changed():
            return self.searched(event, places, scales, pmet)

    def searched(self, event: EditEvent, places: Sequence[nn.Module], scales: Sequence[float], pmet: bool) -> list[Tensor]:
        s, d = self.s, self.handle.width
        deltas = [torch.zeros(d, dtype=torch.float64, requires_grad=True) for _ in places]
        adam = torch.optim.Adam(deltas, lr=s.lr)
        essence = self.essence(event)
        for step in range(s.steps):
            nll, hit = self.likelihood(event, places, deltas)
            drift = self.drift(essence, places, deltas)
            decay = sum(s.decay * x.norm() / c**2 for x, c in zip(deltas, scales))
            loss = (0.1 if pmet and hit else 1.0) * nll + s.kl * drift + decay
            if step == s.steps - 1 or loss < s.stop or (pmet and hit and drift < 0.01):
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                for x, c in zip(deltas, scales):
                    if x.norm() > s.clamp * c:
                        x.mul_(s.clamp * c / x.norm())
        return [x.detach() for x in deltas]

    def likelihood(self, event: EditEvent, places: Sequence[nn.Module], deltas: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """Mean negative log-likelihood of the answer over contexts, and whether every token is the likeliest everywhere."""
        losses, hits = [], []
        for context in self.s.contexts:
            ids, at, n = self.row(event, context, True)
            logits = self.run(ids, [(m, adding(x, at)) for m, x in zip(places, deltas)])[n - 1 : -1]
            losses.append(-logits.log_softmax(-1)[torch.arange(len(logits)), ids[0, n:]].mean())
            hits.append(bool((logits.argmax(-1) == ids[0, n:]).all()))
        return torch.stack(losses).mean(), all(hits)

    def essence(self, event: EditEvent) -> tuple[Tensor, int, Tensor] | None:
        subject = subject_of(event)
        if subject is None:
            return None
        ask = Ask(f"{subject} is a")
        ids, at = prompt_inputs(self.handle, ask)["input_ids"], lookup(self.handle, ask, subject)
        with torch.no_grad():
            return ids, at, self.run(ids, [])[at].log_softmax(-1)

    def drift(self, essence: tuple[Tensor, int, Tensor] | None, places: Sequence[nn.Module], deltas: Sequence[Tensor]) -> Tensor:
        if essence is None:
            return torch.zeros(())
        ids, at, before = essence
        now = self.run(ids, [(m, adding(x, at)) for m, x in zip(places, deltas)])[at].log_softmax(-1)
        return (now.exp() * (now - before)).sum()

    def spread(self, events: Sequence[EditEvent], solve: Callable[[int, Tensor, Tensor], Tensor], pmet: bool = False) -> None:
        """Targets at the last layer, then every layer's part of what is left: `solve(layer, K (f, n), R (d, n))`."""
        last = self.s.layers[-1]
        place = self.handle.down(last) if pmet or self.s.within else self.handle.layers[last]
        start = [self.seen(place, e, "", False) for e in events]
        targets = [z + self.delta(e, z, pmet) for e, z in zip(events, start)]
        for i, layer in enumerate(self.s.layers):
            keys = torch.stack([self.key(e, layer) for e in events], 1)
            now = torch.stack([self.seen(place, e, "", False) for e in events], 1)
            left = len(self.s.layers) - i
            residual = (torch.stack(targets, 1) - now) / (math.sqrt(left) if pmet else left)
            self.weights[layer] = self.weight(layer) + solve(layer, keys, residual)
            self.past.setdefault(layer, []).append(keys)

    def delta(self, event: EditEvent, start: Tensor, pmet: bool) -> Tensor:
        last = self.s.layers[-1]
        place = self.place(last)
        if not pmet:
            return self.search(event, [place], [float(start.norm())])[0]
        places = [self.handle.attention(last), place]
        attention = float(self.seen(places[0], event, "", False).norm())
        return self.search(event, places, [attention, float(start.norm())], True)[1]

    def place(self, layer: int) -> nn.Module:
        """What the change of a target is added to the output of."""
        return self.handle.down(layer) if self.s.within else self.handle.layers[layer]

    def history(self, layer: int) -> Tensor:
        """(f, f) sum of k k^T over past keys."""
        f = self.weight(layer).shape[1]
        past = torch.cat(self.past.get(layer, [torch.zeros(f, 0, dtype=torch.float64)]), 1)
        return past @ past.T

    def memit(self, events: Sequence[EditEvent], prior: dict[int, Tensor], history: bool = False, pmet: bool = False) -> None:
        """`R K^T (A0 + H + K K^T)^-1`, A0 (f, f) by layer."""

        def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
            past = self.history(layer) if history else 0
            return residual @ keys.T @ torch.linalg.inv(prior[layer] + past + keys @ keys.T)

        self.spread(events, solve, pmet)

    def alphaedit(self, events: Sequence[EditEvent], moments: dict[int, Tensor], threshold: dict[int, float], l2: dict[int, float]) -> None:
        """The released form: `(P (K K^T + H) + L2 I)^-1 P K R^T`, with a dense P."""

        def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(moments[layer])
            small = vectors[:, values < threshold[layer]]
            p = small @ small.T
            left = p @ (keys @ keys.T + self.history(layer)) + l2[layer] * torch.eye(len(p), dtype=torch.float64)
            return torch.linalg.solve(left, p @ keys @ residual.T).T

        self.spread(events, solve)

    def rome(self, event: EditEvent, prior: Tensor) -> None:
        """`(v* - W k) (C^-1 k)^T / (k^T C^-1 k)` with the averaged key in all places."""
        layer = self.s.layers[0]
        place = self.place(layer)
        mlp = self.seen(self.handle.down(layer), event, "", False)
        (delta,) = self.search(event, [place], [float(mlp.norm())])
        bare, key = self.seen(self.handle.down(layer), event, "", True), self.key(event, layer)
        residual = delta + self.weight(layer) @ (bare - key)
        u = torch.linalg.solve(prior, key)
        self.weights[layer] = self.weight(layer) + torch.outer(residual, u) / (u @ key)


def adding(delta: Tensor, at: int) -> Callable[..., Any]:
    """A forward hook that adds to the output at one position."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        rows = x.view(-1, x.shape[-1])
        rows[at] = rows[at] + delta
        return (x, *out[1:]) if isinstance(out, tuple) else x

    return hook
