"""Nothing is lost, and a resumed run is the run it would have been."""

import copy
import os
import pickle
import random
import re
import subprocess

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import FLAGS, assert_same_state, folder_of, load, run_lesson
from PIL import Image

pytestmark = pytest.mark.usefixtures("no_pictures")


def interrupt_before_report(context, lesson, stop):
    """Press Ctrl-C in a lesson before the report of its Nth epoch."""
    reports, report_epoch = [], lesson.report_epoch

    def interrupt(*args):
        reports.append(args)
        if len(reports) == stop:
            raise KeyboardInterrupt
        report_epoch(*args)

    context.setattr(lesson, "report_epoch", interrupt)


@pytest.mark.parametrize(
    ("number", "epochs", "stop", "more"),
    [
        ("03", 4, 4, []),  # three epochs are saved when it is stopped
        ("04", 3, 6, ["--schedulers", "StepLR", "ReduceLROnPlateau"]),  # in the last epoch of the second arm
    ],
)
def test_resumed_in_a_new_process_equals_uninterrupted(
    lessons, tmp_path, monkeypatch, number, epochs, stop, more
):
    lesson, flags = lessons[number], [*FLAGS, "--epochs", str(epochs), *more]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt) as stopped:
        interrupt_before_report(context, lesson, stop)
        run_lesson(lesson, tmp_path / "a", *flags)
    command = str(stopped.value).removeprefix("To go on after the last saved epoch: ")
    words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', command)]
    resumed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    run_lesson(lesson, tmp_path / "b", *flags)
    for path in folder_of(lesson, tmp_path / "b").iterdir():
        assert_same_state(load(folder_of(lesson, tmp_path / "a") / path.name), load(path))

    for events in (tmp_path / "b").rglob("events*"):
        run = events.parent
        same_run = tmp_path / "a" / run.relative_to(tmp_path / "b")
        scalars = read_scalars(same_run)
        assert scalars == read_scalars(run), "the same points, each of them once"
        assert [step for step, _ in scalars["Loss/val"]] == list(range(1, epochs + 1))


def test_05_resumed_equals_uninterrupted(lessons, tmp_path, monkeypatch):
    """Stopped in the last epoch of the second arm, whose augmentation draws random numbers too."""
    lesson, flags = lessons["05"], [*FLAGS, "--subset", "64", "--epochs", "2"]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_before_report(context, lesson, 4)
        run_lesson(lesson, tmp_path / "a", *flags)
    run_lesson(lesson, tmp_path / "a", *flags, "--resume")
    run_lesson(lesson, tmp_path / "b", *flags)
    for path in folder_of(lesson, tmp_path / "b").iterdir():
        assert_same_state(load(folder_of(lesson, tmp_path / "a") / path.name), load(path))


def test_06_keeps_no_model_of_a_training_that_was_stopped(lessons, tmp_path, monkeypatch):
    """Otherwise the next run would evaluate it as if it were finished."""
    interrupt_before_report(monkeypatch, lessons["06"], 2)
    with pytest.raises(KeyboardInterrupt):
        run_lesson(lessons["06"], tmp_path, *FLAGS, "--epochs", 3)
    assert not list(tmp_path.rglob("*.pth"))


def test_03_goes_on_with_more_epochs_and_saves_every_fifth(lessons, tmp_path):
    lesson = lessons["03"]
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 4)
    assert not list(tmp_path.rglob("checkpoint_epoch_*"))
    first = load(folder_of(lesson, tmp_path) / "latest_checkpoint.pth")
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 6, "--resume")
    folder = folder_of(lesson, tmp_path)
    assert [path.name for path in folder.glob("checkpoint_epoch_*")] == ["checkpoint_epoch_5.pth"]
    assert load(folder / "checkpoint_epoch_5.pth")["next_epoch"] == 6
    latest = load(folder / "latest_checkpoint.pth")
    assert latest["next_epoch"] == 7 and latest["history"][:4] == first["history"]
    output = run_lesson(
        lesson, tmp_path, *FLAGS, "--epochs", 6, "--resume", folder / "checkpoint_epoch_5.pth"
    )
    assert "5 of 6 epochs are done" in output and "Epoch  6/6" in output and "Epoch  5/6" not in output


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_new_run_keeps_the_checkpoints_of_the_one_before(lessons, tmp_path, number):
    folder, small = folder_of(lessons[number], tmp_path), [*FLAGS, "--subset", 32]
    run_lesson(lessons[number], tmp_path, *small)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    output = run_lesson(lessons[number], tmp_path, *small, "--seed", 1)
    kept = folder.with_name(f"{folder.name}_run_1")
    assert f"are in {kept} now" in output
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert load(folder / "latest_checkpoint.pth")["hyperparameters"]["seed"] == 1
    run_lesson(lessons[number], tmp_path, "--resume", kept / "latest_checkpoint.pth", *small[2:])
    assert load(folder / "latest_checkpoint.pth")["hyperparameters"]["seed"] == 1


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_best_model_is_the_one_of_the_best_validation_accuracy(lessons, tmp_path, monkeypatch, number):
    lesson = lessons[number]
    weights, accuracies = [], []

    def evaluate(model, *_):
        weights.append(copy.deepcopy(model.state_dict()))
        accuracies.append([20.0, 60.0, 40.0][(len(weights) - 1) % 3])
        return 1.0, accuracies[-1]

    def train_one_epoch(
        model, loader, loss_fn, optimizer, device, *_
    ):  # it looks better and better on training data
        loss_fn(model(lesson.to_input(loader.dataset[:8][0], device)), loader.dataset[:8][1]).backward()
        optimizer.step()
        return 1.0 / (len(weights) + 1), 90.0 + len(weights)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    more = ["--schedulers", "StepLR"] if number == "04" else []
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3, *more)
    if number == "06":
        best = [tmp_path / "artifacts" / "checkpoints" / "best_model_eval.pth"]
    else:
        best = sorted(folder_of(lesson, tmp_path).glob("best_*.pth"))
    assert best
    for path in best:
        checkpoint = load(path)
        assert checkpoint["best_accuracy"] == 60.0 and checkpoint["next_epoch"] == 3
        candidates = [w for w, accuracy in zip(weights, accuracies, strict=True) if accuracy == 60.0]
        assert any(all(torch.equal(checkpoint["model"][k], w[k]) for k in w) for w in candidates)


def test_an_interrupted_save_leaves_the_old_file(lessons, tmp_path, monkeypatch):
    for number in ["03", "04", "05", "06"]:
        lesson, path = lessons[number], tmp_path / number / "x.pth"
        lesson.save_checkpoint({"epoch": 1}, path)

        def fail(file):
            os.truncate(file, 1000)
            raise OSError("no space left")

        with monkeypatch.context() as context:
            context.setattr(lesson.os, "fsync", fail)
            with pytest.raises(OSError, match="no space"):
                lesson.save_checkpoint({"epoch": 2}, path)
        assert load(path) == {"epoch": 1}
        lesson.save_checkpoint({"epoch": 3}, path)
        assert load(path) == {"epoch": 3} and [file.name for file in path.parent.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_save_reaches_the_disk_before_it_replaces(lessons, tmp_path, monkeypatch, number):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(
        os, "replace", lambda source, target: (calls.append("replace"), replace(source, target))
    )
    lessons[number].save_checkpoint({"epoch": 1}, tmp_path / "x.pth")
    assert calls == ["fsync", "replace"]


class Malice:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_unusable_checkpoints_get_one_sentence(finished, lessons, tmp_path, number, capsys):
    lesson = lessons[number]
    good = next(finished(number).artifacts.glob("checkpoints/**/*.pth"))
    content = good.read_bytes()
    (tmp_path / "truncated.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not a checkpoint", encoding="utf-8")
    (tmp_path / "folder.pth").mkdir()
    other = load(good)
    torch.save(other["model"], tmp_path / "weights_only.pth")
    torch.save(other | {"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "another_network.pth")
    torch.save({"model": Malice(tmp_path / "was_run")}, tmp_path / "malice.pth")
    (tmp_path / "plain_pickle.pth").write_bytes(pickle.dumps(Malice(tmp_path / "was_run"), protocol=2))
    paths = [*tmp_path.glob("*.pth"), tmp_path / "missing.pth", ""]
    assert len(paths) == 10
    flag = "--checkpoint" if number == "06" else "--resume"
    for path in paths:
        with pytest.raises(SystemExit) as error:
            run_lesson(lesson, tmp_path / "out", flag, path)
        message = str(error.value.code)
        assert str(path) in message and "\n" not in message and "another one" in message
    assert not (tmp_path / "was_run").exists()
    lesson.load_checkpoint(good)


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_resumed_run_keeps_its_settings(finished, lessons, tmp_path, number, capsys):
    path = finished(number).artifacts / "checkpoints" / lessons[number].LESSON / "latest_checkpoint.pth"
    for flag, value in [("--seed", 1), ("--batch-size", 7), ("--lr", 0.5), ("--subset", 100)]:
        with pytest.raises(SystemExit) as error:
            run_lesson(lessons[number], tmp_path, "--resume", path, flag, value)
        assert error.value.code == 2 and flag in capsys.readouterr().err
    elsewhere = {"03": "04", "04": "05", "05": "04"}[number]
    path = finished(elsewhere).artifacts / "checkpoints" / lessons[elsewhere].LESSON / "latest_checkpoint.pth"
    with pytest.raises(SystemExit) as error:
        run_lesson(lessons[number], tmp_path, "--resume", path)
    assert error.value.code == 2 and lessons[elsewhere].LESSON in capsys.readouterr().err


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_random_states_come_back(lessons, number):
    shuffle = torch.Generator().manual_seed(5)

    def draw():
        return (
            random.random(),
            np.random.rand(),
            torch.rand(1).item(),
            torch.rand(1, generator=shuffle).item(),
        )

    states = copy.deepcopy(lessons[number].get_random_states(shuffle))
    first, second = draw(), draw()
    lessons[number].set_random_states(states, shuffle)
    assert (draw(), draw()) == (first, second)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_03_predicts_a_picture_and_trains_nothing(finished, lessons, tmp_path, capsys):
    folder = finished("03").folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 4), dtype=np.uint8)
    for name, mode in [
        ("a.png", "RGBA"),
        ("b.jpg", "RGB"),
        ("c.png", "L"),
        ("d.gif", "P"),
        ("e.webp", "RGB"),
    ]:
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        output = run_lesson(lessons["03"], folder, "--predict", tmp_path / name)
        assert f"{tmp_path / name}: " in output and output.count(" %") == 3 and "Epoch" not in output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    picture = lessons["03"].read_picture(tmp_path / "a.png")
    assert picture.shape == (1, 32, 32, 3) and picture.dtype == torch.uint8
    (tmp_path / "no.png").write_text("no picture", encoding="utf-8")
    for path in [tmp_path / "no.png", tmp_path / "missing.png", tmp_path]:
        with pytest.raises(SystemExit, match="as a picture"):
            run_lesson(lessons["03"], folder, "--predict", path)
    with pytest.raises(SystemExit, match="Train first"):
        run_lesson(lessons["03"], tmp_path / "empty", "--predict", tmp_path / "a.png")


def test_03_picture_is_cut_to_its_middle_square_and_turned_upright(lessons, tmp_path):
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, :40] = 255  # outside of the middle square
    pixels[:20, 40:80, 0] = 200  # the upper half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    for name in ["turned.png", "upright.png"]:
        picture = lessons["03"].read_picture(tmp_path / name)[0]
        assert picture[4, 16].tolist() == [200, 0, 0] and picture[28, 16].tolist() == [0, 0, 0]
        assert picture[4, 2].tolist() == [200, 0, 0] and picture[28, 2].tolist() == [0, 0, 0], (
            "no white at the side"
        )


def test_03_probabilities_are_softmax_of_eval_mode_logits(lessons):
    lesson = lessons["03"]
    model = lesson.SimpleCNN(dropout=0.5).train()
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    probabilities = lesson.predict(model, images, "cpu")
    expected = torch.softmax(copy.deepcopy(model).eval()(lesson.to_input(images, "cpu")), dim=1)
    assert torch.allclose(probabilities, expected) and torch.allclose(probabilities.sum(dim=1), torch.ones(5))
    words = lesson.describe(torch.tensor([0.1, 0.6, 0.3]), ["cat", "dog", "frog"])
    assert words == "dog 60.0 %, frog 30.0 %, cat 10.0 %"


def test_checkpoints_of_every_lesson_load_into_a_new_network(finished, lessons):
    for number in ["03", "04", "05", "06"]:
        for path in finished(number).artifacts.glob("checkpoints/**/*.pth"):
            checkpoint, model = lessons[number].load_checkpoint(path)
            assert all(torch.equal(model.state_dict()[k], v) for k, v in checkpoint["model"].items())
