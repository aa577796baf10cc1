"""Rows of tokens in one forward without padding, in which a beginning that rows share is run once.

The questions of a step share much: the examples of a relation, the facts before a question, a prompt with each of its choices.
Sorted by their tokens, each row begins with what it shares with the row before it. So the tokens of many rows are laid side by
side into a few sequences, and a mask lets a token see the tokens of its own row alone. Behind such a forward the keys and
values of each row are gathered, and the rows go on by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from testbed.model.handle import ModelHandle
from testbed.model.out_of_memory import is_out_of_memory
from testbed.model.prefix_cache import PrefixCache, agree, run_decoder

Row = list[int]
LENGTH = 512
"""Tokens of one sequence, about: in longer ones attention costs more, in shorter ones fewer rows share their beginnings."""
_COMPARED = 4
"""Rows shorter than this say too little about a decoder."""
_FLAG = "takes packed rows"


@dataclass(frozen=True)
class Packing:
    """Where the tokens of rows lie in S sequences of L tokens.

    ids, positions: (S, L) int64 tokens, and the position of each in its row. sees: (S, L, L) bool, whether a token sees another.
    sequence: the sequence of each row. columns: the place of each token of a row in its sequence, (n,) int64 a row.
    """

    ids: np.ndarray
    positions: np.ndarray
    sees: np.ndarray
    sequence: list[int]
    columns: list[np.ndarray]


def pack(rows: Sequence[Row], length: int = LENGTH) -> Packing:
    """Lay rows into sequences of about `length` tokens, or of as many as the longest row has."""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    shared = [0, *(_common(rows[a], rows[b]) for a, b in pairwise(order))]
    distinct = sum(len(rows[i]) for i in order) - sum(shared)
    n = max(1, round(distinct / max(length, *map(len, rows))))
    tokens: list[Row] = []
    sequence, columns, path = [0] * len(rows), [np.zeros(0, np.int64)] * len(rows), np.zeros(0, np.int64)
    for i, same in zip(order, shared):
        if not tokens or (len(tokens[-1]) * n >= distinct and len(tokens) < n):
            tokens.append([])
            same = 0
        used = len(tokens[-1])
        path = np.concatenate([path[:same], np.arange(used, used + len(rows[i]) - same)])
        tokens[-1] += rows[i][same:]
        sequence[i], columns[i] = len(tokens) - 1, path
    return _packing(rows, tokens, sequence, columns)


def _packing(rows: Sequence[Row], tokens: list[Row], sequence: list[int], columns: list[np.ndarray]) -> Packing:
    width = max(map(len, tokens))
    ids, positions = np.zeros((len(tokens), width), np.int64), np.zeros((len(tokens), width), np.int64)
    sees = np.zeros((len(tokens), width, width), bool)
    for row, s, at in zip(rows, sequence, columns):
        ids[s, at], positions[s, at] = row, np.arange(len(row))
        sees[s, at[:, None], at] = np.tri(len(at), dtype=bool)
    return Packing(ids, positions, sees, sequence, columns)


def _common(one: Row, other: Row) -> int:
    """How many tokens two rows begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class RowStates(DynamicCache):
    """Keys and values of B rows that are continued together, (B, heads, C, width) a layer, made once for all steps.

    used: columns that are filled, the same for every row; a mask says which of them are a row's own.
    """

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]], packing: Packing, columns: list[np.ndarray], rows: list[int], more: int):
        """Gather the first columns of some rows of a packed forward. more: steps that will follow."""
        super().__init__()
        self.used = max(map(len, columns))
        sequence = torch.tensor([[packing.sequence[i]] for i in rows])
        at = torch.tensor(np.stack([np.pad(c, (0, self.used - len(c))) for c in columns]))
        self.kept = {n: (self._gathered(k, sequence, at, more), self._gathered(v, sequence, at, more)) for n, (k, v) in layers.items()}

    def _gathered(self, states: Tensor, sequence: Tensor, at: Tensor, more: int) -> Tensor:
        own = states.transpose(1, 2)[sequence.to(states.device), at.to(states.device)].transpose(1, 2)
        out = own.new_zeros(*own.shape[:2], self.used + more, own.shape[3])
        out[:, :, : self.used] = own
        return out

    def keep(self, rows: Int[Tensor, " b"]) -> None:
        """Drop all other rows."""
        self.kept = {n: (k[rows.to(k.device)], v[rows.to(v.device)]) for n, (k, v) in self.kept.items()}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.kept[layer_idx]
        end = self.used + key_states.shape[-2]
        keys[:, :, self.used : end], values[:, :, self.used : end] = key_states, value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return self.used

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.used + query_length, 0


class PackedForward:
    """One forward of rows: their hidden states, and their keys and values."""

    def __init__(self, handle: ModelHandle, rows: Sequence[Row], length: int = LENGTH) -> None:
        self.handle, self.packing, self.cache = handle, pack(rows, length), PrefixCache()
        ids, positions, sees = (
            torch.from_numpy(x).to(handle.device) for x in (self.packing.ids, self.packing.positions, self.packing.sees)
        )
        self.hidden = _run(handle, ids, positions, sees, self.cache)

    def final_hidden(self, rows: Sequence[int], positions: Sequence[int]) -> Float[Tensor, "n d"]:
        """(n, d) final hidden states of some rows, each at one of its positions; a row may be named many times."""
        at = [self.packing.columns[i][p] for i, p in zip(rows, positions)]
        sequence = torch.tensor([self.packing.sequence[i] for i in rows], device=self.hidden.device)
        return self.hidden[sequence, torch.tensor(at, device=self.hidden.device)]

    def rows_after(self, rows: list[int], lengths: list[int], steps: int) -> Continuation:
        """What continues some rows behind their first tokens, whose number `lengths` gives."""
        columns = [self.packing.columns[i][:n] for i, n in zip(rows, lengths)]
        return Continuation(self.handle, RowStates(self.cache.added, self.packing, columns, rows, steps), lengths)


class Continuation:
    """Rows that take one more token at every step. lengths: tokens before the first step."""

    def __init__(self, handle: ModelHandle, states: RowStates, lengths: list[int]) -> None:
        self.handle, self.states = handle, states
        self._next = torch.tensor(lengths, device=handle.device)
        self._own = torch.arange(states.used, device=handle.device) < self._next[:, None]

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B d"]:
        """(B, d) final hidden states behind one more token (B,) a row."""
        self._own = torch.cat([self._own, torch.ones_like(self._own[:, :1])], 1)
        hidden = _run(self.handle, tokens[:, None], self._next[:, None], self._own[:, None], self.states)
        self.states.used += 1
        self._next = self._next + 1
        return hidden[:, 0]

    def keep(self, rows: Int[Tensor, " b"]) -> None:
        """Drop all other rows."""
        self.states.keep(rows)
        self._next, self._own = self._next[rows], self._own[rows]


def _run(handle: ModelHandle, ids: Tensor, positions: Tensor, sees: Tensor, cache: DynamicCache) -> Tensor:
    """(S, L, d) final hidden states. sees: (S, L, columns) bool."""
    mask = torch.zeros(sees.shape, dtype=handle.dtype, device=handle.device).masked_fill_(~sees, torch.finfo(handle.dtype).min)
    return run_decoder(handle, {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}, cache)


def logits_of(handle: ModelHandle, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
    """(n, V) float32 logits of final hidden states, beside the model's inputs."""
    return handle.logits(hidden).float()


@torch.no_grad()
def takes_packed_rows(handle: ModelHandle, rows: Sequence[Row], steps: int) -> bool:
    """Whether rows may be packed, and continued by so many tokens: compared with plain forwards once a model.

    A decoder that takes neither positions nor a mask for each token, that changes its logits behind the head, whose prompts are
    read in both directions, or whose layers see a window shorter than the rows may not. Nothing is concluded where the model's
    logits are not finite.
    """
    window = getattr(handle.model.config.get_text_config(), "sliding_window", None) or handle.window
    other = handle.family.needs_picture or handle.family.prefix or _has_local_attention(handle)
    if not handle.takes_position_ids or other or max(map(len, rows)) + steps > window:
        return False
    longest = max(rows, key=len)
    if _FLAG not in handle.cache:
        if len(longest) < _COMPARED:
            return False
        want = [_plain_logits(handle, row) for row in _to_compare(longest)]
        if not all(torch.isfinite(x).all() for x in want):
            return False
        handle.cache[_FLAG] = _agrees(handle, _to_compare(longest), want)
    return handle.cache[_FLAG]


def _to_compare(row: Row) -> list[Row]:
    """Two rows that share a beginning, and one that shares none with them unless all tokens are equal."""
    half = row[: len(row) // 2]
    return [row, half + row[::-1][: len(row) - len(half)], row[::-1]]


def _plain_logits(handle: ModelHandle, row: Row) -> Tensor:
    """(2, V) logits of a plain forward at the row's last token and at the same token once more."""
    ids = torch.tensor([[*row, row[-1]]], device=handle.device)
    return handle.model(input_ids=ids, use_cache=False).logits[0, -2:].float()


def _has_local_attention(handle: ModelHandle) -> bool:
    """Whether a layer masks by the number of the column (GPT-Neo), which in a packed sequence is that of other rows too."""
    return "local" in (getattr(handle.model.config.get_text_config(), "attention_layers", None) or ())


def _agrees(handle: ModelHandle, rows: list[Row], want: list[Tensor]) -> bool:
    try:
        forward, each = PackedForward(handle, rows), list(range(len(rows)))
        lengths = [len(r) for r in rows]
        first = logits_of(handle, forward.final_hidden(each, [n - 1 for n in lengths]))
        last = torch.tensor([r[-1] for r in rows], device=handle.device)
        second = logits_of(handle, forward.rows_after(each, lengths, 1).step(last))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as e:  # a decoder of another kind
        if is_out_of_memory(e):
            raise
        return False
    return all(agree(torch.stack([a, b]), w.to(a.device)) for a, b, w in zip(first, second, want))
