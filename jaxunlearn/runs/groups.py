"""What runs one after the other: a rule, or several variants of it that differ only in numbers, vmapped."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxunlearn.registry import Method


class Group(NamedTuple):
    """Methods of one rule that are unlearned with together."""

    title: str  # for progress; no other group of the run has it
    methods: Sequence[Method]

    @property
    def method(self) -> Method:
        """The first; the others differ from it in `numbers` alone."""
        return self.methods[0]

    @property
    def numbers(self) -> list[str]:
        """The hyperparameters in which they differ, all floats; none of a method alone."""
        first = self.method.hyperparameters
        return [name for name in first if any(one.hyperparameters[name] != first[name] for one in self.methods)]


def alike(methods: Iterable[Method], most: int | None) -> list[list[Method]]:
    """The methods in their order, at most so many together that differ only in floats; None is as many as there are."""
    found: dict[str, list[list[Method]]] = {}
    together: list[list[Method]] = []
    for method in methods:
        rest = {name: value for name, value in method.hyperparameters.items() if not isinstance(value, float)}
        own = found.setdefault(json.dumps([method.name, rest], sort_keys=True), [])
        if not own or len(own[-1]) == most:
            own.append([])
            together.append(own[-1])
        own[-1].append(method)
    return together


def titled(together: Sequence[Sequence[Method]]) -> list[Group]:
    """Groups of these methods. A rule with one group has its name as title."""
    counts, seen = Counter(own[0].name for own in together), Counter[str]()
    groups = []
    for own in together:
        name = own[0].name
        seen[name] += 1
        groups.append(Group(name if counts[name] == 1 else f"{name} {seen[name]}/{counts[name]}", own))
    return groups


def first_of_each(groups: Iterable[Group]) -> list[Group]:
    """The first group of each rule: there may be hundreds of one."""
    firsts: dict[str, Group] = {}
    for group in groups:
        firsts.setdefault(group.method.name, group)
    return list(firsts.values())
