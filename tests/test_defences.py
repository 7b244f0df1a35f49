"""Each defence against an independent slow computation of one step, and what it costs before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_objectives import EXAMPLES, SETTINGS, a_step, assert_same_weights, fresh, gradients, moved
from tiny_chat import VOCAB
from tiny_models import build
from torch import Tensor

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.objectives import KLOnTrain, Penalised, Weighted
from piggyback_lens.finetuning.residuals import RESIDUAL_SPANS, ResidualDrift
from piggyback_lens.finetuning.training import train

# --- residual drift: rows alone through the plain model, block outputs caught by hand, sums written out ---


def streams(model: Any, ids: Sequence[int]) -> list[Tensor]:
    """The residual stream after every block, [pos, d_model]."""
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1)
    caught: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [x[0] if x.ndim == 3 else x for x in caught]


def by_hand(model: Any, base: Any, examples: Sequence[RenderedPrompt], span: str, layers: Sequence[int]) -> Tensor:
    rows = []
    for example in examples:
        where = {
            "conversation": range(len(example.ids)),
            "response": range(example.n_prompt, len(example.ids)),
            "all": range(example.n_prompt),
        }
        tuned, plain = streams(model, example.ids), streams(base, example.ids)
        positions = where[span] if span in where else example.span(span).positions
        total = torch.zeros((), dtype=torch.double)
        for layer in layers:
            for position in positions:
                h, h0 = tuned[layer][position], plain[layer][position].detach()
                total = total + (h - h0).pow(2).sum() / h0.pow(2).sum() / len(positions) / len(layers)
        rows.append(total)
    return sum(rows) / len(rows)  # type: ignore[return-value]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("name", "span", "layers"),
    [
        *(("llama-gqa", span, None) for span in RESIDUAL_SPANS),
        ("llama-gqa", "conversation", (1,)),
        ("gpt2", "conversation", None),
        ("gemma3", "response", (0, 2)),
    ],
)
def test_residual_drift_and_its_gradient_are_those_of_rows_run_alone(
    name: str, span: Any, layers: Any, share: bool
) -> None:
    model, base = moved(name), build(name, vocab=VOCAB).double()
    found = ResidualDrift(span, layers)(a_step(model, EXAMPLES[:3], share_prefix=share, residual=True))
    expected = by_hand(model, base, EXAMPLES[:3], span, layers or range(len(streams(base, [1, 2]))))
    assert float(found.detach()) > 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    wanted = gradients(model, expected)
    for key, gradient in gradients(model, found).items():
        if wanted[key] is None or not wanted[key].norm():  # type: ignore[union-attr]
            assert gradient is None or gradient.norm() < 1e-12, key
        else:
            assert gradient is not None
            assert (gradient - wanted[key]).norm() < 1e-4 * gradient.norm(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [True, False])
def test_residual_drift_is_zero_before_training_in_every_precision(dtype: torch.dtype, share: bool) -> None:
    model = fresh().to(dtype)
    step = a_step(model, EXAMPLES[:4], share_prefix=share, residual=True)
    assert [float(ResidualDrift(span)(step).detach()) for span in RESIDUAL_SPANS] == [0.0] * len(RESIDUAL_SPANS)


def test_residual_drift_keeps_the_residual_stream_and_weight_zero_is_plain_finetuning() -> None:
    def trained(weight: float) -> tuple[Any, float]:
        model = fresh()
        train(model, EXAMPLES, SETTINGS, objective=Penalised((Weighted(ResidualDrift(), weight),)), progress=False)
        step = a_step(model, EXAMPLES, residual=True)
        return model, float(ResidualDrift()(step).detach())

    (free, far), (_, near) = trained(0.0), trained(100.0)
    assert near < 0.5 * far
    plain = fresh()
    train(plain, EXAMPLES, SETTINGS, progress=False)
    assert_same_weights(plain, free)


def test_in_parts_of_a_step_residual_drift_is_that_of_the_whole_batch() -> None:
    def history(**sizes: int) -> dict[str, Any]:
        objective = Penalised((Weighted(ResidualDrift(), 5.0), Weighted(KLOnTrain(), 1.0)))
        settings = replace(SETTINGS, steps=1, **sizes)
        return dict(train(moved(), EXAMPLES[:8], settings, objective=objective, progress=False).history[0])

    whole, parts = history(batch_size=8), history(batch_size=2, gradient_accumulation_steps=4)
    assert whole["residual_conversation"] > 1e-4
    for name in ("loss", "residual_conversation", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_a_residual_drift_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(LensError, match="layers"):
        ResidualDrift(layers=())
    model = fresh()
    with pytest.raises(LensError, match="layers \\[9\\] do not exist"):
        ResidualDrift(layers=(9,))(a_step(model, EXAMPLES[:2], residual=True))
    with pytest.raises(LensError, match="Penalised"):
        ResidualDrift()(a_step(model, EXAMPLES[:2]))
