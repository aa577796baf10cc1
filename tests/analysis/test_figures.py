"""Figures by their structure: panels, axes, series, labels."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from analysis.figures import catalogue, style
from analysis.figures.context import figure_context
from analysis.figures.points import pareto
from analysis.metrics import curves
from analysis.metrics.catalogue import wrapped
from analysis.metrics.summary import summarise
from analysis.reading.load import Run, load_run
from analysis.reading.records import BadRun
from tests.helpers.fake_run import EDITORS, Plan, fake_run


@pytest.fixture(scope="module")
def run(analysed: Path) -> Run:
    return load_run(analysed)


@pytest.fixture(scope="module")
def summary(run: Run) -> dict:
    return summarise(run, replicates=200)


@pytest.fixture(scope="module")
def figures(run: Run, summary: dict) -> dict:
    return catalogue.draw_all(figure_context(run, summary, replicates=100))


def marked_lines(ax) -> int:
    return sum(len(line.get_xdata()) > 1 and line.get_marker() not in ("None", "", None) for line in ax.lines)


def test_every_figure_is_drawn_with_named_axes(figures: dict) -> None:
    assert set(catalogue.FIGURES) - set(figures) == {"gated", "retrieved", "requests"}, "no editor gates or retrieves, no request is asked"
    for figure in figures.values():
        labels = [ax.get_xlabel() for ax in figure.axes]
        assert any(labels) or figure.get_supxlabel()
        rows = [t.get_text() for t in figure.axes[0].get_yticklabels()]
        named = set(rows) >= {"finetune", "balancedit"} or all(ax.get_title(loc="left") for ax in figure.axes)
        assert any(ax.get_ylabel() for ax in figure.axes) or figure.get_supylabel() or named


@pytest.mark.parametrize(("name", "panels"), [("retention", 3), ("age", 3), ("reach", 7), ("ability", 4)])
def test_curves_have_one_line_and_one_band_an_editor(figures: dict, name: str, panels: int) -> None:
    axes = figures[name].axes
    assert len(axes) == panels
    for ax in axes:
        assert marked_lines(ax) == len(EDITORS)
        assert ax.get_title(loc="left")
        assert len(ax.collections) >= len(EDITORS)


def test_retention_has_a_point_a_year(figures: dict) -> None:
    for ax in figures["retention"].axes:
        line = next(line for line in ax.lines if len(line.get_xdata()) > 1)
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
        assert ax.get_xlabel() == "years (simulated)"


@pytest.mark.parametrize(("axis", "label", "first"), [("scheduled", "years (scheduled)", 1), ("dated", "year", 0)])
def test_the_time_axis_says_whether_years_are_history(tmp_path: Path, axis: str, label: str, first: int) -> None:
    run = load_run(fake_run(tmp_path, Plan(edits=20, years=2, editors=("noop", "oracle"), time_axis=axis)))
    figure = catalogue.FIGURES["retention"](figure_context(run, summarise(run, replicates=20), replicates=20))
    assert figure is not None
    assert figure.axes[0].get_xlabel() == label
    assert min(figure.axes[0].lines[0].get_xdata()) == first


def test_styles_differ_without_colour() -> None:
    styles = style.editor_styles([f"editor{i}" for i in range(12)])
    assert len({(x.marker, x.dash) for x in styles.values()}) == 12
    assert len({x.colour for x in list(styles.values())[:8]}) == 8


@pytest.mark.ci
def test_drawing_changes_no_global_setting(run: Run, summary: dict) -> None:
    before = dict(matplotlib.rcParams)
    figure = catalogue.draw_all(figure_context(run, summary, replicates=20))["cost"]
    assert dict(matplotlib.rcParams) == before
    assert len(figure.axes) == 4


def test_names_stand_at_line_ends_and_do_not_touch(figures: dict) -> None:
    for name in ("retention", "age", "survival", "reach", "ability"):
        ax = figures[name].axes[-1]
        named = {t.get_text(): t.xyann[1] * ax.get_position().height * figures[name].get_figheight() * 72 for t in ax.texts}
        assert set(named) == {x for x in EDITORS if name != "survival" or x != "noop"}, "an editor that learned nothing has nothing to lose"
        assert not figures[name].legends
        heights = sorted(named.values())
        assert min(b - a for a, b in itertools.pairwise(heights)) > 7


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.1)), min_size=1, max_size=9))
def test_spreading_names_keeps_their_order_their_distance_and_the_axis(named: list[tuple[float, float]]) -> None:
    wanted, heights = np.array(named).T
    result = style.spread_labels(wanted, heights)
    order = np.argsort(wanted, kind="stable")
    least = (heights[order][1:] + heights[order][:-1]) / 2
    assert (np.diff(result[order]) >= least - 1e-9).all()
    assert result.min() >= -1e-9
    assert result.max() <= 1 + 1e-9
    apart = np.concatenate([[0.0], np.cumsum(least)])
    np.testing.assert_allclose(style.spread_labels(apart, heights[order]), apart, atol=1e-9)


LONG = ("finetune", "alphaedit[projector=false,history=false]", "memit-seq+blue[layers=0,1,2]", "scr[gate=threshold,k=8]")


@pytest.mark.parametrize("name", ["retention", "forgetting", "gap", "cost", "vitals", "trade_off"])
def test_no_name_is_cut_at_the_edge_or_touches_another(run: Run, summary: dict, name: str) -> None:
    known: dict[str, str] = dict(zip(EDITORS, LONG))
    editors = {known[n]: replace(e, name=known[n]) for n, e in run.editors.items()}
    named = summary | {"editors": {known[n]: m for n, m in summary["editors"].items()}}
    with style.paper():
        figure = catalogue.FIGURES[name](figure_context(replace(run, editors=editors), named, replicates=10))
    assert figure is not None
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts: list[Any] = [t for t in figure.findobj(Text) if isinstance(t, Text) and whole(t).startswith(LONG)]
    boxes = [t.get_window_extent(renderer) for t in texts]
    shown = set(LONG) if name not in ("forgetting", "cost") else set(LONG[1:])
    assert {next(n for n in LONG if whole(t).startswith(n)) for t in texts} == shown
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    for ax in figure.axes:
        places = [Text.get_window_extent(t, renderer) for t in ax.texts if whole(t) in LONG]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(places, 2))


def whole(text: Text) -> str:
    """A name that may stand in several lines."""
    return text.get_text().replace("\n", "")


@given(
    st.from_regex(r"[a-z]{1,9}(\+[a-z]{1,9})?(\[[a-z]{1,9}=[a-z0-9]{1,9}(,[a-z]{1,9}=[a-z0-9]{1,9})*\])?", fullmatch=True),
    st.integers(11, 40),
)
def test_a_wrapped_name_is_whole_and_its_lines_fit(name: str, width: int) -> None:
    lines = wrapped(name, width)
    assert "".join(lines) == name
    assert all(0 < len(line) <= width for line in lines)


@pytest.mark.ci
def test_many_editors_are_told_apart_by_a_legend(run: Run) -> None:
    editor = next(iter(run.editors.values()))
    many = replace(run, editors={f"editor{i}": replace(editor, name=f"editor{i}") for i in range(style.MOST_NAMES + 1)})
    figure = catalogue.FIGURES["retention"](figure_context(many, summarise(many, replicates=2), replicates=2))
    assert figure is not None
    assert [len(x.get_texts()) for x in figure.legends] == [style.MOST_NAMES + 1]
    assert not any(ax.texts for ax in figure.axes)


def test_the_matrix_has_a_panel_an_editor_and_a_number_a_cell(figures: dict) -> None:
    *panels, bar = figures["forgetting"].axes
    able = [e for e in EDITORS if e != "noop"]
    assert len(panels) == len(able), "an editor that learned nothing has nothing to forget"
    assert bar.get_ylabel() == "right (free generation)"
    for ax, name in zip(panels, able):
        assert ax.get_title(loc="left").startswith(name)
        assert len(ax.texts) == 5 * 6 // 2


def test_cells_with_few_answers_are_pale_and_references_are_left_out(run: Run, summary: dict) -> None:
    bound = summary | {"run": summary["run"] | {"references": ["oracle"]}}
    context = figure_context(run, bound, replicates=20)
    with style.paper():
        figure = catalogue.FIGURES["forgetting"](context)
    assert figure is not None
    *panels, _ = figure.axes
    assert [ax.get_title(loc="left").split("\n")[0] for ax in panels] == ["finetune", "balancedit"]
    table = curves.matrix(run, run.editors["finetune"], context.resamplers[0], context.mode)
    assert [len(ax.patches) for ax in panels] == [(table["n"] < 10).sum()] * 2
    assert 0 < (table["n"] < 10).sum() < len(table)
    for name in ("cost", "survival"):
        drawn = catalogue.FIGURES[name](context)
        assert drawn is not None
        drawn.draw_without_rendering()
        named = {t.get_text() for ax in drawn.axes for t in [*ax.get_yticklabels(), *ax.texts]}
        assert named & set(EDITORS) == {"finetune", "balancedit"}


def test_survival_has_one_panel_and_topics_say_how_many_questions_they_have(figures: dict) -> None:
    assert len(figures["survival"].axes) == 1
    titles = [ax.get_title(loc="left") for ax in figures["ability"].axes]
    assert titles == ["Arithmetic (n = 10)", "Logic (n = 10)", "Reading (n = 10)", "Running text: perplexity ratio (log)"]


def test_small_topics_are_pooled(run: Run) -> None:
    questions = run.questions.copy()
    general = questions.index[(questions["split"] == "general") & ~questions["topic"].str.contains(":")]
    questions.loc[general[:9], "topic"] = "small"
    questions.loc[general[9:13], "topic"] = "smaller"
    pooled = curves.topics(replace(run, questions=questions))
    assert pooled["other"] == questions["topic"].isin(["small", "smaller"]).sum() + sum(
        n for t, n in questions.loc[general, "topic"].value_counts().items() if n < 10 and t not in ("small", "smaller")
    )
    assert all(n >= 10 for t, n in pooled.items() if t != "other")


def test_signals_are_those_of_monitors_and_reports_with_a_cross_at_the_collapse(figures: dict, summary: dict) -> None:
    titles = [ax.get_title(loc="left") for ax in figures["vitals"].axes]
    assert titles == [
        "Change of weights, |W − W₀|",
        "Hidden states: cosine to unedited",
        "Entropy of the next token (nats)",
        "Condition number reported",
    ]
    crosses = [line for line in figures["vitals"].axes[0].lines if line.get_marker() == "x"]
    assert len(crosses) == sum(m["collapse_step"]["value"] is not None for m in summary["editors"].values()) > 0


def test_gap_rows_are_editors_with_three_scoring_modes_each(figures: dict) -> None:
    (ax,) = figures["gap"].axes
    assert [t.get_text() for t in ax.get_yticklabels()] == list(EDITORS)
    assert len(ax.containers) == 3 * len(EDITORS)
    assert [t.get_text() for t in figures["gap"].legends[0].get_texts()] == ["token accuracy", "all tokens", "free generation"]


def test_benchmarks_and_safety_start_at_no_change(figures: dict) -> None:
    for name, title in (("benchmarks", "Quiz"), ("safety", "Refusal")):
        (ax,) = figures[name].axes
        assert ax.get_title(loc="left") == title
        starts = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() not in ("None", "", None)]
        assert starts == [(0, 0)] * len(EDITORS)
        assert all(ax.viewLim.y0 <= y <= ax.viewLim.y1 for line in ax.lines for y in line.get_ydata()), "losses are drawn too"


def test_the_pareto_front_holds_the_points_that_no_other_dominates() -> None:
    x, y = np.array([0.2, 0.5, 0.9, 0.4, 0.9]), np.array([0.9, 0.6, 0.1, 0.5, 0.1])
    assert pareto(x, y).tolist() == [True, True, True, False, True]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points).T
    on = pareto(x, y)
    assert on.any()
    for i in np.flatnonzero(~on):
        assert ((x[on] >= x[i]) & (y[on] >= y[i])).any()


def test_one_column_figures_are_as_wide_as_a_column(run: Run, summary: dict) -> None:
    narrow = figure_context(run, summary, replicates=20, columns=1)
    with style.paper():
        for make in (catalogue.FIGURES[n] for n in ("retention", "reach", "forgetting", "gap")):
            figure = make(narrow)
            assert figure is not None
            assert figure.get_figwidth() == style.ONE_COLUMN


def test_pgf_needs_tex_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(BadRun, match="install one of xelatex, lualatex, pdflatex, or leave pgf out"):
        catalogue.require_format("pgf")


@pytest.mark.skipif(not any(map(shutil.which, catalogue.TEX)), reason="no TeX here: PGF is measured by xelatex, lualatex or pdflatex")
def test_pgf_is_written_where_tex_is(figures: dict, tmp_path: Path) -> None:
    catalogue.save(figures["gap"], tmp_path / "gap.pgf")
    text = (tmp_path / "gap.pgf").read_text()
    assert r"\begin{pgfpicture}" in text
    assert "balancedit" in text
