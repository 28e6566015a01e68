"""Models of quantised matrices compute what decoded ones do, in every form; an FP8 cache is what attention reads."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3 import tree
from dsv3.io.names import checkpoint_pieces
from dsv3.nn import fp8_delayed
from dsv3.nn.cache import cache_bytes, entry_format
from dsv3.nn.linear import linear_apply, weight_matrix
from dsv3.nn.mla import LayerCache, mla_absorb, mla_apply
from dsv3.nn.model import absorb_params, cast_params
from dsv3.nn.quantized import MATRICES, is_quantized, matrix_of, params_dict, scale_shape
from dsv3.ops.latent import latent_pack, latent_unpack
from dsv3.ops.quantized import QuantizedWeight, quantized_encode
from dsv3.recipe import RECIPES
from tests.compare import PLAIN, XLA, assert_close, assert_trees_close, normal
from tests.small import mla_config, model_config, random_params, random_router, random_tokens

KINDS = ("fp8", "int8")
# As the comparisons of kernels of one model: float32 through three layers, products in other orders.
SAME = 5e-6


@functools.cache
def model(kind: str = "fp8", **sizes):
    """(cfg, quantised parameters, the same decoded to float32, router)."""
    cfg = model_config(num_nextn_predict_layers=1, qk_rope_head_dim=4, **sizes)  # pairs and halves differ from 4 on
    params = dsv3.quantize_params(random_params(dsv3.model_specs(cfg)), cfg, kind=kind, fuse=False)
    return cfg, params, dsv3.dequantize_params(params, cfg, dtype="float32", fuse=False), random_router(cfg)


def logits(params, policy=PLAIN, form="auto", kind="fp8", compiled=None):
    cfg, _, _, router = model(kind)

    def apply(params, tokens):
        return dsv3.model_apply(params, router, tokens, cfg=cfg, policy=policy, form=form).logits

    tokens = tf.constant(random_tokens(cfg, 2, 5))
    return (apply if compiled is None else tf.function(apply, jit_compile=compiled, autograph=False))(params, tokens)


@functools.cache
def wanted(kind):
    return logits(model(kind)[2], kind=kind)


WAYS = {
    "expanded": {},
    "naive": {"form": "naive"},
    "absorbed": {"form": "absorbed"},
    "blocks": {"policy": PLAIN.replace(experts="blocks")},
    "rows": {"policy": PLAIN.replace(max_rows=100)},
    "recomputed": {"policy": PLAIN.replace(remat="block")},
    "graph": {"compiled": False},
    "loop": {"policy": PLAIN.replace(loop="scan"), "compiled": False},
    "loop, absorbed": {"policy": PLAIN.replace(loop="scan"), "compiled": False, "form": "absorbed"},
    "XLA": {"policy": XLA, "compiled": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_form_is_that_of_the_decoded_matrices(kind, way):
    assert_close(logits(model(kind)[1], kind=kind, **WAYS[way]), wanted(kind), SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_for_decoding(kind):
    cfg, params, _, _ = model(kind)
    absorbed = absorb_params(params, cfg)
    assert isinstance(absorbed.moe.mla.k_up, QuantizedWeight)
    assert_close(logits(absorbed, form="absorbed", kind=kind), wanted(kind), SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_mtp_modules(kind):
    cfg, params, whole, router = model(kind)
    tokens = random_tokens(cfg, 2, 6)
    output = dsv3.model_apply(whole, router, tokens[:, :-1], cfg=cfg, policy=PLAIN)
    got, want = (dsv3.mtp_chain(p, router, output, tokens[:, 1:], cfg=cfg, policy=PLAIN).normed for p in (params, whole))
    assert_close(got, want, SAME)


@settings(max_examples=8)
@given(
    st.sampled_from([None, 130]), st.sampled_from([6, 136]), st.sampled_from([4, 72]), st.sampled_from([3, 70]),
    st.sampled_from(KINDS), st.sampled_from(["expanded", "absorbed"]),
)  # fmt: skip
def test_attention_whose_heads_cross_blocks(q_latent, kv_latent, nope, v_dim, kind, form):
    """Heads, latents and rotary columns that begin and end within a block of 128."""
    cfg = mla_config(q_latent=q_latent, kv_latent=kv_latent, nope_dim=nope, v_dim=v_dim, rope_dim=4)
    whole, params = random_params(dsv3.mla_specs(cfg, std=0.1), std=0.1)._asdict(), {}
    for name, leaf in whole.items():
        params[name] = leaf
        of = matrix_of(name)
        if of is None or isinstance(leaf, tuple):
            continue
        inputs = int(np.prod(leaf.shape[: of.inputs]))
        q = quantized_encode(tf.reshape(leaf, [inputs, -1]), kind=kind)
        params[name] = q._replace(values=tf.reshape(q.values, leaf.shape))
        decoded = dsv3.ops.quantized.quantized_decode(weight_matrix(params[name], inputs))
        whole[name] = tf.reshape(decoded, leaf.shape)
    cache = LayerCache(tf.constant(normal(1, 2, 4, cfg.cache_width)), tf.constant([1, 4]))
    x = tf.constant(normal(0, 2, 3, 8))
    got, want = (
        mla_apply(dsv3.nn.mla.MLAParams(**p), x, cfg=cfg, cache=cache, form=form, policy=PLAIN) for p in (params, whole)
    )
    assert_trees_close(got, want, SAME)
    if form == "absorbed":
        absorbed = mla_absorb(dsv3.nn.mla.MLAParams(**params), cfg=cfg)
        assert_close(mla_apply(absorbed, x, cfg=cfg, cache=cache, form=form, policy=PLAIN).out, want.out, SAME)


def test_quantised_is_what_the_published_checkpoint_has_in_fp8():
    for cfg in (model_config(), model_config(q_lora_rank=None)):
        specs = dsv3.model_specs(cfg)
        stored = {piece.leaf for piece in checkpoint_pieces(specs, cfg) if piece.fp8}
        assert stored == {path for path, _ in tree.items(specs) if matrix_of(path)}


@pytest.mark.parametrize("kind", KINDS)
def test_trees(kind):
    cfg, params, _, _ = model(kind)
    specs, leaves = dsv3.model_specs(cfg), params_dict(params)
    assert list(leaves) == [path for path, _ in tree.items(specs)]
    for path, spec in tree.items(specs):
        quantised = isinstance(leaves[path], QuantizedWeight)
        assert quantised == (matrix_of(path) is not None) and tuple(leaves[path].shape) == spec.shape
        if quantised:
            assert leaves[path].kind == kind
            assert tuple(leaves[path].scale_inv.shape) == scale_shape(spec.shape, matrix_of(path), kind)
    again = tree.graft(specs, leaves)
    assert [path for path, _ in tree.items(again)] == [path for path, _ in tree.items(params)]
    same = dsv3.quantize_params(params, cfg, kind=kind)
    assert all(a is b for a, b in zip(tree.flatten(same), tree.flatten(params)))
    assert is_quantized(params) and not is_quantized(specs)
    cast = cast_params(params, PLAIN.replace(dtype="bfloat16"))
    assert cast.moe.mla.o.scale_inv is params.moe.mla.o.scale_inv and cast.head.dtype == tf.bfloat16


def test_bytes():
    """One byte a value and the scales, where bfloat16 has two."""
    cfg, params, _, _ = model("int8", hidden_size=128, moe_intermediate_size=128, kv_lora_rank=128)
    held = params.moe.ffn.down
    size = sum(leaf.shape.num_elements() * leaf.dtype.size for leaf in held)
    assert size == held.shape.num_elements() * (1 + 4 / 128)


def test_refusals_are_one_line():
    cfg, params, whole, router = model()
    weight = quantized_encode(normal(0, 8, 4))
    cases = {
        "train_state: `params` hold quantised matrices, want floating": lambda: dsv3.train_state(
            params, router, dsv3.adamw(0.1)
        ),
        "linear_apply: `weight` is quantised, want fp8=None": lambda: linear_apply(
            normal(1, 2, 8), weight, fp8=RECIPES["paper"]
        ),
        "quantize_params: `kind` is 'fp4', want one of 'fp8', 'int8'": lambda: dsv3.quantize_params(whole, cfg, kind="fp4"),
        "quantize_params: `dense.mla.q_a` is quantised to fp8, want int8": lambda: dsv3.quantize_params(
            params, cfg, kind="int8"
        ),
        "quantize_params: `params` does not have the expected structure": lambda: dsv3.quantize_params(
            whole._replace(mtp=()), cfg
        ),
        "quantize_params: `norm` has shape (3,), want (12,)": lambda: dsv3.quantize_params(
            whole._replace(norm=tf.ones([3])), cfg
        ),
        "ComputePolicy: `cache` is 'int4', want one of None, 'float8'": lambda: PLAIN.replace(cache="int4"),
    }
    for wanted_text, call in cases.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert wanted_text in str(caught.value) and "\n" not in str(caught.value)


# The cache

CACHED = PLAIN.replace(cache="float8")


def test_attention_reads_entries_as_the_cache_holds_them():
    """A text in one piece, and cut into steps behind an FP8 cache, absorbed or not, has the same logits and entries."""
    cfg, _, params, router = model()
    tokens = random_tokens(cfg, 2, 6)
    whole = dsv3.model_apply(params, router, tokens, cfg=cfg, policy=CACHED)
    assert whole.entries.dtype == tf.uint8
    for form in ("expanded", "absorbed"):
        cache = dsv3.cache_init(cfg, 2, 8, dtype="float8")
        found = []
        for first, end in ((0, 3), (3, 4), (4, 6)):
            out = dsv3.model_apply(params, router, tokens[:, first:end], cfg=cfg, cache=cache, form=form, policy=PLAIN)
            cache = dsv3.cache_append(cache, out.entries)
            found.append(out.logits)
        assert_close(tf.concat(found, 1), whole.logits, SAME)
        sizes = {"latent": cfg.mla.kv_latent, "rope": cfg.mla.rope_dim, "dtype": "float32"}
        kept, entries = (latent_unpack(kv, **sizes) for kv in (cache.kv[:, :, :6], whole.entries))
        assert_close(kept, entries, SAME)  # a scale's last bit may follow the order of a product's sum


def test_an_fp8_cache_is_a_cache_of_rounded_entries():
    """Attention over bytes is attention over the values that they stand for, however full rows are."""
    cfg = mla_config()
    params = random_params(dsv3.mla_specs(cfg, std=0.1))
    packed = latent_pack(normal(0, 2, 4, cfg.cache_width), rope=cfg.rope_dim)
    values = latent_unpack(packed, latent=cfg.kv_latent, rope=cfg.rope_dim, dtype="float32")
    length, x = tf.constant([1, 4]), tf.constant(normal(1, 2, 3, 8))
    for form in ("expanded", "absorbed", "naive"):
        bits = mla_apply(params, x, cfg=cfg, cache=LayerCache(packed, length), form=form, policy=PLAIN)
        floats = mla_apply(params, x, cfg=cfg, cache=LayerCache(values, length), form=form, policy=CACHED)
        assert_close(bits.out, floats.out)
        np.testing.assert_array_equal(bits.entry, floats.entry)


def test_sizes_and_mixtures_of_caches():
    cfg = dsv3.preset("deepseek-v3")
    assert cache_bytes(cfg, 1, dtype="float8") == 61 * 656 and entry_format(cfg, "float8") == (656, tf.uint8)
    small = model()[0]
    width = entry_format(small, "float8")[0]
    assert dsv3.cache_specs(small, 2, 5, dtype="float8").kv.shape == (small.num_layers, 2, 5, width)
    cache = dsv3.cache_init(small, 1, 4, dtype="float8")
    with pytest.raises(ValueError, match="cache_append: `entries` has dtype float32, want uint8"):
        dsv3.cache_append(cache, tf.zeros([small.num_layers, 1, 1, width]))


def test_what_is_quantised_is_what_delayed_scales_are_for():
    assert set(MATRICES) == set(fp8_delayed.MATRICES)
