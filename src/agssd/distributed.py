"""Reductions over ranks that do nothing in a single process, and that gradients pass through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Compute as the only rank inside: nothing is reduced or gathered, so the other ranks need not take part."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world_size() -> int:
    """Return the number of ranks, 1 outside a process group and :func:`alone`."""
    return dist.get_world_size() if not _ALONE.get() and dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, 0 outside a process group and :func:`alone`."""
    return dist.get_rank() if world_size() > 1 else 0


def all_sum(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over ranks, without gradient."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Return the maximum of ``x`` over ranks, without gradient."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_objects(own: T) -> list[T]:
    """Return what every rank has, rank by rank; pickled, so for small things and seldom."""
    if world_size() == 1:
        return [own]
    found: list[T | None] = [None] * world_size()
    dist.all_gather_object(found, own)
    return cast("list[T]", found)


def gather_rows(x: Tensor) -> Tensor:
    """Return (ranks * B, ...) from (B, ...) of equal size per rank, rank by rank; gradients flow to the own rows.

    The gradient of a loss that every rank computes on all rows is summed over ranks by the backward pass and averaged
    by DDP, so it equals that of one process on the joined batch.
    """
    if world_size() == 1:
        return x
    import torch.distributed.nn.functional as dist_nn

    return torch.cat(dist_nn.all_gather(x.contiguous()))
