"""Step 1: sample greetings, let five agents judge them, and keep what the verdicts teach.

For each query the policy writes several candidates. Retrieval finds references for the query; Positive and Negative
debate the candidate, in parallel; Judge weighs both into a strict verdict, 1 only if the greeting is good throughout;
Reflect audits the verdict and overturns it on clear grounds. Accepted and rejected candidates of one query become
(chosen, rejected) pairs, the best accepted one a row for SFT.

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
import sys
import time
from collections import Counter
from pathlib import Path

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
    digest,
    file_hash,
    open_run,
    parse,
    rate,
    read,
    write,
    write_summary,
)

# What --offline sets. The tiny model's greetings are short, and too seldom good at temperature 1 to learn from.
OFFLINE = {"bits": 16, "samples": 7, "temperature": 0.7, "max_tokens": 48, "batch_size_generate": 256}
ROLES = ["positive", "negative", "judge", "reflect"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--queries", type=Path, default=ROOT / "data/queries.jsonl", help="{query} (data/queries.jsonl)"
    )
    parser.add_argument("--references", type=Path, default=ROOT / "data/references.jsonl", help="{query, response}")
    parser.add_argument(
        "--candidates", type=Path, nargs="*", default=[], help="files of {query, response} to judge too"
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="candidates from the policy for each query (%(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the policy (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a candidate (%(default)s)")
    parser.add_argument("--examples", type=int, default=3, help="references shown to the agents (%(default)s)")
    parser.add_argument("--uses", type=int, default=2, help="pairs that one candidate may be in (%(default)s)")
    parser.add_argument("--no-retrieval", action="store_true", help="ablation: no references shown")
    parser.add_argument("--no-debate", action="store_true", help="ablation: the Judge hears no debate")
    parser.add_argument("--no-reflect", action="store_true", help="ablation: the Judge's verdict stands")
    models.add_policy_flags(parser)
    llm.add_endpoint_flags(parser)
    add_run_flags(parser)
    return parse(parser, OFFLINE)


# ---- candidates -----------------------------------------------------------------------------------------------------


def sample_candidates(args: argparse.Namespace, queries: list[Query]) -> bool:
    """Write candidates.jsonl: --samples greetings from the policy for each query; goes on where it was.

    Returns whether all of it was there already.
    """
    policy = models.policy_path(args) if args.samples else ""
    stage = Stage(
        args.run, "01_candidates", ["candidates.jsonl"],
        {"seed": args.seed, "queries": file_hash(args.queries), "policy": policy, "bits": args.bits,
         "samples": args.samples, "temperature": args.temperature, "max_tokens": args.max_tokens,
         "batch": args.batch_size_generate,
         "prompts": llm.prompt_hashes(["policy"], args.prompts), "files": [file_hash(p) for p in args.candidates]},
        args.redo,
    )  # fmt: skip
    if stage.done:
        return True
    path = args.run / "candidates.jsonl"
    with Appender(path) as append:
        for file in args.candidates:
            for given in read(file, Candidate, unique=False):
                label = {"given_label": given.label} if hasattr(given, "label") else {}
                kept = given.model_dump(include=set(Candidate.model_fields) - {"query_id"})
                if given.id not in append.done:
                    append(Candidate.model_validate(kept | label | {"source": given.source or file.name}))
        slots = [(query, n) for query in queries for n in range(args.samples)]
        slots = [(query, n) for query, n in slots if digest(query.id, args.seed, n) not in append.done]
        if slots:
            models.quiet()
            model, tokenizer = models.load_policy(policy, args.bits)
            chunk = 4 * args.batch_size_generate  # written as it is done: a killed run loses one chunk
            for start in range(0, len(slots), chunk):
                part = slots[start : start + chunk]
                texts = models.generate(
                    model, tokenizer, [models.conversation(query.query, args.prompts) for query, _ in part],
                    temperature=args.temperature, top_p=1.0, max_tokens=args.max_tokens,
                    batch_size=args.batch_size_generate,
                    seed=int(digest(args.seed, part[0][0].id, part[0][1])[:8], 16),
                    progress=f"candidates {start + len(part)}/{len(slots)}",
                )  # fmt: skip
                for (query, n), text in zip(part, texts, strict=True):
                    append(Candidate(
                        id=digest(query.id, args.seed, n), query_id=query.id, query=query.query,
                        response=text or "（空）", source=Path(policy).name, temperature=args.temperature,
                    ))  # fmt: skip
    stage.finish()
    return False


# ---- the five agents ------------------------------------------------------------------------------------------------


class Retrieval:
    """The agent that needs no model: references for queries most like the one asked, by character TF-IDF."""

    def __init__(self, references: list[Reference]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.references = references
        self.vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
        self.index = self.vectorizer.fit_transform([r.query for r in references])

    def __call__(self, query: str, response: str, k: int) -> list[Reference]:
        """The k nearest references; never one for the very query or the very text that is judged."""
        similarity = (self.index @ self.vectorizer.transform([query]).T).toarray()[:, 0]
        nearest = (self.references[i] for i in similarity.argsort()[::-1])
        return list(itertools.islice((r for r in nearest if r.query != query and r.response != response), k))


async def judge_one(
    args: argparse.Namespace, client: llm.Client, examples: list[Reference], candidate: Candidate
) -> Judgement:
    """The debate about one candidate; where an agent cannot be heard, `error` says why and there is no label."""
    roles = [
        r
        for r in ROLES
        if not (args.no_debate and r in ("positive", "negative")) and not (args.no_reflect and r == "reflect")
    ]
    record = Judgement(
        **candidate.model_dump(), examples=[r.id for r in examples], model=client.model,
        prompts=llm.prompt_hashes(roles, args.prompts),
    )  # fmt: skip
    seen = {
        "query": candidate.query, "response": candidate.response,
        "examples": [{"query": r.query, "response": r.response} for r in examples],
    }  # fmt: skip
    answers = []
    try:
        if not args.no_debate:
            answers += await asyncio.gather(
                client.ask("positive", llm.Points, **seen), client.ask("negative", llm.Points, **seen)
            )
            record.positive, record.negative = answers[0].points, answers[1].points
        debate = {"positive": record.positive, "negative": record.negative}
        answers.append(await client.ask("judge", llm.Verdict, **seen, **debate))
        record.judge = answers[-1].model_dump()
        if not args.no_reflect:
            answers.append(await client.ask("reflect", llm.Verdict, **seen, **debate, judge=record.judge))
            record.reflect = answers[-1].model_dump()
        record.label = answers[-1].verdict
    except llm.Unusable as e:
        record.error = str(e)
    record.input_tokens, record.output_tokens = (sum(a.tokens[i] for a in answers) for i in (0, 1))
    return record


def judge_candidates(args: argparse.Namespace, candidates: list[Candidate]) -> bool:
    """Write judgements.jsonl, one line a distinct candidate as its verdict comes; goes on where it was.

    Returns whether all of it was there already.
    """
    from tqdm import tqdm

    stage = Stage(
        args.run, "01_judgements", ["judgements.jsonl"],
        {"candidates": file_hash(args.run / "candidates.jsonl"), "references": file_hash(args.references),
         "endpoint": llm.endpoint_name(args), "examples": args.examples, "seed": args.seed,
         "no_retrieval": args.no_retrieval, "no_debate": args.no_debate, "no_reflect": args.no_reflect,
         "prompts": llm.prompt_hashes(ROLES, args.prompts)},
        args.redo,
    )  # fmt: skip
    if stage.done:
        return True
    retrieve = None if args.no_retrieval else Retrieval(read(args.references, Reference))
    path = args.run / "judgements.jsonl"
    if path.is_file() and path.stat().st_size:  # what failed last time is asked again
        write(path, [record for record in read(path, Judgement) if not record.error])
    failed = 0
    with Appender(path) as append:
        todo = [c for c in candidates if c.id not in append.done]

        async def judge_all() -> None:
            queue = iter(todo)
            bar = tqdm(total=len(todo), desc="judgements", unit="greeting")

            async def worker() -> None:
                for candidate in queue:  # the workers share one iterator: nobody waits for the slowest
                    examples = retrieve(candidate.query, candidate.response, args.examples) if retrieve else []
                    record = await judge_one(args, client, examples, candidate)
                    append(record)
                    nonlocal failed
                    failed += record.error is not None
                    bar.update()

            async with llm.Client(args, args.run) as client:
                await asyncio.gather(*(worker() for _ in range(args.concurrency)))
            bar.close()

        asyncio.run(judge_all())
    if not failed:
        stage.finish()
    return False


# ---- rejection sampling: pairs and demonstrations -------------------------------------------------------------------


def choose_pairs(args: argparse.Namespace, judged: list[Judgement]) -> list[Preference]:
    """Pairs of an accepted and a rejected candidate of one query, so that length decides nothing over the whole file.

    Pairs of nearest length come first; a candidate is in at most --uses of them; and as many are kept in which the
    chosen text is the longer one as in which it is the shorter one.
    """
    groups: dict[str, list[Judgement]] = {}
    for record in judged:
        groups.setdefault(record.query, []).append(record)
    possible = [
        (good, bad)
        for group in groups.values()
        for good in group if good.label == 1
        for bad in group if bad.label == 0
    ]  # fmt: skip
    possible.sort(key=lambda p: (abs(len(p[0].response) - len(p[1].response)) / len(p[0].response), p[0].id, p[1].id))
    uses, kept = Counter(), {1: [], 0: [], -1: []}
    for good, bad in possible:
        if uses[good.id] < args.uses and uses[bad.id] < args.uses:
            uses.update((good.id, bad.id))
            longer = (len(good.response) > len(bad.response)) - (len(good.response) < len(bad.response))
            kept[longer].append((good, bad))
    balanced = min(len(kept[1]), len(kept[-1]))
    return [
        Preference(
            prompt=models.conversation(good.query, args.prompts), query=good.query, query_id=good.query_id,
            chosen=[{"role": "assistant", "content": good.response}], chosen_id=good.id,
            rejected=[{"role": "assistant", "content": bad.response}], rejected_id=bad.id,
            why=(bad.reflect or bad.judge)["reason"],
        )
        for good, bad in kept[0] + kept[1][:balanced] + kept[-1][:balanced]
    ]  # fmt: skip


def choose_demonstrations(args: argparse.Namespace, judged: list[Judgement]) -> list[Demonstration]:
    """The best accepted greeting of each query; no opening of two characters may begin more than 6% of them."""
    best: dict[str, tuple[int, Judgement]] = {}
    for record in judged:
        strengths = len(record.positive) - len(record.negative)
        if record.label == 1 and (record.query_id not in best or strengths > best[record.query_id][0]):
            best[record.query_id] = (strengths, record)
    openings, rows = Counter(), []
    for _, record in best.values():
        opening = record.response[:2]
        openings[opening] += 1
        if openings[opening] <= max(1, 0.06 * len(best)):
            completion = [{"role": "assistant", "content": record.response}]
            prompt = models.conversation(record.query, args.prompts)
            ids = {"query_id": record.query_id, "candidate_id": record.id}
            rows.append(Demonstration(prompt=prompt, completion=completion, query=record.query, **ids))
    return rows


def main(args: argparse.Namespace) -> int:
    started = time.time()
    queries = read(args.queries, Query) if args.samples else []
    open_run(args.run)
    llm.Client.probe(args, args.run)
    done = sample_candidates(args, queries)
    candidates = read(args.run / "candidates.jsonl", Candidate)
    distinct = list({(c.query, c.response): c for c in reversed(candidates)}.values())[::-1]
    done &= judge_candidates(args, distinct)
    stage = Stage(
        args.run, "01_pairs", ["preferences.jsonl", "sft.jsonl", "fates.jsonl", "01_summary.json"],
        {"judgements": file_hash(args.run / "judgements.jsonl"), "uses": args.uses,
         "prompts": llm.prompt_hashes(["policy"], args.prompts)},
        redo=True,  # nothing is lost: what these are made from is kept
    )  # fmt: skip
    if done and stage.done:
        print(f"01: done already, see {args.run / '01_summary.json'}")
        return 0

    judged = read(args.run / "judgements.jsonl", Judgement)
    pairs, demonstrations = choose_pairs(args, judged), choose_demonstrations(args, judged)
    write(args.run / "preferences.jsonl", pairs)
    write(args.run / "sft.jsonl", demonstrations)
    fates = {c.id: "duplicate" for c in candidates} | {
        r.id: "failed" if r.error else "accepted, not needed" if r.label else "rejected, not needed" for r in judged
    }
    used = {i: "pair" for p in pairs for i in (p.chosen_id, p.rejected_id)}
    fates |= used | {d.candidate_id: "pair, sft" if d.candidate_id in used else "sft" for d in demonstrations}
    write(args.run / "fates.jsonl", ({"id": i, "fate": fate} for i, fate in fates.items()))

    heard = [r for r in judged if r.label is not None]
    audited = [r for r in heard if r.reflect]
    decided = [len(p.texts[1]) - len(p.texts[2]) for p in pairs if len(p.texts[1]) != len(p.texts[2])]
    figures = {
        "candidates": len(candidates), "judged": len(judged), "pairs": len(pairs), "sft": len(demonstrations),
        "accepted": rate(sum(r.label for r in heard), len(heard)),
        "overturned": rate(sum(r.judge["verdict"] != r.label for r in audited), len(audited)),
        "longer_wins": rate(sum(d > 0 for d in decided), len(decided)),
        "failures": Counter(r.error for r in judged if r.error),
        "fates": Counter(fates.values()),
        "ledger": llm.Store(args.run / "answers.sqlite").ledger(ROLES),
    }  # fmt: skip
    given = [r for r in heard if hasattr(r, "given_label")]
    if given:
        figures["agreement_with_given_labels"] = rate(sum(r.label == r.given_label for r in given), len(given))
    write_summary(args.run, "01_summary", started, vars(args), figures)
    stage.finish()
    accepted, longer = (figures[key]["value"] or 0 for key in ("accepted", "longer_wins"))
    print(f"01: {len(judged)} greetings judged, {accepted:.0%} accepted; {len(pairs)} pairs, longer wins {longer:.0%}; "
          f"{len(demonstrations)} SFT rows in {args.run}")  # fmt: skip
    if failures := sum(figures["failures"].values()):
        print(f"01: {failures} judgements failed, {dict(figures['failures'])}; run again to ask them again")
        return 3
    if not pairs:
        print("01: no query has both an accepted and a rejected candidate: no pairs; raise --samples or --temperature")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
