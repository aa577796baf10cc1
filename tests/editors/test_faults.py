"""What one bad edit, or too little memory, does to a batch or a probe: it costs itself alone, whatever the editor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from streams.base import StreamConfig
from testbed.checks.editors import batch, check_keeps, check_learns, equal_states, two_subjects
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.core.registry import STREAMS
from testbed.editors.base import EditFailed, Editor
from testbed.editors.locate.core import LocateEditor
from testbed.model import out_of_memory as memory
from testbed.model.encoding import UntokenizableAnswer
from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from testbed.model.predictor import ModelPredictor
from tests.helpers.editor_suite import NAMES, STREAM, case_of, quick
from tests.helpers.models import build, save

POISON = "\u2620"


@pytest.fixture
def handle() -> ModelHandle:
    return build("gpt2")


@pytest.fixture
def stream() -> Any:
    return STREAMS.get(STREAM["gpt2"])(StreamConfig(revert=0, retire=0, revise=0))


@pytest.fixture
def edits(stream: Any) -> list[EditEvent]:
    return stream.events(8)


def made_apart(name: str, handle: ModelHandle, stream: Any, parts: Sequence[Sequence[EditEvent]]) -> Editor:
    """An editor to which each part was given as a batch of its own, in one step."""
    editor = quick(name, handle, stream)
    for part in parts:
        assert not editor.apply(replace(batch(stream, list(part)), closes_year=part is parts[-1])).failed
    return editor


def refusing(editor: Editor, error: Any) -> list[int]:
    """From now on the editor's own work is done and then spoilt where `error` of the batch says so; sizes of the batches tried."""
    plain, tried = editor._edit, []

    def edit(b: EditBatch) -> dict[str, float]:
        tried.append(len(b))
        notes = plain(b)
        if (e := error(b)) is not None:
            raise e
        return notes

    editor._edit = edit  # type: ignore[method-assign]
    return tried


ERRORS = [EditFailed("the loss became nan"), torch.linalg.LinAlgError("singular"), UntokenizableAnswer("cannot be spelled")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_one_bad_edit_of_a_batch_fails_alone(error: Exception, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor, bad = quick("finetune", handle, stream), edits[2]
    refusing(editor, lambda b: error if bad.id in {e.id for e in b.events} else None)
    report = editor.apply(batch(stream, edits[:4]))
    assert report.failed == {bad.id: str(error)}
    assert report.event_ids == tuple(e.id for e in edits[:4])
    assert report.notes["parts"] == 3
    assert equal_states(editor.state_dict(), made_apart("finetune", handle, stream, [edits[:2], edits[3:4]]).state_dict())


@contextmanager
def poisoned(handle: ModelHandle) -> Iterator[list[bool]]:
    """Rows in which the poison stands are nan to the model from the first layer on; whether one was met."""
    bad = torch.tensor(handle.tokenizer(POISON, add_special_tokens=False)["input_ids"])
    met: list[bool] = []

    def spoil(module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        rows = torch.isin(args[0], bad).any(-1)
        met.extend([True] * int(rows.any()))
        return out.masked_fill(rows[:, None, None], math.nan)

    with handle.hooked(handle.model.get_input_embeddings(), spoil):
        yield met


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_on_which_the_model_gives_nan_fails_alone(name: str, handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    """The others are as they are when they are given in the parts that are left of the batch."""
    editor = quick(name, handle, stream)
    bad = replace(edits[1], prompt=f"{POISON} {edits[1].prompt}")
    with poisoned(handle) as met:
        report = editor.apply(batch(stream, [edits[0], bad, edits[2]]))
    if not met:
        assert not report.failed
        return
    assert set(report.failed) == {bad.id}
    assert equal_states(editor.state_dict(), made_apart(name, handle, stream, [edits[:1], edits[2:3]]).state_dict())
    tensors = [v for v in [*editor.state_dict().values(), *editor.edited_weights().values()] if isinstance(v, torch.Tensor)]
    assert not any(bool(t.isnan().any()) for t in tensors)


def test_most_editors_meet_the_model_as_they_edit(handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    """So the test above is not passed by looking away."""
    bad = replace(edits[0], prompt=f"{POISON} {edits[0].prompt}")
    for name in ("finetune", "balancedit", "lora", "memit"):
        with poisoned(handle) as met:
            assert quick(name, handle, stream).apply(batch(stream, [bad])).failed
        assert met


def test_a_batch_that_memory_has_no_room_for_is_made_in_parts(handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = quick("finetune", handle, stream)
    tried = refusing(editor, lambda b: torch.OutOfMemoryError("CUDA out of memory.") if len(b) > 2 else None)
    reports = [editor.apply(batch(stream, edits[:4])), editor.apply(batch(stream, edits[4:8], step=2))]
    assert tried == [4, 2, 2, 2, 2]
    assert [(r.failed, r.notes["parts"]) for r in reports] == [({}, 2), ({}, 2)]
    assert editor.notes[-1] == "memory ran out with 4 edits at once at step 1: from there on at most 2 are made at once"
    apart = quick("finetune", handle, stream)
    for step, part in ((1, edits[:2]), (1, edits[2:4]), (2, edits[4:6]), (2, edits[6:8])):
        apart.apply(batch(stream, part, step))
    assert equal_states(editor.state_dict(), apart.state_dict())


def test_an_edit_too_large_for_memory_alone_fails_and_the_others_are_made(handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor, large = quick("finetune", handle, stream), edits[1]
    refusing(editor, lambda b: MemoryError() if large.id in {e.id for e in b.events} else None)
    report = editor.apply(batch(stream, edits[:2]))
    assert report.failed == {large.id: "memory ran out"}
    assert equal_states(editor.state_dict(), made_apart("finetune", handle, stream, [edits[:1]]).state_dict())


def test_what_is_no_failure_of_an_edit_is_raised(handle: ModelHandle, stream: Any, edits: list[EditEvent]) -> None:
    editor = quick("finetune", handle, stream)
    refusing(editor, lambda b: RuntimeError("the size of tensor a must match the size of tensor b"))
    with pytest.raises(RuntimeError, match="must match"):
        editor.apply(batch(stream, edits[:2]))


def test_memory_that_runs_out_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)
    assert not memory.is_out_of_memory(RuntimeError("out of range"))


# The checks of learning, on editors that were broken on purpose


TAUGHT = ("finetune", "balancedit", "grace", "lora", "elder", "memit")


def learning(name: str, handle: ModelHandle, stream: Any) -> Editor:
    case = case_of(name, handle, stream)
    return case.make(**case.learning)


@pytest.mark.parametrize("name", TAUGHT)
def test_an_editor_that_does_nothing_breaks_the_law_of_learning(name: str, handle: ModelHandle, stream: Any) -> None:
    editor = learning(name, handle, stream)
    editor._edit = lambda b: {}  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=r"changed by -?0\.00"):
        check_learns(editor, stream, two_subjects(stream)[0])


@pytest.mark.parametrize("name", [n for n in TAUGHT if n != "memit"])
def test_gradient_steps_with_the_wrong_sign_break_the_law_of_learning(
    name: str, handle: ModelHandle, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "Adam", partial(torch.optim.Adam, maximize=True))
    with pytest.raises(AssertionError):
        check_learns(learning(name, handle, stream), stream, two_subjects(stream)[0])


def test_a_solution_with_the_wrong_sign_breaks_the_law_of_learning(
    handle: ModelHandle, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual = LocateEditor._residual
    monkeypatch.setattr(LocateEditor, "_residual", lambda *args: -residual(*args))
    with pytest.raises(AssertionError, match="changed by -"):
        check_learns(learning("memit", handle, stream), stream, two_subjects(stream)[0])


@pytest.mark.parametrize("name", TAUGHT)
def test_an_editor_that_starts_afresh_with_every_edit_breaks_the_law_of_keeping(name: str, handle: ModelHandle, stream: Any) -> None:
    editor = learning(name, handle, stream)
    empty, own = editor.state_dict(), editor._edit

    def forgetful(b: EditBatch) -> dict[str, float]:
        editor.load_state_dict(empty)
        return own(b)

    editor._edit = forgetful  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="are left after the second edit"):
        check_keeps(editor, stream, *two_subjects(stream))


def test_an_edit_that_fails_breaks_the_law_of_learning(handle: ModelHandle, stream: Any) -> None:
    editor = learning("finetune", handle, stream)
    refusing(editor, lambda b: EditFailed("the loss became nan") if editor.step == 2 else None)
    with pytest.raises(AssertionError, match="the loss became nan"):
        check_keeps(editor, stream, *two_subjects(stream))


@contextmanager
def small(handle: ModelHandle, most: float, size: Callable[[torch.Tensor], int] = len) -> Iterator[list[int]]:
    """A model that has memory for forwards of such a size, by default so many rows; the sizes that were tried."""
    sizes: list[int] = []

    def check(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(size(args[0]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with handle.hooked(handle.model.get_input_embeddings(), check, pre=True):
        yield sizes


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_out_of_memory_in_a_probe_halves_the_forward_and_changes_no_answer(edits: list[EditEvent], tmp_path: Any, packed: bool) -> None:
    save("gpt2", tmp_path)
    handle = load(str(tmp_path), device="cpu")
    predictor = ModelPredictor(handle, None if packed else lambda batch: nullcontext())
    asks, texts = [Ask(e.prompt) for e in edits[:7]], [e.prompt for e in edits[:5]]
    answers = [e.target for e in edits[:7]]

    def answered() -> tuple[Any, ...]:
        own = predictor.respond(asks, answers, 4)
        return own, predictor.score(asks, answers), predictor.text_logprobs(texts), predictor.inspect(asks, layers=(0,))

    predictor.generate(asks[:1], 1)  # compares packed rows with plain forwards once
    with small(handle, math.inf, torch.numel) as tokens:
        whole = answered()
    most, size = (0.6 * tokens[0], torch.numel) if packed else (3, len)
    with small(handle, most, size) as sizes:
        parts = answered()
    assert [a.generated for a in whole[0]] == [a.generated for a in parts[0]]
    assert [a.first_ids for a in whole[0]] == [a.first_ids for a in parts[0]]
    for a, b in zip([x.score for x in whole[0]] + whole[1], [x.score for x in parts[0]] + parts[1], strict=True):
        np.testing.assert_array_equal(a.hits, b.hits)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    for a, b in zip(whole[2] + [x.hidden for x in whole[3]], parts[2] + [x.hidden for x in parts[3]], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert sizes[0] > most >= max(sizes[1:]), "it runs out once, and no forward is as large again"
    assert handle.memory_limit.notes == ["memory ran out with 7 prompts in one forward: from there on at most 3"]


def test_a_single_prompt_that_memory_has_no_room_for_is_told(tmp_path: Any) -> None:
    save("gpt2", tmp_path)
    handle = load(str(tmp_path), device="cpu")
    with small(handle, 0), pytest.raises(memory.OutOfMemory, match="single prompt"):
        ModelPredictor(handle).generate([Ask("one"), Ask("two")])
