"""Dresses in a comparison: spread in each of them beside that on plain questions."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_chat
import tiny_models
from test_comparing import compare, tiny_task

from piggyback_lens.comparisons.comparing import as_methods, grid
from piggyback_lens.comparisons.comparison import Comparison
from piggyback_lens.comparisons.comparison_plan import Plan, cell_folder
from piggyback_lens.errors import LensError
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.reading.dresses import Dress
from piggyback_lens.settings import CompareSettings

WORN = {"trained": {"before": "tell me this.\n", "system": "be kind."}}
TOPICS = ["off[trained]", "off[trained control]"]
METHODS = ("sft", "treft:lambda=3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_chat.tiny_tokenizer()
    tiny_models.build("llama-gqa", 0, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("dressed")
    return compare(model, out, METHODS, dresses=WORN), out


def test_answers_in_a_dress_are_those_of_dressed_questions(model, found):
    comparison, out = found
    (cell,) = grid(as_methods(["sft"]), CompareSettings(seeds=(0,)))
    tokenizer = tiny_chat.tiny_tokenizer()
    pair = ModelPair.load(model, adapter=str(cell_folder(out, cell) / "adapter"))
    kind = tiny_chat.ChatFormat(tokenizer, system="be kind.")
    asked = [kind.render(f"tell me this.\n{text}") for text in tiny_task().off_topic]
    for side, part in (("base", comparison.bases["default"]), ("finetuned", comparison.cells[0])):
        with pair.using(side) as own:
            direct = generate(own, asked, max_new_tokens=5, progress=False)
        assert [list(answer.ids) for answer in direct] == part["off[trained]"]["ids"]
        assert part["off[trained]"]["prompts"] == [prompt.query for prompt in asked]


def test_spread_in_every_dress_stands_beside_that_on_plain_questions(found):
    comparison, out = found
    assert list(comparison.dressed) == TOPICS
    table = comparison.table()
    for topic in TOPICS:
        column = topic.replace("off", "spread")
        for row, cell in zip(table.to_dict("records"), comparison.cells, strict=True):
            base = comparison.bases["default"][topic]["values"]
            assert row[column] == pytest.approx(np.mean(cell[topic]["values"]) - np.mean(base))
            assert row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
    assert "Spread in a dress beyond plain questions and its control: trained: " in comparison.verdict
    assert set(TOPICS) <= set(comparison.to_frame())
    figure = comparison.dress_figure()
    assert [trace.name for trace in figure.data] == ["plain questions", "trained", "trained control"]
    assert [len(trace.x) for trace in figure.data] == [2, 2, 2]
    assert "Spread on plain questions, and in every dress." in [caption for caption, _ in comparison.figures()]
    assert "spread[trained]" in comparison.report().summary
    assert Comparison.load(out).table().equals(table)


def test_a_folder_with_other_dresses_is_another_comparison_and_one_without_is_as_before(model, found, tmp_path):
    _, out = found
    with pytest.raises(LensError, match=r"dresses.off\[trained\].before is .tell me this"):
        compare(model, out, METHODS, dresses={"trained": {"before": "now. ", "system": "be kind."}})
    plain = compare(model, tmp_path, ["sft"])
    assert plain.dressed == ()
    assert "dresses" not in plain.card["settings"]
    assert "dress" not in plain.verdict
    with pytest.raises(LensError, match="no dress was asked for"):
        plain.dress_figure()


def test_a_plan_asks_each_dress_and_its_control():
    plan = Plan("model", tiny_task(), CompareSettings(n_prompts=4, dresses={"a": Dress(before="Q: ")}))
    assert list(plan.topics) == ["on", "off", "off[a]", "off[a control]"]
    (worn, control) = (plan.questions(topic)[0].paraphrases[0] for topic in ("off[a]", "off[a control]"))
    assert (worn, control) == tuple(f"{letter}: {tiny_task().off_topic[0]}" for letter in "QD")


def test_a_dress_is_named_for_what_it_has_beyond_plain_questions_and_its_control(found):
    """Not for being significant where plain questions are not; and a control is no finding."""
    comparison, _ = found
    n = len(comparison.bases["default"]["off"]["values"])
    noise = [5.0 * (-1) ** i for i in range(n)]

    def given(plain, worn, control):
        spreads = dict(zip(("off", *TOPICS), (plain, worn, control), strict=True))
        values = {topic: [10.0 + 0.1 * (i % 2) + x for i, x in enumerate(own)] for topic, own in spreads.items()}
        cells = tuple(
            cell | {topic: cell[topic] | {"values": own} for topic, own in values.items()} for cell in comparison.cells
        )
        base = comparison.bases["default"]
        flat = {topic: base[topic] | {"values": [10.0 + 0.1 * (i % 2) for i in range(n)]} for topic in spreads}
        made = replace(comparison, cells=cells, bases={"default": {**base, **flat}})
        return made._told_of_dresses()

    flat, high = [0.0] * n, [3.0 + 0.1 * (i % 3) for i in range(n)]
    assert "trained: sft 3." in given(flat, high, flat)
    assert "trained: none" in given([3.0 + x for x in noise], high, flat), "the contrast with plain questions is wide"
    assert "trained: none" in given(flat, high, high)
    assert "trained control" not in given(flat, flat, high)
