"""Maps at several scales: where their cells come from."""

from __future__ import annotations

import pytest
import recipes
import torch

from agssd.models.pyramid import FeaturePyramid, average_cells
from agssd.models.vit import ViT


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("num_scales", [1, 2, 4])
def test_pyramid__cells_of_a_vit_come_from_the_token_that_they_lie_in(dims: int, num_scales: int) -> None:
    torch.manual_seed(0)
    encoder = ViT(1, 8, depth=1, embed_dim=48, num_heads=3, spatial_dims=dims)
    pyramid = FeaturePyramid(encoder, num_scales)
    grid = (3, 2, 4)[:dims]
    tokens = torch.randn(1, torch.Size(grid).numel(), 48)
    changed = tokens.clone()
    changed[:, 5] += 1  # a token that is not at the beginning of any axis
    before, after = (pyramid(t, grid=grid) for t in (tokens, changed))
    sizes = [tuple(2 * 2 * n for n in grid), tuple(2 * n for n in grid), grid, tuple((n + 1) // 2 for n in grid)]
    wanted = {1: sizes[2:3], 2: sizes[2:], 4: sizes}[num_scales]
    assert [tuple(m.shape[1:-1]) for m in before] == wanted
    assert tuple(m.shape[-1] for m in before) == pyramid.channels
    assert torch.equal(before[pyramid.tokens_at].flatten(1, -2), tokens)
    place = torch.unravel_index(torch.tensor(5), grid)
    for one, other, size in zip(before[: pyramid.tokens_at], after, wanted, strict=False):
        moved = (one != other).any(-1)[0].nonzero()
        factor = size[0] // grid[0]
        assert len(moved) == factor**dims
        assert torch.equal(torch.div(moved, factor, rounding_mode="floor"), torch.stack(place).expand_as(moved))


def test_pyramid__an_encoder_of_several_strides_gives_its_deepest_levels() -> None:
    torch.manual_seed(0)
    encoder = recipes.encoder("swin", 0.0).eval()
    features = encoder(torch.randn(1, 1, 24, 24, 24))
    for num_scales, count in ((1, 1), (2, 2), (4, 2)):
        pyramid = FeaturePyramid(encoder, num_scales)
        maps = pyramid(*pyramid.reads(features), grid=features.grid)
        assert len(maps) == count and not list(pyramid.parameters())
        for found, level in zip(maps, features.levels[-count:], strict=True):
            assert torch.equal(found, level.movedim(1, -1))
        assert tuple(maps[pyramid.tokens_at].shape[1:-1]) == features.grid


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_forward__drops_as_forward_views_does(family: str) -> None:
    torch.manual_seed(0)
    encoder = recipes.encoder(family, 0.9)
    images, noise = torch.randn(3, 1, 24, 24, 24), torch.rand(3, encoder.depth)
    (wanted,) = encoder.forward_views([images], None, [noise])
    found = encoder(images, noise)
    torch.testing.assert_close(found.tokens, wanted.tokens)
    assert not torch.allclose(found.tokens, encoder(images).tokens, atol=1e-3)
    torch.testing.assert_close(found.levels[-1].flatten(2).mT, found.tokens)


def test_average_cells__are_means_of_the_cells_of_a_grid() -> None:
    x = torch.randn(2, 4, 6, 3)
    found = average_cells(x, (2, 3))
    torch.testing.assert_close(found[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)))
    assert found.shape == (2, 2, 3, 3)
