"""UltraEdit (Gu et al., TMLR 2026, arXiv 2505.14679): one forward and backward of the batch, one ridge solve a matrix.

At each chosen linear map, let h be the input and g the gradient of the loss at the output, at the positions that predict the
answers' tokens. With running means and deviations of both over every batch so far (lifelong normalisation) and the normalised
values written with a hat, each position asks for

    v_i = -lr |h^_i|^2 g^_i ,        Delta W^T = (H^T H + ridge I)^-1 H^T V = H^T (H H^T + ridge I)^-1 V ,

with the raw h as the rows of H. The second form is solved, in the number of positions. The state holds the rows (h, g) alone:
statistics and weights follow from them, so that an edit whose rows are removed leaves what the others give.

StableEdit (MINE-USTC/StableEdit) is the same with a larger ridge (alpha 10) and statistics that are warmed up (`preheat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, EditEvent
from testbed.core.ranges import NonNegativeInt, PositiveFloat
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters.lowrank import AdaptedSuffix, find_target_modules
from testbed.editors.base import EditFailed, EditorConfig, require_finite_loss
from testbed.editors.hyperparameters import LLAMA_3_8B, MISTRAL_7B, SHALLOW, PublishedRow, Table, Values
from testbed.editors.row_editor import RowEditor, Rows
from testbed.editors.traits import Traits
from testbed.editors.work import Work, down_shape
from testbed.model.handle import ModelHandle

PUBLISHED: Table = {
    LLAMA_3_8B: PublishedRow(
        "UltraEdit, section 4.1: gate projections of layers 11-15 and up projections of layers 18-24",
        {"modules": r"layers\.(1[1-5]\.mlp\.gate|(1[89]|2[0-4])\.mlp\.up)_proj$"},
    ),
    MISTRAL_7B: PublishedRow(
        "UltraEdit, section 4.1: down projections of layers 29 and 30", {"modules": r"layers\.(29|30)\.mlp\.down_proj$"}
    ),
}
_TOKENS = 4.0
"""Answer tokens of an edit, for the estimate of its cost."""


def derived(handle: ModelHandle) -> Values:
    """For a model without published values: the down-projections from two thirds of its depth to 14/15.

    Both they and lr, 3e-4 at an input 1,536 wide, were chosen on ten development edits of CounterFact for SmolLM2, where the
    published lr learns nothing; |h^|^2 grows with the width. Shallow models take larger steps.
    """
    depth = handle.n_layers
    first = min(depth - 1, round(depth * 2 / 3))
    layers = range(first, max(first + 1, round(depth * 14 / 15)))
    names = [handle.down_weight(i).removesuffix(".weight").replace(".", r"\.") for i in layers]
    return {"modules": f"^({'|'.join(names)})$", "lr": 1e-2 if depth < SHALLOW else 3e-4 * 1_536 / down_shape(handle, first)[1]}


@dataclass(frozen=True)
class UltraEditConfig(EditorConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps that are edited."""
    lr: PositiveFloat | None = None
    """lr: size of the change that a position asks for (paper: 1e-6)."""
    ridge: PositiveFloat = 1.0
    """alpha, added to the diagonal (paper: 1; StableEdit: 10)."""
    lifelong: bool = True
    """Statistics over all batches so far; false starts them anew for each batch, as the common port of the method does."""
    preheat: NonNegativeInt = 0
    """Questions of the train pool whose rows enter the statistics before the first edit (StableEdit; paper: 0)."""


class RunningStatistics:
    """Mean and standard deviation (n - 1) of the rows seen so far, exact whatever their parts (Chan et al. 1979), float64."""

    def __init__(self, n: int = 0, mean: Tensor | None = None, squares: Tensor | None = None) -> None:
        self.n = n
        self.mean = torch.zeros(()) if mean is None else mean
        self.squares = torch.zeros(()) if squares is None else squares

    def with_rows(self, rows: Tensor) -> RunningStatistics:
        """The statistics of these rows too."""
        if not len(rows):
            return self
        rows, n = rows.double(), len(rows)
        mean, total = rows.mean(0), self.n + n
        squares, shift = (rows - mean).square().sum(0), mean - self.mean.to(rows.device)
        squares = self.squares.to(rows.device) + squares + shift.square() * (self.n * n / total)
        return RunningStatistics(total, self.mean.to(rows.device) + shift * (n / total), squares)

    def normalised(self, rows: Tensor) -> Tensor:
        """Float64; a feature that never varied is 0. Raises `EditFailed` for fewer than two rows, whose deviation is undefined."""
        if self.n < 2:
            raise EditFailed("the statistics stand on a single answer token, whose deviation is undefined: use a larger batch or preheat")
        deviation = (self.squares / (self.n - 1)).sqrt()
        return torch.where(deviation > 0, (rows.double() - self.mean) / deviation.clamp(min=1e-30), 0.0)


Statistics = tuple[tuple[RunningStatistics, RunningStatistics], ...]
"""Of h and of g, by target."""


def change(h: Tensor, v: Tensor, ridge: float) -> Tensor:
    """(d, f) float64 the change of the weight for rows h (n, f) that ask for v (n, d): V^T (H H^T + ridge I)^-1 H."""
    h = h.double()
    gram = h @ h.T + ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
    return v.T @ torch.linalg.solve(gram, h)


@EDITORS.register("ultraedit")
class UltraEdit(RowEditor):
    """Rows (h, g) of every batch at the target modules, and the weights that follow from them."""

    summary = "one backward a batch, lifelong normalisation and a ridge solve (UltraEdit, StableEdit)"
    traits = Traits(weights=True, undo=True, uses=frozenset({"train_pool"}))
    Config = UltraEditConfig
    published, defaults = PUBLISHED, {"lr": 1e-6}

    def _derived(self) -> Values:
        return derived(self.handle)

    def work(self, batch: int) -> Work:
        """One forward and backward from the first target's layer up, and a solve in the number of answer tokens."""
        targets = find_target_modules(self.handle, self.hyper.modules)
        layers = float(self.handle.n_layers - targets[0].layer)
        return Work(forwards=2.0, steps=1.0, layers=layers, state_per_edit=_TOKENS * sum(t.f + t.d for t in targets))

    def _prepare(self, pool: TrainPool) -> None:
        self.warm: Rows | None = None
        self._start(find_target_modules(self.handle, self.hyper.modules))
        questions = [q for q in pool.questions if q.answer][: self.config.preheat]
        if questions:
            self.warm = self._gather([q.ask() for q in questions], [q.answer or "" for q in questions], ["pool"] * len(questions))
            self._rebuild()

    def _rows_of(self, events: Sequence[EditEvent]) -> Rows:
        return self._gather([e.ask() for e in events], [e.target for e in events], [e.id for e in events])

    @timed("backward")
    def _gather(self, asks: Sequence[Ask], answers: Sequence[str], owners: Sequence[str]) -> Rows:
        """h and g of the answers' positions under the weights as they are; the loss is the sum over tokens, so that no row of
        one edit depends on another edit."""
        with self.handle.swapped(self.edited_weights()):
            suffix = AdaptedSuffix(self.handle, self.targets, asks, answers)
            read = suffix.batch.before_answer
            acts: list[Tensor] = []
            probes = [torch.zeros(*read.shape, t.d, device=b.device, requires_grad=True) for t, b in zip(self.targets, self.bases)]

            def add(act: Tensor, probe: Tensor) -> Tensor:
                acts.append(act.detach())
                return probe

            losses = suffix.losses([lambda act, p=p: add(act, p) for p in probes])
            require_finite_loss(losses, self.hyper.lr)
            counts = suffix.batch.answer.sum(1).to(losses)
            gradients = torch.autograd.grad((losses * counts).sum(), probes)
        h = tuple(a[read.to(a.device)].float() for a in acts)
        g = tuple(x[read.to(x.device)].float() for x in gradients)
        return Rows(h, g, tuple(owners[int(i)] for i in read.nonzero()[:, 0]))

    def _changes_of(self, rows: Rows) -> list[Tensor]:
        """The ridge solve of a batch's rows, which the statistics count first."""
        self.statistics = self._counted(self.statistics if self.config.lifelong else self._unseen(), rows)
        changed = []
        for (of_h, of_g), h, g in zip(self.statistics, rows.h, rows.g):
            size = of_h.normalised(h).square().sum(1, keepdim=True)
            changed.append(change(h, -self.hyper.lr * size * of_g.normalised(g), self.config.ridge))
        return changed

    def _restart(self) -> None:
        self.statistics = self._unseen() if self.warm is None else self._counted(self._unseen(), self.warm)

    def _unseen(self) -> Statistics:
        return tuple((RunningStatistics(), RunningStatistics()) for _ in self.targets)

    def _counted(self, statistics: Statistics, rows: Rows) -> Statistics:
        return tuple((of_h.with_rows(h), of_g.with_rows(g)) for (of_h, of_g), h, g in zip(statistics, rows.h, rows.g))
