"""The narrow accumulator against one of Python's integers, to the bit, and against what the paper says of it."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.ops.accumulator import DEPTH, tensor_core_matmul
from tests.compare import normal

FORMATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
BITS, INTERVAL = 14, 128


def exponent(x: Fraction) -> int:
    """⌊log2 |x|⌋ of a number that binary floats have: its denominator is a power of two."""
    return abs(x.numerator).bit_length() - x.denominator.bit_length()


def accumulate(c: Fraction, pairs: list[tuple[Fraction, Fraction]], bits: int) -> Fraction:
    """One instruction: the accumulator after up to 32 products."""
    exponents = [exponent(p) + exponent(q) for p, q in pairs if p and q] + ([exponent(c)] if c else [])
    if not exponents:
        return c
    unit = Fraction(2) ** (max(exponents) + 1 - bits)
    total = sum((math.trunc(p * q / unit) for p, q in pairs), math.trunc(c / unit))
    dropped = max(abs(total).bit_length() - bits, 0)
    kept = (abs(total) >> dropped) << dropped
    return (kept if total > 0 else -kept) * unit


def dot(a, b, scales, interval, bits) -> np.float32:
    """One entry of a product; a scale for each interval."""
    pairs = [(Fraction(float(p)), Fraction(float(q))) for p, q in zip(a, b)]
    y, interval = np.float32(0), interval or len(pairs)
    for i in range(0, len(pairs), interval):
        c = Fraction(0)
        for j in range(i, min(i + interval, len(pairs)), DEPTH):
            c = accumulate(c, pairs[j : min(j + DEPTH, i + interval)], bits)
        y = np.float32(y + np.float32(float(c)) * scales[i // interval])
    return y


def random_bytes(rng, kind: str, *shape: int) -> np.ndarray:
    """Every finite number of a format is as likely as any other: fifteen or thirty powers of two, both zeros."""
    every = np.arange(256, dtype=np.uint8).view(FORMATS[kind]).astype(np.float32)
    return rng.choice(every[np.isfinite(every)], shape)


@st.composite
def problems(draw):
    m, n, k = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 31, 32, 33, 127, 128, 129, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        a, b = (random_bytes(rng, draw(st.sampled_from(list(FORMATS))), *shape) for shape in ((m, k), (k, n)))
    else:
        a, b = (rng.normal(size=shape).astype(FORMATS["e4m3"]).astype(np.float32) for shape in ((m, k), (k, n)))
    a *= rng.random(a.shape) < draw(st.sampled_from([0.1, 1.0]))
    interval, bits = draw(st.sampled_from([None, 32, 64, 128])), draw(st.sampled_from([2, 8, 13, 14, 17, 18, 24]))
    count = 1 if interval is None else -(-k // interval)
    return a, b, *(rng.random(shape).astype(np.float32) for shape in ((m, count), (count, n))), interval, bits


@settings(max_examples=60)
@given(problems())
def test_matches_integers_to_the_bit(problem):
    a, b, scale_a, scale_b, interval, bits = problem
    got = tensor_core_matmul(a, b, scale_a, scale_b, interval=interval, bits=bits).numpy()
    want = [
        [dot(a[m], b[:, n], scale_a[m] * scale_b[:, n], interval, bits) for n in range(b.shape[1])]
        for m in range(a.shape[0])
    ]
    np.testing.assert_array_equal(got, np.array(want, np.float32))


def product(a, b, **options):
    interval = options.get("interval", INTERVAL)
    one = np.ones((1, 1 if interval is None else -(-len(a) // interval)), np.float32)
    a, b = np.array(a, np.float32)[None], np.array(b, np.float32)[:, None]
    return tensor_core_matmul(a, b, one, one.T, **options).numpy().item()


def test_small_terms_vanish_beside_a_large_one():
    """448 = 1.75·2^8, so the unit is 2^-5: 31 times 2^-6 are lost one by one, although their sum has its place."""
    tail = [2.0**-6] * 31
    assert product([448.0, *tail], [1.0] * 32) == 448
    assert product([448.0, *tail], [1.0] * 32, bits=15) == 448 + 31 / 64
    assert product([-448.0, *tail], [1.0] * 32) == -448  # towards zero, not down
    assert product([448.0, *[-t for t in tail]], [1.0] * 32) == 448
    assert product([*tail, 0.0] + [448.0], [1.0] * 33) == 448 + 15 / 32  # the sum is made before the large one comes


def test_the_accumulator_has_its_part_in_the_alignment():
    """A sum of 2^14 in the accumulator makes the unit 2: ones that come later do not count, promoted they do."""
    a, b = [128.0] * 32 + [1.0] * 32, [4.0] * 32 + [1.0] * 32
    assert product(a, b, interval=64) == 16384
    assert product(a, b, interval=32) == 16384 + 32
    assert product(a, b, interval=None, bits=15) == 16384 + 32


def test_what_is_not_finite_takes_its_row_or_column():
    a, b, one = np.ones((2, 3), np.float32), np.ones((3, 2), np.float32), np.ones((1, 1), np.float32)
    a[0, 1], b[2, 1] = np.nan, np.inf
    got = tensor_core_matmul(a, b, one, one).numpy()
    assert np.isnan(got).tolist() == [[True, True], [False, True]] and got[1, 0] == 3


@pytest.mark.parametrize("interval", [None, 64])
def test_modes_agree_to_the_bit(interval):
    """With scales that are powers of two: else a compiler may round the promotion's product and sum at once."""
    rng = np.random.default_rng(0)
    a, b = random_bytes(rng, "e4m3", 2, 1, 3, 200), random_bytes(rng, "e4m3", 5, 200, 4)
    count = 1 if interval is None else 4
    scales = np.exp2(rng.integers(-3, 3, (3, count))).astype(np.float32), np.ones((count, 1), np.float32)

    def fn(a, b):
        return tensor_core_matmul(a, b, *scales, interval=interval)

    unknown = tf.function(fn, autograph=False, input_signature=[tf.TensorSpec([None] * r) for r in (4, 3)])
    compiled = tf.function(fn, autograph=False, jit_compile=True)
    want = np.array([[fn(x, y).numpy() for y in b] for x in a[:, 0]])
    for run in (fn, tf.function(fn, autograph=False), compiled, unknown):
        np.testing.assert_array_equal(run(tf.constant(a), tf.constant(b)), want)
    fused = tensor_core_matmul(tf.constant(a), tf.constant(b), *scales, interval=interval, fuse=True)
    np.testing.assert_array_equal(fused, want)


def errors(interval: int | None, bits: int = BITS, depth: int = 4096, size: int = 128) -> np.ndarray:
    """Errors of a product of random normal numbers, rounded to E4M3, relative to the results' root mean square."""
    a, b = (normal(i, *shape).astype(FORMATS["e4m3"]) for i, shape in enumerate(((size, depth), (depth, size))))
    one = np.ones((1, 1 if interval is None else depth // interval), np.float32)
    got = tensor_core_matmul(a, b, one, one.T, interval=interval, bits=bits, fuse=True)
    want = a.astype(np.float64) @ b.astype(np.float64)
    return (got.numpy() - want) / np.sqrt(np.mean(want**2))


def test_error_is_that_of_the_paper():
    """K = 4096: "a maximum relative error of nearly 2%" (section 3.3.2), which is one of a maximum over many results:
    relative to their root mean square 1.0 to 1.1% for 64², 1.2 to 1.6% for 128², 1.5 to 2.1% for 512², and 0.13% for their
    mean error. Promotion every 128 elements makes the largest twenty times smaller, the mean ten times."""
    never, promoted = errors(None), errors(INTERVAL)
    assert 0.011 < np.abs(never).max() < 0.021
    assert 4e-4 < np.abs(promoted).max() < 8e-4
    assert 0.0012 < np.std(never) < 0.0015
    assert 1.1e-4 < np.std(promoted) < 1.5e-4


def test_each_bit_halves_the_error():
    """While most products lose bits: they have eight each, so that more bits than 12 leave the larger ones whole."""
    found = [np.std(errors(None, bits, depth=1024, size=32)) for bits in (8, 10, 12)]
    for coarse, fine in zip(found, found[1:]):
        assert 3 < coarse / fine < 5.5


def test_error_is_bounded():
    """An instruction loses less than a unit for each of 33 terms and for the sum it keeps; a unit is at most 2^(1 − bits) of
    Σ|p|. Small products beside a large one come near it: 31 of 34 terms lose 15/16 of the unit."""
    rng = np.random.default_rng(0)
    large = np.array([[256.0] + [1.875 * 2**-6] * 31]), np.ones((32, 1))
    random = [(random_bytes(rng, "e4m3", 20, k), random_bytes(rng, "e4m3", k, 20)) for k in (32, 128, 300)]
    found = []
    for a, b in [large, *random]:
        got = tensor_core_matmul(a, b, [[1.0]], [[1.0]], interval=None).numpy()
        a, b = a.astype(np.float64), b.astype(np.float64)
        bound = -(-len(b) // DEPTH) * 34 * 2.0 ** (1 - BITS) * (np.abs(a) @ np.abs(b))
        found.append((np.abs(got - a @ b) / bound).max())
    assert 0.8 < found[0] < 1 and 0 < min(found) and max(found) < 1


A, B, ONE = np.ones((2, 4), np.float32), np.ones((4, 3), np.float32), np.ones((1, 1), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((A, B[:3]), {}, r"`b` has 3 rows, want 4 \[K\], as `a` has columns"),
        ((A[0], B), {}, r"`a` has shape \(4,\), want two dims at least"),
        ((A, B, np.ones((2, 2), np.float32)), {}, "`scale_a` has 2 intervals of K, want 1"),
        ((A, B), {"interval": 100}, "`interval` is 100, want None or a positive multiple of 32"),
        ((A, B), {"interval": 0}, "`interval` is 0"),
        ((A, B), {"bits": 25}, "`bits` is 25, want 2 to 24"),
        ((A, B), {"bits": 1}, "`bits` is 1"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=f"tensor_core_matmul: {message}"):
        tensor_core_matmul(*arguments, *[ONE] * (4 - len(arguments)), **options)
