"""A merged checkpoint of each family is loaded by real vLLM on the CPU, and says there what it says here: the same
greedy ids, or vLLM does not take the family, for the reason in the table of the families, or it answers otherwise.

Of those that take images too vLLM loads the whole, with the encoder of images, as any other program does. It needs an
environment with vLLM, and torchvision in it, which `bash scripts/vllm_deployment.sh` leaves out on a CPU:

    VLLM_VENV=.venv-vllm bash scripts/run_tests.sh -m slow tests/silent/test_sf_26_vllm_families.py
"""

import json
import os
import subprocess

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from tests.families import FAMILIES, make_family, stage_flags
from tests.helpers import ROOT, run_here, write_jsonl
from tests.towers import TOWERS, make_towers
from tests.vllm_server import VENV, needs_vllm

import pytest

IMPORTS = "from torchvision.transforms.v2 import functional"
needs_torchvision = pytest.mark.skipif(
    not (VENV / "bin" / "python").is_file()
    or subprocess.run([VENV / "bin" / "python", "-c", IMPORTS], capture_output=True).returncode != 0,
    reason=f"{VENV} lacks torchvision, which vLLM needs for these models",
)
pytestmark = [pytest.mark.slow, needs_vllm, pytest.mark.timeout(1_800), pytest.mark.usefixtures("one_thread")]

QUESTIONS = ("Why?", "感冒了怎么办？", "Is it a cold?", "Hi", "Where?", "A and B?")
# What vLLM's attention on a CPU can compute.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 1024}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}}
QWEN_VL = {
    **{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2},
    **{"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
}
WIDE = {"out_hidden_size": 128, "hidden_size": 64}
GLM_ROPE = {"rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
GLM_VL = {**QWEN_VL, "image_processor_type": "Glm46VImageProcessor", "processor_class": "Glm46VProcessor"}
# The sizes that vLLM's kernel for compressed keys and values on a CPU has; the one it prefers takes no float32.
LATENT = {
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
# Settings of the language model and of the encoder, and what the processor is made of, where the usual ones do not do.
SETTINGS = {
    "qwen2_5_vl": (ROPE, WIDE, {**QWEN_VL, "patch_size": 14, "processor_class": "Qwen2_5_VLProcessor"}),
    "qwen3_vl": (ROPE, WIDE, {**QWEN_VL, "processor_class": "Qwen3VLProcessor"}),
    # As on the hub; transformers does so whatever it says.
    "qwen3_vl_moe": ({**ROPE, "norm_topk_prob": True}, WIDE, {**QWEN_VL, "processor_class": "Qwen3VLProcessor"}),
    "gemma4": ({"global_head_dim": 32}, {}, {}),
    "llama4": ({"attention_chunk_size": 128}, {}, {}),
    "glm4v": (GLM_ROPE, WIDE, {}),
    "glm46v": (GLM_ROPE, WIDE, {**GLM_VL, "patch_size": 14}),
    # vLLM pads experts to a multiple of 32, but not these.
    "gpt_oss": ({"intermediate_size": 64}, {}, {}),
    # As on the hub.
    "minimax_m2": ({"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}, {}, {}),
    # Heads of 32.
    "minicpm3": ({"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}, {}, {}),
    # The window is longer than the texts: that of vLLM is one token longer than that of transformers.
    "cohere2": ({"sliding_window": 1024}, {}, {}),
    "deepseek_v2": ({**LATENT, "scoring_func": "softmax", "topk_method": "greedy"}, {}, {}),
    "deepseek_v3": (LATENT, {}, {}),
    "glm4_moe_lite": (LATENT, {}, {}),
    "lfm2": ({"conv_dim": 128, "block_dim": 128}, {}, {}),
}
# Of random weights, whose embedding is the head too, these repeat one token; they learn different answers first.
STEPS = dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma3", "gemma4"), 60)
# Float32 sums in another order; a token that leads by less could fall the other way.
CLOSE = 1e-3
ALL = {**FAMILIES, **TOWERS}
TRIED = [
    pytest.param(name, marks=needs_torchvision if name in TOWERS else ()) for name in ALL if ALL[name].vllm is not None
]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Asks vLLM for greedy ids of a checkpoint; returns them, or the log if it fails."""
    folder = tmp_path_factory.mktemp("vllm")
    process = subprocess.Popen(
        [VENV / "bin" / "python", ROOT / "tests" / "silent" / "vllm_process.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        text=True,
    )

    def ask(checkpoint, prompts, flat=False, **options):
        files = {"result": str(folder / "said.json"), "log": str(folder / "log.txt")}
        job = {"folder": str(checkpoint), "prompts": prompts, "options": options, "flat": flat, **files}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        code = process.stdout.readline().strip()
        return json.loads((folder / "said.json").read_text()) if code == "0" else (folder / "log.txt").read_text()

    yield ask
    process.stdin.close()
    process.wait(60)


@pytest.mark.parametrize("name", TRIED)
def test_vllm_says_what_the_merged_checkpoint_says(name, vllm, tmp_path):
    settings, vision, processor = SETTINGS.get(name, ({}, {}, {}))
    if name in TOWERS:
        base = make_towers(tmp_path / "base", name, vision=vision, **{**SIZES, **settings})
        if processor:
            (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
        template, options = TOWERS[name].text.template, {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    else:
        own = {size: value for size, value in SIZES.items() if size == "hidden_size" or size not in ALL[name].config}
        base = make_family(tmp_path / "base", name, **{**own, **settings})
        template, options = ALL[name].template, {"attention_backend": "CPU_MLA"} if "kv_lora_rank" in settings else {}
    stage = "supervised_finetuning.py"
    answers = [f"Answer {number}, 答案。 " * number for number in range(1, 7)]
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in zip(QUESTIONS, answers, strict=True)]
    write_jsonl(tmp_path / stage / "rows.jsonl", rows)
    given = stage_flags(tmp_path, stage, base, tmp_path / "sft", "--template_name", template)
    given[given.index("--max_steps") + 1] = STEPS.get(name, 3)
    run_here(stage, *given)
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "sft", "--output_dir", tmp_path / "merged")

    engine = ChatEngine.from_pretrained(str(tmp_path / "merged"))
    prompts = [engine.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    ours = [engine.batch([prompt], Sampling(max_new_tokens=32, top_log_probs=2))[0] for prompt in prompts]
    leads = [min(one.top[0][1] - one.top[1][1] for one in answer.scores) for answer in ours]
    clear = [number for number, lead in enumerate(leads) if lead > CLOSE]
    assert len({ours[number].token_ids for number in clear}) >= 2, "the others are as good as ties"
    theirs = vllm(tmp_path / "merged", prompts, **options)
    if isinstance(ALL[name].vllm, str):
        assert isinstance(theirs, str) and ALL[name].vllm in theirs, theirs[-3000:]
        return
    expected = [ours[number].token_ids for number in clear]
    if ALL[name].vllm is False:
        assert isinstance(theirs, list), theirs[-3000:]
        assert [tuple(theirs[number]) for number in clear] != expected, "vLLM has fixed its kernel"
        theirs = vllm(tmp_path / "merged", prompts, flat=True, **options)
    assert isinstance(theirs, list), theirs[-3000:]
    assert [tuple(theirs[number]) for number in clear] == expected
