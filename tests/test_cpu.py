"""cpu.py: the head on supervised positions only, with the numbers of the model's own forward; dropout; memory."""

import platform

from medicalgpt.training.cpu import (
    CHUNK,
    LeanDropout,
    add_cpu_head,
    replace_lora_dropout,
    score_targets,
)
from tests.helpers import ROOT, run_program
from tests.tiny import make_tiny

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def batch(supervised: bool = True):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (3, 12), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1] = -100
    if not supervised:
        labels[:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("adapter", [False, True])
def test_loss_and_gradients_are_those_of_the_models_own_forward(path, adapter):
    model = AutoModelForCausalLM.from_pretrained(path)
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    inputs = batch()
    model(**inputs).loss.backward()
    expected = gradients(model)
    own = model(**inputs).loss.item()

    base = model.get_base_model() if adapter else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    with torch.no_grad():
        fused = model(**inputs, fused_lm_head=True)
    add_cpu_head(base)
    ours = model(**inputs, fused_lm_head=True, use_cache=True, num_items_in_batch=7)
    (-ours.log_probs.sum() / ours.label_mask.sum()).backward()
    found = gradients(model)

    assert ours.loss.item() == pytest.approx(own, rel=1e-6)
    for name in ("log_probs", "entropy", "is_top1", "mean_logits", "label_mask"):
        torch.testing.assert_close(getattr(ours, name).float(), getattr(fused, name).float(), rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_position_of_each_chunk_is_scored(frozen, bias, count):
    """Also one that is alone in the last chunk, which no mean over a thousand positions would show."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, bias).requires_grad_(not frozen)
    hidden, targets, upstream = torch.randn(count, 8), torch.randint(30, (count,)), torch.randn(count)

    def scored(score):
        leaf = hidden.clone().requires_grad_()
        columns = score(leaf)
        (columns["log_probs"] * upstream).sum().backward()
        found = {**columns, "gradient": leaf.grad, **gradients(head)}
        return {name: column.detach().float() for name, column in found.items()}

    def plain(leaf):
        logits = head(leaf)
        log_probs = logits.log_softmax(dim=-1)
        return {
            "log_probs": log_probs[range(count), targets],
            "entropy": -(log_probs.exp() * log_probs).sum(dim=-1),
            "is_top1": logits.argmax(dim=-1) == targets,
            "mean_logits": logits.mean(dim=-1),
        }

    expected, found = scored(plain), scored(lambda leaf: score_targets(head, leaf, targets))
    assert found.keys() == expected.keys() and ("weight" in found) is not frozen
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_only_supervised_positions_go_through_the_head(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    add_cpu_head(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    inputs = batch()
    model(**inputs, fused_lm_head=True)
    assert seen == [(inputs["labels"][:, 1:] != -100).sum().item()]


def test_a_batch_without_supervised_tokens_gives_zero_and_no_nan(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    add_cpu_head(model)
    output = model(**batch(supervised=False), fused_lm_head=True)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_generation_is_unchanged(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = batch()["input_ids"][:1]
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    add_cpu_head(model)
    assert torch.equal(before, model.generate(ids, max_new_tokens=5, do_sample=False))


def test_a_family_that_changes_its_logits_keeps_trls_way(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.config.final_logit_softcapping = 30.0
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    before = model.forward
    add_cpu_head(model)
    assert model.forward == before


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_dropout_scales_what_it_keeps_and_keeps_a_byte_a_number(rate):
    """In training a share is 0, the rest is scaled, with the gradient of that; otherwise nothing changes."""
    dropout, numbers = LeanDropout(rate), torch.ones(20_000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = dropout(numbers)
    output.sum().backward()
    zeros = output == 0
    assert zeros.float().mean().item() == pytest.approx(rate, abs=0.02)
    assert rate == 1 or output[~zeros].unique().tolist() == [pytest.approx(1 / (1 - rate))]
    assert torch.equal(numbers.grad, output.detach())
    assert sum(tensor.nbytes for tensor in kept) <= len(numbers)
    assert dropout.eval()(numbers) is numbers
    none = LeanDropout(0.0)
    assert none(numbers) is numbers


def test_only_the_dropout_of_adapters_is_replaced(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.dropout = torch.nn.Dropout(0.2)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.1))
    replace_lora_dropout(adapted)
    found = {name: module for name, module in adapted.named_modules() if isinstance(module, torch.nn.Dropout)}
    ours = {name for name, module in found.items() if type(module) is LeanDropout}
    assert ours == {name for name in found if "lora_dropout" in name} and {found[name].p for name in ours} == {0.1}
    assert type(model.model.dropout) is torch.nn.Dropout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of other systems is left alone")
def test_freed_memory_goes_back_to_the_system(tmp_path):
    """glibc would keep such blocks once one was freed. In a process whose heap has no room for them yet."""
    script = tmp_path / "freed.py"
    script.write_text(FREED)
    shares = run_program(script, env={"PYTHONPATH": str(ROOT)}).stdout.split()
    assert len(shares) == 3 and all(float(share) > 0.9 for share in shares)


FREED = """
import resource
from pathlib import Path
import torch
from medicalgpt.training.cpu import return_freed_memory


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


return_freed_memory()
for _ in range(3):
    block = torch.ones(4 * 2**20)
    before = resident()
    del block
    print((before - resident()) / 2**24)
"""
