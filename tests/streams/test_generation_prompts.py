"""Generation prompts of CounterFact's published records: which are read, and what the probe asks where there are none."""

from __future__ import annotations

import json
from pathlib import Path

from streams.base import StreamConfig
from testbed.core.registry import STREAMS
from testbed.experiment.schedule import ScheduleConfig, build
from testbed.probes.base import ProbeConfig
from testbed.probes.generation import Generation
from tests.helpers.plain_stream import plain


def record(i: int) -> dict[str, object]:
    """A record in the form that ROME published."""
    rewrite = {"prompt": "{} plays the", "subject": f"Ann {i}", "relation_id": "P1303"}
    rewrite |= {"target_new": {"str": "piano", "id": "Q5994"}, "target_true": {"str": "guitar", "id": "Q6607"}}
    more = {"paraphrase_prompts": [f"Ann {i}, a master of the"], "neighborhood_prompts": [f"Bob {i} plays the"]}
    return {
        "case_id": i,
        "requested_rewrite": rewrite,
        **more,
        "generation_prompts": [f"Ann {i} is known for", f"Ann {i} is known for", f"Ann {i} was"],
    }


def test_each_prompt_of_a_record_is_asked_once_with_the_value_and_its_id(tmp_path: Path) -> None:
    (tmp_path / "counterfact.json").write_text(json.dumps([record(i) for i in range(30)]))
    stream = STREAMS.get("counterfact-yearly")(StreamConfig(data_root=tmp_path, revise=0, revert=0, retire=0))
    events = stream.events(8)
    schedule = build(stream, events, ScheduleConfig(budget=10**6, asked=ProbeConfig(also=("generation",))))
    asked = [q.plan for s in schedule.steps for q in s.questions if q.probe == "generation"]
    assert {p.edit.event.id for p in asked if p.edit} == {e.id for e in events}
    for plan in asked:
        question, edit = plan.question, plan.edit
        assert edit and question.prompt in {f"{edit.event.subject} is known for", f"{edit.event.subject} was"}
        assert (question.split, question.scoring, question.answer) == ("generation", "sample", "piano")
        assert (question.topic, question.aliases) == ("P1303", ("Q5994",))
    assert Generation().notes(asked) == []


def test_the_prompt_and_its_paraphrases_stand_in_and_a_note_says_so() -> None:
    stream = plain(8)
    schedule = build(stream, stream.all, ScheduleConfig(budget=10**6, asked=ProbeConfig(also=("generation",))))
    asked = [q.plan for s in schedule.steps for q in s.questions if q.probe == "generation"]
    edits = {p.edit.event.id for p in asked if p.edit}
    for plan in asked:
        own = [q.prompt for q in stream.questions(plan.edit.event) if q.split in ("edit", "text_generality")] if plan.edit else []
        assert plan.question.prompt in own and plan.question.scoring == "sample"
    (note,) = Generation().notes(asked)
    assert note.startswith(f"generation: {len(edits)} of {len(edits)} edits have no generation prompts in their records: the edit's own")
