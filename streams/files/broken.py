"""Pictures that cannot be decoded: with `--missing-images skip` their records are left out, as those of absent pictures are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from streams.base import BadStream, Skipped
from streams.files.entry import EntryData, EntryQuestion, FactEntry
from streams.files.pictures import AnyPicture
from testbed.core.events import BadPicture, content_id

_THREADS, _SHOWN = 4, 10
REASON = "its picture is broken"


class BrokenPictures:
    """What is wrong with each picture, found by decoding it once.

    problems: by the name of each broken picture why it cannot be decoded.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self._tried: set[str] = set()

    def find(self, pictures: Iterable[AnyPicture | None]) -> None:
        """Decode those that were not tried before, in threads."""
        new = {p.name: p for p in pictures if p is not None and p.name not in self._tried}
        self._tried |= new.keys()
        with ThreadPoolExecutor(_THREADS) as pool:
            found = zip(new, pool.map(_problem, new.values()), strict=True)
            self.problems |= {name: problem for name, problem in found if problem}

    def whole(self, questions: Iterable[EntryQuestion]) -> tuple[EntryQuestion, ...]:
        """The questions without those about a broken picture."""
        asked = tuple(questions)
        self.find(q.image for q in asked)
        return tuple(q for q in asked if not self._has(q.image))

    def without(self, data: EntryData) -> EntryData:
        """The entries whose pictures are whole, each with the questions whose pictures are. Raises `BadStream` where none is left."""
        self.find(p for e in data.entries for p in (e.image, *(q.image for q in e.questions)))
        if not self.problems:
            return data
        kept = [replace(e, questions=self.whole(e.questions)) for e in data.entries if not self._has(e.image)]
        if not kept:
            raise BadStream(f"{data.origin}: the picture of every record is broken ({next(iter(self.problems.values()))})")
        lost = tuple(Skipped(f"{e.source}, picture {_name(e)}", REASON) for e in data.entries if self._has(e.image))
        before, after = (sum(len(e.questions) for e in entries if not self._has(e.image)) for entries in (data.entries, kept))
        passed = Counter(data.notes) + Counter({"a question is not asked: its picture is broken": before - after})
        return replace(
            data,
            origin=data.origin + (f", {len(lost):,} of them left out for broken pictures" if lost else ""),
            entries=tuple(kept),
            skipped=(*data.skipped, *lost),
            digest=content_id(data.digest, sorted(self.problems)),
            notes=passed,
        )

    def notes(self) -> list[str]:
        """A line that names the broken pictures, the first ten of many; nothing where none is broken."""
        if not self.problems:
            return []
        more = f", ... and {len(self.problems) - _SHOWN:,} more" if len(self.problems) > _SHOWN else ""
        return [f"broken pictures, left out: {len(self.problems):,} ({', '.join(sorted(self.problems)[:_SHOWN])}{more})"]

    def _has(self, picture: AnyPicture | None) -> bool:
        return picture is not None and picture.name in self.problems


def _name(entry: FactEntry) -> str:
    return entry.image.name if entry.image is not None else ""


def _problem(picture: AnyPicture) -> str | None:
    """Why a picture cannot be decoded."""
    try:
        picture.load()
    except BadPicture as e:
        return str(e)
    return None
