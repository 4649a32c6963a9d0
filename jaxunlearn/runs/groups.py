"""What runs one after the other: a rule, or several variants of it that differ only in numbers, vmapped."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxunlearn.registry import Method


class Group(NamedTuple):
    """Methods of one rule that are unlearned with together."""

    methods: Sequence[Method]
    numbers: Sequence[str] = ()  # the hyperparameters, floats, that its program is told and not made with
    title: str = ""  # for progress; no other group of the run has it

    @property
    def method(self) -> Method:
        """The first; the others differ from it in `numbers` alone."""
        return self.methods[0]

    @property
    def program(self) -> str:
        """What its program is made of: groups with the same can share it."""
        made_with = {name: x for name, x in self.method.hyperparameters.items() if name not in self.numbers}
        return json.dumps([self.method.name, made_with, self.numbers, len(self.methods)], sort_keys=True)


def alike(methods: Iterable[Method]) -> list[list[Method]]:
    """The methods, those together that differ only in floats, in the order of the first of each."""
    found: dict[str, list[Method]] = {}
    for method in methods:
        rest = {name: value for name, value in method.hyperparameters.items() if not isinstance(value, float)}
        found.setdefault(json.dumps([method.name, rest], sort_keys=True), []).append(method)
    return list(found.values())


def differing(methods: Sequence[Method]) -> list[str]:
    """The hyperparameters in which methods of one rule differ; none of a method alone."""
    first = methods[0].hyperparameters
    return [name for name in first if any(one.hyperparameters[name] != first[name] for one in methods)]


def grouped(methods: Sequence[Method], numbers: Sequence[str], most: int | None) -> list[Group]:
    """The methods in groups of at most `most`, None being all; without numbers each by itself."""
    size = (most or len(methods)) if numbers else 1
    return [Group(methods[first : first + size], numbers) for first in range(0, len(methods), size)]


def titled(groups: Iterable[Group]) -> list[Group]:
    """The groups with titles. A rule with one group has its name as title."""
    groups = list(groups)
    counts, seen = Counter(group.method.name for group in groups), Counter[str]()
    named = []
    for group in groups:
        name = group.method.name
        seen[name] += 1
        named.append(group._replace(title=name if counts[name] == 1 else f"{name} {seen[name]}/{counts[name]}"))
    return named


def first_of_each(groups: Iterable[Group]) -> list[Group]:
    """The first group of each rule: there may be hundreds of one."""
    firsts: dict[str, Group] = {}
    for group in groups:
        firsts.setdefault(group.method.name, group)
    return list(firsts.values())
