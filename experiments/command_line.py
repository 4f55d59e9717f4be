"""Command lines of the experiments: a mistake is told in one line, with exit code 2, as by `jax-codesign`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import tyro

from codesign.cli import exit_code
from codesign.config import check_range


def run(main: Callable[..., int | None]) -> int:
    """Call `main` with what the command line says, within the ranges of its annotations.

    Returns:
      The exit code, see `codesign.cli.exit_code`.
    """
    hints = get_type_hints(main, include_extras=True)

    @functools.wraps(main)
    def checked(*arguments: Any, **options: Any) -> int | None:
        for name, value in inspect.signature(main).bind(*arguments, **options).arguments.items():
            check_range(f"--{name.replace('_', '-')}", hints[name], value, "the command line")
        return main(*arguments, **options)

    return exit_code(lambda: tyro.cli(checked))
