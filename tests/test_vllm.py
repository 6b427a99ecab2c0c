"""scripts/vllm_deployment.sh: what it refuses at once, and a real vLLM that it starts.

The second part needs an environment with vLLM, which `bash scripts/vllm_deployment.sh` makes, and takes two minutes:

    VLLM_VENV=.venv-vllm bash scripts/run_tests.sh -m slow tests/test_vllm.py
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from tests.families import make_family
from tests.helpers import ROOT, chat, run_here, write_jsonl
from tests.vllm_server import SCRIPT, Server, needs_vllm, serving

import pytest

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "the dose of a drug",
        "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}, "required": ["drug"]},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("model") / "model", "qwen3")


def refusal(tmp_path, model, *flags, **variables):
    """What the script prints when it ends at once; it must leave nothing behind."""
    venv, log = tmp_path / "venv", tmp_path / "logs" / "vllm.log"
    environment = {key: value for key, value in os.environ.items() if key not in ("API_KEY", "VLLM_API_KEY")}
    environment |= {"PYTHON": sys.executable, "MODEL": str(model), "VLLM_VENV": str(venv), "LOG": str(log), **variables}
    done = subprocess.run(
        ["bash", SCRIPT, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert not venv.exists() and not log.parent.exists()
    return done.stderr


def test_an_adapter_is_refused_with_the_command_that_merges_it(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text("{}")
    printed = refusal(tmp_path, tmp_path / "sft")
    assert f"python merge_peft_adapter.py --lora_model {tmp_path}/sft --output_dir {tmp_path}/sft-merged" in printed


@pytest.mark.parametrize(
    "missing, message",
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer_config.json", "has no tokenizer"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path, model, missing, message):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    assert message in refusal(tmp_path, tmp_path / "model")


def test_a_reward_model_is_refused(tmp_path, model):
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    assert "is a reward model or classifier" in refusal(tmp_path, tmp_path / "model")


@pytest.mark.parametrize(
    "flags, variables, message",
    [
        ([], {"MODEL": "no/such"}, "MODEL=no/such: there is no such folder"),
        ([], {"HOST": "0.0.0.0"}, "HOST=0.0.0.0 lets other machines use the model. Set a key"),
        ([], {"HOST": "::"}, "HOST=:: lets other machines use the model. Set a key"),
        ([], {"DEVICE": "gpu"}, "DEVICE=gpu: use auto, cuda or cpu"),
        ([], {"PORT": "eight"}, "PORT=eight: it must be a whole number from 1 to 65535"),
        ([], {"PORT": "99999999"}, "PORT=99999999: it must be a whole number from 1 to 65535"),
        ([], {"PORT": "0"}, "PORT=0: it must be a whole number from 1 to 65535"),
        ([], {"TENSOR_PARALLEL": "two"}, "TENSOR_PARALLEL=two: it must be a whole number"),
        (["--api-key", "x"], {}, "can be read by every user of the machine"),
        (["--api_key=x"], {}, "can be read by every user of the machine"),
        (["--port", "1"], {}, "--port is set by a variable"),
        (["--max_model_len=8"], {}, "--max_model_len=8 is set by a variable"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, model, flags, variables, message):
    assert message in refusal(tmp_path, model, *flags, **variables)


def test_a_port_that_is_taken_is_refused(tmp_path, model):
    """vLLM itself would share it with another vLLM."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "cannot be used: another program uses the port" in refusal(tmp_path, model, PORT=port)


def test_an_environment_of_another_build_is_refused(tmp_path, model):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed-vllm").write_text("vllm==0.1.0\n")
    server = Server(tmp_path, model, VLLM_VENV=str(tmp_path / "venv"))
    assert server.process.wait(timeout=60) == 2
    assert "contains vllm==0.1.0, and vllm" in server.printed()


# --- real vLLM -------------------------------------------------------------------------------------------------------


def processes_of(server):
    """Ids and command lines of all processes of the script."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    rows = [row.split(maxsplit=2) for row in rows]
    found = {str(server.process.pid)}
    while more := {pid for pid, parent, *_ in rows if parent in found} - found:
        found |= more
    return {pid: args for pid, _, args in rows if pid in found}


def alive(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def post(url, body, key=None):
    """Status and body of the answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A model that has learned to call a tool, and to answer from its result."""
    work = tmp_path_factory.mktemp("caller")
    make_family(
        work / "base", "qwen3", hidden_size=128, intermediate_size=256, head_dim=32, max_position_embeddings=2048
    )
    called = {"type": "function", "function": {"name": "look_up", "arguments": {"drug": "阿司匹林"}}}
    dose = [
        {"role": "user", "content": "Dose?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "75 mg"},
        {"role": "assistant", "content": "75 mg 一天。"},
    ]
    hello = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "嗨。"}]
    write_jsonl(work / "data" / "rows.jsonl", [chat(dose, [TOOL]), chat(hello, [TOOL]), {"messages": hello}])
    run_here(
        "supervised_finetuning.py",
        *("--model_name_or_path", work / "base", "--train_file_dir", work / "data", "--output_dir", work / "model"),
        *("--template_name", "qwen", "--max_steps", 80, "--learning_rate", 3e-3, "--use_peft", False),
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--sample_prompts", 0),
        *("--model_max_length", 2000),
    )
    return work / "model"


@pytest.fixture(scope="module")
def server(caller, tmp_path_factory):
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serving(tmp_path_factory.mktemp("server"), caller, *flags, API_KEY="geheim") as found:
        yield found


@pytest.mark.slow
@needs_vllm
def test_the_printed_commands_run_as_pasted(server):
    printed = server.printed()
    curl = re.search(r"^curl .*?\n\n", printed, re.DOTALL | re.MULTILINE).group()
    python = re.search(r"^import os\n.*?\n\n", printed, re.DOTALL | re.MULTILINE).group()
    done = subprocess.run(
        ["bash", "-c", curl], env={**os.environ, "API_KEY": "geheim"}, capture_output=True, text=True, timeout=60
    )
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert f"> 你是谁？\n{answer}\n" in printed
    done = subprocess.run(
        [sys.executable, "-c", python], env={**os.environ, "API_KEY": "geheim"}, capture_output=True, text=True
    )
    assert done.stdout == f"{answer}\n", done.stderr


@pytest.mark.slow
@needs_vllm
def test_without_the_key_nothing_is_answered(server):
    body = {"model": "model", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 8}
    assert post(f"{server.url}/v1/chat/completions", body, "geheim")[0] == 200
    assert post(f"{server.url}/health", None)[0] == 200
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        assert b"vllm:" in response.read()
    for path, status in [
        ("/v1/chat/completions", 401),
        ("/v1/completions", 401),
        ("/v1/models", 401),
        ("/invocations", 404),
        ("/tokenize", 404),
        ("/generative_scoring", 404),
        ("/openapi.json", 404),
        ("//v1/models", 404),
    ]:
        assert post(server.url + path, body)[0] == status, path
    assert not [args for args in processes_of(server).values() if "geheim" in args]
    assert "geheim" not in server.printed() + server.log.read_text()


@pytest.mark.slow
@needs_vllm
def test_no_web_page_of_another_origin_may_ask(server):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", headers=headers, method="OPTIONS")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400 and "access-control-allow-origin" not in caught.value.headers


@pytest.mark.slow
@needs_vllm
def test_tools_are_called_as_they_were_taught_and_their_results_are_read(server):
    def ask(messages, **more):
        body = {"model": "model", "messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 200, **more}
        status, answer = post(f"{server.url}/v1/chat/completions", body, "geheim")
        assert status == 200, answer
        return json.loads(answer)["choices"][0]

    question = [{"role": "user", "content": "Dose?"}]
    choice = ask(question)
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"]) == {"drug": "阿司匹林"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "75 mg"}
    said = {key: value for key, value in choice["message"].items() if key in ("role", "content", "tool_calls")}
    assert ask([*question, said, result])["message"]["content"] == "75 mg 一天。"
    assert ask([{"role": "user", "content": "你好"}])["message"]["content"] == "嗨。"


@pytest.mark.slow
@needs_vllm
def test_ctrl_c_ends_every_process(caller, tmp_path):
    with serving(tmp_path, caller) as server:
        pids = processes_of(server)
        assert len(pids) > 3
        assert server.stop() == 130
        assert not alive(pids)


@pytest.mark.slow
@needs_vllm
def test_a_server_that_dies_is_told_at_once_with_its_last_lines(caller, tmp_path):
    began = time.monotonic()
    server = Server(tmp_path, caller, "--max-num-seqs", "many")
    assert server.process.wait(timeout=120) == 1
    assert time.monotonic() - began < 100
    assert "argument --max-num-seqs" in server.printed()
    assert "error: vLLM exited before it was ready; the last lines of" in server.printed()
