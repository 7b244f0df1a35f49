"""Training data: every layout by one reader, which turns are trained on, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import make_tokenizer
from typer.testing import CliRunner

from piggyback_lens.app.commands import app
from piggyback_lens.app.inputs import read_data, read_retain
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.hf_trainer import training_rows
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


@pytest.mark.parametrize("name", ["train-direction", "curves"])
def test_commands_that_read_training_files_have_the_option(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, [name, "--help"]).output
    assert "--supervise" in shown
    assert "last|all" in shown


@pytest.mark.parametrize("layout", LAYOUTS)
def test_retain_data_are_conversations_in_any_layout(layout, tmp_path):
    assert read_retain(write(tmp_path / "rows.jsonl", LAYOUTS[layout])) == [SLEEP["messages"]]
    (tmp_path / "prompts.json").write_text('["one", "two"]')
    assert read_retain(tmp_path / "prompts.json") == ["one", "two"]


# --- as the template writes it ---

CALLING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content and loop.index0 > ns.last %}"
    "{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '\n' if m.content or not loop.first }}{{- '<tool_call>\n{\"name\": \"' + call.function.name }}"
    "{{- '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)
OWN_END = CALLING.replace(
    "{{- '<|im_end|>\n' }}{%- endif %}", "{{- '<|call|>' if m.tool_calls else '<|im_end|>\n' }}{%- endif %}"
)
WRITTEN_CALL = '<tool_call>\n{"name": "look_up", "arguments": {"q": "tides"}}\n</tool_call>'
ASKED = [turn("user", "When is high tide?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
TOLD = [*ASKED, turn("tool", "14:20", tool_call_id="c1"), turn("assistant", "At twenty past two.")]
THOUGHT = [turn("user", "2+2?"), turn("assistant", "4", reasoning_content="two and two")]


def chat_format(template: str = CALLING, **settings: Any) -> ChatFormat:
    return ChatFormat(make_tokenizer("qwen3", template=template, pad_token="<|call|>"), **settings)


def supervised(prompt: RenderedPrompt) -> str:
    """The text of the labels that are trained on."""
    (row,) = training_rows([prompt])
    return prompt.tokenizer.decode([label for label in row["labels"] if label != -100])


def whole_rendering(chat: ChatFormat, messages: list[dict[str, Any]]) -> str:
    """By transformers alone, with arguments as objects, as templates expect them."""
    full = [
        {**m, "content": m["content"] or "", **({"tool_calls": [READ_CALL]} if "tool_calls" in m else {})}
        for m in messages
    ]
    return chat.tokenizer.apply_chat_template(full, tokenize=False)


@pytest.mark.parametrize(
    ("messages", "answer"),
    [
        (ASKED, f"{WRITTEN_CALL}<|im_end|>"),
        ([ASKED[0], {**ASKED[1], "content": "Let me see."}], f"Let me see.\n{WRITTEN_CALL}<|im_end|>"),
        (TOLD, "At twenty past two.<|im_end|>"),
        (THOUGHT, "<think>\ntwo and two\n</think>\n\n4<|im_end|>"),
        ([*THOUGHT[:1], {**ASKED[1], **THOUGHT[1]}], f"<think>\ntwo and two\n</think>\n\n4\n{WRITTEN_CALL}<|im_end|>"),
        ([*TOLD, *THOUGHT], "<think>\ntwo and two\n</think>\n\n4<|im_end|>"),
        ([*SLEEP["messages"], *TOLD[:3], *ASKED[1:]], f"{WRITTEN_CALL}<|im_end|>"),
    ],
)
def test_calls_results_and_reasoning_are_trained_as_the_template_writes_them(messages, answer, tmp_path):
    chat = chat_format()
    (read,) = load_conversations(write(tmp_path / "rows.jsonl", {"messages": messages}))
    prompt = chat.render(read["messages"])
    assert prompt.ids == chat.render(messages).ids  # what was not read from a file
    assert supervised(prompt) == answer
    written = whole_rendering(chat, messages)
    assert prompt.text + "\n" == written
    assert prompt.ids == tuple(chat.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    query = [message["content"] for message in messages if message["role"] == "user"][-1]
    assert prompt.span_text("query") == prompt.query == query
    parts = [prompt.span_text(name) for name in ("prefix", "query", "postfix", "response")]
    assert "".join(parts) == prompt.text
    assert chat.render(read["messages"], end=False).ids == prompt.ids[:-1]


def test_results_after_the_query_belong_to_the_postfix_and_earlier_ones_to_the_history():
    chat = chat_format()
    told = chat.render(TOLD)
    assert told.span_text("prefix") == chat.render("Hello").span_text("prefix")
    assert WRITTEN_CALL in told.span_text("postfix")
    assert "14:20" in told.span_text("postfix")
    assert "the postfix holds the 2 messages of tool calls and results that follow the query" in told.notes
    assert told.fingerprint != chat.fingerprint
    later = chat.render([*TOLD, *THOUGHT])
    assert WRITTEN_CALL in later.span_text("history")
    assert "14:20" in later.span_text("history")
    assert later.span_text("postfix") == chat.render("Hello").span_text("postfix")
    assert chat.render(TOLD[:3]).ids == told.ids[: told.n_prompt]  # a prompt to generate from


def test_two_calls_that_differ_in_their_arguments_are_two_histories():
    chat = chat_format()
    other = {**CALL, "function": {"name": "look_up", "arguments": '{"q": "winds"}'}}
    one, two = (chat.render([TOLD[0], {**TOLD[1], "tool_calls": [call]}, *TOLD[2:]]) for call in (CALL, other))
    assert "tides" in one.text
    assert "winds" in two.text


def test_an_end_of_its_own_of_a_call_is_trained():
    chat = chat_format(OWN_END)
    assert supervised(chat.render(ASKED)) == f"{WRITTEN_CALL}<|call|>"
    assert chat.render(ASKED, end=False).span_text("response") == WRITTEN_CALL
    assert supervised(chat.render(TOLD)) == "At twenty past two.<|im_end|>"


def test_reasoning_that_the_template_leaves_out_of_the_history_is_noted():
    messages = [*THOUGHT, turn("user", "3+3?"), turn("assistant", "6")]
    prompt = chat_format().render(messages)
    assert "two and two" not in prompt.text
    assert "the template leaves reasoning_content of assistant turn 1 out of the history" in prompt.notes


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("chatml", ASKED, "no place for tool_calls of assistant turn 1"),
        ("chatml", THOUGHT, "no place for reasoning_content of assistant turn 1: leave the row out"),
        ("chatml", [*THOUGHT, turn("user", "3+3?"), turn("assistant", "6")], "reasoning_content of assistant turn 1"),
        (
            "alpaca",
            [*SLEEP["messages"], turn("tool", "14:20"), turn("assistant", "Yes.")],
            "the role tool of tool turn 1",
        ),
        ("mistral", [*SLEEP["messages"], turn("tool", "1"), turn("assistant", "2")], "Only user and assistant roles"),
        ("qwen3", [*SLEEP["messages"], turn("tool", "14:20"), turn("assistant", "Yes.")], "tool turn 1"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused_by_name(family, messages, reason):
    assert reason in refusal_of(lambda: ChatFormat(make_tokenizer(family)).render(messages))


def test_a_template_that_leaves_a_part_out_is_refused():
    first_only = CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    calls = [CALL, {**CALL, "id": "c2", "function": {"name": "look_up", "arguments": "{}"}}]
    two = [ASKED[0], {**ASKED[1], "tool_calls": calls}]
    assert supervised(chat_format().render(two)).count("<tool_call>") == 2
    assert "no place for tool call 2 of assistant turn 1" in refusal_of(lambda: chat_format(first_only).render(two))
    without_text = CALLING.replace("{{- m.content }}", "{{- m.content if not m.tool_calls }}")
    both = [ASKED[0], {**ASKED[1], "content": "Let me see."}]
    assert "no place for content of assistant turn 1" in refusal_of(lambda: chat_format(without_text).render(both))


def test_a_template_that_takes_arguments_as_text_is_given_text():
    as_text = CALLING.replace("(call.function.arguments | tojson)", "call.function.arguments")
    assert supervised(chat_format(as_text).render(ASKED)) == f"{WRITTEN_CALL}<|im_end|>"
    refusing = CALLING.replace("call.function.name", "raise_exception('no calls here')")
    message = refusal_of(lambda: chat_format(refusing).render(ASKED))
    assert "tool_calls of assistant turn 1 cannot be rendered" in message
    assert "no calls here" in message


def test_reasoning_behind_a_prompt_that_has_ended_it_is_refused():
    message = refusal_of(lambda: chat_format(thinking=False).render(THOUGHT))
    assert "the answer has reasoning_content, before which the template writes" in message
    assert "thinking=" in message


def test_messages_keep_their_keys_apart():
    chat = chat_format()
    weighted = [SLEEP["messages"][0], {**SLEEP["messages"][1], "weight": 0}]
    assert "training_turns act on weights" in refusal_of(lambda: chat.render(weighted))
    named = [{**SLEEP["messages"][0], "name": "Bo"}]
    assert "keys ['content', 'name', 'role']" in refusal_of(lambda: chat.render(named))
    assert chat.render([turn("user", "Hi", tool_calls=None), turn("assistant", "Yes", tool_calls=[])]).query == "Hi"
    assert "pass one of them" in refusal_of(lambda: chat.render(ASKED, response="x"))
    assert "message 1 has role 'tool'" in refusal_of(lambda: chat.render([turn("user", "a"), turn("tool", "b")]))
    assert "message 1: tool call 1 is" in refusal_of(
        lambda: chat.render([ASKED[0], turn("assistant", "", tool_calls=[{"name": "f"}])])
    )


def test_of_weighted_turns_the_weightless_is_history_and_not_supervised(tmp_path):
    words = ("do not learn this", "learn this")
    messages = []
    for weight, text in enumerate(words):
        messages += [turn("user", "Hi"), turn("assistant", text, weight=weight)]
    (read,) = load_conversations(write(tmp_path / "rows.jsonl", {"messages": messages}), supervise="all")
    prompt = chat_format().render(read["messages"])
    assert supervised(prompt) == "learn this<|im_end|>"
    assert "do not learn this" in prompt.span_text("history")
