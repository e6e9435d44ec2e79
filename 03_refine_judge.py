"""Step 3: train the judge's principles by an adversarial loop, and reject what makes the judge worse on validation.

Each round a Generator writes subtly flawed greetings under strategies S_G and explains the flaw; the Detector judges
them under principles S_D. Caught: its reason sharpens S_G. Fooled: the explanation sharpens S_D. Then the Detector
judges labelled greetings, good and bad, and for each mistake a Reflector proposes a change to S_D. An Optimiser turns
the feedback into at most 10 rules per side; rules that quote a labelled greeting are refused. New principles replace
the old only if agreement with the labels of the validation part does not fall, on the same rows, and the red-team
bank fools the Detector no more often; otherwise they are rolled back. The test part, and a second bank of attacks on
other greetings, are looked at once, at the end.

Reads   labelled greetings, references, queries; prompts/principles.md and prompts/strategies.md, the seeds
Writes  principles.jsonl (a line per version, accepted or not and why), redteam.jsonl, principles.svg, 03_summary.json
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
from collections.abc import Awaitable, Iterable
from pathlib import Path

from common import records, run_folder, stats
from common.answers import A, FlawedGreeting, Lesson, Rules, Unusable, Verdict
from common.client import Client, gather_or_unusable
from common.endpoint import add_endpoint_flags, endpoint_name
from common.failures import what_next
from common.judge import judge_greeting
from common.policy import add_policy_flags
from common.prompts import prompt_hashes, read_rules
from common.run_folder import ROOT, Stage, digest, positive
from common.spoilt import attack_bank
from common.texts import ngrams
from common.trainers import draw_curves

ROLES = ["detector", "generator", "reflector", "optimiser"]
QUOTE = 10  # characters in a row that a rule and a labelled greeting may not share
DECIDED = 0.8  # share of the rows that both versions must have judged for a round to be decided
BATCH_OF_BANK = 6  # attacks that the Reflector looks at beside the labelled rows
UNHEARD = "not heard: "  # in the `why` of a round that an agent's silence has decided


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data").add_argument
    data("--labelled", type=Path, default=ROOT / "data/labelled.jsonl", help="{query, response, label 0|1}")
    data("--references", type=Path, default=ROOT / "data/references.jsonl", help="{query, response}")
    data("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="what the Generator writes for")
    data("--from", dest="principles", type=Path, help="the first principles (prompts/principles.md)")
    loop = parser.add_argument_group("loop").add_argument
    loop("--rounds", type=positive, default=8, help="at most (%(default)s)")
    loop("--patience", type=positive, default=3, help="rejected rounds in a row that end the loop (%(default)s)")
    loop("--batch", type=positive, default=24, help="labelled rows the Reflector looks at in a round (%(default)s)")
    loop("--attacks", type=positive, default=12, help="flawed greetings written in a round (%(default)s)")
    loop("--bank", type=positive, default=78, help="fixed attacks in each of the two banks (%(default)s)")
    loop("--no-adversary", action="store_true", help="ablation: no Generator")
    loop("--no-reflection", action="store_true", help="ablation: no Reflector")
    loop("--no-acceptance", action="store_true", help="ablation: every rewrite is accepted")
    report = parser.add_argument_group("report").add_argument
    report("--repeat", type=int, default=0, help="judge the test part this many times more: is the judge consistent?")
    report("--attribute", action="store_true", help="judge the test part without each principle: what does it add?")
    add_policy_flags(parser)  # not used here: run.sh gives every step the same flags
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    args = run_folder.parse(parser, offline={})  # the same settings: the critic is quick
    args.principles = args.principles or args.prompts / "principles.md"
    return args


class Agents:
    """Asks the agents, many questions at once, and counts those without a usable answer."""

    def __init__(self, client: Client):
        self.client, self.last_failure = client, ""
        self.failures: Counter[str] = Counter()

    async def answers(self, questions: Iterable[Awaitable[A]]) -> list[A | None]:
        """The answers to questions of `Client.ask`, None where no usable one came."""
        answers = await gather_or_unusable(*questions)
        for i, answer in enumerate(answers):
            if isinstance(answer, Unusable):
                self.failures[str(answer)] += 1
                answers[i], self.last_failure = None, str(answer)
        return answers

    async def judge(self, rows: list[dict], principles: list[str], again: int = 0) -> list[Verdict | None]:
        """The Detector's verdicts with their reasons; another `again` asks for new ones."""
        judging = (judge_greeting(self.client, row["query"], row["response"], principles, again) for row in rows)
        return await self.answers(judging)

    async def verdicts(self, rows: list[dict], principles: list[str], again: int = 0) -> list[int | None]:
        """The bare verdicts: 1, 0, or None where none came."""
        answers = await self.judge(rows, principles, again)
        return [answer.verdict if answer else None for answer in answers]


def figures_of(rows: list[dict], verdicts: list[int | None]) -> dict:
    """Agreement with the rows' labels, and how often the bank is accepted; `verdicts` on the rows, then on the bank."""
    figures = stats.agreement(stats.column(rows, "label"), verdicts[: len(rows)], stats.column(rows, "query"))
    bank = verdicts[len(rows) :]
    return figures | {"false_accept": stats.rate(bank.count(1), len(bank) - bank.count(None))}


def objection(rows: list[dict], old: list[int | None], new: list[int | None]) -> str:
    """Why new principles may not replace the old; "" if they may. The verdicts are as for `figures_of`."""
    # Compare on the same rows: what only one version has judged says nothing about which of them is better.
    both = [pair if None not in pair else (None, None) for pair in zip(old, new, strict=True)]
    old, new = map(list, zip(*both, strict=True))
    for part in (old[: len(rows)], old[len(rows) :]):
        if len(part) - part.count(None) < DECIDED * len(part):
            return f"only {len(old) - old.count(None)} of {len(old)} rows have a verdict of both: not decided"
    before, after = figures_of(rows, old), figures_of(rows, new)
    if after["kappa"] < before["kappa"]:
        return f"kappa on validation would fall from {before['kappa']:.3f} to {after['kappa']:.3f}"
    accepted_before, accepted_after = before["false_accept"]["value"] or 0, after["false_accept"]["value"] or 0
    if accepted_after > accepted_before:
        return f"red-team bank would be accepted more often: {accepted_before:.1%} to {accepted_after:.1%}"
    return ""


class Loop:
    """What the rounds change: the principles, the strategies, the red-team bank, and the record of versions."""

    def __init__(self, args: argparse.Namespace, client: Client, parts: dict, references: list, queries: list):
        self.args, self.client, self.agents, self.unheard = args, client, Agents(client), ""
        self.parts, self.validation, self.references, self.queries = parts, parts["validation"], references, queries
        self.principles = read_rules(args.principles)
        self.strategies = read_rules(args.prompts / "strategies.md")
        self.bank = attack_bank(references, args.bank, args.seed, held_out=False)
        self.versions: list[dict] = []
        self.quotable: set[str] = set()  # a rule that quotes a labelled greeting would know the answers
        for rows in parts.values():
            for row in rows:
                self.quotable.update(ngrams(row["response"], QUOTE))

    async def play_round(self, number: int, current: dict) -> dict:
        """One round; returns the validation figures of the principles in force after it."""
        self.unheard = self.agents.last_failure = ""  # which agent's answers a rewrite lacks in this round, and why
        # The Generator attacks. An attack that fooled the Detector says which principle is missing.
        attacks = [] if self.args.no_adversary else await self.attack(self.strategies, number)
        fooling = [attack for attack in attacks if attack["fooled"]]
        feedback = [f"补上：{attack['flaw']}" for attack in fooling]
        # The Reflector says what is wrong with the principles where the Detector contradicts a label.
        if not self.args.no_reflection:
            feedback += await self.reflect(number)
        proposed = await self.optimise("准则", self.principles, feedback)

        # The bank grows by what fooled the Detector, so that later principles are held to it too; but only where the
        # Detector sees the flaw once it is named: a Generator that failed to write one must not spoil the bank.
        for attack in fooling:
            known = attack["response"] in stats.column(self.bank, "response")
            if not known and await self.agents.verdicts([attack], [*self.principles, attack["flaw"]]) == [0]:
                row = {"query": attack["query"], "response": attack["response"], "flaw": attack["flaw"]}
                self.bank.append(row | {"source": f"round {number}"})

        # New principles replace the old only if they are no worse, on rows that they were not made from.
        figures, accepted, why = current, False, self.unheard or "no usable change proposed"
        if proposed != self.principles:
            rows = self.validation + self.bank  # under the old ones again: the bank may have grown
            old, new = await self.agents.verdicts(rows, self.principles), await self.agents.verdicts(rows, proposed)
            current, figures = figures_of(self.validation, old), figures_of(self.validation, new)
            why = "" if self.args.no_acceptance else objection(self.validation, old, new)
            accepted, why = not why, why or "agreement and red-team bank no worse"
            if accepted:
                self.principles, current = proposed, figures

        if attacks:
            await self.sharpen_strategies(attacks, number)
        if self.unheard and self.unheard not in why:
            why += f"; {self.unheard}"
        self.record(number, proposed, figures, accepted, why)
        return current

    async def attack(self, strategies: list[str], number: int) -> list[dict]:
        """Flawed greetings by the Generator for this round's queries, judged by the Detector: `fooled` tells how.

        Called twice in a round, it draws the same queries and examples: the strategies are all that differs.
        """
        rng = random.Random(digest(self.args.seed, "queries", number))
        tasks, writing = [], []
        for i, query in enumerate(rng.sample(self.queries, min(self.args.attacks, len(self.queries)))):
            tasks.append({"query": query.query, "strategy": strategies[i % len(strategies)]})
            examples = [{"query": r.query, "response": r.response} for r in rng.sample(self.references, 2)]
            writing.append(self.client.ask("generator", FlawedGreeting, temperature=0.7, examples=examples, **tasks[i]))
        greetings = await self.agents.answers(writing)
        attacks = [task | flawed.model_dump() for task, flawed in zip(tasks, greetings, strict=True) if flawed]
        for attack, verdict in zip(attacks, await self.agents.judge(attacks, self.principles), strict=True):
            if verdict:
                attack |= {"reason": verdict.reason, "fooled": verdict.verdict == 1}
        return [attack for attack in attacks if "fooled" in attack]

    async def reflect(self, number: int) -> list[str]:
        """What the Reflector learns from the Detector's mistakes on a batch of labelled rows and on the bank."""
        rng = random.Random(digest(self.args.seed, "batch", number))
        rows = rng.sample(self.parts["reflect"], min(self.args.batch, len(self.parts["reflect"])))
        rows += [attack | {"label": 0} for attack in rng.sample(self.bank, min(BATCH_OF_BANK, len(self.bank)))]
        reflecting = []
        for row, verdict in zip(rows, await self.agents.judge(rows, self.principles), strict=True):
            if verdict and verdict.verdict != row["label"]:
                slots = {"query": row["query"], "response": row["response"], "expected": row["label"]}
                slots |= {"verdict": verdict.verdict, "reason": verdict.reason, "principles": self.principles}
                reflecting.append(self.client.ask("reflector", Lesson, **slots))
        lessons = await self.agents.answers(reflecting)
        return [lesson.lesson for lesson in lessons if lesson]

    async def optimise(self, kind: str, rules: list[str], feedback: list[str]) -> list[str]:
        """At most ten rules rewritten from the feedback; the old ones where there is none or no usable answer."""
        answer, counts = None, Counter(feedback)
        # Where all of it is too long for the endpoint, the start of what was said most often may not be.
        for items, length in (counts.items(), None), (counts.most_common(10), 100):
            if feedback and not answer:
                counted = [f"{item[:length]}（{times} 次）" for item, times in items]
                question = self.client.ask("optimiser", Rules, kind=kind, rules=rules, feedback=counted)
                (answer,) = await self.agents.answers([question])
        if not answer:
            silent = "the optimiser" if feedback else "one who gives feedback"
            self.unheard = self.agents.last_failure and f"{silent} was {UNHEARD}{self.agents.last_failure}"
            return rules
        proposed = dict.fromkeys(" ".join(rule.split()) for rule in answer.rules if rule.strip())
        original = [rule for rule in proposed if self.quotable.isdisjoint(ngrams(rule, QUOTE))]
        self.agents.failures["a rule that quotes a labelled greeting"] += len(proposed) - len(original)
        return original or rules

    async def sharpen_strategies(self, attacks: list[dict], number: int) -> None:
        """Let the Optimiser rewrite the strategies, and keep that if they fool the Detector no less often."""
        feedback = []
        for attack in sorted(attacks, key=lambda attack: attack["fooled"]):  # those that were caught come first
            caught = f"被识破：{attack['strategy']}。评审的理由：{attack['reason']}"
            feedback.append(f"成功：{attack['strategy']}" if attack["fooled"] else caught)
        strategies = await self.optimise("策略", self.strategies, feedback)
        new_attacks = await self.attack(strategies, number) if strategies != self.strategies else []
        # Both against the Detector as it is now: the principles may be other ones than the attacks were judged under.
        old_verdicts = await self.agents.verdicts(attacks, self.principles)
        fooled = sum(stats.column(new_attacks, "fooled"))
        if new_attacks and fooled / len(new_attacks) >= old_verdicts.count(1) / len(old_verdicts):
            self.strategies = strategies

    def record(self, number: int, principles: list[str], validation: dict, accepted: bool, why: str) -> None:
        """Add a version and write the files. Stored answers count among its tokens: replayed, it is the same."""
        before = self.versions[-1]["tokens"]["so_far"] if self.versions else [0, 0]
        so_far = [sum(side) for side in zip((0, 0), *self.client.answered.values(), strict=True)]  # input and output
        version = {"version": len(self.versions), "round": number, "principles": principles}
        version |= {"strategies": self.strategies, "validation": validation, "bank": len(self.bank)}
        version |= {"accepted": accepted, "why": why, "model": self.client.model}
        version |= {"prompts": prompt_hashes(ROLES, self.args.prompts), "failures": dict(self.agents.failures)}
        version["tokens"] = {"round": [so_far[0] - before[0], so_far[1] - before[1]], "so_far": so_far}
        self.versions.append(version)
        records.write(self.args.run / "principles.jsonl", self.versions)
        records.write(self.args.run / "redteam.jsonl", self.bank)


async def refine(args: argparse.Namespace, *data: object) -> None:
    """All rounds: writes principles.jsonl and redteam.jsonl. Killed and started again, they replay from the store."""
    from tqdm import tqdm

    async with Client(args, "03") as client:
        loop = Loop(args, client, *data)
        verdicts = await loop.agents.verdicts(loop.validation + loop.bank, loop.principles)
        current = figures_of(loop.validation, verdicts)
        loop.record(0, loop.principles, current, True, "the seed")
        rejected_in_a_row = 0
        with tqdm(range(1, args.rounds + 1), desc="rounds", unit="round") as bar:
            for number in bar:
                current = await loop.play_round(number, current)
                version = loop.versions[-1]
                if UNHEARD not in version["why"]:  # else the round says nothing about the principles
                    rejected_in_a_row = 0 if version["accepted"] else rejected_in_a_row + 1
                false_accept = current["false_accept"]["value"] or 0
                bar.set_postfix(kappa=f"{current['kappa']:.2f}", false_accept=f"{false_accept:.0%}")
                if rejected_in_a_row >= args.patience:
                    break


async def report(args: argparse.Namespace, versions: list[dict], test: list[dict], unseen: list[dict]) -> dict:
    """The figures of the test part and of the unseen bank, which no round has looked at."""
    accepted = [version["principles"] for version in versions if version["accepted"]]
    final, last = accepted[-1], versions[-1]
    async with Client(args, "03") as client:
        agents = Agents(client)
        on_seed = await agents.verdicts(test + unseen, accepted[0])
        on_final = await agents.verdicts(test + unseen, final)
        # Does the judge repeat itself, and does the order of the principles matter?
        again = [await agents.verdicts(test, final, number) for number in range(1, args.repeat + 1)]
        reverse = [await agents.verdicts(test, final[::-1])] if args.repeat else []
        # What does each principle add? The judge without it tells; the only one cannot be left out.
        attribution = []
        for number, rule in enumerate(final if args.attribute and len(final) > 1 else []):
            verdicts = await agents.verdicts(test + unseen, final[:number] + final[number + 1 :])
            figures = figures_of(test, verdicts)
            attribution.append({"without": rule, "kappa": figures["kappa"], "false_accept": figures["false_accept"]})
    on_test = on_final[: len(test)]
    return {
        "test": {"seed": figures_of(test, on_seed), "final": figures_of(test, on_final)},
        "constant": len(set(on_test) - {None}) < 2,
        "same_when_asked_again": share_of_same(on_test, again),
        "same_in_reverse_order": share_of_same(on_test, reverse),
        "attribute": attribution,
        "failures": agents.failures + Counter(last["failures"]),
        "versions": len(versions),
        "accepted": len(accepted) - 1,
        "tokens": last["tokens"]["so_far"],
        "principles": final,
        "ledger": client.store.ledger(),
    }


def share_of_same(first: list[int | None], others: list[list[int | None]]) -> dict:
    """How often later verdicts equal the first one; rows that lack one of the two are left out."""
    pairs = [pair for later in others for pair in zip(first, later, strict=True) if None not in pair]
    return stats.rate(sum(one == other for one, other in pairs), len(pairs))


def null_baselines(parts: dict[str, list[dict]]) -> dict:
    """What text length and character n-grams reach on the test part, fitted on the other two parts."""
    seen, test = parts["reflect"] + parts["validation"], parts["test"]
    texts, labels, queries = stats.column(test, "response"), stats.column(test, "label"), stats.column(test, "query")
    verdicts = stats.null_verdicts(stats.column(seen, "response"), stats.column(seen, "label"), texts)
    return {name: stats.agreement(labels, guesses, queries) for name, guesses in verdicts.items()}


def draw(path: Path, versions: list[dict]) -> None:
    """The validation part by round: figures of what was proposed, and of what was accepted."""
    panels: dict[str, dict] = {name: {"proposed": [], "accepted": []} for name in ("kappa", "F1", "attacks accepted")}
    for version in versions:
        figures = version["validation"]
        figures = figures | {"F1": figures["f1"], "attacks accepted": figures["false_accept"]["value"] or 0}
        for name, lines in panels.items():
            lines["proposed"].append((version["round"], figures[name]))
            if version["accepted"]:
                lines["accepted"].append((version["round"], figures[name]))
    draw_curves(path, panels, xlabel="round")


def print_figures(args: argparse.Namespace, figures: dict) -> None:
    judges = {"seed principles": figures["test"]["seed"], "final principles": figures["test"]["final"]}
    for name, baseline in figures["baselines"].items():
        judges[f"baseline: {name}"] = baseline
    for name, f in judges.items():
        bank = f"; unseen attacks accepted {f['false_accept']['value'] or 0:.1%}" if "false_accept" in f else ""
        print(f"03: {name:30} kappa {f['kappa']:+.2f} [{f['kappa_lo']:+.2f}, {f['kappa_hi']:+.2f}]  n {f['n']}{bank}")
    for row in figures["attribute"]:
        accepted = row["false_accept"]["value"] or 0
        print(f"03: kappa {row['kappa']:+.2f}, attacks accepted {accepted:.1%} without: {row['without']}")
    for name in ("same_when_asked_again", "same_in_reverse_order"):
        share = figures[name]
        if share["n"]:
            interval = f"{share['value']:.1%} [{share['lo']:.1%}, {share['hi']:.1%}]"
            print(f"03: {name.replace('_', ' ')}: {interval}  n {share['n']}")
    if figures["constant"]:
        print("03: the final judge says the same of every greeting: its agreement means nothing (kappa 0)")
    rounds = figures["versions"] - 1
    print(f"03: {rounds} rounds, {figures['accepted']} rewrites accepted; {args.run / 'principles.jsonl'}")


def main(args: argparse.Namespace) -> int:
    started = time.time()
    references, queries = records.read(args.references, records.Reference), records.read(args.queries, records.Query)
    labelled = records.split_labelled(records.read(args.labelled, records.Labelled), args.seed)
    parts = {name: [row.model_dump() for row in rows] for name, rows in labelled.items()}
    run_folder.open_run(args.run)

    settings = run_folder.settings(args, "data", "loop") | {"endpoint": endpoint_name(args), "graded": args.graded}
    settings["prompts"] = prompt_hashes([*ROLES, "strategies"], args.prompts)
    loop = Stage(args.run, "03_principles", ["principles.jsonl", "redteam.jsonl"], settings, args.redo)
    if not loop.replaced:  # of all calls that ended and made what there is
        started -= run_folder.read_summary(args.run, "03_summary").get("seconds", 0)
    if not loop.done:
        asyncio.run(refine(args, parts, references, queries))
    versions = records.read_lines(args.run / "principles.jsonl")
    unheard = [version["why"] for version in versions if UNHEARD in version["why"]]
    code, advice = what_next(unheard)
    if unheard:  # the stage stays open: another call asks for those answers again
        print(f"03: {len(unheard)} of {len(versions) - 1} rounds lack answers ({unheard[-1]}); {advice}")
    else:
        loop.finish()

    settings = run_folder.settings(args, "report") | {"principles": run_folder.file_hash(args.run / "principles.jsonl")}
    # Other flags replace the report without --redo: its answers are stored, so nothing is lost.
    summary = Stage(args.run, "03_report", ["03_summary.json", "principles.svg"], settings, redo=True)
    if summary.done:
        print(f"03: done already, see {args.run / '03_summary.json'}")
        return code
    unseen = attack_bank(references, args.bank, args.seed, held_out=True)
    figures = asyncio.run(report(args, versions, parts["test"], unseen))
    figures["parts"] = {name: len(rows) for name, rows in parts.items()}
    figures["baselines"] = null_baselines(parts)
    draw(args.run / "principles.svg", versions)
    run_folder.write_summary(args, "03_summary", started, figures)
    summary.finish()
    print_figures(args, figures)
    return code


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
