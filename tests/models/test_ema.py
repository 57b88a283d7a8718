"""The EMA update: exact by name, for parameters and stored buffers, without gradients."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from agssd.models import ema
from agssd.models.ema import update_ema


class Small(nn.Module):
    """Two layers, a norm with running statistics, and a derived buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2, bias=False)
        self.register_buffer("derived", torch.zeros(2), persistent=False)


def _pair() -> tuple[Small, Small]:
    torch.manual_seed(0)
    student = Small()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    return student, teacher


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.996, 1.0])
def test_update_ema__moves_every_parameter_by_the_formula(momentum: float) -> None:
    student, teacher = _pair()
    before = {name: tensor.detach().double().clone() for name, tensor in teacher.named_parameters()}
    update_ema(student, teacher, momentum)
    for name, tensor in teacher.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * dict(student.named_parameters())[name].double()
        torch.testing.assert_close(tensor.detach().double(), expected, rtol=0, atol=1e-6)


def test_update_ema__one_keeps_and_zero_copies_bit_for_bit() -> None:
    student, teacher = _pair()
    before = copy.deepcopy(teacher.state_dict())
    update_ema(student, teacher, 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.named_parameters())
    update_ema(student, teacher, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_update_ema__copies_stored_buffers_and_leaves_derived_ones() -> None:
    student, teacher = _pair()
    student.norm.running_mean.fill_(3.0)
    student.norm.num_batches_tracked.fill_(7)
    student.derived.fill_(5.0)
    update_ema(student, teacher, 0.9)
    assert teacher.norm.running_mean.eq(3.0).all() and teacher.norm.num_batches_tracked.item() == 7
    assert teacher.derived.eq(0.0).all()


def test_update_ema__leaves_student_and_graph_alone() -> None:
    student, teacher = _pair()
    before = copy.deepcopy(student.state_dict())
    update_ema(student, teacher, 0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(parameter.grad_fn is None for parameter in teacher.parameters())


def test_update_ema__matches_by_name_not_by_order() -> None:
    student, _ = _pair()
    teacher = Small()
    teacher._modules = dict(reversed(teacher._modules.items()))
    update_ema(student, teacher, 0.0)
    assert torch.equal(teacher.first.weight, student.first.weight)
    assert torch.equal(teacher.last.weight, student.last.weight)


def test_update_ema__follows_replaced_parameters_and_conversions() -> None:
    student, teacher = _pair()
    update_ema(student, teacher, 0.9)
    student.load_state_dict({name: torch.ones_like(tensor) for name, tensor in student.state_dict().items()})
    update_ema(student, teacher, 0.0)
    assert teacher.last.weight.eq(1.0).all()
    student.double(), teacher.double()
    student.first.weight = nn.Parameter(torch.full_like(student.first.weight, 2.0))
    update_ema(student, teacher, 0.0)
    assert teacher.first.weight.eq(2.0).all()


def test_update_ema__forgets_dead_teachers() -> None:
    student, teacher = _pair()
    update_ema(student, teacher, 0.9)
    assert teacher in ema._PAIRS
    gone = weakref.ref(teacher)
    held = {id(pairs.teacher_parameters) for pairs in ema._PAIRS.values()}
    del teacher
    gc.collect()
    assert gone() is None
    assert {id(pairs.teacher_parameters) for pairs in ema._PAIRS.values()} < held


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_update_ema__momentum_outside_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum is"):
        update_ema(*_pair(), momentum)


def test_update_ema__different_modules_are_refused_by_name() -> None:
    student, teacher = _pair()
    teacher.last = nn.Linear(4, 2, bias=True)
    with pytest.raises(ValueError, match="'last.bias' exists only in the teacher"):
        update_ema(student, teacher, 0.9)
    student, teacher = _pair()
    teacher.last = nn.Linear(4, 3, bias=False)
    with pytest.raises(ValueError, match="'last.weight' is"):
        update_ema(student, teacher, 0.9)
    student, teacher = _pair()
    with pytest.raises(ValueError, match="float16"):
        update_ema(student, teacher.half(), 0.9)
