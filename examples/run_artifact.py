"""Runs what examples/export.py wrote, with JAX and NumPy alone: checks the results, times them, counts float8 products.

Neither TensorFlow nor dsv3 is needed: this file and the artifacts' directories can be copied to a machine with a GPU, where
`pip install "jax[cuda12]"` is enough. The program runs on JAX's default device (JAX_PLATFORMS=cpu: on the CPU).

Examples:

  python run_artifact.py runs/gemm_bf16
  python run_artifact.py runs/gemm_bf16 runs/gemm_fp8 --hlo runs/hlo --torch      # and how many times as fast the second is

Each artifact gets a line: the largest error of its results, the median time of a call, TFLOP/s, and the first artifact's
time divided by its own. Exit code: 0; 1 if results differ from the stored ones; 2 for bad input.

With --hlo the optimised program is written, too, and its matrix products are counted by the dtypes of their operands. Only
what the program's text shows counts: a product in a loop is one product.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT = 1
WARM = 3  # calls before the clock starts
CALLS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__onednn$matmul")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(?\w+)\[?[^=]*? (dot|custom-call)\((.*?)\)(?:,|$)")
_NAMED = re.compile(r"%?([\w.\-]+) = \(?(\w+)\[")


def main(argv: list[str] | None = None) -> int:
    """Runs all artifacts; returns the exit code."""
    args = parse_arguments(argv)
    jax.config.update("jax_enable_x64", True)  # so that int64 stays what it is
    try:
        artifacts = [read_artifact(pathlib.Path(path)) for path in args.artifacts]
        if args.hlo:
            pathlib.Path(args.hlo).mkdir(parents=True, exist_ok=True)
        print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind} ({jax.default_backend()})")
        return run_all(artifacts, args)
    except (ValueError, OSError) as error:
        print(f"run_artifact: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(
        prog="run_artifact", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", help="directories of artifacts")
    parser.add_argument("--repeats", type=positive, default=20, help="timed turns; their median is shown (default: 20)")
    parser.add_argument("--burst", type=positive, default=5, help="calls in a turn, before waiting for them (default: 5)")
    parser.add_argument("--hlo", help="directory for the optimised programs, whose products are then counted")
    parser.add_argument("--torch", action="store_true", help="time PyTorch's products of the same shape, if it has a GPU")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """Returns a positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def run_all(artifacts: list[dict[str, Any]], args: argparse.Namespace) -> int:
    """Runs, checks and times all; returns 1 if a result is wrong."""
    wrong, first = [], None
    for artifact in artifacts:
        manifest, name = artifact["manifest"], artifact["path"].name
        compiled = jax.jit(artifact["call"]).lower(*artifact["inputs"]).compile()
        inputs = [jax.device_put(x) for x in artifact["inputs"]]
        verdict, fault = compare(manifest, jax.block_until_ready(compiled(*inputs)), artifact["want"])
        seconds = median_seconds(functools.partial(compiled, *inputs), args.repeats, args.burst)
        first = first or seconds
        rate = f", {manifest['flops'] / seconds / 1e12:.3g} TFLOP/s" if manifest["flops"] else ""
        print(f"{name}: {verdict}, {1e3 * seconds:.4g} ms{rate}, {first / seconds:.2f}x", flush=True)
        if fault:
            wrong.append(f"run_artifact: {name}: {fault}")
        if args.hlo:
            text = compiled.as_text()
            pathlib.Path(args.hlo, f"{name}.txt").write_text(text, encoding="utf-8")
            print(f"  {products_line(text)}", flush=True)
        if args.torch:
            print(f"  {torch_line(manifest, args.repeats, args.burst)}", flush=True)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def read_artifact(path: pathlib.Path) -> dict[str, Any]:
    """Reads a directory that examples/export.py wrote."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} has no manifest.json, want a directory that examples/export.py wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}/manifest.json is no JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}/manifest.json has another format than {FORMAT}, which this program reads")
    backend = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if backend not in manifest["platforms"]:
        raise ValueError(f"{path} is for {', '.join(manifest['platforms'])}, but JAX runs on {backend} here")
    try:
        exported = jax.export.deserialize(bytearray((path / "function.stablehlo").read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"{path} has no function.stablehlo") from None
    except Exception as error:  # flatbuffers raises anything for bytes that are none
        raise ValueError(f"{path}/function.stablehlo cannot be read: {type(error).__name__} {error}") from None
    want = read_arrays(path / "outputs.npz", manifest["outputs"]) if manifest["checked"] else None
    inputs = read_arrays(path / "inputs.npz", manifest["inputs"])
    return {"path": path, "manifest": manifest, "call": exported.call, "inputs": inputs, "want": want}


def read_arrays(path: pathlib.Path, described: list[dict[str, Any]]) -> list[np.ndarray]:
    """Returns a file's arrays, which are stored as their bits, in the dtypes and shapes of the manifest."""
    arrays = []
    try:
        with np.load(path) as file:
            for i, leaf in enumerate(described):
                arrays.append(file[str(i)].view(jnp.dtype(leaf["dtype"])).reshape(leaf["shape"]))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except Exception as error:  # a damaged archive raises anything
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return arrays


def compare(manifest: dict[str, Any], got: list[Any], want: list[np.ndarray] | None) -> tuple[str, str]:
    """Returns what to print of the results, and what is wrong with them, if anything is."""
    if want is None:
        return "no stored results", ""
    limit = manifest["tolerances"][{"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())]
    worst, faults = 0.0, []
    for leaf, x, y in zip(manifest["outputs"], got, want, strict=True):
        error = relative_error(np.asarray(x), y)
        exact = not jnp.issubdtype(y.dtype, jnp.floating)
        if not error <= (0.0 if exact else limit):  # also if it is NaN
            allowed = "equal values" if exact else f"at most {limit:g}"
            faults.append(f"`{leaf['name']}` is off by {error:.2g}, want {allowed}")
        worst = max(worst, error) if error == error else error
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"largest error {worst:.2g} of {limit:g}", faults[0] + more if faults else ""


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """`‖got − want‖ / ‖want‖` in float64, the share of unlike entries for integers; NaN where `got` alone has one."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("nan")
    if not jnp.issubdtype(want.dtype, jnp.floating):
        return float(np.mean(got != want)) if want.size else 0.0
    got, want = got.astype(np.float64), want.astype(np.float64)
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return float("nan")
    finite = np.isfinite(want)
    difference, size = np.linalg.norm((got - want)[finite]), np.linalg.norm(want[finite])
    return float(difference / size) if size else float(difference)


def median_seconds(call: Callable[[], Any], repeats: int, burst: int) -> float:
    """Returns a call's median time; the calls of a turn are queued one behind the other."""
    for _ in range(WARM):
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(burst):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / burst)
    return statistics.median(times)


def count_products(text: str) -> collections.Counter[str]:
    """Counts an optimised program's matrix products: the operands' dtypes, and by what they are computed → how many."""
    counts: collections.Counter[str] = collections.Counter()
    dtypes: dict[str, str] = {}
    for line in text.splitlines():
        if line.rstrip().endswith("{"):  # a computation begins; its parameters' names are its own
            dtypes = {}
        named = _NAMED.search(line)
        found = _INSTRUCTION.match(line)
        if found:
            target = re.search(r'custom_call_target="([^"]+)"', line)
            if found[3] == "dot" or (target and target[1] in CALLS):
                by = "dot" if found[3] == "dot" else target[1]
                counts[f"{operand_dtypes(found[4], dtypes)} by {by}"] += 1
        if named:
            dtypes[named[1]] = named[2]
    return counts


def operand_dtypes(operands: str, dtypes: dict[str, str]) -> str:
    """Returns the dtypes of the first two operands, as `f8e4m3fn x f8e4m3fn`; they are printed with a type or without."""
    names = []
    for operand in re.findall(r"(?:(\w+)\[[\d,]*\](?:\{[^}]*\})? )?%?([\w.\-]+)(?:, |$)", operands)[:2]:
        names.append(operand[0] or dtypes.get(operand[1], "?"))
    return " x ".join(names)


def products_line(text: str) -> str:
    """Returns a line about a program's products."""
    counts = count_products(text)
    float8 = sum(n for what, n in counts.items() if what.startswith("f8") and " x f8" in what)
    listed = "; ".join(f"{n} of {what}" for what, n in counts.most_common())
    return f"products with float8 operands: {float8} of {sum(counts.values())}" + (f" ({listed})" if listed else "")


def torch_line(manifest: dict[str, Any], repeats: int, burst: int) -> str:
    """Times PyTorch's products of the artifact's shape: bfloat16, and FP8 with one scale for each tensor."""
    shape = manifest["details"].get("product")
    if not shape:
        return "torch: the artifact is no single product"
    try:
        import torch
    except ModuleNotFoundError:
        return "torch: not installed"
    if not torch.cuda.is_available():
        return "torch: has no GPU here"
    m, k, n = shape
    a, b = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((m, k), (k, n)))
    parts = [torch_rate("bfloat16", lambda: a @ b, (m, k, n), repeats, burst)]
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().t().to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        scaled = lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731, SLF001
        parts.append(torch_rate("float8", scaled, (m, k, n), repeats, burst))
    except (RuntimeError, AttributeError, TypeError) as error:
        parts.append(f"float8: {' '.join(str(error).split())[:120]}")
    return f"torch {torch.__version__}: " + "; ".join(parts)


def torch_rate(name: str, call: Callable[[], Any], shape: tuple[int, int, int], repeats: int, burst: int) -> str:
    """Returns the median time of a product and its rate."""
    import torch

    for _ in range(WARM):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(burst):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / burst)
    seconds = statistics.median(times)
    return f"{name} {1e3 * seconds:.4g} ms, {2 * np.prod(shape, dtype=float) / seconds / 1e12:.3g} TFLOP/s"


if __name__ == "__main__":
    sys.exit(main())
