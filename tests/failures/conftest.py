"""One thread and a quiet Lightning for every test of this folder."""

from __future__ import annotations

from recipes import quiet_and_on_one_thread  # noqa: F401  (a fixture: pytest finds it by its name here)
