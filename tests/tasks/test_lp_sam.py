"""LP-SAM: its loss, what each stage learns and leaves alone, its checkpoints, and better masks after each stage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from tiny_sam import made_cache, save_tiny_sam

from agssd.cli import main
from agssd.data_modules.build_folder import build_path
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.downstream import SegmentationDataModule
from agssd.data_modules.regions import write_regions
from agssd.models.lp_sam import load_lp_sam
from agssd.regions.lp_sam import LatentPrompts
from agssd.tasks.lp_sam import LatentPromptTask, SAMAdapterTask, mask_loss

CROP = (48, 64)
CONF = Path(__file__).resolve().parents[2] / "conf"


def trainer(folder: Path, steps: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=folder, val_check_interval=steps, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip


def data(cache: Path) -> SegmentationDataModule:
    return SegmentationDataModule(str(cache), global_batch_size=4, num_workers=0, pin_memory=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_cache(tmp_path_factory.mktemp("made") / "made.h5")


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sam(tmp_path_factory.mktemp("sam") / "tiny")


@pytest.fixture(scope="module")
def stage_one(cache: Path, sam: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """Return the checkpoint of four steps of stage 1, the task, and its weights before."""
    torch.manual_seed(0)
    task = SAMAdapterTask(str(sam), 3, CROP, adapter_dim=8, lr=1e-2)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    folder = tmp_path_factory.mktemp("stage1")
    run = trainer(folder, 4)  # the rate of the last step is 0, and that of adapters waits for a first one
    run.fit(task, data(cache))
    run.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt", task, before


@pytest.mark.parametrize("dice_share", [0.0, 0.15, 1.0])
def test_mask_loss__is_that_of_the_equation(dice_share: float) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(0, 2, (3, 2, 5, 7)), rng.integers(0, 2, (3, 2, 5, 7))
    p = 1 / (1 + np.exp(-logits))
    bce = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
    dice = np.mean([(2 * (p * target)[:, m].sum() + 1) / ((p + target)[:, m].sum() + 1) for m in (0, 1)])
    expected = (1 - dice_share) * bce + dice_share * (1 - dice)
    found = mask_loss(torch.from_numpy(logits), torch.from_numpy(target), dice_share)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(expected, rel=1e-5)


def test_adapter_stage__learns_adapters_tokens_and_decoder_alone(stage_one: tuple[Path, Any, dict[str, Any]]) -> None:
    _, task, before = stage_one
    after = task.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    learning = {name for name, p in task.named_parameters() if p.requires_grad}
    assert changed <= learning and all(name.endswith("k_proj.bias") for name in learning - changed)  # see softmax
    assert any(".down." in name for name in changed) and "model.tokens" in changed
    encoder = {name for name in changed if name.startswith("model.sam.vision_encoder")}
    assert encoder and all(".down." in name or ".up." in name for name in encoder)
    assert not any(name.startswith("model.sam.prompt_encoder") for name in changed)


def test_adapter_stage__without_decoder_leaves_all_of_sam(sam: Path) -> None:
    task = SAMAdapterTask(str(sam), 2, CROP, train_decoder=False)
    learning = {name for name, p in task.named_parameters() if p.requires_grad}
    assert all(name == "model.tokens" or ".down." in name or ".up." in name for name in learning)


def test_prompt_stage__learns_the_engine_and_leaves_sam(
    stage_one: tuple[Path, Any, dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    task = LatentPromptTask(str(stage_one[0]), CROP, lr=1e-2)
    assert task.num_classes == 3 and len(task.model.engine.blocks) == 4
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    adapted = stage_one[1].model.state_dict()
    assert all(torch.equal(before[f"model.{name}"], tensor) for name, tensor in adapted.items())
    trainer(tmp_path, 4).fit(task, data(cache))  # the engine's first answer is 0, so what is before it waits a step
    after = task.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("model.engine.", "model.tokens"))}


def test_load_lp_sam__gives_what_was_trained(
    stage_one: tuple[Path, Any, dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    task = LatentPromptTask(str(stage_one[0]), CROP)
    run = trainer(tmp_path, 1)
    run.fit(task, data(cache))
    run.save_checkpoint(tmp_path / "two.ckpt")
    image = torch.rand(2, 1, 40, 56)
    for path, model in ((stage_one[0], stage_one[1].model), (tmp_path / "two.ckpt", task.model)):
        with torch.no_grad():
            found, wanted = load_lp_sam(path)(image), model.eval()(image)
        assert found.shape == (2, 2, 40, 56) and torch.equal(found, wanted)
    with pytest.raises(ValueError, match="is a checkpoint of stage 2"):
        LatentPromptTask(str(tmp_path / "two.ckpt"), CROP)


def test_load_lp_sam__refuses_other_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_lp_sam(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of LP-SAM"):
        load_lp_sam(tmp_path / "other.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_lp_sam(tmp_path / "broken.ckpt")


def test_task__segments_whole_frames_as_its_regions_are(
    stage_one: tuple[Path, Any, dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    """What validation measures is what `agssd regions` writes."""
    path, task, _ = stage_one
    out = tmp_path / "out.h5"
    list(write_regions(cache, out, LatentPrompts(path)))
    written = VolumeCache(out)
    frames = written.read_whole(0).astype(np.float32) / 255
    with torch.no_grad():
        classes = task.eval().segment(torch.from_numpy(frames)[None] * 2 - 1).argmax(1)[0].numpy()
    assert (written.read_whole(0, "regions") == classes).mean() > 0.999  # but for rounding of intensities


def test_task__refuses_volumes_and_impossible_settings(sam: Path) -> None:
    with pytest.raises(ValueError, match="give two numbers"):
        SAMAdapterTask(str(sam), 2, (32, 32, 32))
    with pytest.raises(ValueError, match="dice_share=2"):
        SAMAdapterTask(str(sam), 2, CROP, dice_share=2.0)


def test_regions__of_a_checkpoint_killed_and_resumed_are_identical(
    stage_one: tuple[Path, Any, dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    source = LatentPrompts(stage_one[0], components=True)
    undisturbed, out = tmp_path / "undisturbed.h5", tmp_path / "out.h5"
    list(write_regions(cache, undisturbed, source))
    stream = write_regions(cache, out, source)
    for _ in range(3):
        next(stream)
    stream.close()
    assert not out.exists() and len(list((build_path(out) / "parts").glob("*.h5"))) == 3
    arguments = ["--source", "sam", "--checkpoint", str(stage_one[0]), "--components", "--out", str(out)]
    assert main(["regions", str(cache), *arguments]) == 0
    assert out.read_bytes() == undisturbed.read_bytes()


def dice_of_regions(path: Path) -> float:
    """Return the mean Dice of regions 1 and 2 against the labels of the cases in val."""
    found = VolumeCache(path)
    scores = []
    for row in found.select("val"):
        regions, label = found.read_whole(row, "regions"), found.read_whole(row, "label")
        for value in (1, 2):
            one, two = regions == value, label == value
            scores.append(2 * (one & two).sum() / (one.sum() + two.sum()))
    return float(np.mean(scores))


@pytest.mark.slow
def test_two_stages__raise_dice_of_the_masks_and_a_killed_run_of_them_is_resumed(
    sam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """The shipped experiments on a made set: untuned, then adapted, then with latent prompts; then a real kill."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    cache = made_cache(tmp_path / "made.h5", num_cases=24)

    def fit(stage: str, steps: int, *more: str) -> Path:
        runs = tmp_path / f"runs_{stage}_{steps}"
        arguments = [
            "--config", str(CONF / f"experiment/lp_sam_{stage}.yaml"), "--data.cache", str(cache),
            "--model.crop_vox", "[48,64]", "--data.num_workers", "0", "--data.global_batch_size", "8",
            "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.logger", "false",
            "--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps),
            "--model.lr", "3e-3" if steps > 1 else "1e-9", "--trainer.default_root_dir", str(runs), *more,
        ]  # fmt: skip
        assert main(["fit", *arguments]) in (0, None)
        return sorted(runs.rglob("last.ckpt"))[0]

    of_sam = ("--model.sam", str(sam), "--model.num_classes", "3", "--model.adapter_dim", "64")
    scores = {}
    untuned = fit("adapters", 1, *of_sam)
    adapted = fit("adapters", 150, *of_sam)
    prompted = fit("prompts", 150, "--model.adapted", str(adapted))
    for name, path in (("untuned", untuned), ("adapted", adapted), ("prompted", prompted)):
        out = tmp_path / f"{name}.h5"
        arguments = ["--source", "sam", "--checkpoint", str(path), "--out", str(out), "--sheet", f"{name}.png"]
        assert main(["regions", str(cache), *arguments]) == 0
        scores[name] = dice_of_regions(out)
    record_property("printed", f"LP-SAM, Dice of produced masks on a made set: {scores}")
    assert scores["adapted"] > scores["untuned"] + 0.4
    assert scores["prompted"] > scores["adapted"] + 0.03

    out = tmp_path / "killed.h5"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: sums are then rounded alike
    command = [sys.executable, "-m", "agssd", "regions", str(cache), "--source", "sam", "--checkpoint", str(prompted)]
    for parts in (1, 4):
        run = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL, env=one_thread)
        while len(list((build_path(out) / "parts").glob("*.h5"))) < parts and run.poll() is None:
            time.sleep(0.01)
        run.kill()
        run.wait()
        left = len(list((build_path(out) / "parts").glob("*.h5")))
        assert not out.exists() and parts <= left < 24, "the kill came too late to interrupt anything"
    assert main([*command[3:], "--out", str(out)]) == 0
    assert out.read_bytes() == (tmp_path / "prompted.h5").read_bytes()
