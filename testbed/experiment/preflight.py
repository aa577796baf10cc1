"""Everything that a run would stumble over hours later, looked at before the first edit: every picture of the
schedule is decoded once, every target and answer is spelled once, and every prompt is short enough for the model."""

from __future__ import annotations

from collections.abc import Iterable

from testbed.core.events import Ask, BadPicture, Question
from testbed.experiment.schedule import Schedule
from testbed.model.encoding import answer_ids, prompt_inputs
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.image_loading import Decoded, decoded

_SHOWN = 10


def check(schedule: Schedule, handle: ModelHandle) -> None:
    """Raises `BadPicture` or `BadModel` that names all (the first ten of) what cannot be used."""
    events = [a.event for s in schedule.steps for a in s.edits]
    questions = schedule.unique_questions.values()
    pictures = {x.image.key: x.image for x in (*events, *questions) if x.image is not None}
    if pictures and not handle.reads_pictures:
        raise BadModel(f"{handle.name} reads no pictures and {len(pictures)} are asked about: use an image-text model, or a text stream")
    _raise(BadPicture, filter(None, (_picture_problem(handle, found) for found in decoded(pictures.values()))))
    spelled = [(Ask(e.prompt), e.target) for e in events if e.target]
    spelled += [(Ask(q.prompt), a) for q in questions for a in q.choices or filter(None, [q.answer])]
    _raise(BadModel, filter(None, (_spelling_problem(handle, ask, answer) for ask, answer in spelled)))
    _raise(BadModel, filter(None, (_length_problem(handle, q) for q in questions)))


def _raise(error: type[Exception], problems: Iterable[str]) -> None:
    listed = list(problems)
    if listed:
        more = [f"... and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
        raise error("\n".join([*listed[:_SHOWN], *more]))


def _picture_problem(handle: ModelHandle, picture: Decoded | BadPicture) -> str | None:
    """Why a picture cannot be decoded; one that can stays in the handle's cache as tensors."""
    if isinstance(picture, BadPicture):
        return str(picture)
    prompt_inputs(handle, Ask("", picture))
    return None


def _spelling_problem(handle: ModelHandle, ask: Ask, answer: str) -> str | None:
    try:
        answer_ids(handle, ask, answer)
    except BadModel as e:
        return str(e)
    return None


def _length_problem(handle: ModelHandle, question: Question) -> str | None:
    """Running text is cut to the model's window; a prompt that does not fit with its answer cannot be asked."""
    if question.split == "text" or question.scoring == "text":
        return None
    ask = question.ask()
    answers = question.choices or tuple(filter(None, [question.answer]))
    n = prompt_inputs(handle, ask)["input_ids"].shape[1] + max((len(answer_ids(handle, ask, a)) for a in answers), default=1)
    if n <= handle.window:
        return None
    where = question.topic or question.split
    long = f"a question ({where}) takes {n} tokens, {handle.name} reads {handle.window}"
    return f"{long}: {question.prompt[:60]!r}; show fewer examples or leave it out"
