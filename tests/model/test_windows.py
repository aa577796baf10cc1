"""Nothing runs beyond the model's window: generations end there, contexts are left out, and what is too long is refused by a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.core.registry import EDITORS
from testbed.editors.locate.keys import contexts_that_fit
from testbed.experiment import preflight
from testbed.model.encoding import PromptTooLong, answer_ids, prompt_inputs
from testbed.model.predictor import ModelPredictor
from testbed.model.prompt_forms import choose
from tests.helpers.facts import POOL, make
from tests.helpers.models import build

HANDLE = "gpt2"
"""A model with learned positions, which ends in an IndexError beyond them."""


def prompt_of(tokens: int) -> str:
    """A prompt of so many tokens."""
    return "a" + " a" * (tokens - 1)


def event(tokens: int) -> EditEvent:
    return EditEvent("add", 1.0, 0, prompt_of(tokens), "green", None, subject="a", relation="head")


@pytest.mark.parametrize("left", [1, 3])
def test_a_generation_ends_with_the_window_in_any_batch(left: int) -> None:
    handle = build(HANDLE)
    long = Ask(prompt_of(handle.window - left))
    assert prompt_inputs(handle, long)["input_ids"].shape[1] == handle.window - left
    said = ModelPredictor(handle).generate([long, Ask("a")], 16)
    assert len(said) == 2
    with pytest.raises(PromptTooLong, match=rf"takes {handle.window + 1} tokens with its answer, .* reads {handle.window}: 'a a a"):
        ModelPredictor(handle).generate([Ask(prompt_of(handle.window + 1))], 1)


def test_an_answer_is_scored_as_far_as_the_window_reaches() -> None:
    handle = build(HANDLE)
    ask, answer = Ask(prompt_of(handle.window - 2)), "one two three four five six"
    assert len(answer_ids(handle, ask, answer)) > 2
    (score,), (response,) = ModelPredictor(handle).score([ask], [answer]), ModelPredictor(handle).respond([ask], [answer], 4)
    assert len(score.logprobs) == 2 and response.score is not None and len(response.score.logprobs) == 2


def test_a_prompt_form_is_chosen_by_prompts_that_fit_and_without_any_is_the_simplest() -> None:
    handle = build(HANDLE)
    long = (Ask(prompt_of(handle.window - 4)), "green")
    assert choose(handle, [long]).form.name == "bare" and not choose(handle, [long]).shares
    assert choose(handle, [long, (Ask("a"), "green")]).shares == choose(handle, [(Ask("a"), "green")]).shares


def test_contexts_are_left_out_where_the_window_does_not_hold_them_before_a_prompt() -> None:
    handle, contexts = build(HANDLE), ["", "So it goes"]
    notes: list[str] = []
    assert list(contexts_that_fit(handle, [event(20)], contexts, notes)) == contexts and notes == []
    assert list(contexts_that_fit(handle, [event(20), event(handle.window - 4)], contexts, notes)) == [""] and len(notes) == 1


@pytest.mark.parametrize(("name", "more"), [("rome", {"second_moment": False, "layer": 0}), ("neuraldb", {"layer": 0}), ("memoir", {})])
def test_an_editor_says_once_that_contexts_are_left_out(name: str, more: dict[str, Any]) -> None:
    editor = make(name, HANDLE, contexts=1, **more)
    for step in (1, 2):
        assert not editor.apply(EditBatch((event(build(HANDLE).window - 4 - step),), step)).failed
    assert sum("sampled contexts are left out" in note for note in editor.notes) == 1


@pytest.mark.parametrize("name", ["finetune", "rome", "balancedit", "lora"])
def test_an_edit_that_does_not_fit_fails_with_the_reason_and_the_stream_goes_on(name: str) -> None:
    more = {"contexts": 0, "second_moment": False} if name == "rome" else {}
    editor = EDITORS.get(name)(EDITORS.get(name).Config(**more))
    editor.prepare(build(HANDLE), POOL)
    (reason,) = editor.apply(EditBatch((event(build(HANDLE).window - 1),), 1)).failed.values()
    assert "tokens with its answer" in reason
    assert not editor.apply(EditBatch((event(20),), 2)).failed


def test_an_edit_is_refused_before_the_first_where_its_end_token_does_not_fit() -> None:
    handle = build(HANDLE)
    longest = handle.window - len(answer_ids(handle, event(9).ask(), "green")) - 1
    assert preflight._edit_problem(handle, event(longest)) is None
    reason = preflight._edit_problem(handle, event(longest + 1))
    assert reason is not None and f"an edit takes {handle.window + 1} tokens with its answer" in reason
