"""Puts made-up modules where an engine's would be, so that its connector can be imported without it."""

import importlib.util
import sys
import types
from typing import Any


def put(contents: dict[str, dict[str, Any]]) -> None:
    """Makes modules of these names and members, unless the real package is installed."""
    for name, members in contents.items():
        top = name.split(".")[0]
        known = sys.modules.get(top)
        spec = importlib.util.find_spec(top) if known is None else None  # a folder of tests of this name has no origin
        if getattr(known, "__file__", None) or (spec is not None and spec.origin):
            continue
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(sys.modules[name]).update(members)
