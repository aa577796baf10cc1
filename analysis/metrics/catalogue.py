"""Titles, units and directions of the metrics of summary.json. See docs/semantics.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from analysis.reading.records import ALL_TOKENS, FREE_GENERATION, TOKEN_ACCURACY, ScoringMode

Unit = Literal["share", "difference", "ratio", "count", "edits", "seconds", "bytes"]


@dataclass(frozen=True)
class Metric:
    """A metric's long and short title, unit and direction.

    better: 1 where larger values are better, -1 where smaller ones are, 0 where neither is. modes: true for a metric with
    a variant for each scoring mode.
    """

    title: str
    short: str
    unit: Unit
    better: int
    modes: bool = False


METRICS: dict[str, Metric] = {
    "edit_success": Metric("Edit success at the end", "Success, end", "share", 1, True),
    "edit_success_now": Metric("Edit success right after", "Success, now", "share", 1, True),
    "edit_gain": Metric("Edit success right after, over the unedited model's", "Gain, now", "difference", 1, True),
    "text_generality": Metric("Text generality", "Text generality", "share", 1, True),
    "image_generality": Metric("Image generality", "Image generality", "share", 1, True),
    "locality_hard": Metric("Locality, same question, other picture", "Locality, hard", "share", 1, True),
    "locality_sibling": Metric("Locality, same picture, other question", "Locality, sibling", "share", 1, True),
    "locality_far": Metric("Locality, unrelated picture", "Locality, far", "share", 1, True),
    "locality_text": Metric("Locality, text only", "Locality, text", "share", 1, True),
    "locality_text_top1": Metric("Locality, text only: likeliest first token", "Locality, text, top 1", "share", 1),
    "locality_far_top10": Metric("Locality, unrelated picture: ordered top-10 first tokens", "Locality, far, top 10", "share", 1),
    "portability": Metric("Portability", "Portability", "share", 1, True),
    "stale_rate": Metric("Stale answers", "Stale answers", "share", -1, True),
    "harmonic_mean": Metric("Harmonic mean", "Harmonic mean", "share", 1, True),
    "forgetting": Metric("Forgetting, first minus last", "Forgetting", "difference", -1, True),
    "forgetting_max": Metric("Forgetting, best minus last", "Forgetting, max", "difference", -1, True),
    "backward_transfer": Metric("Backward transfer", "Backward transfer", "difference", 1, True),
    "anytime_success": Metric("Success averaged over year ends", "Success, anytime", "share", 1, True),
    "plasticity": Metric("Plasticity: success right after, last year", "Plasticity", "share", 1, True),
    "stability": Metric("Stability: earlier years' edits that still hold", "Stability", "share", 1, True),
    "stability_plasticity": Metric("Harmonic mean of stability and plasticity", "Stability, plasticity", "share", 1, True),
    "revised_success": Metric("Revised facts right by the current value", "Revised, right", "share", 1, True),
    "revised_stale": Metric("Revised facts answered by the old value", "Revised, stale", "share", -1, True),
    "teacher_forcing_gap": Metric("Token accuracy minus free generation", "Teacher-forcing gap", "difference", 0),
    "forward_transfer": Metric("Forward transfer", "Forward transfer", "difference", 0, True),
    "half_life": Metric("Half-life", "Half-life", "edits", 1, True),
    "general_score": Metric("General ability", "Ability", "share", 1, True),
    "general_drop": Metric("General ability lost", "Ability lost", "difference", -1, True),
    "unrelated_kept": Metric("Answers to unrelated questions kept", "Unrelated kept", "share", 1, True),
    "benchmark_drop": Metric("Benchmark score lost", "Benchmarks lost", "difference", -1, True),
    "skill_drop": Metric("Benchmark skill lost, guessing taken out", "Skill lost", "difference", -1),
    "safety_drop": Metric("Safety score lost", "Safety lost", "difference", -1, True),
    "truth_mc1": Metric("Truthfulness, MC1: the best answer is the likeliest", "Truthful, MC1", "share", 1),
    "truth_mc2": Metric("Truthfulness, MC2: probability of right answers", "Truthful, MC2", "share", 1),
    "perplexity_ratio": Metric("Perplexity ratio", "Perplexity", "ratio", -1),
    "collapse_step": Metric("Collapse at step", "Collapse step", "count", 1),
    "alarm_step": Metric("Alarm on unrelated answers at step", "Alarm step", "count", 1),
    "hard_edits": Metric("Single edits out of all proportion", "Hard edits", "count", -1),
    "deferral_precision": Metric("Deferral precision: left to the base, and rightly", "Deferral precision", "share", 1),
    "deferral_recall": Metric("Deferral recall: unrelated questions left to the base", "Deferral recall", "share", 1),
    "edits": Metric("Edits applied", "Edits applied", "count", 0),
    "seconds_per_edit": Metric("Seconds per edit", "Cost of an edit", "seconds", -1),
    "state_bytes": Metric("Editor state", "Editor state", "bytes", -1),
    "peak_bytes": Metric("Peak memory", "Peak memory", "bytes", -1),
}
GENERALITY = ("text_generality", "image_generality")
LOCALITY = ("locality_hard", "locality_sibling", "locality_far", "locality_text")


def split_name(name: str) -> tuple[str, ScoringMode]:
    """A name of summary.json as the metric's name and its scoring mode (token accuracy where the metric has no modes)."""
    for mode in (ALL_TOKENS, FREE_GENERATION):
        if name.endswith(mode.suffix) and name.removesuffix(mode.suffix) in METRICS:
            return name.removesuffix(mode.suffix), mode
    return name, TOKEN_ACCURACY


def metric_of(name: str) -> Metric:
    """The metric behind a name of summary.json, whatever its scoring mode."""
    return METRICS[split_name(name)[0]]


def mode_title(name: str) -> str:
    """The scoring mode in the name of a metric; empty where the metric has no modes."""
    return split_name(name)[1].title if metric_of(name).modes else ""


def show(name: str, value: float | None) -> str:
    """A value for a reader: shares and differences in per cent, bytes and counts in plain units, a dash for None."""
    if value is None:
        return "–"
    unit = metric_of(name).unit
    if unit == "share":
        return f"{100 * value:.1f}"
    if unit == "difference":
        return f"{100 * value:.1f}".replace("-", "−").replace("−0.0", "0.0")
    return _plain(value, unit)


def show_briefly(name: str, value: float) -> str:
    """An end of an interval in few digits, for a terminal."""
    unit = metric_of(name).unit
    if unit in ("share", "difference"):
        return f"{100 * value:.0f}".replace("-", "−").replace("−0", "0")
    return f"{value:.2g}" if unit == "ratio" else show(name, value)


def _plain(value: float, unit: Unit) -> str:
    if unit == "bytes":
        return human_bytes(value)
    if unit == "seconds":
        return f"{value:.3g} s" if value >= 0.1 or value == 0 else f"{1000 * value:.3g} ms"
    return f"{value:.3f}" if unit == "ratio" and value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2g}"


def human_bytes(value: float) -> str:
    """Bytes in decimal units with three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def unit_of(name: str) -> str:
    """The unit for a metric's title; empty where the values carry their unit or have none."""
    return {"share": "%", "difference": "points", "ratio": "×", "edits": "edits"}.get(metric_of(name).unit, "")


def header(name: str) -> str:
    """Short title with unit."""
    title, unit = metric_of(name).short, unit_of(name)
    return f"{title} ({unit})" if unit else title


def wrapped(name: str, width: int) -> list[str]:
    """An editor's name in lines of at most `width` characters, broken at its bracket and commas, and where that is not enough
    at plus, colon and equals signs."""
    if len(name) <= width:
        return [name]
    parts = [[p] if len(p) <= width else re.split(r"(?==)|(?<=[+:])", p) for p in re.split(r"(?=\[)|(?<=,)", name)]
    first, *rest = (piece for part in parts for piece in part)
    lines = [first]
    for piece in rest:
        fits = len(lines[-1] + piece) <= width and not piece.startswith("[")
        lines = [*lines[:-1], lines[-1] + piece] if fits else [*lines, piece]
    return lines
