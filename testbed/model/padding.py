"""Whether a model's answers depend on how a prompt is padded.

A prompt in a batch is padded to the length of the longest, on the left, on the right or on both sides. Where a model's
own layers do not skip the padding (recurrent ones, positions that are counted from the row's start), every score would
depend on which other prompts share the batch, and nothing in the results would show it.
"""

from __future__ import annotations

import torch

from testbed.core.events import Ask
from testbed.model.encoding import Batch, collate
from testbed.model.handle import BadModel, ModelHandle

_SHIFT = 3
"""Token positions by which the shorter prompt is moved to the right where it is padded on both sides."""
_PROBE = Ask("The flag of the town is")
_LONGER = Ask("The flag of the town and the flag of the land is")


@torch.no_grad()
def verify_padding(handle: ModelHandle) -> None:
    """Compare the log-probabilities at every position of one prompt, alone and padded on the left, the right and both sides.

    Raises `BadModel` for a model whose log-probabilities differ by more than rounding.
    """
    lengths = [int(collate(handle, [ask]).prompt.sum()) for ask in (_PROBE, _LONGER)]
    if max(lengths) + _SHIFT > handle.window:
        return  # too short a window for two prompts side by side
    alone = _logprobs(handle, collate(handle, [_PROBE]))
    if not torch.isfinite(alone).all():
        return  # nothing to compare with
    tolerance = 0.02 if handle.dtype in (torch.float32, torch.float64) else 0.5
    both, end = [_PROBE, _LONGER], lengths[0] - 1
    padded = {
        "left": collate(handle, both, side="left"),
        "right": collate(handle, both),
        "both sides": collate(handle, both, at=[end, end + _SHIFT]),
    }
    for side, batch in padded.items():
        apart = float((_logprobs(handle, batch) - alone).abs().max())
        if not apart <= tolerance:
            raise BadModel(
                f"the scores of {handle.name} ({type(handle.model).__name__}) depend on padding: beside a longer prompt, padded on the "
                f"{side}, log-probabilities of a prompt differ by up to {apart:.2g} nats from those of the prompt alone. What else stands "
                "in a batch would change its answers, so it cannot be measured here"
            )


def _logprobs(handle: ModelHandle, batch: Batch) -> torch.Tensor:
    """(P, V) log-probabilities at the P positions of the batch's first prompt."""
    logits = handle.model(**batch.inputs, use_cache=False).logits
    return logits[0][batch.prompt[0]].float().log_softmax(-1)
