"""Properties of the residual network with a pyramid: MONAI's values, strides, what masks hide, what noise drops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork
from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn

from agssd.models.resnet_fpn import ResNetFPN, replace_batch_norms
from agssd.tasks.decoders import UNETRDecoder

torch.set_num_threads(1)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"block": "bottleneck", "layers": (1, 2), "token_stride": 4},
    {"layers": (1, 1, 1, 1), "token_stride": 16, "spatial_dims": 2},
]


def resnet(**kwargs: Any) -> ResNetFPN:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": (2, 1), "width": 8, "pyramid_channels": 12, "token_stride": 8, "norm_groups": 4}
    return ResNetFPN(**sizes | kwargs)


def shape_of(model: ResNetFPN, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Voxels of views of a token grid, which need not be whole cells of the coarser levels."""
    return tuple(n * p for n, p in zip(grid[-model.spatial_dims :], model.patch_size, strict=True))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniforms(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("dims", [2, 3])
def test_forward__maps_are_those_of_monais_network_and_pyramid(block: Any, dims: int) -> None:
    model = resnet(block=block, layers=(1, 2, 1, 1), token_stride=16, spatial_dims=dims, in_channels=2)
    torch.manual_seed(1)
    own = [8, 16, 32, 64]
    network = ResNet(block, [1, 2, 1, 1], own, dims, 2, conv1_t_stride=2, feed_forward=False, bias_downsample=False)
    replace_batch_norms(network, 4)
    expansion = 1 if block == "basic" else 4
    pyramid = FeaturePyramidNetwork(dims, [expansion * n for n in own], 12)
    model.resnet.load_state_dict(network.state_dict())
    model.pyramid.load_state_dict(pyramid.state_dict())
    x = noise(2, 2, *(64, 32, 32)[-dims:])
    with torch.no_grad():
        features = model(x)
        y, maps = network.maxpool(network.act(network.bn1(network.conv1(x)))), {}
        for stage in range(1, 5):
            y = maps[str(stage)] = network.get_submodule(f"layer{stage}")(y)
        expected = list(pyramid(maps).values())
    assert len(features.levels) == 4
    for mine, other in zip(features.levels, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_levels__of_a_view_of_224_have_56_28_14_and_7_cells() -> None:
    model = resnet(layers=(1, 1, 1, 1), token_stride=16, spatial_dims=2)
    with torch.no_grad():
        features = model(noise(1, 1, 224, 224))
    assert [tuple(level.shape[2:]) for level in features.levels] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert model.level_strides == ((4, 4), (8, 8), (16, 16), (32, 32)) and model.level_channels == (12,) * 4
    assert features.grid == (14, 14) == model.token_grid((224, 224)) and features.tokens.shape == (1, 196, 12)


def test_tokens__are_the_mean_of_all_levels_at_their_place_normed() -> None:
    model, x = resnet(layers=(1, 1, 1), token_stride=8), noise(2, 1, 32, 16, 16)
    features = model(x)
    fine, own, coarse = features.levels
    expected = torch.zeros(2, 12, 4, 2, 2)
    for i in range(4):
        for j in range(2):
            for k in range(2):
                parts = fine[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].mean((2, 3, 4))
                expected[:, :, i, j, k] = (parts + own[:, :, i, j, k] + coarse[:, :, i // 2, j // 2, k // 2]) / 3
    expected = F.layer_norm(expected.flatten(2).mT, (12,))
    torch.testing.assert_close(features.tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.cls, features.tokens.mean(1))
    assert features.grid == (4, 2, 2)


def test_norms__no_sample_changes_another_and_no_batch_statistics_are_kept() -> None:
    model, x = resnet().train(), noise(3, 1, 16, 16, 16)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm3d)) for m in model.modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == 1 + 2 * 3 + 1  # stem, blocks, one shortcut
    before = copy.deepcopy(model.state_dict())
    whole = model(x).tokens
    other = torch.cat([x[:1], 50 * x[1:] + 3])
    torch.testing.assert_close(model(other).tokens[:1], whole[:1], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_masked_content__changes_nothing(kwargs: dict[str, Any]) -> None:
    model = resnet(**kwargs)
    x = noise(2, 1, *shape_of(model, (2, 3, 2)))
    grid = model.token_grid(tuple(x.shape))
    mask = uniforms(2, *grid) < 0.5
    hidden = mask
    for axis, size in enumerate(model.patch_size, 1):
        hidden = hidden.repeat_interleave(size, axis)
    other = torch.where(hidden[:, None], 100 * noise(*x.shape, seed=5), x)
    a, b = model.forward_views([x], [mask])[0], model.forward_views([other], [mask])[0]
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.cls, b.cls)
    assert not torch.allclose(a.tokens, model.forward_views([other])[0].tokens, atol=1e-2)
    black = model.forward_views([x.masked_fill(hidden[:, None], 0)])[0]
    assert not torch.allclose(a.tokens, black.tokens, atol=1e-2), "hidden is told from black"


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_forward_views__groups_and_samples_equal_separate_passes(kwargs: dict[str, Any]) -> None:
    model = resnet(drop_path=0.5, **kwargs)
    shapes = [shape_of(model, grid) for grid in ((2, 3, 2), (1, 1, 1))]
    views = [noise(n, 1, *shape, seed=n) for n, shape in zip((4, 2), shapes, strict=True)]
    masks = [uniforms(4, *model.token_grid(shapes[0])) < 0.5, None]
    drops = [uniforms(4, model.depth), None]
    for i, group in enumerate(model.forward_views(views, masks, drops)):
        parts = []
        for sample in range(len(views[i])):
            given = [None if values[i] is None else values[i][sample][None] for values in (masks, drops)]
            parts.append(model.forward_views([views[i][sample][None]], [given[0]], [given[1]])[0])
        torch.testing.assert_close(group.tokens, torch.cat([p.tokens for p in parts]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(group.cls, torch.cat([p.cls for p in parts]), rtol=1e-4, atol=1e-5)
        assert group.grid == model.token_grid(shapes[i]) and group.levels == []
    torch.testing.assert_close(model.forward_views(views)[0].tokens, model(views[0]).tokens, rtol=0, atol=0)
    assert model.forward_views([]) == []


def test_drop_noise__below_probability_skips_the_block() -> None:
    model, x = resnet(drop_path=0.5), noise(3, 1, 16, 16, 16)
    assert model.drop_probs == (0.0, 0.25, 0.5)
    drops = torch.tensor([[0.0, 0.9, 0.9], [0.0, 0.2, 0.9], [0.0, 0.25, 0.499]])
    out = model.forward_views([x], None, [drops])[0]
    expected = []
    for sample, kept in ((0, (0, 1, 2)), (1, (0, 2)), (2, (0, 1))):  # 0.25 is not below 0.25
        short = copy.deepcopy(model)
        blocks = [*short.resnet.layer1, *short.resnet.layer2]
        with torch.no_grad():
            for i, block in enumerate(blocks):
                factor = float(i in kept) / (1 - model.drop_probs[i])
                block.bn2.weight.mul_(factor)
                block.bn2.bias.mul_(factor)
        expected.append(short.forward_views([x[sample : sample + 1]])[0].tokens)
    torch.testing.assert_close(out.tokens, torch.cat(expected), rtol=1e-4, atol=1e-5)
    state = torch.get_rng_state()
    assert torch.equal(model.train().forward_views([x])[0].tokens, model(x).tokens), "without noise nothing is random"
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kwargs", VARIANTS)
@pytest.mark.parametrize("masked", [True, False])
def test_gradient__of_tokens_alone_reaches_every_parameter(kwargs: dict[str, Any], masked: bool) -> None:
    model = resnet(drop_path=0.2, **kwargs)
    x = noise(2, 1, *shape_of(model, (2, 3, 2)))
    masks = [uniforms(2, *model.token_grid(tuple(x.shape))) < 0.5] if masked else None
    tokens = model.forward_views([x], masks, [uniforms(2, model.depth)])[0].tokens
    (tokens * noise(*tokens.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if masked or name != "mask_token":
            assert parameter.grad.abs().max() > 0, name
    model.freeze_mask_token()
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["mask_token"]


def test_layers__numbered_from_the_stem_through_blocks_to_the_pyramid() -> None:
    model = resnet(layers=(2, 1, 3), token_stride=8)
    layers = {name: model.layer_index(name) for name, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(model.depth + 2)) and model.depth == 6
    assert layers["mask_token"] == layers["resnet.conv1.weight"] == layers["resnet.bn1.bias"] == 0
    assert layers["resnet.layer1.1.conv2.weight"] == 2
    assert layers["resnet.layer2.0.downsample.0.weight"] == 3 and layers["resnet.layer3.2.bn1.weight"] == 6
    assert layers["pyramid.inner_blocks.0.weight"] == 7 and model.no_weight_decay() == {"mask_token"}


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_config__rebuilds_an_equal_module(kwargs: dict[str, Any]) -> None:
    model = resnet(drop_path=0.1, **kwargs)
    twin = ResNetFPN(**model.config["init_args"])
    twin.load_state_dict(model.state_dict())
    x = noise(1, 1, *shape_of(model, (1, 2, 1)))
    assert torch.equal(twin(x).tokens, model(x).tokens) and twin.config == model.config


@pytest.mark.parametrize("dims", [2, 3])
def test_unetr_decoder__takes_the_levels(dims: int) -> None:
    model = resnet(layers=(1, 1, 1, 1), token_stride=16, spatial_dims=dims)
    decoder = UNETRDecoder(1, model.level_channels, model.level_strides, 3, feature_size=2, stem=False)
    x = noise(1, 1, *(32, 64, 32)[-dims:])
    scores = decoder(x, model(x))
    assert scores.shape == (1, 3, *x.shape[2:])
    scores.square().sum().backward()
    still = [name for name, p in model.named_parameters() if name != "mask_token" and not p.grad.any()]
    assert not still


def test_autocast__bf16_close_and_tokens_in_float32() -> None:
    model, x = resnet(), noise(4, 1, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.forward_views([x], [uniforms(4, 2, 2, 2) < 0.5], None)[0]
    full = model.forward_views([x], [uniforms(4, 2, 2, 2) < 0.5], None)[0]
    assert low.tokens.dtype == torch.float32
    assert F.cosine_similarity(low.tokens, full.tokens, dim=-1).min() > 0.999
    assert resnet().bfloat16()(x.bfloat16()).tokens.dtype == torch.bfloat16


def test_what_only_others_have__refused_with_the_remedy() -> None:
    model, x = resnet(), noise(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match=r"no \[CLS\] token.*use a ViT"):
        model.cls_attention(x)
    with pytest.raises(ValueError, match="cannot leave tokens out; use a ViT"):
        model.forward_visible(x, torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="no patch embedding to freeze; set model.freeze_patch_embedding to false"):
        model.freeze_patch_embedding()
    with pytest.raises(ValueError, match="cannot be compiled; set model.compile to false"):
        model.compile_blocks()


@pytest.mark.parametrize(
    "shape, word",
    [
        ((1, 1, 8, 12, 8), "divisible"),
        ((1, 2, 8, 8, 8), "in_channels=2"),
        ((1, 8, 8, 8), "expected"),
        ((1, 1, 8, 8), "expected"),
    ],
)
def test_input__misfit_refused(shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        resnet()(torch.zeros(shape))


def test_tokens__of_a_view_that_cuts_coarse_cells_are_those_of_their_own_places() -> None:
    model = resnet(layers=(1, 1, 1, 1), token_stride=8, spatial_dims=2)
    features = model(noise(1, 1, 40, 72))
    assert features.grid == (5, 9) and [tuple(level.shape[2:]) for level in features.levels] == [
        (10, 18),
        (5, 9),
        (3, 5),
        (2, 3),
    ]
    fine, own, third, last = features.levels
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(9), indexing="ij")
    brought = [F.avg_pool2d(fine, 2), own, third[:, :, rows // 2, columns // 2], last[:, :, rows // 4, columns // 4]]
    expected = F.layer_norm(torch.stack(brought).mean(0).flatten(2).mT, (12,))
    torch.testing.assert_close(features.tokens, expected, rtol=1e-4, atol=1e-5)


def test_arguments__misfit_refused() -> None:
    x = noise(2, 1, 16, 16, 16)
    with pytest.raises(ValueError, match="mask"):
        resnet().forward_views([x], [torch.zeros(2, 4, 4, 4, dtype=torch.bool)])
    with pytest.raises(ValueError, match="one per group"):
        resnet().forward_views([x], [None, None])
    with pytest.raises(ValueError, match="drop_noise"):
        resnet().forward_views([x], None, [torch.zeros(2, 4)])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"layers": ()}, "1 to 4 stages"),
        ({"layers": (1,) * 5}, "1 to 4 stages"),
        ({"layers": (1, 0)}, "at least 1 each"),
        ({"block": "dense"}, "bottleneck"),
        ({"token_stride": 16}, r"\[4, 8\], use one"),
        ({"norm_groups": 3}, "does not divide the width 8"),
        ({"drop_path": 1.0}, "probability"),
        ({"width": 0}, "at least 1"),
        ({"spatial_dims": 4}, "3 for volumes or 2 for frames"),
    ]
    for given, words in bad:
        with pytest.raises(ValueError, match=words):
            resnet(**given)
