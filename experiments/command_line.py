"""Command lines of the experiments: a mistake is told in one line, with exit code 2, as by `jax-codesign`."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from codesign.cli import exit_code, read_arguments
from codesign.config import check_range


def run(main: Callable[..., int | None], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with what the command line says, within the ranges of its annotations.

    Args:
      main: of an experiment; its signature and docstring make the options and their help.
      arguments: in place of those of the process.

    Returns:
      The exit code, see `codesign.cli.exit_code`.
    """
    hints = get_type_hints(main, include_extras=True)

    @functools.wraps(main)
    def checked(*given: Any, **options: Any) -> Callable[[], int | None]:
        for name, value in inspect.signature(main).bind(*given, **options).arguments.items():
            check_range(f"--{name.replace('_', '-')}", hints[name], value, "the command line")
        return functools.partial(main, *given, **options)

    program = f"python -m experiments.{Path(sys.argv[0]).stem}"
    return exit_code(lambda: read_arguments(lambda: tyro.cli(checked, prog=program, args=arguments), program)())
