"""Knowledge Neurons: the attribution against plain sums, which neurons a fact has, which columns an edit rewrites, and undo."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.checks.editors import equal_states
from testbed.core.events import EditBatch, EditEvent, Question
from testbed.editors.base import BadEditor, EditFailed
from testbed.editors.locate.kn import KNConfig, KnowledgeNeurons, Prediction, attributions, output_embeddings, refined
from testbed.model.encoding import collate
from testbed.model.handle import as_matrix
from tests.helpers.facts import FACTS
from tests.helpers.models import build

OLD = ("green", "Zor", "Mara Venn")
KNOWN = [replace(e, previous=old) for e, old in zip(FACTS, OLD)]
KINDS = ["llama", "gpt2"]
"""A model with output embeddings of its own, and one whose output embeddings are its input embeddings."""
LAYER = 1


def editor(kind: str = "llama", pool: TrainPool | None = None, **config: Any) -> KnowledgeNeurons:
    made = KnowledgeNeurons(KNConfig(**{"share": 0.0, "threshold": 0.6, **config}))
    made.prepare(build(kind), pool or TrainPool())
    return made


def apply(made: KnowledgeNeurons, events: list[EditEvent], step: int = 1) -> dict[str, float]:
    report = made.apply(EditBatch(tuple(events), step))
    assert not report.failed, report.failed
    return report.notes


def prediction(event: EditEvent = FACTS[0], token: int = 300, read: tuple[int, ...] = ()) -> Prediction:
    return Prediction(event.ask(), read, token)


def probability(kind: str, asked: Prediction, scaled: Tensor) -> Tensor:
    """P(token) by the whole model, with what enters the down-projection of `LAYER` in the last position multiplied by (f,) or ()."""
    handle = build(kind)
    batch = collate(handle, [asked.ask], [asked.read])

    def scale(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        act = args[0].reshape(-1, args[0].shape[-1])
        return (torch.cat([act[:-1], act[-1:] * scaled]).reshape(args[0].shape),)

    with handle.hooked(handle.down(LAYER), scale, pre=True):
        return handle.model(**batch.inputs, use_cache=False).logits[0, -1].float().softmax(-1)[asked.token]


def plain(kind: str, asked: Prediction, steps: int) -> Tensor:
    """Equation 1 in a loop: the derivative by a factor at each activation is the activation times the derivative by it."""
    total = torch.zeros(96)
    for k in range(1, steps + 1):
        factor = torch.full((96,), k / steps, requires_grad=True)
        (gradient,) = torch.autograd.grad(probability(kind, asked, factor), factor)
        total += gradient
    return total / steps


@pytest.mark.parametrize("kind", KINDS)
def test_the_attribution_is_the_plain_one_whatever_prompts_stand_beside_it(kind: str) -> None:
    asked = [prediction(e, 300 + i, (320,) * i) for i, e in enumerate(FACTS)]
    found = attributions(build(kind), asked, (LAYER,), 4)[LAYER]
    for row, one in zip(found, asked):
        torch.testing.assert_close(row, plain(kind, one, 4), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_attributions_add_up_to_what_the_layer_does_to_the_probability(kind: str) -> None:
    """Completeness: sum_i Attr_i -> P(w) - P(0) as m grows, and 20 points are within a tenth of 200."""
    asked = prediction()
    with torch.no_grad():
        whole = float(probability(kind, asked, torch.ones(())) - probability(kind, asked, torch.zeros(())))
    off, found = [], {}
    for steps in (5, 20, 200):
        found[steps] = attributions(build(kind), [asked], (LAYER,), steps)[LAYER][0]
        off.append(abs(float(found[steps].sum()) - whole))
    assert off[0] > off[1] > off[2] and off[2] < 0.01 * abs(whole)
    assert float((found[20] - found[200]).norm()) < 0.1 * float(found[200].norm())


def test_one_point_at_zero_would_be_another_attribution() -> None:
    """A common port integrates over the single point 0 and so sees the gradient without the activations."""
    asked, found = prediction(), attributions(build("llama"), [prediction()], (LAYER,), 20)[LAYER][0]
    factor = torch.zeros(96, requires_grad=True)
    (at_zero,) = torch.autograd.grad(probability("llama", asked, factor), factor)
    assert float(torch.cosine_similarity(found, at_zero, dim=0)) < 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_adds_output_embeddings_relative_to_the_columns_norm(kind: str) -> None:
    made, handle = editor(kind), build(kind)
    apply(made, KNOWN[:1])
    assert len(made.neurons)
    e = handle.model.get_output_embeddings().weight
    for layer in {int(n) for n in made.neurons[:, 0]}:
        module, name = handle.down(layer), handle.down_weight(layer)
        base, edited = (as_matrix(module, w).detach() for w in (handle.parameter(name), made.edited_weights()[name]))
        rows = made.neurons[made.neurons[:, 0] == layer]
        for _, column, old, new in rows.tolist():
            norm = base[:, column].norm()
            wanted = base[:, column] - norm * e[old] / e[old].norm() + 8 * norm * e[new] / e[new].norm()
            torch.testing.assert_close(edited[:, column], wanted)
        others = [i for i in range(96) if i not in rows[:, 1].tolist()]
        assert torch.equal(base[:, others], edited[:, others])
    tied = handle.model.get_input_embeddings().weight
    assert torch.equal(output_embeddings(handle), tied) == (kind == "gpt2")


def test_without_lambdas_an_edit_is_the_identity() -> None:
    made = editor(lambda1=0.0, lambda2=0.0)
    apply(made, KNOWN)
    assert len(made.neurons)
    assert all(torch.equal(w, made.handle.parameter(name)) for name, w in made.edited_weights().items())


def test_undo_leaves_the_unedited_columns_and_what_the_other_edits_added() -> None:
    made = editor()
    for step, event in enumerate(KNOWN, 1):
        apply(made, [event], step)
    made.revert([KNOWN[1].id])
    other = editor()
    other._take(made.neurons, made.norms, made.owners)
    kept = made.edited_weights()
    assert {KNOWN[0].id, KNOWN[2].id} == set(made.owners)
    assert all(torch.equal(kept[name], w) for name, w in other.edited_weights().items())
    made.revert([KNOWN[2].id])
    first = editor()
    apply(first, KNOWN[:1])
    assert made.edited_weights().keys() == first.edited_weights().keys()
    assert all(torch.equal(w, made.edited_weights()[name]) for name, w in first.edited_weights().items())
    with pytest.raises(BadEditor, match="made no edit nobody"):
        made.revert(["nobody"])


def test_neurons_that_other_prompts_find_too_are_not_a_facts_own() -> None:
    own = editor()
    apply(own, KNOWN[:1])
    found = {(int(n[0]), int(n[1])) for n in own.neurons}
    pool = TrainPool(tuple(Question("general", FACTS[0].prompt, "green", topic=str(i)) for i in range(3)))
    filtered = editor(pool=pool)
    assert found <= filtered.shared  # the same question with the same answer: every prompt finds them
    notes = apply(filtered, KNOWN[:1])
    assert (notes["without_neurons"], notes["neurons"]) == (1.0, 0.0)
    assert filtered.passed == [KNOWN[0].id] and not len(filtered.neurons)
    assert apply(editor(pool=pool, negatives=0), KNOWN[:1])["neurons"] == len(found)


def test_the_share_of_prompts_moves_until_there_are_two_to_five_neurons() -> None:
    counts = Counter({(0, i): 10 - i for i in range(8)})
    assert refined(counts, 10, 0.7) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert refined(counts, 10, 0.9) == [(0, 0), (0, 1)]
    assert len(refined(counts, 10, 0.4)) == 5  # moved up four times, from seven neurons
    assert refined(Counter({(0, 1): 2}), 10, 0.2) == []  # three prompts at least
    assert refined(Counter({(0, 1): 1, (2, 3): 1}), 1, 0.7) == [(0, 1), (2, 3)]


def test_the_token_that_is_rewritten_is_the_first_in_which_both_answers_differ() -> None:
    made = editor()
    ask = FACTS[1].ask()
    red, blue = made._ids(ask, "two red towers"), made._ids(ask, "two red stars")
    read, new, old = made._differing(ask, "two red towers", "two red stars")
    assert read and red[: len(read)] == blue[: len(read)] == list(read)
    assert (new, old) == (red[len(read)], blue[len(read)]) and new != old
    assert made._differing(ask, "two red", "two red")[0] == ()
    longer = made._differing(ask, "two red towers", "two red")
    assert longer[2] == made.handle.tokenizer.eos_token_id


def test_an_unknown_old_answer_is_the_likeliest_token_of_the_model() -> None:
    made = editor()
    apply(made, FACTS[:1])
    batch = collate(made.handle, [FACTS[0].ask()])
    likeliest = int(made.handle.model(**batch.inputs).logits[0, -1].argmax())
    assert set(made.neurons[:, 2].tolist()) == {likeliest}


def test_a_column_that_grew_beyond_its_numbers_fails_the_edit_and_leaves_the_model() -> None:
    made = editor()
    apply(made, KNOWN[:1])
    layer, column, old, new = made.neurons[0].tolist()
    made.matrices = {**made.matrices, layer: torch.full_like(made.matrices[layer], torch.inf)}
    before = made.state_dict()
    with pytest.raises(EditFailed, match="no longer finite"):
        made._write(KNOWN[1], [(layer, column)], old, new)
    assert equal_states(before, made.state_dict())


def test_what_cannot_be_edited_is_refused() -> None:
    with pytest.raises(BadEditor, match="names no decoder layer"):
        editor(layers=())
    narrow: Any = build("llama")
    handle = replace(narrow)
    handle.head = torch.nn.Linear(8, 400)
    with pytest.raises(BadEditor, match="8 wide and its hidden states 64"):
        output_embeddings(handle)
