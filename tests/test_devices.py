"""Every public experiment on a model that is not on the CPU: no tensor is left behind, the numbers are the same."""

import copy
import functools
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny_hooked
import tiny_pairs
import torch
from other_device import DEVICE, TRAFFIC, is_there, other_device
from test_comparing import tiny_task
from tiny_chat import tiny_examples
from tiny_pairs import LEVEL
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainingArguments

import piggyback_lens as lens
from piggyback_lens.directions import steering
from piggyback_lens.directions.transfer import Organism
from piggyback_lens.finetuning.hf_trainer import training_rows
from piggyback_lens.finetuning.trainables import PeftAdapter
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.models.network import forward
from piggyback_lens.vectors.adapter_files import load_gguf, load_npy, load_peft, load_pt, save_with_bias
from piggyback_lens.vectors.direction import Provenance

pytestmark = pytest.mark.usefixtures("unchecked")  # type checks read many attributes, each through the mode

CPU = torch.device("cpu")
CHAT = tiny_hooked.chat()
PROMPTS = tiny_hooked.prompts(LEVEL)
EXAMPLES = tiny_examples(6, seed=3, longest=6)
STEPS = lens.TrainSettings(steps=2, batch_size=3, learning_rate=1e-2)


@dataclass(frozen=True)
class Here:
    """Where an experiment runs, and on what."""

    device: torch.device
    backend: str
    folder: Path

    def plain(self, side: str = "base") -> Any:
        return tiny_pairs.weights("llama-gqa", side).to(self.device)

    @property
    def pair(self) -> lens.ModelPair:
        return hooked_pair(self.device, self.backend)

    @property
    def model(self) -> Any:
        with self.pair.using("finetuned") as model:
            return model


@functools.cache
def hooked_pair(device: torch.device, backend: str) -> lens.ModelPair:
    sides = (tiny_pairs.weights("llama-gqa", side).to(device) for side in ("base", "finetuned"))
    return lens.ModelPair.load(*sides, tokenizer=CHAT.tokenizer, backend=backend)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def direction(device: torch.device = CPU) -> lens.Direction:
    return lens.Direction(normal(1, 32).to(device), (1,), "resid_post", "positive: test", Provenance("test"))


def solutions(device: torch.device = CPU) -> dict[str, Any]:
    """From a file they are on the CPU, made of activations where the model is."""
    places = [(layer, "down") for layer in (1, 2)]
    a, b = ({place: normal(*size).to(device) * 0.3 for place in places} for size in ((1, 48), (32, 1)))
    return {"vector": lens.Direction.of({1: normal(32).to(device)}), "lora": lens.LoRAAdapter(a, b, 2.0)}


def texts() -> list[Any]:
    return lens.text_windows(CHAT.tokenizer, n=2, length=12)


def probes() -> tuple[list[Any], list[Any]]:
    prompts = tiny_hooked.prompts(("what", "how so", "so"))
    return tuple([prompt.with_response(text) for prompt in prompts] for text in ("oink", "a word"))  # type: ignore[return-value]


def killed_at_2(row: Any) -> None:
    if row["step"] == 2:
        raise KeyboardInterrupt


# ---------------------------------------------------------------- experiments on hooked models


def generating(here: Here) -> Any:
    answers = lens.generate(here.model, PROMPTS, max_new_tokens=4)
    sampled = lens.generate(here.model, PROMPTS, max_new_tokens=4, sampling=lens.Sampling(temperature=1.0, top_k=5))
    return [answer.text for answer in (*answers, *sampled)]


def intervening(here: Here) -> Any:
    donor = lens.prefix_activations(here.pair, "base", PROMPTS[0], ("k", "v"))
    own = lens.span_activations(here.pair, "base", PROMPTS, "query", "resid_post")
    vector = {"layers": 1, "site": "resid_post"}
    batch = lens.batch_prompts(PROMPTS)
    assert lens.batch_prompts(PROMPTS, device=here.device).span_mask("query").sum() == sum(own.lengths)
    norms = lens.mean_norms(here.model, batch)
    every = [
        lens.patch(donor),
        lens.patch(own.to(here.device)),
        lens.mean_ablate(own),
        lens.resample(own, seed=1),
        lens.add(normal(32), fraction=0.5, norms=norms, **vector),
        lens.add(normal(32).to(here.device), heads=None, **vector),
        lens.ablate(normal(32)),
        lens.clamp(normal(32), 2.0, **vector),
        lens.zero("z", heads=[1], layers=[0, 2]),
        lens.kv_patch(here.pair, "prefix", chat=CHAT),
        lens.cut_attention("query", "prefix", heads=[1, 2]) + lens.cut_attention("all", "system", scale=0.5),
    ]
    logits, changes = [], []
    for interventions in every:
        together = lens.cache("resid_post", layers=2) + interventions + lens.cache("z", layers=2, device=None)
        with torch.no_grad(), lens.applied(here.model, batch, together) as record:
            ids, mask = batch.ids.to(here.device), batch.attention_mask.to(here.device)
            logits.append(forward(here.model, ids, mask)[:, -1].flatten())
        assert {is_there(value) for value in record.activations.values.values()} == {False, here.device == DEVICE}
        changes += [receipt.change_norm for receipt in record.receipts]
        lens.generate(here.model, PROMPTS, interventions=interventions, max_new_tokens=2)
    return np.append(torch.cat(logits).cpu().numpy(), changes)


def prefix_cache(here: Here) -> Any:
    patch = lens.patch(lens.prefix_activations(here.pair, "base", PROMPTS[0], "resid_post", layers=[1]))
    cache = lens.PrefixCache.compile(here.pair, PROMPTS[0], patch)
    cache.save(here.folder)
    found = []
    for one in (cache, lens.PrefixCache.load(here.folder, model=here.model)):
        found += [answer.text for answer in lens.generate(here.model, PROMPTS, prefix_cache=one, max_new_tokens=4)]
    plain = here.plain("finetuned")
    out = plain.generate(**one.hf_inputs(PROMPTS, device=here.device), max_new_tokens=3, do_sample=False)
    return [*found, str(out.tolist())]


def scoring(here: Here) -> Any:
    measure = tiny_pairs.contrast(PROMPTS)
    with here.pair.using("base") as base:
        cache = lens.PrefixCache.compile(base, PROMPTS[0])
    found = [
        *lens.response_log_probs(here.model, EXAMPLES, batch_size=4),
        lens.nll(here.model, EXAMPLES, prefix_cache=cache),
        lens.contrast(here.model, measure.towards, measure.against, interventions=direction().steer(2.0)),
        *lens.kl_to_base(here.pair, EXAMPLES),
    ]
    return torch.cat([values.flatten() for values in found]).numpy()


def adapters(here: Here) -> Any:
    found = []
    for device in (CPU, here.device):
        own = solutions(device)
        with lens.attached(here.model, *own.values()):
            found.append(lens.nll(here.model, EXAMPLES))
            assert len(lens.generate(here.model, PROMPTS, max_new_tokens=3)) == len(PROMPTS)
        found += [values.flatten() for values in lens.adapter_scalars(here.model, own["lora"], EXAMPLES).values]
    return torch.cat(found).numpy()


def patching(here: Here) -> Any:
    run = {"measure": tiny_pairs.contrast(PROMPTS)}
    empty = lens.PatchSettings(postfix_donor="empty_query", chat=CHAT)
    found = [
        lens.layer_curve(here.pair, PROMPTS, layers=[0, 2], control_layers=1, **run),
        lens.layer_position_map(here.pair, PROMPTS, layers=[1], tokens=[0, 5], control_cells=1, **run),
        lens.layer_head_map(here.pair, PROMPTS, layers=[1], heads=[0, 3], control_cells=1, **run),
        lens.patch_span(here.pair, PROMPTS, "postfix", **run),
        lens.patch_span(here.pair, PROMPTS, "postfix", settings=empty, **run),
        lens.patch_span(here.pair, PROMPTS, "query", "resid_post", controls=False, flow="infect", **run),
        lens.carrier_map(here.pair, PROMPTS, spans=("prefix", "query"), bands=1, **run),
    ]
    return np.concatenate([np.array(result.values) for result in found])


def patching_generated_behaviour(here: Here) -> Any:
    measure = lens.GeneratedBehaviour(lens.get_behaviour("words"), max_new_tokens=3)
    return np.array(lens.layer_curve(here.pair, PROMPTS, layers=[0, 2], control_layers=1, measure=measure).values)


def attributing(here: Here) -> Any:
    run = {"measure": tiny_pairs.contrast(PROMPTS), "check_cells": 2, "top_cells": 1}
    found = [
        lens.attribution_map(here.pair, PROMPTS, **run),
        lens.attribution_map(here.pair, PROMPTS, by="head", sites="z", steps=2, **run),
        lens.edge_map(here.pair, PROMPTS, edges=[("response", "prefix")], exact_cells=1, measure=run["measure"]),
    ]
    return np.concatenate([np.array(part.values) for result in found for part in (result.attributed, result.exact)])


def patching_softly(here: Here) -> Any:
    settings = lens.SoftPatchSettings(bands=1, steps=2, held_out=len(PROMPTS))
    found = lens.soft_patch(here.pair, PROMPTS, settings, measure=tiny_pairs.contrast(PROMPTS))
    return np.concatenate([np.ravel(found.coefficients), *found.kl.values()])


def perturbing(here: Here) -> Any:
    settings = lens.PerturbSettings(n_tokens=2, top=2, trials=1, max_new_tokens=3)
    return [row["text"] for row in lens.perturb(here.pair, PROMPTS, "words", settings).rows]


def stressing(here: Here) -> Any:
    settings = lens.StressSettings(max_new_tokens=2)
    return [row["text"] for row in lens.stress(here.pair, PROMPTS[:1], "words", settings, chat=CHAT).rows]


def auditing(here: Here) -> Any:
    settings = lens.AuditSettings(max_new_tokens=3, curve_prompts=4, curve_tokens=3, control_layers=1)
    run = {"chat": CHAT, "settings": settings, "out": here.folder}
    result = lens.audit(here.pair, ["one", "two", "or"], ["three", "four", "five", "six"], "words", **run)
    return [row["response"] for row in result.rows]


def extracting(here: Here) -> Any:
    measured = [
        lens.mean_difference(here.model, EXAMPLES[:3], EXAMPLES[3:], lens.ReadSettings(last=2)),
        lens.model_difference(here.pair, EXAMPLES),
        lens.contrast_pairs(here.model, list(zip(EXAMPLES[:3], EXAMPLES[3:], strict=True))),
    ]
    own = [*(one.direction for one in measured[:2]), measured[2].mean, measured[2].component]
    assert not any(is_there(one.vectors) for one in own)
    component, _ = lens.principal_component(normal(4, 32).to(here.device))
    probe = lens.logistic_probe(normal(10, 2).to(here.device), (torch.arange(10) % 2).to(here.device), folds=2)
    tokens = lens.logit_lens(here.model, own[0].at(1), CHAT.tokenizer, top=3)
    numbers = [*(one.vectors.flatten().numpy() for one in own), component.cpu(), probe.weights]
    return np.concatenate([*numbers, [token.score for token in tokens]])


def writing(here: Here) -> Any:
    """Files hold what is on the device, and are read to the CPU."""
    vector, table = solutions(here.device)["vector"], normal(1, 32).to(here.device)
    vector.save(here.folder / "d.safetensors")
    np.save(here.folder / "v.npy", table.cpu().numpy())
    torch.save({"steering_vector": table[0], "layer_idx": 1, "alpha": 2.0}, here.folder / "v.pt")
    gguf = lens.save_solution(vector, here.folder / "v.gguf", model_hint="llama", n_layers=3)
    read = [load_gguf(gguf), load_npy(here.folder / "v.npy", layers=1), load_pt(here.folder / "v.pt")]
    read += [lens.load_solution(gguf), lens.load_solution(f"{here.folder / 'v.npy'}@1")]
    assert not any(is_there(one[1]) for one in read)
    found = [one[1] for one in read]
    return torch.cat([*found, lens.Direction.load(here.folder / "d.safetensors").vectors[0]]).numpy()


def steering_(here: Here) -> Any:
    few = lens.SteerSettings(n_random=1, batch_size=2, max_new_tokens=3)
    two = replace(few, fractions=[0.0, 0.5], layers=[0, 2])
    found = lens.steer(here.model, direction(here.device), PROMPTS, "words", two)
    taken = lens.ablate_sweep(here.model, direction(), PROMPTS, "words", few)
    budget = lens.strength_for_kl(here.model, direction(), EXAMPLES, 0.05)
    numbers = [(p.x, *p.kl, *p.own_nll) for p in (*found.points, *taken.points)]
    return np.append(np.array(numbers), [budget.strength])


def curves(here: Here) -> Any:
    two = lens.CurveSettings(fractions=(0.0, 1.0), n_random=1)
    found = [
        lens.efficiency(here.model, solutions(here.device), EXAMPLES, two),
        lens.stability(here.model, solutions(), EXAMPLES, lens.CurveSettings(epsilons=(0.0, 0.5), n_noise=1)),
        lens.significance(here.model, solutions(), texts(), two),
        lens.ablation_cost(here.model, {"one": direction()}, texts(), lens.CurveSettings(n_random=1)),
    ]
    return np.concatenate([curve.to_frame()["value"].to_numpy() for curve in found])


def transferring(here: Here) -> Any:
    organisms = {"A": Organism(here.pair, direction(), lens.get_behaviour("words"))}
    found = lens.transfer_matrix(organisms, PROMPTS, n_random=1, settings=lens.AnswerSettings(max_new_tokens=3))
    return np.array([cell.values for cell in found.cells])


def training_hooks(here: Here) -> Any:
    found = []
    retain = lens.RetainData(EXAMPLES[3:], batch_size=2)
    objective = lens.Penalised((lens.Weighted(lens.KLOnRetain(retain), 1.0),))
    for start in (lens.Direction.zeros(32, [1]), solutions(here.device)["lora"]):
        trainable = lens.HookTrainable(here.model, start)
        keeper = lens.SnapshotKeeper(trainable)
        run = {"on_step": keeper, "progress": False, "out": here.folder / type(start).__name__}
        lens.train(trainable, EXAMPLES[:3], STEPS, objective=objective, **run)
        assert not any(is_there(tensor) for tensor in trainable.result().tensors().values())
        moved = lens.snapshot_cosines(keeper.snapshots, {"end": trainable.result()})
        found += [trainable.result().norm(), *moved.frame["value"], *lens.trajectory({"r": keeper.snapshots}).explained]
    return np.array(found)


def direction_jobs(here: Here) -> Any:
    """What the command line does with directions, in folders."""
    settings = lens.TrainDirectionSettings(
        layers=(1,), kl=1.0, retain_batch=2, answer_tokens=3, shown=1, steps=2, batch_size=3, learning_rate=1e-2
    )
    run = {"retain": EXAMPLES[4:], "out": here.folder / "train", "progress": False}
    done = lens.train_direction(here.model, EXAMPLES[:4], settings, **run)
    own = lens.SteerSettings(strengths=(1.0,), n_random=1, max_new_tokens=3)
    swept = lens.steer(here.model, done.solution, PROMPTS, "words", own, out=here.folder / "steer")
    scores = done.to_frame()[["base_loss", "loss", "value"]].to_numpy()
    return np.concatenate([scores.ravel(), *(p.kl for p in swept.points)])


def sparse_autoencoders(here: Here) -> Any:
    pytest.importorskip("sae_lens", reason="the extra sae is not installed")
    settings = lens.saes.SAESettings(d_sae=16, k=4, steps=3, batch_size=16)
    trained = lens.saes.train_sae(here.model, EXAMPLES, settings, layer=1, out=here.folder / "sae")
    latents = lens.saes.load_sae(here.folder / "sae", model=here.model)
    assert latents.sae.W_dec.device == here.device
    found = [trained.losses]
    for own in (latents, replace(latents, sae=copy.deepcopy(latents.sae).to("cpu"))):
        found.append(lens.saes.fit_latents(own, here.pair, EXAMPLES).to_frame()["value"])
        attributed = lens.saes.attribute_latents(own, direction(), here.model, EXAMPLES, n_random=2)
        found += [attributed.cosine, attributed.change]
        steered = lens.generate(
            here.model, PROMPTS, interventions=lens.saes.steer_latent(own, 3, 2.0), max_new_tokens=3
        )
        assert len(steered) == len(PROMPTS)
        with lens.saes.ablate_latent(own, here.model, [0, 1, 2]):
            found.append(lens.nll(here.model, EXAMPLES))
    return np.concatenate(found)


HOOKED = (
    generating, intervening, prefix_cache, scoring, adapters, patching, patching_generated_behaviour, attributing,
    patching_softly,
    perturbing, stressing, auditing, extracting, writing, steering_, curves, transferring, training_hooks,
    direction_jobs, sparse_autoencoders,
)  # fmt: skip

# ---------------------------------------------------------------- loading, and training of plain models


def loading(here: Here) -> Any:
    """From folders, through the device option, with an adapter that both backends see."""
    base, adapter = here.folder / "base", here.folder / "adapter"
    tiny_pairs.weights("llama-gqa", "base").save_pretrained(base)
    CHAT.tokenizer.save_pretrained(base)
    lens.save_solution(solutions()["lora"], adapter)
    found = []
    for backend in tiny_hooked.BACKENDS:
        pair = lens.ModelPair.load(base, adapter=adapter, backend=backend, device=here.device, offline=True)
        assert pair.device == here.device
        found.append(lens.kl_to_base(pair, EXAMPLES[:2]))
    there = lens.LoadSettings(device=here.device, offline=True)
    tuned = lens.attach_adapter(lens.load_causal_lm(base, there), adapter)
    assert {parameter.device for parameter in tuned.parameters()} == {here.device}
    save_with_bias(solutions()["vector"], lens.load_causal_lm(base, there), here.folder / "biased")
    biased = lens.hook_model(lens.load_causal_lm(here.folder / "biased", there), CHAT.tokenizer)
    loaded = load_peft(adapter)
    assert not any(is_there(tensor) for tensor in loaded.tensors().values())
    found.append([lens.nll(biased, EXAMPLES)])
    with loaded.merged(biased):
        found.append([lens.nll(biased, EXAMPLES)])
    return torch.cat([values for part in found for values in part]).numpy()


def read_again(penalty: lens.TReFT) -> lens.TReFT:
    with TemporaryDirectory() as folder:
        reference = PrefixCache.load(penalty.reference.save(folder))
    assert not is_there(reference.keys[0])
    return lens.TReFT(penalty.span, reference)


def objectives() -> dict[str, Any]:
    """Of a model in training, given the base that some of them need."""
    retain = lens.RetainData(EXAMPLES[3:], batch_size=2)
    return {
        "prefix": lambda model: lens.TReFT.on(model, EXAMPLES[0]),
        "postfix as in the template": lambda model: read_again(lens.TReFT.on(model, EXAMPLES[0], "postfix")),
        "prefix from a file": lambda model: read_again(lens.TReFT.on(model, EXAMPLES[0])),
        "postfix": lambda model: lens.TReFT("postfix"),
        "query": lambda model: lens.TReFT("query"),
        "all": lambda model: lens.TReFT("all"),
        "residual": lambda model: lens.ResidualDrift(),
        "kl_train": lambda model: lens.KLOnTrain(),
        "kl_retain": lambda model: lens.KLOnRetain(retain),
    }


def training(here: Here) -> Any:
    losses = []
    for make in objectives().values():
        model = lens.add_lora(here.plain(), lens.LoRASettings(rank=2))
        monitor = lens.Monitor(model, *probes(), every=2, out=here.folder / "monitor.jsonl")
        run = {"on_step": monitor, "progress": False}
        objective = lens.Penalised((lens.Weighted(make(model), 3.0),))
        history = lens.train(model, EXAMPLES[:3], STEPS, objective=objective, **run).history
        losses += [row["loss"] for row in history]
        losses += [monitor.rows[-1]["spread"], monitor.rows[-1]["drift"]]
        (here.folder / "monitor.jsonl").unlink()
    return np.array(losses)


def resuming(here: Here) -> Any:
    model = lens.add_lora(here.plain(), lens.LoRASettings(rank=2))
    examples = lens.interleave(EXAMPLES[:3], EXAMPLES[3:])
    settings = replace(STEPS, steps=4, checkpoint_every=1)
    with suppress(KeyboardInterrupt):
        lens.train(model, examples, settings, out=here.folder, on_step=killed_at_2, progress=False)
    model = lens.add_lora(here.plain(), lens.LoRASettings(rank=2))
    result = lens.train(model, examples, settings, out=here.folder, progress=False)
    assert result.resumed_from
    return np.array([row["loss"] for row in result.history])


def preventing(here: Here) -> Any:
    model = lens.add_lora(here.plain(), lens.LoRASettings(rank=2))
    trainable = lens.PreventiveSteering(PeftAdapter(model), normal(32).to(here.device), layer=1, alpha=2.0)
    result = lens.train(trainable, EXAMPLES[:3], STEPS, progress=False)
    return np.array([row["loss"] for row in result.history])


def gating(here: Here) -> Any:
    model = lens.add_lora(here.plain(), lens.LoRASettings(rank=2))
    trainable = lens.GatedAdapter(model, lens.adapter_off("prefix"))
    losses = [row["loss"] for row in lens.train(trainable, EXAMPLES[:3], STEPS, progress=False).history]
    pair = lens.ModelPair.load(finetuned=model, tokenizer=CHAT.tokenizer)
    with pair.using("finetuned") as hooked:
        rows = [prompt.with_response("yes") for prompt in PROMPTS]
        scored = lens.response_log_probs(hooked, rows, interventions=trainable.off)
    return np.array([*losses, *(float(x) for own in scored for x in own)])


def comparing(here: Here) -> Any:
    def source() -> Any:
        return here.plain(), CHAT.tokenizer

    methods = ["treft:lambda=1+kl_retain:lambda=1", "preventive:alpha=0.5:layer=0"]
    settings = lens.CompareSettings(
        seeds=(0,), training=STEPS, n_prompts=4, max_new_tokens=3, n_texts=2, retain=("one", "two", "three")
    )
    run = {"out": here.folder, "progress": False}
    found = lens.compare_methods(source, tiny_task(), methods, settings, **run)
    return found.to_frame()[["kl", "drift", "update_norm", "loss"]].to_numpy(float)


def trainers(here: Here) -> Any:
    """The Trainer of transformers, told that its device is this one; the first run is resumed by the second."""

    def told(arguments: TrainingArguments) -> torch.device:
        assert arguments._setup_devices is not None  # sets up accelerate, which the Trainer asks as well
        arguments.distributed_state.device = here.device
        return here.device

    retain = lens.KLOnRetain(lens.RetainData(EXAMPLES[3:], batch_size=2))
    prefix = lens.Weighted(lens.TReFT(reference="template"), 10.0)
    rows = (lens.TReFT("query"), lens.TReFT("postfix", "template"), lens.KLOnTrain(), retain)
    rest = tuple(lens.Weighted(penalty, 3.0) for penalty in rows)
    runs = ((1, "prefix", (prefix,)), (2, "prefix", (prefix,)), (2, "rest", rest))
    with mock.patch.object(TrainingArguments, "device", property(told)):
        return np.concatenate([trainer_losses(here, *run) for run in runs])


def trainer_losses(here: Here, steps: int, name: str, parts: tuple[lens.Weighted, ...]) -> list[float]:
    arguments = TrainingArguments(
        str(here.folder / name), max_steps=steps, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="steps", save_steps=1, disable_tqdm=True, remove_unused_columns=False,
        learning_rate=1e-2,
    )  # fmt: skip
    model = lens.add_lora(here.plain(), lens.LoRASettings(rank=2))
    steered = lens.PreventiveSteering(PeftAdapter(model), normal(32).to(here.device), layer=1)
    trainer = lens.PenaltyTrainer(
        model=model if name == "prefix" else steered, args=arguments, train_dataset=training_rows(EXAMPLES),
        data_collator=DataCollatorForSeq2Seq(CHAT.tokenizer),
        objective=lens.Penalised(parts), prompt=CHAT.empty_query(),
    )  # fmt: skip
    monitor = lens.Monitor(model, *probes(), every=1, out=here.folder / f"{name}.jsonl")
    trainer.add_callback(monitor.callback(trainer))
    trainer.train(resume_from_checkpoint=(name, steps) == ("prefix", 2))
    assert next(model.parameters()).device == here.device
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return [*losses, *(row["spread"] for row in monitor.rows)]


def onsets(here: Here) -> Any:
    for step in (1, 2):
        model = lens.add_lora(here.plain(), lens.LoRASettings(rank=2))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.fill_(0.02 * (step - 1))
        model.save_pretrained(here.folder / f"checkpoint-{step}", save_embedding_layers=False)
    settings = lens.OnsetSettings(search="all", answer_tokens=3)
    found = lens.onset(here.plain(), here.folder, PROMPTS, settings)
    return np.concatenate([np.ravel(found.finetuned), np.ravel(found.patched), found.base])


PLAIN = (loading, training, resuming, preventing, gating, comparing, trainers, onsets)


# ---------------------------------------------------------------- the tests

LEFT_OUT = {
    "what experiments return: numbers and text": ("Generation", "Result"),
    "made and used above, but by other names": (
        "Activations", "AnswerContrast", "Behaviour", "ChatFormat", "Intervention", "Interventions",
        "Method", "Objective", "Penalty", "PenaltyMixin", "Record", "RenderedPrompt", "Trainable", "saes.Latents",
    ),
    "text and files: no tensors": (
        "ChatSettings", "Dress", "EMTable", "JudgeSheet", "Task", "dressed", "found_dress", "join_scores",
        "TokenScores", "compare_templates", "default_model",
        "load_conversations", "load_organisms", "load_questions", "Question", "load_result", "load_task",
        "load_tokenizer", "report_run",
    ),
    "calls a server, or scores texts: no tensors": ("Endpoint", "Judge", "judge_run", "rescore", "sample_endpoint"),
    "one forward pass as of nll and generate, which are above": ("LocalJudge",),
    "runs the patching experiments that are above": ("MapSettings",),
    "trains and audits the demo model; its parts (add_lora, train, Monitor, audit) are above": (
        "DemoSettings", "demo",
    ),
}  # fmt: skip


def test_every_public_name_is_run_above_or_left_out_for_a_reason():
    run_here = set(re.findall(r"\blens\.((?:saes\.)?[A-Za-z]\w*)", Path(__file__).read_text()))
    left_out = {name for names in LEFT_OUT.values() for name in names}
    public = {*lens.__all__, *(f"saes.{name}" for name in lens.saes.__all__)}
    assert (run_here - {"saes"}) | left_out == public
    assert not run_here & left_out


def outcome(experiment: Callable[[Here], Any], device: torch.device, backend: str, folder: Path) -> Any:
    folder.mkdir()
    with other_device() if device == DEVICE else nullcontext():
        return experiment(Here(device, backend, folder))


def assert_equal_on_both_devices(experiment: Callable[[Here], Any], backend: str, folder: Path) -> None:
    expected = outcome(experiment, CPU, backend, folder / "cpu")
    found = outcome(experiment, DEVICE, backend, folder / "there")
    if isinstance(expected, list):
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
@pytest.mark.parametrize("experiment", HOOKED, ids=lambda function: function.__name__)
def test_an_experiment_on_hooked_models_keeps_to_their_device(experiment, backend, tmp_path):
    assert_equal_on_both_devices(experiment, backend, tmp_path)
    with other_device():
        assert hooked_pair(DEVICE, backend).device == DEVICE


@pytest.mark.parametrize("experiment", PLAIN, ids=lambda function: function.__name__)
def test_loading_and_training_keep_to_the_device(experiment, tmp_path):
    assert_equal_on_both_devices(experiment, "bridge", tmp_path)


def test_ids_left_on_the_cpu_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr("piggyback_lens.models.network.device_of", lambda _: CPU)
    with pytest.raises((RuntimeError, lens.LensError), match=r"found xpu:0 and cpu.*torch.int64"):
        outcome(generating, DEVICE, "bridge", tmp_path / "there")


def test_norms_for_steering_are_measured_in_batches_of_the_size_asked_and_equal_those_of_one_pass(monkeypatch):
    sizes, mean_norms = [], steering.mean_norms
    monkeypatch.setattr(steering, "mean_norms", lambda m, b, **k: sizes.append(len(b)) or mean_norms(m, b, **k))
    model, prompts = tiny_hooked.hooked("llama-gqa", "bridge"), tiny_hooked.prompts()
    one, many = (steering._norms(model, "resid_post", prompts, size) for size in (3, 2))
    assert sizes == [3, 2, 1]
    assert many == pytest.approx(one, rel=1e-6)
    assert one == pytest.approx(mean_norms(model, lens.batch_prompts(prompts)), rel=1e-12)
    with pytest.raises(lens.LensError, match=r"SteerSettings.batch_size is 0; expected at least 1"):
        lens.SteerSettings(batch_size=0)


# ---------------------------------------------------------------- the other device itself

NUMBERS, INDEX = torch.arange(6.0).reshape(3, 2), torch.tensor([[1, 0], [0, 1], [1, 1]])

REFUSED = {
    "an embedding of ids on the CPU": lambda x: torch.nn.functional.embedding(INDEX, x),
    "a product": lambda x: x @ NUMBERS.T,
    "a sum of two": lambda x: NUMBERS + x,
    "a sum with one number of its own": lambda x: NUMBERS + x.sum(),
    "a result that is written to the CPU": lambda x: NUMBERS.clone().add_(x),
    "gather": lambda x: x.gather(1, INDEX),
    "index_copy": lambda x: x.index_copy(0, INDEX[0], x[:2]),
    "a mask": lambda x: x.masked_fill(NUMBERS > 2, 0.0),
    "where": lambda x: torch.where(NUMBERS > 2, x, 0.0),
    "parts of one": lambda x: torch.cat([x, NUMBERS]),
    "a stack of numbers": lambda x: torch.stack([x.sum(), NUMBERS.sum()]),
    "a comparison": lambda x: torch.equal(x, NUMBERS),
    "an index that is there, into what is here": lambda x: NUMBERS[INDEX.to(DEVICE)[:, 0]],
    "values in brackets": lambda x: x.index_put_((INDEX[0],), NUMBERS[:2]),
    "numbers drawn by a generator of the CPU": lambda x: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    "numbers drawn in place by a generator of the CPU": lambda x: x.normal_(generator=torch.Generator()),
    "NumPy": lambda x: x.numpy(),
    "an array": np.asarray,
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_other_device_refuses_what_a_gpu_refuses(case):
    with other_device():
        there = NUMBERS.to(DEVICE)
        with pytest.raises((RuntimeError, TypeError), match=r"xpu:0"):
            REFUSED[case](there)


def test_the_other_device_takes_what_a_gpu_takes():
    with other_device():
        x = NUMBERS.to(DEVICE)
        assert is_there(x * torch.tensor(2.0))
        assert is_there(x[INDEX[:, 0]])
        assert is_there(x[NUMBERS[:, 0] > 1])
        x[1:] = NUMBERS[1:]
        x[INDEX[0]] = torch.tensor(3.0)
        assert not is_there(NUMBERS.clone().copy_(x))
        assert x.cpu().numpy().tolist() == x.tolist() == [[3.0, 3.0], [3.0, 3.0], [4.0, 5.0]]
        assert float(x.sum()) == 21.0


def test_tensors_are_where_they_were_put():
    with other_device():
        x = NUMBERS.to(DEVICE)
        wide = torch.zeros(2, dtype=torch.float64)
        assert x.device == DEVICE != NUMBERS.device
        for made in (
            NUMBERS.to(str(DEVICE)), NUMBERS.to(DEVICE, torch.float64), NUMBERS.to(device=DEVICE), NUMBERS.to(x),
            x.to(torch.float64), x.to(dtype=torch.float64), x.float(), x[1:], x.T, x.new_zeros(2), x.new_tensor([1.0]),
            torch.zeros_like(x), torch.tensor([1], device=DEVICE), torch.as_tensor(NUMBERS, device=DEVICE),
            copy.deepcopy(x), torch.nn.Linear(2, 2).to(DEVICE).weight,
            torch.nn.Linear(2, 2).to(device=DEVICE).weight, torch.nn.Parameter(x),
            wide.new_zeros(2, device=DEVICE),
        ):  # fmt: skip
            assert made.device == DEVICE
            assert is_there(made + 1)
        for made in (
            x.cpu(), x.to("cpu"), x.to("cpu", torch.float64), x.to(NUMBERS), torch.zeros_like(x, device="cpu"),
            torch.tensor(x.tolist()), x.new_zeros(2, device="cpu"), torch.arange(3),
        ):  # fmt: skip
            assert made.device == CPU
            assert not is_there(made + 1)
        assert (x.to(wide).dtype, x.to(wide).device) == (torch.float64, CPU)
        assert x.to(DEVICE) is x
        assert x.to("cpu").data_ptr() != x.data_ptr()
    assert x.device == CPU


def test_a_gradient_arrives_on_the_device_of_its_leaf():
    leaf = NUMBERS.clone().requires_grad_()
    with other_device():
        loss = (leaf.to(DEVICE) ** 2).sum()
        loss.backward()
        assert is_there(loss)
        assert not is_there(leaf.grad)
    assert torch.equal(leaf.grad, 2 * NUMBERS)


# ---------------------------------------------------------------- weights on the disk


@pytest.mark.parametrize("on_disk", [("model.layers.1", "model.layers.2"), ("model.embed_tokens", "lm_head")])
def test_a_model_with_weights_on_the_disk_is_hooked_right_or_refused_in_one_line(on_disk, tmp_path):
    """accelerate's offload: such weights are on the meta device, and come into memory in the module's own forward."""
    whole = tiny_pairs.weights("llama-gqa", "base")
    whole.save_pretrained(tmp_path)
    modules = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    )
    places = {name: "disk" if name in on_disk else "cpu" for name in modules}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    ids = torch.tensor([PROMPTS[0].ids])
    with torch.no_grad():
        expected = whole(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)
        for backend in tiny_hooked.BACKENDS:
            refused = ""
            try:
                hooked = lens.hook_model(model, CHAT.tokenizer, backend=backend)
            except lens.LensError as error:
                refused = str(error)
            if refused:
                assert len(refused.splitlines()) == 1
            else:
                torch.testing.assert_close(forward(hooked, ids, torch.ones_like(ids)), expected)
        torch.testing.assert_close(model(ids).logits, expected)


# ---------------------------------------------------------------- what a device waits for


@pytest.mark.parametrize("span", ["prefix", "query"])
def test_a_map_asks_nothing_of_the_device_while_its_cells_go_through(span: str) -> None:
    """For a cell its places are sent once, and a donor's rows where it has several; its change is read once."""
    with other_device() as device:
        pair = hooked_pair(device, "bridge")
        measure = tiny_pairs.contrast(PROMPTS)
        found = []
        for layers in ([1], [1, 2]):
            TRAFFIC.clear()
            how = {"layers": layers, "measure": measure, "span": span, "progress": False}
            cells = len(lens.layer_position_map(pair, PROMPTS, **how).cells)
            found.append((cells, TRAFFIC["moved"], TRAFFIC["read"]))
    (few, *before), (many, *after) = found
    assert many > few + 2
    moved, read = ((b - a) / (many - few) for a, b in zip(before, after, strict=True))
    assert moved <= 2.5
    assert read <= 1


def test_answers_under_a_hook_are_read_once_a_token() -> None:
    with other_device() as device:
        model, found = Here(device, "bridge", Path()).model, []
        for tokens in (3, 8):
            TRAFFIC.clear()
            vector = lens.add(normal(32), layers=[0, 1, 2])
            lens.generate(model, PROMPTS, interventions=vector, max_new_tokens=tokens, stop_ids=[], progress=False)
            found.append((TRAFFIC["moved"], TRAFFIC["read"]))
    moved, read = ((b - a) / 5 for a, b in zip(*found, strict=True))
    assert moved <= 6  # the token, its places and positions, and the vector at three layers
    assert read == 0
