"""Shows what each choice of FP8 training does to the error of a product, by the length of its sums.

Rows are K, the elements of a sum. Under "rounding" stand relative errors in percent, ‖y − exact‖ / ‖exact‖ of a row of the
result, the mean over rows, of products that are summed exactly, so that only the operands err:

  bfloat16     both operands in bfloat16
  block        E4M3 with the paper's scales: 1×128 and 128×128
  pow2         the same with power-of-two scales
  tensor       E4M3 with one scale for each tensor
  e5m2         the left operand in E5M2, as gradients have it in older recipes

Under "sums" errors of the sums alone, of operands that are FP8 already: the mean over elements, and in brackets the largest,
in percent of the root mean square of the result:

  promoted     in a tensor core's 14-bit accumulator that is emptied into float32 every 128 elements
  never        in that accumulator from the first element to the last

--outliers makes some rows of the left operand larger, as some tokens' activations are; positive operands (--positive) make
sums that grow with K instead of √K.

Examples:

  python examples/fp8_error.py
  python examples/fp8_error.py --outliers=30000
  python examples/fp8_error.py --positive
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import sys

import numpy as np
import tensorflow as tf
from absl import app, flags
from command import aligned, flag_parser

from dsv3.checks import check
from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK, Block, fp8_fake, fp8_quantize
from dsv3.ops.gemm import fp8_gemm

FLAGS = flags.FLAGS

flags.DEFINE_multi_integer("depth", [128, 512, 2048, 4096, 7168], "K; may be given several times.", 1)
flags.DEFINE_integer("rows", 64, "M and N.", 1)
flags.DEFINE_float("outliers", 1.0, "Factor of one row in sixteen of the left operand.", 0.0)
flags.DEFINE_bool("positive", False, "Take absolute values.")
flags.DEFINE_integer("bits", 14, "Bits of the accumulator.", 2, 24)
flags.DEFINE_integer("seed", 0, "Of the operands.", 0)


def main(argv: list[str]) -> int:
    """Prints the table; returns the exit code: 2 for bad input."""
    try:
        check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    except ValueError as error:
        print(f"fp8_error: {error}", file=sys.stderr)
        return 2
    rows = [("K", "bfloat16", "block", "pow2", "tensor", "e5m2", "promoted", "never")]
    for depth in FLAGS.depth:
        a, b = operands(depth)
        rows.append((f"{depth:,}", *rounding(a, b), *sums(a, b)))
    print(f"{'':8}{'rounding, %':<44}sums, %: mean (largest)")
    print(aligned(rows, left=0))
    return 0


def operands(depth: int) -> tuple[np.ndarray, np.ndarray]:
    """`[M, K]` and `[K, N]`."""
    rng = np.random.default_rng([FLAGS.seed, depth])
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((FLAGS.rows, depth), (depth, FLAGS.rows)))
    a[::16] *= FLAGS.outliers
    return (np.abs(a), np.abs(b)) if FLAGS.positive else (a, b)


def rounding(a: np.ndarray, b: np.ndarray) -> list[str]:
    """Errors of products of rounded operands, summed in float64."""

    def fake(x: np.ndarray, block: Block, **options: str) -> np.ndarray:
        if block is None:
            q = fp8_quantize(x, block=None, **options)
            return np.float64(tf.cast(q.values, tf.float32)) * np.float64(q.scale_inv)
        return np.float64(fp8_fake(x, block=block, **options))

    exact = np.float64(a) @ np.float64(b)
    half = [np.float64(tf.cast(tf.cast(x, tf.bfloat16), tf.float32)) for x in (a, b)]
    pairs = [
        half,
        (fake(a, ROW_BLOCK), fake(b, WEIGHT_BLOCK)),
        (fake(a, ROW_BLOCK, scale_kind="power_of_two"), fake(b, WEIGHT_BLOCK, scale_kind="power_of_two")),
        (fake(a, None), fake(b, None)),
        (fake(a, ROW_BLOCK, fmt="e5m2"), fake(b, WEIGHT_BLOCK)),
    ]
    size = np.linalg.norm(exact, axis=1)
    return [f"{100 * np.mean(np.linalg.norm(x @ y - exact, axis=1) / size):.2f}" for x, y in pairs]


def sums(a: np.ndarray, b: np.ndarray) -> list[str]:
    """Errors of the model of an accumulator, on operands with one scale each, which it may sum without a promotion."""
    x, y = fp8_quantize(a, block=None), fp8_quantize(b, block=None)
    wide = [np.float64(tf.cast(t.values, tf.float32)) * np.float64(t.scale_inv) for t in (x, y)]
    exact = wide[0] @ wide[1]
    size = np.sqrt(np.mean(exact**2))
    cells = []
    for interval in (128, None):
        given = {"accumulate": "tensor_core", "interval": interval, "bits": FLAGS.bits, "fuse": True}
        error = np.abs(np.float64(fp8_gemm(x, y, a_block=None, b_block=None, **given)) - exact) / size
        cells.append(f"{100 * error.mean():.3f} ({100 * error.max():.2f})")
    return cells


parse_flags = flag_parser("fp8_error")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
