"""Stop strings: found where a plain search finds them, in pieces of any size, and in linear time."""

import random

from medicalgpt.models.tool_formats import TOOL_FORMATS, partial_match_length
from medicalgpt.serving.generation import Sampling
from medicalgpt.serving.stop_strings import MAX_STOP_CHARS, StopFinder

import pytest


def plain(strings, pieces):
    """What a search of the whole text finds: the end of the text without the string, or what is held back."""
    held = ""
    for number, piece in enumerate(pieces):
        held += piece
        found = [at for at in map(held.find, strings) if at >= 0]
        if found:
            return number, len(held) - min(found), None
        unsure = max(partial_match_length(held, string) for string in strings)
        held = held[len(held) - unsure :]
    return None, None, len(held)


def test_as_a_plain_search():
    chance = random.Random(0)
    for _ in range(3000):
        strings = ["".join(chance.choices("ab", k=chance.randint(1, 6))) for _ in range(chance.randint(1, 4))]
        pieces = ["".join(chance.choices("abc", k=chance.randint(0, 5))) for _ in range(8)]
        finder, result = StopFinder(strings), (None, None, None)
        for number, piece in enumerate(pieces):
            if (begun := finder.feed(piece)) is not None:
                result = number, begun, None
                break
            result = None, None, finder.held
        assert result == plain(strings, pieces), (strings, pieces)


class Counted(str):
    """Counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, index):
        Counted.looks += 1
        return super().__getitem__(index)


def test_work_is_linear():
    """A text that is nearly the stop string, again and again: the old search compared each of its prefixes."""
    size = 2000
    finder = StopFinder([Counted("a" * size + "b")])
    before = Counted.looks
    for _ in range(5 * size):
        assert finder.feed("a") is None
    assert Counted.looks - before < 4 * 5 * size
    assert finder.held == size


@pytest.mark.parametrize("stop", ["", "x" * (MAX_STOP_CHARS + 1), ("a", "x" * 2_000_000)])
def test_bounded(stop):
    with pytest.raises(ValueError, match="at most 1000 characters"):
        Sampling(stop=stop)


@pytest.mark.parametrize("name", [name for name, each in TOOL_FORMATS.items() if each.opening])
def test_safe_text_of_calls_is_found_from_where_the_last_search_ended(name):
    tools = TOOL_FORMATS[name]
    text = f"a <  \n\n{tools.opening[:2]} b {tools.opening}x"
    known = 0
    for end in range(len(text) + 1):
        known = tools.safe_length(text[:end], known)
        assert known == tools.safe_length(text[:end])
