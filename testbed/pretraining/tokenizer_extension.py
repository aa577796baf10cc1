"""New words for a tokenizer that exists: byte-level BPE goes on merging where it had stopped.

New merges rank below all old ones, so what was one token stays that token; words of the new texts that fell
into pieces become one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def extend_tokenizer(
    old: PreTrainedTokenizerFast, texts: Iterable[str], most: int
) -> tuple[PreTrainedTokenizerFast, dict[int, tuple[int, int]]]:
    """A tokenizer with at most `most` more tokens, and for each new id the two ids that it is made of.

    Texts are weighed by how often they come. Pieces are merged most frequent pair first, pairs that come once too.
    """
    core = old.backend_tokenizer
    words = _pieces(core, texts)
    merges: list[tuple[str, str]] = []
    while len(merges) < most and (pair := _best_pair(words)) is not None:
        merges.append(pair)
        words = {_merge(pieces, pair): n for pieces, n in words.items()}
    state = json.loads(core.to_str())
    vocabulary, parents = state["model"]["vocab"], {}
    start = len(old)
    for left, right in merges:
        state["model"]["merges"].append([left, right])
        if left + right not in vocabulary:
            new = start + len(parents)
            parents[new] = (vocabulary[left], vocabulary[right])
            vocabulary[left + right] = new
    return _like(old, Tokenizer.from_str(json.dumps(state))), parents


def _pieces(core: Tokenizer, texts: Iterable[str]) -> dict[tuple[str, ...], int]:
    """Words of the texts as old tokens, with their counts; words that are one token already are left out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in core.pre_tokenizer.pre_tokenize_str(text))
    out = {}
    for word, n in counts.items():
        pieces = tuple(token.value for token in core.model.tokenize(word))
        if len(pieces) > 1:
            out[pieces] = n
    return out


def _best_pair(words: Mapping[tuple[str, ...], int]) -> tuple[str, str] | None:
    pairs: Counter[tuple[str, str]] = Counter()
    for pieces, n in words.items():
        for pair in pairwise(pieces):
            pairs[pair] += n
    return max(pairs, key=lambda p: (pairs[p], p)) if pairs else None


def _merge(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def _like(old: PreTrainedTokenizerFast, core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        pad_token=old.pad_token,
        padding_side="left",
        model_max_length=old.model_max_length,
        extra_special_tokens={"image_token": old.image_token},
        clean_up_tokenization_spaces=False,
    )


def extend_model(model: Any, parents: Mapping[int, tuple[int, int]]) -> None:
    """Room for the new tokens, in place: each begins as the mean of the two tokens that it is made of."""
    if not parents:
        return
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(max(before, max(parents) + 1), mean_resizing=False)
    with torch.no_grad():
        for table in {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            for new in sorted(parents):
                table[new] = table[list(parents[new])].mean(0)
