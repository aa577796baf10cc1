"""Scores and greedy generations of packed prompts: one forward of the prompts with their answers does for both.

The forward gives the score of an answer at once, and of the generation all tokens up to the first that differs from the answer.
From there rows go on together, and each leaves as it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from testbed.model.answer_loss import answer_loss
from testbed.model.generation import FIRST_IDS, Decided, LineEnds, Score, end_tokens
from testbed.model.handle import ModelHandle
from testbed.model.packed_rows import Continuation, PackedForward, Row, logits_of

_READ = 256
"""Hidden states of which the logits are in memory at once."""
_ENDED = 4
"""Ended rows leave when they are at least one in so many."""


@dataclass(frozen=True)
class PackedAnswer:
    """The tokens of a generation, the score of the answer where there is one, and the ids of the likeliest first tokens."""

    made: Row
    score: Score | None
    first_ids: tuple[int, ...]


def packed_scores(handle: ModelHandle, prompts: Sequence[Row], answers: Sequence[Row]) -> list[Score]:
    """The score of each answer (one token or more) under teacher forcing."""
    forward = PackedForward(handle, [p + a[:-1] for p, a in zip(prompts, answers)])
    final = forward.final_hidden(*_before_answers(prompts, [len(a) for a in answers]))
    loss, hits = answer_loss(handle, final, torch.tensor([t for a in answers for t in a], device=handle.device))
    return _by_row(hits, -loss.double(), [len(a) for a in answers])


def packed_answers(
    handle: ModelHandle,
    prompts: Sequence[Row],
    answers: Sequence[Row],
    max_new_tokens: int,
    decided: Sequence[Decided] | None = None,
    then: Callable[[], None] = lambda: None,
) -> list[PackedAnswer]:
    """Greedy generations of at most so many tokens, up to the end of the first line, and scores of the answers ([] for none).

    decided: ends a generation too, a function a row. then: called once, when the first token is known.
    """
    forward = PackedForward(handle, [p + a[:-1] for p, a in zip(prompts, answers)])
    read = [max(1, len(a)) for a in answers]
    final = forward.final_hidden(*_before_answers(prompts, read))
    starts = list(accumulate(read, initial=0))[:-1]
    said, logprobs = _read(handle, final, [t for a in answers for t in (a or [0])])
    begin = logits_of(handle, final[starts])
    first = begin.topk(min(FIRST_IDS, begin.shape[-1]), -1).indices.tolist()
    then()
    made = [_followed(said[s : s + n], a)[:max_new_tokens] for s, n, a in zip(starts, read, answers)]
    hits = torch.tensor([t == x for s, a in zip(starts, answers) for t, x in zip(said[s:], a or [0])])
    scores = [s if a else None for s, a in zip(_by_row(hits, logprobs, read), answers)]
    _Generation(handle, prompts, made, max_new_tokens, decided).go_on(forward)
    return [PackedAnswer(m, s, tuple(f)) for m, s, f in zip(made, scores, first)]


def _read(handle: ModelHandle, final: Tensor, targets: Row) -> tuple[Row, Tensor]:
    """The likeliest token after each of (n, d) final hidden states, and the log-probability of a target, (n,) float64 nats."""
    said, logprobs = list[int](), list[Tensor]()
    for hidden, target in zip(final.split(_READ), torch.tensor(targets, device=handle.device).split(_READ)):
        logits = logits_of(handle, hidden)
        said += logits.argmax(-1).tolist()
        logprobs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1))
    return said, torch.cat(logprobs).double()


def _before_answers(prompts: Sequence[Row], read: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows and positions whose hidden states predict the first tokens behind the prompts, `read` of them a row."""
    return [i for i, n in enumerate(read) for _ in range(n)], [len(p) - 1 + k for p, n in zip(prompts, read) for k in range(n)]


def _followed(said: Row, answer: Row) -> Row:
    """The generation's first tokens: those of the answer as long as it says them, and the first that it says instead."""
    same = next((k for k, (a, b) in enumerate(zip(said, answer)) if a != b), len(said) - 1)
    return said[: same + 1]


def _by_row(hits: Tensor, logprobs: Tensor, read: Sequence[int]) -> list[Score]:
    parts = zip(hits.cpu().split(list(read)), logprobs.cpu().split(list(read)))
    return [Score(h.numpy().copy(), p.numpy().copy()) for h, p in parts]


class _Generation:
    """Rows that are continued until each has ended. made: their tokens so far, which grow in place."""

    def __init__(self, handle: ModelHandle, prompts: Sequence[Row], made: list[Row], most: int, decided: Sequence[Decided] | None) -> None:
        self.handle, self.prompts, self.made, self.most, self.decided = handle, prompts, made, most, decided
        self.lines, self.ends = LineEnds(handle, len(made)), set(end_tokens(handle))
        for k in range(max(map(len, made))):
            rows = [i for i, m in enumerate(made) if len(m) > k]
            self.lines.see(torch.tensor([made[i][k] for i in rows]), rows)
        self.live = self._live(list(range(len(made))))

    def _live(self, rows: list[int]) -> list[int]:
        """The rows among some that go on."""
        going = [i for i in rows if not self.lines.ended[i] and len(self.made[i]) < self.most and not self.ends.intersection(self.made[i])]
        if self.decided is None:
            return going
        texts = self.handle.tokenizer.batch_decode([self.made[i] for i in going], skip_special_tokens=True)
        return [i for i, text in zip(going, texts) if not self.decided[i](text)]

    def go_on(self, forward: PackedForward) -> None:
        """Run the rows that have not ended to their ends."""
        running = self.live
        if not running:
            return
        lengths = [len(self.prompts[i]) + len(self.made[i]) - 1 for i in running]
        steps = self.most - min(len(self.made[i]) for i in running)
        rows = forward.rows_after(running, lengths, steps)
        while self.live:
            if _ENDED * (len(running) - len(self.live)) >= len(running):
                live = set(self.live)
                rows.keep(torch.tensor([k for k, i in enumerate(running) if i in live], device=self.handle.device))
                running = self.live
            self._step(rows, running)

    def _step(self, rows: Continuation, running: list[int]) -> None:
        last = torch.tensor([self.made[i][-1] for i in running], device=self.handle.device)
        new = dict(zip(running, logits_of(self.handle, rows.step(last)).argmax(-1).tolist()))
        for i in self.live:
            self.made[i].append(new[i])
        self.lines.see(torch.tensor([new[i] for i in self.live]), self.live)
        self.live = self._live(self.live)
