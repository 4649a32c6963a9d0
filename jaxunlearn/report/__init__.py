"""A report of results: figures of what unlearning did."""
