"""What every pretraining recipe shares: optimiser, schedules as shares of the run, teacher, log, checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from agssd.distributed import all_sum, world_size
from agssd.models.backbone import Backbone
from agssd.models.ema import update_ema
from agssd.models.step_guard import StepGuard
from agssd.schedules import cosine, warmup_cosine
from agssd.sharding import is_sharded, refuse_other_sharding, shard
from agssd.transforms.edges import standardise
from agssd.transforms.keyed_random import KeyedRandom, drop_path_noise
from agssd.transforms.masking import TEACHER_SCORES, MaskSampler
from agssd.transforms.views import NO_REGIONS
from agssd.types import LossTerms, ParentBatch

_STEPS = ("training_step", "validation_step", "total_loss")


class PretrainModule(L.LightningModule, ABC):
    """A recipe: views from parent crops, a loss on views, an encoder.

    A recipe fills ``student`` (with ``"backbone"``), calls :meth:`build_teacher` if it distils and :meth:`hide_by` if
    it hides patches, and implements :meth:`make_views` and :meth:`pretrain_loss`. Learning rate and weight decay are
    set before every optimiser step as pure functions of the share of the run that is done, so nothing but the step
    number is needed to resume them.

    Args:
        lr: peak learning rate of AdamW, as it is used (no scaling behind the scenes).
        min_lr: last learning rate.
        warmup: share of the run over which the learning rate rises from 0.
        weight_decay: first and last weight decay (cosine); none on biases, norms, tokens and other 1-D parameters.
        betas: of AdamW.
        freeze_last_layer: share of the run during which prototypes get no update at all.
        seed: of views, masks and appearance; every draw is a function of (seed, sample).
        compile: compile the blocks of student and teacher encoder before a fit; names in checkpoints do not change.
    """

    student: nn.ModuleDict
    teacher: nn.ModuleDict  # only where build_teacher was called
    masks: MaskSampler  # only where hide_by was called
    mask_ratio: tuple[float, float]  # likewise, set before it
    last_layers: tuple[nn.Parameter, ...] = ()
    needs_regions: bool = False  # whether batches must have region maps
    weights: Mapping[str, float] = MappingProxyType({})  # of the loss terms; 1 where a term has none
    measure_gradients: bool = False
    gradient_norms: dict[str, Tensor]  # of the last training step that was told to measure them, else empty
    loss_names: tuple[str, ...] = ()  # of the last micro-batch, "loss" first
    step_figures: Tensor | None = None  # of the last optimiser step; see StepGuard.judge
    parents: list[Any] | None = None  # batches of the step under way as the loader gave them; None keeps none
    fixed_progress: float | None = None  # share of the run to compute at, whatever the trainer says
    guard: StepGuard  # judges every optimiser step; another may take its place before a fit
    eased: dict[str, float]  # factors of scheduled numbers, "lr" and "temperature", 1 unless a rollback lowered them

    def __init__(
        self,
        lr: float,
        min_lr: float,
        warmup: float,
        weight_decay: tuple[float, float],
        betas: tuple[float, float],
        freeze_last_layer: float,
        seed: int,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self._method = f"{type(self).__module__}.{type(self).__qualname__}"  # FSDP2 will change the class
        self.lr = lr
        self.min_lr = min_lr
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.betas = betas
        self.freeze_last_layer = freeze_last_layer
        self.seed = seed
        self.compile_encoder = compile
        self.gradient_norms = {}
        self.eased = {"lr": 1.0, "temperature": 1.0}
        self.guard = StepGuard()

    @abstractmethod
    def make_views(self, batch: ParentBatch) -> Any:
        """Return the recipe's views of a batch of parent crops, on the device, without gradient."""

    @abstractmethod
    def pretrain_loss(self, views: Any) -> LossTerms:
        """Return the loss of one micro-batch; a mean over its samples."""

    def total_loss(self, views: Any) -> Tensor:
        """Return the total of :meth:`pretrain_loss`, also where weights lie in parts on several ranks."""
        return self.pretrain_loss(views).total

    def after_optimizer_step(self) -> None:
        """Do what happens once per optimiser step after the weights moved; recipes move their centres here."""

    def schedules(self, progress: float) -> dict[str, float]:
        """Return every scheduled number at a share of the run; recipes add their own."""
        return {
            "lr": warmup_cosine(progress, self.lr, self.min_lr, self.warmup),
            "weight_decay": cosine(progress, *self.weight_decay),
        }

    def scheduled(self, progress: float) -> dict[str, float]:
        """Return :meth:`schedules` as it is used: times what a rollback has lowered.

        ``eased["lr"]`` goes to the learning rate, ``eased["temperature"]`` to everything that is called
        ``temperature_*``, which are the teacher's.
        """
        values = self.schedules(progress)
        factors = {name: self.eased["temperature"] for name in values if name.startswith("temperature_")}
        factors["lr"] = self.eased["lr"]
        return values | {name: factor * values[name] for name, factor in factors.items()}

    def can_ease(self) -> tuple[str, ...]:
        """Return what a rollback can lower: ``"temperature"`` where the teacher has one, and ``"lr"``."""
        has_temperature = any(name.startswith("temperature_") for name in self.schedules(0.0))
        return ("temperature", "lr") if has_temperature else ("lr",)

    @property
    def couples_samples(self) -> tuple[str, ...]:
        """What lets samples of a micro-batch meet in the loss, so that accumulation changes the result; mostly none.

        Ranks change nothing even then: what couples samples gathers over them.
        """
        return ()

    def drop_noise(self, sample: Tensor, *num_views: int) -> list[Tensor | None]:
        """Return the student's draws for stochastic depth per group of views, keyed by sample; none outside training.

        Args:
            sample: (B,) int64.
            num_views: views per sample of each group.
        """
        if not self.training:
            return [None] * len(num_views)
        return drop_path_noise(self.seed, sample, cast(Backbone, self.student["backbone"]).depth, num_views)

    # ------------------------------------------------------------ teacher

    def build_teacher(self) -> None:
        """Make the teacher an equal copy of the student, heads included, without gradients and in eval mode."""
        self.teacher = deepcopy(self.student)
        self.teacher.requires_grad_(False)
        self.teacher.eval()

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher to ``momentum * teacher + (1 - momentum) * student``; called once per optimiser step.

        After a step that was withheld, being not finite, it stays.
        """
        withheld = self.guard.withheld
        if withheld is not None and self.guard.on_device:
            update_ema(self.student, self.teacher, momentum, unless=withheld)
        elif withheld is None or not withheld:
            update_ema(self.student, self.teacher, momentum)

    def train(self, mode: bool = True) -> PretrainModule:
        """Set train mode, but leave the teacher in eval mode."""
        super().train(mode)
        if self.has_teacher:
            self.teacher.eval()
        return self

    @property
    def backbone(self) -> Backbone:
        """The encoder that is kept: the teacher's, else the student's."""
        return cast(Backbone, (self.teacher if self.has_teacher else self.student)["backbone"])

    @property
    def has_teacher(self) -> bool:
        """Whether :meth:`build_teacher` was called."""
        return "teacher" in self._modules

    # -------------------------------------------------------------- masks

    def hide_by(self, masks: MaskSampler) -> None:
        """Hide patches as ``masks`` says; called after ``student`` and teacher are built and ``mask_ratio`` is set.

        A score of the teacher gives a recipe without one a momentum teacher, which is then what is exported.

        Raises:
            ValueError: if ``mask_ratio`` is no range of shares, or the score is the attention of [CLS] and the encoder
                has none.
        """
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio is ({low}, {high}); give two shares of hidden tokens, 0 < low <= high < 1")
        self.masks = masks
        self.needs_regions = self.needs_regions or masks.score == "region"
        if masks.score not in TEACHER_SCORES:
            return
        distils = self.has_teacher
        if not distils:
            self.build_teacher()
        if masks.score == "attention":
            if not self.backbone.has_cls_attention:
                raise ValueError(
                    f"mask_score is attention, but this {type(self.backbone).__name__} has no [CLS] token; use a ViT "
                    "with class_token: true, or another mask_score, loss for one"
                )
            self.backbone.record_cls_attention = distils  # in the pass over whole views that it needs anyway

    @torch.no_grad()
    def teacher_scores(
        self,
        sample: Tensor,
        views: Tensor,
        body: Tensor,
        error: Callable[[Tensor, Tensor], Tensor],
        attention: Tensor | None = None,
    ) -> Tensor | None:
        """Return (V, N) float32 z-scores of what the teacher attends to or predicts badly; None for other scores.

        Args:
            sample: (B,) int64.
            views: (V, C, [D,] H, W), as many whole views of each sample, side by side.
            body: (V, N) bool, patches that hold body.
            error: the teacher's at hidden patches, see :meth:`MaskSampler.error_by_halves`; asked for ``"loss"``.
            attention: (V, heads, *grid) of the teacher's [CLS] to ``views``, if a pass has left it already.
        """
        if self.masks.score == "attention":
            seen = self.backbone.cls_attention(views) if attention is None else attention
            return standardise(seen.mean(1).flatten(1), body)
        if self.masks.score == "loss":
            keys = KeyedRandom(self.seed, sample, "halves").split(len(views) // len(sample))
            return standardise(self.masks.error_by_halves(KeyedRandom.from_keys(keys), error), body)
        return None

    # ---------------------------------------------------------- run length

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def progress(self) -> float:
        """Share of the run's optimiser steps that are done, in [0, 1]."""
        if self.fixed_progress is not None:
            return self.fixed_progress
        if self._trainer is None:
            return 0.0
        return min(self.trainer.global_step / self.total_steps, 1.0) if self.trainer.training else 1.0

    # ------------------------------------------------------ Lightning hooks

    def setup(self, stage: str) -> None:
        """Compile the encoders if asked to.

        Raises:
            ValueError: if the encoder cannot be compiled.
        """
        if stage != "fit" or not self.compile_encoder:
            return
        for encoder in self.encoders():
            encoder.compile_blocks()

    def configure_model(self) -> None:
        """Spread student and teacher alike over the ranks, where the strategy asks for it.

        Raises:
            ValueError: for a strategy that shards in another way.
        """
        refuse_other_sharding(None if self._trainer is None else self.trainer.strategy)
        if self._device_mesh is None or is_sharded(self):
            return
        if self.compile_encoder:
            raise ValueError("model.compile is true, which ShardedStrategy was never tried with; set it to false")
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        last_layers = [names[id(parameter)] for parameter in self.last_layers]
        parts = [part for encoder in self.encoders() for part in encoder.shardable_parts()]
        shard(self.to(torch.device(self._device_mesh.device_type)), parts, _STEPS, self._device_mesh["data_parallel"])
        self.last_layers = tuple(self.get_parameter(name) for name in last_layers)

    def encoders(self) -> list[Backbone]:
        """Return the student's encoder, and the teacher's where there is one."""
        networks = (self.student, self.teacher) if self.has_teacher else (self.student,)
        return [cast(Backbone, network["backbone"]) for network in networks]

    def on_fit_start(self) -> None:
        """Refuse a run whose teacher nobody moves, or that needs region maps and would not get them.

        Raises:
            ValueError: if the module has a teacher and no callback updates it, or needs regions and the data has none.
        """
        balanced = getattr(getattr(self, "views", None), "centres", "uniform") == "regions"
        given = getattr(getattr(self.trainer, "datamodule", None), "regions", True)
        if (self.needs_regions or balanced) and not given:
            raise ValueError(f"{type(self).__name__}: {NO_REGIONS}")
        callbacks = cast(Any, self.trainer).callbacks  # Lightning declares the attribute nowhere
        if self.has_teacher and not any(getattr(callback, "updates_teacher", False) for callback in callbacks):
            raise ValueError(
                f"{type(self).__name__} has a teacher, but no callback moves it; add "
                "agssd.callbacks.ema_teacher.EMATeacher to the trainer's callbacks"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with two groups: parameters that decay, and biases, norms, tokens and 1-D ones that do not.

        On CUDA in its fused form, which can leave out a step without the host knowing (see StepGuard). Gradients are
        unscaled before it, so it is said not to do so itself: Lightning would refuse to clip them. Not on the CPU:
        there, with it, a run that was rolled back equalled one that was resumed no longer to the last bit (torch 2.13).
        """
        encoder = cast(Backbone, self.student["backbone"])
        kept_out = {f"backbone.{name}" for name in encoder.no_weight_decay()}
        decays: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                (others if parameter.ndim < 2 or name in kept_out else decays).append(parameter)
        groups = [{"params": decays, "weight_decay": self.weight_decay[0]}, {"params": others, "weight_decay": 0.0}]
        fused = all(p.device.type == "cuda" for p in (*decays, *others))
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=fused or None)
        if fused:
            optimizer._step_supports_amp_scaling = False
        return optimizer

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, and keep it as the loader gave it where somebody wants to look at it later."""
        if self.parents is not None and self.trainer.training:
            self.parents.append(batch)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn a batch of parent crops into views, in full precision."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.make_views(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch and log the terms of the step, averaged over micro-batches and ranks."""
        loss = self.pretrain_loss(batch)
        with torch.autocast(self.device.type, enabled=False):  # a norm, not a step: in full precision
            self.gradient_norms = gradient_norms(loss, self.weights) if self.measure_gradients else {}
        self._log_terms("train", self.guard.observe(loss.total, self._over_ranks(loss)))
        self.log_dict({f"schedule/{name}": value for name, value in self._scheduled_now().items()})
        return loss.total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the same terms on fixed crops of the validation split; nothing is updated."""
        self._log_terms("val", self._over_ranks(self.pretrain_loss(batch)))

    def _scheduled_now(self) -> dict[str, float]:
        """Return the numbers of the step under way; learning rate and weight decay belong to its end."""
        at_end = self.scheduled(min((self.trainer.global_step + 1) / self.total_steps, 1.0))
        return self.scheduled(self.progress) | {name: at_end[name] for name in ("lr", "weight_decay")}

    def _over_ranks(self, loss: LossTerms) -> Tensor:
        """Return the total loss and its terms, averaged over ranks, as (1 + terms,) float32."""
        self.loss_names = ("loss", *(f"loss_{name}" for name in loss.terms))
        return all_sum(torch.stack([loss.total, *loss.terms.values()]).detach().float()) / world_size()

    def _log_terms(self, stage: str, values: Tensor) -> None:
        figures = {f"{stage}/{name}": value for name, value in zip(self.loss_names, values.unbind(), strict=True)}
        self.log_dict(figures, prog_bar=stage == "train", on_step=stage == "train", on_epoch=stage == "val")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set learning rate and weight decay of this step; keep frozen prototypes out of it altogether.

        A step whose loss or gradient is not finite is withheld on every rank alike; schedules go on.
        """
        values = self._scheduled_now()  # taken at the step's end, so that the first step has a rate above 0
        for group, decay in zip(optimizer.param_groups, (values["weight_decay"], 0.0), strict=True):
            group["lr"] = values["lr"]
            group["weight_decay"] = decay
        if self.progress < self.freeze_last_layer:
            for parameter in self.last_layers:
                parameter.grad = None  # a zero gradient would still decay the weights
        self.step_figures = self.guard.judge(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that the guard has just judged; whatever else a trainer asks for, Lightning does."""
        by_norm = gradient_clip_algorithm in (None, "norm") and _clips_by_whole_norm(self.trainer.precision_plugin)
        clipped = by_norm and (gradient_clip_val or 0) > 0 and self.guard.clip(cast(float, gradient_clip_val))
        self.guard.forget()
        if not clipped:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, then do what happens once per step, unless it was withheld."""
        super().optimizer_step(*args, **kwargs)
        with self.guard.keeping(self):
            self.after_optimizer_step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what ``agssd export`` needs, in plain types."""
        data = getattr(self._trainer, "datamodule", None)
        contract, seen = getattr(data, "contract", None), getattr(data, "seen", None)
        checkpoint["agssd"] = {
            "method": self._method,
            "backbone": self.backbone.config,
            "state_prefix": f"{'teacher' if self.has_teacher else 'student'}.backbone.",
            "contract": contract if contract is None or seen is None else contract | {"seen": seen},
            "eased": dict(self.eased),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what a rollback has lowered, and the optimiser's form of this device."""
        self.eased |= checkpoint.get("agssd", {}).get("eased", {})
        fused = self._trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                group["fused"] = fused or None


def _clips_by_whole_norm(precision: Precision) -> bool:
    """Return whether a plugin clips as torch does, and not by a rule of its own as for sharded gradients."""
    return type(precision).clip_grad_by_norm is Precision.clip_grad_by_norm


def gradient_norms(loss: LossTerms, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the norm of each weighted term's gradient at the encoder's normed output, behind the last shared block.

    Keys are ``grad_norm_<term>`` for terms of weight above 0. Where the largest is more than 10 times the smallest, one
    term decides alone where the encoder goes. Taken at activations and not at weights, so that no block is run
    backwards for it, compiled or not. Empty if the recipe names no shared output.

    Source: docs/method.md (c).
    """
    figures: dict[str, Tensor] = {}
    for name, term in loss.terms.items():
        weight = weights.get(name, 1.0)
        if weight == 0 or not loss.shared or not term.requires_grad:
            continue
        parts = torch.autograd.grad(weight * term, loss.shared, retain_graph=True, allow_unused=True)
        squares = [part.float().square().sum() for part in parts if part is not None]
        if squares:
            figures[f"grad_norm_{name}"] = torch.stack(squares).sum().sqrt()
    return figures
