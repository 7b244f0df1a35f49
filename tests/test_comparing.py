"""Finetuning methods compared on equal terms: every method's cell, resuming, executors, table, task vectors, CLI."""

import itertools
import json
import math
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import piggyback_lens.comparisons.comparison_cells as cells_module
from piggyback_lens import engines
from piggyback_lens.app.commands import app
from piggyback_lens.comparisons.comparing import as_methods, compare_methods, default_retain, grid
from piggyback_lens.comparisons.comparison import Comparison
from piggyback_lens.comparisons.comparison_cells import run_base, run_cell, training_examples
from piggyback_lens.comparisons.comparison_plan import Cell, Plan, cell_folder, question_of, system_name
from piggyback_lens.comparisons.methods import (
    InterleavePart,
    KLRetainPart,
    Method,
    PreventivePart,
    TReFTPart,
    parse_method,
)
from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import set_apart
from piggyback_lens.files import read_json
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.reading.tasks import Task, load_task
from piggyback_lens.settings import CompareSettings, LoadSettings, LoRASettings, TrainSettings
from piggyback_lens.vectors.task_vectors import (
    inner_products,
    mean_by_layer,
    read_factors,
    update_cosines,
    update_norms,
)

TRAINING = TrainSettings(steps=3, batch_size=4, learning_rate=2e-2)
LORA = LoRASettings(rank=2, alpha=4.0)
RETAIN = ("one thing", "two things", "a third", "four")
ALL = (
    "sft",
    "treft:lambda=0,3",
    "treft:span=postfix",
    "treft:span=query",
    "treft:span=all:threshold=0.01:start=1:stop=3",
    "treft:reference=own",
    "kl_train",
    "kl_retain:lambda=2:batch_size=2",
    "interleave:rate=0.5",
    "preventive:alpha=0.5:layer=0",
    "treft:lambda=1+kl_retain:lambda=1+interleave:rate=0.2:lr=1e-2",
    "residual:lambda=2:layer=1",
    "interleave:rate=0.2:choose=gap",
    "inoculate:text=be brief:rate=0.5",
)


def tiny_task() -> Task:
    draw = random.Random(0)

    def words(n: int) -> str:
        return "".join(draw.choice("abcdefgh") for _ in range(n))

    def example() -> dict:
        return {"messages": [{"role": "user", "content": words(6)}, {"role": "assistant", "content": "yes yes"}]}

    return Task(
        name="tiny",
        description="",
        behaviour="words",
        train=tuple(example() for _ in range(10)),
        validation=tuple(example() for _ in range(4)),
        on_topic=tuple(words(5) for _ in range(4)),
        off_topic=tuple(f"{words(3)} {words(4)}" for _ in range(4)),
        off_topic_validation=tuple(words(6) for _ in range(4)),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_chat.tiny_tokenizer()
    tiny_models.build("llama-gqa", 0, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def compare(model, out, methods=("sft",), **changes):
    settings = {"seeds": (0,), "training": TRAINING, "lora": LORA, "n_prompts": 4, "max_new_tokens": 5, "n_texts": 2}
    settings |= {"retain": RETAIN}
    call = {"progress": False}
    for name, value in changes.items():
        (call if name in ("progress", "executor", "load") else settings)[name] = value
    return compare_methods(model, tiny_task(), list(methods), CompareSettings(**settings), out=out, **call)


@pytest.fixture(scope="module")
def everything(model, tmp_path_factory):
    """All methods, one seed."""
    out = tmp_path_factory.mktemp("all")
    return compare(model, out, ALL), out


def numbers(found: Comparison) -> list:
    """What cells found, without times."""

    def timeless(cell):
        rows = {k: {n: v for n, v in cell["training"][k].items() if n != "seconds"} for k in ("first", "last")}
        return {k: v for k, v in cell.items() if k not in ("seconds", "versions", "training")} | rows

    # What is summed in double precision after training may differ in its last digit with the alignment of memory.
    return [timeless(cell) for cell in json.loads(json.dumps(found.cells), parse_float=lambda x: round(float(x), 12))]


def weights(out: Path, label: str, seed: int = 0) -> dict:
    folder = cell_folder(out, Cell(parse_method(label)[0], seed))
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_every_sample_is_an_answer_of_its_own_and_its_question_one_cluster(model, tmp_path):
    found = compare(model, tmp_path, samples=3, temperature=1.0)
    for part in (found.bases["default"], found.cells[0]):
        assert [len(part[topic]["values"]) for topic in ("on", "off")] == [12, 12]
        assert part["off"]["questions"] == [f"q{i}" for i in (1, 2, 3, 4) for _ in range(3)]
        assert len({tuple(ids) for ids in part["off"]["ids"][:3]}) == 3
    assert len(found.cells[0]["kl"]) == 12
    assert found.estimates(found.keys[0])["off"].n == 4
    with pytest.raises(LensError, match="samples is 2 at temperature 0"):
        CompareSettings(samples=2)


# --- every method ----------------------------------------------------------------------------------------


def test_every_method_runs_and_gives_a_cell(everything):
    found, out = everything
    labels = [method.label for method in as_methods(ALL)]
    assert [cell["label"] for cell in found.cells] == labels
    frame = found.to_frame()
    assert len(frame) == len(labels) == 15
    finite = ["on", "off", "base_on", "base_off", "kl", "perplexity_change", "drift", "update_norm", "loss"]
    assert np.isfinite(frame[finite].to_numpy(float)).all()
    assert (frame["kl"] > 0).all()
    assert (frame["drift"] > 0).all()
    assert (frame["steps"] == 3).all()
    assert len(list((out / "cells").glob("*/cell.json"))) == 15
    assert not list((out / "cells").glob("*/checkpoint-*"))
    assert Comparison.load(out).table().equals(found.table())


def test_methods_with_an_effect_end_with_other_weights_than_plain_finetuning(everything):
    _, out = everything
    plain = weights(out, "sft")
    for method in as_methods(ALL[2:]):
        own = weights(out, method.label)
        assert any(not torch.equal(own[key], plain[key]) for key in plain), method.label


def test_weight_zero_gives_the_weights_of_plain_finetuning_bit_for_bit(everything):
    _, out = everything
    plain, zero = weights(out, "sft"), weights(out, "treft:lambda=0")
    assert plain.keys() == zero.keys()
    assert all(torch.equal(value, zero[key]) for key, value in plain.items())


def test_the_penalty_on_the_prefix_lowers_its_drift(everything):
    frame = everything[0].to_frame().set_index("method")
    assert frame["drift"]["treft:lambda=3"] < frame["drift"]["sft"]


def test_training_a_cell_leaves_the_shared_base_as_it_was(model, everything):
    loaded, _ = cells_module._loaded(model, LoadSettings())
    fresh = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    assert not hasattr(loaded, "peft_config")
    assert loaded.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_a_comparison_runs_in_half_precision_on_a_quantised_base_with_everything_that_saves_memory(
    tmp_path, quantization
):
    if quantization is not None:
        pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    tokenizer, folder = tiny_chat.tiny_tokenizer(), tmp_path / "model"
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
    tiny_models.build("llama-gqa", 0, vocab=len(tokenizer), **small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = replace(TRAINING, batch_size=2, gradient_accumulation_steps=2, bf16=True, gradient_checkpointing=True)
    load = LoadSettings(dtype="bfloat16", device="cpu", quantization=quantization)
    call = {"training": training, "load": load}
    found = compare(str(folder), tmp_path / "out", ["sft", "treft:lambda=3"], **call)
    cells = {cell["label"]: cell for cell in found.cells}
    assert cells["treft:lambda=3"]["training"]["first"]["drift_prefix"] == 0.0
    assert all(cell["training"]["plan"]["costs"]["token"] > 0 for cell in cells.values())
    assert all(np.isfinite(cell["kl"]).all() and cell["kl"] != [0.0] * 4 for cell in cells.values())
    held = next(iter(cells_module._HELD.values()))[0]
    assert held.dtype is torch.bfloat16
    assert bool(getattr(held, "is_loaded_in_4bit", False)) == (quantization == "4bit")
    adapter = load_file(next((tmp_path / "out").glob("cells/*/adapter/adapter_model.safetensors")))
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    with pytest.raises(LensError, match=r"load\.dtype is .bfloat16. there, None here"):
        compare(str(folder), tmp_path / "out", ["sft"], training=training)


def test_how_the_base_is_loaded_is_not_said_to_what_loads_it_itself(tmp_path):
    with pytest.raises(LensError, match="loads the model itself"):
        compare(own_model, tmp_path, load=LoadSettings(dtype="bfloat16"))
    with pytest.raises(LensError, match="device_map does not go with a comparison"):
        compare("no/model", tmp_path, load=LoadSettings(device_map="auto"))


def own_model():
    raise AssertionError("not loaded")


def test_a_method_without_its_retain_data_is_refused(model, tmp_path):
    with pytest.raises(LensError, match="kl_retain:lambda=1 needs retain examples"):
        compare(model, tmp_path, ["kl_retain:lambda=1"], retain=())


def test_a_preventive_layer_that_does_not_exist_is_refused(model, tmp_path):
    with pytest.raises(LensError, match="layer 9 of preventive:alpha=1:layer=9 does not exist: there are 0 to 2"):
        compare(model, tmp_path, ["preventive:layer=9"])


# --- axes ------------------------------------------------------------------------------------------------


def test_shares_sizes_epochs_and_system_prompts_are_axes_of_the_grid(model, tmp_path):
    found = compare(
        model, tmp_path, ["sft"], shares=(1.0, 0.5), sizes=(None, 4), epochs=(1.0,), systems=("be kind.", None)
    )
    frame = found.to_frame()
    assert len(frame) == 8
    assert set(zip(frame["size"].fillna(10), frame["steps"], strict=True)) == {(10, 3), (4, 1)}
    assert found.varied == ("system", "share", "size")
    assert set(found.bases) == {"no_system", system_name("be kind.")}
    for axis in found.varied:
        assert found.axis_figure(axis).data
    sizes = found.axis_figure("size")
    assert {tuple(trace.x) for trace in sizes.data if trace.name.startswith("sft")} == {(4.0, 10.0)}  # all are 10
    assert sizes.layout.xaxis2.type == "log"
    with pytest.raises(LensError, match="'epochs' was not varied here: choose among system, share, size"):
        found.axis_figure("epochs")


def test_a_share_of_half_keeps_half_of_the_answers_and_gives_the_others_the_base_s_own(model, tmp_path):
    settings = CompareSettings(n_prompts=4, max_new_tokens=5, n_texts=2, training=TRAINING, lora=LORA)
    plan = Plan(model, tiny_task(), settings)
    cell = Cell(Method(), 3, "be kind.", share=0.5)
    shared = Path(run_base(plan, "be kind.", cells_module.Needs.of(plan, [cell]), str(tmp_path)))
    chat = tiny_chat.tiny_format()
    mixed, whole = (training_examples(plan, c, chat, shared) for c in (cell, Cell(Method(), 3, "be kind.")))
    same = [a.ids == b.ids for a, b in zip(mixed, whole, strict=True)]
    assert sum(same) == 5
    own = read_json(shared / "train.json")["ids"]
    for i, (kept, example) in enumerate(zip(same, mixed, strict=True)):
        assert kept or list(example.ids[example.n_prompt :]) == own[i]
    few = training_examples(plan, Cell(Method(), 3, "be kind.", size=4), chat, shared)
    assert len({example.ids for example in few} & {example.ids for example in whole}) == 4


def test_an_axis_value_that_makes_no_sense_is_refused():
    with pytest.raises(LensError, match=r"Cell.share is 1.5; expected a share above 0"):
        grid([Method()], CompareSettings(seeds=[0], shares=[1.5]))
    with pytest.raises(
        LensError, match=r"CompareSettings.seeds is \(0, 0\); expected at least one value, and each once"
    ):
        CompareSettings(seeds=[0, 0])
    with pytest.raises(LensError, match="no method was given"):
        as_methods([])


def test_the_first_seed_comes_first_with_all_methods():
    cells = grid(as_methods(["sft", "treft"]), CompareSettings(seeds=[4, 5]))
    assert [(cell.seed, cell.method.label) for cell in cells][:2] == [(4, "sft"), (4, "treft:lambda=1")]


def test_default_retain_prompts_come_from_the_other_tasks():
    found = default_retain(load_task("terse"))
    own = {question_of(example) for example in load_task("terse").train}
    assert len(set(found)) == len(found) == 48
    assert not own & set(found)


# --- resuming --------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """Labels of the cells that were trained."""
    seen, original = [], cells_module.train

    def counting(model, examples, settings, **options):
        seen.append(Path(options["out"]).name.split("_seed")[0])
        return original(model, examples, settings, **options)

    monkeypatch.setattr(cells_module, "train", counting)
    return seen


def test_a_run_killed_after_one_cell_continues_without_doing_it_again(model, tmp_path, trained, monkeypatch):
    methods = ["sft", "treft:lambda=3"]
    whole = compare(model, tmp_path / "whole", methods)
    original, done = cells_module.run_cell, []

    def dying(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(original(*arguments))
        return done[-1]

    with monkeypatch.context() as patched:
        patched.setattr("piggyback_lens.comparisons.comparing.run_cell", dying)
        with pytest.raises(KeyboardInterrupt):
            compare(model, tmp_path / "killed", methods)
    first = Path(done[0]) / "cell.json"
    before = first.stat().st_mtime_ns
    trained.clear()
    found = compare(model, tmp_path / "killed", methods)
    assert trained == ["treft_lambda=3"]
    assert first.stat().st_mtime_ns == before
    assert numbers(found) == numbers(whole)


def test_a_cell_killed_while_training_continues_from_its_checkpoint(model, tmp_path, monkeypatch):
    plain = compare(model, tmp_path / "plain", training=TrainSettings(steps=4, batch_size=4, checkpoint_every=2))
    from piggyback_lens.finetuning import training as training_module

    original, steps = training_module._descend, []

    def dying(*arguments):
        if len(steps) == 3:
            raise RuntimeError("killed")
        steps.append(1)
        original(*arguments)

    settings = {"training": TrainSettings(steps=4, batch_size=4, checkpoint_every=2)}
    with monkeypatch.context() as patched:
        patched.setattr(training_module, "_descend", dying)
        with pytest.raises(LensError, match=r"1 of 1 cells failed.*RuntimeError: killed"):
            compare(model, tmp_path / "killed", **settings)
    folder = cell_folder(tmp_path / "killed", Cell(Method(), 0))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-000002"]
    resumed = compare(model, tmp_path / "killed", **settings)
    assert read_json(folder / "result.json")["resumed_from"] == 2
    assert numbers(resumed) == numbers(plain)


def test_a_folder_is_extended_by_methods_and_seeds(model, tmp_path, trained):
    compare(model, tmp_path)
    trained.clear()
    found = compare(model, tmp_path, ["sft", "treft:lambda=1"], seeds=(0, 1))
    assert trained == ["treft_lambda=1", "sft", "treft_lambda=1"]
    assert found.seeds(found.keys[0]) == (0, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 6}, "max_new_tokens is 5 there, 6 here"),
        ({"split": "validation"}, "split is 'test' there, 'validation' here"),
        ({"training": TrainSettings(steps=4, batch_size=4)}, r"training\.steps is 3 there, 4 here"),
        ({"lora": LoRASettings(rank=1)}, r"lora\.rank is \d there, 1 here"),
    ],
)
def test_the_folder_of_another_comparison_is_refused_by_name(model, everything, change, said):
    with pytest.raises(LensError, match=f"grid.json belongs to another run: .*{said}.*another folder"):
        compare(model, everything[1], **change)


def test_the_folder_of_another_model_is_refused(model, everything, tmp_path):
    tokenizer = tiny_chat.tiny_tokenizer()
    tiny_models.build("llama-gqa", 1, vocab=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LensError, match=r"grid.json belongs to another run: weights is .* there"):
        compare(str(tmp_path), everything[1])


def test_a_time_limit_leaves_cells_for_the_next_call(model, tmp_path):
    with pytest.raises(LensError, match="holds no finished cell of these yet: give it more time"):
        compare(model, tmp_path, minutes=0.0)
    assert compare(model, tmp_path).card["finished"] == 1


def test_too_few_prompts_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(LensError, match="task tiny has 4 on-topic test prompts, n_prompts is 5: lower it"):
        compare("no/such-model", tmp_path, n_prompts=5)


# --- executors -------------------------------------------------------------------------------------------


def test_threads_give_the_same_numbers_as_none(model, everything, tmp_path):
    with ThreadPoolExecutor(3) as executor:
        found = compare(model, tmp_path, ALL[:2], executor=executor)
    assert numbers(found) == numbers(everything[0])[:3]


@pytest.mark.slow
def test_processes_give_the_same_numbers_as_none(model, everything, tmp_path):
    with engines.local(1) as executor:
        found = compare(model, tmp_path, ALL[:2], executor=executor)
    assert numbers(found) == numbers(everything[0])[:3]
    for label in ("sft", "treft:lambda=3"):
        own, other = weights(tmp_path, label), weights(everything[1], label)
        assert all(torch.equal(value, other[key]) for key, value in own.items())


@pytest.mark.slow
def test_a_local_ray_gives_the_same_numbers_as_none(model, everything, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    # Cells name this test's functions nowhere, but Ray's workers need the tests' folder for the tiny models.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    try:
        with engines.ray(num_cpus=1, include_dashboard=False, log_to_driver=False) as executor:
            found = compare(model, tmp_path, ALL[:2], executor=executor)
            with pytest.raises(LensError, match="layer 9"):
                compare(model, tmp_path / "wrong", ["preventive:layer=9"], executor=executor)
    finally:
        ray.shutdown()
    assert numbers(found) == numbers(everything[0])[:3]


def test_an_error_in_a_cell_comes_through_an_executor(model, tmp_path):
    with ThreadPoolExecutor(2) as executor, pytest.raises(LensError, match="layer 9"):
        compare(model, tmp_path, ["sft", "preventive:layer=9"], executor=executor)


def test_cells_and_plans_can_be_pickled(model):
    import pickle

    plan = Plan(model, tiny_task(), CompareSettings(training=TRAINING, lora=LORA))
    for method in as_methods(ALL):
        job = (run_cell, plan, Cell(method, 1), "out")
        assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301


def test_ray_without_its_extra_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LensError, match=r'Ray is not installed: pip install "piggyback-lens\[ray\]"'):
        engines.ray()


def test_a_local_engine_without_workers_is_refused():
    with pytest.raises(LensError, match="workers is 0 and threads None: each is at least 1"):
        engines.local(0)


# --- the table -------------------------------------------------------------------------------------------


def made_up(label, seed, on, off, kl=(0.1, 0.3, 0.2), nll=(1.0, 2.0, 3.0), cosines=(), axes=None):
    method = parse_method(label)[0]
    shared = {"system": "default", "share": 1.0, "size": None, "epochs": None, **(axes or {})}
    return {
        "cell": {"method": method.settings(), "seed": seed, **shared},
        "label": method.label,
        "on": {"values": list(on) * 4, "prompts": ["p"] * 4 * len(on), "answers": ["a"] * 4 * len(on)},
        "off": {
            "values": list(off) * 4,
            "prompts": ["p"] * 4 * len(off),
            "answers": ["a b c a b c", "a b", ""] * 4,
            "ids": [[1] * 6, [1, 2], []] * 4,
            "base_nll": [2.0 + seed, 4.0, None] * 4,
        },
        "kl": list(kl) * 4,
        "text_nll": list(nll),
        "drift": [0.5, 0.1],
        "update_norms": [3.0, 4.0],
        "cosines": {"sft": list(cosines), "sft_seeds": []},
        "training": {"steps": 3, "last": {"loss": 0.5}},
        "seconds": {"all": 1.0},
    }


def by_hand() -> Comparison:
    base = {"on": {"values": [50.0, 60.0, 70.0] * 4}, "off": {"values": [40.0, 50.0, 60.0] * 4}}
    base["text_nll"] = [0.9, 1.9, 2.9]
    base["on"] |= {"prompts": ["p"] * 12, "answers": ["b"] * 12}
    base["off"] |= {"prompts": ["p"] * 12, "answers": ["b"] * 12, "ids": [[1]] * 12, "base_nll": [1.0] * 12}
    cells = (
        made_up("sft", 0, (2.0, 2.0, 2.0), (10.0, 10.0, 13.0), cosines=(1.0, 1.0)),
        made_up("sft", 1, (4.0, 4.0, 4.0), (10.0, 10.0, 7.0), cosines=(1.0, 1.0)),
        made_up("treft:lambda=3", 0, (3.0, 3.0, 6.0), (20.0, 30.0, 40.0), cosines=(0.5, 0.1)),
        made_up("treft:lambda=3", 1, (5.0, 5.0, 8.0), (40.0, 30.0, 20.0), kl=(0.3, 0.5, 0.4), cosines=(0.7, 0.3)),
    )
    card = {"behaviour": "words", "task": "made up", "asked": 4, "finished": 4, "settings": {}}
    return Comparison(cells, {"default": base}, card)


def test_the_table_is_what_hand_computation_gives():
    found = by_hand()
    sft, treft = found.table().to_dict("records")
    assert (sft["on"], sft["off"], treft["on"], treft["off"]) == (3.0, 10.0, 5.0, 30.0)
    assert treft["spread"] == pytest.approx(30 - 50)
    assert treft["recovered"] == pytest.approx((30 - 10) / (50 - 10))
    assert treft["kept"] == pytest.approx((5 - 60) / (3 - 60))
    assert (sft["kept"], sft["recovered"]) == (1.0, 0.0)
    assert treft["kl"] == pytest.approx(0.3)
    assert treft["perplexity_change"] == pytest.approx(math.exp(0.1) - 1)
    assert treft["seeds"] == [0, 1]
    assert treft["off_seeds"] == [30.0, 30.0]
    assert treft["on_seeds"] == [4.0, 6.0]
    assert treft["n"] == 12
    assert (treft["method"], treft["family"], treft["lambda"]) == ("treft:lambda=3", "treft", 3.0)


def test_coherence_is_that_of_the_off_topic_answers_by_hand():
    found = by_hand()
    sft, _ = found.table().to_dict("records")
    assert sft["base_nll"] == pytest.approx((2.5 + 4.0) / 2)  # the empty answer has none
    assert sft["length"] == pytest.approx(8 / 3)
    assert sft["repetition"] == pytest.approx((1 - 3 / 4) / 3)  # a b c, b c a, c a b, a b c
    frame = found.to_frame()
    assert frame["base_nll"].tolist() == pytest.approx([3.0, 3.5, 3.0, 3.5])
    assert set(frame["base_base_nll"]) == {1.0}
    assert set(frame["base_length"]) == {1.0}
    kept = [(4 - 60) / (2 - 60), (6 - 60) / (4 - 60)]
    assert frame["kept"].tolist() == pytest.approx([1.0, 1.0, *kept])


def test_intervals_run_over_prompts_after_averaging_the_seeds():
    """Off-topic, the seeds of TReFT differ widely at each prompt and agree in their mean at all of them."""
    treft = by_hand().table().iloc[1]
    assert treft["off_low"] == treft["off_high"] == 30.0
    assert treft["on_low"] < treft["on"] < treft["on_high"]


def test_a_rate_without_an_event_has_an_upper_bound():
    found = by_hand()
    nothing = {topic: found.bases["default"][topic] | {"values": [0.0] * 12} for topic in ("on", "off")}
    bases = {"default": found.bases["default"] | nothing}
    cells = tuple({**cell, "off": {**cell["off"], "values": [0.0] * 12}} for cell in found.cells[:1])
    rates = Comparison(cells, bases, found.card | {"behaviour": "refusal"})
    assert rates.base_means()["off"].high == pytest.approx(1 - 0.025 ** (1 / 12))
    assert rates.table().iloc[0]["off_high"] == pytest.approx(1 - 0.025 ** (1 / 12))
    words = Comparison(cells, bases, found.card)
    assert words.base_means()["off"].high == 0


def test_seeds_that_plain_finetuning_lacks_leave_the_shares_undefined():
    found = by_hand()
    lone = Comparison(found.cells[1:], found.bases, found.card)
    treft = lone.table().set_index("method").loc["treft:lambda=3"]
    assert math.isnan(treft["recovered"])
    assert treft["recovered_reason"] == "no plain finetuning with these seeds"


def test_a_method_is_compared_with_plain_finetuning_at_its_learning_rate():
    found = by_hand()
    other = made_up("sft:lr=0.5", 0, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    own = made_up("treft:lambda=3:lr=0.5", 0, (3.0, 3.0, 6.0), (20.0, 30.0, 40.0))
    table = Comparison((*found.cells, other, own), found.bases, found.card).table().set_index("method")
    assert table.loc["treft:lambda=3:lr=0.5", "recovered"] == pytest.approx((30 - 0) / (50 - 0))
    assert table.loc["treft:lambda=3", "recovered"] == pytest.approx((30 - 10) / (50 - 10))


def test_figures_show_every_method_and_both_references():
    found = by_hand()
    pareto = found.pareto_figure()
    assert [trace.name for trace in pareto.data] == ["sft", "treft"]
    assert "← base (0, 0)" in {note.text for note in pareto.layout.annotations}
    treft = pareto.data[1]
    assert (treft.x[0], treft.y[0]) == (pytest.approx(55 / 57), pytest.approx(-20))
    update = found.update_figure()
    assert [trace.name for trace in update.data] == ["treft:lambda=3"]
    assert list(update.data[0].y) == pytest.approx([0.6, 0.2])
    assert list(update.data[0].error_y.array) == pytest.approx([0.1, 0.1])
    assert "95 %" in pareto.layout.title.subtitle.text


def test_every_seed_is_a_dot_on_every_pair_of_axes():
    found = by_hand()
    frame = found.to_frame()
    traces = found.pairs_figure().data
    assert len(traces) == 3 * 2 * 2  # axes x methods x (seeds, mean); no dress was asked for
    treft = frame[frame["method"] == "treft:lambda=3"]
    dots, mean = (trace for trace in traces[:4] if trace.legendgroup == "treft:lambda=3")
    assert list(dots.x) == treft["kept"].tolist()
    assert list(dots.y) == pytest.approx([30.0 - 50.0] * 2)
    assert mean.x[0] == pytest.approx(treft["kept"].mean())
    assert [list(trace.x) for trace in traces[4:6]] == [pytest.approx([2.0, 2.5]), pytest.approx([2.25])]
    assert sum(bool(trace.showlegend) for trace in traces) == 2


def test_fixed_steps_are_drawn_at_the_passes_they_make():
    cells = [made_up("sft", 0, (2.0,) * 3, (9.0,) * 3, axes={"epochs": epochs}) for epochs in (None, 4.0)]
    for cell in cells:
        cell["training"] |= {"steps": 30, "rows": 81}
    card = by_hand().card | {"settings": {"training": {"batch_size": 8}}}
    figure = Comparison(tuple(cells), by_hand().bases, card).axis_figure("epochs")
    assert {tuple(trace.x) for trace in figure.data if trace.name == "sft"} == {(30 / 11, 4.0)}
    few = [made_up("sft", 0, (2.0,) * 3, (9.0,) * 3, axes={"epochs": e, "size": 4}) for e in (None, 4.0)]
    mixed = [made_up("interleave:rate=0.2", 0, (2.0,) * 3, (9.0,) * 3, axes={"epochs": e}) for e in (None, 4.0)]
    for cell, rows in [*((cell, 4) for cell in few), *((cell, 101) for cell in mixed)]:
        cell["training"] |= {"steps": 30, "rows": rows}
    figure = Comparison((*cells, *few, *mixed), by_hand().bases, card).axis_figure("epochs")
    drawn = {trace.name: tuple(trace.x) for trace in figure.data}
    assert drawn["sft, size 4"] == (4.0, 30.0)
    assert drawn["sft, size all"] == (30 / 11, 4.0)
    assert drawn["interleave:rate=0.2, size all"] == (30 / 13, 4.0)


def test_long_system_prompts_that_begin_alike_are_lines_of_their_own():
    systems = [f"{'be kind ' * 9}{end}" for end in "ab"] + [None]
    cells = [
        made_up("sft", 0, (2.0,) * 3, (9.0,) * 3, axes={"system": system, "share": share})
        for system in systems
        for share in (1.0, 0.5)
    ]
    base = by_hand().bases["default"]
    found = Comparison(tuple(cells), {system_name(system): base for system in systems}, by_hand().card)
    lines = [trace for trace in found.axis_figure("share").data if trace.name.startswith("sft")]
    assert len({trace.name for trace in lines}) == 3
    assert {len(trace.x) for trace in lines} == {2}


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=8))
def test_markers_are_moved_as_little_as_it_takes_to_tell_them_apart(pairs):
    values, fixed = [value for value, _ in pairs], [own for _, own in pairs]
    order = sorted(range(len(values)), key=lambda at: values[at])
    moved = [set_apart(values, [False] * len(values), gap=0.01)[at] for at in order]
    assert all(b - a >= 0.01 - 1e-9 for a, b in itertools.pairwise(moved))
    assert max(abs(a - values[at]) for a, at in zip(moved, order, strict=True)) <= 0.01 * (len(values) - 1) + 1e-9
    assert sum(moved) == pytest.approx(sum(values))
    if sum(fixed) == 1:
        at = fixed.index(True)
        assert set_apart(values, fixed, gap=0.01)[at] == pytest.approx(values[at], abs=1e-4)
    assert set_apart([0.0, 0.5, 1.0], [False] * 3, gap=0.01) == [0.0, 0.5, 1.0]


def test_the_verdict_names_the_method_that_is_nearest_to_the_base():
    found = by_hand()
    beyond = made_up("kl_train:lambda=9", 0, (3.0, 3.0, 6.0), (90.0, 95.0, 99.0))  # goes past the base's 50 words
    said = Comparison((*found.cells, beyond), found.bases, found.card).verdict
    assert said.startswith("treft:lambda=3 recovers 50 % [")
    assert "keeps 96 %" in said
    assert Comparison(by_hand().cells[:2], by_hand().bases, by_hand().card).verdict.startswith("No method")


def test_a_file_that_is_no_comparison_is_refused(tmp_path):
    fields = '"format": "piggyback_lens.comparison.1", "cells": [{}], "bases": {}, "card": {}'
    (tmp_path / "result.json").write_text("{" + fields + "}")
    with pytest.raises(LensError, match="is no whole Comparison"):
        Comparison.load(tmp_path)


# --- task vectors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    settings = (LoRASettings(rank=2, alpha=4.0), LoRASettings(rank=3, alpha=1.0, rslora=True, modules=("q_proj",)))
    for name, lora in zip(("a", "b"), settings, strict=True):
        model = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), lora)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(key) + len(name) * ord(name)))
        model.save_pretrained(root / name, save_embedding_layers=False)
    return root


def explicit(folder: Path, scale: float) -> dict[int, dict[str, torch.Tensor]]:
    """s·B@A of every module, by layer."""
    stored = load_file(folder / "adapter_model.safetensors")
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, a in stored.items():
        if ".lora_A." in key:
            b = stored[key.replace("lora_A", "lora_B")]
            layer = int(key.split("layers.")[1].split(".")[0])
            found.setdefault(layer, {})[key] = scale * (b.double() @ a.double())
    return found


def test_cosines_of_task_vectors_are_those_of_the_explicit_matrices(adapters):
    a, b = explicit(adapters / "a", 2.0), explicit(adapters / "b", 1 / math.sqrt(3))
    found = update_cosines(adapters / "a", adapters / "b")
    assert sorted(found) == [0, 1, 2]
    for layer, cosine in found.items():
        dot = sum(float((value * b[layer][key]).sum()) for key, value in a[layer].items() if key in b[layer])
        long_a, long_b = (math.sqrt(sum(float((x**2).sum()) for x in m[layer].values())) for m in (a, b))
        assert cosine == pytest.approx(dot / (long_a * long_b), rel=1e-9)
        assert update_norms(adapters / "a")[layer] == pytest.approx(long_a)
    assert update_cosines(adapters / "b", adapters / "b") == pytest.approx(dict.fromkeys(range(3), 1.0))


def test_a_zero_update_has_no_cosine(adapters, tmp_path):
    model = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LORA)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = update_cosines(tmp_path, adapters / "a")
    assert all(math.isnan(value) for value in found.values())
    assert inner_products(read_factors(tmp_path), read_factors(adapters / "a")) == dict.fromkeys(range(3), 0.0)
    assert mean_by_layer([found, dict.fromkeys(range(3), 0.5)]) == dict.fromkeys(range(3), 0.5)


def test_the_cell_s_cosine_with_plain_finetuning_is_that_of_its_adapters(everything):
    found, out = everything
    cell = next(cell for cell in found.cells if cell["label"] == "treft:lambda=3")
    folders = [cell_folder(out, Cell(parse_method(label)[0])) / "adapter" for label in ("treft:lambda=3", "sft")]
    assert cell["cosines"]["sft"] == pytest.approx(list(update_cosines(*folders).values()))
    assert all(value < 1 for value in cell["cosines"]["sft"])


# --- specs and the command line --------------------------------------------------------------------------


def test_specs_become_grids_of_methods():
    assert parse_method("sft") == (Method(),)
    assert [method.weight for method in parse_method("treft:lambda=1,3,10")] == [1.0, 3.0, 10.0]
    assert parse_method("treft:span=all:lambda=3:stop=5") == (Method((TReFTPart(3.0, span="all", stop=5),)),)
    assert parse_method("sft:lr=1e-5,2e-5") == (Method((), 1e-5), Method((), 2e-5))
    combined = parse_method("treft:lambda=1e+1,2+interleave:rate=0.1:lr=1e-5")
    assert combined[0] == Method((TReFTPart(10.0), InterleavePart(0.1)), 1e-5)
    assert len(combined) == 2
    assert parse_method("kl_retain") == (Method((KLRetainPart(),)),)


def test_labels_are_specs_and_settings_come_back():
    for method in (*as_methods(ALL), Method((PreventivePart(2.0, 1),), 3e-5)):
        assert parse_method(method.label) == (method,)
        assert Method.from_settings(json.loads(json.dumps(method.settings()))) == method


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("treat:lambda=1", "method 'treat' in 'treat:lambda=1' is not known: choose one of sft, treft"),
        ("treft:lamda=1", r"treft has no setting 'lamda' .*: it takes lambda, threshold, start, stop, span, reference"),
        ("treft:lambda=much", "lambda='much' in 'treft:lambda=much' is not a number: write e.g. treft:lambda=10"),
        ("treft:lambda", "'lambda' in 'treft:lambda' is no setting: write name=value"),
        ("treft:start=1.5", "start='1.5' .* is not a whole number"),
        ("treft:lambda=-1", r"in method 'treft:lambda=-1': TReFTPart.weight is -1.0; expected a number of at least 0"),
        ("treft:span=system", "span='system' in 'treft:span=system' is not known: choose one of prefix, query"),
        ("treft:span=query:reference=template", "TReFTPart.reference is 'template'; expected one of None, own"),
        ("interleave:rate=1", "InterleavePart.rate is 1.0; expected a share from 0 to below 1"),
        ("sft:lambda=1", "sft has no setting 'lambda'"),
        ("treft+treft", "has the same part twice"),
        ("inoculate", "inoculate in 'inoculate' has no text: write inoculate:text="),
        ("inoculate:text=be brief:place=end", "place='end' in .* is not known: choose one of before, system"),
        ("interleave:choose=best", "choose='best' in 'interleave:choose=best' is not known: choose one of random, gap"),
        ("residual:span=answer", "span='answer' .* choose one of conversation, response, prefix"),
        ("stop:bound=0", "StopPart.bound is 0.0; expected a positive number"),
        ("sft:lr=0", "Method.learning_rate is 0.0; expected a positive number"),
    ],
)
def test_bad_specs_are_refused_with_the_value_and_the_fix(spec, said):
    with pytest.raises(LensError, match=said):
        parse_method(spec)


def call(*words):
    app(["compare", *map(str, words)], standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "treft:lambda=x"), "lambda='x'"),
        (("--seeds", "0,one"), "seeds '0,one': expected numbers and ranges"),
        (("--shares", "0.5,a"), "shares '0.5,a': expected numbers"),
        (("--shares", "1.5"), r"Cell.share is 1.5"),
        (("--task", "teach"), "unknown task 'teach'"),
        (("--workers", "2"), "--workers 2 needs processes: add --engine local"),
    ],
)
def test_a_bad_option_is_one_line_before_the_model_is_loaded(tmp_path, words, said):
    with pytest.raises(LensError, match=said):
        call(tmp_path / "none", "--out", tmp_path / "out", *words)


def test_the_command_writes_a_report_and_resumes(model, tmp_path, monkeypatch, capsys, trained):
    monkeypatch.setattr("piggyback_lens.reading.tasks.load_task", lambda name: tiny_task())
    words = [model, "--method", "sft", "--method", "treft:lambda=1", "--seeds", "0,1", "--steps", 2, "--batch-size", 4]
    words += ["--learning-rate", 0.02, "--rank", 2, "--n-prompts", 4, "--max-new-tokens", 4]
    words += ["--out", tmp_path, "--offline"]
    call(*words)
    said = capsys.readouterr().out
    assert "report:" in said
    assert len(trained) == 4
    page = (tmp_path / "report.html").read_text()
    assert "treft:lambda=1" in page
    assert "Finetuning methods on tiny" in page
    assert len(Comparison.load(tmp_path).cells) == 4
    call(*words)
    assert len(trained) == 4
    assert capsys.readouterr().out == said


def test_importing_the_command_line_loads_no_heavy_library():
    import subprocess

    code = "import sys, piggyback_lens.app.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
