"""The loss of a step is the mean over all its supervised tokens, however they are spread over micro-batches and ranks.

Each step is compared with a plain computation: the sum of the token losses of each row alone, over their number. One
step of SGD at rate 1 writes the gradient into the weights.
"""

from medicalgpt.data.encoding import encode_chat, encode_document
from tests.helpers import chat, open_stage, read_json, run_program, write_jsonl
from tests.tiny import make_tiny

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK = 120
ANSWER_LENGTHS = (1, 150, 12, 60)
# Blocks of one, two and three documents, one of them hardly filled.
DOCUMENT_LENGTHS = (115, 70, 40, 30, 40, 42, 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf01")
    make_tiny(folder / "model")
    for count in (3, 4):
        rows = [{"prompt": f"Question {length}?", "response": "x" * length} for length in ANSWER_LENGTHS[:count]]
        write_jsonl(folder / f"sft{count}" / "rows.jsonl", rows)
    write_jsonl(
        folder / "pt" / "rows.jsonl",
        [{"text": "".join(chr(97 + (i * n) % 26) for i in range(n))} for n in DOCUMENT_LENGTHS],
    )
    return folder


def flags(place, data, output, batch_size, accumulation):
    length = ["--block_size", BLOCK] if data == "pt" else []
    return [
        *("--model_name_or_path", place / "model", "--train_file_dir", place / data, "--output_dir", output),
        *("--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation, *length),
        *("--use_peft", "False", "--optim", "sgd", "--learning_rate", 1, "--lr_scheduler_type", "constant"),
        *("--max_grad_norm", 0, "--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no"),
        *("--sample_prompts", 0, "--dataloader_pin_memory", "False"),
    ]


def oracle(place, data):
    """Loss and gradients of all rows, each computed alone."""
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    rows = read_json(place / data / "rows.jsonl")
    if data == "pt":
        samples = [sample for row in rows for sample in encode_document(tokenizer, row, block_size=BLOCK)]
    else:
        chats = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            for row in rows
        ]
        samples = [sample for messages in chats for sample in encode_chat(tokenizer, chat(messages))]
    total, count = 0.0, 0
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1]
        targets = torch.tensor(sample.labels[1:])
        total = total + cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += (targets != -100).sum().item()
    loss = total / count
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found_loss, found, expected_loss, expected):
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


SPLITS = [("sft4", 4, 1), ("sft4", 1, 4), ("sft4", 2, 2), ("sft3", 4, 1), ("sft3", 1, 4), ("sft3", 2, 2)]
SPLITS += [("pt", 4, 1), ("pt", 1, 4), ("pt", 3, 2)]


@pytest.mark.parametrize(("data", "batch_size", "accumulation"), SPLITS)
def test_one_process(place, tmp_path, data, batch_size, accumulation):
    script = "pretraining.py" if data == "pt" else "supervised_finetuning.py"
    opened = open_stage(script, *flags(place, data, tmp_path, batch_size, accumulation))
    assert len(opened.trainer.train_dataset) == (3 if data == "sft3" else 4)
    before = {name: parameter.detach().clone() for name, parameter in opened.trainer.model.named_parameters()}
    opened.trainer.train()
    found = {name: before[name] - parameter.detach() for name, parameter in opened.trainer.model.named_parameters()}
    assert opened.trainer.state.global_step == 1
    assert_same(opened.trainer.state.log_history[0]["loss"], found, *oracle(place, data))


@pytest.mark.parametrize(
    ("data", "batch_size", "accumulation"), [("sft4", 1, 2), pytest.param("pt", 2, 1, marks=pytest.mark.slow)]
)
def test_two_processes(place, tmp_path, data, batch_size, accumulation):
    script = "pretraining.py" if data == "pt" else "supervised_finetuning.py"
    run_program(script, *flags(place, data, tmp_path, batch_size, accumulation), processes=2)
    before, after = load_file(place / "model" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    losses = [event["loss"] for event in read_json(tmp_path / "metrics.jsonl") if "loss" in event]
    assert len(losses) == 1
    found = {name: before[name] - after[name] for name in before}
    assert_same(losses[0], found, *oracle(place, data))
