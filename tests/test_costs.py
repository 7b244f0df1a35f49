"""What a pass costs is measured once, kept, and held to by a run that is resumed."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_training import EXAMPLES, SETTINGS, Killed, fresh, kill_at, without_seconds
from tiny_chat import VOCAB
from tiny_models import NAMES, build

from piggyback_lens.finetuning.training import TrainResult, train
from piggyback_lens.models import costs
from piggyback_lens.models.packing import Costs, assumed, costing, costs_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIGGYBACK_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs.json"


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_measured_and_left_as_it_was(name: str) -> None:
    model = build(name, vocab=VOCAB)
    state = torch.get_rng_state()
    found = costs.measured(model)
    assert found.launch > 0
    assert found.token > 0
    assert found.pair >= 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(value.grad is None for value in model.parameters())


def test_what_was_measured_is_kept_and_a_damaged_file_is_written_anew(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama-gqa", vocab=VOCAB)
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("{")
    first = costs.known_costs(model)
    assert list(json.loads(own_cache.read_text()).values()) == [vars(first)]
    monkeypatch.setattr(costs, "measured", lambda _model: pytest.fail("measured again"))
    assert costs.known_costs(build("llama-gqa", 1, vocab=VOCAB)) == first
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        costs.known_costs(build("qwen3", vocab=VOCAB))  # another kind of block


def test_costs_are_used_for_a_while() -> None:
    model = build("llama-gqa", vocab=VOCAB)
    usual = costs_of(model)
    assert usual == assumed(torch.device("cpu"), 32)
    with costing(model, Costs(1.0, 2.0, 3.0)), costing(model, Costs(4.0, 5.0, 6.0)):
        assert costs_of(model) == Costs(4.0, 5.0, 6.0)
    assert costs_of(model) == usual


def test_a_resumed_run_keeps_to_its_costs_and_the_result_states_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_pass, packs = Costs(1e9, 1.0, 0.0), Costs(0.0, 1.0, 0.0)
    monkeypatch.setattr("piggyback_lens.finetuning.training.known_costs", lambda _model: packs)
    whole = train(fresh(), EXAMPLES, SETTINGS, out=tmp_path / "whole")
    with suppress(Killed):
        train(fresh(), EXAMPLES, SETTINGS, out=tmp_path / "killed", on_step=kill_at(4))
    monkeypatch.setattr("piggyback_lens.finetuning.training.known_costs", lambda _model: one_pass)
    resumed = train(fresh(), EXAMPLES, SETTINGS, out=tmp_path / "killed")
    assert without_seconds(resumed) == without_seconds(whole)
    assert TrainResult.load(tmp_path / "killed" / "result.json").plan == whole.plan
    assert whole.plan["costs"] == vars(packs)
    assert whole.plan["passes"]["packed"] > SETTINGS.steps / 2
    assert sum(whole.plan["passes"].values()) == SETTINGS.steps


def test_the_first_measurement_is_everybodys(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes measure at once: the later one keeps to what the earlier one wrote meanwhile."""
    model, other = build("llama-gqa", vocab=VOCAB), Costs(1.0, 2.0, 3.0)

    def measured(model: torch.nn.Module) -> Costs:
        own_cache.parent.mkdir(parents=True)
        own_cache.write_text(json.dumps({costs._key(model): vars(other)}))
        return Costs(4.0, 5.0, 6.0)

    monkeypatch.setattr(costs, "measured", measured)
    assert costs.known_costs(model) == other == costs.known_costs(model)
