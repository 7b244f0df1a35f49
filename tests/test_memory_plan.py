"""What doctor says of memory from a config alone, against what models really take."""

import math

import pytest
import tiny_chat
import tiny_models
import torch

from piggyback_lens.app.memory import TRAINED, Sizes, free_memory, plan
from piggyback_lens.app.options import Work
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.models.network import NOTHING, forward_keeping
from piggyback_lens.settings import LoRASettings

LAYOUTS = ("llama-gqa", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_keys_and_values_are_those_of_a_real_model(layout):
    model = tiny_models.build(layout, 0, vocab=tiny_chat.VOCAB)
    sizes = Sizes.of(model.config, Work(batch_size=2, row_tokens=6, rank=2))
    own = sum(weight.numel() for weight in model.parameters())
    assert sizes.parameters == own
    assert sizes.weights("float32") == 4 * own
    assert sizes.weights("bfloat16") == sum(x.numel() * x.element_size() for x in model.bfloat16().parameters())
    assert sizes.weights("4bit") < sizes.weights("8bit") < sizes.weights("bfloat16")
    with torch.no_grad():
        _, keys, values = forward_keeping(model, torch.zeros((2, 6), dtype=torch.long), read=NOTHING)
    held = sum(x.nbytes for x in (*keys, *values))
    assert 2 * 6 * sizes.per_token * 2 == held
    adapted = add_lora(tiny_models.build(layout, 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2))
    assert sizes.adapter == sum(x.numel() for x in adapted.parameters() if x.requires_grad)


def test_what_waits_for_the_backward_pass_is_counted_as_in_a_real_step():
    model = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2))
    sizes = Sizes.of(model.get_base_model().config, Work(batch_size=2, row_tokens=16, rank=2))
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        held[storage._cdata] = 0 if storage._cdata in weights else storage.nbytes(), tensor
        return tensor

    ids = torch.zeros((2, 16), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    real = sum(size for size, _ in held.values())
    assert real <= sizes.kept <= 1.35 * real  # the kernels that attention has there keep its probabilities too


def test_the_plan_says_what_fits_with_its_arithmetic():
    config = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB).config
    work = Work(batch_size=2, row_tokens=16, rank=2)
    sizes = Sizes.of(config, work)
    small, large = (dict(plan(sizes, work, free, 1)) for free in (sizes.weights("4bit"), 1e9))
    assert large["float32 weights"].startswith(f"{sizes.parameters:,} x 4 B = ")
    assert "does not fit" not in "".join(large.values())
    assert small["float32 weights"].endswith("does not fit")
    assert small["4bit weights"].endswith(", fits")
    assert f"{sizes.adapter:,} x {TRAINED} B" in large["  training"]
    assert dict(plan(sizes, work, 1e9, 2))["float32 weights"].startswith("2 x ")
    assert 0 < free_memory(torch.device("cpu")) < math.inf


def test_impossible_plans_are_refused():
    with pytest.raises(LensError, match=r"Work\.batch_size is 0; expected at least 1"):
        Work(batch_size=0)
    with pytest.raises(LensError, match=r"Work\.memory_gb is -1\.0; expected a number above 0"):
        Work(memory_gb=-1.0)
