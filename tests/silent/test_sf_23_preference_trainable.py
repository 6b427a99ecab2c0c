"""What is said to be trained on pairs gets a gradient and moves; nothing else does."""

from tests.families import Followed
from tests.helpers import read_json, save_model
from tests.silent.pairs import on_every_stage, open_pairs, pairs
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
    "full": (["--use_peft", "False"], None, None, {0, 1}),
    "full, frozen layer": (["--use_peft", "False", "--freeze_layers", "1"], None, None, {0}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("sf23")
    return {tied: save_model(root / f"tied-{tied}", tiny_tokenizer(), tied=tied) for tied in (False, True)}


@pytest.mark.parametrize(
    ("case", "tied"), [*((case, False) for case in CASES), ("embedding too", True), ("full", True)]
)
@on_every_stage
def test_what_moves_is_what_was_asked_for(models, tmp_path, stage, case, tied):
    more, adapters, full, layers = CASES[case]
    if full is not None and stage == "reward_modeling.py":
        # The head that scores is new, and always trained.
        full = full | {"score"}
    opened = open_pairs(
        stage, models[tied], tmp_path, pairs(4), "--learning_rate", 1e-2, "--max_steps", 3, "--max_grad_norm", 0, *more
    )
    reference = getattr(opened.trainer, "ref_model", None)
    model, frozen = opened.trainer.model, Followed(reference) if reference is not None else None
    followed = Followed(model)
    opened.finish()

    def asked_for(name):
        layer = name.partition(".layers.")[2].partition(".")[0]
        return declared(name, adapters, full) and (not layer or int(layer) in layers)

    asked = {name for name in followed.parameters if asked_for(name)}
    if adapters is not None:
        assert len(asked) == 2 * len(layers) * len(adapters) + len(full)
    assert followed.declared == followed.with_gradient() == followed.moved() == asked
    assert frozen is None or not frozen.moved()
    announced = read_json(tmp_path / "out" / "run.json")["model"]
    assert announced["trainable"] == sum(followed.parameters[name].numel() for name in asked)
