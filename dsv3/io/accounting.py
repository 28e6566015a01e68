"""What a checkpoint must hold and what it holds: every difference is found from the headers alone, before any reading."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.io.names import LAYER, Piece
from dsv3.io.problems import Problems
from dsv3.io.safetensors_files import Directory
from dsv3.ops.fp8 import WEIGHT_BLOCK

PLAIN_DTYPES = ("F32", "BF16", "F16")
SCALE_DTYPES = ("F32", "F8_E8M0")
DERIVED = "rotary_emb.inv_freq"  # buffers of older checkpoints that follow from the config
WAY_OUT = "to load the model without MTP modules, set `num_nextn_predict_layers` to 0 in config.json"


def account(pieces: Sequence[Piece], directory: Directory, block: tuple[int, int], problems: Problems) -> None:
    """Notes every tensor that is missing, unexpected, misshapen or of a wrong dtype, and FP8 tensors without scales."""
    known = set()
    for piece in pieces:
        known.add(piece.name)
        stored = directory.tensors.get(piece.name)
        if stored is None:
            if not piece.copy and piece.name not in directory.unreadable:
                problems.add("missing", f"{piece.name} {piece.shape}")
            known.add(piece.scale_name)
            continue
        if stored.shape != piece.shape:
            problems.add("misshapen", f"{piece.name} has shape {stored.shape}, want {piece.shape}")
        if stored.dtype == "F8_E4M3" and len(piece.shape) == 2:
            known.add(piece.scale_name)
            _account_scales(piece, directory, block, problems)
        elif stored.dtype not in PLAIN_DTYPES:
            more = " or F8_E4M3" if len(piece.shape) == 2 else ""
            problems.add("wrong dtype", f"{piece.name} is {stored.dtype}, want {', '.join(PLAIN_DTYPES)}{more}")
    for name, stored in directory.tensors.items():
        if name not in known and not name.endswith(DERIVED) and 0 not in stored.shape:
            problems.add("unexpected", f"{name} {stored.dtype} {stored.shape}")


def _account_scales(piece: Piece, directory: Directory, block: tuple[int, int], problems: Problems) -> None:
    name, want = piece.scale_name, piece.scale_shape(block)
    scale = directory.tensors.get(name)
    if scale is None:
        if name not in directory.unreadable:
            problems.add("without scales", f"{piece.name} is F8_E4M3, but there is no {name} {want}")
    elif scale.dtype not in SCALE_DTYPES:
        problems.add("wrong dtype", f"{name} is {scale.dtype}, want {' or '.join(SCALE_DTYPES)}")
    elif scale.shape != want:
        problems.add("misshapen", f"{name} has shape {scale.shape}, want {want} for blocks of {block[0]}×{block[1]}")


def settle_mtp(
    cfg: ModelConfig, hf: Mapping[str, Any], directory: Directory, problems: Problems
) -> tuple[ModelConfig, Directory]:
    """Decides about multi-token prediction where config and tensors disagree about all of it.

    - The config claims modules and none is stored: an error that says the way out. In what transformers 5 has written a
      warning is enough, since it leaves them out and yet claims them: the model then has none.
    - The config says 0 in so many words, and some are stored: they are left out, with a warning.

    Returns:
      The configuration of what is to be loaded, and the tensors that count.
    """
    layers = map(_layer, [*directory.tensors, *directory.unreadable])
    stored = sorted({layer for layer in layers if layer >= cfg.num_layers})
    if cfg.num_mtp_layers and not stored:
        claim = f"config.json claims {cfg.num_mtp_layers} MTP module(s) (`num_nextn_predict_layers`)"
        if _written_by_transformers_5(hf):
            warnings.warn(f"load_pretrained: {claim}, but transformers saved none: loaded without", stacklevel=3)
        else:
            problems.add("missing", f"model.layers.{cfg.num_layers} and above: {claim}; {WAY_OUT}")
        return cfg.replace(num_mtp_layers=0), directory
    if stored and hf.get("num_nextn_predict_layers") == 0:
        warnings.warn(f"load_pretrained: left out stored layers {stored}: the config says no MTP modules", stacklevel=3)
        kept = {name: value for name, value in directory.tensors.items() if _layer(name) < cfg.num_layers}
        return cfg, directory._replace(tensors=kept)
    return cfg, directory


def _layer(name: str) -> int:
    match = LAYER.match(name)
    return int(match[1]) if match else -1


def _written_by_transformers_5(hf: Mapping[str, Any]) -> bool:
    major = str(hf.get("transformers_version", "")).partition(".")[0]
    return major.isdigit() and int(major) >= 5


def fp8_block(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Returns rows and columns of an FP8 block from the `quantization_config` of a config.json; 128×128 without one.

    Raises:
      ValueError: another method than block FP8.
    """
    quantization = hf.get("quantization_config")
    if quantization is None:
        return WEIGHT_BLOCK
    check(
        isinstance(quantization, Mapping), f"load_pretrained: `quantization_config` is {quantization!r}, want an object"
    )
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size", WEIGHT_BLOCK)
    check(method == "fp8", f"load_pretrained: `quantization_config.quant_method` is {method!r}, want 'fp8'")
    check(
        isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block),
        f"load_pretrained: `quantization_config.weight_block_size` is {block!r}, want [rows, columns]",
    )
    return tuple(block)
