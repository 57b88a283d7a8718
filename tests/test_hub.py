"""An exported encoder gives equal features, carries its contract, and refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import agssd
from agssd.hub import export_backbone, load_backbone, resize_kernel
from agssd.models.resnet_fpn import ResNetFPN
from agssd.models.swin_unetr import SwinUNETREncoder
from agssd.models.vit import ViT
from agssd.types import Features

torch.set_num_threads(1)
PREPARED: dict[str, Any] = {
    "spacing_mm": [1.0, 1.5, 1.5],
    "orientation": "SAR",
    "modality": "ct",
    "intensity": {"ct": {"rule": "linear", "low_hu": -1000.0, "high_hu": 1000.0, "range": [0.0, 1.0]}},
    "channels": 2,
}


def vit(**kwargs: Any) -> ViT:
    torch.manual_seed(3)
    return ViT(**{"in_channels": 2, "patch_size": 4, "embed_dim": 48, "num_heads": 4, "depth": 2} | kwargs)


def save_checkpoint(path: Path, model: ViT, contract: dict[str, Any] | None = PREPARED, **about: Any) -> Path:
    """Write what a recipe's Lightning checkpoint holds: a student that must not be taken, and the teacher."""
    state = {f"teacher.backbone.{n}": v for n, v in model.state_dict().items()}
    state |= {f"student.backbone.{n}": torch.zeros_like(v) for n, v in model.state_dict().items()}
    entry = {"method": "agssd.methods.agssd.AGSSD", "backbone": model.config, "state_prefix": "teacher.backbone."}
    entry |= {"contract": contract} | about
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": 120, "agssd": entry}, path)
    return path


@pytest.mark.parametrize("kwargs", [{}, {"rotary": True, "num_registers": 2, "layer_scale": 0.1, "drop_path": 0.2}])
def test_export_load__features_equal(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model, x = vit(**kwargs), torch.randn(2, 2, 8, 12, 8)
    file = export_backbone(save_checkpoint(tmp_path / "run" / "last.ckpt", model), tmp_path / "out")
    expected = model(x)
    for path in (file, str(file), file.parent):
        loaded = agssd.load_backbone(path)
        features = loaded(x)
        assert isinstance(features, Features) and not loaded.training
        torch.testing.assert_close(features.tokens, expected.tokens, rtol=0, atol=1e-6)
        torch.testing.assert_close(features.cls, expected.cls, rtol=0, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(features.levels, expected.levels, strict=True))


def test_contract__in_header_and_json(tmp_path: Path) -> None:
    file = export_backbone(save_checkpoint(tmp_path / "a.ckpt", vit()), tmp_path / "out")
    contract = load_backbone(file).contract
    assert contract == json.loads((tmp_path / "out" / "backbone.json").read_text())
    assert contract is not None and PREPARED.items() <= contract.items()
    assert contract["patch_size"] == [4, 4, 4] and contract["step"] == 120
    assert contract["method"] == "agssd.methods.agssd.AGSSD" and contract["agssd_version"] == agssd.__version__
    (tmp_path / "out" / "backbone.json").unlink()
    moved = file.rename(tmp_path / "elsewhere.safetensors")
    assert load_backbone(moved).contract == contract  # the file alone suffices


def test_export__record_too_long_for_the_header__refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agssd.hub.MAX_HEADER", 5000)
    seen = {"num_cases": 1, "num_subjects": 1, "salts": [], "subjects": "A" * 6000, "hashes": ""}
    with pytest.raises(ValueError, match="--without-record"):
        export_backbone(vit(), tmp_path, contract={"seen": seen})
    assert not list(tmp_path.iterdir())
    export_backbone(vit(), tmp_path, contract={"seen": None})


def test_export__from_modules(tmp_path: Path) -> None:
    class Recipe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = vit()

        @property
        def backbone(self) -> nn.Module:
            return self.student

    first = export_backbone(Recipe(), tmp_path / "a", contract=PREPARED)
    loaded = load_backbone(first)
    second = load_backbone(export_backbone(loaded, tmp_path / "b"))  # a loaded one keeps its contract
    assert second.contract == loaded.contract and loaded.contract is not None
    assert loaded.contract["method"].endswith("Recipe")
    bare = load_backbone(export_backbone(vit(), tmp_path / "c")).contract
    assert bare is not None and bare["spacing_mm"] is None
    with pytest.raises(ValueError, match="neither a Backbone"):
        export_backbone(nn.Linear(1, 1), tmp_path / "d")
    with pytest.raises(ValueError, match="channels=3"):
        export_backbone(vit(), tmp_path / "d", contract={"channels": 3})
    with pytest.raises(ValueError, match="plain"):
        export_backbone(vit(), tmp_path / "d", contract={"spacing_mm": torch.ones(3)})
    assert not (tmp_path / "d").exists()


def test_load__prints_nothing_and_draws_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = export_backbone(vit(), tmp_path)
    state = torch.get_rng_state()
    load_backbone(file)
    assert torch.equal(state, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_in_channels__mean_kernel_rescaled(tmp_path: Path) -> None:
    model = vit()
    file = export_backbone(model, tmp_path, contract=PREPARED)
    x = torch.randn(1, 1, 8, 8, 8)
    expected = model(x.expand(-1, 2, -1, -1, -1)).tokens
    for channels in (1, 3, 5):
        other = load_backbone(file, in_channels=channels)
        torch.testing.assert_close(other(x.expand(-1, channels, -1, -1, -1)).tokens, expected, rtol=1e-5, atol=1e-5)
        assert other.in_channels == channels and other.contract is not None
        assert other.contract["channels"] == channels and other.contract["adapted_from"] == {"channels": 2}
    assert "adapted_from" not in (load_backbone(file, in_channels=2).contract or {})
    again = load_backbone(export_backbone(load_backbone(file, in_channels=1), tmp_path / "again"))
    torch.testing.assert_close(again(x).tokens, expected, rtol=1e-5, atol=1e-5)
    assert again.contract is not None and again.contract["adapted_from"] == {"channels": 2}


def test_patch_size__grown_patch_keeps_embedding_of_resized_volume(tmp_path: Path) -> None:
    model, x = vit(), torch.randn(1, 2, 4, 4, 4)
    file = export_backbone(model, tmp_path)
    for patch in (8, (6, 4, 5)):
        other = load_backbone(file, patch_size=patch)
        large = F.interpolate(x, size=other.patch_size, mode="trilinear", align_corners=False)
        torch.testing.assert_close(other(large).tokens, model(x).tokens, rtol=1e-4, atol=1e-4)
        assert other.contract is not None and other.contract["patch_size"] == list(other.patch_size)
        assert other.contract["adapted_from"] == {"patch_size": [4, 4, 4]}


def test_load__swin__other_channels_adapted_and_other_patches_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = SwinUNETREncoder(2, 12, 2, (1, 1), (1, 2), 3)
    file = export_backbone(model, tmp_path, contract=PREPARED)
    x = torch.randn(1, 1, 8, 16, 8)
    expected = model(x.expand(-1, 2, -1, -1, -1)).levels
    for channels in (1, 2, 3):
        other = load_backbone(file, in_channels=channels, patch_size=8)  # what it has
        for ours, theirs in zip(other(x.expand(-1, channels, -1, -1, -1)).levels, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert type(other) is SwinUNETREncoder and other.in_channels == channels
    for patch in (2, 4, 16):  # 2 is the size of its kernel, not of its tokens
        with pytest.raises(ValueError, match=r"SwinUNETREncoder has tokens of \(8, 8, 8\) voxels.*without patch_size"):
            load_backbone(file, patch_size=patch)


@pytest.mark.parametrize("dims", [2, 3])
def test_load__resnet_fpn__other_channels_adapted_and_other_patches_refused_with_the_remedy(
    dims: int, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    model = ResNetFPN(2, "basic", (1, 1), 8, 12, 8, 4, spatial_dims=dims)
    file = export_backbone(model, tmp_path, contract=PREPARED)
    x = torch.randn(1, 1, *(16, 8, 16)[-dims:])
    space = [-1] * dims
    expected = model(x.expand(-1, 2, *space)).levels
    for channels in (1, 2, 3):
        other = load_backbone(file, in_channels=channels, patch_size=8)  # what it has
        for ours, theirs in zip(other(x.expand(-1, channels, *space)).levels, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert type(other) is ResNetFPN and other.in_channels == channels
    for patch in (4, 7, 16):  # 7 is the size of its kernel, not of its tokens
        with pytest.raises(ValueError, match=r"ResNetFPN has tokens of \(8, .*without patch_size"):
            load_backbone(file, patch_size=patch)


def test_resize_kernel__shrunk_patch_keeps_smooth_content() -> None:
    smooth = torch.ones(3, 1, 8, 8, 8)  # a constant kernel sums the patch: its mean response must survive
    assert torch.allclose(resize_kernel(smooth, (4, 4, 4)).sum((2, 3, 4)), smooth.sum((2, 3, 4)), rtol=1e-5)
    kernel = torch.randn(3, 1, 4, 4, 4)
    assert torch.equal(resize_kernel(kernel, (4, 4, 4)), kernel)
    torch.testing.assert_close(resize_kernel(resize_kernel(kernel, (8, 8, 8)), (4, 4, 4)).shape, kernel.shape)


def test_load__other_input_says_what_to_do(tmp_path: Path) -> None:
    loaded = load_backbone(export_backbone(vit(), tmp_path))
    with pytest.raises(ValueError, match="in_channels=1"):
        loaded(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="divisible"):
        loaded(torch.zeros(1, 2, 8, 8, 10))
    with pytest.raises(ValueError, match="in_channels"):
        load_backbone(tmp_path, in_channels=0)
    with pytest.raises(ValueError, match="patch_size"):
        load_backbone(tmp_path, patch_size=0)


def rewrite(file: Path, weights: dict[str, Tensor], **changes: Any) -> None:
    from agssd.hub import weights_digest

    contract = json.loads(file.with_suffix(".json").read_text()) | {"weights_sha256": weights_digest(weights)}
    save_file(weights, file, metadata={"agssd": json.dumps(contract | changes)})


def test_load__damaged_or_foreign_file_refused(tmp_path: Path) -> None:
    file = export_backbone(vit(), tmp_path)
    whole, weights = file.read_bytes(), load_file(file)

    def refused(match: str, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_backbone(file, **kwargs)
        assert str(file) in str(caught.value)

    rewrite(file, {n: v for n, v in weights.items() if n != "norm.weight"})
    refused("missing .'norm.weight'")
    rewrite(file, weights | {"extra": torch.ones(1)})
    refused("without place .'extra'")
    rewrite(file, weights | {"patch_weight": torch.ones(48, 3, 4, 4, 4)})
    refused(r"\(48, 3, 4, 4, 4\).*in_channels=")
    rewrite(file, weights | {"norm.weight": weights["norm.weight"] + 1}, weights_sha256="0")
    refused("SHA-256")
    rewrite(file, weights, format_version=2)
    refused("format version 2")
    save_file(weights, file)
    refused("no agssd contract")
    file.write_bytes(whole[: len(whole) // 2])
    refused("no whole safetensors file")
    file.write_bytes(b"")
    refused("no whole safetensors file")
    file.unlink()
    refused("no such file")
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="agssd export"):
        load_backbone(tmp_path / "last.ckpt")


def test_class_path__foreign_module_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_code.py").write_text(
        "from pathlib import Path\nfrom agssd.models.vit import ViT as V\n"
        f"Path({str(tmp_path / 'was_run')!r}).touch()\nclass Mine(V):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = vit()
    model.config = model.config | {"class_path": "foreign_code.Mine"}
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", model)
    with pytest.raises(ValueError, match="trust_class=True"):
        export_backbone(checkpoint, tmp_path / "no")
    file = export_backbone(model, tmp_path / "out")
    with pytest.raises(ValueError, match="outside agssd"):
        load_backbone(file)
    assert not (tmp_path / "was_run").exists() and not (tmp_path / "no").exists()
    assert type(load_backbone(file, trust_class=True)).__name__ == "Mine"
    for path, word in (("agssd.types.Features", "no Backbone"), ("agssd.models.vit.Gone", "cannot be imported")):
        model.config = model.config | {"class_path": path}
        with pytest.raises(ValueError, match=word):
            load_backbone(export_backbone(model, tmp_path / "bad"))


def test_export__bad_checkpoints_refused_and_nothing_written(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(path: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            export_backbone(path, out)
        assert str(path) in str(caught.value) and not out.exists()

    refused(tmp_path / "gone.ckpt", "no such checkpoint")
    whole = save_checkpoint(tmp_path / "a.ckpt", vit())
    (tmp_path / "cut.ckpt").write_bytes(whole.read_bytes()[:1000])
    refused(tmp_path / "cut.ckpt", "is it whole")
    (tmp_path / "none.ckpt").write_bytes(b"torn")
    refused(tmp_path / "none.ckpt", "is it whole")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    refused(tmp_path / "other.ckpt", "only checkpoints of agssd")
    refused(save_checkpoint(tmp_path / "b.ckpt", vit(), state_prefix="gone."), "no weights under 'gone.'")
    refused(save_checkpoint(tmp_path / "c.ckpt", vit(), backbone=vit(depth=3).config), r"missing \['blocks\.2")


def test_export__failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export_backbone(vit(), tmp_path / "out")
    before = file.read_bytes()

    def broken(weights: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("agssd.hub.save_file", broken)
    with pytest.raises(ValueError, match="disk full"):
        export_backbone(vit(depth=1), tmp_path / "out")
    assert file.read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["backbone.json", "backbone.safetensors"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        export_backbone(vit(), tmp_path / "file")
