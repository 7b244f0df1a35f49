"""Which token of which conversation each cell of an activation belongs to, in every forward pass.

Interventions speak of spans and phases in absolute positions of unpadded rows. A pass may be padded on
either side, start after a cached prefix, or hold one decoded token; a `Placement` knows the absolute
position of every column of the pass in progress, so that a hook touches the same tokens however the
computation is cut up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from piggyback_lens.conversations.batch import Batch, PromptBatch
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.words import Phase

PHASES: tuple[Phase, ...] = ("prompt", "generation", "both")
OPEN = 1 << 40
"""Stop of a span that grows while tokens are generated."""


@dataclass(frozen=True)
class Row:
    """The spans of one conversation: name to half-open range of absolute positions."""

    spans: dict[str, tuple[int, int]]
    n_prompt: int

    @classmethod
    def of(cls, prompt: RenderedPrompt) -> "Row":
        """The row of a rendered prompt. `prompt` and `all` are spans too; `response` is open-ended."""
        spans = {name: (span.start, span.stop) for name, span in prompt.spans.items()}
        spans["response"] = (prompt.n_prompt, OPEN)
        return cls(spans | {"prompt": (0, prompt.n_prompt), "all": (0, OPEN)}, prompt.n_prompt)

    def reaches_generation(self, span: str, phase: Phase) -> bool:
        """Whether an intervention on this span, in this phase, acts on tokens that are generated."""
        return phase != "prompt" and self.spans.get(span, (0, 0))[1] == OPEN


@dataclass(frozen=True)
class Cells:
    """Touched cells of the pass in progress.

    `rows` and `columns` index the activation, `origins` the conversations of the whole run (donors and
    kept activations are in that order), `slots` the tokens of the span. At attention scores `read` says which key
    columns of the pass are meant.
    """

    rows: Int[Tensor, " cell"]
    origins: Int[Tensor, " cell"]
    columns: Int[Tensor, " cell"]
    slots: Int[Tensor, " cell"]
    read: Bool[Tensor, "cell key"] | None = None
    _there: dict[torch.device, "Cells"] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.rows)

    def of_rows(self, count: int) -> "Cells":
        """Those of the first rows; not of attention scores."""
        kept = self.rows < count
        return Cells(self.rows[kept], self.origins[kept], self.columns[kept], self.slots[kept])

    def to(self, device: torch.device) -> "Cells":
        """On the activation's device; moved once, since a GPU has to finish its work for every tensor that comes."""
        known = self._there
        known.setdefault(self.rows.device, self)
        if device not in known:
            read = None if self.read is None else self.read.to(device)
            together = torch.stack([self.rows, self.origins, self.columns, self.slots]).to(device)
            rows, origins, columns, slots = together.unbind()
            known[device] = Cells(rows, origins, columns, slots, read, _there=known)
        return known[device]


@dataclass
class Placement:
    """The rows of a batch and the absolute position of each column of the current pass (-1 at padding).

    `key_positions` are those of the columns that attention looks at (cached ones included); some hooks
    (keys after the rotary embedding in HookedTransformer) see all of them. The first `ready` tokens of
    each row came as keys and values that hold their interventions already. `origins` are the places of the
    rows among all `total` conversations of a run that is cut into batches. With `members`, only these rows
    of the batch are there to be touched. With `lines`, several conversations stand in one row of the pass: `rows` and
    `positions` have a line for each conversation, and `lines` says which row of the pass it is in. `decoding` says that
    only generated tokens are still to come.
    """

    rows: tuple[Row, ...]
    positions: Int[Tensor, "batch pos"]
    key_positions: Int[Tensor, "batch keys"]
    origins: tuple[int, ...] = ()
    total: int = 0
    ready: int = 0
    members: tuple[int, ...] | None = None
    lines: tuple[int, ...] | None = None
    decoding: bool = False
    _cells: dict[tuple[object, ...], Cells] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.origins:
            self.origins, self.total = tuple(range(len(self.rows))), len(self.rows)

    @classmethod
    def of(
        cls, batch: "PromptBatch | Placement", origins: Sequence[int] = (), total: int = 0, *, ready: int = 0
    ) -> "Placement":
        """The placement of a padded batch that goes through the model in one pass, from its column `ready` on."""
        if isinstance(batch, Placement):
            return batch
        rows = tuple(Row.of(prompt) for prompt in batch.prompts)
        return cls.in_rows(rows, batch, tuple(origins), total, ready)

    @classmethod
    def in_rows(
        cls, rows: Sequence[Row], batch: Batch, origins: tuple[int, ...] = (), total: int = 0, ready: int = 0
    ) -> "Placement":
        """The placement of a padded batch whose rows have these spans; the first `ready` columns come as a cache."""
        positions = batch.positions.cpu()
        return cls(tuple(rows), positions[:, ready:], positions, origins, total, ready)

    def move(self, positions: Int[Tensor, "batch pos"], key_positions: Int[Tensor, "batch keys"]) -> None:
        """Tell where the next pass is."""
        self.positions, self.key_positions = positions.cpu(), key_positions.cpu()
        self._cells.clear()

    def only(self, members: Sequence[int]) -> "Placement":
        """The same pass, of which only these rows of the batch are touched: one variant among several."""
        return replace(self, members=tuple(members), _cells={})

    def select_rows(self, kept: Sequence[int]) -> None:
        """Keep only these rows."""
        assert self.members is None
        assert self.lines is None, "conversations that share a row cannot leave it"
        self.rows = tuple(self.rows[i] for i in kept)
        self.origins = tuple(self.origins[i] for i in kept)
        self._cells.clear()

    def length(self, row: int, span: str, tokens: tuple[int, ...] | None) -> int:
        """How many tokens of `span` (or of its chosen `tokens`) a row has."""
        start, stop = self._range(row, span)
        return stop - start if tokens is None else len(tokens)

    def _range(self, row: int, span: str) -> tuple[int, int]:
        spans = self.rows[row].spans
        if span not in spans:
            raise LensError(f"span {span!r} is not in row {self.origins[row]}: it has {', '.join(spans)}")
        start, stop = spans[span]
        if stop <= start:
            raise LensError(
                f"span {span!r} is empty in row {self.origins[row]}: choose another span, or leave the row out"
            )
        return start, stop

    def check(self, span: str, tokens: tuple[int, ...] | None, rows: tuple[int, ...] | None) -> None:
        """Refuse a span or token index that some row does not have."""
        for row in self.chosen(rows):
            start, stop = self._range(row, span)
            for token in tokens or ():
                if not (start - stop <= token < stop - start) or (token < 0 and stop == OPEN):
                    size = "no end" if stop == OPEN else f"{stop - start} tokens"
                    raise LensError(
                        f"token {token} is outside span {span!r} of row {self.origins[row]}, which has {size}"
                    )

    def chosen(self, rows: tuple[int, ...] | None) -> list[int]:
        """Indices, in this batch, of the rows that were asked for by their origin."""
        missing = [row for row in rows or () if not 0 <= row < self.total]
        if missing:
            raise LensError(f"row {missing[0]} was asked, there are rows 0 to {self.total - 1}")
        there = range(len(self.rows)) if self.members is None else self.members
        return [i for i in there if rows is None or self.origins[i] in rows]

    def cells(
        self,
        span: str,
        tokens: tuple[int, ...] | None,
        phase: Phase,
        rows: tuple[int, ...] | None,
        width: int,
    ) -> Cells:
        """The cells of an activation of `width` columns that lie in a span, in a phase.

        Slots count within the span (or are the index into `tokens`), so that donors line up.
        """
        key = (span, tokens, phase, rows, width)
        if key not in self._cells:
            positions = self.positions
            if width != positions.shape[1]:
                positions = self.key_positions.masked_fill(self.key_positions < self.ready, -1)
            if width != positions.shape[1]:
                raise LensError(
                    f"an activation has {width} positions, the batch says {self.positions.shape[1]}: "
                    "pass the ids of this very batch to the model"
                )
            self._cells[key] = self._find(positions, span, tokens, phase, self.chosen(rows))
        return self._cells[key]

    def edges(self, readers: Cells, span: str, tokens: tuple[int, ...] | None, key: tuple[object, ...]) -> Cells:
        """Those of some cells that read tokens of a span, at their own position or before, with the keys that they are.

        Args:
            readers: cells of the pass in progress.
            span: where the keys lie.
            tokens: indices within that span; None for all of it.
            key: what tells these readers apart from others of the same pass.
        """
        key = ("edges", span, tokens, *key)
        if key not in self._cells:
            wanted = torch.zeros_like(self.key_positions, dtype=torch.bool)
            for row in set(readers.rows.tolist()):
                start, stop = self._range(row, span)
                inside = (self.key_positions[row] >= start) & (self.key_positions[row] < stop)
                if tokens is not None:
                    chosen = torch.tensor([start + token % (stop - start) for token in tokens])
                    inside &= torch.isin(self.key_positions[row], chosen)
                wanted[row] = inside
            own = self.positions[readers.rows, readers.columns]
            read = wanted[readers.rows] & (self.key_positions[readers.rows] <= own[:, None])
            some = read.any(dim=1)
            kept = (readers.rows[some], readers.origins[some], readers.columns[some], readers.slots[some])
            self._cells[key] = replace(Cells(*kept), read=read[some])
        return self._cells[key]

    def _find(
        self,
        positions: Int[Tensor, "batch pos"],
        span: str,
        tokens: tuple[int, ...] | None,
        phase: Phase,
        chosen: Sequence[int],
    ) -> Cells:
        found: list[tuple[int, int, int, int]] = []
        for row in chosen:
            start, stop = self._range(row, span)
            line = row if self.lines is None else self.lines[row]
            slot_of = None if tokens is None else {t % (stop - start): i for i, t in enumerate(tokens)}
            n_prompt = self.rows[row].n_prompt
            for column, position in enumerate(positions[row].tolist()):
                if not start <= position < stop or not _in_phase(position, n_prompt, phase):
                    continue
                slot = position - start if slot_of is None else slot_of.get(position - start)
                if slot is not None:
                    found.append((line, self.origins[row], column, slot))
        return Cells(*torch.tensor(found, dtype=torch.long).reshape(-1, 4).unbind(1))


def _in_phase(position: int, n_prompt: int, phase: Phase) -> bool:
    """The generation phase starts at the first response token; the pass that predicts it is still prompt."""
    return phase == "both" or (position >= n_prompt) == (phase == "generation")
