"""The ten faults of the released BalancEdit code, put back one at a time: each turns a named promise red."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from testbed.core.events import Ask
from testbed.editors.codebook.balancedit import BalancEdit
from testbed.editors.codebook.codebook import Codebook
from testbed.editors.codebook.gate import Gate
from tests.helpers import balancedit_checks as c
from tests.helpers.codebook_laws import check_07_no_action_at_a_distance, check_21_scale, check_32_labels_are_token_sequences
from tests.reference.codebook import Row

Patch = pytest.MonkeyPatch


class Shared(BalancEdit):
    """B1: one edited layer for all entries."""

    def _edit(self, batch: Any) -> dict[str, float]:
        out = super()._edit(batch)
        self.tensors = dict.fromkeys(self.tensors, self.tensors[batch.events[-1].id])
        return out


def test_b1_a_shared_layer_breaks_33() -> None:
    with pytest.raises(AssertionError):
        c.check_33_values_are_isolated(Shared)


def test_b2_radii_overwritten_at_every_insertion_break_7(monkeypatch: Patch) -> None:
    append = Codebook._append

    def overwrite(self: Codebook, key: Any, radius: float, entry: Any) -> None:
        append(self, key, radius, entry)
        self.raw = torch.full_like(self.raw, radius)

    monkeypatch.setattr(Codebook, "_append", overwrite)
    with pytest.raises(AssertionError):
        check_07_no_action_at_a_distance(rows=[Row("e0", (0.0, 0, 0), 1.0, (1,))], new=Row("new", (6.0, 0, 0), 2.0, (1,)))


def test_b3_labels_compared_by_their_mean_break_32(monkeypatch: Patch) -> None:
    note = Codebook._append_entries

    def averaged(self: Codebook, *entries: Any) -> None:
        note(self, *entries)
        means = [sum(e.label) / len(e.label) for e in self.entries]
        self._label = torch.tensor([means.index(m) for m in means])

    monkeypatch.setattr(Codebook, "_append_entries", averaged)
    with pytest.raises(AssertionError):
        check_32_labels_are_token_sequences()


class AnswerInKey(BalancEdit):
    """B4: the edit's key is read with its answer behind the prompt."""

    def _scopes(self, batch: Any) -> Any:
        out = super()._scopes(batch)
        keys = self._read([Ask(f"{e.prompt} {e.target}", e.image) for e in batch.events])
        return [type(s)(k, s.radius, s.entry) for s, k in zip(out, keys)]


def test_b4_the_answer_in_the_key_breaks_31() -> None:
    with pytest.raises(AssertionError):
        c.check_31_the_scope_is_free_of_the_answer(AnswerInKey)


def test_b5_one_decision_for_a_whole_batch_breaks_24(monkeypatch: Patch) -> None:
    decide = Gate.decide

    def first(self: Gate, act: Any, batch: Any) -> None:
        decide(self, act, batch)
        self.row = self.row[:1].expand_as(self.row)

    monkeypatch.setattr(Gate, "decide", first)
    with pytest.raises(AssertionError):
        c.check_24_batched_is_one_by_one(BalancEdit)


class EvaluationAnchor(BalancEdit):
    """B6: the negative anchor is made from what the edit is judged by."""

    target = ""

    def _scopes(self, batch: Any) -> Any:
        self.target = batch.events[0].target
        return super()._scopes(batch)

    def _negative(self, event: Any) -> list[Ask]:
        return [Ask(f"{event.prompt} {self.target}", event.image)]


def test_b6_an_anchor_from_evaluation_data_breaks_31() -> None:
    with pytest.raises(AssertionError):
        c.check_31_the_scope_is_free_of_the_answer(EvaluationAnchor)


def test_b7_a_merge_rule_with_a_constant_breaks_21(monkeypatch: Patch) -> None:
    note = Codebook._append_entries

    def constant(self: Codebook, *entries: Any) -> None:
        note(self, *(replace(e, positive=e.positive + 20) for e in entries))

    monkeypatch.setattr(Codebook, "_append_entries", constant)
    rows = [Row("a", (0.0, 0, 0), 1.0, (1,)), Row("b", (5.0, 0, 0), 1.0, (2,))]
    with pytest.raises(AssertionError):
        check_21_scale(rows=rows, xs=[(0.0, 0, 0)], power=5)


class Reset(BalancEdit):
    """B8: everything is set back before the next edit."""

    def _edit(self, batch: Any) -> dict[str, float]:
        self.book, self.tensors = Codebook(self.book.width), {}
        return super()._edit(batch)


def test_b8_a_reset_between_edits_breaks_6() -> None:
    with pytest.raises(AssertionError):
        c.check_06_earlier_edits_stay(Reset)


@pytest.mark.parametrize("how", ["environment", "print", "random"])
def test_b9_environment_prints_and_draws_break_29(how: str, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]) -> None:
    decide = Gate.decide

    def noisy(self: Gate, act: Any, batch: Any) -> None:
        if how == "environment":
            monkeypatch.setitem(os.environ, "CUDA_LAUNCH_BLOCKING", "1")
        elif how == "print":
            os.write(1, b"distance\n")
        else:
            torch.rand(1)
        decide(self, act, batch)

    monkeypatch.setattr(Gate, "decide", noisy)
    with pytest.raises(AssertionError):
        c.check_29_nothing_global_is_touched(BalancEdit, lambda: capfd.readouterr().out)


def test_b10_a_decision_at_every_token_breaks_30(monkeypatch: Patch) -> None:
    def again(self: Gate, act: Any, output: Any, batch: Any, answer: Any) -> Any:
        rows = act.shape[0]
        queries = act.mean(1).float()
        self.row, self.distance = self.router.retrieve(queries)
        self.beams = max(1, rows // len(batch.prompt))
        hit = (self.row >= 0).nonzero()[:, 0]
        out = output.clone()
        if len(hit):
            from testbed.editors.codebook.gate import Hits

            out[hit] = answer(Hits(self.row[hit].tolist(), hit, act[hit], out[hit], None))
        return out

    monkeypatch.setattr(Gate, "_call", again)
    with pytest.raises(AssertionError):
        c.check_30_decided_at_prefill(BalancEdit)
