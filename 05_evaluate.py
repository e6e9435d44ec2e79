"""Step 5: every policy writes for the same held-out queries; score the greetings, and say how far to trust the scores.

Greetings of base, SFT, both GRPO policies, further policies and models behind an endpoint are graded on five
dimensions by the rubric (excellent: weighted mean of at least 2), compared two by two in both orders, and judged by
the refined judge of step 3, the five agents of step 1, the reward model of step 2 and, with --likelihood, a language
model that tells how likely they are. Every evaluator is itself evaluated on labelled greetings, on machine-written ones
that a reader rated, and on people's ratings where there are any, next to two baselines that understand nothing: text
length and character n-grams; and a search looks for spoilt greetings with which evaluators can be bought.

Reads   held-out queries, labelled greetings, readings, references, the policies, rm/ and principles.jsonl of the run,
        summaries of 01 to 04; ablations.jsonl where tools/ablations.py has made it
Writes  generations/NAME.jsonl for each policy, generations.jsonl, scores.jsonl, labelled_scores.jsonl,
        readings_scores.jsonl, comparisons.jsonl, curve.jsonl, likelihood.jsonl; bought.jsonl, bought.json;
        report.html, report.md, annotate.html (a page on which people rate), 05_summary.json
Paper   arXiv 2508.21476: language 30, creativity 30, emotion 15, culture 15, richness 10; each 1-3. Departures:
        nothing written for another occasion or person is excellent (prompts/rubric.md);
        intervals by bootstrap over queries; scores at equal length, diversity, null baselines, cost with each score.
Example python 05_evaluate.py --offline --run outputs/mine

A row is a dict, one line of a JSONL file. Evaluators add columns to it: `grades`, `quality` and `excellent` (rubric),
`judge`, `seed_judge`, `agents` and `likely` (verdicts 1 or 0), `reward_model` and `likelihood` (scores). None: no
usable answer came.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from tqdm import tqdm

from common import records, run_folder, stats
from common.answers import Preferred, Unusable
from common.client import Client, gather_all
from common.debate import ROLES, Retrieval, add_agents_verdict
from common.endpoint import address, endpoint_name, variable
from common.engine import Writer
from common.failures import what_next
from common.greetings import Policy, client_at, greeting_settings, greetings_of, parse_greeting_args, present_policies
from common.judge import Version, add_grades, add_verdict, current_principles
from common.likelihood import WORTH, add_likelihoods
from common.policy import load_tokenizer, policy_path, silence_libraries
from common.prompts import prompt_hashes
from common.report import bought
from common.report.cost import ROUTES, rollouts
from common.report.evaluators import comparison, labelled_pairs, labelled_rows
from common.report.figures import Scored, report_figures
from common.report.pages import TEMPLATES, finding, write_pages
from common.report.people import Rating, pairs_of_policies, rating_page, read_ratings
from common.report.readings import Reading
from common.reward_model import RewardModel
from common.run_folder import ROOT, Stage

PAGES = ["report.html", "report.md", "annotate.html", "05_summary.json"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data").add_argument
    data("--queries", type=Path, default=ROOT / "data/queries_heldout.jsonl", help="held-out queries")
    data("--labelled", type=Path, default=ROOT / "data/labelled.jsonl", help="{query, response, label 0|1}")
    yardstick = "machine-written greetings, read blind; without a FILE none"
    data("--readings", type=Path, nargs="?", default=ROOT / "data/readings.jsonl", metavar="FILE", help=yardstick)
    data("--references", type=Path, default=ROOT / "data/references.jsonl", help="examples for the five agents")
    scores = parser.add_argument_group("scores").add_argument
    scores("--pairwise", type=int, default=200, help="queries on which policies are compared in pairs (%(default)s)")
    scores("--eval-model", help="model of rubric and comparisons, for evaluation alone (--model)")
    scores("--eval-base-url", type=address, help="its endpoint (--base-url)")
    adversary = parser.add_argument_group("search").add_argument
    costs = "offline 120, else 0: up to 128 questions for each"
    adversary("--search", type=int, metavar="N", help=f"good greetings to buy evaluators with ({costs})")
    key = parser.add_argument_group("key of the evaluation's endpoint").add_argument  # no setting of any stage
    key("--eval-api-key-env", type=variable, help="variable that holds it (--api-key-env, at the same address)")
    people = parser.add_argument_group("people").add_argument
    people("--annotate", type=run_folder.positive, default=30, help="queries on the rating page (%(default)s)")
    people("--annotations", type=Path, nargs="*", default=[], help="what people saved from annotate.html")
    args = parse_greeting_args(parser)
    if args.search is None:
        args.search = 120 if args.offline and not (args.eval_model or args.eval_base_url) else 0
    return args


# ---- evaluators -----------------------------------------------------------------------------------------------------


async def open_clients(
    args: argparse.Namespace, policies: list[Policy], stack: AsyncExitStack
) -> tuple[Client, Client, dict[str, Client]]:
    """Clients of the agents, of rubric and comparisons, of policies behind endpoints: connected, with one budget."""
    agents = rubric = Client(args, "05")
    if args.eval_model or args.eval_base_url or args.eval_api_key_env:
        model, url = args.eval_model or args.model, args.eval_base_url or args.base_url
        rubric = client_at(args, "05", model, url, args.eval_api_key_env, r"--eval-\1")
    writers: dict[str, Client] = {}
    for policy in policies:
        if policy.api:
            writers[policy.name] = client_at(args, "05", *policy.api)
    clients = dict.fromkeys([agents, rubric, *writers.values()])  # each once
    for client in clients:
        client.store = agents.store
        await stack.enter_async_context(client)
    await asyncio.gather(*(client.connect() for client in clients))
    return agents, rubric, writers


async def add_outcome(client: Client, row: dict, one: dict, other: dict, failures: Counter) -> None:
    """Add to a comparison its `outcome`, the share of the win that `one` has: 1, 0.5 or 0; None where no answer came.

    Both orders are shown, because judges favour a place. A verdict that flips with the order is a tie; `same` says
    whether it held, None for two rows with one text, which nobody is asked about.
    """
    texts = one["response"], other["response"]
    if texts[0] == texts[1]:
        row["outcome"] = 0.5
        return
    try:
        first = await client.ask("pairwise", Preferred, query=one["query"], A=texts[0], B=texts[1])
        swapped = await client.ask("pairwise", Preferred, query=one["query"], A=texts[1], B=texts[0])
    except Unusable as e:
        failures[f"pairwise: {e}"] += 1
        return
    shares = {"A": 1.0, "B": 0.0, "tie": 0.5}
    row["same"] = shares[first.better] == 1 - shares[swapped.better]
    row["outcome"] = shares[first.better] if row["same"] else 0.5


# ---- the stages -----------------------------------------------------------------------------------------------------


async def score(
    args: argparse.Namespace,
    policies: list[Policy],
    queries: list[records.Query],
    references: list[records.Reference],
    compared: list[str],
    labelled: list[dict],
    readings: list[dict],
) -> Counter:
    """Write the greetings, and what every evaluator says of them, of labelled ones, of readings and of rollouts.

    `compared` are the ids of the queries on which each two policies are compared. Returns the failures by reason.
    """
    failures: Counter = Counter()
    test = stats.where(labelled, "part", "test")  # which step 3 has not looked at
    async with AsyncExitStack() as stack:
        # Connect before writing: an hour of greetings that nobody can score would be a waste.
        agents, rubric, writers = await open_clients(args, policies, stack)
        greetings, writer = [], Writer(args)
        for policy in policies:
            greetings += await greetings_of(args, policy, queries, writers.get(policy.name, writer), failures)
        writer.close()  # the reward model needs the memory
        records.write(args.run / "generations.jsonl", greetings)

        # What is to be scored: greetings; labelled rows and readings (how good is the evaluator?); rollouts (what did
        # GRPO cost?).
        curve, judged = rollouts(args.run, args.seed), greetings + test + readings
        retrieval = Retrieval(references)
        retrieval.look_up(sorted(set(stats.column(judged, "query"))))
        pairs = pairs_of_policies(greetings, compared)
        if args.pairwise:
            pairs += labelled_pairs(test)
        comparisons = [comparison(one, other) for one, other in pairs]

        # Every evaluator adds its columns to these rows. They are all asked at once: the endpoint sets the pace.
        work = [add_grades(rubric, row, failures) for row in judged + curve]
        path = args.run / "principles.jsonl"
        if path.is_file():
            # The judge that step 3 began with judges no greetings of policies: it shows what refining was worth.
            refined, seed = current_principles(path), records.read(path, Version)[0].principles
            work += [add_verdict(agents, row, "judge", refined, failures) for row in judged]
            work += [add_verdict(agents, row, "seed_judge", seed, failures) for row in test + readings]
        for row, (one, other) in zip(comparisons, pairs, strict=True):
            work.append(add_outcome(rubric, row, one, other, failures))
        work += [add_agents_verdict(agents, retrieval, row, failures) for row in judged]
        with tqdm(total=len(work), desc="evaluators") as bar:
            tasks = [asyncio.ensure_future(one) for one in work]
            for task in tasks:
                task.add_done_callback(lambda _: bar.update())
            await gather_all(*tasks)

    # The reward model runs here, after the clients are closed. It scores all parts of the labelled rows, because its
    # threshold for "good" is fitted on those that are not in `test`.
    if (args.run / "rm" / "calibration.json").is_file():  # written when it is trained
        rows = greetings + labelled + readings
        texts = [(row["query"], row["response"]) for row in rows]
        scores = RewardModel(args.run / "rm", policies[0].base, args.prompts).score(texts)
        for row, row_score in zip(rows, scores, strict=True):
            row["reward_model"] = row_score
    if args.likelihood:
        kept = args.run / "likelihood.jsonl"
        add_likelihoods(args.likelihood, args.prompts, greetings + test + readings, kept)
    for file, rows in zip(Scored.FILES, Scored(greetings, labelled, comparisons, curve, readings), strict=True):
        records.write(args.run / file, rows)
    return failures


def search(args: argparse.Namespace, base: str, labelled: list[dict]) -> Counter:
    """Look for what every evaluator but the five agents can be bought with; returns the failures by reason."""
    failures: Counter = Counter()
    sources = bought.good_greetings(labelled, args.search, args.seed)
    path = args.run / "principles.jsonl"
    principles = current_principles(path) if path.is_file() else []

    async def ask_judges() -> dict[str, bought.Found]:
        async with AsyncExitStack() as stack:
            agents, rubric, _ = await open_clients(args, [], stack)
            return await bought.search_judges(agents, rubric, principles, sources, failures)

    found = asyncio.run(ask_judges())
    found |= bought.search_the_others(args, base, labelled, sources)  # after the clients are closed, as in `score`
    bought.keep(args, sources, found)
    return failures


def evaluators(args: argparse.Namespace, prompts: list[str]) -> dict:
    """What the evaluators depend on, in the settings of both stages that ask them."""
    settings = {"labelled": run_folder.file_hash(args.labelled), "endpoint": endpoint_name(args)}
    settings |= {"prompts": prompt_hashes(prompts, args.prompts)}
    settings["principles"] = run_folder.file_hash(args.run / "principles.jsonl")
    settings["rm"] = run_folder.file_hash(args.run / "rm/adapter_model.safetensors")
    if args.likelihood:
        settings |= {"likelihood": args.likelihood, "worth": WORTH}
    return settings | run_folder.settings(args, "models")


def scores_stage(args: argparse.Namespace, policies: list[Policy]) -> Stage:
    made_with = evaluators(args, ["rubric", "pairwise", "detector", *ROLES])
    made_with |= run_folder.settings(args, "greetings", "scores")
    for name in ("queries", "references", "readings"):
        made_with[name] = run_folder.file_hash(getattr(args, name) or "")
    made_with["greetings"] = {policy.name: run_folder.digest(greeting_settings(args, policy)) for policy in policies}
    return Stage(args.run, "05_scores", ["generations.jsonl", *Scored.FILES], made_with, args.redo)


def search_stage(args: argparse.Namespace) -> Stage:
    made_with = evaluators(args, ["rubric", "detector"]) | run_folder.settings(args, "search")
    made_with["families"] = [run_folder.file_hash(ROOT / "data" / name) for name in ("spoilt.json", "lexicon.json")]
    made_with["judge"] = args.eval_model, args.eval_base_url
    return Stage(args.run, "05_search", bought.FILES, made_with, args.redo)


def pages_stage(args: argparse.Namespace) -> Stage:
    """The pages are made again whenever something they show has changed: what they are made from is kept."""
    made_with = run_folder.settings(args, "people", "search")
    made_with["templates"] = run_folder.file_hash(TEMPLATES)
    code = [Path(__file__), *sorted((ROOT / "common").rglob("*.py"))]
    made_with["code"] = [run_folder.file_hash(path) for path in code]
    shown = [*Scored.FILES, "ablations.jsonl", bought.FILES[1]]
    for steps in ROUTES.values():
        shown += [f"{step}.json" for step in steps]
    made_with |= {name: run_folder.file_hash(args.run / name) for name in shown}
    return Stage(args.run, "05_report", PAGES, made_with, redo=True)


def main(args: argparse.Namespace) -> int:
    started = time.time()
    base, queries = policy_path(args), records.read(args.queries, records.Query)
    if args.likelihood:
        load_tokenizer(args.likelihood)  # what is wrong with it shows in a second
    references = records.read(args.references, records.Reference)
    run_folder.open_run(args.run)
    policies = present_policies(args, base)
    for file in args.annotations:  # a file that cannot be read shows before the work
        records.read(file, Rating, "annotate.html", unique=False)
    labelled = labelled_rows(args)
    readings = []
    if args.readings:
        readings = [reading.model_dump() for reading in records.read(args.readings, Reading, unique=False)]
    # The same random queries for comparisons and for the rating page, so that people and rubric see the same pairs.
    # They are drawn by a hash: a query that is added moves no other.
    drawn = sorted(queries, key=lambda query: run_folder.digest(args.seed, "compared", query.query))
    order = [query.id for query in drawn]

    failures: Counter = Counter()
    scores = scores_stage(args, policies)
    if not scores.done:
        silence_libraries()
        failures = asyncio.run(score(args, policies, queries, references, order[: args.pairwise], labelled, readings))
        if not failures:
            scores.finish()

    searched = search_stage(args) if args.search else None
    if searched and not searched.done:
        silence_libraries()
        missed = search(args, base, labelled)
        failures += missed
        if not missed:
            searched.finish()

    pages = pages_stage(args)
    done = scores.done and pages.done
    if not done:
        scored = Scored(*(records.read_lines(args.run / file) for file in Scored.FILES))
        figures = report_figures(args, policies, scored, read_ratings(args, scored.greetings))
        figures["bought"] = run_folder.read_summary(args.run, "bought") if args.search else {}
        figures |= {"finding": finding(figures), "failures": failures}
        write_pages(args, figures, scored.greetings, rating_page(args, scored.greetings, order))
        run_folder.write_summary(args, "05_summary", started, figures)
        pages.finish()

    report = (args.run / "report.md").read_text(encoding="utf-8")
    policies_section = report.split("## ")[1]
    print(policies_section.partition("\n")[2].strip())
    where = args.run / "report.html"
    print(f"05: {'done already, see' if done else 'report in'} {where}; people rate in annotate.html")
    code, advice = what_next(failures)
    if failures:
        print(f"05: {failures.total()} answers failed, {dict(failures)}; {advice}")
    return code


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
