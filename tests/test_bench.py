"""The bench's own arithmetic on small sizes: what is measured, not how fast."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from _models import build
from _plain import plain as plain_stream

from testbed import _bench_codebook as books
from testbed import bench
from testbed._bench_paths import apart, paths
from testbed.editors._nearest import to_all
from testbed.editors.codebook import Codebook
from testbed.registry import EDITORS

GRADIENTS = [n for n in EDITORS.names() if n in ("balancedit", "balancedit-plus", "grace", "finetune")]


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_method_and_its_plain_path_have_the_same_losses(name: str) -> None:
    cls = EDITORS.get(name)
    config = dataclasses.replace(cls.Config(), steps=6)
    line = paths(build("gpt2"), plain_stream(24), lambda: cls(config), edits=2, batch=4)
    assert line.loss_difference is not None and line.loss_difference <= 1e-4
    assert line.batch_ratio is not None and line.batch_ratio > 0
    assert (line.batch_loss_difference is not None) == cls.traits.gated
    assert line.batch_loss_difference is None or line.batch_loss_difference <= 1e-4


def test_an_editor_without_losses_is_timed_all_the_same() -> None:
    line = paths(build("gpt2"), plain_stream(24), EDITORS.get("noop"), edits=1, batch=2)
    assert line.loss_difference is None
    assert line.ratio > 0


def test_the_largest_difference_is_found() -> None:
    one, other = [[torch.tensor([1.0]), torch.tensor([2.0])]], [[torch.tensor([1.0]), torch.tensor([2.5])]]
    assert apart(one, other) == 0.5
    assert apart(one, []) is None


def test_insertions_meet_neighbours_or_none_as_they_say() -> None:
    keys, book = books.drawn(60, 16), Codebook(16)
    for _ in range(50):
        books._insert(book, keys, 0.2 * 0.3 * 4)
    assert int((book.capped_by >= 0).sum()) == 0
    books._insert(book, keys, 1.5 * 0.3 * 4)
    assert book.capped_by[-1] >= 0
    assert float(to_all(keys, keys[0], "euclidean")[1:].min()) > 0


def test_tables_of_every_kind_can_be_shown() -> None:
    sizes = books.insertion((5, 20), width=8, times=3)
    assert [s.entries for s in sizes] == [5, 20]
    weight = books.weight(entries=30, width=8, inner=12)
    assert weight.values == 30 * books.RANK * (8 + 12) * 4
    assert weight.keys == 30 * 12 * 4
    assert weight.disk > weight.values + weight.keys
    share = books.Share("m", 1, 10, 8, 1.0, 50.0)
    for lines in (sizes, [weight], [share]):
        assert bench.table(lines).row_count == len(lines)
    assert bench._plain(share)["share"] == 0.02


def test_retrieval_is_measured_against_the_forward_of_the_model() -> None:
    lines = books.tiny_share(build("gpt2"), plain_stream(4), sizes=(10, 20), rows=2)
    assert [x.entries for x in lines] == [10, 20]
    assert all(x.width == 96 and x.retrieval > 0 and x.share > 0 for x in lines)


def test_an_unknown_table_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--what", "everything"]) == 2
    assert "editors, paths, codebook" in capsys.readouterr().err
