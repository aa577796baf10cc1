"""The table of docs/models.md: families x editors, each cell an edit made on a tiny model of the family.

python -m tests.helpers.families_table            print the table
python -m tests.helpers.families_table --write    put it into docs/models.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from testbed.core.events import EditBatch, EditEvent
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor
from testbed.model.families import UnknownLayout
from testbed.model.handle import weights_hash
from testbed.model.predictor import ModelPredictor
from tests.helpers.facts import POOL, fact
from tests.helpers.families import KINDS, PICTURED, build

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.helpers.families_table --write -->", "<!-- end of the table -->"
COLUMNS = {
    "finetune": "fine-tuning",
    "rome": "locate-then-edit",
    "balancedit": "codebook",
    "lora": "adapter",
    "ike": "facts in the prompt",
}
"""One editor of each package, and the kind that it stands for."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ike": {"encoder": "bm25"},
    "rome": {"steps": 150, "end": False},
    "finetune": {"steps": 40},
    "balancedit": {"steps": 100, "lr": 0.02},
    "lora": {"steps": 100, "lr": 0.02},
}
"""Settings with which an edit is learned on random weights of a small model, where a method's own are for trained models."""
WORKS = "yes"
_LEAST = 0.05
"""Nats a token by which an edit that is learned makes its target likelier."""


def edit(kind: str) -> EditEvent:
    """An edit, about a picture where the family reads pictures."""
    return fact("the old bridge", "green", picture=1 if kind in PICTURED else None)


@cache
def outcome(kind: str, name: str) -> str:
    """`WORKS`, or why the editor refuses the family. Raises AssertionError where an edit is made and does not do what it should."""
    handle, event = build(kind), edit(kind)
    old = ModelPredictor(handle).respond([event.ask()], [event.target], 6)[0]
    editor, before = EDITORS.get(name)(EDITORS.get(name).Config(**SETTINGS.get(name, {}))), handle.hash
    try:
        editor.prepare(handle, POOL)
        report = editor.apply(EditBatch((event,), 1))
    except (BadEditor, UnknownLayout) as e:
        return _reason(e)
    assert not report.failed, report.failed
    new = editor.predictor().respond([event.ask()], [event.target], 6)[0]
    assert old.score is not None and new.score is not None
    gain = float(new.score.logprobs.mean() - old.score.logprobs.mean())
    assert gain >= _LEAST or editor.traits.learns != "training", f"{name} on {kind}: the target became likelier by {gain:.3f} nats a token"
    assert new.generated != old.generated, f"{name} on {kind}: the edited prompt is answered as before, {old.generated!r}"
    assert weights_hash(handle.model) == before, f"{name} on {kind} wrote the base model's weights"
    return WORKS


def _reason(error: Exception) -> str:
    """The part of a refusal that holds for the family."""
    if isinstance(error, UnknownLayout):
        return "its layers have no down-projection (state-space layers)" if "no down-projection" in str(error) else str(error)
    return "routed experts without a shared one: no one matrix holds a fact" if "routed experts" in str(error) else str(error)


def table(kinds: Sequence[str] = KINDS, names: Sequence[str] = tuple(COLUMNS)) -> str:
    """The table in Markdown, and its notes."""
    found = {(k, n): outcome(k, n) for k in kinds for n in names}
    reasons = [*dict.fromkeys(r for r in found.values() if r != WORKS)]
    cell = {c: "yes" if r == WORKS else f"no ({reasons.index(r) + 1})" for c, r in found.items()}
    lines = ["| family | pictures | " + " | ".join(f"{COLUMNS[n]} (`{n}`)" for n in names) + " |", "|---" * (len(names) + 2) + "|"]
    lines += [f"| `{k}` | {'yes' if k in PICTURED else ''} | " + " | ".join(cell[k, n] for n in names) + " |" for k in kinds]
    return "\n".join([*lines, "", *(f"({i}) {reason}." for i, reason in enumerate(reasons, 1))])


def committed() -> str:
    """The table that docs/models.md holds."""
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    if not parser.parse_args().write:
        print(table())
        return
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
