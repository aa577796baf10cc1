"""A picture's places, run once: they stand first in a prompt, and no word behind them changes what they leave in a decoder.

Keys and values of attention up to the picture's last place are kept, so that of a prompt about a picture that was
seen before the words alone are run. All places are run where nothing is spared or not every row has a picture, inside
`plain()`, and for a decoder that does not take its past in the usual way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from testbed.core.events import Ask
from testbed.model.decoder import Past, Stem, arguments, columns_of, cut, numbered, run, shifted
from testbed.model.encoding import Batch, collate, image_token, prompt_inputs
from testbed.model.handle import ModelHandle
from testbed.model.reference_mode import inside_plain

T = TypeVar("T")
_BYTES, _SHARE = 2 << 30, 8
"""What stems may take together on a CPU, and the part of a GPU's memory that they may; the longest unused leave first."""
_FLAG = "takes stems"


class Stems:
    """Forwards of the unedited model that run a picture's places once, and what enters one of its modules there."""

    def __init__(self, handle: ModelHandle, module: nn.Module, limit: int | None = None) -> None:
        self.handle, self.module = handle, module
        self.limit = _room(handle.device) if limit is None else limit
        self.kept: dict[tuple[Any, ...], Stem] = {}
        self._brief = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(handle.model.forward).parameters else {}

    def collate(self, asks: Sequence[Ask], answers: Sequence[Sequence[int]] | None = None, end: bool = False) -> Batch:
        """As `encode.collate`, the last places of pictures in one column."""
        if any(a.image is None for a in asks):
            return collate(self.handle, asks, answers, side="left" if answers is None else "right", end=end)
        return collate(self.handle, asks, answers, end=end, at=[self._length(a) - 1 for a in asks])

    @torch.no_grad()
    def forward(self, batch: Batch) -> int:
        """Run a batch of `collate`'s. Modules see, last, the columns from the one that is returned on."""
        return columns_of(self._run(batch))

    @torch.no_grad()
    def acts(self, batch: Batch) -> Tensor:
        """(B, T, f) what enters the module when a batch of `collate`'s is run."""
        stems, act = self._watched(lambda: self._run(batch))
        act = act.reshape(len(batch.prompt), -1, act.shape[-1])
        return torch.cat([torch.stack([shifted(s.act, columns_of(stems)) for s in stems]), act], 1) if stems else act

    def _run(self, batch: Batch) -> list[Stem]:
        """The stems that the words were run behind; none where all places were."""
        if not inside_plain() and all(a.image is not None for a in batch.asks) and self.spares(batch.asks):
            if _FLAG not in self.handle.cache:
                self._try(batch)
            if self.handle.cache.get(_FLAG):
                stems = self.of(batch.asks)
                self._words(batch, stems)
                return stems
        self._whole(batch)
        return []

    def spares(self, asks: Sequence[Ask]) -> bool:
        """Whether a picture is there twice, or was before."""
        names = {self._name(a) for a in asks}
        return len(names) < len(asks) or not names.isdisjoint(self.kept)

    def _whole(self, batch: Batch) -> None:
        self.handle.model(**batch.inputs, use_cache=False, **self._brief)

    def _watched(self, work: Callable[[], T]) -> tuple[T, Tensor]:
        """What a forward gives, and what entered the module in the last call of it."""
        seen: list[Tensor] = []
        with self.handle.hooked(self.module, lambda m, args: seen.append(args[0]), pre=True):
            out = work()
        return out, seen[-1]

    def _length(self, ask: Ask) -> int:
        """P, from the prompt's tokens."""
        return int((prompt_inputs(self.handle, ask)["input_ids"][0] == image_token(self.handle)).nonzero().max()) + 1

    def _name(self, ask: Ask) -> tuple[Any, ...]:
        key = "" if ask.image is None else ask.image.key
        return (key, *prompt_inputs(self.handle, ask)["input_ids"][0, : self._length(ask)].tolist())

    def of(self, asks: Sequence[Ask]) -> list[Stem]:
        """The stem of each prompt; those that are not at hand are made together."""
        named = {self._name(a): a for a in asks}
        new = {name: a for name, a in named.items() if name not in self.kept}
        found = {name: self.kept.pop(name) for name in named if name in self.kept}
        found |= dict(zip(new, self._made(list(new.values())))) if new else {}
        self.kept |= found
        while sum(s.bytes for s in self.kept.values()) > self.limit:
            self.kept.pop(next(iter(self.kept)))
        return [found[self._name(a)] for a in asks]

    def _made(self, asks: list[Ask]) -> list[Stem]:
        lengths = [self._length(a) for a in asks]
        column, past = max(lengths), Past()
        batch = self.collate(asks)
        given = numbered(arguments(self.handle, batch))
        mask, places = given["attention_mask"][:, :column], given["position_ids"]
        _, act = self._watched(lambda: run(self.handle, cut(given, 0, column), past))
        act = act.reshape(len(asks), column, -1)
        axes = places.shape[0] if places.ndim == 3 else 1
        after = (places[..., :column] * mask).reshape(axes, len(asks), column).amax((0, 2)) + 1
        pairs = [past.added[layer] for layer in sorted(past.added)]
        return [
            Stem([(k[i : i + 1, :, -n:].clone(), v[i : i + 1, :, -n:].clone()) for k, v in pairs], act[i, -n:].clone(), int(after[i]), axes)
            for i, n in enumerate(lengths)
        ]

    def _words(self, batch: Batch, stems: Sequence[Stem]) -> None:
        """Run the columns behind the pictures."""
        column, past = columns_of(stems), Past(stems)
        past.closed = True
        ids = batch.inputs["input_ids"][:, column:]
        places = torch.tensor([s.after for s in stems], device=ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        given = {
            "inputs_embeds": self.handle.model.get_input_embeddings()(ids),
            "attention_mask": batch.inputs["attention_mask"],
            "position_ids": places.expand(stems[0].axes, *places.shape) if stems[0].axes > 1 else places,
        }
        run(self.handle, given, past)

    def _try(self, batch: Batch) -> None:
        """Whether words give the same behind a stem as behind the picture itself; nothing is learned where those are not finite."""
        _, want = self._watched(lambda: self._whole(batch))
        want = want.reshape(*batch.prompt.shape, -1)
        if not torch.isfinite(want).all():
            return
        try:
            stems = self.of(batch.asks)
            column = columns_of(stems)
            _, got = self._watched(lambda: self._words(batch, stems))
            real = (batch.prompt | batch.answer)[:, column:].to(got.device)
            own = got.reshape(*real.shape, -1)[real].float()
            behind = want[:, column:].to(got.device)[real].float()
            off = float((own - behind).norm() / behind.norm().clamp(min=1e-30))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, KeyError, RuntimeError):  # a decoder with other arguments than those used here
            off = float("inf")
        self.handle.cache[_FLAG] = off <= (1e-3 if want.dtype in (torch.float32, torch.float64) else 0.1)


def _room(place: torch.device) -> int:
    """Bytes for stems on a device."""
    return torch.cuda.get_device_properties(place).total_memory // _SHARE if place.type == "cuda" else _BYTES
