"""The learning rate of lessons 04 to 06: by the closed forms, logged as used, and compared fairly."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torchvision
from common import read_scalars
from conftest import CPU, folder_of, load, run_lesson

FLAGS = ["--subset", "32", "--batch-size", "16"]


def closed_form(name, epochs, start):
    """Return the learning rate of every epoch, counted from t = 0, by the formula of the schedule."""
    formulas = {
        "Constant": lambda t: start,
        "StepLR": lambda t: start * 0.1 ** (t // -(-epochs // 3)),  # -(-a // b) rounds up
        "MultiStepLR": lambda t: start * 0.1 ** ((t >= epochs / 2) + (t >= epochs * 3 / 4)),
        "ExponentialLR": lambda t: start * 0.01 ** (t / epochs),
        "CosineAnnealingLR": lambda t: start * (1 + math.cos(math.pi * t / epochs)) / 2,
        "WarmUp": lambda t: min(1, (t + 1) / 3) * start * (1 + math.cos(math.pi * t / epochs)) / 2,
    }
    return [formulas[name](t) for t in range(epochs)]


def history_of(lesson, output_dir, arm):
    """Return the history in the latest checkpoint of an arm."""
    return load(folder_of(lesson, output_dir) / arm / "latest_checkpoint.pth")["history"]


@pytest.fixture(scope="module")
def eight_epochs(lessons, tmp_path_factory):
    """The folder of lesson 04 with all six schedules for 8 epochs, every warning of torch an error."""
    folder = tmp_path_factory.mktemp("eight")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lessons["04"], "plot_arms", lambda *_: {})  # other tests look at pictures
        # torch warns when scheduler.step() comes before optimizer.step()
        warnings.simplefilter("error", UserWarning)
        run_lesson(lessons["04"], folder, "--subset", 16, "--batch-size", 16, "--epochs", 8)
    return folder


@pytest.mark.parametrize("name", ["Constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR"])
def test_rates_follow_the_closed_form(eight_epochs, lessons, name):
    rates = [row["LearningRate"] for row in history_of(lessons["04"], eight_epochs, name)]
    assert rates == pytest.approx(closed_form(name, 8, 0.05), rel=1e-6)
    run = eight_epochs / "tensor_board" / lessons["04"].LESSON / "digits_run_1" / name
    assert [value for _, value in read_scalars(run)["LearningRate"]] == pytest.approx(rates, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("epochs", range(1, 13))
def test_short_runs_keep_the_shape_of_their_schedules(lessons, epochs):
    """Two drops at most, and none to a hundredth before three quarters of the run."""
    for name in ["StepLR", "MultiStepLR"]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
        scheduler, rates = lessons["04"].SCHEDULERS[name](optimizer, epochs), []
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        assert rates == pytest.approx(closed_form(name, epochs, 0.05), rel=1e-6)
        assert min(rates) > 0.00049
        if name == "MultiStepLR":
            assert all(rate > 0.0049 for rate in rates[: epochs * 3 // 4])


@pytest.mark.usefixtures("no_pictures")
def test_logged_rate_is_the_one_the_optimizer_used(lessons, tmp_path, monkeypatch):
    lesson, used = lessons["04"], []
    train_one_epoch = lesson.train_one_epoch

    def spy(model, loader, loss_fn, optimizer, *args):
        used.append(optimizer.param_groups[0]["lr"])
        return train_one_epoch(model, loader, loss_fn, optimizer, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 4, "--schedulers", "CosineAnnealingLR")
    assert [row["LearningRate"] for row in history_of(lesson, tmp_path, "CosineAnnealingLR")] == used
    assert used == pytest.approx(closed_form("CosineAnnealingLR", 4, 0.05))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["05", "06"])
def test_05_and_06_warm_up_and_end_on_one_cosine(lessons, tmp_path, monkeypatch, number):
    lesson, used, logged = lessons[number], [], []
    train_one_epoch, report_epoch = lesson.train_one_epoch, lesson.report_epoch

    def report(*args):
        logged.append(args[3]["LearningRate"])
        report_epoch(*args)

    def spy(model, loader, loss_fn, optimizer, *args):
        used.append(optimizer.param_groups[0]["lr"])
        group = optimizer.param_groups[0]
        assert group["nesterov"] and group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
        assert loss_fn.label_smoothing == 0.1
        return train_one_epoch(model, loader, loss_fn, optimizer, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    monkeypatch.setattr(lesson, "report_epoch", report)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 5)
    arms = 3 if number == "05" else 1
    assert used == pytest.approx(closed_form("WarmUp", 5, 0.1) * arms) and logged == used


@pytest.mark.usefixtures("no_pictures")
def test_plateau_follows_the_validation_loss_without_patience(lessons, tmp_path, monkeypatch):
    """A fifth after the epochs 3, 4 and 6, which lower the validation loss by less than 5 %; that of training falls."""
    lesson = lessons["04"]
    losses = iter([1.0, 0.8, 0.77, 0.9, 0.7, 0.9, 0.9])
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (next(losses), 50.0))
    falling = iter([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    train_one_epoch = lesson.train_one_epoch
    monkeypatch.setattr(lesson, "train_one_epoch", lambda *args: (next(falling), train_one_epoch(*args)[1]))
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 7, "--schedulers", "ReduceLROnPlateau")
    rates = [row["LearningRate"] for row in history_of(lesson, tmp_path, "ReduceLROnPlateau")]
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.01, 0.002, 0.002, 0.0004])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("number", "arms"), [("04", 6), ("05", 3)])
def test_arms_start_from_the_same_weights_and_see_the_same_batches(
    lessons, tmp_path, monkeypatch, number, arms
):
    lesson, starts, batches = lessons[number], [], []
    train_one_epoch = lesson.train_one_epoch

    def spy(model, train_loader, *args):
        starts.append(torch.cat([weights.flatten() for weights in model.state_dict().values()]).clone())
        order = torch.Generator()
        order.set_state(train_loader.generator.get_state())
        batches.append([labels.tolist() for _, labels in torch.utils.data.DataLoader(
            train_loader.dataset, train_loader.batch_size, shuffle=True, generator=order)])  # fmt: skip
        return train_one_epoch(model, train_loader, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 2)
    assert len(starts) == 2 * arms
    assert all(torch.equal(starts[0], start) for start in starts[::2]) and not torch.equal(
        starts[0], starts[1]
    )
    assert all(batches[0] == order for order in batches[::2]) and batches[0] != batches[1]
    assert all(batches[1] == order for order in batches[1::2])


def test_05_dropout_is_in_the_third_arm_only(lessons):
    assert list(lessons["05"].ARMS.values()) == [(False, 0.0), (True, 0.0), (True, 0.5)]
    model = lessons["05"].SimpleCNN(10, 0.5).train()
    inputs = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def history(*accuracies):
    """Return a history with these validation accuracies, and rates that fall by a tenth of the first."""
    return [{"Accuracy/val": value, "LearningRate": 0.1 - 0.01 * i, "Accuracy/train": 90.0 + i, "Seconds": 1.5}
            for i, value in enumerate(accuracies)]  # fmt: skip


def test_ranking_calls_no_difference_a_win_inside_one_standard_error(lessons, capsys):
    arms = {"low": history(60.0, 69.3), "tied": history(69.4, 60.0), "first": history(50.0, 70.0, 69.0)}
    for number in ["04", "05"]:
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
    for number in ["04", "05"]:
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


def test_04_draws_every_schedule_in_steps_and_every_accuracy_with_its_error(lessons):
    arms = {"steps": history(60.0, 70.0, 65.0), "flat": history(40.0, 41.0, 42.0)}
    for row in arms["flat"]:
        row["LearningRate"] = 0.3
    figures = lessons["04"].plot_arms(arms, 10_000, "some data")
    assert list(figures) == ["lr_schedules", "lr_comparison"]
    panels = figures["lr_schedules"].axes
    assert [ax.get_title() for ax in panels] == ["steps", "flat"], "an arm in each panel, and no empty one"
    for ax, rates in zip(panels, [[0.1, 0.09, 0.08], [0.3] * 3], strict=True):
        values, edges, _ = ax.patches[0].get_data()
        assert values.tolist() == pytest.approx(rates) and edges.tolist() == [0.5, 1.5, 2.5, 3.5]
        assert all(float(tick).is_integer() for tick in ax.get_xticks())
        assert ax.get_xlabel() == "epoch" and ax.get_ylabel() == "learning rate"
    left, right = figures["lr_comparison"].axes
    assert [line.get_label() for line in left.lines] == ["steps", "flat"]
    assert (
        left.lines[0].get_xydata().tolist() == [[1, 60], [2, 70], [3, 65]] and "some data" in left.get_title()
    )
    assert [bar.lines[0].get_xdata()[0] for bar in right.containers] == [70.0, 42.0]
    for bar, accuracy in zip(right.containers, [70.0, 42.0], strict=True):
        (low, _), (high, _) = bar.lines[2][0].get_segments()[0]
        error = 100 * (accuracy / 100 * (1 - accuracy / 100) / 10_000) ** 0.5
        assert (low, high) == pytest.approx((accuracy - error, accuracy + error), abs=1e-3)
    assert [label.get_text() for label in right.get_yticklabels()] == ["steps", "flat"]
    low, high = right.get_xlim()
    assert high - low < 40, "an axis on which tenths of a point can be seen"


def test_05_draws_the_arms_and_the_gaps_that_it_prints(lessons):
    arms = {"one": history(60.0, 70.0), "other": history(40.0, 50.0)}
    left, right = lessons["05"].plot_comparison(arms, {"one": 12.5, "other": -1.25}, "some data").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines == {
        "one: val": [[1, 60], [2, 70]],
        "one: train": [[1, 90], [2, 91]],
        "other: val": [[1, 40], [2, 50]],
        "other: train": [[1, 90], [2, 91]],
    }
    assert [bar.get_width() for bar in right.patches] == [12.5, -1.25]
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "one\n12.5 points",
        "other\n-1.2 points",
    ]
    assert right.lines[0].get_xdata()[0] == 10 and "as they are" in right.get_title()


@pytest.mark.usefixtures("no_pictures")
def test_05_measures_the_gap_of_the_best_models_on_images_as_they_are(lessons, tmp_path, monkeypatch):
    """Printed and drawn; worked out again from the files. The last model is another one than the best."""
    lesson, drawn = lessons["05"], []
    plot = lesson.plot_comparison
    monkeypatch.setattr(lesson, "plot_comparison", lambda *args: (drawn.append(args), plot(*args))[1])
    output = run_lesson(lesson, tmp_path, "--epochs", 4, "--lr", 0.2, "--subset", 120, "--batch-size", 16)
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    train, _ = lesson.split_train_val(images, labels, 42, 120)
    [(histories, gaps, data)] = drawn
    assert data == "digits" and list(gaps) == list(histories) == list(lesson.ARMS)
    for arm in lesson.ARMS:
        model, best = lesson.SimpleCNN(), load(folder_of(lesson, tmp_path) / arm / "best_model.pth")
        model.load_state_dict(best["model"])
        with torch.no_grad():
            right = model.eval()(lesson.to_input(train.tensors[0], CPU)).argmax(dim=1) == train.tensors[1]
        accuracy, val = 100 * right.double().mean().item(), max(row["Accuracy/val"] for row in histories[arm])
        assert f"{arm}: training {accuracy:.2f} %, validation {val:.2f} %" in output
        assert gaps[arm] == pytest.approx(accuracy - val, abs=1e-4)
        seconds = sum(row["Seconds"] for row in histories[arm])
        assert f"gap {gaps[arm]:.2f} points" in output and f" {seconds:.0f} s of training." in output


@pytest.mark.parametrize(
    ("train", "verdict"),
    [(99.0, "overfits"), (70.0, "hardly overfits"), (49.0, "has not learned enough to overfit")],
)
def test_05_verdict_needs_a_network_that_has_learned(lessons, tmp_path, monkeypatch, capsys, train, verdict):
    lesson, args = lessons["05"], SimpleNamespace(device=CPU)
    monkeypatch.setattr(lesson, "load_checkpoint", lambda *_: {"history": [{"Accuracy/val": 65.0}]})
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, train))
    images = torch.utils.data.TensorDataset(torch.zeros(4), torch.zeros(4))
    gaps = lesson.measure_gaps(args, tmp_path, {"arm": history(65.0, 64.0)}, images)
    assert gaps == {"arm": train - 65.0}
    assert f"gap {train - 65:.2f} points: {verdict}. 3 s of training." in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:tostring")
def test_05_shows_one_image_as_it_is_and_four_draws_of_every_transform(lessons):
    lesson = lessons["05"]
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    for data in ["cifar10", "digits"]:
        figure = lesson.plot_transforms(image, data)
        pictures = [ax.images[0].get_array() for ax in figure.axes]
        names = [ax.get_title() for ax in figure.axes if ax.get_title()]
        assert names == [*lesson.TRANSFORMS, "all together"] and len(pictures) == 5 * len(names)
        assert data in figure.get_suptitle()
        for i, name in enumerate(names):
            row = pictures[5 * i : 5 * i + 5]
            assert (row[0] == image.numpy()).all()
            if name == "RandomHorizontalFlip":
                assert all((drawn == image.numpy()[:, ::-1]).all() for drawn in row[1:])
            elif name == "RandomGrayscale":
                assert all((drawn[..., 0] == drawn[..., 2]).all() for drawn in row[1:])
            else:
                assert len({drawn.tobytes() for drawn in row}) == 5, f"{name}: a little different every time"


def test_05_mirrors_no_digit_in_its_picture_either(lessons, monkeypatch):
    image = torch.arange(32 * 32 * 3).view(32, 32, 3) % 251
    flip_only = [torchvision.transforms.v2.RandomHorizontalFlip(p=1.0), torch.nn.Identity()]
    monkeypatch.setattr(lessons["05"], "AUGMENTATION", flip_only)
    for data, expected in [("cifar10", image.flip(1)), ("digits", image)]:
        drawn = lessons["05"].plot_transforms(image.to(torch.uint8), data).axes[-1].images[0].get_array()
        assert (drawn == expected.numpy()).all()


@pytest.mark.usefixtures("no_pictures")
def test_schedulers_flag_picks_arms(lessons, tmp_path):
    output = run_lesson(lessons["04"], tmp_path, *FLAGS, "--schedulers", "ExponentialLR", "Constant")
    run = tmp_path / "tensor_board" / lessons["04"].LESSON / "digits_run_1"
    arms = {path.name for path in run.iterdir() if path.is_dir()}
    assert arms == {"ExponentialLR", "Constant"} and "StepLR" not in output
