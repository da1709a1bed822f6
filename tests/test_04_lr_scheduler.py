"""Lesson 04: every schedule follows its formula, and the variants are compared fairly.

Lesson 05 keeps, resumes and replaces the runs of its variants in the same way, which is tested here for both lessons.
"""

import itertools
import math
import re
import time
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from common import load_lesson, read_scalars
from conftest import (
    assert_same_state,
    checkpoints_of,
    draw_nothing,
    folder_of,
    load,
    resume,
    run_lesson,
    use_results,
)

SCHEDULERS = ["Constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau"]
VARIANTS = {
    "04": ["CosineAnnealingLR", "ReduceLROnPlateau", "StepLR"],  # chosen here by --schedulers
    "05": ["without_augmentation", "with_augmentation", "strong_augmentation"],
}
CHOICE = {"04": ["--schedulers", *VARIANTS["04"]], "05": []}
SMALL = ["--subset", 32, "--batch-size", 16]


@pytest.fixture(scope="module", autouse=True)
def patch():
    """Patches for this module: nothing is drawn, and every start of a lesson falls into another second."""
    with pytest.MonkeyPatch.context() as context:
        draw_nothing(context, [])
        count = itertools.count(1)
        context.setattr(time, "strftime", lambda *_: f"20250101-{next(count):06d}")
        yield context


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def history_of(lesson, output_dir, variant):
    """Return the history in the latest checkpoint of a variant."""
    return load(folder_of(lesson, output_dir) / variant / "latest_checkpoint.pth")["history"]


def contents(folder):
    """Return the content of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def history(*accuracies):
    """Return a history with these validation accuracies, in which the learning rate falls by 0.01 per epoch."""
    return [{"Accuracy/val": a, "LearningRate": 0.1 - 0.01 * i} for i, a in enumerate(accuracies)]


# The schedules


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
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("name", SCHEDULERS[:-1])
def test_every_schedule_follows_its_formula(lessons, name, epochs):
    """However short the run is, each epoch has the learning rate of the closed form."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler, rates = lessons["04"].make_scheduler(name, optimizer, epochs), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates == pytest.approx(closed_form(name, epochs, 0.05), rel=1e-6)


def test_plateau_follows_the_validation_loss(lessons, tmp_path, monkeypatch):
    """It is divided by 5 after the epochs 3, 4 and 6, which improve the validation loss by less than 5 %."""
    lesson, val_losses = lessons["04"], [1.0, 0.8, 0.77, 0.9, 0.7, 0.9, 0.9]
    falling = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    use_results(
        monkeypatch, lesson, [(loss, 50.0) for loss in falling], [(loss, 50.0) for loss in val_losses]
    )
    run_lesson(lesson, tmp_path, *SMALL, "--epochs", 7, "--schedulers", "ReduceLROnPlateau")
    rates = [row["LearningRate"] for row in history_of(lesson, tmp_path, "ReduceLROnPlateau")]
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.01, 0.002, 0.002, 0.0004])


@pytest.fixture(scope="module")
def six(tmp_path_factory, patch):
    """One run of all six schedules for 5 epochs, its warnings, and what each of the 30 epochs had."""
    lesson, folder, epochs = load_lesson("04"), tmp_path_factory.mktemp("six"), []
    train_one_epoch = lesson.train_one_epoch

    def record(model, loader, loss_fn, optimizer, device):
        weights = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
        batches = []
        hook = model.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].clone()))
        epochs.append(SimpleNamespace(lr=optimizer.param_groups[0]["lr"], weights=weights, batches=batches))
        result = train_one_epoch(model, loader, loss_fn, optimizer, device)
        hook.remove()
        return result

    patch.setattr(lesson, "train_one_epoch", record)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_lesson(lesson, folder, *SMALL, "--epochs", 5)
    return SimpleNamespace(lesson=lesson, folder=folder, epochs=epochs, warnings=caught)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_logged_learning_rate_is_the_one_used_in_the_epoch(six, name):
    """And both follow the schedule."""
    i = 5 * SCHEDULERS.index(name)
    used = [epoch.lr for epoch in six.epochs[i : i + 5]]
    assert [row["LearningRate"] for row in history_of(six.lesson, six.folder, name)] == used
    if name != "ReduceLROnPlateau":
        assert used == pytest.approx(closed_form(name, 5, 0.05), rel=1e-6)


def test_pytorch_warns_of_nothing(six):
    """PyTorch would warn if a scheduler stepped before the optimizer."""
    assert [str(w.message) for w in six.warnings if issubclass(w.category, UserWarning)] == []


def test_all_variants_start_from_the_same_weights_and_see_the_same_batches(six):
    """The schedule is the only difference between the variants."""
    for epoch in range(5):
        first, *others = six.epochs[epoch::5]
        assert len(others) == 5 and len(first.batches) == 2
        for other in others:
            assert all(map(torch.equal, first.batches, other.batches))
            assert epoch > 0 or torch.equal(first.weights, other.weights)
    assert not torch.equal(six.epochs[0].batches[0], six.epochs[1].batches[0]), "another order"
    assert not torch.equal(six.epochs[0].weights, six.epochs[1].weights)


# The folders of a run


def test_every_variant_has_its_own_folders_with_one_date_time(six):
    """Each has a latest, a best and a fifth checkpoint. All variants of a start share its date-time in TensorBoard."""
    names = ["best_model.pth", "checkpoint_epoch_5.pth", "latest_checkpoint.pth"]
    expected = sorted(f"{variant}/{name}" for variant in SCHEDULERS for name in names)
    assert list(checkpoints_of(six.lesson, six.folder)) == expected
    runs = [path.parent for path in (six.folder / "tensor_board" / six.lesson.LESSON).rglob("events*")]
    assert (
        sorted(run.parent.name for run in runs) == sorted(SCHEDULERS) and len({run.name for run in runs}) == 1
    )


def test_the_schedulers_flag_picks_the_variants(lessons, tmp_path):
    """Only the named schedules are trained, in the order in which they are named."""
    output = run_lesson(lessons["04"], tmp_path, *SMALL, "--schedulers", "ExponentialLR", "Constant")
    assert re.findall(r"^(\w+):$", output, flags=re.MULTILINE) == ["ExponentialLR", "Constant"]
    trained = {path.parent.name for path in tmp_path.rglob("latest_checkpoint.pth")}
    assert trained == {path.parent.parent.name for path in tmp_path.rglob("events*")}
    assert trained == {"ExponentialLR", "Constant"}


@pytest.mark.parametrize("number", ["04", "05"])
def test_a_second_run_needs_overwrite(lessons, tmp_path, number):
    """It exits with one sentence that names the data of the run that is there. --overwrite clears the folder."""
    lesson = lessons[number]
    run_lesson(lesson, tmp_path, *SMALL, *(["--schedulers", "Constant"] if number == "04" else []))
    (folder := folder_of(lesson, tmp_path)).joinpath("old").mkdir()
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, *SMALL)
    sentence = f"{folder} holds a run on digits. Continue it (--resume) or replace it (--overwrite)."
    assert error.value.code == sentence and contents(tmp_path) == before
    run_lesson(lesson, tmp_path, *SMALL, *CHOICE[number], "--overwrite", "--seed", 1)
    assert {path.name for path in folder.iterdir()} == set(VARIANTS[number])
    assert {load(path)["hyperparameters"]["seed"] for path in folder.rglob("*.pth")} == {1}


@pytest.mark.parametrize("number", ["04", "05"])
def test_resume_without_a_run_is_one_sentence(lessons, tmp_path, number):
    """Nothing is created."""
    with pytest.raises(SystemExit, match=r"does not exist\. Train a model first\.$"):
        resume(lessons[number], tmp_path)
    assert not list(tmp_path.iterdir())


# Resuming


@pytest.fixture(scope="module", params=[("04", 3, 6), ("05", 2, 4), ("05", 2, 6)], ids=str)
def resumed(request, tmp_path_factory, patch):
    """A run that was stopped in an epoch, which was logged, but not saved, and resumed; and the same run without it."""
    number, epochs, stop = request.param
    lesson, folder, count = load_lesson(number), tmp_path_factory.mktemp("resumed"), itertools.count(1)
    flags, log_epoch = [*SMALL, *CHOICE[number], "--epochs", epochs], lesson.log_epoch

    def log_and_stop(*args):
        log_epoch(*args)
        if next(count) == stop:
            raise KeyboardInterrupt

    run_lesson(lesson, folder / "whole", *flags)
    with patch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stopping.setattr(lesson, "log_epoch", log_and_stop)
        run_lesson(lesson, folder / "resumed", *flags)
    run = SimpleNamespace(lesson=lesson, epochs=epochs, variants=VARIANTS[number], before=contents(folder))
    run.whole, run.resumed = folder / "whole", folder / "resumed"
    run.done = [min(max(stop - 1 - i * epochs, 0), epochs) for i in range(3)]  # epochs of each variant
    torch.manual_seed(0)  # a new process has another random state
    run.output = resume(lesson, run.resumed)
    return run


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(resumed):
    """Weights, momentum, scheduler, random states and history of every checkpoint are the same."""
    one, other = (folder_of(resumed.lesson, folder) for folder in [resumed.resumed, resumed.whole])
    names = list(checkpoints_of(resumed.lesson, resumed.whole))
    assert list(checkpoints_of(resumed.lesson, resumed.resumed)) == names and len(names) == 6
    for name in names:
        assert {"model", "optimizer", "scheduler", "shuffle"} <= load(one / name).keys()
        assert_same_state(load(one / name), load(other / name))


def test_a_resumed_run_has_every_point_of_its_curves_once(resumed):
    """A point that was logged, but not saved, is hidden."""
    for variant in resumed.variants:
        folders = [folder / "tensor_board" for folder in [resumed.resumed, resumed.whole]]
        runs = [next(folder.rglob(f"{variant}/*")) for folder in folders]
        curves, expected = map(read_scalars, runs)
        assert curves.pop("Seconds") and expected.pop("Seconds")
        assert curves == expected
        assert [step for step, _ in curves["Loss/val"]] == list(range(1, resumed.epochs + 1))


def test_resume_continues_every_variant_where_it_was(resumed):
    """Complete variants stay as they are, one variant continues, and those after it begin."""
    training, _ = resumed.output.split("Best validation accuracy")
    _, *sections = re.split(r"^(\w+):$", training, flags=re.MULTILINE)
    assert sections[::2] == resumed.variants
    for variant, text, done in zip(resumed.variants, sections[1::2], resumed.done, strict=True):
        assert (f"Resuming after epoch {done} of {resumed.epochs}." in text) == (done > 0)
        epochs = [int(epoch) for epoch in re.findall(r"Epoch +(\d+)/", text)]
        assert epochs == list(range(done + 1, resumed.epochs + 1))
        path = folder_of(resumed.lesson, resumed.resumed) / variant / "latest_checkpoint.pth"
        assert (resumed.before.get(path) == path.read_bytes()) == (done == resumed.epochs)


def test_a_resumed_run_keeps_its_date_time(resumed):
    """Variants that begin after the resume share it, so TensorBoard shows no second run."""
    [run] = {path.parent.name for path in resumed.resumed.rglob("events*")}
    events = [path for path in resumed.before if path.name.startswith("events")]
    assert {path.parent.name for path in events if resumed.resumed in path.parents} == {run}


SETTINGS = {
    "epochs": 6,
    "lr": 0.5,
    "seed": 1,
    "batch-size": 7,
    "subset": 33,
    "data": "cifar10",
    "schedulers": "StepLR",
}


@pytest.mark.parametrize(("name", "value"), SETTINGS.items())
def test_a_resumed_run_keeps_its_settings(six, capsys, name, value):
    """Another value is refused with status 2, even of --epochs, for which the schedules were made."""
    before = contents(six.folder)
    with pytest.raises(SystemExit) as error:
        resume(six.lesson, six.folder, f"--{name}", value)
    message = f"a resumed run keeps its settings; leave out --{name}\n"
    assert error.value.code == 2 and capsys.readouterr().err.endswith(message)
    assert contents(six.folder) == before


def test_a_complete_run_may_be_resumed_with_its_own_settings(six, tmp_path):
    """Nothing is trained, and the comparison is printed again."""
    output = resume(six.lesson, six.folder, "--epochs", 5, "--data", "digits", "--lr", 0.05)
    assert output.count("Resuming after epoch 5 of 5.") == 6 and "Epoch " not in output
    assert "Best validation accuracy on 32 images of digits:" in output


def test_resume_and_overwrite_exclude_each_other(lessons, tmp_path):
    """Together they are an error with status 2."""
    with pytest.raises(SystemExit) as error:
        resume(lessons["04"], tmp_path, "--overwrite")
    assert error.value.code == 2


@pytest.mark.parametrize("number", ["04", "05"])
def test_best_model_is_the_first_with_the_best_validation_accuracy(lessons, tmp_path, monkeypatch, number):
    """The training accuracy does not matter, and the ranking names the epoch."""
    lesson, weights = lessons[number], []
    train_one_epoch, accuracies = lesson.train_one_epoch, itertools.cycle([20.0, 60.0, 60.0])

    def evaluate(model, *_):
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 1.0, next(accuracies)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    monkeypatch.setattr(
        lesson, "train_one_epoch", lambda *args: (train_one_epoch(*args)[0], 90.0 + len(weights))
    )
    output = run_lesson(lesson, tmp_path, *SMALL, *CHOICE[number], "--epochs", 3)
    for i, variant in enumerate(VARIANTS[number]):
        best = load(folder_of(lesson, tmp_path) / variant / "best_model.pth")
        assert [row["Accuracy/val"] for row in best["history"]] == [20, 60] and best["best_accuracy"] == 60
        assert_same_state(dict(best["model"]), weights[3 * i + 1])
        assert re.search(rf"^  {variant} +60\.00 % in epoch  2", output, flags=re.MULTILINE)


@pytest.mark.parametrize("number", ["04", "05"])
def test_a_stop_between_two_saves_loses_no_best_model(lessons, tmp_path, monkeypatch, number):
    """The best model is saved before its epoch counts as done."""
    lesson, save_checkpoint, count = lessons[number], lessons[number].save_checkpoint, itertools.count(1)

    def save_or_stop(checkpoint, path):
        if next(count) == 4:  # each of the first two epochs is the best so far and saves two files
            raise KeyboardInterrupt
        save_checkpoint(checkpoint, path)

    accuracies = [20.0, 60.0, 60.0, *[40.0] * 10]  # of epoch 1, of epoch 2, of epoch 2 again, ...
    use_results(monkeypatch, lesson, [(1.0, 50.0)] * 10, [(1.0, accuracy) for accuracy in accuracies])
    monkeypatch.setattr(lesson, "save_checkpoint", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run_lesson(lesson, tmp_path, *SMALL, *CHOICE[number], "--epochs", 3)
    resume(lesson, tmp_path)
    best = load(folder_of(lesson, tmp_path) / VARIANTS[number][0] / "best_model.pth")
    assert [row["Accuracy/val"] for row in best["history"]] == [20.0, 60.0]


# The comparison


def test_ranking_claims_no_difference_within_two_standard_errors(lessons, capsys):
    """Twice 100 * sqrt(2 * 0.7 * 0.3 / 10,000) = 0.648 is 1.30 points. The best variant has no note."""
    variants = {"far": history(60.0, 68.6), "close": history(68.8, 60.0), "first": history(50.0, 70.0, 69.0)}
    variants["tied"] = history(70.0)
    lessons["04"].print_ranking(variants, 10_000, "some data")
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


@pytest.mark.parametrize(
    ("accuracy", "images", "expected"), [(70, 10_000, 0.4583), (50, 100, 5), (100, 288, 0)]
)
def test_the_standard_error_of_an_accuracy_follows_its_formula(lessons, accuracy, images, expected):
    """It is sqrt(p (1 - p) / n), in percentage points."""
    assert lessons["04"].standard_error(accuracy, images) == pytest.approx(expected, abs=1e-4)


def test_schedules_are_drawn_as_steps_on_a_log_axis(lessons):
    """Every variant has a panel, no panel is empty, and epoch 1 reaches from 0.5 to 1.5."""
    flat = [row | {"LearningRate": 0.3} for row in history(40.0, 41.0, 42.0)]
    figure = lessons["04"].plot_learning_rates({"steps": history(60.0, 70.0, 65.0), "flat": flat})
    assert [ax.get_title() for ax in figure.axes] == ["steps", "flat"]
    for ax, rates in zip(figure.axes, [[0.1, 0.09, 0.08], [0.3] * 3], strict=True):
        values, edges, _ = ax.patches[0].get_data()
        assert values.tolist() == pytest.approx(rates) and edges.tolist() == [0.5, 1.5, 2.5, 3.5]
        assert ax.get_yscale() == "log" and all(float(tick).is_integer() for tick in ax.get_xticks())
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "learning rate")
    assert len(lessons["04"].plot_learning_rates(dict.fromkeys(SCHEDULERS, flat)).axes) == 6


def test_accuracies_are_drawn_per_epoch_and_at_their_best_with_the_standard_error(lessons):
    """On an axis on which tenths of a point can be seen."""
    variants = {"steps": history(60.0, 70.0, 65.0), "flat": history(40.0, 41.0, 42.0)}
    left, right = lessons["04"].plot_accuracies(variants, 10_000, "some data").axes
    assert [line.get_label() for line in left.lines] == ["steps", "flat"] and "some data" in left.get_title()
    assert left.lines[0].get_xydata().tolist() == [[1, 60], [2, 70], [3, 65]]
    assert [label.get_text() for label in right.get_yticklabels()] == ["steps", "flat"]
    for bar, accuracy in zip(right.containers, [70.0, 42.0], strict=True):
        error = 100 * (accuracy / 100 * (1 - accuracy / 100) / 10_000) ** 0.5
        assert bar.lines[0].get_xdata()[0] == accuracy
        (low, _), (high, _) = bar.lines[2][0].get_segments()[0]
        assert (low, high) == pytest.approx((accuracy - error, accuracy + error), abs=1e-3)
    low, high = right.get_xlim()
    assert high - low < 40
