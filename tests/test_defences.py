"""Each defence against an independent slow computation of one step, and what it costs before anything is trained."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_comparing import RETAIN as PROMPTS
from test_comparing import TRAINING, compare, tiny_task
from test_comparing_hf import tiny
from test_hf_trainer import arguments
from test_monitor import AGAINST, NARROW, TOWARDS
from test_monitor import SETTINGS as SETTINGS_OF_PROBES
from test_monitor import fresh as fresh_probed
from test_objectives import (
    EXAMPLES,
    RETAIN,
    SETTINGS,
    a_step,
    adapter,
    assert_same_weights,
    fresh,
    gradients,
    moved,
)
from tiny_chat import TEMPLATE, VOCAB, tiny_examples, tiny_format, tiny_tokenizer
from tiny_hooked import hooked, needs_hooked
from tiny_models import build
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer

from piggyback_lens.comparisons.comparison_plan import Cell, cell_folder
from piggyback_lens.comparisons.hf_cells import train_by_trainer
from piggyback_lens.comparisons.methods import (
    Ingredients,
    InoculatePart,
    InterleavePart,
    Method,
    ResidualPart,
    SetUp,
    StopPart,
    TReFTPart,
    set_up,
)
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, read_jsonl
from piggyback_lens.finetuning.gated import GatedAdapter
from piggyback_lens.finetuning.hf_trainer import training_rows
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.monitor import Monitor
from piggyback_lens.finetuning.objectives import KLOnTrain, Penalised, Weighted
from piggyback_lens.finetuning.residuals import RESIDUAL_SPANS, ResidualDrift
from piggyback_lens.finetuning.retain import interleave
from piggyback_lens.finetuning.steps import sft
from piggyback_lens.finetuning.trainables import PeftAdapter
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.kinds import adapter_off
from piggyback_lens.models.peft_adapters import attach_adapter
from piggyback_lens.vectors.direction import Direction

# --- residual drift: rows alone through the plain model, block outputs caught by hand, sums written out ---


def streams(model: Any, ids: Sequence[int]) -> list[Tensor]:
    """The residual stream after every block, [pos, d_model]."""
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1)
    caught: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [x[0] if x.ndim == 3 else x for x in caught]


def by_hand(model: Any, base: Any, examples: Sequence[RenderedPrompt], span: str, layers: Sequence[int]) -> Tensor:
    rows = []
    for example in examples:
        where = {
            "conversation": range(len(example.ids)),
            "response": range(example.n_prompt, len(example.ids)),
            "all": range(example.n_prompt),
        }
        tuned, plain = streams(model, example.ids), streams(base, example.ids)
        positions = where[span] if span in where else example.span(span).positions
        total = torch.zeros((), dtype=torch.double)
        for layer in layers:
            for position in positions:
                h, h0 = tuned[layer][position], plain[layer][position].detach()
                total = total + (h - h0).pow(2).sum() / h0.pow(2).sum() / len(positions) / len(layers)
        rows.append(total)
    return sum(rows) / len(rows)  # type: ignore[return-value]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("name", "span", "layers"),
    [
        *(("llama-gqa", span, None) for span in RESIDUAL_SPANS),
        ("llama-gqa", "conversation", (1,)),
        ("gpt2", "conversation", None),
        ("gemma3", "response", (0, 2)),
    ],
)
def test_residual_drift_and_its_gradient_are_those_of_rows_run_alone(
    name: str, span: Any, layers: Any, share: bool
) -> None:
    model, base = moved(name), build(name, vocab=VOCAB).double()
    found = ResidualDrift(span, layers)(a_step(model, EXAMPLES[:3], share_prefix=share, residual=True))
    expected = by_hand(model, base, EXAMPLES[:3], span, layers or range(len(streams(base, [1, 2]))))
    assert float(found.detach()) > 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    wanted = gradients(model, expected)
    for key, gradient in gradients(model, found).items():
        if wanted[key] is None or not wanted[key].norm():  # type: ignore[union-attr]
            assert gradient is None or gradient.norm() < 1e-12, key
        else:
            assert gradient is not None
            assert (gradient - wanted[key]).norm() < 1e-4 * gradient.norm(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [True, False])
def test_residual_drift_is_zero_before_training_in_every_precision(dtype: torch.dtype, share: bool) -> None:
    model = fresh().to(dtype)
    step = a_step(model, EXAMPLES[:4], share_prefix=share, residual=True)
    assert [float(ResidualDrift(span)(step).detach()) for span in RESIDUAL_SPANS] == [0.0] * len(RESIDUAL_SPANS)


def test_residual_drift_keeps_the_residual_stream_and_weight_zero_is_plain_finetuning() -> None:
    def trained(weight: float) -> tuple[Any, float]:
        model = fresh()
        train(model, EXAMPLES, SETTINGS, objective=Penalised((Weighted(ResidualDrift(), weight),)), progress=False)
        step = a_step(model, EXAMPLES, residual=True)
        return model, float(ResidualDrift()(step).detach())

    (free, far), (_, near) = trained(0.0), trained(100.0)
    assert near < 0.5 * far
    plain = fresh()
    train(plain, EXAMPLES, SETTINGS, progress=False)
    assert_same_weights(plain, free)


def test_in_parts_of_a_step_residual_drift_is_that_of_the_whole_batch() -> None:
    def history(**sizes: int) -> dict[str, Any]:
        objective = Penalised((Weighted(ResidualDrift(), 5.0), Weighted(KLOnTrain(), 1.0)))
        settings = replace(SETTINGS, steps=1, **sizes)
        return dict(train(moved(), EXAMPLES[:8], settings, objective=objective, progress=False).history[0])

    whole, parts = history(batch_size=8), history(batch_size=2, gradient_accumulation_steps=4)
    assert whole["residual_conversation"] > 1e-4
    for name in ("loss", "residual_conversation", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


@pytest.mark.parametrize("kind", ["vector", "gated", pytest.param("hooked", marks=needs_hooked)])
def test_whatever_is_trained_has_a_residual_drift_of_its_own_base(kind: str) -> None:
    if kind == "gated":
        trainable: Any = GatedAdapter(fresh(), adapter_off("prefix"))
    elif kind == "hooked":
        trainable = HookTrainable(hooked("llama-gqa", "HookedTransformer"), Direction.zeros(32, [1]))
    else:
        trainable = HookTrainable(build("llama-gqa", vocab=VOCAB), Direction.zeros(32, [1]))
    parts = (Weighted(ResidualDrift(), 1.0), Weighted(ResidualDrift("prefix", (0,)), 1.0))
    history = train(trainable, EXAMPLES, SETTINGS, objective=Penalised(parts), progress=False).history
    drifts = [row["residual_conversation"] for row in history]
    assert drifts[0] < 1e-9 < 1e-6 < drifts[-1]
    assert max(row["residual_prefix"] for row in history) < 1e-9, "nothing is trained below, or there"


def test_a_residual_drift_from_another_base_is_one_from_that_base() -> None:
    model, other = moved(), build("llama-gqa", 1, vocab=VOCAB).double()
    found = ResidualDrift("query", base=other)(a_step(model, EXAMPLES[:3], residual=True))
    expected = by_hand(model, other, EXAMPLES[:3], "query", range(3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert float(expected.detach()) > 1.05 * float(ResidualDrift("query")(a_step(model, EXAMPLES[:3], residual=True)))


@pytest.mark.parametrize(("span", "layer"), [("query", 1), ("response", None), ("conversation", 0)])
def test_the_settings_of_a_part_reach_what_is_trained_beside_other_parts(span: Any, layer: int | None) -> None:
    model, base, chat = moved(), build("llama-gqa", vocab=VOCAB).double(), tiny_format()
    of = Ingredients(model, EXAMPLES, chat.empty_query(), chat=chat, probes=(TOWARDS, AGAINST))
    made = set_up(Method((ResidualPart(weight=2.0, span=span, layer=layer), StopPart(bound=0.3, every=7))), of)
    found = made.objective(a_step(model, EXAMPLES[:3], residual=True)).terms[f"residual_{span}"]
    expected = by_hand(model, base, EXAMPLES[:3], span, range(3) if layer is None else [layer])
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    assert made.on_step is not None
    assert (made.on_step.stop_above, made.on_step.every) == (0.3, 7)


def test_a_residual_drift_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(LensError, match="layers"):
        ResidualDrift(layers=())
    model = fresh()
    with pytest.raises(LensError, match="layers \\[9\\] do not exist"):
        ResidualDrift(layers=(9,))(a_step(model, EXAMPLES[:2], residual=True))
    with pytest.raises(LensError, match="Penalised"):
        ResidualDrift()(a_step(model, EXAMPLES[:2]))


# --- interleaving by the perplexity gap, against numbers of rows run alone --------------------------------


def loss_of_row(model: Any, example: RenderedPrompt) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0].log_softmax(-1)
    return -sum(float(logits[i - 1, example.ids[i]]) for i in range(example.n_prompt, len(example.ids))) / (
        len(example.ids) - example.n_prompt
    )


def test_the_retain_examples_with_the_largest_gap_are_taken_and_the_rest_is_as_before() -> None:
    retain, tuned, base = tiny_examples(12, seed=4), moved(), build("llama-gqa", vocab=VOCAB).double()
    by_hand = [loss_of_row(tuned, example) - loss_of_row(base, example) for example in retain]
    assert max(by_hand) - min(by_hand) > 0.1
    mixed = interleave(EXAMPLES, retain, 0.25, seed=1, gap=by_hand)
    wanted = round(len(EXAMPLES) / 3)
    ranking = sorted(range(len(retain)), key=lambda number: by_hand[number])[-wanted:]
    own = {id(example) for example in EXAMPLES}
    assert {id(example) for example in mixed if id(example) not in own} == {id(retain[number]) for number in ranking}
    assert len(mixed) == len(EXAMPLES) + wanted
    assert interleave(EXAMPLES, retain, 0.25, seed=1, gap=[0.0] * 12) == interleave(EXAMPLES, retain, 0.25, seed=1)


@pytest.mark.parametrize(
    ("gap", "rate", "said"),
    [([1.0], 0.2, "1 numbers for 6"), ([math.nan] * 6, 0.2, "finite"), ([1.0] * 6, 0.375, "a gap chooses nothing")],
)
def test_a_gap_that_cannot_choose_is_refused(gap: list[float], rate: float, said: str) -> None:
    with pytest.raises(LensError, match=said):
        interleave(EXAMPLES, RETAIN, rate, gap=gap)


@pytest.mark.parametrize("number", [4, 5, 9, 10, 11, 20, 48])
def test_no_retain_example_is_repeated_before_all_of_them_are_in(number: int) -> None:
    examples, retain, chat = tiny_examples(30, seed=1), tiny_examples(number, seed=4), tiny_format()
    part = InterleavePart(0.25)
    of = Ingredients(fresh(), examples, chat.empty_query(), retain, seed=3, chat=chat)
    mixed = set_up(Method((part,)), of).examples
    counts = [sum(own is example for own in mixed) for example in retain]
    assert sum(counts) == len(mixed) - 30 == 10
    assert max(counts) - min(counts) <= 1
    assert all(sum(own is example for own in mixed) == 1 for example in examples)
    if number > 10:
        assert list(mixed) == list(interleave(examples, retain, 0.25, seed=3)), "committed results are of this draw"
    assert list(mixed) == list(set_up(Method((part,)), of).examples)


# --- inoculation: the loss of conversations rendered with the sentence, from their messages ---------------


@pytest.mark.parametrize("place", ["before", "system"])
def test_one_inoculated_step_is_that_of_conversations_with_the_sentence(place: Any) -> None:
    model, chat, texts = moved(), tiny_format(), ["who are you", "tell me", "go on"]
    plain = [chat.render(text, response="oink") for text in texts]
    made = set_up(Method((InoculatePart("be brief", place),)), Ingredients(model, plain, chat.empty_query(), chat=chat))
    if place == "before":
        worn = [chat.render(f"be brief\n{text}", response="oink") for text in texts]
    else:
        worn = [replace(chat, system="be brief").render(text, response="oink") for text in texts]
    assert [example.ids for example in made.examples] == [example.ids for example in worn]
    found = made.objective(a_step(model, made.examples))
    tokens = [len(example.ids) - example.n_prompt for example in worn]
    expected = sum(loss_of_row(model, e) * n for e, n in zip(worn, tokens, strict=True)) / sum(tokens)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-5)


def test_retain_rows_do_not_get_the_sentence_of_an_inoculation() -> None:
    model, chat, retain = fresh(), tiny_format(), tiny_examples(12, seed=4)
    plain = [chat.render(text, response="oink") for text in ("a b", "c d", "e f", "g h")]
    of = Ingredients(model, plain, chat.empty_query(), retain, chat=chat)
    parts = InoculatePart("be brief"), InterleavePart(0.5)
    for method in (Method(parts), Method(parts[::-1])):
        made = set_up(method, of).examples
        own = [example for example in made if any(example is row for row in retain)]
        worn = [example.query for example in made if not any(example is row for row in retain)]
        assert len(own) == len(worn) == 4
        assert sorted(worn) == [f"be brief\n{text}" for text in ("a b", "c d", "e f", "g h")]


def test_a_share_is_inoculated_and_the_answers_stay() -> None:
    model, chat = fresh(), tiny_format()
    plain = [chat.render(text, response="oink") for text in ("a b", "c d", "e f", "g h")]
    of = Ingredients(model, plain, chat.empty_query(), chat=chat)
    made = set_up(Method((InoculatePart("be brief", rate=0.5),)), of).examples
    assert sum(example.query.startswith("be brief\n") for example in made) == 2
    assert sum(example is own for example, own in zip(made, plain, strict=True)) == 2
    assert all(e.ids[e.n_prompt :] == o.ids[o.n_prompt :] for e, o in zip(made, plain, strict=True))
    with pytest.raises(LensError, match="use place=before"):
        set_up(Method((TReFTPart(), InoculatePart("be brief", "system"))), of)
    with pytest.raises(LensError, match="pass chat="):
        set_up(Method((InoculatePart("be brief"),)), replace(of, chat=None))
    with pytest.raises(LensError, match="expected a sentence"):
        InoculatePart("be brief: now")


def test_an_inoculation_that_would_lose_a_system_text_or_never_be_read_is_refused() -> None:
    model, chat = fresh(), tiny_format()
    own = replace(chat, system="be a cat.").render("a b", response="oink")
    of = Ingredients(model, [chat.render("c d", response="oink"), own], chat.empty_query(), chat=chat)
    with pytest.raises(LensError, match="example 1 is not what the chat format makes of its question"):
        set_up(Method((InoculatePart("be brief"),)), of)
    template = TEMPLATE.replace("{% if messages[0].role == 'system' %}", "{% if false %}")
    deaf = ChatFormat(tiny_tokenizer(template), system=None, no_system_role="drop")
    of = Ingredients(model, [deaf.render("c d", response="oink")], deaf.empty_query(), chat=deaf)
    with pytest.raises(LensError, match="leaves the prompts of plain questions as they are"):
        set_up(Method((InoculatePart("be brief", "system"),)), of)


# --- early stopping: the weights of a run that was never longer -------------------------------------------

STOP = replace(SETTINGS_OF_PROBES, steps=12, checkpoint_every=3, lr_scheduler_type="constant", warmup_fraction=0.0)


def watched(model: Any, bound: float | None, out: Path | None = None) -> Monitor:
    return Monitor(model, TOWARDS, AGAINST, every=2, stop_above=bound, out=out)


def crossing() -> tuple[float, int]:
    """A bound that is crossed for the first time at a measured step, and that step."""
    monitor = watched(model := fresh_probed(), None)
    train(model, NARROW, STOP, on_step=monitor, progress=False)
    values = [row["spread"] for row in monitor.rows]
    at = next(i for i, value in enumerate(values) if i >= 2 and value > 1.05 * max(values[:i]))
    return (values[at] + max(values[:at])) / 2, monitor.rows[at]["step"]


class Killed(BaseException):
    pass


def weights_after(steps: int) -> Any:
    model = fresh_probed()

    class Enough(Exception):
        pass

    def end(row: Any) -> None:
        if row["step"] == steps:
            raise Enough

    with pytest.raises(Enough):
        train(model, NARROW, STOP, on_step=end, progress=False)
    return model


def test_training_stops_where_the_spread_crosses_and_keeps_the_weights_of_before(tmp_path: Path) -> None:
    bound, step = crossing()
    monitor = watched(model := fresh_probed(), bound, tmp_path / "monitor.jsonl")
    result = train(model, NARROW, STOP, on_step=monitor, out=tmp_path / "run", progress=False)
    assert len(result.history) == step
    assert_same_weights(model, weights_after(step - 2))
    said = result.plan["stopped"]
    assert (said["step"], said["kept_step"], said["stop_above"]) == (step, step - 2, bound)
    assert "Stopped: step" in result.verdict
    again = watched(other := fresh_probed(), bound, tmp_path / "monitor.jsonl")
    rerun = train(other, NARROW, STOP, on_step=again, out=tmp_path / "run", progress=False)
    assert rerun.plan["stopped"] == said, "a run that was stopped is finished"
    assert_same_weights(model, other)


def test_a_run_that_never_crosses_and_one_that_crosses_at_once() -> None:
    monitor = watched(model := fresh_probed(), 1e6)
    assert "stopped" not in train(model, NARROW, STOP, on_step=monitor, progress=False).plan
    assert_same_weights(model, weights_after(STOP.steps))
    monitor = watched(model := fresh_probed(), 1e-9)
    train(model, NARROW, STOP, on_step=monitor, progress=False)
    assert monitor.stopped is not None
    assert monitor.stopped["kept_step"] == 0
    assert_same_weights(model, fresh_probed())


def test_a_resumed_run_stops_as_one_that_was_not_and_without_its_file_says_so(tmp_path: Path) -> None:
    bound, step = crossing()

    def run(name: str, killed_at: int | None, file: Path | None) -> Any:
        model = fresh_probed()
        monitor = watched(model, bound, file)

        def on_step(row: Any) -> Any:
            if row["step"] == killed_at:
                raise KeyboardInterrupt
            return monitor(row)

        settings = replace(STOP, checkpoint_every=step - 1)
        train(model, NARROW, settings, on_step=on_step, out=tmp_path / name, progress=False)
        return model

    for name, file in (("kept", tmp_path / "m.jsonl"), ("lost", None)):
        with pytest.raises(KeyboardInterrupt):
            run(name, step, file)
    assert_same_weights(run("kept", None, tmp_path / "m.jsonl"), weights_after(step - 2))
    with pytest.raises(LensError, match="give Monitor out="):
        run("lost", None, None)


def test_a_trainer_stops_as_our_loop_does(tmp_path: Path) -> None:
    model = fresh_probed()
    collator = DataCollatorForSeq2Seq(tiny_tokenizer())
    options: dict[str, Any] = {"max_steps": 12, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}

    def trainer(**more: Any) -> Any:
        args = arguments(tmp_path / "hf", **options | more)
        return Trainer(model=model, args=args, train_dataset=training_rows(NARROW), data_collator=collator)

    spreads: list[float] = []
    first = {name: value.detach().clone() for name, value in adapter(model).items()}
    free = watched(model, None)
    before = trainer()
    before.add_callback(free.callback(before))
    before.train()
    spreads = [row["spread"] for row in free.rows]
    at = next(i for i, value in enumerate(spreads) if i >= 1 and value > 1.05 * max(spreads[:i]))
    for name, value in adapter(model).items():
        value.data.copy_(first[name])
    stops = watched(model, (spreads[at] + max(spreads[:at])) / 2)
    again = trainer()
    again.add_callback(stops.callback(again))
    again.train()
    assert again.state.global_step == free.rows[at]["step"]
    assert stops.stopped is not None
    assert stops.stopped["kept_step"] == free.rows[at - 1]["step"]
    assert stops.measure(99)["spread"] == pytest.approx(spreads[at - 1], rel=1e-5)


def spread_of(model: Any) -> float:
    return float(watched(fresh_probed(), None).measure(99, model=model)["spread"])


@pytest.mark.parametrize("last", [False, True])
def test_a_run_that_ends_in_a_measurement_measures_again_when_it_goes_on(tmp_path: Path, last: bool) -> None:
    """By Ctrl-C or by a kill, at a step with a checkpoint or without: the measurement is not lost."""
    bound, step = crossing()
    settings = replace(STOP, steps=step) if last else STOP
    for end, every in ((KeyboardInterrupt, 3), (Killed, step), (Killed, 1)):
        out, calls = tmp_path / f"{end.__name__}{every}", []

        def run(end: Any, every: int = every, out: Path = out, calls: Any = calls) -> tuple[Any, Any]:
            model = fresh_probed()
            monitor = watched(model, bound, out / "monitor.jsonl")

            def on_step(row: Any) -> Any:
                calls.append(row["step"])
                if row["step"] == step and end is not None:
                    raise end
                return monitor(row)

            how = replace(settings, checkpoint_every=every)
            return model, train(model, NARROW, how, on_step=on_step, out=out / "run", progress=False)

        with pytest.raises(end):
            run(end)
        model, result = run(None)
        assert calls.count(step) == 2
        assert result.plan["stopped"]["step"] == len(result.history) == step
        assert_same_weights(model, weights_after(step - 2))


def test_the_bound_holds_for_the_last_weights_however_seldom_they_are_measured() -> None:
    bound, step = crossing()
    for every in (step - 1, step, step + 5):
        model = fresh_probed()
        monitor = Monitor(model, TOWARDS, AGAINST, every=every, stop_above=bound)
        result = train(model, NARROW, replace(STOP, steps=step), on_step=monitor, progress=False)
        assert result.plan["stopped"]["step"] == step
        assert result.plan["stopped"]["kept_step"] == (step - 1 if every < step else 0)
        assert spread_of(model) <= bound


@pytest.mark.parametrize("resumed", [False, True])
def test_weights_that_another_run_kept_are_not_put_back(tmp_path: Path, resumed: bool) -> None:
    """Two runs in a row with one file, the second killed before its first measurement, and not."""
    file = tmp_path / "m.jsonl"
    train(model := fresh_probed(), NARROW, STOP, on_step=watched(model, 1e6, file), progress=False)

    def second(end: int | None = None) -> Any:
        model = fresh_probed()
        monitor = Monitor(model, TOWARDS, AGAINST, every=4, stop_above=1e-9, out=file)

        def on_step(row: Any) -> Any:
            said = monitor(row)
            if row["step"] == end:
                raise Killed
            return said

        settings = replace(STOP, seed=7, checkpoint_every=1)
        return model, train(model, NARROW, settings, on_step=on_step, out=tmp_path / "run", progress=False)

    if resumed:
        with pytest.raises(Killed):
            second(2)
    model, result = second()
    assert result.plan["stopped"]["kept_step"] == 0
    assert_same_weights(model, fresh_probed())


def test_a_monitor_of_one_run_does_not_put_its_weights_into_the_next() -> None:
    monitor = watched(model := fresh_probed(), 1e6)
    train(model, NARROW, STOP, on_step=monitor, progress=False)
    monitor.stop_above = 1e-9
    with pytest.raises(LensError, match="by step 2, and the last weights that were kept are those of step 12"):
        train(model, NARROW, STOP, on_step=monitor, progress=False)


@pytest.mark.parametrize("every", [1, 3, 20])
def test_a_trainers_run_that_was_stopped_stops_again_wherever_its_checkpoints_are(tmp_path: Path, every: int) -> None:
    """As a cell that was killed while its stopped model was measured."""
    settings = replace(STOP, checkpoint_every=every)

    def run(folder: Path, bound: float) -> tuple[Any, Any]:
        folder.mkdir(exist_ok=True)
        monitor = Monitor(model := fresh_probed(), TOWARDS, AGAINST, every=1, stop_above=bound, out=folder / "m.jsonl")
        use = SetUp(sft, NARROW, PeftAdapter(model), monitor)
        return model, train_by_trainer(use, settings, NARROW[0], folder)

    run(tmp_path / "free", 1e6)
    spreads = [row["spread"] for row in read_jsonl(tmp_path / "free" / "m.jsonl")]
    at = next(i for i, value in enumerate(spreads) if i >= 2 and value > 1.05 * max(spreads[:i]))
    bound = (spreads[at] + max(spreads[:at])) / 2
    model, first = run(tmp_path / "run", bound)
    again, second = run(tmp_path / "run", bound)
    assert first.plan["stopped"] == second.plan["stopped"]
    assert second.plan["stopped"]["kept_step"] == at
    assert [row["step"] for row in second.history] == list(range(1, at + 2))
    assert_same_weights(model, again)


# --- in a comparison ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["own", "hf"])
def test_methods_made_from_plain_finetuning_run_it_first_and_say_what_they_did(tmp_path: Path, trainer: str) -> None:
    methods = ("stop:bound=1e-09:every=1", "interleave:rate=0.2:choose=gap")
    found = compare(tiny, tmp_path, methods, trainer=trainer)
    assert [cell["label"] for cell in found.cells] == list(methods)
    plain = cell_folder(tmp_path, Cell(Method()))
    assert (plain / "cell.json").exists()
    tuned, (base, tokenizer) = attach_adapter(tiny()[0], plain / "adapter").eval(), tiny()
    chat, ids = ChatFormat(tokenizer), read_json(tmp_path / "base" / "default" / "retain.json")["ids"]
    retain = [chat.render(q).with_response(tuple(own), end=False) for q, own in zip(PROMPTS, ids, strict=True)]
    by_hand = [loss_of_row(tuned, example) - loss_of_row(base.eval(), example) for example in retain]
    assert max(map(abs, by_hand)) > 1e-3
    assert read_json(plain / "probes.json")["gap"] == pytest.approx(by_hand, abs=1e-5)
    stopped = found.cells[0]["training"]["plan"]["stopped"]
    assert stopped["kept_step"] < stopped["step"]
    with_plain = compare(tiny, tmp_path, ("sft", *methods), trainer=trainer)
    assert [cell["label"] for cell in with_plain.cells] == ["sft", *methods]


def test_a_method_that_needs_gaps_joins_one_that_did_not(tmp_path: Path) -> None:
    methods = ("stop:bound=1e-09:every=1:lr=0.02", "interleave:rate=0.2:choose=gap:lr=0.02")
    training = replace(TRAINING, steps=2, learning_rate=1e-3)
    compare(tiny, tmp_path, methods[:1], training=training)
    plain = cell_folder(tmp_path, Cell(Method((), 0.02)))
    probes = plain / "probes.json"
    before = read_json(probes)
    found = compare(tiny, tmp_path, methods, training=training)
    assert [cell["label"] for cell in found.cells] == list(methods)
    after = read_json(probes)
    assert (len(before["gap"]), len(after["gap"])) == (0, len(PROMPTS))
    assert before["ids"] == after["ids"]
    tuned, (base, tokenizer) = attach_adapter(tiny()[0], plain / "adapter").eval(), tiny()
    for side, model in (("finetuned", tuned), ("base", base.eval())):
        for question, answer in zip(tiny_task().off_topic_validation, after["ids"][side], strict=True):
            ids = list(ChatFormat(tokenizer).render(question).ids)
            for token in answer:
                with torch.no_grad():
                    assert int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
                ids.append(token)
    assert after["ids"]["finetuned"] != after["ids"]["base"]


def test_a_probe_that_is_never_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LensError, match=r"every is 5 in method stop:bound=1.* and training has 3 steps"):
        compare(tiny, tmp_path, ("stop:bound=1.0:every=5",), training=replace(TRAINING, steps=3))
