"""The policy's step: the GRPO loss over micro-batches, optimiser, router bias."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import Dims, check, check_token_ids, check_type
from dsv3.compiled import compile_step
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.model import ModelParams, RouterState, cast_params
from dsv3.policy import ComputePolicy, default_policy
from dsv3.rl.grpo import GrpoStats, check_loss, grpo_loss, grpo_totals
from dsv3.rl.logprobs import token_logprobs
from dsv3.train.accumulate import accumulate_parts
from dsv3.train.optim import Optimizer, OptimStats, Schedule, square_sums
from dsv3.train.state import Limits, Taken, TrainState, advance_state, check_ema, within_limits
from dsv3.typing import TensorLike, Tree


class GrpoBatch(NamedTuple):
    """A mini-batch as A micro-batches of N samples: what one optimiser step learns from.

    Attributes:
      tokens: `[A, N, T+1]` int32. mask: `[A, N, T]` float32, 1 for drawn tokens that count; a row of zeros does not exist.
      old_logprobs: `[A, N, T]`, of the policy that sampled. ref_logprobs: of the reference, or `()` without one.
      advantages: `[A, N]`.
      experts: `[A, X, N, T, K]` int, of the sampling pass, or `()`: each position chooses anew.
    """

    tokens: TensorLike
    mask: TensorLike
    old_logprobs: TensorLike
    ref_logprobs: TensorLike | tuple
    advantages: TensorLike
    experts: TensorLike | tuple = ()


class GrpoParts(NamedTuple):
    """What a step's loss is made of, float32.

    Attributes:
      loss, policy, penalty, stats: as of `GrpoLoss`, of the whole mini-batch.
      entropy: mean over the tokens that count, in nats. balance: see `TokenLogprobs`. mtp: `[modules]`, or `[0]`.
      load: `RouterState` of tokens that each expert got.
    """

    loss: tf.Tensor
    policy: tf.Tensor
    penalty: tf.Tensor | tuple
    stats: GrpoStats
    entropy: tf.Tensor
    balance: tf.Tensor
    mtp: tf.Tensor
    load: RouterState


class GrpoMetrics(NamedTuple):
    """What one step reports: `parts`; `optim`, the optimiser's; `taken`, whether it was (see `Limits`); `grad_squares`
    `[leaves]`, `Σ g²` of each parameter."""

    parts: GrpoParts
    optim: OptimStats
    taken: tf.Tensor
    grad_squares: tf.Tensor


@plain
def grpo_update(
    state: TrainState,
    batch: GrpoBatch,
    *,
    cfg: ModelConfig,
    optimizer: Optimizer,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl: str = "k3",
    kl_weight: float = 0.0,
    average: str = "sequence",
    length: int | None = None,
    mtp_weight: float = 0.0,
    balance_weight: float = 0.0,
    bias_rate: float | Schedule = 0.0,
    limits: Limits = Limits(),
    policy: ComputePolicy | None = None,
) -> tuple[TrainState, GrpoMetrics]:
    """One optimiser step on samples, as a pure function.

    Args:
      state: see `TrainState`; its `tokens` count drawn tokens.
      batch: see `GrpoBatch`.
      cfg, optimizer: the model's configuration and the optimiser.
      temperature: that the samples were drawn at.
      clip_low, clip_high, dual_clip, kl, kl_weight, average, length: see `grpo_loss`.
      mtp_weight: λ of the MTP modules' cross-entropy on the drawn tokens, whose gradient reaches the modules alone, so that
        drafts stay as good as they were; 0: they are not trained.
      balance_weight: α of the balance loss.
      bias_rate: γ, how far the step moves the selection biases; 0 leaves them as they are.
      limits: the largest loss and gradient norm of a step that is taken.
      policy: how to compute; default: the device's.

    Returns:
      The new state and `GrpoMetrics`. A step that is not finite or exceeds the limits is not taken: the state comes back as
      it was.

    References: DeepSeek-V3 section 5.2.2; arXiv:2402.03300 algorithm 1.
    """
    policy = policy or default_policy()
    _check_batch(batch, cfg, kl_weight)
    check_ema("grpo_update", state, None)
    delayed = policy.fp8 is not None and policy.fp8.scaling == "delayed"
    check(not delayed, "grpo_update: the policy's FP8 recipe has delayed scales, want one without for samples")
    settings = {
        "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "kl": kl, "kl_weight": kl_weight,
        "average": average, "length": length,
    }  # fmt: skip
    params = cast_params(state.params, policy)
    rate = tf.cast(bias_rate(tf.cast(state.tokens, tf.float64)), tf.float32) if callable(bias_rate) else bias_rate
    parts, grads = _accumulate(
        params, state.router, tree.map_leaves(tf.convert_to_tensor, batch), settings, cfg=cfg, temperature=temperature,
        mtp_weight=mtp_weight, balance_weight=balance_weight, policy=policy,
    )  # fmt: skip
    squares = square_sums(grads, fuse=policy.fuse)
    norm = tf.sqrt(tf.reduce_sum(squares))
    take = within_limits(parts.loss, norm, limits)
    counted = tf.cast(tf.reduce_sum(tf.cast(batch.mask, tf.float32)), tf.int64)
    taken = Taken(norm, take, parts.load, counted, rate)
    new, stats = advance_state(state, grads, taken, optimizer, fuse=policy.fuse)
    return new, GrpoMetrics(parts, stats, take, squares)


def _check_batch(batch: GrpoBatch, cfg: ModelConfig, kl_weight: float) -> None:
    dims = Dims("grpo_update", X=cfg.num_moe_layers, K=cfg.moe.router.top_k)
    dims("mask", batch.mask, "A N T")
    dims("old_logprobs", batch.old_logprobs, "A N T")
    dims("tokens", batch.tokens[..., 1:], "A N T")
    dims("advantages", batch.advantages, "A N")
    if not isinstance(batch.ref_logprobs, tuple):
        dims("ref_logprobs", batch.ref_logprobs, "A N T")
    if not isinstance(batch.experts, tuple):
        dims("experts", batch.experts, "A X N T K")
    none = isinstance(batch.ref_logprobs, tuple) and kl_weight > 0
    check(not none, f"grpo_update: `kl_weight` is {kl_weight}, but the batch has no `ref_logprobs`")


def _accumulate(
    params: ModelParams, router: RouterState, batch: GrpoBatch, settings: dict[str, Any], *, mtp_weight: float,
    balance_weight: float, **how: Any,
) -> tuple[GrpoParts, Tree]:  # fmt: skip
    """Returns the parts and the gradients of all micro-batches; `how` is for `token_logprobs`."""
    totals = grpo_totals(batch.mask)
    known = batch.tokens.shape[0]
    count = tf.shape(batch.tokens)[0] if known is None else known

    def computed(batch: GrpoBatch) -> tuple[GrpoParts, Tree]:
        mask = tf.cast(batch.mask, tf.float32)
        # The balance is a mean over sequences, of which a micro-batch that is filled up has fewer.
        share = tf.reduce_sum(tf.cast(tf.reduce_any(mask > 0, -1), tf.float32)) / totals.sequences
        experts, ref = (None if isinstance(x, tuple) else x for x in (batch.experts, batch.ref_logprobs))
        leaves = tree.flatten(params)
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            got = token_logprobs(
                params, router, batch.tokens, mask, experts=experts, mtp=mtp_weight > 0, mtp_tokens=totals.tokens, **how
            )
            found = grpo_loss(got.logprobs, batch.old_logprobs, ref, batch.advantages, mask, totals=totals, **settings)
            loss = found.loss + balance_weight * share * got.balance
            if mtp_weight > 0:
                loss += mtp_weight * tf.reduce_mean(got.mtp)
        grads = tape.gradient(loss, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        entropy = tf.reduce_sum(mask * got.entropy) / totals.tokens
        parts = GrpoParts(loss, found.policy, found.penalty, found.stats, entropy, share * got.balance, got.mtp, got.load)
        return parts, tree.unflatten_as(params, [tf.convert_to_tensor(g) for g in grads])

    def part(i):
        return _at_its_length(computed, tree.map_leaves(lambda x: x[i], batch))

    return accumulate_parts(part, count, largest=lambda path: path.endswith(".ratio_max"))


def _at_its_length(computed: Callable[[GrpoBatch], Tree], batch: GrpoBatch) -> Tree:
    """`computed` of a micro-batch without the columns that are padding in all rows: at the shortest of a few lengths."""
    sizes = trimmed_lengths(batch.mask.shape[-1])
    if len(sizes) == 1:
        return computed(batch)
    structure: list[Tree] = []

    def at(size: int) -> list[tf.Tensor]:
        found = computed(trim_batch(batch, size))
        structure.append(found)
        return tree.flatten(found)

    used = tf.reduce_max(tf.where(batch.mask > 0, tf.range(1, sizes[-1] + 1), 0))
    shortest = tf.reduce_sum(tf.cast(used > sizes[:-1], tf.int32))
    leaves = tf.switch_case(shortest, [functools.partial(at, size) for size in sizes])
    return tree.unflatten_as(structure[-1], leaves)


def trimmed_lengths(length: int | None, smallest: int = 64, count: int = 3) -> tuple[int, ...]:
    """Returns the lengths at which micro-batches of so many columns are computed: this one, its half and its quarter,
    rounded up, of those that are not below `smallest`; the shortest first.

    >>> trimmed_lengths(256), trimmed_lengths(100)
    ((64, 128, 256), (100,))
    """
    halves = (-(-length // 2**k) for k in reversed(range(1, count))) if length is not None else ()
    return (*(half for half in halves if half >= smallest), length)


def trim_batch(batch: GrpoBatch, size: int) -> GrpoBatch:
    """Returns a batch without its columns from `size` on, which no row has to have tokens in.

    Args:
      batch: see `GrpoBatch`, with or without the first dim.
      size: columns of its mask that are left.
    """
    cut = {name: getattr(batch, name)[..., :size] for name in ("mask", "old_logprobs")}
    if not isinstance(batch.ref_logprobs, tuple):
        cut["ref_logprobs"] = batch.ref_logprobs[..., :size]
    if not isinstance(batch.experts, tuple):
        cut["experts"] = batch.experts[..., :size, :]
    return batch._replace(tokens=batch.tokens[..., : size + 1], **cut)


def make_grpo_step(
    cfg: ModelConfig,
    optimizer: Optimizer,
    *,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl: str = "k3",
    kl_weight: float = 0.0,
    average: str = "sequence",
    length: int | None = None,
    mtp_weight: float = 0.0,
    balance_weight: float = 0.0,
    bias_rate: float | Schedule = 0.0,
    policy: ComputePolicy | None = None,
) -> Callable[..., tuple[TrainState, GrpoMetrics]]:
    """Compiles `grpo_update` into a step that updates its state in place.

    Args:
      cfg, optimizer, temperature, clip_low, clip_high, dual_clip, kl, kl_weight, average, length, mtp_weight,
        balance_weight, bias_rate, policy: as in `grpo_update`.

    Returns:
      `step(state, batch, limits=Limits()) -> (state, GrpoMetrics)`. The given state is donated (see `compile_step`); the
      first call compiles. `step.traces()` counts compilations: one for each shape of a micro-batch, and one more when their
      number first changes. `step.idle` tells whether a batch without any advantage has no gradient.

    Raises:
      ValueError: settings that cannot be, at once.
    """
    check_type("make_grpo_step", "optimizer", optimizer, Optimizer)
    settings = {
        "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "kl": kl, "kl_weight": kl_weight,
        "average": average, "length": length,
    }  # fmt: skip
    check_loss("make_grpo_step", **settings)
    check(temperature > 0, f"make_grpo_step: `temperature` is {temperature}, want above 0")
    for name, value in (("mtp_weight", mtp_weight), ("balance_weight", balance_weight)):
        check(value >= 0, f"make_grpo_step: `{name}` is {value}, want at least 0")
    none = mtp_weight > 0 and not cfg.num_mtp_layers
    check(not none, f"make_grpo_step: `mtp_weight` is {mtp_weight}, but the model has no MTP module")
    policy = policy or default_policy()
    more = {"mtp_weight": mtp_weight, "balance_weight": balance_weight, "bias_rate": bias_rate, "temperature": temperature}

    def update(state, batch, limits):
        return grpo_update(state, batch, cfg=cfg, optimizer=optimizer, limits=limits, policy=policy, **settings, **more)

    shapes: dict[tuple, Callable[..., tuple[TrainState, GrpoMetrics]]] = {}  # by what a micro-batch is like

    def step(state: TrainState, batch: GrpoBatch, limits: Limits = Limits()) -> tuple[TrainState, GrpoMetrics]:
        check_token_ids("grpo_step", "tokens", batch.tokens, cfg.vocab_size)
        batch = tree.map_leaves(tf.convert_to_tensor, batch)
        key = tuple((path, *leaf.shape[1:]) for path, leaf in tree.items(batch))
        if key not in shapes:
            shapes[key] = compile_step(update, jit=policy.jit, relax=True)
        return shapes[key](state, batch, Limits(*(tf.cast(x, tf.float32) for x in limits)))

    step.idle = kl_weight == mtp_weight == balance_weight == 0 and not callable(bias_rate) and bias_rate == 0
    step.traces = lambda: sum(compiled.traces() for compiled in shapes.values())
    return step


def micro_batches(batch: GrpoBatch, rows: np.ndarray, size: int, total: int) -> GrpoBatch:
    """Returns a mini-batch as a step takes it.

    Args:
      batch: all samples, `[N, ...]` (experts `[X, N, ...]`).
      rows: which of them.
      size: rows of a micro-batch, which has those that are about as long as each other: columns that are padding in all its
        rows are not computed. total: rows of a mini-batch; what is missing is filled with rows that count nowhere.
    """
    size, length = min(size, total), batch.mask.shape[-1]
    ends = np.where(batch.mask > 0, np.arange(length), -1).max(-1)
    rows = np.asarray(rows)[np.argsort(ends[rows], kind="stable")]
    count = math.ceil(total / size)

    def cut(name: str, values: Any) -> Any:
        if isinstance(values, tuple):
            return values
        dim = 1 if name == "experts" else 0
        taken = np.take(values, rows, dim)
        spare = count * size - len(rows)
        taken = np.pad(taken, [[0, spare if i == dim else 0] for i in range(taken.ndim)])
        if name != "experts":
            return taken.reshape(count, size, *taken.shape[1:])
        return np.moveaxis(taken.reshape(taken.shape[0], count, size, *taken.shape[2:]), 1, 0)

    return GrpoBatch(**{name: cut(name, values) for name, values in batch._asdict().items()})
