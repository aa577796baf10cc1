"""What the report says of each editor: verdicts with small pictures, a sentence, and the facts with the largest losses.

The words of a verdict follow from intervals by fixed rules (docs/semantics.md), so that a reader can check them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures.context import FigureContext
from analysis.metrics import curves
from analysis.metrics.answers import at_end, right_after
from analysis.metrics.catalogue import show
from analysis.reading.load import EditorRun, Run, texts
from analysis.reading.records import ScoringMode

NOTABLE = 0.05
"""A smaller loss is not called forgetting or damage, even where its interval excludes zero."""
LARGE = 0.25
"""A loss of this size or more is marked as bad."""
_TONES = {"good": "✓", "some": "▲", "bad": "✗", "none": "–"}


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


def verdicts(context: FigureContext) -> dict[str, dict[str, VerdictCell]]:
    """Editor to column to cell; columns are Learns, Forgets, Breaks, Damage and Cost."""
    success = context.curves(partial(curves.by_year, split="edit", mode=context.mode))
    editors, suffix = context.summary["editors"], context.mode.suffix
    slowest = max((m["seconds_per_edit"]["value"] for m in editors.values() if "seconds_per_edit" in m), default=0.0)
    table = {}
    for name, m in editors.items():
        cells = {"Learns": _learns(m, suffix), "Forgets": _forgets(m, suffix, success[success["editor"] == name])}
        table[name] = cells | {"Breaks": _breaks(m, context), "Damage": _damage(m, suffix), "Cost": _cost(m, slowest)}
    return table


def _learns(m: dict[str, Any], suffix: str) -> VerdictCell:
    now = m.get("edit_success_now" + suffix)
    if now is None:
        return VerdictCell("none", "not asked")
    tone = "good" if now["value"] >= 0.9 else "some" if now["value"] >= 0.5 else "bad"
    return VerdictCell(tone, f"{100 * now['value']:.0f} %", "right just after the edit", ("bar", now["value"], tone))


def _forgets(m: dict[str, Any], suffix: str, success: pd.DataFrame) -> VerdictCell:
    lost, end, now = (m.get(k + suffix) for k in ("forgetting", "edit_success", "edit_success_now"))
    picture = ("sparkline", success["value"].tolist()) if len(success) else ()
    if lost is None or end is None:
        return VerdictCell("none", "not asked", picture=picture)
    detail = f"{100 * now['value']:.0f} % → {100 * end['value']:.0f} % right" if now else f"{100 * end['value']:.0f} % right at the end"
    if now is not None and now["value"] < NOTABLE:
        return VerdictCell("none", "nothing to forget", detail, picture)
    tone = _tone_of_loss(lost)
    return VerdictCell(tone, "holds" if tone == "good" else f"forgets {100 * lost['value']:.0f} points", detail, picture)


def _tone_of_loss(entry: dict[str, Any]) -> str:
    """good, unless the interval excludes zero and the loss is notable: then some, or bad for a large one."""
    if entry["low"] is None or entry["low"] <= 0 or entry["value"] < NOTABLE:
        return "good"
    return "bad" if entry["value"] >= LARGE else "some"


def _breaks(m: dict[str, Any], context: FigureContext) -> VerdictCell:
    last, point, alarm = context.run.planned_step, m.get("collapse_step"), m.get("alarm_step")
    at = [None if p is None else p["value"] / max(1, last) for p in (point, alarm)]
    picture = ("timeline", *at)
    warned = f"alarm at step {alarm['value']:,.0f}" if alarm else ""
    if point is not None:
        orders = f" in {point['orders']} of {len(context.runs)} orders" if "orders" in point else ""
        return VerdictCell("bad", f"broke in steps {point['low']:,.0f}–{point['high']:,.0f}{orders}", warned, picture)
    if alarm is not None:
        return VerdictCell("some", warned, f"not broken by step {last:,}", picture)
    return VerdictCell("good", "whole", f"to step {last:,}", picture)


def _damage(m: dict[str, Any], suffix: str) -> VerdictCell:
    drop, ratio = m.get("general_drop" + suffix), m.get("perplexity_ratio")
    hard = m.get("locality_hard" + suffix)
    detail = [f"perplexity × {show('perplexity_ratio', ratio['value'])}"] if ratio else []
    detail += [f"{100 * hard['value']:.0f} % of look-alikes kept"] if hard else []
    if drop is None:
        return VerdictCell("none", "not asked", ", ".join(detail))
    tone = _tone_of_loss(drop)
    word = "abilities intact" if tone == "good" else f"{100 * drop['value']:.0f} points of ability"
    return VerdictCell(tone, word, ", ".join(detail), ("bar", drop["value"], tone))


def _cost(m: dict[str, Any], slowest: float) -> VerdictCell:
    """Seconds of an edit, with a bar relative to the slowest editor."""
    seconds = m.get("seconds_per_edit")
    if seconds is None:
        return VerdictCell("none", "not measured")
    detail = [f"{show(k, m[k]['value'])} {words}" for k, words in (("state_bytes", "kept"), ("peak_bytes", "peak")) if k in m]
    word = f"{show('seconds_per_edit', seconds['value'])} an edit"
    return VerdictCell("none", word, ", ".join(detail), ("bar", seconds["value"] / (slowest or 1), "none"))


def headline(metrics: dict[str, Any], mode: ScoringMode) -> str:
    """One sentence on success, generality and locality, damage and collapse, without the parts that were not measured."""
    suffix, point = mode.suffix, metrics.get("collapse_step")
    collapse = f"the model broke down by step {point['value']:,.0f}" if point else ""
    parts = [_success_words(metrics, suffix), _generality_words(metrics, suffix), _damage_words(metrics, suffix), collapse]
    sentence = "; ".join(filter(None, parts))
    return f"{sentence[0].upper()}{sentence[1:]} (by {mode.title})." if sentence else "Nothing was measured."


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


def _success_words(m: dict[str, Any], suffix: str) -> str:
    end, now = m.get("edit_success" + suffix), m.get("edit_success_now" + suffix)
    if end is None:
        return f"{_percent(now)} of edits are right just after they are made" if now else ""
    ends = f" ({100 * end['low']:.0f} to {_percent(end, 'high')})" if end["low"] is not None else ""
    then = f", {_percent(now)} were just after the edit" if now else ""
    return f"{_percent(end)}{ends} of {end['n']:,} live edits are right in the end{then}"


def _generality_words(m: dict[str, Any], suffix: str) -> str:
    named = {
        "text_generality": "of rephrased questions right",
        "image_generality": "with other pictures",
        "locality_hard": "of look-alikes left as they were",
    }
    return ", ".join(f"{_percent(m[k + suffix])} {words}" for k, words in named.items() if k + suffix in m)


def _damage_words(m: dict[str, Any], suffix: str) -> str:
    parts = []
    if drop := m.get("general_drop" + suffix):
        sure = drop["low"] is not None and (drop["low"] > 0 or drop["high"] < 0)
        change = show("general_drop", -drop["value"])
        changed = f"{change} points{'' if sure else ' (within error)'}"
        parts.append(f"general ability {'unchanged' if change == '0.0' else changed}")
    if ratio := m.get("perplexity_ratio"):
        text = show("perplexity_ratio", ratio["value"])
        parts.append("perplexity unchanged" if text == "1.000" else f"perplexity × {text}")
    return ", ".join(parts)


def _percent(entry: dict[str, Any], key: str = "value") -> str:
    return f"{100 * entry[key]:.0f} %"


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
