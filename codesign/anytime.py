"""Searches that have a legal best at all times: limits of time and evaluations, progress, an interrupt that keeps the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple


class Effort(NamedTuple):
    """How much a search may do: evaluations of each operation, and seconds on the clock."""

    evaluations: int = 10_000
    seconds: float = math.inf


class Progress(NamedTuple):
    """Where a search is: evaluations of each operation, seconds, best value so far."""

    evaluations: int
    seconds: float
    value: float


def keep_searching[Best](
    step: Callable[[int, Best | None], Best],
    evaluations: int,
    effort: Effort,
    value: Callable[[Best], float],
    on_progress: Callable[[Progress], None] | None = None,
) -> Best:
    """Takes steps, each from the best of the one before, until the effort is spent; at least one.

    Ctrl-C ends the search with the best so far, or, before there is one, as it would anything else.

    Args:
      step: number of the step and the best so far to a best that is no worse.
      evaluations: what one step does for each operation.
      effort: when to stop; a step that has begun is not cut short.
      value: of a best, for the progress.
      on_progress: called after every step.
    """
    begun, best = time.monotonic(), None
    for i in range(max(1, effort.evaluations // evaluations)):
        if best is not None and time.monotonic() - begun >= effort.seconds:
            break
        try:
            best = step(i, best)
        except KeyboardInterrupt:
            if best is None:
                raise
            break
        if on_progress is not None:
            on_progress(Progress((i + 1) * evaluations, time.monotonic() - begun, value(best)))
    assert best is not None  # the first step always runs
    return best
