"""Text of an HTML page that a reader does not see: hidden elements, no size, no contrast, no opacity, off the screen.

Style attributes and `<style>` elements are read, by specificity and order; style sheets of other files are not, since
nothing is fetched.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

MAX_RULES = 2_000
# A glyph of less than two pixels, or in a colour so close to its background, cannot be read.
LEAST_PIXELS, LEAST_CONTRAST, LEAST_OPACITY = 2.0, 24, 0.05
OFF_SCREEN = -400.0
COMMENT = re.compile(r"/\*.*?\*/|<!--|-->", re.DOTALL)
# States that depend on what a visitor does.
DYNAMIC = re.compile(r"::|:(?:hover|focus|active|visited|target|checked|before|after|first-l)")
COLORS = {
    **{"white": (255, 255, 255), "black": (0, 0, 0), "red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0)},
    **{"yellow": (255, 255, 0), "gray": (128, 128, 128), "grey": (128, 128, 128), "silver": (192, 192, 192)},
    **{"navy": (0, 0, 128), "lime": (0, 255, 0), "orange": (255, 165, 0), "purple": (128, 0, 128)},
    **{"snow": (255, 250, 250), "ivory": (255, 255, 240), "whitesmoke": (245, 245, 245), "lightgray": (211, 211, 211)},
}
SIZES = {"xx-small": 9.0, "x-small": 10.0, "small": 13.0, "medium": 16.0, "large": 18.0, "x-large": 24.0}
UNITS = {"px": 1.0, "pt": 4 / 3, "in": 96.0, "cm": 37.8, "mm": 3.78, "rem": 16.0, "": 1.0}
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """What an element passes on to its text and children.

    Attributes:
        is_gone: nothing within it can be seen, whatever it declares.
        background: None if it is a picture.
    """

    is_gone: bool = False
    is_visible: bool = True
    pixels: float = 16.0
    color: Color | None = (0, 0, 0)
    background: Color | None = (255, 255, 255)

    @property
    def hides_text(self) -> bool:
        if self.is_gone or not self.is_visible or self.pixels < LEAST_PIXELS or self.color is None:
            return True
        near = self.background and sum(abs(a - b) for a, b in zip(self.color, self.background, strict=True))
        return near is not None and near < LEAST_CONTRAST


@dataclass
class Styles:
    """Declarations by element, the strongest last."""

    found: dict[int, list[tuple[tuple[int, ...], dict[str, str]]]] = field(default_factory=dict)

    def add(self, element: Any, weight: tuple[int, ...], declared: dict[str, str]) -> None:
        self.found.setdefault(id(element), []).append((weight, declared))

    def of(self, element: Any) -> dict[str, str]:
        merged: dict[str, str] = {}
        for _, declared in sorted(self.found.get(id(element), []), key=lambda each: each[0]):
            merged |= declared
        merged |= {name: value for name, value in _declarations(element.get("style") or "").items()}
        return {name: value.replace("!important", "").strip() for name, value in merged.items()}


def remove_hidden(soup: Any) -> int:
    """Remove what a reader does not see. Returns the number of characters removed, without white space."""
    from bs4 import NavigableString, Tag

    styles = _read_styles(soup)
    doomed: list[Any] = []

    def visit(element: Any, look: Look) -> None:
        stack = [(element, look)]
        while stack:
            parent, around = stack.pop()
            for child in parent.children:
                if isinstance(child, Tag):
                    stack.append((child, _look(child, styles.of(child), around)))
                elif type(child) is NavigableString and around.hides_text and child.strip():
                    doomed.append(child)

    visit(soup, Look())
    for text in doomed:
        # White space keeps the words around it apart.
        text.replace_with(" ")
    return sum(len("".join(text.split())) for text in doomed)


def _read_styles(soup: Any) -> Styles:
    from soupsieve import SelectorSyntaxError

    styles, count = Styles(), 0
    for element in soup("style"):
        for selectors, body in _rules(COMMENT.sub(" ", element.string or "")):
            declared = _declarations(body)
            for selector in selectors.split(","):
                count += 1
                if count > MAX_RULES or not declared or DYNAMIC.search(selector):
                    continue
                try:
                    matched = soup.select(selector.strip())
                except (SelectorSyntaxError, ValueError, NotImplementedError):
                    continue
                weight = (_specificity(selector), count)
                for each in matched:
                    styles.add(each, weight, declared)
    return styles


def _rules(text: str) -> Iterator[tuple[str, str]]:
    """(selectors, declarations) of a style sheet as it is on a screen."""
    at = 0
    while (opening := text.find("{", at)) >= 0:
        head, depth, end = text[at:opening].rpartition(";")[2].strip(), 1, opening + 1
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        body = text[opening + 1 : end - 1]
        if head.startswith(("@media", "@supports", "@layer")):
            if "print" not in head:
                yield from _rules(body)
        elif not head.startswith("@"):
            yield head, body
        at = end


def _specificity(selector: str) -> tuple[int, int, int]:
    names = len(re.findall(r"(?:^|[\s>+~])[a-z]", selector, re.IGNORECASE))
    return selector.count("#"), len(re.findall(r"[.\[]|:(?!:)", selector)), names


# What decides whether text is seen.
PROPERTIES = frozenset(
    "display visibility opacity color background background-color font font-size position left top right bottom clip "
    "clip-path text-indent margin-left margin-top height width max-height max-width overflow transform filter "
    "background-image -webkit-text-fill-color content-visibility".split()
)


def _declarations(text: str) -> dict[str, str]:
    pairs = (part.partition(":") for part in text.lower().split(";"))
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip() in PROPERTIES and value.strip()}


def _look(element: Any, style: dict[str, str], around: Look) -> Look:
    look = around
    if _is_gone(element, style):
        look = replace(look, is_gone=True)
    if visibility := style.get("visibility"):
        look = replace(look, is_visible=visibility not in ("hidden", "collapse"))
    if size := style.get("font-size") or _size_of_font(style.get("font")):
        look = replace(look, pixels=_pixels(size, look.pixels))
    background = style.get("background-color") or style.get("background") or element.get("bgcolor")
    if "url(" in style.get("background-image", "") + style.get("background", "") or "gradient" in (background or ""):
        look = replace(look, background=None)
    elif background and (color := _color(background)):
        look = replace(look, background=color)
    color = style.get("-webkit-text-fill-color") or style.get("color")
    if color is None and element.name == "font":
        color = element.get("color")
    if color:
        if _is_transparent(color):
            look = replace(look, color=None)
        elif found := _color(color):
            look = replace(look, color=found)
    return look


def _is_gone(element: Any, style: dict[str, str]) -> bool:
    if element.has_attr("hidden") or element.get("aria-hidden") == "true" or style.get("display") == "none":
        return True
    opacity = re.match(r"([\d.]+)(%?)", style.get("opacity", "1"))
    if opacity and float(opacity[1] if opacity[1] != "." else 0) / (100 if opacity[2] else 1) < LEAST_OPACITY:
        return True
    if re.search(r"opacity\(\s*0", style.get("filter", "")) or re.search(
        r"scale[xy]?\(\s*0(?![.\d]*[1-9])", style.get("transform", "")
    ):
        return True
    moved = ["text-indent", "margin-left", "margin-top"]
    if style.get("position") in ("absolute", "fixed", "relative"):
        moved += ["left", "top", "right", "bottom"]
        if re.search(r"rect\(\s*[01](?:px)?[\s,]+[01]", style.get("clip", "")):
            return True
    if any(_pixels(style[name], 16.0) <= OFF_SCREEN for name in moved if name in style):
        return True
    if re.search(r"inset\(\s*(?:50|100)%|circle\(\s*0", style.get("clip-path", "")):
        return True
    box = [style.get(name) for name in ("height", "width", "max-height", "max-width")]
    flat = any(size is not None and _pixels(size, 16.0) <= 1 for size in box if size not in ("auto", "none"))
    return flat and style.get("overflow") in ("hidden", "clip")


def _size_of_font(font: str | None) -> str | None:
    """The size in a `font` property, such as `0` of `italic 0/0 a`."""
    found = re.search(r"(?:^|\s)(\d*\.?\d+(?:px|pt|r?em|%)?)(?:\s*/|\s)", font or "")
    return found[1] if found else None


def _pixels(size: str, around: float) -> float:
    """A length in pixels; `around` is the font size for `em` and `%`. What is not a length counts as `around`."""
    if size in SIZES:
        return SIZES[size]
    found = re.match(r"(-?\d*\.?\d+)(px|pt|in|cm|mm|rem|em|%|v[wh]|)", size)
    if not found or found[1] in ("", "-"):
        return around
    number, unit = float(found[1]), found[2]
    if unit in ("em", "%"):
        return number * around / (100 if unit == "%" else 1)
    return number * (10.0 if unit in ("vw", "vh") else UNITS[unit])


def _color(text: str) -> Color | None:
    text = text.strip().lower()
    if found := re.search(r"#([0-9a-f]{6}|[0-9a-f]{3})", text):
        digits = found[1] if len(found[1]) == 6 else "".join(2 * digit for digit in found[1])
        return tuple(int(digits[at : at + 2], 16) for at in (0, 2, 4))
    if found := re.search(r"rgba?\(\s*(\d+)[\s,]+(\d+)[\s,]+(\d+)", text):
        return tuple(min(255, int(part)) for part in found.groups())
    if found := re.search(r"hsla?\([^,]*,\s*[\d.]+%\s*,\s*(100|0)%", text):
        return (255, 255, 255) if found[1] == "100" else (0, 0, 0)
    return next((COLORS[word] for word in re.findall(r"[a-z]+", text) if word in COLORS), None)


def _is_transparent(text: str) -> bool:
    found = re.search(r"(?:rgba?|hsla?)\([^)]*[,/]\s*(0?\.?\d+)(%?)\s*\)", text)
    alpha = float(found[1]) / (100 if found[2] else 1) if found and text.count(",") != 2 else 1.0
    return text.startswith("transparent") or alpha < LEAST_OPACITY or bool(re.match(r"#[0-9a-f]{6}0[0-9a-c]$", text))
