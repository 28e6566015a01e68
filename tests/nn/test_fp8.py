"""Linear layers and experts in FP8: each product is that of quantised operands, and gradients are those of the recipe."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3.nn.fp8 import MIN_GRADIENT, fp8_linear, fp8_swiglu_linear
from dsv3.nn.fp8_delayed import INPUT, WEIGHT, DelayedWeight, delayed_linear
from dsv3.nn.fp8_experts import fp8_experts
from dsv3.nn.linear import linear_apply
from dsv3.ops.activation import swiglu
from dsv3.ops.experts import experts_apply
from dsv3.ops.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, fp8_fake
from dsv3.policy import ComputePolicy
from dsv3.recipe import RECIPES, Fp8Recipe
from tests.compare import assert_close, normal

N, D, F = 130, 140, 129


def with_gradient(fn, inputs, seed=9):
    with tf.GradientTape() as tape:
        inputs = [tf.convert_to_tensor(x) for x in inputs]
        tape.watch(inputs)
        y = fn(*inputs)
    return y, tape.gradient(y, inputs, tf.constant(1e-3 * normal(seed, *y.shape)))


def test_the_papers_products_are_those_of_rounded_operands():
    x, w = normal(0, N, D), normal(1, D, F)
    y, (dx, dw) = with_gradient(lambda x, w: fp8_linear(x, w, recipe=RECIPES["paper"]), (x, w))
    dy = tf.constant(1e-3 * normal(9, N, F))
    q, wq = fp8_fake(x, block=ROW_BLOCK), fp8_fake(w, block=WEIGHT_BLOCK)
    assert_close(y, q @ wq, 1e-6)
    small = {"min_amax": MIN_GRADIENT}
    assert_close(dx, fp8_fake(dy, block=ROW_BLOCK, **small) @ tf.transpose(wq), 1e-6)
    again, dyq = fp8_fake(q, block=COLUMN_BLOCK), fp8_fake(dy, block=COLUMN_BLOCK, **small)
    assert_close(dw, tf.transpose(again) @ dyq, 1e-6)


def test_both_tilings_of_the_unrounded_input():
    x, w = normal(0, N, D), normal(1, D, F)
    recipe = Fp8Recipe(retile=False, attention_output=None)
    _, (_, dw) = with_gradient(lambda x, w: fp8_linear(x, w, recipe=recipe), (x, w))
    dy = fp8_fake(1e-3 * normal(9, N, F), block=COLUMN_BLOCK, min_amax=MIN_GRADIENT)
    assert_close(dw, tf.transpose(fp8_fake(x, block=COLUMN_BLOCK)) @ dy, 1e-6)


def relative(a, b):
    return float(tf.norm(tf.cast(a, tf.float32) - b) / tf.norm(b))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "delayed"])
@pytest.mark.parametrize("after_attention", [False, True])
def test_errors_are_those_of_two_rounded_operands(name, after_attention):
    """Rounding to b bits of mantissa errs by 2^-(b+1)/√3 of an element at most in the mean."""
    x, w = normal(0, N, D), normal(1, D, F)
    recipe = RECIPES[name]
    y, grads = with_gradient(lambda x, w: fp8_linear(x, w, recipe=recipe, after_attention=after_attention), (x, w))
    want, exact = with_gradient(lambda x, w: x @ w, (x, w))
    operand = 2.0**-4 / 3**0.5
    gradient = operand * (2 if recipe.backward == "e5m2" else 1)
    assert 0.02 < relative(y, want) < operand * 2**0.5
    assert 0.02 < relative(grads[0], exact[0]) < (operand**2 + gradient**2) ** 0.5
    assert 0.02 < relative(grads[1], exact[1]) < (2 * operand**2 + gradient**2) ** 0.5


def test_gradients_far_below_the_floor_of_activations_survive():
    x, w = normal(0, N, D), normal(1, D, F)
    tiny = lambda x, w: 1e-9 * fp8_linear(x, w, recipe=RECIPES["paper"])  # noqa: E731
    _, grads = with_gradient(tiny, (x, w))
    _, exact = with_gradient(lambda x, w: 1e-9 * (x @ w), (x, w))
    for got, want in zip(grads, exact):
        assert relative(got, want) < 0.06


SMALL = {"min_amax": MIN_GRADIENT}
POWERS = {"scale_kind": "power_of_two"}


def test_of_swiglu_its_input_is_kept():
    h, w = normal(0, N, 2 * 70), normal(1, 70, D)
    y, (d_h, d_w) = with_gradient(lambda h, w: fp8_swiglu_linear(h, w, recipe=RECIPES["paper"]), (h, w))
    dy, wq = tf.constant(1e-3 * normal(9, N, D)), fp8_fake(w, block=WEIGHT_BLOCK)
    assert_close(y, fp8_fake(swiglu(h), block=ROW_BLOCK) @ wq, 1e-6)
    d_act = fp8_fake(dy, block=ROW_BLOCK, **SMALL) @ tf.transpose(wq)
    kept = fp8_fake(h, block=ROW_BLOCK)
    with tf.GradientTape() as tape:
        tape.watch(kept)
        again = swiglu(kept)
    assert_close(d_h, tape.gradient(again, kept, d_act), 1e-6)
    assert_close(d_w, tf.transpose(fp8_fake(again, block=COLUMN_BLOCK)) @ fp8_fake(dy, block=COLUMN_BLOCK, **SMALL), 1e-6)


@pytest.mark.parametrize("fmt", ["e5m6", "e4m3"])
def test_attentions_output_is_kept_with_power_of_two_scales(fmt):
    """Also when it is tiled anew: then they lose nothing."""
    x, w = normal(0, N, D), normal(1, D, F)
    recipe = RECIPES["paper"].replace(attention_output=fmt)
    y, (_, dw) = with_gradient(lambda x, w: linear_apply(x, w, fp8=recipe, after_attention=True), (x, w))
    again = fp8_fake(fp8_fake(x, block=ROW_BLOCK, fmt=fmt, **POWERS), block=COLUMN_BLOCK, **POWERS)
    dy = fp8_fake(1e-3 * normal(9, N, F), block=COLUMN_BLOCK, **SMALL)
    assert_close(dw, tf.transpose(again) @ dy, 1e-6)
    assert_close(y, fp8_fake(x, block=ROW_BLOCK) @ fp8_fake(w, block=WEIGHT_BLOCK), 1e-6)


def expert_inputs():
    experts = np.array([[0, 2], [2, 3], [0, 3], [2, 0], [3, 2]] * 8, np.int32)  # expert 1 has none
    return experts, (normal(0, 40, D), np.abs(normal(1, 40, 2)), 0.1 * normal(2, 4, D, 2 * 70), 0.1 * normal(3, 4, 70, D))


@pytest.mark.parametrize("name", ["paper", "tensor"])
@pytest.mark.parametrize(("kernel", "fuse"), [("sorted", False), ("sorted", True), ("blocks", False)])
def test_experts(name, kernel, fuse):
    """Within the error of four rounded operands in a row; the kernels agree."""
    experts, inputs = expert_inputs()
    recipe = RECIPES[name]
    run = lambda *a: fp8_experts(a[0], a[1], experts, *a[2:], recipe=recipe, kernel=kernel, multiple=16, fuse=fuse)  # noqa: E731
    got = with_gradient(run, inputs)
    plain = lambda *a: experts_apply(a[0], a[1], experts, *a[2:], multiple=16)  # noqa: E731
    want = with_gradient(plain, inputs)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1])):
        assert 0.02 < relative(a, b) < 0.12
    assert not tf.reduce_any(got[1][2][1] != 0), "an expert without tokens has no gradient"


def routed(x, weights, experts, gate_up, down, dy):
    """The paper's mixture and its gradients, an expert at a time, of operands that are rounded as it has them."""
    first, second = (np.stack([fp8_fake(w, block=WEIGHT_BLOCK) for w in ws]) for ws in (gate_up, down))
    x, dy = fp8_fake(x, block=ROW_BLOCK, **POWERS).numpy(), fp8_fake(dy, block=ROW_BLOCK, **POWERS, **SMALL).numpy()
    y, d_x, d_w = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    d_first, d_second = np.zeros_like(gate_up), np.zeros_like(down)
    for e in range(len(gate_up)):
        token, choice = np.nonzero(experts == e)
        if not len(token):
            continue
        w = tf.constant(weights[token, choice][:, None])
        h = x[token] @ first[e]
        np.add.at(y, token, fp8_fake(swiglu(h) * w, block=ROW_BLOCK).numpy() @ second[e])
        d_act = dy[token] @ second[e].T
        kept = fp8_fake(h, block=ROW_BLOCK)
        with tf.GradientTape() as tape:
            tape.watch([kept, w])
            act = swiglu(kept) * w
        d_h, d_w[token, choice] = (t.numpy().reshape(len(token), -1).squeeze() for t in tape.gradient(act, [kept, w], d_act))
        np.add.at(d_x, token, fp8_fake(d_h, block=ROW_BLOCK, **SMALL).numpy() @ first[e].T)
        over = fp8_fake(x[token], block=COLUMN_BLOCK, **POWERS), fp8_fake(d_h, block=COLUMN_BLOCK, **SMALL)
        d_first[e] = tf.transpose(over[0]) @ over[1]
        over = fp8_fake(act, block=COLUMN_BLOCK), fp8_fake(dy[token], block=COLUMN_BLOCK, **POWERS, **SMALL)
        d_second[e] = tf.transpose(over[0]) @ over[1]
    return y, d_x, d_w, d_first, d_second


@pytest.mark.parametrize(("kernel", "multiple"), [("sorted", 1), ("sorted", 16), ("blocks", 16)])
def test_the_papers_mixture_is_that_of_rounded_operands(kernel, multiple):
    """However rows are laid out; float32 sums in another order round some values to their neighbours."""
    experts, inputs = expert_inputs()
    inputs[0][0] *= 1e4  # the token that padding repeats; expert 1 and 3 do not have it
    recipe = RECIPES["paper"]
    run = lambda *a: fp8_experts(a[0], a[1], experts, *a[2:], recipe=recipe, kernel=kernel, multiple=multiple)  # noqa: E731
    y, grads = with_gradient(run, inputs)
    dy = 1e-3 * normal(9, 40, D)
    for got, want in zip((y, *grads), routed(inputs[0], inputs[1], experts, *inputs[2:], dy), strict=True):
        for a, b in zip(tf.convert_to_tensor(got), want, strict=True):
            if np.any(b):
                assert relative(a, b) < 5e-3


def test_sums_of_experts_without_promotions():
    """With all bits they are those of one scale; with few they err more than those that are promoted."""
    experts, inputs = expert_inputs()

    def run(**fields):
        recipe = RECIPES["tensor"].replace(**fields)
        y, grads = with_gradient(lambda *a: fp8_experts(a[0], a[1], experts, *a[2:], recipe=recipe, multiple=16), inputs)
        return [y, *grads]

    exact, narrow = run(), {"accumulate": "tensor_core", "bits": 10}
    for a, b in zip(run(accumulate="tensor_core", bits=24, interval=None), exact):
        assert_close(a, b, 1e-5)
    promoted, never = (run(interval=interval, **narrow) for interval in (32, None))
    for a, b, want in zip(promoted, never, exact):
        assert 1e-4 < relative(a, want) < relative(b, want) < 0.05
    with pytest.raises(ValueError, match="fp8_experts: `kernel` is 'blocks', want 'sorted' where `recipe.interval` is None"):
        recipe = RECIPES["tensor"].replace(interval=None)
        fp8_experts(inputs[0], inputs[1], experts, *inputs[2:], recipe=recipe, kernel="blocks")


@pytest.mark.parametrize("name", ["paper", "tensor", "e5m2_gradients"])
def test_float8_operands_give_a_layers_results(name):
    """Only the order of float32 sums differs, and with it what is rounded to the neighbouring FP8 value afterwards."""
    x, w = normal(0, N, D), normal(1, D, F)
    experts, given = expert_inputs()

    def run(recipe):
        routed = lambda *a: fp8_experts(a[0], a[1], experts, *a[2:], recipe=recipe, kernel="blocks", multiple=16)  # noqa: E731
        linear = with_gradient(lambda x, w: fp8_linear(x, w, recipe=recipe), (x, w))
        return tf.nest.flatten((linear, with_gradient(routed, given)))

    recipe = RECIPES[name].replace(operands="float8")
    got = tf.function(lambda: run(recipe), jit_compile=True, autograph=False)()
    for i, (a, b) in enumerate(zip(got, run(RECIPES[name]), strict=True)):
        assert relative(a, b) < (1e-6 if i < 3 else 5e-3), i  # those of the experts are behind a second quantisation


def test_weights_and_gradients_keep_their_dtypes():
    x, w = tf.cast(normal(0, 3, 4), tf.bfloat16), normal(1, 4, 2, 5)
    y, (dx, dw) = with_gradient(lambda x, w: tf.cast(linear_apply(x, w, fp8=Fp8Recipe()), tf.float32), (x, w))
    assert y.shape == (3, 10) and dx.dtype == tf.bfloat16 and dw.dtype == tf.float32 and dw.shape == w.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fp8Recipe(forward="e4m4"), "Fp8Recipe: `forward` is 'e4m4', want one of"),
        (lambda: Fp8Recipe(interval=100), "Fp8Recipe: `interval` is 100, want None or a positive multiple of 32"),
        (lambda: Fp8Recipe(interval=256), "Fp8Recipe: `interval` is 256 with scaling='block', want a divisor of 128"),
        (lambda: Fp8Recipe(bits=99), "Fp8Recipe: `bits` is 99, want an integer of 2 to 24"),
        (lambda: Fp8Recipe(scaling="delayed"), "Fp8Recipe: `attention_output` is 'e5m6' with scaling='delayed', want None"),
        (lambda: Fp8Recipe(history=0), "Fp8Recipe: `history` is 0, want an integer of at least 1"),
        (lambda: Fp8Recipe(interval=None), "Fp8Recipe: `interval` is None with scaling='block', want scaling='tensor'"),
        (lambda: ComputePolicy(fp8="paper"), "ComputePolicy: `fp8`"),
        (lambda: Fp8Recipe(operands="fp8"), "Fp8Recipe: `operands` is 'fp8', want one of 'expanded', 'float8'"),
        (
            lambda: Fp8Recipe(operands="float8", accumulate="tensor_core"),
            "Fp8Recipe: `accumulate` is 'tensor_core' with operands='float8', want 'float32'",
        ),
        (
            lambda: Fp8Recipe(operands="float8", interval=None, scaling="tensor"),
            "Fp8Recipe: `interval` is None with operands='float8'",
        ),
    ],
)
def test_wrong_recipes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mixtures_name_operands_that_do_not_fit():
    experts, inputs = expert_inputs()
    with pytest.raises(ValueError, match="fp8_experts: `gate_up` has last dim 139, want 140"):
        fp8_experts(inputs[0], inputs[1], experts, inputs[2][..., :-1], inputs[3], recipe=RECIPES["paper"])


def delayed(weight, *largest):
    """A weight whose input, weight and gradient had these largest values."""
    return DelayedWeight(tf.constant(weight), tf.constant([[value, 0.0] for value in largest]))


@pytest.mark.parametrize("fuse", [False, True])
def test_delayed_scales_see_what_they_cut_off(fuse):
    """Histories get the true largest values, also where they were far below them, of linear layers and of experts."""
    recipe = RECIPES["delayed"].replace(history=2)
    x, w = normal(0, N, D), normal(1, D, F)
    weight = delayed(w, 0.5, 0.25, 1e-6)
    run = lambda x, *d: delayed_linear(x, DelayedWeight(*d), recipe=recipe, fuse=fuse)  # noqa: E731
    _, (_, _, seen) = with_gradient(run, (x, *weight))
    dy = 1e-3 * normal(9, N, F)
    np.testing.assert_array_equal(seen[:, 0], [np.abs(t).max() for t in (x, w, dy)])
    assert not seen[:, 1].numpy().any()

    experts, (x, gates, gate_up, down) = expert_inputs()
    first, second = delayed(gate_up, 0.5, 10.0, 10.0), delayed(down, 1e3, 10.0, 1e-6)
    run = lambda x, a, b, c, d: fp8_experts(  # noqa: E731
        x, gates, experts, DelayedWeight(a, b), DelayedWeight(c, d), recipe=recipe, multiple=16, fuse=fuse
    )
    _, (_, _, one, _, two) = with_gradient(run, (x, *first, *second))
    np.testing.assert_array_equal(one[:2, 0], [np.abs(x).max(), np.abs(gate_up).max()])
    np.testing.assert_array_equal(two[1:, 0], [np.abs(down).max(), np.abs(1e-3 * normal(9, 40, D)).max()])
    assert 0 < one[2, 0] and 0 < two[0, 0]


def test_histories_hold_finite_numbers_only():
    x, w = normal(0, 4, 6), normal(1, 6, 5)
    for bad in (np.inf, np.nan):
        x[1, 2] = bad
        weight = delayed(w, 0.5, 0.25, 1e-6)
        run = lambda x, *d: delayed_linear(x, DelayedWeight(*d), recipe=RECIPES["delayed"], fuse=True)  # noqa: E731
        _, (_, _, seen) = with_gradient(run, (x, *weight))
        assert seen[INPUT, 0] == 0 and seen[WEIGHT, 0] > 0 and np.isfinite(seen).all()
