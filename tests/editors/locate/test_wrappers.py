"""Wrappers of locate-then-edit editors, and bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS, WRAPPERS, UnknownName
from testbed.editors.base import BadEditor, EditFailed, Editor
from testbed.editors.hyperparameters import PublishedRow, model_key
from testbed.editors.locate import alphaedit, blue, emmet, memit, pmet, rome
from testbed.editors.locate.anchor import anchored, trimmed_mean
from testbed.editors.locate.come import ComeConfig, unlearned
from testbed.editors.locate.core import derived_layers
from testbed.editors.locate.general_text import corpus_of
from testbed.editors.locate.keys import ask_of, lookup, prompt_rows
from testbed.editors.locate.prune import restrained
from testbed.editors.locate.rect import sparse
from testbed.editors.locate.targets import search
from testbed.experiment.config import RunConfig
from testbed.model.families import UnknownLayout
from tests.helpers.facts import FACTS, METHODS, POOL, SMALL, make, task
from tests.helpers.models import build


def test_blue_changes_the_boundary_layers_only() -> None:
    assert len(derived_layers(40)) > 2
    host, wrapped = make("alphaedit", layers=(0, 1)), make("alphaedit+blue", layers=(0, 1))
    assert host._stages() == [(0, 1)]  # type: ignore[attr-defined]
    assert wrapped._stages() == [(0,), (1,)]  # type: ignore[attr-defined]
    single = make("memit+blue", layers=(1,))
    assert single._stages() == [(1,)]  # type: ignore[attr-defined]
    assert wrapped.name == "alphaedit+blue"
    assert [sum("boundary" in note for note in e.notes) for e in (single, wrapped)] == [1, 0]


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
    editor = make("memit+prune-naive", lam=1e-4, clamp=50.0, lr=20.0)
    for step, e in enumerate(FACTS, 1):
        editor.apply(EditBatch((e,), step))
    name, layer = editor.handle.down_weight(0), 0
    base = editor.handle.parameter(name).double()
    raw = editor.deltas.weight(layer).double() - base  # type: ignore[attr-defined]
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


def test_come_without_weight_or_coordinates_leaves_the_target() -> None:
    g = torch.Generator().manual_seed(0)
    delta, old, output = (torch.randn(3, 40, generator=g) for _ in range(3))
    for config in (ComeConfig(a=0.0), ComeConfig(p=0.0)):
        assert torch.equal(unlearned(delta, old, output, config), delta)
    moved = unlearned(delta, old, output, ComeConfig(a=0.5, p=0.25))
    assert ((moved != delta).sum(1) == 10).all()
    unit = torch.nn.functional.normalize
    c = unit(unit(delta, dim=1) + unit(old, dim=1), dim=1)
    want = delta - 0.5 * (old - (old * c).sum(1, keepdim=True) * c)
    torch.testing.assert_close(moved[moved != delta], want[moved != delta])
    assert not torch.equal(
        unlearned(delta, old, output, ComeConfig(a=0.5, variant="code")), unlearned(delta, old, output, ComeConfig(a=0.5))
    )


def test_come_is_told_the_old_answer_and_makes_edits_that_name_none() -> None:
    plain, wrapped = make("memit"), make("memit+come", a=0.5)
    assert wrapped.traits.uses - plain.traits.uses == {"previous"}
    for editor in (plain, wrapped):
        assert not editor.apply(EditBatch((FACTS[0],), 1)).failed
    same = plain.edited_weights()
    assert all(torch.equal(w, same[n]) for n, w in wrapped.edited_weights().items())
    told = replace(FACTS[1], previous="Vale Orn", id="")
    for editor in (plain, wrapped):
        editor.apply(EditBatch((told,), 2))
    assert any(not torch.equal(w, plain.edited_weights()[n]) for n, w in wrapped.edited_weights().items())


def test_wrappers_compose_and_refuse_what_they_cannot_wrap() -> None:
    both = EDITORS.get("memit+blue+prune-naive")
    assert {"alpha", "lam", "layers"} <= set(both.Config.__dataclass_fields__)
    assert EDITORS.get("memit+blue+prune-naive") is both
    for name, match in [
        ("finetune+blue", "finetune is none"),
        ("balancedit+prune", "balancedit is none"),
        ("memit+bleu", "Did you mean blue"),
    ]:
        with pytest.raises(UnknownName, match=match):
            EDITORS.get(name)
    config = RunConfig(editor=("alphaedit+blue",), set=("alphaedit+blue.l2=3", "alphaedit+blue.layers=0,2"))
    assert config.problems() == []
    assert config.resolve_editor("alphaedit+blue").config.layers == (0, 2)
    assert all(issubclass(EDITORS.get(f"memit+{name}"), Editor) for name in WRAPPERS.names())


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
    assert "alpha must be more than 1" in "\n".join(RunConfig(editor=("memit-seq+prune",), set=("memit-seq+prune.alpha=1",)).problems())
    assert "keep must be positive and at most 1" in "\n".join(
        RunConfig(editor=("memit-seq+rect",), set=("memit-seq+rect.keep=0",)).problems()
    )


def test_models_and_corpora_that_cannot_be_used_are_refused(tmp_path: Any) -> None:
    with pytest.raises(BadEditor, match="the highest layer is 1"):
        make("memit", layers=(0, 2))
    with pytest.raises(BadEditor, match="single layer"):
        derived_layers(1)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(BadEditor, match="no line of text"):
        corpus_of(build("llama"), POOL, str(empty))
    with pytest.raises(BadEditor, match="cannot be read"):
        corpus_of(build("llama"), POOL, str(tmp_path / "absent.txt"))
    with pytest.raises(BadEditor, match="excludes all"):
        make("alphaedit", threshold=1e-12).apply(EditBatch((FACTS[0],), 1))


def test_a_family_without_a_known_down_projection_and_a_slow_tokenizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.model.families.DOWN_PROJECTIONS", ("feed.forward",))
    with pytest.raises(UnknownLayout, match=r"no down-projection in LlamaDecoderLayer; it has .*mlp\.down_proj"):
        make("memit")
    monkeypatch.undo()
    editor = make("memit")
    monkeypatch.setattr(type(editor.handle.tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(BadEditor, match="use a fast tokenizer"):
        lookup(editor.handle, ask_of(FACTS[0]), FACTS[0].subject)


def test_an_unknown_model_gets_derived_values_and_is_told_so() -> None:
    assert any("no published values" in n and "testbed.tune --model" in n and "--editor memit" in n for n in make("memit").notes)
    for depth in range(2, 80):
        layers = derived_layers(depth)
        assert 0 <= layers[0] <= layers[-1] < depth - 1
        assert len(layers) <= 5


@pytest.mark.parametrize("method", [memit, alphaedit, rome, emmet, pmet])
def test_published_rows_name_layers_that_their_model_has(method: Any) -> None:
    assert blue.PUBLISHED.keys() <= alphaedit.PUBLISHED.keys() & memit.PUBLISHED.keys()
    for key, row in method.PUBLISHED.items():
        layers = row.values.get("layers") or (row.values["layer"],)
        assert 0 <= layers[0] <= layers[-1] < key.layers - 1
        assert not row.values.get("relative")
        assert row.source


def test_blue_puts_its_own_weights_in_the_place_of_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    key = model_key(build("llama"))
    for method in (alphaedit, pmet, emmet):
        monkeypatch.setitem(method.PUBLISHED, key, PublishedRow("a test", {"layers": (0, 1), "layer": 0}))
    monkeypatch.setitem(blue.PUBLISHED, key, {alphaedit.AlphaEdit: {"l2": 80.0}, memit.Memit: {"lam": 20.0}, emmet.Emmet: {}})
    assert [make(f"alphaedit{more}").hyper.l2 for more in ("", "+blue")] == [10.0, 80.0]  # type: ignore[attr-defined]
    assert make("alphaedit+blue", l2=3.0).hyper.l2 == 3.0  # type: ignore[attr-defined]
    assert make("pmet+blue").hyper.lam == 20.0  # type: ignore[attr-defined]
    assert make("emmet+blue").hyper.lam == 0.1  # type: ignore[attr-defined]


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


def test_anchored_targets_have_the_length_of_the_anchor() -> None:
    g = torch.Generator().manual_seed(0)
    start, delta = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g)
    delta[4] *= 100
    v = start + anchored(start, delta, 3.0)
    torch.testing.assert_close(v[:4].norm(dim=1), torch.full((4,), 3.0))
    torch.testing.assert_close(torch.nn.functional.normalize(v[:4]), torch.nn.functional.normalize((start + delta)[:4]))
    assert torch.equal(v[4], start[4])
    one = start[:1] + delta[:1]
    torch.testing.assert_close(anchored(start[:1], delta[:1], float(one.norm())), delta[:1])
    assert trimmed_mean(torch.tensor([1e9, *[2.0] * 98, -1e9])) == pytest.approx(2.0)


def test_anchoring_changes_nothing_on_the_unedited_model_and_holds_the_length_after() -> None:
    """One edit alone is its own anchor; later ones are scaled to it, and it goes on from a stored state."""
    host, wrapped = make("alphaedit"), make("alphaedit+anchor", pilot=1)
    for editor in (host, wrapped):
        editor.apply(EditBatch((FACTS[0],), 1))
    for n, w in host.edited_weights().items():
        torch.testing.assert_close(wrapped.edited_weights()[n], w, rtol=1e-4, atol=1e-5)
    lengths = wrapped.lengths  # type: ignore[attr-defined]
    assert {n: len(x) for n, x in lengths.items()} == {host.deltas.layers[-1]: 1}  # type: ignore[attr-defined]
    resumed = make("alphaedit+anchor", pilot=1)
    resumed.load_state_dict(wrapped.state_dict())
    for editor in (host, wrapped, resumed):
        editor.apply(EditBatch(tuple(FACTS[1:]), 2))
    assert all(torch.equal(w, resumed.edited_weights()[n]) for n, w in wrapped.edited_weights().items())
    assert any(not torch.equal(w, host.edited_weights()[n]) for n, w in wrapped.edited_weights().items())
    assert torch.equal(wrapped.lengths[host.deltas.layers[-1]], lengths[host.deltas.layers[-1]])  # type: ignore[attr-defined]


def test_the_pilot_is_sought_under_the_unedited_weights() -> None:
    late, early = make("memit+anchor", pilot=2), make("memit+anchor", pilot=2)
    late.apply(EditBatch((FACTS[0],), 1))
    late.apply(EditBatch((FACTS[1],), 2))
    early.apply(EditBatch((FACTS[1],), 1))
    layer = late.deltas.layers[-1]  # type: ignore[attr-defined]
    torch.testing.assert_close(late.lengths[layer][1], early.lengths[layer][0], rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]
