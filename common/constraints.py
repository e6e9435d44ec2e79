"""What a query asks of a greeting's form, as far as a rule can tell: its length, its style, what it must not say.

RLMR (arXiv 2508.18642) checks such constraints by rule, beside a reward for the writing. A rule that is wrong teaches
what nobody wants, so only what is asked in plain words counts, and only what is surely broken. There is none for rhyme
or for "not too sentimental".
"""

import re
from functools import lru_cache

from common.lexicon import STOCK

DIGITS = "一二三四五六七八九"
NUMBER = r"([1-9][0-9]?|[二三四五六七八九]?十[一二三四五六七八九]?|[四五六七八九])\s?个?字"
EXACTLY = 16  # characters: up to so many can be counted out, a higher number is asked for as a measure
SHORT = 60  # characters
MODERN = "[啦吧呀嘛哦吗呢的]|我们|你们|咱"
PLAIN = "健康|顺利|开心|快乐|幸福|家庭|年轻|生意"  # words that make of a stock phrase no idiom
END = r"(?=$|[\s，,。！!]"  # of a constraint; a word may follow, as the rule goes on


def number(words: str) -> int:
    """八 is 8, 十六 is 16, 二十 is 20, 15 is 15."""
    if words.isdigit():
        return int(words)
    tens, ten, ones = words.rpartition("十")
    return (10 * (DIGITS.find(tens) + 1 if tens else 1) if ten else 0) + (DIGITS.find(ones) + 1 if ones else 0)


def characters(text: str) -> int:
    """How many there are without punctuation, blanks and emoji."""
    return len("".join(clauses(text)))


def clauses(text: str) -> list[str]:
    """The parts between everything that is not a letter; what stands in brackets or quotes is one of its own."""
    return re.findall(r"\w+", text)


def sentences(text: str) -> int:
    return len(re.findall("[。！？!?…～~]+", text))


def not_so_many(wanted: str, text: str) -> bool:
    """In all, or in each of two lines, or in every clause, where it can be counted out."""
    count, written = number(wanted), characters(text)
    if count > EXACTLY:
        return not 0.5 * count <= written <= 1.5 * count
    return written not in (count, 2 * count) and {len(clause) for clause in clauses(text)} != {count}


def more_than(most: str, text: str) -> bool:
    return characters(text) > number(most)


def not_so_many_lines(wanted: str, text: str) -> bool:
    """Clauses, or two in each line, and one may be an address; or sentences."""
    count, parts = number(wanted), len(clauses(text))
    return parts not in (count, count + 1, 2 * count, 2 * count + 1) and sentences(text) != count


def several_sentences(wanted: str, text: str) -> bool:
    """A second one is let pass: 早安！ and the like."""
    return sentences(text) > 2 or characters(text) > SHORT


def long(wanted: str, text: str) -> bool:
    return characters(text) > SHORT


def modern(wanted: str, text: str) -> bool:
    return bool(re.search(MODERN, text))


def stock_phrases(wanted: str, text: str) -> bool:
    return any(phrase in text for phrase in STOCK if not re.search(PLAIN, phrase))


def mentions(unwanted: str, text: str) -> bool:
    """As a whole; of two names that go together either."""
    names = {"牛郎织女": ["牛郎", "织女"], "南山东海": ["南山", "东海"]}
    return any(word in text for word in names.get(unwanted, [unwanted]))


# How a query asks for it, with what the rule has to know in the one group that matches; who tells that it is broken.
RULES = [
    (rf"(?:^|(?<=[\s，,题写来要]))(?<!超过\s)(?<!最多\s){NUMBER}{END}|短句)", not_so_many),
    (rf"(?:不超过|[不别]要?超过|最多|控制在)\s?{NUMBER}", more_than),
    (rf"(?<![每几句条\d{DIGITS}十])(?<!至少){NUMBER}(?:[以之]?内|以下)", more_than),
    (rf"(?:^|(?<=[\s，,]))([四六八])句{END})", not_so_many_lines),  # "two sentences" are any few words
    (rf"(?<!有)(一句话{END}|就|祝)|一句就)", several_sentences),
    (r"(?<!太)(?<!要)(?<!用)(简短|短句|短一点|别太长)", long),
    (r"(?<!要)(?<!太)(?<!别)(?<!用)(古风|文言)", modern),
    (rf"((?:不要|别用|不用)(?:成语|套话)){END})", stock_phrases),
    (rf"(?:别用|[不别]要?提到?|[不别]要?说)(?!成语|套话|太|那|这|什|任|的)([^\W\d不]{{2,4}}){END})", mentions),
]
SPEECH = "致辞|讲话|发言|演讲|主持"  # is not as short as a message


@lru_cache(maxsize=4096)
def constraints_in(query: str) -> dict[str, tuple]:
    """The words in which a query asks for something that a rule can check -> (rule, what it has to know)."""
    constraints = {}
    for asked, broken_by in RULES:
        match = re.search(asked, query)
        if match and not (broken_by in (long, several_sentences) and re.search(SPEECH, query)):
            (known,) = filter(None, match.groups())
            constraints[match[0]] = broken_by, known
    return constraints


def broken(query: str, text: str) -> str:
    """The first constraint that the text breaks, in the query's words, or "". A text without a letter keeps none."""
    for words, (broken_by, known) in constraints_in(query).items():
        if not clauses(text) or broken_by(known, text):
            return words
    return ""
