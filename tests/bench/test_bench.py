"""The bench's own arithmetic on small sizes: what is measured, not how fast."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from testbed.bench import __main__ as command
from testbed.bench import codebook as measured
from testbed.bench import models as shapes
from testbed.bench.common import BenchConfig, as_json, table
from testbed.bench.editors import AppliedSteps, largest_difference, measure_editor, measure_paths
from testbed.bench.questions import measure_questions
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.core.schema import EditReport
from testbed.editors.codebook.codebook import Codebook
from testbed.editors.codebook.nearest import to_all
from testbed.model import families, loading
from tests.helpers.models import Noise, build
from tests.helpers.plain_stream import plain as plain_stream

GRADIENTS = [n for n in EDITORS.names() if n in ("balancedit", "balancedit-plus", "grace", "finetune")]


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_method_and_its_reference_implementation_have_the_same_losses(name: str) -> None:
    cls = EDITORS.get(name)
    config = dataclasses.replace(cls.Config(), steps=6)
    row = measure_paths(build("gpt2"), plain_stream(24), lambda: cls(config), BenchConfig(edits=2, batch=4))
    assert row.failed == 0
    assert row.loss_difference is not None and row.loss_difference <= 1e-4
    assert row.batch_ratio is not None and row.batch_ratio > 0
    assert (row.batch_loss_difference is not None) == cls.traits.gated
    assert row.batch_loss_difference is None or row.batch_loss_difference <= 1e-4


def test_an_editor_without_losses_is_timed_all_the_same() -> None:
    row = measure_paths(build("gpt2"), plain_stream(24), EDITORS.get("noop"), BenchConfig(edits=1, batch=2))
    assert row.loss_difference is None
    assert row.ratio > 0


def test_questions_are_timed_beside_a_plain_loop_that_answers_alike() -> None:
    (row,) = measure_questions(build("gpt2"), plain_stream(8), EDITORS.get("noop"), BenchConfig(edits=4, questions=10))
    assert row.questions == 10 and row.share_alike == 1
    assert row.faster == pytest.approx(row.plain / row.unedited)
    assert row.edited_by_plain > 0 and row.edited_by_unedited > 0
    assert measure_questions(build("gpt2"), plain_stream(8), EDITORS.get("noop"), BenchConfig(edits=4, questions=0)) == []


def test_the_largest_difference_is_found() -> None:
    one, other = [[torch.tensor([1.0]), torch.tensor([2.0])]], [[torch.tensor([1.0]), torch.tensor([2.5])]]
    assert largest_difference(one, other) == 0.5
    assert largest_difference(one, []) is None


def test_the_first_step_is_a_warm_up() -> None:
    assert AppliedSteps([1, 1, 4], [9.0, 1.0, 1.0], [], 0).edits_per_second == 2.5
    assert AppliedSteps([3], [6.0], [], 0).edits_per_second == 0.5


def test_a_batch_of_a_locate_editor_and_failed_edits_are_measured() -> None:
    memit = EDITORS.get("memit")
    row = measure_paths(build("gpt2"), plain_stream(60), memit, BenchConfig(edits=2, batch=4))
    assert row.failed == 0 and row.batch_ratio is not None and min(row.batch_ratio, row.ratio) > 0

    class Failing(EDITORS.get("noop")):
        def apply(self, batch: EditBatch) -> EditReport:
            return dataclasses.replace(super().apply(batch), failed={e.id: "no" for e in batch.events})

    assert measure_paths(build("gpt2"), plain_stream(24), Failing, BenchConfig(edits=1, batch=2)).failed == 1 + 4 + 4


def test_insertions_overlap_neighbours_or_none() -> None:
    keys, book = measured.draw_keys(60, 16), Codebook(16)
    for _ in range(50):
        measured.insert_next(book, keys, 0.2 * 0.3 * 4)
    assert int((book.capped_by >= 0).sum()) == 0
    measured.insert_next(book, keys, 1.5 * 0.3 * 4)
    assert book.capped_by[-1] >= 0
    assert float(to_all(keys, keys[0], "euclidean")[1:].min()) > 0


def test_tables_of_every_kind_can_be_shown() -> None:
    times = measured.insertion((5, 20), width=8, times=3)
    assert [t.entries for t in times] == [5, 20]
    size = measured.codebook_bytes(entries=30, width=8, inner=12)
    assert size.value_bytes == 30 * measured.RANK * (8 + 12) * 4
    assert size.key_bytes == 30 * 12 * 4
    assert size.disk_bytes > size.value_bytes + size.key_bytes
    retrieval = measured.RetrievalTime("m", "keys", 1, 10, 8, 1.0, 50.0)
    for rows in (times, [size], [retrieval]):
        assert table(rows).row_count == len(rows)
    assert as_json(retrieval)["share"] == 0.02


def test_retrieval_is_measured_against_the_forward_of_the_model() -> None:
    rows = measured.retrieval(build("gpt2"), plain_stream(4), sizes=(10, 20), rows=2)
    assert [x.entries for x in rows] == [10, 20] * len({x.search for x in rows})
    assert all(x.width == 96 and x.retrieval > 0 and x.share > 0 for x in rows)


def test_an_editor_is_measured_beside_its_reference_implementation() -> None:
    found = measure_editor(build("gpt2"), plain_stream(8), lambda: EDITORS.get("memit")(), BenchConfig(edits=2, plain=1, questions=6))
    assert (found.edits, found.failed) == (2, 0)
    assert found.ratio is not None and found.ratio > 0
    assert {part.split()[0] for part in found.edit_seconds.split(", ")} == {"setup", "targets", "keys", "solve"}
    assert min(found.prepare_seconds, found.probe_seconds_per_thousand, found.probe_seconds_per_thousand_first) > 0
    assert found.state_bytes_per_edit > 0
    without = measure_editor(build("gpt2"), plain_stream(8), EDITORS.get("noop"), BenchConfig(edits=2, plain=0, questions=2))
    assert (without.reference_per_second, without.ratio, without.state_bytes_per_edit) == (None, None, 0)
    assert table([found, without]).row_count == 2


def test_edits_are_made_at_once_where_asked_and_as_many_as_the_editor_takes() -> None:
    noop = EDITORS.get("noop")
    steps: list[int] = []

    class Narrow(noop):
        traits = dataclasses.replace(noop.traits, max_batch=2)

        def apply(self, batch: EditBatch) -> EditReport:
            steps.append(len(batch))
            return super().apply(batch)

    for make, most in ((Narrow, 2), (lambda: EDITORS.get("finetune")(), 4)):
        found = measure_editor(build("gpt2"), plain_stream(8), make, BenchConfig(edits=5, plain=0, questions=2, batch=4))
        assert (found.edits, found.batch, found.failed) == (5, most, 0)
    assert steps == [2, 2, 1]


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_a_shape_has_the_layers_of_its_model(name: str) -> None:
    """Parameters as published, to a hundredth: GPT-2 124 M and 1.56 B, Llama-3 8.03 B, LLaVA-1.5 7.06 B, BLIP-2 3.74 B."""
    published = dict(zip(shapes.SHAPES, (124.4e6, 1557.6e6, 8030e6, 7063e6, 3745e6), strict=True))
    assert shapes.parameters(name) == pytest.approx(published[name], rel=0.01)


@pytest.mark.parametrize(("name", "tokens"), [("random:llava-1.5-7b", 576), ("random:blip-2-opt-2.7b", 32)])
def test_a_shape_with_images_has_the_image_tokens_of_its_model(name: str, tokens: int) -> None:
    like = loading.load("tiny", "cpu")
    config = shapes.config_of(name, like)
    template = families.family_of(config).image
    assert template is not None
    words = template.format(prompt="what is this?")
    out = shapes.processor_of(name, like)(images=[Image.fromarray(Noise(1).load())], text=[words], return_tensors="pt")
    assert int((out["input_ids"] == config.image_token_index).sum()) == tokens and out["pixel_values"].ndim == 4


def test_a_shape_that_does_not_fit_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shapes.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    assert command.main(["--model", "random:llama-3-8b", "--editor", "noop", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "left out: random:llama-3-8b takes 16.1 GB" in capsys.readouterr().err


def test_values_out_of_range_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--edits", "0", "--batch", "0"]) == 2
    said = capsys.readouterr().err
    assert "--edits must be 1 or more, got 0" in said and "--batch must be 1 or more, got 0" in said


def test_an_unknown_table_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--what", "everything"]) == 2
    assert ", ".join(command.TABLES) in capsys.readouterr().err
