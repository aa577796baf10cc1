"""SERAC's scope classifier: does a question lie in the scope of a stored edit? A small text encoder, and with it a map of pictures.

A text is the mean of learned vectors of its tokens, weighted by the softmax of a learned number a token, so that words that do not
tell facts apart can lose their weight. With phi(z) of an edit and phi(x) of a question,

    s(z, x) = exp(-c |phi(z) - phi(x)|^2)                                                               (1)

(Mitchell et al. 2022, arXiv 2206.06520, section 3.2). With a picture in the scope, phi has the mapped embedding of the picture
behind that of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.editors.meta.examples import generator_of
from testbed.editors.retrieval.retriever import image_embedding
from testbed.model.handle import ModelHandle

_LEAST = 1e-4
"""Probabilities of a pair lie this far from 0 and 1 in the loss."""


@dataclass(frozen=True)
class ScopeClassifier:
    """tensors, float32: E (V, e) vectors and a (V,) weights of the tokens, c () its logarithm, and P (d, e) the map of pictures.

    pictures: whether pictures take part.
    """

    handle: ModelHandle
    tensors: Mapping[str, Tensor]
    pictures: bool

    @classmethod
    def fresh(cls, handle: ModelHandle, width: int, pictures: bool, seed: int) -> ScopeClassifier:
        """Random vectors, equal weights and c = 1 at distances of about 2 between unlike texts."""
        generator, vocabulary = generator_of(seed, 0), len(handle.tokenizer)
        tensors = {
            "E": torch.randn(vocabulary, width, generator=generator) * (4 / width) ** 0.5,
            "a": torch.zeros(vocabulary),
            "c": torch.zeros(()),
            "P": torch.randn(handle.width, width, generator=generator) * (4 / width) ** 0.5,
        }
        kept = {n: t for n, t in tensors.items() if pictures or n != "P"}
        return cls(handle, {n: t.to(handle.device).requires_grad_(True) for n, t in kept.items()}, pictures)

    def features(self, asks: Sequence[Ask]) -> Tensor:
        """(n, e), or (n, 2 e) with pictures: phi of each question."""
        wanted = [a.image if self.pictures else None for a in asks]
        return self.of([a.prompt for a in asks], [None if p is None else torch.from_numpy(image_embedding(self.handle, p)) for p in wanted])

    def of(self, texts: Sequence[str], embeddings: Sequence[Tensor | None]) -> Tensor:
        """The same from texts and the (d,) embeddings of their pictures; an absent picture is a zero vector."""
        text = torch.stack([self._text(t) for t in texts])
        return torch.cat([text, torch.stack([self._picture(e) for e in embeddings])], 1) if self.pictures else text

    def _text(self, prompt: str) -> Tensor:
        known: dict[str, Tensor] = self.handle.cache.setdefault("scope tokens", {})
        if prompt not in known:
            ids = self.handle.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            known[prompt] = torch.tensor(ids or [0], device=self.tensors["E"].device)
        ids = known[prompt]
        return (self.tensors["a"][ids].softmax(0)[:, None] * self.tensors["E"][ids]).sum(0)

    def _picture(self, embedding: Tensor | None) -> Tensor:
        mapped = self.tensors["P"]
        return mapped.new_zeros(mapped.shape[1]) if embedding is None else (embedding.to(mapped)[:, None] * mapped).sum(0)

    def similarity(self, edits: Tensor, questions: Tensor) -> Tensor:
        """(m, n) equation 1 for features (m, e) of edits and (n, e) of questions; 1 exactly for equal features."""
        distance = (edits[:, None] - questions[None]).square().sum(-1)
        return (-self.tensors["c"].exp() * distance).exp()

    def loss(self, edits: Sequence[Ask], inside: Sequence[Ask], outside: Sequence[Ask]) -> tuple[Tensor, Tensor]:
        """(the binary cross-entropy, the mean share of pairs of a kind that are told right) of B edits with a question in scope and one
        out of it each.

        The questions in the scope of other edits of the batch are out of scope too. Pairs that the classifier cannot tell apart
        count in neither, because their features are equal: another edit of the same question, or without pictures the same text.
        """
        z, x, y = (self.features(asks) for asks in (edits, inside, outside))
        keys = [(a.prompt, a.image.key if self.pictures and a.image is not None else "") for a in edits]
        other = torch.tensor([[a != b for b in keys] for a in keys], device=z.device)
        beside = torch.tensor(
            [a.prompt != b.prompt or (self.pictures and a.image != b.image) for a, b in zip(edits, outside)], device=z.device
        )
        crossed, own = self.similarity(z, x), self.similarity(z, y).diagonal()
        right, wrong = crossed.diagonal().clamp(min=_LEAST), [w.clamp(max=1 - _LEAST) for w in (own[beside], crossed[other]) if len(w)]
        parts = [-(1 - w).log().mean() for w in wrong]  # half of the weight lies on the edits' own neighbours
        loss = -right.log().mean() + (torch.stack(parts).mean() if parts else 0.0)
        told = [(right > 0.5).float().mean(), *((w <= 0.5).float().mean() for w in wrong)]
        return loss, torch.stack(told).mean()

    @torch.no_grad()
    def nearest(self, edits: Tensor, question: Ask) -> tuple[int, float]:
        """The index of the edit (of features (m, e)) with the largest s for a question, the newest of equals, and s.

        One question is compared by itself, so that a decision depends on no other question.
        """
        s = self.similarity(edits, self.features([question]))[:, 0]
        best = len(s) - 1 - int(s.flip(0).argmax())
        return best, float(s[best])
