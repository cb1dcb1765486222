"""An aim in place of a budget: a value that a metric of the behaviour is to reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

from steer2edit.errors import DataError


@dataclass(frozen=True)
class Aim:
    """A value that a metric of the behaviour is to reach; without a name, the behaviour's own metric."""

    metric: str
    value: float

    @classmethod
    def read(cls, text: str) -> Aim:
        """An aim from ``length=40``, or from ``40`` for the behaviour's own metric. Raises DataError for another form."""
        name, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if bool(equals) != bool(name.strip()) or not math.isfinite(number):
            raise DataError(
                f"the aim {text!r} is not of the form METRIC=VALUE, such as length=40 or margin=0.2, or a value alone for the "
                "behaviour's own metric"
            )
        return cls(name.strip(), number)

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}" if self.metric else f"{self.value:g}"
