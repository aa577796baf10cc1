"""Avalanche's strategies as editors: equal to training through Avalanche, their replay buffers, and what is refused."""

from __future__ import annotations

import importlib
import importlib.metadata
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import build
from tests.helpers.plain_stream import Line, PlainStream, plain

pytest.importorskip("avalanche", reason="the bridge needs the extra: pip install 'lifelong-editing-testbed[avalanche]'")

from tests.helpers.avalanche_benchmarks import apply, contrary, editor, pictures, quiet, settings, words  # isort: skip
from avalanche.training.plugins import SupervisedPlugin, SynapticIntelligencePlugin

import testbed.integrations.avalanche
from testbed.core.registry import EDITORS, UnknownName
from testbed.editors.base import BadEditor, EditFailed
from testbed.editors.continual import methods
from testbed.editors.continual._strategies import CopyingSI
from testbed.editors.continual.rows import IGNORE, AnswerRows, collate_rows
from testbed.experiment.config import RunConfig
from testbed.integrations.avalanche import AnswerModel, EditBenchmark, answer_loss, answer_strategy, seeded
from testbed.storage.files import read_state, write_state


def outside(name: str, bench: EditBenchmark) -> torch.Tensor:
    """The weight after training on every experience as Avalanche's users do, with the global generators seeded as in the loop."""
    rng = EDITORS.get("noop")()
    strategy = answer_strategy(name, bench.rows, settings(name))
    experiences = [[*bench.train_stream]] if name == "joint" else list(bench.train_stream)
    for i, experience in enumerate(experiences, len(bench.groups) if name == "joint" else 1):
        with seeded(rng.generator(i)):
            strategy.train(experience, eval_streams=[])
    return strategy.model.weight.detach()


BOTH = [*((name, contrary) for name in methods.METHODS), ("replay", pictures), ("joint", pictures)]


@pytest.mark.parametrize(("name", "make"), BOTH, ids=[f"{n}-{m.__name__}" for n, m in BOTH])
def test_the_same_weights_through_avalanche_and_through_the_loop(name: str, make: Any) -> None:
    bench = make()
    e = editor(name)
    e.prepare(bench.handle, bench.pool)
    assert not any(r.failed for r in apply(e, bench.groups))
    assert torch.equal(outside(name, bench), e.weight)


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"naive"}))
def test_no_strategy_gives_the_weights_of_naive_training(name: str) -> None:
    bench = contrary()
    a, b = editor("naive"), editor(name)
    for e in (a, b):
        e.prepare(bench.handle, bench.pool)
        apply(e, bench.groups)
    assert float((a.weight - b.weight).norm()) > 1e-3 * float((a.weight - a.base).norm())


@pytest.mark.parametrize("name", methods.METHODS)
def test_continued_from_a_stored_state_the_weights_are_bit_identical(name: str, tmp_path: Path) -> None:
    bench = pictures()
    whole, first, second = editor(name), editor(name), editor(name)
    for e in (whole, first, second):
        e.prepare(bench.handle, bench.pool)
    apply(whole, bench.groups)
    apply(first, bench.groups[:2])
    write_state(tmp_path / "step-000002.safetensors", first.state_dict())
    second.load_state_dict(read_state(tmp_path / "step-000002.safetensors"))
    apply(second, bench.groups[2:], 3)
    assert torch.equal(whole.weight, second.weight)
    assert whole.state_bytes() == second.state_bytes()


@pytest.mark.parametrize("name", ["replay", "agem"])
def test_a_replay_buffer_keeps_to_its_size(name: str) -> None:
    bench = words(16)
    e = editor(name, memory=5)
    e.prepare(bench.handle, bench.pool)
    reports = apply(e, bench.groups)
    assert [r.notes["memory"] for r in reports] == [4, 5, 5, 5]
    ids = {x.id for g in bench.groups for x in g}
    assert len(set(e.state_dict()["edits"])) == 5
    assert set(e.state_dict()["edits"]) <= ids
    strategy = answer_strategy(name, bench.rows, settings(name, memory=5))
    strategy.train(bench.train_stream, eval_streams=[])
    plugin = next(p for p in strategy.plugins if hasattr(p, "storage_policy"))
    assert len(plugin.storage_policy.buffer) == 5


def test_gem_keeps_a_number_of_edits_of_the_newest_batches() -> None:
    bench = words(16)
    e = editor("gem", patterns=2, batches=3)
    e.prepare(bench.handle, bench.pool)
    apply(e, bench.groups)
    assert [len(g) for g in e.strategy_state.groups] == [2, 2, 2]
    newest = {x.id for g in bench.groups[1:] for x in g}
    assert set(e.state_dict()["edits"]) <= newest


@pytest.mark.parametrize("name", ["cumulative", "joint", "replay", "agem", "gem"])
@pytest.mark.parametrize("drop", [True, False])
def test_a_revised_edit_is_dropped_from_the_replay_buffer(name: str, drop: bool) -> None:
    stream = PlainStream([Line(1.0), Line(1.1), Line(1.2, 0, "revise"), Line(1.3)])
    e = editor(name, drop_revised=drop)
    e.prepare(build("llama"), stream.train_pool())
    apply(e, [stream.all[:2], stream.all[2:3], stream.all[3:]])
    want = {x.id for x in stream.all} - ({stream.all[0].id} if drop else set())
    assert set(e.state_dict()["edits"]) == want


def test_state_bytes_and_reports_count_the_replayed_edits() -> None:
    bench = words(8)
    a, b = editor("naive"), editor("cumulative")
    for e in (a, b):
        e.prepare(bench.handle, bench.pool)
    few, many = apply(a, bench.groups)[-1], apply(b, bench.groups)[-1]
    state = b.state_dict()
    extra = sum(state[k].numel() * state[k].element_size() for k in ("act", "rest", "target", "draws", "sizes"))
    assert many.state_bytes - few.state_bytes == extra > 0
    assert many.notes["memory"] == 8


def test_the_global_generators_are_restored() -> None:
    before = torch.get_rng_state(), random.getstate()
    bench = words(8)
    e = editor("replay")
    e.prepare(bench.handle, bench.pool)
    apply(e, bench.groups)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_an_edit_fails_when_its_loss_is_not_finite() -> None:
    bench = words(4)
    e = editor("naive")
    e.prepare(bench.handle, bench.pool)
    e.weight = broken = torch.full_like(e.base, float("inf"))
    report = apply(e, bench.groups)[0]
    assert set(report.failed) == {x.id for x in bench.groups[0]}
    assert "the loss became nan after 0 steps; try a smaller lr" in next(iter(report.failed.values()))
    assert e.weight is broken
    strategy = answer_strategy("naive", bench.rows, settings("naive"))
    strategy.model.weight.data.fill_(float("inf"))
    with pytest.raises(EditFailed, match="the loss became nan"):
        strategy.train(bench.train_stream, eval_streams=[])


def test_distillation_is_the_formula_computed_by_hand_in_float64() -> None:
    bench = words(4)
    x, y, _ = collate_rows([bench.train_stream[0].dataset[i] for i in range(4)])
    model = AnswerModel(bench.rows)
    strategy = answer_strategy("lwf", bench.rows, settings("lwf", steps=2))
    losses: list[tuple[torch.Tensor, float, torch.Tensor]] = []

    class Watch(SupervisedPlugin):
        def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            out, labels = strategy.mb_output.detach().double(), strategy.mb_y
            losses.append((strategy.mb_x, float(strategy.loss.detach()), out))
            assert labels.shape == (4, y.shape[1])

    strategy.plugins.insert(-3, Watch())  # after the distillation, before evaluator, schedule and clock
    strategy.train(bench.train_stream[:1], eval_streams=[])
    order, found, out = losses[1]
    labels = torch.stack([y[x.tolist().index(int(i))] for i in order])
    teacher, real = (model(order).detach().double() / 2).softmax(1), labels != IGNORE
    kl = (teacher * (teacher.log() - (out / 2).log_softmax(1))).sum(1)
    want = answer_loss(out, labels) + 4 * ((kl * real).sum(1) / real.sum(1)).mean()
    assert found == pytest.approx(float(want), rel=1e-4)


def test_synaptic_intelligence_needs_its_copies_on_a_cpu() -> None:
    """Avalanche's own gives every weight the importance 0, because it keeps views of the live weights."""
    importance = {}
    for kind in (SynapticIntelligencePlugin, CopyingSI):
        bench = words(4)
        strategy = answer_strategy("naive", bench.rows, settings("naive"), plugins=[kind(1.0)])
        strategy.train(bench.train_stream, eval_streams=[])
        plugin = next(p for p in strategy.plugins if isinstance(p, kind))
        importance[kind] = float(plugin.ewc_data[1]["weight"].data.abs().max())
    assert importance[SynapticIntelligencePlugin] == 0
    assert importance[CopyingSI] > 0


@pytest.mark.parametrize("name", methods.REFUSED)
def test_a_strategy_that_cannot_learn_sequences_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnknownName, match=f"'avalanche:{name}' is not offered: it cannot learn answers of several tokens: "):
        EDITORS.get(f"avalanche:{name}")
    with pytest.raises(BadEditor, match=f"'{name}' is not offered: it cannot learn answers of several tokens: "):
        answer_strategy(name, AnswerRows(build("llama")))


def test_an_unknown_name_is_answered_with_near_matches() -> None:
    with pytest.raises(UnknownName, match="Did you mean avalanche:replay"):
        EDITORS.get("avalanche:repaly")
    with pytest.raises(BadEditor, match="there are naive, replay, cumulative"):
        answer_strategy("repaly", AnswerRows(build("llama")))


STOCK = {
    "DER": {"mem_size": 4},
    "MIR": {"mem_size": 4, "subsample": 2},
    "GSS_greedy": {"mem_size": 4, "input_size": []},
    "GDumb": {"mem_size": 4},
    "ER_ACE": {"mem_size": 4},
}
"""Avalanche's own strategies under names that are refused, with the arguments of their constructors."""


@pytest.mark.parametrize("name", STOCK)
def test_what_is_refused_fails_on_answers(name: str) -> None:
    """Avalanche's own strategies of these names fail within two experiences."""
    import avalanche.training.supervised as stock

    bench = words(8)
    model = AnswerModel(bench.rows)
    adam = torch.optim.Adam(model.parameters())
    common = {"model": model, "optimizer": adam, "criterion": answer_loss, "train_mb_size": 4, "evaluator": quiet()}
    strategy = getattr(stock, name)(**common, **STOCK[name])
    with pytest.raises((RuntimeError, AttributeError, ValueError, AssertionError, IndexError, TypeError)):
        strategy.train(bench.train_stream, eval_streams=[])


def test_without_a_solver_gem_is_refused_with_the_line_that_installs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods.METHODS["gem"].config().problems() == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert methods.METHODS["gem"].config().problems() == [
        "GEM needs a solver of quadratic programs, which is not installed: pip install quadprog"
    ]


def test_another_version_of_avalanche_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods.missing() == []
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.0")
    message = "avalanche-lib 0.5.0 is installed; the bridge is tested with 0.6.0: pip install 'lifelong-editing-testbed[avalanche]'"
    assert methods.missing() == [message]
    assert RunConfig(editor=("avalanche:naive",)).problems() == [f"avalanche:naive: {message}"]
    with pytest.raises(ImportError, match=re.escape(message)):
        methods.load_avalanche()


def test_without_avalanche_the_message_gives_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    message = "needs Avalanche, which is not installed: pip install 'lifelong-editing-testbed[avalanche]'"
    assert methods.missing() == [message]
    e = EDITORS.get("avalanche:naive")()
    with pytest.raises(BadEditor, match=re.escape(f"avalanche:naive cannot run: {message}")):
        e.prepare(build("llama"), plain(2).train_pool())
    with pytest.raises(ImportError, match=re.escape(message)):
        importlib.reload(testbed.integrations.avalanche)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("naive", {"lr": 0.0}, "lr must be positive, got 0.0"),
        ("naive", {"steps": 0}, "steps must be 1 or more, got 0"),
        ("replay", {"memory": 0}, "memory must be 1 or more, got 0"),
        ("agem", {"sample": -1}, "sample must be 1 or more, got -1"),
        ("gem", {"patterns": 65}, "patterns must not exceed rows (64), got 65"),
        ("ewc", {"decay": 1.5}, "decay must be between 0 and 1, got 1.5"),
        ("mas", {"alpha": -0.1}, "alpha must be between 0 and 1, got -0.1"),
        ("si", {"strength": -1.0}, "strength must be 0 or more, got -1.0"),
        ("lwf", {"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_named(name: str, values: dict[str, Any], message: str) -> None:
    assert methods.METHODS[name].config(**values).problems() == [message]
    with pytest.raises(BadEditor, match=re.escape(message)):
        answer_strategy(name, AnswerRows(build("llama")), methods.METHODS[name].config(**values))
