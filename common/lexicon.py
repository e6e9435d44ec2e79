"""What data/lexicon.json knows of Chinese greetings: occasions, recipients, forms of address, stock phrases, images."""

import json
import re
from collections.abc import Iterable
from functools import lru_cache

from common.run_folder import ROOT, read_text

LEXICON_FILE = ROOT / "data" / "lexicon.json"
LEXICON = json.loads(read_text(LEXICON_FILE))
OCCASIONS, RECIPIENTS = LEXICON["occasions"], LEXICON["recipients"]
ADDRESS = LEXICON["forms_of_address"]  # words of address (a pattern) -> the recipients whom they fit
STOCK = LEXICON["stock_phrases"].split()
IMAGES = set(LEXICON["images"])  # single characters that stand for concrete things
WARM = re.compile(LEXICON["warm"])
FELICITATION = re.compile(LEXICON["signs"]["felicitation"])  # a query that is itself a wish


def clauses(text: str) -> list[str]:
    """The runs of characters between punctuation marks, without the marks."""
    return [clause for clause in re.split(r"[，。！？；、：,.!?;:~～…\s]+", text) if clause]


@lru_cache(maxsize=4096)
def occasions_in(query: str) -> frozenset[str]:
    """The occasions that a query asks for: none where it names none, several where it is ambiguous."""
    return frozenset(name for name, occasion in OCCASIONS.items() if re.search(occasion["asked"], query))


def signs_of(occasions: Iterable[str], text: str) -> bool:
    """Whether the text has a sign of one of these occasions."""
    return any(re.search(OCCASIONS[name]["signs"], text) for name in occasions)


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


def strangers(query: str) -> list[str]:
    """The forms of address (patterns) that fit none of those for whom a query asks."""
    wanted = recipients_in(query) or {"大家", "朋友"}
    return [words for words, fits in ADDRESS.items() if wanted.isdisjoint(fits) and not re.search(words, query)]


# What a query says of the task, at its end or its beginning; what is left is its core.
ASKING = re.compile(
    r"(的?(祝福语?|祝词|贺词|贺卡|祝贺|问候语?|寄语|短信|文案|留言|致辞|消息|卡片|话)|(怎么|怎样|该|如何|想)[^节日]{0,6}"
    r"|(写|发|说|来|送|讲)(给|点|个|段|句|条|一|几|些|什么|啥|两)[^节日]{0,6})$"
    r"|^(请|帮我|麻烦)?(写|发|来|说|送)(给|一?[个句段条份点]|几句|给)+"
)


@lru_cache(maxsize=4096)
def core(query: str) -> str:
    """The words of a query that name its occasion or person, without those that ask for a greeting, if 4 or more."""
    part = re.split(r"[\s，,。；;！!？?：:]+", query.strip())[0]
    shorter = ASKING.sub("", ASKING.sub("", part))
    for words in (shorter, part):
        if len(words) >= 4 and not FELICITATION.search(words):
            return words
    return query.strip()
