"""Targets, keys, lookup positions, contexts and statistics of locate-then-edit methods, on random tiny models."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.core.events import Ask, EditBatch
from testbed.editors.locate import targets
from testbed.editors.locate.keys import KeyComputation, ask_of, draw_contexts, lookup, subject_of
from testbed.editors.locate.targets import RowAdam, TargetLoss, TargetTask, search, unchanged_outputs
from testbed.model import packed_linear
from testbed.model.encoding import answer_ids, collate, prompt_in_template, prompt_inputs
from testbed.model.handle import ModelHandle
from testbed.model.suffix import suffix_from_layer
from tests.helpers.facts import FACTS, SMALL, make, task
from tests.helpers.models import KINDS, TEXT, Noise, build


def whole_losses(t: TargetTask, delta: Tensor) -> Tensor:
    """The same loss by one whole forward a row, with a hook that adds the delta."""
    handle, out = t.handle, []
    for event, d in zip(t.events, delta):
        rows = []
        for context in t.contexts:
            ask = ask_of(event, context)
            ids = [*answer_ids(handle, ask_of(event), event.target), handle.tokenizer.eos_token_id]
            batch = collate(handle, [ask], [ids])
            at = lookup(handle, ask, subject_of(event))

            def hook(m: Any, args: Any, output: Any, at: int = at, d: Tensor = d) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden.clone()
                hidden[0, at] += d
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            with handle.hooked(handle.layers[t.layer], hook):
                logits = handle.model(**batch.inputs, use_cache=False).logits[batch.before_answer]
            rows.append(torch.nn.functional.cross_entropy(logits, batch.answer_ids))
        out.append(torch.stack(rows).mean())
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_forward_gives_the_whole_models_loss(kind: str) -> None:
    facts = [replace(e, image=None if kind in TEXT or i == 1 else Noise(i), id="") for i, e in enumerate(FACTS)]
    t = task(kind, facts)
    delta = torch.randn(3, t.handle.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = whole_losses(t, delta)
        before = hooks(t.handle)
        torch.testing.assert_close(TargetLoss(t).losses(delta, 0.0), want, rtol=1e-3, atol=1e-3)
    assert hooks(t.handle) == before


def hooks(handle: ModelHandle) -> int:
    """Hooks on the model's modules (transformers leaves some of its own)."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in handle.model.modules())


def test_targets_of_a_batch_are_those_of_each_edit_alone() -> None:
    together = search(task(), SMALL, unchanged_outputs(build("llama"), FACTS, 1).norm(dim=1))
    for i, e in enumerate(FACTS):
        alone = search(task(events=[e]), SMALL, unchanged_outputs(build("llama"), [e], 1).norm(dim=1))
        assert torch.nn.functional.cosine_similarity(together.delta[i], alone.delta[0], dim=0) > 0.9999
        torch.testing.assert_close(together.loss[i], alone.loss[0], rtol=1e-3, atol=1e-3)


def test_edits_that_are_done_stop_and_leave_without_moving_the_others() -> None:
    unit = unchanged_outputs(build("llama"), FACTS, 1).norm(dim=1)
    first = TargetLoss(task()).losses(torch.zeros(3, 64), 0.0)
    bar = float(first.median()) + 1e-3
    plain, early = search(task(), replace(SMALL, kl=0.0, stop=0.0), unit), search(task(), replace(SMALL, kl=0.0, stop=bar), unit)
    done = first < bar
    assert done.sum() == 2
    assert early.delta[done].abs().max() == 0
    assert early.steps[done].max() == 0
    kept = ~done
    if float(early.steps[kept]) == float(plain.steps[kept]):
        torch.testing.assert_close(early.delta[kept], plain.delta[kept], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not packed_linear.QUICK_BFLOAT16, reason="this processor has neither AVX-512 BF16 nor AMX")
def test_products_in_bfloat16_find_nearly_the_same_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_LEAST", 0)  # the weights of the random model are small
    unit = unchanged_outputs(build("llama"), FACTS, 1).norm(dim=1)
    exact, rounded = (search(task(), replace(SMALL, products=p), unit) for p in ("float32", "bfloat16"))
    assert not torch.equal(exact.delta, rounded.delta)
    assert rounded.delta.dtype == torch.float32
    assert (torch.nn.functional.cosine_similarity(exact.delta, rounded.delta) > 0.99).all()
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.05, atol=0.02)


def test_products_that_the_processor_makes_no_faster_stay_as_they_are_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "QUICK_BFLOAT16", False)
    assert targets.dtype_of_products("bfloat16") == torch.float32
    (note,) = targets.notes_on_products(build("llama"), "bfloat16")
    assert note.endswith("the search multiplies in torch.float32 here")
    monkeypatch.setattr(targets, "QUICK_BFLOAT16", True)
    assert targets.dtype_of_products("bfloat16") == torch.bfloat16
    assert targets.notes_on_products(build("llama"), "bfloat16") == targets.notes_on_products(build("llama"), "float32") == []


def test_the_clamp_holds_and_one_step_only_reads() -> None:
    unit = unchanged_outputs(build("llama"), FACTS, 1).norm(dim=1)
    far = search(task(), replace(SMALL, lr=5.0, clamp=0.3), unit)
    assert (far.delta.norm(dim=1) <= 0.3 * unit * (1 + 1e-5)).all()
    one = search(task(), replace(SMALL, steps=1), unit)
    assert one.delta.abs().max() == 0
    assert one.steps.max() == 0


def test_the_divergence_is_zero_at_first_and_runs_from_the_changed_to_the_unchanged_model() -> None:
    t = task()
    forward, zero = TargetLoss(t), torch.zeros(3, 64)
    with torch.no_grad():
        assert divergence_of(forward, zero).abs().max() < 1e-6
        delta = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
        got = divergence_of(forward, delta)
        assert forward.kl_rows is not None
        logp = forward.unedited
        changed = logp_of(forward, delta)
    assert logp is not None
    torch.testing.assert_close(got, (changed.exp() * (changed - logp)).sum(-1), rtol=1e-4, atol=1e-5)
    assert (got > 0).all()


def divergence_of(forward: TargetLoss, delta: Tensor) -> Tensor:
    return forward._divergence(forward._read(delta)[1])


def logp_of(forward: TargetLoss, delta: Tensor) -> Tensor:
    fresh = TargetLoss.__new__(TargetLoss)
    fresh.__dict__.update({**forward.__dict__, "unedited": None})
    divergence_of(fresh, delta)
    assert fresh.unedited is not None
    return fresh.unedited


def test_adam_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(4, 5, generator=g)
    theirs = theirs.clone().requires_grad_(True)
    adam, ref = RowAdam(ours, 0.1), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(7):
        grad = torch.randn(4, 5, generator=g)
        ours = ours + adam.step(grad)
        theirs.grad = grad.clone()
        ref.step()
    torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_the_lookup_token_ends_at_the_subjects_last_character(kind: str) -> None:
    handle = build(kind)
    prompts = ["Zor leads?", "who leads the Zor", "is Zor, of Zor, old?", "Ünä Zor'é rules", "about (Zor) now"]
    for i, prompt in enumerate(prompts):
        for image in (None,) if kind in TEXT else (None, Noise(i)):
            ask = Ask(prompt, image)
            ids = prompt_inputs(handle, ask)["input_ids"][0]
            at = lookup(handle, ask, "Zor")
            text, start, _ = prompt_in_template(handle, ask)
            before = handle.tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
            cut = text[: start + prompt.rindex("Zor") + 3]
            assert before.rstrip(" ,'()é?").endswith("Zor"), (kind, prompt, before)
            assert before.count("Zor") == cut.count("Zor")
            assert lookup(handle, ask, None) == len(ids) - 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llava"])
def test_computed_keys_are_those_of_the_edited_model(kind: str) -> None:
    """The second pass over keys in the released code finds what the first one had: a key depends only on what lies below."""
    editor = make("memit", kind, layers=(0, 1))
    seen: dict[int, Tensor] = {}
    keep = editor._keep  # type: ignore[attr-defined]
    editor._keep = lambda layer, step, solution, keys: keep(layer, step, solution, None)  # type: ignore[attr-defined]
    solve = editor._solve  # type: ignore[attr-defined]
    editor._solve = lambda layer, keys, *rest: (seen.__setitem__(layer, keys), solve(layer, keys, *rest))[1]  # type: ignore[attr-defined]
    assert not editor.apply(EditBatch(tuple(FACTS), 1)).failed
    with editor.handle.swapped(editor.edited_weights()), torch.no_grad():
        again = KeyComputation(editor.handle, FACTS, editor.contexts, (0, 1), 0.5)  # type: ignore[attr-defined]
        for layer in (0, 1):
            torch.testing.assert_close(again.keys(layer), seen[layer], rtol=1e-3, atol=1e-4)


def test_equal_contexts_give_the_bare_key_and_weights_sum_to_one() -> None:
    with torch.no_grad():
        computation = KeyComputation(build("llama"), FACTS, ["", "", ""], (0, 1), 0.5)
        torch.testing.assert_close(computation.keys(0), computation.bare_key)


def test_contexts_are_drawn_from_the_generator_alone() -> None:
    def draw(seed: int) -> list[str]:
        return draw_contexts(build("llama"), 5, (10,), torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all("{" not in c and "<s>" not in c for c in draw(0))


@pytest.mark.parametrize("kind", KINDS)
def test_entering_a_model_stops_early_and_gives_the_same_hidden_states(kind: str) -> None:
    handle = build(kind)
    asks = [Ask("who leads the bridge?", None if kind in TEXT else Noise(3)), Ask("what?")]
    batch = collate(handle, asks)
    seen: dict[int, Tensor] = {}
    own: list[Any] = []
    for n, layer in enumerate(handle.layers):
        own.append(layer.register_forward_hook(lambda m, a, out, n=n: seen.__setitem__(n, out[0] if isinstance(out, tuple) else out)))
    with torch.no_grad():
        logits = handle.model(**batch.inputs, use_cache=False).logits
        for h in own:
            h.remove()
        above = suffix_from_layer(handle, batch, 1, 2)
        torch.testing.assert_close(above.hidden, seen[0])
        torch.testing.assert_close(above.run(above.hidden, 1, 3), seen[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(handle.model(**batch.inputs, use_cache=False).logits, logits)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=40))
def test_every_edit_is_in_one_group_and_no_forward_is_for_a_few_of_many(widths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "positions_to_run", lambda handle, event, end: event.seq)
        events = [replace(FACTS[0], seq=width) for width in widths]
        groups = targets._groups_of_like_width(TargetTask(build("llama"), events, 0, []))
    assert sorted(i for g in groups for i in g) == list(range(len(widths)))
    assert all(len(g) >= 8 for g in groups) or len(groups) == 1
    edges = [(min(widths[i] for i in g), max(widths[i] for i in g)) for g in groups]
    assert all(last < first for (_, last), (first, _) in pairwise(edges))
