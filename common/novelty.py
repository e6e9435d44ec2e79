"""How different a completion is from the others of its step and from what was learnt, and what that does to its reward.

GRPO makes a policy repeat what was rewarded once. Rewarding quality and difference together can raise both ("Jointly
Reinforcing Diversity and Quality in Language Model Generations", arXiv 2509.02534).
"""

import statistics
from collections import Counter, defaultdict
from pathlib import Path

from common.records import Demonstration, Reference, read
from common.run_folder import ROOT
from common.texts import ngrams, runs_of_12

RUN = 4  # characters in a row
ACCEPTED = 0.5  # least reward of a text that the judge accepts, where the reward is P(verdict = 1)

Rewarded = list[float | None]


def learnt_by_heart(sft: Path) -> set[str]:
    """The runs of 12 characters of the references and of the demonstrations, where there are any."""
    texts = [reference.response for reference in read(ROOT / "data/references.jsonl", Reference)]
    if sft.is_file():
        texts += [row.completion[0]["content"] for row in read(sft, Demonstration)]
    return runs_of_12(texts)


def novelties(rows: list[tuple[str, str]], learnt: set[str]) -> list[float]:
    """The novelty of each (query, text) of a step, from 0 (nothing is its own) to 1.

    1 - (g + s + c) / 3, all of them shares of a text's runs of characters: g the mean share of its runs of 4 that stand
    in another completion of its query, s the share that stand in a completion of another query, c the share of its
    runs of 12 that were learnt by heart. An empty text has no novelty. The order of the rows does not matter.
    """
    runs = [set(ngrams(text, RUN)) or {text} for _, text in rows]
    in_step: Counter = Counter()  # run -> completions that hold it
    in_group: dict[str, Counter] = defaultdict(Counter)  # the same of each query
    completions = Counter(query for query, _ in rows)
    for (query, _), own in zip(rows, runs, strict=True):
        in_step.update(own)
        in_group[query].update(own)

    values = []
    for (query, text), own in zip(rows, runs, strict=True):
        others = completions[query] - 1
        shared = sum(in_group[query][run] - 1 for run in own)
        elsewhere = sum(in_step[run] > in_group[query][run] for run in own)
        long = ngrams(text, 12)
        likeness = shared / (len(own) * others) if others else 0.0
        likeness += elsewhere / len(own)
        likeness += sum(run in learnt for run in long) / max(1, len(long))
        values.append(1 - likeness / 3 if text.strip() else 0.0)
    return values


def multiply(rewards: Rewarded, values: list[float], weight: float) -> Rewarded:
    """Verdicts r (1, 0, or P(verdict = 1)) times 1 - weight * (1 - novelty): quality times difference.

    A text that is refused counts as having no novelty, so that no novelty lifts it above one that is accepted.
    """
    taught: Rewarded = []
    for reward, novelty in zip(rewards, values, strict=True):
        sameness = 1 - novelty if reward is not None and reward >= ACCEPTED else 1.0
        taught.append(reward if reward is None else reward * (1 - weight * sameness))
    return taught


def take_off(rewards: Rewarded, values: list[float], weight: float) -> Rewarded:
    """Scores minus weight * (1 - novelty) standard deviations of the step's scores.

    A product would reward copies of texts whose score is negative. With a weight of at most 1 no difference of more
    than a standard deviation changes its sign.
    """
    usable = [reward for reward in rewards if reward is not None]
    unit = statistics.pstdev(usable) if usable else 0.0
    taught: Rewarded = []
    for reward, novelty in zip(rewards, values, strict=True):
        taught.append(reward if reward is None else reward - weight * unit * (1 - novelty))
    return taught
