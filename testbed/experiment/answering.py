# pyright: strict
"""Answering: the questions of a step become answers of the edited or the unedited model, and answers become records."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from testbed.benchmarks.judging import judge
from testbed.core import grading
from testbed.core.events import LOCALITY_SPLITS, Ask, Question
from testbed.core.schema import BaseAnswer, Record
from testbed.editors.base import Editor
from testbed.experiment.schedule import ScheduledQuestion, Step
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor, Response, Score

Progress = Callable[[int, int, float | None], None]
"""Callback with the units done, the units in total, and the success so far where there is one."""
_CHUNK = 512
"""Questions to the unedited model between two progress reports."""


def no_progress(*_: Any) -> None:
    """No-op progress callback."""


@dataclass(frozen=True)
class AnswerContext:
    """The run's part in an answer: its id and seed, the unedited model's answers by question id, and the longest generation."""

    run: str
    seed: int
    base: Mapping[str, BaseAnswer]
    max_new_tokens: int

    def reference(self, question: Question) -> str | None:
        """The answer to score: for locality the generation of the unedited model, else the answer of the question."""
        return (self.base[question.id].generated or None) if question.split in LOCALITY_SPLITS else question.answer

    def golds(self, question: Question) -> tuple[str, ...]:
        """The answers that count as right."""
        return (self.base[question.id].generated or "",) if question.split in LOCALITY_SPLITS else question.golds

    def truth(self, scheduled: ScheduledQuestion) -> str | None:
        """The truth for an editor with `Traits.told_truth`: the right answer of a question about an edit, else None."""
        question, edit = scheduled.plan.question, scheduled.plan.edit
        if edit is None:
            return None
        return (edit.event.target or None) if question.split == "stale" else self.reference(question)


@dataclass(frozen=True)
class Answer:
    """The measured fields of a record, under the names of `Record` and `BaseAnswer`."""

    generated: str | None
    exact: bool | None
    token_hits: int | None
    n_tokens: int | None
    logprob: float | None
    extras: str = "{}"

    @staticmethod
    def of(response: Response, golds: Sequence[str], split: str = "") -> Answer:
        """Grade a response. Its extras are those of the editor and, for locality splits, the likeliest first tokens."""
        first = {"first_ids": response.first_ids} if split in LOCALITY_SPLITS and response.first_ids else {}
        exact = grading.exact(response.generated, golds)
        return Answer(response.generated, exact, *_counts(response.score), json.dumps(response.extras | first, sort_keys=True))

    @staticmethod
    def known(base: BaseAnswer) -> Answer:
        """The stored answer of the unedited model."""
        return Answer(base.generated, base.exact, base.token_hits, base.n_tokens, base.logprob, base.extras)


def _counts(score: Score | None) -> tuple[int | None, int | None, float | None]:
    """Token hits, number of tokens and summed log-probability (nats)."""
    return (int(score.hits.sum()), len(score.hits), float(score.logprobs.sum())) if score is not None else (None, None, None)


def ask_step(context: AnswerContext, editor: Editor, step: Step) -> list[Record]:
    """The records of all questions after a step, in the order of the schedule."""
    predictor = editor.predictor()
    start = time.perf_counter()
    questions = [q.plan.question for q in step.questions]
    if predictor.fingerprint == "base":
        answers = [Answer.known(context.base[q.id]) for q in questions]
    else:
        truths = [context.truth(q) if editor.traits.told_truth else None for q in step.questions]
        answers = answer_questions(context, predictor, questions, truths)
    seconds = (time.perf_counter() - start) / max(1, len(questions))
    return [_record(context, editor.name, step, q, a, seconds) for q, a in zip(step.questions, answers)]


def answer_questions(
    context: AnswerContext, predictor: Predictor, questions: Sequence[Question], truths: Sequence[str | None]
) -> list[Answer]:
    """Answers in the order of the questions; a question that several panels ask is asked once.

    The same prompt under two splits is two questions, because each split has its own reference.
    truths: the right answer to each question for an editor with `Traits.told_truth`, else None.
    """
    keys = [(q.id, truth) for q, truth in zip(questions, truths)]
    once = dict(zip(keys, questions))
    unique = list(once.values())
    texts, choices, prompts = _by_scoring(unique)
    asks = [_ask(unique[i], [*once][i][1]) for i in prompts]
    found = dict(zip(texts, text_answers(predictor, [unique[i] for i in texts])))
    found |= zip(choices, _judged_answers(predictor, [unique[i] for i in choices], context.max_new_tokens))
    responses = predictor.respond(asks, [context.reference(unique[i]) for i in prompts], context.max_new_tokens)
    found |= {i: Answer.of(r, context.golds(unique[i]), unique[i].split) for i, r in zip(prompts, responses)}
    by_key = {key: found[i] for i, key in enumerate(once)}
    return [by_key[k] for k in keys]


def _by_scoring(questions: Sequence[Question]) -> tuple[list[int], list[int], list[int]]:
    """Indices of running text, of questions with a scoring of their own, and of questions answered by generation."""
    texts = [i for i, q in enumerate(questions) if q.split == "text"]
    judged_apart = [i for i, q in enumerate(questions) if q.scoring != "generate"]
    prompts = [i for i, q in enumerate(questions) if q.split != "text" and q.scoring == "generate"]
    return texts, judged_apart, prompts


def _ask(question: Question, truth: str | None) -> Ask:
    """The prompt, with the truth and, unless it concerns locality, the id of the edit for an editor with `Traits.told_truth`."""
    own = question.event_id if truth is not None and question.split not in LOCALITY_SPLITS else None
    return replace(question.ask(), truth=truth, event_id=own)


def text_answers(predictor: Predictor, questions: Sequence[Question]) -> list[Answer]:
    """Summed log-probabilities (nats) of running text; there is no generation and no hit."""
    return [Answer(None, None, None, len(p), float(p.sum())) for p in predictor.text_logprobs([q.prompt for q in questions])]


def _judged_answers(predictor: Predictor, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
    """Answers to questions with a scoring of their own (`testbed.benchmarks.judging`)."""
    verdicts = judge(predictor, questions, max_new_tokens)
    return [Answer(v.generated, v.right, *_counts(v.score), json.dumps(v.extras, sort_keys=True)) for v in verdicts]


def answer_base(
    handle: ModelHandle, questions: Sequence[Question], max_new_tokens: int, progress: Progress = no_progress
) -> list[BaseAnswer]:
    """The unedited model's answers, in the order of the questions: the reference of locality and of all drops.

    For locality the model scores its own generation, for other questions the right answer.
    """
    predictor = ModelPredictor(handle)
    texts, choices, prompts = _by_scoring(questions)
    found = {i: _base(questions[i], None, a) for i, a in zip(texts, text_answers(predictor, [questions[i] for i in texts]))}
    verdicts = _judged_answers(predictor, [questions[i] for i in choices], max_new_tokens)
    found |= {i: _base(questions[i], questions[i].answer, a) for i, a in zip(choices, verdicts)}
    for start in range(0, len(prompts), _CHUNK):
        part = prompts[start : start + _CHUNK]
        found |= zip(part, _base_generations(predictor, [questions[i] for i in part], max_new_tokens))
        progress(len(found), len(questions), None)
    return [found[i] for i in range(len(questions))]


def _base_generations(predictor: Predictor, questions: Sequence[Question], max_new_tokens: int) -> list[BaseAnswer]:
    responses = predictor.respond([q.ask() for q in questions], [q.answer for q in questions], max_new_tokens)
    local = [i for i, q in enumerate(questions) if q.split in LOCALITY_SPLITS]
    said = [i for i in local if responses[i].generated]
    scores = dict(zip(said, predictor.score([questions[i].ask() for i in said], [responses[i].generated for i in said])))
    for i in local:
        responses[i] = replace(responses[i], score=scores.get(i))
    references = [r.generated if q.split in LOCALITY_SPLITS else q.answer for q, r in zip(questions, responses)]
    golds = [(r.generated,) if q.split in LOCALITY_SPLITS else q.golds for q, r in zip(questions, responses)]
    return [_base(q, a, Answer.of(r, g, q.split)) for q, a, r, g in zip(questions, references, responses, golds)]


def _base(question: Question, reference: str | None, answer: Answer) -> BaseAnswer:
    return BaseAnswer(question_id=question.id, answer=reference, **vars(answer))


def _record(context: AnswerContext, editor: str, step: Step, scheduled: ScheduledQuestion, answer: Answer, seconds: float) -> Record:
    question, edit = scheduled.plan.question, scheduled.plan.edit
    event = edit.event if edit else None
    return Record(
        run=context.run,
        editor=editor,
        seed=context.seed,
        edit_id=event.id if event else None,
        edit_step=edit.step if edit else None,
        edit_time=event.time if event else None,
        probe_step=step.checkpoint.step,
        probe_time=step.checkpoint.time,
        probe=scheduled.probe,
        probe_version=scheduled.version,
        split=question.split,
        topic=question.topic or (event.relation or "" if event else ""),
        question_id=question.id,
        answer=context.reference(question),
        target=event.target if event else None,
        base_answer=context.base[question.id].generated or "",
        panel=scheduled.plan.panel,
        incl_prob=scheduled.plan.incl_prob,
        seconds=seconds,
        **vars(answer),
    )
