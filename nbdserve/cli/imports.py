"""Importing the module of a command, which is most of the time a short command takes."""

from __future__ import annotations

import gc
from importlib import import_module
from types import ModuleType


def import_for_good(name: str) -> ModuleType:
    """``import_module``, without looking for garbage among what is imported, then or later: all of it stays."""
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()
