"""Pairs from GRPO's own rollouts: what the reward model likes and the rubric does not, for step 2 to go on with.

A policy that is rewarded by a reward model finds the texts that it overrates. The rubric grades a few rollouts of each
query: of those that the reward model likes most, the worse ones are rejected against the best by the rubric.
"""

import argparse
import asyncio
import random
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from common import records, run_folder, stats
from common.client import Client, gather_all
from common.endpoint import endpoint_name
from common.judge import add_grades
from common.pairs import Split, divide
from common.prompts import conversation, prompt_hashes
from common.records import Preference
from common.reward_model import RewardModel
from common.spoilt import Pairs
from common.texts import leaks

QUERIES = 200  # at most, whose rollouts are graded: those with the highest reward
LIKED = 2  # rollouts of each that may be rejected: the highest by reward; two others are graded with them
BEFORE, CHECKPOINTS = "rm_before_hard", "rm_hard_checkpoints"  # folders of the run
SAME = 0.1  # median distance up to which two scores of a text are of one model; sums in bf16 bring less than 0.05


class Rollout(records.Record):
    """A line of rollouts_rm.jsonl; a `quality`, where it has one, spares the rubric's."""

    query: str = Field(min_length=1)
    response: str
    reward: float | None


class Begun(NamedTuple):
    """What --hard goes on with: its stage, pairs to train on, and others to stop by and to see what was gained."""

    stage: run_folder.Stage
    train: Pairs
    held_out: Pairs
    figures: dict


def begin(args: argparse.Namespace, base: str, split: Split, settings: dict) -> Begun | None:
    """Open the stage of --hard and make its pairs; None where it is done. BEFORE holds what rm/ was and its summary."""
    if not run_folder.read_summary(args.run, "02_summary") or run_folder.unfinished(args.run, "02_rm"):
        made_by = f"python 02_train_rm.py --run {args.run}"
        run_folder.fail(f"--hard goes on from a reward model that is finished; make it with: {made_by}")
    rollouts = []
    for file in args.hard:
        rows = records.read(file, Rollout, "python 04_grpo.py --reward rm", unique=False)
        rollouts += [row.model_dump() for row in rows if row.response and row.reward is not None]
    settings = settings | {"hard": [run_folder.file_hash(file) for file in args.hard], "endpoint": endpoint_name(args)}
    settings["prompts"] = prompt_hashes(["policy", "rubric"], args.prompts)
    stage = run_folder.Stage(args.run, "02_hard", ["hard_pairs.jsonl", CHECKPOINTS, BEFORE], settings, args.redo)
    if stage.done:
        return None

    # rm/ is written anew: a call that was killed starts again from what was there before.
    before, rm_folder = args.run / BEFORE, args.run / "rm"
    rm = RewardModel(before if before.is_dir() else rm_folder, base, args.prompts)
    if not rewarded_by(rm, rollouts):
        files = ", ".join(map(str, args.hard))
        run_folder.fail(f"{rm_folder} does not give these rollouts their rewards, another model did: {files}")
    groups, failures = groups_to_grade(args, rollouts, split.test + split.stop), Counter()
    asyncio.run(grade(args, groups, failures))
    graded = sum(row["quality"] is not None for rows in groups for row in rows)
    if failures and not graded:
        print(f"02: the rubric graded none of {failures.total()} rollouts, {dict(failures)}; run again to ask again")
        raise SystemExit(3)
    pairs = pairs_of(args, groups, split.test)
    held_out, train = divide(args, pairs, "rollouts", 0.2)
    found = f"{len(pairs)} pairs from {graded} graded rollouts for {len(groups)} queries with two that differ"
    if not train:
        run_folder.fail(f"--hard has too few rollouts that are worse than others: {found}, those of the test left out")
    print(f"02: {found}")
    records.write(args.run / "hard_pairs.jsonl", pairs)
    if not before.is_dir():
        copy = Path(shutil.copytree(rm_folder, args.run / f"{BEFORE}.tmp", dirs_exist_ok=True))
        shutil.copy(args.run / "02_summary.json", copy)
        copy.rename(before)
    tests = run_folder.read_summary(before, "02_summary")
    tests = {"eval": tests["eval"], "bought": tests.get("bought"), "rollouts": won(rm, held_out)}
    sizes = {"queries": len(groups), "graded": graded, "failures": failures, "pairs": len(pairs)}
    return Begun(stage, train, held_out, sizes | {"before": tests})


def rewarded_by(rm: RewardModel, rollouts: list[dict]) -> bool:
    """Whether the rewards of these rollouts are this reward model's scores."""
    sample = random.Random(0).sample(rollouts, min(len(rollouts), 64))
    scores = rm.score([(row["query"], row["response"]) for row in sample])
    distances = [abs(score - row["reward"]) for score, row in zip(scores, sample, strict=True)]
    return bool(sample) and statistics.median(distances) <= SAME


def groups_to_grade(args: argparse.Namespace, rollouts: list[dict], barred: Pairs) -> list[list[dict]]:
    """For each query its LIKED rollouts of the highest reward, then of the others the middle one and the last.

    Queries of the `barred` pairs, which test the reward model, are left out, and those with one text alone.
    """
    prompts = {pair.texts[0] for pair in barred}
    texts: dict[str, dict[str, dict]] = {}
    for row in rollouts:
        texts.setdefault(row["query"], {})[row["response"]] = row
    groups = []
    for query, rows in texts.items():
        if len(rows) > 1 and conversation(query, args.prompts)[-1]["content"] not in prompts:
            ranked = sorted(rows.values(), key=lambda row: -row["reward"])
            others = ranked[LIKED:]
            lower = others[len(others) // 2 :]  # from the middle one on
            groups.append(ranked[:LIKED] + lower[:1] + lower[1:][-1:])
    return sorted(groups, key=lambda rows: -rows[0]["reward"])[:QUERIES]


async def grade(args: argparse.Namespace, groups: list[list[dict]], failures: Counter) -> None:
    """Have the rubric grade the rollouts that have no quality."""
    missing = [row for rows in groups for row in rows if row.get("quality") is None]
    async with Client(args, "02") as client:
        await gather_all(*(add_grades(client, row, failures) for row in missing))


def pairs_of(args: argparse.Namespace, groups: list[list[dict]], test: Pairs) -> Pairs:
    """The best by the rubric against each of the LIKED that it grades lower; none that shares a text with the test."""
    pairs = []
    for rows in groups:
        graded = [row for row in rows if row["quality"] is not None]
        best = max(graded, key=lambda row: (row["quality"], row["reward"]), default=None)
        for row in rows[:LIKED]:
            if row in graded and row["quality"] < best["quality"]:
                prompt = conversation(row["query"], args.prompts)
                good, bad = ([{"role": "assistant", "content": side["response"]}] for side in (best, row))
                pairs.append(Preference(prompt=prompt, query=row["query"], chosen=good, rejected=bad, why="rollouts"))
    leaking = {pair.id for some in leaks(test, pairs).values() for pair in some} if pairs else set()
    return [pair for pair in pairs if pair.id not in leaking]


def won(rm: RewardModel, pairs: Pairs) -> dict:
    """How often the chosen text scores above the rejected one."""
    chosen = rm.score_conversations([pair.prompt + pair.chosen for pair in pairs])
    rejected = rm.score_conversations([pair.prompt + pair.rejected for pair in pairs])
    return stats.rate(sum(one > other for one, other in zip(chosen, rejected, strict=True)), len(pairs))
