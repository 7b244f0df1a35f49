"""Results of 0.1.0, brought into today's format: the numbers as they were written, the files and folders of today."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piggyback_lens.comparisons.comparison import Comparison
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.attribution import AttributionResult
from piggyback_lens.experiments.audit import AuditResult
from piggyback_lens.experiments.audit_maps import CURVE
from piggyback_lens.experiments.perturbation import PerturbResult
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.experiments.stress_suite import StressResult
from piggyback_lens.files import ensure_folder, read_json, read_jsonl, write_json
from piggyback_lens.finetuning.training import TrainResult
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import RESULT, ROWS

KINDS: tuple[tuple[type[Result], frozenset[str]], ...] = (
    (AttributionResult, frozenset({"attributed", "exact", "sampled", "steps"})),
    (PatchResult, frozenset({"kind", "cells", "values", "base", "finetuned", "measure", "settings"})),
    (TrainResult, frozenset({"history", "settings", "identity", "versions", "adapter_dir", "resumed_from"})),
    (Comparison, frozenset({"cells", "bases", "card"})),
)
"""What 0.1.0 wrote without saying of which kind it was, by its fields."""
NAMED: Mapping[str, type[Result]] = {"perturb": PerturbResult, "stress": StressResult}


def convert(source: str | Path, out: str | Path) -> list[Path]:
    """Bring a result of 0.1.0 over: a file to a file, the folder of an audit or of any other run to a folder.

    What is there already in today's format (curves, sweeps and transfers have not changed) is copied; tensors
    (prefix caches, directions, adapters, checkpoints) load as they are and are left alone.

    Args:
        source: a result's JSON file, or a folder with some.
        out: the new file or folder; it must not be there.

    Returns:
        The result files that were written; each was read back as today's result.

    Raises:
        LensError: nothing of 0.1.0 that can be brought over; or `out` is there.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise LensError(f"{out} is there already: choose another place, so that nothing is overwritten")
    if source.is_dir():
        return _folder(source, ensure_folder(out))
    found = _file(source, read_json(source), out)
    if found is None:
        raise LensError(f"{source} is no result that 0.1.0 wrote: pass a result's JSON file, or its folder")
    return [found]


def _folder(source: Path, out: Path) -> list[Path]:
    audits = [file.parent for file in sorted(source.rglob("audit.json")) if (file.parent / "results.json").exists()]
    written = [_audit(folder, out / folder.relative_to(source)) for folder in audits]
    for file in sorted(source.rglob("*.json")):
        if file.parent in audits:
            continue
        inside = file.relative_to(source)
        found = _file(file, read_json(file), out / (inside.with_name(RESULT) if file.stem == "attribution" else inside))
        written += [] if found is None else [found]
    if not written:
        out.rmdir()
        raise LensError(f"{source} holds no finished result that 0.1.0 wrote: give the folder that has its JSON files")
    return written


def _file(source: Path, data: Any, out: Path) -> Path | None:
    """One file; None where it is none of a result."""
    if not isinstance(data, dict):
        return None
    if str(data.get("format", "")).startswith("piggyback_lens."):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out)
        return out
    kind = NAMED.get(str(data.get("result")))
    if kind is not None:
        data = {name: value for name, value in data.items() if name != "result"}
    else:
        kind = next((own for own, names in KINDS if names == data.keys()), None)
    return None if kind is None else kind.from_fields(_renamed(kind, data), source).save(out)


def _renamed(kind: type[Result], data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by today's names: a patch's direction is its flow."""
    if kind is AttributionResult:
        parts = {
            name: part and _renamed(PatchResult, part) for name, part in data.items() if name in ("attributed", "exact")
        }
        return {**data, **parts}
    if kind is PatchResult:
        names = {"direction": "flow"}
        return {
            **data,
            "cells": [{names.get(name, name): label for name, label in cell.items()} for cell in data["cells"]],
        }
    return dict(data)


def _audit(source: Path, out: Path) -> Path:
    saved = read_json(source / "results.json")
    try:
        facts = {name: saved[name] for name in ("verdict", "summary", "receipts", "card")}
    except (KeyError, TypeError) as error:
        raise LensError(f"{source / 'results.json'} is not an audit's ({error}): run the audit again") from error
    if (source / "layer_curve.json").exists():
        curve = read_json(source / "layer_curve.json")
        PatchResult.from_fields(_renamed(PatchResult, curve), source / "layer_curve.json").save(out / CURVE / RESULT)
    rows = read_jsonl(source / "rows.jsonl")
    ensure_folder(out)
    shutil.copyfile(source / "rows.jsonl", out / ROWS)
    if (source / "prefix_cache").is_dir():
        shutil.copytree(source / "prefix_cache", out / "prefix_cache")
    file = write_json(out / RESULT, {"format": f"piggyback_lens.{AuditResult.name}", **facts})
    if len(AuditResult.load(out).rows) != len(rows):
        raise LensError(f"{source} was not brought over whole: {len(rows)} answers")
    return file
