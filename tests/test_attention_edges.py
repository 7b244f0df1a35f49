"""Attention knockout: edges cut and scaled by hooks, against masks added in plain transformers."""

import inspect
from contextlib import contextmanager

import pytest
import tiny_chat
import tiny_models
import torch
import transformers
from test_exactness import CASES, slow_greedy
from tiny_hooked import BACKENDS, QUERIES, hooked, logits_of, no_hook_left, real
from torch.testing import assert_close

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Intervention, Record
from piggyback_lens.interventions.kinds import cut_attention
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.scoring import response_log_probs
from piggyback_lens.models.backends import attention_weights_name
from piggyback_lens.models.booting import boot_bridge, build_hooked
from piggyback_lens.models.network import forward

TEXT = [case for case in CASES if case[0] != "gemma3-vision"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def prompts():
    return [tiny_chat.tiny_format().render(query) for query in QUERIES]


@pytest.fixture(scope="module", params=BACKENDS)
def llama(request):
    return hooked("llama-gqa", request.param)


@contextmanager
def added_to_scores(plain, bias, layers=None):
    """Add bias [1, 1 or head, query, key] to the mask that the attention of a transformers model gets."""
    blocks = plain.transformer.h if hasattr(plain, "transformer") else None
    blocks = blocks or getattr(plain, "gpt_neox", getattr(plain, "model", plain)).layers

    def add(_, args, kwargs):
        return args, kwargs | {"attention_mask": kwargs["attention_mask"] + bias}

    handles = []
    for layer in range(len(blocks)) if layers is None else layers:
        names = [n for n in ("self_attn", "attn", "attention") if hasattr(blocks[layer], n)]
        handles.append(getattr(blocks[layer], names[0]).register_forward_pre_hook(add, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bias_of(prompt, read_by, read_from, scale, n_heads=1, heads=None):
    """What the scores get, cell by cell."""
    spans = {name: (span.start, span.stop) for name, span in prompt.spans.items()}
    spans |= {"all": (0, len(prompt.ids)), "prompt": (0, prompt.n_prompt)}
    spans.setdefault("response", (prompt.n_prompt, len(prompt.ids)))
    bias = torch.zeros(1, n_heads, len(prompt.ids), len(prompt.ids))
    for head in range(n_heads) if heads is None else heads:
        for query in range(*spans[read_by]):
            for key in range(*spans[read_from]):
                bias[0, head, query, key] = -1e9 if scale == 0 else torch.tensor(scale).log()
    return bias


EDGES = [("query", "prefix", 0.0), ("postfix", "query", 0.25), ("all", "system", 3.0)]


@pytest.mark.parametrize(("name", "backend"), TEXT, ids=map("-".join, TEXT))
def test_a_cut_or_scaled_edge_is_a_mask_added_in_plain_transformers(name, backend, prompts):
    weights = tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)
    model = (boot_bridge if backend == "bridge" else build_hooked)(weights, prompts[0].tokenizer, name)
    for number, (read_by, read_from, scale) in enumerate(EDGES):
        where = {} if number == 0 else {"layers": [1], "heads": [0, 3]}
        batch = batch_prompts(prompts, side=("left", "right")[number % 2])
        ours, record = logits_of(model, batch, cut_attention(read_by, read_from, scale=scale, **where))
        plain, _ = logits_of(model, batch)
        expected = []
        for prompt in prompts:
            heads = {} if number == 0 else {"n_heads": 4, "heads": [0, 3]}
            bias = bias_of(prompt, read_by, read_from, scale, **heads)
            with torch.no_grad(), added_to_scores(weights, bias, where.get("layers")):
                expected.append(weights(input_ids=torch.tensor([prompt.ids]), use_cache=False).logits[0])
        assert_close(real(ours, batch), torch.cat(expected), **TOLERANCE)
        assert (real(ours, batch) - real(plain, batch)).abs().max() > 1e-3
        assert record.receipts[0].change_norm > 0
    without_the_prefixs_keys_the_rest_is_a_pass_without_the_prefix(weights, model, prompts)


def without_the_prefixs_keys_the_rest_is_a_pass_without_the_prefix(weights, model, prompts):
    batch = batch_prompts(prompts, side="right")
    cut = cut_attention("query", "prefix") + cut_attention("postfix", "prefix")
    ours, _ = logits_of(model, batch, cut)
    for row, prompt in enumerate(prompts):
        start = prompt.span("prefix").stop
        with torch.no_grad():
            alone = weights(
                input_ids=torch.tensor([prompt.ids[start:]]),
                position_ids=torch.arange(start, len(prompt.ids))[None],
                use_cache=False,
            ).logits[0]
        assert_close(ours[row, start : len(prompt.ids)], alone, **TOLERANCE)


def test_an_unchanged_scale_changes_nothing_bit_for_bit(llama, prompts):
    batch = batch_prompts(prompts)
    same = cut_attention("all", "all", scale=1.0)
    keeps = [(f"blocks.{layer}.attn.hook_attn_scores", lambda scores, hook: scores + 0.0) for layer in range(3)]
    hooked_only, _ = logits_of(llama, batch, fwd_hooks=keeps)
    with no_hook_left(llama):
        ours, record = logits_of(llama, batch, same)
    assert_close(real(ours, batch), real(hooked_only, batch), rtol=0, atol=0)
    assert record.receipts[0].change_norm == 0
    assert record.receipts[0].cells == 3 * sum(len(prompt.ids) for prompt in prompts)


def test_a_model_loaded_with_sdpa_needs_no_eager(prompts):
    weights = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB, attn_implementation="sdpa")
    model = boot_bridge(weights, prompts[0].tokenizer, "llama-gqa")
    prompt = prompts[2]
    causal = torch.full((len(prompt.ids),) * 2, -1e9).triu(1)
    mask = causal + bias_of(prompt, "query", "prefix", 0.0, 4, [1])
    with torch.no_grad():
        expected = weights(input_ids=torch.tensor([prompt.ids]), attention_mask=mask, use_cache=False).logits[0]
    assert weights.config._attn_implementation == "sdpa"
    ours, _ = logits_of(model, batch_prompts([prompt]), cut_attention("query", "prefix", heads=[1]))
    assert_close(ours[0], expected, **TOLERANCE)


def test_one_head_by_slow_arithmetic(llama, prompts):
    """z of head 3 in layer 1, weight by weight: the other keys share what the cut ones had."""
    prompt, kept = prompts[1], {}
    names = ("attn.hook_pattern", "attn.hook_v", "attn.hook_z")
    keeps = [(f"blocks.1.{name}", lambda x, hook, name=name: kept.__setitem__(name, x.clone())) for name in names]
    batch = batch_prompts([prompt])
    logits_of(llama, batch, fwd_hooks=keeps)
    weights, values, before = kept["attn.hook_pattern"][0, 3], kept["attn.hook_v"][0, :, 1], kept["attn.hook_z"][0]
    for scale in (0.0, 0.4):
        cut = cut_attention("query", "prefix", layers=1, heads=[3], scale=scale, tokens=[1, -1], from_tokens=[0, 5])
        kept.clear()
        logits_of(llama, batch, cut, fwd_hooks=keeps)
        expected = before.clone()
        span = prompt.span("query")
        for query in (span.start + 1, span.stop - 1):
            own = {key: float(weights[query, key]) * (scale if key in (0, 5) else 1.0) for key in range(query + 1)}
            total = sum(own.values())
            expected[query, 3] = sum(values[key] * (weight / total) for key, weight in own.items())
        assert_close(kept["attn.hook_z"][0], expected, rtol=1e-5, atol=1e-5)


GENERATED = [
    cut_attention("response", "prefix"),
    cut_attention("all", "query", layers=[1], heads=[2], scale=0.5),
    cut_attention("prompt", "system", phase="prompt", scale=0.1)
    + cut_attention("response", "prompt", layers=[0, 2], scale=2.0),
    cut_attention("prefix", "prefix", tokens=[3, 4], from_tokens=[0, 1]),
    cut_attention("query", "prefix", from_tokens=[-1], phase="prompt"),
]


@pytest.mark.parametrize(("name", "backend"), [*[("llama-gqa", x) for x in BACKENDS], ("gemma3", "bridge")])
@pytest.mark.parametrize("cut", GENERATED, ids=repr)
def test_generation_with_a_cache_is_the_whole_row_without_one(name, backend, cut, prompts):
    model = hooked(name, backend)
    expected = [slow_greedy(model, prompt, cut, 4) for prompt in prompts]
    for options in ({}, {"share_prefix": False}):
        found = [g.ids for g in generate(model, prompts, interventions=cut, max_new_tokens=4, **options)]
        assert found == expected, options


def test_teacher_forced_answer_tokens_are_readers_in_the_response(llama, prompts):
    rows = [prompt.with_response("an answer") for prompt in prompts]
    weights = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    record = Record()
    found = response_log_probs(llama, rows, interventions=cut_attention("response", "prefix"), record=record)
    for row, scores in zip(rows, found, strict=True):
        with torch.no_grad(), added_to_scores(weights, bias_of(row, "response", "prefix", 0.0)):
            logits = weights(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        expected = [logits[at - 1, row.ids[at]] for at in range(row.n_prompt, len(row.ids))]
        assert_close(scores, torch.stack(expected), **TOLERANCE)
    assert record.receipts[0].cells == 3 * sum(len(row.ids) - row.n_prompt for row in rows)


def test_an_edge_within_the_prefix_compiles_to_a_prefix_cache(llama, prompts):
    cut = cut_attention("prefix", "prefix", tokens=[3, 5], from_tokens=[0, 2], layers=[0, 1])
    batch = batch_prompts(prompts, side="right")
    whole, _ = logits_of(llama, batch, cut)
    length = len(prompts[0].span("prefix"))
    with torch.no_grad():
        state = PrefixCache.compile(llama, prompts[0], cut).state(llama, len(prompts))
        rest = forward(llama, batch.ids[:, length:], batch.attention_mask[:, length:], state=state)
    columns = batch.attention_mask[:, length:].bool()
    assert_close(rest[columns], whole[:, length:][columns], **TOLERANCE)
    with pytest.raises(LensError, match="reaches beyond the prefix"):
        PrefixCache.compile(llama, prompts[0], cut_attention("query", "prefix"))


def test_edges_are_differentiable(llama, prompts):
    batch, inputs = batch_prompts(prompts[:1]), []

    def keep(activation, hook):
        inputs.append(activation.detach().requires_grad_())
        return inputs[0]

    with torch.enable_grad(), llama.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", keep)]):
        for part, hook in cut_attention("query", "prefix", layers=2).fwd_hooks(llama, batch):
            llama.hook_dict[part].add_hook(hook)
        try:
            forward(llama, batch.ids, batch.attention_mask).sum().backward()
        finally:
            llama.hook_dict["blocks.2.attn.hook_attn_scores"].remove_hooks()
    assert torch.isfinite(inputs[0].grad).all()
    assert inputs[0].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cut_attention("query", "prefix", scale=-0.5), "scale -0.5 given, expected a finite number from 0"),
        (lambda: cut_attention("query", "prefix", scale=float("nan")), "scale nan given"),
        (lambda: cut_attention("query", "heading"), "span 'heading' is not in row 0"),
        (lambda: cut_attention("query", "prefix", from_tokens=[400]), "token 400 is outside span 'prefix' of row 0"),
        (lambda: cut_attention("query", "prefix", heads=[4]), "heads .4. asked at attn_scores, which has heads 0 to 3"),
        (lambda: cut_attention("prefix", "query"), "touched nothing"),
        (lambda: cut_attention("query", "all", layers=2), "leaves token 0 of query in row 0 no key to read in layer 2"),
        (lambda: Intervention("zero", "attn_scores"), "zero at site 'attn_scores': attention scores are cut or scaled"),
        (lambda: Intervention("cut", "z"), "cut at site 'z'"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(llama, prompts, make, message):
    with pytest.raises(LensError, match=message):
        logits_of(llama, batch_prompts(prompts), make())


def test_only_a_windows_own_keys_count_as_left(prompts):
    model = hooked("mistral", "bridge")
    batch = batch_prompts(prompts)
    near = {"read_by": "postfix", "read_from": "prompt", "tokens": [-1]}
    length = len(prompts[0].ids)
    with pytest.raises(LensError, match="no key to read"):
        logits_of(model, batch_prompts(prompts[:1]), cut_attention(**near, from_tokens=range(length - 6, length)))
    logits_of(model, batch_prompts(prompts[:1]), cut_attention(**near, from_tokens=range(length - 5, length)))
    assert batch.ids.shape[1] > 6


SIZES = {"num_attention_heads": 4, "num_heads": 4, "n_head": 4, "num_hidden_layers": 3, "num_layers": 3, "n_layer": 3}
SIZES |= {"hidden_size": 32, "n_embd": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "rotary_dim": 4}
SIZES |= {"attention_types": [[["global"], 3]], "max_position_embeddings": 256, "n_positions": 256}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["OPT", "GPTJ", "GPTNeo"])
def test_weights_that_are_shown_after_attention_has_used_them_are_refused(layout, dtype, prompts):
    known = inspect.signature(getattr(transformers, f"{layout}Config")).parameters
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = getattr(transformers, f"{layout}Config")(
        vocab_size=tiny_chat.VOCAB, attn_implementation="eager", bos_token_id=1, eos_token_id=2, **sizes
    )
    weights = tiny_models.perturbed(getattr(transformers, f"{layout}ForCausalLM"), config, 0).to(dtype)
    model, batch = boot_bridge(weights, prompts[0].tokenizer, layout), batch_prompts(prompts)
    for scale in (0.0, 0.25):
        with pytest.raises(LensError, match="shows its weights after they are normalised only"):
            logits_of(model, batch, cut_attention("query", "prefix", scale=scale))
    with pytest.raises(LensError, match="cannot be cut"):
        attention_weights_name(model, 1)


def test_scores_of_another_batch_are_refused(llama, prompts):
    (_, hook), *_ = cut_attention("query", "prefix").fwd_hooks(llama, batch_prompts(prompts[:1]))
    length = len(prompts[0].ids)
    with pytest.raises(LensError, match="attention looks at 3 keys"):
        hook(torch.randn(1, 4, length, length)[..., :3])


def test_a_cut_survives_json():
    cut = cut_attention("query", "prefix", heads=[1], from_tokens=[0, -1], scale=0.5)
    assert Intervention.from_dict(cut.to_dict()) == cut
    assert (
        repr(cut) == "cut(attn_scores, all layers, query, heads [1], read_from=prefix, from_tokens=[0, -1], scale=0.5)"
    )
