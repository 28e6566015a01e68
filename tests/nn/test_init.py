"""Initial parameters: where they come from, and that they stay put."""

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import ParamSpec, spec, tree
from tests.compare import to_numpy
from tests.small import KEY, model_config


def test_adding_a_parameter_moves_no_other():
    """More parts of any kind: a bias, query compression left out, MTP, a head that was tied."""
    base = tree.to_dict(dsv3.model_init(KEY, model_config()))
    for fields in (
        {"attention_bias": True},
        {"q_lora_rank": None},
        {"num_nextn_predict_layers": 0},
        {"tie_word_embeddings": True},
        {"n_shared_experts": 0},
    ):
        changed = tree.to_dict(dsv3.model_init(KEY, model_config(**fields)))
        assert set(changed) != set(base)
        for path in set(base) & set(changed):
            if base[path].shape == changed[path].shape:
                np.testing.assert_array_equal(base[path], changed[path], path)


def test_new_fields_beside_a_leaf_do_not_move_it():
    one = {"b": ParamSpec((3,), ("x",))}
    two = {"a": ParamSpec((3,), ("x",)), "b": ParamSpec((3,), ("x",)), "c": {"b": ParamSpec((3,), ("x",))}}
    alone, among = dsv3.init_params(KEY, one), dsv3.init_params(KEY, two)
    np.testing.assert_array_equal(alone["b"], among["b"])
    assert len({to_numpy(leaf).tobytes() for leaf in tree.flatten(among)}) == 3


def test_values_are_what_the_specs_say():
    specs = dsv3.model_specs(model_config(initializer_range=0.05))
    params = dsv3.model_init(KEY, model_config(initializer_range=0.05))
    for (path, leaf), (_, s) in zip(tree.items(params), tree.items(specs)):
        assert leaf.shape == s.shape and leaf.dtype == tf.float32, path
        if s.init != "normal":
            assert (leaf.numpy() == (s.init == "ones")).all(), path
    pairs = zip(tree.flatten(params), tree.flatten(specs))
    drawn = np.concatenate([to_numpy(p).ravel() for p, s in pairs if s.init == "normal"])
    assert drawn.std() == pytest.approx(0.05, rel=4 / np.sqrt(2 * drawn.size))  # four standard errors
    assert abs(drawn.mean()) < 4 * 0.05 / np.sqrt(drawn.size)


def test_no_two_leaves_share_their_numbers():
    params = dsv3.model_init(KEY, model_config())
    firsts = [float(to_numpy(p).ravel()[0]) for path, p in tree.items(params) if "norm" not in path]
    assert len(set(firsts)) == len(firsts)


def test_keys():
    cfg = model_config()
    same, other = dsv3.model_init(KEY, cfg), dsv3.model_init(KEY + 1, cfg)
    for a, b in zip(tree.flatten(dsv3.model_init(KEY, cfg)), tree.flatten(same)):
        np.testing.assert_array_equal(a, b)
    assert (same.embed.numpy() != other.embed.numpy()).all()
    np.testing.assert_array_equal(same.embed, dsv3.model_init([3, 7], cfg).embed)
    for key in (tf.constant([1, 2, 3]), tf.constant([0.0, 1.0]), tf.constant(1)):
        with pytest.raises(ValueError, match="init_params: `key` has shape .*, want int"):
            dsv3.model_init(key, cfg)


def test_storage_dtype():
    cfg = model_config()
    half, full = dsv3.model_init(KEY, cfg, dtype="bfloat16"), dsv3.model_init(KEY, cfg)
    for a, b in zip(tree.flatten(half), tree.flatten(full)):
        assert a.dtype == tf.bfloat16
        np.testing.assert_array_equal(to_numpy(a), to_numpy(tf.cast(b, tf.bfloat16)))
    fixed = dsv3.init_params(KEY, {"a": ParamSpec((2,), ("x",), dtype="float32")}, tf.bfloat16)
    assert fixed["a"].dtype == tf.float32


def test_bad_specs_are_refused():
    with pytest.raises(ValueError, match=r"ParamSpec: shape \(2, 3\) has 2 dims"):
        ParamSpec((2, 3), ("a",))
    with pytest.raises(ValueError, match="ParamSpec: `init` is 'uniform'"):
        ParamSpec((2,), ("a",), init="uniform")


def test_stacked_specs_and_counts():
    specs = {"w": ParamSpec((2, 3), ("a", "b")), "n": ParamSpec((3,), ("b",), init="ones")}
    stacked = spec.stack_specs(specs, 4)
    assert stacked["w"] == ParamSpec((4, 2, 3), ("layer", "a", "b"))
    assert spec.stack_specs(specs, 0) == ()
    assert dsv3.count_params(stacked) == 4 * dsv3.count_params(specs) == 36


def test_counts_of_the_published_model():
    cfg = dsv3.preset("deepseek-v3")
    specs = dsv3.model_specs(cfg)
    biases = cfg.num_moe_layers * cfg.moe.router.num_experts
    assert dsv3.count_params(specs._replace(mtp=())) + biases == 671_026_419_200
    assert 37e9 < dsv3.active_params(cfg) < 38e9
    assert dsv3.active_params(model_config(num_experts_per_tok=4)) == dsv3.count_params(
        dsv3.model_specs(model_config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=4))._replace(mtp=())
    ) + 2 * 12 * (6 - 4)  # the routers of six experts have two columns more
