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
from tests.helpers.retrieval_facts import FACTS, NAMES, POOL, UNRELATED, ask_about, base_responses, fact, same_responses

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


def test_kinds_of_demonstrations_have_the_papers_proportion():
    assert [PATTERN.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]


def test_demonstrations_copy_update_and_retain_the_nearest_last():
    predictor: Any = ike(4).predictor()
    prompted = predictor.add_facts([ask_about(FACTS[2])], 4)[0]
    near = [f.fact for f in predictor.retriever.nearest([ask_about(FACTS[2])], 5)[0]]
    assert near[0].event_id == FACTS[2].id
    shown = predictor.demonstrations(ask_about(FACTS[2]), near[1:])
    assert prompted.ask.prompt == " ".join([*shown[::-1], f"Facts: 1) {FACTS[2].prompt} {FACTS[2].target}. Question: {FACTS[2].prompt}"])
    retain, update, _, copy = shown
    assert retain.startswith(f"Facts: 1) {near[1].prompt} {near[1].target}.") and retain.endswith(" red.")
    assert f"Question: {PARAPHRASE}" in update and update.endswith(f"{near[2].target}.")
    assert copy == f"Facts: 1) {near[4].prompt} {near[4].target}. Question: {near[4].prompt} {near[4].target}."
    assert prompted.notes["used"] == [FACTS[2].id] and prompted.notes["demonstrations"] == 4


def test_without_a_train_pool_there_are_no_retain_demonstrations_and_a_note_says_so():
    editor = ike(4, TrainPool())
    assert any("no retain" in n for n in editor.notes)
    predictor: Any = editor.predictor()
    assert predictor.add_facts([ask_about(FACTS[2])], 4)[0].notes["demonstrations"] == 2


def test_demonstrations_that_do_not_fit_are_dropped_from_the_farthest():
    events = [fact(i, " ".join(f"w{j}" for j in range(12)), name=f"{NAMES[0]} {i}") for i in range(12)]
    editor = ike(10, events=events)
    predictor: Any = editor.predictor()
    prompted = predictor.add_facts([ask_about(events[3])], 8)[0]
    assert prompted.notes["dropped"] > 0
    assert predictor.tokens(prompted.ask) + 8 <= editor.handle.window
    assert prompted.ask.prompt.endswith(f"Question: {events[3].prompt}") and prompted.notes["used"] == [events[3].id]
    assert prompted.notes["added_tokens"] == predictor.tokens(prompted.ask) - predictor.tokens(ask_about(events[3]))


def test_a_question_is_asked_alone_when_its_fact_does_not_fit():
    found = ike(2, events=[fact(0, "x" * 3000)]).predictor().respond([ask_about(FACTS[0])], ["green"], 4)
    assert same_responses(found, base_responses([ask_about(FACTS[0])]))
    assert found[0].extras["used"] == [] and found[0].extras["added_tokens"] == 0


def test_paraphrases_are_kept_with_the_state():
    editor, other = ike(4), ike(4, events=[])
    other.load_state_dict(editor.state_dict())
    assert other.rephrased == editor.rephrased and len(editor.rephrased) == 5


def test_without_a_post_editor_the_message_names_the_command_that_makes_one():
    with pytest.raises(BadEditor, match=r"testbed\.pretrain .*--course rewriting .*postedit\.model=DIR"):
        PostEdit().prepare(build("llama"), POOL)
    with pytest.raises(BadEditor, match=r"cannot be loaded.*--course rewriting"):
        PostEdit(PostEditConfig(model="/no/such/folder")).prepare(build("llama"), POOL)


def writes(predictor: Any, text: str) -> list[Ask]:
    """Makes the post-editor write `text`; returns the list of the requests to it."""
    asked: list[Ask] = []

    def respond(asks: list[Ask], answers: Any, n: int = 16) -> list[Response]:
        asked.extend(asks)
        return [Response(text) for _ in asks]

    predictor.post_editor.respond = respond
    return asked


@pytest.mark.parametrize("said", ["retain", " Retain. "])
def test_a_retained_answer_is_bit_identical_to_the_unedited_models(said):
    predictor = postedit().predictor()
    writes(predictor, said)
    asks = [ask_about(FACTS[0]), *UNRELATED]
    found = predictor.respond(asks, ["green"] * 3, 4)
    assert same_responses(found, base_responses(asks))
    assert all(r.extras["used"] == [] and r.extras["added_tokens"] > 0 for r in found)


def test_the_post_editor_reads_fact_question_and_answer_and_its_reply_is_the_answer():
    predictor = postedit().predictor()
    asked = writes(predictor, "Mara Venn")
    found = predictor.respond([ask_about(FACTS[1])], ["green"], 4)[0]
    before = base_responses([ask_about(FACTS[1])])[0].generated
    fact_ = prompts.statement(FACTS[1].prompt, FACTS[1].target)
    assert [a.prompt for a in asked] == [prompts.rewrite(fact_, FACTS[1].prompt, before)]
    assert (found.generated, found.extras["before"], found.extras["used"]) == ("Mara Venn", before, [FACTS[1].id])


def test_a_fact_too_long_for_the_post_editor_is_dropped_and_counted():
    predictor = postedit([fact(0, "x" * 3000)]).predictor()
    asked = writes(predictor, "never asked")
    found = predictor.respond([ask_about(FACTS[0])], ["green"], 4)
    assert asked == [] and same_responses(found, base_responses([ask_about(FACTS[0])]))
    assert found[0].extras["dropped"] == 1
