"""The prompt prefix kept as keys and values: the same losses and gradients as the whole model's, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from testbed.bench.reference import whole_model
from testbed.core.events import Ask
from testbed.editors.locate import targets
from testbed.editors.locate.keys import answer_rows
from testbed.editors.locate.targets import TargetLoss, TargetTask, search
from testbed.model.encoding import answer_ids, collate
from testbed.model.suffix import suffix_from_layer
from tests.helpers.facts import FACTS, SMALL, task
from tests.helpers.models import IMAGE, KINDS, TEXT, Noise, build
from tests.helpers.positions_run import places

MIXED = [
    replace(FACTS[0], id=""),
    replace(FACTS[1], prompt="Zor is led now, after long years, by", id=""),
    replace(FACTS[2], prompt="now who rules", subject=None, id=""),
]
"""Subjects in the middle and at the very start of a prompt, and none."""


def mixed(kind: str) -> TargetTask:
    facts = [replace(e, image=None if kind in TEXT or i == 1 else Noise(i), id="") for i, e in enumerate(MIXED)]
    return task(kind, facts, layer=0)


def losses(t: TargetTask, delta: Tensor) -> tuple[Tensor, Tensor, TargetLoss]:
    forward, own = TargetLoss(t), delta.clone().requires_grad_(True)
    forward.losses(torch.zeros_like(own), 0.3)
    loss = forward.losses(own, 0.3)
    return loss.detach(), torch.autograd.grad(loss.sum(), own)[0], forward


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_whole_model(kind: str) -> None:
    t = mixed(kind)
    delta = torch.randn(3, t.handle.width, generator=torch.Generator().manual_seed(1))
    loss, grad, forward = losses(t, delta)
    assert t.handle.cache["takes a prefix cache"] is True
    assert all(part.start == int(rows.at[0]) > 0 for rows, _, part in forward.parts)
    with whole_model(t.handle):
        slow, slow_grad, whole = losses(t, delta)
    assert all(part.start == 0 for _, _, part in whole.parts)
    torch.testing.assert_close(loss, slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, slow_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_prompts_beside_answers_or_apart_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = mixed(kind)
    delta = torch.randn(3, t.handle.width, generator=torch.Generator().manual_seed(1))
    found = []
    for cheap in (True, False):
        monkeypatch.setattr(targets, "_share_forward", lambda rows, kl_rows, cheap=cheap: cheap)
        loss, grad, forward = losses(t, delta)
        assert len(forward.parts) == 2 - cheap
        found.append((loss, grad))
    assert forward.parts[1][2].hidden.shape[1] == 1
    with places(t.handle, layer=-1) as seen:
        forward.losses(delta, 0.0)
    assert len(seen) == 1  # without the divergence no KL prompt is run
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", IMAGE)
def test_contexts_share_the_picture_of_their_edit(kind: str) -> None:
    facts = [replace(e, image=Noise(i, 32, 64 if i else 32), id="") for i, e in enumerate(MIXED)]
    t = task(kind, facts, layer=0, contexts=("", "So it goes", "The old bridge, they say"))
    t.handle.cache.pop("takes a prefix cache behind image prefixes", None)
    delta = torch.randn(3, t.handle.width, generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # the first looks at the decoder
        loss, grad, forward = losses(t, delta)
    assert t.handle.cache["takes a prefix cache behind image prefixes"] is True
    rows, _, part = forward.parts[0]
    assert part.start == int(rows.at[0])
    with whole_model(t.handle):
        slow, slow_grad, _ = losses(t, delta)
    torch.testing.assert_close(loss, slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, slow_grad, rtol=1e-3, atol=1e-4)
    with places(t.handle) as seen:
        suffix_from_layer(t.handle, rows.batch, 1, positions=(part.start, rows.batch.prompt.shape[1]))
    ends = [int(row.nonzero().max()) + 1 - int((~prompt).int().argmin()) for row, prompt in zip(rows.batch.picture, rows.batch.prompt)]
    assert seen[0] == 3 * max(ends)
    assert sum(seen[1:]) <= 9 * (rows.batch.prompt.shape[1] - min(ends))


def test_a_lone_edit_and_many_contexts_share_a_forward_with_the_kl_prompt() -> None:
    assert len(TargetLoss(task(events=MIXED[:1], contexts=("",))).parts) == 1
    assert len(TargetLoss(task(events=MIXED[:2], contexts=("", *(f"So it goes on {i}" for i in range(16))))).parts) == 1
    assert len(TargetLoss(task(events=[MIXED[0]] * 8, contexts=("",))).parts) == 2
    assert len(TargetLoss(task(events=MIXED[2:])).parts) == 1
    assert len(TargetLoss(task("llava", [replace(MIXED[0], image=Noise(0), id="")], contexts=("",))).parts) == 2


def test_lookup_positions_stand_in_one_column() -> None:
    handle = build("gpt2")
    rows = answer_rows(handle, MIXED, ["", "So it goes"], True)
    assert len(set(rows.at.tolist())) == 1
    single = [answer_rows(handle, [e], [c], True) for e in MIXED for c in ("", "So it goes")]
    for i, one in enumerate(single):
        row, own = rows.batch.inputs["attention_mask"][i].bool(), one.batch.inputs["attention_mask"][0].bool()
        assert torch.equal(rows.batch.inputs["input_ids"][i][row], one.batch.inputs["input_ids"][0][own])
        assert int(row[: int(rows.at[0])].sum()) == int(one.at[0])
        assert torch.equal(rows.batch.inputs["position_ids"][i][row], torch.arange(int(row.sum())))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "llava"])
def test_alignment_does_not_change_an_answer(kind: str) -> None:
    handle = build(kind)
    asks = [Ask("who leads the bridge now?"), Ask("what?")]
    ids = [answer_ids(handle, a, "green") for a in asks]
    logits = []
    for at in (None, [3, 1]):
        batch = collate(handle, asks, ids, at=at)
        logits.append(handle.model(**batch.inputs, use_cache=False).logits[batch.before_answer])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_a_search_leaves_the_prefix_as_it_was_and_finds_what_the_reference_finds() -> None:
    t, h = task("llama"), SMALL
    fast = search(t, h, torch.ones(3))
    again = search(t, h, torch.ones(3))
    assert torch.equal(fast.delta, again.delta)
    with whole_model(t.handle):
        slow = search(t, h, torch.ones(3))
    torch.testing.assert_close(fast.delta, slow.delta, rtol=1e-3, atol=1e-3)


def test_a_decoder_that_takes_no_cache_runs_all_positions() -> None:
    t = task("llama")
    rows = answer_rows(t.handle, FACTS, [""], True)
    kept = t.handle.cache.pop("takes a prefix cache", None)
    t.handle.cache["takes a prefix cache"] = False
    try:
        assert suffix_from_layer(t.handle, rows.batch, 1, positions=(int(rows.at[0]), rows.batch.prompt.shape[1])).start == 0
    finally:
        t.handle.cache["takes a prefix cache"] = kept
