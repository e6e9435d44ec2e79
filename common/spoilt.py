"""Texts spoilt on purpose: to train the reward model on, to attack it with, and for the judge's bank of attacks.

Their wordings are in data/spoilt.json. Attacks and training have no run of four characters in common there: a reward
model that has only learnt wordings by heart fails under attack.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import partial

from common.lexicon import RECIPIENTS, kindred, occasions_in, recipients_in
from common.records import Preference, Reference
from common.run_folder import ROOT, digest, read_text

Pairs = list[Preference]
WORDINGS = json.loads(read_text(ROOT / "data" / "spoilt.json"))

# (a good greeting, random numbers, a good greeting for somebody or something else) -> a worse one; "" for none
Spoiler = Callable[[str, random.Random, str], str]


def clauses(text: str) -> list[str]:
    """The clauses of a text, each with its punctuation mark."""
    return [clause for clause in re.split(r"(?<=[，。！？；、,!?;])", text) if clause]


def shuffled(parts: Sequence[str], rng: random.Random) -> str:
    return "".join(rng.sample(parts, len(parts)))


def insert_one_of(wordings: list[str], text: str, rng: random.Random, other: str) -> str:
    """One of these wordings between two clauses, or before or after them all."""
    parts = clauses(text)
    parts.insert(rng.randrange(len(parts) + 1), rng.choice(wordings))
    return "".join(parts)


def reworded(wordings: dict[str, list[str]]) -> dict[str, Spoiler]:
    """The kinds that are made alike in training and attacks, from other wordings."""
    spoilers: dict[str, Spoiler] = {kind: partial(insert_one_of, wordings[kind]) for kind in wordings}
    spoilers["bare"] = lambda text, rng, other: rng.choice(wordings["bare"])
    spoilers["other_occasion"] = spoilers["other_recipient"] = lambda text, rng, other: other
    return spoilers


# ---- in training: every time a little different ---------------------------------------------------------------------


def paste_again(text: str, rng: random.Random, other: str) -> str:
    return text + rng.choice(["", "，", "\n", " "]) + text[: int(len(text) * rng.uniform(0.4, 0.9))]


def repeat_clause(text: str, rng: random.Random, other: str) -> str:
    parts = clauses(text)
    place = rng.randrange(len(parts))
    parts[place] *= rng.choice([2, 3, 5])
    return "".join(parts)


def shuffle_half(text: str, rng: random.Random, other: str) -> str:
    """Half of the characters, from somewhere in the first half on, in any order."""
    start = rng.randrange(max(1, len(text) // 2))
    end = start + max(6, len(text) // 2)
    return text[:start] + shuffled(text[start:end], rng) + text[end:]


SPOILERS: dict[str, Spoiler] = {
    "pasted_twice": paste_again,
    "clause_repeated": repeat_clause,
    "characters_shuffled": shuffle_half,
    "clauses_shuffled": lambda text, rng, other: shuffled(clauses(text), rng),
    "cut": lambda text, rng, other: text[: max(1, int(len(text) * rng.choice([0.3, 0.4, 0.5, 0.6, 0.75])))],
    **reworded(WORDINGS["training"]),
}
# How much more often a kind is drawn, because it is harder to tell: another occasion or recipient shows only beside the
# query, and a third of the attacks in foreign words is in a script that training does not show.
WEIGHTS = {"other_occasion": 8, "other_recipient": 4, "clause_repeated": 4, "cut": 3, "pasted_twice": 2, "foreign": 2}


def derived_pairs(pairs: Pairs, most: int, without: list[str], seed: int, epoch: int = 0) -> Pairs:
    """Pairs of a chosen text and a spoilt form of it: at most `most` for each pair, different ones each epoch."""
    rng = random.Random(digest(seed, epoch))
    kinds = [kind for kind in SPOILERS if kind not in without]
    weights = [WEIGHTS.get(kind, 1) for kind in kinds]
    derived = []
    for pair in pairs if kinds else []:
        for kind in rng.choices(kinds, weights, k=most):
            spoilt = SPOILERS[kind](pair.texts[1], rng, other_greeting(kind, pair, pairs, rng)).strip()
            if spoilt and spoilt != pair.texts[1]:  # not every text can be spoilt in every way
                rejected, why = [{"role": "assistant", "content": spoilt}], f"derived: {kind}"
                derived.append(Preference(prompt=pair.prompt, chosen=pair.chosen, rejected=rejected, why=why))
    return derived


# ---- the attacks of the tests: the same kinds, done in another way --------------------------------------------------


def reverse_clauses(text: str, rng: random.Random, other: str) -> str:
    """None for two clauses: training shows their one other order."""
    parts = clauses(text)
    return "".join(reversed(parts)) if len(parts) > 2 else ""


ATTACKS: dict[str, Spoiler] = {
    "pasted_twice": lambda text, rng, other: text + text,
    "clause_repeated": lambda text, rng, other: clauses(text)[0] * 3 + text,
    "characters_shuffled": lambda text, rng, other: shuffled(text, rng),
    "clauses_shuffled": reverse_clauses,
    "cut": lambda text, rng, other: text[: max(1, len(text) * 2 // 3)],
    **reworded(WORDINGS["attacks"]),
}


def attacked_texts(pairs: Pairs, most: int, seed: int) -> dict[str, list[tuple[int, str]]]:
    """{attack: [(place of the pair, its chosen text under this attack)]}, on the same pairs, at most `most`."""
    rng = random.Random(seed)
    places = rng.sample(range(len(pairs)), min(len(pairs), most))
    attacked: dict[str, list[tuple[int, str]]] = {name: [] for name in ATTACKS}
    for name, attack in ATTACKS.items():
        for place in places:
            pair = pairs[place]
            text = attack(pair.texts[1], rng, other_greeting(name, pair, pairs, rng)).strip()
            if text and text != pair.texts[1]:
                attacked[name].append((place, text))
    return attacked


def other_greeting(kind: str, pair: Preference, pairs: Pairs, rng: random.Random) -> str:
    """A chosen text of these pairs, for another occasion, or for another recipient on the same occasion if known.

    "" for other kinds, where the query names no occasion or recipient, and where none of 100 greetings will do.
    """
    if kind not in ("other_occasion", "other_recipient"):
        return ""
    query = pair.query or pair.texts[0]
    occasions, recipients = occasions_in(query), recipients_in(query)
    related = kindred(*occasions)
    their_words = "|".join(pattern for name in recipients for pattern in RECIPIENTS[name].values())
    for other in rng.sample(pairs, min(len(pairs), 100)):
        occasions_there, greeting = occasions_in(other.query or other.texts[0]), other.texts[1]
        if kind == "other_occasion":
            misfit = occasions and occasions_there and not occasions_there & related
        else:
            # It has to name a recipient, none of those asked for, and to leave the occasion as it is.
            same_occasion = occasions_there & related or not occasions_there or not occasions
            misfit = recipients and same_occasion and recipients_in(greeting)
            misfit = misfit and not re.search(their_words, greeting)
        if misfit:
            return greeting
    return ""


# ---- the judge's bank: attacks that no principles should let pass ---------------------------------------------------

# (a good greeting, a good greeting for another query) -> an attack; "jumbled" turns the first long clause backwards
BANK: dict[str, Callable[[str, str], str]] = {
    "pasted twice": lambda good, other: good + good,
    "cut": lambda good, other: good[: len(good) * 2 // 3].rstrip("，。！？；"),
    "jumbled": lambda good, other: re.sub("[^，。！？；]{5,}", lambda clause: clause[0][::-1], good, count=1),
    "for another occasion": lambda good, other: other,
}
for kind, template in WORDINGS["bank"].items():
    BANK[kind] = template.format  # {0} is the good greeting


def attack_bank(references: list[Reference], size: int, seed: int, held_out: bool) -> list[dict]:
    """At most `size` attacks in all, the kinds in turn; the held-out bank is made from other references."""
    rng = random.Random(digest(seed, "bank"))
    sample = rng.sample(references, min(2 * size, len(references)))
    half = len(sample) // 2
    bank = []
    for i, good in enumerate(sample[half:] if held_out else sample[:half]):
        kind = list(BANK)[i % len(BANK)]
        # A file of references may name the occasion; without it every other query counts as another one.
        own_occasion = getattr(good, "occasion", good.query)
        others = [other for other in references if getattr(other, "occasion", other.query) != own_occasion]
        attack = BANK[kind](good.response, rng.choice(others).response)
        if attack != good.response:  # too short to be spoilt in this way
            bank.append({"query": good.query, "response": attack, "source": "fixed", "attack": kind})
    return bank
