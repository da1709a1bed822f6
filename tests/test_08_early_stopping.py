"""Lesson 08: when training stops, which epoch is kept, and what other rules would have done."""

import copy
import itertools
import re

import pytest
import torch
from common import load_lesson, read_scalars
from conftest import assert_same_state, load, resume, run_lesson, use_results

pytestmark = pytest.mark.usefixtures("no_pictures", "seconds")
TINY = ["--subset", 32, "--batch-size", 16]
ACCURACIES = [30.0, 50.0, 45.0, 50.0, 49.0, 48.0, 60.0, 61.0, 62.0]  # patience 4 stops after epoch 6
PATIENT = ["--epochs", 9, "--patience", 4]


@pytest.fixture
def lesson(lessons):
    return lessons["08"]


def checkpoints_of(output_dir):
    """Return all checkpoints of a run by their names."""
    folder = output_dir / "artifacts" / "checkpoints" / "08_early_stopping"
    return {path.name: load(path) for path in folder.iterdir()}


def curves_of(output_dir):
    """Return the curves of the only run in a folder."""
    [run] = (output_dir / "tensor_board" / "08_early_stopping").iterdir()
    return read_scalars(run)


class Script:
    """Takes the place of evaluate(): returns the accuracies that it was given, and keeps what it was called with."""

    def __init__(self, accuracies):
        self.accuracies, self.weights, self.data = accuracies, [], []

    def __call__(self, model, loader, _device):
        self.weights.append(copy.deepcopy(dict(model.state_dict())))
        self.data.append(loader.dataset)
        return 1.0, self.accuracies[len(self.weights) - 1]


# The rule


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "mode", "stop"),
    [
        # With patience 1, the first epoch without an improvement is the last one.
        ([50, 60, 60, 70], 1, 0.0, "max", 3),
        ([50, 60, 59, 70], 1, 0.0, "max", 3),
        ([50, 51, 52, 53, 54], 1, 0.0, "max", None),
        ([0.0, 0.0], 1, 0.0, "max", 2),
        # With patience 3, two epochs are forgiven and the third is not. An improvement begins the count anew.
        ([50, 49, 48, 51, 50, 50, 50, 99], 3, 0.0, "max", 7),
        ([50, 49, 48, 47], 3, 0.0, "max", 4),
        ([50, 49, 48], 3, 0.0, "max", None),
        # A loss should fall.
        ([2.0, 1.5, 1.625, 1.25, 1.25, 1.5], 2, 0.0, "min", 6),
        ([2.0, 2.125], 1, 0.0, "min", 2),
        ([2.0, 1.0, 0.5, 0.25], 1, 0.0, "min", None),
        # An improvement of exactly min_delta does not count. Small ones add up until they are larger than it.
        ([50, 50.5, 50.5, 50.5], 3, 0.5, "max", 4),
        ([50, 50.5, 50.25, 51], 3, 0.5, "max", None),
        ([50, 50.25, 50.5, 50.75, 51, 51.25, 51.5], 2, 0.5, "max", 3),
        ([50, 50.25, 50.5, 50.75, 51, 51.25, 51.5], 3, 0.5, "max", None),
        ([2.0, 1.5, 1.25], 1, 0.5, "min", 2),
        ([2.0, 1.375, 0.75], 1, 0.5, "min", None),
        # nan is no improvement, not even on nothing.
        ([50, float("nan"), float("nan")], 2, 0.0, "max", 3),
        ([float("nan"), 1.0, 2.0], 2, 0.0, "min", None),
    ],
)
def test_the_rule_stops_where_it_is_worked_out_by_hand(lesson, values, patience, min_delta, mode, stop):
    """step() says after every epoch whether to stop now."""
    rule = lesson.EarlyStopping(patience, min_delta, mode)
    answers = [rule.step(value) for value in values[:stop]]
    assert answers == [False] * (len(answers) - 1) + [stop is not None]


# A run


def test_the_default_rule_stops_a_training_that_stalls(lesson, tmp_path, monkeypatch):
    """Gains of less than 0.2 points in 5 epochs are not worth the time, and it says so."""
    accuracies = [50.0, 60.0, *[60.0 + 0.03 * i for i in range(1, 29)]]
    use_results(monkeypatch, lesson, [(1.0, 50.0)] * 30, [(1.0, a) for a in accuracies] + [(1.0, 40.0)])
    output = run_lesson(lesson, tmp_path, *TINY, "--epochs", lesson.parse_args([]).epochs)
    assert "Epoch  7/30" in output and "Epoch  8/30" not in output
    assert "\nStopping early: no improvement of more than 0.2 points in 5 epochs.\n" in output


def test_the_validation_accuracy_alone_decides(lesson, tmp_path, monkeypatch):
    """The training has as many epochs as the rule says, although both losses fall and the training accuracy rises."""
    n = len(ACCURACIES)
    use_results(
        monkeypatch,
        lesson,
        [(1 - 0.1 * i, 50.0 + i) for i in range(n)],
        [(2 - 0.1 * i, accuracy) for i, accuracy in enumerate(ACCURACIES)],
    )
    output = run_lesson(lesson, tmp_path, *TINY, *PATIENT)
    assert re.findall(r"^Epoch +(\d)/9", output, flags=re.MULTILINE) == list("123456")
    assert "Stopping early: no improvement of more than 0.2 points in 4 epochs.\n" in output
    assert [value for _, value in curves_of(tmp_path)["Accuracy/val"]] == ACCURACIES[:6]
    assert len(checkpoints_of(tmp_path)["latest_checkpoint.pth"]["history"]) == 6


@pytest.mark.parametrize(
    ("flags", "epochs", "words"),
    [
        ([], 3, "1.0 points in 2"),
        (["--patience", 4], 5, "1.0 points in 4"),
        (["--min-delta", 0.5], 4, "0.5 points in 2"),
    ],
)
def test_patience_and_min_delta_are_those_of_the_command_line(
    lesson, tmp_path, monkeypatch, flags, epochs, words
):
    """The second epoch improves by 0.75 points, and no other one."""
    use_results(monkeypatch, lesson, [(1.0, 50.0)] * 9, [(1.0, a) for a in [50, 50.75, *[50] * 8]])
    rule = ["--epochs", 9, "--patience", 2, "--min-delta", 1.0]
    output = run_lesson(lesson, tmp_path, *TINY, *rule, *flags)
    assert f"Epoch  {epochs}/9" in output and f"Epoch  {epochs + 1}/9" not in output
    assert f"Stopping early: no improvement of more than {words} epochs.\n" in output


def test_run_all_epochs_does_not_stop(lesson, tmp_path, monkeypatch):
    """And the rules are applied to all of them."""
    use_results(monkeypatch, lesson, [(1.0, 50.0)] * 9, [(1.0, a) for a in [*ACCURACIES, 40.0]])
    output = run_lesson(lesson, tmp_path, *TINY, *PATIENT, "--run-all-epochs")
    assert "Epoch  9/9" in output and "Stopping early" not in output
    assert "What each rule makes of these 9 epochs (at most 9):" in output
    assert "Best validation accuracy: 62.00 % in epoch 9 of 9\n" in output


def test_the_learning_rate_falls_before_the_training_stops(lesson, tmp_path, monkeypatch):
    """To a tenth after the second epoch without a better accuracy, whatever the loss does."""
    losses = [2.0 - 0.1 * i for i in range(9)]
    use_results(monkeypatch, lesson, [(1.0, 50.0)] * 9, zip(losses, [*ACCURACIES[:6], 0.0], strict=False))
    run_lesson(lesson, tmp_path, *TINY, *PATIENT)
    rates = [value for _, value in curves_of(tmp_path)["LearningRate"]]
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 2)


def test_best_model_is_the_first_epoch_with_the_best_validation_accuracy(lesson, tmp_path, monkeypatch):
    """Its weights are kept, and are those that are tested at the end."""
    script = Script([*ACCURACIES[:6], 43.75])
    monkeypatch.setattr(lesson, "evaluate", script)
    output = run_lesson(lesson, tmp_path, *TINY, *PATIENT)
    best, latest = (checkpoints_of(tmp_path)[f"{name}.pth"] for name in ["best_model", "latest_checkpoint"])
    assert [row["Accuracy/val"] for row in best["history"]] == [30.0, 50.0] and best["best_accuracy"] == 50.0
    assert_same_state(dict(best["model"]), script.weights[1])
    assert_same_state(dict(latest["model"]), script.weights[5])
    assert_same_state(script.weights[6], script.weights[1])
    assert len(script.weights) == 7
    assert "Best validation accuracy: 50.00 % in epoch 2 of 6\n" in output
    assert "Test accuracy of this model: 43.75 % on 32 images, which chose nothing\n" in output


def test_the_test_images_choose_nothing(lesson, tmp_path, monkeypatch):
    """They are loaded when the best model is saved, and used once. Until then, there are validation images only."""
    script, loaded, load_data = Script([*ACCURACIES[:6], 40.0]), [], lesson.load_data

    def watch(*args, train):
        images, labels, *rest = load_data(*args, train)
        loaded.append((train, len(script.weights), images))
        return images, labels, *rest

    monkeypatch.setattr(lesson, "evaluate", script)
    monkeypatch.setattr(lesson, "load_data", watch)
    run_lesson(lesson, tmp_path, *TINY, *PATIENT)
    assert [(train, evaluations) for train, evaluations, _ in loaded] == [(True, 0), (False, 6)]
    train_images, test_images = (images for *_, images in loaded)
    _, val_set = lesson.split_train_val(train_images, torch.zeros(len(train_images)), 42, 32)
    assert all(torch.equal(data.tensors[0], val_set.tensors[0]) for data in script.data[:6])
    assert torch.equal(script.data[6].tensors[0], test_images[:32])


# Resuming


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(lesson, tmp_path, monkeypatch, stop_at):
    """It stops after the same epoch, and an epoch that was logged, but not saved, is one point of its curves."""
    log_epoch = lesson.log_epoch

    def log_and_stop(writer, epoch, *rest):
        log_epoch(writer, epoch, *rest)
        if epoch == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES[:6], 40.0]))
    whole = run_lesson(lesson, tmp_path / "whole", *TINY, *PATIENT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lesson, "evaluate", Script(ACCURACIES))
        patch.setattr(lesson, "log_epoch", log_and_stop)
        run_lesson(lesson, tmp_path / "cut", *TINY, *PATIENT)
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES[stop_at - 1 : 6], 40.0]))
    torch.seed()  # a new process has another random state
    output = resume(lesson, tmp_path / "cut")
    assert f"Resuming after epoch {stop_at - 1} of 9.\nEpoch  {stop_at}/9" in output
    assert_same_state(checkpoints_of(tmp_path / "cut"), checkpoints_of(tmp_path / "whole"))
    one, other = curves_of(tmp_path / "cut"), curves_of(tmp_path / "whole")
    assert_same_state(one, other)
    assert [step for step, _ in one["Loss/val"]] == [1, 2, 3, 4, 5, 6]
    table = slice(whole.index("Stopping early"), whole.index("Picture"))
    assert output[output.index("Stopping early") : output.index("Picture")] == whole[table]


def test_resuming_a_finished_run_trains_nothing(lesson, tmp_path, monkeypatch):
    """It stays as it is, and the rules are printed again."""
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES[:6], 40.0]))
    run_lesson(lesson, tmp_path, *TINY, *PATIENT)
    before = checkpoints_of(tmp_path)
    monkeypatch.setattr(lesson, "train_one_epoch", None)
    monkeypatch.setattr(lesson, "evaluate", Script([40.0]))
    output = resume(lesson, tmp_path)
    assert "Resuming after epoch 6 of 9.\nStopping early: " in output and "Epoch " not in output
    assert "What each rule makes of these 6 epochs (at most 9):" in output
    assert_same_state(checkpoints_of(tmp_path), before)


def test_a_stopped_run_continues_with_run_all_epochs(lesson, tmp_path, monkeypatch):
    """It equals a run that was started with this flag."""
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES[:6], 40.0]))
    run_lesson(lesson, tmp_path / "one", *TINY, *PATIENT)
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES[6:], 40.0]))
    output = resume(lesson, tmp_path / "one", "--run-all-epochs")
    assert "Resuming after epoch 6 of 9.\nEpoch  7/9" in output
    monkeypatch.setattr(lesson, "evaluate", Script([*ACCURACIES, 40.0]))
    run_lesson(lesson, tmp_path / "other", *TINY, *PATIENT, "--run-all-epochs")
    assert_same_state(checkpoints_of(tmp_path / "one"), checkpoints_of(tmp_path / "other"))


def test_a_resumed_run_keeps_its_settings(lesson, tmp_path, monkeypatch, capsys):
    """Another value is an error with status 2. Only --epochs may change."""
    monkeypatch.setattr(lesson, "evaluate", Script([50.0, 40.0]))
    run_lesson(lesson, tmp_path, *TINY, "--patience", 7, "--min-delta", 0.5)
    values = {"--patience": 6, "--min-delta": 0, "--lr": 0.5, "--seed": 1, "--batch-size": 7, "--subset": 9}
    for flag, value in values.items():
        with pytest.raises(SystemExit) as error:
            resume(lesson, tmp_path, flag, value)
        assert error.value.code == 2
        assert capsys.readouterr().err.endswith(f"a resumed run keeps its settings; leave out {flag}\n")
    monkeypatch.setattr(lesson, "evaluate", Script([50.5] * 8))
    output = resume(lesson, tmp_path, "--epochs", 9, "--patience", 7)
    assert "Epoch  8/9" in output and "no improvement of more than 0.5 points in 7 epochs." in output


# The comparison


def reference(values, patience, min_delta, mode):
    """Return what apply_rule() should: here, an epoch is judged by all improvements before it."""
    sign = 1 if mode == "max" else -1
    improvements = [1]
    for epoch in range(2, len(values) + 1):
        if sign * (values[epoch - 1] - values[improvements[-1] - 1]) > min_delta:
            improvements.append(epoch)
    gaps = [b - a for a, b in itertools.pairwise([*improvements, len(values) + 1])]
    stop = next((e + patience for e, gap in zip(improvements, gaps, strict=True) if gap > patience), None)
    until_then = [sign * value for value in values[:stop]]
    return stop, until_then.index(max(until_then)) + 1


def random_history(seed, epochs):
    """Return a history that improves and stalls, in steps of 1/8, with many equal values."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-3, 4, (2, epochs), generator=generator) / 8
    trend = torch.arange(epochs).clamp(max=epochs // 2) / 8
    losses, accuracies = 9 - trend + noise[0], 50 + trend + noise[1]
    return [{"Loss/val": a.item(), "Accuracy/val": b.item()} for a, b in zip(losses, accuracies, strict=True)]


def test_every_rule_equals_a_second_way_to_compute_it(lesson):
    """On random histories of 1 to 16 epochs, in which each rule both stops and does not."""
    assert len(set(lesson.RULES)) == 12
    ends = set()
    for seed, rule in itertools.product(range(64), lesson.RULES):
        metric, mode, patience, min_delta = rule
        history = random_history(seed, 1 + seed % 16)
        result = lesson.apply_rule(history, metric, mode, patience, min_delta)
        assert result == reference([row[metric] for row in history], patience, min_delta, mode), (seed, rule)
        ends.add((rule, result[0] is None))
    assert len(ends) == 24


def test_the_rules_watch_validation_metrics_in_the_right_direction(lesson):
    """The loss should fall, and the accuracy should rise. Each has the same four values of patience."""
    groups = {}
    for metric, mode, patience, min_delta in lesson.RULES:
        groups.setdefault((metric, mode, min_delta), []).append(patience)
    assert groups == dict.fromkeys(
        [("Loss/val", "min", 0.0), ("Accuracy/val", "max", 0.0), ("Accuracy/val", "max", 0.2)], [1, 2, 3, 5]
    )


HISTORY = [
    {"Loss/val": loss, "Accuracy/val": accuracy}
    for loss, accuracy in zip(
        [1.0, 0.9, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1],
        [60.0, 65.0, 70.0, 72.0, 71.0, 71.5, 75.0, 75.125],
        strict=True,
    )
]


def test_the_table_says_what_each_rule_would_have_done(lesson, capsys):
    """Worked out by hand: the loss has its minimum in epoch 3, and the accuracy rises last, and little, in epoch 8."""
    lesson.print_rules(HISTORY, 10)
    assert capsys.readouterr().out.splitlines() == [
        "What each rule makes of these 8 epochs (at most 10):",
        "  metric        patience  min_delta   stops after  best epoch  saves      accuracy  loses",
        "  Loss/val             1        0.0      epoch  4           3   6 epochs   70.00 %   5.12 points",
        "  Loss/val             2        0.0      epoch  5           3   5 epochs   70.00 %   5.12 points",
        "  Loss/val             3        0.0      epoch  6           3   4 epochs   70.00 %   5.12 points",
        "  Loss/val             5        0.0      epoch  8           3   2 epochs   70.00 %   5.12 points",
        "  Accuracy/val         1        0.0      epoch  5           4   5 epochs   72.00 %   3.12 points",
        "  Accuracy/val         2        0.0      epoch  6           4   4 epochs   72.00 %   3.12 points",
        "  Accuracy/val         3        0.0     not in  8           8   0 epochs   75.12 %   0.00 points",
        "  Accuracy/val         5        0.0     not in  8           8   0 epochs   75.12 %   0.00 points",
        "  Accuracy/val         1        0.2      epoch  5           4   5 epochs   72.00 %   3.12 points",
        "  Accuracy/val         2        0.2      epoch  6           4   4 epochs   72.00 %   3.12 points",
        "  Accuracy/val         3        0.2     not in  8           8   0 epochs   75.12 %   0.00 points",
        "  Accuracy/val         5        0.2     not in  8           8   0 epochs   75.12 %   0.00 points",
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
            assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (best, values[best - 1])
            drawn = [round(segment[0][0]) for segment in line.get_segments()]
            assert drawn == ([stop] if stop else []), label
            end = f"stops after {stop}" if stop else "not in 8"
            assert label == f"patience {rule[2]}: {end}, best epoch {best}"


def test_the_picture_is_saved_under_the_name_that_is_printed(lesson, tmp_path, monkeypatch):
    """In artifacts/, next to the checkpoints."""
    monkeypatch.setattr(lesson, "evaluate", Script([50.0, 40.0]))
    output = run_lesson(lesson, tmp_path, *TINY)
    assert f"\nPicture: {tmp_path / 'artifacts' / 'early_stopping.png'}\n" in output
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == [
        "checkpoints", "early_stopping.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--patience", "0"], "--patience must be positive"),
        (["--min-delta", "-1"], "--min-delta must be 0 or positive"),
        (["--min-delta", "nan"], "--min-delta must be 0 or positive"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(lesson, capsys, flags, words):
    """One sentence and status 2."""
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(flags)
    assert error.value.code == 2 and words in capsys.readouterr().err
