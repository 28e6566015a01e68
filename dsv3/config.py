"""Frozen configurations: architecture only, no mesh, no paths, no kernels.

Every layer takes its own slice (`MLAConfig`, `MoEConfig`, ...); only the model and its MTP modules see `ModelConfig`.
Where the published references disagree the side is a named field, with the published checkpoint's behaviour as the
default.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from dsv3.checks import check, check_choice

LATENT_NORM_EPS = 1e-6  # the latents' RMSNorm keeps this epsilon whatever `rms_norm_eps` says (official code and HF)


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (paper section 4.3; arXiv:2309.00071).

    Attributes:
      factor: how many times longer the context becomes.
      original_length: the context of pretraining in tokens.
      beta_fast, beta_slow: rotations over the original context that bound the ramp between kept and stretched
        frequencies.
      mscale, mscale_all_dim: attention temperature; the softmax scale uses `mscale_all_dim`, cos and sin the ratio of
        the two. `None` as in HF's defaults: cos and sin are scaled by `0.1 ln(factor) + 1`.
      attention_factor: overrides the factor of cos and sin.
      apply: `"always"` (HF) or `"beyond_original"` (official code: only if the model's maximum length exceeds
        `original_length`).
    """

    factor: float
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = 1.0
    mscale_all_dim: float | None = 1.0
    attention_factor: float | None = None
    apply: str = "always"

    def __post_init__(self):
        check(self.factor > 0, f"YarnConfig: `factor` is {self.factor}, want a positive number")
        check(self.original_length > 0, f"YarnConfig: `original_length` is {self.original_length}, want > 0 tokens")
        check(self.beta_fast > self.beta_slow > 0, "YarnConfig: want `beta_fast` > `beta_slow` > 0")
        check_choice("YarnConfig", "apply", self.apply, ("always", "beyond_original"))


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions.

    Attributes:
      dim: the rotated width R, even.
      theta: base of the frequencies.
      max_length: the longest sequence in tokens (it decides `YarnConfig.apply == "beyond_original"`).
      pairs: how a pair lies in the weights: `"interleaved"` (x0,x1),(x2,x3).. as published, `"halves"` (x_i, x_{i+R/2}).
      output: order of the rotated values: `"interleaved"` (official) or `"halves"` (HF: evens, then odds). Scores are the
        same, a cached k_rope differs by this permutation.
      yarn: context extension or `None`.
    """

    dim: int
    theta: float = 10_000.0
    max_length: int = 4096
    pairs: str = "interleaved"
    output: str = "interleaved"
    yarn: YarnConfig | None = None

    def __post_init__(self):
        check(self.dim > 0 and self.dim % 2 == 0, f"RopeConfig: `dim` (qk_rope_head_dim) is {self.dim}, want even, > 0")
        check(self.theta > 1, f"RopeConfig: `theta` is {self.theta}, want > 1")
        check_choice("RopeConfig", "pairs", self.pairs, ("interleaved", "halves"))
        check_choice("RopeConfig", "output", self.output, ("interleaved", "halves"))

    @property
    def active_yarn(self) -> YarnConfig | None:
        """The YaRN settings that apply, after the rule of `YarnConfig.apply`."""
        y = self.yarn
        if y is None or (y.apply == "beyond_original" and self.max_length <= y.original_length):
            return None
        return y


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (paper section 2.1.1).

    Attributes:
      hidden_size: D.
      num_heads: H.
      q_latent: width Q of the query latent, or `None` for no query compression.
      kv_latent: width L of the key/value latent.
      nope_dim, rope_dim, v_dim: per-head widths P, R and U.
      rope: rotary settings, `rope.dim == rope_dim`.
      bias: whether q_a, kv_a and o have a bias (`attention_bias` in HF).
      norm_rounding: see `ModelConfig`.
    """

    hidden_size: int
    num_heads: int
    q_latent: int | None
    kv_latent: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope: RopeConfig
    bias: bool = False
    norm_rounding: str = "before_weight"

    def __post_init__(self):
        for name in ("hidden_size", "num_heads", "kv_latent", "nope_dim", "v_dim"):
            check(getattr(self, name) > 0, f"MLAConfig: `{name}` is {getattr(self, name)}, want > 0")
        check(self.q_latent is None or self.q_latent > 0, f"MLAConfig: `q_latent` is {self.q_latent}, want > 0 or None")
        check(
            self.rope.dim == self.rope_dim, f"MLAConfig: `rope.dim` is {self.rope.dim}, want rope_dim={self.rope_dim}"
        )

    @property
    def qk_dim(self) -> int:
        """Per-head width of queries and keys, P + R."""
        return self.nope_dim + self.rope_dim

    @property
    def cache_width(self) -> int:
        """Values that the cache holds for a token and layer, L + R."""
        return self.kv_latent + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """`(P + R)^-½`, times YaRN's `(0.1·mscale_all_dim·ln(factor) + 1)²` where that applies."""
        scale = self.qk_dim**-0.5
        y = self.rope.active_yarn
        if y is not None and y.mscale_all_dim and y.factor > 1:
            scale *= (0.1 * y.mscale_all_dim * math.log(y.factor) + 1.0) ** 2
        return scale


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Sigmoid router with groups and a selection bias (paper section 2.1.2).

    Attributes:
      num_experts: E. num_groups: G. groups_kept: groups a token may use. top_k: K.
      scale: factor of the weights after normalisation. normalize: whether the K weights are made to sum to one.
      group_mask: what the selection scores of left-out groups become: `"-inf"`, or `"zero"` (older HF: a left-out
        expert wins when the kept ones' biased scores are negative).
    """

    num_experts: int
    top_k: int
    num_groups: int = 1
    groups_kept: int = 1
    scale: float = 1.0
    normalize: bool = True
    group_mask: str = "-inf"

    def __post_init__(self):
        e, g, kept, k = self.num_experts, self.num_groups, self.groups_kept, self.top_k
        check(e > 0, f"RouterConfig: `num_experts` is {e}, want > 0")
        check(g > 0 and e % g == 0, f"RouterConfig: `num_experts` {e} is not divisible by `num_groups` {g}")
        check(1 <= kept <= g, f"RouterConfig: `groups_kept` is {kept}, want 1 to num_groups={g}")
        check(
            1 <= k <= kept * (e // g),
            f"RouterConfig: `top_k` is {k}, but the {kept} kept groups hold {kept * (e // g)} experts",
        )
        check(
            g == 1 or e // g >= 2,
            f"RouterConfig: a group's score is the sum of its two best experts, but {e} experts in {g} groups are one each",
        )
        check(self.scale > 0, f"RouterConfig: `scale` is {self.scale}, want > 0")
        check_choice("RouterConfig", "group_mask", self.group_mask, ("-inf", "zero"))


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: routed ones and `num_shared` shared ones of the same width.

    Attributes:
      hidden_size: D. intermediate_size: F of one expert. num_shared: shared experts, 0 or more. router: see there.
    """

    hidden_size: int
    intermediate_size: int
    num_shared: int
    router: RouterConfig

    def __post_init__(self):
        check(self.hidden_size > 0, f"MoEConfig: `hidden_size` is {self.hidden_size}, want > 0")
        check(self.intermediate_size > 0, f"MoEConfig: `intermediate_size` is {self.intermediate_size}, want > 0")
        check(self.num_shared >= 0, f"MoEConfig: `num_shared` is {self.num_shared}, want >= 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model of the DeepSeek-V3 family.

    Attributes:
      vocab_size: V. hidden_size: D. num_layers: all layers; the first `num_dense_layers` have a dense feed-forward of
        width `intermediate_size`, the others are mixtures of experts.
      mla, moe: the layers' configurations.
      num_mtp_layers: multi-token prediction modules (paper section 2.2).
      norm_eps: epsilon of the RMSNorms over D.
      norm_rounding: `"before_weight"` (HF: round to the input dtype, then multiply by the weight) or `"after_weight"`
        (official). They differ only below float32.
      tie_embeddings: whether the head is the embedding, transposed.
      max_length: the longest sequence in tokens.
      init_std: standard deviation of initial weights (paper: 0.006; HF's config: 0.02).
      mtp_hidden: the hidden state that MTP reads: `"normed"` (after the final norm, as the checkpoint was trained) or
        `"raw"`. mtp_concat: `"embedding_first"` (checkpoint) or `"hidden_first"` (the paper's Eq. 21).
      mtp_next: what a second module reads of the first: `"raw"`, its block's output (the paper's Eq. 22), or `"normed"`,
        that after `shared_head.norm` (transformers). No checkpoint with two modules is published.
      bos_id, eos_ids, pad_id: special tokens, carried for generation.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_dense_layers: int
    intermediate_size: int
    mla: MLAConfig
    moe: MoEConfig
    num_mtp_layers: int = 0
    norm_eps: float = 1e-6
    norm_rounding: str = "before_weight"
    tie_embeddings: bool = False
    max_length: int = 4096
    init_std: float = 0.02
    mtp_hidden: str = "normed"
    mtp_concat: str = "embedding_first"
    mtp_next: str = "raw"
    bos_id: int | None = 0
    eos_ids: tuple[int, ...] = (1,)
    pad_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "max_length"):
            check(getattr(self, name) > 0, f"ModelConfig: `{name}` is {getattr(self, name)}, want > 0")
        check(
            0 <= self.num_dense_layers <= self.num_layers,
            f"ModelConfig: `num_dense_layers` is {self.num_dense_layers}, want 0 to num_layers={self.num_layers}",
        )
        check(self.num_mtp_layers >= 0, f"ModelConfig: `num_mtp_layers` is {self.num_mtp_layers}, want >= 0")
        check(
            self.num_dense_layers == 0 or self.intermediate_size > 0,
            f"ModelConfig: `intermediate_size` is {self.intermediate_size}, want > 0",
        )
        for part in ("mla", "moe"):
            got = getattr(self, part).hidden_size
            check(got == self.hidden_size, f"ModelConfig: `{part}.hidden_size` is {got}, want {self.hidden_size}")
        check_choice("ModelConfig", "norm_rounding", self.norm_rounding, ("before_weight", "after_weight"))
        check(self.mla.norm_rounding == self.norm_rounding, "ModelConfig: `mla.norm_rounding` differs from the model's")
        got, want = self.mla.rope.max_length, self.max_length
        check(got == want, f"ModelConfig: `mla.rope.max_length` is {got}, want max_length={want}")
        check_choice("ModelConfig", "mtp_hidden", self.mtp_hidden, ("normed", "raw"))
        check_choice("ModelConfig", "mtp_concat", self.mtp_concat, ("embedding_first", "hidden_first"))
        check_choice("ModelConfig", "mtp_next", self.mtp_next, ("raw", "normed"))

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the trunk (MTP modules not counted)."""
        return self.num_layers - self.num_dense_layers

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> ModelConfig:
        """Reads a `deepseek_v3` configuration: a directory with `config.json`, that file, or its contents.

        Raises:
          ValueError: an unknown model type, a missing field, or values that contradict each other, by name.
          FileNotFoundError: no `config.json` there.
        """
        from dsv3 import config_hf

        return config_hf.from_hf(source)

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` that transformers and the published code read."""
        from dsv3 import config_hf

        return config_hf.to_hf(self)

    def replace(self, **fields: Any) -> ModelConfig:
        """Returns a copy with fields changed, by this class's names or by those of `config.json`.

        >>> import dsv3
        >>> dsv3.preset("tiny").replace(num_hidden_layers=3, n_routed_experts=16).num_layers
        3
        """
        from dsv3 import config_hf

        return config_hf.replace(self, fields)
