"""Weights in one byte a value: encoded and decoded as formulas say, multiplied strip by strip as their decoded matrix."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops import quantized as module
from dsv3.ops import quantized_experts as routed
from dsv3.ops.experts import KERNELS, experts_apply
from dsv3.ops.fp8 import fp8_quantize
from dsv3.ops.fp8_bits import fp8_decode, fp8_encode, half_bits
from dsv3.ops.quantized import KINDS, QuantizedWeight, quantized_decode, quantized_encode, quantized_matmul
from dsv3.ops.quantized_experts import quantized_experts
from tests.compare import SWEEP, TOLERANCE, assert_close, normal
from tests.ops.test_experts import routing

CODES = np.arange(256, dtype=np.uint8)
VALUES = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
SIZES = st.sampled_from([1, 2, 127, 128, 129, 257])


def decoded(q, dtype=np.float64):
    """Values times scales of 128×128 in parts, or of 128 rows of a column: the formulas, in NumPy."""
    values, scale = (np.asarray(t) for t in q)
    numbers = VALUES[values].astype(dtype) if values.dtype == np.uint8 else values.astype(dtype)
    *_, rows, columns = values.shape
    parts = scale.shape[-2]
    row, column = np.arange(rows) // 128, np.arange(columns)
    width = columns // parts
    block = column % width // 128 if values.dtype == np.uint8 else column
    return numbers * scale[..., row[:, None], (column // width)[None], block[None]]


@pytest.mark.parametrize("jit", [False, True])
def test_all_codes_are_decoded_and_encoded(jit):
    decode, half, encode = (tf.function(fn, jit_compile=jit, autograph=False) for fn in (fp8_decode, half_bits, fp8_encode))
    np.testing.assert_array_equal(decode(tf.constant(CODES)), VALUES)
    finite = np.isfinite(VALUES)
    np.testing.assert_array_equal(half(tf.constant(CODES)).numpy()[finite] * 256, VALUES[finite])
    codes = encode(tf.constant(VALUES)).numpy()
    np.testing.assert_array_equal(codes[finite], CODES[finite])
    assert np.isnan(VALUES[codes[~finite]]).all()


@SWEEP
@given(SIZES, SIZES, st.sampled_from([(), (2,)]), st.integers(1, 3), st.sampled_from(KINDS))
def test_encode_is_the_formula(rows, columns, lead, parts, kind):
    w = normal(0, *lead, rows, parts * columns, scale=0.02)
    q = quantized_encode(w, kind=kind, parts=parts)
    assert q.kind == kind and q.shape == w.shape
    groups = -(-rows // 128)
    if kind == "fp8":
        assert q.scale_inv.shape == (*lead, groups, parts, -(-columns // 128))
        for part in range(parts):  # each is a tensor of its own in a checkpoint
            own = fp8_quantize(np.split(w, parts, -1)[part])
            np.testing.assert_array_equal(q.scale_inv[..., part, :], own.scale_inv)
            bits = np.split(q.values.numpy(), parts, -1)[part]
            np.testing.assert_array_equal(bits, np.asarray(own.values).view(np.uint8))
    else:
        assert q.scale_inv.shape == (*lead, groups, 1, parts * columns)
        padded = np.pad(w, [(0, 0)] * len(lead) + [(0, 128 * groups - rows), (0, 0)])
        amax = np.abs(padded.reshape(*lead, groups, 128, -1)).max(-2)
        assert_close(q.scale_inv[..., 0, :], amax / 127, 2e-7)
        # Half a step of each value's own scale, and what the quotient rounds.
        step = np.repeat(amax / 127, 128, -2)[..., :rows, :]
        assert (np.abs(decoded(q) - w) <= step * 0.5001).all()
    np.testing.assert_allclose(quantized_decode(q), decoded(q).astype(np.float32), rtol=2e-7)


@SWEEP
@given(st.integers(1, 3), SIZES, SIZES, st.integers(1, 2), st.sampled_from(KINDS), st.sampled_from([1, 200, 40_000]))
def test_product_is_that_of_the_decoded_matrix(n, rows, columns, parts, kind, strip):
    strip = max(strip, rows * columns // 4)  # a graph for each strip: not hundreds of them
    q = quantized_encode(normal(1, rows, parts * columns), kind=kind, parts=parts)
    x = normal(0, n, rows)
    assert_close(quantized_matmul(x, q, strip=strip, fuse=False), x @ decoded(q), TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transpose", [False, True])
def test_stacked_matrices(kind, transpose):
    q = quantized_encode(normal(0, 3, 130, 5), kind=kind)
    x = normal(1, 3, 2, 5 if transpose else 130)
    w = decoded(q)
    want = x @ (w.swapaxes(1, 2) if transpose else w)
    for strip in (1, 1300, 1 << 20):
        assert_close(quantized_matmul(x, q, transpose=transpose, strip=strip, fuse=False), want, TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_and_dtypes(kind):
    """Fused strips have the values of plain ones; in bfloat16 a weight is rounded once, to that dtype."""
    q = quantized_encode(normal(0, 256, 600), kind=kind)
    x = tf.cast(normal(1, 4, 256), tf.bfloat16)
    plain, fused = (quantized_matmul(x, q, strip=256 * 256, fuse=fuse) for fuse in (False, True))
    np.testing.assert_array_equal(tf.cast(plain, tf.float32), tf.cast(fused, tf.float32))
    whole = tf.matmul(x, tf.cast(decoded(q, np.float32), tf.bfloat16))
    np.testing.assert_array_equal(tf.cast(plain, tf.float32), tf.cast(whole, tf.float32))


def test_a_strip_waits_for_the_one_before_and_has_its_size(monkeypatch):
    """In a graph: no strip is decoded before the product of the last one, or x, is there."""
    sizes = []
    decode = module._decode_strip
    monkeypatch.setattr(module, "_decode_strip", lambda *a, **k: sizes.append(k["size"]) or decode(*a, **k))
    q = quantized_encode(normal(0, 128, 700))
    fn = tf.function(lambda x, q: quantized_matmul(x, q, strip=128 * 256, fuse=True), autograph=False)
    graph = fn.get_concrete_function(tf.TensorSpec([2, 128]), q).graph
    assert sizes == [256, 256, 188]
    ops = graph.get_operations()
    products = [op for op in ops if op.type == "MatMul"]
    starts = [op for op in ops if op.type == "Const" and op.control_inputs]
    assert [op.control_inputs[0].name for op in starts] == ["x", *(op.name for op in products[:-1])]
    kernels = [op for op in ops if op.type == "PartitionedCall"]
    assert [kernel.inputs[2].op for kernel in kernels] == starts


@SWEEP
@given(
    st.integers(1, 6), st.integers(1, 3), st.sampled_from(["random", "one", "ends"]), st.sampled_from(KERNELS),
    st.sampled_from(KINDS),
)  # fmt: skip
def test_experts_are_those_of_the_decoded_weights(tokens, top_k, spread, kernel, kind):
    experts = routing(tokens, tokens, top_k, spread)
    n, k = experts.shape
    x, weights = normal(0, n, 6), normal(1, n, k)
    gate_up = quantized_encode(normal(2, 4, 6, 10), kind=kind, parts=2)
    down = quantized_encode(normal(3, 4, 5, 6), kind=kind)
    got = quantized_experts(x, weights, experts, gate_up, down, kernel=kernel, multiple=4, fuse=False)
    whole = (tf.cast(decoded(q), tf.float32) for q in (gate_up, down))
    assert_close(got, experts_apply(x, weights, experts, *whole, kernel="sorted", multiple=4), TOLERANCE)


@pytest.mark.parametrize("kernel", ["sorted", "rows"])
def test_only_chosen_experts_are_read(kernel, monkeypatch):
    """The others' scales may be NaN, and there are two products for each (token, choice), or for each chosen expert."""
    products = []
    monkeypatch.setattr(routed, "quantized_matmul", lambda *a, **k: products.append(1) or quantized_matmul(*a, **k))
    scale = np.full((4, 1, 2, 1), np.nan, np.float32)
    scale[2] = 1.0
    gate_up = quantized_encode(normal(2, 4, 6, 10), parts=2)._replace(scale_inv=scale)
    down = quantized_encode(normal(3, 4, 5, 6))._replace(scale_inv=scale[:, :, :1])
    got = quantized_experts(normal(0, 3, 6), np.ones((3, 1)), np.full((3, 1), 2), gate_up, down, kernel=kernel, fuse=False)
    assert np.isfinite(got).all()
    assert len(products) == {"sorted": 2, "rows": 6}[kernel]


def test_int8_is_nearer_than_fp8_and_groups_than_channels():
    """The errors that the module's docstring states, of normal weights; INT8 with one scale a column is the formula."""
    w = normal(0, 2048, 256, scale=0.02)
    fp8, int8 = (error_of(np.asarray(quantized_decode(quantized_encode(w, kind=kind))), w) for kind in KINDS)
    scale = np.abs(w).max(0) / 127
    channel = error_of(np.round(w / scale) * scale, w)
    assert fp8 == pytest.approx(0.0264, rel=0.02) and int8 == pytest.approx(0.0065, rel=0.02)
    assert channel == pytest.approx(0.0083, rel=0.02)


def error_of(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_nothing_is_lost_at_zero_and_what_is_not_finite_shows():
    for kind in KINDS:
        zero = quantized_encode(np.zeros((130, 3), np.float32), kind=kind)
        assert not quantized_decode(zero).numpy().any() and np.isfinite(zero.scale_inv).all()
        bad = quantized_encode(np.array([[1.0, np.nan], [2.0, 3.0]], np.float32), kind=kind)
        assert not np.isfinite(quantized_decode(bad)).all()


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda q: quantized_encode(np.ones((2, 3), np.int32)), "`weight` has dtype int32, want a floating dtype"),
        (lambda q: quantized_encode(np.ones((2, 3), np.float32), parts=2), "`weight` has 3 columns, want 2 equal parts"),
        (lambda q: quantized_encode(np.ones((2, 3), np.float32), kind="int4"), "`kind` is 'int4', want one of 'fp8'"),
        (lambda q: quantized_decode(q._replace(values=q.scale_inv[0])), "`weight` has dtype float32, want uint8"),
        (lambda q: quantized_decode(q._replace(scale_inv=tf.ones([2, 1, 2]))), "`weight` has scales of shape (2, 1, 2)"),
        (lambda q: quantized_matmul(np.ones((2, 3, 4), np.float32), q), "`x` has shape (2, 3, 4), want (None, 130)"),
        (lambda q: quantized_matmul(np.ones((2, 130), np.float32), q, transpose=True), "`transpose` is for stacked"),
        (lambda q: quantized_matmul(np.ones((2, 9), np.float32), QuantizedWeight(*map(lambda t: t[None, None], q))),
         "`weight` has shape (1, 1, 130, 6), want [D, F]"),
        (lambda q: fp8_decode(np.ones(3, np.int8)), "`bits` has dtype int8, want uint8"),
        (lambda q: fp8_encode(np.ones(3, np.int8)), "`x` has dtype int8, want a floating dtype"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(call, wanted):
    with pytest.raises(ValueError) as caught:
        call(quantized_encode(normal(0, 130, 6)))
    assert wanted in str(caught.value) and "\n" not in str(caught.value)




@pytest.mark.parametrize(("kind", "error"), [("int8", 0.0065), ("fp8", 0.0264)])
def test_errors_of_normal_weights(kind, error):
    """As the module's text has them."""
    w = np.random.default_rng(0).normal(size=(2048, 128)).astype(np.float32)
    found = quantized_decode(quantized_encode(w, kind=kind))
    assert np.linalg.norm(found - w) / np.linalg.norm(w) == pytest.approx(error, rel=0.02)
