"""Prompt files: every slot filled in, and what is judged held as data, whatever it says."""

import codecs
import shutil
from pathlib import Path

import pytest
from endpoint import HOSTILE, data_of

from common.answers import FlawedGreeting, Grades, Lesson, Points, Preferred, Rules, Verdict
from common.prompts import PROMPTS, read_rules, render

SEEN = {"query": "祝福妈妈 母亲节", "response": "妈妈，愿你“平安”🎉。"}
EXAMPLES = {"examples": [{"query": "教师节", "response": "老师，节日快乐。"}]}
DEBATE = SEEN | EXAMPLES | {"positive": ["真诚"], "negative": ["套话 <b>"]}
VERDICT = {"reason": "有套话", "verdict": 0}
ROLES = {  # role: (the slots in its <data>, the schema of its answer)
    "positive": (SEEN | EXAMPLES, Points), "negative": (SEEN | EXAMPLES, Points),
    "judge": (DEBATE, Verdict), "reflect": (DEBATE | {"judge": VERDICT}, Verdict),
    "detector": (SEEN, Verdict), "reflector": (SEEN | VERDICT | {"expected": 1}, Lesson),
    "generator": (EXAMPLES | {"query": "教师节", "strategy": "打乱词序"}, FlawedGreeting),
    "optimiser": ({"kind": "准则", "rules": ["通顺"], "feedback": ["补上：套话"]}, Rules),
    "rubric": (SEEN, Grades), "pairwise": ({"query": "教师节", "A": "老师好。", "B": "桃李满园。"}, Preferred),
}  # fmt: skip  # fmt: skip
LISTED = {"principles": ["语言通顺", "情感真挚"]}  # above the data, in two roles
SLOTS = {
    role: data | (LISTED if role in ("detector", "reflector") else {}) for role, (data, _) in ROLES.items()
}  # in two roles, above the data
SLOTS["policy"] = {"query": "教师节"}


def test_every_prompt_file_is_a_role_or_a_list_of_rules() -> None:
    lists = {"principles", "strategies"}
    assert {p.stem for p in PROMPTS.glob("*.md")} == SLOTS.keys() | lists
    assert all(read_rules(PROMPTS / f"{name}.md") for name in lists)
    assert render("policy", query="教师节") == [{"role": "user", "content": "请只生成一条祝福语：教师节"}]


@pytest.mark.parametrize("role", ROLES)
def test_a_prompt_holds_its_slots_and_names_the_keys_of_its_answer(role: str) -> None:
    data, answer = ROLES[role]
    system, user = render(role, **SLOTS[role])
    assert (system["role"], user["role"], data_of([system, user])) == ("system", "user", data)
    assert all(f'"{key}"' in user["content"].split("</data>")[1] for key in answer.model_fields)
    assert ("1. 语言通顺\n2. 情感真挚\n" in system["content"]) == ("principles" in SLOTS[role])


@pytest.mark.parametrize(("role", "slot"), [(role, slot) for role in SLOTS for slot in SLOTS[role]])
def test_a_missing_slot_is_named_with_its_file(capsys: pytest.CaptureFixture[str], role: str, slot: str) -> None:
    with pytest.raises(SystemExit) as end:
        render(role, **{name: value for name, value in SLOTS[role].items() if name != slot})
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert f"{role}.md" in line and slot in line.split(f"{role}.md")[1]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("role", [role for role, (data, _) in ROLES.items() if "response" in data])
def test_what_is_judged_stays_inside_data(role: str, text: str) -> None:
    hostile = {"query": text, "response": text}
    system, user = render(role, **SLOTS[role] | hostile)
    assert data_of([system, user]) == ROLES[role][0] | hostile and system == render(role, **SLOTS[role])[0]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_an_editor_s_marks_and_line_ends_change_no_prompt(tmp_path: Path, mark: bytes, end: str) -> None:
    shutil.copytree(PROMPTS, tmp_path / "prompts")
    for path in (tmp_path / "prompts").glob("*.md"):
        path.write_bytes(mark + path.read_bytes().replace(b"\n", end.encode()))
    assert render("policy", tmp_path / "prompts", **SLOTS["policy"]) == render("policy", **SLOTS["policy"])
    for role in ROLES:
        assert render(role, tmp_path / "prompts", **SLOTS[role]) == render(role, **SLOTS[role])
    for name in ("principles", "strategies"):
        assert read_rules(tmp_path / "prompts" / f"{name}.md") == read_rules(PROMPTS / f"{name}.md")


def test_no_rule_is_lost_where_files_are_joined_or_a_rule_holds_a_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "rules.md"
    path.write_text("\ufeff- 语言\u2028通顺\r\n\ufeff- 情感\x85真挚\r\n", encoding="utf-8", newline="")
    assert read_rules(path) == ["语言\u2028通顺", "情感\x85真挚"]


def test_a_rule_may_begin_with_any_dash_or_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rules.md"
    path.write_text("# 准则\n\n-\u3000甲\n-\t乙\n－ 丙\n* 丁\n1. 戊\n", encoding="utf-8")
    assert read_rules(path) == ["甲", "乙", "丙", "丁", "戊"]
    path.write_text("- 甲\n  乙，还没完\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        read_rules(path)
    assert f"{path}:2: no rule" in capsys.readouterr().err


def test_rules_that_are_not_utf_8_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rules.md"
    path.write_bytes("- 语言通顺\n".encode("gbk"))
    with pytest.raises(SystemExit) as end:
        read_rules(path)
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {path}: not UTF-8; save the file as UTF-8\n"
