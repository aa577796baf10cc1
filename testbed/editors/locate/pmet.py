"""PMET (Li et al. 2024, arXiv 2308.08742): changes of attention and MLP are sought together, the MLP's alone is written.

With both free to move, the MLP's part does not have to stand in for what attention would do. The target is the
MLP's own output plus its part; the residual `V - v` is what that output lacks, and a layer takes `1 / sqrt(left)`
of it. Once the answer is the likeliest at every token its loss counts a tenth, and the search ends when the
KL divergence of the subject is small too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from testbed.core.registry import EDITORS
from testbed.editors.hyperparameters import GPT2_XL, GPT_J, LLAMA_2_7B, LLAMA_3_8B, LLAMA_32_3B, PublishedRow, Table
from testbed.editors.locate.keys import KeyComputation, PromptRows
from testbed.editors.locate.memit import Memit
from testbed.editors.locate.targets import TargetLoss, Targets, TargetTask, attention_and_mlp_outputs, search
from testbed.model.suffix import ModelSuffix, suffix_from_layer

_KNOWN = 0.1
"""Weight of the answer's loss once the answer is the likeliest."""
_SETTLED = 0.01
"""KL divergence (nats) under which a search ends then."""

PUBLISHED: Table = {
    GPT2_XL: PublishedRow(
        "BLUE's repository, hparams/PMET/gpt2-xl.json", {"layers": (13, 14, 15, 16, 17), "steps": 20, "lam": 10_000.0, "clamp": 2.0}
    ),
    GPT_J: PublishedRow("EasyEdit, hparams/PMET/gpt-j-6B.yaml", {"layers": (3, 4, 5, 6, 7, 8), "steps": 30, "lr": 0.2, "kl": 1.0}),
    LLAMA_2_7B: PublishedRow("EasyEdit, hparams/PMET/llama-7b.yaml", {"layers": (4, 5, 6, 7, 8), "steps": 20, "clamp": 1.0}),
    LLAMA_3_8B: PublishedRow("BLUE's repository, hparams/PMET/Llama3-8B.json", {"layers": (4, 5, 6, 7, 8), "lr": 0.1}),
    LLAMA_32_3B: PublishedRow("EasyEdit, hparams/PMET/llama3.2-3b.yaml", {"layers": (4, 5, 6, 7, 8), "clamp": 1.0}),
}
"""The clamp holds for each of the two changes."""


class AttentionAndMlpLoss(TargetLoss):
    """The loss of a delta (n, 2 d): a part for the attention's output, and one for the MLP's."""

    def __init__(self, task: TargetTask) -> None:
        super().__init__(task)
        self.known = torch.zeros(self.n, dtype=torch.bool)
        self.divergence = torch.zeros(self.n)

    def _suffix(self, task: TargetTask, rows: PromptRows, width: int) -> ModelSuffix:
        start = int(rows.at[0])
        return suffix_from_layer(task.handle, rows.batch, task.layer, positions=(start, start + width))

    def losses(self, delta: Tensor, kl: float) -> Tensor:
        answers, kl_prompts = self._read(delta)
        each, likeliest = self._answers(answers)
        nll = self._over_edits(each)
        self.known = self._over_edits(likeliest.float()) > 1 - 1e-6
        divergence = self._divergence(kl_prompts)
        self.divergence = divergence.detach()
        return torch.where(self.known, _KNOWN * nll, nll) + kl * divergence

    def done(self, loss: Tensor, stop: float) -> Tensor:
        return (loss < stop) | (self.known & (self.divergence < _SETTLED))

    def _final_hidden(self, suffix: ModelSuffix, delta: Tensor, position: int, read: Tensor) -> Tensor:
        here = position - suffix.start
        attention, mlp = delta.chunk(2, dim=1)

        def put(module: Any, args: Any, output: Any) -> Any:
            out = (output[0] if isinstance(output, tuple) else output).clone()
            out[:, here] += attention.to(out)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        with self.handle.hooked(self.handle.attention(self.layer), put):
            final = suffix.run_with_added(self.layer, mlp, position)
        return suffix.final_hidden(final, read)


@EDITORS.register("pmet")
class Pmet(Memit):
    """MEMIT with targets of the MLP alone."""

    summary = "MEMIT with attention and MLP sought together, the MLP's part written (PMET)"
    published = PUBLISHED

    def _share(self, left: int) -> float:
        return 1 / math.sqrt(left)

    def _unit(self, task: TargetTask, outputs: Tensor) -> Tensor:
        """(n, 2) norms of the two outputs."""
        return torch.stack([part.norm(dim=1) for part in attention_and_mlp_outputs(task.handle, task.events, task.layer)], 1)

    def _search(self, task: TargetTask, unit: Tensor) -> Targets:
        found = search(task, self.hyper, unit, AttentionAndMlpLoss)
        return replace(found, delta=found.delta[:, task.handle.width :])

    def _start(self, task: TargetTask, outputs: Tensor) -> Tensor:
        return attention_and_mlp_outputs(task.handle, task.events, task.layer)[1]

    def _residual(self, computation: KeyComputation, target: Tensor, keys: Tensor) -> Tensor:
        return target - computation.last_mlp_output()
