"""Packages that only some commands need, from the optional dependencies of pyproject.toml."""

import importlib
from types import ModuleType


def require(name: str, extra: str) -> ModuleType:
    """Import a package.

    Raises:
      ValueError: it is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"expected the package {name}, got {error}; install it with pip install 'jax-codesign[{extra}]'"
        ) from None
