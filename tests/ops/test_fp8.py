"""Quantising and dequantising against ml_dtypes' casts, an oracle of the blocks and the official quantisers, bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_dequantize, fp8_quantize
from dsv3.ops.fp8_formats import FORMATS
from tests.compare import SWEEP
from tests.fp8_oracles import BLOCKS, MODES, NUMPY, assert_bits, awkward, grid, quantize_oracle, round_oracle, spread, wide

KINDS = ["float32", "power_of_two"]
VARIANTS = [("e4m3", "float32"), ("e4m3", "power_of_two"), ("e5m2", "float32"), ("e5m6", "power_of_two")]
over_blocks = pytest.mark.parametrize("block", BLOCKS, ids=str)
over_modes = pytest.mark.parametrize("mode", MODES)
over_variants = pytest.mark.parametrize(("fmt", "kind"), VARIANTS, ids=["-".join(v) for v in VARIANTS])


@st.composite
def matrices(draw):
    lead = draw(st.sampled_from([(), (2,), (1, 3)]))
    shape = (*lead, draw(st.sampled_from([1, 2, 127, 128, 129, 200])), draw(st.sampled_from([1, 7, 128, 130])))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.normal(size=shape) * np.exp(draw(st.floats(-12, 12)) + 3 * rng.normal(size=shape))
    return (x * (rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0])))).astype(np.float32)


@over_modes
@pytest.mark.parametrize("fmt", FORMATS)
def test_casts_every_value_and_midpoint_and_their_neighbours(fmt, mode):
    x, top = awkward(fmt), FORMATS[fmt].max
    q = MODES[mode](lambda x: fp8_quantize(x, fmt=fmt, block=None, scale_inv=[[1.0]]))(tf.constant(x[None]))
    assert q.values.dtype == FORMATS[fmt].dtype and q.scale_inv.numpy() == 1
    assert_bits(q.values[0], round_oracle(x, fmt))
    finite = np.clip(x, -top, top)
    own = MODES[mode](lambda x: fp8_quantize(x, fmt=fmt, block=(1, x.shape[1])))(tf.constant(finite[None]))
    assert own.scale_inv.numpy() == 1  # the largest is max
    np.testing.assert_array_equal(own.values.numpy().view(np.uint8), q.values.numpy().view(np.uint8))


@over_modes
@pytest.mark.parametrize("fmt", FORMATS)
def test_decodes_every_value(fmt, mode):
    values = np.concatenate([grid(fmt), -grid(fmt)]).astype(NUMPY[fmt]).reshape(2, -1)
    scale = np.array([[0.1], [3.0]], np.float32)
    got = MODES[mode](lambda v, s: fp8_dequantize(v, s, block=(1, values.shape[1])))(values, scale)
    assert_bits(got, values.astype(np.float32) * scale)


@over_blocks
@over_variants
@SWEEP
@given(x=matrices())
def test_matches_oracle_bit_by_bit(block, fmt, kind, x):
    values, scale = quantize_oracle(x, block, kind, fmt)
    q = fp8_quantize(x, block=block, fmt=fmt, scale_kind=kind)
    np.testing.assert_array_equal(q.scale_inv, scale)
    assert_bits(q.values, values)
    assert_bits(fp8_dequantize(*q, block=block), values * spread(scale, block, x.shape))


@pytest.mark.parametrize(
    ("block", "fmt", "kind"), [(b, *v) for b, v in zip([*BLOCKS, ROW_BLOCK], [*VARIANTS, VARIANTS[0]])], ids=str
)
def test_modes_agree_bit_by_bit(block, fmt, kind):
    x = wide(0, 2, 130, 200)

    def there_and_back(x, fuse=False):
        q = fp8_quantize(x, block=block, fmt=fmt, scale_kind=kind, fuse=fuse)
        return q, fp8_dequantize(*q, block=block, dtype=tf.bfloat16)

    def kernel(x):
        return there_and_back(x, fuse=True)

    unknown = [tf.TensorSpec([None, None, None])]
    values, scale = quantize_oracle(x, block, kind, fmt)
    want = (values * spread(scale, block, x.shape)).astype(ml_dtypes.bfloat16)
    ways = [MODES["graph"](there_and_back), MODES["xla"](there_and_back), kernel, MODES["graph"](kernel)]
    ways += [tf.function(fn, autograph=False, input_signature=unknown) for fn in (there_and_back, kernel)]
    for way in ways:
        got, back = way(tf.constant(x))
        np.testing.assert_array_equal(got.scale_inv, scale)
        assert_bits(got.values, values)
        assert_bits(back, want)


@over_blocks
@over_variants
def test_error_is_half_a_step(block, fmt, kind):
    x, of = wide(1, 200, 300), FORMATS[fmt]
    q = fp8_quantize(x, block=block, fmt=fmt, scale_kind=kind)
    back, scale = fp8_dequantize(*q, block=block).numpy(), spread(q.scale_inv.numpy(), block, x.shape)
    normal = np.abs(x) >= scale * of.min_normal
    half_step = np.where(normal, np.abs(x) * 2.0 ** -(of.mantissa_bits + 1), scale * of.smallest / 2)
    error = np.abs(back - x) / half_step
    # Just above a power of two the half step u is u / (1 + u) of a number: 8/9 with u = 2^-3. Quotient, product and the
    # difference here are rounded to float32, 3 · 2^-24 against half steps of 2^-7 at least.
    assert 0.85 < error.max() <= 1 + 2.0**-15


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_again_changes_no_value(kind):
    x = wide(2, 256, 128)
    q = fp8_quantize(x, scale_kind=kind)
    again = fp8_quantize(fp8_dequantize(*q), scale_inv=q.scale_inv)
    assert_bits(again.values, tf.cast(q.values, tf.float32).numpy())


# The official quantisers


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("clamp", [0.0, 1e-4])
def test_official_activation_quantiser(scale_fmt, clamp):
    """act_quant of inference/kernel.py: a row at a time in groups of 128. The first version did not clamp amax."""
    x = wide(3, 40, 512).astype(ml_dtypes.bfloat16)
    groups = x.astype(np.float32).reshape(40, 4, 128)
    s = np.maximum(np.abs(groups).max(-1), np.float32(clamp)) / np.float32(448)
    s = np.exp2(np.ceil(np.log2(s.astype(np.float64)))).astype(np.float32) if scale_fmt else s
    y = (groups / s[..., None]).astype(NUMPY["e4m3"]).reshape(x.shape)
    q = fp8_quantize(x, block=ROW_BLOCK, scale_kind="power_of_two" if scale_fmt else "float32")
    np.testing.assert_array_equal(q.scale_inv, s)
    np.testing.assert_array_equal(q.values.numpy().view(np.uint8), y.view(np.uint8))


def test_official_weight_dequantiser():
    """weight_dequant of inference/kernel.py, with ragged rows as a latent projection has."""
    q = fp8_quantize(wide(4, 192, 256))
    y = np.zeros((192, 256), ml_dtypes.bfloat16)
    for i, j in np.ndindex(2, 2):
        at = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
        y[at] = (q.values.numpy()[at].astype(np.float32) * q.scale_inv.numpy()[i, j]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(fp8_dequantize(*q, dtype="bfloat16").numpy().view(np.uint16), y.view(np.uint16))


# Scales


def test_power_of_two_scales_are_exact_powers_just_above():
    x = np.float32(448) * np.array([[1.0, 1.0000001, 0.75, 2.0**-9, 3e30]], np.float32).T
    q = fp8_quantize(x, block=ROW_BLOCK, scale_kind="power_of_two")
    np.testing.assert_array_equal(q.scale_inv[:, 0], [1.0, 2.0, 1.0, 2.0**-9, 2.0**102])


@over_blocks
def test_zeros_have_a_scale(block):
    q = fp8_quantize(np.zeros((3, 4), np.float32), block=block)
    np.testing.assert_array_equal(np.unique(q.scale_inv), [np.float32(1e-4) / np.float32(448)])
    np.testing.assert_array_equal(fp8_dequantize(*q, block=block), np.zeros((3, 4)))


def test_one_scale_for_the_whole_tensor():
    x = wide(5, 2, 3, 130, 140)
    q = fp8_quantize(x, block=None)
    assert q.scale_inv.shape == (1, 1, 1, 1)
    assert q.scale_inv.numpy().item() == np.abs(x).max() / np.float32(448)


@over_blocks
@over_modes
def test_given_scales_are_used_and_values_saturate(block, mode):
    x = wide(6, 130, 140)
    scale = 0.1 * fp8_quantize(x, block=block).scale_inv.numpy()
    q = MODES[mode](lambda x, s: fp8_quantize(x, block=block, scale_inv=s))(tf.constant(x), tf.constant(scale))
    want = round_oracle(x / spread(scale, block, x.shape), "e4m3")
    assert_bits(q.scale_inv, scale)
    assert_bits(q.values, want)
    assert (np.abs(want) == 448).sum() > 1


# What is not finite


@over_blocks
@over_modes
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_takes_its_block_along(bad, fuse, block, mode):
    x = np.ones((130, 140), np.float32)
    x[129, 3] = bad
    q = MODES[mode](lambda x: fp8_quantize(x, block=block, fuse=fuse))(tf.constant(x))
    rows, cols = (130, 140) if block is None else block
    lost = np.zeros(x.shape, bool)
    lost[129 // rows * rows :, 3 // cols * cols : 3 // cols * cols + cols] = True
    np.testing.assert_array_equal(np.isnan(fp8_dequantize(*q, block=block)), lost)


@over_modes
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_not_finite_is_nan_under_given_scales(fmt, mode):
    x = tf.constant([[np.inf, -np.inf, np.nan, 1e38, 2.0]])
    q = MODES[mode](lambda x: fp8_quantize(x, fmt=fmt, scale_inv=[[1e-5]]))(x)  # 1e38 / 1e-5 is infinite, but saturates
    top = FORMATS[fmt].max
    np.testing.assert_array_equal(tf.cast(q.values, tf.float32), [[np.nan, np.nan, np.nan, top, min(top, 2e5)]])


@pytest.mark.parametrize("scale_inv", [None, [[1.0]]])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(bad, fuse, scale_inv):
    def refuse(x):
        return fp8_quantize(x, nonfinite="refuse", scale_inv=scale_inv, fuse=fuse)

    message = "fp8_quantize: `x` is not finite everywhere, want finite values"
    good, graph = tf.constant([[1.0, 2.0]]), MODES["graph"](refuse)
    with pytest.raises(ValueError, match=message):
        refuse(tf.constant([[1.0, bad]]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        graph(tf.constant([[1.0, bad]]))
    for fn in (refuse, graph):
        assert_bits(fp8_dequantize(*fn(good)), fp8_dequantize(*fp8_quantize(good, scale_inv=scale_inv)))


def test_bfloat16_is_quantised_in_float32():
    x = tf.cast(wide(7, 5, 130), tf.bfloat16)
    got, want = fp8_quantize(x), fp8_quantize(tf.cast(x, tf.float32))
    assert_bits(got.values, tf.cast(want.values, tf.float32).numpy())
    np.testing.assert_array_equal(got.scale_inv, want.scale_inv)


def test_result_is_a_tree():
    for fuse in (False, True):
        assert isinstance(fp8_quantize(tf.ones((2, 2)), fuse=fuse), Fp8Tensor)
    assert isinstance(fp8_quantize(np.ones((2, 2), np.float32), block=[1, 2], fuse=True), Fp8Tensor)
    assert fp8_dequantize(*fp8_quantize(np.ones((2, 2), np.float32)), dtype="bfloat16").dtype == tf.bfloat16


ONES, VALUES, SCALES = np.ones((3, 3), np.float32), np.zeros((200, 130), NUMPY["e4m3"]), np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp8_quantize(np.ones(3, np.float32)), r"`x` has shape \(3,\), want \[..., M, N\]"),
        (lambda: fp8_quantize(np.ones((3, 3), np.int32)), "`x` has dtype int32, want a floating dtype"),
        (lambda: fp8_quantize(ONES, block=(0, 128)), r"`block` is \(0, 128\), want two positive integers"),
        (lambda: fp8_quantize(ONES, block=(128,)), "`block` is"),
        (lambda: fp8_quantize(ONES, block=128), "`block` is 128, want"),
        (lambda: fp8_quantize(ONES, fmt="e3m4"), "`fmt` is 'e3m4', want one of"),
        (lambda: fp8_quantize(ONES, scale_kind="e8"), "`scale_kind` is 'e8'"),
        (lambda: fp8_quantize(ONES, nonfinite="drop"), "`nonfinite` is 'drop', want one of 'propagate', 'refuse'"),
        (lambda: fp8_quantize(ONES, scale_inv=1.0), r"`scale_inv` has shape \(\), want \(1, 1\) \[M, N\]"),
        (lambda: fp8_quantize(ONES, scale_inv=SCALES, block=None), r"`scale_inv` has shape \(2, 2\), want \(1, 1\)"),
        (lambda: fp8_dequantize(VALUES.astype(np.float32), SCALES), "`values` has dtype float32, want float8_e4m3fn or"),
        (lambda: fp8_dequantize(VALUES, SCALES[:1]), r"`scale_inv` has shape \(1, 2\), want \(2, 2\) \[M, N\]"),
        (lambda: fp8_dequantize(VALUES, SCALES[None]), r"`scale_inv` has shape \(1, 2, 2\), want \(2, 2\) \[M, N\]"),
        (lambda: fp8_dequantize(VALUES, SCALES, block=WEIGHT_BLOCK[:1]), "`block` is"),
        (lambda: fp8_dequantize(VALUES, SCALES, block=(128, -1)), "`block` is"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"fp8_(de)?quantize: {message}"):
        call()
