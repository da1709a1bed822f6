"""Every lesson runs from beginning to end, offline, and leaves what it promises."""

import json
import re
import shutil

import pytest
import torch
from common import read_scalars
from conftest import run_lesson

ARMS = {
    "02": [""],
    "03": [""],
    "04": ["Constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau"],
    "05": ["without_augmentation", "with_augmentation", "with_augmentation_and_dropout"],
    "06": [""],
}
FILES = {
    "01": ["01_basic_training.png"],
    "02": [],
    "03": [f"checkpoints/03_save_load_model/{name}.pth" for name in ["latest_checkpoint", "best_model"]],
    "04": ["lr_schedules.png", "lr_comparison.png", "checkpoints/04_lr_scheduler/latest_checkpoint.pth"]
    + [f"checkpoints/04_lr_scheduler/best_{arm}.pth" for arm in ARMS["04"]],
    "05": ["data_augmentation_demo.png", "augmentation_comparison.png"]
    + [f"checkpoints/05_data_augmentation/best_{arm}.pth" for arm in ARMS["05"]],
    "06": ["checkpoints/best_model_eval.pth", "evaluation_report.json"]
    + [f"{name}.png" for name in ["confusion_matrix", "confidence_analysis", "error_samples"]],
}
CURVES = {
    "Loss/train",
    "Loss/val",
    "Accuracy/train",
    "Accuracy/val",
    "LearningRate",
    "Overfitting/accuracy_gap",
}


@pytest.mark.parametrize("number", FILES)
def test_writes_every_promised_file(finished, number, device):
    run = finished(number, device)
    for name in FILES[number]:
        assert (run.artifacts / name).stat().st_size > 0, name
    assert not list(run.folder.rglob("*.tmp"))


@pytest.mark.parametrize("number", FILES)
def test_pictures_are_complete(finished, number):
    for path in finished(number).artifacts.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and content.rstrip().endswith(b"IEND\xaeB`\x82"), path


@pytest.mark.parametrize("number", FILES)
def test_header_and_epoch_line_say_what_is_being_done(finished, lessons, number, device):
    output = finished(number, device).output
    assert re.search(rf"Device: {device} \| data: digits, .*\| parameters: 620,586", output)
    assert re.search(
        r"Epoch +1/1 \| train loss \d+\.\d+, accuracy +\d+\.\d+ %.*\| \d+\.\d s, [\d,]+ images/s", output
    )
    if number != "01":
        folder = finished(number, device).folder / "tensor_board" / lessons[number].LESSON
        assert f'tensorboard --logdir "{folder}"' in output.splitlines()[-1]


@pytest.mark.parametrize("number", ARMS)
def test_tensorboard_has_one_run_an_arm_with_all_curves(finished, lessons, number, device):
    lesson_dir = finished(number, device).folder / "tensor_board" / lessons[number].LESSON
    for arm in ARMS[number]:
        runs = list((lesson_dir / arm).iterdir())
        assert [run.name for run in runs] == ["digits_run_1"]
        assert len(list(runs[0].iterdir())) == 1, "one event file a run"
        scalars = read_scalars(runs[0])
        assert set(scalars) >= CURVES
        assert all([step for step, _ in scalars[tag]] == [1] for tag in CURVES)


def test_01_loss_before_training_is_near_ln_10(finished):
    loss = float(re.search(r"Loss before the first step: (\d+\.\d+)", finished("01").output)[1])
    assert abs(loss - 2.303) < 0.1


def test_02_says_how_the_modes_differ_and_gives_a_verdict(finished):
    output = finished("02").output
    train, evaluation = re.findall(
        r"(?:train|eval) +mode: Dropout .* by up to ([\d.]+), .*BatchNorm. by up to ([\d.]+)", output
    )
    assert float(train[0]) > 0.01 and float(train[1]) > 0.01
    assert float(evaluation[0]) == 0 and float(evaluation[1]) < 0.001
    assert "Verdict: " in output


def test_03_predicts_ten_test_images(finished):
    lines = re.findall(
        r"true: (\S+) +predicted: (\S+ \d+\.\d %), (\S+ \d+\.\d %), (\S+ \d+\.\d %)", finished("03").output
    )
    assert len(lines) == 10


def test_03_checkpoint_holds_everything_in_plain_types(finished, lessons):
    path = finished("03").artifacts / "checkpoints" / "03_save_load_model" / "latest_checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    assert (
        checkpoint["next_epoch"] == 2 and checkpoint["data"] == "digits" and len(checkpoint["history"]) == 1
    )
    assert checkpoint["class_names"] == list("0123456789")
    assert checkpoint["hyperparameters"] == {
        "epochs": 1, "batch_size": 128, "lr": 0.02, "seed": 42, "data": "digits", "subset": 256,
    }  # fmt: skip
    assert set(checkpoint["random_states"]) == {"python", "numpy", "torch", "cuda", "shuffle"}
    assert all("momentum_buffer" in state for state in checkpoint["optimizer"]["state"].values())


def test_04_ranks_the_arms_by_their_best_validation_accuracy(finished):
    ranking = re.findall(r"^  (\w+) +(\d+\.\d+) % in epoch", finished("04").output, flags=re.MULTILINE)
    assert {name for name, _ in ranking} == set(ARMS["04"])
    accuracies = [float(accuracy) for _, accuracy in ranking]
    assert accuracies == sorted(accuracies, reverse=True)


def test_05_shows_costs_and_analyses_every_arm(finished):
    output = finished("05").output
    for size in [1, 8, 16, 128]:
        assert re.search(rf"all together, groups of {size} +\d+\.\d", output)
    for arm in ARMS["05"]:
        assert re.search(
            rf"{arm}: training \d+\.\d+ %, validation \d+\.\d+ %\n +gap -?\d+\.\d+ points", output
        )


def test_06_report_is_complete_and_names_its_data(finished):
    report = json.loads((finished("06").artifacts / "evaluation_report.json").read_text(encoding="utf-8"))
    assert report["images"] == 256 and "digits" in report["model"]
    assert set(report["classes"]) == set("0123456789")
    assert sum(map(sum, report["confusion_matrix"])) == 256
    assert "Diagnosis: " in finished("06").output


def test_06_does_not_train_again_and_evaluates_other_lessons_checkpoints(finished, lessons, tmp_path):
    shutil.copytree(finished("06").artifacts, tmp_path / "artifacts")
    again = run_lesson(lessons["06"], tmp_path)
    assert "No training" in again and "Epoch" not in again
    path = finished("05").artifacts / "checkpoints" / "05_data_augmentation" / "best_with_augmentation.pth"
    assert "best_with_augmentation.pth of 05_data_augmentation on 256 test images" in run_lesson(
        lessons["06"], tmp_path, "--checkpoint", path
    )
