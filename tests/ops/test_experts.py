"""The routed experts: three kernels, one function, one gradient, no token dropped."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.experts import KERNELS, experts_apply
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, gradients, normal

WIDTH, INNER, EXPERTS = 6, 5, 4


def routing(seed, tokens, top_k, spread):
    """Experts of each token: `"random"`, `"one"` (all choose the same), `"ends"` (the middle ones get nothing)."""
    rng = np.random.default_rng(seed)
    allowed = {"random": list(range(EXPERTS)), "one": [2, *range(2), 3][:top_k], "ends": [0, EXPERTS - 1]}[spread]
    top_k = min(top_k, len(allowed))
    return np.array([rng.permutation(allowed)[:top_k] for _ in range(tokens)], np.int32).reshape(-1, top_k)


def inputs(experts):
    n, k = experts.shape
    return [normal(0, n, WIDTH), normal(1, n, k), normal(2, EXPERTS, WIDTH, 2 * INNER), normal(3, EXPERTS, INNER, WIDTH)]


def run(kernel, experts, multiple=4, fuse=False):
    def apply(x, weights, gate_up, down):
        return experts_apply(x, weights, experts, gate_up, down, kernel=kernel, multiple=multiple, fuse=fuse)

    return apply


def oracle(experts):
    return lambda x, weights, gate_up, down: oracles.experts_sum(x, weights, experts, gate_up, down)


@SWEEP
@given(
    tokens=st.integers(0, 9), top_k=st.integers(1, EXPERTS), spread=st.sampled_from(["random", "one", "ends"]),
    multiple=st.sampled_from([1, 3, 16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_the_loop_over_tokens(tokens, top_k, spread, multiple, seed):
    experts = routing(seed, tokens, top_k, spread)
    arguments = inputs(experts)
    want = oracle(experts)(*(a.astype(np.float64) for a in arguments))
    for kernel in KERNELS:
        assert_close(run(kernel, experts, multiple)(*arguments), want, what=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("tokens", "top_k", "spread"), [(1, 1, "one"), (5, 2, "random"), (6, 2, "ends"), (5, 1, "one")])
def test_gradient(kernel, tokens, top_k, spread):
    experts = routing(0, tokens, top_k, spread)
    check_gradient(run(kernel, experts), oracle(experts), inputs(experts))


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_without_tokens_have_zero_gradient(kernel):
    experts = routing(0, 5, 2, "ends")
    _, _, d_gate_up, d_down = gradients(run(kernel, experts), inputs(experts))
    for gradient in (d_gate_up, d_down):
        assert [bool(g.any()) for g in gradient.numpy()] == [True, False, False, True]


@pytest.mark.parametrize(
    ("kernel", "jit", "fuse", "tokens"), [("sorted", False, True, 6), ("blocks", True, False, 6), ("rows", True, False, 3)]
)
def test_compiled(kernel, jit, fuse, tokens):
    """Fused kernels and XLA, on values and gradients; the experts come as a tensor, so one program serves any spread."""
    arguments = inputs(np.zeros([tokens, 2], np.int32))

    @tf.function(jit_compile=jit, autograph=False)
    def value_and_grad(experts, *arguments):
        fn = run(kernel, experts, fuse=fuse)
        return [fn(*arguments), *gradients(fn, arguments)]

    for spread in ("random", "one", "ends"):
        experts = routing(0, tokens, 2, spread)
        want = run("rows", experts)
        for got, expected in zip(
            value_and_grad(tf.constant(experts), *map(tf.constant, arguments)),
            [want(*arguments), *gradients(want, arguments)],
        ):
            assert_close(got, expected)
    assert value_and_grad.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens(kernel):
    experts = np.zeros([0, 2], np.int32)
    assert run(kernel, experts)(*inputs(experts)).shape == (0, WIDTH)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel):
    experts = routing(0, 7, 3, "random")
    x, weights, gate_up, down = inputs(experts)
    x, gate_up, down = (tf.cast(a, tf.bfloat16) for a in (x, gate_up, down))
    exact = [tf.cast(a, tf.float64).numpy() for a in (x, gate_up, down)]
    got = run(kernel, experts)(x, weights, gate_up, down)
    assert got.dtype == tf.bfloat16
    # The activation, its weighted form and each expert's result are rounded to 2^-9.
    assert_close(got, oracles.experts_sum(exact[0], weights, experts, *exact[1:]), 1e-2)
    for g, of in zip(gradients(run(kernel, experts), [x, weights, gate_up, down]), (x, weights, gate_up, down)):
        assert g.dtype == of.dtype


def test_wrong_input_is_named():
    experts = routing(0, 3, 2, "random")
    x, weights, gate_up, down = inputs(experts)
    for arguments, message in [
        ((x[0], weights, experts, gate_up, down), r"experts_apply: `x` has shape \(6,\), want \(\?, \?\) \[N, D\]"),
        ((x, weights[:2], experts, gate_up, down), r"experts_apply: `weights` has shape \(2, 2\), want \(3, \?\) \[N, K\]"),
        ((x, weights, experts[:, :1], gate_up, down), r"experts_apply: `experts` has shape \(3, 1\), want \(3, 2\)"),
        ((x, weights, experts, gate_up[:, 1:], down), r"experts_apply: `gate_up` has shape .* \[E, D, J\]"),
        ((x, weights, experts, gate_up, down[1:]), r"experts_apply: `down` has shape .*, want \(4, \?, 6\) \[E, F, D\]"),
        ((x, weights, experts, gate_up[..., 1:], down), r"experts_apply: `gate_up` has last dim 9, want 10 \[2F\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            experts_apply(*arguments)
    with pytest.raises(ValueError, match="experts_apply: `kernel` is 'dense', want one of 'sorted', 'blocks', 'rows'"):
        experts_apply(x, weights, experts, gate_up, down, kernel="dense")


@pytest.mark.parametrize("kernel", ["sorted", "blocks", "rows"])
def test_no_expert_adds_nothing(kernel):
    """The number of experts stands for none, with the weight 0: results and gradients are those of the other rows."""
    x, gate_up, down = normal(0, 4, 4), normal(1, 3, 4, 6), normal(2, 3, 3, 4)
    experts, weights = np.array([[2], [3], [0], [3]], np.int32), np.array([[1.0], [0.0], [2.0], [0.0]], np.float32)

    def run(x, gate_up, down):
        return experts_apply(x, weights, experts, gate_up, down, kernel=kernel, multiple=4)

    got = run(x, gate_up, down)
    kept = [0, 2]
    want = experts_apply(x[kept], weights[kept], experts[kept], gate_up, down, kernel=kernel, multiple=4)
    assert_close(tf.gather(got, kept), want)
    assert not tf.gather(got, [1, 3]).numpy().any()
    d = normal(3, 4, 4)
    found = gradients(run, [x, gate_up, down], [tf.constant(d)])
    part = gradients(
        lambda x, a, b: experts_apply(x, weights[kept], experts[kept], a, b, kernel=kernel, multiple=4),
        [x[kept], gate_up, down], [tf.constant(d[kept])],
    )  # fmt: skip
    assert_close(tf.gather(found[0], kept), part[0], 1e-5)
    assert_close(found[1], part[1], 1e-5)
    assert_close(found[2], part[2], 1e-5)
