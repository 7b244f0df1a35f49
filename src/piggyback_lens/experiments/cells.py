"""The engine of the patching experiments: many variants of one run, each a cell of a map.

A cell is a set of interventions. What it does within the prefix is compiled to keys and values, one row of a
batch per cell, from the first token touched on; the rest of the prompts follows on top, cells x prompts in one
batch, and on top of those each answer. All passes fork at the lowest layer that a cell touches (see `forking`),
and compute logits only where an answer token is predicted. The numbers are those of one hooked pass per cell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.conversations.batch import as_prompts, padded
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Intervention, Record
from piggyback_lens.interventions.placement import OPEN, Placement, Row
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied_each
from piggyback_lens.maths import token_log_probs
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour, Measure
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.backends import HookedModel, Shape, check_layers, device_of, dtype_of, free_bytes, shape_of
from piggyback_lens.models.forking import Lineage, forking
from piggyback_lens.models.network import NOTHING, forward, forward_keeping
from piggyback_lens.models.states import KVState, state_from_keys_values

MOST_ROWS = 256  # rows of a pass, however large the memory budget
ROWS_TOGETHER = 8  # prompts of similar length that share a pass, so that many cells fit beside them

Parts = tuple[Intervention, ...]


@dataclass(frozen=True)
class Outcome:
    """What one cell gave.

    Attributes:
        values: the measure per prompt.
        touched: (token, layer) pairs that its interventions touched, over all rows.
        change_norm: Frobenius norm of everything they changed.
    """

    values: Float[Tensor, " prompt"]
    touched: int
    change_norm: float


def require_one_prefix(prompts: Sequence[RenderedPrompt]) -> int:
    """Length of the prefix that all prompts share.

    Raises:
        LensError: it names the first prompt with another one.
    """
    prompts = as_prompts(prompts)
    first = prompts[0].ids[: len(prompts[0].span("prefix"))]
    for i, prompt in enumerate(prompts):
        if prompt.ids[: len(prompt.span("prefix"))] != first:
            raise LensError(
                f"prompt {i} ({prompt.query[:40]!r}) has a prefix of {len(prompt.span('prefix'))} tokens that is not "
                f"the {len(first)} of prompt 0: render all with the same settings, leave out queries that merge with "
                "the header (see prompt.notes)"
            )
    return len(first)


def evaluate(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    measure: Measure,
    cells: Sequence[Parts],
    *,
    budget_gb: float | None = None,
    cells_per_pass: int | None = None,
) -> Iterator[list[tuple[int, Outcome]]]:
    """The measure under every cell, pass by pass: pairs of cell number and outcome, as soon as they are known.

    Args:
        model: the recipient; either backend.
        prompts: without responses; donors with several rows are in their order.
        measure: teacher-forced or generated.
        cells: interventions on prompt tokens; attention edges may be those of the answer, too. No interventions: the
            model as it is.
        budget_gb: memory for one pass beside the weights, in GB; None for 1, on a GPU for half of what is free there.
        cells_per_pass: the most cells that go through together; None for as many as the memory allows.

    Raises:
        LensError: prompts with different prefixes, or a cell that touched nothing.
    """
    root = None if isinstance(measure, GeneratedBehaviour) else PrefixCache.compile(model, prompts[0])
    for group in passes_of(model, prompts, measure, cells, budget_gb=budget_gb, cells_per_pass=cells_per_pass):
        found = run_pass(model, prompts, measure, [cells[i] for i in group], budget_gb=budget_gb, root=root)
        yield list(zip(group, found, strict=True))


def passes_of(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    measure: Measure,
    cells: Sequence[Parts],
    *,
    budget_gb: float | None = None,
    cells_per_pass: int | None = None,
) -> list[list[int]]:
    """Which cells go through the model together: those that begin at similar layers, so that they share what is below.

    Args and errors as `evaluate`.
    """
    length = require_one_prefix(prompts)
    if isinstance(measure, GeneratedBehaviour):
        return [[cell] for cell in range(len(cells))]
    if [row.ids[: row.n_prompt] for row in measure.towards] != [prompt.ids for prompt in prompts]:
        raise LensError("the measure's answers are not of these prompts in this order: make it from the same prompts")
    most = most_rows(model, measure, budget_gb)
    together = max(1, most // max(map(len, _groups(prompts, most))) - 1)
    together = min(together, cells_per_pass or together)
    firsts = [(_first_token(parts, prompts[0], length), first_layer(parts, model)) for parts in cells]
    order = sorted(range(len(cells)), key=lambda cell: firsts[cell])
    return [order[start : start + together] for start in range(0, len(order), together)]


def run_pass(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    measure: Measure,
    cells: Sequence[Parts],
    *,
    budget_gb: float | None = None,
    root: PrefixCache | None = None,
) -> list[Outcome]:
    """The outcomes of cells that go through the model together.

    Args:
        model: as of `evaluate`, and so are the others.
        prompts: without responses.
        measure: teacher-forced or generated.
        cells: one of the groups of `passes_of`.
        budget_gb: memory.
        root: the prefix of the model as it is; None to compute it.
    """
    if isinstance(measure, GeneratedBehaviour):
        return [_generated(model, prompts, measure, parts) for parts in cells]
    root = root or PrefixCache.compile(model, prompts[0])
    return _Chunk(model, prompts, measure, cells, root).run(_groups(prompts, most_rows(model, measure, budget_gb)))


def most_rows(model: HookedModel, measure: AnswerContrast, budget_gb: float | None, *, gradient: bool = False) -> int:
    """Rows that one pass may have; for a gradient it keeps the activations of every layer."""
    memory = free_bytes(device_of(model)) / 2 if budget_gb is None else budget_gb * 1e9
    tokens = max(len(row.ids) for row in measure.rows)
    answer = max(len(row.ids) - row.n_prompt for row in measure.rows)
    shape = shape_of(model)
    one = row_bytes(shape, dtype_of(model).itemsize, tokens, answer, layers=shape.n_layers if gradient else 1)
    return max(2, min(MOST_ROWS, int(memory / one)))


def _groups(prompts: Sequence[RenderedPrompt], most: int) -> list[list[int]]:
    """Prompts that go through together under every cell of a pass."""
    return _similar(prompts, max(1, min(ROWS_TOGETHER, most // 2)))


def _similar(prompts: Sequence[RenderedPrompt], most: int) -> list[list[int]]:
    """Prompts of similar length together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    return [order[i : i + most] for i in range(0, len(order), most)]


def row_bytes(shape: Shape, item: int, tokens: int, answer: int, *, layers: int = 1) -> int:
    """Rough memory of one row of a pass: keys and values (twice, while they grow), logits, the widest activations.

    Args:
        shape: of the model.
        item: bytes of a number.
        tokens: of the row, its answer included.
        answer: of them, those whose logits are computed.
        layers: whose activations are there at once.
    """
    kv = 4 * shape.n_layers * shape.n_kv_heads * tokens * shape.d_head * item
    logits = answer * shape.d_vocab * (item + 8)
    # Of scores there are the raw ones, the masked ones, their softmax in float32 and what attention reads.
    widest = tokens * (10 * shape.d_model + 5 * shape.n_heads * tokens) * item
    return kv + logits + layers * widest


def first_layer(parts: Sequence[Intervention], model: HookedModel) -> int:
    """The lowest layer that interventions touch; 0 if there are none."""
    n_layers = shape_of(model).n_layers
    return min((check_layers(part.layers, n_layers)[0] for part in parts), default=0)


def _first_token(parts: Sequence[Intervention], prompt: RenderedPrompt, length: int) -> int:
    """The first prefix token that interventions touch; `length` if they leave the prefix alone."""
    first = length
    for part in parts:
        start, stop = _range(part, prompt)
        if part.tokens is None:
            first = min(first, start)
        elif part.tokens and stop > start:
            first = min(first, start + min(token % (stop - start) for token in part.tokens))
    return first


def _range(part: Intervention, prompt: RenderedPrompt) -> tuple[int, int]:
    spans = Row.of(prompt).spans
    if part.span not in spans or (spans[part.span][1] == OPEN and part.site != "attn_scores"):
        closed = [name for name, (_, stop) in spans.items() if stop < OPEN]
        raise LensError(f"span {part.span!r} is no span of the prompt: it has {', '.join(closed)}")
    return spans[part.span]


@dataclass
class _Chunk:
    """The cells that go through the model together."""

    model: HookedModel
    prompts: Sequence[RenderedPrompt]
    measure: AnswerContrast
    cells: Sequence[Parts]
    root: PrefixCache

    def __post_init__(self) -> None:
        self.records = [Record() for _ in self.cells]
        self.firsts = [first_layer(parts, self.model) for parts in self.cells]

    def run(self, groups: Sequence[Sequence[int]]) -> list[Outcome]:
        """Outcomes in the order of the cells."""
        values = torch.full((len(self.cells), len(self.prompts)), float("nan"))
        with torch.no_grad():
            prefix = _Prefix.of(self)
            for group in groups:
                values[:, list(group)] = self._prompts(prefix, group)
        for record in self.records:
            record.check()
        found = []
        for own, record in zip(values, self.records, strict=True):
            norm = sum(receipt.change_norm**2 for receipt in record.receipts) ** 0.5
            found.append(Outcome(own, sum(receipt.cells for receipt in record.receipts), norm))
        return found

    def _prompts(self, prefix: "_Prefix", group: Sequence[int]) -> Float[Tensor, "cell prompt"]:
        """The measure of some prompts under every cell: once through the prompts, then through each answer."""
        past, rows = len(self.root), _Rows.of(len(group), self.firsts)
        batch = batch_prompts([self.prompts[group[i]] for i in rows.members], side="right")
        placement = Placement.of(batch, [group[i] for i in rows.members], len(self.prompts), ready=past)
        beyond = [tuple(part for part in parts if _range(part, self.prompts[0])[1] > past) for parts in self.cells]
        state = prefix.state([0 if cell is None else prefix.place[cell] for cell in rows.cells], rows.lineage)
        last = batch.attention_mask.sum(1, keepdim=True) - past - 1
        real = batch.attention_mask[:, past:]
        logits = self._forward(rows, batch.ids[:, past:], real, state, last, placement, beyond)[:, 0]
        scores = []
        for answers in (self.measure.towards, self.measure.against):
            ids = [answers[i].ids[answers[i].n_prompt :] for i in group]
            first = _summed_log_probs(
                logits[rows.of_cells, None], [ids[rows.members[row]][:1] for row in rows.of_cells]
            )
            rest = self._rest(rows, state, batch.attention_mask, ids, group, beyond)
            lengths = torch.tensor([len(own) for own in ids])
            scores.append((first.view(len(self.cells), len(group)) + rest) / lengths)
        return scores[0] - scores[1]

    def _rest(
        self,
        above: "_Rows",
        state: KVState,
        mask: Int[Tensor, "row past"],
        answers: Sequence[tuple[int, ...]],
        group: Sequence[int],
        beyond: Sequence[Parts],
    ) -> Float[Tensor, "cell prompt"]:
        """Summed log p of the answers after their first token, on top of the prompts in `state`."""
        found = torch.zeros((len(self.cells), len(group)))
        longer = [i for i, ids in enumerate(answers) if len(ids) > 1]
        if not longer:
            return found
        rows = _Rows.of(len(longer), self.firsts)
        own = [answers[longer[i]] for i in rows.members]
        width = max(map(len, own)) - 1
        ids = torch.tensor([[*a[:-1], *[0] * (width + 1 - len(a))] for a in own])
        steps, counts = torch.arange(width), torch.tensor([[len(a) - 1] for a in own])
        source = torch.tensor([above.row(cell, longer[i]) for cell, i in zip(rows.cells, rows.members, strict=True)])
        device = device_of(self.model)
        alive = [source[: rows.lineage.alive(layer)].to(device) for layer in range(len(self.root.keys))]
        branch = state.branched(alive, mask.to(device), rows.lineage.alive(0))
        origins = [group[longer[i]] for i in rows.members]
        placement = self._after(mask[source], (steps < counts).long(), origins)
        # Where keys are cached before the rotary embedding, a patch after it has to act on every pass; edges are also
        # those of the answer's tokens.
        acts = {"attn_scores"} if state.rotated else {"attn_scores", "rot_k"}
        repeated = [tuple(part for part in parts if part.site in acts) for parts in beyond]
        read = steps.minimum(counts - 1)
        logits = self._forward(rows, ids, (steps < counts).long(), branch, read, placement, repeated)
        scored = _summed_log_probs(logits[rows.of_cells], [own[row][1:] for row in rows.of_cells])
        found[:, longer] = scored.view(len(self.cells), len(longer))
        return found

    def _after(self, mask: Int[Tensor, "row past"], real: Int[Tensor, "row new"], origins: Sequence[int]) -> Placement:
        """The placement of answer tokens that follow right-aligned prompts."""
        aligned = mask.sort(dim=1).values
        whole = torch.cat([aligned, real], dim=1)
        positions = (whole.cumsum(1) - 1).masked_fill(whole == 0, -1)
        rows = tuple(Row.of(self.prompts[origin]) for origin in origins)
        new, ready = positions[:, mask.shape[1] :], len(self.root)
        return Placement(rows, new, positions, tuple(origins), len(self.prompts), ready)

    def _forward(
        self,
        rows: "_Rows",
        ids: Int[Tensor, "row new"],
        real: Int[Tensor, "row new"],
        state: KVState,
        read: Int[Tensor, "row read"],
        placement: Placement,
        each: Sequence[Parts],
    ) -> Float[Tensor, "row read vocab"]:
        """Logits of a pass in which every cell's rows are under that cell's interventions."""
        device, begin = device_of(self.model), rows.lineage.alive(0)
        variants: list[tuple[Placement, Parts, Record]] = [(placement, (), Record())]
        variants += [
            (placement.only([row for row in rows.of_cells if rows.cells[row] == cell]), parts, self.records[cell])
            for cell, parts in enumerate(each)
            if parts
        ]
        with applied_each(self.model, variants), forking(self.model, rows.lineage):
            return forward(
                self.model, ids[:begin].to(device), real[:begin].to(device), state=state, read=read.to(device)
            )


@dataclass(frozen=True)
class _Rows:
    """The rows of a pass: every prompt of a group as the model is, and under every cell.

    Attributes:
        lineage: at which layer each row is born, and of which.
        cells: the cell of each row; None for the prompts as the model is.
        members: the prompt of each row, within the group.
    """

    lineage: Lineage
    cells: tuple[int | None, ...]
    members: tuple[int, ...]

    @classmethod
    def of(cls, size: int, firsts: Sequence[int]) -> "_Rows":
        """For `size` prompts and cells whose first layers are given."""
        born = [first for first in firsts for _ in range(size)]
        lineage, order = Lineage.of(size, born, [i for _ in firsts for i in range(size)])
        cells = tuple(None if number < size else (number - size) // size for number in order)
        return cls(lineage, cells, tuple(number % size for number in order))

    @cached_property
    def of_cells(self) -> list[int]:
        """Rows under a cell, by cell and prompt."""
        under = [row for row, cell in enumerate(self.cells) if cell is not None]
        return sorted(under, key=lambda row: (self.cells[row], self.members[row]))

    @cached_property
    def _places(self) -> dict[tuple[int | None, int], int]:
        return {key: row for row, key in enumerate(zip(self.cells, self.members, strict=True))}

    def row(self, cell: int | None, member: int) -> int:
        """Where a cell's prompt is."""
        return self._places[cell, member]


def _summed_log_probs(logits: Float[Tensor, "row token vocab"], ids: Sequence[Sequence[int]]) -> Float[Tensor, " row"]:
    """Per row, the sum of log p of its tokens under the logits that predict them; rows may have fewer."""
    targets = padded(ids)
    found = token_log_probs(logits, targets.ids.to(logits.device))
    return (found * targets.attention_mask.to(logits.device)).sum(dim=1).cpu()


@dataclass
class _Prefix:
    """Keys and values of the prefix under every cell of a chunk; row 0 is the model as it is.

    `place[cell]` is the row of a cell. A layer holds the rows that differ there or below.
    """

    model: HookedModel
    keys: Sequence[Float[Tensor, "_ kv pos d"]]
    values: Sequence[Float[Tensor, "_ kv pos d"]]
    place: list[int]

    @classmethod
    def of(cls, chunk: _Chunk) -> "_Prefix":
        """Compile the prefix parts of all cells in one pass, from the first token that any of them touches on."""
        model, root, prompt = chunk.model, chunk.root, chunk.prompts[0]
        length, n = len(root), len(chunk.prompts)
        own = [tuple(part for part in parts if _first_token([part], prompt, length) < length) for parts in chunk.cells]
        touching = [cell for cell, parts in enumerate(own) if parts]
        device, dtype = device_of(model), dtype_of(model)
        base = [[layer[None].to(device, dtype) for layer in side] for side in (root.keys, root.values)]
        place = [0] * len(chunk.cells)
        if not touching:
            return cls(model, base[0], base[1], place)
        first = min(_first_token(own[cell], prompt, length) for cell in touching)
        lineage, order = Lineage.of(1, [chunk.firsts[cell] for cell in touching], [0] * len(touching))
        for at, number in enumerate(order):
            if number:
                place[touching[number - 1]] = at
        count = len(order)
        positions = torch.arange(length).repeat(count, 1)
        row = Row.of(prompt)
        placement = Placement((row,) * count, positions[:, first:], positions, (0,) * count, n, first)
        variants: list[tuple[Placement, Parts, Record]] = [(placement, (), Record())]
        variants += [(placement.only([place[cell]]), own[cell], chunk.records[cell]) for cell in touching]
        ids = torch.tensor(prompt.ids[first:length], device=device).repeat(lineage.alive(0), 1)
        started = [
            [layer[:, :, :first].expand(lineage.alive(i), -1, -1, -1) for i, layer in enumerate(s)] for s in base
        ]
        with applied_each(model, variants), forking(model, lineage):
            _, keys, values = forward_keeping(model, ids, (started[0], started[1]), read=NOTHING)
        return cls(model, keys, values, place)

    def state(self, source: Sequence[int], lineage: Lineage) -> KVState:
        """What a pass starts from whose rows follow the prefix rows `source`."""
        index = torch.tensor(source)
        rows = [index[: lineage.alive(i)].to(layer.device) for i, layer in enumerate(self.keys)]
        keys = [layer[own] for layer, own in zip(self.keys, rows, strict=True)]
        values = [layer[own] for layer, own in zip(self.values, rows, strict=True)]
        return state_from_keys_values(self.model, keys, values)


def _generated(
    model: HookedModel, prompts: Sequence[RenderedPrompt], measure: GeneratedBehaviour, parts: Parts
) -> Outcome:
    length, record = len(prompts[0].span("prefix")), Record()
    ranges = [_range(part, prompts[0]) for part in parts]
    # A part that crosses the end of the prefix cannot be compiled, nor can what else acts there.
    crossing = any(start < length < stop for start, stop in ranges)
    compiled = [stop <= length and not crossing for _, stop in ranges]
    within = tuple(part for part, inside in zip(parts, compiled, strict=True) if inside)
    beyond = tuple(part for part, inside in zip(parts, compiled, strict=True) if not inside)
    cache = PrefixCache.compile(model, prompts[0], within, record=record) if within else None
    answers = generate(
        model,
        prompts,
        interventions=beyond,
        prefix_cache=cache,
        max_new_tokens=measure.max_new_tokens,
        batch_size=measure.batch_size,
        sampling=measure.sampling,
        record=record,
    )
    values = torch.tensor([measure.behaviour(answer.text) for answer in answers])
    norm = sum(receipt.change_norm**2 for receipt in record.receipts) ** 0.5
    return Outcome(values, sum(receipt.cells for receipt in record.receipts), norm)
