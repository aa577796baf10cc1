"""The contract on every registered editor, on random tiny models: an image-text model and a text-only one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from streams.base import StreamConfig
from testbed.checks.contract import title
from testbed.checks.editors import CHECKS, EditorCase, check_learns, two_subjects
from testbed.core.registry import STREAMS
from testbed.model.loading import load
from tests.helpers.editor_suite import IN_CONTEXT, NAMES, STREAM, case_of, learners, make
from tests.helpers.models import build


def stream_of(kind: str) -> Any:
    return STREAMS.get(STREAM[kind])(StreamConfig(revert=0, retire=0))


def test_there_are_editors_and_checks() -> None:
    assert {"noop", "oracle", "finetune", "balancedit"} <= set(NAMES)
    assert len(CHECKS) >= 15
    assert len({title(c) for c in CHECKS}) == len(CHECKS)


@pytest.fixture(params=sorted(STREAM), ids=str)
def case(request: pytest.FixtureRequest, name: str) -> EditorCase:
    return case_of(name, build(request.param), stream_of(request.param))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=title)
def test_an_editor_keeps_its_contract(check: Callable[[EditorCase], None], case: EditorCase) -> None:
    check(case)


def test_every_editor_says_how_it_learns() -> None:
    assert sorted(name for how in ("training", "context", "rule", "no") for name in learners(how)) == sorted(NAMES)
    assert {"finetune", "balancedit", "memit", "lora"} <= set(learners("training"))


@pytest.mark.parametrize("name", learners("context"))
@pytest.mark.parametrize("kind", sorted(STREAM))
def test_a_fact_in_the_prompt_makes_its_target_likelier_on_the_committed_model(name: str, kind: str) -> None:
    """A random model does not read its prompt, so that such editors are tested on a trained one."""
    stream = stream_of(kind)
    editor = make(name, load("tiny", device="cpu"), stream, **IN_CONTEXT.get(name, {}))
    check_learns(editor, stream, two_subjects(stream)[0])
