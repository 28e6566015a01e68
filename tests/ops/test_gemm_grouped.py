"""FP8 products of the experts' rows against a loop over experts in float64."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.dispatch import dispatch_rows
from dsv3.ops.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_quantize
from dsv3.ops.gemm import fp8_fprop, fp8_wgrad
from dsv3.ops.gemm_grouped import fp8_grouped_gemm, fp8_grouped_wgrad, fp8_quantize_groups
from tests.compare import SWEEP, normal
from tests.ops.test_gemm import assert_product, dequantize

SIZES = [0, 1, 2, 127, 128, 129, 257]
MODEL = 34 * 4 * 2.0**-13  # what the narrow accumulator loses at worst of Σ|p|, see tests/ops/test_accumulator.py
ACCUMULATORS = {"float32": 0.0, "tensor_core": MODEL}


def ranges(rows):
    ends = np.cumsum(rows)
    return [slice(end - count, end) for end, count in zip(ends, rows)]


@st.composite
def groups(draw, multiple=1):
    """Rows of up to four experts and the size of the buffer, with a tail or without."""
    rows = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4))
    rows = np.array([-(-n // multiple) * multiple for n in rows], np.int32)
    return rows, max(int(rows.sum()) + draw(st.sampled_from([0, 1, 130])) * multiple, multiple)


def assert_gemm(got, a, b, rows, model):
    left, right = dequantize(a, ROW_BLOCK), dequantize(b, WEIGHT_BLOCK)
    for expert, part in enumerate(ranges(rows)):
        assert_product(got[part], left[part], right[expert], model)
    assert not np.any(got[rows.sum() :])


@SWEEP
@given(group=groups(), k=st.sampled_from([1, 127, 129]), n=st.sampled_from([1, 130]), seed=st.integers(0, 99))
def test_gemm_matches_a_loop_over_experts(group, k, n, seed):
    rows, size = group
    a, b = fp8_quantize(normal(seed, size, k), block=ROW_BLOCK), fp8_quantize(normal(seed, len(rows), k, n))
    back = fp8_quantize(normal(seed, size, n), block=ROW_BLOCK)
    turned = Fp8Tensor(*(np.swapaxes(t, -1, -2) for t in b))
    for accumulate, model in ACCUMULATORS.items():
        assert_gemm(fp8_grouped_gemm(a, b, rows, accumulate=accumulate), a, b, rows, model)
        got = fp8_grouped_gemm(back, b, rows, accumulate=accumulate, transpose_b=True)
        assert_gemm(got, back, turned, rows, model)


@SWEEP
@given(group=groups(multiple=16), accumulate=st.sampled_from(list(ACCUMULATORS)), transpose=st.booleans())
def test_blocks_are_the_same_product(group, accumulate, transpose):
    rows, size = group
    a, b = fp8_quantize(normal(0, size, 130), block=ROW_BLOCK), fp8_quantize(normal(1, len(rows), 130, 130))
    options = {"transpose_b": transpose, "accumulate": accumulate}
    got = fp8_grouped_gemm(a, b, rows, kernel="blocks", multiple=16, **options)
    want = fp8_grouped_gemm(a, b, rows, **options).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-7 * max(np.abs(want).max(), 1))


def quantized_parts(x, rows):
    """Each expert's rows, quantised alone: its tiles start with its first row."""
    return [fp8_quantize(x[part], block=COLUMN_BLOCK) for part in ranges(rows)]


@SWEEP
@given(group=groups(), width=st.sampled_from([1, 5]), seed=st.integers(0, 99))
def test_tiles_start_anew_at_each_expert(group, width, seed):
    rows, size = group
    x = normal(seed, size, width) * np.exp(normal(seed + 1, size, 1))
    q = fp8_quantize_groups(x, rows)
    assert q.values.shape == (size, width)
    tile = 0
    for part, want in zip(ranges(rows), quantized_parts(x, rows)):
        count = want.scale_inv.shape[0]
        np.testing.assert_array_equal(q.values[part].numpy().view(np.uint8), want.values.numpy().view(np.uint8))
        np.testing.assert_array_equal(q.scale_inv[tile : tile + count], want.scale_inv)
        tile += count
    tail = fp8_quantize(x[rows.sum() :], block=COLUMN_BLOCK)
    assert tile + tail.scale_inv.shape[0] <= q.scale_inv.shape[0]
    np.testing.assert_array_equal(q.values[rows.sum() :].numpy().view(np.uint8), tail.values.numpy().view(np.uint8))


@SWEEP
@given(group=groups(), kernel=st.sampled_from(["sorted", "blocks"]), seed=st.integers(0, 99))
def test_wgrad_matches_a_loop_over_experts(group, kernel, seed):
    rows, size = group
    x, dy = normal(seed, size, 7) * np.exp(normal(seed + 1, size, 1)), normal(seed + 2, size, 130)
    a, b = fp8_quantize_groups(x, rows), fp8_quantize_groups(dy, rows)
    for accumulate, model in ACCUMULATORS.items():
        got = fp8_grouped_wgrad(a, b, rows, accumulate=accumulate, kernel=kernel)
        assert got.shape == (len(rows), 7, 130)
        for found, p, q in zip(got, quantized_parts(x, rows), quantized_parts(dy, rows)):
            assert_product(found, dequantize(p, COLUMN_BLOCK).T, dequantize(q, COLUMN_BLOCK), model)


def test_one_expert_is_the_plain_product():
    """To the bit: the tiles are those of a linear layer's products."""
    rows = np.array([300], np.int32)
    x, dy, w = normal(0, 300, 140), normal(1, 300, 20), normal(2, 1, 140, 20)
    a, b = fp8_quantize(x, block=ROW_BLOCK), fp8_quantize(w)
    p, q = (fp8_quantize(v, block=COLUMN_BLOCK) for v in (x, dy))
    grouped = [fp8_quantize_groups(v, rows) for v in (x, dy)]
    for accumulate in ACCUMULATORS:
        want = fp8_fprop(a, Fp8Tensor(*(t[0] for t in b)), accumulate=accumulate)
        np.testing.assert_array_equal(fp8_grouped_gemm(a, b, rows, accumulate=accumulate), want)
        want = fp8_wgrad(p, q, accumulate=accumulate)
        np.testing.assert_array_equal(fp8_grouped_wgrad(*grouped, rows, accumulate=accumulate)[0], want)


@pytest.mark.parametrize("accumulate", ACCUMULATORS)
def test_modes_agree(accumulate):
    """Of a real dispatch: 40 tokens over 4 experts, one of which gets none."""
    plan = dispatch_rows(np.random.default_rng(0).choice([0, 2, 3], (40, 2)).astype(np.int32), 4, multiple=8)
    size = plan.tokens.shape[0]
    x, dy, w = normal(0, size, 20), normal(1, size, 12), fp8_quantize(normal(2, 4, 20, 12))

    def run(x, dy, rows, kernel, fuse=False):
        options = {"kernel": kernel, "accumulate": accumulate, "fuse": fuse}
        y = fp8_grouped_gemm(fp8_quantize(x, block=ROW_BLOCK), w, rows, multiple=8, **options)
        return y, fp8_grouped_wgrad(fp8_quantize_groups(x, rows), fp8_quantize_groups(dy, rows), rows, **options)

    want = run(x, dy, plan.rows, "sorted")
    assert np.any(want[0]) and not np.any(want[1][1])
    ways = [("sorted", False, False), ("sorted", False, True), ("blocks", False, False), ("blocks", True, False)]
    for kernel, jit, fuse in ways:
        fn = tf.function(lambda *t, k=kernel, f=fuse: run(*t, k, f), autograph=False, jit_compile=jit)
        for found, exact in zip(fn(*map(tf.constant, (x, dy)), plan.rows), want):
            np.testing.assert_allclose(found, exact, rtol=0, atol=4e-7 * np.abs(exact).max())


def operands():
    rows = np.array([2, 3], np.int32)
    a, b = fp8_quantize(normal(0, 6, 20), block=ROW_BLOCK), fp8_quantize(normal(1, 2, 20, 12))
    return a, b, rows, fp8_quantize_groups(normal(0, 6, 20), rows)


@pytest.mark.parametrize(
    ("fn", "call", "message"),
    [
        (fp8_grouped_gemm, lambda a, b, r, q: (a, b, r[:1]), r"`rows` has shape \(1,\), want \(2,\) \[E\]"),
        (fp8_grouped_gemm, lambda a, b, r, q: (a, fp8_quantize(np.ones((2, 19, 12), "f")), r), "`b` has shape"),
        (fp8_grouped_gemm, lambda a, b, r, q: (q, b, r), "`a` has scales of shape"),
        (fp8_grouped_wgrad, lambda a, b, r, q: (a, q, r), r"`x` has shape \(6, 1\), want \(3, 20\) \[S, D\]"),
        (fp8_grouped_wgrad, lambda a, b, r, q: (q, q, np.array([1, 2, 2])), r"`x` has shape \(3, 20\), want \(4, 20\)"),
        (fp8_quantize_groups, lambda a, b, r, q: (np.ones(3, "f"), r), r"`x` has shape \(3,\), want \(\?, \?\) \[C, D\]"),
    ],
)
def test_bad_input_is_named(fn, call, message):
    with pytest.raises(ValueError, match=f"^{fn.__name__}: {message}"):
        fn(*call(*operands()))


def test_bad_options_are_named():
    a, b, rows, q = operands()
    with pytest.raises(ValueError, match="^fp8_grouped_gemm: `multiple` is 4, want a divisor of C = 6"):
        fp8_grouped_gemm(a, b, rows, kernel="blocks", multiple=4)
    for call in (lambda **o: fp8_grouped_gemm(a, b, rows, **o), lambda **o: fp8_grouped_wgrad(q, q, rows, **o)):
        with pytest.raises(ValueError, match="`kernel` is 'rows', want one of 'sorted', 'blocks'"):
            call(kernel="rows")
        with pytest.raises(ValueError, match="`accumulate` is 'float16', want one of 'float32', 'tensor_core'"):
            call(accumulate="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operands": "float8"}, "`kernel` is 'sorted' with operands='float8', want 'blocks'"),
        ({"scaling": "tensor"}, "`kernel` is 'sorted' with scaling='tensor', want 'blocks'"),
        ({"scaling": "row"}, "`scaling` is 'row', want one of 'block', 'tensor'"),
    ],
)
def test_what_only_blocks_can_do_is_refused(options, message):
    a, b = fp8_quantize(normal(0, 8, 5), block=ROW_BLOCK), fp8_quantize(normal(1, 2, 5, 4))
    with pytest.raises(ValueError, match=f"^fp8_grouped_gemm: {message}"):
        fp8_grouped_gemm(a, b, [4, 4], **options)
