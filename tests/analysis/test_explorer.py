"""The explorer of the report: its data against the stored answers, its behaviour in a browser, and the style sheet's contrast."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.metrics import curves
from analysis.metrics.bootstrap import Resampler
from analysis.reading.load import load_run
from analysis.reading.records import FREE_GENERATION
from analysis.reporting import explorer, page

SHEET = Path(page.__file__).with_name("page.css.j2").read_text("utf-8")


def test_every_stored_answer_is_in_the_data(analysed: Path) -> None:
    run = load_run(analysed)
    data = json.loads(explorer.data_block(run, "gen"))
    rows, texts = data["rows"], data["texts"]
    assert len(texts) == len(set(texts)) and data["kept"] == data["facts"]
    for number, (name, editor) in enumerate(run.editors.items()):
        stored = pd.concat([pd.read_parquet(p) for p in sorted((editor.folder / "records").glob("*.parquet"))])
        want = Counter(
            (r.question_id, r.probe_step, *(None if pd.isna(v) else v for v in (r.answer, r.generated, r.exact)))
            for r in stored.itertuples()
        )
        prompts = dict(zip(run.questions["question_id"], run.questions["prompt"]))
        expected = Counter()
        for (question, *rest), times in want.items():
            expected[(prompts[question], *rest)] += times
        found = Counter(
            (
                texts[data["questions"]["prompt"][rows["q"][i]]],
                rows["s"][i],
                *(texts[rows[c][i]] if rows[c][i] >= 0 else None for c in ("want", "got")),
                rows["gen"][i],
            )
            for i in range(len(rows["e"]))
            if rows["e"][i] == number
        )
        assert found == expected, name


def test_the_points_at_the_years_ends_are_those_of_the_static_curves(analysed: Path) -> None:
    run = load_run(analysed)
    data = json.loads(explorer.data_block(run, "gen"))
    rows, texts = pd.DataFrame(data["rows"]), data["texts"]
    rows["split"] = [texts[data["questions"]["split"][q]] for q in rows["q"]]
    seen = 0
    for number, editor in enumerate(run.editors.values()):
        for split in ("edit", "text_generality", "locality_hard", "general"):
            static = curves.by_year(run, editor, Resampler(run.clusters, np.random.default_rng(0), 10), split, FREE_GENERATION)
            own = rows[(rows["e"] == number) & (rows["m"] == 0) & (rows["split"] == split) & rows["gen"].notna()]
            points = own.groupby("y")[["gen", "w"]].apply(lambda g: np.average(g["gen"].astype(float), weights=g["w"]))
            assert points.to_dict() == pytest.approx(dict(zip(static["x"], static["value"])), abs=1e-3)
            seen += len(points)
    assert seen > 0


def test_a_large_run_is_sampled_by_facts_within_the_bound(analysed: Path) -> None:
    run = load_run(analysed)
    text = explorer.data_block(run, "gen", seed=3, most_mb=0.05)
    data = json.loads(text)
    assert len(text) <= 50_000
    assert 0 < data["kept"] < data["facts"] and data["seed"] == 3
    assert text == explorer.data_block(run, "gen", seed=3, most_mb=0.05)
    assert text != explorer.data_block(run, "gen", seed=4, most_mb=0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_a_contrast_of_at_least_four_and_a_half(scheme: int) -> None:
    colours: dict[str, str] = dict(re.findall(r"--([\w-]+): (#\w{6})", re.findall(r":root \{(.*?)\}", SHEET, re.S)[scheme]))
    used = set(re.findall(r"(?<![\w-])color: var\(--([\w-]+)\)", SHEET))
    assert {"ink", "soft", "good", "broken", "accent"} <= used
    for text in used:
        for ground in ("page", "card") + (("note",) if text == "ink" else ()):
            light, dark = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
    assert not re.search(r"(?<![\w-])color: #", SHEET), "a text colour outside the palette escapes this test"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser-test]'")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is on the PATH: the explorer is not tried in a browser")
    with api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_point_shows_its_questions_and_a_fact_its_life(browser: Any, analysed: Path, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []
    tab.on("pageerror", lambda e: faults.append(str(e)))
    tab.goto((analysed / "report.html").as_uri())
    assert tab.locator("#explorer").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    dot = tab.locator("#explorer circle").first
    said = dot.get_attribute("aria-label")
    dot.dispatch_event("click")
    count = int(re.search(r"of (\d+) answers", said)[1])
    shown = tab.locator("[data-questions] > p").inner_text()
    assert shown.startswith(f"{count} answers of {said.split(',')[0]} in year")
    assert tab.locator("[data-questions] tbody tr").count() == min(count, 200)
    button = tab.locator("[data-questions] button").first
    button.click()
    assert tab.locator("select[data-fact]").input_value() == button.get_attribute("value")
    assert tab.locator("[data-life] tbody tr").count() > 0
    assert tab.input_value("[data-mode]") == "gen", "the mode of the page's leading tables"
    tab.select_option("[data-mode]", "gen")
    assert tab.locator("[data-losses] > p").inner_text().split()[0].isdigit()
    boxes = tab.locator("[data-editors] input")
    for i in range(boxes.count()):
        boxes.nth(i).uncheck()
    assert tab.locator("#explorer circle").count() == 0
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("details:not([open])").count() == 0
    assert not faults
    tab.close()


def test_without_javascript_the_page_reads_as_before(browser: Any, analysed: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((analysed / "report.html").as_uri())
    assert tab.locator("#explorer").is_hidden()
    assert tab.locator("#verdicts").is_visible()
    context.close()
