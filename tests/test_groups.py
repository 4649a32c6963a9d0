import pytest

from jaxunlearn.registry import Method
from jaxunlearn.runs.groups import alike, differing, first_of_each, grouped, titled


def variants(*settings, name="mine"):
    return [Method(name, None, {"a": 1.0, "b": 0.5, "k": 2}, {"a": 1.0, "b": 0.5, "k": 2} | one) for one in settings]


METHODS = [
    *variants({}, {"a": 2.0}, {"k": 3}, {"a": 3.0, "b": 1.0}, {"k": 3, "b": 2.0}),
    *variants({}, name="other"),
]


def places(groups):
    return [[METHODS.index(method) for method in group.methods] for group in groups]


def groups(most, numbers=True):
    return [one for own in alike(METHODS) for one in grouped(own, differing(own) if numbers else [], most)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (None, [[0, 1, 3], [2, 4], [5]]),
        (2, [[0, 1], [3], [2, 4], [5]]),
        (1, [[0], [1], [3], [2], [4], [5]]),
    ],
)
def test_together_is_what_differs_only_in_floats(most, expected):
    assert places(groups(most)) == expected


def test_a_rule_that_takes_no_numbers_runs_one_by_one():
    assert places(groups(None, numbers=False)) == [[0], [1], [3], [2], [4], [5]]


def test_groups_know_in_what_they_differ_and_have_titles_of_their_own():
    named = titled(groups(None))
    assert [group.title for group in named] == ["mine 1/2", "mine 2/2", "other"]
    assert [group.numbers for group in named] == [["a", "b"], ["b"], []]
    assert [group.title for group in first_of_each(named)] == ["mine 1/2", "other"]


def test_a_program_is_shared_by_variants_that_it_is_told_of_alone():
    one_by_one, apart = groups(1), groups(1, numbers=False)
    assert [[group.program for group in one_by_one].index(group.program) for group in one_by_one] == [0, 0, 0, 3, 3, 5]
    assert len({group.program for group in apart}) == len(METHODS)
    assert len({group.program for group in groups(2)}) == 4  # two at once and one alone are two programs
