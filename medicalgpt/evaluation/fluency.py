"""What makes an answer unreadable, whatever keywords it contains.

The rules are narrow, so that they do not fire on a fluent answer: they find what small or broken models write (loops,
broken characters, words of another language, a sentence without an end), not what is merely clumsy or wrong.
"""

import re

REPEATS = "repeats itself"
BROKEN = "broken characters"
MIXED = "mixes languages"
UNENDED = "does not end"

# A replacement character stands for bytes that are not text; the others are control and private-use characters.
_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
# Abbreviations (MRI, pH) and units are written alike in Chinese, so that only longer words in small letters count.
_LATIN_WORD = re.compile(r"(?<![A-Za-z])[A-Z]?[a-z]{3,}(?![A-Za-z])")
# The same letters, at least four of them, three times in a row; or one to three of them six times.
_LOOP = re.compile(r"(?P<long>.{4,60}?)(?:[\s,，、。.;；]*(?P=long)){2}|(?P<short>.{1,3}?)(?P=short){5}", re.DOTALL)
_CLAUSE_END = re.compile(r"[\n。！？!?；;]|\.(?=\s|$)")
_SENTENCE_END = re.compile(r"[。！？!?.…][\"'”’」』）)\]*_]*$")
_FOREIGN_WORDS = 3
_FOREIGN_HAN = 2


def find_fault(answer: str, finish_reason: str, prompt: str, reference: str) -> str | None:
    """Return why an answer is not fluent; None if nothing is found.

    Args:
        finish_reason: `stop` if the model has ended the answer itself.
        prompt: text that the answer replies to. What it or the reference contains may be in the answer as well.
        reference: a correct answer; if it ends a sentence, the answer has to as well.
    """
    known = f"{prompt}\n{reference}"
    if _BROKEN.search(answer):
        return BROKEN
    if _repeats(answer):
        return REPEATS
    if _mixes_languages(answer, known):
        return MIXED
    ends = finish_reason == "stop" and (
        _SENTENCE_END.search(answer.rstrip()) or not _SENTENCE_END.search(reference.rstrip())
    )
    return None if ends else UNENDED


def _repeats(answer: str) -> bool:
    for loop in _LOOP.finditer(answer):
        # Rules, dotted lines and long numbers are not loops of language.
        if any(char.isalpha() for char in loop["long"] or loop["short"]):
            return True
    clauses = [clause.strip() for clause in _CLAUSE_END.split(answer)]
    return any(clauses.count(clause) > 2 for clause in set(clauses) if len(clause) >= 6)


def _mixes_languages(answer: str, known: str) -> bool:
    if not _HAN.search(known):
        return bool(re.search("[A-Za-z]", known)) and len(_HAN.findall(answer)) >= _FOREIGN_HAN
    words = {word.casefold() for word in _LATIN_WORD.findall(known)}
    # A prompt or a reference with several words of both languages allows both.
    if len(words) >= _FOREIGN_WORDS:
        return False
    foreign = [word for word in _LATIN_WORD.findall(answer) if word.casefold() not in words]
    return len(foreign) >= _FOREIGN_WORDS
