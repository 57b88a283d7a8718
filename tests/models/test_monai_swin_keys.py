"""MONAI's Swin weights, as files hold them, give MONAI's features in our encoder; ours give ours in MONAI's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from agssd.models.monai_swin_keys import (
    MonaiSwinEncoder,
    from_monai_swin,
    load_into_monai_swin,
    read_monai_weights,
    to_monai_swin,
)
from agssd.models.swin_unetr import SwinUNETREncoder

torch.set_num_threads(1)
SIZES: dict[str, Any] = {"feature_size": 12, "depths": (2, 1, 1, 2), "num_heads": (1, 2, 3, 4), "window_size": 3}


def shaken(network: Any) -> Any:
    """Return the network in evaluation mode, none of its parameters at a neutral value."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return network.eval()


def swin_unetr(**kwargs: Any) -> SwinUNETR:
    torch.manual_seed(1)
    return shaken(SwinUNETR(1, 3, **SIZES | {"downsample": "mergingv2"} | kwargs))


def encoder(**kwargs: Any) -> SwinUNETREncoder:
    torch.manual_seed(2)
    return shaken(SwinUNETREncoder(1, **SIZES | kwargs))


def assert_equal_states(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def released(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return weights as ``model_swinvit.pt`` holds them: parallel, old names of the MLP, heads of pretraining."""
    old = {"mlp.linear1": "mlp.fc1", "mlp.linear2": "mlp.fc2"}
    renamed = {}
    for name, value in state.items():
        for new, former in old.items():
            name = name.replace(new, former)
        renamed[f"module.{name}"] = value
    heads = {"module.norm.weight": torch.ones(192), "module.rotation_head.weight": torch.ones(4, 192)}
    return {"epoch": 7, "state_dict": renamed | heads, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "released": released,
    "parallel": lambda state: {"state_dict": prefixed("module.swinViT.")(state)},
    "nested": lambda state: {"model": prefixed("encoder.")(state) | {"out.conv.weight": torch.ones(2)}},
    "bare": prefixed(""),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("use_v2", [False, True])
def test_from_monai_swin__every_kind_of_file_gives_monais_features(kind: str, use_v2: bool, tmp_path: Path) -> None:
    network = swin_unetr(use_v2=use_v2)
    torch.save(FILES[kind](network.swinViT.state_dict()), tmp_path / "weights.pt")
    model = from_monai_swin(read_monai_weights(tmp_path / "weights.pt"), downsample="mergingv2")
    assert not model.training
    x = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        assert_equal_states(model(x).levels, network.swinViT(x))


def test_from_monai_swin__released_file_equals_monais_own_way_of_loading_it(tmp_path: Path) -> None:
    file = released(swin_unetr(downsample="merging").swinViT.state_dict())
    torch.save(file, tmp_path / "model_swinvit.pt")
    torch.manual_seed(5)
    network = SwinUNETR(1, 3, **SIZES).eval()
    network.load_from(file)
    model = from_monai_swin(read_monai_weights(tmp_path / "model_swinvit.pt"), downsample="merging")
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert_equal_states(model(x).levels, network.swinViT(x))
        as_trained = from_monai_swin(file["state_dict"], downsample="merging_1.4")(x)
    assert not torch.allclose(as_trained.tokens, model(x).tokens, atol=1e-2), "versions of MONAI join cells differently"


def test_from_monai_swin__whole_network_and_windows_of_any_shape() -> None:
    whole = swin_unetr()
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert_equal_states(from_monai_swin(whole.state_dict(), downsample="mergingv2")(x).levels, whole.swinViT(x))
        flat = swin_unetr(window_size=(2, 3, 4))
        with pytest.raises(ValueError, match="pass window_size="):
            from_monai_swin(flat.state_dict(), downsample="mergingv2")
        model = from_monai_swin(flat.state_dict(), downsample="mergingv2", window_size=(2, 3, 4))
        assert_equal_states(model(x).levels, flat.swinViT(x))


@pytest.mark.parametrize("use_v2", [False, True])
def test_load_into_monai_swin__encoder_equal_and_decoder_kept(use_v2: bool) -> None:
    model, network = encoder(use_v2=use_v2), swin_unetr(use_v2=use_v2)
    kept = {n: v.clone() for n, v in network.state_dict().items() if not n.startswith("swinViT.")}
    assert to_monai_swin(model).keys() == network.swinViT.state_dict().keys()
    load_into_monai_swin(model, network)
    x = torch.randn(2, 1, 32, 32, 64)
    with torch.no_grad():
        assert_equal_states(model(x).levels, network.swinViT(x))
        replaced = swin_unetr(use_v2=use_v2)
        replaced.swinViT = MonaiSwinEncoder(model)
        torch.testing.assert_close(replaced(x), network(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in kept.items())
    back = from_monai_swin(network.state_dict(), downsample="mergingv2")
    assert back.config["init_args"] == model.config["init_args"]
    torch.testing.assert_close(back(x).tokens, model(x).tokens, rtol=0, atol=0)


@pytest.mark.parametrize("downsample", ["merging", "mergingv2"])
def test_monai_swin_keys__of_frames_go_there_and_back(downsample: Any) -> None:
    model = encoder(spatial_dims=2, use_v2=True, downsample=downsample)
    network = swin_unetr(spatial_dims=2, use_v2=True, downsample=downsample)
    load_into_monai_swin(model, network)
    x = torch.randn(2, 1, 64, 32)
    with torch.no_grad():
        assert_equal_states(model(x).levels, network.swinViT(x))
        back = from_monai_swin(network.state_dict(), downsample=downsample)
    assert back.config == model.config and torch.equal(back(x).tokens, model(x).tokens)


def test_load_into_monai_swin__misfits_named() -> None:
    with pytest.raises(ValueError, match="downsample='mergingv2' and the MONAI network in another order"):
        load_into_monai_swin(encoder(), swin_unetr(downsample="merging"))
    with pytest.raises(ValueError, match="MonaiSwinEncoder"):
        load_into_monai_swin(encoder(downsample="merging_1.4"), swin_unetr(downsample="merging"))
    load_into_monai_swin(encoder(downsample="merging"), swin_unetr(downsample="merging"))
    with pytest.raises(ValueError, match=r"without source .*layers4\.0"):
        load_into_monai_swin(encoder(depths=(2, 1, 1), num_heads=(1, 2, 3)), swin_unetr())
    with pytest.raises(ValueError, match="layers1c"):
        load_into_monai_swin(encoder(use_v2=True), swin_unetr())
    with pytest.raises(ValueError, match=r"of other shape .*attn\.proj\.weight: \(12, 12\) for \(24, 24\)"):
        load_into_monai_swin(encoder(), SwinUNETR(1, 3, **SIZES | {"feature_size": 24}, downsample="mergingv2"))
    with pytest.raises(ValueError, match="SwinUNETR or SwinTransformer"):
        load_into_monai_swin(encoder(), nn.Linear(1, 1))


def test_from_monai_swin__misfits_named() -> None:
    state = dict(swin_unetr().swinViT.state_dict())
    with pytest.raises(ValueError, match="without place .*layers1.0.mystery"):
        from_monai_swin(state | {"layers1.0.mystery": torch.ones(1)}, downsample="mergingv2")
    with pytest.raises(ValueError, match=r"without source .*layers2\.0\.blocks\.0\.mlp\.linear2\.bias"):
        lacking = {n: v for n, v in state.items() if n != "layers2.0.blocks.0.mlp.linear2.bias"}
        from_monai_swin(lacking, downsample="mergingv2")
    with pytest.raises(ValueError, match="blocks in stages 1 to 4"):
        from_monai_swin({n: v for n, v in state.items() if not n.startswith("layers2")}, downsample="mergingv2")
    with pytest.raises(ValueError, match="0 weights named"):
        from_monai_swin({"vit.norm.weight": torch.ones(2)}, downsample="mergingv2")
    with pytest.raises(ValueError, match="2 weights named"):
        from_monai_swin(prefixed("teacher.")(state) | prefixed("student.")(state), downsample="mergingv2")


def test_read_monai_weights__files_that_are_none_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match=r"weights\.pt: no such file"):
        read_monai_weights(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"weights\.pt: "):
        read_monai_weights(path)
    torch.save({"state_dict": {"epoch": 3}}, path)
    with pytest.raises(ValueError, match="holds no tensors"):
        read_monai_weights(path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "network": nn.Linear(1, 1)}, path)  # needs code of its own to load
    with pytest.raises(ValueError, match="weights_only=False"):
        read_monai_weights(path)
