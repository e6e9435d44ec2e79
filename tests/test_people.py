"""Files that people saved, joined: whose ratings they are is said where a name cannot tell."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from test_report import rating
from test_stats import greeting

from common.records import write
from common.report.people import read_ratings


def test_one_name_in_two_files_is_one_person_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [greeting("a", n, f"祝{n}", 1) for n in range(2)]
    first, second, third = paths = [tmp_path / f"{n}.jsonl" for n in range(3)]
    write(first, [rating(row, "王芳", 1, time=1) for row in rows])
    write(second, [rating(row, who, 3, time=2) for row in rows for who in ("王芳 ", "李强")])
    write(third, [rating(rows[0], "赵敏", 2)])
    read = read_ratings(SimpleNamespace(annotations=[*paths, first], run=tmp_path), rows)
    grades = [(r.rater, r.id, r.grades["culture"]) for r in read]
    assert sorted(grades) == sorted(
        [(who, row["id"], 3) for row in rows for who in ("王芳", "李强")] + [("赵敏", rows[0]["id"], 2)]
    )
    said = f"{second}: 王芳 is in {first} too: if they are two people, rename one\n"
    assert capsys.readouterr().err == said
