"""Many questions in one row: they share the row's prefix (and its photo) and cannot see one another.

A row is a prefix (BOS, or BOS and a photo) and blocks. A 4-D mask lets a token see the prefix and the
earlier part of its own block; position ids restart after the prefix. So a packed row computes what separate
prompts would, at about nine supervised answers a photo instead of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from testbed.pretraining.tiny_model import IMAGE, IMAGE_TOKENS, ROLES, image_features, pixels

ROW = 192


@dataclass(frozen=True, slots=True)
class Example:
    """A question and its answer; an example without an answer is running text, supervised at each token."""

    prompt: str
    answer: str | None


@dataclass
class Row:
    """Token ids of a row in the making: `block` numbers the block of each token (0 is the prefix)."""

    photo: np.ndarray | None
    ids: list[int]
    block: list[int] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.ids)
        self.block, self.place, self.label = [0] * n, list(range(n)), [-100] * n
        self.prefix = n

    def add(self, ids: list[int], first: int) -> None:
        """Append a block; tokens from index `first` on are answers (predicted by the token before them)."""
        number = self.block[-1] + 1
        self.block += [number] * len(ids)
        self.place += range(self.prefix, self.prefix + len(ids))
        self.label += [i if k >= first else -100 for k, i in enumerate(ids)]
        self.ids += ids


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch of rows, photo rows first.

    ids (B, T) int64; mask (B, 1, T, T) bool, True where a token is seen; places (B, T) int64;
    photos (P, 3, 48, 48) float32 for the first P rows; where (N,) int64, flat indices of the positions that
    predict; labels (N,) int64, what they predict.
    """

    ids: Tensor
    mask: Tensor
    places: Tensor
    photos: Tensor | None
    where: Tensor
    labels: Tensor


class Packer:
    """Turns examples into packed rows, with the prompt forms that `testbed` uses everywhere."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int = ROW) -> None:
        self.tokenizer, self.length = tokenizer, length
        special: list[Any] = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
        self.eos, self.bos, self.pad = map(int, special)
        self.answer_mark: Any = tokenizer.convert_tokens_to_ids(ROLES[1])
        photo = self._encode([f"{ROLES[0]} {IMAGE}"])[0]
        self.photo_prefix = [self.bos, *photo[:-1], *photo[-1:] * IMAGE_TOKENS]
        self.photo_at = len(self.photo_prefix) - IMAGE_TOKENS

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def row(self, examples: list[Example], photo: np.ndarray | None = None, shared: str = "") -> Row:
        """As many of the examples, in order, as fit into one row.

        `shared` is the beginning that all prompts have in common; it joins the prefix, and the examples'
        prompts go on from there (with their leading space).
        """
        prefix = list(self.photo_prefix) if photo is not None else [self.bos]
        lead = "\n" if photo is not None else f"{ROLES[0]} "
        if shared:
            prefix, lead = prefix + self._encode([lead + shared])[0], ""
        row = Row(photo, prefix)
        texts = [e.prompt if e.answer is None else f"{lead}{e.prompt}{ROLES[1]} {e.answer}" for e in examples]
        for example, ids in zip(examples, self._encode(texts), strict=True):
            ids = [*ids, self.eos]
            if len(row.ids) + len(ids) <= self.length:
                row.add(ids, 0 if example.answer is None else ids.index(self.answer_mark) + 1)
        return row

    def batch(self, rows: list[Row]) -> Packed:
        """Rows as tensors, as long as the longest; photo rows are moved to the front."""
        rows = sorted(rows, key=lambda r: r.photo is None)
        length = max(len(r.ids) for r in rows)
        ids, block, places, labels = (np.full((len(rows), length), v, np.int64) for v in (self.pad, -1, 0, -100))
        for i, r in enumerate(rows):
            n = len(r.ids)
            ids[i, :n], block[i, :n], places[i, :n], labels[i, :n] = r.ids, r.block, r.place, r.label
        causal = np.tri(length, dtype=bool)
        seen = (block[:, None, :] == block[:, :, None]) | (block[:, None, :] == 0)
        mask = torch.from_numpy(seen & causal)[:, None]
        where, target = _predicting(rows, labels)
        photos = [r.photo for r in rows if r.photo is not None]
        return Packed(torch.from_numpy(ids), mask, torch.from_numpy(places), pixels(photos) if photos else None, where, target)


def _predicting(rows: list[Row], labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Flat position that predicts each label: the token before, or the prefix's end for a block's first."""
    at, target = [], []
    for i, row in enumerate(rows):
        for j in np.nonzero(labels[i] != -100)[0]:
            before = j - 1 if row.block[j] == row.block[j - 1] else row.prefix - 1
            at.append(i * labels.shape[1] + before)
            target.append(labels[i, j])
    return torch.tensor(at, dtype=torch.int64), torch.tensor(target, dtype=torch.int64)


def packed_logits(model: LlavaForConditionalGeneration, batch: Packed, photo_at: int) -> Tensor:
    """Logits (N, vocabulary) at the batch's predicting positions."""
    embedded = model.get_input_embeddings()(batch.ids)
    if batch.photos is not None:
        seen = image_features(model, batch.photos).to(embedded.dtype)
        n, end = len(seen), photo_at + IMAGE_TOKENS
        pictured = torch.cat([embedded[:n, :photo_at], seen, embedded[:n, end:]], 1)
        embedded = torch.cat([pictured, embedded[n:]])
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.places, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.where])
