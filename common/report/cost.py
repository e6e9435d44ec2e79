"""A against B at equal cost."""

import random
from pathlib import Path

from common.greetings import OWN
from common.records import read_lines
from common.run_folder import digest, read_summary
from common.stats import mean_of

UNITS = ["completions", "calls", "tokens", "seconds", "money"]  # in which cost is counted
ROUTES = {
    "A": ["01_summary", "04_summary_none", "02_summary", "04_summary_rm"],
    "B": ["01_summary", "04_summary_none", "03_summary", "04_summary_judge"],
}
POINTS, DRAWN = 6, 60  # of the training curve, and rollouts graded for each


def rollouts(run: Path, seed: int) -> list[dict]:
    """Rollouts of both GRPO runs from POINTS equal parts of the training, `at` being the middle of the part."""
    drawn = []
    for route, reward in (("A", "rm"), ("B", "judge")):
        rows = read_lines(run / f"rollouts_{reward}.jsonl")
        for n in range(POINTS):
            part = [r for r in rows[n * len(rows) // POINTS : (n + 1) * len(rows) // POINTS] if r["response"].strip()]
            for r in random.Random(digest(seed, route, n)).sample(part, min(DRAWN, len(part))):
                found = {"route": route, "at": (n + 0.5) / POINTS, "query_id": digest(r["query"])}
                drawn.append(found | {"query": r["query"], "response": r["response"]})
    return drawn


def step_cost(run: Path, step: str) -> dict[str, float]:
    """What a step has cost: completions sampled from a policy, calls and tokens of the agents, seconds, money."""
    summary = read_summary(run, step)
    ledger, seconds = summary.get("ledger") or {}, summary.get("seconds", 0.0)
    tokens = [ledger.get("input_tokens", 0), ledger.get("output_tokens", 0)]
    prices = [summary.get("settings", {}).get(f"price_{side}") or 0.0 for side in ("in", "out")]
    return {
        "completions": summary.get("completions", summary.get("candidates", 0)), "calls": ledger.get("calls", 0),
        "tokens": sum(tokens), "seconds": seconds["total"] if isinstance(seconds, dict) else seconds,
        "money": round(sum(n * price for n, price in zip(tokens, prices, strict=True)) / 1e6, 6),
    }  # fmt: skip


def cost_figures(run: Path, rows: list[dict], graded: list[dict]) -> dict:
    """A against B: what each step cost, excellence over the cost so far, and excellence at the cost of the cheaper one.

    Both routes begin with step 1 and SFT. Points during GRPO are rollouts for the training queries, graded by the same
    rubric; the others are greetings for the held-out queries.
    """
    steps = {step: step_cost(run, step) for route in ROUTES.values() for step in route if read_summary(run, step)}
    held_out = {name: mean_of([r for r in rows if r["policy"] == name], "excellent") for name in ("base", *OWN)}
    curve, totals = {}, {}
    for route, names in ROUTES.items():
        final = {"A": "grpo_rm", "B": "grpo_judge"}[route]
        if not all(name in steps for name in names) or not held_out[final]["n"]:
            continue

        def sum_of(names: list[str], and_part: float = 0.0, of: str = names[-1]) -> dict:
            return {u: sum(steps[name][u] for name in names) + and_part * steps[of][u] for u in UNITS}

        points = [{"at": "base", "cost": dict.fromkeys(UNITS, 0.0), "excellence": held_out["base"]}]
        points.append({"at": "sft", "cost": sum_of(names[:2]), "excellence": held_out["sft"]})
        for at in sorted({r["at"] for r in graded if r["route"] == route}):
            excellence = mean_of([r for r in graded if r["route"] == route and r["at"] == at], "excellent")
            points.append({"at": f"{at:.0%} of GRPO", "cost": sum_of(names[:3], at), "excellence": excellence})
        points.append({"at": final, "cost": sum_of(names), "excellence": held_out[final]})
        curve[route] = [point for point in points if point["excellence"]["n"]]
        # With the SFT rows given: step 1 is what the reward model's pairs cost, and nothing that the judge needs.
        own = names[-2:] if route == "B" else [names[0], *names[-2:]]
        totals[route] = {"in all": sum_of(names), "with SFT rows given": sum_of(own)}
    equal = []
    for unit in UNITS if len(curve) == 2 else []:
        least = min(points[-1]["cost"][unit] for points in curve.values())
        if least:
            reached = {route: [p for p in points if p["cost"][unit] <= least][-1] for route, points in curve.items()}
            equal.append(
                {"unit": unit, "cost": least} | {r: {k: p[k] for k in ("at", "excellence")} for r, p in reached.items()}
            )
    labels = sum(read_summary(run, "03_summary").get("parts", {}).get(part, 0) for part in ("reflect", "validation"))
    pairs = read_summary(run, "01_summary").get("pairs", 0)
    return {
        "steps": steps,
        "totals": totals,
        "curve": curve,
        "equal": equal,
        "labels": {"A": 0, "B": labels},
        "pairs": pairs,
    }
