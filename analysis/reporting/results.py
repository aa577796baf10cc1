"""Results that are kept beside the documents: summaries of a sweep's cells, and the tables of a page made from them.

    python -m analysis.reporting.results keep OUT docs/results/NAME   (after `python -m testbed.sweep docs/results/NAME.yaml --out OUT`)
    python -m analysis.reporting.results write docs/results.md

`keep` copies what tables need of each finished cell, so that a sweep that is half done is kept too. `write` makes every
table of a page again, between a line `<!-- table: NAME metric metric ... -->` and a line `<!-- end -->`, with means over the
orders that are kept; NAME is a folder under results/ beside the page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.metrics.bootstrap import Interval
from analysis.metrics.catalogue import METRICS, header, split_name
from analysis.metrics.comparison import Summary, main_mode
from analysis.metrics.orders import LEAST_ORDERS, over_orders
from analysis.reading.records import BadRun
from analysis.reporting.report import write
from analysis.reporting.sweep import read_sweep
from analysis.reporting.tables import cell

_ABOUT = ("config", "model", "stream", "edits", "seeds", "versions", "git", "device", "dtype", "grading_version", "prompt")
_PLACES = ("data_root", "plugin")
"""Fields of a configuration that say where files lie on one machine."""
_TABLE = re.compile(r"(<!-- table: (\S+) ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def keep(out: Path, folder: Path) -> list[Path]:
    """Copy the summaries of a sweep's finished cells. Raises `BadRun`."""
    kept: list[Path] = []
    for source in (out / c["folder"] for c in read_sweep(out)["cells"].values() if c["state"] == "done"):
        name, path = f"{source.name}.json", source / "summary.json"
        if path.is_file():
            summary = json.loads(path.read_text("utf-8"))
            about = {k: summary["run"][k] for k in _ABOUT if k in summary["run"]}
            about["config"] = {k: v for k, v in about["config"].items() if k not in _PLACES}
            text = json.dumps({"run": about, "editors": summary["editors"]}, indent=0, ensure_ascii=False, sort_keys=True)
            write(folder / name, re.sub(r"\n(?=[^{}]*})", " ", text) + "\n")  # an entry in one line
            kept.append(folder / name)
    if not kept:
        raise BadRun(f"{out} has no finished cell with a summary")
    return kept


def table(folder: Path, metrics: Sequence[str]) -> str:
    """A Markdown table of the kept summaries: editors down, metrics across, each with its interval.

    Editors with the most orders come first; a row of fewer than three orders says that it is no claim.
    Raises `BadRun` for a folder without summaries, or with two of one editor and one order, and for a metric that does not exist.
    """
    if unknown := [m for m in metrics if m not in METRICS]:
        raise BadRun(f"unknown metrics: {', '.join(unknown)}")
    summaries = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    if not summaries:
        raise BadRun(f"{folder} holds no summaries: python -m analysis.reporting.results keep OUT {folder}")
    names = [m + main_mode(summaries[0]).suffix if METRICS[m].modes else m for m in metrics]
    lines = [_about(summaries, folder.name), ""]
    lines += [f"| | orders | {' | '.join(map(header, names))} |", "|---|---|" + "---|" * len(names)]
    for editor, orders in sorted(_orders(folder, summaries).items(), key=lambda item: -len(item[1])):
        claim = "" if len(orders) >= LEAST_ORDERS else ", no claim"
        pooled = {name: _pooled([o[name] for o in orders], name) for name in names if all(name in o for o in orders)}
        lines.append(f"| `{editor}` | {len(orders)}{claim} | {' | '.join(cell(pooled, name, brief=True) for name in names)} |")
    return "\n".join(lines) + "\n"


def _orders(folder: Path, summaries: Sequence[Summary]) -> dict[str, list[dict[str, Interval]]]:
    """The metrics of each order of each editor, by its name. Raises `BadRun` where an order of an editor was kept twice."""
    found: dict[tuple[str, int], dict[str, Interval]] = {}
    for summary in summaries:
        for editor, seed in ((e, s) for e in sorted(summary["editors"]) for s in summary["run"]["seeds"]):
            if (editor, seed) in found:
                raise BadRun(f"{folder} holds two summaries of {editor} in order {seed}: remove the one of older settings")
            found[editor, seed] = summary["editors"][editor]
    return {name: [m for (e, _), m in sorted(found.items()) if e == name] for name, _ in sorted(found)}


def _pooled(entries: Sequence[Interval], name: str) -> Interval:
    """The mean over orders; one order's entry as it stands."""
    bounds = {"share": (0.0, 1.0), "difference": (-1.0, 1.0)}.get(METRICS[split_name(name)[0]].unit, (0.0, float("inf")))
    return entries[0] if len(entries) == 1 else over_orders(entries, bounds)


def _about(summaries: Sequence[Summary], name: str) -> str:
    """What was run, in a sentence."""
    run = summaries[0]["run"]
    config, seeds = run["config"], sorted({s for summary in summaries for s in summary["run"].get("seeds", [])})
    orders = ", ".join(map(str, seeds))
    counts = [e["n"] for s in summaries for m in s["editors"].values() for k, e in m.items() if k.startswith("edit_success") and e["n"]]
    made = f"`{run['stream']['name']}`, {run['model']['name']}, {run['edits']:,} edits in batches of {config['batch']}, orders {orders}"
    signs = f"shares in % by {main_mode(summaries[0]).title}, 95 % intervals in brackets"
    asked = f"edits asked: {min(counts):,} to {max(counts):,}"
    budgets = sorted({s["run"]["config"]["probe_budget"] for s in summaries})
    asked += f", questions an editor and 500 edits: {' or '.join(f'{b:,}' for b in budgets)}"
    return f"{made}; {signs}; {asked}: `python -m testbed.sweep docs/results/{name}.yaml`"


def write_page(page: Path) -> str:
    """The page with its tables made again. Raises `BadRun`."""
    folder = page.with_suffix("")
    return _TABLE.sub(lambda m: f"{m[1]}{table(folder / m[2], m[3].split())}{m[4]}", page.read_text("utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when everything was written, 2 for a mistake, printed as a plain line."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(given) == 3 and given[0] == "keep":
            print(f"kept {len(keep(Path(given[1]), Path(given[2])))} summaries in {given[2]}")
        elif len(given) == 2 and given[0] == "write":
            write(Path(given[1]), write_page(Path(given[1])))
            print(f"tables of {given[1]} are made again")
        else:
            print((__doc__ or "").partition("\n\n")[2], file=sys.stderr)
            return 2
    except BadRun as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
