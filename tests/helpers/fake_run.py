"""Write run folders with invented answers of editors that retain, forget or never learn edits, without a model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from testbed.core.schema import SCHEMA_VERSION, BaseAnswer, EventRow, MonitorRow, QuestionRow, Record, ScheduleRow, columns, folder_name

ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list: pa.list_(pa.string())}
TOKENS = 3
ABILITIES = ("arithmetic", "reading", "logic")
GROUPS = ("bench:quiz", "safety:refusal")
UNRELATED = 24
"""Number of questions in the pool that is unrelated to any edit."""
AT_YEAR_END = ("locality_hard", "locality_sibling", "locality_far", "locality_text", "portability", "stale")
PANELS = {"ladder": "cohort_ladder", "fresh": "rotating_fresh", "unrelated": "fixed_unrelated"}
COSTS = {"noop": (0.0, 0), "oracle": (0.0001, 100), "finetune": (0.4, 20_000), "balancedit": (0.9, 1000)}
"""Seconds for an edit and bytes of state for an edit, by editor."""
EDITORS = ("noop", "oracle", "finetune", "balancedit")


@dataclass(frozen=True)
class Plan:
    """Size of the fake run; `stop` cuts it short after that step."""

    edits: int = 120
    years: int = 6
    editors: tuple[str, ...] = EDITORS
    seed: int = 0
    panel: int = 64
    stop: int | None = None
    time_axis: str = "simulated"


def write_rows(path: Path, row: type, rows: Iterable[dict[str, Any]]) -> None:
    """Writes dictionaries as parquet with the schema of a row dataclass; absent fields are null."""
    rows = list(rows)
    kinds = columns(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({n: pa.array([r.get(n) for r in rows], ARROW[t]) for n, (t, _) in kinds.items()}), path)


def record(**given: Any) -> dict[str, Any]:
    """A record with default values for the fields that a test does not set."""
    plain = {
        "run": "fake",
        "editor": "e",
        "seed": 0,
        "probe_step": 1,
        "probe_time": 0.0,
        "probe": "retention",
        "probe_version": 1,
        "split": "edit",
        "topic": "",
        "question_id": "q",
        "base_answer": "",
        "panel": "all",
        "incl_prob": 1.0,
        "seconds": 0.01,
        "extras": "{}",
    }
    unknown = set(given) - {f.name for f in fields(Record)}
    if unknown:
        raise TypeError(f"no such field: {unknown}")
    return plain | given


def event(number: int, step: int, **given: Any) -> dict[str, Any]:
    plain = {"edit_id": f"e{number}", "kind": "add", "step": step, "time": 0.0, "seq": number, "prompt": f"Who is {number}?"}
    return plain | {"target": f"t{number}", "source": "fake"} | given


def question(question_id: str, event_id: str | None = None, split: str = "edit", **given: Any) -> dict[str, Any]:
    plain = {"question_id": question_id, "event_id": event_id, "split": split, "prompt": f"prompt of {question_id}", "topic": ""}
    return plain | {"answer": "yes", "aliases": [], "choices": [], "scoring": "generate"} | given


def write_run(
    out: Path, events: list[dict], questions: list[dict], records: dict[str, list[dict]], base: list[dict] | None = None, **manifest: Any
) -> Path:
    """A run folder from rows, with one record file for each step and invented reports."""
    last = max((e["step"] for e in events), default=0)
    write_rows(out / "events.parquet", EventRow, events)
    write_rows(out / "questions.parquet", QuestionRow, questions)
    write_rows(out / "base" / "answers.parquet", BaseAnswer, base or [{"question_id": q["question_id"]} for q in questions])
    plain = {"panel": "all", "incl_prob": 1.0, "reason": "end", "probe": "retention"}
    write_rows(
        out / "schedule.parquet", ScheduleRow, [{"step": last, "action": "probe", "question_id": questions[0]["question_id"], **plain}]
    )
    for editor, rows in records.items():
        write_editor(out / folder_name(editor), editor, events, rows)
    known = {"run": "fake", "schema_version": SCHEMA_VERSION, "editors": list(records), "schedule_hash": "s", "seed": 0, "notes": []}
    stream = {"name": "fake", "origin": "made up", "time_axis": "simulated", "skipped": 0, "skipped_records": []}
    (out / "manifest.json").write_text(json.dumps(known | {"stream": stream, "model": {"name": "none"}} | manifest))
    return out


def write_editor(folder: Path, editor: str, events: list[dict], rows: list[dict]) -> None:
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for step in sorted({r["probe_step"] for r in rows}):
        part = [r | {"editor": editor} for r in rows if r["probe_step"] == step]
        write_rows(folder / "records" / f"step-{step:06d}.parquet", Record, part)
    seconds, size = COSTS.get(editor, (0.02, 1000))
    lines = []
    given: dict[int, list[str]] = defaultdict(list)
    for e in events:
        given[e["step"]].append(e["edit_id"])
    for step, ids in sorted(given.items()):
        report = {"step": step, "event_ids": ids, "seconds": seconds * len(ids), "peak_bytes": 4_000_000, "state_bytes": size * step}
        changes = editor == "finetune"
        own = {"delta_norm": step**0.5 if changes else None, "notes": {"loss": 0.1, "condition": 10.0 + step} if changes else {}}
        lines.append(json.dumps(report | {"failed": {}, "skipped": {}} | own))
    (folder / "edits.jsonl").write_text("\n".join(lines) + "\n")


class FakeHistory:
    """A history of edits and the answers of four kinds of editor about it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = np.random.default_rng(plan.seed)
        self.events = [self._event(i) for i in range(plan.edits)]
        self._supersede()
        self.questions = [q for e in self.events for q in self._questions(e)] + self._general()
        self.base = {q["question_id"]: self._base(q) for q in self.questions}

    def _event(self, i: int) -> dict:
        return event(i, i + 1, time=i * self.plan.years / self.plan.edits, subject=f"s{i // 2}", relation="owner", previous=f"old{i}")

    def _supersede(self) -> None:
        for i in range(10, self.plan.edits, 9):
            self.events[i] |= {"kind": "revise", "revises": f"e{i - 7}"}
            self.events[i - 7]["superseded_step"] = i + 1

    def _questions(self, e: dict) -> list[dict]:
        splits = ("edit", "text_generality", "image_generality", *AT_YEAR_END)
        return [question(f"{e['edit_id']}-{s}", e["edit_id"], s, answer=e["target"]) for s in splits]

    def _general(self) -> list[dict]:
        questions = [question(f"g{i}", None, "general", topic=ABILITIES[i % 3]) for i in range(30)]
        questions += [question(f"{t}{i}", None, "general", topic=t) for t in GROUPS for i in range(12)]
        questions += [question(f"u{i}", None, "locality_far", topic=ABILITIES[i % 3], answer=None) for i in range(UNRELATED)]
        return questions + [question(f"x{i}", None, "text", topic="running text", answer=None) for i in range(8)]

    def _base(self, q: dict) -> dict:
        row = {"question_id": q["question_id"], "answer": q["answer"], "n_tokens": TOKENS, "generated": "old"}
        if q["split"] == "text":
            return row | {"n_tokens": 40, "logprob": -80.0, "generated": None, "answer": None}
        right = q["split"].startswith("locality") or q["split"] == "stale" or (q["split"] == "general" and self.rng.random() < 0.8)
        hits = TOKENS if right else int(self.rng.integers(0, 2))
        return row | {"token_hits": hits, "logprob": -1.0 - TOKENS + hits, "exact": bool(right)}

    def chance(self, editor: str, split: str, age: int, step: int) -> float:
        """Probability that an answer is right, by age of the edit and by step."""
        worn, kept = np.exp(-step / (0.8 * self.plan.edits)), np.exp(-age / (0.5 * self.plan.edits))
        soft = {"edit": 0.97, "text_generality": 0.8, "image_generality": 0.7, "portability": 0.35, "stale": 0.1, "general": 0.78}
        if editor == "finetune":
            return {"stale": 0.25, "general": 0.8 * worn}.get(split, worn if split.startswith("locality") else soft.get(split, 0.5) * kept)
        return soft.get(split, 0.95) * (1 if split in ("general", "stale") or split.startswith("locality") else 0.85 + 0.15 * kept)

    def answer(self, editor: str, q: dict, e: dict | None, step: int) -> dict:
        base = self.base[q["question_id"]]
        shared = {"target": e and e["target"], "answer": q["answer"], "base_answer": base["generated"] or "", "topic": q["topic"]}
        shared |= {"question_id": q["question_id"], "split": q["split"], "edit_id": q["event_id"], "probe_step": step}
        shared |= {"probe_time": self.events[step - 1]["time"], "edit_step": e and e["step"], "edit_time": e and e["time"]}
        same = {k: base.get(k) for k in ("token_hits", "n_tokens", "logprob", "generated", "exact")}
        if q["split"] == "text":
            slope = 0.9 * (editor == "finetune") * step / self.plan.edits
            return shared | same | {"logprob": -80.0 - 40 * slope * self.rng.uniform(0.8, 1.2)}
        if editor == "noop" or (
            editor == "oracle" and q["split"] not in ("edit", "text_generality", "image_generality", "portability", "stale")
        ):
            return shared | same
        right = (
            q["split"] != "stale"
            if editor == "oracle"
            else self.rng.random() < self.chance(editor, q["split"], step - (e["step"] if e else 0), step)
        )
        hits = TOKENS if right else int(self.rng.integers(0, TOKENS))
        text = str(q["answer"]) if right else "<script>alert(1)</script>"
        return shared | {"token_hits": hits, "n_tokens": TOKENS, "logprob": -0.3 - TOKENS + hits, "generated": text, "exact": bool(right)}

    def live(self, step: int) -> list[dict]:
        return [e for e in self.events if e["step"] <= step and not (e.get("superseded_step") or np.inf) <= step]

    def panel_questions(self, step: int) -> list[tuple[str, str, dict | None, float]]:
        """(probe, question id, event, inclusion probability) after a step, the same for every editor."""
        panels = np.random.default_rng((self.plan.seed, step))
        now = [("right_after", f"e{step - 1}-{s}", self.events[step - 1], 1.0) for s in ("edit", "text_generality", "image_generality")]
        year_end = step == self.plan.edits or int(self.events[step]["time"]) > int(self.events[step - 1]["time"])
        if not year_end and step & (step - 1):
            return now
        live = self.live(step)
        size = len(live) if step == self.plan.edits else min(self.plan.panel, len(live))
        panel = [live[i] for i in panels.permutation(len(live))[:size]]
        share = size / len(live)
        now += [("retention", f"{e['edit_id']}-edit", e, share) for e in panel]
        if year_end:
            now += [("unrelated", f"u{i}", None, 0.5) for i in range(UNRELATED // 2)]
            now += [("fresh", f"u{i}", None, 0.5) for i in panels.permutation(UNRELATED)[: UNRELATED // 2]]
            probes = {"text_generality": "generality", "image_generality": "generality"} | {s: s.split("_")[0] for s in AT_YEAR_END}
            now += [(p, f"{e['edit_id']}-{s}", e, share) for s, p in probes.items() for e in panel]
            free = [q for q in self.questions if q["event_id"] is None and q["split"] != "locality_far"]
            now += [("general", q["question_id"], None, 1.0) for q in free]
        return now

    def ladder_questions(self, step: int) -> list[tuple[str, str, dict | None, float]]:
        """Questions about every third edit at ages of powers of two."""
        due = [e for e in self.live(step)[::3] if step > e["step"] and not (step - e["step"]) & (step - e["step"] - 1)]
        return [("ladder", f"{e['edit_id']}-edit", e, 1 / 3) for e in due]

    def records(self, editor: str) -> list[dict]:
        by_id = {q["question_id"]: q for q in self.questions}
        out = []
        for step in range(1, (self.plan.stop or self.plan.edits) + 1):
            for probe, question_id, e, share in [*self.panel_questions(step), *self.ladder_questions(step)]:
                given = {"probe": probe, "incl_prob": share, "panel": PANELS.get(probe, "all")}
                out.append(record(**given, **self.answer(editor, by_id[question_id], e, step)))
        return out

    def monitors(self, editor: str) -> list[dict]:
        """Two signals at every year's end and power of two."""
        steps = [s for s in range(1, (self.plan.stop or self.plan.edits) + 1) if len(self.panel_questions(s)) > 3]
        drift = 0.01 * (editor == "finetune")
        return [
            {"step": s, "name": n, "value": v} for s in steps for n, v in (("entropy", 2 - drift * s), ("hidden_cosine", 1 - drift * s / 2))
        ]


def fake_run(out: Path, plan: Plan = Plan(), **manifest: Any) -> Path:
    """A run folder with all files that the analysis reads."""
    history = FakeHistory(plan)
    records = {editor: history.records(editor) for editor in plan.editors}
    stream = {"name": "fake-yearly", "origin": "made up for tests", "time_axis": plan.time_axis, "licence": "MIT", "skipped": 2}
    stream |= {"skipped_by_reason": {"no answer": 2}, "skipped_records": ["file.json:3: no answer", "file.json:8: no answer"]}
    given = {
        "stream": stream,
        "years": plan.years,
        "edits": plan.edits,
        "config": {"stream": "fake-yearly", "edits": plan.edits},
    } | manifest
    write_run(out, history.events, history.questions, records, list(history.base.values()), **given)
    for editor in plan.editors:
        rows = history.monitors(editor)
        for step in sorted({r["step"] for r in rows}):
            write_rows(
                out / folder_name(editor) / "monitors" / f"step-{step:06d}.parquet", MonitorRow, [r for r in rows if r["step"] == step]
            )
    return out
