"""At the first inner step the policy is the one that sampled: the ratio of both is 1, and it is logged."""

from tests.silent.tasks import first_batches, open_tasks, tasks
from tests.tiny import make_tiny

import pytest
import torch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sf17"))


def logged(opened, name):
    return [row[name] for row in opened.trainer.state.log_history if name in row]


@pytest.mark.parametrize("more", [[], ["--use_peft", "False"], ["--gradient_checkpointing", "True", "--qlora", "True"]])
def test_grpo_ratio(model, tmp_path, more):
    rates = ("--learning_rate", 0.01, "--max_steps", 4, "--num_iterations", 2)
    opened = open_tasks(model, tmp_path, tasks(6), *rates, *more)
    opened.trainer.train()
    away = logged(opened, "ratio_deviation")
    # Steps 1 and 3 are the first on their answers.
    assert [away[0], away[2]] == pytest.approx([0, 0], abs=1e-5)
    assert away[1] > 0.01 and away[3] > 0.01
    assert logged(opened, "clip_ratio/region_mean")[0] == 0


def test_grpo_ratio_survives_dropout_of_the_adapter(model, tmp_path):
    """Sampling is without dropout; what it was then is computed as training computes it, so only noise is left."""
    more = ("--disable_dropout", "False", "--lora_dropout", 0.5, "--num_iterations", 2, "--max_steps", 1)
    opened = open_tasks(model, tmp_path, tasks(6), *more)
    seen = []
    generate = opened.trainer.model.generate
    opened.trainer.model.generate = lambda **kwargs: seen.append(opened.trainer.model.training) or generate(**kwargs)
    opened.trainer.train()
    # A new adapter changes nothing yet, with or without dropout.
    assert seen == [False] and logged(opened, "ratio_deviation")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_grpo_log_probabilities_are_those_of_sampling(model, tmp_path, temperature):
    """Against the plain model, one answer at a time, without padding, as `generate` draws from it."""
    opened = open_tasks(model, tmp_path, tasks(6), "--num_iterations", 2, "--temperature", temperature)
    for batch in first_batches(opened):
        for n in range(4):
            prompt, answer = (
                batch[f"{name}_ids"][n][batch[f"{name}_mask"][n].bool()] for name in ("prompt", "completion")
            )
            with torch.no_grad():
                logits = opened.trainer.model(input_ids=torch.cat([prompt, answer])[None]).logits[
                    0, len(prompt) - 1 : -1
                ]
            wanted = (logits / temperature).log_softmax(dim=-1).gather(1, answer[:, None])[:, 0]
            found = batch["old_per_token_logps"][n, : len(answer)]
            assert torch.allclose(found, wanted, atol=1e-4)


def test_grpo_samples_from_the_model_alone(tmp_path):
    """What a checkpoint recommends for serving is not part of the policy; it is saved as it was."""
    place = make_tiny(tmp_path / "model", never_stops=True)
    opened = open_tasks(place, tmp_path, tasks(40), "--max_steps", 1, "--gradient_accumulation_steps", 40)
    opened.trainer.train()
    # Two of 260 tokens end an answer of eight.
    assert logged(opened, "completions/clipped_ratio")[0] < 1
    assert opened.trainer.model.generation_config.suppress_tokens == opened.options["stop_ids"]
