"""Checkpoints: checked before they are loaded, and loaded straight to a device."""

from .checkpoint import check_folder
from .weights import load

__all__ = ["check_folder", "load"]
