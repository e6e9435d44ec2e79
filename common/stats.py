"""Rates, agreement, bootstrap over queries, and the null baselines beside them."""


def rate(right: float, n: int) -> dict:
    """A share with its 95% Wilson score interval: {"value", "lo", "hi", "n"}; value is None where n is 0."""
    if n == 0:
        return {"value": None, "lo": 0.0, "hi": 1.0, "n": 0}
    z, p = 1.96, right / n
    middle, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    lo, hi = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return {"value": round(p, 4), "lo": round(max(0.0, lo), 4), "hi": round(min(1.0, hi), 4), "n": n}


def agreement(labels: list[int], verdicts: list[int | None]) -> dict:
    """How well verdicts agree with labels; rows without a verdict are counted as failed and left out.

    kappa is Cohen's, with its large-sample 95% interval (Cohen 1960, doi:10.1177/001316446002000104); 0 for a judge
    that always says the same. f1, precision and recall are of label 1.
    """
    heard = [(label, verdict) for label, verdict in zip(labels, verdicts, strict=True) if verdict is not None]
    n = len(heard)
    hits, said, true = (
        (sum(pick) for pick in zip(*((v == y == 1, v, y) for y, v in heard), strict=True)) if n else (0, 0, 0)
    )
    right = sum(label == verdict for label, verdict in heard)
    chance = (said * true + (n - said) * (n - true)) / n**2 if n else 1.0
    observed = right / n if n else 0.0
    kappa = (observed - chance) / (1 - chance) if chance < 1 else 0.0
    spread = 1.96 * (observed * (1 - observed) / n) ** 0.5 / (1 - chance) if chance < 1 else 0.0
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    return {
        "kappa": round(kappa, 4),
        "kappa_lo": round(kappa - spread, 4),
        "kappa_hi": round(kappa + spread, 4),
        "f1": round(2 * precision * recall / (precision + recall), 4) if precision + recall else 0.0,
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "accuracy": rate(right, n),
        "says_good": rate(said, n),
        "n": n,
        "failed": len(labels) - n,
    }


RESAMPLES, REFITS = 2000, 200  # of the bootstrap: of a mean, of a logistic model
COMPLETE = 0.8  # share of the rows that must be scored for a rate to stand without a mark


def query_means(rows: list[dict], key: str) -> dict[str, float]:
    """Query id -> mean of the rows' values, without rows that have none."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            groups.setdefault(row["query_id"], []).append(row[key])
    return {query: sum(values) / len(values) for query, values in groups.items()}


def bootstrap(means) -> dict:
    """Mean of an array of means by query, and its 95% percentile interval.

    The queries are drawn again, not the greetings: several greetings for one query are not independent.
    """
    import numpy as np

    if not len(means):
        return {"value": None, "lo": None, "hi": None, "n": 0}
    means = np.array(list(means), dtype=float)
    draws = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
    return interval(means.mean(), means[draws].mean(axis=1), len(means))


def interval(value: float, resampled, n: int) -> dict:
    import numpy as np

    lo, hi = np.percentile(resampled, [2.5, 97.5])
    return {"value": round(float(value), 4), "lo": round(float(lo), 4), "hi": round(float(hi), 4), "n": n}


def mean_of(rows: list[dict], key: str) -> dict:
    """Mean over queries with its interval; `scored` is the share of rows that have a score, `incomplete` below 80%."""
    scored = sum(r.get(key) is not None for r in rows) / max(1, len(rows))
    found = bootstrap(query_means(rows, key).values())
    return found | {"scored": round(scored, 4)} | ({"incomplete": True} if 0 < scored < COMPLETE else {})


def paired(after: dict[str, float], before: dict[str, float]) -> dict:
    """Difference of two means over the queries that both have, and in words whether it is more than noise."""
    gap = bootstrap([after[query] - before[query] for query in sorted(after.keys() & before.keys())])
    more = gap["n"] and (gap["lo"] > 0 or gap["hi"] < 0)
    return gap | {"words": "more than noise" if more else "inside noise"}


def logistic(x, y, weights):
    """Coefficients of a logistic model without intercept for shares y in [0, 1]: a tie is half a win, half a loss."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    sides = np.repeat([1, 0], len(y))
    model = LogisticRegression(C=100.0, fit_intercept=False, solver="newton-cholesky")
    return model.fit(np.vstack([x, x]), sides, np.concatenate([weights * y, weights * (1 - y)])).coef_[0]


def sigmoid(x):
    import numpy as np

    return 1 / (1 + np.exp(-x))


def resampled_fits(x, y, queries: list[str]):
    """Coefficients of a logistic model, first of all rows, then of REFITS bootstrap resamples of the queries."""
    import numpy as np

    known, at = np.unique(queries, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(known), np.full(len(known), 1 / len(known)), REFITS)
    return np.array([logistic(x, y, weights[at].astype(float)) for weights in [np.ones(len(known)), *draws]])


def excellence_at_equal_length(rows: list[dict], names: list[str]) -> dict[str, dict]:
    """The excellence rate that each policy would have if all wrote as long as all of them together do.

    A logistic model of excellence with a term for each policy and one for length, tanh of the standardised number of
    characters, after length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475). Its term for the difficulty
    of a query is left out: all policies write for the same queries.
    """
    import numpy as np

    rows = [r for r in rows if r["excellent"] is not None]
    if not rows:
        return {}
    lengths = np.array([len(r["response"]) for r in rows], dtype=float)
    length = np.tanh((lengths - lengths.mean()) / (lengths.std() or 1.0))
    x = np.column_stack([[r["policy"] == name for r in rows] for name in names] + [length]).astype(float)
    fits = resampled_fits(x, np.array([r["excellent"] for r in rows], dtype=float), [r["query_id"] for r in rows])
    n = len({r["query_id"] for r in rows})
    found = {}
    for i, name in enumerate(names):
        if any(r["policy"] == name for r in rows):
            shares = sigmoid(fits[:, i, None] + fits[:, -1, None] * length).mean(axis=1)
            found[name] = interval(shares[0], shares[1:], n)
    return found


def wins_of(comparisons: list[dict], names: list[str]) -> dict:
    """Shares of wins of each policy over each other one: as judged, and with length taken out.

    The second is a Bradley-Terry model with a term for length, tanh of the standardised difference in characters, that
    is set to zero, as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475).
    """
    import numpy as np

    heard = [c for c in comparisons if c["outcome"] is not None]
    asked = [c["same"] for c in heard if c["same"] is not None]
    found = {
        "swap_consistency": rate(sum(asked), len(asked)),
        "compared": len(comparisons),
        "failed": len(comparisons) - len(heard),
    }
    if not heard:
        return found | {"judged": {}, "at_equal_length": {}}
    judged: dict[str, dict] = {name: {} for name in names}
    fair: dict[str, dict] = {name: {} for name in names}
    gaps = np.array([c["longer_by"] for c in heard], dtype=float)
    x = np.column_stack(
        [[(c["a"] == name) - (c["b"] == name) for c in heard] for name in names] + [np.tanh(gaps / (gaps.std() or 1.0))]
    ).astype(float)
    fits = resampled_fits(x, np.array([c["outcome"] for c in heard]), [c["query_id"] for c in heard])
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            rows = [c for c in heard if {c["a"], c["b"]} == {a, b}]
            if a != b and rows:
                shares = {c["query_id"]: c["outcome"] if c["a"] == a else 1 - c["outcome"] for c in rows}
                judged[a][b] = bootstrap(shares.values())
                chances = sigmoid(fits[:, i] - fits[:, j])
                fair[a][b] = interval(chances[0], chances[1:], len(rows))
    return found | {"judged": judged, "at_equal_length": fair}


class NgramClassifier:
    """A null baseline: logistic regression on character 1-2-grams. What it gets right needs no understanding."""

    def __init__(self, texts: list[str], labels: list[int], seed: int = 0):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        least = 2 if len(texts) > 20 else 1  # a handful of texts may share no n-gram
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True, min_df=least)
        self.pipeline = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000, random_state=seed))
        self.pipeline.fit(texts, labels)

    def __call__(self, texts: list[str]) -> list[float]:
        """The log-odds of each text being one of label 1."""
        return self.pipeline.decision_function(texts).tolist()


def length_rule(texts: list[str], labels: list[int]) -> int:
    """A null baseline: the number of characters from which saying "good" is most often right on these texts."""
    lengths = [len(text) for text in texts]
    return max(
        range(1, max(lengths) + 2), key=lambda n: sum((k >= n) == y for k, y in zip(lengths, labels, strict=True))
    )


def null_verdicts(texts: list[str], labels: list[int], unseen: list[str]) -> dict[str, list[int]]:
    """What both null baselines, fitted on labelled texts, say of unseen ones: 1 good, 0 not."""
    least, ngrams = length_rule(texts, labels), NgramClassifier(texts, labels)
    return {
        "length": [int(len(text) >= least) for text in unseen],
        "n-grams": [int(odds > 0) for odds in ngrams(unseen)],
    }
