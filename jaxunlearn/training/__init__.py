"""How models are trained: the epoch loop, pretraining, unlearning by any rule, and going on after an interruption."""
