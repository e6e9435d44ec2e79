"""Character n-grams, near-duplicates, copies, diversity."""

import random
from bisect import bisect_left
from collections import Counter

from common.records import Preference


def grams(text: str, n: int) -> set[str]:
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the pairs of neighbouring characters."""
    a, b = grams(one, 2), grams(other, 2)
    return len(a & b) / max(1, len(a | b))


NEAR = 0.95  # cosine of character 2-3-gram TF-IDF vectors from which two texts count as one


def leaks(there: list[Preference], here: list[Preference]) -> dict[str, list[Preference]]:
    """The pairs here that share a query, a text or nearly a text with those there."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    queries = {p.texts[0] for p in there}
    seen, texts = (sorted({t for p in pairs for t in p.texts[1:]}) for pairs in (there, here))
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(2, 3), sublinear_tf=True)
    index = vectorizer.fit_transform(seen).T
    near: set[str] = set()
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        closest = np.asarray((vectorizer.transform(part) @ index).max(axis=1).todense()).ravel()
        near.update(text for text, likeness in zip(part, closest, strict=True) if likeness >= NEAR)
    exact = near & set(seen)
    return {
        "query": [p for p in here if p.texts[0] in queries],
        "text": [p for p in here if exact & set(p.texts[1:])],
        "near_text": [p for p in here if near & set(p.texts[1:])],
    }


def self_bleu(texts: list[str], order: int = 4) -> float:
    """Mean BLEU of each text against all others, by characters (Zhu et al. 2018, arXiv 1802.01886); 1: all are one.

    Exact: for the clipped counts it is enough to know, for each n-gram, the two highest counts in one text. A length
    at which nothing matches counts as 0.1 matches (Chen and Cherry 2014, method 1).
    """
    import math

    if len(texts) < 2:
        return 0.0
    counts = [
        [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, order + 1)] for text in texts
    ]
    most: dict[str, list[int]] = {}
    for grams in counts:
        for gram, times in (item for one in grams for item in one.items()):
            most[gram] = sorted([*most.get(gram, [0, 0]), times])[-2:]
    lengths, scores = sorted(map(len, texts)), []
    for text, grams in zip(texts, counts, strict=True):
        logs = 0.0
        for one in grams:
            others = ((times, most[gram][0 if most[gram][1] == times else 1]) for gram, times in one.items())
            logs += math.log((sum(min(pair) for pair in others) or 0.1) / max(1, one.total()))
        place = bisect_left(lengths, len(text))
        near = [*lengths[max(0, place - 1) : place], *lengths[place + 1 : place + 2]]  # of the others
        reference = min(near, key=lambda length: (abs(length - len(text)), length))
        penalty = min(1.0, math.exp(1 - reference / max(1, len(text))))
        scores.append(penalty * math.exp(logs / order))
    return sum(scores) / len(scores)


def diversity(texts: list[str], characters: int, draws: int = 5) -> dict:
    """distinct-1, distinct-2 (Li et al. 2016, arXiv 1510.03055) and self-BLEU of random greetings that together have so
    many characters, the last one cut: the mean of some draws. Without the cut whoever writes more repeats more."""
    found = {"distinct_1": 0.0, "distinct_2": 0.0, "self_bleu": 0.0}
    for draw in range(draws):
        order, left, drawn = random.Random(draw).sample(texts, len(texts)), characters, []
        for text in order:
            drawn.append(text[:left])
            left -= len(drawn[-1])
            if not left:
                break
        for n in (1, 2):
            grams = [text[i : i + n] for text in drawn for i in range(len(text) - n + 1)]
            found[f"distinct_{n}"] += len(set(grams)) / max(1, len(grams)) / draws
        found["self_bleu"] += self_bleu(drawn) / draws
    return {name: round(value, 4) for name, value in found.items()}


def runs_of_12(texts: list[str]) -> set[str]:
    return {text[i : i + 12] for text in texts for i in range(len(text) - 11)}
