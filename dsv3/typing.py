"""The letters that name tensor dimensions throughout dsv3, and a few type aliases.

A shape in a docstring or in an error message is written with these letters, `[B, T, D]`:

====== ==========================================================================
letter dimension
====== ==========================================================================
A      accumulation steps of one optimiser step
B      batch (sequences)
T      time: the tokens that are computed now (queries)
S      keys: cached tokens and those that are computed now
N      tokens, flattened: B·T
D      model width (hidden size)
H      attention heads
P      per-head query/key width without position ("nope")
R      per-head query/key width with rotary position ("rope"); even
U      per-head value width
Q      query latent width (q_lora_rank)
L      key/value latent width (kv_lora_rank)
W      cache entry width, L + R
E      routed experts
G      expert groups
K      experts chosen for a token
M      rows of the expert products, N·K
C      capacity: rows that an expert's buffer holds
F      intermediate width of a feed-forward layer
V      vocabulary
X      layers of one stack (dense or MoE), the leading dimension of stacked parameters
====== ==========================================================================

"axis" always means a mesh axis, "dim" a tensor's dimension.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Tree: TypeAlias = Any
"""Nested NamedTuples, tuples and dicts whose leaves are tensors (or specs, layouts, arrays)."""

TensorLike: TypeAlias = Any
"""A `tf.Tensor`, a `tf.Variable`, a NumPy array or nested Python numbers."""

LETTERS = "A B T S N D H P R U Q L W E G K M C F V X".split()
