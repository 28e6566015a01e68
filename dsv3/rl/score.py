"""The pass that only looks: log-probabilities of samples under any parameters, and how far two passes are apart."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.nn.model import ModelParams, RouterState
from dsv3.policy import ComputePolicy, default_policy
from dsv3.rl.logprobs import TokenLogprobs, token_logprobs
from dsv3.rl.step import trimmed_lengths

Score = Callable[..., TokenLogprobs]
"""`score(params, router, tokens, mask=None, experts=None)`, as of `make_score`."""


def make_score(cfg: ModelConfig, *, temperature: float = 1.0, rows: int = 8, policy: ComputePolicy | None = None) -> Score:
    """Compiles the pass that only looks: log-probabilities of samples under any parameters, without a gradient.

    Args:
      cfg: the model's configuration.
      temperature: that the samples were drawn at.
      rows: samples that are computed at a time, about as long as each other: columns that are padding in all of them are
        not, and are 0 in what is returned.
      policy: how to compute; default: the device's.

    Returns:
      `score(params, router, tokens, mask=None, experts=None) -> TokenLogprobs` of NumPy arrays; tokens `[N, T+1]`, for any
      N, mask `[N, T]`, experts `[X, N, T, K]` to use instead of choosing. `balance` is the mean over passes.
    """
    check(rows > 0, f"make_score: `rows` is {rows}, want > 0")
    policy = policy or default_policy()

    def run(params, router, tokens, mask, experts):
        experts = None if isinstance(experts, tuple) else experts
        return token_logprobs(
            params, router, tokens, mask, cfg=cfg, temperature=temperature, experts=experts, policy=policy
        )

    @functools.cache
    def compiled(length: int, replayed: bool):  # a function for each, as TensorFlow warns of one with many shapes
        return tf.function(run, jit_compile=policy.jit, autograph=False)

    def score(
        params: ModelParams, router: RouterState, tokens: np.ndarray, mask: np.ndarray | None = None,
        experts: np.ndarray | None = None,
    ) -> TokenLogprobs:  # fmt: skip
        params, router = (tree.map_leaves(tf.convert_to_tensor, part) for part in (params, router))
        mask = np.ones([tokens.shape[0], tokens.shape[1] - 1], np.float32) if mask is None else mask
        ends = np.where(mask > 0, np.arange(mask.shape[1]), -1).max(-1)
        order = np.argsort(ends, kind="stable")  # rows that are about as long as each other go together
        parts = []
        for at in range(0, len(tokens), rows):
            here = order[at : at + rows]
            size = next(size for size in trimmed_lengths(mask.shape[1]) if size > ends[here[-1]])
            spare = rows - len(here)

            def filled(x: np.ndarray, dim: int, spare: int = spare) -> tf.Tensor:
                return tf.constant(np.pad(x, [[0, spare if i == dim else 0] for i in range(x.ndim)]))

            chosen = () if experts is None else filled(experts[:, here, :size], 1)
            given = filled(tokens[here, : size + 1], 0), filled(mask[here, :size], 0), chosen
            found = compiled(size, experts is not None)(params, router, *given)
            parts.append((len(here), tree.map_leaves(lambda x: x.numpy(), found)))
        return _joined(parts, np.argsort(order), mask.shape[1])

    return score


def _joined(parts: list[tuple[int, TokenLogprobs]], order: np.ndarray, length: int) -> TokenLogprobs:
    """The samples of several passes in their order and at one length; loads are added up."""
    found = [part for _, part in parts]

    def rows(name: str, dim: int = 0) -> np.ndarray:
        cut = [np.take(getattr(part, name), range(n), dim) for n, part in parts]
        wide = [np.pad(x, [[0, length - x.shape[i] if i == dim + 1 else 0] for i in range(x.ndim)]) for x in cut]
        return np.take(np.concatenate(wide, dim), order, dim)

    return TokenLogprobs(
        rows("logprobs"), rows("entropy"), rows("experts", 1), np.mean([part.balance for part in found]), found[0].mtp,
        tree.map_leaves(lambda *loads: sum(loads), *(part.load for part in found)),
    )  # fmt: skip


def mismatch_numbers(logprobs: np.ndarray, sampled: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Returns how far log-probabilities of training are from those of the sampling pass, over the tokens of a mask.

    `mean` and `max` of `|log π_train − log π_sampled|`, and `kl`, the divergence from the sampling policy by k3.

    Args:
      logprobs, sampled, mask: `[N, T]`.

    >>> mismatch_numbers(np.array([[-1.0, -2.0]]), np.array([[-1.5, 0.0]]), np.array([[1, 0]]))["max"]
    0.5
    """
    apart = (logprobs - sampled)[mask > 0].astype(np.float64)
    if not apart.size:
        return {"mean": 0.0, "max": 0.0, "kl": 0.0}
    kl = np.mean(np.expm1(apart) - apart)
    return {"mean": float(np.abs(apart).mean()), "max": float(np.abs(apart).max()), "kl": float(kl)}


def router_agreement(chosen: np.ndarray, sampled: np.ndarray, mask: np.ndarray) -> float:
    """Returns the share of the sampling pass's experts that another pass has chosen, too: 1 if none differs.

    Args:
      chosen, sampled: `[X, N, T, K]`, experts of both passes.
      mask: `[N, T]`, positions that count.

    >>> router_agreement(np.array([[[[0, 1]]]]), np.array([[[[1, 2]]]]), np.array([[1]]))
    0.5
    """
    same = (chosen[..., None, :] == sampled[..., :, None]).any(-1)[:, mask > 0]
    return float(same.mean()) if same.size else 1.0
