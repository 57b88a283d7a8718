"""The cells of a bench: which runs there are, how each is started, and what is read from it."""

from __future__ import annotations

import csv
import shutil
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from agssd.commands.bench.equal_time import clock_flags, fitting_steps
from agssd.commands.bench.marks import command_mark, contents, file_mark, fingerprint
from agssd.commands.bench.processes import said_to
from agssd.commands.bench.records import Job, is_done, kept_row, once
from agssd.commands.bench.settings import Bench, Labels, label_flags

_ALONE = ("--wandb.mode", "disabled", "--preemption.requeue", "false")  # it is for the bench to go back into a queue
_DICE = "dice_class"  # columns of what `agssd test` writes


@dataclass(frozen=True)
class Pretraining:
    """One pretraining, or what was pretrained elsewhere."""

    folder: Path  # of its run; of one made elsewhere what its settings name
    method: str
    seed: int
    fold: int | None
    steps: int | None  # None where they hang on the time of a pretraining that is not done
    command: tuple[str, ...]  # after ``agssd``; empty while the steps are not known
    mark: str  # of its settings and data; of one made elsewhere of its weights
    settings: str  # mark of what the YAML says of it alone, the same for any data and machine
    elsewhere: bool = False

    @property
    def is_done(self) -> bool:
        """Whether its encoder can be asked for."""
        return self.elsewhere or is_done(self)

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
    mark: str  # of its settings and data, and of its pretraining's
    settings: str  # mark of its settings and its pretraining's alone

    @property
    def name(self) -> str:
        """What to call it."""
        return str(self.folder)


@dataclass(frozen=True)
class Pool:
    """What encoders are pretrained on in place of the labelled cache; not cut into folds.

    Args:
        caches: paths.
        mark: of their cases, see ``agssd.commands.bench.marks.cache_mark``.
    """

    caches: tuple[str, ...]
    mark: str

    @property
    def word(self) -> str:
        """What ``--data.cache`` is given."""
        return self.caches[0] if len(self.caches) == 1 else f"[{','.join(self.caches)}]"


def list_cells(
    bench: Bench, cache: str, out: Path, data: str = "", pool: Pool | None = None, images: str | None = None
) -> list[Cell]:
    """Return every cell in the order of the tables: readout, budget, labels, draw, seed, fold, method.

    Args:
        bench: the settings.
        cache: labelled cache; need not exist.
        out: directory of the bench.
        data: mark of the cache, see ``agssd.commands.bench.marks.cache_mark``.
        pool: what is pretrained on; None for the labelled cache without test subjects and folds.
        images: mark of the cache without its labels, for pretraining; None is ``data``.
    """
    folds = [None] if bench.num_folds is None else list(range(bench.num_folds))
    before = {
        (method, seed, fold): _pretraining(bench, cache, out, data if images is None else images, method, seed, fold)
        if pool is None
        else _pretraining(bench, pool.word, out, pool.mark, method, seed, None)
        for method in bench.methods
        for seed in range(bench.seeds)
        for fold in folds
    }
    return [
        _cell(bench, cache, out, data, readout, steps, labels, draw, method, seed, fold, before[method, seed, fold])
        for readout, one in bench.readouts.items()
        for steps in one.budgets
        for labels in bench.labels_of(readout)
        for draw in range(bench.draws_of(labels))
        for seed in range(bench.seeds_of(readout))
        for fold in folds
        for method in bench.methods
        if bench.takes_part(method, readout)
    ]


def _cell(
    bench: Bench,
    cache: str,
    out: Path,
    data: str,
    readout: str,
    steps: int,
    labels: Labels,
    draw: int,
    method: str,
    seed: int,
    fold: int | None,
    pretraining: Pretraining | None,
) -> Cell:
    its, one = bench.methods[method], bench.readouts[readout]
    place = "" if fold is None else f"-fold{fold}"
    amount = str(labels).replace("%", "pct")
    folder = out / "cells" / readout / method / f"steps{steps}-labels{amount}-draw{draw}-seed{seed}{place}"
    kind = "test" if fold is None else "validate"
    before, earlier = (None, None) if pretraining is None else (pretraining.mark, pretraining.settings)
    drawn = ["by class"] if bench.figure == "accuracy" else []  # the way of draws, in the mark
    fit: tuple[str, ...] = ()
    measure: tuple[str, ...] = ()
    if one.probe is None:
        flags = [*its.fit.get(readout, one.fit), *bench.fit_common, *_fold_flags(bench, fold)]
        flags += [] if bench.num_classes is None else ["--model.num_classes", str(bench.num_classes)]
        flags += [*label_flags(labels), "--data.subset_seed", str(draw), "--data.seed", str(seed)]
        flags += ["--seed_everything", str(seed), "--trainer.max_steps", str(steps)]
        mark = fingerprint([kind, command_mark(flags), before, data, *drawn])
        settings = fingerprint([kind, command_mark(flags), earlier, *drawn])
        flags += ["--data.cache", cache, "--trainer.default_root_dir", str(folder)]
        flags += [] if pretraining is None else ["--model.encoder", str(pretraining.folder)]
        only_last = ["--trainer.limit_val_batches", "0", "--checkpoint.every_n_train_steps", str(steps)]
        fit = ("fit", *flags, *only_last, *_ALONE)
        measure = (kind, *flags, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"))
    else:
        fresh = contents(Path(str(bench.backbone))) if pretraining is None else None
        asked = [one.probe, one.window_vox, one.depths, labels, draw, seed, fold, bench.num_folds]
        mark = fingerprint([*asked, fresh or before, data, *drawn])
        settings = fingerprint([*asked, fresh or earlier, *drawn])
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
        fit=fit,
        measure=measure,
        cases="test_cases.csv" if fold is None else "val_cases.csv",
        mark=mark,
        settings=settings,
    )


def _pretraining(
    bench: Bench, cache: str, out: Path, data: str, method: str, seed: int, fold: int | None
) -> Pretraining | None:
    its = bench.methods[method]
    if its.encoders:
        from agssd.tasks.encoders import encoder_file

        path = Path(its.encoders[seed])
        mark = file_mark(encoder_file(path))
        return Pretraining(path, method, seed, None, None, (), mark, "elsewhere", elsewhere=True)
    if not its.pretrain:
        return None
    folder = out / "pretraining" / method / (f"seed{seed}" + ("" if fold is None else f"-fold{fold}"))
    steps: int | None = its.steps or bench.pretrain_steps
    flags = [*its.pretrain, *bench.pretrain_common, *_fold_flags(bench, fold)]
    flags += ["--seed_everything", str(seed), "--model.seed", str(seed), "--data.seed", str(seed)]
    settings: list[Any] = [command_mark(flags), steps]
    if its.time_of is not None and bench.equal_time is not None:
        made = [_pretraining(bench, cache, out, data, one, seed, fold) for one in (bench.equal_time, its.time_of)]
        reference, same = pair = [one for one in made if one is not None]  # or the settings are refused
        settings[1] = [one.settings for one in pair]  # the steps are of a machine
        done = all(one.is_done for one in pair)
        steps = fitting_steps(reference.folder, reference.steps, same.folder) if done else None
    if steps is None:
        return Pretraining(folder, method, seed, fold, None, (), "", fingerprint(settings))
    flags += ["--trainer.max_steps", str(steps), *clock_flags(bench, steps)]
    mark = fingerprint([command_mark(flags), data])
    flags += ["--data.cache", cache, "--trainer.default_root_dir", str(folder), *_ALONE]
    return Pretraining(folder, method, seed, fold, steps, ("fit", *flags), mark, fingerprint(settings))


def _fold_flags(bench: Bench, fold: int | None) -> list[str]:
    return [] if fold is None else ["--data.num_folds", str(bench.num_folds), "--data.fold", str(fold)]


# ------------------------------------------------------------------ running


def pretrain(one: Pretraining, job: Job) -> dict[str, Any]:
    """Pretrain, or find that it is done, and return its row.

    Raises:
        ValueError: if it fails; the message names its log.
    """

    def work() -> dict[str, Any]:
        _command(one.command, one.folder, job.bench.threads)
        return {"method": one.method, "seed": one.seed, "fold": one.fold, "steps": one.steps}

    return once(one, job, work)


def train_and_measure(cell: Cell, job: Job) -> dict[str, Any]:
    """Train the task of a cell and measure it, or find that it is done, and return its row.

    Args:
        cell: the cell; its pretraining must be done.
        job: what every run of the bench is given.

    Raises:
        ValueError: if it fails; the message names its log.
    """

    def work() -> dict[str, Any]:
        _command(cell.fit, cell.folder, job.bench.threads)
        _command(cell.measure, cell.folder, job.bench.threads)
        row = row_of(cell, job, read_measured(cell.folder / cell.cases, job.bench.figure), _leakage(cell, job))
        shutil.rmtree(cell.folder / "checkpoints")  # hundreds of cells; the same command makes it again
        return row

    return once(cell, job, work)


@dataclass(frozen=True)
class Measured:
    """What a run has measured.

    Args:
        subjects: figure by subject; None where it has none.
        classes: by number of the class: Dice, or the share of its volumes that are found, over all who have a figure.
    """

    subjects: dict[str, float | None]
    classes: dict[str, float]


def row_of(cell: Cell, job: Job, measured: Measured, leakage: str) -> dict[str, Any]:
    """Return the row of a cell.

    Args:
        cell: the cell.
        job: what every run of the bench is given.
        measured: its figures.
        leakage: what the encoder has seen of them, see ``agssd.commands.bench.leaks``.
    """
    known = [value for value in measured.subjects.values() if value is not None]
    own = None if cell.pretraining is None or cell.pretraining.elsewhere else cell.pretraining
    before = {} if own is None else kept_row(own) or {}
    return {
        "method": cell.method,
        "readout": cell.readout,
        "steps": cell.steps,
        "labels": cell.labels,
        "draw": cell.draw,
        "seed": cell.seed,
        "fold": cell.fold,
        "figure": job.bench.figure,
        "value": _mean(known),
        "subjects": measured.subjects,
        "classes": measured.classes,
        "bench": job.bench.fingerprint(),
        "settings": cell.settings,
        "pretraining_fold": None if cell.pretraining is None else cell.pretraining.fold,
        "pretraining_steps": before.get("steps", 0),
        "pretraining_seconds": before.get("seconds", 0.0),
        "pretraining_commit": before.get("commit"),
        "pretraining_machine": before.get("machine"),
        "leakage": leakage,
    }


def _leakage(cell: Cell, job: Job) -> str:
    """Return what the encoder of a cell has seen of whom it measures; a command has refused it, or was to accept it."""
    from agssd.commands.bench.leaks import labelled, leakage
    from agssd.commands.bench.results import NO_LEAK
    from agssd.data_modules.cache import VolumeCache
    from agssd.tasks.encoders import load_encoder

    if cell.pretraining is None:
        return NO_LEAK
    folder = cell.pretraining.folder
    data = labelled(job.bench, VolumeCache(job.cache))
    return leakage(load_encoder(folder).contract, str(folder), data, cell.fold, "warn")


def _command(words: Sequence[str], folder: Path, threads: int) -> None:
    """Run a command of agssd in this process, with what it says in ``log.txt``.

    Raises:
        ValueError: if it fails.
    """
    import torch

    torch.set_num_threads(threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with said_to(log):
        try:
            code = import_module("agssd.cli").main(list(words))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Exception:
            traceback.print_exc()
            code = 1
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        raise ValueError(f"{words[0]} of {folder} failed ({lines[-1] if lines else 'no word'}); see {log}")


def read_measured(path: Path, figure: str) -> Measured:
    """Return the figures of subjects and classes from the cases that a measurement wrote.

    Dice is the mean over classes, of which one that is absent from a case is left out where it is not predicted and
    counts 0 where it is, and over the subject's cases; None where all are left out. Accuracy is that of ``balanced``.

    Raises:
        ValueError: if there is no figure.
    """
    with path.open(newline="", encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    found: dict[str, list[float]] = {}
    by_class: dict[str, dict[str, list[float]]] = {}
    if figure == "dice":
        for case in cases:
            who = case["subject"] or case["case"]
            values = {key.removeprefix(_DICE): float(v) for key, v in case.items() if key.startswith(_DICE) and v}
            found.setdefault(who, []).extend([_mean(values.values())] if values else [])
            for name, value in values.items():
                by_class.setdefault(name, {}).setdefault(who, []).append(value)
    else:
        guesses = []
        for case in cases:
            scores = [float(v) for key, v in case.items() if key.startswith("probability")]
            guesses.append((case["subject"] or case["case"], int(case["target"]), scores.index(max(scores))))
        return measured_guesses(guesses)
    if not any(found.values()):
        raise ValueError(f"{path} has no {figure}")
    return Measured(
        {subject: _mean(values) if values else None for subject, values in sorted(found.items())},
        {name: _mean([_mean(values) for values in its.values()]) for name, its in by_class.items()},
    )


def measured_guesses(guesses: Sequence[tuple[str, int, int]]) -> Measured:
    """Return the figures of subjects, see ``balanced``, and classes from subject, class and guess of each volume."""
    targets = sorted({target for _, target, _ in guesses})
    found = {one: _mean([float(guess == one) for _, target, guess in guesses if target == one]) for one in targets}
    return Measured(dict(balanced(guesses)), {str(one): share for one, share in found.items()})


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def balanced(guesses: Sequence[tuple[str, int, int]]) -> dict[str, float]:
    """Return shares of the balanced accuracy over volumes by subject: their mean over subjects is that figure.

    A subject's is the sum over its volumes of 1 where the class was found, over how often volumes of that class occur.

    Args:
        guesses: subject, class and guessed class of each volume.
    """
    targets = [target for _, target, _ in guesses]
    number = len({subject for subject, _, _ in guesses})
    found: dict[str, float] = {}
    for subject, target, guess in guesses:
        weight = number / (targets.count(target) * len(set(targets)))
        found[subject] = found.get(subject, 0.0) + weight * (guess == target)
    return dict(sorted(found.items()))
