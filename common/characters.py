"""How Chinese reads, from characters alone: which follow which in the references, and where a text breaks that.

`python bench/critic.py` prints what the thresholds rest on.
"""

import math
from collections import Counter
from functools import lru_cache

from common.lexicon import clauses
from common.records import Reference, read
from common.run_folder import ROOT
from common.texts import ngrams

REFERENCES = ROOT / "data" / "references.jsonl"
# Nats per pair of neighbours: above ODD the critic has a doubt, above BROKEN it is sure.
ODD, BROKEN = 5.2, 6.8
# Nats that a clause may gain by being read from its end: 0.7% of greetings that the critic does not know have one
# that gains more, and 92% of the same with one clause reversed.
BACKWARDS = 3.0
RECITED = 0.6  # share of known triples at or above which a text recites the references; 1% of other good greetings do


def clause_ngrams(text: str, n: int) -> list[str]:
    """Every n-gram of a text that crosses no punctuation mark."""
    return [gram for clause in clauses(text) for gram in ngrams(clause, n)]


class CharacterModel:
    """Which characters follow which in the references: the critic's sense of fluency. ^ and $ are a clause's edges."""

    def __init__(self, texts: list[str]):
        self.singles, self.pairs, self.triples = Counter(), Counter(), Counter()
        edges = 0
        for text in texts:
            self.triples.update(clause_ngrams(text, 3))
            for clause in clauses(text):
                self.singles.update(clause)
                self.pairs.update(ngrams(f"^{clause}$", 2))
                edges += 1
        self.total = self.singles.total()  # of characters: the edges are none
        self.singles.update({"^": edges, "$": edges})

    def surprise(self, pairs: list[str]) -> float:
        """Nats: minus the logarithm of how likely each second character is after its first, summed.

        Half of each probability is the bigram's, half the character's own, so that no pair is impossible.
        """
        nats = 0.0
        for pair in pairs:
            backoff = 0.5 * (self.singles[pair[1]] + 0.5) / self.total
            nats -= math.log(0.5 * self.pairs[pair] / (self.singles[pair[0]] + 0.5) + backoff)
        return nats

    def strangeness(self, text: str) -> float:
        """Mean surprise in nats per pair of neighbours; high for jumbled text and for text unlike the references."""
        pairs = clause_ngrams(text, 2)
        return self.surprise(pairs) / max(1, len(pairs))

    def backwards(self, text: str) -> float:
        """The most nats by which a clause of five characters or more, with its edges, reads better from its end."""
        gains = []
        for clause in clauses(text):
            if len(clause) >= 5:
                forwards = self.surprise(ngrams(f"^{clause}$", 2))
                gains.append(forwards - self.surprise(ngrams(f"^{clause[::-1]}$", 2)))
        return max(gains, default=0.0)

    def breaks(self, text: str) -> int:
        """How often a text that otherwise recites the references jumps, inside a clause, between characters never met.

        0 for text of its own: there the references say nothing about what may follow what.
        """
        triples = clause_ngrams(text, 3)
        known = sum(triple in self.triples for triple in triples)
        jumps = sum(pair not in self.pairs for pair in clause_ngrams(text, 2))
        return jumps if known >= RECITED * len(triples) else 0


@lru_cache
def character_model() -> CharacterModel:
    return CharacterModel([reference.response for reference in read(REFERENCES, Reference)])
