import pytest

from jaxunlearn.errors import UserError
from jaxunlearn.results.marked import remade

TEXT = "Before.\n\n<!-- leaderboard: a --b c -->\nold\n| old |\n<!-- end -->\n\nAfter.\n<!-- end -->\n"


def test_what_stands_between_the_marks_is_made_of_the_arguments():
    made = remade(TEXT, "x.md", lambda words: f"<{words}>\n")
    assert made == "Before.\n\n<!-- leaderboard: a --b c -->\n\n<a --b c>\n\n<!-- end -->\n\nAfter.\n<!-- end -->\n"
    assert remade(made, "x.md", lambda words: f"<{words}>\n") == made
    assert remade("no marks\r\n", "x.md", lambda words: "") == "no marks\r\n"
    inline = "Write `<!-- leaderboard: x -->` there.\n"
    assert remade(inline, "x.md", lambda words: "") == inline


@pytest.mark.parametrize("text", ["<!-- leaderboard: a -->\nold\n", TEXT.replace("<!-- end", "<!-- leaderboard: b", 1)])
def test_a_part_without_an_end_is_refused_and_what_follows_it_is_not_lost(text):
    with pytest.raises(UserError, match=r"x.md: what begins in line \d does not end: a line must be <!-- end -->"):
        remade(text, "x.md", lambda words: "")


def test_arguments_that_are_refused_are_named_with_their_line():
    def make(words):
        raise UserError("no such folder")

    with pytest.raises(UserError, match=r"^x.md, line 3: no such folder$"):
        remade(TEXT, "x.md", make)
