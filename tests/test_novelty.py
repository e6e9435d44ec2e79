"""Novelty: what it says of groups made by hand, and that no reward is turned round by it."""

import random
import statistics

import pytest

from common.novelty import multiply, novelties, runs_in, take_off
from common.trainers import own_rows

ALIKE = "愿灯火替我守着你的夜。"
DIFFERENT = ["灶上温着一碗红豆粥。", "窗台的雪化成了春水。", "旧围巾还留着你的针脚。", "雁群今早飞过了屋脊。"]


def test_a_group_of_one_text_has_two_thirds_of_what_a_group_of_different_ones_has() -> None:
    """Nothing else in the step, nothing learnt: of the three shares only the group's is not 0."""
    assert novelties([("q", ALIKE)] * 4, set()) == pytest.approx([2 / 3] * 4)
    assert novelties([("q", text) for text in DIFFERENT], set()) == [1.0] * 4
    assert novelties([("q", ALIKE)], set()) == [1.0]


def test_one_text_for_every_query_has_none_if_it_was_learnt() -> None:
    text = ALIKE * 2
    rows = [(query, text) for query in "abcd" for _ in range(2)]
    assert novelties(rows, set()) == pytest.approx([1 / 3] * 8)
    assert novelties(rows, runs_in([text])) == pytest.approx([0.0] * 8)
    assert novelties([("q", text[:7]), ("r", text[:7])], runs_in([text])) == pytest.approx([1 / 3] * 2)


def test_the_shares_are_counted_as_written() -> None:
    """abcdef has the runs abcd bcde cdef: one stands in another text of its query, two in one elsewhere."""
    rows = [("q", "abcdef"), ("q", "abcdX"), ("q", "uvwxy"), ("other", "..bcdef.."), ("other", "12345")]
    first = novelties(rows, set())[0]
    assert first == pytest.approx(1 - (1 / 3 + 2 / 3) / 3)


def test_an_empty_text_has_none_and_a_short_one_is_compared_as_a_whole() -> None:
    assert novelties([("q", ""), ("q", "  "), ("q", "早安"), ("q", "早安"), ("q", "晚安")], set()) == pytest.approx(
        [0, 0, 2 / 3, 2 / 3, 1]
    )


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = [(random.Random(n).choice("ab"), random.Random(n).choice([*DIFFERENT, ALIKE, ALIKE * 2])) for n in range(30)]
    values = dict(zip(rows, novelties(rows, runs_in([ALIKE * 2])), strict=True))
    shuffled = random.Random(0).sample(rows, len(rows))
    again = dict(zip(shuffled, novelties(shuffled, runs_in([ALIKE * 2])), strict=True))
    assert again == pytest.approx(values)


def test_without_a_weight_a_reward_is_what_it_was_to_the_bit() -> None:
    rewards, values = [1.0, 0.0, 0.1 + 0.2, None, 1e-17], [0.3, 1.0, 0.0, 0.5, 0.7]
    assert repr(multiply(rewards, values, 0.0, 0.5)) == repr(rewards)
    assert repr(take_off(rewards, values, 0.0, list("aabba"))) == repr(rewards)


def test_nonsense_does_not_gain_by_being_new() -> None:
    """Of what the judge refuses, nothing comes above what it accepts; copies that are accepted keep a part."""
    for weight in (0.3, 0.5, 1.0):
        for rewards in ([0.0, 1.0], [0.49, 0.5]):
            refused, accepted = multiply(rewards, [1.0, 0.0], weight, 0.5)
            assert refused <= accepted
    assert multiply([0.0, 1.0, 1.0], [1.0, 0.2, 1.0], 0.5, 0.5) == pytest.approx([0.0, 0.6, 1.0])
    # What a likelihood is worth has no verdict in it: novelty counts however little that is.
    assert multiply([0.1, 0.1], [0.0, 1.0], 0.5, 0.0) == pytest.approx([0.05, 0.1])
    rng = random.Random(0)
    for _ in range(200):
        scores, values = [rng.gauss(0, 3) for _ in range(8)], [rng.random() for _ in range(8)]
        unit = (statistics.pvariance(scores[:4]) / 2 + statistics.pvariance(scores[4:]) / 2) ** 0.5
        taught = take_off(scores, values, 1.0, ["q"] * 4 + ["r"] * 4)
        for one in range(8):
            for other in range(8):
                if scores[one] - scores[other] > unit:
                    assert taught[one] > taught[other]


def test_a_failed_judgement_stays_one() -> None:
    assert multiply([None, 1.0], [0.0, 0.0], 0.5, 0.5) == [None, 0.5]
    assert take_off([None, None], [0.0, 1.0], 0.5, ["q", "q"]) == [None, None]
    assert take_off([None, 1.0, 3.0], [0.0, 0.0, 1.0], 0.5, ["q"] * 3) == [None, 0.5, 3.0]


def test_each_process_gets_the_rewards_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert own_rows(taught, 6) == taught
    monkeypatch.setenv("RANK", "1")
    assert own_rows(taught, 2) == [0.2, 0.3]
