"""eval_pipeline.py: perplexity against direct computation, exact match counts, and reuse of earlier results."""

import json
import math
import os
import random
import shutil
import sys
import time

import eval_pipeline
from eval_pipeline import (
    Progress,
    Question,
    count_answers,
    is_match,
    perplexity,
    pick_examples,
    read_documents,
    read_questions,
    score_documents,
)
from medicalgpt.chat import Answer
from medicalgpt.errors import UserError
from tests.tiny import END_OF_TEXT, make_tiny

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

KNOWN = {"你是谁": "我是小医。", "What is a fever?": "A body temperature above 38 degrees."}
TEXTS = ["头痛要休息。", "Drink enough water every day.", "发烧看医生" * 12]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A tiny model that knows the answers of KNOWN by heart."""
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
    monkeypatch.setattr(eval_pipeline, "MAX_LOGITS", 1)
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


def test_held_out_text_is_found_by_its_name(tmp_path):
    (tmp_path / "train.txt").write_text("never read\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no held-out file"):
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
    assert shown["我是小医。"] == {"text": "我是小医。", "finish_reason": "stop", "correct": True}
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


def test_unreadable_earlier_results_are_measured_again(workplace, tmp_path):
    workplace()
    (tmp_path / "out" / "eval.json").write_text("{", encoding="utf-8")
    results, printed = workplace()
    assert "not readable as earlier results" in printed and len(results["models"]) == 2


def test_results_of_a_stopped_evaluation_are_kept(workplace, monkeypatch, tmp_path):
    workplace()
    os.utime("base/model.safetensors", (1, 1))
    evaluate = eval_pipeline.evaluate_model
    monkeypatch.setattr(eval_pipeline, "fingerprint_checkpoint", stop_at("sft", eval_pipeline.fingerprint_checkpoint))
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
    def stopping(folder):
        if folder == name:
            raise KeyboardInterrupt
        return function(folder)

    return stopping


def test_a_model_without_template_borrows_the_last_one(workplace):
    os.remove("base/chat_template.jinja")
    results, printed = workplace()
    assert "sft lent its template" in printed and "sft lent its template" in results["models"][0]["notes"][0]
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
    assert "base: asked 2 of 3 questions (seed 42)" in printed
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


@pytest.mark.parametrize("kind, flag", [("text", "--text_file_dir"), ("chat", "--chat_file")])
def test_one_kind_of_measurement_alone(tmp_path, learned, monkeypatch, kind, flag):
    places = {"text": tmp_path / "validation.txt", "chat": tmp_path / "chat.jsonl"}
    places["text"].write_text("hello\n")
    write_rows(places["chat"], [chat_row(*next(iter(KNOWN.items())))])
    out = tmp_path / "eval.json"
    command = ["eval_pipeline.py", "--models", f"m={learned}", "--output_file", str(out), flag, str(places[kind])]
    monkeypatch.setattr(sys, "argv", command)
    eval_pipeline.main()
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


@pytest.mark.parametrize("flags", [("--max_chat_sample", "3"), ("--block_size", "1"), ("--batch_size", "0")])
def test_flags_that_cannot_be_are_refused(workplace, flags):
    with pytest.raises(SystemExit) as stopped:
        workplace(*flags)
    assert stopped.value.code == 2


def test_a_long_step_shows_signs_of_life(capsys):
    with Progress("sft: answers", 10, every=0.05) as progress:
        progress.add(4)
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and all("sft: answers: 4/10 after" in line and "left" in line for line in lines)
