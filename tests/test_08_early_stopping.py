"""Lesson 08: when training stops, which epoch is kept, and what other rules would have done."""

import copy
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from common import load_lesson, read_scalars
from conftest import (
    assert_same_state,
    draw_nothing,
    folder_of,
    load,
    resume,
    run_lesson,
    use_results,
)

# With patience 4 and min_delta 1, the last improvement is that of epoch 2, so that training stops after epoch 6.
# Epoch 3 is the best of these, and epoch 4 equals it.
ACCURACIES = [30.0, 50.0, 50.5, 50.5, 49.0, 48.0, 47.0, 46.0, 62.0]
TEST_ACCURACY = 43.75
FLAGS = ["--subset", 32, "--batch-size", 16, "--epochs", 9, "--patience", 4, "--min-delta", 1]


@pytest.fixture
def lesson(lessons):
    return lessons["08"]


class Script:
    """Takes the place of evaluate(): returns these accuracies, and keeps the weights and images of every call."""

    def __init__(self, *accuracies):
        self.accuracies, self.weights, self.data = iter(accuracies), [], []

    def __call__(self, model, loader, _device):
        self.weights.append(copy.deepcopy(model.state_dict()))
        self.data.append(loader.dataset.tensors[0])
        return 1.0, next(self.accuracies)


def curves_of(output_dir):
    """Return the curves of the only run in a folder."""
    [run] = (output_dir / "tensor_board" / "08_early_stopping").iterdir()
    return read_scalars(run)


# The rule


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "mode", "stop"),
    [
        # With patience 1, the first epoch without an improvement is the last one.
        ([50, 60, 60, 70], 1, 0.0, "max", 3),
        ([50, 51, 52, 53, 54], 1, 0.0, "max", None),
        # With patience 3, two epochs are forgiven and the third is not. An improvement begins the count anew.
        ([50, 49, 48, 51, 50, 50, 50, 99], 3, 0.0, "max", 7),
        # A loss should fall.
        ([2.0, 1.5, 1.625, 1.25, 1.25, 1.5], 2, 0.0, "min", 6),
        # An improvement of exactly min_delta does not count. Small ones add up until they are larger than it.
        ([50, 50.5, 50.5, 50.5], 3, 0.5, "max", 4),
        ([50, 50.25, 50.5, 50.75, 51, 51.25, 51.5], 3, 0.5, "max", None),
        ([2.0, 1.375, 0.75, 0.25], 1, 0.5, "min", 4),
        # nan is no improvement, not even on nothing.
        ([float("nan"), float("nan"), 50], 2, 0.0, "max", 2),
    ],
)
def test_the_rule_stops_where_it_is_worked_out_by_hand(lesson, values, patience, min_delta, mode, stop):
    """step() says after every epoch whether to stop now."""
    rule = lesson.EarlyStopping(patience, min_delta, mode)
    answers = [rule.step(value) for value in values[:stop]]
    assert answers == [False] * (len(answers) - 1) + [stop is not None]


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that stops early, because its validation accuracies are ours. The training is real."""
    lesson, folder, loaded = load_lesson("08"), tmp_path_factory.mktemp("run"), []
    script, load_data = Script(*ACCURACIES[:6], TEST_ACCURACY), lesson.load_data

    def watch_loading(*args, train):
        loaded.append((train, len(script.data)))
        return load_data(*args, train)

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch, [lesson])
        patch.setattr(lesson, "evaluate", script)
        patch.setattr(lesson, "load_data", watch_loading)
        output = run_lesson(lesson, folder, *FLAGS)
    names = ["best_model", "checkpoint_epoch_5", "latest_checkpoint"]
    checkpoints = {name: load(folder_of(lesson, folder) / f"{name}.pth") for name in names}
    assert len(list(folder.rglob("*.pth"))) == 3
    return SimpleNamespace(
        lesson=lesson, folder=folder, output=output, script=script, loaded=loaded, checkpoints=checkpoints
    )


def test_training_stops_when_the_validation_accuracy_no_longer_improves(run):
    """By the rule of the command line, which is printed."""
    assert re.findall(r"^Epoch +(\d)/9", run.output, flags=re.MULTILINE) == list("123456")
    assert "\nStopping early: no improvement of more than 1.0 points in 4 epochs.\n" in run.output
    assert "\nWhat each rule makes of these 6 epochs (at most 9):\n" in run.output


def test_best_model_is_the_first_epoch_with_the_best_validation_accuracy(run):
    """Its weights are kept, and are those that are tested at the end."""
    best, latest = run.checkpoints["best_model"], run.checkpoints["latest_checkpoint"]
    weights = run.script.weights
    assert [row["Accuracy/val"] for row in latest["history"]] == ACCURACIES[:6]
    assert latest["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert best["history"] == latest["history"][:3] and best["best_accuracy"] == 50.5
    assert_same_state(best["model"], weights[2])
    assert_same_state(weights[6], weights[2])
    assert_same_state(latest["model"], weights[5])
    assert weights[5]["conv2.weight"].is_contiguous(memory_format=torch.channels_last), "faster on CPUs"
    assert "\nBest validation accuracy: 50.50 % in epoch 3 of 6\n" in run.output
    assert "\nTest accuracy of this model: 43.75 % on 32 images, which chose nothing\n" in run.output


def test_the_test_images_choose_nothing(run):
    """They are loaded when the training has ended, and used once. Until then, there are validation images only."""
    assert run.loaded == [(True, 0), (False, 6)]
    (images, labels, *_), (test_images, *_) = (
        run.lesson.load_data("digits", run.folder, train=train) for train in [True, False]
    )
    _, val_set = run.lesson.split_train_val(images, labels, 42, 32)
    for images, expected in zip(run.script.data, [val_set.tensors[0]] * 6 + [test_images[:32]], strict=True):
        assert torch.equal(images, expected)


def test_the_curves_are_the_history(run):
    """The learning rate falls to a tenth before the training stops: after two epochs without a better accuracy."""
    curves, history = curves_of(run.folder), run.checkpoints["latest_checkpoint"]["history"]
    assert curves.keys() == history[0].keys()
    for name, points in curves.items():
        assert points == [(i, pytest.approx(row[name], rel=1e-5)) for i, row in enumerate(history, start=1)]
    assert [row["LearningRate"] for row in history] == pytest.approx([0.05] * 5 + [0.005])
    for row in history:
        assert row["Overfitting/accuracy_gap"] == row["Accuracy/train"] - row["Accuracy/val"]
        assert row["Loss/val"] == 1 and 0 < row["Loss/train"] < 10 and 0 <= row["Seconds"] < 1000


# Resuming


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run, lesson, tmp_path, monkeypatch):
    """It stops after the same epoch, and an epoch that was logged, but not saved, is one point of its curves."""
    save_checkpoint = lesson.save_checkpoint

    def save_four_epochs(checkpoint, path):
        if len(checkpoint["history"]) == 5:
            raise KeyboardInterrupt
        save_checkpoint(checkpoint, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lesson, "evaluate", Script(*ACCURACIES))
        patch.setattr(lesson, "save_checkpoint", save_four_epochs)
        run_lesson(lesson, tmp_path, *FLAGS)
    torch.seed()  # a new process has another random state
    monkeypatch.setattr(lesson, "evaluate", Script(*ACCURACIES[4:6], TEST_ACCURACY))
    output = resume(lesson, tmp_path)
    assert "\nResuming after epoch 4 of 9.\nEpoch  5/9" in output
    assert output[output.index("Stopping") : output.index("Picture")] in run.output
    for name, checkpoint in run.checkpoints.items():
        assert_same_state(load(folder_of(lesson, tmp_path) / f"{name}.pth"), checkpoint)
    assert_same_state(curves_of(tmp_path), curves_of(run.folder))


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_run_trains_on_only_with_run_all_epochs(run, lesson, tmp_path, monkeypatch):
    """It remembers this flag. --epochs may change as well."""
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    monkeypatch.setattr(
        lesson, "evaluate", Script(TEST_ACCURACY, *ACCURACIES[6:8], TEST_ACCURACY, 62.0, 60.0)
    )
    output = resume(lesson, folder)
    assert "\nResuming after epoch 6 of 9.\nStopping early: " in output and "\nEpoch " not in output
    assert output[output.index("Stopping") : output.index("Picture")] in run.output
    output = resume(lesson, folder, "--run-all-epochs", "--epochs", 8)
    assert (
        re.findall(r"^Epoch +(\d)/8", output, flags=re.MULTILINE) == ["7", "8"] and "Stopping" not in output
    )
    output = resume(lesson, folder, "--epochs", 9)
    assert "\nResuming after epoch 8 of 9.\nEpoch  9/9" in output
    assert (
        "\nBest validation accuracy: 62.00 % in epoch 9 of 9\nTest accuracy of this model: 60.00 %" in output
    )


@pytest.mark.parametrize("flag", ["--patience", "--min-delta", "--lr", "--seed", "--batch-size", "--subset"])
def test_a_resumed_run_keeps_its_settings(run, lesson, capsys, flag):
    """Another value is an error with status 2. The same value is none."""
    saved = run.checkpoints["latest_checkpoint"]["hyperparameters"]
    value = saved[flag[2:].replace("-", "_")]
    assert lesson.parse_args(["--resume", flag, str(value)], saved).patience == 4
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(["--resume", flag, str(value + 1)], saved)
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith(f"a resumed run keeps its settings; leave out {flag}\n")


# The comparison

LOSSES = [1.0, 0.9, 0.8, 0.85, 0.9, 0.95, 0.8, 1.1]
RISING = [60.0, 65.0, 70.0, 72.0, 71.0, 72.125, 71.0, 75.0]
HISTORY = [{"Loss/val": a, "Accuracy/val": b} for a, b in zip(LOSSES, RISING, strict=True)]


def test_the_table_says_what_each_rule_would_have_done(lesson, capsys):
    """Worked out by hand: the loss has its minimum in epoch 3, and the accuracy rises by less than 0.2 in epoch 6."""
    lesson.print_rules(HISTORY, 10)
    assert capsys.readouterr().out.splitlines() == [
        "What each rule makes of these 8 epochs (at most 10):",
        "  metric        patience  min_delta   stops after  best epoch  saves      accuracy  loses",
        "  Loss/val             1        0.0      epoch  4           3   6 epochs   70.00 %   5.00 points",
        "  Loss/val             2        0.0      epoch  5           3   5 epochs   70.00 %   5.00 points",
        "  Loss/val             3        0.0      epoch  6           3   4 epochs   70.00 %   5.00 points",
        "  Loss/val             5        0.0      epoch  8           3   2 epochs   70.00 %   5.00 points",
        "  Accuracy/val         1        0.0      epoch  5           4   5 epochs   72.00 %   3.00 points",
        "  Accuracy/val         2        0.0     not in  8           8   0 epochs   75.00 %   0.00 points",
        "  Accuracy/val         3        0.0     not in  8           8   0 epochs   75.00 %   0.00 points",
        "  Accuracy/val         5        0.0     not in  8           8   0 epochs   75.00 %   0.00 points",
        "  Accuracy/val         1        0.2      epoch  5           4   5 epochs   72.00 %   3.00 points",
        "  Accuracy/val         2        0.2      epoch  6           6   4 epochs   72.12 %   2.88 points",
        "  Accuracy/val         3        0.2      epoch  7           6   3 epochs   72.12 %   2.88 points",
        "  Accuracy/val         5        0.2     not in  8           8   0 epochs   75.00 %   0.00 points",
    ]


def test_the_picture_shows_where_every_rule_stops():
    """One curve for each group of four rules, with a dot at the best epoch and a line where the rule stops."""
    lesson = load_lesson("08")  # no_pictures has replaced the function in the other module
    figure = lesson.plot_rules(HISTORY, "digits")
    groups = [lesson.RULES[i : i + 4] for i in [0, 4, 8]]
    for ax, rules in zip(figure.axes, groups, strict=True):
        metric, _, _, min_delta = rules[0]
        values = [row[metric] for row in HISTORY]
        curve, *dots = ax.lines
        assert list(curve.get_xdata()) == list(range(1, 9)) and list(curve.get_ydata()) == values
        assert ax.get_title() == f"{metric} on digits, min_delta {min_delta}"
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels[0] == metric
        for rule, dot, line, label in zip(rules, dots, ax.collections, labels[1:], strict=True):
            stop, best = lesson.apply_rule(HISTORY, *rule)
            assert dot.get_xydata().tolist() == [[best, values[best - 1]]]
            assert [round(segment[0][0]) for segment in line.get_segments()] == ([stop] if stop else [])
            end = f"stops after {stop}" if stop else "not in 8"
            assert label == f"patience {rule[2]}: {end}, best epoch {best}"


# What is refused


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("losses", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_loss_that_is_not_finite_ends_the_lesson_and_is_not_saved(lesson, tmp_path, monkeypatch, losses):
    use_results(monkeypatch, lesson, [(losses[0], 50.0)], [(losses[1], 50.0)])
    with pytest.raises(SystemExit, match=r"^The loss is no longer a finite number\. .* \(--lr\)\.$"):
        run_lesson(lesson, tmp_path, *FLAGS)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("flag", "value"), [("--patience", "0"), ("--min-delta", "-1"), ("--min-delta", "inf")]
)
def test_a_rule_that_makes_no_sense_is_refused(lesson, capsys, flag, value):
    """One sentence and status 2."""
    with pytest.raises(SystemExit) as error:
        lesson.parse_args([flag, value])
    assert error.value.code == 2 and f"{flag} must be " in capsys.readouterr().err
