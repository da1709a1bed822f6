"""What the training and the evaluation of lessons 01 to 06 do, and how 03 to 05 keep and resume their runs.

train_one_epoch() has three texts there, which are tested in lessons 01, 02 and 05.
"""

import copy
import functools
import itertools
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import read_scalars
from conftest import CORE, assert_same_state, checkpoints_of, folder_of, load, resume, run_lesson, use_results
from torch import nn
from torch.utils.data import DataLoader

pytestmark = pytest.mark.usefixtures("no_pictures")
TEXTS = ["01", "02", "05"]  # of train_one_epoch()
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of CIFAR-10's training pixels


def standardized(images):
    """A second way to compute what normalize() returns."""
    return torch.stack([(images[:, c].double() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1).float()


def make_model(lesson, **settings):
    """Return a network of the lesson that is the same in every call."""
    torch.manual_seed(0)
    return lesson.SimpleCNN(**settings)


# The parts


def test_pixels_are_standardized_by_the_mean_and_deviation_of_cifar10(lessons):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    inputs = lessons["01"].normalize(pixels)
    assert inputs.dtype == torch.float32 and torch.allclose(inputs, standardized(pixels), atol=1e-6)


def test_the_network_is_three_convolutions_and_two_linear_layers(lessons):
    """Its layers, the shapes between them, and logits instead of probabilities at its end."""
    model, shapes = make_model(lessons["01"], num_classes=7).eval(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: shapes.update({name: tuple(args[2].shape)}))
    logits = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert shapes == {
        "conv1": (2, 32, 32, 32), "bn1": (2, 32, 16, 16), "conv2": (2, 64, 16, 16), "bn2": (2, 64, 8, 8),
        "conv3": (2, 128, 8, 8), "bn3": (2, 128, 4, 4), "fc1": (2, 256), "dropout": (2, 256), "fc2": (2, 7),
        "": (2, 7),
    }  # fmt: skip
    assert model.conv3.kernel_size == (3, 3) and model.dropout.p == 0.0 and (logits < 0).any()
    assert sum(weight.numel() for weight in make_model(lessons["01"]).parameters()) == 620_586


@pytest.mark.parametrize("number", TEXTS)
def test_an_epoch_is_one_step_by_the_gradient_of_every_batch(lessons, images, number):
    """With the mean loss and the accuracy over all images; the last batch of 4 counts half as much as one of 8."""
    model = make_model(lessons[number])
    reference, total, correct = copy.deepcopy(model).train(), 0.0, 0
    weights = list(reference.parameters())
    for batch, labels in DataLoader(images, 8):
        logits = reference(standardized(batch))
        loss = F.cross_entropy(logits, labels)
        total += loss.item() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum().item()
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.01 * gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    result = lessons[number].train_one_epoch(
        model, DataLoader(images, 8), nn.CrossEntropyLoss(), optimizer, "cpu"
    )
    assert result == (pytest.approx(total / 20, abs=1e-5), pytest.approx(5 * correct))
    for weight, expected in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(weight, expected, atol=1e-4)


def test_evaluation_does_not_depend_on_the_batch_size_and_changes_nothing(lessons, images):
    """Plain cross-entropy and accuracy in eval mode, weighted by images. BatchNorm's averages stay as they are."""
    model = make_model(lessons["02"], dropout=0.5).train()
    before = copy.deepcopy(model.state_dict())
    results = [lessons["02"].evaluate(model, DataLoader(images, size), "cpu") for size in [20, 8]]
    assert_same_state(dict(model.state_dict()), dict(before))
    pixels, labels = images.tensors
    logits = model.eval()(standardized(pixels))
    loss, accuracy = F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).double().mean()
    assert results == [(pytest.approx(loss, abs=1e-5), pytest.approx(100 * accuracy.item()))] * 2


@pytest.mark.parametrize("number", ["02", "05"])  # lesson 01 prints the loss of some batches
def test_no_batch_makes_the_cpu_wait_for_a_gpu(lessons, images, number):
    """The device "meta" computes nothing, so that no number can be read from it: only the end of an epoch does."""
    lesson, batches = lessons[number], []
    model = make_model(lesson).to("meta")
    model.register_forward_pre_hook(lambda *_: batches.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader, loss_fn = DataLoader(images, 5), nn.CrossEntropyLoss()
    with pytest.raises(RuntimeError, match="meta"):
        lesson.train_one_epoch(model, loader, loss_fn, optimizer, "meta")
    assert len(batches) == 4
    with pytest.raises(RuntimeError, match="meta"):
        lesson.evaluate(model, loader, "meta")
    assert len(batches) == 8


# The whole, watched while main() trains on 40 digits for 2 epochs, in batches of 24


@pytest.fixture(scope="module")
def watched(tmp_path_factory, lessons):
    """A function that returns what happened in a lesson.

    .loaded: the data as (training images?, epochs before it). .passes: forward passes as (images, train mode?,
    gradients?). .epochs: what each epoch was given, did, and returned. .evaluations: images and results.
    """

    @functools.cache
    def watch(number):
        lesson = lessons[number]
        seen = SimpleNamespace(loaded=[], passes=[], epochs=[], evaluations=[])
        load_data, train_one_epoch = lesson.load_data, lesson.train_one_epoch
        forward, evaluate = lesson.SimpleCNN.forward, getattr(lesson, "evaluate", None)  # lesson 01 has none

        def watched_load(*args, train):
            seen.loaded.append((train, len(seen.epochs)))
            return load_data(*args, train=train)

        def watched_forward(self, x):
            seen.passes.append((len(x), self.training, torch.is_grad_enabled()))
            return forward(self, x)

        def watched_epoch(model, loader, loss_fn, optimizer, device, *args):
            epoch = SimpleNamespace(loader=loader, optimizer=optimizer, loss_fn=loss_fn, labels=[])
            epoch.group = dict(optimizer.param_groups[0])
            epoch.weights = copy.deepcopy(dict(model.state_dict()))
            epoch.trains_all = [*map(id, epoch.group["params"])] == [*map(id, model.parameters())]
            epoch.channels_last = model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
            seen.epochs.append(epoch)

            def watched_loss(logits, labels):
                epoch.labels += labels.tolist()
                return loss_fn(logits, labels)

            epoch.result = train_one_epoch(model, loader, watched_loss, optimizer, device, *args)
            return epoch.result

        def watched_evaluation(model, loader, device):
            seen.evaluations.append((loader.dataset, evaluate(model, loader, device)))
            return seen.evaluations[-1][1]

        flags = ["--epochs", 2, "--subset", 40, "--batch-size", 24, "--lr", 0.03, "--seed", 3]
        flags += ["--schedulers", "Constant", "StepLR"] if number == "04" else []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lesson, "load_data", watched_load)
            patch.setattr(lesson.SimpleCNN, "forward", watched_forward)
            patch.setattr(lesson, "train_one_epoch", watched_epoch)
            patch.setattr(lesson, "evaluate", watched_evaluation, raising=False)
            seen.output = run_lesson(lesson, tmp_path_factory.mktemp("watched"), *flags)
        return seen

    return watch


@pytest.mark.parametrize("number", CORE)
def test_train_and_eval_mode_alternate_in_every_epoch(watched, number):
    """Two batches with gradients in train mode, and then the validation without gradients in eval mode."""
    epoch = [(24, True, True), (16, True, True)] + ([(40, False, False)] if number != "01" else [])
    count = {"04": 4, "05": 6}.get(number, 2)
    assert len(watched(number).epochs) == count
    assert watched(number).passes[: count * len(epoch)] == epoch * count


@pytest.mark.parametrize("number", CORE)
def test_flags_reach_the_loader_and_the_optimizer(watched, number):
    """SGD with momentum 0.9 trains all weights, by the cross-entropy, which lessons 05 and 06 smooth."""
    recipe = number in ["05", "06"]  # they warm up, too: their first epoch has a third of the learning rate
    for epoch in watched(number).epochs:
        assert (epoch.loader.batch_size, len(epoch.loader.dataset)) == (24, 40)
        assert isinstance(epoch.optimizer, torch.optim.SGD) and epoch.trains_all and epoch.channels_last
        assert (epoch.group["momentum"], epoch.group["nesterov"]) == (0.9, recipe)
        assert epoch.group["weight_decay"] == (5e-4 if recipe else 0)
        assert isinstance(epoch.loss_fn, nn.CrossEntropyLoss)
        assert epoch.loss_fn.label_smoothing == (0.1 if recipe else 0.0)
    assert watched(number).epochs[0].group["lr"] == pytest.approx(0.01 if recipe else 0.03)


@pytest.mark.parametrize("number", CORE)
def test_the_seed_determines_the_initial_weights_and_the_order_of_the_images(watched, lessons, number):
    """It is another order in every epoch. All variants begin with the same weights and see the same order."""
    epochs = watched(number).epochs
    torch.manual_seed(3)
    weights = dict(lessons[number].SimpleCNN().state_dict())
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        assert_same_state(first.weights, weights)
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(first.loader.dataset, 24, shuffle=True, generator=generator)
        for epoch in [first, second]:
            assert epoch.labels == torch.cat([labels for _, labels in loader]).tolist()
        assert first.labels != second.labels


@pytest.mark.parametrize("number", CORE[1:])
def test_every_epoch_prints_its_metrics_of_the_training_and_the_validation_images(watched, lessons, number):
    images, labels, *_ = lessons[number].load_data("digits", None, train=True)
    train_set, val_set = lessons[number].split_train_val(images, labels, 3, 40)
    for i, epoch in enumerate(watched(number).epochs):
        val_images, (val_loss, val_accuracy) = watched(number).evaluations[i]
        assert all(map(torch.equal, epoch.loader.dataset.tensors, train_set.tensors))
        assert all(map(torch.equal, val_images.tensors, val_set.tensors))
        train = f"train loss {epoch.result[0]:.4f}, acc {epoch.result[1]:5.2f} %"
        val = f"val loss {val_loss:.4f}, acc {val_accuracy:5.2f} %"
        assert f"Epoch  {1 + i % 2}/2 | {train} | {val} | " in watched(number).output


@pytest.mark.parametrize("number", CORE)
def test_the_test_images_are_loaded_after_training_or_never(watched, number):
    """They choose nothing. Only lessons 03 and 06 look at them."""
    assert watched(number).loaded == [(True, 0)] + ([(False, 2)] if number in ["03", "06"] else [])


@pytest.mark.parametrize("number", CORE)
def test_weights_are_not_channels_last_on_a_gpu(lessons, tmp_path, monkeypatch, number):
    """It is faster on CPUs only. The device "meta", which computes nothing, takes the place of a GPU."""

    def stop(model, *_):
        assert str(model.conv1.weight.device) == "meta" and model.conv1.weight.is_contiguous()
        raise KeyboardInterrupt

    monkeypatch.setattr(lessons[number], "train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        run_lesson(lessons[number], tmp_path, "--device", "meta")


@pytest.mark.parametrize("number", CORE)
def test_a_loss_that_is_not_finite_ends_the_lesson_and_is_not_saved(lessons, tmp_path, monkeypatch, number):
    """One sentence and status 1. The checkpoints and curves of the epoch before stay, and 06 keeps no model."""
    lesson = lessons[number]
    train_loss, val_loss = (math.nan, 1.0) if number == "01" else (1.0, math.inf)
    use_results(monkeypatch, lesson, [(1.0, 50.0), (train_loss, 99.0)], [(1.0, 50.0), (val_loss, 99.0)])
    with pytest.raises(
        SystemExit, match=r"^The loss is no longer a finite number\. .* smaller .* \(--lr\)\.$"
    ):
        run_lesson(lesson, tmp_path, "--epochs", 3, "--subset", 32)
    saved = [load(path)["history"] for path in tmp_path.rglob("*.pth")]
    assert [len(history) for history in saved] == ([1, 1] if number in KEPT else [])
    for events in tmp_path.rglob("events*"):
        assert {step for points in read_scalars(events.parent).values() for step, _ in points} == {1}


# Lessons 03 to 05 save a checkpoint after every epoch of each variant, and continue from it

KEPT = {
    "03": [""],
    "04": ["ReduceLROnPlateau", "StepLR"],  # chosen by --schedulers
    "05": ["without_augmentation", "with_augmentation", "strong_augmentation"],
}
SMALL = {number: ["--subset", 32, "--batch-size", 16] for number in KEPT}
SMALL["04"] += ["--schedulers", *KEPT["04"]]
ACCURACIES = [20.0, 60.0, 60.0, 40.0, 50.0]


@pytest.fixture(scope="module")
def kept(tmp_path_factory, lessons):
    """A function that returns a run of five epochs, and the same run, but stopped in an epoch and resumed.

    It was stopped between the two saves of the second epoch, in the second variant if there are several.
    """

    @functools.cache
    def run(number):
        lesson, folder = lessons[number], tmp_path_factory.mktemp("kept")
        clock, saves = itertools.count(1), itertools.count(1)
        run = SimpleNamespace(lesson=lesson, whole=folder / "whole", resumed=folder / "resumed", weights=[])
        save_checkpoint, stop = (
            lesson.save_checkpoint,
            4 if number == "03" else 8 + 4,
        )  # a variant saves 8 times

        def evaluate(model, *_):
            run.weights.append(copy.deepcopy(dict(model.state_dict())))
            return 1.0, ACCURACIES[(len(run.weights) - 1) % 5]

        def save_or_stop(checkpoint, path):
            if next(saves) == stop:
                raise KeyboardInterrupt
            save_checkpoint(checkpoint, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "strftime", lambda *_: f"20250101-{next(clock):06d}")
            patch.setattr(lesson, "evaluate", evaluate)
            run.output = run_lesson(lesson, run.whole, *SMALL[number], "--epochs", 5)
            patch.setattr(lesson, "save_checkpoint", save_or_stop)
            weights, run.weights = run.weights, []
            with pytest.raises(KeyboardInterrupt):
                run_lesson(lesson, run.resumed, *SMALL[number], "--epochs", 5)
            patch.setattr(lesson, "save_checkpoint", save_checkpoint)
            run.weights.pop()  # the second epoch comes again
            torch.seed()  # a new process has other random numbers
            run.resumed_output = resume(lesson, run.resumed)
        run.weights = weights
        return run

    return run


@pytest.mark.parametrize("number", KEPT)
def test_best_model_is_the_first_with_the_best_validation_accuracy(kept, number):
    """There are a snapshot of the fifth epoch, and the latest state of the run besides it."""
    run = kept(number)
    epochs = {"best_model.pth": 2, "checkpoint_epoch_5.pth": 5, "latest_checkpoint.pth": 5}
    names = [f"{variant}/{name}".lstrip("/") for variant in KEPT[number] for name in epochs]
    assert list(checkpoints_of(run.lesson, run.whole)) == sorted(names)
    for i, variant in enumerate(KEPT[number]):
        for name, epoch in epochs.items():
            checkpoint = load(folder_of(run.lesson, run.whole) / variant / name)
            assert [row["Accuracy/val"] for row in checkpoint["history"]] == ACCURACIES[:epoch]
            assert checkpoint["best_accuracy"] == 60.0
            assert_same_state(dict(checkpoint["model"]), run.weights[5 * i + epoch - 1])
    assert len(re.findall(r"60\.00 % in epoch +2\b", run.output)) == len(KEPT[number])


@pytest.mark.parametrize("number", KEPT)
def test_a_resumed_run_is_the_one_that_it_would_have_been(kept, number):
    """Bit for bit. Its curves have every epoch once, also the one that was logged, but not saved."""
    run = kept(number)
    names = checkpoints_of(run.lesson, run.whole)
    assert checkpoints_of(run.lesson, run.resumed).keys() == names.keys()
    for name in names:
        one, other = (load(folder_of(run.lesson, folder) / name) for folder in [run.whole, run.resumed])
        assert_same_state(one, other)
    curves = {run.whole: [], run.resumed: []}
    for folder, found in curves.items():
        for variant in KEPT[number]:
            [start] = (folder / "tensor_board" / run.lesson.LESSON / variant).iterdir()
            found.append(read_scalars(start))
            assert [step for step, _ in found[-1].pop("Seconds")] == [1, 2, 3, 4, 5]
    assert curves[run.whole] == curves[run.resumed]
    assert len({path.parent.name for path in run.resumed.rglob("events*")}) == 1  # the first start's


@pytest.mark.parametrize("number", KEPT)
def test_resuming_trains_what_is_missing_of_each_variant(kept, number):
    """The first is complete, the second continues after its last saved epoch, and the third begins."""
    continued = ["Resuming after epoch 1 of 5."] + [f"Epoch  {epoch}/5" for epoch in [2, 3, 4, 5]]
    expected = continued if number == "03" else ["Resuming after epoch 5 of 5.", *continued]
    expected = expected + ([f"Epoch  {epoch}/5" for epoch in range(1, 6)] if number == "05" else [])
    output = kept(number).resumed_output
    assert re.findall(r"^Resuming after epoch \d of 5\.$|^Epoch  \d/5", output, re.MULTILINE) == expected
    assert re.findall(r"^(\w+):$", output, re.MULTILINE) == [name for name in KEPT[number] if name]


@pytest.mark.parametrize("number", KEPT)
def test_a_resumed_run_keeps_its_settings(kept, capsys, number):
    """Another value is refused with status 2, and touches nothing. The same values are none."""
    run = kept(number)
    before = checkpoints_of(run.lesson, run.resumed)
    values = {"--lr": 0.5, "--seed": 1, "--batch-size": 7, "--subset": 33, "--data": "cifar10"}
    values |= {"03": {}, "04": {"--schedulers": "Constant"}, "05": {"--group-size": 8}}[number]
    values |= {} if number == "03" else {"--epochs": 6}  # for which the schedule was made
    for flag, value in values.items():
        with pytest.raises(SystemExit) as error:
            resume(run.lesson, run.resumed, flag, value)
        message = f"a resumed run keeps its settings; leave out {flag}\n"
        assert error.value.code == 2 and capsys.readouterr().err.endswith(message)
    assert "Epoch " not in resume(run.lesson, run.resumed, *SMALL[number], "--epochs", 5, "--data", "digits")
    assert checkpoints_of(run.lesson, run.resumed) == before


@pytest.mark.parametrize("number", KEPT)
def test_an_earlier_run_is_replaced_only_with_overwrite(lessons, tmp_path, number):
    """Without it, one sentence says on which data the earlier one is, and nothing is touched."""
    lesson, flags = lessons[number], SMALL[number]
    folder = folder_of(lesson, tmp_path)
    (folder / "old").mkdir(parents=True)
    torch.save({"hyperparameters": {"data": "digits"}}, folder / "old" / "latest_checkpoint.pth")
    before = list(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, *flags)
    sentence = f"{folder} holds a run on digits. Continue it (--resume) or replace it (--overwrite)."
    assert error.value.code == sentence and list(tmp_path.rglob("*")) == before
    assert "Epoch  1/1" in run_lesson(lesson, tmp_path, *flags, "--overwrite")
    assert not (folder / "old").exists()


@pytest.mark.parametrize("number", KEPT)
def test_resume_without_a_run_is_one_sentence_and_creates_nothing(lessons, tmp_path, number):
    with pytest.raises(SystemExit, match=r"latest_checkpoint\.pth does not exist\. Train a model first\.$"):
        resume(lessons[number], tmp_path)
    assert not list(tmp_path.iterdir())
