"""Floors of matrix products: operations against known counts, bytes against an ideal cache, and the rows that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from testbed.bench import __main__ as bench
from testbed.bench import floor as _bench_floor
from testbed.bench.editors import Amount
from testbed.bench.floor import Machine, Work, products
from testbed.bench.hot import hot_paths
from testbed.core.registry import EDITORS
from testbed.core.timing import collect_seconds, timed
from testbed.experiment.config import RunConfig
from testbed.model import loading
from testbed.model.answer_loss import TOKENS, answer_loss
from testbed.model.prefix_cache import Stems
from tests.helpers.models import build
from tests.helpers.plain_stream import plain as plain_stream


def machine(rate: float = 1e9, bandwidth: float = 1e9, cache: int = 0) -> Machine:
    """One whose rates are given."""
    out = Machine(torch.device("cpu"))
    out.cache, out._bandwidth = cache, bandwidth
    out._rates = dict.fromkeys((torch.float32, torch.float64, torch.bfloat16), rate)
    return out


def total(found: dict[str, Work]) -> Work:
    return Work(*(sum(getattr(w, n) for w in found.values()) for n in ("operations", "bytes", "seconds")))


@settings(deadline=None)
@given(n=st.integers(1, 5), d=st.integers(1, 6), f=st.integers(1, 6), bias=st.booleans())
def test_a_linear_map_and_its_gradient_count_as_their_products(n: int, d: int, f: int, bias: bool) -> None:
    layer, x = nn.Linear(d, f, bias=bias), torch.randn(n, d, requires_grad=True)
    with products(machine()) as found:
        layer(x).sum().backward()
    assert total(found).operations == 3 * 2 * n * d * f


def test_attention_factors_and_solves_are_counted() -> None:
    q = torch.randn(2, 3, 5, 4)
    a = torch.eye(6).double() * 2
    cases: list[tuple[Any, float]] = [
        (lambda: nn.functional.scaled_dot_product_attention(q, q, q), 2 * 2 * 2 * 3 * 5 * 5 * 4),
        (lambda: torch.linalg.cholesky_ex(a), 6**3 / 3),
        (lambda: torch.linalg.solve_triangular(a, torch.ones(6, 2).double(), upper=False), 6 * 6 * 2),
        (lambda: torch.cholesky_solve(torch.ones(6, 2).double(), a), 2 * 6 * 6 * 2),
        (lambda: a.addmm(a, a), 2 * 6**3),
        (lambda: a.clone().addmm_(a, a), 2 * 6**3),
        (lambda: a @ a[0], 2 * 6 * 6),
        (lambda: q + q, 0),
    ]
    for work, operations in cases:
        with products(machine()) as found:
            work()
        assert total(found).operations == operations


def test_the_loss_under_a_wide_head_is_counted_and_reads_the_head_once() -> None:
    head = nn.Linear(8, 3 * TOKENS, bias=False).requires_grad_(False)
    handle: Any = type("Handle", (), {"head": head, "device": torch.device("cpu")})
    x = torch.randn(4, 8, requires_grad=True)
    with products(machine(cache=2**19)) as found:  # a block of 4,096 tokens fits, the head does not
        answer_loss(handle, x, torch.arange(4))[0].sum().backward()
    assert total(found).operations == 2 * 2 * 4 * 8 * 3 * TOKENS
    assert head.weight.nbytes <= total(found).bytes < 1.5 * head.weight.nbytes + 2 * 4 * 4 * 3 * TOKENS


@pytest.mark.parametrize(("room", "fetched"), [(0, 4), (1.5, 4), (2.5, 2)])
def test_what_the_cache_holds_is_not_fetched_again(room: float, fetched: int) -> None:
    """Two matrices in turn, twice: all fetched four times where one of them fits, and twice where both do."""
    a, b, x = torch.randn(64, 64), torch.randn(64, 64), torch.randn(1, 64)
    with products(machine(cache=int(room * a.nbytes))) as found:
        kept = [x @ w for w in (a, b, a, b)]
    assert len(kept) == 4 and round(total(found).bytes / a.nbytes) == fetched


def test_the_larger_floor_counts_product_by_product() -> None:
    a, x = torch.randn(100, 100), torch.randn(1, 100)
    with products(machine(rate=1e3, bandwidth=1e12)) as slow_to_multiply:
        x @ a
    with products(machine(rate=1e12, bandwidth=1e3)) as slow_to_read:
        x @ a
    assert total(slow_to_multiply).seconds == pytest.approx(2 * 100 * 100 / 1e3)
    assert total(slow_to_read).seconds == pytest.approx((a.nbytes + 2 * x.nbytes) / 1e3)


def test_products_are_noted_under_their_stage() -> None:
    a = torch.randn(4, 4)
    with products(machine()) as found, collect_seconds():
        with timed("one"):
            a @ a
        a @ a @ a
    assert {k: w.operations for k, w in found.items()} == {"one": 2 * 4**3, "": 2 * 2 * 4**3}


def test_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_floor, "_READ", 2**16)
    here = Machine(torch.device("cpu"))
    assert min(here.rate(torch.float32), here.bandwidth) > 1e6 and here.cache >= 0
    assert here.rates().billions_of_operations_per_second.startswith("float32 ")


@pytest.mark.parametrize("name", ["balancedit", "alphaedit", "scr"])
def test_rows_are_the_whole_and_its_parts(name: str) -> None:
    rows = hot_paths(build("gpt2"), plain_stream(8), lambda: EDITORS.get(name)(), Amount(3, 0, 6), machine(1e12, 1e12))
    for unit in ("edit", "question"):
        whole, *parts = [r for r in rows if r.path.split(":")[0] == unit]
        assert whole.path == unit and parts[-1].path == f"{unit}: other"
        assert whole.milliseconds == pytest.approx(sum(p.milliseconds for p in parts))
        assert whole.billions_of_operations == pytest.approx(sum(p.billions_of_operations for p in parts))
        assert whole.times_floor is None or whole.times_floor > 1
    assert next(r for r in rows if r.path == "question: prefill").billions_of_operations > 0
    assert bench.table(rows).row_count == len(rows)


def test_pictures_are_seen_anew_where_products_are_counted_as_where_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, old = [], Stems._made
    monkeypatch.setattr(Stems, "_made", lambda self, asks: (made.append(len(asks)), old(self, asks))[1])
    stream = RunConfig(stream="okedit-yearly").resolve_stream().create()
    hot_paths(loading.load("tiny", "cpu"), stream, lambda: EDITORS.get("balancedit")(), Amount(2, 0, 1), machine(1e12, 1e12))
    assert made == [2, 2, 1, 2, 1]  # an edit's picture and the black one, then another; the first pass ends after one edit


def test_floors_are_a_table_of_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_bench_floor, "_READ", 2**16)
    out = tmp_path / "floors.json"
    wanted = [
        "--what",
        "floors",
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
    assert bench.main(wanted) == 0
    assert "edit: train" in capsys.readouterr().out and '"times_floor"' in out.read_text()
