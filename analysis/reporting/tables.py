"""Tables of a run: for the terminal (rich), for a paper (LaTeX, booktabs) and for other programs (CSV)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from analysis.figures.context import FigureContext
from analysis.metrics import curves
from analysis.metrics.ability import topic_table
from analysis.metrics.bootstrap import LEAST_QUESTIONS, Resampler
from analysis.metrics.catalogue import header, metric_of, mode_title, show, show_briefly, shown, split_name, wrapped
from analysis.metrics.comparison import Summary, best, main_columns, main_mode
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import SCORING_MODES, ScoringMode
from analysis.reporting import published

MOST_WITH_INTERVALS = 3
"""With more editors than this, a terminal table shows half-widths in place of intervals."""
HEADER = 9
"""Characters in a line of an editor's name above its column in a terminal."""
_NUMBERS = ("value", "low", "high", "n", "questions")
_LONG_FORM = ("metric", "scoring mode", *_NUMBERS, "kind")
AS_PUBLISHED = ("editor", "published name", "published definition", "ours", "our definition", "when", "scoring mode", *_NUMBERS)
"""Columns of as_published.csv."""
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_ESCAPES = str.maketrans(_LATEX | {"−": "$-$", "×": r"$\times$", "–": "--", "≥": r"$\geq$"})


def terminal_table(summary: Summary) -> Table:
    """Metrics down, editors across; the best by the paired intervals is bold."""
    mode, alone = main_mode(summary), len(summary["run"].get("seeds", (0,))) == 1
    many = len(summary["editors"]) > MOST_WITH_INTERVALS
    signs = "±: half the 95 % interval" if many else "95 % intervals in brackets"
    caption = _caption(mode, f"{signs}{', of this order only' if alone else ''}")
    table = Table(box=SIMPLE, caption=f"Shares in %, differences in points. {caption}", caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.caption = f"{table.caption} n: answers/distinct questions{', the most of any editor' if len(summary['editors']) > 1 else ''}."
    for editor in summary["editors"]:
        table.add_column(Text("\n".join(wrapped(editor, HEADER))), justify="right", overflow="fold")
    table.add_column("n", justify="right")
    for name in _terminal_rows(summary, mode):
        winner = best(summary, name)
        texts = [half_width_cell(m, name) if many else cell(m, name, brief=True) for m in summary["editors"].values()]
        cells = [Text(t, style="bold" if e == winner else "") for e, t in zip(summary["editors"], texts)]
        other = metric_of(name).modes and split_name(name)[1] is not mode
        table.add_row(f"  {mode_title(name)}" if other else metric_of(name).short, *cells, counts(summary, name, "/"))
    return table


def protocol_tables(summary: Summary) -> list[Table]:
    """For each protocol that the manifest names, its metrics down and the editors across; a metric that no editor has is left out."""
    tables, editors = [], summary["editors"]
    for name, protocol in summary["run"].get("protocols", {}).items():
        table = Table(title=f"{name}: {protocol['summary']}", title_justify="left", box=SIMPLE, caption=protocol["source"])
        for title in ("", *("\n".join(wrapped(e, HEADER)) for e in editors), "n"):
            table.add_column(Text(title), justify="right" if title else "left")
        for metric in (m for m in protocol["metrics"] if any(m in e for e in editors.values())):
            mode = f", {mode_title(metric)}" if metric_of(metric).modes else ""
            table.add_row(
                metric_of(metric).short + mode, *(cell(e, metric, brief=True) for e in editors.values()), counts(summary, metric, "/")
            )
        tables.append(table)
    return tables


def cell(metrics: dict[str, Any], name: str, brief: bool = False) -> str:
    """Value with its interval, e.g. "41.8 [36.9, 46.5]" (brief: "41.8 [37, 47]"); a dash where not measured."""
    entry = metrics.get(name)
    ends = "" if entry is None or (brief and metric_of(name).unit == "seconds") else interval(name, entry, brief)
    return f"{shown(name, entry)} {ends}".replace("100.0", "100").rstrip()


def half_width_cell(metrics: dict[str, Any], name: str) -> str:
    """Value and half the width of its interval, for narrow columns: "41.8 ±5"."""
    entry = metrics.get(name)
    unit, value = metric_of(name).unit, shown(name, entry)
    if entry is None or unit not in ("share", "difference", "ratio") or entry["low"] is None or entry["high"] is None:
        return value
    half = show_briefly(name, (entry["high"] - entry["low"]) / 2)
    return (value if half == "0" else f"{value} ±{half}").replace("100.0", "100")


def interval(name: str, entry: dict[str, Any], brief: bool = False) -> str:
    """[low, high], where an open end is "…", or how many distinct questions were too few for it; empty where there is none."""
    if entry["low"] is None and entry["high"] is None:
        few = entry.get("questions")
        return f"[{few} question{'s' if few != 1 else ''}]" if few is not None and few < LEAST_QUESTIONS else ""
    write = show_briefly if brief else show
    low, high = ("…" if entry[k] is None else write(name, entry[k]) for k in ("low", "high"))
    return f"[{low}, {high}]" if low != high else ""


def counts(summary: Summary, name: str, between: str = " / ") -> str:
    """Answers and distinct questions behind a metric, the most of any editor; empty where it is no mean over questions."""
    known = [e[name] for e in summary["editors"].values() if name in e and "questions" in e[name]]
    return f"{max(k['n'] for k in known):,}{between}{max(k['questions'] for k in known):,}" if known else ""


def files(context: FigureContext, kinds: tuple[str, ...]) -> dict[str, str]:
    """File name to content of every table, for kinds among "csv" and "latex"."""
    summary, contents = context.summary, {}
    if "csv" in kinds:
        frames = {"metrics.csv": long_form("editor", summary["editors"]), "pairs.csv": long_form("pair", summary["pairs"])}
        optional = {"as_published.csv": as_published(summary), "forgetting.csv": matrices(context), "topics.csv": topic_scores(context)}
        optional |= {"published.csv": pd.DataFrame(published.rows(context.run, summary)), "retrieval.csv": context.retrieval_table}
        frames |= {name: frame for name, frame in optional.items() if len(frame)}
        contents |= {name: frame.to_csv(index=False, lineterminator="\n") for name, frame in frames.items()}
    if "latex" in kinds:
        modes = [m for m in SCORING_MODES if any(n.endswith(m.suffix) for n in main_columns(summary, m))]
        contents |= {f"main{m.suffix or '_tokens'}.tex": latex(summary, m) for m in modes}
    return contents


def latex(summary: Summary, mode: ScoringMode) -> str:
    """A booktabs table, metrics down and editors across; the best by the paired intervals is bold."""
    editors = summary["editors"]
    about, width = summary["run"], len(editors) + 2
    lines = [r"% needs \usepackage{booktabs}", f"% {_caption(mode)}", rf"\begin{{tabular}}{{l{'r' * (len(editors) + 1)}}}", r"\toprule"]
    bounds = about.get("references", ())
    names = [e.translate(_ESCAPES) + (r"$^\dagger$" if e in bounds else "") for e in editors]
    lines += [" & ".join(["", *names, "$n$"]) + r" \\", r"\midrule"]
    for name in main_columns(summary, mode):
        winner = best(summary, name)
        cells = [_latex_cell(m, name, e == winner) for e, m in editors.items()]
        lines.append(" & ".join([header(name).translate(_ESCAPES), *cells, counts(summary, name)]) + r" \\")
    orders = len(about.get("seeds", (0,)))
    edits = max((e["edits"]["value"] for e in editors.values() if "edits" in e), default=0)
    made = f"{edits:,.0f} edits, {f'{orders} orders' if orders > 1 else '1 order (intervals are of this order only)'}"
    told = f"{made}. $n$: answers / distinct questions."
    told += r" $\dagger$: a bound, which does not compete." if any(e in bounds for e in editors) else ""
    return "\n".join([*lines, r"\bottomrule", rf"\multicolumn{{{width}}}{{l}}{{\footnotesize {told}}}", r"\end{tabular}"]) + "\n"


def long_form(first: str, groups: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row for each group (an editor or a pair) and metric: group, metric, scoring mode (its title), then the fields of its entry."""
    rows = [(g, n, mode_title(n), *(e.get(k) for k in _LONG_FORM[2:])) for g, metrics in groups.items() for n, e in metrics.items()]
    return pd.DataFrame(rows, columns=[first, *_LONG_FORM], dtype=object)


def as_published(summary: Summary) -> pd.DataFrame:
    """The source's own names and definitions beside ours (AS_PUBLISHED); empty where the stream does not state them."""
    return pd.DataFrame(_published_names(summary), columns=[*AS_PUBLISHED], dtype=object)


def _published_names(summary: Summary) -> Iterator[tuple[Any, ...]]:
    names = summary["run"].get("stream", {}).get("published_names", {})
    for editor, metrics in summary["editors"].items():
        for metric, (name, definition) in names.items():
            when = "right after each edit" if metric.endswith("_now") else "at the end of the stream"
            for ours in (metric + mode.suffix for mode in SCORING_MODES if metric + mode.suffix in metrics):
                numbers = (metrics[ours].get(k) for k in _NUMBERS)
                yield (editor, name, definition, ours, metric_of(ours).title, when, mode_title(ours), *numbers)


def matrices(context: FigureContext) -> pd.DataFrame:
    """Success by year of the edit and of the question, of every order, editor and scoring mode."""

    def every_mode(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
        return curves.stacked(curves.matrix(run, editor, resampler, m).assign(**{"scoring mode": m.title}) for m in SCORING_MODES)

    columns = ["seed", "editor", "scoring mode", "made", "asked", *_NUMBERS]
    return _every_order(context, every_mode).rename(columns={"x": "asked"})[columns]


def topic_scores(context: FigureContext) -> pd.DataFrame:
    """Score of every topic of general questions, benchmarks and safety sets at the end, beside the unedited model's."""
    return _every_order(context, topic_table)[["seed", "editor", "topic", "scoring mode", *_NUMBERS, "unedited", "chance"]]


def _every_order(context: FigureContext, table: Callable[[Run, EditorRun, Resampler], pd.DataFrame]) -> pd.DataFrame:
    """A table of every editor in every order, with columns seed and editor."""
    parts = []
    for run, resampler in zip(context.runs, context.resamplers):
        parts += [table(run, e, resampler).assign(seed=run.manifest.get("seed"), editor=n) for n, e in run.editors.items()]
    return curves.stacked(parts)


def _latex_cell(metrics: dict[str, Any], name: str, bold: bool) -> str:
    entry = metrics.get(name)
    kind = "" if entry is None or entry["value"] is None else entry.get("kind", "")
    texts = (shown(name, entry), "" if entry is None else f"{kind} {interval(name, entry)}".strip())
    value, ends = (text.translate(_ESCAPES) for text in texts)
    return (rf"\textbf{{{value}}}" if bold else value) + (rf" {{\scriptsize {ends}}}" if ends else "")


def _terminal_rows(summary: Summary, mode: ScoringMode) -> list[str]:
    """The main metrics, and success in the other scoring modes, because papers report token accuracy."""
    names = main_columns(summary, mode)
    at = names.index("edit_success" + mode.suffix) + 1 if "edit_success" + mode.suffix in names else 0
    others = ["edit_success" + m.suffix for m in SCORING_MODES if m is not mode]
    return names[:at] + [n for n in others if any(n in e for e in summary["editors"].values())] + names[at:]


def _caption(mode: ScoringMode, signs: str = "95 % intervals in brackets") -> str:
    return f"Right by {mode.title}; {signs}; bold: better than every other editor by the paired interval."
