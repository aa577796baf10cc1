"""Any source: `jsonl:FILE` (JSON lines or a JSON list) and `hub:DATASET[:CONFIG[:SPLIT]]` (Hugging Face `datasets`).

`fields` of the stream's configuration says which of the source's fields is which of ours:

    --stream jsonl:facts.jsonl --set stream.fields=prompt=question,target=new,previous=old
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from streams.base import BadStream, Skipped, StreamConfig
from streams.files.entry import EntryData, FactEntry
from streams.files.entry_stream import EntryStream
from streams.files.fields import RecordReader, as_object, columns, read_entry, read_rows
from streams.files.pictures import AnyPicture, FilePicture, StoredPicture
from streams.files.records import ABSENT, BadField, digest_of, optional_text, reasons, value_at
from testbed.core.events import BadPicture, content_id
from testbed.core.registry import STREAMS

FIELDS = (
    *("prompt", "target", "previous", "subject", "relation", "rephrase", "train", "image"),
    *("hard", "hard_answer", "text", "text_answer", "locality", "portability"),
)
"""Our field names; `prompt` and `target` are required. `hard` and `text` are locality questions; `locality` and
`portability` are lists of objects with prompt and ground_truth."""


def field_map(given: Sequence[str], row: object, where: str) -> dict[str, str]:
    """A map from our field names to the source's; a field that is not given keeps its name, where the source has that.

    Raises `BadStream`, with the fields that exist, for a map that names others.
    """
    out = {name: name for name in FIELDS if value_at(row, name) is not ABSENT}
    wrong = []
    for item in given:
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in FIELDS:
            wrong.append(f"{item!r} is not OURS=THEIRS with one of {', '.join(FIELDS)}")
        elif value_at(row, theirs) is ABSENT:
            wrong.append(f"{theirs!r} (for {ours}) is no field")
        else:
            out[ours] = theirs
    wrong += [f"nothing is given for {name}" for name in ("prompt", "target") if name not in out]
    if wrong:
        raise BadStream(f"{where}: {'; '.join(wrong)}. There are {columns(row)}. Set --set stream.fields=prompt=...,target=...")
    return out


class MappedStream(EntryStream):
    """Records of any source through a map of fields."""

    argument: ClassVar[str] = ""
    usage: ClassVar[str]

    def read(self, config: StreamConfig) -> EntryData:
        if not self.argument:
            raise BadStream(f"this stream needs its source in its name: {self.usage}")
        reader = RecordReader()
        rows, title, digest, pictures = self.rows(config, reader.skipped)
        first = next((r for r in rows if isinstance(r, Mapping)), None)
        if first is None:
            raise BadStream(f"{title}: no record is an object with fields ({reasons(reader.skipped) or 'there are no records'}).")
        form = field_map(config.fields, first, title)
        reader.total = len(rows)

        def entry(row: Any, name: str) -> FactEntry:
            made = read_entry(as_object(row), {k: v for k, v in form.items() if k != "image"}, name)
            made = replace(made, image=_picture(row, form, pictures))
            reader.take(made.key, "the same question")
            return made

        entries = list(reader.usable(rows, entry, lambda i, _: f"record {i}"))
        return reader.entry_data(entries, title, title, content_id(digest, sorted(form.items())))

    @abstractmethod
    def rows(self, config: StreamConfig, skipped: list[Skipped]) -> tuple[Sequence[Any], str, str, Path | None]:
        """The records, their title for `origin`, a hash of their content, and the folder that picture names start from."""


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
    if not picture.path.is_file():
        raise BadField("no file for image")
    return picture


@STREAMS.register("jsonl:")
class JsonLines(MappedStream):
    """Records of a JSON-lines file, or of a JSON list."""

    summary = "Your own records: jsonl:FILE, with --set stream.fields=prompt=...,target=... where names differ"
    licence = "the file's own"
    size = "as the file"
    usage = "jsonl:FILE"

    def rows(self, config: StreamConfig, skipped: list[Skipped]) -> tuple[Sequence[Any], str, str, Path | None]:
        path = Path(config.data_root or ".") / self.argument
        rows, digest = read_rows(path, skipped)
        return rows, f"file {path.name}", digest, path.parent


@STREAMS.register("hub:")
class HubDataset(MappedStream):
    """Records of a dataset on the Hugging Face hub, in its cache, or in a local folder."""

    summary = "A Hugging Face dataset: hub:DATASET[:CONFIG[:SPLIT]], with --set stream.fields=prompt=...,target=..."
    licence = "the dataset's own"
    size = "as the dataset"
    usage = "hub:DATASET[:CONFIG[:SPLIT]]"

    def rows(self, config: StreamConfig, skipped: list[Skipped]) -> tuple[Sequence[Any], str, str, Path | None]:
        name, part, split = (*self.argument.split(":"), "", "")[:3]
        table = _load(name, part, split or "train")
        mapped = {item.partition("=")[2].split(".")[0] for item in config.fields}
        kept = [c for c in table.column_names if c in mapped.union(FIELDS)]
        wrong = not kept or not mapped.issubset(table.column_names)  # the message then names all columns
        rows = [dict.fromkeys(table.column_names)] if wrong else _rows(table, kept, _roots(name))
        digest = content_id([{k: _hashable(v) for k, v in row.items()} for row in rows])
        return rows, f"dataset {Path(name).name} {part} {split or 'train'}".replace("  ", " "), digest, None


def _hashable(value: Any) -> Any:
    """A cell for the hash of the content: pictures by their key."""
    return value.key if isinstance(value, StoredPicture) else str(value) if isinstance(value, BadPicture) else value


def _roots(name: str) -> list[Path]:
    """Folders that the picture files of a dataset may lie in: its own, and the caches that downloads go to."""
    from datasets import config
    from huggingface_hub import constants

    caches = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return [Path(p).expanduser().resolve() for p in ([name] if Path(name).is_dir() else []) + list(map(str, caches))]


def _rows(table: Any, columns: Sequence[str], roots: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of these columns; the cells of a column of pictures are `StoredPicture`s, which decode at `load`."""
    import datasets

    shown = [c for c in columns if isinstance(table.features[c], datasets.Image)]
    others = [c for c in columns if c not in shown]
    rows = table.select_columns(others).to_list() if others else [{} for _ in range(len(table))]
    for column in shown:
        bare = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        for i, row in enumerate(rows):
            row[column] = _stored(bare, column, i, roots)
    return rows


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
        if (Path(name) / "state.json").is_file():
            return datasets.Dataset.load_from_disk(name)
        return datasets.load_dataset(name, part or None, split=split)
    except Exception as e:  # datasets raises many kinds; each is a source that cannot be used
        found = " ".join(str(e).split())[:300]
        raise BadStream(f"dataset {name!r} (configuration {part or 'default'}, split {split}) cannot be loaded: {found}") from e
