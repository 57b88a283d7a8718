"""A step that is not finite moves nothing at all, whether the host reads the judgement or the device keeps it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agssd.models import step_guard
from agssd.models.ema import update_ema
from agssd.models.step_guard import NoStepGuard, StepGuard


class Net(nn.Module):
    """A layer, and a count that moves once per step."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("count", torch.zeros(()))


@pytest.fixture(params=[False, True], ids=["host", "device"])
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Have the judgement kept on the device, as on CUDA; the CPU's fused kernels know found_inf too."""
    monkeypatch.setattr(step_guard, "stays_on_device", lambda *_: request.param)
    return bool(request.param)


def run(on_device: bool, bad: dict[int, str], steps: int = 6) -> list[dict[str, Tensor]]:
    """Return weights, teacher, count and moments after each step, of which some are spoilt in some way."""
    torch.manual_seed(0)
    net, guard = Net(), StepGuard()
    teacher = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5, fused=on_device or None)
    found = []
    for step in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = net.layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        grad = net.layer.weight.grad
        assert grad is not None
        if bad.get(step) == "gradient":
            grad[0, 0] = float("inf")
        logged = loss.detach() * (float("nan") if bad.get(step) == "loss" else 1.0)
        guard.observe(logged, torch.stack([logged, loss.detach()]))
        figures = guard.judge(optimizer)
        assert bool(figures[0]) == (step in bad)
        assert guard.clip(0.5)
        optimizer.step()
        with guard.keeping(net):
            net.count += 1
        if on_device:
            update_ema(net, teacher, 0.5, unless=guard.withheld)
        elif not guard.withheld:
            update_ema(net, teacher, 0.5)
        state: dict[str, Any] = {f"net.{k}": v.clone() for k, v in net.state_dict().items()}
        state |= {f"teacher.{k}": v.clone() for k, v in teacher.state_dict().items()}
        for number, values in enumerate(optimizer.state.values()):
            state |= {f"{number}.{k}": v.clone() for k, v in values.items()}
        found.append(state)
    return found


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_step_guard__a_withheld_step_leaves_every_bit(on_device: bool, what: str) -> None:
    states = run(on_device, {2: what, 3: what})
    for name, value in states[1].items():
        assert torch.equal(states[2][name], value), name
        assert torch.equal(states[3][name], value), name
    assert not torch.equal(states[4]["net.layer.weight"], states[3]["net.layer.weight"])
    assert not torch.equal(states[4]["teacher.layer.weight"], states[3]["teacher.layer.weight"])
    assert float(states[-1]["net.count"]) == 4 and float(states[-1]["0.step"]) == 4


def test_step_guard__finite_clipped_steps_are_those_of_plain_adamw(on_device: bool) -> None:
    states = run(on_device, {})
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5, fused=on_device or None)
    for step in range(6):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net.layer(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        assert torch.equal(states[step]["net.layer.weight"], net.layer.weight)


def test_step_guard__figures_are_norm_own_loss_and_reduced_losses() -> None:
    net, guard = Net(), StepGuard()
    net.layer(torch.randn(4, 5)).square().mean().backward()
    guard.observe(torch.tensor(1.0), torch.tensor([2.0, 3.0]))
    guard.observe(torch.tensor(10.0), torch.tensor([20.0, 30.0]))  # a second micro-batch
    gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    figures = guard.judge(torch.optim.SGD(net.parameters(), 0.1)).tolist()
    assert figures == pytest.approx([0.0, float(gradients.norm()), 11.0, 22.0, 33.0])


@pytest.mark.parametrize("max_norm", [0.01, 100.0])
def test_clip__is_torchs_bit_for_bit_without_a_second_norm(max_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net, guard = Net(), StepGuard()
    net.layer(torch.randn(4, 5)).square().mean().backward()
    other = copy.deepcopy(net)
    for mine, its in zip(net.parameters(), other.parameters(), strict=True):
        its.grad = None if mine.grad is None else mine.grad.clone()
    torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    guard.judge(torch.optim.SGD(net.parameters(), 0.1))
    monkeypatch.setattr(torch, "_foreach_norm", None)
    assert guard.clip(max_norm)
    for mine, its in zip(net.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None and its.grad is None) or torch.equal(mine.grad, its.grad)  # type: ignore[arg-type]
    assert not guard.clip(max_norm), "a step is clipped once"
    assert not NoStepGuard().clip(max_norm)


def test_step_guard__remembers_which_buffers_move_and_finds_them_where_they_are_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, guard, walks = Net(), StepGuard(), list[int]()
    walk = step_guard._moving_buffers
    monkeypatch.setattr(step_guard, "_moving_buffers", lambda module: walks.append(1) or walk(module))
    guard.withheld, guard.on_device = torch.ones(()), True
    for value in (0.0, 5.0):
        net.count = torch.full((), value)  # as moving to a device does
        with guard.keeping(net):
            net.count += 1
        assert float(net.count) == value
    assert len(walks) == 1


def test_no_step_guard__leaves_gradients_and_buffers_to_the_optimiser_alone() -> None:
    net, guard = Net(), NoStepGuard()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (net.layer(torch.randn(4, 5)).sum() * float("nan")).backward()
    nan = torch.tensor(float("nan"))
    assert torch.isnan(guard.observe(nan, nan.reshape(1))).all()
    guard.judge(optimizer)
    with guard.keeping(net):
        net.count += 1
    optimizer.step()
    assert guard.withheld is None and net.count == 1
    assert all(torch.isnan(p).any() for p in net.parameters())
