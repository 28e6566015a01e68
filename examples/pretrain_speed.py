"""How fast `pretrain.py` trains: products that the model needs, beside the fastest that this machine computes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from pretrain_setup import Setup

import dsv3
from dsv3.plan.count import flops_by_part
from dsv3.train.schedule import schedule_at


def token_flops(setup: Setup) -> dict[int, float]:
    """Products that training on one token needs, FLOPs, by formula, for each length of sequences of the schedule."""
    specs = dsv3.model_specs(setup.cfg)
    lengths = {stage.seq_len for stage in setup.schedule.stages}
    return {length: flops_by_part(setup.cfg, specs, length=length).model for length in lengths}


def training_flops(setup: Setup, rows: Sequence[Mapping[str, Any]]) -> float:
    """Products that the training needs, by formula, FLOP/s: of the median step, each at its length of sequences."""
    train = [row for row in rows if row["kind"] == "train"]
    before, needed = [0, *(row["tokens"] for row in train)], token_flops(setup)
    lengths = [schedule_at(setup.schedule, tokens).seq_len for tokens in before[:-1]]
    return float(np.median([row["tokens_per_second"] * needed[length] for row, length in zip(train, lengths)]))


def product_rate(dtype: str) -> float:
    """The fastest product of this process, FLOP/s: 2048³ in the compute dtype, warm, the best of five, or of a second.

    It is the yardstick of model FLOPs utilisation: what this machine gives, not what its maker says. Several processes
    measure at the same time, so that those of one machine share it as they do in the training.
    """
    a = tf.random.stateless_normal([2048, 2048], [0, 1], dtype=dtype)
    product = tf.function(lambda x: tf.matmul(x, x), autograph=False)
    product(a).numpy()
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) < 1):
        begin = time.perf_counter()
        product(a).numpy()
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times)
