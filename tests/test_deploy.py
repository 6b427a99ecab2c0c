"""The files of deploy/: they agree with the programs, and pass the linters of their kinds where these are installed."""

import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from fastapi_server_demo import ServerArguments
from gradio_demo import DemoArguments
from medicalgpt.parser import StrictParser
from openai_api import OpenAIArguments
from tests.servers import running_server
from tests.tiny import make_tiny

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PROGRAMS = {
    "openai_api.py": OpenAIArguments,
    "fastapi_server_demo.py": ServerArguments,
    "gradio_demo.py": DemoArguments,
}


@cache
def flags_of(program: str) -> set[str]:
    return set(StrictParser(PROGRAMS[program], program=program).dest_of)


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def compose() -> dict:
    return yaml.safe_load(text_of("docker-compose.yml"))


def unit() -> dict[str, str]:
    """Settings of the unit; of one that is given several times, the last."""
    return dict(line.split("=", 1) for line in text_of("medicalgpt.service").splitlines() if re.match(r"\w+=", line))


def commands() -> list[list[str]]:
    """What the files run: a program and its flags."""
    (image,) = re.findall(r"^CMD (\[.*\])$", text_of("Dockerfile"), re.MULTILINE)
    services = [service["command"] for service in compose()["services"].values() if "command" in service]
    return [yaml.safe_load(image), *services, shlex.split(unit()["ExecStart"])[1:]]


def test_every_program_and_flag_exists():
    found = commands()
    assert len(found) == 4
    for program, *words in found:
        assert (ROOT / program).is_file()
        flags = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
        assert flags and flags <= flags_of(program), f"{program} does not know {flags - flags_of(program)}"


def test_every_variable_is_a_setting():
    names = set()
    for name in ("Dockerfile", "docker-compose.yml", "medicalgpt.service"):
        names |= set(re.findall(r"\bMEDICALGPT_([A-Z_]+)", text_of(name)))
    assert {"HOST", "PORT"} <= names
    # The password of the page is read by `auth_from`.
    assert {name.lower() for name in names} <= flags_of("openai_api.py") | {"auth"}


def test_the_image_has_no_root_and_what_the_programs_import():
    text = text_of("Dockerfile")
    assert re.search(r"^USER (?!0|root)", text, re.MULTILINE) and "HEALTHCHECK" in text and "/ready" in text
    copied = re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
    sources = [word for line in copied for word in line.split()[:-1]]
    assert {"template.py", "medicalgpt", *(command[0] for command in commands())} <= set(sources)
    allowed = re.findall(r"^!(.*)$", text_of("Dockerfile.dockerignore"), re.MULTILINE)
    for source in sources:
        assert (ROOT / source).exists() and source in allowed
    healthcheck = re.search(r'HEALTHCHECK.*?"-c", "(.*?)"\]$', text, re.MULTILINE | re.DOTALL)[1]
    compile(healthcheck, "HEALTHCHECK", "exec")


def test_the_services_are_hardened_and_published_on_this_machine_only():
    services = compose()["services"]
    assert set(services) == {"api", "page", "prometheus"}
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for mount in service["volumes"]:
            assert mount.endswith(":ro") or mount == "prometheus:/prometheus"
        for secret in service.get("secrets", ()):
            assert compose()["secrets"][secret]["file"].startswith("deploy/")
    api, page = services["api"], services["page"]
    stop = OpenAIArguments.__dataclass_fields__["stop_timeout"].default
    assert int(api["stop_grace_period"].removesuffix("s")) > stop + 5
    assert int(unit()["TimeoutStopSec"]) > stop + 5
    assert ["127.0.0.1:8082:8082"] == page["ports"] and "8082" in page["command"]


def test_prometheus_asks_the_api():
    (job,) = yaml.safe_load(text_of("prometheus.yml"))["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    service, port = target.split(":")
    assert service == "api" and f"MEDICALGPT_PORT={port}" in text_of("Dockerfile")
    assert job["metrics_path"] == "/metrics"
    assert job["authorization"]["credentials_file"] == "/run/secrets/prometheus_key"


def test_requirements_are_a_part_of_all():
    def lines(name: str) -> set[str]:
        return {line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")}

    assert lines("requirements-serve.txt") < lines("requirements.txt")


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed here")


def test_hadolint():
    done = subprocess.run([tool("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_docker_compose_reads_the_file():
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose here")
    command = [docker, "compose", "--project-directory", ".", "-f", "deploy/docker-compose.yml", "config", "--quiet"]
    done = subprocess.run(
        command, cwd=ROOT, env={"MODEL": "./outputs", "PATH": "/usr/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "page.env" in done.stderr, done.stderr


def test_systemd_verifies_the_unit(tmp_path):
    path = tmp_path / "medicalgpt.service"
    path.write_text(text_of("medicalgpt.service").replace("/opt/medicalgpt/.venv/bin/python", sys.executable))
    command = [tool("systemd-analyze"), "verify", "--man=no", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "medicalgpt" not in done.stderr, done.stderr


ONLY_THESE = """
import re, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from packaging.requirements import Requirement

def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()

found, rest = set(), [line for line in Path(sys.argv[1]).read_text().splitlines() if line and line[0] != "#"]
while rest:
    requirement = Requirement(rest.pop())
    name = canonical(requirement.name)
    if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    try:
        rest += requires(name) or ()
        found.add(name)
    except PackageNotFoundError:
        pass
others = {top for top, names in packages_distributions().items() if not {canonical(name) for name in names} & found}

others -= {"packaging", *sys.stdlib_module_names}
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.partition(".")[0] in others else find_spec(name, path, target)
)
import runpy
program = sys.argv[2]
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(program).parent))
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["openai_api.py", "gradio_demo.py"])
def test_the_requirements_of_the_image_are_enough(tmp_path, program):
    """The program serves where nothing else can be imported."""
    start = tmp_path / "start.py"
    start.write_text(ONLY_THESE)
    model = make_tiny(tmp_path / "model")
    flags = [ROOT / "requirements-serve.txt", ROOT / program, "--model_name_or_path", model]
    health = "/health" if program == "openai_api.py" else "/"
    with running_server(str(start), *flags, health=health) as server:
        if program == "openai_api.py":
            body = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, server.log()
        assert server.stop() in (0, -15)
