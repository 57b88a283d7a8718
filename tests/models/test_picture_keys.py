"""Weights of picture ViTs: our encoder computes what theirs does, written here as their papers and code do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.hub import export_backbone, load_backbone
from agssd.models.picture_keys import from_pictures

E, DEPTH, HEADS, PATCH, SIDE = 48, 3, 4, 8, 5


def weights(registers: int = 0, scales: bool = False, cls_position: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    state = {
        "patch_embed.proj.weight": draw(E, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(E),
        "cls_token": draw(1, 1, E),
        "pos_embed": draw(1, SIDE**2 + cls_position, E, scale=1.0),
        "norm.weight": 1 + draw(E),
        "norm.bias": draw(E),
        "head.weight": draw(10, E),
        "mask_token": draw(1, E),
    }
    if registers:
        state["register_tokens"] = draw(1, registers, E)
    for block in range(DEPTH):
        for name, shape in {
            "norm1.weight": (E,), "norm1.bias": (E,), "attn.qkv.weight": (3 * E, E), "attn.qkv.bias": (3 * E,),
            "attn.proj.weight": (E, E), "attn.proj.bias": (E,), "norm2.weight": (E,), "norm2.bias": (E,),
            "mlp.fc1.weight": (4 * E, E), "mlp.fc1.bias": (4 * E,), "mlp.fc2.weight": (E, 4 * E), "mlp.fc2.bias": (E,),
        }.items():  # fmt: skip
            state[f"blocks.{block}.{name}"] = draw(*shape)
        if scales:
            state |= {f"blocks.{block}.ls{k}.gamma": draw(E, scale=1.0) for k in (1, 2)}
    return state


def theirs(state: dict[str, Tensor], picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return [CLS] and patch tokens of a plain ViT by its definition."""
    x = F.conv2d(picture, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).mT
    position, cls = state["pos_embed"], state["cls_token"].expand(len(x), -1, -1)
    if position.shape[1] == x.shape[1] + 1:
        cls, position = cls + position[:, :1], position[:, 1:]
    x = torch.cat([cls, *([state["register_tokens"].expand(len(x), -1, -1)] if "register_tokens" in state else []),
                   x + position], 1)  # fmt: skip
    for block in range(DEPTH):
        own = {name.removeprefix(f"blocks.{block}."): value for name, value in state.items()}
        y = F.layer_norm(x, (E,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        q, k, v = F.linear(y, own["attn.qkv.weight"], own["attn.qkv.bias"]).unflatten(-1, (3, HEADS, -1)).unbind(2)
        share = torch.einsum("bnhe,bmhe->bhnm", q, k).mul((E // HEADS) ** -0.5).softmax(-1)
        y = torch.einsum("bhnm,bmhe->bnhe", share, v).flatten(2)
        x = x + F.linear(y, own["attn.proj.weight"], own["attn.proj.bias"]) * own.get("ls1.gamma", 1.0)
        y = F.layer_norm(x, (E,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"])), own["mlp.fc2.weight"],
                     own["mlp.fc2.bias"])  # fmt: skip
        x = x + y * own.get("ls2.gamma", 1.0)
    x = F.layer_norm(x, (E,), state["norm.weight"], state["norm.bias"], 1e-6)
    return x[:, 0], x[:, -(SIDE**2) :]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("cls_position", [False, True])
def test_from_pictures__computes_the_same_tokens(registers: int, scales: bool, cls_position: bool) -> None:
    state = weights(registers, scales, cls_position)
    picture = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, (cls, tokens) = from_pictures(state, HEADS)(picture), theirs(state, picture)
    torch.testing.assert_close(found.cls, cls, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.tokens, tokens, atol=1e-4, rtol=1e-4)


def test_from_pictures__grey_is_three_equal_colours_and_other_sizes_and_exports_are_taken(tmp_path) -> None:
    state = weights()
    grey = torch.randn(1, 1, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(2))
    encoder = from_pictures(state, HEADS, in_channels=1)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(grey).cls, theirs(state, grey.expand(-1, 3, -1, -1))[0], atol=1e-4, rtol=1e-4
        )
        larger = torch.randn(1, 1, 56, 72)
        assert encoder(larger).grid == (7, 9)
        again = load_backbone(export_backbone(encoder, tmp_path))
        torch.testing.assert_close(again(larger).tokens, encoder(larger).tokens)


def test_from_pictures__refuses_what_is_no_plain_vit() -> None:
    lacking, foreign, oblong = weights(), weights(), weights()
    del lacking["blocks.1.norm2.bias"]
    foreign["blocks.0.attn.q_norm.weight"] = torch.ones(E)
    oblong["pos_embed"] = torch.zeros(1, 24, E)
    for state, reason in ((lacking, "blocks.1.norm2.bias is missing"), (foreign, "no place in our ViT.*q_norm"),
                          (oblong, "24 positions, which are no square")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            from_pictures(state, HEADS)
    with pytest.raises(ValueError, match="in_channels is 2"):
        from_pictures(weights(), HEADS, in_channels=2)
