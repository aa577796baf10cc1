"""LoRA: sites, training on what lies above, merging as the sum it claims, years, and adapters as PEFT reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from streams.base import TrainPool
from testbed.bench.reference import whole_model
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.editors.adapters import lowrank
from testbed.editors.adapters.lora import Lora, LoraConfig, YearlyConfig, YearlyLora
from testbed.editors.adapters.lowrank import AdaptedSuffix, Adapter, TargetModule
from testbed.editors.base import BadEditor
from testbed.model.encoding import answer_ids, collate
from testbed.model.loading import load
from tests.helpers.facts import FACTS, fact
from tests.helpers.models import KINDS, TEXT, Noise, build, save

DOWN = r"\.[12]\.(mlp\.(down_proj|c_proj|fc_out|dense_4h_to_h)|fc2)$"
SMALL: dict[str, Any] = {"rank": 2, "lr": 0.02, "steps": 3, "modules": DOWN}
ANSWERS = ["green", "Mara Venn", "two red towers"]
PROMPTS = ("who?", "what colour is the ship in the northern harbour?", "who leads the bridge?")


def make(cls: type[Lora] = Lora, kind: str = "llama", **config: Any) -> Any:
    editor = cls(cls.Config(**{**SMALL, **config}))
    editor.prepare(build(kind), TrainPool())
    return editor


def suffix_of(kind: str, pattern: str = DOWN) -> AdaptedSuffix:
    handle = build(kind)
    pictures = [None, None, None] if kind in TEXT else [Noise(1), None, Noise(2, 32, 64)]
    return AdaptedSuffix(handle, lowrank.find_target_modules(handle, pattern), [Ask(p, x) for p, x in zip(PROMPTS, pictures)], ANSWERS)


def adapters(sites: list[TargetModule], seed: int = 0, rank: int = 2) -> list[Adapter]:
    g = torch.Generator().manual_seed(seed)
    return [Adapter(torch.randn(rank, s.f, generator=g), 0.1 * torch.randn(rank, s.d, generator=g), 0.5) for s in sites]


def in_year(event: EditEvent, year: int) -> EditEvent:
    return EditEvent(event.kind, float(year), 0, event.prompt, event.target, event.image)


# Where adapters go, and what they are trained on


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_the_whole_models_loss_under_the_merged_weights(kind: str) -> None:
    suffix = suffix_of(kind)
    pairs = adapters(list(suffix.targets))
    got = suffix.losses(pairs)
    weights = {s.weight: suffix.handle.parameter(s.weight) + lowrank.delta(s, a) for s, a in zip(suffix.targets, pairs)}
    with torch.no_grad(), suffix.handle.swapped(weights):
        logits = suffix.handle.model(**suffix.batch.inputs, use_cache=False).logits[suffix.batch.before_answer].float()
    nll = torch.nn.functional.cross_entropy(logits, suffix.batch.answer_ids, reduction="none")
    want = torch.stack([nll[suffix.batch.before_answer.nonzero()[:, 0] == i].mean() for i in range(3)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - suffix.losses([])).abs().max() > 1e-3


def test_gradients_equal_those_of_the_whole_model() -> None:
    suffix = suffix_of("llava")
    pairs = [Adapter(a.u.requires_grad_(), a.v.requires_grad_(), a.scale) for a in adapters(list(suffix.targets))]
    inputs = [t for a in pairs for t in (a.u, a.v)]
    got = torch.autograd.grad(suffix.losses(pairs).sum(), inputs)
    weights = {s.weight: suffix.handle.parameter(s.weight) + lowrank.delta(s, a) for s, a in zip(suffix.targets, pairs)}
    out: Any = functional_call(suffix.handle.model, weights, kwargs={**suffix.batch.inputs, "use_cache": False})
    nll = torch.nn.functional.cross_entropy(out.logits[suffix.batch.before_answer], suffix.batch.answer_ids, reduction="none")
    rows = suffix.batch.before_answer.nonzero()[:, 0]
    want = torch.autograd.grad(torch.stack([nll[rows == i].mean() for i in range(3)]).sum(), inputs)
    for a, b in zip(got, want):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llava", "gpt2"])
def test_the_partial_forward_equals_the_reference(kind: str) -> None:
    fast = suffix_of(kind)
    pairs = adapters(list(fast.targets))
    with whole_model(fast.handle):
        slow = suffix_of(kind)
        torch.testing.assert_close(slow.losses(pairs), fast.losses(pairs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(slow.act, fast.act, atol=1e-4, rtol=1e-4)


def test_target_modules_come_in_the_order_in_which_they_run() -> None:
    names = [s.name.split(".")[-1] for s in lowrank.find_target_modules(build("opt"), r"\.0\.")]
    assert names.index("q_proj") < names.index("k_proj")
    assert names[-1] == "fc2"
    layers = [s.layer for s in lowrank.find_target_modules(build("llama"), r"(v_proj|up_proj)$")]
    assert layers == [0, 0, 1, 1, 2, 2]


def test_a_pattern_that_matches_nothing_lists_what_exists() -> None:
    with pytest.raises(BadEditor, match=r"matches no linear map.*transformer\.h\.0 to transformer\.h\.2.*attn\.c_attn.*mlp\.c_proj"):
        lowrank.find_target_modules(build("gpt2"), "down_proj")


def test_training_begins_behind_a_layer_only_where_no_other_target_stands_in_it() -> None:
    handle = build("llama")
    (down,) = lowrank.find_target_modules(handle, r"layers\.1\.mlp\.down_proj$")
    others = lowrank.find_target_modules(handle, r"layers\.1\.mlp\.up_proj$")
    above = lowrank.find_target_modules(handle, r"layers\.2\.mlp\.up_proj$")
    for more, begins_behind in ((above, True), (others, False)):
        assert (AdaptedSuffix(handle, [down, *more], [Ask("who?")], ["green"]).lower is not None) == begins_behind


@pytest.mark.parametrize("kind", ["granite", "cohere"])
def test_a_model_that_scales_its_logits_has_the_losses_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"logits_scaling": 4.0} if kind == "granite" else {}
    save(kind, tmp_path, **more)
    handle = load(str(tmp_path), device="cpu")
    suffix = AdaptedSuffix(handle, lowrank.find_target_modules(handle, DOWN), [Ask("who?")], ["green"])
    found = suffix.losses([lambda act: act.new_zeros(*act.shape[:-1], handle.width)] * len(suffix.targets))
    with torch.no_grad():
        logits = handle.model(**suffix.batch.inputs).logits[suffix.batch.before_answer]
    whole = torch.nn.functional.cross_entropy(logits.float(), suffix.batch.answer_ids)
    torch.testing.assert_close(found[0], whole, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.floats(0.1, 4), st.integers(0, 999))
def test_an_adapter_adds_what_its_change_of_the_weight_does(r: int, f: int, d: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    adapter, x = Adapter(torch.randn(r, f, generator=g), torch.randn(r, d, generator=g), scale), torch.randn(3, f, generator=g)
    want = scale * (adapter.v.double().T @ adapter.u.double())
    torch.testing.assert_close(adapter(x).double(), x.double() @ want.T, atol=1e-4, rtol=1e-4)
    for module in (nn.Linear(f, d, bias=False), object()):
        site = TargetModule("s", module, 0, f, d)  # type: ignore[arg-type]
        stored = want if isinstance(module, nn.Linear) else want.T
        torch.testing.assert_close(lowrank.delta(site, adapter).double(), stored, atol=1e-4, rtol=1e-4)


def test_a_year_adds_its_share_and_the_next_starts_afresh() -> None:
    editor = make(YearlyLora, share=0.25, scale=2.0)
    editor.apply(EditBatch((in_year(FACTS[0], 1),), 1))
    editor.apply(EditBatch((in_year(FACTS[1], 1),), 2))
    first = editor.pairs
    before = editor.edited_weights()
    editor.apply(EditBatch((in_year(FACTS[2], 2),), 3))
    for i, site in enumerate(editor.targets):
        base, (u, v) = editor.handle.parameter(site.weight).double(), first[i]
        year = 0.25 * 2.0 * (v.double().T @ u.double())
        torch.testing.assert_close(editor.merged[i].double(), year, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(before[site.weight].double(), base + year, atol=1e-6, rtol=1e-5)
        u, v = editor.pairs[i]
        want = base + year + 0.25 * 2.0 * (v.double().T @ u.double())
        torch.testing.assert_close(editor.edited_weights()[site.weight].double(), want, atol=1e-6, rtol=1e-5)
    assert not torch.equal(editor.pairs[0][0], first[0][0])


def test_a_stored_year_goes_on_as_if_it_had_not_stopped() -> None:
    a, b = make(YearlyLora), make(YearlyLora)
    for step, year in enumerate((1, 2), 1):
        a.apply(EditBatch((in_year(FACTS[step], year),), step))
    b.load_state_dict(a.state_dict())
    for editor in (a, b):
        editor.apply(EditBatch((in_year(FACTS[0], 3),), 3))
    assert all(torch.equal(x, b.edited_weights()[n]) for n, x in a.edited_weights().items())


def test_one_adapter_is_trained_on_from_where_the_last_batch_left_it() -> None:
    editor = make(steps=60)
    for step, e in enumerate(FACTS, 1):
        report = editor.apply(EditBatch((in_year(e, step),), step))
        assert report.notes["loss"] < 0.3
    said = editor.predictor().respond([Ask(FACTS[-1].prompt)], [None], 5)[0].generated
    assert said == FACTS[-1].target
    assert not hasattr(editor, "merged")
    assert editor.state_bytes() == sum(4 * 2 * (s.f + s.d) for s in editor.targets)


# Saved for others


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llava"])
def test_an_adapter_is_stored_in_pefts_layout(kind: str, tmp_path: Path) -> None:
    editor = make(kind=kind, scale=2.0)
    editor.apply(EditBatch((FACTS[0],), 1))
    editor.save_adapter(tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4.0)
    assert len(tensors) == 2 * len(editor.targets)
    for s in editor.targets:
        b, a = (tensors[f"base_model.model.{s.name}.lora_{x}.weight"].double() for x in "BA")
        change = config["lora_alpha"] / config["r"] * (b @ a)
        want = editor.handle.parameter(s.weight).double() + (change if not config["fan_in_fan_out"] else change.T)
        torch.testing.assert_close(editor.edited_weights()[s.weight].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_it_and_answers_alike(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.helpers.models import folder

    editor = make(kind=kind, scale=2.0)
    editor.apply(EditBatch((FACTS[0],), 1))
    editor.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder(kind)), tmp_path).eval()
    batch = collate(editor.handle, [Ask(FACTS[0].prompt)])
    with torch.no_grad():
        got = theirs(**batch.inputs).logits
        with editor.handle.swapped(editor.edited_weights()):
            want = editor.handle.model(**batch.inputs).logits
        base = editor.handle.model(**batch.inputs).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want - base).abs().max() > 0.01


def test_adapters_of_different_ranks_cannot_be_one_for_peft(tmp_path: Path) -> None:
    editor = make()
    one, two = (s.name for s in editor.targets)
    with pytest.raises(BadEditor, match="one rank"):
        lowrank.save_peft(tmp_path, editor.handle, {one: adapters(editor.targets)[0], two: adapters(editor.targets, rank=3)[1]})


# Bad input


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(rank=0), "rank must be 1 or more"),
        (LoraConfig(steps=0), "steps must be 1 or more"),
        (LoraConfig(lr=-1.0), "lr must be positive"),
        (LoraConfig(scale=0.0), "scale must be positive"),
        (YearlyConfig(share=0.0), "share must be positive and at most 1"),
        (YearlyConfig(share=1.5), "share must be positive and at most 1"),
    ],
)
def test_bad_values_are_told(config: LoraConfig, words: str) -> None:
    assert any(words in p for p in config.problems())


def test_a_rank_wider_than_the_model_a_loss_that_is_not_finite_and_another_models_state_are_refused() -> None:
    with pytest.raises(BadEditor, match="set rank to 64 or less"):
        make(rank=65)
    editor = make()
    editor.hyper = replace(editor.hyper, lr=float("inf"))
    report = editor.apply(EditBatch((fact("the lamp", "green"),), 1))
    assert "smaller" in next(iter(report.failed.values()))
    with pytest.raises(BadEditor, match="made with model"):
        make(kind="qwen2").load_state_dict(editor.state_dict())


# A year that waits for its end (`buffer`)


def of_year(editor: Any, events: list[EditEvent], step: int, closes: bool = True) -> Any:
    report = editor.apply(EditBatch(tuple(events), step, closes_year=closes))
    assert not report.failed, report.failed
    return report


def plain_year(editor: Any, events: list[EditEvent], step: int) -> list[torch.Tensor]:
    """The change of each target by a training loop of its own: PyTorch's Adam, the schedule as a formula, the whole model."""
    generator, config, handle = editor.generator(step), editor.config, editor.handle
    pairs = [lowrank.fresh(t, config.rank, generator) for t in editor.targets]
    pairs = [(u.requires_grad_(True), v.requires_grad_(True)) for u, v in pairs]
    adam, order = torch.optim.Adam([t for p in pairs for t in p], lr=1.0), editor.generator(step)
    parts = [events[at : at + config.rows] for at in range(0, len(events), config.rows)]
    total, at = config.epochs * len(parts), 0
    for _ in range(config.epochs):
        for i in torch.randperm(len(parts), generator=order).tolist():
            warm = total // 10
            rate = at / warm if at < warm else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (at - warm) / (total - warm))))
            for group in adam.param_groups:
                group["lr"] = config.lr * float(rate)
            losses = []
            for event in parts[i]:
                weights = {
                    t.weight: handle.parameter(t.weight) + lowrank.delta(t, Adapter(u, v, config.scale))
                    for t, (u, v) in zip(editor.targets, pairs)
                }
                batch = collate(handle, [event.ask()], [answer_ids(handle, event.ask(), event.target)], end=True)
                logits = functional_call(handle.model, weights, kwargs=batch.inputs).logits[batch.before_answer]
                losses.append(torch.nn.functional.cross_entropy(logits, batch.answer_ids))
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            adam.step()
            at += 1
    return [lowrank.delta(t, Adapter(u, v, config.scale)).detach() for t, (u, v) in zip(editor.targets, pairs)]


def test_a_year_that_waited_is_an_adapter_of_ten_epochs_of_which_a_share_stays() -> None:
    """One increment with all of the share is plain LoRA in mini-batches."""
    for share in (1.0, 0.25):
        editor = make(YearlyLora, buffer=True, share=share, rows=2, epochs=4)
        wanted = plain_year(editor, FACTS, 2)
        assert of_year(editor, FACTS[:2], 1, closes=False).notes["waiting"] == 2
        assert editor.waits and all(torch.equal(w, editor.handle.parameter(n)) for n, w in editor.edited_weights().items())
        assert of_year(editor, FACTS[2:], 2).notes["waiting"] == 0
        assert not editor.waits
        for target, change in zip(editor.targets, wanted):
            got = editor.edited_weights()[target.weight] - editor.handle.parameter(target.weight)
            torch.testing.assert_close(got, share * change, atol=2e-5, rtol=1e-3)


def test_a_second_year_trains_on_what_the_first_left_and_a_state_within_a_year_goes_on_alike() -> None:
    editor, resumed = make(YearlyLora, buffer=True), make(YearlyLora, buffer=True)
    of_year(editor, FACTS[:1], 1)
    first = editor.edited_weights()
    of_year(editor, FACTS[1:2], 2, closes=False)
    assert all(torch.equal(w, first[n]) for n, w in editor.edited_weights().items())
    assert editor.state_bytes() > sum(t.nbytes for t in editor.state_dict().values() if isinstance(t, torch.Tensor))
    resumed.load_state_dict(editor.state_dict())
    for e in (editor, resumed):
        of_year(e, FACTS[2:], 3)
    for n, w in editor.edited_weights().items():
        assert torch.equal(w, resumed.edited_weights()[n])
        assert not torch.equal(w, first[n])


def test_a_year_that_cannot_be_trained_waits_on() -> None:
    editor = make(YearlyLora, buffer=True, lr=float("inf"))
    of_year(editor, FACTS[:1], 1, closes=False)
    report = of_year(editor, FACTS[1:], 2)
    assert report.notes["year_failed"] == 1
    assert len(editor.buffer.waiting) == len(FACTS) and not any(m.any() for m in editor.merged)
