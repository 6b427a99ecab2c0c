"""--report_to: trackers that are installed, and those that are not."""

from medicalgpt.args import installed_trackers
from tests.helpers import run_here
from tests.tiny import make_tiny

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

AVAILABLE = "transformers.integrations.integration_utils.get_available_reporting_integrations"


@pytest.fixture(autouse=True)
def only_tensorboard(monkeypatch):
    monkeypatch.setattr(AVAILABLE, lambda: ["tensorboard"])


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("none", ["none"]),
        (None, ["none"]),
        ("tensorboard", ["tensorboard"]),
        (["tensorboard"], ["tensorboard"]),
        ("all", ["tensorboard"]),
    ],
)
def test_installed_trackers(given, found):
    assert installed_trackers(given) == found


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_names_its_package(name):
    with pytest.raises(ValueError, match=f"needs {name}, which is not installed. Install it: pip install {name}$"):
        installed_trackers(f"tensorboard,{name}")


def test_packages_have_their_own_names():
    with pytest.raises(ValueError, match="pip install azureml-core comet-ml$"):
        installed_trackers(["azure_ml", "comet_ml"])


def test_unknown_trackers_are_named():
    with pytest.raises(ValueError, match="--report_to tensorbord is not a tracker. Use none, all, or some of .*mlflow"):
        installed_trackers("tensorbord")


def test_all_of_no_trackers_is_refused(monkeypatch):
    monkeypatch.setattr(AVAILABLE, list)
    with pytest.raises(ValueError, match="pip install tensorboard$"):
        installed_trackers("all")


def test_a_missing_tracker_is_refused_before_anything_is_read(capsys):
    with pytest.raises(SystemExit) as end:
        run_here("pretraining.py", "--model_name_or_path", "nowhere", "--report_to", "wandb")
    assert end.value.code == 2 and "error: --report_to wandb needs wandb" in capsys.readouterr().err


def test_tensorboard_has_the_losses(tmp_path):
    """What training logs can be read from the event file, at its steps."""
    text = tmp_path / "data" / "a.txt"
    text.parent.mkdir()
    text.write_text("Rest and fluids help against a cold.\n" * 8, encoding="utf-8")
    output = tmp_path / "out"
    run_here(
        "pretraining.py",
        *(
            "--model_name_or_path",
            make_tiny(tmp_path / "model"),
            "--train_file_dir",
            text.parent,
            "--output_dir",
            output,
        ),
        *("--max_steps", 2, "--logging_steps", 1, "--block_size", 32, "--sample_prompts", 0),
        *("--report_to", "tensorboard", "--per_device_train_batch_size", 1),
    )
    events = EventAccumulator(str(next((output / "runs").rglob("events.out.tfevents.*")).parent)).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2]
    assert all(event.value > 0 for event in losses)
