"""How different a completion is from the others of its step and from what was learnt, and what that does to its reward.

GRPO makes a policy repeat what was rewarded once. Rewarding quality and difference together can raise both ("Jointly
Reinforcing Diversity and Quality in Language Model Generations", arXiv 2509.02534).
"""

import math
import statistics
from collections.abc import Sequence, Set
from pathlib import Path

from common.characters import REFERENCES
from common.records import Demonstration, Reference, read
from common.texts import ngrams

# Characters in a row: what likeness is counted in, and what is copied rather than met by chance. That is of Chinese; an
# alphabet has more in common.
RUN, COPIED = 4, 12
ACCEPTED = 0.5  # least reward of a text that the judge accepts, where the reward is P(verdict = 1)

Rows = Sequence[tuple[str, str]]  # (query, text)
Rewarded = list[float | None]


def learnt_by_heart(sft: Path) -> set[str]:
    """Every run of 4 to 12 characters of the references and of the demonstrations, where there are any."""
    texts = [reference.response for reference in read(REFERENCES, Reference)]
    if sft.is_file():
        texts += [row.completion[0]["content"] for row in read(sft, Demonstration)]
    return runs_in(texts)


def runs_in(texts: list[str]) -> set[str]:
    """Every run of RUN to COPIED characters."""
    return {run for text in texts for length in range(RUN, COPIED + 1) for run in ngrams(text, length)}


def novelties(rows: Rows, learnt: Set[str]) -> list[float]:
    """The novelty of each (query, text) of a step, from 0 (nothing is its own) to 1.

    1 minus the mean of three shares: `group`, of its runs of 4 characters those in the most similar completion of its
    query; `elsewhere`, the same over other queries; `copied`, of its runs of 12, or of it all where it is shorter,
    those learnt by heart. The nearest text counts and not the mean of all, since copies are what is to be rare. An
    empty text has no novelty. The order of the rows does not matter.
    """
    runs = [set(ngrams(text, RUN)) or {text} for _, text in rows]
    values = []
    for number, (query, text) in enumerate(rows):
        group = elsewhere = 0.0
        for other, (asked, _) in enumerate(rows):
            if other != number:
                shared = len(runs[number] & runs[other]) / len(runs[number])
                if asked == query:
                    group = max(group, shared)
                else:
                    elsewhere = max(elsewhere, shared)
        long = ngrams(text, min(COPIED, len(text)))
        copied = sum(run in learnt for run in long) / max(1, len(long))
        values.append(1 - (group + elsewhere + copied) / 3 if text.strip() else 0.0)
    return values


def multiply(rewards: Rewarded, values: list[float], weight: float, accepted: float) -> Rewarded:
    """Rewards r of 0 to 1 times 1 - weight * (1 - novelty): quality times difference.

    A text below `accepted` counts as having no novelty, so that no novelty lifts it above one that is accepted.
    """
    taught: Rewarded = []
    for reward, novelty in zip(rewards, values, strict=True):
        sameness = 1 - novelty if reward is not None and reward >= accepted else 1.0
        taught.append(reward if reward is None else reward * (1 - weight * sameness))
    return taught


def take_off(rewards: Rewarded, values: list[float], weight: float, queries: list[str]) -> Rewarded:
    """Scores minus weight * (1 - novelty) standard deviations of the scores within a query, pooled over the step.

    A product would reward copies of texts whose score is negative. With a weight of at most 1 no difference of more
    than a standard deviation changes its sign.
    """
    of_query: dict[str, list[float]] = {}
    for query, reward in zip(queries, rewards, strict=True):
        if reward is not None:
            of_query.setdefault(query, []).append(reward)
    squares = [len(own) * statistics.pvariance(own) for own in of_query.values()]
    unit = math.sqrt(sum(squares) / max(1, sum(map(len, of_query.values()))))
    taught: Rewarded = []
    for reward, novelty in zip(rewards, values, strict=True):
        taught.append(reward if reward is None else reward - weight * unit * (1 - novelty))
    return taught
