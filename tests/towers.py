"""Tiny random checkpoints that take images too; transformers saves them with the names that they have on the hub."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medicalgpt.models.vision import WITH_IMAGES
from tests.families import CHATML, GDN, GEMMA, GLM4, LLAMA3, MISTRAL, Family, family_tokenizer, vllm_mark

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM

IMAGE = "<|image|>"
# Of the families that are trained on images: around an image, and in place of one and of a video.
IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIGLIP = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


@dataclass(frozen=True)
class Tower:
    """What tells one family from another.

    Attributes:
        text: tokens and template, as of a family without towers.
        settings: of the language model, on top of the sizes that all share.
        vision: of the encoder of images.
        top: of the whole.
        packs: whether it keeps packed sequences apart.
        scores: whether transformers has a class of its language model that scores.
        hub: checkpoints, for example.
        vllm: as of `Family`.
    """

    text: Family
    hub: str
    settings: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    packs: bool = True
    scores: bool = False
    vllm: bool | str | None = None


QWEN = Family("qwen3", CHATML, "<|endoftext|>")
GLMS = Family("glm4", GLM4, "<|endoftext|>")
GEMMAS = Family("gemma", GEMMA, "<eos>", "<bos>")
TOWERS = {
    "qwen3_5": Tower(
        QWEN,
        "Qwen/Qwen3.5-4B",
        LINEAR,
        {**QWEN_VISION, "num_position_embeddings": 16},
        packs=False,
        scores=True,
        vllm=GDN,
    ),
    "qwen3_5_moe": Tower(
        Family("qwen3", CHATML, "<|endoftext|>", experts=True),
        "Qwen/Qwen3.5-35B-A3B",
        {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
        {**QWEN_VISION, "num_position_embeddings": 16},
        packs=False,
        vllm=GDN,
    ),
    "qwen2_5_vl": Tower(
        QWEN, "Qwen/Qwen2.5-VL-7B-Instruct", MROPE, {**QWEN_VISION, "fullatt_block_indexes": [0]}, vllm=True
    ),
    "qwen3_vl": Tower(
        QWEN,
        "Qwen/Qwen3-VL-8B-Instruct",
        MROPE,
        {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        vllm=True,
    ),
    "qwen3_vl_moe": Tower(
        Family("qwen3", CHATML, "<|endoftext|>", experts=True),
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        {**MROPE, **EXPERTS},
        {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        vllm=True,
    ),
    "gemma3": Tower(
        GEMMAS,
        "google/gemma-3-4b-it, google/medgemma-4b-it",
        {**WINDOWS, "query_pre_attn_scalar": 8},
        SIGLIP,
        {"mm_tokens_per_image": 4},
        scores=True,
        vllm=True,
    ),
    "gemma4": Tower(
        GEMMAS,
        "google/gemma-4-E4B-it",
        {**WINDOWS, "hidden_size_per_layer_input": 4, "global_head_dim": 8},
        {
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        },
        {"audio_config": None},
        vllm=True,
    ),
    "llama4": Tower(
        Family("llama3", LLAMA3, "<|end_of_text|>", "<|begin_of_text|>", experts=True),
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        {
            **{"num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
            **{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "moe_layers": [0, 1]},
        },
        {
            **{"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28},
        },
        vllm=True,
    ),
    "mistral3": Tower(
        Family("mistral", MISTRAL, "</s>", "<s>"),
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
        {"model_type": "mistral", "sliding_window": None},
        {
            **{"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14},
        },
        {"tie_word_embeddings": False},
        scores=True,
        vllm=True,
    ),
    "glm4v": Tower(
        GLMS,
        "zai-org/GLM-4.1V-9B-Thinking",
        {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
        {**QWEN_VISION, "image_size": 28},
        vllm=True,
    ),
    "glm46v": Tower(
        GLMS,
        "zai-org/GLM-4.6V-Flash",
        {"model_type": "glm4v_text", "rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
        {**QWEN_VISION, "model_type": "glm4v_vision", "image_size": 28},
        vllm=True,
    ),
}


def as_table(chinese: bool = False) -> str:
    """The table in Markdown, as docs/models.md and its Chinese twin show it."""
    stages = ["PT", "SFT", "DPO", "合并" if chinese else "merge", "推理" if chinese else "inference"]
    columns = (
        ["4 比特", "RM", "打包", "图像", "vLLM", "Hub 上的例子"]
        if chinese
        else ["4 bit", "RM", "packing", "images", "vLLM", "on the hub, for example"]
    )
    head = ["model_type", *stages, *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, tower in TOWERS.items():
        marks = [True] * len(stages) + [not tower.text.experts, tower.scores, tower.packs, name in WITH_IMAGES]
        cells = ["✓" if mark else "✗" for mark in marks] + [vllm_mark(tower.vllm)]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {tower.hub} |")
    return "\n".join(lines)


def make_towers(
    path: str | Path,
    name: str,
    *,
    shards: str = "50GB",
    dtype: Any = None,
    tied: bool = False,
    vision: Any = None,
    **settings: Any,
) -> str:
    """Save a checkpoint of two layers with an encoder of images, a tokenizer and a processor's file.

    Args:
        shards: maximum size of a weight file.
        dtype: of the weights; by default float32.
        tied: the head is the embedding, in a family where it usually is not.
        vision: settings of the encoder of images, on top of the family's.
        settings: of the language model.
    """
    tower = TOWERS[name]
    tokenizer = family_tokenizer(tower.text)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tower.text.special, IMAGE]})
    torch.manual_seed(0)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512},
        # Wide enough that the scores of random weights differ clearly.
        **{"initializer_range": 0.1, **ends, **tower.settings, **settings},
    }
    if "hidden_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = len(tokenizer)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    config = AutoConfig.for_model(
        name,
        text_config=text,
        vision_config={"initializer_range": 0.1, **tower.vision, **(vision or {})},
        **{"image_token_id": image, "image_token_index": image, "video_token_id": image, **tower.top},
        **({"tie_word_embeddings": True} if tied else {}),
    )
    model = AutoModelForMultimodalLM.from_config(config, dtype=dtype or torch.float32)
    model.save_pretrained(path, max_shard_size=shards)
    _transpose_experts(path, name)
    tokenizer.save_pretrained(path)
    if name.startswith("qwen3_5"):
        # On the hub there is a head for several tokens at once too, which transformers does not load.
        save_file({"mtp.fc.weight": torch.randn(4, 4)}, Path(path, "mtp.safetensors"), metadata={"format": "pt"})
        _add_file(path, "mtp.safetensors", ["mtp.fc.weight"])
    Path(path, "preprocessor_config.json").write_text('{"image_processor_type": "of the base", "size": 28}\n')
    return str(path)


def _transpose_experts(folder: str | Path, name: str) -> None:
    """On the hub, the experts of Qwen3-VL are stored the other way round than transformers computes with them."""
    for path in Path(folder).glob("*.safetensors") if name == "qwen3_vl_moe" else ():
        weights = load_file(path)
        turned = {each: weight.transpose(1, 2).contiguous() for each, weight in weights.items() if ".experts." in each}
        save_file(weights | turned, path, metadata={"format": "pt"})


def _add_file(folder: str | Path, file: str, names: list[str]) -> None:
    """Write the index of a checkpoint in one file, and of one more."""
    with safe_open(Path(folder, "model.safetensors"), "pt") as opened:
        weights = dict.fromkeys(opened.keys(), "model.safetensors") | dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weights})
    Path(folder, "model.safetensors.index.json").write_text(text)


def hashes(folder: str | Path) -> dict[str, str]:
    """sha256 of the bytes of each weight, with its file, type and shape, by its name."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                digest = hashlib.sha256(raw[start:end]).hexdigest()
                found[name] = f"{path.name} {entry['dtype']} {entry['shape']} {digest}"
    return found


def make_seeing(path: str | Path, name: str, *, tied: bool = False, **vision: Any) -> str:
    """Save a checkpoint that can be trained on images, of a family of `WITH_IMAGES`, 8 x 8 pixels per token.

    Args:
        vision: settings of the encoder.
    """
    tower = TOWERS[name]
    tokenizer = family_tokenizer(tower.text)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tower.text.special, *IMAGE_TOKENS]})
    torch.manual_seed(0)
    ids = dict(zip(IMAGE_TOKENS, tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)), strict=True))
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512},
        **{"initializer_range": 0.1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        **tower.settings,
    }
    config = AutoConfig.for_model(
        name,
        text_config=text,
        vision_config={"initializer_range": 0.3, **tower.vision, "patch_size": 4, **vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        **({"tie_word_embeddings": True} if tied else {}),
    )
    AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    _transpose_experts(path, name)
    tokenizer.save_pretrained(path)
    settings = {
        **{"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"},
        **{"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096},
        **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    }
    Path(path, "preprocessor_config.json").write_text(json.dumps(settings))
    return str(path)


def is_tower(name: str) -> bool:
    return any(part in name for part in ("visual", "vision", "projector", "mtp"))


def require_whole(base: str | Path, folder: str | Path, trained: bool = True) -> None:
    """The folder is the checkpoint `base` in all but the weights of the language model."""
    before, after = hashes(base), hashes(folder)
    assert before.keys() == after.keys()
    assert {n: text.rsplit(" ", 1)[0] for n, text in before.items()} == {
        n: text.rsplit(" ", 1)[0] for n, text in after.items()
    }, "another file, type or shape"
    changed = {name for name in before if before[name] != after[name]}
    assert any(is_tower(name) for name in before) and not any(is_tower(name) for name in changed)
    assert bool(changed) == trained
    assert Path(base, "config.json").read_bytes() == Path(folder, "config.json").read_bytes()
    name = "preprocessor_config.json"
    assert Path(base, name).read_bytes() == Path(folder, name).read_bytes()
