"""ParamSpec: the one description of a parameter from which everything else follows.

Shapes, initialisers, parameter counts, layouts and the names in a checkpoint are all read from a tree of `ParamSpec`s
that mirrors the parameters.
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from dsv3 import tree
from dsv3.typing import Tree


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes, initialiser and storage dtype of one parameter.

    Attributes:
      shape: the dims, the leading one being the layer for stacked parameters.
      axes: a logical name for each dim (`"layer"`, `"expert"`, `"embed"`, `"heads"`, ...); rules map them to mesh axes.
      init: `"normal"` (mean 0, standard deviation `std`), `"zeros"` or `"ones"`.
      std: the standard deviation of `"normal"`.
      dtype: the name of a fixed storage dtype, or `None` for a parameter that may be stored in the model's dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    std: float = 0.02
    dtype: str | None = None

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"ParamSpec: shape {self.shape} has {len(self.shape)} dims, axes {self.axes} name others")
        if self.init not in ("normal", "zeros", "ones"):
            raise ValueError(f"ParamSpec: `init` is {self.init!r}, want 'normal', 'zeros' or 'ones'")

    @property
    def size(self) -> int:
        """The number of scalars."""
        return math.prod(self.shape)


def stack_specs(specs: Tree, layers: int) -> Tree:
    """Returns the specs of `layers` layers stacked along a new leading dim, or `()` for none."""
    if layers == 0:
        return ()
    return tree.map_leaves(
        lambda s: dataclasses.replace(s, shape=(layers, *s.shape), axes=("layer", *s.axes)), specs
    )


def count_params(specs: Tree) -> int:
    """Returns the number of scalars that a tree of specs describes."""
    return sum(s.size for s in tree.flatten(specs))


def init_params(key: tf.Tensor, specs: Tree, dtype: tf.DType | str = tf.float32) -> Tree:
    """Draws the parameters that a tree of specs describes.

    Each leaf's key is folded from its path, so that adding a parameter moves no other's initial value.

    Args:
      key: `[2]` int, the random key.
      specs: a tree of `ParamSpec`.
      dtype: storage dtype of the leaves whose spec names none. Values are drawn in float32 and then cast.

    Returns:
      A tree of tensors that mirrors `specs`.
    """
    key = tf.convert_to_tensor(key)
    if key.shape.rank != 1 or key.shape[0] != 2 or not key.dtype.is_integer:
        raise ValueError(f"init_params: `key` has shape {tuple(key.shape)} and dtype {key.dtype.name}, want int (2,)")

    def draw(path: str, spec: ParamSpec) -> tf.Tensor:
        target = tf.as_dtype(spec.dtype or dtype)
        if spec.init != "normal":
            return tf.cast(tf.fill(spec.shape, 1.0 if spec.init == "ones" else 0.0), target)
        leaf_key = tf.random.experimental.stateless_fold_in(key, tree.path_hash(path))
        return tf.cast(tf.random.stateless_normal(spec.shape, leaf_key, stddev=spec.std), target)

    return tree.map_with_path(draw, specs)
