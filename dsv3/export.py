"""Writes a function as a portable program: StableHLO that JAX alone runs, with example inputs and the results to expect.

TensorFlow traces the function and compiles nothing: a program for a GPU is made on a machine that has none. An artifact is a
directory:

================== ==================================================================================
file               what is in it
================== ==================================================================================
function.stablehlo the program, as `jax.export` serialises it, for all of the manifest's platforms
inputs.npz         the example inputs, `0`, `1`, ... in the manifest's order, as their bits
outputs.npz        the results, the same; computed by TensorFlow on this machine, operation by operation
manifest.json      names (paths in the function's trees), dtypes, shapes, tolerances, FLOPs, versions
================== ==================================================================================

`examples/run_artifact.py` reads it; it needs JAX and NumPy, neither TensorFlow nor dsv3.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.io.atomic import replace_directory, write_synced
from dsv3.typing import Tree

FORMAT = 1
PLATFORMS = ("cpu", "cuda")
TOLERANCES = {"cpu": 1e-5, "cuda": 2e-3}
"""Of float32 results, by platform: sums in another order, and a GPU rounds the inputs of float32 products to TF32."""

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def export_function(
    fn: Callable[..., Tree],
    inputs: Sequence[Tree],
    directory: str | os.PathLike[str],
    *,
    name: str = "function",
    platforms: Sequence[str] = PLATFORMS,
    outputs: bool = True,
    reference: Callable[..., Tree] | None = None,
    tolerances: Mapping[str, float] | None = None,
    flops: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `fn(*inputs)` as an artifact; what was at `directory` is replaced as a whole, when all is there.

    Args:
      fn: a pure function of trees of tensors with static shapes. Its policy must leave compilation to the caller: `fuse`
        off, experts `"blocks"`, which is `dsv3.policy.ACCELERATOR`. No variables, no random operations: the generators of
        TensorFlow give other numbers inside XLA.
      inputs: the example arguments, trees of tensors or arrays.
      directory: where to write.
      name: of the function, in the manifest.
      platforms: that the program is for, names of JAX: `"cpu"`, `"cuda"`, `"rocm"`, `"tpu"`.
      outputs: compute the results, too; without them nothing is computed, whatever the size.
      reference: what computes the results instead of `fn`: the same function in a form that suits this machine.
      tolerances: platform → largest relative error of a result, `‖got − want‖ / ‖want‖` over a leaf, that still passes;
        default: `TOLERANCES`. Integers and booleans must be equal.
      flops: of the function's matrix products, for rates.
      details: more for the manifest, what JSON can hold.

    Returns:
      The manifest.

    Raises:
      ValueError: no platform, an input without a static shape, a function that returns no tensor, or a place that cannot be
        written to.
      ModuleNotFoundError: JAX is not installed (the extra `export`).
    """
    check(len(platforms) > 0, "export_function: `platforms` is empty, want at least one, such as 'cuda'")
    inputs = tree.map_leaves(tf.convert_to_tensor, tuple(inputs))
    leaves = tree.flatten(inputs)
    check(len(leaves) > 0, "export_function: `inputs` has no tensor, want at least one")
    run, described = _trace(fn, inputs)
    check(len(described) > 0, "export_function: `fn` returns no tensor, want at least one")
    files = {"function.stablehlo": _serialize(run, leaves, platforms), "inputs.npz": _pack(leaves)}
    if outputs:
        other, like = (run, described) if reference is None else _trace(reference, inputs)
        same = "export_function: `reference` returns other leaves than `fn`, want the same names, dtypes and shapes"
        check(like == described, same)
        files["outputs.npz"] = _pack(other(*leaves))
    manifest = {
        "format": FORMAT,
        "name": name,
        "platforms": list(platforms),
        "inputs": [_describe(path, leaf) for path, leaf in tree.items(inputs)],
        "outputs": described,
        "checked": outputs,
        "tolerances": dict(tolerances or TOLERANCES),
        "flops": flops,
        "versions": _versions(),
        "details": dict(details or {}),
    }
    files["manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    with replace_directory(directory, function="export_function") as fresh:
        for file, data in files.items():
            write_synced(pathlib.Path(fresh, file), data)
    return manifest


def _trace(fn: Callable[..., Tree], inputs: Tree) -> tuple[Any, list[dict[str, Any]]]:
    """The concrete function of and to flat leaves, traced once, and what it returns."""
    described: list[dict[str, Any]] = []

    def flat(*leaves: tf.Tensor) -> list[tf.Tensor]:
        out = tree.to_dict(tree.map_leaves(tf.convert_to_tensor, fn(*tree.unflatten_as(inputs, list(leaves)))))
        described[:] = [_describe(path or "out", leaf) for path, leaf in out.items()]
        return list(out.values())

    specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in tree.flatten(inputs)]
    return tf.function(flat, autograph=False).get_concrete_function(*specs), described


def _serialize(run: Any, leaves: list[tf.Tensor], platforms: Sequence[str]) -> bytes:
    """The function's StableHLO, with the calling convention of `jax.export`."""
    import jax
    from jax.experimental import jax2tf

    dtypes = [leaf.dtype for leaf in run.outputs]
    kinds = [dtype.as_numpy_dtype if dtype.is_floating and dtype.size == 1 else None for dtype in dtypes]

    @tf.function(jit_compile=True, autograph=False)
    def compiled(*leaves: tf.Tensor) -> list[tf.Tensor]:
        return [leaf if kind is None else tf.cast(leaf, tf.float16) for leaf, kind in zip(run(*leaves), kinds)]

    # Its effect could be read by jax2tf only. It takes no float8 results: float16 has all values of both formats.
    called = jax2tf.call_tf(compiled, has_side_effects=False)

    def program(*arrays: Any) -> list[Any]:
        return [leaf if kind is None else leaf.astype(kind) for leaf, kind in zip(called(*arrays), kinds)]

    with jax.enable_x64(True):  # else int64 would become int32
        arguments = [jax.ShapeDtypeStruct(leaf.shape.as_list(), leaf.dtype.as_numpy_dtype) for leaf in leaves]
        exported = jax.export.export(jax.jit(program), platforms=list(platforms))(*arguments)
    return exported.serialize()


def _describe(path: str, leaf: tf.Tensor) -> dict[str, Any]:
    return {"name": path, "dtype": leaf.dtype.name, "shape": leaf.shape.as_list()}


def _pack(leaves: Sequence[tf.Tensor]) -> bytes:
    """An npz file of the leaves' bits, flat: NumPy's format knows neither bfloat16 nor float8."""
    file = io.BytesIO()
    arrays = (np.ascontiguousarray(leaf.numpy()).reshape(-1) for leaf in leaves)
    np.savez(file, **{str(i): array.view(_BITS[array.dtype.itemsize]) for i, array in enumerate(arrays)})
    return file.getvalue()


def _versions() -> dict[str, str]:
    import jax

    return {"tensorflow": tf.__version__, "jax": jax.__version__, "numpy": np.__version__}
