"""The dense decoder gives every voxel of every patch size its own prediction."""

from __future__ import annotations

import pytest
import torch

from agssd.models.dense_decoder import DenseDecoder


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (4, 8, 8), (6, 6, 6), (1, 2, 2)])
def test_dense_decoder__fills_the_volume_of_any_patch(patch: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    decoder = DenseDecoder(24, patch, 2, 16)
    out = decoder(torch.randn(2, 2 * 3 * 2, 24), (2, 3, 2))
    assert out.shape == (2, 2, 2 * patch[0], 3 * patch[1], 2 * patch[2]) and out.dtype == torch.float32
    assert out.flatten(2).std(2).min() > 0


def test_dense_decoder__a_token_acts_around_its_patch() -> None:
    torch.manual_seed(0)
    grid, cell = (5, 6, 7), (2, 3, 4)
    total = torch.zeros(5, 6, 7)
    for _ in range(8):  # one random kernel leans to a side
        decoder = DenseDecoder(24, (8, 8, 8), 16, 16)
        tokens = torch.zeros(1, 210, 24)
        changed = tokens.clone()
        changed[0, (cell[0] * 6 + cell[1]) * 7 + cell[2]] = torch.randn(24)
        with torch.no_grad():
            change = (decoder(changed, grid) - decoder(tokens, grid))[0].abs().mean(0)
        total += change.reshape(5, 8, 6, 8, 7, 8).mean((1, 3, 5))
    for axis, own in enumerate(cell):
        along = total.sum([a for a in range(3) if a != axis])
        centre = (along * torch.arange(len(along))).sum() / along.sum()
        assert centre.item() == pytest.approx(own, abs=0.25)
    assert total[0, 0, 0] == 0  # out of reach
