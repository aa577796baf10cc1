"""ELDER (AAAI 2025, arXiv 2408.11869): a mixture of LoRA, with a map from prompts to adapters that is learned edit by edit.

Each edit draws a code, k adapters at every site; training pulls the routers' scores of the edit and its paraphrases
towards it (the guided loss) while the adapters that the routers choose learn the answer. A prompt whose own
choice is far from every stored code is deferred to the untouched model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters import lowrank
from testbed.editors.adapters.elder_hyper import hyper_of, overlaid
from testbed.editors.adapters.elder_mixture import CodeBook, Mixture, MixtureGate
from testbed.editors.adapters.elder_routing import Codes, Shape, experts_for
from testbed.editors.base import BadEditor, EditFailed, Editor, EditorConfig, Traits, need
from testbed.editors.codebook import keys as _sites
from testbed.model.predictor import ModelPredictor, Predictor


@dataclass(frozen=True)
class ElderConfig(EditorConfig):
    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps: the mixture layers; none is the table's (paper: six of one kind)."""
    rank: int | None = None
    """r (paper: 8)."""
    experts: int | None = None
    """N; none is the table's (paper: 4), or more where `planned_edits` need more codes."""
    active: int | None = None
    """k (paper: 2)."""
    eps: int | None = None
    """Hamming distance under which a prompt counts as edited (paper: 12, which is L k)."""
    guide: float | None = None
    """lambda, weight of the guided loss (paper: 0.01); 0 is the ablation without it."""
    lr: float | None = None
    """Adam's step size (paper: 1e-4)."""
    steps: int | None = None
    """Optimiser steps a batch (paper: 50)."""
    paraphrases: int = 1
    """Train-pool paraphrases that are trained beside each edit under its code."""
    planned_edits: int = 5_000
    """Edits for which N is chosen: at least a hundred codes for each."""
    defer: bool = True
    """Answer prompts far from every stored code with the untouched model; false is the ablation."""
    codes: Literal["assigned", "learned"] = "assigned"
    """Which code of an edit is stored: the one it drew (paper), or the routers' choice after training (released code)."""
    renormalise: bool = False
    """Make the scores of the chosen adapters sum to one (paper: not)."""

    def problems(self) -> list[str]:
        given = {n: getattr(self, n) for n in ("rank", "experts", "active", "steps", "planned_edits")}
        out = [f"{n} must be 1 or more, got {v}" for n, v in given.items() if v is not None and v < 1]
        if self.experts is not None and self.active is not None and self.active > self.experts:
            out.append(f"active must be at most experts ({self.experts}), got {self.active}")
        if self.lr is not None and not self.lr > 0:
            out.append(f"lr must be positive, got {self.lr}")
        if self.guide is not None and not self.guide >= 0:
            out.append(f"guide must be 0 or more, got {self.guide}")
        if self.paraphrases < 0:
            out.append(f"paraphrases must be 0 or more, got {self.paraphrases}")
        return out


@dataclass(frozen=True)
class Lesson:
    """What one batch teaches. x: (R, f) of all rows, edits first. codes: (R, L, N) bool, the code that each row should choose."""

    suffix: lowrank.AdaptedSuffix
    x: Tensor
    codes: Tensor


@EDITORS.register("elder")
class Elder(Editor):
    """L sites with N adapters each, L routers over one reading of the prompt, and the codes of the edits so far."""

    summary = "mixture of LoRA, routed by the prompt, deferring to the base far from every edit (ELDER)"
    traits = Traits(gated=True, uses=frozenset({"paraphrase"}))
    Config = ElderConfig

    def _prepare(self, pool: TrainPool) -> None:
        found, note = hyper_of(self.handle)
        self.hyper = h = overlaid(found, self.config)
        self.targets = lowrank.find_target_modules(self.handle, h.modules)
        n = self.config.experts or experts_for(len(self.targets), h.active, self.config.planned_edits, h.experts)
        if h.active > n:
            raise BadEditor(f"k = {h.active} adapters of N = {n} cannot be chosen: set active to {n} or less")
        lowrank.check_rank(self.targets, h.rank)
        self.shape = Shape(len(self.targets), n, h.active)
        self.within = h.eps if h.eps is not None else len(self.targets) * h.active
        self.notes = [note] if note else []
        self.notes.append(
            f"{len(self.targets)} sites, N = {n}, k = {h.active}, r = {h.rank}, deferral under distance {self.within}, "
            f"{self.shape.capacity:,} codes for {self.config.planned_edits:,} planned edits"
        )
        self.book = Codes(self.shape, self._place)
        self.mixture = self._fresh()

    @property
    def _place(self) -> torch.device:
        """Where the first site lies: what enters it chooses the adapters of all."""
        return self.handle.parameter(self.targets[0].weight).device

    def _fresh(self) -> Mixture:
        """Routers uniform in +-1/sqrt(f), adapters that change nothing."""
        g, s = self.generator(0), self.shape
        router = (2 * torch.rand(s.sites, s.experts, self.targets[0].f, generator=g) - 1) / self.targets[0].f ** 0.5
        pairs = [[lowrank.fresh(site, self.hyper.rank, g) for _ in range(s.experts)] for site in self.targets]
        u, v = (tuple(torch.stack([p[i] for p in site]) for site in pairs) for i in (0, 1))
        return Mixture(s, router.to(self._place), u, v, self.config.renormalise)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        n = len(batch.events)
        codes, shared = self._allocate(batch)
        lesson = self._lesson(batch, codes)
        inside = self._inside(lesson.x[:n])
        mixture, loss, guided = self._train(lesson)
        self.mixture = mixture
        learned = mixture.chosen(mixture.log_scores(lesson.x[:n]))
        apart = 2 * (self.shape.sites * self.shape.active - (learned & lesson.codes[:n]).sum((1, 2)))
        self.book = self.book.plus([e.id for e in batch.events], learned if self.config.codes == "learned" else codes, shared)
        return {
            "loss": loss,
            "guided_loss": guided,
            "deferral_hits": float(inside),
            "code_distance": float(apart.float().mean()),
            "entries": float(len(self.book)),
            "codes": float(self.book.distinct),
            "collisions": float(self.book.collisions),
        }

    def _allocate(self, batch: EditBatch) -> tuple[Tensor, int]:
        """(n, L, N) bool codes of the edits, and how many had to take a code in use. A fact that is changed again keeps its code."""
        generator, codes, shared = self.generator(batch.step), {}, 0
        for e in batch.events:
            code = codes.get(e.revises) if e.revises in codes else self.book.of(e.revises)
            if code is None:
                code, new = self.book.draw(generator, list(codes.values()))
                shared += not new
            codes[e.id] = code
        return torch.stack(list(codes.values())), shared

    def _lesson(self, batch: EditBatch, codes: Tensor) -> Lesson:
        """The edits, then their paraphrases under the same codes."""
        rows = [(i, e.ask()) for i, e in enumerate(batch.events)]
        for i, e in enumerate(batch.events):
            rows += [(i, Ask(p, e.image)) for p in batch.paraphrases.get(e.id, ())[: self.config.paraphrases]]
        suffix = lowrank.AdaptedSuffix(self.handle, self.targets, [a for _, a in rows], [batch.events[i].target for i, _ in rows])
        x = _sites.last(suffix.act, suffix.batch.on(suffix.act.device))
        return Lesson(suffix, x, codes[[i for i, _ in rows]].to(x.device))

    def _inside(self, x: Tensor) -> int:
        """How many of these prompts would be answered by adapters now."""
        row, _ = CodeBook(self.book, self.within).retrieve(self.mixture.chosen(self.mixture.log_scores(x)).flatten(1))
        return int((row >= 0).sum())

    @timed("train")
    def _train(self, lesson: Lesson) -> tuple[Mixture, float, float]:
        """The mixture after one batch, and the last losses (answer, guided). Raises `EditFailed` when one is not finite."""
        tensors = [t.clone().requires_grad_(True) for t in self.mixture.tensors()]
        mixture, adam = self.mixture.like(tensors), torch.optim.Adam(tensors, lr=self.hyper.lr)
        loss = guided = float("nan")
        for _ in range(self.hyper.steps):
            adam.zero_grad()
            log_scores = mixture.log_scores(lesson.x)
            answer = lesson.suffix.losses(mixture.adds(log_scores)).mean()
            guide = -(log_scores * lesson.codes).sum((1, 2)).mean()
            loss, guided = float(answer.detach()), float(guide.detach())
            total = answer + self.hyper.guide * guide.to(answer.device)
            if not torch.isfinite(total):
                raise EditFailed(f"the loss became {float(total.detach())} at lr {self.hyper.lr}; try a smaller one")
            total.backward()
            adam.step()
        return self.mixture.like([t.detach() for t in tensors]), loss, guided

    def predictor(self) -> Predictor:
        book = CodeBook(self.book, self.within if self.config.defer else None)
        gate = MixtureGate(self.handle, self.targets, self.mixture, book)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def save_adapters(self, folder: Path) -> list[Path]:
        """Write each of the N adapters as a folder that PEFT loads; the routers and codes stay in the state."""
        out = []
        for i in range(self.shape.experts):
            pairs = zip(self.targets, self.mixture.u, self.mixture.v)
            adapters = {s.name: lowrank.Adapter(u[i], v[i]) for s, u, v in pairs}
            out.append(folder / f"expert-{i:02d}")
            lowrank.save_peft(out[-1], self.handle, adapters)
        return out

    def _where(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "modules": [s.name for s in self.targets], "active": self.shape.active}

    def _state(self) -> dict[str, Any]:
        pairs = {f"{k}.{i}": t for k, ts in (("u", self.mixture.u), ("v", self.mixture.v)) for i, t in enumerate(ts)}
        codes = {"codes": self.book.packed, "entries": self.book.ids, "collisions": self.book.collisions}
        return {"router": self.mixture.router, **pairs, **codes, **self._where()}

    def _load(self, state: dict[str, Any]) -> None:
        for name, value in self._where().items():
            if state.get(name) != value:
                raise BadEditor(f"the state was made with {name} {state.get(name)}, this editor has {value}")
        mine = [("router", self.mixture.router), *((f"{k}.{i}", t) for k in "uv" for i, t in enumerate(getattr(self.mixture, k)))]
        tensors = [need(state, name, tuple(t.shape)).to(t.device) for name, t in mine]
        packed = need(state, "codes", (len(state["entries"]), self.shape.bytes))
        self.mixture = self.mixture.like(tensors)
        self.book = Codes(self.shape, self._place, packed.cpu(), state["entries"], state["collisions"])
