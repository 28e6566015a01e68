"""dsv3 beside the golden files, which `make golden` writes from transformers: the parity tests' core without torch.

Tolerances are those of live parity: 1e-5 of the largest value, gradients 1e-4 of the norm, experts exactly; in bfloat16
the reference's own distance from float32 (see `tests/parity/test_parity.py`).
"""

import functools
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.nn.model import head_weight
from dsv3.policy import default_policy

FOLDER = pathlib.Path(__file__).resolve().parent / "golden"
NAMES = ("published", "variant", "yarn")

golden = pytest.mark.parametrize("name", NAMES)


class Golden:
    """One file: its model as dsv3 has it, and transformers' results in `want`."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.want = dict(file)
        self.cfg = dsv3.ModelConfig.from_hf(json.loads(str(self.want["config"])))
        self.params = tree.map_with_path(self._load("params"), dsv3.model_specs(self.cfg))
        self.router = tree.map_with_path(self._load("router"), dsv3.router_init(self.cfg))
        self.tokens = self.want["tokens"].astype(np.int32)

    def _load(self, prefix):
        def leaf(path, spec):
            value = self.want[f"{prefix}/{path}"]
            assert value.shape == tuple(spec.shape), f"{path}: {value.shape}, want {spec.shape}"
            return tf.constant(value.astype(np.float32) / self.want["grid"])

        return leaf


@functools.cache
def load(name):
    return Golden(name)


@functools.cache
def computed(name):
    """Output, MTP chain, MTP logits, loss and gradients."""
    g = load(name)
    inputs, ahead = g.tokens[:, :-1], g.tokens[:, 1:]
    how = {"cfg": g.cfg, "policy": default_policy().replace(fuse=False)}

    @tf.function(autograph=False)
    def run(params):
        leaves = tree.flatten(params)
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            out = dsv3.model_apply(params, g.router, inputs, **how)
            loss, chain, heads = cross_entropy(out.logits, inputs, 1), (), ()
            if g.cfg.num_mtp_layers:
                chain = dsv3.mtp_chain(params, g.router, out, ahead, **how)
                heads = tf.matmul(chain.normed, head_weight(params))
                losses = [cross_entropy(heads[k], g.tokens, k + 2) for k in range(g.cfg.num_mtp_layers)]
                loss += float(g.want["mtp_weight"]) * tf.add_n(losses) / len(losses)
        return out, chain, heads, loss, [tf.convert_to_tensor(x) for x in tape.gradient(loss, leaves)]

    out, chain, heads, loss, grads = run(g.params)
    return out, chain, heads, float(loss), tree.to_dict(tree.unflatten_as(g.params, grads))


def cross_entropy(logits, tokens, shift):
    targets = tokens[:, shift:]
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits[:, : targets.shape[1]]))


def assert_close(got, want, tolerance=1e-5):
    got = np.asarray(got)
    assert got.shape == want.shape
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= tolerance, f"largest error {error:.3g} of the largest value"


def test_files_are_all_there_and_small():
    assert {path.stem for path in FOLDER.glob("*.npz")} == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000


@golden
def test_logits_hidden_and_experts(name):
    want, (out, chain, heads, *_) = load(name).want, computed(name)
    assert_close(out.logits, want["logits"])
    assert_close(out.hidden, want["hidden"])
    np.testing.assert_array_equal(np.sort(out.stats.experts.numpy(), -1), want["experts"])
    if chain:
        assert_close(heads, want["mtp_logits"])
        np.testing.assert_array_equal(np.sort(chain.stats.experts.numpy(), -1), want["mtp_experts"])


@golden
def test_loss_and_gradients(name):
    want, (*_, loss, grads) = load(name).want, computed(name)
    assert abs(loss - want["loss"]) <= 1e-5 * want["loss"]
    assert {f"grad_norm/{path}" for path in grads} == {key for key in want if key.startswith("grad_norm/")}
    for path, grad in grads.items():
        flat, norm = grad.numpy().reshape(-1), want[f"grad_norm/{path}"]
        assert abs(np.linalg.norm(flat) - norm) <= 1e-4 * norm, path
        sample = want[f"grad_sample/{path}"]
        places = np.linspace(0, flat.size - 1, sample.size).astype(int)
        assert np.linalg.norm(flat[places] - sample) <= 1e-4 * norm, path


def test_default_policy_gives_the_same_logits():
    g = load("published")
    out = dsv3.model_apply(g.params, g.router, g.tokens[:, :-1], cfg=g.cfg)
    assert_close(out.logits, g.want["logits"])


@golden
def test_bfloat16_logits(name):
    """The experts are transformers', as near ties fall either way in bfloat16; its error bounds dsv3's."""
    g = load(name)
    how = {"cfg": g.cfg, "experts": g.want["bfloat16_experts"].astype(np.int32)}
    how["policy"] = default_policy().replace(fuse=False)
    exact = dsv3.model_apply(g.params, g.router, g.tokens[:, :-1], **how).logits.numpy()
    params = tree.map_leaves(lambda leaf: tf.cast(leaf, tf.bfloat16), g.params)
    logits = dsv3.model_apply(params, g.router, g.tokens[:, :-1], **how).logits
    assert logits.dtype == tf.bfloat16
    got = tf.cast(logits, tf.float32).numpy()
    theirs = np.linalg.norm(g.want["bfloat16_logits"] - exact)
    assert 0 < theirs < 0.03 * np.linalg.norm(exact)
    assert np.linalg.norm(got - exact) <= 1.25 * theirs
    assert np.linalg.norm(got - g.want["bfloat16_logits"]) <= 1.5 * 2**0.5 * theirs
