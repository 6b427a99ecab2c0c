"""Which text of a PDF page cannot be seen: it is taken out of the page's drawing operations before they are read.

Text in forms (XObjects that are drawn as a whole) is not examined.
"""

from typing import Any

SHOW = {b"Tj", b"TJ", b"'", b'"'}
FILL = {b"f", b"F", b"f*", b"B", b"B*", b"b", b"b*"}
END_PATH = FILL | {b"n", b"S", b"s"}
SMALLEST = 1.0  # points
NEAR_WHITE = 0.97
INVISIBLE = (3, 7)

Matrix = tuple[float, float, float, float, float, float]
IDENTITY: Matrix = (1, 0, 0, 1, 0, 0)


def hide_unseen(page: Any, reader: Any) -> tuple[int, bool]:
    """Remove what a reader cannot see: render mode 3, letters up to 1 point, white letters on nothing darker.

    A page with a picture and no visible text is a scan, and its invisible text the result of OCR, which stays.

    Returns:
        The number of pieces of text removed, and whether the page has such a layer of OCR.
    """
    from pypdf.generic import ContentStream, NameObject

    contents = page.get_contents()
    if contents is None:
        return 0, False
    stream = ContentStream(contents, reader)
    state = _State(page)
    shown, unseen = [], {}
    for number, (operands, operator) in enumerate(stream.operations):
        try:
            reason = state.step(operator, operands)
        except (IndexError, KeyError, TypeError, ValueError):
            # Operands that make no sense; readers skip such an operation.
            reason = None
        if operator in SHOW:
            if reason:
                unseen[number] = reason
            else:
                shown.append(number)
    is_scan = bool(state.pictures) and not shown and "mode" in unseen.values()
    if is_scan:
        unseen = {number: reason for number, reason in unseen.items() if reason != "mode"}
    if unseen:
        stream.operations = [each for number, each in enumerate(stream.operations) if number not in unseen]
        page[NameObject("/Contents")] = stream
    return len(unseen), is_scan


class _State:
    """The graphics state of a page, as far as the visibility of its text depends on it."""

    def __init__(self, page: Any):
        resources = page.get("/Resources")
        self.objects = (resources.get_object() if resources else {}).get("/XObject") or {}
        self.matrix, self.text, self.line = IDENTITY, IDENTITY, IDENTITY
        self.mode, self.size, self.white, self.leading = 0, 12.0, False, 0.0
        self.stack: list[tuple] = []
        self.path: list[tuple[float, float]] = []
        self.painted: list[tuple[float, float, float, float]] = []
        self.pictures = 0

    def step(self, operator: bytes, operands: Any) -> str | None:
        """Apply an operation. Returns why the text that it shows cannot be seen."""
        if operator == b"q":
            self.stack.append((self.matrix, self.mode, self.size, self.white))
        elif operator == b"Q" and self.stack:
            self.matrix, self.mode, self.size, self.white = self.stack.pop()
        elif operator == b"cm":
            self.matrix = _times(_floats(operands), self.matrix)
        elif operator in (b"g", b"rg", b"k", b"sc", b"scn", b"cs"):
            self.white = operator != b"cs" and _is_white(operands)
        elif operator in (b"re", b"m", b"l", b"c", b"v", b"y"):
            self._extend(operator, operands)
        elif operator in END_PATH:
            if operator in FILL and self.path and not self.white:
                self.painted.append(_box(self.path))
            self.path = []
        elif operator in (b"Do", b"INLINE IMAGE", b"sh"):
            self._draw(operator, operands)
        else:
            return self._text(operator, operands)
        return None

    def _extend(self, operator: bytes, operands: Any) -> None:
        numbers = _floats(operands)
        if operator == b"re":
            x, y, width, height = numbers
            points = [(x, y), (x + width, y), (x, y + height), (x + width, y + height)]
        else:
            points = list(zip(numbers[::2], numbers[1::2], strict=False))
        self.path += [_apply(self.matrix, *point) for point in points]

    def _draw(self, operator: bytes, operands: Any) -> None:
        kind = "/Image"
        if operator == b"Do":
            drawn = self.objects.get(operands[0])
            kind = drawn.get_object().get("/Subtype") if drawn is not None else None
        self.pictures += kind == "/Image" and operator != b"sh"
        everywhere = (-1e9, -1e9, 1e9, 1e9)
        corners = [_apply(self.matrix, x, y) for x in (0, 1) for y in (0, 1)]
        self.painted.append(_box(corners) if kind == "/Image" and operator != b"sh" else everywhere)

    def _text(self, operator: bytes, operands: Any) -> str | None:
        if operator == b"BT":
            self.text = self.line = IDENTITY
        elif operator == b"Tr":
            self.mode = int(operands[0])
        elif operator == b"Tf":
            self.size = float(operands[1])
        elif operator == b"TL":
            self.leading = float(operands[0])
        elif operator == b"Tm":
            self.text = self.line = _floats(operands)
        elif operator in (b"Td", b"TD", b"T*", b"'", b'"'):
            x, y = _floats(operands) if operator in (b"Td", b"TD") else (0.0, -self.leading)
            if operator == b"TD":
                self.leading = -y
            self.text = self.line = _times((1, 0, 0, 1, x, y), self.line)
        return self._unseen() if operator in SHOW else None

    def _unseen(self) -> str | None:
        if self.mode in INVISIBLE:
            return "mode"
        a, b, c, d, x, y = _times(self.text, self.matrix)
        if abs(self.size) * max((c * c + d * d) ** 0.5, (a * a + b * b) ** 0.5) <= SMALLEST:
            return "size"
        behind = any(left <= x <= right and low <= y + 1 and y <= high for left, low, right, high in self.painted)
        return "white" if self.white and not behind else None


def _floats(operands: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in operands)


def _times(first: tuple[float, ...], then: Matrix) -> Matrix:
    a, b, c, d, e, f = first
    p, q, r, s, t, u = then
    return (a * p + b * r, a * q + b * s, c * p + d * r, c * q + d * s, e * p + f * r + t, e * q + f * s + u)


def _apply(matrix: Matrix, x: float, y: float) -> tuple[float, float]:
    a, b, c, d, e, f = matrix
    return a * x + c * y + e, b * x + d * y + f


def _box(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _is_white(operands: Any) -> bool:
    """Of one number (gray), three (RGB) or four (CMYK); a pattern is not white."""
    try:
        numbers = _floats(operands)
    except (TypeError, ValueError):
        return False
    if len(numbers) == 4:
        return max(numbers) <= 1 - NEAR_WHITE
    return len(numbers) in (1, 3) and min(numbers) >= NEAR_WHITE
