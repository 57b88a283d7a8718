"""Say what a run will need: parameters, FLOPs, memory, time, cost, traffic; agssd plan --config X as for fit.

The model is built on the meta device and two optimiser steps are taken on fake tensors, so nothing of the run's size is
needed on the machine that plans. Every figure rests on assumptions that are printed below it.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agssd.commands import Fit
    from agssd.commands.plan.forecast import Forecast
    from agssd.commands.plan.measure import Measured
    from agssd.commands.plan.rehearsal import Step
    from agssd.commands.plan.scaling import Row

TAKES_FIT = True
_NO_CACHE = "no-cache-for-this-plan"
_CROPS = 64  # of the stream, whose compressed sizes are averaged
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agssd plan``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="to plan for (default: what the trainer would take)")
    parser.add_argument("--memory-gib", type=float, help="memory of one device (default: of the one that is here)")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of it that is kept free (default: 0.1)")
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="take real steps here, compare, and derive the speed (default: where the device is a GPU that is here)",
    )
    parser.add_argument("--tflops", type=float, help="TFLOP/s that one device sustains, from which to derive the speed")
    parser.add_argument("--link-gb-s", type=float, help="GB/s that each GPU sends (default: communication is free)")
    parser.add_argument("--price-per-gpu-hour", type=float, help="in any currency")
    parser.add_argument("--rehearse", type=int, help=argparse.SUPPRESS)  # samples: only measure, in this process


def run(arguments: argparse.Namespace) -> int:
    """Print the plan and return the exit code.

    Raises:
        ValueError: for options out of range, and for what a plan does not know.
    """
    _check(arguments)
    import torch

    fit, with_cache = _parse(arguments)
    device = arguments.device or _device_of(fit.settings.trainer.accelerator)
    if device == "cuda" and (arguments.measure or arguments.rehearse) and not torch.cuda.is_available():
        raise ValueError("--measure for cuda needs a GPU, and torch sees none here; give --device cpu, or --tflops")
    step = _step(fit, device)
    if arguments.rehearse:
        print(json.dumps(_rehearse(fit, step, arguments.rehearse, device)._asdict()))
        return 0
    _Plan(arguments, fit, step, device, with_cache).show()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("memory_gib", "tflops", "link_gb_s", "price_per_gpu_hour", "rehearse"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give a number above 0")
    if not 0 <= arguments.reserve < 1:
        raise ValueError(f"--reserve is {arguments.reserve}; give a share from 0 up to, and without, 1")
    if arguments.measure and arguments.tflops:
        raise ValueError("--measure and --tflops both state the speed; give one of them")


def _parse(arguments: argparse.Namespace) -> tuple[Fit, bool]:
    """Return the parsed command line of ``fit``, and whether it names a cache."""
    try:
        return arguments.fit(), True
    except argparse.ArgumentError as error:
        if "the following arguments are required: cache" not in str(error):
            raise
        return arguments.fit("--data.cache", _NO_CACHE), False


def _device_of(accelerator: Any) -> str:
    import torch

    if accelerator in ("cpu", "gpu", "cuda"):
        return "cpu" if accelerator == "cpu" else "cuda"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _step(fit: Fit, device: str) -> Step:
    from agssd.callbacks.mask_ratio import MaskRatioSchedule
    from agssd.commands.plan.rehearsal import AT, Step, autocast_of

    trainer, ratio = fit.settings.trainer, fit.settings.mask_ratio
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps is {trainer.max_steps}; a plan needs the length of the run")
    schedule = MaskRatioSchedule(ratio.kind, ratio.start, ratio.end)
    hidden = None if schedule.kind == "own" else schedule.ratio(AT)
    clip = float(trainer.gradient_clip_val or 0)
    accumulate = int(trainer.accumulate_grad_batches)
    return Step(autocast_of(trainer.precision), accumulate, clip, trainer.max_steps, hidden, device == "cuda")


def _pretraining(fit: Fit) -> Any:
    """Return the model.

    Raises:
        ValueError: if it is no pretraining recipe.
    """
    from agssd.methods.base import PretrainModule

    if not isinstance(fit.model, PretrainModule):
        raise ValueError(f"agssd plan knows pretraining recipes; {type(fit.model).__name__} is none")
    return fit.model


def _rehearse(fit: Fit, step: Step, batch: int, device: str) -> Measured:
    from agssd.commands.plan.measure import measure_here
    from agssd.commands.plan.rehearsal import parent_batch

    def build() -> Any:
        fit.build()
        model, fit.model = _pretraining(fit), None
        return model

    channels = build().student["backbone"].in_channels
    parents = parent_batch(batch, channels, fit.datamodule.parent_vox, fit.datamodule.regions)
    return measure_here(build, step, parents, device)


class _Plan:
    """Figures and the assumptions that they rest on, printed in turn."""

    def __init__(self, arguments: argparse.Namespace, fit: Fit, step: Step, device: str, with_cache: bool) -> None:
        from agssd.commands.plan.forecast import Forecast
        from agssd.commands.plan.ledger import without_weights
        from agssd.sharding import refuse_other_sharding

        self.arguments, self.fit, self.step, self.device, self.with_cache = arguments, fit, step, device, with_cache
        with without_weights():
            fit.build()
        self.model = _pretraining(fit)
        self.data = fit.datamodule
        self.channels = self.model.student["backbone"].in_channels
        self.batch = self._micro_batch()
        self.assumptions: list[str] = []
        strategy = fit.settings.trainer.strategy
        self.strategy = strategy if isinstance(strategy, str) else strategy.class_path
        refuse_other_sharding(self.strategy)
        self.sharded = self.strategy.rpartition(".")[2] == "ShardedStrategy"
        self.forecast: Forecast = Forecast(self.model, step, self.channels, self.data.parent_vox, self.data.regions)

    def _devices(self) -> int:
        """Return how many devices the command line names, all machines together."""
        import torch

        trainer = self.fit.settings.trainer
        devices = trainer.devices
        if isinstance(devices, str) and devices.strip("-").isdigit():
            devices = int(devices)
        if devices in ("auto", -1):
            devices = max(torch.cuda.device_count(), 1) if self.device == "cuda" else 1
        return (len(devices) if isinstance(devices, list) else int(devices)) * int(trainer.num_nodes)

    def _micro_batch(self) -> int:
        from agssd.data_modules.sampling import micro_batch_size

        return micro_batch_size(self.data.global_batch_size, self._devices(), self.step.accumulate)

    def show(self) -> None:
        """Print everything."""
        self._parameters()
        flops = self.forecast.flops(self.batch)
        print(f"\nFLOPs per sample, forward and backward: {flops / 1e9:.2f} GFLOP")
        self.assumptions.append(
            "FLOPs count matrix products, convolutions and attention of encoders, heads and losses, a multiply-add as "
            "two; making views and the optimiser's step are not among them"
        )
        peak = self._memory()
        measured = self._measured(self.forecast.memory(self.batch).total() if self.sharded else peak)
        largest = self._largest(peak)
        self._scaling(flops, largest, measured)
        print("\nassumptions")
        for line in self.assumptions:
            print(f"- {line}")

    def _parameters(self) -> None:
        def count(module: Any) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        print(f"{type(self.model).__name__}, {self.batch} sample(s) per micro-batch\n\nparameters")
        for name, child in self.model.student.items():
            print(f"  student, {name:<18} {count(child):>14,}")
        if self.model.has_teacher:
            print(f"  {'teacher':<27} {count(self.model.teacher):>14,}")
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        print(f"  {'trained, all together':<27} {trained:>14,}")

    def _memory(self) -> int:
        from agssd.commands.plan.forecast import PARTS

        spread_over = self._devices() if self.sharded else None
        peak = self.forecast.memory(self.batch, spread_over)
        place = "" if spread_over is None else f", one of {spread_over} devices"
        print(f"\nmemory at the peak of a step, {self.batch} sample(s) per micro-batch{place}")
        for part in PARTS:
            if peak[part]:
                print(f"  {part:<27} {peak[part] / 2**20:>10.1f} MiB")
        total = peak.total()
        buckets = self._bucket_bytes()
        if buckets:
            print(f"  {'DDP buckets':<27} {buckets / 2**20:>10.1f} MiB")
        print(f"  {'together':<27} {(total + buckets) / 2**20:>10.1f} MiB")
        self.assumptions += [
            f"memory is that of a step at 90 % of the run in which gradient norms are measured, {self._precision()}; "
            "tensors that are alive together count, what a kernel takes for itself and fragmentation do not",
            "operations are those of a CPU, whatever the device"
            + (", with the optimiser's foreach form as on CUDA" if self.step.foreach else ""),
            "views are made from synthetic crops of 1 and 2 samples; any other batch is a straight line through both",
        ]
        if spread_over is not None:
            self.assumptions.append(
                "FSDP2 holds weights, teacher, gradients and moments in equal parts, and whole: what is not a block of "
                "the encoder, with its gradients, and of the largest block the weights, the gradients and the next one"
            )
        if self.forecast.guessed:
            self.assumptions.append(f"{self.forecast.guessed} numbers that depend on the data were taken as 1")
        if self.model.compile_encoder:
            self.assumptions.append("compiled encoders are planned as if they were not compiled")
        return total

    def _precision(self) -> str:
        return (
            "in full precision"
            if self.step.autocast is None
            else f"with autocast to {self.step.autocast}".replace("torch.", "")
        )

    def _bucket_bytes(self) -> int:
        """Return what DDP copies gradients into, unless they are views of its buckets."""
        strategy, name = self.fit.settings.trainer.strategy, self.strategy
        if "ddp" not in name.lower():
            if name not in ("auto", "single_device") and not self.sharded:
                self.assumptions.append(f"trainer.strategy {name} is planned as DDP, every device holding everything")
            return 0
        if self._devices() == 1:
            return 0
        as_view = not isinstance(strategy, str) and strategy.init_args.get("gradient_as_bucket_view", False)
        return 0 if as_view else self._gradient_bytes()

    def _gathered_bytes(self) -> int:
        """Return what FSDP2 gathers per micro-batch: the student in both passes, the teacher in one."""
        return self._gradient_bytes() + sum(int(p.numel() * p.element_size()) for p in self.model.parameters())

    def _traffic(self) -> str:
        of_losses = "what recipes gather for their losses is not counted"
        if not self.sharded:
            return (
                "DDP over a ring: every GPU sends 2 (n - 1) / n times its gradients per step, in their own precision, "
                f"and buffers once; {of_losses}"
            )
        return (
            "FSDP2 over a ring: every GPU sends (n - 1) / n times, per micro-batch, the student's weights twice, the "
            f"teacher's once and the gradients once, in full precision; {of_losses}"
        )

    def _gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def _measured(self, peak: int) -> Measured | None:
        import torch

        wanted = self.arguments.measure
        by_itself = wanted is None and self.device == "cuda" and torch.cuda.is_available() and not self.arguments.tflops
        if not wanted and not by_itself:
            self.assumptions.append("memory was not checked against a real step (--measure)")
            return None
        from agssd.commands.plan.measure import measure_in_child

        of_fit = [*self.arguments.of_fit, *([] if self.with_cache else ["--data.cache", _NO_CACHE])]
        try:
            measured = measure_in_child(of_fit, self.batch, self.device)
        except ValueError as error:
            if not by_itself:
                raise
            print(f"measured: {error}")  # a batch that does not fit here is no failure of the plan
            self.assumptions.append("memory was not checked against a real step, which failed")
            return None
        print(
            f"measured: {measured.bytes / 2**20:.1f} MiB at the peak, "
            f"planned {100 * (peak / measured.bytes - 1):+.1f} %; {measured.seconds:.3f} s per micro-batch"
        )
        self.assumptions.append(
            "measured with synthetic crops, reading excluded, on this machine"
            + (", one device that holds everything, as did the plan it is held to: " if self.sharded else ": ")
            + ("resident memory above what libraries hold" if self.device == "cpu" else "torch's allocated memory")
        )
        return measured

    def _largest(self, peak: int) -> dict[int, int] | None:
        import torch

        gib = self.arguments.memory_gib
        if gib is None and self.device == "cuda" and torch.cuda.is_available():
            gib = torch.cuda.get_device_properties(0).total_memory / _GIB
        if gib is None:
            self.assumptions.append("every micro-batch is taken to fit (--memory-gib was not given)")
            return None
        from agssd.commands.plan.scaling import GPUS

        budget = gib * _GIB * (1 - self.arguments.reserve) - self._bucket_bytes()
        if self.sharded:
            largest = {gpus: self.forecast.largest(budget, {}, gpus) for gpus in GPUS}
            told = ", ".join(f"{size} on {gpus}" for gpus, size in largest.items())
            print(f"\nlargest micro-batch in {gib:.4g} GiB, by the number of GPUs: {told}")
        else:
            largest = dict.fromkeys(GPUS, self.forecast.largest(budget, {self.batch: peak}))
            print(f"\nlargest micro-batch in {gib:.4g} GiB: {largest[1]} sample(s)")
        self.assumptions.append(
            f"{100 * self.arguments.reserve:.0f} % of the device's memory are kept free (--reserve) for the libraries' "
            "own, communication and fragmentation"
        )
        return largest

    # ----------------------------------------------------------------- time

    def _scaling(self, flops: float, largest: dict[int, int] | None, measured: Measured | None) -> None:
        from agssd.commands.plan.scaling import GPUS, Run, row

        seconds = None
        if measured is not None:
            seconds = measured.seconds / self.batch
            self.assumptions.append("time per sample is the measured one, whatever the size of the micro-batch")
        elif self.arguments.tflops:
            seconds = flops / (self.arguments.tflops * 1e12)
            self.assumptions.append(
                f"a device sustains {self.arguments.tflops} TFLOP/s (--tflops), and nothing else takes time"
            )
        link = self.arguments.link_gb_s
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers())
        plan = Run(
            self.step.max_steps,
            self.data.global_batch_size,
            largest,
            seconds,
            self._gradient_bytes(),
            buffers,
            None if link is None else link * 1e9,
            self._bytes_per_sample(),
            self._gathered_bytes() if self.sharded else None,
        )
        print(f"\n{self.step.max_steps:,} steps of {self.data.global_batch_size} samples on")
        print(
            "  GPUs  micro-batch x accumulated  sent per GPU and step  samples/s     hours  GPU-hours       cost"
            "   disk MB/s"
        )
        for gpus in GPUS:
            self._line(row(plan, gpus))
        if seconds is None:
            self.assumptions.append("the speed is not known: give --measure on such a device, or --tflops")
        self.assumptions += [
            self._traffic(),
            "communication takes no time (--link-gb-s was not given)"
            if link is None
            else f"each GPU sends {link} GB/s (--link-gb-s), and nothing of it hides behind the backward pass",
            "the global batch is the same on every number of GPUs, as agssd keeps it; no GPU waits for the disk",
        ]

    def _line(self, found: Row) -> None:
        if found.refused:
            print(f"  {found.gpus:>4}  {found.refused}")
            return
        price = self.arguments.price_per_gpu_hour
        cost = None if price is None or found.gpu_hours is None else price * found.gpu_hours
        read = None if found.read_bytes_per_s is None else found.read_bytes_per_s / 1e6
        cut = f"{found.micro_batch} x {found.accumulate}"
        print(
            f"  {found.gpus:>4}  {cut:>25}  {found.sent_bytes / 1e6:>18.1f} MB  {_number(found.samples_per_s):>9}  "
            f"{_number(found.hours):>8}  {_number(found.gpu_hours):>9}  {_number(cost):>9}  {_number(read):>10}"
        )

    def _bytes_per_sample(self) -> float:
        voxels = math.prod(self.data.parent_vox)
        if not self.with_cache:
            self.assumptions.append("no cache is named: a parent crop is read uncompressed, int16 and its foreground")
            return float(voxels * (2 * self.channels + 1))
        self.data.setup("validate")  # opens the index; "fit" would ask for a trainer
        crops = self.data.train_crops
        mean: float = sum(crops.stored_bytes(sample) for sample in range(_CROPS)) / _CROPS
        whole = sum(cache.size_bytes() for cache in self.data.caches)
        self.assumptions.append(
            f"a parent crop reads {mean / 1e6:.3f} MB of compressed chunks, the mean of the first {_CROPS} samples of "
            f"the stream; the cache has {whole / 1e9:.2f} GB, and what memory still holds of it is not read again"
        )
        return mean


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
