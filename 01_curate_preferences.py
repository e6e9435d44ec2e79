"""Step 1: sample greetings, let five agents judge them, and turn the verdicts into training data.

For each query  the policy writes --samples candidates                                                    (greetings.py)
                duplicates and copies of references are screened out
                five agents judge the rest: Retrieval finds references, Positive and Negative argue,      (debate.py)
                Judge accepts only what is good throughout, Reflect overturns that on clear grounds;
                with --labels likelihood none is asked, and the likeliest text is accepted            (likelihood.py)
                accepted and rejected candidates become (chosen, rejected) pairs, the best accepted one a row for SFT

Reads   queries, references, further candidates (--candidates, any JSONL of {query, response})
Writes  candidates.jsonl, judgements.jsonl, fates.jsonl (of candidates), preferences.jsonl, sft.jsonl, 01_summary.json;
        likelihood.jsonl with --labels likelihood
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
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from common import records, run_folder, stats
from common.client import Client, gather_all
from common.debate import Retrieval, debate, roles_asked
from common.endpoint import add_endpoint_flags, endpoint_name
from common.engine import Writer, add_engine_flag, choose_engine
from common.failures import what_next
from common.greetings import write_greetings
from common.lexicon import LEXICON_FILE
from common.likelihood import APART, label_best
from common.policy import add_policy_flags, find_policy, load_tokenizer, model_folder, policy_path, silence_libraries
from common.prompts import conversation, prompt_hashes
from common.records import Candidate, Demonstration, Judgement, Preference, Query, Reference
from common.store import open_store
from common.texts import screen

# The tiny model's greetings are short, at temperature 1 seldom good, and recited: it has seen only the references.
OFFLINE = {"bits": 16, "samples": 7, "temperature": [0.7], "max_tokens": 48, "batch_size_generate": 256, "engine": "hf"}
OFFLINE |= {"max_copied": 1.0, "uses": 4}
OPENING = 0.06  # of the SFT rows may begin with the same two characters; in the released data 38% begin with 亲爱


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("candidates").add_argument
    add("--queries", type=Path, default=run_folder.ROOT / "data/queries.jsonl", help="{query} (data/queries.jsonl)")
    add("--candidates", type=Path, nargs="*", default=[], help="files of {query, response} to judge too")
    add("--policies", nargs="*", default=[], help="further policies to sample: models, or adapter folders of step 4")
    add("--samples", type=int, default=4, help="per query, policy and temperature; 0: judge files only (%(default)s)")
    add("--temperature", type=float, nargs="+", default=[1.0], help="of the policies; one or several (1.0)")
    add("--max-tokens", type=int, default=512, help="of a candidate (%(default)s)")
    add = parser.add_argument_group("screening", "a candidate above either is dropped").add_argument
    add("--max-similar", type=float, default=0.9, help="share of its character pairs in an earlier one (%(default)s)")
    add("--max-copied", type=float, default=0.8, help="share of a candidate found in one reference (%(default)s)")
    add = parser.add_argument_group("agents").add_argument
    add("--references", type=Path, default=run_folder.ROOT / "data/references.jsonl", help="{query, response, ...}")
    add("--embedding-model", help="retrieve by this sentence-embedding model, not by character TF-IDF")
    add("--examples", type=run_folder.positive, default=3, help="references shown to the agents (%(default)s)")
    add("--no-retrieval", action="store_true", help="ablation: no references shown")
    add("--no-debate", action="store_true", help="ablation: the Judge hears no debate")
    add("--no-reflect", action="store_true", help="ablation: the Judge's verdict stands")
    add = parser.add_argument_group("labels").add_argument
    labels = "likelihood: accept the likeliest text of each query, without asking the agents (%(default)s)"
    add("--labels", choices=("agents", "likelihood"), default="agents", help=labels)
    add = parser.add_argument_group("pairs").add_argument
    add("--uses", type=run_folder.positive, default=2, help="pairs that one candidate may be in (%(default)s)")
    add_policy_flags(parser)
    add_engine_flag(parser)
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    args = run_folder.parse(parser, OFFLINE)
    if args.labels == "likelihood" and not args.likelihood:
        run_folder.fail("--labels likelihood takes a language model: --likelihood Qwen/Qwen2.5-1.5B-Instruct, say")
    args.likelihood = args.likelihood and model_folder(args.likelihood)
    if args.samples:
        choose_engine(args)
    elif not args.candidates:
        run_folder.fail("--samples 0 leaves nothing to judge; name files with --candidates")
    return args


def write_candidates(args: argparse.Namespace, queries: list[Query], policies: list[str]) -> None:
    """Write candidates.jsonl, or the rest of it; a label that a file has is kept as `given_label`, to compare with."""
    if args.labels == "agents":
        Client.probe(args, "01")  # greetings that nobody can judge are not worth the sampling
    with records.Appender(args.run / "candidates.jsonl") as append:
        for file in args.candidates:
            for row in records.stream(file, Candidate, unique=False):
                if row.id in append.done:
                    continue
                candidate = Candidate(id=row.id, query=row.query, response=row.response, temperature=row.temperature)
                candidate.source = row.source or file.name
                label = getattr(row, "given_label", getattr(row, "label", None))
                if label in (0, 1):
                    candidate.given_label = label
                append(candidate)
        for policy in policies:
            sample_from(args, policy, queries, append)


def sample_from(args: argparse.Namespace, policy: str, queries: list[Query], append: records.Appender) -> None:
    """Append --samples greetings of one policy for each query and temperature, except those that are there."""
    silence_libraries()
    base, adapter = find_policy(policy)
    writer = Writer(args)
    for temperature in args.temperature:
        slots: list[tuple[str, Query]] = []  # id of each candidate that is still to be written, and its query
        for query, number in itertools.product(queries, range(args.samples)):
            key = run_folder.digest(query.id, args.seed, policy, temperature, number)
            if key not in append.done:
                slots.append((key, query))
        keyed = [(key, query.query) for key, query in slots]
        texts = write_greetings(args, writer, base, adapter, keyed, temperature, "candidates")
        for (key, query), text in zip(slots, texts, strict=True):
            names = {"id": key, "query_id": query.id, "source": Path(policy).name}
            append(Candidate(**names, query=query.query, response=text, temperature=temperature))
    writer.close()  # another base, or the model of --likelihood, needs the memory


def judging_settings(args: argparse.Namespace) -> dict:
    """What the labels depend on: on all about the agents, or on the language model and the words of signs.py."""
    if args.labels == "agents":
        roles = roles_asked(debate=not args.no_debate, reflect=not args.no_reflect)
        settings = run_folder.settings(args, "screening", "agents") | {"endpoint": endpoint_name(args)}
    else:
        roles, settings = ["policy"], run_folder.settings(args, "screening", "labels", "likelihood")
        settings |= {"references": run_folder.file_hash(args.references), "signs": run_folder.file_hash(LEXICON_FILE)}
        settings["apart"] = APART
    candidates = run_folder.file_hash(args.run / "candidates.jsonl")
    return settings | {"prompts": prompt_hashes(roles, args.prompts), "candidates": candidates}


def judge_candidates(args: argparse.Namespace, references: list[Reference], screened_out: dict[str, str]) -> float:
    """Write judgements.jsonl, or the rest of it, a line as each verdict comes; returns the seconds it took."""
    from tqdm import tqdm

    path, candidates = args.run / "judgements.jsonl", args.run / "candidates.jsonl"
    started = time.time()
    if args.labels == "likelihood":
        judgements = [one for one in records.stream(candidates, Judgement) if one.id not in screened_out]
        label_best(args.likelihood, args.prompts, judgements, args.run / "likelihood.jsonl")
        records.write(path, judgements)
        return round(time.time() - started, 2)
    # What failed in an earlier call is dropped, so that it is asked for again.
    with records.Appender(path):  # opening it drops the torn line that a kill may have left
        pass
    if path.stat().st_size and any(record.error for record in records.stream(path, Judgement)):
        records.write(path, (record for record in records.stream(path, Judgement) if not record.error))

    with records.Appender(path) as append:
        # Candidates are read one by one, twice, because tens of thousands need not be in memory.
        skip = append.done | screened_out.keys()
        queries = Counter(one.query for one in records.stream(candidates, Candidate) if one.id not in skip)
        waiting = (one for one in records.stream(candidates, Candidate) if one.id not in skip)
        retrieval = None
        if not args.no_retrieval:
            retrieval = Retrieval(references, args.examples, args.embedding_model)
            retrieval.look_up(list(queries))
        agents = {"debate": not args.no_debate, "reflect": not args.no_reflect}
        started = time.time()
        bar = tqdm(total=queries.total(), desc="judgements", unit="greeting")

        async def worker(client: Client) -> None:
            for candidate in waiting:  # shared by all workers, so that nobody waits for the slowest
                examples = retrieval(candidate.query, candidate.response) if retrieval else []
                append(await debate(client, candidate, examples, **agents))
                bar.update()

        async def judge_all() -> None:
            # More workers than requests may be under way: the agents of one debate answer one after another.
            async with Client(args, "01") as client:
                await gather_all(*(worker(client) for _ in range(4 * args.concurrency)))

        with bar:
            asyncio.run(judge_all())
    return round(time.time() - started, 2)


# ---- rejection sampling: pairs and demonstrations -------------------------------------------------------------------


class Judged(NamedTuple):
    """What pairing needs of a judgement: tens of thousands of them are in memory at once."""

    id: str
    query_id: str
    query: str
    response: str
    label: int
    strengths: int  # points for it minus points against it
    why: str


Pair = tuple[Judged, Judged]  # accepted, rejected


def length_lead(pair: Pair) -> int:
    """By how many characters the accepted text is longer."""
    return len(pair[0].response) - len(pair[1].response)


def length_gap(pair: Pair) -> float:
    """Difference of the two lengths as a share of the longer one."""
    return abs(length_lead(pair)) / max(len(one.response) for one in pair)


def choose_pairs(judged: list[Judged], uses: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs of an accepted and a rejected candidate of one query, so that length decides nothing over the whole file.

    Pairs of nearest length come first; a candidate is in at most `uses` of them; and where the lengths differ, the
    longer text wins as often as it loses. Also returns all pairs that were possible.
    """
    by_query: dict[str, tuple[list[Judged], list[Judged]]] = {}  # query -> (rejected, accepted)
    for one in judged:
        by_query.setdefault(one.query, ([], []))[one.label].append(one)
    possible: list[Pair] = []
    for rejected, accepted in by_query.values():
        possible += itertools.product(accepted, rejected)
    possible.sort(key=lambda pair: (length_gap(pair), pair[0].id, pair[1].id))

    equal = deque(pair for pair in possible if length_lead(pair) == 0)
    longer_chosen = deque(pair for pair in possible if length_lead(pair) > 0)
    shorter_chosen = deque(pair for pair in possible if length_lead(pair) < 0)
    times_used, chosen = Counter(), []
    while pair := next_pair(equal, times_used, uses):
        chosen.append(pair)
    # One of each in turn, until one kind runs out: that is what keeps length out of the file.
    while longer := next_pair(longer_chosen, times_used, uses):
        shorter = next_pair(shorter_chosen, times_used, uses)
        if shorter is None:
            break
        chosen += [longer, shorter]
    return chosen, possible


def next_pair(queue: deque[Pair], times_used: Counter[str], uses: int) -> Pair | None:
    """Take the next pair from the queue whose two candidates are not used up yet; None if there is none."""
    while queue:
        good, bad = queue.popleft()
        if times_used[good.id] < uses and times_used[bad.id] < uses:
            times_used.update([good.id, bad.id])
            return good, bad
    return None


def choose_demonstrations(judged: list[Judged]) -> list[Judged]:
    """The best accepted greeting of each query whose opening is not used up yet."""
    accepted = [one for one in judged if one.label == 1]
    accepted.sort(key=lambda one: (one.query_id, -one.strengths, one.id))  # whatever the order of the verdicts
    most = max(1, int(OPENING * len({one.query_id for one in accepted})))
    openings, chosen = Counter(), {}  # opening -> how often; id of a query -> its greeting
    for one in accepted:
        opening = one.response[:2]
        if one.query_id not in chosen and openings[opening] < most:
            openings[opening] += 1
            chosen[one.query_id] = one
    return list(chosen.values())


def as_preference(args: argparse.Namespace, good: Judged, bad: Judged) -> Preference:
    prompt = {"prompt": conversation(good.query, args.prompts), "query": good.query, "query_id": good.query_id}
    chosen = {"chosen": [{"role": "assistant", "content": good.response}], "chosen_id": good.id}
    rejected = {"rejected": [{"role": "assistant", "content": bad.response}], "rejected_id": bad.id}
    return Preference(**prompt, **chosen, **rejected, why=bad.why)


def as_demonstration(args: argparse.Namespace, good: Judged) -> Demonstration:
    prompt = {"prompt": conversation(good.query, args.prompts), "query": good.query, "query_id": good.query_id}
    return Demonstration(**prompt, completion=[{"role": "assistant", "content": good.response}], candidate_id=good.id)


def fates_of(judged: list[Judged], pairs: list[Pair], possible: list[Pair], sft: list[Judged]) -> dict[str, str]:
    """What became of every candidate that has a label: {id: fate}."""
    fates, verdict = {}, {0: "rejected", 1: "accepted"}
    for one in judged:
        fates[one.id] = f"{verdict[one.label]}: no opposite for its query"
    for one in itertools.chain.from_iterable(possible):
        fates[one.id] = f"{verdict[one.label]}: left out for the balance of lengths or --uses"
    for one in itertools.chain.from_iterable(pairs):
        fates[one.id] = "pair"
    for one in sft:
        fates[one.id] = "pair, sft" if fates[one.id] == "pair" else "sft"
    return fates


def longer_wins(pairs: list[Pair]) -> dict:
    """How often the longer text is the accepted one, over the pairs of different length."""
    leads = [length_lead(pair) for pair in pairs if length_lead(pair)]
    return stats.rate(sum(lead > 0 for lead in leads), len(leads))


def write_training_files(args: argparse.Namespace, screened_out: dict[str, str]) -> dict:
    """Write preferences.jsonl, sft.jsonl and fates.jsonl from judgements.jsonl; returns the figures of the summary."""
    fates, failures = dict(screened_out), Counter()
    judged, audits, given_labels = [], [], []  # audits and given labels: (other label, label, query)
    for r in records.stream(args.run / "judgements.jsonl", Judgement):
        if r.error:
            failures[r.error] += 1
            fates[r.id] = f"failed: {r.error}"
            continue
        if r.label is None:
            fates[r.id] = "no label: hardly less likely than its query's best"
            continue
        strengths, why = len(r.positive) - len(r.negative), (r.reflect or r.judge)["reason"]
        judged.append(Judged(r.id, r.query_id, r.query, r.response, r.label, strengths, why))
        if r.reflect:
            audits.append((r.judge["verdict"], r.label, r.query))
        if hasattr(r, "given_label"):
            given_labels.append((r.given_label, r.label, r.query))

    pairs, possible = choose_pairs(judged, args.uses)
    sft = choose_demonstrations(judged)
    fates |= fates_of(judged, pairs, possible, sft)
    records.write(args.run / "preferences.jsonl", (as_preference(args, *pair) for pair in pairs))
    records.write(args.run / "sft.jsonl", (as_demonstration(args, one) for one in sft))
    records.write(args.run / "fates.jsonl", ({"id": key, "fate": fate} for key, fate in fates.items()))

    figures = {"candidates": len(fates), "judged": len(fates) - len(screened_out), "pairs": len(pairs), "sft": len(sft)}
    figures["accepted"] = stats.rate(sum(one.label for one in judged), len(judged))
    figures["overturned"] = stats.rate(sum(before != label for before, label, _ in audits), len(audits))
    figures["judge_reflect_kappa"] = stats.agreement(*zip(*audits, strict=True))["kappa"] if audits else None
    figures["longer_wins"] = longer_wins(pairs)
    figures["longer_wins_in_all_possible_pairs"] = longer_wins(possible)
    figures["within_20_percent"] = stats.rate(sum(length_gap(pair) <= 0.2 for pair in pairs), len(pairs))
    figures["failures"], figures["fates"] = failures, Counter(fates.values())
    figures["ledger"] = open_store(args, "01").ledger()
    if given_labels:
        figures["agreement_with_given_labels"] = stats.agreement(*zip(*given_labels, strict=True))
    return figures


def main(args: argparse.Namespace) -> int:
    started = time.time()
    if args.labels == "likelihood":
        load_tokenizer(args.likelihood)  # what is wrong with it shows in a second
    queries = records.read(args.queries, Query) if args.samples else []
    references = records.read(args.references, Reference)
    ids: dict[str, tuple] = {}
    for file in args.candidates:  # read to be checked: one of two that share an id would be lost
        deque(records.stream(file, Candidate, unique=ids), maxlen=0)
    run_folder.open_run(args.run)

    # 1. Candidates.
    policies = [policy_path(args), *map(model_folder, args.policies)] if args.samples else []
    settings = run_folder.settings(args, "candidates", "models")
    settings["policies"], settings["prompts"] = policies, prompt_hashes(["policy"], args.prompts)
    sampling = run_folder.Stage(args.run, "01_candidates", ["candidates.jsonl"], settings, args.redo)
    if not sampling.done:
        write_candidates(args, queries, policies)
        sampling.finish()
    seconds = {"sample": round(time.time() - started, 2), "judge": 0.0}  # of this call

    # 2. Judgements.
    judging = run_folder.Stage(args.run, "01_judgements", ["judgements.jsonl"], judging_settings(args), args.redo)
    candidates = records.stream(args.run / "candidates.jsonl", Candidate)
    screened_out = screen(candidates, args.max_similar, references if args.max_copied < 1 else [], args.max_copied)
    if not judging.done:
        seconds["judge"] = judge_candidates(args, references, screened_out)
    if not (sampling.replaced or judging.replaced):  # of all calls that ended and made what there is
        started -= run_folder.read_summary(args.run, "01_summary").get("seconds", 0)

    # 3. Pairs and demonstrations, made again whenever they could differ: what they are made from is kept.
    settings = run_folder.settings(args, "pairs")
    settings["prompts"] = prompt_hashes(["policy"], args.prompts)
    settings["judgements"] = run_folder.file_hash(args.run / "judgements.jsonl")
    outputs = ["preferences.jsonl", "sft.jsonl", "fates.jsonl", "01_summary.json"]
    pairing = run_folder.Stage(args.run, "01_pairs", outputs, settings, redo=True)
    if sampling.done and judging.done and pairing.done:  # `done`: before this call
        print(f"01: done already, see {args.run / '01_summary.json'}")
        return 0
    figures = write_training_files(args, screened_out)
    figures["completions"] = len(queries) * args.samples * len(args.temperature) * len(policies)
    failures = figures["failures"].total()
    if not failures:  # else the stage stays open: the next call asks for those again
        judging.finish()
    run_folder.write_summary(args, "01_summary", started, figures | {"seconds_by_phase": seconds})
    pairing.finish()

    code, advice = what_next(figures["failures"])
    accepted, longer = figures["accepted"]["value"] or 0, figures["longer_wins"]["value"]
    training = f"{figures['pairs']} pairs and {figures['sft']} SFT rows in {args.run}"
    labels = f"{accepted:.0%} of {figures['accepted']['n']} labels accept"
    print(f"01: {figures['judged']} greetings judged, {labels}; {training}")
    if longer is not None:
        print(f"01: the longer text wins {longer:.0%} of the pairs of different length")
    if failures:
        print(f"01: {failures} judgements failed, {dict(figures['failures'])}; {advice}")
    elif not figures["pairs"]:
        print("01: no query has both an accepted and a rejected candidate: no pairs; raise --samples or --temperature")
    return code


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
