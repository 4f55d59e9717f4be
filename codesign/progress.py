"""How far a run is, on the terminal: one bar over everything, with the time left, and the stage that is running."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars


class Progress(Protocol):
    """What a run tells while it goes on; a context manager around it."""

    def plan(self, stages: Sequence[tuple[str, int]]) -> None:
        """Name and number of steps of all stages to come."""

    def stage(self, name: str) -> None:
        """The next stage begins."""

    def advance(self, steps: int = 1, **metrics: float) -> None:
        """Steps of the stage are done; `metrics` are shown beside it. Several at once were done in an earlier run."""

    def message(self, text: str) -> None:
        """Say something above the bars."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class NullProgress:
    """A `Progress` that says nothing."""

    def plan(self, stages: Sequence[tuple[str, int]]) -> None: ...

    def stage(self, name: str) -> None: ...

    def advance(self, steps: int = 1, **metrics: float) -> None: ...

    def message(self, text: str) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class TerminalProgress:
    """Bars on a terminal; in a file or pipe one line when a stage ends."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self._console = console or Console(stderr=True)
        self._clock = clock
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._stages: dict[str, int] = {}
        self._name, self._done, self._metrics = "", 0, ""
        self._total_done, self._timed_done = 0, 0
        self._begun = self._stage_begun = clock()
        self._whole: TaskID | None = None
        self._current: TaskID | None = None

    def plan(self, stages: Sequence[tuple[str, int]]) -> None:
        """See `Progress`."""
        self._stages = dict(stages)
        self._begun = self._clock()
        self._whole = self.bars.add_task("whole run", total=sum(self._stages.values()), text="")

    def stage(self, name: str) -> None:
        """See `Progress`."""
        self._finish_stage()
        self._name, self._done, self._metrics, self._stage_begun = name, 0, "", self._clock()
        self._current = self.bars.add_task(name, total=self._stages.get(name, 0), text="")

    def advance(self, steps: int = 1, **metrics: float) -> None:
        """See `Progress`."""
        self._done += steps
        self._total_done += steps
        self._timed_done += steps if steps == 1 else 0
        if metrics:
            self._metrics = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        if self._current is not None and self._whole is not None:
            self.bars.update(self._current, completed=self._done, text=self._metrics)
            self.bars.update(self._whole, completed=self._total_done, text=self._time_left())

    def message(self, text: str) -> None:
        """See `Progress`."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._finish_stage()
        self.bars.stop()

    def _finish_stage(self) -> None:
        """Replace the bar of a finished stage by a line."""
        if self._current is None:
            return
        self.bars.remove_task(self._current)
        self._current = None
        seconds = self._clock() - self._stage_begun
        self.message(f"{self._name}: {self._done} steps, {_duration(seconds)}  {self._metrics}".rstrip())

    def _time_left(self) -> str:
        """From the mean time of the steps that were timed: steps of an earlier run took none."""
        if not self._timed_done:
            return ""
        left = sum(self._stages.values()) - self._total_done
        return f"{_duration(left * (self._clock() - self._begun) / self._timed_done)} left"


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C, so that a loop can stop between two steps with a state worth saving.

    Yields:
      A function that tells whether Ctrl-C was pressed. Pressed a second time, it interrupts at once.
    """
    pressed = False

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():  # only that one may receive signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _duration(seconds: float) -> str:
    """Such as 8 s, 2 min 05 s, 1 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
