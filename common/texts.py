"""What characters alone say about texts: n-grams, near-duplicates, copies, leaks, diversity.

Chinese is compared by characters, not by words: that needs no segmenter, and a greeting is short.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable

from common.records import Candidate, Preference, Reference

NEAR_COSINE = 0.95  # of character 2-3-gram TF-IDF vectors: at or above this two texts count as one


def ngrams(text: str, n: int) -> list[str]:
    """Every run of n neighbouring characters, in order and with repetition; none if the text is shorter than n."""
    return [text[start : start + n] for start in range(len(text) - n + 1)]


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts' character pairs: 0 nothing in common, 1 the same pairs."""
    a, b = set(ngrams(one, 2)), set(ngrams(other, 2))
    return len(a & b) / max(1, len(a | b))


def runs_of_12(texts: list[str]) -> set[str]:
    """Every 12 consecutive characters of these texts. Sharing one of them is copying, not chance."""
    return {run for text in texts for run in ngrams(text, 12)}


def screen(
    candidates: Iterable[Candidate], max_similar: float, references: list[Reference], max_copied: float
) -> dict[str, str]:
    """Candidates that are not worth a judgement: {id: "duplicate", "near-duplicate" or "copies a reference"}."""
    # 6-grams of characters are looked up, because comparing texts would take candidates x references.
    holders: dict[str, list[int]] = {}  # 6-gram -> numbers of the references that contain it
    for number, reference in enumerate(references):
        for gram in set(ngrams(reference.response, 6)):
            holders.setdefault(gram, []).append(number)

    screened_out, texts_of_query = {}, defaultdict(list)
    for candidate in candidates:
        text = candidate.response
        earlier = texts_of_query[candidate.query]
        grams = set(ngrams(text, 6))
        shared = Counter(number for gram in grams for number in holders.get(gram, []))  # reference -> 6-grams in common
        if text in earlier:
            screened_out[candidate.id] = "duplicate"
        elif max_similar < 1 and any(similarity(text, other) > max_similar for other in earlier):
            screened_out[candidate.id] = "near-duplicate"
        elif shared and max(shared.values()) > max_copied * len(grams):
            screened_out[candidate.id] = "copies a reference"
        else:
            earlier.append(text)
    return screened_out


def leaks(train: list[Preference], held_out: list[Preference]) -> dict[str, list[Preference]]:
    """The held-out pairs that share a query, a text, or nearly a text with training, each under its kind."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    train_queries = {pair.texts[0] for pair in train}
    train_texts, texts = _texts_of(train), _texts_of(held_out)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(2, 3), sublinear_tf=True)
    index = vectorizer.fit_transform(train_texts).T
    near: set[str] = set()
    for start in range(0, len(texts), 256):  # the whole similarity matrix would not fit into memory
        batch = texts[start : start + 256]
        closest = np.asarray((vectorizer.transform(batch) @ index).max(axis=1).todense()).ravel()
        near.update(text for text, cosine in zip(batch, closest, strict=True) if cosine >= NEAR_COSINE)
    exact = near & set(train_texts)
    return {
        "query": [pair for pair in held_out if pair.texts[0] in train_queries],
        "text": [pair for pair in held_out if exact & set(pair.texts[1:])],
        "near_text": [pair for pair in held_out if near & set(pair.texts[1:])],
    }


def _texts_of(pairs: list[Preference]) -> list[str]:
    """The different texts of both sides, sorted."""
    return sorted({text for pair in pairs for text in pair.texts[1:]})


def diversity(texts: list[str], characters: int, draws: int = 5) -> dict[str, float]:
    """distinct-1 and distinct-2: different n-grams per n-gram (Li et al. 2016, arXiv 1510.03055), mean of the draws.

    Each draw takes random texts until they have this many characters, and cuts the last one there. Policies are
    compared on equally many characters because whoever writes more repeats more.
    """
    sums = {1: 0.0, 2: 0.0}
    for draw in range(draws):
        order = random.Random(draw).sample(texts, len(texts))
        sample, left = [], characters
        for text in order:
            sample.append(text[:left])
            left -= len(sample[-1])
            if not left:
                break
        for n in sums:
            grams = [gram for text in sample for gram in ngrams(text, n)]
            sums[n] += len(set(grams)) / max(1, len(grams)) / draws
    return {f"distinct_{n}": round(total, 4) for n, total in sums.items()}
