"""The momentum update of a teacher, in a handful of kernels instead of one per parameter."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Pairs(NamedTuple):
    """Tensors of the same name, in the same order; ``first`` tells whether the modules still hold them."""

    first: tuple[Tensor | None, Tensor | None]
    student_parameters: list[Tensor]
    teacher_parameters: list[Tensor]
    student_buffers: list[Tensor]
    teacher_buffers: list[Tensor]


# Keyed by teacher. Walking the names of a 24-block ViT costs about 1 ms, too much for every step.
_PAIRS: WeakKeyDictionary[nn.Module, _Pairs] = WeakKeyDictionary()


@torch.no_grad()
def update_ema(student: nn.Module, teacher: nn.Module, momentum: float, unless: Tensor | None = None) -> None:
    """Move each teacher parameter to ``momentum * teacher + (1 - momentum) * student`` and copy the stored buffers.

    Parameters are matched by name, once; the match is remembered until the first tensor of either module is another
    one (moved to a device anew, say). Do not replace single layers of a running pair.
    Buffers outside the ``state_dict`` are derived values and stay as they are.

    Source: ours; the rule is BYOL's and DINO's.

    Args:
        student: the trained module; unwrapped, its parameters in the same dtype as the teacher's (fp32 masters).
        teacher: module with the same parameter and buffer names and shapes; changed in place.
        momentum: share of the teacher that is kept, in [0, 1]; 1 leaves the parameters bit for bit, 0 copies.
        unless: () float32 on a CUDA device, 1 leaves the parameters bit for bit and 0 changes nothing; nobody waits
            for it.

    Raises:
        ValueError: if ``momentum`` is outside [0, 1], or names, shapes or dtypes of the two modules differ.
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum is {momentum}; an EMA needs a value in [0, 1]")
    pairs = _PAIRS.get(teacher)
    if pairs is None or not _still_held(pairs, student, teacher):
        pairs = _PAIRS[teacher] = _match(student, teacher)
    if pairs.teacher_parameters:
        if unless is None:
            torch._foreach_lerp_(pairs.teacher_parameters, pairs.student_parameters, 1.0 - momentum)
        else:
            weights = [(1.0 - momentum) * (1.0 - unless)] * len(pairs.teacher_parameters)
            torch._foreach_lerp_(pairs.teacher_parameters, pairs.student_parameters, weights)
    if pairs.teacher_buffers:
        torch._foreach_copy_(pairs.teacher_buffers, pairs.student_buffers)


def _first(module: nn.Module) -> Tensor | None:
    return next(chain(module.parameters(), module.buffers()), None)


def _still_held(pairs: _Pairs, student: nn.Module, teacher: nn.Module) -> bool:
    return pairs.first[0] is _first(student) and pairs.first[1] is _first(teacher)


def _match(student: nn.Module, teacher: nn.Module) -> _Pairs:
    parameters = _by_name(dict(student.named_parameters()), dict(teacher.named_parameters()), "parameter")
    buffers = _by_name(_stored_buffers(student), _stored_buffers(teacher), "buffer")
    return _Pairs((_first(student), _first(teacher)), *parameters, *buffers)


def _stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    stored = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}


def _by_name(student: dict[str, Tensor], teacher: dict[str, Tensor], kind: str) -> tuple[list[Tensor], list[Tensor]]:
    if student.keys() != teacher.keys():
        name = min(student.keys() ^ teacher.keys())
        holder = "student" if name in student else "teacher"
        raise ValueError(
            f"{kind} {name!r} exists only in the {holder}; build the teacher as a deep copy of the student"
        )
    for name, tensor in student.items():
        other = teacher[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise ValueError(
                f"{kind} {name!r} is {tuple(tensor.shape)} {tensor.dtype} in the student and {tuple(other.shape)} "
                f"{other.dtype} in the teacher; build the teacher as a deep copy of the student"
            )
    return list(student.values()), [teacher[name] for name in student]
