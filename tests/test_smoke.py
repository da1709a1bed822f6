"""Every lesson runs from beginning to end, offline, and leaves what it promises and nothing else.

Each runs once on a few of scikit-learn's digits, on the CPU and on CUDA where there is one (conftest.py: finished).
"""

import re

import pytest
from common import read_scalars
from conftest import CORE, NUMBERS, load
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The variants that a lesson trains, by the names of their folders; lesson 01 writes nothing for TensorBoard.
VARIANTS = {
    "01": [],
    "02": [""],
    "03": [""],
    "04": ["Constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau"],
    "05": ["without_augmentation", "with_augmentation", "strong_augmentation"],
    "06": [""],
    "07": ["float32", "bfloat16"],
    "08": [""],
    "09": [
        f"{danger}_{remedy}"
        for danger in ["none", "images_of_nan", "BatchNorm_lr_x_6"]
        for remedy in ["none", "norm_50", "norm_90", "norm_99", "value_50", "value_90", "value_99", "lr_4"]
    ],
    "10": ["pretraining", "scratch", "new_last_layer", "new_linear_layers", "fine_tuned"],
    "11": ["by_file", "by_group"],
    "12": [""],
}
PICTURES = {
    "01": ["01_samples", "01_basic_training"],
    "04": ["lr_schedules", "lr_comparison"],
    "05": ["data_augmentation_demo", "augmentation_comparison"],
    "06": ["confusion_matrix", "confidence_analysis", "error_samples"],
    "07": ["mixed_precision"],
    "08": ["early_stopping"],
    "09": ["gradient_clipping"],
    "10": ["transfer_learning"],
    "11": ["custom_dataset"],
}
CURVES = {"Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "Overfitting/accuracy_gap"}
CURVES |= {"LearningRate", "Seconds"}


def checkpoint_paths(lesson, number):
    """Return the promised checkpoints of a run of two epochs, relative to artifacts/."""
    if number == "06":
        return ["checkpoints/best_model_eval.pth"]
    if number == "11":
        return ["checkpoints/11_custom_dataset/best_model.pth"]
    if number in ["01", "02", "07", "09", "10"]:
        return []
    folders = [f"checkpoints/{lesson.LESSON}/{variant}".rstrip("/") for variant in VARIANTS[number]]
    return [f"{folder}/{name}.pth" for folder in folders for name in ["best_model", "latest_checkpoint"]]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_runs_from_beginning_to_end(finished, number, device):
    """From the line that names the device to the one that says where the results are."""
    output = finished(number, device).output
    assert f"Device: {device}" in output
    assert f"\n{'Pictures in ' if number == '01' else 'Curves: tensorboard --logdir '}" in output


@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_writes_the_promised_files_and_no_other(finished, lessons, number, device):
    """TensorBoard's are one event file for each variant, in a folder with the date and time of the start."""
    run = finished(number, device)
    written = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert all((run.folder / name).stat().st_size > 0 for name in written)
    events = {name for name in written if name.startswith("tensor_board/")}
    made = {name for name in written if name.startswith("artifacts/11_custom_dataset/")}
    assert (len(made) > 100) == (number == "11"), "lesson 11 makes pictures to learn from"
    promised = checkpoint_paths(lessons[number], number) + [f"{x}.png" for x in PICTURES.get(number, [])]
    promised += {"06": ["evaluation_report.json"], "10": ["transfer_learning.json"]}.get(number, [])
    assert written - events - made == {f"artifacts/{name}" for name in promised}

    variants = VARIANTS[number] + (["float16"] if (number, device) == ("07", "cuda") else [])
    folders = [[lessons[number].LESSON, *filter(None, [variant])] for variant in variants]
    assert sorted(name.split("/")[1:-2] for name in events) == sorted(folders)
    starts = {name.split("/")[-2] for name in events}
    assert all(re.fullmatch(r"\d{8}-\d{6}", start) for start in starts) and len(starts) == (number != "01")


@pytest.mark.parametrize("number", PICTURES)
def test_pictures_are_named_and_complete_and_show_something(finished, number):
    """Pillow refuses a PNG file that is cut off."""
    for name in PICTURES[number]:
        assert f"{name}.png" in finished(number).output
        with Image.open(finished(number).artifacts / f"{name}.png") as picture:
            picture.load()
            darkest, brightest = picture.convert("L").getextrema()
            assert picture.format == "PNG" and min(picture.size) > 200 and brightest - darkest > 100, name


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_tensorboard_knows_the_hyperparameters(finished, lessons, number):
    """Under Text, one in each line."""
    folder = finished(number).folder / "tensor_board" / lessons[number].LESSON / VARIANTS[number][0]
    events = EventAccumulator(str(next(folder.rglob("events*")).parent))
    events.Reload()
    [text] = events.Tensors("Hyperparameters/text_summary")
    lines = text.tensor_proto.string_val[0].decode().split("  \n")
    assert "seed: 42" in lines and "data: digits" in lines


@pytest.mark.parametrize("number", CORE)
def test_screen_curves_and_checkpoints_agree(finished, lessons, number, device):
    """Every epoch is one line on the screen, one point on every curve, and one row in the checkpoint's history."""
    run, lesson = finished(number, device), lessons[number]
    images = "256 images | model: 620,586 parameters" if number == "01" else "256 + 256 images"
    assert f"Device: {device} | digits: {images}\n" in run.output
    lines = iter([line for line in run.output.splitlines() if line.startswith("Epoch")])
    for i, variant in enumerate(VARIANTS[number]):
        [events] = (run.folder / "tensor_board" / lesson.LESSON / variant).rglob("events*")
        curves = read_scalars(events.parent)
        test_curves = {"Test/loss", "Test/accuracy"} if number == "06" else set()
        assert set(curves) == CURVES | test_curves
        assert all([step for step, _ in curves[name]] == [1, 2] for name in CURVES)
        for epoch in [1, 2]:
            row = {name: curves[name][epoch - 1][1] for name in CURVES}
            numbers = re.fullmatch(
                rf"Epoch  {epoch}/2 \| train loss (\d+\.\d{{4}}), acc +(\d+\.\d\d) % \| "
                r"val loss (\d+\.\d{4}), acc +(\d+\.\d\d) % \| lr (\d\.\d{5}) \| \d+ s",
                next(lines),
            )
            names = ["Loss/train", "Accuracy/train", "Loss/val", "Accuracy/val", "LearningRate"]
            for text, name in zip(numbers.groups(), names, strict=True):
                assert float(text) == pytest.approx(row[name], abs=0.6 * 10 ** -len(text.split(".")[1])), name
            gap = row["Accuracy/train"] - row["Accuracy/val"]
            assert row["Overfitting/accuracy_gap"] == pytest.approx(gap, abs=1e-4)
        paths = checkpoint_paths(lesson, number)[2 * i : 2 * i + 2]
        histories = [load(run.artifacts / path)["history"] for path in paths]
        if number in ["03", "04", "05"]:
            assert len(histories[1]) == 2, "the latest checkpoint holds both epochs"
        for history in histories:
            for epoch, row in enumerate(history):
                assert row == {name: pytest.approx(curves[name][epoch][1], rel=1e-5) for name in CURVES}
    if number != "01":
        assert next(lines, None) is None
