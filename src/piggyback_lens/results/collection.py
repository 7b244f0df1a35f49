"""Collection: the results of several experiments of one run, each in a folder of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.results.report import Part, Report
from piggyback_lens.results.result import Result, load_result
from piggyback_lens.results.run import RESULT

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class Collection(Result):
    """Results that belong together, by the name of the folder that each has beside this one's file.

    Attributes:
        parts: the results.
        title: of the report.
        examples: rows prompt, condition, response, for the report.
        notes: what a reader should know.
    """

    name: ClassVar = "collection.1"
    in_folder: ClassVar = True
    parts: Mapping[str, Result]
    title: str
    examples: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What each part says, a line each."""
        return "\n".join(f"{part}: {result.verdict}" for part, result in self.parts.items())

    def to_frame(self) -> "pd.DataFrame":
        """The parts' frames under each other, with the column `part` first."""
        import pandas as pd

        frames = [result.to_frame().assign(part=part) for part, result in self.parts.items()]
        whole = pd.concat(frames, ignore_index=True)
        return whole[["part", *(name for name in whole if name != "part")]]

    def figure(self) -> "go.Figure":
        """The figure of the first part."""
        return next(iter(self.parts.values())).figure()

    def report(self) -> Report:
        """Every part as a section of its own: what it says, its table and its figures."""
        import pandas as pd

        own = {name: result.report() for name, result in self.parts.items()}
        parts = [
            Part(name.capitalize(), [shown.verdict, *shown.notes], shown.summary, shown.figures)
            for name, shown in own.items()
        ]
        parts += [more for shown in own.values() for more in shown.parts]
        examples = pd.DataFrame(self.examples)
        return Report(self.title, self.verdict, pd.DataFrame(), (), examples, self.notes, parts=parts)

    def save(self, path: str | Path) -> Path:
        """Write what the parts' own files do not say: their names, the verdict, examples and notes."""
        facts = {"parts": list(self.parts), "title": self.title, "examples": self.examples, "notes": self.notes}
        return write_json(path, {"format": f"piggyback_lens.{self.name}", "verdict": self.verdict, **facts})

    @classmethod
    def load(cls, folder: str | Path) -> "Collection":
        """Read a folder and the results in it.

        Raises:
            LensError: no collection, or a part that is not there.
        """
        file = Path(folder) / RESULT
        saved = read_json(file)
        try:
            if saved["format"] != f"piggyback_lens.{cls.name}":
                raise LensError(f"{file} is of format {saved['format']!r}, expected {cls.name}")
            parts = {str(part): load_result(Path(folder) / str(part)) for part in saved["parts"]}
            return cls(parts, str(saved["title"]), tuple(saved["examples"]), tuple(saved["notes"]))
        except (KeyError, TypeError) as error:
            raise LensError(f"{file} is no collection of results ({error}): run the experiments again") from error
