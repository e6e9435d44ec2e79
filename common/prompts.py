"""Prompt files: prompts/ROLE.md, one for each role, in Chinese, a Jinja template with named slots.

The part above a line `---` is the system message, the rest the user's. The files may be edited freely: a slot that
is not there to fill in, or a fault in the template, ends the script with one line that names file and slot.
"""

import re
from functools import lru_cache
from pathlib import Path

import jinja2.meta

from common.records import Messages
from common.run_folder import ROOT, fail, file_hash, read_text

PROMPTS = ROOT / "prompts"


@lru_cache
def _templates(path: Path) -> tuple[list[jinja2.Template], set[str]]:
    """(the templates above and below the `---` of a prompt file, the names of all their slots)."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # `tojson` writes < and > as \u003c and \u003e: what is judged cannot close the <data> around it.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    if not path.is_file():
        fail(f"{path} does not exist; restore it with: git checkout {path}")
    text = read_text(path)
    try:
        # The whole file is parsed before its parts, so that an error names a line of the file.
        slots = jinja2.meta.find_undeclared_variables(environment.parse(text))
        parts = [environment.from_string(part.strip()) for part in re.split(r"^---\n", text, flags=re.M)]
    except jinja2.TemplateSyntaxError as e:
        fail(f"{path}:{e.lineno}: {e.message}")
    if len(parts) > 2:
        fail(f"{path}: more than one line '---'; only the one between the system message and the user's is allowed")
    return parts, slots


def render(role: str, folder: Path = PROMPTS, **slots) -> Messages:
    """The messages of a role, system and user or user alone, with the slots filled in."""
    path = folder / f"{role}.md"
    parts, wanted = _templates(path)
    missing = sorted(wanted - slots.keys())
    if missing:
        fail(f"{path}: no slot {', '.join(missing)} here; the slots are {', '.join(sorted(slots))}")
    try:
        texts = [part.render(slots) for part in parts]
    except (jinja2.UndefinedError, TypeError) as e:
        fail(f"{path}: {e}; the slots are {', '.join(sorted(slots))}")
    speakers = ["system", "user"][-len(parts) :]
    return [{"role": speaker, "content": text} for speaker, text in zip(speakers, texts, strict=True)]


def prompt_hashes(roles: list[str], folder: Path = PROMPTS) -> dict[str, str]:
    """Role -> hash of its prompt file, for the settings of a stage."""
    return {role: file_hash(folder / f"{role}.md") for role in roles}


def read_rules(path: Path) -> list[str]:
    """The rules of a list file such as prompts/principles.md, one a line; nobody's rule may get lost over its dash."""
    if not path.is_file():
        fail(f"{path} does not exist; write one rule per line, each beginning with '- '")
    rules = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        rule = re.match(r"\s*(?:[-*•–－]|\d+[.、)])\s+(.+)", line)
        if rule:
            rules.append(rule[1].strip())
        elif rules and line.strip() and not line.startswith("#"):
            fail(f"{path}:{number}: no rule; write one per line, each beginning with '- '")
    return rules or fail(f"{path} holds no rule; write one per line, each beginning with '- '")


def conversation(query: str, prompts: Path) -> list[dict]:
    """What the policy is asked for a query: prompts/policy.md with the query in it, as chat messages."""
    return render("policy", prompts, query=query)
