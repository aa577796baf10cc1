"""Write a run folder with millions of invented answers, to measure the analysis: python tests/helpers/big_run.py OUT [RECORDS].

python tests/helpers/big_run.py /tmp/big 10000000 && time python -m analysis /tmp/big
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from testbed.core.schema import Record, columns
from tests.helpers.fake_run import ARROW, event, question, write_run

EDITORS = ("plain", "keeps", "forgets", "breaks", "gates")
EDITS, YEARS, CHECKPOINTS = 20_000, 20, 40
SPLITS = ("edit", "text_generality", "image_generality", "locality_hard", "locality_far", "portability", "stale")
EDIT_IDS = pa.array([f"e{i}" for i in range(EDITS)])
GATED, POOL = "gates", 50_000
"""The editor whose answers name an entry; the number of different extras of each editor, too many for a dictionary page."""
QUESTION_IDS = pa.array([f"{i:08x}-{s}" for i in range(EDITS) for s in SPLITS])


def main(out: Path, records: int) -> None:
    events = [event(i, i + 1, time=i * YEARS / EDITS, subject=f"subject {i // 2}", relation="owner") for i in range(EDITS)]
    questions = [question(f"{i:08x}-{s}", f"e{i}", s) for i in range(EDITS) for s in SPLITS]
    write_run(out, events, questions, {e: [] for e in EDITORS}, config={"stream": "made-up", "seed": 0}, edits=EDITS)
    steps = np.linspace(EDITS / CHECKPOINTS, EDITS, CHECKPOINTS).astype(int)
    panel = _panel(records // len(EDITORS), steps)
    for number, editor in enumerate(EDITORS):
        rng = np.random.default_rng(number)
        extras = pa.array(_extras(editor, rng))
        for step in steps:
            pq.write_table(_answers(editor, int(step), panel, extras, rng), out / editor / "records" / f"step-{step:06d}.parquet")


def _panel(records: int, steps: np.ndarray) -> int:
    """Number of edits in a panel with which an editor gives about so many answers; at most all edits."""
    after = 3 * EDITS
    return next(n for n in range(50, EDITS + 50, 50) if len(SPLITS) * np.minimum(steps, n).sum() + after >= records or n == EDITS)


def _extras(editor: str, rng: np.random.Generator) -> list[str]:
    """Extras of answers: POOL with the likeliest first tokens, and one without."""
    entry = {"entry": "e1"} if editor == GATED else {}
    return [*(json.dumps(entry | {"first_ids": ids}) for ids in rng.integers(0, 32_000, (POOL, 10)).tolist()), json.dumps(entry)]


def _answers(editor: str, step: int, panel: int, extras: pa.Array, rng: np.random.Generator) -> pa.Table:
    """Answers after a step: every split of live edits drawn at random, and the newest edits right after they were made."""
    new = np.arange(step - EDITS // CHECKPOINTS, step)
    chosen = np.random.default_rng(step).permutation(step)[:panel]
    edit = np.concatenate([np.tile(chosen, len(SPLITS)), np.tile(new, 3)])
    per_split = (len(edit) - 3 * len(new)) // len(SPLITS)
    split = np.concatenate([np.repeat(np.arange(len(SPLITS)), per_split), np.repeat(np.arange(3), len(new))])
    after, size = np.arange(len(edit)) >= len(SPLITS) * per_split, len(edit)
    hits = rng.integers(0, 4, size)
    made = {"edit_id": EDIT_IDS.take(pa.array(edit)), "question_id": QUESTION_IDS.take(pa.array(edit * len(SPLITS) + split))}
    made |= {
        "split": pa.array(SPLITS).take(pa.array(split)),
        "probe": pa.array(["retention", "right_after"]).take(pa.array(after.astype(int))),
    }
    made |= {"generated": pa.array(["another answer", "right answer"]).take(pa.array((hits == 3).astype(int)))}
    local = np.char.startswith(np.array(SPLITS), "locality")[split]
    made |= {"extras": extras.take(pa.array(np.where(local, rng.integers(0, POOL, size), POOL)))}
    numbers = {"edit_step": edit + 1, "token_hits": hits, "logprob": -rng.random(size), "exact": hits == 3}
    made |= {k: pa.array(v) for k, v in (numbers | {"incl_prob": np.where(after, 1.0, per_split / step)}).items()}
    same = {"run": "big", "editor": editor, "topic": "owner", "answer": "right answer", "target": "right answer", "base_answer": "old"}
    same |= {"seed": 0, "probe_version": 1, "seconds": 0.01, "n_tokens": 3, "panel": "age_mixed"}
    same |= {"probe_step": step, "probe_time": (step - 1) * YEARS / EDITS}
    kinds = {k: ARROW[t] for k, (t, _) in columns(Record).items()}
    filled = {k: pa.repeat(pa.scalar(v, kinds[k]), size) for k, v in same.items()}
    return pa.table({k: made[k].cast(kinds[k]) if k in made else filled.get(k, pa.nulls(size, kinds[k])) for k in kinds})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000_000)
