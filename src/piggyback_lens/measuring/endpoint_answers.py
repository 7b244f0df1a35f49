"""Answers from a model server: to questions as an audit asks them, in rows that an audit takes as made elsewhere."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from piggyback_lens.errors import LensError
from piggyback_lens.files import append_jsonl, read_json, read_jsonl, write_json
from piggyback_lens.measuring.endpoint import Endpoint, Failure, Reply, Request
from piggyback_lens.progress import say, shows
from piggyback_lens.reading.questions import Question, as_questions
from piggyback_lens.results.run import refuse_other
from piggyback_lens.settings import AnswerSettings

KEYS = ("condition", "question", "prompt", "sample")
"""What tells rows of answers apart."""


@shows("answers")
def sample_endpoint(
    endpoint: Endpoint,
    questions: Iterable[str | Question],
    settings: AnswerSettings = AnswerSettings(),
    *,
    condition: str,
    out: str | Path,
    system: str | None = None,
    progress: bool | str = True,
) -> list[dict[str, Any]]:
    """Answer questions with a model behind an endpoint, into a file that `audit` takes as answers made elsewhere.

    Every paraphrase is asked under its question's own system text, as many times as the settings say. Each sample is
    a request with a seed of its own. The same call again asks only for what is missing in the file; the settings of
    each condition stand beside it, in `out` with .settings.json at its end.

    Args:
        endpoint: where the model runs, under the same chat template as the pair of the audit.
        questions: texts, or what `load_questions` reads.
        settings: number, length and temperature of the answers; 0 samples for what each question asks for. The size of
            a batch is the endpoint's concurrency.
        condition: which model it is, such as base or finetuned.
        out: JSONL file of rows with condition, question, prompt, sample, response and ended (stop or length). Several
            conditions may share it.
        system: system text of questions that bring none; None sends none, so that the server's template has its own.
        progress: show a line with the time left, and say what is spent; a text is its label.

    Returns:
        The rows of this condition that there are, in the order of the questions. A request that failed has none; how
        many did, and why, is said.

    Raises:
        LensError: as `Endpoint.ask`, a file of other settings, or no answer at all.
    """
    file = Path(out)
    wanted = dict(_requests(as_questions(questions), settings, condition, system))
    _refuse_other_settings(file, endpoint, settings, condition, system)
    rows = {key: row for key, row in _rows(file) if key in wanted}
    missing = [key for key in wanted if key not in rows]

    def keep(replies: list[tuple[int, Reply]]) -> None:
        new = {missing[place]: _row(missing[place], reply) for place, reply in replies}
        append_jsonl(file, new.values())
        rows.update(new)

    label = f"answers of {condition}" if progress else False
    found = endpoint.ask([wanted[key] for key in missing], progress=label, keep=keep)
    failed = [outcome.reason for outcome in found if isinstance(outcome, Failure)]
    if failed and len(failed) == len(wanted):
        raise LensError(f"none of {len(wanted)} requests was answered: {failed[0]}")
    if failed:
        say(f"{file}: {len(failed)} of {len(wanted)} answers are missing ({failed[0]}); the same call asks for them")
    return [rows[key] for key in wanted if key in rows]


Key = tuple[str, str, str, int]


def _requests(
    questions: Iterable[Question], settings: AnswerSettings, condition: str, system: str | None
) -> Iterator[tuple[Key, Request]]:
    """Prompts in the order and with the sample numbers of `ChatFormat.ask`."""
    for question in questions:
        own = system if question.system is None else question.system
        for text in question.paraphrases:
            messages = [{"role": "system", "content": own}] if own else []
            messages.append({"role": "user", "content": text})
            for sample in range(settings.samples or question.samples or 1):
                seed = _seed(settings.seed, messages, sample) if settings.temperature > 0 else None
                request = Request(messages, settings.max_new_tokens, settings.temperature, settings.top_p, seed, sample)
                yield (condition, question.id, text, sample), request


def _seed(seed: int, messages: list[dict[str, str]], sample: int) -> int:
    """Of one answer: neither order nor other questions matter. Some servers take 31 bits."""
    digest = hashlib.sha256(json.dumps([seed, messages, sample]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _row(key: Key, reply: Reply) -> dict[str, Any]:
    ended = "length" if reply.ended == "length" else "stop"
    return {**dict(zip(KEYS, key, strict=True)), "response": reply.text, "ended": ended}


def _rows(file: Path) -> Iterator[tuple[Key, dict[str, Any]]]:
    for row in read_jsonl(file) if file.exists() else ():
        try:
            yield (str(row["condition"]), str(row["question"]), str(row["prompt"]), int(row["sample"])), row
        except (KeyError, TypeError, ValueError) as error:
            raise LensError(f"a row of {file} is no answer ({error!r}): choose another file") from error


def _refuse_other_settings(
    file: Path, endpoint: Endpoint, settings: AnswerSettings, condition: str, system: str | None
) -> None:
    """Answers of two models or temperatures under one condition would be taken for one."""
    facts = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    facts |= {"model": endpoint.model, "parameters": dict(endpoint.parameters), "system": system}
    beside = file.with_name(f"{file.name}.settings.json")
    saved = read_json(beside) if beside.exists() else {}
    if not isinstance(saved, Mapping):
        raise LensError(f"{beside} holds no settings: delete it and {file.name}, or choose another file")
    if condition in saved:
        refuse_other(file, saved[condition], facts)
    elif any(key[0] == condition for key, _ in _rows(file)):
        raise LensError(f"{file} holds answers of {condition}, and {beside.name} no settings: choose another file")
    else:
        write_json(beside, {**saved, condition: facts})
