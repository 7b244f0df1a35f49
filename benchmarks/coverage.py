"""How often the intervals cover, by simulation, beside those of version 0.1.0 (BCa bootstrap over prompts).

    python benchmarks/coverage.py [--draws 2000] [--bootstrap 200] [--page docs/coverage.md]

Questions are drawn, then one or ten answers to each, under three conditions: patched, finetuned, base. Normal values
have a part that all conditions of a question share; the demo's words are resampled from its 40 off-topic prompts, with
noise of 30 % around each where there are ten answers; rates of a question scatter around the rate of all (beta, intra-
class correlation 0.3), half of the scatter shared by the conditions. Covered is what is true over all questions. Prints
a Markdown table: coverage and mean width of spread (finetuned minus base), rate or mean (finetuned) and recovery; in
brackets those of the bootstrap. Recoveries are counted where one is given at all.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
from scipy.stats import beta, bootstrap, norm

from piggyback_lens.intervals import mean_interval, paired_difference, recovery

SIZES, ANSWERS = (6, 12, 24, 40), (1, 10)
WORDS = np.array([
    (53, 12, 48), (52, 52, 51), (38, 5, 44), (48, 24, 45), (28, 4, 31), (18, 7, 54), (45, 12, 49),
    (44, 3, 51), (3, 3, 43), (52, 12, 48), (50, 52, 51), (41, 32, 32), (34, 40, 48), (17, 25, 49),
    (50, 17, 53), (12, 5, 49), (35, 8, 48), (43, 49, 43), (46, 12, 55), (11, 11, 54), (49, 19, 47),
    (43, 16, 37), (27, 11, 46), (41, 13, 53), (53, 30, 53), (39, 29, 48), (34, 23, 34), (53, 56, 52),
    (13, 40, 48), (5, 5, 44), (44, 51, 48), (31, 1, 52), (30, 17, 51), (35, 31, 52), (11, 3, 52),
    (36, 37, 30), (37, 2, 46), (47, 36, 52), (45, 4, 46), (27, 5, 47),
], dtype=float)  # fmt: skip
"""Words per answer of the full demo, off-topic: patched prefix, finetuned, base (`piggyback-lens demo`, rows.jsonl)."""
RATES = {"rates .3, .05": (0.3, 0.05), "rates .9, .05": (0.9, 0.05), "rates .05, .05": (0.05, 0.05)}
KINDS = ("normal", "the demo's words", *RATES)


def drawn(kind: str, n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Answers to n questions, m each: [condition, question, answer]."""
    if kind == "normal":
        shared, own = rng.normal(0, 0.8, n), rng.normal(0, 0.7, (3, n))
        means = np.array([1.2, 2.0, 0.0])[:, None] + shared + own
        return means[:, :, None] + rng.normal(0, 0.8, (3, n, m))
    if kind == "the demo's words":
        own = WORDS[rng.integers(len(WORDS), size=n)].T[:, :, None]
        return own if m == 1 else own * np.exp(rng.normal(0, 0.3, (3, n, m)) - 0.045)
    tuned, base = RATES[kind]
    shares = norm.cdf(np.sqrt(0.5) * rng.normal(size=n) + np.sqrt(0.5) * rng.normal(size=(3, n)))
    alike = 1 / 0.3 - 1
    rates = ((tuned + base) / 2, tuned, base)
    of_question = np.stack([beta.ppf(s, p * alike, (1 - p) * alike) for p, s in zip(rates, shares, strict=True)])
    return (rng.random((3, n, m)) < of_question[:, :, None]).astype(float)


def truth(kind: str) -> tuple[float, float, float]:
    if kind == "normal":
        patched, tuned, base = 1.2, 2.0, 0.0
    elif kind in RATES:
        (tuned, base), patched = RATES[kind], sum(RATES[kind]) / 2
    else:
        patched, tuned, base = WORDS.mean(0)
    return tuned - base, tuned, (patched - tuned) / (base - tuned) if base != tuned else np.nan


def ours(answers: np.ndarray, kind: str) -> list[tuple[float, float]]:
    n, m = answers.shape[1:]
    questions, rate = [i for i in range(n) for _ in range(m)], kind in RATES
    patched, tuned, base = (own.ravel() for own in answers)
    found = (
        paired_difference(tuned, base, questions, rate=rate),
        mean_interval(tuned, questions, rate=rate),
        recovery(patched, tuned, base, questions, rate=rate),
    )
    return [(e.low, e.high) for e in found]


def of_bootstrap(answers: np.ndarray, seed: int) -> list[tuple[float, float]]:
    """As version 0.1.0: BCa over the questions' means, percentiles where it is not defined."""
    patched, tuned, base = answers.mean(2)

    def interval(statistic, samples):
        settings = {"n_resamples": 2000, "vectorized": True, "paired": True, "rng": np.random.default_rng(seed)}
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            done = bootstrap(samples, statistic, method="BCa", **settings)
        found = done.confidence_interval
        if np.isfinite([found.low, found.high]).all():
            return float(found.low), float(found.high)
        again = done.bootstrap_distribution[~np.isnan(done.bootstrap_distribution)]
        low, high = np.quantile(again, [0.025, 0.975], method="inverted_cdf")
        return float(low), float(high)

    gap = interval(lambda d, axis: d.mean(axis), (tuned - base,))
    mean = interval(lambda d, axis: d.mean(axis), (tuned,))
    if gap[0] <= 0 <= gap[1]:
        return [gap, mean, (np.nan, np.nan)]
    return [gap, mean, interval(lambda a, b, axis: a.mean(axis) / b.mean(axis), (patched - tuned, base - tuned))]


def measured(kind: str, n: int, m: int, draws: int, method) -> list[tuple[float, float]]:
    """Coverage and mean width of each number."""
    hits, widths, given = np.zeros(3), np.zeros(3), np.zeros(3)
    rng = np.random.default_rng([KINDS.index(kind), n, m])
    for draw in range(draws):
        for i, ((low, high), true) in enumerate(zip(method(drawn(kind, n, m, rng), draw), truth(kind), strict=True)):
            if np.isfinite([low, high]).all():
                hits[i] += low - 1e-9 <= true <= high + 1e-9
                widths[i] += high - low
                given[i] += 1
    with np.errstate(invalid="ignore"):
        return list(zip(hits / given, widths / given, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--bootstrap", type=int, default=200, help="draws of the bootstrap, which is slow")
    parser.add_argument("--page", type=Path)
    chosen = parser.parse_args()
    lines = [
        "| values | answers | questions | spread: covers | width "
        "| mean or rate: covers | width | recovery: covers | width |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for m in ANSWERS:
            for n in SIZES:
                new = measured(kind, n, m, chosen.draws, lambda answers, _, kind=kind: ours(answers, kind))
                old = measured(kind, n, m, chosen.bootstrap, of_bootstrap)
                cells = []
                for i, ((cover, width), (before, before_width)) in enumerate(zip(new, old, strict=True)):
                    nothing = i == 2 and kind == "rates .05, .05"  # there is no difference to recover
                    cells += (
                        ["", ""] if nothing else [f"{cover:.3f} ({before:.2f})", f"{width:.3g} ({before_width:.3g})"]
                    )
                lines.append(f"| {kind} | {m} | {n} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    if chosen.page:
        about = (
            "# How often the intervals cover\n\nWritten by `python benchmarks/coverage.py --page docs/coverage.md`, "
            f"whose first lines say how data are drawn: {chosen.draws} draws per row, nominal 95 %. In brackets the "
            f"BCa bootstrap over prompts, as version 0.1.0 had it ({chosen.bootstrap} draws). Recoveries are counted "
            "where the difference of base and finetuned can be told from none.\n\n"
        )
        chosen.page.write_text(about + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
