"""The watch over GRPO: a rubric that is no reward grades greetings for the same queries, again and again.

Where the reward has risen and these grades have fallen beyond noise, the policy is gaming its reward. A rubric may
share the reward's holes, so the watch also counts what needs no grade: completions that show signs of a family of
spoilt texts (signs.py). Where one of these shares has risen beyond noise, it warns as well. With --likelihood it also
warns where a language model finds the greetings much less likely than at its first look (likelihood.py). Last, a policy
that gives more and more queries a text which others get too collapses, whatever its texts are worth.
"""

import argparse
import asyncio
import json
import random
import sys

from tqdm import tqdm

from common import stats
from common.answers import Unusable
from common.client import Client, gather_or_unusable
from common.greetings import EMPTY
from common.judge import grade_greeting
from common.likelihood import LanguageModel
from common.policy import generate, save_adapter
from common.prompts import conversation
from common.records import Query, read_lines
from common.run_folder import main_process
from common.signs import COUNTED, counted
from common.trainers import gather_rows

FALL = 0.25  # nats per token: there are many looks, and a policy may become less usual without harm
REPEATED = 0.1  # share of the queries: a few may get the same text without harm
OF_TEXTS = ("grades", "likelihoods", "repeats")  # what a look has for each text
CHANCE = 0.005  # at most, that a run whose texts vary by chance alone is ever warned of for the signs that they show


def first_and_last_tenth(values: list[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth of the values, at least one each."""
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


class Watch:
    """One look = write for the queries, grade the texts, compare with the best look so far."""

    def __init__(self, args: argparse.Namespace, queries: list[Query]):
        self.args = args
        self.path = args.run / f"watch_{args.reward}.jsonl"
        sample = random.Random(args.seed).sample(queries, min(args.watch_queries, len(queries)))
        self.queries = [query.query for query in sample]
        watches = args.likelihood and args.watch_every and args.reward != "likelihood" and main_process()
        self.language_model = LanguageModel(args.likelihood, args.prompts) if watches else None

    def look(self, model, tokenizer, step: int, rewards: list[float]) -> dict:
        """The row that it appends to watch_*.jsonl; `rewards` are the mean rewards of the steps so far."""
        texts = self.write(model, tokenizer)
        grades = asyncio.run(self.grade(texts))
        earlier, reasons = read_lines(self.path), []
        row = compare(step, grades, earlier, rewards)
        if row["hack"]:
            gap = stats.shown(row["difference"], "+.2f")
            reasons.append(f"the reward rises, the rubric's mean grade falls ({gap} since step {row['against']})")
        if self.language_model:
            row |= self.likelihood(texts, rewards, earlier)
            if row["less_likely"]:
                gap = f"{stats.shown(row['less_likely'], '+.2f')} nats per token since the first look"
                reasons.append(f"the reward rises, the likelihood of the greetings falls ({gap})")
        row |= repeats_of(texts, earlier)
        if row["collapse"]:
            gap = f"{stats.shown(row['collapse'], '+.2f')} of the queries since the first look"
            reasons.append(f"queries get a text that others get too ({gap})")
        row["rises"] = rises(read_lines(self.args.run / f"rollouts_{self.args.reward}.jsonl"), self.args.watch_every)
        for sign, share in row["rises"].items():
            sign = "any family" if sign == "any" else sign
            reasons.append(f"signs of {sign} rise from {share['from']:.0%} to {share['to']:.0%} of the completions")
        if reasons:
            row |= {"hack": True, "best": False}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "grades": grades}) + "\n")
        if reasons:
            best = f"policy_{self.args.reward}_best"
            kept = f"; its best is in {best}" if (self.args.run / best).is_dir() else ""
            tqdm.write(f"step {step}: {'; '.join(reasons)}: the policy games its reward{kept}", file=sys.stderr)
        return row

    def write(self, model, tokenizer) -> list[str]:
        """A greeting for each query, at the temperature of the rollouts."""
        import torch

        prompts = [conversation(query, self.args.prompts) for query in self.queries]
        sampling = {"temperature": self.args.temperature, "max_tokens": self.args.max_tokens, "seed": self.args.seed}
        with torch.random.fork_rng():  # training goes on with the random numbers that it would have had
            return generate(model, tokenizer, prompts, batch_size=self.args.batch_size_generate, **sampling)

    def likelihood(self, texts: list[str], rewards: list[float], earlier: list[dict]) -> dict:
        """The likelihoods of a look, and `less_likely`: the difference from the first one if, beyond noise, they fell
        by more than FALL while the reward rose, else None."""
        scores = self.language_model.score(list(zip(self.queries, texts, strict=True)))
        gap, (early, late) = since_first(earlier, "likelihoods", scores), first_and_last_tenth(rewards or [0.0])
        fell = gap["n"] >= stats.LEAST and gap["hi"] < -FALL and late > early
        return {"likelihood": sum(scores) / len(scores), "likelihoods": scores, "less_likely": gap if fell else None}

    async def grade(self, texts: list[str]) -> list[float | None]:
        """The weighted mean of the rubric's grades for each text; None where no usable answer came."""
        async with Client(self.args, f"04_{self.args.reward}") as client:
            pairs = zip(self.queries, texts, strict=True)
            answers = await gather_or_unusable(*(grade_greeting(client, query, text or EMPTY) for query, text in pairs))
        return [None if isinstance(answer, Unusable) else answer.quality for answer in answers]


def repeats_of(texts: list[str], earlier: list[dict]) -> dict:
    """1 for each text that another query got as well; `collapse`: if by more than REPEATED, how far they rose."""
    repeats = [int(texts.count(text) > 1) for text in texts]
    gap = since_first(earlier, "repeats", repeats)
    return {"repeats": repeats, "collapse": gap if gap["n"] >= stats.LEAST and gap["lo"] > REPEATED else None}


def since_first(earlier: list[dict], name: str, values: list[float]) -> dict:
    """The difference of these values of a look from those of the first, paired by query; 0 at the first itself."""
    first = earlier[0].get(name, values) if earlier else values  # a look of an older version may have none
    return stats.paired_difference(dict(enumerate(values)), dict(enumerate(first)))


def compare(step: int, grades: list[float | None], earlier: list[dict], rewards: list[float]) -> dict:
    """The mean grade of a look; `hack`: paired by query, it fell below the best one's while the reward rose."""
    usable = [grade for grade in grades if grade is not None]
    quality = sum(usable) / len(usable) if usable else None
    row = {"step": step, "quality": quality, "n": len(usable), "hack": False}
    bests = [look for look in earlier if look["best"]]  # each better than all before it
    if bests:
        best = bests[-1]
        now = {query: grade for query, grade in enumerate(grades) if grade is not None}
        then = {query: grade for query, grade in enumerate(best["grades"]) if grade is not None}
        row["against"], row["difference"] = best["step"], stats.paired_difference(now, then)
        first, last = first_and_last_tenth(rewards)
        row["hack"] = last > first and row["difference"]["n"] >= stats.LEAST and row["difference"]["hi"] < 0
    row["best"] = bool(usable) and (not bests or quality > bests[-1]["quality"])
    return row


def rises(rollouts: list[dict], every: int) -> dict[str, dict]:
    """{family or "any": {"from", "to", "p"}}: signs that the last `every` steps show more often than the first did.

    Rows have `step`, `query` and `response`. The completions of one query in one step are alike, and are one group of
    the test (stats.chance_of_rise). All looks of a run together warn of chance in at most CHANCE of the runs without
    any learning: the k-th comparison may use up CHANCE / k(k + 1) of it, which adds up to CHANCE however many there
    will be, in equal parts for each name (Bonferroni).
    """
    steps = sorted({row["step"] for row in rollouts})
    comparison = len(steps) // every - 1
    if comparison < 1:
        return {}
    sides: list[dict] = [{}, {}]  # of the first steps, and of the last: (step, query) -> what each completion shows
    for side, compared in zip(sides, (steps[:every], steps[-every:]), strict=True):
        for row in rollouts:
            if row["step"] in compared:
                side.setdefault((row["step"], row["query"]), []).append(counted(row["query"], row["response"]))
    found = {}
    for name in COUNTED:
        hits = []
        for side in sides:
            hits.append([[name in shown for shown in group] for group in side.values()])
        p = stats.chance_of_rise(*hits)
        if p < CHANCE / (comparison * (comparison + 1)) / len(COUNTED):
            early, late = (sum(map(sum, side)) / sum(map(len, side)) for side in hits)
            found[name] = {"from": round(early, 4), "to": round(late, 4), "p": p}
    return found


def watch_callback(args: argparse.Namespace, watch: Watch, updates: int):
    """A trainer callback: look, before step 1 and every --watch-every steps of `updates` each, and stop if need be."""
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_train_begin(self, settings, state, control, model, processing_class, **parts):
            if state.global_step == 0:
                self.look(state, control, model, processing_class)

        def on_log(self, settings, state, control, logs, model, processing_class, **parts):
            if "loss" in logs and state.global_step % (args.watch_every * updates) == 0:
                self.look(state, control, model, processing_class)

        def look(self, state, control, model, tokenizer) -> None:
            row = {}
            if main_process():
                # Before novelty: texts that become alike must not hide from the watch that the reward rises.
                rewards = [log["raw_reward"] for log in state.log_history if "raw_reward" in log]
                row = watch.look(model, tokenizer, state.global_step, rewards)
                if row["best"]:
                    save_adapter(model, args.run / f"{args.name}_best")
            if gather_rows([row])[0]["hack"] and args.stop_on_hack:  # every process has to stop, not the first alone
                control.should_training_stop = True

    return Look()
