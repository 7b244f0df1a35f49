import json
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_chat import VOCAB, tiny_examples, tiny_format
from tiny_models import build
from torch import nn

import piggyback_lens.finetuning.checkpoints as checkpoints_module
import piggyback_lens.finetuning.training as training_module
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch, batch_indices
from piggyback_lens.finetuning.steps import Loss, Step, StepOutput, forward_step, response_nll, sft
from piggyback_lens.finetuning.trainables import Trainable, add_lora, seeded
from piggyback_lens.finetuning.training import TrainResult, learning_rate_at, train
from piggyback_lens.maths import kl_per_token, relative_kv_drift
from piggyback_lens.results.run import locked
from piggyback_lens.settings import LoRASettings, TrainSettings

EXAMPLES = tiny_examples(10)
SETTINGS = TrainSettings(steps=8, batch_size=4, learning_rate=1e-2, checkpoint_every=3)


def fresh(name: str = "llama-gqa", dropout: float = 0.0, seed: int = 0) -> nn.Module:
    return add_lora(build(name, vocab=VOCAB), LoRASettings(rank=4, dropout=dropout), seed)


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def without_seconds(result: TrainResult) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[[dict[str, int | float]], None]:
    def on_step(row: dict[str, int | float]) -> None:
        if row["step"] == step:
            raise Killed

    return on_step


# --- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("learning_rate", 0.0, "a positive number"),
        ("learning_rate", math.nan, "a number"),
        ("warmup_fraction", 1.5, "between 0 and 1"),
        ("min_lr_fraction", -0.1, "between 0 and 1"),
        ("weight_decay", -1.0, "at least 0"),
        ("betas", (0.9, 1.0), "from 0 to below 1"),
        ("max_grad_norm", 0.0, "None for no clipping"),
        ("seed", -1, "at least 0"),
        ("checkpoint_every", 0, "at least 1"),
    ],
)
def test_a_training_setting_out_of_range_is_refused_by_name(field: str, value: Any, expected: str) -> None:
    with pytest.raises(LensError, match=rf"TrainSettings\.{field} is .*{expected}") as caught:
        TrainSettings(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("modules", ()), ("layers", ())],
)
def test_a_lora_setting_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(LensError, match=rf"LoRASettings\.{field} is "):
        LoRASettings(**{field: value})


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    settings = TrainSettings(steps=10, learning_rate=2.0, warmup_fraction=0.2, min_lr_fraction=0.1)
    rates = [learning_rate_at(settings, index) for index in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 7 / 8)) / 2))
    assert sorted(rates[2:], reverse=True) == rates[2:]


def test_no_step_is_wasted_on_a_learning_rate_of_zero() -> None:
    for fraction in (0.0, 0.1, 1.0):
        settings = TrainSettings(steps=7, warmup_fraction=fraction)
        assert all(learning_rate_at(settings, index) > 0 for index in range(7))


# --- the adapter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "reached"), [("cpu", []), ("cuda:1", [1]), ("mps", ["mps"])])
def test_a_seed_reaches_the_device_of_the_run_and_no_other(monkeypatch: Any, device: str, reached: list[Any]) -> None:
    """What others draw on the other cards of a machine stays as it was."""
    found: list[Any] = []
    monkeypatch.setattr(torch, "manual_seed", lambda _: found.append("all"))
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda card: nullcontext(found.append(card.index)))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda _: None)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda _: found.append("mps"))
    with seeded(3, torch.device(device)):
        drawn = torch.rand(2)
    assert found == reached
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_the_adapter_depends_on_its_seed_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = fresh(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same_weights(one, fresh(seed=5))
    other = adapter(fresh(seed=6))
    assert any(not torch.equal(value, other[name]) for name, value in adapter(one).items())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma3"])
def test_a_fresh_adapter_changes_nothing_and_only_it_can_train(name: str) -> None:
    ids = torch.tensor([EXAMPLES[0].ids])
    base = build(name, vocab=VOCAB)
    before = base(ids).logits
    model = fresh(name)
    assert torch.equal(model(ids).logits, before)
    assert all("lora_" in name for name in adapter(model))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 4**0.5)])
def test_the_scale_is_alpha_over_rank_or_its_root(rslora: bool, scale: float) -> None:
    model = add_lora(build("llama-gqa", vocab=VOCAB), LoRASettings(rank=4, alpha=16.0, rslora=rslora))
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert scales == {scale}


def test_modules_and_layers_can_be_chosen() -> None:
    model = add_lora(build("llama-gqa", vocab=VOCAB), LoRASettings(modules=("q_proj", "down_proj"), layers=(0, 2)))
    adapted = sorted(
        name.split("model.model.layers.")[1] for name, module in model.named_modules() if hasattr(module, "lora_A")
    )
    assert adapted == ["0.mlp.down_proj", "0.self_attn.q_proj", "2.mlp.down_proj", "2.self_attn.q_proj"]


def test_all_linear_modules_of_the_blocks_are_the_default() -> None:
    for name, per_block in (("llama-gqa", 7), ("gpt2", 4)):
        model = fresh(name)
        adapted = [module for _, module in model.named_modules() if hasattr(module, "lora_A")]
        assert len(adapted) == 3 * per_block


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    base = build("llama-gqa", vocab=VOCAB)
    with pytest.raises(LensError, match=r"no linear module 'wq'.*k_proj"):
        add_lora(base, LoRASettings(modules=("wq",)))
    with pytest.raises(LensError, match="layers 0 to 2"):
        add_lora(base, LoRASettings(layers=(3,)))
    with pytest.raises(LensError, match="already has an adapter"):
        add_lora(add_lora(base))
    with pytest.raises(LensError, match="no list of decoder blocks"):
        add_lora(nn.Linear(2, 2))


# --- the loop ------------------------------------------------------------------------------------------


def test_training_equals_a_loop_written_by_hand() -> None:
    """Oracle: rows one by one through the plain model, clipping and AdamW from their formulas."""
    settings = replace(SETTINGS, steps=5, weight_decay=0.1, max_grad_norm=2.0, warmup_fraction=0.4)
    trained, byhand = fresh().double(), fresh().double()
    result = train(trained, EXAMPLES, settings)
    values = list(adapter(byhand).values())
    first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    clipped = 0
    for index in range(settings.steps):
        chosen = batch_indices(tuple(len(e.ids) for e in EXAMPLES), 4, settings.seed, index)
        losses = []
        for number in chosen:
            ids = torch.tensor([EXAMPLES[number].ids])
            n = EXAMPLES[number].n_prompt
            log_probs = byhand(ids, use_cache=False).logits[0].log_softmax(-1)
            losses.append(-log_probs[n - 1 : -1].gather(-1, ids[0, n:, None])[:, 0])
        loss = torch.cat(losses).mean()
        gradients = torch.autograd.grad(loss, values)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        rate = 1e-2 * [0.5, 1.0, 1.0, 0.75, 0.25][index]
        row = result.history[index]
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        assert row["lr"] == pytest.approx(rate)
        assert row["tokens"] == len(torch.cat(losses))
        clipped += norm > 2.0
        for i, gradient in enumerate(gradients):
            g = gradient * min(1.0, 2.0 / float(norm))
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            mean, square = first[i] / (1 - 0.9 ** (index + 1)), second[i] / (1 - 0.999 ** (index + 1))
            with torch.no_grad():
                values[i].mul_(1 - rate * 0.1).sub_(rate * mean / (square.sqrt() + 1e-8))
    assert clipped > 0
    for name, value in adapter(trained).items():
        torch.testing.assert_close(value, adapter(byhand)[name], rtol=0, atol=2e-4)
        assert (value - adapter(fresh())[name]).abs().max() > 0.01


def test_the_same_seed_gives_the_same_history_and_another_seed_another() -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        runs.append(without_seconds(train(fresh(dropout=0.3), EXAMPLES, replace(SETTINGS, seed=seed))))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_randomness_changes_with_the_step_and_the_seed_and_leaves_the_global_state_alone() -> None:
    def draws(seed: int) -> list[float]:
        drawn: list[float] = []

        def drawing(step: Step) -> Loss:
            drawn.append(float(torch.rand(())))
            return sft(step)

        train(fresh(), EXAMPLES, replace(SETTINGS, steps=3, seed=seed), objective=drawing)
        return drawn

    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = draws(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert draws(0) == first
    assert len({*first, *draws(1)}) == 6


def test_sharing_the_prefix_does_not_change_the_history() -> None:
    shared = train(fresh("mistral"), EXAMPLES, SETTINGS)
    ordinary = train(fresh("mistral"), EXAMPLES, replace(SETTINGS, share_prefix=False))
    for a, b in zip(shared.history, ordinary.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_training_fits_what_it_is_shown() -> None:
    chat = tiny_format()
    examples = [chat.render(query, response="oink") for query in ("hi", "why", "who are you", "tell me")]
    model = fresh()
    result = train(model, examples, TrainSettings(steps=40, batch_size=4, learning_rate=2e-2))
    losses = [row["loss"] for row in result.history]
    assert losses[0] > 2.0
    assert losses[-1] < 0.05
    prompt = chat.render("hi")
    ids = torch.tensor([prompt.ids])
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert chat.tokenizer.decode(answer[0, len(prompt.ids) :]) == "oink<end>"


def test_the_base_dropout_is_off_the_adapter_dropout_on_and_modes_come_back() -> None:
    model = fresh("gpt2", dropout=0.5)
    model.train()
    seen: dict[str, set[bool]] = {"base": set(), "adapter": set()}

    def watching(step: Step) -> Loss:
        for name, module in step.model.named_modules():
            if isinstance(module, nn.Dropout):
                seen["adapter" if "lora_dropout" in name else "base"].add(module.training)
        return sft(step)

    train(model, EXAMPLES, replace(SETTINGS, steps=1), objective=watching)
    assert seen == {"base": {False}, "adapter": {True}}
    assert all(module.training for module in model.modules())
    assert all(value.grad is None for value in model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_rate(tmp_path: Path) -> None:
    def broken(step: Step) -> Loss:
        loss = sft(step)
        return Loss(loss.total * (math.nan if step.index == 4 else 1.0), loss.terms)

    with pytest.raises(LensError, match=r"loss of step 5 \(learning rate 0\.00\d+\) is nan"):
        train(fresh(), EXAMPLES, SETTINGS, objective=broken, out=tmp_path)
    assert (tmp_path / "checkpoint-000003").exists()


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    def broken(step: Step) -> Loss:
        loss = sft(step)
        return Loss(loss.total + (step.output.logits[0, 0] * 0).sqrt(), loss.terms)

    with pytest.raises(LensError, match=r"gradient of step 1 .*not finite"):
        train(fresh(), EXAMPLES, SETTINGS, objective=broken)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(LensError, match="example 10 has no response tokens"):
        train(fresh(), [*EXAMPLES, tiny_format().render("hi")], SETTINGS)
    with pytest.raises(LensError, match="batch_size is 11 and there are 10 examples"):
        train(fresh(), EXAMPLES, replace(SETTINGS, batch_size=11))
    with pytest.raises(LensError, match="example 1 has 314 tokens, this model takes 256"):
        train(
            fresh(),
            [EXAMPLES[0], tiny_format().render("hi", response="a" * 295)],
            replace(SETTINGS, batch_size=1),
        )
    with pytest.raises(LensError, match="no adapter to train; call add_lora"):
        train(build("llama-gqa", vocab=VOCAB), EXAMPLES, SETTINGS)
    with pytest.raises(LensError, match="a column of the history"):
        train(fresh(), EXAMPLES, SETTINGS, objective=_badly_named)
    with pytest.raises(LensError, match="is_trainable=True"):
        train(fresh().requires_grad_(False), EXAMPLES, SETTINGS)


def _badly_named(step: Step) -> Loss:
    return Loss(sft(step).total, {"lr": 0.0})


def test_a_booted_model_is_refused() -> None:
    model = fresh()
    block: Any = model.base_model.model.model.layers[0]  # type: ignore[union-attr]
    block.mlp._original_component = nn.Linear(1, 1)
    with pytest.raises(LensError, match="was booted into TransformerLens"):
        train(model, EXAMPLES, SETTINGS)


def test_training_is_silent_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    train(fresh(), EXAMPLES, replace(SETTINGS, steps=2), progress=True)
    out, err = capfd.readouterr()
    assert (out, [line for line in err.splitlines() if "arning" not in line and "warn(" not in line]) == (
        "",
        [],
    )


# --- checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 5, 8])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path: Path, name: str, step: int) -> None:
    whole = fresh(name, dropout=0.2)
    expected = train(whole, EXAMPLES, SETTINGS, out=tmp_path / "whole")
    with pytest.raises(Killed):
        train(fresh(name, dropout=0.2), EXAMPLES, SETTINGS, out=tmp_path / "killed", on_step=kill_at(step))
    resumed = fresh(name, dropout=0.2)
    result = train(resumed, EXAMPLES, SETTINGS, out=tmp_path / "killed")
    assert (expected.resumed_from, result.resumed_from) == (None, (step - 1) // 3 * 3)
    assert_same_weights(resumed, whole)
    assert without_seconds(result) == without_seconds(expected)
    a, b = (tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()


def test_a_rerun_with_the_partly_trained_model_starts_from_the_checkpoint(tmp_path: Path) -> None:
    whole, model = fresh(), fresh()
    train(whole, EXAMPLES, SETTINGS)
    with pytest.raises(Killed):
        train(model, EXAMPLES, SETTINGS, out=tmp_path, on_step=kill_at(2))
    result = train(model, EXAMPLES, SETTINGS, out=tmp_path)
    assert result.resumed_from == 0
    assert_same_weights(model, whole)


def test_a_finished_run_is_loaded_and_not_trained_again(tmp_path: Path) -> None:
    model = fresh()
    first = train(model, EXAMPLES, SETTINGS, out=tmp_path)
    again = fresh()
    second = train(again, EXAMPLES, SETTINGS, out=tmp_path, on_step=kill_at(1))
    assert second.resumed_from == 8
    assert second.history == first.history
    assert_same_weights(again, model)


def test_ctrl_c_leaves_a_checkpoint_of_the_last_whole_step(tmp_path: Path) -> None:
    whole, calls = fresh(), []
    train(whole, EXAMPLES, SETTINGS)
    original = training_module._set_gradient

    def interrupted(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_module, "_set_gradient", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(fresh(), EXAMPLES, SETTINGS, out=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-000005"]
    resumed = fresh()
    assert train(resumed, EXAMPLES, SETTINGS, out=tmp_path / "run").resumed_from == 5
    assert_same_weights(resumed, whole)


def test_ctrl_c_inside_the_optimiser_saves_nothing_half_done(tmp_path: Path) -> None:
    whole, calls = fresh(), []
    train(whole, EXAMPLES, SETTINGS)
    original = training_module._descend

    def interrupted(*args: Any) -> None:
        calls.append(1)
        original(*args)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_module, "_descend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)
    resumed = fresh()
    assert train(resumed, EXAMPLES, SETTINGS, out=tmp_path).resumed_from == 3
    assert_same_weights(resumed, whole)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_one(tmp_path: Path) -> None:
    whole = fresh()
    train(whole, EXAMPLES, SETTINGS)
    original = checkpoints_module.write_json

    def full_disk(path: Path, obj: Any) -> Path:
        if len(obj["history"]) == 6:
            raise Killed
        return original(path, obj)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints_module, "write_json", full_disk)
        with pytest.raises(Killed):
            train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-000003"]
    (tmp_path / ".checkpoint-000006.new").mkdir()  # what a SIGKILL would leave behind
    (tmp_path / ".checkpoint-000006.new" / "weights.safetensors").write_bytes(b"half")
    resumed = fresh()
    assert train(resumed, EXAMPLES, SETTINGS, out=tmp_path).resumed_from == 3
    assert_same_weights(resumed, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoint-000008",
        "result.json",
    ]


def test_a_folder_holds_no_pickles_and_one_checkpoint(tmp_path: Path) -> None:
    train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix or path.name for path in files} == {".safetensors", ".json", ".lock", ".md"}
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-000008"]
    state = json.loads((tmp_path / "checkpoint-000008" / "state.json").read_text())
    assert [row["step"] for row in state["history"]] == list(range(1, 9))


def _other(step: Step) -> Loss:
    return sft(step)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (
            {"settings": replace(SETTINGS, learning_rate=2e-2)},
            r"settings\.learning_rate is 0\.01 there, 0\.02 here",
        ),
        (
            {"settings": replace(SETTINGS, steps=9, seed=3)},
            r"settings\.steps is 8 there, 9 here; settings\.seed is 0 there, 3 here",
        ),
        ({"examples": [*EXAMPLES[:-1], EXAMPLES[0]]}, r"examples\.sha256"),
        ({"objective": _other}, r"objective\.name is 'piggyback_lens\.finetuning\.steps\.sft' there, '.*_other' here"),
        ({"model": ("llama-gqa", 0.1, 0)}, r"adapter\.dropout is 0\.0 there, 0\.1 here"),
        ({"model": ("llama-gqa", 0.0, 1)}, r"adapter\.init_seed is 0 there, 1 here"),
        ({"model": ("qwen3", 0.0, 0)}, r"base is "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with suppress(Killed):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path, on_step=kill_at(4))
    model = fresh(*change.get("model", ("llama-gqa", 0.0, 0)))
    before = {name: value.clone() for name, value in adapter(model).items()}
    with pytest.raises(LensError, match=f"another run: .*{field}"):
        train(
            model,
            change.get("examples", EXAMPLES),
            change.get("settings", SETTINGS),
            objective=change.get("objective", sft),
            out=tmp_path,
        )
    assert all(torch.equal(value, before[name]) for name, value in adapter(model).items())


def test_another_base_with_the_same_shapes_is_another_run(tmp_path: Path) -> None:
    train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)
    other = add_lora(build("llama-gqa", seed=1, vocab=VOCAB), LoRASettings(rank=4), 0)
    with pytest.raises(LensError, match="another run: base is"):
        train(other, EXAMPLES, SETTINGS, out=tmp_path)


def test_the_checkpoint_interval_may_change_between_runs(tmp_path: Path) -> None:
    with suppress(Killed):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path, on_step=kill_at(4))
    result = train(fresh(), EXAMPLES, replace(SETTINGS, checkpoint_every=2), out=tmp_path)
    assert result.resumed_from == 3


def test_a_folder_in_use_or_with_a_strange_adapter_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(LensError, match=r"is in use by process \d+ on"):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(LensError, match="holds an adapter but no checkpoint"):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_the_saved_adapter_reloads_exactly_through_peft(tmp_path: Path, name: str) -> None:
    model = add_lora(build(name, vocab=VOCAB), LoRASettings(rank=4, alpha=12.0, rslora=True, layers=(0, 2)))
    result = train(model, EXAMPLES, SETTINGS, out=tmp_path)
    assert result.adapter_dir == tmp_path / "adapter"
    again = PeftModel.from_pretrained(build(name, vocab=VOCAB), str(result.adapter_dir))
    ids = torch.tensor([EXAMPLES[0].ids])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (again(input_ids=ids).logits - build(name, vocab=VOCAB)(ids).logits).abs().max() > 0.1


def test_a_result_survives_its_file_and_makes_a_frame_and_a_figure(tmp_path: Path) -> None:
    result = train(fresh(), EXAMPLES, SETTINGS, out=tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    again = TrainResult.load(moved / "result.json")
    assert again == replace(result, adapter_dir=moved / "adapter")
    frame = result.to_frame()
    assert list(frame.columns) == ["step", "loss", "sft", "lr", "grad_norm", "tokens", "seconds"]
    assert len(frame) == 8
    assert set(result.versions) >= {"torch", "transformers", "peft"}
    assert result.identity["template"] == EXAMPLES[0].fingerprint
    assert len(result.figure().data) >= 2


# --- other objectives and trainables through the same loop ---------------------------------------------


@dataclass(frozen=True, eq=False)
class KeepPrefix:
    """Penalise the drift of the prefix's keys and values, read from the pass that gives the logits."""

    base: StepOutput
    weight: float

    def settings(self) -> dict[str, float]:
        return {"weight": self.weight}

    def __call__(self, step: Step) -> Loss:
        out, base = step.output, self.base
        columns = zip(out.prefix_keys, base.prefix_keys, out.prefix_values, base.prefix_values, strict=True)
        drift = torch.stack([relative_kv_drift(*(x.transpose(0, 1) for x in layer)) for layer in columns]).mean()
        task = response_nll(out.logits, out.targets)
        terms = {"sft": float(task.detach()), "drift": float(drift.detach())}
        return Loss(task + self.weight * drift, terms)


def test_a_prefix_penalty_plugs_in_and_keeps_the_prefix(tmp_path: Path) -> None:
    drifts = {}
    for weight in (0.0, 300.0):
        model = fresh()
        with torch.no_grad():
            base = forward_step(model, training_module.make_batch(EXAMPLES[:2]))
        objective = KeepPrefix(base, weight)
        settings = replace(SETTINGS, steps=20, max_grad_norm=None)
        result = train(model, EXAMPLES, settings, objective=objective, out=tmp_path / str(weight))
        drifts[weight] = result.history[-1]["drift"]
        assert result.history[0]["drift"] == pytest.approx(0, abs=1e-9)
        assert result.identity["objective"]["weight"] == weight
    assert drifts[0.0] > 0.01
    assert drifts[300.0] < drifts[0.0] / 20


def test_a_divergence_to_the_base_plugs_in() -> None:
    def keep(step: Step) -> Loss:
        model: Any = step.model
        with torch.no_grad(), model.disable_adapter():
            base = forward_step(model, step.batch).logits
        kl = kl_per_token(base[None], step.output.logits[None]).mean()
        return Loss(sft(step).total + 100.0 * kl, {"kl": float(kl.detach())})

    free, held = (train(fresh(), EXAMPLES, replace(SETTINGS, steps=15), objective=how) for how in (sft, keep))
    assert held.history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert max(row["kl"] for row in held.history) > 1e-6
    assert free.history[-1]["loss"] < held.history[-1]["loss"] - 0.5


class Steering(Trainable):
    """A vector added to the residual stream of one block of a plain model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vector = nn.Parameter(torch.zeros(32))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"vector": self.vector}

    def forward(self, batch: TrainBatch) -> StepOutput:
        handle = self.model.model.layers[1].register_forward_hook(lambda _module, _args, out: out + self.vector)
        try:
            return forward_step(self.model, batch)
        finally:
            handle.remove()

    def settings(self) -> dict[str, object]:
        return {"kind": "steering", "layer": 1}

    def save(self, folder: Path) -> None:
        (folder / "vector.json").write_text(json.dumps(self.vector.tolist()))


def test_something_that_is_no_adapter_trains_through_the_same_loop_and_resumes(tmp_path: Path) -> None:
    model = build("llama-gqa", vocab=VOCAB).requires_grad_(False)
    whole = Steering(model)
    settings = replace(SETTINGS, learning_rate=0.1)
    result = train(whole, EXAMPLES, settings)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    with pytest.raises(Killed):
        train(Steering(model), EXAMPLES, settings, out=tmp_path, on_step=kill_at(5))
    resumed = Steering(model)
    train(resumed, EXAMPLES, settings, out=tmp_path)
    assert torch.equal(resumed.vector, whole.vector)
    assert whole.vector.norm() > 0.1
    assert json.loads((tmp_path / "adapter" / "vector.json").read_text()) == whole.vector.tolist()


@pytest.mark.real
def test_sharing_is_exact_on_the_real_model(real_model_dir: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from piggyback_lens.conversations.chat import ChatFormat
    from piggyback_lens.finetuning.batches import make_batch

    chat = ChatFormat(AutoTokenizer.from_pretrained(real_model_dir))
    model = add_lora(AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32), LoRASettings())
    generator = torch.Generator().manual_seed(0)
    for value in adapter(model).values():
        value.data.add_(torch.randn(value.shape, generator=generator) * 0.01)
    examples = [chat.render(f"What is {i} + {i}?", response=f"{2 * i} and no more") for i in range(1, 5)]
    found = []
    for share in (True, False):
        output = forward_step(model, make_batch(examples, share_prefix=share))
        loss = response_nll(output.logits, output.targets)
        values = adapter(model)
        found.append((loss, torch.autograd.grad(loss, list(values.values()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=0)
    for name, a, b in zip(values, found[0][1], found[1][1], strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm(), name


def test_the_check_meets_a_packed_batch_even_if_the_first_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    checked: list[Any] = []

    def packs_the_third(_model: Any, batch: Any) -> Any:
        asked.append(len(batch.examples))
        return SimpleNamespace(packing=object() if len(asked) == 3 else None)

    monkeypatch.setattr(training_module, "plan_for", packs_the_third)
    monkeypatch.setattr(training_module, "check_sharing", lambda _forward, batch: checked.append(batch.ids))
    train(fresh(), EXAMPLES, SETTINGS)
    assert (len(asked), len(checked)) == (3, 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"[]"),
        ("state.json", b'{"identity": [], "history": []}'),
        ("state.json", b'{"identity": {}, "history": [3]}'),
        ("state.json", b"{"),
        ("optimiser.safetensors", b"not tensors"),
        ("optimiser.safetensors", None),
        ("weights.safetensors", b""),
        ("weights.safetensors", b"\xff" * 8 + b"{}"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    with suppress(Killed):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path, on_step=kill_at(4))
    file = tmp_path / "checkpoint-000003" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(LensError, match=r"is damaged|is not valid JSON|belongs to another run") as error:
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)
    assert "\n" not in str(error.value)


def test_moments_of_a_parameter_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with suppress(Killed):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path, on_step=kill_at(4))
    file = tmp_path / "checkpoint-000003" / "optimiser.safetensors"
    save_file({f"strange.{name}": value for name, value in load_file(file).items()}, file)
    with pytest.raises(LensError, match="its optimiser's state"):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path)
