"""A page to look at, made of records alone."""
