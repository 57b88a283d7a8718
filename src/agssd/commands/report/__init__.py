"""Write what a run or a bench did as one HTML page: curves, collapse dashboard, views, PCA, overlays, or tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``agssd report``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The page needs no network and holds no paths and no names; it does hold slices of scans (views, attention,\n"
        "PCA, overlays). Parts for which something is missing say what.\n\n"
        "  agssd report runs/ct --out report.html --cache ct.h5 --nifti maps/"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run or of a bench")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="page to write (replaced)")
    parser.add_argument("--title", help="heading of the page (default: the method)")
    parser.add_argument("--cache", type=Path, help="cache to show cases of (default: the run's)")
    parser.add_argument("--cases", type=int, metavar="N", help="cases with attention and PCA (default: 3)")
    parser.add_argument("--nifti", type=Path, metavar="FOLDER", help="write attention and PCA of these cases there too")
    parser.add_argument("--device", help="for the encoder (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its name; 1 with the reason on stderr if that fails."""
    from agssd.commands.report.bench_page import is_bench, write_bench
    from agssd.commands.report.write import Options, write_report

    try:
        if not is_bench(args.run) and (args.run / "cells").is_dir():
            raise ValueError(f"{args.run} holds shares of a bench; make its tables first by `agssd bench ... --tables`")
        if is_bench(args.run):
            _refuse_of_runs(args)
            print(write_bench(args.run, args.out, args.title))
            return 0
        cases = 3 if args.cases is None else args.cases
        options = Options(args.cache, cases, args.nifti, args.device or "cpu", args.title)
        told = write_report(args.run, args.out, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(told))
    return 0


def _refuse_of_runs(args: argparse.Namespace) -> None:
    given = {"--cache": args.cache is not None, "--cases": args.cases is not None, "--nifti": args.nifti is not None}
    given["--device"] = args.device is not None
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"{args.run} is a bench, whose page shows no scans; leave {', '.join(wrong)} out")
