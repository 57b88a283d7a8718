"""The ``agssd`` entry point: finds the subcommand, imports only what it needs, and turns refusals into one line.

``fit``, ``validate``, ``test`` and ``predict`` go to :class:`agssd.lightning_cli.AgssdCLI`; every other subcommand is a
module of :mod:`agssd.commands`. Importing this module is cheap on purpose: ``agssd --version`` must not wait for torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from agssd import __version__
from agssd.run.stop_signals import STOP

if TYPE_CHECKING:
    from agssd.commands import Fit

TRAINING = {
    "fit": "train a method or a task: agssd fit --config conf/experiment/NAME.yaml --data.cache PATH",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write the predictions of a task, in the space of the source scans",
}
EXIT_REFUSED = 2
EXIT_PIPE_CLOSED = 141  # as a shell reports a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``agssd ARGV`` and return the exit code.

    0 done; 2 refused (bad argument, data or file); 75 a training was told to stop by SIGUSR1 or SIGTERM and has saved
    itself, the same command goes on.

    A refusal is one message on stderr. ``--traceback`` anywhere, or AGSSD_TRACEBACK=1, shows where it came from; real
    bugs always keep their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments or os.environ.get("AGSSD_TRACEBACK", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is known, and not at the interpreter's end
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():  # agssd inspect CACHE | head
            return EXIT_PIPE_CLOSED
        message = None if show_traceback else refusal(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return EXIT_REFUSED


def _run(arguments: list[str]) -> int:
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"agssd {__version__}")
        return 0
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    return _dispatch(arguments[0], arguments[1:])


def _reader_has_gone() -> bool:
    """Return whether stdout is the broken pipe, and not one to a worker; if so, let nothing write to it any more."""
    try:
        print(end="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _dispatch(name: str, arguments: list[str]) -> int:
    if name in TRAINING:
        if name == "fit":
            STOP.listen()  # before the imports, which take seconds
        return _train(name, arguments)
    from agssd import commands

    if not commands.exists(name):
        known = ", ".join([*TRAINING, *commands.summaries()])
        raise ValueError(f"there is no subcommand {name!r}; choose from {known}")
    import argparse

    parser = argparse.ArgumentParser(prog=f"agssd {name}", description=commands.summaries()[name])
    command = commands.load(name)
    command.add_arguments(parser)
    if not getattr(command, "TAKES_FIT", False):
        return command.run(parser.parse_args(arguments))
    parser.allow_abbrev = False  # --data is fit's, and no short form of anything here
    parser.epilog = "Everything else on the command line is that of `agssd fit`; see `agssd fit --help`."
    own, of_fit = parser.parse_known_args(arguments)

    def parse(*more: str, before: Sequence[str] = (), new_directory: Path | None = None) -> Fit:
        _import_training()
        from agssd.lightning_cli import FinishedRun, ParsedFit

        try:
            return ParsedFit([*before, *of_fit, *more], new_directory)
        except FinishedRun as nothing_left:
            raise ValueError(str(nothing_left)) from nothing_left

    own.of_fit, own.fit = of_fit, parse
    return command.run(own)


def _train(name: str, arguments: list[str]) -> int:
    try:
        _import_training()
        from agssd.lightning_cli import AgssdCLI, FinishedRun

        try:
            return AgssdCLI([name, *arguments]).exit_code
        except FinishedRun as nothing_left:
            print(nothing_left)
            return 0
    finally:
        STOP.release()


def _import_training() -> None:
    """Import Lightning and torch without the garbage collector, which would walk their modules over and over.

    Measured on two cores: ``agssd fit --help`` 4.6 s without this, 2.9 s with it, half of it saved at the exit, where
    frozen objects are not walked either.
    """
    if "agssd.lightning_cli" in sys.modules:
        return
    import gc
    from importlib import import_module

    gc.disable()
    try:
        import_module("agssd.lightning_cli")
    finally:
        gc.freeze()
        gc.enable()


def _help() -> str:
    from agssd import commands

    lines = {**TRAINING, **commands.summaries()}
    width = max(len(name) for name in lines)
    body = "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
    return (
        "usage: agssd [--version] [--help] SUBCOMMAND ... [--traceback]\n\n"
        "Anatomy-guided self-supervised distillation for 3D medical images.\n\n"
        f"subcommands (agssd SUBCOMMAND --help for each):\n{body}"
    )


def refusal(error: Exception) -> str | None:
    """Return the message for the user if ``error`` is about what the user gave, None if it is a bug.

    A refusal is a failing file operation, a rejected command line or configuration, or a ValueError that agssd itself
    raised; a ValueError from inside a library is a bug until agssd says otherwise.
    """
    import argparse

    if isinstance(error, (OSError, ValueError)) and "in DataLoader worker process" in str(error):
        return str(error).rstrip().rpartition("\n")[2].partition(": ")[2]
    if isinstance(error, (argparse.ArgumentError, OSError)):
        return str(error)
    if type(error).__name__ == "MisconfigurationException":  # Lightning's; not imported here for its weight
        return str(error)
    if not isinstance(error, ValueError):
        return None
    # jsonargparse wraps what a constructor raises; the message for the user is the innermost one.
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ValueError) and _raised_by_agssd(inner.__traceback__):
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    return None


def _raised_by_agssd(traceback: TracebackType | None) -> bool:
    innermost = None
    while traceback is not None:
        innermost, traceback = traceback, traceback.tb_next
    if innermost is None:
        return False
    return Path(__file__).parent in Path(innermost.tb_frame.f_code.co_filename).parents


if __name__ == "__main__":
    sys.exit(main())
