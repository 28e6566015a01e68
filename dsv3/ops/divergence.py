"""How far a student's next-token distribution is from a teacher's, without the logits of many tokens at once.

The teacher is given by its hidden states and its head, or by its K most likely tokens, as they are stored. With those, all
other tokens are one outcome more: both distributions are of K + 1 outcomes, and what is computed is a true divergence of
the two. By the data-processing inequality it is at most the one over the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dsv3.checks import Dims, check, check_choice, check_token_ids, is_concrete
from dsv3.graph import plain
from dsv3.ops.chunks import in_chunks
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_max, row_sum
from dsv3.typing import TensorLike

KINDS = ("forward", "reverse", "jsd")


class TopK(NamedTuple):
    """The K most likely next tokens of a distribution over V, for each token.

    Attributes:
      ids: `[..., K]` int32, the likeliest first; each token at most once.
      logprobs: `[..., K]` float32, in nats, of the softmax over all V at the temperature.
      rest: `[...]` float32, the log-probability of all other tokens together; −inf where K = V. It is stored because one
        minus the sum of the others has no correct digit where a model is sure.
    """

    ids: TensorLike
    logprobs: TensorLike
    rest: TensorLike


@plain
def top_k_logprobs(
    hidden: TensorLike, head: TensorLike, *, k: int, temperature: TensorLike = 1.0, chunk: int = 1024
) -> TopK:
    """The K most likely tokens of `softmax(hidden @ head / temperature)`, and what the others have together.

    Args:
      hidden: `[N, D]`, static N.
      head: `[D, V]`, in `hidden`'s dtype.
      k: how many, at most V. Of equal logits the one with the smaller id comes first.
      temperature: a number or a scalar tensor above 0. A divergence has to be asked for at the same one.
      chunk: tokens whose logits exist at one time.

    Returns:
      `TopK` of `[N, K]`, without a gradient.

    >>> found = top_k_logprobs([[1.0]], [[0.0, 2.0, 1.0]], k=2)
    >>> found.ids.numpy().tolist(), [round(float(x), 3) for x in (*found.logprobs[0], found.rest[0])]
    ([[1, 2]], [-0.408, -1.408, -2.408])
    """
    dims = Dims("top_k_logprobs")
    dims("hidden", hidden, "N D")
    dims("head", head, "D V")
    check(chunk > 0, f"top_k_logprobs: `chunk` is {chunk}, want > 0 tokens")
    check(dims.N is not None, "top_k_logprobs: `hidden` has an unknown number of tokens, want a static N")
    most = "V" if dims.V is None else dims.V
    check(1 <= k and (dims.V is None or k <= dims.V), f"top_k_logprobs: `k` is {k}, want 1 to {most} [V]")
    temperature = _temperature("top_k_logprobs", temperature)
    hidden, head = tf.stop_gradient(tf.convert_to_tensor(hidden)), tf.stop_gradient(tf.convert_to_tensor(head))
    n = hidden.shape[0]
    size = min(chunk, max(n, 1))
    chunks = -(-n // size)
    if not n:
        return TopK(tf.zeros([0, k], tf.int32), tf.zeros([0, k]), tf.zeros([0]))
    pieces = tf.reshape(tf.pad(hidden, [[0, chunks * size - n], [0, 0]]), [chunks, size, hidden.shape[1]])

    def one(piece: tf.Tensor) -> TopK:
        scaled = _scaled(tf.matmul(piece, head), temperature)
        values, ids = tf.math.top_k(scaled, k)
        lse = _lse(scaled)
        return TopK(ids, values - lse, (_lse(_without(scaled, ids)) - lse)[:, 0])

    if chunks == 1:
        return one(pieces[0])
    kinds = TopK(tf.int32, tf.float32, tf.float32)
    found = tf.map_fn(one, pieces, fn_output_signature=kinds, parallel_iterations=1)
    return TopK(*(tf.reshape(x, [chunks * size, *x.shape[2:]])[:n] for x in found))


@plain
def divergence(
    hidden: TensorLike, head: TensorLike, teacher: TopK | tuple[TensorLike, TensorLike], *, kind: str = "forward",
    mix: float = 0.5, temperature: TensorLike = 1.0, chunk: int = 1024, keep: int = 0, fuse: bool = False,
) -> tf.Tensor:  # fmt: skip
    """Divergence between a teacher's next-token distribution p and the student's q, at each token, in nats.

    `q = softmax(hidden @ head / temperature)`, p likewise, and

    - forward: `KL(p‖q) = Σ p·log(p/q)`: the student must have what the teacher has;
    - reverse: `KL(q‖p)`: the student must not have what the teacher has not;
    - jsd: `β·KL(p‖m) + (1−β)·KL(q‖m)` with `m = β·p + (1−β)·q` and β = `mix`, which stays below log 2.

    Logits of student and teacher exist for `chunk` tokens at a time, forward and backward (which computes them again, unless
    the student's are kept). The gradient falls with 1/temperature and the logits' differences too: a loss usually multiplies
    by temperature², so that its gradient keeps its size. That is left to the loss.

    Args:
      hidden: `[N, D]`, static N.
      head: `[D, V]`, in `hidden`'s dtype.
      teacher: `TopK` of `[N, K]`, of the same temperature; it is made to sum to 1 again, so that its numbers may be rounded.
        Or `(hidden [N, E], head [E, V])` of the teacher, for the divergence over all V.
      kind: "forward", "reverse" or "jsd".
      mix: β of "jsd", in (0, 1).
      temperature: a number or a scalar tensor above 0, without a gradient; of both.
      chunk, keep: as of `token_nll`; the student's logits.
      fuse: compile the softmax kernels (not under XLA).

    Returns:
      `[N]` float32, differentiable (once) in the student's `hidden` and `head`. Infinite where the definition is: where the
      one in front has what the other has not at all.

    References: arXiv:1503.02531 section 2 (temperature); arXiv:2306.13649 section 2 (the three divergences).

    >>> round(float(divergence([[1.0]], [[0.0, 2.0]], ([[1.0]], [[0.0, 0.0]]), kind="reverse")[0]), 3)
    0.328
    """
    teacher = _checked(hidden, head, teacher, kind, mix, chunk)
    temperature = _temperature("divergence", temperature)
    how = {"kind": kind, "mix": mix if kind == "jsd" else 0.5, "fuse": fuse}
    if isinstance(teacher, TopK):
        beside = [tf.cast(teacher.ids, tf.int32), *(tf.cast(x, tf.float32) for x in teacher[1:])]
        forward, backward = _chunk_of_top_k, _chunk_of_top_k_grad
    else:
        of_teacher = tf.stop_gradient(tf.convert_to_tensor(teacher[1]))
        beside = [tf.convert_to_tensor(teacher[0])]
        forward, backward = _chunk_of_all, _chunk_of_all_grad

    def given(*known):
        return known if isinstance(teacher, TopK) else (tf.matmul(known[0], of_teacher),)

    count = len(beside)
    found = in_chunks(
        hidden, head, beside, chunk=chunk, keep=keep, fuse=fuse, outputs=1,
        forward=lambda logits, *known: (forward(logits, temperature, *given(*known), **how),),
        backward=lambda logits, *known: backward(logits, temperature, known[count], *given(*known[:count]), **how),
    )  # fmt: skip
    return found[0]


def _checked(hidden, head, teacher, kind: str, mix: float, chunk: int) -> TopK | tuple[TensorLike, TensorLike]:
    """Checks the arguments of `divergence`."""
    dims = Dims("divergence")
    dims("hidden", hidden, "N D")
    dims("head", head, "D V")
    check(dims.N is not None, "divergence: `hidden` has an unknown number of tokens, want a static N")
    check(chunk > 0, f"divergence: `chunk` is {chunk}, want > 0 tokens")
    check_choice("divergence", "kind", kind, KINDS)
    check(kind != "jsd" or 0 < mix < 1, f"divergence: `mix` is {mix}, want above 0 and below 1")
    if isinstance(teacher, TopK):
        dims("teacher.ids", teacher.ids, "N K")
        dims("teacher.logprobs", teacher.logprobs, "N K")
        dims("teacher.rest", teacher.rest, "N")
        check(dims.K is None or dims.K > 0, "divergence: `teacher` has no token, want at least one [N, K]")
        few = dims.K is None or dims.V is None or dims.K <= dims.V
        check(few, f"divergence: `teacher` has {dims.K} tokens at a place, want at most the vocabulary's, {dims.V} [V]")
        check_token_ids("divergence", "teacher.ids", teacher.ids, dims.V if dims.V is not None else 2**31)
        return teacher
    pair = isinstance(teacher, tuple | list) and len(teacher) == 2
    check(pair, f"divergence: `teacher` is of type {type(teacher).__name__}, want TopK or (hidden [N, E], head [E, V])")
    dims("teacher hidden", teacher[0], "N E")
    dims("teacher head", teacher[1], "E V")
    return tuple(teacher)


def _temperature(function: str, temperature: TensorLike) -> tf.Tensor:
    if is_concrete(temperature):
        value = float(np.asarray(temperature))
        check(value > 0, f"{function}: `temperature` is {value}, want above 0")
    return tf.stop_gradient(tf.cast(temperature, tf.float32))


def _scaled(logits: tf.Tensor, temperature: tf.Tensor) -> tf.Tensor:
    """Logits over the temperature, below their largest."""
    logits = tf.cast(logits, tf.float32)
    return (logits - row_max(logits)) / temperature


def _lse(x: tf.Tensor) -> tf.Tensor:
    """`log Σ exp(x)` over the last dim, `[N, 1]`; −inf of a row of −inf."""
    top = row_max(x)
    top = tf.where(tf.math.is_finite(top), top, 0.0)
    return tf.math.log(row_sum(tf.exp(x - top))) + top


def _places(ids: tf.Tensor) -> tf.Tensor:
    """Row and column of each of `[N, K]` ids, `[N, K, 2]`."""
    rows = tf.broadcast_to(tf.expand_dims(tf.range(tf.shape(ids)[0]), 1), tf.shape(ids))
    return tf.stack([rows, ids], -1)


def _without(scaled: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """`[N, V]` with −inf at the ids `[N, K]`."""
    gone = tf.fill(tf.shape(ids), tf.constant(-np.inf, scaled.dtype))
    return tf.tensor_scatter_nd_update(scaled, _places(ids), gone)


def _outcomes(logits, temperature, ids, logprobs, rest):
    """Log-probabilities of K + 1 outcomes, the teacher's and the student's, and the scaled logits and log Σ of the rest."""
    scaled = _scaled(logits, temperature)
    lse, lse_rest = _lse(scaled), _lse(_without(scaled, ids))
    given = tf.concat([logprobs, tf.expand_dims(rest, 1)], 1)
    own = tf.concat([tf.gather(scaled, ids, batch_dims=1), lse_rest], 1) - lse
    return given - _lse(given), own, scaled, lse_rest


def _times(p: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`p·x`, and 0 where p is, whatever x; a p that is no number stays none."""
    return tf.where(tf.equal(p, 0.0), 0.0, p * x)


def _log_mix(logp, logq, mix):
    """`log(mix·p + (1 − mix)·q)`; −inf where both are 0."""
    a, b = logp + np.float32(np.log(mix)), logq + np.float32(np.log1p(-mix))
    high = tf.maximum(a, b)
    apart = tf.where(tf.math.is_finite(high), tf.minimum(a, b) - high, 0.0)
    return high + tf.math.log1p(tf.exp(apart))


def _distance(logp, logq, kind, mix):
    """The divergence `[N]` of distributions over the last dim, by their logarithms."""
    p, q = tf.exp(logp), tf.exp(logq)
    if kind == "forward":
        return row_sum(_times(p, logp - logq))[:, 0]
    if kind == "reverse":
        return row_sum(_times(q, logq - logp))[:, 0]
    log_mix = _log_mix(logp, logq, mix)
    return row_sum(mix * _times(p, logp - log_mix) + (1 - mix) * _times(q, logq - log_mix))[:, 0]


def _slopes(logp, logq, kind, mix):
    """The divergence's derivatives by the student's logit of each outcome: `q·(∂/∂q − Σ q·∂/∂q)`."""
    q = tf.exp(logq)
    if kind == "forward":
        return q - tf.exp(logp)
    against = logp if kind == "reverse" else _log_mix(logp, logq, mix)
    weighed = _times(q, logq - against)
    return (weighed - q * row_sum(weighed)) * (1.0 if kind == "reverse" else 1 - mix)


def _returned(d_scaled, d_out, temperature, dtype):
    """The gradient of logits; a token that does not count has none, whatever the teacher's numbers are there."""
    d_out = tf.expand_dims(d_out, 1)
    return tf.cast(tf.where(tf.equal(d_out, 0.0), 0.0, d_scaled * (d_out / temperature)), dtype)


@fused
def _chunk_of_top_k(logits, temperature, ids, logprobs, rest, *, kind, mix):
    logp, logq, _, _ = _outcomes(logits, temperature, ids, logprobs, rest)
    return _distance(logp, logq, kind, mix)


@fused
def _chunk_of_top_k_grad(logits, temperature, d_out, ids, logprobs, rest, *, kind, mix):
    logp, logq, scaled, lse_rest = _outcomes(logits, temperature, ids, logprobs, rest)
    slopes = _slopes(logp, logq, kind, mix)
    # The rest's slope is shared out by the student's probabilities within the rest.
    d_scaled = tf.exp(_without(scaled, ids) - lse_rest) * slopes[:, -1:]
    d_scaled = tf.tensor_scatter_nd_update(d_scaled, _places(ids), slopes[:, :-1])
    return _returned(d_scaled, d_out, temperature, logits.dtype)


def _both(logits, teacher_logits, temperature):
    scaled, given = _scaled(logits, temperature), _scaled(teacher_logits, temperature)
    return given - _lse(given), scaled - _lse(scaled)


@fused
def _chunk_of_all(logits, temperature, teacher_logits, *, kind, mix):
    return _distance(*_both(logits, teacher_logits, temperature), kind, mix)


@fused
def _chunk_of_all_grad(logits, temperature, d_out, teacher_logits, *, kind, mix):
    slopes = _slopes(*_both(logits, teacher_logits, temperature), kind, mix)
    return _returned(slopes, d_out, temperature, logits.dtype)
