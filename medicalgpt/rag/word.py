"""The text of a paragraph of Word, with its equations in one line and its symbols as characters."""

from collections.abc import Iterable
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


def paragraph_text(paragraph: Any) -> str:
    """What is visible of a `w:p` element; a text box in it is another paragraph.

    Equations become one line, as in `(140 - age)/(72 Cr)` or `x^(2)`; a symbol of an unknown font becomes U+FFFD.
    """
    # A text box is within a paragraph, with a copy for programs that do not support text boxes.
    if any(parent.tag.endswith("}Fallback") for parent in paragraph.iterancestors()):
        return ""
    kinds = " or ".join(f"self::{tag}" for tag in ("w:t", "w:tab", "w:br", "w:noBreakHyphen", "w:sym", "m:oMath"))
    nodes = paragraph.xpath(f".//*[{kinds}][not(ancestor::w:r/w:rPr/w:vanish)][not(ancestor::m:oMath)]")
    return "".join(_text(node) for node in nodes if next(node.iterancestors(qn("w:p"))) is paragraph)


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
