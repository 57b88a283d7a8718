"""The checks before a run, one small function each to measure and one to judge."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from agssd.commands._forecast import bytes_text
from agssd.commands.check.table import Check, Finding, Place, Told, of_rank
from agssd.distributed import alone

SECONDS_TO_SAVE = 60.0  # within which a run that is told to stop writes its checkpoint
MAX_SKEW_S = 2.0
SHARED_MEMORY = Path("/dev/shm")
_TRIAL_BYTES = 64 * 2**20
_TENSORS_PER_BATCH = 14  # of a ParentBatch with regions; each travels from a worker as a file handle
_OTHER_HANDLES = 256  # libraries, logs, sockets


def asked_devices(settings: Any) -> int | None:
    """Return the devices per node that ``trainer.devices`` asks for; None for as many as there are."""
    devices = settings.trainer.devices
    if devices in ("auto", -1, "-1"):
        return None
    if isinstance(devices, list):
        return len(devices)
    return len(devices.split(",")) if isinstance(devices, str) and "," in devices else int(devices)


def devices(settings: Any) -> Finding:
    """Compare the devices and processes that the configuration asks for with those that are here; before all else."""
    asked, trainer = asked_devices(settings), settings.trainer
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    visible = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    kind = "GPU(s)" if on_gpu else "processor(s)"
    value = f"{visible} {kind} visible, {'all' if asked is None else asked} asked for"
    if on_gpu and (visible < (asked or 1)):
        return Finding(
            value,
            value,
            f"ask the scheduler for {asked or 1} per node (SLURM: --gpus-per-node, not --gpus-per-task), free "
            "CUDA_VISIBLE_DEVICES, or set trainer.devices to what there is",
        )
    started, by = _started_processes()
    if asked is not None and started is not None and started != asked * trainer.num_nodes:
        return Finding(
            value,
            f"{by} started {started} process(es), trainer.devices {asked} x trainer.num_nodes {trainer.num_nodes} "
            f"want {asked * trainer.num_nodes}",
            "start one process per device (SLURM: --ntasks-per-node, torchrun: --nproc-per-node), or change "
            "trainer.devices and trainer.num_nodes",
        )
    if by == "srun" and (started or 1) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        return Finding(value, "srun was given --ntasks, which Lightning refuses", "give --ntasks-per-node in its place")
    return Finding(value)


def _started_processes() -> tuple[int | None, str]:
    """Return how many processes a launcher has started, and its name; None where Lightning starts them."""
    if "TORCHELASTIC_RUN_ID" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "torchrun"
    if "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ:
        if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # as Lightning tells them apart
            return int(os.environ["SLURM_NTASKS"]), "srun"
    return None, ""


# ---------------------------------------------------------------- all-reduce


def reduce_all(place: Place) -> tuple[float, float, float] | None:
    """Return the sum over ranks of rank + 1 as all-reduce finds it, as it must be, and bytes per second each sent."""
    if place.world_size == 1:
        return None
    numbers = torch.full((_TRIAL_BYTES // 4 // (1 if place.device.type == "cuda" else 4),), 0.0, device=place.device)
    seconds = math.inf
    for _ in range(3):
        numbers.fill_(place.rank + 1)
        _wait(place)
        started = time.perf_counter()
        dist.all_reduce(numbers)
        _wait(place)
        seconds = min(seconds, time.perf_counter() - started)
    n = place.world_size
    worst = numbers[(numbers - n * (n + 1) / 2).abs().argmax()]
    return float(worst), n * (n + 1) / 2, 2 * (n - 1) / n * numbers.numel() * 4 / seconds


def _wait(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def judge_reduce(told: Sequence[Told]) -> Finding:
    """All ranks must have the right sum."""
    if len(told) == 1:
        return Finding("one process, nothing to reduce")
    for one in told:
        found, wanted, _ = one.value
        if found != wanted:
            problem = f"{of_rank(one, len(told))}the sum over ranks came out as {found:g} and must be {wanted:g}"
            return Finding("", problem, "a device or a link is faulty: leave this host out and report it")
    backend, slowest = dist.get_backend(), min(one.value[2] for one in told)
    return Finding(f"{len(told)} ranks over {backend}, {slowest / 1e9:.2f} GB/s sent by each")


# --------------------------------------------------------------------- cache


def look_at_cache(place: Place) -> str:
    """Set up the data, read one crop, and return what tells this cache from another: its index and file sizes."""
    place.data.setup("fit")
    place.data.train_crops[place.rank]
    digest = hashlib.sha256()
    for cache in place.data.caches:
        sizes = [path.stat().st_size for path in cache.files]
        cases = [(case.key, case.split, case.source_sha256) for case in cache.cases]
        digest.update(json.dumps([sizes, cases, list(cache.class_names)]).encode())
    return digest.hexdigest()[:16]


def judge_cache(told: Sequence[Told]) -> Finding:
    """All ranks must see the same cache."""
    other = next((one for one in told if one.value != told[0].value), None)
    if other is not None:
        problem = f"rank {other.rank} on {other.host} sees another cache ({other.value}) than rank 0 ({told[0].value})"
        return Finding("", problem, f"copy the cache to {other.host} again, or put it on a disk that all hosts share")
    return Finding(f"readable and identical on every rank ({told[0].value})")


def missing_filters(place: Place) -> list[str]:
    """Return the HDF5 filters of the caches' arrays that this process lacks."""
    import h5py
    import hdf5plugin  # noqa: F401  (registers the filters)

    missing = set()
    for path in {path for cache in place.data.caches for path in (cache.files[0], cache.files[-1])}:
        with h5py.File(path, "r", locking=False) as file:
            for case in list(file["cases"])[:1]:
                for data in file["cases"][case].values():
                    plist = data.id.get_create_plist()
                    wanted = [plist.get_filter(number) for number in range(plist.get_nfilters())]
                    missing |= {f"{one[0]} ({one[3].decode()})" for one in wanted if not h5py.h5z.filter_avail(one[0])}
    return sorted(missing)


def judge_filters(told: Sequence[Told]) -> Finding:
    """No rank may lack one."""
    for one in told:
        if one.value:
            return Finding("", f"{of_rank(one, len(told))}no HDF5 filter {', '.join(one.value)}", _FILTER_REMEDY)
    return Finding("every filter of the cache is there")


_FILTER_REMEDY = "install hdf5plugin into this environment, built for the HDF5 of its h5py, and unset HDF5_PLUGIN_PATH"


# ------------------------------------------------------------- run directory


def checkpoint_bytes(place: Place) -> int:
    """Return the size of a checkpoint: the module's state and two moments for every trained parameter."""
    state: int = sum(tensor.numel() * tensor.element_size() for tensor in place.model.state_dict().values())
    moments: int = sum(2 * p.numel() * p.element_size() for p in place.model.parameters() if p.requires_grad)
    return state + moments


def kept_checkpoints(settings: Any) -> int:
    """Return how many checkpoints lie beside each other while one more is written; ``last.ckpt`` is a second name."""
    own, monitor = settings.checkpoint, settings.collapse_monitor
    every = settings.trainer.max_steps // (own.every_n_train_steps or settings.trainer.max_steps)
    kept = every if own.keep_last == -1 else own.keep_last
    if own.monitor and own.keep_last != -1:
        kept += every if own.save_top_k == -1 else own.save_top_k
    policies = {monitor.policy, *(monitor.policies or {}).values()}
    return int(kept) + bool(settings.best_checkpoint.enabled) + ("rollback" in policies) + 1


def try_run_directory(place: Place) -> tuple[int, int, int, float, bool]:
    """Write a file; return what :func:`judge_run_directory` judges.

    Returns:
        bytes of a checkpoint, how many are kept, bytes free, bytes written per second, and whether this rank sees the
        file of rank 0.
    """
    size, kept = checkpoint_bytes(place), kept_checkpoints(place.settings)
    with ExitStack() as files:
        name, failure, speed = "", None, 0.0
        try:
            folder = _existing(place.run_directory)
            file = files.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".agssd-check-"))
            name, speed = Path(file.name).name, _write_speed(file, 1 if place.rank else min(_TRIAL_BYTES, size))
        except OSError as error:
            failure = error
        first = place.gather(name)[0]  # also from ranks that fail: the others wait for it
        sees = not first or failure is not None or _appears(folder / first)
        place.gather(None)  # the file stays until all have looked
    if failure is not None:
        raise failure
    return size, kept, shutil.disk_usage(folder).free, speed, sees


def _write_speed(file: Any, size: int) -> float:
    """Return bytes per second with which at least ``size`` bytes reach the disk."""
    block = os.urandom(min(size, 2**20))
    blocks = max(1, size // len(block))
    started = time.perf_counter()
    for _ in range(blocks):
        file.write(block)
    file.flush()
    os.fsync(file.fileno())
    return blocks * len(block) / (time.perf_counter() - started)


def _appears(path: Path) -> bool:
    """Return whether ``path`` comes into sight; a network file system may take some seconds to show it."""
    for _ in range(50):
        if path.exists():
            return True
        time.sleep(0.1)
    return False


def _existing(folder: Path) -> Path:
    """Return the deepest folder on the way to ``folder`` that exists, in which the run will make its own."""
    for part in (folder, *folder.absolute().parents):
        if part.exists():
            if not part.is_dir():
                raise NotADirectoryError(f"{part} is a file")
            return part
    raise FileNotFoundError(f"there is no {folder}")


def judge_run_directory(told: Sequence[Told]) -> Finding:
    """Checkpoints must have room, and one must be written in time."""
    size, kept, _, speed, _ = told[0].value
    blind = next((one for one in told if not one.value[4]), None)
    if blind is not None:
        return Finding(
            "",
            f"{of_rank(blind, len(told))}another folder than that of rank 0, so checkpoints of rank 0 are not there",
            "name a --trainer.default_root_dir that all hosts share",
        )
    free = min(one.value[2] for one in told)
    if free < size * kept:
        problem = f"{bytes_text(free)} free, {kept} checkpoints of {bytes_text(size)} need {bytes_text(size * kept)}"
        return Finding(
            "", problem, "free space, name another --trainer.default_root_dir, or lower checkpoint.keep_last"
        )
    if size / speed > SECONDS_TO_SAVE:
        problem = f"a checkpoint of {bytes_text(size)} takes {size / speed:.0f} s at {speed / 1e6:.1f} MB/s"
        return Finding(
            "", problem, f"put the run on a faster disk: a run that is told to stop has {SECONDS_TO_SAVE:.0f} s"
        )
    return Finding(f"{speed / 1e6:.0f} MB/s, {bytes_text(free)} free for {kept} checkpoints of {bytes_text(size)}")


# ------------------------------------------------------------ limits, memory


def count_handles(place: Place) -> tuple[int, int]:
    """Return the file handles that this process may need, and may have."""
    data = place.data
    files = sum(len(cache.files) for cache in data.caches)
    in_flight = _TENSORS_PER_BATCH * data.num_workers * (data.prefetch + 1)
    return in_flight + 2 * min(files, 128) + _OTHER_HANDLES, resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def judge_handles(told: Sequence[Told]) -> Finding:
    """The limit must allow them."""
    for one in told:
        needed, allowed = one.value
        if allowed != resource.RLIM_INFINITY and needed > allowed:
            problem = f"{of_rank(one, len(told))}up to {needed} file handles are needed, ulimit -n allows {allowed}"
            return Finding(
                "", problem, f"ulimit -n {2 ** math.ceil(math.log2(needed))} before the run, or fewer data.num_workers"
            )
    return Finding(f"up to {max(one.value[0] for one in told)} needed, {min(one.value[1] for one in told)} allowed")


def count_shared_memory(place: Place) -> tuple[int, int]:
    """Return bytes of the batches that the workers of this rank hold ready, and bytes free in /dev/shm."""
    from agssd.data_modules.sampling import micro_batch_size

    data, accumulate = place.data, place.settings.trainer.accumulate_grad_batches
    batch = micro_batch_size(data.global_batch_size, place.world_size, accumulate)
    regions = 4 if data.regions else 0
    sample = math.prod(data.parent_vox) * (2 * data.caches[0].cases[0].channels + 1 + regions)
    return batch * sample * data.num_workers * data.prefetch, shutil.disk_usage(SHARED_MEMORY).free


def judge_shared_memory(told: Sequence[Told]) -> Finding:
    """The ranks of a host share it."""
    needed: dict[str, int] = defaultdict(int)
    free: dict[str, int] = {}
    for one in told:
        needed[one.host] += one.value[0]
        free[one.host] = min(one.value[1], free.get(one.host, one.value[1]))
    host = max(needed, key=lambda name: needed[name] - free[name])
    value = f"{bytes_text(needed[host])} of {bytes_text(free[host])} that are free"
    if needed[host] > free[host]:
        return Finding(
            value,
            f"{host}: batches that wait take {bytes_text(needed[host])}, /dev/shm has {bytes_text(free[host])} free",
            "lower data.num_workers or data.prefetch, accumulate more, or enlarge /dev/shm (container: --shm-size)",
        )
    return Finding(value)


# ------------------------------------------------------------- clocks, step


def read_clock(place: Place) -> float:
    """Return the time of day at a moment that all ranks share."""
    place.gather(None)
    return time.time()


def judge_clocks(told: Sequence[Told]) -> Finding:
    """They must agree."""
    first, last = min(told, key=lambda one: one.value), max(told, key=lambda one: one.value)
    skew = last.value - first.value
    if skew > MAX_SKEW_S:
        problem = f"the clock of {last.host} is {skew:.1f} s ahead of that of {first.host}"
        return Finding("", problem, "let both hosts follow one time server (chrony or ntpd), or leave one out")
    return Finding(f"{skew:.2f} s apart" if len(told) > 1 else "one process, one clock")


def one_step(place: Place) -> str:
    """Return the loss of one forward and backward pass on this rank's first micro-batch; no weight moves.

    A rank takes its pass alone: nothing of the loss is gathered, so where one rank fails no other waits for it. Only
    weights that lie in parts are gathered all the same.

    Raises:
        ValueError: if loss or a gradient is not finite.
    """
    from torch.utils.data import default_collate

    from agssd.commands.plan.rehearsal import autocast_of, set_step
    from agssd.data_modules.sampling import micro_batch_size

    data, model, trainer = place.data, place.model, place.settings.trainer
    batch = micro_batch_size(data.global_batch_size, place.world_size, trainer.accumulate_grad_batches)
    crops = default_collate([data.train_crops[place.rank * batch + number] for number in range(batch)])
    set_step(model, 0, trainer.max_steps)
    views = model.on_after_batch_transfer({name: part.to(place.device) for name, part in crops.items()}, 0)
    dtype = autocast_of(trainer.precision)
    with alone():
        with torch.autocast(place.device.type, dtype, dtype is not None):
            loss = model.total_loss(views)
        loss.backward()
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    own = [(name, g.to_local() if isinstance(g, DTensor) else g) for name, g in gradients]
    wrong = [name for name, gradient in own if not bool(gradient.isfinite().all())]
    model.zero_grad()
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss is {float(loss.detach())}")
    if wrong:
        raise ValueError(f"the gradient of {wrong[0]} is not finite")
    return f"loss {float(loss.detach()):.4f}"


def judge_step(told: Sequence[Told]) -> Finding:
    """All is well where every rank has a loss."""
    return Finding(told[0].value + (f" on rank 0, finite on all {len(told)}" if len(told) > 1 else ""))


CHECKS = (
    Check(
        "all-reduce",
        reduce_all,
        judge_reduce,
        "see whether a firewall or a wrong network interface keeps the hosts apart (NCCL_SOCKET_IFNAME or "
        "GLOO_SOCKET_IFNAME names the right one), and run again with NCCL_DEBUG=INFO",
    ),
    Check("cache", look_at_cache, judge_cache, "name a cache that every host can read, --data.cache PATH"),
    Check("HDF5 filters", missing_filters, judge_filters, _FILTER_REMEDY, ("cache",)),
    Check(
        "run directory", try_run_directory, judge_run_directory, "name a --trainer.default_root_dir that can be written"
    ),
    Check("file handles", count_handles, judge_handles, "ulimit -n 4096 before the run", ("cache",)),
    Check(
        "shared memory",
        count_shared_memory,
        judge_shared_memory,
        "mount /dev/shm (container: --shm-size), or set data.num_workers to 0",
        ("cache",),
    ),
    Check("clocks", read_clock, judge_clocks, "let all hosts follow one time server", ("all-reduce",)),
    Check(
        "one step",
        one_step,
        judge_step,
        "run `agssd plan` with this command line if memory ran out; else train on another precision, or run "
        "`agssd doctor` on the cache",
        ("all-reduce", "cache"),
    ),
)
