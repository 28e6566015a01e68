"""`fused`: element-wise chains compiled as one XLA kernel inside a plain graph, with a recomputing backward.

On a CPU TensorFlow runs a chain such as RMSNorm op by op, each with its own pass over memory, while matrix products are
fastest outside XLA (oneDNN). So only the chains are compiled. The gradient is again one compiled kernel, or a few that
are written by hand: it recomputes the chain from its inputs, so nothing in between is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dsv3.ops.reduce import cpu_kernel


def fused(fn: Callable[..., Any] | None = None, *, gradient: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Wraps a pure function of tensors, so that `fuse=True` compiles it and its gradient.

    `fn(*tensors, **static)` takes tensors by position and Python scalars by keyword. The result takes one more keyword,
    `fuse` (default False). Without it, or inside a function that is compiled as a whole, `fn` simply runs.

    The compiled form is differentiable once. Where the kernel that differentiation makes is slow, `gradient` is written by
    hand: `gradient(*tensors, *grads, **static)` returns a gradient, or `None`, for each tensor. It is a plain function,
    whose own chains are `fused`.
    """
    if fn is None:
        return functools.partial(fused, gradient=gradient)

    @functools.lru_cache(maxsize=4096)
    def compiled(static: tuple[tuple[str, Any], ...], signature: tuple[tf.TensorSpec, ...]) -> Callable[..., Any]:
        kwargs = dict(static)

        def forward(*tensors):
            with cpu_kernel():
                return fn(*tensors, **kwargs)

        def backward(tensors, grads):
            with cpu_kernel(), tf.GradientTape() as tape:
                tape.watch(tensors)
                out = fn(*tensors, **kwargs)
            return tape.gradient(out, tensors, grads, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        # One concrete function for each signature: unlike shapes are not a retracing.
        forward = tf.function(forward, jit_compile=True, autograph=False).get_concrete_function(*signature)

        @functools.cache
        def compiled_backward():
            outs = tf.nest.map_structure(
                lambda t: tf.TensorSpec(t.shape, t.dtype), tf.nest.flatten(forward.structured_outputs)
            )
            fun = tf.function(backward, jit_compile=True, autograph=False)
            return fun.get_concrete_function(list(signature), outs[0] if len(outs) == 1 else outs)

        @tf.custom_gradient
        def call(*tensors):
            def grad(*grads):
                if gradient is not None:
                    return gradient(*tensors, *grads, **kwargs)
                outs = grads[0] if len(grads) == 1 else list(grads)
                found = compiled_backward()(list(tensors), outs)
                return [g if t.dtype.is_floating else None for g, t in zip(found, tensors)]

            return forward(*tensors), grad

        return call

    @functools.wraps(fn)
    def wrapper(*tensors, fuse: bool = False, **static):
        if not fuse or not any(isinstance(t, (tf.Tensor, tf.Variable)) for t in tensors):
            return fn(*tensors, **static)
        tensors = [tf.convert_to_tensor(t) for t in tensors]
        signature = tuple(tf.TensorSpec(t.shape, t.dtype) for t in tensors)
        return compiled(tuple(sorted(static.items())), signature)(*tensors)

    return wrapper
