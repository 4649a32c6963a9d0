"""Hyperparameters with which a rule would do nothing, or nothing but NaN."""

import jax

from jaxunlearn.errors import UserError


def check_positive(**values: float | jax.Array) -> None:
    """Raises UserError for the first of a rule's hyperparameters that is not more than 0.

    Of one that stands for several at once, an array, nothing is known while the rule is made.
    """
    for name, value in values.items():
        if not isinstance(value, jax.Array) and not value > 0:
            raise UserError(f"{name} is {value}: it must be more than 0")


def check_lengths(**values: tuple[tuple[float, ...], int]) -> None:
    """Raises UserError for the first of a rule's hyperparameters that has not so many numbers: (numbers, how many)."""
    for name, (numbers, wanted) in values.items():
        if len(numbers) != wanted:
            raise UserError(f"{name} is {numbers}: it must be {wanted} numbers")
