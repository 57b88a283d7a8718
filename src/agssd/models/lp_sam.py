"""LP-SAM: SAM that finds masks without being prompted, from adapters and latent prompts.

Source: ANAUS (arXiv 2605.25402), after its repository and supplement: adapters on SAM's image encoder; then, with SAM
frozen, learned sparse tokens and a small CNN's embedding of the image as dense prompt, refined by N = 4 two-way blocks
of 8 heads. Ours: one prompt per mask, so that several classes are found at once; the plain tokens that prompt while
adapters are tuned, of which nothing is published; and widths, with SAM ViT-B 6.8 M parameters of the engine, where
11.1 M are published.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agssd.models.sam import add_adapters, build_sam, from_sam, sam_size, to_sam

FORMAT = "agssd-lp-sam"  # of the dictionary "lp_sam" in checkpoints


@dataclass(frozen=True)
class LPSAMSettings:
    """What rebuilds an LP-SAM.

    Attributes:
        num_masks: masks that are found, one per class beside background.
        adapter_dim: bottleneck of the adapters.
        num_tokens: sparse tokens per prompt.
        num_blocks: two-way blocks of the engine; 0 for plain tokens (stage 1).
        num_heads: of their attention.
    """

    num_masks: int = 1
    adapter_dim: int = 256
    num_tokens: int = 2
    num_blocks: int = 0
    num_heads: int = 8


class LPSAM(nn.Module):
    """SAM with adapters and prompts of its own.

    Args:
        sam: a ``SamModel``; it is taken over and changed.
        settings: of what is added.

    Attributes:
        adapters: parameters of the adapters.
    """

    def __init__(self, sam: Any, settings: LPSAMSettings) -> None:
        super().__init__()
        self.settings = settings
        self.config: dict[str, Any] = sam.config.to_dict()
        self.edge = sam_size(sam)
        self.adapters = add_adapters(sam, settings.adapter_dim)
        self.sam = sam
        dim = int(sam.config.prompt_encoder_config.hidden_size)
        self.tokens = nn.Parameter(torch.randn(settings.num_masks, settings.num_tokens, dim) * dim**-0.5)
        self.engine = None
        if settings.num_blocks:
            patch = int(sam.config.vision_config.patch_size)
            self.engine = PromptEngine(dim, patch, settings.num_blocks, settings.num_heads)

    def forward(self, image: Tensor) -> Tensor:
        """Return mask logits (B, num_masks, H, W) float32 of frames (B, C, H, W) in [0, 1]."""
        pixels = to_sam(image, self.edge)
        seen = self.sam.vision_encoder(pixels)[0]  # (B, E, h, w)
        batch = len(image)
        places = self.sam.get_image_wide_positional_embeddings().expand(batch, -1, -1, -1)
        sparse = self.tokens.expand(batch, -1, -1, -1)  # (B, M, T, E)
        dense = self.sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(seen)
        if self.engine is not None:
            sparse, more = self.engine(pixels, seen, sparse)
            dense = dense + more
        masks = self.sam.mask_decoder(
            image_embeddings=seen,
            image_positional_embeddings=places,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[0]
        return from_sam(masks[:, :, 0].float(), self.edge, image.shape[-2], image.shape[-1])

    def plain(self) -> dict[str, Any]:
        """Return what rebuilds it, less the weights, in plain types."""
        return {"format": FORMAT, "sam": self.config, "settings": asdict(self.settings)}


class PromptEngine(nn.Module):
    """Latent prompts for an image: sparse tokens that have looked at it, and a dense embedding of it.

    Args:
        dim: channels of SAM's embeddings, divisible by ``num_heads``.
        patch: of SAM's image encoder, a power of 2; the CNN shrinks the image as much.
        num_blocks: two-way blocks.
        num_heads: of attention.
    """

    def __init__(self, dim: int, patch: int, num_blocks: int, num_heads: int) -> None:
        super().__init__()
        if patch < 2 or patch & (patch - 1) or dim % num_heads:
            raise ValueError(
                f"SAM has patches of {patch} pixels and prompts of {dim} channels; the prompt engine needs a power of "
                f"2, and channels divisible by its {num_heads} heads"
            )
        steps = patch.bit_length() - 1
        widths = [3, *(max(8, dim >> (steps - 1 - step)) for step in range(steps))]
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(1, after), nn.GELU()]
        self.cnn = nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))
        self.blocks = nn.ModuleList(TwoWayBlock(dim, num_heads) for _ in range(num_blocks))
        self.to_dense = nn.Linear(dim, dim)
        nn.init.zeros_(self.to_dense.weight)  # the engine begins as plain tokens without a dense prompt
        nn.init.zeros_(self.to_dense.bias)

    def forward(self, pixels: Tensor, seen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return sparse prompts (B, M, T, E) and a dense one (B, E, h, w).

        Args:
            pixels: (B, 3, S, S) as SAM takes them.
            seen: (B, E, h, w), of SAM's image encoder.
            tokens: (B, M, T, E), learned.
        """
        cnn = self.cnn(pixels).flatten(2).mT  # (B, h w, E)
        image, prompts = seen.flatten(2).mT, tokens.flatten(1, 2)
        for block in self.blocks:
            image, prompts = block(image, prompts, cnn)
        return prompts.view_as(tokens), self.to_dense(image).mT.unflatten(2, seen.shape[2:])


class TwoWayBlock(nn.Module):
    """Image tokens look at the CNN's, prompts at each other and at the image, and the image at the prompts.

    Args:
        dim: channels.
        num_heads: of attention.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        names = ("cnn", "own", "image", "prompts")
        self.attention = nn.ModuleDict(
            {name: nn.MultiheadAttention(dim, num_heads, batch_first=True) for name in names}
        )
        self.norms = nn.ModuleDict({name: nn.LayerNorm(dim) for name in (*names, "mlp")})
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, image: Tensor, prompts: Tensor, cnn: Tensor) -> tuple[Tensor, Tensor]:
        """Return image tokens (B, N, E) and prompts (B, P, E) after the block; ``cnn`` is (B, N, E)."""
        image = self._look("cnn", image, cnn)
        prompts = self._look("own", prompts, prompts)
        prompts = self._look("image", prompts, image)
        prompts = prompts + self.mlp(self.norms["mlp"](prompts))
        return self._look("prompts", image, prompts), prompts

    def _look(self, name: str, at_work: Tensor, looked_at: Tensor) -> Tensor:
        query = self.norms[name](at_work)
        values = query if looked_at is at_work else looked_at
        attended: Tensor = self.attention[name](query, values, values, need_weights=False)[0]
        return at_work + attended


def load_lp_sam(path: str | Path) -> LPSAM:
    """Return the LP-SAM of a checkpoint that ``agssd fit`` wrote, in evaluation mode on the CPU.

    Raises:
        ValueError: no such file, or none of LP-SAM.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path} does not exist") from error
    except Exception as error:  # torch raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())}") from error
    plain = checkpoint.get("lp_sam") if isinstance(checkpoint, dict) else None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of LP-SAM; train one with conf/experiment/lp_sam_adapters.yaml")
    model = LPSAM(build_sam(plain["sam"]), LPSAMSettings(**plain["settings"]))
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of its LP-SAM: {' '.join(str(error).split())}") from error
    return model.eval()
