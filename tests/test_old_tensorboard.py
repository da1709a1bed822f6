"""A real TensorBoard server shows the runs as the lessons measured them."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from types import SimpleNamespace

import pytest
from common import read_scalars
from conftest import folder_of, load, run_lesson
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

NUMBERS = [
    "07",
    "08",
    "11",
    "12",
]  # the others have curves of their own: see test_clipping.py, test_transfer.py


@pytest.fixture(scope="module")
def server(lessons, finished, tmp_path_factory):
    """TensorBoard on one run of each lesson, and a second one of lesson 08. Returns a function that asks it."""
    folder = tmp_path_factory.mktemp("board")
    for number in NUMBERS:
        shutil.copytree(finished(number).folder / "tensor_board", folder / "tensor_board", dirs_exist_ok=True)
    run_lesson(lessons["08"], folder, "--subset", 32, "--seed", 7)
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
    with_curves = sum(bool(read_scalars(run)) for run in runs)
    deadline = time.monotonic() + 60
    while sum(map(bool, ask("scalars/tags").values())) < with_curves and time.monotonic() < deadline:
        time.sleep(0.5)
    yield ask
    process.terminate()
    process.wait(20)


def test_every_run_shows_up_with_its_curves(server, lessons):
    tags = server("scalars/tags")
    names = {lessons[number].LESSON for number in NUMBERS}
    assert {run.replace("\\", "/").split("/")[0] for run in tags} == names
    measured = {run: curves for run, curves in tags.items() if curves}
    assert len(measured) == 2 + 2 + 2 + 1
    for run, curves in measured.items():
        assert {"Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "LearningRate"} <= set(curves), (
            run
        )


def test_two_runs_of_a_lesson_are_two_runs(server):
    runs = [run for run in server("scalars/tags") if "08_early_stopping" in run]
    assert len(runs) == 2
    values = [server("scalars/scalars", run=run, tag="Loss/train")[0][2] for run in runs]
    assert values[0] != values[1]


@pytest.mark.parametrize("number", NUMBERS)
def test_values_are_those_of_the_history(server, finished, lessons, number):
    runs = folder_of(lessons[number], finished(number).folder)
    for latest in runs.rglob("latest_checkpoint.pth"):
        [row] = load(latest)["history"]
        run = f"{lessons[number].LESSON}/{latest.parent.relative_to(runs.parent).as_posix()}"
        run = next(name for name in server("scalars/tags") if name.replace("\\", "/") == run)
        for tag, value in row.items():
            ((_, step, shown),) = server("scalars/scalars", run=run, tag=tag)
            assert step == 1 and shown == pytest.approx(value, rel=1e-5), tag
        assert row["Overfitting/accuracy_gap"] == row["Accuracy/train"] - row["Accuracy/val"]


@pytest.mark.parametrize(
    ("number", "pictures"),
    [
        ("07", ["mixed_precision"]),
        ("08", ["early_stopping"]),
    ],
)
def test_pictures_of_the_comparisons_stand_under_images(server, lessons, number, pictures):
    images = {run.replace("\\", "/"): tags for run, tags in server("images/tags").items()}
    shown = images[f"{lessons[number].LESSON}/digits_run_1" + ("/rules" if number == "08" else "")]
    assert set(shown) == {f"Comparison/{picture}" for picture in pictures}


@pytest.mark.parametrize(("number", "arms"), [("07", 2), ("11", 2)])
def test_arms_can_be_compared_by_their_best_accuracy_under_hparams(server, finished, lessons, number, arms):
    """With what TensorBoard's own plugin reads: one session for each arm, in the arm's own run."""
    folder = finished(number).folder / "tensor_board" / lessons[number].LESSON / "digits_run_1"
    found = {}
    for events in folder.glob("*/events*"):
        accumulator = EventAccumulator(str(events.parent))
        accumulator.Reload()
        content = accumulator.PluginTagToContent("hparams")
        assert set(content) == {
            "_hparams_/experiment",
            "_hparams_/session_start_info",
            "_hparams_/session_end_info",
        }
        session = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
        settings = session.session_start_info.hparams
        experiment = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
        assert [metric.name.tag for metric in experiment.metric_infos] == ["Accuracy/best_val"]
        assert (settings["epochs"].number_value, settings["lr"].number_value) == (1, pytest.approx(0.05))
        found[settings["arm"].string_value] = events.parent.name
    assert len(found) == arms and all(arm == run for arm, run in found.items())


def test_hyperparameters_are_recorded(server):
    text = server("text/tags")
    for run, curves in server("scalars/tags").items():
        assert "Hyperparameters/text_summary" in text[run] or not curves


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", [number for number in NUMBERS if number != "07"])  # its arms take turns
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


@pytest.mark.parametrize("number", NUMBERS)
def test_the_points_are_flushed_once_they_are_all_there(lessons, tmp_path, number):
    """Where TensorFlow is installed, TensorBoard writes with it, and that keeps them for two minutes."""
    calls = []
    writer = SimpleNamespace(
        log_dir=str(tmp_path),
        add_scalar=lambda *point: calls.append(point),
        flush=lambda: calls.append("flush"),
    )
    names = ["Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "LearningRate", "Seconds"]
    names += ["ImagesPerSecond"] if number == "12" else []
    row = {name: float(i) for i, name in enumerate(names)}
    lessons[number].report_epoch(writer, 7, 9, row)
    assert calls == [*((name, value, 7) for name, value in row.items()), "flush"]
