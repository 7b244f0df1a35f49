import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat import VOCAB, tiny_examples, tiny_format
from tiny_models import NAMES, WINDOW, build
from torch import Tensor, nn

from piggyback_lens.conversations.batch import common_prefix_length
from piggyback_lens.conversations.chat import RenderedPrompt, Span
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import batch_indices, make_batch
from piggyback_lens.finetuning.steps import StepOutput, check_sharing, forward_step, response_nll
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.settings import LoRASettings


def tuned(name: str, impl: str = "eager") -> nn.Module:
    """A double-precision model whose adapter is not at its (vanishing) start."""
    model = add_lora(build(name, vocab=VOCAB, attn_implementation=impl), LoRASettings(rank=2)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.double) * 0.2
    return model


def row_by_row_nll(model: nn.Module, examples: list[RenderedPrompt]) -> Tensor:
    """Oracle: each row alone through the plain model, no cache, mask or padding; probabilities by hand."""
    total, count = torch.zeros((), dtype=torch.double), 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
        log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
        span = example.span("response")
        for position in range(span.start, span.stop):
            total = total - log_probs[position - 1, example.ids[position]]
            count += 1
    return total / count


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def nll(model: nn.Module, examples: list[RenderedPrompt], **options: Any) -> tuple[Tensor, StepOutput]:
    output = forward_step(model, make_batch(examples, **options))
    return torch.nn.functional.cross_entropy(output.logits, output.targets), output


def assert_same_step(model: nn.Module, examples: list[RenderedPrompt], **options: Any) -> StepOutput:
    expected = row_by_row_nll(model, examples)
    found, output = nll(model, examples, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    wanted = gradients(model, expected)
    got = gradients(model, found)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 1e-8, f"{name} has no gradient: the comparison would be empty"
        assert (got[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    return output


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_step_has_the_loss_and_gradients_of_rows_run_alone(name: str, share: bool, impl: str) -> None:
    examples = tiny_examples(5)
    output = assert_same_step(tuned(name, impl), examples, share_prefix=share)
    prefix = examples[0].span("prefix").stop
    assert prefix > WINDOW, "the sliding window must bite inside the prefix"
    assert all(key.shape[-2] == prefix for key in output.prefix_keys)


@pytest.mark.parametrize("name", NAMES)
def test_shared_and_ordinary_steps_leave_the_same_keys_and_values(name: str) -> None:
    model, examples = tuned(name), tiny_examples(4)
    (_, shared), (_, ordinary) = (nll(model, examples, share_prefix=share) for share in (True, False))
    real = make_batch(examples).attention_mask.bool()
    n_layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    for field in ("prefix_keys", "prefix_values"):
        pairs = list(zip(getattr(shared, field), getattr(ordinary, field), strict=True))
        assert len(pairs) == n_layers
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for field in ("keys", "values"):
        for a, b in zip(getattr(shared, field), getattr(ordinary, field), strict=True):
            torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)


def test_prefix_keys_come_from_the_shared_pass_and_carry_gradient() -> None:
    model = tuned("llama-gqa")
    _, output = nll(model, tiny_examples(3))
    norm = sum((key.square().sum() for key in output.prefix_keys), torch.zeros((), dtype=torch.double))
    found = gradients_or_none(model, norm)
    assert found["base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight"] is not None
    assert found["base_model.model.model.layers.2.mlp.down_proj.lora_A.default.weight"] is None


def gradients_or_none(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, values, strict=True))


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "mistral", "gpt2"])
@pytest.mark.parametrize("share", [True, False])
def test_padding_does_not_matter(name: str, share: bool) -> None:
    model = tuned(name, "sdpa")
    short, long = tiny_examples(3, longest=3), tiny_examples(1, seed=5, longest=60)
    _, alone = nll(model, short, share_prefix=share)
    for pad_id in (0, 7):
        _, padded = nll(model, [*short, *long], share_prefix=share, pad_id=pad_id)
        kept = padded.rows < len(short)
        torch.testing.assert_close(padded.logits[kept], alone.logits, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(padded.logits).all()


def test_only_response_tokens_and_the_turn_end_are_supervised() -> None:
    chat = tiny_format()
    examples = [chat.render("hi", response="yes"), chat.render("why", response="no no")]
    batch = make_batch(examples)
    decoded = [chat.tokenizer.decode(batch.ids[row][batch.supervised[row]]) for row in range(2)]
    assert decoded == ["yes<end>", "no no<end>"]
    assert batch.n_supervised == 4 + 6
    output = forward_step(build("llama-gqa", vocab=VOCAB), batch)
    assert chat.tokenizer.decode(output.targets) == "yes<end>no no<end>"
    assert output.rows.tolist() == [0] * 4 + [1] * 6


def test_an_open_ended_response_is_supervised_without_turn_end() -> None:
    batch = make_batch([tiny_format().render("hi", response="yes", end=False)])
    assert batch.n_supervised == 3


def with_prefix(example: RenderedPrompt, stop: int) -> RenderedPrompt:
    query = Span("query", stop, max(stop, example.spans["query"].stop))
    spans = {**example.spans, "prefix": Span("prefix", 0, stop), "query": query}
    return dataclasses.replace(example, spans=spans)


def test_a_row_with_a_shorter_prefix_shortens_the_shared_part() -> None:
    examples = tiny_examples(4)
    examples[2] = with_prefix(examples[2], 9)
    assert common_prefix_length(examples) == 9
    output = assert_same_step(tuned("mistral"), examples)
    assert output.prefix_keys[0].shape[-2] == 9


def test_only_equal_ids_are_shared_when_the_prefixes_differ() -> None:
    examples = tiny_examples(2, system="be kind.") + tiny_examples(2, seed=3, system="be bad.")
    assert common_prefix_length(examples) == len("<bos><sys>") - 8 + len("be ")
    assert_same_step(tuned("gemma3"), examples)


def test_rows_without_a_common_prefix_train_too() -> None:
    examples = tiny_examples(3)
    examples[0] = dataclasses.replace(examples[0], ids=(5, *examples[0].ids[1:]))
    assert common_prefix_length(examples) == 0
    output = assert_same_step(tuned("llama-mha"), examples)
    assert output.prefix_keys[0].shape[-2] == 0


def test_a_prompt_that_is_all_prefix_keeps_its_last_token() -> None:
    example = tiny_format().render("", response="ok")
    example = dataclasses.replace(
        example,
        spans={
            "prefix": Span("prefix", 0, 16),
            "postfix": Span("postfix", 16, 16),
            "response": example.span("response"),
        },
    )
    assert example.n_prompt == 16
    assert common_prefix_length([example]) == 15
    assert_same_step(tuned("llama-mha"), [example])


def test_logit_soft_capping_stays_in_the_loss() -> None:
    model = tuned("gemma3")
    free, _ = nll(model, tiny_examples(3))
    model.config.final_logit_softcapping = 1.5  # type: ignore[union-attr]
    assert_same_step(model, tiny_examples(3))
    capped, _ = nll(model, tiny_examples(3))
    assert abs(float(capped.detach() - free.detach())) > 0.1


def test_the_output_embeddings_see_response_positions_only_and_lose_their_hook() -> None:
    model, examples = build("llama-gqa", vocab=VOCAB), tiny_examples(3)
    ids = torch.tensor([examples[0].ids])
    before = model(input_ids=ids).logits
    widths: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _module, args, _out: widths.append(args[0].shape[1]))
    batch = make_batch(examples)
    forward_step(model, batch)
    handle.remove()
    assert widths == [0, batch.n_supervised]
    assert len(model.lm_head._forward_pre_hooks) == 0
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_hook_is_removed_when_the_model_fails() -> None:
    model = build("llama-gqa", vocab=VOCAB)
    batch = make_batch(tiny_examples(2))
    broken = dataclasses.replace(batch, ids=batch.ids + VOCAB)
    with pytest.raises(IndexError):
        forward_step(model, broken)
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_a_model_that_does_not_use_its_output_embeddings_is_refused() -> None:
    model = build("llama-gqa", vocab=VOCAB)
    model.set_output_embeddings(nn.Linear(32, VOCAB))
    spare = nn.Linear(32, VOCAB)
    model.get_output_embeddings = lambda: spare
    with pytest.raises(LensError, match="called its output embeddings 0 times"):
        forward_step(model, make_batch(tiny_examples(2)))


def test_examples_without_response_and_empty_batches_are_refused() -> None:
    with pytest.raises(LensError, match="example 1 has no response tokens"):
        make_batch([*tiny_examples(1), tiny_format().render("hi")])
    with pytest.raises(LensError, match="empty batch"):
        make_batch([])


def test_the_check_passes_an_exact_model_and_refuses_one_that_drops_its_cache() -> None:
    model, batch = build("mistral", vocab=VOCAB), make_batch(tiny_examples(3))
    check_sharing(lambda some: forward_step(model, some), batch)

    def forgetful(some: Any) -> StepOutput:
        output = forward_step(model, some)
        return dataclasses.replace(output, logits=output.logits * 1.1) if some.share_prefix else output

    with pytest.raises(LensError, match="set share_prefix=False"):
        check_sharing(forgetful, batch)


def test_the_loss_is_computed_in_float32() -> None:
    logits = torch.tensor([[0.0, 0.01, 0.02]], dtype=torch.bfloat16)
    loss = response_nll(logits, torch.tensor([1]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -torch.log_softmax(logits.float(), -1)[0, 1])


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200).map(tuple),
    size=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_every_example_comes_once_per_epoch(lengths: tuple[int, ...], size: int, seed: int) -> None:
    per_epoch = -(-len(lengths) // size)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [batch_indices(lengths, size, seed, step) for step in steps]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert sorted(map(len, batches))[1:] == [size] * (per_epoch - 1)


def test_batches_depend_on_seed_and_step_alone_and_change_with_the_epoch() -> None:
    lengths = tuple(range(10, 42))

    def epoch(number: int, seed: int = 0) -> list[tuple[int, ...]]:
        return [batch_indices(lengths, 8, seed, 4 * number + step) for step in range(4)]

    later = epoch(1)
    assert epoch(0) != later
    assert {frozenset(batch) for batch in epoch(0)} != {frozenset(batch) for batch in later}
    assert epoch(1) == later
    assert epoch(1, seed=1) != later


def test_examples_of_similar_length_go_together() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(torch.randint(5, 200, (400,), generator=generator).tolist())
    batches = [batch_indices(lengths, 10, 0, step) for step in range(40)]
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    random_order = sum(max(lengths[at : at + 10]) * 10 for at in range(0, 400, 10))
    assert padded < 1.3 * sum(lengths)
    assert random_order > 1.6 * sum(lengths)
