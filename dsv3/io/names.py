"""From a tree of `ParamSpec`s to the tensors of a checkpoint: their names, shapes, dtypes, and where each one's values lie.

A checkpoint has one tensor for each layer and expert, `[out, in]` as torch's linear layers are; the parameters are stacked
over layers and experts and lie `[in, out]`. MTP module k is stored as layer `num_layers + k`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dsv3 import tree
from dsv3.checks import check, check_choice
from dsv3.config import ModelConfig
from dsv3.ops.fp8 import WEIGHT_BLOCK
from dsv3.typing import Tree

FORMS = ("bfloat16", "float32", "float8")
ROUTER_PATHS = ("router.moe", "router.mtp")  # the leaves of RouterState beside those of ModelParams
SCALE_SUFFIX = "_scale_inv"
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint and the part of a leaf that it holds.

    Attributes:
      name: e.g. `"model.layers.3.mlp.experts.7.up_proj.weight"`.
      shape: in the checkpoint, `[out, in]` for a matrix.
      leaf: path of the leaf.
      index: its leading indices: layer, or layer and expert.
      inputs: how many of the dims that follow are inputs; 0 for what is stored as it lies (norms, biases, embedding).
      columns: the outputs that belong to this tensor, `(first, end)`: gate or up. `None` for all.
      fp8: whether the published checkpoint stores it in FP8.
      state: whether it is a selection bias, always float32.
      copy: whether it repeats another tensor of the leaf. A copy may be absent, and only some are written.
      written: whether a saved checkpoint has it.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    index: tuple[int, ...] = ()
    inputs: int = 0
    columns: tuple[int, int] | None = None
    fp8: bool = False
    state: bool = False
    copy: bool = False
    written: bool = True

    @property
    def scale_name(self) -> str:
        """The name of the scales that go with an FP8 tensor."""
        return self.name + SCALE_SUFFIX

    def scale_shape(self, block: tuple[int, int]) -> tuple[int, int]:
        """The shape of these scales, `[⌈out/m⌉, ⌈in/n⌉]`."""
        return -(-self.shape[0] // block[0]), -(-self.shape[1] // block[1])


class Expected(NamedTuple):
    """Shape and stored dtype (`"F32"`, `"BF16"`, `"F8_E4M3"`) of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: str


class _Rule(NamedTuple):
    """How a leaf is stored: name with {part} and {expert}, number of input dims, whether FP8 comes into question."""

    name: str
    inputs: int = 0
    fp8: bool = False


_ATTENTION = {
    "attn_norm": _Rule("input_layernorm.weight"),
    "ffn_norm": _Rule("post_attention_layernorm.weight"),
    "mla.q_a": _Rule("self_attn.q_a_proj.weight", 1, True),
    "mla.q_norm": _Rule("self_attn.q_a_layernorm.weight"),
    "mla.q_b": _Rule("self_attn.{q_b}.weight", 1, True),
    "mla.kv_a": _Rule("self_attn.kv_a_proj_with_mqa.weight", 1, True),
    "mla.kv_norm": _Rule("self_attn.kv_a_layernorm.weight"),
    "mla.kv_b": _Rule("self_attn.kv_b_proj.weight", 1, True),
    "mla.o": _Rule("self_attn.o_proj.weight", 2, True),
    "mla.q_a_bias": _Rule("self_attn.q_a_proj.bias"),
    "mla.kv_a_bias": _Rule("self_attn.kv_a_proj_with_mqa.bias"),
    "mla.o_bias": _Rule("self_attn.o_proj.bias"),
}
_DENSE = {
    **_ATTENTION,
    "ffn.gate_up": _Rule("mlp.{part}_proj.weight", 1, True),
    "ffn.down": _Rule("mlp.down_proj.weight", 1, True),
}
_MOE = {
    **_ATTENTION,
    "ffn.router": _Rule("mlp.gate.weight", 1),
    "ffn.gate_up": _Rule("mlp.experts.{expert}.{part}_proj.weight", 1, True),
    "ffn.down": _Rule("mlp.experts.{expert}.down_proj.weight", 1, True),
    "ffn.shared.gate_up": _Rule("mlp.shared_experts.{part}_proj.weight", 1, True),
    "ffn.shared.down": _Rule("mlp.shared_experts.down_proj.weight", 1, True),
}
_MTP = {
    "embed_norm": _Rule("enorm.weight"),
    "hidden_norm": _Rule("hnorm.weight"),
    "proj": _Rule("eh_proj.weight", 1),
    **{f"block.{path}": rule for path, rule in _MOE.items()},
    "norm": _Rule("shared_head.norm.weight"),
}
_STACKS = {"dense": _DENSE, "moe": _MOE, "mtp": _MTP}
_TOP = {
    "embed": _Rule("model.embed_tokens.weight"),
    "norm": _Rule("model.norm.weight"),
    "head": _Rule("lm_head.weight", 1),
}


def checkpoint_pieces(specs: Tree, cfg: ModelConfig) -> list[Piece]:
    """Returns every tensor of a checkpoint, without scales, in the order of layers; allocates nothing.

    Args:
      specs: the tree of `model_specs(cfg)`.
      cfg: the configuration.

    Raises:
      ValueError: a leaf of `specs` that has no name in a checkpoint.
    """
    first = {"dense": 0, "moe": cfg.num_dense_layers, "mtp": cfg.num_layers}
    found: list[tuple[int, Piece]] = []  # (layer, piece); a layer's pieces stay together
    for path, spec in tree.items(specs):
        stack, _, rest = path.partition(".")
        rules = _STACKS.get(stack)
        rule = _TOP.get(path) if rules is None else rules.get(rest)
        check(rule is not None, f"checkpoint_pieces: parameter `{path}` has no name in a checkpoint")
        if rules is None:
            layer = -1 if path == "embed" else cfg.num_layers + cfg.num_mtp_layers
            found.append((layer, _piece(path, spec.shape, rule, rule.name, ())))
            continue
        q_b = "q_proj" if cfg.mla.q_latent is None else "q_b_proj"
        for i in range(spec.shape[0]):
            layer = first[stack] + i
            name = f"model.layers.{layer}.{rule.name.replace('{q_b}', q_b)}"
            found += [(layer, piece) for piece in _layer_pieces(path, spec.shape, rule, name, i)]
    found += _router_pieces(cfg) + _copies(specs, cfg)
    return [piece for _, piece in sorted(found, key=lambda pair: pair[0])]


def expected_tensors(specs: Tree, cfg: ModelConfig, dtype: str = "bfloat16") -> dict[str, Expected]:
    """Returns the tensors of a saved checkpoint by name, scales included.

    Args:
      specs: the tree of `model_specs(cfg)`.
      cfg: the configuration.
      dtype: `"bfloat16"`, `"float32"` or `"float8"` (in blocks of 128×128, the rest in bfloat16, as published).
    """
    check_choice("expected_tensors", "dtype", dtype, FORMS)
    expected = {}
    for piece in checkpoint_pieces(specs, cfg):
        if piece.written:
            stored = stored_dtype(piece, dtype)
            expected[piece.name] = Expected(piece.shape, stored)
            if stored == "F8_E4M3":
                expected[piece.scale_name] = Expected(piece.scale_shape(WEIGHT_BLOCK), "F32")
    return expected


def stored_dtype(piece: Piece, dtype: str) -> str:
    """Returns the dtype in which a checkpoint of the form `dtype` stores a tensor."""
    if piece.state or dtype == "float32":
        return "F32"
    return "F8_E4M3" if dtype == "float8" and piece.fp8 else "BF16"


def _layer_pieces(path: str, shape: tuple[int, ...], rule: _Rule, name: str, layer: int) -> Iterator[Piece]:
    """The tensors of one layer of a stacked leaf: one for each expert, and for gate and up."""
    experts = range(shape[1]) if "{expert}" in name else (None,)
    parts = ("gate", "up") if "{part}" in name else (None,)
    half = shape[-1] // 2
    for expert, part in itertools.product(experts, parts):
        index = (layer,) if expert is None else (layer, expert)
        columns = None if part is None else (0, half) if part == "gate" else (half, 2 * half)
        yield _piece(path, shape[len(index) :], rule, name.format(expert=expert, part=part), index, columns)


def _piece(path, shape, rule, name, index, columns=None) -> Piece:
    """`shape`: what is left of the leaf's after `index`."""
    if rule.inputs:
        outputs = math.prod(shape[rule.inputs :]) if columns is None else columns[1] - columns[0]
        shape = (outputs, math.prod(shape[: rule.inputs]))
    return Piece(name, tuple(shape), path, index, rule.inputs, columns, rule.fp8)


def _router_pieces(cfg: ModelConfig) -> list[tuple[int, Piece]]:
    """The selection biases, which are state and have no spec."""
    first = {"router.moe": (cfg.num_dense_layers, cfg.num_moe_layers), "router.mtp": (cfg.num_layers, cfg.num_mtp_layers)}
    return [
        (start + i, Piece(f"model.layers.{start + i}.mlp.gate.e_score_correction_bias",
                          (cfg.moe.router.num_experts,), path, (i,), state=True))
        for path, (start, count) in first.items() for i in range(count)
    ]  # fmt: skip


def _copies(specs: Tree, cfg: ModelConfig) -> list[tuple[int, Piece]]:
    """The embedding and head that each MTP module repeats, and a head that repeats the embedding."""
    leaves = tree.to_dict(specs)
    embed = Piece("", tuple(leaves["embed"].shape), "embed", copy=True)
    head = embed if cfg.tie_embeddings else dataclasses.replace(embed, leaf="head", inputs=1)
    copies = [(cfg.num_layers + cfg.num_mtp_layers, "lm_head.weight", embed, False)] if cfg.tie_embeddings else []
    for layer in range(cfg.num_layers, cfg.num_layers + cfg.num_mtp_layers):
        copies.append((layer, f"model.layers.{layer}.embed_tokens.weight", embed, True))
        copies.append((layer, f"model.layers.{layer}.shared_head.head.weight", head, True))
    return [(at, dataclasses.replace(piece, name=name, written=written)) for at, name, piece, written in copies]
