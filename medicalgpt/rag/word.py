"""The text of a paragraph of Word, with its equations in one line and its symbols as characters."""

import re
from collections.abc import Iterable, Iterator
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


WHITE = 0xF8
SMALLEST = 2  # half points
BORING_TABLES = (None, "TableNormal", "TableGrid")


class Runs:
    """Which runs of a document can be seen: not those that are hidden, white on nothing, or up to 1 point high.

    Attributes:
        hidden: number of characters found that cannot be seen, without white space.
    """

    def __init__(self, document: Any):
        self.hidden = 0
        styles = document.styles.element
        self.styles = {style.get(qn("w:styleId")): style for style in styles.iter(qn("w:style"))}
        self.defaults = next(styles.iter(qn("w:rPrDefault")), None)
        self.normal = next((style for style in self.styles.values() if self._is_default(style)), None)
        background = document.element.find(qn("w:background"))
        self.on_paper = background is None or _is_white(background.get(qn("w:color")))

    @staticmethod
    def _is_default(style: Any) -> bool:
        return style.get(qn("w:type")) == "paragraph" and style.get(qn("w:default")) in ("1", "true")

    def sees(self, run: Any) -> bool:
        """Whether a `w:r` element can be seen."""
        vanish = self._property(run, "vanish")
        if vanish is not None and vanish.get(qn("w:val")) not in ("0", "false", "off"):
            return False
        size = self._property(run, "sz")
        if size is not None and float(size.get(qn("w:val"), "24")) <= SMALLEST:
            return False
        colour = self._property(run, "color")
        white = colour is not None and colour.get(qn("w:themeColor")) is None and _is_white(colour.get(qn("w:val")))
        return not white or self._is_shaded(run)

    def _property(self, run: Any, name: str) -> Any:
        """A property of a run: its own, or that of its style, of its paragraph's style, or of the document."""
        path = f"{qn('w:rPr')}/{qn(f'w:{name}')}"
        for holder in self._holders(run):
            if (found := holder.find(path)) is not None:
                return found
        return None

    def _holders(self, run: Any) -> Iterator[Any]:
        yield run
        yield from self._chain(run.find(f"{qn('w:rPr')}/{qn('w:rStyle')}"))
        paragraph = next(run.iterancestors(qn("w:p")))
        name = paragraph.find(f"{qn('w:pPr')}/{qn('w:pStyle')}")
        yield from self._chain(name) if name is not None else self._with_bases(self.normal)
        if self.defaults is not None:
            yield self.defaults

    def _chain(self, name: Any) -> Iterator[Any]:
        yield from self._with_bases(None if name is None else self.styles.get(name.get(qn("w:val"))))

    def _with_bases(self, style: Any) -> Iterator[Any]:
        seen: set[int] = set()
        while style is not None and id(style) not in seen:
            seen.add(id(style))
            yield style
            base = style.find(qn("w:basedOn"))
            style = None if base is None else self.styles.get(base.get(qn("w:val")))

    def _is_shaded(self, run: Any) -> bool:
        """Whether something may be behind a run: shading, a highlight, a shape, a table with a style."""
        if not self.on_paper or self._property(run, "highlight") is not None:
            return True
        places = [*self._holders(run), *run.iterancestors(qn("w:p"), qn("w:tc"), qn("w:tbl"))]
        shades = (shade for place in places for shade in place.iterfind(f"*/{qn('w:shd')}"))
        if any(
            (shade.get(qn("w:fill")) or "auto") != "auto" and not _is_white(shade.get(qn("w:fill"))) for shade in shades
        ):
            return True
        if any(parent.tag.endswith("}txbxContent") for parent in run.iterancestors()):
            return True
        tables = (table.find(f"{qn('w:tblPr')}/{qn('w:tblStyle')}") for table in run.iterancestors(qn("w:tbl")))
        return any(style is not None and style.get(qn("w:val")) not in BORING_TABLES for style in tables)


def _is_white(colour: str | None) -> bool:
    return bool(re.fullmatch("[0-9a-fA-F]{6}", colour or "")) and min(bytes.fromhex(colour)) >= WHITE


def paragraph_text(paragraph: Any, runs: Runs) -> str:
    """What is visible of a `w:p` element; a text box in it is another paragraph.

    Equations become one line, as in `(140 - age)/(72 Cr)` or `x^(2)`; a symbol of an unknown font becomes U+FFFD.
    """
    # A text box is within a paragraph, with a copy for programs that do not support text boxes.
    if any(parent.tag.endswith("}Fallback") for parent in paragraph.iterancestors()):
        return ""
    kinds = " or ".join(f"self::{tag}" for tag in ("w:t", "w:tab", "w:br", "w:noBreakHyphen", "w:sym", "m:oMath"))
    nodes = paragraph.xpath(f".//*[{kinds}][not(ancestor::m:oMath)]")
    seen: dict[Any, bool] = {}
    pieces = []
    for node in nodes:
        if next(node.iterancestors(qn("w:p"))) is not paragraph:
            continue
        run = next(node.iterancestors(qn("w:r")), None)
        if run is not None and run not in seen:
            seen[run] = runs.sees(run)
        if run is None or seen[run]:
            pieces.append(_text(node))
        else:
            runs.hidden += len("".join(_text(node).split()))
    return "".join(pieces)


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
