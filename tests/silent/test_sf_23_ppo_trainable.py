"""Policy and critic: what is said to be trained gets a gradient and moves; nothing else does, the reference least."""

from tests.families import Followed
from tests.helpers import read_json, save_model
from tests.silent.ppo import make_place, open_ppo
from tests.silent.trainable import LINEAR, declared
from tests.tiny import tiny_tokenizer

import pytest

# flags -> modules with an adapter, modules that are trained in full, layers that are trained.
CASES = {
    "all linear": ([], LINEAR, set(), {0, 1}),
    "some linear": (["--target_modules", "q_proj,v_proj"], {"q_proj", "v_proj"}, set(), {0, 1}),
    "embedding too": (["--modules_to_save", "embed_tokens"], LINEAR, {"embed_tokens"}, {0, 1}),
    "frozen layer": (["--freeze_layers", "0"], LINEAR, set(), {1}),
    "gradient checkpointing": (["--gradient_checkpointing", "True"], LINEAR, set(), {0, 1}),
    "four bits": (["--qlora", "True"], LINEAR, set(), {0, 1}),
    "full": (["--use_peft", "False"], None, None, {0, 1}),
    "full, frozen layer": (["--use_peft", "False", "--freeze_layers", "1"], None, None, {0}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("sf23"))
    save_model(folder / "tied", tiny_tokenizer(), tied=True)
    return folder


@pytest.mark.parametrize(("case", "tied"), [*((case, False) for case in CASES), ("full", True)])
def test_what_moves_is_what_was_asked_for(place, tmp_path, case, tied):
    more, adapters, full, layers = CASES[case]
    more = [*more, "--sft_model_path", place / "tied"] if tied else more
    # Rows of an embedding that no answer holds would not move.
    opened = open_ppo(place, tmp_path, "--max_grad_norm", 0, "--max_steps", 3, *more)
    trainer = opened.trainer
    followed = Followed(trainer.model)
    others = [Followed(model) for model in (trainer.reference, trainer.scorer.model) if model is not None]
    assert len(others) == (2 if adapters is None else 1)
    opened.finish()

    def asked_for(name):
        layer = name.partition(".layers.")[2].partition(".")[0]
        # The head that says what is to come is always trained.
        in_full = full if full is None or name.startswith("policy.") else full | {"score"}
        return declared(name, adapters, in_full) and (not layer or int(layer) in layers)

    asked = {name for name in followed.parameters if asked_for(name)}
    if adapters is not None:
        per_model = 2 * len(layers) * len(adapters) + len(full)
        assert len(asked) == 2 * per_model + 1
    assert followed.declared == followed.with_gradient() == followed.moved() == asked
    assert not any(other.moved() for other in others)
    announced = read_json(tmp_path / "run.json")["model"]
    ours = [followed.parameters[name].numel() for name in asked if name.startswith("policy.")]
    assert announced["trainable"] == sum(ours)
