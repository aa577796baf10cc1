"""BalancEdit and its variant on tiny random models: the promises of a codebook that need a forward. Numbers name the promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.editors.base import BadEditor
from testbed.editors.codebook.balancedit import BalancEdit, BalancEditConfig, BalancEditPlus
from testbed.editors.codebook.keys import uniform
from testbed.storage.files import read_state, write_state
from tests.helpers import balancedit_checks as c
from tests.helpers.balancedit_checks import ASKS, EDITS, FAR, batch, edit, edited, logits, make, tokens
from tests.helpers.models import Noise, build

BOTH = pytest.mark.parametrize("cls", [BalancEdit, BalancEditPlus])


@BOTH
def test_01_deferral_is_identity(cls: Any) -> None:
    c.check_01_deferral_is_identity(cls)


def test_04_disabled_is_the_base_and_enabled_again_the_same() -> None:
    c.check_04_disabled_is_the_base(BalancEdit)


@BOTH
def test_05_the_base_is_never_written(cls: Any) -> None:
    c.check_05_the_base_is_never_written(cls)


@BOTH
def test_06_earlier_edits_stay(cls: Any) -> None:
    c.check_06_earlier_edits_stay(cls)


@BOTH
def test_24_batched_is_one_by_one(cls: Any) -> None:
    c.check_24_batched_is_one_by_one(cls)


@BOTH
def test_25_padding_changes_no_key(cls: Any) -> None:
    c.check_25_padding_changes_no_key(cls)


def test_29_nothing_global_is_touched(capfd: pytest.CaptureFixture[str]) -> None:
    c.check_29_nothing_global_is_touched(BalancEdit, lambda: capfd.readouterr().out)


@pytest.mark.parametrize("beams", [1, 3])
@BOTH
def test_30_decided_at_prefill_with_and_without_cache_and_beams(cls: Any, beams: int) -> None:
    c.check_30_decided_at_prefill(cls, beams)


def test_30_opt_flattens_rows_and_positions() -> None:
    editor = make(kind="opt", layer=0)
    events = [EditEvent("add", 1.0, i, p, t) for i, (p, t) in enumerate(zip(c.PROMPTS, c.TARGETS))]
    editor.apply(EditBatch(tuple(events)))
    asks = [Ask(e.prompt) for e in events]
    assert logits(editor, asks)[1] == [e.id for e in events]
    assert tokens(editor, asks) == tokens(editor, asks, cache=False)
    assert tokens(editor, asks, 2) == [tokens(editor, [a], 2)[0] for a in asks]


@BOTH
def test_31_the_scope_is_free_of_the_answer(cls: Any) -> None:
    c.check_31_the_scope_is_free_of_the_answer(cls)


@BOTH
def test_33_values_are_isolated(cls: Any) -> None:
    c.check_33_values_are_isolated(cls)


@pytest.mark.parametrize(
    ("other", "kind", "reason"),
    [({"layer": 0}, "llava", "layer"), ({"metric": "cosine"}, "llava", "metric"), ({"rank": 2}, "llava", "shape"), ({}, "blip-2", "model")],
)
def test_34_a_state_of_another_model_layer_or_config_is_refused(other: dict, kind: str, reason: str) -> None:
    with pytest.raises(BadEditor, match=reason):
        make(kind=kind, **other).load_state_dict(edited(n=1).state_dict())


def test_34_save_and_load(tmp_path: Any) -> None:
    a, b = edited(BalancEditPlus), make(BalancEditPlus)
    write_state(tmp_path / "step-000001.safetensors", a.state_dict())
    b.load_state_dict(read_state(tmp_path / "step-000001.safetensors"))
    x, y = logits(a, [*ASKS, FAR]), logits(b, [*ASKS, FAR])
    assert torch.equal(x[0], y[0]) and x[1] == y[1]


def test_35_time_travel() -> None:
    editor = make()
    live = [logits(editor, ASKS)]
    for i, e in enumerate(EDITS, 1):
        editor.apply(batch([e], i))
        live.append(logits(editor, ASKS))
    editor.revert([EDITS[1].id])
    live.append(logits(editor, ASKS))
    for t, (want, entries) in enumerate(live):
        got = logits(editor, ASKS, editor.gate(editor.book.as_of(t)))
        assert torch.equal(got[0], want)
        assert [e or None for e in got[1]] == [e or None for e in entries]
    assert editor.as_of(0).generate(ASKS, 4) == make().predictor().generate(ASKS, 4)


def test_38_revise_and_revert() -> None:
    editor = edited(n=1)
    first = logits(editor, ASKS[:1])
    second = edit(0, "two red towers")
    editor.apply(batch([second], 2))
    assert logits(editor, ASKS[:1])[1] == [second.id]
    editor.revert([second.id])
    assert torch.equal(logits(editor, ASKS[:1])[0], first[0])
    editor.revert([EDITS[0].id])
    assert torch.equal(logits(editor, ASKS[:1])[0], logits(make(), ASKS[:1])[0])
    assert len(editor.book.log) == 4


@pytest.mark.parametrize(("revision", "stands"), [("zone", [1]), ("key", [0, 1])])
def test_38_how_near_another_answer_replaces_an_edit(revision: str, stands: list[int]) -> None:
    """The first edit's paraphrase lies beyond the second edit's question; the third has the first one's own key."""
    editor = make(revision=revision)
    pair = [edit(0), edit(0, "two red towers", Noise(1), c.PROMPTS[0] + " now")]
    editor.apply(EditBatch(tuple(pair), 1, {pair[0].id: ("the yellow stars and the river and the bridge",), pair[1].id: ()}))
    assert editor.book.active.nonzero()[:, 0].tolist() == stands
    again = edit(0, "three ships")
    editor.apply(EditBatch((again,), 2, {again.id: ()}))
    assert logits(editor, ASKS[:1])[1] == [again.id]
    assert not editor.book.active[0]


def test_39_nulls_come_from_the_pool_and_an_edit_beats_them() -> None:
    editor = make(BalancEditPlus, w_pos=0.0, others=0, siblings=0)
    pool = [q.ask() for q in c.POOL.questions]
    assert len(editor.book.nulls) == 2
    editor.apply(batch(EDITS))
    assert logits(editor, [*ASKS, *pool])[1][4:] == [None, None]
    assert None not in logits(editor, ASKS)[1]


def test_40_the_ledger_adds_up() -> None:
    editor = edited(n=2)
    gate = editor.gate(editor.book)
    for asks in (ASKS, [FAR], ASKS[:2]):
        logits(editor, asks, gate)
    assert gate.hit_counts.queries == 7
    assert gate.hit_counts.hits == {EDITS[0].id: 2, EDITS[1].id: 2}
    assert gate.hit_counts.misses == 3


def test_activations_that_are_not_finite_fail_the_edit_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = edited(n=1)
    read = editor._read
    monkeypatch.setattr(editor, "_read", lambda asks: read(asks) * torch.nan)
    report = editor.apply(batch([EDITS[1]], 2))
    assert "not finite" in report.failed[EDITS[1].id]
    assert len(editor.book) == 1


def test_zero_keys_under_cosine_fail_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(metric="cosine")
    read = editor._read
    monkeypatch.setattr(editor, "_read", lambda asks: read(asks) * 0)
    assert "no direction" in editor.apply(batch([EDITS[0]])).failed[EDITS[0].id]


def test_one_key_with_two_answers_in_one_batch_leaves_the_later() -> None:
    editor, twice = make(), [EDITS[0], edit(0, "two red towers")]
    assert editor.apply(batch(twice)).notes["superseded"] == 1
    assert logits(editor, ASKS[:1])[1] == [twice[1].id]


def test_an_edit_of_the_negative_anchor_itself_is_flagged_and_still_answers() -> None:
    editor = make()
    black = edit(0, image=uniform((32, 32, 3), 0))
    assert editor.apply(batch([black])).notes["not_separable"] == 1
    assert logits(editor, [black.ask()])[1] == [black.id]


def test_an_answer_that_the_base_gives_already_is_an_edit_like_any_other() -> None:
    editor = make()
    said = editor.predictor().generate(ASKS[:1], 1)[0] or "yes"
    same = edit(0, said)
    assert not editor.apply(batch([same])).failed
    assert logits(editor, ASKS[:1])[1] == [same.id]


def test_an_edit_near_one_of_the_same_answer_goes_on_from_its_value() -> None:
    near = edit(0, "green", prompt="what colour is the ship in that harbour?")
    runs = {}
    for overlap in ("continue", "fresh"):
        editor = make(overlap=overlap, w_pos=0.0, steps=1)
        editor.apply(batch([EDITS[0]]))
        report = editor.apply(batch([near], 2))
        assert report.notes["continued"] == (overlap == "continue")
        assert editor.book.members(EDITS[0].id) == [near.id]
        runs[overlap] = editor.tensors[near.id]
        assert logits(editor, [near.ask()])[1] == [EDITS[0].id]
    assert not torch.equal(runs["continue"], runs["fresh"])


@pytest.mark.parametrize("negative", ["black", "white", "random"])
def test_negative_anchors(negative: Any) -> None:
    editor = make(negative=negative, others=1, siblings=1)
    asks = editor._negative(EDITS[0])
    assert len(asks) == 3
    assert asks[0].prompt == asks[1].prompt == EDITS[0].prompt != asks[2].prompt
    assert asks[2].image is EDITS[0].image
    mean = asks[0].image.load().mean() if asks[0].image else None
    assert mean == {"black": 0, "white": 255, "random": Noise(90).load().mean()}[negative]


def test_the_weight_of_the_positive_anchor_orders_radii() -> None:
    radii = [float(edited(n=1, w_pos=w).book.raw[0]) for w in (0.0, 0.2, 1.0)]
    assert radii[0] > radii[1] > radii[2]


def test_low_rank_values_are_small_and_learn() -> None:
    full, thin = edited(n=1, steps=40), edited(n=1, rank=2, steps=40)
    assert next(iter(thin.tensors.values())).numel() == 2 * (96 + 64)
    for editor in (full, thin):
        assert editor.predictor().generate(ASKS[:1], 4) == ["green"]


@pytest.mark.parametrize("cls", [BalancEdit, BalancEditPlus])
def test_a_batch_holds_the_values_that_single_edits_would(cls: Any) -> None:
    together, alone = make(cls, overlap="fresh"), edited(cls, overlap="fresh")
    together.apply(batch(EDITS))
    for i, value in alone.tensors.items():
        torch.testing.assert_close(together.tensors[i], value, atol=1e-3, rtol=1e-3)
    assert together.state_bytes() == sum(t.nbytes for t in together.state_dict().values() if isinstance(t, torch.Tensor))


def test_mistakes_in_the_config_are_all_named() -> None:
    problems = BalancEditConfig(w_pos=1.5, lr=0, positives=0, nulls=-1).problems()
    assert [p.split()[0] for p in problems] == ["w_pos", "lr", "positives", "nulls"]
    assert BalancEditPlus.Config().problems() == []


def test_text_models_take_another_question_as_negative_anchor() -> None:
    editor = make(kind="gpt2")
    assert editor.apply(batch([EditEvent("add", 1.0, 0, "who leads?", "Mara Venn")])).notes["radius"] > 0
    assert np.isfinite(float(editor.book.raw[0])) and build("gpt2") is editor.handle


def test_by_the_papers_rules_balls_keep_their_radii_and_a_near_edit_of_another_answer_stays() -> None:
    near = edit(0, "red", prompt=EDITS[0].prompt + "?")
    published, ours = make(w_pos=0.0), make(w_pos=0.0, revision="zone", caps=True)
    for editor in (published, ours):
        editor.apply(batch([EDITS[0]]))
        editor.apply(batch([near], 2))
    assert torch.equal(published.book.radii, published.book.raw)
    assert published.book.active.tolist() == [True, True]
    assert logits(published, [EDITS[0].ask(), near.ask()])[1] == [EDITS[0].id, near.id]
    apart = make(w_pos=0.0, caps=True)
    for step, e in enumerate((EDITS[0], near), 1):
        apart.apply(batch([e], step))
    assert float(apart.book.radii.sum()) < float(apart.book.raw.sum())
    assert (
        "replaces one of another answer with its own key alone (the paper names no test); balls of other answers are left"
        in published.notes[-1]
    )
    assert "within a paraphrase's distance (ours); balls of other answers are capped where they meet (ours)" in ours.notes[-1]


def test_a_stored_run_goes_on_by_the_rules_it_began_with_and_says_so() -> None:
    old = edited(revision="zone", caps=True)
    state = old.state_dict()
    for stored in (state, {k: v for k, v in state.items() if k != "rules"}):  # states of before do not name their rules
        resumed = make()
        resumed.load_state_dict(stored)
        assert (resumed.config.revision, resumed.config.caps, resumed.book.capped) == ("zone", True, True)
        assert "goes on by the rules it began with" in resumed.notes[-1]
        for editor in (old, resumed):
            editor.load_state_dict(state)
            editor.apply(batch([edit(5, "blue", prompt=EDITS[1].prompt)], 5))
        assert torch.equal(resumed.book.radii, old.book.radii)
    same = make(revision="zone", caps=True)
    same.load_state_dict(state)
    assert not any("goes on" in note for note in same.notes)
