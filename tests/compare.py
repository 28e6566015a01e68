"""How tests compare: arrays relative to their largest entry, gradients with an oracle's finite differences.

Computations are float32, oracles float64. A gradient is held against central differences of the *oracle* along random
directions: their error is about 1e-9, so what remains is the rounding of the float32 gradient, and the check does not lean
on TensorFlow's automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import settings

from dsv3 import ComputePolicy, tree

# Float32 rounds to 2^-24 = 6e-8. Sums over up to 64 terms of mixed sign and a few roundings in a row stay below 30 of those.
TOLERANCE = 2e-6
# A gradient runs through the same sums twice, once forward and once back.
GRADIENT_TOLERANCE = 1e-5

SWEEP = settings(max_examples=12)

# The kernel for few rows repeats its graph for every token, so it is used only where it is what a test is about.
PLAIN = ComputePolicy(fuse=False, max_rows=0)
FUSED = ComputePolicy(fuse=True, max_rows=0)
XLA = ComputePolicy(fuse=False, jit=True, experts="blocks", max_rows=0)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Returns float32 normal numbers; float32, so that oracle and computation start from the same values."""
    return (np.random.default_rng([seed, *shape]).normal(size=shape) * scale).astype(np.float32)


def to_numpy(value: Any) -> np.ndarray:
    """Returns a tensor's values; bfloat16 becomes float32."""
    value = tf.convert_to_tensor(value)
    return (tf.cast(value, tf.float32) if value.dtype == tf.bfloat16 else value).numpy()


def error(got: Any, want: Any) -> float:
    """Returns the largest difference, relative to the largest wanted entry."""
    got, want = to_numpy(got).astype(np.float64), np.asarray(to_numpy(want), np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, want {want.shape}"
    if want.size == 0:
        return 0.0
    scale = np.abs(want).max()
    return float(np.abs(got - want).max() / (scale if scale > 0 else 1.0))


def assert_close(got: Any, want: Any, tolerance: float = TOLERANCE, what: str = "") -> None:
    """Asserts that arrays agree relative to the largest wanted entry; integers and booleans must be equal."""
    if np.asarray(to_numpy(want)).dtype.kind in "iub":
        np.testing.assert_array_equal(to_numpy(got), want, err_msg=what)
        return
    found = error(got, want)
    assert found <= tolerance, f"{what}: relative error {found:.2e}, at most {tolerance:.0e} is allowed"


def assert_trees_close(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    """Asserts that two trees have the same paths and close leaves."""
    got, want = tree.to_dict(got), tree.to_dict(want)
    assert list(got) == list(want)
    for path, leaf in want.items():
        assert_close(got[path], leaf, tolerance, path)


def memory_beside(fn: Callable[[], Any]) -> int:
    """Returns how many bytes TensorFlow holds in `fn` beside those before; skips the test if it does not count them."""
    try:
        tf.config.experimental.reset_memory_stats("CPU:0")
    except ValueError:
        pytest.skip("this TensorFlow does not count the memory of a CPU")
    held = tf.config.experimental.get_memory_info("CPU:0")["current"]
    fn()
    return tf.config.experimental.get_memory_info("CPU:0")["peak"] - held


def gradients(fn: Callable[..., Any], inputs: Sequence[Any], cotangents: Sequence[Any] | None = None) -> list[tf.Tensor]:
    """Returns `d Σ fn(*inputs)·cotangent / d inputs` with zeros for what is not connected."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outs = tree.flatten(fn(*inputs))
    found = tape.gradient(outs, inputs, cotangents, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.convert_to_tensor(g) for g in found]


def check_gradient(
    fn: Callable[..., tf.Tensor],
    oracle: Callable[..., np.ndarray],
    inputs: Sequence[np.ndarray],
    *,
    tolerance: float = GRADIENT_TOLERANCE,
    seed: int = 0,
    directions: int = 2,
    step: float = 1e-5,
) -> None:
    """Asserts that the gradient of `Σ fn·r`, for random r, is the oracle's derivative along random directions.

    Along a direction u of independent normal numbers `g·u` is of the size of `|g|`, so errors are relative to `|g|`, and for
    a gradient that vanishes to a tenth of the largest among the inputs.
    """
    rng = np.random.default_rng(seed)
    cotangent = rng.normal(size=oracle(*(x.astype(np.float64) for x in inputs)).shape)
    found = gradients(fn, inputs, [tf.constant(cotangent, tf.float32)])
    cotangent = cotangent.astype(np.float32).astype(np.float64)
    largest = max(np.linalg.norm(g) for g in found)
    for i, x in enumerate(inputs):
        got = found[i].numpy().astype(np.float64)
        for _ in range(directions):
            u = rng.normal(size=x.shape)
            ends = [[*inputs[:i], x.astype(np.float64) + s * step * u, *inputs[i + 1 :]] for s in (1, -1)]
            high, low = (float(np.sum(oracle(*(np.asarray(v, np.float64) for v in end)) * cotangent)) for end in ends)
            want = (high - low) / (2 * step)
            size = max(np.linalg.norm(got), abs(want), 0.1 * largest)
            off = abs(float(np.sum(got * u)) - want) / size
            assert off <= tolerance, f"gradient of input {i}: off by {off:.2e} of its norm, {tolerance:.0e} is allowed"


def loops(fn: Callable[[], Any]) -> int:
    """Returns how many loops the graph of a function has."""
    operations = tf.function(fn, autograph=False).get_concrete_function().graph.get_operations()
    return sum(op.type in ("While", "StatelessWhile") for op in operations)
