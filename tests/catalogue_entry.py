"""What the catalogue says of one public function."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dsv3 import tree


@dataclasses.dataclass(frozen=True)
class Entry:
    """One public function.

    Attributes:
      name: where it is defined, e.g. `dsv3.nn.mla.mla_apply`.
      inputs: name → example, as a function, so that nothing is made before it is needed: arrays and trees of arrays.
      static: name → what is bound by closure: configs, numbers, strings. A function for what has to be made first.
      wrong: name of an input → a value of a wrong shape, which the function must refuse by its own and the input's name.
      xla: changes to `static` for a compilation with XLA.
      no_xla: why a function is not compiled with XLA.
      unknown: inputs whose leading dim a graph need not know.
      any_shape: for functions that accept every shape.
      python: for functions of Python values only: neither graph nor XLA nor shapes apply to them.
      tolerance: largest difference between ways to run it, relative to the largest entry of a result.
    """

    name: str
    inputs: Callable[[], dict[str, Any]] = dict
    static: dict[str, Any] | Callable[[], dict[str, Any]] = dataclasses.field(default_factory=dict)
    wrong: Callable[[], dict[str, Any]] = dict
    xla: dict[str, Any] = dataclasses.field(default_factory=dict)
    no_xla: str = ""
    unknown: tuple[str, ...] = ()
    any_shape: bool = False
    python: bool = False
    tolerance: float = 2e-6

    @property
    def bound(self) -> dict[str, Any]:
        return self.static() if callable(self.static) else self.static

    @property
    def fn(self) -> Callable[..., Any]:
        module, _, function = self.name.rpartition(".")
        return getattr(importlib.import_module(module), function)


def name_of(fn: Callable[..., Any]) -> str:
    """Returns where a function is defined, e.g. `dsv3.nn.mla.mla_apply`."""
    return f"{fn.__module__}.{fn.__qualname__}"


def arrays(values: Any) -> Any:
    """Returns a tree with NumPy arrays for tensors."""
    return tree.map_leaves(lambda v: v.numpy() if tf.is_tensor(v) else v, values)
