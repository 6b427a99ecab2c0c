"""Adapters, frozen layers and optimizers do what their flags say, or the flag is refused."""

import importlib.util
import re

from medicalgpt.args import LoraArguments
from medicalgpt.errors import UserError
from medicalgpt.models.adapters import add_lora, attach_adapter, check_flags
from medicalgpt.models.hub import Adapter
from medicalgpt.models.loading import fit_embedding, load_tokenizer
from medicalgpt.training.trainers import TokenTrainer, check_optimizer
from tests.helpers import open_stage, read_json, run_here, run_program, save_model, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from datasets import Dataset
from peft import TaskType
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from trl import SFTConfig

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ROWS = [{"prompt": f"Why {n}?", "response": "A cold. " * n} for n in (1, 2, 3)]
STAGE = "supervised_finetuning.py"


def given(**values):
    lora = LoraArguments(**values)
    lora.given = frozenset(values)
    return lora


def extended():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["感冒", "发热"])
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {tied: save_model(root / f"tied-{tied}", tiny_tokenizer(), tied=tied) for tied in (False, True)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Weights of 64 x 128: bitsandbytes keeps smaller states in 32 bits."""
    return make_tiny(tmp_path_factory.mktemp("wide"))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def start(folder, tmp_path, *flags, rows=ROWS):
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    return open_stage(
        STAGE,
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--save_strategy", "no", "--sample_prompts", 0, *flags),
    )


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def batch(vocabulary=256):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (3, 12), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


# --- what is trained -------------------------------------------------------------------------------------------------

# flags -> what moves, as a pattern of the parameter's whole name.
TRAINED = {
    "DoRA": (["--use_dora", "True"], r"lora_[AB]\.|lora_magnitude_vector"),
    "rsLoRA": (["--use_rslora", "True"], r"lora_[AB]\."),
    "DoRA of some": (["--use_dora", "True", "--target_modules", "q_proj"], r"q_proj\.lora_"),
    "DoRA in 4 bits": (["--use_dora", "True", "--load_in_4bit", "True"], r"lora_[AB]\.|lora_magnitude_vector"),
    "frozen": (["--freeze_layers", "0"], r"layers\.1\..*lora_[AB]\."),
    "frozen, some": (
        ["--freeze_layers", "1", "--target_modules", "q_proj,v_proj"],
        r"layers\.0.*[qv]_proj\.lora_",
    ),
    "frozen, embedding in full": (
        ["--freeze_layers", "0", "--modules_to_save", "embed_tokens"],
        r"layers\.1\..*lora_[AB]\.|embed_tokens\.modules_to_save",
    ),
    "frozen, all weights": (
        ["--freeze_layers", "1", "--use_peft", "False"],
        r"layers\.0\.|embed_tokens|lm_head|model\.norm",
    ),
    "new rows": (["--tokenizer_name_or_path", "{extended}"], r"lora_[AB]\.|trainable_tokens_delta"),
    "new rows and LoRA+": (
        ["--tokenizer_name_or_path", "{extended}", "--loraplus_lr_ratio", "4"],
        r"lora_[AB]\.|trainable_tokens_delta",
    ),
    "new rows with checkpointing": (
        ["--tokenizer_name_or_path", "{extended}", "--gradient_checkpointing", "True"],
        r"lora_[AB]\.|trainable_tokens_delta",
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_moves_is_what_was_asked_for(folders, tmp_path, case):
    flags, pattern = TRAINED[case]
    extended().save_pretrained(tmp_path / "extended")
    opened = start(
        folders[False],
        tmp_path,
        *(flag.format(extended=tmp_path / "extended") for flag in flags),
        *("--learning_rate", 1e-2, "--max_steps", 3, "--max_grad_norm", 0),
        rows=[*ROWS, {"prompt": "感冒?", "response": "发热, 感冒."}],
    )
    parameters = dict(opened.trainer.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    largest = dict.fromkeys(parameters, 0.0)
    for name, parameter in parameters.items():
        if parameter.requires_grad:

            def note(found, name=name):
                largest[name] = max(largest[name], found.grad.abs().max().item())

            parameter.register_post_accumulate_grad_hook(note)
    opened.finish()
    asked = {name for name in parameters if re.search(pattern, name)}
    assert asked and {name for name, parameter in parameters.items() if parameter.requires_grad} == asked
    assert {name for name, gradient in largest.items() if gradient > 0} == asked
    assert {name for name in parameters if not before[name].equal(parameters[name].detach())} == asked
    announced = read_json(tmp_path / "out" / "run.json")["model"]
    assert announced["trainable"] == sum(parameters[name].numel() for name in asked)
    known = {part for name in asked for part in name.split(".")}
    assert set(announced["trainable_by_module"]) <= known - {"trainable_tokens_delta", "default"}


# --- the shapes of adapters ------------------------------------------------------------------------------------------


def test_rslora_scales_by_the_root_of_the_rank(folders):
    for rank, use_rslora, scale in ((4, False, 16 / 4), (4, True, 16 / 2), (64, True, 16 / 8)):
        model = add_lora(load(folders[False]), LoraArguments(lora_rank=rank, use_rslora=use_rslora), TaskType.CAUSAL_LM)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == scale


def test_dora_has_a_length_for_each_row(folders):
    model = add_lora(load(folders[False]), LoraArguments(use_dora=True), TaskType.CAUSAL_LM)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    lengths = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(lengths, layer.base_layer.weight.norm(dim=1))


@pytest.mark.parametrize(("flag", "value"), [("use_dora", True), ("use_rslora", True), ("loraplus_lr_ratio", 16.0)])
def test_flags_of_adapters_have_no_effect_on_full_training(flag, value):
    with pytest.raises(UserError, match=f"--{flag} would have no effect"):
        check_flags(given(use_peft=False, **{flag: value}), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze_layers": "2"}, "--freeze_layers 2: there is no layer 2; the model has 2 layers, 0 to 1"),
        ({"freeze_layers": "0-99999999999999"}, "there is no layer 99999999999999"),
        ({"freeze_layers": "1-0"}, "'1-0' is not a number or a range"),
        ({"freeze_layers": "0,"}, "'' is not a number"),
        ({"freeze_layers": "first"}, "'first' is not a number"),
        ({"freeze_layers": "0-1"}, "freezes all 2 layers"),
        ({"freeze_layers": "0,1", "use_peft": False}, "freezes all 2 layers"),
        ({"freeze_layers": "0", "modules_to_save": "q_proj"}, "--modules_to_save q_proj would train modules of the"),
    ],
)
def test_flags_that_cannot_be(folders, values, message):
    with pytest.raises(UserError, match=message):
        add_lora(load(folders[False]), given(**values), TaskType.CAUSAL_LM)


def test_the_shape_of_a_continued_adapter_is_its_own(folders, tmp_path):
    add_lora(load(folders[False]), LoraArguments(), TaskType.CAUSAL_LM).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--freeze_layers, --use_dora, --use_rslora would have no effect"):
        check_flags(given(use_dora=True, use_rslora=True, freeze_layers="0"), Adapter.read(str(tmp_path)))


def test_layers_are_found_whatever_they_are_called():
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=3, n_head=2))
    add_lora(model, given(use_peft=False, freeze_layers="0,2"), TaskType.CAUSAL_LM)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not re.search(r"\.h\.[02]\.", name)}


# --- new rows --------------------------------------------------------------------------------------------------------


def grown(folder, tokenizer, tmp_path, name):
    """A base whose embedding has 40 rows more than its tokenizer has tokens."""
    model = load(folder)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(tmp_path / name)
    if tokenizer:
        tokenizer.save_pretrained(tmp_path / name)
    return load(tmp_path / name)


def test_which_rows_are_new(folders, tmp_path):
    lora = LoraArguments()
    assert fit_embedding(load(folders[False]), tiny_tokenizer(), lora) == []
    assert fit_embedding(load(folders[False]), extended(), lora) == [260, 261]
    assert fit_embedding(grown(folders[False], tiny_tokenizer(), tmp_path, "spare"), extended(), lora) == [260, 261]
    # Without a tokenizer of its own, or with one that was extended in place, a base does not tell.
    assert fit_embedding(grown(folders[False], None, tmp_path, "bare"), extended(), lora) == []
    assert fit_embedding(grown(folders[False], extended(), tmp_path, "in-place"), extended(), lora) == []
    assert fit_embedding(load(folders[False]), extended(), LoraArguments(use_peft=False)) == []


def test_a_reserved_token_with_a_new_meaning_is_new(folders, tmp_path):
    own = tiny_tokenizer()
    own.add_tokens(["<reserved_0>", "<reserved_1>"])
    model = grown(folders[False], own, tmp_path, "reserved")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<reserved_0>", "感冒"])
    assert fit_embedding(model, tokenizer, LoraArguments()) == [261]


def test_another_models_tokenizer_is_refused(folders, tmp_path):
    tokenizer = tiny_tokenizer()
    other = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    other.get_vocab = lambda: {token: row for row, token in enumerate(reversed(tokens))}
    with pytest.raises(UserError, match="gives 260 of 260 ids of .* to other tokens"):
        fit_embedding(load(folders[False]), other, LoraArguments())
    lora = LoraArguments(modules_to_save="embed_tokens,lm_head")
    assert len(fit_embedding(load(folders[False]), other, lora)) == 260


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": "q_proj,lm_head"}, "--target_modules lm_head cannot hold an adapter and new rows at once"),
        ({"target_modules": "embed_tokens"}, "--target_modules embed_tokens cannot hold"),
    ],
)
def test_rows_that_cannot_be_trained_alone(folders, values, message):
    model = load(folders[False])
    rows = fit_embedding(model, extended(), given(**values))
    with pytest.raises(UserError, match=f"{message}.*--modules_to_save embed_tokens,lm_head"):
        add_lora(model, given(**values), TaskType.CAUSAL_LM, new_rows=rows)


def test_a_head_with_a_bias_is_refused_with_new_rows():
    model = PhiForCausalLM(
        PhiConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UserError, match="the head of PhiForCausalLM has a bias"):
        add_lora(model, LoraArguments(), TaskType.CAUSAL_LM, new_rows=[62, 63])


def test_a_continued_adapter_has_to_train_the_new_rows(folders, tmp_path):
    add_lora(load(folders[False]), LoraArguments(), TaskType.CAUSAL_LM).save_pretrained(tmp_path)
    model = load(folders[False])
    rows = fit_embedding(model, extended(), LoraArguments())
    with pytest.raises(UserError, match="has 2 tokens .the first has id 260. that the adapter .* does not train"):
        add_lora(model, given(), TaskType.CAUSAL_LM, adapter=Adapter.read(str(tmp_path)), new_rows=rows)


def test_new_rows_of_a_model_without_a_language_head(folders):
    model = AutoModelForSequenceClassification.from_pretrained(folders[False], num_labels=2)
    rows = fit_embedding(model, extended(), LoraArguments())
    model = add_lora(model, LoraArguments(), TaskType.SEQ_CLS, new_rows=rows)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert [name.split(".")[-3] for name in trained] == ["token_adapter", "modules_to_save"]


# --- the loss goes through what hangs on the head --------------------------------------------------------------------

HEADS = {
    "new rows": {},
    "embedding in full": {"modules_to_save": "embed_tokens"},
    "in full": {"modules_to_save": "lm_head"},
}


def head_model(folder, case):
    model = load(folder)
    lora = given(**HEADS[case], lora_dropout=0.0)
    rows = fit_embedding(model, extended(), lora) if case == "new rows" else []
    model = add_lora(model, lora, TaskType.CAUSAL_LM, new_rows=rows)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def trainer_of(model, tokenizer, tmp_path):
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    return TokenTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", HEADS)
def test_the_trainers_loss_is_that_of_the_models_own_forward(folders, tmp_path, case, tied):
    model = head_model(folders[tied], case)
    if case == "new rows":
        inputs = batch(262)
        inputs["input_ids"][:, 3::4] = 261
        inputs["labels"][:, 7] = 260
    else:
        inputs = batch()
    expected = loss_and_gradients(model, model(**inputs).loss)
    trainer = trainer_of(model, tiny_tokenizer(), tmp_path)
    found = loss_and_gradients(model, trainer.compute_loss(model, dict(inputs)))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    heads = {name: grad for name, grad in found[1].items() if "lm_head" in name or "embed_tokens" in name}
    assert heads and all(grad.abs().max() > 0 for grad in heads.values())


def granite(tied):
    """A family that divides its logits, for which TRL's own head is used, as for all on a GPU."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=3.0,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    return GraniteForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_trls_own_head_trains_new_rows_too(tmp_path, tied):
    model = add_lora(granite(tied), LoraArguments(lora_dropout=0.0), TaskType.CAUSAL_LM, new_rows=[260, 261])
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = batch(262)
    inputs["input_ids"][:, 3::4] = 261
    inputs["labels"][:, 7] = 260
    expected = loss_and_gradients(model, model(**inputs).loss)
    trainer = trainer_of(model, tiny_tokenizer(), tmp_path)
    loss, gradients = loss_and_gradients(model, trainer.compute_loss(model, dict(inputs)))
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert sum("trainable_tokens_delta" in name for name in gradients) == (1 if tied else 2)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_the_head_is_refused(folders, tmp_path, use_dora):
    lora = LoraArguments(target_modules="q_proj,lm_head", use_dora=use_dora)
    model = add_lora(load(folders[False]), lora, TaskType.CAUSAL_LM)
    with pytest.raises(UserError, match="an adapter on the head would not be trained.*--modules_to_save lm_head"):
        trainer_of(model, tiny_tokenizer(), tmp_path)


# --- merging ---------------------------------------------------------------------------------------------------------

MERGED = {
    "DoRA": ["--use_dora", "True"],
    "rsLoRA": ["--use_rslora", "True", "--lora_rank", 16],
    "DoRA and rsLoRA": ["--use_dora", "True", "--use_rslora", "True"],
    "frozen": ["--freeze_layers", "0"],
    "head": ["--target_modules", "all", "--modules_to_save", "lm_head"],
    "DoRA on new rows": ["--use_dora", "True", "--tokenizer_name_or_path", "{extended}"],
    "DoRA in 4 bits": ["--use_dora", "True", "--load_in_4bit", "True"],
}


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("case", MERGED)
def test_a_merged_adapter_computes_the_same(folders, tmp_path, case, tied):
    extended().save_pretrained(tmp_path / "extended")
    flags = [str(flag).format(extended=tmp_path / "extended") for flag in MERGED[case]]
    start(folders[tied], tmp_path, *flags, "--learning_rate", 1e-2, "--max_steps", 4).finish()
    ids = torch.arange(4, 120)[None]
    adapter = attach_adapter(load(folders[tied]), Adapter.read(str(tmp_path / "out")))
    expected = logits(adapter, ids)
    rows = min(expected.shape[-1], 260)
    assert (expected[..., :rows] - logits(load(folders[tied]), ids)).abs().max() > 0.05
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-4, rtol=0)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
    assert len(load_tokenizer(str(tmp_path / "merged"))) <= merged.config.vocab_size


# --- LoRA+ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adafactor", "lion_32bit", "sgd"])
def test_b_matrices_get_their_own_rate(folders, tmp_path, optim):
    opened = start(
        folders[False],
        tmp_path,
        *("--loraplus_lr_ratio", 16, "--learning_rate", 1e-3, "--optim", optim, "--weight_decay", 0.01),
        *("--modules_to_save", "embed_tokens", "--max_steps", 2),
    )
    optimizer = opened.trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in opened.trainer.model.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    trained = {name for name, parameter in opened.trainer.model.named_parameters() if parameter.requires_grad}
    assert rates.keys() == trained
    for name, rate in rates.items():
        assert rate == (pytest.approx(1.6e-2 if "lora_B" in name else 1e-3), 0.01), name
    opened.finish()
    shown = [entry["learning_rate"] for entry in opened.trainer.state.log_history if "learning_rate" in entry]
    assert max(shown, default=0) <= 1e-3


def test_the_b_matrices_move_by_the_ratio(folders, tmp_path):
    def steps(ratio):
        flags = ["--loraplus_lr_ratio", ratio] if ratio else []
        opened = start(
            folders[False],
            tmp_path / str(ratio),
            *("--optim", "sgd", "--learning_rate", 1e-2, "--max_steps", 1, "--lora_dropout", 0, *flags),
            *("--max_grad_norm", 0, "--modules_to_save", "lm_head"),
        )
        trained = {name: p for name, p in opened.trainer.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        opened.finish()
        return {name: p.detach() - before[name] for name, p in trained.items()}

    plain, faster = steps(None), steps(8)
    assert any("lora_B" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(faster[name], plain[name] * (8 if "lora_B" in name else 1), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("ratio", ["0", "-2"])
def test_a_ratio_that_cannot_be(folders, tmp_path, ratio):
    opened = start(folders[False], tmp_path, f"--loraplus_lr_ratio={ratio}")
    with pytest.raises(UserError, match="must be above 0"):
        opened.trainer.create_optimizer()


# --- optimizers ------------------------------------------------------------------------------------------------------

# --optim -> its class, type and largest size of its states for a weight of (128, 64).
OPTIMIZERS = {
    "adamw_torch": ("AdamW", torch.float32, {(128, 64): 2}),
    "adamw_torch_fused": ("AdamW", torch.float32, {(128, 64): 2}),
    "adamw_8bit": ("AdamW", torch.uint8, {(128, 64): 2}),
    "paged_adamw_8bit": ("AdamW", torch.uint8, {(128, 64): 2}),
    "lion_8bit": ("Lion", torch.uint8, {(128, 64): 1}),
    "lion_32bit": ("Lion", torch.float32, {(128, 64): 1}),
    "adafactor": ("Adafactor", torch.float32, {(128,): 1, (64,): 1}),
    "sgd": ("SGD", None, {}),
    "galore_adamw": ("AdamW", torch.float32, {(128, 4): 2}),
    "galore_adafactor": ("Adafactor", torch.float32, {(128,): 1, (4,): 1}),
    "apollo_adamw": ("AdamW", torch.float32, {(128, 4): 2}),
}
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch"}


def states(optimizer, parameter):
    """{shape: how many} of the states of a weight, without the tables and scales that 8-bit ones carry."""
    kept = ("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "state1", "state2", "momentum_buffer")
    return {key: value for key, value in optimizer.state[parameter].items() if key in kept and torch.is_tensor(value)}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_is_the_one_asked_for_and_as_small(wide, tmp_path, optim):
    flags = []
    if package := PACKAGES.get(optim.partition("_")[0]):
        pytest.importorskip(package)
        flags = ["--optim_args", "rank=4"]
    opened = start(wide, tmp_path, "--use_peft", "False", "--optim", optim, "--max_steps", 2, *flags)
    weight = opened.trainer.model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    opened.finish()
    assert not before.equal(weight.detach())
    optimizer = opened.trainer.optimizer.optimizer
    name, dtype, shapes = OPTIMIZERS[optim]
    assert type(optimizer).__name__ == name
    found = states(optimizer, weight)
    counted = {}
    for value in found.values():
        counted[tuple(value.shape)] = counted.get(tuple(value.shape), 0) + 1
    assert counted == shapes
    assert {value.dtype for value in found.values()} == ({dtype} if dtype else set())


def arguments(tmp_path, **values):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **values)
    args.given, args.use_muon = frozenset(values), False
    return args


@pytest.mark.parametrize(
    ("values", "use_peft", "message"),
    [
        (
            {"optim": "adamw_torch", "optim_target_modules": "all-linear"},
            False,
            "--optim adamw_torch does not use it",
        ),
        ({"optim": "galore_adamw_8bit"}, False, "--optim galore_adamw_8bit runs on GPUs only"),
        ({"optim": "galore_adamw"}, True, "adapters are low-rank already.*--use_peft False"),
        ({"optim": "galore_adamw_layerwise", "gradient_accumulation_steps": 2}, False, "gradient_accumulation_steps 1"),
        ({"optim": "apollo_adamw_layerwise", "max_grad_norm": 0.5}, False, "--max_grad_norm has no effect"),
    ],
)
def test_optimizer_flags_that_cannot_be(tmp_path, monkeypatch, values, use_peft, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=message):
        check_optimizer(arguments(tmp_path, **values), use_peft)


def test_low_rank_optimizers_take_every_linear_layer_unless_told(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for given_modules, found in (
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*\.mlp\..*", r".*\.mlp\..*"),
    ):
        args = arguments(tmp_path, optim="galore_adamw", optim_target_modules=given_modules)
        check_optimizer(args, use_peft=False)
        assert args.optim_target_modules == found


@pytest.mark.parametrize(
    ("optim", "package"), [("galore_adamw", "galore-torch"), ("apollo_adamw", "apollo-torch"), ("lomo", "lomo-optim")]
)
def test_a_missing_package_is_named_before_anything_is_read(folders, tmp_path, optim, package):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=f"--optim {optim} needs a package.*: pip install {package}"):
        start(folders[False], tmp_path, "--optim", optim, "--use_peft", "False", rows=["this is not a row"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "adafactor", "--adam_beta1", 0.8], "--adam_beta1 would have no effect: Adafactor"),
        (["--optim", "sgd", "--adam_epsilon", 1e-3], "--adam_epsilon would have no effect: SGD"),
        (["--optim", "adamw_torch", "--optim_args", "rank=4"], "--optim_args rank=4 would have no effect: AdamW"),
        (["--optim", "sgd", "--optim_args", "momentum=0.9,speed=2"], "--optim_args speed=2 would have no effect: SGD"),
        (["--optim", "sgd", "--optim_args", "momentum"], "--optim sgd cannot be used"),
    ],
)
def test_a_setting_that_does_not_reach_the_optimizer_is_refused(folders, tmp_path, flags, message):
    opened = start(folders[False], tmp_path, *flags)
    with pytest.raises(UserError, match=message):
        opened.trainer.create_optimizer()


def test_settings_that_reach_the_optimizer(folders, tmp_path):
    flags = ["--weight_decay", 0.1, "--adam_beta1", 0.8, "--adam_beta2", 0.95, "--adam_epsilon", 1e-6]
    group = start(folders[False], tmp_path, *flags).trainer.create_optimizer().param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.8, 0.95), 1e-6)
    flags = ["--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=True", "--overwrite_output_dir", "True"]
    group = start(folders[False], tmp_path, *flags).trainer.create_optimizer().param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_the_flags_from_a_command_line(folders, tmp_path):
    write_jsonl(tmp_path / "data" / "rows.jsonl", ROWS)
    run_program(
        *(STAGE, "--model_name_or_path", folders[False], "--train_file_dir", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", "--max_steps", 1, "--sample_prompts", 0, "--use_dora", "True"),
        *("--use_rslora", "True", "--loraplus_lr_ratio", 4, "--freeze_layers", "0", "--optim", "adamw_8bit"),
    )
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert (config["use_dora"], config["use_rslora"]) == (True, True)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert names and all("layers.1." in name for name in names)
