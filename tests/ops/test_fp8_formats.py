"""The formats against their bits, and rounding by arithmetic against the enumerated grids and ml_dtypes' casts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.fp8_formats import FORMATS, fp8_round
from tests.compare import SWEEP
from tests.fp8_oracles import MODES, NUMPY, assert_bits, awkward, grid, round_oracle


@pytest.mark.parametrize("fmt", FORMATS)
def test_constants_are_those_of_the_grid(fmt):
    of, values = FORMATS[fmt], grid(fmt)
    normal = 2.0 ** (2 - 2 ** (of.exponent_bits - 1))
    assert (of.name, of.max, of.smallest, of.min_normal) == (fmt, values[-1], values[1], normal)
    assert len(values) == 2 ** (of.exponent_bits + of.mantissa_bits) - (1 if fmt == "e4m3" else 2**of.mantissa_bits)
    with pytest.raises(dataclasses.FrozenInstanceError):
        of.max = 1.0


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_dtype_holds_every_value(fmt):
    values = grid(fmt).astype(np.float32)
    assert FORMATS[fmt].dtype.as_numpy_dtype == NUMPY[fmt]
    assert_bits(values.astype(NUMPY[fmt]), values)
    for mode in MODES.values():
        assert_bits(mode(lambda x: tf.cast(tf.cast(x, FORMATS[fmt].dtype), tf.float32))(tf.constant(values)), values)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_the_oracle_is_ml_dtypes(fmt):
    bits = np.arange(256, dtype=np.uint8).view(NUMPY[fmt]).astype(np.float32)
    np.testing.assert_array_equal(np.unique(np.abs(bits[np.isfinite(bits)])), grid(fmt))
    x, top = awkward(fmt), FORMATS[fmt].max
    assert_bits(np.clip(x, -top, top).astype(NUMPY[fmt]), round_oracle(x, fmt))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_rounds_every_value_and_midpoint_and_their_neighbours(fmt, mode):
    x = awkward(fmt)
    assert_bits(MODES[mode](lambda x: fp8_round(x, fmt=fmt))(tf.constant(x)), round_oracle(x, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
@SWEEP
@given(seed=st.integers(0, 2**31))
def test_rounds_any_bits(fmt, seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, 5000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) >= np.finfo(np.float32).tiny)]
    got = fp8_round(x, fmt=fmt)
    assert_bits(got, round_oracle(x, fmt))
    assert_bits(fp8_round(got, fmt=fmt), got)


@pytest.mark.parametrize("fmt", FORMATS)
def test_relative_error_is_half_a_unit_of_the_mantissa(fmt):
    of = FORMATS[fmt]
    x = np.exp(np.random.default_rng(0).uniform(np.log(of.min_normal), np.log(of.max), 50_000)).astype(np.float32)
    error = np.abs(fp8_round(x, fmt=fmt) - x) / x
    half = 2.0 ** -(of.mantissa_bits + 1)
    bound = half / (1 + half)  # half a step above a power of two
    assert 0.99 * bound < error.max() <= bound * (1 + 2.0**-23)  # the difference is exact, the quotient rounded


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_saturates_and_keeps_nan(fmt, mode):
    got = MODES[mode](lambda x: fp8_round(x, fmt=fmt))(tf.constant([np.inf, -np.inf, np.nan, 3e38]))
    top = FORMATS[fmt].max
    np.testing.assert_array_equal(got, [top, -top, np.nan, top])


def test_other_dtypes_are_rounded_from_float32():
    assert fp8_round(tf.constant([1.0625, 3.1], tf.bfloat16)).dtype == tf.float32
    assert fp8_round(np.array([1.0625, 3.1])).numpy().tolist() == [1.0, 3.0]


def test_a_bad_format_is_named():
    with pytest.raises(ValueError, match="fp8_round: `fmt` is 'e3m4', want one of 'e4m3', 'e5m2', 'e5m6'"):
        fp8_round(1.0, fmt="e3m4")
