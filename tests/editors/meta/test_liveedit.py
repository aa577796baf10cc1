"""LiveEdit: the module against its equations, the route of a prompt, and how edits and the training behave."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streams.base import StreamConfig, TrainEdit, TrainPool
from testbed.checks.editors import answers, batch, equal_states, frozen, same, same_up_to_rounding
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.core.registry import STREAMS
from testbed.editors.base import BadEditor
from testbed.editors.meta.examples import drawn, examples_of, generator_of
from testbed.editors.meta.liveedit import LiveEdit, LiveEditConfig, derived
from testbed.editors.meta.liveedit_network import Experts, Features, own_similarity, passing, similarity, soft_weights
from testbed.editors.meta.liveedit_training import LiveEditTask, rows_of
from testbed.model.encoding import collate
from testbed.model.generation import greedy_decoding
from testbed.model.loading import load
from testbed.model.predictor import ModelPredictor
from tests.helpers.facts import FACTS, META_POOL, fact
from tests.helpers.models import Noise, build

BRIEF: dict[str, Any] = {"train_steps": 2, "judge_every": 2, "train_batch": 4}
PICTURED = [replace(fact("this one", t, picture=n), subject=f"s{n}", id="") for n, t in enumerate(("green", "Mara Venn", "two red towers"))]


def train_edit(n: int) -> TrainEdit:
    """An edit about one of many pictures, with another prompt for it, and another picture for which its answer stays."""
    event = replace(fact("this one", ("green", "Mara Venn")[n % 2], picture=100 + n), subject=f"train {n}", id="")
    beside = Question("locality_hard", event.prompt, "blue", image=Noise(200 + n), topic="x")
    return TrainEdit(event, (Ask("Name the head.", event.image),), (beside,))


POOLS = {"llama": META_POOL, "gpt2": META_POOL, "llava": TrainPool(find_edits=lambda: tuple(map(train_edit, range(12))))}


def editor(kind: str = "llava", **config: Any) -> LiveEdit:
    made = LiveEdit(LiveEditConfig(**{**BRIEF, **config}))
    made.prepare(build(kind), POOLS[kind])
    return made


def open_to_all(made: LiveEdit) -> LiveEdit:
    """The editor with a module that lets every expert pass and makes experts that are not small."""
    tensors = {n: t.clone() for n, t in made.network.tensors.items()}
    for n in ("ask.text.bv", "edit.text.bv", "ask.look.bv", "edit.look.bv"):
        tensors[n] += 3.0
    tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith("look.wv")}
    tensors["ask.look.bv"] = tensors["edit.look.bv"] / 2  # less like itself than like an edit, as the sentinel is read with it
    tensors |= {n: 30 * tensors[n] for n in ("u.wv", "u.bv", "v.wv", "v.bv")}
    made.network = made.network.with_tensors(tensors)
    return made


def closed(made: LiveEdit) -> LiveEdit:
    """The editor with a module that lets no expert pass."""
    tensors = {n: torch.zeros_like(t) if n.startswith("edit.") and n.endswith(("wv", "bv")) else t for n, t in made.network.tensors.items()}
    tensors["ask.look.bv"] = tensors["ask.look.bv"] + 3.0
    made.network = made.network.with_tensors(tensors)
    return made


def applied(made: LiveEdit, *events: EditEvent, step: int = 1) -> LiveEdit:
    assert not made.apply(EditBatch(events, step)).failed
    return made


def random_features(n: int, seed: int, pictured: bool = True) -> Features:
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(n, 2, 6, generator=g) for _ in range(3))
    return Features(a, b, c, torch.full((n,), pictured))


def test_similarity_is_the_scaled_mean_of_dot_products() -> None:
    a, b = random_features(3, 0).visual, random_features(4, 1).visual
    plain = [[sum(float(x @ y) for x, y in zip(p, q)) / 2 / 6**0.5 for q in b] for p in a]
    assert np.allclose(similarity(a, b).numpy(), plain, atol=1e-6)
    assert np.allclose(own_similarity(a, a).numpy(), similarity(a, a).diagonal().numpy(), atol=1e-6)


def test_soft_weights_are_a_softmax_among_what_passed_times_a_sigmoid() -> None:
    s = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, 2.0]])
    passed = torch.tensor([[True, False, True], [False, False, False]])
    e = np.exp([1.0, 0.5])
    want = e / e.sum() / (1 + np.exp([-1.0, -0.5]))
    found = soft_weights(s, passed)
    assert np.allclose(found[0].numpy(), [want[0], 0, want[1]], atol=1e-6)
    assert not found[1].any()


def test_hard_routing_compares_with_the_sentinel_and_keeps_kinds_of_edits_apart() -> None:
    asked = random_features(2, 0)
    least = own_similarity(asked.visual, asked.sentinel)
    visual, textual = torch.stack([least + 0.1, least - 0.1], 1), torch.tensor([[-1.0, 1.0]] * 2)
    assert passing(asked, visual, textual, torch.tensor([True, True])).tolist() == [[True, False]] * 2
    assert not passing(asked, visual, textual, torch.tensor([False, False])).any()
    words = replace(asked, pictured=torch.tensor([False, False]))
    assert passing(words, visual, textual, torch.tensor([False, False])).tolist() == [[False, True]] * 2
    assert not passing(words, visual, textual, torch.tensor([True, True])).any()


def test_features_survive_being_put_into_one_row() -> None:
    asked = random_features(3, 2)
    back = Features.of_flat(asked.flat(), 2)
    assert all(torch.equal(getattr(asked, k), getattr(back, k)) for k in ("textual", "visual", "sentinel", "pictured"))


def test_experts_add_what_equation_6_says() -> None:
    made = editor()
    g = torch.Generator().manual_seed(0)
    d = made.handle.width
    states, (u, v) = torch.randn(2, 5, d, generator=g), torch.randn(2, 3, 4, d, generator=g)
    weights = torch.rand(2, 3, generator=g)
    normed = torch.nn.functional.layer_norm(states, (d,), made.network.tensors["act.gain"], made.network.tensors["act.bias"])
    want = torch.zeros_like(states)
    for b in range(2):
        for t in range(5):
            want[b, t] = sum(weights[b, n] * v[n].mT @ (u[n] @ normed[b, t]).clamp(min=0) for n in range(3))
    assert torch.allclose(made.network.added(states, u, v, weights), want, atol=1e-3)


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_a_miss_and_an_empty_memory_are_bit_equal_to_the_model_on_padded_prompts(kind: str) -> None:
    events = PICTURED if kind == "llava" else FACTS
    made = closed(editor(kind))
    asks = [e.ask() for e in events]
    plain = ModelPredictor(made.handle, lambda batch: made.handle.swapped({}))  # padded, as every gated editor is asked
    assert same(answers(made.predictor(), asks), answers(plain, asks))
    applied(made, *events)
    found = answers(made.predictor(), asks)
    assert [r.extras["entry"] for r in found] == [None] * 3
    assert same(found, answers(plain, asks))


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_experts_act_on_scores_and_texts_alike_and_undo_gives_every_earlier_answer_back(kind: str) -> None:
    events = PICTURED if kind == "llava" else FACTS
    made = applied(open_to_all(editor(kind)), *events[:2])
    asks = [e.ask() for e in events]
    before = answers(made.predictor(), asks)
    assert [r.extras["experts"] for r in before] == [2] * 3
    assert not same_up_to_rounding(before, answers(ModelPredictor(made.handle), asks))
    scores = made.predictor().score(asks, ["yes"] * 3)
    assert all(r.score is not None and np.allclose(r.score.logprobs, s.logprobs, atol=1e-4) for r, s in zip(before, scores))
    applied(made, events[2], step=2)
    assert not same_up_to_rounding(before, answers(made.predictor(), asks))
    assert same(answers(made.as_of(1), asks), before)
    made.revert([events[2].id])
    assert same(answers(made.predictor(), asks), before)
    made.revert([e.id for e in events[:2]])
    plain = ModelPredictor(made.handle, lambda batch: made.handle.swapped({}))
    assert same(answers(made.predictor(), asks), answers(plain, asks))


def test_a_new_token_meets_the_experts_as_it_does_in_one_forward_of_the_whole_row() -> None:
    """Tokens that are generated with a cache are the likeliest ones of a forward without one."""
    made = applied(open_to_all(editor()), *PICTURED)
    ask, handle = PICTURED[0].ask(), made.handle
    around = made.predictor().around  # type: ignore[attr-defined]
    batch_of = collate(handle, [ask], side="left")
    with torch.no_grad(), around(batch_of), greedy_decoding(handle):
        tokens = handle.model.generate(**batch_of.inputs, max_new_tokens=4)[0, batch_of.prompt.shape[1] :].tolist()
    whole = collate(handle, [ask], [tokens], side="left")
    with torch.no_grad(), around(whole):
        likeliest = handle.model(**whole.inputs, use_cache=False).logits[whole.before_answer].argmax(-1)
    with torch.no_grad():
        plain = handle.model(**whole.inputs, use_cache=False).logits[whole.before_answer].argmax(-1)
    assert likeliest.tolist() == tokens
    assert plain.tolist() != tokens


def test_the_route_of_a_prompt_depends_on_no_batch_padding_or_answer() -> None:
    made = applied(open_to_all(editor()), *PICTURED)
    asks = [PICTURED[0].ask(), Ask("Who leads this one now, and since which year of the old calendar?", Noise(1)), PICTURED[2].ask()]
    together = made.predictor().respond(asks, ["green", "Mara Venn", None], 4)
    alone = [made.predictor().respond([a], [None], 4)[0] for a in asks]
    assert [r.generated for r in together] == [r.generated for r in alone]
    for a, b in zip(together, alone):
        assert a.extras["entry"] == b.extras["entry"] and a.extras["experts"] == b.extras["experts"]
        assert a.extras["weight"] == pytest.approx(b.extras["weight"], abs=2e-4)


def test_the_order_of_unrelated_edits_changes_no_bit() -> None:
    one = applied(open_to_all(editor()), *PICTURED)
    two = open_to_all(editor())
    for step, e in enumerate(reversed(PICTURED), 1):
        applied(two, e, step=step)
    asks = [e.ask() for e in PICTURED]
    assert same(answers(one.predictor(), asks), answers(two.predictor(), asks))


def test_the_newest_edit_of_a_fact_answers_and_undo_brings_the_older_one_back() -> None:
    made = applied(open_to_all(editor()), PICTURED[0])
    ask = [PICTURED[0].ask()]
    before = answers(made.predictor(), ask)
    newer = replace(PICTURED[0], target="Mara Venn", id="")
    applied(made, newer, step=2)
    found = answers(made.predictor(), ask)
    assert (found[0].extras["entry"], found[0].extras["experts"]) == (newer.id, 1)
    made.revert([newer.id])
    assert same(answers(made.predictor(), ask), before)
    with pytest.raises(BadEditor, match="cannot undo"):
        made.revert([newer.id])


def test_an_expert_depends_on_its_edit_alone() -> None:
    one, two = applied(editor(), *PICTURED), applied(editor(), PICTURED[1])
    assert torch.equal(one.experts["u"][1], two.experts["u"][0])
    assert torch.equal(one.experts["visual"][1], two.experts["visual"][0])


@cache
def task_of(kind: str) -> tuple[LiveEdit, LiveEditTask]:
    made = editor(kind)
    network = made.network.with_tensors({n: t.clone().requires_grad_(True) for n, t in made.network.tensors.items()})
    return made, LiveEditTask(made.handle, made.layer, network, examples_of(made.handle, POOLS[kind].edits, 0.2), made.hyper)


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_the_gradient_reaches_every_part_that_is_used(kind: str) -> None:
    _, task = task_of(kind)
    for t in task.tensors.values():
        t.grad = None
    task.loss(generator_of(0, 1)).backward()
    moved = {n.rpartition(".")[0] for n, t in task.tensors.items() if t.grad is not None and bool(t.grad.any())}
    assert {"edit.text", "ask.text", "u", "v", "act"} <= moved
    assert ({"edit.look", "ask.look", "ask.pick"} <= moved) == (kind == "llava")
    assert all(p.grad is None for p in task.handle.model.parameters())


def test_no_row_is_given_the_expert_of_another_edit_of_its_question() -> None:
    _, task = task_of("llava")
    examples = drawn(task.examples.train, 4, generator_of(0, 1))
    doubled = [examples[0], replace(examples[0], answer="two red towers"), *examples[1:3]]
    run = task.run(doubled)
    for seed in range(6):
        given = task._given(run, generator_of(seed, 0))
        own = torch.eye(4, dtype=torch.bool)
        assert bool(given[:4][own].all()) and bool(given[4:8][own].all())
        for rows in (given[:4], given[4:8]):
            assert not rows[0, 1] and not rows[1, 0]


def test_text_routing_is_not_taught_to_tell_pictures_apart_and_hard_routing_is() -> None:
    _, task = task_of("llava")
    run = task.run(drawn(task.examples.train, 4, generator_of(0, 1)))
    assert bool(run.alike.all())  # one question about many pictures
    assert int(run.same.sum()) < run.same.numel()
    assert float(task._hard_routing(run, torch.arange(8)).detach()) > 0
    text = task_of("llama")[1]
    other = text.run(drawn(text.examples.train, 4, generator_of(0, 1)))
    assert torch.equal(other.alike, other.same)


def test_the_states_that_are_trained_on_are_those_that_an_edit_meets() -> None:
    """The suffix behind the layer with what experts add gives the model's own logits with a gate in place."""
    made = applied(open_to_all(editor()), *PICTURED)
    ask, answer = PICTURED[0].ask(), "Mara Venn"
    rows = rows_of(made.handle, made.layer, [ask], [answer], torch.device("cpu"))
    order = sorted(range(3), key=lambda i: PICTURED[i].id)
    at = {n: t[order] for n, t in made.experts.items()}
    experts = Experts(tuple(PICTURED[i].id for i in order), at["u"], at["v"], at["visual"], at["textual"], at["pictured"] > 0)
    with torch.no_grad():
        weights, _ = made.network.route(experts, made.network.features("ask", rows.states, rows.masks))
        log_p = rows.log_probabilities(made.network.added(rows.states, experts.u, experts.v, weights))
    own: Tensor = log_p.gather(1, rows.batch.answer_ids[:, None])[:-1, 0]  # the end token is not scored
    (score,) = made.predictor().score([ask], [answer])
    assert np.allclose(own.numpy(), score.logprobs, atol=1e-3)


def test_a_training_is_noted_cached_and_the_same_for_every_seed_of_a_run() -> None:
    made, again = editor(), LiveEdit(LiveEditConfig(**BRIEF), seed=9)
    again.prepare(build("llava"), POOLS["llava"])
    assert any(n.startswith("meta-training on ") for n in made.notes)
    assert equal_states(frozen(made.state_dict()), frozen(again.state_dict()))
    other = LiveEdit(LiveEditConfig(**{**BRIEF, "scale": 4.0}))
    other.bind(build("llava"))
    assert other._key(POOLS["llava"].edits) != made._key(POOLS["llava"].edits)


def test_sizes_are_derived_and_said_and_wrong_ones_refused() -> None:
    tiny = load("tiny", device="cpu")
    values = derived(tiny)
    assert values["layer"] == 2 and values["width"] % values["heads"] == 0 and tiny.width % values["heads"] == 0
    with pytest.raises(BadEditor, match="below the last"):
        editor(layer=-1)
    with pytest.raises(BadEditor, match="heads must divide"):
        editor(heads=7)


def test_text_streams_are_routed_by_text_alone_and_a_note_says_so() -> None:
    assert any("routed by text alone" in n for n in editor("llama").notes)
    assert not any("routed by text alone" in n for n in editor("llava").notes)


@pytest.mark.ci
def test_a_short_training_on_the_committed_model_reaches_new_edits_and_makes_their_answers_likelier() -> None:
    stream = STREAMS.get("okedit-yearly")(StreamConfig(revert=0, retire=0))
    made = LiveEdit(LiveEditConfig(train_steps=100, judge_every=100))
    made.prepare(load("tiny", device="cpu"), stream.train_pool())
    events = [e for e in stream.events(40) if e.kind == "add"][:8]
    before = nats(ModelPredictor(made.handle), events)
    assert not made.apply(batch(stream, events)).failed
    assert nats(made.predictor(), events) < before - 0.5


def nats(predictor: Any, events: list[EditEvent]) -> float:
    """The mean loss of the edits' answers, nats a token."""
    return -float(np.mean([s.logprobs.mean() for s in predictor.score([e.ask() for e in events], [e.target for e in events])]))
