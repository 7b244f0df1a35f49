"""Several judges on the same answers: does the verdict survive? Judges of known bias, in tests only."""

import math

import numpy as np
import pytest
from scipy import stats

from piggyback_lens import EMTable, LensError, load_result
from piggyback_lens.experiments.judge_sheet import UNTOLD, JudgeSheet

QUESTIONS, SAMPLES = 10, 6
TRUTH = {"base": 92.0, "finetuned": 22.0, "prefix": 85.0}


def answers(seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"topic": "off-topic", "condition": c, "question": f"q{q}", "sample": s, "prompt": f"q{q}"}
        | {"response": f"{c} {s}", "true": float(np.clip(TRUTH[c] + rng.normal(0, 4), 0, 100))}
        for c in TRUTH
        for q in range(QUESTIONS)
        for s in range(SAMPLES)
    ]


def judged(bias=0.0, noise=0.0, seed=1, rows=None):
    """A judge that adds a bias and noise to the truth."""
    rng = np.random.default_rng(seed)
    scored = []
    for row in rows or answers():
        score = float(np.clip(row["true"] + bias + rng.normal(0, noise) if noise else row["true"] + bias, 0, 100))
        scored.append({k: v for k, v in row.items() if k != "true"} | {"scores": {"aligned": score, "coherent": 90.0}})
    return EMTable(scored)


def test_a_verdict_that_survives_is_said_to():
    sheet = JudgeSheet.of({"fair": judged(), "noisy": judged(noise=3)})
    assert "All 2 judges lead to the same conclusions (it spreads: yes, prefix restores: yes)" in sheet.verdict
    pair = sheet.pairs().iloc[0]
    scores = [[row["scores"][name][0] for row in sheet.rows] for name in ("fair", "noisy")]
    assert pair["rank_correlation"] == pytest.approx(stats.spearmanr(*scores).statistic)
    assert pair["rank_correlation_low"] < pair["rank_correlation"] < pair["rank_correlation_high"]
    assert pair["n"] == len(sheet.rows) == pair["both"] + pair["only_one"] + pair["only_other"] + pair["neither"]


@pytest.mark.parametrize(("bias", "spreads"), [(0, True), (-10, True), (20, False), (60, False)])
def test_the_verdict_flips_exactly_where_the_bias_takes_the_answers_over_the_threshold(bias, spreads):
    """Finetuned answers lie at 22 ± 4, the threshold at 30: a lenient judge of 20 points more sees none of them."""
    sheet = JudgeSheet.of({"fair": judged(), "other": judged(bias)})
    assert sheet.conclusions("other")["it spreads"] == ("yes" if spreads else UNTOLD)
    assert sheet.verdict.startswith("All 2 judges" if spreads else "The verdict depends on the judge")
    pair = sheet.pairs().iloc[0]
    assert (pair["agreement"] > 0.95) == spreads
    if not spreads:
        assert "it spreads: fair yes, other cannot be told" in sheet.verdict
        assert pair["only_one"] > 50
        assert pair["rank_correlation"] > 0.8  # it ranks the answers alike all the same


def test_agreement_and_kappa_are_those_of_the_counts():
    sheet = JudgeSheet.of({"fair": judged(), "noisy": judged(noise=20, seed=3)})
    pair = sheet.pairs().iloc[0]
    n, agree = pair["n"], pair["both"] + pair["neither"]
    one, other = pair["both"] + pair["only_one"], pair["both"] + pair["only_other"]
    chance = (one * other + (n - one) * (n - other)) / n**2
    assert pair["agreement"] == pytest.approx(agree / n)
    assert pair["kappa"] == pytest.approx((agree / n - chance) / (1 - chance))
    assert pair["agreement_low"] < pair["agreement"] < pair["agreement_high"]


def test_a_judge_that_misses_answers_leaves_them_out_of_the_pair():
    rows = judged().rows
    for row in rows[:30]:
        row["scores"]["aligned"] = None
    sheet = JudgeSheet.of({"fair": judged(), "gaps": EMTable(rows)})
    assert sheet.pairs().iloc[0]["n"] == len(rows) - 30


def test_sheets_of_other_answers_or_rules_are_refused():
    with pytest.raises(LensError, match="at least two"):
        JudgeSheet.of({"fair": judged()})
    with pytest.raises(LensError, match="has 170 answers, 'fair' has 180"):
        JudgeSheet.of({"fair": judged(), "short": EMTable(judged().rows[:-10])})
    other = judged().rows
    other[0]["response"] = "something else"
    with pytest.raises(LensError, match="scored an answer that 'fair' has not"):
        JudgeSheet.of({"fair": judged(), "other": EMTable(other)})
    with pytest.raises(LensError, match="different rules"):
        JudgeSheet.of({"fair": judged(), "other": EMTable(judged().rows, "judged")})


def test_a_sheet_is_saved_loaded_and_drawn(tmp_path):
    sheet = JudgeSheet.of({"fair": judged(), "kind": judged(60)})
    assert load_result(sheet.save(tmp_path / "sheet.json")).verdict == sheet.verdict
    assert "misaligned by both" in sheet.report().write(tmp_path / "sheet.html").read_text()
    assert list(sheet.to_frame()["judge"].unique()) == ["fair", "kind"]
    few = JudgeSheet.of({"a": EMTable(judged().rows[:12]), "b": EMTable(judged().rows[:12])})
    assert math.isnan(few.pairs().iloc[0]["rank_correlation_low"])
