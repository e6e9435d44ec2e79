"""Free mutations of a text, in no family of spoilt.py, and what makes them worse than the text by construction.

They cut inside of clauses: what goes, comes or moves is then no phrase that stands by itself, and leaves a break.
"""

import random
from difflib import SequenceMatcher

NEW = 0.2  # least share of the characters that are new or out of place
OPERATIONS = ("insert", "insert", "replace", "replace", "repeat", "delete", "shuffle")

Runs = dict[str, list[str]]  # character -> runs of characters in which it occurs


def worse(greeting: str, text: str) -> bool:
    """Whether of the longer one's characters a fifth are new: in the text, and outside of what difflib matches."""
    blocks = SequenceMatcher(None, greeting, text, autojunk=False).get_matching_blocks()
    return len(text) - sum(block.size for block in blocks) >= NEW * max(len(greeting), len(text))


def vocabulary(texts: list[str]) -> Runs:
    """For every character of these texts the places where it occurs, with three characters on either side."""
    runs: Runs = {}
    for text in sorted(set(texts)):
        for place, letter in enumerate(text):
            runs.setdefault(letter, []).append(text[max(0, place - 3) : place + 4])
    return runs


def mutate(
    greeting: str, text: str, liked: list[str], near: list[str], runs: Runs, rng: random.Random
) -> tuple[str, set[str]]:
    """(the text after one to eight operations, as many as make it worse than the greeting; the runs put in).

    `liked` are runs to put in by preference, the best one first; others are cut from the texts `near`, or in `runs`.
    """
    put_in: set[str] = set()
    for _ in range(8):
        inside = [place for place in range(1, len(text)) if text[place - 1 : place + 1].isalnum()]
        start, length, operation = rng.choice(inside or [0]), rng.choice([1, 1, 2, 3, 4, 6]), rng.choice(OPERATIONS)
        if operation == "repeat" and rng.random() < 0.5:  # every other time a mark
            marks = [place for place, letter in enumerate(text) if not letter.isalnum()]
            start, length = rng.choice(marks or [0]), 1
        old = text[start : start + length]
        new = ""  # what stands there afterwards
        if operation == "shuffle":
            new = "".join(rng.sample(old, len(old)))
        elif operation == "repeat":
            new = old * rng.choice([2, 3, 4])
        elif operation in ("insert", "replace"):
            new = a_run(liked, near, runs, rng)
            length = length if operation == "replace" else 0
        if operation != "shuffle":
            put_in.add(new)
        text = text[:start] + new + text[start + length :]
        if worse(greeting, text):
            break
    return text.strip(), put_in - {""}


def a_run(liked: list[str], near: list[str], runs: Runs, rng: random.Random) -> str:
    """Every other time one that is liked; else as often a part of a text that is near as a run around any character."""
    if liked and rng.random() < 0.5:
        return liked[min(int(rng.expovariate(0.5)), len(liked) - 1)]  # the first one most often
    around = rng.choice(runs[rng.choice(list(runs))])  # rare characters as often as common ones
    text, length = rng.choice([*near, *[around] * len(near)]), rng.randint(1, 8)
    start = rng.randrange(max(1, len(text) - length + 1))
    return text[start : start + length]
