"""The cells of a bench: which runs there are, how each is started, and what it leaves."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from agssd.commands.bench.equal_time import clock_flags, steps_of
from agssd.commands.bench.settings import Bench, Labels, command_mark, fingerprint, label_flags

ROW = "row.json"


@dataclass(frozen=True)
class Pretraining:
    """One pretraining."""

    folder: Path
    method: str
    seed: int
    fold: int | None
    steps: int | None  # None where they hang on the time of a pretraining that is not done
    command: tuple[str, ...]  # after ``agssd``; empty while the steps are not known

    @property
    def name(self) -> str:
        """What to call it."""
        return f"pretraining {self.method}, seed {self.seed}" + ("" if self.fold is None else f", fold {self.fold}")


@dataclass(frozen=True)
class Cell:
    """One training of a task and its measurement, or one probe, which has no commands."""

    folder: Path
    method: str
    readout: str
    steps: int
    labels: Labels
    draw: int
    seed: int
    fold: int | None
    pretraining: Pretraining | None
    fit: tuple[str, ...]
    measure: tuple[str, ...]
    cases: str  # the file that measuring writes

    @property
    def name(self) -> str:
        """What to call it."""
        return str(self.folder)


def list_cells(bench: Bench, cache: str, out: Path) -> list[Cell]:
    """Return every cell in the order of the tables: readout, budget, labels, draw, seed, fold, method."""
    folds = [None] if bench.num_folds is None else list(range(bench.num_folds))
    return [
        _cell(bench, cache, out, method, readout, steps, labels, draw, seed, fold)
        for readout, one in bench.readouts.items()
        for steps in one.budgets
        for labels in bench.labels_of(readout)
        for draw in range(bench.draws_of(labels))
        for seed in range(bench.seeds)
        for fold in folds
        for method in bench.methods
        if bench.takes_part(method, readout)
    ]


def _cell(
    bench: Bench,
    cache: str,
    out: Path,
    method: str,
    readout: str,
    steps: int,
    labels: Labels,
    draw: int,
    seed: int,
    fold: int | None,
) -> Cell:
    its, pretraining = bench.methods[method], _pretraining(bench, cache, out, method, seed, fold)
    place = "" if fold is None else f"-fold{fold}"
    amount = str(labels).replace("%", "pct")
    folder = out / "cells" / readout / method / f"steps{steps}-labels{amount}-draw{draw}-seed{seed}{place}"
    flags = [*its.fit.get(readout, bench.readouts[readout].fit), *bench.fit_common]
    flags += ["--data.cache", cache, *_fold_flags(bench, fold)]
    flags += [] if bench.num_classes is None else ["--model.num_classes", str(bench.num_classes)]
    flags += [*label_flags(labels), "--data.subset_seed", str(draw), "--data.seed", str(seed)]
    flags += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), "--trainer.max_steps"]
    flags += [str(steps)]
    if pretraining is not None:
        flags += ["--model.encoder", str(pretraining.folder)]
    only_last = ["--trainer.limit_val_batches", "0", "--checkpoint.every_n_train_steps", str(steps)]
    kind = "test" if fold is None else "validate"
    trains = bench.readouts[readout].probe is None
    last = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    return Cell(
        folder=folder,
        method=method,
        readout=readout,
        steps=steps,
        labels=labels,
        draw=draw,
        seed=seed,
        fold=fold,
        pretraining=pretraining,
        fit=("fit", *flags, *only_last, "--wandb.mode", "disabled") if trains else (),
        measure=(kind, *flags, *last) if trains else (),
        cases="test_cases.csv" if fold is None else "val_cases.csv",
    )


def _pretraining(bench: Bench, cache: str, out: Path, method: str, seed: int, fold: int | None) -> Pretraining | None:
    its = bench.methods[method]
    if not its.pretrain:
        return None
    folder = out / "pretraining" / method / (f"seed{seed}" + ("" if fold is None else f"-fold{fold}"))
    steps = steps_of(bench, method, folder)
    if steps is None:
        return Pretraining(folder, method, seed, fold, None, ())
    flags = [*its.pretrain, *bench.pretrain_common, "--data.cache", cache, *_fold_flags(bench, fold)]
    flags += ["--seed_everything", str(seed), "--model.seed", str(seed), "--data.seed", str(seed)]
    flags += ["--trainer.max_steps", str(steps), *clock_flags(bench, steps)]
    flags += ["--trainer.default_root_dir", str(folder), "--wandb.mode", "disabled"]
    return Pretraining(folder, method, seed, fold, steps, ("fit", *flags))


def _fold_flags(bench: Bench, fold: int | None) -> list[str]:
    return [] if fold is None else ["--data.num_folds", str(bench.num_folds), "--data.fold", str(fold)]


# ------------------------------------------------------------------ running


def pretrain(one: Pretraining, threads: int) -> dict[str, Any]:
    """Pretrain, or find that it is done, and return its row.

    Raises:
        ValueError: if it fails; the message names its log.
    """
    return once(one.folder, command_mark(one.command), lambda: _timed(one, threads))


def _timed(one: Pretraining, threads: int) -> dict[str, Any]:
    started = time.perf_counter()
    _command(one.command, one.folder, threads)
    return {"method": one.method, "seed": one.seed, "fold": one.fold, "seconds": time.perf_counter() - started}


def train_and_measure(cell: Cell, bench: str, figure: str, threads: int) -> dict[str, Any]:
    """Train the task of a cell and measure it, or find that it is done, and return its row.

    Args:
        cell: the cell; its pretraining must be done.
        bench: fingerprint of the settings, kept in the row.
        figure: "dice" or "accuracy".
        threads: of torch.

    Raises:
        ValueError: if it fails; the message names its log.
    """
    before = None if cell.pretraining is None else command_mark(cell.pretraining.command)

    def work() -> dict[str, Any]:
        started = time.perf_counter()
        _command(cell.fit, cell.folder, threads)
        _command(cell.measure, cell.folder, threads)
        row = row_of(cell, bench, figure, read_subjects(cell.folder / cell.cases, figure), started)
        shutil.rmtree(cell.folder / "checkpoints")  # hundreds of cells; the command in the row makes it again
        return row

    return once(cell.folder, fingerprint([command_mark(cell.fit), command_mark(cell.measure), before]), work)


def row_of(cell: Cell, bench: str, figure: str, subjects: dict[str, float], started: float) -> dict[str, Any]:
    """Return the row of a cell.

    Args:
        cell: the cell.
        bench: fingerprint of the settings.
        figure: "dice" or "accuracy".
        subjects: figure by subject.
        started: of the work, by ``time.perf_counter``.
    """
    return {
        "method": cell.method,
        "readout": cell.readout,
        "steps": cell.steps,
        "labels": cell.labels,
        "draw": cell.draw,
        "seed": cell.seed,
        "fold": cell.fold,
        "figure": figure,
        "value": sum(subjects.values()) / len(subjects),
        "subjects": subjects,
        "seconds": time.perf_counter() - started,
        "bench": bench,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def is_done(one: Pretraining | Cell) -> bool:
    """Return whether there is a row."""
    return (one.folder / ROW).is_file()


def once(folder: Path, mark: str, work: Any) -> dict[str, Any]:
    """Return the row in a folder, after doing the work if there is none.

    Raises:
        ValueError: if there is one of other settings, or the work fails.
    """
    path = folder / ROW
    if path.is_file():
        row = dict(json.loads(path.read_text(encoding="utf-8")))
        if row["mark"] != mark:
            raise ValueError(f"{folder} was made with other settings; remove it, or give another --out")
        return row
    row = {**work(), "mark": mark}
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return row


def _command(words: Sequence[str], folder: Path, threads: int) -> None:
    """Run a command of agssd in this process, with what it says in ``log.txt``.

    Raises:
        ValueError: if it fails.
    """
    import torch

    torch.set_num_threads(threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with log.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            code = import_module("agssd.cli").main(list(words))
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        raise ValueError(f"{words[0]} of {folder} failed ({lines[-1] if lines else 'no word'}); see {log}")


def read_subjects(path: Path, figure: str) -> dict[str, float]:
    """Return the figure of each subject from the cases that a measurement wrote.

    Dice is the mean over the classes that a case has and over the subject's cases. Accuracy is 1 or 0 times what makes
    the mean over subjects the balanced accuracy: subjects of rare classes count more.

    Raises:
        ValueError: if there is no figure.
    """
    with path.open(newline="", encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    found: dict[str, list[float]] = {}
    if figure == "dice":
        for case in cases:
            values = [float(v) for key, v in case.items() if key.startswith("dice_class") and v]
            if values:
                found.setdefault(case["subject"] or case["case"], []).append(sum(values) / len(values))
    else:
        guesses = []
        for case in cases:
            scores = [float(v) for key, v in case.items() if key.startswith("probability")]
            guesses.append((case["subject"] or case["case"], int(case["target"]), scores.index(max(scores))))
        return balanced(guesses)
    if not found:
        raise ValueError(f"{path} has no {figure}")
    return {subject: sum(values) / len(values) for subject, values in sorted(found.items())}


def balanced(guesses: Sequence[tuple[str, int, int]]) -> dict[str, float]:
    """Return by subject the mean over its volumes of 1 where the class was found, weighted for balanced accuracy.

    Args:
        guesses: subject, class and guessed class of each volume; a volume of a rare class weighs more.
    """
    targets = [target for _, target, _ in guesses]
    found: dict[str, list[float]] = {}
    for subject, target, guess in guesses:
        weight = len(targets) / (targets.count(target) * len(set(targets)))
        found.setdefault(subject, []).append(weight * (guess == target))
    return {subject: sum(values) / len(values) for subject, values in sorted(found.items())}


def _commit() -> str | None:
    """Return the commit of the source, with a plus if files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.strip() + ("+" if changed.stdout.strip() else "")
    return None
