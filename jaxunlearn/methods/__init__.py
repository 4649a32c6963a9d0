"""The unlearning rules, one file a rule: a file's name is the rule's. `rule.py` is what they are written with."""
