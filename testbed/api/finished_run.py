"""`testbed.study(RunConfig(...))` and the object that it returns, which reads everything from the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from testbed.ask import AskConfig, AskResult, ask
from testbed.experiment import runner
from testbed.experiment.config import BadConfig, RunConfig
from testbed.experiment.rebuild import StoredRun, rebuild
from testbed.storage.files import StoreError, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.reading.load import Run


def study(config: RunConfig, say: Callable[[str], None] = print) -> FinishedRun:
    """Run every editor of the configuration over its stream, write the run folder, and return the run.

    say: callback for messages to the user, one line each. Raises what `testbed.experiment.runner.study` raises.
    """
    summary = runner.study(config, say)
    return FinishedRun(summary["run"]["folder"])


class FinishedRun:
    """A run as its folder holds it: answers, summary, figures, and the edited models to ask.

    Args:
        folder: a run folder, of this process or of an earlier one, whose report has been written.
        device: where models are loaded that are asked (auto, cpu, cuda, ...).

    Raises `StoreError` for a folder without a summary.
    """

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        self.folder, self.device = Path(folder), device
        path = self.folder / "summary.json"
        if not path.is_file():
            remedy = f"python -m analysis {self.folder} makes one of it"
            raise StoreError(f"{self.folder} holds no summary.json: it is no finished run; {remedy}")
        self.summary: dict[str, Any] = read_json(path)
        """The content of summary.json."""

    @property
    def editors(self) -> list[str]:
        """Names of the editors of the run."""
        return list(self.summary["editors"])

    @property
    def report(self) -> Path:
        """The report as a page."""
        return self.folder / "report.html"

    @cached_property
    def _loaded(self) -> Run:
        from analysis.reading.load import load_run  # with pyarrow and pandas, which a run itself does not need in memory

        return load_run(self.folder)

    @cached_property
    def records(self) -> pd.DataFrame:
        """One row for each answer: editor, prompt, gold answer, and the columns of `analysis.reading.load.EditorRun.records`.

        step is the step after which it was asked, age the number of edits since; scores are shares, nan where not measured.
        """
        questions = self._loaded.questions
        parts = {name: run.records for name, run in self._loaded.editors.items()}
        joined = pd.concat(parts, names=["editor"]).reset_index(level=0).reset_index(drop=True)
        at = joined["question"].to_numpy()
        for place, name in enumerate(("prompt", "answer"), 1):
            joined.insert(place, name, questions[name].to_numpy()[at])
        return joined

    @property
    def edits(self) -> pd.DataFrame:
        """One row for each edit in the order of the run: prompt, target, previous answer, year, step."""
        return self._loaded.events

    @property
    def questions(self) -> pd.DataFrame:
        """One row for each question; the column `question` of `records` counts its rows."""
        return self._loaded.questions

    @cached_property
    def table(self) -> pd.DataFrame:
        """The main metrics, editors down; shares as numbers between 0 and 1, nan where not measured."""
        from analysis.metrics.comparison import main_columns, main_mode

        names = main_columns(self.summary, main_mode(self.summary))
        values = {e: [(m.get(n) or {}).get("value") for n in names] for e, m in self.summary["editors"].items()}
        return pd.DataFrame.from_dict(values, orient="index", columns=pd.Index(names), dtype=float)

    def figure(self, name: str = "retention") -> Figure:
        """A figure of the report, by name, as matplotlib's. Raises `BadConfig` for a name that is none, or one that was not measured."""
        from analysis.figures import catalogue, style
        from analysis.figures.context import figure_context

        if name not in catalogue.FIGURES:
            raise BadConfig(f"there is no figure {name!r}; there are {', '.join(catalogue.FIGURES)}")
        with style.paper():
            figure = catalogue.FIGURES[name](figure_context(self._loaded, self.summary))
        if figure is None:
            raise BadConfig(f"the run in {self.folder} lacks the measurements of the figure {name!r}")
        return figure

    @cached_property
    def _stored(self) -> StoredRun:
        return rebuild(self.folder, {"device": self.device})

    def ask(self, question: str, editor: str = "", as_of: int | None = None, image: str | Path | None = None) -> AskResult:
        """Put a question to the edited and to the unedited model; the model is loaded at the first question and kept.

        Args:
            question: what to ask, in the words that the model is to read.
            editor: which editor; not needed where there is one.
            as_of: the step after which to ask, 0 for none; the last by default.
            image: file of the picture that the question is about.

        Raises `BadConfig`, `BadPicture`, and what `testbed.experiment.rebuild.rebuild` raises.
        """
        picture = None if image is None else Path(image)
        return ask(AskConfig(self.folder, question, editor, as_of, picture, device=self.device), self._stored)

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.folder)!r}): {self._title}\n{self.table.T.to_string(float_format='{:.3f}'.format)}"

    @property
    def _title(self) -> str:
        run = self._loaded.manifest.get("config", {})
        return f"{len(self.edits)} edits of {run.get('stream', '?')} on {run.get('model', '?')} by {', '.join(self.editors)}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the main metrics as the report words them, and where the report lies."""
        from analysis.metrics.catalogue import header, shown

        metrics = self.summary["editors"]
        head = "".join(f"<th>{escape(e)}</th>" for e in metrics)
        cells = {name: "".join(f"<td>{escape(shown(name, m.get(name)))}</td>" for m in metrics.values()) for name in self.table.columns}
        rows = [f"<tr><th>{escape(header(name))}</th>{own}</tr>" for name, own in cells.items()]
        report = f'<a href="{escape(self.report.resolve().as_uri(), quote=True)}">{escape(str(self.report))}</a>'
        return f"<p>{escape(self._title)}; report: {report}</p><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
