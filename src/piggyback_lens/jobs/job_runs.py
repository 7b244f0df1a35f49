"""Runs of the jobs on directions: what identifies one, what an earlier one has left, and its card."""

from collections.abc import Mapping, Sequence
from typing import Any

from piggyback_lens.card import machine, peak_memory_gb, versions
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.models.backends import HookedModel, facts_of


def run_card(
    model: HookedModel, name: str, prompts: Sequence[RenderedPrompt], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The run card: model, template, settings, versions and machine."""
    return {
        "model": name,
        "n": len(prompts),
        "fingerprint": prompts[0].fingerprint if prompts else None,
        "backend": facts_of(model)["backend"],
        "settings": dict(settings),
        "versions": versions(),
        "machine": machine(),
        "peak_memory_gb": peak_memory_gb(),
    }
