"""ELDER: codes, what a batch trains, and the state."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.events import EditBatch, EditEvent
from testbed.editors.adapters.elder_routing import AllocationCodes, MixtureShape, experts_for
from testbed.editors.base import BadEditor
from testbed.storage.files import write_state
from tests.helpers.elder_editors import BESIDE, PICTURED, SMALL, asks, edited, make, scores_of, scores_x
from tests.helpers.facts import fact
from tests.helpers.models import Noise, folder


@settings(max_examples=50, deadline=None)
@given(sites=st.integers(1, 4), experts=st.integers(1, 5), active=st.integers(1, 5), n=st.integers(1, 30), seed=st.integers(0, 99))
def test_codes_are_unique_while_they_can_be_and_distances_are_even(sites: int, experts: int, active: int, n: int, seed: int) -> None:
    shape = MixtureShape(sites, experts, min(active, experts))
    book, g = AllocationCodes(shape, torch.device("cpu")), torch.Generator().manual_seed(seed)
    for i in range(n):
        code, new = book.draw(g)
        assert (code.sum(1) == shape.active).all()
        assert new == (i < shape.capacity)
        book = book.plus([str(i)], code[None], int(not new))
    assert book.distinct == min(n, shape.capacity)
    assert book.collisions == n - book.distinct
    bits = np.unpackbits(book.packed.numpy(), axis=1, count=shape.bits)
    apart = (bits[:, None] != bits[None]).sum(-1)
    assert not (apart % 2).any()
    assert apart.max() <= 2 * sites * min(shape.active, experts - shape.active)
    row, distance = book.nearest(torch.from_numpy(bits))
    assert (distance == 0).all()
    assert [int(r) for r in row] == [max(j for j in range(n) if apart[i, j] == 0) for i in range(n)]


def test_codes_of_one_batch_differ_and_a_changed_fact_keeps_its_code() -> None:
    editor = edited()
    first = {bytes(row) for row in editor.codes.packed.numpy()}
    assert len(first) == len(PICTURED)
    again = fact("Zor", "a lamp", None, revises=PICTURED[1].id)
    third = EditEvent("revise", 1.0, 0, again.prompt, "green", revises=again.id)
    editor.apply(EditBatch((again, third), 2))
    for e in (again, third):
        assert torch.equal(editor.codes.of(e.id), editor.codes.of(PICTURED[1].id))  # type: ignore[arg-type]
    assert editor.codes.distinct == len(PICTURED)
    assert editor.codes.collisions == 0


def test_when_codes_run_out_they_are_shared_and_counted() -> None:
    editor = make(experts=2, active=1, modules=r"\.2\.mlp\.down_proj$", steps=1)
    report = editor.apply(EditBatch(tuple(PICTURED), 1))
    assert report.notes["codes"] == 2
    assert report.notes["collisions"] == 1


def test_enough_adapters_for_the_planned_edits() -> None:
    assert MixtureShape(4, 4, 2).capacity == 1296
    for sites in (1, 2, 3, 4, 6):
        n = experts_for(sites, 2, 5_000, 4)
        assert MixtureShape(sites, n, 2).capacity >= 500_000
        assert n == 4 or MixtureShape(sites, n - 1, 2).capacity < 500_000
    assert experts_for(6, 2, 400, 4) == 4


def test_an_edit_takes_less_than_a_kilobyte_and_modules_do_not_grow() -> None:
    editor = edited()
    one = editor.state_bytes()
    more = [fact(f"tower {i}", "green") for i in range(10)]
    editor.apply(EditBatch(tuple(more), 2))
    assert editor.state_bytes() - one == 10 * editor.shape.bytes
    listed = {k: v for k, v in editor.state_dict().items() if not isinstance(v, torch.Tensor)}
    assert len(json.dumps(listed)) / 13 + editor.shape.bytes < 1024


def test_guided_loss_is_the_negative_log_score_of_the_allocated_adapters() -> None:
    editor = make(steps=1, lr=1e-9)
    report = editor.apply(EditBatch(tuple(PICTURED), 1))
    want = []
    for e in PICTURED:
        log_s = scores_of(editor, [e.ask()], "right")[0].double()
        code = editor.codes.of(e.id)
        assert code is not None
        want.append(-float(log_s[code].sum()))
    assert report.notes["guided_loss"] == pytest.approx(sum(want) / 3, rel=1e-4)


def test_the_guide_alone_pulls_routers_to_the_code_and_nothing_does_without_it() -> None:
    guided, free = edited(steps=40, guide=1.0), edited(steps=40, guide=0.0)
    assert guided.apply(EditBatch((fact("x", "green"),), 2)).notes["code_distance"] == 0
    x = scores_of(free, asks(PICTURED), "right")
    stored = torch.stack([c for e in PICTURED if (c := free.codes.of(e.id)) is not None])
    assert not torch.equal(free.mixture.chosen(x), stored)


def test_adapters_that_are_not_chosen_stay_bit_equal() -> None:
    editor = make(guide=0.0, steps=1)
    before = editor.mixture
    editor.apply(EditBatch((PICTURED[0],), 1))
    chosen = before.chosen(before.log_scores(scores_x(editor, PICTURED[0])))[0]
    for site in range(2):
        for i in range(6):
            same = torch.equal(before.v[site][i], editor.mixture.v[site][i])
            assert same != bool(chosen[site, i])


def test_paraphrases_are_trained_under_their_edits_code() -> None:
    editor = make()
    seen = []
    train = editor._train
    editor._train = lambda rows: (seen.append(rows), train(rows))[1]  # type: ignore[method-assign]
    editor.apply(EditBatch(tuple(PICTURED[:2]), 1, {PICTURED[1].id: ("Zor, led by whom?", "never read")}))
    codes = seen[0].codes
    assert len(codes) == 3
    assert torch.equal(codes[1], codes[2])
    assert [a.prompt for a in seen[0].suffix.batch.asks] == [PICTURED[0].prompt, PICTURED[1].prompt, "Zor, led by whom?"]


def test_a_loss_that_is_not_finite_fails_the_edit_and_changes_nothing() -> None:
    editor = edited()
    before = editor.state_dict()
    editor.hyper = replace(editor.hyper, lr=float("inf"), steps=3)
    report = editor.apply(EditBatch((fact("the lamp", "green"),), 2))
    assert "smaller" in next(iter(report.failed.values()))
    after = editor.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())


FRESH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from dataclasses import replace
from pathlib import Path
from tests.helpers.models import Noise
from streams.base import TrainPool
from testbed.editors.adapters.elder import Elder, ElderConfig
from testbed.core.events import Ask
from testbed.model.loading import load
from testbed.storage.files import read_state
editor = Elder(ElderConfig(**json.loads(sys.argv[4])))
editor.prepare(load(sys.argv[2], device="cpu"), TrainPool())
editor.load_state_dict(read_state(Path(sys.argv[3])))
asks = [Ask(prompt, None if seed is None else Noise(seed)) for prompt, seed in json.loads(sys.argv[5])]
out = editor.predictor().respond(asks, ["green"] * len(asks), 4)
print(json.dumps([[r.generated, r.score.logprobs.tolist(), r.extras] for r in out]))
"""


@pytest.mark.ci
def test_a_saved_state_answers_bit_for_bit_alike_in_a_fresh_process(tmp_path: Path) -> None:
    editor, path = edited(), tmp_path / "step-000001.safetensors"
    write_state(path, editor.state_dict())
    what = asks(PICTURED) + BESIDE[2:]
    want = editor.predictor().respond(what, ["green"] * len(what), 4)
    prompts = json.dumps([[a.prompt, a.image.seed if isinstance(a.image, Noise) else None] for a in what])
    root = Path(__file__).parents[3]
    argv = [sys.executable, "-c", FRESH, str(root), str(folder("llava")), str(path), json.dumps(SMALL), prompts]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[r.generated, r.score.logprobs.tolist(), r.extras] for r in want if r.score]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"rank": 3}, "shape"),
        ({"experts": 7}, "shape"),
        ({"active": 1}, "active"),
        ({"modules": r"\.[01]\.mlp\.down_proj$"}, "modules"),
    ],
)
def test_a_state_of_another_configuration_is_refused(other: dict[str, Any], words: str) -> None:
    state = edited().state_dict()
    with pytest.raises(BadEditor, match=words):
        make(**other).load_state_dict(state)
