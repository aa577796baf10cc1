"""Extension of a byte-level BPE tokenizer and of a model's embeddings by the words of new texts.

New merges rank below all old ones, so every old token stays a token, and words of the new texts that were several tokens
become one.
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

from testbed.pretraining.tiny_model import wrap_tokenizer


def extend_tokenizer(
    old: PreTrainedTokenizerFast, texts: Iterable[str], most: int
) -> tuple[PreTrainedTokenizerFast, dict[int, tuple[int, int]]]:
    """(tokenizer with at most `most` more tokens, for each new token id the two ids that it is made of).

    The most frequent pair of tokens is merged first; a repeated text counts each time, and pairs that occur once are merged too.
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
    return wrap_tokenizer(Tokenizer.from_str(json.dumps(state))), parents


def _pieces(core: Tokenizer, texts: Iterable[str]) -> dict[tuple[str, ...], int]:
    """The words of the texts that are more than one token, as old tokens, with their counts."""
    counts = Counter(word for text in texts for word, _ in core.pre_tokenizer.pre_tokenize_str(text))
    tokens = {tuple(token.value for token in core.model.tokenize(word)): n for word, n in counts.items()}
    return {pieces: n for pieces, n in tokens.items() if len(pieces) > 1}


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


def extend_model(model: Any, parents: Mapping[int, tuple[int, int]]) -> None:
    """Add embeddings for the new tokens, in place; each starts as the mean of the two tokens that it is made of."""
    if not parents:
        return
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(max(before, max(parents) + 1), mean_resizing=False)
    with torch.no_grad():
        for table in {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            for new in sorted(parents):
                table[new] = table[list(parents[new])].mean(0)
