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
        """able above accept add afraid after again against ago all almost alone along already also always another
        anybody anyone anything anywhere appear around arrive at available away awful back bad bear because become
        before begin behind best better between big bit bother bring call cannot care careful case cause certain
        chance change cheap choose clear come common complete concern consider continue correct could count couple
        cover current dad daughter day deal decide depend different difficult dirty down easy either else enough ever
        every everybody everyone everyone's everything exact example exist expect explain extra fact fair fall family
        far father feel few find fine finish first fit follow forget forward four free full gentleman get girl give go
        good great guess guy half happen hard have he hear help her here hers him his hold hope house how husband idea
        imagine important improve include inform instead interest involve issue it item just keep kind know lady large
        last later lead least leave less let like likely list little live lot make man manage many matter may mean
        meantime mention middle might mind mine miss moment more most mother move much mum must myself near necessary
        need never new next nice normal nothing now number occur off offer often ok okay old once one only open option
        order other ought out over own part particular perfect perhaps person pick piece place plan please point
        possible prefer prepare present pretty prevent probable problem proper provide put question quite rather ready
        real really reason receive recent regular remain remember right safe same save say second see seem sense
        serious serve set several shall she should show sick side similar simple simply since situation small somebody
        someone something sometime somewhere son soon sorry sort special stand start stay step still stop straight
        strange strong stuff such sudden suitable suppose sure take tell term thank them they thing think though three
        time today together tomorrow tonight too total touch toward true try turn two type under unless until up upon
        use useful usual various very visit wait want way week well while whole wife without woman wonder work worry
        worth would wrong year yesterday yet young""".split(),
    )
)
WEAK_CHINESE = frozenset("大小好坏少下来去出进做弄着过点时候再又很太更只先后前多最久快慢不没家看说新干儿")
# Words of two characters or more that weigh as little.
WEAK_CHINESE_WORDS = frozenset(
    "一定 一直 一起 下次 不同 不小心 不舒服 东西 严重 之内 之前 之后 事情 什么意思 今天 今晚 以内 "
    "以前 以后 作用 你们这儿 全部 关系 其他 准备 刚 刚才 别的 剩 剩下 办法 区别 厉害 参加 发现 另外 "
    "可能 合适 喜欢 地方 处理 外面 大概 大约 安排 害怕 家里 容易 左右 已经 希望 常常 开始 影响 必须 "
    "怎么救 怎么说 恢复 情况 意思 所有 打算 担心 接着 提供 效果 方便 方法 旁边 时候 时间 明天 昨天 "
    "最多 最好 最快 最狠 有效 有时 有用 期间 正常 比较 注意 特别 现在 直接 知道 突然 立刻 第一次 算数 "
    "管用 经常 结束 继续 要求 观察 觉得 解决 设施 说明 请你们 这儿 进行 选择 那儿 问题 附近 非常 马上 "
    "麻烦".split()
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
    """The concepts of a question, each once. Numbers are not: those of a question are seldom in its answer."""
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
        known = next(
            (text[at:end] for end in ends if text[at:end] in CHINESE or text[at:end] in WEAK_CHINESE_WORDS), None
        )
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
