"""Documents that share a block do not see each other: what is computed for one is what is computed for it alone."""

from medicalgpt.data.batching import collator, pack
from medicalgpt.data.encoding import encode_document
from tests.helpers import open_stage, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

BLOCK = 64
TEXTS = ["first document, the longest here", "second", "the third one", "a document that fills most of its own block"]
ATTENTIONS = ["eager", "sdpa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sf04"))


def packed(texts, model):
    """The blocks of `texts` as one batch, as training gets them."""
    tokenizer = tiny_tokenizer()
    samples = [sample for text in texts for sample in encode_document(tokenizer, {"text": text}, block_size=BLOCK)]
    rows = Dataset.from_list([{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples])
    return collator(tokenizer, model)(list(pack(rows, BLOCK)))


def documents(batch):
    """(row, start, end) of each document in the batch, padding not counted."""
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [at for at, position in enumerate(positions) if position == 0] + [len(positions)]
        for start, end in zip(starts, starts[1:], strict=False):
            if (batch["labels"][row, start:end] != -100).any():
                yield row, start, end


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_are_those_of_the_document_alone(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    batch = packed(TEXTS, model)
    found = list(documents(batch))
    assert len(found) == len(TEXTS) and len(batch["input_ids"]) < len(TEXTS)
    assert any(start > 0 for _, start, _ in found)
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits
        for row, start, end in found:
            alone = model(input_ids=batch["input_ids"][row : row + 1, start:end]).logits[0]
            assert (together[row, start:end] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_loss_of_one_document_does_not_depend_on_the_others(folder, tmp_path, attention, gradient_checkpointing):
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"text": text} for text in TEXTS])
    trainer = open_stage(
        "pretraining.py",
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--block_size", BLOCK, "--use_peft", "False", "--gradient_checkpointing", gradient_checkpointing),
    ).trainer
    trainer.model.set_attn_implementation(attention)
    assert trainer.model.config._attn_implementation == attention
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    row, start, end = next(found for found in documents(batch) if found[1] > 0)

    def loss_of_it(ids):
        labels = torch.full_like(batch["labels"], -100)
        labels[row, start:end] = batch["labels"][row, start:end]
        changed = {**batch, "input_ids": ids, "labels": labels}
        return trainer.compute_loss(trainer.model, changed)

    loss = loss_of_it(batch["input_ids"])
    changed = batch["input_ids"].clone()
    changed[row, :start] = (changed[row, :start] + 1) % 256
    changed[row, end:] = (changed[row, end:] + 1) % 256
    assert loss_of_it(changed).item() == pytest.approx(loss.item(), rel=1e-6)

    trainer.model.zero_grad()
    loss.backward()
    gradient = trainer.model.get_input_embeddings().weight.grad
    untouched = torch.ones(len(gradient), dtype=torch.bool)
    untouched[batch["input_ids"][row, start:end]] = False
    assert gradient[~untouched].abs().max() > 0 and gradient[untouched].abs().max() == 0
    alone = trainer.model(input_ids=batch["input_ids"][row : row + 1, start:end], use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(alone, batch["input_ids"][row, start + 1 : end])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_packed_conversations_in_a_training_step(folder, tmp_path):
    rows = [{"prompt": f"Question {n}?", "response": "Answer. " * n} for n in (1, 2, 3, 5)]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    losses = {}
    for packing in (True, False):
        trainer = open_stage(
            "supervised_finetuning.py",
            *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--use_peft", "False"),
            *("--output_dir", tmp_path / str(packing), "--packing", packing, "--model_max_length", 128),
            *("--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no", "--per_device_train_batch_size", 4),
        ).trainer
        assert len(trainer.train_dataset) == (2 if packing else 4)
        trainer.train()
        losses[packing] = trainer.state.log_history[0]["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
