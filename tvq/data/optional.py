"""Packages that only some data need: the one place that imports them."""

import importlib
from typing import Any

from tvq.errors import InputError


def load(package: str) -> Any:
    """The module `package`. InputError: it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"this data needs the package {package.partition('.')[0]!r}, which is not installed;"
            " pip install 'tvq[data]'"
        ) from error
