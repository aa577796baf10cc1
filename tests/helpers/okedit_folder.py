"""A small hand-written folder of the OKEDIT layout, shared by the loader's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

ANNOTATIONS = "mscoco_val2014_annotations_train.json"
QUESTIONS = "OpenEnded_mscoco_val2014_questions_train.json"


def annotation(qid: int, target: str = "cat", answer: str = "dog") -> dict[str, Any]:
    return {
        "question_id": qid,
        "image_id": qid // 10,
        "question_type": "one",
        "answers": [{"answer": answer, "answer_id": i} for i in range(3)],
        "counterfact_answer": f"{target} {qid}",
        "locality_answer": "fish",
    }


def question(qid: int) -> dict[str, Any]:
    return {
        "question_id": qid,
        "image_id": qid // 10,
        "question": f"What animal is number {qid}?",
        "rephrased_questions": [f"Which animal has number {qid}?", f"Number {qid} is what animal?"],
        "rephrased_questions_train": [f"Name animal {qid}.", f"which animal has number {qid}"],
    }


def paint(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade % 256, shade // 256 % 256, shade // 65536 % 256)).save(path)


def make_folder(root: Path, qids: list[int]) -> Path:
    """A hand-written folder of the official layout; the photo of question q is number q // 10."""
    root.mkdir(parents=True, exist_ok=True)
    top = {"annotations": [annotation(q) for q in qids], "question_types": {"one": "Animals &amp; co"}}
    (root / ANNOTATIONS).write_text(json.dumps(top))
    (root / QUESTIONS).write_text(json.dumps({"questions": [question(q) for q in qids]}))
    for q in qids:
        paint(root / "val2014" / f"COCO_val2014_{q // 10:012d}.jpg", q)
        for i in (0, 1):
            paint(root / "rephrased_images" / str(q) / f"{i}.png", q + 100_000 * (i + 1))
        paint(root / "locality_images_dalle2" / str(q) / "0.webp", q + 300_000)
    return root
