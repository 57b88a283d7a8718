"""Properties of the SwinUNETR encoder: MONAI's values, what masks hide, what noise drops, what stages give."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import PatchMerging, PatchMergingV2
from torch import Tensor, nn

from agssd.models.swin_unetr import MERGING, MERGING_OF_FRAMES, SwinUNETREncoder, merge_cells

torch.set_num_threads(1)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_v2": True, "depths": (1, 1, 2), "num_heads": (1, 2, 4), "patch_embed_stride": 1},
    {"patch_embed_stride": (1, 2, 2), "window_size": (2, 3, 2), "downsample": "merging_1.4"},
    {"patch_embed_stride": (1, 2), "window_size": (2, 3), "use_v2": True, "spatial_dims": 2},
]


def swin(**kwargs: Any) -> SwinUNETREncoder:
    torch.manual_seed(0)
    sizes = {"feature_size": 12, "depths": (2, 1), "num_heads": (2, 3), "window_size": 3}
    return SwinUNETREncoder(**sizes | kwargs)


def grid_of(model: SwinUNETREncoder, grid: tuple[int, int, int]) -> tuple[int, ...]:
    return grid[-model.spatial_dims :]


def shape_of(model: SwinUNETREncoder, grid: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(n * p for n, p in zip(grid_of(model, grid), model.patch_size, strict=True))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniforms(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("use_v2", [False, True])
@pytest.mark.parametrize("downsample", ["merging", "mergingv2"])
@pytest.mark.parametrize("dims", [2, 3])
def test_forward__hidden_states_are_monais(use_v2: bool, downsample: Any, dims: int) -> None:
    torch.manual_seed(0)
    shape, one = (32, 64, 32)[-dims:], (1, 2, 1)[-dims:]
    sizes: dict[str, Any] = {"feature_size": 12, "depths": (2, 1, 1, 2), "num_heads": (1, 2, 3, 4), "window_size": 3}
    sizes |= {"use_v2": use_v2, "downsample": downsample, "spatial_dims": dims}
    network = SwinUNETR(2, 3, **sizes).eval()
    orders = {"merging": PatchMerging, "mergingv2": PatchMergingV2}
    assert type(network.swinViT.layers1[0].downsample) is orders[downsample]
    model = SwinUNETREncoder(2, **sizes).eval()
    with torch.no_grad():
        for parameter in network.swinViT.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.swinViT.load_state_dict(network.swinViT.state_dict())
    x = noise(2, 2, *shape)
    with torch.no_grad():
        theirs, raw, features = network.swinViT(x), network.swinViT(x, normalize=False), model(x)
        for mine, other in zip(model.hidden_states(x, normalize=False), raw, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(features.levels, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert [level.shape[1] for level in features.levels] == list(model.level_channels)
    assert [tuple(n // s for n, s in zip(shape, stride, strict=True)) for stride in model.level_strides] == [
        tuple(level.shape[2:]) for level in features.levels
    ]
    assert features.grid == one and features.tokens.shape == (2, 2, model.embed_dim) == (2, 2, 192)
    assert torch.equal(features.tokens[:, 1], features.levels[-1].flatten(2)[:, :, 1])
    torch.testing.assert_close(features.cls, features.tokens.mean(1))


@pytest.mark.parametrize("order", MERGING.values(), ids=MERGING)
def test_merge_cells__names_every_cell_of_a_block_by_its_place(order: tuple[int, ...]) -> None:
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (4, 6, 2)), indexing="ij"), -1)[None]
    merged = merge_cells(places, order).unflatten(-1, (8, 3))
    assert merged.shape == (1, 2, 3, 1, 8, 3)
    for position, cell in enumerate(order):
        inside = torch.tensor([cell // 4, cell // 2 % 2, cell % 2])
        assert torch.equal(merged[0, 1, 2, 0, position], torch.tensor([2, 4, 0]) + inside)


def test_merge_cells__of_frames_names_every_cell_too() -> None:
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"), -1)[None]
    merged = merge_cells(places, MERGING_OF_FRAMES).unflatten(-1, (4, 2))
    assert merged.shape == (1, 2, 3, 4, 2)
    for position, cell in enumerate(MERGING_OF_FRAMES):
        assert merged[0, 1, 2, position].tolist() == [2 + cell // 2, 4 + cell % 2]


def test_merging__before_monai_1_5_leaves_two_cells_of_eight_out() -> None:
    assert sorted(set(range(8)) - set(MERGING["merging_1.4"])) == [3, 6]
    assert all(sorted(MERGING[name]) == list(range(8)) for name in ("merging", "mergingv2"))


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_masked_content__changes_nothing(kwargs: dict[str, Any]) -> None:
    model = swin(**kwargs)
    x = noise(2, 1, *shape_of(model, (2, 3, 2)))
    mask = uniforms(2, *grid_of(model, (2, 3, 2))) < 0.5
    hidden = mask
    for axis, size in enumerate(model.patch_size, 1):
        hidden = hidden.repeat_interleave(size, axis)
    other = torch.where(hidden[:, None], 100 * noise(*x.shape, seed=5), x)
    a, b = model.forward_views([x], [mask])[0], model.forward_views([other], [mask])[0]
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.cls, b.cls)
    assert not torch.allclose(a.tokens, model.forward_views([other])[0].tokens, atol=1e-2)


def test_mask__gradient_stops_at_hidden_voxels_and_nowhere_else() -> None:
    model, x = swin(), noise(1, 1, 16, 16, 16).requires_grad_()
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 1, 0, 1] = True
    features = model.forward_views([x], [mask])[0]
    (features.tokens * noise(*features.tokens.shape)).sum().backward()
    hidden = torch.zeros(16, 16, 16, dtype=torch.bool)
    hidden[8:, :8, 8:] = True  # the voxels of token (1, 0, 1): S second half, A first half, R second half
    assert x.grad is not None and (x.grad[0, 0][hidden] == 0).all() and (x.grad[0, 0][~hidden] != 0).all()


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_forward_views__groups_and_samples_equal_separate_passes(kwargs: dict[str, Any]) -> None:
    model = swin(drop_path=0.5, **kwargs)
    grids = [grid_of(model, grid) for grid in ((2, 3, 2), (1, 1, 1), (1, 3, 2))]
    shapes = [tuple(n * p for n, p in zip(grid, model.patch_size, strict=True)) for grid in grids]
    views = [noise(n, 1, *shape, seed=n) for n, shape in zip((4, 3, 2), shapes, strict=True)]
    masks = [uniforms(4, *grids[0]) < 0.5, None, uniforms(2, *grids[2]) < 0.5]
    drops = [uniforms(4, model.depth), uniforms(3, model.depth, seed=7), None]
    for i, group in enumerate(model.forward_views(views, masks, drops)):
        parts = []
        for sample in range(len(views[i])):
            given = [None if values[i] is None else values[i][sample][None] for values in (masks, drops)]
            parts.append(model.forward_views([views[i][sample][None]], [given[0]], [given[1]])[0])
        torch.testing.assert_close(group.tokens, torch.cat([p.tokens for p in parts]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.cls, torch.cat([p.cls for p in parts]), rtol=1e-5, atol=1e-5)
        assert group.grid == grids[i] and group.levels == []
    torch.testing.assert_close(model.forward_views(views)[0].tokens, model(views[0]).tokens, rtol=0, atol=0)
    assert model.forward_views([]) == []


def test_drop_noise__below_probability_skips_the_block() -> None:
    model, x = swin(drop_path=0.5), noise(3, 1, 16, 16, 16)
    assert model.drop_probs == (0.0, 0.25, 0.5)
    drops = torch.tensor([[0.0, 0.9, 0.9], [0.0, 0.2, 0.9], [0.0, 0.25, 0.499]])
    out = model.forward_views([x], None, [drops])[0]
    expected = []
    for sample, kept in ((0, (0, 1, 2)), (1, (0, 2)), (2, (0, 1))):  # 0.25 is not below 0.25
        short = copy.deepcopy(model)
        blocks = [*short.swinViT.layers1[0].blocks, *short.swinViT.layers2[0].blocks]
        with torch.no_grad():
            for i, block in enumerate(blocks):
                factor = float(i in kept) / (1 - model.drop_probs[i])
                for layer in (block.attn.proj, block.mlp.linear2):
                    layer.weight.mul_(factor)
                    layer.bias.mul_(factor)
        expected.append(short.forward_views([x[sample : sample + 1]])[0].tokens)
    torch.testing.assert_close(out.tokens, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_drop_noise__without_it_nothing_is_random() -> None:
    model, x = swin(drop_path=0.9).train(), noise(2, 1, 8, 8, 8)
    state = torch.get_rng_state()
    first, second = model.forward_views([x])[0].tokens, model(x).tokens
    model.forward_views([x], None, [uniforms(2, 3)])
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kwargs", VARIANTS)
@pytest.mark.parametrize("masked", [True, False])
def test_gradient__reaches_every_parameter(kwargs: dict[str, Any], masked: bool) -> None:
    model = swin(drop_path=0.2, **kwargs)
    views = [noise(2, 1, *shape_of(model, (2, 3, 2))), noise(3, 1, *shape_of(model, (1, 2, 2)))]
    masks = [uniforms(2, *grid_of(model, (2, 3, 2))) < 0.5, None] if masked else None
    out = model.forward_views(views, masks, [uniforms(2, model.depth), None])
    sum((f.cls * noise(*f.cls.shape)).sum() + (f.tokens * noise(*f.tokens.shape)).sum() for f in out).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if masked or name != "mask_token":
            assert parameter.grad.abs().max() > 0, name
    model.freeze_mask_token()
    model.freeze_patch_embedding()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"mask_token", "swinViT.patch_embed.proj.weight", "swinViT.patch_embed.proj.bias"}


def test_stages__the_first_of_four_are_those_of_the_whole_encoder() -> None:
    whole = swin(depths=(1, 2, 1), num_heads=(1, 2, 3))
    short = swin(depths=(1, 2), num_heads=(1, 2))
    own = short.state_dict()
    short.load_state_dict({name: value for name, value in whole.state_dict().items() if name in own})
    assert (whole.patch_size, short.patch_size) == ((16,) * 3, (8,) * 3) and (whole.embed_dim, short.embed_dim) == (
        96,
        48,
    )
    x = noise(1, 1, 32, 16, 16)
    for a, b in zip(short(x).levels, whole(x).levels[:-1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(short(x).tokens, whole(x).levels[2].flatten(2).mT)


def test_use_checkpoint__same_features_and_gradients() -> None:
    plain, light = swin(drop_path=0.3, use_v2=True), swin(drop_path=0.3, use_v2=True, use_checkpoint=True)
    x, drops = noise(2, 1, 16, 16, 16), uniforms(2, 3)
    a, b = (model.forward_views([x], None, [drops])[0].tokens for model in (plain, light))
    assert torch.equal(a, b)
    saved: list[int] = []
    for model in (plain, light):
        count = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.forward_views([x], None, [drops])[0].tokens.square().sum()
        saved.append(count)
        loss.backward()
    assert saved[1] < 0.6 * saved[0]
    for (name, one), other in zip(plain.named_parameters(), light.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_layers__numbered_from_embedding_through_blocks() -> None:
    model = swin(use_v2=True, depths=(2, 1, 3), num_heads=(1, 1, 1))
    names = [name for name, _ in model.named_parameters()]
    layers = {name: model.layer_index(name) for name in names}
    assert set(layers.values()) == set(range(model.depth + 2)) and model.depth == 6
    assert layers["mask_token"] == layers["swinViT.patch_embed.proj.weight"] == 0
    assert layers["swinViT.layers1.0.blocks.1.attn.qkv.weight"] == layers["swinViT.layers1.0.downsample.norm.bias"] == 2
    assert (
        layers["swinViT.layers3c.0.layer.conv1.conv.weight"] == layers["swinViT.layers3.0.blocks.0.norm1.weight"] == 4
    )
    assert layers["swinViT.layers3.0.blocks.2.mlp.linear1.bias"] == 6
    assert layers["swinViT.layers3.0.downsample.reduction.weight"] == 7
    free = model.no_weight_decay()
    assert {name for name in names if "position_bias" in name} | {"mask_token"} == free and len(free) == 7


def test_config__rebuilds_an_equal_module() -> None:
    model = swin(drop_path=0.1, use_v2=True, mlp_ratio=2.0, patch_embed_stride=(1, 2, 2), downsample="merging")
    twin = SwinUNETREncoder(**model.config["init_args"])
    twin.load_state_dict(model.state_dict())
    x = noise(1, 1, 4, 8, 16)
    assert torch.equal(twin(x).tokens, model(x).tokens) and twin.config == model.config


def test_what_only_a_vit_has__refused_with_the_remedy() -> None:
    model, x = swin(), noise(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match=r"no \[CLS\] token.*use a ViT"):
        model.cls_attention(x)
    with pytest.raises(ValueError, match=r"no \[CLS\] token.*use a ViT"):
        model.record_cls_attention = True
    assert not model.record_cls_attention
    with pytest.raises(ValueError, match="cannot leave tokens out; use a ViT"):
        model.forward_visible(x, torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    "shape, word", [((1, 1, 8, 12, 8), "divisible"), ((1, 2, 8, 8, 8), "in_channels=2"), ((1, 8, 8, 8), "expected")]
)
def test_input__misfit_refused(shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        swin()(torch.zeros(shape))


def test_arguments__misfit_refused() -> None:
    x = noise(2, 1, 16, 16, 16)
    with pytest.raises(ValueError, match="mask"):
        swin().forward_views([x], [torch.zeros(2, 4, 4, 4, dtype=torch.bool)])
    with pytest.raises(ValueError, match="one per group"):
        swin().forward_views([x], [None, None])
    with pytest.raises(ValueError, match="drop_noise"):
        swin().forward_views([x], None, [torch.zeros(2, 4)])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"num_heads": (2,)}, "same 1 to 4 stages"),
        ({"depths": (1,) * 5, "num_heads": (1,) * 5}, "same 1 to 4 stages"),
        ({"num_heads": (2, 5)}, "5 does not divide the 24 channels of stage 2"),
        ({"drop_path": 1.0}, "probability"),
        ({"window_size": 0}, "at least 1"),
        ({"downsample": "pooling"}, "merging_1.4"),
        ({"spatial_dims": 1}, "3 for volumes or 2 for frames"),
        ({"window_size": (3, 3)}, "give one number, or 3 with spatial_dims: 3"),
    ]
    for given, words in bad:
        with pytest.raises(ValueError, match=words):
            swin(**given)


def test_mask_of_windows__survives_inference_mode_copy_and_pickle() -> None:
    model, x = swin(), noise(1, 1, 24, 16, 16, seed=3)
    with torch.inference_mode():
        expected = model(x).tokens.clone()
    model(x).tokens.sum().backward()  # masks made in inference mode must not reach autograd as such
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x).tokens, expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_v2", [False, True])
def test_autocast__bf16_close_and_stream_in_float32(use_v2: bool) -> None:
    model, x = swin(use_v2=use_v2, feature_size=24), noise(4, 1, 16, 16, 16)
    kept: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, given: kept.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = model.forward_views([x], [uniforms(4, 2, 2, 2) < 0.5], None)[0]
    assert low.tokens.dtype == torch.float32 and set(kept) == {torch.float32}
    full = model.forward_views([x], [uniforms(4, 2, 2, 2) < 0.5], None)[0]
    assert F.cosine_similarity(low.tokens, full.tokens, dim=-1).min() > 0.999
    assert swin(use_v2=use_v2).bfloat16()(x.bfloat16()).tokens.dtype == torch.bfloat16


@pytest.mark.slow
def test_compile_blocks__equals_eager() -> None:
    model, twin = (swin(drop_path=0.3, depths=(2,), num_heads=(2,)) for _ in range(2))
    views, masks = [noise(2, 1, 16, 16, 16), noise(3, 1, 4, 8, 4)], [uniforms(2, 4, 4, 4) < 0.5, None]
    drops = [uniforms(2, 2), uniforms(3, 2, seed=8)]
    keys = list(model.state_dict())
    model.compile_blocks("aot_eager")
    compiled, eager = model.forward_views(views, masks, drops), twin.forward_views(views, masks, drops)
    assert list(model.state_dict()) == keys
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-4, atol=1e-5)
    sum(f.tokens.square().sum() for f in compiled).backward()
    sum(f.tokens.square().sum() for f in eager).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
