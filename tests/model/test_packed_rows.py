"""Packed rows give what padded ones give: the same layout for any rows, the same answers on every family, with less work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.events import Ask
from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from testbed.model.packed_rows import pack, takes_packed_rows
from testbed.model.predictor import ModelPredictor, Response, Score
from tests.helpers.models import TEXT, build, save

FACTS = "Facts: the ship is green. the lamp is red. Question: "
ASKS = [Ask(f"{FACTS}{q}") for q in ("who?", "what colour is the ship?", "is the lamp red, or blue, or green?")]
ASKS += [Ask("what stands beside the river?"), Ask(f"{FACTS}who?"), Ask("two or three towers?")]
ANSWERS = ["green", None, "Mara Venn", "two red towers", "the old bridge", "red"]
FLAG = "takes packed rows"
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


@contextmanager
def padded(handle: ModelHandle) -> Iterator[None]:
    """Inside, the handle's rows are padded."""
    known = handle.cache.get(FLAG)
    handle.cache[FLAG] = False
    try:
        yield
    finally:
        handle.cache[FLAG] = known


def assert_same(a: list[Response], b: list[Response]) -> None:
    assert [(r.generated, r.first_ids) for r in a] == [(r.generated, r.first_ids) for r in b]
    for one, other in zip(a, b):
        assert_same_score(one.score, other.score)


def assert_same_score(a: Score | None, b: Score | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        np.testing.assert_array_equal(a.hits, b.hits)


@settings(deadline=None)
@given(ROWS, st.integers(1, 30))
def test_every_token_of_a_packed_row_sees_the_tokens_before_it_in_its_own_row_alone(rows: list[list[int]], length: int) -> None:
    packing = pack(rows, length)
    for row, s, at in zip(rows, packing.sequence, packing.columns, strict=True):
        assert packing.ids[s, at].tolist() == row
        assert packing.positions[s, at].tolist() == list(range(len(row)))
        for t, column in enumerate(at):
            assert np.flatnonzero(packing.sees[s, column]).tolist() == sorted(at[: t + 1].tolist())


@given(ROWS)
def test_what_rows_begin_with_alike_is_laid_down_once(rows: list[list[int]]) -> None:
    beginnings = {tuple(r[: n + 1]) for r in rows for n in range(len(r))}
    assert pack(rows, 10_000).ids.shape == (1, len(beginnings))


@pytest.mark.parametrize("kind", [*TEXT, "llava", "smolvlm"])
def test_packed_answers_and_scores_are_the_padded_ones(kind: str) -> None:
    handle = build(kind)
    predictor = ModelPredictor(handle, rows=4)
    packed, scores = predictor.respond(ASKS, ANSWERS, 8), predictor.score(ASKS, ["green"] * len(ASKS))
    assert handle.cache[FLAG]
    with padded(handle):
        assert_same(packed, predictor.respond(ASKS, ANSWERS, 8))
        for a, b in zip(scores, predictor.score(ASKS, ["green"] * len(ASKS))):
            assert_same_score(a, b)


def test_an_answer_that_the_generation_follows_changes_nothing() -> None:
    """The forward that scores it tells the generation's first tokens, for an answer of any length, beyond the limit too."""
    handle = build("llama")
    predictor = ModelPredictor(handle)
    said = [t or "red" for t in predictor.generate(ASKS, 6)]
    for answers in (said, [s[: len(s) // 2] or "red" for s in said], [f"{s} and more" for s in said]):
        for n in (1, 3, 6):
            packed = predictor.respond(ASKS, answers, n)
            with padded(handle):
                assert_same(packed, predictor.respond(ASKS, answers, n))
            assert [r.generated for r in packed] == predictor.generate(ASKS, n)


def test_changed_weights_answer_alike_packed_and_padded() -> None:
    handle = build("llama")
    name = handle.down_weight(1)
    predictor = ModelPredictor(handle, weights={name: -2 * handle.parameter(name).detach()})
    packed = predictor.respond(ASKS, ANSWERS, 6)
    assert [r.generated for r in packed] != ModelPredictor(handle).generate(ASKS, 6)
    with padded(handle):
        assert_same(packed, predictor.respond(ASKS, ANSWERS, 6))


def tokens_run(handle: ModelHandle, work: Any) -> int:
    """Token positions that the first layer runs, padding counted."""
    seen: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden.shape[0] * hidden.shape[1])

    hook = handle.layers[0].register_forward_pre_hook(count, with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return sum(seen)


def test_a_shared_beginning_is_run_once_and_rows_that_ended_are_not_run() -> None:
    handle = build("llama")
    predictor = ModelPredictor(handle)
    asks = [Ask(f"{FACTS}{q}?") for q in ("who", "what", "where", "when")]
    predictor.generate(asks, 1)
    few = tokens_run(handle, lambda: predictor.generate(asks, 1))
    with padded(handle):
        many = tokens_run(handle, lambda: predictor.generate(asks, 1))
    assert few < many / 2
    ended = tokens_run(handle, lambda: predictor.generate(asks, 9, [lambda text: True] * 4))
    assert ended == few < tokens_run(handle, lambda: predictor.generate(asks, 9))


def test_replies_end_where_they_are_decided_packed_and_padded() -> None:
    handle = build("llama")
    predictor = ModelPredictor(handle)
    whole = predictor.generate(ASKS, 8)
    decided = [(lambda text, n=n: len(text.strip()) >= n) for n in range(len(ASKS))]
    packed = predictor.generate(ASKS, 8, decided)
    assert all(w.startswith(p.rstrip("\ufffd")) for w, p in zip(whole, packed)) and packed != whole
    with padded(handle):
        assert predictor.generate(ASKS, 8, decided) == packed


@pytest.mark.parametrize(
    ("kind", "changes", "packed"),
    [("gemma2", {"final_logit_softcapping": 1.0}, True), ("cohere", {}, True), ("mistral", {"sliding_window": 8}, False)],
)
def test_a_model_that_cannot_be_packed_is_padded(kind: str, changes: dict[str, Any], packed: bool, tmp_path: Path) -> None:
    """Layers that do not see all of a row cannot; logits that change behind the head can."""
    save(kind, tmp_path, **changes)
    handle = load(str(tmp_path), device="cpu")
    assert takes_packed_rows(handle, [list(range(5, 20))], 4) == packed
    together = ModelPredictor(handle).respond(ASKS, ANSWERS, 4)
    assert_same(together, [ModelPredictor(handle).respond([a], [x], 4)[0] for a, x in zip(ASKS, ANSWERS)])
