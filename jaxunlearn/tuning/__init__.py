"""Hyperparameters chosen by one procedure for every rule, on images that are held out of the training set."""
