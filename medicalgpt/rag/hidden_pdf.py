"""Text of a PDF page that a reader does not see: not painted, white, transparent, or less than a point high.

Text that is not painted over a picture is kept, since the text layer of a scanned page is such. Text within forms
(form XObjects) is not examined.
"""

from dataclasses import dataclass, field, replace
from typing import Any

LEAST_POINTS = 1.0
LEAST_ALPHA = 0.05
WHITE = 0.98
Matrix = tuple[float, float, float, float, float, float]
IDENTITY: Matrix = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
SHOWS = {b"Tj", b"TJ", b"'", b'"'}
PAINTS = {b"f", b"F", b"f*", b"B", b"B*", b"b", b"b*"}


def multiply(first: Matrix, then: Matrix) -> Matrix:
    a, b, c, d, e, f = first
    g, h, i, j, k, m = then
    return (a * g + b * i, a * h + b * j, c * g + d * i, c * h + d * j, e * g + f * i + k, e * h + f * j + m)


def at(matrix: Matrix, x: float, y: float) -> tuple[float, float]:
    a, b, c, d, e, f = matrix
    return a * x + c * y + e, b * x + d * y + f


@dataclass(frozen=True)
class State:
    """What `q` saves and `Q` restores."""

    matrix: Matrix = IDENTITY
    mode: int = 0
    size: float = 1.0
    is_white: bool = False
    alpha: float = 1.0


@dataclass
class Painter:
    """Follows the operators of a page's content.

    Attributes:
        dark: bounding boxes of areas painted in another colour than white; white text is visible there.
        pictures: bounding boxes of pictures.
        visible: the operators without the text that is not seen.
    """

    resources: Any
    state: State = State()
    saved: list[State] = field(default_factory=list)
    text: Matrix = IDENTITY
    leading: float = 0.0
    path: list[tuple[float, float]] = field(default_factory=list)
    dark: list[tuple[float, float, float, float]] = field(default_factory=list)
    pictures: list[tuple[float, float, float, float]] = field(default_factory=list)
    visible: list[Any] = field(default_factory=list)
    hidden: int = 0

    def run(self, operands: Any, operator: bytes) -> None:
        self._graphics(operands, operator)
        self._text_position(operands, operator)
        if operator in SHOWS and self._is_hidden():
            self.hidden += 1
            return
        self.visible.append((operands, operator))

    def _graphics(self, operands: Any, operator: bytes) -> None:
        if operator == b"q":
            self.saved.append(self.state)
        elif operator == b"Q" and self.saved:
            self.state = self.saved.pop()
        elif operator == b"cm":
            self.state = replace(self.state, matrix=multiply(tuple(map(float, operands)), self.state.matrix))
        elif operator in (b"g", b"rg", b"k", b"sc", b"scn"):
            self.state = replace(self.state, is_white=_is_white(operands, operator))
        elif operator == b"cs":
            self.state = replace(self.state, is_white=False)
        elif operator == b"gs":
            settings = self._resource("/ExtGState", operands[0])
            if settings is not None and "/ca" in settings:
                self.state = replace(self.state, alpha=float(settings["/ca"]))
        elif operator == b"re":
            x, y, width, height = map(float, operands)
            self.path += [at(self.state.matrix, *corner) for corner in ((x, y), (x + width, y + height))]
        elif operator in (b"m", b"l", b"c", b"v", b"y"):
            points = list(map(float, operands))
            self.path += [at(self.state.matrix, *points[n : n + 2]) for n in range(0, len(points), 2)]
        elif operator in PAINTS:
            if self.path and not self.state.is_white and self.state.alpha >= LEAST_ALPHA:
                self.dark.append(_box(self.path))
            self.path = []
        elif operator in (b"n", b"S", b"s"):
            self.path = []
        elif operator == b"Do":
            drawn = self._resource("/XObject", operands[0])
            if drawn is None or drawn.get("/Subtype") != "/Form":
                self.pictures.append(_box([at(self.state.matrix, x, y) for x in (0, 1) for y in (0, 1)]))
        elif operator in (b"EI", b"INLINE IMAGE"):
            self.pictures.append(_box([at(self.state.matrix, x, y) for x in (0, 1) for y in (0, 1)]))

    def _text_position(self, operands: Any, operator: bytes) -> None:
        if operator == b"BT":
            self.text = IDENTITY
        elif operator == b"Tf":
            self.state = replace(self.state, size=float(operands[1]))
        elif operator == b"Tr":
            self.state = replace(self.state, mode=int(operands[0]))
        elif operator == b"Tm":
            self.text = tuple(map(float, operands))
        elif operator in (b"Td", b"TD"):
            self.text = multiply((1.0, 0.0, 0.0, 1.0, *map(float, operands)), self.text)
            if operator == b"TD":
                self.leading = -float(operands[1])
        elif operator == b"TL":
            self.leading = float(operands[0])
        elif operator in (b"T*", b"'", b'"'):
            self.text = multiply((1.0, 0.0, 0.0, 1.0, 0.0, -self.leading), self.text)

    def _is_hidden(self) -> bool:
        matrix, state = multiply(self.text, self.state.matrix), self.state
        height = abs(state.size) * (matrix[2] ** 2 + matrix[3] ** 2) ** 0.5
        # The middle of the first glyph, about.
        place = at(matrix, abs(state.size) * 0.2, abs(state.size) * 0.3)
        if height < LEAST_POINTS or state.alpha < LEAST_ALPHA:
            return True
        if state.mode in (3, 7):
            return not any(_within(place, box) for box in self.pictures)
        return (
            state.is_white
            and state.mode in (0, 4)
            and not any(_within(place, box) for box in self.dark + self.pictures)
        )

    def _resource(self, kind: str, name: Any) -> Any:
        found = (self.resources or {}).get(kind)
        found = found.get_object().get(name) if found is not None else None
        return found.get_object() if found is not None else None


def _is_white(operands: Any, operator: bytes) -> bool:
    numbers = [float(each) for each in operands if isinstance(each, int | float)]
    if not numbers:
        return False
    if operator == b"k" or len(numbers) == 4:
        return max(numbers) <= 1 - WHITE
    return min(numbers) >= WHITE


def _box(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _within(place: tuple[float, float], box: tuple[float, float, float, float]) -> bool:
    return box[0] - 1 <= place[0] <= box[2] + 1 and box[1] - 1 <= place[1] <= box[3] + 1


def visible_text(page: Any) -> tuple[str, int]:
    """(text, hidden) of a page of pypdf: what a reader sees of it, and the number of characters that one does not."""
    from pypdf.generic import ContentStream, NameObject

    whole = page.extract_text()
    contents = page.get_contents()
    if contents is None or not whole.strip():
        return whole, 0
    stream = ContentStream(contents, page.pdf)
    resources = page.get("/Resources")
    painter = Painter(resources.get_object() if resources is not None else None)
    for operands, operator in stream.operations:
        painter.run(operands, operator)
    if not painter.hidden:
        return whole, 0
    stream.operations = painter.visible
    page[NameObject("/Contents")] = stream
    seen = page.extract_text()
    return seen, max(1, len("".join(whole.split())) - len("".join(seen.split())))
