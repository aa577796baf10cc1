"""The top of the report: for each editor, whether it forgets, whether and when it breaks, and what it cost, as small pictures.

Words follow from intervals by fixed rules (docs/semantics.md), so that they can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from analysis.figures.context import Scene
from analysis.metrics import curves
from analysis.metrics.catalogue import show

NOTABLE = 0.05
"""A loss under five points is not called forgetting or damage, even where its interval excludes zero."""
WIDE, HIGH = 132, 34
"""Size of the small pictures, in pixels."""
_TONES = {"good": "✓", "some": "▲", "bad": "✗", "none": "–"}


@dataclass(frozen=True)
class Sign:
    """One cell: a tone (good, some, bad, none) with its mark, a word or two, details, and a picture."""

    tone: str
    word: str
    detail: str = ""
    picture: str = ""

    @property
    def mark(self) -> str:
        return _TONES[self.tone]


def verdicts(s: Scene) -> dict[str, dict[str, Sign]]:
    """Editor to column to sign; columns are Learns, Forgets, Breaks, Damage and Cost."""
    kept = s.curves(partial(curves.by_year, split="edit", reading=s.reading))
    dearest = max((m["seconds_per_edit"]["value"] for m in s.summary["editors"].values() if "seconds_per_edit" in m), default=0.0)
    out = {}
    for name, m in s.summary["editors"].items():
        left = kept[kept["editor"] == name]
        signs = {"Learns": _learns(m, s.suffix), "Forgets": _forgets(m, s.suffix, left), "Breaks": _breaks(m, s)}
        out[name] = signs | {"Damage": _damage(m, s.suffix), "Cost": _cost(m, dearest)}
    return out


def _learns(m: dict[str, Any], suffix: str) -> Sign:
    now = m.get("edit_success_now" + suffix)
    if now is None:
        return Sign("none", "not asked")
    tone = "good" if now["value"] >= 0.9 else "some" if now["value"] >= 0.5 else "bad"
    return Sign(tone, f"{100 * now['value']:.0f} %", "right just after the edit", bar(now["value"], tone))


def _forgets(m: dict[str, Any], suffix: str, left: pd.DataFrame) -> Sign:
    lost, end, now = (m.get(k + suffix) for k in ("forgetting", "edit_success", "edit_success_now"))
    picture = spark(left["value"].to_numpy(float)) if len(left) else ""
    if lost is None or end is None:
        return Sign("none", "not asked", picture=picture)
    detail = f"{100 * now['value']:.0f} % → {100 * end['value']:.0f} % right" if now else f"{100 * end['value']:.0f} % right at the end"
    if now is not None and now["value"] < NOTABLE:
        return Sign("none", "nothing to forget", detail, picture)
    sure = lost["low"] is not None and lost["low"] > 0 and lost["value"] >= NOTABLE
    tone = "bad" if sure and lost["value"] >= 0.25 else "some" if sure else "good"
    word = f"forgets {100 * lost['value']:.0f} points" if sure else "holds"
    return Sign(tone, word, detail, picture)


def _breaks(m: dict[str, Any], s: Scene) -> Sign:
    last, point, alarm = s.run.planned_step, m.get("collapse_step"), m.get("alarm_step")
    at = [None if p is None else p["value"] / max(1, last) for p in (point, alarm)]
    picture = timeline(at[0], at[1])
    warned = f"alarm at step {alarm['value']:,.0f}" if alarm else ""
    if point is not None:
        orders = f" in {point['orders']} of {len(s.runs)} orders" if "orders" in point else ""
        return Sign("bad", f"broke in steps {point['low']:,.0f}–{point['high']:,.0f}{orders}", warned, picture)
    if alarm is not None:
        return Sign("some", warned, f"not broken by step {last:,}", picture)
    return Sign("good", "whole", f"to step {last:,}", picture)


def _damage(m: dict[str, Any], suffix: str) -> Sign:
    drop, ratio = m.get("general_drop" + suffix), m.get("perplexity_ratio")
    hard = m.get("locality_hard" + suffix)
    detail = [f"perplexity × {show('perplexity_ratio', ratio['value'])}"] if ratio else []
    detail += [f"{100 * hard['value']:.0f} % of look-alikes kept"] if hard else []
    if drop is None:
        return Sign("none", "not asked", ", ".join(detail))
    sure = drop["low"] is not None and drop["low"] > 0 and drop["value"] >= NOTABLE
    tone = "bad" if sure and drop["value"] >= 0.25 else "some" if sure else "good"
    word = f"{100 * drop['value']:.0f} points of ability" if sure else "abilities intact"
    return Sign(tone, word, ", ".join(detail), bar(max(0.0, drop["value"]), tone))


def _cost(m: dict[str, Any], dearest: float) -> Sign:
    seconds = m.get("seconds_per_edit")
    if seconds is None:
        return Sign("none", "not measured")
    detail = [f"{show(k, m[k]['value'])} {words}" for k, words in (("state_bytes", "kept"), ("peak_bytes", "peak")) if k in m]
    return Sign(
        "none", f"{show('seconds_per_edit', seconds['value'])} an edit", ", ".join(detail), bar(seconds["value"] / (dearest or 1), "none")
    )


def bar(share: float, tone: str) -> str:
    """A horizontal bar of a share."""
    wide = round(WIDE * min(1.0, max(0.0, share)), 1)
    return _svg(f'<rect class="track" width="{WIDE}" height="8" y="6"/><rect class="{tone}" width="{wide}" height="8" y="6"/>', 20)


def spark(values: np.ndarray) -> str:
    """A line of shares over equal times, from 0 (bottom) to 1 (top), with its last point marked."""
    x = np.linspace(4, WIDE - 6, len(values)) if len(values) > 1 else np.array([WIDE - 6.0])
    y = 4 + (HIGH - 8) * (1 - np.clip(values, 0, 1))
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    frame = f'<path class="track" d="M0 4H{WIDE}M0 {HIGH - 4}H{WIDE}"/>'
    return _svg(f'{frame}<polyline points="{line}"/><circle cx="{x[-1]:.1f}" cy="{y[-1]:.1f}" r="3"/>', HIGH)


def timeline(broke: float | None, alarm: float | None) -> str:
    """The stream from left to right: whole, then broken (hatched by its height); the alarm is a tick."""
    at = WIDE if broke is None else round(WIDE * broke, 1)
    parts = f'<rect class="good" width="{at}" height="6" y="7"/>'
    parts += "" if broke is None else f'<rect class="bad" x="{at}" width="{max(3.0, WIDE - at):.1f}" height="14" y="3"/>'
    parts += "" if alarm is None else f'<path class="tick" d="M{WIDE * alarm:.1f} 0V20"/>'
    return _svg(parts, 20)


def _svg(inside: str, height: int) -> Markup:
    return Markup(f'<svg viewBox="0 0 {WIDE} {height}" width="{WIDE}" height="{height}" aria-hidden="true">{inside}</svg>')
