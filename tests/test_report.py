"""build_report.py: the table on the terminal, the verdicts, and the page."""

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import build_report
from build_report import command_line, display_width, terminal_summary, text_table
from medicalgpt.errors import UserError
from medicalgpt.evaluation import report_texts
from medicalgpt.evaluation.significance import SAME, compare_perplexity, compare_scores, compare_shares, wilson_interval

import pytest
from selenium import webdriver

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
QUESTION = "发生<b>胸痛</b>怎么办？"
ATTACK = "<script>alert('x')</script><img src=https://example.com/x.png>"


def text_result(document_nll, document_tokens=(50, 30, 20)):
    total = sum(document_tokens)
    return {
        "perplexity": math.exp(sum(document_nll) / total),
        "nll": sum(document_nll),
        "tokens": total,
        "documents": len(document_tokens),
        "document_nll": list(document_nll),
        "document_tokens": list(document_tokens),
    }


def chat_result(correct, total, stopped, categories):
    by_category = {name: {"correct": c, "total": t, "stopped": c} for name, (c, t) in categories.items()}
    return {"correct": correct, "total": total, "stopped": stopped, "by_category": by_category}


def answer(text, correct=False, finish_reason="stop"):
    return {"text": text, "correct": correct, "finish_reason": finish_reason}


def make_evaluation():
    before_categories = {"identity": (0, 20), "症状": (0, 180)}
    shared = {"parameters": 4_000_512, "notes": []}
    return {
        "format": 1,
        "command": ["python", "eval_pipeline.py", "--models", "base=outputs/base"],
        "chat": {"file": "data/finetune/validation.jsonl", "rows": 860, "used": 860, "left_out": {}},
        "examples": [
            {
                "place": "data/finetune/validation.jsonl:7",
                "category": "症状",
                "messages": [{"role": "user", "content": QUESTION}],
                "reference": "立即拨打120。",
            }
        ],
        "models": [
            {
                "name": "base",
                "path": "outputs/base",
                "text": text_result([300.0, 200.0, 110.0]),
                "chat": chat_result(0, 200, 0, before_categories),
                "answers": [answer(ATTACK, finish_reason="length")],
                **shared,
            },
            {
                "name": "pt",
                "path": "outputs/pt-merged",
                "text": text_result([150.0, 91.0, 62.0]),
                "chat": chat_result(0, 200, 3, before_categories),
                "answers": [answer("")],
                **shared,
            },
            {
                "name": "sft",
                "path": "outputs/sft-merged",
                "text": text_result([150.4, 90.5, 62.2]),
                "chat": chat_result(803, 860, 858, {"identity": (20, 20), "症状": (783, 840)}),
                "answers": [answer("立即拨打120。", correct=True)],
                **shared,
            },
        ],
        "versions": {"torch": "2.13.0"},
    }


def with_everyday(evaluation):
    """The same models after they were asked questions as people type them."""
    for model, right, declined, needless in zip(evaluation["models"], (0, 0, 90), (0, 0, 36), (0, 0, 3), strict=True):
        model["everyday"] = chat_result(right, 100, 100, {"everyday": (right, 100)})
        model["needless"] = chat_result(needless, 100, 100, {"everyday": (needless, 100)})
        model["declined"] = chat_result(declined, 40, 40, {"untaught": (declined, 40)})
        model["everyday_answers"] = [answer("休息，多喝水。", correct=right > 0)]
    return {
        **evaluation,
        "everyday": {"file": "data/everyday/questions.jsonl", "taught": 100, "untaught": 40},
        "everyday_examples": [
            {
                "place": "data/everyday/questions.jsonl:7",
                "category": "everyday",
                "messages": [{"role": "user", "content": "感冒了咋办"}],
                "reference": "休息，多喝水。",
            }
        ],
    }


def pair_counts(**categories):
    """Counts of (correct, total, margin) by category."""
    by_category = {name: {"correct": c, "total": t, "margin": m} for name, (c, t, m) in categories.items()}
    correct, total = (sum(counts[key] for counts in by_category.values()) for key in ("correct", "total"))
    return {"correct": correct, "total": total, "margin": 0.5, "too_long": 0, "by_category": by_category}


def with_preferences(evaluation):
    """The same models after a stage on preferences was measured, and a reward model."""
    base, _, sft = evaluation["models"]
    dpo = {**sft, "name": "dpo", "path": "outputs/dpo-merged"}
    base["preference"], base["good"], base["good_answers"] = None, None, None
    sft["preference"] = pair_counts(rude=(60, 100, 0.1), wrong=(40, 100, -0.1))
    dpo["preference"] = pair_counts(rude=(98, 100, 2.0), wrong=(80, 100, 1.0))
    sft["good"], dpo["good"] = chat_result(2, 150, 150, {}), chat_result(140, 150, 149, {})
    sft["good_answers"], dpo["good_answers"] = [answer("挂神经内科。")], [answer("挂神经内科，打120。", correct=True)]
    return {
        **evaluation,
        "preference": {"file": "data/reward/validation.jsonl", "pairs": 200, "prompts": 150},
        "prompt_examples": [
            {
                "place": "data/reward/validation.jsonl:3",
                "category": "zh",
                "messages": [{"role": "user", "content": "突然说不清话怎么办？"}],
                "reference": "挂神经内科，打120。",
                "required": [["神经内科"], ["120", "急诊"]],
            }
        ],
        "models": [*evaluation["models"], dpo],
        "reward": {"path": "outputs/rm", **pair_counts(rude=(100, 100, 4.0), wrong=(92, 100, 1.25))},
    }


def scored(*scores, not_scored=None):
    known = [score for score in scores if score is not None]
    mean = math.fsum(known) / len(known) if known else None
    return {"mean": mean, "total": len(known), "not_scored": not_scored or {}, "scores": list(scores)}


def with_reinforcement(evaluation):
    """The same models after PPO and GRPO were measured: answers scored, tasks replied to."""
    base, sft, ppo = (evaluation["models"][index] for index in (0, 2, 2))
    ppo = {**ppo, "name": "ppo", "path": "outputs/ppo-merged"}
    for model, right, formed in ((base, 0, 0), (sft, 20, 30), (ppo, 150, 200)):
        half = right // 2
        model["task"] = chat_result(right, 200, 200, {"choice": (half, 100), "number": (right - half, 100)})
        model["task_format"] = chat_result(formed, 200, 200, {"choice": (formed, 200)})
        model["task_answers"] = [answer(f"<think>{right}</think><answer>B</answer>", correct=right > 100)]
    scores = {
        "base": scored(None, -4.0, None, -5.0, not_scored={"too long for the reward model": 1}),
        "sft": scored(1.0, -1.0, 0.5, 0.0),
        "ppo": scored(3.0, 1.2, 2.4, 2.1),
    }
    return {
        **evaluation,
        "preference": {"file": "data/reward/validation.jsonl", "pairs": 100, "prompts": 4},
        "task": {"file": "data/grpo/validation.jsonl", "tasks": 200, "max_new_tokens": 96},
        "task_examples": [
            {
                "place": "data/grpo/validation.jsonl:5",
                "category": "choice",
                "messages": [{"role": "user", "content": "体重20公斤，每公斤5毫克，共多少？"}],
                "reference": "100 mg",
            }
        ],
        "models": [base, sft, ppo],
        "reward": {"path": "outputs/rm", **pair_counts(rude=(90, 100, 4.0)), "models": scores},
    }


def make_run(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "stage": "supervised_finetuning",
        "status": "finished",
        "command": ["python", "supervised_finetuning.py", "--output_dir", str(folder)],
        "versions": {"trl": "1.16.0"},
        "data": [
            {
                "side": "train",
                "file": "data/finetune/train.jsonl",
                "rows": 3410,
                "used": 3400,
                "left_out": {"longer than 256 tokens": 10},
                "sha256": "ab" * 32,
            }
        ],
        "seconds": 92.4,
        "metrics": {"train_loss": 0.25, "train_runtime": 91.0},
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    events = [{"step": 10, "loss": 5.0}, {"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": 1.2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Run build_report.py on made-up results; returns (page, printed text)."""

    def run(*flags, evaluation=None, **run_changes):
        eval_file, page = tmp_path / "eval.json", tmp_path / "out" / "report.html"
        eval_file.write_text(json.dumps(evaluation or make_evaluation(), ensure_ascii=False), encoding="utf-8")
        runs = ["--runs", f"sft={make_run(tmp_path / 'sft', **run_changes)}"]
        command = ["build_report.py", "--eval_file", str(eval_file), "--output_file", str(page), *runs, *flags]
        monkeypatch.setattr(sys, "argv", command)
        build_report.main()
        return page.read_text(encoding="utf-8"), capsys.readouterr().out

    return run


class Elements(HTMLParser):
    """Every tag with its attributes, and the text outside of style that is shown in a language."""

    def __init__(self, page, language="en"):
        super().__init__()
        self.tags, self.text, self.inside = [], [], []
        self.other = {"en": "zh", "zh": "en"}[language]
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("input", "br", "meta"):
            self.inside.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not any(tag == "style" or name == self.other for tag, name in self.inside):
            self.text.append(data)


def text_of(page, language="en"):
    return " ".join(" ".join(Elements(page, language).text).split())


def test_wilson_interval_against_published_values():
    assert wilson_interval(0, 200) == pytest.approx((0.0, 0.01885), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert wilson_interval(200, 200) == pytest.approx((0.98115, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    "before, after, text",
    [
        ((0, 200), (0, 200), SAME),
        ((50, 100), (58, 100), SAME),
        ((0, 200), (803, 860), "higher"),
        ((90, 100), (20, 100), "lower"),
    ],
)
def test_shares_are_compared_by_their_intervals(before, after, text):
    assert compare_shares(before, after).text == text


def test_shares_of_nothing_are_not_compared():
    assert compare_shares((0, 0), (5, 5)) is None


def test_perplexities_are_compared_document_by_document():
    before = text_result([300.0, 200.0, 110.0])
    assert compare_perplexity(before, before).text == SAME
    assert compare_perplexity(before, text_result([200.0, 133.0, 73.0])).tone == "better"
    assert compare_perplexity(text_result([200.0, 133.0, 73.0]), before).tone == "worse"
    # Lower on average, but one document went the other way as far.
    assert compare_perplexity(before, text_result([280.0, 215.0, 105.0])).text == SAME
    assert compare_perplexity(before, text_result([200.0, 133.0, 73.0], (50, 30, 21))) is None
    assert compare_perplexity(text_result([5.0], (3,)), text_result([4.0], (3,))) is None


def test_columns_line_up_with_chinese_text():
    assert display_width("症状 a") == 6
    lines = text_table(["", "base", "sft"], [["症状", "0/2", "10/20"], ["identity", "0/20", "1/2"]]).splitlines()
    assert lines == [
        "          base    sft",
        "---------------------",
        "症状       0/2  10/20",
        "identity  0/20    1/2",
    ]
    assert display_width(lines[2]) == display_width(lines[3]) == len(lines[1])


def test_terminal_summary_shows_counts_and_verdicts():
    summary = terminal_summary(make_evaluation()["models"])
    lines = summary.splitlines()
    cells = {line.split("  ")[0]: re.split(r" {2,}", line)[1:] for line in lines[2:5] if not line.startswith(" ")}
    assert cells["exact match (held-out phrasings)"] == ["0/200 (0.0%)", "0/200 (0.0%)", "803/860 (93.4%)"]
    assert cells["perplexity on held-out text"][0] == f"{math.exp(6.1):.1f}"
    order = [
        lines.index(next(line for line in lines if line.startswith(start))) for start in ("exact", "  id", "stops")
    ]
    assert order == sorted(order)
    assert "exact match (held-out phrasings), base -> pt: no measurable change" in lines
    assert "exact match (held-out phrasings), pt -> sft: higher" in lines
    assert "perplexity on held-out text, base -> pt: lower" in lines
    assert "perplexity on held-out text, pt -> sft: no measurable change" in lines


def test_summary_of_one_kind_of_measurement():
    models = make_evaluation()["models"]
    for model in models:
        model["text"] = None
    models[0]["chat"] = None
    summary = terminal_summary(models)
    assert "perplexity" not in summary
    assert re.search(r"exact match \(held-out phrasings\) +- +0/200", summary)
    assert "base -> pt" not in summary


def test_page_requests_nothing_and_is_small(report):
    page, printed = report()
    for tag, attributes in Elements(page).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "form", "base")
        assert not {"src", "href", "srcset", "action", "data", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert len(page.encode()) < 100_000 and "report.html" in printed


def test_page_escapes_what_a_model_said(report):
    page, _ = report()
    assert ATTACK not in page and "<script" not in page and "<b>胸痛" not in page
    text = "".join(Elements(page).text)
    assert ATTACK in text and QUESTION in text


def test_page_shows_answers_data_curves_commands_and_versions(report):
    page, _ = report()
    text = text_of(page)
    for expected in (
        "803/860 (93.4%)",
        SAME,
        "立即拨打120。",
        "✓ exact",
        "did not stop",
        "(empty)",
        "train loss: 5.00 → 1.00",
        "20 steps in 1 min 32 s · train_loss 0.2500",
        "3,410 3,400 10 longer than 256 tokens",
        "python supervised_finetuning.py --output_dir",
        "python eval_pipeline.py --models base=outputs/base",
        "python build_report.py --eval_file",
        "torch 2.13.0 · trl 1.16.0",
    ):
        assert expected in text
    assert "do not add up" not in text and "not “finished”" not in text


def test_page_shows_samples_of_the_run(tmp_path, report):
    folder = make_run(tmp_path / "sft")
    rows = [{"prompt": f"问题{i}", "before": "<i>甲</i>", "after": "乙"} for i in range(9)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page, _ = report()
    assert page.count("&lt;i&gt;甲") == build_report.MAX_SHOWN_SAMPLES
    assert "3 more in" in page


def test_page_points_at_rows_that_are_not_accounted_for(report):
    data = [{"file": "a.jsonl", "rows": 10, "used": 7, "left_out": {"too long": 2}, "sha256": "0"}]
    page, _ = report(data=data)
    assert "used and skipped do not add up" in page


def test_page_points_at_a_run_that_did_not_finish(report):
    page, _ = report(status="stopped")
    assert "“stopped”, not “finished”" in page


def test_preferences_are_rows_of_the_table():
    evaluation = with_preferences(make_evaluation())
    lines = terminal_summary(evaluation["models"], evaluation["reward"]).splitlines()
    cells = {line.split("  ")[0]: re.split(r" {2,}", line)[1:] for line in lines}
    assert cells["preference accuracy (held-out pairs)"] == ["-", "-", "100/200 (50.0%)", "178/200 (89.0%)"]
    assert cells["good answers"] == ["-", "-", "2/150 (1.3%)", "140/150 (93.3%)"]
    assert "good answers, sft -> dpo: higher" in lines
    assert "exact match (held-out phrasings), sft -> dpo: no measurable change" in lines
    assert "reward model (outputs/rm), held-out pairs: accuracy 192/200 (96.0%), mean margin 0.5000" in lines


def test_page_shows_preferences(report):
    page, _ = report(evaluation=with_preferences(make_evaluation()))
    text = text_of(page)
    for expected in (
        "突然说不清话怎么办？",
        "required: 神经内科 , and 120 or 急诊 · reference: 挂神经内科，打120。",
        "挂神经内科，打120。",
        "✓ good",
        "98/100 (98.0%)",
        "92/100 (92.0%) margin 1.250",
        "reward model accuracy (held-out pairs) 96.0%",
    ):
        assert expected in text
    assert text.count("✓ good") == 1 and len(page.encode()) < 100_000


def test_everyday_questions_are_rows_of_the_table_and_come_before_preferences(report):
    evaluation = with_everyday(make_evaluation())
    rows = {row.label: row for row in build_report.summary_rows(evaluation["models"])}
    assert rows["correct answers (everyday questions)"].cells[-1] == "90/100 (90.0%)"
    assert rows["declined (was not taught)"].cells[-1] == "36/40 (90.0%)"
    needless = rows["declined needlessly (everyday questions)"]
    assert needless.cells[-1] == "3/100 (3.0%)" and needless.verdicts == [None] * 3
    page, _ = report(evaluation=with_preferences(evaluation))
    assert page.index("Questions as people type them") < page.index("Preference prompts, before and after")
    assert "感冒了咋办" in page and "✓ correct" in text_of(page)


def test_a_garbled_answer_is_not_shown_as_good(report):
    evaluation = with_preferences(make_evaluation())
    said = {**answer("挂神经内科，打120。" * 9, correct=True), "fault": "repeats itself"}
    evaluation["models"][-1]["good_answers"] = [said]
    page, _ = report(evaluation=evaluation)
    assert "✓ good" not in text_of(page) and "dpo repeats itself 挂神经内科" in text_of(page)
    assert "dpo 重复 挂神经内科" in text_of(page, "zh")


def test_page_is_in_both_languages(report):
    evaluation = with_reinforcement(with_everyday(make_evaluation()))
    page, _ = report(evaluation=with_preferences(evaluation) | {"reward": evaluation["reward"]})
    english, chinese = text_of(page), text_of(page, "zh")
    for one, other in (
        ("Each model compared with the one before it", "每个模型与前一个模型比较"),
        ("Ends its answer before the limit of tokens.", "在 token 上限之前自己结束回答。"),
        ("no measurable change", "没有可测量的变化"),
        ("Fine-tuning (SFT): learns from conversations", "有监督微调（SFT）：从对话中学习"),
        ("held-out loss 1.20", "验证数据的损失 1.20"),
        ("made from", "来源"),
    ):
        assert one in english and other in chinese
        assert one not in chinese and other not in english
    # What is left of English is from models and files.
    ours = chinese.partition("数据：每一行都有去向")[0].replace("too long for the reward model", "")
    assert re.findall(r".{30} (?:the|is|of|answers|than) .{30}", ours) == []


@pytest.mark.parametrize("flags, variables, language", [
    ((), {}, "en"),
    ((), {"LANG": "zh_CN.UTF-8"}, "zh"),
    ((), {"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
    (("--lang", "zh"), {"LANG": "C"}, "zh"),
])  # fmt: skip
def test_the_first_language_is_that_of_the_system_or_of_the_flag(report, monkeypatch, flags, variables, language):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    page, printed = report(*flags)
    checked = [attributes["id"] for tag, attributes in Elements(page).tags if "checked" in attributes]
    assert checked == [f"show-{language}"] and f'<html lang="{language}">' in page
    assert ("完全匹配（没见过的问法）, pt -> sft: 升高" in printed) is (language == "zh")
    assert ("exact match (held-out phrasings), pt -> sft: higher" in printed) is (language == "en")


def test_every_text_of_the_template_has_its_twin():
    template = Path(report_texts.__file__).with_name("report.html").read_text(encoding="utf-8")
    found = set(re.findall(r'(?:both|either|cell)\("([^"]+)"', template))
    assert len(found) >= 50 and found <= {*report_texts.CHINESE, "sha256"}
    for one, other in report_texts.CHINESE.items():
        assert set(re.findall(r"{\w+}", one)) == set(re.findall(r"{\w+}", other)), one


def test_page_warns_of_what_went_wrong_in_a_run(tmp_path, monkeypatch):
    folder = make_run(
        tmp_path / "sft",
        status="stopped",
        observed=[{"name": "precision", "requested": "bf16", "observed": "fp32", "agrees": False}],
        changed_on_resume=[{"checkpoint": "c", "changes": {"learning_rate": {}}}],
        data=[{"file": "a.jsonl", "rows": 100, "used": 80, "left_out": {"too long": 20}}],
    )
    losses = [{"step": step, "loss": 1.0, "eval_loss": loss} for step, loss in ((5, 1.5), (10, 1.1), (15, 1.4))]
    write_events(folder, [*losses, {"step": 20, "loss": None}])
    assert [text.format(**values) for text, values in build_report.read_run("sft", folder)["warnings"]] == [
        "the run's status is “stopped”, not “finished”",
        "the loss was not finite at step 20",
        "the held-out loss rose from 1.1 at step 10 to 1.4: trained too long or too fast",
        "precision: requested bf16, observed fp32",
        "resumed with other settings: learning_rate",
        "20 of 100 rows of a.jsonl were skipped",
    ]


def test_page_shows_what_a_checkpoint_was_made_from(tmp_path, report):
    merged = tmp_path / "dpo-merged"
    merged.mkdir()
    record = {"stage": "merge_peft_adapter", "adapter": "outputs/dpo", "base": {"name": "outputs/sft"}}
    (merged / "run.json").write_text(json.dumps(record), encoding="utf-8")
    evaluation = make_evaluation()
    evaluation["models"][-1]["path"] = str(merged)
    page, _ = report(
        evaluation=evaluation, parent="outputs/pt", arguments={"use_peft": True}, finished="2026-01-02T03:04:05+00:00"
    )
    text = text_of(page)
    assert "outputs/pt supervised finetuning · adapter 2026-01-02 03:04" in text
    assert f"{merged} outputs/sft + outputs/dpo merge -" in text


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


# Elements, apart from drawings, that reach over the edge of the screen or hold more than they show.
TOO_WIDE = """
return [...document.querySelectorAll('main *')].filter(each => !each.closest('svg') && (
  each.getBoundingClientRect().right > innerWidth + 0.5 || each.scrollWidth > each.clientWidth + 1
  && getComputedStyle(each).display != 'inline' && each.clientWidth > 0
)).map(each => each.tagName + '.' + each.className + ': ' + each.textContent.trim().slice(0, 60))
"""

# Words in tables and cards, apart from paths, that are written on two lines.
BROKEN_WORDS = """
const broken = [], range = document.createRange()
for (const box of document.querySelectorAll('td, th, .cards, figcaption')) {
  const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT)
  for (let node; node = walker.nextNode();) for (const word of node.data.matchAll(/[A-Za-z0-9.,%]+/g)) {
    if (node.parentElement.closest('code')) continue
    range.setStart(node, word.index)
    range.setEnd(node, word.index + word[0].length)
    if (range.getClientRects().length > 1) broken.push(word[0])
  }
}
return broken
"""


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver (Debian: chromium-driver)")
def test_nothing_is_wider_than_a_phone(report, tmp_path, browser):
    evaluation = with_preferences(with_everyday(make_evaluation()))
    report(evaluation=evaluation)
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get((tmp_path / "out" / "report.html").as_uri())
    for language, heading, other in (("zh", "警告", "Warnings"), ("en", "measurable", "没有可测量的变化")):
        # The switch is a label, as a finger would press it.
        browser.execute_script(f"document.querySelector('label[for=show-{language}]').click()")
        shown = browser.execute_script("return document.body.innerText")
        assert other not in shown and (heading in shown or language == "zh")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert browser.execute_script(TOO_WIDE) == browser.execute_script(BROKEN_WORDS) == []


def test_page_without_preferences_has_no_such_sections(report):
    page, _ = report()
    assert "Preferences" not in page and "reward model" not in page and "required:" not in page


@pytest.mark.parametrize("keys", [("accuracy", "margin"), ("rewards/accuracies", "rewards/margins")])
def test_page_draws_curves_of_preference_stages(tmp_path, monkeypatch, keys):
    folder = make_run(tmp_path / "dpo")
    events = [{"step": step, "loss": 0.6, keys[0]: 0.5 + step / 100, keys[1]: step / 10} for step in (10, 20, 30)]
    events += [{"step": 20, keys[0]: 0.75}, {"step": 30, f"eval_{keys[0]}": 0.9, f"eval_{keys[1]}": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    accuracy, margin = build_report.read_run("dpo", folder)["curves"]
    assert "dpo: accuracy" in accuracy["svg"] and "train accuracy: 0.600 → 0.800" in accuracy["svg"]
    assert "held-out accuracy: 0.900" in accuracy["svg"]
    assert "train margin: 1.00 → 3.00" in margin["svg"] and "held-out margin: 2.00" in margin["svg"]
    assert build_report.read_run("sft", make_run(tmp_path / "sft"))["curves"] == []


def test_scores_are_compared_prompt_by_prompt():
    # The mean differs by less than the scores do among each other, and each prompt went up.
    before = [-8.0, -2.0, 3.0, 7.0, None]
    assert compare_scores(scored(*before), scored(-7.0, -1.1, 4.0, 7.9, 2.0)).text == "higher"
    assert compare_scores(scored(-7.0, -1.1, 4.0, 7.9, 2.0), scored(*before)).text == "lower"
    assert compare_scores(scored(*before), scored(-7.0, -3.1, 5.0, 6.0, 2.0)).text == SAME
    assert compare_scores(scored(*before), scored(*before)).text == SAME
    # One prompt in common says nothing about noise, whatever else was scored.
    assert compare_scores(scored(1.0, None, 3.0), scored(9.0, 9.0, None)) is None


def test_scored_answers_and_tasks_are_rows_of_the_table():
    evaluation = with_reinforcement(make_evaluation())
    lines = terminal_summary(evaluation["models"], evaluation["reward"]).splitlines()
    cells = {line.split("  ")[0]: re.split(r" {2,}", line)[1:] for line in lines if not line.startswith(" ")}
    assert cells["reward model score (greedy answers)"] == ["-4.500", "0.1250", "2.175"]
    assert cells["correct answers (held-out tasks)"] == ["0/200 (0.0%)", "20/200 (10.0%)", "150/200 (75.0%)"]
    assert cells["correct format (held-out tasks)"] == ["0/200 (0.0%)", "30/200 (15.0%)", "200/200 (100.0%)"]
    at = lines.index(next(line for line in lines if line.startswith("correct answers (held-out tasks) ")))
    assert re.split(r" {2,}", lines[at + 1])[1:] == ["choice", "0/100 (0.0%)", "10/100 (10.0%)", "75/100 (75.0%)"]
    assert lines[at + 2].startswith("  number")
    assert "reward model score (greedy answers), base -> sft: higher" in lines
    assert "reward model score (greedy answers), sft -> ppo: higher" in lines
    assert "correct answers (held-out tasks), sft -> ppo: higher" in lines


def test_page_shows_scored_answers_and_tasks(report):
    page, _ = report(evaluation=with_reinforcement(make_evaluation()))
    text = text_of(page)
    for expected in (
        "-4.500 → 2.175 higher base → ppo",
        "± 0.3750, n = 4",
        "± 0.5000, n = 2",
        "base: 1 of its answers were not scored: too long for the reward model",
        "Tasks: correct answers by type",
        "Tasks: correct format by type",
        "体重20公斤，每公斤5毫克，共多少？",
        "<think>150</think><answer>B</answer>",
    ):
        assert expected in text
    assert text.count("✓ correct") == 1
    plain, _ = report()
    assert "reward model score" not in plain and "Tasks" not in plain


def write_events(folder, events):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")


def ppo_event(step, **changes):
    event = {"loss": 0.3, "score": -1 + step / 20, "score_std": 1.5, "reward": step / 30, "kl": step / 10}
    return {"step": step, **event, "length": 60 - step, "end_rate": 0.5 + step / 100, "entropy": 1.0, **changes}


def grpo_event(step, **changes):
    event = {"loss": 0.01, "reward": step / 20, "reward_std": 0.2, "completions/mean_length": 30.0 + step}
    rewards = {"rewards/accuracy/mean": step / 40, "rewards/format/mean": 0.5, "rewards/accuracy/std": 0.1}
    return {"step": step, **event, **rewards, "frac_reward_zero_std": 0.4, **changes}


def titled(curves):
    return {re.search('aria-label="([^"]+)"', curve["svg"])[1]: curve["svg"] for curve in curves}


def test_page_draws_curves_of_ppo(tmp_path):
    folder = make_run(tmp_path / "ppo", stage="ppo_training")
    write_events(folder, [*map(ppo_event, (10, 20, 30)), {"step": 30, "eval_score": 2.5, "eval_end_rate": 0.9}])
    run = build_report.read_run("ppo", folder)
    curves = titled(run["curves"])
    assert list(curves) == [f"ppo: {label}" for label in ("score", "reward", "KL", "length", "end rate")]
    assert "train score: -0.500 → 0.500" in curves["ppo: score"] and "held-out score: 2.50" in curves["ppo: score"]
    assert "train KL: 1.00 → 3.00" in curves["ppo: KL"]
    assert "train length: 50.0 → 30.0" in curves["ppo: length"]
    assert "held-out end rate: 0.900" in curves["ppo: end rate"]
    assert run["missing_signal"] is None


def test_page_draws_curves_of_grpo(tmp_path):
    folder = make_run(tmp_path / "grpo", stage="grpo_training")
    write_events(
        folder, [*map(grpo_event, (10, 20)), {"step": 20, "eval_reward": 0.7, "eval_rewards/format/mean": 1.0}]
    )
    run = build_report.read_run("grpo", folder)
    curves = titled(run["curves"])
    assert list(curves) == [f"grpo: {label}" for label in ("reward", "rewards", "length", "no signal")]
    assert "train reward: 0.500 → 1.00" in curves["grpo: reward"] and "held-out reward: 0.700" in curves["grpo: reward"]
    rewards = curves["grpo: rewards"]
    assert "accuracy: 0.250 → 0.500" in rewards and "format: 0.500 → 0.500" in rewards
    assert "held-out format: 1.00" in rewards and "std" not in rewards
    assert "train length: 40.0 → 50.0" in curves["grpo: length"]
    assert run["missing_signal"] is None


@pytest.mark.parametrize(
    "events, said",
    [
        ([grpo_event(1, frac_reward_zero_std=1.0), grpo_event(2, frac_reward_zero_std=1.0)], "in every group"),
        ([ppo_event(1, score_std=0.0), ppo_event(2, score_std=2e-8)], "in every step"),
        ([grpo_event(1, frac_reward_zero_std=1.0), grpo_event(2, frac_reward_zero_std=0.9)], None),
        ([ppo_event(1, score_std=0.0), ppo_event(2)], None),
        ([{"step": 1, "loss": 1.0}], None),
    ],
)
def test_rewards_that_are_all_equal_are_called_so(report, monkeypatch, events, said):
    made = make_run

    def make(folder, **changes):
        write_events(made(folder, **changes), events)
        return folder

    monkeypatch.setitem(globals(), "make_run", make)
    page, printed = report()
    wanted = [f"no learning signal: {said}"] if said else []
    assert re.findall(r"no learning signal: in every \w+", " ".join(Elements(page).text)) == wanted
    assert re.findall(r"notice: sft \(.*\): (no learning signal: in every \w+)", printed) == wanted


def test_only_a_report_is_overwritten(report, tmp_path):
    """A mistyped path must not cost a page, a run's record or the results themselves."""
    report()
    report()
    for text in ("<!DOCTYPE html><title>mine</title>", "{}", ""):
        (tmp_path / "out" / "report.html").write_text(text)
        with pytest.raises(UserError, match="report.html exists and is not a report"):
            report()
        assert (tmp_path / "out" / "report.html").read_text() == text
    (tmp_path / "out" / "report.html").unlink()
    with pytest.raises(UserError, match="eval.json exists and is not a report"):
        report("--output_file", str(tmp_path / "eval.json"))
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["models"]


def test_page_of_long_runs_is_small(tmp_path, monkeypatch, capsys):
    wave = [math.sin(step) for step in range(1, 5001)]
    functions = {f"rewards/function_{number}/mean" for number in range(8)}
    long = {
        "ppo": [ppo_event(step, score=y, kl=abs(y), length=50 + y) for step, y in enumerate(wave, start=1)],
        "grpo": [grpo_event(step, reward=y, **dict.fromkeys(functions, y)) for step, y in enumerate(wave, start=1)],
    }
    for name, events in long.items():
        write_events(make_run(tmp_path / name), events)
    file, page = tmp_path / "eval.json", tmp_path / "report.html"
    file.write_text(json.dumps(with_reinforcement(make_evaluation())), encoding="utf-8")
    runs = [f"{name}={tmp_path / name}" for name in long]
    command = ["build_report.py", "--eval_file", str(file), "--output_file", str(page), "--runs", *runs]
    monkeypatch.setattr(sys, "argv", command)
    build_report.main()
    assert page.stat().st_size < build_report.MAX_BYTES and "notice" not in capsys.readouterr().out


def test_long_answers_are_cut_with_a_count(report):
    evaluation = make_evaluation()
    evaluation["models"][0]["answers"] = [answer("长" * 300_000, finish_reason="length")]
    page, _ = report(evaluation=evaluation)
    assert len(page.encode()) < 100_000
    assert f"({300_000 - build_report.MAX_SHOWN_CHARACTERS:,} more characters)" in page


def test_expected_exact_match_is_checked(report, capsys):
    _, printed = report("--expect_exact_match", "0.9")
    assert "check passed  exact match of sft: 803/860 = 93.4%, expected at least 90.0%" in printed
    with pytest.raises(SystemExit) as stopped:
        report("--expect_exact_match", "0.95")
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "CHECK FAILED  exact match of sft: 803/860 = 93.4%, expected at least 95.0%" in printed


@pytest.mark.parametrize("share", ["93", "-0.1"])
def test_expected_exact_match_must_be_a_share(report, share):
    with pytest.raises(UserError, match="share from 0 to 1"):
        report("--expect_exact_match", share)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_unusable_results_are_named(tmp_path, monkeypatch, content):
    file = tmp_path / "eval.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["build_report.py", "--eval_file", str(file)])
    with pytest.raises(UserError, match=r"eval\.json.*eval_pipeline\.py"):
        build_report.main()


def test_a_folder_without_a_run_is_named(tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(make_evaluation()))
    monkeypatch.setattr(sys, "argv", ["build_report.py", "--eval_file", str(file), "--runs", f"pt={tmp_path}"])
    with pytest.raises(UserError, match=r"run\.json does not exist"):
        build_report.main()


def test_commands_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = str(tmp_path / "supervised_finetuning.py")
    assert command_line([script, "--name", "小 医"]) == "python supervised_finetuning.py --name '小 医'"
    assert command_line(["/usr/bin/python3.11", script]) == "python supervised_finetuning.py"
    assert command_line(["torchrun", "--nproc_per_node", "2", script]).startswith("torchrun --nproc_per_node 2 super")
    assert command_line([]) == ""
