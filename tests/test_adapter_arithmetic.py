"""Adapters added, subtracted, cut out of a full finetune, and freed of a direction."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch

from piggyback_lens import Direction, LensError, LoRAAdapter, attached
from piggyback_lens.vectors.direction import Provenance

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def full_finetune(base: Any, *, everything: bool = False) -> Any:
    """A copy whose linear weights (or all weights) moved."""
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if everything or "_proj.weight" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.std()
    return tuned


@torch.no_grad()
def logits(model: Any, *adapters: LoRAAdapter) -> torch.Tensor:
    with attached(model, *adapters):
        return model(input_ids=IDS).logits


def random_adapter(model: Any, seed: int, **where: Any) -> LoRAAdapter:
    fresh = LoRAAdapter.fresh(model, rank=2, alpha=3.0, **where)
    generator = torch.Generator().manual_seed(seed)
    return fresh.with_tensors({n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in fresh.tensors().items()})


def along(vectors: torch.Tensor, layers: tuple[int, ...]) -> Direction:
    return Direction(vectors, layers, "resid_post", "positive: drawn", Provenance("drawn"))


@pytest.mark.parametrize("layout", ["llama-gqa", "qwen3", "llama-bias"])
def test_at_full_rank_the_difference_is_the_finetune(layout: str) -> None:
    base = tiny_models.build(layout)
    tuned = full_finetune(base)
    whole = LoRAAdapter.between(base, tuned)
    assert "100.000%" in whole.provenance.how
    torch.testing.assert_close(logits(base, whole), logits(tuned), atol=1e-4, rtol=1e-4)
    distances = [
        float((logits(base, LoRAAdapter.between(base, tuned, rank=rank)) - logits(tuned)).norm()) for rank in (1, 8, 24)
    ]
    assert distances == sorted(distances, reverse=True)
    place = (1, "down")
    delta = tuned.model.layers[1].mlp.down_proj.weight - base.model.layers[1].mlp.down_proj.weight
    u, s, v = torch.linalg.svd(delta)
    best = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    torch.testing.assert_close(LoRAAdapter.between(base, tuned, rank=3).delta(*place), best, atol=1e-5, rtol=1e-3)


def test_what_no_adapter_holds_is_said() -> None:
    base = tiny_models.build("llama-gqa")
    with pytest.warns(UserWarning, match=r"model\.embed_tokens\.weight and \d+ more differ too"):
        LoRAAdapter.between(base, full_finetune(base, everything=True), rank=1)
    with pytest.raises(LensError, match="different sizes"):
        LoRAAdapter.between(base, tiny_models.build("llama-gqa", intermediate_size=80))
    with pytest.raises(LensError, match="rank 0"):
        LoRAAdapter.between(base, base, rank=0)
    same = LoRAAdapter.between(base, base, rank=1, modules=["down"], layers=[1])
    assert (same.norm(), same.layers, same.modules) == (0.0, (1,), ("down",))


def untied(base: Any) -> Any:
    """A finetune whose output layer is tied to the embedding no more, and changed."""
    tuned = full_finetune(base)
    tuned.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() + 0.1)
    return tuned


def biased(base: Any) -> Any:
    """The same weights in an architecture that has biases too."""
    tuned = tiny_models.build("llama-bias")
    tuned.load_state_dict(base.state_dict(), strict=False)
    return tuned


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (untied, r"lm_head\.weight differ"),
        (biased, r"self_attn\.q_proj\.bias and \d+ more differ"),
        (lambda _: tiny_models.build("llama-gqa", rope_theta=77.0), r"rotary_emb\.inv_freq and \d+ more differ"),
        (lambda _: tiny_models.build("llama-gqa", rms_norm_eps=0.3), r"config\.rms_norm_eps differ"),
    ],
)
def test_what_weights_of_the_first_model_do_not_show_is_said_too(made: Any, named: str) -> None:
    base = tiny_models.build("llama-gqa")
    base.lm_head.weight = base.model.embed_tokens.weight
    tuned = made(base)
    if made is not untied:
        tuned.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        tuned.model.embed_tokens.weight = tuned.lm_head.weight
    with pytest.warns(UserWarning, match=named):
        LoRAAdapter.between(base, tuned, rank=1)


def test_a_model_without_such_modules_is_refused_by_name() -> None:
    with pytest.raises(LensError, match="GPT2LMHeadModel has none of the modules q/k/v/o/gate/up/down"):
        LoRAAdapter.between(tiny_models.build("gpt2"), tiny_models.build("gpt2"))


def test_in_half_precision_nothing_is_rounded_twice() -> None:
    """Oracle: the same arithmetic in double precision on the weights as they are."""
    base = tiny_models.build("llama-gqa").to(torch.bfloat16)
    tuned = full_finetune(base)
    exact = tuned.model.layers[0].mlp.down_proj.weight.double() - base.model.layers[0].mlp.down_proj.weight.double()
    found = LoRAAdapter.between(base, tuned).delta(0, "down").double()
    assert float((found - exact).norm() / exact.norm()) < 1e-5
    one, other = (random_adapter(base, seed, modules=["down"]) for seed in (1, 2))
    one, other = (x.with_tensors({name: value.bfloat16() for name, value in x.tensors().items()}) for x in (one, other))
    one, other = replace(one, alpha=7.0, rslora=True), replace(other, rslora=True)
    place = (0, "down")
    for found, exact in (
        ((one + other).delta(*place), product(one, place) + product(other, place)),
        ((one - other).delta(*place), product(one, place) - product(other, place)),
    ):
        assert float((found.double() - exact).norm() / exact.norm()) < 1e-5
    vector = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    left = one.without(along(vector, (0,)))
    assert float((vector.double() @ product(left, place)).norm() / product(one, place).norm()) < 1e-6
    with pytest.raises(LensError, match="length zero"):
        one.without(along(torch.zeros(1, 32), (0,)))
    model = tiny_models.build("llama-gqa")
    with one.merged(model):
        expected = logits(model)
    upcast = one.with_tensors({name: value.float() for name, value in one.tensors().items()})
    torch.testing.assert_close(logits(model, upcast), expected, atol=1e-5, rtol=1e-4)
    moved = (expected - logits(model)).norm()
    assert float((logits(model, one) - expected).norm() / moved) < 4e-3  # only what A and B in bfloat16 round


def product(adapter: LoRAAdapter, place: Any) -> torch.Tensor:
    """s·BA in double precision."""
    return adapter.scale * adapter.b[place].double() @ adapter.a[place].double()


def test_sums_and_differences_add_what_both_add() -> None:
    model = tiny_models.build("llama-gqa")
    one, other = (random_adapter(model, seed, modules=["q", "down"]) for seed in (1, 2))
    other = other.scaled(0.5)
    torch.testing.assert_close(logits(model, one + other), logits(model, one, other), atol=1e-5, rtol=1e-4)
    for place in one.a:
        torch.testing.assert_close((one - other).delta(*place), one.delta(*place) - other.delta(*place))
    assert (one + other).rank == 4
    torch.testing.assert_close(logits(model, one - one), logits(model), atol=1e-5, rtol=1e-4)
    with pytest.raises(LensError, match="different modules"):
        one + random_adapter(model, 3)


def test_without_a_direction_nothing_is_written_along_it() -> None:
    model = tiny_models.build("llama-gqa")
    adapter = random_adapter(model, 1, modules=["q", "o", "down"])
    layers = adapter.layers
    vectors = torch.randn(len(layers), 32, generator=torch.Generator().manual_seed(8))
    for direction in (along(vectors, layers), along(vectors[:1], layers[-1:])):
        freed = adapter.without(direction)
        for layer in layers:
            vector = direction[layer] if layer in direction.layers else direction[direction.layers[0]]
            unit = vector / vector.norm()
            for module in ("o", "down"):
                assert float((unit @ freed.delta(layer, module)).norm()) < 1e-6
                project = torch.eye(32) - torch.outer(unit, unit)
                torch.testing.assert_close(freed.delta(layer, module), project @ adapter.delta(layer, module))
            assert torch.equal(freed.delta(layer, "q"), adapter.delta(layer, "q"))
    with pytest.raises(LensError, match="neither o nor down"):
        random_adapter(model, 1, modules=["q"]).without(along(vectors, layers))
    with pytest.raises(LensError, match="width 16"):
        adapter.without(along(vectors[:, :16], layers))
