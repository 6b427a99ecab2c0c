"""Checkpoints that take images too: their language model is trained, and comes back within the whole checkpoint."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

from grpo_training import resolve_policy
from medicalgpt.args import LoraArguments, ModelArguments
from medicalgpt.data.batching import Collator
from medicalgpt.errors import UserError
from medicalgpt.models import adapters, families, hub, loading, towers
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from tests.families import Followed, stage_flags
from tests.helpers import ROOT, open_stage, read_json, run_here, write_jsonl
from tests.matrix import REWARDS
from tests.silent.ppo import save_reward_model
from tests.towers import TOWERS, as_table, hashes, is_tower, make_towers, require_whole

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PT, SFT, DPO, RM = "pretraining.py", "supervised_finetuning.py", "dpo_training.py", "reward_modeling.py"
ROWS = {
    PT: [{"text": f"Document {n}: " + "abcdefgh " * n} for n in (1, 4, 7, 2)],
    SFT: [{"prompt": f"Why {n}?", "response": "A cold. " * n} for n in (1, 4, 2)],
    DPO: [{"prompt": f"Why {n}?", "chosen": "A cold. " * n, "rejected": "No."} for n in (1, 3, 2)],
}
ROWS[RM] = ROWS[DPO]
IDS = torch.arange(40).reshape(2, 20)
# One of which transformers has the language model alone, one of which it has the whole only.
QUICK = ("gemma3", "qwen2_5_vl")
EACH = [pytest.param(name, marks=() if name == QUICK[0] else pytest.mark.slow) for name in TOWERS]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for stage, rows in ROWS.items():
        write_jsonl(root / stage / "rows.jsonl", rows)
    return root


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def whole_logits(folder, dtype=torch.float32):
    """Of the class that takes images, as other programs load it."""
    model, info = AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return logits(model)


def train(stage, *options):
    """Train; returns the trainer and the model's logits. What is declared trainable moves, and nothing else."""
    opened = open_stage(stage, *options)
    model = opened.trainer.model
    assert not any(is_tower(name) for name, _ in model.named_parameters()), "the encoders take memory"
    followed = Followed(model)
    metrics = opened.finish()
    assert math.isfinite(metrics["train_loss"])
    assert followed.moved() == followed.declared
    if "--use_peft" in options:
        assert followed.declared == set(followed.parameters)
    else:
        assert all(".lora_" in name or ".score." in name for name in followed.declared)
    return opened.trainer, None if stage == RM else logits(model)


@pytest.mark.parametrize("name", EACH)
def test_adapter_merge_and_all_weights(name, data, tmp_path):
    base = make_towers(tmp_path / "base", name)
    model = loading.load_model(AutoModelForCausalLM, base)
    # FSDP looks for each of them.
    assert model._no_split_modules and model._no_split_modules <= {type(each).__name__ for each in model.modules()}
    plain = logits(model)
    torch.testing.assert_close(plain, whole_logits(base))
    assert plain.std() > 0.3, "logits that hardly differ would show nothing"

    template = ("--template_name", TOWERS[name].text.template)
    _, live = train(SFT, *stage_flags(data, SFT, base, tmp_path / "lora", *template))
    assert (live - plain).abs().max() > 0.01, "the adapter has no effect"
    loaded = loading.load_model(AutoModelForCausalLM, base)
    again = adapters.attach_adapter(loaded, hub.Adapter.read(str(tmp_path / "lora")))
    torch.testing.assert_close(logits(again), live, rtol=1e-4, atol=1e-4)

    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "lora", "--output_dir", tmp_path / "merged")
    require_whole(base, tmp_path / "merged")
    torch.testing.assert_close(whole_logits(tmp_path / "merged"), live, rtol=1e-4, atol=1e-4)

    _, live = train(SFT, *stage_flags(data, SFT, tmp_path / "merged", tmp_path / "full", "--use_peft", "False"))
    require_whole(tmp_path / "merged", tmp_path / "full")
    torch.testing.assert_close(whole_logits(tmp_path / "full"), live, rtol=1e-4, atol=1e-4)
    for folder in ("lora", "merged", "full"):
        engine = ChatEngine.from_pretrained(str(tmp_path / folder))
        assert engine.stop_ids >= set(read_json(tmp_path / folder / "generation_config.json")["eos_token_id"])
        engine.chat([{"role": "user", "content": "Why 1?"}], Sampling(max_new_tokens=4))


@pytest.mark.parametrize(("page", "chinese"), [("models.md", False), ("models_zh.md", True)])
def test_the_page_lists_the_families_that_are_tested(page, chinese):
    assert as_table(chinese) in (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert tuple(TOWERS) == families.TESTED_WITH_TOWERS


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_every_stage(name, data, tmp_path):
    tower = TOWERS[name]
    base = make_towers(tmp_path / "base", name)
    template = ("--template_name", tower.text.template)
    packing = () if tower.packs else ("--packing", "False")
    train(PT, *stage_flags(data, PT, base, tmp_path / "pt", "--use_peft", "False", *packing))
    require_whole(base, tmp_path / "pt")
    train(DPO, *stage_flags(data, DPO, base, tmp_path / "dpo", *template))
    quantized = stage_flags(data, SFT, base, tmp_path / "4bit", "--load_in_4bit", "True", *template)
    if tower.text.experts:
        with pytest.raises(UserError, match=r"reaches \d+% of the .* omit it"):
            open_stage(SFT, *quantized)
    else:
        train(SFT, *quantized)
        run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "4bit", "--output_dir", tmp_path / "merged")
        require_whole(base, tmp_path / "merged")
    scored = stage_flags(data, RM, base, tmp_path / "rm", *template)
    if not tower.scores:
        with pytest.raises(UserError, match="no model with a scoring head"):
            open_stage(RM, *scored)
        return
    train(RM, *scored)
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "rm", "--output_dir", tmp_path / "rm-merged")
    assert not any(is_tower(each) for each in hashes(tmp_path / "rm-merged"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_packing_and_batches(name, tmp_path):
    base = make_towers(tmp_path / "base", name)
    engine = ChatEngine.from_pretrained(base)
    if TOWERS[name].packs:
        families.require_separate_packs(engine.model, Collator(0))
    else:
        with pytest.raises(UserError, match="--packing False: each row is then a sequence of its own"):
            families.require_separate_packs(engine.model, Collator(0))
    questions = ["?", "感冒了怎么办？", "Why? " * 12, "A long one: " + "xyz " * 30, "我头痛。" * 5]
    prompts = [engine.prompt_ids([{"role": "user", "content": each}]) for each in questions]
    alone = [engine.batch([prompt], Sampling(max_new_tokens=12))[0] for prompt in prompts]
    assert len({answer.text for answer in alone}) >= 4
    assert engine.batch(prompts, Sampling(max_new_tokens=12), batch_size=5) == alone


@pytest.mark.parametrize("name", QUICK)
def test_files_types_and_rows_of_the_whole(name, tmp_path):
    """In several files, in bfloat16, with rows for new tokens and stretched positions."""
    base = make_towers(tmp_path / "base", name, shards="60KB", dtype=torch.bfloat16)
    assert len(list(Path(base).glob("*.safetensors"))) > 1
    model = loading.load_model(AutoModelForCausalLM, base, dtype="bfloat16")
    model.save_pretrained(tmp_path / "same")
    assert towers.complete(tmp_path / "same", model)
    require_whole(base, tmp_path / "same", trained=False)
    assert read_json(tmp_path / "same" / "model.safetensors.index.json") == read_json(
        Path(base, "model.safetensors.index.json")
    )

    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    rope = model.config.get_text_config().rope_parameters
    config = hub.load_pretrained(AutoConfig, base)
    if "rope_type" in rope:
        config.get_text_config().rope_parameters = {**rope, **scaled}
    grown = loading.load_model(AutoModelForCausalLM, base, config=config, dtype="float32")
    rows = grown.get_input_embeddings().num_embeddings
    grown.resize_token_embeddings(rows + 3)
    grown.save_pretrained(tmp_path / "grown")
    towers.complete(tmp_path / "grown", grown)
    torch.testing.assert_close(whole_logits(tmp_path / "grown"), logits(grown))
    found = AutoConfig.from_pretrained(tmp_path / "grown")
    assert type(found).model_type == name and found.get_text_config().vocab_size == rows + 3
    assert found.dtype == torch.float32 and found.vision_config.to_dict() == config.vision_config.to_dict()
    if "rope_type" in rope:
        assert found.get_text_config().rope_parameters["factor"] == 2.0
    kept = {each: text for each, text in hashes(base).items() if is_tower(each)}
    assert kept and kept == {each: text for each, text in hashes(tmp_path / "grown").items() if is_tower(each)}


def test_rows_of_embeddings_in_each_layer_cannot_grow(tmp_path):
    base = make_towers(tmp_path / "base", "gemma4")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="in those of its layers, which cannot grow in gemma4_text"):
        loading.add_missing_rows(loading.load_model(AutoModelForCausalLM, base), tokenizer)


def test_settings_at_the_top_and_a_tied_head(tmp_path):
    """As in the checkpoints of Qwen2.5-VL: no `text_config`, and the small ones have no head of their own."""
    base = make_towers(tmp_path / "base", "qwen2_5_vl", tied=True)
    config = read_json(Path(base, "config.json"))
    config |= config.pop("text_config") | {"model_type": "qwen2_5_vl", "tie_word_embeddings": True}
    Path(base, "config.json").write_text(json.dumps(config))
    model = loading.load_model(AutoModelForCausalLM, base, dtype="float32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model), whole_logits(base))
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 3)
    model.save_pretrained(tmp_path / "grown")
    towers.complete(tmp_path / "grown", model)
    torch.testing.assert_close(whole_logits(tmp_path / "grown"), logits(model))
    assert read_json(tmp_path / "grown" / "config.json") == config | {"vocab_size": rows + 3}


def test_a_tied_head_that_was_gathered_apart(tmp_path):
    """FSDP saves the matrix under both of its names."""
    base = make_towers(tmp_path / "base", "gemma3")
    model = loading.load_model(AutoModelForCausalLM, base)
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    towers.complete(tmp_path / "out", model)
    require_whole(base, tmp_path / "out", trained=False)


@pytest.mark.parametrize(("name", "said"), [("mistral3", None), ("qwen2_5_vl", True)])
def test_a_head_that_is_not_tied_where_the_configuration_does_not_say_so(tmp_path, name, said):
    """As in the checkpoints of Mistral 3, which say nothing: tied is the library's default."""
    base = make_towers(tmp_path / "base", name)
    config = read_json(Path(base, "config.json")) | {"tie_word_embeddings": said}
    if said is None:
        del config["tie_word_embeddings"]
    Path(base, "config.json").write_text(json.dumps(config))
    model = loading.load_model(AutoModelForCausalLM, base)
    assert not model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model), whole_logits(base))


def test_resumed_training_of_all_weights_is_the_same(data, tmp_path):
    base = make_towers(tmp_path / "base", "qwen2_5_vl")
    options = ("--use_peft", "False", "--template_name", "qwen3", "--max_steps", 2, "--save_steps", 1)
    for out in ("whole", "resumed"):
        given = stage_flags(data, SFT, base, tmp_path / out, *options)
        given[given.index("--save_strategy") + 1] = "steps"
        open_stage(SFT, *given).finish()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-2")
    for path in (tmp_path / "resumed").glob("*.safetensors"):
        path.unlink()
    record = read_json(tmp_path / "resumed" / "run.json") | {"status": "failed"}
    (tmp_path / "resumed" / "run.json").write_text(json.dumps(record))
    open_stage(SFT, *given, "--resume_from_checkpoint", tmp_path / "resumed" / "checkpoint-1").finish()
    require_whole(base, tmp_path / "resumed")
    torch.testing.assert_close(whole_logits(tmp_path / "resumed"), whole_logits(tmp_path / "whole"))


def test_a_checkpoint_whose_language_model_is_another_is_refused(tmp_path):
    base = make_towers(tmp_path / "base", "gemma3")
    path = Path(base, "model.safetensors")
    weights = load_file(path)
    lost = weights.pop("language_model.model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it lacks model.layers.1.mlp.up_proj.weight\. Get the complete"):
        loading.load_model(AutoModelForCausalLM, base)
    weights["language_model.model.layers.1.mlp.up_proj.weight"] = lost
    save_file({**weights, "language_model.model.layers.1.mlp.extra.weight": lost.clone()}, path)
    with pytest.raises(UserError, match=r"Gemma3ForCausalLM has no model.layers.1.mlp.extra.weight"):
        loading.load_model(AutoModelForCausalLM, base)


def test_shards_of_a_whole_checkpoint_are_those_of_the_base(data, tmp_path):
    base = make_towers(tmp_path / "base", "gemma3")
    open_stage(SFT, *stage_flags(data, SFT, base, tmp_path / "lora", "--template_name", "gemma")).finish()
    merge = ("--lora_model", tmp_path / "lora", "--output_dir", tmp_path / "merged", "--max_shard_size", "1GB")
    with pytest.raises(UserError, match="--max_shard_size would have no effect"):
        run_here("merge_peft_adapter.py", *merge)


def test_the_template_of_the_base_is_kept(data, tmp_path):
    base = make_towers(tmp_path / "base", "gemma3")
    tokenizer = AutoTokenizer.from_pretrained(base)
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ 'images: ' + messages[0]['content'] }}"
    tokenizer.save_pretrained(base)
    options = stage_flags(data, SFT, base, tmp_path / "full", "--use_peft", "False", "--template_name", "gemma")
    open_stage(SFT, *options).finish()
    assert (tmp_path / "full" / towers.BASE_TEMPLATE).read_text() == tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "full").chat_template == original


def test_grpo_does_not_sample_with_vllm(tmp_path):
    base = make_towers(tmp_path / "base", "gemma3")
    models = (ModelArguments(model_name_or_path=base), LoraArguments())
    assert resolve_policy(SimpleNamespace(use_vllm=False), *models).source == base
    with pytest.raises(UserError, match="--use_vllm True: .* takes images or audio too"):
        resolve_policy(SimpleNamespace(use_vllm=True), *models)


@pytest.mark.slow
def test_ppo_leaves_the_whole_checkpoint_too(tmp_path):
    """Of the two models that PPO trains, the policy is saved."""
    base = make_towers(tmp_path / "base", "gemma3")
    save_reward_model(tmp_path / "rm", AutoTokenizer.from_pretrained(base))
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"prompt": f"Why {n}?"} for n in range(8)])
    models = ("--sft_model_path", base, "--reward_model_path", tmp_path / "rm", "--output_dir", tmp_path / "out")
    more = ("--train_file_dir", tmp_path / "data", "--response_length", 5, "--max_steps", 1, "--sample_prompts", 0)
    sizes = ("--per_device_train_batch_size", 2, "--num_mini_batches", 1, "--save_strategy", "no")
    opened = open_stage("ppo_training.py", *models, *more, *sizes, "--use_peft", "False", "--learning_rate", 1e-2)
    opened.finish()
    require_whole(base, tmp_path / "out")
    torch.testing.assert_close(whole_logits(tmp_path / "out"), logits(opened.trainer.policy), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_grpo_leaves_the_whole_checkpoint_too(name, tmp_path):
    base = make_towers(tmp_path / "base", name)
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(8)])
    (tmp_path / "rewards.py").write_text(REWARDS)
    rewards = ("--reward_file", tmp_path / "rewards.py", "--reward_funcs", "sizes")
    models = ("--model_name_or_path", base, "--train_file_dir", tmp_path / "data")
    more = ("--template_name", TOWERS[name].text.template, "--max_steps", 1, "--sample_prompts", 0, "--beta", 0.1)
    sizes = ("--per_device_train_batch_size", 4, "--num_generations", 4, "--max_completion_length", 5)
    flags = (*models, *more, *sizes, *rewards, "--save_strategy", "no", "--learning_rate", 1e-2)

    opened = open_stage("grpo_training.py", *flags, "--output_dir", tmp_path / "full", "--use_peft", "False")
    assert not any(is_tower(each) for each, _ in opened.trainer.model.named_parameters())
    assert not any(is_tower(each) for each, _ in opened.trainer.ref_model.named_parameters())
    opened.finish()
    require_whole(base, tmp_path / "full")
    torch.testing.assert_close(whole_logits(tmp_path / "full"), logits(opened.trainer.model), rtol=1e-4, atol=1e-4)

    opened = open_stage("grpo_training.py", *flags, "--output_dir", tmp_path / "lora")
    opened.finish()
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "lora", "--output_dir", tmp_path / "merged")
    require_whole(base, tmp_path / "merged")
    torch.testing.assert_close(whole_logits(tmp_path / "merged"), logits(opened.trainer.model), rtol=1e-4, atol=1e-4)
