"""The bench's own arithmetic on small sizes: what is measured, not how fast."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from testbed.bench import __main__ as bench
from testbed.bench import codebook as books
from testbed.bench import locate as _bench_locate
from testbed.bench import models as _bench_models
from testbed.bench.editors import Amount, line
from testbed.bench.long import costs, wholes
from testbed.bench.paths import apart, paths
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.core.schema import EditReport
from testbed.editors.codebook.codebook import Codebook
from testbed.editors.codebook.nearest import to_all
from testbed.model import families
from testbed.model import loading
from testbed.storage.files import StoreError
from tests.helpers.models import Noise, build
from tests.helpers.plain_stream import plain as plain_stream

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


def test_an_editor_is_measured_beside_its_plain_path() -> None:
    found = line(build("gpt2"), plain_stream(8), lambda: EDITORS.get("memit")(), Amount(edits=2, plain=1, questions=6))
    assert (found.edits, found.failed) == (2, 0)
    assert found.ratio is not None and found.ratio > 0
    assert {part.split()[0] for part in found.edit_seconds.split(", ")} == {"setup", "targets", "keys", "solve"}
    assert min(found.prepare_seconds, found.probe_seconds_per_thousand, found.probe_seconds_per_thousand_first) > 0
    assert found.state_bytes_per_edit > 0
    without = line(build("gpt2"), plain_stream(8), EDITORS.get("noop"), Amount(edits=2, plain=0, questions=2))
    assert (without.plain_per_second, without.ratio, without.state_bytes_per_edit) == (None, None, 0)
    assert bench.table([found, without]).row_count == 2


def test_edits_are_made_at_once_where_asked_and_as_many_as_the_editor_takes() -> None:
    noop = EDITORS.get("noop")
    steps: list[int] = []

    class Narrow(noop):
        traits = dataclasses.replace(noop.traits, max_batch=2)

        def apply(self, batch: EditBatch) -> EditReport:
            steps.append(len(batch))
            return super().apply(batch)

    for make, most in ((Narrow, 2), (lambda: EDITORS.get("finetune")(), 4)):
        found = line(build("gpt2"), plain_stream(8), make, Amount(edits=5, plain=0, questions=2, batch=4))
        assert (found.edits, found.batch, found.failed) == (5, most, 0)
    assert steps == [2, 2, 1]


def test_batches_of_locate_then_edit_are_set_beside_single_edits() -> None:
    found = _bench_locate.batches(build("gpt2"), plain_stream(60), lambda: EDITORS.get("memit")(), 4)
    assert min(found.ratio, found.cpu_ratio, found.plain_per_second, found.batch_per_cpu_second) > 0
    assert found.target_difference <= 1e-3
    assert bench.table([found]).row_count == 1


def _run_folder(root: Path) -> None:
    """Two editors, two edits a step; the first's late edits, of its second hundred, and its late questions take twice as long."""
    (root / "manifest.json").write_text(json.dumps({"editors": ["a", "short"]}))
    for name, steps in (("a", 300), ("short", 3)):
        late = [1 + (n > 100) for n in range(1, steps + 1)]
        notes = [{"loss": 1.0, "entries": 2.0 * n, "seconds_keys": 0.002, "seconds_train": 0.008 * x} for n, x in enumerate(late, 1)]
        lines = [
            {"step": n, "event_ids": ["x", "y"], "seconds": 0.01 * x, "state_bytes": n, "peak_bytes": 7 * n, "notes": note}
            for n, (x, note) in enumerate(zip(late, notes, strict=True), 1)
        ]
        (root / name / "records").mkdir(parents=True)
        (root / name / "edits.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    asked = {"probe_step": [1, 60, 60, 250], "seconds": [9.0, 0.001, 0.003, 0.004]}
    pq.write_table(pa.table(asked), root / "a" / "records" / "step-000300.parquet")


def test_costs_early_and_late_are_medians_of_a_runs_reports(tmp_path: Path) -> None:
    _run_folder(tmp_path)
    early, late = costs(tmp_path, (200, 600))
    assert (early.editor, early.edits, early.milliseconds, early.times_first) == ("a", 200, 5.0, 1.0)
    assert (late.edits, late.milliseconds, late.times_first, late.entries, late.state_bytes) == (600, 10.0, 2.0, 600.0, 300)
    assert (early.stages, late.stages) == ("train 4.0, keys 1.0", "train 8.0, keys 1.0")
    assert early.question_milliseconds == pytest.approx(2.0) and late.question_milliseconds is None
    with pytest.raises(StoreError, match="has made 700 edits"):
        costs(tmp_path, (700,))


def test_the_minutes_of_a_run_are_those_of_its_edits_and_questions(tmp_path: Path) -> None:
    _run_folder(tmp_path)
    long, short = wholes(tmp_path)
    assert (long.editor, long.edits, long.questions, long.peak_bytes) == ("a", 600, 4, 2100)
    assert long.edit_minutes == pytest.approx(5 / 60) and long.question_minutes == pytest.approx(9.008 / 60)
    assert (short.edits, short.questions, short.question_minutes) == (6, 0, 0.0)


@pytest.mark.parametrize("name", list(_bench_models.SHAPES))
def test_a_shape_has_the_layers_of_its_model(name: str) -> None:
    """Parameters as published, to a hundredth: GPT-2 124 M and 1.56 B, Llama-3 8.03 B, LLaVA-1.5 7.06 B, BLIP-2 3.74 B."""
    published = dict(zip(_bench_models.SHAPES, (124.4e6, 1557.6e6, 8030e6, 7063e6, 3745e6), strict=True))
    assert _bench_models.parameters(name) == pytest.approx(published[name], rel=0.01)


@pytest.mark.parametrize(("name", "places"), [("random:llava-1.5-7b", 576), ("random:blip-2-opt-2.7b", 32)])
def test_a_shape_that_reads_pictures_has_its_models_places_for_them(name: str, places: int) -> None:
    like = loading.load("tiny", "cpu")
    shape = _bench_models.SHAPES[name]
    assert shape.processor is not None
    config = shape.config(like)
    template = families.family_of(config).image
    assert template is not None
    words = template.format(prompt="what is this?")
    out = shape.processor(like)(images=[Image.fromarray(Noise(1).load())], text=[words], return_tensors="pt")
    assert int((out["input_ids"] == config.image_token_index).sum()) == places and out["pixel_values"].ndim == 4


def test_a_shape_that_does_not_fit_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_bench_models, "_free", lambda place: 10**9)
    assert bench.main(["--model", "random:llama-3-8b", "--editor", "noop", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "left out: random:llama-3-8b takes 16.1 GB" in capsys.readouterr().err


def test_long_needs_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--what", "long"]) == 2
    assert "--run" in capsys.readouterr().err


def test_an_unknown_table_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--what", "everything"]) == 2
    assert ", ".join(bench.TABLES) in capsys.readouterr().err
