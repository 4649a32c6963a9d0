#!/usr/bin/env python3
"""`jaxunlearn report`, from a checkout."""

from jaxunlearn.commands.main import start

if __name__ == "__main__":
    start("report")
