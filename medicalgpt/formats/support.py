"""Whether a passage says what a sentence that cites it says, by rules: numbers, units, bounds, negations, key terms.

The rules compare wording, so they do not recognise a paraphrase or a translation: those count as not supported. Nor do
they understand the sentence: one that uses the passage's words in another relation passes.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from medicalgpt.formats.answers import normalize_width
from medicalgpt.formats.quantities import PER, QUANTITY, UNIT, UNITS, parse_unit
from medicalgpt.formats.terms import HAN, SENTENCE, STOP_WORDS, extract_terms, is_han

# The share of a sentence's terms that the passage has to contain: pairs of Chinese characters, other words.
KEY_TERMS = 0.6
# A part of the passage may be what a clause says if it has this share of the clause's terms.
SAME_SUBJECT = 0.4
NOT_A_SOURCE = re.compile(r"\s*\[\?\]")
CITED = re.compile(r"(?:\s*\[\d+\])+")
# "Daily. [1]" cites for the sentence before it.
END_BEFORE_MARKS = re.compile(r"([。！？!?；;.]+)((?:\s*\[\d+\])+)")

HAN_DIGITS = {char: number for number, char in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
HAN_NUMBER = re.compile(
    rf"[零〇一二两三四五六七八九十百]+(?=\s*(?:{UNIT}|倍|成|种|项|级|期|支|瓶|杯|餐|顿|针|剂|度)|[至到~-][一二两三四五六七八九十])"
)
ENGLISH_NUMBERS = {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten eleven twelve".split(), start=1)
}
ENGLISH_NUMBER = re.compile(rf"\b(?:{'|'.join(ENGLISH_NUMBERS)})\b(?=[\s-]+(?:{UNIT})(?![a-z])|\s+(?:to|or)\s)")
PER_TIME = re.compile(r"\b(times?)\s+(?:(?:a|each|every)\s+(?=(?:hour|day|week|month|year)\b)|(?=daily\b))")
CLOCK = re.compile(r"\b(\d{1,2})(?::(\d{2}))?\s*([ap])\.?m\b\.?")
FREQUENCY = {"once": "1 time", "twice": "2 times", "thrice": "3 times"}
WRITTEN = rf"{UNIT}(?:{PER}{UNIT})*"
RANGE = re.compile(
    rf"(\d+(?:\.\d+)?)\s*(?:-|~|〜|至|到|\bto\b|\bor\b)\s*(?=\d+(?:\.\d+)?\s*(?P<unit>{WRITTEN})?(?![a-z]))"
)
WRITTEN_UNIT = re.compile(rf"(?<![a-z]){WRITTEN}(?![a-z])")
# Times, ratios, blood pressures and dates are one value: 120/80 is not 80/120.
COMPOUND = re.compile(r"(?<![\d.])\d+(?:\.\d+)?(?:\s*[:/]\s*\d+(?:\.\d+)?)+(?!\d|\.\d)|\b\d{4}-\d{1,2}-\d{1,2}\b")
# What stands before or after a number makes it a bound.
UP_BEFORE = (
    r"(?:不低于|不少于|不小于|≥|>|(?<!不)(?:超过|高于|大于|多于)|至少|起码|\bno (?:less|fewer) than"
    r"|\bnot (?:less|below)|\bover|\babove|(?<!no )\bmore than|\bat least|(?<!not )\bexceed\w*"
    r"|(?:great|high)er than|\bfrom)"
)
DOWN_BEFORE = (
    r"(?:不高于|不多于|不大于|≤|<|不超过|不得超过|不能超过|不要超过|(?<!不)(?:低于|小于|少于)|最多|至多|\bno more than"
    r"|\bunder|\bbelow|(?<!no )\bless than|fewer than|lower than|\bat most|\bup to|\bnot exceed|\bwithin)"
)
UP_AFTER = r"(?:\s*(?:或|及|以)?(?:以上|更多)|\s*起|\s*(?:or|and) (?:more|above|over|higher|older))"
DOWN_AFTER = r"(?:\s*(?:或|及|以)?(?:以下|以内|之内|内)|\s*(?:or|and) (?:less|below|under|lower|younger))"

# Words with a negative character or word that do not negate a statement.
NEUTRAL = re.compile(
    "不满|不到|不良|不适|不仅|不但|不断|不同|不锈|不足|不少|不超过|不得超过|不能超过|不要超过|不低于|不少于|不高于|不大于|不小于|不多于|不论|不管|"
    "不等|不久|不过|差不多|对不起|无论|无菌|无线|无创|未来|未成年|非常|非甾体|除非|是否|是不是|能不能|可不可以|要不要|有没有|非处方|"
    "特别|区别|级别|分别|性别|类别|鉴别|识别|个别|别人|别的|别处"
    r"|\bnot only\b|\bno\. ?\d|\bno (?:more|less|fewer) than\b|\bnot (?:exceed|more|less)\w*"
    r"|\bwhether or not\b|\bnot just\b"
)
NEGATION = re.compile(
    "切勿|勿|严禁|禁止|禁用|禁忌|禁|避免|忌|没有|没|无需|无须|无|未|非|不|莫|别"
    r"|\b(?:not|no|never|without|none|neither|cannot|avoid\w*|forbid\w*|prohibit\w*|contraindicat\w*)\b|n't\b"
)
# Says how firmly, not what.
MODAL = re.compile(
    "可以|可|应该|应当|应|需要|需|须|能够|能|要|的|了|着|也|都|就|请"
    "|剂量|用量"
    r"|\b(?:must|may|might|given?|also|only|please|recommended|usually|doses?|dosages?)\b"
)
CLAUSE = re.compile(r"[,，、;；:：。！？!?\n]|\.(?=\s|$)|(?<=\s)(?:but|and|or)(?=\s)|但是?|而")

# Of each group, a sentence and what it cites have the same one.
ALTERNATIVES = tuple(
    tuple(map(re.compile, group))
    for group in (
        (
            r"饭前|餐前|\bbefore (?:a |each |every |the )?(?:meals?|eating|food)\b",
            r"饭后|餐后|\bafter (?:a |each |every |the )?(?:meals?|eating|food)\b",
        ),
        (
            r"每[小个]*时|\bhourly\b|\b(?:an|per|each|every) hour\b",
            r"[每一][天日]|(?<!\d)1[天日](?=\d+次)|\bdaily\b|\b(?:a|per|each|every) day\b",
            r"[每一](?:周|星期)|(?<!\d)1(?:周|星期)(?=\d+次)|\bweekly\b|\b(?:a|per|each|every) week\b",
            r"每个?月|\bmonthly\b|\b(?:a|per|each|every) month\b",
            r"每年|\b(?:yearly|annually)\b|\b(?:a|per|each|every) year\b",
        ),
        (
            r"升高|增高|增加|提高|上升|\b(?:rais(?:es?|ed|ing)|increas(?:es?|ed|ing)|elevat(?:es?|ed|ing))\b",
            r"降低|减少|下降|\b(?:lower(?:s|ed|ing)|lower(?! than)|reduc(?:es?|ed|ing)|decreas(?:es?|ed|ing))\b",
        ),
    )
)

# Names that may not be replaced by another: of medicines by their endings, abbreviations, proper names.
MEDICINE = re.compile(
    r"\b(?:insulin|aspirin|codeine|[a-z]{2,}(?:cillin|mycin|micin|cycline|floxacin|azole|statin|sartan|pril|olol|dipine|gliptin|gliflozin|glutide|"
    r"formin|parin|farin|profen|fenac|coxib|tidine|prazole|mab|tinib|vir|pam|lam|sone|solone|thiazide|semide|xaban|"
    r"cetamol|minophen|dopa|goxin|terol|caine|adone|idine|oxetine|phine))\b"
)
HAN_MEDICINE = re.compile(
    rf"[{HAN}](?:霉素|西林|沙星|洛尔|普利|沙坦|他汀|地平|拉唑|替丁|列汀|列净|鲁肽|双胍|肝素|法林|匹林|洛芬|氨酚|昔布|替尼|单抗|"
    "沙班|噻嗪|塞米|格雷|特罗|米松|尼松|西泮|唑仑|岛素|孢[\u4e00-\u9fff]{1,2})"
)
CAPITALS = re.compile(r"(?<![\w-])[A-Za-z]*[A-Z][A-Za-z]*[A-Z0-9][A-Za-z0-9]*")
PROPER = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")


@dataclass(frozen=True)
class Claim:
    """A part of an answer with the sources that it cites.

    Attributes:
        text: without the citations.
        cited: numbers of sources; empty if it cites none.
    """

    text: str
    cited: tuple[int, ...]


class Value(NamedTuple):
    """A quantity of a sentence.

    Attributes:
        bound: 1 for "at least", -1 for "at most", 0 for neither.
        in_range: it is the end of a range, 3 of "3-5 days".
        medicines: those that the text names for it; empty if it names none.
    """

    written: str
    number: float
    base: str
    size: float
    has_unit: bool
    bound: int
    in_range: bool
    medicines: frozenset[str]


def split_claims(answer: str) -> list[Claim]:
    """The sentences of an answer, as its reader sees it. One that cites in several places is split behind each."""
    claims: list[Claim] = []
    for match in SENTENCE.finditer(END_BEFORE_MARKS.sub(r"\2\1", NOT_A_SOURCE.sub("", answer))):
        start, parts = 0, []
        for cited in CITED.finditer(match[0]):
            numbers = tuple(dict.fromkeys(map(int, re.findall(r"\d+", cited[0]))))
            parts.append(Claim(match[0][start : cited.start()].strip(), numbers))
            start = cited.end()
        rest = match[0][start:].strip()
        if parts and not re.search(r"\w\W*\w", rest):
            parts[-1] = Claim(parts[-1].text + rest, parts[-1].cited)
        elif rest:
            parts.append(Claim(rest, ()))
        claims += [claim for claim in parts if re.search(r"\w", claim.text)]
    return claims


def find_missing(sentence: str, passage: str, headings: str = "") -> list[str]:
    """What a sentence says that the passage does not: quantities, names, negations, terms. Empty if it is supported.

    Args:
        sentence: without citations.
        passage: text of one source, or of all that the sentence cites.
        headings: of the passage, which may hold its subject, but not numbers.
    """
    said, source = _plain(sentence), _plain(passage)
    missing = _missing_numbers(said, source)
    missing += _missing_names(sentence, f"{headings}\n{passage}")
    terms, held = key_terms(said), key_terms(_plain(headings)) | key_terms(source)
    if terms and len(terms & held) < KEY_TERMS * len(terms):
        missing += sorted(terms - held, key=said.find)
    elif not terms and not re.search(r"\d", said):
        missing.append(sentence.strip())
    elif negation := _changed_negation(said, source):
        missing.append(negation)
    missing += _other_alternatives(said, source)
    return list(dict.fromkeys(missing))


def _plain(text: str) -> str:
    """The text with one form of what can be written in several: width, dashes, case, numbers in words."""
    text = normalize_width(text).replace("—", "-").replace("’", "'").casefold()
    text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    text = re.sub(rf"(?<=[{HAN}])[^\S\n]+(?=[{HAN}])", "", text)
    text = re.sub(r"百分之\s*([\d.]+|[一二两三四五六七八九十百]+)", lambda match: f"{_digits(match[1])}%", text)
    text = HAN_NUMBER.sub(lambda match: _digits(match[0]), text)
    text = ENGLISH_NUMBER.sub(lambda match: ENGLISH_NUMBERS[match[0]], text)
    text = re.sub(r"\b(?:once|twice|thrice)\b", lambda match: FREQUENCY[match[0]], text)
    text = PER_TIME.sub(r"\1 per ", text).replace("per daily", "per day")
    text = CLOCK.sub(lambda match: f"{int(match[1]) % 12 + 12 * (match[3] == 'p')}:{match[2] or '00'}", text)
    # "500-mg", "28-day"
    return re.sub(rf"(?<=\d)-(?={UNIT}(?![a-z]))", " ", text)


def _digits(text: str) -> str:
    if not re.fullmatch("[零〇一二两三四五六七八九十百]+", text):
        return text
    total, last = 0, 0
    for char in text:
        if char in "十百":
            total, last = total + (last or 1) * (10 if char == "十" else 100), 0
        else:
            last = HAN_DIGITS[char]
    return str(total + last)


def _missing_numbers(said: str, source: str) -> list[str]:
    compounds = {re.sub(r"\s", "", match[0]) for match in COMPOUND.finditer(source)}
    missing = [match[0] for match in COMPOUND.finditer(said) if re.sub(r"\s", "", match[0]) not in compounds]
    held = _values(_meant_rows(said, source))
    units = {parse_unit(match[0])[0] for match in WRITTEN_UNIT.finditer(source)}
    return missing + [value.written for value in _values(said) if not any(_agree(value, one, units) for one in held)]


def _agree(value: Value, held: Value, units: set[str]) -> bool:
    """Whether a value of the passage is what the sentence says. `units` are the bases of all units of the passage."""
    if value.medicines and held.medicines and not value.medicines & held.medicines:
        return False
    if value.bound * held.bound == -1 or held.in_range and not value.in_range and not value.bound:
        return False
    if value.has_unit and held.has_unit:
        return value.base == held.base and abs(value.number * value.size - held.number * held.size) <= 1e-9 * max(
            abs(held.number * held.size), 1e-12
        )
    # In a table the unit stands in another cell.
    return value.number == held.number and (not value.has_unit or value.base in units)


def _values(text: str) -> list[Value]:
    """The quantities of a text, without those that are part of a time, a ratio or a date."""
    text = COMPOUND.sub(lambda match: " " * len(match[0]), text)
    ranges = {}
    for match in RANGE.finditer(text):
        ranges[match.start()] = match["unit"]
        ranges[match.end()] = match["unit"]
    values = []
    medicines, last = frozenset(), 0
    for match in QUANTITY.finditer(text):
        medicines, last = _medicines_between(text, last, match, medicines), match.end()
        start = match.start("number")
        number = match["number"].replace(",", "")
        if number.startswith("-") and start + 1 in ranges:
            start, number = start + 1, number[1:]
        unit = match["unit"] or ranges.get(start)
        base, size = parse_unit(unit, match["each"])
        before, after = text[max(0, start - 16) : start], text[match.end() : match.end() + 12]
        up = re.search(rf"{UP_BEFORE}\W*$", before) or re.match(UP_AFTER, after)
        down = re.search(rf"{DOWN_BEFORE}\W*$", before) or re.match(DOWN_AFTER, after)
        bound = 0 if bool(up) == bool(down) else 1 if up else -1
        has_unit = bool(unit or match["each"])
        values.append(Value(match[0].strip(), float(number), base, size, has_unit, bound, start in ranges, medicines))
    return values


def _medicines_between(text: str, start: int, match: re.Match[str], before: frozenset[str]) -> frozenset[str]:
    """The medicines of a quantity: those right behind it, else those before it in its sentence.

    Args:
        start: where the previous quantity ends.
        before: the medicines of that one.
    """
    if behind := re.match(r"\s*(?:of|的)\s*", text[match.end() :]):
        after = text[match.end() + behind.end() :]
        if found := MEDICINE.match(after) or HAN_MEDICINE.match(after):
            return frozenset([found[0]])
    between = text[start : match.start()]
    ends = [end.end() for end in re.finditer(r"[。！？；!?]|[.;](?=\s)|\n", between)]
    names = _medicines(between[ends[-1] :] if ends else between)
    return names if names or ends else before


def _medicines(text: str) -> frozenset[str]:
    return frozenset([*MEDICINE.findall(text), *HAN_MEDICINE.findall(text)])


def _meant_rows(said: str, source: str) -> str:
    """The passage without the rows of its tables that are about something else, if the sentence names a row."""
    terms = key_terms(said)
    lines = source.split("\n")
    labels = [key_terms(line.split("|")[0]) if "|" in line else set() for line in lines]
    if not any(label and label <= terms for label in labels):
        return source
    # The first row of a table has the units.
    return "\n".join(
        line
        for at, (line, label) in enumerate(zip(lines, labels, strict=True))
        if not label or label <= terms or not (at and labels[at - 1])
    )


def _other_alternatives(said: str, source: str) -> list[str]:
    """Words of the sentence for which the passage's closest sentences have another one of `ALTERNATIVES`."""
    terms = key_terms(said)
    pieces = [match[0] for match in SENTENCE.finditer(source)]
    shared = [len(terms & key_terms(piece)) for piece in pieces]
    if not terms or not pieces or max(shared) < SAME_SUBJECT * len(terms):
        return []
    near = " ".join(piece for piece, count in zip(pieces, shared, strict=True) if count == max(shared))
    missing = []
    for group in ALTERNATIVES:
        given = [found[0] for pattern in group if (found := pattern.search(said))]
        held = [pattern for pattern in group if pattern.search(near)]
        if given and held and not any(pattern.search(said) for pattern in held):
            missing += given
    return missing


def _missing_names(sentence: str, passage: str) -> list[str]:
    """Medicines, abbreviations and proper names that are not in the passage."""
    plain, source = normalize_width(sentence), normalize_width(passage).casefold()
    names = [*MEDICINE.findall(plain.casefold()), *HAN_MEDICINE.findall(plain)]
    names += [*CAPITALS.findall(plain), *PROPER.findall(plain)]
    return [name for name in dict.fromkeys(names) if name.casefold() not in source and name.casefold() not in UNITS]


def key_terms(text: str) -> set[str]:
    """Pairs of Chinese characters and words of other scripts, without numbers, units and words of little meaning."""
    terms = extract_terms(MODAL.sub(" ", NEGATION.sub(" ", text)), STOP_WORDS)
    return {
        term
        for term in terms
        if (len(term) == 2 if is_han(term) else len(term) > 1 and not term[0].isdigit() and term not in UNITS)
    }


def _changed_negation(said: str, source: str) -> str | None:
    """A clause that is negated where the passage's is not, or the other way round; None if there is none.

    The passage's clause is the shortest run of its clauses that has most of the terms of the sentence's clause; of a
    run, each clause that has some of them.
    """
    pieces = [_clauses(match[0]) for match in SENTENCE.finditer(source)]
    runs = [
        [(key_terms(clause), _negations(clause) % 2) for clause in clauses[start:end]]
        for clauses in pieces
        for start in range(len(clauses))
        for end in range(start + 1, min(start + 3, len(clauses)) + 1)
    ]
    for clause in _clauses(said):
        terms = key_terms(clause)
        if not terms or not runs:
            continue
        shared = [len(terms & set().union(*(held for held, _ in run))) for run in runs]
        if max(shared) < SAME_SUBJECT * len(terms):
            continue
        near = [run for run, count in zip(runs, shared, strict=True) if count == max(shared)]
        shortest = min(sum(len(held) for held, _ in run) for run in near)
        found = {
            negated
            for run in near
            if sum(len(held) for held, _ in run) == shortest
            for held, negated in run
            if held & terms
        }
        if _negations(clause) % 2 not in found:
            return clause.strip()
    return None


def _clauses(text: str) -> list[str]:
    return [clause for clause in CLAUSE.split(text) if re.search(r"\w", clause)]


def _negations(text: str) -> int:
    return len(NEGATION.findall(NEUTRAL.sub(" ", text)))


def unsupported_claims(
    answer: str, passages: Sequence[str], headings: Sequence[str] | None = None
) -> list[tuple[Claim, list[str]]]:
    """The claims of an answer that cite sources, none of which and not all together say it; each with what is missing.

    Args:
        answer: with numbers from 1 as citations.
        passages: texts of the sources.
        headings: of the sources.
    """
    headings = headings or [""] * len(passages)
    found = []
    for claim in split_claims(answer):
        cited = [number - 1 for number in claim.cited if 1 <= number <= len(passages)]
        if cited and (missing := _missing_from(claim.text, [passages[n] for n in cited], [headings[n] for n in cited])):
            found.append((claim, missing))
    return found


def _missing_from(text: str, passages: Sequence[str], headings: Sequence[str]) -> list[str]:
    for passage, heading in zip(passages, headings, strict=True):
        if not (missing := find_missing(text, passage, heading)):
            return []
    return missing if len(passages) == 1 else find_missing(text, "\n".join(passages), "\n".join(headings))
