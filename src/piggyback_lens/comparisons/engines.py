"""Where the cells of a comparison run: processes of this machine, or a Ray cluster.

    with local(workers=2) as executor:
        compare_methods(..., executor=executor)

Both are `concurrent.futures` executors; any other one will do as well.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

from piggyback_lens.errors import LensError


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
    """A thin `Executor` over Ray: `submit` starts a task, its result comes as an ordinary future."""

    def __init__(self, module: Any, num_gpus: float, num_cpus: float) -> None:
        self._ray, self._resources = module, {"num_gpus": num_gpus, "num_cpus": num_cpus}
        self._running: dict[Future[Any], Any] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a task. A cell that raises raises the same error here."""
        reference = self._ray.remote(**self._resources)(fn).remote(*args, **kwargs)
        future: Future[Any] = reference.future()
        self._running[future] = reference
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: Future[Any]) -> None:
        reference = self._running.pop(future, None)
        if reference is not None and future.cancelled():
            self._ray.cancel(reference)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the tasks, or cancel them; Ray itself stays up."""
        for future, reference in list(self._running.items()):
            if cancel_futures:
                self._ray.cancel(reference)
            elif wait:
                future.exception()
