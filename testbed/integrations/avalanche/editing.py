"""An editor as an Avalanche strategy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates.base import BaseTemplate
from avalanche.training.utils import trigger_plugins
from torch import Tensor, nn

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent, Question
from testbed.core.registry import EDITORS
from testbed.core.schema import EditReport
from testbed.editors.base import BadEditor, Editor
from testbed.experiment.answering import Answer
from testbed.experiment.memory import peak_bytes, reset_peak
from testbed.integrations.avalanche.benchmark import EditExperience, EvalItem
from testbed.integrations.avalanche.store import RunRecorder
from testbed.model import loading
from testbed.model.handle import ModelHandle

ScoringMode = Literal["gen", "tf_exact"]
"""An answer is right when a free generation equals it, or when every token is right under teacher forcing."""
_CHUNK = 256
"""Questions in one iteration of an evaluation."""


class EditorStrategy(BaseTemplate):
    """`train` makes edits, `eval` asks questions; plug-ins, metrics and loggers are called as by Avalanche's own strategies.

    In a minibatch `mb_y` is 1 for every question and `mb_output` is 1 where the answer is right, so Avalanche's own
    metrics (accuracy, forgetting, backward and forward transfer) work for edits; `loss` is the mean negative
    log-probability (nats per token). Answers are computed when something reads them, so training with metrics costs
    one generation for each edit and training without metrics costs none. `strategy.model` is an empty module, because
    the answers come from the editor's predictor.

    Args:
        editor: a name of --list, or an editor that is not bound to a model yet.
        model: a value of `--model`, or a loaded model, preferably that of the benchmark.
        pool: the train pool, from which the editor may learn (`benchmark.pool`).
        batch: edits in one `apply` call.
        reading: the scoring mode, `gen` or `tf_exact`.
    """

    PLUGIN_CLASS = SupervisedPlugin
    eval_every = 0
    """The forward-transfer metric reads this schedule of evaluations; the caller evaluates here."""

    def __init__(
        self,
        *,
        editor: str | Editor,
        model: str | ModelHandle = "tiny",
        pool: TrainPool = TrainPool(),  # noqa: B008  (frozen)
        batch: int = 1,
        reading: ScoringMode = "gen",
        plugins: Sequence[Any] = (),
        evaluator: Any = default_evaluator,
    ) -> None:
        handle = loading.load(model) if isinstance(model, str) else model
        self.evaluator: Any = evaluator() if callable(evaluator) else evaluator
        self.clock = Clock()
        every: list[Any] = [*plugins, self.evaluator, self.clock]  # the clock is the last, because the others read it before it ticks
        super().__init__(model=nn.Module(), device=handle.device, plugins=every)
        self.editor: Editor = EDITORS.get(editor)() if isinstance(editor, str) else editor
        limit = self.editor.traits.max_batch
        if limit is not None and batch > limit:
            raise BadEditor(f"{self.editor.name} takes at most {limit} edits at once, got batch={batch}")
        reset_peak(handle.device)
        self.editor.prepare(handle, pool)
        self.handle, self.batch, self.reading = handle, batch, reading
        self.applied = 0
        self.recorder = RunRecorder(self.editor, handle)
        self.dataloader: list[Any] = []
        self._show([])

    def train(self, experiences: Any, eval_streams: Any = (), **kwargs: Any) -> dict[str, Any]:
        """Make the edits of one or several experiences; returns the last value of each metric.

        `eval_streams` is empty by default, whereas Avalanche's strategies evaluate on the experience just trained.
        """
        super().train(experiences, list(eval_streams), **kwargs)
        return self.evaluator.get_last_metrics()

    @torch.no_grad()
    def eval(self, experiences: Any, **kwargs: Any) -> dict[str, Any]:
        """Ask the questions of one or several experiences; returns the last value of each metric."""
        super().eval(experiences, **kwargs)
        return self.evaluator.get_last_metrics()

    def _train_exp(self, experience: EditExperience, eval_streams: Any, **kwargs: Any) -> None:
        view = experience.train()
        self.dataloader = [view.edits[i : i + self.batch] for i in range(0, len(view.edits), self.batch)]
        reports = []
        trigger_plugins(self, "before_training_epoch", **kwargs)
        for edits in self.dataloader:
            with torch.enable_grad():
                reports.append(self._apply(edits, view.paraphrases))
            live = [e for e in edits if e.kind != "retire"]
            self._show([EvalItem(Question("edit", e.prompt, e.target, e.id, e.image), e.target, (e.target,)) for e in live])
            if self._items:
                trigger_plugins(self, "before_training_iteration", **kwargs)
                trigger_plugins(self, "after_training_iteration", **kwargs)
        trigger_plugins(self, "after_training_epoch", **kwargs)
        self.recorder.add_edits(view.edits, _joined(reports))

    def _apply(self, edits: Sequence[EditEvent], paraphrases: Any) -> EditReport:
        self.applied += 1
        start = time.perf_counter()
        report = self.editor.apply(EditBatch(tuple(edits), self.applied, {e.id: paraphrases[e.id] for e in edits}))
        return replace(report, seconds=time.perf_counter() - start, peak_bytes=peak_bytes(self.handle.device))

    def _eval_exp(self, **kwargs: Any) -> None:
        questions = self.experience.eval().questions  # type: ignore[union-attr]
        self.dataloader = [questions[i : i + _CHUNK] for i in range(0, len(questions), _CHUNK)]
        for items in self.dataloader:
            self._show(items)
            trigger_plugins(self, "before_eval_iteration", **kwargs)
            self.recorder.add_answers(items, self.answers)
            trigger_plugins(self, "after_eval_iteration", **kwargs)

    def _show(self, items: Sequence[EvalItem]) -> None:
        self._items, self._answers = list(items), None

    @property
    def answers(self) -> list[Answer]:
        """The edited model's answers to the current minibatch, computed at the first use."""
        if self._answers is None:
            told = self.editor.traits.told_truth
            asks = [replace(x.question.ask(), truth=x.reference if told else None) for x in self._items]
            responses = self.editor.predictor().respond(asks, [x.reference for x in self._items])
            self._answers = [Answer.of(r, x.golds) for r, x in zip(responses, self._items)]
        return self._answers

    @property
    def mb_x(self) -> list[EvalItem]:
        return self._items

    @property
    def mb_y(self) -> Tensor:
        """(B,) int64 ones."""
        return torch.ones(len(self._items), dtype=torch.long)

    @property
    def mb_task_id(self) -> Tensor:
        """(B,) int64 zeros."""
        return torch.zeros(len(self._items), dtype=torch.long)

    @property
    def mb_output(self) -> Tensor:
        """(B,) int64, 1 where the answer is right."""
        right = [a.exact if self.reading == "gen" else a.token_hits == a.n_tokens for a in self.answers]
        return torch.tensor(right, dtype=torch.long)

    @property
    def mbatch(self) -> tuple[Any, ...]:
        return self.mb_x, self.mb_y, self.mb_task_id

    @property
    def loss(self) -> Tensor:
        """(), the mean over answers of the mean negative log-probability (nats per token)."""
        return torch.tensor([-(a.logprob or 0.0) / (a.n_tokens or 1) for a in self.answers]).mean()

    def save(self, folder: Path | str) -> None:
        """Write state, reports and answers into a run folder, for `resume` and for `python -m analysis`."""
        state = {"strategy": {"applied": self.applied, "clock": vars(self.clock) | {}}, **self.editor.state_dict()}
        self.recorder.save(Path(folder), state)

    def resume(self, folder: Path | str) -> int:
        """Continue from a saved folder; returns the number of experiences that were trained.

        The editor's state is restored bit for bit. The state of Avalanche's metrics is not stored, so they start anew.
        """
        done, state = self.recorder.resume(Path(folder))
        own: Any = state.pop("strategy")
        self.applied = own["applied"]
        vars(self.clock).update(own["clock"])
        self.editor.load_state_dict(state)
        return done


def _joined(reports: Sequence[EditReport]) -> EditReport:
    return replace(
        reports[-1],
        event_ids=tuple(i for r in reports for i in r.event_ids),
        seconds=sum(r.seconds for r in reports),
        peak_bytes=max(r.peak_bytes for r in reports),
        failed={k: v for r in reports for k, v in r.failed.items()},
        skipped={k: v for r in reports for k, v in r.skipped.items()},
    )
