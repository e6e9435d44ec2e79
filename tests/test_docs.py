"""The docs are true: both READMEs show the same commands, and what the docs name exists (files, flags, links)."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
OTHER_DOCS = [ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md", ROOT / "data/README.md"]
DOCS = [README, CHINESE, *OTHER_DOCS, *sorted(ROOT.glob("docs/**/*.md"))]
STEPS = sorted(path.name for path in ROOT.glob("0*.py"))
MOST_WORDS = 1600

SCRIPT = re.compile(r"(?:\b(?:tools|bench|data)/)?\b\w+\.(?:py|sh)\b")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
PATH = re.compile(r"\b(?:(?:tools|bench|tests|common|data)/[\w/]+\.(?:py|sh)|prompts/[a-z]+\.md|\d\d_[a-z]\w+\.py)\b")


def blocks(text: str, language: str) -> list[str]:
    """The text of the fenced code blocks of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def shell_commands(text: str) -> list[str]:
    """The lines of the shell blocks, continued lines joined, without comments."""
    commands = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(re.sub(r"(^|\s+)#.*", "", line).split())
            if command:
                commands.append(command)
    return commands


def code_spans(text: str) -> list[str]:
    """The text between single backticks, outside of the fenced blocks."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", outside)


def tree(text: str) -> list[str]:
    """The paths of the file tree; a name that is indented lies in the folder above it."""
    files = next(block for block in blocks(text, "text") if "run.sh" in block)
    paths, folder = [], ""
    for line in files.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        paths.append(folder + name if line.startswith(" ") else name)
    return paths


@functools.cache
def flags_of(script: str) -> set[str]:
    """The flags that a script knows: by its usage, or those that a shell script speaks of."""
    if script == "run.sh":  # it hands over to every step what it does not know itself
        return {"--check", "--paper", "--small"} | set.intersection(*(flags_of(step) for step in STEPS))
    if script.endswith(".sh"):
        return set(FLAG.findall((ROOT / script).read_text(encoding="utf-8")))
    shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    return {"--help"} | set(FLAG.findall(shown.stdout.split("\n\n")[0]))  # the usage, without the description


def unknown_flags(command: str) -> list[str]:
    """Flags in a command that the script before them does not know."""
    unknown, script = [], None
    for word in re.split(r"[\s=]+", command):
        if (found := SCRIPT.fullmatch(word)) and (ROOT / found.group()).is_file():
            script = found.group()
        elif script and FLAG.fullmatch(word) and word not in flags_of(script):
            unknown.append(f"{script} {word}")
    return unknown


def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in (README, CHINESE))
    assert shell_commands(english) == shell_commands(chinese) and len(shell_commands(english)) >= 6
    assert [c for c in code_spans(english) if "--" in c] == [c for c in code_spans(chinese) if "--" in c]
    assert tree(english) == tree(chinese)
    assert blocks(english, "text")[0] == blocks(chinese, "text")[0]  # the diagram


def test_the_readme_is_a_front_door() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_the_tree_names_what_is_there() -> None:
    paths = tree(README.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    there = [*ROOT.glob("0*.py"), *ROOT.glob("common/[a-z]*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tools/*.sh")]
    assert {str(path.relative_to(ROOT)) for path in there} <= set(paths)


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_links_and_flags_in_the_docs_exist(doc: Path) -> None:
    text = doc.read_text(encoding="utf-8")
    assert sorted({path for path in PATH.findall(text) if not (ROOT / path).exists()}) == []
    for page, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = doc.parent / page if page else doc
        assert target.exists(), page
        assert not anchor or anchor in anchors(target), f"{page}#{anchor}"
    for command in shell_commands(text) + code_spans(text):
        assert unknown_flags(command) == []
    # A flag named alone must be one that some script knows.
    scripts = [*STEPS, "run.sh", *(str(p.relative_to(ROOT)) for p in [*ROOT.glob("tools/*"), *ROOT.glob("bench/*.py")])]
    scripts = [name for name in [*scripts, "data/import_paper.py"] if name.endswith((".py", ".sh"))]
    alone = {span.split()[0] for span in code_spans(text) if FLAG.match(span)}
    assert [flag for flag in sorted(alone) if not any(flag in flags_of(script) for script in scripts)] == []
