"""Heads: bounded logits in fp32 whatever surrounds them, and a gradient for every parameter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from agssd.models.heads import PointNorm, ProjectionHead, PrototypeHead, ReconstructionHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    return PrototypeHead(24, num_prototypes=50, hidden_dim=32, bottleneck_dim=16)


def features(scale=1.0):
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_prototype_head__logits_are_cosines(head, scale):
    logits = head(features(scale))
    assert logits.shape == (3, 7, 50) and logits.dtype == torch.float32
    assert logits.abs().max() <= 1 + 1e-6
    assert torch.isfinite(logits).all()


def test_prototype_head__equals_numpy(head):
    hidden = head.mlp(features()).detach().double().numpy()
    prototypes = head.prototypes.detach().double().numpy()
    wanted = (hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)) @ (
        prototypes / np.linalg.norm(prototypes, axis=-1, keepdims=True)
    ).T
    np.testing.assert_allclose(head(features()).detach().numpy(), wanted, atol=1e-5)


def test_prototype_head__length_of_prototypes_is_without_effect(head):
    longer = copy.deepcopy(head)
    with torch.no_grad():
        longer.prototypes.mul_(37.0)
    torch.testing.assert_close(longer(features()), head(features()), atol=1e-6, rtol=1e-5)


def test_prototype_head__logits_do_differ_between_inputs_at_the_start(head):
    logits = head(features())
    assert logits.flatten(0, 1).std(0).mean() > 0.02  # not one constant answer


def test_prototype_head__every_parameter_gets_a_gradient(head):
    torch.nn.functional.cross_entropy(head(features()).flatten(0, 1) / 0.1, torch.arange(21)).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # The gradient of a normalised prototype is at right angles to it: its length does not drift.
    along = (head.prototypes.grad * head.prototypes.detach()).sum(-1)
    assert along.abs().max() < 1e-5


def test_prototype_head__a_zero_feature_gives_no_nan():
    head = PrototypeHead(8, 10, 16, 4)
    x = torch.zeros(2, 8, requires_grad=True)
    head(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reconstruction_head__runs_in_fp32_under_autocast(dtype):
    head = ReconstructionHead(24, (2, 2, 2), 1)
    plain = head(features().to(dtype).float())
    with torch.autocast("cpu", dtype):
        mixed = head(features().to(dtype))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_prototype_head__runs_in_fp32_under_autocast_to_fp16(head):
    plain = head(features().half().float())
    with torch.autocast("cpu", torch.float16):
        mixed = head(features().half())
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_prototype_head__only_its_hidden_layers_follow_autocast_to_bf16(head, scale):
    x = features(scale).bfloat16()
    plain = head(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(x)
    assert mixed.dtype == torch.float32
    error = (mixed - plain).abs()
    assert 0 < error.max() < 0.02  # two roundings to 8 bits
    assert len(mixed.unique()) > 0.95 * mixed.numel(), "logits that were rounded themselves would coincide"


def centred(momentum=0.9):
    torch.manual_seed(0)
    return PrototypeHead(24, num_prototypes=50, hidden_dim=32, bottleneck_dim=16, centre_momentum=momentum)


def move(head):
    mean = head.moved_mean()
    assert mean is not None
    head.mean.copy_(mean)


def test_prototype_head__centring_takes_the_weighted_mean_of_the_bottleneck_off():
    head, x = centred(), features()
    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    before = head(x, weights)
    torch.testing.assert_close(before, head(x))  # observing changes nothing yet
    move(head)
    bottleneck = head.mlp(x).detach()
    torch.testing.assert_close(head.mean, bottleneck[weights].mean(0))
    wanted = torch.nn.functional.cosine_similarity((bottleneck - head.mean)[..., None, :], head.prototypes, dim=-1)
    torch.testing.assert_close(head(x), wanted, atol=1e-5, rtol=0)


def test_prototype_head__centring_tells_apart_what_shares_a_large_part():
    head = centred()
    x = features(0.02) + 3 * torch.randn(24, generator=torch.Generator().manual_seed(5))
    spread = head(x).flatten(0, 1).std(0).mean()
    head(x, torch.ones(3, 7))
    move(head)
    assert head(x).flatten(0, 1).std(0).mean() > 10 * spread


def test_prototype_head__running_mean_starts_at_the_first_and_then_keeps_its_momentum():
    head = centred(0.75)
    means = []
    for step in range(6):
        x = features() + step
        head(x, torch.ones(3, 7))
        means.append(head.mlp(x).detach().flatten(0, 1).mean(0))
        move(head)
    wanted = means[0]
    for step, mean in enumerate(means[1:], 1):
        kept = min(step / (step + 1), 0.75)
        wanted = kept * wanted + (1 - kept) * mean
    torch.testing.assert_close(head.mean, wanted, atol=1e-5, rtol=1e-5)


def test_prototype_head__four_micro_batches_move_the_mean_as_one_does():
    one, four = centred(), centred()
    x, weights = features(), torch.rand(3, 7, generator=torch.Generator().manual_seed(2))
    one(x, weights)
    for row in range(3):
        four(x[row], weights[row])
    torch.testing.assert_close(four.moved_mean(), one.moved_mean())


def test_prototype_head__without_observed_rows_the_mean_stays():
    head = centred()
    head.mean.fill_(0.2)
    assert torch.equal(head.moved_mean(), torch.full((16,), 0.2))
    head(features(), torch.zeros(3, 7))
    assert torch.equal(head.moved_mean(), torch.full((16,), 0.2))
    assert centred(None).moved_mean() is None


def test_reconstruction_head__predicts_every_voxel_of_a_patch_from_its_token_alone():
    torch.manual_seed(0)
    head = ReconstructionHead(24, (2, 3, 4), 2)
    tokens = features()
    out = head(tokens)
    assert out.shape == (3, 7, 48)
    changed = tokens.clone()
    changed[1, 4] += torch.arange(24.0)
    difference = (head(changed) - out).abs().amax(-1) > 1e-6
    assert difference.nonzero().tolist() == [[1, 4]]
    torch.testing.assert_close(head(tokens * 5 + 3), out, atol=1e-4, rtol=1e-3)  # LayerNorm first


@pytest.mark.parametrize(("layers", "over_points"), [(1, False), (2, False), (3, True)])
def test_projection_head__every_parameter_has_gradient_and_autocast_changes_nothing(layers, over_points):
    torch.manual_seed(0)
    head = ProjectionHead(24, 32, 8, layers, over_points)
    x = torch.randn(4, 10, 24)
    out = head(x)
    assert out.shape == (4, 10, 8) and out.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), out)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    rows = torch.stack([head(x[n]) for n in range(4)])  # no sample acts on another
    torch.testing.assert_close(rows, out)


def test_point_norm__what_all_points_share_is_removed():
    # Defect of methods without negatives: features fall to a constant where no norm over samples or points forbids it.
    torch.manual_seed(0)
    norm, x = PointNorm(6), torch.randn(3, 20, 6)
    out = norm(x)
    wanted = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(x * 3 + 100), out, atol=1e-3, rtol=0)
