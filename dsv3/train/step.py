"""The training step: loss and gradients over micro-batches, optimiser, router bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import Dims, check, check_choice, check_token_ids, check_type, static_shape
from dsv3.compiled import compile_step
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.layout import mesh_of
from dsv3.nn.fp8_delayed import delayed_attach, delayed_detach, delayed_specs, delayed_update
from dsv3.nn.model import ModelParams, RouterState, cast_params, model_init, model_specs, router_init
from dsv3.nn.quantized import is_quantized
from dsv3.ops.segments import segment_count, segment_inputs
from dsv3.parallel.mesh import on_device, pack, unpack_tree, whole
from dsv3.parallel.mesh import place as place_leaf
from dsv3.pipeline import one_f_one_b
from dsv3.policy import ComputePolicy, default_policy
from dsv3.recipe import Fp8Recipe, sends_fp8
from dsv3.spec import ParamSpec, init_params
from dsv3.train.accumulate import accumulate_parts
from dsv3.train.loss import LossParts, pretrain_loss
from dsv3.train.mesh_params import state_layouts
from dsv3.train.mesh_step import MakeTable, MeshPlan, Rates, make_mesh_update
from dsv3.train.optim import Optimizer, Schedule, square_sums
from dsv3.train.schedule_paper import PAPER_START
from dsv3.train.state import Limits, Taken, TrainMetrics, TrainState, advance_state, check_ema, within_limits
from dsv3.typing import TensorLike, Tree


def train_init(
    key: TensorLike, cfg: ModelConfig, optimizer: Optimizer, layouts: Tree | None = None, *, fp8: Fp8Recipe | None = None,
    ema: bool = False,
) -> TrainState:  # fmt: skip
    """Returns the state of a new model.

    Args:
      key: `[2]` int, the random key of the parameters.
      cfg: the model's configuration.
      optimizer: see `adamw`.
      layouts: how the parameters are stored on a mesh; each leaf is placed when it has been drawn, so that no process holds
        more than one whole. The values are those of one device. `None`: one device.
      fp8: the recipe of the steps; one with delayed scales has a part in the state.
      ema: keep an average of the parameters, for a step with an `ema_decay`.
    """
    if layouts is None:
        return train_state(model_init(key, cfg), router_init(cfg), optimizer, fp8=fp8, ema=ema)
    _check_mesh_recipe("train_init", fp8)

    def draw(path: str, spec: ParamSpec, layout: Any) -> tf.Tensor:
        return place_leaf(tf.cast(init_params(key, {path: spec})[path], tf.float32), layout)

    return _state_on_mesh(tree.map_with_path(draw, model_specs(cfg), layouts), router_init(cfg), optimizer, layouts, ema)


def _state_on_mesh(params: ModelParams, router: RouterState, optimizer: Optimizer, layouts: Tree, ema: bool) -> TrainState:
    """The state of parameters that lie on the mesh already; each device makes its own part of the optimiser's."""
    parts = []
    for device, part in zip(mesh_of(layouts).local_devices(), unpack_tree(params)):
        with on_device(device):
            parts.append(optimizer.init(part))
    placed = state_layouts({"opt": parts[0]}, layouts)["opt"]
    leaves = [pack(held, layout) for held, layout in zip(zip(*map(tree.flatten, parts)), tree.flatten(placed))]
    opt = tree.unflatten_as(parts[0], leaves)
    small = TrainState(tf.constant(0, tf.int64), tf.constant(0, tf.int64), (), router, ())
    return place_state(small, layouts)._replace(params=params, opt=opt, ema=params if ema else ())


def train_specs(cfg: ModelConfig, optimizer: Optimizer, *, fp8: Fp8Recipe | None = None, ema: bool = False) -> TrainState:
    """Returns a state's shapes and dtypes, a tree of `tf.TensorSpec`, without drawing it.

    Args:
      cfg, optimizer, fp8, ema: as of `train_init`.
    """
    with tf.Graph().as_default():
        state = train_init([0, 0], cfg, optimizer, fp8=fp8, ema=ema)
    return tree.map_leaves(lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), state)


def train_state(
    params: ModelParams, router: RouterState, optimizer: Optimizer, layouts: Tree | None = None, *,
    fp8: Fp8Recipe | None = None, ema: bool = False,
) -> TrainState:  # fmt: skip
    """Returns the state that starts training from given parameters.

    Args:
      params, router: the model, e.g. from `load_pretrained`. Parameters become float32, whatever they are: in bfloat16 most
        updates would be rounded away. The dtype of the products is the policy's.
      optimizer: see `adamw`.
      layouts: how they are stored on a mesh; the parameters are then tensors that are equal on all processes, and what the
        optimiser has is never whole in a process. `None`: one device.
      fp8, ema: as of `train_init`.

    References: DeepSeek-V3 section 3.3.3 (master weights in float32), 3.2.3 (average of the parameters).
    """
    check_type("train_state", "optimizer", optimizer, Optimizer)
    check(
        not is_quantized(params),
        "train_state: `params` hold quantised matrices, want floating ones, as of `load_pretrained(..., dtype='float32')`",
    )
    if layouts is not None:
        _check_mesh_recipe("train_state", fp8)
        params = tree.map_leaves(lambda p, layout: place_leaf(tf.cast(p, tf.float32), layout), params, layouts)
        return _state_on_mesh(params, router, optimizer, layouts, ema)
    params = tree.map_leaves(lambda p: tf.cast(p, tf.float32), params)
    zero = tf.constant(0, tf.int64)
    amax = tree.map_leaves(lambda spec: tf.zeros(spec.shape), delayed_specs(params, fp8))
    averages = tree.map_leaves(tf.identity, params) if ema else ()
    return TrainState(zero, tf.identity(zero), params, router, optimizer.init(params), amax, averages)


def _check_mesh_recipe(function: str, fp8: Fp8Recipe | None) -> None:
    alone = fp8 is None or fp8.scaling != "delayed"
    check(alone, f"{function}: the recipe has delayed scales, which devices do not share; want `layouts` None for it")
    expanded = fp8 is None or fp8.operands == "expanded"
    check(expanded, f"{function}: the recipe has operands='float8', which a mesh's pieces do not have; want 'expanded'")


@plain
def train_update(
    state: TrainState,
    tokens: TensorLike,
    weights: TensorLike | None = None,
    *,
    cfg: ModelConfig,
    optimizer: Optimizer,
    segments: TensorLike | None = None,
    mtp_weight: float | Schedule = PAPER_START.mtp_weight,
    balance_weight: float | Schedule = PAPER_START.balance_weight,
    bias_rate: float | Schedule = PAPER_START.bias_rate,
    ema_decay: float | None = None,
    limits: Limits = Limits(),
    policy: ComputePolicy | None = None,
) -> tuple[TrainState, TrainMetrics]:
    """One optimiser step as a pure function.

    Args:
      state: see `TrainState`.
      tokens: `[B, T+1]` int, or `[A, B, T+1]`: A micro-batches whose gradients add up.
      weights: `[B, T]` or `[A, B, T]` float32, weight of each target; default: ones.
      cfg, optimizer: the model's configuration and the optimiser.
      segments: `[B, T+1]` or `[A, B, T+1]` int, the documents of packed rows, 0 for padding, see `pretrain_loss`; default: a
        row is one document. All tokens of the rows count as seen, padding included.
      mtp_weight, balance_weight: λ and α of the loss; bias_rate: γ of the router's bias. Floats, or schedules of the tokens
        seen (`curve_schedule`); default: what the paper begins with.
      ema_decay: of the average of the parameters that the state keeps; `None`: it keeps none.
      limits: the largest loss and gradient norm of a step that is taken.
      policy: how to compute; default: the device's.

    Returns:
      The new state and `TrainMetrics`. The router's bias moves once, by the load of all micro-batches. A step that is not
      finite or exceeds the limits is not taken: the state comes back as it was.
    """
    policy = policy or default_policy()
    tokens = tf.convert_to_tensor(tokens)
    rank = tokens.shape.rank
    check(rank in (2, 3), f"train_update: `tokens` has rank {rank}, want 2 [B, T+1] or 3 [A, B, T+1]")
    shape = static_shape(tokens)
    dims = Dims("train_update", T=shape[-1] - 1)
    dims("tokens", tokens[..., 1:], "A B T" if rank == 3 else "B T")
    weights = tf.ones([*shape[:-1], shape[-1] - 1]) if weights is None else tf.cast(weights, tf.float32)
    dims("weights", weights, "A B T" if rank == 3 else "B T")
    check(rank == 2 or shape[0] != 0, "train_update: `tokens` has no micro-batch, want at least one [A, B, T+1]")
    if segments is not None:
        segments = tf.convert_to_tensor(segments)
        same = static_shape(segments) == shape
        check(same, f"train_update: `segments` has shape {static_shape(segments)}, want that of `tokens`, {shape}")
    if rank == 2:
        tokens, weights = tf.expand_dims(tokens, 0), tf.expand_dims(weights, 0)
        segments = None if segments is None else tf.expand_dims(segments, 0)
    seen = tf.cast(state.tokens, tf.float64)
    rates = (mtp_weight, balance_weight, bias_rate)
    mtp_w, balance_w, rate = (tf.cast(f(seen), tf.float32) if callable(f) else f for f in rates)
    delayed = policy.fp8 is not None and policy.fp8.scaling == "delayed"
    check(
        bool(state.amax) == delayed,
        f"train_update: `state.amax` is {'filled' if state.amax else 'empty'}, want it as `policy.fp8` has it: give the "
        "same recipe to `train_init` or `train_state`",
    )
    check_ema("train_update", state, ema_decay)
    params = cast_params(state.params, policy)  # once; their gradients come in the compute dtype
    if delayed:
        params = delayed_attach(params, state.amax)

    loss, parts, grads = _accumulate(
        params, state.router, tokens, weights, segments, cfg=cfg, mtp_weight=mtp_w, balance_weight=balance_w, policy=policy
    )
    counted = tf.size(weights, tf.int64)
    if delayed:
        grads, largest = delayed_detach(grads, state.amax)
    squares = square_sums(grads, fuse=policy.fuse)
    norm = tf.sqrt(tf.reduce_sum(squares))
    take = within_limits(loss, norm, limits)
    taken = Taken(norm, take, parts.load, counted, rate)
    new, stats = advance_state(state, grads, taken, optimizer, ema_decay=ema_decay, fuse=policy.fuse)
    if delayed:
        history = delayed_update(state.amax, largest)
        new = new._replace(amax=tree.map_leaves(lambda a, b: tf.where(take, a, b), history, state.amax))
    return new, TrainMetrics(loss, parts, stats, take, squares)


def _accumulate(
    params: ModelParams, router: RouterState, tokens: tf.Tensor, weights: tf.Tensor, segments: tf.Tensor | None, *,
    balance_weight: Any, **how: Any,
) -> tuple[tf.Tensor, LossParts, Tree]:  # fmt: skip
    """Returns loss, parts and gradients of micro-batches `[A, B, T+1]`, added up; `how` is for `pretrain_loss`."""
    known = tokens.shape[0]
    micro_batches = tf.shape(tokens)[0] if known is None else known
    parts_of_balance = tf.cast(micro_batches, tf.float32)  # the balance loss is a mean over them
    if segments is not None:  # or over all documents, to which each adds its own
        inside = segment_inputs(tf.reshape(segments, [-1, segments.shape[-1]])).inside
        weights *= tf.cast(tf.reshape(inside, tf.shape(weights)), tf.float32)
        sequences, parts_of_balance = segment_count(inside), tf.constant(1.0)
    normalizer, share = tf.reduce_sum(weights), balance_weight / parts_of_balance

    def gradients(i):
        packed = {} if segments is None else {"segments": segments[i], "sequences": sequences}
        with tf.GradientTape() as tape:
            leaves = tree.flatten(params)
            tape.watch(leaves)
            loss, parts = pretrain_loss(
                params, router, tokens[i], weights[i], balance_weight=share, normalizer=normalizer, **packed, **how
            )
        grads = tape.gradient(loss, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return loss, parts, tree.unflatten_as(params, [tf.convert_to_tensor(g) for g in grads])

    loss, parts, grads = accumulate_parts(gradients, micro_batches, largest=lambda path: path.endswith(".amax"))
    if known != 1:
        parts = parts._replace(balance=parts.balance / parts_of_balance)
    return loss, parts, grads


def make_train_step(
    cfg: ModelConfig,
    optimizer: Optimizer,
    layouts: Tree | None = None,
    *,
    mtp_weight: float | Schedule = PAPER_START.mtp_weight,
    balance_weight: float | Schedule = PAPER_START.balance_weight,
    bias_rate: float | Schedule = PAPER_START.bias_rate,
    policy: ComputePolicy | None = None,
    schedule: MakeTable = one_f_one_b,
    stage_layers: Sequence[int] | None = None,
    dispatch_dtype: tf.DType | str | None = None,
    expert_nodes: int = 1,
    ema_decay: float | None = None,
) -> Callable[..., tuple[TrainState, TrainMetrics]]:
    """Compiles `train_update` into a step that updates its state in place.

    Args:
      cfg, optimizer, mtp_weight, balance_weight, bias_rate, ema_decay, policy: as in `train_update`.
      layouts: `None`: one device. Else how the parameters are stored on a mesh (`make_layouts`, `zero_layouts`); the state
        must have been placed so (`place_state`). The step computes the same.
      schedule: on a mesh with an axis `pipe`, the order of micro-batches on its ranks: a generator of `dsv3.pipeline`, such
        as `dualpipe`. The micro-batches are those of `tokens` `[A, B, T+1]`.
      stage_layers: the layers of each stage; default: as even as possible.
      dispatch_dtype: on a mesh, the dtype of rows on their way to other devices' experts; default: the compute dtype, or
        FP8 where the policy's recipe says so.
      expert_nodes: into how many nodes of neighbouring devices the mesh's axis `expert` is cut: with more than one, a row
        goes to each node that has experts for it once, and is forwarded there.

    Returns:
      `step(state, tokens, weights=None, limits=Limits(), *, segments=None) -> (state, TrainMetrics)`, with `segments` as in
      `train_update`. The given state is donated (see `compile_step`); the first call compiles. `step.traces()` counts
      compilations: one for each shape of a micro-batch, packed or not, and one more when their number first changes; after
      that it may be any.

      On a mesh every process passes the same whole batch. `step.traces()` counts what the model's pieces were compiled for,
      capacities of the experts included. Old and new state exist side by side while the optimiser runs.

    Raises:
      ValueError: layouts that the step cannot use, at once; a schedule or cut that does not fit, at the first step, which
        tells the number of micro-batches.
    """
    check_type("make_train_step", "optimizer", optimizer, Optimizer)
    policy = policy or default_policy()
    decays = ema_decay is None or 0 < ema_decay < 1
    check(decays, f"make_train_step: `ema_decay` is {ema_decay}, want 0 < d < 1 or None")
    rates = {"mtp_weight": mtp_weight, "balance_weight": balance_weight, "bias_rate": bias_rate}
    if layouts is not None:
        _check_mesh_recipe("make_train_step", policy.fp8)
        dtype = None if dispatch_dtype is None else tf.as_dtype(dispatch_dtype)
        check_choice("make_train_step", "dispatch_dtype", dtype and dtype.name, (None, "float32", "bfloat16"))
        check(
            dtype is None or not sends_fp8(policy.fp8),
            f"make_train_step: `dispatch_dtype` is {dtype and dtype.name!r}, but by `policy.fp8` rows travel in FP8",
        )
        plan = MeshPlan(schedule, stage_layers, dtype, expert_nodes, ema_decay)
        return _mesh_step(cfg, optimizer, layouts, rates, policy, plan)
    apart = dispatch_dtype is not None or expert_nodes != 1
    check(not apart, "make_train_step: `dispatch_dtype` or `expert_nodes` is given, but no `layouts` that share out experts")
    alone = stage_layers is None and schedule is one_f_one_b
    check(alone, "make_train_step: `schedule` or `stage_layers` is given, but without `layouts` there is no pipeline")

    def update(state, tokens, weights, limits, segments=None):
        how = {"optimizer": optimizer, "policy": policy, "ema_decay": ema_decay, "limits": limits, "segments": segments}
        return train_update(state, tokens, weights, cfg=cfg, **how, **rates)

    shapes: dict[tuple[int, ...], Callable[..., tuple[TrainState, TrainMetrics]]] = {}  # by the shape of a micro-batch

    def step(
        state: TrainState, tokens: TensorLike, weights: Any = None, limits: Limits = Limits(), *, segments: Any = None
    ) -> tuple[TrainState, TrainMetrics]:
        check_token_ids("train_step", "tokens", tokens, cfg.vocab_size)
        tokens = tf.convert_to_tensor(tokens)
        if weights is None:
            weights = tf.ones([*tokens.shape[:-1], tokens.shape[-1] - 1])
        packed = () if segments is None else (tf.cast(segments, tf.int32),)
        micro_batch = (len(packed), tokens.shape.rank, *tokens.shape[-2:])
        if micro_batch not in shapes:
            shapes[micro_batch] = compile_step(update, jit=policy.jit, relax=True)
        limits = Limits(*(tf.cast(x, tf.float32) for x in limits))
        return shapes[micro_batch](state, tokens, tf.cast(weights, tf.float32), limits, *packed)

    step.traces = lambda: sum(compiled.traces() for compiled in shapes.values())
    return step


def _mesh_step(cfg, optimizer, layouts, rates, policy, plan: MeshPlan):
    """`make_train_step` on a mesh."""
    update = make_mesh_update(cfg, optimizer, layouts, policy, plan)

    def step(
        state: TrainState, tokens: TensorLike, weights: Any = None, limits: Limits = Limits(), *, segments: Any = None
    ) -> tuple[TrainState, TrainMetrics]:
        check_token_ids("train_step", "tokens", tokens, cfg.vocab_size)
        tokens = np.asarray(tokens, np.int32)
        check(tokens.ndim in (2, 3), f"train_step: `tokens` has shape {tokens.shape}, want [B, T+1] or [A, B, T+1]")
        wanted = (*tokens.shape[:-1], tokens.shape[-1] - 1)
        weights = np.ones(wanted, np.float32) if weights is None else np.asarray(weights, np.float32)
        check(weights.shape == wanted, f"train_step: `weights` has shape {weights.shape}, want {wanted}, one column less")
        check(min(wanted) > 0, f"train_step: `tokens` has shape {tokens.shape}, want at least one row of two tokens")
        if segments is not None:
            segments = np.asarray(segments, np.int32)
            same = segments.shape == tokens.shape
            check(same, f"train_step: `segments` has shape {segments.shape}, want that of `tokens`, {tokens.shape}")
        if tokens.ndim == 2:
            tokens, weights, segments = tokens[None], weights[None], None if segments is None else segments[None]
        seen = tf.cast(whole(state.tokens), tf.float64)
        values = (float(rate(seen)) if callable(rate) else float(rate) for rate in rates.values())
        return update(state, tokens, weights, segments, Rates(*values), limits)

    step.traces = update.traces
    return step


def place_state(state: TrainState, layouts: Tree) -> TrainState:
    """Lays a state out on a mesh: parameters and what mirrors them as `layouts` say, the rest on every device.

    Args:
      state: tensors, equal on all processes.
      layouts: how the parameters are stored, from `make_layouts` or `zero_layouts`.
    """
    return tree.map_leaves(place_leaf, state, state_layouts(state, layouts))


def gather_state(state: TrainState) -> TrainState:
    """Returns a state from a mesh as plain tensors; every process takes part, and each gets the whole."""
    return tree.map_leaves(whole, state)
