"""A model provider for Inspect: base, finetuned, patched and steered models as `piggyback/...`.

    inspect eval task.py --model piggyback/finetuned -M adapter=demo_out/organism/adapter

Inspect finds it by the entry point of its name. `docs/inspect.md` says what is supported and what is refused.
"""

import dataclasses
import hashlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakValueDictionary

from piggyback_lens.errors import LensError
from piggyback_lens.settings import ChatSettings, LoadSettings, Settings, check_field
from piggyback_lens.words import Backend, Side

if TYPE_CHECKING:
    from concurrent.futures import Future

    from piggyback_lens.app.answer_queue import AnswerQueue, Condition, Request
    from piggyback_lens.conversations.chat import RenderedPrompt
    from piggyback_lens.measuring.generation import Generation
    from piggyback_lens.measuring.sampling import Sampling

Name = Literal["base", "finetuned", "patched", "steered"]
NAMES: tuple[Name, ...] = get_args(Name)
ONLY_FOR = {
    "prefix_cache": "patched",
    "solution": "steered",
    "strength": "steered",
    "layer": "steered",
    "side": "steered",
}
"""Model arguments that mean something to one model only."""
MAX_TOKENS = 2048
"""Of an answer, where nobody says: that of Inspect's own local providers."""
READ = {"temperature", "top_p", "top_k", "max_tokens", "seed", "stop_seqs", "num_choices"}
"""What is taken from a GenerateConfig."""
NO_MATTER = {
    "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections",
    "system_message", "max_tool_output", "parallel_tool_calls", "internal_tools", "cache_prompt", "reasoning_history",
    "fail_on_refusal", "cache", "batch",
}  # fmt: skip
"""What Inspect acts on itself, or what cannot change a text that is generated here. All else is refused by name."""

_log = logging.getLogger(__name__)
_queues: "WeakValueDictionary[str, AnswerQueue]" = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class ProviderSettings(Settings):
    """Which models there are, and how they are asked.

    Attributes:
        base: hub id, folder or .gguf of the unfinetuned model; demo for the demo model.
        adapter: PEFT adapter of the finetune.
        finetuned: whole finetuned model, instead of an adapter.
        prefix_cache: folder of a saved prefix cache, as an audit leaves one; None computes the base's prefix for every
            system text that comes.
        solution: a direction or an adapter in any format of `load_solution`.
        strength: what the solution is multiplied by.
        layer: where a direction of one layer acts, or which one of several.
        side: the model that is steered.
        backend: bridge, or hooked for a HookedTransformer.
        batch_size: answers of one batch.
        pause_ms: milliseconds without a new request after which a batch is begun that is not full.
        unsaid: how tokens are chosen where the task says nothing: greedy, or as the model's generation config has it.
        draws: prompt, where equal prompts get equal texts in one epoch; or sample, where the id of the sample counts.
    """

    base: str = "demo"
    adapter: str | None = None
    finetuned: str | None = None
    prefix_cache: str | None = None
    solution: str | None = None
    strength: float = 1.0
    layer: int | None = None
    side: Side = "base"
    backend: Backend = "bridge"
    batch_size: int = 16
    pause_ms: float = 20.0
    unsaid: Literal["greedy", "model"] = "greedy"
    draws: Literal["prompt", "sample"] = "prompt"

    def _check(self) -> None:
        check_field(self, "batch_size", self.batch_size >= 1, "at least 1")
        check_field(self, "pause_ms", self.pause_ms >= 0, "0 or more")
        if self.adapter is not None and self.finetuned is not None:
            raise LensError("adapter and finetuned are given: one of them says what the finetuned model is")

    @property
    def has_finetune(self) -> bool:
        """Whether there is a pair."""
        return self.adapter is not None or self.finetuned is not None


Given = tuple[ProviderSettings, LoadSettings, ChatSettings]


def read_arguments(name: str, arguments: Mapping[str, Any]) -> Given:
    """The model arguments (`-M NAME=VALUE`, or keywords of `get_model`) as settings.

    Raises:
        LensError: a model that there is not, an argument that is not known or has no effect, or one that is missing.
    """
    if name not in NAMES:
        raise LensError(f"piggyback/{name} is not known: choose piggyback/ and one of {', '.join(NAMES)}")
    kinds: tuple[type[Any], ...] = (ProviderSettings, LoadSettings, ChatSettings)
    fields = {field.name: kind for kind in kinds for field in dataclasses.fields(kind)}
    if unknown := sorted(set(arguments) - set(fields)):
        raise LensError(f"model argument {unknown[0]!r} is not known: choose from {', '.join(fields)}")
    if idle := [given for given in arguments if ONLY_FOR.get(given, name) != name]:
        raise LensError(f"{idle[0]} has no effect on piggyback/{name}: it belongs to piggyback/{ONLY_FOR[idle[0]]}")
    given = dict(arguments)
    if given.get("system") == "none":
        given["system"] = None
    given |= {key: float(given[key]) for key in ("strength", "pause_ms") if type(given.get(key)) is int}
    models, load, chat = (kind(**{k: v for k, v in given.items() if fields[k] is kind}) for kind in kinds)
    if not models.has_finetune and (name in ("finetuned", "patched") or models.side == "finetuned"):
        raise LensError(f"piggyback/{name} needs a finetuned model: give adapter= or finetuned= (-M adapter=FOLDER)")
    if name == "steered" and models.solution is None:
        raise LensError("piggyback/steered needs what it is steered with: give solution= (-M solution=FILE)")
    return models, load, chat


def open_queue(settings: ProviderSettings, load: LoadSettings) -> "AnswerQueue":
    """The loaded models behind their queue; models of the same arguments share one, whatever is done to them."""
    from piggyback_lens.app.answer_queue import AnswerQueue
    from piggyback_lens.app.options import ModelOptions, PairOptions

    where = (settings.base, settings.adapter, settings.finetuned, settings.backend)
    key = repr((where, settings.batch_size, settings.pause_ms, load))
    queue = _queues.get(key)
    if queue is None:
        models: Any
        backend = settings.backend
        if settings.has_finetune:
            models, chat = PairOptions(backend, load, adapter=settings.adapter, finetuned=settings.finetuned).pair(
                settings.base
            )
        else:
            options = ModelOptions(backend, load)
            source, chat = options.chat_format(settings.base)
            models = options.model(source, chat)
        pause = settings.pause_ms / 1000
        queue = _queues[key] = AnswerQueue(models, chat.tokenizer, batch_size=settings.batch_size, pause=pause)
    return queue


def condition_of(name: str, settings: ProviderSettings, queue: "AnswerQueue") -> "Condition":
    """What is done to the model.

    Raises:
        LensError: a prefix cache that is meant for other models, or a solution that does not fit.
    """
    from piggyback_lens.app.answer_queue import Condition
    from piggyback_lens.app.inputs import moved_to
    from piggyback_lens.interventions.prefix import PrefixCache
    from piggyback_lens.vectors.direction import Direction
    from piggyback_lens.vectors.solution_files import load_solution

    if name == "patched":
        if settings.prefix_cache is None:
            return Condition("finetuned", repaired=True)
        with queue.using("finetuned") as model:
            return Condition("finetuned", prefix=PrefixCache.load(settings.prefix_cache, model=model))
    if name != "steered":
        return Condition("base" if name == "base" else "finetuned")
    solution = load_solution(settings.solution or "")
    if isinstance(solution, Direction):
        solution = solution if settings.layer is None else moved_to(solution, settings.layer)
        with queue.using(settings.side) as model:
            solution.check(model)
    elif settings.layer is not None:
        raise LensError(f"{settings.solution} is an adapter of layers {list(solution.layers)}: leave out layer")
    return Condition(settings.side, solution=solution.scaled(settings.strength))


# ---------------------------------------------------------------- what Inspect asks


def plain_messages(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Inspect's messages as those of `ChatFormat.render`.

    Raises:
        LensError: what is no text, a tool's call or result, or an answer at the end.
    """
    found = []
    for number, message in enumerate(messages):
        if message.role == "tool" or getattr(message, "tool_calls", None):
            raise LensError(f"message {number} is a tool's call or result: piggyback models have no tools")
        if not isinstance(message.content, str):
            kinds = sorted({part.type for part in message.content} - {"text"})
            if kinds:
                raise LensError(f"message {number} has content of type {kinds[0]}: piggyback models read text only")
        found.append({"role": message.role, "content": message.text})
    if found and found[-1]["role"] == "assistant":
        raise LensError("the last message is the assistant's: piggyback models begin their answers themselves")
    return found


def sampling_of(config: Any, unsaid: "Sampling") -> "Sampling":
    """How tokens are chosen under a GenerateConfig.

    Args:
        config: of Inspect.
        unsaid: holds where the config says nothing.

    Raises:
        LensError: an option that is not supported, or has no effect at temperature 0.
    """
    for name in sorted(set(type(config).model_fields) - READ - NO_MATTER):
        if getattr(config, name) and (name, getattr(config, name)) != ("best_of", 1):
            raise LensError(f"{name}={getattr(config, name)!r} is not supported by piggyback models: leave it out")
    said = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k", "seed")}
    chosen = dataclasses.replace(unsaid, **{name: value for name, value in said.items() if value is not None})
    if chosen.temperature == 0:
        if config.temperature is None and ((config.top_p or 1) < 1 or config.top_k):
            raise LensError("top_p and top_k have no effect on greedy answers: give a temperature too")
        if (config.num_choices or 1) > 1:
            raise LensError(f"{config.num_choices} choices at temperature 0 would be one answer: give a temperature")
    return chosen


def current_sample() -> tuple[int | str, int] | None:
    """Id and epoch of the sample that Inspect is running here; None outside of a task.

    A provider is told neither. Inspect's own cache of answers takes the epoch from the same place.
    """
    from inspect_ai.solver._task_state import sample_state

    state = sample_state()
    return None if state is None else (state.sample_id, state.epoch)


def sample_numbers(
    sample: tuple[int | str, int] | None, choices: int = 1, draws: Literal["prompt", "sample"] = "prompt"
) -> tuple[int, ...]:
    """The numbers by which `generate(samples=...)` draws the answers of a sample's epoch.

    Epoch 1 has the first numbers, epoch 2 the next: the same as those of `generate(n=epochs * choices)`.

    Args:
        sample: id and epoch.
        choices: answers that are wanted at once.
        draws: with "sample" the id counts too, so that equal prompts under different ids get different texts.
    """
    identifier, epoch = sample or ("", 1)
    start = 0
    if draws == "sample":
        start = int.from_bytes(hashlib.sha256(repr(identifier).encode()).digest()[:6], "big") << 24
    return tuple(range(start + (epoch - 1) * choices, start + epoch * choices))


class Answering:
    """One `piggyback/...` model: from Inspect's messages and config to a request, and from its answers to an output."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Load what the arguments name.

        Raises:
            LensError: what cannot be loaded, or does not fit.
        """
        from piggyback_lens.conversations.chat import DEFAULT, ChatFormat
        from piggyback_lens.measuring.sampling import Sampling

        self.name = name
        self.settings, load, chat = read_arguments(name, arguments)
        self.queue = open_queue(self.settings, load)
        self.condition = condition_of(name, self.settings, self.queue)
        with self.queue.using(self.condition.side) as model:
            self.unsaid = Sampling.of_model(model) if self.settings.unsaid == "model" else Sampling()
        self.chat = ChatFormat(self.queue.tokenizer, **vars(chat))
        # Without a system text of its own, a conversation that brings one still has it.
        self._chat_with_system = dataclasses.replace(self.chat, system=DEFAULT) if chat.system is None else self.chat
        self._asked: dict[tuple[Any, ...], int | str] = {}

    def request(self, messages: Sequence[Any], config: Any) -> "Request":
        """What is put into the queue for a conversation.

        Raises:
            LensError: what `plain_messages`, `sampling_of` and `ChatFormat.render` refuse.
        """
        from piggyback_lens.app.answer_queue import Request

        sampling, sample = sampling_of(config, self.unsaid), current_sample()
        numbers = sample_numbers(sample, config.num_choices or 1, self.settings.draws)
        prompt = self.prompt(plain_messages(messages))
        if sample is not None:
            self._watch(sample, prompt, sampling)
        room = self.queue.room(self.condition.side, prompt)
        most = config.max_tokens or MAX_TOKENS
        return Request(self.condition, prompt, numbers, sampling, most if room is None else min(most, room))

    def prompt(self, messages: list[dict[str, str]]) -> "RenderedPrompt":
        """A conversation, whose prefix is that of its first turn."""
        from piggyback_lens.app.answer_queue import with_first_prefix

        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), len(messages))
        chat = self._chat_with_system if messages and messages[0]["role"] == "system" else self.chat
        prompt, opening = chat.render(messages), chat.render(messages[: first + 1])
        length = len(opening.spans["prefix"])
        if self.condition.prefix is not None:
            length = min(length, len(self.condition.prefix))
        return with_first_prefix(prompt, length)

    def _watch(self, sample: tuple[int | str, int], prompt: "RenderedPrompt", sampling: "Sampling") -> None:
        """Say where several samples or epochs are one draw."""
        identifier, epoch = sample
        if sampling.temperature == 0:
            if epoch > 1 and ("greedy",) not in self._asked:
                self._asked["greedy",] = identifier
                _log.warning(
                    "piggyback/%s answers epoch %d greedily: equal prompts get the answers of epoch 1 again; a "
                    "temperature (--temperature 1) draws others",
                    self.name, epoch,
                )  # fmt: skip
        elif self.settings.draws == "prompt":
            first = self._asked.setdefault((hash(prompt.ids), epoch, sampling.seed), identifier)
            if first != identifier and ("twice",) not in self._asked:
                self._asked["twice",] = identifier
                _log.warning(
                    "samples %r and %r ask piggyback/%s the same in epoch %d, and get the same text: draws=sample "
                    "(-M draws=sample) makes them different draws",
                    first, identifier, self.name, epoch,
                )  # fmt: skip

    def output(self, request: "Request", answers: "Sequence[Generation]", config: Any, seconds: float) -> Any:
        """The answers as Inspect's ModelOutput; its metadata say how to draw them again."""
        from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage

        model = f"piggyback/{self.name}"
        whole = request.max_new_tokens >= (config.max_tokens or MAX_TOKENS)
        choices = []
        for answer in answers:
            text, found = _cut(answer.text, config.stop_seqs or ())
            ended = "stop" if found or answer.ended == "stop" else "max_tokens" if whole else "model_length"
            message = ChatMessageAssistant(content=text, model=model, source="generate")
            choices.append(ChatCompletionChoice(message=message, stop_reason=ended))
        asked, said = len(request.prompt.ids), sum(len(answer.ids) for answer in answers)
        return ModelOutput(
            model=model,
            choices=choices,
            usage=ModelUsage(input_tokens=asked, output_tokens=said, total_tokens=asked + said),
            time=seconds,
            metadata={"seed": request.sampling.seed, "samples": list(request.samples)},
        )

    def no_room(self) -> Any:
        """The output for a conversation that fills the model's context."""
        from inspect_ai.model import ModelOutput

        return ModelOutput.from_content(f"piggyback/{self.name}", "", stop_reason="model_length")


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of the stop sequences. What follows it is generated and thrown away."""
    places = [text.find(stop) for stop in stops if stop and stop in text]
    return (text[: min(places)], True) if places else (text, False)


async def _arrival(future: "Future[list[Generation]]") -> "list[Generation]":
    """What another thread puts into a future, under asyncio and trio alike."""
    import anyio
    from anyio.from_thread import run_sync
    from anyio.lowlevel import current_token

    arrived, token, here = anyio.Event(), current_token(), threading.get_ident()

    def wake(_: Any) -> None:
        if threading.get_ident() == here:
            arrived.set()
            return
        try:
            run_sync(arrived.set, token=token)
        except RuntimeError:  # the event loop has ended: nobody waits
            _log.debug("an answer came after the event loop had ended")

    future.add_done_callback(wake)
    try:
        await arrived.wait()
    finally:
        future.cancel()  # of a sample that was cancelled; an answer that is there stays
    return future.result()


def provider() -> type[Any]:
    """The class that Inspect makes models of; defined on demand, since it is a class of Inspect's."""
    from inspect_ai.model import GenerateConfig, ModelAPI

    class PiggybackAPI(ModelAPI):  # type: ignore[misc]
        """`piggyback/base`, `piggyback/finetuned`, `piggyback/patched` and `piggyback/steered`."""

        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: Any = GenerateConfig(),  # noqa: B008
            **model_args: Any,
        ) -> None:
            super().__init__(model_name, base_url, api_key, [], config)
            self.answering = Answering(model_name, model_args)

        async def generate(self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any) -> Any:
            if tools:
                raise LensError(f"tool {tools[0].name} is offered: piggyback models have no tools, leave them out")
            answering, began = self.answering, perf_counter()
            request = answering.request(input, config)
            if request.max_new_tokens < 1:
                return answering.no_room()
            answers = await _arrival(answering.queue.ask(request))
            return answering.output(request, answers, config, perf_counter() - began)

        async def tokenize(self, text: str) -> list[int]:
            ids: list[int] = self.answering.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        async def count_text_tokens(self, text: str) -> int:
            return len(await self.tokenize(text))

        def max_tokens(self) -> int | None:
            return MAX_TOKENS

        def max_connections(self) -> int:
            return int(self.answering.settings.batch_size)

        def collapse_user_messages(self) -> bool:
            return True

        def collapse_assistant_messages(self) -> bool:
            return True

        def collapse_system_messages(self) -> bool:
            return True

        def auto_reasoning_history(self) -> Literal["none", "all", "last"]:
            return "none"

    return PiggybackAPI


def register() -> None:
    """Tell Inspect of the provider."""
    from inspect_ai.model import modelapi

    make: Callable[[], type[Any]] = provider
    modelapi(name="piggyback")(make)


if importlib.util.find_spec("inspect_ai"):  # the module can be imported without the extra
    register()
