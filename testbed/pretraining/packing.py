"""Packing of many examples into one row: they share its prefix (and its photo) and cannot attend to one another.

A row is a prefix (BOS, or BOS and a photo) and one block for each example. A 4-D mask lets a token attend to the prefix
and to the earlier part of its own block, and position ids restart after the prefix. A packed row therefore computes the
same as separate prompts, with about nine supervised answers for each photo instead of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from testbed.pretraining.tiny_model import IMAGE, IMAGE_TOKENS, ROLES, pixels

ROW = 192
"""Longest row, in tokens."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, its answer, and for a question of an evaluation its photo, uint8 (48, 48, 3), if it has one.

    Without an answer, the prompt is running text and every token is supervised.
    """

    prompt: str
    answer: str | None
    photo: np.ndarray | None = None


class Row:
    """A row under construction. For each token: its id, the number of its block (0 is the prefix), its position id and its
    label (-100 where it is not supervised)."""

    def __init__(self, photo: np.ndarray | None, prefix: list[int]) -> None:
        n = len(prefix)
        self.photo, self.ids, self.prefix = photo, list(prefix), n
        self.block, self.position, self.label = [0] * n, list(range(n)), [-100] * n

    def add(self, ids: list[int], first: int) -> None:
        """Append a block; its tokens from index `first` on are supervised."""
        number = self.block[-1] + 1
        self.block += [number] * len(ids)
        self.position += range(self.prefix, self.prefix + len(ids))
        self.label += [i if k >= first else -100 for k, i in enumerate(ids)]
        self.ids += ids


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch of rows, rows with a photo first.

    ids: (B, T) int64. mask: (B, 1, T, T) bool, True where a token may attend. position_ids: (B, T) int64. photos:
    (P, 3, 48, 48) float32, of the first P rows; None where no row has one. predicting: (N,) int64, flat indices of the
    positions that predict a label. labels: (N,) int64, the predicted tokens.
    """

    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    photos: Tensor | None
    predicting: Tensor
    labels: Tensor


class Packer:
    """Makes packed rows of examples, in the prompt template of the tiny model."""

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
        """One row with as many of the examples, in order, as fit into it.

        `shared` is the common beginning of all prompts. It joins the prefix, and the examples' prompts, which begin
        with a space, continue it.
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

    def batch(self, rows: list[Row]) -> PackedBatch:
        """The rows as tensors, padded to the longest row; rows with a photo are moved to the front."""
        rows = sorted(rows, key=lambda r: r.photo is None)
        length = max(len(r.ids) for r in rows)
        ids, block, position_ids, labels = (np.full((len(rows), length), v, np.int64) for v in (self.pad, -1, 0, -100))
        for i, r in enumerate(rows):
            n = len(r.ids)
            ids[i, :n], block[i, :n], position_ids[i, :n], labels[i, :n] = r.ids, r.block, r.position, r.label
        causal = np.tri(length, dtype=bool)
        visible = (block[:, None, :] == block[:, :, None]) | (block[:, None, :] == 0)
        mask = torch.from_numpy(visible & causal)[:, None]
        photos = [r.photo for r in rows if r.photo is not None]
        seen = pixels(photos) if photos else None
        return PackedBatch(torch.from_numpy(ids), mask, torch.from_numpy(position_ids), seen, *_predicting(rows, labels))


def _predicting(rows: list[Row], labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """(flat position that predicts each label, label). It is the token before; for a block's first token, the prefix's last."""
    at, target = [], []
    for i, row in enumerate(rows):
        for j in np.nonzero(labels[i] != -100)[0]:
            before = j - 1 if row.block[j] == row.block[j - 1] else row.prefix - 1
            at.append(i * labels.shape[1] + before)
            target.append(labels[i, j])
    return torch.tensor(at, dtype=torch.int64), torch.tensor(target, dtype=torch.int64)


def packed_logits(model: LlavaForConditionalGeneration, batch: PackedBatch, photo_at: int) -> Tensor:
    """Logits (N, vocabulary) at the positions of the batch that predict a label."""
    embedded = model.get_input_embeddings()(batch.ids)
    if batch.photos is not None:
        projected: Any = model.model.get_image_features(pixel_values=batch.photos)
        features = torch.stack(list(projected.pooler_output)).to(embedded.dtype)
        n, end = len(features), photo_at + IMAGE_TOKENS
        with_photo = torch.cat([embedded[:n, :photo_at], features, embedded[:n, end:]], 1)
        embedded = torch.cat([with_photo, embedded[n:]])
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.predicting])
