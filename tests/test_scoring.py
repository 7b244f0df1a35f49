"""Teacher-forced measures against single rows through plain transformers."""

import weakref

import pytest
import tiny_chat
import tiny_models
import torch
from tiny_hooked import CASES, FEW, chat, hooked, prompts
from torch.nn import functional
from torch.testing import assert_close

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Record
from piggyback_lens.interventions.kinds import add, cache, patch, zero
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring import scoring
from piggyback_lens.measuring.scoring import contrast, kl_to_base, nll, response_log_probs
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair

RESPONSES = ["yes.", "certainly not, never!", "b"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def answered(responses=RESPONSES):
    return [prompt.with_response(text) for prompt, text in zip(prompts(), responses, strict=True)]


@torch.no_grad()
def slow_logits(name, seed, prompt):
    """Logits that predict the response's tokens, from the transformers model, one row, no cache."""
    plain = tiny_models.build(name, seed, vocab=tiny_chat.VOCAB)
    logits = plain(input_ids=torch.tensor([prompt.ids])).logits[0]
    return logits[prompt.n_prompt - 1 : len(prompt.ids) - 1]


def slow_log_probs(name, seed, prompt):
    targets = torch.tensor(prompt.ids[prompt.n_prompt :])
    return slow_logits(name, seed, prompt).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def vector():
    return torch.randn(32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_log_probabilities_are_those_of_transformers(name, backend):
    model, scored = hooked(name, backend), answered()
    expected = [slow_log_probs(name, 0, prompt) for prompt in scored]
    for batch_size in (1, 2, 16):
        found = response_log_probs(model, scored, batch_size=batch_size)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, **TOLERANCE)
    assert_close(nll(model, scored), torch.stack([-x.mean() for x in expected]), **TOLERANCE)
    assert_close(nll(model, scored[::-1]), torch.stack([-x.mean() for x in expected[::-1]]), **TOLERANCE)


@pytest.mark.parametrize(("name", "backend"), FEW)
def test_interventions_and_their_prefix_caches_score_alike(name, backend):
    model, scored = hooked(name, backend), answered()
    for intervention in (add(vector(), layers=1), zero("v", span="query"), zero("z", span="response", layers=2)):
        ours = nll(model, scored, interventions=intervention)
        for row, prompt in enumerate(scored):
            ids = torch.tensor([prompt.ids])
            with torch.no_grad(), applied(model, batch_prompts([prompt]), intervention):
                logits = forward(model, ids, torch.ones_like(ids))[0, prompt.n_prompt - 1 : -1]
            assert_close(ours[row], functional.cross_entropy(logits, ids[0, prompt.n_prompt :]), **TOLERANCE)
        assert (ours - nll(model, scored)).abs().max() > 1e-3
    on_prefix = add(vector(), layers=1, span="prefix")
    cached = PrefixCache.compile(model, prompts()[0], on_prefix)
    assert_close(
        nll(model, scored, prefix_cache=cached, batch_size=2), nll(model, scored, interventions=on_prefix), **TOLERANCE
    )


@pytest.mark.parametrize(("name", "backend"), FEW)
def test_each_prompt_can_have_a_prefix_cache_of_its_own(name, backend):
    model, scored = hooked(name, backend), answered()
    strengths = (0.0, 0.5, 1.0)
    each = [add(vector(), layers=1, span="prefix", strength=x) for x in strengths]
    caches = PrefixCache.compile_many(model, prompts()[0], each)
    for batch_size in (1, 2, 16):
        ours = nll(model, scored, prefix_cache=caches, batch_size=batch_size)
        alone = [nll(model, [p], interventions=x)[0] for p, x in zip(scored, each, strict=True)]
        assert_close(ours, torch.stack(alone), **TOLERANCE)
    query = zero("v", span="query", layers=0)
    both = nll(model, scored, prefix_cache=caches, interventions=query)
    alone = [nll(model, [p], interventions=x + query)[0] for p, x in zip(scored, each, strict=True)]
    assert_close(both, torch.stack(alone), **TOLERANCE)


def test_donors_of_each_prompt_stay_with_their_prompt():
    model, scored = hooked("llama-gqa", "bridge"), answered()
    donor_model = hooked("llama-gqa", "bridge", 1)
    record = Record()
    response_log_probs(donor_model, scored, interventions=cache("v", span="query"), record=record, batch_size=2)
    donor = record.activations_of("query")
    together = nll(model, scored, interventions=patch(donor), batch_size=2)
    alone = [nll(model, [p], interventions=patch(donor.row(i)))[0] for i, p in enumerate(scored)]
    assert_close(together, torch.stack(alone), **TOLERANCE)


def test_the_contrast_is_high_where_the_first_answers_are_likelier():
    model = hooked("llama-gqa", "bridge")
    one, other = answered(), answered(["no", "perhaps, who knows", "zz"])
    found = contrast(model, one, other)
    expected = [
        slow_log_probs("llama-gqa", 0, a).mean() - slow_log_probs("llama-gqa", 0, b).mean()
        for a, b in zip(one, other, strict=True)
    ]
    assert_close(found, torch.stack(expected), **TOLERANCE)
    assert_close(contrast(model, other, one), -found, rtol=0, atol=0)
    with pytest.raises(LensError, match="3 responses against 2"):
        contrast(model, one, other[:2])


@pytest.mark.parametrize(("name", "backend"), FEW)
def test_kl_runs_from_base_to_the_other_side(name, backend):
    scored = answered()
    pair = ModelPair(hooked(name, backend, 0), hooked(name, backend, 1), tokenizer=chat().tokenizer)
    found = kl_to_base(pair, scored, batch_size=2)
    for ours, prompt in zip(found, scored, strict=True):
        p, q = (slow_logits(name, seed, prompt).double().log_softmax(-1) for seed in (0, 1))
        expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)
        assert (ours > 0).all()
    for ours in kl_to_base(pair, scored, side="base"):
        assert ours.abs().max() < 1e-5
    cached = PrefixCache.compile(pair, prompts()[0], side="base")
    repaired = kl_to_base(pair, scored, prefix_cache=cached)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(repaired, found, strict=True))


@pytest.mark.parametrize("score", [response_log_probs, kl_to_base])
def test_logits_of_one_batch_at_a_time_are_held(score, monkeypatch):
    """They are the largest tensors there are: of 2,000 answers of an 8B model more than a GPU holds."""
    pair = ModelPair(hooked("llama-gqa", "bridge"), hooked("llama-gqa", "bridge", 1), tokenizer=chat().tokenizer)
    held, most, own = [], [], scoring.forward

    def watched(*args, **kwargs):
        most.append(sum(memory() is not None for memory in held))
        memory = own(*args, **kwargs).numpy().copy()  # lives as long as a tensor on it
        held.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    monkeypatch.setattr(scoring, "forward", watched)
    score(hooked("llama-gqa", "bridge") if score is response_log_probs else pair, answered() * 4, batch_size=2)
    assert len(most) >= 6
    assert max(most) <= (1 if score is response_log_probs else 3)  # one of each side, and the last of one


def test_what_cannot_be_scored_is_refused():
    model = hooked("llama-gqa", "bridge")
    with pytest.raises(LensError, match="every prompt needs a response"):
        nll(model, prompts())
    with pytest.raises(LensError, match="got no prompts"):
        nll(model, [])
    cached = PrefixCache.compile(model, prompts()[0])
    with pytest.raises(LensError, match="2 prefix caches for 3 prompts"):
        nll(model, answered(), prefix_cache=[cached, cached])
    with pytest.raises(LensError, match="acts on the prefix, which comes ready"):
        nll(model, answered(), prefix_cache=cached, interventions=zero("v", span="prefix"))
    other = [tiny_chat.tiny_format("be rude.").render("one", response="yes")]
    with pytest.raises(LensError, match="the prompt's prefix differs from the cached one"):
        nll(model, other, prefix_cache=cached)
    with pytest.raises(LensError, match="touched nothing"):
        nll(model, answered(["a", "b", "c"]), interventions=zero("v", span="response", tokens=[3]))
    with pytest.raises(LensError, match="batch_size 0"):
        nll(model, answered(), batch_size=0)


def test_what_is_no_prompt_or_does_not_fit_the_model_is_refused(unchecked):
    model, some = hooked("llama-gqa", "bridge"), prompts()
    scored = [prompt.with_response("yes") for prompt in some]
    for given, message in (
        ("yes", "got str where a list of rendered prompts belongs"),
        (scored[0], "got RenderedPrompt where a list"),
        ([], "got no prompts"),
        ([some[0].with_response([5, 2**31], end=False)], "prompt 0 holds token 2147483648 and the model knows 0 to 37"),
        ([some[0].with_response([5] * 5000, end=False)], "tokens, and the model takes"),
    ):
        with pytest.raises(LensError, match=message):
            nll(model, given)
    for ids in ([1.7], [True], [-1]):
        with pytest.raises(LensError, match="the response's ids hold"):
            some[0].with_response(ids)
