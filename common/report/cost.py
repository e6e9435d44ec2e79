"""A against B at equal cost: what each step cost, and how excellent the greetings are for it."""

import random
from pathlib import Path

from common import records, run_folder, stats
from common.greetings import OWN

UNITS = ["completions", "calls", "tokens", "seconds", "money"]  # in which cost is counted
# The summaries of the steps that each reward needs, in order. Both begin with step 1, whose accepted greetings are the
# rows of SFT.
ROUTES = {
    "A": ["01_summary", "04_summary_none", "02_summary", "04_summary_rm"],
    "B": ["01_summary", "04_summary_none", "03_summary", "04_summary_judge"],
}
REWARD = {"A": "rm", "B": "judge"}  # as step 4 calls it, also in the names of files and policies
POINTS, DRAWN = 6, 60  # of the training curve, and rollouts graded for each


def rollouts(run: Path, seed: int) -> list[dict]:
    """Rollouts of both GRPO runs from POINTS equal parts of the training, `at` being the middle of the part."""
    sample = []
    for route, reward in REWARD.items():
        rows = records.read_lines(run / f"rollouts_{reward}.jsonl")
        for n in range(POINTS):
            part = rows[n * len(rows) // POINTS : (n + 1) * len(rows) // POINTS]
            part = [row for row in part if row["response"].strip()]
            rng = random.Random(run_folder.digest(seed, route, n))
            for row in rng.sample(part, min(DRAWN, len(part))):
                place = {"route": route, "at": (n + 0.5) / POINTS, "query_id": run_folder.digest(row["query"])}
                sample.append(place | {"query": row["query"], "response": row["response"]})
    return sample


def step_cost(run: Path, step: str) -> dict[str, float]:
    """What a step has cost: completions sampled from a policy, calls and tokens of the agents, seconds, money."""
    summary = run_folder.read_summary(run, step)
    ledger, seconds = summary.get("ledger") or {}, summary.get("seconds", 0.0)
    return {
        "completions": summary.get("completions", 0),
        "calls": ledger.get("calls", 0),
        "tokens": ledger.get("input_tokens", 0) + ledger.get("output_tokens", 0),
        "seconds": seconds["total"] if isinstance(seconds, dict) else seconds,
        "money": ledger.get("money", 0.0),
    }


def total(costs: dict[str, dict[str, float]], steps: list[str]) -> dict[str, float]:
    return {unit: sum(costs[step][unit] for step in steps) for unit in UNITS}


def cost_figures(run: Path, rows: list[dict], graded_rollouts: list[dict]) -> dict:
    """A against B: what each step cost, excellence over the cost so far, and excellence at the cost of the cheaper one.

    `rows` are scored greetings for the held-out queries. A route is left out unless all of its steps have run.
    """
    costs = {}
    for step in [*ROUTES["A"], *ROUTES["B"]]:
        if run_folder.read_summary(run, step):
            costs[step] = step_cost(run, step)
    excellence = {}
    for name in ("base", *OWN):
        excellence[name] = stats.mean_of(stats.where(rows, "policy", name), "excellent")
    totals, curves = {}, {}
    for route, steps in ROUTES.items():
        if costs.keys() >= set(steps) and excellence[f"grpo_{REWARD[route]}"]["n"]:
            totals[route] = total(costs, steps)
            curves[route] = cost_curve(route, costs, excellence, graded_rollouts)
    parts = run_folder.read_summary(run, "03_summary").get("parts", {})
    figures = {"steps": costs, "totals": totals, "curve": curves, "equal": at_equal_cost(curves)}
    figures["labels"] = {"A": 0, "B": parts.get("reflect", 0) + parts.get("validation", 0)}
    return figures | {"pairs": run_folder.read_summary(run, "01_summary").get("pairs", 0)}


def cost_curve(route: str, costs: dict, excellence: dict, graded_rollouts: list[dict]) -> list[dict]:
    """Excellence over the cost so far: of the base, after SFT, during GRPO, and of its policy.

    Points during GRPO are rollouts for the training queries, graded by the same rubric; `at` is the share of the GRPO
    run after which they were written.
    """
    steps, policy = ROUTES[route], f"grpo_{REWARD[route]}"
    points = [
        {"at": "base", "cost": dict.fromkeys(UNITS, 0.0), "excellence": excellence["base"]},
        {"at": "sft", "cost": total(costs, steps[:2]), "excellence": excellence["sft"]},
    ]
    before_grpo, grpo = total(costs, steps[:3]), costs[steps[3]]
    own_rollouts = stats.where(graded_rollouts, "route", route)
    for share in sorted(set(stats.column(own_rollouts, "at"))):
        cost = {unit: before_grpo[unit] + share * grpo[unit] for unit in UNITS}
        figure = stats.mean_of(stats.where(own_rollouts, "at", share), "excellent")
        points.append({"at": f"{share:.0%} of GRPO", "cost": cost, "excellence": figure})
    points.append({"at": policy, "cost": total(costs, steps), "excellence": excellence[policy]})
    return [point for point in points if point["excellence"]["n"]]


def at_equal_cost(curves: dict[str, list[dict]]) -> list[dict]:
    """For each unit the last point of each route that costs no more than the cheaper route does in all."""
    if len(curves) < 2:
        return []
    rows = []
    for unit in UNITS:
        cheaper = min(points[-1]["cost"][unit] for points in curves.values())
        if cheaper:  # 0: nothing of the kind was spent
            row = {"unit": unit, "cost": cheaper}
            for route, points in curves.items():
                reached = [point for point in points if point["cost"][unit] <= cheaper][-1]
                row[route] = {"at": reached["at"], "excellence": reached["excellence"]}
            rows.append(row)
    return rows
