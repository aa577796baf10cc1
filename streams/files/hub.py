"""Your own records: `jsonl:FILE` and `csv:FILE` (either name reads any format), and `hub:DATASET[:CONFIG[:SPLIT]]`.

`fields` of the stream's configuration says which of the source's fields is which of ours:

    --stream jsonl:facts.jsonl --set stream.fields=prompt=question,target=new,previous=old,time=date

With `time`, the records are dated, and later records of one question are revisions of its first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from streams.base import BadStream, Skipped, StreamConfig
from streams.dated.states import time_of
from streams.files.entry import DatedChange, EntryData, EntryQuestion, FactEntry, QuestionKey
from streams.files.entry_stream import EntryStream
from streams.files.fields import QUESTIONS, SOURCES, RecordReader, as_object, columns, read_entry
from streams.files.pictures import AnyPicture, FilePicture, StoredPicture
from streams.files.records import ABSENT, BadField, digest_of, distinct, normalize, optional_text, reasons, texts_at, value_at
from streams.files.tables import read_rows
from testbed.core.events import BadPicture, EditEvent, content_id
from testbed.core.registry import STREAMS

_Edited = tuple[QuestionKey, str]
"""What an edit asks, and its target after `normalize`."""
JOINT = ("joint", "joint_answer", "joint_alias")
FIELDS = (
    *("prompt", "target", "previous", "subject", "relation", "rephrase", "rephrase_too", "train", "image", "time"),
    *(name for field in QUESTIONS for name in (field, f"{field}_answer")),
    *JOINT,
)
"""Our field names; `prompt` and `target` are required. `hard`, `text` and `locality` are locality questions; `joint` are
questions that follow from all the edits of a record together (MQuAKE)."""
FORMS = [form for source in SOURCES.values() for form in source.get("forms", {}).values()]
"""Published layouts of records."""
REWRITES = "requested_rewrite"
"""Field in which a record may hold a list of edits."""


def field_map(given: Sequence[str], rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, str]:
    """A map from our field names to the source's, over the fields of all records.

    A field that is not given keeps its name, where the source has that; `time` must be given. Where prompt or target are
    then missing, the fields of a published layout fill in. Raises `BadStream`, with the fields that exist, for others.
    """

    def exists(path: str) -> bool:
        return any(value_at(row, path) is not ABSENT for row in rows)

    named = {name: name for name in FIELDS if name != "time" and exists(name)}
    wrong = []
    for item in given:
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in FIELDS:
            wrong.append(f"{item!r} is not OURS=THEIRS with one of {', '.join(FIELDS)}")
        elif not exists(theirs):
            wrong.append(f"{theirs!r} (for {ours}) is no field")
        else:
            named[ours] = theirs
    if not {"prompt", "target"} <= named.keys():
        published = next((f for f in FORMS if exists(f["prompt"]) and exists(f["target"])), {})
        named = {name: path for name, path in published.items() if exists(path)} | named
    wrong += [f"nothing is given for {name}" for name in ("prompt", "target") if name not in named]
    if wrong:
        every = dict.fromkeys(name for row in rows for name in row)
        raise BadStream(f"{where}: {'; '.join(wrong)}. There are {columns(every)}. Set --set stream.fields=prompt=...,target=...")
    return named


class MappedStream(EntryStream):
    """Records of any source through a map of fields."""

    argument: ClassVar[str] = ""
    usage: ClassVar[str]

    def __init__(self, config: StreamConfig) -> None:
        if any(item.startswith("time=") for item in config.fields):
            self.supports = self.supports | {"since"}
        super().__init__(config)

    def read(self, config: StreamConfig) -> EntryData:
        if not self.argument:
            raise BadStream(f"this stream needs its source in its name: {self.usage}")
        self.unread: set[str] = set()
        reader = RecordReader()
        rows, title, digest, pictures = self.rows(config, reader.skipped)
        listed = [(i, name, edit) for i, row in enumerate(rows) for name, edit in _edits(f"record {i}", row)]
        objects = [row for _, _, row in listed if isinstance(row, Mapping)]
        if not objects:
            raise BadStream(f"{title}: no record is an object with fields ({reasons(reader.skipped) or 'there are no records'}).")
        self.form = form = field_map(config.fields, objects, title)
        self.invents, reader.total = "relation" in form, len(rows)
        used = {path.split(".")[0] for path in form.values()}
        self.unread |= {str(name) for row in objects for name in row} - used - set(form.values())
        together: dict[int, list[_Edited]] = defaultdict(list)

        def entry(item: tuple[int, str, Any], name: str) -> tuple[FactEntry, float]:
            row = as_object(item[2])
            made = replace(read_entry(row, form, name, reader.notes), image=_picture(row, form, pictures))
            together[item[0]].append((made.key, normalize(made.target)))
            if "time" in form:
                return made, time_of(value_at(row, form["time"]), form["time"])
            reader.take(made.key, "the same question")
            return made, 0.0

        made = list(reader.usable(listed, entry, lambda _, item: item[1]))
        changes: dict[str, list[DatedChange]] = {}
        entries = list(_in_time(reader, made, config.since, changes)) if "time" in form else [e for e, _ in made]
        if "joint" in form:
            entries = _with_joint(reader, entries, [(as_object(rows[i]), edits) for i, edits in together.items()], form)
        data = reader.entry_data(entries, title, title, content_id(digest, sorted(form.items())))
        return replace(data, changes=changes)

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        fields = ", ".join(f"{ours}={theirs}" for ours, theirs in self.form.items() if ours != theirs)
        out = [f"fields: {fields}"] if fields else []
        if self.unread:
            out.append(f"fields that are not read: {', '.join(sorted(self.unread))}")
        if not self.invents and self.time_axis == "scheduled":
            out.append("no relation is given (stream.fields=relation=...), so no revision is invented")
        return [*out, *super().notes(events)]

    @abstractmethod
    def rows(self, config: StreamConfig, skipped: list[Skipped]) -> tuple[Sequence[Any], str, str, Path | None]:
        """The records, their title for `origin`, a hash of their content, and the folder that picture names start from."""


def _edits(name: str, row: Any) -> Iterator[tuple[str, Any]]:
    """A record, or each edit of a record that holds a list of them, with its name."""
    edits = row.get(REWRITES) if isinstance(row, Mapping) else None
    if isinstance(edits, (list, tuple)):
        yield from ((f"{name} edit {k}", {**row, REWRITES: edit}) for k, edit in enumerate(edits))
    else:
        yield name, row


def _in_time(
    reader: RecordReader, made: Sequence[tuple[FactEntry, float]], since: int, changes: dict[str, list[DatedChange]]
) -> Iterator[FactEntry]:
    """One entry for all records of a question, its changes by rising date written to `changes`; changes before `since` are over."""
    by_key: dict[QuestionKey, list[tuple[FactEntry, float]]] = defaultdict(list)
    for e, time in sorted(made, key=lambda pair: pair[1]):
        by_key[e.key].append((e, time))
    for records in by_key.values():
        value, found = records[0][0].previous, []
        for e, time in records:
            if value is not None and normalize(e.target) == normalize(value):
                reader.skip(e.source, "the value is the one before")
                continue
            if found and e.previous is not None and normalize(e.previous) != normalize(value or ""):
                reader.notes["the old answer of a record is not the value before it, which is taken instead"] += 1
            found.append(DatedChange(value, e.target, time))
            value = e.target
        late = [c for c in found if c.time >= since]
        if not late:
            reader.skip(records[0][0].source, f"no change from {since} on" if found else "no change")
            continue
        first, every = records[0][0], [e for e, _ in records]
        changes[first.source] = late
        held_out = distinct([p for e in every for p in e.held_out], [first.prompt])
        yield replace(
            first,
            target=late[0].target,
            previous=late[0].previous,
            aliases=first.aliases if late[0] is found[0] else (),
            held_out=held_out,
            train=distinct([p for e in every for p in e.train], [first.prompt, *held_out]),
            questions=tuple(dict.fromkeys(replace(q, of_value=e.target) for e in every for q in e.questions)),
        )


def _with_joint(
    reader: RecordReader, entries: list[FactEntry], records: Sequence[tuple[Mapping[str, Any], list[_Edited]]], form: Mapping[str, str]
) -> list[FactEntry]:
    """The entries with the questions that follow from all edits of a record, each at the last of these edits."""
    by_key = {e.key: e for e in entries}
    added: dict[str, list[EntryQuestion]] = defaultdict(list)
    for row, edits in records:
        texts, answers = texts_at(row, form["joint"]), distinct(a for field in JOINT[1:] for a in texts_at(row, form.get(field)))
        holders = [by_key[key] for key, target in edits if key in by_key and normalize(by_key[key].target) == target]
        if not answers or len(holders) < len(list(_edits("", row))):
            reader.notes["questions that follow from several edits are not asked: an edit or the answer is missing"] += len(texts)
            continue
        needs = tuple(dict.fromkeys(e.source for e in holders[:-1] if e is not holders[-1]))
        made = (EntryQuestion("portability", q, answers[0], aliases=answers[1:], needs=needs) for q in texts)
        added[holders[-1].source] += made
    return [replace(e, questions=(*e.questions, *added[e.source])) if e.source in added else e for e in entries]


def _picture(row: Mapping[str, Any], form: Mapping[str, str], folder: Path | None) -> AnyPicture | None:
    held = row.get(form.get("image", ""))
    if isinstance(held, StoredPicture):
        return held
    if isinstance(held, BadPicture):
        raise held
    name = optional_text(row, form.get("image"))
    if name is None:
        return None
    if folder is None:
        raise BadField("a picture must lie in a column of pictures (datasets.Image), found text")
    picture = FilePicture(folder, name)
    if not picture.path.is_file() or not picture.size:
        raise BadField("the file for image is empty" if picture.path.is_file() else "no file for image")
    return picture


@STREAMS.register("jsonl:")
class OwnFile(MappedStream):
    """Records of a file: JSON, JSON lines, CSV, TSV or Parquet, told by its content."""

    summary = "Your own records: jsonl:FILE, with --set stream.fields=prompt=...,target=... where names differ"
    licence = "the file's own"
    size = "as the file"
    usage = "jsonl:FILE"

    def rows(self, config: StreamConfig, skipped: list[Skipped]) -> tuple[Sequence[Any], str, str, Path | None]:
        path = Path(config.data_root or ".") / self.argument
        rows, digest = read_rows(path, skipped)
        return rows, f"file {path.name}", digest, path.parent


@STREAMS.register("csv:")
class OwnTable(OwnFile):
    """The same reader under the name that one expects for a table."""

    summary = "Your own table: csv:FILE (CSV, TSV or Parquet), with --set stream.fields=prompt=...,target=... where names differ"
    usage = "csv:FILE"


@STREAMS.register("hub:")
class HubDataset(MappedStream):
    """Records of a dataset on the Hugging Face hub, in its cache, or in a local folder."""

    summary = "A Hugging Face dataset: hub:DATASET[:CONFIG[:SPLIT]], with --set stream.fields=prompt=...,target=..."
    licence = "the dataset's own"
    size = "as the dataset"
    usage = "hub:DATASET[:CONFIG[:SPLIT]]"

    def rows(self, config: StreamConfig, skipped: list[Skipped]) -> tuple[Sequence[Any], str, str, Path | None]:
        name, part, split = (*self.argument.split(":", 2), "", "")[:3]
        if Path(name).is_file():
            if part or split:
                raise BadStream(f"{name} is a file without configurations and splits: leave out {part}:{split}")
            rows, digest = read_rows(Path(name), skipped)
            return rows, f"file {Path(name).name}", digest, None
        table = _load(name, part, split)
        wanted = {item.partition("=")[2].split(".")[0] for item in config.fields}.union(FIELDS, *(form.values() for form in FORMS))
        kept = [c for c in table.column_names if c in wanted or c == REWRITES]
        self.unread = set(table.column_names) - set(kept)
        rows = _rows(table, kept, _roots(name)) if kept else [dict.fromkeys(table.column_names)]
        digest = content_id([{k: _hashable(v) for k, v in row.items()} for row in rows])
        return rows, f"dataset {Path(name).name} {part} {split or 'train'}".replace("  ", " "), digest, None


def _hashable(value: Any) -> Any:
    """A cell for the hash of the content: pictures by their key, what JSON has no form for by its text."""
    if isinstance(value, Mapping):
        return {str(k): _hashable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hashable(v) for v in value]
    return value.key if isinstance(value, StoredPicture) else value if isinstance(value, (str, int, float, type(None))) else str(value)


def _roots(name: str) -> list[Path]:
    """Folders that the picture files of a dataset may lie in: its own, and the caches that downloads go to."""
    from datasets import config
    from huggingface_hub import constants

    caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return [Path(p).expanduser().resolve() for p in ([name] if Path(name).is_dir() else []) + list(map(str, caches))]


def _rows(table: Any, columns: Sequence[str], roots: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of these columns, with the names of class labels; the cells of pictures are `StoredPicture`s, which decode at `load`."""
    import datasets

    kinds = {c: table.features[c] for c in columns}
    shown = [c for c in columns if isinstance(kinds[c], datasets.Image)]
    others = [c for c in columns if c not in shown]
    rows = table.select_columns(others).to_list() if others else [{} for _ in range(len(table))]
    for column in others:
        label = getattr(kinds[column], "feature", kinds[column])  # a list holds its label's kind
        for row in rows if isinstance(label, datasets.ClassLabel) else ():
            row[column] = _named(row[column], label)
    for column in shown:
        bare = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        for i, row in enumerate(rows):
            row[column] = _stored(bare, column, i, roots)
    return rows


def _named(value: Any, label: Any) -> Any:
    """The names of class labels, which are stored as numbers; -1 is no label."""
    if isinstance(value, list):
        return [_named(v, label) for v in value]
    return label.int2str(value) if isinstance(value, int) and value >= 0 else None


def _stored(table: Any, column: str, i: int, roots: Sequence[Path]) -> StoredPicture | BadPicture | None:
    """The picture of a cell, the error where its file cannot be read, or None for an empty cell."""
    where = f"in {column} of record {i}"

    def read() -> bytes:
        cell = table[i][column]
        try:
            return cell["bytes"] if cell["bytes"] is not None else _inside(cell["path"], where, roots).read_bytes()
        except OSError as e:
            raise BadPicture(f"picture {where} cannot be read: {e.strerror or e}") from e

    if table[i][column] is None:
        return None
    try:
        return StoredPicture(digest_of(read())[:16], where, read)
    except BadPicture as e:
        return e


def _inside(path: str, where: str, roots: Sequence[Path]) -> Path:
    """The file of a cell. Raises `BadPicture` for one outside the dataset's folders: a record must not show the machine's other files."""
    found = Path(path).resolve()
    if not any(found.is_relative_to(root) for root in roots):
        raise BadPicture(f"picture {where} leaves the dataset's folder: keep the files in it, or the pictures in the table itself")
    return found


def _load(name: str, part: str, split: str) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(name) if {p.name for p in Path(name).glob("*.json")} & {"state.json", "dataset_dict.json"} else None
        found = datasets.load_dataset(name, part or None, split=split or "train") if saved is None else saved
    except Exception as e:  # datasets raises many kinds; each is a source that cannot be used
        why = " ".join(str(e).split())[:300]
        raise BadStream(f"dataset {name!r} (configuration {part or 'default'}, split {split or 'train'}) cannot be loaded: {why}") from e
    if saved is not None and part:
        raise BadStream(f"dataset {name!r} was saved to disk without configurations: leave out {part!r}")
    if isinstance(saved, datasets.DatasetDict):
        if (split or "train") not in saved:
            raise BadStream(f"dataset {name!r} has no split {split or 'train'!r}; it has {', '.join(map(str, saved))} (name::SPLIT)")
        return saved[split or "train"]
    if saved is not None and split:
        raise BadStream(f"dataset {name!r} was saved to disk as one table without splits: leave out {split!r}")
    return found
