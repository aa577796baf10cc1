"""T-Patcher: the start of a patch, its losses, what an edit leaves as it was, and where patches act."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.editors.adapters.tpatcher import Patches, PatchTask, TPatcher, TPatcherConfig, activation_loss, fresh_keys, memory_loss
from testbed.editors.base import BadEditor
from testbed.model.encoding import collate
from testbed.model.predictor import ModelPredictor
from tests.helpers.facts import FACTS, POOL, TEXTS
from tests.helpers.models import build

KINDS = ["llama", "gpt2", "opt"]
"""A gated MLP, one of two matrices, and one whose matrices lie beside the attention."""
HELD_OUT = TrainPool(texts=tuple(f"the small lamp number {i} stands beside the river and the old bridge" for i in range(40, 60)))
"""Text of the kind that the pool holds, none of which it holds."""
OTHERS = [Ask(text.removesuffix(" and the old bridge")) for text in HELD_OUT.texts[:2]]


def editor(kind: str = "llama", pool: TrainPool = POOL, **config: Any) -> TPatcher:
    made = TPatcher(TPatcherConfig(**{"steps": 60, **config}))
    made.prepare(build(kind), pool)
    return made


def apply(made: TPatcher, events: list[EditEvent], step: int = 1) -> dict[str, float]:
    report = made.apply(EditBatch(tuple(events), step))
    assert not report.failed, report.failed
    return report.notes


@cache
def learned() -> tuple[TPatcher, dict[str, float]]:
    """An editor with one edit that was trained for long; leave it as it is."""
    made = editor(steps=150)
    return made, apply(made, FACTS[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_patch_is_exactly_one_at_its_own_query(kind: str) -> None:
    made = editor(kind)
    queries = PatchTask(made, FACTS[0]).queries
    new = Patches(fresh_keys(queries), torch.zeros(len(queries)), torch.zeros_like(queries), torch.relu)
    torch.testing.assert_close(new(queries), torch.zeros_like(queries))
    torch.testing.assert_close(new.before_activation(queries).diagonal(), torch.ones(len(queries)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_queries_are_the_inputs_of_the_mlp_where_the_answer_is_predicted(kind: str) -> None:
    """Against a hook on the MLP's first map in a forward of the whole model; the loss without patches is the model's own."""
    made, task = editor(kind), PatchTask(editor(kind), FACTS[0])
    handle, batch = made.handle, task.suffix.batch
    seen: list[Tensor] = []
    with handle.hooked(made.entry.module, lambda m, args: seen.append(args[0]), pre=True):
        logits = handle.model(**batch.inputs, use_cache=False).logits
    read = batch.before_answer
    torch.testing.assert_close(task.queries, seen[0].reshape(*read.shape, -1)[read])
    nll = torch.nn.functional.cross_entropy(logits[read], batch.answer_ids)
    torch.testing.assert_close(task.losses(None)[0], nll, rtol=1e-4, atol=1e-5)
    assert task.wrong().tolist() == (logits[read].argmax(-1) != batch.answer_ids).nonzero()[:, 0].tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 7), st.integers(1, 1200))
def test_the_losses_are_the_plain_ones(seed: int, patches: int, memories: int) -> None:
    """Equations 3 and 4, with sorted Python numbers."""
    generator = torch.Generator().manual_seed(seed)
    own, others = torch.randn(patches, generator=generator), torch.randn(memories, patches, generator=generator)

    def largest(values: list[float], n: int) -> float:
        top = sorted(map(math.exp, values), reverse=True)[:n]
        return sum(top) / len(top)

    assert float(activation_loss(own)) == pytest.approx(largest([-x for x in own.tolist()], 5), rel=1e-4)
    apart = [m - q + 3 for row in others.tolist() for m, q in zip(row, own.tolist())]
    under = [m + 3 for row in others.tolist() for m in row]
    assert float(memory_loss(others, own, 3.0)) == pytest.approx(largest(apart, 1000) + largest(under, 1000), rel=1e-4)
    assert float(memory_loss(others[:0], own, 3.0)) == 0.0


def test_after_training_no_input_of_unrelated_text_fires_a_patch_and_the_own_query_does() -> None:
    made, notes = learned()
    assert 1 <= notes["patches"] <= 5
    assert float(made.patches().before_activation(made.stored).max()) < 0
    held_out = editor(pool=HELD_OUT).stored
    assert float(made.patches().before_activation(held_out).max()) < 0
    queries = PatchTask(editor(), FACTS[0]).queries
    assert float(made.patches().before_activation(queries).amax(0).min()) > 1
    answer = made.predictor().respond([FACTS[0].ask()], [FACTS[0].target])[0]
    assert answer.score is not None and answer.score.hits.all() and answer.generated == FACTS[0].target


def test_with_relu_prompts_under_zero_keep_the_bits_of_the_base_model_and_with_silu_they_leak() -> None:
    made, base = editor(activation="relu", steps=150), ModelPredictor(build("llama"), lambda batch: build("llama").swapped({}))
    apply(made, FACTS[:1])
    old, new = (p.inspect([FACTS[0].ask(), *OTHERS], layers=(2,)) for p in (base, made.predictor()))
    for row in (1, 2):
        batch = collate(made.handle, [OTHERS[row - 1]])
        assert float(made.patches().before_activation(inputs(made, batch)).max()) <= 0
        assert np.array_equal(old[row].logprobs, new[row].logprobs) and np.array_equal(old[row].hidden, new[row].hidden)
    leaked = learned()[0].predictor().inspect([FACTS[0].ask(), *OTHERS], layers=(2,))
    assert all(not np.array_equal(old[row].hidden, leaked[row].hidden) for row in (1, 2))


def inputs(made: TPatcher, batch: Any) -> Tensor:
    """(T, d) what enters the MLP of an unpadded prompt."""
    seen: list[Tensor] = []
    with made.handle.hooked(made.entry.module, lambda m, args: seen.append(args[0]), pre=True):
        made.handle.model(**batch.inputs, use_cache=False)
    return seen[0].reshape(-1, made.handle.width)


def test_earlier_patches_are_frozen_and_undo_drops_an_edits_own() -> None:
    made = editor()
    apply(made, FACTS[:1])
    before = [t.clone() for t in made._tensors()]
    n = len(before[0])
    apply(made, FACTS[1:], 2)
    assert len(made.keys) > n and all(torch.equal(t[:n], old) for t, old in zip(made._tensors(), before))
    kept = [t[[i for i, o in enumerate(made.owners) if o != FACTS[1].id]].clone() for t in made._tensors()]
    made.revert([FACTS[1].id])
    assert all(torch.equal(t, wanted) for t, wanted in zip(made._tensors(), kept))
    made.revert([FACTS[0].id, FACTS[2].id])
    assert not made.owners and made.predictor().fingerprint == "base"
    with pytest.raises(BadEditor, match="made no edit nobody"):
        made.revert(["nobody"])


def test_a_patch_is_two_d_and_one_numbers_and_an_edit_that_is_right_gets_none() -> None:
    made, _ = learned()
    assert made.state_bytes() == 4 * len(made.owners) * (2 * made.handle.width + 1)
    again = editor()
    again.load_state_dict(made.state_dict())
    assert apply(again, FACTS[:1], 2)["patches"] == 0 and again.owners == made.owners


def test_what_an_edit_trains_does_not_depend_on_the_edits_beside_it_but_through_their_patches() -> None:
    one, two = editor(), editor()
    apply(one, FACTS[:1])
    apply(two, FACTS[:2])
    n = len(one.owners)
    assert all(torch.equal(a, b[:n]) for a, b in zip(one._tensors(), two._tensors()))


def test_without_a_train_pool_a_note_says_so_and_answers_outside_the_pool_are_left_out() -> None:
    empty = editor(pool=TrainPool())
    assert not len(empty.stored) and any("no train pool" in note for note in empty.notes)
    assert "loss" in apply(empty, FACTS[:1])
    few = editor(pool=TrainPool((Question("locality_far", "Who sails?"),), TEXTS), memory=50)
    assert few.stored.shape == (50, few.handle.width)


def test_a_layer_below_the_last_can_be_patched() -> None:
    made = editor(layer=0)
    before = float(made.predictor().score([FACTS[0].ask()], [FACTS[0].target])[0].logprobs.mean())
    apply(made, FACTS[:1])
    assert float(made.predictor().score([FACTS[0].ask()], [FACTS[0].target])[0].logprobs.mean()) > before + 1
