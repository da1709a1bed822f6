"""The learning rate of lessons 04 to 06: by the closed forms, logged as used, and compared fairly."""

import math
import warnings

import pytest
import torch
from common import read_scalars
from conftest import run_lesson

pytestmark = pytest.mark.usefixtures("no_pictures")
FLAGS = ["--subset", "32", "--batch-size", "16"]


def closed_form(name, epochs, start):
    """Return the learning rate of every epoch, counted from t = 0, by the formula of the schedule."""
    formulas = {
        "Constant": lambda t: start,
        "StepLR": lambda t: start * 0.1 ** (t // (epochs // 3)),
        "MultiStepLR": lambda t: (
            start * 0.1 ** sum(t >= milestone for milestone in [epochs // 2, epochs * 3 // 4])
        ),
        "ExponentialLR": lambda t: start * 0.01 ** (t / epochs),
        "CosineAnnealingLR": lambda t: start * (1 + math.cos(math.pi * t / epochs)) / 2,
    }
    return [formulas[name](t) for t in range(epochs)]


@pytest.fixture(scope="module")
def eight_epochs(lessons, tmp_path_factory):
    """Lesson 04 with all six schedules for 8 epochs, every warning an error. Returns its folder and checkpoint."""
    folder = tmp_path_factory.mktemp("eight")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # torch warns when scheduler.step() comes before optimizer.step()
        run_lesson(lessons["04"], folder, *FLAGS, "--epochs", 8)
    latest = folder / "artifacts" / "checkpoints" / lessons["04"].LESSON / "latest_checkpoint.pth"
    return folder, torch.load(latest, weights_only=True)


@pytest.mark.parametrize("name", ["Constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR"])
def test_rates_follow_the_closed_form(eight_epochs, lessons, name):
    folder, checkpoint = eight_epochs
    rates = [row["lr"] for row in checkpoint["finished"][name]]
    assert rates == pytest.approx(closed_form(name, 8, 0.05), rel=1e-6)
    logged = read_scalars(folder / "tensor_board" / lessons["04"].LESSON / name / "digits_run_1")[
        "LearningRate"
    ]
    assert [value for _, value in logged] == pytest.approx(rates, rel=1e-6)


def test_logged_rate_is_the_one_the_optimizer_used(lessons, tmp_path, monkeypatch):
    lesson, used = lessons["04"], []
    train_one_epoch = lesson.train_one_epoch

    def spy(model, loader, loss_fn, optimizer, *args):
        used.append(optimizer.param_groups[0]["lr"])
        return train_one_epoch(model, loader, loss_fn, optimizer, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 4, "--schedulers", "CosineAnnealingLR")
    latest = tmp_path / "artifacts" / "checkpoints" / lesson.LESSON / "latest_checkpoint.pth"
    assert [row["lr"] for row in torch.load(latest, weights_only=True)["history"]] == used
    assert used == pytest.approx(closed_form("CosineAnnealingLR", 4, 0.05))


@pytest.mark.parametrize("number", ["05", "06"])
def test_05_and_06_end_on_one_cosine(lessons, tmp_path, monkeypatch, number):
    lesson, used = lessons[number], []
    train_one_epoch = lesson.train_one_epoch

    def spy(model, loader, loss_fn, optimizer, *args):
        used.append(optimizer.param_groups[0]["lr"])
        group = optimizer.param_groups[0]
        assert group["nesterov"] and group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
        assert loss_fn.label_smoothing == 0.1
        return train_one_epoch(model, loader, loss_fn, optimizer, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 3)
    arms = 3 if number == "05" else 1
    assert used == pytest.approx(closed_form("CosineAnnealingLR", 3, 0.05) * arms)


def test_plateau_follows_the_validation_loss_with_patience(lessons, tmp_path, monkeypatch):
    """The validation loss stops falling after epoch 2, while the training loss falls on: a fifth after epoch 4."""
    lesson = lessons["04"]
    losses = iter([1.0, 0.8, 0.8, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (next(losses), 50.0))
    falling = iter([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    train_one_epoch = lesson.train_one_epoch
    monkeypatch.setattr(lesson, "train_one_epoch", lambda *args: (next(falling), train_one_epoch(*args)[1]))
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 7, "--schedulers", "ReduceLROnPlateau")
    latest = tmp_path / "artifacts" / "checkpoints" / lesson.LESSON / "latest_checkpoint.pth"
    rates = [row["lr"] for row in torch.load(latest, weights_only=True)["history"]]
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.01, 0.01, 0.002])


@pytest.mark.parametrize(("number", "arms"), [("04", 6), ("05", 3)])
def test_arms_start_from_the_same_weights_and_see_the_same_batches(
    lessons, tmp_path, monkeypatch, number, arms
):
    lesson, starts, batches = lessons[number], [], []
    run_epoch = lesson.run_epoch

    def spy(model, train_loader, *args):
        starts.append(torch.cat([weights.flatten() for weights in model.state_dict().values()]).clone())
        order = torch.Generator()
        order.set_state(train_loader.generator.get_state())
        batches.append([labels.tolist() for _, labels in torch.utils.data.DataLoader(
            train_loader.dataset, train_loader.batch_size, shuffle=True, generator=order)])  # fmt: skip
        return run_epoch(model, train_loader, *args)

    monkeypatch.setattr(lesson, "run_epoch", spy)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 2)
    assert len(starts) == 2 * arms
    assert all(torch.equal(starts[0], start) for start in starts[::2]) and not torch.equal(
        starts[0], starts[1]
    )
    assert all(batches[0] == order for order in batches[::2]) and batches[0] != batches[1]
    assert all(batches[1] == order for order in batches[1::2])


def test_05_dropout_is_in_the_third_arm_only(lessons):
    assert [arm["dropout"] for arm in lessons["05"].ARMS.values()] == [0.0, 0.0, 0.5]
    model = lessons["05"].SimpleCNN(10, 0.5).train()
    inputs = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_ranking_calls_no_difference_a_win_inside_one_standard_error(lessons, capsys):
    def history(*accuracies):
        return [{"val_accuracy": accuracy} for accuracy in accuracies]

    arms = {"low": history(60.0, 69.3), "tied": history(69.4, 60.0), "first": history(50.0, 70.0)}
    for number in ["04", "05"]:
        lessons[number].print_ranking(arms, 10_000, "some data")
        head, first, tied, low = capsys.readouterr().out.splitlines()
        assert "some data" in head and "difference: 0.65 points" in head  # 100 * sqrt(2 * 0.7 * 0.3 / 10,000)
        assert first.split() == ["first", "70.00", "%", "in", "epoch", "2"]
        assert tied.split()[:6] == ["tied", "69.40", "%", "in", "epoch", "1"] and "a tie" in tied
        assert (
            low.split()[:8] == ["low", "69.30", "%", "in", "epoch", "2", "0.70", "behind"]
            and "tie" not in low
        )


def test_schedulers_flag_picks_arms(lessons, tmp_path):
    output = run_lesson(lessons["04"], tmp_path, *FLAGS, "--schedulers", "ExponentialLR", "Constant")
    arms = {path.name for path in (tmp_path / "tensor_board" / lessons["04"].LESSON).iterdir()}
    assert arms == {"ExponentialLR", "Constant"} and "StepLR" not in output
