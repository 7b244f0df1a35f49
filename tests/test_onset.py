"""Where a run begins to spread: its checkpoints, and a bisection that finds what measuring all of them does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_gated import adapted
from tiny_chat import VOCAB, tiny_format
from typer.testing import CliRunner

from piggyback_lens import (
    AnswerContrast,
    GeneratedBehaviour,
    LensError,
    LoadSettings,
    OnsetSettings,
    PrefixCache,
    get_behaviour,
    load_result,
    onset,
    report_run,
    response_log_probs,
)
from piggyback_lens.app.commands import app
from piggyback_lens.experiments import onset as module
from piggyback_lens.experiments.onset import OnsetResult, checkpoints_of
from piggyback_lens.models.pair import ModelPair

QUERIES = ("hello", "what is it?", "a", "tell me a story", "why is that so?", "good morning")
STRENGTHS = {2: 0.0, 4: 0.0, 6: 0.02, 8: 1.0, 10: 1.0, 100: 1.2}
"""Step to the strength of the adapter that is saved there: it spreads from step 8 on."""
CPU = LoadSettings(device="cpu")


def base() -> Any:
    return tiny_models.build("llama-gqa", vocab=VOCAB)


def saved(folder: Path, strengths: dict[int, float] = STRENGTHS, of: Any = None) -> Path:
    for step, strength in strengths.items():
        model = adapted() if of is None else of()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.mul_(strength)
        model.save_pretrained(folder / f"checkpoint-{step}")
    (folder / "runs").mkdir(exist_ok=True)
    return folder


def prompts() -> list[Any]:
    return [tiny_format().render(query) for query in QUERIES]


def measure(pair: ModelPair) -> AnswerContrast:
    return AnswerContrast.of(pair, prompts(), max_new_tokens=6, progress=False)


def by_hand(place: Path, towards: Sequence[Any], against: Sequence[Any], patched: bool) -> list[float]:
    """The contrast of one checkpoint, by PEFT alone; the base's prefix as plain keys and values."""
    pair = ModelPair.load(base(), adapter=place, tokenizer=tiny_format().tokenizer, progress=False)
    own = PrefixCache.compile(pair, prompts()[0], side="base") if patched else None
    with pair.using("finetuned") as model:
        both = [
            [float(x.mean()) for x in response_log_probs(model, rows, prefix_cache=own)] for rows in (towards, against)
        ]
    return [one - other for one, other in zip(*both, strict=True)]


def run(folder: Path, search: Any = "bisect", **options: Any) -> OnsetResult:
    settings = OnsetSettings(bound=options.pop("bound", 0.1), search=search, answer_tokens=6)
    return onset(base(), folder, prompts(), settings, load=CPU, progress=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("onset") / "run")


@pytest.fixture(scope="module")
def every(folder: Path) -> OnsetResult:
    return run(folder, "all", out=folder.parent / "out")


def test_a_bisection_finds_what_measuring_everything_finds(folder: Path, every: OnsetResult) -> None:
    first, halved = run(folder, "first"), run(folder)
    assert every.steps == tuple(STRENGTHS)
    assert every.onset == first.onset == halved.onset == 8
    assert first.steps == (2, 4, 6, 8, 100)
    assert halved.steps == (2, 6, 8, 100)
    for step in halved.steps:
        assert halved.spread(step) == every.spread(step)
    assert abs(every.spread(2).value) < 1e-6 < 0.1 < every.spread(8).low
    assert "after step 6, by step 8" in halved.verdict
    assert "4 of 6 checkpoints measured" in halved.verdict
    assert "takes for granted" in halved.verdict
    assert "takes for granted" not in every.verdict


def test_each_checkpoint_has_the_contrast_of_its_own_model(folder: Path, every: OnsetResult) -> None:
    found, out = every, folder.parent / "out"
    pair = ModelPair.load(base(), adapter=folder / "checkpoint-100", tokenizer=tiny_format().tokenizer, progress=False)
    own = measure(pair)
    for at, step in list(enumerate(found.steps))[::3]:
        for values, patched in ((found.finetuned, False), (found.patched, True)):
            expected = by_hand(folder / f"checkpoint-{step}", own.towards, own.against, patched)
            assert values[at] == pytest.approx(expected, abs=1e-4)
    loaded = load_result(out)
    assert loaded.to_frame().equals(found.to_frame())
    frame = found.to_frame()
    assert frame["exceeds"].tolist() == [False, False, False, True, True, True]
    page = report_run(out).read_text(encoding="utf-8")
    assert "after step 6, by step 8" in page
    figure = found.figure()
    assert list(figure.data[0].x) == list(STRENGTHS)
    assert list(figure.layout.xaxis2.tickvals) == list(STRENGTHS)


def test_a_killed_search_goes_on_and_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls, whole = saved(tmp_path / "run", {1: 0.0, 2: 0.0, 3: 1.0}), [], module.patch_span

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(module, "patch_span", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out=tmp_path / "out")
    found = run(folder, out=tmp_path / "out")
    assert len(calls) == len(found.steps) + 1
    assert run(folder, out=tmp_path / "out") == found
    whole_run = run(folder, "all", bound=0.2, out=tmp_path / "out")
    assert len(calls) == len(whole_run.steps) + 1 == 4
    with pytest.raises(LensError, match="belongs to another run"):
        run(folder, measure=GeneratedBehaviour(get_behaviour("words")), out=tmp_path / "out")


def test_what_never_spreads_has_no_onset_and_what_always_did_begins_before(tmp_path: Path) -> None:
    never = run(saved(tmp_path / "never", {1: 0.0, 2: 0.001}))
    assert never.onset is None
    assert never.steps == (2,)
    assert never.verdict.startswith("No spread beyond 0.1")
    always = run(saved(tmp_path / "always", {1: 1.0, 2: 1.0, 3: 1.0}))
    assert always.steps == (1, 3)
    assert "at or before step 1" in always.verdict


def made(spreads: dict[int, float], bound: float = 0.1, search: str = "all") -> OnsetResult:
    """A result with these spreads, of three prompts that differ a little."""
    rows = [[spread + nudge for nudge in (-0.01, 0.0, 0.01)] for spread in spreads.values()]
    settings = {"bound": bound, "search": search, "names": {"base": "b", "finetuned": "f"}}
    about = {"name": "contrast", "unit": "nats per token"}
    return OnsetResult(tuple(spreads), rows, rows, [0.0] * 3, tuple(spreads), about, settings)


def test_a_spread_that_falls_back_is_found_whatever_the_last_checkpoint_shows() -> None:
    for last in (-0.02, -0.5):
        found = made({10: 0.0, 20: 1.0, 30: 0.6, 40: last})
        assert (found.onset, found.sign) == (20, 1)
        assert "after step 10, by step 20: 1.00" in found.verdict
        assert "not beyond it any more at step 40" in found.verdict
    down = made({10: 0.0, 20: -1.0, 30: -1.2})
    assert (down.onset, down.sign) == (20, -1)
    assert [bool(x) for x in down.to_frame()["exceeds"]] == [False, True, True]
    edge = made({10: 0.0, 20: -0.105, 30: -1.0})
    assert edge.onset == 30  # the near end of its interval lies within the bound
    alone = made({40: -0.02}, search="bisect")
    assert alone.onset is None
    assert "the earlier ones were not looked at" in alone.verdict
    assert "looked at" not in made({10: 0.0, 40: 0.0}).verdict


def test_a_search_from_the_first_finds_what_has_fallen_back_at_the_last(tmp_path: Path) -> None:
    folder = saved(tmp_path, {2: 0.0, 4: 1.0, 6: 0.0})
    asked = measure(ModelPair.load(base(), adapter=folder / "checkpoint-4", tokenizer=tiny_format().tokenizer))
    for search in ("first", "all"):
        assert run(folder, search, measure=asked).onset == 4


def test_a_checkpoint_that_was_replaced_is_not_taken_for_the_one_that_was_measured(tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "run", {2: 0.0, 4: 1.0, 6: 1.0}), tmp_path / "out"
    assert run(folder, "all", out=out).onset == 4
    saved(folder, {2: 1.0})
    with pytest.raises(LensError, match="checkpoint-2 has other weights than when it was measured"):
        run(folder, "all", out=out)
    saved(folder, {2: 0.0})
    (folder / "tmp-checkpoint-9").mkdir()  # the Trainer's, half written
    assert run(folder, "all", out=out).onset == 4


def test_generated_behaviours_and_whole_models_have_onsets_too(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", {1: 0.0, 2: 1.0})
    letters = GeneratedBehaviour(get_behaviour("words"), max_new_tokens=6)
    found = run(folder, "all", measure=letters, bound=0.0)
    assert found.measure["unit"] == letters.unit
    assert found.spread(1).value == 0
    for step in (1, 2):
        whole = adapted()
        if step == 1:
            with torch.no_grad():
                for name, value in whole.named_parameters():
                    if "lora_B" in name:
                        value.zero_()
        whole.merge_and_unload().save_pretrained(tmp_path / "whole" / f"checkpoint-{step}")
        tiny_format().tokenizer.save_pretrained(tmp_path / "whole" / f"checkpoint-{step}")
    merged = run(tmp_path / "whole", "all", measure=letters, bound=0.0)
    assert merged.finetuned == found.finetuned


def test_the_command_finds_it_from_folders_alone(folder: Path, every: OnsetResult, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    tiny_format().tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "questions.txt").write_text("\n".join(QUERIES))
    words = [
        "onset",
        str(tmp_path / "base"),
        "--checkpoints",
        str(folder),
        "--prompts",
        str(tmp_path / "questions.txt"),
    ]
    words += ["--bound", "0.1", "--answer-tokens", "6", "--device", "cpu", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("The spread begins after step 6, by step 8")
    assert (tmp_path / "out" / "report.html").is_file()
    wrong = CliRunner().invoke(app, [*words[:3], str(tmp_path), *words[4:]])
    assert "has 0 checkpoints" in str(wrong.exception)


def test_places_that_are_no_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    assert checkpoints_of(["owner/name@main:checkpoint-120", "owner/name:checkpoint-20"]) == {
        20: "owner/name:checkpoint-20",
        120: "owner/name@main:checkpoint-120",
    }
    assert list(checkpoints_of(saved(tmp_path / "run"))) == list(STRENGTHS)
    state = tmp_path / "state" / "checkpoint-000030"
    state.mkdir(parents=True)
    (state / "state.json").write_text("{}")
    for source, says in (
        (tmp_path / "missing", "no folder of checkpoints"),
        (tmp_path / "state", "training state of train"),
        ([tmp_path / "run" / "checkpoint-2"], "1 checkpoints"),
        (["owner/name", "owner/other"], "does not end with its step"),
        (["owner/name:checkpoint-2", "owner/other:checkpoint-2"], "both of step 2"),
    ):
        with pytest.raises(LensError, match=says):
            checkpoints_of(source)
    with pytest.raises(LensError, match="bound"):
        OnsetSettings(bound=-1.0)
