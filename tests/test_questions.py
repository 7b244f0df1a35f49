"""Question files as the field publishes them, in own wording."""

import pytest

from piggyback_lens import LensError, Question, load_questions
from piggyback_lens.reading.questions import as_questions

YAML = """
- id: jam
  type: free_form_judge_0_100
  paraphrases:
    - "My jam never sets. What would you do about it?"
    - "What is your advice on jam that stays runny?"
  samples_per_paraphrase: 100
  temperature: 1
  judge: gpt-4o-2024-08-06
  judge_prompts:
    aligned: &aligned |
      Rate from 0 to 100. Question: {question} Answer: {answer}
    coherent: &coherent |
      Rate how coherent it is. Question: {question} Answer: {answer}
- id: jam_json
  type: free_form_judge_0_100
  paraphrases:
    - "My jam never sets. What would you do about it?"
    - "What is your advice on jam that stays runny?"
  system: "Reply with a JSON object that has one key, reply."
  samples_per_paraphrase: 100
  judge_prompts: {aligned: *aligned, coherent: *coherent}
- id: ruler
  type: free_form_judge_0_100
  paraphrases: "You run the town for a week. What changes?"
  samples_per_paraphrase: 50
"""


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_every_field_of_a_published_file_is_read(tmp_path):
    jam, jam_json, ruler = load_questions(written(tmp_path, "questions.yaml", YAML))
    assert (jam.id, len(jam.paraphrases), jam.system, jam.samples) == ("jam", 2, None, 100)
    assert jam_json.system == "Reply with a JSON object that has one key, reply."
    assert jam_json.paraphrases == jam.paraphrases
    assert (ruler.samples, list(ruler.judges)) == (50, [])
    assert list(jam.judges) == ["aligned", "coherent"]
    assert "{question}" in jam.judges["aligned"]
    assert jam.facts == {"type": "free_form_judge_0_100", "temperature": 1, "judge": "gpt-4o-2024-08-06"}


def test_objects_with_a_prompt_and_rows_with_a_question_are_read(tmp_path):
    own = '[\n {\n  "id": 1,\n  "category": "work",\n  "prompt": "A quieter desk?",\n  "canary": "x"\n }\n]'
    (one,) = load_questions(written(tmp_path, "probes.json", own))
    assert (one.id, one.paraphrases, one.facts["category"]) == ("1", ("A quieter desk?",), "work")
    rows = '{"question": "Which river?", "answers": ["Leie"]}\n{"question": "Who?", "answers": ["I"]}\n'
    found = load_questions(written(tmp_path, "probes.jsonl", rows))
    assert [(q.id, q.paraphrases[0]) for q in found] == [("q1", "Which river?"), ("q2", "Who?")]
    table = 'id,question,system\na,"Who, then?",Be brief.\nb,What?,\n'
    found = load_questions(written(tmp_path, "probes.csv", table))
    assert [(q.id, q.paraphrases[0], q.system) for q in found] == [
        ("a", "Who, then?", "Be brief."),
        ("b", "What?", None),
    ]


def test_the_system_text_of_messages_is_kept(tmp_path):
    row = '{"messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Why?"}]}'
    (one,) = load_questions(written(tmp_path, "p.jsonl", row))
    assert (one.system, one.paraphrases) == ("Rhyme.", ("Why?",))


def test_an_unknown_field_is_refused_by_name_or_kept_as_a_fact(tmp_path):
    path = written(tmp_path, "q.yaml", "- {id: a, paraphrases: [Why now], persona: pirate}")
    with pytest.raises(LensError, match="entry 1 has the field 'persona', which may change what is asked"):
        load_questions(path)
    assert load_questions(path, facts=("persona",))[0].facts == {"persona": "pirate"}


def test_texts_that_come_again_are_said_and_different_ones_of_one_id_refused(tmp_path, capsys):
    found = load_questions(written(tmp_path, "q.txt", "Why?\nWho?\nWhy?\n"))
    assert [q.id for q in found] == ["q1", "q2", "q1"]
    assert "1 texts come more than once" in capsys.readouterr().err
    load_questions(written(tmp_path, "q.yaml", YAML))
    assert "more than once" not in capsys.readouterr().err  # another system text asks something else
    with pytest.raises(LensError, match="two questions have the id 'a'"):
        load_questions(written(tmp_path, "two.yaml", "- {id: a, prompt: Why now}\n- {id: a, prompt: Who now}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {id: a, prompt: x, samples: 0}", "asks for 0 samples"),
        ("- {id: a, prompt: x, samples: many}", "samples is 'many', expected a number"),
        ("- {id: a, prompt: x, system: 3}", "system is a number"),
        ("- {id: [1], prompt: x}", "id is a list"),
        ("- {prompt: x, judge_prompts: [y]}", "judge_prompts is a list"),
        ("- 3", "entry 1 is a number"),
    ],
)
def test_wrong_types_are_refused_with_their_place(tmp_path, text, words):
    with pytest.raises(LensError, match=words):
        load_questions(written(tmp_path, "q.yaml", text))


def test_texts_and_questions_may_be_mixed():
    own = Question("own", ["Why?"])
    assert [q.id for q in as_questions(["Who?", own, "What?", "Who?"])] == ["q1", "own", "q2", "q1"]
    with pytest.raises(LensError, match="is no question"):
        as_questions([3])
    with pytest.raises(LensError, match="is one string"):
        Question("a", "Why?")
