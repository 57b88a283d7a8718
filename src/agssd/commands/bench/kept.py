"""``settings.json`` of a bench: what was compared and on what, so that its page can be made anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from agssd.commands.bench.cells import Cell, list_cells
from agssd.commands.bench.settings import Bench, bench_of
from agssd.whole_file import whole_file

KEPT = "settings.json"


@dataclass(frozen=True)
class Kept:
    """What lies beside the rows.

    Args:
        bench: the settings.
        data: name and value of what is worth knowing of the cache, without its path and its keys.
        marks: of each cell, by its folder in the directory of the bench.
        taken_from: folders whose runs these are, where none was made here.
    """

    bench: Bench
    data: list[tuple[str, str]]
    marks: Mapping[str, str]
    taken_from: Sequence[str] = ()

    def cells(self, out: Path) -> list[Cell]:
        """Return the cells with the marks that they had, wherever YAML files and cache are now."""
        found = list_cells(self.bench, "", out)
        return [replace(cell, mark=self.marks.get(_place(cell, out), "")) for cell in found]


def keep(
    bench: Bench, data: Sequence[tuple[str, str]], cells: Sequence[Cell], out: Path, taken_from: Sequence[str] = ()
) -> None:
    """Write what was compared beside the results."""
    marks = {_place(cell, out): cell.mark for cell in cells}
    plain = {"bench": asdict(bench), "data": list(data), "marks": marks, "taken_from": list(taken_from)}
    with whole_file(out / KEPT) as path:
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def kept(out: Path) -> Kept:
    """Return what lies beside the results.

    Raises:
        ValueError: if it cannot be read.
    """
    path = out / KEPT
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        data = [(name, value) for name, value in plain["data"]]
        return Kept(bench_of(plain["bench"]), data, plain["marks"], plain.get("taken_from", ()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no settings of a bench: {error}") from error


def refuse_taken_over(out: Path) -> None:
    """Refuse to run cells where the results of others lie.

    Raises:
        ValueError: naming them.
    """
    if (out / KEPT).is_file() and (others := kept(out).taken_from):
        raise ValueError(
            f"--out {out} holds runs of {', '.join(others)} by --results; give another one to run cells in"
        )


def _place(cell: Cell, out: Path) -> str:
    return cell.folder.relative_to(out).as_posix()
