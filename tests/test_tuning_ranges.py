import json

import pytest

from jaxunlearn.errors import UserError
from jaxunlearn.registry import Method, get_method, names
from jaxunlearn.tuning.ranges import Range, points, ranges_of

DEFAULTS = {"weight": 0.5, "k": 8, "flag": True, "off": 0.0, "pair": (1.0, 2.0), "name": "x"}


def method_of(ranges=None, defaults=DEFAULTS, **settings):
    return Method("mine", None, defaults, defaults | settings, ranges=ranges)


def test_a_number_has_a_range_by_its_default():
    assert ranges_of(method_of(), {}, ()) == {"weight": (0.05, 5.0), "k": (1, 16)}
    assert ranges_of(method_of(), {}, ("k",)) == {"weight": (0.05, 5.0)}


def test_what_is_held_has_no_range():
    with pytest.raises(UserError, match=r"--range mine\.k=1:3: --set mine\.k holds it at one value"):
        ranges_of(method_of(k=4), {"k": "1:3"}, ("k",))


def test_the_rule_says_better_and_the_user_says_last():
    method = method_of({"weight": (0, 1), "k": (2, 3), "off": (0.0, 0.2)})
    assert ranges_of(method, {"k": "4:6"}, ()) == {"weight": (0.0, 1.0), "k": (4, 6), "off": (0.0, 0.2)}


@pytest.mark.parametrize(
    ("said", "asked", "line"),
    [
        ([0.1, 0.9], {}, "its `ranges` must be a dict"),
        ({"wait": (0, 1)}, {}, "has no hyperparameter 'wait'"),
        ({"flag": (0, 1)}, {}, "only a number has a range, and this one is True"),
        ({"k": (0.5, 2)}, {}, r"ranges\['k'\]: write two whole numbers"),
        ({"weight": (1, 0)}, {}, "the high end one that is no lower"),
        ({"weight": (0, float("nan"))}, {}, "must be a number"),
        ({"weight": 3}, {}, "write two numbers"),
        ({"weight": (1, 10**400)}, {}, "must be a number"),
        (None, {"k": "1:" + "9" * 400}, "must be a number"),
        (None, {"k": "1:" + "9" * 5000}, "write two whole numbers"),
        ({"weight": ("a", "b")}, {}, "write two numbers"),
        (None, {"weight": "1"}, "--range mine.weight=1: write two numbers"),
        (None, {"weight": "1:b"}, "--range mine.weight=1:b: write two numbers"),
        (None, {"k": "1:2147483648"}, "--range mine.k=1:2147483648: whole numbers go to 2147483647"),
        (None, {"pair": "1:2"}, "--range mine.pair=1:2: only a number has a range"),
        (None, {"wait": "1:2"}, "has no hyperparameter 'wait'"),
    ],
)
def test_what_is_no_range_is_refused_in_a_line(said, asked, line):
    with pytest.raises(UserError, match=line) as caught:
        ranges_of(method_of(said), asked, ())
    assert "\n" not in str(caught.value)


def test_wide_ranges_are_looked_through_by_their_logarithm_and_ints_stay_ints():
    assert [Range(0.1, 10.0).at(share) for share in (0.0, 0.5, 1.0)] == [0.1, 1.0, 10.0]
    assert [Range(0.0, 10.0).at(share) for share in (0.0, 0.5, 1.0)] == [0.0, 5.0, 10.0]
    assert [Range(1.0, 9.0).at(share) for share in (0.0, 0.5, 1.0)] == [1.0, 5.0, 9.0]
    assert [Range(1, 4).at(share) for share in (0.0, 0.24, 0.26, 0.99, 1.0)] == [1, 1, 2, 4, 4]
    assert Range(0.1, 0.9).at(1 / 3) == 0.3667
    assert Range(-1e308, 1e308).at(0.75) == 5e307 and Range(1e-320, 1e300).at(0.5) == 1e-10


def test_trials_begin_with_the_defaults_and_more_begin_with_fewer():
    method = method_of(weight=0.7)
    ranges = ranges_of(method, {}, ())
    few, many = points(method, ranges, 5), points(method, ranges, 12)
    assert many[0] == method.hyperparameters and many[:5] == few and len(many) == 12
    assert len({json.dumps(one) for one in many}) == 12
    for one in many[1:]:
        assert 0.05 <= one["weight"] <= 5 and 1 <= one["k"] <= 16 and type(one["k"]) is int
        assert {name: one[name] for name in ("flag", "off", "pair", "name")} == {
            name: DEFAULTS[name] for name in ("flag", "off", "pair", "name")
        }
    assert sum(one["weight"] < 0.5 for one in many[1:]) in (4, 5, 6, 7)  # half of them: by the logarithm
    assert [(one["weight"], one["k"]) for one in few[1:3]] == [(3.79, 9), (0.379, 1)]  # on every machine


def test_no_trial_comes_twice():
    assert points(method_of(defaults={}), {}, 8) == [{}]
    few = points(method_of(defaults={"k": 2}), {"k": Range(1, 4)}, 8)
    assert few[0] == {"k": 2} and sorted(one["k"] for one in few) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", names())
def test_rules_that_ship_have_ranges_around_their_defaults(name):
    method = get_method(name)
    for key, (low, high) in ranges_of(method, {}, ()).items():
        assert low <= method.defaults[key] <= high and low < high, key
