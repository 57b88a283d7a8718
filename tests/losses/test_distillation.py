"""Distillation losses against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.losses.distillation import Centre, cross_entropy, masked_mean, multi_crop_cross_entropy, sinkhorn


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def plain_sinkhorn(logits, temperature, weights=None, iterations=3):
    """SwAV's algorithm as published, on the matrix itself, in float64."""
    logits = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    keep = np.ones(len(logits), bool) if weights is None else weights.reshape(-1).astype(bool)
    q = np.exp(logits[keep] / temperature).T  # (K, B)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdims=True)
        q /= q.shape[1]
    out = np.zeros_like(logits)
    out[keep] = (q * q.shape[1]).T
    return out


def cosines(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ------------------------------------------------------------ cross-entropy


def test_cross_entropy__equals_numpy_and_its_gradient_is_p_minus_q():
    target = torch.from_numpy(softmax(np.random.default_rng(0).normal(size=(3, 5, 40)))).float()
    logits = (cosines((3, 5, 40)) / 0.1).requires_grad_()
    loss = cross_entropy(target, logits)
    p = softmax(logits.detach().double().numpy())
    np.testing.assert_allclose(loss.detach().numpy(), -(target.double().numpy() * np.log(p)).sum(-1), rtol=1e-5)
    loss.sum().backward()
    np.testing.assert_allclose(logits.grad.numpy(), p - target.numpy(), atol=1e-5)


def test_cross_entropy__is_ln_k_for_uniform_students_and_broadcasts_over_views():
    targets = torch.from_numpy(softmax(np.random.default_rng(0).normal(size=(2, 2, 1, 512)))).float()
    torch.testing.assert_close(
        cross_entropy(targets, torch.zeros(2, 1, 4, 512)), torch.full((2, 2, 4), float(np.log(512)))
    )


def test_cross_entropy__stays_finite_at_extreme_logits():
    target = torch.zeros(1, 4)
    target[0, 1] = 1
    assert cross_entropy(target, torch.tensor([[5e3, -5e3, 0.0, 1.0]])).item() == pytest.approx(1e4)


@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("seen", [None, [1, 0, 0, 1]])
def test_multi_crop_cross_entropy__compares_every_teacher_view_with_every_other_view(seen, num_local):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(4, 2, 7, generator=generator).softmax(-1)
    views = torch.randn(4, 2 + num_local, 7, generator=generator)
    pairs = [
        -(targets[b, q].double() * views[b, v].double().log_softmax(-1)).sum()
        for b in range(4)
        for q in (0, 1)
        for v in range(2 + num_local)
        if v != q  # a view is not its own target
        if seen is None or v >= 2 or v == seen[b]  # and the student may see one global view only
    ]
    shown, which = views[:, :2], None
    if seen is not None:
        shown, which = torch.stack([views[b, v] for b, v in enumerate(seen)])[:, None], torch.tensor(seen)
    got = multi_crop_cross_entropy(targets, shown, views[:, 2:] if num_local else None, which)
    assert got.item() == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)


def test_masked_mean__weighs_samples_not_tokens():
    values = torch.tensor([[1.0, 3.0, 100.0], [8.0, 100.0, 100.0], [5.0, 5.0, 5.0]])
    weights = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert masked_mean(values, weights).item() == pytest.approx((2.0 + 8.0 + 0.0) / 3)
    cut = torch.stack([masked_mean(values[n : n + 1], weights[n : n + 1]) for n in range(3)]).mean()
    assert cut.item() == pytest.approx(masked_mean(values, weights).item())
    assert masked_mean(values[:1], torch.tensor([[0.5, 0.25, 0.0]])).item() == pytest.approx((0.5 + 0.75) / 0.75)


# ------------------------------------------------------------------- centre


def see(centre, logits, weights=None, temperature=0.1):
    return centre.targets(logits, temperature, weights, observe=True)


def test_centre__targets_are_the_sharpened_centred_softmax():
    centre = Centre(30)
    centre.centre.copy_(cosines((30,), 1))
    logits = cosines((4, 7, 30))
    wanted = softmax((logits.double().numpy() - centre.centre.double().numpy()) / 0.04)
    np.testing.assert_allclose(centre.targets(logits, 0.04).numpy(), wanted, atol=1e-5)


def test_centre__moves_by_its_momentum_to_the_weighted_mean():
    centre = Centre(30, momentum=0.9)
    start = cosines((30,), 1)
    centre.centre.copy_(start)
    logits, weights = cosines((4, 7, 30)), (cosines((4, 7), 2) > 0)
    see(centre, logits, weights)
    assert torch.equal(centre.centre, start)  # observing does not move it
    centre.update()
    mean = logits.double().numpy()[weights.numpy()].mean(0)
    np.testing.assert_allclose(centre.centre.numpy(), 0.9 * start.numpy() + 0.1 * mean, atol=1e-6)


def test_centre__balance_moves_by_the_log_of_the_mean_probability():
    centre = Centre(30, momentum=0.9, rule="balance")
    start = cosines((30,), 1)
    centre.centre.copy_(start)
    logits, weights = cosines((4, 7, 30)), (cosines((4, 7), 2) > 0)
    targets = see(centre, logits, weights, 0.05)
    wanted = softmax((logits.double().numpy() - start.double().numpy()) / 0.05)
    np.testing.assert_allclose(targets.numpy(), wanted, atol=1e-5)
    centre.update()
    share = wanted[weights.numpy()].mean(0)
    moved = start.numpy() + 0.05 * np.log(0.9 + 0.1 * 30 * share)
    np.testing.assert_allclose(centre.centre.numpy(), moved - moved.mean(), atol=1e-6)


def test_centre__balance_fades_with_its_strength():
    half, whole = (Centre(30, momentum=m, rule="balance") for m in (0.8, 0.9))
    logits, weights = cosines((4, 7, 30)), (cosines((4, 7), 2) > 0)
    for centre, strength in ((half, 0.5), (whole, 1.0)):
        see(centre, logits, weights, 0.05)
        centre.update(strength)
    torch.testing.assert_close(half.centre, whole.centre)
    see(whole, logits, weights, 0.05)
    before = whole.centre.clone()
    whole.update(0.0)
    torch.testing.assert_close(whole.centre, before)


def test_centre__balance_evens_out_the_prototypes_over_many_small_batches():
    logits = cosines((512, 16)) * 0.2
    logits[:, 0] += 0.4  # everything would go to prototype 0
    centre = Centre(16, momentum=0.9, rule="balance")
    assert centre.targets(logits, 0.05)[:, 0].mean() > 0.8
    for step in range(600):
        see(centre, logits[8 * step % 512 :][:8], temperature=0.05)
        centre.update()
    share = centre.targets(logits, 0.05).mean(0)
    assert 0.5 / 16 < share.min() and share.max() < 2 / 16
    # Each row stays as sharp as Sinkhorn over all rows makes it: the columns are scaled, the rows not flattened.
    entropy = -(centre.targets(logits, 0.05) * centre.targets(logits, 0.05).clamp_min(1e-12).log()).sum(-1).mean()
    exact = sinkhorn(logits, 0.05, iterations=50)
    assert entropy.item() == pytest.approx(-(exact * exact.clamp_min(1e-12).log()).sum(-1).mean().item(), rel=0.05)


@pytest.mark.parametrize("rule", ["mean", "balance"])
def test_centre__four_micro_batches_move_it_as_one_batch_does(rule):
    logits, weights = cosines((8, 5, 30)), (cosines((8, 5), 2) > -0.5).float()
    weights[2:4] = 0  # a micro-batch without any masked foreground
    one, four = Centre(30, rule=rule), Centre(30, rule=rule)
    for step in range(3):
        shifted = logits + 0.1 * step
        see(one, shifted, weights)
        one.update()
        for part in range(4):
            see(four, shifted[2 * part : 2 * part + 2], weights[2 * part : 2 * part + 2])
        four.update()
    torch.testing.assert_close(four.centre, one.centre, atol=1e-6, rtol=0)
    assert one.centre.abs().max() > 0.01


@pytest.mark.parametrize("rule", ["mean", "balance"])
@pytest.mark.parametrize("weights", [None, torch.zeros(3)])
def test_centre__stays_where_nothing_was_observed(weights, rule):
    centre = Centre(5, rule=rule)
    centre.centre.fill_(0.3)
    if weights is not None:
        see(centre, torch.ones(3, 5), weights)
    centre.update()
    assert torch.equal(centre.centre, torch.full((5,), 0.3))


def test_centre__forgets_what_it_has_used_and_is_saved():
    centre = Centre(5, momentum=0.0)
    see(centre, torch.ones(3, 5))
    centre.update()
    see(centre, torch.full((3, 5), 3.0))
    centre.update()
    assert torch.equal(centre.centre, torch.full((5,), 3.0))
    assert list(centre.state_dict()) == ["centre"]
    assert not centre.targets(torch.ones(2, 5, requires_grad=True), 0.1).requires_grad


# ----------------------------------------------------------------- sinkhorn


@pytest.mark.parametrize(("shape", "temperature"), [((64, 48), 0.1), ((6, 20, 64), 0.07), ((300, 32), 0.04)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn__equals_the_plain_algorithm(shape, temperature, iterations):
    logits = cosines(shape) * 0.5
    got = sinkhorn(logits, temperature, iterations=iterations).double().numpy()
    wanted = plain_sinkhorn(logits.numpy(), temperature, iterations=iterations).reshape(shape)
    # fp32 logits of size x carry a relative error of about x * 6e-8 into their exponentials.
    np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=2e-5)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.04, 0.07, 0.1])
def test_sinkhorn__with_the_global_maximum_equals_the_exact_result_to_1e_6_and_with_row_maxima_does_not(temperature):
    # Defect of the family: dinov2's pull request 583 subtracts each row's maximum against overflow and calls it equal.
    for seed in range(5):
        logits = cosines((64, 512), seed)
        x = logits.double().numpy()
        exact = plain_sinkhorn(x, temperature)  # exp(1 / 0.04) is no trouble in float64
        assert np.abs(plain_sinkhorn(x - x.max(), temperature) - exact).max() < 1e-12
        assert np.abs(sinkhorn(logits, temperature).double().numpy() - exact).max() < 1e-6
        sparse = np.random.default_rng(seed).normal(0, 0.3, x.shape)
        by_row = plain_sinkhorn(sparse - sparse.max(1, keepdims=True), temperature)
        assert np.abs(by_row - plain_sinkhorn(sparse, temperature)).max() > 0.01


def test_sinkhorn__uses_prototypes_evenly():
    logits = cosines((512, 16)) * 0.2
    logits[:, 0] += 0.4  # everything would go to prototype 0
    assert torch.softmax(logits / 0.05, -1)[:, 0].mean() > 0.8
    balanced = sinkhorn(logits, 0.05, iterations=20)
    torch.testing.assert_close(balanced.mean(0), torch.full((16,), 1 / 16), atol=2e-3, rtol=0)


def test_sinkhorn__rows_of_weight_zero_take_no_part():
    logits, weights = cosines((6, 9, 32)), cosines((6, 9), 3) > 0
    got = sinkhorn(logits, 0.1, weights)
    alone = sinkhorn(logits[weights], 0.1)
    torch.testing.assert_close(got[weights], alone, atol=1e-6, rtol=1e-5)
    assert torch.equal(got[~weights], torch.zeros_like(got[~weights]))
    poisoned = logits.masked_fill(~weights[..., None], 1e4)
    torch.testing.assert_close(sinkhorn(poisoned, 0.1, weights), got)
    assert torch.equal(sinkhorn(logits, 0.1, torch.zeros(6, 9)), torch.zeros_like(logits))


@pytest.mark.parametrize("temperature", [0.04, 1e-3, 1e-5])
def test_sinkhorn__does_not_overflow_at_tiny_temperatures_or_huge_logits(temperature):
    # exp(1 / 1e-5) overflows even float64.
    logits = cosines((40, 24)) * 50
    got = sinkhorn(logits, temperature)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(40), atol=1e-4, rtol=0)


def test_sinkhorn__shifting_all_logits_changes_nothing():
    logits = cosines((40, 24)) * 0.3
    torch.testing.assert_close(sinkhorn(logits + 7.0, 0.1), sinkhorn(logits, 0.1), atol=2e-5, rtol=1e-3)


def test_sinkhorn__has_no_gradient():
    assert not sinkhorn(cosines((4, 8)).requires_grad_(), 0.1).requires_grad
