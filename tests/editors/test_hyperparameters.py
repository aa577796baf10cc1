"""Published values by model, derived ones for others, and what the first edits say of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.editors import hyperparameters as hp
from testbed.editors.base import Editor
from testbed.editors.hyperparameters import ModelKey, PublishedRow, doubts, filled, resolve
from testbed.editors.locate.alphaedit import AlphaEdit, AlphaEditConfig
from testbed.model.predictor import ModelPredictor
from tests.helpers.editor_suite import BRIEF, of_config
from tests.helpers.facts import FACTS, META_POOL, POOL, fact, make
from tests.helpers.models import Noise, build

KEY = ModelKey("llama", 32, 4096, 32000)
CONFIG = AlphaEditConfig(steps=7)


def tables() -> Iterator[tuple[str, ModelKey, PublishedRow, Any]]:
    for name, cls in EDITORS.items():
        for key, row in cls.published.items():
            yield name, key, row, cls


def test_every_published_row_fits_its_model_and_names_its_source() -> None:
    seen = set()
    for name, key, row, cls in tables():
        seen.add(name)
        hyper = filled(cls.Config(), {**cls.defaults, **row.values})
        assert not hyper.problems(), (name, key)
        assert set(row.values) <= set(cls.Config.__dataclass_fields__), (name, key)
        assert all(getattr(hyper, k) == v for k, v in row.values.items()), (name, key)
        layers = (*(getattr(hyper, "layers", None) or ()), *(n for n in [getattr(hyper, "layer", None)] if n is not None))
        assert all(-key.layers <= n < key.layers for n in layers), (name, key)
        assert row.source
    assert {"rome", "memit", "alphaedit", "emmet", "pmet", "wise", "grace", "elder", "finetune", "finetune-l", "lora", "balancedit"} <= seen


@pytest.mark.parametrize("other", [KEY._replace(vocabulary=128256), KEY._replace(width=960), KEY._replace(layers=30)])
def test_a_model_of_the_same_type_with_another_shape_gets_no_published_row(other: ModelKey) -> None:
    table = {KEY: PublishedRow("the paper", {"l2": 3.0})}
    assert resolve(CONFIG, KEY, table, {"l2": 5.0}, {"lr": 0.5})[0].l2 == 3.0
    found, note = resolve(CONFIG, other, table, {"l2": 5.0, "steps": 9}, {"lr": 0.5})
    assert (found.l2, found.lr, found.steps) == (5.0, 0.5, 7)
    assert "no published values" in note
    assert "derived for it: l2 5" in note
    assert "steps" not in note  # the user's own


def test_a_published_row_is_named_with_its_source() -> None:
    assert resolve(CONFIG, KEY, {KEY: PublishedRow("the paper", {})}, {}, {})[1] == "published values (the paper)"


def test_every_editor_that_trains_says_where_its_values_come_from() -> None:
    for name, cls in EDITORS.items():
        if cls.traits.learns == "training":
            editor = cls(cls.Config(**of_config(cls, BRIEF)))
            editor.prepare(build("gpt2"), META_POOL)
            line = "no published values for a gpt2 of 3 layers, width 64, 400 tokens; "
            assert any(
                n.startswith(line) and f"python -m testbed.tune --model {editor.handle.name} --editor {name}" in n for n in editor.notes
            )


def test_published_absolute_values_can_be_given_to_any_model() -> None:
    relative: Any = make("alphaedit", l2=10.0)
    assert relative.hyper.relative
    assert any("l2 10 is a multiple of the size of the model's keys; --set alphaedit.relative=false" in n for n in relative.notes)
    absolute: Any = make("alphaedit", l2=10.0, relative=False)
    assert (absolute.hyper.l2, absolute.hyper.threshold, absolute.hyper.relative) == (10.0, 2e-2, False)
    assert not any("multiple" in n for n in absolute.notes)
    for editor, unit in ((relative, None), (absolute, 1.0)):
        editor.apply(EditBatch((FACTS[0],), 1))
        (layer,) = editor.hyper.layers
        trace = float(editor.second_moments[layer].diagonal().sum())
        assert editor.priors[layer].rho == pytest.approx(10.0 * (unit or trace))


def test_a_shallow_model_is_edited_where_it_reads_what_the_stream_asks_about() -> None:
    """Names in the first layer, pictures halfway up; without a stream, as the model reads."""
    shown = replace(POOL.questions[0], image=Noise(0))
    for questions, layer, steps in ((POOL.questions, 0, 30), ((*POOL.questions, shown), 1, 200)):
        editor = AlphaEdit()
        editor.prepare(build("llava"), TrainPool(questions, POOL.texts))
        assert (editor.hyper.layers, editor.hyper.steps) == ((layer,), steps)
    for kind, layer in (("llava", 1), ("llama", 0)):
        bound = AlphaEdit()
        bound.bind(build(kind))
        assert bound.hyper.layers == (layer,)


def test_rome_takes_the_unit_matrix_where_its_row_does() -> None:
    editor: Any = make("rome", second_moment=False, pool=TrainPool())
    report = editor.apply(EditBatch((FACTS[0],), 1))
    assert not report.failed
    assert editor.second_moments == {}


def test_edits_that_change_nothing_and_a_model_that_broke_are_noticed() -> None:
    handle = build("llama")

    class Broken(ModelPredictor):
        def text_logprobs(self, texts: Any) -> list[np.ndarray]:
            return [x - np.log(11.0) for x in super().text_logprobs(texts)]

    nothing, broken = doubts(handle, Broken(handle), FACTS, hp.PLAIN)
    assert "the first 3 edits change nothing" in nothing
    assert broken.startswith("perplexity of plain text rose from ")
    editor: Any = make("memit")
    editor.apply(EditBatch(tuple(FACTS), 1))
    assert not any("change nothing" in d for d in doubts(handle, editor.predictor(), FACTS, hp.PLAIN))


def test_an_editor_that_is_told_the_truth_is_looked_at_with_it() -> None:
    handle = build("llama")

    class Told(ModelPredictor):
        def score(self, asks: Any, answers: Any) -> Any:
            assert all((a.event_id is None) == (a.truth is None) for a in asks)
            return [replace(s, logprobs=s.logprobs + bool(a.event_id)) for s, a in zip(super().score(asks, answers), asks)]

    assert not doubts(handle, Told(handle), FACTS, hp.PLAIN, informed=True)
    assert "change nothing" in doubts(handle, Told(handle), FACTS, hp.PLAIN)[0]


def test_an_editor_is_looked_at_once_and_only_where_enough_edits_are_made() -> None:
    four = [*FACTS, fact("the lamp", "green")]
    editor: Any = make("memit", lr=1e-9)

    def told() -> list[str]:
        return [n for n in editor.notes if "change nothing" in n]

    editor.apply(EditBatch(tuple(four[:3]), 1))
    assert told() == []
    editor.apply(EditBatch((four[3],), 2))
    (note,) = told()
    assert note.startswith("the first 4 edits")
    assert "--editor memit" in note
    editor.apply(EditBatch((fact("the sea", "blue"),), 3))
    assert len(told()) == 1
    resumed: Editor = make("memit", lr=1e-9)
    resumed.load_state_dict(editor.state_dict())
    resumed.apply(EditBatch(tuple(fact(f"the {w}", "blue") for w in ("fox", "owl", "elk", "bee")), 4))
    assert not any("change nothing" in n for n in resumed.notes)


def test_alphaedit_stands_in_for_a_row_only_where_the_shape_is_its_models() -> None:
    assert {k.type for k in AlphaEdit.published} == {"gpt2", "gptj", "llama", "qwen2"}
    assert hp.LLAMA_2_7B not in AlphaEdit.published
