"""Generation: greedy and sampled answers, where they stop, and that batches are only a matter of speed."""

import collections
import copy
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import tiny_chat
import tiny_models
import torch
from recorded_steps import recorded_steps
from tiny_hooked import FEW, QUERIES, chat, hooked, needs_hooked, prompts

from piggyback_lens.conversations.batch import common_prefix_length
from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.interventions.hooks import Record
from piggyback_lens.interventions.kinds import add, cache, patch, zero
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring import generation
from piggyback_lens.measuring.generation import generate, to_frame
from piggyback_lens.measuring.sampling import Chooser, Sampling
from piggyback_lens.models import plain_views, static
from piggyback_lens.models.backends import generation_config_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.plain_views import plain_view
from piggyback_lens.models.states import new_state
from piggyback_lens.models.static import StaticDecoding
from piggyback_lens.reading.questions import Question
from piggyback_lens.settings import LoRASettings

MANY = [*QUERIES, "four", "five is a bit longer", "six", "seven?"]


@pytest.fixture(scope="module", params=FEW, ids="-".join)
def model(request):
    return hooked(*request.param)


@pytest.fixture
def unchecked():
    """As for a user, who does not run the library under a run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def ids(answers):
    return [answer.ids for answer in answers]


@torch.no_grad()
def next_probabilities(model, prompt):
    return model(torch.tensor([prompt.ids]))[0, -1].double().softmax(-1)


# ---------------------------------------------------------------- sampling


def test_samples_do_not_depend_on_batch_size_or_order(model):
    some, settings = prompts(MANY), {"max_new_tokens": 6, "sampling": Sampling(temperature=1.5, seed=3)}
    one_by_one = ids(generate(model, some, **settings, batch_size=1))
    assert ids(generate(model, some, **settings, batch_size=3)) == one_by_one
    assert ids(generate(model, some, **settings, batch_size=16)) == one_by_one
    assert ids(generate(model, some[::-1], **settings, batch_size=4)) == one_by_one[::-1]
    assert ids(generate(model, some[2:3], **settings)) == one_by_one[2:3]
    assert ids(generate(model, some, **settings, share_prefix=False)) == one_by_one


def test_prompts_share_what_their_prefixes_have_in_common(model, monkeypatch):
    some = [tiny_chat.tiny_format(system).render(query) for system in ("be kind.", "be keen.") for query in QUERIES]
    common = common_prefix_length(some)
    assert 0 < common < len(some[0].spans["prefix"])
    started = []
    own = generation.starting_prefix
    monkeypatch.setattr(generation, "starting_prefix", lambda *a: started.append(own(*a)) or started[-1])
    for parts in (None, zero("v", span="prefix", layers=[1]), zero("v", span="prefix", tokens=[-1], layers=[1])):
        whole = generate(model, some, interventions=parts, max_new_tokens=6, stop_ids=[], share_prefix=False)
        del started[:]
        shared = generate(model, some, interventions=parts, max_new_tokens=6, stop_ids=[])
        assert ids(shared) == ids(whole)
        # One token of a span that ends beyond what is shared is left to the rows.
        assert [start and len(start) for start in started] == [None if parts and parts.parts[0].tokens else common]


def test_the_seed_decides_the_samples():
    model, some = hooked("llama-gqa", "bridge"), prompts(MANY)

    def sample(seed):
        return generate(model, some, max_new_tokens=8, sampling=Sampling(temperature=2.0, seed=seed))

    first, again, other = sample(0), sample(0), sample(1)
    assert ids(first) == ids(again)
    assert ids(first) != ids(other)
    assert [a.seed for a in first] == [a.seed for a in again]
    assert len({a.seed for a in (*first, *other)}) == 2 * len(MANY)
    state = torch.random.get_rng_state()
    sample(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_likeliest_token_alone_is_greedy(model):
    greedy = generate(model, prompts(), max_new_tokens=5)
    assert [a.seed for a in greedy] == [None] * 3
    for sampling in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9), Sampling(1e-4)):
        assert ids(generate(model, prompts(), max_new_tokens=5, sampling=sampling)) == ids(greedy)


def sampled_first_tokens(model, prompt, n, **settings):
    """Half of them from one call, half from one call per seed."""
    sampling = [Sampling(seed=seed, **settings) for seed in range(n // 2 + 1)]
    together = generate(model, [prompt], n=n - n // 2, max_new_tokens=1, sampling=sampling.pop())
    alone = [generate(model, [prompt], max_new_tokens=1, sampling=own)[0] for own in sampling]
    return collections.Counter(answer.ids[0] for answer in (*together, *alone))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 3.0}, {"temperature": 2.0, "top_k": 5}, {"temperature": 2.0, "top_p": 0.6}],
    ids=str,
)
def test_samples_follow_the_distribution(settings):
    """Chi squared against probabilities worked out by hand."""
    model, prompt, n = hooked("llama-gqa", "bridge"), prompts()[1], 160
    p = next_probabilities(model, prompt) ** (1 / settings["temperature"])
    p = p / p.sum()
    order = p.argsort(descending=True).tolist()
    kept = order[: settings.get("top_k", len(order))]
    if "top_p" in settings:
        total, kept = 0.0, []
        for token in order:
            if total >= settings["top_p"]:
                break
            kept.append(token)
            total += float(p[token])
    expected = {token: float(p[token] / p[kept].sum()) * n for token in kept}
    counts = sampled_first_tokens(model, prompt, n, **settings)
    assert set(counts) <= set(kept)
    large = [token for token in kept if expected[token] >= 5]
    rest = n - sum(expected[token] for token in large)
    found_rest = n - sum(counts[token] for token in large)
    statistic = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in large)
    statistic += (found_rest - rest) ** 2 / rest if rest > 1 else 0
    degrees = len(large)
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 4
    assert len(large) >= 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"temperature": float("nan")},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_sampling_settings_out_of_range_are_refused(settings):
    with pytest.raises(LensError, match="expected temperature >= 0"):
        Sampling(**settings)


WARPED = [
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", WARPED, ids="+".join)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("name", "backend"), FEW)
def test_every_token_is_drawn_from_the_scores_that_transformers_would_draw_from(name, backend, temperature, settings):
    """Those after all processors and warpers, from its own `generate` on what stands before the token."""
    model, owner = hooked(name, backend), tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)
    sampling = Sampling(temperature=temperature, seed=5, **settings)
    given = {"do_sample": False, "repetition_penalty": settings.get("repetition_penalty", 1.0)}
    if temperature:
        given = {"do_sample": True, "temperature": temperature, "top_k": 0, **settings}
    for answer in generate(model, prompts(), max_new_tokens=4, sampling=sampling, stop_ids=[]):
        uniform = np.random.default_rng(answer.seed).random(4)
        for step, token in enumerate(answer.ids):
            before = torch.tensor([answer.prompt.ids + answer.ids[:step]])
            scores = owner.generate(
                before,
                attention_mask=torch.ones_like(before),
                max_new_tokens=1,
                output_scores=True,
                return_dict_in_generate=True,
                pad_token_id=0,
                **given,
            ).scores[0][0]
            if not temperature:
                assert int(scores.argmax()) == token
                continue
            p = scores.double().softmax(-1)
            below = float(p[:token].sum())
            assert p[token] > 0
            assert below - 1e-4 <= uniform[step] <= below + float(p[token]) + 1e-4


# ---------------------------------------------------------------- several samples of a prompt


def test_n_samples_are_n_single_calls_and_the_prompt_is_computed_once(model, monkeypatch):
    some, sampling = prompts(), Sampling(temperature=1.5, seed=3)
    together = generate(model, some, n=5, max_new_tokens=6, sampling=sampling)
    assert [a.sample for a in together] == [0, 1, 2, 3, 4] * 3
    assert [a.prompt for a in together] == [prompt for prompt in some for _ in range(5)]
    assert len({a.ids for a in together}) > 6
    for number in range(5):
        alone = generate(model, some, samples=[number] * 3, max_new_tokens=6, sampling=sampling, batch_size=1)
        assert ids(alone) == ids(together[number::5])
        assert [a.seed for a in alone] == [a.seed for a in together[number::5]]
    for batch_size in (1, 2, 7):
        again = generate(model, some, n=5, max_new_tokens=6, sampling=sampling, batch_size=batch_size)
        assert ids(again) == ids(together)
    few = generate(model, some[::-1][:2], samples=[4, 2], max_new_tokens=6, sampling=sampling)
    assert ids(few) == [together[14].ids, together[7].ids]
    rows: list[int] = []
    own = generation.forward
    monkeypatch.setattr(generation, "forward", lambda m, x, *a, **k: rows.append(len(x)) or own(m, x, *a, **k))
    generate(model, some[:1], n=8, max_new_tokens=2, sampling=sampling, stop_ids=[])
    assert rows == [1, 8]


def test_samples_under_interventions_and_from_a_prefix_cache_are_single_calls_too(model):
    some, sampling = prompts(), Sampling(temperature=1.5, seed=3)
    steer = add(torch.linspace(-9, 9, 32), layers=1, span="query")
    always = add(torch.linspace(-9, 9, 32), layers=1)
    cache = PrefixCache.compile(model, some[0], zero("v", span="prefix", layers=[0]))
    donor = tiny_hooked_donor(model, some)
    for how in ({"interventions": steer}, {"interventions": always}, {"prefix_cache": cache}, {"interventions": donor}):
        together = generate(model, some, n=3, max_new_tokens=5, sampling=sampling, **how)
        for number in range(3):
            alone = generate(model, some, samples=[number] * 3, max_new_tokens=5, sampling=sampling, **how)
            assert ids(alone) == ids(together[number::3])


def tiny_hooked_donor(model, some):
    with applied(model, batch_prompts(some, side="right"), cache("resid_pre", span="query", layers=[1])) as record:
        batch = batch_prompts(some, side="right")
        forward(model, batch.ids, batch.attention_mask)
    return patch(record.activations_of("query"))


def test_equal_prompts_are_numbered_in_order_and_this_is_said():
    model, prompt, sampling = hooked("llama-gqa", "bridge"), prompts()[0], Sampling(temperature=2.0)
    with pytest.warns(UserWarning, match="4 prompts of which 2 differ: equal ones are samples 0, 1"):
        answers = generate(model, [prompt, prompts()[1], prompt, prompt], max_new_tokens=6, sampling=sampling)
    assert [a.sample for a in answers] == [0, 0, 1, 2]
    assert ids(answers[:1] + answers[2:]) == ids(generate(model, [prompt], n=3, max_new_tokens=6, sampling=sampling))
    assert len(set(ids(answers))) == 4
    with pytest.warns(UserWarning, match="2 prompts of which 1 differ"):
        doubled = generate(model, [prompt, prompt], n=2, max_new_tokens=6, sampling=sampling)
    assert [a.sample for a in doubled] == [0, 1, 2, 3]
    assert ids(doubled) == ids(generate(model, [prompt], n=4, max_new_tokens=6, sampling=sampling))
    greedy = generate(model, [prompt, prompt], max_new_tokens=6)
    assert greedy[0].ids == greedy[1].ids


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n": 3}, "n 3 at temperature 0 would be one answer 3 times"),
        ({"n": 0, "sampling": Sampling(1.0)}, "n 0: each must be at least 1"),
        ({"n": 2, "samples": [1, 2, 3], "sampling": Sampling(1.0)}, "n and samples were given"),
        ({"samples": [1, 2], "sampling": Sampling(1.0)}, r"samples \[1, 2\] for 3 prompts"),
        ({"samples": [1, 2, True], "sampling": Sampling(1.0)}, "give each its number"),
        ({"n": 2, "sampling": Sampling(1.0), "interventions": cache("v")}, "n samples would overwrite each other"),
        ({"stop_ids": [2**31]}, "stop_ids hold 2147483648: expected token ids, whole numbers from 0 to 37"),
        ({"stop_ids": [1.7]}, "stop_ids hold 1.7"),
        ({"stop_ids": [True]}, "stop_ids hold True"),
        ({"max_new_tokens": 10_000}, "and an answer of 10000, and the model takes"),
    ],
    ids=str,
)
def test_samples_and_ids_that_cannot_be_are_refused(how, message, unchecked):
    with pytest.raises(LensError, match=message):
        generate(hooked("llama-gqa", "bridge"), prompts(), **how)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hello", "got str where a list of rendered prompts belongs"),
        (prompts()[0], "got RenderedPrompt where a list of rendered prompts belongs"),
        (["hello"], "prompt 0 is str, expected a rendered prompt"),
        (3, "got int where"),
    ],
    ids=str,
)
def test_what_is_no_list_of_prompts_is_refused(given, message, unchecked):
    with pytest.raises(LensError, match=message):
        generate(hooked("llama-gqa", "bridge"), given)


def test_stop_tokens_and_sampling_come_from_the_generation_config_too(monkeypatch):
    owner = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    model = hook_model(owner, chat().tokenizer)
    free = generate(model, prompts(MANY), max_new_tokens=8, stop_ids=[])
    stop = collections.Counter(token for a in free for token in a.ids[1:]).most_common(1)[0][0]
    for eos in (stop, [stop, 1]):
        monkeypatch.setattr(generation_config_of(model), "eos_token_id", eos)
        stopped = generate(model, prompts(MANY), max_new_tokens=8)
        for a, b in zip(free, stopped, strict=True):
            ends = [i for i, t in enumerate(a.ids) if t == stop or (t == 1 and eos != stop) or t in chat().stop_ids]
            assert b.ids == a.ids[: ends[0] + 1 if ends else 8]
    config = generation_config_of(model)
    assert Sampling.of_model(model) == Sampling()
    config.do_sample, config.temperature, config.top_k, config.min_p = True, 0.6, 20, 0.1
    config.repetition_penalty, config.top_p = 1.1, None
    assert Sampling.of_model(model, seed=4) == Sampling(0.6, 1.0, 20, 4, 0.1, 1.1)
    for name, value in {"no_repeat_ngram_size": 3, "typical_p": 0.9, "suppress_tokens": [5], "num_beams": 4}.items():
        with monkeypatch.context() as patched:
            patched.setattr(config, name, value)
            with pytest.raises(LensError, match=f"says {name}=.* not supported"):
                Sampling.of_model(model)


def test_answers_to_equal_prompts_have_each_its_own_question():
    model = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer)
    one = chat().render("hello")
    other, third = (Question(name, ["hello"]) for name in ("other", "third"))
    asked = [one, replace(one, question=other), chat().render("what is it"), replace(one, question=third, sample=1)]
    met = []

    def told(rows, done):
        met.extend((row, answer.prompt.question) for row, answer in zip(rows, done, strict=True))

    found = generate(model, asked, max_new_tokens=3, sampling=Sampling(temperature=1.0), on_batch=told)
    assert all(answer.prompt is prompt for answer, prompt in zip(found, asked, strict=True))
    assert dict(met) == {row: prompt.question for row, prompt in enumerate(asked)}


# ---------------------------------------------------------------- tensors of fixed size


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "qwen3", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_gives_the_same_answers(name, implementation):
    owner = tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)
    owner.set_attn_implementation(implementation)
    model, some = hook_model(owner, chat().tokenizer), prompts(MANY)
    repair = PrefixCache.compile(model, some[0], zero("v", span="prefix", layers=[1]))
    steer = add(torch.linspace(-9, 9, 32), layers=1, span="query")
    stop = collections.Counter(t for a in generate(model, some, max_new_tokens=8, stop_ids=[]) for t in a.ids[1:])
    stops = [stop.most_common(1)[0][0]]
    for how in (
        {}, {"prefix_cache": repair}, {"interventions": steer}, {"sampling": Sampling(1.5), "n": 3},
        {"stop_ids": stops}, {"sampling": Sampling(repetition_penalty=1.5)},
    ):  # fmt: skip
        expected = generate(model, some, max_new_tokens=8, **how)
        assert ids(generate(model, some, max_new_tokens=8, static_cache=True, **how)) == ids(expected)


def test_every_step_in_a_static_cache_works_in_the_same_tensors():
    model, some = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer), prompts()
    batch = batch_prompts(some, side="right")
    state = new_state(model, len(some))
    with torch.no_grad():
        forward(model, batch.ids, batch.attention_mask, state=state)
    state.right_align()
    fixed = StaticDecoding(model, 5, state.length + 4)
    start = copy.deepcopy(state.cache.layers), state.mask
    places = None
    for rows in ([0, 1, 2], [2, 0]):  # two batches, the second with fewer rows
        state.cache.layers, state.mask = copy.deepcopy(start[0]), start[1]
        state.select_rows(torch.tensor(rows))
        fixed.start(state)
        ids_ = torch.tensor([7, 8, 9])[: len(rows)]
        for _ in range(4):
            with torch.no_grad():
                expected = forward(model, ids_[:, None], torch.ones(len(rows), 1, dtype=torch.long), state=state)[:, 0]
            torch.testing.assert_close(fixed.step(ids_), expected, atol=1e-5, rtol=1e-5)
        keys = [x.keys for step in fixed._steps.values() for x in step.cache.layers]
        held = [fixed._ids, fixed._seen, fixed._positions, fixed._column, *keys]
        places = places or [x.data_ptr() for x in held]
        assert [x.data_ptr() for x in held] == places


def ending_early(model, some, length):
    """Answers, and stops with which they end at different steps."""
    free = generate(model, some, max_new_tokens=length, stop_ids=[])
    met = collections.Counter(token for answer in free for token in answer.ids[1:])
    return [token for token, _ in met.most_common(2)]


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2", "mixtral"])
def test_captured_steps_give_the_same_answers_in_ever_fewer_rows(name, monkeypatch):
    """Graphs are replayed as a GPU would: nothing of Python runs again, and a step has the rows that were captured."""
    monkeypatch.setattr(static, "FEWEST", 2)
    model = hook_model(tiny_models.build(name, 0, vocab=tiny_chat.VOCAB), chat().tokenizer)
    some = prompts([*MANY, *(text[::-1] for text in MANY)])
    stops = ending_early(model, some, 12)
    for how in ({"stop_ids": stops}, {"sampling": Sampling(1.5), "stop_ids": stops}, {"batch_size": 5}):
        expected = generate(model, some, max_new_tokens=12, **how)
        with recorded_steps() as graphs:
            assert ids(generate(model, some, max_new_tokens=12, **how)) == ids(expected)
        if graphs:
            assert sum(graph.replays > 0 for graph in graphs) > 1
        if "batch_size" not in how:
            assert len({len(answer.ids) for answer in expected}) > 3
    # All calls fit the room of the first, whose graphs are kept.
    assert not graphs


def test_captured_steps_read_the_weights_as_they_are_and_each_side_its_own(monkeypatch):
    monkeypatch.setattr(plain_views, "MERGED_GB", 0.0)  # the adapter's own layers are captured
    tuned = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=4))
    weights = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    pair = ModelPair.load(finetuned=tuned, tokenizer=chat().tokenizer)
    answers, some = {}, prompts(MANY)
    with recorded_steps() as graphs:
        for _ in range(2):
            for side in ("base", "finetuned"):
                with pair.using(side) as model:
                    answers.setdefault(side, []).append(ids(generate(model, some, max_new_tokens=6)))
        assert len(graphs) == 2
        assert answers["base"][0] == answers["base"][1] != answers["finetuned"][0] == answers["finetuned"][1]
        with pair.using("finetuned") as model, torch.no_grad():
            for weight in weights:
                weight.neg_()
            weights[0].mul_(2)
            changed = ids(generate(model, some, max_new_tokens=6))
            assert len(graphs) == 2
            assert changed == ids(generate(model, some, max_new_tokens=6, static_cache=False))
        assert changed != answers["finetuned"][0]


def test_a_bridge_that_was_booted_elsewhere_is_decoded_with_its_hooks():
    """A captured step would not run hooks that are added later."""
    model, some = hooked("llama-gqa", "bridge"), prompts()
    acting = [("blocks.1.hook_resid_post", lambda x, hook: x * 0)]
    with recorded_steps() as graphs:
        free = ids(generate(model, some, max_new_tokens=4))
        with model.hooks(fwd_hooks=acting):
            assert ids(generate(model, some, max_new_tokens=4)) != free
    assert not graphs
    with pytest.raises(LensError, match="this bridge was booted elsewhere"):
        generate(model, some, max_new_tokens=4, static_cache=True)


def test_a_call_in_inference_mode_leaves_tensors_that_the_next_can_use():
    model, some = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer), prompts()
    expected = ids(generate(model, some, max_new_tokens=4))
    with recorded_steps() as graphs:
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                assert ids(generate(model, some, max_new_tokens=4)) == expected
    assert len(graphs) == 1


def test_under_autocast_nothing_is_captured():
    model, some = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        expected = ids(generate(model, some, max_new_tokens=4))
        with recorded_steps() as graphs:
            assert ids(generate(model, some, max_new_tokens=4)) == expected
        assert not graphs
        with pytest.raises(LensError, match="under autocast keys and values differ in dtype"):
            generate(model, some, max_new_tokens=4, static_cache=True)


@pytest.mark.parametrize("fails", ["_pass", "graph"])
def test_a_step_that_cannot_be_captured_is_run_as_if_there_were_no_graphs(monkeypatch, fails):
    model, some = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer), prompts()
    expected = ids(generate(model, some, max_new_tokens=4))

    def refused(*_, **__):
        raise RuntimeError("out of memory")

    with recorded_steps() as graphs, monkeypatch.context() as patched:
        patched.setattr(StaticDecoding if fails == "_pass" else torch.cuda, fails, refused)
        with pytest.warns(UserWarning, match=r"could not be captured \(out of memory\) and runs step by step"):
            assert ids(generate(model, some, max_new_tokens=4, batch_size=2)) == expected
        assert ids(generate(model, some, max_new_tokens=4)) == expected  # no second try
        assert len(graphs) == (fails == "graph")


def test_what_a_broken_batch_leaves_reaches_no_other():
    """Masked columns are multiplied with zero, and zero times NaN is NaN."""
    model = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer)
    batch = batch_prompts(prompts()[:1], side="right")
    state = new_state(model, 1)
    with torch.no_grad():
        forward(model, batch.ids, batch.attention_mask, state=state)
    fixed, token = StaticDecoding(model, 1, state.length + 4), torch.tensor([7])
    fixed.start(state)
    expected = fixed.step(token).clone()
    for layer in fixed._steps[1].cache.layers:
        layer.keys[:, :, state.length :] = float("nan")
        layer.values[:, :, state.length :] = float("nan")
    fixed.start(state)
    torch.testing.assert_close(fixed.step(token), expected)


def test_a_large_cache_is_not_kept():
    model, some = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer), prompts()
    with recorded_steps() as graphs:
        generate(model, some, max_new_tokens=4)
        generate(model, some, max_new_tokens=4)
        assert len(graphs) == 1
    other = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer)
    with recorded_steps(device_bytes=1e4) as graphs:
        generate(other, some, max_new_tokens=4)
        generate(other, some, max_new_tokens=4)
        assert len(graphs) == 2


def test_fixed_tensors_serve_again_only_what_they_fit():
    model = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer)
    fixed = StaticDecoding(model, 8, 40)
    assert fixed.columns == 64
    assert fixed.serves(model, 8, 64)
    assert fixed.serves(model, 2, 10)
    assert not fixed.serves(model, 9, 40)
    assert not fixed.serves(model, 8, 65)
    assert not fixed.serves(model, 1, 40)
    weight = next(plain_view(model).parameters())
    with torch.no_grad():
        weight.add_(0.1)  # seen through the addresses
    assert fixed.serves(model, 8, 40)
    weight.data = weight.data.clone()
    assert not fixed.serves(model, 8, 40)
    wide = StaticDecoding(model, 200, 40)
    assert wide.sizes == [200, 100, 50]
    assert [wide.fitting(rows) for rows in (200, 101, 100, 50, 3)] == [200, 200, 100, 50, 50]
    assert wide.serves(model, 13, 40)
    assert not wide.serves(model, 12, 40)  # 50 rows would be computed


@pytest.mark.parametrize(
    ("name", "backend", "how", "message"),
    [
        ("llama-gqa", "bridge", {"interventions": add(torch.ones(32), layers=1)}, "acts on the answer, and a static"),
        ("gemma3", "bridge", {}, r"look back \d+ tokens and the rows have up to"),
        pytest.param("llama-gqa", "hooked", {}, "HookedTransformer has no static cache", marks=needs_hooked),
    ],
)
def test_what_a_static_cache_cannot_do_is_refused(name, backend, how, message):
    model = hook_model(tiny_models.build(name, 0, vocab=tiny_chat.VOCAB), chat().tokenizer, backend=backend)
    with pytest.raises(LensError, match=message):
        generate(model, prompts(), max_new_tokens=4, static_cache=True, **how)


def test_hooks_of_the_users_own_are_not_passed_by_with_a_static_cache():
    model = hook_model(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), chat().tokenizer)
    acting = [("blocks.1.hook_resid_post", lambda x, hook: x * 0)]
    refused = pytest.raises(LensError, match="hooks act on the model, and a static cache is decoded without any")
    with model.hooks(fwd_hooks=acting), refused:
        generate(model, prompts(), max_new_tokens=4, static_cache=True)


# ---------------------------------------------------------------- the end of an answer


def test_answers_end_at_a_stop_token_or_at_the_limit(model):
    free = generate(model, prompts(MANY), max_new_tokens=8, stop_ids=[])
    assert all(len(a.ids) == 8 and a.ended == "length" for a in free)
    stop = collections.Counter(token for a in free for token in a.ids[1:]).most_common(1)[0][0]
    stopped = generate(model, prompts(MANY), max_new_tokens=8, stop_ids=[stop], batch_size=4)
    for a, b in zip(free, stopped, strict=True):
        n = a.ids.index(stop) + 1 if stop in a.ids else 8
        assert b.ids == a.ids[:n]
        assert b.ended == ("stop" if stop in a.ids else "length")
    assert len(generate(model, prompts(), max_new_tokens=1)[0].ids) == 1


def test_rows_that_end_early_do_not_change_the_others(model):
    """Different rows stop at different steps under sampling; each is what it is alone."""
    sampling = Sampling(temperature=2.0, seed=1)
    free = generate(model, prompts(MANY), max_new_tokens=10, sampling=sampling, stop_ids=[])
    stops = list(range(6, 20))
    stopped = generate(model, prompts(MANY), max_new_tokens=10, sampling=sampling, stop_ids=stops)
    lengths = {len(a.ids) for a in stopped}
    assert len(lengths) > 2
    for a, b in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(a.ids) if token in stops]
        assert b.ids == a.ids[: ends[0] + 1 if ends else 10]


def test_the_templates_stop_tokens_are_the_default_and_the_text_leaves_special_tokens_out():
    model, prompt = hooked("llama-gqa", "bridge"), prompts()[0]
    end = chat().stop_ids[0]
    always_end = [("unembed.hook_out", lambda a, hook: a.index_fill(-1, torch.tensor([end]), 1e4))]
    with model.hooks(fwd_hooks=always_end):
        answer = generate(model, [prompt], max_new_tokens=5)[0]
        assert (answer.ids, answer.text, answer.ended) == ((end,), "", "stop")
        ignoring = generate(model, [prompt], max_new_tokens=5, stop_ids=[])[0]
        assert (ignoring.ids, ignoring.text, ignoring.ended) == ((end,) * 5, "", "length")
    sampled = generate(model, prompts(MANY), max_new_tokens=12, sampling=Sampling(3.0), stop_ids=[])
    assert any(token < len(tiny_chat.SPECIAL) for a in sampled for token in a.ids)
    for a in sampled:
        letters = [tiny_chat.LETTERS[t - 6] for t in a.ids if t >= 6]
        assert a.text == "".join(letters)


def test_an_answer_completes_its_prompt():
    answers = generate(hooked("llama-gqa", "bridge"), prompts(), max_new_tokens=4)
    for answer, prompt in zip(answers, prompts(), strict=True):
        done = answer.completed()
        assert done.ids == prompt.ids + answer.ids
        assert done.ids[done.spans["response"].start : done.spans["response"].stop] == answer.ids
    frame = to_frame(answers)
    assert frame["query"].tolist() == QUERIES
    assert frame["tokens"].tolist() == [len(a.ids) for a in answers]


# ---------------------------------------------------------------- batches


def test_every_answer_is_handed_out_once_when_its_batch_is_done():
    model, some = hooked("llama-gqa", "bridge"), prompts(MANY)
    seen: dict = {}

    def on_batch(rows, answers):
        assert len(rows) == len(answers) <= 3
        for row, answer in zip(rows, answers, strict=True):
            assert row not in seen
            seen[row] = answer

    answers = generate(model, some, max_new_tokens=3, batch_size=3, on_batch=on_batch)
    assert sorted(seen) == list(range(len(MANY)))
    assert all(seen[row] is answer for row, answer in enumerate(answers))
    assert [a.prompt for a in answers] == some


def test_an_error_in_on_batch_leaves_no_hook_behind():
    model = hooked("llama-gqa", "bridge")

    def full_disk(rows, answers):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        generate(model, prompts(), max_new_tokens=2, interventions=zero("v"), on_batch=full_disk)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_prompts_of_different_settings_run_in_one_call(model):
    mixed = [
        *prompts(),
        tiny_chat.tiny_format("a rather long system text, twice as long.").render("one"),
        tiny_chat.tiny_format("be rude!").render("two words here"),  # as long as the first prefix, but another
    ]
    alone = [generate(model, [prompt], max_new_tokens=5)[0].ids for prompt in mixed]
    assert ids(generate(model, mixed, max_new_tokens=5, batch_size=8)) == alone
    record = Record()
    on_prefix = zero("v", span="prefix", layers=0)
    alone = [generate(model, [prompt], max_new_tokens=5, interventions=on_prefix)[0].ids for prompt in mixed]
    assert ids(generate(model, mixed, max_new_tokens=5, interventions=on_prefix, record=record)) == alone
    with pytest.raises(LensError, match="the prompt's prefix differs from the cached one at token"):
        generate(model, mixed, prefix_cache=PrefixCache.compile(model, mixed[0]))


# ---------------------------------------------------------------- bad input


def test_input_that_cannot_be_used_is_refused(unchecked):
    model = hooked("llama-gqa", "bridge")
    with pytest.raises(LensError, match="got no prompts; pass at least one"):
        generate(model, [])
    with pytest.raises(LensError, match="max_new_tokens 0"):
        generate(model, prompts(), max_new_tokens=0)
    with pytest.raises(LensError, match="batch_size 0"):
        generate(model, prompts(), batch_size=0)
    with pytest.raises(LensError, match="holds a response already"):
        generate(model, [prompts()[0].with_response("yes")])
    with pytest.raises(LensError, match="expected a TransformerLens HookedTransformer or TransformerBridge"):
        generate(torch.nn.Linear(2, 2), prompts())
    with pytest.raises(LensError, match="span 'think' is not in row"):
        generate(model, prompts(), interventions=zero("v", span="think"))


def test_a_token_without_probability_is_never_drawn_even_at_the_ends():
    logits = torch.tensor([[0.0, 5.0, 1.0, 0.0]])
    for number, expected in ((0.0, 1), (0.5, 1), (1 - 2**-53, 2)):
        choose = Chooser([(1, 2)], [0], Sampling(temperature=1.0, top_k=2), 1)
        choose._numbers[:] = number
        assert choose(logits, [0], 0).tolist() == [expected]
