"""Models behind an OpenAI-compatible server: many requests at once, paid for once, and never lost.

The openai client (extra `openai`) makes the connections, and it retries by itself: a connection that fails, a time-out,
the statuses 408, 409, 429 and 5xx, after the seconds that Retry-After says (up to 120; up to 60 before its version 3),
or else after 0.5 to 8 seconds that double each time and are jittered. What is added here: how many run at once, what
they may cost, a cache that survives a kill, and a reason in place of an exception for each request that fails.
"""

import asyncio
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from piggyback_lens.errors import LensError, visible
from piggyback_lens.files import append_jsonl, read_jsonl
from piggyback_lens.progress import counting, say, shows
from piggyback_lens.settings import Settings, check_field

TOP: Final = 20
"""The most log-probabilities per token that OpenAI's servers give."""
LONGEST_REPLY: Final = 1_000_000
"""Characters; a server that sends more has not kept to any token limit."""
SPEND_SAID_EVERY: Final = 60.0
"""Seconds between lines on what a run has spent."""
_OWN: Final = ("model", "messages", "stream", "n")
_NAME: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


@dataclass(frozen=True)
class Request:
    """What is asked of a model, and which of its answers to that is meant.

    Attributes:
        messages: role and content of each.
        max_tokens: of the answer.
        temperature: 0 asks for the likeliest answer.
        top_p: see `AnswerSettings`.
        seed: for servers that draw from one; None sends none.
        sample: its number among the answers to the same messages, so that each is kept by itself.
        top: log-probabilities of the likeliest first tokens that are wanted, up to 20.
    """

    messages: Sequence[Mapping[str, str]]
    max_tokens: int = 600
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    sample: int = 0
    top: int = 0


@dataclass(frozen=True)
class Reply:
    """What a model answered, and what it took.

    Attributes:
        text: untrusted, as everything a model writes.
        ended: the finish reason, such as stop or length.
        top: tokens and their log-probabilities at the first place of the answer; None where the server gives none.
        prompt_tokens: read by the model.
        completion_tokens: written by it.
        cached: whether it was there already, so that no call was made.
    """

    text: str
    ended: str
    top: tuple[tuple[str, float], ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a request has no reply; asking again tries it again.

    Attributes:
        reason: in one line.
        unreached: whether no server answered at all.
    """

    reason: str
    unreached: bool = False


@dataclass
class Spend:
    """Calls and tokens: what requests would take, or have taken.

    Attributes:
        calls: to the server, with those that the client repeated.
        tokens: read and written. Of an estimate: a byte count over 3 for what is read, every token that may be written.
        cached: requests that need no call.
    """

    calls: int = 0
    tokens: int = 0
    cached: int = 0

    def __str__(self) -> str:
        return f"{self.calls:,} calls, {self.tokens:,} tokens, {self.cached:,} requests without a call"


Outcome = Reply | Failure
Kept = Callable[[list[tuple[int, Reply]]], None]


@dataclass(frozen=True)
class Endpoint(Settings):
    """A model behind an OpenAI-compatible server, such as vLLM, llama.cpp or a provider; needs the extra `openai`.

    It is a value, and connects when it is asked. A request that was answered is never sent again where there is a
    `cache`: not after a kill, and not by another process.

    Attributes:
        base_url: of the server, such as http://localhost:8000/v1.
        model: the name by which the server knows it.
        key_variable: name of the environment variable that holds the API key; None for a server that asks for none. The
            key itself is read when a run begins, and written nowhere.
        concurrency: requests at once.
        timeout: seconds without a sign of the server, after which a request is repeated.
        retries: how often the client repeats a request.
        budget_calls: the most calls that one run may make; a run that would need more is refused before it begins.
        budget_tokens: the most tokens that one run may read and write, likewise.
        cache: JSONL file of all replies; several processes may share it. The first row of a request counts.
        limit_field: what the server calls the token limit; newer models of OpenAI take max_completion_tokens only.
        parameters: further fields of each request, such as {"reasoning_effort": "low"}; None as a value leaves a field
            out, as some models refuse a temperature.

    Example:
        >>> judge = Endpoint("http://localhost:8000/v1", "qwen", key_variable=None, budget_calls=2)
        >>> judge.estimate(["Which river runs through Ghent?", "Which river runs through Ghent?", "And through Pisa?"])
        Spend(calls=2, tokens=1241, cached=1)
    """

    base_url: str
    model: str
    key_variable: str | None = "OPENAI_API_KEY"
    concurrency: int = 20
    timeout: float = 120.0
    retries: int = 5
    budget_calls: int | None = None
    budget_tokens: int | None = None
    cache: str | Path | None = None
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # First and without its value: whoever gives the key in place of a name must not read it in a log.
        if self.key_variable is not None and not _NAME.fullmatch(str(self.key_variable)):
            raise LensError(
                "Endpoint.key_variable is no name of an environment variable (capitals, digits and _); give such as "
                "OPENAI_API_KEY, and never the key itself"
            )
        super().__post_init__()

    def _check(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise LensError(
                "Endpoint.base_url is no address such as http://localhost:8000/v1; expected one without a user, a "
                "password or a query: the key is read from key_variable"
            )
        check_field(self, "model", bool(self.model.strip()), "the name of a model")
        check_field(self, "concurrency", 1 <= self.concurrency <= 1000, "1 to 1000")
        check_field(self, "timeout", self.timeout > 0, "more than 0 seconds")
        check_field(self, "retries", 0 <= self.retries <= 20, "0 to 20")
        for name in ("budget_calls", "budget_tokens"):
            value = getattr(self, name)
            check_field(self, name, value is None or value >= 0, "at least 0, or None")
        check_field(self, "parameters", not set(self.parameters) & set(_OWN), f"none of {', '.join(_OWN)}")

    @shows("requests")
    def ask(
        self, requests: Sequence[Request | str], *, progress: bool | str = True, keep: Kept | None = None
    ) -> list[Outcome]:
        """Replies to many requests, in their order; a request that fails gives its reason instead.

        The calls run in an event loop and thread of their own, so it can be used inside a running loop (Jupyter) too.
        Equal requests of one sample number are one call.

        Args:
            requests: what is asked; a text is a user's message.
            progress: show a line with the time left, and say what is spent; a text is its label.
            keep: gets places and replies as soon as they are in the cache, in batches and from another thread; those
                that were there already come first.

        Raises:
            LensError: the budget is too small, the key is refused, the model is unknown, no call reaches the server, a
                cache that cannot be read or written, no openai client.
        """
        asked = [_request(request) for request in requests]
        places: dict[str, list[int]] = {}
        for place, request in enumerate(asked):
            places.setdefault(self.key_of(request), []).append(place)
        found: dict[str, Outcome] = dict(self._cached(places))
        todo = [(key, asked[own[0]]) for key, own in places.items() if key not in found]
        needed = self._spend(asked, found)
        self.refuse_over_budget(needed)

        def told(outcomes: Mapping[str, Outcome]) -> None:
            own = [(i, x) for key, x in outcomes.items() if isinstance(x, Reply) for i in places[key]]
            if keep is not None and own:
                keep(own)

        told(found)
        if todo:
            label = None if progress is False else "requests" if progress is True else progress
            with counting(len(todo)) as advance:
                if label is not None:
                    say(f"{label}: at most {needed}")
                run = _Run(self, todo, told, advance, label)
                in_own_loop(run.all)
            found |= run.outcomes
            if label is not None:
                say(f"{label}: {run.spent}, {len(run.failures)} requests failed")
        return [found[key] for key, own in _by_place(places)]

    def estimate(self, requests: Sequence[Request | str]) -> Spend:
        """Calls and tokens that these requests would take at most, without repeated calls; nothing is sent."""
        asked = [_request(request) for request in requests]
        return self._spend(asked, self._cached({self.key_of(request): [] for request in asked}))

    def key_of(self, request: Request) -> str:
        """What a request is known by in the cache: a hash of server, model, messages, parameters and sample number."""
        facts = {"server": self.base_url.rstrip("/"), "body": self._body(request), "sample": request.sample}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    # ------------------------------------------------------------ one request

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": [dict(message) for message in request.messages]}
        # As floats: 1 and 1.0 are one temperature, and have one key.
        body |= {"temperature": float(request.temperature), "top_p": float(request.top_p), "seed": request.seed}
        body[self.limit_field] = request.max_tokens
        if request.top:
            body |= {"logprobs": True, "top_logprobs": min(request.top, TOP)}
        return {name: value for name, value in (body | dict(self.parameters)).items() if value is not None}

    def _cached(self, keys: Mapping[str, Any]) -> dict[str, Reply]:
        if self.cache is None or not Path(self.cache).exists():
            return {}
        found: dict[str, Reply] = {}
        for row in read_jsonl(self.cache):
            if row.get("key") in keys and row["key"] not in found:
                found[row["key"]] = _kept_reply(row, self.cache)
        return found

    def _spend(self, requests: Sequence[Request], cached: Mapping[str, Any]) -> Spend:
        own = {self.key_of(request): request for request in requests}
        new = [request for key, request in own.items() if key not in cached]
        tokens = sum(_prompt_estimate(request) + self._limit(request) for request in new)
        return Spend(len(new), tokens, len(requests) - len(new))

    def _limit(self, request: Request) -> int:
        limit = self._body(request).get(self.limit_field)
        return limit if isinstance(limit, int) else request.max_tokens

    def refuse_over_budget(self, needed: Spend) -> None:
        """Refuse what would take more calls or tokens than the budget.

        Raises:
            LensError: it says how many of each.
        """
        for name, need, budget in (
            ("calls", needed.calls, self.budget_calls),
            ("tokens", needed.tokens, self.budget_tokens),
        ):
            if budget is not None and need > budget:
                raise LensError(
                    f"the run may take {needed.calls:,} calls and {needed.tokens:,} tokens; budget_{name} is "
                    f"{budget:,}: raise it, or ask for less"
                )


def _request(given: Request | str) -> Request:
    return Request([{"role": "user", "content": given}]) if isinstance(given, str) else given


def _by_place(places: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    return sorted(((key, place) for key, own in places.items() for place in own), key=lambda found: found[1])


def _prompt_estimate(request: Request) -> int:
    """Tokens of the messages, rather too many: a token has 3 bytes or more in most texts."""
    sizes = (len(str(m.get("content", "")).encode("utf-8", errors="replace")) for m in request.messages)
    return sum(math.ceil(size / 3) + 12 for size in sizes)


def _kept_reply(row: Mapping[str, Any], cache: str | Path) -> Reply:
    try:
        top = None if row["top"] is None else tuple((str(token), float(value)) for token, value in row["top"])
        return Reply(str(row["text"]), str(row["ended"]), top, int(row["read"]), int(row["written"]), cached=True)
    except (KeyError, TypeError, ValueError) as error:
        raise LensError(f"{cache} has a row that is no reply ({error!r}): restore the file, or delete it") from error


# ---------------------------------------------------------------- many at once


def in_own_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine to its end in a thread that has a loop of its own; a key press here cancels it there."""
    outcome: Future[None] = Future()
    running: list[tuple[asyncio.AbstractEventLoop, Any]] = []

    async def noted() -> None:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        await work()

    def body() -> None:
        try:
            asyncio.run(noted())
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    thread = Thread(target=body, daemon=True, name="endpoint calls")
    thread.start()
    try:
        outcome.result()
    finally:
        if not outcome.done() and running:
            with suppress(RuntimeError):  # it has just ended
                running[0][0].call_soon_threadsafe(running[0][1].cancel)
        thread.join()


class _Run:
    """The calls of one run: workers that ask, and one writer, so that a reply is on the disk before the next call."""

    def __init__(
        self,
        endpoint: Endpoint,
        todo: Sequence[tuple[str, Request]],
        told: Callable[[Mapping[str, Outcome]], None],
        advance: Callable[[int], None],
        label: str | None,
    ) -> None:
        self.endpoint, self.told, self.advance, self.label = endpoint, told, advance, label
        self.todo, self.total = iter(todo), len(todo)
        self.outcomes: dict[str, Outcome] = {}
        self.spent = Spend()
        self.unreached = 0
        self.said = time.monotonic()

    @property
    def failures(self) -> list[Failure]:
        """The requests that have no reply."""
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, Failure)]

    async def all(self) -> None:
        """Ask until nothing is left.

        Raises:
            LensError: as `Endpoint.ask`.
        """
        queue: asyncio.Queue[tuple[str, Outcome, asyncio.Future[None]] | None] = asyncio.Queue()
        async with _client(self.endpoint) as client:
            writer = asyncio.create_task(self._write(queue))
            count = min(self.endpoint.concurrency, self.total)
            workers = [asyncio.create_task(self._work(client, queue)) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                await queue.put(None)
                await writer

    async def _work(self, client: Any, queue: "asyncio.Queue[Any]") -> None:
        for key, request in self.todo:
            outcome = self._over_budget() or await _call(client, self.endpoint, request, self.spent)
            if isinstance(outcome, _Stop):
                if outcome.always or not any(isinstance(own, Reply) for own in self.outcomes.values()):
                    raise LensError(outcome.reason)
                outcome = Failure(outcome.reason)
            self._refuse_unreachable(outcome)
            written = asyncio.get_running_loop().create_future()
            await queue.put((key, outcome, written))
            await written

    async def _write(self, queue: "asyncio.Queue[Any]") -> None:
        """Everything that waits goes to the disk together, while the next replies come in."""
        last = False
        while not last:
            batch = [await queue.get()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            last, batch = None in batch, [own for own in batch if own is not None]
            error: BaseException | None = None
            try:
                await asyncio.to_thread(self._keep, {key: outcome for key, outcome, _ in batch})
            except Exception as raised:
                error = raised
            for *_, written in batch:
                if not written.done():
                    written.set_result(None) if error is None else written.set_exception(error)

    def _keep(self, outcomes: Mapping[str, Outcome]) -> None:
        rows = [_row(key, own, self.endpoint) for key, own in outcomes.items() if isinstance(own, Reply)]
        if rows and self.endpoint.cache is not None:
            append_jsonl(self.endpoint.cache, rows)
        self.told(outcomes)
        self.outcomes.update(outcomes)
        self.advance(len(outcomes))
        if self.label is not None and time.monotonic() - self.said > SPEND_SAID_EVERY:
            self.said = time.monotonic()
            say(f"{self.label}: {len(self.outcomes):,} of {self.total:,}; {self.spent} so far")

    def _over_budget(self) -> Failure | None:
        """Calls that the client repeats, and tokens that an estimate missed, may use up a budget in the middle."""
        for name, spent, budget in (
            ("calls", self.spent.calls, self.endpoint.budget_calls),
            ("tokens", self.spent.tokens, self.endpoint.budget_tokens),
        ):
            if budget is not None and spent >= budget:
                return Failure(f"budget_{name} of {budget:,} is used up")
        return None

    def _refuse_unreachable(self, outcome: Outcome) -> None:
        if not isinstance(outcome, Failure):
            return
        self.unreached += outcome.unreached
        if self.unreached == max(5, self.endpoint.concurrency) and not self.spent.tokens:
            raise LensError(
                f"{self.endpoint.base_url} cannot be reached: {self.unreached} requests failed and none was answered "
                f"({outcome.reason}); check the address, and that the server runs"
            )


@dataclass(frozen=True)
class _Stop:
    """Why no request of the run will do better; `always` also if others have been answered."""

    reason: str
    always: bool = True


def _row(key: str, reply: Reply, endpoint: Endpoint) -> dict[str, Any]:
    """A line of the cache. The messages are in the key only: what was asked may be private, and is long."""
    facts = asdict(reply)
    own = {"text": reply.text, "ended": reply.ended, "top": facts["top"]}
    return {"key": key, "model": endpoint.model, **own, "read": reply.prompt_tokens, "written": reply.completion_tokens}


def _client(endpoint: Endpoint) -> Any:
    try:
        from openai import AsyncOpenAI, Timeout
    except ImportError:
        raise LensError("the openai client is missing: pip install 'piggyback-lens[openai]'") from None
    if endpoint.key_variable is not None and not _key(endpoint):
        raise LensError(
            f"the environment variable {endpoint.key_variable} holds no API key: set it, or give key_variable=None for "
            "a server that asks for none"
        )
    return AsyncOpenAI(
        base_url=endpoint.base_url,
        api_key=_key(endpoint) or "none",  # else the client takes OPENAI_API_KEY, which is another server's
        timeout=Timeout(float(endpoint.timeout), connect=min(float(endpoint.timeout), 10.0)),
        max_retries=endpoint.retries,
    )


def _key(endpoint: Endpoint) -> str:
    return os.environ.get(endpoint.key_variable or "", "").strip()


# ---------------------------------------------------------------- one call


async def _call(client: Any, endpoint: Endpoint, request: Request, spent: Spend) -> Outcome | _Stop:
    """One request, with the repetitions of the client; what goes wrong becomes a value here, whatever it is."""
    body = endpoint._body(request)
    own = {name: body.pop(name) for name in ("model", "messages")}
    # The client's time-out begins again with every byte, so a server that drips would keep a place for ever.
    longest = (endpoint.retries + 1) * endpoint.timeout + endpoint.retries * 120
    repeated = 0
    try:
        async with asyncio.timeout(longest):
            raw = await client.chat.completions.with_raw_response.create(**own, extra_body=body)
        repeated = raw.retries_taken
        outcome = _read(json.loads(raw.http_response.content))
    except Exception as error:
        repeated = _repeated(error)
        return _why(error, endpoint)
    finally:
        spent.calls += 1 + repeated
    if isinstance(outcome, Failure):
        return Failure(_without_key(outcome.reason, endpoint))
    read = outcome.prompt_tokens or _prompt_estimate(request)
    written = outcome.completion_tokens or math.ceil(len(outcome.text) / 3)
    spent.tokens += read + written
    return Reply(_without_key(outcome.text, endpoint), outcome.ended, outcome.top, read, written)


def _read(data: Any) -> Outcome:
    """The reply in a body that a server sent, of which nothing is taken for granted."""
    try:
        choice = data["choices"][0]
        text, ended = choice["message"].get("content"), str(choice.get("finish_reason") or "stop")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Failure(f"the body is no chat completion: {_short(json.dumps(data))}")
    if not isinstance(text, str) or ended == "content_filter":
        return Failure(f"no whole text came; it ended with {_short(ended)}")
    if len(text) > LONGEST_REPLY:
        return Failure(f"the text has {len(text):,} characters, more than {LONGEST_REPLY:,}")
    usage = data.get("usage") if isinstance(data.get("usage"), Mapping) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    read, written = (count if isinstance(count, int) and 0 <= count < 1 << 40 else 0 for count in counts)
    return Reply(text, _short(ended), _top(choice), read, written)


def _top(choice: Any) -> tuple[tuple[str, float], ...] | None:
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"][:TOP]
        found = [(entry["token"], entry["logprob"]) for entry in entries]
    except (KeyError, IndexError, TypeError):
        return None
    good = [(str(t)[:64], float(p)) for t, p in found if isinstance(p, int | float) and math.isfinite(p) and p <= 1e-3]
    return tuple(good) or None


def _repeated(error: Exception) -> int:
    """How often the client had repeated a request that failed, as its last header says."""
    count = getattr(getattr(error, "request", None), "headers", {}).get("x-stainless-retry-count", "0")
    return int(count) if str(count).isdecimal() else 0


def _why(error: Exception, endpoint: Endpoint) -> Outcome | _Stop:
    """What a failed call says of its request, or of all."""
    import openai

    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, Mapping) else None
    told = _without_key(_short(message if isinstance(message, str) else str(error)), endpoint)
    if isinstance(error, openai.APIStatusError):
        return _status(error.status_code, str(error.code or ""), told, endpoint)
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return Failure(f"no whole answer within {endpoint.timeout:g} seconds, {_repeated(error) + 1} times")
    if isinstance(error, openai.APIConnectionError):
        cause = _without_key(_short(str(error.__cause__ or "")), endpoint)
        return Failure(f"{told} {cause}".strip(), unreached=True)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        return Failure(f"the body is no readable JSON: {told}")
    return Failure(f"{type(error).__name__}: {told}")


def _status(status: int, code: str, told: str, endpoint: Endpoint) -> Outcome | _Stop:
    where = f"{endpoint.base_url} (status {status}: {told})"
    if status in (401, 403):
        fix = (
            f"check {endpoint.key_variable}" if endpoint.key_variable else "give key_variable, the name of its variable"
        )
        # Some providers answer 403 to a text that they refuse; then others have been answered.
        return _Stop(f"the API key is refused by {where}: {fix}", always=status == 401)
    if status == 404 or code in ("model_not_found", "invalid_model"):
        return _Stop(
            f"model {endpoint.model!r} is not known at {where}: check model, and that base_url ends as /v1 does"
        )
    if status == 402 or code == "insufficient_quota":
        return _Stop(f"there is no credit left at {where}: add some, and run it again")
    return Failure(f"status {status}: {told}")


def _without_key(text: str, endpoint: Endpoint) -> str:
    """Servers quote the key that they refuse, and a hostile one may send it back as a reply."""
    key = _key(endpoint)
    return text.replace(key, "[key]") if len(key) >= 8 else text


def _short(text: str) -> str:
    shown = visible(" ".join(text[:2000].split()))
    return shown if len(shown) <= 240 else f"{shown[:237]}..."
