"""Training of the tiny model: first the vision tower alone, then all weights with one loss.

In a single stage from random weights the model does not learn to see (perception at chance after four minutes). The
tower is therefore first trained for two minutes to classify the parts of random emblems.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from streams.world.emblem import PARTS, Code, photograph, random_code
from testbed.pretraining.curriculum import Curriculum
from testbed.pretraining.packing import PackedBatch, Packer, packed_logits
from testbed.pretraining.tiny_model import pixels

Report = Callable[[float, float], None]
"""Progress callback, called after each step with the share of the training that is done and the loss."""
BETAS = (0.9, 0.98)
TOWER_BATCH = 64
TOWER_RATE = 3e-3


@dataclass(frozen=True)
class TrainingSchedule:
    """Length, learning rate and batch of a training phase. Progress through it is a share in [0, 1]."""

    steps: int
    """Optimiser steps."""
    minutes: float = math.inf
    """Wall-clock limit. It brings the end of the schedule forward, so that the rate still falls to zero."""
    rate: float = 2e-3
    """Peak learning rate."""
    tower_share: float = 0.3
    """The vision tower's learning rate as a share of `rate`."""
    warm: float = 0.04
    """Progress up to which the rate rises."""
    stop: float = 1.0
    """Progress at which training stops; below 1 it stops at a rate that is not zero, for another phase to continue."""
    decay: float = 0.05
    """Weight decay."""
    rows: tuple[int, int, int, int] = (13, 4, 3, 4)
    """Number of rows of a batch of each kind: photo, photo with stated facts, text, text with stated facts."""


def training_progress(schedule: TrainingSchedule, steps: int, minutes: float) -> float:
    """Progress after these steps and minutes, by the one or the other, whichever is further."""
    return min(1.0, max(steps / schedule.steps, minutes / schedule.minutes))


def rate_factor(progress: float, warm: float) -> float:
    """The learning rate as a share of its peak: a linear rise, then a cosine to zero."""
    if progress < warm:
        return max(progress, 1e-3) / warm
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


class _Heads(nn.Module):
    """For each part of the emblem a learned attention query and a linear layer; discarded after the tower's training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(len(PARTS), width))
        self.out = nn.ModuleList(nn.Linear(width, 8) for _ in PARTS)

    def forward(self, patches: Tensor) -> list[Tensor]:
        """Map patches (n, 36, width) to logits (n, 8) for each part."""
        seen = (patches @ self.query.T / math.sqrt(patches.shape[-1])).softmax(1).transpose(1, 2) @ patches
        return [layer(seen[:, i]) for i, layer in enumerate(self.out)]


def train_tower(model: LlavaForConditionalGeneration, rng: np.random.Generator, steps: int, report: Report) -> float:
    """Train the vision tower to classify the parts of random emblems, in place; return its accuracy in the last 20 batches."""
    tower = model.model.vision_tower
    config: Any = model.config.vision_config
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(rng.integers(2**31)))
        heads = _Heads(config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TOWER_RATE, betas=BETAS, weight_decay=0.05)
    hits: list[float] = []
    for step in range(steps):
        codes = [random_code(rng) for _ in range(TOWER_BATCH)]
        for group in optimizer.param_groups:
            group["lr"] = TOWER_RATE * rate_factor(step / steps, 0.05)
        loss, right = _tower_loss(tower, heads, codes, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        hits.append(right)
        report((step + 1) / steps, loss.item() / len(PARTS))
    return float(np.mean(hits[-20:]))


def _tower_loss(tower: nn.Module, heads: _Heads, codes: list[Code], rng: np.random.Generator) -> tuple[Tensor, float]:
    photos = pixels([photograph(code, rng) for code in codes])
    truth = torch.tensor(codes)
    logits = heads(tower(pixel_values=photos).last_hidden_state[:, 1:])
    loss = torch.stack([nn.functional.cross_entropy(x, truth[:, i]) for i, x in enumerate(logits)]).sum()
    right = torch.stack([(x.argmax(-1) == truth[:, i]).float().mean() for i, x in enumerate(logits)]).mean()
    return loss, float(right)


def world_batches(curriculum: Curriculum, packer: Packer, schedule: TrainingSchedule) -> Callable[[float], PackedBatch]:
    """A function that draws a batch, given the progress."""
    texts = curriculum.text()

    def batch(progress: float) -> PackedBatch:
        curriculum.progress = progress
        photos, photo_contexts, plain, contexts = schedule.rows
        rows = [packer.row(*curriculum.photo()) for _ in range(photos)]
        rows += [packer.row(*curriculum.context(by_picture=i < photo_contexts)) for i in range(photo_contexts + contexts)]
        rows += [packer.row([next(texts) for _ in range(22)]) for _ in range(plain)]
        return packer.batch(rows)

    return batch


def train(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    batches: Callable[[float], PackedBatch],
    schedule: TrainingSchedule,
    report: Report,
) -> int:
    """Train on packed batches in bf16 autocast with fp32 weights, in place; return the number of steps taken."""
    tower = list(model.model.vision_tower.parameters())
    tower_ids = {id(p) for p in tower}
    rest = [p for p in model.parameters() if id(p) not in tower_ids]
    groups = [{"params": rest, "share": 1.0}, {"params": tower, "share": schedule.tower_share}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, betas=BETAS, weight_decay=schedule.decay, fused=True)
    start, step = time.monotonic(), 0
    model.train()
    while (progress := training_progress(schedule, step, (time.monotonic() - start) / 60)) < schedule.stop:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * group["share"] * rate_factor(progress, schedule.warm)
        packed = batches(progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = packed_logits(model, packed, packer.photo_at)
        loss = nn.functional.cross_entropy(logits.float(), packed.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        report(progress / schedule.stop, loss.item())
    model.eval()
    return step
