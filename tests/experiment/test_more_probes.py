"""Probes that are asked on demand: self-assessment, persistence and the instruction of WILD, question by question."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from testbed.core.registry import PROBES
from testbed.experiment.config import RunConfig
from testbed.experiment.schedule import Schedule, ScheduleConfig, build
from testbed.probes.base import ProbeConfig
from testbed.probes.persistence import PREFIXES
from testbed.probes.qa_prompt import SPLITS
from tests.helpers.plain_stream import Line, PlainStream

MORE = ("generation", "persistence", "qa-prompt", "safety", "self-assessment")
STREAM = PlainStream([Line(1 + i / 40, None if i < 10 else i - 10) for i in range(20)])


def schedule(also: tuple[str, ...], budget: int = 10**6) -> Schedule:
    return build(STREAM, STREAM.all, ScheduleConfig(1, 0, budget, asked=ProbeConfig(also=also)))


def questions(planned: Schedule, probe: str) -> list[tuple[int, Any]]:
    return [(s.checkpoint.step, q) for s in planned.steps for q in s.questions if q.probe == probe]


def test_they_are_asked_on_demand_alone_and_leave_the_other_questions_as_they_are() -> None:
    assert {n for n, cls in PROBES.items() if not cls.default} == set(MORE)
    usual, more = schedule(()), schedule(MORE)
    assert not any(questions(usual, name) for name in MORE)
    assert all(questions(more, name) for name in MORE)
    rest = [[q for q in s.questions if q.probe not in MORE] for s in more.steps]
    assert rest == [list(s.questions) for s in usual.steps]


def test_each_edit_is_assessed_in_both_orders_with_and_without_uncertain() -> None:
    asked = [q.plan for _, q in questions(schedule(MORE), "self-assessment")]
    assert asked
    edit = asked[0].edit.event
    own = [p.question for p in asked if p.edit.event.id == edit.id][:4]
    assert [(q.answer, q.choices) for q in own] == [("B", ("A", "B")), ("B", ("A", "B", "C")), ("A", ("A", "B")), ("A", ("A", "B", "C"))]
    assert own[0].prompt == f"{edit.prompt}\nA. {edit.previous}\nB. {edit.target}\nAnswer:"
    assert own[3].prompt == f"{edit.prompt}\nA. {edit.target}\nB. {edit.previous}\nC. uncertain\nAnswer:"
    assert all(q.scoring == "sum" and q.split == "self_assessment" and q.event_id == edit.id for q in own)


def test_edits_and_paraphrases_are_asked_behind_the_instruction_with_the_same_answer() -> None:
    planned = schedule(MORE)
    usual = {(s, q.plan.question.prompt): q.plan.question for s, q in questions(planned, "retention") + questions(planned, "generality")}
    asked = [(s, q.plan.question) for s, q in questions(planned, "qa-prompt")]
    assert {q.split for _, q in asked} <= set(SPLITS.values()) and asked
    for step, q in asked:
        prompt = q.prompt.removeprefix("Please answer the question:\n\nQ: ").removesuffix("\nA:")
        assert usual[step, prompt].answer == q.answer and SPLITS[usual[step, prompt].split] == q.split


def test_each_edit_is_asked_behind_five_sentences_and_judged_by_the_old_answer() -> None:
    asked = [q.plan for _, q in questions(schedule(MORE), "persistence")]
    counts = Counter(p.edit.event.id for p in asked)
    assert counts and all(n % len(PREFIXES) == 0 for n in counts.values())
    for p in asked:
        edit = p.edit.event
        assert p.question.answer == edit.previous != edit.target
        assert p.question.prompt in {f"{prefix} {edit.prompt}" for prefix in PREFIXES}
        assert p.question.split == "persistence" and p.question.scoring == "generate"
    assert len(PREFIXES) == 5 and len(set(PREFIXES)) == 5


def test_edits_without_an_old_answer_are_left_out() -> None:
    new = PlainStream([Line(1 + i / 40) for i in range(6)])
    planned = build(new, new.all, ScheduleConfig(1, 0, 10**6, asked=ProbeConfig(also=MORE)))
    assert not any(questions(planned, name) for name in ("persistence", "self-assessment"))


def test_a_name_that_is_no_such_probe_is_refused() -> None:
    for name in ("retention", "nonsense"):
        with pytest.raises(Exception, match=", ".join(MORE)):
            RunConfig(set=(f"probes.also={name}",)).resolve_probes()
    assert RunConfig(set=(f"probes.also={','.join(MORE)}",)).resolve_probes().also == MORE
