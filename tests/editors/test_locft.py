"""LocFT-BF: its stops, the end token, breadth first, other tensors, and the reservoir."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent
from testbed.core.registry import EDITORS
from testbed.editors.baselines.locft import LocFT, LocFTConfig, YearlyLocFT
from testbed.editors.year_buffer import YearBuffer
from testbed.model.encoding import answer_ids
from tests.helpers.models import Noise, build

WORDS = ("red", "blue", "green", "gold", "white", "black")
FACTS = [EditEvent("add", 1.0 + i, i, f"The colour of {s} is", w, subject=s) for i, (s, w) in enumerate(zip("ABCDEF", WORDS))]


def make(**given: Any) -> LocFT:
    editor = LocFT(LocFTConfig(**given))
    editor.prepare(build("llama"), TrainPool())
    return editor


def apply(editor: LocFT, events: list[EditEvent], step: int = 1) -> dict[str, float]:
    report = editor.apply(EditBatch(tuple(events), step))
    assert not report.failed
    return report.notes


def test_training_ends_at_the_stop_or_with_the_epochs() -> None:
    learned = apply(make(lr=1e-2, epochs=300), FACTS[:2])
    assert learned["loss"] < 1e-2 and learned["epochs"] < 300
    assert apply(make(lr=1e-5), FACTS[:2])["epochs"] == 25
    slow = make(stop=0.0, epochs=3)
    assert apply(slow, FACTS[:2])["epochs"] == 3


def test_a_learned_batch_is_skipped() -> None:
    editor = make(lr=1e-2, epochs=300)
    apply(editor, FACTS[:1])
    before = editor.weight.clone()
    assert apply(editor, FACTS[:1], 2)["epochs"] == 1
    assert torch.equal(editor.weight, before)


def test_the_end_token_is_learned_and_no_other_tensor_changes() -> None:
    editor, handle = make(lr=1e-2, epochs=300), build("llama")
    apply(editor, FACTS[:2])
    assert set(editor.edited_weights()) == {handle.down_weight(-1)}
    ids = answer_ids(handle, FACTS[0].ask(), FACTS[0].target)
    tokens = torch.tensor([[*handle.tokenizer(FACTS[0].prompt)["input_ids"], *ids]])
    with handle.swapped(editor.edited_weights()):
        assert int(handle.model(tokens).logits[0, -1].argmax()) == handle.tokenizer.eos_token_id


def test_identical_edits_are_one_edit_and_mini_batches_see_every_edit() -> None:
    one, three = make(epochs=4, stop=0.0), make(epochs=4, stop=0.0)
    again = [EditEvent("add", 1.0, i, FACTS[0].prompt, FACTS[0].target, subject="A", source=str(i)) for i in range(3)]
    apply(one, again[:1])
    apply(three, again)
    torch.testing.assert_close(one.weight, three.weight, atol=1e-5, rtol=1e-4)
    small = make(lr=1e-2, rows=2, epochs=300)
    apply(small, FACTS)
    losses = small.predictor().score([e.ask() for e in FACTS], [e.target for e in FACTS])
    assert all(float(s.logprobs.mean()) > -0.5 for s in losses)


def test_replay_mixes_earlier_edits_in_and_the_state_holds_them() -> None:
    editor = make(replay=0.5, memory=3, lr=1e-2)
    assert apply(editor, FACTS[:4])["replayed"] == 0
    assert len(editor.reservoir) == 3 and editor.seen == 4
    assert apply(editor, FACTS[4:], 2)["replayed"] == 1
    assert editor.state_bytes() > editor.weight.numel() * 4
    other = make(replay=0.5, memory=3, lr=1e-2)
    other.load_state_dict(editor.state_dict())
    assert other.reservoir == editor.reservoir and other.seen == 6


@pytest.mark.parametrize("memory", [2, 5])
def test_the_reservoir_is_a_uniform_sample(memory: int) -> None:
    counts = dict.fromkeys(range(10), 0)
    for seed in range(300):
        editor = make(replay=0.1, memory=memory)
        editor._remember([(str(i), "x", "") for i in range(10)], torch.Generator().manual_seed(seed))
        for prompt, _, _ in editor.reservoir:
            counts[int(prompt)] += 1
    expected = 300 * memory / 10
    assert all(abs(n - expected) < 5 * (expected * (1 - memory / 10)) ** 0.5 for n in counts.values())


def test_depth_first_fine_tuning_makes_one_edit_after_the_other() -> None:
    cls = EDITORS.get("finetune")
    both, alone = (cls(cls.Config(order="depth", layer=-1, lr=1e-2, steps=5)) for _ in range(2))
    for editor in (both, alone):
        editor.prepare(build("llama"), TrainPool())
    both.apply(EditBatch(tuple(FACTS[:3]), 1))
    for step, event in enumerate(FACTS[:3], 1):
        alone.apply(EditBatch((event,), step))
    torch.testing.assert_close(both.weight, alone.weight, atol=1e-6, rtol=1e-5)


def test_a_year_of_edits_is_learned_as_one_batch_and_waits_until_then() -> None:
    yearly, plain = YearlyLocFT(LocFTConfig(epochs=4)), make(epochs=4)
    yearly.prepare(build("llama"), TrainPool())
    before = yearly.weight.clone()
    for step in (1, 2):
        report = yearly.apply(EditBatch((FACTS[step - 1],), step, closes_year=False))
        assert report.notes["waiting"] == step and torch.equal(yearly.weight, before)
    resumed = YearlyLocFT(LocFTConfig(epochs=4))
    resumed.prepare(build("llama"), TrainPool())
    resumed.load_state_dict(yearly.state_dict())
    for editor in (yearly, resumed):
        assert not editor.apply(EditBatch((FACTS[2],), 3)).failed
        assert not editor.buffer.waiting
    apply(plain, FACTS[:3])
    assert torch.equal(yearly.weight, plain.weight) and torch.equal(resumed.weight, plain.weight)


def test_the_newest_edit_of_a_fact_waits_and_pictures_are_kept_with_it() -> None:
    photo = Noise(3)
    first = EditEvent("add", 1.0, 0, "What is this?", "red", photo, subject="it", relation="name")
    again = EditEvent("revise", 1.1, 1, "What is this?", "blue", photo, subject="it", relation="name", revises=first.id)
    buffer = YearBuffer().with_edits([first, FACTS[0]]).with_edits([again])
    assert [w.target for w in buffer.waiting] == ["red", "blue"]
    loaded = YearBuffer.load(buffer.state())
    assert [(w.fact, w.ask.prompt, w.target) for w in loaded.waiting] == [(w.fact, w.ask.prompt, w.target) for w in buffer.waiting]
    image = loaded.waiting[1].ask.image
    assert image is not None and image.key == photo.key and (image.load() == photo.load()).all()


def test_a_year_that_cannot_be_learned_waits_on() -> None:
    editor = YearlyLocFT(LocFTConfig(lr=float("inf")))
    editor.prepare(build("llama"), TrainPool())
    editor.apply(EditBatch((FACTS[0],), 1, closes_year=False))
    before = editor.weight
    report = editor.apply(EditBatch((FACTS[1],), 2))
    assert report.notes["year_failed"] == 1 and "could not be learned and wait on: the loss became" in editor.notes[-1]
    assert [w.ask.prompt for w in editor.buffer.waiting] == [f.prompt for f in FACTS[:2]]
    assert torch.equal(editor.weight, before)
