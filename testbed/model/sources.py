"""Where the weights of a model name lie: an alias, a GGUF file, a folder, or a hub id.

A GGUF file is dequantised once by transformers' own reader and kept as an ordinary model folder in a cache, because
reading one takes many seconds; edits and hashes then see an ordinary model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from testbed.model.handle import BadModel

GGUF_PACKAGES = ("gguf", "accelerate")
"""What transformers' GGUF reader needs; the extra `gguf` installs both."""
INSTALL_GGUF = "pip install -e '.[gguf]'"


@dataclass(frozen=True)
class ModelSource:
    """What `from_pretrained` is given for a model name, and a note for the manifest ("" for none)."""

    place: str
    note: str = ""


@cache
def aliases() -> dict[str, dict[str, str]]:
    """The table of aliases.yaml."""
    return yaml.safe_load((Path(__file__).parent / "aliases.yaml").read_text(encoding="utf-8"))


def find_source(name: str, dtype: torch.dtype) -> ModelSource:
    """The folder or hub id behind a model name. Raises `BadModel` where an alias is not installed or a file cannot be used."""
    alias = aliases().get(name)
    if alias is not None and "hub" in alias:
        return ModelSource(alias["hub"], alias["note"])
    if alias is not None:
        return ModelSource(str(dequantised(_inside_distribution(name, alias), dtype)), alias["note"])
    path = Path(name)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or (path.is_dir() and (path / "config.json").is_file()):
        return ModelSource(name)
    if len(files) > 1:
        raise BadModel(f"{name} holds {len(files)} GGUF files ({', '.join(f.name for f in files[:4])}): name one of them")
    if not files[0].is_file():
        raise BadModel(f"there is no file {files[0]}")
    return ModelSource(
        str(dequantised(files[0], dtype)), f"{files[0].name} was quantised: its weights went through fewer bits than those it came from"
    )


def _inside_distribution(name: str, alias: dict[str, str]) -> Path:
    """The file of an alias inside its installed distribution, its version and bytes checked; nothing of it is imported."""
    wanted = f"{alias['distribution']} {alias['version']}"
    try:
        found = importlib.metadata.distribution(alias["distribution"])
    except importlib.metadata.PackageNotFoundError as e:
        raise BadModel(f"--model {name} needs {wanted}, which is not installed: {alias['install']}") from e
    path = Path(str(found.locate_file(alias["file"])))
    if found.version != alias["version"] or not path.is_file():
        raise BadModel(f"--model {name} needs {wanted}, found version {found.version}: {alias['install']}")
    digest = sha256(path)
    if digest != alias["sha256"]:
        raise BadModel(f"{path} has SHA-256 {digest}, expected {alias['sha256']}: it is not the published file; {alias['install']}")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cache_folder() -> Path:
    """Folder for what is made once on a machine: TESTBED_CACHE, or the user's cache folder."""
    own = os.environ.get("TESTBED_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lifelong-editing-testbed"


def dequantised(path: Path, dtype: torch.dtype) -> Path:
    """The folder of a GGUF file as an ordinary model in this dtype, made at the first call and kept by the file's SHA-256.

    Raises `BadModel` for a file that transformers cannot read and where a package is missing.
    """
    missing = [p for p in GGUF_PACKAGES if find_spec(p) is None]
    folder = cache_folder() / "gguf" / f"{sha256(path)[:16]}-{str(dtype).removeprefix('torch.')}"
    if (folder / "config.json").is_file():
        return folder
    if missing:
        raise BadModel(f"{path.name} is a GGUF file, which needs the packages {' and '.join(missing)}: {INSTALL_GGUF}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _dequantise(path, dtype, folder)
    except OSError as e:
        raise BadModel(
            f"{path.name} cannot be dequantised into {folder.parent}: {e}; set TESTBED_CACHE to a folder that can be written"
        ) from e
    return folder


def _dequantise(path: Path, dtype: torch.dtype, folder: Path) -> None:
    """Write the model under a temporary name beside the folder, then rename it, so that a half-written one is never taken."""
    temporary = Path(tempfile.mkdtemp(prefix=".dequantising-", dir=folder.parent))
    try:
        model, tokenizer = _read(path, dtype)
        model.hf_quantizer = None  # the weights are ordinary ones from here on
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.name_or_path = path.name
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: Any = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as e:  # the reader raises whatever the first odd byte leads to
        raise BadModel(f"{path} has no tokenizer that transformers can read ({_reason(e)})") from e
    try:
        return AutoModelForCausalLM.from_pretrained(**where, dtype=dtype), tokenizer
    except Exception as e:
        raise BadModel(
            f"{path} cannot be read as a model ({_reason(e)}): the file is cut short, or transformers does not know its kind"
        ) from e


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
