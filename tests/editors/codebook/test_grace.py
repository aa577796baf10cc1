"""GRACE: its rules as published, what they break, what the copies got wrong. Numbers name the codebook's promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from streams.base import TrainPool
from testbed.editors.base import BadEditor
from testbed.editors.codebook.grace import Grace, GraceCodebook, GraceConfig
from testbed.model.encoding import collate
from tests.helpers.balancedit_checks import ASKS, EDITS, batch, edit, fired
from tests.helpers.models import build


def scopes(*rows: tuple[float, int], eps: float = 1.0, expand: str = "coverage") -> GraceCodebook:
    """Entries on a line: (position, label)."""
    out = GraceCodebook(eps, expand)
    for i, (x, label) in enumerate(rows):
        out.insert(torch.tensor([x, 1.0]), (label,), f"e{i}")
    return out


def hit(s: GraceCodebook, x: float) -> str | None:
    row = int(s.retrieve(torch.tensor([[x, 1.0]]))[0][0])
    return s.entry_of(row) if row >= 0 else None


def test_new_where_nothing_is_near() -> None:
    s = scopes((0, 1), (5, 2))
    assert s.eps.tolist() == [1, 1]
    assert [hit(s, x) for x in (0, 1, 1.5, 4, 5)] == ["e0", "e0", None, "e1", "e1"]


def test_split_where_answers_differ() -> None:
    s = scopes((0, 1), (1.5, 2))
    assert s.eps.tolist() == pytest.approx([0.75, 0.75], abs=1e-4)
    assert [hit(s, x) for x in (0.7, 0.8)] == ["e0", "e1"]


@pytest.mark.parametrize(("expand", "eps"), [("coverage", 1.5), ("average", 1.25)])
def test_expand_where_they_agree(expand: str, eps: float) -> None:
    s = scopes((0, 1), (1.5, 1), expand=expand)
    assert s.eps.tolist() == [eps]
    assert len(s) == 1
    assert s.owner.tolist() == [0]


def test_the_same_edit_twice_changes_nothing() -> None:
    s = scopes((0, 1), (0, 1))
    assert s.eps.tolist() == [1.0]


def test_a_changed_answer_is_the_one_given() -> None:
    assert hit(scopes((0, 1), (0, 2)), 0) == "e1"


def test_labels_are_token_sequences_not_means() -> None:
    s = GraceCodebook(1.0, "coverage")
    s.insert(torch.zeros(2), (12, 14), "a")
    s.insert(torch.tensor([0.5, 0.0]), (13, 13), "b")
    assert len(s) == 2


def test_11_taking_an_edit_out_takes_back_its_splits_and_widenings() -> None:
    rows = [(0, 1), (1.5, 1), (2.0, 2), (7, 3), (8.2, 4)]
    for gone in range(len(rows)):
        s, fresh = scopes(*rows), scopes(*(r for i, r in enumerate(rows) if i != gone))
        s.remove([f"e{gone}"])
        assert torch.equal(s.eps, fresh.eps)
        assert torch.equal(s.owner, fresh.owner)
    with pytest.raises(KeyError, match="nobody"):
        s.remove(["nobody"])


def test_07_is_broken_an_edit_with_the_same_answer_changes_a_radius() -> None:
    """As published: expanding widens the nearest entry's own ball, whatever lies on its other sides."""
    s = scopes((0, 1), (2.1, 2))
    s.insert(torch.tensor([-1.9, 1.0]), (1,), "wider")
    assert s.eps.tolist() == pytest.approx([1.9, 1.0])


def disjoint(s: GraceCodebook) -> bool:
    rows = [(float(s.keys[i][0]), s.edits[i][1], float(e)) for i, e in zip(s.owner, s.eps)]
    return all(p[1] == q[1] or abs(p[0] - q[0]) >= p[2] + q[2] for i, p in enumerate(rows) for q in rows[:i])


@pytest.mark.parametrize(
    ("rows", "last"), [([(0, 1), (2.1, 2)], (-1.9, 1)), ([(0, 1), (-1.9, 1), (3.0, 3)], (2.0, 2))], ids=["expand", "split"]
)
def test_18_is_broken_a_third_ball_overlaps(rows: list, last: tuple) -> None:
    """As published: only the nearest entry is looked at, so a farther ball with another answer is overlapped."""
    assert disjoint(scopes(*rows))
    assert not disjoint(scopes(*rows, last))


def test_08_a_miss_outside_the_new_ball_may_become_a_hit() -> None:
    """As published: widening moves an old ball over what missed."""
    s = scopes((0, 1))
    assert hit(s, -1.4) is None
    s.insert(torch.tensor([1.5, 1.0]), (1,), "wider")
    assert hit(s, -1.4) == "e0"


def make(kind: str = "llava", **config: Any) -> Grace:
    editor = Grace(GraceConfig(**{"steps": 30, "eps_init": 0.05, **config}))
    editor.prepare(build(kind), TrainPool())
    return editor


@torch.no_grad()
def tokens(editor: Grace, rows: list[int], beams: int = 1, cache: bool = True) -> tuple[list[list[int]], list[str | None]]:
    one = collate(editor.handle, [ASKS[i] for i in rows], side="left")
    gate = editor.gate(editor.book)
    with gate.around(one):
        out = editor.handle.model.generate(
            **one.inputs, max_new_tokens=4, min_new_tokens=4, num_beams=beams, use_cache=cache, do_sample=False
        )
    return out[:, one.inputs["input_ids"].shape[1] :].tolist(), fired(gate, one)


@pytest.mark.parametrize("replace", ["last", "prompt"])
def test_30_decided_at_prefill_with_and_without_cache_and_beams(replace: Any) -> None:
    editor = make(replace=replace)
    editor.apply(batch(EDITS[:3]))
    for beams in (1, 2):
        got, entries = tokens(editor, [0, 1, 2, 3], beams)
        assert entries == [EDITS[0].id, EDITS[1].id, EDITS[2].id, None]
        assert got == tokens(editor, [0, 1, 2, 3], beams, cache=False)[0]
        assert got == [tokens(editor, [i], beams)[0][0] for i in range(4)]
    assert got[0] != tokens(make(), [0], 2)[0][0]


@pytest.mark.parametrize("layer", [-2, -1])
def test_it_learns_the_first_token(layer: int) -> None:
    editor = make(layer=layer, steps=100)
    report = editor.apply(batch(EDITS[:1]))
    assert math.isfinite(report.notes["loss"])
    assert editor.predictor().generate(ASKS[:1], 1)[0].split()[0].startswith("gre")


def test_31_keys_are_free_of_the_answer() -> None:
    keys = []
    for target in ("green", "two red towers"):
        editor = make(steps=1)
        editor.apply(batch([edit(0, target)]))
        keys.append(editor.book.keys)
    assert torch.equal(*keys)


@pytest.mark.parametrize(("other", "kind", "reason"), [({"layer": 0}, "llava", "layer"), ({}, "blip-2", "model")])
def test_34_a_state_of_another_layer_or_model_is_refused(other: dict, kind: str, reason: str) -> None:
    editor = make(steps=1)
    editor.apply(batch(EDITS[:1]))
    with pytest.raises(BadEditor, match=reason):
        make(kind, **other).load_state_dict(editor.state_dict())


def test_a_batch_holds_the_vectors_that_single_edits_would() -> None:
    together, alone = make(), make()
    together.apply(batch(EDITS[:2]))
    for i, e in enumerate(EDITS[:2], 1):
        alone.apply(batch([e], i))
    for i, vector in alone.tensors.items():
        torch.testing.assert_close(together.tensors[i], vector, atol=1e-3, rtol=1e-3)
    assert together.state_bytes() == sum(t.nbytes for t in together.state_dict().values() if isinstance(t, torch.Tensor))


def test_activations_that_are_not_finite_fail_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(steps=1)
    monkeypatch.setattr("testbed.editors.codebook.grace.read_keys", lambda *_: torch.full((1, editor.width), torch.nan))
    assert "not finite" in editor.apply(batch(EDITS[:1])).failed[EDITS[0].id]
    assert len(editor.book) == 0


def test_mistakes_in_the_config_are_all_named() -> None:
    assert [p.split()[0] for p in GraceConfig(eps_init=0, lr=-1, steps=0).problems()] == ["eps_init", "lr", "steps"]
