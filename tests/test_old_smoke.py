"""Every lesson runs from beginning to end, offline, and leaves what it promises."""

import re
import sys

import pytest
import torch
from common import read_scalars
from conftest import IMAGES

ARMS = {
    "07": ["float32", "bfloat16"],
    "08": [""],
    "11": ["by_file", "by_group"],
    "12": [""],
}
FILES = {
    "07": ["mixed_precision.png"]
    + [f"checkpoints/07_mixed_precision/digits_run_1/{arm}/latest_checkpoint.pth" for arm in ARMS["07"]]
    + [f"checkpoints/07_mixed_precision/digits_run_1/{arm}/best_model.pth" for arm in ARMS["07"]],
    "08": ["early_stopping.png"]
    + [
        f"checkpoints/08_early_stopping/digits_run_1/{name}.pth"
        for name in ["latest_checkpoint", "best_model"]
    ],
    "09": ["gradient_clipping.png"],
    "10": ["checkpoints/10_transfer_learning/digits_run_1/pretrained.pth"]
    + ["transfer_learning.json", "transfer_learning.png"],
    "11": ["custom_dataset.png"]
    + [f"checkpoints/11_custom_dataset/digits_run_1/{arm}/latest_checkpoint.pth" for arm in ARMS["11"]]
    + [f"checkpoints/11_custom_dataset/digits_run_1/{arm}/best_model.pth" for arm in ARMS["11"]],
    "12": [
        f"checkpoints/12_distributed/digits_run_1/{name}.pth" for name in ["latest_checkpoint", "best_model"]
    ],
}
CURVES = {"Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "LearningRate", "Seconds"}
CURVES |= {"Overfitting/accuracy_gap"}
MORE_CURVES = {"07": {"Accuracy/best_val", "ImagesPerSecond/train", "ImagesPerSecond/val", "LossScale"}}
MORE_CURVES |= {"11": {"Accuracy/best_val"}, "12": {"ImagesPerSecond"}}


@pytest.mark.parametrize("number", FILES)
def test_writes_every_promised_file_and_no_other(finished, number, device):
    run = finished(number, device)
    written = [path for path in run.artifacts.rglob("*") if path.is_file()] if run.artifacts.exists() else []
    names = {path.relative_to(run.artifacts).as_posix() for path in written}
    if (number, device) == ("07", "cuda"):  # one arm more
        names = {name for name in names if "/float16/" not in name}
    if number == "11":  # its own pictures, which test_pictures.py looks at
        names = {name for name in names if not name.startswith("11_custom_dataset/digits_10_scenes/")}
    assert names == set(FILES[number])
    assert all(path.stat().st_size > 0 for path in written)


@pytest.mark.parametrize("number", FILES)
def test_pictures_are_complete(finished, number):
    for path in finished(number).artifacts.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and content.rstrip().endswith(b"IEND\xaeB`\x82"), path


@pytest.mark.parametrize("number", FILES)
def test_header_and_epoch_line_say_what_is_being_done(finished, lessons, number, device):
    run = finished(number, device)
    count = IMAGES.get(number, 256)
    images = "399 pictures" if number == "11" else f"{count} + {count} images"
    assert f"Device: {device} | data: digits, {images}\n" in run.output
    rate = r"[\d,]+ images/s" if number == "12" else r"lr \d\.\d{5}"
    val = rf" \| val loss \d+\.\d{{4}}, acc +\d+\.\d\d % \| {rate}"
    pattern = rf"Epoch  1/1 \| train loss \d+\.\d{{4}}, acc +\d+\.\d\d %{val} \| \d+ s"
    lines = [line for line in run.output.splitlines() if line.startswith("Epoch")]
    special = {"07": 2 + (device == "cuda"), "09": 0, "10": 1}
    assert len(lines) == special.get(number, len(ARMS.get(number, []))) and all(
        re.fullmatch(pattern, line) for line in lines
    )
    assert max(map(len, lines), default=0) <= 100
    folder = run.folder / "tensor_board" / lessons[number].LESSON
    command = lessons[number].quote([sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)])
    assert run.output.splitlines()[-1] == f"Done. To see the curves: {command}"


@pytest.mark.parametrize("number", ARMS)
def test_tensorboard_has_one_run_an_arm_with_all_curves(finished, lessons, number, device):
    lesson_dir = finished(number, device).folder / "tensor_board" / lessons[number].LESSON
    assert [run.name for run in lesson_dir.iterdir()] == ["digits_run_1"]
    for arm in ARMS[number]:
        files = [path for path in (lesson_dir / "digits_run_1" / arm).iterdir() if path.is_file()]
        assert len(files) == 1, "one event file a run"
        scalars = read_scalars(files[0].parent)
        memory = {"PeakMemoryGB"} if (number, device) == ("07", "cuda") else set()
        assert set(scalars) == CURVES | MORE_CURVES.get(number, set()) | memory
        assert all([step for step, _ in points] == [1] for points in scalars.values())


@pytest.mark.parametrize("number", ARMS)
def test_the_same_figures_stand_on_the_screen_in_tensorboard_and_in_checkpoints(finished, lessons, number):
    run = finished(number)
    lines = [line for line in run.output.splitlines() if line.startswith("Epoch")]
    for arm, line in zip(ARMS[number], lines, strict=True):
        scalars = read_scalars(run.folder / "tensor_board" / lessons[number].LESSON / "digits_run_1" / arm)
        values = {name: points[0][1] for name, points in scalars.items()}
        numbers = re.findall(r"(?:loss|acc|lr) +([\d.]+)", line)
        names = ["Loss/train", "Accuracy/train", "Loss/val", "Accuracy/val", "LearningRate"]
        if number == "12":  # says images a second instead of the rate
            names.remove("LearningRate")
        for text, name in zip(numbers, names, strict=True):
            assert float(text) == pytest.approx(values[name], abs=0.6 * 10 ** -len(text.split(".")[1])), name
        path = (
            run.artifacts / "checkpoints" / lessons[number].LESSON / "digits_run_1" / arm / "best_model.pth"
        )
        [row] = torch.load(path, weights_only=True)["history"]
        assert row.keys() == values.keys()
        assert all(row[name] == pytest.approx(values[name], rel=1e-5) for name in row)


def test_12_checkpoint_holds_everything_in_plain_types(finished, lessons):
    path = (
        finished("12").artifacts / "checkpoints" / "12_distributed" / "digits_run_1" / "latest_checkpoint.pth"
    )
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lesson"] == "12_distributed" and len(checkpoint["history"]) == 1
    assert checkpoint["class_names"] == list("0123456789")
    assert checkpoint["hyperparameters"] == {
        "epochs": 1, "batch_size": 128, "lr": 0.02, "seed": 42, "data": "digits", "subset": 256,
    }  # fmt: skip
    assert set(checkpoint["optimizer"]["state"]) == set(
        range(len(list(lessons["12"].SimpleCNN().parameters())))
    )
    assert all("momentum_buffer" in state for state in checkpoint["optimizer"]["state"].values())


def test_07_ranks_the_arms_by_their_best_validation_accuracy(finished):
    ranking = re.findall(r"^  (\w+) +(\d+\.\d+) % in epoch", finished("07").output, flags=re.MULTILINE)
    assert {name for name, _ in ranking} == set(ARMS["07"])
    accuracies = [float(accuracy) for _, accuracy in ranking]
    assert accuracies == sorted(accuracies, reverse=True)
