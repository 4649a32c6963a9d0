"""Class unlearning in JAX: pretrain, forget one class with an unlearning rule, measure what is left of it."""

__version__ = "0.1.0"
