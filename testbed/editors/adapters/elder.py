"""ELDER (AAAI 2025, arXiv 2408.11869): a mixture of LoRA, with a map from prompts to adapters that is learned edit by edit.

Each edit draws a code: k of the N adapters at every target module. Training pulls the routers' scores of the edit and
of its paraphrases towards the code (the guided loss), while the adapters that the routers choose learn the answer.
A prompt whose own choice is far from every stored code is deferred to the untouched model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters import lowrank
from testbed.editors.adapters.elder_routing import AllocationCodes, CodeRouter, Mixture, MixtureGate, MixtureShape, experts_for
from testbed.editors.base import BadEditor, Editor, EditorConfig, Traits, minimise, need, require_same
from testbed.editors.codebook.keys import last_position
from testbed.editors.hyperparameters import GPT2_XL, LLAMA_2_7B, SHALLOW, PublishedRow, Table, Values
from testbed.editors.work import Work
from testbed.model.handle import ModelHandle
from testbed.model.packed_linear import packed_layers
from testbed.model.predictor import ModelPredictor, Predictor

DEFAULTS: Values = {"rank": 8, "active": 2, "guide": 0.01, "lr": 1e-4, "steps": 50}
"""The paper's values."""
_EXPERTS = 4
"""N in the paper."""

PUBLISHED: Table = {
    GPT2_XL: PublishedRow(
        "ELDER's text, layers 35 to 40; its list has 36 to 40", {"modules": r"\.h\.(35|36|37|38|39|40)\.mlp\.c_fc$", "experts": 4}
    ),
    LLAMA_2_7B: PublishedRow("the paper", {"modules": r"\.layers\.(21|22|23|24|25|26)\.mlp\.down_proj$", "experts": 4}),
}


def derived(handle: ModelHandle) -> Values:
    """Values for a model without published ones: down-projections of up to six layers that end at four fifths of the depth.

    A shallow model is given those of its upper half, with larger steps (chosen on a development stream of the committed model).
    With the paper's step and weight SmolLM2 learns nothing, so other models get larger ones (chosen on SmolLM2).
    """
    depth = handle.n_layers
    stop = depth if depth < SHALLOW else round(0.82 * depth)
    layers = range(max(0, stop - min(6, max(1, depth // 2))), stop)
    names = [handle.down_weight(i).removesuffix(".weight").replace(".", r"\.") for i in layers]
    steps = {"lr": 5e-3, "guide": 1.0, "steps": 30} if depth < SHALLOW else {"lr": 1e-3, "guide": 0.1}
    return {"modules": f"^({'|'.join(names)})$", **steps}


@dataclass(frozen=True)
class ElderConfig(EditorConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps: the mixture layers (paper: six of one kind)."""
    rank: PositiveInt | None = None
    """r (paper: 8)."""
    experts: PositiveInt | None = None
    """N; by default the model's (paper: 4), or more where `planned_edits` need more codes."""
    active: PositiveInt | None = None
    """k (paper: 2)."""
    eps: int | None = None
    """Hamming distance under which a prompt counts as edited (paper: 12, which is L k)."""
    guide: NonNegativeFloat | None = None
    """lambda, weight of the guided loss (paper: 0.01); 0 is the ablation without it."""
    lr: PositiveFloat | None = None
    """Adam's step size (paper: 1e-4)."""
    steps: PositiveInt | None = None
    """Optimiser steps a batch (paper: 50)."""
    paraphrases: NonNegativeInt = 1
    """Train-pool paraphrases that are trained beside each edit under its code."""
    planned_edits: PositiveInt = 5_000
    """Edits for which N is chosen: at least a hundred codes for each."""
    defer: bool = True
    """Answer prompts far from every stored code with the untouched model; false is the ablation."""
    codes: Literal["assigned", "learned"] = "assigned"
    """Which code of an edit is stored: the one it drew (paper), or the routers' choice after training (released code)."""
    renormalise: bool = False
    """Make the scores of the chosen adapters sum to one (paper: not)."""

    def problems(self) -> list[str]:
        too_many = self.experts is not None and self.active is not None and self.active > self.experts
        return super().problems() + ([f"active must be at most experts ({self.experts}), got {self.active}"] if too_many else [])


@dataclass(frozen=True)
class TrainingRows:
    """The rows that one batch trains, edits first. x: (R, f) input of the routers. codes: (R, L, N) bool, the code of each row's edit."""

    suffix: lowrank.AdaptedSuffix
    x: Tensor
    codes: Tensor


@EDITORS.register("elder")
class Elder(Editor):
    """L target modules with N adapters each, L routers that read one activation of the prompt, and the codes of the edits so far."""

    summary = "mixture of LoRA, routed by the prompt, deferring to the base far from every edit (ELDER)"
    traits = Traits(gated=True, uses=frozenset({"paraphrase"}))
    Config = ElderConfig
    published, defaults = PUBLISHED, DEFAULTS

    def _derived(self) -> Values:
        return derived(self.handle)

    def _prepare(self, pool: TrainPool) -> None:
        h = self.hyper
        self.targets = lowrank.find_target_modules(self.handle, h.modules)
        n = self._experts(len(self.targets))
        if h.active > n:
            raise BadEditor(f"k = {h.active} adapters of N = {n} cannot be chosen: set active to {n} or less")
        lowrank.check_rank(self.targets, h.rank)
        self.shape = MixtureShape(len(self.targets), n, h.active)
        self.eps = h.eps if h.eps is not None else len(self.targets) * h.active
        self.notes.append(
            f"{len(self.targets)} target modules, N = {n}, k = {h.active}, r = {h.rank}, deferral under distance {self.eps}, "
            f"{self.shape.capacity:,} codes for {self.config.planned_edits:,} planned edits"
        )
        self.codes = AllocationCodes(self.shape, self._device)
        self.mixture = self._fresh()

    def _experts(self, targets: int) -> int:
        """N for so many target modules."""
        return self.hyper.experts or experts_for(targets, self.hyper.active, self.hyper.planned_edits, _EXPERTS)

    def work(self, batch: int) -> Work:
        h, targets = self.hyper, lowrank.find_target_modules(self.handle, self.hyper.modules)
        experts = self._experts(len(targets))
        return lowrank.adapter_work(targets, h.rank, h.steps, self.handle.n_layers, experts, 1.0 + h.paraphrases)

    @property
    def _device(self) -> torch.device:
        """The device of the first target module, whose input chooses the adapters of all."""
        return self.handle.parameter(self.targets[0].weight).device

    def _fresh(self) -> Mixture:
        """Routers uniform in +-1/sqrt(f), and adapters that change nothing."""
        g, s = self.generator(0), self.shape
        router = (2 * torch.rand(s.targets, s.experts, self.targets[0].f, generator=g) - 1) / self.targets[0].f ** 0.5
        pairs = [[lowrank.fresh(target, self.hyper.rank, g) for _ in range(s.experts)] for target in self.targets]
        u, v = (tuple(torch.stack([p[i] for p in target]) for target in pairs) for i in (0, 1))
        return Mixture(s, router.to(self._device), u, v, self.config.renormalise)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        n = len(batch.events)
        codes, shared = self._allocate(batch)
        rows = self._training_rows(batch, codes)
        hits = self._deferral_hits(rows.x[:n])
        self.mixture, loss, guided = self._train(rows)
        learned = self.mixture.chosen(self.mixture.log_scores(rows.x[:n]))
        distance = 2 * (self.shape.targets * self.shape.active - (learned & rows.codes[:n]).sum((1, 2)))
        self.codes = self.codes.plus([e.id for e in batch.events], learned if self.config.codes == "learned" else codes, shared)
        return {
            "loss": loss,
            "guided_loss": guided,
            "deferral_hits": float(hits),
            "code_distance": float(distance.float().mean()),
            "entries": float(len(self.codes)),
            "codes": float(self.codes.distinct),
            "collisions": float(self.codes.collisions),
        }

    def _allocate(self, batch: EditBatch) -> tuple[Tensor, int]:
        """(n, L, N) bool codes of the edits, and how many had to take a code in use. A fact that is changed again keeps its code."""
        generator, codes, shared = self.generator(batch.step), {}, 0
        for e in batch.events:
            code = codes.get(e.revises) if e.revises in codes else self.codes.of(e.revises)
            if code is None:
                code, new = self.codes.draw(generator, list(codes.values()))
                shared += not new
            codes[e.id] = code
        return torch.stack(list(codes.values())), shared

    def _training_rows(self, batch: EditBatch, codes: Tensor) -> TrainingRows:
        """The edits, then their paraphrases under the same codes."""
        rows = [(i, e.ask()) for i, e in enumerate(batch.events)]
        for i, e in enumerate(batch.events):
            rows += [(i, replace(e.ask(), prompt=p)) for p in batch.paraphrases.get(e.id, ())[: self.config.paraphrases]]
        suffix = lowrank.AdaptedSuffix(self.handle, self.targets, [a for _, a in rows], [batch.events[i].target for i, _ in rows])
        x = last_position(suffix.act, suffix.batch.on(suffix.act.device))
        return TrainingRows(suffix, x, codes[[i for i, _ in rows]].to(x.device))

    def _deferral_hits(self, x: Tensor) -> int:
        """How many of these prompts the adapters would answer before the batch is trained."""
        row, _ = CodeRouter(self.codes, self.eps).retrieve(self.mixture.chosen(self.mixture.log_scores(x)).flatten(1))
        return int((row >= 0).sum())

    @timed("train")
    def _train(self, rows: TrainingRows) -> tuple[Mixture, float, float]:
        """The mixture after one batch, and the last losses (answer, guided). Raises `EditFailed` when one is not finite."""
        tensors = [t.clone().requires_grad_(True) for t in self.mixture.tensors()]
        mixture, last = self.mixture.like(tensors), {"answer": torch.nan, "guide": torch.nan}

        def total() -> Tensor:
            log_scores = mixture.log_scores(rows.x)
            answer = rows.suffix.losses(mixture.adds(log_scores)).mean()
            guide = -(log_scores * rows.codes).sum((1, 2)).mean()
            last.update(answer=float(answer.detach()), guide=float(guide.detach()))
            return answer + self.hyper.guide * guide.to(answer.device)

        with packed_layers(self.handle, self.targets[0].layer):
            minimise(tensors, total, self.hyper.lr, self.hyper.steps)
        return self.mixture.like([t.detach() for t in tensors]), last["answer"], last["guide"]

    def predictor(self) -> Predictor:
        router = CodeRouter(self.codes, self.eps if self.config.defer else None)
        gate = MixtureGate(self.handle, self.targets, self.mixture, router)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def save_adapters(self, folder: Path) -> list[Path]:
        """Write each of the N adapters as a folder that PEFT loads. Routers and codes are not part of it; they stay in the state."""
        out = []
        for i in range(self.shape.experts):
            pairs = zip(self.targets, self.mixture.u, self.mixture.v)
            adapters = {t.name: lowrank.Adapter(u[i], v[i]) for t, u, v in pairs}
            out.append(folder / f"expert-{i:02d}")
            lowrank.save_peft(out[-1], self.handle, adapters)
        return out

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "modules": [t.name for t in self.targets], "active": self.shape.active}

    def _state(self) -> dict[str, Any]:
        pairs = {f"{k}.{i}": t for k, ts in (("u", self.mixture.u), ("v", self.mixture.v)) for i, t in enumerate(ts)}
        codes = {"codes": self.codes.packed, "entries": self.codes.ids, "collisions": self.codes.collisions}
        return {"router": self.mixture.router, **pairs, **codes, **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        mine = [("router", self.mixture.router), *((f"{k}.{i}", t) for k in "uv" for i, t in enumerate(getattr(self.mixture, k)))]
        tensors = [need(state, name, tuple(t.shape)).to(t.device) for name, t in mine]
        packed = need(state, "codes", (len(state["entries"]), self.shape.bytes))
        self.mixture = self.mixture.like(tensors)
        self.codes = AllocationCodes(self.shape, self._device, packed.cpu(), state["entries"], state["collisions"])
