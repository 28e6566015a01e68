"""What transformers computes of a model: every quantity that the parity suite and the golden files compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from hf_model import Reference
from transformers.cache_utils import DynamicCache, MtpCache

from dsv3 import ModelConfig

MTP_WEIGHT = 0.3


class Observed(NamedTuple):
    """Computed from tokens t_0.. t_T, `[B, T+1]`, of which the model reads the first T.

    Attributes:
      logits: `[B, T, V]`. hidden: `[B, T, D]`, after the final norm.
      layers: `[layers, B, T, D]`, each block's output.
      entries: `[layers, B, T, L+R]`, what the cache keeps; the rotary part in transformers' order.
      experts: `[mixture layers, B, T, K]`, sorted, and mtp_experts: `[modules, B, T, K]`.
      margin: the smallest distance between a score that was chosen and one that was not.
      mtp_logits: `[modules, B, T, V]`; module k reads t_k.., the last token being repeated where there is none.
      mtp_normed_chain: the same where module k + 1 reads what module k's head reads, as transformers drafts.
      loss: mean cross-entropy of t_1.. t_{T−1} plus `MTP_WEIGHT` times the mean over modules of theirs.
      grads: the loss's gradient for every parameter, under the names of `hf_model`.
    """

    logits: np.ndarray
    hidden: np.ndarray
    layers: np.ndarray
    entries: np.ndarray
    experts: np.ndarray
    mtp_experts: np.ndarray
    margin: float
    mtp_logits: np.ndarray
    mtp_normed_chain: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]


def observe(cfg: ModelConfig, reference: Reference, tokens: np.ndarray) -> Observed:
    """Runs the model, its MTP modules and the backward pass on tokens `[B, T+1]`."""
    ids = torch.tensor(tokens)
    inputs, ahead = ids[:, :-1], ids[:, 1:]
    cache = DynamicCache(config=reference.model.config)
    reference.model.zero_grad()
    with _outputs(reference.model.model.layers) as layers, _outputs(reference.gates()) as gates:
        out = reference.model(
            inputs, labels=inputs, past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        hidden = out.hidden_states[-1]
        chained = mtp_hidden(reference, hidden, ahead, normed_chain=False)
    logits = [reference.model.lm_head(h) for h in chained]
    loss = out.loss
    if logits:
        loss = loss + MTP_WEIGHT * torch.stack([_shifted_loss(x, ids, k + 2) for k, x in enumerate(logits)]).mean()
    loss.backward()
    experts = [_sorted_experts(g, tokens) for g in gates]
    split = len(experts) - cfg.num_mtp_layers
    with torch.no_grad():
        drafted = [reference.model.lm_head(h) for h in mtp_hidden(reference, hidden, ahead, normed_chain=True)]
    return Observed(
        logits=_array(out.logits),
        hidden=_array(hidden),
        layers=np.stack([_array(x) for x in layers]),
        entries=np.stack([_array(torch.cat([layer.keys, layer.values], -1)[:, 0]) for layer in cache.layers]),
        experts=np.stack(experts[:split]) if split else np.zeros(0),
        mtp_experts=np.stack(experts[split:]) if cfg.num_mtp_layers else np.zeros(0),
        margin=min((router_margin(cfg, g[0], gate) for g, gate in zip(gates, reference.gates())), default=1.0),
        mtp_logits=_stack(logits),
        mtp_normed_chain=_stack(drafted),
        loss=float(loss.detach()),
        grads={name: _array(p.grad) for name, p in reference.named_parameters() if p.numel()},
    )


def mtp_hidden(
    reference: Reference, hidden: torch.Tensor, ahead: torch.Tensor, *, normed_chain: bool
) -> list[torch.Tensor]:
    """Runs transformers' MTP modules one by one and returns what the head reads, `[B, T, D]` each.

    Args:
      hidden: `[B, T, D]`, after the model's final norm, as transformers' generation passes it.
      ahead: `[B, T]`, t_1.. t_T.
      normed_chain: what module k + 1 reads of module k: its output after `shared_head.norm`, as transformers drafts, or
        before it, as the paper's equation 21 has it.
    """
    found = []
    for k, layer in enumerate(reference.mtp.layers if reference.mtp is not None else ()):
        ids = torch.cat([ahead[:, k:], ahead[:, -1:].expand(-1, k)], 1)
        # transformers gives module k the positions of the tokens that it reads.
        positions = torch.arange(ids.shape[1])[None] + k + 1
        with _outputs([layer.mtp_block]) as block:
            normed = reference.mtp.forward_layer(k, hidden, positions, None, input_ids=ids)
        found.append(normed)
        hidden = normed if normed_chain else block[0]
    return found


def draft(reference: Reference, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """transformers' own drafting: the tokens `[B, modules]` that its MTP model proposes after t_T, and their logits."""
    ids = torch.tensor(tokens)
    with torch.no_grad():
        hidden = reference.model(ids[:, :-1], output_hidden_states=-1).hidden_states[-1]
        positions = torch.arange(1, ids.shape[1])[None]
        cache = MtpCache(config=reference.model.config.get_mtp_config())
        drafted, logits, _ = reference.mtp(ids[:, 1:], hidden, None, positions, cache)
    return drafted.numpy(), _array(logits)


def decode(reference: Reference, tokens: np.ndarray, prefill: int) -> np.ndarray:
    """Logits `[B, T, V]` with a cache: `prefill` tokens at once, then one by one."""
    ids = torch.tensor(tokens)
    cache, found = DynamicCache(config=reference.model.config), []
    cuts = [0, *range(prefill, ids.shape[1] + 1)]
    with torch.no_grad():
        for start, stop in zip(cuts, cuts[1:]):
            found.append(reference.model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
    return _array(torch.cat(found, 1))


def padded(reference: Reference, tokens: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Logits `[B, T, V]` where row b has `lengths[b]` tokens, at its end, and is padded on the left."""
    mask = np.arange(tokens.shape[1]) >= tokens.shape[1] - np.array(lengths)[:, None]
    with torch.no_grad():
        return _array(reference.model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits)


def router_margin(cfg: ModelConfig, logits: torch.Tensor, gate: torch.nn.Module) -> float:
    """The smallest distance, over tokens, of a kept group's or chosen expert's score from a left-out one's."""
    r = cfg.moe.router
    choice = _array(logits.sigmoid() + gate.e_score_correction_bias).reshape(-1, r.num_groups, r.num_experts // r.num_groups)
    group = np.sort(choice, -1)[..., -2:].sum(-1)
    order = np.sort(group, -1)[:, ::-1]
    margin = (order[:, r.groups_kept - 1] - order[:, r.groups_kept]).min() if r.groups_kept < r.num_groups else np.inf
    kept = np.where((group >= order[:, r.groups_kept - 1 : r.groups_kept])[..., None], choice, -np.inf)
    best = np.sort(kept.reshape(len(kept), -1), -1)[:, ::-1]
    return float(min(margin, (best[:, r.top_k - 1] - best[:, r.top_k]).min() if r.top_k < r.num_experts else np.inf))


def _shifted_loss(logits: torch.Tensor, ids: torch.Tensor, shift: int) -> torch.Tensor:
    """Mean cross-entropy of position i's prediction of t_{i+shift}, where there is such a token."""
    targets = ids[:, shift:]
    return torch.nn.functional.cross_entropy(logits[:, : targets.shape[1]].flatten(0, 1), targets.flatten())


def _sorted_experts(gate_output, tokens: np.ndarray) -> np.ndarray:
    chosen = gate_output[2].numpy()
    return np.sort(chosen.reshape(tokens.shape[0], tokens.shape[1] - 1, -1), -1)


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().numpy()


def _stack(values: list[torch.Tensor]) -> np.ndarray:
    return np.stack([_array(value) for value in values]) if values else np.zeros(0)


@contextmanager
def _outputs(modules) -> Iterator[list]:
    """Collects what modules return while the block runs."""
    found: list = []
    handles = [module.register_forward_hook(lambda _, __, out: found.append(out)) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
