"""Training that starts at the lowest trained layer gives the numbers of training through the whole model."""

from dataclasses import replace

import pytest
import tiny_chat
import torch
from test_objectives import wide
from tiny_hooked import BACKENDS, hooked, needs_hooked
from tiny_models import NAMES, build
from torch.testing import assert_close

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning import steps
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.frozen_lower import FrozenLower
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.kept_base import KeptBase
from piggyback_lens.finetuning.objectives import KLOnRetain, KLOnTrain, Penalised, TReFT, Weighted
from piggyback_lens.finetuning.references import kv_reference
from piggyback_lens.finetuning.retain import RetainData
from piggyback_lens.finetuning.steps import Step, response_nll
from piggyback_lens.finetuning.training import train
from piggyback_lens.maths import kl_per_token
from piggyback_lens.models import packing
from piggyback_lens.models.backends import core_of, is_hooked_model
from piggyback_lens.settings import TrainSettings
from piggyback_lens.vectors.adapters import LoRAAdapter
from piggyback_lens.vectors.direction import Direction

EXAMPLES = tiny_chat.tiny_examples(6)
RETAIN = tiny_chat.tiny_examples(6, seed=9)


def model_of(layout, kind="transformers"):
    return build(layout, vocab=tiny_chat.VOCAB) if kind == "transformers" else hooked(layout, kind)


def start_of(model, what, layer=2):
    if what == "vector":
        generator = torch.Generator().manual_seed(0)
        return Direction.of({layer: torch.randn(32, generator=generator)})
    fresh = LoRAAdapter.fresh(model, rank=1, layers=[layer], modules=["down", "v"])
    return replace(fresh, b={place: torch.ones_like(b) for place, b in fresh.b.items()})


def gradients(trainable, batch):
    output = trainable.forward(batch)
    loss = response_nll(output.logits, output.targets)
    named = trainable.parameters()
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("how", ["packed", "prefix shared", "whole rows"])
@pytest.mark.parametrize("what", ["vector", "lora"])
@pytest.mark.parametrize("kind", ["transformers", "bridge"])
@pytest.mark.parametrize("layout", NAMES)
def test_loss_and_gradients_are_those_of_the_whole_pass(layout, kind, what, how, monkeypatch):
    monkeypatch.setattr(packing, "costs_of", lambda _model: packing.Costs(0.0, 1.0, 0.0))
    if how != "packed":
        monkeypatch.setattr(packing, "LONGEST", dict.fromkeys(packing.LONGEST, 0))
    share = how != "whole rows"
    model = model_of(layout, kind)
    if how == "packed" and getattr(core_of(model).config, "sliding_window", None) is not None:
        monkeypatch.setattr(core_of(model).config, "sliding_window", 256)  # other tests share the hooked models
    try:
        start = start_of(model, what)
    except LensError as error:
        pytest.skip(f"this architecture has no such modules: {error}")
    batch = make_batch(EXAMPLES, share_prefix=share)
    assert (steps.plan_for(core_of(model), batch).packing is not None) == (how == "packed")
    whole = gradients(HookTrainable(model, start, cache_below=False), batch)
    cached = HookTrainable(model, start)
    for _ in range(2):
        loss, found = gradients(cached, batch)
        assert_close(loss, whole[0], atol=1e-5, rtol=1e-5)
        for name, gradient in whole[1].items():
            assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
            assert gradient.abs().max() > 1e-6
    assert (cached.below.passes, len(cached.below)) == (6, 6)


def test_layers_below_are_not_run_and_come_back():
    model = model_of("llama-gqa")
    trainable = HookTrainable(model, start_of(model, "vector", layer=2))
    batch = make_batch(EXAMPLES)
    trainable.forward(batch)
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(model.model.layers)
    ]
    trainable.forward(batch)
    assert set(ran) == {2}
    ran.clear()
    model(input_ids=batch.ids)
    assert ran == [0, 1, 2]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["transformers", "bridge"])
def test_the_model_is_as_before_also_after_an_error(kind):
    model = model_of("llama-gqa", kind)
    batch = make_batch(EXAMPLES)
    before = model(batch.ids) if kind == "bridge" else model(input_ids=batch.ids).logits
    trainable = HookTrainable(model, start_of(model, "vector"))
    trainable.forward(batch)
    with pytest.raises(LensError, match="set cache_below=False"), trainable.below.standing_in(batch):
        trainable.model(input_ids=batch.ids)
    after = model(batch.ids) if kind == "bridge" else model(input_ids=batch.ids).logits
    assert torch.equal(before, after)


def test_a_forward_that_somebody_has_put_on_a_block_comes_back():
    """As accelerate does to place a model on several devices."""
    model = model_of("llama-gqa")
    block, calls = model.model.layers[0], []
    own = block.forward

    def placed(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = placed
    trainable, batch = HookTrainable(model, start_of(model, "vector")), make_batch(EXAMPLES)
    trainable.forward(batch)
    assert (vars(block)["forward"], len(calls)) == (
        placed,
        len(EXAMPLES),
    )  # it ran to fill the store, and was passed by after


def test_what_exceeds_the_budget_is_read_from_files():
    model = model_of("llama-gqa")
    inside, outside = (FrozenLower(model, 1, budget_gb=budget) for budget in (1.0, 0.0))
    batch = make_batch(EXAMPLES)
    assert torch.equal(inside.of(batch), outside.of(batch))
    assert (inside.n_filed, outside.n_filed, len(outside)) == (0, 6, 6)
    assert torch.equal(outside.of(batch), inside.of(batch))
    assert outside.passes == 6


def test_training_gives_the_same_vector_and_logs_its_norm():
    settings, found = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2), []
    for cache_below in (True, False):
        model = model_of("llama-gqa")
        trainable = HookTrainable(model, Direction.zeros(32, [1]), cache_below=cache_below)
        objective = Penalised((Weighted(KLOnRetain(RetainData(RETAIN, batch_size=3)), 2.0, stop=4),))
        run = {"objective": objective, "progress": False}
        result = train(trainable, EXAMPLES, settings, **run)
        found.append(trainable.result()[1])
        assert result.history[-1]["norm"] == pytest.approx(float(found[-1].norm()))
        assert ["kl_retain" in row for row in result.history] == [True] * 4 + [False] * 2
    assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_a_penalty_on_keys_of_layers_that_are_not_run_is_refused():
    model = model_of("llama-gqa")
    trainable = HookTrainable(model, Direction.zeros(32, [1]))
    batch = make_batch(EXAMPLES)
    penalty = TReFT("prefix", kv_reference(model, EXAMPLES[0]))
    with pytest.raises(LensError, match="cache_below=False"):
        penalty(Step(model, batch, trainable.forward(batch), 0, trainable.forward, base=trainable.base_forward))
    whole = HookTrainable(model, Direction.zeros(32, [1]), cache_below=False)
    assert penalty(Step(model, batch, whole.forward(batch), 0, whole.forward, base=whole.base_forward)) == 0


@needs_hooked
def test_starts_that_leave_nothing_out_are_refused():
    model = model_of("llama-gqa")
    for start in (0, 3, -1):
        with pytest.raises(LensError, match=f"start {start}: this model has blocks 1 to 2 above a frozen one"):
            FrozenLower(model, start)
    with pytest.raises(LensError, match="budget_gb -1"):
        FrozenLower(model, 1, budget_gb=-1.0)
    assert HookTrainable(model, Direction.zeros(32, [0])).below is None
    other = model_of("llama-gqa", "hooked")
    assert is_hooked_model(other)
    assert HookTrainable(other, Direction.zeros(32, [1])).below is None


# ---------------------------------------------------------------- the base's predictions


@pytest.mark.parametrize("penalty", ["train", "retain"])
@pytest.mark.parametrize("kind", ["transformers", *BACKENDS])
def test_kl_to_the_base_and_its_gradient_are_those_of_two_passes(kind, penalty):
    model = model_of("llama-gqa", kind)
    trainable = HookTrainable(model, start_of(model, "vector", layer=1))
    retain = RetainData(RETAIN, batch_size=6)
    own = KLOnTrain() if penalty == "train" else KLOnRetain(retain)
    batch = make_batch(EXAMPLES)
    compared = batch if penalty == "train" else retain.batch(0)
    with torch.no_grad():
        base = trainable.base_forward(compared).logits.double().log_softmax(-1)
    tuned = trainable.forward(compared).logits.double().log_softmax(-1)
    by_hand = (base.exp() * (base - tuned)).sum(-1).mean()
    named = trainable.parameters()
    expected = torch.autograd.grad(by_hand, list(named.values()))[0]
    for _ in range(2):  # the second time from what was kept
        step = Step(trainable.model, batch, trainable.forward(batch), 0, trainable.forward, base=trainable.base_forward)
        value = own(step)
        assert_close(value.double(), by_hand, atol=1e-6, rtol=1e-4)
        assert_close(torch.autograd.grad(value, list(named.values()))[0], expected, atol=1e-6, rtol=1e-3)
        assert float(value.detach()) > 1e-3
    # A pass for each example, and none the second time.
    assert own.kept.passes == 6


def test_a_model_that_caps_its_logits_is_run_anew():
    model = model_of("gemma3")
    model.config.final_logit_softcapping = 0.1
    batch = make_batch(EXAMPLES)
    trainable = HookTrainable(model, Direction.zeros(32, [1]))
    kept, step = KeptBase(), Step(model, batch, trainable.forward(batch), 0, base=trainable.base_forward)
    expected = trainable.base_forward(batch).logits
    for _ in range(2):
        assert torch.equal(kept.logits(step, batch, None), expected)
    assert (kept.keeps, kept.passes, len(kept)) == (False, 3, 0)  # one to find out, one for each batch


def test_rows_of_examples_seen_in_other_batches_are_put_together():
    model = model_of("llama-gqa")
    trainable, kept = HookTrainable(model, Direction.zeros(32, [1])), KeptBase()

    def logits(rows):
        batch = make_batch([EXAMPLES[row] for row in rows])
        step = Step(model, batch, trainable.forward(batch), 0, base=trainable.base_forward)
        return kept.logits(step, batch, None), trainable.base_forward(batch).logits

    logits([0, 1, 2])
    logits([3, 4, 5])
    found, expected = logits([5, 0, 3])
    assert kept.passes == 6
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float(kl_per_token(expected[None], found[None]).max()) < 1e-6
    kept = KeptBase()
    assert torch.equal(logits([5, 0, 3])[0], found), "whatever they were seen with before"


def test_what_was_kept_of_one_base_is_not_used_for_another():
    penalty, batch = KLOnRetain(RetainData(RETAIN, batch_size=6)), make_batch(EXAMPLES)
    for seed in (0, 1, 0):
        model = build("llama-gqa", seed, vocab=tiny_chat.VOCAB)
        trainable = HookTrainable(model, Direction.zeros(32, [1]))
        step = Step(model, batch, trainable.forward(batch), 0, trainable.forward, base=trainable.base_forward)
        # The vector is zero, so the tuned model is its own base.
        assert float(penalty(step).detach()) == pytest.approx(0, abs=1e-6)
    assert penalty.kept.passes == 3 * 6


def test_a_killed_run_resumes_to_identical_numbers_whatever_batches_come_first(tmp_path):
    examples = tiny_chat.tiny_examples(15, longest=60)
    settings = TrainSettings(steps=14, batch_size=4, learning_rate=1e-2, checkpoint_every=6)
    model = wide().get_base_model()  # wide enough that the last bits of a row depend on the rows beside it
    start = Direction.of({2: torch.zeros(192)})

    def kill(row):
        if row["step"] == 7:
            raise KeyboardInterrupt

    def run(out, **options):
        trainable = HookTrainable(model, start)
        found = train(trainable, examples, settings, out=out, progress=False, **options)
        return found, trainable.parameters()

    _, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", on_step=kill)
    result, resumed = run(tmp_path / "killed")
    assert 0 < result.resumed_from < 14
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert all(value.abs().max() > 0 for value in whole.values())
