"""What runs one after the other: a rule, or one of several variants of it that differ in hyperparameters."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxunlearn.registry import Method


class Group(NamedTuple):
    """Methods that are unlearned with together."""

    title: str  # for progress; no other group of the run has it
    methods: Sequence[Method]

    @property
    def method(self) -> Method:
        """The first; what the others share with it is the rule."""
        return self.methods[0]


def grouped(methods: Iterable[Method]) -> list[Group]:
    """The methods in groups, in their order. A rule with one group has its name as title."""
    groups = [[method] for method in methods]
    counts, seen = Counter(own[0].name for own in groups), Counter[str]()
    named = []
    for own in groups:
        name = own[0].name
        seen[name] += 1
        named.append(Group(name if counts[name] == 1 else f"{name} {seen[name]}/{counts[name]}", own))
    return named


def first_of_each(groups: Iterable[Group]) -> list[Group]:
    """The first group of each rule: there may be hundreds of one."""
    firsts: dict[str, Group] = {}
    for group in groups:
        firsts.setdefault(group.method.name, group)
    return list(firsts.values())
