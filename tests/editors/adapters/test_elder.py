"""ELDER: the layer, routing that depends on the prompt alone, deferral that is the base itself, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import TrainPool
from testbed.editors.adapters.elder import DEFAULTS, PUBLISHED, Elder, ElderConfig
from testbed.editors.adapters.elder_routing import Mixture, MixtureShape
from testbed.editors.base import BadEditor
from testbed.editors.hyperparameters import filled
from testbed.model.encoding import collate
from testbed.model.predictor import ModelPredictor
from tests.helpers.elder_editors import BESIDE, PICTURED, asks, edited, gate_of, logits, make, scores_of
from tests.helpers.facts import FACTS
from tests.helpers.models import build


def plain_sum(mixture: Mixture, site: int, x: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
    """sum_i s_i V_i^T U_i v over the k best i, in float64, one sequence at a time."""
    out = []
    for prompt, sequence in zip(x.double(), act.double()):
        scores = torch.softmax(mixture.router[site].double() @ prompt, 0)
        best = scores.argsort(descending=True)[: mixture.shape.active].tolist()
        out.append(sum(scores[i] * (mixture.v[site][i].double().T @ mixture.u[site][i].double() @ sequence.T).T for i in best))
    return torch.stack(out)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), experts=st.integers(1, 6), active=st.integers(1, 6), rows=st.integers(1, 4))
def test_a_layer_adds_the_weighted_sum_of_its_best_adapters(seed: int, experts: int, active: int, rows: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = MixtureShape(2, experts, min(active, experts))
    u = tuple(torch.randn(experts, 3, f, generator=g) for f in (5, 7))
    v = tuple(torch.randn(experts, 3, d, generator=g) for d in (4, 6))
    mixture = Mixture(shape, torch.randn(2, experts, 5, generator=g), u, v)
    x, act = torch.randn(rows, 5, generator=g), torch.randn(rows, 3, 7, generator=g)
    got = mixture.adds(mixture.log_scores(x))[1](act)
    torch.testing.assert_close(got.double(), plain_sum(mixture, 1, x, act), atol=1e-4, rtol=1e-4)


def test_with_all_adapters_on_it_is_a_plain_sum_of_lora_weighted_by_softmax() -> None:
    editor = edited(experts=2, active=2)
    x, act = torch.randn(3, editor.targets[0].f), torch.randn(3, 4, editor.targets[1].f)
    m = editor.mixture
    weights = torch.softmax(torch.einsum("bf,nf->bn", x, m.router[1]), 1)
    want = sum(weights[:, i, None, None] * (act @ m.u[1][i].T @ m.v[1][i]) for i in range(2))
    torch.testing.assert_close(m.adds(m.log_scores(x))[1](act), want, atol=1e-5, rtol=1e-4)


def test_renormalised_scores_sum_to_one_over_the_chosen() -> None:
    mixture = Mixture(MixtureShape(1, 3, 2), torch.randn(1, 3, 4), (torch.ones(3, 1, 4),), (torch.ones(3, 1, 2),), renormalise=True)
    act = torch.randn(2, 5, 4)
    want = act.sum(-1, keepdim=True).expand(2, 5, 2)
    torch.testing.assert_close(mixture.adds(mixture.log_scores(torch.randn(2, 4)))[0](act), want)


@pytest.mark.parametrize("kind", ["llava", "gpt2"])
def test_a_deferred_input_gets_the_bases_own_tensor(kind: str) -> None:
    events = PICTURED if kind == "llava" else FACTS
    editor = edited(events, kind, modules=r"\.[12]\.mlp\.(down_proj|c_proj)$")
    none = gate_of(editor, 0)
    what = asks(events)
    batch = collate(editor.handle, what, side="left")
    with torch.no_grad(), none.around(batch):
        act, output = (torch.randn(*batch.prompt.shape, width) for width in (editor.targets[0].f, editor.targets[0].d))
        out = none._call(act, output, batch, none.answers[0][1])
    assert out is None
    assert torch.equal(logits(editor.handle, none, what), logits(editor.handle, None, what))


def test_in_a_mixed_batch_deferred_rows_are_bit_equal_to_the_base_and_the_others_are_not() -> None:
    editor = edited()
    gate = gate_of(editor, editor.eps)
    what = [a for a in asks(PICTURED) + BESIDE if a.image is not None]
    both, base = logits(editor.handle, gate, what), logits(editor.handle, None, what)
    hit = (gate.row >= 0).tolist()
    assert True in hit
    assert False in hit
    for i, h in enumerate(hit):
        assert torch.equal(both[i], base[i]) != h


def test_an_edit_is_answered_by_its_own_code_and_far_text_is_deferred() -> None:
    editor = edited(steps=30, guide=1.0)
    responses = editor.predictor().respond(asks(PICTURED), [e.target for e in PICTURED], 4)
    assert [r.extras for r in responses] == [{"entry": e.id, "distance": 0.0} for e in PICTURED]
    assert [r.generated for r in responses] == [e.target for e in PICTURED]


def test_routing_sees_neither_padding_nor_batch_mates_nor_the_answer() -> None:
    editor = edited()
    what = asks(PICTURED) + BESIDE[2:]
    want = torch.cat([scores_of(editor, [a], "right") for a in what])
    back = list(range(len(what)))[::-1]
    answers = [[40 + i, 50, 60][: 1 + i % 3] for i in range(len(what))]
    for got in (
        scores_of(editor, what, "left"),
        scores_of(editor, what, "right"),
        scores_of(editor, [what[i] for i in back], "left")[back],
        scores_of(editor, what, "right", answers),
        scores_of(editor, what, "left", [a[::-1] for a in answers]),
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert torch.equal(editor.mixture.chosen(got), editor.mixture.chosen(want))


def test_all_routers_read_what_no_adapter_changes() -> None:
    editor = edited()
    batch = collate(editor.handle, asks(PICTURED), side="left")
    gate = gate_of(editor, None)
    before = scores_of(editor, asks(PICTURED), "left")
    with torch.no_grad(), gate.around(batch):
        editor.handle.model(**batch.inputs, use_cache=False)
    assert torch.equal(gate.scores, before)


@pytest.mark.parametrize("kind", ["llava", "gpt2"])
def test_generation_with_and_without_cache_agrees(kind: str) -> None:
    events = PICTURED if kind == "llava" else FACTS
    editor = edited(events, kind, modules=r"\.[12]\.mlp\.(down_proj|c_proj)$", steps=8)
    for eps in (editor.eps, None):
        out = []
        for cache in (True, False):
            batch = collate(editor.handle, asks(events), side="left")
            gate = gate_of(editor, eps)
            with torch.no_grad(), gate.around(batch):
                out.append(editor.handle.model.generate(**batch.inputs, max_new_tokens=6, do_sample=False, use_cache=cache))
            assert (gate.row >= 0).any()
        assert torch.equal(out[0], out[1])


def test_beams_follow_their_prompts_decision() -> None:
    editor = edited()
    batch = collate(editor.handle, asks(PICTURED) + BESIDE[2:], side="left")
    gate = gate_of(editor, editor.eps)
    with torch.no_grad(), gate.around(batch):
        tokens = editor.handle.model.generate(**batch.inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    with torch.no_grad():
        base = editor.handle.model.generate(**batch.inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    assert gate.beams == 3
    assert gate.hit_counts.queries == len(batch.prompt)
    missed = gate.row < 0
    assert missed.any()
    assert (~missed).any()
    width = min(tokens.shape[1], base.shape[1])
    assert torch.equal(tokens[missed, :width], base[missed, :width])


def test_without_deferral_every_prompt_goes_through_the_adapters() -> None:
    editor = edited(defer=False)
    extras = [r.extras for r in editor.predictor().respond(BESIDE, [None] * 4, 1)]
    assert all(x["entry"] is not None for x in extras)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rank": 0}, "rank must be 1 or more"),
        ({"active": 0}, "active must be 1 or more"),
        ({"active": 5, "experts": 4}, "active must be at most experts"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"guide": -1.0}, "guide must be 0 or more"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"planned_edits": 0}, "planned_edits must be 1 or more"),
        ({"paraphrases": -1}, "paraphrases must be 0 or more"),
    ],
)
def test_bad_values_are_told_before_anything_loads(config: dict[str, Any], words: str) -> None:
    assert any(words in p for p in ElderConfig(**config).problems())
    assert ElderConfig().problems() == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rank": 65}, "rank 65 is more than .*down_proj is wide: set rank to 64"),
        ({"experts": 1}, "k = 2 adapters of N = 1"),
        ({"modules": "nothing_of_the_kind"}, "matches no linear map of .* 3 decoder layers.* has self_attn.q_proj.*mlp.down_proj"),
        ({"modules": "("}, "not a regular expression"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_what_there_is(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BadEditor, match=words):
        make(**config)


def test_published_defaults_stand_in_the_table_and_others_are_announced() -> None:
    for row in PUBLISHED.values():
        h = filled(ElderConfig(), {**DEFAULTS, **row.values})
        assert (h.rank, h.experts, h.active, h.guide, h.lr, h.steps) == (8, 4, 2, 0.01, 1e-4, 50)
        assert h.modules is not None and h.modules.count("|") == 5
    editor = Elder()
    editor.prepare(build("gpt2"), TrainPool())
    assert editor.eps == 2 * len(editor.targets)
    assert any(note.startswith("no published values for a gpt2 of 3 layers") for note in editor.notes)
    assert any("N = " in note for note in editor.notes)


def test_it_is_the_base_until_the_first_edit() -> None:
    editor = make()
    own, base = editor.predictor(), ModelPredictor(editor.handle)
    assert [r.generated for r in own.respond(BESIDE, [None] * 4, 3)] == [r.generated for r in base.respond(BESIDE, [None] * 4, 3)]
    assert logits(editor.handle, gate_of(editor, None), BESIDE[2:]).equal(logits(editor.handle, None, BESIDE[2:]))
