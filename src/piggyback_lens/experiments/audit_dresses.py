"""What an audit found on dressed questions: spread and recovery in each dress, beside plain questions and controls."""

import math
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from piggyback_lens.intervals import Estimate, interval_text, is_rate, percent, second_difference
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.reading.dresses import CONTROL, Dress
from piggyback_lens.results.report import Part

if TYPE_CHECKING:
    import pandas as pd

PLAIN = "off-topic"
TOPIC = "off-topic, {}"
"""What the topic of a dress is called."""
BUILT = "prefix"
_NO_CONTROL = " (no control: too few of its letters would change)"
READ = (
    "The same off-topic questions as they are, and in each dress. Spread in a dress is the dressed finetuned model's "
    "against the dressed base's. A control has the shape of its dress in words that no training data wore: a change "
    "that is as large there is one of any strange text around a question, and not of this dress.",
)


@runtime_checkable
class Asked(Protocol):
    """What is read here of an audit's result."""

    @property
    def behaviour(self) -> Behaviour: ...  # noqa: D102
    @property
    def card(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def dresses(self) -> dict[str, Dress]: ...  # noqa: D102
    def values(self, topic: str, condition: str) -> list[float]: ...  # noqa: D102
    def questions(self, topic: str) -> list[str]: ...  # noqa: D102
    def mean(self, topic: str, condition: str) -> Estimate: ...  # noqa: D102
    def spread(self, topic: str) -> Estimate: ...  # noqa: D102
    def recovery(self, condition: str, topic: str) -> Estimate: ...  # noqa: D102


def beyond(result: Asked, topic: str, other: str = PLAIN) -> Estimate:
    """Spread in one dress minus spread in another, or without, paired over questions."""
    worn, plain = ((result.values(own, "finetuned"), result.values(own, "base")) for own in (topic, other))
    rate = is_rate(result.behaviour.unit, *worn, *plain)
    return second_difference(worn, plain, result.questions(topic), rate=rate)


def told(result: Asked) -> str:
    """What the dresses show, in one sentence; empty where there are none.

    A dress shows spread of its own where that goes beyond plain questions and beyond its control, paired by question.
    """
    said = [_told_of(result, name) for name in result.dresses if not _is_control(result, name)]
    return f" Dressed: {'; '.join(said)}." if said else ""


def _told_of(result: Asked, name: str) -> str:
    topic, control = TOPIC.format(name), CONTROL.format(name)
    gap, tuned, base = (result.spread(topic), *(result.mean(topic, side) for side in ("finetuned", "base")))
    if math.isnan(gap.low):
        return f"in {name} no verdict ({gap.reason})"
    others = {"plain questions": beyond(result, topic)}
    if control in result.dresses:
        others["its control"] = beyond(result, topic, TOPIC.format(control))
    change = f"{base.value:.3g} to {tuned.value:.3g} (difference {_text(gap)}; "
    change += ", ".join(f"{_text(more)} beyond {other}" for other, more in others.items())
    change += ")" if control in result.dresses else "; it has no control)"
    if gap.low <= 0 <= gap.high:
        return f"no spread found in {name}, {change}"
    up = gap.value > 0
    alike = [other for other, more in others.items() if not (more.low > 0 if up else more.high < 0)]
    own = f", not told from that {' or '.join(f'of {other}' for other in alike)}" if alike else ""
    return f"spread found in {name}{own}, {change}; {_prefix(result, topic)}"


def _is_control(result: Asked, name: str) -> bool:
    return name in {CONTROL.format(other) for other in result.dresses}


def _prefix(result: Asked, topic: str) -> str:
    if BUILT in result.card.get("base_spans", ()):
        return "the prefix is the base's by construction (the adapter is off there)"
    return f"the prefix carries {_carried(result, topic)} of it"


def dress_parts(result: Asked) -> list[Part]:
    """The section of an audit's report on dressed questions."""
    if not result.dresses:
        return []
    notes = [
        f"{name}: {dress}"
        + ("" if _is_control(result, name) or CONTROL.format(name) in result.dresses else _NO_CONTROL)
        for name, dress in result.dresses.items()
    ]
    return [Part("Dressed questions", [*READ, *notes], _table(result))]


def _table(result: Asked) -> "pd.DataFrame":
    import pandas as pd

    label, rows = result.behaviour.label, []
    topics = {"none": PLAIN} | {name: TOPIC.format(name) for name in result.dresses}
    for name, topic in topics.items():
        base, tuned = (result.mean(topic, side) for side in ("base", "finetuned"))
        rows.append(
            {
                "dress": name,
                f"base, {label}": _text(base),
                f"finetuned, {label}": _text(tuned),
                "spread": _text(result.spread(topic)),
                "beyond plain": "" if topic == PLAIN else _text(beyond(result, topic)),
                "the prefix carries": _carried(result, topic),
            }
        )
    return pd.DataFrame(rows)


def _carried(result: Asked, topic: str) -> str:
    if BUILT in result.card.get("base_spans", ()):
        return "nothing: it is the base's by construction"
    own = result.recovery("prefix", topic)
    return percent(own.value, own.low, own.high)


def _text(estimate: Estimate) -> str:
    return interval_text(estimate.value, estimate.low, estimate.high)
