"""A queue in front of one pair of models: requests that come one by one are answered in batches by one thread.

Programs that ask a model concurrently (Inspect, a server) send one conversation at a time, and a pass over sixteen rows
costs little more than a pass over one. What is waiting for the same condition under the same sampling goes through one
call of `generate`; no text depends on which requests it met.
"""

import atexit
import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.conversations.tokens import Span
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import AnyIntervention
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.measuring.sampling import Sampling
from piggyback_lens.models.backends import HookedModel, n_positions_of
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.vectors.adapters import Adapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction
from piggyback_lens.words import Side

IDLE_SECONDS = 5.0
"""The thread ends after so long without a request; the next one starts another."""
LAST_SECONDS = 30.0
"""How long the end of the program waits for the batch in progress."""
MAX_COMPILED = 64

_queues: "WeakSet[AnswerQueue]" = WeakSet()


@atexit.register
def _end() -> None:
    """End the threads before the interpreter does: one that is stopped within torch takes the process down with it."""
    for queue in list(_queues):
        queue.close()


@dataclass(frozen=True, eq=False)
class Condition:
    """A model as it is asked: which side, and what is done to it.

    Attributes:
        side: of the pair.
        prefix: keys and values that stand in for the beginning of every conversation.
        repaired: instead, those of the base, computed once for every system text that comes.
        solution: a direction that is added, or an adapter that acts, on every token; scaled and placed already.
    """

    side: Side
    prefix: PrefixCache | None = None
    repaired: bool = False
    solution: Adapter | None = None

    @property
    def interventions(self) -> AnyIntervention:
        """The solution as interventions, where it is a direction."""
        return self.solution.steer() if isinstance(self.solution, Direction) else None

    def adapted(self, model: HookedModel) -> Any:
        """A context in which the solution acts, where it is an adapter."""
        if self.solution is None or isinstance(self.solution, Direction):
            return nullcontext()
        return attached(model, self.solution)


@dataclass(frozen=True, eq=False)
class Request:
    """One conversation that wants answers.

    Attributes:
        condition: who answers.
        prompt: its prefix is that of the first turn (`with_first_prefix`).
        samples: the number of each answer; with the seed and the ids it decides a text.
        sampling: how tokens are chosen.
        max_new_tokens: of each answer.
        answers: comes when the request was answered.
    """

    condition: Condition
    prompt: RenderedPrompt
    samples: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    answers: "Future[list[Generation]]" = field(default_factory=Future)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind can be rows of one batch."""
        prefix = self.prompt.ids[: self.prompt.spans["prefix"].stop] if self.condition.repaired else ()
        return id(self.condition), self.sampling, self.max_new_tokens, prefix


class AnswerQueue:
    """Answers requests to a pair, or to one model that stands for the base.

    Example:
        >>> queue = AnswerQueue(pair, pair.tokenizer)
        >>> request = Request(Condition("finetuned"), prompts[0], (0,), Sampling(), max_new_tokens=4)
        >>> len(queue.ask(request).result())
        1
    """

    def __init__(
        self, models: ModelPair | HookedModel, tokenizer: Any, *, batch_size: int = 16, pause: float = 0.02
    ) -> None:
        """Make a queue; its thread starts with the first request.

        Args:
            models: a pair, or a hooked model, which is then the base.
            tokenizer: that of the models, with which prompts are rendered.
            batch_size: answers of one batch.
            pause: seconds without a new request after which a batch is begun that is not full.

        Raises:
            LensError: no row, or no time.
        """
        if batch_size < 1 or pause < 0:
            raise LensError(f"batch_size {batch_size}, pause {pause}: expected at least 1, and 0 seconds or more")
        self.models, self.tokenizer = models, tokenizer
        self.batch_size, self.pause = batch_size, pause
        self.batches: Counter[int] = Counter()
        """How many batches of each size there were."""
        self._waiting: list[Request] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._compiled: dict[tuple[int, ...], PrefixCache] = {}
        self._closed = False
        _queues.add(self)

    def ask(self, request: Request) -> "Future[list[Generation]]":
        """Put a request into the queue; it is checked here, so that it cannot spoil the batch of others.

        Raises:
            LensError: a side that there is not, or a prompt that does not begin with the condition's prefix.
        """
        with self.using(request.condition.side) as model:
            if request.condition.prefix is not None:
                request.condition.prefix.check(model, [request.prompt])
        if request.condition.repaired and not isinstance(self.models, ModelPair):
            raise LensError("the base's prefix goes into a finetuned model, and there is none: give adapter= too")
        with self._changed:
            if self._closed:
                raise LensError("this queue was closed: make another AnswerQueue")
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="piggyback_lens answers", daemon=True)
                self._thread.start()
            self._changed.notify()
        return request.answers

    def close(self) -> None:
        """Let the batch in progress end, and answer nothing after it."""
        with self._changed:
            self._closed, thread = True, self._thread
            for request in self._waiting:
                request.answers.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(LAST_SECONDS)

    def room(self, side: Side, prompt: RenderedPrompt) -> int | None:
        """How many tokens an answer to the prompt may have; None where the model names no limit."""
        with self.using(side) as model:
            most = n_positions_of(model)
        return None if most is None else most - len(prompt.ids)

    @contextmanager
    def using(self, side: Side) -> Iterator[HookedModel]:
        """The hooked model of a side.

        Raises:
            LensError: the finetuned side of a queue that has only a base.
        """
        if isinstance(self.models, ModelPair):
            with self.models.using(side) as model:
                yield model
        elif side == "base":
            yield self.models
        else:
            raise LensError("there is no finetuned model here: give adapter= or finetuned=")

    # ---- the thread

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer([request for request in batch if request.answers.set_running_or_notify_cancel()])

    def _next_batch(self) -> list[Request]:
        """The oldest request and what goes with it, once the queue stands still; none when it is time to end."""
        with self._changed:
            while not self._waiting:
                if self._closed or (not self._changed.wait(IDLE_SECONDS) and not self._waiting):
                    self._thread = None
                    return []
            while not self._closed and self._rows(self._alike()) < self.batch_size:
                if not self._changed.wait(self.pause):
                    break
            if self._closed:
                return []
            batch: list[Request] = []
            for request in self._alike():
                if batch and self._rows([*batch, request]) > self.batch_size:
                    break
                batch.append(request)
            self._waiting = [request for request in self._waiting if request not in batch]
        return batch

    def _alike(self) -> list[Request]:
        return [request for request in self._waiting if request.kind == self._waiting[0].kind]

    @staticmethod
    def _rows(requests: Sequence[Request]) -> int:
        return sum(len(request.samples) for request in requests)

    def _answer(self, batch: Sequence[Request]) -> None:
        """Answer a batch; one that fails is asked again request by request, so that only the culprit fails."""
        try:
            if batch:
                self._generate(batch)
            return
        except Exception as error:
            if len(batch) == 1:
                batch[0].answers.set_exception(error)
                return
        for request in batch:
            self._answer([request])

    def _generate(self, batch: Sequence[Request]) -> None:
        first, rows = batch[0], [(request.prompt, number) for request in batch for number in request.samples]
        condition = first.condition
        prefix = self._repair(first.prompt) if condition.repaired else condition.prefix
        with self.using(condition.side) as model, condition.adapted(model):
            answers = generate(
                model,
                [prompt for prompt, _ in rows],
                samples=[number for _, number in rows],
                interventions=condition.interventions,
                prefix_cache=prefix,
                max_new_tokens=first.max_new_tokens,
                sampling=first.sampling,
                batch_size=self.batch_size,
                progress=False,
            )
        self.batches[len(rows)] += 1
        done = iter(answers)
        for request in batch:
            request.answers.set_result([next(done) for _ in request.samples])

    def _repair(self, prompt: RenderedPrompt) -> PrefixCache:
        """The base's keys and values of a prompt's prefix."""
        assert isinstance(self.models, ModelPair)
        ids = prompt.ids[: prompt.spans["prefix"].stop]
        if ids not in self._compiled:
            if len(self._compiled) >= MAX_COMPILED:
                self._compiled.clear()
            self._compiled[ids] = PrefixCache.compile(self.models, prompt, side="base")
        return self._compiled[ids]


def with_first_prefix(prompt: RenderedPrompt, length: int) -> RenderedPrompt:
    """A prompt of several turns whose prefix ends where the first user's text begins; the rest is its query.

    Only what stands there is the same in every conversation, so only that can come from a prefix cache, and rows with
    equally long prefixes share a batch.
    """
    if len(prompt.spans["prefix"]) <= length:
        return prompt
    border = {"prefix": Span("prefix", 0, length), "query": Span("query", length, prompt.spans["postfix"].start)}
    return dataclasses.replace(prompt, spans={**prompt.spans, **border})
