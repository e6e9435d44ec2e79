"""The five scripts as a user runs them: subprocesses, the tiny model, the rule-based critic."""

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script, small_steps

from common.offline.tiny_model import tiny_policy
from common.policy import load_tokenizer
from common.records import Demonstration, Judgement, Preference, read
from common.trainers import trainer_settings

SCRIPTS = sorted(p.name for p in ROOT.glob("0?_*.py"))


def tree_hash(folder: Path) -> dict[str, str]:
    """File -> hash, without what every start touches."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "sqlite" not in p.name and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_common_flags_and_an_example(script: str) -> None:
    done = run_script(script, "--help")
    assert done.returncode == 0
    for flag in ("--run", "--seed", "--offline", "--redo", "--policy", "--base-url", "--model", "--api-key-env"):
        assert flag in done.stdout
    assert f"python {script}" in done.stdout


def test_every_step_leaves_what_the_design_names(run: Path) -> None:
    for name in (
        "candidates.jsonl", "judgements.jsonl", "preferences.jsonl", "sft.jsonl", "rm/adapter_model.safetensors",
        "rm_eval.jsonl", "principles.jsonl", "redteam.jsonl", "policy_sft/adapter_model.safetensors",
        "policy_rm/adapter_model.safetensors", "policy_judge/adapter_model.safetensors", "rollouts_rm.jsonl",
        "rollouts_judge.jsonl", "metrics_none.jsonl", "metrics_rm.jsonl", "metrics_judge.jsonl", "generations.jsonl",
        "scores.jsonl", "comparisons.jsonl", "report.html", "report.md", "annotate.html",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    for name in ("01", "02", "03", "04_summary_none", "04_summary_rm", "04_summary_judge", "05"):
        summary = json.loads((run / (name if "_" in name else f"{name}_summary")).with_suffix(".json").read_text())
        assert {"seconds", "settings", "packages"} <= summary.keys()


def test_curation_joins_by_id_and_favours_no_length(run: Path) -> None:
    judged = {r.id: r for r in read(run / "judgements.jsonl", Judgement)}
    pairs = read(run / "preferences.jsonl", Preference)
    assert pairs
    for pair in pairs:
        good, bad = judged[pair.chosen_id], judged[pair.rejected_id]
        assert (good.label, bad.label) == (1, 0) and good.query == bad.query == pair.query
        assert (good.response, bad.response) == pair.texts[1:]
    longer = Counter((len(p.texts[1]) > len(p.texts[2])) - (len(p.texts[1]) < len(p.texts[2])) for p in pairs)
    assert longer[1] == longer[-1]
    assert all(judged[r.id].label == 1 for r in judged.values() if r.id in {p.chosen_id for p in pairs})
    assert {d.query for d in read(run / "sft.jsonl", Demonstration)} <= {r.query for r in judged.values() if r.label}


def test_debate_and_reflection_are_on_record(run: Path) -> None:
    for record in read(run / "judgements.jsonl", Judgement):
        assert len(record.examples) == 3 and record.positive and record.negative
        assert record.judge["reason"] and record.reflect["reason"] and record.label == record.reflect["verdict"]
        assert record.input_tokens > record.output_tokens > 0
        assert set(record.prompts) == {"positive", "negative", "judge", "reflect"}


def test_rewards_of_the_rollouts_are_what_the_evaluators_say(run: Path) -> None:
    binary = lines(run / "rollouts_judge.jsonl")
    assert {r["reward"] for r in binary} == {0.0, 1.0}
    scored = lines(run / "rollouts_rm.jsonl")
    sample = run.parent / "rollouts.jsonl"
    sample.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in scored[:20]), encoding="utf-8")
    done = run_script("02_train_rm.py", "--offline", "--run", run, "--score", sample)
    assert done.returncode == 0, done.stderr
    again = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["response"] for r in again] == [r["response"] for r in scored[:20]]
    assert [r["score"] for r in again] == pytest.approx([r["reward"] for r in scored[:20]], abs=1e-3)


def test_principles_have_a_line_a_version(run: Path) -> None:
    versions = lines(run / "principles.jsonl")
    assert [v["version"] for v in versions] == list(range(len(versions))) and versions[0]["why"] == "the seed"
    accepted = [v for v in versions if v["accepted"]]
    kappas = [v["validation"]["kappa"] for v in accepted]
    assert all(len(v["principles"]) <= 10 for v in versions) and kappas == sorted(kappas)


def test_the_report_stands_alone(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    summary = json.loads((run / "05_summary.json").read_text())
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\((?!#|"?#)""", page)  # nothing is fetched
    assert summary["finding"].replace("'", "&#39;") in page
    assert set(summary["policies"]) == {"base", "sft", "grpo_rm", "grpo_judge"}
    assert {"null: length", "null: n-grams", "judge", "agents", "reward_model"} <= summary["evaluators"].keys()
    assert set(summary["bought"]) == {"rubric", "judge", "reward_model", "null: length", "null: n-grams"}
    assert all(rates["all"]["n"] == 8 for rates in summary["bought"].values()) and "free mutation" in page
    tested = json.loads((run / "02_summary.json").read_text())
    assert list(tested["bought"]) == list(summary["bought"]["reward_model"]) and tested["bought"]["all"]["n"] > 0
    assert "| free mutation |" in (run / "rm/README.md").read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in page for name in tested["eval"]) and "null: the longer text wins" in page
    for row in lines(run / "generations.jsonl")[:10]:
        assert row["response"] in (run / "report.html").read_text(encoding="utf-8") or "&" in row["response"]


def test_a_second_call_finds_everything_done(run: Path) -> None:
    before = tree_hash(run)
    commands = small_steps(run.parent)
    for step in ("01", "03", "04_judge", "05"):
        done = run_script(*commands[step], "--offline", "--run", run)
        assert done.returncode == 0 and "done already" in done.stdout, done.stdout + done.stderr
    assert tree_hash(run) == before


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("01_curate_preferences.py", ["--queries", "missing.jsonl"], "missing.jsonl does not exist"),
        ("01_curate_preferences.py", ["--samples", "6", "--seed", "7", "--queries", "{queries}"], "seed=0"),
        ("02_train_rm.py", ["--preferences", "missing.jsonl"], "01_curate_preferences.py"),
        ("02_train_rm.py", ["--epochs", "1", "--seed", "7"], "--redo"),
        ("03_refine_judge.py", ["--rounds", "3", "--seed", "7"], "--redo"),
        ("04_grpo.py", ["--reward", "praise"], "invalid choice"),
        ("04_grpo.py", ["--reward", "rm", "--wrong"], "unrecognized arguments: --wrong"),
        ("05_evaluate.py", ["--queries", "{heldout}", "--seed", "7"], "--redo"),
        ("05_evaluate.py", ["--queries", "{heldout}", "--samples", "3"], "--redo"),
    ],
)
def test_bad_input_gets_one_line_and_changes_nothing(run: Path, script: str, flags: list[str], told: str) -> None:
    before = tree_hash(run)
    named = {"queries": run.parent / "queries.jsonl", "heldout": run.parent / "heldout.jsonl"}
    done = run_script(script, "--offline", "--run", run, *(flag.format(**named) for flag in flags))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and told in errors[0], done.stderr
    assert "Traceback" not in done.stderr and tree_hash(run) == before


def test_an_edited_prompt_redoes_its_own_stage_and_nothing_before_it(run: Path, tmp_path: Path) -> None:
    copy, prompts = tmp_path / "run", tmp_path / "prompts"
    copy.mkdir()
    for name in ("candidates.jsonl", "judgements.jsonl", "answers.sqlite", "01_summary.json"):
        shutil.copy(run / name, copy / name)
    shutil.copytree(run / "stages", copy / "stages")
    shutil.copytree(ROOT / "prompts", prompts)
    judge = (prompts / "judge.md").read_text(encoding="utf-8")
    (prompts / "judge.md").write_text(judge.replace("3. 篇幅不是依据。", "3. 篇幅长短不是依据。"), encoding="utf-8")
    command = [*small_steps(run.parent)["01"], "--offline", "--run", copy, "--prompts", prompts]
    refused = run_script(*command)
    assert refused.returncode == 2 and "prompts" in refused.stderr and "--redo" in refused.stderr
    calls = json.loads((copy / "01_summary.json").read_text())["ledger"]["calls"]
    done = run_script(*command, "--redo")
    assert done.returncode == 0, done.stderr
    assert (copy / "candidates.jsonl").read_bytes() == (run / "candidates.jsonl").read_bytes()
    judged = len(lines(copy / "judgements.jsonl"))
    new = json.loads((copy / "01_summary.json").read_text())["ledger"]["calls"] - calls
    assert judged <= new <= 2 * judged  # Judge again, Reflect where its reason changed; Positive and Negative not
    assert list((copy / "replaced").rglob("judgements.jsonl"))


def test_trl_takes_the_preferences_as_they_are(run: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    dataset = load_dataset("json", data_files=str(run / "preferences.jsonl"), split="train", cache_dir=str(tmp_path))
    base = str(tiny_policy())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = RewardConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, **trainer_settings(model)
    )
    trainer = RewardTrainer(
        model=model, args=config, processing_class=load_tokenizer(base), train_dataset=dataset,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
