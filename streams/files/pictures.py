"""Pictures in files: decoded at `load` and not before, named by their content, bounded in size."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from testbed.core.events import BadPicture

MAX_PIXELS = 50_000_000
"""Largest picture that is decoded, in pixels; the header is read first, so a decompression bomb is never unpacked."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_COCO = re.compile(r"COCO_\w+_(\d{12})$")


@dataclass(frozen=True)
class FilePicture:
    """A picture file under `root` (satisfies `testbed.core.events.Picture`).

    `name` is its path relative to `root`, with forward slashes. `key` is the SHA-256 of the file's bytes (16
    hex digits), read at first use: copies of a file are one picture, on any machine and under any name.
    """

    root: Path
    name: str

    @property
    def path(self) -> Path:
        """Path of the file. Raises `BadPicture` for a name that leaves the root."""
        if not stays_inside(self.name):
            raise BadPicture(f"picture {self.name!r} leaves the folder {self.root}: expected a relative path without '..'")
        return self.root / self.name

    @cached_property
    def size(self) -> int:
        """Bytes of the file. Raises `BadPicture` when it is absent."""
        path = self.path
        try:
            if not path.is_file():
                raise BadPicture(f"picture {path} is absent or not a file. Put it there, or choose --missing-images skip.")
            return path.stat().st_size
        except OSError as e:
            raise BadPicture(f"picture {path} cannot be read: {e.strerror or e}") from e

    @property
    def key(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        if self.size == 0:
            raise BadPicture(f"picture {self.path} is empty: fetch it again")
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as e:
            raise BadPicture(f"picture {self.path} cannot be read: {e.strerror or e}") from e

    @cached_property
    def transparent(self) -> bool:
        """Whether the file has transparent pixels, which are laid on white; False where it cannot be read."""
        from PIL import Image

        try:
            with Image.open(self.path) as opened:
                return opened.has_transparency_data
        except Exception:  # `load` says what is wrong
            return False

    def load(self) -> np.ndarray:
        """RGB, uint8, (height, width, 3), turned as its EXIF orientation says, transparency laid on white. Raises `BadPicture`."""
        if self.size == 0:
            raise BadPicture(f"picture {self.path} is empty: fetch it again")
        return _decode(self.path, str(self.path))


@dataclass(frozen=True)
class StoredPicture:
    """A picture inside a data set: `read` gives the bytes of its file, `where` says which it is (satisfies `Picture`)."""

    key: str
    where: str = field(compare=False)
    read: Callable[[], bytes] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.key

    def load(self) -> np.ndarray:
        """As `FilePicture.load`. Raises `BadPicture`."""
        return _decode(io.BytesIO(self.read()), self.where)


AnyPicture = FilePicture | StoredPicture
"""A picture that a record shows."""


def stays_inside(name: str) -> bool:
    """Whether a name with forward slashes is a path under the folder that it starts from, on any system."""
    steps = [step for step in name.split("/") if step not in ("", ".")]
    odd = name.startswith("/") or any(c in name for c in "\\\0")
    return bool(steps) and not odd and ".." not in steps and ":" not in steps[0]


def _decode(source: Path | io.BytesIO, where: str) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise BadPicture(f"picture {where} has {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it down")
            opened.load()
            image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F"):
            raise BadPicture(f"picture {where} has 32-bit pixels without a scale: save it with 8 bits a channel")
        if image.mode.startswith("I;16"):  # PIL would clip deep grey to white
            return np.repeat((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.has_transparency_data:
            seen = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except BadPicture:
        raise
    except Exception as e:  # a decoder fed with broken bytes may raise anything
        raise BadPicture(f"picture {where} is not a picture, or cut short ({type(e).__name__}: {e}): fetch it again") from e


def same_pixels(a: FilePicture, b: FilePicture) -> bool:
    """Whether two files are copies. Reads them only where their sizes are equal."""
    return a.size == b.size and a.key == b.key


def list_folder(path: Path) -> list[os.DirEntry[str]]:
    """Entries by name; empty when the folder is absent or unreadable."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError:
        return []


def coco_photos(root: Path, first: str) -> dict[int, str]:
    """Photos `*2014/COCO_*_{image_id:012d}.*` under root: image id to relative path, folder `first` preferred."""
    folders = [e.name for e in list_folder(root) if e.name.endswith("2014") and e.is_dir()]
    found: dict[int, str] = {}
    for folder in sorted(folders, key=lambda name: (name != first, name)):
        for entry in list_folder(root / folder):
            stem, suffix = os.path.splitext(entry.name)
            match = _COCO.match(stem)
            if match and suffix.lower() in SUFFIXES:
                found.setdefault(int(match[1]), f"{folder}/{entry.name}")
    return found


def numbered(root: Path, folder: str) -> Iterator[FilePicture]:
    """Pictures of a folder (relative to root) whose names are numbers, in numeric order; empty files left out."""
    entries = [(e.name.partition("."), e) for e in list_folder(root / folder)]
    rows = [(int(stem), e) for (stem, _, _), e in entries if stem.isascii() and stem.isdigit() and len(stem) < 10]
    for _, entry in sorted(rows, key=lambda row: (row[0], row[1].name)):
        if os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file() and entry.stat().st_size:
            yield FilePicture(root, f"{folder}/{entry.name}")
