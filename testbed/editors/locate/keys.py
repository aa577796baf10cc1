"""The prompts of a batch of edits as rows, the position in each where the edit is written (the subject's last token), and the keys there.

A key depends only on weights below its layer, and these are final by the time the layer is solved. So each layer runs
once on the rows with contexts; the bare prompts go on to the target's layer to tell how much is left to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from testbed.core.events import Ask, EditEvent
from testbed.editors.base import BadEditor
from testbed.model.encoding import Batch, answer_ids, collate, image_token, prompt_in_template, prompt_inputs, text_batch
from testbed.model.handle import ModelHandle
from testbed.model.layout import adds_as_it_is
from testbed.model.suffix import suffix_from_layer

STARTERS = ("The", "Therefore", "Because", "I", "You")
"""First words of the sampled contexts (Meng et al. 2022)."""
_TOP_K = 5


@dataclass(frozen=True)
class PromptRows:
    """Rows of one forward. at: (B,) int64 lookup position; edit: (B,) int64, the edit of the batch that a row belongs to."""

    batch: Batch
    at: Tensor
    edit: Tensor

    @property
    def read(self) -> Tensor:
        """(B, T) bool: the positions that a search reads.

        They are those that predict an answer token, and in rows without an answer the lookup position.
        """
        read = self.batch.before_answer
        read[torch.arange(len(self.at), device=self.at.device), self.at] |= ~self.batch.answer.any(1)
        return read

    @property
    def width(self) -> int:
        """Token positions from the lookup position to the last that predicts an answer token, both counted."""
        return int(self.batch.before_answer.nonzero()[:, 1].max()) + 1 - int(self.at[0])


def ask_of(event: EditEvent, context: str = "") -> Ask:
    """The edit's prompt with its picture, after a context sentence where one is given."""
    return replace(event.ask(), prompt=f"{context}. {event.prompt}") if context else event.ask()


_LEFT_OUT = "sampled contexts are left out of a batch where the window does not hold them before a prompt with its answer"


def contexts_that_fit(
    handle: ModelHandle, events: Sequence[EditEvent], contexts: Sequence[str], notes: list[str], end: bool = True
) -> Sequence[str]:
    """The contexts where the window holds every prompt with its answer behind each of them, else the first, empty one alone.

    The first time that contexts are left out, a line in `notes` says so.
    """
    asked = [(ask_of(e, c), e.target) for e in events for c in contexts[1:]]
    lengths = (prompt_inputs(handle, a)["input_ids"].shape[1] + len(answer_ids(handle, a, x)) + end for a, x in asked)
    if all(n <= handle.window for n in lengths):
        return contexts
    notes += [_LEFT_OUT] if _LEFT_OUT not in notes else []
    return contexts[:1]


def subject_of(event: EditEvent) -> str | None:
    """The subject where the prompt names it; None where there is none or a picture stands for it."""
    subject = (event.subject or "").strip()
    return subject if subject and subject in event.prompt else None


def prompt_rows(handle: ModelHandle, events: Sequence[EditEvent], contexts: Sequence[str]) -> PromptRows:
    """One row an edit and context, edits in the outer order, without answers, right-padded."""
    asks = [ask_of(e, c) for e in events for c in contexts]
    at = [lookup(handle, a, subject_of(e)) for a, e in zip(asks, (e for e in events for _ in contexts))]
    place = handle.device
    edit = torch.arange(len(events), device=place).repeat_interleave(len(contexts))
    return PromptRows(collate(handle, asks), torch.tensor(at, device=place), edit)


def answer_rows(handle: ModelHandle, events: Sequence[EditEvent], contexts: Sequence[str], end: bool) -> PromptRows:
    """The same rows, each followed by the edit's target (and, with `end`, by the end token), lookup positions in one column."""
    rows = [(i, e, c) for i, e in enumerate(events) for c in contexts]
    return _aligned(handle, rows, [answer_ids(handle, ask_of(e), e.target) for _, e, _ in rows], end)


def positions_to_run(handle: ModelHandle, event: EditEvent, end: bool) -> int:
    """Token positions from the subject's last in the bare prompt to the last that predicts an answer token, both counted."""
    ask = ask_of(event)
    rest = prompt_inputs(handle, ask)["input_ids"].shape[1] - lookup(handle, ask, subject_of(event))
    return rest - 1 + len(answer_ids(handle, ask, event.target)) + end


def kl_prompt_rows(handle: ModelHandle, events: Sequence[EditEvent]) -> PromptRows | None:
    """The KL prompt "{subject} is a" of each edit whose prompt names its subject, lookup positions in one column; None where none does."""
    named = [(i, replace(e, prompt=f"{subject_of(e)} is a", image=None), "") for i, e in enumerate(events) if subject_of(e)]
    return _aligned(handle, named, None, False) if named else None


def joined(handle: ModelHandle, *parts: PromptRows) -> PromptRows:
    """All rows in one forward, lookup positions in one column."""
    asks = [a for p in parts for a in p.batch.asks]
    answers = [ids[mask].tolist() for p in parts for ids, mask in zip(p.batch.inputs["input_ids"], p.batch.answer)]
    at = [int(mask[:column].sum()) for p in parts for mask, column in zip(p.batch.prompt, p.at.tolist())]
    batch = collate(handle, asks, answers, at=at)
    return PromptRows(batch, torch.full((len(at),), max(at), device=batch.prompt.device), torch.cat([p.edit for p in parts]))


def _aligned(handle: ModelHandle, rows: list[tuple[int, EditEvent, str]], answers: list[list[int]] | None, end: bool) -> PromptRows:
    asks = [ask_of(e, c) for _, e, c in rows]
    at = [lookup(handle, a, subject_of(e)) for a, (_, e, _) in zip(asks, rows)]
    batch = collate(handle, asks, answers, end=end, at=at)
    place = batch.prompt.device
    return PromptRows(batch, torch.full((len(at),), max(at), device=place), torch.tensor([i for i, _, _ in rows], device=place))


def lookup(handle: ModelHandle, ask: Ask, subject: str | None) -> int:
    """Index in the unpadded prompt row of the subject's last token, last mention; without a subject, of the last token.

    Targets by character offsets of the whole templated prompt, so that merges across a boundary do not shift it.
    Raises `BadEditor` for a tokenizer that has none.
    """
    total = prompt_inputs(handle, ask)["input_ids"].shape[1]
    if subject is None:
        return total - 1
    if not handle.tokenizer.is_fast:
        raise BadEditor(f"{type(handle.tokenizer).__name__} tells no character offsets, so a subject cannot be found: use a fast tokenizer")
    text, start, end = prompt_in_template(handle, ask)
    last = text.rindex(subject, start, end) + len(subject) - 1
    own = handle.tokenizer(text, return_offsets_mapping=True)
    at = next(i for i, (a, b) in reversed(list(enumerate(own["offset_mapping"]))) if a <= last < b)
    ids = own["input_ids"]
    token = image_token(handle)
    after_picture = ids.index(token) < at if token in ids else True
    return total - len(ids) + at if after_picture else at


@torch.no_grad()
def draw_contexts(handle: ModelHandle, n: int, lengths: Sequence[int], generator: torch.Generator) -> list[str]:
    """`n` beginnings of sentences, as many of each length in tokens, sampled from the base model among its 5 likeliest next tokens.

    Only ids that the tokenizer has are drawn: some models score more of them, and those have no text.
    """
    tok = handle.tokenizer
    out = []
    for i in range(n):
        ids: list[int] = tok(STARTERS[i % len(STARTERS)])["input_ids"]
        while len(ids) < lengths[i * len(lengths) // n]:
            logits = handle.model(**text_batch(handle, [ids]).inputs, use_cache=False).logits[0, -1, : len(tok)].float().cpu()
            best = logits.topk(_TOP_K)
            new = int(best.indices[torch.multinomial(best.values.softmax(-1), 1, generator=generator)])
            if new == tok.eos_token_id:
                break
            ids.append(new)
        text = tok.decode(ids, skip_special_tokens=True)
        out.append(" ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(". "))
    return out


class RisingStates:
    """Hidden states of some rows, layer by layer on their way up."""

    def __init__(self, handle: ModelHandle, rows: PromptRows, first: int, last: int) -> None:
        self.handle, self.rows, self.last = handle, rows, last
        self.suffix = suffix_from_layer(handle, rows.batch, first, last)
        self.hidden, self.next = self.suffix.hidden, first
        self.act = self.hidden

    def keys(self, layer: int) -> Float[Tensor, "B f"]:
        """(B, f) keys: what enters the layer's down-projection at the lookup positions. The states end behind this layer."""
        self.hidden = self.suffix.run(self.hidden, self.next, layer)
        kept: list[Tensor] = []
        with self.handle.hooked(self.handle.down(layer), lambda m, args: kept.append(args[0]), pre=True):
            self.hidden = self.suffix.layer(layer, self.hidden)
        self.next = layer + 1
        self.act = kept[0].reshape(*self.hidden.shape[:2], -1)
        return self._at_lookup(self.act)

    def last_output(self) -> Float[Tensor, "B d"]:
        """(B, d) float32 output of the last layer at the lookup positions, under the weights as they are."""
        return self._at_lookup(self.suffix.run(self.hidden, self.next, self.last + 1)).float()

    def last_mlp_output(self) -> Float[Tensor, "B d"]:
        """(B, d) float32 output of the last layer's MLP at the lookup positions, under the weights as they are."""
        down, kept = self.handle.down(self.last), [self.act]
        if self.next <= self.last:
            with self.handle.hooked(down, lambda m, args: kept.append(args[0]), pre=True):
                self.last_output()
        return self._at_lookup(down(kept[-1]).reshape(*self.hidden.shape[:2], -1)).float()

    def add(self, project: Callable[[Tensor], Tensor]) -> None:
        """Let a change of the last layer passed take effect; `project` is the down-projection's change (.., f) -> (.., d)."""
        self.hidden = self.hidden + project(self.act).to(self.hidden.dtype)

    def _at_lookup(self, x: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device), self.rows.at.to(x.device)]


class KeyComputation:
    """The keys of a batch at a rising sequence of layers.

    Args:
        layers: the layers that will be solved, in order.
        contexts: sentences before the prompt; the first is the empty one (the bare prompt).
        weight: share of the bare prompt's key in the averaged one; the contexts share the rest.
    """

    def __init__(
        self, handle: ModelHandle, events: Sequence[EditEvent], contexts: Sequence[str], layers: Sequence[int], weight: float
    ) -> None:
        self.n, self.weight = len(events), weight
        first, last = layers[0], layers[-1]
        self.bare = RisingStates(handle, prompt_rows(handle, events, [""]), first, last)
        self.others = RisingStates(handle, prompt_rows(handle, events, contexts[1:]), first, last) if len(contexts) > 1 else None
        self.bare_key = torch.zeros(0)

    def keys(self, layer: int) -> Float[Tensor, "n f"]:
        """(n, f) float32 averaged keys of the layer."""
        self.bare_key = self.bare.keys(layer).float()
        if self.others is None:
            return self.bare_key
        rest = self.others.keys(layer).float().reshape(self.n, -1, self.bare_key.shape[1]).mean(1)
        return self.weight * self.bare_key + (1 - self.weight) * rest

    def last_output(self) -> Float[Tensor, "n d"]:
        """(n, d) float32 output of the last layer on the bare prompts, on the device of the model's inputs.

        It is that of its MLP where the layer does not add it as it is: what a target is a change of (`targets.unchanged_outputs`).
        """
        bare = self.bare
        return bare.last_output().to(bare.handle.device) if adds_as_it_is(bare.handle, bare.last) else self.last_mlp_output()

    def last_mlp_output(self) -> Float[Tensor, "n d"]:
        """(n, d) float32 output of the last layer's MLP on the bare prompts, on the device of the model's inputs."""
        return self.bare.last_mlp_output().to(self.bare.handle.device)

    def add(self, project: Callable[[Tensor], Any]) -> None:
        """Let a change of the layer just read take effect on all rows."""
        for states in (self.bare, self.others):
            if states is not None:
                states.add(project)
