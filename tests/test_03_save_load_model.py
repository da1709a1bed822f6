"""Lesson 03: nothing is lost, and a picture is classified.

What lessons 03 to 05 have in common, to save and resume a run, is in test_training.py. save_checkpoint(),
load_checkpoint() and create_folder() have one text in all lessons (test_sync.py).
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    PATHS,
    assert_same_state,
    checkpoints_of,
    folder_of,
    in_background,
    load,
    resume,
    run_lesson,
    stop_in_epoch,
)
from PIL import Image

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ["--data", "digits", "--device", "cpu", "--subset", "16", "--batch-size", "8"]


@pytest.fixture
def lesson(lessons):
    return lessons["03"]


def assert_same_checkpoints(lesson, one, other):
    """Compare the checkpoints in two output folders."""
    names = checkpoints_of(lesson, other).keys()
    assert names and checkpoints_of(lesson, one).keys() == names
    for name in names:
        assert_same_state(load(folder_of(lesson, one) / name), load(folder_of(lesson, other) / name))


# Resuming

# Runs a lesson that is killed when it has written half of the latest state after its third epoch.
KILLED = """
import os, runpy, sys, torch
del sys.argv[0]
save, count = torch.save, 0
def save_or_die(content, file):
    global count
    save(content, file)
    count += "latest" in str(file)
    if count == 3:
        os.truncate(file, os.path.getsize(file) // 2)
        os._exit(9)
torch.save = save_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@in_background
def killed(folder):
    command = [sys.executable, "-c", KILLED, str(PATHS["03"]), *SMALL, "--epochs", "4"]
    process = subprocess.run([*command, "--output-dir", str(folder)], capture_output=True, text=True)
    return SimpleNamespace(folder=folder, process=process)


def test_a_run_that_is_killed_while_it_saves_resumes_bit_for_bit(lesson, killed, tmp_path):
    """The file that it was about to replace is intact, and no half of a new one is left behind."""
    assert killed.process.returncode == 9, killed.process.stderr
    assert "Resuming after epoch 2 of 4.\nEpoch  3/4" in resume(lesson, killed.folder)
    run_lesson(lesson, tmp_path, *SMALL, "--epochs", 4)
    assert_same_checkpoints(lesson, killed.folder, tmp_path)
    assert {path.suffix for path in folder_of(lesson, killed.folder).iterdir()} == {".pth"}


def test_a_resumed_run_can_have_more_epochs(lesson, tmp_path):
    """It equals a run that had as many from the beginning. Without more epochs there is nothing to train."""
    run_lesson(lesson, tmp_path / "a", *SMALL, "--epochs", 1)
    assert "Epoch" not in resume(lesson, tmp_path / "a")
    output = resume(lesson, tmp_path / "a", "--epochs", 2)
    assert "Resuming after epoch 1 of 2.\nEpoch  2/2" in output
    run_lesson(lesson, tmp_path / "b", *SMALL, "--epochs", 2)
    assert_same_checkpoints(lesson, tmp_path / "a", tmp_path / "b")


# The folder of a run


def test_a_second_run_is_refused_before_the_first_has_finished_an_epoch(lesson, tmp_path, monkeypatch):
    """There is nothing to resume yet."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, lesson, 1)
        run_lesson(lesson, tmp_path, *SMALL)
    with pytest.raises(
        SystemExit, match=r"holds a run that has not finished an epoch\. .*\(--overwrite\)\.$"
    ):
        run_lesson(lesson, tmp_path, *SMALL)


def test_two_starts_at_the_same_moment_are_not_mixed(lesson, tmp_path, monkeypatch):
    """The other start makes the folder right before this one does, so that this one has seen none."""
    mkdir = Path.mkdir

    def make_it_first(path, *args, **kwargs):
        if path == folder_of(lesson, tmp_path):
            os.makedirs(path)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", make_it_first)
    monkeypatch.setattr(lesson, "train", None)
    with pytest.raises(SystemExit, match="holds a run that has not finished an epoch"):
        run_lesson(lesson, tmp_path, *SMALL)


def test_without_data_no_folder_is_created(lesson, tmp_path, monkeypatch):
    """So that the next start needs no --overwrite."""
    monkeypatch.setattr(lesson, "load_data", lambda *_, **__: sys.exit("no data"))
    with pytest.raises(SystemExit, match="no data"):
        run_lesson(lesson, tmp_path)
    assert not list(tmp_path.iterdir())


# Checkpoints


def test_a_checkpoint_holds_everything(lesson, finished):
    """Also the time of the start, which names the folder of its curves, and the momentum of every weight."""
    checkpoint = load(folder_of(lesson, finished("03").folder) / "latest_checkpoint.pth")
    [run] = (finished("03").folder / "tensor_board" / lesson.LESSON).iterdir()
    settings = {"epochs": 2, "batch_size": 128, "lr": 0.02, "seed": 42, "subset": 256, "data": "digits"}
    assert checkpoint["hyperparameters"] == settings | {"run": run.name}
    assert checkpoint["class_names"] == list("0123456789")
    momenta = [state["momentum_buffer"] for state in checkpoint["optimizer"]["state"].values()]
    assert len(momenta) == len(list(lesson.SimpleCNN().parameters())) and all(map(torch.any, momenta))


class Malice:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_loading_a_checkpoint_from_a_stranger_runs_no_code(lesson, tmp_path):
    torch.save({"model": Malice(tmp_path / "was_run")}, tmp_path / "x.pth")
    with pytest.raises(pickle.UnpicklingError):
        lesson.load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "was_run").exists()


# Pictures


def top_three(lesson, folder, images):
    """Compute in a second way what the best model of a run says of images, as the lesson prints it."""
    model = lesson.SimpleCNN()
    model.load_state_dict(load(folder_of(lesson, folder) / "best_model.pth")["model"])
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    with torch.no_grad():
        logits = model.eval()((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    answers = []
    for row in torch.exp(torch.log_softmax(logits, dim=1)).tolist():
        order = sorted(range(10), key=lambda i: -row[i])[:3]
        answers.append(", ".join(f"{i} {100 * row[i]:.1f} %" for i in order))
    return answers


def test_the_best_model_classifies_the_first_ten_test_images(lesson, tmp_path, monkeypatch):
    """The best epoch is the first one here, whose weights differ from the last ones."""
    accuracies = iter([60.0, 20.0])
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, next(accuracies)))
    output = run_lesson(lesson, tmp_path, "--epochs", 2)
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=False)
    lines = [line.split() for line in output.splitlines() if line.startswith("  true: ")]
    expected = zip(labels[:10], top_three(lesson, tmp_path, images[:10]), strict=True)
    assert lines == [f"true: {label} predicted: {answer}".split() for label, answer in expected]
    assert f"Checkpoints: {folder_of(lesson, tmp_path)}\n" in output


def test_predict_classifies_a_picture_and_writes_nothing(lesson, finished, tmp_path):
    """It prints the three most probable classes, and on which data the model was trained."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path := tmp_path / "a picture.png")
    folder = finished("03").folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    output = run_lesson(lesson, folder, "--predict", path)
    [answer] = top_three(lesson, folder, torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0))
    assert output == f"{path}: {answer} (a model trained on digits)\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_predict_without_a_model_is_one_sentence(lesson, tmp_path):
    with pytest.raises(SystemExit, match=r"best_model\.pth does not exist\. Train a model first\.$"):
        run_lesson(lesson, tmp_path, "--predict", "cat.jpg")
    assert not list(tmp_path.iterdir())


def test_a_picture_is_turned_upright_and_cut_to_its_middle_square(lesson, tmp_path):
    """Red, green and blue stay in their places, and a photo that was taken sideways is turned by its EXIF data."""
    pixels = np.full((40, 120, 3), 255, dtype=np.uint8)  # white at both sides
    pixels[:20, 40:80] = [200, 100, 0]
    pixels[20:, 40:80] = [0, 100, 200]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    for name in ["turned.png", "upright.png"]:
        picture = lesson.read_picture(tmp_path / name)
        assert picture.shape == (1, 3, 32, 32) and picture.dtype == torch.uint8
        for column in [1, 16, 30]:
            assert picture[0, :, 4, column].tolist() == pytest.approx([200, 100, 0], abs=2), name
            assert picture[0, :, 28, column].tolist() == pytest.approx([0, 100, 200], abs=2), name


def test_pictures_of_every_kind_are_read(lesson, tmp_path):
    """A red picture is red in every format and color mode, whatever its size."""
    red = Image.new("RGB", (50, 40), (200, 0, 0))
    pictures = {
        "a.jpg": red, "b.gif": red.convert("P"), "opaque.png": red.convert("RGBA"),
        "cmyk.jpg": red.convert("CMYK"), "one_pixel.png": red.resize((1, 1)), "line.png": red.resize((3000, 1)),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        pixels = lesson.read_picture(tmp_path / name)
        assert (pixels.float() - torch.tensor([200.0, 0, 0]).view(3, 1, 1)).abs().mean() < 5, name
    Image.new("L", (50, 40), 128).save(tmp_path / "grey.png")
    assert set(lesson.read_picture(tmp_path / "grey.png").flatten().tolist()) == {128}


def test_an_unreadable_picture_gets_one_sentence(lesson, tmp_path):
    """A missing file, a folder, a text, and a photo that is cut off."""
    Image.new("RGB", (500, 500), (9, 99, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for name in ["missing.png", ".", "text.png", "cut.jpg"]:
        with pytest.raises(SystemExit, match="^Cannot read ") as error:
            lesson.read_picture(tmp_path / name)
        assert str(tmp_path / name) in error.value.code and "\n" not in error.value.code
