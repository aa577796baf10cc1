"""Prompts, pictures and answers as tensors.

Masks are made here and only here. A key or a gate reads the prompt mask, never a label mask, so that an answer cannot
leak into a decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from testbed.core.events import Ask, BadPicture, Picture
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.image_loading import Decoded, place_of

Side = Literal["left", "right"]


class UntokenizableAnswer(BadModel):
    """An answer that tokenises to nothing, or to unknown tokens alone."""


class PromptTooLong(BadModel):
    """A prompt that does not fit into the model's window with its answer."""


_CACHED = 20_000
"""Prompts and answers whose tokens are cached, at most."""
_NOT_INPUTS = ("attention_mask", "labels")
"""What processors make beside the inputs: the mask is made here, and labels would let a forward compute a loss."""
_PICTURE_BYTES = 512 * 2**20
"""Bytes of pictures cached as tensors, at most."""
_BLANK = Decoded("blank", np.full((32, 32, 3), 128, dtype=np.uint8))
"""A grey picture for a family whose forward needs one even where no row has any."""


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

    def on(self, device: torch.device) -> Batch:
        """The same with its masks beside activations on another device; the inputs stay where the model takes them."""
        if device == self.prompt.device:
            return self
        return replace(self, prompt=self.prompt.to(device), picture=self.picture.to(device), answer=self.answer.to(device))

    @cached_property
    def last_prompt(self) -> torch.Tensor:
        """(B,) index of the last prompt position, from the mask: the same row under either padding."""
        t = self.prompt.shape[1]
        return t - 1 - self.prompt.flip(1).int().argmax(1)

    @cached_property
    def before_answer(self) -> torch.Tensor:
        """(B, T) bool: positions whose logits predict an answer token."""
        return torch.cat([self.answer[:, 1:], torch.zeros_like(self.answer[:, :1])], 1)

    @cached_property
    def answer_ids(self) -> torch.Tensor:
        """(n,) the answer tokens of all rows, in row order."""
        return self.inputs["input_ids"][self.answer]


@dataclass(frozen=True, slots=True)
class _ProcessedPicture:
    """What a processor makes of one picture, independent of the prompt.

    tensors: pixels and the like, one picture along the first axis.
    block: (n,) by name: the ids and per-token tensors that replace the image token in the token row.
    """

    tensors: dict[str, torch.Tensor]
    block: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class _Pictures(dict[str, _ProcessedPicture]):
    """Pictures by key, the oldest dropped when they take more than `_PICTURE_BYTES`."""

    bytes = 0

    def keep(self, key: str, seen: _ProcessedPicture) -> None:
        self[key] = seen
        self.bytes += seen.bytes
        while self.bytes > _PICTURE_BYTES and len(self) > 1:
            self.bytes -= self.pop(next(iter(self))).bytes


def prompt_inputs(handle: ModelHandle, ask: Ask) -> dict[str, torch.Tensor]:
    """The prompt of one ask as unpadded model inputs, `input_ids` of shape (1, T). Tokens and pixels are cached on the handle."""
    if ask.image is None:
        return {"input_ids": torch.tensor([_tokens(handle, handle.family.text, ask)])}
    if not handle.reads_pictures or handle.family.image is None:
        raise BadModel(f"{handle.name} reads no pictures, but {ask.prompt!r} has one: use an image-text model, or --missing-images text")
    if handle.family.prompt_tensors:
        return _process(handle, _in_template(handle, handle.family.image, ask), ask.image)
    pictures: _Pictures = handle.cache.setdefault("pictures", _Pictures())
    short = _tokens(handle, handle.family.image, ask)
    seen = pictures.get(ask.image.key)
    if seen is None:
        full = _process(handle, _in_template(handle, handle.family.image, ask), ask.image)
        seen = _split(full, short, image_token(handle))
        if seen is None:
            return full
        pictures.keep(ask.image.key, seen)
    return seen.tensors | _insert(short, seen.block, image_token(handle))


def _tokens(handle: ModelHandle, template: str, ask: Ask) -> list[int]:
    cache = handle.cache.setdefault("prompts", {})
    text = _in_template(handle, template, ask)
    if text not in cache:
        while len(cache) >= _CACHED:
            cache.pop(next(iter(cache)))
        cache[text] = without_end(handle, handle.tokenizer(text)["input_ids"])
    return cache[text]


def without_end(handle: ModelHandle, ids: list[int]) -> list[int]:
    """Tokens of a prompt without the end token that some tokenizers append: behind it no answer would be expected."""
    return ids[:-1] if handle.appends_end and ids[-1:] == [handle.tokenizer.eos_token_id] else ids


def text_tokens(handle: ModelHandle, text: str) -> list[int]:
    """Tokens of running text as the tokenizer reads it, with the begin token where it adds one, cut to the model's window."""
    return without_end(handle, handle.tokenizer(text)["input_ids"])[: handle.window]


def _in_template(handle: ModelHandle, template: str, ask: Ask) -> str:
    """The prompt in its template. A prompt that itself contains the image token does not get a second picture."""
    prompt = ask.prompt
    if handle.reads_pictures:
        token = handle.tokenizer.convert_ids_to_tokens(image_token(handle))
        prompt = prompt.replace(token, token.strip("<|>"))
    return template.format(prompt=prompt, examples=handle.examples.get(ask.relation, ""))


def prompt_in_template(handle: ModelHandle, ask: Ask) -> tuple[str, int, int]:
    """The prompt as the tokenizer reads it, template included, and where in it the prompt itself begins and ends."""
    template = handle.family.text if ask.image is None else handle.family.image or handle.family.text
    text, bare = _in_template(handle, template, ask), _in_template(handle, "{prompt}", ask)
    end = len(text) - len(template.partition("{prompt}")[2])
    return text, end - len(bare), end


def _process(handle: ModelHandle, text: str, picture: Picture) -> dict[str, torch.Tensor]:
    from PIL import Image

    processor: Any = handle.processor
    pixels = picture.load()
    try:
        out = processor(images=[Image.fromarray(pixels)], text=[text.removesuffix(handle.family.closing)], return_tensors="pt")
    except Exception as e:  # a processor may raise anything, for instance for a picture of one line
        size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
        raise BadPicture(f"picture {place_of(picture)} ({size}) is refused by the processor of {handle.name}: {e}") from e
    kept = {k: v for k, v in out.items() if k not in _NOT_INPUTS and isinstance(v, torch.Tensor)}
    n = len(without_end(handle, kept["input_ids"][0].tolist()))
    return {k: v[:, :n] if v.shape == kept["input_ids"].shape else v for k, v in kept.items()}


def _split(full: dict[str, torch.Tensor], short: list[int], token: int) -> _ProcessedPicture | None:
    """What the picture added to the prompt's own tokens `short`; None where it changed more than the image token."""
    shape = full["input_ids"].shape
    ids: list[int] = full["input_ids"][0].tolist()
    at = short.index(token) if token in short else 0
    n = len(ids) - len(short) + (token in short)
    rows = {k: v for k, v in full.items() if v.shape == shape}
    block = {k: v[0, at : at + n] for k, v in rows.items()}
    tensors = {k: v for k, v in full.items() if k not in rows}
    again = _insert(short, block, token)
    return _ProcessedPicture(tensors, block) if all(torch.equal(again[k], rows[k]) for k in rows) else None


def _insert(short: list[int], block: dict[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
    """The prompt's tokens with the picture's block in the image token's place, or before them where there is none; rows (1, T)."""
    at = short.index(token) if token in short else 0
    text = {"input_ids": torch.tensor(short)}
    out = {}
    for name, part in block.items():
        own = text.get(name, torch.zeros(len(short), dtype=part.dtype))
        out[name] = torch.cat([own[:at], part, own[at + (token in short) :]])[None]
    return out


def answer_ids(handle: ModelHandle, ask: Ask, answer: str) -> list[int]:
    """Token ids of the answer as it follows this prompt. Raises `UntokenizableAnswer`."""
    cache = handle.cache.setdefault("answers", {})
    end = _in_template(handle, handle.family.text, ask)[-24:]
    key = (end, answer)
    if key not in cache:
        tok = handle.tokenizer
        before = tok(end, add_special_tokens=False)["input_ids"]
        full = tok(end + handle.family.answer.format(answer=answer), add_special_tokens=False)["input_ids"]
        own = tok(handle.family.answer.format(answer=answer), add_special_tokens=False)["input_ids"]
        ids = full[len(before) :] if full[: len(before)] == before else own
        if not ids or set(ids) <= {tok.unk_token_id}:
            raise UntokenizableAnswer(
                f"{answer!r} tokenises to nothing that this model knows; pretrain a model on the stream: python -m testbed.pretrain"
            )
        cache[key] = ids
    return cache[key]


def collate(
    handle: ModelHandle,
    asks: Sequence[Ask],
    answers: Sequence[Sequence[int]] | None = None,
    side: Side = "right",
    end: bool = False,
    at: Sequence[int] | None = None,
) -> Batch:
    """Pad prompts (followed by answers, and by the end token with `end`) into one batch on the handle's device.

    at: a position of each row; padding goes to both sides so that these stand in one column, the largest of them.
    Raises `PromptTooLong`.
    """
    rows = [prompt_inputs(handle, a) for a in asks]
    targets = [list(x) for x in answers] if answers is not None else [[] for _ in rows]
    if end:
        targets = [[*t, handle.tokenizer.eos_token_id] for t in targets]
    lengths = [r["input_ids"].shape[1] + len(t) for r, t in zip(rows, targets)]
    for ask, n in zip(asks, lengths):
        if n > handle.window:
            raise PromptTooLong(f"a prompt takes {n} tokens with its answer, {handle.name} reads {handle.window}: {ask.prompt[:60]!r}")
    starts = [max(lengths) - n if side == "left" else 0 for n in lengths] if at is None else [max(at) - n for n in at]
    return _pad(handle, rows, targets, starts, tuple(asks))


def text_batch(handle: ModelHandle, ids: Sequence[Sequence[int]]) -> Batch:
    """Running text as a right-padded batch: all of it counts as prompt, but no position sees a later one."""
    batch = _pad(handle, [{"input_ids": torch.tensor([list(x)])} for x in ids], [[] for _ in ids], [0 for _ in ids], ())
    if handle.family.prefix:
        batch.inputs["token_type_ids"] = torch.ones_like(batch.inputs["input_ids"])
    return batch


def _pad(
    handle: ModelHandle, rows: list[dict[str, torch.Tensor]], targets: list[list[int]], starts: list[int], asks: tuple[Ask, ...]
) -> Batch:
    """starts: column at which each row begins."""
    lengths = [r["input_ids"].shape[1] for r in rows]
    total = max(start + n + len(t) for start, n, t in zip(starts, lengths, targets))
    ids = torch.full((len(rows), total), handle.tokenizer.pad_token_id, dtype=torch.long)
    prompt, answer = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, n, target, start) in enumerate(zip(rows, lengths, targets, starts)):
        ids[i, start : start + n] = row["input_ids"][0]
        ids[i, start + n : start + n + len(target)] = torch.tensor(target, dtype=torch.long)
        prompt[i, start : start + n] = True
        answer[i, start + n : start + n + len(target)] = True
    inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": (prompt | answer).long()}
    if any(starts) and handle.takes_position_ids:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if handle.family.needs_picture and all(len(r) == 1 for r in rows):
        blank = prompt_inputs(handle, Ask("", _BLANK))
        inputs.update({k: v for k, v in blank.items() if v.shape != blank["input_ids"].shape})
    inputs.update(_pictures(handle, rows, inputs))
    if handle.family.prefix:
        inputs["token_type_ids"] = answer.long()
    inputs = {k: v.to(handle.device, handle.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    picture = (inputs["input_ids"] == image_token(handle)) & prompt.to(handle.device)
    return Batch(inputs, prompt.to(handle.device), picture, answer.to(handle.device), asks)


def _pictures(handle: ModelHandle, rows: list[dict[str, torch.Tensor]], padded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Picture tensors of all rows, stacked along the first axis; per-token ones (token types) padded like the ids."""
    out: dict[str, torch.Tensor] = {}
    for name in sorted({k for r in rows for k in r} - {"input_ids"}):
        have = [r[name] for r in rows if name in r]
        own = name in handle.family.prompt_tensors
        if not own and all(name in r and r[name].shape == r["input_ids"].shape for r in rows if name in r) and have[0].ndim == 2:
            full = torch.zeros_like(padded["input_ids"])
            for i, r in enumerate(rows):
                if name in r:
                    start = int(padded["attention_mask"][i].argmax())
                    full[i, start : start + r[name].shape[1]] = r[name][0]
            out[name] = full
        else:
            out[name] = _stack(have)
    return out


def _stack(have: list[torch.Tensor]) -> torch.Tensor:
    """Along the first axis; where other axes differ (pictures cut into more or fewer tiles) the shorter are filled with zeros."""
    size = [max(n) for n in zip(*(t.shape[1:] for t in have))]
    if all(list(t.shape[1:]) == size for t in have):
        return torch.cat(have)
    out = have[0].new_zeros(sum(len(t) for t in have), *size)
    at = 0
    for t in have:
        out[(slice(at, at + len(t)), *(slice(n) for n in t.shape[1:]))] = t
        at += len(t)
    return out


def image_token(handle: ModelHandle) -> int:
    """Id of the token that stands for picture features; -1 for a text-only model."""
    config: Any = handle.model.config
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return -1
