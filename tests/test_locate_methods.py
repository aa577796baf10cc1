"""Locate-then-edit editors on random tiny models: targets, keys, states, wrappers, bad input, faults of released code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _models import KINDS, TEXT, Noise, build
from torch import Tensor

from streams.base import TrainPool
from testbed.config import RunConfig
from testbed.editors._locate_hyper import TABLE, Hyper, derived
from testbed.editors._locate_moments import corpus_of, second_moments
from testbed.editors._locate_rows import ask_of, draw_contexts, lookup, prompt_rows, subject_of
from testbed.editors._locate_sweep import Sweep
from testbed.editors._locate_targets import Adam, Forward, Task, heights, search
from testbed.editors.base import BadEditor, EditFailed, Editor
from testbed.editors.prune import restrained
from testbed.editors.rect import sparse
from testbed.encode import Ask, collate, prompt_inputs, worded
from testbed.events import EditBatch, EditEvent, Question
from testbed.models import ModelHandle, weights_hash
from testbed.registry import EDITORS, WRAPPERS, UnknownName
from testbed.tail import enter

METHODS = ("rome", "memit", "memit-seq", "alphaedit", "emmet")
SMALL = Hyper((0, 1), 1, steps=6, lr=0.5, clamp=2.0, kl=0.1, relative=True)
TEXTS = tuple(f"the small lamp number {i} stands beside the river and the old bridge" for i in range(40))
POOL = TrainPool((Question("general", "what colour is the lamp?", "red", topic="x"),), TEXTS)


def fact(subject: str, target: str, picture: int | None = None, **more: Any) -> EditEvent:
    image = None if picture is None else Noise(picture)
    return EditEvent("add", 1.0, 0, f"Who leads {subject} now?", target, image, subject=subject, relation="head", **more)


FACTS = [fact("the northern harbour", "Mara Venn"), fact("Zor", "two red towers"), fact("the old bridge", "green")]


def make(name: str, kind: str = "llama", pool: TrainPool = POOL, **config: Any) -> Editor:
    cls = EDITORS.get(name)
    settings = {"contexts": 1, "steps": 6, **config}
    editor = cls(cls.Config(**settings))
    editor.prepare(build(kind), pool)
    return editor


def task(kind: str = "llama", events: list[EditEvent] = FACTS, layer: int = 1, contexts: tuple[str, ...] = ("", "So it goes")) -> Task:
    return Task(build(kind), events, layer, contexts)


def whole_losses(t: Task, delta: Tensor) -> Tensor:
    """The same loss by one whole forward a row, with a hook that adds the delta."""
    handle, out = t.handle, []
    from testbed.encode import answer_ids

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
        torch.testing.assert_close(Forward(t).losses(delta, 0.0), want, rtol=1e-3, atol=1e-3)
    assert hooks(t.handle) == before


def hooks(handle: ModelHandle) -> int:
    """Hooks on the model's modules (transformers leaves some of its own)."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in handle.model.modules())


def test_targets_of_a_batch_are_those_of_each_edit_alone() -> None:
    together = search(task(), SMALL, heights(build("llama"), FACTS, 1).norm(dim=1))
    for i, e in enumerate(FACTS):
        alone = search(task(events=[e]), SMALL, heights(build("llama"), [e], 1).norm(dim=1))
        assert torch.nn.functional.cosine_similarity(together.delta[i], alone.delta[0], dim=0) > 0.9999
        torch.testing.assert_close(together.loss[i], alone.loss[0], rtol=1e-3, atol=1e-3)


def test_edits_that_are_done_stop_and_leave_without_moving_the_others() -> None:
    unit = heights(build("llama"), FACTS, 1).norm(dim=1)
    first = Forward(task()).losses(torch.zeros(3, 64), 0.0)
    bar = float(first.median()) + 1e-3
    plain, early = search(task(), replace(SMALL, kl=0.0, stop=0.0), unit), search(task(), replace(SMALL, kl=0.0, stop=bar), unit)
    done = first < bar
    assert done.sum() == 2
    assert early.delta[done].abs().max() == 0
    assert early.steps[done].max() == 0
    kept = ~done
    if float(early.steps[kept]) == float(plain.steps[kept]):
        torch.testing.assert_close(early.delta[kept], plain.delta[kept], rtol=1e-3, atol=1e-3)


def test_the_clamp_holds_and_one_step_only_reads() -> None:
    unit = heights(build("llama"), FACTS, 1).norm(dim=1)
    far = search(task(), replace(SMALL, lr=5.0, clamp=0.3), unit)
    assert (far.delta.norm(dim=1) <= 0.3 * unit * (1 + 1e-5)).all()
    one = search(task(), replace(SMALL, steps=1), unit)
    assert one.delta.abs().max() == 0
    assert one.steps.max() == 0


def test_the_drift_is_zero_at_first_and_runs_from_the_changed_to_the_unchanged_model() -> None:
    t = task()
    forward, zero = Forward(t), torch.zeros(3, 64)
    with torch.no_grad():
        assert forward._drift(zero).abs().max() < 1e-6
        delta = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
        got = forward._drift(delta)
        assert forward.essence is not None
        logp = forward.before
        changed = logp_of(forward, delta)
    assert logp is not None
    torch.testing.assert_close(got, (changed.exp() * (changed - logp)).sum(-1), rtol=1e-4, atol=1e-5)
    assert (got > 0).all()


def logp_of(forward: Forward, delta: Tensor) -> Tensor:
    fresh = Forward.__new__(Forward)
    fresh.__dict__.update({**forward.__dict__, "before": None})
    fresh._drift(delta)
    assert fresh.before is not None
    return fresh.before


def test_adam_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(4, 5, generator=g)
    theirs = theirs.clone().requires_grad_(True)
    adam, ref = Adam(ours, 0.1), torch.optim.Adam([theirs], lr=0.1)
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
            text, start, _ = worded(handle, ask)
            before = handle.tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
            cut = text[: start + prompt.rindex("Zor") + 3]
            assert before.rstrip(" ,'()é?").endswith("Zor"), (kind, prompt, before)
            assert before.count("Zor") == cut.count("Zor")
            assert lookup(handle, ask, None) == len(ids) - 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llava"])
def test_keys_of_the_sweep_are_those_of_the_edited_model(kind: str) -> None:
    """The second pass over keys in the released code finds what the first one had: a key depends only on what lies below."""
    editor = make("memit", kind, layers=(0, 1))
    seen: dict[int, Tensor] = {}
    keep = editor._keep  # type: ignore[attr-defined]
    editor._keep = lambda layer, step, solution, keys: keep(layer, step, solution, None)  # type: ignore[attr-defined]
    solve = editor._solve  # type: ignore[attr-defined]
    editor._solve = lambda layer, keys, *rest: (seen.__setitem__(layer, keys), solve(layer, keys, *rest))[1]  # type: ignore[attr-defined]
    assert not editor.apply(EditBatch(tuple(FACTS), 1)).failed
    with editor.handle.swapped(editor.edited_weights()), torch.no_grad():
        again = Sweep(editor.handle, FACTS, editor.contexts, (0, 1), 0.5)  # type: ignore[attr-defined]
        for layer in (0, 1):
            torch.testing.assert_close(again.read(layer), seen[layer], rtol=1e-3, atol=1e-4)


def test_equal_contexts_give_the_bare_key_and_weights_sum_to_one() -> None:
    with torch.no_grad():
        sweep = Sweep(build("llama"), FACTS, ["", "", ""], (0, 1), 0.5)
        torch.testing.assert_close(sweep.read(0), sweep.bare_key)


def test_contexts_are_drawn_from_the_generator_alone() -> None:
    def draw(seed: int) -> list[str]:
        return draw_contexts(build("llama"), 5, 10, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all("{" not in c and "<s>" not in c for c in draw(0))


def test_second_moments_are_means_over_text_positions_and_kept_by_model_and_corpus() -> None:
    handle, corpus = build("llama"), corpus_of(POOL, None)
    got = second_moments(handle, corpus, [0, 1])
    assert second_moments(handle, corpus, [1])[1] is got[1]
    other = second_moments(handle, corpus_of(TrainPool(texts=TEXTS[:3]), None), [0])
    assert not torch.equal(other[0], got[0])
    kept: list[Tensor] = []
    rows = []
    tok = handle.tokenizer
    for text in TEXTS[:3]:
        with handle.hooked(handle.down(0), lambda m, args: kept.append(args[0][0].double()), pre=True), torch.no_grad():
            handle.model(input_ids=torch.tensor([[tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]]]))
        rows.append(kept.pop())
    keys = torch.cat(rows)
    torch.testing.assert_close(other[0], keys.T @ keys / len(keys), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*METHODS, "alphaedit+blue", "memit+prune", "memit+rect"])
def test_only_the_listed_layers_change_and_the_base_never(name: str) -> None:
    editor = make(name, "gpt2")
    before = weights_hash(editor.handle.model)
    report = editor.apply(EditBatch(tuple(FACTS), 1))
    assert not report.failed
    assert report.delta_norm is not None
    assert report.delta_norm > 0
    changed = {n for n, w in editor.edited_weights().items() if not torch.equal(w, editor.handle.parameter(n))}
    assert changed == {editor.handle.down_weight(n) for n in editor.changes.layers}  # type: ignore[attr-defined]
    assert weights_hash(editor.handle.model) == before
    told = {"loss", "change_norm", "novelty", "condition", "excluded", "collisions", "seconds_targets", "seconds_keys", "seconds_solve"}
    assert told <= report.notes.keys()


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_moves_the_model_towards_its_target(name: str) -> None:
    editor = make(name, "llama", steps=20, clamp=4.0, contexts=0)
    ending = replace(FACTS[0], prompt="Now leads the northern harbour", id="")
    asks, answers = [ask_of(ending)], [ending.target]
    before = editor.predictor().score(asks, answers)[0].logprobs.sum()
    editor.apply(EditBatch((ending,), 1))
    assert editor.predictor().score(asks, answers)[0].logprobs.sum() > before + 1


def test_any_step_can_be_rebuilt_from_the_state() -> None:
    editor = make("memit-seq")
    after: list[dict[str, Tensor]] = []
    for step, e in enumerate(FACTS, 1):
        editor.apply(EditBatch((e,), step))
        after.append(editor.edited_weights())
    again = make("memit-seq")
    again.load_state_dict(editor.state_dict())
    for step, weights in enumerate(after, 1):
        rebuilt = again.changes.at(step)  # type: ignore[attr-defined]
        assert all(torch.equal(w, rebuilt[n]) for n, w in weights.items())
    base = again.changes.at(0)  # type: ignore[attr-defined]
    assert all(torch.equal(w, again.handle.parameter(n)) for n, w in base.items())


@pytest.mark.parametrize("name", [*METHODS, "alphaedit+blue", "memit+rect"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    """Released code skips finished batches without making their edits again; here the state holds them, history included."""
    whole, cut = make(name), make(name)
    for step, e in enumerate(FACTS, 1):
        whole.apply(EditBatch((e,), step))
    cut.apply(EditBatch((FACTS[0],), 1))
    resumed = make(name)
    resumed.load_state_dict(cut.state_dict())
    for step, e in enumerate(FACTS[1:], 2):
        resumed.apply(EditBatch((e,), step))
    assert all(torch.equal(w, resumed.edited_weights()[n]) for n, w in whole.edited_weights().items())


def test_rome_meets_its_target_with_the_key_it_uses_and_the_released_form_does_not() -> None:
    def miss(compat: bool) -> float:
        editor = make("rome", contexts=3, compat=compat)
        kept: list[Any] = []
        solve = editor._solve  # type: ignore[attr-defined]
        editor._solve = lambda layer, keys, residual, bare: kept.append((keys, residual, solve(layer, keys, residual, bare))) or kept[-1][2]  # type: ignore[attr-defined]
        editor.apply(EditBatch((FACTS[0],), 1))
        keys, residual, s = kept[0]
        return float((keys.double() @ s.right.T @ s.left - residual).norm() / residual.norm())

    assert miss(False) < 1e-9
    assert miss(True) > 1e-3


def test_released_romes_keys_can_blow_up() -> None:
    editor = make("rome", compat=True)
    editor._set_up(FACTS[0])  # type: ignore[attr-defined]
    keys = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    prior = editor.priors[editor.hyper.layer]  # type: ignore[attr-defined]
    u = prior.unwhiten(prior.whiten(keys.double().T)).T
    bare = keys.double() - u * (keys.double() * u).sum() / u.square().sum() * (1 - 1e-6)
    wild = editor._solve(0, keys, torch.ones(1, 64), bare)  # type: ignore[attr-defined]
    tame = make("rome")
    tame.priors = editor.priors  # type: ignore[attr-defined]
    calm = tame._solve(0, keys, torch.ones(1, 64), bare)  # type: ignore[attr-defined]
    assert wild.right.norm() > 1e4 * calm.right.norm()


def test_state_does_not_leak_into_a_second_editor() -> None:
    """EasyEdit keeps the cache of past keys in a module global, and every projector in one file."""
    first, second = make("alphaedit"), make("alphaedit")
    first.apply(EditBatch(tuple(FACTS), 1))
    fresh = make("alphaedit")
    for editor in (second, fresh):
        editor.apply(EditBatch((FACTS[1],), 1))
    a, b = second.edited_weights(), fresh.edited_weights()
    assert all(torch.equal(w, b[n]) for n, w in a.items())


def test_targets_are_found_anew_under_the_weights_as_they_are() -> None:
    """Released code reads a target cached by case number, whatever was edited since."""
    editor = make("memit-seq", steps=15, clamp=4.0, contexts=0)
    first = editor.apply(EditBatch((FACTS[0],), 1)).notes
    again = editor.apply(EditBatch((FACTS[0],), 2)).notes
    assert again["target_norm"] < first["target_norm"] or again["loss"] < first["loss"]


def test_history_protects_earlier_edits() -> None:
    def moved(name: str) -> float:
        editor = make(name, layers=(1,), contexts=0)
        editor.apply(EditBatch(tuple(FACTS[:2]), 1))
        with torch.no_grad():
            keys = Sweep(editor.handle, FACTS[:2], [""], (1,), 1.0).read(1)
        before = editor.changes.weight(1)  # type: ignore[attr-defined]
        editor.apply(EditBatch((FACTS[2],), 2))
        change = editor.changes.weight(1) - before  # type: ignore[attr-defined]
        return float((keys @ change.T).norm() / change.norm())

    assert moved("memit-seq") < moved("memit")


def test_blue_changes_the_boundary_layers_only() -> None:
    hyper = derived("x", 40)[0]
    assert len(hyper.layers) > 2
    host, wrapped = make("alphaedit", layers=(0, 1)), make("alphaedit+blue", layers=(0, 1))
    assert host._stages() == [(0, 1)]  # type: ignore[attr-defined]
    assert wrapped._stages() == [(0,), (1,)]  # type: ignore[attr-defined]
    single = make("memit+blue", layers=(1,))
    assert single._stages() == [(1,)]  # type: ignore[attr-defined]
    assert wrapped.name == "alphaedit+blue"


def test_prune_restrains_the_spectrum_and_nothing_else() -> None:
    g = torch.Generator().manual_seed(0)
    change = torch.randn(6, 9, generator=g, dtype=torch.float64)
    s = torch.linalg.svdvals(change)
    assert restrained(change, float(s[0]) * (1 + 1e-9), 2.0) is change
    low = restrained(change, float(s[2]), 2.0)
    after = torch.linalg.svdvals(low)
    want = torch.where(s > s[2], (s / s[2]).log2() + s[2], s)
    torch.testing.assert_close(after, want)
    assert (after.diff() <= 1e-12).all()


def test_prune_answers_with_the_base_plus_the_restrained_change_once() -> None:
    """Released copies add the restrained change to the weights that hold the unrestrained one."""
    editor = make("memit+prune", lam=1e-4, clamp=50.0, lr=20.0)
    for step, e in enumerate(FACTS, 1):
        editor.apply(EditBatch((e,), step))
    name, layer = editor.handle.down_weight(0), 0
    base = editor.handle.parameter(name).double()
    raw = editor.changes.weight(layer).double() - base  # type: ignore[attr-defined]
    top = float(torch.linalg.matrix_norm(base, 2))
    assert float(torch.linalg.matrix_norm(raw, 2)) > top
    got = editor.edited_weights()[name].double() - base
    torch.testing.assert_close(got, restrained(raw, top, editor.config.alpha), rtol=1e-3, atol=1e-4)
    assert torch.equal(editor.edited_weights()[name], editor.edited_weights()[name])


def test_rect_keeps_a_share_of_entries_by_relative_size_whatever_the_sign() -> None:
    g = torch.Generator().manual_seed(0)
    weight, change = torch.randn(20, 30, generator=g), torch.randn(20, 30, generator=g)
    kept = sparse(change, weight, 0.4)
    share = float((kept != 0).double().mean())
    assert share == pytest.approx(0.4, abs=1e-3)
    assert torch.equal(kept[kept != 0], change[kept != 0])
    assert (change / weight).abs()[kept != 0].min() >= (change / weight).abs()[kept == 0].max()
    assert sparse(change, weight, 1.0) is change
    assert torch.equal(sparse(change, -weight, 0.4), kept)


def test_wrappers_compose_and_refuse_what_they_cannot_wrap() -> None:
    both = EDITORS.get("memit+blue+prune")
    assert {"alpha", "lam", "layers"} <= set(both.Config.__dataclass_fields__)
    assert EDITORS.get("memit+blue+prune") is both
    for name, match in [("finetune+blue", "finetune is none"), ("balancedit+prune", "makes none"), ("memit+bleu", "Did you mean blue")]:
        with pytest.raises(UnknownName, match=match):
            EDITORS.get(name)
    config = RunConfig(editor=("alphaedit+blue",), set=("alphaedit+blue.l2=3", "alphaedit+blue.layers=0,2"))
    assert config.problems() == []
    assert config.editor_config("alphaedit+blue").layers == (0, 2)
    assert all(issubclass(EDITORS.get(f"{w.example}+{name}"), Editor) for name, w in WRAPPERS.items())


def test_every_bad_value_is_named() -> None:
    wrong = ("memit.lam=0", "memit.layers=3,1", "alphaedit.l2=-1", "rome.steps=0", "rome.eta=-1", "emmet.contexts=-1")
    problems = "\n".join(RunConfig(editor=("memit", "alphaedit", "rome", "emmet"), set=wrong).problems())
    for part in (
        "lam must be positive",
        "rising, got 3, 1",
        "l2 must be positive",
        "steps must be 1",
        "eta must be 0",
        "contexts must be 0",
    ):
        assert part in problems
    assert "alpha must be over 1" in "\n".join(RunConfig(editor=("memit+prune",), set=("memit+prune.alpha=1",)).problems())
    assert "keep must lie" in "\n".join(RunConfig(editor=("memit+rect",), set=("memit+rect.keep=0",)).problems())


def test_models_and_corpora_that_cannot_be_used_are_refused(tmp_path: Any) -> None:
    with pytest.raises(BadEditor, match="the highest layer is 1"):
        make("memit", layers=(0, 2))
    with pytest.raises(BadEditor, match="single layer"):
        derived("llama", 1)
    with pytest.raises(BadEditor, match="no train pool"):
        make("memit", pool=TrainPool()).apply(EditBatch((FACTS[0],), 1))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(BadEditor, match="no line of text"):
        corpus_of(POOL, empty)
    with pytest.raises(BadEditor, match="cannot be read"):
        corpus_of(POOL, tmp_path / "absent.txt")
    with pytest.raises(BadEditor, match="excludes all"):
        make("alphaedit", threshold=1e-12).apply(EditBatch((FACTS[0],), 1))


def test_an_unknown_model_gets_derived_values_and_is_told_so() -> None:
    assert any("no published hyper-parameters" in n for n in make("memit").notes)
    for depth in range(2, 80):
        layers = derived("x", depth)[0].layers
        assert 0 <= layers[0] <= layers[-1] < depth - 1
        assert len(layers) <= 5
    for (_, depth), row in TABLE.items():
        assert max(row.layers) < depth
        assert row.layer in row.layers


@pytest.mark.parametrize("name", METHODS)
def test_edits_that_are_odd_but_can_be_made(name: str) -> None:
    editor = make(name)
    missing = replace(FACTS[0], subject="someone else", id="")
    empty = replace(FACTS[1], subject=" ", id="")
    report = editor.apply(EditBatch((missing, empty), 1))
    assert not report.failed
    assert report.notes["unnamed"] == 2
    rows = prompt_rows(editor.handle, [missing], [""])
    assert int(rows.at[0]) == int(rows.batch.last_prompt[0])


def test_two_edits_of_one_fact_in_a_batch_the_later_is_made() -> None:
    both, later = make("memit"), make("memit")
    new = replace(FACTS[0], target="yellow", id="")
    report = both.apply(EditBatch((FACTS[0], new), 1))
    later.apply(EditBatch((new,), 1))
    assert report.notes["superseded"] == 1
    assert all(torch.equal(w, later.edited_weights()[n]) for n, w in both.edited_weights().items())


def test_colliding_keys_are_counted() -> None:
    same = replace(FACTS[0], target="yellow", relation="other", id="")
    assert make("memit", contexts=0).apply(EditBatch((FACTS[0], same), 1)).notes["collisions"] == 1
    assert make("memit", contexts=0).apply(EditBatch((FACTS[0], FACTS[1]), 1)).notes["collisions"] == 0


def test_a_known_answer_is_left_alone() -> None:
    editor = make("memit", stop=1e9)
    report = editor.apply(EditBatch((FACTS[0],), 1))
    assert report.notes["already"] == 1
    assert report.delta_norm == pytest.approx(0.0, abs=1e-4)


def test_a_loss_that_is_not_finite_fails_the_edit_and_leaves_the_weights() -> None:
    editor = make("memit-seq")
    editor.apply(EditBatch((FACTS[0],), 1))
    before = editor.edited_weights()
    unit = editor._unit
    editor._unit = lambda task, h: unit(task, h) * float("nan")  # type: ignore[attr-defined]
    report = editor.apply(EditBatch((FACTS[1],), 2))
    assert "not finite" in report.failed[FACTS[1].id]
    assert all(torch.equal(w, editor.edited_weights()[n]) for n, w in before.items())
    editor._unit = unit  # type: ignore[attr-defined]
    assert not editor.apply(EditBatch((FACTS[2],), 3)).failed
    with pytest.raises(EditFailed, match="not finite"):
        search(task(), SMALL, torch.full((3,), float("nan")))


def test_states_of_other_layers_are_refused() -> None:
    editor = make("memit", layers=(0,))
    editor.apply(EditBatch((FACTS[0],), 1))
    with pytest.raises(BadEditor, match="changes layer 0"):
        make("memit", layers=(1,)).load_state_dict(editor.state_dict())


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
        above = enter(handle, batch, 1, 2)
        torch.testing.assert_close(above.hidden, seen[0])
        torch.testing.assert_close(above.through(above.hidden, 1, 3), seen[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(handle.model(**batch.inputs, use_cache=False).logits, logits)
