"""Segmentation: what is learnt, what stays frozen, and that predictions lie on their source."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import nibabel as nib
import numpy as np
import pytest
import torch

from agssd.data_modules.downstream import SegmentationDataModule
from agssd.hub import export_backbone
from agssd.models.resnet_fpn import ResNetFPN
from agssd.models.swin_unetr import SwinUNETREncoder
from agssd.models.vit import ViT
from agssd.tasks.segmentation import SegmentationTask

MakeViT = Callable[..., ViT]
MakeTrainer = Callable[..., L.Trainer]


def data(cache: Path, **arguments: Any) -> SegmentationDataModule:
    return SegmentationDataModule(str(cache), **{"global_batch_size": 2, "num_workers": 0, **arguments})


def task(backbone: ViT | None, **arguments: Any) -> SegmentationTask:
    settings = {"num_classes": 3, "crop_vox": (32, 32, 32), "decoder": "linear", **arguments}
    return SegmentationTask(backbone=backbone, **settings)


def test_fit__frozen_encoder__encoder_bit_identical_and_decoder_moved(
    tiny_cache: Path, make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    module = task(make_vit(), freeze_encoder=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(3).fit(module, data(tiny_cache))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_fit__encoder_learnt__every_part_moves(tiny_cache: Path, make_vit: MakeViT, make_trainer: MakeTrainer) -> None:
    module = task(make_vit(), decoder="unetr", feature_size=4)
    before = {name: value.clone() for name, value in module.named_parameters()}
    make_trainer(2).fit(module, data(tiny_cache))
    blocks = [name for name in before if name.startswith("backbone.blocks") and name.endswith("weight")]
    moved = [name for name in blocks if not torch.equal(before[name], module.get_parameter(name))]
    assert moved == blocks


def swin() -> SwinUNETREncoder:
    torch.manual_seed(0)
    return SwinUNETREncoder(1, 12, 2, (1, 2), (1, 2), 4)


def resnet() -> ResNetFPN:
    torch.manual_seed(0)
    return ResNetFPN(1, "basic", (1, 1, 1, 1), 8, 12, 8, 4)


@pytest.mark.parametrize("decoder", ["unetr", "linear"])
@pytest.mark.parametrize("encoder", [swin, resnet])
def test_fit__encoder_of_levels__every_part_moves_and_exports_to_the_same_scores(
    tmp_path: Path, tiny_cache: Path, make_trainer: MakeTrainer, encoder: Any, decoder: str
) -> None:
    module = task(encoder(), decoder=decoder, feature_size=4)
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer = make_trainer(2)
    trainer.fit(module, data(tiny_cache))
    still = [name for name, value in module.named_parameters() if torch.equal(before[name], value)]
    assert still in (["backbone.mask_token"], []), "only what masked views train may stay"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = task(encoder(), encoder=str(tmp_path / "last.ckpt"), decoder=decoder, feature_size=4)
    again.decoder.load_state_dict(module.decoder.state_dict())
    image = torch.randn(1, 1, 40, 33, 50)
    with torch.no_grad():
        torch.testing.assert_close(again.eval().segment(image), module.eval().segment(image), rtol=1e-5, atol=1e-5)


def test_parameter_groups__swin_unetr__layers_upwards_from_the_embedding() -> None:
    module = task(swin(), lr=1e-2, encoder_lr=1e-3, layer_decay=0.5, weight_decay=0.1)
    groups = module.parameter_groups()
    rates = {group["name"].removesuffix("_no_decay"): group["lr"] for group in groups}
    assert rates == pytest.approx({"head": 1e-2} | {f"layer{i}": 1e-3 * 0.5 ** (4 - i) for i in range(5)})
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in module.parameters())
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    tables = [p for name, p in module.named_parameters() if "position_bias" in name]
    assert len(tables) == 3 and all(id(table) in free for table in tables)


def test_init__exported_encoder__same_weights_and_equal_features(tmp_path: Path, make_vit: MakeViT) -> None:
    trained = make_vit(seed=7).eval()
    export_backbone(trained, tmp_path)
    loaded, scratch = task(None, encoder=str(tmp_path)), task(make_vit(seed=8))
    image = torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(loaded.backbone(image).tokens, trained(image).tokens)
    assert not torch.allclose(scratch.backbone(image).tokens, trained(image).tokens, atol=1e-2)
    assert loaded.backbone.training  # Lightning keeps the mode a module comes with
    # the architecture may be stated beside the weights, if it is the same
    both = task(make_vit(seed=9), encoder=str(tmp_path))
    assert torch.equal(both.backbone(image).tokens, trained(image).tokens)
    with pytest.raises(ValueError, match="configuration says"):
        task(make_vit(depth=3), encoder=str(tmp_path))


def test_init__neither_backbone_nor_encoder__refused() -> None:
    with pytest.raises(ValueError, match="no encoder"):
        task(None)


def test_init__window_not_divisible_by_patch__refused(make_vit: MakeViT) -> None:
    with pytest.raises(ValueError, match="patch"):
        task(make_vit(), crop_vox=(32, 32, 30))


def test_checkpoint__trained_task__encoder_exports_again(
    tmp_path: Path, tiny_cache: Path, make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    from agssd.tasks.encoders import load_encoder

    module, trainer = task(make_vit()), make_trainer(2)
    trainer.fit(module, data(tiny_cache))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    encoder = load_encoder(tmp_path / "last.ckpt")
    image = torch.randn(1, 1, 32, 32, 32)
    assert torch.allclose(encoder(image).tokens, module.backbone(image).tokens, atol=1e-6)
    assert encoder.contract is not None and encoder.contract["spacing_mm"] == [1.0, 1.0, 1.0]


def test_parameter_groups__layer_decay__rates_fall_geometrically_and_cover_all(make_vit: MakeViT) -> None:
    module = task(make_vit(depth=3), lr=1e-2, encoder_lr=1e-3, layer_decay=0.5, weight_decay=0.1)
    groups = module.parameter_groups()
    rates = {group["name"].removesuffix("_no_decay"): group["lr"] for group in groups}
    assert rates == pytest.approx({"head": 1e-2, "layer4": 1e-3, "layer3": 5e-4, "layer2": 2.5e-4, "layer1": 1.25e-4,
                                   "layer0": 6.25e-5})  # fmt: skip
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in module.parameters())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in groups:
        decays = group["weight_decay"] > 0
        for parameter in group["params"]:
            if names[id(parameter)].endswith(("bias", "cls_token", "mask_token")) or "norm" in names[id(parameter)]:
                assert not decays, names[id(parameter)]
    assert names[id(groups[0]["params"][0])].startswith("decoder.")


def test_segment__score_is_a_function_of_position__windows_restore_geometry(make_vit: MakeViT) -> None:
    """A network that copies the sign of its input must give the input's sign back, at any size."""

    class Copy(SegmentationTask):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([-image, image, torch.full_like(image, -100)], 1) * 50

    module = Copy(num_classes=3, crop_vox=(16, 16, 16), backbone=make_vit(), decoder="linear")
    for shape in ((40, 21, 33), (10, 40, 12), (16, 16, 16)):
        image = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(module.segment(image).argmax(1), (image[:, 0] > 0).long())


def test_fit_and_test__blobs__dice_over_0_8_and_a_row_per_case(
    tmp_path: Path, make_cache: Callable[..., Path], make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    torch.manual_seed(0)
    cache = make_cache(tmp_path / "blobs.h5", num_cases=3, shape=(24, 32, 24), splits=["train", "val", "test"])
    module = task(
        make_vit(patch_size=4, embed_dim=48), crop_vox=(24, 32, 24), decoder="unetr", feature_size=8, sw_overlap=0.0
    )
    # the training case again as the test: can it learn at all
    source = data(cache, appearance=False)
    trainer = make_trainer(60, limit_val_batches=0)
    trainer.fit(module, source)
    source.members["test"] = source.members["train"]
    scores = trainer.test(module, source, verbose=False)[0]
    assert scores["test/dice"] > 0.8
    assert 0.8 < scores["test/surface_dice"] <= 1
    rows = list(csv.DictReader((tmp_path / "test_cases.csv").open()))
    assert [row["case"] for row in rows] == ["case000"]
    assert float(rows[0]["dice_class1"]) == pytest.approx(scores["test/dice_class1"], abs=1e-5)


def test_predict__perfect_network__written_nifti_overlays_the_source(
    tmp_path: Path, tiny_cache: Path, make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    source = data(tiny_cache, predict_split="all")

    class Perfect(SegmentationTask):
        def segment(self, image: torch.Tensor) -> torch.Tensor:
            case = self.position
            self.position += 1
            label = source.caches[0].read_whole(case, "label")
            return torch.nn.functional.one_hot(torch.from_numpy(label).long(), 3).movedim(-1, 0)[None].float()

    module = Perfect(num_classes=3, crop_vox=(32, 32, 32), backbone=make_vit(), decoder="linear")
    module.position = 0
    paths = make_trainer().predict(module, source)
    assert paths is not None and len(paths) == 8
    for row, (path,) in enumerate(paths):
        info = source.case_info(row)
        written = nib.load(path)
        assert Path(path) == tmp_path / "predictions" / f"{info.key}.nii.gz"
        assert written.shape == info.source_shape
        assert np.array_equal(written.affine, np.asarray(info.source_affine))
        label = source.caches[0].read_whole(row, "label")
        assert np.array_equal(np.asarray(written.dataobj), label.transpose(2, 1, 0))
    assert not list((tmp_path / "predictions").glob(".*"))


def write_scan(folder: Path, number: int, codes: str, turn: float) -> tuple[Path, np.ndarray]:
    """Write an image with its label in a storage order, optionally oblique, and return the label's array."""
    rng = np.random.default_rng(number)
    shape = (30, 36, 26)
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"), -1)
    label = np.zeros(shape, np.uint8)
    label[(((grid - [6, 5, -3]) / [6, 8, 5]) ** 2).sum(-1) < 1] = 1
    label[(((grid + [7, 6, -4]) / [5, 5, 7]) ** 2).sum(-1) < 1] = 2
    inside = ((grid / [14, 17, 12]) ** 2).sum(-1) < 1
    image = np.where(inside, 200 + 100 * label + rng.normal(0, 10, shape), 0).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    affine[:3, 3] = [-12, 30, 7]
    order = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(("R", "A", "S")), nib.orientations.axcodes2ornt(tuple(codes))
    )
    stored = nib.Nifti1Image(label, affine).as_reoriented(order)
    nib.save(nib.Nifti1Image(image, affine).as_reoriented(order), folder / f"scan{number}.nii.gz")
    nib.save(stored, folder / f"scan{number}_seg.nii.gz")
    return folder / f"scan{number}.nii.gz", np.asarray(stored.dataobj)


def test_predict__prepared_scans_of_many_orientations__label_returns_to_its_own_file(
    tmp_path: Path, make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    from agssd.cli import main

    folder = tmp_path / "scans"
    folder.mkdir()
    forms = [("RAS", 0.0), ("LPS", 0.0), ("SRA", 0.0), ("PIL", 0.0), ("ASL", 0.0), ("RAS", 0.35), ("IPR", 0.2)]
    sources = [write_scan(folder, number, *form) for number, form in enumerate(forms)]
    cache = tmp_path / "scans.h5"
    code = main(["prepare", str(folder), "--out", str(cache), "--modality", "mri", "--spacing-mm", "1",
                 "--labels", "*_seg.nii.gz", "--workers", "1"])  # fmt: skip
    assert code == 0
    source = data(cache, predict_split="all")

    class Perfect(SegmentationTask):
        position = 0

        def segment(self, image: torch.Tensor) -> torch.Tensor:
            label = torch.from_numpy(source.caches[0].read_whole(self.position, "label"))
            self.position += 1
            return torch.nn.functional.one_hot(label.long(), 3).movedim(-1, 0)[None].float()

    paths = make_trainer().predict(Perfect(num_classes=3, crop_vox=(32, 32, 32), backbone=make_vit()), source)
    import hashlib

    by_hash = {hashlib.sha256(path.read_bytes()).hexdigest(): (path, label) for path, label in sources}
    assert paths is not None and len(paths) == len(forms)
    for row, (written,) in enumerate(paths):
        path, label = by_hash[source.case_info(row).source_sha256]
        original, found = nib.load(path), nib.load(written)
        assert found.shape == original.shape
        assert np.allclose(found.affine, original.affine, atol=1e-5)
        oblique = forms[int(path.name[4])][1] != 0  # resampled on the way in
        for value in (1, 2):
            a, b = np.asarray(found.dataobj) == value, label == value
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= (0.9 if oblique else 1.0), (path.name, value)
