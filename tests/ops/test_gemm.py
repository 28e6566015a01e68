"""FP8 products against NumPy in float64, within the error that rounding explains; exact where it must be."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops import float8_dot
from dsv3.ops.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_quantize
from dsv3.ops.gemm import fp8_dgrad, fp8_fprop, fp8_gemm, fp8_transpose, fp8_wgrad
from tests.compare import SWEEP, normal

SIZES = [1, 2, 127, 128, 129]
DEPTHS = [1, 127, 128, 129, 300]
TINY = 2.0**-24


def dequantize(x: Fp8Tensor, block) -> np.ndarray:
    """Values times scales, each scale repeated over its block, in float64."""
    values, scale = np.asarray(x.values).astype(np.float64), np.asarray(x.scale_inv).astype(np.float64)
    if block is None:
        return values * scale
    return values * scale.repeat(block[0], -2).repeat(block[1], -1)[..., : values.shape[-2], : values.shape[-1]]


def whole(x: np.ndarray) -> Fp8Tensor:
    """Quantised with one scale."""
    return fp8_quantize(x, block=x.shape[-2:])


def turned(x, transpose: bool):
    return np.swapaxes(x, -1, -2) if transpose else x


def assert_product(got, a: np.ndarray, b: np.ndarray, model: float = 0.0) -> None:
    """Three roundings of each product to float32, two of the operands and its own, then a sum whose rounding errors mostly
    cancel; `model` is what a narrow accumulator loses at worst, as a part of Σ|p|."""
    bound = (3 * TINY + 2 * np.sqrt(a.shape[-1]) * TINY + model) * (np.abs(a) @ np.abs(b))
    assert got.shape == bound.shape and got.dtype == tf.float32
    assert (np.abs(np.asarray(got).astype(np.float64) - a @ b) <= bound).all()


def operand(seed: int, shape, block, transpose: bool):
    """An operand as it is stored, and its float64 value as it is multiplied."""
    stored = turned(normal(seed, *shape), transpose)
    q = whole(stored) if block is None else fp8_quantize(stored, block=block)
    return q, turned(dequantize(q, block), transpose)


FLOAT8 = [
    # m, n, k, transposed, leading dims, blocks
    (3, 5, 300, (False, False), (), (ROW_BLOCK, WEIGHT_BLOCK)),
    (129, 130, 256, (False, True), (2,), (ROW_BLOCK, WEIGHT_BLOCK)),
    (130, 5, 300, (True, False), (), (COLUMN_BLOCK, COLUMN_BLOCK)),
    (3, 130, 129, (True, True), (1, 3), (WEIGHT_BLOCK, None)),
    (3, 4, 300, (False, False), (2,), (None, None)),
    (1, 1, 1, (True, False), (), ((128, 1), (64, 32))),
    (4, 3, 200, (False, False), (), ((1, 128), (64, 32))),
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "transpose", "lead", "blocks"), FLOAT8)
def test_float8_operands_give_the_same(monkeypatch, m, n, k, transpose, lead, blocks, cut, jit):
    if cut:  # one block of K at a time
        monkeypatch.setattr(float8_dot, "PARTIAL_BYTES", 1)
    a, left = operand(0, (*lead, m, k), blocks[0], transpose[0])
    b, right = operand(1, (k, n), blocks[1], transpose[1])
    options = {"a_block": blocks[0], "b_block": blocks[1], "transpose_a": transpose[0], "transpose_b": transpose[1]}
    fn = tf.function(lambda a, b: fp8_gemm(a, b, operands="float8", **options), jit_compile=jit, autograph=False)
    assert_product(fn(a, b), left, right)


@pytest.mark.parametrize(("blocks", "product"), [((None, None), "4x7xf32"), ((ROW_BLOCK, WEIGHT_BLOCK), "3x4x7xf32")])
def test_float8_operands_reach_the_compiler(blocks, product):
    a, b = operand(0, (4, 300), blocks[0], False)[0], operand(1, (300, 7), blocks[1], False)[0]
    fn = tf.function(
        lambda a, b: fp8_gemm(a, b, a_block=blocks[0], b_block=blocks[1], operands="float8"), jit_compile=True
    )
    text = fn.experimental_get_compiler_ir(a, b)(stage="stablehlo")
    (line,) = [line for line in text.splitlines() if "stablehlo.dot" in line]
    assert line.count("f8E4M3FN") == 2 and f"-> tensor<{product}>" in line


@SWEEP
@given(
    m=st.sampled_from(SIZES), n=st.sampled_from(SIZES), k=st.sampled_from(DEPTHS), seed=st.integers(0, 99),
    transpose=st.tuples(st.booleans(), st.booleans()), lead=st.sampled_from([(), (2,), (1, 3)]),
    blocks=st.tuples(*[st.sampled_from([WEIGHT_BLOCK, ROW_BLOCK, COLUMN_BLOCK, None])] * 2),
)  # fmt: skip
def test_matches_float64(m, n, k, seed, transpose, lead, blocks):
    a, left = operand(seed, (*lead, m, k), blocks[0], transpose[0])
    b, right = operand(seed + 1, (k, n), blocks[1], transpose[1])
    kwargs = {"a_block": blocks[0], "b_block": blocks[1], "transpose_a": transpose[0], "transpose_b": transpose[1]}
    assert_product(fp8_gemm(a, b, **kwargs), left, right)
    # Four instructions an interval, each losing 34 units at worst (test_accumulator.py).
    model = 34 * 4 * 2.0**-13
    along_k = [b and b[int(turn == first)] for b, turn, first in zip(blocks, transpose, (False, True))]
    if 1 not in along_k or k == 1:
        assert_product(fp8_gemm(a, b, accumulate="tensor_core", **kwargs), left, right, model)


@SWEEP
@given(m=st.sampled_from(SIZES), n=st.sampled_from(SIZES), k=st.sampled_from(DEPTHS), seed=st.integers(0, 99))
def test_error_of_quantisation_is_bounded(m, n, k, seed):
    """Half a unit of three bits of mantissa, 2^-4 of a number, or half a subnormal's unit, 2^-10 of its scale."""
    x, w = normal(seed, m, k), normal(seed + 1, k, n)
    a, b = fp8_quantize(x, block=ROW_BLOCK), fp8_quantize(w)
    off = []
    for v, q, block in ((x, a, ROW_BLOCK), (w, b, WEIGHT_BLOCK)):
        unit = dequantize(Fp8Tensor(np.ones(v.shape), q.scale_inv), block) * 2.0**-10
        off.append(np.maximum(np.abs(v) * 2.0**-4, unit) * (1 + 1e-6))
    x, w = x.astype(np.float64), w.astype(np.float64)
    bound = off[0] @ np.abs(w) + np.abs(x) @ off[1] + off[0] @ off[1]
    bound += (3 + 2 * np.sqrt(k)) * TINY * ((np.abs(x) + off[0]) @ (np.abs(w) + off[1]))
    assert (np.abs(np.asarray(fp8_fprop(a, b)) - x @ w) <= bound).all()


def test_quantisation_costs_four_percent():
    """Roundings of 2^-4 at most are 2.6% on average, in either operand: together 3.7% of a product of random numbers."""
    x, w = normal(0, 150, 700), normal(1, 700, 150)
    want = x @ w
    found = np.linalg.norm(fp8_fprop(fp8_quantize(x, block=ROW_BLOCK), fp8_quantize(w)) - want) / np.linalg.norm(want)
    assert 0.03 < found < 0.045


def test_the_three_products_of_a_linear_layer():
    """Of one layer with ragged sizes: every operand quantised with the tiles of its product."""
    x, w, dy = normal(0, 200, 130), normal(1, 130, 300), normal(2, 200, 300)
    weight = fp8_quantize(w)
    cases = [
        (fp8_fprop, (fp8_quantize(x, block=ROW_BLOCK), weight), x @ w),
        (fp8_dgrad, (fp8_quantize(dy, block=ROW_BLOCK), weight), dy @ w.T),
        (fp8_wgrad, (fp8_quantize(x, block=COLUMN_BLOCK), fp8_quantize(dy, block=COLUMN_BLOCK)), x.T @ dy),
    ]
    blocks = [(ROW_BLOCK, WEIGHT_BLOCK), (ROW_BLOCK, WEIGHT_BLOCK), (COLUMN_BLOCK, COLUMN_BLOCK)]
    for (fn, operands, unquantised), block, turn in zip(cases, blocks, ((0, 0), (0, 1), (1, 0))):
        a, b = (turned(dequantize(q, k), t) for q, k, t in zip(operands, block, turn))
        assert_product(fn(*operands), a, b)
        assert_product(fn(*operands, accumulate="tensor_core"), a, b, 34 * 4 * 2.0**-13)
        assert np.linalg.norm(fn(*operands) - unquantised) < 0.045 * np.linalg.norm(unquantised)
        assert fn(*operands, dtype="bfloat16").dtype == tf.bfloat16


@pytest.mark.parametrize("accumulate", ["float32", "tensor_core"])
def test_small_integers_are_exact(accumulate):
    """Sums below 2^14 of integers fit either accumulator; scales of 2^-4 to 2^4 in all leave the promoted sum 21 bits."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((3, 2, 250), (250, 129)))
    scale_a, scale_b = (np.exp2(rng.integers(-2, 3, shape)).astype(np.float32) for shape in ((3, 2, 2), (2, 2)))
    left = Fp8Tensor(a.astype(ml_dtypes.float8_e4m3fn), scale_a)
    right = Fp8Tensor(b.astype(ml_dtypes.float8_e4m3fn), scale_b)
    got = fp8_gemm(left, right, a_block=ROW_BLOCK, b_block=WEIGHT_BLOCK, accumulate=accumulate)
    np.testing.assert_array_equal(got, dequantize(left, ROW_BLOCK) @ dequantize(right, WEIGHT_BLOCK))


def test_never_promoted_wants_one_scale_along_k():
    x, w = normal(0, 3, 300), normal(1, 300, 4)
    a, b = whole(x), whole(w)
    narrow = {"accumulate": "tensor_core", "interval": None}
    whole_blocks = fp8_gemm(a, b, a_block=x.shape, b_block=w.shape, **narrow)
    np.testing.assert_array_equal(whole_blocks, fp8_gemm(a, b, a_block=None, b_block=None, **narrow))
    tensor = Fp8Tensor(a.values, a.scale_inv[0, 0])  # a scale of no dims is one for the whole tensor, too
    np.testing.assert_array_equal(whole_blocks, fp8_gemm(tensor, b, a_block=None, b_block=None, **narrow))
    tiled, message = fp8_quantize(x, block=ROW_BLOCK), "fp8_gemm: `interval` is .*, want a divisor of 128, as `a` changes"
    for interval in (None, 256):
        with pytest.raises(ValueError, match=message):
            fp8_gemm(tiled, b, a_block=ROW_BLOCK, b_block=None, accumulate="tensor_core", interval=interval)


@pytest.mark.parametrize("interval", [32, 64, 128])
def test_an_interval_uses_the_scales_of_its_block(interval):
    """Blocks of K differ by powers of 16, upwards on one side and downwards on the other: a wrong scale would show."""
    size = np.exp2(np.repeat(np.arange(3), 128)[:300] * 4.0).astype(np.float32)
    x, w = normal(0, 2, 300) * size, normal(1, 300, 130) * size[::-1, None]
    a, b = fp8_quantize(x, block=ROW_BLOCK), fp8_quantize(w)
    got = fp8_gemm(a, b, a_block=ROW_BLOCK, b_block=WEIGHT_BLOCK, accumulate="tensor_core", interval=interval)
    assert_product(got, dequantize(a, ROW_BLOCK), dequantize(b, WEIGHT_BLOCK), 34 * (interval // 32) * 2.0**-13)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e5m2, np.float16])
@pytest.mark.parametrize("accumulate", ["float32", "tensor_core"])
def test_other_formats_are_operands(accumulate, dtype):
    x, w = normal(0, 5, 40), normal(1, 40, 6)
    a = Fp8Tensor(x.astype(dtype), np.float32(0.3))
    b = Fp8Tensor(w.astype(ml_dtypes.float8_e4m3fn), np.float32(1.5))
    got = fp8_gemm(a, b, a_block=None, b_block=None, accumulate=accumulate)
    model = 34 * 2 * 2.0**-13 if accumulate == "tensor_core" else 0
    assert_product(got, dequantize(a, None), dequantize(b, None), model)


@pytest.mark.parametrize("accumulate", ["float32", "tensor_core"])
def test_modes_agree(accumulate):
    """Up to the order of a sum and to products that are fused into additions: 2^-24 each."""
    a, b = fp8_quantize(normal(0, 2, 5, 300), block=ROW_BLOCK), fp8_quantize(normal(1, 300, 130))

    def fn(a, b):
        return fp8_gemm(a, b, a_block=ROW_BLOCK, b_block=WEIGHT_BLOCK, accumulate=accumulate)

    specs = [tf.TensorSpec([None, None, *t.shape[2:]], t.dtype) for t in a], [tf.TensorSpec(t.shape, t.dtype) for t in b]
    unknown = tf.function(fn, autograph=False, input_signature=[Fp8Tensor(*s) for s in specs])
    want = fn(a, b)
    assert unknown(a, b).shape == want.shape == (2, 5, 130)
    largest = np.abs(want).max()
    for jit in (False, True):
        found = tf.function(fn, autograph=False, jit_compile=jit)(a, b)
        np.testing.assert_allclose(found, want, rtol=0, atol=4e-7 * largest)
    fused = fp8_gemm(a, b, a_block=ROW_BLOCK, b_block=WEIGHT_BLOCK, accumulate=accumulate, fuse=True)
    np.testing.assert_array_equal(fused, want)
    np.testing.assert_array_equal(unknown(a, b), want)


def test_transpose_swaps_values_and_scales():
    x = fp8_quantize(normal(0, 2, 130, 300), block=ROW_BLOCK)
    q = fp8_transpose(x)
    np.testing.assert_array_equal(dequantize(q, COLUMN_BLOCK), turned(dequantize(x, ROW_BLOCK), True))
    assert q.scale_inv.shape == (2, 3, 130)


X, W = fp8_quantize(np.ones((3, 200), np.float32), block=ROW_BLOCK), fp8_quantize(np.ones((200, 4), np.float32))
BLOCKS = {"a_block": ROW_BLOCK, "b_block": WEIGHT_BLOCK}


@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        ((X, W), {"accumulate": "float16"}, "`accumulate` is 'float16', want one of 'float32', 'tensor_core'"),
        ((X, W), {"a_block": (0, 1)}, r"`a_block` is \(0, 1\), want None or two positive integers"),
        ((X, W), {"b_block": (128,)}, r"`b_block` is \(128,\)"),
        ((X, W), {"b_block": ROW_BLOCK}, r"`b` has scales of shape \(2, 1\), want \(200, 1\) for values"),
        ((X, W), {"a_block": None}, r"`a` has scales of shape \(3, 2\), want \(1, 1\)"),
        ((X, W), {"transpose_b": True}, "`b` has K = 4, want 200, that of `a`"),
        ((X, X), {"b_block": ROW_BLOCK}, "`b` has K = 3, want 200"),
        ((W, W._replace(values=tf.ones([200, 4]))), {"a_block": WEIGHT_BLOCK}, "`b` has dtype float32, want float8_e4m3fn"),
        ((X._replace(values=X.values[0]), W), {}, r"`a` has values of shape \(200,\), want two dims at least"),
        ((X, W), {"interval": 100}, "`interval` is 100, want None or a positive multiple of 32"),
        ((X, W), {"bits": 0}, "`bits` is 0, want 2 to 24"),
        ((X, W), {"operands": "fp8"}, "`operands` is 'fp8', want one of 'expanded', 'float8'"),
        ((X, W), {"operands": "float8", "accumulate": "tensor_core"}, "`accumulate` is 'tensor_core' with operands="),
        (
            (X, W._replace(values=tf.ones([200, 4], tf.float16))), {"operands": "float8"},
            "`b` has dtype float16, want float8 for operands='float8'",
        ),
    ],
)
def test_bad_input_is_named(operands, options, message):
    with pytest.raises(ValueError, match=f"^fp8_gemm: {message}") as caught:
        fp8_gemm(*operands, **(BLOCKS | options))
    assert "\n" not in str(caught.value)
