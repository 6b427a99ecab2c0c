"""--use_muon: the update rule, which weights get it, resumes, and the flags it cannot be combined with."""

from types import SimpleNamespace

from medicalgpt.errors import UserError
from medicalgpt.training import muon
from medicalgpt.training.muon import MuonWithAdamW, muon_matrices, orthogonalize
from medicalgpt.training.optimizers import check_optimizer
from tests.helpers import open_stage, read_json, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel


@pytest.fixture
def float32(monkeypatch):
    """On any CPU the type in which results can be compared."""
    monkeypatch.setattr(muon, "cpu_has_bfloat16", lambda: False)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_singular_values_become_about_one_and_directions_stay(float32, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    a, b, c = muon.COEFFICIENTS
    wanted = s / np.linalg.norm(s)
    for _ in range(5):
        wanted = a * wanted + b * wanted**3 + c * wanted**5
    assert wanted.min() > 0.6 and wanted.max() < 1.25
    assert np.allclose(orthogonalize(matrix), (u * wanted) @ vt, atol=1e-5)


def test_two_steps_by_hand(float32):
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    bias = torch.nn.Parameter(torch.tensor([3.0]))
    group = {"params": [weight, bias], "lr": 0.1, "weight_decay": 0.5}
    defaults = torch.optim.AdamW([group]).param_groups
    optimizer = MuonWithAdamW(defaults, [weight])
    for gradient in (1.0, -2.0):
        weight.grad, bias.grad = torch.diag(torch.tensor([gradient, 2 * gradient])), torch.tensor([gradient])
        optimizer.step()
    wanted, momentum, adam = np.diag([1.0, 2.0]), np.zeros((2, 2)), 3.0
    first, second = 0.0, 0.0
    for step, gradient in enumerate((1.0, -2.0), 1):
        matrix = np.diag([gradient, 2 * gradient])
        momentum = 0.95 * momentum + 0.05 * matrix
        ahead = 0.05 * matrix + 0.95 * momentum
        values = np.diag(ahead) / np.linalg.norm(ahead)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        wanted = wanted * (1 - 0.1 * 0.5) - 0.1 * 0.2 * np.sqrt(2) * np.diag(values)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        adam = adam * (1 - 0.1 * 0.5) - 0.1 * mean / (np.sqrt(square) + 1e-8)
    assert np.allclose(weight.detach(), wanted, atol=1e-5)
    assert bias.item() == pytest.approx(adam, abs=1e-5)


def test_the_same_steps_as_the_muon_of_torch(monkeypatch):
    monkeypatch.setattr(muon, "cpu_has_bfloat16", lambda: True)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(6, 4))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.01, "weight_decay": 0.1}
    one = MuonWithAdamW(torch.optim.AdamW([{"params": [ours], **settings}]).param_groups, [ours])
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        ours.grad = torch.randn(6, 4)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_matrices_of_the_layers_only(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model", tiny_tokenizer()))
    chosen = {id(matrix) for matrix in muon_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert names == {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    assert len(muon_matrices(gpt2)) == 8
    for parameter in gpt2.transformer.h.parameters():
        parameter.requires_grad = False
    with pytest.raises(UserError, match="no layer of GPT2LMHeadModel is trained"):
        muon_matrices(gpt2)


def test_a_stage_trains_with_it_and_resumes_exactly(tmp_path):
    save_model(tmp_path / "model", tiny_tokenizer())
    write_jsonl(tmp_path / "data/rows.jsonl", [{"prompt": f"Q{n}?", "response": "y" * (n + 1)} for n in range(8)])
    flags = ("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--use_peft", "False")
    flags += ("--use_muon", "True", "--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3, "--sample_prompts", 0)
    flags += ("--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 2, "--use_cpu", "True")
    open_stage("supervised_finetuning.py", *flags, "--output_dir", tmp_path / "whole").finish()
    lines = {line["name"]: line for line in read_json(tmp_path / "whole/run.json")["observed"]}
    assert lines["optimizer"]["observed"].startswith("MuonWithAdamW")
    assert lines["optimizer"]["agrees"] and lines["in the optimizer"]["agrees"]
    resume = ("--resume_from_checkpoint", tmp_path / "whole/checkpoint-2", "--output_dir", tmp_path / "resumed")
    open_stage("supervised_finetuning.py", *flags, *resume).finish()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(whole[name].equal(resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "adapter has none. Add --use_peft False"),
        (("--use_peft", "False", "--optim", "adafactor"), "AdamW, not --optim adafactor"),
    ],
    ids=["adapter", "optimizer"],
)
def test_what_it_cannot_be_combined_with(tmp_path, more, reason):
    save_model(tmp_path / "model", tiny_tokenizer())
    write_jsonl(tmp_path / "data/rows.jsonl", [{"prompt": "Q?", "response": "y"}] * 4)
    flags = ("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--use_muon", "True")
    with pytest.raises(UserError, match=reason):
        open_stage("supervised_finetuning.py", *flags, "--output_dir", tmp_path / "out", *more)


def test_sharded_weights_are_refused():
    adamw = SimpleNamespace(value="adamw_torch")
    args = SimpleNamespace(optim=adamw, use_muon=True, deepspeed="zero2.json", fsdp=None, use_cpu=True)
    with pytest.raises(UserError, match="DeepSpeed and FSDP shard them"):
        check_optimizer(args, use_peft=False)
