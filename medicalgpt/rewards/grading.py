"""Compare an answer with the reference answer: quantities with units, multiple choice, formulas, short texts.

Rules only, no model: each function takes plain text and returns a score in [0, 1] or what it parsed. The reward
functions in rewards.py apply them to the answer block of a reply; see docs/grpo_training.md.
"""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from medicalgpt.formats.answers import HAN, normalize_width, parse_choice, strip_markup
from medicalgpt.formats.choices import answer_letters, written_options
from medicalgpt.formats.quantities import PER, QUANTITY, UNIT, UNITS, Quantity, parse_unit
from medicalgpt.rewards.math_worker import same_value

LATIN_WORD = r"[a-zA-Z\u00c0-\u024f]+"

UNIT_AT_END = re.compile(rf"(?<=[\d)}}\s])({UNIT}(?:{PER}{UNIT})*)\s*[.。]?$")
# Signs of a calculation, whose result is not one of the numbers in it.
CALCULATION = re.compile(r"[\\^√!×÷*π]|sqrt|\d\s*/\s*\d")


# "$18", "€18"; and what is counted, as in "18 dollars": a noun that is not a unit of UNITS.
CURRENCY = re.compile("[$€£¥]")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])")
COUNTED = re.compile(rf"(?<=\d)\s*(?:[a-z]{{3,}}(?: [a-z]{{3,}})?|[{HAN}]{{1,2}})$")


def parse_quantity(text: str, full_match: bool = False) -> Quantity | None:
    """The only number in a text, with its unit; None for no number, several numbers, or a calculation.

    Only what follows the last "=" or "≈" counts.

    Args:
        full_match: accept no text around the quantity.
    """
    text = re.split("[=≈]", CURRENCY.sub(" ", strip_markup(text)).casefold())[-1].strip(" .。")
    text = SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    if CALCULATION.search(text):
        return None
    matches = list(QUANTITY.finditer(text))
    if full_match and not (matches and matches[0].group() == text):
        return None
    found = set()
    for match in matches:
        digits = match["number"].replace(",", "")
        base, size = parse_unit(match["unit"], match["each"])
        has_unit = bool(match["unit"] or match["each"])
        found.add(Quantity(float(digits), base, size, digits.lstrip("-+").isdigit(), has_unit))
    return found.pop() if len(found) == 1 else None


def number_score(gold: str, answer: str, tolerance: float | None = None) -> float:
    """1 for the same number in the same unit, 0.5 for the same number without the unit that `gold` has, else 0.

    Units are converted ("2.5 mL", "2.5毫升", "0.0025 L"). Numbers with decimals match within 0.1 %, so that 33.3 may
    be written 33.33; whole numbers must match exactly. Calculations and formulas are compared by math-verify, and
    their units must be the same. An answer of several lines is work, not a number.

    Args:
        tolerance: accepted deviation of a number, as a share of `gold`, instead of these.
    """
    if normalize_width(gold).split() == normalize_width(answer).split():
        return 1.0
    if "\n" in answer.strip():
        return 0.0
    if noun := counted_noun(gold):
        gold = _without_noun(gold)
        answer = _without_noun(answer)
    wanted, given = parse_quantity(gold), parse_quantity(answer)
    if tolerance is not None or MIXED.match(gold) or MIXED.match(answer):
        wanted, given = wanted or parse_fraction(gold), given or parse_fraction(answer)
    if wanted and given:
        if tolerance is None:
            tolerance = 1e-9 if wanted.exact else 1e-3
        margin = tolerance * abs(wanted.number) + 1e-12
        # A quantity of something that is counted is not one in a unit.
        if wanted.base == given.base or not wanted.has_unit and not noun:
            size = given.size / wanted.size if wanted.base == given.base else 1.0
            if abs(wanted.number - given.number * size) <= margin:
                return 1.0
        same_number = abs(wanted.number - given.number) <= margin
        return 0.5 if same_number and not given.has_unit else 0.0
    formulas, units = [], []
    for text in map(strip_markup, (gold, answer)):
        unit = UNIT_AT_END.search(text.casefold())
        formulas.append(text[: unit.start()] if unit else text)
        units.append(parse_unit(unit[1]) if unit else None)
    if not all(map(is_formula, formulas)) or (all(units) and units[0] != units[1]):
        return 0.0
    if not same_value(*map(to_latex, formulas)):
        return 0.0
    return 0.5 if units[0] and not units[1] else 1.0


def strip_unit(text: str) -> str:
    """A result without markup and without the unit that it ends with."""
    text = strip_markup(text)
    unit = UNIT_AT_END.search(text.casefold())
    return text[: unit.start()] if unit else text


def is_formula(text: str) -> bool:
    """Whether a text consists only of numbers, signs, single letters and LaTeX commands."""
    rest = re.sub(r"\\[a-zA-Z]+", " ", to_latex(text))
    signs = re.fullmatch(r"[\d\s.,+\-*/^=(){}\[\]<>|_!%a-zA-Z]*", rest)
    return bool(signs and re.search(r"\d|\\", text) and not re.search("[a-zA-Z]{2}", rest))


def to_latex(text: str) -> str:
    """Convert typed arithmetic to LaTeX: `2**10` to `2^{10}`, `√16` to `\\sqrt{16}`."""
    text = re.sub(r"(?<!\\)(?:sqrt|√)\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", text)
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text.replace("**", "^").replace("×", r"\times ").replace("÷", "/"))
    return text.replace("π", r"\pi ").strip(" .。")


def choice_score(gold: str, answer: str, options: Mapping[str, str] | None = None) -> float:
    """1 if the answer chooses the same options as `gold`, else 0.

    Args:
        gold, answer: letters in any form of `parse_choice`; with `options`, also the text of one.
        options: letters and texts.
    """
    wanted = parse_options_chosen(gold, options)
    return float(wanted == parse_options_chosen(answer, options) != set())


def parse_options_chosen(text: str, options: Mapping[str, str] | None) -> set[str]:
    """The letters of the options that a text chooses, in lower case; none if letter and text contradict each other."""
    if not options:
        return parse_choice(text)
    return set((answer_letters(text, options, numbers=False) or "").casefold())


TOKEN = re.compile(rf"\d+(?:\.\d+)?|[{HAN}]|[^\W\d_{HAN}]+|[<>≤≥=+%±/]|(?<!\w)-(?=[\d)])")
SHORT_ANSWER = 12  # Han characters, words and numbers
VERDICTS = {"yes", "no", "maybe", "true", "false"}


def text_score(gold: str, answer: str) -> float:
    """1 for the same text, ignoring width, case, punctuation and white space.

    Otherwise 0 if `gold` is short, and for a `gold` longer than `SHORT_ANSWER` the F1 score of the bigrams (of Han
    characters, words and numbers) that both have in common, in [0, 1]. Overlap measures wording, not truth: a reply
    with "not" in the wrong place scores nearly as high as the correct one.
    """
    wanted, given = (TOKEN.findall(normalize_width(text).casefold()) for text in (gold, answer))
    if wanted == given:
        return 1.0
    if len(wanted) == 1 and wanted[0] in VERDICTS and VERDICTS.intersection(given) == {wanted[0]}:
        return float(given[0] == wanted[0])  # "Yes, it does."
    if len(wanted) <= SHORT_ANSWER:
        return 0.0
    wanted_pairs, given_pairs = Counter(pairwise(wanted)), Counter(pairwise(given))
    return 2 * (wanted_pairs & given_pairs).total() / (wanted_pairs.total() + given_pairs.total())


def infer_answer_type(gold: str, question: str, options: Mapping[str, str] | None = None) -> str:
    """`choice`, `number` or `text`: how to compare an answer if the row has no `type`.

    Args:
        options: of the row; those that are written in the question need not be passed.
    """
    options = options or written_options(question)
    if options and parse_options_chosen(gold, options):
        return "choice"
    gold = normalize_width(gold).strip(" .。")
    # "B", "(B)", "B) text"; but "E. coli" is a name, as "AB" and "CT" are.
    if re.fullmatch(r"\(?[A-J]\)?", gold) or re.match(rf"\(?[A-J](?:[):、]\s*\S|\.\s*(?:[A-Z{HAN}]))", gold):
        return "choice"
    if parse_quantity(gold, full_match=True) or counted_noun(gold):
        return "number"
    return "number" if is_formula(strip_unit(gold)) else "text"


def counted_noun(text: str) -> str | None:
    """`dollars` of "18 dollars": what a whole text counts, if it is a number and a noun that is not a unit."""
    noun = COUNTED.search(strip_markup(text).casefold().strip(" .。"))
    number = _without_noun(text)
    if not noun or not (parse_quantity(number, full_match=True) or parse_fraction(number)):
        return None
    known = parse_quantity(text)
    return None if known and known.has_unit else noun[0].strip()


def _without_noun(text: str) -> str:
    return COUNTED.sub("", CURRENCY.sub(" ", strip_markup(text)).casefold().strip(" .。"))


MIXED = re.compile(r"\s*-?\d+\s+(?:\d+\s*/\s*\d+|\\d?frac\b)")
FRACTION = re.compile(r"(-?)(?:(\d+)\s+)?(?:\\d?frac\{(\d+)\}\{(\d+)\}|(\d+)\s*/\s*(\d+))")


def parse_fraction(text: str) -> Quantity | None:
    """The value of a fraction or a mixed number without a unit: "3/4", "1 3/4", "\\frac{3}{4}"."""
    found = FRACTION.fullmatch(strip_markup(text).strip(" .。"))
    numerator, denominator = (int(found[n] or found[n + 2]) for n in (3, 4)) if found else (0, 0)
    if not denominator:
        return None
    value = int(found[2] or 0) + numerator / denominator
    return Quantity(-value if found[1] else value, "", 1.0, False, False)


def count_languages(text: str) -> tuple[int, int]:
    """Number of Han characters and number of Latin words, without what belongs to both languages."""
    text = re.sub(r"\\[a-zA-Z]+", " ", normalize_width(text))
    words = [word for word in re.findall(LATIN_WORD, text) if len(word) > 1 and not word.isupper()]
    return len(re.findall(f"[{HAN}]", text)), sum(word.casefold() not in UNITS for word in words)


# The scope of a negation ends at the next punctuation mark or contrast.
CLAUSE_END = re.compile(r"[,.;:!?。\n]|但|而是|而应|\bbut\b|\band (?:then )?(?:call|go)\b")
# "Do not hesitate to call" is advice to call.
URGES = (
    r"(?!\s*(?:to )?(?:犹豫|迟疑|慌|紧张|惊慌|害怕|担心|自行|自己|再?拖|耽|再?等|忘|错过|仅|预约|排队"
    r"|hesitat|wait|delay|ignore|drive))"
)
NEGATED_BEFORE = re.compile(
    r"(?:不用|不必|无需|无须|不需要?|不要|不应该?|不建议|没必要|没有必要|不一定|不急于|不值得|暂不|未必|勿|不去|不打|不叫"
    rf"|(?<![特区识级性分个类鉴])别(?![的人处]))(?:着急)?{URGES}"
    r"|\b(?:do not|don't|should not|shouldn't|need not|needn't|doesn't need|must not|never|no need|no reason|not need"
    rf"|not necessary|unnecessary|rather than|instead of|without|avoid)\b{URGES}"
    r"|(?:不是|并非|不算|没有|\b(?:no|not|isn't)(?: an?| the)?)\s*$"
)
NEGATED_AFTER = re.compile(
    rf"^.{{0,6}}?(?:不必|不用|不需要|没必要|没有必要|无必要|免了){URGES}"
    r"|^\W*(?:\w+\W+){0,3}?(?:(?:(?:is|are) not|isn't|aren't|not) (?:needed|necessary|required)|unnecessary)"
)


def affirms_term(text: str, term: str) -> bool:
    """Whether a text contains `term` at least once without a negation in the same clause.

    A term matches whole words, singular or plural. A number does not match inside another number, a ratio or a
    quantity, so that a blood pressure of 120/80 is not taken for the emergency number 120.
    """
    term = normalize_width(term).casefold()
    pattern = re.escape(term)
    if term.isdigit():
        pattern = rf"(?<![\d./]){pattern}(?!\d|\.\d|\s*[/~-]\s*\d|\s*(?:{UNIT})(?![a-z]))"
    elif term.isascii():
        pattern = rf"(?<![a-z]){pattern}(?:s|es)?(?![a-z])"
    text = normalize_width(text).replace("’", "'").casefold()
    for match in re.finditer(pattern, text):
        before = CLAUSE_END.split(text[: match.start()])[-1]
        after = CLAUSE_END.split(text[match.end() :])[0]
        if not NEGATED_BEFORE.search(before) and not NEGATED_AFTER.search(after):
            return True
    return False
