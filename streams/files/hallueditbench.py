"""HalluEditBench on a yearly schedule: facts that a named model gets wrong, edited to what is true and asked from five sides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streams.base import BadStream, StreamConfig
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector, rotated, with_roles
from streams.files.entry_stream import EntryStream
from streams.files.fields import RecordReader, as_object, columns, read_entry
from streams.files.records import BadField, normalize, optional_text
from streams.files.tables import find_files, shortened, suffixes
from testbed.core.events import Split, content_id
from testbed.core.grading import content_words
from testbed.core.registry import STREAMS

PATH = "hallueditbench/data/questions/hallucination_final/*/*.csv"
"""Where the files lie in the release: one folder for each named model, one file for each topic."""
NEEDED = ("subject", "relation", "object", "question")
OUTPUT, VERDICT = "output_", "eval_"
"""What the names of the columns with a model's answer, and with its verdict (1: right), begin with."""
HOPS: dict[int, Split] = {
    2: "portability",
    3: "portability_3hop",
    4: "portability_4hop",
    5: "portability_5hop",
    6: "portability_6hop",
}
"""The split of the questions of each number of hops."""
YES_NO = ("Yes", "No")
SHORT = 4
"""Answers of fewer characters count as named only where they stand as whole words."""
_OPTION = re.compile(r"([A-Z])\. (.*?)(?=\s{2,}[A-Z]\. |$)")


def names(text: str, answer: str) -> bool:
    """Whether a question names an answer, in any case."""
    text, answer = text.casefold(), answer.casefold()
    return answer in text if len(answer) >= SHORT else re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def model_files(root: Path | None, model: str, stream: str) -> list[Path]:
    """The files of one named model under the data root. Raises `BadStream` where there is none, or several models and none is named."""
    below = (sorted(Path(root).glob(pattern)) for pattern in reversed(suffixes([PATH]))) if root and Path(root).is_dir() else ()
    files = [p for p in next(filter(None, below), None) or find_files(root, [PATH], stream) if p.is_file()]
    folders = sorted({p.parent for p in files})
    if len(folders) > 1:
        offered = shortened([p.name for p in folders], 12)
        folders = [p for p in folders if p.name == model]
        if not folders:
            raise BadStream(f"{root} holds the wrong answers of {offered}: name one of these models by stream.hallucinations_of")
    return sorted(p for p in files if p.parent == folders[0])


@dataclass
class FaceReader(RecordReader):
    """Turns the rows of one named model into entries, with the questions from every side.

    output: the column with the model's answers. reversed: how many rows ask each reversed question. asked: for each subject the
    content words of the questions about its facts.
    """

    output: str = ""
    reversed: Counter[str] = field(default_factory=Counter[str])
    asked: dict[str, list[frozenset[str]]] = field(default_factory=dict[str, list[frozenset[str]]])

    def read(self, files: Sequence[Path], model: str) -> tuple[FactEntry, ...]:
        """The entries of the files. Raises `BadStream` where a file is not of the form, or of another model than the one named."""
        rows = {path: self.rows(path) for path in files}
        for path, own in rows.items():
            self._check(path, own, model)
            self._survey(own)
        self.total = sum(map(len, rows.values()))
        return tuple(e for path, own in rows.items() for e in self.usable(own, self._entry, path.name))

    def _check(self, path: Path, rows: Sequence[Any], model: str) -> None:
        if not rows:
            return
        first = rows[0] if isinstance(rows[0], Mapping) else {}
        outputs = [c for c in first if c.startswith(OUTPUT)]
        if len(outputs) != 1 or not all(c in first for c in NEEDED):
            wanted = f"{', '.join(NEEDED)} and one column {OUTPUT}MODEL"
            raise BadStream(f"{path}: expected records with {wanted}; found {columns(rows[0])}. Is this the right file?")
        known = self.output.removeprefix(OUTPUT) or model
        if known and outputs[0] != OUTPUT + known:
            raise BadStream(f"{path} holds the wrong answers of {outputs[0].removeprefix(OUTPUT)}, not of {known}: give the folder of one")
        self.output = outputs[0]

    def _survey(self, rows: Sequence[Any]) -> None:
        """Count the reversed questions, and note what is asked about each subject; a row that cannot be read adds nothing."""
        for row in (r for r in rows if isinstance(r, Mapping)):
            texts = {
                name: str(row.get(name) or "") for name in ("subject", "question", "paraphrased_question", "reversed_relation_question")
            }
            self.reversed[normalize(texts["reversed_relation_question"])] += 1
            words = [content_words(texts[name]) for name in ("question", "paraphrased_question")]
            self.asked.setdefault(normalize(texts["subject"]), []).extend(w for w in words if w)

    def _entry(self, row: Any, where: str) -> FactEntry:
        form = {"prompt": "question", "target": "object", "previous": self.output, "subject": "subject", "relation": "relation"}
        e = read_entry(as_object(row), form | {"rephrase": "paraphrased_question"}, where, self.notes)
        if e.previous is None or e.subject is None:
            raise BadField(f"{self.output if e.previous is None else 'subject'} is absent or empty")
        if (optional_text(row, self.output.replace(OUTPUT, VERDICT, 1)) or "0").rstrip("0.") == "1":
            raise BadField(f"{self.output} counts as right: there is nothing to correct")
        if names(e.prompt, e.target):
            raise BadField("the question contains the answer")
        self.take((normalize(e.subject), normalize(e.relation)), "the same subject with the same relation")
        self.take(normalize(e.prompt), "the same prompt")
        held_out = tuple(p for p in e.held_out if self.fits(not names(p, e.target), "paraphrased_question", "contains the answer"))
        return replace(e, held_out=held_out, questions=tuple(self._questions(row, e, e.subject, e.previous)))

    def fits(self, good: bool, name: str, why: str) -> bool:
        """Whether a question can be asked; one that cannot is counted with the reason."""
        if not good:
            self.notes[f"{name} {why}: not asked"] += 1
        return good

    def text(self, row: Any, name: str) -> str | None:
        """The text of a column; one that is absent or empty is counted."""
        text = optional_text(row, name)
        self.fits(text is not None, name, "is absent or empty")
        return text

    def _questions(self, row: Any, e: FactEntry, subject: str, wrong: str) -> Iterator[EntryQuestion]:
        for name, answer, value in (("yes_question", "Yes", e.target), ("no_question", "No", wrong)):
            text = self.text(row, name)
            if text and self.fits(names(text, value), name, "does not name the answer that it is about"):
                yield EntryQuestion("generality_yes_no", text, answer, choices=YES_NO, scoring="sum")
                doubt = f"{e.prompt} {value}\nAre you sure? {text}"
                yield EntryQuestion("robustness", doubt, answer, choices=YES_NO, scoring="sum")
        yield from self._choice(row, e)
        if text := self.text(row, "reversed_relation_question"):
            unique = self.fits(self.reversed[normalize(text)] == 1, "reversed_relation_question", "is shared by several records")
            if unique and self.fits(not names(text, subject), "reversed_relation_question", "contains its answer"):
                yield EntryQuestion("generality_reversed", text, subject)
        for hops, split in HOPS.items():
            yield from self._hop(row, e, hops, split)
        if text := self.text(row, "locality_question"):
            own = content_words(text)
            new = self.fits(names(text, subject), "locality_question", "does not name the subject") and self.fits(
                not any(words <= own for words in self.asked[normalize(subject)]),
                "locality_question",
                "asks for a fact of a record in other words",
            )
            if new:
                yield EntryQuestion("locality_sibling", text)

    def _choice(self, row: Any, e: FactEntry) -> Iterator[EntryQuestion]:
        text, label = self.text(row, "multiple_choice_with_letters"), self.text(row, "multiple_choice_labels")
        if not text or not label:
            return
        options = {letter: option.strip() for letter, option in _OPTION.findall(text)}
        good = len(options) > 1 and len(set(map(normalize, options.values()))) == len(options)
        good = good and label in options and normalize(options[label]) == normalize(e.target)
        if self.fits(good, "multiple_choice_with_letters", "does not offer the answer once, under its label"):
            lines = [e.prompt, *(f"{letter}. {option}" for letter, option in options.items()), "Answer:"]
            yield EntryQuestion("generality_choice", "\n".join(lines), label, choices=tuple(options), scoring="sum")

    def _hop(self, row: Any, e: FactEntry, hops: int, split: Split) -> Iterator[EntryQuestion]:
        name = f"question_{hops}hop"
        text, answer = self.text(row, name), self.text(row, f"answer_{hops}hop")
        if text and answer:
            needed = self.fits(not names(text, e.target), name, "contains the edited answer, so that no hop is needed")
            if needed and self.fits(not names(text, answer) and normalize(answer) != normalize(e.target), name, "gives its answer away"):
                yield EntryQuestion(split, text, answer)


@STREAMS.register("hallueditbench-yearly")
class HalluEditBench(EntryStream):
    """What a named model gets wrong, edited to the true answer. Raises `BadStream` where the files cannot be used.

    `stream.hallucinations_of` names the model where the files of several lie under the data root. The old answer of an edit is
    that model's wrong one, so that `stream.keep=wrong` edits what the model of the run gets wrong too, and `believed` what it gets
    wrong in the same way. The other facts of a subject that no event touches are asked as sibling locality.
    """

    summary = "HalluEditBench: what a named model gets wrong, corrected and asked from five sides (needs --data-root)"
    licence = "HalluEditBench (Huang, Chen and Shu): MIT; facts: Wikidata, CC0"
    size = "2,272, 2,230 and 2,228 records of three models, in 26 topics"
    supports = EntryStream.supports | {"hallucinations_of"}
    true_targets = True
    far_controls = False

    def read(self, config: StreamConfig) -> EntryData:
        files = model_files(config.data_root, config.hallucinations_of, self.name)
        reader = FaceReader()
        entries = reader.read(files, config.hallucinations_of)
        title = f"HalluEditBench files, what {reader.output.removeprefix(OUTPUT)} gets wrong in {len(files)} topics"
        data = reader.entry_data(entries, title, str(files[0].parent), content_id(reader.digests))
        return replace(data, entries=with_roles(data.entries, key=lambda e: (e.subject, e.relation)))

    def _add_locality(self, collector: QuestionCollector, entry: FactEntry, own: list[EntryQuestion]) -> None:
        """Add the record's own sibling question, and one control each of the same relation, of another, and of the same subject."""
        super()._add_locality(collector, entry, own)
        self.add_controls(collector, entry, rotated(self._controls, "control of", entry.source))
