"""In-context demonstrations, and answers rewritten by a second model; on random tiny models."""

from __future__ import annotations

from typing import Any

import pytest

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.editors.base import BadEditor
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.ike import PATTERN, Ike, IkeConfig
from testbed.editors.retrieval.postedit import PostEdit, PostEditConfig
from testbed.model.predictor import Response
from tests.helpers.models import build, folder
from tests.helpers.retrieval_facts import ELSE, FACTS, NAMES, POOL, base, fact, own, same

PARAPHRASE = "The leader is"


def ike(n: int, pool: TrainPool = POOL, events: Any = FACTS) -> Ike:
    editor = Ike(IkeConfig(encoder="bm25", demonstrations=n))
    editor.prepare(build("llama"), pool)
    for step, e in enumerate(events, 1):
        editor.apply(EditBatch((e,), step, {e.id: (f"{PARAPHRASE} {step}",)}))
    return editor


def postedit(events: Any = FACTS) -> PostEdit:
    editor = PostEdit(PostEditConfig(encoder="bm25", model=str(folder("llama", 1))))
    editor.prepare(build("llama"), POOL)
    for step, e in enumerate(events, 1):
        editor.apply(EditBatch((e,), step))
    return editor


def test_kinds_stand_in_the_papers_proportion():
    assert [PATTERN.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]


def test_demonstrations_copy_update_and_retain_the_nearest_last():
    predictor: Any = ike(4).predictor()
    reading = predictor.read([own(FACTS[2])], 4)[0]
    near = [f.fact for f in predictor.retriever.nearest([own(FACTS[2])], 5)[0]]
    assert near[0].event_id == FACTS[2].id
    shown = predictor.demonstrations(own(FACTS[2]), near[1:])
    assert reading.ask.prompt == " ".join([*shown[::-1], f"Facts: 1) {FACTS[2].prompt} {FACTS[2].target}. Question: {FACTS[2].prompt}"])
    retain, update, _, copy = shown
    assert retain.startswith(f"Facts: 1) {near[1].prompt} {near[1].target}.") and retain.endswith(" red.")
    assert f"Question: {PARAPHRASE}" in update and update.endswith(f"{near[2].target}.")
    assert copy == f"Facts: 1) {near[4].prompt} {near[4].target}. Question: {near[4].prompt} {near[4].target}."
    assert reading.notes["used"] == [FACTS[2].id] and reading.notes["demonstrations"] == 4


def test_without_a_pool_there_is_nothing_to_retain_and_it_says_so():
    editor = ike(4, TrainPool())
    assert any("no retain" in n for n in editor.notes)
    predictor: Any = editor.predictor()
    assert predictor.read([own(FACTS[2])], 4)[0].notes["demonstrations"] == 2


def test_demonstrations_that_do_not_fit_are_dropped_from_the_farthest():
    events = [fact(i, " ".join(f"w{j}" for j in range(12)), name=f"{NAMES[0]} {i}") for i in range(12)]
    editor = ike(10, events=events)
    predictor: Any = editor.predictor()
    reading = predictor.read([own(events[3])], 8)[0]
    assert reading.notes["dropped"] > 0
    assert predictor.tokens(reading.ask) + 8 <= editor.handle.window
    assert reading.ask.prompt.endswith(f"Question: {events[3].prompt}") and reading.notes["used"] == [events[3].id]
    assert reading.notes["added_tokens"] == predictor.tokens(reading.ask) - predictor.tokens(own(events[3]))


def test_a_fact_that_does_not_fit_leaves_the_question_alone():
    found = ike(2, events=[fact(0, "x" * 3000)]).predictor().respond([own(FACTS[0])], ["green"], 4)
    assert same(found, base([own(FACTS[0])]))
    assert found[0].extras["used"] == [] and found[0].extras["added_tokens"] == 0


def test_paraphrases_are_kept_with_the_state():
    editor, other = ike(4), ike(4, events=[])
    other.load_state_dict(editor.state_dict())
    assert other.rephrased == editor.rephrased and len(editor.rephrased) == 5


def test_without_an_editor_model_the_command_that_makes_one_is_named():
    with pytest.raises(BadEditor, match=r"testbed\.pretrain .*--course rewriting .*postedit\.model=DIR"):
        PostEdit().prepare(build("llama"), POOL)
    with pytest.raises(BadEditor, match=r"cannot be loaded.*--course rewriting"):
        PostEdit(PostEditConfig(model="/no/such/folder")).prepare(build("llama"), POOL)


def writes(predictor: Any, text: str) -> list[Ask]:
    """Makes the editor model write `text`; returns what it is asked."""
    asked: list[Ask] = []

    def respond(asks: list[Ask], answers: Any, n: int = 16) -> list[Response]:
        asked.extend(asks)
        return [Response(text) for _ in asks]

    predictor.writer.respond = respond
    return asked


@pytest.mark.parametrize("said", ["retain", " Retain. "])
def test_an_answer_that_stands_is_the_bases_bit_for_bit(said):
    predictor = postedit().predictor()
    writes(predictor, said)
    asks = [own(FACTS[0]), *ELSE]
    found = predictor.respond(asks, ["green"] * 3, 4)
    assert same(found, base(asks))
    assert all(r.extras["used"] == [] and r.extras["added_tokens"] > 0 for r in found)


def test_the_editor_model_reads_fact_question_and_answer_and_its_text_counts():
    predictor = postedit().predictor()
    asked = writes(predictor, "Mara Venn")
    found = predictor.respond([own(FACTS[1])], ["green"], 4)[0]
    before = base([own(FACTS[1])])[0].generated
    fact_ = prompts.statement(FACTS[1].prompt, FACTS[1].target)
    assert [a.prompt for a in asked] == [prompts.rewrite(fact_, FACTS[1].prompt, before)]
    assert (found.generated, found.extras["before"], found.extras["used"]) == ("Mara Venn", before, [FACTS[1].id])


def test_a_fact_too_long_for_the_editor_model_is_dropped_and_counted():
    predictor = postedit([fact(0, "x" * 3000)]).predictor()
    asked = writes(predictor, "never asked")
    found = predictor.respond([own(FACTS[0])], ["green"], 4)
    assert asked == [] and same(found, base([own(FACTS[0])]))
    assert found[0].extras["dropped"] == 1
