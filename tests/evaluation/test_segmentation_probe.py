"""The probe puts tokens over their labels, learns what is linear, and never learns from what it predicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.evaluation.segmentation_probe import (
    ProbeCase,
    case_dice,
    fit_readout,
    patch_labels,
    predict_patches,
    probe_segmentation,
    window_tokens,
)
from agssd.models.backbone import Backbone
from agssd.models.vit import ViT
from agssd.types import Features


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Voxels(Backbone):
    """A backbone whose token is the patch itself, so that a linear readout can be perfect."""

    def __init__(self, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.in_channels, self.patch_size = 1, patch_size
        self.embed_dim = patch_size[0] * patch_size[1] * patch_size[2]
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Features:
        d, h, w = grid = self.token_grid(tuple(x.shape))
        p, q, r = self.patch_size
        tokens = x.reshape(len(x), d, p, h, q, w, r).permute(0, 1, 3, 5, 2, 4, 6).reshape(len(x), d * h * w, -1)
        return Features(tokens.mean(1), tokens, grid, [])

    def forward_views(self, views, masks=None, drop_noise=None):
        return [self(view) for view in views]


@pytest.mark.parametrize("shape", [(16, 16, 16), (21, 30, 9), (5, 33, 16)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_window_tokens__tokens_are_their_patches__lie_over_their_labels(
    shape: tuple[int, int, int], overlap: float
) -> None:
    volume = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape)
    window, patch = (16, 8, 12), (4, 8, 2)
    tokens = window_tokens(Voxels(patch), volume[None].float(), window, overlap)
    labels = patch_labels(volume % 200, patch, window)
    assert tokens.shape == labels.shape
    inside = labels != 255
    assert int(inside.sum()) == volume.numel()
    assert torch.equal(tokens[inside].long() % 200, labels[inside].long())
    assert (tokens[~inside] == 0).all()  # padded with the lowest value


def test_window_tokens__wrong_window__refused() -> None:
    with pytest.raises(ValueError, match="multiple of the encoder's patch"):
        window_tokens(Voxels((4, 4, 4)), torch.zeros(1, 8, 8, 8), (6, 8, 8))


def cases_of(backbone: Backbone, count: int, noise: float = 0.1) -> list[ProbeCase]:
    """Return volumes whose classes are their intensity plus noise; two volumes per subject."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        label = torch.zeros(16, 16, 16, dtype=torch.long)
        for value in (1, 2):
            start = rng.integers(0, 8, 3)
            label[start[0] : start[0] + 7, start[1] : start[1] + 7, start[2] : start[2] + 7] = value
        image = label.float() + noise * torch.from_numpy(rng.normal(size=label.shape)).float()
        tokens = window_tokens(backbone, image[None], (8, 8, 8))
        made.append(ProbeCase(f"s{number // 2}", tokens, patch_labels(label, (4, 4, 4), (8, 8, 8))))
    return made


def test_fit_readout__linear_features__learnt_and_deterministic() -> None:
    cases = cases_of(Voxels((4, 4, 4)), 12)
    readout = fit_readout(cases[:8], 3, steps=150)
    again = fit_readout(cases[:8], 3, steps=150)
    assert torch.equal(readout.weight, again.weight) and torch.equal(readout.bias, again.bias)
    found = torch.stack([case_dice(predict_patches(readout, case.tokens), case, 3) for case in cases[8:]]).mean(0)
    assert found.min() > 0.75


def test_probe_segmentation__better_features__higher_dice_and_every_subject_once() -> None:
    folds = [["s0", "s1"], ["s2", "s3"], ["s4", "s5"]]
    torch.manual_seed(0)
    vit = ViT(patch_size=4, embed_dim=12, depth=1, num_heads=2).eval()
    good, poor = (probe_segmentation(cases_of(backbone, 12), folds, 3) for backbone in (Voxels((4, 4, 4)), vit))
    assert sorted(good) == [f"s{n}" for n in range(6)]
    assert np.mean(list(good.values())) > np.mean(list(poor.values())) + 0.05


def test_probe_segmentation__labels_of_the_held_out_fold__have_no_influence() -> None:
    cases = cases_of(Voxels((4, 4, 4)), 4)
    readout = fit_readout(cases[2:], 3, steps=20)
    poisoned = [
        case._replace(labels=torch.full_like(case.labels, 2)) if case.subject == "s0" else case for case in cases
    ]
    folds = [["s0"], ["s1"]]
    with pytest.MonkeyPatch.context() as patch:
        seen: list[set[str]] = []

        def spy(chosen, num_classes):
            seen.append({case.subject for case in chosen})
            return readout

        patch.setattr("agssd.evaluation.segmentation_probe.fit_readout", spy)
        probe_segmentation(poisoned, folds, 3)
    assert seen == [{"s1"}, {"s0"}]
    with pytest.raises(ValueError, match="has seen"):
        probe_segmentation(cases, folds, 3, [["s0"], ["s1"]])


def test_case_dice__outside_voxels__do_not_count() -> None:
    labels = torch.tensor([[1, 1, 0, 255], [2, 255, 255, 255]], dtype=torch.uint8)
    case = ProbeCase("s", torch.zeros(2, 1), labels)
    found = case_dice(torch.tensor([[1, 0, 0, 1], [0, 2, 2, 2]]), case, 4)
    assert found[:2].tolist() == pytest.approx([2 / 3, 0.0])
    assert torch.isnan(found[2])
