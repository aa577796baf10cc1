"""Apply, ask, answer, keep. The loop knows no editor, stream or probe by name."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from streams.base import Stream
from testbed.benchmarks.judging import judged
from testbed.core import grading
from testbed.core.events import LOCALITY_SPLITS, Ask, EditBatch, Question
from testbed.core.schema import BaseAnswer, EditReport, Record
from testbed.editors.base import Editor
from testbed.experiment.interrupt import Stop, Stopped
from testbed.experiment.schedule import Asked, Schedule, Step
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor, Response, Score
from testbed.monitors.base import Watch
from testbed.storage.files import Phase
from testbed.storage.run_folder import EditorFolder, Expected, Found

Progress = Callable[[int, int, float | None], None]
"""Called after each step with (edits made, edits in all, share of right answers right after the last edits)."""


def silent(*_: Any) -> None:
    """The progress of nobody looking."""


@dataclass(frozen=True)
class Context:
    """What all editors of a run share."""

    run: str
    seed: int
    handle: ModelHandle
    stream: Stream
    schedule: Schedule
    base: Mapping[str, BaseAnswer]
    max_new_tokens: int = 16
    save_every: int = 50
    say: Callable[[str], None] = silent
    """Gets what an editor has to say of itself (a stand-in, derived defaults), and when memory ran out."""
    stop: Stop = field(default_factory=Stop)
    """Asked after each step whether to end there."""

    @cached_property
    def watch(self) -> Watch:
        """The prompts that monitors look at: the stream's general ones, else those about edits, whatever is asked besides."""
        own, asked = {q.id for q in self.stream.general()}, self.schedule.unique_questions.values()
        return Watch(self.handle, [q for q in asked if q.id in own] or [q for q in asked if q.event_id], self.seed)

    @cached_property
    def expected(self) -> Expected:
        """What the folder of an editor that is done holds."""
        steps = self.schedule.steps
        return Expected([len(s.asked) for s in steps], frozenset(s.moment.step for s in steps if self.watch.due(s.moment)))


def run_editor(context: Context, editor: Editor, folder: EditorFolder, phase: Phase = silent, progress: Progress = silent) -> None:
    """Take one editor through the schedule, from the newest saved step on. Raises `Stopped` where the run is asked to end."""
    phase("resume", 0)
    done, state = folder.resume(context.expected)
    if done == len(context.schedule.steps):
        return
    editor.prepare(context.handle, context.stream.train_pool())
    said = say_new(context, editor, 0)
    if state is not None:
        editor.load_state_dict(state)
    found, saved = Found(), context.schedule.steps[done - 1].moment.edits if done else 0
    total = context.schedule.steps[-1].moment.edits if context.schedule.steps else 0
    for step in context.schedule.steps[done:]:
        n = step.moment.step
        phase("apply", n)
        found.reports.append(apply_step(context, editor, step))
        phase("probe", n)
        answered = ask_step(context, editor, step)
        found.records.extend(answered)
        if context.watch.due(step.moment):
            found.monitors.extend(context.watch.rows(n, editor.predictor(), editor.edited_weights()))
        said = say_new(context, editor, said)
        progress(step.moment.edits, total, success(answered))
        last = n == len(context.schedule.steps)
        if step.moment.edits - saved >= context.save_every or last or context.stop.asked:
            folder.save(n, found, editor.state_dict())
            found, saved = Found(), step.moment.edits
        if context.stop.asked and not last:
            raise Stopped(f"{editor.name}: stopped after step {n} of {len(context.schedule.steps)}")


def say_new(context: Context, editor: Editor, said: int) -> int:
    """Pass on the notes of an editor that were not said yet, and those of the model; how many of the editor's are said now."""
    for note in editor.notes[said:]:
        context.say(f"{editor.name}: {note}")
    for note in context.handle.room.notes:
        context.say(note)
    context.handle.room.notes.clear()
    return len(editor.notes)


def apply_step(context: Context, editor: Editor, step: Step) -> EditReport:
    """One `apply` call, timed."""
    events = tuple(a.event for a in step.edits)
    batch = EditBatch(events, step.moment.step, {e.id: context.stream.paraphrases(e) for e in events})
    start = time.perf_counter()
    report = editor.apply(batch)
    return replace(report, seconds=time.perf_counter() - start, peak_bytes=peak_bytes(context.handle.device))


def ask_step(context: Context, editor: Editor, step: Step) -> list[Record]:
    """All questions after a step, answered by the edited model, as records in the order of the schedule."""
    predictor = editor.predictor()
    start = time.perf_counter()
    questions = [a.plan.question for a in step.asked]
    if predictor.fingerprint == "base":
        answers = [Answer.known(context.base[q.id]) for q in questions]
    else:
        truths = [truth_of(context, a) if editor.traits.told_truth else None for a in step.asked]
        answers = ask_model(context, predictor, questions, truths)
    share = (time.perf_counter() - start) / max(1, len(step.asked))
    return [_record(context, editor, step, asked, answer, share) for asked, answer in zip(step.asked, answers)]


def ask_model(context: Context, predictor: Predictor, questions: Sequence[Question], truths: Sequence[str | None]) -> list[Answer]:
    """Each question once, however many panels ask it; the same prompt under two splits is generated once for each."""
    keys = [(q.id, truth) for q, truth in zip(questions, truths)]
    once = dict(zip(keys, questions))
    texts = [k for k, q in once.items() if q.split == "text"]
    apart = [k for k, q in once.items() if q.scoring != "generate"]
    others = [k for k, q in once.items() if q.split != "text" and q.scoring == "generate"]
    answers = dict(zip(texts, text_answers(predictor, [once[k] for k in texts])))
    answers |= zip(apart, verdicts(predictor, [once[k] for k in apart], context.max_new_tokens))
    asks = [to_ask(once[k], k[1]) for k in others]
    references = [reference(context.base, once[k]) for k in others]
    for k, r in zip(others, predictor.respond(asks, references, context.max_new_tokens)):
        answers[k] = Answer.of(r, golds(context.base, once[k]), once[k].split)
    return [answers[k] for k in keys]


@dataclass(frozen=True)
class Answer:
    """The part of a record that comes from the model."""

    generated: str | None
    exact: bool | None
    token_hits: int | None
    n_tokens: int | None
    logprob: float | None
    extras: str = "{}"

    @staticmethod
    def of(response: Response, right: Sequence[str], split: str = "") -> Answer:
        exact = grading.exact(response.generated, right)
        return Answer(response.generated, exact, *_counts(response.score), extras_of(split, response))

    @staticmethod
    def known(base: BaseAnswer) -> Answer:
        """What the unedited model is known to say."""
        return Answer(base.generated, base.exact, base.token_hits, base.n_tokens, base.logprob, base.extras)


def extras_of(split: str, response: Response) -> str:
    """What a record keeps besides the answer: what the editor adds; of locality questions the likeliest first tokens."""
    first = {"first_ids": response.first_ids} if split in LOCALITY_SPLITS and response.first_ids else {}
    return json.dumps(response.extras | first, sort_keys=True)


def _counts(score: Score | None) -> tuple[int | None, int | None, float | None]:
    if score is None:
        return None, None, None
    return int(score.hits.sum()), len(score.hits), float(score.logprobs.sum())


def text_answers(predictor: Predictor, questions: Sequence[Question]) -> list[Answer]:
    """Log-probabilities of running text; there is nothing to generate and nothing to hit."""
    return [Answer(None, None, None, len(p), float(p.sum())) for p in predictor.text_logprobs([q.prompt for q in questions])]


def verdicts(predictor: Predictor, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
    """Answers to questions that are judged otherwise than by their generation (`testbed.benchmarks.judging`)."""
    found = judged(predictor, questions, max_new_tokens)
    return [Answer(v.generated, v.right, *_counts(v.score), json.dumps(v.extras, sort_keys=True)) for v in found]


def to_ask(question: Question, truth: str | None = None) -> Ask:
    bears = truth is not None and question.split not in LOCALITY_SPLITS
    return Ask(question.prompt, question.image, truth, question.event_id if bears else None)


def reference(base: Mapping[str, BaseAnswer], question: Question) -> str | None:
    """The answer that is scored: for locality what the unedited model said, else the question's own."""
    if question.split in LOCALITY_SPLITS:
        return base[question.id].generated or None
    return question.answer


def golds(base: Mapping[str, BaseAnswer], question: Question) -> tuple[str, ...]:
    """What a generation is compared with."""
    return (base[question.id].generated or "",) if question.split in LOCALITY_SPLITS else question.golds


def truth_of(context: Context, asked: Asked) -> str | None:
    """What the oracle is told: the right answer of anything that has to do with an edit."""
    question, edit = asked.plan.question, asked.plan.edit
    if edit is None:
        return None
    if question.split == "stale":
        return edit.event.target or None
    return reference(context.base, question)


def answer_base(handle: ModelHandle, questions: Sequence[Question], max_new_tokens: int, progress: Progress = silent) -> list[BaseAnswer]:
    """The unedited model on every question of the schedule, once: the reference of locality and of all drops."""
    predictor = ModelPredictor(handle)
    out = {q.id: BaseAnswer(q.id, None, None, None, a.n_tokens, a.logprob, None) for q, a in _texts(predictor, questions)}
    apart = [q for q in questions if q.scoring != "generate"]
    for q, a in zip(apart, verdicts(predictor, apart, max_new_tokens)):
        out[q.id] = BaseAnswer(q.id, q.answer, a.generated, a.token_hits, a.n_tokens, a.logprob, a.exact, a.extras)
    others = [q for q in questions if q.split != "text" and q.scoring == "generate"]
    for at in range(0, len(others), 512):
        part = others[at : at + 512]
        own = predictor.respond([to_ask(q) for q in part], [q.answer for q in part], max_new_tokens)
        again = [i for i, q in enumerate(part) if q.split in LOCALITY_SPLITS and own[i].generated]
        scores = predictor.score([to_ask(part[i]) for i in again], [own[i].generated for i in again])
        rescored = dict(zip(again, scores))
        for i, (q, r) in enumerate(zip(part, own)):
            out[q.id] = _base_answer(q, r, rescored.get(i))
        progress(len(out), len(questions), None)
    return [out[q.id] for q in questions]


def _texts(predictor: Predictor, questions: Sequence[Question]) -> list[tuple[Question, Answer]]:
    texts = [q for q in questions if q.split == "text"]
    return list(zip(texts, text_answers(predictor, texts)))


def _base_answer(question: Question, response: Response, own: Score | None) -> BaseAnswer:
    if question.split in LOCALITY_SPLITS:
        return BaseAnswer(question.id, response.generated, response.generated, *_counts(own), True, extras_of(question.split, response))
    return BaseAnswer(
        question.id,
        question.answer,
        response.generated,
        *_counts(response.score),
        grading.exact(response.generated, question.golds),
    )


def _record(context: Context, editor: Editor, step: Step, asked: Asked, answer: Answer, seconds: float) -> Record:
    q, edit, moment = asked.plan.question, asked.plan.edit, step.moment
    event = edit.event if edit else None
    return Record(
        run=context.run,
        editor=editor.name,
        seed=context.seed,
        edit_id=event.id if event else None,
        edit_step=edit.step if edit else None,
        edit_time=event.time if event else None,
        probe_step=moment.step,
        probe_time=moment.time,
        probe=asked.probe,
        probe_version=asked.version,
        split=q.split,
        topic=q.topic or (event.relation or "" if event else ""),
        question_id=q.id,
        answer=reference(context.base, q),
        target=event.target if event else None,
        base_answer=context.base[q.id].generated or "",
        token_hits=answer.token_hits,
        n_tokens=answer.n_tokens,
        logprob=answer.logprob,
        generated=answer.generated,
        exact=answer.exact,
        panel=asked.plan.panel,
        incl_prob=asked.plan.incl_prob,
        seconds=seconds,
        extras=answer.extras,
    )


def success(records: Sequence[Record]) -> float | None:
    """Share of right generations among a step's questions asked as edited; for the progress bar."""
    now = [r.exact for r in records if r.panel == "immediate" and r.split == "edit"]
    return sum(map(bool, now)) / len(now) if now else None


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: resident set of the process on a CPU, allocated memory on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
