"""Files that 0.1.0 wrote (in written_by_0_1_0, from its own code on tiny models) still load and give its numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_chat import VOCAB, tiny_examples, tiny_format

from piggyback_lens.app.converting import convert
from piggyback_lens.directions.curve_points import Curve
from piggyback_lens.directions.sweeps import Sweep
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.attribution import AttributionResult
from piggyback_lens.experiments.audit import AuditResult
from piggyback_lens.experiments.perturbation import PerturbResult
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.experiments.stress_suite import StressResult
from piggyback_lens.finetuning.objectives import Penalised, TReFT, Weighted
from piggyback_lens.finetuning.references import kv_reference, prefix_batch, prefix_drift, reference_settings
from piggyback_lens.finetuning.steps import forward_step
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.settings import LoRASettings, TrainSettings
from piggyback_lens.vectors.direction import Direction

OLD = Path(__file__).parent / "written_by_0_1_0"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
EXAMPLES = tiny_examples(8)
SETTINGS = TrainSettings(steps=6, batch_size=4, learning_rate=3e-3, checkpoint_every=3)


def resumed(folder):
    """The organism that 0.1.0 began to train in the folder, and how it went on."""
    model = add_lora(tiny_models.build("llama-gqa", 0, vocab=VOCAB), LoRASettings(rank=2))
    objective = Penalised((Weighted(TReFT.on(model, EXAMPLES[0]), 30.0),))
    return model, train(model, EXAMPLES, SETTINGS, objective=objective, out=folder, progress=False)


def test_a_run_that_0_1_0_began_is_resumed_to_its_own_numbers_and_its_prefix_cache_serves(tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    model, result = resumed(tmp_path / "run")
    assert result.resumed_from == 3
    assert [row["loss"] for row in result.history] == pytest.approx(EXPECTED["losses"], rel=1e-4)
    pair, prompt = ModelPair.load(finetuned=model, tokenizer=tiny_format().tokenizer), tiny_format().render("one")
    with pair.using("finetuned") as hooked:
        cache = PrefixCache.load(OLD / "prefix_cache", model=hooked, prompt=prompt)
        answers = generate(hooked, [prompt], prefix_cache=cache, max_new_tokens=6)
    assert [list(answer.ids) for answer in answers] == EXPECTED["answers"]
    now = PrefixCache.compile(pair, prompt, side="base")
    torch.testing.assert_close(cache.keys, now.keys)
    assert (cache.span, cache.rotated) == ("prefix", True)


@pytest.mark.parametrize("span", ["prefix", "postfix"])
def test_the_bases_keys_and_values_that_0_1_0_kept_for_training_are_those_of_today(span):
    plain = tiny_models.build("llama-gqa", 0, vocab=VOCAB)
    old, now = PrefixCache.load(OLD / f"reference_{span}"), kv_reference(plain, tiny_format().render("one"), span)
    assert (old.span, old.ids, old.rotated) == (now.span, now.ids, now.rotated) == (span, now.ids, span == "prefix")
    assert reference_settings(old) == reference_settings(now)
    if span == "prefix":
        with torch.no_grad():
            moved = torch.nn.utils.parameters_to_vector(plain.parameters())
            torch.nn.utils.vector_to_parameters(moved * 1.05, plain.parameters())
            output = forward_step(plain, prefix_batch(now.ids, "cpu"))
        torch.testing.assert_close(prefix_drift(output, old), prefix_drift(output, now))
        assert float(prefix_drift(output, old).min()) > 1e-4


def test_a_direction_of_0_1_0_loads():
    direction = Direction.load(OLD / "direction.safetensors")
    assert (direction.layers, direction.site, direction.sign) == ((0, 2), "resid_post", "positive: shows it")
    assert torch.equal(direction.vectors, torch.arange(64.0).view(2, 32) / 64)


# ---------------------------------------------------------------- results

RESULTS = OLD / "results"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_results_of_0_1_0_are_brought_over_with_their_numbers(tmp_path: Path) -> None:
    written = convert(RESULTS, tmp_path / "new")
    kinds = {
        "attribution": AttributionResult, "layer_curve": PatchResult, "perturb.json": PerturbResult,
        "stress.json": StressResult, "sweep.json": Sweep, "curve.json": Curve, "audit": AuditResult,
    }  # fmt: skip
    places = {name: tmp_path / "new" / name for name in kinds}
    assert len(written) == len(kinds)
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        file = places[name] / "result.json" if places[name].is_dir() else places[name]
        assert file in written
        found[name] = kind.load(places[name] if kind is AuditResult else file)
        assert len(found[name].to_frame())
        assert found[name].figure().data
    old = read(RESULTS / "layer_curve" / "result.json")
    assert (found["layer_curve"].values, found["layer_curve"].base) == (old["values"], old["base"])
    cells = [
        {name: cell[name] for name in cell if name != "flow"} | {"direction": cell["flow"]}
        for cell in found["layer_curve"].cells
    ]
    assert cells == old["cells"]
    old = read(RESULTS / "attribution" / "attribution.json")
    assert found["attribution"].attributed.values == old["attributed"]["values"]
    assert found["attribution"].exact.values == old["exact"]["values"]
    for name in ("perturb.json", "stress.json"):
        assert found[name].rows == read(RESULTS / name)["rows"]
    assert [list(p.behaviour) for p in found["sweep.json"].points] == [
        p["behaviour"] for p in read(RESULTS / "sweep.json")["points"]
    ]
    audit, old = found["audit"], read(RESULTS / "audit" / "results.json")
    for new, before in zip(audit.to_frame().to_dict("records"), old["summary"], strict=True):
        assert (new["topic"], new["condition"], new["value"]) == (before["topic"], before["condition"], before["mean"])
    assert audit.curve is not None
    assert audit.curve.values == read(RESULTS / "audit" / "layer_curve.json")["values"]
    assert PrefixCache.load(tmp_path / "new" / "audit" / "prefix_cache").span == "prefix"


def test_what_is_not_brought_over_is_said(tmp_path: Path) -> None:
    with pytest.raises(LensError, match="says no format"):
        PatchResult.load(RESULTS / "layer_curve" / "result.json")
    (tmp_path / "there").mkdir()
    with pytest.raises(LensError, match="is there already"):
        convert(RESULTS, tmp_path / "there")
    (tmp_path / "strange.json").write_text('{"a": 1}')
    with pytest.raises(LensError, match=r"no result that 0\.1\.0 wrote"):
        convert(tmp_path / "strange.json", tmp_path / "new.json")
    with pytest.raises(LensError, match="no finished result"):
        convert(tmp_path / "there", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    damaged = read(RESULTS / "layer_curve" / "result.json") | {"base": ["x"]}
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    with pytest.raises(LensError, match="is no PatchResult"):
        convert(tmp_path / "damaged.json", tmp_path / "new.json")
