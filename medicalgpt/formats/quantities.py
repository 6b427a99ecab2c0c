"""Numbers with units in a text, Chinese or English: "2.5 mL" and "2.5毫升" are the same quantity."""

import re
from typing import NamedTuple

# Base unit, then the size of each unit in it with its names. Units of different bases cannot be converted.
UNIT_NAMES = {
    "g": {1e-9: "ng 纳克", 1e-6: "ug μg mcg 微克", 1e-3: "mg 毫克", 1: "g gram 克", 500: "斤", 1e3: "kg 公斤 千克"},
    "L": {1e-3: "ml cc milliliter millilitre 毫升", 0.1: "dl 分升", 1: "l liter litre 升"},
    "m": {1e-6: "um μm 微米", 1e-3: "mm 毫米", 0.01: "cm 厘米", 1: "m meter metre 米"},
    "m2": {1: "m2 平方米"},
    "mol": {1e-9: "nmol 纳摩尔", 1e-6: "umol μmol 微摩尔", 1e-3: "mmol 毫摩尔", 1: "mol 摩尔"},
    "s": {1: "s sec second 秒", 60: "min minute 分 分钟", 3600: "h hr hour 小时", 86400: "d day days 天 日"},
    "week": {1: "week 周 星期"},
    "month": {1: "month 月 个月"},
    "year": {1: "year 年 岁"},
    "drop": {1: "drop gtt gtts 滴"},
    "tablet": {1: "tablet 片"},
    "capsule": {1: "capsule 粒"},
    "time": {1: "time beat breath 次"},
    "IU": {1: "iu u unit 单位 国际单位"},
    "mmHg": {1: "mmhg 毫米汞柱"},
    "°C": {1: "°c 摄氏度 度"},
    "cal": {1: "cal 卡", 1e3: "kcal 千卡 大卡"},
    "J": {1: "j 焦", 1e3: "kj 千焦"},
    "": {0.01: "% percent"},
}
UNITS = {
    name: (base, size)
    for base, sizes in UNIT_NAMES.items()
    for size, names in sizes.items()
    for singular in names.split()
    for name in ([singular, f"{singular}s"] if len(singular) > 3 and singular.isascii() else [singular])
}
UNIT = f"(?:{'|'.join(sorted(map(re.escape, UNITS), key=len, reverse=True))})"
PER = r"\s*(?:/|每|\bper\b)\s*"
QUANTITY = re.compile(
    rf"(?:每\s*(?P<each>{UNIT})\s*)?"
    r"(?<![\d.a-z])(?P<number>(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++|(?=\.\d))(?:\.\d++)?(?:e[-+]?\d{1,3}+)?)"
    rf"\s*(?P<unit>{UNIT}(?:{PER}{UNIT})*)?(?![a-z]|\.\d)"
)


class Quantity(NamedTuple):
    """A number with its unit: `size` is the unit in terms of `base`; `exact` means that it has no decimals."""

    number: float
    base: str
    size: float
    exact: bool
    has_unit: bool


def parse_unit(text: str | None, each: str | None = None) -> tuple[str, float]:
    """Base and size of a unit such as "mg/kg/d"; ("", 1.0) for no unit.

    Args:
        text: units separated by "/", "每" or "per".
        each: the denominator where it comes first, as in "每kg 5 mg".
    """
    parts = [*re.split(PER, text or ""), *([each] if each else [])]
    bases, size = [], 1.0
    for place, part in enumerate(parts):
        base, of_part = UNITS.get(part, ("", 1.0))
        size = size * of_part if place == 0 else size / of_part
        bases.append(base)
    return "/".join(bases), size
