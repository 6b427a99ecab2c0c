"""Which text of an HTML page a reader cannot see, by its style attributes and style elements.

Of style sheets, rules for single elements are applied: tag, class, id and combinations of these, without `>` or spaces
between elements. Linked style sheets are not fetched.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

Colour = tuple[float, float, float]
WHITE: Colour = (255, 255, 255)
# A reader takes these for equal, in each channel from 0 to 255.
SAME_COLOUR = 8
SMALLEST = 4 / 3  # px: 1 pt
FAINTEST = 0.05
OFF_SCREEN = -900  # px
ROOT_SIZE = 16.0  # px
NAMES = {
    "white": WHITE,
    "snow": (255, 250, 250),
    "ivory": (255, 255, 240),
    "whitesmoke": (245, 245, 245),
    "black": (0, 0, 0),
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "gray": (128, 128, 128),
    "grey": (128, 128, 128),
    "silver": (192, 192, 192),
    "navy": (0, 0, 128),
}
# Pixels in a unit; em and % are parts of the parent's size.
LENGTHS = {"px": 1, "pt": 4 / 3, "pc": 16, "in": 96, "cm": 37.8, "mm": 3.78, "rem": ROOT_SIZE, "vw": 10, "vh": 10}
LENGTH = re.compile(r"([-+]?\d*\.?\d+)(px|pt|pc|in|cm|mm|rem|em|ex|ch|vw|vh|%)?(?![\w.])")
RULE = re.compile(r"([^{}]+)\{([^{}]*)\}")
SELECTOR = re.compile(r"([a-z][a-z0-9]*|\*)?((?:[.#][\w-]+)*)", re.IGNORECASE)


@dataclass(frozen=True)
class Look:
    """How the text of an element looks. `background` is None where a picture or an unknown colour is behind it."""

    gone: bool = False
    seen: bool = True
    size: float = ROOT_SIZE
    colour: Colour | None = (0, 0, 0)
    clear: bool = False
    background: Colour | None = WHITE

    @property
    def visible(self) -> bool:
        if self.gone or not self.seen or self.clear or self.size <= SMALLEST:
            return False
        if self.colour is None or self.background is None:
            return True
        return max(abs(one - other) for one, other in zip(self.colour, self.background, strict=True)) > SAME_COLOUR


def remove_invisible(soup: Any) -> int:
    """Remove the strings of a page that cannot be seen. Returns their number of characters, without white space."""
    from bs4 import NavigableString, Tag

    rules = [rule for sheet in soup("style") for rule in _rules(sheet.get_text())]
    by_key: dict[str, list[tuple]] = {}
    for rule in rules:
        by_key.setdefault(rule[0], []).append(rule)
    looks, unseen = {id(soup): Look()}, []
    for node in soup.descendants:
        look = looks[id(node.parent)]
        if isinstance(node, Tag):
            looks[id(node)] = _look(look, node, _declarations(node, by_key))
        elif type(node) is NavigableString and node.strip() and not look.visible:
            unseen.append(node)
    # Text of these is never shown, and not meant to be.
    unseen = [node for node in unseen if not node.find_parent(["head", "script", "style", "noscript", "template"])]
    for node in unseen:
        node.extract()
    return sum(len("".join(node.split())) for node in unseen)


def _rules(sheet: str) -> Iterator[tuple[str, str, set[str], str | None, tuple[int, int, int], dict[str, str]]]:
    """Key, tag, classes, id, specificity and declarations of the rules for single elements."""
    sheet = re.sub(r"/\*.*?\*/", " ", sheet, flags=re.DOTALL)
    # Rules for print and the like do not apply; those of other conditions may.
    sheet = re.sub(r"@media\s+(?:only\s+)?print\b[^{,]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", " ", sheet)
    sheet = re.sub(r"@(?:charset|import|namespace|layer)\b[^;{}]*;", " ", sheet)
    for match in RULE.finditer(sheet):
        declarations = _parse(match[2])
        for selector in match[1].split(","):
            found = SELECTOR.fullmatch(selector.strip().removeprefix("html ").removeprefix("body ").strip())
            if not declarations or not found or not found[0]:
                continue
            names = re.findall(r"([.#])([\w-]+)", found[2])
            classes = {name for sign, name in names if sign == "."}
            ids = [name for sign, name in names if sign == "#"]
            tag = "" if found[1] in (None, "*") else found[1].lower()
            key = f"#{ids[0]}" if ids else f".{min(classes)}" if classes else tag or "*"
            yield key, tag, classes, ids[0] if ids else None, (len(ids), len(classes), bool(tag)), declarations


def _parse(text: str) -> dict[str, str]:
    pairs = (part.split(":", 1) for part in text.casefold().split(";") if ":" in part)
    return {name.strip(): value.strip() for name, value in pairs}


def _declarations(tag: Any, by_key: dict[str, list[tuple]]) -> dict[str, str]:
    """The declarations for a tag, each property once: of the strongest rule, or of its style attribute."""
    classes = tag.get("class") or []
    classes = classes.split() if isinstance(classes, str) else classes
    keys = ["*", tag.name, *(f".{name}" for name in classes), f"#{tag.get('id')}"]
    fitting = [
        (specificity, declarations)
        for key in keys
        for _, name, wanted, identity, specificity, declarations in by_key.get(key, ())
        if name in ("", tag.name) and wanted.issubset(classes) and identity in (None, tag.get("id"))
    ]
    found: dict[str, str] = {}
    firm: set[str] = set()
    for declarations in [
        *(each for _, each in sorted(fitting, key=lambda one: one[0])),
        _parse(tag.get("style") or ""),
    ]:
        for name, value in declarations.items():
            important = "!important" in value
            if important or name not in firm:
                found[name] = value.replace("!important", "").strip()
            if important:
                firm.add(name)
    return found


def _look(parent: Look, tag: Any, style: dict[str, str]) -> Look:
    colour = style.get("color") or (tag.get("color") if tag.name == "font" else None)
    background = style.get("background-color") or style.get("background") or tag.get("bgcolor")
    look = replace(
        parent,
        gone=parent.gone or tag.has_attr("hidden") or _is_gone(style),
        size=_size(style, parent.size),
    )
    if "visibility" in style:
        look = replace(look, seen=style["visibility"] not in ("hidden", "collapse"))
    if colour and colour not in ("inherit", "currentcolor"):
        look = replace(look, colour=_colour(colour), clear=_is_clear(colour))
    if background and not _is_clear(background) and background not in ("none", "inherit", "initial"):
        look = replace(
            look, background=None if "url(" in background or "gradient" in background else _colour(background)
        )
    if "background-image" in style and style["background-image"] != "none":
        look = replace(look, background=None)
    return look


def _is_gone(style: dict[str, str]) -> bool:
    """Whether an element is not shown with all that is in it."""
    if style.get("display") == "none" or _number(style.get("opacity"), 1.0) <= FAINTEST:
        return True
    if re.search(r"opacity\(\s*0*\.?0*%?\s*\)", style.get("filter", "")) or "scale(0)" in style.get("transform", ""):
        return True
    if _is_clipped(style.get("clip-path", "")):
        return True
    if style.get("position") in ("absolute", "fixed", "relative"):
        if any(_pixels(style.get(side)) <= OFF_SCREEN for side in ("left", "top", "right", "bottom")):
            return True
        if re.search(r"rect\(\s*0|rect\(1px", style.get("clip", "")):
            return True
    if any(_pixels(style.get(name)) <= OFF_SCREEN for name in ("text-indent", "margin-left", "margin-top")):
        return True
    cut = "hidden" in (style.get("overflow", ""), style.get("overflow-y", ""), style.get("overflow-x", ""))
    return cut and any(
        name in style and abs(_pixels(style[name], 99)) <= 1 for name in ("height", "width", "max-height")
    )


def _is_clipped(path: str) -> bool:
    """Whether a `clip-path` leaves nothing of an element."""
    if re.match(r"(?:circle|ellipse)\(\s*0(?:px|%)?\s*(?:[0)]|at\b)", path):
        return True
    found = re.match(r"inset\(([^)]*?)(?:\bround\b[^)]*)?\)", path)
    sides = [_number(side, 0) if "%" in side else 0 for side in (found[1].split() if found else ())]
    if not 1 <= len(sides) <= 4:
        return False
    # As in `margin`: top, right, bottom, left.
    top, right = sides[0], sides[min(1, len(sides) - 1)]
    bottom, left = sides[2] if len(sides) > 2 else top, sides[3] if len(sides) > 3 else right
    return top + bottom >= 1 or left + right >= 1


def _number(text: str | None, default: float) -> float:
    found = re.match(r"[-+]?\d*\.?\d+", text or "")
    return default if found is None else float(found[0]) / (100 if "%" in text else 1)


def _pixels(text: str | None, default: float = 0.0) -> float:
    found = LENGTH.match(text or "")
    return default if found is None else float(found[1]) * LENGTHS.get(found[2] or "px", ROOT_SIZE)


def _size(style: dict[str, str], parent: float) -> float:
    written = style.get("font-size")
    if written is None and (font := style.get("font")):
        found = next((match[0] for match in LENGTH.finditer(font) if match[2] or float(match[1]) == 0), None)
        written = found
    found = LENGTH.match(written or "")
    if found is None:
        return ROOT_SIZE if written and re.match(r"(?:x+-)?(?:small|large)|medium", written) else parent
    number, unit = float(found[1]), found[2] or "px"
    if unit in ("em", "%", "ex", "ch"):
        return parent * number * {"em": 1, "%": 0.01}.get(unit, 0.5)
    return number * LENGTHS[unit]


def _is_clear(text: str) -> bool:
    found = (
        re.match(r"(?:rgba?|hsla?)\([^)]*?[,/]\s*([\d.]+%?)\s*\)", text)
        if text.count(",") == 3 or "/" in text
        else None
    )
    alpha = int(text[7:9], 16) / 255 if re.fullmatch("#[0-9a-f]{8}", text) else _number(found[1], 1.0) if found else 1.0
    return text == "transparent" or alpha <= FAINTEST


def _colour(text: str) -> Colour | None:
    """Red, green and blue from 0 to 255; None for a colour that is not recognised."""
    text = text.casefold().strip()
    if found := re.match(r"#([0-9a-f]{3,8})\b", text):
        digits = found[1] if len(found[1]) > 4 else "".join(2 * digit for digit in found[1])
        return tuple(int(digits[at : at + 2], 16) for at in (0, 2, 4)) if len(digits) >= 6 else None
    if found := re.match(r"rgba?\(([^)]*)\)", text):
        parts = re.findall(r"[\d.]+%?", found[1])
        return tuple(_number(part, 0) * (255 if "%" in part else 1) for part in parts[:3]) if len(parts) >= 3 else None
    return next((NAMES[word] for word in text.split() if word in NAMES), None)
