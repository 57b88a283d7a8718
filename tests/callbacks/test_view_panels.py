"""Pictures appear when due, show every view, and draw the overlap box at its voxels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from matplotlib import image

from agssd.callbacks.panel_drawing import BOX_COLOUR, _blocks, draw_box, draw_line, save_panels
from agssd.callbacks.view_panels import ViewPanels


def _panel(shape: tuple[int, int, int] = (32, 24, 28)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, *shape, generator=generator)
    grid = tuple(size // 4 for size in shape)
    mask = torch.zeros(2, *grid, dtype=torch.bool)
    mask[0, : grid[0] // 2] = True
    box = torch.tensor([[[4.0, 20.0], [0.0, 12.0], [10.0, 28.0]], [[12.0, 32.0], [6.0, 24.0], [0.0, 14.0]]])
    return {
        "globals": clean + 0.1,
        "clean": clean,
        "locals": torch.rand(5, 16, 16, 16, generator=generator),
        "edges": torch.rand(2, *shape, generator=generator),
        "mask": mask,
        "reconstruction": clean * 0.5,
        "overlap_box": box,
        "attention": torch.rand(2, 3, *grid, generator=generator),
    }


def _is_box(pixels: np.ndarray) -> np.ndarray:
    return np.abs(pixels[..., :3] - BOX_COLOUR).max(-1) < 0.01


def test_view_panels__draws_first_due_and_last_step(toy, loader, make_trainer, tmp_path) -> None:
    module = toy(panel=_panel())
    make_trainer(ViewPanels(4, num_samples=3), max_steps=6, accumulate_grad_batches=2).fit(module, loader)
    names = sorted(path.name for path in (tmp_path / "panels").iterdir())
    assert names == ["step_000001.png", "step_000004.png", "step_000006.png"]
    assert module.panels_asked == [0, 1] * 3  # the batch has two samples
    for name in names:
        pixels = image.imread(tmp_path / "panels" / name)
        assert pixels.shape[0] > 6 * 160 and pixels.shape[1] > 8 * 160 and pixels.std() > 0.1


def test_draw_box__outlines_exactly_the_voxels_of_the_box() -> None:
    pixels = np.zeros((40, 50, 3), np.float32)  # 8 x 10 voxels, 5 pixels each, first axis up
    draw_box(pixels, np.array([[2.0, 6.0], [3.0, 9.0]]), np.array([8, 10]))
    rows, columns = np.nonzero(_is_box(pixels))
    assert (rows.min(), rows.max() + 1) == (40 - 30, 40 - 10)
    assert (columns.min(), columns.max() + 1) == (15, 45)
    inside = _is_box(pixels)[12:28, 17:43]
    assert not inside.any() and _is_box(pixels).sum() == 20 * 30 - inside.size


def test_draw_box__clips_to_the_slice_and_skips_empty_boxes() -> None:
    pixels = np.zeros((20, 20, 3), np.float32)
    draw_box(pixels, np.array([[-3.0, 9.0], [2.0, 2.0]]), np.array([4, 4]))
    assert not _is_box(pixels).any()
    draw_box(pixels, np.array([[-3.0, 9.0], [-1.0, 2.0]]), np.array([4, 4]))
    rows, columns = np.nonzero(_is_box(pixels))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 19, 0, 9)


def test_draw_line__joins_two_points_and_stays_inside() -> None:
    pixels = np.zeros((40, 50, 3), np.float32)  # 8 x 10 voxels, 5 pixels each, first axis up
    draw_line(pixels, np.array([2.0, 1.0]), np.array([2.0, 8.9]), np.array([8, 10]), BOX_COLOUR)
    rows, columns = np.nonzero(_is_box(pixels))
    assert set(rows) == {40 - 1 - 10} and sorted(columns) == list(range(5, 45))
    pixels[:] = 0
    draw_line(pixels, np.array([1.0, -4.0]), np.array([7.0, 12.0]), np.array([8, 10]), BOX_COLOUR)
    rows, columns = np.nonzero(_is_box(pixels))
    assert set(columns) == set(range(50)) and rows[columns.argmin()] > rows[columns.argmax()]  # it rises


def test_save_panels__box_of_the_saved_picture_frames_the_bright_region(tmp_path) -> None:
    panel = {"clean": torch.zeros(2, 32, 32, 32), "overlap_box": torch.zeros(2, 3, 2)}
    starts, ends = [8, 4, 10], [24, 20, 30]
    panel["overlap_box"][:] = torch.tensor([starts, ends]).T
    panel["clean"][(slice(None), *map(slice, starts, ends))] = 1.0
    save_panels([panel], tmp_path / "a" / "b.png", "step 1")
    pixels = image.imread(tmp_path / "a" / "b.png")[..., :3]
    box = _is_box(pixels)
    # three planes of two views
    assert box.sum() == 2 * sum(h * w - (h - 4) * (w - 4) for h, w in ((80, 100), (80, 100), (80, 80)))
    # the leftmost box is axial: 16 voxels of H by 20 of W, 5 pixels each
    left = np.nonzero(box.any(0))[0].min()
    top = np.nonzero(box[:, left])[0].min()
    inside = (slice(top, top + 80), slice(left, left + 100))
    assert box[inside].sum() == 80 * 100 - 76 * 96
    assert (pixels[inside][~box[inside]] > 0.99).all()
    around = pixels[top - 3 : top + 83, left - 3 : left + 103].copy()
    around[3:-3, 3:-3] = 0
    assert around.max() < 0.06  # the black of an empty volume


def test_blocks__mask_and_up_direction_are_right() -> None:
    panel = _panel((32, 32, 32))
    panel["clean"] = torch.zeros(2, 32, 32, 32)
    panel["clean"][:, 24:] = 1.0  # superior
    panel["globals"] = panel["clean"]
    panel["overlap_box"][:] = torch.tensor([0.0, 32.0])
    panel["mask"] = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    panel["mask"][0, 4, 6:, :2] = True  # anterior left tokens of the shown slice
    row = _blocks(panel, 0)[0][1][0]
    headings = [cell.heading for cell in row]
    assert headings[:4] == ["axial 16", "coronal 16", "sagittal 16", "input"]
    coronal = row[1].pixels
    assert coronal[20, 80, 0] == 1 and coronal[-20, 80, 0] == 0
    shown = row[headings.index("mask, 1% hidden")].pixels
    orange = shown[..., 0] > 0.5
    assert orange[: 8 * 5, : 8 * 5].all() and orange.sum() == 40 * 40
    panel["unseen"] = torch.tensor([False, True])
    first, second = ([cell.heading for cell in rows[0]] for _, rows in _blocks(panel, 0)[:2])
    assert first == headings and "for the teacher alone" in second and "mask, none hidden" not in second


@pytest.mark.parametrize("shape", [(16, 16, 16), (33, 57, 41), (96, 96, 96), (160, 192, 176)])
def test_save_panels__any_size_gives_whole_tiles(tmp_path, shape) -> None:
    panel = {"clean": torch.rand(2, *shape), "locals": torch.rand(1, 7, 9, 8)}
    save_panels([panel], tmp_path / "x.png", "t")
    factor = -(-160 // max(shape))
    assert image.imread(tmp_path / "x.png").shape[0] == 34 + 3 * (22 + factor * max(shape) + 6) + 6


def test_save_panels__missing_parts_are_left_out_but_a_volume_is_needed(tmp_path) -> None:
    save_panels([{"globals": torch.rand(1, 8, 8, 8)}], tmp_path / "x.png", "t")
    assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="needs 'clean' or 'globals'"):
        save_panels([{"mask": torch.zeros(2, 2, 2, 2)}], tmp_path / "y.png", "t")


def test_save_panels__non_finite_and_flat_values_still_draw(tmp_path) -> None:
    panel = _panel()
    panel["reconstruction"][0, 0] = float("nan")
    panel["clean"][:] = 0.0
    panel["attention"][:] = float("inf")
    save_panels([panel], tmp_path / "x.png", "t")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_view_panels__sends_the_picture_to_wandb_from_rank_zero_only(toy, tmp_path) -> None:
    class Recorder(WandbLogger):
        def __init__(self) -> None:
            self.calls = []

        def log_image(self, key, images, step=None, **kwargs):
            self.calls.append((key, [str(path) for path in images], step))

    for is_global_zero in (True, False):
        module, callback, logger = toy(panel=_panel()), ViewPanels(), Recorder()
        folder = tmp_path / str(is_global_zero)
        trainer = SimpleNamespace(
            global_step=0, default_root_dir=folder, loggers=[logger], is_global_zero=is_global_zero
        )
        callback.setup(trainer, module, "fit")
        callback.on_train_start(trainer, module)
        trainer.global_step = 1
        callback.on_train_batch_end(trainer, module, None, None, 0)
        path = folder / "panels" / "step_000001.png"
        assert path.exists() == is_global_zero
        assert logger.calls == ([("panels", [str(path)], 0)] if is_global_zero else [])


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"num_samples": 0}])
def test_view_panels__nonsense_is_refused(settings) -> None:
    with pytest.raises(ValueError, match="view_panels"):
        ViewPanels(**settings)
