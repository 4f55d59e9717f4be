"""The bridge between networks (`nets`) and chips (`hw`): tracing, joint optimisation, reports, the command line.

Names are imported when they are first used, so that `import codesign` and `--help` do not wait for JAX.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codesign.config import Config, load_config
    from codesign.design import DesignSpace
    from codesign.evaluation import evaluate_chip
    from codesign.runner import run
    from codesign.tracing import Workload, trace

__all__ = ["Config", "DesignSpace", "Workload", "evaluate_chip", "load_config", "run", "trace"]

_MODULES = {
    "Config": "config",
    "DesignSpace": "design",
    "Workload": "tracing",
    "evaluate_chip": "evaluation",
    "load_config": "config",
    "run": "runner",
    "trace": "tracing",
}
_MARKER = '__distribution__ = "jax-codesign"'


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _check_packages() -> None:
    """Other distributions ship import packages of these names, and installers overwrite silently."""
    for package in ("hw", "nets"):
        spec = find_spec(package)
        origin = None if spec is None else spec.origin
        if origin is None or _MARKER not in Path(origin).read_text(encoding="utf-8"):
            raise ImportError(
                f"expected the package {package!r} of jax-codesign, got {origin}; another distribution has taken its "
                f"place: reinstall jax-codesign in an environment of its own"
            )


_check_packages()
