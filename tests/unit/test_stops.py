"""A completion ends at the first stop string, wherever the pieces of its text begin and end."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeparrot_ds.errors import ConfigError
from codeparrot_ds.evaluation.stops import NEW_BLOCK, Arriving, Stops

BODY = "    return a * b\n\n    # still inside"
PARTS = st.sampled_from(
    ["\n", "def", "d", "ef", "if", "i", "f", "#", "@", "print", "class", " ", "x", "(", "é", "_", "1"]
)


def whole(text: str) -> str:
    """The same by one regular expression."""
    return re.split(r"\n(?=class\b|def\b|#|@|print\b|if\b)", text, maxsplit=1)[0]


@pytest.mark.parametrize("start", ["def other():", "class A:", "# comment", "@decorator", "print(1)", "if x:", "if"])
def test_a_completion_ends_where_a_new_block_starts(start: str) -> None:
    assert Stops().cut(f"{BODY}\n{start}\n more") == BODY
    assert Stops().cut(f"{BODY}\n{start}") == BODY


@pytest.mark.parametrize(
    "line", ["ifx = 1", "default = 3", "printer(2)", "classes = []", "define()", "if_ = 0", "défaut"]
)
def test_a_word_that_only_begins_so_is_no_new_block(line: str) -> None:
    text = f"x = 1\n{line}\n"
    assert Stops().cut(text) == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PARTS, max_size=30))
def test_pieces_give_what_the_whole_text_gives(pieces: list[str]) -> None:
    text = "".join(pieces)
    arriving = Arriving(Stops())
    shown = ""
    for number, piece in enumerate(pieces):
        shown += arriving.add(piece)
        assert whole(text).startswith(shown), "text was shown that is not part of the completion"
        if arriving.ended:  # whatever may still follow
            assert whole("".join(pieces[: number + 1]) + "x") == shown
    assert shown + arriving.finish() == whole(text) == Stops().cut(text) == arriving.text


def test_text_is_shown_as_soon_as_no_stop_string_can_begin_in_it() -> None:
    arriving = Arriving(Stops())
    assert [arriving.add(piece) for piece in ("a", "\n", "i", "f", "x", "\n", "if", "(")] == [
        *("a", "", "", "", "\nifx", "", "", ""),
    ]
    assert arriving.ended
    assert arriving.text == "a\nifx"


def test_other_stop_strings() -> None:
    assert Stops(["STOP", "\n\n"]).cut("a STOPPED\nb STOP") == "a STOPPED\nb "
    assert Stops(["\n\n"]).cut("a\nb\n\nc") == "a\nb"
    assert Stops([]).cut("\ndef f():") == "\ndef f():"
    assert Stops().strings == NEW_BLOCK
    with pytest.raises(ConfigError, match="a stop string is empty"):
        Stops(["x", ""])
