"""Lesson 03: nothing is lost, a resumed run is the run it would have been, and a picture is classified.

save_checkpoint(), load_checkpoint() and create_folder() have one text in all lessons (test_sync.py).
"""

import copy
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import (
    FLAGS,
    PATHS,
    assert_same_state,
    checkpoints_of,
    folder_of,
    in_background,
    load,
    resume,
    run_lesson,
    stop_in_epoch,
    use_results,
)
from PIL import Image

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ["--subset", 16, "--batch-size", 8]


@pytest.fixture
def lesson(lessons):
    return lessons["03"]


def files_in(folder):
    """Return what is in all files below a folder, to see whether anything has changed."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_accuracies(patch, lesson, accuracies):
    """Let the validations return these accuracies. The training is as ever."""
    accuracies = iter(accuracies)
    patch.setattr(lesson, "evaluate", lambda *_: (1.0, next(accuracies)))


def assert_same_run(lesson, one, other):
    """Compare the checkpoints in two output folders, but for what a clock writes."""
    names = checkpoints_of(lesson, other).keys()
    assert names and checkpoints_of(lesson, one).keys() == names
    for name in names:
        assert_same_state(load(folder_of(lesson, one) / name), load(folder_of(lesson, other) / name))


# Resuming

# Runs a lesson that is killed when it has written half of its Nth checkpoint.
KILLED = """
import os, runpy, sys, torch
path, last, *flags = sys.argv[1:]
save, count = torch.save, 0
def save_or_die(content, file):
    global count
    save(content, file)
    count += 1
    if count == int(last):
        os.truncate(file, os.path.getsize(file) // 2)
        os._exit(9)
torch.save = save_or_die
sys.argv = [path, *flags]
runpy.run_path(path, run_name="__main__")
"""


@in_background
def killed_and_resumed(folder):
    """Two processes in a folder of their own: one that is killed while it saves, and one that resumes."""
    flags = [*FLAGS, "--epochs", "3", "--output-dir", "here"]
    commands = [["-c", KILLED, str(PATHS["03"]), "4", *flags], [str(PATHS["03"]), *flags, "--resume"]]
    processes = [
        subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
        for command in commands
    ]
    return SimpleNamespace(folder=folder / "here", killed=processes[0], resumed=processes[1])


def test_a_killed_run_resumes_in_a_new_process_bit_for_bit(lesson, killed_and_resumed, tmp_path):
    """Killed in the middle of a save, it ends with the same weights, momentum, order, and history as without."""
    killed, resumed = killed_and_resumed.killed, killed_and_resumed.resumed
    assert killed.returncode == 9, killed.stderr
    assert resumed.returncode == 0 and resumed.stderr == "", "no warning, and no bar without a terminal"
    assert "Resuming after epoch " in resumed.stdout and "Epoch  3/3" in resumed.stdout
    assert "Epoch  1/3" in killed.stdout and "Epoch  1/3" not in resumed.stdout
    assert [path.name for path in killed_and_resumed.folder.parent.iterdir()] == ["here"]
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3)
    assert_same_run(lesson, killed_and_resumed.folder, tmp_path)


def test_a_resumed_run_continues_its_curves(lesson, killed_and_resumed, tmp_path):
    """In the folder of its first start, every epoch is one point, also one that was logged, but not saved."""
    killed, resumed = killed_and_resumed.killed.stdout, killed_and_resumed.resumed.stdout
    assert killed.count("\nEpoch ") + resumed.count("\nEpoch ") == 4, "one epoch was logged twice"
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3)
    curves = []
    for folder in [killed_and_resumed.folder, tmp_path]:
        [run] = (folder / "tensor_board" / lesson.LESSON).iterdir()
        curves.append(read_scalars(run))
        assert curves[-1].pop("Seconds")
    assert curves[0] == curves[1]
    assert all([step for step, _ in points] == [1, 2, 3] for points in curves[0].values())


def test_stopped_between_any_two_saves_it_loses_nothing(lesson, tmp_path, seconds, monkeypatch):
    """Resumed, or started again if nothing was saved, all its files are those of a run that was not stopped."""
    accuracies, save_checkpoint = [20.0, 60.0, 40.0, 60.0, 50.0], lesson.save_checkpoint
    set_accuracies(monkeypatch, lesson, accuracies)
    run_lesson(lesson, tmp_path / "whole", *SMALL, "--epochs", 5)
    for stop in itertools.count(1):
        folder, saves = tmp_path / str(stop), itertools.count(1)

        def save_or_stop(checkpoint, path, saves=saves, stop=stop):
            if next(saves) == stop:
                raise KeyboardInterrupt
            save_checkpoint(checkpoint, path)

        set_accuracies(monkeypatch, lesson, accuracies)
        monkeypatch.setattr(lesson, "save_checkpoint", save_or_stop)
        try:
            run_lesson(lesson, folder, *SMALL, "--epochs", 5)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(lesson, "save_checkpoint", save_checkpoint)
        latest = folder_of(lesson, folder) / "latest_checkpoint.pth"
        set_accuracies(
            monkeypatch, lesson, accuracies[len(load(latest)["history"]) if latest.exists() else 0 :]
        )
        torch.seed()  # other random numbers than those of the run that was stopped
        if latest.exists():
            resume(lesson, folder)
        else:
            run_lesson(lesson, folder, *SMALL, "--epochs", 5, "--overwrite")
        assert_same_run(lesson, folder, tmp_path / "whole")
    assert stop == 9, "there are 8 saves: the best model twice, the latest state five times, and a snapshot"


def test_a_resumed_run_can_have_more_epochs(lesson, tmp_path):
    """It equals a run that had as many from the beginning. Without more epochs there is nothing to train."""
    run_lesson(lesson, tmp_path / "a", *SMALL, "--epochs", 1)
    before = checkpoints_of(lesson, tmp_path / "a")
    assert "Epoch" not in resume(lesson, tmp_path / "a") and checkpoints_of(lesson, tmp_path / "a") == before
    output = resume(lesson, tmp_path / "a", "--epochs", 3)
    assert "Resuming after epoch 1 of 3.\nEpoch  2/3" in output
    run_lesson(lesson, tmp_path / "b", *SMALL, "--epochs", 3)
    assert_same_run(lesson, tmp_path / "a", tmp_path / "b")


def test_a_resumed_run_keeps_its_settings(lesson, tmp_path, capsys):
    """Another value is an error with status 2 that names the flag, and the same value is none."""
    run_lesson(lesson, tmp_path, *SMALL, "--seed", 5)
    before = files_in(tmp_path)
    values = {"--seed": 1, "--batch-size": 7, "--lr": 0.5, "--subset": 100, "--data": "cifar10"}
    for flag, value in values.items():
        with pytest.raises(SystemExit) as error:
            resume(lesson, tmp_path, flag, value)
        assert error.value.code == 2
        assert capsys.readouterr().err.endswith(f"a resumed run keeps its settings; leave out {flag}\n")
    assert files_in(tmp_path) == before
    assert "Epoch  2/2" in resume(lesson, tmp_path, *SMALL, "--seed", 5, "--data", "digits", "--epochs", 2)


# The folder of a run


def test_a_second_run_is_refused_and_touches_nothing(lesson, tmp_path):
    """One sentence and status 1 say on which data the first one was, and how to continue or to replace it."""
    run_lesson(lesson, tmp_path, *SMALL)
    before = files_in(tmp_path)
    with pytest.raises(
        SystemExit, match=r"holds a run on digits\. .*\(--resume\) or .*\(--overwrite\)\.$"
    ) as error:
        run_lesson(lesson, tmp_path, *SMALL, "--seed", 1)
    assert error.value.code.startswith(str(folder_of(lesson, tmp_path))) and "\n" not in error.value.code
    assert files_in(tmp_path) == before


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

    def no_data(*_, **__):
        sys.exit("no data")

    monkeypatch.setattr(lesson, "load_data", no_data)
    with pytest.raises(SystemExit, match="no data"):
        run_lesson(lesson, tmp_path)
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_the_earlier_run(lesson, tmp_path, seconds):
    """Nothing of it is left among the checkpoints, and the new run begins with epoch 1."""
    run_lesson(lesson, tmp_path / "a", *SMALL, "--epochs", 5, "--seed", 1)
    assert "Epoch  1/2" in run_lesson(lesson, tmp_path / "a", *SMALL, "--epochs", 2, "--overwrite")
    run_lesson(lesson, tmp_path / "b", *SMALL, "--epochs", 2)
    assert_same_run(lesson, tmp_path / "a", tmp_path / "b")


def test_resume_overwrite_and_predict_exclude_each_other(lesson, tmp_path, capsys):
    """Status 2."""
    modes = [["--resume"], ["--overwrite"], ["--predict", "cat.jpg"]]
    for one, other in itertools.combinations(modes, 2):
        with pytest.raises(SystemExit) as error:
            run_lesson(lesson, tmp_path, *one, *other)
        assert error.value.code == 2 and "not allowed with" in capsys.readouterr().err


# Checkpoints


def test_best_model_is_the_first_with_the_best_validation_accuracy(lesson, tmp_path, monkeypatch):
    """Its weights, history and accuracy are those of that epoch, and the lesson names it at the end."""
    weights, accuracies = [], iter([20.0, 60.0, 60.0, 40.0])

    def evaluate(model, *_):
        weights.append(copy.deepcopy(model.state_dict()))
        return 1.0, next(accuracies)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    output = run_lesson(lesson, tmp_path, *SMALL, "--epochs", 4)
    best = load(folder_of(lesson, tmp_path) / "best_model.pth")
    assert [row["Accuracy/val"] for row in best["history"]] == [20.0, 60.0] and best["best_accuracy"] == 60.0
    assert_same_state(dict(best["model"]), dict(weights[1]))
    latest = load(folder_of(lesson, tmp_path) / "latest_checkpoint.pth")
    assert [row["Accuracy/val"] for row in latest["history"]] == [20.0, 60.0, 60.0, 40.0]
    assert latest["best_accuracy"] == 60.0
    assert_same_state(dict(latest["model"]), dict(weights[3]))
    assert "Best validation accuracy: 60.00 % in epoch 2\n" in output
    assert f"Checkpoints: {folder_of(lesson, tmp_path)}\n" in output


def test_there_is_a_snapshot_of_every_fifth_epoch(lesson, tmp_path, monkeypatch):
    """And of no other one."""
    use_results(monkeypatch, lesson, [(1.0, 50.0)] * 11, [(1.0, 50.0)] * 11)
    run_lesson(lesson, tmp_path, *SMALL, "--epochs", 11)
    folder = folder_of(lesson, tmp_path)
    epochs = {path.name: len(load(path)["history"]) for path in folder.glob("checkpoint_epoch_*")}
    assert epochs == {"checkpoint_epoch_5.pth": 5, "checkpoint_epoch_10.pth": 10}


def test_a_checkpoint_holds_everything_in_plain_types(lesson, finished):
    """So that it loads without running code from it, and everywhere."""
    checkpoint = load(folder_of(lesson, finished("03").folder) / "latest_checkpoint.pth")
    run = checkpoint["hyperparameters"].pop("run")
    assert checkpoint["hyperparameters"] == {
        "epochs": 2, "batch_size": 128, "lr": 0.02, "seed": 42, "subset": 256, "data": "digits",
    }  # fmt: skip
    [folder] = (finished("03").folder / "tensor_board" / lesson.LESSON).iterdir()
    assert folder.name == run and checkpoint["class_names"] == list("0123456789")
    parts = {"model", "optimizer", "shuffle", "history", "best_accuracy", "class_names", "hyperparameters"}
    assert checkpoint.keys() == parts
    parameters = len(list(lesson.SimpleCNN().parameters()))
    momenta = [state["momentum_buffer"] for state in checkpoint["optimizer"]["state"].values()]
    assert len(momenta) == parameters and all(momentum.any() for momentum in momenta)

    def check(value):
        values = (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
        )
        assert isinstance(value, (dict, list, tuple, torch.Tensor, str, float, int, type(None))), type(value)
        for inner in values:
            check(inner)

    check(checkpoint)


def test_an_interrupted_save_leaves_the_old_file(lesson, tmp_path, monkeypatch):
    """It is replaced in one step, when the new file is complete."""
    path = tmp_path / "x.pth"
    lesson.save_checkpoint({"epoch": 1}, path)

    def save_half(content, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save_half)
        lesson.save_checkpoint({"epoch": 2}, path)
    assert load(path) == {"epoch": 1}
    lesson.save_checkpoint({"epoch": 3}, path)
    assert load(path) == {"epoch": 3} and list(tmp_path.iterdir()) == [path]


class Malice:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_refused(lesson, tmp_path):
    """Loading a checkpoint from a stranger runs nothing."""
    torch.save({"model": Malice(tmp_path / "was_run")}, tmp_path / "x.pth")
    with pytest.raises(pickle.UnpicklingError):
        lesson.load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("flags", [["--resume"], ["--predict", "cat.jpg"]])
def test_a_missing_checkpoint_gets_one_sentence(lesson, tmp_path, flags):
    """The sentence says which file is missing and what to do. Nothing is created."""
    with pytest.raises(SystemExit, match=r"\.pth does not exist\. Train a model first\.$") as error:
        run_lesson(lesson, tmp_path, *flags)
    assert error.value.code.startswith(str(folder_of(lesson, tmp_path))) and list(tmp_path.iterdir()) == []


# Pictures


def probabilities_of(lesson, folder, images):
    """Compute in a second way what the best model of a run says of images."""
    model = lesson.SimpleCNN()
    model.load_state_dict(load(folder_of(lesson, folder) / "best_model.pth")["model"])
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    inputs = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        return torch.exp(torch.log_softmax(model.eval()(inputs), dim=1))


def top_three(probabilities):
    """Return the text that lesson 03 prints for the probabilities of one image."""
    order = sorted(range(10), key=lambda i: -probabilities[i])[:3]
    return ", ".join(f"{i} {100 * probabilities[i]:.1f} %" for i in order)


def test_the_best_model_classifies_the_first_ten_test_images(lesson, tmp_path, monkeypatch):
    """The best of three epochs is the second one here. The probabilities are the softmax in eval mode."""
    set_accuracies(monkeypatch, lesson, [20.0, 60.0, 40.0])
    output = run_lesson(lesson, tmp_path, "--epochs", 3)
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=False)
    lines = [line.split() for line in output.splitlines() if line.startswith("  true: ")]
    expected = zip(labels, probabilities_of(lesson, tmp_path, images[:10]), strict=False)
    assert lines == [f"true: {label} predicted: {top_three(row)}".split() for label, row in expected]
    assert len(lines) == 10


def test_predict_classifies_a_picture_and_trains_nothing(lesson, finished, tmp_path):
    """It prints the three most probable classes, and on which data the model was trained."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a picture.png")
    before = files_in(finished("03").folder)
    output = run_lesson(lesson, finished("03").folder, "--predict", tmp_path / "a picture.png")
    images = torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0)
    words = top_three(probabilities_of(lesson, finished("03").folder, images)[0])
    assert output == f"{tmp_path / 'a picture.png'}: {words} (a model trained on digits)\n"
    assert files_in(finished("03").folder) == before


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
        "a.png": red, "b.jpg": red, "c.webp": red, "d.gif": red.convert("P"), "e.bmp": red,
        "opaque.png": red.convert("RGBA"), "cmyk.jpg": red.convert("CMYK"),
        "one_pixel.png": red.resize((1, 1)), "line.png": red.resize((3000, 1)),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        pixels = lesson.read_picture(tmp_path / name)
        assert (pixels.float() - torch.tensor([200.0, 0, 0]).view(3, 1, 1)).abs().mean() < 5, name
    Image.new("L", (50, 40), 128).save(tmp_path / "grey.png")
    assert set(lesson.read_picture(tmp_path / "grey.png").flatten().tolist()) == {128}


def test_an_unreadable_picture_gets_one_sentence(lesson, finished, tmp_path):
    """A missing file, a folder, a text, and a photo that is cut off."""
    Image.new("RGB", (500, 500), (9, 99, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for name in ["missing.png", ".", "text.png", "cut.jpg"]:
        with pytest.raises(SystemExit, match="^Cannot read ") as error:
            run_lesson(lesson, finished("03").folder, "--predict", tmp_path / name)
        assert str(tmp_path / name) in error.value.code and "\n" not in error.value.code
