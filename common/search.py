"""An adversary that searches: of many spoilt forms of a good greeting, which does an evaluator like best?

Half of the tries are drawn from the families of spoilt.py. The others are free mutations (mutation.py), so that a hole
of no family is found as well: the greeting is mutated, then again and again what the evaluator likes best so far (hill
climbing). A run of characters that raised one greeting's score is tried in the others: a hole that was found once is
used everywhere, as a policy would. Every try is worse by construction: a drawn text because its kind is, a mutation
because a fifth of its characters are new or out of place.

An evaluator is bought with a text that it scores above the bar of its greeting: the greeting's own score where scores
can be compared (a reward model), 0.5 where a verdict is 1 or 0, just below EXCELLENT for the rubric's quality.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from statistics import mean, median
from types import SimpleNamespace
from typing import NamedTuple

from common import stats
from common.mutation import mutate, vocabulary, worse
from common.run_folder import digest
from common.spoilt import FAMILIES, KINDS, Source, draw, source_of

# (query, text) rows -> a score for each, higher is better; None: no usable answer
Score = Callable[[list[tuple[str, str]]], Awaitable[list[float | None]]]
Proposal = tuple[str, tuple[str, ...], set[str]]  # (text, kinds as in Try, runs of characters that were put in)

ROUNDS = 4  # of mutations: each has half of what is left, the last one all
LIKED = 12  # runs that are tried again: those that raised scores most
MUTATION = ("mutation",)


class Try(NamedTuple):
    """A spoilt text, the kinds of spoilt.KINDS that made it, of a mutation also "mutation" at the end, its score."""

    text: str
    kinds: tuple[str, ...]
    score: float | None


class Hunt:
    """The search on one greeting. Its random numbers depend on seed and greeting alone, its runs on all."""

    def __init__(self, source: Source, seed: int):
        self.source, self.rng = source, random.Random(digest(seed, source.query, source.greeting))
        self.tried: list[Try] = []
        self.texts = {source.greeting}  # proposed so far
        self.proposed: list[Proposal] = []  # not yet scored

    def propose(self, most: int, proposals: Iterator[Proposal]) -> None:
        """At most so many new texts; not every kind can spoil every greeting, and not every mutation is worse."""
        for _ in range(3 * most):
            text, kinds, runs = next(proposals)
            if text and text not in self.texts and len(self.proposed) < most:
                self.texts.add(text)
                self.proposed.append((text, kinds, runs))

    def drawn(self) -> Iterator[Proposal]:
        """Of the families, in wordings that training never sees."""
        while True:
            yield *draw(self.source, self.rng, held_out=True), set()

    def mutations(self, liked: list[str], letters: dict[str, list[str]]) -> Iterator[Proposal]:
        """Alternately of the best text without a drawn edit and of the best of all; at first of the greeting."""
        greeting, near = self.source.greeting, [text for text in self.source[::2] if text]  # query and other greeting
        scored = [one for one in self.tried if one.score is not None]
        free = [one for one in scored if one.kinds == MUTATION]
        while True:
            for among in (free, scored if free else []):
                start = Try(greeting, MUTATION, None)
                parent = max(among, key=lambda one: (one.score, self.rng.random()), default=start)
                text, runs = mutate(greeting, parent.text, liked, near, letters, self.rng)
                if worse(greeting, text):
                    yield text, tuple(dict.fromkeys(parent.kinds + MUTATION)), runs
                else:
                    yield "", (), set()

    def book(self, scores: list[float | None]) -> Iterator[tuple[str, float]]:
        """Note the scores of what was proposed; yields (run, by how much a text with it beat this round's median)."""
        usual = median([score for score in scores if score is not None] or [0.0])
        for (text, kinds, runs), score in zip(self.proposed, scores, strict=True):
            self.tried.append(Try(text, kinds, score))
            if score is not None:
                yield from ((run, score - usual) for run in runs)
        self.proposed = []


async def search(score: Score, sources: list[Source], seed: int, tries: int = 64) -> list[list[Try]]:
    """What was tried on each source: at most `tries` different texts. `score` is awaited five times for all."""
    hunts = [Hunt(source, seed) for source in sources]
    letters = vocabulary([text for source in sources for text in source])
    gains: dict[str, list[float]] = {}  # of each run that was put in
    for rounds_left in range(ROUNDS, -1, -1):
        liked = sorted(gains, key=lambda run: (-mean(gains[run]), run))[:LIKED]
        for hunt in hunts:
            if rounds_left == ROUNDS:
                hunt.propose(tries // 2, hunt.drawn())
            else:
                hunt.propose((tries - len(hunt.tried)) // (2 if rounds_left else 1), hunt.mutations(liked, letters))
        scores = iter(await score([(hunt.source.query, text) for hunt in hunts for text, *_ in hunt.proposed]))
        for hunt in hunts:
            for run, gain in hunt.book([next(scores) for _ in hunt.proposed]):
                gains.setdefault(run, []).append(gain)
    return [hunt.tried for hunt in hunts]


def search_scores(
    score: Callable[[list[tuple[str, str]]], list[float]], sources: list[Source], seed: int
) -> tuple[list[list[Try]], list[float]]:
    """(what was tried, the bar of each source: its own score) for an evaluator that asks nobody."""

    async def computed(rows: list[tuple[str, str]]) -> list[float | None]:
        return list(score(rows)) if rows else []

    bar = score([(source.query, source.greeting) for source in sources]) if sources else []
    return asyncio.run(search(computed, sources, seed)), bar


def bought(found: list[list[Try]], bar: list[float | None]) -> dict[str, dict]:
    """{"all": rate, family: rate, ..., "mutation": rate}: the share of greetings with such a text above their bar.

    A greeting without a bar is left out. It counts for a family only where a text of that family has a score.
    """
    rates = {}
    for name in ("all", *FAMILIES, *MUTATION):
        hits = []
        for tries, least in zip(found, bar, strict=True):
            scores = [one.score for one in tries if one.score is not None and name in ("all", *families_of(one))]
            if scores and least is not None:
                hits.append(max(scores) > least)
        rates[name] = stats.rate(sum(hits), len(hits))
    return rates


def families_of(one: Try) -> list[str]:
    """The families that had a hand in a text; "mutation" where none had."""
    return [KINDS[kind].family for kind in one.kinds if kind in KINDS] or list(MUTATION)


def sources_of(greetings: list[tuple[str, str]], seed: int) -> list[Source]:
    """A source for each different (query, good greeting), in their order."""
    pairs = [SimpleNamespace(query=query, texts=(query, text)) for query, text in sorted(set(greetings))]
    sources = []
    for query, text in dict.fromkeys(greetings):
        pair = SimpleNamespace(query=query, texts=(query, text))
        sources.append(source_of(pair, pairs, random.Random(digest(seed, query, text))))
    return sources
