"""Small files in the published form of data sets that are not at hand, by the name of their stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Written:
    """A file and how its rows are made. lacks: as in `real_files.Case`; "revisions" where no fact changes twice."""

    file: str
    row: Callable[[int], dict[str, Any]]
    lacks: frozenset[str]

    def write(self, folder: Path, rows: int = 300) -> Path:
        (folder / self.file).write_text(json.dumps([self.row(i) for i in range(rows)]), encoding="utf-8")
        return folder


def concept(i: int) -> dict[str, Any]:
    """A record of ConceptEdit."""
    asked = {"prompt": f"Definition of craft {i} is", "phrase_prompt": f"The meaning of craft {i} is"}
    local = {"locality_prompt": f"Definition of trade {i} is", "locality_answer": f"the exchange of goods of kind {i}"}
    target = {"target_new_desc": f"a large boat with {i} masts that carries grain", "label": f"craft {i}"}
    return asked | local | target | {"instance_prompt": f"Whether Weaving {i} belongs to category craft {i}?"}


def article(i: int) -> dict[str, Any]:
    """A record of DocMEdit."""
    before = f"Ann {i} is a painter.\nShe lives in Oldtown {i} and works for Firm {i}. She has shown her pictures in twelve cities."
    after = before.replace("Oldtown", "Newtown").replace("twelve", "forty")
    evidence = [f"Ann_{i} INTRODUCTION Ann {i} moved to Newtown {i}."]
    return {"title": [f"Ann_{i}"], "normalized_inputs": before, "normalized_targets": after, "evidence": evidence, "id": [i]}


WRITTEN: dict[str, Written] = {
    "conceptedit-yearly": Written("final_gptj_inter.json", concept, frozenset({"paraphrases", "old answers"})),
    "docmedit-yearly": Written("docmedit.jsonl", article, frozenset({"revisions"})),
}
