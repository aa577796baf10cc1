"""Monitors: each number against a plain computation in float64, what is absent, when they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.registry import EDITORS, MONITORS
from testbed.core.schema import MonitorRow
from testbed.model.predictor import Inspection, ModelPredictor, Predictor
from testbed.monitors.base import PROMPTS, MonitorPanel
from testbed.monitors.outputs import divergence
from testbed.monitors.weights import largest
from tests.helpers.loop_runs import Nudge, run, shared
from tests.helpers.models import TEXT, build
from tests.helpers.plain_stream import plain

some = settings(max_examples=25, deadline=None)
WEIGHTS = ("weight_norm", "weight_relative", "spectral_norm", "stable_rank")
STATES = ("hidden_cosine", "hidden_shift", "activation_scale")
OUTPUTS = ("entropy", "kl_base", "non_finite")


def watch(kind: str = "llama") -> MonitorPanel:
    return MonitorPanel(build(kind), plain(5).general(), 0)


def edited(w: MonitorPanel, change: torch.Tensor, layer: int = -1) -> tuple[Predictor, dict[str, torch.Tensor]]:
    """The model with a change (of the stored shape) of one down-projection."""
    name = w.handle.down_weight(layer)
    weights = {name: w.handle.parameter(name).detach() + change}
    return ModelPredictor(w.handle, around=lambda batch: w.handle.swapped(weights)), weights


def values(rows: Sequence[MonitorRow]) -> dict[str, float]:
    assert len({r.name for r in rows}) == len(rows)
    return {r.name: r.value for r in rows}


def noise(w: MonitorPanel, scale: float, layer: int = -1) -> torch.Tensor:
    shape = w.handle.parameter(w.handle.down_weight(layer)).shape
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_every_monitor_is_registered_with_a_summary() -> None:
    assert MONITORS.names() == ["outputs", "states", "weights"]
    assert all(cls.summary for _, cls in MONITORS.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_against_a_dense_decomposition(kind: str) -> None:
    w = watch(kind)
    predictor, weights = edited(w, noise(w, 0.1))
    got = values(w.rows(3, predictor, weights))
    (name,) = weights
    base, now = (x.detach().double().numpy() for x in (w.handle.parameter(name), weights[name]))
    s = np.linalg.svd(now - base, compute_uv=False)
    assert got["weight_norm"] == pytest.approx(np.linalg.norm(now), rel=1e-12)
    assert got["weight_relative"] == pytest.approx(np.linalg.norm(now - base) / np.linalg.norm(base), rel=1e-12)
    assert got["spectral_norm"] == pytest.approx(s[0], rel=1e-12)
    assert got["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-12)


def test_several_matrices_are_one_block_diagonal_one() -> None:
    w = watch()
    weights = {n: w.handle.parameter(n).detach() + noise(w, 0.1 * (i + 1)) for i, n in enumerate(map(w.handle.down_weight, (0, 1)))}
    predictor = ModelPredictor(w.handle, around=lambda batch: w.handle.swapped(weights))
    got = values(w.rows(1, predictor, weights))
    changes = [(v.double() - w.handle.parameter(n).double()).detach().numpy() for n, v in weights.items()]
    block = np.block([[changes[0], np.zeros_like(changes[0])], [np.zeros_like(changes[1]), changes[1]]])
    s = np.linalg.svd(block, compute_uv=False)
    assert got["spectral_norm"] == pytest.approx(s[0], rel=1e-12)
    assert got["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-12)


def test_a_change_of_one_direction_has_stable_rank_one() -> None:
    w = watch()
    a, b = torch.linspace(-1, 1, w.handle.width), torch.linspace(0.5, 2, w.handle.parameter(w.handle.down_weight(-1)).shape[1])
    got = values(w.rows(1, *edited(w, 0.2 * torch.outer(a, b))))
    assert got["stable_rank"] == pytest.approx(1.0, abs=1e-5)


@some
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_the_largest_singular_value_of_any_matrix(rows: int, columns: int, seed: int) -> None:
    m = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    want = float(torch.linalg.svdvals(m)[0])
    assert largest(m) == pytest.approx(want, rel=1e-9)
    assert largest(m.T) == pytest.approx(want, rel=1e-9)
    assert largest(3 * m) == pytest.approx(3 * want, rel=1e-9)


def test_a_vector_and_a_higher_tensor_have_a_largest_singular_value() -> None:
    v = torch.arange(5.0, dtype=torch.float64)
    assert largest(v) == pytest.approx(float(v.norm()))
    assert largest(v.reshape(1, 5, 1)) == pytest.approx(float(v.norm()))


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_states_and_outputs_against_a_plain_forward(kind: str) -> None:
    w = watch(kind)
    predictor, weights = edited(w, noise(w, 0.5))
    got = values(w.rows(1, predictor, weights))
    states, logps = [], []
    for p in (ModelPredictor(w.handle), predictor):
        seen = [p.inspect([a], (-1,), top_k=w.handle.head.weight.shape[0]) for a in w.asks]
        states.append(np.array([x[0].hidden[0] for x in seen], dtype=np.float64))
        whole = np.empty((len(seen), w.handle.head.weight.shape[0]))
        for row, x in zip(whole, seen):
            row[x[0].top_ids] = x[0].logprobs
        logps.append(whole)
    h0, h = states
    cos = (h * h0).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(h0, axis=1)
    assert got["hidden_cosine"] == pytest.approx(cos.mean(), abs=1e-5)
    assert got["hidden_shift"] == pytest.approx(np.linalg.norm((h - h0).mean(0)) / np.sqrt((h0**2).sum(1).mean()), rel=1e-3)
    assert got["activation_scale"] == pytest.approx(np.linalg.norm(h, axis=1).mean() / np.linalg.norm(h0, axis=1).mean(), rel=1e-4)
    p0, p = np.exp(logps[0]), np.exp(logps[1])
    assert got["entropy"] == pytest.approx(-(p * logps[1]).sum(1).mean(), abs=1e-4)
    whole_kl = (p0 * (logps[0] - logps[1])).sum(1).mean()
    assert 0 < got["kl_base"] <= whole_kl + 1e-6
    assert got["non_finite"] == 0


def test_an_untouched_model_has_not_moved() -> None:
    w = watch()
    for predictor in (ModelPredictor(w.handle), ModelPredictor(w.handle, around=lambda batch: w.handle.swapped({}))):
        got = values(w.rows(1, predictor, {}))
        assert set(got) == {*STATES, *OUTPUTS}
        assert got["hidden_cosine"] == pytest.approx(1, abs=1e-6)
        assert got["activation_scale"] == pytest.approx(1, abs=1e-6)
        assert got["hidden_shift"] == pytest.approx(0, abs=1e-6)
        assert got["kl_base"] == pytest.approx(0, abs=1e-6)
    still, weights = edited(w, torch.zeros(()))
    got = values(w.rows(1, still, weights))
    assert (got["weight_relative"], got["spectral_norm"]) == (0, 0)
    assert "stable_rank" not in got


def test_a_broken_model_is_reported_and_no_number_is_made_up() -> None:
    w = watch()
    predictor, weights = edited(w, torch.full((), float("nan")))
    got = values(w.rows(1, predictor, weights))
    assert got["non_finite"] == 1
    assert np.isnan(got["weight_norm"])
    assert set(got) == {"non_finite", "weight_norm", "weight_relative"}


def test_states_that_grow_are_seen() -> None:
    w = watch()
    near, far = (values(w.rows(1, *edited(w, noise(w, s)))) for s in (0.05, 5.0))
    assert far["kl_base"] > near["kl_base"] > 0
    assert far["activation_scale"] > near["activation_scale"]
    assert far["hidden_cosine"] < near["hidden_cosine"] < 1
    assert far["hidden_shift"] > near["hidden_shift"] > 0


distributions = st.lists(st.floats(0.01, 1), min_size=4, max_size=9).map(lambda x: np.array(x) / sum(x))


@some
@given(distributions, st.data())
def test_divergence_is_a_lower_bound_that_vanishes_only_for_the_same(p: np.ndarray, data: st.DataObject) -> None:
    q = data.draw(st.lists(st.floats(0.01, 1), min_size=len(p), max_size=len(p)).map(lambda x: np.array(x) / sum(x)))
    k = data.draw(st.integers(1, len(p)))
    top = np.argsort(-p)[:k]
    got = divergence(np.log(p[top]), np.log(q[top]))
    assert 0 <= got <= float((p * np.log(p / q)).sum()) + 1e-9
    assert divergence(np.log(p[top]), np.log(p[top])) == 0
    if k == len(p):
        assert got == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-9)


def test_divergence_of_a_sure_model() -> None:
    """A token that got all the mass, then half of it."""
    assert divergence(np.array([0.0]), np.array([np.log(0.5)])) == pytest.approx(np.log(2), abs=1e-9)
    assert divergence(np.array([0.0, -np.inf]), np.array([0.0, -3.0])) == pytest.approx(0, abs=1e-9)


def test_an_inspection_gives_the_tokens_that_were_asked_for() -> None:
    w = watch()
    asked = [np.array([5, 0, 9]) for _ in w.asks]
    whole = ModelPredictor(w.handle).inspect(w.asks, top_k=w.handle.head.weight.shape[0])
    for a, b in zip(ModelPredictor(w.handle).inspect(w.asks, ids=asked), whole):
        assert a.top_ids.tolist() == [5, 0, 9]
        at = {int(i): v for i, v in zip(b.top_ids, b.logprobs)}
        np.testing.assert_allclose(a.logprobs, [at[5], at[0], at[9]])
        assert np.exp(b.logprobs).sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["llava", *TEXT[:1]])
def test_prompts_are_drawn_by_hash_from_general_questions(kind: str) -> None:
    general = plain(5).general()
    first, again, other = (MonitorPanel(build(kind), qs, seed) for qs, seed in ((general, 0), (general[::-1], 0), (general, 1)))
    assert len(first.asks) == PROMPTS
    assert {a.prompt for a in first.asks} == {a.prompt for a in again.asks} != {a.prompt for a in other.asks}
    texts = {q.prompt for q in general if q.split == "text"}
    assert not texts & {a.prompt for a in first.asks}


def test_without_general_questions_others_stand_in_and_without_any_nothing_is_due() -> None:
    stream = plain(5)
    checkpoint = shared().schedule.steps[-1].checkpoint
    edits = [q for e in stream.all for q in stream.questions(e)]
    assert MonitorPanel(build("llama"), edits, 0).due(checkpoint)
    assert not MonitorPanel(build("llama"), [q for q in stream.general() if q.split == "text"], 0).due(checkpoint)


def test_monitors_are_taken_at_full_checkpoints_and_powers_of_two(tmp_path: Path) -> None:
    where = shared()
    due = [s.checkpoint.step for s in where.schedule.steps if s.checkpoint.full or s.checkpoint.step & (s.checkpoint.step - 1) == 0]
    run(where, Nudge(), tmp_path)
    rows = [MonitorRow(**r) for p in sorted((tmp_path / "monitors").glob("*")) for r in pq.read_table(p).to_pylist()]
    assert sorted({r.step for r in rows}) == due == sorted(where.expected.monitored)
    last = values([r for r in rows if r.step == due[-1]])
    assert set(last) == {*WEIGHTS, *STATES, *OUTPUTS}
    assert last["stable_rank"] == pytest.approx(1, abs=1e-6)
    relative = [r.value for r in rows if r.name == "weight_relative"]
    assert relative == sorted(relative)


def test_the_unedited_model_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = replace(shared())
    calls: list[int] = []
    inspect = ModelPredictor.inspect

    def counted(self: ModelPredictor, *args: Any, **more: Any) -> list[Inspection]:
        calls.append(1)
        return inspect(self, *args, **more)

    monkeypatch.setattr(ModelPredictor, "inspect", counted)
    run(where, EDITORS.get("noop")(), tmp_path / "noop")
    assert len(calls) == 1
    run(where, Nudge(), tmp_path / "nudge")
    assert len(calls) == 1 + len(where.expected.monitored)


class Stop(BaseException):
    """Stands for the process ending here."""


@pytest.mark.parametrize("kill", [("apply", 3), ("write", 4), ("rename", 7)])
def test_stopped_and_gone_on_the_monitors_are_the_same(tmp_path: Path, kill: tuple[str, int]) -> None:
    from testbed.experiment.loop import run_editor
    from testbed.storage.run_folder import EditorFolder

    where = shared()
    run(where, Nudge(), tmp_path / "whole")

    def phase(*now: Any) -> None:
        if now == kill:
            raise Stop

    with pytest.raises(Stop):
        run_editor(where, Nudge(), EditorFolder(tmp_path / "cut", phase), phase)
    run(where, Nudge(), tmp_path / "cut")
    tables = [[pq.read_table(p).to_pylist() for p in sorted((tmp_path / n / "monitors").glob("*"))] for n in ("whole", "cut")]
    assert tables[0] == tables[1] != []
