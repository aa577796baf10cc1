"""Runs of four edits with given answers, small enough to compute their metrics by hand."""

from __future__ import annotations

from pathlib import Path

from analysis.metrics.summary import summarise
from analysis.reading.load import Run, load_run
from tests.helpers.fake_run import event, question, record, write_run

FEW = 200


def values(run: Run, editor: str = "e") -> dict[str, float]:
    return {k: v["value"] for k, v in summarise(run, replicates=FEW)["editors"][editor].items()}


def answer(hits: int, exact: bool | None = None, n: int = 2) -> dict:
    return {"token_hits": hits, "n_tokens": n, "logprob": -1.0, "exact": hits == n if exact is None else exact}


def small(out: Path, records: list[dict], base: list[dict] | None = None, **of_event: dict) -> Run:
    """Four edits in two years, one a step, asked with the given records."""
    events = [event(i, i + 1, time=i / 2, subject=f"s{i}", **of_event.get(f"e{i}", {})) for i in range(4)]
    splits = ("edit", "text_generality", "image_generality", "locality_hard", "locality_sibling", "portability", "stale")
    questions = [question(f"e{i}-{s}", f"e{i}", s) for i in range(4) for s in splits]
    questions += [question(f"g{i}", None, "general") for i in range(2)] + [question(f"x{i}", None, "text") for i in range(2)]
    return load_run(write_run(out, events, questions, {"e": records}, base))


def ask(edit: int, step: int, hits: int, split: str = "edit", **more: object) -> dict:
    time = {"probe_time": (step - 1) / 2} | more
    return record(edit_id=f"e{edit}", question_id=f"e{edit}-{split}", split=split, probe_step=step, **answer(hits), **time)


def now(edit: int, hits: int) -> dict:
    return ask(edit, edit + 1, hits, probe="right_after")
