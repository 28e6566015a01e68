"""FP8 against ml_dtypes' cast and a NumPy oracle of the block scales: every comparison is of bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.ops.fp8 import COLUMN_BLOCK, E4M3, ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_dequantize, fp8_quantize

E4M3_NUMPY = ml_dtypes.float8_e4m3fn
BLOCKS = [WEIGHT_BLOCK, ROW_BLOCK, COLUMN_BLOCK]
KINDS = ["float32", "power_of_two"]
MODES = {
    "eager": lambda fn: fn,
    "graph": lambda fn: tf.function(fn, autograph=False),
    "xla": lambda fn: tf.function(fn, autograph=False, jit_compile=True),
}


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Repeats each scale over its block, cut to `shape`."""
    return scale.repeat(block[0], -2).repeat(block[1], -1)[..., : shape[-2], : shape[-1]]


def quantize_oracle(x: np.ndarray, block: tuple[int, int], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Block by block in plain loops; returns (bytes, scales)."""
    rows, cols = x.shape[-2:]
    scale = np.zeros((*x.shape[:-2], -(-rows // block[0]), -(-cols // block[1])), np.float32)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            part = x[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            amax = np.maximum(np.abs(part).max((-2, -1)), np.float32(1e-4))
            scale[..., i, j] = amax / np.float32(448)
    if kind == "power_of_two":
        scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
    values = np.clip(x / spread(scale, block, x.shape), -448, 448).astype(E4M3_NUMPY)
    return values.view(np.uint8), scale


def bits(values: tf.Tensor) -> np.ndarray:
    assert values.dtype == E4M3
    return values.numpy().view(np.uint8)


def representable_and_between() -> np.ndarray:
    """Every finite E4M3 value, the midpoints between neighbours, and the floats on both sides of these."""
    every = np.arange(256, dtype=np.uint8).view(E4M3_NUMPY).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)])
    middle = (finite[1:] + finite[:-1]) / 2
    above, below = (np.nextafter(middle, np.float32(to), dtype=np.float32) for to in (np.inf, -np.inf))
    return np.concatenate([finite, [-0.0], middle, above, below]).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
def test_rounds_like_ml_dtypes_everywhere(mode):
    x = representable_and_between()
    assert x.max() == 448 and x.size > 1000
    q = MODES[mode](lambda x: fp8_quantize(x, block=(1, x.shape[1])))(tf.constant(x[None]))
    assert q.scale_inv.numpy() == 1  # the largest is 448
    np.testing.assert_array_equal(bits(q.values)[0], x.astype(E4M3_NUMPY).view(np.uint8))


@pytest.mark.parametrize("mode", MODES)
def test_decodes_every_byte(mode):
    values = np.arange(256, dtype=np.uint8).view(E4M3_NUMPY).reshape(2, 128)
    scale = np.array([[0.1], [3.0]], np.float32)
    got = MODES[mode](lambda v, s: fp8_dequantize(v, s, block=ROW_BLOCK))(values, scale)
    np.testing.assert_array_equal(got, values.astype(np.float32) * scale)


@st.composite
def matrices(draw):
    lead = draw(st.sampled_from([(), (2,), (1, 3)]))
    shape = (*lead, draw(st.sampled_from([1, 2, 127, 128, 129, 200])), draw(st.sampled_from([1, 7, 128, 130])))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.normal(size=shape) * np.exp(draw(st.floats(-12, 12)) + 3 * rng.normal(size=shape))
    return (x * (rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0])))).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@settings(max_examples=15)
@given(x=matrices())
def test_matches_oracle_bit_by_bit(block, kind, x):
    values, scale = quantize_oracle(x, block, kind)
    q = fp8_quantize(x, block=block, scale_kind=kind)
    np.testing.assert_array_equal(q.scale_inv, scale)
    np.testing.assert_array_equal(bits(q.values), values)
    back = fp8_dequantize(q.values, q.scale_inv, block=block)
    np.testing.assert_array_equal(back, values.view(E4M3_NUMPY).astype(np.float32) * spread(scale, block, x.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_modes_agree_bit_by_bit(block, kind):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 130, 200)) * np.exp(3 * rng.normal(size=(2, 130, 200)))).astype(np.float32)

    def there_and_back(x):
        q = fp8_quantize(x, block=block, scale_kind=kind)
        return q, fp8_dequantize(*q, block=block, dtype=tf.bfloat16)

    unknown = tf.function(there_and_back, autograph=False, input_signature=[tf.TensorSpec([None, None, None])])
    want, want_back = there_and_back(tf.constant(x))
    for fn in (MODES["graph"](there_and_back), MODES["xla"](there_and_back), unknown):
        got, back = fn(tf.constant(x))
        np.testing.assert_array_equal(got.scale_inv, want.scale_inv)
        np.testing.assert_array_equal(bits(got.values), bits(want.values))
        np.testing.assert_array_equal(back.numpy().view(np.uint16), want_back.numpy().view(np.uint16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_error_is_half_a_step(block, kind):
    x = np.random.default_rng(1).normal(size=(200, 300)).astype(np.float32)
    q = fp8_quantize(x, block=block, scale_kind=kind)
    back, scale = fp8_dequantize(*q, block=block).numpy(), spread(q.scale_inv.numpy(), block, x.shape)
    step = np.maximum(np.abs(x) / 16, scale * 2.0**-10)  # three bits of mantissa, and the subnormals below
    assert (np.abs(back - x) <= step * (1 + 1e-6)).all()
    assert np.abs(back - x).max() > 0


def test_quantising_again_changes_no_value():
    x = np.random.default_rng(2).normal(size=(256, 128)).astype(np.float32)
    q = fp8_quantize(x)
    again = fp8_quantize(fp8_dequantize(*q))
    np.testing.assert_array_equal(bits(again.values), bits(q.values))
    np.testing.assert_array_max_ulp(again.scale_inv.numpy(), q.scale_inv.numpy(), 1)


def test_power_of_two_scales_are_exact_powers_just_above():
    x = np.float32(448) * np.array([[1.0, 1.0000001, 0.75, 2.0**-9, 3e30]], np.float32).T
    q = fp8_quantize(x, block=ROW_BLOCK, scale_kind="power_of_two")
    np.testing.assert_array_equal(q.scale_inv[:, 0], [1.0, 2.0, 1.0, 2.0**-9, 2.0**102])


def test_zeros_have_a_scale():
    q = fp8_quantize(np.zeros((3, 4), np.float32))
    np.testing.assert_array_equal(q.scale_inv, [[np.float32(1e-4) / np.float32(448)]])
    np.testing.assert_array_equal(fp8_dequantize(*q), np.zeros((3, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_stays_visible(mode):
    x = np.ones((3, 128), np.float32)
    x[0, 3], x[1, 5] = np.nan, np.inf
    q = MODES[mode](lambda x: fp8_quantize(x, block=ROW_BLOCK))(tf.constant(x))
    back = fp8_dequantize(*q, block=ROW_BLOCK).numpy()
    assert np.isnan(back[0, 3]) and np.isnan(back[1, 5])
    np.testing.assert_array_equal(back[2], x[2])


def test_bfloat16_is_quantised_in_float32():
    x = tf.cast(np.random.default_rng(3).normal(size=(5, 130)), tf.bfloat16)
    got, want = fp8_quantize(x), fp8_quantize(tf.cast(x, tf.float32))
    np.testing.assert_array_equal(bits(got.values), bits(want.values))
    np.testing.assert_array_equal(got.scale_inv, want.scale_inv)


def test_result_is_a_tree():
    assert isinstance(fp8_quantize(np.ones((2, 2), np.float32)), Fp8Tensor)
    assert fp8_dequantize(*fp8_quantize(np.ones((2, 2), np.float32)), dtype="bfloat16").dtype == tf.bfloat16


VALUES, SCALES = np.zeros((200, 130), E4M3_NUMPY), np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp8_quantize(np.ones(3, np.float32)), r"`x` has shape \(3,\), want \[..., M, N\]"),
        (lambda: fp8_quantize(np.ones((3, 3), np.int32)), "`x` has dtype int32, want a floating dtype"),
        (lambda: fp8_quantize(np.ones((3, 3), np.float32), block=(0, 128)), "`block` is"),
        (lambda: fp8_quantize(np.ones((3, 3), np.float32), block=(128,)), "`block` is"),
        (lambda: fp8_quantize(np.ones((3, 3), np.float32), scale_kind="e8"), "`scale_kind` is 'e8'"),
        (lambda: fp8_dequantize(VALUES.astype(np.float32), SCALES), "`values` has dtype float32, want float8_e4m3fn"),
        (lambda: fp8_dequantize(VALUES, SCALES[:1]), r"`scale_inv` has shape \(1, 2\), want \(2, 2\) \[M, N\]"),
        (lambda: fp8_dequantize(VALUES, SCALES[None]), r"`scale_inv` has shape \(1, 2, 2\), want \(2, 2\) \[M, N\]"),
        (lambda: fp8_dequantize(VALUES, SCALES, block=(128, -1)), "`block` is"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"fp8_(de)?quantize: {message}"):
        call()
