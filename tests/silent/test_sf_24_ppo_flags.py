"""Each flag of PPO changes what is learned, or what is done for it; one that would not is refused."""

from medicalgpt.args import DataArguments
from medicalgpt.parser import parse_args
from medicalgpt.refusals import refused_in
from ppo_training import PpoArguments
from tests.silent.ppo import make_place, open_ppo

import pytest

FLAGS = [
    ["--kl_coef", 0.5],
    ["--kl_estimator", "k3"],
    ["--target_reference_kl", 5, "--kl_horizon", 8],
    ["--target_reference_kl", 5, "--kl_horizon", 16],
    ["--gamma", 0.9],
    ["--lam", 0.5],
    ["--cliprange", 0.01],
    ["--cliprange_value", 0.01],
    ["--vf_coef", 0.5],
    ["--critic_learning_rate", 0.1],
    ["--target_kl", 1e-3],
    ["--whiten_advantages", "False"],
    ["--normalize_scores", "True"],
    ["--score_clip", 0.05],
    ["--missing_eos_penalty", 3],
    ["--temperature", 0.7],
    ["--response_length", 7],
    ["--num_ppo_epochs", 3],
    ["--num_mini_batches", 1, "--gradient_accumulation_steps", 2],
    ["--disable_dropout", "False", "--lora_dropout", 0.2],
    ["--value_model_path", "policy"],
    ["--max_grad_norm", 0.1],
    ["--seed", 1],
    ["--data_seed", 1],
]
TIMED = ("_runtime", "_second", "train_loss", "total_flos", "epoch", "step")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("sf24"))


def learned(place, output, *more):
    """All numbers of two steps, and what the trained weights come to."""
    trainer = open_ppo(place, output, *(place / "policy" if flag == "policy" else flag for flag in more)).trainer
    trainer.train()
    found = {
        f"{number} {name}": value for number, log in enumerate(trainer.state.log_history) for name, value in log.items()
    }
    for side in ("policy", "critic"):
        trained = (weight for weight in getattr(trainer.model, side).parameters() if weight.requires_grad)
        found[side] = sum(weight.detach().abs().double().sum().item() for weight in trained)
    return {name: value for name, value in found.items() if not name.endswith(TIMED)}


def test_each_flag_changes_what_is_learned(place, tmp_path):
    plain, seen = learned(place, tmp_path / "plain"), {}
    for number, more in enumerate(FLAGS):
        found = learned(place, tmp_path / str(number), *more)
        assert found["policy"] != pytest.approx(plain["policy"], rel=1e-7), more
        assert found["critic"] != pytest.approx(plain["critic"], rel=1e-7), more
        seen[tuple(sorted((name, round(value, 6)) for name, value in found.items()))] = more
    assert len(seen) == len(FLAGS)


def test_the_batch_of_rollouts_changes_the_batch_alone(place, tmp_path):
    plain = learned(place, tmp_path / "plain", "--max_steps", 1)
    trainer = open_ppo(place, tmp_path / "one", "--max_steps", 1, "--rollout_forward_batch_size", 1).trainer
    generate, sizes = trainer.policy.generate, []
    trainer.policy.generate = lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs)
    trainer.train()
    assert sizes == [1] * 4
    first = trainer.state.log_history[0]
    assert all(
        value == pytest.approx(first[name[2:]], rel=1e-4, abs=1e-6) for name, value in plain.items() if name[0] == "0"
    )


@pytest.mark.parametrize("name", refused_in("ppo_training.py"))
def test_flags_of_the_library_without_effect_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        parse_args(PpoArguments, DataArguments, argv=[f"--{name}", "1"], program="ppo_training.py")
    assert f"--{name} has no effect in this program" in capsys.readouterr().err
