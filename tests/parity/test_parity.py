"""dsv3 beside Hugging Face transformers, live: the same settings, parameters and tokens through both.

Tolerances. Float32 results are compared relative to the largest magnitude of transformers' result, gradients relative to
each tensor's norm. 1e-5 is 170 roundings of 2⁻²⁴: about four for each of the some forty products, norms and softmaxes that
follow one another in these models. Backward passes double their number and add cancellation, hence 1e-4. Chosen experts are
compared exactly: every case asserts that its draw has no near tie.

In bfloat16 both sides round at different places, so the bound comes from the reference: with e the distance of transformers'
bfloat16 result from the float32 result of the same numbers, two independent roundings of that size lie √2·e apart. dsv3 may
be 1.25·e from float32 and 1.5·√2·e from transformers; e itself is asserted to be what bfloat16 gives, below 3%.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tf = pytest.importorskip("tensorflow")

import hf_model  # noqa: E402
import hf_run  # noqa: E402
import make_golden  # noqa: E402
from cases import CASES, Case, case  # noqa: E402
from transformers import DeepseekV3Config  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: E402

import dsv3  # noqa: E402
from dsv3 import tree  # noqa: E402
from dsv3.nn.block import block_apply  # noqa: E402
from dsv3.nn.mla import mla_rope  # noqa: E402
from dsv3.nn.model import embed_apply, head_weight  # noqa: E402
from dsv3.nn.mtp import mtp_apply  # noqa: E402
from dsv3.ops.norm import rms_norm  # noqa: E402
from dsv3.policy import default_policy  # noqa: E402

# A model without shared experts has them in transformers all the same, with no width.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")]

LOGITS, GRADS = 1e-5, 1e-4

everywhere = pytest.mark.parametrize("name", [c.name for c in CASES])


class Setup:
    """A case with its parameters on both sides, its tokens `[B, T+1]`, and what transformers computes of them."""

    def __init__(self, case: Case):
        # The first case runs by the default policy throughout; for the others decoding and padding skip XLA's compiling.
        self.policy = default_policy() if case is CASES[0] else default_policy().replace(fuse=False)
        self.case, self.cfg = case, case.cfg
        self.arrays, self.biases = hf_model.draw_params(self.cfg, case.seed)
        self.params = tree.map_leaves(tf.constant, self.arrays)
        self.router = tree.map_leaves(tf.constant, self.biases)
        rng = np.random.default_rng(case.seed)
        self.tokens = rng.integers(0, self.cfg.vocab_size, (case.shape[0], case.shape[1] + 1))
        self.inputs = tf.constant(self.tokens[:, :-1], tf.int32)
        self.ahead = tf.constant(self.tokens[:, 1:], tf.int32)
        self.reference = hf_model.build(case.settings, self.arrays, self.biases)
        self.want = hf_run.observe(self.cfg, self.reference, self.tokens)


@functools.lru_cache(maxsize=len(CASES))
def setup(name: str) -> Setup:
    return Setup(case(name))


@functools.lru_cache(maxsize=len(CASES))
def computed(name: str):
    """dsv3's output, MTP chain, loss and gradients for a case, from one compiled function."""
    s = setup(name)

    @tf.function(autograph=False)
    def run(params, router):
        leaves = tree.flatten(params)
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            out = dsv3.model_apply(params, router, s.inputs, cfg=s.cfg)
            loss = cross_entropy(out.logits, s.tokens[:, :-1], 1)
            chain, heads = (), ()
            if s.cfg.num_mtp_layers:
                chain = dsv3.mtp_chain(params, router, out, s.ahead, cfg=s.cfg)
                heads = tf.matmul(chain.normed, head_weight(params))
                losses = [cross_entropy(heads[k], s.tokens, k + 2) for k in range(s.cfg.num_mtp_layers)]
                loss += hf_run.MTP_WEIGHT * tf.add_n(losses) / len(losses)
        return out, chain, heads, loss, [tf.convert_to_tensor(g) for g in tape.gradient(loss, leaves)]

    out, chain, heads, loss, grads = run(s.params, s.router)
    return out, chain, heads, float(loss), tree.unflatten_as(s.params, grads)


def cross_entropy(logits, tokens, shift: int):
    """Mean cross-entropy of position i's prediction of token i + shift, where there is such a token."""
    targets = tokens[:, shift:]
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits[:, : targets.shape[1]]))


def relative(got, want) -> float:
    """Largest difference, relative to the largest value wanted."""
    got = np.asarray(got, np.float32)
    assert got.shape == want.shape, f"shape {got.shape}, want {want.shape}"
    return float(np.abs(got - want).max() / np.abs(want).max())


def hf_entries(cfg, entries) -> np.ndarray:
    """Cache entries with the rotary part in transformers' order: evens, then odds."""
    entries = np.asarray(entries)
    latent, rope = np.split(entries, [cfg.mla.kv_latent], -1)
    if cfg.mla.rope.output == "halves":
        return entries
    return np.concatenate([latent, rope[..., 0::2], rope[..., 1::2]], -1)


def test_parameters_map_both_ways():
    for c in CASES:
        arrays, _ = hf_model.draw_params(c.cfg, c.seed)
        back = tree.to_dict(hf_model.params_from_hf(c.cfg, hf_model.params_to_hf(c.cfg, arrays)))
        assert list(back) == [path for path, _ in tree.items(arrays)]
        for path, value in tree.items(arrays):
            np.testing.assert_array_equal(back[path], value, err_msg=path)


@everywhere
def test_logits_and_hidden_states(name, table):
    s, (out, *_) = setup(name), computed(name)
    table.check(name, "logits", relative(out.logits, s.want.logits), LOGITS)
    table.check(name, "final hidden state", relative(out.hidden, s.want.hidden), LOGITS)
    table.check(name, "cache entries", relative(hf_entries(s.cfg, out.entries), s.want.entries), LOGITS)


@everywhere
def test_every_layer(name, table):
    """Blocks one by one; their last output is what `model_apply` calls `raw_hidden`."""
    s, (out, *_) = setup(name), computed(name)
    dense = s.cfg.num_dense_layers
    shared = {"cfg": s.cfg, "table": mla_rope(s.cfg.mla, tf.range(s.case.shape[1])), "policy": default_policy()}
    x, errors = embed_apply(s.params, s.inputs), []
    for i in range(s.cfg.num_layers):
        stack, j, bias = (s.params.dense, i, ()) if i < dense else (s.params.moe, i - dense, s.router.moe[i - dense])
        x = block_apply(tree.slice_leading(stack, j), bias, x, **shared).out
        errors.append(relative(x, s.want.layers[i]))
    table.check(name, "each layer's output", max(errors), LOGITS)
    assert relative(out.raw_hidden, s.want.layers[-1]) <= LOGITS


@everywhere
def test_chosen_experts(name, table):
    s, (out, chain, *_) = setup(name), computed(name)
    assert s.want.margin > 1e-5, f"the draw has a near tie of {s.want.margin:.1g}: take another seed"
    differing = 0
    for stats, want in ((out.stats, s.want.experts), (chain and chain.stats, s.want.mtp_experts)):
        if stats:
            differing += int((np.sort(stats.experts.numpy(), -1) != want).sum())
            loads = [np.bincount(layer.ravel(), minlength=s.cfg.moe.router.num_experts) for layer in want]
            np.testing.assert_array_equal(stats.load, loads)
    table.check(name, "chosen experts", differing, 0)


@everywhere
def test_loss_and_gradients(name, table):
    s, (*_, loss, grads) = setup(name), computed(name)
    table.check(name, "loss", abs(loss - s.want.loss) / s.want.loss, LOGITS)
    got = hf_model.params_to_hf(s.cfg, grads)
    assert set(got) == set(s.want.grads)
    norms = {key: np.linalg.norm(value) for key, value in s.want.grads.items()}
    assert min(norms.values()) > 0, "a parameter without gradient compares nothing"
    errors = {key: np.linalg.norm(got[key] - s.want.grads[key]) / norms[key] for key in got}
    table.check(name, "gradients", max(errors.values()), GRADS)


@everywhere
def test_mtp_logits(name, table):
    s, (_, _, heads, *_) = setup(name), computed(name)
    table.check(name, "MTP logits", relative(heads, s.want.mtp_logits), LOGITS)


def test_mtp_chain_as_transformers_drafts(table):
    """transformers hands module k + 1 what module k's head reads; `mtp_apply` can be chained that way too."""
    s = setup("two MTP modules")
    out = computed(s.case.name)[0]
    hidden, found, drafts, embedded = out.hidden, [], [], embed_apply(s.params, s.ahead)
    shared = {"cfg": s.cfg, "table": mla_rope(s.cfg.mla, tf.range(s.case.shape[1])), "policy": default_policy()}

    def module(k, hidden, embedded):
        return mtp_apply(tree.slice_leading(s.params.mtp, k), s.router.mtp[k], hidden, embedded, **shared).normed

    for k in range(2):
        hidden = module(k, hidden, tf.concat([embedded[:, k:], *[embedded[:, -1:]] * k], 1))
        found.append(tf.matmul(hidden, s.params.head))
    table.check(s.case.name, "MTP logits, normed chain", relative(tf.stack(found), s.want.mtp_normed_chain), LOGITS)

    drafted, want = hf_run.draft(s.reference, s.tokens)
    hidden = out.hidden
    for k in range(2):
        hidden = module(k, hidden, embedded)
        drafts.append(tf.matmul(hidden[:, -1], s.params.head))
        embedded = tf.concat([embedded[:, 1:], embed_apply(s.params, drafted[:, k : k + 1])], 1)
    table.check(s.case.name, "drafted logits", relative(tf.stack(drafts, 1), want), LOGITS)
    np.testing.assert_array_equal(np.argmax(drafts, -1).T, drafted)


@everywhere
def test_cached_decode(name, table):
    """A few tokens at once, then one by one, against the same with transformers' cache."""
    s = setup(name)
    prefill = s.case.shape[1] // 2
    how = {"cfg": s.cfg, "policy": s.policy}
    step = tf.function(lambda ids, cache: dsv3.model_apply(s.params, s.router, ids, cache=cache, **how), autograph=False)
    cache, found = dsv3.cache_init(s.cfg, s.case.shape[0], s.case.shape[1] + 3, dtype=tf.float32), []
    for ids in tf.split(s.inputs, [prefill, *[1] * (s.case.shape[1] - prefill)], 1):
        out = step(ids, cache)
        cache = dsv3.cache_append(cache, out.entries)
        found.append(out.logits)
    want = hf_run.decode(s.reference, s.tokens[:, :-1], prefill)
    table.check(name, "decode with a cache", relative(tf.concat(found, 1), want), LOGITS)


@everywhere
def test_padded_rows(name, table):
    """Rows padded on the left: an attention mask there, segments here. What stands at padding is not compared."""
    s = setup(name)
    rows, length = s.case.shape
    lengths = [length - 3 * b - 2 for b in range(rows)]
    tokens = s.tokens[:, :-1]
    real = np.arange(length) >= length - np.array(lengths)[:, None]
    how = {"cfg": s.cfg, "segments": tf.constant(real, tf.int32), "policy": s.policy}
    got = dsv3.model_apply(s.params, s.router, s.inputs, **how).logits
    want = hf_run.padded(s.reference, tokens, lengths)
    table.check(name, "left-padded rows", relative(got.numpy()[real], want[real]), LOGITS)


@pytest.mark.parametrize("name", ["deepseek-v3-pretrain", "deepseek-v3"])
def test_rope_of_the_published_model(name, table):
    """Frequencies within one unit in the last place, and the softmax scale, at the 671B model's sizes."""
    cfg = dsv3.preset(name)
    config = DeepseekV3Config(**cfg.to_hf())
    rotary = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    got = mla_rope(cfg.mla, tf.constant([1])).sin.numpy()[0, 0]
    want = torch.sin(rotary.inv_freq).numpy() * rotary.attention_scaling
    table.check(name, "RoPE frequencies", np.max(np.abs(got - want) / want), 2**-22)
    scale = modeling_deepseek_v3.yarn_apply_mscale(config.rope_parameters, config.qk_head_dim**-0.5)
    table.check(name, "softmax scale", abs(cfg.mla.softmax_scale / scale - 1), 1e-15)


BFLOAT16 = ["as published, small", "no query compression", "YaRN, rope_scaling", "biases in attention", "no dense layer"]


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16(name, table):
    """Parameters in bfloat16; the experts are those that transformers chose, as near ties may fall either way."""
    s = setup(name)
    arrays = hf_model.round_bfloat16(s.arrays)
    reference = hf_model.build(s.case.settings, arrays, s.biases, dtype=torch.bfloat16)
    want = hf_run.observe(s.cfg, reference, s.tokens)
    replay = {"cfg": s.cfg, "experts": tf.constant(want.experts, tf.int32)}
    exact = dsv3.model_apply(tree.map_leaves(tf.constant, arrays), s.router, s.inputs, **replay).logits.numpy()
    params = tree.map_leaves(lambda a: tf.cast(a, tf.bfloat16), arrays)
    out = dsv3.model_apply(params, s.router, s.inputs, **replay)
    assert out.logits.dtype == tf.bfloat16
    got = tf.cast(out.logits, tf.float32).numpy()
    theirs, ours, apart = (
        np.linalg.norm(a - b) / np.linalg.norm(exact) for a, b in ((want.logits, exact), (got, exact), (got, want.logits))
    )
    assert theirs < 0.03
    table.check(name, "bfloat16 logits, from float32", ours, 1.25 * theirs)
    table.check(name, "bfloat16 logits", apart, 1.5 * 2**0.5 * theirs)


def test_bfloat16_norm_rounds_as_transformers_does(table):
    """`before_weight` gives transformers' bits (but where the float32 value lies on a rounding edge), `after_weight` not."""
    s = setup("as published, small")
    norm = s.reference.model.model.norm
    x = torch.tensor(np.random.default_rng(0).standard_normal((64, 32)), dtype=torch.bfloat16)
    with torch.no_grad():
        want = norm.bfloat16()(x).float().numpy()
    norm.float()
    params = tf.cast(norm.weight.detach().numpy(), tf.bfloat16)
    share = {
        side: np.mean(tf.cast(rms_norm(tf.cast(x.float().numpy(), tf.bfloat16), params, rounding=side), tf.float32) != want)
        for side in ("before_weight", "after_weight")
    }
    table.check(s.case.name, "bfloat16 RMSNorm, unequal", share["before_weight"], 0.005)
    assert share["after_weight"] > 0.1


@pytest.mark.parametrize("name", list(make_golden.GOLDEN))
def test_golden_files_are_what_transformers_computes(name):
    """Exact but for rounding: another machine's torch may sum in another order."""
    with np.load(make_golden.FOLDER / f"{name}.npz", allow_pickle=False) as file:
        stored = dict(file)
    arrays = make_golden.compute(name)
    assert set(arrays) == set(stored)
    for key, value in arrays.items():
        if value.dtype.kind != "f" or key.startswith("bfloat16"):
            assert value.dtype == stored[key].dtype and value.shape == stored[key].shape, key
        if value.dtype.kind == "f":
            scale = arrays[key.replace("grad_sample", "grad_norm")] if key.startswith("grad") else value
            tolerance = 0.03 if key.startswith("bfloat16") else GRADS if key.startswith("grad") else LOGITS
            np.testing.assert_allclose(stored[key], value, rtol=0, atol=tolerance * max(np.abs(scale).max(initial=0), 1e-9))
        elif key != "bfloat16_experts":
            np.testing.assert_array_equal(stored[key], value, err_msg=key)
