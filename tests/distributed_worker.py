"""One process of a distributed training run on the CPU; `test_distributed_training` starts it with torchrun.

    torchrun --nproc_per_node 2 distributed_worker.py OUT.json '{"how": "ddp", "tuning": "peft", ...}'

`how` is "ddp" (the Trainer's own way, through accelerate) or "fsdp" (accelerate shards on accelerators only,
so a loop by hand shards the model with `fully_shard` and asks the same mixin for its loss). With "watched" a
`Monitor` measures after every step, and the lines of its file come back too.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tiny_chat import VOCAB, tiny_examples, tiny_format, tiny_tokenizer
from tiny_models import build
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from piggyback_lens.finetuning.hf_trainer import PenaltyMixin, PenaltyTrainer, training_rows
from piggyback_lens.finetuning.monitor import Monitor
from piggyback_lens.finetuning.objectives import KLOnRetain, KLOnTrain, Penalised, TReFT, Weighted
from piggyback_lens.finetuning.preventive import PreventiveSteering
from piggyback_lens.finetuning.retain import RetainData
from piggyback_lens.finetuning.trainables import PeftAdapter, add_lora
from piggyback_lens.settings import LoRASettings

STEPS, ROWS = 4, 4


def made(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model, and what the mixin takes."""
    model = build(case.get("layout", "llama-gqa"), vocab=VOCAB)
    base = None if case["tuning"] == "peft" else build(case.get("layout", "llama-gqa"), vocab=VOCAB)
    if case["tuning"] == "peft":
        model = add_lora(model, LoRASettings(rank=4))
    retain = RetainData(tiny_examples(6, seed=9), 3)
    known = {
        "prefix": Weighted(TReFT(reference="template"), 100.0),
        "postfix": Weighted(TReFT("postfix", "template"), 100.0),
        "query": Weighted(TReFT("query", None, base), 100.0),
        "kl_train": Weighted(KLOnTrain(base), 3.0),
        "kl_retain": Weighted(KLOnRetain(retain, base), 3.0),
    }
    parts = tuple(known[name] for name in case["penalties"])
    return model, {"objective": Penalised(parts), "prompt": tiny_format().empty_query()}


def steered(model: Any, case: dict[str, Any]) -> Any:
    """What is given to a Trainer as its model."""
    vector = torch.linspace(-1.0, 1.0, 32)
    return PreventiveSteering(PeftAdapter(model), vector, layer=1, site="resid_pre") if case.get("steered") else model


def with_trainer(out: Path, case: dict[str, Any], processes: int) -> dict[str, Any]:
    model, given = made(case)
    backend = {"ddp_backend": "gloo"} if processes > 1 else {}
    arguments = TrainingArguments(
        output_dir=str(out.with_suffix("")), max_steps=STEPS, per_device_train_batch_size=ROWS // processes,
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **backend, **case.get("arguments", {}),
    )  # fmt: skip
    trainer = PenaltyTrainer(
        model=steered(model, case), args=arguments, train_dataset=training_rows(tiny_examples(8)),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()), **given,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    watched = out.with_suffix(".jsonl")
    if case.get("watched"):
        prompts = [tiny_format().render(query) for query in ("what", "how so", "where to")]
        towards, against = ([p.with_response(answer) for p in prompts] for answer in ("oink", "well"))
        monitor = Monitor(trainer.model, towards, against, every=1, out=watched)
        trainer.add_callback(monitor.callback(trainer))
    trainer.train()
    assert trainer.args.world_size == processes
    log = [row for row in trainer.state.log_history if "loss" in row]
    lines = [json.loads(line) for line in watched.read_text().splitlines()] if watched.exists() else []
    return {"log": log, "monitor": lines, "weights": listed(trainer.accelerator.unwrap_model(trainer.model_wrapped))}


def listed(model: Any) -> dict[str, list[float]]:
    """Every trained parameter, whole, by its name in the plain model."""
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.replace("_checkpoint_wrapped_module.", "")] = whole.detach().flatten().tolist()
    return found


class Loop:
    """The least that the mixin needs of a Trainer: the loss of a micro-batch as its mean."""

    def __init__(self, model: Any) -> None:
        self.args = self.state = SimpleNamespace(global_step=0, should_save=False)
        self.accelerator = SimpleNamespace(autocast=nullcontext)
        self.current_gradient_accumulation_steps = 1

    def compute_loss(self, model: Any, inputs: Any, *_: Any) -> Any:
        return model(**inputs, use_cache=False).loss

    def training_step(self, model: Any, halves: Any) -> Any:
        loss = torch.stack([self.compute_loss(model, dict(half)) for half in halves]).mean()
        loss.backward()
        return loss.detach()


class PenaltyLoop(PenaltyMixin, Loop):
    """The mixin on top of it."""


def with_sharding(case: dict[str, Any], processes: int) -> dict[str, Any]:
    """Half of the rows on each process; one process takes both halves."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, given = made(case)
    blocks = list((model.model.model if case["tuning"] == "peft" else model.model).layers)
    if processes > 1:
        dist.init_process_group("gloo")
        if case.get("checkpointed"):
            apply_activation_checkpointing(model, check_fn=lambda part: part in set(blocks))
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        assert isinstance(model, FSDPModule)
        assert all(hasattr(value, "full_tensor") for value in model.parameters())
    loop, rows = PenaltyLoop(steered(model, case), **given), training_rows(tiny_examples(8))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    collate, log = DataCollatorForSeq2Seq(tiny_tokenizer()), []
    model.train()
    for step in range(STEPS):
        loop.state.global_step = step
        batch = rows[step % 2 * ROWS :][:ROWS]
        halves = [collate(batch[:2]), collate(batch[2:])]
        mine = halves if processes == 1 else [halves[dist.get_rank()]]
        loop.current_gradient_accumulation_steps = len(mine)
        loss = loop.training_step(model, mine)
        optimiser.step()
        optimiser.zero_grad()
        shared = torch.stack([loss, *loop._measured[-1].values()])
        if processes > 1:
            dist.all_reduce(shared)
        log.append(dict(zip(("loss", *loop._measured[-1]), (shared / processes).tolist(), strict=True)))
    return {"log": log, "monitor": [], "weights": listed(model)}


def run(out: Path, case: dict[str, Any], processes: int) -> None:
    """Train; process 0 writes losses, drifts and final weights."""
    torch.set_num_threads(1)
    found = with_sharding(case, processes) if case["how"] == "fsdp" else with_trainer(out, case, processes)
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # what was asked is written; on a busy machine gloo's threads may abort an ordinary exit
