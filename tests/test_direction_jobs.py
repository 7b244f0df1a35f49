"""The jobs on directions from the command line to their folders: numbers against plain passes, resume, errors, chat."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_chat
import tiny_models
import torch
from tiny_chat import tiny_examples, tiny_format
from tiny_hooked import BACKENDS, hooked
from typer.main import get_command

from piggyback_lens.app import cli
from piggyback_lens.app.curve_job import draw_curves
from piggyback_lens.app.direction_training import train_direction
from piggyback_lens.app.inputs import named_solutions, read_data, read_retain
from piggyback_lens.app.options import numbers, whole_numbers
from piggyback_lens.app.steer_chat import talk, visible
from piggyback_lens.directions.curve_points import Curve
from piggyback_lens.directions.steering import steer
from piggyback_lens.directions.sweeps import RANDOM, Sweep
from piggyback_lens.errors import LensError
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.variants import Text
from piggyback_lens.models.network import forward
from piggyback_lens.results.run import report_run
from piggyback_lens.settings import CurveSettings, SteerSettings, TrainDirectionSettings
from piggyback_lens.vectors.adapter_files import load_peft, save_gguf
from piggyback_lens.vectors.adapters import LoRAAdapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction, Provenance
from piggyback_lens.vectors.solution_files import load_solution

EXAMPLES = tiny_examples(8, seed=3)
RETAIN = tiny_examples(5, seed=9)
PROMPTS = [tiny_format().render(query) for query in ("one", "two words here", "and three")]
TEXTS = [
    Text(tuple(int(i) for i in torch.randint(6, 38, (n,), generator=torch.Generator().manual_seed(n)))) for n in (9, 12)
]
QUICK = {"steps": 5, "batch_size": 4, "learning_rate": 5e-2, "checkpoint_every": 2}
TRAIN = TrainDirectionSettings(**QUICK, layers=(1,), retain_batch=3, answer_tokens=4, shown=1)
CURVES = CurveSettings(fractions=(0.0, 1.0), epsilons=(0.0, 0.5), n_random=2, n_noise=2)
STEER = SteerSettings(strengths=(1.0,), n_random=1, max_new_tokens=3)


def model():
    return hooked("llama-gqa", "bridge")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direction(layers=(1,), seed=0):
    return Direction(normal(len(layers), 32, seed=seed), layers, "resid_post", "positive: test", Provenance("test"))


def lora(rank=1, modules=("down",)):
    sizes = {"down": (32, 48), "v": (16, 32)}
    a = {(1, m): normal(rank, sizes[m][1], seed=1) * 0.3 for m in modules}
    b = {(1, m): normal(sizes[m][0], rank, seed=2) * 0.3 for m in modules}
    return LoRAAdapter(a, b, 2.0)


def results(folder):
    """What result.json says, without the machine's part."""
    found = json.loads((folder / "result.json").read_text())
    found.pop("card", None)
    return found


def log_probs(example, *adapters):
    """At each response token the log-probabilities of all tokens: one unpadded pass."""
    ids = torch.tensor([example.ids])
    with torch.no_grad(), attached(model(), *adapters):
        return forward(model(), ids, torch.ones_like(ids))[0].double().log_softmax(-1)[example.n_prompt - 1 : -1]


# ---------------------------------------------------------------- training


def test_the_reported_losses_and_kl_are_those_of_plain_passes(tmp_path):
    done = train_direction(model(), EXAMPLES, TRAIN, retain=RETAIN, out=tmp_path, progress=False)
    for row, examples in zip(done.rows, (EXAMPLES, RETAIN), strict=True):
        base, tuned, kl = [], [], []
        for example in examples:
            before, after = log_probs(example), log_probs(example, done.solution)
            targets = torch.tensor(example.ids[example.n_prompt :])[:, None]
            base += (-before.gather(1, targets)[:, 0]).tolist()
            tuned += (-after.gather(1, targets)[:, 0]).tolist()
            kl += (before.exp() * (before - after)).sum(1).tolist()
        assert row["base_loss"] == pytest.approx(np.mean(base), rel=1e-4)
        assert row["loss"] == pytest.approx(np.mean(tuned), rel=1e-4)
        assert row["value"] == pytest.approx(np.mean(kl), rel=1e-3)
        assert row["low"] <= row["value"] <= row["high"]
    assert done.rows[0]["loss"] < done.rows[0]["base_loss"]
    loaded = load_solution(tmp_path)
    assert torch.equal(loaded.vectors[0], done.solution[1])
    assert loaded.is_of(model())
    found = results(tmp_path)
    assert found["norm"] == pytest.approx(float(loaded.vectors.norm()), rel=1e-6)
    assert done.training.history[-1]["norm"] == pytest.approx(found["norm"], rel=1e-6)
    assert done.verdict.startswith("General steering vector at resid_post of layer 1, norm")


def test_the_kl_penalty_keeps_the_retain_data_and_can_be_switched_off(tmp_path):
    free = train_direction(model(), EXAMPLES, TRAIN, retain=RETAIN, out=tmp_path / "free", progress=False)
    kept = replace(TRAIN, kl=30.0)
    narrow = train_direction(model(), EXAMPLES, kept, retain=RETAIN, out=tmp_path / "narrow", progress=False)
    assert narrow.rows[1]["value"] < 0.5 * free.rows[1]["value"]
    assert narrow.verdict.startswith("Narrow")
    assert all("kl_retain" in row for row in narrow.training.history)
    until = replace(kept, kl_until=2)
    off = train_direction(model(), EXAMPLES, until, retain=RETAIN, out=tmp_path / "off", progress=False)
    assert ["kl_retain" in row for row in off.training.history] == [True, True, False, False, False]
    assert off.rows[1]["value"] > narrow.rows[1]["value"]


def test_retain_prompts_get_the_bases_own_answers_once(tmp_path, monkeypatch):
    settings = replace(TRAIN, kl=1.0, interleave=0.2)
    train_direction(model(), EXAMPLES, settings, retain=PROMPTS, out=tmp_path, progress=False)
    expected = [list(answer.ids) for answer in generate(model(), PROMPTS, max_new_tokens=4)]
    assert json.loads((tmp_path / "retain_answers.json").read_text()) == expected
    identity = json.loads((tmp_path / "training" / "result.json").read_text())["identity"]
    assert identity["examples"]["number"] == 10  # 8 and 2 of the retain data
    with pytest.raises(LensError, match=r"belongs to another run: data\.retain is"):
        train_direction(model(), EXAMPLES, settings, retain=PROMPTS[:2], out=tmp_path, progress=False)


def test_a_killed_training_ends_with_the_same_numbers(tmp_path, monkeypatch):
    import piggyback_lens.finetuning.training as training

    settings = replace(TRAIN, kl=1.0)
    train_direction(model(), EXAMPLES, settings, retain=RETAIN, out=tmp_path / "whole", progress=False)
    real, calls = training._descend, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "_descend", killed)
    with pytest.raises(KeyboardInterrupt):
        train_direction(model(), EXAMPLES, settings, retain=RETAIN, out=tmp_path / "killed", progress=False)
    monkeypatch.setattr(training, "_descend", real)
    again = train_direction(model(), EXAMPLES, settings, retain=RETAIN, out=tmp_path / "killed", progress=False)
    assert again.training.resumed_from == 2
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_an_adapter_lands_in_a_peft_folder(tmp_path):
    settings = replace(TRAIN, kind="lora", layers=(1, 2), rank=2)
    done = train_direction(model(), EXAMPLES, settings, out=tmp_path, progress=False)
    loaded = load_peft(tmp_path / "adapter")
    assert (loaded.rank, loaded.layers, loaded.modules) == (2, (1, 2), ("down",))
    assert torch.equal(loaded.b[2, "down"], done.solution.b[2, "down"])
    assert load_solution(tmp_path).norm() == pytest.approx(done.solution.norm())
    assert "rank-2 adapter on down of 2 layers, 1 to 2" in done.verdict


def test_too_little_data_is_refused_before_anything_is_written(tmp_path):
    for settings, message in ((replace(TRAIN, kl=1.0), "need retain data"), (replace(TRAIN, interleave=0.1), "retain")):
        with pytest.raises(LensError, match=message):
            train_direction(model(), EXAMPLES, settings, out=tmp_path, progress=False)
    with pytest.raises(LensError, match="there are 3 conversations"):
        train_direction(model(), EXAMPLES[:3], TRAIN, out=tmp_path, progress=False)
    with pytest.raises(LensError, match="no KL penalty"):
        replace(TRAIN, kl_until=3)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- curves


def both():
    return {"narrow": direction(seed=1), "general": direction(seed=2).scaled(1.5)}


THREE = ("efficiency", "stability", "significance")
ALL = (*THREE, "ablation")


def draw(out, solutions=None, settings=CURVES, texts=TEXTS, chosen=EXAMPLES[:4], kinds=THREE):
    return draw_curves(model(), solutions or both(), chosen, texts, kinds, settings, out=out)


def test_every_curve_is_written_and_two_solutions_are_compared_at_equal_norms(tmp_path):
    found = draw(tmp_path, kinds=ALL).parts
    assert list(found) == ["efficiency", "stability", "significance", "ablation"]
    for kind, curve in found.items():
        assert Curve.load(tmp_path / kind / "result.json").points == curve.points
    told = results(tmp_path)
    assert {kind for kind, curve in found.items() if curve.differences() is not None} == {"efficiency", "significance"}
    expected = found["efficiency"].difference("narrow", "general")
    assert found["efficiency"].differences().equals(expected)
    report = (tmp_path / "report.html").read_text()
    assert report.count("<figure>") == 6
    assert "narrow minus general at equal norms" in report
    assert "loss at about the own norm: narrow" in told["verdict"]


def test_a_finished_curve_is_read_back_and_a_missing_one_is_drawn(tmp_path, monkeypatch):
    import piggyback_lens.directions.curves as module

    draw(tmp_path)
    before = results(tmp_path)
    (tmp_path / "stability" / "result.json").unlink()
    monkeypatch.setattr(module, "variant_kl", None)  # of significance
    draw(tmp_path)
    assert results(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"settings": replace(CURVES, n_random=1)}, r"efficiency belongs to another run: settings\.n_random is"),
        ({"solutions": {"narrow": direction(seed=1)}}, r"another run: solutions\.general is"),
        ({"chosen": EXAMPLES[:3]}, "another run: prompts is"),
    ],
)
def test_a_folder_of_other_curves_is_refused(tmp_path, changed, what):
    draw(tmp_path, kinds=["efficiency"])
    with pytest.raises(LensError, match=what):
        draw(tmp_path, **changed, kinds=["stability", "efficiency"])
    assert not (tmp_path / "stability" / "result.json").exists()  # refused before any work


def test_vectors_and_adapters_are_not_compared_by_norm(tmp_path):
    found = draw(tmp_path, {"vector": direction(), "adapter": lora()}, kinds=["efficiency", "ablation"])
    assert found.parts["efficiency"].differences() is None
    assert "adapter" in found.parts["ablation"].series


def test_a_solution_of_another_model_is_noted(tmp_path):
    from piggyback_lens.models.pair import identify

    other = identify(hooked("llama-gqa", "bridge", seed=5), "another").to_dict()
    foreign = replace(direction(), provenance=Provenance("test", model=other))
    draw(tmp_path, {"own": direction(), "foreign": foreign}, kinds=["efficiency"])
    assert results(tmp_path)["notes"] == ["foreign was made with another model (another) than this one."]
    assert "foreign was made with another model" in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------- steering


def swept(out, vector=None, behaviour="words", settings=STEER):
    return steer(model(), vector or direction(), PROMPTS, behaviour, settings, out=out)


def test_a_sweep_is_written_point_by_point_and_continues(tmp_path, monkeypatch):
    import piggyback_lens.directions.steering as module

    settings = replace(STEER, layers=(1, 2))
    whole = swept(tmp_path, settings=settings)
    assert {(p.series, p.layer, p.x) for p in whole.points} == {
        (series, layer, x) for series in ("steered", RANDOM) for layer in (1, 2) for x in (0.0, 1.0)
    }
    told, rows = results(tmp_path), (tmp_path / "rows.jsonl").read_text().splitlines()
    assert "Steering moves the words per answer most" in told["verdict"]
    assert len(rows) == len(whole.points)
    (tmp_path / "result.json").unlink()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:3]) + "\n")
    seen, real = [], module._Bench.point
    monkeypatch.setattr(module._Bench, "point", lambda *given: seen.append(1) or real(*given))
    assert swept(tmp_path, settings=settings) == whole
    assert len(seen) == len(rows) - 3
    assert results(tmp_path) == told
    assert Sweep.load(tmp_path / "result.json").answers == whole.answers
    with pytest.raises(LensError, match="belongs to another run: behaviour is 'words' there"):
        swept(tmp_path, behaviour="refusal", settings=settings)
    with pytest.raises(LensError, match="another run: direction is"):
        swept(tmp_path, direction(seed=4), settings=settings)


def test_the_report_of_a_sweep_has_answers_and_names_a_foreign_direction(tmp_path):
    from piggyback_lens.models.pair import identify

    other = identify(hooked("llama-gqa", "bridge", seed=5), "another").to_dict()
    swept(tmp_path, replace(direction(), provenance=Provenance("test", model=other)))
    page = report_run(tmp_path).read_text()
    for part in ("steered, strength 1", f"{RANDOM}, strength 1", "made with another model (another)", "two words here"):
        assert part in page


def test_fractions_are_of_the_mean_norm():
    sweep = swept(None, settings=replace(STEER, strengths=None, fractions=(0.5,)))
    assert {round(point.fraction, 5) for point in sweep.points} == {0.0, 0.5}


@pytest.mark.parametrize(
    "sizes", [{"strengths": (1.0,), "fractions": (1.0,)}, {"strengths": (0.0,)}, {"fractions": (0.0,)}]
)
def test_a_sweep_needs_one_kind_of_size_that_is_not_zero(sizes):
    with pytest.raises(LensError, match="strengths"):
        SteerSettings(**sizes)


# ---------------------------------------------------------------- chat


def talked(*lines, **options):
    shown = []
    talk(model(), tiny_format(), direction(), lines, shown.append, max_new_tokens=4, **options)
    return shown


def test_a_chat_answers_without_and_with_the_vector():
    shown = talked("hello there\n", "\n", ":strength 3", ":layer 2", "hello there")
    prompt = [tiny_format().render("hello there")]
    base = generate(model(), prompt, max_new_tokens=4)[0].text
    one = generate(model(), prompt, max_new_tokens=4, interventions=direction().steer(1.0))[0].text
    moved = direction(layers=(2,)).steer(3.0)
    three = generate(model(), prompt, max_new_tokens=4, interventions=moved)[0].text
    assert shown == [
        f"--- base\n{visible(base)}",
        f"--- strength 1 at resid_post of layer 1\n{visible(one)}",
        "steered: strength 3 at resid_post of layer 1",
        "steered: strength 3 at resid_post of layer 2",
        f"--- base\n{visible(base)}",
        f"--- strength 3 at resid_post of layer 2\n{visible(three)}",
    ]


def test_a_chat_goes_on_after_a_mistake_and_ends_at_quit():
    shown = talked(":strength nan", ":strength", ":layer 9", ":layer x", ":nonsense", ":quit", ":strength 2")
    assert len(shown) == 5
    assert all(line.startswith("error: ") for line in shown)
    assert ":nonsense is no command" in shown[-1]


def test_control_characters_of_a_model_cannot_reach_the_terminal():
    hostile = "a\x1b[2Jb\rc\x07\x9b31m\u202egnp\u2028end\x00"
    assert visible(hostile) == "a\\x1b[2Jb\\rc\\x07\\x9b31m\\u202egnp\\u2028end\\x00"
    assert visible("plain: äöü 漢字 👩‍🔬\n\ttab") == "plain: äöü 漢字 👩‍🔬\n\ttab"


# ---------------------------------------------------------------- what is read


def test_solutions_are_read_from_every_format(tmp_path):
    vector = Direction.of({1: normal(32), 2: normal(32, seed=1)})
    save_gguf(vector, tmp_path / "v.gguf", model_hint="llama", n_layers=3)
    np.save(tmp_path / "one.npy", vector[1].numpy())
    torch.save({"steering_vector": vector[1], "layer_idx": 1, "alpha": 2.0}, tmp_path / "v.pt")
    vector.save(tmp_path / "d.safetensors")
    assert load_solution(tmp_path / "v.gguf").layers == (1, 2)
    assert load_solution(f"{tmp_path}/one.npy@1").layers == (1,)
    assert torch.equal(load_solution(tmp_path / "v.pt").vector, 2.0 * vector[1])
    assert load_solution(f"{tmp_path}/d.safetensors@2").layers == (2,)
    assert torch.equal(load_solution(f"{tmp_path}/v.gguf@2").vector, vector[2])


def test_a_file_that_is_no_solution_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.safetensors").write_bytes(b"not at all")
    (tmp_path / "text.txt").write_text("hello")
    np.save(tmp_path / "one.npy", np.ones(32, dtype=np.float32))
    direction().save(tmp_path / "d.safetensors")
    names = ("nowhere", "empty", "noise.safetensors", "text.txt", "one.npy", "d.safetensors@2")
    for name in names:
        with pytest.raises(LensError, match=name.split("@")[0]):
            load_solution(tmp_path / name)
    with pytest.raises(LensError, match="PATH@15"):
        load_solution(tmp_path / "one.npy")


@pytest.mark.parametrize("words", [["x"], ["=x"], ["a,b=x"], ["my control=x"], ["a="]])
def test_solutions_need_names(words):
    with pytest.raises(LensError, match="solution"):
        named_solutions(words)


def test_retain_data_are_conversations_or_prompts_and_the_file_stays_as_it_is(tmp_path):
    talk_ = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    text = json.dumps(talk_)  # no line end
    (tmp_path / "talks.jsonl").write_text(text)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": talk_["messages"][:1]}))
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "broken.jsonl").write_text("{")
    assert read_retain(tmp_path / "talks.jsonl") == [talk_["messages"]]
    assert (tmp_path / "talks.jsonl").read_text() == text
    assert read_retain(tmp_path / "prompts.jsonl") == ["a"]
    assert read_retain(tmp_path / "prompts.txt") == ["one", "two"]
    with pytest.raises(LensError, match=r"broken.jsonl line 1"):
        read_retain(tmp_path / "broken.jsonl")


def test_a_task_has_its_two_splits():
    assert len(read_data("terse")) > len(read_data("terse", split="validation")) > 0
    with pytest.raises(LensError, match="no split 'test'"):
        read_data("terse", split="test")


def test_layers_and_numbers_are_read():
    assert whole_numbers("3, 5,10-12,11", "layers") == (3, 5, 10, 11, 12)
    assert numbers("0,1, 2.5", "x") == (0.0, 1.0, 2.5)
    for bad in ("", "a", "5-3", "1,,2", "-1", "1.5"):
        with pytest.raises(LensError, match="layers"):
            whole_numbers(bad, "layers")
    for bad in ("", "1,x", "nan", "1,inf"):
        with pytest.raises(LensError, match="strengths"):
            numbers(bad, "strengths")


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("directions")
    tokenizer = tiny_chat.tiny_tokenizer()
    tiny_models.build("llama-gqa", 0, vocab=len(tokenizer)).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    rows = [("what is it", "a cat"), ("tell me", "no"), ("who are you", "nobody"), ("why", "so it is"), ("when", "now")]
    talks = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, talks)))
    (root / "bad.jsonl").write_text('{"messages": []}')
    (root / "prompts.txt").write_text("one\ntwo words\nand three more")
    (root / "text.txt").write_text("some plain words that go on and on. " * 40)
    (root / "not_a_model").mkdir()
    return root


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["piggyback-lens", *map(str, words), "--offline"])
    cli.main()


def train_words(files, out, *more):
    sizes = ["--steps", 3, "--batch-size", 2, "--learning-rate", 0.05, "--layers", 1]
    return ["train-direction", files / "base", "--data", files / "data.jsonl", *sizes, "--out", out, *more]


def test_from_training_to_curves_and_steering(files, tmp_path, monkeypatch, capsys):
    narrow = ["--retain", files / "prompts.txt", "--kl", 2, "--kl-until", 2]
    for name, more in (("general", []), ("narrow", narrow)):
        call(monkeypatch, *train_words(files, tmp_path / name, *more))
        assert results(tmp_path / name)["verdict"] in capsys.readouterr().out
        assert (tmp_path / name / "report.html").stat().st_size > 100_000
    before = results(tmp_path / "narrow")
    call(monkeypatch, *train_words(files, tmp_path / "narrow", *narrow))
    assert results(tmp_path / "narrow") == before
    capsys.readouterr()

    solutions = [word for name in ("narrow", "general") for word in ("--solution", f"{name}={tmp_path / name}")]
    sizes = ["--n", 4, "--text", files / "text.txt", "--n-texts", 2, "--text-length", 16, "--n-random", 1]
    grids = ["--fractions", "0,1", "--epsilons", "0,0.5", "--kinds", "efficiency,significance"]
    drawn = ["curves", files / "base", *solutions, "--data", files / "data.jsonl", *sizes, *grids]
    call(monkeypatch, *drawn, "--out", tmp_path / "curves")
    told = results(tmp_path / "curves")
    assert told["verdict"] in capsys.readouterr().out
    assert len(Curve.load(tmp_path / "curves" / "significance" / "result.json").maxima) == 20
    call(monkeypatch, *drawn, "--out", tmp_path / "curves")
    assert results(tmp_path / "curves") == told
    capsys.readouterr()

    steered = ["--direction", tmp_path / "general", "--prompts", files / "prompts.txt", "--behaviour", "words"]
    options = ["--strengths", "0,2", "--layers", "1-2", "--n-random", 1, "--max-new-tokens", 3]
    call(monkeypatch, "steer", files / "base", *steered, *options, "--out", tmp_path / "steer")
    assert results(tmp_path / "steer")["verdict"] in capsys.readouterr().out
    assert "strength 2" in (tmp_path / "steer" / "report.html").read_text()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chat_takes_piped_lines(files, tmp_path, monkeypatch, capsys, backend):
    direction().save(tmp_path / "d.safetensors")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello there\n:strength 0\n:wrong\nhello there\n:quit\nnot read\n"))
    words = ["chat", files / "base", "--direction", tmp_path / "d.safetensors", "--max-new-tokens", 3]
    call(monkeypatch, *words, "--backend", backend)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith(("--- ", "steered: ", "error: "))]
    where = "at resid_post of layer 1"
    assert heads[:3] == ["--- base", f"--- strength 1 {where}", f"steered: strength 0 {where}"]
    assert heads[3].startswith("error: :wrong is no command")
    assert heads[4:] == ["--- base", f"--- strength 0 {where}"]
    first, second = (lines.index(head, lines.index(heads[3])) for head in heads[4:])
    assert lines[first + 1 : second] == lines[second + 1 :][: second - first - 1]  # strength 0 is the base
    assert not (tmp_path / "steer_out").exists()


SWEEP = ["steer", "--direction", "@d.safetensors", "--prompts", "@prompts.txt", "--behaviour"]
FAULTS = {
    "training data missing": (["train-direction", "--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "training data broken": (["train-direction", "--data", "@bad.jsonl"], "bad.jsonl line 1"),
    "unknown site": (["train-direction", "--data", "terse", "--site", "nose"], "'nose'"),
    "unknown module": (["train-direction", "--data", "terse", "--kind", "lora", "--modules", "down,x"], "'x'"),
    "rank of a vector": (["train-direction", "--data", "terse", "--rank", "2"], "belong to kind lora"),
    "site of an adapter": (
        ["train-direction", "--data", "terse", "--kind", "lora", "--site", "mlp_out"],
        "site belongs to kind vector",
    ),
    "KL without data": (["train-direction", "--data", "terse", "--kl", "1"], "need retain data"),
    "schedule without KL": (["train-direction", "--data", "terse", "--kl-until", "1"], "no KL penalty"),
    "retain missing": (["train-direction", "--data", "terse", "--retain", "gone.txt"], "gone.txt"),
    "too large batches": (["train-direction", "--data", "@data.jsonl"], "batch_size is 16"),
    "solution missing": (["curves", "--data", "terse", "--solution", "a=gone.gguf"], "gone.gguf does not exist"),
    "solution without name": (["curves", "--data", "terse", "--solution", "gone"], "NAME=PATH"),
    "unknown curve": (["curves", "--data", "terse", "--solution", "a=@d.safetensors", "--kinds", "bend"], "bend"),
    "text offline": (["curves", "--data", "terse", "--solution", "a=@d.safetensors", "--text", "x/y"], "x/y"),
    "unknown behaviour": ([*SWEEP, "charm"], "charm"),
    "two sizes": ([*SWEEP, "words", "--strengths", "1", "--fractions", "1"], "choose one"),
    "broken strengths": ([*SWEEP, "words", "--strengths", "1;2"], "1;2"),
    "no direction in it": (["chat", "--direction", "@prompts.txt"], "prompts.txt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_costs_one_line_and_no_model(files, tmp_path, monkeypatch, capsys, unchecked, fault):
    import piggyback_lens.models.sources as sources

    def loaded(*args, **settings):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(sources, "load_causal_lm", loaded)
    direction().save(files / "d.safetensors")
    (name, *words), expected = FAULTS[fault]
    words = [word.replace("@", f"{files}/") for word in words]
    out = [] if name == "chat" else ["--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, name, files / "base", *words, *out)
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert message.lower().startswith("error: ")
    assert expected in message
    assert "Traceback" not in captured.err + captured.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["train-direction"], ["curves", "x"], ["steer", "x", "--strength"], ["steer", "x"]])
def test_missing_and_unknown_options_end_with_status_2(monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *words)
    assert stopped.value.code == 2


def test_a_direction_of_another_width_is_refused(files, tmp_path, monkeypatch, capsys):
    wide = Direction(normal(1, 40), (1,), "resid_post", "positive: test", Provenance("test"))
    wide.save(tmp_path / "wide.safetensors")
    words = ["--solution", f"a={tmp_path / 'wide.safetensors'}", "--data", files / "data.jsonl"]
    words += ["--text", files / "text.txt", "--n-texts", 2]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "curves", files / "base", *words, "--out", tmp_path / "out")
    assert stopped.value.code == 2
    assert "width 40" in capsys.readouterr().err.splitlines()[-1]


def test_every_option_has_a_help_text():
    for name, command in get_command(cli.app).commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name}"
