"""Tables of a summary: for the terminal (rich), for a paper (LaTeX, booktabs) and for other programs (CSV)."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from analysis.metrics.catalogue import METRICS, READING_TITLES, SUFFIXES, folded, header, show, show_briefly, split_name
from analysis.reporting.as_published import as_published

Summary = dict[str, Any]
MAIN = (
    "edit_success_now",
    "edit_success",
    "forgetting",
    "text_generality",
    "image_generality",
    "locality_hard",
    "harmonic_mean",
    "portability",
    "stale_rate",
    "general_drop",
    "perplexity_ratio",
    "collapse_step",
    "seconds_per_edit",
    "state_bytes",
)
"""Metrics of the main table, in reading order."""
MOST_WITH_INTERVALS = 4
"""More editors than this leave a terminal no room for intervals."""
HEADER = 9
"""Characters in a line of an editor's name over its column in a terminal."""
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_LATEX |= {"−": "$-$", "×": r"$\times$", "–": "--", "≥": r"$\geq$"}


def main_reading(summary: Summary) -> str:
    """Suffix of the reading that tables lead with: free generation where it was measured, else token accuracy."""
    return "_gen" if any(f"{m}_gen" in e for e in summary["editors"].values() for m in MAIN) else ""


def main_columns(summary: Summary, suffix: str) -> list[str]:
    """The main metrics under one reading; those that no editor has are left out."""
    names = [m + suffix if METRICS[m].readings else m for m in MAIN]
    return [n for n in names if any(n in e for e in summary["editors"].values())]


def other_columns(summary: Summary, suffix: str) -> list[str]:
    """All metrics beside the main ones that some editor has, under one reading, in the order of the catalogue."""
    names = [m + suffix if metric.readings else m for m, metric in METRICS.items() if m not in MAIN]
    return [n for n in names if any(n in e for e in summary["editors"].values())]


def best(summary: Summary, name: str) -> str | None:
    """The rival whose paired difference to every other rival excludes zero on the better side, if there is one."""
    better = METRICS[split_name(name)[0]].better
    rivals = [e for e in competing(summary) if name in summary["editors"][e]]
    if better == 0 or len(rivals) < 2:
        return None
    return next((e for e in rivals if all(_beats(summary, e, o, name, better) for o in rivals if o != e)), None)


def competing(summary: Summary) -> list[str]:
    """Editors that can be best at something: not those that the manifest lists under "references" (bounds, not rivals), nor
    those that learned no more than the unedited model knew (`edit_gain`): they have nothing to forget and nothing to damage.
    """
    gain = "edit_gain" + main_reading(summary)
    idle = [e for e, m in summary["editors"].items() if gain in m and not (m[gain]["low"] or 0) > 0]
    return [e for e in summary["editors"] if e not in summary["run"].get("references", ()) and e not in idle]


def _beats(summary: Summary, ours: str, theirs: str, name: str, better: int) -> bool:
    pairs, sign = summary["pairs"], better
    entry = pairs.get(f"{ours} - {theirs}", {}).get(name)
    if entry is None:
        entry, sign = pairs.get(f"{theirs} - {ours}", {}).get(name), -better
    if entry is None or entry["low"] is None or entry["high"] is None:
        return False
    return entry["low"] > 0 if sign > 0 else entry["high"] < 0


def terminal_table(summary: Summary) -> Table:
    """Metrics down, editors across; the best where the paired interval allows it is bold."""
    suffix = main_reading(summary)
    many = len(summary["editors"]) > MOST_WITH_INTERVALS
    caption = _caption(suffix, "±: half the 95 % interval" if many else "95 % intervals in brackets")
    table = Table(box=SIMPLE, caption=f"Shares in %, differences in points. {caption}", caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for editor in summary["editors"]:
        table.add_column(Text("\n".join(folded(editor, HEADER))), justify="right", overflow="fold")
    for name in _terminal_rows(summary, suffix):
        winner = best(summary, name)
        texts = [half_width_cell(m, name) if many else cell(m, name, brief=True) for m in summary["editors"].values()]
        cells = [Text(t, style="bold" if e == winner else "") for e, t in zip(summary["editors"], texts)]
        table.add_row(_row_title(name, suffix), *cells)
    return table


def cell(metrics: dict[str, Any], name: str, brief: bool = False) -> str:
    """Value with its interval, e.g. "41.8 [36.9, 46.5]" (brief: "41.8 [37, 47]"); a dash where not measured."""
    entry = metrics.get(name)
    if entry is None:
        return "–"
    reach = "" if brief and METRICS[split_name(name)[0]].unit == "seconds" else interval(name, entry, brief)
    return f"{show(name, entry['value'])} {reach}".replace("100.0", "100").rstrip()


def half_width_cell(metrics: dict[str, Any], name: str) -> str:
    """Value and half the width of its interval, where there is little room: "41.8 ±5"."""
    entry = metrics.get(name)
    if entry is None:
        return "–"
    unit, value = METRICS[split_name(name)[0]].unit, show(name, entry["value"])
    if unit not in ("share", "difference", "ratio") or entry["low"] is None or entry["high"] is None:
        return value
    half = show_briefly(name, (entry["high"] - entry["low"]) / 2)
    return (value if half == "0" else f"{value} ±{half}").replace("100.0", "100")


def interval(name: str, entry: dict[str, Any], brief: bool = False) -> str:
    """[low, high], or nothing where there is none or it is as narrow as the digits shown; an open end reads "…"."""
    if entry["low"] is None and entry["high"] is None:
        return ""
    write = show_briefly if brief else show
    low, high = ("…" if entry[k] is None else write(name, entry[k]) for k in ("low", "high"))
    return f"[{low}, {high}]" if low != high else ""


def latex(summary: Summary, suffix: str) -> str:
    """A booktabs table, metrics down and editors across; the best in bold where the paired interval allows it."""
    editors = summary["editors"]
    lines = [r"% needs \usepackage{booktabs}", f"% {_caption(suffix)}", rf"\begin{{tabular}}{{l{'r' * len(editors)}}}", r"\toprule"]
    lines += [" & ".join(["", *map(_escape, editors)]) + r" \\", r"\midrule"]
    for name in main_columns(summary, suffix):
        winner = best(summary, name)
        cells = [_latex_cell(m, name, e == winner) for e, m in editors.items()]
        lines.append(" & ".join([_escape(header(name)), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def metrics_csv(summary: Summary) -> str:
    """Long form: editor, metric, reading, value, low, high, n."""
    return _csv("editor", summary["editors"])


def pairs_csv(summary: Summary) -> str:
    """Long form of the paired differences (first minus second)."""
    return _csv("pair", summary["pairs"])


def files(summary: Summary, kinds: tuple[str, ...]) -> dict[str, str]:
    """File name to content, for the kinds asked for ("csv", "latex")."""
    out = {}
    if "csv" in kinds:
        out |= {"metrics.csv": metrics_csv(summary), "pairs.csv": pairs_csv(summary)} | as_published(summary)
    if "latex" in kinds:
        readings = [s for s in SUFFIXES if any(n.endswith(s) for n in main_columns(summary, s))]
        out |= {f"main{s or '_tokens'}.tex": latex(summary, s) for s in readings}
    return out


def _csv(first: str, groups: dict[str, dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([first, "metric", "reading", "value", "low", "high", "n"])
    for group, metrics in groups.items():
        for name, entry in metrics.items():
            base, suffix = split_name(name)
            reading = READING_TITLES[suffix] if METRICS[base].readings else ""
            writer.writerow([group, name, reading, *("" if entry[k] is None else entry[k] for k in ("value", "low", "high", "n"))])
    return out.getvalue()


def _latex_cell(metrics: dict[str, Any], name: str, bold: bool) -> str:
    entry = metrics.get(name)
    if entry is None:
        return "--"
    value, reach = _escape(show(name, entry["value"])), _escape(interval(name, entry))
    return (rf"\textbf{{{value}}}" if bold else value) + (rf" {{\scriptsize {reach}}}" if reach else "")


def _escape(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def _terminal_rows(summary: Summary, suffix: str) -> list[str]:
    """The main metrics, and success under the other readings, which is what papers mean by accuracy."""
    names = main_columns(summary, suffix)
    at = names.index("edit_success" + suffix) + 1 if "edit_success" + suffix in names else 0
    others = ["edit_success" + s for s in SUFFIXES if s != suffix]
    return names[:at] + [n for n in others if any(n in e for e in summary["editors"].values())] + names[at:]


def _row_title(name: str, suffix: str) -> str:
    base, own = split_name(name)
    other = METRICS[base].readings and own != suffix
    return f"  {READING_TITLES[own]}" if other else METRICS[base].short


def _caption(suffix: str, signs: str = "95 % intervals in brackets") -> str:
    return f"Right by {READING_TITLES[suffix]}; {signs}; bold: better than every other editor by the paired interval."
