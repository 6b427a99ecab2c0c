"""The encoding of text that is not UTF-8: every candidate decodes it, and the result must look like a language.

Bytes of one encoding are mostly valid in another one, where they are other characters: an apostrophe of Windows becomes
a rare Han character. So a candidate counts by how likely its text is, as characters of a language: common ones, those
that fit their neighbours. What is likely in two ways, or in none, is refused; `--encoding` then names the encoding.
"""

import codecs
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from medicalgpt.errors import UserError

# The most frequent Han characters of Chinese medical and general text, in order; the traditional forms among them.
COMMON_HAN = (
    "的是一有和可不在以性能个用要这生病时为治了中疗发人或多我于会如对因现者子出大物么体些常们后过症上他到理好下动"
    "食分来方果作成你并行重炎血化种情药心提应经问定意及状您力量其而部感什使法期关患术等解表合通内进需间题也数自与"
    "前面外手助年就加高最学查管起素水小细活同医特所结导保度道地确之复检引正致建注更很比据皮变长供增还实当主得少痛"
    "但影程包持然况无它工全将系吃明制天产宫效质由染身相功说较平答家信白机肝此类息帮服原任点色次开没本样根尿肠新见"
    "疾入何位都目型做被事月业务饮议选腺肿创液儿神受调口阴品案精该去适具式消易指流激响膜且女气统减菌从清文院节低回"
    "每电孩请计别腹想形国组基怎示看着积免毒科头孕早知带反标强日决除容康设第胞里吗处公给胃视瘤脑压便造伤安名代癌般"
    "直养防传项输诊周运肌斯卵抗括利轻三存改健步总例维预放件显护器语失展极损甲格论列两考先严单技觉骨接至取宝颈认育"
    "非异热再必交择各美囊规男排刺眼让脉虑床述那习支肉环岁慢己克只临员始肾率断片网止干候完腔推否疼向则黄吸话值户风"
    "西观快酸张望球尽验区她含害切音测立识象价乐达模求续收试营字肤配阳施征已评近像良尔几参随够超蛋二急频糖光专资态"
    "乳证充拉源图降酒老脂角准足织射才置段许红妇句境转元味构避称怀研序深集即门微母司线教缩泌整静难脱粘车左哪海社局"
    "胆连救约留缺终速找险室往亚太义核肺首菜移金控障客真采联究背备假获脏划办巴声史索空补释场未睡德缓舒围优伴愈师希"
    "记共碍恶简右底智恢友综须突针谢衰界队剂历站故市温均告费油爱米侧晚布另码辅镜游疫命抑条松植料独战促路房算层打马"
    "死景言演换石住离敏密罗杂写四按富广喝肛胀属描练龄塞固念豆扩互善析淡潜仅英火泻洗辣吐尼休虚块遗商词台辛概童短板"
    "限郁癫困探满痫兴裂眠装世疹领端偏越思训穿疮曲欢喜益牙波策软编湿卫团麻硬阻误仔律弱号混朋紧呈继花鲜粒餐错泄毛络"
    "洁劳冷胸坏盆鼻停令键域培负照升久奶呼甚差群丸腰乏淋破半政脓肪落卡巢烧宜十青霉又担歌延危级禁普报祝退草氧略察边"
    "士符膀讨山某兰佳冒衡附呕绪企挑官双介稳击黑戏斑旅垂剧逐询详储似星阿享圣盐权胱肥壁呢励粉众势厚婴乙胎惯听趣绝肢"
    "睾牛钟荐骤咳尤协投执触款彩额蔬估鱼夫职南措章滤沟今寻跟库修锻五彻酶痔乱走际坚东盖践把读添泡销泛著散远土寒殖虽"
    "农滑椎古玩坐忌赛链录函印拥虫替典冲炼买丰痒华诉初材摄咖份循焦烟托课脾纤济鼓啡汤民萎巧仍范迟诺渐亲待副予书葡涉"
    "绍伊秘奇折瘫溶萄溃乎架访监刻耳股灵疣闭弹础操滴画争木茎胶"
)
TRADITIONAL_HAN = (
    "個這時為療發於會對現麼體們後過動來並種藥應經問狀關術內進間題數與學細醫結導確復檢據變長還實當況無將喫產宮質說"
    "較機類幫點開沒樣腸見業務飲議選腫創兒調陰該適響氣統減從節電請計別國組積頭帶標強決設裡嗎處給視腦壓傷養傳項輸診"
    "運輕總維預顯護語極損論兩嚴單覺寶頸認異熱擇規讓脈慮習環歲臨員腎斷網幹則黃話戶風觀張盡驗區測識價樂達續試營膚陽"
    "徵評爾幾參隨夠頻專資態證圖準織許紅婦轉構稱懷門線縮靜難脫車膽連約終險亞義採聯備獲髒劃辦聲補釋場緩圍優師記礙惡"
    "簡綜須針謝隊劑歷溫費愛側碼輔鏡遊條獨戰層馬換離羅雜寫廣脹屬練齡擴潛僅瀉虛塊遺詞臺鬱癲滿癇興裝領訓瘡歡軟編溼衛"
    "團誤號緊繼鮮錯絡潔勞壞鍵負膿燒黴擔級報邊討蘭嘔緒雙穩擊戲劇詢詳儲聖鹽權勵眾勢嬰慣聽絕鍾薦驟協執觸額魚職濾溝尋"
    "庫鍛徹亂際堅東蓋踐讀銷遠雖農賽鏈錄擁蟲衝煉買豐癢華訴攝煙託課纖濟湯範遲諾漸親書紹祕癱潰訪監靈閉彈礎畫爭莖膠係"
    "麵乾複錶雲鬆製黨"
)

HAN_PUNCTUATION = "，。、；：？！“”‘’（）《》【】—…·「」『』～　"
COMMON_HANGUL = (
    "이다는을의에가고하지은한를로도나기사있어니그리서해자인시것아대들수일게정부보거성전라만구여요주장상과제원조"
    "비스면치우국적무오마소진미안공경생동유내학신중회모세관여때없물연분발산방영실식위제할화선드러람말못았었습"
    "입됩까질감기염증환약열통간심혈압당뇨병원료운음법받각건강절양계른야호필함된던져계와며든개결복용암독예주"
)
HIRAGANA = "のにはをたがでてとしれさいるなもすかられこあっりうくまきけそめよみつどわえやせおだ"
RUSSIAN = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфё"
RUSSIAN_PERCENT = (
    "10.97 8.45 8.01 7.35 6.70 6.26 5.47 4.73 4.54 4.40 3.49 3.21 2.98 2.81 2.62 2.01 1.90 1.74 1.70 1.65 1.59 1.44 "
    "1.21 0.97 0.94 0.73 0.64 0.48 0.36 0.32 0.26 0.2"
)
GREEK = "αοιετσνηυρπκμλςωγδάθίφέόήχύβώξζψΐϊϋ"
HEBREW = "יוהלאתרבמשדנעחקפםגזטסןכצךףץ"
ARABIC = "اليمونرتبةعدسفهكقأحجشطصخىذزضإغئثءظؤآ"
# Letters outside ASCII of the languages that share an encoding.
WESTERN = {
    "French": "éèêàçùâîôûëïœæüÿ",
    "German": "äöüß",
    "Spanish": "áéíóúñü¿¡ªº",
    "Portuguese": "ãõáàâéêíóôúçü",
    "Italian": "àèéìíòóùú",
    "Nordic": "åäöæøé",
    "Dutch": "ëïéèêöüá",
}
CENTRAL = {
    "Polish": "ąćęłńóśźż",
    "Czech": "áčďéěíňóřšťúůýž",
    "Slovak": "áäčďéíĺľňóôŕšťúýž",
    "Hungarian": "áéíóöőúüű",
    "Romanian": "ăâîşţșț",
    "Croatian": "čćđšž",
}
TURKISH = {"Turkish": "çğıöşüâî"}
TYPOGRAPHY = "‘’“”„–—…•«»‚‹›"
SYMBOLS = "§°µ±²³×÷½¼¾®©™£¥€·\u00a0\u00ad¹¬¶†‰№"
# Logarithms of probabilities: what each ASCII character costs in any candidate, and a character that no text has.
ASCII, NEVER = -3.2, -18.0
SAMPLE_BYTES = 16 * 1024
# The text of the second candidate must be this much less likely: e to the power of it, 33 times.
MARGIN = 3.5
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Language:
    """How likely a character is in a language.

    Attributes:
        costs: logarithms of the probabilities of characters.
        other: for the characters that are not among them.
        limit: the least mean over the characters outside ASCII that is taken for this language.
        script: `han`, `kana`, `latin` or `letters` (of other alphabets): which neighbours are unlikely.
    """

    costs: Mapping[str, float]
    limit: float
    script: str
    other: Callable[[str], float] = field(default=lambda _: NEVER)

    def cost(self, character: str) -> float:
        if character < "\x80":
            return ASCII if character >= " " or character in "\t\r\n\f" else NEVER
        found = self.costs.get(character)
        return self.other(character) if found is None else found


def _spread(characters: str, mass: float) -> dict[str, float]:
    return dict.fromkeys(characters, math.log(mass / len(characters)))


def _other_han(encoding: str, first: tuple[int, int]) -> Callable[[str], float]:
    """Characters of the two levels of a national standard, by the lead byte of their code."""

    def cost(character: str) -> float:
        if "\uff01" <= character <= "\uff5e" or "\u2460" <= character <= "\u2473" or character in "℃％‰±×÷°≥≤≈→●■①":
            return -9.0
        if not "\u3400" <= character <= "\u9fff":
            return -14.0 if unicodedata.category(character)[0] in "LPSN" else NEVER
        code = character.encode(encoding, "ignore")
        if len(code) != 2:
            return -16.0
        return -10.9 if first[0] <= code[0] < first[1] else -13.5

    return cost


def _chinese(frequent: str, common: str, encoding: str, first: tuple[int, int]) -> Language:
    costs = _spread(common, 0.42) | _spread(frequent, 0.40) | _spread(HAN_PUNCTUATION, 0.12)
    return Language(costs, -9.2, "han", _other_han(encoding, first))


def _other_hangul(character: str) -> float:
    if "\uac00" <= character <= "\ud7a3":
        return -9.3 if len(character.encode("euc_kr", "ignore")) == 2 else -13.5
    return -12.0 if "\u3000" <= character <= "\u9fff" or "\uff01" <= character <= "\uff5e" else NEVER


def _other_japanese(character: str) -> float:
    if "\u3041" <= character <= "\u3093":
        return -6.5
    if "\u30a1" <= character <= "\u30fc":
        return -6.5
    if "\uff61" <= character <= "\uff9f":
        return -11.0
    if "\u4e00" <= character <= "\u9fff":
        code = character.encode("euc_jp", "ignore")
        return -9.0 if len(code) == 2 and code[0] < 0xD0 else -13.0
    return -10.0 if "\uff01" <= character <= "\uff5e" else -14.0


def _letters(costs: dict[str, float], capitals: float) -> dict[str, float]:
    return {letter.upper(): cost + capitals for letter, cost in costs.items() if len(letter.upper()) == 1} | costs


def _by_rank(letters: str) -> dict[str, float]:
    """Letters of an alphabet in the order of their frequency."""
    return {letter: -2.6 if n < 12 else -4.0 if n < 24 else -6.0 for n, letter in enumerate(letters)}


def _latin(own: str, others: str) -> Language:
    costs = dict.fromkeys(others, -11.0) | dict.fromkeys(SYMBOLS, -8.0) | dict.fromkeys(own, -5.5)
    costs = _letters(costs, -2.5) | dict.fromkeys(TYPOGRAPHY, -9.0)
    return Language(costs, -9.5, "latin", lambda _: -15.0)


@cache
def _languages() -> dict[str, list[Language]]:
    """The languages of each candidate."""
    simplified = _chinese(COMMON_HAN[:100], COMMON_HAN[100:], "gb2312", (0xB0, 0xD8))
    shared = "".join(character for character in COMMON_HAN if character.encode("big5", "ignore"))
    traditional = _chinese(shared[:80] + TRADITIONAL_HAN[:60], shared[80:] + TRADITIONAL_HAN[60:], "big5", (0xA4, 0xC7))
    korean = Language(_spread(COMMON_HANGUL, 0.75) | _spread(".,", 0.01), -7.6, "han", _other_hangul)
    japanese = Language(_spread(HIRAGANA, 0.45) | _spread("、。「」ー・（）　", 0.08), -8.2, "kana", _other_japanese)
    percents = map(float, RUSSIAN_PERCENT.split())
    russian_letters = {letter: math.log(p / 115) for letter, p in zip(RUSSIAN, percents, strict=True)}
    punctuation = dict.fromkeys("«»–—“”„…№’", -6.0)
    russian = Language(_letters(russian_letters, -3.0) | punctuation, -4.2, "letters", lambda _: -12.0)
    greek, hebrew, arabic = (
        Language(_letters(_by_rank(letters), -3.0) | punctuation, -4.2, "letters", lambda _: -12.0)
        for letters in (GREEK, HEBREW, ARABIC)
    )
    families = [
        [_latin(own, "".join(family.values())) for own in family.values()] for family in (WESTERN, CENTRAL, TURKISH)
    ]
    western, central, turkish = families
    return {
        "gb18030": [simplified, traditional],
        "cp950": [traditional],
        "big5hkscs": [traditional],
        "cp932": [japanese],
        "euc_jp": [japanese],
        "cp949": [korean],
        "cp1252": western,
        "iso8859_15": western,
        "cp1251": [russian],
        "koi8_r": [russian],
        "iso8859_5": [russian],
        "cp866": [russian],
        "mac_cyrillic": [russian],
        "cp1253": [greek],
        "cp1255": [hebrew],
        "cp1256": [arabic],
        "cp1250": central,
        "iso8859_2": central,
        "cp1254": turkish,
        "mac_roman": western,
        "cp850": western,
        "utf_16_le": [simplified, traditional, korean, japanese, russian, western[0]],
        "utf_16_be": [simplified, traditional, korean, japanese, russian, western[0]],
    }


# Encodings that hardly any file has today.
PRIORS = {
    "cp1250": -4.0,
    "iso8859_2": -4.0,
    "cp1254": -4.0,
    "cp1253": -3.0,
    "cp1255": -3.0,
    "cp1256": -3.0,
    "mac_roman": -6.0,
    "mac_cyrillic": -6.0,
    "cp850": -8.0,
    "cp866": -4.0,
    "iso8859_5": -4.0,
    "iso8859_15": -2.0,
}


@dataclass(frozen=True)
class Reading:
    """What a candidate makes of a sample.

    Attributes:
        total: logarithm of the probability of the text.
        likely: whether its characters look like the language.
    """

    encoding: str
    text: str
    language: Language
    total: float
    likely: bool

    @property
    def unreadable(self) -> bool:
        """Whether it has characters that no text has."""
        return any(self.language.cost(character) == NEVER for character in set(self.text))

    @property
    def line(self) -> str:
        """The first line with characters outside ASCII, around the first of them."""
        line = next((line for line in self.text.splitlines() if not line.isascii()), "")
        first = next((at for at, character in enumerate(line) if character >= "\x80"), 0)
        return line[max(0, first - SHOWN_CHARACTERS // 3) :][:SHOWN_CHARACTERS].strip()


def _read(sample: bytes, encoding: str, languages: list[Language]) -> Reading | None:
    try:
        # The sample may end within a character.
        text = codecs.getincrementaldecoder(encoding)("strict").decode(sample, False)
    except UnicodeDecodeError:
        return None
    counts = Counter(text)
    outside = sum(count for character, count in counts.items() if character >= "\x80")
    if not outside:
        return None
    best: Reading | None = None
    contexts = {script: _context(text, script) for script in {language.script for language in languages}}
    for language in languages:
        context = contexts[language.script]
        costs = {character: language.cost(character) for character in counts}
        total = sum(costs[character] * count for character, count in counts.items())
        mean = sum(costs[c] * n for c, n in counts.items() if c >= "\x80") + context
        likely = mean / outside >= language.limit and not any(cost == NEVER for cost in costs.values())
        if language.script == "kana":
            kana = sum(count for character, count in counts.items() if "\u3041" <= character <= "\u30fc")
            likely = likely and kana * 10 >= outside
        if language.script == "letters":
            # Any few bytes are letters of some alphabet.
            likely = likely and sum(character >= "\x80" for character in counts) >= 4
        total += context + PRIORS.get(encoding, 0.0)
        if best is None or (likely, total) > (best.likely, best.total):
            best = Reading(encoding, text, language, total, likely)
    return best


def _context(text: str, script: str) -> float:
    """What characters cost that do not fit their neighbours, and what typography gains that does."""
    if script in ("han", "kana"):
        # One Han character that follows a letter of ASCII, or is between two: "It抯 one".
        return -6.0 * len(re.findall(r"(?<=[A-Za-z])[\u2e80-\ud7ff](?![\u2e80-\ud7ff\uff00-\uffef])", text))
    gain = 0.0
    # A capital within a word, and another alphabet within one.
    for before, after in re.findall(r"([^\W\d_])(?=([^\W\d_]))", text):
        if before < "\x80" and after < "\x80":
            continue
        if before.islower() and after.isupper():
            gain -= 6.0
        if script == "letters" and (before < "\x80") != (after < "\x80"):
            gain -= 8.0
    if script == "latin":
        gain -= 4.0 * sum(len(run) - 2 for run in re.findall(r"[^\W\d_\x00-\x7f]{3,}", text))
        # A symbol between letters is half of another character; quotes and dashes have their places.
        gain -= 6.0 * len(re.findall(rf"(?<=[^\W\d_])[{SYMBOLS}„“”‚…](?=[^\W\d_])", text))
        gain += 6.0 * len(re.findall(r"(?<=[^\W\d_])’(?=[^\W\d_])", text))
        gain += 5.0 * len(
            re.findall(r"(?<![^\W_])[“‘„«](?=\w)|(?<=[\w.,;:!?])[”’»](?!\w)|(?<=[\s\w])[–—](?=[\s\w])", text)
        )
        gain += 4.0 * len(re.findall(r"(?<=[\d ])(?:°(?=[CF])|[µ±×](?=[\w ]))|•(?=\s)|…(?!\w)", text))
    return gain


@dataclass(frozen=True)
class Found:
    """The encoding of a text.

    Attributes:
        notice: what to tell the user; empty for UTF-8.
        language: to check the rest of a long text with; None where nothing was guessed.
    """

    encoding: str
    notice: str = ""
    language: Language | None = None

    def odd_text(self, text: str) -> bool:
        """Whether a block of the decoded text does not look like the language of the sample."""
        if self.language is None:
            return False
        counts = {character: count for character, count in Counter(text).items() if character >= "\x80"}
        outside = sum(counts.values())
        if any(unicodedata.category(character) in ("Cc", "Co", "Cn") for character in counts):
            return True
        mean = sum(self.language.cost(character) * count for character, count in counts.items())
        # The more characters, the nearer to the mean of the language.
        return outside >= 30 and mean / outside < self.language.limit - (2 if outside < 200 else 0.5)


# Bytes of valid UTF-8 that text has only in UTF-16, or in encodings that switch alphabets (ISO-2022).
OTHER_THAN_UTF8 = re.compile(rb"\0|\x1b\$[@AB)]|\x1b\([BJ]")
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def lookup_encoding(name: str) -> str:
    """The name of an encoding as Python knows it.

    Raises:
        UserError: it knows none of this name, or not one of text.
    """
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError) as error:
        raise UserError(
            f"--encoding {name} is not an encoding. Use utf-8, gb18030, big5, shift_jis, euc_kr, cp1252, utf-16, …"
        ) from error


def find_encoding(sample: bytes, where: str, flag: str | None = "--encoding") -> Found:
    """The encoding of text that is not UTF-8, or has zero bytes.

    Args:
        sample: the beginning of the text; of a long one, lines that are not ASCII.
        where: the file, or file and line, as messages name it.
        flag: with which the program takes the name of an encoding; None if it does not.

    Raises:
        UserError: no encoding is likely, or several are.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if sample.startswith(mark):
            return Found(encoding, _notice(encoding, _line_of(sample.decode(encoding, "ignore"))))
    if b"\0" in sample:
        return _find_wide(sample, where, flag)
    if b"\x1b" in sample and sample.isascii():
        encoding = "iso2022_kr" if b"\x1b$)C" in sample else "iso2022_jp"
        return Found(encoding, _notice(encoding, _line_of(sample.decode(encoding, "replace"))))
    readings = [
        reading
        for encoding, languages in _languages().items()
        if not (encoding.startswith("utf_16") and len(sample) % 2)
        if (reading := _read(sample, encoding, languages))
    ]
    by_text: dict[str, Reading] = {}
    for reading in readings:
        other = by_text.get(reading.text)
        if other is None or (reading.likely and not other.likely):
            by_text[reading.text] = reading
    ranked = sorted(by_text.values(), key=lambda reading: -reading.total)
    best = next((reading for reading in ranked if reading.likely), None)
    if best and all(
        best.total - other.total >= (MARGIN if other.likely else 0) for other in ranked if other is not best
    ):
        return Found(best.encoding, _notice(best.encoding, best.line), best.language)
    raise UserError(_refusal(sample, where, ranked, flag))


def _find_wide(sample: bytes, where: str, flag: str | None) -> Found:
    """UTF-16 or UTF-32 without a mark, by where the zero bytes are."""
    sample = sample[: len(sample) // 4 * 4] if len(sample) > 4 else sample
    for encoding in ("utf_32_le", "utf_32_be", "utf_16_le", "utf_16_be"):
        try:
            text = codecs.getincrementaldecoder(encoding)("strict").decode(sample, False)
        except UnicodeDecodeError:
            continue
        counts = Counter(text)
        odd = sum(
            n for c, n in counts.items() if unicodedata.category(c) in ("Cc", "Co", "Cn", "Cs") and c not in "\t\r\n\f"
        )
        written = sum(n for c, n in counts.items() if c in HAN_PUNCTUATION + COMMON_HAN or _alphabetic(c))
        if text and not odd and written * 2 >= len(text):
            return Found(encoding, _notice(encoding, _line_of(text)))
    name = f", or name the encoding: {flag} utf-16-le" if flag else ""
    raise UserError(
        f"{where}: it contains zero bytes, so it is not text, or in an unknown encoding. Save it as UTF-8{name}."
    )


def _alphabetic(character: str) -> bool:
    return character < "\u0530" or "\u3041" <= character <= "\u30fc" or "\uac00" <= character <= "\ud7a3"


def _line_of(text: str) -> str:
    lines = [line.strip("\ufeff \r") for line in text.split("\n") if line.strip("\ufeff \r")]
    return next((line for line in lines if not line.isascii()), lines[0] if lines else "")[:SHOWN_CHARACTERS]


def _notice(encoding: str, line: str) -> str:
    return f"is not UTF-8; it was read as {encoding}: {line}"


def _refusal(sample: bytes, where: str, ranked: list[Reading], flag: str | None) -> str:
    from charset_normalizer import from_bytes

    # Chinese first, where it is possible at all.
    ranked = sorted(ranked, key=lambda reading: reading.encoding != "gb18030" or reading.unreadable)
    shown = {reading.encoding: reading.line for reading in ranked[:2]}
    guess = from_bytes(sample[:4096]).best() if len(shown) < 2 else None
    if guess is not None and guess.encoding not in shown:
        shown[guess.encoding] = _line_of(str(guess))
    lines = "".join(f"\n  as {encoding}: {line}" for encoding, line in shown.items())
    names = " or ".join(f"{flag} {encoding}" for encoding in shown) or f"{flag} NAME"
    return (
        f"{where}: neither UTF-8 nor certainly in another encoding{':' if lines else '.'}{lines}\n"
        f"Save the file as UTF-8{f', or name its encoding: {names}' if flag else ''}."
    )


def decode_text(
    data: bytes, where: str, encoding: str | None = None, flag: str | None = "--encoding"
) -> tuple[str, str]:
    """The text of a short file, and a notice if it is not UTF-8.

    Args:
        encoding: of bytes that are not UTF-8; None finds it.
        flag: as in `find_encoding`.

    Raises:
        UserError: it is not in this encoding, or none is likely.
    """
    if not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = data.decode("utf-8-sig")
            if not OTHER_THAN_UTF8.search(data):
                return text, ""
        except UnicodeDecodeError:
            pass
    found = Found(lookup_encoding(encoding)) if encoding else find_encoding(sample_of(data), where, flag)
    try:
        return data.decode(found.encoding), found.notice
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}:{line}: not {found.encoding} text. Save the file as UTF-8.") from error


def sample_of(data: bytes) -> bytes:
    """The part of a text by which its encoding is found: of a long one, its lines that are not ASCII."""
    head = data[:SAMPLE_BYTES]
    if (
        len(data) <= SAMPLE_BYTES
        or OTHER_THAN_UTF8.search(head)
        or any(head.startswith(m) for m, _ in BYTE_ORDER_MARKS)
    ):
        return head
    return sample_lines(data.split(b"\n"))


def sample_lines(lines: Iterable[bytes]) -> bytes:
    """The first lines that are not ASCII, as many as a sample takes."""
    chosen, size = [], 0
    for line in lines:
        if not line.isascii():
            chosen.append(line.rstrip(b"\r\n"))
            size += len(line)
            if size >= SAMPLE_BYTES:
                break
    return b"\n".join(chosen)[:SAMPLE_BYTES]
