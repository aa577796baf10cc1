# pyright: strict
"""What an editor declares about itself, read by the loop, the dry run and the tests in the place of its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sample = Literal["paraphrase", "previous", "train_pool", "train_edits"]


@dataclass(frozen=True)
class Traits:
    """What an editor is and may see. The loop and the tests read these and never compare an editor's name."""

    weights: bool = False
    """It answers with changed weights of the model itself (so the edited model can be saved)."""
    gated: bool = False
    """It decides for each prompt whether to act; a miss returns the base's own tensors."""
    undo: bool = False
    """`revert(event_ids)` restores the state before these edits."""
    told_truth: bool = False
    """Its predictor is told the right answer (the oracle alone)."""
    learns: Literal["training", "context", "rule", "no"] = "training"
    """How an edit makes its target likelier: tensors are trained on it or solved for it; the fact is put into the prompt, which
    takes a model that reads its prompt; a rule, or a module that was trained before, makes the change without looking at the target's
    probability, so that an edit may miss; or not at all."""
    short_targets: bool = False
    """An edit has room for an answer of a few tokens: it is one hidden state (a target, a codebook's value), one token, or a neuron for
    each of a few tokens. The papers have no form for long answers, of which the user is warned before the first edit."""
    max_batch: int | None = None
    """Largest batch of edits that it takes at once."""
    uses: frozenset[Sample] = frozenset()
    """Extra samples that the published method uses; the editor is given these and no others."""
