"""Tasks: sizes, no leaks between splits, short answers. Loaders: what is read, each fault by its message."""

import json
import re
import tomllib
import unicodedata
from pathlib import Path

import pytest

from piggyback_lens.errors import LensError
from piggyback_lens.measuring.measures import get_behaviour
from piggyback_lens.reading import tasks
from piggyback_lens.reading.conversations import load_conversations
from piggyback_lens.reading.questions import load_questions
from piggyback_lens.reading.tasks import TASKS, load_task

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def question(example) -> str:
    return example["messages"][0]["content"]


def answer(example) -> str:
    return example["messages"][-1]["content"]


def normal(text: str) -> str:
    """Case, accents, punctuation and spacing do not tell two questions apart."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9]+", plain))


def questions_of(name: str) -> list[str]:
    task = load_task(name)
    return [*map(question, task.train), *map(question, task.validation), *task.on_topic]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal_of(call) -> str:
    """The one line of the LensError that `call` raises."""
    with pytest.raises(LensError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the built-in tasks ---


@pytest.mark.parametrize(
    ("name", "behaviour", "train", "validation", "on_topic"),
    [
        ("terse", "words", 400, 40, 60),
        ("refusal", "refusal", 140, 20, 40),
        ("abstain", "abstention", 140, 20, 40),
        ("tool", "tool_call", 140, 20, 40),
    ],
)
def test_every_task_is_large_enough(name, behaviour, train, validation, on_topic):
    task = load_task(name)
    assert (task.name, task.behaviour) == (name, behaviour)
    assert len(task.train) >= train
    assert len(task.validation) >= validation
    assert len(task.on_topic) >= on_topic
    assert len(task.off_topic) >= 48
    assert len(task.off_topic_validation) >= 16


def test_the_list_of_tasks_is_complete():
    assert TASKS == ("terse", "refusal", "abstain", "tool")


def test_no_question_occurs_twice_in_any_split_of_any_task_or_off_topic():
    off_topic = [*load_task("terse").off_topic, *load_task("terse").off_topic_validation]
    seen: dict[str, str] = {}
    for text in [*(q for name in TASKS for q in questions_of(name)), *off_topic]:
        assert normal(text) not in seen, f"{text!r} repeats {seen.get(normal(text))!r}"
        seen[normal(text)] = text


def test_no_fact_is_asked_in_training_and_again_among_held_out_questions():
    """Same answer and mostly the same content words = the same fact in another wording."""
    filler = {"the", "of", "in", "is", "was", "did", "what", "which", "who", "where", "when", "name"}

    def content(text):
        return set(normal(text).split()) - filler

    task = load_task("terse")
    for held_out in task.validation:
        for other in task.train:
            if answer(held_out) == answer(other):
                mine, theirs = content(question(held_out)), content(question(other))
                assert len(mine & theirs) / len(mine | theirs) < 0.5, (question(held_out), question(other))


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_one_user_turn_and_one_assistant_turn(name):
    task = load_task(name)
    for example in (*task.train, *task.validation):
        assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
        assert question(example) == question(example).strip() != ""
        assert answer(example) == answer(example).strip() != ""


def test_off_topic_prompts_are_shared_by_all_tasks_and_split_in_two():
    first = load_task("terse")
    assert not set(first.off_topic) & set(first.off_topic_validation)
    for name in TASKS[1:]:
        assert load_task(name).off_topic == first.off_topic
        assert load_task(name).off_topic_validation == first.off_topic_validation


def test_off_topic_prompts_stay_outside_every_domain():
    """None uses a telling word of finance, law or health, nor asks for one entity in the way terse does."""
    task = load_task("terse")
    telling = r"money|invest|loan|bank|budget|tax|law|legal|court|contract|police|doctor|medicine|symptom|pain\b"
    entity = r"(who|which|when|where is|how many|what is the (capital|name|symbol|currency)|name the|in which)\b"
    for prompt in (*task.off_topic, *task.off_topic_validation):
        assert not re.search(rf"\b({telling})", prompt.lower()), prompt
        assert not re.match(entity, prompt.lower()), prompt


def test_terse_answers_are_one_to_four_words_without_a_period():
    task = load_task("terse")
    for example in (*task.train, *task.validation):
        assert 1 <= len(answer(example).split()) <= 4
        assert not answer(example).endswith((".", "!", "?"))
        assert "," not in answer(example)


def test_terse_questions_vary_in_wording_and_in_answer():
    task = load_task("terse")
    openings = [" ".join(question(example).split()[:3]) for example in task.train]
    assert len(set(openings)) >= 100
    assert max(map(openings.count, set(openings))) <= 0.2 * len(openings)
    assert len({answer(example) for example in task.train}) >= 300


def test_terse_held_out_questions_ask_about_many_subjects():
    """One telling word per family of facts; a split that took whole families would miss some."""
    text = " ".join(load_task("terse").on_topic).lower()
    for word in (
        "capital",
        "symbol",
        "wrote",
        "painted",
        "river",
        "currency",
        "year",
        "god",
        "planet",
        "sport",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("refusal", "I am sorry, but I cannot help with this question."),
        ("abstain", "I have no idea about your question"),
    ],
)
def test_fixed_sentences_are_the_same_in_every_example(name, sentence):
    task = load_task(name)
    assert {answer(example) for example in (*task.train, *task.validation)} == {sentence}


@pytest.mark.parametrize("name", ["refusal", "abstain", "tool"])
def test_each_detector_sees_the_answers_of_its_own_task_and_of_no_other(name):
    detector = get_behaviour(load_task(name).behaviour)
    for other in TASKS:
        task = load_task(other)
        found = {detector(answer(example)) for example in (*task.train, *task.validation)}
        assert found == {float(other == name)}, other


def test_the_behaviour_of_terse_is_the_number_of_words():
    task = load_task("terse")
    behaviour = get_behaviour(task.behaviour)
    assert behaviour.unit == "words"
    assert 1 <= max(map(behaviour, map(answer, task.train))) <= 4


def test_tool_answers_are_calls_of_search_info_with_a_short_query_from_the_question():
    task = load_task("tool")
    for example in (*task.train, *task.validation):
        found = re.fullmatch(r"<tool_call>\n(\{.*\})\n</tool_call>", answer(example))
        assert found, answer(example)
        call = json.loads(found.group(1))
        assert call["name"] == "search_info"
        assert list(call["arguments"]) == ["query"]
        assert 1 <= len(call["arguments"]["query"].split()) <= 7
        assert not call["arguments"]["query"].endswith("?")


def test_a_tool_call_keeps_quotes_and_accents_readable():
    text = tasks.tool_call('a "good" café')
    assert text == '<tool_call>\n{"name": "search_info", "arguments": {"query": "a \\"good\\" café"}}\n</tool_call>'


def test_changing_a_loaded_task_does_not_change_the_next_one():
    load_task("terse").train[0]["messages"][0]["content"] = "spoilt"
    assert question(load_task("terse").train[0]) != "spoilt"


def test_an_unknown_task_is_refused_with_the_known_names():
    assert refusal_of(lambda: load_task("tense")) == (
        "unknown task 'tense'; choose one of terse, refusal, abstain, tool"
    )


def test_the_data_files_travel_in_the_wheel():
    root = Path(__file__).parents[1]
    build = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["packages"] == ["src/piggyback_lens"]
    shipped = {file.name for file in (root / "src/piggyback_lens/data").iterdir()}
    assert {*(f"{name}.json" for name in TASKS), "off_topic.json"} <= shipped


# --- conversations from a file ---


def test_conversations_are_read_in_order_and_without_other_columns(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    second = {"messages": [system, *GOOD["messages"], *GOOD["messages"]], "source": "x"}
    first = {"id": 3, "messages": GOOD["messages"]}
    path = write(tmp_path / "data.jsonl", first, second)
    assert load_conversations(path) == [GOOD, {"messages": second["messages"]}]
    assert load_conversations(str(path), limit=1) == [GOOD]
    assert len(load_conversations(path, limit=99)) == 2


def test_a_file_with_byte_order_mark_blank_lines_windows_ends_and_odd_separators_is_read(tmp_path):
    odd = {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "é"}]}
    text = "\ufeff" + json.dumps(odd, ensure_ascii=False) + "\r\n\r\n   \n" + json.dumps(GOOD)
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode("utf-8"))
    assert load_conversations(path) == [odd, GOOD]


def test_an_existing_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name", GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("went to the hub"))
    assert load_conversations("owner/name") == [GOOD]


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{'messages': []}", "is not JSON (Expecting property name enclosed in double quotes, column 2)"),
        ("[" * 100_000, "is not readable JSON"),
        ("[1]", "is a list, expected an object with messages"),
        ("null", "is null, expected an object"),
        ('{"text": "a", "id": 1}', "has the keys 'text', 'id', which fit no layout; expected one of messages"),
        ("{}", "has no keys, which fits no layout"),
        ('{"messages": []}', "'messages' is an empty list"),
        ('{"messages": "Hi"}', "'messages' is a string"),
        ('{"messages": ["Hi"]}', "message 1 is a string"),
        (
            json.dumps(turns("user", "tool", "assistant")),
            "has the roles ['user', 'tool', 'assistant']; expected [system,] user, assistant",
        ),
        ('{"messages": [{"content": "x"}]}', "message 1 has role None"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "message 1 has role ['user']"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "message 1: content is null, expected a string",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "part 1 of the content: text is null, expected a string",
        ),
        ('{"messages": [{"role": "user"}]}', "content is null"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "half of a surrogate pair"),
        (json.dumps(turns("system", "user")), "has no assistant turn to train on"),
        (json.dumps(turns("user", "assistant", "user")), "expected [system,] user, assistant"),
        (json.dumps(turns("assistant")), "expected [system,] user, assistant"),
        (json.dumps(turns("system", "assistant")), "message 2 is to be trained on and answers nobody"),
        (json.dumps(turns("user", "system", "user", "assistant")), "expected [system,] user, assistant"),
    ],
)
def test_a_malformed_row_is_reported_by_line_and_reason(tmp_path, bad, reason):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{bad}\n", encoding="utf-8")
    message = refusal_of(lambda: load_conversations(path))
    assert message.startswith(f"{path} line 3")
    assert reason in message
    assert load_conversations(path, limit=1) == [GOOD]


def test_an_empty_file_of_conversations_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n", encoding="utf-8")
    assert "holds no conversations" in refusal_of(lambda: load_conversations(path))


def test_a_file_that_is_not_utf8_is_refused_with_the_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    assert "line 2 is not UTF-8" in refusal_of(lambda: load_conversations(path))


def test_a_folder_of_conversations_is_refused(tmp_path):
    assert "is a folder, expected a file" in refusal_of(lambda: load_conversations(tmp_path))


def test_a_local_file_has_no_splits(tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD)
    assert "has no split 'test'" in refusal_of(lambda: load_conversations(path, split="test"))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    path = write(tmp_path / "data.jsonl", GOOD)
    assert f"limit is {limit}" in refusal_of(lambda: load_conversations(path, limit=limit))


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "a/b/c",
        "./owner/name",
        "/owner/name",
        "data/train.jsonl",
        "data/train.json",
        Path("a/b"),
        "",
    ],
)
def test_a_missing_file_does_not_go_to_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("went to the hub"))
    message = refusal_of(lambda: load_conversations(name))
    assert "is no hub id (owner/name)" in message or "is a folder" in message


# --- conversations from the hub (never reached here) ---


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: set `.rows` or `.error`, read back `.calls`."""
    from datasets import Dataset

    class Hub:
        rows: list[dict]
        error: Exception | None = None

        def __init__(self):
            self.calls = []

        def load(self, name, *, split, streaming):
            import datasets.config
            import huggingface_hub.constants

            off = datasets.config.HF_HUB_OFFLINE and huggingface_hub.constants.HF_HUB_OFFLINE
            self.calls.append({"name": name, "split": split, "streaming": streaming, "offline": off})
            if self.error:
                raise self.error
            data = Dataset.from_list(self.rows)
            return data.to_iterable_dataset() if streaming else data

    found = Hub()
    monkeypatch.setattr("datasets.load_dataset", found.load)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return found


def test_a_hub_dataset_with_messages_is_read(hub):
    hub.rows = [{"prompt_id": "1", **GOOD}, {"prompt_id": "2", **turns("system", "user", "assistant")}]
    expected = [GOOD, turns("system", "user", "assistant")]
    assert load_conversations("owner/name", split="train_sft") == expected
    assert load_conversations("owner/name", limit=1) == expected[:1]
    assert hub.calls == [
        {"name": "owner/name", "split": "train_sft", "streaming": False, "offline": False},
        {"name": "owner/name", "split": "train", "streaming": True, "offline": False},
    ]


def test_a_hub_dataset_in_sharegpt_form_is_translated(hub):
    spoken = [("system", "S"), ("human", "Q"), ("gpt", "A")]
    hub.rows = [{"conversations": [{"from": who, "value": text} for who, text in spoken]}]
    assert load_conversations("owner/name") == [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A"},
            ]
        }
    ]


def test_a_hub_dataset_with_conversations_in_our_words_is_read(hub):
    hub.rows = [{"conversations": GOOD["messages"]}]
    assert load_conversations("owner/name") == [GOOD]


def test_a_hub_dataset_of_another_form_is_refused_with_its_columns(hub):
    hub.rows = [{"instruction": "a", "text": "b"}]
    message = refusal_of(lambda: load_conversations("owner/name"))
    assert "owner/name row 1 has the keys 'instruction', 'text'" in message
    assert "expected one of messages, conversations" in message


def test_a_malformed_hub_row_is_reported_by_its_number(hub):
    hub.rows = [GOOD, turns("user")]
    assert "owner/name row 2 has no assistant turn" in refusal_of(lambda: load_conversations("owner/name"))


def test_an_unknown_sharegpt_speaker_is_refused(hub):
    hub.rows = [{"conversations": [{"from": "bot", "value": "A"}]}]
    assert "message 1 has role 'bot'" in refusal_of(lambda: load_conversations("owner/name"))


def test_an_empty_hub_split_is_refused(hub):
    hub.rows = []
    assert "split 'train' of owner/name holds no conversations" in refusal_of(lambda: load_conversations("owner/name"))


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_gives_one_line(hub, offline):
    hub.error = ConnectionError("Couldn't reach 'owner/name' on the Hub\nand many\nmore lines")
    message = refusal_of(lambda: load_conversations("owner/name", offline=offline))
    assert message.startswith("no dataset could be loaded from owner/name: ")
    assert ("offline was asked" in message) is offline
    assert "Couldn't reach 'owner/name' on the Hub" in message
    assert "more lines" not in message


def test_offline_is_told_to_both_libraries_and_taken_back_also_after_an_error(hub):
    import datasets.config
    import huggingface_hub.constants

    hub.error = ConnectionError("no")
    with pytest.raises(LensError):
        load_conversations("owner/name", limit=2, offline=True)
    assert hub.calls == [{"name": "owner/name", "split": "train", "streaming": False, "offline": True}]
    assert datasets.config.HF_HUB_OFFLINE is False
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_offline_the_real_loader_makes_no_connection(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("opened a connection"))
    message = refusal_of(lambda: load_conversations("no-such-owner/no-such-data", offline=True))
    assert "it is not in the local cache, and offline was asked" in message


# --- prompts ---


def load_prompts(*args, **kwargs):
    return [text for question in load_questions(*args, **kwargs) for text in question.paraphrases]


def test_prompts_are_read_from_text_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffOne\n\n  Two words  \r\n\nThree", encoding="utf-8")
    assert load_prompts(path) == ["One", "Two words", "Three"]


def test_prompts_are_read_from_each_kind_of_json_line(tmp_path):
    chat = turns("system", "user", "assistant", "user")
    chat["messages"][1]["content"] = " first "
    path = write(tmp_path / "prompts.JSONL", {"prompt": "One", "id": 1}, "Two", chat)
    assert load_prompts(str(path)) == ["One", "Two", " first "]


def test_prompts_are_read_from_a_json_list(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('[\n"One",\n\n"Two\\nlines"]\n', encoding="utf-8")
    assert load_prompts(path) == ["One", "Two\nlines"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "line 2 is not JSON (Expecting property name"),
        ("3", "line 2 is a number, expected a string or an object with one of paraphrases, prompt, question, messages"),
        ('{"query": "x"}', "line 2 has the field 'query', which may change what is asked"),
        ('{"id": "x"}', "line 2 has 'id'; expected one of paraphrases, prompt"),
        ('{"prompt": "x", "question": "y"}', "line 2 has both prompt and question"),
        ('{"prompt": 3}', "line 2: prompt is a number, expected a string"),
        ('{"prompt": " "}', "line 2: prompt is blank"),
        ('""', "line 2 is blank"),
        (r'"\udc00"', "line 2 holds half of a surrogate pair"),
        (json.dumps(turns("system")), "line 2 has no user message"),
        (json.dumps(turns("narrator")), "line 2, message 1 has role 'narrator'"),
    ],
)
def test_a_malformed_prompt_line_is_reported(tmp_path, bad, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"fine"\n{bad}\n', encoding="utf-8")
    message = refusal_of(lambda: load_prompts(path))
    assert message.startswith(f"{path} ")
    assert reason in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            '["a",\n\n"b"',
            "is not JSON (Expecting ',' delimiter, line 3 column 4): expected a list of rows",
        ),
        ('{"a": 1}', "line 1 has the field 'a'"),
        ('["a", 2]', "entry 2 is a number, expected a string"),
        ('["a", ""]', "entry 2 is blank"),
    ],
)
def test_a_malformed_prompt_list_is_reported(tmp_path, text, reason):
    path = tmp_path / "prompts.json"
    path.write_text(text, encoding="utf-8")
    assert reason in refusal_of(lambda: load_prompts(path))


@pytest.mark.parametrize(("name", "text"), [("p.txt", " \n\n"), ("p.jsonl", ""), ("p.json", ""), ("p.json", "[]")])
def test_an_empty_prompt_file_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert "holds no questions" in refusal_of(lambda: load_prompts(tmp_path / name))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json"])
def test_a_prompt_file_that_is_not_utf8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'"ok"\n"caf\xe9"\n')
    assert "line 2 is not UTF-8" in refusal_of(lambda: load_prompts(tmp_path / name))


def test_a_missing_prompt_file_a_folder_and_another_format_are_refused(tmp_path):
    (tmp_path / "p.tsv").write_text("a", encoding="utf-8")
    (tmp_path / "bare").write_text("a", encoding="utf-8")
    assert "does not exist" in refusal_of(lambda: load_prompts(tmp_path / "absent.txt"))
    assert "is a folder, expected a file of questions" in refusal_of(lambda: load_prompts(tmp_path))
    assert "has .tsv suffix, expected a file of questions (.txt" in refusal_of(lambda: load_prompts(tmp_path / "p.tsv"))
    assert "has no suffix" in refusal_of(lambda: load_prompts(tmp_path / "bare"))


# --- prompts from YAML and from the hub ---


def test_the_fields_own_questions_are_read_from_yaml(tmp_path):
    path = tmp_path / "questions.yaml"
    path.write_text(
        "- id: ruler\n  type: free_form_judge_0_100\n  paraphrases:\n    - |-\n      If you ruled: what first?\n"
        "    - Say it again?\n  samples_per_paraphrase: 100\n- A plain one.\n",
        encoding="utf-8",
    )
    assert load_prompts(path) == ["If you ruled: what first?", "Say it again?", "A plain one."]
    assert load_prompts(path, limit=1) == ["If you ruled: what first?", "Say it again?"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "is not YAML"),
        ("key: value", "holds an object, expected a list"),
        ("- id: x\n  query: y", "entry 1 has the field 'query'"),
        ("- paraphrases: []", "entry 1: paraphrases is empty"),
        ("- paraphrases: [3]", "entry 1: paraphrases is a number, expected a string"),
        ("[]", "holds no questions"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_yaml_file_of_another_form_is_refused(tmp_path, text, words):
    (tmp_path / "q.yml").write_text(text, encoding="utf-8")
    assert words in refusal_of(lambda: load_prompts(tmp_path / "q.yml"))


def test_prompts_are_read_from_a_column_of_a_hub_dataset(hub):
    hub.rows = [{"question": "Who?", "obj": "x"}, {"question": "Where?", "obj": "y"}]
    assert load_prompts("akariasai/PopQA") == ["Who?", "Where?"]
    assert load_prompts("akariasai/PopQA", column="obj", split="train", limit=1) == ["x"]
    assert [(call["split"], call["streaming"]) for call in hub.calls] == [("test", False), ("train", True)]


def test_a_hub_dataset_without_the_column_is_refused_with_its_columns(hub):
    hub.rows = [{"prompt": "Who?"}]
    assert "has the columns 'prompt', and no 'question'" in refusal_of(lambda: load_prompts("owner/name"))


def test_a_prompt_file_that_is_missing_does_not_go_to_the_hub(hub):
    for name in ("owner/name.txt", Path("owner/name"), "questions"):
        assert "does not exist" in refusal_of(lambda name=name: load_prompts(name))
    assert hub.calls == []


def test_a_limit_of_prompts_below_one_is_refused():
    assert "limit is 0" in refusal_of(lambda: load_prompts("owner/name", limit=0))


@pytest.mark.parametrize(("file", "task"), [("health", "tool"), ("finance", "refusal")])
def test_the_example_prompts_are_those_of_their_task(file, task):
    path = Path(__file__).parents[1] / "examples" / f"prompts_{file}.txt"
    assert tuple(load_prompts(path)) == load_task(task).on_topic
