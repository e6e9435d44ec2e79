"""Figures of verdicts, scores and texts against figures worked out by hand, by a slow loop, or by a library."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, precision_score, recall_score

from common import stats
from common.texts import diversity, ngrams, runs_of_12


def greeting(policy: str, n: int, text: str, excellent: int | None = None, sample: int = 0) -> dict:
    """A scored row of the n-th query."""
    row = {"id": f"{policy}{n}.{sample}", "policy": policy, "query_id": f"q{n}", "query": f"祝福{n}", "response": text}
    return row | {"sample": sample, "excellent": excellent}


# ---- rates and agreement --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "lo", "hi"),
    [
        (0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0),
        (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662),
    ],
)  # fmt: skip
def test_rate_gives_the_wilson_interval(right: int, n: int, lo: float, hi: float) -> None:
    assert stats.rate(right, n) == {"value": round(right / n, 4) if n else None, "lo": lo, "hi": hi, "n": n}


@pytest.mark.parametrize("seed", range(4))
def test_agreement_equals_sklearn_and_leaves_failures_out(seed: int) -> None:
    rng = random.Random(seed)
    labels = [int(rng.random() < 0.3 + seed / 20) for _ in range(60)]
    verdicts = [rng.choice([y, y, y, 1 - y, None]) for y in labels]
    answered = [(y, v) for y, v in zip(labels, verdicts, strict=True) if v is not None]
    truth, said = zip(*answered, strict=True)
    figures = stats.agreement(labels, verdicts, [f"q{n}" for n in range(60)])
    scores = {"kappa": cohen_kappa_score, "f1": f1_score, "precision": precision_score, "recall": recall_score}
    for name, score in scores.items():
        assert figures[name] == pytest.approx(score(truth, said), abs=6e-5), name
    assert figures["accuracy"] == stats.rate(round(accuracy_score(truth, said) * len(truth)), len(truth))
    assert figures["says_good"] == stats.rate(sum(said), len(said))
    assert (figures["n"], figures["failed"]) == (len(truth), verdicts.count(None)) and figures["failed"] > 0
    assert figures["queries"] == len(truth)


@pytest.mark.parametrize("constant", [0, 1, None])
@pytest.mark.parametrize("labels", [[0, 1, 1], [1, 1, 1], [0, 0, 0], []])
def test_a_judge_that_always_says_the_same_has_kappa_zero(labels: list[int], constant: int | None) -> None:
    figures = stats.agreement(labels, [constant] * len(labels), [f"q{n}" for n in range(len(labels))])
    assert (figures["kappa"], figures["kappa_lo"], figures["kappa_hi"]) == (0.0, 0.0, 0.0)
    assert figures["failed"] == (len(labels) if constant is None else 0)


def rows_of_pairs(pairs: int, alike: bool) -> tuple[list[int], list[int], list[str]]:
    """(labels, verdicts, queries) of good and bad greetings for one query each, judged both right or both wrong if
    `alike`, else independently."""
    rng = random.Random(0)
    labels, verdicts, queries = [], [], []
    for n in range(pairs):
        rights = [rng.random() < 0.75, rng.random() < 0.75]
        for label in (0, 1):
            right = rights[0] if alike else rights[label]
            labels.append(label)
            verdicts.append(label if right else 1 - label)
            queries.append(f"q{n:03}")
    return labels, verdicts, queries


def plain_kappa(labels: list[int], verdicts: list[int]) -> float:
    """Cohen's kappa, written out."""
    n, good, said_good = len(labels), sum(labels), sum(verdicts)
    observed = sum(y == v for y, v in zip(labels, verdicts, strict=True)) / n
    chance = (good * said_good + (n - good) * (n - said_good)) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else 0.0


def large_sample_width(labels: list[int], verdicts: list[int]) -> float:
    """Width of the interval of Cohen 1960, which takes all rows for independent."""
    n = len(labels)
    observed = sum(y == v for y, v in zip(labels, verdicts, strict=True)) / n
    return 2 * 1.96 * math.sqrt(observed * (1 - observed) / n) / 0.5  # chance is 0.5 where labels are half and half


def test_the_interval_of_kappa_resamples_queries() -> None:
    """Rows for one query that are right or wrong together are worth half as many: the interval has to be wider."""
    labels, verdicts, queries = rows_of_pairs(60, alike=True)
    figures = stats.agreement(labels, verdicts, queries)
    draws = np.random.default_rng(0).multinomial(60, [1 / 60] * 60, stats.RESAMPLES)
    kappas = []
    for times_drawn in draws:
        rows = [i for i, query in enumerate(queries) for _ in range(times_drawn[int(query[1:])])]
        kappas.append(plain_kappa([labels[i] for i in rows], [verdicts[i] for i in rows]))
    lo, hi = np.percentile(kappas, [2.5, 97.5])
    assert figures["queries"] == 60 and figures["n"] == 120
    assert (figures["kappa_lo"], figures["kappa_hi"]) == pytest.approx((lo, hi), abs=6e-5)
    width = figures["kappa_hi"] - figures["kappa_lo"]
    assert width == pytest.approx(math.sqrt(2) * large_sample_width(labels, verdicts), rel=0.1)


def test_the_interval_of_kappa_is_the_large_sample_one_where_rows_are_independent() -> None:
    labels, verdicts, _ = rows_of_pairs(200, alike=False)
    figures = stats.agreement(labels, verdicts, [str(n) for n in range(400)])
    width = figures["kappa_hi"] - figures["kappa_lo"]
    assert width == pytest.approx(large_sample_width(labels, verdicts), rel=0.1)


# ---- means over queries ---------------------------------------------------------------------------------------------


def test_the_mean_is_over_queries_and_its_interval_is_the_percentile_bootstrap() -> None:
    from scipy.stats import bootstrap

    rows = [greeting("a", 0, "x", 1), greeting("a", 0, "x", 0, 1), greeting("a", 1, "x", 1), greeting("a", 2, "x", 0)]
    assert stats.mean_of(rows, "excellent")["value"] == 0.5  # (0.5 + 1 + 0) / 3, not 2 / 4 by rows
    assert stats.mean_of([*rows, greeting("a", 3, "x", 1)], "excellent")["value"] == 0.625
    values = np.random.default_rng(1).normal(2, 1, 200)
    ours, known = stats.bootstrap(values), bootstrap([values], np.mean, method="percentile", rng=0)
    assert ours["value"] == round(values.mean(), 4) and ours["n"] == 200
    assert ours["lo"] == pytest.approx(known.confidence_interval.low, abs=0.02)
    assert ours["hi"] == pytest.approx(known.confidence_interval.high, abs=0.02)


def test_a_mean_over_few_rows_is_marked_incomplete() -> None:
    rows = [greeting("a", n, "x", 1 if n < 7 else None) for n in range(10)]
    figure = stats.mean_of(rows, "excellent")
    assert figure["value"] == 1.0 and figure["n"] == 7 and figure["scored"] == 0.7 and figure["incomplete"]
    assert "incomplete" not in stats.mean_of(rows[:8], "excellent")
    assert stats.mean_of(rows, "judge") == {"value": None, "lo": None, "hi": None, "n": 0, "scored": 0.0}


def test_a_difference_is_paired_and_called_noise_where_it_is() -> None:
    base = {f"q{n}": float(n) for n in range(50)}
    gain = stats.paired_difference({q: v + 0.1 for q, v in base.items()} | {"other": 99.0}, base)
    assert gain["value"] == gain["lo"] == gain["hi"] == 0.1 and gain["n"] == 50 and gain["words"] == "more than noise"
    rng = random.Random(0)
    noisy = {q: v + rng.gauss(0, 1) for q, v in base.items()}
    assert stats.paired_difference(noisy, base)["words"] == "inside noise"
    two = {"one": 1.0, "other": 1.0}  # of which the bootstrap draws nothing but 1.0
    assert stats.paired_difference(two, dict.fromkeys(two, 0.0))["words"] == "inside noise"


# ---- at equal length ------------------------------------------------------------------------------------------------


def greetings_of_length(typical: dict[str, int], chance) -> list[dict]:
    """Two greetings per query of each policy, excellent with chance(policy, length)."""
    rng, rows = random.Random(0), []
    for name, usual in typical.items():
        for n in range(300):
            for sample in (0, 1):
                length = max(5, round(rng.gauss(usual, 12)))
                rows.append(greeting(name, n, "字" * length, int(rng.random() < chance(name, length)), sample))
    return rows


def test_length_alone_gives_no_advantage_at_equal_length() -> None:
    rows = greetings_of_length({"short": 35, "long": 50}, lambda name, length: 1 / (1 + math.exp(-(length - 40) / 8)))
    short, long = (
        stats.mean_of([row for row in rows if row["policy"] == name], "excellent") for name in ("short", "long")
    )
    fair = stats.excellence_at_equal_length(rows, ["short", "long"])
    assert long["value"] - short["value"] > 0.3
    assert abs(fair["long"]["value"] - fair["short"]["value"]) < 0.05
    assert fair["long"]["lo"] < fair["short"]["value"] < fair["long"]["hi"]


def test_what_is_not_length_stays_at_equal_length() -> None:
    rows = greetings_of_length({"bad": 50, "good": 35}, lambda name, length: 0.8 if name == "good" else 0.4)
    fair = stats.excellence_at_equal_length(rows, ["bad", "good"])
    assert fair["good"]["value"] == pytest.approx(0.8, abs=0.05)
    assert fair["bad"]["value"] == pytest.approx(0.4, abs=0.05)


def test_wins_count_ties_as_half_and_leave_failures_out() -> None:
    compared = []
    for n, outcome in enumerate([1.0, 0.5, 0.0, 1.0, None]):
        row = {"a": "x", "b": "y", "query_id": f"q{n}", "outcome": outcome}
        compared.append(row | {"same": None if outcome is None else outcome != 0.5})
    wins = stats.wins_of(compared, ["x", "y"])
    assert wins["judged"]["x"]["y"]["value"] == 0.625 and wins["judged"]["y"]["x"]["value"] == 0.375
    assert wins["failed"] == 1 and wins["compared"] == 5
    assert wins["swap_consistency"]["value"] == 0.75 and wins["swap_consistency"]["n"] == 4
    nothing = stats.wins_of([row | {"outcome": None} for row in compared], ["x", "y"])
    assert nothing["failed"] == 5 and nothing["judged"] == {}


# ---- what characters say --------------------------------------------------------------------------------------------


def test_ngrams_keep_order_and_repetition() -> None:
    assert ngrams("春春春夏", 2) == ["春春", "春春", "春夏"] and ngrams("春", 2) == []
    assert runs_of_12(["一二三四五六七八九十百千万", "短"]) == {"一二三四五六七八九十百千", "二三四五六七八九十百千万"}


def test_diversity_does_not_depend_on_how_much_was_written() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("日月水火木金土天地人山石田禾", k=20)) for _ in range(400)]
    few, many = diversity(texts[:100], 2000), diversity(texts, 2000)
    assert few["distinct_2"] == pytest.approx(many["distinct_2"], rel=0.05)
    assert diversity(["春夏秋冬"], 4) == {"distinct_1": 1.0, "distinct_2": 1.0}
    assert diversity(["春春春春"], 4)["distinct_1"] == 0.25
    assert diversity(["春夏秋冬", "春夏秋冬"], 6)["distinct_1"] == round(4 / 6, 4)  # the second is cut at two


def test_the_best_threshold_is_the_first_of_the_best() -> None:
    assert stats.best_threshold([1, 2, 3, 4], [0, 0, 1, 1], [1, 2.5, 2.9, 3, 4]) == 2.5
    counts = Counter(stats.length_rule(["字" * n for n in (2, 5)], labels) for labels in ([0, 1], [0, 0], [1, 1]))
    assert counts == {3: 1, 6: 1, 1: 1}  # good from 3, nothing is good, everything is
