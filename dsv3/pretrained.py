"""Checkpoint directories of the DeepSeek-V3 family: opened as parameters, and saved for transformers and others to open."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Sequence

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_choice, check_same_tree
from dsv3.config import ModelConfig
from dsv3.config_hf import read_json
from dsv3.io.accounting import account, fp8_block, settle_mtp
from dsv3.io.names import FORMS, Piece, checkpoint_pieces
from dsv3.io.problems import Problems
from dsv3.io.reader import read_leaves
from dsv3.io.safetensors_files import open_directory
from dsv3.io.writer import write_checkpoint
from dsv3.nn.model import ModelParams, RouterState, model_specs
from dsv3.nn.quantized import matrix_of, params_dict, scale_shape
from dsv3.ops.fp8 import WEIGHT_BLOCK
from dsv3.ops.quantized import QuantizedWeight
from dsv3.spec import ParamSpec

MAX_SHARD_BYTES = 5_000_000_000
QUANTIZED = {"float8": "fp8", "int8": "int8"}  # dtype of `load_pretrained` → kind of a QuantizedWeight


def load_pretrained(
    directory: str | os.PathLike[str], *, dtype: tf.DType | str = tf.bfloat16
) -> tuple[ModelConfig, ModelParams, RouterState]:
    """Opens a checkpoint directory: `config.json` and safetensors, one file or several with an index.

    Tensors may be F32, BF16, F16, or FP8 E4M3 with `weight_scale_inv`, in any mixture. Everything that is missing,
    unexpected, misshapen, cut off or of a wrong dtype is found before anything is allocated, and reported as one error.
    Memory: the parameters, plus some rows of one tensor (about 50 MB).

    With `"float8"` and `"int8"` the matrices that the published checkpoint has in FP8 become `QuantizedWeight`s, as of
    `quantize_params`. For `"float8"` FP8 tensors are taken bit by bit, values and scales; others are quantised strip by
    strip, so that a full-precision matrix never exists.

    The repeated embedding and head of MTP modules, and a head beside tied embeddings, may be absent; where one differs from
    what it repeats there is a warning. MTP modules that are stored though the config says 0 are left out with a warning. A
    config.json of transformers 5 claims modules, but transformers saves none: a warning, and `cfg.num_mtp_layers` is 0.

    Args:
      directory: the directory.
      dtype: of the parameters, float32 or bfloat16, or `"float8"` or `"int8"` for matrices and bfloat16 for the rest. The
        router's selection biases are float32 in any case.

    Returns:
      (cfg, params, router), on the CPU.

    Raises:
      FileNotFoundError: no directory, no config.json, no weights.
      ValueError: a bad config or index, or a checkpoint that does not hold the model of its config; all faults in one error.
        `"float8"` for a checkpoint whose blocks are not 128×128.
    """
    name = _dtype_name("load_pretrained", dtype, ("float32", "bfloat16", "float8", "int8"))
    problems, (cfg, stored, pieces, block) = _open("load_pretrained", directory, name)
    specs = model_specs(cfg)
    leaves = {path: _leaf_spec(path, spec, name) for path, spec in tree.items(specs)}
    leaves |= {path: tf.TensorSpec(shape, tf.float32) for path, shape in _router_shapes(cfg).items()}
    read = read_leaves(leaves, pieces, stored.tensors, block=block, problems=problems)
    router = RouterState(*(read.pop(path) for path in _router_shapes(cfg)))
    return cfg, tree.graft(specs, read), router


def pretrained_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration with which `load_pretrained` opens a directory, and refuses what that would, values apart.

    Only config.json and the heads of the files are read, so that a program can look at a checkpoint before any long work.

    Args:
      directory: see `load_pretrained`.

    Raises:
      FileNotFoundError, ValueError: as of `load_pretrained`.
    """
    return _open("pretrained_config", directory)[1][0]


def _open(function: str, directory: str | os.PathLike[str], dtype: str = "float32"):
    """Opens a directory and accounts for all its tensors: problems, and (cfg, stored, pieces, block)."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{function}: there is no directory {directory}")
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{function}: {directory} holds no config.json")
    hf = read_json(directory)
    cfg, block = ModelConfig.from_hf(hf), fp8_block(hf)
    check(
        dtype != "float8" or block == WEIGHT_BLOCK,
        f"{function}: `dtype` is 'float8', want 'bfloat16', 'float32' or 'int8' for FP8 in blocks of {block}",
    )
    problems = Problems(function, directory)
    stored = open_directory(directory, problems)
    cfg, stored = settle_mtp(cfg, hf, stored, problems)
    pieces = checkpoint_pieces(model_specs(cfg), cfg)
    account(pieces, stored, block, problems)
    problems.raise_if_any()
    return problems, (cfg, stored, pieces, block)


def _leaf_spec(path: str, spec: ParamSpec, name: str) -> tf.TensorSpec | QuantizedWeight:
    """How a parameter is held that is loaded as `name`."""
    kind, of = QUANTIZED.get(name), matrix_of(path)
    if kind is None or of is None:
        return tf.TensorSpec(spec.shape, spec.dtype or ("bfloat16" if kind else name))
    values = tf.TensorSpec(spec.shape, "uint8" if kind == "fp8" else "int8")
    return QuantizedWeight(values, tf.TensorSpec(scale_shape(spec.shape, of, kind), "float32"))


def save_pretrained(
    directory: str | os.PathLike[str],
    cfg: ModelConfig,
    params: ModelParams,
    router: RouterState,
    *,
    dtype: tf.DType | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Saves a model as a directory that transformers opens, MTP modules included.

    The directory appears, or replaces an old one, as one step: a process that dies at any moment leaves the old one whole.
    MTP modules lie where the published checkpoint has them, behind the last layer; transformers reports them as unexpected
    keys, leaves them out, and reads them with its `MtpModel` if the model has 61 layers.

    Args:
      directory: where to. An old one must hold nothing but a checkpoint and what `extra_files` names.
      cfg, params, router: the model; float32 or bfloat16 parameters, or quantised matrices. Those in FP8 are stored as
        `"float8"` to the bit as they are; otherwise they are decoded.
      dtype: stored dtype, `"bfloat16"`, `"float32"` or `"float8"` (FP8 E4M3 in blocks of 128×128 with float32 scales for
        the tensors that the published checkpoint has so, bfloat16 for the others); `None`: float8 if matrices are in FP8,
        else float32 if any parameter is that, else bfloat16. Selection biases are float32 in any case.
      max_shard_bytes: tensor bytes in one file; more files get an index.
      extra_files: paths of files to put beside, such as tokenizer.json, or names of files in the old directory to keep.

    Raises:
      ValueError: parameters that are not `cfg`'s, values that are not finite, a place that cannot be written to, lacks the
        space or holds other files.
      FileNotFoundError: an extra file is not there.
    """
    specs = tree.to_dict(model_specs(cfg))
    leaves = params_dict(params)
    check_same_tree("save_pretrained", "params", leaves, specs)
    check(isinstance(router, RouterState), f"save_pretrained: `router` is a {type(router).__name__}, want RouterState")
    leaves |= {f"router.{field}": leaf for field, leaf in router._asdict().items()}
    wanted = {path: tuple(spec.shape) for path, spec in specs.items()} | _router_shapes(cfg)
    for path, want in wanted.items():
        leaf = leaves[path]
        if isinstance(leaf, QuantizedWeight):
            _check_quantized(path, leaf, want)
            continue
        got, kind = tuple(leaf.shape), tf.as_dtype(leaf.dtype).name
        check(got == want, f"save_pretrained: `{path}` has shape {got}, want {want}")
        check(kind in ("float32", "bfloat16"), f"save_pretrained: `{path}` has dtype {kind}, want float32 or bfloat16")
    check(
        isinstance(max_shard_bytes, int) and max_shard_bytes > 0,
        f"save_pretrained: `max_shard_bytes` is {max_shard_bytes!r}, want a positive integer",
    )
    if dtype is None:
        dtype = _default_dtype([leaves[path] for path in specs])
    name = _dtype_name("save_pretrained", dtype, FORMS)
    config = cfg.to_hf() | {"torch_dtype": "float32" if name == "float32" else "bfloat16"}
    if name == "float8":
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(WEIGHT_BLOCK),
        }  # fmt: skip
    pieces = checkpoint_pieces(model_specs(cfg), cfg)
    if name == "float8":
        _warn_of_misreading(pieces)
    write_checkpoint(
        directory, config, pieces, leaves, dtype=name, max_shard_bytes=max_shard_bytes, extra_files=extra_files
    )


def _check_quantized(path: str, leaf: QuantizedWeight, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` unless a quantised matrix is that of its parameter."""
    of, got, kind = matrix_of(path), tuple(leaf.shape), tf.as_dtype(leaf.values.dtype).name
    check(of is not None, f"save_pretrained: `{path}` is quantised, want float32 or bfloat16")
    check(got == shape, f"save_pretrained: `{path}` has shape {got}, want {shape}")
    check(kind in ("uint8", "int8"), f"save_pretrained: `{path}` has values of dtype {kind}, want uint8 or int8")
    got, want = tuple(leaf.scale_inv.shape), scale_shape(shape, of, leaf.kind)
    check(got == want, f"save_pretrained: `{path}` has scales of shape {got}, want {want}")


def _default_dtype(leaves: Sequence[tf.Tensor | QuantizedWeight]) -> str:
    kinds = {leaf.kind for leaf in leaves if isinstance(leaf, QuantizedWeight)}
    if kinds:
        return "float8" if "fp8" in kinds else "bfloat16"
    return "float32" if any(tf.as_dtype(leaf.dtype) == tf.float32 for leaf in leaves) else "bfloat16"


def _dtype_name(function: str, dtype: tf.DType | str, allowed: tuple[str, ...]) -> str:
    name = dtype if isinstance(dtype, str) else tf.as_dtype(dtype).name
    name = "float8" if name == "float8_e4m3fn" else name
    check_choice(function, "dtype", name, allowed)
    return name


def _warn_of_misreading(pieces: Sequence[Piece]) -> None:
    """Dequantising on a CPU, transformers 5 takes a tensor's size divided by its number of scales for the block's size."""

    def misread(size: int, scales: int, block: int) -> bool:
        return size % scales == 0 and scales > 1 and size != scales * block

    found = [p.name for p in pieces if p.fp8 and any(map(misread, p.shape, p.scale_shape(WEIGHT_BLOCK), WEIGHT_BLOCK))]
    if found:
        warnings.warn(
            f"save_pretrained: on a CPU transformers 5 misreads {len(found)} FP8 tensors of sizes that are no multiples "
            f"of 128, such as {found[0]}; for it, save in bfloat16",
            stacklevel=3,
        )


def _router_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Path → shape of the selection biases, in the order of `RouterState`."""
    experts = cfg.moe.router.num_experts
    return {"router.moe": (cfg.num_moe_layers, experts), "router.mtp": (cfg.num_mtp_layers, experts)}
