"""Names and pages use the field's words: a list of words to avoid, with the word to write instead."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("testbed", "streams", "analysis") for p in (ROOT / package).rglob("*.py"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

EVERYWHERE = {
    "essence": 'KL prompt ("{subject} is a")',
    "essences": "KL prompts",
    "stems": "prefix KV cache",
    "ledger": "retrieval log, hit counts",
    "lesson": "training example",
    "lessons": "training examples",
    "courses": "training stages",
    "legs": "training phases",
    "wording": "prompt template",
    "wordings": "prompt templates",
    "spelled": "tokenized, tokenizable",
    "unspellable": "untokenizable",
    "carrier": "strategy state adapter",
    "pace": "step limiter",
    "scene": "figure context",
    "twin": "near-duplicate, device copy, scoring variant: say which",
    "twins": "near-duplicates, device copies, scoring variants: say which",
    "readings": "scoring modes",
}
"""Words to avoid in names and in pages, with the word to write instead."""
IN_NAMES = {
    "course": "training stage",
    "leg": "training phase",
    "room": "max batch, memory limit, token budget: say which",
    "places": "token positions, devices, paths: say which",
    "sites": "target modules, key positions",
    "zone": "positive radius",
    "looks": "image embedding, plot style: say which",
    "told": "message, given: say which",
    "spell": "tokenize",
    "moment": "checkpoint, second moment",
    "moments": "checkpoints, second moments",
}
"""Words to avoid in the names of classes, functions and parameters. Pages may use them in their everyday sense."""
IN_MODELS = {"heights": "layer outputs"}
"""Words to avoid in the names of `testbed`, where no figure is drawn."""
IN_CLASSES = {
    "tail": "ModelSuffix",
    "behind": "ModelSuffix",
    "above": "ModelSuffix",
    "span": "ModelSuffix",
    "stem": "PrefixCache",
    "place": "token position, device, path: say which",
}
"""Words to avoid in the names of classes."""
IN_PAGES = {
    "plain path": "reference implementation",
    "whole path": "reference implementation",
    "what is asked": "the question",
    "that which": "the thing itself",
    "whoever": "the role",
    "no telling": "unknown",
}
"""Phrases to avoid in pages."""
ALLOWED = {"second_moment", "second_moments"}
"""Terms of the field that hold such a word."""


def parts(name: str) -> set[str]:
    """The words of a name in snake_case or CamelCase, in small letters."""
    split = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    for term in ALLOWED:
        split = re.sub(rf"(?<![a-z]){term}(?![a-z])", "", split)
    return set(split.split("_"))


def names(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Name, line and whether it names a class, of every class, function and parameter of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, isinstance(node, ast.ClassDef)
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno, False


def words_to_avoid(name: str, of_class: bool, in_testbed: bool = True) -> dict[str, str]:
    """Words of a name that are to be avoided, with what to write instead."""
    avoided = {**EVERYWHERE, **IN_NAMES, **(IN_CLASSES if of_class else {}), **(IN_MODELS if in_testbed else {})}
    return {w: avoided[w] for w in sorted(parts(name) & avoided.keys())}


def prose(text: str) -> str:
    """A page without its code, in small letters."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^    .*$", " ", text, flags=re.DOTALL | re.MULTILINE).lower()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_of_classes_functions_and_parameters_use_the_fields_words(path: Path) -> None:
    in_testbed = path.is_relative_to(ROOT / "testbed")
    found = [(line, name, words_to_avoid(name, of_class, in_testbed)) for name, line, of_class in names(path)]
    wrong = [f"line {line}: {name}: for {w} write {instead}" for line, name, words in found for w, instead in words.items()]
    assert wrong == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_pages_use_the_fields_words(path: Path) -> None:
    text = prose(path.read_text(encoding="utf-8"))
    wrong = {w: instead for w, instead in {**EVERYWHERE, **IN_PAGES}.items() if re.search(rf"\b{w}\b", text)}
    assert wrong == {}


def test_a_word_is_found_in_every_form_of_a_name() -> None:
    assert words_to_avoid("StemCache", True) == {"stem": "PrefixCache"}
    assert words_to_avoid("make_wording", False) == {"wording": EVERYWHERE["wording"]}
    assert words_to_avoid("AnswerTail", True) == {"tail": "ModelSuffix"}
    assert words_to_avoid("detail", False) == words_to_avoid("tail", False) == {}
    assert words_to_avoid("second_moments", False) == words_to_avoid("heights", False, in_testbed=False) == {}
    assert words_to_avoid("heights", False) == IN_MODELS
    assert words_to_avoid("moments", False) == {"moments": IN_NAMES["moments"]}
    assert "ledger" not in prose("Text with `ledger` in code.\n```\nledger\n```\n")
