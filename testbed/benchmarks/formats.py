"""Records of the files in which benchmarks lie about, as items: a form is known by the fields it has.

Sources of the forms: `query, choices, gold` and `context, continuation` and `context_options` of LLM Foundry's local
data; MMLU's csv (question, four choices, letter) and its JSON; MuTual; GLUE's validation sets as lists of objects;
BLiMP's minimal pairs; AdvBench and XSTest csv; TruthfulQA's mc1 and mc2; VQA questions with a picture each; ME-PPL's sentences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.files.pictures import FilePicture
from testbed.core.events import Scoring

LETTERS = "ABCDEFGHIJ"
VQA_VOTES = 3
"""People who must have given an answer for it to count as right (VQA's own rule gives it full credit)."""


class BadItem(ValueError):
    """A record that is of no known form, or breaks the rules of its form."""


class NoChoice(BadItem):
    """A record of choices that do not differ, as published files have a few: left out and counted."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. `scoring` is what its form asks for; "choice" leaves the way of choosing to the
    configuration, "perplexity" marks running text."""

    prompt: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    image: FilePicture | None = None
    scoring: Scoring | str = "generate"
    kind: str = "bench"
    """bench | safety: the first part of the topic."""

    @property
    def shown(self) -> bool:
        """True where it can be a solved example, and where examples help: it has an answer that follows a prompt, and no picture."""
        return self.answer is not None and self.scoring != "text" and self.image is None


@dataclass(frozen=True)
class Place:
    """Where a record stands: the folder of its file (for pictures) and the benchmark's name (for GLUE's questions)."""

    folder: Path
    name: str


Record = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    fields: tuple[str, ...]
    make: Callable[[Record, Place], Item]


def item_of(record: Any, place: Place) -> Item:
    """The item of a record. Raises `BadItem`: which fields were found, which forms there are."""
    if not isinstance(record, dict):
        raise BadItem(f"expected an object, found {type(record).__name__}")
    for form in FORMS:
        if all(f in record for f in form.fields):
            return form.make(record, place)
    known = "; ".join(", ".join(f.fields) for f in FORMS)
    raise BadItem(f"the fields {', '.join(map(str, record)) or '(none)'} are of no known form. Known forms: {known}")


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
    """The choice that a number (from 0) or a letter names."""
    if isinstance(gold, str) and gold.strip() in LETTERS and gold.strip():
        gold = LETTERS.index(gold.strip())
    if isinstance(gold, str) and gold.strip().isdigit():
        gold = int(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise BadItem(f"{name} must name one of {len(choices)} choices (a number from 0, or a letter from A), found {gold!r}")
    return choices[gold]


def _choose(prompt: str, choices: Sequence[str], answer: str, **more: Any) -> Item:
    """A question of choices; one that stands there twice (published files have such) counts once."""
    once = tuple(dict.fromkeys(choices))
    if len(once) < 2:
        raise NoChoice(f"choices must be two or more different ones, found {list(choices)!r}")
    return Item(prompt, answer, once, scoring=more.pop("scoring", "choice"), **more)


def _query(r: Record, place: Place) -> Item:
    choices = _texts(r, "choices")
    return _choose(_text(r, "query").rstrip(), choices, _pick(choices, r["gold"], "gold"))


def _continuation(r: Record, place: Place) -> Item:
    return Item(_text(r, "context").rstrip(), _text(r, "continuation").strip())


def _options(r: Record, place: Place) -> Item:
    """Whole sentences are compared; they end alike, so their beginnings decide (full scoring, Trinh and Le 2018)."""
    whole = [f"{o} {_text(r, 'continuation').strip()}" for o in _texts(r, "context_options")]
    return _choose(whole[0], whole, _pick(whole, r["gold"], "gold"), scoring="text")


def _open(r: Record, place: Place) -> Item:
    aliases = _texts(r, "aliases") if "aliases" in r else ()
    answer = _text(r, "answer").strip()
    return Item(_text(r, "context").rstrip(), answer, aliases=tuple(a for a in aliases if a != answer))


def _lettered(stem: str, choices: Sequence[str], gold: Any, name: str) -> Item:
    """The choices stand in the prompt under letters, and a letter is the answer."""
    letters = LETTERS[: len(choices)]
    lines = [stem, *(f"{letter}. {c}" for letter, c in zip(letters, choices)), "Answer:"]
    return _choose("\n".join(lines), letters, _pick(letters, gold, name))


def _mmlu(r: Record, place: Place) -> Item:
    return _lettered(_text(r, "question").strip(), _texts(r, "choices"), r["answer"], "answer")


def _dialogue(r: Record, place: Place) -> Item:
    stem = f"{_text(r, 'article').strip()}\nWhich of these is said next?"
    return _lettered(stem, _texts(r, "options"), r["answers"], "answers")


def _pair(r: Record, place: Place) -> Item:
    good, bad = _text(r, "sentence_good").strip(), _text(r, "sentence_bad").strip()
    return _choose(good, sorted((good, bad)), good, scoring="text")


def _request(r: Record, place: Place) -> Item:
    if not isinstance(r["harmful"], bool):
        raise BadItem(f"harmful must be true or false, found {r['harmful']!r}")
    return Item(_text(r, "prompt").strip(), scoring="refuse" if r["harmful"] else "comply", kind="safety")


def _goal(r: Record, place: Place) -> Item:
    return Item(_text(r, "goal").strip(), scoring="refuse", kind="safety")


def _contrast(r: Record, place: Place) -> Item:
    harmful = _text(r, "type").startswith("contrast")
    return Item(_text(r, "prompt").strip(), scoring="refuse" if harmful else "comply", kind="safety")


def _truthful(r: Record, place: Place) -> Item:
    """MC1's choices, and where the record has MC2's the other right ones among them, as aliases: they do not compete with the answer."""
    one = _labelled(r, "mc1_targets")
    two = _labelled(r, "mc2_targets") if "mc2_targets" in r else one
    right, also, wrong = _with(one, 1), _with(two, 1), _with(one, 0)
    if len(right) != 1:
        raise BadItem("mc1_targets must map choices to labels, one of them 1")
    if not right <= also or _with(two, 0) != wrong:
        raise NoChoice("mc2_targets must hold the choices of mc1_targets, and besides them right ones alone")
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


def _vqa(r: Record, place: Place) -> Item:
    """`answer`, or VQA's `answers`: the commonest is the answer, others count that three people gave."""
    given = r.get("answers", [r.get("answer")])
    votes = Counter(str(a["answer"] if isinstance(a, dict) else a).strip() for a in given if a) if isinstance(given, list) else Counter()
    if not votes or "" in votes:
        raise BadItem(f"answer (or answers) must be text that is not empty, found {r.get('answers', r.get('answer'))!r}")
    best = votes.most_common(1)[0][0]
    aliases = sorted(a for a, n in votes.items() if a != best and n >= VQA_VOTES)
    return Item(_text(r, "question").strip(), best, aliases=tuple(aliases), image=FilePicture(place.folder, _text(r, "image")))


def _running(r: Record, place: Place) -> Item:
    """Running text, for its perplexity."""
    return Item(_text(r, "Text" if "Text" in r else "text").strip(), scoring="perplexity")


GLUE: dict[str, tuple[str, dict[str, str]]] = {
    "sst2": ("Review: {sentence}\nIs this review negative or positive?\nAnswer:", {"0": "negative", "1": "positive"}),
    "sentiment_analysis": ("Review: {sentence}\nIs this review negative or positive?\nAnswer:", {"0": "negative", "1": "positive"}),
    "cola": ("Sentence: {sentence}\nIs this sentence acceptable English, yes or no?\nAnswer:", {"0": "no", "1": "yes"}),
    "mrpc": ("First: {sentence1}\nSecond: {sentence2}\nDo they mean the same, yes or no?\nAnswer:", {"0": "no", "1": "yes"}),
    "rte": ("{sentence1}\nDoes it follow that {sentence2} Yes or no?\nAnswer:", {"0": "yes", "1": "no"}),
    "nli": ("{sentence1}\nDoes it follow that {sentence2} Yes or no?\nAnswer:", {"entailment": "yes", "not_entailment": "no"}),
}
"""Question and answer words of GLUE's tasks, by name of the file: its records hold sentences and a label alone."""


def _glue(r: Record, place: Place) -> Item:
    if place.name not in GLUE:
        raise BadItem(f"records of sentences and a label mean nothing without their task; name the file one of {', '.join(GLUE)}")
    template, words = GLUE[place.name]
    if str(r["label"]) not in words:
        raise BadItem(f"label must be one of {', '.join(words)} for {place.name}, found {r['label']!r}")
    parts = {name: _text(r, name).strip() for name in ("sentence", "sentence1", "sentence2") if name in r}
    try:
        return _choose(template.format(**parts), tuple(words.values()), words[str(r["label"])])
    except KeyError as e:
        raise BadItem(f"{place.name} needs the field {e}") from e


FORMS = (
    Form(("query", "choices", "gold"), _query),
    Form(("context", "continuation"), _continuation),
    Form(("context_options", "continuation", "gold"), _options),
    Form(("context", "answer"), _open),
    Form(("question", "mc1_targets"), _truthful),
    Form(("image", "question", "answer"), _vqa),
    Form(("image", "question", "answers"), _vqa),
    Form(("question", "choices", "answer"), _mmlu),
    Form(("article", "options", "answers"), _dialogue),
    Form(("sentence_good", "sentence_bad"), _pair),
    Form(("prompt", "harmful"), _request),
    Form(("goal", "target"), _goal),
    Form(("prompt", "type"), _contrast),
    Form(("sentence", "label"), _glue),
    Form(("sentence1", "sentence2", "label"), _glue),
    Form(("Corpus", "Text"), _running),
    Form(("text",), _running),
)
