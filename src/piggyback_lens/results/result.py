"""Result: what an experiment found, in one format on the disk, for people, frames and figures.

A result is a data class with `name` (of its kind and format version) and annotated fields. What is saved is JSON: the
format, the verdict for readers without the library, and the fields. What is loaded was checked: the format, and every
field against its annotation, by pydantic.
"""

import dataclasses
import html
import json
import math
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from piggyback_lens.errors import LensError, visible
from piggyback_lens.files import read_json, write_json
from piggyback_lens.results.report import Report
from piggyback_lens.words import Theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Own = TypeVar("Own", bound="Result")
KINDS: dict[str, str] = {
    "attribution": "experiments.attribution:AttributionResult",
    "audit": "experiments.audit:AuditResult",
    "collection": "results.collection:Collection",
    "comparison": "comparisons.comparison:Comparison",
    "curve": "directions.curve_points:Curve",
    "direction": "app.direction_training:TrainedDirection",
    "edges": "experiments.edges:EdgeResult",
    "em": "experiments.em_table:EMTable",
    "judges": "experiments.judge_sheet:JudgeSheet",
    "latent_attribution": "saes.latent_attribution:LatentAttribution",
    "onset": "experiments.onset:OnsetResult",
    "patch": "experiments.results:PatchResult",
    "perturb": "experiments.perturbation:PerturbResult",
    "soft_patch": "experiments.soft_patch:SoftPatchResult",
    "stress": "experiments.stress_suite:StressResult",
    "sweep": "directions.sweeps:Sweep",
    "training": "finetuning.training:TrainResult",
    "transfer": "directions.transfer:TransferResult",
}
"""Every kind of result, and where its class is: a new one is registered here."""
SHOWN_ROWS, SHOWN_TEXT = 8, 300
NUMBERS = ("value", "low", "high", "n")
"""Columns that every frame has."""


def _number(value: Any) -> Any:
    """JSON has null for a missing number, and no infinities."""
    return {None: math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value, value)


class _MayBeMissing:
    """Says so to pydantic, which is imported when a result is read."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(_number, handler(source))


Number = Annotated[float, _MayBeMissing()]
"""A number that may be missing (NaN) or infinite."""


class Result(ABC):
    """What an experiment found: numbers, a table, a figure, a verdict and a file.

    Attributes:
        name: of this kind of result and its format, such as "curve.1".
        in_folder: whether it is loaded from the folder of its run, of which it is a part.
    """

    name: ClassVar[str]
    in_folder: ClassVar[bool] = False
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    @property
    def verdict(self) -> str:
        """What it says, in one sentence; "" where it says nothing by itself."""
        return ""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """What was varied, then value, low, high, n, reason."""

    @abstractmethod
    def figure(self) -> "go.Figure":
        """The picture of this kind of result."""

    def save_figure(self, path: str | Path, *, theme: Theme = "light") -> Path:
        """Write the figure as .html, or as .svg, .png or .pdf, which kaleido draws with a Chrome.

        Args:
            path: its ending says the format.
            theme: light, or dark for slides and dark pages.

        Raises:
            LensError: another ending, or a picture where no Chrome is found.
        """
        from piggyback_lens.showing import save_figure

        return save_figure(self.figure(), path, theme=theme)

    def report(self) -> Report:
        """What its report shows, beside the run's own facts."""
        said = self.verdict or repr(self)
        kind = self.name.rpartition(".")[0].replace("_", " ")
        return Report(f"Piggyback lens: {kind}", said, self.to_frame(), [(said, self.figure())])

    def to_csv(self, path: str | Path) -> Path:
        """The frame as CSV. Text that a spreadsheet would run as a formula gets an apostrophe before it."""
        from piggyback_lens.files import atomic_write_text

        frame = self.to_frame().map(lambda x: f"'{x}" if isinstance(x, str) and x[:1] in "=+-@\t\r" else x)
        return atomic_write_text(path, frame.to_csv(index=False))

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return write_json(path, {"format": f"piggyback_lens.{self.name}", "verdict": self.verdict, **fields})

    @classmethod
    def load(cls: type[Own], path: str | Path) -> Own:
        """Read the file of a result that `Result.save` wrote.

        Raises:
            LensError: no file, a result of another kind or version, or fields of other types than they should have.
        """
        data = read_json(path)
        found = data.get("format") if isinstance(data, dict) else None
        if found != f"piggyback_lens.{cls.name}":
            what = f"is of format {found!r}" if isinstance(found, str) else "says no format (0.1.0 wrote none: see"
            what += "" if isinstance(found, str) else " piggyback-lens convert)"
            raise LensError(f"{path} {what}, expected {cls.name}: it is no {cls.__name__} of this version")
        return cls.from_fields({key: x for key, x in data.items() if key not in ("format", "verdict")}, path)

    @classmethod
    def from_fields(cls: type[Own], fields: dict[str, Any], path: str | Path) -> Own:
        """A result from its fields as JSON gives them, read from `path`.

        Raises:
            LensError: it names the first field that is missing, unknown or of another type.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            own: Own = TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
            own.check()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            told = f"{where}: {first['msg']}"
            raise LensError(f"{path} is no {cls.__name__} ({told}): run the experiment again") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise LensError(f"{path} is no whole {cls.__name__} ({error}): run the experiment again") from error
        return own

    def check(self) -> None:  # noqa: B027
        """Refuse, with any ValueError, fields that do not belong together."""

    def __repr__(self) -> str:
        text = visible(f"{type(self).__name__}({self.verdict or self._sizes()})")
        return text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 4]}...)"

    def _sizes(self) -> str:
        return f"{len(self.to_frame())} rows"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        told = frame.map(lambda x: visible(x) if isinstance(x, str) else x + 0.0 if isinstance(x, float) else x)
        # What is the same in all rows would push the numbers out of sight.
        alike = [name for name in told if name not in NUMBERS and told[name].astype(str).nunique() == 1]
        table = told.drop(columns=alike if len(told) > 1 else [])
        shown = table.head(SHOWN_ROWS).to_html(index=False, escape=True, border=0, float_format="{:.3g}".format)
        more = f"<p>{len(frame) - SHOWN_ROWS} more rows: to_frame()</p>" if len(frame) > SHOWN_ROWS else ""
        return f"<p><b>{html.escape(visible(self.verdict))}</b></p>{shown}{more}"


def load_result(path: str | Path) -> Result:
    """The result in a file, or in the folder of a run, whatever its kind.

    Raises:
        LensError: there is none, or none that this version knows.
    """
    path = Path(path)
    file = path / "result.json" if path.is_dir() else path
    data = read_json(file)
    found = str(data.get("format", "")) if isinstance(data, dict) else ""
    place = KINDS.get(found.removeprefix("piggyback_lens.").rpartition(".")[0])
    if place is None:
        raise LensError(f"{file} is of format {found!r}, known are the results {', '.join(KINDS)}")
    module, _, name = place.partition(":")
    kind: type[Result] = getattr(import_module(f"piggyback_lens.{module}" if "." in module else module), name)
    return kind.load(path if kind.in_folder and path.is_dir() else file)
