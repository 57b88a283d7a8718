"""The slice encoder lays 2D tokens over the volume; a tiny network stands in for timm, which is tested where it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from agssd.evaluation.probe_features import ProbeVolume, encode
from agssd.models.slices import AXES, SliceEncoder, load_slice_model


class Means(nn.Module):
    """Speaks as timm's vision transformers do: one [CLS], then the mean of each patch of 4 pixels, per channel."""

    num_features = 3
    num_prefix_tokens = 1
    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    patch_embed = SimpleNamespace(grid_size=(4, 4))

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward_features(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 16, 16)
        tokens = nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        assert pre_logits
        return x[:, 0]


@pytest.mark.parametrize("axis", AXES)
def test_slice_encoder__tokens_lie_where_their_voxels_are(axis) -> None:
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 16, 16, 16)
    encoder = SliceEncoder(Means(), axis=axis, patch_vox=4)
    found = encoder(volume)
    expected = nn.functional.avg_pool3d(volume * 2 - 1, encoder.patch_size)  # no resizing: means of patches
    assert found.grid == expected.shape[2:]
    for channel in range(3):
        assert torch.allclose(found.tokens[0, :, channel], expected.flatten(), atol=1e-5)
    assert torch.allclose(found.cls, (volume * 2 - 1).mean().expand(1, 3), atol=1e-5)


def test_slice_encoder__range_and_size_are_the_models() -> None:
    volume = torch.rand(2, 1, 3, 24, 40) * 2 - 1
    encoder = SliceEncoder(Means(), patch_vox=8, value_range=(-1.0, 1.0), batch_size=4)
    found = encoder(volume)
    assert found.grid == (3, 3, 5) and found.tokens.shape == (2, 45, 3)
    assert torch.allclose(found.cls.mean(1), volume.mean((1, 2, 3, 4)), atol=0.02)  # -1 to 1 is 0 to 1 is -1 to 1
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_slice_encoder__whole_volumes__one_token_per_patch_and_label_block() -> None:
    label = torch.randint(0, 3, (5, 18, 11))
    encoder = SliceEncoder(Means(), patch_vox=4)
    (found,) = encode(encoder, [ProbeVolume("s", torch.rand(1, 5, 18, 11), label, 1)], None, 0.0)
    assert found.labels is not None
    assert found.tokens.shape == (5 * 5 * 3, 3) and found.labels.shape == (5 * 5 * 3, 16)
    assert int((found.labels != 255).sum()) == label.numel()


def test_slice_encoder__channels_and_widths_that_do_not_fit__refused() -> None:
    with pytest.raises(ValueError, match="volumes have 2 channels"):
        SliceEncoder(Means(), in_channels=2)
    model = Means()
    model.num_features = 5
    with pytest.raises(ValueError, match="where both must have 5"):
        SliceEncoder(model, patch_vox=4)(torch.zeros(1, 1, 2, 16, 16))


def test_load_slice_model__without_timm__says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install 'agssd\[slices\]'"):
        load_slice_model("vit_tiny_patch16_224", "random")


@pytest.fixture
def timm():
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_load_slice_model__local_weights__whole_and_strict(timm, name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    source = timm.create_model(name, num_classes=7)  # weights in the wild come with their classifier
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    source.eval().reset_classifier(0)
    image = torch.rand(1, 1, 2, 32, 48)
    outputs = []
    for file in ("w.safetensors", "w.pth"):
        model = load_slice_model(name, tmp_path / file)
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
        found = SliceEncoder(model, patch_vox=8)(image)
        assert found.grid == (2, 4, 6) and torch.isfinite(found.tokens).all()
        outputs.append(found.tokens)
    assert torch.equal(*outputs)
    fresh = load_slice_model(name, "random")
    assert not torch.allclose(SliceEncoder(fresh, patch_vox=8)(image).tokens, outputs[0], atol=1e-4)


def test_load_slice_model__dinov3_in_its_authors_names(
    timm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "vit_small_patch16_dinov3"
    torch.manual_seed(1)
    source = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.02)
    renamed = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    state = {}
    for key, value in source.state_dict().items():
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        state[key] = value
    state |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.zeros(16)}
    assert set(state) != set(source.state_dict())
    torch.save(state, tmp_path / "dinov3_vits16_pretrain.pth")
    loaded = load_slice_model(name, tmp_path / "dinov3_vits16_pretrain.pth")
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert not capsys.readouterr().out
    found = SliceEncoder(loaded, axis="coronal", patch_vox=8)(torch.rand(1, 1, 24, 2, 40))
    assert found.grid == (3, 2, 5) and found.tokens.shape == (1, 30, 384) and torch.isfinite(found.tokens).all()
    del state["norm.weight"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(ValueError, match=f"do not fit {name}.*norm.weight"):
        load_slice_model(name, tmp_path / "torn.pth")


def test_load_slice_model__wrong_names_and_files__refused(timm, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"nothing")
    torch.save({"other": torch.zeros(1)}, tmp_path / "o.pth")
    (tmp_path / "code.pth").write_bytes(b"cbuiltins\nexec\n(Vraise SystemExit\ntR.")  # a pickle that runs code
    for name, file, reason in (
        ("no_such_model", "random", "timm cannot make"),
        ("test_vit", "missing.pth", "no such file"),
        ("test_vit", "w.pth", "cannot be read as weights"),
        ("test_vit", "code.pth", "cannot be read as weights"),
        ("test_vit", "o.pth", "do not fit test_vit"),
        ("vit_small_patch16_dinov3", "o.pth", "do not fit vit_small_patch16_dinov3"),
    ):
        weights = file if file == "random" else tmp_path / file
        with pytest.raises(ValueError, match=reason):
            load_slice_model(name, weights)
