"""FLOPs by stage: counts of known operations, and the rows that they lead to."""

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
from testbed.bench.editors import FlopCounter, measure_flops, peak_rate
from testbed.core.registry import EDITORS
from testbed.core.timing import collect_seconds, timed
from testbed.experiment.config import RunConfig
from testbed.model import loading
from testbed.model.answer_loss import TOKENS, answer_loss
from testbed.model.prefix_cache import ImagePrefixes
from tests.helpers.models import build
from tests.helpers.plain_stream import plain as plain_stream


@settings(deadline=None)
@given(n=st.integers(1, 5), d=st.integers(1, 6), f=st.integers(1, 6), bias=st.booleans())
def test_a_linear_map_and_its_gradient_count_as_their_products(n: int, d: int, f: int, bias: bool) -> None:
    layer, x = nn.Linear(d, f, bias=bias), torch.randn(n, d, requires_grad=True)
    with FlopCounter() as counter:
        layer(x).sum().backward()
    assert sum(counter.flops.values()) == 3 * 2 * n * d * f


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
        with FlopCounter() as counter:
            work()
        assert sum(counter.flops.values()) == flops


def test_the_loss_under_a_wide_head_is_counted() -> None:
    head = nn.Linear(8, 3 * TOKENS, bias=False).requires_grad_(False)
    handle: Any = type("Handle", (), {"head": head, "device": torch.device("cpu")})
    x = torch.randn(4, 8, requires_grad=True)
    with FlopCounter() as counter:
        answer_loss(handle, x, torch.arange(4))[0].sum().backward()
    assert sum(counter.flops.values()) == 2 * 2 * 4 * 8 * 3 * TOKENS


def test_flops_are_counted_by_stage() -> None:
    a = torch.randn(4, 4)
    with FlopCounter() as counter, collect_seconds():
        with timed("one"):
            a @ a
        a @ a @ a
    assert counter.flops == {"one": 2 * 4**3, "": 2 * 2 * 4**3}


def test_the_peak_rate_is_measured() -> None:
    assert peak_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 1e6


@pytest.mark.parametrize("name", ["balancedit", "alphaedit", "scr"])
def test_rows_are_the_whole_and_its_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editors, "peak_rate", lambda device, dtype: 1e12)
    rows = measure_flops(build("gpt2"), plain_stream(8), lambda: EDITORS.get(name)(), BenchConfig(edits=3, questions=6))
    for unit in ("edit", "question"):
        whole, *parts = [r for r in rows if r.stage.split(":")[0] == unit]
        assert whole.stage == unit and f"{unit}: other" in {p.stage for p in parts}
        assert whole.milliseconds == pytest.approx(sum(p.milliseconds for p in parts))
        assert whole.gigaflops == pytest.approx(sum(p.gigaflops for p in parts))
        assert whole.gigaflops > 0 or (name, unit) == ("scr", "edit")
        assert whole.share_of_peak == pytest.approx(whole.gigaflops / whole.milliseconds)
    assert next(r for r in rows if r.stage == "question: prefill").gigaflops > 0
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
    assert "edit: train" in capsys.readouterr().out
    assert {"edit", "question"} <= {row["stage"] for row in json.loads(out.read_text())["flops"]}
