"""Whether a passage supports a sentence: its numbers, negations and key terms are compared, by rules alone.

The rules see what can be compared word by word. A paraphrase without a word in common is reported as not supported, and
a sentence that uses the words of a passage in another relation may pass. So "supported" is not "true".
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile

from medicalgpt.formats.answers import normalize_width
from medicalgpt.formats.quantities import QUANTITY, parse_unit
from medicalgpt.formats.terms import CHINESE_NAME, NAME, SENTENCE, STOP_WORDS, WORD, is_han, stem

# Least share of a sentence's key terms that the passage has. Chinese pairs of characters change with word order.
LEAST_OVERLAP = {"word": 0.5, "pair": 0.35}
# A subject may be named a few clauses earlier.
REACH = 4
CLAUSE = re.compile(
    r"(?:[,;:](?!\d)|[，；：、。！？]|[.!?](?=\s|$)|\n|\bbut\b|\bwhile\b|\bwhereas\b|但|而是|而(?=[^且]))+"
)

DIGITS = dict(zip("零一二两三四五六七八九", (0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
CHINESE_NUMBER = re.compile(
    r"(?<![第周期])([一二两三四五六七八九]?十[一二三四五六七八九]?|[一二两三四五六七八九])"
    r"(?=\s*(?:毫克|微克|克|毫升|升|片|粒|滴|次|遍|天|日|周|个月|月|年|岁|小时|分钟|秒|个小时|厘米|毫米|度|倍|张|人|成))"
)
ENGLISH_NUMBERS = dict(
    zip(
        "one two three four five six seven eight nine ten eleven twelve".split(),
        range(1, 13),
        strict=True,
    )
)
ENGLISH_NUMBER = re.compile(rf"\b({'|'.join(ENGLISH_NUMBERS)})\b")
TIMES = {"once": "1 time", "twice": "2 times"}
EACH_TIME = re.compile(r"[一每]次(?=[^\d\n，。]{0,4}\d)")
HOURS = re.compile(r"\b(\d{1,2})(?::(\d\d))?\s*([ap])\.?m\b\.?")
SUPERSCRIPT = re.compile(r"×\s*10\^?[⁰¹²³⁴⁵⁶⁷⁸⁹\d]+")
# How often: a dose per day and one per week are not the same.
FREQUENCIES = {
    "per hour": r"/h\b|每(?:个)?小时|hourly|(?:per|an|each|every) hour\b",
    "per day": r"/d\b|/day|/[日天]|每[日天]|一[日天](?!内)|1\s*[日天](?=\d)|24 ?小时内|\bdaily|\bqd\b"
    r"|(?:per|a|each|every) day\b",
    "per week": r"/w(?:ee)?k|每周|每星期|一周(?=\d|[一两三]次)|\bweekly|(?:per|a|each|every) week\b",
    "per month": r"每个?月|\bmonthly|(?:per|a|each|every) month\b",
    "per year": r"每年|\byearly|\bannual|(?:per|a|each|every) year\b",
}
FREQUENCIES = {name: re.compile(pattern) for name, pattern in FREQUENCIES.items()}
# Words that state the opposite of each other. A sentence with one is not supported by a clause with the other alone.
OPPOSITES = [
    tuple(re.compile(side) for side in pair)
    for pair in (
        (
            r"不超过|不多于|不高于|不大于|低于|少于|小于|以下|以内|之内|最多|至多|不到|不满|未满|不足|≤|<"
            r"|\bat most|\bup to\b|\bbelow|\bless than|\bunder\b|\bwithin|\bno more than|\bnot more than|\bmaximum",
            r"(?<!不)(?:超过|多于|高于|大于)|不低于|不少于|不小于|以上|至少|最少|≥|>"
            r"|\bat least|\babove|\bover\b|\bexceed|(?<!no )(?<!not )\bmore than|\bor more|\bminimum|\bno less than"
            r"|\bnot less than",
        ),
        (
            r"升高|增高|增加|偏高|上升|加重|\bincreas|\brais(?:e|ing)|\bhigher|\bworse",
            r"降低|减少|偏低|下降|减轻|\bdecreas|\breduc|\blower|\beases?\b",
        ),
        (r"[之以饭餐睡]前|\bbefore\b", r"[之以饭餐睡]后|\bafter\b"),
        (
            r"早上|早晨|上午|清晨|\bmorning|\b\d+ ?am\b",
            r"晚上|睡前|下午|傍晚|\bevening|\bnight|\bafternoon|\b\d+ ?pm\b",
        ),
        (r"热敷|热水|\bhot\b|\bwarm", r"冷敷|冰敷|凉水|\bcold\b|\bice\b"),
        (r"左|\bleft\b", r"右|\bright (?:arm|leg|side|hand|eye|ear|lung)"),
        (r"阳性|\bpositive", r"阴性|\bnegative"),
        (r"收缩压|高压|\bsystolic", r"舒张压|低压|\bdiastolic"),
        (r"过高|太高|\btoo high", r"过低|太低|\btoo low"),
        (r"男|\bmen\b|\bmale", r"女|\bwomen\b|\bfemale"),
        (r"成人|大人|\badult", r"儿童|孩子|小孩|婴儿|\bchild|\binfant|\bbab(?:y|ies)"),
        (r"空腹|\bempty stomach", r"随餐|饭后|\bwith food|\bafter (?:a )?meal"),
        (r"安全|\bsafe\b", r"危险|不安全|\bunsafe|\bdangerous"),
    )
]
# Characters of negation in words that negate nothing, and comparisons, which `OPPOSITES` compares.
NOT_NEGATIONS = re.compile(
    r"不(?:超过|多于|高于|大于|低于|少于|小于|到|满|足|良|适|同|断|仅|但|过|久|锈|管|论|如|妨)|未(?:满|成年|来)|无(?:菌|痛|线|论|糖)"
    r"|非(?:甾体|处方|常)|[特分类性级区识鉴辨个]别|别[人的处墅]|有没有|是不是|能不能|可不可以|要不要|会不会|是否|否则"
    r"|\bno(?:t)? (?:more|less|later) than|\bnot only|\bno matter|\bnot (?:yet|just)\b|\bwithout (?:delay|notice)"
)
NEGATION = re.compile(
    r"不|没|勿|莫|未|无|非|禁|忌|避免|别(?=[再去用吃给把让])|停(?=用|药)"
    r"|\bnot\b|n't\b|\bno\b|\bnever\b|\bnone\b|\bnothing\b|\bneither\b|\bnor\b|\bwithout\b|\bavoid|\bcannot\b|\bunable\b"
    r"|\bforbid|\bcontraindicat|\brefrain|\bfree of\b"
)
FORM = re.compile(
    "请问|什么时候|什么|怎么|如何|多少|多久|可以|需要|应该|应当|建议|一般|通常|大约|左右|根据|资料|文件|其中|因为|所以|因此|如果|的话"
    "|以及|并且|或者|还是|也可|就是|包括|进行|的|了|吗|呢|吧|请|您|你|我|应|会|可|把|被|在|和|与|及|或|是|为|要|能|有|到|至|时"
)
WORDS_OF_FORM = STOP_WORDS | frozenset(
    "yes according document passage source say state stated answer also usually generally about around per each every "
    "because since therefore however must may might while when once twice time times please or more less least most "
    "up under over below above within before after between only just get take taken use used need".split()
)


@dataclass(frozen=True)
class Measure:
    """A number with its unit: `number` in units of `base`; a base of "" is a bare number.

    Attributes:
        text: as it is written.
    """

    number: float
    base: str
    text: str

    def matches(self, other: "Measure") -> bool:
        """Whether `other`, of a passage, states this. A number without a unit may have any in the passage."""
        same = abs(self.number - other.number) <= 1e-6 * max(1.0, abs(self.number))
        if not self.base:
            return abs(self.number - other.bare) <= 1e-9
        return same and self.base == other.base

    @cached_property
    def bare(self) -> float:
        digits = re.search(r"\d[\d,]*(?:\.\d+)?", self.text)
        return float(digits[0].replace(",", "")) if digits else self.number


def prepared(text: str) -> str:
    """The text in small letters, with number words, times of day and ranges in one spelling."""
    text = normalize_width(text).replace("’", "'").casefold()
    text = SUPERSCRIPT.sub(" ", text)
    text = EACH_TIME.sub(" ", text)
    text = re.sub(r"(?<=\d)\s*(?:~|—+|至|到|\bto\b|-)\s*(?=\d)", " 到 ", text)
    text = HOURS.sub(_in_24_hours, text)
    for word, phrase in TIMES.items():
        text = re.sub(rf"\b{word}\b", phrase, text)
    text = ENGLISH_NUMBER.sub(lambda match: str(ENGLISH_NUMBERS[match[1]]), text)
    return CHINESE_NUMBER.sub(lambda match: str(_chinese_value(match[1])), text)


def _in_24_hours(match: re.Match) -> str:
    hour = int(match[1]) % 12 + (12 if match[3] == "p" else 0)
    return f"{hour}:{match[2] or '00'} {match[3]}m"


def _chinese_value(word: str) -> int:
    tens, ten, ones = word.rpartition("十")
    if not ten:
        return DIGITS[word]
    return 10 * (DIGITS[tens] if tens else 1) + (DIGITS[ones] if ones else 0)


def measures_in(text: str) -> list[Measure]:
    """The numbers of a prepared text. A unit of one end of a range is that of both; `/d` is left to `FREQUENCIES`."""
    found: list[tuple[int, Measure]] = []
    matches = list(QUANTITY.finditer(text))
    for number, match in enumerate(matches):
        unit, follower = match["unit"], matches[number + 1] if number + 1 < len(matches) else None
        if not unit and follower and text[match.end() : follower.start()].strip() == "到":
            unit = follower["unit"]
        parts = [part for part in re.split(r"\s*(?:/|每|\bper\b)\s*", unit or "") if part]
        kept = [part for place, part in enumerate(parts) if place == 0 or parse_unit(part)[0] not in TIME_BASES]
        base, size = parse_unit("/".join(kept)) if kept else ("", 1.0)
        if kept and not base:
            base = "%"
        value = float(match["number"].replace(",", "").lstrip("+-"))
        written = match["number"].lstrip("+-") + (f" {unit}" if unit else "")
        found.append((match.start(), Measure(value * size, base, written)))
    return [measure for _, measure in found]


TIME_BASES = {"s", "week", "month", "year"}


@dataclass(frozen=True)
class Terms:
    """Key terms of a text: `words` of other scripts and `pairs` of Chinese characters; `names` are among them."""

    words: frozenset[str]
    pairs: frozenset[str]
    names: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        return self.words | self.pairs


def key_terms(text: str) -> Terms:
    """Of a prepared text, without numbers, units, words of form, and negations."""
    names = {match[0] for match in CHINESE_NAME.finditer(text)}
    words, pairs = set(), set()
    for pattern in FREQUENCIES.values():
        text = pattern.sub(" ", text)
    for word in WORD.findall(FORM.sub(" ", QUANTITY.sub(" ", NEGATION.sub(" ", NOT_NEGATIONS.sub(" ", text))))):
        if is_han(word):
            pairs.update(word[at : at + 2] for at in range(len(word) - 1))
        elif not word.isdigit() and word not in WORDS_OF_FORM and len(word) > 1:
            words.add(stem(word))
            if NAME.fullmatch(word):
                names.add(stem(word))
    return Terms(frozenset(words), frozenset(pairs), frozenset(names))


@dataclass(frozen=True)
class Clause:
    """A clause of a passage.

    Attributes:
        sentence: number of its sentence.
        is_row: a row of a table, with ` | ` between its cells.
    """

    text: str
    sentence: int
    is_row: bool

    @cached_property
    def measures(self) -> list[Measure]:
        return measures_in(self.text)

    @cached_property
    def terms(self) -> Terms:
        return key_terms(self.text)

    @cached_property
    def negations(self) -> int:
        return count_negations(self.text)


def count_negations(text: str) -> int:
    return len(NEGATION.findall(NOT_NEGATIONS.sub(" ", text)))


def _clauses(text: str) -> Iterator[Clause]:
    for number, match in enumerate(SENTENCE.finditer(prepared(text))):
        is_row = " | " in match[0]
        for part in [match[0]] if is_row else CLAUSE.split(match[0]):
            if part and part.strip():
                yield Clause(part.strip(), number, is_row)


@lru_cache(maxsize=256)
def clauses_of(passage: str) -> tuple[Clause, ...]:
    return tuple(_clauses(passage))


@lru_cache(maxsize=4096)
def find_unsupported(sentence: str, passage: str, heading: str = "") -> tuple[str, ...]:
    """What of a sentence is not found in a passage, as it would be shown to a reader; empty if it is supported.

    Args:
        heading: of the passage; its words belong to each clause of the passage.

    Compared are, clause by clause: numbers with their units, converted; how often; opposites, such as at least and at
    most; the number of negations, even or odd; names; and the share of other key terms.
    """
    clauses, head = clauses_of(passage), prepared(heading)
    stated = [Clause(part.text, 0, False) for part in _clauses(sentence)]
    whole = key_terms("\n".join(clause.text for clause in stated))
    everywhere = key_terms(f"{head}\n" + "\n".join(clause.text for clause in clauses))
    missing = _missing_terms(stated, everywhere, f"{head} {prepared(passage)}")
    for clause in stated:
        missing += _missing_measures(clause, whole, clauses, head)
        missing += _missing_frequencies(clause.text, f"{head} {prepared(passage)}")
        missing += _contradictions(clause, clauses, head)
    return tuple(dict.fromkeys(missing))


def _missing_terms(stated: Sequence[Clause], passage: Terms, text: str) -> list[str]:
    names = {name for clause in stated for name in clause.terms.names}
    missing = sorted(name for name in names if name not in passage.words and name not in text)
    for kind in ("words", "pairs"):
        wanted = {term for clause in stated for term in getattr(clause.terms, kind)}
        lost = wanted - getattr(passage, kind)
        least = LEAST_OVERLAP["word" if kind == "words" else "pair"]
        if wanted and (len(wanted) - len(lost)) / len(wanted) < least:
            missing += sorted(lost)
    return missing


def _missing_measures(stated: Clause, whole: Terms, clauses: Sequence[Clause], head: str) -> list[str]:
    missing = []
    subject = stated.terms if stated.terms.all else None
    for measure in stated.measures:
        places = [n for n, clause in enumerate(clauses) if any(measure.matches(each) for each in clause.measures)]
        places += _bare_cells(measure, clauses)
        if subject is None:
            found = any(_is_near(whole, place, clauses, head) for place in places)
        else:
            found = any(_belongs(subject, measure, place, clauses, head) for place in places)
        if not found:
            missing.append(measure.text)
    return missing


def _bare_cells(measure: Measure, clauses: Sequence[Clause]) -> list[int]:
    """Rows that have the number alone, under a head of the table that names its unit."""
    unit = measure.text.partition(" ")[2]
    if not unit or not any(clause.is_row and unit in clause.text and not clause.measures for clause in clauses):
        return []
    return [
        n
        for n, clause in enumerate(clauses)
        if clause.is_row and any(not each.base and each.number == measure.bare for each in clause.measures)
    ]


def _table(place: int, clauses: Sequence[Clause]) -> Iterator[Clause]:
    """The rows of the table that a row is in, from its head."""
    first = place
    while first and clauses[first - 1].is_row:
        first -= 1
    return takewhile(lambda clause: clause.is_row, clauses[first:])


def _is_near(whole: Terms, place: int, clauses: Sequence[Clause], head: str) -> bool:
    """For a number in a clause without a subject of its own: whether its sentence, or row, speaks of any in `whole`."""
    own = clauses[place]
    near = [own] if own.is_row else [clause for clause in clauses if clause.sentence == own.sentence]
    context = key_terms("\n".join([head, *(clause.text for clause in near)])).all
    elsewhere = frozenset().union(*(clause.terms.all for clause in clauses)) - context
    return bool(whole.all & context) or not whole.all & elsewhere


def _belongs(subject: Terms, measure: Measure, place: int, clauses: Sequence[Clause], head: str) -> bool:
    """Whether the number at this place is said of the subject that the sentence speaks of.

    Its words that the passage has must be near the number: in its clause, the heading, or neighbouring clauses, up to
    one with a number of the same unit, which has a subject of its own.
    """
    near = [clauses[place].text, head]
    if clauses[place].is_row:
        near.append(next(row for row in _table(place, clauses)).text)
    bases = {each.base for each in clauses[place].measures if measure.matches(each) or not each.base}
    if not clauses[place].is_row:
        for step in (-1, 1):
            for n in range(place + step, place + step * (REACH + 1), step):
                if not 0 <= n < len(clauses) or clauses[n].is_row:
                    break
                if step > 0 and clauses[n].sentence != clauses[place].sentence:
                    break
                if any(each.base in bases for each in clauses[n].measures):
                    break
                near.append(clauses[n].text)
    context = key_terms("\n".join(near))
    elsewhere = frozenset().union(*(clause.terms.all for clause in clauses)) - context.all
    distinctive = subject.all & elsewhere
    if subject.pairs:
        # A pair may span two words that are neighbours by chance.
        return len(distinctive) <= len(subject.all) // 4
    return not distinctive


def _missing_frequencies(stated: str, passage: str) -> list[str]:
    found = {name for name, pattern in FREQUENCIES.items() if pattern.search(stated)}
    known = {name for name, pattern in FREQUENCIES.items() if pattern.search(passage)}
    return sorted(found - known) if found else []


def _contradictions(stated: Clause, clauses: Sequence[Clause], head: str) -> list[str]:
    """A negation or an opposite in which a clause differs from the clauses that speak of the same."""
    wanted = stated.terms.all
    shared = [len(wanted & clause.terms.all) for clause in clauses]
    best = max(shared, default=0)
    if best < max(1, len(wanted) // 4):
        return []
    nearest = [clause for clause, count in zip(clauses, shared, strict=True) if count == best]
    missing = []
    if not any((stated.negations - clause.negations) % 2 == 0 for clause in nearest):
        words = NEGATION.findall(NOT_NEGATIONS.sub(" ", stated.text))
        missing.append(words[0] if words else NEGATION.findall(NOT_NEGATIONS.sub(" ", nearest[0].text))[0])
    for pair in OPPOSITES:
        for here, there in (pair, pair[::-1]):
            said = here.search(stated.text)
            if (
                said
                and not there.search(stated.text)
                and all(there.search(clause.text) and not here.search(clause.text) for clause in nearest)
            ):
                missing.append(said[0])
    return missing
