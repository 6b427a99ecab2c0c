"""optimizers.py: the learning rates of LoRA+, and flags that are ignored. In a stage: tests/test_adapters.py."""

from types import SimpleNamespace

from medicalgpt.errors import UserError
from medicalgpt.training.optimizers import apply_loraplus, check_flags_applied, check_optimizer
from tests.helpers import open_stage, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames


class Adapted(torch.nn.Module):
    """Parameters named as peft names them."""

    def __init__(self):
        super().__init__()
        for name in ("lora_A", "lora_B", "lora_embedding_B", "lora_magnitude_vector", "score"):
            self.add_module(name, torch.nn.ParameterDict({"default": torch.ones(2)}))
        self.layer = torch.nn.Module()
        self.layer.lora_B = torch.nn.ParameterDict({"default": torch.ones(2)})


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = Adapted()


def rates(model, optimizer):
    """{parameter: (learning rate, weight decay)}, each parameter once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(p)], (group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(names) and dict(found).keys() == set(names.values())
    return dict(found)


def grouped(model, rate=0.01):
    """As transformers builds them: one group with weight decay and one without, both with B matrices."""
    decayed = [p for name, p in model.named_parameters() if "layer" in name or "score" in name]
    others = [p for name, p in model.named_parameters() if "layer" not in name and "score" not in name]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=rate
    )


def test_b_matrices_alone_learn_faster_and_keep_their_weight_decay():
    model = Holder()
    optimizer = grouped(model)
    apply_loraplus(optimizer, model, 16)
    for name, (rate, decay) in rates(model, optimizer).items():
        assert rate == pytest.approx(0.16 if "_B" in name else 0.01), name
        assert decay == (0.1 if "layer" in name or "score" in name else 0.0), name
    assert all(group["params"] for group in optimizer.param_groups)


def test_a_schedule_scales_both_rates():
    model = Holder()
    optimizer = grouped(model)
    apply_loraplus(optimizer, model, 4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    found = rates(model, optimizer)
    assert found["base.lora_B.default"][0] == pytest.approx(0.02) and found["base.lora_A.default"][0] == 0.005


def test_a_ratio_without_b_matrices_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="--loraplus_lr_ratio has no effect on SGD"):
        apply_loraplus(torch.optim.SGD(model.parameters(), lr=0.1), model, 16)


@pytest.mark.parametrize("ratio", [0, -1])
def test_a_ratio_that_would_not_train_is_refused(ratio):
    model = Holder()
    with pytest.raises(UserError, match="above 0"):
        apply_loraplus(grouped(model), model, ratio)


# flags given -> the ones that do not arrive, for AdamW with the values below.
ARRIVED = [
    ({"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}, []),
    ({"weight_decay": 0.2}, ["--weight_decay"]),
    ({"adam_beta1": 0.7}, ["--adam_beta1"]),
    ({"adam_beta2": 0.8}, ["--adam_beta2"]),
    ({"adam_epsilon": 1e-8, "adam_beta1": 0.5}, ["--adam_beta1", "--adam_epsilon"]),
    ({"optim_args": "amsgrad=True"}, ["--optim_args amsgrad=True"]),
    ({"optim_args": "eps=1e-6, betas=0.9"}, []),
    ({"optim_args": "rank=4"}, ["--optim_args rank=4"]),
]


@pytest.mark.parametrize(("given", "lost"), ARRIVED, ids=[str(given) for given, _ in ARRIVED])
def test_each_flag_that_was_given_is_looked_for_in_the_optimizer(given, lost):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    defaults = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "optim_args": None}
    optim = SimpleNamespace(value="adamw_torch")
    args = SimpleNamespace(**{**defaults, **given}, given=frozenset(given), optim=optim)
    if not lost:
        check_flags_applied(args, optimizer)
        return
    with pytest.raises(UserError, match=f"^{', '.join(lost)} would have no effect: AdamW"):
        check_flags_applied(args, optimizer)


def test_eight_bit_optimizers_need_their_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="paged_adamw_8bit")
    args.use_muon = False
    with pytest.raises(UserError, match="--optim paged_adamw_8bit needs a package.*: pip install bitsandbytes"):
        check_optimizer(args, use_peft=True)
    args.optim = type(args.optim)("adamw_torch")
    check_optimizer(args, use_peft=True)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_every_optimizer_is_refused_at_the_start_or_resumes_exactly(tmp_path, optim):
    save_model(tmp_path / "model", tiny_tokenizer())
    write_jsonl(tmp_path / "data/rows.jsonl", [{"prompt": f"Q{n}?", "response": "y" * (n + 1)} for n in range(8)])
    flags = ("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--use_peft", "False")
    flags += ("--optim", optim, "--use_cpu", "True", "--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3)
    flags += ("--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 2, "--sample_prompts", 0)
    try:
        opened = open_stage("supervised_finetuning.py", *flags, "--output_dir", tmp_path / "whole")
        before = {name: weight.clone() for name, weight in opened.trainer.model.named_parameters()}
        opened.trainer.create_optimizer()
    except UserError as error:
        assert f"--optim {optim} " in str(error)
        return
    opened.trainer.optimizer = None
    opened.finish()
    assert any(not weight.equal(before[name]) for name, weight in opened.trainer.model.named_parameters())
    resume = ("--resume_from_checkpoint", tmp_path / "whole/checkpoint-2", "--output_dir", tmp_path / "resumed")
    open_stage("supervised_finetuning.py", *flags, *resume).finish()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(whole[name].equal(resumed[name]) for name in whole)
