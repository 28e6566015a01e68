"""Named errors for wrong shapes and values, raised before any work is done.

A message names the function, the argument, what came, what was wanted and the letters of
`dsv3.typing`::

    router_update_bias: `load` has shape (4,), want (3,) [E]

Only static facts are looked at, so the checks cost nothing in a compiled step. TensorFlow is loaded by the checks that look
at tensors: `check` serves packages that do without it, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def static_shape(value: Any) -> tuple[int | None, ...] | None:
    """Returns what is known of a tensor's shape: a tuple with `None` for unknown dims, or `None` for unknown rank."""
    import tensorflow as tf

    shape = getattr(value, "shape", None)
    if shape is None:
        shape = tf.convert_to_tensor(value).shape
    shape = tf.TensorShape(shape)
    return None if shape.rank is None else tuple(shape.as_list())


class Dims:
    """Checks the shapes of one function's arguments and remembers what each letter stands for.

    >>> dims = Dims("mlp_apply", D=4)
    >>> dims("x", np.zeros([2, 3, 4]), "B T D")
    >>> dims.B
    2
    """

    def __init__(self, function: str, **known: int | None):
        self._function = function
        self._known: dict[str, int | None] = dict(known)

    def __getattr__(self, letter: str) -> int | None:
        try:
            return self._known[letter]
        except KeyError as e:
            raise AttributeError(letter) from e

    def __call__(self, argument: str, value: Any, letters: str) -> None:
        """Raises `ValueError` unless `value` has the dims that `letters` name, e.g. `"B T D"` or `"B T 2"`."""
        names = letters.split()
        got = static_shape(value)
        if got is None:
            return
        want = tuple(int(n) if n.isdigit() else self._known.get(n) for n in names)
        same = len(got) == len(want) and all(g is None or w is None or g == w for g, w in zip(got, want))
        if not same:
            shown = ", ".join("?" if w is None else str(w) for w in want) + ("," if len(want) == 1 else "")
            raise ValueError(
                f"{self._function}: `{argument}` has shape {_show(got)}, want ({shown}) [{', '.join(names)}]"
            )
        for name, size in zip(names, got):
            if not name.isdigit() and (size is not None or name not in self._known):
                self._known[name] = size


def _show(shape: tuple[int | None, ...]) -> str:
    inner = ", ".join("?" if s is None else str(s) for s in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def check(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` when the (Python) condition is false."""
    if not condition:
        raise ValueError(message)


def check_choice(function: str, argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        wanted = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{function}: `{argument}` is {value!r}, want one of {wanted}")


def check_integer(function: str, argument: str, value: Any) -> None:
    """Raises `ValueError` unless `value` has an integer dtype."""
    import tensorflow as tf

    dtype = tf.as_dtype(getattr(value, "dtype", None) or tf.convert_to_tensor(value).dtype)
    if not dtype.is_integer:
        raise ValueError(f"{function}: `{argument}` has dtype {dtype.name}, want an integer dtype")


def check_same_tree(function: str, argument: str, got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless two path-keyed trees have the same paths."""
    missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing or extra:
        raise ValueError(
            f"{function}: `{argument}` does not have the expected structure: "
            f"missing {missing[:5] or 'nothing'}, unexpected {extra[:5] or 'nothing'}"
        )


def check_type(function: str, argument: str, value: Any, kind: type) -> None:
    """Raises `ValueError` unless `value` is of a type, such as a layer's own config or parameters."""
    if not isinstance(value, kind):
        raise ValueError(f"{function}: `{argument}` is of type {type(value).__name__}, want {kind.__name__}")


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at now (an eager tensor or an array, not a symbolic tensor)."""
    import tensorflow as tf

    return hasattr(value, "numpy") or not tf.is_tensor(value)


def check_token_ids(function: str, argument: str, tokens: Any, vocab_size: int) -> None:
    """Raises `ValueError` when concrete token ids fall outside `[0, vocab_size)`; symbolic ones pass.

    TensorFlow's gather returns zeros for a bad index on a GPU, so a wrong tokeniser would train silently.
    """
    check_integer(function, argument, tokens)
    if not is_concrete(tokens):
        return
    ids = tokens.numpy() if hasattr(tokens, "numpy") else np.asarray(tokens)
    if ids.size == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"{function}: `{argument}` holds token id {bad}, want ids in [0, {vocab_size}) [V]")
