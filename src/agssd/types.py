"""Shared names: batches, features, and the protocols by which callbacks meet modules.

Shape legend, used in every docstring of the package:

- ``B`` samples, ``C`` channels, ``D, H, W`` voxels; D is slowest and runs inferior to superior,
  H posterior to anterior, W left to right (S, A, R increasing).
- ``N`` tokens of a view (without [CLS]), ``G = (D', H', W')`` its token grid, ``E`` embedding size, ``K`` prototypes.
- Every triple (shape, spacing, crop) follows tensor order. In 2D, where samples are frames of ultrasound or other
  pictures, D, D' and the first of every triple are not there: images are (B, C, H, W).
- ``mask`` is bool and True means hidden from the encoder.

This module imports torch for the type checker only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor, nn

Size = tuple[int, ...]  # one number per axis of space, tensor order: (D, H, W), or (H, W) in 2D
Triple = tuple[int, int, int]  # where there are always three, as in the cache
# Figures of a probe, of which the first that is measured stands for it; AUROC is not among them, for it is NaN where
# one class is held out.
PROBE_FIGURES = (
    "linear_seg_dice",
    "knn_seg_dice",
    "linear_cls_balanced_accuracy",
    "knn_cls_balanced_accuracy",
)


class ParentBatch(TypedDict):
    """One parent crop per sample, as the pretraining data module delivers it.

    ``image`` (B, C, [D,] H, W) int16 as stored; ``image * scale + offset`` is HU for CT and the source's own units,
    clipped to the stored percentiles, for MRI. Voxels outside the volume hold the volume's lowest stored value.
    """

    image: Tensor  # (B, C, [D,] H, W) int16
    foreground: Tensor  # (B, 1, [D,] H, W) uint8, 1 = body; 0 in padding
    scale: Tensor  # (B, C) float32
    offset: Tensor  # (B, C) float32
    low: Tensor  # (B, C) float32: intensity that maps to the low end of the model's range (CT: -1000 HU)
    high: Tensor  # (B, C) float32: intensity that maps to the high end (CT: 1000 HU)
    edge_q99: Tensor  # (B, C) float32: 99th percentile of the edge magnitude inside the foreground, 0 if flat
    is_ct: Tensor  # (B,) bool
    spacing_mm: Tensor  # (B, d) float32
    centre_mm: Tensor  # (B, d) float32: centre of the crop minus centre of the volume
    sample: Tensor  # (B,) int64: position in the endless stream; the key of every random draw
    case: Tensor  # (B,) int64: row in the list of cases of the data module, of the case that was read
    broken: Tensor  # (B, 4) int64: rows drawn before it that could not be read (data.on_broken quarantine), else -1
    regions: NotRequired[Tensor]  # (B, 1, [D,] H, W) int32 region numbers, 0 = none; with data.regions true


class LabelledBatch(TypedDict, total=False):
    """What the downstream data module delivers: intensities already in the model's range."""

    image: Tensor  # (B, C, [D,] H, W) float32
    foreground: Tensor  # (B, 1, [D,] H, W) bool
    label: Tensor  # (B, 1, [D,] H, W) int64, segmentation
    target: Tensor  # (B,) int64, classification
    spacing_mm: Tensor  # (B, d) float32
    case: Tensor  # (B,) int64


class Features(NamedTuple):
    """What every backbone returns for a volume (B, C, D, H, W) or frames (B, C, H, W)."""

    cls: Tensor  # (B, E); a backbone without [CLS] pools its tokens
    tokens: Tensor  # (B, N, E), N in raster order of grid
    grid: Size
    levels: list[Tensor]  # intermediate maps (B, E_i, [D_i,] H_i, W_i) for decoders, shallow to deep; may be empty


class LossTerms(NamedTuple):
    """What a recipe's loss returns: the weighted sum, and each term before its weight, for the log."""

    total: Tensor  # ()
    terms: dict[str, Tensor]  # name -> ()
    shared: tuple[Tensor, ...] = ()  # normed outputs of the student's encoder that terms read; for gradient norms


class Observations(TypedDict, total=False):
    """Detached tensors of the last training step that callbacks may look at; a recipe fills what it has."""

    teacher_cls: Tensor  # (Q, K) teacher probabilities of the [CLS] of global views
    student_cls: Tensor  # (Q, K) student logits divided by their temperature, paired as in the loss
    teacher_patch: Tensor  # (M, K) teacher probabilities of masked foreground tokens
    student_patch: Tensor  # (M, K) student logits divided by their temperature
    cls_features: Tensor  # (Q, E) teacher [CLS] before the head
    patch_features: Tensor  # (M, E) teacher tokens before the head
    centre_norm_cls: Tensor  # ()
    centre_norm_patch: Tensor  # ()
    scalars: dict[str, Tensor]  # method-specific figures of docs/method.md (c), each ()


class ViewPanel(TypedDict, total=False):
    """One sample's views for a picture, all float32 in the model's range unless said otherwise."""

    globals: Tensor  # (2, [D,] H, W) inputs after appearance augmentation; clean where the student does not see it
    clean: Tensor  # (2, [D,] H, W) clean global views
    locals: Tensor  # (L, [d,] h, w)
    core: Tensor  # (2, [D,] H, W) what both global views share, corrupted and clean
    edges: Tensor  # (2, [D,] H, W) in [0, 1]
    boundaries: Tensor  # (2, [D,] H, W) in [0, 1], of regions, where these matter and edges do not
    mask: Tensor  # (2, *grid) bool
    unseen: Tensor  # (2,) bool: global views that are not shown to the student at all; none where this is missing
    reconstruction: Tensor  # (2, [D,] H, W) prediction where masked, clean elsewhere
    overlap_box: Tensor  # (2, d, 2) float: overlap in voxels of each global view, [start, end) per axis
    true_box: Tensor  # (V, 3, 2) float: a place in voxels of each picture that the module is to find, [start, end)
    predicted_box: Tensor  # (V, 3, 2) float: where it believes that place to be
    origin: Tensor  # (V, 3) float: where the vectors to the middles of both boxes start
    attention: Tensor  # (2, heads, *grid) teacher attention of [CLS], last block


@runtime_checkable
class HasBackbone(Protocol):
    """A module whose encoder can be exported and probed."""

    @property
    def backbone(self) -> nn.Module:
        """Return the encoder to keep: the teacher's where there is one."""
        ...


@runtime_checkable
class TeacherStudent(Protocol):
    """A module with a momentum teacher. ``student`` and ``teacher`` hold the same parameter names."""

    student: nn.Module
    teacher: nn.Module

    def update_teacher(self, momentum: float) -> None:
        """Move every teacher parameter to ``momentum * teacher + (1 - momentum) * student``; copy buffers."""
        ...


@runtime_checkable
class SavesOnRequest(Protocol):
    """A checkpoint callback that saves a step as the newest of the run when it is asked to, on every rank."""

    def save_before_next(self, trainer: Trainer) -> None:
        """At the end of a step: save it before the next begins, after its validation."""
        ...

    def save(self, trainer: Trainer) -> None:
        """Save the step just done now."""
        ...


@runtime_checkable
class Interruptible(Protocol):
    """A logger that can be told that its run stops here and goes on later."""

    def interrupt(self) -> None:
        """Send what there is."""
        ...


@runtime_checkable
class GradientMeasured(Protocol):
    """A module that measures the gradient of each loss term in those training steps in which it is told to."""

    measure_gradients: bool


@runtime_checkable
class MaskScheduled(Protocol):
    """A module whose share of hidden tokens is drawn uniformly from ``mask_ratio`` = (low, high)."""

    mask_ratio: tuple[float, float]


@runtime_checkable
class Observable(Protocol):
    """A module that leaves its last step's outputs for monitors and pictures."""

    observations: Observations | None

    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last training batch."""
        ...


@runtime_checkable
class StepJudged(Protocol):
    """A module that withholds optimiser steps whose loss or gradient is not finite."""

    loss_names: tuple[str, ...]  # of the last micro-batch, the total first
    step_figures: Tensor | None  # of the last optimiser step, see agssd.models.step_guard.StepGuard.judge
    parents: list[ParentBatch] | None  # micro-batches of the step under way as the loader gave them; None keeps none


@runtime_checkable
class Easeable(Protocol):
    """A module whose scheduled numbers can be lowered for good; the factors are part of its checkpoints."""

    eased: dict[str, float]  # factors of "lr" and of the teacher's "temperature", 1 at first

    def can_ease(self) -> tuple[str, ...]:
        """Return the keys of ``eased`` that have an effect, at least one."""
        ...
