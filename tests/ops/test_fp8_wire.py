"""Packed rows: to the bit what a quantiser with power-of-two scales keeps, and nothing when quantised again."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.ops.fp8 import fp8_fake
from dsv3.ops.fp8_wire import fp8_pack, fp8_unpack, wire_width


@pytest.mark.parametrize("fuse", [False, True])
@settings(max_examples=10)
@given(fmt=st.sampled_from(["e4m3", "e5m2"]), width=st.integers(1, 300), seed=st.integers(0, 99))
def test_rows_arrive_as_they_were_rounded(fuse, fmt, width, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(2, 3, width)) * np.exp(4 * rng.normal(size=(2, 3, width)))).astype(np.float32)
    x[0, 0] = 0
    packed = fp8_pack(x, fmt=fmt, fuse=fuse)
    assert packed.shape == (2, 3, wire_width(width)) and packed.dtype == tf.int32
    found = fp8_unpack(packed, width, fmt=fmt, fuse=fuse)
    np.testing.assert_array_equal(found, fp8_fake(x, fmt=fmt, scale_kind="power_of_two"))
    again = fp8_unpack(fp8_pack(found, fmt=fmt, fuse=fuse), width, fmt=fmt, fuse=fuse)
    np.testing.assert_array_equal(again, found)
    half = fp8_unpack(packed, width, fmt=fmt, dtype="bfloat16", fuse=fuse)
    np.testing.assert_array_equal(tf.cast(half, tf.float32), found)


def test_every_value_of_a_format_is_packed():
    for fmt, largest in (("e4m3", 448.0), ("e5m2", 57344.0)):
        dtype = {"e4m3": tf.dtypes.experimental.float8_e4m3fn, "e5m2": tf.dtypes.experimental.float8_e5m2}[fmt]
        every = np.arange(256, dtype=np.uint8).view(dtype.as_numpy_dtype).astype(np.float32)
        x = np.where(np.isfinite(every), every, 0)[:, None] * np.ones((1, 2), np.float32)
        x[:, 1] = largest  # the scale is one
        np.testing.assert_array_equal(fp8_unpack(fp8_pack(x, fmt=fmt), 2, fmt=fmt), x)


def test_what_is_not_finite_spoils_its_tile():
    x = np.ones((2, 200), np.float32)
    x[1, 5] = np.inf
    bad = np.isnan(fp8_unpack(fp8_pack(x), 200))
    assert bad[1, :128].all() and bad.sum() == 128


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp8_pack([1.0]), r"fp8_pack: `x` has shape \(1,\), want \[..., N, D\]"),
        (lambda: fp8_pack([[1.0]], fmt="e5m6"), "fp8_pack: `fmt` is 'e5m6'"),
        (lambda: fp8_unpack([[1]], 1), r"fp8_unpack: `packed` is int32 \(1, 1\), want int32 \[..., 2\]"),
        (lambda: fp8_unpack([[1.0, 2.0]], 1), "fp8_unpack: `packed` is float32"),
    ],
)
def test_wrong_rows(call, message):
    with pytest.raises(ValueError, match=message):
        call()
