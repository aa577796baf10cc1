"""Facts with real dates: `templama`, `dyknow`, `yago`, `leaders`, their union `dated-facts`, and `leaders-flags`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from streams.base import BadStream, StreamConfig
from streams.data import table
from streams.dated import sources
from streams.dated.states import SourceData, Timeline
from streams.dated.timeline_stream import DatedStream
from streams.files.pictures import FilePicture, list_folder
from streams.files.records import normalize
from testbed.core.registry import STREAMS

FLAG_PROMPTS: dict[str, Any] = {
    "prompt": "Who leads this country?",
    "held_out": ("The leader of the country with this flag is", "Who is in charge of this country?"),
    "train": ("Name the leader of this country.", "Which person leads the country with this flag?"),
}
_FLAG = re.compile(r"[A-Z]{2}\.png", re.ASCII)


for _name, _about in table(__file__, "streams.yaml").items():
    STREAMS.register(_name)(type(_name, (DatedStream,), {**_about, "__module__": __name__, "readers": (getattr(sources, _name),)}))


@STREAMS.register("dated-facts")
class DatedFacts(DatedStream):
    """The union of all sources; of a fact that two sources have, the one with more states is kept."""

    summary = "Dated facts: TempLAMA, DyKnow, YAGO11k and REIGN together, without repeats (needs --data-root)"
    licence = "as its sources: TempLAMA Apache-2.0, DyKnow MIT, YAGO CC BY 3.0, REIGN open data; Wikidata CC0"
    size = "6,668 changes of 2,122 facts"
    readers = (sources.templama, sources.dyknow, sources.yago, sources.leaders)

    def timelines(self, config: StreamConfig) -> SourceData:
        out = super().timelines(config)
        best: dict[tuple[str, str], Timeline] = {}
        for t in out.timelines:
            key = normalize(t.subject), t.relation
            kept = best.setdefault(key, t)
            if kept is not t:
                best[key], left = (t, kept) if len(t.states) > len(kept.states) else (kept, t)
                out.skip(left.name, "the same fact stands in another source with as many states or more")
        out.timelines = list(best.values())
        return out


@STREAMS.register("leaders-flags")
class LeadersFlags(DatedStream):
    """The question who leads the country whose flag is shown, with the real answer of each date."""

    summary = "REIGN by flags: a country's flag, who leads it, 1950-2021 (needs --data-root)"
    licence = "REIGN: open data without a stated licence; flags (GoSquared): MIT"
    size = "2,255 changes of 188 facts"
    readers = (sources.leaders,)

    def timelines(self, config: StreamConfig) -> SourceData:
        data = super().timelines(config)
        flags = _flags(config.data_root)
        by_name = {c.name: c for c in sources.COUNTRIES.values()}
        shown: list[Timeline] = []
        for t in data.timelines:
            country = by_name[t.subject]
            flag = flags.get(country.iso)
            if flag is None:
                reason = "the state has no ISO 3166 code, and so no flag" if not country.iso else f"no flag {country.iso}.png"
                for s in t.states:
                    data.skip(s.where, reason)
                continue
            for s in t.states:
                if s.start[0] < country.since:
                    data.skip(s.where, f"today's flag stands for the country from {country.since} on")
            states = tuple(s for s in t.states if s.start[0] >= country.since)
            shown.append(replace(t, states=states, image=flag, prompt_by_name=t.prompt, **FLAG_PROMPTS))
        data.timelines = shown
        data.digests += [f"{t.image.name} {t.image.size}" for t in shown if t.image]
        return data


def _flags(root: Path | None) -> dict[str, FilePicture]:
    """Pictures named by ISO 3166 codes of two letters, from the first folder under the root that has ten of them."""
    folders = ("", "flags", "64", "flat/64", "flags-iso/flat/64", "flags/flags-iso/flat/64", "flags/flags/flags-iso/flat/64")
    bases = [Path(root), Path(root).parent] if root is not None else []
    for folder in (base / f for base in bases for f in folders):
        found = {e.name[:2]: FilePicture(folder, e.name) for e in list_folder(folder) if _FLAG.fullmatch(e.name)}
        if len(found) >= 10:
            return found
    raise BadStream(f"{root} has no flags: expected a folder flags/ of pictures named by ISO 3166 codes (FR.png, JP.png, ...).")
