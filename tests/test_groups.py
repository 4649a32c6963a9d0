import pytest

from jaxunlearn.registry import Method
from jaxunlearn.runs.groups import alike, first_of_each, titled


def variants(*settings, name="mine"):
    return [Method(name, None, {"a": 1.0, "b": 0.5, "k": 2}, {"a": 1.0, "b": 0.5, "k": 2} | one) for one in settings]


METHODS = [
    *variants({}, {"a": 2.0}, {"k": 3}, {"a": 3.0, "b": 1.0}, {"k": 3, "b": 2.0}),
    *variants({}, name="other"),
]


@pytest.mark.parametrize(
    ("most", "places"),
    [
        (None, [[0, 1, 3], [2, 4], [5]]),
        (2, [[0, 1], [2, 4], [3], [5]]),
        (1, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_together_is_what_differs_only_in_floats(most, places):
    assert alike(METHODS, most) == [[METHODS[i] for i in own] for own in places]


def test_groups_know_in_what_they_differ_and_have_titles_of_their_own():
    groups = titled(alike(METHODS, None))
    assert [group.title for group in groups] == ["mine 1/2", "mine 2/2", "other"]
    assert [group.numbers for group in groups] == [["a", "b"], ["b"], []]
    assert [group.title for group in first_of_each(groups)] == ["mine 1/2", "other"]
