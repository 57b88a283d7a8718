"""Compare methods by what few labels are enough for: label counts x draws x seeds x budgets, with paired intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agssd.commands.bench.processes import Task, side_by_side, told_to_end

if TYPE_CHECKING:
    from agssd.commands.bench.cells import Cell, Pretraining
    from agssd.commands.bench.records import Job, Recorded
    from agssd.commands.bench.settings import Bench
    from agssd.data_modules.cache import VolumeCache

_PRELOADED = ["agssd.lightning_cli", "agssd.methods.agssd", "agssd.tasks.segmentation", "agssd.tasks.classification"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``agssd bench``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "agssd bench --config conf/bench/hippocampus.yaml --cache hippocampus.h5 --out runs/bench\n\n"
        "Every cell is `agssd fit` and `agssd test`, or a probe of frozen features; a cell that is done is not done\n"
        "again, and one that was stopped goes on, so the same command finishes a bench that was interrupted.\n"
        "--methods and --readouts do a part of the work, such as the cheap readouts; tables are of all that is done.\n"
        "--workers N runs cells side by side, on the GPUs in turn where there are several.\n"
        "On a cluster an array of jobs shares the work (same arguments), a second one does what waited for the first\n"
        "(methods that are pretrained for the time of another by equal_time; and where there are more shares than\n"
        "encoders, the cells that these share), and the last command makes the tables:\n"
        "  options='--array=0-15 --gres=gpu:1 --requeue --signal=USR1@120 --open-mode=append'\n"
        "  sbatch $options --wrap 'srun agssd bench ... --share $SLURM_ARRAY_TASK_ID/16'\n"
        "  sbatch $options --dependency=afterany:JOB --wrap 'srun agssd bench ... --share $SLURM_ARRAY_TASK_ID/16'\n"
        "  agssd bench ... --tables\n"
        "What was run elsewhere, or published, comes together in one table without data or cache:\n"
        "  agssd bench --config conf/bench/hippocampus.yaml --results docs/evidence/hippocampus --out runs/published\n"
        "DIR then holds rows.csv (a row per run), subjects.csv (a row per run and subject), tables.md, classes.md (by\n"
        "class) and curves.png; `agssd report DIR --out bench.html` makes a page of them."
    )
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="for example conf/bench/NAME.yaml")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--cache", metavar="CACHE", help="labelled cache written by agssd prepare")
    data.add_argument(
        "--results",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="run nothing: make tables in a new --out of rows.csv and subjects.csv in these folders, plain or .gz",
    )
    parser.add_argument(
        "--pretrain-cache",
        nargs="+",
        default=[],
        metavar="CACHE",
        help="pretrain on the split train of these, labelled or not, instead of on that of --cache",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, rows, tables and curves")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells side by side (default: 1)")
    parser.add_argument("--quick", action="store_true", help="the small form, what stands under 'quick' in the YAML")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="do what is of these methods alone (default: all)")
    parser.add_argument("--readouts", nargs="+", metavar="NAME", help="do these readouts alone (default: all)")
    parser.add_argument("--share", metavar="I/N", help="do the I-th of N shares of the work (0/16 is the first)")
    parser.add_argument("--tables", action="store_true", help="only make tables from the cells that are done")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    parser.add_argument(
        "--redo",
        action="store_true",
        help="move what was made with other settings to DIR/replaced, and make it again (otherwise it is refused)",
    )


def run(args: argparse.Namespace) -> int:
    """Run what is missing, make the tables and return the exit code: 1 if a cell failed or it was interrupted."""
    from agssd.commands._cache_facts import cache_facts
    from agssd.commands.bench.before import of_other_settings, refuse_beforehand, shares_in_subjects
    from agssd.commands.bench.cells import Pool, list_cells
    from agssd.commands.bench.kept import keep, refuse_taken_over
    from agssd.commands.bench.marks import cache_mark, fingerprint
    from agssd.commands.bench.records import Job, commit, is_done
    from agssd.commands.bench.settings import read_settings

    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; give at least 1")
    bench = read_settings(args.config, args.quick)
    if args.results:
        return _take_over(bench, args)
    refuse_taken_over(args.out)
    told_only = args.dry_run and not Path(args.cache).exists()
    cache = None if told_only else _open(args.cache, "--cache")
    data = "" if cache is None else cache_mark(cache)
    pools = [_open(path, "--pretrain-cache") for path in args.pretrain_cache]
    images = "" if cache is None else cache_mark(cache, with_labels=False)
    pool_mark = fingerprint([cache_mark(one, with_labels=False) for one in pools])
    pool = Pool(tuple(args.pretrain_cache), pool_mark) if pools else None
    listed = partial(list_cells, bench, args.cache, args.out, data, pool, images)
    cells = listed()
    chosen = _chosen(bench, cells, args)
    if args.redo and not args.dry_run:
        if args.share:
            raise ValueError("--redo is of all shares; give it once with --tables, and then the shares without it")
        _move_away(of_other_settings(chosen), args.out)
        cells = listed()
        chosen = _chosen(bench, cells, args)
    ours = _share(chosen, args.share)
    if args.share and not ours:
        print(f"share {args.share} has nothing to do: there are more shares than the work has parts")
    if cache is None or args.dry_run:
        _tell(bench, ours, args.share)
        return 0
    shares = shares_in_subjects(bench, cache)
    facts = [*cache_facts(cache), *shares]
    facts += [(f"pretrained on: {name}", value) for one in pools for name, value in cache_facts(one)]
    failed: list[tuple[str, str]] = []
    if not args.tables:
        job = Job(bench, args.cache, commit())
        with told_to_end() as told:
            try:
                refuse_beforehand(bench, ours, cache, pools, args.workers, _PRELOADED)
                if not args.share:
                    keep(bench, facts, cells, args.out)
                if not _only_helps(chosen, args.share):
                    failed, ours = _pretrain_all(job, ours, args.workers, listed)
                if not args.share:
                    keep(bench, facts, listed(), args.out)
                failed += _measure_all(job, ours, args.workers)
            except KeyboardInterrupt:
                if not args.share:
                    keep(bench, facts, listed(), args.out)
                return _interrupted(told)
    cells = listed()  # what hung on the time of another may be known now
    if args.share:
        done = sum(map(is_done, _share(_chosen(bench, cells, args), args.share)))
        print(f"{done} of {len(ours)} cells of share {args.share} are done; --tables makes the tables of all shares")
    else:
        keep(bench, facts, cells, args.out)
        _tables(bench, cells, args, shares)
    for name, reason in failed:
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _move_away(runs: Sequence[Recorded], out: Path) -> None:
    """Move runs into a new folder beside the others, each at its place."""
    if not runs:
        return
    from agssd.run.directory import unused

    aside = unused(out / "replaced")
    for one in runs:
        place = aside / one.folder.relative_to(out)
        place.parent.mkdir(parents=True, exist_ok=True)
        one.folder.rename(place)
    print(f"{len(runs)} runs of other settings are in {aside} now; nothing reads them there")


def _interrupted(told: Sequence[int]) -> int:
    """Say that the same command goes on, put a SLURM job that was told to end back, and return the exit code."""
    from agssd.callbacks.preemption import EXIT_PREEMPTED
    from agssd.run import slurm

    after = ""
    if told and slurm.job() is not None:
        try:
            after = f"; {slurm.requeue()}"
        except OSError as error:
            after = f"; {error}"
    line = f"error: interrupted; what is done is kept, and the same command goes on from there{after}"
    print(line, file=sys.stderr, flush=True)
    return EXIT_PREEMPTED if told else 1


def _take_over(bench: Bench, args: argparse.Namespace) -> int:
    """Make the tables of what lies in folders, and return the exit code."""
    from agssd.commands.bench.kept import kept
    from agssd.commands.bench.taken import take_over

    for name in ("pretrain_cache", "methods", "readouts", "share", "dry_run"):
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is of runs, and --results runs nothing; leave one of them out")
    cells = take_over(bench, args.results, args.out)
    _tables(bench, cells, args, kept(args.out).data)
    return 0


def _open(path: str, flag: str) -> VolumeCache:
    from agssd.data_modules.cache import VolumeCache

    if not Path(path).exists():
        raise ValueError(f"there is no cache {path}, which {flag} names; write one with `agssd prepare`")
    return VolumeCache(path)


def _chosen(bench: Bench, cells: Sequence[Cell], args: argparse.Namespace) -> list[Cell]:
    """Return the cells of the methods and readouts that are asked for."""
    for flag, asked, there in (("methods", args.methods, bench.methods), ("readouts", args.readouts, bench.readouts)):
        if unknown := [name for name in asked or () if name not in there]:
            raise ValueError(f"--{flag} has {unknown[0]!r}; the {flag} of {args.config} are {', '.join(there)}")
    methods, readouts = args.methods or bench.methods, args.readouts or bench.readouts
    return [cell for cell in cells if cell.method in methods and cell.readout in readouts]


def _share(cells: Sequence[Cell], share: str | None) -> list[Cell]:
    """Return the cells of a share: whole encoders, so that no pretraining is wanted by two shares.

    Where there are more shares than encoders, those beyond take part in the cells that are trained, which are dealt out
    among the shares of an encoder; all probes of it, which compute its features once, are of its first.
    """
    if share is None:
        return list(cells)
    number, count = _parts(share)
    encoders = _encoders(cells)
    helpers = {one: range(index % count, count, len(encoders)) for index, one in enumerate(encoders)}
    met: dict[tuple[str, int, int | None], int] = {}
    found = []
    for cell in cells:
        its = helpers[_encoder(cell)]
        turn = met[_encoder(cell)] = met.get(_encoder(cell), -1) + bool(cell.fit)
        if number == its[turn % len(its) if cell.fit else 0]:
            found.append(cell)
    return found


def _only_helps(cells: Sequence[Cell], share: str | None) -> bool:
    """Return whether a share takes part in the cells of encoders that other shares pretrain."""
    return share is not None and _parts(share)[0] >= len(_encoders(cells))


def _parts(share: str) -> tuple[int, int]:
    number, _, count = share.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ValueError(f"--share is {share!r}; give I/N with I from 0 to N - 1")
    return int(number), int(count)


def _encoder(cell: Cell) -> tuple[str, int, int | None]:
    return cell.method, cell.seed, cell.fold if cell.pretraining is None else cell.pretraining.fold


def _encoders(cells: Sequence[Cell]) -> list[tuple[str, int, int | None]]:
    """Return method, seed and fold of each encoder; a share of the work is of whole ones."""
    return list(dict.fromkeys(map(_encoder, cells)))


def _tell(bench: Bench, cells: Sequence[Cell], share: str | None) -> None:
    from agssd.commands.bench.before import of_other_settings
    from agssd.commands.bench.records import is_done

    pretrainings = _pretrainings(cells)
    print(
        f"{len(pretrainings)} pretrainings ({sum(map(is_done, pretrainings))} done) and {len(cells)} cells "
        f"({sum(map(is_done, cells))} done){'' if share is None else f' in share {share}'}"
    )
    if changed := of_other_settings(cells):
        told = f"{len(changed)} runs were made with other settings, such as {changed[0].folder}"
        print(f"{told}; nothing is run beside them, and --redo moves them away and makes them again")
    if left := _time_left(cells):
        print(left)
    for one in pretrainings:
        if one.command:
            print("agssd " + " ".join(one.command))
        else:
            print(f"{one.name}: as many steps as fit into the time of {bench.equal_time}, once that is done")
    trained = [cell for cell in cells if cell.fit]
    for cell in trained[:3]:
        print("agssd " + " ".join(cell.fit))
        print("agssd " + " ".join(cell.measure))
    if len(trained) > 3:
        print(f"... and {len(trained) - 3} cells more")
    if len(trained) < len(cells):
        print(f"and {len(cells) - len(trained)} cells of frozen features, those of an encoder all at once")


def _time_left(cells: Sequence[Cell]) -> str:
    """Return how long what is missing will take one worker, by what is done of each kind; nothing before any is."""
    from agssd.commands.bench.records import is_done, kept_row

    kinds: dict[str, list[Cell | Pretraining]] = {}
    for one in _pretrainings(cells):
        kinds.setdefault(f"pretraining {one.method}", []).append(one)
    for cell in cells:
        kinds.setdefault(f"{cell.readout}, {cell.steps} steps, of {cell.method}", []).append(cell)
    hours, unknown = 0.0, []
    for name, members in kinds.items():
        done = [(kept_row(one) or {})["seconds"] for one in members if is_done(one)]
        missing = len(members) - len(done)
        if missing and not done:
            unknown.append(name)
        elif missing:
            hours += missing * sum(done) / len(done) / 3600
    if len(unknown) == len(kinds) or not (hours or unknown):
        return ""
    without = f", without {len(unknown)} kinds of which none is done yet, such as {unknown[0]}" if unknown else ""
    return f"{hours:.1f} hours of one worker are left, by the mean of those done of each kind{without}"


def _pretrainings(cells: Sequence[Cell]) -> list[Pretraining]:
    """Return the pretrainings of cells, without those made elsewhere."""
    found = dict.fromkeys(cell.pretraining for cell in cells)
    return [one for one in found if one is not None and not one.elsewhere]


def _pretrain_all(
    job: Job, cells: list[Cell], workers: int, listed: Callable[[], list[Cell]]
) -> tuple[list[tuple[str, str]], list[Cell]]:
    """Run every pretraining; return what failed and why, and the cells, whose twins' steps are known now."""
    failed, tried = _pretrain(job, cells, workers)
    if job.bench.equal_time is not None:
        ours = {cell.folder for cell in cells}
        cells = [cell for cell in listed() if cell.folder in ours]
        failed += _pretrain(job, cells, workers, tried)[0]
        waiting = [one.name for one in _pretrainings(cells) if not one.command]
        if waiting:
            print(
                f"{len(waiting)} pretrainings wait for the time of others ({waiting[0]}); give the same command again "
                "when those are done",
                file=sys.stderr,
            )
    return failed, cells


def _measure_all(job: Job, cells: Sequence[Cell], workers: int) -> list[tuple[str, str]]:
    """Run every cell whose pretraining is there; return what failed and why."""
    from agssd.commands.bench.cells import train_and_measure
    from agssd.commands.bench.probes import probe

    ready = [cell for cell in cells if cell.pretraining is None or cell.pretraining.is_done]
    work: dict[str, Task] = {cell.name: (train_and_measure, cell, job) for cell in ready if cell.fit}
    probes: dict[str, list[Cell]] = {}
    for cell in ready:
        if not cell.fit:
            place = "" if cell.fold is None else f", fold {cell.fold}"
            one = job.bench.readouts[cell.readout]
            features = f"window {'x'.join(map(str, one.window_vox))}, {one.depths} depth{'s' * (one.depths == 'all')}"
            probes.setdefault(f"probes of {cell.method}, seed {cell.seed}{place}, {features}", []).append(cell)
    tasks: dict[str, Task] = {name: (probe, group, job) for name, group in probes.items()}
    return side_by_side(tasks | work, workers, _PRELOADED)


def _pretrain(
    job: Job, cells: Sequence[Cell], workers: int, before: Sequence[str] = ()
) -> tuple[list[tuple[str, str]], list[str]]:
    """Run the pretrainings whose steps are known and that are not ``before``; return failures and names."""
    from agssd.commands.bench.cells import pretrain

    known = [one for one in _pretrainings(cells) if one.command and one.name not in before]
    tasks: dict[str, Task] = {one.name: (pretrain, one, job) for one in known}
    return side_by_side(tasks, workers, _PRELOADED), [one.name for one in known]


def _tables(
    bench: Bench, cells: Sequence[Cell], args: argparse.Namespace, notes: Sequence[tuple[str, str]] = ()
) -> None:
    """Write rows, tables with notes beneath, and curves from what is done, and say what is missing."""
    from agssd.commands.bench.curves import draw
    from agssd.commands.bench.records import state_of
    from agssd.commands.bench.results import read_rows, write_rows
    from agssd.commands.bench.tables import by_class, markdown
    from agssd.whole_file import whole_file

    rows = read_rows(cells)
    if rows:
        write_rows(rows, args.out)
        text = "\n\n".join([markdown(bench, rows), *(f"{name.capitalize()}: {value}." for name, value in notes)])
        command = " ".join(["agssd", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])])
        with whole_file(args.out / "tables.md") as path:
            path.write_text(f"`{command}`\n\n{text}\n", encoding="utf-8")
        if classes := by_class(bench, rows):
            with whole_file(args.out / "classes.md") as path:
                path.write_text(f"{classes}\n", encoding="utf-8")
        draw(bench, rows, args.out / "curves.png")
        more = "classes.md, " if classes else ""
        print(f"\n{text}\n\nwritten: {args.out / 'tables.md'}, {more}curves.png, rows.csv and subjects.csv")
    else:
        print("no cell is done, so there are no tables yet", file=sys.stderr)
    if len(rows) < len(cells):
        print(f"{len(cells) - len(rows)} of {len(cells)} cells are missing from the tables", file=sys.stderr)
    if others := [cell for cell in cells if state_of(cell) == "other"]:
        print(f"{len(others)} of them were made with other settings, such as {others[0].folder}", file=sys.stderr)
