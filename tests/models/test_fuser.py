"""CVAA's fuser: the position bias steers it, forbidden keys are unseen, and both attention paths agree."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from agssd.models.fuser import CrossViewBlock, CrossViewFuser

B, N, M, E, HEADS = 3, 10, 12, 24, 6


@pytest.fixture(params=["pre", "post"])
def fuser(request):
    torch.manual_seed(0)
    return CrossViewFuser(E, HEADS, depth=2, layer_scale=None, norm=request.param)


def material(seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, N + 1, E, generator=generator)
    memory = torch.randn(B, M, E, generator=generator)
    bias = -3 * torch.rand(B, N + 1, M, generator=generator)
    bias[:, 0] = 0
    forbidden = torch.rand(B, N + 1, M, generator=generator) < 0.4
    return query, memory, bias, forbidden


def test_fuser__every_parameter_gets_a_gradient_the_gains_too(fuser):
    query, memory, bias, forbidden = material()
    (fuser(query, memory, bias, forbidden) ** 3).mean().backward()
    for name, parameter in fuser.named_parameters():
        if name.endswith(".memory.bias"):  # the same for every key: softmax does not see the key half
            assert parameter.grad[:E].abs().max() < 1e-5 < parameter.grad[E:].abs().max()
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-8, name
    for block in fuser.blocks:
        assert block.gain.grad.shape == (HEADS,) and (block.gain.grad != 0).all()


def test_fuser__gains_stay_in_the_graph_without_a_bias(fuser):
    query, memory, _, forbidden = material()
    for mask in (None, forbidden):
        fuser.zero_grad()
        fuser(query, memory, None, mask).mean().backward()
        for block in fuser.blocks:
            assert torch.equal(block.gain.grad, torch.zeros(HEADS))


def test_fuser__gradient_of_a_gain_equals_finite_differences():
    torch.manual_seed(0)
    fuser = CrossViewFuser(E, HEADS, depth=1, layer_scale=None).double()
    query, memory, bias, _ = (x.double() if x.is_floating_point() else x for x in material())

    def value():
        return (fuser(query, memory, bias) ** 3).mean()

    value().backward()
    gain = fuser.blocks[0].gain
    wanted = []
    with torch.no_grad():
        for head in range(HEADS):
            gain[head] += 1e-5
            up = value()
            gain[head] -= 2e-5
            wanted.append((up - value()) / 2e-5)
            gain[head] += 1e-5
    torch.testing.assert_close(gain.grad, torch.stack(wanted), rtol=1e-4, atol=1e-9)


def test_fuser__a_strong_bias_reads_the_token_at_the_same_place():
    torch.manual_seed(0)
    block = CrossViewBlock(E, HEADS, 2.0, None, "pre")
    query, memory, _, _ = material()
    place = torch.randint(M, (B, N + 1), generator=torch.Generator().manual_seed(1))
    bias = -50.0 * (torch.arange(M) != place[..., None]).float()
    attended = block._attend(block.norm_query(query), block.norm_memory(memory), bias, None)
    value = block.memory(block.norm_memory(memory))[..., E:]
    wanted = block.out(value.gather(1, place[..., None].expand(-1, -1, E)))
    torch.testing.assert_close(attended, wanted, atol=1e-4, rtol=0)
    with torch.no_grad():
        block.gain.zero_()  # without gain the bias is ignored
    torch.testing.assert_close(
        block._attend(query, memory, bias, None), block._attend(query, memory, None, None), atol=1e-6, rtol=1e-5
    )


def test_fuser__forbidden_keys_have_no_influence_and_no_gradient(fuser):
    query, memory, bias, _ = material()
    forbidden = torch.zeros(B, N + 1, M, dtype=torch.bool)
    forbidden[:, :, [2, 7]] = True  # dropped for all
    memory = memory.requires_grad_()
    out = fuser(query, memory, bias, forbidden)
    out.square().sum().backward()
    assert memory.grad[:, [2, 7]].abs().max() == 0 and memory.grad[:, 3].abs().max() > 0
    poisoned = memory.detach().clone()
    poisoned[:, [2, 7]] = 1e3
    torch.testing.assert_close(fuser(query, poisoned, bias, forbidden), out)
    kept = [m for m in range(M) if m not in (2, 7)]
    torch.testing.assert_close(fuser(query, memory[:, kept], bias[:, :, kept]), out, atol=1e-5, rtol=1e-4)


def test_fuser__forbidding_binds_single_queries_only(fuser):
    query, memory, bias, _ = material()
    forbidden = torch.zeros(B, N + 1, M, dtype=torch.bool)
    forbidden[1, 4, :6] = True
    changed = (fuser(query, memory, bias, forbidden) - fuser(query, memory, bias)).abs().amax(-1) > 1e-6
    assert changed.nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("with_bias", [True, False])
def test_fuser__a_query_without_any_allowed_key_looks_everywhere(fuser, with_bias):
    query, memory, bias, forbidden = material()
    forbidden[0, 3] = True
    forbidden[2] = True
    bias = bias if with_bias else None
    query = query.requires_grad_()
    out = fuser(query, memory, bias, forbidden)
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    assert torch.isfinite(query.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in fuser.parameters())
    free = fuser(query, memory, bias)
    torch.testing.assert_close(out[0, 3], free[0, 3])
    torch.testing.assert_close(out[2], free[2])


def test_fuser__mask_of_attention_has_one_number_per_key(monkeypatch):
    """CUDA's kernels refuse a mask that repeats along the keys; the device is made believe."""
    block = CrossViewBlock(E, HEADS, 2.0, None, "pre").to("meta")
    masks = []

    def spy(q, k, v, attn_mask):
        masks.append(attn_mask)
        return torch.empty_like(q)

    monkeypatch.setattr("agssd.models.fuser.F.scaled_dot_product_attention", spy)
    for queries in (1, N + 1):
        query, memory = torch.empty(B, queries, E, device="meta"), torch.empty(B, M, E, device="meta")
        bias, forbidden = (torch.empty(B, queries, M, device="meta", dtype=dtype) for dtype in (None, torch.bool))
        for given in ((None, None), (bias, None), (None, forbidden), (bias, forbidden)):
            block._attend(query, memory, *given)
            assert masks[-1].expand(B, HEADS, queries, M).stride(-1) == 1
    assert len(masks) == 8


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_forbidden", [True, False])
def test_fuser__the_cpu_path_equals_sdpa(with_bias, with_forbidden):
    torch.manual_seed(0)
    block = CrossViewBlock(E, HEADS, 2.0, None, "pre")
    with torch.no_grad():
        block.gain.copy_(torch.linspace(0.5, 2.0, HEADS))
    query, memory, bias, forbidden = material()
    q = rearrange(block.query(query), "b n (h e) -> b h n e", h=HEADS)
    k, v = rearrange(block.memory(memory), "b m (two h e) -> two b h m e", two=2, h=HEADS)
    mask = torch.zeros(B, HEADS, N + 1, M)
    if with_bias:
        mask = mask + bias[:, None] * block.gain[:, None, None]
    if with_forbidden:
        mask = mask.masked_fill(forbidden[:, None], -torch.inf)
    wanted = block.out(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n e -> b n (h e)"))
    got = block._attend(query, memory, bias if with_bias else None, forbidden if with_forbidden else None)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_fuser__starts_close_to_the_identity_with_layer_scale():
    torch.manual_seed(0)
    fuser = CrossViewFuser(E, HEADS, layer_scale=1e-2)
    query, memory, bias, _ = material()
    change = (fuser(query, memory, bias) - query).norm() / query.norm()
    assert 1e-4 < change < 0.1


def test_fuser__reads_memory_in_any_order():
    torch.manual_seed(0)
    fuser = CrossViewFuser(E, HEADS, layer_scale=None)
    query, memory, bias, forbidden = material()
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        fuser(query, memory[:, order], bias[:, :, order], forbidden[:, :, order]),
        fuser(query, memory, bias, forbidden),
        atol=1e-5,
        rtol=1e-4,
    )


def test_fuser__under_bf16_autocast_is_close_to_fp32(fuser):
    query, memory, bias, forbidden = material()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fuser(query, memory, bias, forbidden)
    plain = fuser(query, memory, bias, forbidden)
    assert ((mixed.float() - plain).norm() / plain.norm()).item() < 0.02
    assert math.isfinite(mixed.float().abs().max().item())
