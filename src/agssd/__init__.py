"""Anatomy-guided self-supervised distillation for 3D medical images."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["VolumeCache", "__version__", "export_backbone", "load_backbone"]

if TYPE_CHECKING:
    from agssd.data_modules.cache import VolumeCache
    from agssd.hub import export_backbone, load_backbone
else:
    _HOMES = {
        "VolumeCache": "agssd.data_modules.cache",
        "export_backbone": "agssd.hub",
        "load_backbone": "agssd.hub",
    }

    def __getattr__(name: str) -> object:
        """Import a public name on first use, so that ``import agssd`` stays light."""
        if name in _HOMES:
            from importlib import import_module

            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'agssd' has no attribute {name!r}")
