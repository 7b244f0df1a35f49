"""A gate for continuous integration: a command fails where a number of its result is beyond a bound.

`spread>0.1`, `spread.low>0.1` (the lower end of its interval), `spread[NAME]>0.1` (in a dress),
`recovery[prefix].low<0.5`, `mean[finetuned]>0.2`. Which end of the interval decides is the user's to say. Where the
number is undefined the gate fails too, and says why.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from piggyback_lens.errors import LensError
from piggyback_lens.experiments.audit_dresses import PLAIN, TOPIC
from piggyback_lens.intervals import Estimate

STATUS: Final = 3
"""Exit status of a command whose gate failed."""
_FORM: Final = re.compile(r"\s*(\w+)(?:\[([\w .-]+)\])?(?:\.(value|low|high))?\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*")
_RELATIONS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_NUMBERS: Final = ("spread", "recovery", "mean")
EXAMPLE: Final = "spread>0.1, spread.low>0.1, recovery[prefix].low<0.5 or mean[finetuned]>0.2"


@runtime_checkable
class Measured(Protocol):
    """What has the numbers: the result of an audit."""

    def spread(self, topic: str) -> Estimate:
        """Finetuned minus base, off-topic or in a dress."""

    def recovery(self, condition: str) -> Estimate:
        """How much of it a condition takes away."""

    def mean(self, topic: str, condition: str) -> Estimate:
        """The measure under one condition."""


@dataclass(frozen=True)
class Gate:
    """One bound: fail where the number is on this side of it."""

    text: str
    number: str
    condition: str
    end: str
    relation: str
    bound: float

    @classmethod
    def parse(cls, text: str, conditions: Sequence[str], dresses: Sequence[str] = ()) -> "Gate":
        """A gate from its text, before anything is loaded.

        Raises:
            LensError: another form, number, condition or dress.
        """
        found = _FORM.fullmatch(text)
        if found is None or found[1] not in _NUMBERS:
            raise LensError(f"--fail-if {text!r} cannot be read: write it as {EXAMPLE}")
        number, condition = found[1], found[2] or ""
        known = ("", *dresses) if number == "spread" else tuple(conditions)
        if condition not in known:
            worn = f"none, or a dress ({', '.join(dresses) or 'none is given'})"
            raise LensError(
                f"--fail-if {text!r}: spread has {worn} in brackets, recovery and mean one of {', '.join(conditions)}"
            )
        return cls(text.strip(), number, condition, found[3] or "value", found[4], float(found[5]))

    def reason(self, result: Measured) -> str | None:
        """Why the result fails, in one line; None where it passes."""
        if self.number == "spread":
            estimate = result.spread(TOPIC.format(self.condition) if self.condition else PLAIN)
        elif self.number == "recovery":
            estimate = result.recovery(self.condition)
        else:
            estimate = result.mean("off-topic", self.condition)
        found: float = getattr(estimate, self.end)
        if math.isnan(found):
            return f"gate {self.text}: cannot be told ({estimate.reason or 'there is no interval'})"
        if _RELATIONS[self.relation](found, self.bound):
            return f"gate {self.text}: it is {estimate}"
        return None
