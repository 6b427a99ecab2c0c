"""Every front end gives the model the same prompt: greedy answers are those of the merged model asked by transformers.

Each program is started by its own `main` with a path and nothing else, on the adapter's folder and on the merged one;
only what would wait for visitors is replaced by visitors. Answers of random weights change with any token of a prompt.
"""

import asyncio
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import fastapi_server_demo
import gradio_demo
import openai_api
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from template import apply_template
from tests.helpers import read_json, run_here, save_model, write_jsonl
from tests.templates import TOKENIZERS

import gradio as gr
import pytest
import torch
from peft import LoraConfig, get_peft_model
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

TOKENS = 24
SEED = 1
FLAGS = ("--max_new_tokens", TOKENS)

SYSTEM = {"role": "system", "content": "你是医生。Be brief."}
TURNS = [
    {"role": "user", "content": "我昨天开始发烧。"},
    {"role": "assistant", "content": "多少度？\n\n咳嗽吗？"},
    {"role": "user", "content": "38.5 度，不咳。"},
]
CALL = {"name": "look_up", "arguments": json.dumps({"drug": "阿司匹林"}, ensure_ascii=False)}
TOOL_TURNS = [
    {"role": "user", "content": "Aspirin: what dose?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"mg": 100}'},
]
PARAMETERS = {"type": "object", "properties": {"drug": {"type": "string"}}, "required": ["drug"]}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "查剂量", "parameters": PARAMETERS}}]
# name -> messages, tools
PROMPTS = {
    "english": ([{"role": "user", "content": "What helps against a cold?"}], None),
    "chinese": ([{"role": "user", "content": "感冒了怎么办？"}], None),
    "white space": ([{"role": "user", "content": "  头痛，\n\n  怎么办？ \n"}], None),
    "system": ([SYSTEM, {"role": "user", "content": "感冒了怎么办？"}], None),
    "turns": (TURNS, None),
    "system, turns": ([SYSTEM, *TURNS], None),
    "tools": ([{"role": "user", "content": "Aspirin: what dose?"}], TOOLS),
    "tools, system, turns": ([SYSTEM, *TURNS[:2], *TOOL_TURNS], TOOLS),
}
# Where a front end has no place for tools, or for more than one question.
WITHOUT_TOOLS = [name for name, (_, tools) in PROMPTS.items() if not tools]
ONE_QUESTION = [name for name in WITHOUT_TOOLS if "turns" not in name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """An adapter, which alone has the template and the stop tokens, and what merge_peft_adapter.py makes of it."""
    folder = tmp_path_factory.mktemp("sf11")
    tokenizer = TOKENIZERS["byte_adds_bos"]()
    model = AutoModelForCausalLM.from_pretrained(save_model(folder / "base", tokenizer, seed=SEED))
    stop_strings = apply_template(tokenizer, "qwen")
    stops = tokenizer.convert_tokens_to_ids(list(stop_strings))
    # Of the special tokens, which are not part of a text, it writes those that end an answer, and these often enough.
    model.lm_head.weight.data[sorted({*tokenizer.added_tokens_decoder} - {*stops})] = 0
    model.lm_head.weight.data[stops] *= 1.5
    model.save_pretrained(folder / "base")
    torch.manual_seed(SEED)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    GenerationConfig(eos_token_id=stops).save_pretrained(folder / "adapter")
    run_here("merge_peft_adapter.py", "--lora_model", folder / "adapter", "--output_dir", folder / "merged")
    return {"adapter": str(folder / "adapter"), "merged": str(folder / "merged")}


def for_template(message: dict) -> dict:
    """Templates take the arguments of a call as an object, the API of OpenAI has them as a string."""
    if not message.get("tool_calls"):
        return {"role": message["role"], "content": message["content"]}
    call = message["tool_calls"][0]["function"]
    function = {"name": call["name"], "arguments": json.loads(call["arguments"])}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, str]:
    """Answers of the merged model. The tokens are those of transformers alone, the texts `ChatEngine`'s."""
    tokenizer = AutoTokenizer.from_pretrained(folders["merged"])
    model = AutoModelForCausalLM.from_pretrained(folders["merged"])
    engine = ChatEngine.from_pretrained(folders["merged"])
    texts, ends = {}, set()
    for name, (messages, tools) in PROMPTS.items():
        messages = [for_template(message) for message in messages]
        prompt = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert (prompt["input_ids"] == tokenizer.bos_token_id).sum() == 1
        whole = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        answer = engine.chat(messages, Sampling(max_new_tokens=TOKENS), tools)
        assert list(answer.token_ids) == whole[0, prompt["input_ids"].shape[1] :].tolist()
        texts[name] = answer.text
        ends.add(answer.finish_reason)
    # No prompt could stand for another, and stop tokens matter.
    assert len(set(texts.values())) == len(PROMPTS) and min(map(len, texts.values())) > 4 and len(ends) == 2
    return texts


# Each takes a checkpoint, names of PROMPTS, and flags, and returns the answers to those that it has a place for.


def by_query(folder: str, names: list[str], *flags: object) -> dict[str, str]:
    answers = {}
    for name in names:
        *system, question = PROMPTS[name][0]
        if name in ONE_QUESTION:
            own = ("--system_prompt", system[0]["content"]) if system else ()
            printed = io.StringIO()
            with redirect_stdout(printed):
                run_here("inference.py", "--model_name_or_path", folder, *flags, "--query", question["content"], *own)
            answers[name] = printed.getvalue().removesuffix("\n")
    return answers


def by_data_file(folder: str, names: list[str], *flags: object) -> dict[str, str]:
    chosen = [PROMPTS[name] for name in names]
    rows = [{"messages": messages, **({"tools": tools} if tools else {})} for messages, tools in chosen]
    with TemporaryDirectory() as place:
        data, output = write_jsonl(f"{place}/rows.jsonl", rows), f"{place}/answers.jsonl"
        files = ("--data_file", data, "--output_file", output, "--batch_size", 3)
        run_here("inference.py", "--model_name_or_path", folder, *flags, *files)
        return dict(zip(names, (row["response"] for row in read_json(output)), strict=True))


def by_openai_api(folder: str, names: list[str], *flags: object, stream: bool = False) -> dict[str, str]:
    answers = {}

    def visit(server: openai_api.Server) -> None:
        client = TestClient(server.config.app, base_url="http://127.0.0.1")
        for name in names:
            messages, tools = PROMPTS[name]
            body = {"model": Path(folder).name, "messages": messages, "stream": stream}
            reply = client.post("/v1/chat/completions", json={**body, **({"tools": tools} if tools else {})})
            assert reply.status_code == 200, reply.text
            if stream:
                events = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: {")]
                pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
                assert len(pieces) > 3
                answers[name] = "".join(pieces)
            else:
                answers[name] = reply.json()["choices"][0]["message"]["content"]

    with patch.object(openai_api.Server, "run", visit):
        run_here("openai_api.py", "--model_name_or_path", folder, *flags, "--port", 0)
    return answers


def by_openai_api_streamed(folder: str, names: list[str], *flags: object) -> dict[str, str]:
    return by_openai_api(folder, names, *flags, stream=True)


def by_small_server(folder: str, names: list[str], *flags: object) -> dict[str, str]:
    """/chat for one at a time; the questions without any history are asked once more, all together, of /batch."""
    answers = {}

    def visit(app, **_) -> None:
        client = TestClient(app, base_url="http://127.0.0.1")
        for name in names:
            if name in WITHOUT_TOOLS:
                *before, asked = PROMPTS[name][0]
                said = [message["content"] for message in before if message != SYSTEM]
                body = {"input": asked["content"], "history": [said] if said else []}
                if SYSTEM in before:
                    body["system_prompt"] = SYSTEM["content"]
                reply = client.post("/chat", json=body)
                assert reply.status_code == 200, reply.text
                answers[name] = reply.json()["response"]
        alone = [name for name in names if len(PROMPTS[name][0]) == 1 and name in answers]
        reply = client.post("/batch", json={"inputs": [PROMPTS[name][0][0]["content"] for name in alone]})
        assert [each["response"] for each in reply.json()["answers"]] == [answers[name] for name in alone]

    with patch.object(fastapi_server_demo.uvicorn, "run", visit):
        run_here("fastapi_server_demo.py", "--model_name_or_path", folder, *flags)
    return answers


def by_page(folder: str, names: list[str], *flags: object) -> dict[str, str]:
    """Ask by the function behind the button, with what the page holds before anybody has touched it."""
    answers = {}

    async def visit(page: gr.Blocks) -> None:
        (asking,) = (event for event in page.fns.values() if event.name == "_ask")
        scope = {"client": ("127.0.0.1", 1), "headers": []}
        visitor = SimpleNamespace(headers={}, request=SimpleNamespace(scope=scope))
        for name in names:
            if name in WITHOUT_TOOLS:
                *before, asked = PROMPTS[name][0]
                filled = {None: [message for message in before if message != SYSTEM], "question": asked["content"]}
                if SYSTEM in before:
                    filled["system_prompt"] = SYSTEM["content"]
                # An empty box is an empty text in a browser.
                values = [filled.get(box.elem_id, "" if box.value is None else box.value) for box in asking.inputs]
                async for update in asking.fn(visitor, *values):
                    last = update
                answers[name] = last[asking.inputs[0]][-1]["content"]

    def show(page: gr.Blocks, *_: object) -> None:
        asyncio.run(visit(page))

    with patch.object(gradio_demo, "launch", show), patch.object(gr.Blocks, "block_thread"):
        run_here("gradio_demo.py", "--model_name_or_path", folder, *flags)
    return answers


# front end -> how many of the prompts it has a place for
FRONT_ENDS = {
    by_query: len(ONE_QUESTION),
    by_data_file: len(PROMPTS),
    by_openai_api: len(PROMPTS),
    by_openai_api_streamed: len(PROMPTS),
    by_small_server: len(WITHOUT_TOOLS),
    by_page: len(WITHOUT_TOOLS),
}
of_each = pytest.mark.parametrize("front_end", FRONT_ENDS, ids=lambda function: function.__name__)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@of_each
def test_same_answers(front_end, kind, folders, expected):
    answers = front_end(folders[kind], list(PROMPTS), *FLAGS)
    assert answers == {name: expected[name] for name in answers}
    assert len(answers) == FRONT_ENDS[front_end]


@of_each
def test_system_prompt_of_the_command_line(front_end, folders, expected):
    """It stands where a conversation has none of its own."""
    answers = front_end(folders["merged"], ["chinese", "turns"], *FLAGS, "--system_prompt", SYSTEM["content"])
    assert "chinese" in answers
    assert answers == {name: expected[{"chinese": "system", "turns": "system, turns"}[name]] for name in answers}
