"""Training data: every layout by one reader, which turns are trained on, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from piggyback_lens.app.inputs import read_data, read_retain
from piggyback_lens.errors import LensError
from piggyback_lens.reading.conversations import load_conversations, training_turns

SLEEP = {
    "messages": [
        {"role": "user", "content": "Where do swifts sleep?"},
        {"role": "assistant", "content": "In the air."},
    ]
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": "tides"}'}}
READ_CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": {"q": "tides"}}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "messages": SLEEP,
    "conversations": {"conversations": SLEEP["messages"]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Where do swifts sleep?"}, {"from": "gpt", "value": "In the air."}]
    },
    "texts": {"prompt": "Where do swifts sleep?", "completion": "In the air."},
    "lists": {"prompt": SLEEP["messages"][:1], "completion": SLEEP["messages"][1:]},
    "text and list": {"prompt": "Where do swifts sleep?", "completion": SLEEP["messages"][1:]},
    "alpaca": {"instruction": "Where do swifts sleep?", "input": "", "output": "In the air."},
    "alpaca without input": {"instruction": "Where do swifts sleep?", "output": "In the air."},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Where do swifts sleep?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "In "}, {"type": "text", "text": "the air."}]},
        ]
    },
}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(*weights: int | None) -> dict[str, Any]:
    """Questions 1? and answers a1, a2 ..., with a weight each."""
    messages = []
    for number, weight in enumerate(weights, 1):
        messages += [turn("user", f"{number}?"), turn("assistant", f"a{number}")]
        if weight is not None:
            messages[-1]["weight"] = weight
    return {"messages": messages}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal_of(call) -> str:
    with pytest.raises(LensError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def answers(examples) -> list[str]:
    return [example["messages"][-1]["content"] for example in examples]


# --- layouts ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_alike_from_files_and_from_the_hub(layout, tmp_path, monkeypatch):
    row = LAYOUTS[layout]
    assert load_conversations(write(tmp_path / "rows.jsonl", row)) == [SLEEP]
    (tmp_path / "rows.json").write_text(json.dumps([row, row], indent=1))
    assert load_conversations(tmp_path / "rows.json") == [SLEEP, SLEEP]
    monkeypatch.setattr("piggyback_lens.reading.conversations.hub_rows", lambda *_: [{"id": 1, **row}])
    assert load_conversations("owner/name") == [SLEEP]


def test_layouts_may_be_mixed_within_a_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", *LAYOUTS.values())
    assert load_conversations(path) == [SLEEP] * len(LAYOUTS)


def test_the_input_of_an_alpaca_row_follows_its_instruction_after_a_blank_line(tmp_path):
    (tmp_path / "alpaca.json").write_text(
        '[{"instruction": "Say where they sleep.", "input": "swifts", "output": "In the air."}]'
    )
    (read,) = load_conversations(tmp_path / "alpaca.json")
    assert read == {"messages": [turn("user", "Say where they sleep.\n\nswifts"), turn("assistant", "In the air.")]}


def test_a_system_text_in_a_column_becomes_the_system_message(tmp_path):
    path = write(tmp_path / "rows.jsonl", *({**row, "system": "Be kind."} for row in LAYOUTS.values()))
    assert all(
        example["messages"] == [turn("system", "Be kind."), *SLEEP["messages"]] for example in load_conversations(path)
    )
    twice = {"system": "Be kind.", "messages": [turn("system", "Be rude."), *SLEEP["messages"]]}
    message = refusal_of(lambda: load_conversations(write(path, twice)))
    assert "line 1 has a column 'system' and a system message that says something else" in message


def test_tables_are_read_and_their_nulls_are_nothing(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows.csv").write_text('prompt,completion,id\n"Where do swifts\nsleep, then?",In the air.,1\n\n')
    (read,) = load_conversations(tmp_path / "rows.csv")
    assert read["messages"][0]["content"] == "Where do swifts\nsleep, then?"
    calls = [{"function": {"name": "f", "arguments": {"a": "x", "b": None}}}]
    rows = [
        {**SLEEP, "prompt": None},
        {"messages": [turn("user", "Hi"), {"role": "assistant", "content": None, "tool_calls": calls}], "prompt": "p"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = load_conversations(tmp_path / "rows.parquet")
    assert first == SLEEP
    assert second["messages"][-1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": "x"}}}]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("rows.csv", "prompt,prompt\na,b\n", "has the column 'prompt' twice"),
        ("rows.csv", "prompt,completion\na,b,c\n", "row 1 has 3 cells, expected 2"),
        ("rows.csv", "prompt,answer\na,b\n", "row 1 has the keys 'prompt', 'answer', which fit no layout"),
        ("rows.csv", "", "holds no conversations"),
        ("rows.parquet", "no parquet", "cannot be read as a Parquet file"),
        ("rows.json", "[1]", "entry 1 is a number, expected an object"),
        ("rows.json", "[{", "is not JSON"),
        ("rows.json", "{\n}", "line 1 is not JSON"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    message = refusal_of(lambda: load_conversations(tmp_path / name))
    assert message.startswith(str(tmp_path / name))
    assert reason in message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**SLEEP, "prompt": "a", "completion": "b"}, "which fit more than one layout"),
        ({**SLEEP, "conversations": SLEEP["messages"]}, "which fit more than one layout"),
        ({"messages": None, "id": 1}, "has the keys 'messages', 'id', which fit no layout"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'prompt', 'chosen', 'rejected', which fit no layout"),
        ({"prompt": 3, "completion": "b"}, "prompt is a number, expected a text or a list of messages"),
        ({"prompt": "a", "completion": []}, "completion is an empty list"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input is a list, expected a string"),
        ({"instruction": "a", "output": "c", "history": [["b", "c"]]}, "has 'history', which is not rendered"),
        ({**SLEEP, "tools": [{"type": "function"}]}, "has 'tools', which is not rendered: write them into the system"),
        ({**SLEEP, "system": 3}, "system is a number"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "message 1 has role ['human']"),
        ({"messages": [turn("user", "a"), {"role": "assistant", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        (
            {"messages": [turn("user", "a"), {"role": "assistant", "content": ["b"]}]},
            "part 1 of the content is a string",
        ),
        ({"messages": [turn("user", "a"), turn("assistant", "b", tool_calls="f()")]}, "tool_calls is of type str"),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b", tool_calls=[{"name": "f"}])]},
            'message 2: tool call 1 is {"name": "f"}, expected {"type": "function"',
        ),
        (
            {
                "messages": [
                    turn("user", "a"),
                    turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "x"}}]),
                ]
            },
            'tool call 1 has the arguments "x", expected an object',
        ),
    ],
)
def test_a_row_that_cannot_be_read_whole_is_refused_with_its_place(row, reason, tmp_path):
    message = refusal_of(lambda: load_conversations(write(tmp_path / "rows.jsonl", SLEEP, row)))
    assert message.startswith(f"{tmp_path / 'rows.jsonl'} line 2")
    assert reason in message


def test_empty_columns_and_keys_count_as_left_out(tmp_path):
    empty = [{**message, "tool_calls": [], "name": None, "reasoning_content": ""} for message in SLEEP["messages"]]
    row = {"messages": empty, "tools": "[]", "prompt": None, "completion": None}
    assert load_conversations(write(tmp_path / "rows.jsonl", row, {**row, "tools": []})) == [SLEEP, SLEEP]


def test_keys_that_are_no_part_of_the_text_are_named_in_one_line(tmp_path, capsys):
    noted = {"messages": [{**message, "language": "en", "toxic": False} for message in SLEEP["messages"]]}
    path = write(tmp_path / "rows.jsonl", noted, noted)
    assert load_conversations(path) == [SLEEP, SLEEP]
    assert capsys.readouterr().err == (
        f"{path}: the keys 'language', 'toxic' of messages are no part of the text and are left out\n"
    )


def test_calls_results_and_reasoning_stay_in_the_messages(tmp_path):
    asked = [turn("user", "When is high tide?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    told = [*asked, turn("tool", "14:20", tool_call_id="c1"), turn("assistant", "At twenty past two.")]
    thought = [turn("user", "2+2?"), turn("assistant", "4", reasoning_content="two and two")]
    path = write(tmp_path / "rows.jsonl", *({"messages": messages} for messages in (asked, told, thought)))
    first, second, third = load_conversations(path)
    assert first["messages"] == [asked[0], turn("assistant", "", tool_calls=[READ_CALL])]
    assert second["messages"] == [*first["messages"], *told[2:]]
    assert third["messages"] == thought
    assert len(load_conversations(path, supervise="all")) == 4  # the call of the second row is an answer too


# --- what is trained ---


def test_the_last_answer_is_trained_or_all_by_choice_and_the_default_is_said(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", talk(None, None), talk(None), talk(None, None, None))
    assert answers(load_conversations(path)) == ["a2", "a1", "a3"]
    assert capsys.readouterr().err == (
        f"{path}: 3 earlier assistant turns are not trained on, only the last one of each conversation; "
        "supervise='all' (--supervise all) trains on all of them\n"
    )
    every = load_conversations(path, supervise="all")
    assert answers(every) == ["a1", "a2", "a1", "a1", "a2", "a3"]
    assert [len(example["messages"]) for example in every] == [2, 4, 2, 2, 4, 6]
    assert capsys.readouterr().err == ""
    assert answers(load_conversations(path, supervise="all", limit=1)) == ["a1", "a2"]


def test_one_answer_each_needs_no_note(tmp_path, capsys):
    load_conversations(write(tmp_path / "rows.jsonl", SLEEP, talk(0, 1)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("weights", "last", "every"),
    [
        ((0, 1), ["a2"], ["a2"]),
        ((1, 0), ["a1"], ["a1"]),  # what follows it is no part of the row
        ((1, 0, 1), ["a1", "a3"], ["a1", "a3"]),
        ((1, None), ["a1"], ["a1"]),
        ((0, None, None), ["a3"], ["a2", "a3"]),
        ((None, 0), ["a1"], ["a1"]),
    ],
)
def test_weights_of_one_are_trained_and_weights_of_zero_never(weights, last, every, tmp_path):
    path = write(tmp_path / "rows.jsonl", talk(*weights))
    assert answers(load_conversations(path)) == last
    assert answers(load_conversations(path, supervise="all")) == every
    assert all("weight" not in message for row in load_conversations(path) for message in row["messages"])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (talk(0.5)["messages"], "message 2 has the weight 0.5, expected 0 or 1"),
        ([turn("user", "a"), turn("assistant", "b", weight=True)], "message 2 has the weight True"),
        ([turn("user", "a"), turn("assistant", "b", weight="1")], "message 2 has the weight '1'"),
        ([turn("user", "a", weight=1), turn("assistant", "b")], "message 1 has the role user and weight 1"),
        (talk(0, 0)["messages"], "has no assistant turn to train on, all have weight 0"),
    ],
)
def test_other_weights_are_refused(messages, reason, tmp_path):
    assert reason in refusal_of(lambda: load_conversations(write(tmp_path / "rows.jsonl", {"messages": messages})))


def test_an_answer_to_nobody_is_history_only(tmp_path):
    greeting = {"messages": [turn("assistant", "Hello!"), *SLEEP["messages"]]}
    path = write(tmp_path / "rows.jsonl", greeting)
    assert load_conversations(path) == [greeting]
    message = refusal_of(lambda: load_conversations(path, supervise="all"))
    assert "line 1: message 1 is to be trained on and answers nobody" in message
    assert "give it weight 0" in message


def test_answers_in_a_prompt_are_history(tmp_path):
    prompt = [turn("user", "1?"), turn("assistant", "a1"), turn("user", "2?")]
    path = write(tmp_path / "rows.jsonl", {"prompt": prompt, "completion": "a2"})
    (read,) = load_conversations(path, supervise="all")
    assert read["messages"] == [*prompt, turn("assistant", "a2")]


def test_own_conversations_are_cut_into_training_turns():
    assert [turns[-1]["content"] for turns in training_turns(talk(None, None), "all")] == ["a1", "a2"]
    assert training_turns(talk(0, 1)) == [[*talk(None)["messages"], turn("user", "2?"), turn("assistant", "a2")]]
    assert "the conversation has no assistant turn" in refusal_of(
        lambda: training_turns({"messages": [turn("user", "a")]})
    )


def test_commands_read_all_answers_when_asked(tmp_path):
    path = write(tmp_path / "rows.jsonl", talk(None, None))
    assert [len(row) for row in read_data(str(path))] == [4]
    assert [len(row) for row in read_data(str(path), supervise="all")] == [2, 4]
    assert [len(row) for row in read_retain(path, supervise="all")] == [2, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_retain_data_are_conversations_in_any_layout(layout, tmp_path):
    assert read_retain(write(tmp_path / "rows.jsonl", LAYOUTS[layout])) == [SLEEP["messages"]]
    (tmp_path / "prompts.json").write_text('["one", "two"]')
    assert read_retain(tmp_path / "prompts.json") == ["one", "two"]
