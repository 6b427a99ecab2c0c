"""eval_pipeline.py: perplexity and pairs against direct computation, counts of answers, reuse of earlier results."""

import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import eval_pipeline
from eval_pipeline import score_answers, task_rewards
from medicalgpt.data.encoding import Pair
from medicalgpt.errors import UserError
from medicalgpt.evaluation import measures, results
from medicalgpt.evaluation.fluency import BROKEN, MIXED, REPEATS, UNENDED, find_fault
from medicalgpt.evaluation.held_out import (
    PreferencePair,
    Question,
    Reading,
    pick_examples,
    read_documents,
    read_preferences,
    read_questions,
    read_tasks,
)
from medicalgpt.evaluation.measures import (
    count_answers,
    count_preferences,
    is_good,
    is_match,
    perplexity,
    score_documents,
    score_pairs,
)
from medicalgpt.models import hub
from medicalgpt.rewards import rewards
from medicalgpt.rewards.scoring import RewardScorer
from medicalgpt.serving.generation import Answer
from tests.helpers import ROOT
from tests.tiny import END_OF_TEXT, make_tiny

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

KNOWN = {"你是谁": "我是小医。", "What is a fever?": "A body temperature above 38 degrees."}
TEXTS = ["头痛要休息。", "Drink enough water every day.", "发烧看医生" * 12]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A tiny model that has memorized the answers of KNOWN."""
    return make_tiny(tmp_path_factory.mktemp("models") / "sft", answers=KNOWN)


@pytest.fixture(scope="module")
def model(learned):
    return AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32).eval()


@pytest.fixture
def documents():
    numbers = random.Random(1)
    return [[numbers.randrange(256) for _ in range(length)] for length in (5, 40, 2, 17, 33, 8, 40)]


def direct_nll(model, ids, context=0):
    """Negative log-likelihood of ids after the first 1 + context ones: one document, no padding, no mask."""
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(log_probabilities[at - 1, ids[at]].item() for at in range(1 + context, len(ids)))


def chat_row(*turns, **extra):
    roles = ["human", "gpt"] * len(turns)
    return {"conversations": [{"from": role, "value": text} for role, text in zip(roles, turns, strict=False)], **extra}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def question(category, reference="yes", place="f:1"):
    return Question(place, category, [{"role": "user", "content": "?"}], None, reference)


# -- perplexity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_documents_score_as_each_alone(model, documents, batch_size):
    scores = score_documents(model, documents, block_size=512, batch_size=batch_size)
    for (nll, tokens), ids in zip(scores, documents, strict=True):
        assert nll == pytest.approx(direct_nll(model, ids), rel=1e-4)
        assert tokens == len(ids) - 1


@pytest.mark.parametrize("block_size", [2, 7, 33, 39, 40, 41])
def test_split_documents_lose_no_token(model, documents, block_size):
    scores = score_documents(model, documents, block_size)
    for (nll, tokens), ids in zip(scores, documents, strict=True):
        starts = range(0, len(ids) - 1, block_size - 1)
        assert nll == pytest.approx(sum(direct_nll(model, ids[s : s + block_size]) for s in starts), rel=1e-4)
        assert tokens == len(ids) - 1


def test_a_document_does_not_see_another(model, documents):
    before = score_documents(model, documents, 512)
    changed = [[7] * len(documents[0]), *documents[1:]]
    after = score_documents(model, changed, 512)
    assert after[0][0] != pytest.approx(before[0][0], rel=1e-3)
    assert [nll for nll, _ in after[1:]] == pytest.approx([nll for nll, _ in before[1:]], rel=1e-5)


def test_a_large_vocabulary_makes_smaller_batches(model, documents, monkeypatch):
    whole = score_documents(model, documents, 512)
    monkeypatch.setattr(measures, "MAX_LOGITS", 1)
    assert score_documents(model, documents, 512) == [(pytest.approx(nll, rel=1e-5), n) for nll, n in whole]


def test_uniform_model_has_the_vocabulary_as_perplexity(learned, documents):
    uniform = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    scores = score_documents(uniform, documents, block_size=16)
    assert perplexity(scores) == pytest.approx(uniform.config.vocab_size, rel=1e-5)


def test_perplexity_weighs_by_tokens():
    assert perplexity([(10.0, 5), (2.0, 1)]) == pytest.approx(math.exp(2.0))
    assert perplexity([(9.0, 3), (1.0, 7)]) == pytest.approx(math.e)


def test_broken_weights_are_named(learned, documents):
    broken = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32).eval()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(UserError, match="not finite"):
        score_documents(broken, documents, 512)


# -- preferences -----------------------------------------------------------------------------------------------------

PAIRS = [
    Pair([10, 11, 12], [20, 21, 22, 23, 24, 25], [30, 31]),
    Pair([10, 11, 12, 13, 14, 15, 16], [40], [50, 51, 52, 53]),
    Pair([1], [60, 61, 62], [70, 71, 72]),
]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_score_per_token_and_without_their_prompt(model, batch_size):
    scores = score_pairs(model, PAIRS, batch_size=batch_size)
    for pair, both in zip(PAIRS, scores, strict=True):
        for answer, score in zip((pair.chosen_ids, pair.rejected_ids), both, strict=True):
            nll = direct_nll(model, pair.prompt_ids + answer, context=len(pair.prompt_ids) - 1)
            assert score == pytest.approx(-nll / len(answer), rel=1e-4)


def test_a_longer_answer_does_not_lose_by_its_length(learned):
    uniform = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    for chosen, rejected in score_pairs(uniform, PAIRS):
        assert chosen == pytest.approx(rejected, rel=1e-6)


def test_pairs_are_counted_by_category():
    pairs = [PreferencePair(f"f:{number}", category, {}) for number, category in enumerate("aabb")]
    counts = count_preferences(pairs, [(-1.0, -2.0), (-3.0, -2.5), (-1.0, -1.0), (2.0, -2.0)])
    assert (counts["correct"], counts["total"], counts["margin"]) == (2, 4, pytest.approx(1.125))
    assert counts["by_category"] == {
        "a": {"correct": 1, "total": 2, "margin": pytest.approx(0.25)},
        "b": {"correct": 1, "total": 2, "margin": pytest.approx(2.0)},
    }


@pytest.mark.parametrize(
    "answer, good",
    [
        ("脑卒中建议挂神经内科。请立即拨打120。", True),
        ("脑卒中建议挂神经内科。如加重请去急诊。", True),
        ("神经内科", False),
        ("请立即拨打120或去急诊。", False),
        ("", False),
        # Every keyword is there, and nobody would want this answer.
        ("脑卒中建议挂神经内科。" + "请立即拨打120。" * 3, False),
        ("脑卒中建议挂神经内科神经神经神经神经神经神经神经，请立即拨打120。", False),
        ("\ufffd脑卒中建议挂神经内科。请立即拨打120。", False),
        ("脑卒中建议挂神经内科 with sudden weakness。请立即拨打120。", False),
        ("脑卒中建议挂神经内科。请立即拨打120，并", False),
    ],
)
def test_a_good_answer_holds_a_string_of_each_group(answer, good):
    asked = Question("f:1", "zh", [], None, "挂神经内科。", [["神经内科"], ["120", "急诊"]])
    assert is_good(Answer(answer, "stop", 1, 1), asked) is good


def test_an_answer_that_was_cut_off_is_not_good():
    asked = Question("f:1", "zh", [], None, "", [["120"]])
    assert is_good(Answer("拨打120。", "stop", 1, 1), asked) and not is_good(Answer("拨打120。", "length", 1, 1), asked)


@pytest.mark.parametrize(
    "answer, prompt, reference, fault",
    [
        ("哈哈哈哈哈哈", "笑一个", "", REPEATS),
        ("call now call now call now", "?", "", REPEATS),
        ("多休息，多喝水。量体温。多休息，多喝水。量血压。多休息，多喝水。", "发烧", "", REPEATS),
        ("阿司匹林 100 mg，电话 11111111。\n--------\n| a | b |", "剂量", "", None),
        ("做MRI和CT，查HbA1c，pH值。", "查什么", "", None),
        ("用Dolo Brufen Panadol退烧。", "用Dolo Brufen Panadol退烧？", "", None),
        ("See the 神经内科.", "Which department?", "Neurology.", MIXED),
        ("He said “rest.”", "?", "Rest.", None),
        ("B", "A or B?", "B", None),
        ("Rest and", "?", "Rest.", UNENDED),
        ("\x00", "?", "", BROKEN),
    ],
)
def test_faults_are_found_and_fluent_answers_left_alone(answer, prompt, reference, fault):
    assert find_fault(answer, "stop", prompt, reference) == fault


def test_no_answer_of_the_sample_data_has_a_fault():
    for file in ("reward/validation.jsonl", "everyday/questions.jsonl"):
        for row in map(json.loads, (ROOT / "data" / file).read_text(encoding="utf-8").splitlines()):
            *_, last = row["conversations"]
            prompt, answer = (last, row["chosen"]) if "chosen" in row else (row["conversations"][-2], last["value"])
            assert find_fault(answer, "stop", prompt["value"], answer) is None, answer


def test_good_answers_may_have_capitals():
    asked = Question("f:1", "en", [], None, "", [["neurology"], ["call an ambulance"]])
    assert is_good(Answer("Neurology. CALL AN AMBULANCE", "stop", 1, 1), asked)


def test_a_question_that_requires_nothing_is_not_counted_among_good_answers():
    questions = [question("zh"), Question("f:2", "zh", [], None, "", [["120"]])]
    score = count_answers(questions, [Answer("拨打120", "stop", 1, 1), Answer("拨打120", "stop", 1, 1)], is_good)
    assert (score.correct, score.total, score.by_category["zh"]["total"]) == (1, 1, 1)


def pair_row(prompt, chosen="是的", rejected="不", required=None, **extra):
    meta = {} if required is None else {"meta": {"required": required}}
    return {**chat_row(prompt), "chosen": chosen, "rejected": rejected, **meta, **extra}


def test_prompts_of_preferences_are_asked_once(tmp_path):
    rows = [
        pair_row("q1", "a", "b", [["a"]], category="rude", language="zh"),
        pair_row("q1", "a", "c", [["a"]], category="wrong"),
        pair_row("q2", "a", "b"),
        pair_row("q3", "a", "b", []),
        pair_row("q3", "a", "b", [["x", "y"], ["z"]]),
    ]
    pairs, prompts = read_preferences(str(write_rows(tmp_path / "validation.jsonl", rows)))
    assert [pair.category for pair in pairs] == ["rude", "wrong", *["no category"] * 3]
    assert [(prompt.messages[-1]["content"], prompt.category, prompt.required) for prompt in prompts] == [
        ("q1", "zh", [["a"]]),
        ("q2", "no language", None),
        ("q3", "no language", [["x", "y"], ["z"]]),
    ]


@pytest.mark.parametrize("required", ["120", ["120"], [[]], [[120]], {"a": ["b"]}])
def test_requirements_of_another_form_are_refused(tmp_path, required):
    file = write_rows(tmp_path / "validation.jsonl", [pair_row("q"), pair_row("q", required=required)])
    with pytest.raises(UserError, match=r"validation\.jsonl:2: `meta\.required` is not a list of groups"):
        read_preferences(str(file))


# -- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, reference, match",
    [
        ("我是小医。", "我是小医。", True),
        (" 我是小医。\n", "我是小医。", True),
        ("我是小医", "我是小医。", False),
        ("我是小医.", "我是小医。", False),
        ("yes", "Yes", False),
        ("a  b", "a b", False),
        ("", "我是小医。", False),
    ],
)
def test_a_match_is_the_same_string_but_for_its_ends(answer, reference, match):
    assert is_match(answer, reference) is match


def test_answers_are_counted_by_category():
    questions = [question("a"), question("a"), question("b"), question("b"), question("b")]
    texts = [("yes", "stop"), ("no", "length"), (" yes ", "length"), ("yes", "stop"), ("yes yes", "stop")]
    score = count_answers(questions, [Answer(text, reason, 1, 1) for text, reason in texts])
    assert (score.correct, score.stopped, score.total) == (3, 3, 5)
    assert score.by_category == {
        "a": {"correct": 1, "stopped": 1, "total": 2},
        "b": {"correct": 2, "stopped": 2, "total": 3},
    }


def test_examples_are_spread_and_hold_identity_rows():
    questions = [question("symptoms")] * 50 + [question("department")] * 50 + [question("identity")] * 4
    chosen = pick_examples(questions, 12)
    assert len(set(chosen)) == 12
    assert [questions[index].category for index in chosen].count("identity") == 4
    assert [questions[index].category for index in chosen].count("symptoms") == 4
    many = [question(f"category {number}") for number in range(40)] + [question("identity_en")] * 5
    chosen = [many[index].category for index in pick_examples(many, 12)]
    assert chosen.count("identity_en") == 2 and len(set(chosen)) == 11
    assert pick_examples(questions[:3], 12) == [0, 1, 2]


# -- data ------------------------------------------------------------------------------------------------------------


def test_questions_of_one_and_many_turns(tmp_path):
    rows = [
        chat_row("问一", "答一", category="identity"),
        chat_row("q1", "a1", "q2", "a2"),
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
         + [{"role": "assistant", "content": "a"}], "category": 3},
    ]  # fmt: skip
    questions, left_out = read_questions(str(write_rows(tmp_path / "validation.jsonl", rows)))
    assert [(q.category, q.reference) for q in questions] == [("identity", "答一"), ("no category", "a2"), ("3", "a")]
    assert [turn["content"] for turn in questions[1].messages] == ["q1", "a1", "q2"]
    assert [turn["role"] for turn in questions[2].messages] == ["system", "user"]
    assert questions[1].place.endswith("validation.jsonl:2") and left_out == {}


def test_answers_that_are_tool_calls_are_left_out_and_counted(tmp_path):
    call = {"from": "function_call", "value": json.dumps({"name": "search", "arguments": {"q": "x"}})}
    tools = json.dumps([{"name": "search", "description": "d", "parameters": {"type": "object", "properties": {}}}])
    rows = [chat_row("q", "a"), {"conversations": [{"from": "human", "value": "q"}, call], "tools": tools}]
    questions, left_out = read_questions(str(write_rows(tmp_path / "c.jsonl", rows)))
    assert len(questions) == 1 and left_out == {"the answer is a tool call": 1}


def test_all_rows_that_cannot_be_asked_are_named(tmp_path):
    rows = [chat_row("q", "a"), chat_row("q only"), {"text": "no chat"}]
    with pytest.raises(UserError) as refused:
        read_questions(str(write_rows(tmp_path / "c.jsonl", rows)))
    assert "2 row(s)" in str(refused.value) and "c.jsonl:2" in str(refused.value) and "c.jsonl:3" in str(refused.value)


MEDMCQA = {"question": "Which one?", "opa": "iron", "opb": "zinc", "opc": "lead", "opd": "gold", "exp": "It is so."}


def test_columns_and_presets_say_which_field_is_what(tmp_path):
    named = {"Ask": "Fever?", "Good": "Rest.", "Bad": "Run.", "note": "x", "category": "home"}
    file = str(write_rows(tmp_path / "rows.jsonl", [named]))
    (question,), _ = read_questions(file, Reading(columns="question=Ask,answer=Good"))
    assert (question.messages[-1]["content"], question.reference, question.category) == ("Fever?", "Rest.", "home")
    (pair,), _ = read_preferences(file, Reading(columns="question=Ask,chosen=Good,rejected=Bad"))
    assert (pair.row["chosen"]["content"], pair.row["rejected"]["content"]) == ("Rest.", "Run.")
    (task,) = read_tasks(file, Reading(columns="question=Ask,answer=Good"))
    assert (task.messages[-1]["content"], task.reference) == ("Fever?", "Rest.")
    assert read_documents(file, "auto", Reading(columns="text=Good"))[0] == ["Rest."]
    # Counted from 1, as the files of the set are; recognised, it would be the copy on the hub, which counts from 0.
    file = str(write_rows(tmp_path / "choices.jsonl", [{**MEDMCQA, "cop": 3}]))
    assert read_tasks(file, Reading(preset="medmcqa-original"))[0].columns["answer"] == "C"
    assert read_tasks(file)[0].columns["answer"] == "D"


@pytest.mark.parametrize(
    ("reading", "part"),
    [
        ({"columns": "question=Q,answer=Response"}, "no row has the field Q|no field `Q`"),
        ({"columns": "question=question,answer=exp,reasoning=thoughts"}, "--columns: no row has the field thoughts"),
        ({"columns": "question"}, "'question' is not NAME=FIELD"),
        ({"preset": "medmqca"}, "Did you mean medmcqa"),
        ({"preset": "medqa", "columns": "question=question"}, "--columns and --preset both"),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path, reading, part):
    file = write_rows(tmp_path / "rows.jsonl", [{**MEDMCQA, "cop": 3}])
    with pytest.raises(UserError, match=part):
        read_questions(str(file), Reading(**reading))


@pytest.mark.parametrize("read", [read_questions, read_tasks])
def test_options_counted_the_other_way_are_not_measured(tmp_path, read):
    file = write_rows(tmp_path / "rows.jsonl", [{**MEDMCQA, "cop": cop} for cop in (1, 4)])
    with pytest.raises(UserError, match="rows.jsonl:2: `cop` is 4.*--preset medmcqa-original"):
        read(str(file))
    read(str(file), Reading(preset="medmcqa-original"))


def test_the_command_line_takes_columns_or_a_preset(tmp_path, monkeypatch):
    command = ["eval_pipeline.py", "--models", "a=b", "--chat_file", "c", "--output_file", "d"]
    monkeypatch.setattr(sys, "argv", [*command, "--columns", "question=Ask", "--preset", "medqa"])
    args = eval_pipeline.parse_arguments()
    assert (args.columns, args.preset) == ("question=Ask", "medqa")


def task_row(question, answer, kind, **extra):
    return {"question": question, "answer": answer, "type": kind, "language": "zh", "category": "dose", **extra}


def test_tasks_have_an_answer_and_what_judges_replies(tmp_path):
    rows = [
        task_row("5 mg/kg, 20 kg?", "100 mg", "number"),
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "B"},
    ]
    first, second = read_tasks(str(write_rows(tmp_path / "validation.jsonl", rows)))
    assert (first.category, first.reference) == ("number", "100 mg")
    assert [turn["content"] for turn in first.messages] == ["5 mg/kg, 20 kg?"]
    assert first.columns == {"answer": "100 mg", "type": "number", "language": "zh", "category": "dose"}
    assert (second.category, [turn["role"] for turn in second.messages]) == ("no type", ["system", "user"])


def test_tasks_without_an_answer_are_named(tmp_path):
    rows = [task_row("q", "A", "choice"), {"question": "q", "type": "choice"}]
    with pytest.raises(UserError, match=r"tasks\.jsonl:2: no answer to compare with"):
        read_tasks(str(write_rows(tmp_path / "tasks.jsonl", rows)))


@pytest.mark.parametrize(
    "task, reply, right, formed",
    [
        (task_row("?", "B", "choice"), "<think>想</think><answer>选B</answer>", True, True),
        (task_row("?", "B", "choice"), "<think>想</think><answer>C</answer>", False, True),
        (task_row("?", "2.5 mL", "number"), "<think>a\nb</think>\n<answer>2.5毫升</answer>", True, True),
        # Half of a reward is not correct: the unit is missing, and the thinking.
        (task_row("?", "2.5 mL", "number"), "<answer>2.5</answer>", False, False),
        # An answer counts without a block, which is a matter of format.
        (task_row("?", "B", "choice"), "B", True, False),
        (task_row("?", "B", "choice"), "<think>B", False, False),
    ],
)
def test_replies_to_tasks_are_judged_by_the_rewards_of_grpo(tmp_path, task, reply, right, formed):
    (asked,) = read_tasks(str(write_rows(tmp_path / "tasks.jsonl", [task])))
    _, judges = task_rewards()
    assert {name: judge(Answer(reply, "stop", 1, 1), asked) for name, judge in judges.items()} == {
        "correct answers": right,
        "correct format": formed,
    }


def test_held_out_text_is_found_by_its_name(tmp_path):
    (tmp_path / "train.txt").write_text("never read\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no held-out file"):
        read_documents(str(tmp_path), "auto")
    (tmp_path / "validation_zh.txt").write_text("文一\n\n文二\n", encoding="utf-8")
    write_rows(tmp_path / "validation.jsonl", [{"text": "three"}])
    texts, files = read_documents(str(tmp_path), "auto")
    assert sorted(texts) == ["three", "文一", "文二"] and len(files) == 2
    assert read_documents(str(tmp_path / "train.txt"), "auto")[0] == ["never read"]


# -- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, learned, monkeypatch, capsys):
    """Copies of an untrained and a trained model with their data; call it to run the program."""
    tiny = tmp_path / "base"
    make_tiny(tiny)
    shutil.copytree(learned, tmp_path / "sft")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "validation.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    categories = ("identity", "symptoms")
    rows = [chat_row(*turns, category=category) for turns, category in zip(KNOWN.items(), categories, strict=True)]
    rows.append(chat_row("你是谁", "我是小医", category="identity"))
    write_rows(tmp_path / "chat.jsonl", rows)
    monkeypatch.chdir(tmp_path)

    def run(*flags, models=("base=base", "sft=sft")):
        command = ["eval_pipeline.py", "--models", *models, "--text_file_dir", "text", "--chat_file", "chat.jsonl"]
        command += ["--output_file", "out/eval.json", "--max_new_tokens", "48", *flags]
        monkeypatch.setattr(sys, "argv", command)
        eval_pipeline.main()
        return json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def test_models_are_measured(workplace, model, learned):
    results, printed = workplace()
    base, sft = results["models"]
    assert (base["name"], sft["name"]) == ("base", "sft")
    assert (base["chat"]["correct"], base["chat"]["total"]) == (0, 3)
    assert (sft["chat"]["correct"], sft["chat"]["stopped"], sft["chat"]["total"]) == (2, 3, 3)
    assert sft["chat"]["by_category"] == {
        "identity": {"correct": 1, "stopped": 2, "total": 2},
        "symptoms": {"correct": 1, "stopped": 1, "total": 1},
    }
    assert results["chat"] == {"file": "chat.jsonl", "rows": 3, "used": 3, "left_out": {}, "max_new_tokens": 48}
    shown = dict(zip([example["reference"] for example in results["examples"]], sft["answers"], strict=True))
    assert shown["我是小医。"] == {"text": "我是小医。", "finish_reason": "stop", "correct": True, "fault": None}
    assert shown["我是小医"]["correct"] is False
    assert "exact match 2/3" in printed

    tokenizer = AutoTokenizer.from_pretrained(learned)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    nll, tokens = sum(direct_nll(model, row) for row in ids), sum(len(row) - 1 for row in ids)
    assert sft["text"]["tokens"] == tokens == sum(sft["text"]["document_tokens"])
    assert sft["text"]["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert sum(sft["text"]["document_nll"]) == pytest.approx(sft["text"]["nll"], abs=1e-3)


def test_results_are_reused_until_something_changes(workplace):
    first, _ = workplace()
    again, printed = workplace()
    assert printed.count("reused") == 2
    assert again["models"] == first["models"]

    os.utime("base/model.safetensors", (1, 1))
    _, printed = workplace()
    assert "base: perplexity" in printed and "sft: weights, data and settings are unchanged" in printed

    with open("text/validation.txt", "a", encoding="utf-8") as file:
        file.write("\nOne more.\n")
    changed, printed = workplace()
    assert "reused" not in printed
    assert [model["text"]["documents"] for model in changed["models"]] == [4, 4]

    _, printed = workplace("--max_new_tokens", "47")
    assert "reused" not in printed
    _, printed = workplace("--max_new_tokens", "47", "--batch_size", "2")
    assert printed.count("reused") == 2


def test_an_edited_template_is_measured_again(workplace):
    workplace()
    with open("sft/chat_template.jinja", "a", encoding="utf-8") as file:
        file.write("{# edited #}")
    _, printed = workplace()
    assert "base: weights, data and settings are unchanged" in printed and "sft: perplexity" in printed


def test_a_file_that_is_not_of_an_evaluation_is_not_overwritten(tmp_path):
    """Results are written in one step, so an unreadable file is another one; so is a run's own record."""
    for text in ("{", "[]", '{"stage": "sft"}', '{"format": 1}', '{"format": 3}'):
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="run.json exists and does not hold results of an evaluation"):
            results.ResultsFile(tmp_path / "run.json", ["sft"], {})
        assert (tmp_path / "run.json").read_text(encoding="utf-8") == text
    (tmp_path / "run.json").write_text('{"format": 1, "models": []}', encoding="utf-8")
    assert results.ResultsFile(tmp_path / "run.json", ["sft"], {}).find({}) is None


def test_results_of_a_stopped_evaluation_are_kept(workplace, monkeypatch, tmp_path):
    workplace()
    os.utime("base/model.safetensors", (1, 1))
    evaluate = eval_pipeline.evaluate_model
    monkeypatch.setattr(results, "fingerprint_checkpoint", stop_at("sft", results.fingerprint_checkpoint))
    with pytest.raises(KeyboardInterrupt):
        workplace()
    stopped = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in stopped["models"]] == ["base"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert eval_pipeline.evaluate_model is evaluate
    _, printed = workplace()
    assert printed.count("reused") == 2


def stop_at(name, function):
    def stopping(checkpoint):
        if checkpoint.name == name:
            raise KeyboardInterrupt
        return function(checkpoint)

    return stopping


def test_a_model_without_template_borrows_the_last_one(workplace):
    os.remove("base/chat_template.jinja")
    results, printed = workplace()
    lent = "the template and the stop tokens of sft were used"
    assert f"base: it has no chat template; {lent}" in printed and lent in results["models"][0]["notes"][0]
    assert results["models"][0]["chat"]["total"] == 3
    # The lender's template is part of what was measured.
    with open("sft/chat_template.jinja", "a", encoding="utf-8") as file:
        file.write("{# edited #}")
    _, printed = workplace()
    assert "reused" not in printed


def test_a_borrowed_template_brings_its_stop_tokens(workplace, tmp_path):
    """The trained weights without template and without stop tokens answer as the trained model does."""
    shutil.copytree("sft", "bare")
    os.remove("bare/chat_template.jinja")
    settings = json.loads((tmp_path / "bare" / "generation_config.json").read_text())
    settings.pop("eos_token_id")
    (tmp_path / "bare" / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained("bare")
    tokenizer.eos_token = END_OF_TEXT
    tokenizer.save_pretrained("bare")
    assert not os.path.exists("bare/chat_template.jinja")
    results, _ = workplace(models=("bare=bare", "sft=sft"))
    bare, sft = results["models"]
    assert bare["chat"]["by_category"] == sft["chat"]["by_category"] and bare["answers"] == sft["answers"]


def test_a_last_model_without_template_is_refused(workplace):
    os.remove("base/chat_template.jinja")
    with pytest.raises(UserError, match="base, has no chat template"):
        workplace(models=("sft=sft", "base=base"))


def test_earlier_models_are_asked_fewer_questions(workplace):
    results, printed = workplace("--max_chat_samples_before", "2")
    base, sft = results["models"]
    assert (base["chat"]["total"], sft["chat"]["total"]) == (2, 3)
    assert "base: exact match: asked 2 of 3 questions (seed 42)" in printed
    assert len(base["answers"]) == len(sft["answers"]) == len(results["examples"]) == 3
    limited, _ = workplace("--max_chat_samples", "1")
    assert [model["chat"]["total"] for model in limited["models"]] == [1, 1]


def test_questions_beyond_the_context_are_counted_apart(workplace, tmp_path):
    with open("chat.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(chat_row("x" * 600, "y", category="long")) + "\n")
    results, printed = workplace()
    assert "1 questions are longer than its context" in printed
    chat = results["models"][1]["chat"]
    assert (chat["asked"], chat["total"], chat["prompt_too_long"], chat["correct"]) == (4, 3, 1, 2)
    index = [example["category"] for example in results["examples"]].index("long")
    assert results["models"][1]["answers"][index]["text"] is None


@pytest.fixture
def preferences(workplace):
    """Pairs that the trained model ranks right; one of them has a prompt that says what a good answer holds."""
    (question, answer), (other, known) = KNOWN.items()
    rows = [
        pair_row(question, answer, "不告诉你。", [["小医", "大医"]], category="rude"),
        pair_row(other, known, "Go away now, please.", category="rude"),
        pair_row(other, "Go away now, please.", known, category="swapped"),
    ]
    return str(write_rows(Path("pairs.jsonl").absolute(), rows))


def test_preferences_are_measured(workplace, preferences):
    results, printed = workplace("--preference_file", preferences)
    base, sft = results["models"]
    assert (sft["preference"]["correct"], sft["preference"]["total"], sft["preference"]["too_long"]) == (2, 3, 0)
    assert sft["preference"]["by_category"]["rude"]["correct"] == 2
    assert sft["preference"]["by_category"]["swapped"]["correct"] == 0
    assert sft["preference"]["by_category"]["swapped"]["margin"] < 0
    assert (base["good"]["correct"], sft["good"]["correct"], sft["good"]["total"]) == (0, 1, 1)
    assert [answer["correct"] for answer in sft["good_answers"]] == [True]
    assert results["prompt_examples"][0]["required"] == [["小医", "大医"]]
    assert results["preference"] == {"file": preferences, "pairs": 3, "prompts": 1, "max_new_tokens": 48}
    assert results["reward"] is None
    assert "sft: preference accuracy 2/3 (66.7%)" in printed and "sft: good answers 1/1" in printed

    _, printed = workplace("--preference_file", preferences)
    assert printed.count("reused") == 2
    with open(preferences, "a", encoding="utf-8") as file:
        file.write(json.dumps(pair_row("x" * 500, "y" * 20)) + "\n")
    results, printed = workplace("--preference_file", preferences)
    assert "reused" not in printed and "1 pairs are longer than its context" in printed
    assert (results["models"][1]["preference"]["total"], results["models"][1]["preference"]["too_long"]) == (3, 1)


def test_everyday_questions_are_counted_as_right_declined_or_needlessly_declined(workplace):
    (question, answer), (other, known) = KNOWN.items()
    declines = [["degrees"], ["body"]]
    rows = [
        chat_row(question, answer, category="everyday"),
        chat_row(other, "Something else.", category="everyday"),
        chat_row(other, known, category="untaught") | {"meta": {"required": declines}},
        chat_row(question, known, category="untaught") | {"meta": {"required": declines}},
    ]
    file = str(write_rows(Path("everyday.jsonl").absolute(), rows))
    results, printed = workplace("--everyday_file", file)
    base, sft = results["models"]
    assert (sft["everyday"]["correct"], sft["everyday"]["total"]) == (1, 2)
    assert (sft["declined"]["correct"], sft["declined"]["total"]) == (1, 2)
    assert (sft["needless"]["correct"], sft["needless"]["total"]) == (1, 2)
    assert (base["everyday"]["correct"], base["declined"]["correct"], base["needless"]["correct"]) == (0, 0, 0)
    assert results["everyday"] == {"file": file, "max_new_tokens": 48, "taught": 2, "untaught": 2}
    assert [example["category"] for example in results["everyday_examples"]] == ["everyday"] * 2 + ["untaught"] * 2
    assert [shown["correct"] for shown in sft["everyday_answers"]] == [True, False, True, False]
    assert "sft: everyday questions 1/2 (50.0%), needless declines 1/2" in printed and "declined 1/2" in printed
    _, printed = workplace("--everyday_file", file)
    assert printed.count("reused") == 2


def test_an_everyday_row_that_cannot_be_measured_stops(workplace):
    file = str(write_rows(Path("everyday.jsonl").absolute(), [chat_row("a", "b") | {"meta": {"required": "x"}}]))
    with pytest.raises(UserError, match=r"everyday.jsonl:1.*meta.required"):
        workplace("--everyday_file", file)


def test_a_model_without_template_ranks_by_the_last_ones(workplace, preferences):
    shutil.copytree("sft", "bare")
    os.remove("bare/chat_template.jinja")
    results, _ = workplace("--preference_file", preferences, models=("bare=bare", "sft=sft"))
    bare, sft = (model["preference"] for model in results["models"])
    assert bare == sft


def test_the_first_model_that_answers_is_asked_all(workplace, preferences):
    shutil.copytree("sft", "dpo")
    flags = ("--max_chat_samples_before", "2", "--preference_file", preferences)
    models = ("base=base", "sft=sft", "dpo=dpo")
    results, _ = workplace(*flags, "--first_chat_model", "sft", models=models)
    assert [model["chat"]["total"] for model in results["models"]] == [2, 3, 3]
    results, _ = workplace(*flags, models=models)
    assert [model["chat"]["total"] for model in results["models"]] == [2, 2, 3]
    with pytest.raises(UserError, match="--first_chat_model stf is not one of --models: base, sft, dpo"):
        workplace("--first_chat_model", "stf", models=models)


@pytest.fixture
def reward_model(workplace, learned):
    """A folder with a model that scores."""
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(learned)
    scorer = AutoModelForSequenceClassification.from_pretrained(
        learned, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.nn.init.normal_(scorer.score.weight, std=0.1)
    scorer.save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    return scorer.eval()


def test_a_reward_model_is_measured(workplace, preferences, reward_model):
    flags = ("--preference_file", preferences, "--reward_model", "rm")
    results, printed = workplace(*flags)
    tokenizer = AutoTokenizer.from_pretrained("rm")
    gaps = []
    for pair in read_preferences(preferences)[0]:
        scores = []
        for answer in (pair.row["chosen"], pair.row["rejected"]):
            text = tokenizer.apply_chat_template([*pair.row["messages"], answer], tokenize=False)
            ids = tokenizer(text.rstrip("\n"))["input_ids"]
            with torch.no_grad():
                scores.append(reward_model(input_ids=torch.tensor([ids])).logits.item())
        gaps.append(scores[0] - scores[1])
    reward = results["reward"]
    assert (reward["correct"], reward["total"]) == (sum(gap > 0 for gap in gaps), 3)
    assert reward["margin"] == pytest.approx(sum(gaps) / 3, rel=1e-4)
    # The pairs of this category are each other's mirror image.
    assert reward["by_category"]["swapped"]["margin"] == pytest.approx(gaps[2], rel=1e-4) == pytest.approx(-gaps[1])
    assert f"reward model: accuracy {reward['correct']}/3" in printed

    _, printed = workplace(*flags)
    assert printed.count("reused") == 3
    os.utime("rm/model.safetensors", (1, 1))
    _, printed = workplace(*flags)
    assert printed.count("reused") == 2 and "reward model: accuracy" in printed


def test_a_reward_model_scores_what_each_model_answers(workplace, preferences, reward_model):
    flags = ("--preference_file", preferences, "--reward_model", "rm")
    results, printed = workplace(*flags)
    base, sft = results["models"]
    # Both prompts are asked, and one of them says what a good answer holds.
    assert sft["prompt_answers"] == list(KNOWN.values()) and sft["good"]["total"] == 1
    tokenizer = AutoTokenizer.from_pretrained("rm")
    for model in (base, sft):
        found = results["reward"]["models"][model["name"]]
        for prompt, text, score in zip(KNOWN, model["prompt_answers"], found["scores"], strict=True):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
            with torch.no_grad():
                logits = reward_model(input_ids=torch.tensor([tokenizer(whole)["input_ids"]])).logits
            assert score == pytest.approx(logits.item(), rel=1e-4, abs=1e-5)
        assert (found["total"], found["not_scored"]) == (2, {})
        assert found["mean"] == pytest.approx(sum(found["scores"]) / 2)
        assert f"reward model: {model['name']}: mean score {found['mean']:.3f} of 2 answers" in printed

    # Other answers are scored, and the same ones are not scored again.
    results, printed = workplace(*flags, "--max_new_tokens", "2")
    assert "reused" not in printed and results["reward"]["models"]["sft"]["scores"] != found["scores"]
    results, printed = workplace(*flags, "--max_new_tokens", "2", "--max_chat_samples_before", "1")
    base, sft = (results["reward"]["models"][name] for name in ("base", "sft"))
    assert (base["total"], sft["total"], base["scores"].count(None)) == (1, 2, 1)
    assert "sft: weights, data and settings are unchanged" in printed and "reward model: base: mean score" in printed


def test_answers_that_cannot_be_scored_are_counted(workplace, reward_model):
    prompts = [question("zh", place=f"f:{number}") for number in range(4)]
    scorer = RewardScorer.from_pretrained("rm")
    found = score_answers(scorer, "sft", prompts, ["yes", None, "x" * 600, "a<|im_end|>b"], 2)
    assert [score is None for score in found["scores"]] == [False, True, True, True]
    assert (found["total"], found["mean"]) == (1, pytest.approx(found["scores"][0]))
    assert found["not_scored"].pop("too long for the reward model") == 1
    assert list(found["not_scored"].values()) == [1]
    nothing = score_answers(scorer, "base", prompts, [None] * 4, 2)
    assert (nothing["mean"], nothing["total"]) == (None, 0)


def test_a_model_that_writes_is_no_reward_model(workplace, preferences):
    with pytest.raises(UserError, match="sft is a language model, without a scoring head"):
        workplace("--preference_file", preferences, "--reward_model", "sft")


REPLIES = {
    "A还是B？": "<think>是B</think><answer>B</answer>",
    "20*5?": "<think>20*5</think><answer>90 mg</answer>",
    "名称？": "<answer>发烧</answer>",
}


@pytest.fixture
def tasks(workplace, monkeypatch):
    """Tasks, and in the folder grpo a model that has memorized REPLIES to prompts with the system prompt."""
    monkeypatch.setattr(rewards, "SYSTEM_PROMPT", "Think.")
    tokenizer = AutoTokenizer.from_pretrained("base")
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    rows = []
    for asked, reply in REPLIES.items():
        turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        rows.append((prompt, [*tokenizer(reply)["input_ids"], model.generation_config.eos_token_id[0]]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        losses = [
            model(input_ids=torch.tensor([[*prompt, *reply]]), labels=torch.tensor([[-100] * len(prompt) + reply])).loss
            for prompt, reply in rows
        ]
        loss = torch.stack(losses).mean()
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.save_pretrained("grpo")
    tokenizer.save_pretrained("grpo")
    kinds = zip(REPLIES, ("B", "100 mg", "发烧"), ("choice", "number", "text"), strict=True)
    return str(write_rows(Path("tasks.jsonl").absolute(), [task_row(*each) for each in kinds]))


def test_tasks_are_measured(workplace, tasks):
    flags, models = ("--task_file", tasks, "--task_max_new_tokens", "80"), ("sft=sft", "grpo=grpo")
    results, printed = workplace(*flags, models=models)
    sft, grpo = results["models"]
    assert (sft["task"]["correct"], grpo["task"]["correct"], grpo["task"]["total"]) == (0, 2, 3)
    assert {kind: counts["correct"] for kind, counts in grpo["task"]["by_category"].items()} == {
        "choice": 1,
        "number": 0,
        "text": 1,
    }
    assert {kind: counts["correct"] for kind, counts in grpo["task_format"]["by_category"].items()} == {
        "choice": 1,
        "number": 1,
        "text": 0,
    }
    assert [answer["text"] for answer in grpo["task_answers"]] == list(REPLIES.values())
    assert [answer["correct"] for answer in grpo["task_answers"]] == [True, False, True]
    assert results["task"] == {"file": tasks, "tasks": 3, "max_new_tokens": 80}
    assert [example["messages"][0]["role"] for example in results["task_examples"]] == ["user"] * 3
    assert "grpo: correct answers 2/3 (66.7%), correct format 2/3 (66.7%), stopped by itself 3/3" in printed

    _, printed = workplace(*flags, models=models)
    assert printed.count("reused") == 2
    results, printed = workplace("--task_file", tasks, "--max_chat_samples_before", "1", models=models)
    assert [model["task"]["total"] for model in results["models"]] == [1, 3]
    assert results["task"]["max_new_tokens"] == 256
    with open(tasks, "a", encoding="utf-8") as file:
        file.write(json.dumps(task_row("?", "C", "choice")) + "\n")
    _, printed = workplace("--task_file", tasks, models=models)
    assert "reused" not in printed


@pytest.mark.parametrize("kind, flag", [("text", "--text_file_dir"), ("chat", "--chat_file")])
def test_one_kind_of_measurement_alone(tmp_path, learned, monkeypatch, kind, flag):
    places = {"text": tmp_path / "validation.txt", "chat": tmp_path / "chat.jsonl"}
    places["text"].write_text("hello\n")
    write_rows(places["chat"], [chat_row(*next(iter(KNOWN.items())))])
    out = tmp_path / "eval.json"
    command = ["eval_pipeline.py", "--models", f"m={learned}", "--output_file", str(out), flag, str(places[kind])]
    monkeypatch.setattr(sys, "argv", command)
    resolve, resolved = hub.resolve_checkpoint, []
    monkeypatch.setattr(hub, "resolve_checkpoint", lambda name: resolved.append(name) or resolve(name))
    eval_pipeline.main()
    assert resolved == [learned]
    results = json.loads(out.read_text(encoding="utf-8"))
    assert [name for name in ("text", "chat") if results[name]] == [kind]
    assert [name for name in ("text", "chat") if results["models"][0][name]] == [kind]


@pytest.mark.parametrize(
    "models, message",
    [
        (("base",), "expected NAME=FOLDER"),
        (("a=x", "a=y"), "given twice"),
        (("a=no/such/folder",), "no checkpoint"),
        (("a=text/pt",), "no folder text/pt"),
    ],
)
def test_unusable_models_are_named(workplace, models, message):
    with pytest.raises(UserError, match=message):
        workplace(models=models)


@pytest.mark.parametrize(
    "flags",
    [
        ("--max_chat_sample", "3"),
        ("--block_size", "1"),
        ("--batch_size", "0"),
        ("--reward_model", "rm"),
        ("--task_max_new_tokens", "8"),
    ],
)
def test_flags_that_cannot_be_are_refused(workplace, flags):
    with pytest.raises(SystemExit) as stopped:
        workplace(*flags)
    assert stopped.value.code == 2


def test_a_long_step_has_a_heartbeat(capsys):
    with eval_pipeline.progress("sft: answers", 10, seconds=0.05) as step:
        step.add(4)
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and all(line.startswith("  sft: answers: 4/10 after") and "left" in line for line in lines)
