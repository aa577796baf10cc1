"""Rows behind a column at which they are aligned; what lies before it is kept as keys and values of attention.

Nothing before the lookup position depends on what is added there, so a search for targets runs the columns
from that position on, and each row's prompt, its picture included, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.model.decoder import Past, arguments, cut, numbered, run
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle
from testbed.model.prefix_cache import Stems
from testbed.model.reference_mode import inside_plain
from testbed.model.suffix import Above, enter


@dataclass(frozen=True)
class Behind:
    """Layers above an edit, for the columns from `start` on. above.hidden: (B, T - start, d)."""

    above: Above
    start: int

    def ends(self, add: Tensor, column: int, at: Tensor) -> Tensor:
        """(n, d) what enters the head at `at` (B, T) bool, with `add` (B, d) added to what enters at a column."""
        hidden = self.above.hidden.clone()
        hidden[:, column - self.start] += add.to(hidden)
        out = self.above.through(hidden, self.above.first, self.above.handle.n_layers)
        return self.above.ends(out, at[:, self.start : self.start + out.shape[1]])


def behind(handle: ModelHandle, batch: Batch, first: int, column: int, width: int | None = None) -> Behind:
    """The layers from `first` on for `width` columns from `column` on (all without a width).

    All columns are run where a decoder does not take its past in the usual way, and inside `plain()`.
    """
    last = handle.n_layers - 1
    stems = _stems(handle, batch) if column and not inside_plain() else None
    flag = "takes a past" if stems is None else "takes a past behind stems"
    if column == 0 or inside_plain() or handle.cache.get(flag) is False:
        return Behind(enter(handle, batch, first, last), 0)
    found = _behind(handle, batch, first, slice(column, column + width if width else batch.prompt.shape[1]), stems)
    if flag not in handle.cache:
        whole = enter(handle, batch, first, last)
        agreed = found is not None and _agree(found, whole, batch, column)
        if torch.isfinite(whole.hidden).all():  # else nothing was learned about the decoder
            handle.cache[flag] = agreed
        return found if found is not None and agreed else Behind(whole, 0)
    return found if found is not None else Behind(enter(handle, batch, first, last), 0)


def _stems(handle: ModelHandle, batch: Batch) -> Stems | None:
    """Where pictures of the batch will be run once; None where each is there once, or not every row has one."""
    stems = Stems(handle, handle.down(0))
    return stems if all(a.image is not None for a in batch.asks) and stems.spares(batch.asks) else None


@torch.no_grad()
def _behind(handle: ModelHandle, batch: Batch, first: int, columns: slice, stems: Stems | None) -> Behind | None:
    """None for a decoder that does not take its rows as they are expected here."""
    given = arguments(handle, batch)
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != batch.prompt.shape:
        return None
    past, gone = Past(), 0
    if stems is not None:
        past = Past(stems.of(batch.asks))
        given, gone = _words(batch, numbered(given), past)
    start, stop = columns.start - gone, columns.stop - gone
    if start:
        run(handle, cut(given, 0, start, past.columns), past)
    past.closed = True
    above = Above(handle, first, torch.zeros(0), [])
    with above.entered(handle.n_layers - 1):
        run(handle, cut(given, start, stop, past.columns), past)
    return Behind(above, columns.start)


def _words(batch: Batch, given: dict[str, Any], past: Past) -> tuple[dict[str, Any], int]:
    """The arguments without the columns in which every row still has its picture, and how many those are; stems stand first in the mask."""
    t, mask = batch.prompt.shape[1], given["attention_mask"]
    each = torch.arange(t, device=mask.device)
    ends = (batch.picture.to(mask.device) * (each + 1)).amax(1)
    gone = int(ends.min())
    stems = torch.tensor([len(s.act) for s in past.stems], device=mask.device)
    head = torch.arange(past.columns, device=mask.device) >= past.columns - stems[:, None]
    words = (mask * (each >= ends[:, None]))[:, gone:]
    return {**cut(given, gone, t), "attention_mask": torch.cat([head.to(mask.dtype), words], 1)}, gone


@torch.no_grad()
def _agree(found: Behind, whole: Above, batch: Batch, column: int) -> bool:
    """Both give the same output of the last layer, at text positions."""
    own = found.above.through(found.above.hidden, whole.first, whole.handle.n_layers)
    want = whole.through(whole.hidden, whole.first, whole.handle.n_layers)[:, column : column + own.shape[1]]
    real = (batch.prompt | batch.answer)[:, column : column + own.shape[1]]
    real = real.to(own.device)
    off = (own - want)[real].float().norm() / want[real].float().norm().clamp(min=1e-30)
    return bool(off <= (1e-3 if own.dtype in (torch.float32, torch.float64) else 0.1))
