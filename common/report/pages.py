"""The three pages: report.md, report.html made from it, and annotate.html."""

import argparse
import base64
from pathlib import Path

from common import records, run_folder
from common.answers import WEIGHTS
from common.endpoint import endpoint_name
from common.judge import EXCELLENT
from common.report.cost import ROUTES, UNITS
from common.report.evaluators import NEAR
from common.stats import COMPLETE

TEMPLATES = Path(__file__).parent / "templates"
IMAGES = {  # drawn by earlier steps
    "The judge over the rounds of step 3": "principles.svg",
    "Training of the reward model": "rm/training.svg",
}


def templates():
    """The Jinja environment of templates/; .html templates escape what is put into them."""
    import jinja2

    loader, autoescape = jinja2.FileSystemLoader(TEMPLATES), jinja2.select_autoescape(["html"])
    environment = jinja2.Environment(loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment


def finding(figures: dict) -> str:
    """What the figures come to, in a few sentences on one line; its words are in templates/finding.md."""
    return " ".join(templates().get_template("finding.md").render(figures=figures).split())


def write_pages(args: argparse.Namespace, figures: dict, rows: list[dict], rating_page: dict) -> None:
    """Write the three pages into the run folder; `rows` are the scored greetings."""
    environment = templates()
    agents_model = endpoint_name(args)[0]
    grader = args.eval_model or (args.model if args.eval_base_url else agents_model)  # of rubric and comparisons
    slots = {"figures": figures, "offline": args.offline, "run": args.run, "model": agents_model, "judge_model": grader}
    slots["tiny"] = Path(args.policy or "").parent == run_folder.ROOT / "outputs/tiny"
    slots |= {"weights": WEIGHTS, "excellent": EXCELLENT, "complete": COMPLETE, "near": NEAR}
    slots |= {"units": UNITS, "routes": ROUTES, "rm": run_folder.read_summary(args.run, "02_summary")}
    slots["principles"] = run_folder.read_summary(args.run, "03_summary").get("principles", [])
    report = environment.get_template("report.md").render(slots)
    run_folder.replace_file(args.run / "report.md", report)

    slots |= {"sections": html_sections(report), "data": picture_data(args.run, figures, rows), "images": {}}
    for caption, name in IMAGES.items():
        if (args.run / name).is_file():
            slots["images"][caption] = base64.b64encode((args.run / name).read_bytes()).decode()
    run_folder.replace_file(args.run / "report.html", environment.get_template("report.html").render(slots))

    page = environment.get_template("annotate.html").render(page=rating_page, dimensions=list(WEIGHTS))
    run_folder.replace_file(args.run / "annotate.html", page)


def html_sections(report: str) -> dict[str, str]:
    """Title -> HTML of each "## " section of report.md. HTML in the report itself is shown as text."""
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": False}).enable("table")
    sections = {}
    for section in report.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        sections[title] = html.render(body)
    return sections


def picture_data(run: Path, figures: dict, rows: list[dict]) -> dict:
    """What report.js draws from, and the first greeting of every policy for each query."""
    samples: dict[str, dict] = {}
    lengths = []
    for row in rows:
        if row["sample"] == 0:
            samples.setdefault(row["query"], {})[row["policy"]] = [row["response"], row["quality"], row["excellent"]]
        if row["quality"] is not None:
            lengths.append([row["policy"], len(row["response"]), row["quality"]])
    training: dict[str, list] = {"rm": [], "judge": []}
    for reward, curve in training.items():
        for row in records.read_lines(run / f"metrics_{reward}.jsonl"):
            if "raw_reward" in row:  # an update without rollouts of its own has none
                curve.append([row["step"], row["raw_reward"]])
    data = {"policies": figures["policies"], "wins": figures["wins"], "cost": figures["cost"]["curve"], "units": UNITS}
    data |= {"dimensions": list(WEIGHTS), "excellent": EXCELLENT, "training": training, "lengths": lengths}
    return data | {"samples": samples}
