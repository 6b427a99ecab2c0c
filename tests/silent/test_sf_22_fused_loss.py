"""The fused heads give the loss and the gradients of the model's own forward pass.

`fused`: TRL's head. `cpu`: ours, that sends only supervised positions through. Each is compared with logits and
cross-entropy as transformers has them, for batches of varied length, with and without supervised tokens.
"""

import importlib.util
import types

from medicalgpt.data.batching import Collator
from medicalgpt.errors import UserError
from medicalgpt.training.trainers import add_cpu_head
from tests.helpers import open_stage, save_model, write_jsonl
from tests.silent.pairs import open_pairs, pairs, shake
from tests.tiny import tiny_tokenizer

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

PAD = 257
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sf22")
    return {tied: save_model(root / f"tied-{tied}", tiny_tokenizer(), tied=tied) for tied in (False, True)}


def row(generator: torch.Generator, length: int, prompt: int) -> dict:
    """Random ids, of which the first `prompt` are not supervised."""
    ids = torch.randint(0, 256, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def packed(*rows: dict) -> dict:
    return {
        "input_ids": sum((one["input_ids"] for one in rows), []),
        "labels": sum((one["labels"] for one in rows), []),
        "seq_lengths": [len(one["input_ids"]) for one in rows],
    }


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    """Batches as the trainer gets them; several are the accumulated batches of one step."""
    generator = torch.Generator().manual_seed(3)
    whole, long, short = (row(generator, n, prompt) for n, prompt in ((12, 0), (40, 7), (9, 4)))
    holes = row(generator, 30, 5)
    holes["labels"][10:20] = [-100] * 10
    silent, last_only = row(generator, 20, 20), row(generator, 15, 14)
    groups = {
        "one row": [[whole]],
        "varied lengths": [[long, short, whole]],
        "ignored positions within": [[holes, long]],
        "a row without supervised tokens": [[silent, short]],
        "no supervised token in a batch": [[silent, silent], [long, short]],
        "the last token alone": [[last_only, long]],
        "accumulated, unequal": [[long], [short, last_only], [whole, holes, silent]],
        "packed": [[packed(short, whole, last_only), packed(long)]],
        "packed and accumulated": [[packed(short, long)], [packed(whole, silent), packed(holes)]],
    }
    return [Collator(PAD)(group) for group in groups[kind]]


KINDS = [
    "one row",
    "varied lengths",
    "ignored positions within",
    "a row without supervised tokens",
    "no supervised token in a batch",
    "the last token alone",
    "accumulated, unequal",
    "packed",
    "packed and accumulated",
]


def load(folder: str, lora: bool, head: str | None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if head:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if head == "cpu":
        before = model.forward
        add_cpu_head(model)
        assert model.forward != before
    if lora:
        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return model


def supervised(batch: dict[str, torch.Tensor]) -> int:
    return (batch["labels"][:, 1:] != -100).sum().item()


def plain_loss(model, batch: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / count


def fused_loss(model, batch: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """As TRL's trainer takes it from the head."""
    return -model(**batch, fused_lm_head=True).log_probs.sum() / count


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["fused", "cpu"])
def test_loss_and_gradients_are_those_of_the_plain_forward(folders, head, tied, lora, kind):
    expected, found = load(folders[tied], lora, None), load(folders[tied], lora, head)
    step = batches(kind)
    count = sum(map(supervised, step))
    for batch in step:
        plain, fused = plain_loss(expected, batch, count), fused_loss(found, batch, count)
        assert fused.item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-5)
        plain.backward()
        fused.backward()
    same_gradients(gradients(found), gradients(expected))


@pytest.mark.parametrize("kind", ["varied lengths", "a row without supervised tokens"])
@pytest.mark.parametrize("head", ["fused", "cpu"])
def test_the_heads_own_loss_is_transformers_loss(folders, head, kind):
    (batch,) = batches(kind)
    own = load(folders[False], False, None)(**batch).loss
    assert load(folders[False], False, head)(**batch, fused_lm_head=True).loss.item() == pytest.approx(
        own.item(), rel=1e-5
    )


MEASURES = ("entropy", "is_top1", "mean_logits")


@pytest.mark.parametrize("kind", ["varied lengths", "ignored positions within", "no supervised token in a batch"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_cpu_heads_measures_are_trls(folders, kind, frozen, grad, bias):
    model = AutoModelForCausalLM.from_pretrained(folders[False]).eval()
    model.lm_head.requires_grad_(not frozen)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, len(model.lm_head.weight)), not frozen)
    add_fused_lm_head(model, outputs=("log_probs", *MEASURES))
    trls, batch = model.forward, batches(kind)[0]
    add_cpu_head(model)
    with torch.set_grad_enabled(grad):
        expected, found = trls(**batch, fused_lm_head=True), model(**batch, fused_lm_head=True)
    assert found.log_probs.requires_grad is grad
    for name in ("log_probs", "label_mask", *MEASURES):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype and (name == "log_probs" or not one.requires_grad)
        torch.testing.assert_close(one, other, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("frozen", [False, True])
def test_measures_that_nobody_wants_are_not_computed(folders, frozen, monkeypatch):
    """In a stage that logs none of them, and of a reference model."""
    model = AutoModelForCausalLM.from_pretrained(folders[False])
    model.lm_head.requires_grad_(not frozen)
    add_fused_lm_head(model, outputs=("log_probs", *MEASURES))
    trls, (batch,) = model.forward, batches("varied lengths")
    add_cpu_head(model)
    ours = model.forward
    model.forward = trls
    add_cpu_head(model, measured=False)
    for forward, grad, measured in (
        (ours, True, True),
        (ours, False, True),
        (model.forward, True, False),
        (model.forward, False, False),
    ):
        model.zero_grad()
        with torch.set_grad_enabled(grad):
            found, expected = forward(**batch, fused_lm_head=True), trls(**batch, fused_lm_head=True)
        assert [getattr(found, name) is not None for name in MEASURES] == [measured] * 3
        torch.testing.assert_close(found.log_probs, expected.log_probs, **CLOSE)
        if grad:
            found.log_probs.sum().backward()
            same, _ = gradients(model), model.zero_grad()
            expected.log_probs.sum().backward()
            same_gradients(same, gradients(model))


# ---------------------------------------------------------------------------------------------------------------------
# Preference pairs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--use_peft", "False")])
@pytest.mark.parametrize("stage", ["dpo_training.py", "orpo_training.py"])
def test_pairs_give_the_numbers_of_the_plain_forward(folders, tmp_path, stage, more):
    """Loss, gradients and all that is logged, with our head on a CPU as with the logits of the model itself."""
    results = []
    for plain in (False, True):
        trainer = open_pairs(stage, folders[False], tmp_path, pairs(5), *more).trainer
        shake(trainer.model)
        base = trainer.model.get_base_model() if not more else trainer.model
        if plain:
            for model in (base, getattr(trainer, "ref_model", None)):
                if model is not None:
                    model.forward = types.MethodType(plain_forward, model)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
        loss.backward()
        trainer.log({"loss": loss.item()})
        results.append((trainer.state.log_history[-1], gradients(trainer.model)))
    (found, gradient), (expected, wanted) = results
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(found) > 7
    same_gradients(gradient, wanted)


def plain_forward(self, labels: torch.Tensor, fused_lm_head: bool, **inputs) -> FusedCausalLMOutput:
    """What TRL's head and ours are to give, from all logits at once."""
    labels, logits = labels[:, 1:], self.lm_head(self.model(**inputs).last_hidden_state)[:, :-1]
    mask, scores = labels != -100, logits.log_softmax(dim=-1)
    columns = {
        "log_probs": scores.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0],
        "entropy": -(scores.exp() * scores).sum(dim=-1),
        "is_top1": logits.argmax(dim=-1) == labels,
        "mean_logits": logits.mean(dim=-1),
    }
    return FusedCausalLMOutput(label_mask=mask, **{name: x.masked_fill(~mask, 0) for name, x in columns.items()})


@pytest.mark.parametrize("more", [(), ("--use_peft", "False")])
def test_a_step_of_the_trainer_has_the_gradient_of_the_plain_loss(folders, tmp_path, more):
    """Two accumulated batches of unequal length, with the number of items that the trainer passes on."""
    rows = [{"prompt": f"Question {n}?", "response": "Answer. " * n} for n in (1, 6, 2, 11)]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    trainer = open_stage(
        "supervised_finetuning.py",
        *(
            "--model_name_or_path",
            folders[False],
            "--train_file_dir",
            tmp_path / "data",
            "--output_dir",
            tmp_path / "run",
        ),
        *("--overwrite_cache", "True", *(more or ("--lora_dropout", 0))),
    ).trainer
    model = trainer.model.train()
    step = [trainer.data_collator([trainer.train_dataset[n] for n in numbers]) for numbers in ((0, 1), (2, 3))]
    count = sum(map(supervised, step))
    items = trainer._get_num_items_in_batch(step, trainer.args.device)
    assert items == count
    trainer.current_gradient_accumulation_steps = len(step)

    for batch in step:
        plain_loss(model, batch, count).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    losses = [trainer.training_step(model, dict(batch), items) for batch in step]
    same_gradients(gradients(model), expected)
    with torch.no_grad():
        whole = sum(plain_loss(model, batch, count) for batch in step)
    assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Liger's kernels
# ---------------------------------------------------------------------------------------------------------------------

no_liger = not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None


@pytest.fixture
def liger_flags(folders, tmp_path):
    write_jsonl(
        tmp_path / "data" / "rows.jsonl", [{"prompt": "Why?", "response": "A cold. " * n} for n in (1, 6, 2, 11)]
    )
    return (
        *(
            "--model_name_or_path",
            folders[False],
            "--train_file_dir",
            tmp_path / "data",
            "--output_dir",
            tmp_path / "run",
        ),
        *("--use_liger_kernel", "True", "--overwrite_cache", "True"),
    )


def test_liger_is_refused_on_a_cpu_before_anything_is_loaded(liger_flags, tmp_path):
    with pytest.raises(UserError, match="^--use_liger_kernel needs a CUDA GPU, and this run has none. Leave it out.$"):
        open_stage("supervised_finetuning.py", *liger_flags, "--use_cpu", "True")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_with_its_command(liger_flags, monkeypatch):
    """What is asked about is the machine, not the code under test."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("medicalgpt.training.runs.is_liger_kernel_available", lambda: False)
    from medicalgpt.training.runs import _require_liger

    class OnGpu:
        use_cpu = False

    with pytest.raises(UserError, match="pip install liger-kernel"):
        _require_liger(OnGpu())


@pytest.mark.skipif(no_liger, reason="Liger's kernels need a CUDA GPU and the package liger-kernel")
@pytest.mark.parametrize("peft", [True, False])
def test_ligers_kernels_give_the_same_loss_and_gradients(liger_flags, tmp_path, peft):
    results = []
    for on in (True, False):
        trainer = open_stage(
            "supervised_finetuning.py",
            *(*liger_flags, "--use_liger_kernel", on, "--output_dir", tmp_path / f"run-{on}", "--use_peft", peft),
            *("--bf16", "False", "--dtype", "float32", *(("--lora_dropout", 0) if peft else ())),
        ).trainer
        if on:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
            forwards = [getattr(module.forward, "__func__", module.forward) for module in trainer.model.modules()]
            assert any(forward.__module__.startswith("liger_kernel") for forward in forwards)
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
        batch = {name: value.to(trainer.model.device) for name, value in batch.items()}
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        results.append((loss.item(), gradients(trainer.model)))
    (loss, found), (plain, expected) = results
    assert loss == pytest.approx(plain, rel=1e-5)
    same_gradients(found, expected)
