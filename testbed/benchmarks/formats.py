"""The formats of published benchmark files, and a function for each that makes an item of a record.

A record's fields decide its format. Sources: `query, choices, gold`, `context, continuation` and `context_options` are
LLM Foundry's local data; ARC, PIQA, BoolQ (SuperGLUE) and WinoGrande as the Hugging Face hub has them; further MMLU's csv
(question, four choices, letter) and its JSON; MuTual; GLUE's validation sets as lists of objects; BLiMP's minimal pairs; the
csv files of AdvBench and XSTest; TruthfulQA's mc1 and mc2; VQA questions with a picture each; ME-PPL's sentences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.data import table
from streams.files.pictures import FilePicture
from testbed.core.events import Scoring

LETTERS = "ABCDEFGHIJ"
VQA_VOTES = 3
"""Number of annotators who must have given an answer for it to count as right (VQA's own rule gives it full credit)."""


class BadItem(ValueError):
    """A record that has no known format, or that breaks the rules of its format."""


class SkippedItem(BadItem):
    """A record with a defect that published files have, such as identical choices: it is skipped and counted."""


@dataclass(frozen=True)
class BenchmarkItem:
    """One question of a benchmark. Its format decides `scoring`: "choice" leaves the way of choosing to the configuration,
    and "perplexity" marks running text."""

    prompt: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    image: FilePicture | None = None
    scoring: Scoring | str = "generate"
    kind: str = "bench"
    """bench or safety; the first part of the topic."""

    @property
    def shown(self) -> bool:
        """True where the item can be a solved example: it has an answer that follows a prompt, and no picture."""
        return self.answer is not None and self.scoring != "text" and self.image is None


@dataclass(frozen=True)
class RecordSource:
    """Where a record comes from: the folder of its file (for pictures) and the benchmark's name (for GLUE's questions)."""

    folder: Path
    name: str


Record = Mapping[str, Any]


def item_of(record: Any, source: RecordSource) -> BenchmarkItem:
    """The item of a record. Raises `BadItem` with the fields that were found and the known formats."""
    if not isinstance(record, dict):
        raise BadItem(f"expected an object, found {type(record).__name__}")
    for fields, make in FORMATS.items():
        if all(f in record for f in fields):
            return make(record, source)
    known = "; ".join(map(", ".join, FORMATS))
    raise BadItem(f"the fields {', '.join(map(str, record)) or '(none)'} fit no known format. Known formats: {known}")


def _text(record: Record, name: str) -> str:
    value = record[name]
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or not str(value).strip():
        raise BadItem(f"{name} must be text that is not empty, found {value!r}")
    return str(value)


def _texts(record: Record, name: str) -> tuple[str, ...]:
    value = record[name]
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, (str, int, float)) and str(x).strip() for x in value):
        raise BadItem(f"{name} must be a list of texts that are not empty, found {value!r}")
    return tuple(str(x).strip() for x in value)


def _pick(choices: Sequence[str], gold: Any, name: str) -> str:
    """The choice that a number (from 0) or a letter (from A) names."""
    if isinstance(gold, str) and gold.strip() in LETTERS and gold.strip():
        gold = LETTERS.index(gold.strip())
    if isinstance(gold, str) and gold.strip().isdigit():
        gold = int(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise BadItem(f"{name} must name one of {len(choices)} choices (a number from 0, or a letter from A), found {gold!r}")
    return choices[gold]


def _choose(prompt: str, choices: Sequence[str], answer: str, **more: Any) -> BenchmarkItem:
    """A question with choices; a choice that is listed twice (published files have such) counts once."""
    once = tuple(dict.fromkeys(choices))
    if len(once) < 2:
        raise SkippedItem(f"choices must be two or more different ones, found {list(choices)!r}")
    return BenchmarkItem(prompt, answer, once, scoring=more.pop("scoring", "choice"), **more)


def _query(r: Record, source: RecordSource) -> BenchmarkItem:
    choices = _texts(r, "choices")
    return _choose(_text(r, "query").rstrip(), choices, _pick(choices, r["gold"], "gold"))


def _options(r: Record, source: RecordSource) -> BenchmarkItem:
    """Whole sentences with the same end are compared, so their beginnings decide (full scoring, Trinh and Le 2018)."""
    whole = [f"{o} {_text(r, 'continuation').strip()}" for o in _texts(r, "context_options")]
    return _choose(whole[0], whole, _pick(whole, r["gold"], "gold"), scoring="text")


def _open(r: Record, source: RecordSource) -> BenchmarkItem:
    aliases = _texts(r, "aliases") if "aliases" in r else ()
    answer = _text(r, "answer").strip()
    return BenchmarkItem(_text(r, "context").rstrip(), answer, aliases=tuple(a for a in aliases if a != answer))


def _lettered(stem: str, choices: Sequence[str], gold: Any, name: str) -> BenchmarkItem:
    """The prompt lists the choices under letters, and a letter is the answer."""
    letters = LETTERS[: len(choices)]
    lines = [stem, *(f"{letter}. {c}" for letter, c in zip(letters, choices)), "Answer:"]
    return _choose("\n".join(lines), letters, _pick(letters, gold, name))


def _science(r: Record, source: RecordSource) -> BenchmarkItem:
    """ARC's form on the hub: the choices and their labels (letters, in some records numbers) as two lists."""
    listed = r["choices"]
    if not isinstance(listed, dict) or not {"text", "label"} <= listed.keys() or r["answerKey"] not in listed["label"]:
        raise BadItem(f"choices must hold the lists text and label, and answerKey one of the labels, found {listed!r}, {r['answerKey']!r}")
    choices = _texts(listed, "text")
    return _choose(f"Question: {_text(r, 'question').strip()}", choices, choices[list(listed["label"]).index(r["answerKey"])])


def _goal(r: Record, source: RecordSource) -> BenchmarkItem:
    """PIQA's form on the hub: a goal and two ways to it."""
    ways = [_text(r, "sol1").strip(), _text(r, "sol2").strip()]
    return _choose(f"Question: {_text(r, 'goal').strip()}", ways, _pick(ways, r["label"], "label"))


def _yes_no(r: Record, source: RecordSource) -> BenchmarkItem:
    """BoolQ's form in SuperGLUE: label 1 is yes."""
    prompt = f"Passage: {_text(r, 'passage').strip()}\nQuestion: {_text(r, 'question').strip().rstrip('?')}?"
    return _choose(prompt, ("no", "yes"), _pick(("no", "yes"), r["label"], "label"))


def _blank(r: Record, source: RecordSource) -> BenchmarkItem:
    """WinoGrande's form on the hub: either option in the place of the blank, compared by the likelihood of the whole sentence."""
    sentence, options = _text(r, "sentence"), [_text(r, "option1"), _text(r, "option2")]
    if sentence.count("_") != 1 or str(r["answer"]) not in ("1", "2"):
        raise BadItem(f"sentence must have one blank (_) and answer be 1 or 2, found {sentence!r}, {r['answer']!r}")
    whole = [sentence.replace("_", option) for option in options]
    return _choose(whole[0], whole, whole[int(r["answer"]) - 1], scoring="text")


def _dialogue(r: Record, source: RecordSource) -> BenchmarkItem:
    stem = f"{_text(r, 'article').strip()}\nWhich of these is said next?"
    return _lettered(stem, _texts(r, "options"), r["answers"], "answers")


def _pair(r: Record, source: RecordSource) -> BenchmarkItem:
    good, bad = (_text(r, name).strip() for name in ("sentence_good", "sentence_bad"))
    return _choose(good, sorted((good, bad)), good, scoring="text")


def _request(r: Record, source: RecordSource) -> BenchmarkItem:
    if not isinstance(r["harmful"], bool):
        raise BadItem(f"harmful must be true or false, found {r['harmful']!r}")
    return _safety(r, "prompt", r["harmful"])


def _safety(r: Record, field: str, harmful: bool) -> BenchmarkItem:
    return BenchmarkItem(_text(r, field).strip(), scoring="refuse" if harmful else "comply", kind="safety")


def _truthful(r: Record, source: RecordSource) -> BenchmarkItem:
    """MC1's choices; where the record has MC2's, its other right ones are aliases, which do not compete with the answer."""
    one = _labelled(r, "mc1_targets")
    two = _labelled(r, "mc2_targets") if "mc2_targets" in r else one
    right, also, wrong = _with(one, 1), _with(two, 1), _with(one, 0)
    if len(right) != 1:
        raise BadItem("mc1_targets must map choices to labels, one of them 1")
    if not right <= also or _with(two, 0) != wrong:
        raise SkippedItem("mc2_targets must hold the choices of mc1_targets, and besides them right ones alone")
    prompt = f"Question: {_text(r, 'question').strip()}\nAnswer:"
    return _choose(prompt, sorted(also | wrong), *right, kind="safety", aliases=tuple(sorted(also - right)))


def _labelled(r: Record, name: str) -> dict[str, Any]:
    """Choices to labels, from a mapping or from two lists."""
    targets = r[name]
    if isinstance(targets, dict) and "choices" in targets and "labels" in targets:
        targets = dict(zip(targets["choices"], targets["labels"]))
    return targets if isinstance(targets, dict) else {}


def _with(labelled: Mapping[str, Any], label: int) -> set[str]:
    return {c for c, given in labelled.items() if given == label}


def _vqa(r: Record, source: RecordSource) -> BenchmarkItem:
    """`answer`, or VQA's `answers`: the commonest is the answer, and every other that three annotators gave is an alias."""
    given = r.get("answers", [r.get("answer")])
    votes = Counter(str(a["answer"] if isinstance(a, dict) else a).strip() for a in given if a) if isinstance(given, list) else Counter()
    if not votes or "" in votes:
        raise BadItem(f"answer (or answers) must be text that is not empty, found {r.get('answers', r.get('answer'))!r}")
    best = votes.most_common(1)[0][0]
    aliases = sorted(a for a, n in votes.items() if a != best and n >= VQA_VOTES)
    return BenchmarkItem(_text(r, "question").strip(), best, aliases=tuple(aliases), image=FilePicture(source.folder, _text(r, "image")))


GLUE: dict[str, dict[str, Any]] = table(__file__, "glue.yaml")


def _glue(r: Record, source: RecordSource) -> BenchmarkItem:
    if source.name not in GLUE:
        raise BadItem(f"records of sentences and a label mean nothing without their task; name the file one of {', '.join(GLUE)}")
    words = GLUE[source.name]["answers"]
    if str(r["label"]) not in words:
        raise BadItem(f"label must be one of {', '.join(words)} for {source.name}, found {r['label']!r}")
    parts = {name: _text(r, name).strip() for name in ("sentence", "sentence1", "sentence2") if name in r}
    try:
        return _choose(GLUE[source.name]["prompt"].format(**parts), tuple(words.values()), words[str(r["label"])])
    except KeyError as e:
        raise BadItem(f"{source.name} needs the field {e}") from e


FORMATS: dict[tuple[str, ...], Callable[[Record, RecordSource], BenchmarkItem]] = {
    ("query", "choices", "gold"): _query,
    ("context", "continuation"): lambda r, _: BenchmarkItem(_text(r, "context").rstrip(), _text(r, "continuation").strip()),
    ("context_options", "continuation", "gold"): _options,
    ("context", "answer"): _open,
    ("question", "mc1_targets"): _truthful,
    ("image", "question", "answer"): _vqa,
    ("image", "question", "answers"): _vqa,
    ("question", "choices", "answerKey"): _science,
    ("goal", "sol1", "sol2", "label"): _goal,
    ("passage", "question", "label"): _yes_no,
    ("sentence", "option1", "option2", "answer"): _blank,
    ("question", "choices", "answer"): lambda r, _: _lettered(_text(r, "question").strip(), _texts(r, "choices"), r["answer"], "answer"),
    ("article", "options", "answers"): _dialogue,
    ("sentence_good", "sentence_bad"): _pair,
    ("prompt", "harmful"): _request,
    ("goal", "target"): lambda r, _: _safety(r, "goal", True),
    ("prompt", "type"): lambda r, _: _safety(r, "prompt", _text(r, "type").startswith("contrast")),
    ("sentence", "label"): _glue,
    ("sentence1", "sentence2", "label"): _glue,
    ("Corpus", "Text"): lambda r, _: BenchmarkItem(_text(r, "Text").strip(), scoring="perplexity"),
    ("text",): lambda r, _: BenchmarkItem(_text(r, "text").strip(), scoring="perplexity"),
}
"""By the fields by which a format is recognised, the function that makes an item of a record."""
