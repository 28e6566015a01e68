"""Packages that only some uses of dsv3 need: loaded when they are used, with one clear line where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def load_extra(function: str, module: str, extra: str = "data") -> ModuleType:
    """Loads a module of a package that is in an extra of dsv3.

    Args:
      function: who needs it, for the message.
      module: the module, such as `pyarrow.parquet`.
      extra: the extra of setup.cfg that installs it.

    Returns:
      The module.

    Raises:
      ValueError: it is not installed.

    >>> load_extra("read_corpus", "json").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        package = module.partition(".")[0]
        raise ValueError(f"{function}: {package!r} is not installed, want `pip install dsv3[{extra}]`") from None
