"""Inspect asks `piggyback/...` models, and gets what `generate` gives; what is not supported is refused by name."""

import importlib.metadata
import importlib.util
import json
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat
import tiny_pairs
import torch

from piggyback_lens.app import answer_queue, inspect_provider
from piggyback_lens.app.answer_queue import AnswerQueue, Condition, Request, with_first_prefix
from piggyback_lens.app.inspect_provider import Answering, plain_messages, read_arguments, sample_numbers
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.sampling import Sampling
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.vectors.adapters import LoRAAdapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction

needs_inspect = pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="extra inspect")
QUESTIONS = ("one", "two words", "a longer question?", "x", "what is it", "go on, tell me")
WARM = Sampling(temperature=1.0, seed=7)
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "no, go on"},
    {"role": "user", "content": "why not?"},
]


def pair() -> ModelPair:
    return tiny_pairs.pair()


def chat() -> ChatFormat:
    return pair().chat_format()


def direction(seed: int = 3) -> Direction:
    return Direction.of({1: torch.randn(32, generator=torch.Generator().manual_seed(seed))})


def low_rank() -> LoRAAdapter:
    with pair().using("base") as model:
        fresh = LoRAAdapter.fresh(model, rank=2, layers=[1])
    generator = torch.Generator().manual_seed(1)
    return LoRAAdapter(fresh.a, {k: torch.randn(b.shape, generator=generator) for k, b in fresh.b.items()}, fresh.alpha)


def texts(answers: Sequence[Any]) -> list[str]:
    return [answer.text for answer in answers]


@pytest.fixture
def queue() -> AnswerQueue:
    return AnswerQueue(pair(), pair().tokenizer, batch_size=4, pause=0.05)


def request(condition: Condition, query: Any, samples: Sequence[int] = (0,), tokens: int = 6) -> Request:
    prompt = query if isinstance(query, RenderedPrompt) else chat().render(query)
    return Request(condition, prompt, samples, WARM, tokens)


# ---------------------------------------------------------------- the queue


@pytest.mark.parametrize("name", ["base", "finetuned", "patched", "repaired", "steered", "adapted"])
def test_a_queue_gives_what_generate_gives(name: str) -> None:
    queue = AnswerQueue(pair(), pair().tokenizer, batch_size=3, pause=60.0)  # no batch but a full one
    prompts = [chat().render(query) for query in QUESTIONS]
    prefix = PrefixCache.compile(pair(), prompts[0], side="base")
    condition, more = {
        "base": (Condition("base"), {}),
        "finetuned": (Condition("finetuned"), {}),
        "patched": (Condition("finetuned", prefix=prefix), {"prefix_cache": prefix}),
        "repaired": (Condition("finetuned", repaired=True), {"prefix_cache": prefix}),
        "steered": (Condition("base", solution=direction().scaled(2.0)), {"interventions": direction().steer(2.0)}),
        "adapted": (Condition("base", solution=low_rank().scaled(0.5)), {}),
    }[name]
    futures = [queue.ask(request(condition, prompt)) for prompt in prompts]
    found = [future.result(timeout=60)[0] for future in futures]
    with pair().using(condition.side) as model:
        if name == "adapted":
            with attached(model, low_rank().scaled(0.5)):
                direct = generate(model, prompts, sampling=WARM, max_new_tokens=6)
        else:
            direct = generate(model, prompts, sampling=WARM, max_new_tokens=6, **more)
    assert texts(found) == texts(direct)
    assert queue.batches == {3: 2}


def test_samples_of_one_request_are_those_of_generate(queue: AnswerQueue) -> None:
    found = queue.ask(request(Condition("base"), "two words", samples=range(6))).result(timeout=60)
    with pair().using("base") as model:
        direct = generate(model, [chat().render("two words")], n=6, sampling=WARM, max_new_tokens=6)
    assert texts(found) == texts(direct)
    assert len(set(texts(found))) > 1


def test_a_text_does_not_depend_on_what_it_waited_with(queue: AnswerQueue) -> None:
    base, tuned = Condition("base"), Condition("finetuned")
    asked = [request((base, tuned)[i % 2], query, samples=(i,)) for i, query in enumerate(QUESTIONS)]
    together = [future.result(timeout=60)[0].text for future in [queue.ask(one) for one in asked]]
    again = [request(one.condition, one.prompt, one.samples) for one in reversed(asked)]
    alone = [queue.ask(one).result(timeout=60)[0].text for one in again]
    assert alone[::-1] == together


def test_only_the_request_that_fails_fails(queue: AnswerQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(model: Any, prompts: Sequence[RenderedPrompt], **more: Any) -> Any:
        if any(prompt.query == "x" for prompt in prompts):
            raise RuntimeError("out of memory")
        return generate(model, prompts, **more)

    monkeypatch.setattr(answer_queue, "generate", fragile)
    futures = {query: queue.ask(request(Condition("base"), query)) for query in QUESTIONS}
    with pytest.raises(RuntimeError, match="out of memory"):
        futures.pop("x").result(timeout=60)
    assert all(len(future.result(timeout=60)) == 1 for future in futures.values())


def test_a_cancelled_request_is_left_out() -> None:
    queue = AnswerQueue(pair(), pair().tokenizer, batch_size=3, pause=60.0)  # no batch but a full one
    base = Condition("base")
    futures = [queue.ask(request(base, query)) for query in QUESTIONS[:2]]
    assert futures[1].cancel()
    futures.append(queue.ask(request(base, QUESTIONS[2])))
    assert [len(futures[i].result(timeout=60)) for i in (0, 2)] == [1, 1]
    with pytest.raises(CancelledError):
        futures[1].result(timeout=60)
    assert queue.batches == {2: 1}


def test_the_thread_ends_when_idle_and_another_takes_over(queue: AnswerQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_queue, "IDLE_SECONDS", 0.01)
    first = queue.ask(request(Condition("base"), "one")).result(timeout=60)
    for thread in threading.enumerate():
        if thread.name == "piggyback_lens answers":
            thread.join(timeout=10)
    assert texts(queue.ask(request(Condition("base"), "one")).result(timeout=60)) == texts(first)


def test_a_closed_queue_lets_go_of_what_waits() -> None:
    queue = AnswerQueue(pair(), pair().tokenizer, pause=60.0)
    future = queue.ask(request(Condition("base"), "one"))
    queue.close()
    assert future.cancelled()
    with pytest.raises(LensError, match="this queue was closed"):
        queue.ask(request(Condition("base"), "one"))


def test_a_conversation_of_several_turns_starts_from_the_prefix_cache_as_in_plain_transformers() -> None:
    opening = chat().render("hello")
    prefix = PrefixCache.compile(pair(), opening, side="base")
    prompt = with_first_prefix(chat().render(TALK), len(opening.spans["prefix"]))
    queue = AnswerQueue(pair(), pair().tokenizer)
    asked = Request(Condition("finetuned", prefix=prefix), prompt, (0,), Sampling(), 8)
    (answer,) = queue.ask(asked).result(timeout=60)
    plain = tiny_pairs.weights("llama-gqa", "finetuned")
    inputs = prefix.hf_inputs([prompt])
    ids = plain.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert list(answer.ids) == ids[0, len(prompt.ids) :].tolist()[: len(answer.ids)]


def test_what_does_not_fit_is_refused_before_it_waits(queue: AnswerQueue) -> None:
    prefix = PrefixCache.compile(pair(), chat().render("hello"), side="base")
    other = tiny_chat.tiny_format("be rude!").render("hello")
    with pytest.raises(LensError, match="differs from the cached one at token"):
        queue.ask(request(Condition("finetuned", prefix=prefix), other))
    with pair().using("base") as model:
        alone = AnswerQueue(model, pair().tokenizer)
    for condition in (Condition("finetuned"), Condition("finetuned", repaired=True)):
        with pytest.raises(LensError, match="no finetuned model here"):
            alone.ask(request(condition, "hello"))
    with pytest.raises(LensError, match="batch_size 0"):
        AnswerQueue(pair(), pair().tokenizer, batch_size=0)


# ---------------------------------------------------------------- arguments and messages


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("tuned", {}, "piggyback/tuned is not known: choose piggyback/ and one of base, finetuned, patched, steered"),
        ("base", {"adaptor": "x"}, "model argument 'adaptor' is not known"),
        ("finetuned", {}, "needs a finetuned model: give adapter= or finetuned="),
        ("patched", {"prefix_cache": "x"}, "needs a finetuned model"),
        (
            "base",
            {"prefix_cache": "x"},
            "prefix_cache has no effect on piggyback/base: it belongs to piggyback/patched",
        ),
        ("patched", {"adapter": "a", "strength": 2}, "strength has no effect on piggyback/patched"),
        ("steered", {}, "piggyback/steered needs what it is steered with: give solution="),
        ("steered", {"solution": "x", "side": "finetuned"}, "needs a finetuned model"),
        ("finetuned", {"adapter": "a", "finetuned": "b"}, "adapter and finetuned are given"),
        ("base", {"batch_size": 0}, "ProviderSettings.batch_size is 0; expected at least 1"),
        ("base", {"dtype": "int8"}, "dtype='int8' is not known"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(LensError, match=said):
        read_arguments(name, arguments)


def test_the_word_none_is_no_system_text() -> None:
    assert read_arguments("base", {"system": "none"})[2].system is None
    assert read_arguments("base", {})[2].system == "default"


def said(role: str, content: Any, **more: Any) -> SimpleNamespace:
    text = content if isinstance(content, str) else "".join(getattr(part, "text", "") for part in content)
    return SimpleNamespace(role=role, content=content, text=text, **more)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([said("user", [SimpleNamespace(type="image")])], "message 0 has content of type image"),
        ([said("user", "go"), said("assistant", "", tool_calls=[1]), said("tool", "5")], "message 1 is a tool's call"),
        ([said("user", "go"), said("assistant", "well,")], "the last message is the assistant's"),
    ],
)
def test_messages_that_are_no_text_are_refused(messages: list[Any], why: str) -> None:
    with pytest.raises(LensError, match=why):
        plain_messages(messages)


def test_epochs_number_the_samples_as_generate_does() -> None:
    assert sample_numbers(None) == (0,)
    assert [sample_numbers(("q", epoch)) for epoch in (1, 2, 3)] == [(0,), (1,), (2,)]
    assert sample_numbers(("q", 2), choices=3) == (3, 4, 5)
    apart = {sample_numbers((name, epoch), draws="sample") for name in ("q", "r", 1, "1") for epoch in (1, 2)}
    assert len(apart) == 8


# ---------------------------------------------------------------- within Inspect


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Base and finetuned model, a prefix cache and a direction, as files."""
    out = tmp_path_factory.mktemp("tiny")
    for side in ("base", "finetuned"):
        tiny_pairs.weights("llama-gqa", side).save_pretrained(out / side)
        tiny_chat.tiny_tokenizer().save_pretrained(out / side)
    loaded = ModelPair.load(str(out / "base"), str(out / "finetuned"))
    PrefixCache.compile(loaded, loaded.chat_format().render("hello"), side="base").save(out / "cache")
    direction().save(out / "direction.safetensors")
    return {name: str(out / name) for name in ("base", "finetuned", "cache", "direction.safetensors")}


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "logs")


def arguments(name: str, folders: dict[str, str]) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "patched": {"prefix_cache": folders["cache"]},
        "steered": {"solution": folders["direction.safetensors"], "strength": 2},
    }
    return {"base": folders["base"], "finetuned": folders["finetuned"], **own.get(name, {})}


def task(questions: Sequence[str], epochs: int) -> Any:
    """Every question is answered once an epoch, and graded by its number of letters."""
    from inspect_ai import Epochs, Task
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import Score, mean, scorer
    from inspect_ai.solver import generate as answer

    @scorer(metrics=[mean()])
    def letters() -> Any:
        async def score(state: Any, target: Any) -> Any:
            return Score(value=len(state.output.completion))

        return score

    samples = [Sample(input=question, id=f"q{i}") for i, question in enumerate(questions)]
    return Task(dataset=samples, solver=answer(), scorer=letters(), epochs=Epochs(epochs, "mean"))


def evaluated(
    model: str, given: dict[str, Any], logs: str, epochs: int = 1, questions: Sequence[str] = QUESTIONS, **config: Any
) -> Any:
    """The log of a task on fresh instances of a model."""
    import inspect_ai
    from inspect_ai.model import GenerateConfig, get_model

    made = get_model(model, memoize=False, config=GenerateConfig(**config), **given)
    (log,) = inspect_ai.eval(task(questions, epochs), model=made, log_dir=logs, display="none", log_level="warning")
    return log


def by_question(log: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sample in sorted(log.samples, key=lambda sample: sample.epoch):
        found.setdefault(sample.id, []).append(sample.output.completion)
    return found


def directly(name: str, loaded: ModelPair, questions: Sequence[str], prefix: Any, added: Any, **how: Any) -> Any:
    """The same answers by `generate`."""
    side = {"base": "base", "steered": "base"}.get(name, "finetuned")
    prompts = [loaded.chat_format().render(question) for question in questions]
    more = {"patched": {"prefix_cache": prefix}, "steered": {"interventions": added}}.get(name, {})
    with loaded.using(side) as model:  # type: ignore[arg-type]
        return generate(model, prompts, **how, **more)


@needs_inspect
@pytest.mark.parametrize("name", inspect_provider.NAMES)
def test_a_task_has_the_numbers_of_generate(name: str, folders: dict[str, str], logs: str) -> None:
    log = evaluated(f"piggyback/{name}", arguments(name, folders), logs, 3, temperature=1.0, seed=7, max_tokens=6)
    assert log.status == "success", log.error
    loaded = ModelPair.load(folders["base"], folders["finetuned"])
    prefix = PrefixCache.load(folders["cache"])
    direct = texts(
        directly(name, loaded, QUESTIONS, prefix, direction().steer(2.0), n=3, sampling=WARM, max_new_tokens=6)
    )
    assert by_question(log) == {f"q{i}": direct[3 * i : 3 * i + 3] for i in range(len(QUESTIONS))}
    mean = log.results.scores[0].metrics["mean"].value
    assert mean == pytest.approx(sum(map(len, direct)) / len(direct))
    assert len(set(direct)) > len(QUESTIONS)  # epochs are different draws
    assert {tuple(sample.output.metadata["samples"]) for sample in log.samples} == {(0,), (1,), (2,)}


@needs_inspect
def test_a_task_that_runs_again_gives_the_same_texts(folders: dict[str, str], logs: str) -> None:
    how = {"temperature": 1.0, "top_p": 0.9, "top_k": 12, "seed": 3, "max_tokens": 5}
    given = arguments("finetuned", folders)
    first = by_question(evaluated("piggyback/finetuned", given, logs, 2, **how))
    again = by_question(evaluated("piggyback/finetuned", {**given, "batch_size": 2}, logs, 2, **how))
    other = by_question(evaluated("piggyback/finetuned", given, logs, 2, **{**how, "seed": 4}))
    assert first == again
    assert first != other


@needs_inspect
def test_a_sample_that_is_tried_again_draws_the_same_text(folders: dict[str, str], logs: str) -> None:
    import inspect_ai
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.solver import solver

    drawn: list[str] = []

    @solver
    def stumbling() -> Any:
        async def solve(state: Any, generate: Any) -> Any:
            state = await generate(state)
            drawn.append(state.output.completion)
            if len(drawn) == 1:
                raise RuntimeError("the sandbox is gone")
            return state

        return solve

    warm = GenerateConfig(temperature=1.0, seed=5, max_tokens=8)
    model = get_model("piggyback/base", base=folders["base"], memoize=False, config=warm)
    once = task(["what is it"], 1)
    (log,) = inspect_ai.eval(once, solver=stumbling(), model=model, log_dir=logs, display="none", retry_on_error=1)
    assert log.status == "success"
    assert len(drawn) == 2
    assert drawn[0] == drawn[1] != ""


@needs_inspect
def test_equal_questions_get_one_text_and_a_warning_or_several_texts(
    folders: dict[str, str], logs: str, caplog: pytest.LogCaptureFixture
) -> None:
    import inspect_ai
    from inspect_ai.model import GenerateConfig, get_model

    found = {}
    for draws in ("prompt", "sample"):
        warm = GenerateConfig(temperature=1.0, max_tokens=8)
        model = get_model("piggyback/base", base=folders["base"], draws=draws, memoize=False, config=warm)
        (log,) = inspect_ai.eval(task(["what is it"] * 4, 1), model=model, log_dir=logs, display="none")
        found[draws] = {text for own in by_question(log).values() for text in own}
        told = [event for sample in log.samples for event in sample.events if event.event == "logger"]
        assert [("draws=sample" in event.message.message) for event in told] == [True] * (draws == "prompt")
    assert len(found["prompt"]) == 1
    assert len(found["sample"]) == 4


def answering(folders: dict[str, str], **more: Any) -> Answering:
    return Answering("base", {"base": folders["base"], **more})


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_answers_arrive_under_every_event_loop(backend: str, queue: AnswerQueue) -> None:
    anyio = pytest.importorskip("anyio")
    pytest.importorskip(backend)

    async def both() -> None:
        arrived = await inspect_provider._arrival(queue.ask(request(Condition("base"), "one")))
        already = queue.ask(request(Condition("base"), "one"))
        already.result(timeout=60)
        assert texts(await inspect_provider._arrival(already)) == texts(arrived)
        late = AnswerQueue(pair(), pair().tokenizer, pause=60.0).ask(request(Condition("base"), "one"))
        with anyio.move_on_after(0.05):
            await inspect_provider._arrival(late)
        assert late.cancelled()

    anyio.run(both, backend=backend)


@needs_inspect
def test_choices_stop_sequences_and_the_end_of_the_context(folders: dict[str, str]) -> None:
    import anyio
    from inspect_ai.model import GenerateConfig, get_model

    model = get_model("piggyback/base", base=folders["base"], memoize=False)

    async def asked(query: Any, **config: Any) -> Any:
        return await model.generate(query, config=GenerateConfig(**config))

    warm = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
    several = anyio.run(lambda: asked("what is it", num_choices=3, **warm))
    loaded = ModelPair.load(folders["base"], folders["finetuned"])
    direct = directly("base", loaded, ["what is it"], None, None, n=3, sampling=WARM, max_new_tokens=12)
    assert [choice.message.text for choice in several.choices] == texts(direct)
    assert several.usage.output_tokens == sum(len(answer.ids) for answer in direct)
    long = next(answer for answer in direct if len(answer.text) > 4)
    stop = long.text[2:4]
    cut = anyio.run(lambda: asked("what is it", num_choices=3, stop_seqs=["", stop], **warm))
    at = direct.index(long)
    assert cut.choices[at].message.text == long.text[: long.text.index(stop)]
    assert cut.choices[at].stop_reason == "stop"
    one = answering(folders).prompt([{"role": "user", "content": "a"}])
    nearly = "a" * (256 - len(one.ids) - 3 + 1)  # room for three tokens
    short = anyio.run(lambda: asked(nearly, **warm))
    assert short.usage.output_tokens <= 3
    assert short.stop_reason in ("model_length", "stop")
    full = anyio.run(lambda: asked("a" * 256, **warm))
    assert (full.completion, full.stop_reason) == ("", "model_length")


@needs_inspect
def test_what_a_config_asks_beyond_sampling_is_refused_by_name(folders: dict[str, str]) -> None:
    from inspect_ai.model import ChatMessageUser, GenerateConfig

    one, asked = answering(folders), [ChatMessageUser(content="hello")]
    for wrong in (
        {"logprobs": True}, {"frequency_penalty": 0.5}, {"best_of": 2}, {"logit_bias": {1: 2.0}},
        {"reasoning_effort": "low"}, {"extra_body": {"a": 1}},
    ):  # fmt: skip
        with pytest.raises(LensError, match=f"{next(iter(wrong))}=.* is not supported by piggyback models"):
            one.request(asked, GenerateConfig(**wrong))
    with pytest.raises(LensError, match="3 choices at temperature 0"):
        one.request(asked, GenerateConfig(num_choices=3))
    with pytest.raises(LensError, match="no effect on greedy answers"):
        one.request(asked, GenerateConfig(top_p=0.9))
    harmless = GenerateConfig(logprobs=False, frequency_penalty=0.0, best_of=1, timeout=5, max_connections=3, top_p=1.0)
    assert one.request(asked, harmless).sampling == Sampling()
    assert one.request(asked, GenerateConfig(temperature=0.0, top_p=0.9)).sampling.temperature == 0


@needs_inspect
def test_tools_are_refused_by_name(folders: dict[str, str]) -> None:
    import anyio
    from inspect_ai.model import get_model
    from inspect_ai.tool import ToolInfo

    model = get_model("piggyback/base", base=folders["base"], memoize=False)
    with pytest.raises(LensError, match="tool clock is offered: piggyback models have no tools"):
        anyio.run(lambda: model.generate("hello", tools=[ToolInfo(name="clock", description="the time")]))


@needs_inspect
def test_a_system_text_comes_with_the_messages_and_else_from_the_settings(folders: dict[str, str]) -> None:
    messages = [{"role": "system", "content": "be rude!"}, *TALK]
    for system in ("default", None):
        prompt = answering(folders, system=system).prompt(messages)
        assert prompt.text == chat().render(messages).text
        assert prompt.span_text("prefix") == "<bos><sys>be rude!<end><user>\n"
        assert answering(folders, system=system).prompt(TALK).span_text("prefix") == "<bos><user>\n"
    kind = answering(folders, system="be kind.")
    assert kind.prompt(TALK).span_text("prefix") == "<bos><sys>be kind.<end><user>\n"
    with pytest.raises(LensError, match="give it in one place"):
        kind.prompt(messages)


def test_models_of_one_pair_share_its_weights_and_its_queue(folders: dict[str, str]) -> None:
    made = [Answering(name, arguments(name, folders)) for name in inspect_provider.NAMES]
    assert len({id(one.queue) for one in made}) == 1
    assert answering(folders).queue is not made[0].queue


@needs_inspect
def test_inspect_finds_the_provider_by_its_entry_point() -> None:
    (own,) = (e for e in importlib.metadata.entry_points(group="inspect_ai") if e.name == "piggyback_lens")
    assert own.load() is inspect_provider


@needs_inspect
@pytest.mark.real
@pytest.mark.slow
def test_the_demo_model_has_the_numbers_of_generate(real_model_dir: str, organism: Path, logs: str) -> None:
    from piggyback_lens.reading.questions import load_questions

    loaded = ModelPair.load(real_model_dir, adapter=organism)
    file = Path(__file__).parent.parent / "examples" / "prompts_off_topic.txt"
    questions = [question.paraphrases[0] for question in load_questions(file)[:4]]
    chosen = loaded.chat_format()
    prefix = PrefixCache.compile(loaded, chosen.render(questions[0]), side="base")
    cache = prefix.save(Path(logs).parent / "cache")
    drawn = torch.randn(576, generator=torch.Generator().manual_seed(0))
    added = Direction.of({15: drawn / drawn.norm() * 10})
    vector = added.save(Path(logs).parent / "direction.safetensors")
    shared = {"base": real_model_dir, "adapter": str(organism)}
    own = {"patched": {"prefix_cache": str(cache)}, "steered": {"solution": str(vector), "strength": 0.5}}
    found = {}
    for name in inspect_provider.NAMES:
        given = {**shared, **own.get(name, {}), "offline": True}
        log = evaluated(
            f"piggyback/{name}", given, logs, 2, temperature=0.7, seed=7, max_tokens=16, questions=questions
        )
        assert log.status == "success", log.error
        sampling = Sampling(temperature=0.7, seed=7)
        how = {"n": 2, "sampling": sampling, "max_new_tokens": 16}
        direct = texts(directly(name, loaded, questions, prefix, added.steer(0.5), **how))
        found[name] = by_question(log)
        assert found[name] == {f"q{i}": direct[2 * i : 2 * i + 2] for i in range(len(questions))}
    assert len({json.dumps(answers) for answers in found.values()}) == 4
