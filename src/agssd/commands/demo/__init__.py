"""Show the whole way on simulated heads: cache, pretraining, export, and segmentation with few labels.

The cohort is simulated from one real template (the MNI152 average), so its figures say that the parts work together and
nothing about patients. Every step is the command that a user would run, with its output in a log.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

NOTICE = (
    "The cohort is simulated: every subject is the MNI152 average brain, deformed and degraded by torchio.\n"
    "The figures show that the parts work together; they say nothing about patients."
)
_MARKER = ".agssd-demo"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    subjects: dict[str, int]
    spacing_mm: float
    num_labelled: int
    pretrain_steps: int
    finetune_steps: int


FULL = Size({"train": 20, "val": 4, "test": 6}, 2.5, 2, 600, 200)
QUICK = Size({"train": 5, "val": 2, "test": 2}, 4.0, 2, 20, 20)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agssd demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where it works (default: demo)")
    parser.add_argument("--quick", action="store_true", help="the same steps, too short to learn")
    parser.add_argument("--seed", type=int, default=0, help="of the cohort and of every training (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, print the table and the pictures' names, and return the exit code."""
    try:
        _demo(arguments.out, QUICK if arguments.quick else FULL, arguments.seed, arguments.quick)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(out: Path, size: Size, seed: int, quick: bool) -> None:
    from agssd.commands.demo.report import collect, write_pictures, write_table
    from agssd.scans.simulated.heads import write_cohort

    started = time.monotonic()
    _prepare_folder(out)
    print(f"{NOTICE}\nThe output of every command is in {out / 'logs'}.", flush=True)
    count = sum(size.subjects.values())
    with _step(f"simulate {count} subjects at {size.spacing_mm:g} mm"):
        manifest = write_cohort(out / "scans", size.subjects, size.spacing_mm, seed)
    cache, log = out / "scans.h5", out / "logs"
    spacing = ["--spacing-mm", f"{size.spacing_mm:g}", "--modality", "mri"]
    salt = out / "salt"
    salt.write_text("demo\n")  # public, for names of people who do not exist: the same draw of labels in every run
    keys = ["--salt", str(salt), "--key-map", str(out / "keys.csv")]
    _agssd(log / "prepare.log", ["prepare", str(manifest), "--out", str(cache), *spacing, *keys])

    common = ["--data.cache", str(cache), "--seed_everything", str(seed)]
    for name in ("pretrain", "segmentation"):
        shutil.copyfile(_HERE / f"{name}.yaml", out / f"{name}.yaml")
    steps = ["--trainer.max_steps", str(size.pretrain_steps), "--trainer.default_root_dir", str(out / "pretrain")]
    with _one_thread():
        _agssd(log / "pretrain.log", ["fit", "--config", str(out / "pretrain.yaml"), *common, *steps])
    _agssd(log / "export.log", ["export", str(out / "pretrain"), "--out", str(out / "encoder")])

    encoders = ["--encoder", f"pretrained={out / 'encoder'}", "--random"]
    few = ["--on-val", "--num-subjects", str(size.num_labelled)]
    readouts = ["--readout", "linear-seg", "knn-seg", "--precision", "bf16", "--out", str(out / "frozen.json")]
    with _one_thread():
        _agssd(log / "probe.log", ["probe", str(cache), *encoders, *few, *readouts])
    _finetune_both(out, log, [*common, "--trainer.max_steps", str(size.finetune_steps)], size.num_labelled)

    results = {name: collect(out / name) for name in ("pretrained", "random")}
    table = write_table(out / "report.md", results, out, size, NOTICE, quick)
    pictures = write_pictures(out)
    pages = _write_reports(out, log, cache)
    print(f"\n{table}\n")
    for path in pictures:
        print(f"picture: {path}")
    for page in pages:
        print(f"report: {page}")
    print(f"everything is in {out}; {time.monotonic() - started:.0f} s")


def _write_reports(out: Path, log: Path, cache: Path) -> list[Path]:
    """Write the page of the pretraining and of the fine-tuning from its encoder, and return their paths."""
    pages = []
    titles = {"pretrain": "Demo: pretraining by AG-SSD", "pretrained": "Demo: segmentation from the pretrained encoder"}
    for name, title in titles.items():
        pages.append(out / f"report_{name}.html")
        place = ["--out", str(pages[-1]), "--cache", str(cache), "--title", title]
        _agssd(log / f"report_{name}.log", ["report", str(out / name), *place])
    return pages


def _finetune_both(out: Path, log: Path, common: Sequence[str], num_labelled: int) -> None:
    """Fine-tune from the export and from random weights, each on a core of its own, and print what was run."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    place = ["--config", str(out / "segmentation.yaml"), *common, "--data.num_subjects", str(num_labelled)]
    encoders = {
        "pretrained": ["--model.init_args.encoder", str(out / "encoder"), "--backbone", "null"],
        "random": [],
    }
    print("and, both at the same time:", flush=True)
    with ProcessPoolExecutor(len(encoders), mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(_finetune, out / name, log, [*place, *more]) for name, more in encoders.items()]
        for finished in runs:
            print(finished.result(), end="", flush=True)


def _finetune(folder: Path, log: Path, place: Sequence[str]) -> str:
    """Fit, test and predict in this process and return what there is to print."""
    printed = io.StringIO()
    place = [*place, "--trainer.default_root_dir", str(folder)]
    with redirect_stdout(printed), _one_thread():
        _agssd(log / f"{folder.name}_fit.log", ["fit", *place])
        place += ["--ckpt_path", str(_checkpoint(folder))]
        _agssd(log / f"{folder.name}_test.log", ["test", *place])
        _agssd(log / f"{folder.name}_predict.log", ["predict", *place, "--trainer.limit_predict_batches", "1"])
    return printed.getvalue()


def _prepare_folder(out: Path) -> None:
    """Make an empty folder, emptying one that an earlier demo made.

    Raises:
        ValueError: if the folder holds anything else, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).exists())):
        raise ValueError(f"{out} exists and was not made by an earlier demo; name another folder with --out")
    try:
        if out.exists():
            shutil.rmtree(out)
        (out / "logs").mkdir(parents=True)
        (out / _MARKER).touch()
    except OSError as error:
        raise ValueError(f"cannot write into {out}: {error.strerror}") from error


def _checkpoint(folder: Path) -> Path:
    found: Path = import_module("agssd.commands.export").find_checkpoint(folder)
    return found


@contextmanager
def _step(name: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"{name} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def _agssd(log: Path, command: Sequence[str]) -> None:
    """Run one ``agssd`` command in this process, with its output in ``log``.

    One process for all saves the seconds that every start of torch and Lightning takes.

    Raises:
        ValueError: if the command fails; the message holds the end of its log.
    """
    with _step(f"$ agssd {shlex.join(command)}"), log.open("w") as file, _kept_environment():
        with redirect_stdout(file), redirect_stderr(file):
            try:
                code = import_module("agssd.cli").main(list(command))
            except SystemExit as stop:
                code = stop.code
            except Exception as error:
                file.write(f"{type(error).__name__}: {error}\n")
                code = 1
    if code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise ValueError(f"`agssd {command[0]}` failed; the end of {log}:\n{tail}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread: two that share a busy core wait for each other more than they gain."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Give the environment back as it was: Lightning leaves the seed in it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
