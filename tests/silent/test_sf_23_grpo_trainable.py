"""What is said to be trained with rewards gets a gradient and moves; nothing else does, least of all the reference."""

from tests.families import Followed
from tests.silent.tasks import open_tasks, tasks
from tests.silent.trainable import LINEAR, declared
from tests.tiny import make_tiny

import pytest

# flags -> modules with an adapter, modules that are trained in full.
CASES = {
    "all linear": ([], LINEAR, set()),
    "embedding too": (["--modules_to_save", "embed_tokens"], LINEAR, {"embed_tokens"}),
    "gradient checkpointing": (["--gradient_checkpointing", "True"], LINEAR, set()),
    "full": (["--use_peft", "False"], None, None),
    "full, checkpointing": (["--use_peft", "False", "--gradient_checkpointing", "True"], None, None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sf23"))


@pytest.mark.parametrize("case", [*CASES, "adapter that is gone on with"])
def test_what_moves_is_what_was_asked_for(model, tmp_path, case):
    more, adapters, full = CASES.get(case, CASES["all linear"])
    if case not in CASES:
        open_tasks(model, tmp_path / "first", tasks(4), "--max_steps", 1, "--learning_rate", 0.01).finish()
        model = tmp_path / "first" / "out"
    flags = ("--learning_rate", 1e-2, "--max_steps", 3, "--max_grad_norm", 0, "--beta", 0.1, *more)
    opened = open_tasks(model, tmp_path, tasks(4), *flags)
    trainer = opened.trainer
    frozen = Followed(trainer.ref_model) if trainer.ref_model is not None else None
    assert (frozen is not None) == (adapters is None)
    followed = Followed(trainer.model)
    opened.finish()
    asked = {name for name in followed.parameters if declared(name, adapters, full) and ".ref." not in name}
    assert len(asked) == 2 * 2 * len(LINEAR) + len(full) if adapters else len(asked) == len(followed.parameters)
    assert followed.declared == followed.with_gradient() == followed.moved() == asked
    assert frozen is None or not frozen.moved()
    assert any(".ref." in name for name in followed.parameters) == (case not in CASES)
