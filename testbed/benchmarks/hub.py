"""Benchmarks of a suite from the Hugging Face hub (or its cache), for a user who has no files of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class NotOnHub(ValueError):
    """A dataset that cannot be loaded; the message says why in one line."""


def named(source: Mapping[str, Any]) -> str:
    """A dataset with its configuration and split, in words."""
    return f"{source['dataset']} ({source.get('config', 'its only configuration')}, {source['split']})"


def records(source: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Position and record of each row of a dataset of `suites.yaml`. Raises `NotOnHub`.

    With `last_word` the last word of a text is what continues the rest (LAMBADA, Paperno et al. 2016). Rows of running text
    that are empty or headings of WikiText are left out.
    """
    for i, row in enumerate(_load(source)):
        where, text = f"{source['dataset']}[{i}]", row.get("text")
        if not isinstance(text, str):
            yield where, row
        elif source.get("last_word"):
            context, _, word = text.rstrip().rpartition(" ")
            yield where, {"context": context, "continuation": word}
        elif text.strip() and not text.strip().startswith("="):
            yield where, {"text": text}


def _load(source: Mapping[str, Any]) -> Any:
    import datasets

    if "dataset" not in source:
        raise NotOnHub("it has no dataset of these samples")
    try:
        return datasets.load_dataset(source["dataset"], source.get("config"), split=source["split"])
    except Exception as e:  # datasets raises many kinds; each is a dataset that cannot be had
        raise NotOnHub(" ".join(str(e).split())[:200]) from e
