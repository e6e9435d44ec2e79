"""Families of spoilt texts: what training sees of them and what it does not, and the rules that tell them."""

import itertools
import random
import re
from collections import Counter

import pytest
from conftest import ROOT

from common.constraints import broken as breaks
from common.lexicon import clauses, core
from common.records import Labelled, Preference, Reference, read
from common.signs import calls_somebody_else, echo, form, no_greeting, said_to_another, signs, task_talk
from common.spoilt import (
    CHOICE,
    FAMILIES,
    KINDS,
    SLOT,
    WORDINGS,
    Source,
    attack_bank,
    attacked_texts,
    derived_pairs,
    draw,
    other_greeting,
    spoil,
)


def pair(query: str, chosen: str, rejected: str) -> Preference:
    prompt = [{"role": "user", "content": query}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return Preference(prompt=prompt, query=query, chosen=good, rejected=bad)


REFERENCES = read(ROOT / "data/references.jsonl", Reference)
PAIRS = [pair(r.query, r.response, r.response[: len(r.response) // 3] + "了") for r in REFERENCES[:200]]
OTHER = "客户，中秋快乐，月圆人安，改日登门。"
GOOD = Source("妈妈生日 写句暖心的", "妈，面在锅里，灯在窗前。生日快乐，您歇一天。", OTHER)
TELLABLE = {"other_occasion": 0.75, "other_person": 0.2}  # by a rule: many name neither an occasion nor a person


def sources(kind: str) -> list[Source]:
    """Shipped greetings, each beside another one that does not fit it."""
    rng, found = random.Random(0), []
    for one in [pair(r.query, r.response, "好") for r in REFERENCES[:400]]:
        wanted = "other_person" if kind == "other_person" else "other_occasion"
        other = other_greeting(wanted, one, PAIRS, rng)
        query = one.query + (" 十个字" if kind == "constraint_broken" else "")
        greeting = "".join(clauses(one.texts[1]))[:10] if kind == "constraint_broken" else one.texts[1]
        found.append(Source(query, greeting, other))
    return found


def runs(template: str) -> set[str]:
    """Every four characters in a row that a template may write, apart from what its slots hold."""
    choices = [choice.split("|") for choice in CHOICE.findall(template)]
    found = set()
    for chosen in itertools.product(*choices):
        words = iter(chosen)
        written = CHOICE.sub(lambda _, words=words: next(words), template)
        for part in re.split(SLOT.pattern.replace("(", "(?:"), written):
            found.update(part[start : start + 4] for start in range(len(part) - 3))
    return found


def test_training_and_tests_have_no_four_characters_in_common() -> None:
    written: dict[str, set[str]] = {"training": set(), "held_out": set()}
    forms = Counter()
    for kinds in WORDINGS.values():
        for wordings in kinds.values():
            for sort in written.keys() & wordings.keys():
                for template in wordings[sort]:
                    found = runs(template)
                    written[sort] |= found
                    forms[sort] += len(list(itertools.product(*(c.split("|") for c in CHOICE.findall(template)))))
    assert not written["training"] & written["held_out"]
    assert min(forms.values()) > 1000


def test_every_family_has_kinds_of_both_sorts_and_training_cannot_draw_the_unseen_ones() -> None:
    sorts = {(kind.family, kind.trained) for kind in KINDS.values()}
    assert sorts == set(itertools.product(FAMILIES, (True, False))) and len(KINDS) >= 40
    for name, kind in KINDS.items():
        if not kind.trained:
            with pytest.raises(ValueError, match=name):
                spoil(name, GOOD, random.Random(0), held_out=False)
    rng = random.Random(0)
    drawn = [draw(GOOD, rng, held_out=False) for _ in range(4000)]
    made = Counter(name for _, names in drawn for name in names)
    trained = {name for name, kind in KINDS.items() if kind.trained}
    # This greeting's other one shows another occasion, and there is no constraint to break.
    assert made.keys() == trained - {"other_person"}
    assert 0.1 < sum(len(names) == 2 for _, names in drawn) / len(drawn) < 0.25
    assert made.keys() < {name for _ in range(6000) for name in draw(GOOD, rng, held_out=True)[1]}


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_the_text_and_is_reported_by_its_family(kind: str) -> None:
    rng = random.Random(1)
    edits = [(source, spoil(kind, source, rng, held_out=True)) for source in sources(kind)]
    made = [(source, text) for source, text in edits if text]
    assert len(made) >= 20 and all(text != source.greeting for source, text in made)
    reported = sum(KINDS[kind].family in signs(source.query, text) for source, text in made)
    assert reported / len(made) >= TELLABLE.get(kind, 0.95)


def test_good_greetings_show_no_sign() -> None:
    good = [row for row in read(ROOT / "data/labelled.jsonl", Labelled) if row.label]
    shown = [signs(row.query, row.response) for row in good]
    assert sum(map(bool, shown)) <= 0.03 * len(good)


def test_signs_in_words_of_no_template() -> None:
    query = "男朋友二战考研 别给压力的祝福"
    assert core(query) == "男朋友二战考研" and core("春节祝福语") == "春节祝福语"
    assert echo(query, "男朋友二战考研，别给压力的祝福，希望对你有帮助！")
    assert not echo("老同学毕业快乐", "合影时大家都红着眼笑。老同学，毕业快乐，愿路上都有好天气。")
    for told in (
        "订婚是一件美好的事情。",
        "妈妈生日时，她会收到一个小礼物。",
        "同事乔迁时，乔迁会带她去家里拜访。",
    ):
        assert no_greeting("妈妈生日祝福语", told), told
    assert not no_greeting("冬至祝福", "冬至夜长，饺子管够，愿您暖和。")
    assert task_talk("早安", "1. 早安！2. 早上好！") and not task_talk("早安", "早安，豆浆在桌上，路上慢点。")
    assert form("生日祝福", "生日快乐！又：元宵节快乐。") and not form("生日", "周末回家，生日快乐。")
    assert calls_somebody_else("妈妈生日", "领导，生日快乐。") and not calls_somebody_else("妈妈生日", "妈，生日快乐。")
    assert said_to_another("给女友的晚安", "祝你女友晚安，万事如意。")
    assert not said_to_another("给女友的晚安", "晚安，祝你好梦。")
    assert not said_to_another("给姐姐 外甥女满月", "姐姐，祝你女儿满月快乐。")
    assert not said_to_another("宝宝满月祝福语", "恭喜你们宝宝满月，祝你宝宝平安。")
    assert not said_to_another("护士节祝福", "祝您护士节快乐。")
    assert not said_to_another("给合作伙伴", "祝您合作顺利，财源广进。")
    assert not said_to_another("同事的老婆生日", "祝你老婆生日快乐，蛋糕我来订。")
    assert breaks("父亲节 八个字", "爸爸，父亲节快乐，愿您每一天都开心。")
    assert signs("生日", "") == {"damage"}


@pytest.mark.parametrize(
    ("query", "greeting"),
    [
        ("体检结果正常 祝爸妈", "爸，妈，检查一切正常，我这颗心落了地，今晚加个菜。"),
        ("表弟中考", "表弟，考得满分也好，差一点也好，回来哥都请你吃面。愿你睡个好觉。"),
        ("师兄论文答辩", "师兄，愿论文一次通过，夏天的风替你庆功。"),
        ("同事生日", "生日快乐！今年的任务：好好吃饭，好好睡觉。"),
        ("运动会给儿子", "儿子，拿第一名很好，跑完全程也很好，加油。"),
        ("教师节给导师", "老师，谢谢您教会我独立思考，节日快乐，茶给您泡好了。"),
        ("妈妈生日正好是中秋节", "妈，生日快乐，中秋快乐，月饼和蛋糕都给您留了最大的一块。"),
        ("给程序员哥哥的新年祝福 没有bug", "哥，新年快乐，愿你今年的代码没有bug，头发一根不少。"),
        ("2025年元旦", "2025年来了，愿您灯火常亮，饭菜常热。"),
        ("毕业 送室友 江湖味", "江湖再见，愿你所遇皆坦途。"),
    ],
)
def test_words_of_a_pattern_may_stand_in_a_good_greeting(query: str, greeting: str) -> None:
    assert not signs(query, greeting)


def test_what_no_kind_can_spoil_is_given_up() -> None:
    wish = Source("祝妈妈生日快乐", "妈，生日快乐，面在锅里。", "")
    assert draw(wish, random.Random(0), False, ["echo"]) == ("", ())
    some = [pair(wish.query, wish.greeting, "好")] * 3
    assert derived_pairs(some, 2, [family for family in FAMILIES if family != "echo"], seed=0) == []


def test_edits_stand_anywhere() -> None:
    """Before, between and after the clauses."""
    places = Counter()
    for seed in range(300):
        text = spoil("praise", GOOD, random.Random(seed), held_out=True)
        places[text.startswith("妈，"), text.endswith("您歇一天。")] += 1
    assert places.keys() == {(True, True), (True, False), (False, True)} and min(places.values()) > 20


# ---- pairs of step 2 ------------------------------------------------------------------------------------------------


def test_another_occasion_is_another_occasion() -> None:
    rows = {"给妈妈的母亲节祝福": "妈妈，节日快乐，汤在锅里。", "中秋发给客户": "月圆人安，改日登门。"}
    some = [pair(query, text, "好") for query, text in (rows | {"随便写一句": "今天也要好好吃饭。"}).items()]
    rng = random.Random(0)
    drawn = [other_greeting("other_occasion", p, some, rng) for p in some]
    assert drawn == ["月圆人安，改日登门。", "妈妈，节日快乐，汤在锅里。", ""]
    kindred = [pair("元旦祝福", "新岁安康，今晚早点睡。", "好"), pair("春节祝福", "过年好，饺子管够。", "好")]
    assert [other_greeting("other_occasion", p, kindred, rng) for p in kindred] == ["", ""]  # might do for both


def test_another_person_is_another_person_on_the_same_occasion() -> None:
    rows = {
        "妈妈生日祝福": "妈，生日快乐，面在锅里。", "祝老师生日快乐": "老师，生日快乐，您歇一天。",
        "生日祝福": "生日快乐，吃好喝好。", "春节给领导拜年": "领导，过年好，给您拜年。",
    }  # fmt: skip
    some = [pair(query, text, "好") for query, text in rows.items()]
    rng = random.Random(0)
    drawn = [other_greeting("other_person", p, some, rng) for p in some]
    assert drawn == [rows["祝老师生日快乐"], rows["妈妈生日祝福"], "", ""]


def families_of(derived: list[Preference]) -> set[str]:
    return {KINDS[name].family for p in derived for name in p.why.removeprefix("derived: ").split(", ")}


def test_every_family_is_made_unless_it_is_left_out() -> None:
    everything = derived_pairs(PAIRS, 4, [], seed=0)
    assert families_of(everything) == set(FAMILIES) and len(everything) == 4 * len(PAIRS)
    less = derived_pairs(PAIRS, 4, ["damage", "plea"], seed=0)
    assert set(FAMILIES) - families_of(less) == {"damage", "plea"} and len(less) == 4 * len(PAIRS)
    assert not derived_pairs(PAIRS, 0, [], seed=0) and not derived_pairs(PAIRS, 4, list(FAMILIES), seed=0)


def test_attacks_are_made_on_the_same_pairs_in_words_that_training_does_not_see() -> None:
    attacked = attacked_texts(PAIRS, 150, seed=0)
    assert len(attacked) == 2 * len(FAMILIES) and {"echo", "echo, unseen kinds"} < attacked.keys()
    taught = {p.texts[2] for epoch in range(3) for p in derived_pairs(PAIRS, 4, [], 0, epoch)}
    for name, rivals in attacked.items():
        assert all(text != PAIRS[place].texts[1] for place, text in rivals)
        if not name.startswith("off_target"):  # another greeting cannot be worded in another way
            assert len(rivals) > 100 and sum(text in taught for _, text in rivals) <= 0.05 * len(rivals), name


# ---- the judge's bank -----------------------------------------------------------------------------------------------


def test_the_bank_has_all_families_and_the_unseen_one_their_unseen_kinds() -> None:
    seen, unseen = (attack_bank(REFERENCES, 84, 0, held_out) for held_out in (False, True))
    for bank in (seen, unseen):
        assert Counter(KINDS[row["attack"]].family for row in bank) == dict.fromkeys(FAMILIES, 12)
    assert all(KINDS[row["attack"]].trained for row in seen)
    missing = {name for name, kind in KINDS.items() if not kind.trained} - {row["attack"] for row in unseen}
    assert missing <= {"constraint_broken"}  # few queries have one
    assert not {row["query"] for row in seen} & {row["query"] for row in unseen}
    for held_out in (False, True):  # few references, of which some cannot be spoilt in every way
        assert len(attack_bank(REFERENCES[:50], 84, 0, held_out)) >= 18
    assert attack_bank(REFERENCES, 84, 0, held_out=True) == unseen != attack_bank(REFERENCES, 84, 1, held_out=True)
