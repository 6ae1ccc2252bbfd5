"""The error of this package, and how its sentences show values."""

import reprlib
from typing import Any


class PlanError(ValueError):
    """A plan that cannot be laid on the devices or the model at hand."""


def shorten(value: Any) -> str:
    """A value as a sentence shows it, cut short: aliases of YAML can expand to anything."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr(maxlevel=2, maxstring=100, maxother=100)
