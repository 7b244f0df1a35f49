"""Runs of the jobs on directions: what identifies one, what an earlier one has left, and its card."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from piggyback_lens.card import machine, peak_memory_gb, versions
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import HookedModel, facts_of
from piggyback_lens.models.pair import Identity
from piggyback_lens.vectors.adapters import Adapter


def finished(file: Path, asked: Mapping[str, Any], load: Callable[[Path], Any]) -> Any:
    """What an earlier run has left in the file, None where there is none.

    Raises:
        LensError: it belongs to another run; the message says in what they differ.
    """
    if not file.exists():
        return None
    done = load(file)
    saved, wanted = dict(done.settings.get("run", {})), json.loads(json.dumps(asked))
    theirs, ours = (part.pop("model", None) for part in (saved, wanted))
    different = sorted(key for key in {*saved, *wanted} if saved.get(key) != wanted.get(key))
    if theirs is None or not Identity.from_dict(theirs).matches(Identity.from_dict(ours)):
        different.append("model")
    if different:
        raise LensError(
            f"{file} is of a run with other {', '.join(different)}: choose another --out, or delete the file"
        )
    return done


def model_facts(model: HookedModel, own: Identity) -> dict[str, Any]:
    """The model's part of what identifies a run."""
    return {"model": own.to_dict(), **facts_of(model)}


def solution_hash(solution: Adapter) -> str:
    """16 hex digits of what a solution does: places, settings and numbers."""
    digest = hashlib.sha256(json.dumps(solution.settings(), sort_keys=True).encode())
    for name, value in solution.tensors().items():
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
