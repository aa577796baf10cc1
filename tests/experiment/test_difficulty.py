"""The loss of the unedited model on targets, and the orders of edits by it."""

from __future__ import annotations

import pytest
import torch

from testbed.core.events import Ask, EditEvent
from testbed.experiment import runner
from testbed.experiment.config import RunConfig
from testbed.model.difficulty import losses
from testbed.model.encoding import answer_ids, prompt_inputs
from tests.helpers.models import build, folder


def test_a_loss_is_the_mean_over_the_targets_tokens() -> None:
    handle = build("llama")
    events = [EditEvent("add", 1.0, i, f"who leads {x}?", t) for i, (x, t) in enumerate([("one", "Mara Venn"), ("the bridge", "green")])]
    found = losses(handle, events)
    for e in events:
        ids = answer_ids(handle, Ask(e.prompt), e.target)
        prompt = prompt_inputs(handle, Ask(e.prompt))["input_ids"]
        with torch.no_grad():
            logits = handle.model(torch.cat([prompt, torch.tensor([ids])], 1)).logits[0].double().log_softmax(-1)
        gold = [-logits[prompt.shape[1] - 1 + i, token].item() for i, token in enumerate(ids)]
        assert found[e.id] == pytest.approx(sum(gold) / len(gold), abs=1e-3)
    assert handle.cache["losses"] == found


def test_hardest_and_easiest_first_are_the_same_edits_the_other_way_round() -> None:
    def adds(order: str) -> list[EditEvent]:
        config = RunConfig("world-yearly", ("noop",), str(folder("llama")), edits=30, set=(f"stream.order={order}",), probe_budget=1)
        plan = runner.prepare(config.resolve())
        assert (order == "drawn") != any("in another order" in note for note in plan.manifest["notes"])
        assert [a.event for s in plan.schedule.steps for a in s.edits] == plan.events
        of = losses(plan.handle, plan.events)
        found = [e for e in plan.events if e.kind == "add"]
        assert order == "drawn" or [of[e.id] for e in found] == sorted((of[e.id] for e in found), reverse=order == "hardest")
        return found

    hardest, easiest, drawn = adds("hardest"), adds("easiest"), adds("drawn")
    assert {e.id for e in hardest} == {e.id for e in easiest} == {e.id for e in drawn}
    assert hardest[0].id == easiest[-1].id != drawn[0].id
