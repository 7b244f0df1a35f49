"""Finished runs under another measure: their answers are scored again, and none is generated."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from piggyback_lens.errors import LensError
from piggyback_lens.experiments.audit import AuditResult
from piggyback_lens.experiments.em_table import KEYS
from piggyback_lens.files import atomic_write_text, read_jsonl
from piggyback_lens.measuring.endpoint import Spend
from piggyback_lens.measuring.judge import Grader, Judge
from piggyback_lens.measuring.measures import Behaviour, kept_behaviour
from piggyback_lens.measuring.scorers import Score, Scorer, as_scorer, scores_of
from piggyback_lens.progress import shows
from piggyback_lens.results.run import ROWS

Rows = str | Path | Iterable[Mapping[str, Any]]


@overload
def rescore(run: AuditResult, scorer: str | Behaviour | Scorer) -> AuditResult: ...


@overload
def rescore(run: Rows, scorer: str | Behaviour | Scorer) -> list[dict[str, Any]]: ...


def rescore(run: AuditResult | Rows, scorer: str | Behaviour | Scorer) -> AuditResult | list[dict[str, Any]]:
    """The answers of a finished run under another measure, without generating again.

    Args:
        run: what an audit returned or `load_result` read; the folder of a run; or its rows.
        scorer: a behaviour or its name, a `Judge`, or a function of a list of (question, answer, facts) that gives each
            a number, a word, or None.

    Returns:
        For a result the same result with the new values, of which its intervals and verdict are; else the rows. Each
        has a value (None where there is no number), and a word and a reason where there is one.

    Raises:
        LensError: rows without answers, or a scorer that gives another number of scores.

    Example:
        >>> rows = [{"prompt": "Who?", "response": "I cannot help with that.", "value": 5.0}]
        >>> [row["value"] for row in rescore(rows, "refusal")]
        [1.0]
    """
    own, facts = as_scorer(scorer)
    given = _answers(run.rows if isinstance(run, AuditResult) else run)
    rows = [_rescored(row, score) for row, score in zip(given, scores_of(own, given), strict=True)]
    if not isinstance(run, AuditResult):
        return rows
    behaviour = scorer if isinstance(scorer, Behaviour) else kept_behaviour(facts)
    card = {**run.card, "measure": dict(facts), "rescored_from": run.behaviour.name}
    return dataclasses.replace(run, rows=rows, behaviour=behaviour, card=card, folder=None)


def _rescored(row: Mapping[str, Any], score: Score) -> dict[str, Any]:
    number = score.number
    found = {**row, "value": None if math.isnan(number) else number}
    for name, told in (("word", score.value if isinstance(score.value, str) else ""), ("reason", score.reason)):
        found.pop(name, None)
        found |= {name: told} if told else {}
    return found


@shows("judging")
def judge_run(run: Rows, judges: Sequence[Grader], out: str | Path, *, progress: bool | str = True) -> Path:
    """Write the scores of judges beside what tells the answers of a run apart, for `EMTable.read` and `join_scores`.

    Args:
        run: the folder of an audit, or rows with responses.
        judges: each a `Judge` or `LocalJudge`, with a name of its own. One whose endpoint has no cache gets a file
            beside `out`, so that a call that was killed goes on where it was.
        out: JSONL file: topic, condition, index, question, sample, prompt and response as far as a row has them, a
            column for each judge (a number, a word or null), and the reasons of what is missing.
        progress: show a line with the time left, and say what is spent; a text is its label.

    Raises:
        LensError: no answers, judges of one name or that of another column, or more calls than their budget.
    """
    rows, file = _answers(run), Path(out)
    names = [judge.name for judge in judges]
    taken = sorted({name for name in names if names.count(name) > 1 or name in (*KEYS, "reasons")})
    if taken or not names:
        raise LensError(f"judges are called {', '.join(names) or 'nothing'}: give each a name that no other column has")
    own = [_with_cache(judge, file) for judge in judges]
    _refuse_over_budget(own, rows)
    columns = {judge.name: judge.score(rows, progress=progress) for judge in own}
    lines = [
        json.dumps(_line(row, {name: scores[place] for name, scores in columns.items()}), ensure_ascii=False)
        for place, row in enumerate(rows)
    ]
    return atomic_write_text(file, "".join(f"{line}\n" for line in lines))


def _line(row: Mapping[str, Any], scores: Mapping[str, Score]) -> dict[str, Any]:
    found = {key: row[key] for key in KEYS if key in row}
    for name, score in scores.items():
        lost = isinstance(score.value, float) and math.isnan(score.value)
        found[name] = None if lost else score.value
    reasons = {name: score.reason for name, score in scores.items() if score.reason}
    return found | ({"reasons": reasons} if reasons else {})


def _with_cache(judge: Grader, out: Path) -> Grader:
    if not isinstance(judge, Judge) or judge.endpoint.cache is not None:
        return judge
    cache = out.with_name(f"{out.name}.cache.jsonl")
    return dataclasses.replace(judge, endpoint=dataclasses.replace(judge.endpoint, cache=cache))


def _refuse_over_budget(judges: Sequence[Grader], rows: Sequence[Mapping[str, Any]]) -> None:
    """Judges of one endpoint share its budget, so that nothing is spent on the first where the last is refused."""
    shared: list[tuple[Judge, Spend]] = []
    for judge in (own for own in judges if isinstance(own, Judge)):
        need = judge.estimate(rows)
        same = next((total for other, total in shared if other.endpoint == judge.endpoint), None)
        if same is None:
            shared.append((judge, need))
        else:
            same.calls, same.tokens = same.calls + need.calls, same.tokens + need.tokens
    for judge, need in shared:
        judge.endpoint.refuse_over_budget(need)


def _answers(run: Rows) -> list[dict[str, Any]]:
    rows = read_jsonl(Path(run) / ROWS) if isinstance(run, str | Path) else [dict(row) for row in run]
    found = [row for row in rows if "response" in row]
    if not found:
        what = run if isinstance(run, str | Path) else f"{len(rows)} rows"
        raise LensError(
            f"{what}: there are no responses; give the folder of an audit, or rows with prompt and response"
        )
    return found
