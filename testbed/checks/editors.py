"""The contract of an editor as checks on tiny random models. tests/editors/test_contract.py runs them on every registered editor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streams.base import Stream, TrainPool
from testbed.checks.contract import refused, require
from testbed.core.events import Ask, EditBatch, EditEvent, Kind
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor, EditFailed, Editor
from testbed.model.handle import ModelHandle, weights_hash
from testbed.model.predictor import ModelPredictor, Predictor, Response
from testbed.storage.files import read_state, write_state

LEAST_GAIN = 0.1
"""Nats a token by which an edit must make its target likelier."""


@dataclass(frozen=True)
class EditorCase:
    """An editor on a model, with edits of a stream.

    settings: fields of the editor's configuration that it cannot do without. learning: fields with which it learns on a tiny
    random model, where its own values are for other models.
    """

    name: str
    handle: ModelHandle
    stream: Stream
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def pool(self) -> TrainPool:
        return self.stream.train_pool()

    def make(self, seed: int = 0, **more: Any) -> Editor:
        cls = EDITORS.get(self.name)
        editor = cls(cls.Config(**{**self.settings, **more}), seed=seed)
        editor.prepare(self.handle, self.pool)
        return editor

    def edits(self) -> list[EditEvent]:
        return self.stream.events(6)

    def asks(self, events: list[EditEvent], editor: Editor) -> list[Ask]:
        return asks(self.stream, events, editor)

    def untold(self, events: list[EditEvent], editor: Editor) -> list[Ask]:
        """The same questions without the answer that an upper bound is told."""
        return [replace(a, truth=None) for a in self.asks(events, editor)]

    def apply(self, editor: Editor, events: list[EditEvent], step: int = 1) -> Any:
        return editor.apply(batch(self.stream, events, step))


def batch(stream: Stream, events: list[EditEvent], step: int = 1) -> EditBatch:
    return EditBatch(tuple(events), step, {e.id: stream.paraphrases(e) for e in events})


def asks(stream: Stream, events: list[EditEvent], editor: Editor) -> list[Ask]:
    """Each edit as it was made and one neighbour of it; only a told editor is told."""
    own = [Ask(e.prompt, e.image, e.target if editor.traits.told_truth else None) for e in events]
    beside = [q for e in events for q in stream.questions(e) if q.split == "locality_far"]
    return own + [q.ask() for q in beside]


def respond(editor: Editor, what: list[Ask]) -> list[Response]:
    return answers(editor.predictor(), what)


def answers(predictor: Predictor, what: list[Ask]) -> list[Response]:
    return predictor.respond(what, ["yes"] * len(what), 4)


def same(a: list[Response], b: list[Response]) -> bool:
    """Same text and bit-equal scores."""
    return _alike(a, b, np.array_equal)


def same_up_to_rounding(a: list[Response], b: list[Response]) -> bool:
    """Same text and hits, and scores that differ by rounding: an editor that treats rows differently is not asked in packed rows."""
    return _alike(a, b, lambda x, y: np.allclose(x, y, rtol=0, atol=1e-4))


def _alike(a: list[Response], b: list[Response], equal: Callable[[np.ndarray, np.ndarray], bool]) -> bool:
    return all(
        x.generated == y.generated
        and x.score is not None
        and y.score is not None
        and equal(x.score.logprobs, y.score.logprobs)
        and np.array_equal(x.score.hits, y.score.hits)
        for x, y in zip(a, b, strict=True)
    )


def equal_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def frozen(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def two_subjects(stream: Stream) -> tuple[EditEvent, EditEvent]:
    """The first new facts of two subjects."""
    first, *others = [e for e in stream.events(12) if e.kind == "add"]
    return first, next(e for e in others if e.subject != first.subject)


def target_logprob(editor: Editor, event: EditEvent) -> float:
    """Mean log-probability of the target's tokens (nats) where the edit's own question is asked."""
    return float(editor.predictor().score([event.ask()], [event.target])[0].logprobs.mean())


def check_learns(editor: Editor, stream: Stream, event: EditEvent) -> float:
    """An edit makes its target likelier, by `LEAST_GAIN` nats a token at least; the gain."""
    before = target_logprob(editor, event)
    report = editor.apply(batch(stream, [event]))
    gain = target_logprob(editor, event) - before
    require(not report.failed, f"the edit failed: {report.failed}")
    require(gain >= LEAST_GAIN, f"the target's mean log-probability was {before:.2f} and changed by {gain:.2f}, not {LEAST_GAIN} at least")
    return gain


def check_keeps(editor: Editor, stream: Stream, first: EditEvent, second: EditEvent) -> None:
    """An edit makes its target likelier, and keeps half of the gain at least when another subject is edited."""
    before = target_logprob(editor, first)
    gain = check_learns(editor, stream, first)
    report = editor.apply(batch(stream, [second], 2))
    kept = target_logprob(editor, first) - before
    require(not report.failed, f"the second edit failed: {report.failed}")
    require(kept >= gain / 2, f"of a gain of {gain:.2f}, {kept:.2f} are left after the second edit")


def check_made(editor: Editor, stream: Stream, event: EditEvent) -> None:
    """An edit is made and leaves a model that answers, whether its target becomes likelier or not."""
    report = editor.apply(batch(stream, [event]))
    require(not report.failed, f"the edit failed: {report.failed}")
    require(np.isfinite(target_logprob(editor, event)), "after an edit the target's log-probability is not finite")


def it_learns_as_it_says(case: EditorCase) -> None:
    """`Traits.learns`: by training, not at all, by a rule that may miss, or from its prompt, which a random model does not read."""
    first, second = two_subjects(case.stream)
    learns = EDITORS.get(case.name).traits.learns
    if learns == "training":
        check_keeps(case.make(**case.learning), case.stream, first, second)
    elif learns == "rule":
        check_made(case.make(**case.learning), case.stream, first)
    elif learns == "no":
        editor = case.make()
        before = respond(editor, [first.ask()])
        case.apply(editor, [first])
        require(same(before, respond(editor, [first.ask()])), "traits.learns is 'no', and an edit changes an answer that is not told")


def an_empty_batch_is_the_identity(case: EditorCase) -> None:
    editor, edits = case.make(), case.edits()
    case.apply(editor, edits[:2])
    before, known = frozen(editor.state_dict()), respond(editor, case.asks(edits, editor))
    report = editor.apply(EditBatch((), 2))
    require(report.event_ids == (), f"the report of an empty batch names edits: {report.event_ids}")
    require(equal_states(before, editor.state_dict()), "an empty batch changes the state")
    require(same(known, respond(editor, case.asks(edits, editor))), "an empty batch changes answers")


def before_any_edit_it_is_the_base_model(case: EditorCase) -> None:
    editor = case.make()
    what = case.untold(case.edits(), editor)
    equal = same_up_to_rounding if editor.traits.gated else same  # a gate reads padded prompts, and the base packed ones
    require(equal(respond(editor, what), answers(ModelPredictor(case.handle), what)), "an editor without edits answers unlike the model")


def editing_and_probing_leave_the_base_and_the_state_bit_identical(case: EditorCase) -> None:
    model, edits = case.handle.model, case.edits()
    facts = [(p.dtype, p.device, p.requires_grad) for p in model.parameters()]
    before = weights_hash(model)
    editor = case.make()
    case.apply(editor, edits[:3])
    state = frozen(editor.state_dict())
    rng = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002  (checks that nobody draws from it)
    first = respond(editor, case.asks(edits, editor))
    editor.predictor().text_logprobs(["a plain text"])
    seen = editor.predictor().inspect(case.asks(edits, editor)[:2], layers=(0,), ids=[np.array([3, 1])] * 2)
    require(all(x.top_ids.tolist() == [3, 1] and x.logprobs.shape == (2,) for x in seen), "inspect gives other tokens than were asked for")
    require(same(first, respond(editor, case.asks(edits, editor))), "the same questions get other answers the second time")
    require(equal_states(state, editor.state_dict()), "asking changes the state")
    require(weights_hash(model) == before, "the base model's weights changed: put changed weights over it with handle.swapped")
    require(facts == [(p.dtype, p.device, p.requires_grad) for p in model.parameters()], "a parameter's dtype, device or gradient changed")
    require(torch.equal(rng[0], torch.get_rng_state()), "asking draws from torch's global generator: use self.generator(step)")
    require(rng[1] == str(np.random.get_state()), "asking draws from numpy's global generator")  # noqa: NPY002


def two_instances_share_nothing(case: EditorCase) -> None:
    a, b, edits = case.make(), case.make(), case.edits()
    what = case.untold(edits, b)
    before = respond(b, what)
    case.apply(a, edits[:3])
    require(same(before, respond(b, what)), "edits of one instance change the answers of another")
    require(b.state_dict()["revises"] == {}, "edits of one instance stand in the state of another")


def a_stored_state_answers_alike(case: EditorCase) -> None:
    a, b, edits = case.make(), case.make(), case.edits()
    case.apply(a, edits[:3])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-000001.safetensors"
        write_state(path, a.state_dict())
        b.load_state_dict(read_state(path))
    what = case.asks(edits, a)
    require(same(respond(a, what), respond(b, what)), "an editor with the stored state answers otherwise: _state lacks something")
    case.apply(a, edits[3:5], 2)
    case.apply(b, edits[3:5], 2)
    require(same(respond(a, what), respond(b, what)), "after the next edits an editor with the stored state answers otherwise")


def the_same_seed_gives_the_same_result(case: EditorCase) -> None:
    a, b = case.make(seed=3), case.make(seed=3)
    for editor in (a, b):
        case.apply(editor, case.edits()[:4])
    require(equal_states(a.state_dict(), b.state_dict()), "two instances with one seed differ: draw from self.generator(batch.step)")


def declared_undo_restores(case: EditorCase) -> None:
    editor, edits = case.make(), case.edits()
    if not editor.traits.undo:
        with refused(BadEditor, "no undo"):
            editor.revert([edits[0].id])
        return
    case.apply(editor, edits[:3])
    what = case.asks(edits, editor)
    before = respond(editor, what)
    case.apply(editor, edits[3:5], 2)
    editor.revert([edits[4].id, edits[3].id])
    require(same(before, respond(editor, what)), "traits.undo is true, and answers after revert differ from those before the edits")


def a_batch_over_the_limit_is_refused_with_the_number(case: EditorCase) -> None:
    editor = case.make()
    editor.traits = replace(editor.traits, max_batch=2)  # pyright: ignore[reportAttributeAccessIssue]
    with refused(BadEditor, "at most 2 edits at once, got 3"):
        case.apply(editor, case.edits()[:3])


def a_retire_is_undone_or_counted_as_skipped(case: EditorCase) -> None:
    editor, edits = case.make(), case.edits()
    case.apply(editor, edits[:1])
    gone = EditEvent("retire", edits[0].time, 1, edits[0].prompt, "", edits[0].image, revises=edits[0].id)
    report = editor.apply(EditBatch((gone,), 2))
    require((gone.id in report.skipped) == (not editor.traits.undo), f"a retired fact is skipped without undo alone: {report.skipped}")
    if editor.traits.undo:
        what = case.untold(edits[:1], editor)
        require(same(respond(case.make(), what), respond(editor, what)), "a retired fact still changes answers")


def a_fact_may_be_retired_taken_up_and_retired_again(case: EditorCase) -> None:
    editor, edits = case.make(), case.edits()
    first, life = edits[0], [edits[0]]
    changes: list[tuple[Kind, str]] = [("retire", ""), ("revise", edits[0].target), ("retire", "")]
    for i, (kind, target) in enumerate(changes, 1):
        life.append(EditEvent(kind, first.time, i, first.prompt, target, first.image, revises=life[-1].id))
    reports = [case.apply(editor, [first])] + [editor.apply(EditBatch((e,), i + 2)) for i, e in enumerate(life[1:])]
    failed = [r.failed for r in reports if r.failed]
    require(not failed, f"a step of retire, revise, retire failed: {failed}")
    if editor.traits.undo:
        what = case.untold(edits[:1], editor)
        require(same(respond(case.make(), what), respond(editor, what)), "a fact that was retired twice still changes answers")


def the_old_answer_is_hidden_unless_declared(case: EditorCase) -> None:
    editor, seen = case.make(), []
    editor._edit = lambda batch: (seen.append(batch), {})[1]  # type: ignore[method-assign]
    case.apply(editor, case.edits()[:3])
    require(seen, "apply does not call _edit")
    uses = editor.traits.uses
    require(all((e.previous is None) == ("previous" not in uses) for e in seen[0].events), "the old answer is given without being declared")
    require(bool(seen[0].paraphrases) == ("paraphrase" in uses), "paraphrases are given exactly where traits.uses declares them")


def a_failed_edit_leaves_the_state_and_is_reported(case: EditorCase) -> None:
    editor, edits = case.make(), case.edits()
    case.apply(editor, edits[:2])
    before, known = frozen(editor.state_dict()), respond(editor, case.asks(edits, editor))
    whole = editor._edit

    def break_late(batch: EditBatch) -> dict[str, float]:
        whole(batch)
        raise EditFailed("the loss became nan")

    editor._edit = break_late  # type: ignore[method-assign]
    report = case.apply(editor, edits[2:4], 2)
    require(set(report.failed) == {e.id for e in edits[2:4]}, f"a failed edit is not reported: {report.failed}")
    require(equal_states(before, editor.state_dict()), "a failed edit changes the state: replace tensors, never change them in place")
    require(same(known, respond(editor, case.asks(edits, editor))), "a failed edit changes answers")


def weights_are_declared(case: EditorCase) -> None:
    editor = case.make()
    report = case.apply(editor, case.edits()[:1])
    require(bool(editor.edited_weights()) == editor.traits.weights, "traits.weights says whether edited_weights() gives any")
    require((report.delta_norm is not None) == editor.traits.weights, "a report has the norm of the change where weights change")


def a_state_of_another_shape_is_refused(case: EditorCase) -> None:
    editor = case.make()
    case.apply(editor, case.edits()[:2])
    state = editor.state_dict()
    tensors = [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim == 2]
    if not tensors:
        require(all(not isinstance(v, torch.Tensor) for v in state.values()), "a state with tensors has a matrix among them")
        return
    state[tensors[0]] = state[tensors[0]][:, :-1]
    with refused(BadEditor, "shape"):
        case.make().load_state_dict(state)


CHECKS: tuple[Callable[[EditorCase], None], ...] = (
    it_learns_as_it_says,
    an_empty_batch_is_the_identity,
    before_any_edit_it_is_the_base_model,
    editing_and_probing_leave_the_base_and_the_state_bit_identical,
    two_instances_share_nothing,
    a_stored_state_answers_alike,
    the_same_seed_gives_the_same_result,
    declared_undo_restores,
    a_batch_over_the_limit_is_refused_with_the_number,
    a_retire_is_undone_or_counted_as_skipped,
    a_fact_may_be_retired_taken_up_and_retired_again,
    the_old_answer_is_hidden_unless_declared,
    a_failed_edit_leaves_the_state_and_is_reported,
    weights_are_declared,
    a_state_of_another_shape_is_refused,
)
"""Every check of an editor, in the order in which they are told."""
