"""The worked example of another task, as its README has it, with the offline client."""

import json
import re
import shutil
from pathlib import Path

from conftest import ROOT, lines, run_script

from common.records import Labelled, Query, Reference, read, split_labelled

CARDS = ROOT / "docs/birthday_cards"


def test_the_files_are_what_the_steps_take() -> None:
    queries = read(CARDS / "queries.jsonl", Query)
    references, labelled = read(CARDS / "references.jsonl", Reference), read(CARDS / "labelled.jsonl", Labelled)
    assert len(queries) == len(references) == 20 and len(split_labelled(labelled, 0)["test"]) >= 30
    assert {row.query for row in labelled} == {query.query for query in queries}
    assert sum(row.label for row in labelled) == 80 and all(bool(row.flaw) != row.label for row in labelled)
    for row in labelled:
        if row.label:
            assert re.fullmatch(r"For you, .+:(\n.+){4}\.", row.response), row.response


def test_steps_1_and_3_run_on_birthday_cards(tmp_path: Path) -> None:
    run, prompts = tmp_path / "run", tmp_path / "prompts"
    shutil.copytree(ROOT / "prompts", prompts)
    shutil.copy(CARDS / "policy.md", prompts)
    usual = ["--offline", "--run", run, "--prompts", prompts, "--queries", CARDS / "queries.jsonl"]
    usual += ["--references", CARDS / "references.jsonl"]
    done = run_script("01_curate_preferences.py", *usual, "--samples", 1, "--candidates", CARDS / "labelled.jsonl")
    assert done.returncode == 0, done.stderr
    assert not json.loads((run / "01_summary.json").read_text())["failures"]
    judged = lines(run / "judgements.jsonl")
    assert len({row["query"] for row in judged}) == 20 and all(row["label"] in (0, 1) for row in judged)
    flags = ["--labelled", CARDS / "labelled.jsonl", "--from", CARDS / "principles.md", "--rounds", 1]
    done = run_script("03_refine_judge.py", *usual, *flags)
    assert done.returncode == 0, done.stderr
    seed = lines(run / "principles.jsonl")[0]["principles"]
    assert len(seed) == 4 and seed[0].startswith("It is a finished verse")
