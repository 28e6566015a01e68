"""What a run of GRPO is told, beside its loss and its optimiser; and what was published."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dsv3.checks import check, check_choice
from dsv3.rl.advantage import STDS


@dataclasses.dataclass(frozen=True)
class GrpoSettings:
    """How a run explores and learns.

    Attributes:
      explorations: how many in all.
      prompts: problems of one exploration. group_size: samples of each.
      max_new_tokens, temperature, stop_tokens, stop, bucket: see `rollout`.
      seed: of the run: which problems come when, what is drawn, how mini-batches are mixed.
      std, eps: of the advantages, see `group_advantages`.
      skip_saturated: leave out groups whose rewards are all the same and draw further problems in their place (dynamic
        sampling), at most `max_draws` times in an exploration; what is then missing is filled with the groups left out.
      truncated: `"count"`: samples that ended for want of room are samples; `"mask"`: their tokens count in no loss, though
        their rewards count in their group.
      old: log-probabilities of the policy that sampled: those of the `"sampler"`, or `"recomputed"` before the first step.
      replay: train with the experts of the sampling pass.
      minibatches: optimiser steps for each epoch over an exploration's samples. epochs: over the same samples.
      rows: samples of a micro-batch, whose gradients add up to a mini-batch's.
      reference_every: explorations until the reference becomes the policy of that time; 0: it stays what it was.
      measure_every: explorations between measurements of how far sampling and training are apart, which take two forward
        passes over the samples; 0: none.
    """

    explorations: int = 100
    prompts: int = 8
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    stop_tokens: Sequence[int] | None = None
    stop: Sequence[str] = ()
    bucket: int = 64
    seed: int = 0
    std: str = "population"
    eps: float = 1e-6
    skip_saturated: bool = False
    max_draws: int = 4
    truncated: str = "count"
    old: str = "sampler"
    replay: bool = True
    minibatches: int = 1
    epochs: int = 1
    rows: int = 8
    reference_every: int = 0
    measure_every: int = 1

    def __post_init__(self):
        least = {"explorations": 0, "group_size": 2, "seed": 0, "reference_every": 0, "measure_every": 0}
        ones = ("prompts", "max_new_tokens", "bucket", "max_draws", "minibatches", "epochs", "rows")
        for name, low in (least | dict.fromkeys(ones, 1)).items():
            value = getattr(self, name)
            why = ": samples of a prompt are held against each other" if name == "group_size" else ""
            check(value >= low, f"GrpoSettings: `{name}` is {value}, want at least {low}{why}")
        check(self.temperature > 0, f"GrpoSettings: `temperature` is {self.temperature}, want above 0")
        check(self.eps >= 0, f"GrpoSettings: `eps` is {self.eps}, want at least 0")
        check_choice("GrpoSettings", "std", self.std, STDS)
        check_choice("GrpoSettings", "truncated", self.truncated, ("count", "mask"))
        check_choice("GrpoSettings", "old", self.old, ("sampler", "recomputed"))
        samples = self.prompts * self.group_size
        check(
            self.minibatches <= samples,
            f"GrpoSettings: `minibatches` is {self.minibatches}, want at most the samples of an exploration, {samples}",
        )


class Published(NamedTuple):
    """Hyper-parameters as published; `None`: not told.

    Attributes:
      kl_weight: β. clip: ε, of both limits. group_size: G. learning_rate: of Adam.
      minibatches: optimiser steps of each epoch over an exploration. epochs: over the same samples.
      prompts: problems of an exploration. reference_every: explorations until the reference becomes the policy; 0: never.
      batch: samples of an optimiser step. length: the longest answer, in tokens.
    """

    kl_weight: float
    clip: float | None
    group_size: int
    learning_rate: float
    minibatches: int | None
    epochs: int | None = None
    prompts: int | None = None
    reference_every: int | None = None
    batch: int | None = None
    length: int | None = None


PUBLISHED = {
    "deepseekmath": Published(
        kl_weight=0.04, clip=None, group_size=64, learning_rate=1e-6, minibatches=1, epochs=1, batch=1024, length=1024
    ),
    # 8,192 outputs of an exploration in 16 mini-batches; the reference is replaced every 400 steps. Later in the training of
    # R1-Zero answers had 65,536 tokens.
    "r1": Published(
        kl_weight=0.001, clip=10.0, group_size=16, learning_rate=3e-6, minibatches=16, epochs=1, prompts=512,
        reference_every=25, batch=512, length=32_768,
    ),  # fmt: skip
}
"""DeepSeekMath: arXiv:2402.03300 section 4.2. R1: Nature 645 (2025), arXiv:2501.12948v2. DeepSeek-V3 tells none of them."""
