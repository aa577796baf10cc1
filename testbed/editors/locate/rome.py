"""ROME (Meng et al. 2022, arXiv 2202.05262): one edit, one layer, a change of rank one that is met exactly.

`Delta = (v* - W k) u^T / (u^T k)`, `u = C^-1 k`. The released code takes u from the averaged key and the
denominator from the bare prompt's; where the two differ much, a single edit can wreck the model (Yang et al.
2024, arXiv 2406.11263). Here the same key stands everywhere; `compat` brings the released form back for studies of collapse.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from testbed.core.events import EditEvent
from testbed.core.ranges import NonNegativeFloat
from testbed.core.registry import EDITORS
from testbed.editors.hyperparameters import (
    GPT2_XL,
    GPT_J,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_32_3B,
    MISTRAL_7B,
    QWEN_25_7B,
    PublishedRow,
    Table,
    Values,
    filled,
)
from testbed.editors.locate.core import LocateConfig, LocateEditor, middle
from testbed.editors.locate.keys import KeyComputation
from testbed.editors.locate.solver import IdentityPrior, Prior, SecondMomentPrior, Solution
from testbed.editors.locate.targets import TargetTask, attention_and_mlp_outputs

_EASY: Values = {"layer": 5, "decay": 1e-3, "second_moment": False}
"""What EasyEdit's files for ROME agree on."""

PUBLISHED: Table = {
    GPT2_XL: PublishedRow("ROME's repository, hparams/ROME/gpt2-xl.json", {"layer": 17, "steps": 20}),
    GPT_J: PublishedRow("ROME's repository, hparams/ROME/EleutherAI_gpt-j-6B.json", {"layer": 5, "steps": 20}),
    LLAMA_2_7B: PublishedRow("EasyEdit, hparams/ROME/llama-7b.yaml", _EASY),
    LLAMA_3_8B: PublishedRow("AlphaEdit's repository, hparams/ROME/Llama3-8B.json", _EASY),
    LLAMA_32_3B: PublishedRow("EasyEdit, hparams/ROME/llama3.2-3b.yaml", _EASY),
    MISTRAL_7B: PublishedRow("EasyEdit, hparams/ROME/mistral-7b.yaml", _EASY),
    QWEN_25_7B: PublishedRow("EasyEdit, hparams/ROME/qwen2.5-7b.yaml", _EASY),
}
"""The clamp is a multiple of the norm of the MLP's output."""


@dataclass(frozen=True)
class RomeConfig(LocateConfig):
    layer: int | None = None
    """The layer that is edited."""
    eta: NonNegativeFloat = 1e-4
    """Added to C's diagonal, as a share of its mean."""
    second_moment: bool | None = None
    """mom2_adjustment: C is the second moment of general keys; without it C = I, and no general text is read."""
    compat: bool = False
    """The released code's inconsistent keys (averaged for u, bare in the denominator)."""


@EDITORS.register("rome")
class Rome(LocateEditor):
    """Rank-one editing, one fact at a time."""

    summary = "one layer, one fact at a time, met exactly (ROME with consistent keys)"
    Config = RomeConfig
    defaults = {**LocateEditor.defaults, "clamp": 4.0, "contexts": 20, "context_tokens": (5, 10), "second_moment": True}
    published = PUBLISHED
    shallow = {**LocateEditor.shallow, "clamp": 20.0}

    def _derived(self) -> Values:
        derived = super()._derived()
        return {**derived, "layer": middle(derived["layers"])}

    def _tuned(self, config: RomeConfig) -> RomeConfig:
        return config if config.layers is None else filled(config, {"layer": config.layers[-1]})

    @property
    def bare_share(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All prompts count alike in the averaged key."""
        return 1 / (1 + self.hyper.contexts)

    def _groups(self, events: list[EditEvent]) -> list[list[EditEvent]]:
        """One by one, whatever the batch: each is met exactly, so a later one may undo part of an earlier."""
        return [[e] for e in events]

    def _stages(self) -> list[tuple[int, ...]]:
        return [(self.hyper.layer,)]

    @property
    def needs_second_moments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.hyper.second_moment

    def _prior(self, layer: int, second_moment: Tensor) -> Prior:
        return SecondMomentPrior(second_moment, 1.0, self.config.eta) if self.hyper.second_moment else IdentityPrior(1.0)

    def _unit(self, task: TargetTask, outputs: Tensor) -> Tensor:
        """The norm of the MLP's own output: the target is a change of it."""
        return attention_and_mlp_outputs(task.handle, task.events, task.layer)[1].norm(dim=1)

    def _residual(self, computation: KeyComputation, target: Tensor, keys: Tensor) -> Tensor:
        """v* - W k for the key that is solved for."""
        bare = target - computation.last_output()
        if self.config.compat:
            return bare
        weight = self.deltas.weight(self.hyper.layer)
        return bare + (computation.bare_key - keys).to(weight.dtype) @ weight.T

    def _solve(self, layer: int, keys: Tensor, residual: Tensor, bare: Tensor) -> Solution:
        """The equality-constrained change; `compat` divides by the bare key's share instead of the averaged one's."""
        prior = self.priors[layer]
        u = prior.unwhiten(prior.whiten(keys.double().T)).T
        k = bare if self.config.compat else keys
        return Solution(residual.double(), u / (u * k.double()).sum(1, keepdim=True), 1.0, 1.0, 1.0)
