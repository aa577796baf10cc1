"""A stream of edits as an Avalanche benchmark keeps what Avalanche promises of benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.models import build
from tests.helpers.plain_stream import Line, PlainStream, plain

pytest.importorskip("avalanche", reason="the bridge needs the extra: pip install 'lifelong-editing-testbed[avalanche]'")

from tests.helpers.avalanche_benchmarks import editor, apply, pictures, words  # isort: skip
from avalanche.benchmarks.scenarios.generic_scenario import MaskedAttributeError

from streams.base import BadStream, StreamConfig
from testbed.core.events import Ask
from testbed.core.registry import EDITORS
from testbed.editors.continual._strategies import numbers_of
from testbed.editors.continual.rows import IGNORE, AnswerRows, collate_rows
from testbed.integrations.avalanche import AnswerModel, EditBenchmark, answer_loss, dataset_of, edit_benchmark
from testbed.model.suffix import suffix_from_down_projection


def test_every_stream_has_one_experience_for_each_year() -> None:
    bench = pictures()
    assert set(bench.streams) == {"train", "test", "generality", "locality"}
    years = [sorted({e.year for e in x.edits}) for x in bench.train_stream]
    assert years == [[1], [2], [3]]
    assert [len(x.dataset) for x in bench.train_stream] == [4, 4, 4]
    assert [x.current_experience for x in bench.test_stream] == [0, 1, 2]
    assert [len(s) for s in bench.streams.values()] == [3] * 4
    assert len(bench.train_stream[1:]) == 2
    assert bench.train_stream[1:][0].current_experience == 1


def test_experiences_have_the_given_number_of_edits_and_never_edits_of_two_years() -> None:
    bench = edit_benchmark(plain(10, per_year=4, revise_every=0), build("llama"), 10, edits_per_experience=3)
    assert [len(x.edits) for x in bench.train_stream] == [3, 1, 3, 1, 2]
    assert all(len({e.year for e in x.edits}) == 1 for x in bench.train_stream)


def test_two_passes_and_two_benchmarks_are_equal() -> None:
    bench, again = words(), words()

    def content(b: EditBenchmark) -> list[Any]:
        samples = [[(n, y.tolist(), t) for n, y, t in (x.dataset[i] for i in range(len(x.dataset)))] for s in b.streams.values() for x in s]
        return [samples, [[e.id for e in x.edits] for x in b.train_stream]]

    first = content(bench)
    assert first == content(bench)
    assert first == content(again)
    assert first[0][0]


def test_every_sample_has_task_label_zero() -> None:
    for stream in pictures().streams.values():
        for x in stream:
            assert x.task_labels == [0]
            assert {x.dataset[i][2] for i in range(len(x.dataset))} == {0}
            assert set(x.dataset.targets_task_labels.uniques) == {0}


def test_masked_attributes_are_hidden() -> None:
    train, test = pictures().train_stream[1], pictures().test_stream[1]
    assert train.train().edits
    assert test.eval().questions
    for view, name in ((train.train(), "questions"), (train.train(), "current_experience"), (train.train(), "year"),
                       (test.train(), "questions"), (test.eval(), "edits"), (test.eval(), "paraphrases")):  # fmt: skip
        with pytest.raises(MaskedAttributeError, match=name):
            getattr(view, name)
    assert test.logging().questions
    assert (train.logging().year, train.logging().current_experience) == (2, 1)
    seen, held_out = train.train(), [i.question for i in pictures().generality_stream[1].eval().questions]
    assert not {(q.prompt, q.image.key) for q in held_out} & {(e.prompt, e.image.key) for e in seen.edits}
    assert not {q.prompt for q in held_out} & {p for prompts in seen.paraphrases.values() for p in prompts}


def test_only_live_edits_are_tested_and_retired_ones_are_not_trained() -> None:
    lines = [Line(1.0), Line(1.1), Line(2.0, 0, "revise"), Line(2.1, 1, "retire"), Line(2.2)]
    bench = edit_benchmark(PlainStream([*lines[:2], Line(1.2), *lines[2:]]), build("llama"), 6)
    asked = [[i.question.event_id for i in x.questions] for x in bench.test_stream]
    events = [e for x in bench.train_stream for e in x.edits]
    assert asked == [[events[2].id], [events[3].id, events[5].id]]
    assert [len(x.dataset) for x in bench.train_stream] == [3, 2]
    assert [len(x.edits) for x in bench.train_stream] == [3, 3]


def test_a_picture_is_decoded_when_its_row_is_run_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = edit_benchmark("okedit-yearly", build("llava"), 8, config=StreamConfig(edits_per_year=4, seed=5, revise=0, revert=0, retire=0))
    picture = type(bench.groups[0][0].image)
    seen: list[str] = []
    plain_load = picture.load
    monkeypatch.setattr(picture, "load", lambda self: (seen.append(self.key), plain_load(self))[1])
    train = bench.train_stream[0].dataset
    assert [train[i][0].item() for i in range(len(train))]
    assert bench.test_stream[1].questions
    assert seen == []
    AnswerModel(bench.rows)(torch.tensor([0]))
    assert seen == [bench.groups[0][0].image.key]  # type: ignore[union-attr]


def test_text_and_pictures_collate_into_one_batch_of_the_models_inputs() -> None:
    handle = build("llava")
    rows = AnswerRows(handle)
    numbers = [rows.add(Ask("what colour is the ship?"), "green"), rows.add(Ask("who leads?", pictures().groups[0][0].image), "Mara Venn")]
    data = dataset_of(rows, numbers)
    x, y, task = collate_rows([data[i] for i in range(2)])
    batch = rows.batch(x)
    assert (x.tolist(), task.tolist()) == (numbers, [0, 0])
    assert torch.equal(batch.answer_ids.cpu(), y[y != IGNORE])
    logits = handle.model(**batch.inputs).logits[batch.before_answer]
    ours = AnswerModel(rows)(x).transpose(1, 2)[y != IGNORE]
    assert torch.allclose(logits, ours, atol=1e-4)


def test_an_empty_stream_and_an_experience_without_a_live_edit_are_refused() -> None:
    with pytest.raises(BadStream, match=r"plain \(0 lines\) yields no edit of the 5 asked for"):
        edit_benchmark(PlainStream([]), build("llama"), 5)
    with pytest.raises(BadStream, match=r"experience 0 \(year 1\) has no edit that is still live at the end"):
        edit_benchmark(PlainStream([Line(1.0), Line(2.0, 0, "revise")]), build("llama"), 2)


def test_the_loss_equals_that_of_fine_tuning() -> None:
    bench = pictures()
    model, numbers = AnswerModel(bench.rows), numbers_of(bench.train_stream[0].dataset)
    x, y, _ = collate_rows([bench.train_stream[0].dataset[i] for i in range(len(numbers))])
    asks = [a for i in numbers if (a := bench.rows.asks[i]) is not None]
    suffix = suffix_from_down_projection(bench.handle, asks, [bench.rows.answers[i] for i in numbers], -1)
    down = bench.handle.down(-1)
    assert float(answer_loss(model(x), y).detach()) == pytest.approx(float(suffix.losses(down).mean().detach()), rel=1e-4)


def test_the_loss_is_the_formula_computed_by_hand() -> None:
    logits = torch.tensor([[[1.0, 0.0, 9.0], [0.0, 2.0, -9.0]], [[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    labels = torch.tensor([[0, 1, IGNORE], [1, IGNORE, IGNORE]])
    p = logits.softmax(1)
    want = (-(p[0, 0, 0].log() + p[0, 1, 1].log()) / 2 - p[1, 1, 0].log()) / 2
    assert torch.isclose(answer_loss(logits, labels), want)


def test_naive_training_is_fine_tuning() -> None:
    bench = pictures()
    ours, theirs = EDITORS.get("finetune")(EDITORS.get("finetune").Config(steps=5, lr=1e-2)), editor("naive", lr=1e-2)
    for e in (ours, theirs):
        e.prepare(bench.handle, bench.pool)
        apply(e, bench.groups)
    apart, moved = (ours.weight - theirs.weight).norm(), (ours.weight - theirs.base).norm()
    assert moved > 0.1
    assert apart < 1e-3 * moved
