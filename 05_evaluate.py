"""Step 5: every policy writes for the same held-out queries; score the greetings, and say how far to trust the scores.

Greetings of base, SFT and both GRPO policies are graded on five dimensions by the rubric judge (excellent: weighted
mean of at least 2), and judged by the refined judge, by the five agents of step 1 and by the reward model. Every
evaluator is itself evaluated on labelled greetings that step 3 never looked at, beside what text length and character
n-grams reach.

Reads   held-out queries, labelled greetings, the policies, rm/ and principles.jsonl of the run
Writes  generations.jsonl, scores.jsonl, results.jsonl, report.html, report.md, 05_summary.json; evaluators/, where
        step 1 judges the same greetings
Paper   arXiv 2508.21476: language 30, creativity 30, emotion 15, culture 15, richness 10; each 1-3. Departures:
        intervals by bootstrap over queries; length and diversity beside each score, null baselines beside evaluators.
Example python 05_evaluate.py --offline --run outputs/mine
"""

import argparse
import asyncio
import io
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from common import llm, models
from common.records import (
    ROOT,
    Candidate,
    Demonstration,
    Judgement,
    Labelled,
    Query,
    Stage,
    add_run_flags,
    agreement,
    digest,
    fail,
    file_hash,
    launch,
    open_run,
    parse,
    read,
    read_summary,
    replace_file,
    split_labelled,
    write,
    write_summary,
)

OFFLINE = {"bits": 16, "samples": 2, "max_tokens": 48, "batch_size_generate": 260}
EXCELLENT = 2.0  # least weighted mean of the grades
POLICIES = {"base": None, "sft": "policy_sft", "grpo_rm": "policy_rm", "grpo_judge": "policy_judge"}
# Evaluators that were the reward of a policy: their score for it says nothing new.
REWARD_OF = {"reward_model": "grpo_rm", "judge": "grpo_judge"}
ROLES = ["policy", "rubric", "detector", "positive", "negative", "judge", "reflect"]
RESAMPLES = 2000  # of the bootstrap


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=Path, default=ROOT / "data/queries_heldout.jsonl", help="held-out queries")
    parser.add_argument(
        "--labelled", type=Path, default=ROOT / "data/labelled.jsonl", help="{query, response, label 0|1}"
    )
    parser.add_argument("--samples", type=int, default=1, help="greetings a policy and query (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="%(default)s")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a greeting (%(default)s)")
    models.add_policy_flags(parser)
    llm.add_endpoint_flags(parser)
    add_run_flags(parser)
    return parse(parser, OFFLINE)


# ---- greetings ------------------------------------------------------------------------------------------------------


def present_policies(args: argparse.Namespace, base: str) -> dict[str, Path | None]:
    """The policies of this run; one that is missing is named, with the command that makes it."""
    found: dict[str, Path | None] = {}
    for name, folder in POLICIES.items():
        adapter = args.run / folder if folder else None
        if adapter and not (adapter / "adapter_config.json").is_file():
            reward = {"sft": "none", "grpo_rm": "rm", "grpo_judge": "judge"}[name]
            print(
                f"05: no {adapter}; make it with: python 04_grpo.py --reward {reward} --run {args.run}", file=sys.stderr
            )
            continue
        if adapter:
            models.check_adapter(adapter, base)
        found[name] = adapter
    return found


def write_greetings(args: argparse.Namespace, base: str, policies: dict, queries: list[Query]) -> list[dict]:
    """Greetings of every policy for every query, with the same seeds; also in generations.jsonl."""
    rows = []
    for name, adapter in policies.items():
        model, tokenizer = models.load_policy(base, args.bits, adapter)
        conversations = [models.conversation(q.query, args.prompts) for q in queries]
        for sample in range(args.samples):
            texts = models.generate(
                model, tokenizer, conversations, temperature=args.temperature, top_p=1.0, max_tokens=args.max_tokens,
                batch_size=args.batch_size_generate, seed=args.seed + sample, progress=f"greetings of {name}",
            )  # fmt: skip
            rows += [
                {"id": digest(name, q.id, sample), "policy": name, "query_id": q.id, "query": q.query,
                 "response": text or "（空）", "sample": sample}
                for q, text in zip(queries, texts, strict=True)
            ]  # fmt: skip
        del model
    write(args.run / "generations.jsonl", rows)
    return rows


# ---- evaluators -----------------------------------------------------------------------------------------------------


async def ask_judges(args: argparse.Namespace, rows: list[dict], principles: dict[str, list[str]]) -> dict:
    """Add to each row the rubric's grades and the verdict under each set of principles; None where none came.

    Returns what it cost.
    """
    from tqdm import tqdm

    async def one(client: llm.Client, row: dict) -> None:
        seen = {"query": row["query"], "response": row["response"]}
        try:
            grades = await client.ask("rubric", llm.Grades, **seen)
            row["grades"] = {name: getattr(grades, name) for name in llm.WEIGHTS}
            row["quality"] = grades.quality
            row["excellent"] = int(row["quality"] >= EXCELLENT)
        except llm.Unusable:
            row["grades"], row["quality"], row["excellent"] = None, None, None
        for name, rules in principles.items():
            try:
                row[name] = (await llm.judge(client, **seen, principles=rules)).verdict
            except llm.Unusable:
                row[name] = None
        bar.update()

    async with llm.Client(args, args.run) as client:
        before = client.store.ledger(["rubric", "detector"])
        with tqdm(total=len(rows), desc="rubric and judge", unit="greeting") as bar:
            await llm.together(*(one(client, row) for row in rows))
        return client.store.ledger(["rubric", "detector"], since=before)


def ask_agents(args: argparse.Namespace, rows: list[dict]) -> None:
    """Add to each row the verdict of the five agents: step 1, run on these greetings in a folder of its own."""
    folder = args.run / "evaluators"
    distinct = {Candidate(query=r["query"], response=r["response"]).id: r for r in rows}
    write(folder / "greetings.jsonl", ({"query": r["query"], "response": r["response"]} for r in distinct.values()))
    command = [sys.executable, str(ROOT / "01_curate_preferences.py"), "--run", str(folder), "--samples", "0", "--redo"]
    command += ["--candidates", str(folder / "greetings.jsonl"), "--prompts", str(args.prompts)]
    command += ["--seed", str(args.seed), "--max-similar", "1", "--max-copied", "1"]  # every one is judged
    command += ["--base-url", args.base_url, "--model", args.model, "--api-key-env", args.api_key_env]
    command += ["--concurrency", str(args.concurrency), "--timeout", str(args.timeout)]
    command += ["--attempts", str(args.attempts), "--votes", str(args.votes)] + ["--offline"] * args.offline
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    judgements = folder / "judgements.jsonl"
    if done.returncode not in (0, 3):  # 3: some judgements failed, and stand without a label
        fail(f"step 1 could not judge the greetings: run {' '.join(command)}")
    verdicts = {r.id: r.label for r in read(judgements, Judgement)}
    for row in rows:
        row["agents"] = verdicts.get(Candidate(query=row["query"], response=row["response"]).id)


def ask_reward_model(args: argparse.Namespace, base: str, rows: list[dict]) -> None:
    rm = models.RewardModel(args.run / "rm", base, args.bits, args.prompts)
    for row, score in zip(rows, rm.score([(r["query"], r["response"]) for r in rows]), strict=True):
        row["reward_model"] = score


def evaluate_evaluators(labelled: list[dict], seed: int) -> dict[str, dict]:
    """Agreement of every evaluator with the labels of the part that nobody has looked at, beside two null baselines.

    An evaluator that gives a score says "good" from the threshold that is best on the other parts.
    """
    seen, test = [r for r in labelled if r["part"] != "test"], [r for r in labelled if r["part"] == "test"]
    labels = [r["label"] for r in test]
    found = {
        name: agreement(labels, [r.get(name) for r in test])
        for name in ("excellent", "judge", "seed_judge", "agents") if any(r.get(name) is not None for r in test)
    }  # fmt: skip
    found = {("rubric (excellent)" if name == "excellent" else name): figures for name, figures in found.items()}
    if "reward_model" in test[0]:
        ranked = sorted(r["reward_model"] for r in seen)
        threshold = max(ranked, key=lambda t: sum((r["reward_model"] >= t) == r["label"] for r in seen))
        found["reward_model"] = agreement(labels, [int(r["reward_model"] >= threshold) for r in test])
    least = models.length_rule([r["response"] for r in seen], [r["label"] for r in seen])
    ngrams = models.NgramClassifier([r["response"] for r in seen], [r["label"] for r in seen], seed)
    found["null: length"] = agreement(labels, [int(len(r["response"]) >= least) for r in test])
    found["null: n-grams"] = agreement(labels, [int(odds > 0) for odds in ngrams([r["response"] for r in test])])
    return found


# ---- figures --------------------------------------------------------------------------------------------------------


def query_means(rows: list[dict], key: str) -> dict[str, float]:
    """Query id -> mean of the rows' values, without rows that have none."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            groups.setdefault(row["query_id"], []).append(row[key])
    return {query: sum(values) / len(values) for query, values in groups.items()}


def bootstrap(means) -> dict:
    """Mean of an array of means by query, and its 95% percentile interval.

    The queries are drawn again, not the greetings: several greetings for one query are not independent.
    """
    import numpy as np

    if not len(means):
        return {"value": None, "lo": None, "hi": None, "n": 0}
    draws = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
    lo, hi = np.percentile(means[draws].mean(axis=1), [2.5, 97.5])
    return {
        "value": round(float(means.mean()), 4),
        "lo": round(float(lo), 4),
        "hi": round(float(hi), 4),
        "n": len(means),
    }


def mean_of(rows: list[dict], key: str) -> dict:
    import numpy as np

    return bootstrap(np.array(list(query_means(rows, key).values())))


def difference(rows: list[dict], after: str, before: str, key: str) -> dict:
    """Mean of `after` minus mean of `before`, paired by query, and in words whether it is more than noise."""
    import numpy as np

    means = [query_means([r for r in rows if r["policy"] == name], key) for name in (after, before)]
    both = sorted(means[0].keys() & means[1].keys())  # queries for which both have a score
    gap = bootstrap(np.array([means[0][query] - means[1][query] for query in both]))
    more = gap["n"] and (gap["lo"] > 0 or gap["hi"] < 0)
    return gap | {"words": "more than noise" if more else "inside noise"}


def policy_figures(rows: list[dict], training_runs: set[str]) -> dict:
    """Scores, length and diversity of one policy's greetings."""
    texts = [r["response"] for r in rows]
    grams = {n: [t[i : i + n] for t in texts for i in range(len(t) - n + 1)] for n in (1, 2)}
    openings = Counter(t[:2] for t in texts)
    figures = {
        "excellence": mean_of(rows, "excellent"),
        "judge": mean_of(rows, "judge"), "agents": mean_of(rows, "agents"),
        "reward_model": mean_of(rows, "reward_model"), "quality": mean_of(rows, "quality"),
        "length": round(sum(map(len, texts)) / len(texts), 1),
        "distinct_1": round(len(set(grams[1])) / len(grams[1]), 4),
        "distinct_2": round(len(set(grams[2])) / len(grams[2]), 4),
        "distinct_texts": round(len(set(texts)) / len(texts), 4),
        "commonest_opening": [openings.most_common(1)[0][0], round(openings.most_common(1)[0][1] / len(texts), 4)],
        "copied_12": round(sum(bool(runs_of_12([t]) & training_runs) for t in texts) / len(texts), 4),
        "unscored": sum(r["excellent"] is None for r in rows),
    }  # fmt: skip
    graded = [r["grades"] for r in rows if r["grades"]]
    figures["dimensions"] = {name: round(sum(g[name] for g in graded) / max(1, len(graded)), 3) for name in llm.WEIGHTS}
    return figures


def runs_of_12(texts: list[str]) -> set[str]:
    return {text[i : i + 12] for text in texts for i in range(len(text) - 11)}


def finding(figures: dict) -> str:
    """Two sentences made from the figures, and a third where a policy writes the same thing for every query."""
    policies, differences = figures["policies"], figures["differences"]

    def says(name: str) -> str:
        r = policies[name]["excellence"]
        return f"{r['value']:.0%} [{r['lo']:.0%}, {r['hi']:.0%}]"

    n = policies["base"]["excellence"]["n"]
    first = f"Of the greetings for {n} held-out queries, these were excellent: " + ", ".join(
        f"{name} {says(name)}" for name in policies
    )
    gains = [
        f"{d['after']} over {d['before']} {d['excellent']['value'] * 100:+.0f} points ({d['excellent']['words']})"
        for d in differences
    ]  # fmt: skip
    said = f"{first}. The differences: {'; '.join(gains)}." if gains else f"{first}."
    dull = [
        f"{name} ({p['distinct_texts']:.0%} different texts)"
        for name, p in policies.items()
        if p["distinct_texts"] < policies["base"]["distinct_texts"] / 2
    ]
    return f"{said} Beware of a policy that writes the same for every query: {', '.join(dull)}." if dull else said


# ---- the report -----------------------------------------------------------------------------------------------------


def picture(draw) -> str:
    """An inline SVG of what `draw(axes)` draws; its text stays text, so the reader's own fonts set it."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    draw(axes)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def pictures(args: argparse.Namespace, figures: dict, rows: list[dict]) -> list[tuple[str, str]]:
    """(caption, SVG) of what the report shows."""
    policies = figures["policies"]

    def excellence(axes) -> None:
        for i, f in enumerate(p["excellence"] for p in policies.values()):
            axes.bar(i, f["value"], color=f"C{i}")
            axes.errorbar(
                i, f["value"], yerr=[[f["value"] - f["lo"]], [f["hi"] - f["value"]]], color="black", capsize=4
            )
        axes.set(xticks=range(len(policies)), xticklabels=list(policies), ylim=(0, 1), ylabel="excellence rate")

    def dimensions(axes) -> None:
        for i, (name, p) in enumerate(policies.items()):
            axes.plot(list(llm.WEIGHTS), [p["dimensions"][d] for d in llm.WEIGHTS], "o-", color=f"C{i}", label=name)
        axes.set(ylim=(1, 3), ylabel="mean grade (1-3)")
        axes.legend(frameon=False, fontsize=8)

    def rewards(axes) -> None:
        for i, reward in enumerate(("rm", "judge")):
            path = args.run / f"metrics_{reward}.jsonl"
            if path.is_file():
                steps = [json.loads(line) for line in path.read_text().splitlines()]
                axes.plot([s["step"] for s in steps], [s["reward"] for s in steps], color=f"C{i + 2}", label=reward)
        axes.set(xlabel="GRPO step", ylabel="mean reward")
        axes.legend(frameon=False, fontsize=8)

    def refinement(axes) -> None:
        lines = (args.run / "principles.jsonl").read_text(encoding="utf-8").splitlines()
        versions = [json.loads(line) for line in lines]
        rounds = [v["round"] for v in versions]
        axes.plot(rounds, [v["validation"]["kappa"] for v in versions], color="C0", label="kappa, validation part")
        axes.plot(
            rounds, [v["validation"]["false_accept"]["value"] for v in versions], color="C3", label="red-team accepted"
        )
        for v in versions:
            axes.plot(v["round"], v["validation"]["kappa"], "o" if v["accepted"] else "x", color="C0")
        axes.set(xlabel="round (o accepted, x rejected)", ylim=(-0.1, 1))
        axes.legend(frameon=False, fontsize=8)

    def lengths(axes) -> None:
        for i, name in enumerate(policies):
            scored = [r for r in rows if r["policy"] == name and r["quality"] is not None]
            x, y = [len(r["response"]) for r in scored], [r["quality"] for r in scored]
            axes.scatter(x, y, s=6, alpha=0.5, color=f"C{i}", label=name)
        axes.axhline(EXCELLENT, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="characters", ylabel="weighted mean of the grades")
        axes.legend(frameon=False, fontsize=8)

    drawn = [("Excellence rate, 95% interval", excellence), ("The five dimensions", dimensions)]
    if any((args.run / f"metrics_{reward}.jsonl").is_file() for reward in ("rm", "judge")):
        drawn.append(("Reward during GRPO", rewards))
    if (args.run / "principles.jsonl").is_file():
        drawn.append(("The judge over the rounds of step 3", refinement))
    drawn.append(("Length against score", lengths))
    return [(caption, picture(draw)) for caption, draw in drawn]


def write_report(args: argparse.Namespace, figures: dict, rows: list[dict]) -> None:
    """report.html and report.md from one set of figures."""
    import jinja2

    samples: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["sample"] == 0:
            samples.setdefault(row["query"], {})[row["policy"]] = row
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "templates"), autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = {
        "figures": figures, "finding": figures["finding"], "samples": samples, "offline": args.offline, "run": args.run,
        "reward_of": REWARD_OF, "weights": llm.WEIGHTS, "excellent": EXCELLENT,
        "rm": read_summary(args.run, "02_summary"),
        "curation": read_summary(args.run, "01_summary"), "judge": read_summary(args.run, "03_summary"),
    }  # fmt: skip
    replace_file(args.run / "report.md", environment.get_template("report.md").render(shown))
    shown["pictures"] = pictures(args, figures, rows)
    replace_file(args.run / "report.html", environment.get_template("report.html").render(shown))


def main(args: argparse.Namespace) -> int:
    started = time.time()
    base = models.policy_path(args)
    queries, labelled = read(args.queries, Query), read(args.labelled, Labelled)
    open_run(args.run)
    policies = present_policies(args, base)
    made = {name: file_hash(adapter / "adapter_model.safetensors") for name, adapter in policies.items() if adapter}
    stage = Stage(
        args.run, "05_evaluate", ["generations.jsonl", "scores.jsonl", "results.jsonl", "report.html", "report.md"],
        {"queries": file_hash(args.queries), "labelled": file_hash(args.labelled), "base": base, "policies": made,
         "seed": args.seed, "samples": args.samples, "temperature": args.temperature, "max_tokens": args.max_tokens,
         "bits": args.bits, "batch": args.batch_size_generate, "endpoint": llm.endpoint_name(args), "votes": args.votes,
         "principles": file_hash(args.run / "principles.jsonl"), "prompts": llm.prompt_hashes(ROLES, args.prompts),
         "rm": file_hash(args.run / "rm/adapter_model.safetensors")},
        args.redo,
    )  # fmt: skip
    if stage.done and read_summary(args.run, "05_summary"):
        print((args.run / "report.md").read_text(encoding="utf-8").split("## ")[1].partition("\n")[2].strip())
        print(f"05: done already, see {args.run / 'report.html'}")
        return 0
    third = args.run / "stages" / "03_principles.json"
    if third.is_file():
        used = json.loads(third.read_text(encoding="utf-8"))["settings"]
        if (used["labelled"], used["seed"]) != (file_hash(args.labelled), args.seed):
            fail(
                f"step 3 of {args.run} split another --labelled or --seed, so its test part is not known: use the same"
            )
    llm.Client.probe(args, args.run)
    models.quiet()
    rows = write_greetings(args, base, policies, queries)
    parts = split_labelled(labelled, args.seed)
    given = [r.model_dump() | {"part": part} for part, records in parts.items() for r in records]
    principles = {}
    if (args.run / "principles.jsonl").is_file():
        versions = read(args.run / "principles.jsonl", llm.Version)
        principles = {
            "seed_judge": versions[0].principles,
            "judge": llm.current_principles(args.run / "principles.jsonl"),
        }
    ledger = asyncio.run(ask_judges(args, rows + given, principles))
    ask_agents(args, rows + [r for r in given if r["part"] == "test"])
    if (args.run / "rm" / "adapter_config.json").is_file():
        ask_reward_model(args, base, rows + given)
    write(args.run / "scores.jsonl", rows)

    demonstrations = read(args.run / "sft.jsonl", Demonstration) if (args.run / "sft.jsonl").is_file() else []
    runs = runs_of_12([d.completion[0]["content"] for d in demonstrations])
    pairs = [(a, b) for a, b in (("sft", "base"), ("grpo_rm", "sft"), ("grpo_judge", "sft"), ("grpo_judge", "grpo_rm"))
             if a in policies and b in policies]  # fmt: skip
    figures = {
        "policies": {name: policy_figures([r for r in rows if r["policy"] == name], runs) for name in policies},
        "differences": [
            {"after": a, "before": b} | {
                key: difference(rows, a, b, key) for key in ("excellent", "judge", "agents", "reward_model")
                if any(r.get(key) is not None for r in rows)
            } for a, b in pairs
        ],
        "evaluators": evaluate_evaluators(given, args.seed),
        "labelled_test_rows": len(parts["test"]), "ledger": ledger,
    }  # fmt: skip
    figures["finding"] = finding(figures)
    write(args.run / "results.jsonl", ({"policy": name} | f for name, f in figures["policies"].items()))
    write_report(args, figures, rows)
    write_summary(args.run, "05_summary", started, vars(args), figures)
    stage.finish()
    print((args.run / "report.md").read_text(encoding="utf-8").split("## ")[1].partition("\n")[2].strip())
    print(f"05: report in {args.run / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
