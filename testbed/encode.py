"""Prompts, pictures and answers as tensors. Masks are made here and only here: a key or a gate reads the
prompt mask, never a label mask, so an answer cannot leak into a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from testbed.events import Picture
from testbed.models import BadModel, ModelHandle

Side = Literal["left", "right"]
_CACHED = 20_000


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing to ask a model. `truth` is filled only for an editor whose Traits say that it is told."""

    prompt: str
    image: Picture | None = None
    truth: str | None = None


@dataclass
class Batch:
    """B rows of one padded forward.

    inputs: keyword arguments of the model (input_ids (B, T) int64, attention_mask (B, T), pixel tensors).
    prompt: (B, T) bool, prompt positions, picture included, padding and answer excluded.
    picture: (B, T) bool, positions that hold picture features.
    answer: (B, T) bool, positions of answer tokens.
    """

    inputs: dict[str, torch.Tensor]
    prompt: torch.Tensor
    picture: torch.Tensor
    answer: torch.Tensor
    asks: tuple[Ask, ...] = ()

    @property
    def last_prompt(self) -> torch.Tensor:
        """(B,) index of the last prompt position, from the mask: the same row under either padding."""
        t = self.prompt.shape[1]
        return t - 1 - self.prompt.flip(1).int().argmax(1)

    @property
    def before_answer(self) -> torch.Tensor:
        """(B, T) bool: positions whose logits predict an answer token."""
        return torch.cat([self.answer[:, 1:], torch.zeros_like(self.answer[:, :1])], 1)

    @property
    def answer_ids(self) -> torch.Tensor:
        """(n,) the answer tokens of all rows, in row order."""
        return self.inputs["input_ids"][self.answer]


def prompt_inputs(handle: ModelHandle, ask: Ask) -> dict[str, torch.Tensor]:
    """The prompt of one ask as unpadded model inputs, `input_ids` of shape (1, T); cached on the handle."""
    cache = handle.cache.setdefault("prompts", {})
    key = (ask.prompt, ask.image.key if ask.image is not None else None)
    if key not in cache:
        while len(cache) >= _CACHED:
            cache.pop(next(iter(cache)))
        cache[key] = _encode(handle, ask)
    return cache[key]


def _encode(handle: ModelHandle, ask: Ask) -> dict[str, torch.Tensor]:
    if ask.image is None:
        ids = handle.tokenizer(handle.family.text.format(prompt=ask.prompt), return_tensors="pt")["input_ids"]
        return {"input_ids": ids}
    if not handle.reads_pictures or handle.family.image is None:
        raise BadModel(f"{handle.name} reads no pictures, but {ask.prompt!r} has one: use an image-text model, or --missing-images text")
    text = handle.family.image.format(prompt=ask.prompt)
    from PIL import Image

    out = handle.processor(images=[Image.fromarray(ask.image.load())], text=[text], return_tensors="pt")  # type: ignore[misc]
    return {k: v for k, v in out.items() if k != "attention_mask" and isinstance(v, torch.Tensor)}


def answer_ids(handle: ModelHandle, ask: Ask, answer: str) -> list[int]:
    """Token ids of the answer as it follows this prompt. Raises `BadModel` when it tokenises to nothing."""
    cache = handle.cache.setdefault("answers", {})
    tail = handle.family.text.format(prompt=ask.prompt)[-24:]
    key = (tail, answer)
    if key not in cache:
        tok = handle.tokenizer
        stem = tok(tail, add_special_tokens=False)["input_ids"]
        full = tok(tail + handle.family.answer.format(answer=answer), add_special_tokens=False)["input_ids"]
        own = tok(handle.family.answer.format(answer=answer), add_special_tokens=False)["input_ids"]
        ids = full[len(stem) :] if full[: len(stem)] == stem else own
        if not ids or set(ids) <= {tok.unk_token_id}:
            raise BadModel(
                f"{answer!r} tokenises to nothing this model can spell; pretrain a model on the stream: python -m testbed.pretrain"
            )
        cache[key] = ids
    return cache[key]


def collate(
    handle: ModelHandle, asks: Sequence[Ask], answers: Sequence[Sequence[int]] | None = None, side: Side = "right", end: bool = False
) -> Batch:
    """Pad prompts (followed by answers, and by the end token with `end`) into one batch on the handle's device."""
    rows = [prompt_inputs(handle, a) for a in asks]
    tails = [list(x) for x in answers] if answers is not None else [[] for _ in rows]
    if end:
        tails = [[*t, handle.tokenizer.eos_token_id] for t in tails]
    lengths = [r["input_ids"].shape[1] for r in rows]
    total = max(n + len(t) for n, t in zip(lengths, tails))
    ids = torch.full((len(rows), total), handle.tokenizer.pad_token_id, dtype=torch.long)
    prompt, answer = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, n, tail) in enumerate(zip(rows, lengths, tails)):
        start = total - n - len(tail) if side == "left" else 0
        ids[i, start : start + n] = row["input_ids"][0]
        ids[i, start + n : start + n + len(tail)] = torch.tensor(tail, dtype=torch.long)
        prompt[i, start : start + n] = True
        answer[i, start + n : start + n + len(tail)] = True
    inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": (prompt | answer).long()}
    inputs.update(_pictures(rows, inputs))
    inputs = {k: v.to(handle.device, handle.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    picture = (inputs["input_ids"] == image_token(handle)) & prompt.to(handle.device)
    return Batch(inputs, prompt.to(handle.device), picture, answer.to(handle.device), tuple(asks))


def _pictures(rows: list[dict[str, torch.Tensor]], padded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Picture tensors of all rows, stacked along the first axis; per-token ones (token types) padded like the ids."""
    out: dict[str, torch.Tensor] = {}
    for name in sorted({k for r in rows for k in r} - {"input_ids"}):
        have = [r[name] for r in rows if name in r]
        if all(name in r and r[name].shape == r["input_ids"].shape for r in rows if name in r) and have[0].ndim == 2:
            full = torch.zeros_like(padded["input_ids"])
            for i, r in enumerate(rows):
                if name in r:
                    start = int(padded["attention_mask"][i].argmax())
                    full[i, start : start + r[name].shape[1]] = r[name][0]
            out[name] = full
        else:
            out[name] = torch.cat(have)
    return out


def image_token(handle: ModelHandle) -> int:
    """Id of the token that stands for picture features; -1 for a text-only model."""
    config: Any = handle.model.config
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return -1
