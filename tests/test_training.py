"""What the training and the evaluation do, against references that are worked out here.

train_one_epoch() has three texts, which are tested in lessons 01, 02 and 05. What happens around it is watched in
every lesson.
"""

import copy
import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import load_lesson, read_scalars
from conftest import (
    NEW,
    checkpoints_of,
    draw_nothing,
    folder_of,
    load,
    one_variant,
    run_lesson,
    use_results,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("no_pictures")
TEXTS = ["01", "02", "05"]  # of train_one_epoch()
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of CIFAR-10's training pixels
WATCHED = ["--epochs", 2, "--subset", 40, "--batch-size", 24, "--lr", 0.03, "--seed", 3]


def standardized(images):
    """A second way to compute what normalize() returns."""
    return torch.stack([(images[:, c].double() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1).float()


def make_model(lesson, **settings):
    """Return a network of the lesson that is the same in every call."""
    torch.manual_seed(0)
    return lesson.SimpleCNN(**settings)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A function that returns what a lesson did while main() trained on 40 digits for 2 epochs, in batches of 24.

    .passes are the forward passes as (images, train mode?, gradients?), .epochs what train_one_epoch() was given,
    returned and left behind, .output what was printed.
    """

    @functools.cache
    def watch(number):
        lesson, seen = load_lesson(number), SimpleNamespace(passes=[], epochs=[])
        train_one_epoch, forward = lesson.train_one_epoch, lesson.SimpleCNN.forward

        def watched_forward(self, x):
            seen.passes.append((len(x), self.training, torch.is_grad_enabled()))
            return forward(self, x)

        def watched_epoch(model, loader, loss_fn, optimizer, device, *args):
            epoch = SimpleNamespace(
                loader=loader, optimizer=optimizer, device=device, loss_fn=loss_fn, calls=[]
            )
            epoch.group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
            epoch.weights = {id(weight) for weight in model.parameters()}
            seen.epochs.append(epoch)

            def watched_loss(logits, labels):
                epoch.calls.append((logits.detach().clone(), labels.clone()))
                return loss_fn(logits, labels)

            epoch.result = train_one_epoch(model, loader, watched_loss, optimizer, device, *args)
            epoch.model = copy.deepcopy(model)
            epoch.channels_last = model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
            return epoch.result

        with pytest.MonkeyPatch.context() as patch:
            draw_nothing(patch, [lesson])
            patch.setattr(lesson.SimpleCNN, "forward", watched_forward)
            patch.setattr(lesson, "train_one_epoch", watched_epoch)
            seen.output = run_lesson(
                lesson, tmp_path_factory.mktemp("watched"), *WATCHED, *one_variant(number)
            )
        return seen

    return watch


# The parts


def test_normalized_pixels_have_mean_0_and_deviation_1(lessons):
    """With the constants of CIFAR-10's training pixels. uint8 (N, 3, 32, 32) becomes float32 of the same shape."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for channel in range(3):  # pixels with the mean and the deviation of CIFAR-10, up to rounding
        images[:2, channel] = round(255 * (MEAN[channel] - STD[channel]))
        images[2:, channel] = round(255 * (MEAN[channel] + STD[channel]))
    inputs = lessons["01"].normalize(images)
    assert inputs.dtype == torch.float32 and inputs.shape == images.shape
    assert inputs.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0.0] * 3, abs=0.01)
    assert inputs.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1.0] * 3, abs=0.01)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    assert torch.allclose(lessons["01"].normalize(pixels), standardized(pixels), atol=1e-6)


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
    kinds = [type(module) for module in model.children()]
    convolutions = [nn.Conv2d, nn.BatchNorm2d] * 3
    assert kinds == [*convolutions, nn.Linear, nn.Dropout, nn.Linear] and model.dropout.p == 0.0
    assert all(getattr(model, f"conv{i}").kernel_size == (3, 3) for i in [1, 2, 3])
    assert (logits < 0).any() and not torch.allclose(logits.sum(dim=1), torch.ones(2), atol=1e-3)
    assert sum(weight.numel() for weight in make_model(lessons["01"]).parameters()) == 620_586


@pytest.mark.parametrize("number", TEXTS)
def test_training_metrics_are_weighted_by_images(lessons, images, number):
    """The last batch of 4 counts half as much as the two batches of 8 before it."""
    lesson, loss_fn = lessons[number], nn.CrossEntropyLoss()
    model = make_model(lesson)
    reference, total, correct = copy.deepcopy(model).train(), 0.0, 0
    for batch, labels in DataLoader(images, 8):
        logits = reference(standardized(batch))
        total += loss_fn(logits, labels).item() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # no learning, so that the reference holds
    loss, accuracy = lesson.train_one_epoch(model, DataLoader(images, 8), loss_fn, optimizer, "cpu")
    assert loss == pytest.approx(total / 20, abs=1e-5) and accuracy == pytest.approx(5 * correct)


@pytest.mark.parametrize("number", TEXTS)
def test_every_batch_is_one_step_of_sgd_with_momentum(lessons, images, number):
    """By the gradient of the batch alone. Two epochs, because momentum is carried over from one to the next."""
    model = make_model(lessons[number])
    reference = copy.deepcopy(model).train()
    weights = list(reference.parameters())
    updates = [torch.zeros_like(weight) for weight in weights]
    for batch, labels in [*DataLoader(images, 8)] * 2:
        gradients = torch.autograd.grad(F.cross_entropy(reference(standardized(batch)), labels), weights)
        for weight, update, gradient in zip(weights, updates, gradients, strict=True):
            update.mul_(0.9).add_(gradient)
            weight.data -= 0.01 * update
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        lessons[number].train_one_epoch(model, DataLoader(images, 8), nn.CrossEntropyLoss(), optimizer, "cpu")
    for weight, expected in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(weight, expected, atol=1e-5)


@pytest.mark.parametrize("number", TEXTS)
def test_the_network_can_memorize_64_images(lessons, number):
    """The first check of any model: random pixels with random labels, which nothing but memory can tell apart."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    loader = DataLoader(TensorDataset(pixels, torch.arange(64) % 10), 32)
    model = make_model(lessons[number])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(12):
        loss, accuracy = lessons[number].train_one_epoch(
            model, loader, nn.CrossEntropyLoss(), optimizer, "cpu"
        )
    assert accuracy == 100 and loss < 0.1


def test_evaluation_does_not_depend_on_the_batch_size_and_changes_nothing(lessons, images):
    """Plain cross-entropy and accuracy in eval mode, weighted by images. BatchNorm's averages stay as they are."""
    model = make_model(lessons["02"], dropout=0.5).train()
    before = copy.deepcopy(model.state_dict())
    results = [lessons["02"].evaluate(model, DataLoader(images, size), "cpu") for size in [20, 8, 3]]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    pixels, labels = images.tensors
    logits = model.eval()(standardized(pixels))
    accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
    assert (
        results
        == [(pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5), pytest.approx(accuracy))] * 3
    )


@pytest.mark.parametrize("number", TEXTS)
def test_nothing_in_the_loops_makes_the_cpu_wait_for_a_gpu_after_every_batch(
    lessons, images, number, monkeypatch
):
    """A number is read from a tensor once an epoch; only lesson 01 prints the loss of its first and last batch."""
    reads = []
    for name in ["item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__format__"]:
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, _method=method, **kw: reads.append(1) or _method(*args, **kw)
        )
    lesson, counts = lessons[number], []
    model = make_model(lesson)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in [5, 1]:  # 4 batches, and 20
        reads.clear()
        lesson.train_one_epoch(model, DataLoader(images, size), nn.CrossEntropyLoss(), optimizer, "cpu")
        if number != "01":
            lesson.evaluate(model, DataLoader(images, size), "cpu")
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


# The whole


@pytest.mark.parametrize("number", NEW)
def test_train_and_eval_mode_alternate_in_every_epoch(watched, number):
    """Two batches with gradients in train mode, and then the validation without gradients in eval mode."""
    epoch = [(24, True, True), (16, True, True)] + ([(40, False, False)] if number != "01" else [])
    count = len(watched(number).epochs)
    assert watched(number).passes[: count * len(epoch)] == epoch * count
    assert count == (6 if number == "05" else 2)


@pytest.mark.parametrize("number", NEW)
def test_flags_take_effect(watched, number):
    """--epochs, --subset, --batch-size and --lr reach the loader and the optimizer, which has momentum 0.9."""
    epochs = watched(number).epochs
    assert f"Epoch  2/2 | train loss {epochs[1].result[0]:.4f}" in watched(number).output
    for epoch in epochs:
        assert (epoch.loader.batch_size, len(epoch.loader.dataset), epoch.device) == (24, 40, "cpu")
        assert isinstance(epoch.optimizer, torch.optim.SGD) and epoch.group["momentum"] == 0.9
        assert {id(p) for group in epoch.optimizer.param_groups for p in group["params"]} == epoch.weights
    # Lessons 05 and 06 warm up: their first epoch has a third of the learning rate.
    assert epochs[0].group["lr"] == pytest.approx(0.01 if number in ["05", "06"] else 0.03)


@pytest.mark.parametrize("number", NEW)
def test_the_loss_function_is_cross_entropy_of_logits(watched, number):
    """Not of probabilities, with which the loss could not fall below 1.46. Lessons 05 and 06 smooth the labels."""
    for epoch in watched(number).epochs:
        smoothing = 0.1 if number in ["05", "06"] else 0.0
        assert isinstance(epoch.loss_fn, nn.CrossEntropyLoss) and epoch.loss_fn.label_smoothing == smoothing
        for logits, _ in epoch.calls:
            assert (logits < 0).any() and not torch.allclose(
                logits.sum(dim=1), torch.ones(len(logits)), atol=1e-3
            )


@pytest.mark.parametrize("number", NEW[1:])
def test_validation_metrics_are_those_of_the_validation_images(watched, lessons, tmp_path, number):
    """Computed anew from the model as it was after every epoch. The loss is plain cross-entropy in every lesson."""
    images, labels, *_ = lessons[number].load_data("digits", tmp_path, train=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))  # --seed 3
    chosen = order[len(order) * 4 // 5 :][:40]
    lines = re.findall(
        r"^Epoch .*train loss (\S+), acc +(\S+) % \| val loss (\S+), acc +(\S+) %",
        watched(number).output,
        re.MULTILINE,
    )
    for epoch, line in zip(watched(number).epochs, lines, strict=True):
        with torch.no_grad():
            logits = epoch.model.eval()(standardized(images[chosen]))
        loss = F.cross_entropy(logits, labels[chosen]).item()
        accuracy = 100 * (logits.argmax(dim=1) == labels[chosen]).double().mean().item()
        assert [float(value) for value in line[::2]] == pytest.approx([epoch.result[0], loss], abs=0.0002)
        assert [float(value) for value in line[1::2]] == pytest.approx([epoch.result[1], accuracy], abs=0.006)


@pytest.mark.parametrize("number", NEW)
def test_weights_are_channels_last_on_the_cpu_only(watched, lessons, tmp_path, monkeypatch, number):
    """It is faster on CPUs. The device "meta", which computes nothing, takes the place of a GPU."""
    assert all(epoch.channels_last for epoch in watched(number).epochs)

    def stop(model, *_):
        assert str(model.conv1.weight.device) == "meta" and model.conv1.weight.is_contiguous()
        raise KeyboardInterrupt

    monkeypatch.setattr(lessons[number], "train_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        run_lesson(lessons[number], tmp_path, "--device", "meta")


@pytest.mark.parametrize("number", NEW)
def test_initial_weights_and_a_new_order_in_every_epoch_depend_on_the_seed_alone(
    lessons, tmp_path, monkeypatch, number
):
    """Whatever else draws random numbers. All variants begin with the same weights and see the same order."""
    orders, weights = [], []

    def note_order(model, loader, loss_fn, optimizer, *_):
        torch.seed()  # other random numbers
        orders.append([index for batch in loader.batch_sampler for index in batch])
        weights.append(model.fc2.weight.sum().item())
        optimizer.step()  # which the schedulers expect
        return 1.0, 50.0

    monkeypatch.setattr(lessons[number], "train_one_epoch", note_order)
    for i, seed in enumerate([1, 1, 2]):
        flags = ["--epochs", 2, "--seed", seed, "--subset", 64]
        flags += ["--schedulers", "Constant", "ReduceLROnPlateau"] if number == "04" else []
        run_lesson(lessons[number], tmp_path / str(i), *flags)
    count = len(orders) // 3
    first, again, other = orders[:count], orders[count : 2 * count], orders[2 * count :]
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1]) == list(range(64))
    assert first == again == first[:2] * (count // 2) and first[:2] != other[:2]
    assert len(set(weights[: 2 * count])) == 1 and weights[0] != weights[-1]


@pytest.mark.parametrize("number", ["01", "02", "05", "06"])  # a resumed run holds the same of 03 and 04
def test_two_runs_with_one_seed_print_the_same_metrics(watched, lessons, tmp_path, number):
    """Initial weights, dropout and transforms included, whatever was drawn before."""
    outputs = [watched(number).output]
    torch.seed()
    outputs.append(run_lesson(lessons[number], tmp_path, *WATCHED))
    lines = [[line.rsplit("|", 1)[0] for line in out.splitlines() if "Epoch" in line] for out in outputs]
    assert lines[0] == lines[1] and lines[0]


# Losses that are not finite


@pytest.mark.parametrize(
    ("number", "bad"),
    [(number, "nan in training") for number in NEW]
    + [(number, "infinity in validation") for number in NEW[1:]],
)
def test_a_loss_that_is_not_finite_ends_the_lesson_and_is_not_saved(
    lessons, tmp_path, monkeypatch, number, bad
):
    """One sentence and status 1. The checkpoints and curves of the epoch before stay, and 06 keeps no model."""
    lesson = lessons[number]
    train_loss, val_loss = (math.nan, 1.0) if bad == "nan in training" else (1.0, math.inf)
    use_results(monkeypatch, lesson, [(1.0, 50.0), (train_loss, 99.0)], [(1.0, 50.0), (val_loss, 99.0)])
    with pytest.raises(
        SystemExit, match=r"^The loss is no longer a finite number\. .* smaller .* \(--lr\)\.$"
    ):
        run_lesson(lesson, tmp_path, "--epochs", 3, "--subset", 32)
    assert not (tmp_path / "artifacts" / "01_basic_training.png").exists()
    if number in ["03", "04", "05"]:
        checkpoints = checkpoints_of(lesson, tmp_path)
        assert len(checkpoints) == 2
        for name in checkpoints:
            assert len(load(folder_of(lesson, tmp_path) / name)["history"]) == 1
    else:
        assert not list(tmp_path.rglob("*.pth"))
    for events in tmp_path.rglob("events*"):
        curves = read_scalars(events.parent)
        assert {step for points in curves.values() for step, _ in points} == {1}


def test_a_learning_rate_out_of_all_reason_makes_the_loss_not_finite(lessons, tmp_path):
    """This is how a learner meets the sentence."""
    for number in ["01", "05"]:
        with pytest.raises(SystemExit, match="^The loss is no longer a finite number"):
            run_lesson(lessons[number], tmp_path / number, "--lr", 1e9, "--epochs", 3, "--batch-size", 16)
