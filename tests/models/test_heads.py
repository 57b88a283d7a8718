"""Heads: bounded logits, fp32 whatever surrounds them, and a gradient for every parameter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from agssd.models.heads import PrototypeHead, ReconstructionHead


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
def test_heads__run_in_fp32_under_autocast(head, dtype):
    reconstruction = ReconstructionHead(24, (2, 2, 2), 1)
    for module in (head, reconstruction):
        plain = module(features().to(dtype).float())
        with torch.autocast("cpu", dtype):
            mixed = module(features().to(dtype))
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, plain)


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
