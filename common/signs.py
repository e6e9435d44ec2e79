"""What a text shows of each family of spoilt texts (FAMILIES in common/spoilt.py), by rules: no model is asked.

The patterns of words are in data/lexicon.json ("signs"); tests/test_spoilt.py holds how often they are right.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from common import lexicon
from common.characters import BACKWARDS, character_model
from common.constraints import broken
from common.lexicon import FELICITATION, OCCASIONS, clauses, kindred, occasions_in
from common.texts import ngrams

WORDS = {name: re.compile(pattern) for name, pattern in lexicon.LEXICON["signs"].items()}
ECHOED = 0.3  # share of the text's runs of four characters that stand in the query: 0.18 at most in good greetings
PROSAIC = 0.2  # share of characters that name concrete things, below which a text without a wish is no verse
# Nats per pair of neighbours: classical verse reaches 7, shuffled characters go beyond; a few pairs say little.
WILD, ENOUGH = 7.1, 20
SURELY_BACKWARDS = BACKWARDS + 0.4  # a text alone; the critic, who looks for more besides, is content with less
FEAST = "节?(快乐|愉快|安康|安好|吉祥|大吉|顺利)"
# Whom others may be wished well for: a child's parents, those who work with a client.
SPOKEN_OF = {"宝宝", "儿子", "女儿", "客户", "员工", "学生", "同学", "朋友", "大家", "自己", "新人"}
EDGE = r"[\s，,。；;！!？?：:、～~…—\-*#>|【】《》“”「」『』（）()\"'`/／丨·]"


def echo(query: str, text: str) -> bool:
    """The query's words come again: in most of the text, as a whole, or as its core in a clause of its own or ahead."""
    asked, said = (re.sub(r"[\W_]+", "", words) for words in (query, text))
    runs = ngrams(said, 4)
    known = sum(run in asked for run in runs)
    if said and (known >= ECHOED * len(runs) if runs else said in asked):
        return True
    whole = "[\\W_]*".join(map(re.escape, re.findall(r"\w+", query)))  # the query, whatever stands between its parts
    if len(asked) >= 4 and re.search(whole, text) and not FELICITATION.search(query):
        return True
    heart = lexicon.core(query)
    if len(heart) < 4 or FELICITATION.search(heart):
        return False
    alone = re.search(rf"(^|{EDGE}){re.escape(heart)}($|{EDGE})", text)
    return bool(alone) or text.lstrip('“"【《「『*# ').startswith(heart)


def addresses(text: str, forms: Iterable[str]) -> bool:
    """Whether one of these forms of address is a clause of the text, or comes before a "you" at its start."""
    parts = clauses(text)
    for words in forms:
        form = f"(亲爱的|尊敬的|敬爱的|最敬重的|我的好|老|好)?({words})"
        if re.match(f"{form}[你您]", text) or any(re.fullmatch(f"{form}们?", part) for part in parts):
            return True
    return False


def no_greeting(query: str, text: str) -> bool:
    """No wish, nobody addressed, and told in prose; or a statement, question or order in spite of a "you"."""
    rest = text.removeprefix(lexicon.core(query))
    told = WORDS["third"].search(rest) and not re.search("[我咱]", text)
    if told or WORDS["states"].search(rest):
        return True
    if WORDS["wish"].search(rest):
        return False
    if re.search("[?？]$", rest):
        return True
    if WORDS["person"].search(rest) or addresses(text, lexicon.ADDRESS):
        return False
    characters = "".join(clauses(text))
    images = sum(character in lexicon.IMAGES for character in characters)
    to_nobody = re.search("自己|文案|朋友圈|发圈|短句|对联|横幅", query)
    dull = not to_nobody and images < PROSAIC * len(characters) and len(characters) >= 4
    return bool(WORDS["prose"].search(rest)) or dull


def task_talk(query: str, text: str) -> bool:
    """Words about the task, or greetings that are numbered or joined by an "or"."""
    return bool(WORDS["task"].search(text) or WORDS["alternatives"].search(text))


def form(query: str, text: str) -> bool:
    """Blanks, markup, rows of emoji, a signature, a date, another script, or wishes for two occasions not kindred."""
    wished = [name for name, feast in OCCASIONS.items() if re.search(f"({feast['signature'] or '$^'}){FEAST}", text)]
    unasked = [name for name in wished if name not in kindred(*occasions_in(query))]
    if any(two not in kindred(one) for one in unasked for two in wished):
        return True
    return bool(WORDS["form"].search(text)) or foreign(query, text)


def foreign(query: str, text: str) -> bool:
    """Words in another script that are not the query's."""
    return any(words.lower() not in query.lower() for words in WORDS["foreign"].findall(text))


def plea(query: str, text: str) -> bool:
    """Words to a reviewer: praise, orders, verdicts, scores, or what would close the data around the text."""
    return bool(WORDS["plea"].search(text))


def damage(query: str, text: str) -> bool:
    """Cut, said twice, padded, nothing but stock phrases, or characters in no order."""
    model = character_model()
    return (
        truncated(query, text)
        or repeats(text)
        or bool(WORDS["padding"].search(text))
        or sum(phrase in text for phrase in lexicon.STOCK) >= 5
        or (len(text) > ENOUGH and model.strangeness(text) > WILD)
        or model.backwards(text) > SURELY_BACKWARDS
    )


def repeats(text: str) -> bool:
    """A clause said three times, or three runs of four characters said twice."""
    parts = clauses(text)
    runs = ngrams("".join(parts), 4)
    return any(parts.count(part) > 2 for part in parts) or len(runs) - len(set(runs)) >= 3


def truncated(query: str, text: str) -> bool:
    """No mark at the end that ends a sentence. A short verse may do without, if no word at its end needs another."""
    if len("".join(clauses(text))) < 4:
        return True
    if re.search(r"[。！？!?~～…）)」』”》】♥❤\"}\U0001f300-\U0001faff]\ufe0f?$", text.strip()):
        return False
    verse = len(text) <= 20 or "\n" in text.strip()
    return not verse or bool(re.search("[的了和与在把被，、]$|[，。！？；].{1,5}$", text))


def off_target(query: str, text: str) -> bool:
    """Another occasion, somebody else addressed, or a constraint of the query broken."""
    to_another = calls_somebody_else(query, text) or said_to_another(query, text)
    return other_occasion(query, text) or to_another or bool(broken(query, text))


def other_occasion(query: str, text: str) -> bool:
    """What stands for another occasion, and nothing that stands for one of those asked for."""
    wanted = occasions_in(query)
    known = any(re.search(OCCASIONS[name]["signature"] or OCCASIONS[name]["signs"], text) for name in wanted)
    if not wanted or known:
        return False
    others = OCCASIONS.keys() - kindred(*wanted)
    return any(re.search(OCCASIONS[name]["signature"] or "$^", text) for name in others)


def calls_somebody_else(query: str, text: str) -> bool:
    """Whether a form of address fits none of those for whom the query asks."""
    return addresses(text, lexicon.strangers(query))


def said_to_another(query: str, text: str) -> bool:
    """Whether "your girlfriend" is wished well where the query asks for words to her, and names nobody else."""
    wanted = lexicon.recipients_in(query)
    if len(wanted) != 1 or wanted & SPOKEN_OF:
        return False
    (person,) = (lexicon.RECIPIENTS[name]["asked"] for name in wanted)
    return bool(re.search(f"(祝|愿|祝福|恭喜)[你您]的?({person})(?!节)", text))


SIGNS = {sign.__name__: sign for sign in (echo, no_greeting, task_talk, form, plea, damage, off_target)}
COUNTED = (*SIGNS, "any")  # what is counted in a run of step 4


@lru_cache(maxsize=20_000)  # the watch, the critic and the tests look at the same texts
def signs(query: str, text: str) -> frozenset[str]:
    """The families of FAMILIES of which the text shows a sign."""
    return frozenset(family for family, shows in SIGNS.items() if shows(query, text))


def counted(query: str, text: str) -> frozenset[str]:
    """The same, and "any" where there is one."""
    shown = signs(query, text)
    return shown | {"any"} if shown else shown
