"""Guides of hospitals that do not exist, and questions about them: what a tiny model can learn citing from.

    python -m benchmarks.hospital_guides --output_dir outputs/citing

Each guide says for some departments when they are open, where they are, how to call them and how long the wait is. All
values are random, so an answer has to be read in a passage. No hospital of `unseen` is in `train`.

    train/documents/en.txt, zh.txt    one sentence per paragraph, for `chatpdf.py --files`
    train/questions.jsonl             questions, some of which no document answers, for `chatpdf.py --questions`
    unseen/...                        the same for other hospitals, to measure on
    train/pretrain/quotations.jsonl   texts in which a passage is quoted with its mark: copying takes more practice
                                      than fine-tuning on the prompts of chatpdf.py, most of which are instructions
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from medicalgpt.errors import UserError, run_main
from medicalgpt.formats.citations import UNKNOWN, draw_tag, frame, mark
from medicalgpt.rag.tasks import Question

HOSPITALS = {
    "en": ("Maple Willow Stone River Oak Clear North Silver Green Elm Fair Bright", "{} {}"),
    "zh": ("青白清云松竹枫兰东南", "{}{}医院"),
}
ENDINGS = {"en": "Ford Brook Field Wood Dale Port Well Bridge Hill Lake", "zh": "山河溪湖泉岭桥城林原"}
DEPARTMENTS = {
    "en": "eye skin heart lung bone dental children sleep allergy diabetes".split(),
    "zh": "眼科 皮肤科 心内科 呼吸科 骨科 口腔科 儿科 睡眠科 过敏科 糖尿病科".split(),
}
# For each fact: how a guide says it, and how people ask for it.
FACTS = {
    "en": {
        "hours": (
            "At {h}, the {d} clinic sees patients from {open} to {close} on weekdays.",
            ("When is the {d} clinic of {h} open?", "What are the hours of the {d} clinic at {h}?"),
        ),
        "room": (
            "At {h}, you find the {d} clinic in building {small}, room {room}.",
            ("Where is the {d} clinic of {h}?", "Which building and room has the {d} clinic at {h}?"),
        ),
        "phone": (
            "At {h}, the {d} clinic answers the telephone under extension {phone}.",
            ("How do I call the {d} clinic of {h}?", "Which extension has the {d} clinic at {h}?"),
        ),
        "wait": (
            "At {h}, the wait for an appointment in the {d} clinic is {days} days.",
            ("How long is the wait for the {d} clinic of {h}?", "How many days until the {d} clinic at {h} has time?"),
        ),
    },
    "zh": {
        "hours": ("{h}{d}的门诊时间是{open}至{close}。", ("{h}{d}几点开门？", "{h}的{d}门诊时间是什么时候？")),
        "room": ("{h}{d}的诊室在{small}号楼{room}室。", ("{h}{d}在哪里？", "{h}的{d}在几号楼哪个房间？")),
        "phone": ("{h}{d}的电话咨询请拨分机{phone}。", ("怎么打电话给{h}{d}？", "{h}的{d}分机号是多少？")),
        "wait": ("{h}{d}预约以后大约要等{days}天。", ("{h}{d}要等多少天？", "预约{h}的{d}多久能看上？")),
    },
}
# Of ten facts, so many are in no guide.
MISSING = 2


def main() -> None:
    """Draw the guides and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--languages", nargs="+", choices=list(FACTS), default=list(FACTS), help="default: both")
    parser.add_argument("--train_hospitals", type=int, default=92, help="of each language, for `train`; default: 92")
    parser.add_argument("--unseen_hospitals", type=int, default=8, help="of each language, for `unseen`; default: 8")
    parser.add_argument("--quotations", type=int, default=16_000, help="rows of `pretrain`; default: 16000")
    parser.add_argument(
        "--quoted_passages", type=int, choices=(1, 2, 3), default=3, help="in a row at most; default: 3"
    )
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists. Choose another name.")
    chooser = random.Random(args.seed)
    kept: dict[str, list[str]] = {}
    parts: dict[str, list[tuple[list[str], list[Question]]]] = {"train": [], "unseen": []}
    for language in args.languages:
        names = list(hospital_names(language))
        wanted = args.train_hospitals + args.unseen_hospitals
        if min(args.train_hospitals, args.unseen_hospitals) < 1 or wanted > len(names):
            raise UserError(
                f"--train_hospitals {args.train_hospitals} and --unseen_hospitals {args.unseen_hospitals} must be 1 or "
                f"more, and {len(names)} together at most."
            )
        chooser.shuffle(names)
        kept[language] = names[args.unseen_hospitals : wanted]
        split = {"unseen": names[: args.unseen_hospitals], "train": kept[language]}
        for part, hospitals in split.items():
            sentences, questions = draw_guides(language, hospitals, chooser)
            parts[part].append((sentences, questions))
            write(args.output_dir / part / "documents" / f"{language}.txt", "\n\n".join(sentences))
    for part, found in parts.items():
        questions = [question for _, each in found for question in each]
        rows = [json.dumps(asdict(question), ensure_ascii=False) for question in questions]
        write(args.output_dir / part / "questions.jsonl", "\n".join(rows))
        without = sum(question.file is None for question in questions)
        print(f"{args.output_dir / part}: {len(questions)} questions, {without} of them without an answer")
    quotations = [
        draw_quotation(chooser.choice(args.languages), kept, args.quoted_passages, chooser)
        for _ in range(args.quotations)
    ]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in quotations]
    write(args.output_dir / "train" / "pretrain" / "quotations.jsonl", "\n".join(rows))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def hospital_names(language: str) -> Iterator[str]:
    """All combinations of a first and a last part."""
    first, form = HOSPITALS[language]
    firsts, lasts = (text.split() if language == "en" else list(text) for text in (first, ENDINGS[language]))
    return (form.format(a, b) for a in firsts for b in lasts)


def draw_guides(language: str, hospitals: list[str], chooser: random.Random) -> tuple[list[str], list[Question]]:
    """The sentences of all guides, and a question about each fact, also about those that no sentence states."""
    sentences, questions = [], []
    for hospital in hospitals:
        for department in chooser.sample(DEPARTMENTS[language], 5):
            for sentence, wordings in FACTS[language].values():
                values = draw_values(chooser) | {"h": hospital, "d": department}
                evidence = sentence.format(**values)
                is_missing = chooser.randrange(10) < MISSING
                found = (None,) if is_missing else (f"{language}.txt", None, evidence)
                questions += [Question(wording.format(**values), language, *found) for wording in wordings]
                if not is_missing:
                    sentences.append(evidence)
    chooser.shuffle(sentences)
    return sentences, questions


def draw_quotation(language: str, hospitals: dict[str, list[str]], most: int, chooser: random.Random) -> str:
    """One to `most` passages, a question, and the passage that answers it with its mark, or the refusal.

    The other passages differ from the right one in one respect: the hospital, the department or the fact.
    """
    facts = FACTS[language]
    right = [chooser.choice(hospitals[language]), chooser.choice(DEPARTMENTS[language]), chooser.choice(list(facts))]
    options = (hospitals[language], DEPARTMENTS[language], list(facts))
    about = [right]
    while len(about) < 4:
        other, part = list(right), chooser.randrange(3)
        other[part] = chooser.choice(options[part])
        if other not in about:
            about.append(other)
    answered = chooser.randrange(10) >= MISSING
    shown = about[:1] * answered + about[1 : min(most, chooser.choice((1, 1, 2, 3))) + (not answered)]
    chooser.shuffle(shown)
    passages = [facts[fact][0].format(**draw_values(chooser), h=h, d=d) for h, d, fact in shown]
    tag = draw_tag(passages, chooser)
    framed = "\n\n".join(frame(tag, n, f"{language}.txt", text) for n, text in enumerate(passages, start=1))
    hospital, department, fact = right
    question = chooser.choice(facts[fact][1]).format(h=hospital, d=department)
    space = "" if language == "zh" else " "
    at = shown.index(right) if answered else None
    reply = UNKNOWN[language] if at is None else f"{passages[at]}{space}{mark(tag, at + 1)}"
    return f"{framed}\n\n{question}\n{reply}"


def draw_values(chooser: random.Random) -> dict[str, str]:
    opened, closed = chooser.randrange(7 * 12, 12 * 12), chooser.randrange(13 * 12, 19 * 12)
    return {
        "open": f"{opened // 12}:{opened % 12 * 5:02}",
        "close": f"{closed // 12}:{closed % 12 * 5:02}",
        "small": str(chooser.randrange(1, 10)),
        "room": str(chooser.randrange(100, 700)),
        "phone": str(chooser.randrange(2000, 9000)),
        "days": str(chooser.randrange(2, 60)),
    }


if __name__ == "__main__":
    run_main(main)
