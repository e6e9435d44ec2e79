"""Step 2: the data gate, the calibration, a killed training, and what rm/ is to others."""

import importlib
import json
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, lines, run_script
from process import start_script

from common import run_folder
from common.offline.tiny_model import tiny_policy
from common.policy import find_policy, multiplies_in_bf16
from common.records import Preference, Reference, read, write
from common.reward_model import RewardModel, apply_calibration, fit_calibration
from common.run_folder import file_hash
from common.spoilt import FAMILIES, derived_pairs
from common.trainers import last_checkpoint

rm = importlib.import_module("02_train_rm")
SCRIPT = "02_train_rm.py"


def pair(query: str, chosen: str, rejected: str) -> Preference:
    prompt = [{"role": "user", "content": query}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return Preference(prompt=prompt, query=query, chosen=good, rejected=bad)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch):
    """Runs step 2 with these flags in this process, which spares it the imports; returns its exit code."""

    def call(*flags: object) -> int:
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--offline", *map(str, flags)])
        try:
            return rm.main(rm.parse_args())
        except SystemExit as stopped:
            return stopped.code

    return call


@pytest.fixture(scope="module")
def pairs() -> list[Preference]:
    """Chosen: shipped references; rejected: the same, each cut after a third."""
    references = read(ROOT / "data/references.jsonl", Reference)[:200]
    return [pair(r.query, r.response, r.response[: len(r.response) // 3] + "了") for r in references]


@pytest.fixture(scope="module")
def trained(pairs: list[Preference], tmp_path_factory) -> Path:
    """The folder of a short run on these pairs."""
    run = tmp_path_factory.mktemp("rm")
    write(run / "preferences.jsonl", pairs)
    done = run_script(SCRIPT, "--offline", "--run", run, "--epochs", 2, "--checks", 4, "--stress-size", 20)
    assert done.returncode == 0, done.stderr
    return run


def test_every_epoch_has_spoilt_texts_of_its_own(pairs: list[Preference]) -> None:
    args = Namespace(seed=0, derived=2, without=[], epochs=1.5)
    shown, spoilt, epochs = rm.training_pairs(args, pairs)
    assert epochs == 2 and shown[: 4 * len(pairs)] == pairs * 4 and len(shown) == 4 * len(pairs) + spoilt
    made = [derived_pairs(pairs, 2, [], 0, epoch) for epoch in (0, 1)]
    assert spoilt == 4 * len(pairs) and shown[4 * len(pairs) :] == made[0] + made[1]
    assert len({p.id for p in made[0]} & {p.id for p in made[1]}) < len(made[0]) / 2
    args.derived = 0
    assert rm.training_pairs(args, pairs) == (pairs * 2, 0, 2)


@pytest.mark.parametrize("liking", [1.0, -1.0])
def test_it_is_bought_where_it_likes_worse_texts_better(pairs: list[Preference], liking: float) -> None:
    good = {one.texts[:2] for one in pairs}
    asked = []

    def score(conversations: list) -> list[float]:
        rows = [(messages[0]["content"], messages[-1]["content"]) for messages in conversations]
        asked.extend(rows)
        return [0.0 if row in good else liking for row in rows]

    fake, args = SimpleNamespace(score_conversations=score), Namespace(seed=0, stress_size=7)
    rates = rm.bought_by_search(args, fake, pairs[:20] * 2)  # a chosen text of two pairs is searched once
    assert rates["all"]["n"] == 7 and rates["all"]["value"] == rates["mutation"]["value"] == float(liking > 0)
    assert set(asked[:7]) <= {one.texts[:2] for one in pairs[:20]} and len(set(asked[:7])) == 7
    assert len({asked for asked, _ in asked}) == 7  # each under its own prompt
    args.stress_size = 500
    assert rm.bought_by_search(args, fake, pairs[:20])["all"]["n"] == 20


def test_no_query_and_no_text_is_on_both_sides_of_the_split(tmp_path: Path, pairs: list[Preference]) -> None:
    twice = [pair(p.texts[0] + " 短", p.texts[1], p.texts[2] + "吧") for p in pairs[:60]]
    write(tmp_path / "preferences.jsonl", pairs + twice)
    args = Namespace(
        preferences=tmp_path / "preferences.jsonl", eval_preferences=None, eval_share=0.2, seed=0, run=tmp_path
    )
    train, stop, test, counts, _ = rm.split_pairs(args)
    assert not {p.texts[0] for p in train + stop} & {p.texts[0] for p in test}
    assert not {t for p in train + stop for t in p.texts[1:]} & {t for p in test for t in p.texts[1:]}
    assert not {p.texts[0] for p in train} & {p.texts[0] for p in stop}
    assert counts["training_pairs_left_out"] == 260 - len(train) - len(stop) - len(test) > 5
    write(tmp_path / "preferences.jsonl", (pairs + twice)[::-1])
    assert {p.id for p in rm.split_pairs(args).test} == {p.id for p in test}  # whatever the order of the file


@pytest.mark.parametrize(
    ("leak", "counts"),
    [
        (lambda p: pair(p.texts[0], "另一句，灯下写给你的话。", "不好"), "1 by query, 0 by text, 0 by near_text"),
        (lambda p: pair("别的", p.texts[1], "不好"), "0 by query, 1 by text, 1 by near_text"),
        (lambda p: pair("别的", p.texts[1] + "呀", "不好"), "0 by query, 0 by text, 1 by near_text"),
    ],
)
def test_a_leak_into_the_test_pairs_stops_the_run_with_its_count(
    tmp_path: Path, pairs: list[Preference], step, capsys, leak, counts: str
) -> None:
    long = max(pairs, key=lambda p: len(p.texts[1]))
    leaking = leak(long)
    write(tmp_path / "train.jsonl", pairs)
    write(tmp_path / "test.jsonl", [leaking, pair("清早出门", "雾散了，路上慢些走，伞在门后。", "哦")])
    flags = ["--preferences", tmp_path / "train.jsonl", "--eval-preferences", tmp_path / "test.jsonl"]
    assert step("--run", tmp_path / "run", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert counts in line and leaking.id in line and "--allow-leak" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("chosen", "rejected", "told"), [("好", "好 ", "the same text"), ("好", " ", "empty"), ("", "好", "empty")]
)
def test_a_pair_that_teaches_nothing_is_named(
    tmp_path: Path, pairs, step, capsys, chosen: str, rejected: str, told: str
) -> None:
    good = [p.model_dump() for p in pairs[:3]]
    bad = good[0] | {"id": "x", "chosen": [{"role": "assistant", "content": chosen}]}
    bad["rejected"] = [{"role": "assistant", "content": rejected}]
    write(tmp_path / "preferences.jsonl", [*good, bad])
    assert step("--run", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "preferences.jsonl:4" in line and told in line


def test_a_tie_is_half_a_win() -> None:
    pairs = [SimpleNamespace(texts=("q", "甲乙", text)) for text in ("丙丁", "丙", "丙丁戊")]
    tests = {"all": [(place, pair.texts[2]) for place, pair in enumerate(pairs)]}
    rates, scores = rm.accuracy(lambda rivals: [len(text) for _, text in rivals], pairs, tests)
    assert (rates["all"]["value"], rates["all"]["n"], scores[2, "丙丁戊"]) == (0.5, 3, 3)


def test_it_learns_and_says_so_in_its_card(trained: Path) -> None:
    summary = json.loads((trained / "02_summary.json").read_text())
    assert summary["eval"]["all"]["value"] > 0.8 and summary["derived_pairs"] > 2 * summary["train_pairs"]
    for family in FAMILIES:
        assert {f"attack: {family}", f"attack: {family}, unseen kinds"} <= summary["eval"].keys()
    assert summary["baselines"]["longer"]["value"] == 1.0  # as the pairs were made
    null = {name: r["null"]["longer"]["value"] for name, r in summary["eval"].items() if r["n"]}
    assert (null["all"], null["attack: form"], null["attack: form, unseen kinds"]) == (1, 0, 0)  # these only add
    card = (trained / "rm/README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in card for name in summary["eval"]) and "null: the longer text wins" in card
    assert (trained / "rm/training.svg").read_text(encoding="utf-8").count("held out") == 2
    losses = [log["eval_loss"] for log in summary["log"] if "eval_loss" in log]
    assert len(losses) >= 3 and min(losses) < losses[0]


def card_code(card: str, folder: Path) -> str:
    """The card's example, made to load the rm/ of a folder."""
    return card.split("```python\n")[1].split("```")[0].replace('"rm', f'"{folder}/rm')


def test_others_load_it_without_this_project(trained: Path) -> None:
    """By the code of its card: PEFT, transformers, and the figures of calibration.json."""
    names: dict = {}
    exec(card_code((trained / "rm/README.md").read_text(encoding="utf-8"), trained), names)
    for row in lines(trained / "rm_eval.jsonl")[:20]:
        assert names["score"](row["query"], row["chosen"]) == pytest.approx(row["chosen_score"], abs=1e-3)


def test_the_calibration_takes_the_slope_off_and_invites_no_extremes(trained: Path) -> None:
    calibration = {"mean": 1.0, "std": 2.0, "length": {"slope": 0.1, "shortest": 20, "longest": 60}}
    scores = [apply_calibration(calibration, 3.0, length) for length in (30, 0, 20, 999, 60)]
    assert scores[0] == pytest.approx((3.0 - 3.0 - 1.0) / 2)
    assert scores[1] == scores[2] and scores[3] == scores[4]
    line = json.loads((trained / "rm/calibration.json").read_text())["length"]
    assert 0 < line["shortest"] < line["longest"]


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("slope", [0.05, -0.05])
def test_the_calibration_leaves_the_correlation_that_it_is_told_to(slope: float, tolerance: float) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    some = [pair(f"问{n}", "春" * int(rng.integers(10, 90)), "风") for n in range(900)]
    lengths = [len(p.texts[1]) for p in some]
    outputs = [slope * length + rng.normal() for length in lengths]
    calibration = fit_calibration(outputs, [0.0] * len(some), some, tolerance)
    scores = [apply_calibration(calibration, *one) for one in zip(outputs, lengths, strict=True)]
    raw = np.corrcoef(outputs, lengths)[0, 1]
    assert np.corrcoef(scores, lengths)[0, 1] == pytest.approx(np.sign(slope) * min(tolerance, abs(raw)), abs=0.02)
    both = [*scores, *(apply_calibration(calibration, 0.0, 1) for _ in some)]
    assert np.mean(both) == pytest.approx(0, abs=1e-9) and np.std(both) == pytest.approx(1)


def test_scores_of_a_file_keep_its_order_and_its_keys(trained: Path, tmp_path: Path, step, capsys) -> None:
    rows = [{"mine": n, "query": "教师节", "response": f"老师，{'平安，' * (n % 5)}今日有花。 "} for n in range(70)]
    write(tmp_path / "some.jsonl", rows)
    assert step("--run", trained, "--score", tmp_path / "some.jsonl", "--batch-size-generate", 16) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "score"} for row in scored] == rows
    assert [list(row) for row in scored] == [[*row, "score"] for row in rows]
    same = {row["response"]: row["score"] for row in scored}
    assert all(row["score"] == pytest.approx(same[row["response"]], abs=1e-3) for row in scored)


def test_a_killed_training_goes_on_from_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    flags = ["--offline", "--run", str(tmp_path), "--batch-size", "4", "--checks", "8", "--derived", "0"]
    (tmp_path / "preferences.jsonl").write_bytes((trained / "preferences.jsonl").read_bytes())
    process = start_script(SCRIPT, *flags)
    while process.is_alive() and len(list(tmp_path.glob("rm_checkpoints/checkpoint-*/trainer_state.json"))) < 2:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not (tmp_path / "rm").exists()
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    assert "| 0/" not in done.stderr.split("reward model:")[1]  # the bar begins where the checkpoint was
    summary = json.loads((tmp_path / "02_summary.json").read_text())
    steps = [log["step"] for log in summary["log"] if "loss" in log]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 20  # none missing, none twice


def test_a_loss_that_is_not_finite_stops_with_one_line(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "preferences.jsonl").write_bytes((trained / "preferences.jsonl").read_bytes())
    done = run_script(SCRIPT, "--offline", "--run", tmp_path, "--learning-rate", "1e30", "--derived", 0)
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and "not finite" in line and "--learning-rate" in line
    assert "Traceback" not in done.stderr and not (tmp_path / "rm").exists()


def test_a_loss_that_turns_bad_on_the_way_keeps_the_last_good_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch, step, capsys
) -> None:
    import trl
    from safetensors.torch import load_file

    loss_of = trl.RewardTrainer.compute_loss

    def bad_from_the_eleventh_step(trainer, *inputs, **options):
        loss = loss_of(trainer, *inputs, **options)
        return loss * float("nan") if trainer.model.training and trainer.state.global_step >= 10 else loss

    monkeypatch.setattr(trl.RewardTrainer, "compute_loss", bad_from_the_eleventh_step)
    (tmp_path / "preferences.jsonl").write_bytes((trained / "preferences.jsonl").read_bytes())
    flags = ["--run", tmp_path, "--batch-size", 8, "--derived", 0, "--checks", 6]
    assert step(*flags) == 2 and "not finite at step 10" in capsys.readouterr().err
    saved = sorted((tmp_path / "rm_checkpoints").glob("checkpoint-*/adapter_model.safetensors"))
    assert saved and all(weights.isfinite().all() for path in saved for weights in load_file(path).values())


def test_it_stops_when_held_out_pairs_no_longer_gain(trained: Path, tmp_path: Path, step) -> None:
    (tmp_path / "preferences.jsonl").write_bytes((trained / "preferences.jsonl").read_bytes())
    flags = ["--learning-rate", 0, "--patience", 1, "--batch-size", 8, "--checks", 8, "--derived", 0]
    assert step("--run", tmp_path, *flags, "--stress-size", 5) == 0
    log = json.loads((tmp_path / "02_summary.json").read_text())["log"]
    assert len([entry for entry in log if "eval_loss" in entry]) == 2  # of eight


def test_pairs_that_are_all_too_long_are_refused(trained: Path, tmp_path: Path, step, capsys) -> None:
    (tmp_path / "preferences.jsonl").write_bytes((trained / "preferences.jsonl").read_bytes())
    assert step("--run", tmp_path, "--derived", 0, "--max-length", 5) == 2
    assert "--max-length" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plain(trained: Path, tmp_path_factory) -> Path:
    """The folder of a plain run in four bits on the same pairs: the longer text wins each of them."""
    run = tmp_path_factory.mktemp("plain")
    (run / "preferences.jsonl").write_bytes((trained / "preferences.jsonl").read_bytes())
    flags = ["--bits", 4, "--derived", 0, "--length-tolerance", 1, "--checks", 1, "--epochs", 3, "--stress-size", 20]
    done = run_script(SCRIPT, "--offline", "--run", run, *flags)
    assert done.returncode == 0, done.stderr
    return run


def test_four_bits_on_a_cpu_learn_too(plain: Path) -> None:
    summary = json.loads((plain / "02_summary.json").read_text())
    assert json.loads((plain / "rm/calibration.json").read_text())["bits"] == 4
    assert summary["eval"]["all"]["value"] > 0.6


def test_the_robust_model_withstands_what_the_plain_one_falls_for(trained: Path, plain: Path) -> None:
    robust, bought = (json.loads((run / "02_summary.json").read_text())["eval"] for run in (trained, plain))
    attacks = ("attack: plea", "attack: form", "attack: task_talk")  # of 20 texts each
    gains = [robust[name]["value"] - bought[name]["value"] for name in attacks]
    assert min(gains) > 0 and sum(gains) / 3 > 0.1


def test_scores_in_four_bits_hardly_depend_on_the_batch(plain: Path) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    card = (plain / "rm/README.md").read_text(encoding="utf-8")
    base, _ = find_policy(plain / "rm")
    model = RewardModel(plain / "rm", base, ROOT / "prompts")
    assert any(isinstance(module, Linear4bit) for module in model.model.modules())
    assert model.model.base_model.model.score.modules_to_save["default"].weight.dtype == torch.float32
    rows = lines(plain / "rm_eval.jsonl")[:20]
    chats = [[{"role": "user", "content": r["query"]}, {"role": "assistant", "content": r["chosen"]}] for r in rows]
    together, alone = model.score_conversations(chats), model.score_conversations(chats, batch_size=1)
    assert together == pytest.approx(alone, abs=0.05)
    assert model.score_conversations(chats) == pytest.approx(together, abs=1e-3)
    names: dict = {}
    code = card_code(card, plain)
    if not multiplies_in_bf16():  # then this machine computes in fp32 instead
        code = code.replace('"bfloat16"', '"float32"')
    exec(code, names)
    assert [names["score"](r["query"], r["chosen"]) for r in rows[:5]] == pytest.approx(alone[:5], abs=0.05)


def test_a_reward_model_that_is_not_whole_is_refused(plain: Path, tmp_path: Path, step, capsys) -> None:
    shutil.copytree(plain / "rm", tmp_path / "rm")
    (tmp_path / "rm" / "calibration.json").unlink()
    write(tmp_path / "some.jsonl", [{"query": "教师节", "response": "老师好。"}])
    assert step("--run", tmp_path, "--score", tmp_path / "some.jsonl") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run 02_train_rm.py again" in line


def test_a_file_to_score_may_have_a_mark_blank_lines_and_separators_in_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row is printed as it was, beside its own score."""
    step2, file = importlib.import_module("02_train_rm"), tmp_path / "c.jsonl"
    rows = [{"query": "教师节", "response": f" 愿您\u2028{n}\x85", "mine": n} for n in range(5)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\ufeff" + "\r\n\r\n".join(texts), encoding="utf-8", newline="")
    scorer = Namespace(score=lambda pairs: [len(text) / 10 for _, text in pairs])
    monkeypatch.setattr(step2, "RewardModel", lambda *args: scorer)
    args = Namespace(run=tmp_path, bits=16, prompts=None, score=file, batch_size_generate=2)
    step2.score_file(args, "base")
    printed = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert printed == [row | {"score": 0.4} for row in rows]


def test_early_stopping_keeps_its_count_over_kills(pairs: list[Preference], tmp_path: Path, step) -> None:
    """Never killed, killed once and twice after the training, and between two checks: the same weights."""
    write(tmp_path / "preferences.jsonl", pairs[:110])
    flags = ["--run", tmp_path, "--learning-rate", 0.02, "--patience", 1, "--checks", 8, "--batch-size", 8]
    weights, stage = tmp_path / "rm/adapter_model.safetensors", tmp_path / "stages/02_rm.json"
    checkpoints, made = tmp_path / "rm_checkpoints", []
    for kill in (None, "after", "after", "between"):
        if kill:
            run_folder._locks.clear()  # as the end of a process does
            shutil.rmtree(tmp_path / "rm")
            stage.write_text(stage.read_text().replace('"done": true', '"done": false'))
        if kill == "between":
            shutil.rmtree(last_checkpoint(checkpoints))
            (checkpoints / "checkpoint-999").mkdir()  # was being written
        assert step(*flags, "--derived", 1, "--stress-size", 5) == 0
        log = json.loads((tmp_path / "02_summary.json").read_text())["log"]
        made.append((file_hash(weights), [entry["step"] for entry in log if "eval_loss" in entry]))
    assert len(made[0][1]) < 8  # it did stop early
    assert made[1:] == [made[0]] * 3


def test_a_base_without_a_chat_template_is_refused_before_it_is_loaded(
    pairs: list[Preference], tmp_path: Path, step, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(rm, "load_base", lambda *some, **more: pytest.fail("it was loaded"))
    folder = Path(shutil.copytree(tiny_policy(), tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    write(tmp_path / "preferences.jsonl", pairs)
    assert step("--run", tmp_path, "--policy", folder, "--derived", 0) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no chat template" in line


def test_a_base_that_names_no_pad_token_is_scored_in_batches(pairs: list[Preference], tmp_path: Path, step) -> None:
    folder = Path(shutil.copytree(tiny_policy(), tmp_path / "base"))
    for name, absent in {"tokenizer_config": "pad_token", "config": "pad_token_id"}.items():
        values = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(values | {absent: None}))
    write(tmp_path / "preferences.jsonl", pairs[:80])
    assert step("--run", tmp_path, "--policy", folder, "--derived", 0, "--checks", 1, "--stress-size", 5) == 0
    names: dict = {}
    exec(card_code((tmp_path / "rm/README.md").read_text(encoding="utf-8"), tmp_path), names)
    for row in lines(tmp_path / "rm_eval.jsonl")[:5]:
        assert names["score"](row["query"], row["chosen"]) == pytest.approx(row["chosen_score"], abs=1e-3)
