"""PrefixCache on disk, in plain transformers, across backends, and for prompts whose prefix is shorter."""

import dataclasses
import json

import pytest
import tiny_chat
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_hooked import BACKENDS, FEW, QUERIES, chat, hooked, needs_hooked, prompts
from torch.testing import assert_close

from piggyback_lens.conversations.chat import ChatFormat, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.references import kv_reference
from piggyback_lens.interventions.hooks import Record
from piggyback_lens.interventions.kinds import ablate, add, cache, patch, resample, zero
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.scoring import nll
from piggyback_lens.models.backends import shape_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair

BOTH = [name for name in tiny_models.NAMES if name != "llama-bias"]


def vector(seed=0):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def steering():
    return add(vector(), layers=1, span="prefix", strength=0.8) + zero("v", layers=0, span="system")


def made(name="llama-gqa", backend="bridge"):
    pair = ModelPair(hooked(name, backend, 0), hooked(name, backend, 1), tokenizer=chat().tokenizer)
    return pair, PrefixCache.compile(pair, prompts()[0], steering())


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saved_cache_comes_back_bit_by_bit(tmp_path, backend):
    pair, ours = made(backend=backend)
    for tuned in (ours, dataclasses.replace(ours, keys=ours.keys.bfloat16(), values=ours.values.bfloat16())):
        folder = tuned.save(tmp_path / "deep" / "folder")
        back = PrefixCache.load(folder, model=hooked("llama-gqa", backend, 1), prompt=prompts()[2])
        assert torch.equal(back.keys, tuned.keys)
        assert torch.equal(back.values, tuned.values)
        assert back.keys.dtype == tuned.keys.dtype
        for field in ("ids", "description", "fingerprint", "compiled_on", "meant_for", "settings"):
            assert getattr(back, field) == getattr(tuned, field), field
    assert [identity.name for identity in back.meant_for] == ["base", "finetuned"]
    assert back.compiled_on == pair.identity("finetuned")
    assert repr(back) == repr(ours)
    assert "add(resid_post, layers 1, prefix" in repr(back)


def edit_json(folder, change):
    path = folder / "prefix_cache.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def flip_last_byte(folder):
    path = folder / "prefix_cache.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut_tensors(folder):
    path = folder / "prefix_cache.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def other_tensors(folder):
    path = folder / "prefix_cache.safetensors"
    save_file({name: value[:, :, :-1].contiguous() for name, value in load_file(path).items()}, path)


DAMAGES = {
    "no JSON": (lambda f: (f / "prefix_cache.json").unlink(), "prefix_cache.json cannot be read"),
    "broken JSON": (lambda f: (f / "prefix_cache.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda f: (f / "prefix_cache.json").write_text("[]"), "no prefix cache that can be read"),
    "no tensors": (lambda f: (f / "prefix_cache.safetensors").unlink(), "prefix_cache.safetensors is missing"),
    "cut tensors": (cut_tensors, "save it again"),
    "flipped bit": (flip_last_byte, "save it again"),
    "shorter tensors": (other_tensors, "save it again"),
    "wrong format": (lambda f: edit_json(f, lambda d: d.update(format=99)), "format 99.*save it again"),
    "no ids": (lambda f: edit_json(f, lambda d: d.pop("ids")), "no prefix cache that can be read.*ids"),
    "fewer ids": (lambda f: edit_json(f, lambda d: d["ids"].pop()), "save it again"),
    "no description": (lambda f: edit_json(f, lambda d: d.pop("description")), "no prefix cache that can be read"),
    "no shape": (lambda f: edit_json(f, lambda d: d.pop("shape")), "no prefix cache that can be read.*shape"),
    "odd identity": (lambda f: edit_json(f, lambda d: d["meant_for"][0].pop("probe")), "no prefix cache that can be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_refused_in_one_line(tmp_path, damage):
    spoil, message = DAMAGES[damage]
    folder = made()[1].save(tmp_path)
    spoil(folder)
    with pytest.raises(LensError, match=message) as caught:
        PrefixCache.load(folder)
    assert "\n" not in str(caught.value)


@needs_hooked
def test_a_cache_for_other_models_or_settings_is_refused(tmp_path):
    folder = made()[1].save(tmp_path)
    with pytest.raises(LensError, match="meant for base or finetuned, and this model gives other logits"):
        PrefixCache.load(folder, model=hooked("llama-gqa", "bridge", 2))
    with pytest.raises(LensError, match=r"has \(layers, kv heads, d_head\) \(3, 2, 8\), the model \(3, 4, 8\)"):
        PrefixCache.load(folder, model=hooked("llama-mha", "bridge", 0))
    other = tiny_chat.tiny_format("be rude.").render("one")
    with pytest.raises(LensError, match="other template settings"):
        PrefixCache.load(folder, prompt=other)
    with pytest.raises(LensError, match=r"differs from the cached one at token 5 \('r'\)"):
        PrefixCache.load(folder, model=hooked("llama-gqa", "bridge", 0), prompt=other)
    assert PrefixCache.load(folder, model=hooked("llama-gqa", "hooked", 0), prompt=prompts()[1])


def test_saving_to_a_place_that_is_no_folder_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LensError, match="cannot be written"):
        made()[1].save(tmp_path / "file")


# ---------------------------------------------------------------- compiling


@pytest.mark.parametrize(("name", "backend"), FEW)
def test_many_compiled_together_are_each_compiled_alone(name, backend):
    model = hooked(name, backend, 1)
    prompt = prompts()[0]
    with torch.no_grad(), applied(model, batch := batch_prompts([prompt]), cache("resid_pre", span="prefix")) as kept:
        forward(model, batch.ids, batch.attention_mask)
    donor = kept.activations
    many = [patch(donor, layers=[layer]) for layer in range(3)] + [None, ablate(vector(), span="prefix"), steering()]
    for together, one in zip(PrefixCache.compile_many(model, prompt, many), many, strict=True):
        alone = PrefixCache.compile(model, prompt, one)
        assert_close(together.keys, alone.keys, rtol=1e-5, atol=1e-5)
        assert_close(together.values, alone.values, rtol=1e-5, atol=1e-5)
        assert together.description == alone.description
        assert (together.ids, together.fingerprint) == (alone.ids, alone.fingerprint)


def test_more_interventions_than_fit_in_one_pass_are_all_compiled(monkeypatch):
    monkeypatch.setattr("piggyback_lens.interventions.prefix.ROWS_PER_PASS", 2)
    model, prompt = hooked("llama-gqa", "bridge"), prompts()[0]
    many = [add(vector(), layers=0, span="prefix", strength=float(x)) for x in range(5)]
    for together, one in zip(PrefixCache.compile_many(model, prompt, many), many, strict=True):
        assert_close(together.values, PrefixCache.compile(model, prompt, one).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_cache_is_the_cache_of_the_cut_prefix(backend):
    model = hooked("llama-gqa", backend)
    whole = PrefixCache.compile(model, prompts()[0])
    cut = whole.truncated(5)
    assert len(cut) == 5
    assert cut.ids == whole.ids[:5]
    logits = []
    ids = torch.tensor([prompts()[0].ids])
    with torch.no_grad():
        for state, n in ((cut.state(model, 1), 5), (whole.state(model, 1), len(whole))):
            logits.append(forward(model, ids[:, n:], torch.ones_like(ids[:, n:]), state=state)[:, -1])
    assert_close(*logits, rtol=1e-4, atol=1e-4)
    for length in (0, len(whole) + 1):
        with pytest.raises(LensError, match=f"a prefix of {len(whole)} tokens cannot be cut to {length}"):
            whole.truncated(length)


def test_only_interventions_on_the_prefix_can_be_compiled_and_they_must_touch_it():
    model, prompt = hooked("llama-gqa", "bridge"), prompts()[0]
    for beyond in (zero("v", span="query"), zero("v"), zero("v", span="prefix", phase="generation")):
        with pytest.raises(LensError, match=r"zero\(v, .*reaches beyond the prefix"):
            PrefixCache.compile(model, prompt, beyond)
        with pytest.raises(LensError, match="reaches beyond the prefix"):
            PrefixCache.compile_many(model, prompt, [None, beyond])
    with pytest.raises(LensError, match="span 'think' is not in row 0"):
        PrefixCache.compile(model, prompt, zero("v", span="think"))
    record = Record()
    PrefixCache.compile(model, prompt, zero("v", span="prefix"), record=record)
    assert record.receipts[0].cells == 3 * 13


# ---------------------------------------------------------------- other backend, plain transformers


@needs_hooked
@pytest.mark.parametrize("name", BOTH)
def test_a_cache_compiled_on_one_backend_serves_the_other(name):
    batch = batch_prompts(prompts(), side="right")
    length = len(prompts()[0].spans["prefix"])
    real = batch.attention_mask[:, length:].bool()
    caches = {b: PrefixCache.compile(hooked(name, b), prompts()[0], steering()) for b in BACKENDS}
    assert_close(caches["bridge"].keys, caches["hooked"].keys, rtol=1e-4, atol=1e-4)
    found = []
    with torch.no_grad():
        for made_on in BACKENDS:
            for used_on in BACKENDS:
                model = hooked(name, used_on)
                state = caches[made_on].state(model, 3)
                found.append(forward(model, batch.ids[:, length:], batch.attention_mask[:, length:], state=state)[real])
    for logits in found[1:]:
        assert_close(logits, found[0], rtol=2e-4, atol=2e-4)


@torch.no_grad()
def last_logits(model, prompt, cached):
    rest = torch.tensor([prompt.ids[len(cached) :]])
    return forward(model, rest, torch.ones_like(rest), state=cached.state(model, 1))[:, -1]


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_plain_transformers_continues_from_a_cache_as_we_do(name):
    model = hooked(name, "bridge")
    plain = tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)
    cached = PrefixCache.compile(model, prompts()[0], steering())
    ours = generate(model, prompts(), prefix_cache=cached, max_new_tokens=5, stop_ids=[])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, answer in zip(prompts(), ours, strict=True):
        scored = {"return_dict_in_generate": True, "output_scores": True}
        out = plain.generate(**cached.hf_inputs([prompt]), **settings, **scored)
        assert tuple(out.sequences[0, len(prompt.ids) :].tolist()) == answer.ids
        assert_close(out.scores[0], last_logits(model, prompt, cached), rtol=1e-4, atol=1e-4)
        if prompt.query == QUERIES[0]:  # to the longer ones a sliding window may not reach
            without = PrefixCache.compile(model, prompt)
            assert (out.scores[0] - last_logits(model, prompt, without)).abs().max() > 1e-3
    if name not in ("gemma3", "mistral"):  # padding in the middle shifts the distances of a sliding window
        inputs = cached.hf_inputs(prompts())
        out = plain.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert [tuple(row) for row in out.tolist()] == [answer.ids for answer in ours]


def test_a_transformers_cache_is_new_each_time_and_takes_device_and_dtype():
    cached = made()[1]
    one, two = cached.to_hf_cache(2, dtype=torch.bfloat16), cached.to_hf_cache(2)
    assert one.layers[0].keys.shape == (2, 2, 13, 8)
    assert one.layers[0].keys.dtype == torch.bfloat16
    two.layers[0].keys.zero_()
    assert cached.keys[0].abs().min() > 0
    with pytest.raises(LensError, match="does not begin with the cached prefix"):
        cached.hf_inputs([tiny_chat.tiny_format("be rude.").render("one")])


@pytest.mark.parametrize(("name", "backend"), FEW)
def test_using_a_cache_does_not_change_it(name, backend):
    model = hooked(name, backend)
    cached = PrefixCache.compile(model, prompts()[0])
    keys, values = cached.keys.clone(), cached.values.clone()
    generate(model, prompts(), prefix_cache=cached, max_new_tokens=3)
    assert torch.equal(cached.keys, keys)
    assert torch.equal(cached.values, values)


# ---------------------------------------------------------------- prompts whose first character joins the header


def merging_format() -> ChatFormat:
    """The tiny format, but a query that begins with a newline takes the header's newline into its first token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = [*tiny_chat.SPECIAL, *tiny_chat.LETTERS[:-2], "\n", "\n\n"]
    assert len(words) == tiny_chat.VOCAB
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = Split(Regex(r"\n\n|[\s\S]"), "isolated")
    core.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=["<sys>", "<user>", "<bot>"],
    )
    tokenizer.chat_template = tiny_chat.TEMPLATE
    return ChatFormat(tokenizer, system="be kind.")


@pytest.mark.parametrize(("name", "backend"), FEW)
def test_prompts_with_a_shorter_prefix_run_from_the_same_cache(name, backend):
    model, form = hooked(name, backend), merging_format()
    mixed = [form.render(query) for query in ("one two", "\nthree", "four", "\n")]
    lengths = [len(prompt.spans["prefix"]) for prompt in mixed]
    assert lengths[0] == lengths[2] == lengths[1] + 1 == lengths[3] + 1
    cached = PrefixCache.compile(model, mixed[0])
    plain = [g.ids for g in generate(model, mixed, max_new_tokens=4, share_prefix=False)]
    assert [g.ids for g in generate(model, mixed, max_new_tokens=4)] == plain
    assert [g.ids for g in generate(model, mixed, max_new_tokens=4, prefix_cache=cached)] == plain
    answered = [prompt.with_response([7, 8, 9], end=False) for prompt in mixed]
    assert_close(nll(model, answered, prefix_cache=cached), nll(model, answered), rtol=1e-4, atol=1e-4)
    assert_close(
        nll(model, answered, prefix_cache=[cached] * 4), nll(model, answered, batch_size=1), rtol=1e-4, atol=1e-4
    )
    on_query = zero("v", layers=0, span="query")
    hooks_only = [g.ids for g in generate(model, mixed, max_new_tokens=4, interventions=on_query, share_prefix=False)]
    both = generate(model, mixed, max_new_tokens=4, interventions=on_query, prefix_cache=cached)
    assert [g.ids for g in both] == hooks_only
    with pytest.raises(LensError, match="acts on the prefix, which comes ready"):
        generate(model, mixed, interventions=zero("v", span="prompt"), prefix_cache=cached)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharing_the_prefix_never_changes_what_an_intervention_does(backend):
    """Whatever crosses or fills the prefix: donors of one row or of each, drawn tokens, single tokens, kept ones."""
    model = hooked("llama-gqa", backend)
    batch = batch_prompts(prompts())
    with torch.no_grad(), applied(model, batch, cache("v") + cache("v", span="prefix")) as record:
        forward(model, batch.ids, batch.attention_mask)
    rows = record.activations_of("prefix")
    rows = dataclasses.replace(
        rows, values={k: v.flip(0) + torch.arange(3)[:, None, None, None] * 0.1 for k, v in rows.values.items()}
    )
    for intervention in (
        patch(rows),
        patch(rows.row(1)),
        resample(rows, seed=1),
        resample(rows, seed=1, span="all", layers=1),
        zero("v", span="all", tokens=[3, 15]),
        zero("v", span="prompt", tokens=[-1, 2], heads=[1]),
        add(vector(), layers=[0, 2], span="prompt"),
        cache("v", span="prefix") + add(vector(), layers=1, span="prefix"),
    ):
        settings = {"interventions": intervention, "max_new_tokens": 4, "stop_ids": []}
        whole, shared = (generate(model, prompts(), **settings, share_prefix=share) for share in (False, True))
        assert [g.ids for g in shared] == [g.ids for g in whole], intervention


def test_the_shape_of_a_cache_is_that_of_the_model():
    for name in ("llama-gqa", "gpt2", "gemma3"):
        shape = shape_of(hooked(name, "bridge"))
        cached = PrefixCache.compile(hooked(name, "bridge"), prompts()[0])
        assert cached.keys.shape == (shape.n_layers, shape.n_kv_heads, 13, shape.d_head)


def test_keys_and_values_of_a_postfix_cannot_be_run_from():
    model = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    kept = kv_reference(model, prompts()[0], "postfix")
    with pytest.raises(LensError, match=r"these are keys and values of a postfix \(rotated: False\)"):
        generate(hooked("llama-gqa", "bridge"), prompts(), prefix_cache=kept, max_new_tokens=2)
