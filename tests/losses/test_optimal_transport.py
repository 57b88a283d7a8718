"""Transport with a dustbin against NumPy in float64, and what the released setting does to perfect features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from equations import numbers, sinkhorn_with_dustbin

from agssd.losses.optimal_transport import DustbinTransport, log_sinkhorn

RELEASED: dict[str, Any] = {"temperature": 1.0, "dustbin": 1.0, "learn_dustbin": False}


def cosines(batch: int, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Return cosines of random directions, some of them close to each other."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(batch, m, 6))
    columns = np.concatenate([rows, random.normal(size=(batch, n, 6))], 1)[:, :n] + 0.2 * random.normal(
        size=(batch, n, 6)
    )
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    columns /= np.linalg.norm(columns, axis=2, keepdims=True)
    return torch.from_numpy(rows @ columns.transpose(0, 2, 1)).float()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize(("m", "n"), [(12, 12), (9, 14)])
def test_transport__equals_numpy_in_float64(m: int, n: int, temperature: float) -> None:
    given = cosines(3, m, n)
    log_plan = DustbinTransport(temperature, dustbin=0.2)(given)
    assert log_plan.dtype == torch.float32 and log_plan.shape == (3, m + 1, n + 1)
    for b in range(3):
        expected = sinkhorn_with_dustbin(numbers(given[b]), temperature, 0.2)
        np.testing.assert_allclose(numbers(log_plan[b].exp()), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("setting", [{}, RELEASED], ids=["ours", "released"])
def test_transport__rows_and_columns_keep_their_marginals(setting: dict[str, Any]) -> None:
    plan = DustbinTransport(**setting)(cosines(4, 20, 30)).exp()
    torch.testing.assert_close(plan.sum(1)[:, :-1], torch.ones(4, 30), rtol=0, atol=1e-5)
    torch.testing.assert_close(plan.sum(1)[:, -1], torch.full((4,), 20.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(plan.sum(2)[:, :-1], torch.ones(4, 20), rtol=0, atol=1e-3)
    torch.testing.assert_close(plan.sum(2)[:, -1], torch.full((4,), 30.0), rtol=1e-3, atol=0)


def test_transport__perfect_features_find_their_pair_and_in_the_released_setting_do_not() -> None:
    # Defect of the released code: cosines over 1 and a dustbin at 1.0 leave no room for an answer.
    perfect = torch.eye(144)[None]
    share = DustbinTransport()(perfect).exp()[0, :-1, :-1].diagonal()
    assert share.min() >= 0.9
    released = DustbinTransport(**RELEASED)(perfect).exp()[0]
    assert released[:-1, :-1].diagonal().max() <= 0.0071
    assert released[:-1, -1].mean() == pytest.approx(0.62, abs=0.005)
    # A temperature alone does not mend it: at the score of the right pair, the dustbin takes most.
    swallowed = DustbinTransport(dustbin=1.0)(perfect).exp()[0]
    assert swallowed[:-1, -1].mean().item() == pytest.approx(0.92, abs=0.01)


def test_transport__tokens_without_counterpart_go_to_the_dustbin() -> None:
    # Ten of 40 tokens see what the other view sees too; all others have directions of their own.
    both = torch.zeros(1, 40, 40)
    both[0, range(10), range(30, 40)] = 1.0
    plan = DustbinTransport()(both).exp()[0]
    assert plan[range(10), range(30, 40)].min() > 0.84
    assert plan[10:-1, -1].min() > 0.5 and plan[-1, :30].min() > 0.5  # against 30 equal scores of others
    sharper = DustbinTransport(dustbin=0.4)(both).exp()[0]
    assert sharper[10:-1, -1].min() > 0.94 and sharper[range(10), range(30, 40)].min() > 0.84


def test_transport__plan_of_those_that_take_part_is_that_without_the_others() -> None:
    given = cosines(2, 16, 18)
    rows, columns = torch.ones(2, 16, dtype=torch.bool), torch.ones(2, 18, dtype=torch.bool)
    rows[:, [0, 5, 6]] = False
    columns[:, [2, 17]] = False
    transport = DustbinTransport()
    plan = transport(given, rows, columns).exp()
    smaller = transport(given[:, rows[0]][:, :, columns[0]]).exp()
    kept = torch.cat([rows[0], torch.tensor([True])]), torch.cat([columns[0], torch.tensor([True])])
    torch.testing.assert_close(plan[:, kept[0]][:, :, kept[1]], smaller, rtol=0, atol=1e-5)
    assert plan[:, ~kept[0]].max() == 0 and plan[:, :, ~kept[1]].max() == 0


@pytest.mark.parametrize("present", ["neither", "rows", "columns"])
def test_transport__nothing_to_match_and_nothing_breaks(present: str) -> None:
    given = cosines(1, 8, 8).requires_grad_()
    rows, columns = (torch.full((1, 8), present == name) for name in ("rows", "columns"))
    plan = DustbinTransport()(given, rows, columns).exp()
    plan.sum().backward()
    assert given.grad is not None and given.grad.abs().max() == 0
    assert plan[0, :-1, -1].tolist() == [float(present == "rows")] * 8
    assert plan[0, -1, :-1].tolist() == [float(present == "columns")] * 8
    assert plan[:, :-1, :-1].max() == 0


@pytest.mark.parametrize("setting", [{}, RELEASED], ids=["ours", "released"])
def test_log_sinkhorn__gradient_is_that_through_all_iterations(setting: dict[str, Any]) -> None:
    transport = DustbinTransport(**setting)
    scores = torch.zeros(2, 9, 12, dtype=torch.float64)
    scores[:, :8, :11] = cosines(2, 8, 11).double()
    scores[:, -1], scores[:, :, -1] = transport.dustbin.item(), transport.dustbin.item()
    scores = (scores / transport.temperature).requires_grad_()
    rows, columns = torch.ones(2, 9, dtype=torch.float64), torch.ones(2, 12, dtype=torch.float64)
    rows[:, -1], columns[:, -1] = 11, 8
    direction = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    u, v = torch.zeros(2, 9, 1, dtype=torch.float64), torch.zeros(2, 1, 12, dtype=torch.float64)
    for _ in range(1000):
        u = rows[..., None].log() - (scores + v).logsumexp(2, keepdim=True)
        v = columns[:, None].log() - (scores + u).logsumexp(1, keepdim=True)
    (unrolled,) = torch.autograd.grad(((scores + u + v) * direction).sum(), scores)
    (given,) = torch.autograd.grad((log_sinkhorn(scores, rows, columns, 1000) * direction).sum(), scores)
    torch.testing.assert_close(given, unrolled, rtol=1e-6, atol=1e-8)


def test_log_sinkhorn__memory_does_not_hang_on_the_number_of_iterations() -> None:
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    scores, mass = torch.randn(1, 30, 30).requires_grad_(), torch.ones(1, 30)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        log_sinkhorn(scores, mass, mass, 100)
    assert sum(kept) == 30 * 30 + 2 * 30


def test_transport__is_made_in_full_precision_under_autocast_there_and_back() -> None:
    given = cosines(1, 24, 24)
    exact, rounded = given.clone().requires_grad_(), given.clone().requires_grad_()
    transport = DustbinTransport()
    loss = transport(exact)[:, :-1, :-1].diagonal(dim1=1, dim2=2).mean()
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        under = transport(rounded)[:, :-1, :-1].diagonal(dim1=1, dim2=2).mean()
        under.backward()  # as a monitor of gradients does
    assert under == loss and torch.equal(rounded.grad, exact.grad)  # type: ignore[arg-type]


def test_transport__scores_of_any_range_neither_overflow_nor_vanish() -> None:
    # Defect of the family: exp of scores over a small temperature, and products of scalings instead of sums of logs.
    for temperature in (1e-3, 0.01, 100.0):
        given = cosines(1, 12, 12).requires_grad_()
        log_plan = DustbinTransport(temperature)(given)
        log_plan[:, :-1, :-1].diagonal(dim1=1, dim2=2).mean().backward()
        assert log_plan.isfinite().all() and given.grad is not None and given.grad.isfinite().all()
        assert log_plan.exp().sum(1)[0, :-1].tolist() == pytest.approx([1.0] * 12, abs=1e-3)


def test_transport__dustbin_is_a_parameter_that_learns_what_to_leave_over() -> None:
    # Defect of the released code: the dustbin is made outside any module, where no optimiser finds it.
    transport = DustbinTransport()
    assert [name for name, _ in transport.named_parameters()] == ["dustbin"]
    alone = torch.zeros(1, 10, 10)  # nobody has a counterpart
    optimiser = torch.optim.SGD(transport.parameters(), lr=0.05)
    shares = []
    for _ in range(20):
        loss = -transport(alone)[:, :-1, -1].mean()
        shares.append(math.exp(-loss.item()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert transport.dustbin > 0.1 and shares[-1] > shares[0] + 0.1
    fixed = DustbinTransport(**RELEASED)
    assert not list(fixed.parameters()) and fixed.state_dict()["dustbin"] == 1.0


@pytest.mark.parametrize(("given", "named"), [({"temperature": 0.0}, "temperature"), ({"iterations": 0}, "iterations")])
def test_transport__refuses_what_it_cannot_do(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"transport {named} is 0"):
        DustbinTransport(**given)
