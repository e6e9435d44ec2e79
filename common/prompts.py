"""Prompt files: one a role, in Chinese, a Jinja template with named slots."""

import re
from functools import lru_cache
from pathlib import Path

import jinja2.meta

from common.records import Messages
from common.run_folder import ROOT, fail, file_hash

PROMPTS = ROOT / "prompts"


@lru_cache
def _templates(path: Path) -> tuple[list[jinja2.Template | str], set[str]]:
    """(the parts above and below the `---` of a prompt file, as text where it has no slots; the names of all slots)."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # `tojson` writes < and > as \u003c and \u003e: what is judged cannot close the <data> it stands in.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    if not path.is_file():
        fail(f"{path} does not exist; restore it with: git checkout {path}")
    try:
        text = path.read_text(encoding="utf-8")
        environment.parse(text)  # so that a line it complains of is the file's
        parts = [part.strip() for part in re.split(r"^---\n", text, flags=re.M)]
        slots = [jinja2.meta.find_undeclared_variables(environment.parse(part)) for part in parts]
        templates = [environment.from_string(part) for part in parts]
    except jinja2.TemplateSyntaxError as e:
        fail(f"{path}:{e.lineno}: {e.message}")
    except UnicodeDecodeError:
        fail(f"{path}: not UTF-8; save the file as UTF-8")
    if len(parts) > 2:
        fail(f"{path}: more than one line '---'; one parts the system message from the user's")
    fixed = [t if names else t.render() for t, names in zip(templates, slots, strict=True)]
    return fixed, set().union(*slots)


def render(role: str, folder: Path = PROMPTS, **slots) -> Messages:
    """The messages of a role: what stands above `---` in its file is the system message, the rest the user's."""
    path = folder / f"{role}.md"
    parts, wanted = _templates(path)
    if missing := sorted(wanted - slots.keys()):
        fail(f"{path}: no slot {', '.join(missing)} here; the slots are {', '.join(sorted(slots))}")
    try:
        texts = [part if isinstance(part, str) else part.render(slots) for part in parts]
    except (jinja2.UndefinedError, TypeError) as e:
        fail(f"{path}: {e}; the slots are {', '.join(sorted(slots))}")
    roles = ["user"] if len(texts) == 1 else ["system", "user"]
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


def prompt_hashes(roles: list[str], folder: Path = PROMPTS) -> dict[str, str]:
    return {role: file_hash(folder / f"{role}.md") for role in roles}


def read_rules(path: Path) -> list[str]:
    """The rules of a list file such as prompts/principles.md: the lines that begin with "- "."""
    if not path.is_file():
        fail(f"{path} does not exist; write one rule a line, each beginning with '- '")
    lines = path.read_text(encoding="utf-8").splitlines()
    rules = [line.strip()[2:].strip() for line in lines if line.strip().startswith("- ")]
    return rules or fail(f"{path} holds no rule; write one a line, each beginning with '- '")


def conversation(query: str, prompts: Path) -> list[dict]:
    """What the policy is asked for a query: prompts/policy.md with the query in it, as chat messages."""
    return render("policy", prompts, query=query)
