"""What the report says of each editor: verdicts with small pictures, a sentence, and the facts with the largest losses.

The words of a verdict follow from intervals by fixed rules (docs/semantics.md), so that a reader can check them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures.context import FigureContext
from analysis.metrics import curves
from analysis.metrics.answers import at_end, right_after
from analysis.metrics.catalogue import GENERALITY, KINDS, LOCALITY, show, shown
from analysis.metrics.comparison import learned
from analysis.metrics.safety import BEHAVIOURS, Behaviour
from analysis.reading.load import EditorRun, Run, texts
from analysis.reading.records import ScoringMode

NOTABLE = 0.05
"""A smaller loss is not called forgetting or damage, even where its interval excludes zero."""
LARGE = 0.25
"""A loss of this size or more is marked as bad."""
PERPLEXITY = (1.1, 2.0)
"""Perplexity ratios from which damage is named, and from which it is bad."""
_TONES = {"good": "✓", "some": "▲", "bad": "✗", "none": ""}
_WORSE = ("none", "good", "some", "bad")

Metrics = Mapping[str, Mapping[str, Any]]
"""An editor's entries in one scoring mode, by name without the mode's suffix."""


@dataclass(frozen=True)
class VerdictCell:
    """One cell of the table of verdicts: a tone (good, some, bad, none) with its mark, a word or two, details and a picture.

    picture: the name of a macro of pictures.html.j2 and its arguments; empty for no picture.
    """

    tone: str
    word: str
    detail: str = ""
    picture: tuple[Any, ...] = ()

    @property
    def mark(self) -> str:
        return _TONES[self.tone]


NOT_MEASURED = VerdictCell("none", "not measured")


def verdicts(context: FigureContext) -> dict[str, dict[str, VerdictCell]]:
    """Editor to column to cell; columns are Learns, Forgets, Breaks, Spares, Damage and Cost."""
    success = context.curves(partial(curves.by_year, split="edit", mode=context.mode))
    editors = context.summary["editors"]
    slowest = max((m["seconds_per_edit"]["value"] for m in editors.values() if "seconds_per_edit" in m), default=0.0)
    table = {}
    for name, entries in editors.items():
        m = in_mode(entries, context.mode)
        cells = {"Learns": _learns(m), "Forgets": _forgets(m, success[success["editor"] == name]), "Breaks": _breaks(m, context)}
        table[name] = cells | {"Spares": _spares(m), "Damage": _damage(m), "Cost": _cost(m, slowest)}
    return table


def in_mode(entries: Metrics, mode: ScoringMode) -> Metrics:
    """The entries of one scoring mode without its suffix, and those of metrics without modes."""
    return {**entries, **{n.removesuffix(mode.suffix): e for n, e in entries.items() if mode.suffix and n.endswith(mode.suffix)}}


def _learns(m: Metrics) -> VerdictCell:
    now, gain = m.get("edit_success_now"), m.get("edit_gain")
    if now is None:
        return NOT_MEASURED
    before = "" if gain is None else f"; {_percent(now['value'] - gain['value'])} unedited"
    idle = gain is not None and not learned(gain)
    tone = "bad" if idle or now["value"] < 0.5 else "some" if now["value"] < 0.9 else "good"
    return VerdictCell(tone, _percent(now["value"]), f"right just after the edit{before}", ("bar", now["value"], tone))


def _forgets(m: Metrics, success: pd.DataFrame) -> VerdictCell:
    lost, end, now, gain = (m.get(k) for k in ("forgetting", "edit_success", "edit_success_now", "edit_gain"))
    picture = ("sparkline", success["value"].tolist()) if len(success) else ()
    if lost is None or end is None:
        return VerdictCell("none", "not measured", picture=picture)
    detail = f"{_percent(now['value'])} → {_percent(end['value'])} right" if now else f"{_percent(end['value'])} right at the end"
    if (gain is not None and not learned(gain)) or (now is not None and now["value"] < NOTABLE):
        return VerdictCell("none", "nothing to forget", detail, picture)
    points = f"{100 * lost['value']:.0f} points"
    if lost["value"] < NOTABLE:
        return VerdictCell("good", "holds", detail, picture)
    if lost["low"] is None or lost["low"] <= 0:
        return VerdictCell("some", f"may forget {points}", f"{detail}; unsure", picture)
    most = gain is not None and lost["value"] > gain["value"] / 2
    return VerdictCell("bad" if most or lost["value"] >= LARGE else "some", f"forgets {points}", detail, picture)


def _breaks(m: Metrics, context: FigureContext) -> VerdictCell:
    last, point, alarm, marked = context.run.planned_step, m.get("collapse_step"), m.get("alarm_step"), m.get("collapse_unconfirmed")
    if point is None and alarm is None:
        return NOT_MEASURED
    at = [None if p is None or p["value"] is None else p["value"] / max(1, last) for p in (point, alarm)]
    picture = ("timeline", *at)
    warned = f"alarm at step {alarm['value']:,.0f}" if alarm and alarm["value"] is not None else ""
    if point and point["value"] is not None:
        orders = f" in {point['orders']} of {len(context.runs)} orders" if "orders" in point else ""
        after = f"after {m['collapse_edits']['value']:,.0f} edits"
        return VerdictCell(
            "bad", f"broke in steps {point['low']:,.0f}–{point['high']:,.0f}{orders}", "; ".join(filter(None, (after, warned))), picture
        )
    if marked:
        tone = "bad" if _perplexity_tone(m) == "bad" else "some"
        return VerdictCell(tone, "marked at the last checkpoint, unconfirmed", f"step {marked['value']:,.0f}", picture)
    unseen = "" if "perplexity_ratio" in m else "; running text not measured"
    if warned:
        return VerdictCell("some", warned, f"not broken by step {last:,}{unseen}", picture)
    return VerdictCell("good", "whole", f"to step {last:,}{unseen}", picture)


def _spares(m: Metrics) -> VerdictCell:
    """Locality: the kind that was spared least, and all others."""
    kept = {KINDS[k]: m[k]["value"] for k in LOCALITY if k in m}
    if not kept:
        return NOT_MEASURED
    least = min(kept, key=lambda k: kept[k])
    tone = _tone_of(1 - kept[least], NOTABLE, LARGE)
    others = ", ".join(f"{_percent(v)} {k}" for k, v in kept.items() if k != least)
    return VerdictCell(tone, f"{_percent(kept[least])} of {least}", others, ("bar", kept[least], tone))


def _damage(m: Metrics) -> VerdictCell:
    """The worst of ability, agreement on unrelated questions, perplexity and safety; the first word is of the worst."""
    parts: list[tuple[str, str]] = []
    if drop := m.get("general_drop"):
        before = m["general_score"]["value"] + drop["value"] if "general_score" in m else 1.0
        sure = drop["low"] is None or drop["low"] > 0
        tone = _tone_of(drop["value"], NOTABLE, LARGE)
        tone = "none" if before < NOTABLE else tone if sure or tone == "good" else "some"
        words = {"none": "nothing to lose: the unedited model knew nothing", "good": "abilities intact"}
        parts.append((tone, words.get(tone, f"{100 * drop['value']:.0f} points of ability{'' if sure else ', unsure'}")))
    if kept := m.get("unrelated_kept"):
        tone = _tone_of(1 - kept["value"], NOTABLE, LARGE)
        parts.append((tone, f"{_percent(kept['value'])} of unrelated answers kept"))
    if ratio := m.get("perplexity_ratio"):
        parts.append((_perplexity_tone(m), _perplexity_words(ratio)))
    parts += [_kept_behaviour(m, b) for b in BEHAVIOURS.values() if b.kept in m]
    if not parts:
        return NOT_MEASURED
    worst = max(parts, key=lambda p: _WORSE.index(p[0]))
    loss = ("bar", m["general_drop"]["value"], worst[0]) if "general_drop" in m else ()
    return VerdictCell(worst[0], worst[1], ", ".join(words for _, words in parts if words != worst[1]), loss)


def _kept_behaviour(m: Metrics, behaviour: Behaviour) -> tuple[str, str]:
    """Tone and words on the refusals, or on the answers to benign requests, that were kept."""
    kept, alarm = m[behaviour.kept]["value"], m.get(behaviour.alarm, {}).get("value")
    if kept is None:
        return "none", f"nothing to lose: the unedited model {behaviour.lacking}"
    rung = "" if alarm is None else f" (alarm at step {alarm:,.0f})"
    return _tone_of(1 - kept, NOTABLE, LARGE), f"{_percent(kept)} of {behaviour.answers} kept{rung}"


def _tone_of(loss: float, notable: float, large: float) -> str:
    return "bad" if loss >= large else "some" if loss >= notable else "good"


def _perplexity_tone(m: Metrics) -> str:
    if "perplexity_ratio" not in m:
        return "none"
    ratio = m["perplexity_ratio"]["value"]
    return _tone_of(np.inf if ratio is None else ratio, *PERPLEXITY)


def _cost(m: Metrics, slowest: float) -> VerdictCell:
    """Seconds of an edit, with a bar relative to the slowest editor."""
    seconds = m.get("seconds_per_edit")
    if seconds is None:
        return NOT_MEASURED
    detail = [f"{show(k, m[k]['value'])} {words}" for k, words in (("state_bytes", "kept"), ("peak_bytes", "peak")) if k in m]
    word = f"{show('seconds_per_edit', seconds['value'])} an edit"
    return VerdictCell("none", word, ", ".join(detail), ("bar", seconds["value"] / (slowest or 1), "none"))


def headline(entries: Metrics, mode: ScoringMode) -> str:
    """One sentence on success, generality and locality, damage and collapse, and one on what was not measured."""
    m = in_mode(entries, mode)
    point, marked = m.get("collapse_step"), m.get("collapse_unconfirmed")
    collapse = f"the model broke down by step {point['value']:,.0f}" if point and point["value"] is not None else ""
    collapse = collapse or ("the model is marked as broken at the last checkpoint, unconfirmed" if marked else "")
    reached = ", ".join(f"{_percent(m[k]['value'])} of {KINDS[k]} right" for k in GENERALITY if k in m)
    spared = ", ".join(f"{_percent(m[k]['value'])} of {KINDS[k]} left as they were" for k in LOCALITY if k in m)
    sentence = "; ".join(filter(None, [_success_words(m), reached, spared, _damage_words(m), collapse]))
    looked = {"locality": spared, "general ability": m.get("general_drop"), "running text": m.get("perplexity_ratio")}
    absent = [name for name, found in looked.items() if not found]
    missing = f" Not measured: {', '.join(absent)}." if absent else ""
    return f"{sentence[0].upper()}{sentence[1:]} (by {mode.title}).{missing}" if sentence else "Nothing was measured."


def worst_forgotten(run: Run, editor: EditorRun, mode: ScoringMode, most: int = 10) -> list[dict[str, Any]]:
    """Live edits that score lower at the end than right after the edit, the largest loss first.

    Equal losses are ordered by log-probability per token of the answer at the end, the least likely first.
    """
    both, score = _both_times(editor), mode.column
    both["loss"] = both[f"{score}_then"] - both[score]
    both["likely"] = both["logprob"] / both["n_tokens"]
    lost = both[both["loss"] > 0].sort_values(["loss", "likely", "edit"], ascending=[False, True, True]).head(most)
    answers = _answers(run, editor, lost) if len(lost) else {}
    return [_fact(run, row, answers) for row in lost.itertuples()]


def count_forgotten(editor: EditorRun, mode: ScoringMode) -> tuple[int, int]:
    """(edits that were right right after the edit and are not at the end, edits with scores at both times)."""
    both = _both_times(editor)
    then, end = both[f"{mode.column}_then"], both[mode.column]
    return int(((then == 1) & (end < 1)).sum()), int((then.notna() & end.notna()).sum())


def _both_times(editor: EditorRun) -> pd.DataFrame:
    """Answers about live edits at the end, with those right after the edit in columns that end in "_then"."""
    return at_end(editor.records, "edit").merge(right_after(editor.records), on="edit", suffixes=("", "_then"))


def _success_words(m: Metrics) -> str:
    end, now = m.get("edit_success"), m.get("edit_success_now")
    if end is None:
        return f"{_percent(now['value'])} of edits are right just after they are made" if now else ""
    ends = f" ({100 * end['low']:.0f} to {_percent(end['high'])})" if end["low"] is not None and end["high"] is not None else ""
    gain = m.get("edit_gain")
    before = f" and {_percent(now['value'] - gain['value'])} before it" if now and gain else ""
    then = f", {_percent(now['value'])} were just after the edit{before}" if now else ""
    return f"{_percent(end['value'])}{ends} of {end['n']:,} live edits are right in the end{then}"


def _damage_words(m: Metrics) -> str:
    parts = []
    if drop := m.get("general_drop"):
        sure = drop["low"] is not None and drop["high"] is not None and (drop["low"] > 0 or drop["high"] < 0)
        change = show("general_drop", -drop["value"])
        changed = f"{change} points{'' if sure else ' (within error)'}"
        parts.append(f"general ability {'unchanged' if change == '0.0' else changed}")
    if ratio := m.get("perplexity_ratio"):
        parts.append(_perplexity_words(ratio))
    return ", ".join(parts)


def _perplexity_words(ratio: Mapping[str, Any]) -> str:
    text = shown("perplexity_ratio", ratio)
    return "perplexity unchanged" if text == "1.000" else f"perplexity {text}" if ratio["value"] is None else f"perplexity × {text}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _answers(run: Run, editor: EditorRun, lost: pd.DataFrame) -> dict[tuple[str, int], str]:
    """(question id, step) to the generated text."""
    ids = run.questions["question_id"].to_numpy()
    question_ids = np.unique(np.concatenate([ids[lost["question"]], ids[lost["question_then"]]]))
    steps = np.unique(np.concatenate([lost["step"], lost["step_then"]]))
    rows: list[Any] = list(texts(editor, question_ids.tolist(), steps.tolist()).itertuples())
    return {(r.question_id, int(r.probe_step)): str(r.generated) for r in rows if pd.notna(r.generated)}


def _fact(run: Run, row: Any, answers: dict[tuple[str, int], str]) -> dict[str, Any]:
    event, ids = run.events.iloc[row.edit], run.questions["question_id"].to_numpy()
    return {
        "prompt": event["prompt"],
        "image": event["image"] if pd.notna(event["image"]) else None,
        "target": event["target"],
        "then": answers.get((ids[row.question_then], int(row.step_then)), "–"),
        "now": answers.get((ids[row.question], int(row.step)), "–"),
        "age": int(row.age),
    }
