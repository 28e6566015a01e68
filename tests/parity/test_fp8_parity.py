"""FP8 against torch's casts and the official quantisers as torch expressions: every comparison is of bits."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

torch = pytest.importorskip("torch")

from dsv3.ops.fp8 import ROW_BLOCK, fp8_dequantize, fp8_quantize  # noqa: E402
from dsv3.ops.fp8_formats import FORMATS, fp8_round  # noqa: E402
from tests.fp8_oracles import assert_bits, awkward, wide  # noqa: E402

pytestmark = pytest.mark.parity

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def as_bytes(values) -> np.ndarray:
    return (values.view(torch.uint8) if isinstance(values, torch.Tensor) else values).numpy().view(np.uint8)


@pytest.mark.parametrize("fmt", TORCH)
def test_every_value_and_midpoint_is_cast_alike(fmt):
    x, top = awkward(fmt)[None], FORMATS[fmt].max
    want = torch.tensor(x).clamp(-top, top).to(TORCH[fmt])
    np.testing.assert_array_equal(as_bytes(fp8_quantize(x, fmt=fmt, block=None, scale_inv=[[1.0]]).values), as_bytes(want))
    assert_bits(fp8_round(x, fmt=fmt), want.float().numpy())


@pytest.mark.parametrize("fmt", TORCH)
def test_every_byte_is_decoded_alike(fmt):
    values = np.arange(256, dtype=np.uint8).view(FORMATS[fmt].dtype.as_numpy_dtype)[None]
    want = torch.arange(256, dtype=torch.uint8).view(TORCH[fmt]).float()[None] * 0.3
    got = fp8_dequantize(values, np.float32([[0.3]]), block=None)
    np.testing.assert_array_equal(got, want.numpy())  # NaN and infinities have one meaning, but several bits


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_activation_quantiser(scale_fmt):
    """act_quant of DeepSeek-V3's inference/kernel.py, with the clamp of later versions."""
    x = torch.tensor(wide(0, 64, 512)).bfloat16()
    groups = x.float().view(64, 4, 128)
    s = groups.abs().amax(-1).clamp(min=1e-4) / 448.0
    s = torch.exp2(torch.ceil(torch.log2(s))) if scale_fmt else s
    y = (groups / s.unsqueeze(-1)).view(64, 512).to(torch.float8_e4m3fn)
    ours = tf.cast(x.float().numpy(), tf.bfloat16)  # exact
    q = fp8_quantize(ours, block=ROW_BLOCK, scale_kind="power_of_two" if scale_fmt else "float32")
    np.testing.assert_array_equal(q.scale_inv, s.numpy())
    np.testing.assert_array_equal(as_bytes(q.values), as_bytes(y))


def test_weight_dequantiser():
    """weight_dequant of DeepSeek-V3's inference/kernel.py, with ragged rows and columns."""
    q = fp8_quantize(wide(1, 200, 330))
    values = torch.tensor(q.values.numpy().view(np.uint8)).view(torch.float8_e4m3fn).float()
    s = torch.tensor(q.scale_inv.numpy()).repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :330]
    assert_bits(fp8_dequantize(*q, dtype=tf.bfloat16), (values * s).bfloat16().float().numpy())
