"""FLOPs: counts of known operations, and the rows that they lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from testbed.bench import __main__ as command
from testbed.bench import editors
from testbed.bench.common import BenchConfig, table
from testbed.bench.editors import count_flops, measure_flops, peak_rate
from testbed.core.registry import EDITORS
from testbed.experiment.config import RunConfig
from testbed.model import loading
from testbed.model.answer_loss import TOKENS, answer_loss
from testbed.model.families import LogitForm
from testbed.model.prefix_cache import ImagePrefixes
from tests.helpers.models import build
from tests.helpers.plain_stream import plain as plain_stream


@settings(deadline=None)
@given(n=st.integers(1, 5), d=st.integers(1, 6), f=st.integers(1, 6), bias=st.booleans())
def test_a_linear_map_and_its_gradient_count_as_their_products(n: int, d: int, f: int, bias: bool) -> None:
    layer, x = nn.Linear(d, f, bias=bias), torch.randn(n, d, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * n * d * f


def test_attention_and_products_in_place_are_counted() -> None:
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    a = torch.eye(6).double() * 2
    forward = 2 * 2 * 2 * 3 * 5 * 5 * 4
    cases: list[tuple[Any, float]] = [
        (lambda: nn.functional.scaled_dot_product_attention(q, q, q), forward),
        (lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward(), 3.5 * forward),
        (lambda: a.addmm(a, a), 2 * 6**3),
        (lambda: a.clone().addmm_(a, a), 2 * 6**3),
        (lambda: a @ a, 2 * 6**3),
        (lambda: a + a, 0),
    ]
    for work, flops in cases:
        assert count_flops(work) == flops


def test_the_loss_under_a_wide_head_is_counted() -> None:
    head = nn.Linear(8, 3 * TOKENS, bias=False).requires_grad_(False)
    handle: Any = type("Handle", (), {"head": head, "device": torch.device("cpu"), "logit_form": LogitForm()})
    x = torch.randn(4, 8, requires_grad=True)
    assert count_flops(lambda: answer_loss(handle, x, torch.arange(4))[0].sum().backward()) == 2 * 2 * 4 * 8 * 3 * TOKENS


def test_the_peak_rate_is_measured() -> None:
    assert peak_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 1e6


@pytest.mark.parametrize("name", ["balancedit", "alphaedit", "scr"])
def test_an_edit_and_a_question_have_a_row_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editors, "peak_rate", lambda device, dtype: 1e12)
    rows = measure_flops(build("gpt2"), plain_stream(8), lambda: EDITORS.get(name)(), BenchConfig(edits=3, questions=6))
    assert [r.unit for r in rows] == ["edit", "question"]
    for row in rows:
        assert row.gigaflops > 0 or (name, row.unit) == ("scr", "edit")
        assert row.share_of_peak == pytest.approx(row.gigaflops / row.milliseconds)
    assert table(rows).row_count == len(rows)


def test_the_counted_pass_repeats_the_timed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures encoded in the timed pass are encoded again in the counted one."""
    encoded, own = [], ImagePrefixes._compute
    monkeypatch.setattr(ImagePrefixes, "_compute", lambda self, asks: (encoded.append(len(asks)), own(self, asks))[1])
    monkeypatch.setattr(editors, "peak_rate", lambda device, dtype: 1e12)
    stream = RunConfig(stream="okedit-yearly").resolve_stream().create()
    measure_flops(loading.load("tiny", "cpu"), stream, lambda: EDITORS.get("balancedit")(), BenchConfig(edits=2, questions=1))
    half = len(encoded) // 2
    assert half and encoded[:half] == encoded[half:]


def test_flops_are_a_table_of_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(editors, "peak_rate", lambda device, dtype: 1e12)
    out = tmp_path / "flops.json"
    options = [
        "--what",
        "flops",
        "--editor",
        "finetune",
        "--edits",
        "1",
        "--questions",
        "2",
        "--set",
        "finetune.steps=2",
        "--out",
        str(out),
    ]
    assert command.main(options) == 0
    assert "share of peak" in " ".join(capsys.readouterr().out.split())
    assert [row["unit"] for row in json.loads(out.read_text())["flops"]] == ["edit", "question"]
