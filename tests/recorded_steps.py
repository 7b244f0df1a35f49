"""CUDA graphs on a machine without a GPU: the operations of a captured step, run again on the same tensors.

As a real graph, a recording has the addresses of its tensors and every Python value as they were when it was captured,
and its results are written where they were written then. Nothing of Python is run again.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from piggyback_lens.measuring import generation
from piggyback_lens.models import static

_READS = {  # what a stream cannot do while it is captured: the host waits for a number
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.equal,
}  # fmt: skip


class Graph:
    """What was run while it was captured."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    def pool(self) -> object:
        return self

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.operations:
            now = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(before, now, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _READS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.graph.operations.append((func, args, kwargs or {}, tensors))
        return result


@contextmanager
def recorded_steps(device_bytes: float = 1e12) -> Iterator[list[Graph]]:
    """Inside, steps of a static cache are captured and replayed; the list has their graphs."""
    made: list[Graph] = []

    def graph() -> Graph:
        made.append(Graph())
        return made[-1]

    with (
        mock.patch.multiple(static, captures=lambda device: True, device_bytes=lambda device: device_bytes),
        mock.patch.object(generation, "captures", return_value=True),
        mock.patch.multiple(
            torch.cuda,
            CUDAGraph=graph,
            graph=lambda own, pool=None, stream=None: _Recording(own),
            device=lambda index: nullcontext(),
            stream=lambda side: nullcontext(),
            Stream=mock.MagicMock,
            current_stream=mock.MagicMock(),
        ),
    ):
        yield made
