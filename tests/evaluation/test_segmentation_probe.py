"""The probe puts tokens over their labels, learns what is linear, and never learns from what it predicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.evaluation.folds import Fold
from agssd.evaluation.probe_features import patch_labels, window_features
from agssd.evaluation.segmentation_probe import (
    NeighbourReadout,
    ProbeCase,
    case_dice,
    fit_readout,
    linear_segmenter,
    objective_gradient,
    predict_patches,
    probe_segmentation,
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
def test_window_features__tokens_are_their_patches__lie_over_their_labels(
    shape: tuple[int, int, int], overlap: float
) -> None:
    volume = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape)
    window, patch = (16, 8, 12), (4, 8, 2)
    tokens, _ = window_features(Voxels(patch), volume[None].float(), window, overlap)
    labels = patch_labels(volume % 200, patch, window)
    assert tokens.shape == labels.shape
    inside = labels != 255
    assert int(inside.sum()) == volume.numel()
    assert torch.equal(tokens[inside].long() % 200, labels[inside].long())
    assert (tokens[~inside] == 0).all()  # padded with the lowest value


def test_window_features__wrong_window__refused() -> None:
    with pytest.raises(ValueError, match="multiple of the encoder's patch"):
        window_features(Voxels((4, 4, 4)), torch.zeros(1, 8, 8, 8), (6, 8, 8))


def test_window_features__all_depths__are_states_of_blocks_and_end_in_the_tokens() -> None:
    torch.manual_seed(0)
    encoder = ViT(1, 4, embed_dim=24, depth=4, num_heads=3).eval()
    volume = torch.randn(1, 8, 16, 8)
    last, cls = window_features(encoder, volume, (8, 8, 8), 0.0)
    every, same_cls = window_features(encoder, volume, (8, 8, 8), 0.0, depths="all")
    assert every.shape == (len(last), 4 * 24)
    torch.testing.assert_close(every[:, -24:], last)  # the output comes last
    torch.testing.assert_close(same_cls, cls)
    _, states = encoder.hidden_states(volume[None, :, :, :8])
    of_first_window = every.unflatten(0, (2, 4, 2))[:, :2].flatten(0, 2)
    torch.testing.assert_close(of_first_window[:, :24], states[encoder.level_blocks[0]][0])


def test_window_features__all_depths_of_an_encoder_without_levels__refused() -> None:
    with pytest.raises(ValueError, match="depths: last"):
        window_features(Voxels((4, 4, 4)), torch.zeros(1, 8, 8, 8), (8, 8, 8), depths="all")


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
        tokens, _ = window_features(backbone, image[None], (8, 8, 8))
        made.append(ProbeCase(f"s{number // 2}", tokens, patch_labels(label, (4, 4, 4), (8, 8, 8))))
    return made


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("outside", [0.0, 0.3])
def test_objective_gradient__equals_that_of_cross_entropy_plus_dice(classes: int, outside: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(7, classes - 1, 11, generator=generator)
    labels = torch.randint(max(classes - 1, 2), (7, 11), generator=generator).to(torch.uint8)  # of 5, one is absent
    labels[torch.rand(7, 11, generator=generator) < outside] = 255
    wanted = scores.double().requires_grad_()
    shares = torch.cat([torch.zeros(7, 1, 11), wanted], 1).movedim(1, -1).softmax(-1)[labels != 255]  # (V, K)
    truth = torch.eye(classes, dtype=torch.float64)[labels[labels != 255].long()]
    entropy = -(shares.log() * truth).sum(-1).mean()
    dice = (2 * (shares * truth).sum(0) + 1) / (shares.sum(0) + truth.sum(0) + 1)
    (entropy + 1 - dice[1:].mean()).backward()
    found = objective_gradient(scores.clone(), labels)
    torch.testing.assert_close(found.double(), wanted.grad, rtol=1e-4, atol=1e-7)
    assert (found.movedim(1, -1)[labels == 255] == 0).all()


def test_fit_readout__linear_features__learnt_and_deterministic() -> None:
    cases = cases_of(Voxels((4, 4, 4)), 12)
    readout = fit_readout(cases[:8], 3, steps=150)
    again = fit_readout(cases[:8], 3, steps=150)
    assert torch.equal(readout.weight, again.weight) and torch.equal(readout.bias, again.bias)
    found = torch.stack([case_dice(predict_patches(readout, case.tokens), case, 3) for case in cases[8:]]).mean(0)
    assert found.min() > 0.75


def test_probe_segmentation__better_features__higher_dice_and_every_subject_once() -> None:
    parts = [("s0", "s1"), ("s2", "s3"), ("s4", "s5")]
    folds = [Fold(tuple(s for other in parts if other != part for s in other), part) for part in parts]
    torch.manual_seed(0)
    vit = ViT(patch_size=4, embed_dim=12, depth=1, num_heads=2).eval()
    good, poor = (
        probe_segmentation(cases_of(backbone, 12), folds, 3, linear_segmenter) for backbone in (Voxels((4, 4, 4)), vit)
    )
    assert sorted(good) == [f"s{n}" for n in range(6)]
    assert np.mean(list(good.values())) > np.mean(list(poor.values())) + 0.05


def test_probe_segmentation__learns_from_the_others_only() -> None:
    cases = cases_of(Voxels((4, 4, 4)), 4)
    seen: list[set[str]] = []

    def spy(chosen, num_classes):
        seen.append({case.subject for case in chosen})
        return lambda tokens: torch.zeros(len(tokens), 64, dtype=torch.long)

    probe_segmentation(cases, [Fold(("s1",), ("s0",)), Fold(("s0",), ("s1",))], 3, spy)
    assert seen == [{"s1"}, {"s0"}]
    with pytest.raises(ValueError, match="has seen"):
        probe_segmentation(cases, [Fold(("s0",), ("s0",))], 3, spy)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_neighbour_readout__equals_a_loop_over_voxels(k: int) -> None:
    rng = np.random.default_rng(k)
    labels = torch.from_numpy(rng.choice([0, 1, 2, 255], (20, 4), p=[0.4, 0.3, 0.2, 0.1])).to(torch.uint8)
    tokens, asked = (torch.from_numpy(rng.normal(size=(n, 6))).float() for n in (20, 9))
    found = NeighbourReadout([ProbeCase("s", tokens, labels)], 3, counts=[k])(asked)
    for row, query in enumerate(asked):
        similar = torch.cosine_similarity((query - tokens.mean(0))[None], tokens - tokens.mean(0))
        best = similar.argsort(descending=True)[:k].tolist()
        for voxel in range(4):
            votes = [0.0, 0.0, 0.0]
            for other in best:
                if labels[other, voxel] != 255:
                    votes[int(labels[other, voxel])] += float(((similar[other] - 1) / 0.07).exp())
            assert int(found[row, voxel]) == int(np.argmax(votes))


def test_neighbour_readout__k_is_the_best_on_a_quarter_of_the_training_subjects() -> None:
    cases = cases_of(Voxels((4, 4, 4)), 16, noise=1.0)
    readout = NeighbourReadout(cases, 3)
    held_out = [case for case in cases if case.subject in ("s0", "s4")]
    rest = [case for case in cases if case.subject not in ("s0", "s4")]
    dice = {}
    for k in (10, 20, 100, 200):  # of 1024 tokens
        inner = NeighbourReadout(rest, 3, counts=[k])
        dice[k] = float(torch.stack([case_dice(inner(c.tokens), c, 3) for c in held_out]).nanmean(0).nanmean())
    assert readout.k == max(dice, key=lambda k: dice[k])
    assert len(set(dice.values())) > 1


def test_window_features__cls_is_the_mean_over_windows_and_none_takes_the_whole_volume() -> None:
    image = torch.rand(1, 8, 16, 8)
    backbone = Voxels((4, 4, 4))
    tokens, cls = window_features(backbone, image, (8, 8, 8), 0.0)
    parts = [backbone(image[None, :, :, start : start + 8]).cls[0] for start in (0, 8)]
    assert torch.allclose(cls, (parts[0] + parts[1]) / 2)
    whole, _ = window_features(backbone, image, None)
    assert torch.equal(whole, tokens)


def test_case_dice__outside_voxels__do_not_count() -> None:
    labels = torch.tensor([[1, 1, 0, 255], [2, 255, 255, 255]], dtype=torch.uint8)
    case = ProbeCase("s", torch.zeros(2, 1), labels)
    found = case_dice(torch.tensor([[1, 0, 0, 1], [0, 2, 2, 2]]), case, 4)
    assert found[:2].tolist() == pytest.approx([2 / 3, 0.0])
    assert torch.isnan(found[2])


def test_probe_segmentation__class_absent_from_the_truth__left_out_unless_it_is_predicted() -> None:
    labels = {"learned": [1, 2, 3], "without": [1, 0, 0], "with": [1, 2, 0]}
    cases = [
        ProbeCase(name, torch.zeros(1, 1), torch.tensor([values], dtype=torch.uint8)) for name, values in labels.items()
    ]
    folds = [Fold(("learned",), ("without", "with"))]
    found = probe_segmentation(cases, folds, 4, lambda learned, number: lambda tokens: torch.tensor([[1, 2, 0]]))
    assert found["without"][:2].tolist() == [1, 0], "class 2 is predicted and not there"
    assert found["with"][:2].tolist() == [1, 1]
    assert all(np.isnan(dice[2]) for dice in found.values()), "class 3 is neither"
