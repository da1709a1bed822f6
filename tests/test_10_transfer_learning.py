"""Lesson 10: what a variant takes over and what it freezes, and on which images everything is chosen and measured."""

import copy
import itertools
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from common import load_lesson, read_scalars
from conftest import run_lesson
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet18_Weights, resnet18

LAYERS = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc1", "dropout", "fc2"]  # of SimpleCNN
# The learning rate of every layer, as a share of that of a new layer, which is 1. A frozen layer has 0.
SHARES = {
    "scratch": dict.fromkeys(LAYERS, 1),
    "new_last_layer": dict.fromkeys(LAYERS, 0) | {"fc2": 1},
    "new_linear_layers": dict.fromkeys(LAYERS, 0) | {"fc1": 1, "fc2": 1},
    "fine_tuned": dict.fromkeys(LAYERS, 0.1) | {"fc1": 1, "fc2": 1},
}
RESULTS = {
    "one": {10: [50.0, 60.0, 70.0], 50: [80.0, 80.0, 80.0]},
    "other": {10: [51.0, 59.0, 71.0], 50: [78.0, 79.0, 80.0]},
}


@pytest.fixture
def lesson(lessons):
    return lessons["10"]


def random_task(images=72, classes=3):
    """Return a data set of random images with as many of each class."""
    pixels = torch.randint(0, 256, (images, 3, 32, 32), generator=torch.Generator().manual_seed(5))
    return TensorDataset(pixels.to(torch.uint8), torch.arange(images) % classes)


def old_weights(lesson):
    """Return weights for five classes, with running averages that BatchNorm has gathered from three batches."""
    torch.manual_seed(1)
    model = lesson.SimpleCNN(5)
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    return model.state_dict()


def settings(steps=2, backbone="simplecnn"):
    return SimpleNamespace(backbone=backbone, device="cpu", steps=steps)


def layer_of(name):
    return name.split(".")[0]


def train_by_hand(lesson, model, task, batch_size, lr, shares, epochs, seed, stop=None):
    """Train a model by SGD with momentum, written out: every layer has its share of a learning rate on a cosine.

    stop: after how many of the epochs the training ends, if it is not the last one.
    """
    images, labels = task.tensors
    weights = dict(model.to(memory_format=torch.channels_last).named_parameters())
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    shuffle = torch.Generator().manual_seed(seed)
    order = DataLoader(torch.arange(len(labels)), batch_size, shuffle=True, generator=shuffle)
    for epoch in range(stop or epochs):
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for batch in order:
            for name, layer in model.named_children():
                layer.train(shares[name] > 0)
            loss = F.cross_entropy(model(lesson.normalize(images[batch])), labels[batch])
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                weight.data -= rate * shares[layer_of(name)] * momenta[name].mul_(0.9).add_(gradient)


def assert_close(weights, model):
    for name, expected in model.state_dict().items():
        assert torch.allclose(weights[name], expected, atol=5e-4), name  # threads change the rounding


# The variants


@pytest.mark.parametrize("variant", SHARES)
def test_old_layers_begin_with_the_pretrained_weights_and_new_layers_do_not(lesson, variant):
    pretrained = old_weights(lesson)
    model, prepare = lesson.make_model(settings(), variant, pretrained, 3)
    assert model.fc2.out_features == 3 and prepare is lesson.normalize
    for name, weights in model.state_dict().items():
        is_new = SHARES[variant][layer_of(name)] == 1
        if not is_new or weights.unique().numel() > 1:  # every new BatchNorm begins with ones and zeros
            assert torch.equal(weights, pretrained[name]) != is_new, name


@pytest.mark.parametrize("variant", SHARES)
def test_a_variant_trains_new_layers_and_freezes_or_fine_tunes_the_others(lesson, variant):
    """Frozen layers stay equal bit for bit, also BatchNorm's running averages, and have no gradients."""
    pretrained, task, shares = old_weights(lesson), random_task(), SHARES[variant]
    model, _ = lesson.fit(settings(steps=6), variant, pretrained, task, 0.02, seed=7)
    torch.manual_seed(7)
    expected, _ = lesson.make_model(settings(), variant, pretrained, 3)
    train_by_hand(lesson, expected, task, 32, 0.02, shares, epochs=2, seed=7)
    assert_close(model.state_dict(), expected)
    for name, weights in model.state_dict().items():
        assert shares[layer_of(name)] or torch.equal(weights, pretrained[name]), name
    for name, weights in model.named_parameters():
        assert (weights.grad is None) == (shares[layer_of(name)] == 0), name
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last), "faster on CPUs"


@pytest.mark.parametrize("images", [30, 250, 1250])
def test_every_number_of_labelled_images_gets_the_same_number_of_steps(lesson, monkeypatch, images):
    passes = []

    def train_one_epoch(model, loader, loss_fn, optimizer, *_):
        optimizer.step()  # without gradients, it changes nothing
        passes.append(len(loader))

    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    lesson.fit(settings(steps=50), "scratch", None, random_task(images, 5), 0.02, 42)
    assert 50 <= sum(passes) < 50 + passes[0] and passes[0] == math.ceil(images / 32)


def test_metrics_are_weighted_by_images(lesson, images):
    """The last batch of 4 counts half as much as the two batches of 8 before it."""
    torch.manual_seed(0)
    model, loader = lesson.SimpleCNN().eval(), DataLoader(images, 8)

    def by_hand(model):
        batches = [(model(lesson.normalize(batch)), labels) for batch, labels in loader]
        logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
        return pytest.approx((F.cross_entropy(logits, labels).item(), accuracy), rel=1e-4)

    expected = by_hand(copy.deepcopy(model).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # no learning, so that the reference holds
    assert lesson.train_one_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, "cpu") == expected
    result = lesson.evaluate(model.train(), loader, "cpu")
    assert result == by_hand(model.eval())
    pixels = images.tensors[0]
    answers = model(lesson.normalize(pixels)).argmax(dim=1)
    answers[10:] += 1  # now half of the 20 answers are wrong
    assert lesson.evaluate(model, DataLoader(TensorDataset(pixels, answers), 8), "cpu")[1] == 50


# Pretraining


def test_pretraining_is_training_on_a_cosine_of_which_the_best_epoch_is_kept(lesson, tmp_path, monkeypatch):
    """Of two equal epochs it is the first."""
    accuracies, task = iter([30.0, 50.0, 50.0, 40.0]), random_task()
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, next(accuracies)))
    flags = ["--epochs", "4", "--batch-size", "24", "--lr", "0.03", "--seed", "3", "--device", "cpu"]
    args = lesson.parse_args([*flags, "--output-dir", str(tmp_path)])
    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    weights = lesson.train(args, task, task, list("abc"))
    torch.manual_seed(3)
    expected = lesson.SimpleCNN(3)
    train_by_hand(lesson, expected, task, 24, 0.03, SHARES["scratch"], epochs=4, seed=3, stop=2)
    assert_close(weights, expected)
    assert weights["conv1.weight"].is_contiguous(memory_format=torch.channels_last), "faster on CPUs"
    [events] = (tmp_path / "tensor_board" / lesson.LESSON / "pretraining").iterdir()
    curves = read_scalars(events)
    assert curves["Accuracy/val"] == [(1, 30), (2, 50), (3, 50), (4, 40)]
    assert curves["Seconds"] == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert curves["LearningRate"][2] == (3, pytest.approx(0.015))
    assert curves["Overfitting/accuracy_gap"][0][1] == pytest.approx(curves["Accuracy/train"][0][1] - 30)


def test_a_loss_that_is_not_finite_gets_one_sentence(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (math.nan, 10.0))
    with pytest.raises(SystemExit, match=r"^The loss is no longer a finite number\. Try a smaller"):
        run_lesson(lesson, tmp_path, "--subset", 100, "--labels", 4)


# The comparison


def test_labelled_images_are_drawn_by_seed_with_as_many_of_each_class(lesson):
    """A draw with more images holds all images of the smaller draw. Another seed draws others."""
    pool = TensorDataset(torch.arange(90), torch.arange(90) % 3)  # every image is its own number
    draws = {count: lesson.draw_labelled(pool, count, 42).tensors for count in [1, 10, 25]}
    for count, (images, labels) in draws.items():
        assert torch.equal(images % 3, labels) and len(images.unique()) == 3 * count
        assert labels.bincount().tolist() == [count] * 3
        assert torch.equal(lesson.draw_labelled(pool, count, 42).tensors[0], images)
    one, ten, more = (set(images.tolist()) for images, _ in draws.values())
    assert one < ten < more and ten != set(lesson.draw_labelled(pool, 10, 43).tensors[0].tolist())


def test_the_learning_rate_is_chosen_on_validation_images_only(lesson, monkeypatch, capsys):
    """Each variant has a choice of its own, by a further draw, seed 45. The test images would choose others."""
    pool, val_set, test_set = random_task(60), random_task(30), random_task(33)
    best, measured, rates = dict(zip(SHARES, [0.08, 0.005, 0.02, 0.08], strict=True)), [], [0.005, 0.02, 0.08]

    def fit(args, variant, pretrained, labelled, lr, seed):
        assert torch.equal(labelled.tensors[0], lesson.draw_labelled(pool, 2, seed).tensors[0])
        return (variant, lr, seed), "its preparation"

    def evaluate(model, loader, device, prepare):
        (variant, lr, seed), is_test = model, loader.dataset is test_set
        assert (is_test or loader.dataset is val_set) and prepare == "its preparation"
        measured.append((variant, lr, seed, is_test))
        return 0.0, seed + lr if is_test else 50.0 - abs(lr - best[variant])

    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(lesson, "LEARNING_RATES", rates)
    monkeypatch.setattr(lesson, "fit", fit)
    monkeypatch.setattr(lesson, "evaluate", evaluate)
    args = SimpleNamespace(seed=42, backbone="simplecnn", device="cpu")
    assert lesson.compare(args, None, pool, val_set, test_set, [2]) == {
        variant: {2: [42 + lr, 43 + lr, 44 + lr]} for variant, lr in best.items()
    }
    for variant, lr in best.items():
        expected = [(variant, rate, 45, False) for rate in rates]
        expected += [(variant, lr, seed, True) for seed in [42, 43, 44]]
        assert [row for row in measured if row[0] == variant] == expected
    line = "2 images per class | new_linear_layers | lr 0.02 | test acc 42.02, 43.02, 44.02 % | 1 s"
    assert capsys.readouterr().out.splitlines()[2].split() == line.split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of main() in which nothing is trained: what train() and compare() were given, and what it wrote."""
    lesson, run = load_lesson("10"), SimpleNamespace(folder=tmp_path_factory.mktemp("transfer"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson, "train", lambda args, *given: vars(run).update(old=given) or "weights")
        patch.setattr(lesson, "compare", lambda args, *given: vars(run).update(new=given) or RESULTS)
        patch.setattr(Figure, "savefig", lambda figure, path: vars(run).update(picture=(figure, path)))
        run.output = run_lesson(lesson, run.folder, "--subset", 150, "--labels", 8, 4, 4, 5000)
    run.lesson, run.artifacts = lesson, run.folder / "artifacts"
    yield run
    plt.close("all")


def test_old_and_new_classes_are_disjoint_halves_with_labels_from_0(run):
    """The old task has the digits 0 to 4 and the new one 5 to 9, of the training, validation and test images."""
    images, labels, names, _ = run.lesson.load_data("digits", run.folder, train=True)
    splits = [split.tensors for split in run.lesson.split_train_val(images, labels, 42, 150)]
    images, labels, *_ = run.lesson.load_data("digits", run.folder, train=False)
    splits.append((images[:150], labels[:150]))
    old_train, old_val, old_names = run.old
    weights, pool, new_val, new_test, counts = run.new
    parts = [(old_train, 0, 0), (old_val, 1, 0), (pool, 0, 5), (new_val, 1, 5), (new_test, 2, 5)]
    for dataset, split, first in parts:
        images, labels = splits[split]
        chosen = (labels >= first) & (labels < first + 5)
        assert torch.equal(dataset.tensors[0], images[chosen])
        assert torch.equal(dataset.tensors[1], labels[chosen] - first)
    assert old_names == names[:5] and weights == "weights"
    assert counts == [4, 8], "each number once, in order, and without 5,000"


def test_table_file_and_curves_have_the_accuracies_of_all_draws(run):
    """The deviation is that of a sample, divided by one less than the number of draws."""
    assert "\nPretraining on the old classes: 0, 1, 2, 3, 4\n" in run.output
    assert "\nTransfer to the new classes: 5, 6, 7, 8, 9\n" in run.output
    table = run.output[run.output.index("Test accuracy") :].splitlines()
    assert table[0] == "Test accuracy in percent, mean +- standard deviation of 3 draws"
    assert [line.split() for line in table[1:4]] == [
        ["images", "per", "class", "10", "50"],
        ["one", "60.0", "+-", "10.0", "80.0", "+-", "0.0"],
        ["other", "60.3", "+-", "10.1", "79.0", "+-", "1.0"],
    ]
    written = json.loads((run.artifacts / "transfer_learning.json").read_text(encoding="utf-8"))
    assert written == {v: {str(n): row for n, row in rows.items()} for v, rows in RESULTS.items()}
    for variant, means in {"one": [60, 80], "other": [60.3333, 79]}.items():
        [events] = (run.folder / "tensor_board" / run.lesson.LESSON / variant).iterdir()
        steps, values = zip(*read_scalars(events)["Transfer/accuracy"], strict=True)
        assert steps == (10, 50) and values == pytest.approx(means, abs=1e-4)


def test_the_picture_shows_what_the_table_has(run):
    figure, path = run.picture
    [ax] = figure.axes
    assert path == run.artifacts / "transfer_learning.png"
    assert ax.get_title() == f"simplecnn on {len(run.new[3])} test images of digits"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(RESULTS)
    for bars, rows in zip(ax.containers, RESULTS.values(), strict=True):
        line, _, [bar] = bars.lines
        for point, segment, (x, row) in zip(line.get_xydata(), bar.get_segments(), rows.items(), strict=True):
            mean, deviation = statistics.mean(row), statistics.stdev(row)
            assert point == pytest.approx([x, mean])
            assert segment.flatten() == pytest.approx([x, mean - deviation, x, mean + deviation])


@pytest.mark.parametrize("flags", [["--labels", 1, "--subset", 3], ["--labels", 30, 40]])
def test_too_few_images_per_class_get_one_sentence_before_any_training(lesson, tmp_path, flags):
    sentence = r"^A class has only \d+ images, fewer than --labels\. Use a larger --subset\.$"
    with pytest.raises(SystemExit, match=sentence):
        run_lesson(lesson, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--labels", 4, 0], ["--steps", 0], ["--backbone", "vgg"]])
def test_a_bad_flag_gets_one_sentence_and_status_2(lesson, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, *flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and flags[0] in last and not list(tmp_path.iterdir())


# ResNet-18


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """Random weights of ResNet-18 as a file in PyTorch's cache, where the lesson finds them as if downloaded."""
    torch.manual_seed(3)
    model, home = resnet18(), tmp_path_factory.mktemp("cache")
    path = home / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield SimpleNamespace(path=path, weights=model.state_dict())


@pytest.mark.parametrize("variant", ["scratch", "new_last_layer", "fine_tuned"])
def test_of_resnet_only_the_last_layer_is_new(lesson, resnet, monkeypatch, variant):
    """It has the new classes. The other layers are pretrained, and frozen or fine-tuned."""
    groups, frozen = [], []

    def train_one_epoch(model, loader, loss_fn, optimizer, device, prepare, layers):
        optimizer.step()  # without gradients, it changes nothing
        groups.extend((len(group["params"]), group["lr"]) for group in optimizer.param_groups)
        frozen.extend(layers)

    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    model, _ = lesson.fit(settings(steps=1, backbone="resnet18"), variant, None, random_task(6), 0.02, 42)
    expected = {"scratch": [(62, 0.02)], "fine_tuned": [(2, 0.02), (60, pytest.approx(0.002))]}
    assert groups == expected.get(variant, [(2, 0.02)])
    assert len(frozen) == (9 if variant == "new_last_layer" else 0) and model.fc.weight.shape == (3, 512)
    for name, weights in model.named_parameters():
        is_old = variant != "scratch" and layer_of(name) != "fc"
        assert weights.requires_grad == (not is_old or variant == "fine_tuned")
        if is_old or name.endswith("conv1.weight"):
            assert torch.equal(weights, resnet.weights[name]) == is_old, name


def test_resnet_gets_images_prepared_as_in_its_pretraining(lesson, resnet):
    """They have 224 x 224 pixels, with ImageNet's mean and deviation."""
    images = random_task(3).tensors[0]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = F.interpolate(images.float(), (256, 256), mode="bilinear", antialias=True)[..., 16:-16, 16:-16]
    for variant in lesson.VARIANTS["resnet18"]:
        _, prepare = lesson.make_model(settings(backbone="resnet18"), variant, None, 3)
        assert torch.allclose(prepare(images), (x.round() / 255 - mean) / std, atol=0.05)


def test_the_resnet_backbone_needs_no_pretraining(lesson, resnet, tmp_path, monkeypatch):
    """Its variants are compared on the same images, and the old classes are not used."""
    fits = []
    monkeypatch.setattr(lesson, "train", lambda *_: pytest.fail("nothing is pretrained here"))
    monkeypatch.setattr(lesson, "fit", lambda args, *rest: (fits.append(rest[0]), None))
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, 50.0))
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: Path(path).touch())
    output = run_lesson(lesson, tmp_path, "--backbone", "resnet18", "--labels", 4)
    assert list(dict.fromkeys(fits)) == ["scratch", "new_last_layer", "fine_tuned"]
    assert "retraining" not in output and re.search(r"^fine_tuned +50\.0 \+- 0\.0$", output, re.MULTILINE)
    plt.close("all")


def test_without_network_resnet_gets_one_sentence(lesson, tmp_path, monkeypatch):
    """It has status 1, names the address, and comes before minutes of training."""

    def refuse(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(lesson, "fit", lambda *_: pytest.fail("it must not train first"))
    with pytest.raises(SystemExit) as error:  # a sentence instead of a number means status 1
        run_lesson(lesson, tmp_path / "out", "--backbone", "resnet18", "--labels", 4)
    address, reason = ResNet18_Weights.DEFAULT.url, "<urlopen error Name or service not known>"
    assert error.value.code == f"Cannot download the weights of ResNet-18 from {address}: {reason}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["cut off", "empty", "a web page", "code"])
def test_damaged_weights_get_a_sentence_that_names_the_file(lesson, resnet, tmp_path, monkeypatch, content):
    """It says that the file has to be deleted, also if it holds pickled code, which is not run."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / resnet.path.name
    path.parent.mkdir(parents=True)
    torch.save({"conv1.weight": print}, path)
    bad = {"cut off": resnet.path.read_bytes()[:1_000_000], "empty": b"", "a web page": b"<html>"}
    path.write_bytes(bad.get(content, path.read_bytes()))
    with pytest.raises(SystemExit) as error:
        lesson.download_weights()
    assert error.value.code == f"{path} is damaged. Delete this file, and it will be downloaded again."
