"""What an audit asks under each condition: the patches, compiled once, and the answers under them, batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.engines import ONE_AT_A_TIME, Job
from piggyback_lens.interventions.donors import kv_patch, prefix_activations
from piggyback_lens.interventions.hooks import Intervention, Interventions, Record
from piggyback_lens.interventions.kinds import patch
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.settings import AuditSettings
from piggyback_lens.words import Side


@dataclass(frozen=True)
class Batch:
    """Answers that were generated together.

    Attributes:
        condition: under which they were given.
        topic: of the prompts.
        indices: of the prompts within the topic.
        answers: one for each.
        touched: what each intervention touched and changed in them.
    """

    condition: str
    topic: str
    indices: list[int]
    answers: list[Generation]
    touched: list[dict[str, Any]]


@dataclass
class Treatments:
    """The conditions of an audit.

    Attributes:
        pair: base and finetuned.
        chat: template settings.
        prompts: by topic.
        settings: of the audit.
    """

    pair: ModelPair
    chat: ChatFormat
    prompts: dict[str, list[RenderedPrompt]]
    settings: AuditSettings
    _kept: dict[str, Any] = field(default_factory=dict)

    def answer(self, condition: str, topic: str, indices: list[int], keep: Callable[[Batch], None]) -> None:
        """Answer some prompts of a topic, of one system text, under a condition.

        Args:
            condition: of `CONDITIONS`.
            topic: of the prompts.
            indices: which of them.
            keep: gets each batch as it comes.
        """
        chosen = [self.prompts[topic][i] for i in indices]
        interventions, prefix_cache = self._treatment(condition, chosen)
        record = Record()
        before: list[tuple[int, float]] = []

        def batch(rows: list[int], answers: list[Generation]) -> None:
            now = [(receipt.cells, receipt.change_norm**2) for receipt in record.receipts]
            gone = zip(now, before or [(0, 0.0)] * len(now), record.receipts, strict=True)
            touched = [
                {
                    "intervention": repr(own.part),
                    "cells": a[0] - b[0],
                    "layers": len(own.layers),
                    "squared": a[1] - b[1],
                }
                for a, b, own in gone
            ]
            before[:] = now
            keep(Batch(condition, topic, [indices[row] for row in rows], answers, touched))

        side: Side = "base" if condition == "base" else "finetuned"
        with self.pair.using(side) as model:
            generate(
                model,
                chosen,
                interventions=interventions,
                prefix_cache=prefix_cache,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                sampling=self.settings.sampling,
                record=record,
                progress=f"{topic}, {condition}",
                on_batch=batch,
            )

    def job(self, condition: str, topic: str, indices: list[int]) -> Job:
        """The same for an executor, which gives the batches."""
        return (_answered, self.pair, self.chat, self.prompts, self.settings, condition, topic, indices)

    def _treatment(
        self, condition: str, prompts: list[RenderedPrompt]
    ) -> tuple[Interventions | Intervention | None, PrefixCache | None]:
        """Interventions and prefix cache of a condition."""
        if condition in ("base", "finetuned"):
            return None, None
        chat = self.chat.under(prompts[0].question)
        if condition == "query_control":
            return kv_patch(self.pair, "query", chat=chat, prompts=prompts), None
        if condition == "identity":
            return None, self._once(f"identity {chat.system}", lambda: self._own_prefix(chat))
        postfix = None
        if condition in ("postfix", "both"):
            postfix = self._once(f"postfix {chat.system}", lambda: kv_patch(self.pair, "postfix", chat=chat))
        return postfix, self.repair(chat) if condition in ("prefix", "both") else None

    def longest(self, chat: ChatFormat) -> RenderedPrompt:
        """A prompt with the whole prefix: where a query merges with the header, its prefix is shorter."""
        everything = (p for rendered in self.prompts.values() for p in rendered)
        own = [prompt for prompt in everything if self.chat.under(prompt.question) is chat]
        return max(own, key=lambda p: len(p.spans["prefix"]))

    @property
    def first(self) -> ChatFormat:
        """The settings of the first off-topic prompt: of what is made of one prefix only."""
        return self.chat.under(self.prompts["off-topic"][0].question)

    def alike(self, topic: str) -> list[int]:
        """One sample of each prompt of a topic with one whole prefix: not of those that merge with the header."""
        size = len(self.longest(self.first).spans["prefix"])
        numbered = enumerate(self.prompts[topic])
        own = [(i, p) for i, p in numbered if p.sample == 0 and self.chat.under(p.question) is self.first]
        return [i for i, prompt in own if len(prompt.spans["prefix"]) == size]

    def _own_prefix(self, chat: ChatFormat) -> PrefixCache:
        """The finetuned model under a patch of its own prefix K/V: through the same hooks as a real one."""
        own = patch(prefix_activations(self.pair, "finetuned", self.longest(chat), ("k", "v")))
        return PrefixCache.compile(self.pair, self.longest(chat), own, side="finetuned")

    def repair(self, chat: ChatFormat) -> PrefixCache:
        """The base's prefix keys and values, for use with the finetuned model."""
        made: PrefixCache = self._once(
            f"repair {chat.system}", lambda: PrefixCache.compile(self.pair, self.longest(chat), side="base")
        )
        return made

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def _answered(
    pair: ModelPair,
    chat: ChatFormat,
    prompts: dict[str, list[RenderedPrompt]],
    settings: AuditSettings,
    condition: str,
    topic: str,
    indices: list[int],
) -> list[Batch]:
    found: list[Batch] = []
    with ONE_AT_A_TIME:
        Treatments(pair, chat, prompts, settings).answer(condition, topic, indices, found.append)
    return found
