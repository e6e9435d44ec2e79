"""Constraints that a query sets and a rule can check: found where they are, kept and broken as people would say."""

import pytest
from conftest import ROOT

from common.constraints import broken, constraints_in, number
from common.records import Query, Reference, read

KEPT = [
    ("父亲节 八个字", "灯下补鞋，肩上扛家。"),
    ("生日祝福 八个字", "岁岁有蜜，夜夜好眠。"),
    ("乔迁 八个字 对联那种", "门开迎得满山春色，灯亮照来四海宾朋。"),
    ("端阳 古风 十六字", "艾悬朱户，粽裹青箬。愿君今岁，百病莫侵。"),
    ("要四字短句的乔迁祝福", "新屋向阳，邻里叩门。炉上有汤，窗下有花。"),
    ("七夕送花 二十字以内", "今晚的银河，归你保管。"),
    ("情人节卡片 不超过十五字", "花会谢，我不会。"),
    ("晚安 不超过20字", "月亮替我守着你，晚安。"),
    ("冬至问候 五十字", "冬至到了，锅里的饺子翻着白肚皮，窗上蒙着一层雾。愿你今晚有人递醋，有人剥蒜，碗底总是热的。"),
    ("朋友订婚 贺卡 三十字", "戒指是圆的，日子也是。愿你们把一碗面吃成两碗，把黄昏走成清晨。"),
    ("祖国生日 押韵 四句", "稻浪翻金，红旗映山，灯火万家，岁岁平安。"),
    ("毕业纪念册 六句", "粉笔灰落满您的肩，落成我们的春天，风起，雨歇，花开，人散。"),
    ("早安 妈妈 一句话", "妈，粥在锅里，早安！"),
    ("七夕小卡片 一句就好", "你一笑，桥就通了。"),
    ("元旦给主管发消息 简短", "主管，新年第一杯茶，祝您慢慢喝。"),
    ("元宵节给客户发一条 别太长", "灯已点上，谨祝您元宵安康。"),
    ("祝朋友生日 古风", "君生之日，愿载酒一船，邀月半盏。"),
    ("早日康复 不要成语", "好好睡，等你回来一起吃面。"),
    ("冬至文案 不提饺子", "夜最长的这天，早点回家。"),
    ("高考朋友圈文案 别用金榜题名", "笔带够，路走稳，夏天在考场外等你。"),
]
KEPT += [
    ("送人远行 古风 八个字", "长风万里，一帆烟雨。"),
    ("中秋 古风", "海上生明月，天涯共此时。"),  # Zhang Jiuling
    ("父亲节 八个字", "“灯下补鞋，肩上扛家。”"),
    ("乔迁 八个字", "炉上有汤🍲，窗下有花🌸"),
    ("端午 八个字", "艾悬朱户——粽裹青箬"),
    ("晚安 最多二十字", "晚安，好梦。"),
    ("10字内 早安", "早安，妈妈。"),
    ("冬至 别用新年快乐", "新年将至，今夜先吃一碗汤圆。"),
    ("生日 别用成语", "祝你天天开心，面要趁热吃。"),
    ("百天 押韵 四句", "一百天了，你会笑了，也会闹了，我们都老了。"),
]
BROKEN = [
    ("父亲节 八个字", "爸爸，父亲节快乐，愿您每一天都开心。", "八个字"),
    ("生日祝福 八个字", "生日快乐。", "八个字"),
    ("升职祝福 八个字", "恭喜升职，前程似锦啊。", "八个字"),
    ("端阳 古风 十六字", "艾草都挂好了，粽子煮好了，愿你端午安康。", "十六字"),
    ("要四字短句的乔迁祝福", "新屋向阳，邻居都来敲你家的门了。", "四字"),
    ("七夕送花 二十字以内", "今晚的银河归你保管，明早的豆浆和油条归我去买，说好了。", "二十字以内"),
    ("情人节卡片 不超过十五字", "玫瑰会谢，我就每天买一枝新的，情人节快乐。", "不超过十五字"),
    ("晚安 不超过20字", "月亮替我守着你，星星替我数着你，风替我哄着你，晚安。", "不超过20字"),
    ("冬至问候 五十字", "冬至安康。", "五十字"),
    ("朋友订婚 贺卡 三十字", "订婚快乐！", "三十字"),
    ("祖国生日 押韵 四句", "祖国，生日快乐。", "四句"),
    ("毕业纪念册 四句", "老师，您好，粉笔灰落满肩，教案写满页，灯亮到半夜，谢谢您。", "四句"),
    ("早安 妈妈 一句话", "妈妈早安。太阳出来了。粥在锅里。", "一句话"),
    ("七夕小卡片 一句就好", "七夕到了。银河很亮。我想你。", "一句就"),
    ("元旦给主管发消息 简短", "主管，" + "新的一年愿您身体康健，" * 7, "简短"),
    ("元宵节给客户发一条 别太长", "尊敬的客户，" + "值此佳节谨致问候，" * 8, "别太长"),
    ("祝朋友生日 古风", "生日快乐呀，今天的蛋糕归你。", "古风"),
    ("早日康复 不要成语", "祝你万事如意，早日康复。", "不要成语"),
    ("冬至文案 不提饺子", "冬至的饺子冒着热气。", "不提饺子"),
    ("七夕小卡片 别用牛郎织女", "做你的织女，等你的桥。", "别用牛郎织女"),
]


@pytest.mark.parametrize(("query", "greeting"), KEPT)
def test_a_constraint_is_kept(query: str, greeting: str) -> None:
    assert constraints_in(query) and not broken(query, greeting)


@pytest.mark.parametrize(("query", "greeting", "words"), BROKEN)
def test_a_constraint_is_broken_and_named_in_the_query_s_words(query: str, greeting: str, words: str) -> None:
    assert broken(query, greeting) == words


@pytest.mark.parametrize(
    "query", ["端碗饺子 附字条", "生日祝福 押韵", "蛋糕上写什么字", "领导高升 不要谄媚", "藏“平安”二字"]
)
def test_what_no_rule_can_check_is_no_constraint(query: str) -> None:
    assert not constraints_in(query) and not broken(query, "")


def test_a_text_without_words_keeps_nothing_and_breaks_nothing_that_was_not_asked() -> None:
    assert broken("早安 一句话", "……") == "一句话" and not broken("早安", "")


def test_numbers_are_read() -> None:
    assert [number(words) for words in ("八", "十", "十六", "二十", "三十五", "15")] == [8, 10, 16, 20, 35, 15]


def test_the_shipped_queries_that_hold_one_are_marked() -> None:
    marked = 0
    for name in ("queries", "queries_heldout"):
        for query in read(ROOT / f"data/{name}.jsonl", Query):
            assert query.constraints == list(constraints_in(query.query)), query.query
            marked += bool(query.constraints)
    assert marked > 80
    few = [
        reference for reference in read(ROOT / "data/references.jsonl", Reference) if constraints_in(reference.query)
    ]
    assert sum(bool(broken(reference.query, reference.response)) for reference in few) <= 0.03 * len(few)
