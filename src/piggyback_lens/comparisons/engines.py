"""Where the cells of a comparison run: processes of this machine, or a Ray cluster.

    with local(workers=2) as executor:
        compare_methods(..., executor=executor)

Both are `concurrent.futures` executors; any other one will do as well. `finished` runs jobs on any of them.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any

from piggyback_lens.errors import LensError

Job = tuple[Any, ...]
"""A function at the top level of a module, and its arguments."""
_LATE = "not begun: the deadline has passed"


def finished(
    jobs: Sequence[Job], executor: Executor | None, deadline: float | None = None
) -> Iterator[tuple[int, Any]]:
    """(number of the job, its result or the `Exception` it raised), as they come. One that fails stops no other.

    Args:
        jobs: what to run.
        executor: None for this process.
        deadline: of `time.time()`. What runs then is finished, and nothing begun.

    Raises:
        BaseException: what is no `Exception`, such as KeyboardInterrupt; what has not begun is cancelled.
    """
    guarded = [(_begin, deadline, *job) for job in jobs]
    outcomes = _one_by_one(guarded) if executor is None else _side_by_side(guarded, executor, deadline)
    for number, outcome in outcomes:
        if outcome != _LATE:
            yield number, outcome


def passed(deadline: float | None) -> bool:
    """Whether there is a deadline, and it is over."""
    return deadline is not None and time.time() >= deadline


def _begin(deadline: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Asked where the job runs: pools take jobs out of the queue before a worker is free for them."""
    return _LATE if passed(deadline) else function(*arguments)


def _one_by_one(jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
    for number, (function, *arguments) in enumerate(jobs):
        try:
            outcome = function(*arguments)
        except Exception as error:
            outcome = error
        yield number, outcome


def _side_by_side(jobs: Sequence[Job], executor: Executor, deadline: float | None) -> Iterator[tuple[int, Any]]:
    running: dict[Future[Any], int] = {}
    try:
        for number, job in enumerate(jobs):
            running[_submitted(executor, job)] = number
        while running:
            left = None if deadline is None or passed(deadline) else max(0.0, deadline - time.time())
            done, _ = wait(running, left, FIRST_COMPLETED)
            if passed(deadline):
                # Not every executor tells its waiters of a cancellation, so a cancelled job is not waited for.
                running = {future: n for future, n in running.items() if future in done or not future.cancel()}
            for future in done:
                number = running.pop(future)
                if not future.cancelled():
                    yield number, _outcome(future)
    finally:
        for future in running:
            future.cancel()


def _submitted(executor: Executor, job: Job) -> Future[Any]:
    """The job's future; a pool that takes no jobs any more, as after the death of a worker, fails this job."""
    try:
        return executor.submit(*job)
    except RuntimeError as error:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future


def _outcome(future: Future[Any]) -> Any:
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return error or future.result()


def local(workers: int = 1, *, threads: int | None = None) -> ProcessPoolExecutor:
    """Processes of this machine, each of which loads the base once.

    Args:
        workers: number of processes. Each holds one copy of the base.
        threads: of torch in each; by default this process's threads divided among them. Results are the same bit
            for bit only at the same number.

    Raises:
        LensError: fewer than one worker or thread.
    """
    import torch

    if workers < 1 or (threads is not None and threads < 1):
        raise LensError(f"workers is {workers} and threads {threads}: each is at least 1")
    threads = threads or max(1, torch.get_num_threads() // workers)
    # A forked process would inherit the locks of torch's threads, but not the threads.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_use_threads, initargs=(threads,))


def _use_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def ray(*, num_gpus_per_cell: float = 0.0, num_cpus_per_cell: float = 1.0, **init: Any) -> "RayExecutor":
    """Ray tasks, one per cell, wherever the cluster has room (extra `[ray]`).

    The comparison's folder and the model have to be reachable under the same path from every node.

    Args:
        num_gpus_per_cell: GPUs that Ray reserves for a cell; a fraction lets several share one.
        num_cpus_per_cell: CPU cores for a cell.
        **init: for `ray.init`, e.g. address="auto"; a Ray that is already initialised is used as it is.

    Raises:
        LensError: Ray is not installed.
    """
    try:
        import ray as installed  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise LensError(
            'Ray is not installed: pip install "piggyback-lens[ray]", or use local processes (--engine local)'
        ) from error
    if not installed.is_initialized():
        installed.init(**init)
    return RayExecutor(installed, num_gpus_per_cell, num_cpus_per_cell)


class RayExecutor(Executor):
    """A thin `Executor` over Ray: `submit` starts a task, its result comes as an ordinary future.

    Ray's own futures never say that they are running, so these are ours: running from the start, as Ray does not
    tell when a task leaves its queue. A task is cancelled by `shutdown`, or by an error inside the with block.
    """

    def __init__(self, module: Any, num_gpus: float, num_cpus: float) -> None:
        self._ray, self._resources = module, {"num_gpus": num_gpus, "num_cpus": num_cpus}
        self._running: dict[Future[Any], Any] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a task. A cell that raises raises the same error here."""
        reference = self._ray.remote(**self._resources)(fn).remote(*args, **kwargs)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._running[future] = reference
        reference.future().add_done_callback(partial(self._finish, future))
        return future

    def _finish(self, future: Future[Any], inner: Future[Any]) -> None:
        self._running.pop(future, None)
        error = inner.exception()
        if error is None:
            future.set_result(inner.result())
        else:  # Ray's error has the whole traceback as its text, and the task's own error as its cause
            cause = getattr(error, "cause", None)
            future.set_exception(cause if isinstance(cause, BaseException) else error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the tasks, or cancel them; Ray itself stays up."""
        for future, reference in list(self._running.items()):
            if cancel_futures:
                self._ray.cancel(reference)
            elif wait:
                future.exception()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the tasks; after an error, such as Ctrl-C, cancel them."""
        self.shutdown(cancel_futures=kind is not None)
