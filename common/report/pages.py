"""report.md, report.html, annotate.html."""

import argparse

from common.answers import WEIGHTS
from common.endpoint import endpoint_name
from common.judge import EXCELLENT
from common.records import read_lines
from common.report.cost import ROUTES, UNITS
from common.report.evaluators import NEAR
from common.run_folder import ROOT, read_summary, replace_file
from common.stats import COMPLETE


def templates():
    """The Jinja environment of templates/."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "templates"), autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment


def write_report(args: argparse.Namespace, figures: dict, rows: list[dict], page: dict) -> None:
    """report.md, report.html made from it, and annotate.html."""
    import base64

    from markdown_it import MarkdownIt

    environment = templates()
    samples: dict[str, dict] = {}
    for row in rows:
        if row["sample"] == 0:
            samples.setdefault(row["query"], {})[row["policy"]] = [row["response"], row["quality"], row["excellent"]]

    def curve(reward: str) -> list[list]:
        rows = read_lines(args.run / f"metrics_{reward}.jsonl")  # an update without rollouts of its own has no reward
        return [[row["step"], row["reward"]] for row in rows if "reward" in row]

    drawn = {
        "The judge over the rounds of step 3": args.run / "principles.svg",
        "Training of the reward model": args.run / "rm/training.svg",
    }
    shown = {
        "figures": figures, "offline": args.offline, "run": args.run, "weights": WEIGHTS, "excellent": EXCELLENT,
        "complete": COMPLETE, "near": NEAR, "units": UNITS, "routes": ROUTES,
        "rm": read_summary(args.run, "02_summary"),
        "principles": read_summary(args.run, "03_summary").get("principles", []),
        "judge_model": judge_name(args), "model": endpoint_name(args)[0],
    }  # fmt: skip
    report = environment.get_template("report.md").render(shown)
    replace_file(args.run / "report.md", report)
    html = MarkdownIt("commonmark", {"html": False}).enable("table")
    sections = {part.partition("\n")[0]: html.render(part.partition("\n")[2]) for part in report.split("\n## ")[1:]}
    shown |= {
        "sections": sections,
        "images": {name: base64.b64encode(p.read_bytes()).decode() for name, p in drawn.items() if p.is_file()},
        "data": {
            "policies": figures["policies"], "wins": figures["wins"], "cost": figures["cost"]["curve"], "units": UNITS,
            "dimensions": list(WEIGHTS), "training": {reward: curve(reward) for reward in ("rm", "judge")},
            "lengths": [[r["policy"], len(r["response"]), r["quality"]] for r in rows if r["quality"] is not None],
            "excellent": EXCELLENT, "samples": samples,
        },
    }  # fmt: skip
    replace_file(args.run / "report.html", environment.get_template("report.html").render(shown))
    rating = environment.get_template("annotate.html").render(page=page, dimensions=list(WEIGHTS))
    replace_file(args.run / "annotate.html", rating)


def judge_name(args: argparse.Namespace) -> str:
    """The model of rubric and comparisons."""
    return args.eval_model or (args.model if args.eval_base_url else endpoint_name(args)[0])
