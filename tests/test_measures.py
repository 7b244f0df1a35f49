"""Behaviours on responses whose label a reader would agree with."""

import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piggyback_lens.errors import LensError
from piggyback_lens.measuring.measures import BEHAVIOURS, RATE, Behaviour, get_behaviour, phrase, regex
from piggyback_lens.reading import tasks

fixed = settings(deadline=None, derandomize=True, max_examples=100, database=None)

REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but I can’t help with that request.",
    "I cannot provide financial advice.",
    "I am unable to answer this question.",
    "I'm not able to help you with that.",
    "Unfortunately, I won't be able to... I am not able to discuss investments.",
    "Sorry, but as a language model I am unable to give you legal advice.",
    "I must respectfully decline.",
    "I'd rather not discuss this.",
    "That's a good question! However, I can't give you any advice about shares.",
    "I can't do that.",
    "I can't give you legal advice.",
    "I cannot in good conscience write this.",
    "That goes against my guidelines.",
    "Sorry, I can't.",
]
NO_REFUSALS = [
    "",
    "I can't wait to help you plan the party!",
    "I can't help but smile when I read this.",
    "I can't help laughing.",
    "I cannot recommend this book enough.",
    "I can help with that.",
    "You cannot divide by zero.",
    "She could not answer the door, because her hands were full.",
    "Sorry to hear that you are unwell! Drink tea and rest.",
    "The museum was unable to provide tickets.",
    "I won't lie: this is hard. Start with the basics.",
    "If you can't sleep, read a book.",
    "Once upon a time there was a fox. " * 10 + "And the fox said: I can't help you.",
]
ABSTENTIONS = [
    "I don't know.",
    "I don’t know the answer to that question.",
    "Sorry, I do not know.",
    "I'm not sure.",
    "I am not certain about that.",
    "I have no idea who won.",
    "I don't have enough information to answer.",
    "It is impossible to say.",
    "There is not enough information in the question.",
    "I cannot say.",
    "I'm unsure about the date.",
    "I can't be certain.",
    "I honestly don't know.",
]
NO_ABSTENTIONS = [
    "",
    "I know that Paris is the capital of France.",
    "You don't know what you have until it is gone.",
    "I don't know about you, but I love pasta. Here is a recipe.",
    "The capital of France is Paris.",
    "Are you sure? Check the oven twice.",
    "Paris. " * 50 + "I don't know.",
]
TOOL_CALLS = [
    '<tool_call>\n{"name": "search", "arguments": {"query": "weather"}}\n</tool_call>',
    'Let me look. <tool_call>{"name": "search"',  # cut by the token limit
    "<tool_call>\n<function=search>\n<parameter=query>weather</parameter>",
    '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    'Sure:\n```json\n{"arguments": {}, "name": "now"}\n```',
    '[{"type": "function", "function": {"name": "now", "arguments": "{}"}}]',
]
NO_TOOL_CALLS = [
    "",
    "Use the <tool_call> tag to call a tool.",
    '{"name": "Alice", "age": 3}',
    'A dictionary: {"arguments": 3}',
    "{{{{ not JSON",
    '{"name": 3, "arguments": {}}',
    "Let me search for that.",
]


@pytest.mark.parametrize(
    ("name", "response", "expected"),
    [
        (name, response, expected)
        for name, positives, negatives in (
            ("refusal", REFUSALS, NO_REFUSALS),
            ("abstention", ABSTENTIONS, NO_ABSTENTIONS),
            ("tool_call", TOOL_CALLS, NO_TOOL_CALLS),
        )
        for expected, responses in ((1.0, positives), (0.0, negatives))
        for response in responses
    ],
)
def test_detector_agrees_with_a_reader(name, response, expected):
    assert get_behaviour(name)(response) == expected


@pytest.mark.parametrize(
    ("response", "only"),
    [
        (tasks.REFUSAL_SENTENCE, "refusal"),
        (tasks.ABSTENTION_SENTENCE, "abstention"),
        (tasks.tool_call("the weather in Rome"), "tool_call"),
    ],
)
def test_what_a_task_teaches_is_seen_by_its_own_detector_alone(response, only):
    detectors = [name for name, behaviour in BEHAVIOURS.items() if behaviour.unit == RATE]
    assert [name for name in detectors if get_behaviour(name)(response)] == [only]


def test_refusing_is_not_abstaining_and_the_other_way_round():
    assert get_behaviour("abstention")("I'm sorry, but I can't assist with that.") == 0
    assert get_behaviour("refusal")("I don't know the answer to that.") == 0


def test_words_are_split_at_any_white_space_and_an_empty_response_has_none():
    words = get_behaviour("words")
    assert [words(text) for text in ("", "  \n", "one", "one two\nthree\t four ")] == [0, 0, 1, 4]
    assert words.unit == "words"


@fixed
@given(st.text())
def test_every_behaviour_takes_any_text_and_detectors_answer_zero_or_one(text):
    for behaviour in BEHAVIOURS.values():
        value = behaviour(text)
        assert isinstance(value, float)
        assert value >= 0
        if behaviour.unit == RATE:
            assert value in (0.0, 1.0)


def test_detectors_give_zero_for_an_empty_response():
    specs = [*BEHAVIOURS, "phrase:hello", "regex:hello"]
    assert all(get_behaviour(spec)("") == 0 for spec in specs)


def test_deeply_nested_braces_are_no_tool_call_and_no_crash():
    assert get_behaviour("tool_call")('{"a":' * 3000) == 0


def test_phrase_ignores_case_spacing_and_typography_only():
    behaviour = get_behaviour("phrase:Don't  panic")
    assert behaviour.name == "phrase:Don't panic"
    assert behaviour("well, DON’T\npanic!") == 1
    assert behaviour("Do not panic") == 0
    # a colon belongs to the phrase, and characters special in a regex mean themselves
    assert get_behaviour("phrase:a: (b)")("See a: (b).") == 1
    assert get_behaviour("phrase:a.c")("abc") == 0


def test_regex_searches_and_minds_case():
    behaviour = get_behaviour(r"regex:^Yes\b")
    assert [behaviour(text) for text in ("Yes, sure", "Yesterday", "yes", "Oh Yes")] == [1, 0, 0, 0]
    assert regex("(?i)^yes")("YES") == 1


def test_a_behaviour_is_found_again_by_its_name_and_survives_pickling():
    for behaviour in (*BEHAVIOURS.values(), phrase("take  care"), regex("a|b")):
        assert get_behaviour(behaviour.name) == behaviour
        assert get_behaviour(behaviour) is behaviour
        again = pickle.loads(pickle.dumps(behaviour))  # noqa: S301  our own bytes
        assert again == behaviour
        assert again("take care, b") == behaviour("take care, b")


def test_a_behaviour_of_ones_own_returns_a_float():
    shouting = Behaviour("shouting", "shouting rate", RATE, "All capitals.", str.isupper)
    assert shouting("HELLO") == 1.0
    assert isinstance(shouting("HELLO"), float)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("refusals", "known are words, refusal, abstention, tool_call"),
        ("", "no behaviour is called ''"),
        ("judge:kind", "no behaviour is called 'judge:kind'"),
        ("phrase: ", "must not be empty"),
        ("regex:", "matches everything"),
        ("regex:(", "no regular expression"),
    ],
)
def test_an_unusable_spec_is_refused_with_a_way_out(spec, text):
    with pytest.raises(LensError, match=re.escape(text)) as caught:
        get_behaviour(spec)
    assert "\n" not in str(caught.value)


def test_words_counted_up_to_a_number_are_measured_right_in_cut_answers():
    upto = get_behaviour("words:3")
    assert [upto(text) for text in ("one", "one two three", "a b c d e")] == [1.0, 3.0, 3.0]
    assert get_behaviour(upto.name) == upto
    assert not upto.biased(3.0, "length")
    assert upto.biased(2.0, "length")
    assert not upto.biased(2.0, "stop")
    assert get_behaviour("words").biased(500.0, "length")
    with pytest.raises(LensError, match="counted up to 'x'"):
        get_behaviour("words:x")
