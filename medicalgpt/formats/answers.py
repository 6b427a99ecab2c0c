"""Find the final answer in a text: a reference answer of a data set, or a reply of a model.

Data sets and models mark it in a few ways: `<answer>18</answer>`, `#### 18` (GSM8K), `\\boxed{18}`, a heading
`## Final Response`, `The answer is 18`. The same functions read both, so that a reply in the form of the data counts.
"""

import re
import unicodedata

HAN = r"\u3400-\u4dbf\u4e00-\u9fff"


def normalize_width(text: str) -> str:
    """Replace full-width letters, digits and signs by their ASCII forms (NFKC), and long dashes by a minus sign."""
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-")


def extract_answer(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`, stripped; it may span several lines. None without a block."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, flags=re.DOTALL)
    return found[-1].strip() if found else None


def strip_thinking(text: str) -> str:
    """The part of a reply that the user sees: the answer block, or what follows the thinking if there is none."""
    answer = extract_answer(text)
    return text.rpartition("</think>")[2] if answer is None else answer


def boxed_answer(text: str) -> str | None:
    """What is in `\\boxed{...}`; the different contents of several boxes, separated by commas. None without a box."""
    starts: list[int | None] = []  # of the open braces; None for one that is not that of a box
    boxes: list[tuple[int, int]] = []
    for match in BRACE.finditer(text):
        if match[0][-1] == "{":
            starts.append(match.end() if "boxed" in match[0] else None)
        elif match[0] == "}" and starts and (start := starts.pop()) is not None:
            while boxes and boxes[-1][0] > start:
                boxes.pop()  # a box in this one is part of it
            boxes.append((start, match.start()))
    return ", ".join(dict.fromkeys(text[start:end].strip() for start, end in boxes)) or None


BRACE = re.compile(r"\\f?boxed\s*\{|[{}]|\\.")
HEADING = re.compile(
    r"^[ \t]*#{1,6}[ \t]*(?:final (?:response|answer)|最终(?:回答|答案|回复))\b[ \t]*[:：]?", re.I | re.M
)
HASHES = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\n]+?)\s*$")
# Up to the end of a line: "The correct answer is (B).", "答案：B", "故选B".
STATEMENT = re.compile(
    r"(?:\b(?:answer|(?:correct|right|best) (?:option|choice))\b(?:\s+(?:option|choice))?\s*(?:is|are|would be|[:=：])+"
    r"|\bi (?:would |will )?(?:choose|select|pick)\b|答案\s*(?:应该|应)?\s*(?:是|为|选|[:：])+"
    r"|(?:故|应|应该|因此|所以)选(?:择)?)[ \t*:：]*([^\n]+?)\s*$",
    re.I,
)
LONGEST_STATEMENT = 80  # characters


def _marked_answer(text: str) -> str | None:
    """The final answer, if the text marks it; None otherwise."""
    headings = list(HEADING.finditer(text))
    if headings:
        text = text[headings[-1].end() :].strip()
    if (boxed := boxed_answer(text)) is not None:
        return boxed
    if hashes := HASHES.search(text):
        return hashes[1]
    # In the last line, or as a line: "Answer: B", which an explanation may follow.
    lines = text.strip().split("\n")
    for line in reversed(lines):
        stated = STATEMENT.search(line)
        opening = stated and len(re.findall(r"\w+", line[: stated.start()])) <= 3
        if stated and (line is lines[-1] or opening) and len(stated[1]) <= LONGEST_STATEMENT:
            return stated[1]
    return text if headings else None


def final_answer(text: str) -> str:
    """The final answer in a reference answer; the whole text, without its thinking, if nothing marks it."""
    block = extract_answer(text)
    text = (text.rpartition("</think>")[2] if block is None else block).strip()
    return _marked_answer(text) or text


def reply_answer(text: str) -> str | None:
    """The final answer in a reply; None if it has none, since it is empty or is still thinking.

    An answer block counts before everything else, and all of it: work in it is part of the answer, except around a box.
    Without a block, what follows the thinking counts: the marked answer in it, or all of it.
    """
    visible = text.rpartition("</think>")[2] if "</think>" in text else text
    block = extract_answer(visible)
    if block is None and not visible.strip():
        block = extract_answer(text)
    if block is not None:
        return boxed_answer(block) or block or None
    if "<think>" in visible or "<answer>" in visible:
        return None
    visible = visible.strip()
    return _marked_answer(visible) or visible or None


def strip_markup(text: str) -> str:
    """Remove the LaTeX and Markdown markup around a result."""
    wrappers = r"\\(?:text(?:bf|rm|it|sf)?|math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]*)\}"
    text = re.sub(wrappers, r"\1", re.sub(wrappers, r"\1", normalize_width(text)))
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;:! ()\[\]]|\$|(?<![\d)}])\*\*|\*\*(?![\d({])", " ", text).replace(r"\%", "%")
    return re.sub(r"\bm\^(?:2|\{2\})", "m2", text).strip()


LETTERS = "abcdefghij"  # of ten options
CHOICE_LEAD = re.compile(
    r"^(?:the|correct|right|best|final|answers?|options?|choices?|choose|select|is|are|正确|最佳|最终|答案|选项|选择"
    r"|应该|应|故|选|是|为|[:\s*(\[$])+"
)
CHOICE_LETTERS = re.compile(
    r"([a-j](?:(?:[\s,、;/&和与及]|and)*[a-j])*)[\s.。、:)\]*$选项]*"
    r"(?:$|[,;]?\s*(?:because|since|因为|由于)|is (?:the )?(?:correct|right|best)\b)"
)
# Before "." or ":" anywhere in a list; before a Han character only where an option begins, for some terms begin with a
# letter ("C反应蛋白").
MARKED_LETTER = re.compile(
    rf"(?:(?:^|[;\n]\s*)\(?(?=[a-j]\s*[{HAN}])|(?:^|[;,、。.\n)]\s*)\(?(?=[a-j](?:\s?[.、:)]|\()))([a-j])"
)


def parse_choice(text: str) -> set[str]:
    """The letters chosen from options A to J: "B", "ac", "A、C", "选B", "(B)", "B. text", "The answer is B."."""
    text = CHOICE_LEAD.sub("", strip_markup(text).casefold())
    if only := CHOICE_LETTERS.match(text):
        return set(re.findall(f"[{LETTERS}]", only[1].replace("and", "")))
    return set(MARKED_LETTER.findall(text)) if MARKED_LETTER.match(text) else set()
