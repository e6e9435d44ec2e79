"""What each part of the two judges is worth: the five agents, and step 3's principles, run again without each part.

On a sample of the labelled greetings. The agents judge all of it. The principles are made from its two learning parts,
by 03_refine_judge.py in a folder of its own, and judge its test part.

Reads   labelled greetings, references, prompts/
Writes  RUN/ablations.jsonl, which the report of 05_evaluate.py shows; RUN/ablations/, where step 3 runs
Paper   arXiv 2508.21476 tabulates the agreement with labels, whole and without each part. Here each difference from
        the whole is paired by query and has an interval.
Example python tools/ablations.py --offline --run outputs/mine
"""

import argparse
import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import records, run_folder, stats
from common.client import Client, gather_all
from common.debate import Retrieval, add_agents_verdict
from common.endpoint import add_endpoint_flags, endpoint_name
from common.failures import what_next
from common.judge import add_verdict, current_principles
from common.run_folder import ROOT, Stage
from common.store import Store, open_store

AGENTS = {"": "agents, whole"} | {part: f"agents, without {part}" for part in ("retrieval", "debate", "reflect")}
PRINCIPLES = {"": "principles, whole"}
PRINCIPLES |= {part: f"principles, without {part}" for part in ("adversary", "reflection", "acceptance")}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("ablations").add_argument
    add("--rows", type=run_folder.positive, default=300, help="labelled greetings to judge (%(default)s)")
    add("--labelled", type=Path, default=ROOT / "data/labelled.jsonl", help="{query, response, label 0|1}")
    add("--references", type=Path, default=ROOT / "data/references.jsonl", help="{query, response}")
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    return run_folder.parse(parser, offline={})


def sample(args: argparse.Namespace) -> list[records.Labelled]:
    """At least --rows labelled greetings: all that there are for random queries, so that contrast pairs stay whole."""
    rows = records.read(args.labelled, records.Labelled)
    by_query: dict[str, list[records.Labelled]] = {}
    for row in rows:
        by_query.setdefault(row.query, []).append(row)
    drawn: set[str] = set()
    count = 0
    for query in sorted(by_query, key=lambda query: run_folder.digest(args.seed, "ablations", query)):
        if count < args.rows:
            drawn.add(query)
            count += len(by_query[query])
    return [row for row in rows if row.query in drawn]


# ---- the five agents ------------------------------------------------------------------------------------------------


async def add_agents_verdicts(args: argparse.Namespace, rows: list[dict], failures: Counter) -> None:
    """Add to each row the verdict of the agents, whole and without each part, in a column named after the ablation."""
    retrieval = Retrieval(records.read(args.references, records.Reference))
    retrieval.look_up(sorted(set(stats.column(rows, "query"))))
    async with Client(args, "ablations") as client:
        for part, name in AGENTS.items():
            print(f"ablations: {name}", file=sys.stderr)
            await gather_all(*(add_agents_verdict(client, retrieval, row, failures, name, part) for row in rows))


# ---- principles -----------------------------------------------------------------------------------------------------


def refine(args: argparse.Namespace, folder: Path, part: str) -> list[str]:
    """The principles that step 3 comes to without this part, at the same endpoint, with what is left to spend."""
    command = [sys.executable, str(ROOT / "03_refine_judge.py"), "--run", str(folder), "--redo"]
    command += ["--labelled", str(folder.parent / "labelled.jsonl"), "--references", str(args.references)]
    command += ["--seed", str(args.seed), *endpoint_flags(args, folder)]
    if part:
        command.append(f"--no-{part}")
    if args.offline:
        command.append("--offline")
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        run_folder.fail(f"03_refine_judge.py did not finish, see above; it was: {' '.join(command)}")
    return current_principles(folder / "principles.jsonl")


def endpoint_flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """Every flag about the endpoint as it was given here, but for the budget."""
    flags = []
    for name in args.flag_groups["agents' endpoint"] + args.flag_groups["pace and cost"]:
        value = left_to_spend(args, folder) if name == "budget" else getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags += [flag, str(value)]
    return flags


def left_to_spend(args: argparse.Namespace, folder: Path) -> float | None:
    """--budget less what the run and its other folders have cost; `folder` counts for itself what it has cost."""
    if args.budget is None:
        return None
    tokens = [0, 0]
    for path in args.run.rglob("answers.sqlite"):
        if path.parent != folder:
            spent = Store(path).tokens
            tokens = [tokens[0] + spent[0], tokens[1] + spent[1]]
    priced = args.price_in or args.price_out
    return max(0.0, args.budget - (open_store(args, "ablations").money(*tokens) if priced else sum(tokens)))


async def add_principles_verdicts(
    args: argparse.Namespace, principles: dict[str, list[str]], rows: list[dict], failures: Counter
) -> None:
    """Add to each row a verdict under each of the principles, in a column named after the ablation."""
    async with Client(args, "ablations") as client:
        work = []
        for name, rules in principles.items():
            work += [add_verdict(client, row, name, rules, failures) for row in rows]
        await gather_all(*work)


# ---- figures --------------------------------------------------------------------------------------------------------


def ablation_rows(names: list[str], rows: list[dict]) -> list[dict]:
    """For each ablation its agreement with the labels, and the difference from the whole, which is the first name."""
    labels, queries = stats.column(rows, "label"), stats.column(rows, "query")
    results = []
    for name in names:
        both = [row for row in rows if row[name] is not None and row[names[0]] is not None]
        right = []
        for column in (name, names[0]):
            hits = [{"query_id": row["query"], "right": row[column] == row["label"]} for row in both]
            right.append(stats.query_means(hits, "right"))
        figures = stats.agreement(labels, stats.column(rows, name), queries)
        results.append({"ablation": name, **figures, "difference": stats.paired_difference(*right)})
    return results


def main(args: argparse.Namespace) -> int:
    labelled = sample(args)
    run_folder.open_run(args.run)
    made_with = run_folder.settings(args, "ablations")
    made_with |= {"endpoint": endpoint_name(args), "prompts": run_folder.file_hash(args.prompts)}
    stage = Stage(args.run, "ablations", ["ablations.jsonl"], made_with, args.redo)
    if stage.done:
        print(f"ablations: done already, see {args.run / 'ablations.jsonl'}")
        return 0
    folder = args.run / "ablations"
    records.write(folder / "labelled.jsonl", labelled)  # step 3 splits this file as `test_ids` splits it below
    rows = [row.model_dump() for row in labelled]
    test_ids = {row.id for row in records.split_labelled(labelled, args.seed)["test"]}
    test = [row for row in rows if row["id"] in test_ids]

    failures: Counter = Counter()
    asyncio.run(add_agents_verdicts(args, rows, failures))
    principles = {}
    for part, name in PRINCIPLES.items():
        print(f"ablations: {name}", file=sys.stderr)
        principles[name] = refine(args, folder / f"principles_{part or 'whole'}", part)
    asyncio.run(add_principles_verdicts(args, principles, test, failures))

    results = ablation_rows(list(AGENTS.values()), rows) + ablation_rows(list(PRINCIPLES.values()), test)
    records.write(args.run / "ablations.jsonl", results)
    for row in results:
        accuracy = row["accuracy"]["value"] or 0
        print(f"{row['ablation']:32} kappa {row['kappa']:+.2f}  accuracy {accuracy:.1%}  n {row['n']}")
    print(f"ablations: in {args.run / 'ablations.jsonl'}; run 05_evaluate.py again to see them in its report")
    if failures:
        code, advice = what_next(failures)
        print(f"ablations: {failures.total()} answers failed, {dict(failures)}; {advice}")
        return code
    stage.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
