"""MELO (Yu et al., AAAI 2024, arXiv 2312.11795): a vector database of edits selects one block of a dynamic LoRA, or none.

A block b is a LoRA of rank r at each target module. The database keeps a point q for each edit, the input of one linear map at the last
prompt token, in clusters of edits that have one answer. With c the centre and R the radius of the cluster nearest to a prompt,

    h' = W h + s V_b^T U_b h     where |q - c| <= R ,  b the block of the nearest point of that cluster ,
    h' = W h                     elsewhere: the very numbers of the base model.

A cluster starts with the radius R_0. An edit inside a cluster of its own answer joins it: c becomes the mean of the members, and R
reaches the farthest. An edit at distance d from a cluster of another answer, less than both radii, splits them:

    R_old := min(R_old, d / 2 - delta) ,        R_new := min(R_0, d / 2 + delta) .

Members that lie outside afterwards are forgotten: no prompt is sent to their block any more.

Not taken over from the released code: answers compared by the sum of their token ids; a single cluster looked at, so that a new ball
may overlap a third one of another answer; exceptions swallowed while edits are mapped to blocks; a radius in units of one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent
from testbed.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters import elder, lowrank
from testbed.editors.base import BadEditor, EditFailed, Editor, EditorConfig, Traits, appended, need, require_finite_loss, require_same
from testbed.editors.codebook.gate import Answer, Gate, Hits
from testbed.editors.codebook.keys import last_position, read_keys, reading_error
from testbed.editors.codebook.nearest import Keys, Nearest, to_all
from testbed.editors.hyperparameters import GPT2_XL, SHALLOW, PublishedRow, Table, Values
from testbed.editors.work import Work
from testbed.model.encoding import answer_ids
from testbed.model.packed_linear import packed_layers
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.prefix_cache import ImagePrefixes

_DELTA = 1e-5
"""delta: what the older ball of a split loses beyond half of the distance."""
_BANK = 100
"""Questions of the train pool whose distances give the radius."""
_RADIUS = 0.5
"""R_0 where neither the configuration nor a train pool gives one (published for GPT2-XL)."""

PUBLISHED: Table = {
    GPT2_XL: PublishedRow(
        "MELO's repository, config/model/gpt2xl.yaml and config/experiment/hallucination.yaml",
        {
            "modules": r"\.h\.(36|37)\.mlp\.c_fc$",
            "database": r"\.h\.35\.mlp\.c_fc$",
            "radius": 0.5,
            "edits_per_block": 4,
            "lr": 1e-3,
            "steps": 50,
        },
    )
}


@dataclass(frozen=True)
class MeloConfig(EditorConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps that get blocks; by default those that ELDER adapts."""
    database: str | None = None
    """Regular expression for the linear map at whose input points are read; None is the first target module."""
    rank: PositiveInt = 2
    """r of one block (paper: 2)."""
    scale: PositiveFloat = 1.0
    """s, the factor on a block's product (paper: alpha / r = 1)."""
    edits_per_block: PositiveInt | None = None
    """Edits of one step that share a block (zsRE: 100, hallucination: 4)."""
    radius: PositiveFloat | None = None
    """R_0; None takes it from the train pool, because a distance means nothing in another model (zsRE: 75, hallucination: 0.5)."""
    quantile: NonNegativeFloat = 0.05
    """The share of pairs of pool questions that lie nearer to each other than 2 R_0, where `radius` is None (ours)."""
    lr: PositiveFloat | None = None
    """Adam's step size (zsRE: 1e-2, hallucination: 1e-3)."""
    steps: PositiveInt | None = None
    """Optimiser steps of a block (paper: 50)."""
    halve_every: PositiveInt = 20
    """Steps after which the step size is halved (released code: 20)."""

    def problems(self) -> list[str]:
        too_large = self.quantile > 1
        return super().problems() + ([f"quantile must be at most 1, got {self.quantile:g}"] if too_large else [])


Block = tuple[lowrank.Adapter, ...]
"""One adapter for each target module."""


@dataclass(frozen=True)
class Point:
    """One edit in the database: its answer as token ids, and the block that learnt it."""

    event_id: str
    label: tuple[int, ...]
    block: str


@dataclass(frozen=True)
class VectorDatabase:
    """Points with their keys (n, f), and their clusters. It never changes: an edit makes another one.

    Balls of clusters with different answers do not overlap, whatever was inserted before.
    """

    start: float
    """R_0."""
    keys: Tensor
    points: tuple[Point, ...] = ()
    cluster: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """(n,) the cluster of each point, -1 for one that is forgotten."""
    centres: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """(c, f) float32."""
    radii: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """(c,) float64, negative for a cluster without members."""
    labels: tuple[tuple[int, ...], ...] = ()
    """The answer of each cluster."""

    def __len__(self) -> int:
        return len(self.points)

    @property
    def forgotten(self) -> int:
        return int((self.cluster < 0).sum())

    def with_point(self, point: Point, key: Tensor) -> VectorDatabase:
        """The database after an edit whose key is (f,)."""
        away = to_all(self.centres, key, "euclidean") if len(self.centres) else torch.zeros(0, dtype=torch.float64)
        alive = self.radii >= 0
        same = alive & torch.tensor([label == point.label for label in self.labels], dtype=torch.bool)
        keys = appended(self.keys, len(self), key[None])[: len(self) + 1] if len(self) else key[None].clone()
        more = replace(self, keys=keys, points=(*self.points, point))
        return more._joined(same, away) or more._split(alive & ~same, away, point.label)

    def _joined(self, same: Tensor, away: Tensor) -> VectorDatabase | None:
        """The newest point in the nearest cluster of its answer, or None where it lies in none or the ball would meet another answer."""
        inside = same & (away <= self.radii)
        if not inside.any():
            return None
        at = int(torch.where(inside, away, torch.inf).argmin())
        key = self.keys[-1]
        members = torch.cat([self.keys[:-1][self.cluster == at], key[None]])
        centre = members.double().mean(0).float()
        radius = max(float(self.radii[at]), float(to_all(members, centre, "euclidean").max()) + reading_error(key, "euclidean"))
        others = (self.radii >= 0) & torch.tensor([label != self.labels[at] for label in self.labels])
        if (others & (to_all(self.centres, centre, "euclidean") < self.radii + radius)).any():
            return None
        centres, radii = self.centres.clone(), self.radii.clone()
        centres[at], radii[at] = centre, radius
        return replace(self, cluster=torch.cat([self.cluster, torch.tensor([at])]), centres=centres, radii=radii)

    def _split(self, others: Tensor, away: Tensor, label: tuple[int, ...]) -> VectorDatabase:
        """The newest point as a cluster of its own. others: (c,) the clusters of other answers, which shrink until none overlaps it.

        Where rounding cannot tell a centre from the point, the older cluster ends, because half of that distance would reach nothing.
        """
        least = reading_error(self.keys[-1], "euclidean")
        radii, new = self.radii.clone(), max(self.start, least)
        radii[others & (away <= 2 * least)] = -1.0
        meets = others & (radii >= 0) & (away < radii + new)
        if meets.any():
            near = int(torch.where(meets, away, torch.inf).argmin())
            half, delta = float(away[near]) / 2, min(_DELTA, float(away[near]) / 4)
            new = min(new, half + delta)
            radii[near] = min(float(radii[near]), half - delta)
            radii = torch.where(meets, torch.minimum(radii, away - new), radii)
        cluster, radii = self._forget(radii)
        return replace(
            self,
            cluster=torch.cat([cluster, torch.tensor([len(radii)])]),
            centres=torch.cat([self.centres.reshape(len(self.radii), -1), self.keys[-1:]]) if len(radii) else self.keys[-1:].clone(),
            radii=torch.cat([radii, torch.tensor([new], dtype=torch.float64)]),
            labels=(*self.labels, label),
        )

    def _forget(self, radii: Tensor) -> tuple[Tensor, Tensor]:
        """(the cluster of each older point, the radii) when clusters have shrunk: points outside are forgotten, empty clusters end."""
        cluster, radii = self.cluster.clone(), radii.clone()
        for at in (radii < self.radii).nonzero()[:, 0].tolist():
            own = (cluster == at).nonzero()[:, 0]
            away = to_all(self.keys[own], self.centres[at], "euclidean")
            cluster[own[away > radii[at]]] = -1
            if not (cluster == at).any():
                radii[at] = -1.0
        return cluster, radii

    def without(self, event_ids: Iterable[str]) -> VectorDatabase:
        """The database as if these edits had never been inserted: the others are inserted again. Raises `BadEditor` for an unknown id."""
        gone = set(event_ids)
        if missing := gone - {p.event_id for p in self.points}:
            raise BadEditor(f"cannot undo: the database holds no edit {', '.join(sorted(missing))}")
        out = VectorDatabase(self.start, self.keys[:0])
        for point, key in zip(self.points, self.keys):
            if point.event_id not in gone:
                out = out.with_point(point, key)
        return out


class BlockRouter:
    """Routes a prompt to the nearest point of the nearest cluster whose ball holds it; of equally near ones the newest answers."""

    def __init__(self, database: VectorDatabase) -> None:
        self.database = database
        self._find = Nearest(Keys(database.centres), database.radii, "containing-nearest", newest=True) if len(database) else None

    def __len__(self) -> int:
        return len(self.database)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(B, f) queries to (B,) the row of the point that answers, or -1, and (B,) the distance of the cluster's centre."""
        queries = queries.cpu().float()
        if self._find is None:
            return torch.full((len(queries),), -1), torch.full((len(queries),), torch.inf, dtype=torch.float64)
        cluster, distance = self._find(queries)
        rows = [self._member(int(c), q) if c >= 0 else -1 for c, q in zip(cluster, queries)]
        return torch.tensor(rows, dtype=torch.long), distance

    def _member(self, cluster: int, query: Tensor) -> int:
        rows = (self.database.cluster == cluster).nonzero()[:, 0]
        away = to_all(self.database.keys[rows], query, "euclidean")
        return int(rows[len(rows) - 1 - int(away.flip(0).argmin())])

    def entry_of(self, row: int) -> str:
        return self.database.points[row].event_id


@EDITORS.register("melo")
class Melo(Editor):
    """The database of points, and the blocks by the first edit that each of them learnt."""

    summary = "blocks of a dynamic LoRA, selected by clusters of prompts in a vector database (MELO)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"train_pool"}))
    Config = MeloConfig
    published, defaults = PUBLISHED, {"edits_per_block": 4, "lr": 1e-2, "steps": 50}

    def _derived(self) -> Values:
        """ELDER's target modules, so that the two compare, with the larger published step size on shallow models."""
        steps = {"lr": 1e-2, "steps": 20} if self.handle.n_layers < SHALLOW else {"lr": 1e-3}
        return {"modules": elder.derived(self.handle)["modules"], **steps}

    def _prepare(self, pool: TrainPool) -> None:
        self.targets = lowrank.find_target_modules(self.handle, self.hyper.modules)
        lowrank.check_rank(self.targets, self.config.rank)
        self.read = self._read_at()
        self._prefixes = ImagePrefixes(self.handle, self.read.module)
        self.database = VectorDatabase(self._radius(pool), torch.zeros(0, self.read.f))
        self.blocks: dict[str, Block] = {}

    def _read_at(self) -> lowrank.TargetModule:
        """The linear map at whose input points are read. Raises `BadEditor` for one that runs when a block has already acted."""
        if self.hyper.database is None:
            return self.targets[0]
        found = lowrank.find_target_modules(self.handle, self.hyper.database)[0]
        first = lowrank.find_target_modules(self.handle, f"({self.hyper.database})|({self.hyper.modules})")[0]
        if first.name != found.name:
            raise BadEditor(f"database={self.hyper.database!r} finds {found.name}, which runs behind {first.name}: name an earlier map")
        return found

    @torch.no_grad()
    def _radius(self, pool: TrainPool) -> float:
        """R_0, which a note names where it is not given."""
        if self.hyper.radius is not None:
            return float(self.hyper.radius)
        asks = [q.ask() for q in pool.questions if self.handle.reads_pictures or q.image is None][:_BANK]
        distances = torch.pdist(read_keys(self._prefixes, asks, last_position).double()) if len(asks) > 1 else torch.zeros(0)
        if not len(distances) or not float(distances.max()):
            self.notes.append(f"the stream has no train pool to measure distances on: clusters start with the radius {_RADIUS}")
            return _RADIUS
        radius = float(distances[distances > 0].quantile(self.config.quantile)) / 2
        self.notes.append(f"clusters start with the radius {radius:.3g}, from {len(asks)} questions of the train pool")
        return radius

    def work(self, batch: int) -> Work:
        """The blocks of a step train one after the other, each on its own edits."""
        targets = lowrank.find_target_modules(self.handle, self.hyper.modules)
        found = lowrank.adapter_work(targets, self.config.rank, self.hyper.steps, self.handle.n_layers)
        parts = -(-batch // self.hyper.edits_per_block)
        own = found.state * parts / max(1, batch)
        return replace(found, steps=found.steps * parts, rows=1.0 / parts, forwards=2.0, state=0.0, state_per_edit=own + targets[0].f)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        asks = [e.ask() for e in batch.events]
        keys = read_keys(self._prefixes, asks, last_position)
        if not torch.isfinite(keys).all():
            raise EditFailed("activations of the edit are not finite, so that it has no point in the database")
        size, losses = self.hyper.edits_per_block, []
        for at in range(0, len(batch.events), size):
            events = batch.events[at : at + size]
            block, loss = self._train(events)
            losses.append(loss)
            self.blocks = {**self.blocks, events[0].id: block}
            for event, key in zip(events, keys[at : at + size]):
                label = tuple(answer_ids(self.handle, event.ask(), event.target))
                self.database = self.database.with_point(Point(event.id, label, events[0].id), key)
        return {
            "loss": sum(losses) / len(losses),
            "entries": float(len(self.database)),
            "clusters": float((self.database.radii >= 0).sum()),
            "forgotten": float(self.database.forgotten),
        }

    @timed("train")
    def _train(self, events: Sequence[EditEvent]) -> tuple[Block, float]:
        """A block that learnt these edits and its last loss (nats a token). Its start depends on its first edit alone."""
        generator = self.generator(int(events[0].id, 16))
        pairs = [lowrank.fresh(target, self.config.rank, generator) for target in self.targets]
        tensors = [t.requires_grad_(True) for pair in pairs for t in pair]
        block = tuple(lowrank.Adapter(u, v, self.config.scale) for u, v in pairs)
        suffix = lowrank.AdaptedSuffix(self.handle, self.targets, [e.ask() for e in events], [e.target for e in events])
        adam, loss = torch.optim.Adam(tensors, lr=self.hyper.lr, fused=True), torch.nan
        schedule = torch.optim.lr_scheduler.StepLR(adam, self.config.halve_every, 0.5)
        with packed_layers(self.handle, self.targets[0].layer):
            for _ in range(self.hyper.steps):
                adam.zero_grad()
                mean = suffix.losses(block).mean()
                require_finite_loss(mean, self.hyper.lr)
                mean.backward()
                adam.step()
                schedule.step()
                loss = float(mean.detach())
        return tuple(replace(a, u=a.u.detach(), v=a.v.detach()) for a in block), loss

    def predictor(self) -> Predictor:
        """The model with the database and the blocks as they are now; later edits do not change this predictor."""
        router, blocks = BlockRouter(self.database), self.blocks
        answers: list[tuple[torch.nn.Module, Answer]] = []
        if self.read.name != self.targets[0].name:
            answers.append((self.read.module, lambda hits: hits.out))
        answers += [(target.module, partial(_with_blocks, i, router.database.points, blocks)) for i, target in enumerate(self.targets)]
        gate = Gate(self.handle, answers, router, last_position)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def revert(self, event_ids: Iterable[str]) -> None:
        """Delete the points of these edits, and blocks that no edit needs any more. Raises `BadEditor` for an unknown id.

        A block that other edits of the step share stays as it was trained.
        """
        self.database = self.database.without(event_ids)
        needed = {p.block for p in self.database.points}
        self.blocks = {k: block for k, block in self.blocks.items() if k in needed}

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "modules": [t.name for t in self.targets], "read_at": self.read.name}

    def _state(self) -> dict[str, Any]:
        d = self.database
        tensors = {"keys": d.keys, "cluster": d.cluster, "centres": d.centres, "radii": d.radii}
        parts = {f"{k}.{i}.{b}": getattr(a, k) for b, block in self.blocks.items() for i, a in enumerate(block) for k in "uv"}
        points = [[p.event_id, list(p.label), p.block] for p in d.points]
        return {**tensors, **parts, "points": points, "labels": [list(x) for x in d.labels], "start": d.start, **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        points = tuple(Point(e, tuple(label), block) for e, label, block in state["points"])
        labels = tuple(tuple(x) for x in state["labels"])
        n, c, f = len(points), len(labels), self.read.f
        self.database = VectorDatabase(
            float(state["start"]),
            need(state, "keys", (n, f)).cpu(),
            points,
            need(state, "cluster", (n,)).cpu(),
            need(state, "centres", (c, f if c else None)).cpu(),
            need(state, "radii", (c,)).cpu(),
            labels,
        )
        self.blocks = {b: self._block(state, b) for b in dict.fromkeys(p.block for p in points)}
        self._prefixes.kept.clear()

    def _block(self, state: dict[str, Any], name: str) -> Block:
        out = []
        for i, t in enumerate(self.targets):
            device = self.handle.parameter(t.weight).device
            u, v = (need(state, f"{k}.{i}.{name}", (self.config.rank, width)).to(device) for k, width in (("u", t.f), ("v", t.d)))
            out.append(lowrank.Adapter(u, v, self.config.scale))
        return tuple(out)


def _with_blocks(target: int, points: Sequence[Point], blocks: Mapping[str, Block], hits: Hits) -> Tensor:
    """(h, T, d) the output of a target module with the block of each row's point added."""
    chosen = [blocks[points[i].block][target] for i in hits.rows]
    added = [a(x) for a, x in zip(chosen, hits.act)]
    return hits.out + torch.stack(added).to(hits.out.dtype)
