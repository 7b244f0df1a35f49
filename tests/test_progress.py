"""Progress: which calls show a line, that they fill it, that `progress=` decides, what terminals and kernels get."""

import functools
import inspect
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import test_devices as devices
import tiny_hooked
from loopback_server import Said, serving
from rich.console import Console

import piggyback_lens as lens
from piggyback_lens import progress
from piggyback_lens.app.curve_job import draw_curves
from piggyback_lens.app.maps import run_maps
from piggyback_lens.progress import counting, shows, track

pytestmark = pytest.mark.usefixtures("unchecked")

# ---------------------------------------------------------------- every long call


class Recorder(progress._Screen):
    """A screen that keeps what it was given."""

    lines: ClassVar[list[progress._Line]] = []
    ends: ClassVar[list[str]] = []

    def begin(self, line: progress._Line) -> None:
        self.lines.append(line)

    def end(self) -> None:
        pass

    def draw(self, line: progress._Line) -> None:
        raise AssertionError

    def close(self, how: str) -> None:
        self.ends.append(how)


@pytest.fixture
def lines(monkeypatch) -> list[progress._Line]:
    """What a watcher is shown."""
    watched(monkeypatch)
    return Recorder.lines


def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "shown", lambda: True)
    monkeypatch.setattr(progress, "_Terminal", Recorder)
    Recorder.lines, Recorder.ends = [], []


def public() -> dict[str, Any]:
    """Public functions, and the public methods and constructors that run models."""
    named = {name: getattr(lens, name) for name in lens.__all__}
    named |= {f"saes.{name}": getattr(lens.saes, name) for name in lens.saes.__all__}
    found = {name: value for name, value in named.items() if inspect.isfunction(value)}
    for name, kind in named.items():
        if inspect.isclass(kind):
            members = inspect.getmembers(kind, inspect.isroutine)
            found |= {f"{name}.{m}": f for m, f in members if m[0] != "_" and own_code(f)}
    return found


def own_code(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("piggyback_lens")


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:
        return {}


RUNS_MODELS = {"model", "hf_model", "pair", "organisms", "endpoint", "judges", "requests"}
SHORT = {
    "a value is made, or hooks are put on": (
        "LoRAAdapter.fresh", "LoRAAdapter.merged", "Direction.is_of", "Direction.check", "Intervention.fwd_hooks",
        "Interventions.fwd_hooks", "Sampling.of_model", "add_lora", "applied", "attach_adapter", "attached",
        "saes.ablate_latent", "saes.Latents.check", "Judge.of_questions",
    ),
    "one prompt or one batch": (
        "PrefixCache.compile", "PrefixCache.compile_many", "PrefixCache.check", "PrefixCache.state", "PrefixCache.load",
        "kv_patch", "logit_lens", "mean_norms", "prefix_activations", "span_activations", "TReFT.on",
    ),
    "a step of a training that shows one": (
        "Monitor.measure", "Monitor.measure_base", "PenaltyMixin.training_step", "PenaltyMixin.compute_loss",
        "PenaltyTrainer.training_step", "PenaltyTrainer.compute_loss", "PenaltyMixin.prediction_step",
        "PenaltyTrainer.prediction_step",
    ),
    "files; downloads of sae-lens have bars of their own": ("saes.load_sae",),
    "nothing is sent": ("Endpoint.estimate",),
}  # fmt: skip


def test_every_public_call_that_runs_models_has_progress_on_by_default_or_is_short():
    short = {name for names in SHORT.values() for name in names}
    calls = public()
    assert short <= calls.keys()
    for name, function in calls.items():
        own = parameters(function)
        if "progress" in own:
            assert own["progress"].default is True, name
            assert own["progress"].kind is inspect.Parameter.KEYWORD_ONLY, name
            assert hasattr(inspect.unwrap(function, stop=lambda f: hasattr(f, "shows")), "shows"), name
        elif RUNS_MODELS & set(own):
            assert name in short, f"{name} runs a model and shows nothing: give it progress=, or say why it is short"


@functools.cache
def shown_by(experiment: Callable[[devices.Here], Any]) -> dict[str, list[progress._Line]]:
    """The lines of every public call of an experiment."""
    found: dict[str, list[progress._Line]] = {}

    def proxy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            before, began = len(Recorder.lines), len(Recorder.ends)
            result = function(*args, **kwargs | {"progress": True})
            if len(Recorder.ends) > began:  # not a call within another
                found.setdefault(name, []).extend(Recorder.lines[before:])
            return result

        return called

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        watched(patch)
        for name, function in public().items():
            home, _, own = name.rpartition(".")
            if "progress" in parameters(function) and home in ("", "saes"):
                patch.setattr(lens.saes if home else lens, own, proxy(name, function))
        experiment(devices.Here(devices.CPU, "bridge", Path(folder)))
    return found


RUN = {
    "generate": devices.generating, "response_log_probs": devices.scoring, "nll": devices.scoring,
    "contrast": devices.scoring, "kl_to_base": devices.scoring, "adapter_scalars": devices.adapters,
    "patch_span": devices.patching, "layer_curve": devices.patching, "layer_position_map": devices.patching,
    "layer_head_map": devices.patching, "carrier_map": devices.patching, "attribution_map": devices.attributing,
    "edge_map": devices.attributing, "soft_patch": devices.patching_softly,
    "perturb": devices.perturbing, "stress": devices.stressing, "audit": devices.auditing,
    "mean_difference": devices.extracting, "model_difference": devices.extracting,
    "contrast_pairs": devices.extracting, "steer": devices.steering_, "ablate_sweep": devices.steering_,
    "strength_for_kl": devices.steering_, "efficiency": devices.curves, "stability": devices.curves,
    "significance": devices.curves, "ablation_cost": devices.curves, "transfer_matrix": devices.transferring,
    "train": devices.training_hooks, "train_direction": devices.direction_jobs, "load_causal_lm": devices.loading,
    "hook_model": devices.loading, "onset": devices.onsets,
    "compare_methods": devices.comparing, "saes.train_sae": devices.sparse_autoencoders,
    "saes.fit_latents": devices.sparse_autoencoders, "saes.attribute_latents": devices.sparse_autoencoders,
}  # fmt: skip
BELOW = {
    "ModelPair.load", "AnswerContrast.of", "Endpoint.ask", "Judge.score", "LocalJudge.score", "judge_run",
    "sample_endpoint", "demo",
}  # fmt: skip


def test_every_call_with_progress_is_run_here():
    assert {name for name, own in public().items() if "progress" in parameters(own)} == RUN.keys() | BELOW


@pytest.mark.parametrize("name", RUN)
def test_a_long_call_shows_lines_of_its_label_and_fills_them(name):
    if name.startswith("saes."):
        pytest.importorskip("sae_lens", reason="the extra sae is not installed")
    lines = shown_by(RUN[name])[name]
    label = public()[name].shows
    assert lines
    assert {line.label.partition(":")[0] for line in lines} == {label}
    assert all(line.done == line.total for line in lines if line.total), [(x.label, x.count) for x in lines]


def test_loading_a_pair_shows_what_it_reads_and_checks(lines, tmp_path):
    devices.tiny_pairs.weights("llama-gqa", "base").save_pretrained(tmp_path)
    devices.CHAT.tokenizer.save_pretrained(tmp_path)
    tuned = devices.tiny_pairs.weights("llama-gqa", "finetuned")
    lens.ModelPair.load(tmp_path, tuned, tokenizer=devices.CHAT.tokenizer, offline=True)
    labels = [line.label for line in lines]
    assert labels[0] == "loading: weights"
    assert f"loading: hooking and checking {tmp_path.name}" in labels
    assert lines[0].done == lines[0].total > 10
    assert Recorder.ends == ["loading: done in"]


def test_a_contrast_says_whose_answers_it_makes(lines):
    pair = devices.hooked_pair(devices.CPU, "bridge")
    lens.AnswerContrast.of(pair, devices.PROMPTS, max_new_tokens=2)
    assert [line.label for line in lines] == ["contrast: finetuned answers", "contrast: base answers"]


def test_a_server_and_its_judges_count_their_requests(lines, tmp_path, capsys):
    pytest.importorskip("openai")
    rows = [{"prompt": "why", "response": f"because {i}", "topic": "t", "index": i} for i in range(3)]
    with serving(lambda *_: Said("70")) as server:
        there = lens.Endpoint(server.url, "m", key_variable=None)
        there.ask(["one", "two"])
        judge = lens.Judge(there, "aligned")
        judge.score(rows)
        lens.judge_run(rows, [judge], tmp_path / "scores.jsonl")
        lens.sample_endpoint(there, ["a", "b"], condition="base", out=tmp_path / "answers.jsonl")
        assert [(line.label.partition(":")[0], line.done) for line in lines] == [
            ("requests", 2), ("scores", 3), ("judging", 3), ("answers", 2),
        ]  # fmt: skip
        lines.clear()
        capsys.readouterr()
        judge.score([{"prompt": "why", "response": "no"}], progress=False)
    assert lines == []
    assert capsys.readouterr().err == ""


def test_a_judge_in_this_process_counts_its_answers(lines):
    judge = lens.LocalJudge(tiny_hooked.hooked("llama-gqa", "bridge"), devices.CHAT)
    judge.score([{"prompt": "so", "response": "what"}] * 2)
    assert [line.count for line in lines] == ["2 of 2"]


def test_the_jobs_of_the_command_line_name_their_parts(lines, tmp_path):
    pair = devices.hooked_pair(devices.CPU, "bridge")
    settings = lens.MapSettings(kinds=("layers",), answer_tokens=2)
    run_maps(pair, tiny_hooked.prompts(("what", "how so", "so")), settings, out=tmp_path / "map")
    two = lens.CurveSettings(fractions=(0.0, 1.0), n_random=1)
    with pair.using("base") as model:
        draw_curves(model, {"a": devices.direction()}, devices.EXAMPLES, (), ("efficiency",), two, out=tmp_path / "c")
    labels = {line.label for line in lines}
    assert {"map: layers", "curves: efficiency"} <= labels


def test_nothing_is_shown_where_nobody_watches_or_progress_is_off(lines, monkeypatch, capsys):
    model = tiny_hooked.hooked("llama-gqa", "bridge")
    lens.generate(model, devices.PROMPTS, max_new_tokens=2, progress=False)
    pair = devices.hooked_pair(devices.CPU, "bridge")
    queries = ["one", "two", "or"]
    settings = lens.AuditSettings(max_new_tokens=2, curve_prompts=0, map_bands=0)
    lens.audit(pair, queries, queries, "words", settings, chat=devices.CHAT, progress=False)
    assert lines == []
    monkeypatch.setattr(progress, "shown", lambda: False)
    lens.generate(model, devices.PROMPTS, max_new_tokens=2)
    assert lines == []
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- one line at a time


@shows("inner")
def inner(n: int = 3, *, progress: bool | str = True) -> None:
    for _ in track(range(n)):
        pass


@shows("outer")
def outer(*, inside: bool | str = True, loop: bool = False, progress: bool | str = True) -> None:
    if not loop:
        inner(progress=inside)
        return
    with counting(2, "rounds") as advance:
        for _ in range(2):
            inner(progress=inside)
            advance(1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["outer"]),
        ({"inside": "part"}, ["outer: part"]),
        ({"inside": False}, []),
        ({"progress": False}, []),
        ({"progress": False, "inside": "part"}, []),
        ({"progress": "mine", "inside": "part"}, ["mine: part"]),
        ({"loop": True}, ["outer: rounds"]),
        ({"loop": True, "inside": "part"}, ["outer: rounds"]),
    ],
)
def test_the_outermost_call_names_the_line_and_progress_decides(options, expected, lines):
    outer(**options)
    assert [line.label for line in lines] == expected
    lines.clear()
    inner(2)  # nothing is left behind
    assert [(line.label, line.count) for line in lines] == [("inner", "2 of 2")]


def test_a_call_that_fails_leaves_the_next_one_its_line(lines):
    @shows("broken")
    def broken() -> None:
        for _ in track(range(5)):
            raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        broken()
    inner()
    assert Recorder.ends == ["broken: stopped after", "inner: done in"]
    assert [line.count for line in lines] == ["0 of 5", "3 of 3"]


def test_sizes_are_counted_and_the_time_left_follows_them(lines):
    @shows("sized")
    def sized() -> list[float | None]:
        left = []
        for _ in track("ab", sizes=[3, 1]):
            left.append(Recorder.lines[-1].left)
            time.sleep(0.06)
        return [*left, Recorder.lines[-1].left]

    nothing_done, after_three, at_the_end = sized()
    assert nothing_done is None
    assert 0.005 < after_three < 0.08  # a third of the 0.06 s that three of four took
    assert at_the_end == 0
    assert lines[0].times.startswith("4 of 4, 0:00 gone")


def test_an_unknown_total_is_counted_without_an_end(lines):
    @shows("stream")
    def stream() -> None:
        with counting(None) as advance:
            advance(7)

    stream()
    assert (lines[0].count, lines[0].left) == ("7", None)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_times_are_written_as_a_clock_shows_them(seconds, text):
    assert progress._clock(seconds) == text


# ---------------------------------------------------------------- screens


def test_a_terminal_sees_a_bar_with_its_count_while_it_runs_and_nothing_afterwards(monkeypatch):
    stream = io.StringIO()
    console = functools.partial(Console, file=stream, force_terminal=True, width=100)
    monkeypatch.setattr("rich.console.Console", lambda **_: console())
    monkeypatch.setattr(progress, "shown", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)

    @shows("walking [b]")
    def walking() -> None:
        for _ in track(range(2)):
            time.sleep(0.1)

    walking()
    seen = stream.getvalue()
    assert "walking [b]" in seen
    assert "of 2, 0:00 gone" in seen
    assert seen.endswith("\x1b[2K")  # the line is erased


class Kernel:
    """What IPython is in a kernel: a shell with a kernel, and display."""

    def __init__(self) -> None:
        self.kernel, self.shown = object(), []

    def display(self, data: dict[str, str], *, raw: bool, display_id: str, update: bool) -> None:
        assert raw
        self.shown.append((display_id, update, data))


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    own = Kernel()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: own))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=own.display))
    monkeypatch.setattr(progress, "TICK", 0.02)
    return own


def test_a_notebook_gets_one_output_that_is_drawn_again(kernel, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)

    @shows("walking <b>")
    def walking() -> None:
        for _ in track(range(2), "slowly"):
            time.sleep(0.1)

    walking()
    places, updates, data = zip(*kernel.shown, strict=True)
    assert len(set(places)) == 1
    assert updates == (False, *[True] * (len(updates) - 1))
    assert len(updates) > 3  # the clock goes on within a step
    assert "walking &lt;b&gt;: slowly" in data[0]["text/html"]
    assert "<progress" in data[0]["text/html"]
    assert "value=" not in data[0]["text/html"]  # nothing is done: the browser's bar moves to and fro
    assert any('max="2" value="1"' in own["text/html"] for own in data)
    assert any("1 of 2" in own["text/plain"] and "█" in own["text/plain"] for own in data)
    assert data[-1]["text/plain"] == "walking <b>: done in 0:00"
    assert "<progress" not in data[-1]["text/html"]


def test_what_is_done_at_once_leaves_no_output_in_a_notebook(kernel):
    inner()
    assert kernel.shown == []


def test_a_notebook_keeps_where_a_call_was_stopped(kernel, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)

    @shows("walking")
    def walking() -> None:
        for i in track(range(3)):
            time.sleep(0.05)
            if i == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walking()
    assert kernel.shown[-1][2]["text/plain"] == "walking: stopped after 0:00, at 1 of 3 (walking)"


def test_stages_are_ordinary_output_in_a_notebook_and_on_standard_error_elsewhere(kernel, monkeypatch, capsys):
    progress.say_stage("zero")
    progress.say("one\x1b[31m")
    monkeypatch.delitem(sys.modules, "IPython")
    progress.say("two")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("one\\x1b[31m\n", "two\n")
