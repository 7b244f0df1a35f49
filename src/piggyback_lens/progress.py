"""Progress of long calls: one line with the time left, in terminals and notebooks; silent where nobody watches.

A public function that may take more than a few seconds is decorated with `shows`, which honours its `progress=`. What
runs inside counts its steps with `track` or `counting`. The outermost call names the line and owns its place; within
what is counted nothing else is shown.
"""

import html
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import wraps
from threading import Event, Thread
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from piggyback_lens.errors import visible

Item = TypeVar("Item")
P = ParamSpec("P")
R = TypeVar("R")
PATIENCE = 1.0
"""Seconds of a call after which its line is shown: what is done by then needs none."""
TICK = 0.5
"""Seconds between two pictures of a line."""
BAR = 24
"""Characters of a bar."""


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def shown() -> bool:
    """Whether somebody watches: a terminal or a notebook."""
    return sys.stderr.isatty() or in_notebook()


def say(text: str) -> None:
    """One line that stays: on standard error, in a log file too; in a notebook as ordinary output."""
    stream = sys.stdout if in_notebook() else sys.stderr
    stream.write(visible(text) + "\n")
    stream.flush()


def say_stage(text: str) -> None:
    """As `say`, but in a notebook, where the line of progress names the stage: there it would only be in the way."""
    if not in_notebook():
        say(text)


if in_notebook():
    # Libraries import tqdm's bars of ipywidgets, of which nothing here needs any, and warn where they are not there.
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.filterwarnings("ignore", "IProgress not found")
        import tqdm.auto  # noqa: F401


# ---------------------------------------------------------------- what is counted


def track(items: Iterable[Item], stage: str | None = None, *, sizes: Sequence[int] | None = None) -> Iterator[Item]:
    """Pass `items` through, counting them on the line of the call that runs.

    Args:
        items: what to iterate over; with `sizes`, as many.
        stage: part of the call, named after its label.
        sizes: how much each item counts, e.g. rows per batch.
    """
    items = list(items)
    weights = list(sizes) if sizes is not None else [1] * len(items)
    with counting(sum(weights), stage) as advance:
        for item, weight in zip(items, weights, strict=True):
            yield item
            advance(weight)


@contextmanager
def counting(total: int | None, stage: str | None = None) -> Iterator[Callable[[int], None]]:
    """A line as of `track`; yields the function that tells it how many more are done.

    A total of None or 0 is unknown: what is done is counted without an end.
    """
    call = _NOW.get()
    if call is None or call.label is None or not shown():
        yield lambda _: None
        return
    line = _Line(call.label if stage is None else f"{call.label}: {stage}", total)
    _NOW.set(replace(call, label=None))
    call.screen.begin(line)
    try:
        yield line.advance
    finally:
        call.screen.end()
        _NOW.set(call)


@dataclass
class _Line:
    """How far something is."""

    label: str
    total: int | None
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    at: float = 0.0  # when it advanced last

    def advance(self, more: int) -> None:
        self.done += more
        self.at = time.monotonic()

    @property
    def count(self) -> str:
        """How many are done, of how many where that is known."""
        return f"{self.done} of {self.total}" if self.total else str(self.done or "")

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes at the speed so far; None before anything is done."""
        if not self.done or not self.total:
            return None
        whole = (self.at - self.began) / self.done * (self.total - self.done)
        return max(0.0, whole - (time.monotonic() - self.at))

    @property
    def times(self) -> str:
        """Count, time gone and time left."""
        gone = f"{_clock(time.monotonic() - self.began)} gone"
        left = "" if self.left is None else f", {_clock(self.left)} left"
        return f"{self.count}, {gone}{left}" if self.count else gone


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ---------------------------------------------------------------- calls


@dataclass(frozen=True)
class _Call:
    """The public function that runs: its label (None shows nothing), and where its line is drawn."""

    label: str | None
    screen: "_Screen"

    def within(self, progress: bool | str) -> "_Call":
        """Another public function that this one calls."""
        if self.label is None or progress is True:
            return self
        return replace(self, label=None if progress is False else f"{self.label}: {visible(progress)}")


_NOW: ContextVar[_Call | None] = ContextVar("_NOW", default=None)


def shows(label: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let `progress=` of a function decide what is shown while it runs: True this label, a text that, False nothing.

    Within another such function it is that one's line: nothing where that shows nothing, else with a text added.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            progress: Any = kwargs.get("progress", True)
            outer = _NOW.get()
            if outer is not None:
                _NOW.set(outer.within(progress))
                try:
                    return function(*args, **kwargs)
                finally:
                    _NOW.set(outer)
            own = None if progress is False else label if progress is True else visible(progress)
            screen = _Notebook() if in_notebook() else _Terminal()
            _NOW.set(_Call(own, screen))
            try:
                result = function(*args, **kwargs)
                screen.close(f"{own}: done in")
            except BaseException:
                screen.close(f"{own}: stopped after")
                raise
            finally:
                _NOW.set(None)
            return result

        run.shows = label  # type: ignore[attr-defined]
        return run

    return decorated


# ---------------------------------------------------------------- where a line is drawn


class _Screen(ABC):
    """Draws the line of one call, from a thread, so that its clock goes on during a long step."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._line: _Line | None = None
        self._stop = Event()
        self._thread: Thread | None = None

    def begin(self, line: _Line) -> None:
        self._line, self._stop = line, Event()
        self._thread = Thread(target=self._run, args=(line, self._stop), daemon=True)
        self._thread.start()

    def _run(self, line: _Line, stop: Event) -> None:
        wait = max(0.0, PATIENCE - (time.monotonic() - self.began))
        while not stop.wait(wait):
            self.draw(line)
            wait = TICK

    def end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @abstractmethod
    def draw(self, line: _Line) -> None:
        """Show a line as it is now."""

    def close(self, how: str) -> None:  # noqa: B027
        """Say how the call ended, where something was shown."""


class _Terminal(_Screen):
    """A bar of rich, which goes away when it is full."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._task: Any = None

    def draw(self, line: _Line) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(BAR),
                TextColumn("{task.fields[times]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
            self._task = self._bar.add_task(line.label, total=line.total, times="")
            self._bar.start()
        self._bar.update(self._task, completed=line.done, times=line.times, refresh=True)

    def end(self) -> None:
        super().end()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Notebook(_Screen):
    """One output of the cell, drawn again and again: HTML that needs no widget, and plain text beside it."""

    def __init__(self) -> None:
        super().__init__()
        self._place = uuid4().hex
        self._is_there = False

    def draw(self, line: _Line) -> None:
        full = BAR * line.done // line.total if line.total else 0
        bar = "█" * full + "░" * (BAR - full)
        # Without a value the browser's bar moves: something happens, and nothing is done yet.
        value = f' max="{line.total}" value="{line.done}"' if line.total and line.done else ""
        page = (
            f'<div style="font-size: 13px">{html.escape(line.label)} <progress{value} '
            f'style="width: 16em; vertical-align: middle"></progress> {line.times}</div>'
        )
        self._show({"text/plain": f"{line.label} {bar} {line.times}", "text/html": page})

    def close(self, how: str) -> None:
        if self._is_there:
            text = f"{how} {_clock(time.monotonic() - self.began)}"
            at = self._line if self._line and "stopped" in how else None
            text += f", at {at.count} ({at.label})" if at and at.count else ""
            page = f'<div style="font-size: 13px; opacity: 0.7">{html.escape(text)}</div>'
            self._show({"text/plain": text, "text/html": page})

    def _show(self, data: Mapping[str, str]) -> None:
        from IPython.display import display

        display(data, raw=True, display_id=self._place, update=self._is_there)  # type: ignore[no-untyped-call]
        self._is_there = True
