"""How a solution moves during training: snapshots, trajectories ("training lens"), and drift between solutions.

keeper = SnapshotKeeper(trainable, every=5)
train(trainable, examples, settings, on_step=keeper)
trajectory({"λ = 1": keeper.snapshots}).figure()
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.intervals import mean_interval
from piggyback_lens.vectors.adapters import Adapter
from piggyback_lens.vectors.direction import Direction

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Part = Literal["all", "A", "B"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The solution after a number of steps."""

    step: int
    solution: Adapter


@dataclass(eq=False)
class SnapshotKeeper:
    """Keeps the solution at the start and every `every` steps; hand it to `train` as on_step."""

    trainable: HookTrainable
    every: int = 1
    snapshots: list[Snapshot] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise LensError(f"every={self.every}: a snapshot every so many steps, at least 1")
        self.snapshots.append(Snapshot(0, self.trainable.result()))

    def __call__(self, row: Mapping[str, Any]) -> None:
        """After a step."""
        if int(row["step"]) % self.every == 0:
            self.snapshots.append(Snapshot(int(row["step"]), self.trainable.result()))


def flattened(solution: Adapter, part: Part = "all") -> Float[Tensor, " n"]:
    """All numbers of a solution as one vector: a steering vector times its strength; A, B or both of an adapter.

    Raises:
        LensError: part A or B of a steering vector.
    """
    if isinstance(solution, Direction):
        if part != "all":
            raise LensError(f"a steering vector has no part {part}: choose 'all'")
        return solution.vectors.detach().float().flatten()
    if part not in ("all", "A", "B"):
        raise LensError(f"part {part!r} is not known: choose 'all', 'A' or 'B'")
    chosen = {k: v for k, v in solution.tensors().items() if part == "all" or k.endswith(f".{part}")}
    return torch.cat([value.detach().float().flatten() for value in chosen.values()])


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Several runs through one space.

    Attributes:
        frame: one row per run and snapshot: run, step, norm, local_cosine, pc1, pc2.
        explained: part of the variance of all snapshots that each component explains.
        distance: k of the local cosine, in snapshots.
    """

    frame: "pd.DataFrame"
    explained: tuple[float, ...]
    distance: int

    def figure(self) -> "go.Figure":
        """Norm and local cosine over the steps, and the paths in the plane of the first two components."""
        from piggyback_lens.figures.direction_plots import trajectory_figure

        figure: go.Figure = trajectory_figure(self.frame, self.explained, self.distance)
        return figure


def trajectory(runs: Mapping[str, Sequence[Snapshot]], *, distance: int = 1, part: Part = "all") -> Trajectory:
    """Norms, local cosine similarity, and one PCA over all snapshots of all runs.

    The local cosine at snapshot t is that between w(t) − w(t−k) and w(t+k) − w(t): 1 while training moves
    straight on, low where it turns ("Model Organisms for Emergent Misalignment", phase transitions). NaN at
    the ends, and where nothing moved.

    Args:
        runs: name to snapshots in order of their steps.
        distance: k, in snapshots.
        part: of adapters: "A", "B" or "all".

    Raises:
        LensError: no run, fewer than two snapshots in one, or runs of different sizes.
    """
    import pandas as pd

    if not runs or distance < 1 or any(len(run) < 2 for run in runs.values()):
        lengths = {name: len(run) for name, run in runs.items()}
        raise LensError(f"snapshots per run {lengths}, distance {distance}: at least one run of two, distance from 1")
    paths = {name: torch.stack([flattened(s.solution, part) for s in run]).double() for name, run in runs.items()}
    sizes = {path.shape[1] for path in paths.values()}
    if len(sizes) > 1:
        raise LensError(f"runs of different sizes {sorted(sizes)} have no common space: compare like with like")
    everything = torch.cat(list(paths.values()))
    left, singular, _ = torch.linalg.svd(everything - everything.mean(0), full_matrices=False)
    total = float(singular.square().sum())
    explained = tuple((singular.square() / total).tolist()) if total else ()
    coordinates = (left * singular)[:, :2]
    if coordinates.shape[1] < 2:
        coordinates = torch.nn.functional.pad(coordinates, (0, 1))
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        path, cosines = paths[name], local_cosines(paths[name], distance)
        for i, snapshot in enumerate(run):
            row = {"run": name, "step": snapshot.step, "norm": float(path[i].norm()), "local_cosine": cosines[i]}
            rows.append(row | dict(zip(("pc1", "pc2"), coordinates[len(rows)].tolist(), strict=True)))
    return Trajectory(pd.DataFrame(rows), explained[:10], distance)


def local_cosines(path: Float[Tensor, "step n"], distance: int) -> list[float]:
    """cos(w(t) − w(t−k), w(t+k) − w(t)) at every step t; NaN where one of them is missing or zero."""
    found = [math.nan] * len(path)
    for t in range(distance, len(path) - distance):
        before, after = path[t] - path[t - distance], path[t + distance] - path[t]
        lengths = float(before.norm() * after.norm())
        if lengths > 0:
            found[t] = float(before @ after) / lengths
    return found


@dataclass(frozen=True, eq=False)
class SnapshotCosines:
    """Where a run goes, snapshot by snapshot.

    Attributes:
        frame: one row per step and quantity: step, quantity, value, low, high, n. Cosines to the references
            are called "cosine to <name>".
    """

    frame: "pd.DataFrame"

    def figure(self) -> "go.Figure":
        """Cosines in one panel, every measure in one of its own."""
        from piggyback_lens.figures.direction_plots import snapshot_cosines_figure

        figure: go.Figure = snapshot_cosines_figure(self.frame)
        return figure


def snapshot_cosines(
    snapshots: Sequence[Snapshot],
    references: Mapping[str, Adapter],
    measures: Mapping[str, Callable[[Adapter], Sequence[float]]] | None = None,
    *,
    part: Part = "all",
) -> SnapshotCosines:
    """Cosine to reference solutions, and measures, at every snapshot of a run.

    For "does the narrow solution drift back to the general one without its KL term": snapshots of the
    continued run, references {"narrow": …, "general": …}, and behaviours on and off topic as measures.

    Args:
        snapshots: in order.
        references: solutions of the same kind and places.
        measures: name to a function that gives one number per prompt for a solution, for example by
            generating inside `attached(model, solution)`.
        part: of adapters: "A", "B" or "all". A and B of an adapter are fixed only up to scale and sign against
            each other: compare runs that started from the same numbers.

    Raises:
        LensError: no snapshots or references, or references of another size.
    """
    import pandas as pd

    if not snapshots or not references:
        raise LensError(f"{len(snapshots)} snapshots, {len(references)} references: at least one of each")
    targets = {name: flattened(solution, part).double() for name, solution in references.items()}
    rows: list[dict[str, Any]] = []
    for snapshot in snapshots:
        own = flattened(snapshot.solution, part).double()
        for name, target in targets.items():
            if target.shape != own.shape:
                raise LensError(f"reference {name!r} has {len(target)} numbers, the run {len(own)}: other places")
            lengths = float(own.norm() * target.norm())
            cosine = float(own @ target) / lengths if lengths else math.nan
            row = {"step": snapshot.step, "quantity": f"cosine to {name}", "value": cosine}
            rows.append(row | {"low": math.nan, "high": math.nan, "n": 1})
        for name, measure in (measures or {}).items():
            found = mean_interval(np.asarray(measure(snapshot.solution), dtype=float))
            row = {"step": snapshot.step, "quantity": name, "value": found.value}
            rows.append(row | {"low": found.low, "high": found.high, "n": found.n})
    return SnapshotCosines(pd.DataFrame(rows))
