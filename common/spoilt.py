"""Texts spoilt on purpose, in families: to train the reward model on, to attack it with, and for the judge's bank.

A kind is one way of spoiling, a family what kinds have in common. Where a kind takes words, data/spoilt.json has them,
as templates: `[a|b]` is a choice, `{greeting}` a slot. Training draws the kinds that have wordings for training, in
these wordings; the tests draw all kinds in the others. The two sorts of wordings have no run of four characters in
common, so that a model which has only learnt wordings by heart fails the tests.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from common import constraints, lexicon
from common.lexicon import occasions_in, recipients_in
from common.records import Preference, Reference
from common.run_folder import ROOT, digest, read_text

FAMILIES = ("echo", "no_greeting", "task_talk", "form", "plea", "damage", "off_target")
WORDINGS = json.loads(read_text(ROOT / "data" / "spoilt.json"))  # family -> kind -> {"training", "held_out": templates}
SLOT = re.compile(r"\{(query|core|greeting|clause|other|stock|person|stranger|occasion)\}")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
TIMES = {"早安": "清晨", "晚安": "夜晚", "康复": "出院"}  # what these occasions are called where no wish is meant
TRIES = 30  # before a text is given up; the wish that a query holds, say, cannot be spoilt by repeating it
COMPOSED = 0.4  # how often a second way is tried; every other one would undo the first

Pairs = list[Preference]


class Source(NamedTuple):
    """What an edit is made from."""

    query: str
    greeting: str  # a good greeting for it
    other: str  # a good greeting for another occasion or person; "" where there is none


# (what to spoil, random numbers, whether as the tests do it) -> a worse text; "" where this one cannot be spoilt so
Spoiler = Callable[[Source, random.Random, bool], str]


class Kind(NamedTuple):
    family: str
    trained: bool
    make: Spoiler


# ---- edits in words -------------------------------------------------------------------------------------------------


def clauses(text: str) -> list[str]:
    """The clauses of a text, each with its punctuation mark."""
    return [clause for clause in re.split(r"(?<=[，。！？；、,!?;])", text) if clause]


def fill(template: str, source: Source, rng: random.Random) -> str:
    """The template with its choices made and its slots filled."""
    occasion = min(occasions_in(source.query), default="这个日子")
    slots = source._asdict() | {
        "query": re.sub(r"\s+", rng.choice([" ", "，", ""]), source.query),
        "core": lexicon.core(source.query),
        "clause": rng.choice(clauses(source.greeting)),
        "stock": "，".join(rng.sample(lexicon.STOCK, rng.randint(3, 5))),
        "person": min(recipients_in(source.query), default="大家"),
        "stranger": rng.choice(rng.choice(lexicon.strangers(source.query)).split("|")),
        "occasion": TIMES.get(occasion, occasion),
    }
    chosen = CHOICE.sub(lambda choice: rng.choice(choice[1].split("|")), template)
    return SLOT.sub(lambda slot: slots[slot[1]], chosen)


def in_words(wordings: dict, source: Source, rng: random.Random, held_out: bool) -> str:
    """One of the templates, filled; where a kind stands `anywhere`, put between, before or after the clauses."""
    if wordings in WORDINGS["echo"].values() and lexicon.FELICITATION.search(source.query):
        return ""  # "happy birthday, Mum" is no worse for being said
    templates = wordings["held_out" if held_out else "training"]
    templates = [template for template in templates if source.other or "{other}" not in template]
    if not templates:
        return ""
    piece = fill(rng.choice(templates), source, rng)
    if not wordings.get("anywhere"):
        return piece
    parts = clauses(source.greeting)
    parts.insert(rng.randrange(len(parts) + 1), piece)
    return "".join(parts)


# ---- edits that take no words ---------------------------------------------------------------------------------------


def shuffled(parts: Sequence[str], rng: random.Random) -> str:
    return "".join(rng.sample(parts, len(parts)))


def characters_shuffled(source: Source, rng: random.Random, held_out: bool) -> str:
    """All of them; in training those from somewhere in the first half on."""
    text = source.greeting
    start = 0 if held_out else rng.randrange(max(1, len(text) // 2))
    return text[:start] + shuffled(text[start:], rng)


def clauses_shuffled(source: Source, rng: random.Random, held_out: bool) -> str:
    """None if it ends as a sentence does: then it may read as well as before."""
    text = shuffled(clauses(source.greeting), rng)
    return text if text[-1] in "，、；,;" else ""


def cut(source: Source, rng: random.Random, held_out: bool) -> str:
    share = 2 / 3 if held_out else rng.choice([0.3, 0.4, 0.5, 0.6, 0.75])
    return re.sub(r"[，。！？；、~…\s]+$", "", source.greeting[: max(1, int(len(source.greeting) * share))])


def broken(source: Source, rng: random.Random, held_out: bool) -> str:
    """The longest clauses, up to two, read from their ends."""
    parts = re.split(r"([，。！？；、,!?;])", source.greeting)  # clauses at even places, marks at odd ones
    for place in sorted(range(0, len(parts), 2), key=lambda place: len(parts[place]))[-2:]:
        parts[place] = parts[place][::-1]
    return "".join(parts)


def other_occasion(source: Source, rng: random.Random, held_out: bool) -> str:
    named = occasions_in(source.query) and not lexicon.signs_of(occasions_in(source.query), source.other)
    return source.other if named else ""


def other_person(source: Source, rng: random.Random, held_out: bool) -> str:
    fits = lexicon.signs_of(occasions_in(source.query), source.other) or not occasions_in(source.query)
    return source.other if fits and names_others(source.query, source.other) else ""


def names_others(query: str, text: str) -> bool:
    """Whether a text names a person, and none of those for whom the query asks."""
    recipients = recipients_in(query)
    their_words = "|".join(pattern for name in recipients for pattern in lexicon.RECIPIENTS[name].values() if pattern)
    return bool(recipients and recipients_in(text)) and not re.search(their_words, text)


def constraint_broken(source: Source, rng: random.Random, held_out: bool) -> str:
    """Too long, in stock phrases, or in words of today, where the query forbids it; else none."""
    added = source.greeting + "，".join(rng.sample(lexicon.STOCK, 8)) + "！"
    worse = [text for text in (added, source.other) if text and constraints.broken(source.query, text)]
    return worse[0] if worse and not constraints.broken(source.query, source.greeting) else ""


KINDS: dict[str, Kind] = {}
for family, kinds in WORDINGS.items():
    for name, wordings in kinds.items():
        KINDS[name] = Kind(family, "training" in wordings, partial(in_words, wordings))
for spoiler in (cut, characters_shuffled, clauses_shuffled, broken):
    KINDS[spoiler.__name__] = Kind("damage", spoiler != broken, spoiler)
for spoiler in (other_occasion, other_person, constraint_broken):
    KINDS[spoiler.__name__] = Kind("off_target", spoiler != constraint_broken, spoiler)


# How much more often a family is drawn, and a kind within its family, because it is harder to tell or shows only beside
# the query.
FAMILY_WEIGHTS = {"damage": 3, "off_target": 4}
WEIGHTS = {"other_occasion": 3, "other_person": 2, "clause_repeated": 3, "cut": 6, "pasted_twice": 2}


def spoil(kind: str, source: Source, rng: random.Random, held_out: bool) -> str:
    """The greeting spoilt; "" where this one cannot be. held_out: in wordings that training never sees."""
    if not held_out and not KINDS[kind].trained:
        raise ValueError(f"{kind} is a kind that is never trained on")
    spoilt = KINDS[kind].make(source, rng, held_out).strip()
    return "" if spoilt == source.greeting.strip() else spoilt


def kinds_of(family: str, held_out: bool) -> list[str]:
    """The kinds of a family: those that are trained on, with held_out all of them, the unseen ones first."""
    names = [name for name, kind in KINDS.items() if kind.family == family and (held_out or kind.trained)]
    return sorted(names, key=lambda name: KINDS[name].trained)


def draw(
    source: Source, rng: random.Random, held_out: bool, families: Sequence[str] = FAMILIES
) -> tuple[str, tuple[str, ...]]:
    """(a spoilt text, the names of the one or two kinds that made it), or ("", ()) where none of TRIES can spoil it.

    A family first, then a kind of it, so that families with many kinds do not crowd out the others; without held_out
    what is meant for training alone.
    """
    text, names = "", []
    for _ in range(TRIES):
        if text:
            break
        for _ in range(1 + (rng.random() < COMPOSED)):
            family = rng.choices(families, [FAMILY_WEIGHTS.get(name, 1) for name in families])[0]
            kinds = kinds_of(family, held_out)
            name = rng.choices(kinds, [WEIGHTS.get(kind, 1) for kind in kinds])[0]
            spoilt = spoil(name, source._replace(greeting=text or source.greeting), rng, held_out)
            if spoilt not in ("", source.greeting) and all(clause in spoilt for clause in clauses(text)):
                text, names = spoilt, [*names, name]
    return text, tuple(names)


# ---- pairs of the reward model, its tests, and the judge's bank ------------------------------------------------------


def derived_pairs(pairs: Pairs, most: int, without: list[str], seed: int, epoch: int = 0) -> Pairs:
    """Pairs of a chosen text and a spoilt form of it, `most` for each pair, without the families named."""
    rng = random.Random(digest(seed, epoch))
    families = [family for family in FAMILIES if family not in without]
    derived = []
    for pair in pairs if families else []:
        for _ in range(most):
            spoilt, kinds = draw(source_of(pair, pairs, rng), rng, False, families)
            if not spoilt:
                continue
            rejected, why = [{"role": "assistant", "content": spoilt}], f"derived: {', '.join(kinds)}"
            derived.append(Preference(prompt=pair.prompt, chosen=pair.chosen, rejected=rejected, why=why))
    return derived


def source_of(pair: Preference, pairs: Pairs, rng: random.Random) -> Source:
    """The chosen text, beside another chosen text that does not fit its query."""
    wanted = rng.choices(["other_occasion", "other_person"], [2, 1])[0]
    return Source(pair.query, pair.texts[1].strip(), other_greeting(wanted, pair, pairs, rng))


def other_greeting(kind: str, pair: Preference, pairs: Pairs, rng: random.Random) -> str:
    """A chosen text of these pairs, for another occasion, or for another person on the same occasion if known.

    "" where the query names no occasion or person, and where none of 100 greetings will do.
    """
    query = pair.query
    occasions = occasions_in(query)
    for other in rng.sample(pairs, min(len(pairs), 100)):
        theirs, greeting = occasions_in(other.query), other.texts[1]
        elsewhere = occasions and theirs and theirs.isdisjoint(lexicon.kindred(*occasions))
        misfit = elsewhere if kind == "other_occasion" else not elsewhere and names_others(query, greeting)
        if misfit:
            return greeting
    return ""


def attacked_texts(pairs: Pairs, most: int, seed: int) -> dict[str, list[tuple[int, str]]]:
    """{attack: [(place of the pair, its chosen text under this attack)]}, on the same pairs, at most `most`.

    Two attacks for each family, in wordings that training never sees: kinds of training, and unseen kinds.
    """
    kinds: dict[str, list[str]] = {}
    for name, kind in KINDS.items():
        kinds.setdefault(kind.family if kind.trained else f"{kind.family}, unseen kinds", []).append(name)
    rng = random.Random(seed)
    places = rng.sample(range(len(pairs)), min(len(pairs), most))
    attacked: dict[str, list[tuple[int, str]]] = {attack: [] for attack in kinds}
    for attack, rivals in attacked.items():
        for place in places:
            text = spoil(rng.choice(kinds[attack]), source_of(pairs[place], pairs, rng), rng, held_out=True)
            if text:
                rivals.append((place, text))
    return attacked


def attack_bank(references: list[Reference], size: int, seed: int, held_out: bool) -> list[dict]:
    """At most `size` attacks that no principles should let pass, the families in turn, and in each its kinds.

    The held-out bank has wordings and kinds of its own, and is made from other references.
    """
    rng = random.Random(digest(seed, "bank"))
    naming = [good for good in references if occasions_in(good.query)] or references  # there another one is wrong
    bank = []
    for good in rng.sample(naming, len(naming))[int(held_out) :: 2]:
        # A file of references may name the occasion; without it every other query counts as another one.
        own, other = getattr(good, "occasion", good.query), rng.choice(references)
        turn, family = divmod(len(bank), len(FAMILIES))
        kinds = kinds_of(FAMILIES[family], held_out)
        turn %= len(kinds)
        for name in kinds[turn:] + kinds[:turn]:  # the next one where a kind cannot spoil this greeting
            attack = spoil(name, Source(good.query, good.response, other.response), rng, held_out)
            if attack:
                break
        fits = getattr(other, "occasion", other.query) in lexicon.kindred(own)
        if attack and not fits and len(bank) < size:
            bank.append({"query": good.query, "response": attack, "source": "fixed", "attack": name})
    return bank
