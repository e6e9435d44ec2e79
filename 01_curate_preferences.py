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
"""

import argparse
import asyncio
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common import llm, models
from common.records import (
    ROOT,
    Appender,
    Candidate,
    Demonstration,
    Judgement,
    Preference,
    Query,
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
    replace_file,
    stream,
    write,
    write_summary,
)

# What --offline sets. The tiny model's greetings are short, too seldom good at temperature 1 to learn from, and all
# recited: it has seen nothing but the references.
OFFLINE = {
    "bits": 16, "samples": 7, "temperature": [0.7], "max_tokens": 48, "batch_size_generate": 256, "max_copied": 1.0,
}  # fmt: skip
ROLES = ["positive", "negative", "judge", "reflect"]
INDEX = ROOT / "outputs" / "index"  # embeddings of references, shared by every run
OPENING = 0.06  # of the SFT rows may begin with the same two characters; in the released data 38% begin with 亲爱


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="{query} (data/queries.jsonl)")
    add("--references", type=Path, default=ROOT / "data/references.jsonl", help="{query, response, popularity?}")
    add("--candidates", type=Path, nargs="*", default=[], help="files of {query, response} to judge too")
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
    models.add_policy_flags(parser)
    llm.add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    if not args.samples and not args.candidates:
        fail("--samples 0 leaves nothing to judge; name files with --candidates")
    return args


# ---- candidates -----------------------------------------------------------------------------------------------------


def sample_candidates(args: argparse.Namespace, queries: list[Query]) -> bool:
    """Write candidates.jsonl: the files given, and --samples greetings a query, policy and temperature.

    Goes on where it was. Returns whether all of it was there already.
    """
    policies = [models.policy_path(args), *args.policies] if args.samples else []
    stage = Stage(
        args.run, "01_candidates", ["candidates.jsonl"],
        {"seed": args.seed, "queries": file_hash(args.queries), "policies": policies, "bits": args.bits,
         "samples": args.samples, "temperature": args.temperature, "max_tokens": args.max_tokens,
         "batch": args.batch_size_generate,
         "prompts": llm.prompt_hashes(["policy"], args.prompts), "files": [file_hash(p) for p in args.candidates]},
        args.redo,
    )  # fmt: skip
    if stage.done:
        return True
    llm.Client.probe(args, args.run)  # greetings that nobody can judge are not worth the sampling
    with Appender(args.run / "candidates.jsonl") as append:
        for file in args.candidates:
            for given in stream(file, Candidate, unique=False):
                known = getattr(given, "given_label", getattr(given, "label", None))
                label = {} if known is None else {"given_label": known}
                kept = given.model_dump(include=set(Candidate.model_fields) - {"query_id"})
                if given.id not in append.done:
                    append(Candidate.model_validate(kept | label | {"source": given.source or file.name}))
        for policy in policies:
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
    models.quiet()
    adapter = Path(policy, "adapter_config.json")
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else policy
    model, tokenizer = models.load_policy(base, args.bits, Path(policy) if adapter.is_file() else None)
    done, chunk = 0, 4 * args.batch_size_generate  # written as it is done: a killed run loses one chunk
    for temperature, same in itertools.groupby(slots, key=lambda slot: slot[1]):
        while part := list(itertools.islice(same, chunk)):
            done += len(part)
            texts = models.generate(
                model, tokenizer, [models.conversation(query.query, args.prompts) for _, _, query in part],
                temperature=temperature, top_p=1.0, max_tokens=args.max_tokens, batch_size=args.batch_size_generate,
                seed=int(part[0][0][:8], 16), progress=f"candidates {done}/{len(slots)}",
            )  # fmt: skip
            for (key, _, query), text in zip(part, texts, strict=True):
                append(Candidate(
                    id=key, query_id=query.id, query=query.query, response=text or "（空）",
                    source=Path(policy).name, temperature=temperature,
                ))  # fmt: skip


def screen(args: argparse.Namespace, references: list[Reference]) -> dict[str, str]:
    """Candidate id -> why it is not worth a judgement: a duplicate, a near-duplicate, or a copy of a reference."""
    where: dict[str, list[int]] = {}  # run of 6 characters -> references that hold it
    for number, reference in enumerate(references if args.max_copied < 1 else []):
        for run in grams(reference.response, 6):
            where.setdefault(run, []).append(number)
    reasons, seen = {}, {}
    for candidate in stream(args.run / "candidates.jsonl", Candidate):
        text, earlier = candidate.response, seen.setdefault(candidate.query, [])
        runs = grams(text, 6)
        copied = Counter(number for run in runs for number in where.get(run, ()))
        if text in earlier:
            reasons[candidate.id] = "duplicate"
        elif args.max_similar < 1 and any(similarity(text, other) > args.max_similar for other in earlier):
            reasons[candidate.id] = "near-duplicate"
        elif copied and max(copied.values()) > args.max_copied * len(runs):
            reasons[candidate.id] = "copies a reference"
        else:
            earlier.append(text)
    return reasons


def grams(text: str, n: int) -> set[str]:
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the pairs of neighbouring characters."""
    a, b = grams(one, 2), grams(other, 2)
    return len(a & b) / max(1, len(a | b))


# ---- the five agents ------------------------------------------------------------------------------------------------


class Retrieval:
    """The agent that needs no answer from a model: references for queries most like the one asked.

    Likeness is the cosine of character TF-IDF vectors, or of a sentence-embedding model's. Where references have a
    popularity, its logarithm at most doubles the likeness of the near ones.
    """

    WIDER = 5  # nearest references looked at for each that is shown

    def __init__(self, args: argparse.Namespace, references: list[Reference], queries: list[str]):
        """Find the nearest references of every query; those found in earlier runs are kept in outputs/index/."""
        self.references, self.k = references, args.examples
        self.wider = min(len(references), self.WIDER * self.k + 20)
        known = digest(args.embedding_model, self.wider, [(r.id, r.query) for r in references])
        path = INDEX / f"{known}.json"
        self.nearest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if new := [query for query in queries if query not in self.nearest]:
            self.look_up(args.embedding_model, new, INDEX / f"{known}.npy")
            replace_file(path, json.dumps(self.nearest, ensure_ascii=False))

    def look_up(self, embedding_model: str | None, queries: list[str], vectors: Path, batch: int = 512) -> None:
        """Add the nearest references of many queries, a batch at once: a hundred times quicker than one by one."""
        import numpy as np

        asked = [r.query for r in self.references]
        if embedding_model:
            embed = models.Embedding(embedding_model)
            index = embed.kept(asked, vectors).T
        else:
            from sklearn.feature_extraction.text import TfidfVectorizer

            vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
            index, embed = vectorizer.fit_transform(asked).T, vectorizer.transform
        for start in range(0, len(queries), batch):
            part = queries[start : start + batch]
            likeness = embed(part) @ index
            likeness = likeness if isinstance(likeness, np.ndarray) else likeness.toarray()
            for query, row in zip(part, likeness, strict=True):
                top = np.argpartition(-row, self.wider - 1)[: self.wider]
                ranked = top[np.lexsort((top, -row[top]))].tolist()
                self.nearest[query] = [(i, round(float(row[i]), 4)) for i in ranked]

    def __call__(self, query: str, response: str) -> list[Reference]:
        """The references to show; never one for the very query or with the very text that is judged."""
        near = [(self.references[i], likeness) for i, likeness in self.nearest[query]]
        fair = [(r, like) for r, like in near if r.query != query and r.response != response]
        most = math.log1p(max((r.popularity or 0 for r, _ in fair), default=0)) or 1.0
        fair.sort(key=lambda pair: -pair[1] * (1 + math.log1p(pair[0].popularity or 0) / most))
        return [r for r, _ in fair[: self.k]]


async def judge_one(
    args: argparse.Namespace, client: llm.Client, prompts: dict, examples: list[Reference], candidate: Candidate
) -> Judgement:
    """The debate about one candidate; where an agent cannot be heard, `error` says why and there is no label."""
    record = Judgement(
        **candidate.model_dump(), examples=[r.id for r in examples], model=client.model, prompts=prompts
    )  # fmt: skip
    seen = {
        "query": candidate.query, "response": candidate.response,
        "examples": [{"query": r.query, "response": r.response} for r in examples],
    }  # fmt: skip
    answers = []
    try:
        if not args.no_debate:
            sides = (client.ask(role, llm.Points, **seen) for role in ("positive", "negative"))
            for heard in await llm.settled(*sides):  # one that fails lets the other end
                if isinstance(heard, llm.Unusable):
                    raise heard
                answers.append(heard)
            record.positive, record.negative = answers[0].points, answers[1].points
        debate = {"positive": record.positive, "negative": record.negative}
        for sample in range(args.votes):
            vote = {"sample": sample, "temperature": 0.7 if sample else 0.0}
            answers.append(verdict := await client.ask("judge", llm.Verdict, **seen, **debate, **vote))
            judge = verdict.model_dump()
            record.judge = record.judge or judge
            if not args.no_reflect:
                answers.append(
                    verdict := await client.ask("reflect", llm.Verdict, **seen, **debate, judge=judge, **vote)
                )
                record.reflect = record.reflect or verdict.model_dump()
            record.votes.append(verdict.verdict)
        record.label = int(2 * sum(record.votes) > args.votes)
    except llm.Unusable as e:
        record.error = str(e)
    record.input_tokens, record.output_tokens = (sum(a.tokens[i] for a in answers) for i in (0, 1))
    return record


def judge_candidates(args: argparse.Namespace, references: list[Reference], screened: dict[str, str]) -> float | None:
    """Write judgements.jsonl, one line a candidate as its verdict comes; goes on where it was.

    Returns the seconds that the agents took; None where all of it was there already.
    """
    from tqdm import tqdm

    roles = ROLES[2 * args.no_debate : 4 - args.no_reflect]
    prompts = llm.prompt_hashes(roles, args.prompts)
    stage = Stage(
        args.run, "01_judgements", ["judgements.jsonl"],
        {"candidates": file_hash(args.run / "candidates.jsonl"), "references": file_hash(args.references),
         "endpoint": llm.endpoint_name(args), "examples": args.examples, "embedding": args.embedding_model,
         "seed": args.seed, "votes": args.votes, "max_similar": args.max_similar, "max_copied": args.max_copied,
         "no_retrieval": args.no_retrieval, "no_debate": args.no_debate, "no_reflect": args.no_reflect,
         "prompts": prompts},
        args.redo,
    )  # fmt: skip
    if stage.done:
        return None
    path, failed = args.run / "judgements.jsonl", 0
    with Appender(path):  # mends what a kill left
        pass
    if path.stat().st_size and any(record.error for record in stream(path, Judgement)):  # asked again
        write(path, (record for record in stream(path, Judgement) if not record.error))
    with Appender(path) as append:

        def todo() -> Iterator[Candidate]:
            for candidate in stream(args.run / "candidates.jsonl", Candidate):
                if candidate.id not in screened and candidate.id not in append.done:
                    yield candidate

        asked = Counter(candidate.query for candidate in todo())
        retrieve = None if args.no_retrieval else Retrieval(args, references, list(asked))
        judging = time.time()

        async def judge_all() -> None:
            queue = todo()

            async def worker() -> None:
                for candidate in queue:  # the workers share one iterator: nobody waits for the slowest
                    examples = retrieve(candidate.query, candidate.response) if retrieve else []
                    record = await judge_one(args, client, prompts, examples, candidate)
                    append(record)
                    nonlocal failed
                    failed += record.error is not None
                    bar.update()

            async with llm.Client(args, args.run) as client:
                await llm.together(*(worker() for _ in range(4 * args.concurrency)))

        with tqdm(total=asked.total(), desc="judgements", unit="greeting") as bar:
            asyncio.run(judge_all())
    if not failed:
        stage.finish()
    return time.time() - judging


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
    for group in groups.values():
        for record in sorted(group, key=lambda r: -r.strengths):
            if openings[record.response[:2]] < max(1, int(OPENING * len(groups))):
                openings[record.response[:2]] += 1
                chosen.append(record)
                break
    return chosen


def as_preference(args: argparse.Namespace, pair: Pair) -> Preference:
    good, bad = pair
    return Preference(
        prompt=models.conversation(good.query, args.prompts), query=good.query, query_id=good.query_id, why=bad.why,
        chosen=[{"role": "assistant", "content": good.response}], chosen_id=good.id,
        rejected=[{"role": "assistant", "content": bad.response}], rejected_id=bad.id,
    )  # fmt: skip


def as_demonstration(args: argparse.Namespace, good: Judged) -> Demonstration:
    return Demonstration(
        prompt=models.conversation(good.query, args.prompts), query=good.query, query_id=good.query_id,
        completion=[{"role": "assistant", "content": good.response}], candidate_id=good.id,
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    started = time.time()
    queries = read(args.queries, Query) if args.samples else []
    references = read(args.references, Reference)
    open_run(args.run)
    done, sampled = sample_candidates(args, queries), time.time()
    screened = screen(args, references)
    judging = judge_candidates(args, references, screened)
    stage = Stage(
        args.run, "01_pairs", ["preferences.jsonl", "sft.jsonl", "fates.jsonl", "01_summary.json"],
        {"judgements": file_hash(args.run / "judgements.jsonl"), "uses": args.uses,
         "prompts": llm.prompt_hashes(["policy"], args.prompts)},
        redo=True,  # nothing is lost: what these are made from is kept
    )  # fmt: skip
    if done and judging is None and stage.done:
        print(f"01: done already, see {args.run / '01_summary.json'}")
        return 0

    judged, fates, failures, audits, votes, given = [], dict(screened), Counter(), [], [], []
    for r in stream(args.run / "judgements.jsonl", Judgement):
        if r.label is None:
            failures[r.error] += 1
            fates[r.id] = f"failed: {r.error}"
            continue
        why, strengths = (r.reflect or r.judge)["reason"], len(r.positive) - len(r.negative)
        judged.append(Judged(r.id, r.query_id, r.query, r.response, r.label, strengths, why))
        audits += [(r.judge["verdict"], r.reflect["verdict"])] if r.reflect else []
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
    ledger = llm.Store(args.run / "answers.sqlite", (args.price_in, args.price_out)).ledger(ROLES)
    figures = {
        "candidates": len(fates), "judged": len(judged) + failures.total(), "pairs": len(pairs), "sft": len(rows),
        "accepted": rate(sum(r.label for r in judged), len(judged)),
        "overturned": rate(sum(before != after for before, after in audits), len(audits)),
        "judge_reflect_kappa": agreement(*zip(*audits, strict=True))["kappa"] if audits else None,
        "votes_agree": rate(sum(votes), args.votes * len(votes)) if args.votes > 1 else None,
        "longer_wins": rate(sum(unequal), len(unequal)),
        "longer_wins_in_all_possible_pairs": rate(sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps)),
        "within_20_percent": rate(sum(length_gap(pair) <= 0.2 for pair in pairs), len(pairs)),
        "failures": failures, "fates": Counter(fates.values()), "ledger": ledger,
        "seconds_by_phase": {"sample": round(sampled - started, 2), "judge": round(judging or 0.0, 2)},
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
        print(f"01: {failures.total()} judgements failed, {dict(failures)}; run again to ask them again")
        return 3
    if not pairs:
        print("01: no query has both an accepted and a rejected candidate: no pairs; raise --samples or --temperature")
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
