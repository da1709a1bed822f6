"""Lesson 08: when it stops, which epoch it brings back, and what it says that other rules would have done."""

import re

import pytest
import torch
from common import read_scalars
from conftest import assert_same_state, folder_of, load, run_lesson
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = ["--subset", "32", "--batch-size", "16"]


@pytest.fixture
def lesson(lessons):
    return lessons["08"]


@pytest.mark.parametrize(
    ("values", "options", "stop", "best"),
    [
        # Patience 1: the first epoch without a new best is the last one.
        ([50, 60, 60, 70], {"patience": 1}, 3, 2),
        ([50, 60, 59, 70], {"patience": 1}, 3, 2),
        # Patience 3: two bad epochs are forgiven, the third is not. A new best begins the count anew.
        ([50, 49, 48, 51, 50, 50, 50, 99], {"patience": 3}, 7, 4),
        ([50, 49, 48, 47], {"patience": 3}, 4, 1),
        ([50, 49, 48], {"patience": 3}, None, 1),
        ([50, 51, 52, 53, 54], {"patience": 1}, None, 5),
        # The same with a loss
        ([2.0, 1.5, 1.6, 1.4, 1.4, 1.5], {"patience": 2, "mode": "min"}, 6, 4),
        ([2.0, 2.1], {"patience": 1, "mode": "min"}, 2, 1),
        # A gain of 0.5 is no new best if more than 0.5 is asked for; small steps add up against the old best.
        ([50, 50.5, 50.25, 51], {"patience": 3, "min_delta": 0.5}, None, 4),
        ([50, 50.5, 50.5, 50.5], {"patience": 3, "min_delta": 0.5}, 4, 1),
        ([2.0, 1.5, 1.25], {"patience": 1, "min_delta": 0.5, "mode": "min"}, 2, 1),
        # nan is never better, not even than nothing
        ([50, float("nan"), float("nan")], {"patience": 2}, 3, 1),
        ([float("nan"), 1.0, 2.0], {"patience": 2, "mode": "min"}, None, 2),
        ([0.0, 0.0], {"patience": 1}, 2, 1),
    ],
)
def test_it_stops_where_it_is_worked_out_by_hand(lesson, values, options, stop, best):
    rule = lesson.EarlyStopping(**options)
    stopped = None
    for epoch, value in enumerate(values, start=1):
        assert not rule.should_stop()
        rule.step(value)
        if rule.should_stop():
            stopped = epoch
            break
    assert (stopped, rule.best_epoch) == (stop, best)


def test_its_state_goes_on_counting_in_another_object(lesson):
    rule, other = lesson.EarlyStopping(3, 0.25, "min"), lesson.EarlyStopping(99)
    for value in [2.0, 1.0, 1.5]:
        rule.step(value)
    state = rule.state_dict()
    rule.step(0.1)
    other.load_state_dict(state)
    assert all(isinstance(value, (int, float, str)) for value in state.values()), "weights_only=True reads it"
    assert (other.epoch, other.best_epoch, other.best_value) == (3, 2, 1.0), "a copy: the step came after it"
    other.step(0.9)
    assert not other.should_stop()
    other.step(0.9)
    assert other.should_stop() and other.best_epoch == 2


class Script:
    """Takes the place of evaluate(): it returns what was written for each epoch, and looks at the model."""

    def __init__(self, accuracies, losses=None, stop_at=None):
        self.accuracies, self.losses = accuracies, losses or [1.0] * len(accuracies)
        self.stop_at, self.weights, self.sizes = stop_at, [], []

    def __call__(self, model, loader, _device):
        self.weights.append({key: value.clone() for key, value in model.state_dict().items()})
        self.sizes.append(len(loader.dataset))
        if len(self.weights) == self.stop_at:
            raise KeyboardInterrupt
        epoch = len(self.weights) - 1
        return self.losses[epoch], self.accuracies[epoch]


ACCURACIES = [30.0, 50.0, 45.0, 50.0, 49.0, 48.0, 60.0, 61.0, 62.0]  # patience 4: stops after epoch 6


@pytest.mark.usefixtures("no_pictures")
def test_the_real_stop_watches_the_accuracy_and_brings_its_best_epoch_back(lesson, tmp_path, monkeypatch):
    """Both losses fall all the time and decide nothing. The test images come last, and once."""
    losses = [2.0 - 0.1 * i for i in range(9)]
    script, order = Script([*ACCURACIES[:6], 43.75], losses), []
    load_data = lesson.load_data
    monkeypatch.setattr(lesson, "evaluate", script)
    monkeypatch.setattr(
        lesson,
        "load_data",
        lambda *args, train: order.append((train, len(script.weights))) or load_data(*args, train),
    )
    output = run_lesson(lesson, tmp_path, *TINY, "--epochs", 9, "--patience", 4)
    assert len(re.findall("^Epoch ", output, flags=re.MULTILINE)) == 6
    assert "Stopped: the last 4 epochs brought no new best accuracy.\n" in output
    assert order == [(True, 0), (False, 6)], "test images are read when the training is over"
    assert script.sizes == [32] * 7
    assert_same_state(script.weights[6], script.weights[1])
    best = load(folder_of(lesson, tmp_path) / "best_model.pth")
    assert len(best["history"]) == 2
    assert_same_state(dict(best["model"]), script.weights[1])
    assert "Brought back: epoch 2 of 6, with 50.00 % on the validation images, which chose it, " in output
    assert "and 43.75 % on 32 test images.\n" in output


@pytest.mark.usefixtures("no_pictures")
def test_the_rate_falls_before_the_training_stops(lesson, tmp_path, monkeypatch):
    """To a tenth after two epochs without a new best, by the accuracy too."""
    monkeypatch.setattr(
        lesson, "evaluate", Script([*ACCURACIES[:6], 40.0], [2.0 - 0.1 * i for i in range(9)])
    )
    run_lesson(lesson, tmp_path, *TINY, "--epochs", 9, "--patience", 4)
    scalars = read_scalars(tmp_path / "tensor_board" / lesson.LESSON / "digits_run_1")
    rates = [value for _, value in scalars["LearningRate"]]
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 2)
    assert [value for _, value in scalars["Accuracy/val"]] == ACCURACIES[:6]


@pytest.mark.usefixtures("no_pictures")
def test_without_a_stop_it_trains_to_the_end(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES, 40.0]))
    output = run_lesson(lesson, tmp_path, *TINY, "--epochs", 9, "--patience", 5)
    assert "Epoch  9/9" in output and "Stopped" not in output
    assert "Brought back: epoch 9 of 9" in output


@pytest.mark.usefixtures("no_pictures")
def test_small_gains_do_not_count_with_min_delta(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "evaluate", Script([50.0, 50.5, 50.9, 51.0, 40.0]))
    output = run_lesson(lesson, tmp_path, *TINY, "--epochs", 9, "--patience", 3, "--min-delta", 1.0)
    assert "Stopped: the last 3 epochs" in output and "Brought back: epoch 1 of 4" in output


@pytest.mark.usefixtures("no_pictures")
def test_resumed_it_stops_where_it_would_have_stopped(lesson, tmp_path, monkeypatch):
    """Interrupted in epoch 5, when three bad epochs had been counted, and again when it has stopped."""
    flags = [*TINY, "--epochs", 9, "--patience", 4]
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES[:6], 40.0]))
    run_lesson(lesson, tmp_path / "whole", *flags)
    monkeypatch.setattr(lesson, "evaluate", Script(ACCURACIES, stop_at=5))
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run_lesson(lesson, tmp_path / "cut", *flags)
    resume = ["--resume", "--output-dir", str(tmp_path / "cut"), "--device", "cpu"]
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES[4:6], 40.0]))
    lesson.main(resume)
    whole, cut = folder_of(lesson, tmp_path / "whole"), folder_of(lesson, tmp_path / "cut")
    for name in ["latest_checkpoint.pth", "best_model.pth"]:
        assert_same_state(load(cut / name), load(whole / name))
    monkeypatch.setattr(lesson, "train_one_epoch", None)
    monkeypatch.setattr(lesson, "evaluate", Script([40.0]))
    lesson.main(resume)
    assert_same_state(load(cut / "latest_checkpoint.pth"), load(whole / "latest_checkpoint.pth"))


HISTORY = [
    {"Loss/val": loss, "Accuracy/val": accuracy, "Loss/train": 1.0, "Seconds": 90.0}
    for loss, accuracy in zip(
        [1.0, 0.9, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1],
        [60.0, 65.0, 70.0, 72.0, 71.0, 71.5, 75.0, 74.0],
        strict=True,
    )
]


def test_the_table_says_what_each_rule_would_have_done(lesson, capsys):
    """Worked out by hand, with epochs of 1.5 minutes: the loss has its minimum in epoch 3, the accuracy in 7."""
    lesson.print_rules(HISTORY, 10)
    assert capsys.readouterr().out.splitlines() == [
        "What each rule makes of this training, of at most 10 epochs (1.50 minutes each):",
        "  watches       patience  stops after  brings back  saves         accuracy  loses",
        "  Loss/val             1     epoch  4     epoch  3   9.0 minutes   70.00 %   5.00 points",
        "  Loss/val             2     epoch  5     epoch  3   7.5 minutes   70.00 %   5.00 points",
        "  Loss/val             3     epoch  6     epoch  3   6.0 minutes   70.00 %   5.00 points",
        "  Loss/val             5     epoch  8     epoch  3   3.0 minutes   70.00 %   5.00 points",
        "  Accuracy/val         1     epoch  5     epoch  4   7.5 minutes   72.00 %   3.00 points",
        "  Accuracy/val         2     epoch  6     epoch  4   6.0 minutes   72.00 %   3.00 points",
        "  Accuracy/val         3    not in  8     epoch  7   0.0 minutes   75.00 %   0.00 points",
        "  Accuracy/val         5    not in  8     epoch  7   0.0 minutes   75.00 %   0.00 points",
    ]


def test_the_picture_shows_both_curves_with_every_stop(lesson):
    figure = lesson.plot_rules(HISTORY, "digits")
    for ax, curve, stops, restored in zip(
        figure.axes,
        ["Loss/val", "Accuracy/val"],
        [[4, 5, 6, 8], [5, 6, None, None]],
        [[3, 3, 3, 3], [4, 4, 7, 7]],
        strict=True,
    ):
        values = [row[curve] for row in HISTORY]
        line, *dots = ax.lines
        assert list(line.get_xdata()) == list(range(1, 9)) and list(line.get_ydata()) == values
        assert [dot.get_xdata()[0] for dot in dots] == restored
        assert [dot.get_ydata()[0] for dot in dots] == [values[epoch - 1] for epoch in restored]
        drawn = [[segment[0][0] for segment in lines.get_segments()] for lines in ax.collections]
        assert [round(x[0]) if x else None for x in drawn] == stops
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels[0] == curve and ax.get_title() == f"Stopping by {curve} on digits"
        ends = [f"stops after {stop}" if stop else "not in 8" for stop in stops]
        expected = zip(lesson.PATIENCES, ends, restored, strict=True)
        assert labels[1:] == [f"patience {p}: {end}, brings back {best}" for p, end, best in expected]


def test_the_picture_is_in_the_file_and_in_tensorboard(lesson, finished):
    run = finished("08")
    assert (run.artifacts / "early_stopping.png").stat().st_size > 10_000
    events = EventAccumulator(
        str(run.folder / "tensor_board" / lesson.LESSON / "digits_run_1" / "rules"), {"images": 1}
    )
    events.Reload()
    assert events.Tags()["images"] == ["Comparison/early_stopping"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--patience", "0"], "--patience must be above 0"),
        (["--min-delta", "-1"], "--min-delta must be 0 or above"),
        (["--min-delta", "nan"], "--min-delta must be 0 or above"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(lesson, capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(flags)
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_keeps_its_rule(lesson, finished, tmp_path, capsys):
    folder = folder_of(lesson, finished("08").folder)
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(["--resume", "--patience", "7"], load(folder / "latest_checkpoint.pth"))
    assert error.value.code == 2 and "keeps its --patience, here 5" in capsys.readouterr().err
    assert torch.equal(
        load(folder / "latest_checkpoint.pth")["model"]["fc2.bias"],
        load(folder / "best_model.pth")["model"]["fc2.bias"],
    )
