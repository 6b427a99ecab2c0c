"""Asks real vLLM for greedy tokens, one checkpoint after another; it runs in the environment of vLLM.

    python vllm_process.py < jobs

Each line is a job: `folder` of a checkpoint, `prompts` as token ids, `options` of the engine, `flat`, whether positions
are applied to all heads of a token as one row, `result` and `log`, files that it writes. When a job has ended, its exit
code is printed. For a model of two layers, most of the time goes into importing vLLM, so it is imported once, and each
job is a fork.
"""

import json
import os
import sys
import traceback

# The engine then runs in the process that asks.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402

# To look at a class of models, vLLM starts one more process, which imports all of it again. A job is a fork already.
registry._run_in_subprocess = lambda function: function()


def flatten_rotations() -> None:
    """Give the kernel that applies positions on a CPU what it computes rightly: one row per token."""
    rotate = RotaryEmbedding.forward_cpu

    def forward(self, positions, query, key=None):
        rows = [heads if heads is None else heads.reshape(positions.numel(), -1) for heads in (query, key)]
        query_rows, key_rows = rotate(self, positions, *rows)
        return query_rows.view(query.shape), None if key is None else key_rows.view(key.shape)

    RotaryEmbedding.forward_cpu = forward


def answer(job: dict) -> None:
    if job["flat"]:
        flatten_rotations()
    engine = LLM(job["folder"], dtype="float32", enforce_eager=True, max_model_len=512, **job["options"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=32))
    with open(job["result"], "w") as file:
        json.dump([list(each.outputs[0].token_ids) for each in answers], file)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                answer(job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
