"""Checks before the first edit, for mistakes that would otherwise end a run hours later: every picture of the schedule is
decoded once, every target and answer is tokenized once, and every prompt must fit into the window of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from testbed.core.events import Ask, BadPicture, EditEvent, Question
from testbed.core.grading import exact, natural_stop
from testbed.editors.base import Editor
from testbed.experiment.schedule import Schedule
from testbed.model.encoding import answer_ids, prompt_inputs
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.image_loading import Decoded, decoded

_SHOWN = 10
_HOW_TO_SKIP = "--missing-images skip leaves out the records of a stream whose pictures are broken, and counts them"
LONG_TARGET = 50
"""Tokens above which a target is long; the answers of zsRE, CounterFact and OKEDIT have fewer than 20."""
_CHOICES = ("sum", "norm", "mean", "text")
"""Scorings of questions that are answered without a generation."""


def check(schedule: Schedule, handle: ModelHandle) -> None:
    """Raise `BadPicture` or `BadModel` with every problem (the first ten of them)."""
    events = [a.event for s in schedule.steps for a in s.edits]
    questions = schedule.unique_questions.values()
    pictures = {x.image.key: x.image for x in (*events, *questions) if x.image is not None}
    if pictures and not handle.reads_pictures:
        raise BadModel(f"{handle.name} reads no pictures and {len(pictures)} are asked about: use an image-text model, or a text stream")
    _raise(BadPicture, (_picture_problem(handle, found) for found in decoded(pictures.values())), _HOW_TO_SKIP)
    answers = [(e.prompt, e.target) for e in events if e.target]
    answers += [(q.prompt, a) for q in questions for a in q.choices or filter(None, [q.answer])]
    _raise(BadModel, (_answer_problem(handle, prompt, answer) for prompt, answer in answers))
    _raise(BadModel, (_length_problem(handle, q) for q in questions))
    _raise(BadModel, (_edit_problem(handle, e) for e in events if e.target))


def new_tokens(schedule: Schedule, handle: ModelHandle, wanted: int) -> int:
    """The longest generation, in tokens, of at most `wanted`, that fits into the window behind every prompt. Call it after `check`."""
    asked = (q.ask() for q in schedule.unique_questions.values() if q.split != "text" and q.scoring not in _CHOICES)
    longest = max((prompt_inputs(handle, ask)["input_ids"].shape[1] for ask in asked), default=0)
    return max(1, min(wanted, handle.window - longest))


def never_right(schedule: Schedule, handle: ModelHandle, max_new_tokens: int) -> list[str]:
    """Notes on questions none of whose right answers free generation can give, with their number: the answer is longer than
    `max_new_tokens`, or has a second line, at which generations are cut. Call it after `check`."""
    reasons: Counter[str] = Counter()
    for q in schedule.unique_questions.values():
        if q.scoring == "generate" and q.answer is not None:
            found = [_out_of_reach(handle, q, answer, max_new_tokens) for answer in q.golds]
            if all(found):
                reasons[str(found[0])] += 1
    return [f"{n:,} questions can never be right by free generation: the answer {reason}" for reason, n in sorted(reasons.items())]


def long_targets(events: Sequence[EditEvent], handle: ModelHandle, editors: Mapping[str, type[Editor]]) -> list[str]:
    """A note on targets of more than `LONG_TARGET` tokens where an edit of some editors has room for short ones. Call it after `check`."""
    names = [name for name, cls in editors.items() if cls.traits.short_targets]
    long = [e for e in events if names and len(e.target) > LONG_TARGET]  # a token has a character or more
    sizes = [n for e in long if (n := len(answer_ids(handle, e.ask(), e.target))) > LONG_TARGET]
    if not sizes:
        return []
    those = f"{len(sizes):,} of {len(events):,} targets have more than {LONG_TARGET} tokens, the longest {max(sizes):,}"
    why = "an edit has room for a few tokens, and the method has no published form for long targets"
    return [f"{', '.join(names)}: {why}: {those}; expect little of them to be learned (docs/footguns.md)"]


def _out_of_reach(handle: ModelHandle, question: Question, answer: str, max_new_tokens: int) -> str | None:
    """Why free generation cannot give this answer."""
    if not exact(natural_stop(answer), [answer]):
        return "has more than one line"
    try:
        n = len(answer_ids(handle, question.ask(), answer))
    except BadModel:
        return "cannot be written by this tokenizer"
    return f"is longer than {max_new_tokens} tokens (--max-new-tokens)" if n > max_new_tokens else None


def _raise(error: type[Exception], problems: Iterable[str | None], hint: str = "") -> None:
    if listed := [p for p in problems if p is not None]:
        more = [f"... and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
        raise error("\n".join([*listed[:_SHOWN], *more, *filter(None, [hint])]))


def _picture_problem(handle: ModelHandle, picture: Decoded | BadPicture) -> str | None:
    """Why a picture cannot be decoded; the tensors of a decoded one stay in the cache of the handle."""
    if isinstance(picture, BadPicture):
        return str(picture)
    try:
        prompt_inputs(handle, Ask("", picture))
    except BadPicture as e:
        return str(e)
    return None


def _answer_problem(handle: ModelHandle, prompt: str, answer: str) -> str | None:
    """Why an answer cannot be tokenized after its prompt."""
    try:
        answer_ids(handle, Ask(prompt), answer)
    except BadModel as e:
        return str(e)
    return None


def _edit_problem(handle: ModelHandle, event: EditEvent) -> str | None:
    """Why an edit's prompt with its target and the end token does not fit into the window."""
    n = prompt_inputs(handle, event.ask())["input_ids"].shape[1] + len(answer_ids(handle, event.ask(), event.target)) + 1
    if n <= handle.window:
        return None
    return f"an edit takes {n} tokens with its answer, {handle.name} reads {handle.window}: {event.prompt[:60]!r}; leave it out"


def _length_problem(handle: ModelHandle, question: Question) -> str | None:
    """Why a prompt with its answer does not fit into the window; running text always fits, because it is cut to the window."""
    if question.split == "text" or question.scoring == "text":
        return None
    ask = question.ask()
    answers = question.choices or tuple(filter(None, [question.answer]))
    n = prompt_inputs(handle, ask)["input_ids"].shape[1] + max((len(answer_ids(handle, ask, a)) for a in answers), default=1)
    if n <= handle.window:
        return None
    long = f"a question ({question.topic or question.split}) takes {n} tokens, {handle.name} reads {handle.window}"
    return f"{long}: {question.prompt[:60]!r}; show fewer examples or leave it out"
