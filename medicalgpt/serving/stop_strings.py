"""Finding stop strings in an answer while it is written."""

from collections.abc import Sequence

# Maximum characters of one stop string, and of stop strings in a request.
MAX_STOP_CHARS = 1000
MAX_STOPS = 16


class StopFinder:
    """Finds the first of several strings in a text that comes in pieces.

    For each string, the length of its longest prefix that the text ends with is carried from one character to the next
    (Knuth, Morris and Pratt, https://doi.org/10.1137/0206024). The work is linear in the text, however long the strings
    are and however often they begin.

    Attributes:
        held: number of characters at the end of the text that may be the beginning of one of the strings.
    """

    def __init__(self, strings: Sequence[str]):
        self.held = 0
        self._strings = strings
        self._fallbacks = [_fallbacks(string) for string in strings]
        self._matched = [0] * len(strings)

    def feed(self, piece: str) -> int | None:
        """Read the next piece of the text.

        Returns:
            How many characters before the end of the piece the first string begins that is now complete, None if none
            is; the piece is the last one then.
        """
        starts = []
        for number, (string, fallbacks) in enumerate(zip(self._strings, self._fallbacks, strict=True)):
            matched = self._matched[number]
            for position, char in enumerate(piece, start=1):
                while matched and string[matched] != char:
                    matched = fallbacks[matched - 1]
                matched += string[matched] == char
                if matched == len(string):
                    starts.append(len(piece) - position + matched)
                    break
            self._matched[number] = matched
        self.held = max(self._matched, default=0)
        return max(starts, default=None)


def _fallbacks(string: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that it also ends with."""
    found, length = [0] * len(string), 0
    for position in range(1, len(string)):
        while length and string[length] != string[position]:
            length = found[length - 1]
        length += string[length] == string[position]
        found[position] = length
    return found
