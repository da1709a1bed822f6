"""Lesson 02: what it says about overfitting, about both modes, and to TensorBoard."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from common import read_scalars
from conftest import run_lesson, use_results


@pytest.fixture
def lesson(lessons):
    return lessons["02"]


def make_history(*epochs):
    """Return a history from tuples of training accuracy, validation accuracy, training loss, validation loss."""
    return [
        {"Overfitting/accuracy_gap": train - val, "Loss/train": train_loss, "Loss/val": val_loss}
        for train, val, train_loss, val_loss in epochs
    ]


def test_a_gap_of_more_than_10_points_is_a_sign_of_overfitting(lesson):
    """In the first epoch that shows it."""
    find = lesson.find_overfitting
    assert find(make_history((50, 50, 1.5, 1.5), (60, 50, 1.2, 1.4))) == {}, "10 points are not more than 10"
    signs = find(make_history((50, 50, 1.5, 1.5), (60.1, 50, 1.2, 1.4), (70, 50, 1.0, 1.3)))
    assert list(signs.values()) == [2] and "10 points" in list(signs)[0]


def test_a_validation_loss_that_rises_for_3_epochs_is_a_sign_of_overfitting(lesson):
    """If the training loss fell meanwhile."""
    find, epochs = lesson.find_overfitting, [(50, 50, 1.5 - i / 10, 1.0 + i / 10) for i in range(5)]
    signs = find(make_history(*epochs))
    assert list(signs.values()) == [4] and "risen for 3 epochs" in list(signs)[0]
    assert find(make_history(*epochs[:3])) == {}, "it has risen for 2 epochs only"
    assert find(make_history(*epochs[:2], (50, 50, 1.45, 1.2), epochs[3])) == {}, (
        "the training loss rose as well"
    )
    assert find(make_history(*[(50, 50, 1.0, 1.0)] * 9)) == {}, "level is not rising"


def test_prints_signs_verdict_and_best_epoch_of_its_history(lesson, tmp_path, monkeypatch):
    """The best epoch is neither the first nor the last one here."""
    train = [(1.5, 50.0), (1.2, 62.0), (1.0, 75.0), (0.9, 77.0), (0.8, 78.0)]
    val = [(1.4, 48.0), (1.1, 60.0), (1.2, 64.0), (1.3, 70.0), (1.4, 66.0)]
    use_results(monkeypatch, lesson, train, val)
    lines = run_lesson(lesson, tmp_path / "a", "--epochs", 5).splitlines()
    first, second = (line for line in lines if line.startswith("Sign of overfitting"))
    assert re.search(r"epoch 3: training accuracy is more than 10 points above", first)
    assert re.search(r"epoch 5: validation loss has risen for 3 epochs", second)
    assert "Verdict: overfitting." in lines
    assert "Best validation accuracy: 70.00 % in epoch 4" in lines
    use_results(monkeypatch, lesson, train[:2], train[:2])
    assert "Verdict: no sign of overfitting in 2 epochs." in run_lesson(lesson, tmp_path / "b", "--epochs", 2)


def test_says_how_train_and_eval_mode_differ(finished):
    """In eval mode, neither dropout nor the other images of a batch change a prediction."""
    pattern = r"^  (train|eval) +mode: ([\d.]+) by dropout, ([\d.]+) by other images \(BatchNorm\)$"
    train, evaluation = re.findall(pattern, finished("02").output, re.MULTILINE)
    assert train[0] == "train" and float(train[1]) > 0.01 and float(train[2]) > 0.01
    assert evaluation[0] == "eval" and float(evaluation[1]) == 0 and float(evaluation[2]) < 0.001


def test_modes_are_shown_on_a_copy_of_the_model(lesson, images, capsys):
    """A forward pass in train mode would change BatchNorm's running averages."""
    model = lesson.SimpleCNN().eval()
    before = copy.deepcopy(model.state_dict())
    lesson.show_modes(model, images.tensors[0], "cpu")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.dropout.p == 0.0 and not model.training


def test_the_points_of_an_epoch_are_on_the_disk_before_its_line_is_printed(lesson, capsys):
    """So that a crash later on loses none of them. log_epoch() has one text in lessons 02 to 06."""
    calls = []
    writer = SimpleNamespace(add_scalar=lambda *point: calls.append(point))
    writer.flush = lambda: calls.append(f"flushed, printed: {capsys.readouterr().out!r}")
    names = ["Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "LearningRate", "Seconds"]
    row = {name: float(i) for i, name in enumerate(names)}
    lesson.log_epoch(writer, 7, 9, row)
    assert calls == [*((name, value, 7) for name, value in row.items()), "flushed, printed: ''"]
    assert capsys.readouterr().out.startswith("Epoch  7/9 | ")


def test_a_second_run_is_a_second_run_in_tensorboard(lesson, seconds, tmp_path):
    """Its curves stand beside those of the first, whose file stays as it is."""
    run_lesson(lesson, tmp_path, "--subset", 32)
    [first] = tmp_path.rglob("events*")
    content = first.read_bytes()
    run_lesson(lesson, tmp_path, "--subset", 32, "--seed", 7)
    [second] = set(tmp_path.rglob("events*")) - {first}
    assert first.read_bytes() == content and first.parent != second.parent
    assert read_scalars(first.parent)["Loss/train"] != read_scalars(second.parent)["Loss/train"]


def test_two_runs_of_one_second_are_not_mixed(lesson, monkeypatch, tmp_path):
    """The second one does not start."""
    monkeypatch.setattr(lesson.time, "strftime", lambda *_: "20250101-000001")
    run_lesson(lesson, tmp_path, "--subset", 32)
    with pytest.raises(FileExistsError, match="20250101-000001"):
        run_lesson(lesson, tmp_path, "--subset", 32)
    assert len(list(tmp_path.rglob("events*"))) == 1
