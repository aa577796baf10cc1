"""Runs of the loop on a plain stream, with an editor that nudges one weight."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.schema import Record
from testbed.editors.base import EditFailed, Editor, EditorConfig, Traits
from testbed.experiment import schedule
from testbed.experiment.answering import answer_base
from testbed.experiment.loop import Context, run_editor
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.storage.run_folder import EditorFolder
from tests.helpers.models import build as model
from tests.helpers.plain_stream import PlainStream, plain

MEASURED = ("token_hits", "n_tokens", "logprob", "generated", "exact")


class Nudge(Editor):
    """A test double: each edit adds one to a corner of one weight; targets named "bad" fail half way."""

    name = "nudge"
    summary = "test double"
    traits = Traits(weights=True, max_batch=2)
    Config = EditorConfig

    def _prepare(self, pool: TrainPool) -> None:
        self.seen: list[EditBatch] = []
        self.pool = pool
        self.weight = self.handle.parameter(self.handle.down_weight(-1)).detach().clone()

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        self.seen.append(batch)
        for e in batch.events:
            self.weight = self.weight + torch.nn.functional.one_hot(torch.tensor(0), self.weight.shape[1])
            if e.target == "bad":
                raise EditFailed("the loss became nan")
        return {"loss": 0.5}

    def predictor(self) -> Predictor:
        weights = {self.handle.down_weight(-1): self.weight}
        return ModelPredictor(self.handle, around=lambda batch: self.handle.swapped(weights))

    def edited_weights(self) -> dict[str, torch.Tensor]:
        return {self.handle.down_weight(-1): self.weight}

    def _state(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def _load(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]


def context(stream: PlainStream, batch: int = 1, save_every: int = 4) -> Context:
    handle = model("llama")
    planned = schedule.build(stream, stream.all, schedule.ScheduleConfig(batch=batch, budget=200))
    base = answer_base(handle, list(planned.unique_questions.values()), 3)
    return Context("run", 0, {a.question_id: a for a in base}, 3, handle, stream, planned, save_every)


@cache
def shared() -> Context:
    return context(plain(7, per_year=4))


def run(where: Context, editor: Editor, path: Path, **more: Any) -> list[Record]:
    run_editor(where, editor, EditorFolder(path), **more)
    parts = sorted((path / "records").glob("*.parquet"))
    return [Record(**r) for p in parts for r in pq.read_table(p).to_pylist()]
