"""The text of a paragraph of Word, with its equations in one line and its symbols as characters."""

from collections.abc import Iterable, Mapping
from typing import Any

from docx.oxml.ns import qn

# Characters of the font Symbol that medical texts use; Word gives them as 0xF000 + code.
SYMBOLS = dict(
    zip(
        (0xA3, 0xB3, 0xB1, 0xB4, 0xB8, 0xB0, 0xB9, 0xBB, 0xAE, 0xAC, 0xA5, 0xD7, 0xB7, 0x61, 0x62, 0x67, 0x64, 0x6D)
        + (0x6C, 0x73, 0x44, 0x57, 0x53),
        "≤≥±×÷°≠≈→←∞·•αβγδμλσΔΩΣ",
        strict=True,
    )
)
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


Styles = Mapping[str, Any]


def styles_of(document: Any) -> Styles:
    """The `w:style` elements of a document of python-docx, by id."""
    return {style.get(qn("w:styleId")): style for style in document.styles.element.iter(qn("w:style"))}


def paragraph_text(paragraph: Any, styles: Styles, hidden: list[str]) -> str:
    """What is visible of a `w:p` element; a text box in it is another paragraph.

    Hidden text, white text on white, and text of a point or less are added to `hidden`.

    Equations become one line, as in `(140 - age)/(72 Cr)` or `x^(2)`; a symbol of an unknown font becomes U+FFFD.
    """
    # A text box is within a paragraph, with a copy for programs that do not support text boxes.
    if any(parent.tag.endswith("}Fallback") for parent in paragraph.iterancestors()):
        return ""
    kinds = " or ".join(f"self::{tag}" for tag in ("w:t", "w:tab", "w:br", "w:noBreakHyphen", "w:sym", "m:oMath"))
    nodes = paragraph.xpath(f".//*[{kinds}][not(ancestor::m:oMath)]")
    seen = []
    for node in nodes:
        if next(node.iterancestors(qn("w:p"))) is not paragraph:
            continue
        text = _text(node)
        if not _is_hidden(node, paragraph, styles):
            seen.append(text)
        elif text.strip():
            hidden.append(text)
    return "".join(seen)


# Half points: a point is not legible.
LEAST_SIZE = 3
OFF = ("0", "false", "off")


def _is_hidden(node: Any, paragraph: Any, styles: Styles) -> bool:
    run = next(node.iterancestors(qn("w:r")), None)
    if run is None:
        return False
    look: dict[str, Any] = {}
    for properties in _properties_of(run, paragraph, styles):
        for name in ("vanish", "color", "sz", "shd", "highlight"):
            if (found := properties.find(qn(f"w:{name}"))) is not None:
                look[name] = found
    if "vanish" in look and look["vanish"].get(qn("w:val")) not in OFF:
        return True
    if "sz" in look and float(look["sz"].get(qn("w:val")) or 22) < LEAST_SIZE:
        return True
    return "color" in look and _is_white(look["color"]) and not _has_background(look, paragraph)


def _properties_of(run: Any, paragraph: Any, styles: Styles) -> Iterable[Any]:
    """The run properties that apply to a run, the weakest first: of its styles and their bases, then its own."""
    for path in ("w:pPr/w:pStyle/@w:val", "w:rPr/w:rStyle/@w:val"):
        names = (paragraph if "pStyle" in path else run).xpath(path)
        yield from reversed(list(_style_properties(names[0], styles)) if names else [])
    own = run.find(qn("w:rPr"))
    if own is not None:
        yield own


def _style_properties(name: str | None, styles: Styles) -> Iterable[Any]:
    known = set()
    while name is not None and name not in known and name in styles:
        known.add(name)
        style = styles[name]
        if (properties := style.find(qn("w:rPr"))) is not None:
            yield properties
        based_on = style.find(qn("w:basedOn"))
        name = None if based_on is None else based_on.get(qn("w:val"))


def _is_white(color: Any) -> bool:
    value = (color.get(qn("w:val")) or "").upper()
    if color.get(qn("w:themeColor")) in ("background1", "light1"):
        return color.get(qn("w:themeShade")) is None
    return len(value) == 6 and all(int(value[at : at + 2], 16) >= 0xFA for at in (0, 2, 4))


def _has_background(look: dict[str, Any], paragraph: Any) -> bool:
    """Whether white text may have a background in another colour: of its run, paragraph, cell, table, shape or page."""
    if "highlight" in look and look["highlight"].get(qn("w:val")) not in ("none", "white"):
        return True
    shades = [
        look.get("shd"),
        *paragraph.xpath("./w:pPr/w:shd | ancestor::w:tc/w:tcPr/w:shd | ancestor::w:tbl/w:tblPr/w:shd"),
    ]
    fills = [shade.get(qn("w:fill"), "auto").upper() for shade in shades if shade is not None]
    if any(fill not in ("AUTO", "FFFFFF") for fill in fills):
        return True
    # The colours of a table style and of a shape are not resolved.
    named = paragraph.xpath("ancestor::w:tbl/w:tblPr/w:tblStyle[not(@w:val='TableGrid' or @w:val='TableNormal')]")
    shape = paragraph.xpath("ancestor::w:txbxContent")
    page = paragraph.xpath("ancestor::w:document/w:background")
    return bool(named or shape or page)


def _text(node: Any) -> str:
    if node.tag == qn("w:t"):
        return node.text or ""
    if node.tag == qn("m:oMath"):
        return _formula(node)
    if node.tag == qn("w:noBreakHyphen"):
        return "-"
    return _symbol(node) if node.tag == qn("w:sym") else " "


def _symbol(node: Any) -> str:
    code = int(node.get(qn("w:char")) or "FFFD", 16)
    if not 0xE000 <= code <= 0xF8FF:
        return chr(code)
    return SYMBOLS.get(code - 0xF000, UNKNOWN) if node.get(qn("w:font")) == "Symbol" else UNKNOWN


def _formula(node: Any) -> str:
    """The text of an element of an equation (Office Math), in one line."""
    kind = node.tag.rpartition("}")[2]
    if kind == "t":
        return node.text or ""
    if kind == "f":
        return f"{_grouped(node, 'num')}/{_grouped(node, 'den')}"
    if kind in ("sSub", "sSup", "sSubSup", "nary"):
        return _with_scripts(node, kind)
    if kind == "rad":
        degree = _part(node, "deg")
        return f"{f'root[{degree}]' if degree else '√'}({_part(node, 'e')})"
    if kind == "d":
        begin, separator, end = (_property(node, "dPr", name, default) for name, default in DELIMITERS)
        return begin + separator.join(_all(node, "e")) + end
    if kind == "m":
        return f"[{'; '.join(', '.join(_all(row, 'e')) for row in node.iterchildren(qn('m:mr')))}]"
    return _joined(node)


DELIMITERS = (("begChr", "("), ("sepChr", "|"), ("endChr", ")"))


def _with_scripts(node: Any, kind: str) -> str:
    sub, sup, base = (_part(node, name) for name in ("sub", "sup", "e"))
    scripts = (f"_({sub})" if sub else "") + (f"^({sup})" if sup else "")
    # A large operator, such as a sum, stands before what it is applied to.
    return f"{_property(node, 'naryPr', 'chr', '∫')}{scripts} {base}" if kind == "nary" else base + scripts


def _property(node: Any, group: str, name: str, default: str) -> str:
    """A property such as `m:dPr/m:begChr m:val="["`; an empty value is not a character."""
    found = node.find(f"{qn(f'm:{group}')}/{qn(f'm:{name}')}")
    return default if found is None else found.get(qn("m:val")) or ""


def _part(node: Any, name: str) -> str:
    return "".join(_all(node, name))


def _all(node: Any, name: str) -> Iterable[str]:
    return [_joined(child) for child in node.iterchildren(qn(f"m:{name}"))]


def _grouped(node: Any, name: str) -> str:
    text = _part(node, name)
    return text if text.isalnum() else f"({text})"


def _joined(node: Any) -> str:
    # Settings are in elements whose names end so: rPr, ctrlPr, fPr.
    return "".join(_formula(child) for child in node.iterchildren("*") if not child.tag.endswith("Pr"))
