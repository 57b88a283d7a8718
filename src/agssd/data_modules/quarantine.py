"""Broken scans met while training, counted and listed where the user chose to go on without them."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path

from agssd.data_modules.cache import CaseInfo

_LOG = logging.getLogger(__name__)
FILE_NAME = "quarantine.csv"


class QuarantineList:
    """Lists each broken case once in ``DIR/quarantine.csv`` (key, cache number, first sample) and warns of it once.

    Every rank appends what it meets; a case that two ranks meet at the same moment may stand there twice.

    Attributes:
        num_replaced: samples of this process that were drawn from another case since it began.
    """

    def __init__(self, directory: Path) -> None:
        """Write nothing before the first broken case."""
        self.path = directory / FILE_NAME
        self.num_replaced = 0
        self._known: set[str] = set()

    def note(self, sample: int, cache: int, info: CaseInfo) -> None:
        """Record that case ``info`` of the ``cache``-th cache could not be read for a sample."""
        if info.key in self._known:
            return
        self._known.add(info.key)
        if info.key in self._listed():
            return
        new = not self.path.exists()
        line = ("case,cache,first_sample\n" if new else "") + f"{info.key},{cache},{sample}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
        _LOG.warning(
            "case %s of cache number %d of data.cache (from 0) cannot be read; its samples are drawn from other cases "
            "of that cache, and it is listed in %s; prepare the cache again",
            *(info.key, cache, self.path),
        )

    def _listed(self) -> set[str]:
        if not self.path.is_file():
            return set()
        with self.path.open(newline="") as file:
            return {row["case"] for row in csv.DictReader(file) if row.get("case")}
