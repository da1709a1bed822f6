"""Nothing is lost, and a resumed run is the run it would have been."""

import contextlib
import copy
import io
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import CPU, FLAGS, assert_same_state, checkpoints_of, folder_of, load, run_lesson
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


def resume(lesson, output_dir, *flags):
    """Run main() with these flags alone, so that a checkpoint's settings stand. Returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        lesson.main(["--output-dir", str(output_dir), "--device", "cpu", *map(str, flags)])
    return output.getvalue()


def assert_same_run(lesson, one, other):
    """Compare all checkpoints of the first runs in two output folders."""
    names = checkpoints_of(lesson, other).keys()
    assert names and checkpoints_of(lesson, one).keys() == names
    for name in names:
        assert_same_state(load(folder_of(lesson, one) / name), load(folder_of(lesson, other) / name))


@pytest.mark.parametrize(
    ("number", "epochs", "stop", "more"),
    [
        ("03", 4, 4, []),  # three epochs are saved when it is stopped
        ("04", 3, 6, ["--schedulers", "StepLR", "ReduceLROnPlateau"]),  # in the last epoch of the second arm
    ],
)
def test_resumed_by_the_printed_command_equals_uninterrupted(
    lessons, tmp_path, monkeypatch, number, epochs, stop, more
):
    """Lesson 03's in a new process, lesson 04's without the seconds that a new process takes to start."""
    lesson, flags = lessons[number], [*FLAGS, "--epochs", str(epochs), *more]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt) as stopped:
        interrupt_before_report(context, lesson, stop)
        run_lesson(lesson, tmp_path / "a", *flags)
    command = str(stopped.value).removeprefix("To go on after the last saved epoch: ")
    if number == "03":
        resumed = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert resumed.returncode == 0, resumed.stderr
    else:
        torch.manual_seed(0)  # random numbers that are not those of the run that was stopped
        lesson.main(shlex.split(command)[2:])
    run_lesson(lesson, tmp_path / "b", *flags)
    assert_same_run(lesson, tmp_path / "a", tmp_path / "b")
    for events in (tmp_path / "b").rglob("events*"):
        run = events.parent
        same_run = tmp_path / "a" / run.relative_to(tmp_path / "b")
        scalars, expected = read_scalars(same_run), read_scalars(run)
        if scalars:  # the pictures of lesson 04 have a folder of their own
            assert scalars.pop("Seconds") and expected.pop("Seconds")
            assert scalars == expected, "the same points, each of them once"
            assert [step for step, _ in scalars["Loss/val"]] == list(range(1, epochs + 1))


def test_05_resumed_equals_uninterrupted(lessons, tmp_path, monkeypatch):
    """Stopped in the last epoch of the second arm, whose augmentation draws random numbers too."""
    lesson, flags = lessons["05"], [*FLAGS, "--subset", "64", "--epochs", "2"]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_before_report(context, lesson, 4)
        run_lesson(lesson, tmp_path / "a", *flags)
    run_lesson(lesson, tmp_path / "a", *flags, "--resume")
    run_lesson(lesson, tmp_path / "b", *flags)
    assert_same_run(lesson, tmp_path / "a", tmp_path / "b")


def test_06_evaluates_no_model_of_a_training_that_was_stopped(lessons, tmp_path, monkeypatch):
    """It is kept under another name, and the next run trains anew."""
    lesson, checkpoints = lessons["06"], tmp_path / "artifacts" / "checkpoints"
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_before_report(context, lesson, 2)
        run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3)
    assert [path.name for path in checkpoints.iterdir()] == ["digits_run_1_unfinished.pth"]
    assert len(load(checkpoints / "digits_run_1_unfinished.pth")["history"]) == 1
    assert "Epoch  1/1" in run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 1)
    assert {path.name for path in checkpoints.iterdir()} == {
        "digits_run_1_unfinished.pth",
        "best_model_eval.pth",
    }
    assert "No training" in run_lesson(lesson, tmp_path, *FLAGS)


def test_03_goes_on_with_more_epochs_and_saves_every_fifth(lessons, tmp_path):
    lesson, folder = lessons["03"], folder_of(lessons["03"], tmp_path)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 4)
    assert not list(tmp_path.rglob("checkpoint_epoch_*"))
    first = load(folder / "latest_checkpoint.pth")
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 6, "--resume")
    assert [path.name for path in folder.glob("checkpoint_epoch_*")] == ["checkpoint_epoch_5.pth"]
    assert len(load(folder / "checkpoint_epoch_5.pth")["history"]) == 5
    latest = load(folder / "latest_checkpoint.pth")
    assert len(latest["history"]) == 6 and latest["history"][:4] == first["history"]


def test_03_an_older_epoch_goes_on_in_a_run_of_its_own(lessons, tmp_path):
    """So the newer and the better checkpoints beside it stay as they are."""
    lesson, folder = lessons["03"], folder_of(lessons["03"], tmp_path)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 6)
    before = checkpoints_of(lesson, tmp_path)
    older = folder / "checkpoint_epoch_5.pth"
    output = run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 7, "--resume", older)
    assert "5 of 7 epochs are done" in output and "Epoch  6/7" in output and "Epoch  5/7" not in output
    assert checkpoints_of(lesson, tmp_path) == before
    assert_same_state(
        load(folder / "latest_checkpoint.pth")["history"],
        load(folder_of(lesson, tmp_path, 2) / "latest_checkpoint.pth")["history"][:6],
    )
    assert {"latest_checkpoint.pth", "best_model.pth"} <= checkpoints_of(lesson, tmp_path, 2).keys()
    runs = [path.name for path in (tmp_path / "tensor_board" / lesson.LESSON).iterdir()]
    assert sorted(runs) == ["digits_run_1", "digits_run_2"]


def test_03_a_checkpoint_from_elsewhere_goes_on_in_a_new_run(lessons, tmp_path):
    """Its best_model.pth need not be beside it: the best of what follows takes its place, or it itself."""
    lesson, folder = lessons["03"], folder_of(lessons["03"], tmp_path)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3)
    (tmp_path / "elsewhere").mkdir()
    copied = tmp_path / "elsewhere" / "latest_checkpoint.pth"
    copied.write_bytes((folder / "latest_checkpoint.pth").read_bytes())
    before = checkpoints_of(lesson, tmp_path)
    for run, epochs in [(2, 3), (3, 4)]:
        output = run_lesson(lesson, tmp_path, *FLAGS, "--epochs", epochs, "--resume", copied)
        best = load(folder_of(lesson, tmp_path, run) / "best_model.pth")["history"]
        assert len(best) in [3, epochs]
        accuracy = f"{best[-1]['Accuracy/val']:.2f}"
        assert f"Best validation accuracy on digits: {accuracy} % in epoch {len(best)}." in output
        assert f"The checkpoints are in {folder_of(lesson, tmp_path, run)}." in output
    assert checkpoints_of(lesson, tmp_path) == before
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["latest_checkpoint.pth"]


def test_03_resumes_a_run_by_its_folder_too(lessons, tmp_path):
    run_lesson(lessons["03"], tmp_path, *FLAGS)
    folder = folder_of(lessons["03"], tmp_path)
    output = run_lesson(lessons["03"], tmp_path, *FLAGS, "--epochs", 2, "--resume", folder)
    assert "1 of 2 epochs are done" in output and f"The checkpoints are in {folder}." in output


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_run_of_another_output_folder_is_left_alone(lessons, tmp_path, number):
    """Its curves would go into a run of this one that has the same name."""
    lesson, small = lessons[number], [*FLAGS, "--subset", 32]
    for part in ["a", "b"]:
        run_lesson(lesson, tmp_path / part, *small)
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.suffix == ".pth" or "events" in path.name
    }
    flags = ["--resume", folder_of(lesson, tmp_path / "a")]
    if number == "03":
        output = run_lesson(lesson, tmp_path / "b", *small, *flags, "--epochs", 2)
        assert f"The checkpoints are in {folder_of(lesson, tmp_path / 'b', 2)}." in output
    else:
        with pytest.raises(SystemExit, match=r"Name its --output-dir, or another one\.$"):
            run_lesson(lesson, tmp_path / "b", *small, *flags)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_new_run_touches_nothing_of_the_one_before(lessons, tmp_path, number):
    lesson, small = lessons[number], [*FLAGS, "--subset", 32]
    run_lesson(lesson, tmp_path, *small)
    before = checkpoints_of(lesson, tmp_path)
    assert before
    output = run_lesson(lesson, tmp_path, *small, "--seed", 1)
    assert f"The checkpoints are in {folder_of(lesson, tmp_path, 2)}." in output
    assert checkpoints_of(lesson, tmp_path) == before
    seeds = {load(path)["hyperparameters"]["seed"] for path in folder_of(lesson, tmp_path, 2).rglob("*.pth")}
    assert seeds == {1}


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_a_run_that_starts_and_ends_inside_another_disturbs_nothing(lessons, tmp_path, monkeypatch, number):
    """The other way round too: both end as they would have ended alone, and say so."""
    lesson, small = lessons[number], [*FLAGS, "--subset", 40, "--epochs", 2]
    small += ["--schedulers", "Constant", "StepLR"] if number == "04" else []
    alone = [run_lesson(lesson, tmp_path / f"alone_{seed}", *small, "--seed", seed) for seed in [1, 2]]
    report_epoch, inner = lesson.report_epoch, []

    def start_the_other(*args):
        report_epoch(*args)
        if not inner:
            inner.append("")
            with torch.random.fork_rng():  # two processes have random numbers of their own
                inner[0] = run_lesson(lesson, tmp_path / "both", *small, "--seed", 2)

    monkeypatch.setattr(lesson, "report_epoch", start_the_other)
    outer = run_lesson(lesson, tmp_path / "both", *small, "--seed", 1)
    for output, expected in zip([outer, inner[0]], alone, strict=True):
        figures = [re.findall(r"[\d.]+ %|loss [\d.]+", text) for text in [output, expected]]
        assert figures[0] == figures[1] and len(figures[0]) > 5
    if number != "06":
        for run, seed in [(1, 1), (2, 2)]:
            for name in checkpoints_of(lesson, tmp_path / f"alone_{seed}"):
                one = folder_of(lesson, tmp_path / "both", run) / name
                assert_same_state(load(one), load(folder_of(lesson, tmp_path / f"alone_{seed}") / name))


def test_two_starts_in_one_moment_get_different_folders(lessons, tmp_path, monkeypatch):
    """Both have looked, and seen that the folder is free, before either makes it."""
    lesson, mkdir = lessons["03"], Path.mkdir

    def make_it_first(path, *args, **kwargs):
        with monkeypatch.context() as context:
            context.setattr(Path, "mkdir", mkdir)
            if not path.exists() and path.name == "digits_run_1":
                mkdir(path, *args, **kwargs)  # the other start
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", make_it_first)
    names = [path.name for path in lesson.new_run_dirs("digits", tmp_path / "a", tmp_path / "b")]
    assert names == ["digits_run_2", "digits_run_2"]
    assert (tmp_path / "b" / "digits_run_2").is_dir() and not (tmp_path / "b" / "digits_run_1").exists()
    (tmp_path / "b" / "digits_run_3").mkdir(
        parents=True
    )  # in one of the folders only: somebody tidied the other
    assert lesson.new_run_dirs("digits", tmp_path / "a", tmp_path / "b")[0].name == "digits_run_4"


@pytest.mark.parametrize(
    ("number", "more"), [("04", ["--schedulers", "Constant", "StepLR", "ExponentialLR"]), ("05", [])]
)
def test_resume_goes_on_with_every_arm_that_is_not_finished(lessons, tmp_path, monkeypatch, number, more):
    """The first is done, the second has one epoch of two, the third has not begun."""
    lesson, flags = lessons[number], [*FLAGS, "--subset", "48", "--epochs", "2", *more]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_before_report(context, lesson, 4)
        run_lesson(lesson, tmp_path, *flags)
    folder = folder_of(lesson, tmp_path)
    arms = list(lesson.ARMS) if number == "05" else more[1:]
    assert [path.name for path in sorted(folder.iterdir())] == sorted(arms[:2])
    finished_arm = (folder / arms[0] / "latest_checkpoint.pth").read_bytes()
    output = resume(lesson, tmp_path, "--resume", folder)
    for arm, done in zip(arms, [2, 1, 0], strict=True):
        assert f"{arm}: {done} of 2 epochs are done." in output
    assert output.count("Epoch  1/2") == 1 and output.count("Epoch  2/2") == 2
    assert (folder / arms[0] / "latest_checkpoint.pth").read_bytes() == finished_arm
    assert all(len(load(folder / arm / "latest_checkpoint.pth")["history"]) == 2 for arm in arms)


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_run_can_be_resumed_from_before_its_first_epoch_ends(lessons, tmp_path, monkeypatch, number):
    """And leaves no second run of one epoch in TensorBoard."""
    lesson = lessons[number]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt) as stopped:
        interrupt_before_report(context, lesson, 1)
        run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 1, "--subset", 32)
    assert "--resume" in str(stopped.value)
    assert "0 of 1 epochs are done." in resume(lesson, tmp_path, "--resume")
    assert [path.name for path in (tmp_path / "tensor_board" / lesson.LESSON).iterdir()] == ["digits_run_1"]


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_resume_takes_the_newest_run(lessons, tmp_path, number):
    lesson = lessons[number]
    for seed in [1, 2]:
        run_lesson(lesson, tmp_path, *FLAGS, "--subset", 16, "--seed", seed)
    assert f"The checkpoints are in {folder_of(lesson, tmp_path, 2)}." in resume(lesson, tmp_path, "--resume")
    for path in folder_of(lesson, tmp_path, 1).rglob("latest_checkpoint.pth"):
        path.touch()
    assert f"The checkpoints are in {folder_of(lesson, tmp_path, 1)}." in resume(lesson, tmp_path, "--resume")


def test_the_printed_command_survives_a_shell(lessons, tmp_path, monkeypatch):
    """With spaces, quotes and dollar signs in every path, Python's own included."""
    folder = tmp_path / "a folder" / ("it's $HOME" if os.name != "nt" else "it is %HOME%")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    args = lessons["03"].parse_args(["--output-dir", str(folder), "--epochs", "7", "--device", "cpu"])
    hint = lessons["03"].resume_hint(args, folder / "latest_checkpoint.pth")
    words = shlex.split(hint.removeprefix("To go on after the last saved epoch: "), posix=os.name != "nt")
    words = [word.strip('"') for word in words]
    assert words[0] == str(folder / "python") and words[words.index("--output-dir") + 1] == str(folder)
    assert words[words.index("--resume") + 1] == str(folder / "latest_checkpoint.pth")
    assert words[words.index("--epochs") + 1] == "7" and words[words.index("--device") + 1] == "cpu"


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
    ):  # it looks better and better in training
        loss_fn(model(lesson.to_input(loader.dataset[:8][0], device)), loader.dataset[:8][1]).backward()
        optimizer.step()
        return 1.0 / (len(weights) + 1), 90.0 + len(weights)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    more = ["--schedulers", "StepLR"] if number == "04" else []
    output = run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3, *more)
    best = sorted(tmp_path.rglob("best_model*.pth"))
    assert len(best) == (3 if number == "05" else 1)
    for path in best:
        checkpoint = load(path)
        assert [row["Accuracy/val"] for row in checkpoint["history"]] == [20.0, 60.0]
        candidates = [w for w, accuracy in zip(weights, accuracies, strict=True) if accuracy == 60.0]
        assert any(all(torch.equal(checkpoint["model"][k], w[k]) for k in w) for w in candidates)
        if number in ["04", "05"]:
            latest = load(path.with_name("latest_checkpoint.pth"))["history"]
            assert [row["Accuracy/best_val"] for row in latest] == [20.0, 60.0, 60.0]
    says = {
        "03": "Best validation accuracy on digits: 60.00 % in epoch 2.",
        "04": "60.00 % in epoch  2",
        "05": "60.00 % in epoch  2",
        "06": "best validation accuracy of its training: 60.00 %",
    }
    assert says[number] in output


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_stopped_between_two_saves_it_loses_no_best_model(lessons, tmp_path, monkeypatch, number):
    """The best model is on the disk before its epoch counts as done."""
    lesson, epochs, saves, save_checkpoint = lessons[number], [], [], lessons[number].save_checkpoint

    def save_or_stop(checkpoint, path):
        saves.append(path.name)
        if len(saves) == 5:  # one before the first epoch, two in each epoch that is the best so far
            raise KeyboardInterrupt
        save_checkpoint(checkpoint, path)

    monkeypatch.setattr(lesson, "train_one_epoch", lambda *args: (epochs.append(args[5]), (1.0, 50.0))[1])
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, [20.0, 60.0, 40.0][epochs[-1] - 1]))
    monkeypatch.setattr(lesson, "save_checkpoint", save_or_stop)
    flags = [*FLAGS, "--epochs", 3, *(["--schedulers", "Constant"] if number == "04" else [])]
    with pytest.raises(KeyboardInterrupt):
        run_lesson(lesson, tmp_path, *flags)
    run_lesson(lesson, tmp_path, *flags, "--resume")
    for path in folder_of(lesson, tmp_path).rglob("best_model.pth"):
        assert [row["Accuracy/val"] for row in load(path)["history"]] == [20.0, 60.0]


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


def offer(number, content, folder):
    """Put a checkpoint where a lesson looks for it. Returns the flag and its value, and the path of the file.

    content: bytes of the file, a dict to save, or None for a folder in the place of the file.
    """
    arm = {"04": "Constant/latest_checkpoint.pth", "05": "without_augmentation/latest_checkpoint.pth"}
    path = folder / arm.get(number, "x.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    flag = "--checkpoint" if number == "06" else "--resume"
    return [flag, str(folder if number in ["04", "05"] else path)], path


def latest_of(finished, number):
    """Return the path of a checkpoint of a finished quick run."""
    return next(
        finished(number).artifacts.glob(
            "checkpoints/**/" + ("best" if number == "06" else "latest") + "*.pth"
        )
    )


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_unusable_checkpoints_get_one_sentence(finished, lessons, tmp_path, number, capsys):
    lesson, content = lessons[number], latest_of(finished, number).read_bytes()
    good = load(io.BytesIO(content))
    history = good["history"]
    unusable = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "a folder": None,
        "weights only": good["model"],
        "a list": [1, 2, 3],
        "another network": good | {"model": torch.nn.Linear(2, 2).state_dict()},
        "malice": {"model": Malice(tmp_path / "was_run")},
        "plain pickle": pickle.dumps(Malice(tmp_path / "was_run"), protocol=2),
        "history as text": good | {"history": "0.5, 0.4"},
        "history of text": good | {"history": ["0.5", "0.4"]},
        "history without accuracy": good | {"history": [{"Loss/val": 1.0}]},
        "names as text": good | {"class_names": "cat"},
        "settings as a list": good | {"hyperparameters": [1, 2]},
    }
    if number != "06":
        unusable |= {
            "no optimizer": good | {"optimizer": {}},
            "random states None": good | {"random_states": None},
            "random states as text": good | {"random_states": ["a", "b"]},
        }
        for key in good:
            unusable[f"without {key}"] = {name: value for name, value in good.items() if name != key}
    runs = tmp_path / "out" / "artifacts" / "checkpoints" / lesson.LESSON
    assert history
    for name, what in unusable.items():
        words, path = offer(number, what, runs / name)
        with pytest.raises(SystemExit) as error:
            resume(lesson, tmp_path / "out", *words)
        message = str(error.value.code)
        assert str(path) in message and "\n" not in message and "another one" in message, name
    for words in [tmp_path / "missing", ""]:
        with pytest.raises(SystemExit, match="another one") as error:
            resume(lesson, tmp_path / "out", "--checkpoint" if number == "06" else "--resume", words)
    assert not (tmp_path / "was_run").exists()
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and runs not in path.parents]
    assert made == [] and not list(runs.glob("digits_run_*/*"))
    lesson.load_checkpoint(latest_of(finished, number))


@pytest.mark.parametrize("number", ["03", "04", "05"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_a_run_goes_on_on_a_machine_with_more_or_fewer_gpus(
    finished, lessons, tmp_path, monkeypatch, number, gpus
):
    """Saved with one, resumed with none or two: each has random numbers of its own."""
    good = load(latest_of(finished, number))
    path = folder_of(lessons[number], tmp_path) / {"04": "Constant", "05": "with_augmentation"}.get(
        number, ""
    )
    path.mkdir(parents=True)
    torch.save(
        good | {"random_states": [*good["random_states"], torch.Generator().get_state()]},
        path / "latest_checkpoint.pth",
    )
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(torch.Generator() for _ in range(gpus)))
    assert "1 of 1 epochs are done." in resume(lessons[number], tmp_path, "--resume")
    assert len(load(path / "latest_checkpoint.pth")["random_states"]) == 3


@pytest.mark.parametrize("number", ["03", "04", "05"])
@pytest.mark.parametrize(
    "change",
    [{"lr": "fast"}, {"epochs": 2.5}, {"seed": None}, {"run": "../x"}, {"subset": -1}, {"data": 7}],
    ids=str,
)
def test_strange_settings_in_a_checkpoint_get_status_2(finished, lessons, tmp_path, number, change, capsys):
    good = load(latest_of(finished, number))
    runs = tmp_path / "artifacts" / "checkpoints" / lessons[number].LESSON
    words, path = offer(number, good | {"hyperparameters": good["hyperparameters"] | change}, runs / "x")
    with pytest.raises(SystemExit) as error:
        resume(lessons[number], tmp_path, *words)
    assert error.value.code == 2 and [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_resumed_run_keeps_its_settings(finished, lessons, tmp_path, number, capsys):
    good = load(latest_of(finished, number))
    runs = tmp_path / "artifacts" / "checkpoints" / lessons[number].LESSON
    words, _ = offer(number, good, runs / "x")
    for flag, value in [("--seed", 1), ("--batch-size", 7), ("--lr", 0.5), ("--subset", 100)]:
        with pytest.raises(SystemExit) as error:
            resume(lessons[number], tmp_path, *words, flag, value)
        key = flag.removeprefix("--").replace("-", "_")
        message = capsys.readouterr().err
        assert error.value.code == 2 and f"{flag}, here {good['hyperparameters'][key]}" in message
    if number != "03":  # the schedules depend on the number of epochs
        with pytest.raises(SystemExit):
            resume(lessons[number], tmp_path, *words, "--epochs", 3)
        assert "--epochs, here 1" in capsys.readouterr().err
    elsewhere = {"03": "04", "04": "05", "05": "04"}[number]
    words, _ = offer(number, load(latest_of(finished, elsewhere)), runs / "y")
    with pytest.raises(SystemExit) as error:
        resume(lessons[number], tmp_path, *words)
    assert error.value.code == 2 and lessons[elsewhere].LESSON in capsys.readouterr().err


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_checkpoint_holds_the_state_of_all_that_is_random(lessons, tmp_path, monkeypatch, number):
    """What would be drawn after the last epoch is drawn after loading it, too."""
    lesson, draws, saved = lessons[number], [], lessons[number].save_checkpoint

    def draw(generator):
        return torch.rand(3, generator=generator.clone_state()).tolist()

    def save_and_draw(checkpoint, path):
        saved(checkpoint, path)
        states = [torch.Generator().set_state(state) for state in checkpoint["random_states"][:2]]
        assert draw(states[1]) == draw(torch.default_generator)
        draws.append(tuple(map(tuple, map(draw, states))))

    monkeypatch.setattr(lesson, "save_checkpoint", save_and_draw)
    arms = ["--schedulers", "Constant"] if number == "04" else []
    run_lesson(lesson, tmp_path, *FLAGS, "--subset", 32, "--epochs", 2, *arms)
    assert len({order for order, _ in draws}) == 3, "before the first epoch, after it, and after the second"


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


def test_03_shows_what_the_best_model_says_of_the_first_ten_test_images(lessons, tmp_path, monkeypatch):
    """Worked out again from its file. It is the model of epoch 2 of 3."""
    lesson, accuracies = lessons["03"], iter([20.0, 60.0, 40.0])
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, next(accuracies)))
    output = run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3)
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=False)
    model = lesson.SimpleCNN()
    model.load_state_dict(load(folder_of(lesson, tmp_path) / "best_model.pth")["model"])
    with torch.no_grad():
        probabilities = torch.softmax(model.eval()(lesson.to_input(images[:10], CPU)), dim=1)
    assert "The model of epoch 2 on ten test images of digits:" in output
    lines = [line for line in output.splitlines() if line.startswith("  true: ")]
    for line, label, shares in zip(lines, labels[:10], probabilities, strict=True):
        top = sorted(range(10), key=lambda i, shares=shares: -shares[i])[:3]
        words = ", ".join(f"{i} {100 * shares[i]:.1f} %" for i in top)
        assert line.split() == f"true: {label} predicted: {words}".split()


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
    probabilities = lesson.predict(model, images, CPU)
    expected = torch.softmax(copy.deepcopy(model).eval()(lesson.to_input(images, CPU)), dim=1)
    assert torch.allclose(probabilities, expected) and torch.allclose(probabilities.sum(dim=1), torch.ones(5))
    words = lesson.describe(torch.tensor([0.1, 0.6, 0.3]), ["cat", "dog", "frog"])
    assert words == "dog 60.0 %, frog 30.0 %, cat 10.0 %"


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_checkpoints_of_every_lesson_load_into_a_new_network(finished, lessons, number):
    paths = list(finished(number).artifacts.glob("checkpoints/**/*.pth"))
    assert len(paths) == {"03": 2, "04": 12, "05": 6, "06": 1}[number]
    for path in paths:
        model = lessons[number].SimpleCNN()
        checkpoint = lessons[number].load_checkpoint(path, {"model": model})
        assert checkpoint["model"] and all(
            torch.equal(model.state_dict()[k], v) for k, v in checkpoint["model"].items()
        )
