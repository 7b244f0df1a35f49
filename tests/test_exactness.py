"""The library's central equality: an intervention on the prefix, as hooks on whole prompts and as a prefix cache."""

import dataclasses

import pytest
import tiny_chat
import tiny_models
import torch
from tiny_hooked import BACKENDS, QUERIES
from torch.testing import assert_close

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.kinds import ablate, add, cache, patch, zero
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.backends import shape_of
from piggyback_lens.models.booting import boot_bridge, build_hooked
from piggyback_lens.models.network import forward

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
CASES = [
    (name, backend)
    for name in (*tiny_models.NAMES, *tiny_models.MORE)
    for backend in BACKENDS
    if backend == "bridge" or name not in tiny_models.NOT_HOOKED
]
SITES = ["k", "v", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "mlp_post"]
NO_MIDDLE = ("gpt-neox", "phi")
"""Layouts whose attention and MLP read the same residual stream, so that there is no resid_mid."""
NO_MLP_POST = (("mixtral", "hooked"), ("gpt-oss", "hooked"))
NO_ROT_K = (("phi3", "bridge"), ("gpt-neox", "bridge"), ("gpt2", "bridge"), ("gpt2", "hooked"))


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.tiny_format()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def sites(case):
    """The sites that this layout has on this backend."""
    absent = {"resid_mid"} if case[0] in NO_MIDDLE else set()
    return [site for site in SITES if site not in absent | ({"mlp_post"} if case in NO_MLP_POST else set())]


@pytest.fixture(scope="module")
def key_site(case):
    """Keys behind the key norm, whose weights differ here, where there is a hook there."""
    return "k" if case in NO_ROT_K else "rot_k"


@pytest.fixture(scope="module")
def pair(case, chat):
    """Two different hooked models of one layout and backend."""
    name, backend = case
    make = boot_bridge if backend == "bridge" else build_hooked
    vocab = len(chat.tokenizer)
    return tuple(make(tiny_models.build(name, seed, vocab=vocab), chat.tokenizer, name) for seed in (0, 1))


def prompts_of(chat):
    return [chat.render(query) for query in QUERIES]


@torch.no_grad()
def logits_of(model, batch, interventions=None):
    with applied(model, batch, interventions) as record:
        logits = forward(model, batch.ids, batch.attention_mask)
    return logits, record


def keep(model, batch, sites, span, **kwargs):
    return logits_of(model, batch, cache(sites, span=span, **kwargs))[1].activations_of(span)


def real(logits, batch):
    return torch.cat([row[mask.bool()] for row, mask in zip(logits, batch.attention_mask, strict=True)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_patching_a_model_with_itself_changes_nothing(pair, sites, chat, side):
    model, _ = pair
    batch = batch_prompts(prompts_of(chat), side=side)
    plain, _ = logits_of(model, batch)
    for span in ("prefix", "query", "postfix", "prompt"):
        own = keep(model, batch, sites, span)
        patched, record = logits_of(model, batch, patch(own))
        assert_close(patched, plain, rtol=0, atol=0)
        assert all(receipt.change_norm == 0 and receipt.cells > 0 for receipt in record.receipts)


def test_hook_path_equals_cache_path_for_every_site(pair, sites, chat):
    base, tuned = pair
    prompts = prompts_of(chat)
    batch = batch_prompts(prompts, side="right")
    length = len(prompts[0].span("prefix"))
    donor = keep(base, batch_prompts(prompts[:1]), sites, "prefix")
    vector = torch.randn(shape_of(tuned).d_model, generator=torch.Generator().manual_seed(0))
    many = [patch(donor, sites=site) for site in sites]
    many += [
        patch(donor, sites="resid_pre", layers=1),
        patch(donor, sites=("k", "v"), layers=[0, 2], heads=[0]),
    ]
    many += [
        add(vector, layers=1, span="prefix", strength=0.7),
        ablate(vector, site=[site for site in sites if site.startswith("resid")], span="prefix"),
        zero("v", layers=1, span="prefix", tokens=[0, 2]),
    ]
    plain, _ = logits_of(tuned, batch)
    compiled = PrefixCache.compile_many(tuned, prompts[0], many)
    for interventions, from_many in zip(many, compiled, strict=True):
        hooked, _ = logits_of(tuned, batch, interventions)
        alone = PrefixCache.compile(tuned, prompts[0], interventions)
        for prefix_cache in (alone, from_many):
            with torch.no_grad():
                state = prefix_cache.state(tuned, len(prompts))
                rest = forward(tuned, batch.ids[:, length:], batch.attention_mask[:, length:], state=state)
            columns = batch.attention_mask[:, length:].bool()
            assert_close(rest[columns], hooked[:, length:][columns], **TOLERANCE)
        if "q" not in repr(interventions) and "z" not in repr(interventions):
            assert (hooked - plain).abs().max() > 1e-3


def test_patching_every_key_and_value_of_the_prefix_is_the_base_models_prefix_cache(pair, key_site, chat):
    base, tuned = pair
    prompt = chat.render(QUERIES[1])
    # After the rotary embedding a key norm (whose weights differ here) is behind us; without rotary, k is all there is.
    donor = keep(base, batch_prompts([prompt]), [key_site, "v"], "prefix")
    ours = PrefixCache.compile(tuned, prompt, patch(donor))
    plain = PrefixCache.compile(base, prompt)
    assert_close(ours.keys, plain.keys, **TOLERANCE)
    assert_close(ours.values, plain.values, **TOLERANCE)
    assert (PrefixCache.compile(tuned, prompt).values - plain.values).abs().max() > 0.01


def test_patching_the_whole_residual_stream_of_every_token_reproduces_the_donor(pair, chat):
    base, tuned = pair
    batch = batch_prompts(prompts_of(chat))
    last = shape_of(tuned).n_layers - 1
    donor = keep(base, batch, ["resid_post"], "all", layers=[last])
    with torch.no_grad(), applied(tuned, batch, patch(donor) + cache("resid_post", layers=[last])) as record:
        forward(tuned, batch.ids, batch.attention_mask)
    assert_close(record.activations_of("all")["resid_post", last], donor["resid_post", last], rtol=0, atol=0)


def answers(model, prompts, **kwargs):
    return [g.ids for g in generate(model, prompts, max_new_tokens=4, **kwargs)]


def test_generation_is_the_same_with_and_without_kv_cache_batching_and_prefix_sharing(pair, chat):
    base, tuned = pair
    prompts = prompts_of(chat)
    vector = torch.randn(shape_of(tuned).d_model, generator=torch.Generator().manual_seed(0))
    donor = keep(base, batch_prompts(prompts[:1]), ["k", "v"], "prefix")
    postfix = keep(base, batch_prompts([chat.empty_query()]), ["k", "v"], "postfix")
    for interventions in (
        None,
        patch(donor),
        patch(donor) + patch(postfix),
        add(vector, layers=1),
        add(vector, layers=0, phase="generation"),
    ):
        one_by_one = [slow_greedy(tuned, prompt, interventions, 4) for prompt in prompts]
        assert answers(tuned, prompts, interventions=interventions) == one_by_one
        assert answers(tuned, prompts, interventions=interventions, share_prefix=False) == one_by_one
        assert answers(tuned, prompts, interventions=interventions, batch_size=1) == one_by_one


@torch.no_grad()
def slow_greedy(model, prompt, interventions, n):
    """Whole prompt plus answer so far through the model for every token: no cache, no padding."""
    ids = []
    for _ in range(n):
        full = prompt.with_response(ids, end=False) if ids else prompt
        batch = batch_prompts([full])
        with applied(model, batch, interventions, must_touch=False):
            ids.append(int(model(batch.ids)[0, -1].argmax()))
        if ids[-1] in prompt.answer.stop_ids:
            break
    return tuple(ids)


def test_generation_from_a_prefix_cache_equals_generation_under_hooks(pair, key_site, chat):
    base, tuned = pair
    prompts = prompts_of(chat)
    donor = keep(base, batch_prompts(prompts[:1]), [key_site, "v"], "prefix")
    repair = PrefixCache.compile(base, prompts[0])
    assert answers(tuned, prompts, prefix_cache=repair) == answers(
        tuned, prompts, interventions=patch(donor), share_prefix=False
    )


def test_interventions_on_a_prefix_that_comes_from_a_cache_are_refused(pair, chat):
    base, tuned = pair
    prompts = prompts_of(chat)
    with pytest.raises(LensError, match="acts on the prefix, which comes ready"):
        generate(
            tuned,
            prompts,
            prefix_cache=PrefixCache.compile(base, prompts[0]),
            interventions=zero("v", span="prefix"),
        )
    with pytest.raises(LensError, match="reaches beyond the prefix"):
        PrefixCache.compile(base, prompts[0], zero("v", span="all"))
    cached = PrefixCache.compile(base, prompts[0])
    other = dataclasses.replace(cached, ids=(cached.ids[0] + 1, *cached.ids[1:]))
    with pytest.raises(LensError, match="differs from the cached one at token"):
        generate(tuned, prompts, prefix_cache=other)
