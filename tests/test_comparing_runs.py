"""How the cells of a comparison run: deadlines, failures, several processes, what identifies a folder, and figures."""

import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_chat
import tiny_models
from filelock import FileLock
from test_comparing import LORA, RETAIN, TRAINING, by_hand, call, compare, made_up, tiny_task

import piggyback_lens.comparisons.comparison_cells as cells_module
from piggyback_lens import engines
from piggyback_lens.comparisons.comparison import Comparison
from piggyback_lens.comparisons.comparison_cells import check_cells, train_settings, training_examples
from piggyback_lens.comparisons.comparison_plan import Cell, Plan, cell_folder
from piggyback_lens.comparisons.methods import Ingredients, InterleavePart, Method, TReFTPart, parse_method, set_up
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.models.sources import weights_fingerprint
from piggyback_lens.settings import CompareSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), 0)


def saved_model(folder, seed):
    tokenizer = tiny_chat.tiny_tokenizer()
    tiny_models.build("llama-gqa", seed, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- jobs on executors -----------------------------------------------------------------------------------


def noted(log, name, seconds=0.0):
    log.append(name)
    time.sleep(seconds)
    return name


def failing(error):
    raise error


@pytest.fixture
def late(monkeypatch):
    """The deadline passes when this is set."""
    event = threading.Event()
    monkeypatch.setattr(engines, "passed", lambda deadline: event.is_set())
    return event


def last_in_time(log, name, together, late):
    """Begins, waits for those that run beside it, and lets the deadline pass."""
    log.append(name)
    together.wait(10)
    late.set()
    return name


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_after_the_deadline_what_runs_is_finished_and_nothing_begun(late, workers):
    log, together = [], threading.Barrier(workers or 1)
    jobs = [(last_in_time, log, name, together, late) for name in range(6)]
    executor = workers and ThreadPoolExecutor(workers)
    found = dict(engines.finished(jobs, executor, time.time() + 100))
    assert sorted(log) == sorted(found) == list(range(workers or 1))


class Prefetching(ThreadPoolExecutor):
    """As a pool of processes: jobs count as running, and cannot be cancelled, before a worker is free for them."""

    def submit(self, fn, /, *args):
        outer = Future()
        outer.set_running_or_notify_cancel()
        super().submit(fn, *args).add_done_callback(lambda inner: outer.set_result(inner.result()))
        return outer


def test_a_job_that_a_pool_has_fetched_before_the_deadline_is_not_begun_after_it(late):
    log, together = [], threading.Barrier(1)
    jobs = [(last_in_time, log, name, together, late) for name in range(3)]
    with Prefetching(1) as executor:
        found = dict(engines.finished(jobs, executor, time.time() + 100))
    assert log == list(found) == [0]


class Silent(engines.Executor):
    """Its futures never say that they are running, and nobody hears of their cancellation: as Ray's own."""

    def submit(self, fn, /, *args):
        future = Future()
        delay = 0.1 if args[-1] == "first" else 60.0
        timer = threading.Timer(delay, lambda: future.cancelled() or future.set_result(args[-1]))
        timer.daemon = True
        timer.start()
        return future


def test_jobs_cancelled_at_the_deadline_are_not_waited_for():
    began = time.monotonic()
    found = dict(engines.finished([(noted, "first"), (noted, "later")], Silent(), time.time() + 2))
    assert found == {0: "first"}
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("workers", [None, 2])
def test_a_failing_job_stops_no_other_and_ctrl_c_stops_all(workers):
    executor, wrong = workers and ThreadPoolExecutor(workers), RuntimeError("wrong")
    log = []
    found = dict(engines.finished([(noted, log, "a"), (failing, wrong), (noted, log, "b")], executor))
    assert found == {0: "a", 1: wrong, 2: "b"}
    with pytest.raises(KeyboardInterrupt):
        list(engines.finished([(failing, KeyboardInterrupt()), *[(noted, log, "c", 0.2)] * 40], executor))
    time.sleep(0.5)
    assert log.count("c") < 40


def test_a_pool_that_takes_no_more_jobs_fails_them_one_by_one():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    found = dict(engines.finished([(noted, [], "a")], executor))
    assert "cannot schedule" in str(found[0])


class FakeRay:
    """What the executor uses of Ray; tasks run when `go` is called."""

    def __init__(self):
        self.asked, self.cancelled, self.tasks = [], [], []

    def is_initialized(self):
        return True

    def remote(self, **resources):
        self.asked.append(resources)

        def of(function):
            def start(*args):
                inner = Future()
                self.tasks.append((inner, function, args))
                return SimpleNamespace(future=lambda: inner, inner=inner)

            return SimpleNamespace(remote=start)

        return of

    def cancel(self, reference):
        self.cancelled.append(reference.inner)
        reference.inner.set_exception(RuntimeError("cancelled"))

    def go(self):
        for inner, function, args in self.tasks:
            try:
                inner.set_result(function(*args))
            except Exception as error:
                told = RuntimeError(f"many lines\n{error}")
                told.cause = error
                inner.set_exception(told)
        self.tasks.clear()


@pytest.fixture
def fake_ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def test_resources_reach_ray(fake_ray):
    engines.ray(num_gpus_per_cell=0.25, num_cpus_per_cell=2.0).submit(noted, [], "a")
    assert fake_ray.asked == [{"num_gpus": 0.25, "num_cpus": 2}]


def test_a_ray_task_is_running_and_gives_its_own_result_or_error(fake_ray):
    executor = engines.ray()
    good, bad = executor.submit(noted, [], "a"), executor.submit(failing, LensError("short"))
    assert good.running()
    assert not good.cancel()
    fake_ray.go()
    assert good.result(0) == "a"
    with pytest.raises(LensError, match=r"^short$"):
        bad.result(0)


def test_ray_tasks_that_run_at_the_deadline_are_waited_for(fake_ray):
    threading.Timer(0.5, fake_ray.go).start()
    log, running = [], engines.ray()
    began = time.monotonic()
    assert list(engines.finished([(noted, log, "a")], running, time.time() + 0.2)) == []  # it comes too late to begin
    assert 0.4 < time.monotonic() - began < 30
    assert not fake_ray.cancelled


def test_an_error_inside_the_with_block_cancels_ray_s_tasks(fake_ray):
    executor = engines.ray()
    executor.submit(noted, [], "a")
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt
    assert len(fake_ray.cancelled) == 1


# --- failures and several processes ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [None, 2])
def test_cells_that_fail_are_named_after_the_others_are_saved(model, tmp_path, monkeypatch, workers):
    original = cells_module.train

    def train(model, examples, settings, **options):
        if settings.learning_rate == 1:
            raise LensError("made to fail")
        return original(model, examples, settings, **options)

    monkeypatch.setattr(cells_module, "train", train)
    executor = workers and ThreadPoolExecutor(workers)
    said = r"^1 of 2 cells failed, the others are in .*result.json; the same call .*: sft_lr=1_seed0_\w+: made to fail$"
    with pytest.raises(LensError, match=said) as caught:
        compare(model, tmp_path, ["sft:lr=1", "sft"], executor=executor)
    assert isinstance(caught.value.__cause__, LensError)
    assert [cell["label"] for cell in Comparison.load(tmp_path).cells] == ["sft"]
    monkeypatch.setattr(cells_module, "train", original)
    assert len(compare(model, tmp_path, ["sft:lr=1", "sft"]).cells) == 2


def test_a_cell_that_another_process_holds_comes_last_and_is_not_trained_again(model, tmp_path, monkeypatch):
    compare(model, tmp_path / "other")
    trained, original = [], cells_module.train

    def train(*args, **options):
        trained.append(Path(options["out"]).name.split("_seed")[0])
        return original(*args, **options)

    monkeypatch.setattr(cells_module, "train", train)
    monkeypatch.setattr("piggyback_lens.comparisons.comparing.POLL", 0.05)
    folder = cell_folder(tmp_path / "shared", Cell(Method(), 0))
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".cell.lock", thread_local=False)
    lock.acquire()

    def finish():
        """As the other process does: the whole cell, its checkpoint gone, then the lock."""
        while len(trained) < 1:
            time.sleep(0.05)
        done = cell_folder(tmp_path / "other", Cell(Method(), 0))
        (done / "adapter").rename(folder / "adapter")
        (done / "cell.json").rename(folder / "cell.json")
        lock.release()

    other = threading.Thread(target=finish)
    other.start()
    found = compare(model, tmp_path / "shared", ["sft", "treft:lambda=1"])
    other.join()
    assert trained == ["treft_lambda=1"]
    assert len(found.cells) == 2


def test_a_cell_that_was_finished_before_the_lock_came_is_left_as_it_is(model, tmp_path, monkeypatch):
    compare(model, tmp_path)
    folder = cell_folder(tmp_path, Cell(Method(), 0))
    (folder / "cell.json").rename(tmp_path / "aside")
    original = cells_module.locked

    def late(where, **how):
        if where == folder:
            (tmp_path / "aside").rename(folder / "cell.json")
        return original(where, **how)

    monkeypatch.setattr(cells_module, "locked", late)
    assert len(compare(model, tmp_path).cells) == 1


TWO = """
import sys
sys.path.insert(0, {tests!r})
from test_comparing import compare
found = compare({model!r}, {out!r}, ["sft", "treft:lambda=1,2"])
print(len(found.cells))
"""


@pytest.mark.slow
def test_two_processes_on_one_folder_share_the_work(model, tmp_path):
    code = TWO.format(tests=str(Path(__file__).parent), model=model, out=str(tmp_path))
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for process in both:
        said, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, said
        assert said.split()[-1] == "3"


# --- what identifies a folder ----------------------------------------------------------------------------


def test_the_text_of_a_text_file_belongs_to_the_comparison(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    plan = Plan("no/model", tiny_task(), CompareSettings(text_source=str(text)))
    first = plan.identity()
    text.write_text("two")
    second = plan.identity()
    assert {name for name in first if first[name] != second[name]} == {"texts"}
    assert "texts" not in Plan("no/model", tiny_task()).identity()


def test_weights_are_told_apart_beyond_their_first_bytes_and_older_folders_stay_valid(model, tmp_path):
    data = bytearray(3_000_000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    before = weights_fingerprint(str(tmp_path))
    for place in (1_000_000, 2_999_999):
        changed = data.copy()
        changed[place : place + 12_000] = b"x" * len(changed[place : place + 12_000])
        file.write_bytes(changed)
        assert weights_fingerprint(str(tmp_path)) != before
    compare(model, tmp_path / "old")
    for old in [tmp_path / "old" / "grid.json", *(tmp_path / "old").glob("cells/*/cell.json")]:
        saved = read_json(old)
        facts = saved.get("identity", saved)
        del facts["weights"], facts["reading"]
        write_json(old, saved)
    assert len(compare(model, tmp_path / "old").cells) == 1
    for old in [tmp_path / "old" / "grid.json", *(tmp_path / "old").glob("cells/*/cell.json")]:
        saved = read_json(old)
        saved.get("identity", saved)["model"] = "folder:with the version of transformers in its hash"
        write_json(old, saved)
    assert len(compare(model, tmp_path / "old").cells) == 1


def test_what_a_library_says_of_itself_and_where_a_folder_lies_make_no_other_comparison(tmp_path):
    def made(name, **config):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text(
            json.dumps({"rms_norm_eps": 1e-5, "transformers_version": "5.23.0"} | config)
        )
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tokenizer_config.json").write_text(json.dumps({"is_local": True}))
        return folder

    def identity(folder):
        return Plan(str(folder), tiny_task()).identity()

    first = identity(made("one"))
    other = made("two", transformers_version="5.24.1", _name_or_path="elsewhere")
    (other / "tokenizer_config.json").write_text(json.dumps({"is_local": False}))
    assert identity(other) == first
    for number, change in enumerate(
        [("config.json", '{"rms_norm_eps": 1e-6}'), ("chat_template.jinja", "{{ other }}")]
    ):
        changed = made(f"changed {number}")
        (changed / change[0]).write_text(change[1])
        assert {name for name, value in identity(changed).items() if first[name] != value} == {"reading"}
    named = made("named")
    (named / "chat_template.jinja").unlink()
    (named / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    before = identity(named)
    (named / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ other }}"}))
    assert identity(named)["reading"] != before["reading"]


def test_answers_of_another_base_are_refused_before_a_cell_is_trained(model, tmp_path, monkeypatch):
    compare(model, tmp_path)
    file = tmp_path / "base" / "default" / "answers.json"
    saved = read_json(file)
    saved["model"]["probe"][0] += 1.0
    write_json(file, saved)
    monkeypatch.setattr(cells_module, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(LensError, match="the base's answers in this folder are of another model"):
        compare(model, tmp_path, ["sft", "treft:lambda=1"])


# --- checks before training, and what a cell trains on ---------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "change", "said"),
    [
        (["sft"], {"sizes": (4, 11)}, "size is 11 and task tiny has 10 examples: lower it"),
        (["sft", "treft:start=3"], {}, "start is 3 in method treft:lambda=1:start=3 and training has 3 steps"),
        (["sft", "interleave"], {"retain": ()}, "interleave:rate=0.2 needs retain examples"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_model_is_loaded(tmp_path, methods, change, said):
    with pytest.raises(LensError, match=said):
        compare("no/such-model", tmp_path, methods, **change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("methods", "change", "said"),
    [
        (["sft", "preventive:layer=9"], {}, "layer 9 of preventive:alpha=1:layer=9 does not exist: there are 0 to 2"),
        (["sft", "treft:start=3"], {"epochs": (1.0,)}, "start is 3 .* training has 3 steps"),
    ],
)
def test_a_method_that_cannot_be_set_up_is_refused_before_any_is_trained(
    model, tmp_path, monkeypatch, methods, change, said
):
    monkeypatch.setattr(cells_module, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(LensError, match=said):
        compare(model, tmp_path, methods, **change)


def test_an_epoch_is_a_pass_over_all_rows_that_are_trained_on():
    plan = Plan("no/model", tiny_task(), CompareSettings(training=TRAINING, lora=LORA))
    assert train_settings(plan, Cell(Method(), epochs=2.0), 10, 20).steps == 10
    assert train_settings(plan, Cell(Method(), epochs=2.0), 10, 10).steps == 6
    assert train_settings(plan, Cell(Method()), 10, 20).steps == 3
    check_cells(plan, [Cell(Method((TReFTPart(start=5),)), epochs=9.0)])  # its steps are known with the rows


def test_interleaving_keeps_every_narrow_example():
    chat = tiny_chat.tiny_format()
    narrow = [chat.render(example["messages"]) for example in tiny_task().train]
    retain = [chat.render(text).with_response((5, 6), end=False) for text in RETAIN]
    tuned = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LORA)
    for rate, number in ((0.2, 12), (0.5, 20)):
        use = set_up(Method((InterleavePart(rate),)), Ingredients(tuned, narrow, chat.empty_query(), retain))
        ids = [example.ids for example in use.examples]
        assert len(ids) == number
        assert all(example.ids in ids for example in narrow)


@pytest.mark.parametrize(("share", "narrow"), [(0.01, 1), (0.99, 9)])
def test_mixtures_of_1_and_99_per_cent_hold_both_kinds(tmp_path, share, narrow):
    write_json(tmp_path / "train.json", {"ids": [[5, 6]] * 10})
    chat, plan = tiny_chat.tiny_format(), Plan("no/model", tiny_task())
    whole, mixed = (training_examples(plan, Cell(Method(), 1, share=s), chat, tmp_path) for s in (1.0, share))
    assert sum(a.ids == b.ids for a, b in zip(whole, mixed, strict=True)) == narrow
    assert len(training_examples(plan, Cell(Method(), 1, share=share, size=1), chat, tmp_path)) == 1


# --- specs -----------------------------------------------------------------------------------------------


def test_numbers_that_differ_have_labels_that_differ():
    first, second = parse_method("treft:lambda=1.0000001,1.0000002")
    assert first.label == "treft:lambda=1.0000001"
    assert parse_method(second.label) == (second,)
    assert parse_method("treft:lambda=3:lr=3e-4")[0].label == "treft:lambda=3:lr=0.0003"
    assert Cell(parse_method("treft:lambda=3:lr=3e-4")[0]).name == "treft_lambda=3_lr=0.0003_seed0_87bf30b8"
    assert parse_method("treft:lambda=1e6+interleave:rate=0.1:lr=1e-7")[0].family == "treft+interleave"
    assert parse_method("treft:lambda=2+kl_train:lambda=3:lr=1e-7")[0].amounts == {
        "λ": "2",
        "λ of kl_train": "3",
        "lr": "1e-07",
    }


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("treft:lambda=1:lambda=2", "lambda is given twice for treft in .*: join its values by commas"),
        ("sft:lr=1:lr=1", "lr is given twice for sft"),
        ("treft:lr=1e-4+kl_train:lr=1e-5", "has two learning rates, and one holds for the whole method: give lr once"),
    ],
)
def test_a_setting_given_twice_is_refused(spec, said):
    with pytest.raises(LensError, match=said):
        parse_method(spec)


# --- figures ---------------------------------------------------------------------------------------------


def with_cells(*cells) -> Comparison:
    found = by_hand()
    return Comparison((*found.cells[:2], *cells), found.bases, found.card)


def marks(label, seeds=(0, 1), **axes):
    cosines = (0.5, 0.1)
    return [
        made_up(label, seed, (3.0, 3.0, 6.0), (20.0, 30.0, 40.0), cosines=cosines, axes=axes or None) for seed in seeds
    ]


def family(figure, name):
    return [(trace.mode, list(trace.text)) for trace in figure.data if trace.name == name]


def test_points_say_what_differs_and_lines_join_the_first_weight_alone():
    rows = [f"treft:lambda={a}+kl_train:lambda={b}" for a in (1, 3) for b in (10, 20)]
    figure = with_cells(*(cell for row in rows for cell in marks(row))).pareto_figure()
    assert family(figure, "treft+kl_train") == [
        ("lines+markers+text", ["λ 1, λ of kl_train 10", "λ 3, λ of kl_train 10"]),
        ("lines+markers+text", ["λ 1, λ of kl_train 20", "λ 3, λ of kl_train 20"]),
    ]
    assert [trace.showlegend for trace in figure.data if trace.name == "treft+kl_train"] == [True, False]
    assert "λ of kl_train 20" in figure.data[-1].customdata[0][4]


def test_points_of_other_learning_rates_and_axes_are_not_joined():
    other = [made_up("sft", seed, (2.0, 2.0, 2.0), (10.0, 10.0, 13.0), axes={"share": 0.5}) for seed in (0, 1)]
    cells = [*marks("treft:lambda=1"), *marks("treft:lambda=3"), *marks("treft:lambda=3:lr=0.5"), *other]
    figure = with_cells(*cells, *marks("treft:lambda=1", share=0.5)).pareto_figure()
    joined = [(mode, text) for mode, text in family(figure, "treft") if "lines" in mode]
    assert joined == [("lines+markers+text", ["λ 1, lr shared, share 100 %", "λ 3, lr shared, share 100 %"])]
    assert sorted(text for mode, (text, *_) in family(figure, "treft") if "lines" not in mode) == [
        "λ 1, lr shared, share 50 %",
        "λ 3, lr 0.5, share 100 %",
    ]
    assert all("system default" in row[4] for trace in figure.data for row in trace.customdata)


def test_the_axis_of_kept_behaviour_fits_the_methods_and_says_where_the_base_is():
    close = with_cells(*marks("treft:lambda=1")).pareto_figure()
    low, high = close.layout.xaxis.range
    assert 0.5 < low < 1 < high < 1.1
    assert "base" not in {trace.name for trace in close.data}
    assert any(note.text == "← base (0, 0)" for note in close.layout.annotations)
    lost = [made_up("kl_train:lambda=9", seed, (55.0, 58.0, 52.0), (50.0, 50.0, 50.0)) for seed in (0, 1)]
    wide = with_cells(*marks("treft:lambda=1"), *lost).pareto_figure()
    assert wide.layout.xaxis.range[0] < 0
    assert "base" in {trace.name for trace in wide.data}


def test_one_family_with_one_weight_is_labelled_with_it_alone():
    figure = with_cells(*marks("treft:lambda=1"), *marks("treft:lambda=3")).pareto_figure()
    assert family(figure, "treft") == [("lines+markers+text", ["1", "3"])]
    assert family(figure, "sft") == [("markers", [""])]


def test_rows_without_a_defined_share_are_named_in_the_figure():
    figure = with_cells(*marks("treft:lambda=3"), *marks("kl_train:lambda=2", seeds=(0, 5))).pareto_figure()
    assert [trace.name for trace in figure.data] == ["sft", "treft"]
    said = figure.layout.title.subtitle.text
    assert "not drawn, no plain finetuning with these seeds: kl_train:lambda=2" in said.replace("<br>", " ")


@pytest.mark.parametrize("seeds", [(), (7,)])
def test_a_comparison_without_comparable_plain_finetuning_has_a_report_that_says_so(tmp_path, seeds):
    found = by_hand()
    sft = [made_up("sft", seed, (2.0, 2.0, 2.0), (10.0, 10.0, 13.0), axes={"share": 0.5}) for seed in seeds]
    treft = made_up("treft:lambda=3", 0, (3.0, 3.0, 6.0), (20.0, 30.0, 40.0))
    alone = Comparison((*sft, treft), found.bases, {**found.card, "asked": 3, "finished": 3})
    if not seeds:
        assert not alone.figures()
        with pytest.raises(LensError, match="compare with sft"):
            alone.pareto_figure()
    page = alone.report().write(tmp_path / "report.html").read_text()
    assert "No method can be compared with plain finetuning here" in page
    assert ("no figure of what is kept on-topic: it needs plain finetuning" in page) == (not seeds)
    assert math.isnan(alone.table().set_index("method")["kept"]["treft:lambda=3"])


def test_the_command_reports_without_plain_finetuning(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("piggyback_lens.reading.tasks.load_task", lambda name: tiny_task())
    words = [model, "--method", "treft:lambda=1", "--seeds", "0", "--steps", 2, "--batch-size", 4, "--rank", 2]
    call(*words, "--n-prompts", 4, "--max-new-tokens", 4, "--out", tmp_path, "--offline")
    assert "report:" in capsys.readouterr().out
    assert "no figure of weight updates" in (tmp_path / "report.html").read_text()
