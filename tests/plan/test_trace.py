"""The traced step: its counts equal the formulas, hand counts and TensorFlow's own profiler, and what cannot be counted is
refused. Nothing here is computed, but for one step that is run to be compared with its trace."""

import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.ops.fp8 import E4M3
from dsv3.ops.gemm import fp8_gemm
from dsv3.parallel.tape import Tape, Value
from dsv3.plan import (
    Plan,
    Products,
    flops_by_part,
    graph_flops,
    params_by_part,
    rank_checks,
    step_differences,
    trace_policy,
    trace_step,
    traced_params,
    unexplained,
)
from dsv3.plan.trace_check import PADDING, kept_bytes, model_calls
from dsv3.policy import CPU, ComputePolicy
from dsv3.train.pieces import StageBatch, model_pieces, stage_forward
from tests.more import LONG, MORE, more
from tests.plan.models import PAPER, SMALL, TINY, V3, specs
from tests.small import model_config, random_params, random_router, random_tokens

DENSE = model_config(first_k_dense_replace=1, num_hidden_layers=1, num_nextn_predict_layers=0)
CUT = (5, *[4] * 14, 0)  # of the published layout, see docs/plan.md

ROOT = Path(__file__).parents[2]
placeholder = tf.compat.v1.placeholder


def graph():
    """A graph as of a function: in a plain `tf.Graph` tensors compare by identity."""
    return tf.__internal__.FuncGraph("test")


@functools.cache
def traced(cfg, plan, policy=None):
    return trace_step(cfg, specs(cfg), plan, policy)


# Counting a graph


def test_products_of_a_graph():
    with graph().as_default() as g:
        a, b = placeholder(tf.float32, [3, 4]), placeholder(tf.float32, [4, 5])
        batch = placeholder(tf.float32, [2, 3, 4])
        tf.matmul(a, b)
        tf.matmul(b, a, transpose_a=True, transpose_b=True)
        tf.matmul(batch, b)  # the right side is broadcast
        tf.matmul(batch, batch, transpose_a=True)
        tf.einsum("bij,jk->bik", batch, b)
        tf.einsum("bij->b", batch)  # a sum
        tf.reduce_sum(a + 1.0)
    assert graph_flops(g) == 2 * 60 + 2 * 60 + 2 * 120 + 2 * 96 + 2 * 120


@pytest.mark.parametrize("jit", [False, True])
def test_called_functions_are_counted_as_often_as_they_are_called(jit):
    @tf.function(jit_compile=jit, autograph=False)
    def inner(x):
        tf.matmul(x, x)  # nobody reads it
        return tf.matmul(x, x)

    with graph().as_default() as g:
        x = placeholder(tf.float32, [4, 4])
        tf.function(lambda x: inner(inner(x)), autograph=False)(x)
        inner(x)
    assert graph_flops(g) == 3 * 2 * 64


def test_loops_are_counted_by_their_counters():
    def triangle(x, n):
        def outer(i, total):
            body = lambda j, y: (j + 1, y + tf.matmul(x, x))  # noqa: E731
            return i + 1, tf.while_loop(lambda j, _: j <= i, body, [tf.constant(0), total])[1]

        return tf.while_loop(lambda i, _: i < n, outer, [tf.constant(0), x])[1]

    with graph().as_default() as g:
        x = placeholder(tf.float32, [4, 4])
        triangle(x, 7)
        tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, tf.matmul(x, y)), [0, x], maximum_iterations=2)
    assert graph_flops(g) == (7 * 8 // 2 + 2) * 2 * 64


def square(x):
    return tf.matmul(x, x)


# What cannot be counted → (how to make it of a `[4, 4]` tensor and a scalar, what the error says)
UNCOUNTABLE = {
    "a loop over data": (
        lambda x, n: tf.while_loop(lambda i, _: i < n, lambda i, y: (i + 1, square(y)), [0, x]),
        "graph_flops: the rounds of the loop .* depend on data",
    ),
    "a loop until values are small": (
        lambda x, n: tf.while_loop(lambda y: tf.reduce_sum(y) > 1.0, lambda y: (square(y),), [x]),
        "graph_flops: the rounds of the loop .* depend on data",
    ),
    "a loop without end": (
        lambda x, n: tf.while_loop(lambda i, _: i < 3, lambda i, y: (i, square(y)), [tf.constant(0), x]),
        "graph_flops: the loop .* has no end",
    ),
    "a branch": (
        lambda x, n: tf.cond(n > 0, lambda: square(x), lambda: x),
        r"graph_flops: the branches of .* cost \[128, 0\] FLOPs and its condition depends on data",
    ),
    "an unknown size": (
        lambda x, n: tf.matmul(x[:n], x),
        r"graph_flops: the product .* has an operand of shape \(None, 4\), want static sizes",
    ),
    "another product": (
        lambda x, n: tf.nn.conv2d(tf.reshape(x, [1, 4, 4, 1]), tf.ones([2, 2, 1, 1]), 1, "SAME"),
        "graph_flops: .* is a Conv2D, which is not counted",
    ),
    "a product of float8": (
        lambda x, n: fp8_gemm(*[(tf.cast(x, E4M3), [[1.0]])] * 2, a_block=None, b_block=None, operands="float8"),
        "graph_flops: .* is a XlaCallModule, which is not counted",
    ),
    "a choice among functions": (
        lambda x, n: tf.switch_case(n, [lambda: square(x), lambda: x]),
        "graph_flops: .* is a StatelessCase, whose functions are not counted",
    ),
}


@pytest.mark.parametrize("what", UNCOUNTABLE)
def test_what_cannot_be_counted_is_refused(what):
    make, message = UNCOUNTABLE[what]
    with graph().as_default() as g:
        make(placeholder(tf.float32, [4, 4]), placeholder(tf.int32, []))
    with pytest.raises(ValueError, match=message):
        graph_flops(g)


def test_branches_are_counted_where_that_is_certain():
    with graph().as_default() as g:
        x, n = placeholder(tf.float32, [4, 4]), placeholder(tf.int32, [])
        tf.cond(n > 0, lambda: square(x), lambda: square(x + 1.0))
        tf.while_loop(
            lambda i, _: i < 3, lambda i, y: (i + 1, tf.cond(i < 1, lambda: square(y), lambda: y)), [tf.constant(0), x]
        )
    assert graph_flops(g) == 2 * 2 * 64


# The step beside the formulas

MESHES = {
    "one": {"batch": 4, "micro_batch": 2},
    "pipe": {"pipe": 2, "batch": 4, "schedule": "zb1p"},
    "experts": {"expert": 3, "batch": 3, "devices_per_node": 3},
    "nodes": {"pipe": 2, "expert": 3, "data": 2, "batch": 24, "schedule": "dualpipe", "devices_per_node": 1},
    "fold": {"pipe": 2, "expert": 3, "batch": 12, "schedule": "dualpipe_v", "devices_per_node": 1},
}
# Lengths that fill blocks and that do not; loops over tiles of attention; one chunk of the loss; kept probabilities.
POLICIES = {
    "default": {},
    "blocks": {"attention_block": 8, "attention_keep": 0},
    "tiles": {"attention_block": 8, "attention_unroll": 1},
    "one chunk": {"loss_chunk": 4096},
    "kept logits": {"loss_keep": 2**25},
    "float32": {"dtype": None, "jit": False},
}


HOW = [
    ("default", "paper"), ("blocks", "block"), ("tiles", "paper"), ("one chunk", "block"), ("kept logits", "block"),
    ("kept logits", "none"), ("float32", "none"),
]  # fmt: skip


def assert_agrees(cfg, plan, policy=None):
    trace = traced(cfg, plan, policy)
    assert unexplained(cfg, specs(cfg), plan, trace) == {}
    for mtp in (False, True)[: 1 + plan.mtp]:
        assert traced_params(specs(cfg), plan, trace, mtp=mtp) == sum(params_by_part(cfg, specs(cfg), mtp=mtp).values())
    ranks = rank_checks(cfg, specs(cfg), plan, trace)
    assert all(rank.params == rank.params_formula for rank in ranks)
    # Over all devices the pieces' formulas are the model's.
    flops = flops_by_part(cfg, specs(cfg), length=plan.length, recompute=plan.recompute, mtp=plan.mtp)
    devices = plan.data * plan.expert
    assert sum(sum(rank.flops_formula) for rank in ranks) * devices == flops.hardware * plan.batch * plan.length
    # And the ranks' tasks are the pieces' calls.
    calls, chunks = model_calls(trace), plan.micro_batches * devices
    every = sum(calls[name] * sum(piece.flops) for name, piece in trace.pieces.items())
    assert sum(sum(rank.flops) for rank in ranks) * devices == every * chunks


RECOMPUTE = ("none", "paper", "block")
CASES = [("parts", mesh, RECOMPUTE[i % 3]) for i, mesh in enumerate(MESHES)]
CASES += [(name, "nodes", RECOMPUTE[i % 3]) for i, name in enumerate(SMALL)]


@pytest.mark.parametrize(("name", "mesh", "recompute"), CASES)
def test_a_small_step_is_what_the_formulas_say(name, mesh, recompute):
    cfg = SMALL[name]
    if not cfg.num_moe_layers and MESHES[mesh].get("expert", 1) > 1:
        with pytest.raises(ValueError, match="expert:3, but the model has no mixture"):
            traced(cfg, Plan(**MESHES[mesh], length=20))
        return
    assert_agrees(cfg, Plan(**MESHES[mesh], length=20, recompute=recompute, loss_chunk=7))


@pytest.mark.parametrize(("how", "recompute"), HOW)
def test_kernels_differ_as_they_should(how, recompute):
    plan = Plan(length=20, recompute=recompute, loss_chunk=7)
    assert_agrees(SMALL["parts"], plan, trace_policy(plan).replace(**POLICIES[how]))


def test_a_short_sequence_has_smaller_blocks():
    plan = Plan(length=200)
    assert trace_policy(plan).query_block(200) < trace_policy(plan).attention_block
    assert_agrees(DENSE.replace(max_position_embeddings=256), plan)


def test_without_mtp():
    plan = Plan(**MESHES["nodes"], length=20, mtp=False)
    assert_agrees(SMALL["parts"], plan)
    assert not {"mtp", "mtp_loss"} & set(traced(SMALL["parts"], plan).pieces)


def test_a_wrong_formula_is_found():
    """The trace of one plan does not agree with the formulas of another."""
    plan = Plan(length=20)
    trace = traced(SMALL["parts"], plan)
    left = unexplained(SMALL["parts"], specs(SMALL["parts"]), plan.replace(length=21), trace)
    assert set(left) == {"dense", "attention", "head", "mtp", "mtp_loss"}
    other = SMALL["parts"].replace(intermediate_size=11)
    assert set(unexplained(other, specs(other), plan, trace)) == {"dense"}
    more = 2 * 3 * 12 * 20  # FLOPs of one more unit of the feed-forward layer
    assert unexplained(other, specs(other), plan, trace)["dense"] == (-more, -more, -more)


def test_a_dense_block_by_hand():
    """Every product of a block of width 12 on 20 tokens, written out."""
    plan = Plan(length=20, loss_chunk=64)
    trace = traced(DENSE, plan)
    matrices = 12 * 7 + 7 * 2 * 6 + 12 * 8 + 6 * 2 * 7 + 2 * 3 * 12 + 12 * 20 + 10 * 12
    square = 20 * 20  # one block of queries sees all keys
    scores, values = 2 * 2 * 6 * square, 2 * 2 * 3 * square
    linear = 2 * 20 * matrices
    # Probabilities are kept at this length; of scores and values both sides have a gradient.
    want = Products(linear + scores + values, linear + 2 * scores + 2 * values, linear)
    assert trace.pieces["dense"].flops == want
    logits = 2 * 20 * 12 * 40
    assert trace.pieces["head"].flops == Products(logits, 2 * logits, logits)  # the logits again, and the gradient
    assert trace.pieces["embed"].flops == Products()
    assert trace.stages[0].calls == {"embed": 1, "dense": 1, "head": 1}
    assert trace.ranks == (Products(*(a + b for a, b in zip(want, trace.pieces["head"].flops))),)


def profile(g, kinds):
    """Float operations of some kinds of operations by TensorFlow's profiler."""
    build = tf.compat.v1.profiler.ProfileOptionBuilder
    options = build(build.float_operation()).with_empty_output().build()
    node, found = tf.compat.v1.profiler.profile(g, cmd="op", options=options), 0
    while node.children:
        (node,) = node.children
        found += node.float_ops if node.name in kinds else 0
    return found


def piece_graph(piece, params, inputs, *, gradient):
    """The function of a piece, and its gradient by `tf.gradients`, in one graph without calls."""
    with graph().as_default() as g:
        params = tree.map_leaves(lambda p: placeholder(tf.float32, p.shape), params)
        inputs = [placeholder(x.dtype, x.shape) for x in inputs]
        outputs = [y for y in tree.flatten(piece.fn(params, *inputs)) if y.dtype.is_floating]
        if gradient:
            tf.gradients(outputs, [v for v in (*tree.flatten(params), *inputs) if v.dtype.is_floating])
    return g


def test_the_profiler_counts_the_same():
    """TensorFlow's own counts. Its batched products are wrong where the left side is transposed, which a forward pass has
    not and a backward pass has: there only `MatMul` is compared, and attention is added by hand."""
    plan = Plan(length=20, loss_chunk=64)
    policy = trace_policy(plan).replace(dtype=None, jit=False)
    cfg, trace = SMALL["parts"], traced(SMALL["parts"], plan, policy)
    pieces = model_pieces(cfg, policy, ways=1)
    x, bias = tf.TensorSpec([1, 20, 12]), tf.TensorSpec([cfg.moe.router.num_experts])
    layer = lambda stack: tree.map_leaves(lambda s: tf.TensorSpec(s.shape[1:]), stack)  # noqa: E731
    all_specs, both = specs(cfg), ("MatMul", "BatchMatMulV2")
    blocks = {
        "dense": ({"block": layer(all_specs.dense)}, [x]),
        "attention": ({"block": layer(all_specs.moe)}, [bias, x]),
        "mtp": ({"mtp": layer(all_specs.mtp)}, [bias, x, x]),
    }
    for name, (params, inputs) in blocks.items():
        g = piece_graph(getattr(pieces, name), params, inputs, gradient=False)
        assert profile(g, both) == trace.pieces[name].flops.forward > 0
    heads = 2 * 2 * (6 + 3) * 20 * 20
    g = piece_graph(pieces.dense, *blocks["dense"], gradient=True)
    assert profile(g, ("MatMul",)) + 3 * heads == sum(trace.pieces["dense"].flops)
    told = [x, tf.TensorSpec([1, 20], tf.int32), tf.TensorSpec([1, 20]), tf.TensorSpec([])]
    head = {"norm": tf.TensorSpec([12]), "head": tf.TensorSpec([12, 40])}
    g = piece_graph(pieces.head, head, told, gradient=True)
    assert profile(g, ("MatMul",)) == sum(trace.pieces["head"].flops)


def test_a_step_that_runs_calls_and_keeps_what_was_traced():
    """A real tape on real tensors: the same pieces as often, and as many bytes for the backward pass."""
    plan = Plan(length=20, micro_batch=2, batch=2)
    cfg, policy = SMALL["parts"], ComputePolicy(fuse=False, experts="blocks", max_rows=0)
    trace = traced(cfg, plan, policy)
    params, pieces = random_params(specs(cfg)), model_pieces(cfg, policy, ways=1)
    layers = lambda stack, n: [tree.slice_leading(stack, i) for i in range(n)]  # noqa: E731
    params = params._replace(
        dense=dict(enumerate(layers(params.dense, 1))), moe=dict(enumerate(layers(params.moe, 2))), mtp=layers(params.mtp, 2)
    )
    router = tree.map_leaves(lambda b: [Value((row,)) for row in tf.unstack(b)], random_router(cfg))
    tokens, ones = Value((tf.constant(random_tokens(cfg, 2, 20)),)), Value((tf.ones([2, 20]),))
    copies = lambda v, n: [Value((tf.identity(v.parts[0]),)) for _ in range(n)]  # noqa: E731
    batch = StageBatch(tokens, copies(tokens, 3), copies(ones, 3), copies(tokens, 2), Value((tf.constant(40.0),)))
    tape = Tape(("/device:CPU:0",))
    walk = stage_forward(tape, pieces, [params], router, None, batch, layers=range(3), last=True, cfg=cfg)
    with pytest.raises(StopIteration):
        next(walk)
    assert len(tape.records) == sum(model_calls(trace).values())
    kept = {id(x): x for call in tape.records for x in (*call.inputs[0], *call.residuals[0]) if x is not None}
    assert sum(math.prod(x.shape) * x.dtype.size for x in kept.values()) == sum(trace.stages[0].kept.values())


def test_wrong_input_is_refused():
    plan = Plan(length=20)
    with pytest.raises(ValueError, match=r"trace_step: `policy` has remat='none', want 'block' for 'block'"):
        trace_step(TINY, specs(TINY), plan.replace(recompute="block"), trace_policy(plan))
    with pytest.raises(ValueError, match="check_plan: `plan` is impossible: "):
        trace_step(TINY, specs(TINY), plan.replace(stages=(1,)))
    # Rows sorted by expert are split at places that depend on the load.
    sizes = r"graph_flops: the product .* has an operand of shape \(None, 12\), want static sizes"
    with pytest.raises(ValueError, match=sizes):
        trace_step(SMALL["parts"], specs(SMALL["parts"]), plan, CPU.replace(fuse=False, max_rows=0))


# The published model


@LONG
def test_the_671b_step():
    """The whole step of 2,048 devices at its real widths: what docs/plan.md says of it."""
    plan = PAPER.replace(stages=CUT)
    assert_agrees(V3, plan)
    trace = traced(V3, plan)
    assert (trace.capacity, trace.first) == (8 * 128, 2048)  # eight forwarded nodes' 128; half of 4096 tokens
    assert traced_params(specs(V3), plan, trace, mtp=False) == 671_026_404_352
    assert model_calls(trace) | {"embed": 2} == {
        "embed": 2, "dense": 3, "head": 1, "mtp": 1, "mtp_loss": 1, "attention": 58,
        **dict.fromkeys(("to_nodes", "dispatch", "experts", "combine", "from_nodes"), 59),
    }  # fmt: skip
    # 8,192 rows for each of four experts, and up to 63 more each, in blocks of 64 rows.
    assert trace.pieces["experts"].flops == (3 * 2 * 7168 * 2048 * 33_024,) * 3
    padding = [d for d in step_differences(V3, specs(V3), plan, trace) if d.reason in PADDING]
    assert [(d.piece, d.flops.forward) for d in padding] == [("experts", 3 * 2 * 7168 * 2048 * (33_024 - 32_768))]
    # Sixteen blocks of 256 queries see 2,176 keys on average, and not 2,048.5.
    scores = 2 * 128 * (192 + 128)
    whole = [d for d in step_differences(V3, specs(V3), plan, trace) if d.reason == "whole blocks of the causal mask"]
    assert {d.flops.forward for d in whole} == {scores * 4096 * 2176 - scores * 4096 * 4097 // 2}
    # Keeping more than planned is a fact of the step, not of the formulas: see "The step traced" in docs/plan.md.
    kept, gathered, planned = kept_bytes(V3, plan, trace)["moe"]
    assert gathered == 516 * 3 * 7168 * 2048 * 2 / 4096 and 5 < (kept - gathered) / planned < 6


@pytest.mark.skipif(not MORE, reason="a long case")
@pytest.mark.parametrize(
    "changes", [{"expert": 8, "data": 16}, *more({"recompute": "block"}, {"length": 8192, "batch": 7680})]
)
def test_the_671b_step_otherwise(changes):
    """Recomputed blocks; one node without a way between nodes; 32 blocks of queries, which are a loop over tiles."""
    cfg = V3.replace(max_position_embeddings=8192) if "length" in changes else V3
    assert_agrees(cfg, PAPER.replace(stages=CUT, **changes))


@pytest.mark.skipif(not MORE, reason="a long case")
def test_tracing_takes_no_memory_for_what_it_traces():
    """The largest tensor of the programs is 30 GB. A process of its own: this one may have had much memory for others.

    Its peak is that of its address space, as `ru_maxrss` goes on from the process that started it.
    """
    program = (
        "import pathlib; from tests.plan.test_trace import CUT, PAPER, V3, traced; "
        "traced(V3, PAPER.replace(stages=CUT)); print(pathlib.Path('/proc/self/status').read_text())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    (peak,) = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("VmHWM:")]
    assert peak < 3_000_000  # KiB


def test_presets_are_traced():
    cfg = dsv3.preset("tiny")
    assert_agrees(cfg, Plan(pipe=2, expert=2, batch=8, schedule="one_f_one_b", length=32))
