"""A second device on a machine that has none: which tensors are there is tracked, and mixing them is an error.

Every tensor's memory stays on the CPU, so the numbers are those of the CPU. A storage is *on the other device*
when a `.to(DEVICE)` or a `device=DEVICE` put it there, or when an operation made it of tensors that are. Two
modes of torch keep this true: one sees the calls from Python, which name devices (and calls such as `.to` that
do nothing on the CPU), the other every operation that is run, backward passes included. The rules are CUDA's:
an operation takes its tensors from one device, only single numbers may come from the CPU, and so may indices
in brackets and what `copy_` reads.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("xpu", 0)
"""What the other device is called: a name that torch can parse and this library does not treat differently."""

TRAFFIC: Counter[str] = Counter()
"""Tensors that were moved between the devices, and numbers that the host read: for each a GPU finishes its work."""


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Inside, tensors and models can be moved to the device that this gives."""
    with _Operations(), _Calls():
        yield DEVICE


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on the other device."""
    return getattr(tensor.untyped_storage(), "there", False)


def _put(tensor: Tensor, there: bool) -> Tensor:
    tensor.untyped_storage().there = there  # type: ignore[attr-defined]
    return tensor


class _Move(torch.autograd.Function):
    """A copy on one of the devices, whose gradient goes back to the other."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: bool) -> Tensor:
        return _put(tensor.clone(), there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        return _put(gradient.clone(), not is_there(gradient)), None


def _moved(tensor: Tensor, there: bool) -> Tensor:
    if is_there(tensor) == there:
        return tensor
    TRAFFIC["moved"] += 1
    return _Move.apply(tensor, there)  # type: ignore[no-any-return,no-untyped-call]


# ---------------------------------------------------------------- every operation


class _Operations(TorchDispatchMode):
    """Refuses operations on tensors of both devices, and keeps results where their operands are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = list(_leaves((*args, *kwargs.values())))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = any(map(is_there, tensors))
        if there:
            _check(func, args, leaves, tensors)
            TRAFFIC["read"] += func.overloadpacket in _READING
        results = func(*args, **kwargs)
        if there and func.overloadpacket is not _COPY:
            for result in _leaves((results,)):
                if isinstance(result, Tensor):
                    _put(result, True)
        return results


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


_READING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
_COPY = torch.ops.aten.copy_
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
_TAKING_NUMBERS = (*_INDEXING, torch.ops.aten.fill_, torch.ops.aten.masked_fill, torch.ops.aten.masked_fill_)


def _check(func: Any, args: Any, leaves: list[Any], tensors: list[Tensor]) -> None:
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{func}: expected a {DEVICE} generator, got one of the CPU")
    if func.overloadpacket is _COPY:
        return
    if func.overloadpacket in _INDEXING:
        if not is_there(args[0]):
            raise RuntimeError(f"{func}: the indexed tensor is on the CPU, its indices or values on {DEVICE}")
        # Its gradient puts in zeros that torch makes of sizes alone, on the right device, which is not seen here.
        tensors = [args[0], *(x for x in args[2:] if isinstance(x, Tensor) and (is_there(x) or bool(x.any())))]
    numbers_may_mix = (
        torch.Tag.pointwise in func.tags
        or func.overloadpacket in _TAKING_NUMBERS
        or func.name().startswith("aten::_foreach_")  # optimisers and gradient clipping
    )
    stray = next((x for x in tensors if not is_there(x) and (x.ndim or not numbers_may_mix)), None)
    if stray is not None:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found {DEVICE} and cpu "
            f"(a {stray.dtype} tensor of shape {tuple(stray.shape)})"
        )


# ---------------------------------------------------------------- calls from Python that name devices


class _Calls(TorchFunctionMode):
    """Understands DEVICE wherever Python code names it, and answers with it where it asks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(func, *args, **kwargs)
        target = kwargs.get("device")
        if target is None:
            return func(*args, **kwargs)
        there = _names_there(target)
        if there and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: expected a {DEVICE} generator, got one of the CPU")
        result = func(*args, **kwargs | {"device": "cpu" if there else target})
        if not isinstance(result, Tensor):
            return result
        return _moved(result, there) if func in _MAY_ALIAS else _put(result, there)


_MAY_ALIAS = (torch.as_tensor, torch.asarray)


def _names_there(device: Any) -> bool:
    return not isinstance(device, int) and torch.device(device).type == DEVICE.type


def _device(func: Any, tensor: Tensor) -> torch.device:
    return DEVICE if is_there(tensor) else func(tensor)  # type: ignore[no-any-return]


def _to(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`tensor.to` in all its forms: the dtype is left to torch, the device is ours."""
    there, rest = is_there(tensor), []
    for value in (*args, kwargs.pop("device", None), kwargs.pop("other", None)):
        if isinstance(value, Tensor):
            there = is_there(value)
            rest.append(value.dtype)
        elif isinstance(value, (str, torch.device)):
            there = _names_there(value)
        elif value is not None:
            rest.append(value)
    if rest and isinstance(rest[0], bool):  # non_blocking and copy, which follow the dtype
        rest.insert(0, tensor.dtype)
    result = func(tensor, *rest, **kwargs) if rest or kwargs else tensor
    return _moved(result, there)


def _cpu(_: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _moved(tensor, False)


def _to_numpy(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if is_there(tensor):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy: use Tensor.cpu() first")
    return func(tensor, *args, **kwargs)


def _like_self(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Calls that make a tensor of plain data, or by copying memory, where their first argument is."""
    target = kwargs.pop("device", None)
    return _put(func(tensor, *args, **kwargs), is_there(tensor) if target is None else _names_there(target))


def _as_it_is(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


_SPECIAL = {
    torch._C._nn._parse_to: _as_it_is,  # reads the arguments of `Module.to`, which then calls `Tensor.to`
    torch.Tensor.device.__get__: _device,  # type: ignore[attr-defined]
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.numpy: _to_numpy,
    torch.Tensor.__array__: _to_numpy,
    torch.Tensor.new_tensor: _like_self,
    torch.Tensor.__deepcopy__: _like_self,
}
