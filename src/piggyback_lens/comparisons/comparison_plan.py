"""What a comparison runs: the plan that all cells share, a cell of the grid, and where each lies in the folder."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from piggyback_lens.comparisons.methods import Method
from piggyback_lens.conversations.chat import DEFAULT
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json
from piggyback_lens.models.sources import weights_fingerprint
from piggyback_lens.reading.dresses import Dress, as_dresses, dressed, with_controls
from piggyback_lens.reading.questions import Question
from piggyback_lens.reading.tasks import Task
from piggyback_lens.settings import CompareSettings, LoadSettings, check_field

Source = str | Callable[[], tuple[Any, Any]]
"""A model folder, hub id or GGUF file; or a top-level function that returns (transformers model, tokenizer)."""
BASE_FILE, CELL_FILE = "answers.json", "cell.json"


@dataclass(frozen=True)
class Plan:
    """What all cells of a comparison share.

    Attributes:
        source: of the base.
        task: what is learned.
        settings: of the comparison.
        retain: prompts that the base answers as retain data.
        load: how the base's weights are loaded; a function that gives the model loads them itself.
        topics: what is measured: "on", "off", and "off[NAME]" for each dress of the settings and its control.
    """

    source: Source
    task: Task
    settings: CompareSettings = field(default_factory=CompareSettings)
    retain: tuple[str, ...] = ()
    load: LoadSettings = field(default_factory=LoadSettings)
    topics: dict[str, Dress | None] = field(init=False)

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self.load).items() if name != "offline"}
        if self.load.device_map is not None:
            raise LensError("device_map does not go with a comparison: a cell is trained on one device; give device=")
        if callable(self.source) and LoadSettings(**given) != LoadSettings():
            raise LensError(f"{self.source.__qualname__} loads the model itself: leave load= out but for offline")
        worn = with_controls(as_dresses(self.settings.dresses))
        topics = {"on": None, "off": None} | {f"off[{name}]": dress for name, dress in worn.items()}
        object.__setattr__(self, "topics", topics)

    def questions(self, topic: str) -> Sequence[str | Question]:
        """What is asked of a topic: its prompts, in their dress where it has one."""
        dress = self.topics[topic]
        return self.prompts(topic) if dress is None else dressed(self.prompts("off"), dress)

    def prompts(self, topic: str) -> tuple[str, ...]:
        """The first `n_prompts` of a topic in this split.

        Raises:
            LensError: the task has fewer.
        """
        if topic == "off":
            found = self.task.off_topic if self.settings.split == "test" else self.task.off_topic_validation
        elif self.settings.split == "test":
            found = self.task.on_topic
        else:
            found = tuple(question_of(example) for example in self.task.validation)
        if len(found) < self.settings.n_prompts:
            raise LensError(
                f"task {self.task.name} has {len(found)} {topic}-topic {self.settings.split} prompts, n_prompts is "
                f"{self.settings.n_prompts}: lower it"
            )
        return found[: self.settings.n_prompts]

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, beside the cell; JSON-able."""
        training = {name: value for name, value in self.settings.training.identity().items() if name != "seed"}
        measured = ("split", "n_prompts", "max_new_tokens", "samples", "temperature", "n_texts", "text_length")
        names = (*measured, "text_source", "direction_examples")
        facts = {name: getattr(self.settings, name) for name in names}
        facts |= {"task": self.task.name, "data": hash_of(asdict(self.task)), "retain": hash_of(self.retain)}
        facts |= {"training": training, "lora": asdict(self.settings.lora)}
        if worn := {topic: asdict(dress) for topic, dress in self.topics.items() if dress is not None}:
            facts["dresses"] = worn
        if weighed := {name: str(getattr(self.load, name)) for name in _WEIGH if self._asks(name)}:
            facts["load"] = weighed
        if self.settings.trainer != "own":
            facts["trainer"] = self.settings.trainer
        facts |= _of_source(self.source)
        if self.settings.text_source is not None and Path(self.settings.text_source).is_file():
            facts["texts"] = hashlib.sha256(Path(self.settings.text_source).read_bytes()).hexdigest()[:16]
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    def _asks(self, name: str) -> bool:
        return bool(getattr(self.load, name) != getattr(LoadSettings(), name))


_WEIGH = ("dtype", "quantization", "attn_implementation")
"""Ways to load that decide the numbers. At their defaults they are left out, so that older folders go on."""


@dataclass(frozen=True)
class Cell:
    """One finetune of the grid."""

    method: Method
    seed: int = 0
    system: str | None = DEFAULT  # system text of training and measurement; "default" leaves it to the template
    share: float = 1.0  # of the training questions with the trained answer; the others have the base's own
    size: int | None = None  # training questions, drawn by the seed; None for all
    epochs: float | None = None  # passes over them instead of the plan's number of steps

    def __post_init__(self) -> None:
        check_field(self, "share", 0 < self.share <= 1, "a share above 0, at most 1")
        check_field(self, "size", self.size is None or self.size >= 1, "an integer of at least 1, or None")
        check_field(self, "epochs", self.epochs is None or self.epochs > 0, "a positive number, or None")
        check_field(self, "seed", self.seed >= 0, "an integer of at least 0")

    @property
    def axes(self) -> dict[str, Any]:
        """Where it lies in the grid beside method and seed."""
        return {name: getattr(self, name) for name in ("system", "share", "size", "epochs")}

    def settings(self) -> dict[str, Any]:
        """JSON-able."""
        facts = {"method": self.method.settings(), "seed": self.seed, **self.axes}
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    @property
    def name(self) -> str:
        """Of its folder: readable, and one of its own."""
        shown = "".join(c if c.isalnum() or c in ".=-" else "_" for c in self.method.label)[:60]
        return f"{shown}_seed{self.seed}_{hash_of(self.settings())[:8]}"


def system_name(system: str | None) -> str:
    """Of a system prompt's folder."""
    return "no_system" if system is None else "default" if system == DEFAULT else f"system_{hash_of(system)[:8]}"


def base_folder(out: str | Path, system: str | None) -> Path:
    """Where the base's part of the cells with this system prompt lies."""
    return Path(out) / "base" / system_name(system)


def cell_folder(out: str | Path, cell: Cell) -> Path:
    """Where a cell lies: cell.json and adapter/ when it is finished."""
    return Path(out) / "cells" / cell.name


def question_of(example: Mapping[str, Any]) -> str:
    """The last user message of a training conversation."""
    return str([m["content"] for m in example["messages"] if m["role"] == "user"][-1])


def hash_of(value: object) -> str:
    """16 hex digits of JSON-able content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _of_source(source: Source) -> dict[str, Any]:
    """Which model it is, without loading it. Files are told apart by what they hold, wherever they lie."""
    if callable(source):
        return {"model": f"{source.__module__}.{source.__qualname__}"}
    if not Path(source).exists():
        return {"model": source}  # a hub id
    return {"weights": weights_fingerprint(source), "reading": reading_fingerprint(source)}


def reading_fingerprint(path: str | Path) -> str:
    """Of how weights and conversations are read: config and chat template, without what a library says of itself."""
    folder = Path(path)
    config, tokenizer = (_json(folder / name) for name in ("config.json", "tokenizer_config.json"))
    facts = {name: value for name, value in config.items() if name != "transformers_version" and name[0] != "_"}
    templates = {file.name: file.read_text("utf-8") for file in sorted(folder.glob("*.jinja"))}
    return hash_of([facts, templates, tokenizer.get("chat_template")])


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
