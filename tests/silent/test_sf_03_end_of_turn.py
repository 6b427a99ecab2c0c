"""The end of a turn is learned, also where padding is written with the same token."""

from medicalgpt.data.batching import Collator, pack
from medicalgpt.data.encoding import encode_chat, encode_document
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from template import apply_template
from tests.helpers import chat, run_here, save_model, write_jsonl
from tests.templates import CASES, SUPPORTED, TOKENIZERS
from tests.tiny import tiny_tokenizer

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

ANSWERS = {"What is it?": "A cold.", "And now?": "Rest in bed for three days.", "Why?": "Sleep heals."}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("sf03")
    for kind in ("byte_like_qwen", "metaspace"):
        TOKENIZERS[kind]().save_pretrained(root / kind)
    return root


@pytest.mark.parametrize("kind", ["byte_like_qwen", "metaspace"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "case"), SUPPORTED)
def test_last_label_of_every_turn_is_its_end(tokenizers, kind, packed, name, case):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers / kind)
    end = apply_template(tokenizer, name)[0]
    tokenizer.pad_token = end
    messages, tools = CASES[case][:2]
    short = encode_chat(tokenizer, chat(CASES["one_turn"][0]))
    samples = encode_chat(tokenizer, chat(messages, tools))
    rows = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in short + samples]
    if packed:
        rows = list(pack(Dataset.from_list(rows), 4000))
    batch = Collator(tokenizer.pad_token_id)(rows)
    ends = 0
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        runs = [at for at in range(len(ids)) if labels[at] != -100 and (at + 1 == len(ids) or labels[at + 1] == -100)]
        assert [tokenizer.convert_ids_to_tokens(labels[at]) for at in runs] == [end] * len(runs)
        ends += len(runs)
    assert ends == 1 + sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|pad|>"])
def test_end_of_a_document_is_supervised(pad):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", pad
    texts = ["short", "a longer document"]
    samples = [sample for text in texts for sample in encode_document(tokenizer, {"text": text}, block_size=64)]
    batch = Collator(tokenizer.pad_token_id)([{"input_ids": s.input_ids, "labels": s.labels} for s in samples])
    for text, labels in zip(texts, batch["labels"].tolist(), strict=True):
        assert [label for label in labels if label != -100] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("template", "pad", "packing"),
    [("vicuna", None, False), ("chatml", "<|im_end|>", False), ("chatml", "<|im_end|>", True)],
)
def test_model_that_knows_its_answers_stops_by_itself(tmp_path, template, pad, packing):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.pad_token = pad
    save_model(tmp_path / "model", tokenizer)
    rows = [{"prompt": question, "response": answer} for question, answer in ANSWERS.items()]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    run_here(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", "--template_name", template, "--packing", packing),
        *("--use_peft", "False", "--learning_rate", 5e-3, "--max_steps", 150, "--logging_steps", 50),
        *("--per_device_train_batch_size", 4, "--save_strategy", "no", "--sample_prompts", 0),
    )
    engine = ChatEngine.from_pretrained(str(tmp_path / "out"))
    end = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token
    assert end == ("<|endoftext|>" if template == "vicuna" else "<|im_end|>") == engine.tokenizer.pad_token
    for question, text in ANSWERS.items():
        answer = engine.chat([{"role": "user", "content": question}], Sampling(max_new_tokens=60))
        assert (answer.text.strip(), answer.finish_reason) == (text, "stop")
