"""Step 5: every policy writes for the same held-out queries; score the greetings, and say how far to trust the scores.

Greetings of base, SFT, both GRPO policies, further policies and models behind an endpoint are graded on five
dimensions by the rubric judge (excellent: weighted mean of at least 2), compared two by two in both orders, and judged
by the refined judge, the five agents of step 1 and the reward model. Every evaluator is itself evaluated on labelled
greetings, and on people's ratings where there are any, beside what text length and character n-grams reach.

Reads   held-out queries, labelled greetings, the policies, rm/ and principles.jsonl of the run, summaries of 01 to 04
Writes  generations.jsonl, scores.jsonl, labelled_scores.jsonl, comparisons.jsonl, curve.jsonl; results.jsonl,
        report.html, report.md, annotate.html (a page on which people rate), 05_summary.json; evaluators/ and
        ablations/, where steps 1 and 3 run again
Paper   arXiv 2508.21476: language 30, creativity 30, emotion 15, culture 15, richness 10; each 1-3. Departures:
        nothing written for another occasion or person is excellent (prompts/rubric.md);
        intervals by bootstrap over queries; scores at equal length, diversity, null baselines, cost beside each score.
Example python 05_evaluate.py --offline --run outputs/mine
        python 05_evaluate.py --offline --run outputs/mine --ask 给班主任的教师节祝福
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from common import llm, models
from common.records import (
    ROOT,
    Appender,
    Candidate,
    Demonstration,
    Judgement,
    Labelled,
    Preference,
    Query,
    Record,
    Reference,
    Stage,
    add_run_flags,
    agreement,
    digest,
    fail,
    file_hash,
    launch,
    open_run,
    parse,
    positive,
    rate,
    read,
    read_lines,
    read_summary,
    replace_file,
    split_labelled,
    write,
    write_summary,
)

OFFLINE = {"bits": 16, "max_tokens": 48, "batch_size_generate": 260, "engine": "hf"}
EXCELLENT = 2.0  # least weighted mean of the grades
OWN = {"sft": ("policy_sft", "none"), "grpo_rm": ("policy_rm", "rm"), "grpo_judge": ("policy_judge", "judge")}
# The evaluator that was the reward of a policy, known by its folder: what it says of that policy is nothing new.
REWARDS = {"policy_rm": "reward_model", "policy_judge": "judge"}
SCORES = ["excellent", "judge", "agents", "reward_model"]
ROLES = ["policy", "rubric", "pairwise", "detector", "positive", "negative", "judge", "reflect"]
COMPLETE = 0.8  # share of the rows that must be scored for a rate to stand without a mark
RESAMPLES, REFITS = 2000, 200  # of the bootstrap: of a mean, of a logistic model
NEAR = 1  # characters by which a good and a bad greeting may differ where lengths are balanced
UNITS = ["completions", "calls", "tokens", "seconds", "money"]  # in which cost is counted
ROUTES = {
    "A": ["01_summary", "04_summary_none", "02_summary", "04_summary_rm"],
    "B": ["01_summary", "04_summary_none", "03_summary", "04_summary_judge"],
}
POINTS, DRAWN = 6, 60  # of the training curve, and rollouts graded for each
ABLATIONS = {
    "agents": ("01_curate_preferences.py", ["retrieval", "debate", "reflect"]),
    "principles": ("03_refine_judge.py", ["adversary", "reflection", "acceptance"]),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--queries", type=Path, default=ROOT / "data/queries_heldout.jsonl", help="held-out queries")
    add("--labelled", type=Path, default=ROOT / "data/labelled.jsonl", help="{query, response, label 0|1}")
    add("--policies", type=named, nargs="*", default=[], metavar="NAME=PATH", help="further policies: adapter folders "
        "of step 4, or models")  # fmt: skip
    add("--api", type=named_api, nargs="*", default=[], metavar="NAME=MODEL@URL", help="models behind an "
        "OpenAI-compatible endpoint, as further policies")  # fmt: skip
    add("--samples", type=positive, default=2, help="greetings a policy and query, each of another seed (%(default)s)")
    add("--temperature", type=float, default=1.0, help="%(default)s")
    add("--max-tokens", type=int, default=512, help="of a greeting (%(default)s)")
    add("--pairwise", type=int, default=200, help="queries on which each two policies are compared (%(default)s)")
    add("--eval-model", help="model of rubric and comparisons, for evaluation alone (--model)")
    add("--eval-base-url", type=llm.address, help="its endpoint (--base-url)")
    add("--annotate", type=positive, default=30, help="queries on the page on which people rate (%(default)s)")
    add("--annotations", type=Path, nargs="*", default=[], help="what people saved from annotate.html")
    add("--ablations", type=positive, nargs="?", const=300, help="run 01 and 03 again without their parts, on so many "
        "labelled greetings (%(const)s)")  # fmt: skip
    add("--ask", nargs="+", metavar="QUERY", help="print every policy's answer, and nothing else")
    models.add_policy_flags(parser)
    models.add_engine_flag(parser)
    llm.add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    models.choose_engine(args)
    return args


def named(text: str) -> tuple[str, str]:
    """argparse type: NAME=PATH; the name is also a file's."""
    name, _, path = text.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name) or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def named_api(text: str) -> tuple[str, tuple[str, str]]:
    """argparse type: NAME=MODEL@URL."""
    name, where = named(text)
    model, _, url = where.rpartition("@")
    if not model:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL@URL")
    return name, (model, llm.address(url))


# ---- greetings ------------------------------------------------------------------------------------------------------


class Policy(NamedTuple):
    name: str
    base: str = ""
    adapter: Path | None = None
    api: tuple[str, str] | None = None  # (model, endpoint)

    @property
    def reward(self) -> str | None:
        """The evaluator that was its reward."""
        return REWARDS.get(self.adapter.name) if self.adapter else None


class Greeting(Record):
    """A line of generations/NAME.jsonl."""

    policy: str
    query_id: str
    query: str
    response: str = Field(min_length=1)
    sample: int


def present_policies(args: argparse.Namespace, base: str) -> list[Policy]:
    """The policies to compare; one that is missing is named, with the command that makes it, and left out."""
    found = [Policy("base", base)]
    for name, (folder, reward) in OWN.items():
        adapter = args.run / folder
        if (adapter / "adapter_config.json").is_file():
            models.check_adapter(adapter, base)
            found.append(Policy(name, base, adapter))
        else:
            made_by = f"python 04_grpo.py --reward {reward} --run {args.run}"
            print(f"05: no {adapter}; make it with: {made_by}", file=sys.stderr)
    for name, path in args.policies:
        config = Path(path, "adapter_config.json")
        if config.is_file():
            found.append(Policy(name, json.loads(config.read_text())["base_model_name_or_path"], Path(path)))
        elif path.startswith((".", "/", "~")) and not Path(path, "config.json").is_file():
            print(f"05: {path} holds no model and no adapter: going on without {name}", file=sys.stderr)
        else:
            found.append(Policy(name, path))
    found += [Policy(name, api=where) for name, where in args.api]
    if twice := [name for name, n in Counter(p.name for p in found).items() if n > 1]:
        fail(f"two policies are named {twice[0]}; choose another name in --policies or --api")
    return found


def made_with(args: argparse.Namespace, policy: Policy) -> dict:
    """What a policy's greetings depend on."""
    made = {key: getattr(args, key) for key in ("seed", "samples", "temperature")}
    made |= {"queries": file_hash(args.queries), "prompts": llm.prompt_hashes(["policy"], args.prompts)}
    if policy.api:
        return made | {"api": policy.api}
    weights = file_hash(policy.adapter / "adapter_model.safetensors") if policy.adapter else ""
    made |= {key: getattr(args, key) for key in ("max_tokens", "bits", "batch_size_generate", "engine")}
    return made | {"base": policy.base, "adapter": weights}


def endpoint_args(args: argparse.Namespace, model: str, url: str) -> argparse.Namespace:
    """The settings of a client for another endpoint."""
    return argparse.Namespace(**vars(args) | {"model": model, "base_url": url, "offline": False})


async def greet(
    args: argparse.Namespace, policy: Policy, writer: llm.Client | models.Writer, asked: list, keep, failures
) -> None:
    """`keep(n, text)` for each n-th (sample, query) asked, as it is written; failures of an endpoint are counted."""
    if policy.api:

        async def one(n: int, sample: int, query: str) -> None:
            try:
                answer = await writer.ask("policy", llm.Text, temperature=args.temperature, sample=sample, query=query)
                keep(n, answer.text)
            except llm.Unusable as e:
                failures[f"greetings of {policy.name}: {e}"] += 1

        await llm.together(*(one(n, *slot) for n, slot in enumerate(asked)))
        return
    chunk = 4 * args.batch_size_generate  # kept as it is done: a killed run loses one chunk
    for start in range(0, len(asked), chunk):
        part = asked[start : start + chunk]
        texts = writer(
            policy.base, policy.adapter, [models.conversation(query, args.prompts) for _, query in part],
            temperature=args.temperature, seed=int(digest(args.seed, *part[0])[:8], 16),
            progress=f"greetings of {policy.name}",
        )  # fmt: skip
        for n, text in enumerate(texts, start):
            keep(n, text or "（空）")


async def write_greetings(
    args: argparse.Namespace, policies: list[Policy], queries: list[Query], clients: dict, failures: Counter
) -> list[dict]:
    """Greetings of every policy for every query, in generations/NAME.jsonl; goes on where it was."""
    rows, writer = [], models.Writer(args)
    for policy in policies:
        path = args.run / "generations" / f"{policy.name}.jsonl"
        settings = made_with(args, policy)
        stage = Stage(args.run, f"05_greetings_{policy.name}", [f"generations/{path.name}"], settings, args.redo)
        if not stage.done:
            with Appender(path) as append:
                slots = [(digest(policy.name, q.id, n), n, q) for n in range(args.samples) for q in queries]
                todo = [slot for slot in slots if slot[0] not in append.done]

                def keep(n: int, text: str, policy=policy, append=append, todo=todo) -> None:
                    key, sample, q = todo[n]
                    append(
                        Greeting(id=key, policy=policy.name, query_id=q.id, query=q.query, response=text, sample=sample)
                    )

                asked = [(n, q.query) for _, n, q in todo]
                await greet(args, policy, clients.get(policy.name, writer), asked, keep, failures)
                if len(append.done) == len(slots):
                    stage.finish()
        if path.stat().st_size:
            rows += [r.model_dump() for r in read(path, Greeting)]
        else:
            print(f"05: {policy.name} wrote nothing: going on without it", file=sys.stderr)
    write(args.run / "generations.jsonl", rows)
    return rows


# ---- evaluators -----------------------------------------------------------------------------------------------------


async def grade(judge: llm.Client, row: dict, failures: Counter) -> None:
    """Add the rubric's grades to a row; None where none came."""
    try:
        answer = await judge.ask("rubric", llm.Grades, query=row["query"], response=row["response"])
        row["grades"] = {name: getattr(answer, name) for name in llm.WEIGHTS}
        row["quality"] = answer.quality
        row["excellent"] = int(row["quality"] >= EXCELLENT)
    except llm.Unusable as e:
        failures[f"rubric: {e}"] += 1
        row["grades"], row["quality"], row["excellent"] = None, None, None


async def verdict(client: llm.Client, row: dict, name: str, principles: list[str], failures: Counter) -> None:
    """Add the verdict under these principles to a row; None where none came."""
    try:
        row[name] = (await llm.judge(client, row["query"], row["response"], principles)).verdict
    except llm.Unusable as e:
        failures[f"{name}: {e}"] += 1
        row[name] = None


async def compare(judge: llm.Client, one: dict, other: dict, failures: Counter) -> dict:
    """Two rows with one query, asked in both orders: the share of a win that `one` has, 1, 0.5 or 0.

    A verdict that flips with the order is a tie; `same` says whether it held, None for two rows with one text, which
    nobody is asked about. The outcome is None where an answer is missing.
    """
    texts = [one["response"], other["response"]]
    found = {"query_id": one.get("query_id"), "one": one["id"], "other": other["id"]}
    found |= {"longer_by": len(texts[0]) - len(texts[1])}
    if texts[0] == texts[1]:
        return found | {"outcome": 0.5, "same": None}
    said = []
    for first, second in (texts, texts[::-1]):
        try:
            asked = {"query": one["query"], "A": first, "B": second}
            said.append({"A": 1.0, "B": 0.0, "tie": 0.5}[(await judge.ask("pairwise", llm.Preferred, **asked)).better])
        except llm.Unusable as e:
            failures[f"pairwise: {e}"] += 1
            return found | {"outcome": None, "same": None}
    same = said[0] == 1 - said[1]
    return found | {"outcome": said[0] if same else 0.5, "same": same}


def pairs_of_policies(rows: list[dict], queries: list[str]) -> list[tuple[dict, dict]]:
    """The first greetings of each two policies for each of these queries."""
    first = {(r["query_id"], r["policy"]): r for r in rows if r["sample"] == 0}
    names = list(dict.fromkeys(r["policy"] for r in rows))
    both = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [(first[q, a], first[q, b]) for q in queries for a, b in both if (q, a) in first and (q, b) in first]


def labelled_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(good, bad) labelled greetings for one query."""
    return [(g, b) for g in rows if g["label"] == 1 for b in rows if b["label"] == 0 and b["query"] == g["query"]]


def rollouts(run: Path, seed: int) -> list[dict]:
    """Rollouts of both GRPO runs from POINTS equal parts of the training, `at` being the middle of the part."""
    drawn = []
    for route, reward in (("A", "rm"), ("B", "judge")):
        rows = read_lines(run / f"rollouts_{reward}.jsonl")
        for n in range(POINTS):
            part = [r for r in rows[n * len(rows) // POINTS : (n + 1) * len(rows) // POINTS] if r["response"].strip()]
            for r in random.Random(digest(seed, route, n)).sample(part, min(DRAWN, len(part))):
                found = {"route": route, "at": (n + 0.5) / POINTS, "query_id": digest(r["query"])}
                drawn.append(found | {"query": r["query"], "response": r["response"]})
    return drawn


def step_command(args: argparse.Namespace, script: str, folder: Path, *flags: object) -> list[str]:
    """The command that runs another step in a folder of its own, at the same endpoint, with what is left to spend."""
    command = [sys.executable, str(ROOT / script), "--run", str(folder), "--redo", *map(str, flags)]
    for name in ("prompts", "seed", "base_url", "model", "api_key_env", "concurrency", "timeout", "attempts", "votes",
                 "price_in", "price_out"):  # fmt: skip
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.budget is not None:  # less what the run and its other folders have cost
        stores = [llm.Store(path).tokens for path in args.run.rglob("answers.sqlite") if path.parent != folder]
        spent = [sum(tokens) for tokens in zip(*stores, strict=True)] or [0, 0]
        priced = args.price_in or args.price_out
        left = args.budget - (llm.open_store(args).money(*spent) if priced else sum(spent))
        command += ["--budget", str(max(0.0, left))]
    return command + ["--offline"] * args.offline


def run_step(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 3):  # 3: some answers failed, and stand without a label
        fail(f"{Path(command[1]).name} did not finish, see above; it was: {' '.join(command)}")


def ask_agents(args: argparse.Namespace, rows: list[dict], name: str, folder: Path, *flags: str) -> None:
    """Add to each row the verdict of the five agents: step 1, run on these greetings in a folder of its own."""
    distinct = {Candidate(query=r["query"], response=r["response"]).id: r for r in rows}
    write(folder / "greetings.jsonl", ({"query": r["query"], "response": r["response"]} for r in distinct.values()))
    given = ["--samples", 0, "--candidates", folder / "greetings.jsonl", "--max-similar", 1, "--max-copied", 1]
    run_step(step_command(args, "01_curate_preferences.py", folder, *given, *flags))  # every one is judged
    verdicts = {r.id: r.label for r in read(folder / "judgements.jsonl", Judgement)}
    for row in rows:
        row[name] = verdicts.get(Candidate(query=row["query"], response=row["response"]).id)


def ask_reward_model(args: argparse.Namespace, base: str, rows: list[dict]) -> None:
    rm = models.RewardModel(args.run / "rm", base, args.bits, args.prompts)
    for row, score in zip(rows, rm.score([(r["query"], r["response"]) for r in rows]), strict=True):
        row["reward_model"] = score


# ---- labelled greetings ---------------------------------------------------------------------------------------------


def training_texts(args: argparse.Namespace) -> dict[str, set[str]]:
    """Texts that the run has learnt from, by where they stand: what an evaluator says of these proves little."""

    def source(step: str, flag: str, kind: type[Record]) -> list:
        path = read_summary(args.run, step).get("settings", {}).get(flag)
        if path and not Path(path).is_file():
            print(f"05: {path} is gone: which labelled rows stand in it is not known", file=sys.stderr)
            return []
        return read(path, kind, unique=False) if path else []

    pairs, third = source("02_summary", "preferences", Preference), source("03_summary", "labelled", Labelled)
    settings = read_summary(args.run, "03_summary").get("settings", {})
    same = third and file_hash(settings["labelled"]) == file_hash(args.labelled)
    parts = split_labelled(third, settings["seed"]) if third and not same else {}
    found = {
        "preferences": {text for pair in pairs for text in pair.texts[1:]},
        "sft": {d.completion[0]["content"] for d in source("04_summary_none", "sft", Demonstration)},
        "references": {r.response for r in source("01_summary", "references", Reference)},
        "labelled rows of step 3": {r.response for name, part in parts.items() if name != "test" for r in part},
    }
    return {name: texts for name, texts in found.items() if texts}


def labelled_rows(args: argparse.Namespace) -> list[dict]:
    """The labelled greetings, with `part` (step 3 has not looked at `test`) and `leaked`: where the text was learnt."""
    rows, third = read(args.labelled, Labelled), args.run / "stages" / "03_principles.json"
    if third.is_file():
        used = json.loads(third.read_text(encoding="utf-8"))["settings"]
        if used["labelled"] == file_hash(args.labelled) and used["seed"] != args.seed:
            fail(f"step 3 of {args.run} split --labelled with --seed {used['seed']}: use the same, or no row is unseen")
    learnt = training_texts(args)
    return [
        r.model_dump() | {"part": part, "leaked": [name for name, texts in learnt.items() if r.response in texts]}
        for part, records in split_labelled(rows, args.seed).items() for r in records
    ]  # fmt: skip


def verdicts_on(test: list[dict], seen: list[dict]) -> dict[str, list[int | None]]:
    """What every evaluator, and both null baselines, say of test rows.

    An evaluator that gives a score says "good" from the threshold that is best on the rows seen.
    """
    names = {"excellent": "rubric", "judge": "judge", "seed_judge": "seed_judge", "agents": "agents"}
    found = {
        name: [r.get(key) for r in test] for key, name in names.items() if any(r.get(key) is not None for r in test)
    }
    if "reward_model" in test[0] and "reward_model" in seen[0]:
        ranked = sorted(r["reward_model"] for r in seen)
        threshold = max(ranked, key=lambda t: sum((r["reward_model"] >= t) == r["label"] for r in seen))
        found["reward_model"] = [int(r["reward_model"] >= threshold) for r in test]
    nulls = models.null_verdicts(
        *([r[key] for r in seen] for key in ("response", "label")), [r["response"] for r in test]
    )
    return found | {f"null: {name}": verdicts for name, verdicts in nulls.items()}


def balanced(test: list[dict]) -> list[int]:
    """Places of as many good as bad rows, each good one beside a bad one at most NEAR characters longer or shorter.

    Matching in order of length finds the most pairs there are.
    """
    places = sorted(range(len(test)), key=lambda i: len(test[i]["response"]))
    good, bad = ([i for i in places if test[i]["label"] == label] for label in (1, 0))
    kept = []
    while good and bad:
        gap = len(test[good[0]]["response"]) - len(test[bad[0]]["response"])
        if abs(gap) <= NEAR:
            kept += [good.pop(0), bad.pop(0)]
        else:
            (bad if gap > 0 else good).pop(0)
    return kept


def evaluate_evaluators(given: list[dict], comparisons: list[dict]) -> dict:
    """Agreement of every evaluator with the labels of the part that step 3 has not looked at: on rows that nothing has
    learnt from, on as many good as bad ones of equal length among these, and apart on rows that leaked."""
    seen, test = [r for r in given if r["part"] != "test"], [r for r in given if r["part"] == "test"]
    verdicts, clean = verdicts_on(test, seen), [i for i, r in enumerate(test) if not r["leaked"]]
    even = [clean[i] for i in balanced([test[i] for i in clean])]
    leaked = [i for i, r in enumerate(test) if r["leaked"]]

    def table(places: list[int]) -> dict[str, dict]:
        labels = [test[i]["label"] for i in places]
        found = (
            {name: agreement(labels, [said[i] for i in places]) for name, said in verdicts.items()} if places else {}
        )
        return {name: figures | {"good": sum(labels)} for name, figures in found.items()}

    fresh = {test[i]["id"] for i in clean}
    pairs = [c for c in comparisons if "query" not in c and c["one"] in fresh and c["other"] in fresh]
    heard = [c["outcome"] for c in pairs if c["outcome"] is not None]
    unequal = [c["longer_by"] > 0 for c in pairs if c["longer_by"]]
    return {
        "evaluators": table(clean), "evaluators_at_equal_length": table(even),
        "evaluators_on_leaked_rows": table(leaked), "evaluators_on_all_rows": table(clean + leaked) if leaked else {},
        "leaked": dict(Counter(name for r in test for name in r["leaked"])) | {"rows": len(leaked)},
        "labelled_test_rows": len(test),
        "labelled_pairs": {
            "pairwise": rate(sum(heard), len(heard)), "null: the longer": rate(sum(unequal), len(unequal))
        },
    }  # fmt: skip


# ---- figures --------------------------------------------------------------------------------------------------------


def query_means(rows: list[dict], key: str) -> dict[str, float]:
    """Query id -> mean of the rows' values, without rows that have none."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            groups.setdefault(row["query_id"], []).append(row[key])
    return {query: sum(values) / len(values) for query, values in groups.items()}


def bootstrap(means) -> dict:
    """Mean of an array of means by query, and its 95% percentile interval.

    The queries are drawn again, not the greetings: several greetings for one query are not independent.
    """
    import numpy as np

    if not len(means):
        return {"value": None, "lo": None, "hi": None, "n": 0}
    means = np.array(list(means), dtype=float)
    draws = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
    return interval(means.mean(), means[draws].mean(axis=1), len(means))


def interval(value: float, resampled, n: int) -> dict:
    import numpy as np

    lo, hi = np.percentile(resampled, [2.5, 97.5])
    return {"value": round(float(value), 4), "lo": round(float(lo), 4), "hi": round(float(hi), 4), "n": n}


def mean_of(rows: list[dict], key: str) -> dict:
    """Mean over queries with its interval; `scored` is the share of rows that have a score, `incomplete` below 80%."""
    scored = sum(r.get(key) is not None for r in rows) / max(1, len(rows))
    found = bootstrap(query_means(rows, key).values())
    return found | {"scored": round(scored, 4)} | ({"incomplete": True} if 0 < scored < COMPLETE else {})


def paired(after: dict[str, float], before: dict[str, float]) -> dict:
    """Difference of two means over the queries that both have, and in words whether it is more than noise."""
    gap = bootstrap([after[query] - before[query] for query in sorted(after.keys() & before.keys())])
    more = gap["n"] and (gap["lo"] > 0 or gap["hi"] < 0)
    return gap | {"words": "more than noise" if more else "inside noise"}


def logistic(x, y, weights):
    """Coefficients of a logistic model without intercept for shares y in [0, 1]: a tie is half a win, half a loss."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    sides = np.repeat([1, 0], len(y))
    model = LogisticRegression(C=100.0, fit_intercept=False, solver="newton-cholesky")
    return model.fit(np.vstack([x, x]), sides, np.concatenate([weights * y, weights * (1 - y)])).coef_[0]


def sigmoid(x):
    import numpy as np

    return 1 / (1 + np.exp(-x))


def resampled_fits(x, y, queries: list[str]):
    """Coefficients of a logistic model, first of all rows, then of REFITS bootstrap resamples of the queries."""
    import numpy as np

    known, at = np.unique(queries, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(known), np.full(len(known), 1 / len(known)), REFITS)
    return np.array([logistic(x, y, weights[at].astype(float)) for weights in [np.ones(len(known)), *draws]])


def excellence_at_equal_length(rows: list[dict], names: list[str]) -> dict[str, dict]:
    """The excellence rate that each policy would have if all wrote as long as all of them together do.

    A logistic model of excellence with a term for each policy and one for length, tanh of the standardised number of
    characters, after length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475). Its term for the difficulty
    of a query is left out: all policies write for the same queries.
    """
    import numpy as np

    rows = [r for r in rows if r["excellent"] is not None]
    if not rows:
        return {}
    lengths = np.array([len(r["response"]) for r in rows], dtype=float)
    length = np.tanh((lengths - lengths.mean()) / (lengths.std() or 1.0))
    x = np.column_stack([[r["policy"] == name for r in rows] for name in names] + [length]).astype(float)
    fits = resampled_fits(x, np.array([r["excellent"] for r in rows], dtype=float), [r["query_id"] for r in rows])
    n = len({r["query_id"] for r in rows})
    found = {}
    for i, name in enumerate(names):
        if any(r["policy"] == name for r in rows):
            shares = sigmoid(fits[:, i, None] + fits[:, -1, None] * length).mean(axis=1)
            found[name] = interval(shares[0], shares[1:], n)
    return found


def wins_of(comparisons: list[dict], names: list[str]) -> dict:
    """Shares of wins of each policy over each other one: as judged, and with length taken out.

    The second is a Bradley-Terry model with a term for length, tanh of the standardised difference in characters, that
    is set to zero, as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475).
    """
    import numpy as np

    heard = [c for c in comparisons if c["outcome"] is not None]
    asked = [c["same"] for c in heard if c["same"] is not None]
    found = {
        "swap_consistency": rate(sum(asked), len(asked)),
        "compared": len(comparisons),
        "failed": len(comparisons) - len(heard),
    }
    if not heard:
        return found | {"judged": {}, "at_equal_length": {}}
    judged: dict[str, dict] = {name: {} for name in names}
    fair: dict[str, dict] = {name: {} for name in names}
    gaps = np.array([c["longer_by"] for c in heard], dtype=float)
    x = np.column_stack(
        [[(c["a"] == name) - (c["b"] == name) for c in heard] for name in names] + [np.tanh(gaps / (gaps.std() or 1.0))]
    ).astype(float)
    fits = resampled_fits(x, np.array([c["outcome"] for c in heard]), [c["query_id"] for c in heard])
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            rows = [c for c in heard if {c["a"], c["b"]} == {a, b}]
            if a != b and rows:
                shares = {c["query_id"]: c["outcome"] if c["a"] == a else 1 - c["outcome"] for c in rows}
                judged[a][b] = bootstrap(shares.values())
                chances = sigmoid(fits[:, i] - fits[:, j])
                fair[a][b] = interval(chances[0], chances[1:], len(rows))
    return found | {"judged": judged, "at_equal_length": fair}


def length_bands(rows: list[dict], names: list[str]) -> list[dict]:
    """Excellence of each policy among its greetings of about one length: quarters of all greetings by length."""
    rows = sorted((r for r in rows if r["excellent"] is not None), key=lambda r: len(r["response"]))
    edges = sorted({len(rows[n * len(rows) // 4]["response"]) for n in range(4)}) if rows else []
    bands = []
    for lo, hi in zip(edges, [*edges[1:], 10**9], strict=True):
        inside = [r for r in rows if lo <= len(r["response"]) < hi]
        rates = {name: mean_of([r for r in inside if r["policy"] == name], "excellent") for name in names}
        bands.append({"from": lo, "to": min(hi - 1, len(inside[-1]["response"]))} | rates)
    return bands


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


def policy_figures(rows: list[dict], policy: Policy, characters: int, learnt: set[str], stock: list[str]) -> dict:
    """Scores, length and diversity of one policy's greetings."""
    texts = [r["response"] for r in rows]
    openings, seeds = Counter(t[:2] for t in texts), sorted({r["sample"] for r in rows})
    stock_phrases = sum(text.count(phrase) for text in texts for phrase in stock)
    figures = {"excellence" if key == "excellent" else key: mean_of(rows, key) for key in [*SCORES, "quality"]}
    graded = [r["grades"] for r in rows if r["grades"]]
    return figures | {
        "reward": policy.reward,
        "length": round(sum(map(len, texts)) / len(texts), 1),
        **diversity(texts, characters),
        "distinct_texts": round(len(set(texts)) / len(texts), 4),
        "commonest_opening": [openings.most_common(1)[0][0], round(openings.most_common(1)[0][1] / len(texts), 4)],
        "cliches_per_100": round(100 * stock_phrases / sum(map(len, texts)), 3),
        "copied_12": round(sum(bool(runs_of_12([t]) & learnt) for t in texts) / len(texts), 4),
        "unscored": sum(r["excellent"] is None for r in rows), "greetings": len(rows),
        "by_seed": [mean_of([r for r in rows if r["sample"] == n], "excellent")["value"] for n in seeds],
        "dimensions": {name: round(sum(g[name] for g in graded) / max(1, len(graded)), 3) for name in llm.WEIGHTS},
    }  # fmt: skip


def runs_of_12(texts: list[str]) -> set[str]:
    return {text[i : i + 12] for text in texts for i in range(len(text) - 11)}


# ---- cost -----------------------------------------------------------------------------------------------------------


def step_cost(run: Path, step: str) -> dict[str, float]:
    """What a step has cost: completions sampled from a policy, calls and tokens of the agents, seconds, money."""
    summary = read_summary(run, step)
    ledger, seconds = summary.get("ledger") or {}, summary.get("seconds", 0.0)
    tokens = [ledger.get("input_tokens", 0), ledger.get("output_tokens", 0)]
    prices = [summary.get("settings", {}).get(f"price_{side}") or 0.0 for side in ("in", "out")]
    return {
        "completions": summary.get("completions", summary.get("candidates", 0)), "calls": ledger.get("calls", 0),
        "tokens": sum(tokens), "seconds": seconds["total"] if isinstance(seconds, dict) else seconds,
        "money": round(sum(n * price for n, price in zip(tokens, prices, strict=True)) / 1e6, 6),
    }  # fmt: skip


def cost_figures(run: Path, rows: list[dict], graded: list[dict]) -> dict:
    """A against B: what each step cost, excellence over the cost so far, and excellence at the cost of the cheaper one.

    Both routes begin with step 1 and SFT. Points during GRPO are rollouts for the training queries, graded by the same
    rubric; the others are greetings for the held-out queries.
    """
    steps = {step: step_cost(run, step) for route in ROUTES.values() for step in route if read_summary(run, step)}
    held_out = {name: mean_of([r for r in rows if r["policy"] == name], "excellent") for name in ("base", *OWN)}
    curve, totals = {}, {}
    for route, names in ROUTES.items():
        final = {"A": "grpo_rm", "B": "grpo_judge"}[route]
        if not all(name in steps for name in names) or not held_out[final]["n"]:
            continue

        def sum_of(names: list[str], and_part: float = 0.0, of: str = names[-1]) -> dict:
            return {u: sum(steps[name][u] for name in names) + and_part * steps[of][u] for u in UNITS}

        points = [{"at": "base", "cost": dict.fromkeys(UNITS, 0.0), "excellence": held_out["base"]}]
        points.append({"at": "sft", "cost": sum_of(names[:2]), "excellence": held_out["sft"]})
        for at in sorted({r["at"] for r in graded if r["route"] == route}):
            excellence = mean_of([r for r in graded if r["route"] == route and r["at"] == at], "excellent")
            points.append({"at": f"{at:.0%} of GRPO", "cost": sum_of(names[:3], at), "excellence": excellence})
        points.append({"at": final, "cost": sum_of(names), "excellence": held_out[final]})
        curve[route] = [point for point in points if point["excellence"]["n"]]
        # With the SFT rows given: step 1 is what the reward model's pairs cost, and nothing that the judge needs.
        own = names[-2:] if route == "B" else [names[0], *names[-2:]]
        totals[route] = {"in all": sum_of(names), "with SFT rows given": sum_of(own)}
    equal = []
    for unit in UNITS if len(curve) == 2 else []:
        least = min(points[-1]["cost"][unit] for points in curve.values())
        if least:
            reached = {route: [p for p in points if p["cost"][unit] <= least][-1] for route, points in curve.items()}
            equal.append(
                {"unit": unit, "cost": least} | {r: {k: p[k] for k in ("at", "excellence")} for r, p in reached.items()}
            )
    labels = sum(read_summary(run, "03_summary").get("parts", {}).get(part, 0) for part in ("reflect", "validation"))
    pairs = read_summary(run, "01_summary").get("pairs", 0)
    return {
        "steps": steps,
        "totals": totals,
        "curve": curve,
        "equal": equal,
        "labels": {"A": 0, "B": labels},
        "pairs": pairs,
    }


# ---- ablations ------------------------------------------------------------------------------------------------------


def ablate(args: argparse.Namespace) -> list[dict]:
    """Agreement with labels of the five agents and of the refined judge, whole and without each part, on a sample.

    The agents judge the whole sample; the principles are made from its two learning parts and judge its test part.
    """
    rows, names = read(args.labelled, Labelled), []
    asked = sorted({r.query for r in rows}, key=lambda query: digest(args.seed, "ablations", query))
    count = Counter(r.query for r in rows)
    while asked and sum(count[query] for query in asked) - count[asked[-1]] >= args.ablations:
        asked.pop()
    kept, folder = [r for r in rows if r.query in asked], args.run / "ablations"
    write(folder / "labelled.jsonl", kept)
    sample = [r.model_dump() | {"query_id": digest(r.query)} for r in kept]
    unseen = {r.id for r in split_labelled(kept, args.seed)["test"]}
    test, principles = [r for r in sample if r["id"] in unseen], {}
    for family, (script, parts) in ABLATIONS.items():
        for without in ["", *parts]:
            name, flags = (
                f"{family}, {f'without {without}' if without else 'whole'}",
                [f"--no-{without}"] if without else [],
            )
            names.append(name)
            print(f"05: ablation: {name}", file=sys.stderr)
            if family == "agents":
                ask_agents(args, sample, name, folder / f"agents_{without or 'whole'}", *flags)
            else:
                made = folder / f"principles_{without or 'whole'}"
                run_step(step_command(args, script, made, "--labelled", folder / "labelled.jsonl", *flags))
                principles[name] = llm.current_principles(made / "principles.jsonl")

    async def judge_test() -> None:
        async with llm.Client(args, args.run) as client:
            work = [verdict(client, row, name, rules, Counter()) for name, rules in principles.items() for row in test]
            await llm.together(*work)

    asyncio.run(judge_test())
    found = []
    for name in names:
        judged = test if name in principles else sample
        whole = name.split(",")[0] + ", whole"
        right = {
            which: query_means([{"query_id": r["query_id"], "right": r[which] == r["label"]} for r in judged
                                if None not in (r[name], r[whole])], "right") for which in (name, whole)
        }  # fmt: skip
        figures = agreement([r["label"] for r in judged], [r[name] for r in judged])
        found.append({"ablation": name} | figures | {"difference": paired(right[name], right[whole])})
    return found


# ---- people ---------------------------------------------------------------------------------------------------------


class Rating(Record):
    """A line that annotate.html saves: the grades of one greeting, or which of two is better; None is half-finished."""

    id: str = Field(min_length=1)
    run: str
    rater: str = Field(min_length=1)
    grades: dict[str, Literal[1, 2, 3] | None] | None = None
    one: str = ""
    other: str = ""
    better: Literal["one", "other", "tie"] | None = None

    @property
    def finished(self) -> bool:
        return self.better is not None if self.one else all((self.grades or {}).get(name) for name in llm.WEIGHTS)


def fingerprint(rows: list[dict]) -> str:
    """Tells the greetings of one run from another's."""
    return digest(*sorted((r["id"], r["response"]) for r in rows))


def rating_page(args: argparse.Namespace, rows: list[dict], queries: list[str]) -> dict:
    """What annotate.html shows: greetings without the names of their policies, in random order, and pairs of them."""
    rng, asked = random.Random(digest(args.seed, "annotate")), queries[: args.annotate]
    both = pairs_of_policies(rows, asked)
    pairs = [rng.choice([pair for pair in both if pair[0]["query_id"] == q] or [None]) for q in asked]
    single = [r for r in rows if r["sample"] == 0 and r["query_id"] in asked]
    shown = [rng.sample(pair, 2) for pair in pairs if pair and pair[0]["response"] != pair[1]["response"]]
    rng.shuffle(single)
    return {
        "run": fingerprint(rows),
        "greetings": [{key: r[key] for key in ("id", "query", "response")} for r in single],
        "pairs": [
            {"id": digest(a["id"], b["id"]), "query": a["query"], "one": a["id"], "other": b["id"],
             "texts": [a["response"], b["response"]]}
            for a, b in shown
        ],
    }  # fmt: skip


def read_ratings(args: argparse.Namespace, rows: list[dict]) -> list[Rating]:
    """What people saved, half-finished or not; where a rater saved twice, what was saved last counts."""
    known, run, last = {r["id"] for r in rows}, fingerprint(rows), {}
    for file in args.annotations:
        for number, rating in enumerate(read(file, Rating, "annotate.html", unique=False), 1):
            if rating.run != run or not {rating.one or rating.id, rating.other or rating.id} <= known:
                page = args.run / "annotate.html"
                fail(f"{file}:{number}: rated on the page of another run; rate {page}, or name that run with --run")
            last[rating.rater, rating.id] = rating
    return list(last.values())


def alpha(ratings: list[tuple[str, str, float]], level: str) -> float | None:
    """Krippendorff's alpha of (rater, item, value); None where fewer than two rate an item, or all values are one."""
    import krippendorff
    import numpy as np

    raters, items = sorted({r for r, _, _ in ratings}), sorted({i for _, i, _ in ratings})
    table = np.full((len(raters), len(items)), np.nan)
    for rater, item, value in ratings:
        table[raters.index(rater), items.index(item)] = value
    shared = table[:, (~np.isnan(table)).sum(axis=0) > 1] if len(raters) > 1 else table[:, :0]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return round(float(krippendorff.alpha(reliability_data=table, level_of_measurement=level)), 4)


def join_people(
    ratings: list[Rating], rows: list[dict], comparisons: list[dict], given: list[dict], names: list[str]
) -> dict:
    """Add `human` (mean of the raters' weighted means) and `human_excellent` to the rows that people rated.

    Returns agreement among the raters, and of every evaluator with them, on the greetings that they rated.
    """
    half, ratings = sum(not r.finished for r in ratings), [r for r in ratings if r.finished]
    grades, pairs = [r for r in ratings if not r.one], [r for r in ratings if r.one]
    by_id, policy = {r["id"]: r for r in rows}, {r["id"]: r["policy"] for r in rows}
    means: dict[str, list[float]] = {}
    for r in grades:
        means.setdefault(r.id, []).append(llm.weighted_mean(r.grades))
    for key, values in means.items():
        by_id[key]["human"] = sum(values) / len(values)
        by_id[key]["human_excellent"] = int(by_id[key]["human"] >= EXCELLENT)
    rated = [by_id[key] | {"label": by_id[key]["human_excellent"]} for key in means]
    said = verdicts_on(rated, [r for r in given if r["part"] != "test"]) if rated else {}
    wins = [
        {"a": policy[r.one], "b": policy[r.other], "one": r.one, "other": r.other, "query_id": by_id[r.one]["query_id"],
         "longer_by": len(by_id[r.one]["response"]) - len(by_id[r.other]["response"]), "same": None,
         "outcome": {"one": 1.0, "other": 0.0, "tie": 0.5}[r.better]}
        for r in pairs
    ]  # fmt: skip
    judged = {(c["one"], c["other"]): c["outcome"] for c in comparisons}
    judged |= {(other, one): 1 - outcome for (one, other), outcome in judged.items() if outcome is not None}
    both = [(w["outcome"], judged.get((w["one"], w["other"]))) for w in wins]
    both = [pair for pair in both if None not in pair]
    level = {"one": 1, "other": -1, "tie": 0}
    return {
        "raters": len({r.rater for r in ratings}), "ratings": len(grades), "pairs": len(pairs), "half_finished": half,
        "alpha": {name: alpha([(r.rater, r.id, r.grades[name]) for r in grades], "ordinal") for name in llm.WEIGHTS}
        | {"excellent": alpha([(r.rater, r.id, llm.weighted_mean(r.grades) >= EXCELLENT) for r in grades], "nominal"),
           "pairs": alpha([(r.rater, r.id, level[r.better]) for r in pairs], "ordinal")},
        "evaluators": {name: agreement([r["label"] for r in rated], verdicts) for name, verdicts in said.items()},
        "pairs_agree": rate(sum(a == b for a, b in both), len(both)),
        "wins": wins_of(wins, names)["judged"] if wins else {},
    }  # fmt: skip


# ---- the report -----------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What the report is made from, as it lies in the run folder."""

    rows: list[dict]  # greetings
    given: list[dict]  # labelled greetings
    comparisons: list[dict]
    graded: list[dict]  # rollouts

    FILES = ("scores.jsonl", "labelled_scores.jsonl", "comparisons.jsonl", "curve.jsonl")


def figures_of(args: argparse.Namespace, policies: list[Policy], scored: Scored, ratings: list[Rating]) -> dict:
    """Every figure of the report."""
    rows, given, comparisons, graded = scored
    names = [p.name for p in policies if any(r["policy"] == p.name for r in rows)]
    of = {name: [r for r in rows if r["policy"] == name] for name in names}
    people = join_people(ratings, rows, comparisons, given, names) if ratings else None
    learnt = runs_of_12([d["completion"][0]["content"] for d in read_lines(args.run / "sft.jsonl")])
    stock = json.loads((ROOT / "data/lexicon.json").read_text(encoding="utf-8"))["stock_phrases"].split()
    characters = min(sum(len(r["response"]) for r in some) for some in of.values())
    found = {p.name: policy_figures(of[p.name], p, characters, learnt, stock) for p in policies if p.name in of}
    for name, equal in excellence_at_equal_length(rows, names).items():
        found[name]["excellence_at_equal_length"] = equal
    if people:
        for name in names:
            found[name]["human_excellence"] = bootstrap(query_means(of[name], "human_excellent").values())
    own = [("sft", "base"), ("grpo_rm", "sft"), ("grpo_judge", "sft"), ("grpo_judge", "grpo_rm")]
    further = [(name, p) for name in names if name not in ("base", *OWN) for p in names if p in ("base", *OWN)]
    means = {(name, key): query_means(of[name], key) for name in names for key in [*SCORES, "quality"]}
    ranked = sorted((n for n in names if found[n]["excellence"]["n"]), key=lambda n: -found[n]["excellence"]["value"])
    figures = {
        "policies": found, "characters": characters, "ranked": ranked,
        "lead": paired(means[ranked[0], "excellent"], means[ranked[1], "excellent"]) if len(ranked) > 1 else None,
        "differences": [
            {"after": a, "before": b}
            | {key: paired(means[a, key], means[b, key]) for key in SCORES if means[a, key] and means[b, key]}
            for a, b in own + further if a in names and b in names
        ],
        "wins": wins_of([c for c in comparisons if "a" in c], names), "bands": length_bands(rows, names),
        **evaluate_evaluators(given, comparisons), "cost": cost_figures(args.run, rows, graded), "people": people,
        "ledger": llm.open_store(args).ledger(["policy", "rubric", "pairwise"]),
        "ablations": read_lines(args.run / "ablations.jsonl"),
    }  # fmt: skip
    said = templates().get_template("finding.md").render(figures=figures)
    return figures | {"finding": " ".join(said.split()).replace(" ;", ";").replace(" .", ".")}


def results(figures: dict) -> list[dict]:
    """The lines of results.jsonl: each row of each table, by its name in 05_summary.json."""
    rows = []
    for table, content in figures.items():
        named = content if isinstance(content, dict) else dict(enumerate(content)) if isinstance(content, list) else {}
        rows += [{"table": table, "row": name, "figures": found} for name, found in named.items()]
    return rows


def templates():
    """The Jinja environment of templates/."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "templates"), autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment


def write_report(args: argparse.Namespace, figures: dict, rows: list[dict], page: dict) -> None:
    """report.md, report.html made from it, and annotate.html."""
    import base64

    from markdown_it import MarkdownIt

    environment = templates()
    samples: dict[str, dict] = {}
    for row in rows:
        if row["sample"] == 0:
            samples.setdefault(row["query"], {})[row["policy"]] = [row["response"], row["quality"], row["excellent"]]

    def curve(reward: str) -> list[list]:
        rows = read_lines(args.run / f"metrics_{reward}.jsonl")  # an update without rollouts of its own has no reward
        return [[row["step"], row["reward"]] for row in rows if "reward" in row]

    drawn = {
        "The judge over the rounds of step 3": args.run / "principles.svg",
        "Training of the reward model": args.run / "rm/training.svg",
    }
    shown = {
        "figures": figures, "offline": args.offline, "run": args.run, "weights": llm.WEIGHTS, "excellent": EXCELLENT,
        "complete": COMPLETE, "near": NEAR, "units": UNITS, "routes": ROUTES,
        "rm": read_summary(args.run, "02_summary"),
        "principles": read_summary(args.run, "03_summary").get("principles", []),
        "judge_model": judge_name(args), "model": llm.endpoint_name(args)[0],
    }  # fmt: skip
    report = environment.get_template("report.md").render(shown)
    replace_file(args.run / "report.md", report)
    html = MarkdownIt("commonmark", {"html": False}).enable("table")
    sections = {part.partition("\n")[0]: html.render(part.partition("\n")[2]) for part in report.split("\n## ")[1:]}
    shown |= {
        "sections": sections,
        "images": {name: base64.b64encode(p.read_bytes()).decode() for name, p in drawn.items() if p.is_file()},
        "data": {
            "policies": figures["policies"], "wins": figures["wins"], "cost": figures["cost"]["curve"], "units": UNITS,
            "dimensions": list(llm.WEIGHTS), "training": {reward: curve(reward) for reward in ("rm", "judge")},
            "lengths": [[r["policy"], len(r["response"]), r["quality"]] for r in rows if r["quality"] is not None],
            "excellent": EXCELLENT, "samples": samples,
        },
    }  # fmt: skip
    replace_file(args.run / "report.html", environment.get_template("report.html").render(shown))
    rating = environment.get_template("annotate.html").render(page=page, dimensions=list(llm.WEIGHTS))
    replace_file(args.run / "annotate.html", rating)


def judge_name(args: argparse.Namespace) -> str:
    """The model of rubric and comparisons."""
    return args.eval_model or (args.model if args.eval_base_url else llm.endpoint_name(args)[0])


# ---- in order -------------------------------------------------------------------------------------------------------


async def open_clients(
    args: argparse.Namespace, policies: list[Policy], stack: AsyncExitStack
) -> dict[str, llm.Client]:
    """Clients of the agents, of the judge for evaluation and of every policy behind an endpoint, with one ledger."""
    wanted = {"": args}
    if args.eval_model or args.eval_base_url:
        wanted["judge"] = endpoint_args(args, args.eval_model or args.model, args.eval_base_url or args.base_url)
    wanted |= {f"policy {p.name}": endpoint_args(args, *p.api) for p in policies if p.api}
    clients = {
        name: await stack.enter_async_context(llm.Client(settings, args.run)) for name, settings in wanted.items()
    }
    for client in clients.values():
        client.store = clients[""].store
    return {name.removeprefix("policy "): client for name, client in clients.items()}


async def answer(args: argparse.Namespace, policies: list[Policy]) -> None:
    """--ask: every policy's answers, side by side."""
    said: dict[tuple, str] = {}
    writer = models.Writer(args)
    async with AsyncExitStack() as stack:
        clients = await open_clients(args, policies, stack)
        for policy in policies:
            asked = [(n, query) for query in args.ask for n in range(args.samples)]
            keep = lambda n, text, name=policy.name, asked=asked: said.update({(name, *asked[n]): text})  # noqa: E731
            await greet(args, policy, clients.get(policy.name, writer), asked, keep, failures := Counter())
            for reason in failures:
                print(f"05: {reason}", file=sys.stderr)
    width = max(len(p.name) for p in policies)
    for query in args.ask:
        print(f"\n{query}")
        for policy in policies:
            for n in range(args.samples):
                print(f"  {policy.name if n == 0 else '':{width}}  {said.get((policy.name, n, query), '-')}")


async def score(
    args: argparse.Namespace, policies: list[Policy], queries: list[Query], order: list[str], given: list[dict]
) -> Counter:
    """Write greetings, and what every evaluator says of them, of the labelled greetings and of rollouts."""
    from tqdm import tqdm

    failures, sets, test = Counter(), {}, [r for r in given if r["part"] == "test"]
    if (args.run / "principles.jsonl").is_file():
        seed = read(args.run / "principles.jsonl", llm.Version)[0].principles
        sets = {"judge": llm.current_principles(args.run / "principles.jsonl"), "seed_judge": seed}
    async with AsyncExitStack() as stack:
        clients = await open_clients(args, policies, stack)
        await asyncio.gather(*(client.connect() for client in clients.values()))  # nobody there shows before the work
        rows, graded = await write_greetings(args, policies, queries, clients, failures), rollouts(args.run, args.seed)
        agents, judge = clients[""], clients.get("judge", clients[""])
        compared = pairs_of_policies(rows, order[: args.pairwise])
        labelled = labelled_pairs(test) if args.pairwise else []
        work = [grade(judge, row, failures) for row in rows + test + graded]
        for name, rules in sets.items():
            asked = rows + test if name == "judge" else test
            work += [verdict(agents, row, name, rules, failures) for row in asked]
        with tqdm(total=len(work) + len(compared) + len(labelled), desc="rubric, judge, comparisons") as bar:

            async def counted(one):
                found = await one
                bar.update()
                return found

            await llm.together(*map(counted, work))
            found = await llm.together(*(counted(compare(judge, *pair, failures)) for pair in compared + labelled))
        names = [{"a": a["policy"], "b": b["policy"], "query": a["query"]} for a, b in compared] + [{}] * len(labelled)
    ask_agents(args, rows + test, "agents", args.run / "evaluators")
    failures["agents: no verdict"] += sum(r["agents"] is None for r in rows + test)
    if (args.run / "rm" / "adapter_config.json").is_file():
        ask_reward_model(args, policies[0].base, rows + given)
    comparisons = [c | name for c, name in zip(found, names, strict=True)]
    for file, records in zip(Scored.FILES, Scored(rows, given, comparisons, graded), strict=True):
        write(args.run / file, records)
    return +failures


def main(args: argparse.Namespace) -> int:
    started = time.time()
    base, queries = models.policy_path(args), read(args.queries, Query)
    open_run(args.run)
    policies = present_policies(args, base)
    if args.ask:
        models.quiet()
        asyncio.run(answer(args, policies))
        return 0
    for file in args.annotations:  # before the work
        read(file, Rating, "annotate.html", unique=False)
    given = labelled_rows(args)
    common = {"labelled": file_hash(args.labelled), "seed": args.seed, "endpoint": llm.endpoint_name(args),
              "votes": args.votes}  # fmt: skip
    stage = Stage(
        args.run, "05_scores", ["generations.jsonl", *Scored.FILES],
        common | {
            "queries": file_hash(args.queries), "samples": args.samples, "temperature": args.temperature,
            "greetings": {p.name: digest(made_with(args, p)) for p in policies},
            "pairwise": args.pairwise, "judge": [args.eval_model, args.eval_base_url],
            "principles": file_hash(args.run / "principles.jsonl"), "prompts": llm.prompt_hashes(ROLES, args.prompts),
            "rm": file_hash(args.run / "rm/adapter_model.safetensors"),
        },
        args.redo,
    )  # fmt: skip
    order = [q.id for q in random.Random(digest(args.seed, "compared")).sample(queries, len(queries))]
    failures: Counter = Counter()
    if not stage.done:
        models.quiet()
        failures = asyncio.run(score(args, policies, queries, order, given))
        if not failures:
            stage.finish()
    if args.ablations:
        settings = common | {"rows": args.ablations, "prompts": file_hash(args.prompts)}
        ablations = Stage(args.run, "05_ablations", ["ablations.jsonl"], settings, args.redo)
        if not ablations.done:
            write(args.run / "ablations.jsonl", ablate(args))
            ablations.finish()
    scored = Scored(*(read_lines(args.run / file) for file in Scored.FILES))
    ratings = read_ratings(args, scored.rows)
    inputs = [*Scored.FILES, "ablations.jsonl", *(f"{step}.json" for route in ROUTES.values() for step in route)]
    page = Stage(
        args.run, "05_report", ["results.jsonl", "report.html", "report.md", "annotate.html", "05_summary.json"],
        {"annotations": [file_hash(path) for path in args.annotations], "annotate": args.annotate,
         "templates": file_hash(ROOT / "templates"), "code": file_hash(__file__)}
        | {name: file_hash(args.run / name) for name in inputs},
        redo=True,  # nothing is lost: what these are made from is kept
    )  # fmt: skip
    done = stage.done and page.done
    if not done:
        figures = figures_of(args, policies, scored, ratings) | {"failures": failures}
        write(args.run / "results.jsonl", results(figures))
        write_report(args, figures, scored.rows, rating_page(args, scored.rows, order))
        write_summary(args.run, "05_summary", started, vars(args), figures)
        page.finish()
    print((args.run / "report.md").read_text(encoding="utf-8").split("## ")[1].partition("\n")[2].strip())
    print(
        f"05: {'done already, see' if done else 'report in'} {args.run / 'report.html'}; people rate in annotate.html"
    )
    if failures:
        print(f"05: {failures.total()} answers failed, {dict(failures)}; run again to ask them again")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
