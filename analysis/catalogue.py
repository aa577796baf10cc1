"""What each metric of summary.json is called, its unit, and which direction is better. See docs/semantics.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["share", "difference", "ratio", "count", "edits", "seconds", "bytes"]


@dataclass(frozen=True)
class Metric:
    """`better` is 1 where more is better, -1 where less is, 0 where neither; `readings` tells that twins exist."""

    title: str
    unit: Unit
    better: int
    readings: bool = False


METRICS: dict[str, Metric] = {
    "edit_success": Metric("Edit success at the end", "share", 1, True),
    "edit_success_now": Metric("Edit success right after", "share", 1, True),
    "text_generality": Metric("Text generality", "share", 1, True),
    "image_generality": Metric("Image generality", "share", 1, True),
    "locality_hard": Metric("Locality, same question, other picture", "share", 1, True),
    "locality_sibling": Metric("Locality, same picture, other question", "share", 1, True),
    "locality_far": Metric("Locality, unrelated picture", "share", 1, True),
    "locality_text": Metric("Locality, text only", "share", 1, True),
    "portability": Metric("Portability", "share", 1, True),
    "stale_rate": Metric("Stale answers", "share", -1, True),
    "harmonic_mean": Metric("Harmonic mean", "share", 1, True),
    "forgetting": Metric("Forgetting, first minus last", "difference", -1, True),
    "forgetting_max": Metric("Forgetting, best minus last", "difference", -1, True),
    "backward_transfer": Metric("Backward transfer", "difference", 1, True),
    "forward_transfer": Metric("Forward transfer", "difference", 0, True),
    "half_life": Metric("Half-life", "edits", 1, True),
    "general_score": Metric("General ability", "share", 1, True),
    "general_drop": Metric("General ability lost", "difference", -1, True),
    "perplexity_ratio": Metric("Perplexity ratio", "ratio", -1),
    "collapse_step": Metric("Collapse at step", "count", 1),
    "edits": Metric("Edits applied", "count", 0),
    "seconds_per_edit": Metric("Seconds per edit", "seconds", -1),
    "state_bytes": Metric("Editor state", "bytes", -1),
    "peak_bytes": Metric("Peak memory", "bytes", -1),
}
SUFFIXES = ("", "_exact", "_gen")
READING_TITLES = {"": "token accuracy", "_exact": "all tokens", "_gen": "free generation"}
LOCALITY = ("locality_hard", "locality_sibling", "locality_far", "locality_text")


def metric_names() -> list[str]:
    """Every name that summary.json may hold, twins included."""
    return [name + s for name, m in METRICS.items() for s in (SUFFIXES if m.readings else ("",))]


def split_name(name: str) -> tuple[str, str]:
    """A metric's name as base name and suffix of the reading."""
    for suffix in SUFFIXES[1:]:
        if name.endswith(suffix) and name.removesuffix(suffix) in METRICS:
            return name.removesuffix(suffix), suffix
    return name, ""


def show(name: str, value: float | None) -> str:
    """A value as a reader sees it: shares in per cent, bytes and counts in plain units; a dash where absent."""
    if value is None:
        return "–"
    unit = METRICS[split_name(name)[0]].unit
    if unit == "share":
        return f"{100 * value:.1f}"
    if unit == "difference":
        return f"{100 * value:+.1f}".replace("-", "−")
    return _plain(value, unit)


def _plain(value: float, unit: Unit) -> str:
    if unit == "bytes":
        return human_bytes(value)
    if unit == "seconds":
        return f"{value:.3g}"
    return f"{value:.3f}" if unit == "ratio" and value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2g}"


def human_bytes(value: float) -> str:
    """Bytes in decimal units with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def header(name: str) -> str:
    """Column title with unit."""
    metric = METRICS[split_name(name)[0]]
    unit = {"share": "%", "difference": "points", "ratio": "×", "seconds": "s"}.get(metric.unit)
    return f"{metric.title} ({unit})" if unit else metric.title
