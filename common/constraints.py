"""What a query asks of a greeting's form, as far as a rule can tell: its length, its style, what it must not say.

RLMR (arXiv 2508.18642) checks such constraints by rule, beside a reward for the writing. Rhyme has no rule here, nor
has "not too sentimental"; what must not be said is only checked where a query speaks of words (别用, 不提, 不要说).
"""

import re
from functools import lru_cache

from common.lexicon import STOCK, clauses

DIGITS = "一二三四五六七八九"
NUMBER = "([1-9][0-9]|[二三四五六七八九]?十[一二三四五六七八九]?|[四五六七八九])个?字"
EXACTLY = 16  # characters: up to so many can be counted out, a higher number is asked for as a measure
SHORT = 45  # characters
CLASSICAL = "[君兮之乎矣卿吾汝尔岁朝暮盏樽愿且莫何归与此吟遥伏惟昔今]"


def number(words: str) -> int:
    """八 is 8, 十六 is 16, 二十 is 20, 15 is 15."""
    if words.isdigit():
        return int(words)
    tens, ten, ones = words.rpartition("十")
    return (10 * (DIGITS.find(tens) + 1 if tens else 1) if ten else 0) + (DIGITS.find(ones) + 1 if ones else 0)


def characters(text: str) -> int:
    """How many there are without punctuation."""
    return len("".join(clauses(text)))


def not_so_many(wanted: str, text: str) -> bool:
    """In all, or in each of two lines, or in every clause, where it can be counted out."""
    count, written = number(wanted), characters(text)
    if count > EXACTLY:
        return not 0.5 * count <= written <= 1.3 * count
    return written not in (count, 2 * count) and {len(clause) for clause in clauses(text)} != {count}


def more_than(most: str, text: str) -> bool:
    return characters(text) > number(most)


def not_so_many_clauses(wanted: str, text: str) -> bool:
    """Or two in each line; and one may be an address."""
    count = {"两": 2, "四": 4, "八": 8}[wanted]
    return len(clauses(text)) not in (count, count + 1, 2 * count, 2 * count + 1)


def several_sentences(wanted: str, text: str) -> bool:
    """A second one is let pass: 早安！ and the like."""
    return len(re.findall("[。！？!?…～~]+", text)) > 2 or characters(text) > SHORT


def long(wanted: str, text: str) -> bool:
    return characters(text) > SHORT


def not_classical(wanted: str, text: str) -> bool:
    return len(re.findall(CLASSICAL, text)) < 2 or bool(re.search("啦|吧|呀|的", text))


def stock_phrases(wanted: str, text: str) -> bool:
    return any(phrase in text for phrase in STOCK)


def mentions(unwanted: str, text: str) -> bool:
    """Four characters are often two words: 牛郎织女."""
    words = re.findall("..", unwanted) if len(unwanted) == 4 else [unwanted]
    return any(word in text for word in words)


# How a query asks for it, with what the rule has to know in the one group that matches; who tells that it is broken.
RULES = [
    (rf"(?<!不超过)(?<![{DIGITS}十\d]){NUMBER}(?![以之]内|条)", not_so_many),
    (rf"不超过{NUMBER}|{NUMBER}[以之]内", more_than),
    (r"(?<!\w)([两四八])句", not_so_many_clauses),
    (r"(一句话|一句就)", several_sentences),
    (r"(简短|短句|短一点|别太长)", long),
    (r"(古风|文言|古诗|诗词)", not_classical),
    (r"(不要成语|别用成语|不用成语|不要套话|别用套话)", stock_phrases),
    (r"(?:别用|不提|别提|不要说)(?!成语|套话)(\w{2,4})", mentions),
]


@lru_cache(maxsize=4096)
def constraints_in(query: str) -> dict[str, tuple]:
    """The words in which a query asks for something that a rule can check -> (rule, what it has to know)."""
    constraints = {}
    for asked, broken_by in RULES:
        if match := re.search(asked, query):
            (known,) = filter(None, match.groups())
            constraints[match[0]] = broken_by, known
    return constraints


def broken(query: str, text: str) -> str:
    """The first constraint of the query that the text breaks, in the query's words; "" if it keeps all, or has none."""
    for words, (broken_by, known) in constraints_in(query).items():
        if broken_by(known, text):
            return words
    return ""
