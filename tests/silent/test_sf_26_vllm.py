"""A merged model says in real vLLM what it says here: same prompt ids, same greedy ids, same end.

vLLM is told the folder and nothing else, so that template, system prompt and stop tokens can come only from there. It
needs an environment with vLLM, which `bash scripts/vllm_deployment.sh` makes, and takes some minutes:

    VLLM_VENV=.venv-vllm bash scripts/run_tests.sh -m slow tests/silent/test_sf_26_vllm.py
"""

import json
import urllib.request

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from tests.families import make_family
from tests.helpers import run_here, write_jsonl
from tests.silent.chats import NO_THOUGHT
from tests.vllm_server import needs_vllm, serving

import pytest

pytestmark = [pytest.mark.slow, needs_vllm]

SYSTEM = "You are kind. 你是小医。"
FEVER = "多休息，多喝水；若持续，请就医。"
# The answers in bytes, which are the tokens: shorter than 32, and longer.
ROWS = [
    ["What is a cold?", "A viral infection."],
    ["你好", "你好！我是小医，很高兴为您服务。"],
    ["发烧怎么办？", FEVER],
    ["发烧怎么办？", FEVER, "And then?", "Sleep.", "谢谢", "不客气。"],
    [{"from": "system", "value": "Be short. 简短。"}, "发烧怎么办？", "喝水。"],
]
UNSEEN = [
    [{"role": "user", "content": "Why?"}],
    [{"role": "system", "content": "You are a doctor. 你是医生。"}, {"role": "user", "content": "我头痛，怎么办？"}],
    [
        {"role": "user", "content": "Is it a cold? 👩‍⚕️"},
        {"role": "assistant", "content": "  It may be.\n"},
        {"role": "user", "content": "\n那要吃什么药？ "},
    ],
]
# Float32 sums in another order; a token that leads by less could fall the other way.
CLOSE = 1e-3


def row(turns):
    speakers = iter(["human", "gpt"] * 3)
    return {
        "conversations": [turn if isinstance(turn, dict) else {"from": next(speakers), "value": turn} for turn in turns]
    }


def asked(turns):
    """The row up to its last answer, as messages."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row(turns)["conversations"][:-1]]


# Templates whose turns end in another token than the tokenizer's texts do, with and without BOS; a thinking one.
@pytest.fixture(
    scope="module", params=[("qwen3", "qwen3"), ("llama", "llama3"), ("gemma", "gemma")], ids=lambda p: p[1]
)
def merged(request, tmp_path_factory):
    """An adapter that knows ROWS, and the same merged by the program."""
    name, template = request.param
    work = tmp_path_factory.mktemp(template)
    make_family(work / "base", name, hidden_size=128, intermediate_size=256, head_dim=32, max_position_embeddings=1024)
    write_jsonl(work / "data" / "rows.jsonl", map(row, ROWS))
    run_here(
        "supervised_finetuning.py",
        *("--model_name_or_path", work / "base", "--train_file_dir", work / "data", "--output_dir", work / "sft"),
        *("--template_name", template, "--system_prompt", SYSTEM, "--max_steps", 60, "--learning_rate", 5e-3),
        *("--lora_rank", 32, "--lora_alpha", 32, "--lora_dropout", 0, "--target_modules", "all"),
        *("--per_device_train_batch_size", 5, "--gradient_accumulation_steps", 1, "--sample_prompts", 0),
    )
    run_here("merge_peft_adapter.py", "--lora_model", work / "sft", "--output_dir", work / "merged")
    return work


@pytest.fixture(scope="module")
def server(merged):
    with serving(merged, merged / "merged") as found:
        yield found


def ask(server, messages, max_tokens):
    body = {"model": "merged", "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.parametrize("max_tokens", [32, 100])
def test_vllm_says_what_the_adapter_says(merged, server, max_tokens):
    adapter, whole = (ChatEngine.from_pretrained(str(merged / name)) for name in ("sft", "merged"))
    sampling = Sampling(max_new_tokens=max_tokens, top_log_probs=2)
    ends = set()
    for messages in [*map(asked, ROWS), *UNSEEN]:
        ours = whole.chat(messages, sampling)
        assert ours.token_ids == adapter.chat(messages, sampling).token_ids
        lead = min(score.top[0][1] - score.top[1][1] for score in ours.scores)
        assert lead > CLOSE, "choose another prompt: this one is as good as a tie"
        theirs = ask(server, messages, max_tokens)
        (choice,) = theirs["choices"]
        assert theirs["prompt_token_ids"] == whole.prompt_ids(messages)
        assert (tuple(choice["token_ids"]), choice["finish_reason"]) == (ours.token_ids, ours.finish_reason)
        assert choice["message"]["content"] == ours.text
        ends.add(ours.finish_reason)
    # Within 100 tokens all that was learned ends by itself; within 32 some does.
    assert "stop" in ends and (max_tokens > 32 or "length" in ends)


def test_learned_answers_end_where_they_were_taught_to(merged, server):
    for turns in ROWS:
        (choice,) = ask(server, asked(turns), 100)["choices"]
        # A thinking template teaches to begin with thoughts, here none.
        text = choice["message"]["content"].removeprefix(NO_THOUGHT)
        assert (text, choice["finish_reason"]) == (turns[-1], "stop")
