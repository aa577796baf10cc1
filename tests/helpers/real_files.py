"""Which streams read files, where the real ones lie under TESTBED_DATA, and small copies of them for the shared suite."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """A stream on real files. `lacks` says what its source does not have: "paraphrases" for training, "rephrased" to ask,
    "old answers" from which an edit starts."""

    stream: str
    folder: str
    files: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    linked: tuple[str, ...] = ()


_MMEDIT = ("vqa/vqa_train.json", "vqa/vqa_eval.json", "vqa/vqa_eval_balancedit.json")
_CAPTION = ("caption/caption_train_edit.json", "caption/caption_eval_edit.json")
_KNOWEDIT = ("data/ZsRE/ZsRE-test-all.json", "data/wiki_counterfact/test_cf.json")
_ZSRE = ("data/zsre/fullTest/edit_data.json", "data/zsre/fullTest/query_data.json")
_YAGO = ("yago/triple2id.txt", "yago/entity2id.txt", "yago/relation2id.txt")
_REIGN = "data_sets/leaderlist_3_21.csv"
_ALL_DATED = (
    "templama/time_editing.json",
    "dyknow/qa_generated.json",
    "dyknow/grc_generated.json",
    *(f"yago11k/{name}" for name in _YAGO),
    f"reign/{_REIGN}",
)
_HALLU = "hallueditbench/data/questions/hallucination_final/meta_llama_3_8b_instruct"
_TOPICS = ("human_writer", "places_city", "places_country")
_NO_TRAIN = frozenset({"paraphrases"})

CASES: dict[str, Case] = {
    "mmedit-yearly on files": Case("mmedit-yearly", "mmedit", _MMEDIT, {"missing_images": "text"}, linked=("images",)),
    "mmedit-caption-yearly on files": Case(
        "mmedit-caption-yearly", "mmedit", _CAPTION, {"missing_images": "caption"}, _NO_TRAIN, linked=("images",)
    ),
    "counterfact-yearly": Case("counterfact-yearly", "counterfact", ("counterfact-train.json",), lacks=_NO_TRAIN),
    "zsre-yearly": Case("zsre-yearly", "zsre", _ZSRE, lacks=_NO_TRAIN | {"rephrased"}),
    "templama": Case("templama", "templama", ("time_editing.json",)),
    "dyknow": Case("dyknow", "dyknow", ("qa_generated.json", "grc_generated.json")),
    "yago": Case("yago", "yago11k", _YAGO),
    "leaders": Case("leaders", "reign", (_REIGN,)),
    "dated-facts": Case("dated-facts", ".", _ALL_DATED),
    "leaders-flags": Case("leaders-flags", ".", (f"reign/{_REIGN}",), linked=("flags",)),
    "vlkeb-yearly": Case("vlkeb-yearly", "vlkeb", ("train.json",), {"missing_images": "text"}, _NO_TRAIN),
    "hallueditbench-yearly": Case("hallueditbench-yearly", _HALLU, tuple(f"{topic}.csv" for topic in _TOPICS), lacks=_NO_TRAIN),
    "unke-yearly": Case("unke-yearly", "unke", ("final_data_v2.json",), lacks=_NO_TRAIN | {"old answers"}),
    "editevery-yearly": Case("editevery-yearly", "editevery", ("editevery.json",), lacks=_NO_TRAIN | {"rephrased", "old answers"}),
    "knowedit-yearly": Case("knowedit-yearly", "knowedit_portability", _KNOWEDIT, lacks=_NO_TRAIN),
}


def small_copy(case: Case, data_root: Path, to: Path, most: int = 400) -> Path:
    """The case's files under `to`, lists cut to `most` records; the folder to give as data root."""
    for name in case.files:
        source, target = data_root / case.folder / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name == "triple2id.txt":
            target.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[: 15 * most]), encoding="utf-8")
            continue
        if source.suffix != ".json":
            shutil.copyfile(source, target)
            continue
        top = json.loads(source.read_text(encoding="utf-8"))
        target.write_text(json.dumps(top[:most] if isinstance(top, list) else top), encoding="utf-8")
    for name in case.linked:
        (to / name).symlink_to(data_root / case.folder / name, target_is_directory=True)
    return to


def own_record(i: int) -> dict[str, Any]:
    """A record in the words of `jsonl:`."""
    asked = {"prompt": f"Who owns shop {i}?", "target": f"Ann {i}", "previous": f"Bob {i}", "relation": f"kind {i % 3}"}
    more = {"rephrase": [f"The owner of shop {i} is"], "train": [f"Name the owner of shop {i}."]}
    return {**asked, **more, "subject": f"shop {i}", "hard": f"Who owns stall {i}?", "hard_answer": f"Cy {i}"}
