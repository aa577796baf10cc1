"""Which metrics lead a summary, and which editor is best by the paired intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from analysis.metrics.catalogue import MAIN, every_metric, main_metrics, metric_of
from analysis.reading.records import FREE_GENERATION, TOKEN_ACCURACY, ScoringMode

Summary = dict[str, Any]
"""The content of summary.json."""


def main_mode(summary: Summary) -> ScoringMode:
    """The scoring mode that tables lead with: free generation where it was measured, else token accuracy."""
    generated = any(m + FREE_GENERATION.suffix in e for e in summary["editors"].values() for m in MAIN)
    return FREE_GENERATION if generated else TOKEN_ACCURACY


def main_columns(summary: Summary, mode: ScoringMode) -> list[str]:
    """Names of the main metrics in one scoring mode, without those that no editor has."""
    return _in_mode(summary, mode, main_metrics())


def other_columns(summary: Summary, mode: ScoringMode) -> list[str]:
    """Names of all other metrics that some editor has in one scoring mode, in the order of the catalogue."""
    return _in_mode(summary, mode, [m for m in every_metric() if m not in main_metrics()])


def best(summary: Summary, name: str) -> str | None:
    """The editor whose paired difference to every other competing editor excludes zero on the better side, if there is one."""
    better = metric_of(name).better
    rivals = [e for e in competing(summary) if name in summary["editors"][e]]
    if better == 0 or len(rivals) < 2:
        return None
    return next((e for e in rivals if all(_beats(summary, e, o, name, better) for o in rivals if o != e)), None)


def competing(summary: Summary) -> list[str]:
    """Editors that can be best at a metric.

    The manifest's "references" are bounds and do not compete. An editor that learned no more than the unedited model knew
    (`edit_gain`) has nothing to forget and nothing to damage, so it does not compete either.
    """
    gain = "edit_gain" + main_mode(summary).suffix
    idle = [e for e, m in summary["editors"].items() if gain in m and not learned(m[gain])]
    return [e for e in summary["editors"] if e not in summary["run"].get("references", ()) and e not in idle]


def learned(gain: Mapping[str, Any]) -> bool:
    """Whether a gain is above 0 by its interval, or by its value where it has none."""
    return (gain["value"] if gain["low"] is None else gain["low"]) > 0


def _in_mode(summary: Summary, mode: ScoringMode, metrics: Iterable[str]) -> list[str]:
    known = every_metric()
    names = [m + mode.suffix if known[m].modes else m for m in metrics]
    return [n for n in names if any(n in e for e in summary["editors"].values())]


def _beats(summary: Summary, ours: str, theirs: str, name: str, better: int) -> bool:
    pairs, sign = summary["pairs"], better
    entry = pairs.get(f"{ours} - {theirs}", {}).get(name)
    if entry is None:
        entry, sign = pairs.get(f"{theirs} - {ours}", {}).get(name), -better
    if entry is None or entry["low"] is None or entry["high"] is None:
        return False
    return entry["low"] > 0 if sign > 0 else entry["high"] < 0
