"""What only a real GPU can show, where there is one: python -m pytest tests/test_on_a_card.py

Without one the same tests run on the CPU, captured steps as recordings that replay as a CUDA graph does.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic algorithms, before CUDA begins

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import tiny_chat
import tiny_hooked
import tiny_models
import torch
from recorded_steps import recorded_steps
from test_training import EXAMPLES, SETTINGS, Killed, assert_same_weights, kill_at

import piggyback_lens as lens
from piggyback_lens.models import backends, static
from piggyback_lens.models.pair import ModelPair

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
QUERIES = ["one", "two words here", "a much longer question", "four", "five is a bit longer", "six", "seven?", "so"]


def tuned(device: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> torch.nn.Module:
    """A tiny model with a LoRA adapter that is not the identity."""
    settings = lens.LoRASettings(rank=4, dropout=dropout)
    model = lens.add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB).to(device, dtype), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (value for value in model.parameters() if value.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("merged_gb", [0.0, 1.0])
@pytest.mark.parametrize("device", DEVICES)
def test_answers_of_captured_steps_are_those_of_a_step_at_a_time(
    device: str, merged_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "FEWEST", 2)
    monkeypatch.setattr("piggyback_lens.models.plain_views.MERGED_GB", merged_gb)
    pair = ModelPair.load(finetuned=tuned(device), tokenizer=tiny_hooked.chat().tokenizer)
    prompts, answered = tiny_hooked.prompts(QUERIES), {}
    with recorded_steps() if device == "cpu" else nullcontext():
        for side in ("base", "finetuned", "base"):
            with pair.using(side) as model:
                free = lens.generate(model, prompts, max_new_tokens=12, stop_ids=[], static_cache=False)
                stops = sorted({answer.ids[2] for answer in free[:3]} | {answer.ids[6] for answer in free[3:6]})
                for how in ({}, {"sampling": lens.Sampling(1.5)}, {"batch_size": 3}):
                    some = {"max_new_tokens": 12, "stop_ids": stops, **how}
                    expected = lens.generate(model, prompts, static_cache=False, **some)
                    assert [a.ids for a in lens.generate(model, prompts, **some)] == [a.ids for a in expected]
                assert static._KEPT[model].captured
                answered[side] = [answer.ids for answer in free]
                assert len({len(answer.ids) for answer in expected}) > 1
    assert answered["base"] != answered["finetuned"]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_run_resumes_bit_for_bit(device: str, tmp_path: Path) -> None:
    def trained(folder: str, stop: int | None = None) -> torch.nn.Module:
        model = tuned(device, dropout=0.2)
        keep = lens.Penalised((lens.Weighted(lens.TReFT.on(model, EXAMPLES[0]), 3.0),))
        on_step = None if stop is None else kill_at(stop)
        lens.train(model, EXAMPLES, SETTINGS, objective=keep, out=tmp_path / folder, on_step=on_step)
        return model

    whole = trained("whole")
    with pytest.raises(Killed):
        trained("killed", stop=5)
    assert_same_weights(trained("killed"), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_curve_is_that_of_the_cpu(device: str, dtype: torch.dtype) -> None:
    found = []
    for where in ("cpu", device):
        pair = ModelPair.load(finetuned=tuned(where, dtype), tokenizer=tiny_hooked.chat().tokenizer)
        prompts = pair.chat_format().ask(QUERIES[:4])
        measure = lens.AnswerContrast.of(pair, prompts, max_new_tokens=4)
        if found:
            measure = found[0][0]
        frame = lens.layer_curve(pair, prompts, measure=measure, control_layers=0, progress=False).to_frame()
        found.append((measure, torch.tensor(frame["raw"].to_numpy())))
    (_, here), (_, there) = found
    known = ~here.isnan()
    assert known.any()
    apart = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(there[known], here[known], rtol=apart, atol=apart * float(here[known].abs().max()))


def test_memory_that_torch_holds_unused_is_free() -> None:
    """Else every pass of a map would leave less for the next."""
    card = torch.device("cuda")
    with mock.patch.multiple(
        torch.cuda, mem_get_info=lambda _: (10, 100), memory_reserved=lambda _: 50, memory_allocated=lambda _: 20
    ):
        assert backends.free_bytes(card) == 40
        assert backends.device_bytes(card) == 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pass_leaves_as_much_memory_as_it_found() -> None:
    card = torch.device("cuda", 0)
    before = backends.free_bytes(card)
    torch.empty(2**28, dtype=torch.uint8, device=card)
    assert abs(backends.free_bytes(card) - before) < 2**26
