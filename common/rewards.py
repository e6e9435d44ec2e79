"""The reward of a GRPO step: the reward model's scores (A), the verdicts of the judge under principles (B), or what a
language model finds likely (likelihood.py).

What a rule finds broken of a query's constraints the judge is not asked about, and --novelty lowers the reward of
completions that are like others (novelty.py). rollouts_*.jsonl and `raw_reward` have it as it was before that.

A completion whose reward could not be computed gets None: TRL leaves it out of its group's mean and its advantage is
0, so it teaches nothing. It is never a 0, which would teach that the text was bad.
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Set
from concurrent.futures import Future

from tqdm import tqdm

from common.answers import Unusable
from common.client import Client, gather_all
from common.constraints import broken
from common.judge import current_principles, judge_greeting
from common.likelihood import LanguageModel
from common.novelty import ACCEPTED, multiply, novelties, take_off
from common.reward_model import RewardModel
from common.run_folder import Stop, main_process
from common.signs import COUNTED, counted, signs
from common.texts import ngrams
from common.trainers import gather_rows, own_rows

PAUSES = (5.0, 30.0)  # seconds before a step's failed judgements are asked for again, if they are over a fifth

Reward = tuple[float | None, str]  # (reward, the judge's reason or why there is no reward)


class Rewards:
    """The reward function of a GRPO run. It also writes rollouts_*.jsonl, and logs figures about the rewards."""

    def __init__(self, args: argparse.Namespace, base: str, learnt: Set[str] = frozenset()):
        """`learnt` are the runs of characters that are not novel: `novelty.learnt_by_heart`."""
        self.args = args
        if args.reward == "rm":
            self.model = RewardModel(args.rm, base, args.prompts)
        elif args.reward == "likelihood":
            self.model = LanguageModel(args.likelihood, args.prompts)
        else:
            self.principles = current_principles(args.principles)
            self.client = Client(args, f"04_{args.reward}")
        self.learnt = learnt
        self.started: Future | None = None  # the rewards of the step under way

    def start(self, loop: asyncio.AbstractEventLoop, queries: list[str], completions: list) -> None:
        """Ask the judge as soon as the texts are known: TRL computes log-probabilities before it asks for rewards."""
        if self.args.reward == "judge":
            rows = list(zip(queries, map(text_of, completions), strict=True))
            self.started = asyncio.run_coroutine_threadsafe(self.rewards_for(rows), loop)

    async def __call__(self, completions: list, query: list[str], trainer_state, log_metric, **kwargs) -> list:
        """One reward for each completion of the step, as TRL asks for them; None gives no learning signal."""
        started = time.perf_counter()
        rows = list(zip(query, map(text_of, completions), strict=True))
        rewards = await (asyncio.wrap_future(self.started) if self.started else self.rewards_for(rows))
        self.started = None

        # TRL gathers the rewards of all processes by itself. The file and the figures are written by the first.
        gathered = gather_rows(list(zip(rows, rewards, strict=True)))
        written = [row for row, _ in gathered]
        values = novelties(written, self.learnt)
        if main_process():
            with open(self.args.run / f"rollouts_{self.args.reward}.jsonl", "a", encoding="utf-8") as file:
                for ((asked, text), (reward, reason)), novelty in zip(gathered, values, strict=True):
                    place = {"step": trainer_state.global_step, "query": asked}  # the step before their update
                    row = {**place, "response": text, "reward": reward, "reason": reason, "novelty": round(novelty, 4)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for name, value in figures_of(gathered).items():
            log_metric(name, value)
        log_metric("novelty", sum(values) / len(values))
        log_metric("seconds/reward", time.perf_counter() - started)
        raw = [reward for _, (reward, _) in gathered]
        if self.args.reward == "rm":
            taught = take_off(raw, values, self.args.novelty, [asked for asked, _ in written])
        else:
            taught = multiply(raw, values, self.args.novelty, ACCEPTED if self.args.reward == "judge" else 0.0)
        return own_rows(taught, len(rows))

    async def rewards_for(self, rows: list[tuple[str, str]]) -> list[Reward]:
        """The reward of every (query, text) row of a step."""
        if self.args.reward == "judge":
            rewards = await self.verdicts(rows)
        else:
            rewards = self.scores(rows) if self.args.reward == "rm" else self.likelihoods(rows)
        finite = []
        for reward, reason in rewards:
            usable = reward is not None and math.isfinite(reward)
            finite.append((float(reward) if usable else None, reason))
        return finite

    def scores(self, rows: list[tuple[str, str]]) -> list[Reward]:
        """The reward model's scores. An empty text is no greeting, so it gets the step's lowest, whatever its score."""
        scores = self.model.score(rows, self.args.micro_batch)
        lowest = min(scores)
        rewards: list[Reward] = []
        for score, (_, text) in zip(scores, rows, strict=True):
            rewards.append((score, "") if text.strip() else (lowest, "empty"))
        return rewards

    def likelihoods(self, rows: list[tuple[str, str]]) -> list[Reward]:
        """What the texts are worth to the language model; the reason is what a text shows of a spoilt one."""
        worths = self.model.worths(rows, self.args.micro_batch)
        return [(value, ", ".join(sorted(signs(*row)))) for value, row in zip(worths, rows, strict=True)]

    async def verdicts(self, rows: list[tuple[str, str]]) -> list[Reward]:
        """The judge's verdicts, all asked for at once. If over a fifth fail, those are asked for again after a pause.

        Raises:
            Stop: more than half of them failed, also after the pauses.
        """
        verdicts: list[Reward] = [(None, "")] * len(rows)
        failed = list(range(len(rows)))  # numbers of the rows that are still to be judged: at first all
        for pause in (*PAUSES, None):
            answers = await gather_all(*(self.verdict(*rows[number]) for number in failed))
            for number, verdict in zip(failed, answers, strict=True):
                verdicts[number] = verdict
            failed = [number for number, (reward, _) in enumerate(verdicts) if reward is None]
            if len(failed) <= 0.2 * len(rows):
                break
            failures = f"{len(failed)} of {len(rows)} judgements of a step {verdicts[failed[0]][1]}"
            if pause is not None:
                tqdm.write(f"{failures}; asking again in {pause:.0f} s", file=sys.stderr)
                await asyncio.sleep(pause)
                self.client.failed.clear()  # or the client would repeat these failures without asking
        if len(failed) > 0.5 * len(rows):
            raise Stop(f"{failures}; fix the endpoint and run again: the run resumes at its last checkpoint")
        return verdicts

    async def verdict(self, query: str, text: str) -> Reward:
        """The judge's verdict, None if unusable; 0 without a question if the text is empty or breaks a constraint."""
        if not text.strip():
            return 0.0, "empty"
        words = broken(query, text) if self.args.constraints else ""
        if words:
            return 0.0, f"constraint: {words}"
        try:
            verdict = await judge_greeting(self.client, query, text, self.principles)
        except Unusable as e:
            return None, f"failed: {e}"
        except SystemExit as e:  # would end TRL's thread and leave the trainer waiting for it
            raise Stop("see the error above") from e
        return verdict.reward, verdict.reason


def text_of(completion: list[dict[str, str]]) -> str:
    return completion[0]["content"]


def figures_of(gathered: list[tuple[tuple[str, str], Reward]]) -> dict[str, float]:
    """What is logged about a step's rewards: do they follow length, how alike are the texts, is the reward gamed?"""
    import numpy as np

    texts = [text for (_, text), _ in gathered]
    rewarded = np.array([(reward, len(text)) for (_, text), (reward, _) in gathered if reward is not None])
    correlation = 0.0
    if len(rewarded) and rewarded.std(axis=0).all():  # else there is nothing to correlate
        correlation = float(np.corrcoef(rewarded.T)[0, 1])
    pairs = []
    for text in texts:
        pairs += ngrams(text, 2)
    figures = {"raw_reward": float(rewarded[:, 0].mean()) if len(rewarded) else 0.0}
    figures |= {"reward_length_correlation": correlation, "distinct_2": len(set(pairs)) / max(1, len(pairs))}
    shown = [counted(query, text) for (query, text), _ in gathered]
    for name in COUNTED:
        figures[f"signs/{name}"] = sum(name in some for some in shown) / len(texts)
    figures["failed_judgements"] = float(len(gathered) - len(rewarded))
    groups: dict[str, set] = {}
    for (query, _), (reward, _) in gathered:
        groups.setdefault(query, set()).add(reward)
    figures["without_spread"] = sum(len(rewards - {None}) < 2 for rewards in groups.values()) / len(groups)
    return figures
