"""Linear maps and the dense feed-forward layer."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import count_params
from dsv3.nn.linear import MLPParams, linear_apply, mlp_apply, mlp_specs
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, normal
from tests.small import random_params


@SWEEP
@given(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_linear(lead, width, out, heads, biased):
    shape = (width, 2, out) if heads else (width, out)
    x, weight = normal(0, *lead, width), normal(1, *shape)
    bias = normal(2, shape[1] * out) if heads else normal(2, out)
    want = x.astype(np.float64) @ weight.reshape(width, -1) + (bias if biased else 0.0)
    assert_close(linear_apply(x, weight, bias if biased else ()), want)


def test_linear_gradient():
    check_gradient(
        linear_apply, lambda x, w, b: x @ w.reshape(4, -1) + b, [normal(0, 2, 3, 4), normal(1, 4, 2, 3), normal(2, 6)]
    )


def test_weight_is_cast_to_the_input():
    x = tf.cast(normal(0, 2, 4), tf.bfloat16)
    assert linear_apply(x, normal(1, 4, 3), normal(2, 3)).dtype == tf.bfloat16


def test_unknown_dims_keep_what_is_known():
    spec = tf.TensorSpec([None, 3, 4])
    fn = tf.function(lambda x: linear_apply(x, tf.ones([4, 2])), input_signature=[spec], autograph=False)
    assert fn.get_concrete_function().structured_outputs.shape.as_list() == [None, 3, 2]
    assert_close(fn(np.ones([2, 3, 4], np.float32)), np.full([2, 3, 2], 4.0))


@pytest.mark.parametrize("fuse", [False, True])
def test_mlp(fuse):
    specs = mlp_specs(6, 5, std=0.1)
    assert count_params(specs) == 6 * 10 + 5 * 6
    params, x = random_params(specs), normal(0, 2, 3, 6)

    def oracle(x, gate_up, down):
        return oracles.mlp(MLPParams(gate_up, down), x)

    leaves = [p.numpy() for p in params]
    assert_close(mlp_apply(params, tf.constant(x), fuse=fuse), oracle(x, *leaves))
    check_gradient(lambda x, *p: mlp_apply(MLPParams(*p), x, fuse=fuse), oracle, [x, *leaves])


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"linear_apply: `weight` has shape \(5, 2\), want \(4, \?\) \[D, F\]"):
        linear_apply(tf.zeros([3, 4]), tf.zeros([5, 2]))
