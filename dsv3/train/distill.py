"""Distillation: a step that brings a student's next-token distributions towards a teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import Dims, check, check_choice, check_token_ids, check_type
from dsv3.compiled import compile_step
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.model import ModelParams, RouterState, cast_params, head_weight, model_apply
from dsv3.ops.divergence import KINDS, TopK, divergence
from dsv3.ops.segments import segment_count, segment_inputs
from dsv3.policy import ComputePolicy, default_policy
from dsv3.train.accumulate import accumulate_parts
from dsv3.train.loss import further_losses, row_places, row_weights, weighted_nll
from dsv3.train.optim import Optimizer, Schedule, square_sums
from dsv3.train.state import Limits, Taken, TrainMetrics, TrainState, advance_state, check_ema, within_limits
from dsv3.typing import TensorLike, Tree


class Teacher(NamedTuple):
    """A model that is learned from: `params` and `router`. It gets no gradient and stays as it is; give the parameters in
    the compute dtype (`cast_params`), or each step casts them."""

    params: ModelParams
    router: RouterState


class DistillBatch(NamedTuple):
    """What one optimiser step learns from, as A micro-batches; `distill_loss` takes one of them, without the dim A.

    Attributes:
      tokens: `[A, B, T+1]` int: inputs are the first T, targets the last T of a row.
      weights: `[A, B, T]` float32, weight of each target, such as 1 for what an assistant says; 0 leaves it out.
      segments: `[A, B, T+1]` int, the documents of packed rows, 0 for padding, see `pretrain_loss`; `()`: a row is one.
      teacher: `TopK` of `[A, B, T, K]`, what a teacher has said of each target; `()` where the step runs the teacher.
    """

    tokens: TensorLike
    weights: TensorLike
    segments: TensorLike | tuple = ()
    teacher: TopK | tuple = ()


class DistillParts(NamedTuple):
    """What the loss is made of; sums over tokens are divided by `normalizer`.

    Attributes:
      nll: float32 scalar, cross-entropy on the tokens, in nats a token. divergence: float32 scalar, in nats a token, before
        it is multiplied by temperature².
      mtp, balance, load: as of `LossParts`.
    """

    nll: tf.Tensor
    divergence: tf.Tensor
    mtp: tf.Tensor
    balance: tf.Tensor
    load: RouterState


@plain
def distill_loss(
    params: ModelParams,
    router: RouterState,
    batch: DistillBatch,
    teacher: Teacher | None = None,
    *,
    cfg: ModelConfig,
    teacher_cfg: ModelConfig | None = None,
    kind: str = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
    squared: bool = True,
    nll_weight: float = 0.0,
    mtp_weight: float = 0.0,
    balance_weight: float | tf.Tensor = 0.0,
    normalizer: TensorLike | None = None,
    sequences: TensorLike | None = None,
    policy: ComputePolicy | None = None,
) -> tuple[tf.Tensor, DistillParts]:
    """`L = T²·Σ w·D / Σ w + μ·L_nll + λ/modules·Σ_k L_mtp_k + α·Σ_layers L_balance`, with the divergence D of each target.

    Args:
      params, router: the student.
      batch: one micro-batch, see `DistillBatch`.
      teacher: the teacher, if the batch does not say what it has said. It sees the same rows, isolated in the same way.
      cfg: the student's configuration. teacher_cfg: the teacher's, with the same vocabulary.
      kind, mix, temperature: see `divergence`; stored probabilities are of the same temperature.
      squared: multiply the divergence by temperature², which keeps its gradient's size.
      nll_weight: μ, of the cross-entropy on the tokens at temperature 1; 0: it is told, and has no gradient.
      mtp_weight: λ, of the MTP modules' cross-entropy on the tokens; nothing where the student has none.
      balance_weight: α of the balance loss.
      normalizer, sequences: see `pretrain_loss`.
      policy: how to compute, student and teacher; default: the device's.

    Returns:
      The loss (float32 scalar) and its `DistillParts`, differentiable in `params`.

    Raises:
      ValueError: no teacher or two; another vocabulary; wrong shapes.

    References: arXiv:1503.02531 section 2; arXiv:2306.13649 section 3.
    """
    policy = policy or default_policy()
    check_teacher("distill_loss", batch, teacher, cfg, teacher_cfg)
    tokens = tf.convert_to_tensor(batch.tokens)
    segments = None if isinstance(batch.segments, tuple) else batch.segments
    weights, packed = row_weights("distill_loss", tokens, batch.weights, segments, cfg)
    total = tf.reduce_sum(weights) if normalizer is None else tf.cast(normalizer, tf.float32)
    total = tf.maximum(total, 1e-9)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    where = row_places(packed)
    out = model_apply(params, router, inputs, cfg=cfg, **where, policy=policy)
    head = tf.cast(head_weight(params), out.hidden.dtype)
    if teacher is None:
        given = _stored_rows(batch.teacher, targets)
    else:
        said = model_apply(*tree.map_leaves(tf.stop_gradient, teacher), inputs, cfg=teacher_cfg, **where, policy=policy)
        given = _rows(said.hidden), tf.cast(head_weight(teacher.params), said.hidden.dtype)
    apart = divergence(
        _rows(out.hidden), head, given, kind=kind, mix=mix, temperature=temperature, chunk=policy.loss_chunk,
        keep=policy.loss_keep, fuse=policy.fuse,
    )  # fmt: skip
    counts = tf.reshape(weights, [-1])
    found = tf.reduce_sum(tf.where(tf.equal(counts, 0.0), 0.0, counts * apart)) / total
    told = (out.hidden, head) if nll_weight else (tf.stop_gradient(out.hidden), tf.stop_gradient(head))
    nll = weighted_nll(*told, targets, weights, total, policy=policy)
    mtp, balance, load = further_losses(
        params, router, out, head, targets, weights, packed, total, sequences, cfg=cfg, policy=policy
    )
    loss = (temperature**2 if squared else 1.0) * found + nll_weight * nll + balance_weight * balance
    if cfg.num_mtp_layers:
        loss += mtp_weight * tf.reduce_mean(mtp)
    return loss, DistillParts(nll, found, mtp, balance, load)


def _rows(x: tf.Tensor) -> tf.Tensor:
    """`[B, T, D]` to `[B·T, D]`."""
    return tf.reshape(x, [-1, x.shape[-1]])


def _stored_rows(teacher: TopK, targets: tf.Tensor) -> TopK:
    """`TopK` of `[B, T, K]` to one of `[B·T, K]`."""
    dims = Dims("distill_loss", B=targets.shape[0], T=targets.shape[1])
    dims("teacher.ids", teacher.ids, "B T K")
    dims("teacher.logprobs", teacher.logprobs, "B T K")
    dims("teacher.rest", teacher.rest, "B T")
    ids, logprobs, rest = map(tf.convert_to_tensor, teacher)
    return TopK(_rows(ids), _rows(logprobs), tf.reshape(rest, [-1]))


def check_teacher(
    function: str, batch: DistillBatch, teacher: Teacher | None, cfg: ModelConfig, teacher_cfg: ModelConfig | None
) -> None:
    """Raises `ValueError` unless there is one teacher, of the student's vocabulary."""
    stored = isinstance(batch.teacher, TopK)
    ways = "both in the batch and as a model" if stored else "neither in the batch nor as a model"
    check(stored != (teacher is not None), f"{function}: `teacher` is given {ways}, want one of the two")
    if stored:
        k, most = batch.teacher.ids.shape[-1], cfg.vocab_size
        check(k <= most, f"{function}: `batch.teacher` has {k} tokens at a place, want at most the vocabulary's, {most}")
        return
    check_vocabulary(function, cfg, teacher_cfg)


def check_vocabulary(function: str, cfg: ModelConfig, teacher_cfg: ModelConfig | None) -> None:
    """Raises `ValueError` unless the teacher's configuration is there and has the student's number of tokens."""
    check_type(function, "teacher_cfg", teacher_cfg, ModelConfig)
    sizes = teacher_cfg.vocab_size, cfg.vocab_size
    check(
        sizes[0] == sizes[1],
        f"{function}: `teacher_cfg` has a vocabulary of {sizes[0]} tokens, want the student's, {sizes[1]}",
    )


def _check_recipe(function: str, policy: ComputePolicy) -> None:
    delayed = policy.fp8 is not None and policy.fp8.scaling == "delayed"
    check(not delayed, f"{function}: the policy's FP8 recipe has delayed scales, want one without for distillation")


@plain
def distill_update(
    state: TrainState,
    batch: DistillBatch,
    teacher: Teacher | None = None,
    *,
    cfg: ModelConfig,
    optimizer: Optimizer,
    bias_rate: float | Schedule = 0.0,
    limits: Limits = Limits(),
    policy: ComputePolicy | None = None,
    balance_weight: float = 0.0,
    **how: Any,
) -> tuple[TrainState, TrainMetrics]:
    """One optimiser step of a student, as a pure function.

    Args:
      state: the student's, see `TrainState`. All tokens of the rows count as seen, padding included.
      batch: see `DistillBatch`.
      teacher: see `distill_loss`.
      cfg, optimizer: the student's configuration and the optimiser.
      bias_rate: γ, how far the step moves the selection biases; 0 leaves them as they are.
      limits: the largest loss and gradient norm of a step that is taken.
      policy: how to compute; default: the device's.
      balance_weight, how: see `distill_loss`.

    Returns:
      The new state and `TrainMetrics`, whose `parts` are `DistillParts`. A step that is not finite or exceeds the limits is
      not taken: the state comes back as it was.
    """
    policy = policy or default_policy()
    check_ema("distill_update", state, None)
    _check_recipe("distill_update", policy)
    check_teacher("distill_update", batch, teacher, cfg, how.get("teacher_cfg"))
    dims = Dims("distill_update")
    dims("weights", batch.weights, "A B T")
    dims("tokens", batch.tokens[..., 1:], "A B T")
    if not isinstance(batch.segments, tuple):
        dims("segments", batch.segments[..., 1:], "A B T")
    if isinstance(batch.teacher, TopK):
        dims("teacher.ids", batch.teacher.ids, "A B T K")
    check(dims.A != 0, "distill_update: `tokens` has no micro-batch, want at least one [A, B, T+1]")
    params = cast_params(state.params, policy)
    if teacher is not None:
        teacher = Teacher(cast_params(teacher.params, policy), teacher.router)
    batch = tree.map_leaves(tf.convert_to_tensor, batch)
    how |= {"cfg": cfg, "policy": policy}
    loss, parts, grads = _accumulate(params, state.router, batch, teacher, balance_weight, how)
    squares = square_sums(grads, fuse=policy.fuse)
    norm = tf.sqrt(tf.reduce_sum(squares))
    take = within_limits(loss, norm, limits)
    rate = tf.cast(bias_rate(tf.cast(state.tokens, tf.float64)), tf.float32) if callable(bias_rate) else bias_rate
    taken = Taken(norm, take, parts.load, tf.size(batch.weights, tf.int64), rate)
    new, stats = advance_state(state, grads, taken, optimizer, fuse=policy.fuse)
    return new, TrainMetrics(loss, parts, stats, take, squares)


def _accumulate(
    params: ModelParams, router: RouterState, batch: DistillBatch, teacher: Teacher | None, balance_weight: float,
    how: dict[str, Any],
) -> tuple[tf.Tensor, DistillParts, Tree]:  # fmt: skip
    """Returns loss, parts and gradients of all micro-batches, added up."""
    known = batch.tokens.shape[0]
    count = tf.shape(batch.tokens)[0] if known is None else known
    parts_of_balance = tf.cast(count, tf.float32)  # the balance loss is a mean over them
    weights, packed = tf.cast(batch.weights, tf.float32), {}
    if not isinstance(batch.segments, tuple):  # or over all documents, to which each adds its own
        inside = segment_inputs(tf.reshape(batch.segments, [-1, batch.segments.shape[-1]])).inside
        weights *= tf.cast(tf.reshape(inside, tf.shape(weights)), tf.float32)
        packed, parts_of_balance = {"sequences": segment_count(inside)}, tf.constant(1.0)
    total, share = tf.reduce_sum(weights), balance_weight / parts_of_balance

    def part(i):
        leaves = tree.flatten(params)
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            one = tree.map_leaves(lambda x: x[i], batch)
            loss, parts = distill_loss(
                params, router, one, teacher, balance_weight=share, normalizer=total, **packed, **how
            )
        grads = tape.gradient(loss, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return loss, parts, tree.unflatten_as(params, [tf.convert_to_tensor(g) for g in grads])

    loss, parts, grads = accumulate_parts(part, count)
    return loss, parts._replace(balance=parts.balance / parts_of_balance), grads


def make_distill_step(
    cfg: ModelConfig,
    optimizer: Optimizer,
    *,
    teacher_cfg: ModelConfig | None = None,
    kind: str = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
    squared: bool = True,
    nll_weight: float = 0.0,
    mtp_weight: float = 0.0,
    balance_weight: float = 0.0,
    bias_rate: float | Schedule = 0.0,
    policy: ComputePolicy | None = None,
) -> Callable[..., tuple[TrainState, TrainMetrics]]:
    """Compiles `distill_update` into a step that updates its state in place.

    Args:
      cfg, optimizer, bias_rate, policy: as in `distill_update`.
      teacher_cfg: the configuration of a teacher that the step runs; `None`: batches have what it has said.
      kind, mix, temperature, squared, nll_weight, mtp_weight, balance_weight: as in `distill_loss`.

    Returns:
      `step(state, batch, teacher=None, limits=Limits()) -> (state, TrainMetrics)`. The given state is donated (see
      `compile_step`), the teacher is not; the first call compiles. `step.traces()` counts compilations: one for each shape
      of a micro-batch, and one more when their number first changes.

    Raises:
      ValueError: settings that cannot be, at once.
    """
    check_type("make_distill_step", "optimizer", optimizer, Optimizer)
    check_choice("make_distill_step", "kind", kind, KINDS)
    check(0 < mix < 1, f"make_distill_step: `mix` is {mix}, want above 0 and below 1")
    check(temperature > 0, f"make_distill_step: `temperature` is {temperature}, want above 0")
    weights = {"nll_weight": nll_weight, "mtp_weight": mtp_weight, "balance_weight": balance_weight}
    for name, value in weights.items():
        check(value >= 0, f"make_distill_step: `{name}` is {value}, want at least 0")
    if teacher_cfg is not None:
        check_vocabulary("make_distill_step", cfg, teacher_cfg)
    policy = policy or default_policy()
    _check_recipe("make_distill_step", policy)
    how = weights | {
        "teacher_cfg": teacher_cfg, "kind": kind, "mix": mix, "temperature": temperature, "squared": squared,
        "bias_rate": bias_rate, "policy": policy,
    }  # fmt: skip

    def update(state, batch, limits, *teacher):
        return distill_update(state, batch, *teacher, cfg=cfg, optimizer=optimizer, limits=limits, **how)

    shapes: dict[tuple, Callable[..., tuple[TrainState, TrainMetrics]]] = {}  # by what a micro-batch is like

    def step(
        state: TrainState, batch: DistillBatch, teacher: Teacher | None = None, limits: Limits = Limits()
    ) -> tuple[TrainState, TrainMetrics]:
        check_teacher("distill_step", batch, teacher, cfg, teacher_cfg)
        check_token_ids("distill_step", "tokens", batch.tokens, cfg.vocab_size)
        if isinstance(batch.teacher, TopK):
            check_token_ids("distill_step", "teacher.ids", batch.teacher.ids, cfg.vocab_size)
        batch = tree.map_leaves(tf.convert_to_tensor, batch)
        key = tuple((path, *leaf.shape[1:]) for path, leaf in tree.items(batch))
        if key not in shapes:
            shapes[key] = compile_step(update, jit=policy.jit, relax=True)
        model = () if teacher is None else (tree.map_leaves(tf.convert_to_tensor, teacher),)
        return shapes[key](state, batch, Limits(*(tf.cast(x, tf.float32) for x in limits)), *model)

    step.traces = lambda: sum(compiled.traces() for compiled in shapes.values())
    return step
