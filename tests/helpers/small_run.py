"""A run of a few edits on a random text model, made once a session, for what reads run folders."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

from testbed.experiment import runner
from testbed.experiment.config import RunConfig
from tests.helpers.models import folder

EDITS = 6


@cache
def small_run() -> Path:
    """noop, finetune and balancedit on GPT-2's architecture; six edits; without a report. Leave it as it is."""
    root = Path(tempfile.mkdtemp(prefix="small-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    facts = ({"prompt": f"Who owns the ship {i}?", "target": f"Ann {i}", "previous": f"Bob {i}", "relation": "owner"} for i in range(30))
    (root / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts), encoding="utf-8")
    (root / "more.jsonl").write_text('{"context": "the old bridge", "continuation": "stands"}\n', encoding="utf-8")
    editors = ("noop", "finetune", "balancedit")
    quick = ("finetune.steps=3", "balancedit.steps=3")
    asked = {"edits": EDITS, "probe_budget": 50, "max_new_tokens": 2, "benchmarks": (root / "more.jsonl",)}
    config = RunConfig("jsonl:facts.jsonl", editors, str(folder("gpt2")), root, device="cpu", out=root / "run", set=quick, **asked)
    with patch.object(runner, "finish", lambda out: {}):
        runner.study(config)
    return root / "run"
