"""One suite for every registered editor, on random tiny models: an image-text model and a text-only one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from streams.base import StreamConfig
from testbed.core.events import EditBatch, EditEvent
from testbed.core.registry import STREAMS
from testbed.editors.base import BadEditor
from testbed.model.handle import ModelHandle, weights_hash
from testbed.model.loading import load
from testbed.storage.files import read_state, write_state
from tests.helpers.editor_suite import (
    IN_CONTEXT,
    LEARNING,
    NAMES,
    STREAM,
    asks,
    batch,
    check_keeps,
    check_learns,
    equal_states,
    frozen,
    learners,
    make,
    respond,
    same,
    same_up_to_rounding,
    two_subjects,
)
from tests.helpers.models import build


def test_there_are_editors() -> None:
    assert {"noop", "oracle", "finetune", "balancedit"} <= set(NAMES)


@pytest.fixture(params=sorted(STREAM), ids=str)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=NAMES, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def handle(kind: str) -> ModelHandle:
    return build(kind)


@pytest.fixture
def stream(kind: str) -> Any:
    return STREAMS.get(STREAM[kind])(StreamConfig(revert=0, retire=0))


@pytest.fixture
def edits(stream: Any) -> list[EditEvent]:
    return stream.events(6)


def test_an_empty_batch_is_the_identity(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = make(name, handle, stream)
    editor.apply(batch(stream, edits[:2]))
    before, answers = frozen(editor.state_dict()), respond(editor, asks(stream, edits, editor))
    report = editor.apply(EditBatch((), 2))
    assert report.event_ids == ()
    assert equal_states(before, editor.state_dict())
    assert same(answers, respond(editor, asks(stream, edits, editor)))


def test_before_any_edit_it_is_the_base_model(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor, base = make(name, handle, stream), make("noop", handle, stream)
    what = [replace(a, truth=None) for a in asks(stream, edits, editor)]
    equal = same_up_to_rounding if editor.traits.gated else same  # a gate reads padded prompts, and the base packed ones
    assert equal(respond(editor, what), respond(base, what))


def test_editing_and_probing_leave_the_base_and_the_state_bit_identical(
    name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]
) -> None:
    facts = [(p.dtype, p.device, p.requires_grad) for p in handle.model.parameters()]
    before = weights_hash(handle.model)
    editor = make(name, handle, stream)
    editor.apply(batch(stream, edits[:3]))
    state = frozen(editor.state_dict())
    rng = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  (checks that nobody draws from it)
    first = respond(editor, asks(stream, edits, editor))
    editor.predictor().text_logprobs(["a plain text"])
    seen = editor.predictor().inspect(asks(stream, edits, editor)[:2], layers=(0,), ids=[np.array([3, 1])] * 2)
    assert all(x.top_ids.tolist() == [3, 1] and x.logprobs.shape == (2,) for x in seen)
    assert same(first, respond(editor, asks(stream, edits, editor)))
    assert equal_states(state, editor.state_dict())
    assert weights_hash(handle.model) == before
    assert facts == [(p.dtype, p.device, p.requires_grad) for p in handle.model.parameters()]
    assert torch.equal(rng[0], torch.get_rng_state())
    assert np.array_equal(rng[1], np.random.get_state()[1])  # noqa: NPY002


def test_every_editor_says_how_it_learns() -> None:
    assert sorted([*learners("training"), *learners("context"), *learners("no")]) == sorted(NAMES)
    assert {"finetune", "balancedit", "memit", "lora"} <= set(learners("training"))


@pytest.mark.parametrize("name", learners("training"))
def test_an_edit_makes_its_target_likelier_and_the_next_one_leaves_it_so(name: str, handle: ModelHandle, stream: Any) -> None:
    check_keeps(make(name, handle, stream, **LEARNING.get(name, {})), stream, *two_subjects(stream))


@pytest.mark.parametrize("name", learners("context"))
def test_a_fact_in_the_prompt_makes_its_target_likelier_on_the_committed_model(name: str, stream: Any) -> None:
    """A random model does not read its prompt, so that such editors are tested on a trained one."""
    editor = make(name, load("tiny", device="cpu"), stream, **IN_CONTEXT.get(name, {}))
    check_learns(editor, stream, two_subjects(stream)[0])


@pytest.mark.parametrize("name", learners("no"))
def test_an_editor_that_says_it_does_not_learn_leaves_answers_alone(name: str, handle: ModelHandle, stream: Any) -> None:
    editor, (first, _) = make(name, handle, stream), two_subjects(stream)
    before = respond(editor, [first.ask()])
    editor.apply(batch(stream, [first]))
    assert same(before, respond(editor, [first.ask()]))


def test_two_instances_share_nothing(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    a, b = make(name, handle, stream), make(name, handle, stream)
    untouched = [replace(x, truth=None) for x in asks(stream, edits, b)]
    before = respond(b, untouched)
    a.apply(batch(stream, edits[:3]))
    assert same(before, respond(b, untouched))
    assert b.state_dict()["revises"] == {}


def test_a_stored_state_answers_alike(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent], tmp_path: Any) -> None:
    a, b = make(name, handle, stream), make(name, handle, stream)
    a.apply(batch(stream, edits[:3]))
    write_state(tmp_path / "step-000001.safetensors", a.state_dict())
    b.load_state_dict(read_state(tmp_path / "step-000001.safetensors"))
    what = asks(stream, edits, a)
    assert same(respond(a, what), respond(b, what))
    a.apply(batch(stream, edits[3:5], 2))
    b.apply(batch(stream, edits[3:5], 2))
    assert same(respond(a, what), respond(b, what))


def test_the_same_seed_gives_the_same_result(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    a, b = make(name, handle, stream, seed=3), make(name, handle, stream, seed=3)
    for editor in (a, b):
        editor.apply(batch(stream, edits[:4]))
    assert equal_states(a.state_dict(), b.state_dict())


def test_declared_undo_restores(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = make(name, handle, stream)
    if not editor.traits.undo:
        with pytest.raises(BadEditor, match="no undo"):
            editor.revert([edits[0].id])
        return
    editor.apply(batch(stream, edits[:3]))
    what = asks(stream, edits, editor)
    before = respond(editor, what)
    editor.apply(batch(stream, edits[3:5], 2))
    editor.revert([edits[4].id, edits[3].id])
    assert same(before, respond(editor, what))


def test_a_batch_over_the_limit_is_refused_with_the_number(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = make(name, handle, stream)
    editor.traits = replace(editor.traits, max_batch=2)  # type: ignore[misc]
    with pytest.raises(BadEditor, match="at most 2 edits at once, got 3"):
        editor.apply(batch(stream, edits[:3]))


def test_a_retire_is_undone_or_counted_as_skipped(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = make(name, handle, stream)
    editor.apply(batch(stream, edits[:1]))
    gone = EditEvent("retire", edits[0].time, 1, edits[0].prompt, "", edits[0].image, revises=edits[0].id)
    report = editor.apply(EditBatch((gone,), 2))
    assert (gone.id in report.skipped) == (not editor.traits.undo)
    if editor.traits.undo:
        fresh = make(name, handle, stream)
        what = [replace(a, truth=None) for a in asks(stream, edits[:1], editor)]
        assert same(respond(fresh, what), respond(editor, what))


def test_a_fact_may_be_retired_taken_up_and_retired_again(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor, first = make(name, handle, stream), edits[0]
    life = [first]
    for i, kind in enumerate(("retire", "revise", "retire"), 1):
        target = "" if kind == "retire" else first.target
        life.append(EditEvent(kind, first.time, i, first.prompt, target, first.image, revises=life[-1].id))  # type: ignore[arg-type]
    reports = [editor.apply(batch(stream, [first]))] + [editor.apply(EditBatch((e,), i + 2)) for i, e in enumerate(life[1:])]
    assert [r.failed for r in reports] == [{}] * 4
    if editor.traits.undo:
        what = [replace(a, truth=None) for a in asks(stream, edits[:1], editor)]
        assert same(respond(make(name, handle, stream), what), respond(editor, what))


def test_the_old_answer_is_hidden_unless_declared(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = make(name, handle, stream)
    seen: list[EditBatch] = []
    editor._edit = lambda b: (seen.append(b), {})[1]  # type: ignore[method-assign]
    editor.apply(batch(stream, edits[:3]))
    assert seen
    for e in seen[0].events:
        assert (e.previous is None) == ("previous" not in editor.traits.uses)
    assert bool(seen[0].paraphrases) == ("paraphrase" in editor.traits.uses)


def test_a_failed_edit_leaves_the_state_and_is_reported(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    from testbed.editors.base import EditFailed

    editor = make(name, handle, stream)
    editor.apply(batch(stream, edits[:2]))
    before, answers = frozen(editor.state_dict()), respond(editor, asks(stream, edits, editor))
    whole = editor._edit

    def break_late(b: EditBatch) -> dict[str, float]:
        whole(b)
        raise EditFailed("the loss became nan")

    editor._edit = break_late  # type: ignore[method-assign]
    report = editor.apply(batch(stream, edits[2:4], 2))
    assert set(report.failed) == {e.id for e in edits[2:4]}
    assert equal_states(before, editor.state_dict())
    assert same(answers, respond(editor, asks(stream, edits, editor)))


def test_weights_are_declared(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = make(name, handle, stream)
    report = editor.apply(batch(stream, edits[:1]))
    assert bool(editor.edited_weights()) == editor.traits.weights
    assert (report.delta_norm is not None) == editor.traits.weights


def test_a_state_of_another_shape_is_refused(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent], kind: str) -> None:
    editor = make(name, handle, stream)
    editor.apply(batch(stream, edits[:2]))
    state = editor.state_dict()
    tensors = [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim == 2]
    if not tensors:
        assert all(not isinstance(v, torch.Tensor) for v in state.values())
        return
    state[tensors[0]] = state[tensors[0]][:, :-1]
    with pytest.raises(BadEditor, match="shape"):
        make(name, handle, stream).load_state_dict(state)
