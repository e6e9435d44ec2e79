"""The rounds of step 2: what a search wins from training texts is trained against, until little is bought."""

import importlib
import json
import random
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script
from process import start_script

from common import rounds
from common.pairs import Split, divide
from common.records import Preference, Reference, read, write
from common.run_folder import file_hash
from common.spoilt import KINDS, Pairs

step2 = importlib.import_module("02_train_rm")
SCRIPT = "02_train_rm.py"


def pair(query: str, chosen: str, rejected: str) -> Preference:
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return Preference(prompt=[{"role": "user", "content": query}], query=query, chosen=good, rejected=bad)


PAIRS = [pair(r.query, r.response, "好") for r in read(ROOT / "data/references.jsonl", Reference)[:200]]
GOOD = {one.texts[:2] for one in PAIRS}


def split_of(pairs: Pairs) -> Split:
    args = Namespace(seed=0)
    test, rest = divide(args, pairs, "test", 0.2)
    stop, train = divide(args, rest, "stop", 0.1)
    return Split(train, stop, test, {}, set())


class Fake:
    """A reward model that knows each query's good text, and likes others so much more, give or take a little."""

    def __init__(self, liking: float):
        self.liking = liking

    def score_conversations(self, conversations: list) -> list[float]:
        rows = [(messages[0]["content"], messages[-1]["content"]) for messages in conversations]
        return [0.0 if row in GOOD else self.liking + 0.1 * random.Random(row[1]).random() for row in rows]


def rate(*values: float) -> list[rounds.Round]:
    return [rounds.Round({"value": value}, [], []) for value in values]


def test_rounds_end_where_little_is_bought_or_two_rounds_gained_nothing() -> None:
    assert rounds.over(rate(0.04)) and rounds.over(rate(0.9, 0.5, 0.0))
    assert not rounds.over(rate(0.9)) and not rounds.over(rate(0.9, 0.9)) and not rounds.over(rate(0.9, 0.95, 0.85))
    assert rounds.over(rate(0.9, 0.95, 0.9)) and rounds.over(rate(0.9, 0.5, 0.6, 0.5))
    assert not rounds.over(rate(0.9, 0.9, 0.5, 0.6))  # the third one gained, and one without a gain is not two


def test_what_won_comes_from_training_texts_in_the_kinds_and_words_of_training() -> None:
    split = split_of(PAIRS)
    found = rounds.found(Fake(0.5), split, 0, 1, 999)
    assert found["bought"]["value"] == 1.0 and found["bought"]["n"] == len(split.stop)
    for name, pairs in (("train", split.train), ("held_out", split.stop)):
        won = [Preference(**row) for row in found[name]]
        searched = min(len(pairs), rounds.SEARCHED if name == "train" else rounds.HELD_OUT)
        assert len(won) == rounds.KEPT * searched
        for one in won:
            assert one.texts[:2] in {good.texts[:2] for good in pairs} and one.texts[::2] not in GOOD
            kinds = one.why.removeprefix("searched: ").split(", ")
            assert kinds and all(kind == "mutation" or KINDS[kind].trained for kind in kinds)
    assert found == rounds.found(Fake(0.5), split, 0, 1, 999)
    assert rounds.found(Fake(0.5), split, 0, 2, 999)["train"] != found["train"]


def test_what_is_far_below_its_text_teaches_nothing() -> None:
    split = split_of(PAIRS[:60])
    assert len(rounds.found(Fake(0.5), split, 0, 1, 7)["train"]) == 7
    near, far = (rounds.found(Fake(liking), split, 0, 1, 999) for liking in (-0.5, -1 - rounds.MARGIN))
    assert near["bought"]["value"] == far["bought"]["value"] == 0.0
    assert near["train"] and near["held_out"] and not far["train"] + far["held_out"]


@pytest.mark.parametrize(("liking", "searches", "trainings"), [(-0.5, 1, 1), (0.5, 3, 3)])
def test_rounds_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, liking: float, searches: int, trainings: int):
    """At once where nothing is bought, and after two rounds in which as much is bought as before."""
    made = []

    def train(args, pairs, passes, stop, base, into, start=None) -> list[dict]:
        made.append((into, start, len(pairs)))
        return [{"step": 5, "loss": 0.5}, {"step": 10}]

    fake = Fake(liking)
    fake.calibration_file = tmp_path / "calibration.json"
    fake.calibrate = lambda *rest: fake.calibration_file.touch()
    monkeypatch.setattr(step2, "train", train)
    monkeypatch.setattr(rounds, "RewardModel", lambda *rest: fake)
    monkeypatch.setattr("sys.argv", [SCRIPT, "--offline", "--run", str(tmp_path), "--rounds", "5"])
    log, figures = step2.train_in_rounds(step2.parse_args(), "base", split_of(PAIRS[:60]))
    assert len(figures["rounds"]) == searches and len(made) == trainings
    assert [entry["step"] for entry in log] == list(range(5, 10 * trainings + 1, 5))
    assert all(one["bought"]["value"] == float(liking > 0) for one in figures["rounds"])
    assert [one[0] for one in made] == ["rm_checkpoints", *(rounds.folder(n) for n in range(1, trainings))]
    assert made[0][1] is None and all(one[1] == tmp_path / "rm" for one in made[1:])
    assert not fake.calibration_file.exists()  # which would say that the training has ended


def outcome(run: Path) -> tuple:
    """The weights, and all that the summary says of them; of the log what does not tell how long it took."""
    summary = json.loads((run / "02_summary.json").read_text())
    figures = {name: summary[name] for name in ("eval", "bought", "rounds", "train_pairs", "derived_pairs")}
    log = [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in summary["log"]]
    figures["log"] = [entry for entry in log if entry[1:] != (None, None)]
    return file_hash(run / "rm/adapter_model.safetensors"), lines(run / "rm_eval.jsonl"), figures


def test_a_run_killed_in_two_rounds_comes_to_the_same(tmp_path: Path) -> None:
    """Once while a round trains, once after the search of the next one."""
    flags = ["--offline", "--stress-size", "5", "--derived", "1", "--rounds", "2", "--checks", "2"]
    kills = [rounds.folder(1) + "/checkpoint-*/trainer_state.json", rounds.folder(2) + "/found.json"]
    made = []
    for name in ("killed", "whole"):
        run = tmp_path / name
        write(run / "preferences.jsonl", PAIRS[:40])
        for killed_at in kills if name == "killed" else []:
            process = start_script(SCRIPT, *flags, "--run", run)
            while process.is_alive() and not list(run.glob(killed_at)):
                time.sleep(0.02)
            process.kill()
            process.join()
            assert not (run / "02_summary.json").exists() and list(run.glob(killed_at))
        done = run_script(SCRIPT, *flags, "--run", run)
        assert done.returncode == 0, done.stderr
        made.append(outcome(run))
    assert made[0] == made[1] and len(made[0][2]["rounds"]) == 2
