"""Intensities land in the model's range; appearance keeps it, spares CT from Gibbs and ignores the batch's cut."""

from __future__ import annotations

import math

import pytest
import torch

from agssd.transforms import intensity
from agssd.transforms.intensity import (
    Appearance,
    add_speckle,
    cast_shadow,
    change_depth_gain,
    from_model_range,
    to_model_range,
)
from agssd.transforms.keyed_random import KeyedRandom

OFF = {"prob_gamma": 0.0, "prob_histogram": 0.0, "prob_blur": 0.0, "prob_noise": 0.0, "prob_gibbs": 0.0}
STRONG = {name: 1.0 for name in OFF}


def views(batch=4, count=3, channels=1, seed=0):
    """Smooth views in the range of their modality; samples 0, 2, .. are CT."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.avg_pool3d(torch.rand(batch * count, channels, 14, 14, 14, generator=generator), 3, 1)
    unit = (unit - unit.min()) / (unit.max() - unit.min())
    is_ct = (torch.arange(batch) % 2 == 0).repeat_interleave(count)
    return torch.where(is_ct[:, None, None, None, None], unit, unit * 2 - 1), is_ct


def apply(settings, image, is_ct, sample, seed=0, purpose="appearance"):
    return Appearance(**settings)(image, is_ct, KeyedRandom(seed, sample, purpose), len(image) // len(sample))


def test_to_model_range__ct_to_unit_and_mri_to_both_sides_of_zero():
    image = torch.tensor([-2000.0, -1000.0, 0.0, 1000.0, 3000.0]).reshape(1, 1, 1, 1, 5).expand(2, 1, 1, 1, 5)
    low, high = torch.tensor([[-1000.0], [0.0]]), torch.tensor([[1000.0], [2000.0]])
    out = to_model_range(image, low, high, torch.tensor([True, False])).reshape(2, 5)
    torch.testing.assert_close(out[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(out[1], torch.tensor([-1.0, -1.0, -1.0, 0.0, 1.0]))


def test_to_model_range__per_channel_and_without_nan_for_a_flat_volume():
    image = torch.full((1, 2, 2, 2, 2), 5.0)
    out = to_model_range(image, torch.tensor([[5.0, 0.0]]), torch.tensor([[5.0, 10.0]]), torch.tensor([False]))
    assert torch.equal(out[0, 0], torch.full((2, 2, 2), -1.0)) and torch.equal(out[0, 1], torch.zeros(2, 2, 2))


def test_from_model_range__gives_back_real_intensities():
    image = torch.rand(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 900 + 50
    low, high = torch.tensor([[-1000.0, 0.0], [40.0, 50.0]]), torch.tensor([[1000.0, 2000.0], [960.0, 950.0]])
    is_ct = torch.tensor([True, False])
    given = image.clone()
    in_range = to_model_range(image, low, high, is_ct)
    torch.testing.assert_close(from_model_range(in_range, low, high, is_ct), image, rtol=1e-5, atol=1e-3)
    assert torch.equal(image, given) and torch.equal(in_range, to_model_range(image, low, high, is_ct))


@pytest.mark.parametrize("settings", [{}, STRONG])
def test_appearance__leaves_what_it_is_given_as_it_is(settings):
    image, is_ct = views()
    given = image.clone()
    apply(settings, image, is_ct, torch.arange(4))
    assert torch.equal(image, given)


@pytest.mark.parametrize("settings", [{}, STRONG, {**STRONG, "gamma": 3.0, "noise": 0.5, "blur_vox": 3.0}])
def test_appearance__keeps_the_range_of_each_modality(settings):
    image, is_ct = views(12)
    image[0] = image[0].round()  # the ends of the range too
    out = apply(settings, image, is_ct, torch.arange(12))
    assert torch.isfinite(out).all() and out.shape == image.shape and out.dtype == torch.float32
    assert out[is_ct].min() >= 0 and out[is_ct].max() <= 1
    assert out[~is_ct].min() >= -1 and out[~is_ct].max() <= 1
    assert out[~is_ct].min() < -0.3  # MRI does use its lower half


def test_appearance__without_probabilities_changes_nothing():
    image, is_ct = views()
    out = apply(OFF, image, is_ct, torch.arange(4))
    # Intensities below 1e-4 of the range are lifted to it, since powers need a positive base.
    assert (out - image).abs().max() <= 2.1e-4


@pytest.mark.parametrize("name", sorted(OFF))
def test_appearance__each_change_acts_and_as_often_as_it_says(name):
    image, is_ct = views(200, 2)
    for prob in (0.3, 1.0):
        out = apply({**OFF, name: prob}, image, is_ct, torch.arange(200))
        changed = (out - image).abs().amax((1, 2, 3, 4)) > 1e-3
        if name == "prob_gibbs":
            assert not changed[is_ct].any()
            changed = changed[~is_ct]
        share = changed.float().mean().item()
        # Draws close to no change (a power of 1, no noise) count as unchanged: a few per cent.
        assert prob * 0.9 - 4 * math.sqrt(0.25 / len(changed)) < share <= prob + 4 * math.sqrt(0.25 / len(changed))
        if prob == 1.0:
            assert share > 0.9


def test_appearance__some_views_look_as_they_do_among_all():
    image, is_ct = views(10, 2)
    all_on = {**STRONG, "prob_depth_gain": 1.0, "prob_shadow": 1.0, "prob_speckle": 1.0}
    rows = torch.tensor([1, 2, 5, 6, 9, 10, 12, 15, 17, 18])  # one of each sample
    for settings in (all_on, {}):
        random = [KeyedRandom(0, torch.arange(10), "appearance") for _ in range(2)]
        among_all = Appearance(**settings)(image, is_ct, random[0], 2)
        alone = Appearance(**settings)(image[rows], is_ct[rows], random[1], 2, rows)
        torch.testing.assert_close(alone, among_all[rows], atol=1e-6, rtol=0)
        assert torch.equal(random[0].uniform(3), random[1].uniform(3)), "what is drawn next is the same too"


def test_appearance__ct_never_rings():
    image, is_ct = views(40)
    without = apply({**STRONG, "prob_gibbs": 0.0}, image, is_ct, torch.arange(40))
    ringing = apply(STRONG, image, is_ct, torch.arange(40))
    torch.testing.assert_close(ringing[is_ct], without[is_ct], atol=1e-6, rtol=0)
    assert (ringing[~is_ct] - without[~is_ct]).abs().amax((1, 2, 3, 4)).min() > 1e-3


def test_appearance__gibbs_removes_high_frequencies_only():
    image, is_ct = views(40)
    image = image * 0.5  # away from the ends, so that nothing is clipped
    out = apply({**OFF, "prob_gibbs": 1.0}, image, is_ct, torch.arange(40))[~is_ct]
    before = torch.fft.fftn(image[~is_ct], dim=(-3, -2, -1)).abs()
    after = torch.fft.fftn(out, dim=(-3, -2, -1)).abs()
    low, corner = slice(0, 2), slice(5, 8)  # below half and above 0.9 of Nyquist, on every axis
    torch.testing.assert_close(after[..., low, low, low], before[..., low, low, low], atol=1e-3, rtol=1e-4)
    assert before[..., corner, corner, corner].mean() > 0.1
    assert after[..., corner, corner, corner].max() < 1e-3


def test_appearance__gamma_and_histogram_keep_the_order_of_intensities():
    image, is_ct = views(30)
    out = apply({**OFF, "prob_gamma": 1.0, "prob_histogram": 1.0}, image, is_ct, torch.arange(30))
    order = image.flatten(1).argsort(1)
    sorted_out = out.flatten(1).gather(1, order)
    assert (sorted_out.diff(dim=1) > -1e-5).all()


def test_appearance__blur_lowers_and_sharpening_raises_contrast():
    image, is_ct = views(60)
    image = 0.25 + 0.5 * image.clamp(0, 1)  # away from the ends, so that nothing is clipped
    out = apply({**OFF, "prob_blur": 1.0}, image, is_ct, torch.arange(60))
    change = out.std((1, 2, 3, 4)) / image.std((1, 2, 3, 4))
    assert (change < 1).float().mean() == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 180))
    assert change.min() < 0.8 and change.max() > 1.1


def test_appearance__noise_has_at_most_the_stated_level():
    image, is_ct = torch.full((400, 1, 10, 10, 10), 0.5), torch.ones(400, dtype=torch.bool)
    out = apply({**OFF, "prob_noise": 1.0, "noise": 0.08}, image, is_ct, torch.arange(200))
    level = (out - image).std((1, 2, 3, 4))
    assert 0.07 < level.max() < 0.088 and level.min() < 0.01
    assert level.mean() == pytest.approx(0.04, abs=4 * 0.08 / math.sqrt(12 * 400))


def test_appearance__does_not_depend_on_the_cut_of_the_batch():
    image, is_ct = views(6, 3, channels=2)
    whole = apply(STRONG, image, is_ct, torch.arange(6))
    for cut in ([1] * 6, [2, 4]):
        rows = [
            part.repeat_interleave(3) * 3 + torch.arange(3).repeat(len(part)) for part in torch.arange(6).split(cut)
        ]
        parts = [
            apply(STRONG, image[row], is_ct[row], part)
            for row, part in zip(rows, torch.arange(6).split(cut), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def test_appearance__differs_between_views_samples_seeds_and_purposes():
    image, is_ct = torch.full((4, 1, 8, 8, 8), 0.5), torch.ones(4, dtype=torch.bool)
    settings = {**OFF, "prob_noise": 1.0, "noise": 0.2}
    first = apply(settings, image, is_ct, torch.arange(2))
    assert len({tuple(view.flatten()[:4].tolist()) for view in first}) == 4
    assert not torch.equal(apply(settings, image, is_ct, torch.arange(2), seed=1), first)
    assert not torch.equal(apply(settings, image, is_ct, torch.arange(2), purpose="other"), first)


def test_appearance__computing_all_views_as_devices_do_gives_the_same(monkeypatch):
    image, is_ct = views(8, 3)
    chosen_only = apply({}, image, is_ct, torch.arange(8))

    def everywhere(chosen, change, image, *settings):
        return torch.where(chosen[:, None, None, None, None], change(image, *settings), image)

    monkeypatch.setattr(intensity, "apply_where", everywhere)
    torch.testing.assert_close(apply({}, image, is_ct, torch.arange(8)), chosen_only, atol=1e-6, rtol=0)
    assert (chosen_only - image).abs().max() > 0.05


def test_appearance__settings_that_are_unknown_or_out_of_range_are_refused_by_name():
    assert vars(Appearance.of(None)) == vars(Appearance())
    assert Appearance.of({"noise": 0.2}).noise == 0.2
    for name, value in {"contrast": 1.0, "prob_blur": 1.5, "prob_gibbs": -0.1, "gamma": 0.9, "noise": -1.0}.items():
        with pytest.raises(ValueError, match=rf"appearance\.{name} is "):
            Appearance.of({name: value})


# ------------------------------------------------------------------ ultrasound


def ultrasound(count: int = 6, shape: tuple[int, ...] = (64, 80)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    image = 0.3 + 0.2 * torch.rand(count, 1, *shape, generator=generator)
    image[..., :10] = 0  # the screen beside the sector
    return image


def test_change_depth_gain__is_one_factor_per_row_that_follows_its_formula():
    image = ultrasound()
    bow, slope = torch.linspace(-0.4, 0.4, 6), torch.linspace(0.3, -0.3, 6)
    gain = change_depth_gain(image, bow, slope)[..., 10:] / image[..., 10:]
    torch.testing.assert_close(gain, gain[..., :1].expand_as(gain))
    torch.testing.assert_close(gain[:, 0, 0, 0], (-slope).exp())  # the top: sin 0 = 0, u = 0
    torch.testing.assert_close(gain[:, 0, -1, 0], slope.exp())
    assert torch.equal(change_depth_gain(image, 0 * bow, 0 * slope), image)


def test_cast_shadow__darkens_a_slanted_band_below_its_start_and_nothing_else():
    image = torch.ones(1, 1, 100, 200)
    dark = 1 - cast_shadow(image, *(torch.tensor([x]) for x in (0.3, 0.2, 0.05, 0.4, 0.7)))[0, 0]
    assert dark[:30].max() < 0.05 and dark[60:].amax(1).min() > 0.65 and dark.max() <= 0.7
    middle = (dark * torch.arange(200)).sum(1) / dark.sum(1)
    rows = torch.tensor([60, 80, 99])
    torch.testing.assert_close(middle[rows] / 199, 0.3 + 0.2 * rows / 99, atol=0.02, rtol=0)
    assert (dark[80] > 0.35).sum() == pytest.approx(2 * 0.05 * 200, abs=4)


def test_add_speckle__has_its_level_grows_with_intensity_and_leaves_the_screen_black():
    image = torch.full((4, 1, 128, 128), 0.2)
    image[..., 64:] = 0.6
    image[:, :, :20] = 0
    level = torch.tensor([0.0, 0.1, 0.2, 0.3])
    found = add_speckle(image, level, torch.arange(4))
    assert torch.equal(found[0], image[0]) and (found[:, :, :20] == 0).all()
    for row in (1, 2, 3):
        low, high = found[row, 0, 20:, :64], found[row, 0, 20:, 64:]
        assert low.std() / 0.2 == pytest.approx(level[row].item(), rel=0.2)
        assert (high.std() / low.std()).item() == pytest.approx(3, rel=0.2)
        grain = low - low.mean()
        neighbours = (grain[:, 1:] * grain[:, :-1]).mean() / grain.square().mean()
        assert 0.6 < neighbours < 0.95  # grains are larger than a pixel


def test_appearance_of_ultrasound__depends_on_seed_and_sample_alone_and_stays_in_range():
    settings = {"prob_speckle": 1.0, "prob_depth_gain": 1.0, "prob_shadow": 1.0, "prob_gibbs": 0.0}
    appearance = Appearance.of(settings)
    image, is_ct, sample = 2 * ultrasound() - 1, torch.zeros(6, dtype=torch.bool), torch.arange(6)
    whole = appearance(image, is_ct, KeyedRandom(0, sample, "a"), 1)
    assert whole.min() >= -1 and whole.max() <= 1
    for row in range(6):
        alone = appearance(image[row : row + 1], is_ct[:1], KeyedRandom(0, sample[row : row + 1], "a"), 1)
        torch.testing.assert_close(alone[0], whole[row])
    plain = Appearance.of({"prob_gibbs": 0.0})(image, is_ct, KeyedRandom(0, sample, "a"), 1)
    assert (whole - plain).abs().flatten(1).mean(1).min() > 0.01  # each of them is changed


@pytest.mark.parametrize(
    "settings", [{"prob_shadow": 1.5}, {"shadow": 1.2}, {"speckle": -0.1}, {"depth_gain": -1.0}, {"prob_speckle": -1}]
)
def test_appearance_of_ultrasound__settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"appearance.{next(iter(settings))} is"):
        Appearance.of(settings)
