"""Bytes of live tensors by part, on fake tensors that take no memory themselves."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """While active, counts every storage from the operation that makes it until nothing refers to it any more.

    Storages that several tensors share count once. What a kernel allocates for itself and frees again is not seen.

    Args:
        share: of the bytes of a part that this device holds, where it is not all of them.

    Attributes:
        part: to which new storages are counted.
        live: bytes by part, now; of all devices where a part is shared.
        peak: bytes by part that this device held when their sum was largest, since :meth:`start`.
        guessed: numbers that an operation on fake tensors was asked for and that it cannot know; they read 1.
    """

    def __init__(self, share: Mapping[str, float] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.part = "other"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.guessed = 0
        self._largest = 0
        self._part_of: dict[int, tuple[str, int]] = {}
        self._share = dict(share or {})

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak, self._largest = self._held(), self._held().total()

    def count(self, tensor: Tensor, part: str) -> None:
        """Count the storage of ``tensor`` to ``part``, wherever it was counted before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._part_of:
            before, size = self._part_of[key]
            self.live[before] -= size
        else:
            size = storage.nbytes()
            weakref.finalize(storage, self._forget, key).atexit = False
        self._part_of[key] = part, size
        self.live[part] += size
        if (total := self._held().total() if self._share else self.live.total()) > self._largest:
            self.peak, self._largest = self._held(), total

    def _held(self) -> Counter[str]:
        return Counter({part: math.ceil(size * self._share.get(part, 1)) for part, size in self.live.items()})

    def _forget(self, key: int) -> None:
        part, size = self._part_of.pop(key)
        self.live[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            self.guessed += 1
            return 1.0 if args[0].is_floating_point() else 1
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self._part_of:
                self.count(made, self.part)
        return out


@contextmanager
def without_weights() -> Iterator[None]:
    """Move every parameter to the meta device as soon as a module registers it, so that a model takes no memory."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = torch_module.register_module_parameter_registration_hook(cast(Any, to_meta))
    try:
        yield
    finally:
        handle.remove()


def tensors_in(value: Any, change: Callable[..., Any], *others: Any) -> Any:
    """Return ``value`` with every tensor replaced by ``change(tensor, ...)``.

    Args:
        value: any nesting of dataclasses, tuples, lists, dicts and tensors; anything else stays.
        change: is given the tensor, and those at its place in ``others``.
        others: like ``value``.
    """
    if isinstance(value, Tensor):
        return change(value, *others)
    if is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in fields(value)]
        return replace(
            value, **{n: tensors_in(getattr(value, n), change, *(getattr(o, n) for o in others)) for n in names}
        )
    if isinstance(value, dict):
        return {key: tensors_in(part, change, *(other[key] for other in others)) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [tensors_in(*part[:1], change, *part[1:]) for part in zip(value, *others, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def fake_batch(one: Any, two: Any, batch: int, mode: FakeTensorMode) -> Any:
    """Return fake CPU tensors for ``batch`` samples, nested like ``one`` and ``two``, those of 1 and of 2 samples.

    A tensor that stands in several places of ``one`` does so in the result.
    """
    made: dict[int, Tensor] = {}

    def fake(first: Tensor, second: Tensor) -> Tensor:
        if id(first) not in made:
            shape = [a + (b - a) * (batch - 1) for a, b in zip(first.shape, second.shape, strict=True)]
            with mode:
                made[id(first)] = torch.empty(shape, dtype=first.dtype, device="cpu")
        return made[id(first)]

    return tensors_in(one, fake, two)


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer of ``model`` by a fake CPU tensor; what was shared stays shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                held[name] = made[id(tensor)]


@contextmanager
def inside(parts: dict[nn.Module, str], enter: Callable[[str], object], leave: Callable[[], object]) -> Iterator[None]:
    """Call ``enter(part)`` and ``leave()`` around every pass through a module of ``parts``."""

    def entered(module: nn.Module, _: Any) -> None:
        if module in parts:
            enter(parts[module])

    def left(module: nn.Module, *_: Any) -> None:
        if module in parts:
            leave()

    before = torch_module.register_module_forward_pre_hook(entered)
    after = torch_module.register_module_forward_hook(left, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
