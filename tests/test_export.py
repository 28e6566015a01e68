"""Exported programs: what is in an artifact, and examples/run_artifact.py as a program of its own, without TensorFlow."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from dsv3.export import export_function
from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor
from dsv3.ops.gemm import fp8_gemm
from tests.compare import normal
from tests.more import MORE

jax = pytest.importorskip("jax", reason="JAX is not installed (the extra `export`)")

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import run_artifact  # noqa: E402 (an example is no package)

# In a process where importing TensorFlow or dsv3 is an error.
ALONE = "import sys, runpy; sys.modules.update(tensorflow=None, dsv3=None); sys.argv[:] = sys.argv[1:]; "
ALONE += "runpy.run_path(sys.argv[0], run_name='__main__')"


def run(*arguments: object) -> subprocess.CompletedProcess:
    """Runs examples/run_artifact.py on the CPU."""
    command = [sys.executable, "-c", ALONE, EXAMPLES / "run_artifact.py", *arguments, "--repeats=2", "--burst=1"]
    env = {"PATH": "", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=240, check=False)


def mixed(tree):
    """Every kind of dtype, a nested tree, a scalar, an int64 that is too large for int32."""
    x, (n, flag) = tree["x"], tree["more"]
    return {"y": tf.matmul(x, x), "n": n + 1, "f8": tf.cast(x, tf.dtypes.experimental.float8_e4m3fn), "flag": ~flag}, x[0, 0]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A small artifact; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("export") / "mixed"
    inputs = {"x": tf.cast(normal(0, 4, 4), tf.bfloat16), "more": (tf.constant(2**40, tf.int64), tf.constant([True, False]))}
    export_function(mixed, [inputs], path, platforms=["cpu", "cuda"], tolerances={"cpu": 1e-2, "cuda": 1e-2}, flops=128)
    return path


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def edit(path, **fields):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | fields))


def test_manifest_names_what_the_trees_have(artifact):
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert [leaf["name"] for leaf in manifest["inputs"]] == ["0.more.0", "0.more.1", "0.x"]
    described = {leaf["name"]: (leaf["dtype"], leaf["shape"]) for leaf in manifest["outputs"]}
    assert described == {
        "0.f8": ("float8_e4m3fn", [4, 4]), "0.flag": ("bool", [2]), "0.n": ("int64", []), "0.y": ("bfloat16", [4, 4]),
        "1": ("bfloat16", []),
    }  # fmt: skip
    assert sorted(p.name for p in artifact.iterdir()) == ["function.stablehlo", "inputs.npz", "manifest.json", "outputs.npz"]


def test_arrays_keep_their_bits(artifact):
    manifest = json.loads((artifact / "manifest.json").read_text())
    x = tf.cast(normal(0, 4, 4), tf.bfloat16)
    read = run_artifact.read_arrays(artifact / "inputs.npz", manifest["inputs"])
    assert read[0] == 2**40 and read[1].tolist() == [True, False]
    np.testing.assert_array_equal(read[2], x.numpy())
    f8 = run_artifact.read_arrays(artifact / "outputs.npz", manifest["outputs"])[0]
    np.testing.assert_array_equal(f8, tf.cast(x, tf.dtypes.experimental.float8_e4m3fn).numpy())


def test_program_for_a_gpu_has_float8_products(tmp_path):
    a, b = (tf.cast(tf.zeros(shape), tf.dtypes.experimental.float8_e4m3fn) for shape in ((16, 256), (256, 32)))
    how = {"a_block": ROW_BLOCK, "b_block": WEIGHT_BLOCK, "operands": "float8"}
    pair = Fp8Tensor(a, tf.ones([16, 2])), Fp8Tensor(b, tf.ones([2, 1]))
    manifest = export_function(
        lambda a, b: fp8_gemm(a, b, **how), pair, tmp_path / "gemm", platforms=["cuda"], outputs=False
    )
    exported = jax.export.deserialize(bytearray((tmp_path / "gemm" / "function.stablehlo").read_bytes()))
    assert exported.platforms == ("cuda",) and not manifest["checked"]
    assert not (tmp_path / "gemm" / "outputs.npz").exists()
    (line,) = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert "(tensor<16x2x128xf8E4M3FN>, tensor<2x128x32xf8E4M3FN>) -> tensor<2x16x32xf32>" in line


def test_runner_checks_times_and_counts(artifact, tmp_path):
    done = run(artifact, artifact, f"--hlo={tmp_path / 'hlo'}", "--torch")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"JAX {jax.__version__} on ") and len(lines) == 7
    assert lines[1].startswith("mixed: largest error ") and lines[1].endswith(" TFLOP/s, 1.00x") and lines[4][-1] == "x"
    assert lines[2].startswith("  products with float8 operands: 0 of 1 (1 of ")
    assert lines[3] == "  torch: the artifact is no single product"
    assert "HloModule" in (tmp_path / "hlo" / "mixed.txt").read_text()


@pytest.mark.parametrize(
    ("index", "message"),
    [(0, "`0.f8` is off by"), (1, "`0.flag` is off by 0.5, want equal values"), (2, "`0.n` is off by 1, want equal"),
     (3, "`0.y` is off by")],
)  # fmt: skip
def test_wrong_result_is_named(copy, index, message):
    with np.load(copy / "outputs.npz") as file:
        arrays = dict(file)
    arrays[str(index)].view(np.uint8)[0] ^= 0x01 if index in (1, 2) else 0x60
    np.savez(copy / "outputs.npz", **arrays)
    done = run(copy)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"run_artifact: copy: {message}"), done.stderr


# What examples/export.py writes, each as small as it may be.
KINDS = {
    "gemm": ["--fp8=tensor", "--dtype=bfloat16", "--rows=16"],
    "linear": ["--fp8=paper", "--rows=130", "--width=140", "--out_width=60"],
    "experts": ["--fp8=tensor", "--rows=32", "--experts=4"],
    "moe": ["--dtype=bfloat16", "--batch_size=1", "--seq_len=8"],
    "block": ["--fp8=paper", "--operands=expanded", "--batch_size=1", "--seq_len=8"],
    "train_step": ["--layers=1", "--batch_size=1", "--seq_len=8"],
    "decode": ["--layers=1", "--batch_size=1", "--seq_len=8"],
}
# Exports several in one process, which saves loading TensorFlow for each.
DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import export
from absl.testing import flagsaver
for arguments in json.loads(sys.argv[2]):
    with flagsaver.flagsaver():
        export.FLAGS(["export", *arguments])
        print("code", export.main(["export"]))
"""


def export_all(*commands: list[str]) -> subprocess.CompletedProcess:
    """Runs examples/export.py with each list of flags."""
    command = [sys.executable, "-c", DRIVER, str(EXAMPLES), json.dumps(commands)]
    return subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """An artifact of each kind, by name."""
    root = tmp_path_factory.mktemp("kinds")
    done = export_all(*([f"--what={kind}", f"--out={root / kind}", *flags] for kind, flags in KINDS.items()))
    assert done.stdout.count("code 0") == len(KINDS), done.stderr
    return {kind: root / kind for kind in KINDS}


@pytest.mark.skipif(not MORE, reason="a long case")
def test_every_kind_runs_without_tensorflow_and_agrees(kinds):
    done = run(*kinds.values())
    assert done.returncode == 0, done.stderr + done.stdout
    shown = [line.split(":")[0] for line in done.stdout.splitlines()[1:]]
    assert shown == list(KINDS) and all("largest error" in line for line in done.stdout.splitlines()[1:])


@pytest.mark.skipif(not MORE, reason="a long case")
def test_artifacts_say_what_they_are(kinds):
    manifests = {kind: json.loads((path / "manifest.json").read_text()) for kind, path in kinds.items()}
    d = 32  # the tiny model's hidden size
    assert manifests["gemm"]["flops"] == 2 * 16 * d * d and manifests["gemm"]["details"]["product"] == [16, d, d]
    assert manifests["linear"]["flops"] == 3 * 2 * 130 * 140 * 60
    names = [leaf["name"] for leaf in manifests["train_step"]["outputs"]]
    assert "0.step" in names and "1.loss" in names and manifests["train_step"]["details"]["fp8"] == "none"
    texts = {kind: jax.export.deserialize(bytearray((kinds[kind] / "function.stablehlo").read_bytes())) for kind in KINDS}
    float8 = {kind for kind, exported in texts.items() if re.search("stablehlo.dot.*f8E4M3FN>, ", exported.mlir_module())}
    assert float8 == {"gemm", "linear", "experts"}, "the products with --operands=float8"


def test_wrong_flags_are_one_line(tmp_path):
    out = f"--out={tmp_path / 'x'}"
    cases = {
        "--what is not given": [out], "--out is not given": ["--what=gemm"],
        "--fp8 wants another --what": ["--what=decode", "--fp8=paper", out],
        "--fp8=delayed wants --what=train_step": ["--what=moe", "--fp8=delayed", out],
        "--platforms has ['abacus']": ["--what=gemm", "--platforms=abacus", out],
        "--experts is 1, want at least 2": ["--what=moe", "--experts=1", out],
    }  # fmt: skip
    done = export_all(*cases.values())
    assert done.stdout.count("code 2") == len(cases), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("export: ")]
    for message, line in zip(cases, lines, strict=True):
        assert line.startswith(f"export: {message}"), line


BROKEN = {
    "no artifact": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json, want a directory"),
    "no JSON": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is no JSON"),
    "another format": (lambda path: edit(path, format=99), "has another format than 1"),
    "another platform": (lambda path: edit(path, platforms=["cuda"]), "is for cuda, but JAX runs on cpu here"),
    "no program": (lambda path: (path / "function.stablehlo").unlink(), "has no function.stablehlo"),
    "damaged program": (lambda path: (path / "function.stablehlo").write_bytes(b"x" * 99), "stablehlo cannot be read"),
    "no inputs": (lambda path: (path / "inputs.npz").unlink(), "inputs.npz is not there"),
    "damaged inputs": (lambda path: (path / "inputs.npz").write_bytes(b"PK"), "inputs.npz is damaged"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_artifact_is_one_line(copy, how, capsys):
    damage, message = BROKEN[how]
    damage(copy)
    assert run_artifact.main([str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_artifact: ") and message in error and error.count("\n") == 1, error


# As XLA prints for a GPU: operands by name or with their types, a library's call with and without FP8, a Triton fusion.
HLO = """HloModule m
%fused (p0: bf16[4,4], p1: bf16[4,4]) -> f32[4,4] {
  %p0 = bf16[4,4]{1,0} parameter(0)
  %p1 = bf16[4,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (a: f8e4m3fn[16,32], b: f8e4m3fn[32,16]) -> f32[16,16] {
  %p0 = f8e4m3fn[16,32]{1,0} parameter(0)
  %b.2 = f8e5m2[32,16]{1,0} parameter(1)
  %s = f32[] constant(1)
  %cublas = (f32[16,16]{1,0}, s8[33554432]{0}) custom-call(%p0, %b.2, %s, %s), custom_call_target="__cublas$lt$matmul$f8"
  %typed = f32[4,4]{1,0} custom-call(f32[4,4]{1,0} %x, f32[4,4]{1,0} %y), custom_call_target="__cublas$gemm"
  %other = f32[4,4]{1,0} custom-call(%x), custom_call_target="topk"
  ROOT %z = f32[4,4]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused, backend_config={"kind":"__triton_gemm"}
}
"""


def test_products_are_counted_by_operands():
    assert dict(run_artifact.count_products(HLO)) == {
        "bf16 x bf16 by dot": 1, "f8e4m3fn x f8e5m2 by __cublas$lt$matmul$f8": 1, "f32 x f32 by __cublas$gemm": 1,
    }  # fmt: skip
    assert run_artifact.products_line(HLO).startswith("products with float8 operands: 1 of 3 (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"platforms": []}, "export_function: `platforms` is empty"),
        ({"inputs": []}, "export_function: `inputs` has no tensor"),
        ({"fn": lambda x: ()}, "export_function: `fn` returns no tensor"),
        ({"reference": lambda x: (x, x)}, "export_function: `reference` returns other leaves than `fn`"),
        ({"directory": "/dev/null/x"}, "export_function: cannot write to /dev/null/x"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, change, message):
    given = {"fn": lambda x: x, "inputs": [tf.ones([2])], "directory": tmp_path / "x", "platforms": ["cpu"]} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        export_function(**given)
    assert not (tmp_path / "x").exists()
