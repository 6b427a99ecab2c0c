"""merge_peft_adapter.py as a user runs it: the merged files compute what adapter and base did, or there are none."""

import json
import re
import shutil
from pathlib import Path

from medicalgpt.args import LoraArguments
from medicalgpt.errors import UserError
from medicalgpt.models.adapters import add_lora, attach_adapter
from medicalgpt.models.hub import Adapter, CheckpointError, fingerprint
from medicalgpt.models.loading import load_model
from template import apply_template
from tests.helpers import read_json, run_here, run_program
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from peft import PeftModel, TaskType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

SCRIPT = "merge_peft_adapter.py"


def save_adapter(path: Path, model, base: str, lora: LoraArguments, task: TaskType, record: bool = True) -> str:
    """An adapter with weights other than zero, as a stage leaves it."""
    torch.manual_seed(5)
    model = add_lora(model, lora, task)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    if record:
        run = {"stage": "some_stage", "base": {"name": base, "fingerprint": fingerprint(base)}}
        (path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return str(path)


def logits(model, ids=range(20)) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    base = make_tiny(folder / "base")
    make_tiny(folder / "other", seed=1)
    model = load_model(AutoModelForCausalLM, base)
    lora = LoraArguments(modules_to_save="lm_head")
    save_adapter(folder / "adapter", model, base, lora, TaskType.CAUSAL_LM)
    tokenizer = tiny_tokenizer()
    apply_template(tokenizer, "vicuna", "Be brief.")
    tokenizer.save_pretrained(folder / "adapter")
    # Not those of the base, whatever the template: they belong to what was trained.
    stop = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def merged(work):
    flags = ("--lora_model", work / "adapter", "--output_dir", work / "merged", "--max_shard_size", "100KB")
    return run_program(SCRIPT, *flags)


def test_the_merged_files_compute_what_adapter_and_base_did(work, merged):
    live = attach_adapter(load_model(AutoModelForCausalLM, str(work / "base")), Adapter.read(str(work / "adapter")))
    loaded = AutoModelForCausalLM.from_pretrained(work / "merged")
    assert not isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), logits(live), atol=1e-4, rtol=0)
    assert not torch.allclose(logits(loaded), logits(load_model(AutoModelForCausalLM, str(work / "base"))), atol=0.1)


def test_the_difference_is_measured_and_printed(work, merged):
    line = re.search(
        r"largest difference (\S+) \((\S+) of the largest logit\), same top token at 100.0%", merged.stderr
    )
    difference = read_json(work / "merged" / "run.json")["logit_difference"]
    assert float(line[1]) == pytest.approx(difference["absolute"], rel=0.01)
    assert 0 < difference["relative"] < 1e-4 and difference["same_choice"] == 1.0 and difference["positions"] > 50
    assert "embedding and head separate" in merged.stderr


def test_shards_and_an_index(work, merged):
    shards = sorted((work / "merged").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 200_000 for shard in shards)
    index = read_json(work / "merged" / "model.safetensors.index.json")["weight_map"]
    assert set(index.values()) == {shard.name for shard in shards}
    assert not list((work / "merged").glob("*.bin")) and not (work / "merged" / "adapter_config.json").exists()
    base = load_file(work / "base" / "model.safetensors")
    weights = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    assert weights.keys() == base.keys()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_template_system_prompt_and_stop_tokens_come_from_the_adapter(work, merged):
    tokenizer, adapters = (AutoTokenizer.from_pretrained(work / name) for name in ("merged", "adapter"))
    assert (
        tokenizer.chat_template == adapters.chat_template != AutoTokenizer.from_pretrained(work / "base").chat_template
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert "Be brief." in text
    ends = read_json(work / "adapter" / "generation_config.json")["eos_token_id"]
    assert read_json(work / "merged" / "generation_config.json")["eos_token_id"] == ends
    assert ends != read_json(work / "base" / "generation_config.json")["eos_token_id"]


def test_the_record_tells_where_it_comes_from(work, merged):
    record = read_json(work / "merged" / "run.json")
    assert (record["stage"], record["status"]) == ("merge_peft_adapter", "finished")
    assert record["adapter"] == str(work / "adapter")
    assert record["base"] == {"name": str(work / "base"), "fingerprint": fingerprint(str(work / "base"))}
    assert record["fingerprint"] == fingerprint(str(work / "merged")) != record["base"]["fingerprint"]
    assert record["adapter_run"]["stage"] == "some_stage"
    assert f"next: python inference.py --model_name_or_path {work / 'merged'}" in merged.stderr


def test_a_head_for_labels(work):
    """As reward models are; the number of labels comes from the adapter."""
    base = str(work / "base")
    model = load_model(AutoModelForSequenceClassification, base, num_labels=3)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    adapter = save_adapter(work / "classifier", model, base, LoraArguments(), TaskType.SEQ_CLS)
    done = run_program(SCRIPT, "--lora_model", adapter, "--output_dir", work / "classifier-merged")
    assert "Qwen3ForSequenceClassification" in done.stderr and "largest score) in 3 texts" in done.stderr
    assert "LOAD REPORT" not in done.stderr
    merged = AutoModelForSequenceClassification.from_pretrained(work / "classifier-merged")
    live = attach_adapter(load_model(AutoModelForSequenceClassification, base, num_labels=3), Adapter.read(adapter))
    live.config.pad_token_id = tiny_tokenizer().pad_token_id
    assert logits(merged).shape == (1, 3)
    torch.testing.assert_close(logits(merged), logits(live), atol=1e-4, rtol=0)
    # Padding on the right does not change a score, so the padding token was kept.
    padded = [*range(20), *[tiny_tokenizer().pad_token_id] * 3]
    torch.testing.assert_close(logits(merged, padded), logits(merged), atol=1e-4, rtol=0)


def test_an_adapter_whose_head_is_gone_is_refused(work, tmp_path):
    base = str(work / "base")
    model = load_model(AutoModelForSequenceClassification, base, num_labels=1)
    adapter = Path(save_adapter(tmp_path / "headless", model, base, LoraArguments(), TaskType.SEQ_CLS))
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "score" not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no head, so its outputs would be random"):
        run_here(SCRIPT, "--lora_model", adapter, "--output_dir", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_merge_that_forgets_the_padding_token_is_called_so(work, tmp_path, monkeypatch):
    """Without it the score of padded texts is read at another token."""
    from transformers import Qwen3ForSequenceClassification

    base = str(work / "base")
    model = load_model(AutoModelForSequenceClassification, base, num_labels=1)
    adapter = save_adapter(tmp_path / "rm", model, base, LoraArguments(), TaskType.SEQ_CLS)
    save = Qwen3ForSequenceClassification.save_pretrained

    def save_without(self, *args, **options):
        self.config.pad_token_id = None
        save(self, *args, **options)

    monkeypatch.setattr(Qwen3ForSequenceClassification, "save_pretrained", save_without)
    with pytest.raises(UserError, match="does not compute the same as the adapter on its base"):
        run_here(SCRIPT, "--lora_model", adapter, "--output_dir", tmp_path / "damaged")


def test_other_types_and_another_tokenizer(work):
    extended = tiny_tokenizer()
    apply_template(extended, "alpaca")
    extended.save_pretrained(work / "tokenizer")
    flags = ("--lora_model", work / "adapter", "--output_dir", work / "half", "--torch_dtype", "bfloat16")
    run_here(SCRIPT, *flags, "--tokenizer_path", work / "tokenizer")
    weights = load_file(work / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(work / "half").chat_template == extended.chat_template
    assert read_json(work / "half" / "run.json")["logit_difference"]["relative"] < 0.1


def test_an_adapter_on_a_base_that_moved(work, tmp_path):
    """The copy has the same weights, so it is the same base."""
    shutil.copytree(work / "base", tmp_path / "moved")
    flags = ("--lora_model", work / "adapter", "--model_name_or_path", tmp_path / "moved")
    run_here(SCRIPT, *flags, "--output_dir", tmp_path / "merged")
    assert fingerprint(str(tmp_path / "merged")) == fingerprint(str(work / "merged"))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_before_anything_is_written(work, merged):
    flags = ("--lora_model", work / "adapter", "--base_model", work / "other", "--output_dir", work / "never")
    done = run_program(SCRIPT, *flags, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"but {work / 'other'} has other weights" in done.stderr
    assert not (work / "never").exists()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_base_that_is_stored_quantized_is_refused(work, tmp_path, method):
    if method == "bitsandbytes":
        load_model(AutoModelForCausalLM, str(work / "base"), load_in_4bit=True).save_pretrained(tmp_path / "quantized")
    else:
        shutil.copytree(work / "base", tmp_path / "quantized")
        config = read_json(tmp_path / "quantized" / "config.json")
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    flags = ("--lora_model", work / "adapter", "--model_name_or_path", tmp_path / "quantized")
    with pytest.raises(UserError, match=rf"stored quantized \({method}\).*unquantized base with --model_name_or_path"):
        run_here(SCRIPT, *flags, "--output_dir", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_model_that_is_there_is_kept_unless_it_may_be_replaced(work, tmp_path):
    shutil.copytree(work / "other", tmp_path / "taken")
    (tmp_path / "taken" / "model-00001-of-00009.safetensors").write_bytes(b"left from before")
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    flags = ("--lora_model", work / "adapter", "--output_dir", tmp_path / "taken")
    with pytest.raises(UserError, match="already holds a model"):
        run_here(SCRIPT, *flags)
    assert fingerprint(str(work / "other")) and (tmp_path / "taken" / "model-00001-of-00009.safetensors").exists()
    run_here(SCRIPT, *flags, "--overwrite_output_dir", "True")
    assert [path.name for path in (tmp_path / "taken").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "taken" / "notes.txt").exists()


def test_the_base_and_the_adapter_are_never_written_over(work, tmp_path):
    """With --overwrite_output_dir as well: the files that the merge reads would be gone before it starts."""
    for name in ("base", "adapter"):
        shutil.copytree(work / name, tmp_path / name)
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target, how in (("base", "is"), ("adapter", "is"), ("", "contains")):
        flags = ("--lora_model", tmp_path / "adapter", "--output_dir", tmp_path / target)
        with pytest.raises(UserError, match=f"--output_dir {tmp_path / target} {how} {tmp_path}"):
            run_here(SCRIPT, *flags, "--overwrite_output_dir", "True")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_adapter_is_named(work, tmp_path):
    for place in (work / "base", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is not an adapter: it has no adapter_config.json"):
            run_here(SCRIPT, "--lora_model", place, "--output_dir", tmp_path / "never")


def test_an_unknown_task_and_a_missing_base(work, tmp_path):
    shutil.copytree(work / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    flags = ("--lora_model", tmp_path / "adapter", "--output_dir", tmp_path / "never")
    path.write_text(json.dumps({**config, "task_type": "QUESTION_ANS"}))
    with pytest.raises(UserError, match="for the task QUESTION_ANS; this program merges CAUSAL_LM, SEQ_CLS"):
        run_here(SCRIPT, *flags)
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    with pytest.raises(CheckpointError, match="was trained on /gone, which is not there"):
        run_here(SCRIPT, *flags)


def test_a_merge_that_computes_something_else_is_called_so(work, tmp_path, monkeypatch):
    """The files are read back: one damaged weight is found, and the result is not called finished."""
    from transformers import Qwen3ForCausalLM

    save = Qwen3ForCausalLM.save_pretrained

    def save_damaged(self, *args, **options):
        with torch.no_grad():
            self.model.layers[0].mlp.up_proj.weight[0] += 1
        save(self, *args, **options)

    monkeypatch.setattr(Qwen3ForCausalLM, "save_pretrained", save_damaged)
    with pytest.raises(UserError, match="does not compute the same as the adapter on its base.*Nothing was written"):
        run_here(SCRIPT, "--lora_model", work / "adapter", "--output_dir", tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    shutil.copytree(work / "other", tmp_path / "taken")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = ("--lora_model", work / "adapter", "--output_dir", tmp_path / "taken", "--overwrite_output_dir", "True")
    with pytest.raises(UserError, match="Nothing was written"):
        run_here(SCRIPT, *flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
