"""Files of an analysis: figures, tables by their cells, the page by its text and its escaping."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from rich.console import Console

from analysis.__main__ import main
from analysis.figures import catalogue, style
from analysis.metrics import comparison
from analysis.metrics.catalogue import header, metric_of
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from analysis.reading.records import FREE_GENERATION, BadRun
from analysis.reporting import tables
from analysis.reporting.report import write_all
from tests.helpers.fake_run import EDITORS, Plan, event, fake_run, question, record, write_run

EVIL = "<script>alert('prompt')</script> & more"


@pytest.fixture(scope="module")
def out(analysed: Path) -> Path:
    return analysed


@pytest.fixture(scope="module")
def summary(analysed: Path) -> dict:
    return summarise(load_run(analysed), replicates=200)


def test_files_are_written_and_pictures_have_print_resolution(out: Path) -> None:
    from PIL import Image

    for name in catalogue.FIGURES.keys() - {"gated", "retrieved", "requests"}:
        assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(out / "figures" / f"{name}.png") as picture:
            assert picture.width >= 1000
            assert picture.info["dpi"][0] == pytest.approx(300, abs=1)
    assert not list(out.rglob("*.tmp"))


def test_summary_json_is_strict_json_of_the_agreed_shape(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in summary.json"))
    assert set(summary) == {"run", "editors", "pairs"}
    assert set(summary["editors"]) == set(EDITORS)
    for entries in summary["editors"].values():
        assert all({"value", "low", "high", "n"} <= set(e) <= {"value", "low", "high", "n", "questions", "kind"} for e in entries.values())
        assert entries["edit_success"]["questions"] <= entries["edit_success"]["n"]
    assert summary["run"]["stream"]["skipped_records"]


def test_bold_needs_a_paired_interval_on_the_better_side() -> None:
    def entry(value: float, low: float, high: float) -> dict:
        return {"value": value, "low": low, "high": high, "n": 9}

    editors = {e: {"edit_success": entry(v, 0, 1), "stale_rate": entry(v, 0, 1)} for e, v in {"a": 0.9, "b": 0.5, "c": 0.8}.items()}
    pairs = {"a - b": entry(0.4, 0.2, 0.6), "a - c": entry(0.1, 0.01, 0.2), "b - c": entry(-0.3, -0.4, -0.2)}
    summary = {"run": {}, "editors": editors, "pairs": {k: {"edit_success": v, "stale_rate": v} for k, v in pairs.items()}}
    assert comparison.best(summary, "edit_success") == "a"
    assert comparison.best(summary, "stale_rate") == "b"
    summary["pairs"]["a - c"]["edit_success"] = entry(0.1, -0.01, 0.2)
    assert comparison.best(summary, "edit_success") is None
    summary["run"]["references"] = ["c"]
    assert comparison.best(summary, "edit_success") == "a"
    for idle in (entry(0.0, -0.1, 0.1), entry(-0.1, -0.2, -0.05)):
        editors["a"]["edit_gain"], editors["b"]["edit_gain"] = entry(0.5, 0.4, 0.6), idle
        assert comparison.competing(summary) == ["a"], "an editor that learned nothing cannot lose, so it does not compete"
        assert comparison.best(summary, "stale_rate") is None


def test_latex_is_balanced_and_escaped(summary: dict) -> None:
    renamed = summary | {"editors": {f"{e}_50%&co": m for e, m in summary["editors"].items()}, "pairs": {}}
    text = tables.latex(renamed, FREE_GENERATION)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {len(EDITORS) + 1}
    assert r"noop\_50\%\&co" in text
    assert text.count("{") == text.count("}")
    assert r"\textbf{" not in text
    assert r"\textbf{100.0}" in tables.latex(summary, FREE_GENERATION)
    bound = summary | {"run": summary["run"] | {"references": ["oracle"]}}
    head, *_, note, _ = tables.latex(bound, FREE_GENERATION).splitlines()[4:]
    assert head.count(r"$^\dagger$") == 1 and r"oracle$^\dagger$" in head and head.endswith(r"$n$ \\")
    assert "60 edits, 1 order (intervals are of this order only)" in note and "a bound, which does not compete" in note
    assert " & 54 / 54 " in tables.latex(summary, FREE_GENERATION)


def test_csv_has_every_number(out: Path, summary: dict) -> None:
    rows = list(csv.DictReader(io.StringIO((out / "tables" / "metrics.csv").read_text())))
    assert len(rows) == sum(map(len, summary["editors"].values()))
    result = next(r for r in rows if r["editor"] == "finetune" and r["metric"] == "edit_success_gen")
    assert float(result["value"]) == summary["editors"]["finetune"]["edit_success_gen"]["value"]
    assert result["scoring mode"] == "free generation"
    weakest = next(r for r in rows if r["editor"] == "finetune" and r["metric"] == "weakest_gen")
    assert weakest["kind"] == summary["editors"]["finetune"]["weakest_gen"]["kind"]


def test_the_terminal_table_fits_eighty_columns_and_dashes_what_was_not_measured(summary: dict) -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(tables.terminal_table(summary))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for editor in EDITORS:
        assert editor in text
    long = {e: f"{e}[projector=false,history=false]" for e in EDITORS}
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(tables.terminal_table(summary | {"editors": {long[e]: m for e, m in summary["editors"].items()}, "pairs": {}}))
    assert "…" not in console.file.getvalue()
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
    row = next(line for line in text.splitlines() if "Collapse" in line)
    assert row.count("never") == 3
    without = {e: {k: v for k, v in m.items() if k != "collapse_edits" or e != "noop"} for e, m in summary["editors"].items()}
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(tables.terminal_table(summary | {"editors": without}))
    row = next(line for line in console.file.getvalue().splitlines() if "Collapse" in line)
    assert (row.count("–"), row.count("never")) == (1, 2), "a dash is what was not measured, and nothing else"


def test_many_editors_fit_a_terminal_without_intervals(summary: dict) -> None:
    many = summary | {"editors": summary["editors"] | {"another": summary["editors"]["finetune"]}, "pairs": {}}
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(tables.terminal_table(many))
    row = next(line for line in console.file.getvalue().splitlines() if "Success, end" in line)
    assert row.count("±") == 5
    assert tables.half_width_cell({}, "edit_success") == "–"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_whole_self_contained_and_escaped(out: Path) -> None:
    text = (out / "report.html").read_text("utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.wrong == []
    scripts = [attributes for tag, attributes in tags.seen if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "explorer-data"}, {}], "the explorer's data and its code, and no other"
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "the simulated world &lt;stands&gt; in" in text
    pictures = [a for tag, a in tags.seen if tag == "img"]
    assert len(pictures) == len(list((out / "figures").glob("*.png")))
    assert all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in pictures)
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)


def test_every_metric_of_the_main_scoring_mode_is_on_the_page(out: Path, summary: dict) -> None:
    """The main ones in the first table, all others below it."""
    text = (out / "report.html").read_text("utf-8")
    have = {n for m in summary["editors"].values() for n in m}
    shown = {*comparison.main_columns(summary, FREE_GENERATION), *comparison.other_columns(summary, FREE_GENERATION)}
    assert shown == {n for n in have if n.endswith("_gen") or not metric_of(n).modes}
    for name in comparison.other_columns(summary, FREE_GENERATION):
        assert f'<th scope="row">{escape(metric_of(name).title)}' in text


def test_every_figure_has_a_caption() -> None:
    assert [name for name, figure in style.CAPTIONS.items() if figure["caption"]] == list(catalogue.FIGURES)


def test_verdicts_come_first_then_notes_and_skipped_records_are_listed(out: Path) -> None:
    text = (out / "report.html").read_text("utf-8")
    order = [
        "<h2>Which editor forgets",
        "<h2>In short",
        "stands&gt; in",
        "<h2>Numbers",
        "<h2>How sure",
        "<h2>Figures",
        "<h2>Worst forgotten",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "file.json:3: no answer" in text
    assert "python -m analysis" in text


def test_the_worst_forgotten_facts_show_then_and_now(tmp_path: Path) -> None:
    events = [event(0, 1, prompt=EVIL, target="Rome"), event(1, 2, prompt="kept?", target="yes")]
    questions = [question("e0-edit", "e0", prompt=EVIL), question("e1-edit", "e1")]
    asked = {"n_tokens": 2, "logprob": -1.0}
    right = {"token_hits": 2, "exact": True, "generated": "Rome", **asked}
    wrong = {"token_hits": 0, "exact": False, "generated": "Oslo", **asked}
    rows = [record(edit_id="e0", question_id="e0-edit", probe="right_after", **right)]
    rows += [record(edit_id="e1", question_id="e1-edit", probe="right_after", probe_step=2, **right)]
    rows += [record(edit_id=e, question_id=f"{e}-edit", probe_step=2, **a) for e, a in (("e0", wrong), ("e1", right))]
    write_all(write_run(tmp_path, events, questions, {"e": rows}), formats=(), replicates=50)
    text = (tmp_path / "report.html").read_text("utf-8")
    section = text[text.index("<h2>Worst forgotten") : text.index("<h2>What was left out")]
    assert "&lt;script&gt;alert(&#39;prompt&#39;)&lt;/script&gt; &amp; more" in section
    assert section.index("Rome") < section.index("Oslo")
    assert "kept?" not in section
    assert "1 of 2 live edits" in section
    assert EVIL not in text


def test_making_it_again_gives_the_same_files(out: Path) -> None:
    first = {p: p.read_bytes() for p in out.rglob("*") if p.suffix in (".json", ".csv", ".tex", ".html") and p.name != "manifest.json"}
    write_all([out], formats=(), replicates=200)
    assert {p.name for p in first if p.read_bytes() != first[p]} == set()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = fake_run(tmp_path / "run", Plan(edits=12, years=2, editors=("noop", "oracle")))
    assert main([str(folder), "--format", "pdf", "--tables", "latex", "--replicates", "20"]) == 0
    assert "Success, end" in capsys.readouterr().out
    assert {p.suffix for p in (folder / "figures").iterdir()} == {".pdf"}
    assert {p.suffix for p in (folder / "tables").iterdir()} == {".tex"}
    assert main([str(tmp_path / "nothing")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.ci
def test_several_runs_are_compared_in_a_folder_of_their_own(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", Plan(edits=12, years=2, editors=("noop",)))
    b = fake_run(tmp_path / "b", Plan(edits=12, years=2, editors=("balancedit",)))
    summary = write_all([a, b], formats=(), replicates=20)
    assert list(summary["pairs"]) == ["noop - balancedit"]
    assert (a / "comparison" / "report.html").is_file()
    assert not (a / "summary.json").exists()


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BadRun, match="unknown figure format 'gif'; known are png, pdf, pgf, svg"):
        write_all([tmp_path], formats=("gif",))
    assert list(tmp_path.iterdir()) == []


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium): it draws the page without a screen")
def test_a_browser_shows_the_whole_page(out: Path, tmp_path: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom"]
    page = (out / "report.html").as_uri()
    shown = subprocess.run([str(CHROMIUM), *options, page], capture_output=True, text=True, timeout=240, check=True).stdout
    assert shown.count("<figure") == len(list((out / "figures").glob("*.png")))
    assert shown.count('<svg viewBox="0 0 132') >= 4 * len(EDITORS)
    assert "</html>" in shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium): it draws the page without a screen")
def test_the_main_tables_need_no_scrolling_at_1280_pixels(out: Path, tmp_path: Path) -> None:
    script = (
        "<script>document.title = [...document.querySelectorAll('.scroll')].slice(0, 2).map(e => e.scrollWidth - e.clientWidth)</script>"
    )
    page = tmp_path / "measured.html"
    page.write_text((out / "report.html").read_text("utf-8").replace("</body>", f"{script}</body>"), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1280,900", "--dump-dom"]
    shown = subprocess.run([str(CHROMIUM), *options, page.as_uri()], capture_output=True, text=True, timeout=240, check=True).stdout
    assert "<title>0,0</title>" in shown


def test_the_alt_text_of_a_figure_says_what_it_shows(out: Path) -> None:
    """Every editor's stored values of the metrics that a figure draws, behind the caption."""
    summary = json.loads((out / "summary.json").read_text())
    mode = comparison.main_mode(summary)
    texts = [unescape(t) for t in re.findall(r'<img src="[^"]*" alt="([^"]*)"', (out / "report.html").read_text())]
    shown = [name for name in catalogue.FIGURES if any(t.startswith(style.CAPTIONS[name]["caption"]) for t in texts)]
    assert {"retention", "reach", "ability", "cost"} <= set(shown)
    for name in shown:
        (text,) = (t for t in texts if t.startswith(style.CAPTIONS[name]["caption"]))
        metrics = [m + mode.suffix if metric_of(m).modes else m for m in style.CAPTIONS[name].get("finds", ())]
        for editor, entries in summary["editors"].items():
            for metric in (m for m in metrics if m in entries):
                assert (
                    f"{header(metric)} {tables.shown(metric, entries[metric])}" in text.partition(f"{editor}: ")[2].partition(". ")[0] + "."
                )
