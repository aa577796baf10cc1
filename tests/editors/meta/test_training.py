"""The training that methods share which learn to edit: budget, stopping, cache, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from testbed.editors.meta import training
from testbed.editors.meta.training import Plan, Training, trained

PLAN = Plan("toy", steps=12, cpu_seconds=1e9, every=3, patience=9, clip=100.0)


class Quadratic:
    """Learns to be the mean of what it draws; `fixed` holds a shift that `begin` fills in."""

    def __init__(self, stop_at: int | None = None, slope: float = 1.0) -> None:
        self.tensors = {"x": torch.full((3,), 5.0, requires_grad=True), "alpha": torch.tensor(2.0, requires_grad=True)}
        self.fixed = {"shift": torch.zeros(3)}
        self.begun, self.steps, self.stop_at, self.slope = 0, 0, stop_at, slope

    def begin(self) -> None:
        self.begun += 1
        self.fixed["shift"].fill_(1.0)

    def rate(self, name: str) -> float:
        return 0.1 if name == "alpha" else 0.3

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        if self.steps == self.stop_at:
            raise KeyboardInterrupt
        self.steps += 1
        target = torch.randn(3, generator=generator) + self.fixed["shift"]
        return self.slope * ((self.tensors["x"] - target).square().sum() + self.tensors["alpha"].square())

    def judge(self) -> dict[str, float]:
        return {
            "loss": float((self.tensors["x"] - self.fixed["shift"]).square().sum().detach()),
            "alpha": float(self.tensors["alpha"].detach()),
        }


def machine(folder: Path | None = None) -> Any:
    return SimpleNamespace(cache={}, cache_folder=folder)


def same(a: Training, b: Training) -> bool:
    tensors = all(torch.equal(t, b.best[n]) for n, t in a.best.items()) and all(torch.equal(t, b.fixed[n]) for n, t in a.fixed.items())
    return tensors and (a.curve, a.step, a.ended) == (b.curve, b.step, b.ended)


@pytest.mark.parametrize("killed_after", [1, 3, 4, 8, 11])
def test_a_training_that_was_killed_ends_as_one_that_was_not(killed_after: int, tmp_path: Path) -> None:
    whole = trained(Quadratic(), PLAN, machine(), "key")
    with pytest.raises(KeyboardInterrupt):
        trained(Quadratic(stop_at=killed_after), PLAN, machine(tmp_path), "key")
    again = Quadratic()
    assert same(trained(again, PLAN, machine(tmp_path), "key"), whole)
    assert again.begun == 0  # the statistics are in the checkpoint
    assert again.steps == 12 - killed_after // 3 * 3


def test_a_finished_training_is_taken_over(tmp_path: Path) -> None:
    first = trained(Quadratic(), PLAN, machine(tmp_path), "key")
    other, handle = Quadratic(), machine(tmp_path)
    assert same(trained(other, PLAN, handle, "key"), first)
    assert other.steps == 0
    assert trained(Quadratic(), PLAN, handle, "key") is handle.cache["meta-training"]["key"]
    new = Quadratic()
    trained(new, PLAN, machine(tmp_path), "another key")
    assert new.steps == 12


def test_a_damaged_checkpoint_is_made_again(tmp_path: Path) -> None:
    first = trained(Quadratic(), PLAN, machine(tmp_path), "key")
    (path,) = tmp_path.glob("meta-toy-*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    assert same(trained(Quadratic(), PLAN, machine(tmp_path), "key"), first)


def test_the_best_judgement_is_kept_and_the_curve_told() -> None:
    done = trained(Quadratic(), PLAN, machine(), "key")
    assert [p["step"] for p in done.curve] == [0, 3, 6, 9, 12]
    assert done.learned
    assert float((done.best["x"] - 1.0).square().sum()) == pytest.approx(done.lowest, rel=1e-5)
    assert "loss on held-out edits by step 0: 48, " in done.note
    assert "all steps taken" in done.note


def test_a_training_that_learns_nothing_says_so_with_its_curve() -> None:
    done = trained(Quadratic(slope=0.0), PLAN, machine(), "key")
    assert not done.learned
    assert done.note.startswith("the meta-training learned nothing that holds on held-out edits: ")
    assert "0: 48, 3: 48, 6: 48" in done.note


def test_patience_and_budget_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = trained(Quadratic(slope=0.0), replace(PLAN, patience=2), machine(), "key")
    assert (idle.step, idle.ended) == (6, "ended after 2 judgements without a better one")
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(training.time, "process_time", lambda: float(next(clock)))
    short = trained(Quadratic(), replace(PLAN, cpu_seconds=25.0), machine(), "key")
    assert short.step == 6
    assert "budget of 25 CPU seconds" in short.note


def test_a_loss_that_is_not_finite_ends_the_training_and_leaves_the_best() -> None:
    class Breaks(Quadratic):
        def loss(self, generator: torch.Generator) -> torch.Tensor:
            return super().loss(generator) * (torch.nan if self.steps == 5 else 1.0)

    done = trained(Breaks(), PLAN, machine(), "key")
    assert done.ended == "ended by a loss that was not finite at step 5"
    assert all(bool(torch.isfinite(t).all()) for t in done.best.values())
