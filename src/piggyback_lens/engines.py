"""Where the cells of an experiment run: this process, processes of this machine, a Ray cluster, or SLURM.

    with engines.local(workers=2) as executor:
        compare_methods(..., executor=executor)
        layer_curve(pair, prompts, settings=PatchSettings(executor=executor, cells_per_pass=8))

All are executors of `concurrent.futures`, and any other one will do as well. What runs elsewhere gives back rows; the
process that owns the folder writes them. `finished` runs jobs on any of them.
"""

import multiprocessing
import pickle
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from piggyback_lens.errors import LensError

__all__ = ["local", "ray", "slurm"]

Job = tuple[Any, ...]
"""A function at the top level of a module, and its arguments."""
ONE_AT_A_TIME = threading.Lock()
"""Held by a job while it computes: threads share a model's hooks and torch's random state, so they take turns."""
POLL = 1.0
"""Seconds between two looks at jobs of SLURM that are not finished."""
SHOWN = 4
"""Jobs with one cause that a message names."""
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
        if not (isinstance(outcome, str) and outcome == _LATE):
            yield number, outcome


def passed(deadline: float | None) -> bool:
    """Whether there is a deadline, and it is over."""
    return deadline is not None and time.time() >= deadline


def cause(error: Exception) -> str:
    """Why a job failed, in one line."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, LensError) else f"{type(error).__name__}: {text}"


def failure(failed: Mapping[str, Exception], total: int, saved: Path | None, what: str = "cells") -> LensError:
    """Which jobs failed and why; those with the same cause together.

    Args:
        failed: the errors, by name of the job.
        total: how many jobs there were.
        saved: where the others are; None where nothing was kept.
        what: jobs are called.
    """
    causes: dict[str, list[str]] = {}
    for name, error in failed.items():
        causes.setdefault(cause(error), []).append(name)
    told = "; ".join(f"{_some(names)}: {why}" for why, names in causes.items())
    rest = "and no other is finished" if saved is None else f"the others are in {saved}"
    return LensError(f"{len(failed)} of {total} {what} failed, {rest}; the same call tries again: {told}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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


# ---------------------------------------------------------------- processes of this machine


def local(workers: int = 1, *, threads: int | None = None) -> "Processes":
    """Processes of this machine, each of which loads what it needs once.

    Args:
        workers: number of processes. Each holds one copy of the model.
        threads: of torch in each; by default this process's threads divided among them. Results are the same bit
            for bit only at the same number.

    Raises:
        LensError: fewer than one worker or thread.
    """
    import torch

    if workers < 1 or (threads is not None and threads < 1):
        raise LensError(f"workers is {workers} and threads {threads}: each is at least 1")
    return Processes(workers, threads or max(1, torch.get_num_threads() // workers))


class Processes(ThreadPoolExecutor):
    """One process for each worker. When one dies, its job fails and no other; the next job gets a new process."""

    def __init__(self, workers: int, threads: int) -> None:
        super().__init__(workers)
        self._torch_threads = threads
        self._idle: SimpleQueue[ProcessPoolExecutor | None] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function in the next process that is free."""
        return super().submit(self._run, fn, args, kwargs)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        process = self._idle.get()
        try:
            # Pickled here: multiprocessing would move every tensor into shared memory, which is small in containers.
            blob = _pickled((fn, args, kwargs))
            process = process or self._started()
            return process.submit(_unpickled, blob).result()
        except BrokenExecutor as error:
            process = None
            raise LensError("its process died (killed, or out of memory)") from error
        finally:
            self._idle.put(process)

    def _started(self) -> ProcessPoolExecutor:
        # A forked process would inherit the locks of torch's threads, but not the threads.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_use_threads, initargs=(self._torch_threads,))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, when they have finished what they are at."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        while not self._idle.empty():
            if (process := self._idle.get()) is not None:
                process.shutdown(wait)


def _use_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _pickled(job: Any) -> bytes:
    try:
        return pickle.dumps(job)
    except LensError:
        raise
    except Exception as error:  # pickle raises PicklingError, AttributeError, TypeError and what objects raise
        raise LensError(
            f"it cannot be sent to another process ({error}): functions have to be at the top level of a module, and "
            "models loaded from names"
        ) from error


def _unpickled(blob: bytes) -> Any:
    function, args, kwargs = pickle.loads(blob)  # noqa: S301  # this program's own
    return function(*args, **kwargs)


# ---------------------------------------------------------------- clusters


class Cluster(Executor):
    """Jobs of a cluster as an `Executor`: `submit` starts one, its result comes as an ordinary future.

    The futures are running from the start, since clusters do not tell when a job leaves their queue. A job is
    cancelled by `shutdown(cancel_futures=True)`, or by an error inside the with block.
    """

    def __init__(self) -> None:
        self._running: dict[Future[Any], Any] = {}

    @abstractmethod
    def _start(self, future: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Start a job, put into `_running` what `_cancel` takes, and call `_finish` when it ends."""

    @abstractmethod
    def _cancel(self, job: Any) -> None:
        """Stop a job."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a job. What raises there raises the same error here."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._start(future, fn, args, kwargs)
        return future

    def _finish(self, future: Future[Any], error: BaseException | None, result: Any = None) -> None:
        self._running.pop(future, None)
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the jobs, or cancel them; the cluster itself stays up."""
        for future, job in list(self._running.items()):
            if cancel_futures:
                self._cancel(job)
            elif wait:
                future.exception()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the jobs; after an error, such as Ctrl-C, cancel them."""
        self.shutdown(cancel_futures=kind is not None)


def ray(*, num_gpus_per_cell: float = 0.0, num_cpus_per_cell: float = 1.0, **init: Any) -> "RayExecutor":
    """Ray tasks, one per cell, wherever the cluster has room (extra `[ray]`).

    The experiment's folder and the model have to be reachable under the same path from every node.

    Args:
        num_gpus_per_cell: GPUs that Ray reserves for a cell; a fraction lets several share one.
        num_cpus_per_cell: CPU cores for a cell.
        **init: for `ray.init`, e.g. address="auto"; a Ray that is already initialised is used as it is.

    Raises:
        LensError: Ray is not installed.
    """
    try:
        import ray as installed
    except ImportError as error:
        raise LensError(
            'Ray is not installed: pip install "piggyback-lens[ray]", or use local processes (--engine local)'
        ) from error
    if not installed.is_initialized():
        installed.init(**init)
    return RayExecutor(installed, num_gpus_per_cell, num_cpus_per_cell)


class RayExecutor(Cluster):
    """Jobs as tasks of Ray."""

    def __init__(self, module: Any, num_gpus: float, num_cpus: float) -> None:
        super().__init__()
        self._ray, self._resources = module, {"num_gpus": num_gpus, "num_cpus": num_cpus}

    def _start(self, future: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        reference = self._ray.remote(**self._resources)(fn).remote(*args, **kwargs)
        self._running[future] = reference
        reference.future().add_done_callback(partial(self._ended, future))

    def _ended(self, future: Future[Any], inner: Future[Any]) -> None:
        error = inner.exception()
        # Ray's error has the whole traceback as its text, and the task's own error as its cause.
        own = getattr(error, "cause", None)
        self._finish(future, own if isinstance(own, BaseException) else error, None if error else inner.result())

    def _cancel(self, job: Any) -> None:
        self._ray.cancel(job)


def slurm(folder: str | Path, *, cluster: str = "slurm", **parameters: Any) -> "SlurmExecutor":
    """Jobs of SLURM, one per cell, by submitit (extra `[slurm]`).

    The experiment's folder, the model and `folder` have to be reachable under the same path from every node.

    Args:
        folder: submitit's own, for what goes to the jobs and comes back, and their logs.
        cluster: "slurm", or "local" for submitit's processes on this machine, to try a call out.
        **parameters: of submitit, e.g. timeout_min=60, gpus_per_node=1, slurm_partition="gpu".

    Raises:
        LensError: submitit is not installed, there is no SLURM here, or a parameter that it does not know.
    """
    try:
        import submitit
    except ImportError as error:
        raise LensError(
            'submitit is not installed: pip install "piggyback-lens[slurm]", or use local processes (--engine local)'
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise LensError(f"SLURM cannot be used so ({cause(error)}): see submitit's AutoExecutor") from error
    return SlurmExecutor(executor)


class SlurmExecutor(Cluster):
    """Jobs of SLURM, which are looked at every `POLL` seconds."""

    def __init__(self, executor: Any) -> None:
        super().__init__()
        self._executor = executor
        self._watching: threading.Thread | None = None
        self._lock = threading.Lock()

    def _start(self, future: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        job = self._executor.submit(_with_error, fn, args, kwargs)
        with self._lock:
            self._running[future] = job
            if self._watching is None:
                self._watching = threading.Thread(target=self._watch, daemon=True)
                self._watching.start()

    def _watch(self) -> None:
        while True:
            for future, job in list(self._running.items()):
                if job.done():
                    self._ended(future, job)
            with self._lock:
                if not self._running:
                    self._watching = None
                    return
            time.sleep(POLL)

    def _ended(self, future: Future[Any], job: Any) -> None:
        try:
            result, error = job.result()
        except Exception as lost:  # killed, out of time, or a result that cannot be sent
            told = f"job {job.job_id} ended without a result ({cause(lost)}): see {job.paths.stderr}"
            result, error = None, LensError(told)
        self._finish(future, error, result)

    def _cancel(self, job: Any) -> None:
        with suppress(Exception):  # it has just ended
            job.cancel()


def _with_error(fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Exception | None]:
    """The result, or the error: submitit would send its text alone."""
    try:
        return fn(*args, **kwargs), None
    except Exception as error:
        return None, error
