"""Step 1: sample greetings, let five agents judge them, and keep what the verdicts teach.

For each query the policy writes several candidates. Retrieval finds references for the query; Positive and Negative
debate the candidate, in parallel; Judge weighs both into a strict verdict, 1 only if the greeting is good throughout;
Reflect audits the verdict and overturns it on clear grounds. Accepted and rejected candidates of one query become
(chosen, rejected) pairs, the best accepted one a row for SFT. fates.jsonl says of every candidate what became of it.

Reads   queries, references, further candidates (--candidates, any JSONL of {query, response})
Writes  candidates.jsonl, judgements.jsonl, fates.jsonl, preferences.jsonl, sft.jsonl, 01_summary.json
Paper   arXiv 2508.21476, the multi-agent refined reward. Departures: pairs are chosen so that over the file the longer
        text wins as often as it loses (in the released pairs it wins 96% of the time); a judgement that fails is
        recorded as failed and never counts as a verdict.
Example python 01_curate_preferences.py --offline --run outputs/mine
        python 01_curate_preferences.py --shard 1/3 --run outputs/part1    # and --merge, for more than one machine
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.client import Client, together
from common.debate import ROLES, Retrieval, judge_one
from common.endpoint import add_endpoint_flags, endpoint_name
from common.engine import Writer, add_engine_flag, choose_engine
from common.policy import add_policy_flags, policy_path, quiet
from common.prompts import conversation, prompt_hashes
from common.records import (
    Appender,
    Candidate,
    Demonstration,
    Judgement,
    Preference,
    Query,
    Reference,
    read,
    stream,
    write,
)
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
from common.stats import agreement, rate
from common.store import Store
from common.texts import grams, similarity

# What --offline sets. The tiny model's greetings are short, too seldom good at temperature 1 to learn from, and all
# recited: it has seen nothing but the references.
OFFLINE = {
    "bits": 16, "samples": 7, "temperature": [0.7], "max_tokens": 48, "batch_size_generate": 256, "max_copied": 1.0,
    "engine": "hf", "uses": 4,
}  # fmt: skip
OPENING = 0.06  # of the SFT rows may begin with the same two characters; in the released data 38% begin with 亲爱


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="{query} (data/queries.jsonl)")
    add("--references", type=Path, default=ROOT / "data/references.jsonl", help="{query, response, popularity?}")
    add("--candidates", type=Path, nargs="*", default=[], help="files of {query, response} to judge too")
    add("--shard", type=shard, help="I/N: only the queries of the I-th of N parts, in a run folder of its own")
    add("--merge", type=Path, nargs="+", help="run folders of all N parts: what one run would have written, in --run; "
        "every other flag as it was for the parts")  # fmt: skip
    add("--policies", nargs="*", default=[], help="further policies to sample: models, or adapter folders of step 4")
    add("--samples", type=int, default=4, help="candidates a query, policy and temperature (%(default)s)")
    add("--temperature", type=float, nargs="+", default=[1.0], help="of the policies; one or several (1.0)")
    add("--max-tokens", type=int, default=512, help="of a candidate (%(default)s)")
    add("--max-similar", type=float, default=0.9, help="share of character pairs in common with an earlier candidate "
        "of the query, above which one is dropped (%(default)s)")  # fmt: skip
    add("--max-copied", type=float, default=0.8, help="share of a candidate found in one reference, above which it is "
        "dropped (%(default)s)")  # fmt: skip
    add("--embedding-model", help="retrieve by this sentence-embedding model, not by character TF-IDF")
    add("--examples", type=positive, default=3, help="references shown to the agents (%(default)s)")
    add("--uses", type=positive, default=2, help="pairs that one candidate may be in (%(default)s)")
    add("--no-retrieval", action="store_true", help="ablation: no references shown")
    add("--no-debate", action="store_true", help="ablation: the Judge hears no debate")
    add("--no-reflect", action="store_true", help="ablation: the Judge's verdict stands")
    add_policy_flags(parser)
    add_engine_flag(parser)
    add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    choose_engine(args)
    if not args.samples and not args.candidates:
        fail("--samples 0 leaves nothing to judge; name files with --candidates")
    if args.shard and args.merge:
        fail("--shard makes one part, --merge puts all of them together: leave one of the two out")
    return args


def shard(text: str) -> tuple[int, int]:
    """argparse type: "2/3" is (2, 3)."""
    part, _, parts = text.partition("/")
    if positive(part) > positive(parts):
        raise argparse.ArgumentTypeError(f"{text}: there are only {parts} parts")
    return int(part), int(parts)


# ---- candidates -----------------------------------------------------------------------------------------------------


def candidate_settings(args: argparse.Namespace) -> dict:
    policies = [policy_path(args), *args.policies] if args.samples else []
    return {
        "seed": args.seed, "queries": file_hash(args.queries), "policies": policies, "bits": args.bits,
        "samples": args.samples, "temperature": args.temperature, "max_tokens": args.max_tokens,
        "batch": args.batch_size_generate, "engine": args.engine,
        "prompts": prompt_hashes(["policy"], args.prompts), "files": [file_hash(p) for p in args.candidates],
    }  # fmt: skip


def in_shard(args: argparse.Namespace, query: str) -> bool:
    """Whether a query, with all its candidates, belongs to the part that --shard names."""
    return not args.shard or int(digest(query), 16) % args.shard[1] == args.shard[0] - 1


def sample_candidates(args: argparse.Namespace, queries: list[Query]) -> bool:
    """Write candidates.jsonl: the files given, and --samples greetings a query, policy and temperature.

    Goes on where it was. Returns whether all of it was there already.
    """
    settings, part = candidate_settings(args), {"shard": args.shard} if args.shard else {}
    stage = Stage(args.run, "01_candidates", ["candidates.jsonl"], settings | part, args.redo)
    if stage.done:
        return True
    queries = [query for query in queries if in_shard(args, query.query)]
    Client.probe(args, args.run)  # greetings that nobody can judge are not worth the sampling
    with Appender(args.run / "candidates.jsonl") as append:
        for file in args.candidates:
            for given in stream(file, Candidate, unique=False):
                known = getattr(given, "given_label", getattr(given, "label", None))
                label = {} if known is None else {"given_label": known}
                kept = given.model_dump(include=set(Candidate.model_fields) - {"query_id"})
                if given.id not in append.done and in_shard(args, given.query):
                    append(Candidate.model_validate(kept | label | {"source": given.source or file.name}))
        for policy in settings["policies"]:
            sample_from(args, policy, queries, append)
    stage.finish()
    return False


def sample_from(args: argparse.Namespace, policy: str, queries: list[Query], append: Appender) -> None:
    """Append --samples greetings of one policy for each query and temperature, but those that are there."""
    slots = {
        digest(query.id, args.seed, policy, temperature, n): (temperature, query)
        for temperature in args.temperature for query in queries for n in range(args.samples)
    }  # fmt: skip
    slots = [(key, *slot) for key, slot in slots.items() if key not in append.done]
    if not slots:
        return
    quiet()
    adapter = Path(policy, "adapter_config.json")
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else policy
    write_greetings = Writer(args)
    done, chunk = 0, 4 * args.batch_size_generate  # written as it is done: a killed run loses one chunk
    for temperature, same in itertools.groupby(slots, key=lambda slot: slot[1]):
        while part := list(itertools.islice(same, chunk)):
            done += len(part)
            texts = write_greetings(
                base, adapter.parent if adapter.is_file() else None,
                [conversation(query.query, args.prompts) for _, _, query in part],
                temperature=temperature, seed=int(part[0][0][:8], 16), progress=f"candidates {done}/{len(slots)}",
            )  # fmt: skip
            for (key, _, query), text in zip(part, texts, strict=True):
                append(Candidate(
                    id=key, query_id=query.id, query=query.query, response=text or "（空）",
                    source=Path(policy).name, temperature=temperature,
                ))  # fmt: skip


def screen(args: argparse.Namespace, references: list[Reference]) -> Iterator[tuple[Candidate, str]]:
    """Every candidate, and why it is not worth a judgement: a duplicate, a near-duplicate, a copy; "" where it is."""
    where: dict[str, list[int]] = {}  # run of 6 characters -> references that hold it
    for number, reference in enumerate(references if args.max_copied < 1 else []):
        for run in grams(reference.response, 6):
            where.setdefault(run, []).append(number)
    seen: dict[str, list[str]] = {}
    for candidate in stream(args.run / "candidates.jsonl", Candidate):
        text, earlier = candidate.response, seen.setdefault(candidate.query, [])
        runs = grams(text, 6) if where else set()
        copied = Counter(number for run in runs for number in where.get(run, ()))
        reason = ""
        if text in earlier:
            reason = "duplicate"
        elif args.max_similar < 1 and any(similarity(text, other) > args.max_similar for other in earlier):
            reason = "near-duplicate"
        elif copied and max(copied.values()) > args.max_copied * len(runs):
            reason = "copies a reference"
        else:
            earlier.append(text)
        yield candidate, reason


# ---- the five agents ------------------------------------------------------------------------------------------------


def judgement_settings(args: argparse.Namespace) -> dict:
    roles = ROLES[2 * args.no_debate : 4 - args.no_reflect]
    return {
        "references": file_hash(args.references), "endpoint": endpoint_name(args), "examples": args.examples,
        "embedding": args.embedding_model, "seed": args.seed, "votes": args.votes, "max_similar": args.max_similar,
        "max_copied": args.max_copied, "no_retrieval": args.no_retrieval, "no_debate": args.no_debate,
        "no_reflect": args.no_reflect, "prompts": prompt_hashes(roles, args.prompts),
    }  # fmt: skip


def judge_candidates(args: argparse.Namespace, references: list[Reference]) -> tuple[float, dict[str, str]] | None:
    """Write judgements.jsonl, one line a candidate as its verdict comes; goes on where it was.

    Returns the seconds that the agents took, and why some candidates were not judged; None where all of it was there
    already.
    """
    from tqdm import tqdm

    settings = judgement_settings(args)
    candidates = {"candidates": file_hash(args.run / "candidates.jsonl")}
    stage = Stage(args.run, "01_judgements", ["judgements.jsonl"], settings | candidates, args.redo)
    if stage.done:
        return None
    path, failed = args.run / "judgements.jsonl", 0
    with Appender(path):  # mends what a kill left
        pass
    if path.stat().st_size and any(record.error for record in stream(path, Judgement)):  # asked again
        write(path, (record for record in stream(path, Judgement) if not record.error))
    with Appender(path) as append:
        screened, asked = {}, Counter()
        for candidate, reason in screen(args, references):
            if reason:
                screened[candidate.id] = reason
            elif candidate.id not in append.done:
                asked[candidate.query] += 1
        retrieve = None if args.no_retrieval else Retrieval(args, references, list(asked))
        judging = time.time()

        async def judge_all() -> None:
            everything = stream(args.run / "candidates.jsonl", Candidate)
            queue = (c for c in everything if c.id not in screened and c.id not in append.done)

            async def worker() -> None:
                for candidate in queue:  # the workers share one iterator: nobody waits for the slowest
                    examples = retrieve(candidate.query, candidate.response) if retrieve else []
                    record = await judge_one(args, client, settings["prompts"], examples, candidate)
                    append(record)
                    nonlocal failed
                    failed += record.error is not None
                    bar.update()

            async with Client(args, args.run) as client:
                await together(*(worker() for _ in range(4 * args.concurrency)))

        with tqdm(total=asked.total(), desc="judgements", unit="greeting") as bar:
            asyncio.run(judge_all())
    if not failed:
        stage.finish()
    return time.time() - judging, screened


def merge(args: argparse.Namespace) -> bool:
    """Write candidates.jsonl and judgements.jsonl from those of all shards; returns whether they were there already.

    Refused is what one run could not have written: a part that is missing, unfinished or there twice, parts made with
    other settings, prompts or models than this call names, and a candidate that is in two of them.
    """
    wanted, parts = [candidate_settings(args), judgement_settings(args)], []
    for folder in args.merge:
        files = [folder / "stages" / f"01_{name}.json" for name in ("candidates", "judgements", "pairs")]
        if not all(file.is_file() for file in files):
            fail(f"{folder} holds no finished shard; make it with: --shard I/N --run {folder}")
        stages = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        *made, pairs = (stage["settings"] for stage in stages)
        if not stages[2]["done"] or pairs["judgements"] != file_hash(folder / "judgements.jsonl"):
            fail(f"{folder} is not finished; run it again, to its end, before --merge")
        parts.append(tuple(made[0].pop("shard", (1, 1))))
        del made[1]["candidates"]
        for ours, theirs in zip(json.loads(json.dumps(wanted, default=str)), made, strict=True):
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    fail(f"{folder} was made with {key}={theirs.get(key)}, this call has {key}={ours.get(key)}: the "
                         "parts and --merge need the same flags and files")  # fmt: skip
    count = parts[0][1]
    if sorted(parts) != [(n + 1, count) for n in range(count)]:
        given = ", ".join(f"{part}/{of}" for part, of in parts)
        fail(f"--merge needs each of the parts 1/{count} to {count}/{count} once; these are {given}")

    outputs = {"candidates.jsonl": Candidate, "judgements.jsonl": Judgement}
    made_of = [file_hash(folder / name) for folder in args.merge for name in outputs]
    stage = Stage(args.run, "01_merged", list(outputs), {"parts": made_of}, args.redo)
    if stage.done:
        return True
    for name, kind in outputs.items():
        first: dict[str, Path] = {}
        with Appender(args.run / name) as append:
            for folder in args.merge:
                for record in stream(folder / name, kind):
                    if record.id in first:
                        fail(f"{folder / name} and {first[record.id] / name} both hold {record.id}; make one again")
                    first[record.id] = folder
                    if record.id not in append.done:
                        append(record)
    stage.finish()
    return False


# ---- rejection sampling: pairs and demonstrations -------------------------------------------------------------------


class Judged(NamedTuple):
    """What pairing needs of a judgement: ten thousands of them are in memory at once."""

    id: str
    query_id: str
    query: str
    response: str
    label: int
    strengths: int  # points for it minus points against it
    why: str


Pair = tuple[Judged, Judged]  # accepted, rejected


def choose_pairs(args: argparse.Namespace, judged: list[Judged]) -> tuple[list[Pair], set[str], list[int]]:
    """Pairs of an accepted and a rejected candidate of one query, so that length decides nothing over the whole file.

    Pairs of nearest length come first; a candidate is in at most --uses of them; and where the lengths differ, the
    longer text wins as often as it loses. Also returns the ids of those that were left out although they could be in
    a pair, and by how many characters the accepted text is longer in each pair that was possible.
    """
    groups: dict[str, list[Judged]] = {}
    for record in judged:
        groups.setdefault(record.query, []).append(record)
    possible = [
        (good, bad)
        for group in groups.values()
        for good in group if good.label == 1
        for bad in group if bad.label == 0
    ]  # fmt: skip
    possible.sort(key=lambda p: (length_gap(p), p[0].id, p[1].id))
    uses = Counter()

    def unused(pairs: Iterable[Pair]) -> Iterator[Pair]:
        for pair in pairs:
            if all(uses[one.id] < args.uses for one in pair):
                uses.update(one.id for one in pair)
                yield pair

    gaps = [len(good.response) - len(bad.response) for good, bad in possible]
    equal, longer, shorter = (
        unused([pair for pair, gap in zip(possible, gaps, strict=True) if keep(gap)])
        for keep in (lambda gap: gap == 0, lambda gap: gap > 0, lambda gap: gap < 0)
    )
    kept, unequal = list(equal), []
    for side in itertools.cycle((longer, shorter)):
        pair = next(side, None)
        if pair is None:
            break
        unequal.append(pair)
    if len(unequal) % 2:
        unequal.pop()
    kept += unequal
    used = {one.id for pair in kept for one in pair}
    return kept, {one.id for pair in possible for one in pair} - used, gaps


def length_gap(pair: Pair) -> float:
    """Difference of two lengths as a share of the longer one."""
    lengths = sorted(len(one.response) for one in pair)
    return (lengths[1] - lengths[0]) / lengths[1]


def choose_demonstrations(judged: list[Judged]) -> list[Judged]:
    """The best accepted greeting of each query whose opening is not used up yet."""
    groups: dict[str, list[Judged]] = {}
    for record in judged:
        if record.label == 1:
            groups.setdefault(record.query_id, []).append(record)
    openings, chosen = Counter(), []
    for _, group in sorted(groups.items()):  # whatever the order in which the verdicts came
        for record in sorted(group, key=lambda r: (-r.strengths, r.id)):
            if openings[record.response[:2]] < max(1, int(OPENING * len(groups))):
                openings[record.response[:2]] += 1
                chosen.append(record)
                break
    return chosen


def as_preference(args: argparse.Namespace, pair: Pair) -> Preference:
    good, bad = pair
    return Preference(
        prompt=conversation(good.query, args.prompts), query=good.query, query_id=good.query_id, why=bad.why,
        chosen=[{"role": "assistant", "content": good.response}], chosen_id=good.id,
        rejected=[{"role": "assistant", "content": bad.response}], rejected_id=bad.id,
    )  # fmt: skip


def as_demonstration(args: argparse.Namespace, good: Judged) -> Demonstration:
    return Demonstration(
        prompt=conversation(good.query, args.prompts), query=good.query, query_id=good.query_id,
        completion=[{"role": "assistant", "content": good.response}], candidate_id=good.id,
    )  # fmt: skip


def ledger(args: argparse.Namespace) -> dict:
    """What the agents have cost in this run folder, or in those of all parts."""
    folders, prices = args.merge or [args.run], (args.price_in, args.price_out)
    parts = [Store(folder / "answers.sqlite", prices).ledger(ROLES) for folder in folders]
    outcomes = sum((Counter(part.pop("outcomes")) for part in parts), Counter())
    return {name: sum(part[name] for part in parts) for name in parts[0]} | {"outcomes": outcomes}


def main(args: argparse.Namespace) -> int:
    started = time.time()
    queries = read(args.queries, Query) if args.samples else []
    references = read(args.references, Reference)
    open_run(args.run)
    done, sampled = merge(args) if args.merge else sample_candidates(args, queries), time.time()
    judged_now = None if args.merge else judge_candidates(args, references)
    stage = Stage(
        args.run, "01_pairs", ["preferences.jsonl", "sft.jsonl", "fates.jsonl", "01_summary.json"],
        {"judgements": file_hash(args.run / "judgements.jsonl"), "uses": args.uses,
         "prompts": prompt_hashes(["policy"], args.prompts)},
        redo=True,  # nothing is lost: what these are made from is kept
    )  # fmt: skip
    if done and judged_now is None and stage.done:
        print(f"01: done already, see {args.run / '01_summary.json'}")
        return 0

    judging, fates = judged_now or (0.0, {c.id: reason for c, reason in screen(args, references) if reason})
    judged, failures, audits, votes, given = [], Counter(), [], [], []
    for r in stream(args.run / "judgements.jsonl", Judgement):
        if r.label is None:
            failures[r.error] += 1
            fates[r.id] = f"failed: {r.error}"
            continue
        why, strengths = (r.reflect or r.judge)["reason"], len(r.positive) - len(r.negative)
        judged.append(Judged(r.id, r.query_id, r.query, r.response, r.label, strengths, why))
        audits += zip(r.judge_votes, r.votes, strict=True) if r.reflect else []
        votes.append(max(sum(r.votes), len(r.votes) - sum(r.votes)))
        given += [(r.given_label, r.label)] if hasattr(r, "given_label") else []
    (pairs, left_out, gaps), rows = choose_pairs(args, judged), choose_demonstrations(judged)
    write(args.run / "preferences.jsonl", (as_preference(args, pair) for pair in pairs))
    write(args.run / "sft.jsonl", (as_demonstration(args, row) for row in rows))

    paired, shown = {one.id for pair in pairs for one in pair}, {row.id for row in rows}
    for r in judged:
        roles = ["pair"] * (r.id in paired) + ["sft"] * (r.id in shown)
        alone = "left out for the balance of lengths or --uses" if r.id in left_out else "no opposite for its query"
        fates[r.id] = ", ".join(roles) or f"{'accepted' if r.label else 'rejected'}: {alone}"
    write(args.run / "fates.jsonl", ({"id": i, "fate": fate} for i, fate in fates.items()))
    unequal = [len(good.response) > len(bad.response) for good, bad in pairs if length_gap((good, bad))]
    figures = {
        "candidates": len(fates), "judged": len(judged) + failures.total(), "pairs": len(pairs), "sft": len(rows),
        "accepted": rate(sum(r.label for r in judged), len(judged)),
        "overturned": rate(sum(before != after for before, after in audits), len(audits)),
        "judge_reflect_kappa": agreement(*zip(*audits, strict=True))["kappa"] if audits else None,
        "votes_agree": rate(sum(votes), args.votes * len(votes)) if args.votes > 1 else None,
        "longer_wins": rate(sum(unequal), len(unequal)),
        "longer_wins_in_all_possible_pairs": rate(sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps)),
        "within_20_percent": rate(sum(length_gap(pair) <= 0.2 for pair in pairs), len(pairs)),
        "failures": failures, "fates": Counter(fates.values()), "ledger": ledger(args),
        "seconds_by_phase": {"sample": round(sampled - started, 2), "judge": round(judging, 2)},
    }  # fmt: skip
    if given:
        figures["agreement_with_given_labels"] = agreement(*zip(*given, strict=True))
    write_summary(args.run, "01_summary", started, vars(args), figures)
    stage.finish()
    accepted = figures["accepted"]["value"] or 0
    longer = f"the longer text wins {figures['longer_wins']['value']:.0%}" if unequal else "all of equal length"
    print(f"01: {figures['judged']} greetings judged, {accepted:.0%} accepted; {len(pairs)} pairs, {longer}; "
          f"{len(rows)} SFT rows in {args.run}")  # fmt: skip
    if failures:
        again = "run their parts again, and --merge with --redo," if args.merge else "run again"
        print(f"01: {failures.total()} judgements failed, {dict(failures)}; {again} to ask them again")
        return 3
    if not pairs:
        print("01: no query has both an accepted and a rejected candidate: no pairs; raise --samples or --temperature")
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
