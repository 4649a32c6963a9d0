"""`python -m jaxunlearn`."""

from jaxunlearn.commands.main import start

if __name__ == "__main__":
    start()
