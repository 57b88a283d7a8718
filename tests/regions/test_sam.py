"""SAM from a folder: loading, frames in its input, points, masks to one map, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sam import EDGE, made_cache, made_frames, save_tiny_sam
from transformers import SamModel

from agssd.cli import main
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.regions import write_regions
from agssd.models.sam import Adapter, add_adapters, fitted_size, from_sam, load_sam, to_sam
from agssd.regions.sam import PointPrompts, _distinct, _grid, _stability
from agssd.regions.source import RegionCase


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sam(tmp_path_factory.mktemp("sam") / "tiny")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_load_sam__gives_the_model_that_was_saved(folder: Path) -> None:
    loaded, saved = load_sam(folder), SamModel.from_pretrained(str(folder))
    image = torch.randn(1, 3, EDGE, EDGE)
    points = torch.tensor([[[[20.0, 30.0]]]])
    with torch.no_grad():
        one, two = (model(pixel_values=image, input_points=points).pred_masks for model in (loaded, saved))
    assert torch.equal(one, two) and not loaded.training


def test_load_sam__refuses_what_is_no_sam(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is no folder of a SamModel: it has no config\.json"):
        load_sam(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_sam(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be loaded as a SamModel"):
        load_sam(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*mask_decoder\.iou_token"):
        load_sam(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert', not 'sam'"):
        load_sam(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'needs transformers.*pip install "agssd\[regions\]"'):
        load_sam(folder)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (64, 64), (91, 33), (17, 128)])
def test_from_sam__undoes_to_sam(shape: tuple[int, int]) -> None:
    """A smooth picture comes back to its own pixels; what was padded stays out."""
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape), indexing="ij")
    image = (0.3 + 0.4 * y * x)[None, None]
    pixels = to_sam(image, EDGE)
    inner = fitted_size(*shape, EDGE)
    assert pixels.shape == (1, 3, EDGE, EDGE) and max(inner) == EDGE
    assert not pixels[..., inner[0] :, :].any() and not pixels[..., inner[1] :].any()
    back = from_sam(pixels[:, :1] * 0.229 + 0.485, EDGE, *shape)
    assert back.shape == image.shape
    assert (back - image).abs()[..., 2:-2, 2:-2].max() < 0.02


def test_grid__points_lie_in_the_body_and_point_at_it() -> None:
    body = np.zeros((40, 80), dtype=bool)
    body[5:20, 50:70] = True
    points = _grid(body, 16, EDGE)  # every 5 pixels
    assert len(points) == 3 * 4
    assert not len(_grid(np.zeros((40, 80), dtype=bool), 16, EDGE))
    back = (points.numpy() + 0.5) * 80 / EDGE
    assert body[back[:, 1].astype(int), back[:, 0].astype(int)].all()


def test_distinct__keeps_the_better_of_two_that_are_nearly_one() -> None:
    logits = torch.full((4, 10, 10), -1.0)
    logits[0, :5], logits[1, :6], logits[2, 5:] = 1, 1, 1  # 0 and 1 overlap by 5/6; 3 is empty
    for quality, left in (([0.9, 0.8, 0.7, 1.0], [0, 2]), ([0.7, 0.8, 0.9, 1.0], [2, 1])):
        kept = _distinct(logits, torch.tensor(quality), 0.7)
        assert torch.equal(kept, logits[left])
    assert len(_distinct(logits, torch.tensor([0.9, 0.8, 0.7, 1.0]), 0.9)) == 3


def test_stability__is_the_overlap_of_two_cuts() -> None:
    logits = torch.full((2, 10, 10), -5.0)
    logits[0, :5], logits[1, :5], logits[1, :2] = 5, 0, 5
    assert _stability(logits).tolist() == pytest.approx([1.0, 0.4])


class Threshold(torch.nn.Module):
    """Stands for SAM: of each point the mask of its grey level, the frame, and one pixel; all good."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"vision_config": type("Vision", (), {"image_size": EDGE})})
        self.vision_encoder = lambda pixels: (pixels,)

    def forward(self, image_embeddings: torch.Tensor, input_points: torch.Tensor, multimask_output: bool):
        assert multimask_output
        grey = image_embeddings[0, 0]
        at = input_points[0, :, 0].round().long()
        same = (grey - grey[at[:, 1], at[:, 0]][:, None, None]).abs() < 0.3
        one = torch.zeros_like(same)
        one[:, 3, 3] = True
        masks = torch.stack([same, torch.ones_like(same), one], 1)[None]
        found = type("Found", (), {})()
        found.pred_masks, found.iou_scores = 20.0 * masks - 10, torch.ones(masks.shape[:3])
        return found


def test_point_prompts__smaller_masks_lie_upon_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agssd.regions.sam._loaded", lambda folder, device: Threshold())
    _, label = made_frames(0, shape=(EDGE, EDGE))
    image = np.choose(label, [0.4, 0.9, 0.05]).astype(np.float32)
    body = np.ones(label.shape, dtype=bool)
    body[:, :10] = False
    found = PointPrompts(Path("sam"), points=16)(RegionCase("a", image[None], body, None, (1, 1, 1), 2))
    assert not found[~body].any() and found[body].all()
    for frame, truth in zip(found, np.where(body, label, 3), strict=True):
        inside = truth != 3
        assert len(np.unique(frame[inside])) == 3
        for value in (0, 1, 2):
            assert len(np.unique(frame[truth == value])) == 1
    assert not set(np.unique(found[0][body[0]])) & set(np.unique(found[1][body[1]]))
    small = PointPrompts(Path("sam"), points=16, min_pixels=10**6)
    assert not small(RegionCase("a", image[None], body, None, (1, 1, 1), 2)).any()


def test_point_prompts__of_a_random_sam_are_a_function_of_the_case(folder: Path) -> None:
    frames, _ = made_frames(0)
    case = RegionCase("a", (frames[None] / 255).astype(np.float32), np.ones(frames.shape, bool), None, (1, 1, 1), 2)
    source = PointPrompts(folder, points=6, min_iou=-10.0, min_stability=0.0)
    found = source(case)
    assert found.shape == frames.shape and found.max() >= 1 and np.array_equal(found, source(case))
    alone = source(RegionCase("b", case.image[:, 1:], case.foreground[1:], None, (1, 1, 1), 2))[0]
    assert np.array_equal(alone > 0, found[1] > 0)


def test_point_prompts__know_other_weights(folder: Path, tmp_path: Path) -> None:
    other = save_tiny_sam(tmp_path / "other", seed=1)
    assert PointPrompts(folder).identity() != PointPrompts(other).identity()
    assert PointPrompts(folder).identity() != PointPrompts(folder, points=5).identity()
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copied / name).write_bytes((folder / name).read_bytes())
    assert PointPrompts(folder).identity() == PointPrompts(copied).identity()
    (copied / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert PointPrompts(copied).identity() == PointPrompts(other).identity()


def test_add_adapters__change_nothing_at_first_and_learn_alone(folder: Path) -> None:
    sam = load_sam(folder)
    image = torch.randn(2, 3, EDGE, EDGE)
    before = sam.vision_encoder(image)[0]
    parameters = add_adapters(sam, 4)
    assert torch.equal(sam.vision_encoder(image)[0], before)
    assert len([module for module in sam.modules() if isinstance(module, Adapter)]) == 4
    assert sum(p.numel() for p in parameters) == 4 * (2 * 32 * 4 + 4 + 32)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    assert not torch.allclose(sam.vision_encoder(image)[0], before)


def test_regions__of_sam_go_on_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    cache = made_cache(tmp_path / "made.h5", 4)
    source = PointPrompts(folder, points=4, min_iou=-10.0, min_stability=0.0)
    undisturbed, out = tmp_path / "undisturbed.h5", tmp_path / "out.h5"
    list(write_regions(cache, undisturbed, source))
    stream = write_regions(cache, out, source)
    next(stream), next(stream)
    stream.close()  # as an exception in the loop would
    assert not out.exists()
    arguments = ["--source", "sam", "--sam", str(folder), "--points", "4", "--min-iou", "-10", "--min-stability", "0"]
    assert main(["regions", str(cache), *arguments, "--out", str(out)]) == 0
    assert out.read_bytes() == undisturbed.read_bytes()
    assert all(info.num_regions for info in VolumeCache(out).cases)
