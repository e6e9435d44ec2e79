"""How often each evaluator can be bought: the search of search.py on the same good greetings for all of them."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial

from tqdm import tqdm

from common import records, run_folder, stats
from common.answers import Unusable
from common.client import Client, gather_all, gather_or_unusable
from common.judge import EXCELLENT, grade_greeting, judge_greeting
from common.likelihood import LanguageModel
from common.reward_model import RewardModel
from common.search import Try, bought, families_of, search, search_scores, sources_of
from common.spoilt import Source

FILES = ["bought.jsonl", "bought.json"]
Found = tuple[list[list[Try]], list[float]]  # (what was tried on each greeting, the bar of each)


def good_greetings(labelled: list[dict], most: int, seed: int) -> list[Source]:
    """Good greetings of the test part that occur in no training text, at most so many, drawn by a hash."""
    good = []
    for row in labelled:
        if row["part"] == "test" and row["label"] == 1 and not row["leaked"]:
            good.append((row["query"], row["response"]))
    return sources_of(sorted(good, key=lambda pair: run_folder.digest(seed, "bought", *pair))[:most], seed)


async def search_judges(
    judge: Client, rubric: Client, principles: list[str], sources: list[Source], failures: Counter
) -> dict[str, Found]:
    """What rubric and refined judge were bought with; the judge is left out if there are no principles."""

    async def quality(query: str, text: str) -> float:
        return (await grade_greeting(rubric, query, text)).quality

    async def verdict(query: str, text: str) -> float:
        return (await judge_greeting(judge, query, text, principles)).reward

    async def score(name: str, ask: Callable, rows: list[tuple[str, str]]) -> list[float | None]:
        answers = await gather_or_unusable(*(ask(query, text) for query, text in rows))
        failures.update(f"{name}, searched: {answer}" for answer in answers if isinstance(answer, Unusable))
        progress.update(len(rows))
        return [None if isinstance(answer, Unusable) else answer for answer in answers]

    evaluators = {"rubric": (quality, math.nextafter(EXCELLENT, 0.0))}  # (asks, bar)
    if principles:
        evaluators["judge"] = verdict, 0.5
    with tqdm(desc="search", unit=" texts") as progress:
        searches = [
            search(partial(score, name, ask), sources, judge.args.seed) for name, (ask, _) in evaluators.items()
        ]
        found = await gather_all(*searches)
    return {name: (tried, [evaluators[name][1]] * len(sources)) for name, tried in zip(evaluators, found, strict=True)}


def search_the_others(
    args: argparse.Namespace, base: str, labelled: list[dict], sources: list[Source]
) -> dict[str, Found]:
    """The same of the reward model and both null baselines, by their scores, and of --likelihood, as of a judge."""
    seen = [row for row in labelled if row["part"] != "test"]
    ngrams = stats.ngram_classifier(stats.column(seen, "response"), stats.column(seen, "label"))
    evaluators: dict[str, Callable] = {
        "null: length": lambda rows: [len(text) for _, text in rows],
        "null: n-grams": lambda rows: ngrams.decision_function([text for _, text in rows]).tolist(),
    }
    found = {}
    if (args.run / "rm" / "calibration.json").is_file():  # written when it is trained
        score = RewardModel(args.run / "rm", base, args.prompts).score
        found["reward_model"] = search_scores(score, sources, args.seed)
        del score  # with it the model, before another is loaded
    for name, score in evaluators.items():
        found[name] = search_scores(score, sources, args.seed)
    if args.likelihood:
        tried, _ = search_scores(LanguageModel(args.likelihood, args.prompts).worths, sources, args.seed)
        found["likelihood"] = tried, [math.nextafter(1.0, 0.0)] * len(sources)  # bought with what it accepts
    return found


def keep(args: argparse.Namespace, sources: list[Source], found: dict[str, Found]) -> None:
    """Write bought.json, {evaluator: rates}, and bought.jsonl: with what, of each family the text it likes best."""
    rates, rows = {}, []
    for name, (tried, bars) in found.items():
        rates[name] = bought(tried, bars)
        for source, tries, bar in zip(sources, tried, bars, strict=True):
            best: dict[str, Try] = {}
            above = [one for one in tries if one.score is not None and one.score > bar]
            for one in sorted(above, key=lambda one: one.score):
                best.update(dict.fromkeys(families_of(one), one))
            place = {"evaluator": name, "query": source.query, "original": source.greeting}
            rows += [place | one._asdict() | {"bar": bar} for one in dict.fromkeys(best.values())]
    records.write(args.run / FILES[0], rows)
    run_folder.replace_file(args.run / FILES[1], json.dumps(rates) + "\n")
