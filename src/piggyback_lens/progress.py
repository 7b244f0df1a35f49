"""One progress line with the time left; silent where nobody watches."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from piggyback_lens.errors import visible

Item = TypeVar("Item")


def shown() -> bool:
    """Whether somebody watches: a terminal or a notebook."""
    if sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def say(text: str) -> None:
    """One line on standard error, for stages of a long run; in a log file too."""
    sys.stderr.write(visible(text) + "\n")
    sys.stderr.flush()


def track(items: Iterable[Item], label: str | None, *, sizes: Sequence[int] | None = None) -> Iterator[Item]:
    """Pass `items` through, showing a bar with the label, the count and the time left.

    Args:
        items: what to iterate over; with `sizes`, as many.
        label: None shows nothing.
        sizes: how much each item counts, e.g. rows per batch.
    """
    items = list(items)
    weights = list(sizes) if sizes is not None else [1] * len(items)
    with counting(sum(weights), label) as advance:
        for item, weight in zip(items, weights, strict=True):
            yield item
            advance(weight)


@contextmanager
def counting(total: int, label: str | None) -> Iterator[Callable[[int], None]]:
    """A bar as of `track`; yields the function that tells it how many more are done."""
    if label is None or not shown():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
