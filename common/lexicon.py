"""What data/lexicon.json knows of Chinese greetings: occasions, recipients, forms of address, stock phrases, images."""

import json
import re
from functools import lru_cache

from common.run_folder import ROOT, read_text

LEXICON_FILE = ROOT / "data" / "lexicon.json"
LEXICON = json.loads(read_text(LEXICON_FILE))
OCCASIONS, RECIPIENTS = LEXICON["occasions"], LEXICON["recipients"]
ADDRESS = LEXICON["forms_of_address"]  # words of address (a pattern) -> the recipients whom they fit
STOCK = LEXICON["stock_phrases"].split()
IMAGES = set(LEXICON["images"])  # single characters that stand for concrete things
WARM = re.compile(LEXICON["warm"])


def clauses(text: str) -> list[str]:
    """The runs of characters between punctuation marks, without the marks."""
    return [clause for clause in re.split(r"[，。！？；、：,.!?;:~～…\s]+", text) if clause]


@lru_cache(maxsize=4096)
def occasions_in(query: str) -> frozenset[str]:
    """The occasions that a query asks for: none where it names none, several where it is ambiguous."""
    return frozenset(name for name, occasion in OCCASIONS.items() if re.search(occasion["asked"], query))


def kindred(*occasions: str) -> set[str]:
    """These occasions and those whose greetings may speak of the same things."""
    kin = set(occasions)
    for family in LEXICON["kindred_occasions"]:
        if not set(occasions).isdisjoint(family):
            kin.update(family)
    return kin


@lru_cache(maxsize=4096)
def recipients_in(query: str) -> frozenset[str]:
    """The recipients that a query names."""
    recipients = {name for name, recipient in RECIPIENTS.items() if re.search(recipient["asked"], query)}
    if recipients & {"男朋友", "女朋友"}:  # both contain 朋友, and are more than that
        recipients.discard("朋友")
    return frozenset(recipients)
