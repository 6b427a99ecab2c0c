"""An answer does not depend on what is answered beside it: batched greedy answers are those given one at a time."""

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from tests.families import EACH, make_family
from tests.helpers import read_json, run_here, write_jsonl

import pytest
import torch
from transformers import AutoModelForCausalLM

# Shorter and longer than the sliding windows of the tiny models, and as unequal as rows of a file are.
QUESTIONS = [
    "?",
    "感冒了怎么办？",
    "Why? " * 12,
    "ab",
    "A long one: " + "xyz " * 30,
    "Is it a cold?",
    "?",
    "我头痛。" * 5,
]
SAMPLING = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module", params=EACH)
def folder(request, tmp_path_factory):
    # With one matrix at both ends, random weights say the last token again and again.
    return make_family(tmp_path_factory.mktemp(request.param), request.param, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def engine(folder):
    return ChatEngine.from_pretrained(folder)


def asked(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def alone(engine):
    answers = [engine.chat(asked(question), SAMPLING) for question in QUESTIONS]
    # Answers that are all the same, or empty, would be equal in any batch.
    assert len({answer.text for answer in answers}) >= 5
    assert sum(answer.completion_tokens for answer in answers) > 3 * len(QUESTIONS)
    return answers


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batched_is_one_at_a_time(engine, alone, batch_size):
    prompts = [engine.prompt_ids(asked(question)) for question in QUESTIONS]
    together = engine.batch(prompts, SAMPLING, batch_size=batch_size)
    assert together == alone


def test_scores_of_a_padded_prompt_are_those_without_padding(folder):
    """Not only which token is first: its score, beside a prompt four times as long."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    short, long = torch.arange(60, 72), torch.arange(60, 110)
    ids = torch.stack([torch.cat([short.new_zeros(len(long) - len(short)), short]), long])
    mask = torch.ones_like(ids)
    mask[0, : len(long) - len(short)] = 0
    with torch.no_grad():
        padded = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        single = model.generate(
            input_ids=short[None],
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for one, other in zip(padded.logits, single.logits, strict=True):
        torch.testing.assert_close(one[:1], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_file_is_answered_the_same_in_batches_of_any_size(tmp_path, adapter):
    folder = make_family(tmp_path / "model", "llama")
    more = []
    if adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "adapter")
        more = ["--lora_model", tmp_path / "adapter"]
    rows = write_jsonl(tmp_path / "questions.jsonl", [{"question": question} for question in QUESTIONS])
    answers = []
    for size in (1, 4):
        output = tmp_path / f"answers-{size}.jsonl"
        run_here(
            "inference.py",
            *("--model_name_or_path", folder, "--data_file", rows, "--output_file", output),
            *("--batch_size", size, "--max_new_tokens", 12, *more),
        )
        answers.append(read_json(output))
    assert answers[0] == answers[1]
    assert len({row["response"] for row in answers[0]}) >= 5
