"""The JSONL files and the run folder: what is read, mended, kept, refused; and the figures computed from verdicts."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, precision_score, recall_score

from common import run_folder
from common.records import PARTS, Appender, Candidate, Labelled, Preference, Query, read, split_labelled, write
from common.run_folder import ROOT, Stage, digest, open_run
from common.stats import agreement, rate

GREETINGS = [Candidate(query=f"祝福 {n}", response=f"第{n}句：愿你“平安”喜乐 🎉，万事如意。") for n in range(3)]
SIX = b"".join(b'{"query": "%d"}\n' % n for n in range(6))
Refusal = Callable[[Callable[[], object]], str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Gives the one line on stderr of a call that ends the program with exit code 2."""

    def line_of(call: Callable[[], object]) -> str:
        with pytest.raises(SystemExit) as end:
            call()
        out, err = capsys.readouterr()
        assert end.value.code == 2 and not out
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return line_of


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ["q.jsonl does not exist", "python make.py"]),
        (b"", ["q.jsonl is empty", "python make.py"]),
        (SIX + b"{oops}\n", ["q.jsonl:7:", "not JSON", "mend or delete"]),
        (b'{"query": "a"}\n{"text": "b"}\n', ["q.jsonl:2:", "query: Field required", "needs query"]),
        (b'{"query": " "}\n', ["q.jsonl:1:", "query: ", "needs query"]),
        (b'["query"]\n', ["q.jsonl:1:", "needs query"]),
        (b'{"query": "a"}\n\n{"query": " a "}\n', ["q.jsonl:3:", "same id as line 1", "delete one"]),
        (b'{"id": "x", "query": "a"}\n{"id": "x", "query": "b"}\n', ["q.jsonl:2:", "same id as line 1 (x)", "delete"]),
        ('{"query": "a"}\n{"query": "母亲节"}\n'.encode("gbk"), ["q.jsonl:2:", "not UTF-8", "save the file as UTF-8"]),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, refusal: Refusal, content: bytes | None, named: list) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content)
    line = refusal(lambda: read(path, Query, "python make.py"))
    assert all(part in line for part in [str(path), *named]), line


def test_read_keeps_unknown_keys_given_ids_and_order_and_skips_blank_lines_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "b", "mine": [1]}\n\n{"query": "a", "id": "given"}')
    first, second = read(path, Query)
    assert (first.query, first.mine, first.id) == ("b", [1], Query(query="b").id)
    assert (second.query, second.id) == ("a", "given")


def test_ids_are_stable_and_differ_with_content() -> None:
    assert Query(query="母亲节").id == Query(query=" 母亲节\n", occasion="节日", mine=1).id == "200c446f220c59c8"
    texts = [("a", "b"), ("ab", ""), ("", "ab"), ("a", "c"), ("b", "a"), ("a", "b ")]
    assert len({digest(*pair) for pair in texts}) == len(texts)
    assert len({Candidate(query=q, response=r).id for q in "ab" for r in "cd"} | {Query(query=q).id for q in "ab"}) == 6
    said = [[{"role": "assistant", "content": c}] for c in "ab"]
    pair = {"prompt": [{"role": "user", "content": "q"}], "chosen": said[0], "rejected": said[1]}
    assert Preference(**pair).id == Preference(**pair | {"why": "w", "prompt": [{"content": "q", "role": "user"}]}).id
    assert Preference(**pair).id != Preference(**pair | {"chosen": said[1], "rejected": said[0]}).id


def test_a_last_line_torn_at_any_byte_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with Appender(path) as append:
        for record in GREETINGS:
            append(record)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    assert len(whole) - start > len(whole[start:].decode()), "the line needs characters of several bytes"
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        with Appender(path) as append:
            kept = {json.loads(line)["id"] for line in path.read_bytes().splitlines()}
            assert kept >= {r.id for r in GREETINGS[:2]} and append.done == kept, f"cut at byte {cut} of {len(whole)}"
            for record in GREETINGS:
                if record.id not in append.done:
                    append(record)
        assert path.read_bytes() == whole, f"cut at byte {cut} of {len(whole)}"


@pytest.mark.parametrize("broken", [b'{"id": "a', b"\xff\xfe", b"[]", b"{}", b"3"])
def test_a_broken_middle_line_is_named_and_nothing_changed(tmp_path: Path, refusal: Refusal, broken: bytes) -> None:
    path = tmp_path / "c.jsonl"
    lines = [r.model_dump_json().encode() for r in GREETINGS]
    path.write_bytes(before := b"\n".join([lines[0], broken, *lines[1:], b""]))
    line = refusal(lambda: Appender(path))
    assert f"{path}:2:" in line and "mend or delete" in line
    assert path.read_bytes() == before


@pytest.mark.parametrize("rows", [[GREETINGS[1], {"x": object()}], [GREETINGS[1], {"x": "\ud83d"}]])
def test_write_leaves_the_old_file_when_it_fails(tmp_path: Path, rows: list) -> None:
    path = tmp_path / "new folder" / "c.jsonl"
    write(path, GREETINGS)
    before = path.read_bytes()
    with pytest.raises((TypeError, UnicodeEncodeError)):
        write(path, rows)
    assert path.read_bytes() == before and read(path, Candidate) == GREETINGS


def make_stage(run: Path, text: str = "old", finish: bool = True, **settings: object) -> Stage:
    stage = Stage(run, "01_step", ["a.jsonl", "model"], {"seed": 0, "samples": 4} | settings)
    (run / "model").mkdir(exist_ok=True)
    (run / "a.jsonl").write_text(text)
    (run / "model" / "w.bin").write_text(text)
    if finish:
        stage.finish()
    return stage


def reopen(run: Path, redo: bool = False, **settings: object) -> Stage:
    return Stage(run, "01_step", ["a.jsonl", "model"], {"seed": 0, "samples": 4} | settings, redo)


@pytest.mark.parametrize(("finish", "redo"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_stage_with_the_same_settings_is_resumed_or_found_done(tmp_path: Path, finish: bool, redo: bool) -> None:
    assert not make_stage(tmp_path, finish=finish).done
    before = tree(tmp_path)
    assert reopen(tmp_path, redo).done is finish
    assert tree(tmp_path) == before


@pytest.mark.parametrize("finish", [False, True])
def test_changed_settings_stop_a_stage_and_change_nothing(tmp_path: Path, refusal: Refusal, finish: bool) -> None:
    make_stage(tmp_path, finish=finish)
    before = tree(tmp_path)
    line = refusal(lambda: reopen(tmp_path, samples=8, bits=4))
    named = [str(tmp_path / "a.jsonl"), "samples=4", "samples=8", "bits=None", "bits=4", "--redo", "--run"]
    assert all(part in line for part in named) and "seed" not in line, line
    assert tree(tmp_path) == before


def test_redo_moves_the_old_outputs_and_settings_to_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda *a: "20250101-000000")  # also a second redo in one second
    make_stage(tmp_path, "first")
    for number, text in ((8, "second"), (16, "third")):
        assert not reopen(tmp_path, redo=True, samples=number).done
        assert not (tmp_path / "a.jsonl").exists() and not (tmp_path / "model").exists()
        make_stage(tmp_path, text, samples=number)
        assert reopen(tmp_path, samples=number).done
    kept = [p for p in (tmp_path / "replaced").rglob("*") if p.is_file()]
    assert sorted(p.read_text() for p in kept if p.suffix != ".json") == ["first"] * 2 + ["second"] * 2
    assert sorted(json.loads(p.read_text())["settings"]["samples"] for p in kept if p.suffix == ".json") == [4, 8]


def test_redo_moves_an_output_in_a_folder_of_its_own_too(tmp_path: Path) -> None:
    output = tmp_path / "generations/sft.jsonl"
    Stage(tmp_path, "greetings", ["generations/sft.jsonl"], {"seed": 0}).finish()
    output.parent.mkdir()
    output.write_text("first")
    assert not Stage(tmp_path, "greetings", ["generations/sft.jsonl"], {"seed": 1}, redo=True).done
    (moved,) = (tmp_path / "replaced").rglob("sft.jsonl")
    assert moved.read_text() == "first" and not output.exists()


def test_outputs_without_their_settings_are_not_taken_over(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "a.jsonl").write_text("whose?")
    line = refusal(lambda: reopen(tmp_path, redo=True))
    assert str(tmp_path / "a.jsonl") in line and "move it away" in line
    assert tree(tmp_path) == {"a.jsonl": b"whose?"}


def test_a_stage_whose_outputs_were_lost_is_not_done_until_it_is_finished_again(tmp_path: Path) -> None:
    make_stage(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    shutil.rmtree(tmp_path / "model")
    assert not reopen(tmp_path).done
    (tmp_path / "a.jsonl").write_text("half of it")  # and here the process is killed
    assert not reopen(tmp_path).done


def test_a_second_process_is_refused_while_the_first_holds_the_run_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from common.records import open_run; open_run(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    open_run(tmp_path / "run")
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    open_run.held.close()
    assert refused.returncode == 2 and not refused.stdout and refused.stderr.count("\n") == 1
    assert str(tmp_path / "run") in refused.stderr and "--run" in refused.stderr
    assert subprocess.run(command, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("right", "n", "lo", "hi"),
    [
        (0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0),
        (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662),
    ],
)  # fmt: skip
def test_rate_gives_the_wilson_interval(right: int, n: int, lo: float, hi: float) -> None:
    assert rate(right, n) == {"value": round(right / n, 4) if n else None, "lo": lo, "hi": hi, "n": n}


@pytest.mark.parametrize("seed", range(8))
def test_agreement_equals_sklearn_and_leaves_failures_out(seed: int) -> None:
    rng = random.Random(seed)
    labels = [int(rng.random() < 0.3 + seed / 20) for _ in range(60)]
    verdicts = [rng.choice([y, y, y, 1 - y, None]) for y in labels]
    true, said = zip(*((y, v) for y, v in zip(labels, verdicts, strict=True) if v is not None), strict=True)
    found = agreement(labels, verdicts)
    scores = {"kappa": cohen_kappa_score, "f1": f1_score, "precision": precision_score, "recall": recall_score}
    assert {k: found[k] for k in scores} == pytest.approx({k: f(true, said) for k, f in scores.items()}, abs=6e-5)
    assert found["accuracy"] == rate(round(accuracy_score(true, said) * len(true)), len(true))
    assert found["says_good"] == rate(sum(said), len(said))
    assert (found["n"], found["failed"]) == (len(true), verdicts.count(None)) and found["failed"] > 0


def test_kappa_has_the_large_sample_interval() -> None:
    found = agreement([1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    assert (found["kappa"], found["kappa_lo"], found["kappa_hi"]) == (0.4, 0.146, 0.654)


@pytest.mark.parametrize("constant", [0, 1, None])
@pytest.mark.parametrize("labels", [[0, 1, 1], [1, 1, 1], [0, 0, 0], []])
def test_a_judge_that_always_says_the_same_has_kappa_zero(labels: list[int], constant: int | None) -> None:
    found = agreement(labels, [constant] * len(labels))
    assert (found["kappa"], found["kappa_lo"] <= 0 <= found["kappa_hi"]) == (0.0, True)
    assert found["failed"] == (len(labels) if constant is None else 0)


def labelled(queries: int) -> list[Labelled]:
    return [Labelled(query=f"祝福 {q}", response=f"{q} {y}", label=y) for q in range(queries) for y in (0, 1)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_labelled_keeps_a_query_in_one_part_whatever_the_order(seed: int) -> None:
    rows = labelled(200)
    parts = split_labelled(rows, seed)
    assert sorted(r.id for part in parts.values() for r in part) == sorted(r.id for r in rows)
    assert len({(name, r.query) for name, part in parts.items() for r in part}) == 200
    assert {name: part[::-1] for name, part in split_labelled(rows[::-1], seed).items()} == parts
    assert split_labelled(rows, seed + 1) != parts
    assert all(abs(len(parts[name]) / len(rows) - share) < 0.15 for name, share in PARTS.items())


@pytest.mark.parametrize("rows", [[], labelled(20), [r for r in labelled(400) if r.label]])
def test_split_labelled_refuses_too_few_rows_or_labels(refusal: Refusal, rows: list) -> None:
    line = refusal(lambda: split_labelled(rows, 0))
    assert "reflect part" in line and "at least 30, of both labels" in line and "add rows" in line
