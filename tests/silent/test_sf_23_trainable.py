"""What is said to be trained gets a gradient and moves; nothing else does."""

from tests.families import Followed, make_family
from tests.helpers import open_stage, read_json, save_model, write_jsonl
from tests.silent.trainable import LINEAR, declared
from tests.tiny import tiny_tokenizer

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

# flags -> modules with an adapter, modules that are trained in full.
CASES = {
    "all linear": ([], LINEAR, set()),
    "some linear": (["--target_modules", "q_proj,v_proj"], {"q_proj", "v_proj"}, set()),
    "embedding too": (["--modules_to_save", "embed_tokens"], LINEAR, {"embed_tokens"}),
    "embedding and head too": (["--modules_to_save", "embed_tokens,lm_head"], LINEAR, {"embed_tokens", "lm_head"}),
    "gradient checkpointing": (["--gradient_checkpointing", "True"], LINEAR, set()),
    "full": (["--use_peft", "False"], None, None),
    "full with checkpointing": (["--use_peft", "False", "--gradient_checkpointing", "True"], None, None),
}
STAGES = {
    "pretraining.py": [{"text": "".join(map(chr, range(32, 32 + 9 * n)))} for n in (3, 6, 9)],
    "supervised_finetuning.py": [{"prompt": f"Why {n}?", "response": "A cold. " * n} for n in (1, 2, 3)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sf23")
    return {tied: save_model(root / f"tied-{tied}", tiny_tokenizer(), tied=tied) for tied in (False, True)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", STAGES)
def test_what_moves_is_what_was_asked_for(folders, tmp_path, stage, case, tied):
    more, adapters, full = CASES[case]
    if tied and full:
        # One matrix serves both ends, and it hangs on the embedding.
        full = {"embed_tokens"}
    write_jsonl(tmp_path / "data" / "rows.jsonl", STAGES[stage])
    opened = open_stage(
        stage,
        *(
            "--model_name_or_path",
            folders[tied],
            "--train_file_dir",
            tmp_path / "data",
            "--output_dir",
            tmp_path / "out",
        ),
        *("--learning_rate", 1e-2, "--max_steps", 3, "--save_strategy", "no"),
        *("--sample_prompts", 0, "--max_grad_norm", 0, *more),
    )
    model = opened.trainer.model
    followed = Followed(model)
    opened.finish()

    parameters = followed.parameters
    asked = {name for name in parameters if declared(name, adapters, full)}
    if adapters is not None:
        layers = model.config.num_hidden_layers
        assert len(asked) == 2 * layers * len(adapters) + len(full)
    assert followed.declared == followed.with_gradient() == followed.moved() == asked
    announced = read_json(tmp_path / "out" / "run.json")["model"]
    assert sum(announced["trainable_by_module"].values()) == announced["trainable"]
    assert announced["trainable"] == sum(parameters[name].numel() for name in asked)
    if adapters is not None:
        assert set(announced["trainable_by_module"]) == adapters | full


def test_all_means_each_linear_layer_but_the_head(folders, tmp_path):
    write_jsonl(tmp_path / "data" / "rows.jsonl", STAGES["pretraining.py"])
    opened = open_stage(
        "pretraining.py",
        *("--model_name_or_path", folders[False], "--train_file_dir", tmp_path / "data"),
        *("--output_dir", tmp_path / "out"),
    )
    base = opened.trainer.model.get_base_model()
    adapted = {name.removesuffix(".base_layer") for name, module in base.named_modules() if hasattr(module, "lora_A")}
    linear = {
        name.removesuffix(".base_layer")
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    assert adapted == linear - {"lm_head"}


# flags -> what of a mixture of experts is trained, by the end of its name without what peft adds to it.
EXPERT_CASES = {
    "all linear and experts": ([], {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}),
    "with checkpointing": (["--gradient_checkpointing", "True"], {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}),
    "experts left as they are": (["--target_modules", "q_proj,v_proj"], {"q_proj", "v_proj"}),
    "full": (["--use_peft", "False"], None),
}


@pytest.mark.parametrize("case", EXPERT_CASES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_move_where_that_was_asked_for(tmp_path, family, case):
    """Experts are tensors of three dimensions and no linear layers: what trains those does not reach them by itself."""
    more, adapters = EXPERT_CASES[case]
    folder = make_family(tmp_path / "base", family)
    write_jsonl(tmp_path / "data" / "rows.jsonl", STAGES["supervised_finetuning.py"])
    opened = open_stage(
        "supervised_finetuning.py",
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--learning_rate", 1e-2, "--max_steps", 3, "--save_strategy", "no", "--sample_prompts", 0),
        *("--max_grad_norm", 0, *more),
    )
    followed = Followed(opened.trainer.model)
    opened.finish()
    assert followed.declared == followed.with_gradient() == followed.moved()
    announced = read_json(tmp_path / "out" / "run.json")["model"]["trainable_by_module"]
    if adapters is None:
        assert followed.declared == set(followed.parameters)
        assert {"gate_up_proj", "down_proj", "gate"} <= set(announced)
        return
    assert set(announced) == adapters
    # Two layers, two matrices; two tensors of experts in each layer.
    assert len(followed.declared) == 2 * 2 * (len(adapters) + ("experts" in adapters))
    base = AutoModelForCausalLM.from_pretrained(folder)
    apart = opened.trainer.model.merge_and_unload().state_dict()
    changed = {name.split(".")[-2] for name, old in base.state_dict().items() if not old.equal(apart[name])}
    assert changed == adapters
