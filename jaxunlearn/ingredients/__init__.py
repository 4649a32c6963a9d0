"""Pieces that several rules are made of: pure functions of arrays and trees."""
