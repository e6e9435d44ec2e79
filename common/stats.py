"""Rates, agreement, intervals by bootstrap over queries, figures at equal length, and the null baselines.

Every interval is 95%. The bootstrap draws queries again, not rows: several greetings for one query are not independent.
"""

import math
from collections.abc import Iterable

RESAMPLES = 2000  # of the queries, for the interval of a mean or of kappa
REFITS = 200  # the same for the logistic model, which takes longer
LEAST = 8  # queries or groups: fewer vary too uncertainly to conclude from
COMPLETE = 0.8  # share of the rows that must have a score, or their mean is marked incomplete


# ---- rates and agreement --------------------------------------------------------------------------------------------


def rate(hits: float, n: int) -> dict:
    """A share with its Wilson score interval: {"value", "lo", "hi", "n"}; value is None where n is 0.

    By hand because scipy's binomtest refuses half hits, and a tie is half a win.
    """
    if n == 0:
        return {"value": None, "lo": 0.0, "hi": 1.0, "n": 0}
    z, p = 1.96, hits / n
    middle, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    lo, hi = max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))
    return {"value": round(p, 4), "lo": round(lo, 4), "hi": round(hi, 4), "n": n}


def agreement(labels: list[int], verdicts: list[int | None], queries: list[str]) -> dict:
    """How well verdicts agree with labels, row by row; rows without a verdict are left out and counted as `failed`.

    `kappa` is Cohen's (1960, doi:10.1177/001316446002000104), 0 for a judge that always says the same; its interval
    comes from resampling `queries` (one string per row). f1, precision and recall are of label 1.
    """
    import pandas as pd
    from sklearn.metrics import precision_recall_fscore_support

    rows = pd.DataFrame({"label": labels, "verdict": verdicts, "query": queries}).dropna(subset="verdict")
    rows = rows.astype({"label": int, "verdict": int})
    label, verdict, n = rows["label"], rows["verdict"], len(rows)
    precision = recall = f1 = kappa = lo = hi = 0.0
    if n:
        precision, recall, f1, _ = precision_recall_fscore_support(label, verdict, average="binary", zero_division=0)
        kappa, lo, hi = _kappa(rows)
    scores = {"kappa": kappa, "kappa_lo": lo, "kappa_hi": hi, "f1": f1, "precision": precision, "recall": recall}
    return {name: round(float(score), 4) for name, score in scores.items()} | {
        "accuracy": rate(int((label == verdict).sum()), n),
        "says_good": rate(int(verdict.sum()), n),
        "n": n,
        "queries": rows["query"].nunique(),
        "failed": len(labels) - n,
    }


def _kappa(rows) -> tuple[float, float, float]:
    """Cohen's kappa of a frame's columns `label` and `verdict`, and its interval over resamples of its `query`."""
    import numpy as np

    rows = rows.assign(n=1, right=rows["label"] == rows["verdict"])
    # What a resample adds up to is the sum over the queries that it drew, so one product makes all of them.
    sums = rows.groupby("query")[["n", "right", "label", "verdict"]].sum().to_numpy()
    n, right, good, says_good = (times_drawn(len(sums), RESAMPLES) @ sums).T
    by_chance = (good * says_good + (n - good) * (n - says_good)) / n**2
    one_label = by_chance == 1  # kappa is 0/0 where judge and labels both know one and the same label only
    kappas = np.where(one_label, 0.0, (right / n - by_chance) / np.where(one_label, 1.0, 1 - by_chance))
    lo, hi = np.percentile(kappas[1:], [2.5, 97.5])
    return kappas[0], lo, hi


def correlation(values: list[float | None], others: list[float], queries: list[str]) -> dict:
    """Pearson's correlation over the rows with a value, resampled by query; None where one side does not vary."""
    import numpy as np
    import pandas as pd

    rows = pd.DataFrame({"x": values, "y": others, "query": queries}).dropna().astype({"x": float, "y": float})
    if min(rows["x"].nunique(), rows["y"].nunique()) < 2:
        return {"value": None, "lo": None, "hi": None, "n": len(rows)}
    x, y = rows["x"], rows["y"]
    terms = pd.DataFrame({"n": 1, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}).groupby(rows["query"]).sum()
    n, x, y, xx, yy, xy = (times_drawn(len(terms), RESAMPLES) @ terms.to_numpy()).T
    scale = np.sqrt(np.maximum(0, n * xx - x * x) * np.maximum(0, n * yy - y * y))
    drawn = np.where(scale > 0, (n * xy - x * y) / np.where(scale > 0, scale, 1), 0.0)
    return interval(drawn[0], drawn[1:], len(rows))


def times_drawn(n: int, resamples: int):
    """How often each of n queries is drawn, (1 + resamples, n): each once, then in draws with replacement."""
    import numpy as np

    return np.vstack([np.ones(n), np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples)])


def chance_of_rise(before: list[list[bool]], after: list[list[bool]]) -> float:
    """The one-sided p-value of a rise of the share of hits; each inner list is a group, whose hits resemble each other.

    n hits and misses in groups say no more than n / d independent ones. d, the design effect, is the variance of the
    groups' counts over that of independent hits, of both sides together and never below 1. Counts divided by d are
    tested as independent ones are (Rao & Scott 1992, Biometrics 48, 577), by Fisher's exact test. 1 where one side has
    fewer than LEAST groups: with fewer, p was up to nine times too small in simulations.
    """
    from statistics import variance

    from scipy.stats import hypergeom

    if min(len(before), len(after)) < LEAST:
        return 1.0
    sizes = [sum(map(len, groups)) for groups in (before, after)]
    hits = [sum(map(sum, groups)) for groups in (before, after)]
    observed = independent = 0.0  # variances of the two sums of hits
    for groups, n, hit in zip((before, after), sizes, hits, strict=True):
        observed += len(groups) * variance(sum(group) - hit / n * len(group) for group in groups)
        independent += hit * (1 - hit / n)
    # Where there are hits alone or misses alone, the groups may have said no more than one text of each would have.
    effect = max(1.0, observed / independent) if independent else sum(sizes) / (len(before) + len(after))
    early, late = math.ceil(hits[0] / effect), math.floor(hits[1] / effect)
    n_early, n_late = (max(1, round(size / effect)) for size in sizes)
    return float(hypergeom.sf(late - 1, n_early + n_late, early + late, n_late))


# ---- means over queries ---------------------------------------------------------------------------------------------


def where(rows: list[dict], column: str, value: object) -> list[dict]:
    """The rows that have this value in this column."""
    return [row for row in rows if row[column] == value]


def column(rows: list[dict], name: str) -> list:
    """This column of the rows; None where a row has no such value."""
    return [row.get(name) for row in rows]


def query_means(rows, key: str) -> dict[str, float]:
    """Query id -> mean of its rows' values (dicts or a frame); rows, and queries, without a value are left out."""
    import pandas as pd

    values = pd.DataFrame(rows, columns=["query_id", key]).dropna()
    return values.groupby("query_id", sort=False)[key].mean().to_dict()


def bootstrap(means: Iterable[float]) -> dict:
    """The mean of one number per query, with its percentile interval: {"value", "lo", "hi", "n"}, None where n is 0."""
    import numpy as np

    numbers = np.array(list(means), dtype=float)
    n = len(numbers)
    if n == 0:
        return {"value": None, "lo": None, "hi": None, "n": 0}
    draws = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    return interval(numbers.mean(), numbers[draws].mean(axis=1), n)


def shown(figure: dict, form: str = ".2f") -> str:
    """A figure with its interval, as words."""
    value, lo, hi = (format(figure[name], form) for name in ("value", "lo", "hi"))
    return f"{value} [{lo}, {hi}]"


def interval(value: float, resampled, n: int) -> dict:
    """A value with the percentile interval of its resamples, rounded as every figure of the report is."""
    import numpy as np

    lo, hi = np.percentile(resampled, [2.5, 97.5])
    return {"value": round(float(value), 4), "lo": round(float(lo), 4), "hi": round(float(hi), 4), "n": n}


def mean_of(rows: list[dict], key: str) -> dict:
    """Mean over queries with its interval, and `scored`, the share of rows with a score; `incomplete` below 80%."""
    figure = bootstrap(query_means(rows, key).values())
    scored = sum(row.get(key) is not None for row in rows) / max(1, len(rows))
    figure["scored"] = round(scored, 4)
    if 0 < scored < COMPLETE:
        figure["incomplete"] = True
    return figure


def paired_difference(after: dict[str, float], before: dict[str, float]) -> dict:
    """Difference of two means over the queries that both have, and in words whether it is more than noise."""
    shared = sorted(after.keys() & before.keys())
    difference = bootstrap([after[query] - before[query] for query in shared])
    beyond_noise = difference["n"] >= LEAST and (difference["lo"] > 0 or difference["hi"] < 0)
    difference["words"] = "more than noise" if beyond_noise else "inside noise"
    return difference


# ---- at equal length ------------------------------------------------------------------------------------------------


def excellence_at_equal_length(rows: list[dict], names: list[str]) -> dict[str, dict]:
    """The excellence rate that each policy would have if each had the pooled length distribution of all policies.

    A logistic model of excellence with a term for each policy and one for length, tanh of the standardised number of
    characters, after length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475). Its term for the difficulty
    of a query is left out: all policies write for the same queries.
    """
    import numpy as np
    import pandas as pd
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    table = pd.DataFrame(rows, columns=["policy", "query_id", "response", "excellent"]).dropna()
    if table.empty:
        return {}
    lengths = table["response"].str.len()
    # tanh: beyond a point, still longer is hardly still better. Standardised, so that one penalty fits every task.
    length_term = np.tanh((lengths - lengths.mean()) / (lengths.std(ddof=0) or 1.0)).to_numpy()
    design = np.column_stack([*(table["policy"] == name for name in names), length_term])

    # scikit-learn insists on both outcomes: every row appears with each of them, and only the one it had has weight.
    outcomes = np.repeat([1, 0], len(table))
    had = np.concatenate([table["excellent"] == 1, table["excellent"] == 0])
    queries, query_of_row = np.unique(table["query_id"], return_inverse=True)
    model = LogisticRegression(C=100.0, fit_intercept=False, solver="newton-cholesky")
    fits = []  # coefficients for all queries, then for resamples of them
    for draw in times_drawn(len(queries), REFITS):
        weights = had * np.tile(draw[query_of_row], 2)
        fits.append(model.fit(np.vstack([design, design]), outcomes, weights).coef_[0])
    fits = np.array(fits)

    figures = {}
    for column, name in enumerate(names):
        if design[:, column].any():
            # The policy's chance at the length of each greeting that anybody wrote, on average.
            chances = expit(fits[:, column, None] + fits[:, -1, None] * length_term).mean(axis=1)
            figures[name] = interval(chances[0], chances[1:], len(queries))
    return figures


def wins_of(comparisons: list[dict], names: list[str]) -> dict:
    """`judged`: the share of wins of each policy over each other one. A verdict that flips with the order is a tie."""
    import pandas as pd

    table = pd.DataFrame(comparisons, columns=["a", "b", "query_id", "outcome", "same"])
    answered = table.dropna(subset="outcome")
    same = answered["same"].dropna()  # None for two equal texts: nobody was asked
    mirrored = answered.rename(columns={"a": "b", "b": "a"}).assign(outcome=1 - answered["outcome"])
    from_both_sides = pd.concat([answered, mirrored])
    judged: dict[str, dict] = {}
    for a in names:
        for b in names:
            between = from_both_sides.query("a == @a and b == @b")
            if len(between):
                judged.setdefault(a, {})[b] = bootstrap(query_means(between, "outcome").values())
    failed = len(table) - len(answered)
    consistent = rate(int(same.sum()), len(same))
    return {"judged": judged, "swap_consistency": consistent, "compared": len(table), "failed": failed}


# ---- null baselines -------------------------------------------------------------------------------------------------


def ngram_classifier(texts: list[str], labels: list[int], seed: int = 0):
    """A null baseline: logistic regression on character 1-2-grams. What it gets right needs no understanding."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    least = 2 if len(texts) > 20 else 1  # a handful of texts may share no n-gram
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True, min_df=least)
    model = LogisticRegression(C=10.0, max_iter=1000, random_state=seed)
    return make_pipeline(vectors, model).fit(texts, labels)


def best_threshold(scores: list[float], labels: list[int], thresholds: Iterable[float]) -> float:
    """The first of these thresholds at which "good if the score is at least this" is most often right."""

    def right(threshold: float) -> int:
        return sum((score >= threshold) == label for score, label in zip(scores, labels, strict=True))

    return max(thresholds, key=right, default=0.0)


def length_rule(texts: list[str], labels: list[int]) -> int:
    """A null baseline: the number of characters at or above which "good" is most often right on these texts."""
    lengths = [len(text) for text in texts]
    return int(best_threshold(lengths, labels, range(1, max(lengths) + 2)))


def null_verdicts(texts: list[str], labels: list[int], unseen: list[str]) -> dict[str, list[int]]:
    """What both null baselines, fitted on labelled texts, say of unseen ones: 1 good, 0 not."""
    least = length_rule(texts, labels)
    by_ngrams = ngram_classifier(texts, labels).predict(unseen)
    return {"length": [int(len(text) >= least) for text in unseen], "n-grams": by_ngrams.tolist()}
