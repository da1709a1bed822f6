"""The cosine of the lessons in the older form (07, 10 and 11), and the ranking of lesson 07."""

import math
import warnings

import pytest
import torch
from common import read_scalars
from conftest import TINY, folder_of, load, run_lesson

FLAGS = ["--subset", "32", "--batch-size", "16"]
ARMS = {"07": ["float32", "bfloat16"], "11": ["by_file", "by_group"]}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["07", "10", "11"])
def test_rates_follow_the_cosine_and_are_logged_as_they_are_used(lessons, tmp_path, monkeypatch, number):
    """torch warns when scheduler.step() comes before optimizer.step(): that is an error here."""
    lesson, used, logged = lessons[number], [], []
    train_one_epoch, report_epoch = lesson.train_one_epoch, lesson.report_epoch

    def spy(model, loader, loss_fn, optimizer, *args):
        used.append(optimizer.param_groups[0]["lr"])
        return train_one_epoch(model, loader, loss_fn, optimizer, *args)

    def report(writer, epoch, epochs, row):
        logged.append(row["LearningRate"])
        report_epoch(writer, epoch, epochs, row)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    monkeypatch.setattr(lesson, "report_epoch", report)
    epochs, start = 8, 0.02 if number == "10" else 0.05
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step")
        run_lesson(lesson, tmp_path, *TINY[number], "--epochs", epochs)
    rates = [start * (1 + math.cos(math.pi * t / epochs)) / 2 for t in range(epochs)]
    arms = len(ARMS.get(number, [""]))
    expected = (
        [rate for rate in rates for _ in range(arms)] if number == "07" else rates * arms
    )  # 07's take turns
    assert used[: len(expected)] == pytest.approx(expected, rel=1e-6) and logged == used[: len(expected)]
    for arm in ARMS.get(number, []):
        history = load(folder_of(lesson, tmp_path) / arm / "latest_checkpoint.pth")["history"]
        assert [row["LearningRate"] for row in history] == pytest.approx(rates, rel=1e-6)
        run = tmp_path / "tensor_board" / lesson.LESSON / "digits_run_1" / arm
        assert [value for _, value in read_scalars(run)["LearningRate"]] == pytest.approx(rates, rel=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_11_starts_both_arms_from_the_same_weights(lessons, tmp_path, monkeypatch):
    lesson, starts = lessons["11"], []
    train_one_epoch = lesson.train_one_epoch

    def spy(model, *args):
        starts.append(torch.cat([weights.flatten() for weights in model.state_dict().values()]).clone())
        return train_one_epoch(model, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 2)
    assert len(starts) == 4
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


def history(*accuracies):
    """Return a history with these validation accuracies, and rates that fall by a tenth of the first."""
    return [{"Accuracy/val": value, "LearningRate": 0.1 - 0.01 * i, "Accuracy/train": 90.0 + i, "Seconds": 1.5}
            for i, value in enumerate(accuracies)]  # fmt: skip


def test_ranking_calls_no_difference_a_win_inside_one_standard_error(lessons, capsys):
    arms = {"low": history(60.0, 69.3), "tied": history(69.4, 60.0), "first": history(50.0, 70.0, 69.0)}
    for number in ["07"]:
        lessons[number].print_ranking(arms, 10_000, "some data")
        head, first, tied, low = capsys.readouterr().out.splitlines()
        assert "on 10,000 images of some data" in head
        assert head.endswith("standard error 0.65:")  # 100 * sqrt(2 * 0.7 * 0.3 / 10,000)
        assert first.split() == ["first", "70.00", "%", "in", "epoch", "2"]
        assert tied.split()[:6] == ["tied", "69.40", "%", "in", "epoch", "1"] and "a tie" in tied
        assert (
            low.split()[:8] == ["low", "69.30", "%", "in", "epoch", "2", "0.70", "behind"]
            and "tie" not in low
        )


def test_one_image_is_a_tie_even_where_all_are_right(lessons, capsys):
    """The standard error is then not 0: one more right and one more wrong answer are added."""
    all_right, one_wrong = history(100.0), history(100 * 287 / 288)
    for number in ["07"]:
        lessons[number].print_ranking({"all": all_right, "same": all_right, "one": one_wrong}, 288, "digits")
        head, first, same, one = capsys.readouterr().out.splitlines()
        p = 289 / 290
        assert head.endswith(f"{100 * (2 * p * (1 - p) / 288) ** 0.5:.2f}:")
        assert (
            "tie" not in first
            and "0.00 behind" in same
            and "a tie" in same
            and "0.35 behind" in one
            and "a tie" in one
        )
        assert lessons[number].standard_error(70.0, 10_000) == pytest.approx(0.4583, abs=1e-4)
