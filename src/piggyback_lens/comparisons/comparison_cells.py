"""One cell of a comparison: train a fresh adapter, measure it, write one file. Picklable, for any executor.

What all cells of a system prompt share (the base's answers, retain answers, the preventive direction) is
computed once beforehand by `run_base`. Everything lands in the comparison's folder, so that a process, a
thread or another machine with the same file system can do it.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.card import versions
from piggyback_lens.comparisons.comparison_plan import (
    BASE_FILE,
    CELL_FILE,
    Cell,
    Plan,
    Source,
    base_folder,
    cell_folder,
)
from piggyback_lens.comparisons.hf_cells import Trained, train_by_trainer
from piggyback_lens.comparisons.methods import Ingredients, Method, SetUp, set_up
from piggyback_lens.conversations.batch import questions_of, repeated
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.directions.extraction import mean_difference
from piggyback_lens.engines import ONE_AT_A_TIME
from piggyback_lens.errors import LensError
from piggyback_lens.files import atomic_write_bytes, read_json, write_json
from piggyback_lens.finetuning.checkpoints import PREFIX
from piggyback_lens.finetuning.references import kv_reference, prefix_batch, prefix_drift
from piggyback_lens.finetuning.steps import forward_step
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import TrainResult, train
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.measuring.scoring import kl_to_base, nll
from piggyback_lens.measuring.texts import text_windows
from piggyback_lens.measuring.variants import Text, variant_nll
from piggyback_lens.models.pair import Identity, ModelPair, hook_model, identify
from piggyback_lens.models.peft_adapters import attach_adapter
from piggyback_lens.models.sources import load_causal_lm, load_tokenizer
from piggyback_lens.models.views import evaluating, structural_copy
from piggyback_lens.reading.dresses import require_worn
from piggyback_lens.results.run import InUse, locked
from piggyback_lens.settings import LoadSettings, TrainSettings
from piggyback_lens.vectors.task_vectors import update_norms
from piggyback_lens.words import Side

# --- models ----------------------------------------------------------------------------------------------


PROBES = 8
"""Off-topic validation questions of a spread probe."""
SIDES: tuple[Side, ...] = ("base", "finetuned")
CELL_LOCK = ".cell.lock"
PROBE_LOCK = ".probes.lock"
"""`train` has a lock of its own in a cell's folder."""


_HELD: dict[str, tuple[Any, Any]] = {}
"""The base that this process has loaded; one at a time."""


def _loaded(source: Source, load: LoadSettings) -> tuple[Any, Any]:
    """The base and its tokenizer, of a place or of the user's function."""
    key = repr((source, load))
    if key not in _HELD:
        _HELD.clear()
        _HELD[key] = source() if callable(source) else (load_causal_lm(source, load), load_tokenizer(source, load))
    return _HELD[key]


# --- the base's part -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Which of the base's files the cells of a system prompt read, beside its answers."""

    retain: bool = False
    train_answers: int = 0  # answers to the first so many training questions
    direction: bool = False
    model: bool = False  # that the answers are of this model, as there is a cell to train

    @classmethod
    def of(cls, plan: Plan, cells: Sequence[Cell]) -> "Needs":
        """What these cells need.

        Raises:
            LensError: retain answers, without prompts for them.
        """
        total = len(plan.task.train)
        direction = any(cell.method.has("preventive") for cell in cells)
        answers = total if any(cell.share < 1 for cell in cells) else 0
        answers = max(answers, min(plan.settings.direction_examples, total)) if direction else answers
        needy = [cell.method.label for cell in cells if cell.method.has("kl_retain", "interleave")]
        if needy and not plan.retain:
            raise LensError(f"method {needy[0]} needs retain examples, and there are no prompts for them: pass retain=")
        return cls(bool(needy), answers, direction, bool(cells))


def run_base(plan: Plan, system: str | None, needs: Needs, out: str) -> str:
    """Compute what is missing of the base's part; returns its folder. One file each, written when it is there.

    Raises:
        LensError: the base's answers that are there come from another model, and there is a cell to train.
    """
    folder = base_folder(out, system)
    with locked(folder, name=CELL_LOCK, wait=True), ONE_AT_A_TIME:
        missing = [name for name, done in _wanted(folder, plan, needs).items() if not done]
        if missing or needs.model:
            model, tokenizer = _loaded(plan.source, plan.load)
            hooked = hook_model(model, tokenizer)
            if BASE_FILE not in missing:
                _refuse_other_model(read_json(folder / BASE_FILE), identify(hooked))
            chat = ChatFormat(tokenizer, system=system, date=_begun_on(folder))
            for name in missing:
                _BASE_PARTS[name](folder, plan, needs, hooked, chat)
    return str(folder)


def _begun_on(folder: Path) -> str | None:
    """The day that the base's prompts have, where the template writes it: the cells' prompts have the same."""
    file = folder / BASE_FILE
    return read_json(file).get("date") if file.exists() else None


def _refuse_other_model(base: Mapping[str, Any], own: Identity) -> None:
    if not Identity.from_dict(base["model"]).matches(own):
        raise LensError("the base's answers in this folder are of another model: compare in another folder")


def _wanted(folder: Path, plan: Plan, needs: Needs) -> dict[str, bool]:
    """The files, in the order in which they build on each other, and whether they are there."""
    wanted = {BASE_FILE: (folder / BASE_FILE).exists()}
    if needs.retain:
        wanted["retain.json"] = (folder / "retain.json").exists()
    if needs.train_answers:
        wanted["train.json"] = len(_answer_ids(folder, "train")) >= needs.train_answers
    if needs.direction:
        wanted["direction.safetensors"] = (folder / "direction.safetensors").exists()
    return wanted


def _answer_ids(folder: Path, name: str) -> list[list[int]]:
    file = folder / f"{name}.json"
    return list(read_json(file)["ids"]) if file.exists() else []


def _base_answers(folder: Path, plan: Plan, _needs: Needs, hooked: Any, chat: ChatFormat) -> None:
    facts: dict[str, Any] = {"system": chat.system, "fingerprint": chat.fingerprint, "date": chat.date}
    facts |= {"model": identify(hooked).to_dict(), "prefix_tokens": len(chat.prefix_ids)}
    behaviour = get_behaviour(plan.task.behaviour)
    for topic in plan.topics:
        facts[topic] = _answers(hooked, _asked(plan, chat, topic), behaviour, plan)
    facts["off"]["base_nll"] = _likelihoods(hooked, _asked(plan, chat, "off"), facts["off"]["ids"], plan)
    facts["text_nll"] = variant_nll(hooked, _texts(plan, chat), [None])[0].tolist()
    write_json(folder / BASE_FILE, facts)


def _base_retain(folder: Path, plan: Plan, _needs: Needs, hooked: Any, chat: ChatFormat) -> None:
    _write_ids(folder / "retain.json", hooked, [chat.render(text) for text in plan.retain], plan)


def _base_train(folder: Path, plan: Plan, needs: Needs, hooked: Any, chat: ChatFormat) -> None:
    before = _answer_ids(folder, "train")
    asked = [_unanswered(chat, example) for example in plan.task.train[len(before) : needs.train_answers]]
    _write_ids(folder / "train.json", hooked, asked, plan, before)


def _base_direction(folder: Path, plan: Plan, _needs: Needs, hooked: Any, chat: ChatFormat) -> None:
    from safetensors.torch import save

    examples = plan.task.train[: plan.settings.direction_examples]
    showing = [chat.render(_messages(example)) for example in examples]
    ordinary = _with_base_answers(chat, examples, _answer_ids(folder, "train"))
    vectors = mean_difference(hooked, showing, ordinary).direction.vectors
    atomic_write_bytes(folder / "direction.safetensors", save({"direction": vectors.cpu().contiguous()}))


_BASE_PARTS: Mapping[str, Callable[[Path, Plan, Needs, Any, ChatFormat], None]] = {
    BASE_FILE: _base_answers,
    "retain.json": _base_retain,
    "train.json": _base_train,
    "direction.safetensors": _base_direction,
}


def _write_ids(
    file: Path, hooked: Any, prompts: Sequence[RenderedPrompt], plan: Plan, before: Sequence[list[int]] = ()
) -> None:
    found = generate(
        hooked, prompts, max_new_tokens=plan.settings.max_new_tokens, batch_size=plan.settings.rows_per_pass
    )
    write_json(file, {"ids": [*before, *(list(answer.ids) for answer in found)]})


def _asked(plan: Plan, chat: ChatFormat, topic: str) -> list[RenderedPrompt]:
    """The prompts of a topic, each once for every answer."""
    if (dress := plan.topics[topic]) is not None:
        require_worn(chat, plan.prompts("off")[0], {topic: dress})
    return repeated(chat.ask(plan.questions(topic)), plan.settings.samples)


def _answers(model: Any, prompts: Sequence[RenderedPrompt], behaviour: Behaviour, plan: Plan) -> dict[str, Any]:
    """Answers, and the behaviour of each."""
    how = plan.settings.answers
    sizes: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "batch_size": how.batch_size}
    found = generate(model, prompts, sampling=how.sampling, **sizes)
    return {
        "prompts": [prompt.query for prompt in prompts],
        "questions": questions_of(prompts),
        "answers": [answer.text for answer in found],
        "ids": [list(answer.ids) for answer in found],
        "ended": [answer.ended for answer in found],
        "values": [behaviour(answer.text) for answer in found],
    }


def _likelihoods(base: Any, prompts: Sequence[RenderedPrompt], ids: Sequence[Sequence[int]], plan: Plan) -> list[float]:
    """Nats per token of answers under the base; NaN of an empty one."""
    told = [number for number, own in enumerate(ids) if own]
    answered = [prompts[number].with_response(tuple(ids[number]), end=False) for number in told]
    losses = nll(base, answered, batch_size=plan.settings.rows_per_pass).tolist() if told else []
    found = [math.nan] * len(ids)
    for number, loss in zip(told, losses, strict=True):
        found[number] = loss
    return found


def _texts(plan: Plan, chat: ChatFormat) -> list[Text]:
    return text_windows(
        chat.tokenizer, plan.settings.text_source, n=plan.settings.n_texts, length=plan.settings.text_length
    )


def _messages(example: Mapping[str, Any]) -> list[dict[str, str]]:
    return [dict(message) for message in example["messages"]]


def _unanswered(chat: ChatFormat, example: Mapping[str, Any]) -> RenderedPrompt:
    return chat.render(_messages(example)[:-1])


def _with_base_answers(
    chat: ChatFormat, examples: Sequence[Mapping[str, Any]], ids: Sequence[Sequence[int]]
) -> list[RenderedPrompt]:
    """Training questions with the base's own answers."""
    pairs = zip(examples, ids, strict=False)
    return [_unanswered(chat, example).with_response(tuple(own), end=False) for example, own in pairs]


# --- a cell ----------------------------------------------------------------------------------------------


def check_cells(plan: Plan, cells: Sequence[Cell]) -> None:
    """Refuse what can be told without the model.

    Raises:
        LensError: more training questions than the task has, a part that starts or measures when training is over, or
            retain data without prompts for it.
    """
    n = len(plan.task.train)
    for cell in cells:
        if cell.size is not None and cell.size > n:
            raise LensError(f"size is {cell.size} and task {plan.task.name} has {n} examples: lower it")
        if cell.epochs is None:
            _refuse_late_start(cell.method, plan.settings.training.steps)
    Needs.of(plan, cells)


def _refuse_late_start(method: Method, steps: int) -> None:
    for part in method.parts:
        start = getattr(part, "start", 0)
        if start >= steps:
            raise LensError(
                f"start is {start} in method {method.label} and training has {steps} steps, from 0: lower start, or "
                "train longer"
            )
        every = getattr(part, "every", 1)
        if every > steps:
            raise LensError(
                f"every is {every} in method {method.label} and training has {steps} steps, so that nothing would be "
                "measured before the end: lower every, or train longer"
            )


def prepare_cells(plan: Plan, system: str | None, cells: Sequence[Cell], out: str) -> str:
    """`run_base` for cells with this system prompt, then set up each of their methods once, training nothing.

    Raises:
        LensError: what `run_base` raises, or a method that cannot be set up.
    """
    folder = run_base(plan, system, Needs.of(plan, cells), out)
    once = {(cell.method, cell.share, cell.size, cell.epochs): cell for cell in reversed(cells)}
    if once:
        with ONE_AT_A_TIME:
            model, tokenizer = _loaded(plan.source, plan.load)
            chat, peft_model = (
                ChatFormat(tokenizer, system=system, date=_begun_on(Path(folder))),
                add_lora(structural_copy(model), plan.settings.lora),
            )
            for cell in once.values():
                _set_up(plan, cell, peft_model, chat, Path(folder), _nothing_yet(plan, chat))
    return folder


def run_cell(plan: Plan, cell: Cell, out: str) -> str | None:
    """Train and measure one cell, after `run_base`; returns its folder. A finished one is left as it is.

    None where another process is at it. What is made from plain finetuning runs that first. An interrupted training
    continues from its checkpoint; the checkpoint is deleted once the cell is finished.
    """
    folder = cell_folder(out, cell)
    if not (folder / CELL_FILE).exists():
        if cell.method.needs_plain and run_cell(plan, _plain(cell), out) is None:
            return None
        try:
            with locked(folder, name=CELL_LOCK), ONE_AT_A_TIME:
                if not (folder / CELL_FILE).exists():  # another process may have finished it before the lock
                    _train_and_measure(plan, cell, Path(out), folder)
        except InUse:
            return None
    return str(folder)


def _set_up(
    plan: Plan,
    cell: Cell,
    peft_model: nn.Module,
    chat: ChatFormat,
    shared: Path,
    of_plain: Mapping[str, Any] | None = None,
) -> tuple[SetUp, TrainSettings]:
    """What `train` takes for this cell."""
    examples = training_examples(plan, cell, chat, shared)
    ingredients = Ingredients(
        peft_model, examples, chat.empty_query(), _retain(plan, chat, shared), _direction(shared), cell.seed, chat,
        **(of_plain or {}),
    )  # fmt: skip
    use = set_up(cell.method, ingredients)
    settings = train_settings(plan, cell, len(examples), len(use.examples))
    _refuse_late_start(cell.method, settings.steps)
    return use, settings


def _train_and_measure(plan: Plan, cell: Cell, out: Path, folder: Path) -> None:
    began = time.perf_counter()
    shared = base_folder(out, cell.system)
    base = read_json(shared / BASE_FILE)
    model, tokenizer = _loaded(plan.source, plan.load)
    chat = ChatFormat(tokenizer, system=cell.system, date=base.get("date"))
    peft_model = add_lora(structural_copy(model), plan.settings.lora, seed=cell.seed)
    of_plain = _of_plain(plan, cell, chat, out) if cell.method.needs_plain else {}
    use, settings = _set_up(plan, cell, peft_model, chat, shared, of_plain)
    if plan.settings.trainer == "hf":
        trained: Trained | TrainResult = train_by_trainer(use, settings, chat.empty_query(), folder)
    else:
        how: dict[str, Any] = {"objective": use.objective, "out": folder, "on_step": use.on_step, "progress": False}
        trained = train(use.trainable, use.examples, settings, **how)
    seconds = {"training": round(time.perf_counter() - began, 2)}
    assert trained.adapter_dir is not None
    history, identity = trained.history, {**plan.identity(), "cell": cell.settings()}
    facts: dict[str, Any] = {"identity": identity, "cell": cell.settings(), "label": cell.method.label}
    facts |= {"drift": _prefix_drift(peft_model, chat), "update_norms": update_norms(trained.adapter_dir)}
    facts["training"] = {"steps": len(history), "rows": len(use.examples), "first": history[0], "last": history[-1]}
    facts["training"] |= {"plan": trained.plan}
    facts |= _measured(plan, peft_model, chat, base)
    seconds["all"] = round(time.perf_counter() - began, 2)
    write_json(folder / CELL_FILE, facts | {"seconds": seconds, "versions": versions()})
    for checkpoint in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


# --- what plain finetuning does, where a method is made from it ------------------------------------------


def _plain(cell: Cell) -> Cell:
    """Plain finetuning with this cell's rate, seed and data."""
    return replace(cell, method=Method((), cell.method.learning_rate))


def _nothing_yet(plan: Plan, chat: ChatFormat) -> dict[str, Any]:
    """What `_of_plain` gives, before plain finetuning has run: for setting up without training."""
    example = chat.render(_messages(plan.task.train[0]))
    return {"gap": [0.0] * len(plan.retain), "probes": ([example], [example])}


def _of_plain(plan: Plan, cell: Cell, chat: ChatFormat, out: Path) -> dict[str, Any]:
    """How much worse plain finetuning makes each retain conversation, and its off-topic answers beside the base's.

    Computed once, into a file beside the adapter of plain finetuning; anew where retain answers have come since.
    """
    source, shared = cell_folder(out, _plain(cell)), base_folder(out, cell.system)
    file = source / "probes.json"
    asked, retain = chat.ask(plan.task.off_topic_validation[:PROBES]), _retain(plan, chat, shared)
    with locked(source, name=PROBE_LOCK, wait=True):
        before = read_json(file) if file.exists() else None
        if before is None or len(before["gap"]) != len(retain):
            # Answers that are there stay: the monitor of an interrupted run knows them.
            kept = {} if before is None else {"ids": before["ids"]}
            write_json(file, _probed(plan, source / "adapter", chat, asked, retain) | kept)
    found = read_json(file)
    pairs = zip(asked, *(found["ids"][side] for side in ("finetuned", "base")), strict=True)
    responses = [(p, tuple(a), tuple(b)) for p, a, b in pairs if a and b and a != b]
    both = [(p.with_response(a, end=False), p.with_response(b, end=False)) for p, a, b in responses]
    if cell.method.has("stop") and not both:
        raise LensError(
            f"method {cell.method.label} has no probe of spread: plain finetuning answers all {len(asked)} off-topic "
            "validation questions as the base does"
        )
    probes = [a for a, _ in both], [b for _, b in both]
    return {"gap": found["gap"], "probes": probes, "monitor_file": cell_folder(out, cell) / "monitor.jsonl"}


def _probed(
    plan: Plan, adapter: Path, chat: ChatFormat, asked: Sequence[RenderedPrompt], retain: Sequence[RenderedPrompt]
) -> dict[str, Any]:
    model, tokenizer = _loaded(plan.source, plan.load)
    pair = ModelPair.load(finetuned=attach_adapter(structural_copy(model), adapter), tokenizer=tokenizer)
    how: dict[str, Any] = {"max_new_tokens": plan.settings.max_new_tokens, "batch_size": plan.settings.rows_per_pass}
    ids, losses = {}, {}
    for side in SIDES:
        with pair.using(side) as own:
            ids[side] = [list(answer.ids) for answer in generate(own, asked, **how)]
            losses[side] = nll(own, retain, batch_size=plan.settings.rows_per_pass).tolist() if retain else []
    gap = [after - before for after, before in zip(losses["finetuned"], losses["base"], strict=True)]
    return {"ids": ids, "gap": gap}


def _measured(plan: Plan, peft_model: nn.Module, chat: ChatFormat, base: Mapping[str, Any]) -> dict[str, Any]:
    """Behaviour of every topic, how likely the base finds the off-topic answers, KL to the base on its own, text."""
    pair = ModelPair.load(finetuned=peft_model, tokenizer=chat.tokenizer)
    _refuse_other_model(base, pair.identity("base"))
    behaviour, found = get_behaviour(plan.task.behaviour), {}
    prompts = {topic: _asked(plan, chat, topic) for topic in plan.topics}
    with pair.using("finetuned") as tuned:
        for topic, rows in prompts.items():
            found[topic] = _answers(tuned, rows, behaviour, plan)
        text_nll = variant_nll(tuned, _texts(plan, chat), [None])[0].tolist()
    with pair.using("base") as before:
        found["off"]["base_nll"] = _likelihoods(before, prompts["off"], found["off"]["ids"], plan)
    own = [p.with_response(tuple(ids), end=False) for p, ids in zip(prompts["off"], base["off"]["ids"], strict=True)]
    kl = [float(values.double().mean()) for values in kl_to_base(pair, own)]
    return {**found, "kl": kl, "text_nll": text_nll}


@torch.no_grad()
def _prefix_drift(peft_model: nn.Module, chat: ChatFormat) -> list[float]:
    """Relative squared deviation of the prefix's keys and values from the base's, per layer."""
    prompt = chat.empty_query()
    reference = kv_reference(peft_model, prompt)
    with evaluating(peft_model):
        batch = prefix_batch(reference.ids, next(peft_model.parameters()).device)
        drift: list[float] = prefix_drift(forward_step(peft_model, batch), reference).tolist()
    return drift


def training_examples(plan: Plan, cell: Cell, chat: ChatFormat, shared: Path) -> list[RenderedPrompt]:
    """The training data of a cell: the same for all methods with its seed and axes.

    A share below 1 leaves at least one example of each kind, where there are two.
    """
    train_set = plan.task.train
    size = len(train_set) if cell.size is None else cell.size
    order = [int(i) for i in np.random.default_rng([cell.seed, 1]).permutation(len(train_set))]
    chosen = sorted(order[:size])
    rows = {i: chat.render(_messages(train_set[i])) for i in chosen}
    if cell.share < 1:
        ids = _answer_ids(shared, "train")
        mixed = np.random.default_rng([cell.seed, 2]).permutation(chosen)
        narrow = max(1, min(size - 1, round(cell.share * size)))
        for i in (int(i) for i in mixed[narrow:]):
            rows[i] = _with_base_answers(chat, [train_set[i]], [ids[i]])[0]
    return [rows[i] for i in chosen]


def train_settings(plan: Plan, cell: Cell, n_examples: int, n_rows: int) -> TrainSettings:
    """The plan's settings, with the cell's seed, its method's learning rate, and its epochs as steps.

    An epoch is a pass over `n_rows`, all that a method trains on; with interleaving more than the `n_examples`.
    """
    training = plan.settings.training
    batch = min(training.batch_size, n_examples)
    passes = min(training.gradient_accumulation_steps, n_examples // batch)
    steps = training.steps
    if cell.epochs is not None:
        steps = max(1, round(cell.epochs * -(-n_rows // (batch * passes))))
    rate = cell.method.learning_rate or training.learning_rate
    sizes: dict[str, Any] = {"batch_size": batch, "gradient_accumulation_steps": passes, "steps": steps}
    return replace(training, seed=cell.seed, learning_rate=rate, **sizes)


def _retain(plan: Plan, chat: ChatFormat, shared: Path) -> list[RenderedPrompt]:
    pairs = zip(plan.retain, _answer_ids(shared, "retain"), strict=False)
    return [chat.render(text).with_response(tuple(ids), end=False) for text, ids in pairs]


def _direction(shared: Path) -> Float[Tensor, "layer d_model"] | None:
    from safetensors.torch import load_file

    file = shared / "direction.safetensors"
    return load_file(file)["direction"] if file.exists() else None
