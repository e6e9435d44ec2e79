"""Step 3: train the judge's principles by an adversarial loop, and keep only what makes the judge better.

Each round a Generator writes subtly flawed greetings under strategies S_G and explains the flaw; the Detector judges
them under principles S_D. Caught: its reason sharpens S_G. Fooled: the explanation sharpens S_D. Then the Detector
judges labelled greetings, good and bad, and for each mistake a Reflector proposes a change to S_D. An Optimiser turns
the feedback into at most 10 rules a side; rules that quote a labelled greeting are refused. New principles replace the
old only if agreement with the labels of the validation part does not fall, on the same rows, and the red-team bank is
not fooled more often; otherwise they are rolled back. The test part, and a second bank of attacks on other greetings,
are looked at once, at the end.

Reads   labelled greetings, references, queries; prompts/principles.md and prompts/strategies.md, the seeds
Writes  principles.jsonl (a line a version, accepted or not and why), redteam.jsonl, principles.svg, 03_summary.json
Paper   arXiv 2508.21476, the principle-guided judge. Departures: the labelled rows are split by query into a part that
        the loop may look at, a part that decides, and a part that is reported once; the released script accepts every
        rewrite unseen.
Example python 03_refine_judge.py --offline --run outputs/mine
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import jsonlines

from common.answers import Answer, FlawedGreeting, Lesson, Rules, Unusable
from common.client import Client, together
from common.endpoint import add_endpoint_flags, endpoint_name
from common.judge import judge
from common.policy import add_policy_flags
from common.prompts import prompt_hashes, read_rules
from common.records import Labelled, Query, Reference, read, split_labelled, write
from common.run_folder import (
    ROOT,
    Stage,
    add_run_flags,
    digest,
    file_hash,
    launch,
    open_run,
    parse,
    positive,
    write_summary,
)
from common.spoilt import BANK
from common.stats import agreement, null_verdicts, rate

OFFLINE: dict = {}  # the same settings: the critic is quick, and the loop is the same
ROLES = ["detector", "generator", "reflector", "optimiser"]
MOST_RULES = 10
QUOTED = 10  # characters in a row that a rule and a labelled greeting may not share
DECIDED = 0.8  # share of the rows that must have a verdict for a round to be decided
Verdicts = tuple[list[int | None], list[int | None]]  # on labelled rows, on a bank of attacks; None where none came
A = TypeVar("A", bound=Answer)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--labelled", type=Path, default=ROOT / "data/labelled.jsonl", help="{query, response, label 0|1}")
    add("--references", type=Path, default=ROOT / "data/references.jsonl", help="{query, response}")
    add("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="what the Generator writes for")
    add("--from", dest="principles", type=Path, help="principles to start from, one '- ' line each "
        "(prompts/principles.md)")  # fmt: skip
    add("--rounds", type=positive, default=8, help="%(default)s")
    add("--patience", type=positive, default=3, help="rejected rounds in a row that end the loop (%(default)s)")
    add("--batch", type=positive, default=24, help="labelled rows the loop looks at in a round (%(default)s)")
    add("--attacks", type=positive, default=12, help="flawed greetings written in a round (%(default)s)")
    add("--bank", type=positive, default=78, help="fixed attacks in each of the two banks (%(default)s)")
    add("--repeat", type=int, default=0, help="judge the test part so many times more: does it repeat itself?")
    add("--attribute", action="store_true", help="judge the test part with each principle left out: which does what?")
    add("--no-adversary", action="store_true", help="ablation: no Generator")
    add("--no-reflection", action="store_true", help="ablation: no Reflector")
    add("--no-acceptance", action="store_true", help="ablation: every rewrite is accepted")
    add_policy_flags(parser)
    add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    args.principles = args.principles or args.prompts / "principles.md"
    return args


def fixed_attacks(args: argparse.Namespace, references: list[Reference], held_out: bool) -> list[dict]:
    """A bank of attacks of every kind on references; the held-out one is made from other references."""
    rng = random.Random(digest(args.seed, "bank"))
    drawn = rng.sample(references, min(2 * args.bank, len(references)))
    bank = []
    for i, good in enumerate(drawn[len(drawn) // 2 :] if held_out else drawn[: len(drawn) // 2]):
        kind = list(BANK)[i % len(BANK)]
        own = getattr(good, "occasion", good.query)
        other = rng.choice([r for r in references if getattr(r, "occasion", r.query) != own])
        attack = BANK[kind](good.response, other.response)
        if attack != good.response:  # too short to be spoilt in this way
            bank.append({"query": good.query, "response": attack, "source": "fixed", "attack": kind})
    return bank


class Loop:
    """What the rounds change: the principles, the strategies, the red-team bank, and the record of versions."""

    def __init__(self, args: argparse.Namespace, client: Client, parts: dict, references: list, queries: list):
        self.args, self.client, self.parts, self.references, self.queries = args, client, parts, references, queries
        self.principles = read_rules(args.principles)
        self.strategies = read_rules(args.prompts / "strategies.md")
        self.bank, self.versions, self.failures = fixed_attacks(args, references, held_out=False), [], Counter()
        self.calls: dict[str, tuple[int, int]] = {}  # tokens of every call that this loop rests on, each once
        labelled = [row.response for rows in parts.values() for row in rows]
        self.quotable = {text[i : i + QUOTED] for text in labelled for i in range(len(text) - QUOTED + 1)}

    async def heard(self, asking: Awaitable[A]) -> A | None:
        """The answer, its tokens counted; None where none came, the reason counted."""
        try:
            answer = await asking
        except Unusable as e:
            self.failures[str(e)] += 1
            return None
        self.calls |= answer.calls
        return answer

    async def verdicts(self, rows: list, principles: list[str], again: int = 0) -> list[int | None]:
        """The Detector's verdicts on rows with query and response; None where it gave none. `again` asks them anew."""

        async def one(query: str, response: str) -> int | None:
            verdict = await self.heard(judge(self.client, query, response, principles, again))
            return verdict.verdict if verdict else None

        pairs = [(r["query"], r["response"]) if isinstance(r, dict) else (r.query, r.response) for r in rows]
        return await together(*(one(*pair) for pair in pairs))

    async def judged(self, principles: list[str], part: str, bank: list[dict]) -> Verdicts:
        """Verdicts on a part of the labelled rows and on a bank of attacks."""
        return await self.verdicts(self.parts[part], principles), await self.verdicts(bank, principles)

    def figures(self, part: str, verdicts: Verdicts) -> dict:
        """Agreement with the labels of a part, and how often a bank of attacks is accepted."""
        on_rows, on_bank = verdicts
        accepted = [verdict for verdict in on_bank if verdict is not None]
        found = agreement([r.label for r in self.parts[part]], on_rows)
        return found | {"false_accept": rate(sum(accepted), len(accepted))}

    async def attack(self, strategies: list[str], number: int) -> list[dict]:
        """Flawed greetings by the Generator, for queries of this round, judged by the Detector; `fooled` tells how."""
        rng = random.Random(digest(self.args.seed, "queries", number))
        asked = rng.sample(self.queries, min(self.args.attacks, len(self.queries)))

        async def one(i: int, query: Query) -> dict | None:
            examples = [{"query": r.query, "response": r.response} for r in rng.sample(self.references, 2)]
            strategy = strategies[i % len(strategies)]
            flawed = await self.heard(self.client.ask(
                "generator", FlawedGreeting, temperature=0.7, query=query.query, examples=examples,
                strategy=strategy,
            ))  # fmt: skip
            verdict = flawed and await self.heard(judge(self.client, query.query, flawed.response, self.principles))
            if not verdict:
                return None
            found = {"query": query.query, "response": flawed.response, "flaw": flawed.flaw, "strategy": strategy}
            return found | {"reason": verdict.reason, "fooled": verdict.verdict == 1}

        return [found for found in await together(*(one(i, q) for i, q in enumerate(asked))) if found]

    async def confirmed(self, attack: dict) -> bool:
        """A second look, with the flaw named: is the greeting really flawed?"""
        return await self.verdicts([attack], [*self.principles, attack["flaw"]]) == [0]

    async def reflect(self, number: int) -> list[str]:
        """What the Reflector learns from the Detector's mistakes on a batch of labelled rows and on the bank."""
        rng = random.Random(digest(self.args.seed, "batch", number))
        batch = rng.sample(self.parts["reflect"], min(self.args.batch, len(self.parts["reflect"])))
        rows = [(row.query, row.response, row.label) for row in batch]
        rows += [(attack["query"], attack["response"], 0) for attack in rng.sample(self.bank, min(6, len(self.bank)))]

        async def one(query: str, response: str, expected: int) -> Lesson | None:
            verdict = await self.heard(judge(self.client, query, response, self.principles))
            if not verdict or verdict.verdict == expected:
                return None
            return await self.heard(self.client.ask(
                "reflector", Lesson, query=query, response=response, expected=expected,
                verdict=verdict.verdict, reason=verdict.reason, principles=self.principles,
            ))  # fmt: skip

        return [answer.lesson for answer in await together(*(one(*row) for row in rows)) if answer]

    async def optimise(self, kind: str, rules: list[str], feedback: list[str]) -> list[str]:
        """At most ten rules rewritten from the feedback; the old ones where there is none or no usable answer."""
        if not feedback:
            return rules
        counted = [f"{item}（{times} 次）" for item, times in Counter(feedback).items()]
        answer = await self.heard(self.client.ask("optimiser", Rules, kind=kind, rules=rules, feedback=counted))
        if not answer:
            return rules
        new = dict.fromkeys(" ".join(rule.split()) for rule in answer.rules if rule.strip())
        quotes = [rule for rule in new if any(rule[i : i + QUOTED] in self.quotable for i in range(len(rule)))]
        self.failures["a rule that quotes a labelled greeting"] += len(quotes)
        return [rule for rule in new if rule not in quotes][:MOST_RULES] or rules

    def record(self, number: int, principles: list[str], validation: dict, accepted: bool, why: str) -> None:
        """Add a version and write the files. Its tokens are those of the answers used, whether paid for now or before:
        a run that was killed and replayed ends with the same file."""
        before = self.versions[-1]["tokens"]["so_far"] if self.versions else [0, 0]
        so_far = [sum(used[side] for used in self.calls.values()) for side in (0, 1)]
        self.versions.append({
            "version": len(self.versions), "round": number, "principles": principles, "strategies": self.strategies,
            "validation": validation, "bank": len(self.bank), "accepted": accepted, "why": why,
            "model": self.client.model, "prompts": prompt_hashes(ROLES, self.args.prompts),
            "tokens": {"round": [now - then for now, then in zip(so_far, before, strict=True)], "so_far": so_far},
            "failures": dict(self.failures),
        })  # fmt: skip
        write(self.args.run / "principles.jsonl", self.versions)
        write(self.args.run / "redteam.jsonl", self.bank)

    async def round(self, number: int, current: dict) -> dict:
        """One round; returns the figures of the principles that stand after it."""
        attacks = [] if self.args.no_adversary else await self.attack(self.strategies, number)
        fooled = [a for a in attacks if a["fooled"]]
        lessons = [] if self.args.no_reflection else await self.reflect(number)
        feedback = [f"补上：{a['flaw']}" for a in fooled] + lessons
        proposed = await self.optimise("准则", self.principles, feedback)
        for attack in fooled:
            known = any(attack["response"] == b["response"] for b in self.bank)
            if not known and await self.confirmed(attack):
                self.bank.append({k: attack[k] for k in ("query", "response", "flaw")} | {"source": f"round {number}"})

        shown, accepted, why = current, False, "no change proposed"
        if proposed != self.principles:
            old = await self.judged(self.principles, "validation", self.bank)  # again: the bank may have grown
            new = await self.judged(proposed, "validation", self.bank)
            objection = self.objection(old, new)
            accepted, why = not objection, objection or "agreement and red-team bank no worse"
            shown = self.figures("validation", new)
            current = shown if accepted else self.figures("validation", old)
            self.principles = proposed if accepted else self.principles

        if attacks:
            hints = [f"被识破：{a['strategy']}。评审的理由：{a['reason']}" for a in attacks if not a["fooled"]]
            hints += [f"成功：{a['strategy']}" for a in fooled]
            strategies = await self.optimise("策略", self.strategies, hints)
            again = await self.attack(strategies, number) if strategies != self.strategies else []
            before = await self.verdicts(attacks, self.principles)  # both against the Detector as it is now
            if again and sum(a["fooled"] for a in again) / len(again) >= sum(v or 0 for v in before) / len(before):
                self.strategies = strategies
        self.record(number, proposed, shown, accepted, why)
        return current

    def objection(self, old: Verdicts, new: Verdicts) -> str:
        """Why new principles may not replace the old; "" if they may."""
        if self.args.no_acceptance:
            return ""
        pairs = [list(zip(*sides, strict=True)) for sides in zip(old, new, strict=True)]
        heard = [[None not in pair for pair in some] for some in pairs]
        if any(sum(some) < DECIDED * len(some) for some in heard):
            return f"only {sum(map(sum, heard))} of {sum(map(len, heard))} rows have a verdict of both: not decided"
        # On the same rows: those that only one of the two has judged say nothing about which is better.
        before, after = (
            self.figures("validation", tuple(
                [pair[side] if both else None for pair, both in zip(some, kept, strict=True)]
                for some, kept in zip(pairs, heard, strict=True)
            ))
            for side in (0, 1)
        )  # fmt: skip
        if after["kappa"] < before["kappa"]:
            return f"kappa on validation would fall from {before['kappa']:.3f} to {after['kappa']:.3f}"
        then, now = (f["false_accept"]["value"] or 0 for f in (before, after))
        return f"red-team bank would be accepted more often: {then:.1%} to {now:.1%}" if now > then else ""

    async def refine(self) -> None:
        """All rounds. Killed and started again, they replay from the answer cache."""
        from tqdm import tqdm

        current = self.figures("validation", await self.judged(self.principles, "validation", self.bank))
        self.record(0, self.principles, current, True, "the seed")
        idle = 0
        with tqdm(range(1, self.args.rounds + 1), desc="rounds", unit="round") as bar:
            for number in bar:
                current = await self.round(number, current)
                idle = 0 if self.versions[-1]["accepted"] else idle + 1
                fooled = current["false_accept"]["value"] or 0
                bar.set_postfix(kappa=f"{current['kappa']:.2f}", false_accept=f"{fooled:.0%}")
                if idle >= self.args.patience:
                    break

    async def report(self, versions: list[dict]) -> dict:
        """The figures of the test part and of the unseen bank, which no round has looked at."""
        unseen, rows = fixed_attacks(self.args, self.references, held_out=True), self.parts["test"]
        seed, final = versions[0]["principles"], [v["principles"] for v in versions if v["accepted"]][-1]
        first, last = await self.judged(seed, "test", unseen), await self.judged(final, "test", unseen)
        repeats = [await self.verdicts(rows, final, again) for again in range(1, self.args.repeat + 1)]
        turned = [await self.verdicts(rows, final[::-1])] if self.args.repeat else []
        left_out = []
        for number, rule in enumerate(final if self.args.attribute else []):
            rest = final[:number] + final[number + 1 :]
            found = self.figures("test", await self.judged(rest, "test", unseen)) if rest else {}
            left_out.append({"without": rule, **{name: found.get(name) for name in ("kappa", "false_accept")}})
        return {
            "test": {"seed": self.figures("test", first), "final": self.figures("test", last)},
            "constant": len(set(last[0]) - {None}) < 2,
            "same_when_asked_again": same(last[0], repeats), "same_in_reverse_order": same(last[0], turned),
            "attribute": left_out, "failures": self.failures + Counter(versions[-1]["failures"]),
            "versions": len(versions), "accepted": sum(v["accepted"] for v in versions) - 1,
            "redteam": versions[-1]["bank"], "tokens": versions[-1]["tokens"]["so_far"],
            "principles": final, "strategies": versions[-1]["strategies"],
            "ledger": self.client.store.ledger(ROLES),
        }  # fmt: skip


async def refine(args: argparse.Namespace, *data: object) -> None:
    """Write principles.jsonl and redteam.jsonl."""
    async with Client(args, args.run) as client:
        await Loop(args, client, *data).refine()


async def report(args: argparse.Namespace, versions: list[dict], *data: object) -> dict:
    """The figures for the summary."""
    async with Client(args, args.run) as client:
        return await Loop(args, client, *data).report(versions)


def same(first: list[int | None], others: list[list[int | None]]) -> dict:
    """How often later verdicts are the first one; rows that lack one are left out."""
    pairs = [(a, b) for other in others for a, b in zip(first, other, strict=True) if None not in (a, b)]
    return rate(sum(a == b for a, b in pairs), len(pairs))


def draw(path: Path, versions: list[dict]) -> None:
    """Kappa, F1 and false accepts on the validation part over the rounds; accepted rewrites o, rejected ones x."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    rounds = [v["round"] for v in versions]
    shown = {
        "kappa": lambda f: f["kappa"],
        "F1": lambda f: f["f1"],
        "attacks accepted": lambda f: f["false_accept"]["value"],
    }
    for name, pick in shown.items():
        (line,) = axes.plot(rounds, [pick(v["validation"]) for v in versions], label=name, linewidth=1)
        for v in versions:
            axes.plot(v["round"], pick(v["validation"]), "o" if v["accepted"] else "x", color=line.get_color())
    axes.set(xlabel="round (o accepted, x rejected)", ylim=(-0.1, 1.05))
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def null_baselines(parts: dict[str, list[Labelled]]) -> dict:
    """What text length and character n-grams reach on the test part, fitted on the other two parts."""
    seen, test = parts["reflect"] + parts["validation"], parts["test"]
    said = null_verdicts([r.response for r in seen], [r.label for r in seen], [r.response for r in test])
    return {name: agreement([r.label for r in test], verdicts) for name, verdicts in said.items()}


def main(args: argparse.Namespace) -> int:
    started = time.time()
    rows, references = read(args.labelled, Labelled), read(args.references, Reference)
    queries = read(args.queries, Query)
    parts = split_labelled(rows, args.seed)
    open_run(args.run)
    loop = Stage(
        args.run, "03_principles", ["principles.jsonl", "redteam.jsonl"],
        {"labelled": file_hash(args.labelled), "references": file_hash(args.references),
         "queries": file_hash(args.queries), "principles": file_hash(args.principles),
         "prompts": prompt_hashes([*ROLES, "strategies"], args.prompts),
         "endpoint": endpoint_name(args), "seed": args.seed, "rounds": args.rounds, "patience": args.patience,
         "batch": args.batch, "attacks": args.attacks, "bank": args.bank, "votes": args.votes, "graded": args.graded,
         "no_adversary": args.no_adversary, "no_reflection": args.no_reflection, "no_acceptance": args.no_acceptance},
        args.redo,
    )  # fmt: skip
    if not loop.done:
        asyncio.run(refine(args, parts, references, queries))
        loop.finish()
    done = Stage(
        args.run, "03_report", ["03_summary.json", "principles.svg"],
        {"principles": file_hash(args.run / "principles.jsonl"), "repeat": args.repeat, "attribute": args.attribute},
        redo=True,  # nothing is lost: its answers are kept
    )  # fmt: skip
    if done.done:
        print(f"03: done already, see {args.run / '03_summary.json'}")
        return 0
    with jsonlines.open(args.run / "principles.jsonl") as lines:
        versions = list(lines)
    figures = asyncio.run(report(args, versions, parts, references, queries))
    draw(args.run / "principles.svg", versions)
    figures |= {"parts": {name: len(part) for name, part in parts.items()}, "baselines": null_baselines(parts)}
    write_summary(args.run, "03_summary", started, vars(args), figures)
    done.finish()
    shown = {"seed principles": figures["test"]["seed"], "final principles": figures["test"]["final"]}
    for name, f in (shown | {f"baseline: {k}": v for k, v in figures["baselines"].items()}).items():
        bank = f"; unseen attacks accepted {f['false_accept']['value'] or 0:.1%}" if "false_accept" in f else ""
        interval = f"[{f['kappa_lo']:+.2f}, {f['kappa_hi']:+.2f}]"
        print(f"03: {name:30} kappa {f['kappa']:+.2f} {interval}  n {f['n']}{bank}")
    for row in figures["attribute"]:
        if row["kappa"] is not None:
            fooled = row["false_accept"]["value"] or 0
            print(f"03: kappa {row['kappa']:+.2f}, attacks accepted {fooled:.1%} without: {row['without']}")
    for name in ("same_when_asked_again", "same_in_reverse_order"):
        if (r := figures[name])["n"]:
            print(f"03: {name.replace('_', ' ')}: {r['value']:.1%} [{r['lo']:.1%}, {r['hi']:.1%}]  n {r['n']}")
    if figures["constant"]:
        print("03: the final judge says the same of every greeting: its agreement means nothing (kappa 0)")
    rounds, accepted = figures["versions"] - 1, figures["accepted"]
    print(f"03: {rounds} rounds, {accepted} rewrites accepted; {args.run / 'principles.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
