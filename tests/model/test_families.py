"""Every family of docs/models.md, built tiny: the same answers beside others, partial forwards equal to the whole model, edits that act."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from streams.base import StreamConfig
from testbed.core.events import Ask
from testbed.core.registry import EDITORS, STREAMS
from testbed.editors.adapters.lowrank import AdaptedSuffix, find_target_modules
from testbed.editors.locate.core import refuse_routed
from testbed.model import families
from testbed.model.encoding import Batch, answer_ids, collate, text_batch
from testbed.model.families import FAMILIES, UnknownLayout
from testbed.model.generation import greedy_decoding
from testbed.model.handle import ModelHandle, project
from testbed.model.layout import adds_as_it_is
from testbed.model.loading import load
from testbed.model.predictor import ModelPredictor
from testbed.model.suffix import suffix_from_down_projection
from tests.helpers.families import BUILDERS, KINDS, ODD, PICTURED, TEXT, build, save
from tests.helpers.families_table import COLUMNS, WORKS, committed, outcome, table
from tests.helpers.models import KINDS as TESTED_ELSEWHERE
from tests.helpers.models import Noise

NEW = tuple(k for k in KINDS if k not in TESTED_ELSEWHERE)
STATE_SPACE = ("mamba", "mamba2")
ROUTED = ("mixtral", "phimoe", "gpt_oss", "olmoe", "qwen3_moe")
BEHIND = ("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4", "granite", "qwen2_moe", *ROUTED)
"""Text families in which something lies behind the edited matrix: a norm, a factor, a gate or experts."""
PREFIX = tuple(name for name, family in FAMILIES.items() if family.prefix)
"""Families whose prompts are read in both directions."""
ANSWERS = ["green", "Mara Venn", "two red towers"]


def asks(kind: str) -> list[Ask]:
    pictures = (Noise(1), None, Noise(2, 32, 64)) if kind in PICTURED else (None, None, None)
    prompts = ("who leads?", "what colour is the ship in the northern harbour, after all these years?", "who leads the bridge?")
    return [Ask(p, x) for p, x in zip(prompts, pictures)]


@pytest.mark.parametrize("kind", NEW)
def test_a_score_and_an_answer_do_not_depend_on_the_rest_of_the_batch(kind: str) -> None:
    predictor = ModelPredictor(build(kind))
    together = predictor.respond(asks(kind), ANSWERS, 4)
    for ask, answer, beside in zip(asks(kind), ANSWERS, together):
        alone = predictor.respond([ask], [answer], 4)[0]
        assert alone.score is not None and beside.score is not None
        np.testing.assert_allclose(alone.score.logprobs, beside.score.logprobs, atol=2e-3)
        assert alone.generated == beside.generated


@pytest.mark.parametrize(("kind", "path"), [("mixtral", "self_attn.o_proj"), ("qwen2_moe", "mlp.shared_expert.down_proj"), ("gemma2", "")])
def test_what_is_changed_in_the_place_of_a_down_projection_is_said(kind: str, path: str) -> None:
    assert [path in n for n in build(kind).notes if "mixture of experts" in n] == [True] * bool(path)


def test_a_method_that_writes_fewer_layers_than_it_was_given_says_so() -> None:
    editor = EDITORS.get("memit")(EDITORS.get("memit").Config(layers=(0, 1)))
    editor.prepare(build("gemma2"), STREAMS.get("world-yearly")(StreamConfig()).train_pool())
    assert any(n.startswith("of layers 0, 1 only 1 is written") for n in editor.notes)


@pytest.mark.parametrize("kind", [k for k in PICTURED if k in NEW])
def test_a_picture_counts_and_so_do_the_words_about_it(kind: str) -> None:
    predictor = ModelPredictor(build(kind))
    questions = [Ask("who leads?", Noise(1)), Ask("who leads?", Noise(3)), Ask("who builds?", Noise(1)), Ask("who leads?")]
    scores = [float(s.logprobs[0]) for s in predictor.score(questions, ["green"] * 4)]
    assert len(set(scores)) == 4
    again = predictor.score(questions, ["green"] * 4)
    np.testing.assert_allclose([float(s.logprobs[0]) for s in again], scores, atol=1e-3)


def both_ways(kind: str, ask: Ask, answer: str) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of a prompt with its answer, behind which it sets the end token."""
    handle = build(kind)
    text, image = handle.family.image if ask.image else handle.family.text, ask.image and Image.fromarray(ask.image.load())
    assert text is not None and handle.processor is not None
    prompt = text.format(prompt=ask.prompt).removesuffix(handle.family.closing)
    made = handle.processor(images=[image], text=[prompt], suffix=[answer], return_tensors="pt")
    return {k: v for k, v in made.items() if k not in ("attention_mask", "labels")}


@pytest.mark.parametrize("kind", PREFIX)
def test_a_prompt_with_its_answer_is_what_the_processor_makes_of_both(kind: str) -> None:
    handle, ask = build(kind), Ask("who leads?", Noise(1))
    batch = collate(handle, [ask], [answer_ids(handle, ask, "two red towers")], end=True)
    own = both_ways(kind, ask, "two red towers")
    for name in ("input_ids", "token_type_ids", "pixel_values"):
        assert torch.equal(batch.inputs[name], own[name]), name


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("picture", [None, Noise(1)])
def test_a_prompt_is_read_both_ways_and_an_answer_and_running_text_one_way(kind: str, picture: Noise | None) -> None:
    handle = build(kind)

    def states(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return handle.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states[-1][0]

    asks = [Ask("who leads the bridge?", picture), Ask("who leads the bridge!", picture)]
    one, other = (states(collate(handle, [a], [[11, 12]])) for a in asks)
    assert (one[0] - other[0]).abs().max() > 1e-3
    later = states(collate(handle, asks[:1], [[11, 13]]))
    torch.testing.assert_close(one[:-1], later[:-1], atol=1e-5, rtol=1e-5)
    running = [states(text_batch(handle, [[20, 21, 22, last]])) for last in (30, 31)]
    torch.testing.assert_close(running[0][:-1], running[1][:-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PREFIX)
def test_an_answer_is_scored_as_it_would_be_generated(kind: str) -> None:
    handle = build(kind)
    batch = collate(handle, [Ask("who leads?", Noise(1)), Ask("who leads the bridge?", Noise(2))], side="left")
    with torch.no_grad(), greedy_decoding(handle):
        made = handle.model.generate(**batch.inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        answers = made.sequences[:, batch.prompt.shape[1] :].tolist()
        forced = collate(handle, list(batch.asks), answers, side="left")
        logits = handle.model(**forced.inputs, use_cache=False).logits[:, -5:-1]
    torch.testing.assert_close(logits, torch.stack(made.logits, 1), atol=1e-4, rtol=1e-4)


def through(handle: ModelHandle, layer: int, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda act: project(handle.down(layer), act, weight)


@torch.no_grad()
def whole(handle: ModelHandle, batch: Any) -> torch.Tensor:
    return handle.model(**batch.inputs, use_cache=False).logits[batch.before_answer]


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", [k for k in NEW if k not in STATE_SPACE])
def test_the_partial_forward_equals_the_whole_model_under_any_weight(kind: str, layer: int) -> None:
    handle = build(kind)
    suffix, name = suffix_from_down_projection(handle, asks(kind), ANSWERS, layer), handle.down_weight(layer)
    own = handle.parameter(name).detach()
    other = own + 0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    before = suffix.logits(through(handle, layer, own))
    torch.testing.assert_close(before, whole(handle, suffix.batch), atol=2e-4, rtol=2e-4)
    with handle.swapped({name: other}):
        want = whole(handle, suffix.batch)
    assert (want - before).abs().max() > 0.01
    torch.testing.assert_close(suffix.logits(through(handle, layer, other)), want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", [k for k in NEW if k not in STATE_SPACE])
def test_an_adapter_is_trained_on_the_logits_of_the_whole_model(kind: str) -> None:
    handle = build(kind)
    targets = find_target_modules(handle, re.escape(handle.down_weight(1).removesuffix(".weight")) + "$")
    suffix = AdaptedSuffix(handle, targets, asks(kind), ANSWERS)
    want = whole(handle, suffix.batch)
    torch.testing.assert_close(handle.logits(suffix.final_hidden([])), want, atol=2e-4, rtol=2e-4)


def test_what_lies_behind_the_edited_matrix_is_found_out_by_running_the_layer() -> None:
    for kind in (k for k in TEXT if k not in STATE_SPACE):
        assert adds_as_it_is(build(kind), 1) == (kind not in BEHIND), kind


def test_layers_of_routed_experts_are_told_from_those_with_a_shared_one() -> None:
    for kind in (k for k in TEXT if k not in STATE_SPACE):
        assert build(kind).is_routed(1) == (kind in ROUTED), kind
    assert build("mixtral").down_weight(1).endswith("self_attn.o_proj.weight")
    assert build("deepseek_v2").down_weight(0).endswith("mlp.down_proj.weight")
    assert build("deepseek_v2").down_weight(1).endswith("mlp.shared_experts.down_proj.weight")
    with pytest.raises(ValueError, match=r"rome cannot edit layer 1 of .*a mixture of routed experts without a shared one"):
        refuse_routed("rome", build("mixtral"), [1])
    assert refuse_routed("rome", build("deepseek_v2"), [0, 1, 2]) is None


@pytest.mark.parametrize("kind", list(ODD))
def test_hidden_states_of_another_form_are_refused_when_the_model_is_loaded(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    with pytest.raises(UnknownLayout, match="one vector a position"):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("kind", NEW)
def test_an_edit_acts(kind: str) -> None:
    """One editor a family by default: a codebook, and facts in the prompt where there is no matrix to edit."""
    assert outcome(kind, "ike" if kind in STATE_SPACE else "balancedit") == WORKS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_editor_of_each_kind_works_or_says_why_not(kind: str) -> None:
    found = {name: outcome(kind, name) for name in COLUMNS}
    refused = set(COLUMNS) - {"ike"} if kind in STATE_SPACE else {"rome"} & set(COLUMNS) if kind in ROUTED else set()
    assert {name for name, result in found.items() if result != WORKS} == refused, found


@pytest.mark.slow
def test_the_page_holds_the_table_that_the_command_gives() -> None:
    assert committed() == table()


def test_the_page_has_a_row_for_each_family_that_is_built_and_each_row_of_the_table_of_families() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", committed(), flags=re.MULTILINE)
    assert rows == list(KINDS)
    assert set(BUILDERS) <= set(FAMILIES)
    assert {name for name, f in FAMILIES.items() if f.image} == set(PICTURED)


def test_logit_forms_are_read_from_the_text_part_of_a_configuration() -> None:
    assert families.logit_form(build("llama").model.config) == families.LogitForm()
    assert families.logit_form(build("cohere").model.config).factor == 0.25
    assert families.logit_form(build("granite").model.config).factor == 0.25
    assert families.logit_form(build("gemma2").model.config).cap == 30.0
