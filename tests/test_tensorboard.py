"""A real TensorBoard server shows the runs as the lessons measured them."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
import torch
from common import read_scalars
from conftest import run_lesson

NUMBERS = ["02", "03", "04", "05", "06"]


@pytest.fixture(scope="module")
def server(lessons, finished, tmp_path_factory):
    """TensorBoard on one run of each lesson, and a second one of lesson 02. Returns a function that asks it."""
    folder = tmp_path_factory.mktemp("board")
    for number in NUMBERS:
        shutil.copytree(finished(number).folder / "tensor_board", folder / "tensor_board", dirs_exist_ok=True)
    run_lesson(lessons["02"], folder, "--subset", 32, "--seed", 7)
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder / "tensor_board"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--load_fast", "false"], stderr=subprocess.PIPE, text=True
    )
    address = None
    while address is None:
        line = process.stderr.readline()
        assert line, "TensorBoard stopped"
        address = re.search(r"http://[\d.]+:\d+/", line)

    def ask(path, **query):
        url = f"{address[0]}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)

    runs = {path.parent for path in (folder / "tensor_board").rglob("events*")}
    deadline = time.monotonic() + 60
    while len(ask("scalars/tags")) < len(runs) and time.monotonic() < deadline:
        time.sleep(0.5)
    yield ask
    process.terminate()
    process.wait(20)


def test_every_run_shows_up_with_its_curves(server, lessons):
    tags = server("scalars/tags")
    names = {lessons[number].LESSON for number in NUMBERS}
    assert {run.replace("\\", "/").split("/")[0] for run in tags} == names
    assert len(tags) == 2 + 1 + 6 + 3 + 1
    for run, curves in tags.items():
        assert {"Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "LearningRate"} <= set(curves), (
            run
        )


def test_two_runs_of_a_lesson_are_two_runs(server):
    runs = [run for run in server("scalars/tags") if "02_with_validation" in run]
    assert len(runs) == 2
    values = [server("scalars/scalars", run=run, tag="Loss/train")[0][2] for run in runs]
    assert values[0] != values[1]


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_values_are_those_of_the_history(server, finished, lessons, number):
    latest = finished(number).artifacts / "checkpoints" / lessons[number].LESSON / "latest_checkpoint.pth"
    checkpoint = torch.load(latest, weights_only=True)
    run = "/".join([lessons[number].LESSON, checkpoint.get("arm", ""), checkpoint["run"]]).replace("//", "/")
    run = next(name for name in server("scalars/tags") if name.replace("\\", "/") == run)
    row = checkpoint["history"][0]
    gap = row["train_accuracy"] - row["val_accuracy"]
    for tag, value in {"Loss/train": row["train_loss"], "Loss/val": row["val_loss"], "LearningRate": row["lr"],
                       "Accuracy/train": row["train_accuracy"], "Accuracy/val": row["val_accuracy"],
                       "Overfitting/accuracy_gap": gap}.items():  # fmt: skip
        ((_, step, shown),) = server("scalars/scalars", run=run, tag=tag)
        assert step == 1 and shown == pytest.approx(value, rel=1e-5), tag


def test_06_shows_figures_and_a_curve_for_every_class(server, finished, lessons):
    run = next(run for run in server("scalars/tags") if lessons["06"].LESSON in run)
    images = server("images/tags")[run]
    assert {
        f"Evaluation/{name}" for name in ["confusion_matrix", "confidence_analysis", "error_samples"]
    } == set(images)
    assert set(server("pr_curves/tags")[run]) == {f"PrecisionRecall/{digit}" for digit in range(10)}
    report = json.loads((finished("06").artifacts / "evaluation_report.json").read_text(encoding="utf-8"))
    ((_, _, accuracy),) = server("scalars/scalars", run=run, tag="Test/accuracy")
    assert accuracy == pytest.approx(100 * report["accuracy"], rel=1e-5)


def test_hyperparameters_are_recorded(server):
    for run in server("scalars/tags"):
        assert "Hyperparameters/text_summary" in server("text/tags")[run]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", NUMBERS)
def test_the_points_of_an_epoch_are_on_the_disk_before_anything_else_happens(
    lessons, tmp_path, monkeypatch, number
):
    """So a crash loses none that a checkpoint counts on."""
    report_epoch, points = lessons[number].report_epoch, []

    def report_and_look(writer, epoch, *args):
        report_epoch(writer, epoch, *args)
        points.append([step for step, _ in read_scalars(writer.log_dir)["LearningRate"]])

    monkeypatch.setattr(lessons[number], "report_epoch", report_and_look)
    run_lesson(lessons[number], tmp_path, "--subset", 16, "--epochs", 2)
    assert points[:2] == [[1], [1, 2]]
