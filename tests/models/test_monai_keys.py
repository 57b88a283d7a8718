"""Our weights in MONAI's networks give our features, and MONAI's weights in ours give MONAI's."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR
from monai.networks.nets import ViT as MonaiViT
from torch import nn

from agssd.models.monai_keys import MonaiEncoder, from_monai, load_into_monai, to_monai
from agssd.models.vit import ViT

torch.set_num_threads(1)


def perturbed(**kwargs: object) -> ViT:
    """Return a ViT none of whose parameters sits at a neutral value."""
    torch.manual_seed(0)
    model = ViT(embed_dim=48, num_heads=4, **{"patch_size": 8, "depth": 3} | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def monai_vit(classification: bool, depth: int = 3, **kwargs: object) -> MonaiViT:
    sizes = {"in_channels": 1, "img_size": (16, 32, 24), "patch_size": 8, "hidden_size": 48, "mlp_dim": 192}
    return MonaiViT(
        **sizes | {"num_layers": depth, "num_heads": 4, "qkv_bias": True, "classification": classification} | kwargs
    ).eval()


def unetr() -> UNETR:
    return UNETR(1, 3, (32, 48, 16), feature_size=4, hidden_size=48, mlp_dim=192, num_heads=4, qkv_bias=True).eval()


@pytest.mark.parametrize("classification", [False, True])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_load_into_monai__every_block_equal(classification: bool, layer_scale: float | None) -> None:
    model, x = perturbed(class_token=classification, layer_scale=layer_scale), torch.randn(2, 1, 16, 32, 24)
    network = monai_vit(classification)
    state = to_monai(model, (2, 4, 3), class_token=classification)
    assert {n for n in network.state_dict() if not n.startswith("classification_head")} == set(state)
    network.load_state_dict(state, strict=False)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    with torch.no_grad():
        _, hidden = network(x)
        normed, ours = model.hidden_states(x)
        features = model(x)
    for mine, theirs in zip(ours, hidden, strict=True):
        torch.testing.assert_close(mine, theirs[:, int(classification) :], rtol=1e-5, atol=1e-5)
    theirs = network.norm(hidden[-1])
    torch.testing.assert_close(features.tokens, theirs[:, int(classification) :], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.tokens, normed, rtol=0, atol=0)
    if classification:
        torch.testing.assert_close(features.cls, theirs[:, 0], rtol=1e-5, atol=1e-5)


def test_load_into_monai__cube_and_head_kept() -> None:
    model, network = perturbed(), monai_vit(True, img_size=16)
    head = network.classification_head[0].weight.clone()
    load_into_monai(model, network)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network.norm(network(x)[1][-1])[:, 0], model(x).cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.classification_head[0].weight, head, rtol=0, atol=0)


def test_load_into_monai__unetr_decodes_our_levels() -> None:
    model, network, x = perturbed(class_token=False, depth=12, patch_size=16), unetr(), torch.randn(1, 1, 32, 48, 16)
    load_into_monai(model, network)
    with torch.no_grad():
        out, hidden = network.vit(x)
        levels = model(x).levels
        for level, theirs in zip(levels, [hidden[3], hidden[6], hidden[9], out], strict=True):
            torch.testing.assert_close(level, network.proj_feat(theirs), rtol=1e-5, atol=1e-5)
        before = network(x)
        network.vit = MonaiEncoder(model)
        torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)


def test_monai_encoder__keeps_everything_in_unetr() -> None:
    model = perturbed(depth=12, patch_size=16, num_registers=2, rotary=True, layer_scale=0.5)
    network, x = unetr(), torch.randn(1, 1, 32, 48, 16)
    network.vit = MonaiEncoder(model)
    out, hidden = network.vit(x)
    features = model(x)
    torch.testing.assert_close(out, features.tokens, rtol=0, atol=0)
    torch.testing.assert_close(network.proj_feat(hidden[6]), features.levels[1], rtol=0, atol=0)
    assert network(x).shape == (1, 3, 32, 48, 16)


def test_load_into_monai__unetr_needs_word_about_cls() -> None:
    model, network = perturbed(depth=12, patch_size=16), unetr()
    with pytest.raises(ValueError, match="drop_cls=True"):
        load_into_monai(model, network)
    load_into_monai(model, network, drop_cls=True)
    torch.testing.assert_close(network.vit.norm.weight, model.norm.weight, rtol=0, atol=0)


@pytest.mark.parametrize("kwargs, word", [({"num_registers": 1}, "registers"), ({"rotary": True}, "rotary")])
def test_to_monai__names_what_has_no_place(kwargs: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        to_monai(perturbed(**kwargs), (2, 2, 2), class_token=True)


def test_load_into_monai__misfits_named() -> None:
    model = perturbed()
    with pytest.raises(ValueError, match="qkv_bias=True"):
        load_into_monai(model, monai_vit(True, img_size=16, qkv_bias=False))
    with pytest.raises(ValueError, match=r"blocks\.3"):
        load_into_monai(model, monai_vit(True, img_size=16, depth=4))
    with pytest.raises(ValueError, match="perceptron"):
        load_into_monai(model, monai_vit(True, img_size=16, proj_type="perceptron"))
    with pytest.raises(ValueError, match="token grid"):
        load_into_monai(model, monai_vit(True))
    with pytest.raises(ValueError, match="MONAI ViT or UNETR"):
        load_into_monai(model, nn.Linear(1, 1))


@pytest.mark.parametrize("classification", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_from_monai__features_equal_up_to_eps(classification: bool, qkv_bias: bool) -> None:
    torch.manual_seed(1)
    network = monai_vit(classification, qkv_bias=qkv_bias)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model, x = from_monai(network.state_dict(), 4, (2, 4, 3)).eval(), torch.randn(2, 1, 16, 32, 24)
    with torch.no_grad():
        theirs = network.norm(network(x)[1][-1])[:, int(classification) :]
        torch.testing.assert_close(model(x).tokens, theirs, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(model(torch.randn(1, 1, 8, 16, 40)).tokens).all()  # a foreign table serves other grids


def test_from_monai__round_trip() -> None:
    model = perturbed()
    back = from_monai(to_monai(model, (2, 4, 3), class_token=True), 4, (2, 4, 3))
    x = torch.randn(1, 1, 16, 32, 24)
    torch.testing.assert_close(back(x).tokens, model(x).tokens, rtol=1e-6, atol=1e-6)
    unetr_state = unetr().state_dict()
    assert from_monai(unetr_state, 4, (2, 3, 1)).cls_token is None


def test_from_monai__misfits_named() -> None:
    state = dict(monai_vit(True).state_dict())
    with pytest.raises(ValueError, match="grid"):
        from_monai(state, 4)
    with pytest.raises(ValueError, match="no place"):
        from_monai(state | {"blocks.0.mystery": torch.ones(1)}, 4, (2, 4, 3))
    with pytest.raises(ValueError, match="linear2"):
        from_monai({n: v for n, v in state.items() if n != "blocks.1.mlp.linear2.bias"}, 4, (2, 4, 3))
    with pytest.raises(ValueError, match="MONAI ViT or UNETR"):
        from_monai({}, 4)


@pytest.mark.parametrize("classification", [False, True])
def test_frames__there_and_back(classification: bool) -> None:
    model, x = perturbed(class_token=classification, spatial_dims=2), torch.randn(2, 1, 32, 32)
    network = monai_vit(classification, img_size=(32, 32), spatial_dims=2)
    load_into_monai(model, network)  # 16 tokens: a square
    with torch.no_grad():
        theirs = network.norm(network(x)[1][-1])
        torch.testing.assert_close(model(x).tokens, theirs[:, int(classification) :], rtol=1e-5, atol=1e-5)
        back = from_monai(network.state_dict(), num_heads=4).eval()
        assert back.spatial_dims == 2
        torch.testing.assert_close(back(x).tokens, model(x).tokens, rtol=1e-5, atol=1e-5)


def test_frames__unetr_decodes_our_levels() -> None:
    x = torch.randn(1, 1, 32, 48)
    flat = perturbed(class_token=False, patch_size=16, depth=12, spatial_dims=2)
    network = UNETR(1, 3, (32, 48), feature_size=4, hidden_size=48, mlp_dim=192, num_heads=4, qkv_bias=True,
                    spatial_dims=2).eval()  # fmt: skip
    network.vit = MonaiEncoder(flat)
    with torch.no_grad():
        own = network(x)
        plain = UNETR(1, 3, (32, 48), feature_size=4, hidden_size=48, mlp_dim=192, num_heads=4, qkv_bias=True,
                      spatial_dims=2).eval()  # fmt: skip
        plain.load_state_dict({name: value for name, value in network.state_dict().items() if "vit." not in name},
                              strict=False)  # fmt: skip
        load_into_monai(flat, plain)
        torch.testing.assert_close(plain(x), own, rtol=1e-4, atol=1e-4)
