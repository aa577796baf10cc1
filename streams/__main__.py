"""Command line that shows what a stream holds and how long it takes to read; it loads no model.

python -m streams mmedit-yearly --data-root DIR
python -m streams jsonl:facts.jsonl --fields prompt=question target=new
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from streams.base import BadStream, MissingImages, StreamConfig
from testbed.core.events import BadPicture
from testbed.core.registry import STREAMS, UnknownName
from testbed.core.terminal import ended_by_its_reader, replace_what_the_terminal_lacks


@dataclass(frozen=True)
class InspectConfig:
    """Read a stream's files and show what they hold."""

    stream: Annotated[str, tyro.conf.Positional]
    """Name of a stream."""
    data_root: Path | None = None
    """Folder of its files."""
    missing_images: MissingImages = "skip-absent"
    """Records without their picture: skip them (skip: those with a broken one too), ask without, or put their caption."""
    fields: tuple[str, ...] = ()
    """For `jsonl:`, `csv:` and `hub:`: OURS=THEIRS, as many as needed."""
    edits: int = 1000
    """Edits to make."""


def inspect_stream(config: InspectConfig) -> list[str]:
    """Lines of text about a stream. Raises `BadStream`, `BadPicture` or `UnknownName`."""
    settings = StreamConfig(data_root=config.data_root, missing_images=config.missing_images, fields=config.fields)
    began = time.process_time()
    stream = STREAMS.get(config.stream)(settings)
    loaded = time.process_time()
    events = stream.events(config.edits)
    made = time.process_time()
    manifest = stream.manifest()
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(Counter(e.kind for e in events).items()))
    lines = [f"{stream.name}: {stream.origin}", f"time: {stream.time_axis}; licence: {stream.licence}"]
    lines += [f"edits: {len(events):,} ({kinds})"] + [f"year {e.year}: {e.prompt} -> {e.target}" for e in events[:3]]
    lines += stream.notes(events)
    lines += [f"skipped: {n:,} x {reason}" for reason, n in sorted(manifest["skipped_by_reason"].items(), key=lambda r: -r[1])[:10]]
    lines += [f"broken picture: {problem}" for problem in list(manifest.get("broken_images", {}).values())[:10]]
    lines += [f"no picture for {field}: {n:,}" for field, n in manifest.get("missing_images", {}).items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [*lines, f"read in {loaded - began:.1f} s of CPU, edits made in {made - loaded:.1f} s, {peak:.2f} GB at most"]


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 2 where the stream cannot be used."""
    replace_what_the_terminal_lacks()
    config = tyro.cli(InspectConfig, args=None if argv is None else list(argv), prog="python -m streams")
    try:
        lines, code = inspect_stream(config), 0
    except (BadStream, BadPicture, UnknownName) as e:
        lines, code = [f"error: {e}"], 2
    sys.stdout.write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
