"""Decoders put every token's scores on the voxels of its own patch and grow any power-of-two patch."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.unetr_block import UnetrBasicBlock

from agssd.tasks.decoders import LinearDecoder, UNETRDecoder, place_patches, up_strides
from agssd.types import Features


def features(grid: tuple[int, int, int], size: int, levels: int = 4) -> Features:
    count = grid[0] * grid[1] * grid[2]
    tokens = torch.randn(1, count, size, generator=torch.Generator().manual_seed(0))
    maps = [tokens.mT.reshape(1, size, *grid) * (1 + level) for level in range(levels)]
    return Features(tokens[:, 0], tokens, grid, maps)


def test_place_patches__coordinates_as_values__every_voxel_gets_its_own() -> None:
    grid, patch = (2, 3, 4), (4, 2, 8)
    shape = tuple(g * p for g, p in zip(grid, patch, strict=True))
    axes = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    volume = torch.stack(axes)  # (3, D, H, W): each voxel holds its coordinate
    tokens = [
        volume[:, d * 4 : d * 4 + 4, h * 2 : h * 2 + 2, w * 8 : w * 8 + 8].permute(1, 2, 3, 0).reshape(-1)
        for d in range(2)
        for h in range(3)
        for w in range(4)
    ]
    assert torch.equal(place_patches(torch.stack(tokens)[None], grid, patch)[0], volume)


def test_linear_decoder__one_token_changed__only_its_patch_changes() -> None:
    torch.manual_seed(0)
    decoder, given = LinearDecoder(12, (4, 8, 2), 3), features((2, 2, 3), 12)
    before = decoder(torch.zeros(1, 1, 8, 16, 6), given)
    tokens = given.tokens.clone()
    tokens[0, 1 * 6 + 0 * 3 + 2] += torch.randn(12)  # token (1, 0, 2)
    after = decoder(torch.zeros(1, 1, 8, 16, 6), given._replace(tokens=tokens))
    changed = (before != after).any(1)[0]
    expected = torch.zeros_like(changed)
    expected[4:8, 0:8, 4:6] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 8, 8), (4, 4, 4), (2, 2, 2), (4, 8, 8), (1, 4, 4)])
def test_up_strides__any_power_of_two__product_is_the_patch_and_thin_axes_rest_last(
    patch: tuple[int, int, int],
) -> None:
    strides = torch.tensor(up_strides(patch))
    assert tuple(strides.prod(0).tolist()) == patch
    assert (strides.diff(dim=0) <= 0).all()  # an axis that stops growing does not start again


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 8, 8), (4, 4, 4), (4, 8, 8)])
@pytest.mark.parametrize("stem", [True, False])
def test_unetr_decoder__patch__scores_on_the_images_grid_with_gradient_everywhere(
    patch: tuple[int, int, int], stem: bool
) -> None:
    torch.manual_seed(0)
    decoder = UNETRDecoder(1, (12,) * 4, (patch,) * 4, 3, feature_size=4, stem=stem)
    given = features((2, 2, 2), 12)
    image = torch.randn(1, 1, *(2 * p for p in patch))
    scores = decoder(image, given)
    assert scores.shape == (1, 3, *image.shape[2:])
    scores.square().mean().backward()
    # instance norm removes constants, hence biases of convolutions before it: those gradients are zero, not missing
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_unetr_decoder__patch_16__every_earlier_level_is_a_skip() -> None:
    assert UNETRDecoder(1, (6,) * 4, ((16, 16, 16),) * 4, 2, feature_size=2).skip_levels == [0, 1, 2]
    assert UNETRDecoder(1, (6,) * 4, ((8, 8, 8),) * 4, 2, feature_size=2).skip_levels == [0, 2]


def pyramid(grid: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...]) -> Features:
    shape = [n * s for n, s in zip(grid, strides[-1], strict=True)]
    sizes = [[n // s for n, s in zip(shape, stride, strict=True)] for stride in strides]
    maps = [torch.randn(1, 6 * 2**level, *size) for level, size in enumerate(sizes)]
    tokens = maps[-1].flatten(2).mT
    return Features(tokens.mean(1), tokens, grid, maps)


@pytest.mark.parametrize(
    ("embedding", "levels", "skips"),
    [((2, 2, 2), 5, [0, 1, 2, 3]), ((2, 2, 2), 3, [0, 1]), ((1, 2, 2), 4, [0, 1, 2]), ((4, 4, 4), 3, [0, 0, 1])],
)
@pytest.mark.parametrize("stem", [True, False])
def test_unetr_decoder__pyramid__each_level_joins_at_its_own_resolution(
    embedding: tuple[int, int, int], levels: int, skips: list[int], stem: bool
) -> None:
    torch.manual_seed(0)
    strides = tuple((embedding[0] * 2**i, embedding[1] * 2**i, embedding[2] * 2**i) for i in range(levels))
    given = pyramid((1, 2, 1), strides)
    image = torch.randn(1, 1, *(n * s for n, s in zip(given.grid, strides[-1], strict=True)))
    channels = [level.shape[1] for level in given.levels]
    decoder = UNETRDecoder(1, channels, strides, 3, feature_size=4, stem=stem)
    assert decoder.skip_levels == skips
    grown = [not isinstance(skip[0], UnetrBasicBlock) for skip in decoder.skips]
    assert grown == [scale == 0 and embedding == (4, 4, 4) for scale in range(len(skips))]  # it has none of stride 2
    for level in given.levels:
        level.requires_grad_()
    scores = decoder(image, given)
    assert scores.shape == (1, 3, *image.shape[2:])
    (scores * torch.randn_like(scores)).sum().backward()
    for level in given.levels:
        assert level.grad is not None and level.grad.abs().max() > 0, "a level has no part in the scores"


def test_unetr_decoder__levels_of_another_encoder__refused() -> None:
    decoder = UNETRDecoder(1, (6, 12, 24), ((2,) * 3, (4,) * 3, (8,) * 3), 2, feature_size=4)
    with pytest.raises(ValueError, match=r"strides \[\(2, 2, 2\), .* got \[\(2, 2, 2\)"):
        decoder(torch.zeros(1, 1, 16, 16, 16), features((2, 2, 2), 12, 3))
    with pytest.raises(ValueError, match=r"level of stride \(3, 3, 3\).*decoder: linear"):
        UNETRDecoder(1, (6, 12), ((3, 3, 3), (8, 8, 8)), 2)


def test_unetr_decoder__without_stem__image_has_no_influence() -> None:
    torch.manual_seed(0)
    given, image = features((2, 2, 2), 12), torch.randn(1, 1, 16, 16, 16)
    for stem in (False, True):
        decoder = UNETRDecoder(1, (12,) * 4, ((8, 8, 8),) * 4, 3, feature_size=4, stem=stem).eval()
        same = torch.equal(decoder(image, given), decoder(torch.randn_like(image), given))
        assert same != stem


def test_unetr_decoder__patch_6__refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="powers of two.*decoder: linear"):
        UNETRDecoder(1, (12,) * 4, ((6, 6, 6),) * 4, 3)
