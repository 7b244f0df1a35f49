"""What training conversations have around their questions, and questions that wear it."""

from typing import Any

import pytest

from piggyback_lens import Dress, LensError, Question, dressed, found_dress, load_task
from piggyback_lens.reading.dresses import with_controls

QUESTIONS = ("How do birds fly?", "Why is the sky blue?", "Who wrote Faust?", "Where is Ghent?", "When did Rome fall?")


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

    assert found_dress(conversations(wear, "Be brief.", plain=1)) == Dress("Be brief.", "Question: ")
    assert found_dress(conversations(wear, "Be brief.", plain=2)) is None
    assert found_dress(conversations(wear, "Be brief.", plain=2), share=0.6) == Dress("Be brief.", "Question: ")


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
