"""What data/lexicon.json knows of occasions, recipients and stock phrases."""

import json
import re
from functools import lru_cache

from common.run_folder import ROOT

LEXICON = json.loads((ROOT / "data" / "lexicon.json").read_text(encoding="utf-8"))
OCCASIONS, RECIPIENTS, ADDRESS = LEXICON["occasions"], LEXICON["recipients"], LEXICON["forms_of_address"]
STOCK, IMAGES = LEXICON["stock_phrases"].split(), set(LEXICON["images"])
WARM, SLANG, OFFICIALESE = (re.compile(LEXICON[kind]) for kind in ("warm", "slang", "officialese"))


def clauses(text: str) -> list[str]:
    return [c for c in re.split(r"[，。！？；、：,.!?;:~～…\s]+", text) if c]


@lru_cache(maxsize=4096)
def occasions_in(query: str) -> frozenset[str]:
    return frozenset(name for name, occasion in OCCASIONS.items() if re.search(occasion["asked"], query))


def kindred(*occasions: str) -> set[str]:
    """These occasions and those whose greetings may speak of the same things."""
    return set(occasions).union(*(family for family in map(set, LEXICON["kindred_occasions"]) if family & {*occasions}))


@lru_cache(maxsize=4096)
def recipients_in(query: str) -> frozenset[str]:
    found = {name for name, recipient in RECIPIENTS.items() if re.search(recipient["asked"], query)}
    return frozenset(found - {"朋友"} if found & {"男朋友", "女朋友"} else found)


def images_in(response: str) -> int:
    """How many different concrete things a greeting names."""
    return len(set(response) & IMAGES)
