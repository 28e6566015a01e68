"""Cache entries as bytes: the layout, byte by byte, and what it keeps."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.latent import latent_bytes, latent_pack, latent_unpack
from tests.compare import SWEEP, normal


def by_hand(packed, latent, rope):
    """The layout read with NumPy, float32."""
    tiles = -(-latent // 128)
    bits, scale, key = np.split(packed, [latent, latent + 4 * tiles], -1)
    scale = np.ascontiguousarray(scale).view(np.float32)
    key = np.ascontiguousarray(key).view(ml_dtypes.bfloat16).astype(np.float32)
    values = np.ascontiguousarray(bits).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.concatenate([values * np.repeat(scale, 128, -1)[..., :latent], key], -1)


def test_published_sizes():
    assert latent_bytes(512, 64) == 656


@SWEEP
@given(st.sampled_from([1, 127, 128, 130, 257]), st.sampled_from([2, 4]), st.integers(1, 3), st.booleans())
def test_layout_and_error(latent, rope, tokens, fuse):
    entries = normal(0, 2, tokens, latent + rope, scale=3.0)
    packed = latent_pack(entries, rope=rope, fuse=fuse)
    assert packed.dtype == tf.uint8 and packed.shape == (2, tokens, latent_bytes(latent, rope))
    found = latent_unpack(packed, latent=latent, rope=rope, dtype="float32", fuse=fuse).numpy()
    np.testing.assert_allclose(found, by_hand(packed.numpy(), latent, rope), rtol=2e-7)
    np.testing.assert_array_equal(found[..., latent:], entries[..., latent:].astype(ml_dtypes.bfloat16).astype(np.float32))
    amax = max(np.abs(entries[..., i : i + 128]).max() for i in range(0, latent, 128))
    # Three bits of mantissa: half a step is 2^-4 of a value; subnormal ones have steps of the tile's amax/448/2^9.
    bound = np.maximum(np.abs(entries) * 2.0**-4, amax / 448 / 2**10) * 1.0001
    assert (np.abs(found - entries)[..., :latent] <= bound[..., :latent]).all()


def test_packing_again_changes_no_value():
    """What is read in bfloat16 is quantised to the same bits again, though scales may move by a rounding."""
    packed = latent_pack(normal(0, 4, 130, scale=2.0), rope=2)
    again = latent_pack(latent_unpack(packed, latent=128, rope=2), rope=2)
    np.testing.assert_array_equal(again[..., :128], packed[..., :128])


def test_not_finite_values_show():
    entries = np.ones((2, 130), np.float32)
    entries[1, 5] = np.nan
    found = latent_unpack(latent_pack(entries, rope=2), latent=128, rope=2).numpy().astype(np.float32)
    assert np.isfinite(found[0]).all() and np.isnan(found[1, :128]).all()


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda: latent_pack(np.ones((2, 5), np.int32), rope=2), "`entries` has dtype int32, want a floating dtype"),
        (lambda: latent_pack(normal(0, 2, 2), rope=2), "`entries` has shape (2, 2), want [..., T, L+R] with R = 2"),
        (lambda: latent_unpack(normal(0, 2, 14), latent=6, rope=2), "`packed` has dtype float32, want uint8"),
    ],
)
def test_refusals_are_one_line(call, wanted):
    with pytest.raises(ValueError) as caught:
        call()
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
