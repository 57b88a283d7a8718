"""Time the hot paths against their alternatives, side by side in one run.

Both sides of a row are timed in turn, round after round, so that whatever else the machine does meets both. A row gives
the median time of each side and the median over rounds of their ratio; nothing is compared with another machine's run.
What an interruption costs has no alternative: its times stand alone, in seconds of one run, and so does the CPU time of
what watches a run, as a share of a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from agssd.commands._bench_preemption import time_preemption
from agssd.commands._bench_rows import Figure, Row, row_of
from agssd.whole_file import whole_file

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_CROP = 96


Case = tuple[str, str, Callable[[], object], str, Callable[[], object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agssd bench-speed``."""
    parser.add_argument("--device", default="cpu", help="torch device, for example cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, help="folder for bench.json (default: nothing is written)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per row (default: 9)")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU (default: torch's own choice)")


def run(arguments: argparse.Namespace) -> int:
    """Run every comparison, print the table and return the exit code."""
    try:
        _bench(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _bench(arguments: argparse.Namespace) -> None:
    """Run every comparison.

    Raises:
        ValueError: for a device that is not there, or fewer than 1 round.
    """
    import torch

    from agssd.devices import check_device

    if arguments.rounds < 1:
        raise ValueError(f"--rounds is {arguments.rounds}; give at least 1")
    device = check_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{describe(device)}, {arguments.rounds} rounds; ratio = other / ours, above 1 ours is faster")
    print(f"{'what':<46} {'ours':>22} {'ms':>9}   {'other':<24} {'ms':>9}  ratio (lowest to highest round)")
    rows: list[Row | Figure] = []
    report = {"machine": describe(device), "rounds": arguments.rounds}
    with TemporaryDirectory() as folder:
        for case in _cases(device, Path(folder), arguments.rounds):
            row = case if isinstance(case, (Row, Figure)) else compare(case, arguments.rounds, device)
            rows.append(row)
            print(row, flush=True)
            if arguments.out:  # after each: a later one may fail, and all take long
                with whole_file(arguments.out / "bench.json") as temporary:
                    temporary.write_text(json.dumps(report | {"rows": [asdict(one) for one in rows]}, indent=1) + "\n")
    if arguments.out:
        print(f"written: {arguments.out / 'bench.json'}")


def describe(device: Any) -> str:
    """Return the machine in words: device, threads, torch and date."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    date = time.strftime("%Y-%m-%d")
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date}"


def compare(case: Case, rounds: int, device: Any) -> Row:
    """Time both sides of ``case`` in turn for ``rounds`` rounds, after one round that does not count."""
    what, ours, run_ours, other, run_other = case
    for warm in (run_ours, run_other):
        _seconds(warm, device)
    return row_of(what, ours, other, [(_seconds(run_ours, device), _seconds(run_other, device)) for _ in range(rounds)])


def _seconds(call: Callable[[], object], device: Any) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def _cases(device: Any, folder: Path, rounds: int) -> Iterator[Case | Row | Figure]:
    yield from _reading(folder)
    yield from _views(device)
    yield from _encoder(device)
    yield from _heads(device)
    yield from _teacher(device)
    yield _probe(device, folder, rounds)
    yield from _monitoring(device, folder, rounds)
    yield from _saving(device, folder, rounds)
    yield from time_preemption(device, folder)


def _reading(folder: Path) -> Iterator[Case]:
    """A crop of a head at 1 mm from the cache, from a gzipped NIfTI, and from a plain one."""
    import nibabel as nib
    import numpy as np

    from agssd.data_modules.build import CacheWriter
    from agssd.data_modules.cache import VolumeCache
    from agssd.scans.case import PreparedCase

    shape = (189, 233, 197)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    body = (grid**2).sum(0) < 0.64
    image = (body * (600 + 200 * np.sin(9 * grid[0]) + rng.normal(0, 20, shape))).astype(np.int16)
    case = PreparedCase(
        image=image[None],
        foreground=body.astype(np.uint8),
        label=None,
        modality="mri",
        spacing_mm=(1.0, 1.0, 1.0),
        affine=np.eye(4)[[2, 1, 0, 3]],
        source_shape=(shape[2], shape[1], shape[0]),
        source_affine=np.eye(4),
        source_sha256="0" * 64,
        scale=(1.0,),
        offset=(0.0,),
        low=(0.0,),
        high=(900.0,),
        edge_q99=(50.0,),
    )
    with CacheWriter(folder / "bench.h5") as writer:
        writer.add(case, "head", "head", "train")
        writer.finish()
    nifti = nib.Nifti1Image(np.ascontiguousarray(image.T), np.eye(4))
    for ending in ("nii.gz", "nii"):
        nib.save(nifti, folder / f"bench.{ending}")
    cache = VolumeCache(folder / "bench.h5")
    size = (_CHUNK_CROP,) * 3

    def start() -> tuple[int, int, int]:
        first, second, third = (int(rng.integers(n - _CHUNK_CROP)) for n in shape)
        return first, second, third

    def from_nifti(ending: str) -> Any:
        d, h, w = start()
        loaded: Any = nib.load(folder / f"bench.{ending}")
        c = _CHUNK_CROP
        return np.ascontiguousarray(np.asanyarray(loaded.dataobj[w : w + c, h : h + c, d : d + c]).T)

    what = "read a crop of 96³ from a head at 1 mm"
    yield what, "cache", lambda: cache.read(0, start(), size), "nibabel, .nii.gz", lambda: from_nifti("nii.gz")
    yield what, "cache", lambda: cache.read(0, start(), size), "nibabel, .nii (mapped)", lambda: from_nifti("nii")


def _views(device: Any) -> Iterator[Case]:
    import torch

    from agssd.transforms.crops import OverlapCrops, extract

    for parent_vox, view, batch in (((40, 56, 40), 32, 8), ((160, 160, 160), 96, 1)):
        crops = OverlapCrops(size_vox=(view, view, view), num_local=0)
        foreground = torch.ones((batch, 1, *parent_vox), dtype=torch.uint8, device=device)
        views = crops.sample(foreground, torch.arange(batch, device=device), 0).globals
        parent = torch.randn((batch, 1, *parent_vox), device=device)

        cut = partial(extract, parent, views, (view, view, view))
        what = f"cut {batch} x 2 views of {view}³ from {'x'.join(map(str, parent_vox))}"
        yield what, "matrix products", partial(cut, True), "grid_sample", partial(cut, False)


def _encoder(device: Any) -> Iterator[Case]:
    import torch

    from agssd.models.vit import ViT

    view, local = 96, 48
    size: Literal["small", "base"] = "small" if device.type == "cpu" else "base"
    batch = 2 if device.type == "cpu" else 8
    encoder = ViT(size=size, patch_size=16).to(device)
    views = [torch.randn((2 * batch, 1, view, view, view), device=device)]
    both = [*views, torch.randn((6 * batch, 1, local, local, local), device=device)]

    def step(dtype: torch.dtype | None, groups: list[list[Tensor]]) -> None:
        encoder.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            for group in groups:
                found = encoder.forward_views(group)
                sum(
                    (features.tokens.float().square().mean() for features in found), torch.zeros((), device=device)
                ).backward()

    bf16 = torch.bfloat16
    what = f"encoder vit_{size}, forward and backward, {2 * batch} x {view}³"
    yield what, "bf16 autocast", lambda: step(bf16, [views]), "float32", lambda: step(None, [views])
    what = f"the same with {6 * batch} local views of {local}³, bf16"
    yield what, "one pass", lambda: step(bf16, [both]), "a pass per size", lambda: step(bf16, [both[:1], both[1:]])


def _heads(device: Any) -> Iterator[Case]:
    import torch

    from agssd.models.heads import PrototypeHead

    head = PrototypeHead(384, num_prototypes=8192).to(device)
    tokens = torch.randn((4, 216, 384), device=device)
    hidden = torch.rand((4, 216), device=device) < 0.5

    def step(x: Tensor) -> None:
        head.zero_grad(set_to_none=True)
        head(x).square().mean().backward()

    what = "patch head, K 8192, 4 views of 216 tokens"
    yield what, "masked tokens (half)", lambda: step(tokens[hidden]), "all tokens", lambda: step(tokens)


def _teacher(device: Any) -> Iterator[Case]:
    import torch

    from agssd.models.ema import update_ema
    from agssd.models.vit import ViT

    student, teacher = ViT(size="base").to(device), ViT(size="base").to(device)

    @torch.no_grad()
    def one_by_one() -> None:
        for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            ours.mul_(0.996).add_(theirs, alpha=0.004)

    what = "EMA of a vit_base teacher"
    yield what, "foreach lerp", lambda: update_ema(student, teacher, 0.996), "mul and add, one by one", one_by_one


def _probe(device: Any, folder: Path, rounds: int) -> Row:
    """A probe while training beside the steps from one probe to the next."""
    from agssd.commands._bench_probe import STEPS_TIMED, interval, time_probe

    what = "probe while training (2 % at a ratio of 50)"
    other = f"{interval()} steps ({STEPS_TIMED} timed)"
    return row_of(what, "linear-seg and knn-seg", other, time_probe(rounds, device, folder))


def _monitoring(device: Any, folder: Path, rounds: int) -> Iterator[Row | Figure]:
    """Steps with everything that watches a run beside bare ones; rounds are long, so a third as many."""
    from agssd.commands._bench_monitoring import rhythm, time_monitoring

    found = time_monitoring(max(1, rounds // 3), device, folder)
    what, watched = "step of a watched run (2 % at a ratio of 0.98)", f"watched (2 x {rhythm()} steps)"
    yield row_of(what, watched, "bare", found.pairs)
    yield row_of("the same in CPU time of the training loop", watched, "bare", found.cpu_pairs)
    parts = sorted(found.shares.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {share:.2f}" for name, share in parts)
    yield Figure("CPU time of what watches (at most 2 %)", sum(found.shares.values()), "%", f"of a bare step: {told}")


def _saving(device: Any, folder: Path, rounds: int) -> Iterator[Row]:
    """The stall of a checkpoint beside a write that training waits for, and beside a step."""
    from agssd.commands._bench_saving import time_saving

    sizes: tuple[Literal["tiny", "small", "base"], ...] = ("tiny", "small" if device.type == "cpu" else "base")
    for size in sizes:
        found = time_saving(rounds, device, folder, size)
        what = f"time to save dino, vit_{size}, {found.megabytes:.0f} MB"
        yield row_of(what, "stall", "written before going on", list(zip(found.stall, found.waited, strict=True)))
        yield row_of(what, "stall", "a step", list(zip(found.stall, found.step, strict=True)))
