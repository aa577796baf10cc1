"""Everything that a run would stumble over hours later, looked at before the first edit: every picture of the
schedule is decoded once, every target and answer is spelled once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from testbed.encode import Ask, answer_ids
from testbed.events import BadPicture, Picture
from testbed.models import BadModel, ModelHandle
from testbed.schedule import Schedule

_SHOWN = 10


def check(schedule: Schedule, handle: ModelHandle) -> None:
    """Raises `BadPicture` or `BadModel` that names all (the first ten of) what cannot be used."""
    events = [a.event for s in schedule.steps for a in s.edits]
    questions = schedule.unique_questions.values()
    pictures = {p.key: p for p in (x.image for x in (*events, *questions)) if p is not None}
    with ThreadPoolExecutor(4) as pool:
        _raise(BadPicture, filter(None, pool.map(_picture_problem, pictures.values())))
    if pictures and not handle.reads_pictures:
        raise BadModel(f"{handle.name} reads no pictures and {len(pictures)} are asked about: use an image-text model, or a text stream")
    spelled = [(Ask(e.prompt), e.target) for e in events if e.target] + [(Ask(q.prompt), q.answer) for q in questions if q.answer]
    _raise(BadModel, filter(None, (_spelling_problem(handle, ask, answer) for ask, answer in spelled)))


def _raise(error: type[Exception], problems: Iterable[str]) -> None:
    listed = list(problems)
    if listed:
        more = [f"... and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
        raise error("\n".join([*listed[:_SHOWN], *more]))


def _picture_problem(picture: Picture) -> str | None:
    try:
        picture.load()
    except BadPicture as e:
        return str(e)
    return None


def _spelling_problem(handle: ModelHandle, ask: Ask, answer: str) -> str | None:
    try:
        answer_ids(handle, ask, answer)
    except BadModel as e:
        return str(e)
    return None
