"""What a question asks for (a price, a time, a number of something), and what a sentence with the answer then has."""

import re
from dataclasses import dataclass

from medicalgpt.formats.synonyms import ENGLISH
from medicalgpt.formats.terms import HAN, STOP_WORDS, stem

NUMBER = (
    r"(?:\d|[零一二两三四五六七八九十百半]"
    r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|once|twice|single|no|none)\b)"
)
# For each kind of question: how it is asked, and what its answer looks like. The first kind that fits counts.
KINDS_AS_TEXT = {
    "price": (
        r"多少钱|几块钱|什么价|价钱|价格|费.{0,3}多少|押金.{0,2}多少|多少押金",
        r"\bcosts?\b|\bprice|\bfee\b|how expensive|\bfine for",
        r"(?:what|how much) (?:do|must|will|would|am|are) \w+ (?:pay|charged)",
        r"how much (?:is|are) (?:the |a |an )?(?!\w*(?:sugar|salt|water|leave))",
        "->",
        r"\d\s*(?:元|块)|[一两五]毛|免费|不收|不另收|不要钱",
        r"\bfree\b|\bnothing\b|\d\s*(?:dollar|pound|euro|pence|cent)|[$€£]\s?\d",
    ),
    "clock": (
        r"几点|什么时间|what time|(?:what|which) hour",
        "->",
        r"\d\s*:\s*\d\d|\d\s*[ap]m\b|midnight|noon|morning|evening|\d\s*点|早上|晚上|上午|下午|夜",
    ),
    "day": (
        r"哪[几一]?天|星期几|周几|几号(?!分机|电池)|(?:which|what) days?\b|on (?:which|what) day",
        "->",
        r"周[一二三四五六日天末]|每[日天周月]|\d\s*[日号]|工作日|第[一二三\d]",
        r"(?:mon|tues|wednes|thurs|fri|satur|sun)day|weekday|\bdaily\b|every",
    ),
    "frequency": (
        r"how (?:often|many times)|(?:多久|多长时间).{0,6}[一1][次回]",
        "->",
        r"每|[次回遍顿]|every|each|once|twice|daily|weekly|monthly|yearly|\ba (?:day|week|month|year)|\btimes\b",
    ),
    "duration": (
        r"多久|多长时间|(?:几|多少)(?:天|个?小时|分钟|个?月|年|周|个?工作日)",
        r"how (?:long|soon|quickly|early|late|far (?:ahead|in advance))",
        r"how many (?:\w+ )?(?:second|minute|hour|day|week|month|year)s",
        "->",
        rf"{NUMBER}\s*(?:到|至)?\s*(?:秒|分钟|分|个?半?小时|刻钟|[天日]|周|个?星期|个?月|年|岁|个?工作日|季)",
        rf"{NUMBER}[\s-]+(?:\w+\s+)?(?:second|min|hour|h\b|day|week|month|year|fortnight)",
        r"\b(?:an?|each|every) (?:\w+ )?(?:minute|hour|day|week|month|year)|until|for (?:life|ever)",
        r"当天|每[天日周月年]|半[年天]|\d:\d\d",
    ),
    "temperature": (
        r"(?:几|多少)度(?!电)|how (?:hot|warm|cold)|what temperature|how many degrees",
        "->",
        r"\d\s*(?:℃|°|度|degree|c\b)|\bcold\b",
    ),
    "dose": (
        r"毫克|几?毫升|多少单位|milligram|\bdose\b|\bmg\b",
        "->",
        r"\d\s*(?:毫克|mg\b|毫升|ml\b|单位|iu|units?\b)|milligram",
    ),
    "telephone": (
        r"电话.{0,4}(?:多少|几号)|哪个(?:电话|号码|分机)|几号分机|分机.{0,3}(?:多少|几|哪)",
        r"phone number|what number (?:do|should|can|must|to)|which extension",
        "->",
        r"(?:分机|内线|电话|拨|extension|number|call|ring|dial)\D{0,12}\d",
    ),
    "floor": (
        r"几[楼层]|哪一?层|(?:which|what) floor",
        "->",
        r"[一二三四五六七八九十\d]\s*[楼层]|地下|底层|\bfloor\b",
    ),
    "place": (
        r"哪里|哪儿|什么地方|哪条路|\bwhere\b|(?:which|what) (?:room|place)",
        "->",
        r"[楼室层门窗口台旁边侧处房箱院柜盒]",
        r"\b(?:room|floor|desk|door|at|in|into|behind|next|online|box|bin)\b",
    ),
    "name": (
        r"叫什么|是谁|谁是|哪位|\bwho (?:is|are|was|wrote|won)|what is the name|\b(?:named|called)\b",
        "->",
        r"叫|姓|名为|\b(?:named|called|dr|mr|mrs|ms)\b",
    ),
    "address": (
        r"地址|门牌|几路|\baddress\b|postcode",
        "->",
        r"[路街巷道]\s*\d|地址|\d\s*路|\baddress\b|\bstreet\b|\broad\b",
    ),
    "opinion": (
        r"牌子|哪家|最好|推荐|哪种.{0,8}(?:好|最|适合)|\bbest\b|recommend|\bbrand",
        "->",
        r"best|recommend|better|brand|推荐|最好|牌子|请选",
    ),
    "difference": (r"区别|difference|\bdiffer", "->", r"区别|不同|differ|whereas"),
    "reason": (
        r"为什么|为何|什么原因|\bwhy\b|what .*reason",
        "->",
        r"因为|由于|引起|免得|以免|所以|否则|原因|使|会|常常|多半",
        r"\b(?:because|since|due|or|can|may|is|if)\b|so that|\bcause|otherwise|mean|make",
    ),
    "size": (
        r"多[宽长重]|多大(?!岁)|how (?:wide|tall|heavy|big|large|deep)",
        "->",
        r"\d\s*(?:厘米|米|毫米|公斤|克|寸|cm|mm|m\b|kg|metre|inch|per|square)|手掌|岁|月",
    ),
    "speed": (r"多快|how fast", "->", r"\d\s*(?:公里|km|per|次)|每"),
    "number": (
        r"多少|几|how many|how much|\bwhat (?:number|value|level|reading|percentage)",
        "->",
        rf"{NUMBER}|enough|足够|适量|少量",
    ),
}
HOW_MANY = re.compile(r"how many ((?:\w+ )?\w+)")
COUNTED = re.compile(rf"(?<!哪)(?:几|多少)(?!号?分机|号电话)([{HAN}])")
# Measure words; those of a group may stand for each other. 个 says nothing about what is counted.
MEASURES = "次回遍顿针 楼层 天日 位名人 岁 度℃° 路 步 页 张 支 号 升 米 克 斤 粒片 册本 月 周 年".split()
OWN_KIND = frozenset(map(stem, "time thing day hour minute week month year second degree milligram".split()))


@dataclass(frozen=True)
class Demand:
    """What a sentence needs to answer a question.

    Attributes:
        kind: of the question, a key of KINDS_AS_TEXT; None if nothing that can be recognised is asked for.
        patterns: all of them are in the sentence, in lower case.
    """

    kind: str | None
    patterns: tuple[re.Pattern[str], ...] = ()

    def is_met(self, sentence: str) -> bool:
        return all(pattern.search(sentence) for pattern in self.patterns)


def _compile(parts: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    arrow = parts.index("->")
    return re.compile("|".join(parts[:arrow])), re.compile("|".join(parts[arrow + 1 :]))


KINDS = {kind: _compile(parts) for kind, parts in KINDS_AS_TEXT.items()}


def demand_of(question: str) -> Demand:
    """The demand of a question in lower case."""
    for kind, (asks, answers) in KINDS.items():
        if asks.search(question):
            return Demand(kind, (answers, *_counted(question)))
    return Demand(None)


def _counted(question: str) -> list[re.Pattern[str]]:
    """A number of what is counted: "how many lines" needs a number next to "line", 几层 one before 层."""
    if found := HOW_MANY.search(question):
        nouns = [stem(word) for word in found[1].split() if word not in STOP_WORDS]
        if not nouns or OWN_KIND.intersection(nouns):
            return []
        names = "|".join(sorted({re.escape(name) for noun in nouns for name in ENGLISH.get(noun, (noun,))}))
        near = r"(?:\W+\w+){0,3}\W+"
        return [re.compile(rf"{NUMBER}{near}(?:{names})|\b(?:{names})\w*{near}{NUMBER}")]
    if found := COUNTED.search(question):
        group = next((group for group in MEASURES if found[1] in group), None)
        return [re.compile(rf"{NUMBER}\s*个?[{group}]")] if group else []
    return []
