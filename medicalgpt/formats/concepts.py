"""The words of a question that a passage with its answer should have, each with other words for the same thing."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from medicalgpt.formats.synonyms import CHINESE, ENGLISH
from medicalgpt.formats.terms import STOP_WORDS, WORD, is_han, stem


# Words that any passage could do without: they weigh a quarter.
WEAK_ENGLISH = frozenset(
    map(
        stem,
        """accept add afraid again ago all almost alone along already also always another anybody anyone anything anywhere
        appear around arrive available away awful back bad bear because become before begin behind best better between big
        bother bring call cannot care careful case certain chance change cheap choose clear come common complete concern
        consider continue correct count couple current daughter dad day deal decide depend different difficult dirty
        easy either else enough ever every everybody everyone everything exact example exist expect explain extra fact
        fair fall family far father feel few find fine finish first fit follow forget forward free full get gentleman girl
        give go good great guess guy half happen hard have hear help here hold hope house how husband idea imagine important
        improve include inform instead interest involve issue item just keep kind know lady large last later lead least leave
        less let like likely list little live lot make man manage many matter mean meantime mention middle mine mind miss
        moment more most mother move much mum must myself near necessary need never new next nice normal nothing now number
        occur offer often ok okay old one only open option order other ought own part particular perfect perhaps person
        pick piece place plan please point possible prefer prepare present pretty prevent probable problem proper provide
        put question quite rather ready real really reason receive recent regular remain remember right safe same save say
        second see seem sense serious serve set several show sick side similar simple since situation small somebody someone
        something sometime somewhere son soon sorry sort special stand start stay step still stop straight strange strong
        stuff such sudden suitable suppose sure take tell term thank thing think though time today together tomorrow tonight
        too total touch toward true try turn two type unless until upon use useful usual various very visit wait want way
        week well while whole wife without woman wonder work worry worth would wrong year yesterday yet young simply
        able above after against at cover he she her him his hers it they them anybody shall should might could up down out off over under once three four
        bit mine's everyone's cause feel""".split(),
    )
)
WEAK_CHINESE = frozenset("大小好坏少下来去出进做弄着过点时候再又很太更只先后前多最久快慢不没")
# Words of two characters or more that weigh as little.
WEAK_CHINESE_WORDS = frozenset(
    "东西 地方 问题 情况 事情 时候 办法 方法 注意 合适 设施 参加 观察 恢复 准备 进行 选择 知道 觉得 发现 开始 结束 继续 "
    "以后 以前 之后 之前 期间 时间 今天 明天 昨天 今晚 现在 马上 立刻 直接 一起 一直 已经 可能 必须 一定 正常 经常 常常 "
    "有时 突然 刚才 刚 附近 旁边 厉害 严重 管用 有用 有效 作用 效果 区别 不同 意思 关系 影响 大概 大约 左右 所有 全部 "
    "别的 其他 另外 比较 非常 特别 容易 方便 麻烦 担心 害怕 希望 打算 喜欢 请你们 你们这儿 这儿 那儿 外面 家里 下次 第一次 "
    "不小心 不舒服 怎么救 怎么说 说明 什么意思 提供 安排 处理 解决 要求 接着 算数 剩下 剩 之内 以内 最快 最狠 最好 最多".split()
)
# The form of a Chinese question; what it asks for is in `question_kinds`.
CHINESE_FORM = re.compile(
    "请问|为什么|什么时候|什么|怎么办|怎么样|怎么|怎样|如何|多少|多久|多长时间|哪些|哪里|哪儿|哪个|哪种|哪天|哪|几|是否|是不是"
    "|能不能|可不可以|要不要|会不会|行不行|好不好|对不对|用不用|算不算|要紧吗|可以|需要|应该|有没有|行吗|对吗|好吗|吗|呢|吧|么"
    "|的|了|我们|你们|我|您|你|他|她|它|到底|一般|平时|或者|还是|就|都|也|还|能|要|会|得|该|给|把|被|让|用|到|在|和|跟|与|是|有"
    "|算|叫|这|那|自己|里面|里|上面|人|一下|一次|一台|一个|一种|一"
)

LONGEST_CHINESE = max(map(len, CHINESE.keys() | WEAK_CHINESE_WORDS))


@dataclass(frozen=True)
class Concept:
    """A word of a question.

    Attributes:
        text: the word; the stem of an English one.
        words: what counts as the word: itself and words for the same thing.
        weight: 1 for a word that matters, of English or of two Chinese characters.
    """

    text: str
    words: frozenset[str]
    weight: float

    @property
    def is_chinese(self) -> bool:
        return is_han(self.text)


def concepts_of(question: str) -> list[Concept]:
    """The concepts of a question, each once, in their order. Numbers are none: a question's seldom are in its answer."""
    question = plain(question)
    found: list[Concept] = []
    for word in WORD.findall(CHINESE_FORM.sub("。", question)):
        if is_han(word):
            found += _chinese(word)
        elif len(word) > 1 and word not in STOP_WORDS and not word[0].isdigit():
            root = stem(word)
            found.append(Concept(root, ENGLISH.get(root, frozenset([root])), 0.25 if root in WEAK_ENGLISH else 1.0))
    return list(dict.fromkeys(found))


def plain(text: str) -> str:
    """In lower case and compatible forms, as `extract_terms` reads it."""
    return unicodedata.normalize("NFKC", text).lower()


def _chinese(text: str) -> Iterator[Concept]:
    """Known words, the longest first; what is between them has no dictionary, so its characters count, in pairs."""
    start = at = 0
    while at < len(text):
        ends = range(min(len(text), at + LONGEST_CHINESE), at, -1)
        known = next((text[at:end] for end in ends if text[at:end] in CHINESE or text[at:end] in WEAK_CHINESE_WORDS), None)
        if known:
            yield from _characters(text[start:at])
            weight = 0.25 if known in WEAK_CHINESE_WORDS else 1.0 if len(known) > 1 else 0.75
            yield Concept(known, CHINESE.get(known, frozenset([known])), weight)
            start = at = at + len(known)
        else:
            at += 1
    yield from _characters(text[start:])


def _characters(text: str) -> Iterator[Concept]:
    for at, character in enumerate(text):
        if character in STOP_WORDS:
            continue
        pairs = [text[left : left + 2] for left in (at - 1, at) if 0 <= left <= len(text) - 2]
        yield Concept(character, frozenset(pairs or [character]), 0.15 if character in WEAK_CHINESE else 0.5)
