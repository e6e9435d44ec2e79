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
import random
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from common.answers import Preferred, Unusable
from common.client import Client, together
from common.endpoint import add_endpoint_flags, address, endpoint_name
from common.engine import Writer, add_engine_flag, choose_engine
from common.greetings import Greeting, Policy, endpoint_args, greet, made_with, present_policies
from common.judge import Version, current_principles, grade, verdict
from common.policy import add_policy_flags, policy_path, quiet
from common.prompts import prompt_hashes
from common.records import Appender, Candidate, Judgement, Labelled, Query, read, read_lines, split_labelled, write
from common.report.cost import ROUTES, rollouts
from common.report.evaluators import labelled_pairs, labelled_rows
from common.report.figures import Scored, figures_of, results
from common.report.pages import write_report
from common.report.people import Rating, pairs_of_policies, rating_page, read_ratings
from common.rewards import RewardModel
from common.run_folder import (
    ROOT,
    Stage,
    add_run_flags,
    digest,
    fail,
    file_hash,
    launch,
    open_run,
    parse,
    positive,
    write_summary,
)
from common.stats import agreement, paired, query_means
from common.store import Store, open_store

OFFLINE = {"bits": 16, "max_tokens": 48, "batch_size_generate": 260, "engine": "hf"}
ROLES = ["policy", "rubric", "pairwise", "detector", "positive", "negative", "judge", "reflect"]
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
    add("--eval-base-url", type=address, help="its endpoint (--base-url)")
    add("--annotate", type=positive, default=30, help="queries on the page on which people rate (%(default)s)")
    add("--annotations", type=Path, nargs="*", default=[], help="what people saved from annotate.html")
    add("--ablations", type=positive, nargs="?", const=300, help="run 01 and 03 again without their parts, on so many "
        "labelled greetings (%(const)s)")  # fmt: skip
    add("--ask", nargs="+", metavar="QUERY", help="print every policy's answer, and nothing else")
    add_policy_flags(parser)
    add_engine_flag(parser)
    add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    choose_engine(args)
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
    return name, (model, address(url))


# ---- greetings ------------------------------------------------------------------------------------------------------


async def write_greetings(
    args: argparse.Namespace, policies: list[Policy], queries: list[Query], clients: dict, failures: Counter
) -> list[dict]:
    """Greetings of every policy for every query, in generations/NAME.jsonl; goes on where it was."""
    rows, writer = [], Writer(args)
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


async def compare(judge: Client, one: dict, other: dict, failures: Counter) -> dict:
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
            said.append({"A": 1.0, "B": 0.0, "tie": 0.5}[(await judge.ask("pairwise", Preferred, **asked)).better])
        except Unusable as e:
            failures[f"pairwise: {e}"] += 1
            return found | {"outcome": None, "same": None}
    same = said[0] == 1 - said[1]
    return found | {"outcome": said[0] if same else 0.5, "same": same}


def step_command(args: argparse.Namespace, script: str, folder: Path, *flags: object) -> list[str]:
    """The command that runs another step in a folder of its own, at the same endpoint, with what is left to spend."""
    command = [sys.executable, str(ROOT / script), "--run", str(folder), "--redo", *map(str, flags)]
    for name in ("prompts", "seed", "base_url", "model", "api_key_env", "concurrency", "timeout", "attempts", "votes",
                 "price_in", "price_out"):  # fmt: skip
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.budget is not None:  # less what the run and its other folders have cost
        stores = [Store(path).tokens for path in args.run.rglob("answers.sqlite") if path.parent != folder]
        spent = [sum(tokens) for tokens in zip(*stores, strict=True)] or [0, 0]
        priced = args.price_in or args.price_out
        left = args.budget - (open_store(args).money(*spent) if priced else sum(spent))
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
    rm = RewardModel(args.run / "rm", base, args.bits, args.prompts)
    for row, score in zip(rows, rm.score([(r["query"], r["response"]) for r in rows]), strict=True):
        row["reward_model"] = score


# ---- labelled greetings ---------------------------------------------------------------------------------------------


# ---- figures --------------------------------------------------------------------------------------------------------


# ---- cost -----------------------------------------------------------------------------------------------------------


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
                principles[name] = current_principles(made / "principles.jsonl")

    async def judge_test() -> None:
        async with Client(args, args.run) as client:
            work = [verdict(client, row, name, rules, Counter()) for name, rules in principles.items() for row in test]
            await together(*work)

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


# ---- the report -----------------------------------------------------------------------------------------------------


# ---- in order -------------------------------------------------------------------------------------------------------


async def open_clients(args: argparse.Namespace, policies: list[Policy], stack: AsyncExitStack) -> dict[str, Client]:
    """Clients of the agents, of the judge for evaluation and of every policy behind an endpoint, with one ledger."""
    wanted = {"": args}
    if args.eval_model or args.eval_base_url:
        wanted["judge"] = endpoint_args(args, args.eval_model or args.model, args.eval_base_url or args.base_url)
    wanted |= {f"policy {p.name}": endpoint_args(args, *p.api) for p in policies if p.api}
    clients = {name: await stack.enter_async_context(Client(settings, args.run)) for name, settings in wanted.items()}
    for client in clients.values():
        client.store = clients[""].store
    return {name.removeprefix("policy "): client for name, client in clients.items()}


async def answer(args: argparse.Namespace, policies: list[Policy]) -> None:
    """--ask: every policy's answers, side by side."""
    said: dict[tuple, str] = {}
    writer = Writer(args)
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
        seed = read(args.run / "principles.jsonl", Version)[0].principles
        sets = {"judge": current_principles(args.run / "principles.jsonl"), "seed_judge": seed}
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

            await together(*map(counted, work))
            found = await together(*(counted(compare(judge, *pair, failures)) for pair in compared + labelled))
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
    base, queries = policy_path(args), read(args.queries, Query)
    open_run(args.run)
    policies = present_policies(args, base)
    if args.ask:
        quiet()
        asyncio.run(answer(args, policies))
        return 0
    for file in args.annotations:  # before the work
        read(file, Rating, "annotate.html", unique=False)
    given = labelled_rows(args)
    common = {"labelled": file_hash(args.labelled), "seed": args.seed, "endpoint": endpoint_name(args),
              "votes": args.votes}  # fmt: skip
    stage = Stage(
        args.run, "05_scores", ["generations.jsonl", *Scored.FILES],
        common | {
            "queries": file_hash(args.queries), "samples": args.samples, "temperature": args.temperature,
            "greetings": {p.name: digest(made_with(args, p)) for p in policies},
            "pairwise": args.pairwise, "judge": [args.eval_model, args.eval_base_url],
            "principles": file_hash(args.run / "principles.jsonl"), "prompts": prompt_hashes(ROLES, args.prompts),
            "rm": file_hash(args.run / "rm/adapter_model.safetensors"),
        },
        args.redo,
    )  # fmt: skip
    order = [q.id for q in random.Random(digest(args.seed, "compared")).sample(queries, len(queries))]
    failures: Counter = Counter()
    if not stage.done:
        quiet()
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
