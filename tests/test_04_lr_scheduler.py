"""Lesson 04: every schedule follows its formula, and the variants are compared fairly.

test_training.py tests that all variants begin alike, and how their runs are kept and resumed.
"""

import math

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import run_lesson, use_results

SCHEDULERS = ["Constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau"]


@pytest.fixture
def lesson(lessons):
    yield lessons["04"]
    plt.close("all")


def history(*accuracies):
    """Return a history with these validation accuracies, in which the learning rate falls by 0.01 per epoch."""
    return [{"Accuracy/val": a, "LearningRate": 0.1 - 0.01 * i} for i, a in enumerate(accuracies)]


def closed_form(name, epochs, lr):
    """Return the learning rate of every epoch, counted from t = 0, by the formula of the schedule."""
    formulas = {
        "Constant": lambda t: lr,
        "StepLR": lambda t: lr * 0.1 ** (t // -(-epochs // 3)),  # -(-a // b) rounds up
        "MultiStepLR": lambda t: lr * 0.1 ** ((t >= epochs / 2) + (t >= epochs * 3 / 4)),
        "ExponentialLR": lambda t: lr * 0.01 ** (t / epochs),
        "CosineAnnealingLR": lambda t: lr * (1 + math.cos(math.pi * t / epochs)) / 2,
    }
    return [formulas[name](t) for t in range(epochs)]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")  # no optimizer steps here
@pytest.mark.parametrize("name", SCHEDULERS[:-1])
def test_every_schedule_follows_its_formula(lesson, name):
    """However short the run is, each epoch has the learning rate of the closed form."""
    for epochs in [1, 2, 3, 5, 8, 16]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
        scheduler, rates = lesson.make_scheduler(name, optimizer, epochs), []
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        assert rates == pytest.approx(closed_form(name, epochs, 0.05), rel=1e-6), epochs


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("error:.*lr_scheduler.step")  # of a scheduler that steps before the optimizer
def test_every_variant_trains_with_its_schedule(lesson, tmp_path, monkeypatch):
    """The learning rate of an epoch, which is logged, is the one that the optimizer has in it.

    ReduceLROnPlateau divides it by 5 after the epochs 3, 4 and 6, whose validation loss is not 5 % below the best one.
    """
    used, histories = [], {}
    losses = [1.0, 0.8, 0.77, 0.9, 0.7, 0.9, 0.9]
    use_results(monkeypatch, lesson, [(7.0 - i, 50.0) for i in range(7)] * 6, [(x, 50.0) for x in losses * 6])
    train_one_epoch = lesson.train_one_epoch

    def note_rate(model, loader, loss_fn, optimizer, device):
        used.append(optimizer.param_groups[0]["lr"])
        return train_one_epoch(model, loader, loss_fn, optimizer, device)

    monkeypatch.setattr(lesson, "train_one_epoch", note_rate)
    monkeypatch.setattr(lesson, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(lesson, "print_ranking", lambda found, *_: histories.update(found))
    run_lesson(lesson, tmp_path, "--subset", 16, "--epochs", 7)
    assert list(histories) == SCHEDULERS
    assert [row["LearningRate"] for rows in histories.values() for row in rows] == used
    expected = [rate for name in SCHEDULERS[:-1] for rate in closed_form(name, 7, 0.05)]
    assert used == pytest.approx(expected + [0.05, 0.05, 0.05, 0.01, 0.002, 0.002, 0.0004], rel=1e-6)


# The comparison


def test_ranking_claims_no_difference_within_two_standard_errors(lesson, capsys):
    """Twice 100 * sqrt(2 * 0.7 * 0.3 / 10,000) = 0.648 is 1.30 points. The best variant has no note."""
    variants = {"far": history(60.0, 68.6), "close": history(68.8, 60.0), "first": history(50.0, 70.0, 69.0)}
    lesson.print_ranking(variants | {"tied": history(70.0)}, 10_000, "some data")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        line.split()
        for line in [
            "Best validation accuracy on 10,000 images of some data:",
            "first 70.00 % in epoch 2",
            "tied 70.00 % in epoch 1 0.00 points behind, not distinguishable",
            "close 68.80 % in epoch 1 1.20 points behind, not distinguishable",
            "far 68.60 % in epoch 2 1.40 points behind",
            "The standard error of a difference is 0.65 points. Less than twice as much can be chance.",
        ]
    ]


def test_the_standard_error_of_an_accuracy_follows_its_formula(lesson):
    """It is sqrt(p (1 - p) / n), in percentage points."""
    for accuracy, images, expected in [(70, 10_000, 0.4583), (50, 100, 5), (100, 288, 0)]:
        assert lesson.standard_error(accuracy, images) == pytest.approx(expected, abs=1e-4)


def test_schedules_are_drawn_as_steps_on_a_log_axis(lesson):
    """Every variant has a panel, no panel is empty, and epoch 1 reaches from 0.5 to 1.5."""
    flat = [row | {"LearningRate": 0.3} for row in history(40.0, 41.0, 42.0)]
    figure = lesson.plot_learning_rates({"steps": history(60.0, 70.0, 65.0), "flat": flat})
    assert [ax.get_title() for ax in figure.axes] == ["steps", "flat"]
    for ax, rates in zip(figure.axes, [[0.1, 0.09, 0.08], [0.3] * 3], strict=True):
        values, edges, _ = ax.patches[0].get_data()
        assert values.tolist() == pytest.approx(rates) and edges.tolist() == [0.5, 1.5, 2.5, 3.5]
        assert ax.get_yscale() == "log" and all(float(tick).is_integer() for tick in ax.get_xticks())
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "learning rate")
    assert len(lesson.plot_learning_rates(dict.fromkeys(SCHEDULERS, flat)).axes) == 6


def test_accuracies_are_drawn_per_epoch_and_at_their_best_with_the_standard_error(lesson):
    """On an axis on which tenths of a point can be seen."""
    variants = {"steps": history(60.0, 70.0, 65.0), "flat": history(40.0, 41.0, 42.0)}
    left, right = lesson.plot_accuracies(variants, 10_000, "some data").axes
    assert [line.get_label() for line in left.lines] == ["steps", "flat"] and "some data" in left.get_title()
    assert left.lines[0].get_xydata().tolist() == [[1, 60], [2, 70], [3, 65]]
    assert [label.get_text() for label in right.get_yticklabels()] == ["steps", "flat"]
    for bar, accuracy in zip(right.containers, [70.0, 42.0], strict=True):
        error = lesson.standard_error(accuracy, 10_000)
        assert bar.lines[0].get_xdata()[0] == accuracy
        (low, _), (high, _) = bar.lines[2][0].get_segments()[0]
        assert (low, high) == pytest.approx((accuracy - error, accuracy + error), abs=1e-3)
    low, high = right.get_xlim()
    assert high - low < 40
