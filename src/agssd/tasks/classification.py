"""Classification of volumes: linear probe, attentive probe, or fine-tuning with layer-wise rates."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agssd.evaluation.metrics import classification_scores
from agssd.models.backbone import Backbone
from agssd.tasks.finetuning import DownstreamTask, gather_rows
from agssd.types import LabelledBatch, Size

MAX_FRAMES = 16  # of a sequence that is classified, evenly spread
Pooling = Literal["cls", "mean", "cls_mean", "attentive"]


class AttentivePooling(nn.Module):
    """Returns one vector per volume: a learned query attends to all tokens.

    Args:
        embed_dim: size of a token.
        num_heads: attention heads; must divide ``embed_dim``.

    Source: attentive probing [R: V-JEPA, CoCa], one cross-attention without MLP.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        """Build the query and its attention."""
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the encoder's embed_dim {embed_dim}")
        self.query = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, E) for tokens (B, N, E)."""
        pooled: Tensor = self.attention(
            self.query.expand(len(tokens), -1, -1).to(tokens.dtype), tokens, tokens, need_weights=False
        )[0]
        return pooled[:, 0]


def window_starts(box: list[tuple[int, int]], crop_vox: Size) -> list[Size]:
    """Return the fewest evenly spread windows that cover a box; one centred window where the box is smaller.

    Args:
        box: [start, end) per axis in voxels.
        crop_vox: window in voxels.
    """
    per_axis: list[list[int]] = []
    for (first, last), crop in zip(box, crop_vox, strict=True):
        count = max(1, -(-(last - first) // crop))
        if count == 1:
            per_axis.append([(first + last - crop) // 2])
        else:
            per_axis.append([first + round(i * (last - first - crop) / (count - 1)) for i in range(count)])
    return list(itertools.product(*per_axis))


class ClassificationTask(DownstreamTask):
    """Classifies volumes from the encoder's features.

    The usual forms: linear probe (``freeze_encoder: true``, pooling "cls", "mean" or "cls_mean"), attentive probe
    (``freeze_encoder: true``, "attentive"), fine-tuning (``freeze_encoder: false``, ``layer_decay: 0.75``).

    Training sees one crop of the foreground per case. Validation, test and prediction cover the foreground's box with
    windows and pool their tokens as those of one volume: [CLS] and mean tokens are averaged over windows, attention
    looks at the tokens of all of them. ``val/auroc`` and ``val/balanced_accuracy`` are over the cases of all ranks;
    ``validate`` and ``test`` write
    ``val_cases.csv`` and ``test_cases.csv``, ``predict`` ``predictions.csv``, under ``trainer.default_root_dir``.

    Args:
        num_classes: number of classes.
        crop_vox: window ([D,] H, W) in voxels; divisible by the patch.
        backbone: an encoder with fresh weights (from scratch), or None.
        encoder: an export, a checkpoint or a run to take weights from, or None.
        pooling: "cls", "mean" (of patch tokens), "cls_mean" (both side by side) or "attentive".
        num_heads: heads of attentive pooling.
        dropout: before the last layer.
        class_weights: weights of the loss per class, "balanced" (inverse frequency in the training cases), or None.
        label_smoothing: of the cross-entropy.
        freeze_encoder: learn pooling and the last layer alone.
        lr: peak rate of the head.
        encoder_lr: peak rate of the encoder's last layer.
        layer_decay: factor on the rate per layer downwards.
        weight_decay: of weights.
        warmup: share of the run with rising rate.
        sw_batch_size: windows per forward pass.
        ignore_contract: accept data prepared differently from what the encoder was trained on.

    Raises:
        ValueError: for an encoder that is missing or does not fit, or an impossible setting.

    Source: ours; AdamW for the probes too (DINOv2 uses SGD), so that one optimiser serves all forms.
    """

    def __init__(
        self,
        num_classes: int,
        crop_vox: Size,
        backbone: Backbone | None = None,
        encoder: str | None = None,
        pooling: Pooling = "cls_mean",
        num_heads: int = 3,
        dropout: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        freeze_encoder: bool = False,
        lr: float = 1e-3,
        encoder_lr: float = 5e-4,
        layer_decay: float = 0.75,
        weight_decay: float = 1e-2,
        warmup: float = 0.1,
        sw_batch_size: int = 8,
        ignore_contract: bool = False,
    ) -> None:
        """Take the encoder and build pooling and head."""
        super().__init__(
            backbone, encoder, freeze_encoder, lr, encoder_lr, layer_decay, weight_decay, warmup, ignore_contract
        )
        self.save_hyperparameters(ignore=["backbone"], logger=False)
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; give at least 2")
        if isinstance(class_weights, list) and len(class_weights) != num_classes:
            raise ValueError(f"class_weights has {len(class_weights)} entries for num_classes={num_classes}")
        self.num_classes = num_classes
        self.crop_vox: Size = tuple(int(n) for n in crop_vox)
        self.backbone.token_grid(self.crop_vox)  # refuses a window that does not fit
        self.pooling, self.class_weights, self.label_smoothing = pooling, class_weights, label_smoothing
        self.sw_batch_size = sw_batch_size
        size = self.backbone.embed_dim
        self.attentive = AttentivePooling(size, num_heads) if pooling == "attentive" else None
        width = 2 * size if pooling == "cls_mean" else size
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, num_classes))
        weights = torch.tensor(class_weights) if isinstance(class_weights, list) else torch.ones(num_classes)
        self.register_buffer("loss_weights", weights.float())
        self._rows: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        """Count classes where the loss is to be balanced."""
        counts = getattr(getattr(self.trainer, "datamodule", None), "class_counts", None)
        if self.class_weights == "balanced" and stage == "fit":
            if counts is None or min(counts) == 0:
                raise ValueError(
                    f"model.class_weights is 'balanced', which needs training cases of every class; there are {counts} "
                    "per class. Give a weight per class, or --model.class_weights null"
                )
            total = sum(counts)
            self.loss_weights = torch.tensor([total / (len(counts) * n) for n in counts], device=self.device)

    def _pool(self, cls: Tensor, tokens: Tensor) -> Tensor:
        """Return (B, width) from [CLS] (B, V, E) and tokens (B, V, N, E) of V windows per volume."""
        if self.attentive is not None:
            pooled: Tensor = self.attentive(tokens.flatten(1, 2))
            return pooled
        mean = tokens.mean((1, 2))
        if self.pooling == "mean":
            return mean
        return cls.mean(1) if self.pooling == "cls" else torch.cat([cls.mean(1), mean], 1)

    def forward(self, windows: Tensor) -> Tensor:
        """Return class scores (B, num_classes) float32 of V windows per volume (B, V, C, [D,] H, W)."""
        batch, count = windows.shape[:2]
        cls, tokens = [], []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            flat = windows.flatten(0, 1)
            for part in flat.split(len(flat) if self.training else self.sw_batch_size):
                features = self.backbone(part)
                cls.append(features.cls)
                tokens.append(features.tokens)
        pooled = self._pool(
            torch.cat(cls).unflatten(0, (batch, count)).float(), torch.cat(tokens).unflatten(0, (batch, count)).float()
        )
        scores: Tensor = self.head(pooled)
        return scores.float()

    def windows(self, image: Tensor, foreground: Tensor) -> Tensor:
        """Return the windows (1, V, C, [d,] h, w) that cover the foreground of one volume.

        Args:
            image: (1, C, [D,] H, W) float32.
            foreground: (1, 1, [D,] H, W) bool; the whole volume where it is empty.

        Of a sequence (1, C, T, H, W) these are the windows of at most 16 evenly spread frames.
        """
        if image.ndim == len(self.crop_vox) + 3:
            count = image.shape[2]
            frames = torch.linspace(0, count - 1, min(count, MAX_FRAMES)).round().long().tolist()
            return torch.cat([self.windows(image[:, :, t], foreground[:, :, t]) for t in frames], 1)
        where = foreground[0, 0].nonzero()
        if len(where):
            low, high = where.amin(0).tolist(), (where.amax(0) + 1).tolist()
        else:
            low, high = [0] * len(self.crop_vox), list(image.shape[2:])
        starts = window_starts(list(zip(low, high, strict=True)), self.crop_vox)
        shape = image.shape[2:]
        before = [max(0, *(-start[a] for start in starts)) for a in range(len(shape))]
        after = [max(0, *(start[a] + self.crop_vox[a] - shape[a] for start in starts)) for a in range(len(shape))]
        pads = [n for a in reversed(range(len(shape))) for n in (before[a], after[a])]
        padded = F.pad(image, pads, value=float(image.min()))
        views = []
        for start in starts:
            box = [slice(s + b, s + b + n) for s, b, n in zip(start, before, self.crop_vox, strict=True)]
            views.append(padded[:, :, *box])
        return torch.stack(views, 1)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one crop per case, in float32."""
        scores = self(batch["image"][:, None])
        assert isinstance(self.loss_weights, Tensor)
        loss = F.cross_entropy(scores, batch["target"], weight=self.loss_weights, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _classify(self, batch: LabelledBatch) -> dict[str, Any]:
        scores = self(self.windows(batch["image"], batch["foreground"]))
        row: dict[str, Any] = {"case": int(batch["case"][0]), "probabilities": scores.softmax(1)[0].tolist()}
        if "target" in batch:
            row["target"] = int(batch["target"][0])
        return row

    def _summarise(self, stage: str) -> list[dict[str, Any]]:
        rows, self._rows = gather_rows(self._rows), []
        if rows:
            scores = classification_scores(
                torch.tensor([row["probabilities"] for row in rows]), torch.tensor([row["target"] for row in rows])
            )
            for name, value in scores.items():
                self.log(f"{stage}/{name}", value, prog_bar=True, rank_zero_only=True)
        return rows

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Classify a whole volume."""
        self._rows.append(self._classify(batch))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/auroc`` and ``val/balanced_accuracy``; ``agssd validate`` also writes one row per case."""
        rows = self._summarise("val")
        if self.trainer.state.fn == "validate":
            self._write_rows(rows, "val_cases.csv")

    def test_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Classify a whole volume."""
        self._rows.append(self._classify(batch))

    def on_test_epoch_end(self) -> None:
        """Log the scores and write one row per case."""
        self._write_rows(self._summarise("test"), "test_cases.csv")

    def predict_step(self, batch: LabelledBatch, batch_idx: int) -> list[float]:
        """Return the class probabilities of a whole volume."""
        row = self._classify(batch)
        self._rows.append(row)
        return list(row["probabilities"])

    def on_predict_epoch_end(self) -> None:
        """Write ``predictions.csv``."""
        rows, self._rows = gather_rows(self._rows), []
        self._write_rows(rows, "predictions.csv")

    def _write_rows(self, rows: list[dict[str, Any]], name: str) -> None:
        if not self.trainer.is_global_zero or not rows:
            return
        lookup = getattr(getattr(self.trainer, "datamodule", None), "case_info", None)
        path = Path(self.trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{name}.part")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "subject", "target", *(f"probability{c}" for c in range(self.num_classes))])
            for row in sorted(rows, key=lambda row: row["case"]):
                info = None if lookup is None else lookup(row["case"])
                cells = [f"{value:.6f}" for value in row["probabilities"]]
                key, subject = getattr(info, "key", row["case"]), getattr(info, "subject", "")
                writer.writerow([key, subject, row.get("target", ""), *cells])
        partial.replace(path)
