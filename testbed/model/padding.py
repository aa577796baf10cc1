"""Whether a model's answers depend on how a prompt is padded.

A prompt in a batch is padded to the length of the longest, on the left, on the right or on both sides. Where a model's
own layers do not skip the padding (recurrent ones, positions that are counted from the row's start), every score would
depend on which other prompts share the batch, and nothing in the results would show it.
"""

from __future__ import annotations

import torch

from testbed.core.events import Ask
from testbed.model.encoding import collate
from testbed.model.handle import BadModel, ModelHandle

_PROBE = "The flag of the town is"
_PADDED = 5
"""Token positions of padding on each side that is padded."""


@torch.no_grad()
def verify_padding(handle: ModelHandle) -> None:
    """Compare the log-probabilities at every position of one prompt, alone and padded on the left, the right and both sides.

    Raises `BadModel` for a model whose log-probabilities differ by more than rounding.
    """
    ask = Ask(_PROBE)
    alone = _logprobs(handle, ask, 0, 0)
    if not torch.isfinite(alone).all():
        return  # nothing to compare with; a model whose logits are not finite is refused elsewhere
    tolerance = 0.02 if handle.dtype in (torch.float32, torch.float64) else 0.5
    for side, left, right in (("left", _PADDED, 0), ("right", 0, _PADDED), ("both sides", _PADDED, _PADDED)):
        apart = float((_logprobs(handle, ask, left, right) - alone).abs().max())
        if not apart <= tolerance:
            raise BadModel(
                f"the scores of {handle.name} ({type(handle.model).__name__}) depend on the padding of a prompt: padded on the {side}, "
                f"log-probabilities differ by up to {apart:.2g} nats. Its scores in a batch would not be those of the prompt alone, "
                "so it cannot be measured here"
            )


def _logprobs(handle: ModelHandle, ask: Ask, left: int, right: int) -> torch.Tensor:
    """(P, V) log-probabilities at the P positions of a prompt, with so many positions of padding on either side."""
    n = int(collate(handle, [ask]).prompt.sum())
    batch = collate(handle, [ask], at=[n - 1], pad=(left, right))
    logits = handle.model(**batch.inputs, use_cache=False).logits
    return logits[batch.prompt].float().log_softmax(-1)
