"""The JSONL files and the run folder: what is read, mended, kept, refused."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common import run_folder
from common.records import (
    PARTS,
    Appender,
    Candidate,
    Labelled,
    Preference,
    Query,
    read,
    read_lines,
    split_labelled,
    stream,
    write,
)
from common.report.evaluators import training_texts
from common.run_folder import ROOT, Stage, digest, open_run

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
        (SIX + b"{oops}\n", ["q.jsonl:7:", "not JSON", "fix or delete"]),
        (b'{"query": "a"}\n{"text": "b"}\n', ["q.jsonl:2:", "query: Field required", "needs query"]),
        (b'{"query": " "}\n', ["q.jsonl:1:", "query: ", "needs query"]),
        (b'["query"]\n', ["q.jsonl:1:", "needs query"]),
        (b'{"query": "a"}\n\n{"query": " a "}\n', ["q.jsonl:3:", "same id as", "q.jsonl:1 (", "delete one"]),
        (b'{"id": "x", "query": "a"}\n{"id": "x", "query": "b"}\n', ["q.jsonl:2:", "q.jsonl:1 (x)", "delete"]),
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
    assert f"{path}:2:" in line and "fix or delete" in line
    assert path.read_bytes() == before


def test_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "c.jsonl"
    write(path, GREETINGS)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write(path, [GREETINGS[1], {"x": object()}])
    assert path.read_bytes() == before and read(path, Candidate) == GREETINGS


# ---- text as it comes: line separators, byte order marks, half characters, ids ---------------------------------------


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\v", "\f", "\r", "\r\n"])
def test_only_a_newline_ends_a_row(tmp_path: Path, mark: str) -> None:
    path, rows = (
        tmp_path / "rows.jsonl",
        [{"query": "春节", "response": f"愿你{mark}平安"}, {"query": "元宵", "response": "月圆"}],
    )
    write(path, rows)
    assert read_lines(path) == rows and [record.response for record in read(path, Candidate)] == [
        f"愿你{mark}平安",
        "月圆",
    ]
    write(path, (record for record in read(path, Candidate)))
    with Appender(path) as append:
        assert append.done == {record.id for record in read(path, Candidate)}
    assert read_lines(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_marks_are_taken_off_every_line(tmp_path: Path, end: bytes) -> None:
    """Two files that each begin with a mark, joined by `cat`, and a last line that holds nothing else."""
    path, bom = tmp_path / "q.jsonl", "\ufeff".encode()
    path.write_bytes(bom + b'{"query": "a"}' + end + bom + bom + b'{"query": "b"}' + end + bom)
    assert [query.query for query in read(path, Query)] == ["a", "b"]
    assert read_lines(path) == [{"query": "a"}, {"query": "b"}]


def test_half_of_a_character_is_replaced_where_it_is_read_and_where_it_is_written(tmp_path: Path) -> None:
    """JSON may name half of a surrogate pair, as where a text was cut inside an emoji; UTF-8 cannot hold it."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"query": "春节", "response": "平安\\ud83d", "mine": ["\\ude00", "\\ud83d\\ude00"]}\n')
    (record,) = read(path, Candidate)
    assert (record.response, record.mine) == ("平安\ufffd", ["\ufffd", "😀"])
    record.source = "cut \ud83d"
    with Appender(tmp_path / "appended.jsonl") as append:
        append(record)
    write(tmp_path / "written.jsonl", [record, {"x": "\ud83d"}])
    run_folder.replace_file(tmp_path / "replaced.txt", "caf\udce9 \ud83d\ude00")  # a folder's name that is not UTF-8
    assert [row["source"] for row in read_lines(tmp_path / "appended.jsonl")] == ["cut \ufffd"]
    assert read_lines(tmp_path / "written.jsonl")[1] == {"x": "\ufffd"}
    assert (tmp_path / "replaced.txt").read_text(encoding="utf-8") == "caf\ufffd 😀"
    assert digest("\ud83d") != digest("\ude00")


@pytest.mark.parametrize(("given", "taken"), [("7", "7"), ("1.0", "1.0"), ('"x"', "x"), ('" "', Query(query="a").id)])
def test_a_number_as_an_id_is_taken_as_text(tmp_path: Path, given: str, taken: str) -> None:
    (tmp_path / "q.jsonl").write_text(f'{{"id": {given}, "query": "a"}}\n')
    assert [query.id for query in read(tmp_path / "q.jsonl", Query)] == [taken]


@pytest.mark.parametrize("given", ["null", "true", "[1]", "{}"])
def test_an_id_that_is_none_is_refused(tmp_path: Path, refusal: Refusal, given: str) -> None:
    (tmp_path / "q.jsonl").write_text(f'{{"query": "b"}}\n{{"id": {given}, "query": "a"}}\n')
    line = refusal(lambda: read(tmp_path / "q.jsonl", Query))
    assert "q.jsonl:2: id: " in line and "or leave it out" in line and "needs query" not in line


def test_an_id_that_two_records_share_is_named_with_both_places(tmp_path: Path, refusal: Refusal) -> None:
    """Numbers that begin anew in each file; the very same record twice is nobody's loss."""
    one, other, number = (tmp_path / name for name in ("one.jsonl", "other.jsonl", "number.jsonl"))
    one.write_text('{"id": "1", "query": "a", "response": "x"}\n\n{"id": "1", "query": "a", "response": "x "}\n')
    other.write_text('{"query": "a", "response": "y"}\n{"id": "1", "query": "a", "response": "y"}\n')
    number.write_text('{"id": 1, "query": "b", "response": "x"}\n')
    for second, place in ((other, "other.jsonl:2:"), (number, "number.jsonl:1:")):
        ids: dict[str, tuple] = {}
        assert len(list(stream(one, Candidate, unique=ids))) == 2
        line = refusal(lambda: list(stream(second, Candidate, unique=ids)))  # noqa: B023 - called at once
        assert place in line and "one.jsonl:1" in line and "(1)" in line


# ---- settings: the flags of named groups ----------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """The settings of a stage of the group "data", if a script is called with these flags."""

    def settings(*flags: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        parser = argparse.ArgumentParser()
        run_folder.add_run_flags(parser)
        add = parser.add_argument_group("data").add_argument
        add("--rows", type=int, default=4)
        add("--labels", type=Path)
        add("--more", type=Path, nargs="*", default=[])
        parser.add_argument_group("pace").add_argument("--concurrency", type=int, default=8)
        return run_folder.settings(run_folder.parse(parser, {"rows": 2}), "data")

    return settings


def test_only_the_seed_and_the_flags_of_named_groups_are_settings(call: Callable[..., dict]) -> None:
    assert call() == {"seed": 0, "rows": 4, "labels": None, "more": []}
    assert call("--offline") == call("--rows", 2) == {"seed": 0, "rows": 2, "labels": None, "more": []}
    assert call("--seed", 7)["seed"] == 7
    assert call("--concurrency", 1, "--run", "elsewhere", "--redo") == call()


def test_a_file_counts_by_its_content_and_not_by_its_name(tmp_path: Path, call: Callable[..., dict]) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_text("a")
    same.write_text("a")
    other.write_text("b")
    assert call("--labels", one) == call("--labels", same) != call("--labels", other)
    assert call("--more", one, other) == call("--more", same, other) != call("--more", one)
    assert run_folder.file_hash("") == ""  # and not of the working directory


def test_a_summary_names_figures_flags_and_packages(tmp_path: Path) -> None:
    args = argparse.Namespace(run=tmp_path, seed=3, flag_groups={"run": ["run", "seed"]})
    run_folder.write_summary(args, "09_summary", 0.0, {"pairs": 5})
    summary = run_folder.read_summary(tmp_path, "09_summary")
    assert summary["pairs"] == 5 and summary["seconds"] > 0 and "torch" in summary["packages"]
    assert summary["settings"] == {"run": str(tmp_path), "seed": 3}
    assert run_folder.read_summary(tmp_path, "08_summary") == {}


# ---- stages ---------------------------------------------------------------------------------------------------------


def make_stage(run: Path, text: str = "old", finish: bool = True, **settings: object) -> Stage:
    stage = Stage(run, "01_step", ["a.jsonl", "model"], {"seed": 0, "samples": 4} | settings)
    (run / "model").mkdir(parents=True, exist_ok=True)
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


def test_a_flag_that_is_gone_since_refuses_no_run_in_which_it_was_off(tmp_path: Path, refusal: Refusal) -> None:
    make_stage(tmp_path, rounds=0, search=None)
    assert reopen(tmp_path).done
    assert "rounds=0" in refusal(lambda: reopen(tmp_path, rounds=2))
    make_stage(tmp_path / "on", rounds=2)
    assert "rounds=2" in refusal(lambda: reopen(tmp_path / "on"))


def test_redo_moves_the_old_outputs_and_settings_to_replaced(tmp_path: Path) -> None:
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


def test_a_stage_of_a_checkout_that_was_moved_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was made with names a model inside the checkout; one elsewhere is another one at another place."""
    keys = []
    for checkout in ("/old/checkout", "/new/检出"):
        monkeypatch.setattr(run_folder, "ROOT", Path(checkout))
        base = f"{checkout}/outputs/tiny"
        stage = Stage(tmp_path, "02_rm", ["a"], {"base": base, "policies": [base, "/models/qwen"]})
        keys.append(digest("query", base, 1))
        (tmp_path / "a").touch()
    assert not stage.replaced and keys[0] == keys[1] != digest("query", "/models/tiny", 1)
    stage.finish()
    assert Stage(tmp_path, "02_rm", ["a"], {"base": base, "policies": [base, "/models/qwen"]}).done
    monkeypatch.setattr(run_folder, "ROOT", Path("/new"))
    with pytest.raises(SystemExit):
        Stage(tmp_path, "02_rm", ["a"], {"base": "/models/tiny", "policies": [base, "/models/qwen"]})


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


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_torn_json_file_of_a_run_folder_is_one_line_that_names_it(
    tmp_path: Path, refusal: Refusal, keep: int
) -> None:
    make_stage(tmp_path)
    args = argparse.Namespace(run=tmp_path, seed=3, flag_groups={})
    run_folder.write_summary(args, "09_summary", 0.0, {"pairs": 5})
    stage, summary = tmp_path / "stages/01_step.json", tmp_path / "09_summary.json"
    for path in (stage, summary):
        path.write_bytes(path.read_bytes().strip()[:keep])
    before = tree(tmp_path)
    for path, read_it in (
        (stage, lambda: reopen(tmp_path, redo=True)),
        (stage, lambda: run_folder.unfinished(tmp_path, "01_step")),
        (summary, lambda: run_folder.read_summary(tmp_path, "09_summary")),
    ):
        line = refusal(read_it)
        assert str(path) in line and "delete it" in line, line
    assert tree(tmp_path) == before


def test_a_terminal_that_knows_no_emoji_ends_no_run() -> None:
    code = "from common.run_folder import launch; launch(lambda args: print('平安 🎉 \\ud83d'), None)"
    environment = os.environ | {"PYTHONIOENCODING": "gbk"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 0 and "平安".encode("gbk") in done.stdout, done.stderr


def test_a_summary_finds_its_inputs_again_in_a_checkout_that_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "old/outputs/run"
    write(
        run / "sft.jsonl",
        [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}],
    )
    monkeypatch.setattr(run_folder, "ROOT", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    args = argparse.Namespace(run=Path("outputs/run"), sft=Path("outputs/run/sft.jsonl"))
    run_folder.write_summary(args, "04_summary_none", 0.0, {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.setattr(run_folder, "ROOT", tmp_path / "new")
    assert training_texts(tmp_path / "new/outputs/run")["sft"] == {"a"}


def test_a_second_process_is_refused_while_the_first_holds_the_run_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from common.run_folder import open_run; open_run(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    open_run(tmp_path / "run")
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    run_folder._locks.pop().close()
    assert refused.returncode == 2 and not refused.stdout and refused.stderr.count("\n") == 1
    assert str(tmp_path / "run") in refused.stderr and "--run" in refused.stderr
    assert subprocess.run(command, cwd=ROOT).returncode == 0


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
