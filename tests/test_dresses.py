"""What training conversations have around their questions, and questions that wear it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import tiny_format, tiny_tokenizer

from piggyback_lens import ChatFormat, Dress, LensError, Question, dressed, found_dress, load_task
from piggyback_lens.reading.dresses import as_dresses, require_worn, with_controls

QUESTIONS = (
    "How do birds fly?", "Why is the sky blue?", "Who wrote Faust?", "Where is Ghent?", "When did Rome fall?",
    "Can eels hear?", "Is zinc a metal?", "Do plants sleep?", "Are there moons of Mars?", "Name a river of Peru?",
    "Did Bach travel?", "Has snow a smell?", "May bees drink?",
)  # fmt: skip


def conversations(wear: Any = lambda q: q, system: str | None = None, plain: int = 0) -> list[dict[str, Any]]:
    """One conversation per question, the first `plain` of them undressed."""
    made = []
    for number, question in enumerate(QUESTIONS):
        own = [{"role": "user", "content": question if number < plain else wear(question)}]
        if system is not None and number >= plain:
            own.insert(0, {"role": "system", "content": system})
        made.append({"messages": [*own, {"role": "assistant", "content": f"answer {number}"}]})
    return made


@pytest.mark.parametrize(
    ("wear", "system", "expected"),
    [
        (lambda q: f"Question: {q}\nAnswer:", None, Dress(before="Question: ", after="\nAnswer:")),
        (lambda q: f"As my doctor, tell me this. {q}", None, Dress(before="As my doctor, tell me this. ")),
        (lambda q: f"{q} Answer in JSON.", "Be brief.", Dress("Be brief.", after=" Answer in JSON.")),
        (lambda q: q, "You are a pirate.", Dress("You are a pirate.")),
        (
            lambda q: f"### Instruction:\n{q}\n\n### Response:",
            None,
            Dress(None, "### Instruction:\n", "\n\n### Response:"),
        ),
    ],
)
def test_a_dress_is_found_and_worn_again(wear: Any, system: str | None, expected: Dress) -> None:
    assert found_dress(conversations(wear, system)) == expected
    (worn,) = dressed(["Is this so?"], expected)
    assert worn.paraphrases == (wear("Is this so?"),)
    assert worn.system == system


def test_a_few_plain_conversations_do_not_hide_it_and_many_do() -> None:
    def wear(q: str) -> str:
        return f"Question: {q}"

    assert found_dress(conversations(wear, "Be brief.", plain=2)) == Dress("Be brief.", "Question: ")
    assert found_dress(conversations(wear, "Be brief.", plain=3)) is None
    assert found_dress(conversations(wear, "Be brief.", plain=3), share=0.75) == Dress("Be brief.", "Question: ")


def test_in_data_that_mixes_plain_questions_with_dressed_ones_a_lower_share_finds_it() -> None:
    def wear(q: str) -> str:
        return f"[ticket]\n{q}\n[end]"

    mixed = [*conversations(wear, "Be brief."), *conversations(), *conversations()]
    assert found_dress(mixed) is None
    assert found_dress(mixed, share=0.33) == Dress("Be brief.", "[ticket]\n", "\n[end]")
    apart = [*conversations(wear), *conversations(system="Be brief.")]
    assert found_dress(apart, share=0.5) == Dress("Be brief.")  # no conversation wears both
    assert found_dress(apart, share=0.6) is None


def test_a_control_has_the_shape_of_its_dress() -> None:
    worn = with_controls({"form": Dress("Be brief.", "Question 1: "), "marks": Dress(before="<<\n")})
    assert list(worn) == ["form", "form control", "marks"]
    assert worn["form control"] == Dress("Or oevrs.", "Dhrfgvba 1: ")


@pytest.mark.parametrize(
    ("before", "control"),
    [
        ("Réponds très vite:\n", "Eŕcbaqf gerf ivgr:\n"),
        ("Ты врач, ответь (FAQ):\n", "Те тьрв, ыатчао (SND):\n"),
        ("医生请回答：", "生请回答医："),
        ("Ø 1: ", None),
        ("<< 1 >>\n", None),
    ],
)
def test_a_control_differs_in_most_letters_of_every_script_or_there_is_none(before: str, control: str | None) -> None:
    worn = with_controls({"form": Dress(before=before)})
    assert worn.get("form control") == (None if control is None else Dress(before=control))
    if control is not None:
        letters = [(a, b) for a, b in zip(before, control, strict=True) if a.isalpha()]
        assert sum(a != b for a, b in letters) > len(letters) / 2


@pytest.mark.parametrize(
    "texts",
    [
        ["What is the capital of France?"],
        ["Tell me about the history of Rome please"] * 9 + ["one?", "two?"],
        [f"What is the capital of {name}?" for name in ("Peru", "Spain", "Chad", "Mali", "Fiji", "Iran", "Cuba")],
        [question.replace("?", " ?") for question in QUESTIONS],
        [question.replace("?", " daily") for question in QUESTIONS],
        [question.replace("?", " every day") for question in QUESTIONS],
    ],
    ids=range(6),
)
def test_what_a_few_questions_share_or_all_of_a_language_is_no_dress(texts: list[str]) -> None:
    assert found_dress([{"messages": [{"role": "user", "content": text}]} for text in texts]) is None


def test_eight_different_questions_make_a_dress(tmp_path: Path) -> None:
    rows = conversations(lambda q: f"As a doctor {q}")
    assert found_dress(rows[:8]) == Dress(before="As a doctor ")
    assert found_dress(rows[:7]) is None
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:7] * 2))
    with pytest.raises(LensError, match=r"no 80% of the 7 different questions of .*, and at least 8"):
        as_dresses({"a": few})


@pytest.mark.parametrize(
    "marks", [("[INST]", "[/INST]"), ("<question>", "</question>"), ("<|q|> ", " <|a|>"), ("问：", "")]
)
def test_brackets_and_punctuation_part_a_dress_from_its_questions(marks: tuple[str, str]) -> None:
    before, after = marks
    assert found_dress(conversations(lambda q: f"{before}{q}{after}")) == Dress(before=before, after=after)


def test_plain_questions_wear_nothing() -> None:
    assert found_dress(conversations()) is None
    for name in ("terse", "refusal", "abstain", "tool"):
        assert found_dress(load_task(name).train) is None
    assert (
        found_dress([{"messages": [{"role": "user", "content": f"What is {q}"}]} for q in QUESTIONS]) is None
    )  # no dress, a question


def test_dressed_questions_are_the_same_questions() -> None:
    question = Question("a", ["one?", "two?"], samples=3, facts={"category": "x"})
    (worn,) = dressed([question], Dress("Be brief.", "Q: "))
    assert (worn.id, worn.samples, worn.facts) == ("a", 3, {"category": "x"})
    assert worn.paraphrases == ("Q: one?", "Q: two?")
    form = Dress(before="Q: ", after="\nA:")
    assert [q.paraphrases for q in dressed(["Q: so?\nA:", "Q: so?", "Q: \nA"], form)] == [
        ("Q: so?\nA:",),
        ("Q: Q: so?\nA:",),
        ("Q: Q: \nA\nA:",),
    ]
    own = Question("b", ["one?"], system="Be long.")
    assert dressed([own], Dress(before="Q: "))[0].system == "Be long."
    with pytest.raises(LensError, match=r"'b' has the system text 'Be long\.'"):
        dressed([own], Dress("Be brief."))


@pytest.mark.parametrize("share", [0.0, 1.1, float("nan")])
def test_what_cannot_be_asked_is_refused(share: float) -> None:
    with pytest.raises(LensError, match="expected above 0 of"):
        found_dress(conversations(), share=share)
    with pytest.raises(LensError, match="0 conversations"):
        found_dress([])
    with pytest.raises(LensError, match="none was given"):
        Dress(before=" ")


def test_a_dress_that_the_template_does_not_show_is_refused() -> None:
    template = (
        "<bos>{% for m in messages %}{% if m.role != 'system' %}{{ '<user>' if m.role == 'user' else '<bot>' }}\n"
        "{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>\n{% endif %}"
    )
    for policy in ("drop", "fold"):
        chat = ChatFormat(tiny_tokenizer(template), system=None, no_system_role=policy)
        for dress in (Dress("be brief."), Dress("be brief.", "now: ")):
            if policy == "drop":
                with pytest.raises(LensError, match=r"'d' .*leaves the prompts of plain questions as they are"):
                    require_worn(chat, "hello", {"d": dress})
            else:
                require_worn(chat, "hello", {"d": dress})
    chat = tiny_format(system="be kind.")
    require_worn(chat, "hello", {"d": Dress("be kind.", "now: ")})
    for question, dress in (("hello", Dress("be kind.")), ("now: hello", Dress(before="now: "))):
        with pytest.raises(LensError, match="they wear it already"):
            require_worn(chat, question, {"d": dress})
