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

import pytest
import torch
from common import read_scalars
from conftest import FLAGS, assert_same_state, checkpoints_of, folder_of, load, no_group_left, run_lesson

pytestmark = pytest.mark.usefixtures("no_pictures")
NUMBERS = ["07", "08", "09", "10", "11", "12"]
RESUMES = ["07", "08", "11", "12"]
SAVES = ["07", "08", "10", "11", "12"]
DRAWS = ["07", "08", "11"]  # their checkpoints have random states; lesson 12 seeds anew in every epoch
ONE_ARM = {"07": ["--precisions", "float32"]}
ARM = {"07": "float32", "11": "by_file"}  # the first one


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
    with contextlib.redirect_stdout(io.StringIO()) as output, no_group_left():
        lesson.main(["--output-dir", str(output_dir), "--device", "cpu", *map(str, flags)])
    return output.getvalue()


def load_without_speeds(path):
    """Load a checkpoint, but for what depends on a clock."""
    checkpoint = load(path)
    for row in checkpoint["history"]:
        for curve in [curve for curve in row if curve.startswith("ImagesPerSecond")]:
            del row[curve]
    return checkpoint


def assert_same_run(lesson, one, other):
    """Compare all checkpoints of the first runs in two output folders."""
    names = checkpoints_of(lesson, other).keys()
    assert names and checkpoints_of(lesson, one).keys() == names
    for name in names:
        one_path, other_path = folder_of(lesson, one) / name, folder_of(lesson, other) / name
        assert_same_state(load_without_speeds(one_path), load_without_speeds(other_path))


@pytest.mark.parametrize(
    ("number", "epochs", "stop", "more"),
    [
        ("12", 4, 4, []),  # three epochs are saved when it is stopped
        ("11", 3, 6, []),  # in the last epoch of the second arm
    ],
)
def test_resumed_by_the_printed_command_equals_uninterrupted(
    lessons, tmp_path, monkeypatch, number, epochs, stop, more
):
    """Lesson 12's in a new process, lesson 11's without the seconds that a new process takes to start."""
    lesson, flags = lessons[number], [*FLAGS, "--epochs", str(epochs), *more]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt) as stopped:
        interrupt_before_report(context, lesson, stop)
        run_lesson(lesson, tmp_path / "a", *flags)
    command = str(stopped.value).removeprefix("To go on after the last saved epoch: ")
    if number == "12":
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
        if scalars:  # the pictures of lesson 11 have a folder of their own
            assert scalars.pop("Seconds") and expected.pop("Seconds")
            scalars.pop("ImagesPerSecond", None), expected.pop("ImagesPerSecond", None)
            assert scalars == expected, "the same points, each of them once"
            assert [step for step, _ in scalars["Loss/val"]] == list(range(1, epochs + 1))


def test_12_goes_on_with_more_epochs_and_saves_every_fifth(lessons, tmp_path):
    lesson, folder = lessons["12"], folder_of(lessons["12"], tmp_path)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 4)
    assert not list(tmp_path.rglob("checkpoint_epoch_*"))
    first = load(folder / "latest_checkpoint.pth")
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 6, "--resume")
    assert [path.name for path in folder.glob("checkpoint_epoch_*")] == ["checkpoint_epoch_5.pth"]
    assert len(load(folder / "checkpoint_epoch_5.pth")["history"]) == 5
    latest = load(folder / "latest_checkpoint.pth")
    assert len(latest["history"]) == 6 and latest["history"][:4] == first["history"]


def test_12_an_older_epoch_goes_on_in_a_run_of_its_own(lessons, tmp_path):
    """So the newer and the better checkpoints beside it stay as they are."""
    lesson, folder = lessons["12"], folder_of(lessons["12"], tmp_path)
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


def test_12_a_checkpoint_from_elsewhere_goes_on_in_a_new_run(lessons, tmp_path):
    """Its best_model.pth need not be beside it: the best of what follows takes its place, or it itself."""
    lesson, folder = lessons["12"], folder_of(lessons["12"], tmp_path)
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


def test_12_resumes_a_run_by_its_folder_too(lessons, tmp_path):
    run_lesson(lessons["12"], tmp_path, *FLAGS)
    folder = folder_of(lessons["12"], tmp_path)
    output = run_lesson(lessons["12"], tmp_path, *FLAGS, "--epochs", 2, "--resume", folder)
    assert "1 of 2 epochs are done" in output and f"The checkpoints are in {folder}." in output


@pytest.mark.parametrize("number", RESUMES)
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
    if number == "12":
        output = run_lesson(lesson, tmp_path / "b", *small, *flags, "--epochs", 2)
        assert f"The checkpoints are in {folder_of(lesson, tmp_path / 'b', 2)}." in output
    else:
        with pytest.raises(SystemExit, match=r"Name its --output-dir, or another one\.$"):
            run_lesson(lesson, tmp_path / "b", *small, *flags)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("number", RESUMES)
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


@pytest.mark.parametrize("number", DRAWS)
def test_a_run_that_starts_and_ends_inside_another_disturbs_nothing(lessons, tmp_path, monkeypatch, number):
    """The other way round too: both end as they would have ended alone, and say so."""
    lesson, small = lessons[number], [*FLAGS, "--subset", 40, "--epochs", 2]
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
    for run, seed in [(1, 1), (2, 2)]:
        for name in checkpoints_of(lesson, tmp_path / f"alone_{seed}"):
            one = folder_of(lesson, tmp_path / "both", run) / name
            other = folder_of(lesson, tmp_path / f"alone_{seed}") / name
            assert_same_state(load_without_speeds(one), load_without_speeds(other))


def test_two_starts_in_one_moment_get_different_folders(lessons, tmp_path, monkeypatch):
    """Both have looked, and seen that the folder is free, before either makes it."""
    lesson, mkdir = lessons["12"], Path.mkdir

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


@pytest.mark.parametrize(("stop", "dones"), [(2, [1, 0]), (4, [2, 1])])
def test_11_resume_goes_on_with_every_arm_that_is_not_finished(lessons, tmp_path, monkeypatch, stop, dones):
    """An arm has one epoch of two. The one before it is done, or the one after it has not begun."""
    lesson, flags = lessons["11"], [*FLAGS, "--subset", "48", "--epochs", "2"]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_before_report(context, lesson, stop)
        run_lesson(lesson, tmp_path, *flags)
    folder, arms = folder_of(lesson, tmp_path), ["by_file", "by_group"]
    assert [path.name for path in sorted(folder.iterdir())] == arms[: stop // 2]
    before = (folder / arms[0] / "latest_checkpoint.pth").read_bytes()
    output = resume(lesson, tmp_path, "--resume", folder)
    for arm, done in zip(arms, dones, strict=True):
        assert f"{arm}: {done} of 2 epochs are done." in output
    assert output.count("Epoch  1/2") == dones.count(0) and output.count("Epoch  2/2") == 2 - dones.count(2)
    assert ((folder / arms[0] / "latest_checkpoint.pth").read_bytes() == before) == (dones[0] == 2)
    assert all(len(load(folder / arm / "latest_checkpoint.pth")["history"]) == 2 for arm in arms)


@pytest.mark.parametrize("number", RESUMES)
def test_a_run_can_be_resumed_from_before_its_first_epoch_ends(lessons, tmp_path, monkeypatch, number):
    """And leaves no second run of one epoch in TensorBoard."""
    lesson = lessons[number]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt) as stopped:
        interrupt_before_report(context, lesson, 1)
        run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 1, "--subset", 32)
    assert "--resume" in str(stopped.value)
    assert re.search("0 of (at most )?1 epochs are done", resume(lesson, tmp_path, "--resume"))
    assert [path.name for path in (tmp_path / "tensor_board" / lesson.LESSON).iterdir()] == ["digits_run_1"]


@pytest.mark.parametrize("number", RESUMES)
def test_resume_takes_the_newest_run(lessons, tmp_path, number):
    lesson = lessons[number]
    for seed in [1, 2]:
        run_lesson(lesson, tmp_path, *FLAGS, "--subset", 16, "--seed", seed)
    assert f"The checkpoints are in {folder_of(lesson, tmp_path, 2)}." in resume(lesson, tmp_path, "--resume")
    for path in folder_of(lesson, tmp_path, 1).rglob("latest_checkpoint.pth"):
        path.touch()
    assert f"The checkpoints are in {folder_of(lesson, tmp_path, 1)}." in resume(lesson, tmp_path, "--resume")


@pytest.mark.parametrize("number", RESUMES)
def test_the_printed_command_survives_a_shell(lessons, tmp_path, monkeypatch, number):
    """With spaces, quotes and dollar signs in every path, Python's own included."""
    folder = tmp_path / "a folder" / ("it's $HOME" if os.name != "nt" else "it is %HOME%")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)  # lesson 12 asks for it
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    args = lessons[number].parse_args(["--output-dir", str(folder), "--epochs", "7", "--device", "cpu"])
    hint = lessons[number].resume_hint(args, folder / "latest_checkpoint.pth")
    words = shlex.split(hint.removeprefix("To go on after the last saved epoch: "), posix=os.name != "nt")
    words = [word.strip('"') for word in words]
    assert words[0] == str(folder / "python") and words[words.index("--output-dir") + 1] == str(folder)
    assert words[words.index("--resume") + 1] == str(folder / "latest_checkpoint.pth")
    assert words[words.index("--epochs") + 1] == "7" and words[words.index("--device") + 1] == "cpu"


@pytest.mark.parametrize("number", RESUMES)
def test_best_model_is_the_one_of_the_best_validation_accuracy(lessons, tmp_path, monkeypatch, number):
    lesson = lessons[number]
    weights, accuracies = [], []

    def evaluate(model, *_):
        weights.append(copy.deepcopy(model.state_dict()))
        accuracies.append([20.0, 60.0, 40.0, 30.0][(len(weights) - 1) % 4])  # the last one is a test's
        return 1.0, accuracies[-1]

    def train_one_epoch(
        model, loader, loss_fn, optimizer, device, *_
    ):  # it looks better and better in training
        loss_fn(model(lesson.to_input(loader.dataset[:8][0], device)), loader.dataset[:8][1]).backward()
        optimizer.step()
        return 1.0 / (len(weights) + 1), 90.0 + len(weights)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    output = run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3, *ONE_ARM.get(number, []))
    best = sorted(tmp_path.rglob("best_model*.pth"))
    assert len(best) == (2 if number == "11" else 1)
    for path in best:
        checkpoint = load(path)
        assert [row["Accuracy/val"] for row in checkpoint["history"]] == [20.0, 60.0]
        candidates = [w for w, accuracy in zip(weights, accuracies, strict=True) if accuracy == 60.0]
        assert any(all(torch.equal(checkpoint["model"][k], w[k]) for k in w) for w in candidates)
        if number in ["07", "11"]:
            latest = load(path.with_name("latest_checkpoint.pth"))["history"]
            assert [row["Accuracy/best_val"] for row in latest] == [20.0, 60.0, 60.0]
    says = {
        "07": "60.00 % in epoch  2",
        "08": "Brought back: epoch 2 of 3, with 60.00 %",
        "11": "by_group       60.00 %",
        "12": "Best validation accuracy on digits: 60.00 % in epoch 2.",
    }
    assert says[number] in output


@pytest.mark.parametrize("number", RESUMES)
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
    flags = [*FLAGS, "--epochs", 3, *ONE_ARM.get(number, [])]
    with pytest.raises(KeyboardInterrupt):
        run_lesson(lesson, tmp_path, *flags)
    run_lesson(lesson, tmp_path, *flags, "--resume")
    for path in folder_of(lesson, tmp_path).rglob("best_model.pth"):
        assert [row["Accuracy/val"] for row in load(path)["history"]] == [20.0, 60.0]


def test_an_interrupted_save_leaves_the_old_file(lessons, tmp_path, monkeypatch):
    for number in SAVES:
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


@pytest.mark.parametrize("number", SAVES)
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
    path = folder / ARM.get(number, "") / "latest_checkpoint.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return ["--resume", str(path if number == "12" else folder)], path


def latest_of(finished, number):
    """Return the path of a checkpoint of a finished quick run."""
    return next(finished(number).artifacts.glob("checkpoints/**/latest*.pth"))


@pytest.mark.parametrize("number", RESUMES)
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
    unusable["no optimizer"] = good | {"optimizer": {}}
    if number in DRAWS:
        unusable |= {
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
            resume(lesson, tmp_path / "out", "--resume", words)
    assert not (tmp_path / "was_run").exists()
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and runs not in path.parents]
    made = [path for path in made if "11_custom_dataset" not in path.parts]  # pictures, which it needs first
    assert made == [] and not list(runs.glob("digits_run_*/*"))
    lesson.load_checkpoint(latest_of(finished, number))


@pytest.mark.parametrize("number", DRAWS)
@pytest.mark.parametrize("gpus", [0, 2])
def test_a_run_goes_on_on_a_machine_with_more_or_fewer_gpus(
    finished, lessons, tmp_path, monkeypatch, number, gpus
):
    """Saved with one, resumed with none or two: each has random numbers of its own."""
    good = load(latest_of(finished, number))
    good["hyperparameters"]["epochs"] = 2  # goes on as if one more epoch were to be trained
    path = folder_of(lessons[number], tmp_path) / ARM.get(number, "")
    path.mkdir(parents=True)
    torch.save(
        good | {"random_states": [*good["random_states"], torch.Generator().get_state()]},
        path / "latest_checkpoint.pth",
    )
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(torch.Generator() for _ in range(gpus)))
    assert re.search("1 of (at most )?2 epochs are done", resume(lessons[number], tmp_path, "--resume"))
    assert len(load(path / "latest_checkpoint.pth")["random_states"]) == 2 + gpus


@pytest.mark.parametrize("number", RESUMES)
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


@pytest.mark.parametrize("number", RESUMES)
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
    if number != "12":  # the schedules depend on the number of epochs
        with pytest.raises(SystemExit):
            resume(lessons[number], tmp_path, *words, "--epochs", 3)
        assert "--epochs, here 1" in capsys.readouterr().err
    elsewhere = "08" if number == "07" else "07"
    missing = {"class_to_idx": good["class_to_idx"]} if number == "11" else {}
    words, _ = offer(number, load(latest_of(finished, elsewhere)) | missing, runs / "y")
    with pytest.raises(SystemExit) as error:
        resume(lessons[number], tmp_path, *words)
    assert error.value.code == 2 and lessons[elsewhere].LESSON in capsys.readouterr().err


@pytest.mark.parametrize("number", DRAWS)
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
    run_lesson(lesson, tmp_path, *FLAGS, "--subset", 32, "--epochs", 2, *ONE_ARM.get(number, []))
    assert len({order for order, _ in draws}) == 3, "before the first epoch, after it, and after the second"


@pytest.mark.parametrize("number", SAVES)
def test_checkpoints_of_every_lesson_load_into_a_new_network(finished, lessons, number):
    paths = list(finished(number).artifacts.glob("checkpoints/**/*.pth"))
    assert len(paths) == {"07": 4, "08": 2, "10": 1, "11": 4, "12": 2}[number]
    for path in paths:
        model = lessons[number].SimpleCNN(len(load(path)["class_names"]))
        checkpoint = lessons[number].load_checkpoint(path, {"model": model})
        assert checkpoint["model"] and all(
            torch.equal(model.state_dict()[k], v) for k, v in checkpoint["model"].items()
        )
