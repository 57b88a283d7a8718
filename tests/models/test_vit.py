"""Properties of the ViT: what masks hide, what groups share, what positions mean, what noise drops."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.models.position import axis_coordinates, rotary_angles, sincos_position
from agssd.models.vit import CPU_MATMUL_LENGTH, SIZES, Attention, Group, ViT, attend

torch.set_num_threads(1)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"rotary": True, "num_registers": 2, "layer_scale": 0.1},
    {"class_token": False, "position_grid": (2, 3, 2)},
]


def vit(**kwargs: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"patch_size": 4, "embed_dim": 48, "num_heads": 4, "depth": 3} | kwargs)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniforms(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def reference(model: ViT, x: Tensor) -> Tensor:
    """Return normed tokens (B, L, E) computed with textbook attention and a strided convolution."""
    tokens = F.conv3d(x, model.patch_weight, model.patch_bias, stride=model.patch_size).flatten(2).transpose(1, 2)
    grid = tuple(s // p for s, p in zip(x.shape[2:], model.patch_size, strict=True))
    tokens = tokens + sincos_position(grid, model.embed_dim) * model.position_scale
    tokens = torch.cat([model.cls_token.expand(len(x), 1, -1), tokens], 1)
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, model.num_heads, -1)).unbind(2)
        weight = (torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + block.attn.proj(torch.einsum("bhlm,bmhd->blhd", weight, v).flatten(2))
        tokens = tokens + block.fc2(F.gelu(block.fc1(block.norm2(tokens))))
    return model.norm(tokens)


def test_forward__equals_textbook_transformer() -> None:
    model, x = vit(in_channels=2, patch_size=(4, 2, 3)), noise(2, 2, 8, 6, 12)
    expected, features = reference(model, x), model(x)
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.tokens, expected[:, 1:], rtol=1e-5, atol=1e-5)
    assert features.grid == (2, 3, 4)


@pytest.mark.parametrize("size", SIZES)
def test_sizes__as_specified_and_overridable(size: Any) -> None:
    with torch.device("meta"):
        model = ViT(size=size, patch_size=16)
    assert (model.embed_dim, model.depth, model.num_heads) == SIZES[size]
    assert model.blocks[0].attn.qkv.weight.shape == (3 * model.embed_dim, model.embed_dim)
    assert vit(size=size).depth == 3


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_masked_content__changes_nothing(kwargs: dict[str, Any]) -> None:
    model, x = vit(**kwargs), noise(2, 1, 8, 12, 8)
    mask = uniforms(2, 2, 3, 2) < 0.5
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None]
    other = torch.where(hidden, 100 * noise(*x.shape, seed=5), x)
    a, b = model.forward_views([x], [mask])[0], model.forward_views([other], [mask])[0]
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.cls, b.cls)
    assert not torch.allclose(a.tokens, model.forward_views([other])[0].tokens, atol=1e-2)


def test_mask__gradient_stops_at_hidden_voxels() -> None:
    model, x = vit(), noise(1, 1, 8, 8, 8).requires_grad_()
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 1, 0, 1] = True
    features = model.forward_views([x], [mask])[0]
    (features.tokens * noise(*features.tokens.shape)).sum().backward()
    hidden = torch.zeros(8, 8, 8, dtype=torch.bool)
    hidden[4:, :4, 4:] = True  # the voxels of token (1, 0, 1): S second half, A first half, R second half
    assert x.grad is not None and (x.grad[0, 0][hidden] == 0).all() and (x.grad[0, 0][~hidden] != 0).any()


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_forward_views__groups_equal_separate_passes(kwargs: dict[str, Any]) -> None:
    model = vit(drop_path=0.5, **kwargs)
    views = [noise(4, 1, 16, 16, 16), noise(6, 1, 8, 8, 8, seed=3), noise(2, 1, 4, 12, 8, seed=4)]
    masks = [uniforms(4, 4, 4, 4) < 0.5, None, uniforms(2, 1, 3, 2) < 0.5]
    drops = [uniforms(4, 3), uniforms(6, 3, seed=7), None]
    together = model.forward_views(views, masks, drops)
    for i, group in enumerate(together):
        alone = model.forward_views([views[i]], [masks[i]], [drops[i]])[0]
        torch.testing.assert_close(group.tokens, alone.tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.cls, alone.cls, rtol=1e-5, atol=1e-5)
        assert group.grid == alone.grid and group.levels == []
    assert model.forward_views([]) == []


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_forward_visible__all_patches_in_any_order_equal_the_whole_view(kwargs: dict[str, Any]) -> None:
    model, x = vit(**kwargs), noise(2, 1, 8, 12, 8)
    whole = model(x)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    seen = model.forward_visible(x, order)
    expected = whole.tokens.gather(1, order[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(seen.tokens, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.cls, whole.cls, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_forward_visible__what_is_left_out_changes_nothing(kwargs: dict[str, Any]) -> None:
    model, x = vit(**kwargs), noise(1, 1, 8, 12, 8)
    other = x.clone()
    other[:, :, 4:] = 7.0
    visible = torch.tensor([[0, 3, 5]])  # all in the lower half
    seen, same = model.forward_visible(x, visible), model.forward_visible(other, visible)
    assert torch.equal(seen.tokens, same.tokens) and seen.tokens.shape == (1, 3, 48)
    assert not torch.allclose(seen.tokens, model(x).tokens[:, visible[0]], atol=1e-3), "all patches entered"


def test_forward_visible__drop_noise_skips_as_in_the_whole_view() -> None:
    model, x = vit(drop_path=0.5), noise(3, 1, 8, 8, 8)
    uniform = uniforms(3, 3)
    seen = model.forward_visible(x, torch.arange(8).expand(3, -1), uniform)
    torch.testing.assert_close(seen.tokens, model.forward_views([x], None, [uniform])[0].tokens, rtol=1e-5, atol=1e-5)


def test_forward_crops__equals_separate_passes_and_brings_attention_when_asked() -> None:
    model = vit()
    views, local = noise(2, 2, 1, 8, 8, 8), noise(2, 3, 1, 4, 4, 4, seed=3)
    mask = uniforms(2, 2, 2, 2, 2) < 0.5
    seen = model.forward_crops(views, local, mask)
    assert seen.attention is None and seen.local_cls is not None
    for b in range(2):
        for v in range(2):
            one = model.forward_views([views[b, v][None]], [mask[b, v][None]])[0]
            torch.testing.assert_close(seen.cls[b, v], one.cls[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(seen.tokens[b, v], one.tokens[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.local_cls[b], model(local[b]).cls, rtol=1e-5, atol=1e-5)
    model.record_cls_attention = True
    attention = model.forward_crops(views).attention
    assert attention is not None and attention.shape == (2, 2, 4, 2, 2, 2)
    torch.testing.assert_close(attention[1], model.cls_attention(views[1]), rtol=1e-5, atol=1e-5)


def test_drop_noise__independent_of_how_the_batch_is_cut() -> None:
    model, x, drops = vit(drop_path=0.6), noise(6, 1, 8, 8, 8), uniforms(6, 3)
    whole = model.forward_views([x], None, [drops])[0]
    parts = [model.forward_views([x[a:b]], None, [drops[a:b]])[0] for a, b in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(whole.tokens, torch.cat([p.tokens for p in parts]), rtol=1e-5, atol=1e-5)


def test_drop_noise__below_probability_skips_the_block() -> None:
    model, x = vit(drop_path=0.5), noise(3, 1, 8, 8, 8)
    assert model.drop_probs == (0.0, 0.25, 0.5)
    drops = torch.tensor([[0.0, 0.9, 0.9], [0.0, 0.2, 0.9], [0.0, 0.25, 0.499]])
    out = model.forward_views([x], None, [drops])[0]
    expected = []
    for sample, kept in ((0, (0, 1, 2)), (1, (0, 2)), (2, (0, 1))):  # 0.25 is not below 0.25
        short = copy.deepcopy(model)
        with torch.no_grad():
            for i, block in enumerate(short.blocks):
                factor = float(i in kept) / (1 - model.drop_probs[i])
                for layer in (block.attn.proj, block.fc2):
                    layer.weight.mul_(factor)
                    layer.bias.mul_(factor)
        expected.append(short.forward_views([x[sample : sample + 1]])[0].tokens)
    torch.testing.assert_close(out.tokens, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_drop_noise__without_it_nothing_is_random() -> None:
    model, x = vit(drop_path=0.9).train(), noise(2, 1, 8, 8, 8)
    state = torch.get_rng_state()
    first, second = model.forward_views([x])[0].tokens, model(x).tokens
    model.forward_views([x], None, [uniforms(2, 3)])
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("grid", [(2, 2, 2), (3, 5, 2)])
def test_sincos__equal_places_equal_codes_on_every_grid(grid: tuple[int, int, int]) -> None:
    fine = tuple(3 * n for n in grid)  # the centre of token i of n is the centre of token 3i + 1 of 3n
    code = sincos_position(grid, 60).view(*grid, 60)
    torch.testing.assert_close(sincos_position(fine, 60).view(*fine, 60)[1::3, 1::3, 1::3], code, rtol=0, atol=1e-6)


def test_sincos__small_grid_is_large_grid_resampled() -> None:
    def resampled(grid: tuple[int, int, int], to: tuple[int, int, int]) -> float:
        large = sincos_position(grid, 96).view(*grid, 96).movedim(-1, 0)[None]
        small = F.interpolate(large, size=to, mode="trilinear", align_corners=False)[0].movedim(0, -1).flatten(0, 2)
        direct = sincos_position(to, 96)
        nearest = torch.cdist(direct, small).argmin(1)
        assert torch.equal(nearest, torch.arange(len(direct)))  # every token finds its own place
        return F.cosine_similarity(direct, small).min().item()

    assert resampled((6, 6, 6), (3, 3, 3)) > 0.97
    assert resampled((12, 12, 12), (6, 6, 6)) > 0.99
    assert resampled((6, 9, 4), (3, 3, 2)) > 0.9


@pytest.mark.parametrize("grid", [(6, 6, 6), (3, 3, 3), (2, 5, 4)])
def test_sincos__places_differ_and_axes_are_not_mixed(grid: tuple[int, int, int]) -> None:
    code = sincos_position(grid, 100)
    assert (code[:, 96:] == 0).all() and (code[:, :96].square().sum(1) - 48).abs().max() < 1e-4
    assert torch.cdist(code, code).add(10 * torch.eye(len(code))).min() > 1.0
    axes = code[:, :96].view(*grid, 3, 32)
    assert torch.equal(axes[:, :1, :1, 0].expand(*grid, 32), axes[..., 0, :])
    assert torch.equal(axes[:1, :, :1, 1].expand(*grid, 32), axes[..., 1, :])
    assert torch.equal(axes[:1, :1, :, 2].expand(*grid, 32), axes[..., 2, :])
    second = [0.5 / grid[0], 0.5 / grid[1], 1.5 / grid[2]]
    torch.testing.assert_close(axis_coordinates(grid)[1].tolist(), second)


def test_position_table__own_grid_exact_other_grids_trilinear() -> None:
    model = vit(position_grid=(6, 6, 6))
    torch.testing.assert_close(model.position((6, 6, 6)), sincos_position((6, 6, 6), 48), rtol=0, atol=1e-7)
    means = F.avg_pool3d(model.position_table[None], 2)[0].flatten(1).T  # exact trilinear result for half the grid
    torch.testing.assert_close(model.position((3, 3, 3)), means, rtol=0, atol=1e-6)
    assert "position_table" in model.state_dict() and "position_table" not in vit().state_dict()


@pytest.mark.parametrize("kwargs", [{}, {"rotary": True, "position_scale": 0.0}])
def test_position__permuted_patches_are_told_apart(kwargs: dict[str, Any]) -> None:
    model, x = vit(**kwargs), noise(1, 1, 8, 8, 8)
    assert not torch.allclose(model(x).cls, model(x.flip(2)).cls, atol=1e-3)


def test_position__without_it_tokens_are_a_set() -> None:
    model, x = vit(position_scale=0.0), noise(1, 1, 8, 8, 8)
    swapped = torch.cat([x[:, :, 4:], x[:, :, :4]], 2)
    a, b = model(x), model(swapped)
    torch.testing.assert_close(a.cls, b.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.tokens.unflatten(1, (2, 4)).flip(1).flatten(1, 2), b.tokens, rtol=1e-5, atol=1e-5)


def test_rotary__logits_depend_on_offset_only() -> None:
    model = vit(rotary=True, embed_dim=48, num_heads=2)
    cos, sin = model._rotation((4, 3, 5))
    from agssd.models.position import rotate

    q, k = noise(1, 1, 1, 24).expand(1, 1, 61, 24), noise(1, 1, 1, 24, seed=9).expand(1, 1, 61, 24)
    logits = (rotate(q, (cos, sin)) @ rotate(k, (cos, sin)).transpose(-1, -2))[0, 0, 1:, 1:].view(4, 3, 5, 4, 3, 5)
    torch.testing.assert_close(logits[0, 0, 0, 2, 1, 3], logits[1, 1, 1, 3, 2, 4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[0, 2, 0, 0, 0, 1], logits[3, 2, 3, 3, 0, 4], rtol=1e-5, atol=1e-5)
    assert (logits[0, 0, 0, 0, 0, 1] - logits[0, 0, 0, 0, 0, 2]).abs() > 1e-3
    assert (cos[0] == 1).all() and (sin[0] == 0).all()  # [CLS] has no place
    assert (rotary_angles((4, 3, 5), 26)[:, 12:] == 0).all()


@pytest.mark.parametrize("kept", [False, True])
def test_rotary__of_queries_and_keys_is_that_of_each_pair_of_channels(kept: bool) -> None:
    rotation = vit(rotary=True, embed_dim=48, num_heads=2)._rotation((2, 3, 2))
    if kept:  # where tokens are left out, each sample has angles of its own
        places = torch.tensor([[0, 3, 8], [0, 1, 12]])
        rotation = (rotation[0][places][:, None], rotation[1][places][:, None])
    attention, length = Attention(48, 2), rotation[0].shape[-2]
    qkv = noise(2 * length, 144)
    q, k, v = attention.split(qkv, Group(2, length), rotation)
    parts = qkv.double().view(2, length, 3, 2, 24).permute(2, 0, 3, 1, 4)
    for found, given in ((q, parts[0]), (k, parts[1])):
        complex_given = torch.complex(given[..., :12], given[..., 12:])
        turned = complex_given * torch.complex(rotation[0][..., :12].double(), rotation[1][..., :12].double())
        torch.testing.assert_close(found.double(), torch.cat([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(v.double(), parts[2])


def test_levels__hidden_states_of_unetr_shallow_to_deep() -> None:
    model, x = vit(depth=12, num_registers=1), noise(1, 1, 8, 12, 4)
    features = model(x)
    normed, states = model.hidden_states(x)
    for level, tokens in zip(features.levels, [states[3], states[6], states[9], normed], strict=True):
        assert level.shape == (1, 48, 2, 3, 1)
        assert torch.equal(level[0, :, 1, 2, 0], tokens[0, 5])
    assert torch.equal(normed, features.tokens)
    for depth in (1, 2, 3, 5):
        assert len(vit(depth=depth)(x).levels) == 4


@pytest.mark.parametrize("kwargs", VARIANTS[:2])
def test_cls_attention__is_the_softmax_row_of_the_last_block(kwargs: dict[str, Any]) -> None:
    model, x = vit(**kwargs), noise(2, 1, 8, 12, 8)
    caught: list[Tensor] = []
    attention = model.blocks[-1].attn
    original = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caught.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1))
        return original(q, k, v)

    F.scaled_dot_product_attention = spy
    try:
        model(x)
    finally:
        F.scaled_dot_product_attention = original
    row = caught[-1][:, :, 0, model.num_prefix :].view(2, attention.num_heads, 2, 3, 2)
    torch.testing.assert_close(model.cls_attention(x), row, rtol=1e-5, atol=1e-6)
    assert model.last_cls_attention is None
    model.record_cls_attention = True
    model.forward_views([noise(1, 1, 4, 4, 4), x])
    assert [tuple(a.shape) for a in model.last_cls_attention or []] == [(1, 4, 1, 1, 1), (2, 4, 2, 3, 2)]
    torch.testing.assert_close((model.last_cls_attention or [])[1], row, rtol=1e-5, atol=1e-6)


def test_cls_attention__refused_without_cls() -> None:
    with pytest.raises(ValueError, match="class_token"):
        vit(class_token=False).cls_attention(noise(1, 1, 4, 4, 4))


@pytest.mark.parametrize("kwargs", VARIANTS)
@pytest.mark.parametrize("masked", [True, False])
def test_gradient__reaches_every_parameter(kwargs: dict[str, Any], masked: bool) -> None:
    model = vit(drop_path=0.2, **kwargs)
    views = [noise(2, 1, 8, 12, 8), noise(3, 1, 4, 8, 8)]
    masks = [uniforms(2, 2, 3, 2) < 0.5, None] if masked else None
    out = model.forward_views(views, masks, [uniforms(2, 3), None])
    sum((f.cls * noise(*f.cls.shape)).sum() + (f.tokens * noise(*f.tokens.shape)).sum() for f in out).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if masked or name != "mask_token":
            assert parameter.grad.abs().max() > 0, name


def test_initialisation__content_is_not_drowned_by_position() -> None:
    torch.manual_seed(0)
    model, x = ViT(patch_size=8, size="tiny", depth=4), noise(16, 1, 32, 32, 32)
    content = F.linear(model._patchify(x), model.patch_weight.flatten(1)).view(16, 64, -1)
    assert content.std() > 2 * model.position((4, 4, 4)).std()
    assert model(x).cls.std(0).mean() > 0.2  # [CLS] of different volumes differs
    bound = (6 / (192 + 512)) ** 0.5
    assert 0.95 * bound < model.patch_weight.abs().max() <= bound


def test_no_weight_decay__names_exist() -> None:
    model = vit(num_registers=2, layer_scale=0.1)
    names = dict(model.named_parameters())
    free = model.no_weight_decay()
    assert free <= names.keys() and {"cls_token", "mask_token", "registers", "blocks.2.scale1"} <= free
    assert all(p.ndim == 1 or n in {"cls_token", "registers"} for n, p in names.items() if n in free)
    layers = {model.layer_index(name) for name in names}
    assert layers == {0, 1, 2, 3, 4} and model.layer_index("norm.weight") == 4


def test_config__rebuilds_an_equal_module() -> None:
    model = vit(drop_path=0.1, num_registers=2, position_grid=(2, 2, 2), mlp_ratio=2.0, patch_size=(2, 4, 4))
    assert model.config["class_path"] == "agssd.models.vit.ViT"
    twin = ViT(**model.config["init_args"])
    twin.load_state_dict(model.state_dict())
    x = noise(1, 1, 4, 8, 12)
    assert torch.equal(twin(x).tokens, model(x).tokens) and twin.config == model.config


@pytest.mark.parametrize(
    "shape, word", [((1, 1, 8, 9, 8), "divisible"), ((1, 2, 8, 8, 8), "in_channels=2"), ((1, 8, 8, 8), "expected")]
)
def test_input__misfit_refused(shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        vit()(torch.zeros(shape))


def test_arguments__misfit_refused() -> None:
    x = noise(2, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="mask"):
        vit().forward_views([x], [torch.zeros(2, 8, 8, 8, dtype=torch.bool)])
    with pytest.raises(ValueError, match="mask"):
        vit().forward_views([x], [torch.zeros(2, 2, 2, 2)])
    with pytest.raises(ValueError, match="one per group"):
        vit().forward_views([x], [None, None])
    with pytest.raises(ValueError, match="drop_noise"):
        vit(drop_path=0.1).forward_views([x], None, [torch.zeros(2, 4)])
    for bad in ({"size": "huge"}, {"num_heads": 5}, {"drop_path": 1.0}, {"patch_size": 0}, {"embed_dim": 4}):
        with pytest.raises(ValueError):
            vit(**bad)(x)


def test_cache__survives_inference_mode_copy_and_pickle() -> None:
    model, x = vit(rotary=True), noise(1, 1, 8, 8, 8)
    with torch.inference_mode():
        expected = model(x).tokens.clone()
    model(x).tokens.sum().backward()  # tables made in inference mode must not reach autograd as such
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x).tokens, expected, rtol=0, atol=0)


def test_autocast__bf16_close_and_stream_in_float32() -> None:
    model, x = vit(embed_dim=96, depth=4), noise(4, 1, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.forward_views([x], [uniforms(4, 4, 4, 4) < 0.5], None)[0]
        attention = model.cls_attention(x)
    full = model.forward_views([x], [uniforms(4, 4, 4, 4) < 0.5], None)[0]
    assert low.tokens.dtype == torch.float32 == attention.dtype
    assert F.cosine_similarity(low.tokens, full.tokens, dim=-1).min() > 0.999
    assert vit().bfloat16()(x.bfloat16()).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("length", [9, 65, CPU_MATMUL_LENGTH + 1])
def test_attend__half_precision_on_cpu_close_to_float32(length: int) -> None:
    q, k, v = (noise(2, 3, length, 16, seed=i).bfloat16().requires_grad_() for i in range(3))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    weight = noise(2, 3, length, 16, seed=4)
    out, expected = attend(q, k, v), F.scaled_dot_product_attention(*exact)
    assert out.dtype == torch.bfloat16
    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in [(out, expected), *((t.grad, e.grad) for t, e in zip((q, k, v), exact, strict=True))]:
        assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_blocks__equals_eager(backend: str) -> None:
    model, twin = vit(drop_path=0.3, rotary=True), vit(drop_path=0.3, rotary=True)
    views, masks = [noise(2, 1, 8, 8, 8), noise(3, 1, 4, 8, 4)], [uniforms(2, 2, 2, 2) < 0.5, None]
    drops = [uniforms(2, 3), uniforms(3, 3, seed=8)]
    keys = list(model.state_dict())
    model.compile_blocks(backend)
    try:
        compiled = model.forward_views(views, masks, drops)
    except Exception as error:
        if backend != "inductor":
            raise
        pytest.skip(f"torch.compile has no working compiler here: {type(error).__name__}")
    eager = twin.forward_views(views, masks, drops)
    assert list(model.state_dict()) == keys
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-4, atol=1e-5)
    sum(f.tokens.square().sum() for f in compiled).backward()
    sum(f.tokens.square().sum() for f in eager).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("rotary", [False, True])
def test_frames__equal_volumes_of_one_slice_but_for_their_positions(rotary):
    torch.manual_seed(0)
    flat = ViT(patch_size=8, size="tiny", depth=2, position_scale=0.0, spatial_dims=2)
    deep = ViT(patch_size=(1, 8, 8), size="tiny", depth=2, position_scale=0.0)
    state = flat.state_dict()
    state["patch_weight"] = state["patch_weight"].unsqueeze(2)
    deep.load_state_dict(state)
    x = torch.randn(2, 1, 24, 40)
    found, wanted = flat(x), deep(x[:, :, None])
    assert found.grid == (3, 5)
    torch.testing.assert_close(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.levels[0], wanted.levels[0][:, :, 0])
    if rotary:
        turned = ViT(patch_size=8, size="tiny", depth=2, position_scale=0.0, rotary=True, spatial_dims=2)
        turned.load_state_dict(flat.state_dict())
        assert not torch.allclose(turned(x).tokens, found.tokens, atol=1e-3)


def test_frames__positions_of_a_small_grid_are_those_of_the_large_one_resampled():
    large, small = sincos_position((12, 8), 64), sincos_position((4, 8), 64)
    middle = large.view(4, 3, 8, 64)[:, 1]  # three rows to one: the middle row has its centre
    torch.testing.assert_close(small.view(4, 8, 64), middle)
    assert len(large.unique(dim=0)) == 96


def test_frames__refuse_volumes_and_sizes_of_three_numbers():
    with pytest.raises(ValueError, match="patch_size .* spatial_dims is 2; give 2 numbers"):
        ViT(patch_size=(8, 8, 8), size="tiny", spatial_dims=2)
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\)"):
        ViT(patch_size=8, size="tiny", depth=1, spatial_dims=2)(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="spatial_dims is 4"):
        ViT(patch_size=8, size="tiny", spatial_dims=4)
