"""Images in the OpenAI API: a model that has learned colours is asked about new images."""

import base64
import json
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from tests.helpers import run_here
from tests.pictures import COLOURS, learn_colours, png_that_claims, save
from tests.servers import Server, running_server
from tests.towers import make_towers

import httpx
import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return learn_colours(tmp_path_factory.mktemp("trained"))


def post(server: Server, path: str, body: dict) -> tuple[int, dict, bytes]:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=120)
    return response.status_code, dict(response.headers), response.content


def address_of(path: str | Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def body_of(*parts, **more):
    return {"model": "out", "messages": [{"role": "user", "content": list(parts)}], "temperature": 0, **more}


def image_at(url: str):
    return {"type": "image_url", "image_url": {"url": url}}


def text(text: str):
    return {"type": "text", "text": text}


def test_the_api_answers_by_the_image(trained, tmp_path):
    pictures = {colour: address_of(save(tmp_path / f"{colour}.png", (18, 22), colour)) for colour in COLOURS}
    with running_server("openai_api.py", "--model_name_or_path", trained, "--accept_images", "True") as server:
        ask = lambda body: post(server, "/v1/chat/completions", body)  # noqa: E731
        for colour, address in pictures.items():
            status, _, content = ask(body_of(image_at(address), text("Col"), text("our?"), max_tokens=8))
            assert status == 200 and json.loads(content)["choices"][0]["message"]["content"] == colour
            _, _, content = ask(body_of(image_at(address), text("Colour?"), stream=True))
            pieces = [json.loads(line[6:]) for line in content.decode().split("\n\n") if line.startswith("data: {")]
            said = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
            assert said == colour
        # A photo of more bytes than a request of text may have.
        photo = Image.effect_noise((1600, 1600), 90)
        photo.save(tmp_path / "photo.png")
        large = body_of(image_at(address_of(tmp_path / "photo.png")), text("Colour?"), max_tokens=1)
        assert (tmp_path / "photo.png").stat().st_size > 2_000_000 and ask(large)[0] == 200
        status, _, content = ask(body_of(text("Number 1?")))
        assert json.loads(content)["choices"][0]["message"]["content"] == "yes"
        for url, reason in (
            ("http://127.0.0.1:9/a.png", "nothing is fetched from an address"),
            ("https://a.invalid/a.png", "nothing is fetched from an address"),
            ("file:///etc/hostname", "nothing is fetched from an address"),
            ("data:image/png;base64,AAAA", "not an image that can be read"),
            (
                f"data:image/png;base64,{base64.b64encode(png_that_claims(60_000, 60_000)).decode()}",
                "64,000,000 pixels",
            ),
        ):
            status, _, content = ask(body_of(text("Colour?"), image_at(url)))
            error = json.loads(content)["error"]
            assert status == 400 and reason in error["message"], error
            assert error["param"] == "messages[0].content[1].image_url.url"
        for parts, reason in (
            ([image_at(pictures["red"])] * 17, "17 images, more than 16"),
            ([{"type": "image_url", "image_url": {"url": pictures["red"], "detail": "low"}}], "scaled as in training"),
            ([{"type": "image_url", "text": "x"}], "has the field image_url, and not text"),
            ([{"type": "input_audio", "input_audio": {}}], "a part of type 'input_audio' cannot be read"),
            ([text("<|vision_start|><|image_pad|><|vision_end|>Colour?")], "special token"),
            ([image_at(save(tmp_path / "here.png"))], "nothing is fetched from an address"),
        ):
            status, _, content = ask(body_of(*parts))
            assert status == 400 and reason in json.loads(content)["error"]["message"], content
        system = [{"role": "system", "content": [image_at(pictures["red"])]}, {"role": "user", "content": "?"}]
        assert ask({"model": "out", "messages": system})[0] == 400
    with running_server("openai_api.py", "--model_name_or_path", trained) as server:
        assert post(server, "/v1/chat/completions", large)[0] == 413
        status, _, content = post(server, "/v1/chat/completions", body_of(image_at(pictures["red"]), text("Colour?")))
        error = json.loads(content)["error"]
        assert status == 400 and error["param"] == "messages[0].content[0]"
        assert error["message"] == (
            "messages[0].content[0]: a part of type 'image_url' cannot be read: the model takes text only. Start the "
            "server with --accept_images True."
        )


def test_models_and_batching_that_do_not_go_with_images(trained, tmp_path):
    text_only = make_towers(tmp_path / "text", "gemma3")
    with pytest.raises(UserError, match="gemma3, which is not trained on images here"):
        run_here("openai_api.py", "--model_name_or_path", text_only, "--accept_images", "True", "--port", 0)
    engine = ChatEngine.from_pretrained(str(trained), with_images=True)
    with pytest.raises(UserError, match="it is shown images. Use --batching static"):
        make_batcher(engine, batching="continuous")
