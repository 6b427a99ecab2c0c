"""A merged checkpoint that takes images too is loaded by real vLLM, and says there what it says here: same greedy ids.

vLLM loads the whole, with the encoder of images, as any other program does. It needs an environment with vLLM, and
torchvision in it, which `bash scripts/vllm_deployment.sh` leaves out on a CPU:

    VLLM_VENV=.venv-vllm bash scripts/run_tests.sh -m slow tests/silent/test_sf_26_vllm_towers.py
"""

import json
import os
import subprocess

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from tests.families import stage_flags
from tests.helpers import run_here, write_jsonl
from tests.towers import TOWERS, make_towers
from tests.vllm_server import VENV, needs_vllm

import pytest

IMPORTS = "from torchvision.transforms.v2 import functional"
needs_torchvision = pytest.mark.skipif(
    not (VENV / "bin" / "python").is_file()
    or subprocess.run([VENV / "bin" / "python", "-c", IMPORTS], capture_output=True).returncode != 0,
    reason=f"there is no torchvision in {VENV}, which vLLM needs for these models",
)
pytestmark = [pytest.mark.slow, needs_vllm, needs_torchvision]

QUESTIONS = ("Why?", "感冒了怎么办？", "Is it a cold?")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 1024}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
# Settings of the language model and of the encoder, on top of the sizes, and what the processor is made of.
FAMILIES = {
    "qwen3_vl": (
        {"rope_parameters": ROPE},
        {"out_hidden_size": 128, "hidden_size": 64},
        {
            **{"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"},
            **{"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2},
            **{"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        },
    ),
}
# Float32 sums in another order; a token that leads by less could fall the other way.
CLOSE = 1e-3
VLLM = """
import json, sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, asked = sys.argv[1], json.load(open(sys.argv[2]))
    no_images = {"image": 0, "video": 0}
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, limit_mm_per_prompt=no_images)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=32))
    json.dump([list(answer.outputs[0].token_ids) for answer in answers], open(sys.argv[3], "w"))
"""


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_says_what_the_merged_checkpoint_says(tmp_path, name):
    settings, vision, processor = FAMILIES[name]
    base = make_towers(tmp_path / "base", name, vision=vision, **SIZES, **settings)
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
    stage = "supervised_finetuning.py"
    write_jsonl(tmp_path / stage / "rows.jsonl", [{"prompt": f"Why {n}?", "response": "A cold. " * n} for n in (1, 4)])
    run_here(
        stage, *stage_flags(tmp_path, stage, base, tmp_path / "sft", "--template_name", TOWERS[name].text.template)
    )
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "sft", "--output_dir", tmp_path / "merged")

    engine = ChatEngine.from_pretrained(str(tmp_path / "merged"))
    prompts = [engine.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    ours = [engine.batch([prompt], Sampling(max_new_tokens=32, top_log_probs=2))[0] for prompt in prompts]
    assert len({answer.token_ids for answer in ours}) == len(QUESTIONS)
    assert min(one.top[0][1] - one.top[1][1] for answer in ours for one in answer.scores) > CLOSE, "as good as a tie"

    (tmp_path / "asked.json").write_text(json.dumps({"prompts": prompts}))
    (tmp_path / "ask.py").write_text(VLLM)
    done = subprocess.run(
        [VENV / "bin" / "python", "ask.py", "merged", "asked.json", "said.json"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "said.json").read_text())
    assert [tuple(ids) for ids in theirs] == [answer.token_ids for answer in ours]
