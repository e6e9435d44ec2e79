"""What a model at an endpoint is worth as the judge, and how fast: labelled greetings, under the first principles.

    bash tools/with_judge.sh MODEL python bench/endpoint.py --model MODEL --run outputs/endpoint
    python bench/endpoint.py --base-url URL --model MODEL --graded --run outputs/endpoint_graded --rows 40

prints answers a second, the tokens of one, what was not usable and why, how often it says 1, its agreement with the
labels beside that of character n-grams, and with --graded how P(verdict = 1), read from the logprobs, stands to the
verdict and to the labels. The rows are drawn by a hash; the run folder keeps the answers, so take a new one to time.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import records, run_folder, stats
from common.answers import Unusable, Verdict
from common.client import Client, gather_or_unusable
from common.endpoint import add_endpoint_flags
from common.judge import judge_greeting
from common.prompts import read_rules


def print_agreement(name: str, labels: list[int], verdicts: list[int | None], queries: list[str]) -> None:
    f = stats.agreement(labels, verdicts, queries)
    said = f["says_good"]
    if not f["n"]:
        return
    print(
        f"{name:10} says 1 of {said['value']:.0%} [{said['lo']:.0%}, {said['hi']:.0%}], kappa {f['kappa']:+.2f}"
        f" [{f['kappa_lo']:+.2f}, {f['kappa_hi']:+.2f}], n {f['n']}; of {len(labels)} rows {sum(labels)} are good"
    )


def print_grades(answered: list[tuple[int, Verdict]]) -> None:
    """How the grade stands to the verdict that was written, and to the labels; AUC: a good greeting has the higher."""
    from sklearn.metrics import roc_auc_score

    labels = [label for label, _ in answered]
    grades = [verdict.grade for _, verdict in answered]
    same = sum((verdict.grade >= 0.5) == verdict.verdict for _, verdict in answered)
    auc = f"{roc_auc_score(labels, grades):.2f}" if len(set(labels)) == 2 else "-"
    between = sum(0.01 < grade < 0.99 for grade in grades)
    print(f"grades: {same} of {len(grades)} say what the verdict says, AUC {auc}, {between} between 0.01 and 0.99")


async def main(args: argparse.Namespace) -> None:
    labelled = records.read(args.labelled, records.Labelled)
    drawn = sorted(labelled, key=lambda row: run_folder.digest(args.seed, row.query, row.response))
    rows, others = drawn[: args.rows], drawn[args.rows :]
    if len({row.label for row in others}) < 2:
        run_folder.fail(f"--rows {args.rows} of {len(labelled)} leaves none to fit the null baselines on")
    principles = read_rules(args.prompts / "principles.md")
    started = time.perf_counter()
    async with Client(args, "endpoint") as client:
        questions = [judge_greeting(client, row.query, row.response, principles) for row in rows]
        answers = await gather_or_unusable(*questions)
        seconds, ledger = time.perf_counter() - started, client.store.ledger()
    usable = [not isinstance(answer, Unusable) for answer in answers]
    each = [ledger[f"{side}_tokens"] / max(1, ledger["calls"]) for side in ("input", "output")]
    print(f"{client.model}: {len(rows) / seconds:.2f} greetings a second, {args.concurrency} at once, {seconds:.0f} s")
    print(f"{sum(usable)} of {len(rows)} usable; attempts {ledger['outcomes']}")
    print(f"tokens of an answer: {each[0]:.0f} in, {each[1]:.0f} out")

    labels, queries = [row.label for row in rows], [row.query for row in rows]
    verdicts = [answer.verdict if good else None for answer, good in zip(answers, usable, strict=True)]
    print_agreement("the model", labels, verdicts, queries)
    texts = [row.response for row in rows]
    nulls = stats.null_verdicts([row.response for row in others], [row.label for row in others], texts)
    for name, guesses in nulls.items():
        print_agreement(name, labels, guesses, queries)
    if args.graded and any(usable):
        print_grades([(label, answer) for label, answer, good in zip(labels, answers, usable, strict=True) if good])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=Path, default=ROOT / "data/labelled.jsonl")
    parser.add_argument("--rows", type=run_folder.positive, default=80, help="labelled greetings (%(default)s)")
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    parsed = run_folder.parse(parser, {})
    run_folder.open_run(parsed.run)
    asyncio.run(main(parsed))
