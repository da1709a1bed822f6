"""Lesson 10: what a variant takes over and what it freezes, and on which images everything is chosen and measured."""

import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from common import load_lesson, read_scalars
from conftest import assert_same_state, run_lesson
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet18_Weights, resnet18

LAYERS = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc1", "fc2"}  # of SimpleCNN
NEW = {"scratch": LAYERS, "new_last_layer": {"fc2"}, "new_linear_layers": {"fc1", "fc2"}}
NEW["fine_tuned"] = {"fc1", "fc2"}
FROZEN = ["new_last_layer", "new_linear_layers"]
DRAWS = [42, 43, 44]  # their seeds; 45 is that of the draw by which the learning rate is chosen
RESULTS = {
    "one": {10: [50.0, 60.0, 70.0], 50: [80.0, 80.0, 80.0]},
    "other": {10: [51.0, 59.0, 71.0], 50: [78.0, 79.0, 80.0]},
}


@pytest.fixture
def lesson(lessons):
    return lessons["10"]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


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


def images_of(dataset):
    """Return the images of a data set as a list of bytes."""
    return [image.numpy().tobytes() for image in dataset.tensors[0]]


def copy_of(weights):
    return {name: tensor.clone() for name, tensor in weights.items()}


def layer_of(name):
    return name.split(".")[0]


# A run, of which everything is recorded


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits with 4 and with 8 images per class: what it wrote, and what its functions were given.

    run.fits has an entry for every training run of a variant, with the weights and learning rates of its layers.
    """
    lesson, folder = load_lesson("10"), tmp_path_factory.mktemp("transfer")
    run = SimpleNamespace(lesson=lesson, folder=folder, fits=[], sets=None, old=None, drawn=None)
    originals = {name: getattr(lesson, name) for name in "make_model train_one_epoch train compare".split()}
    fit, plot_accuracies = lesson.fit, lesson.plot_accuracies

    def record_model(*args, **named):
        model, prepare = originals["make_model"](*args, **named)
        run.fits[-1].begin = copy_of(model.state_dict())
        return model, prepare

    def record_epoch(model, loader, loss_fn, optimizer, *rest):
        if run.fits:  # not in pretraining
            pairs = [(id(p), group["lr"]) for group in optimizer.param_groups for p in group["params"]]
            assert len(dict(pairs)) == len(pairs), "no weight is in two groups"
            rates = dict(pairs)
            run.fits[-1].rates.append({name: rates.get(id(p)) for name, p in model.named_parameters()})
            run.fits[-1].steps += len(loader)
        return originals["train_one_epoch"](model, loader, loss_fn, optimizer, *rest)

    def record_fit(args, variant, pretrained, labelled, lr, seed):
        names = dict(variant=variant, labelled=labelled, lr=lr, seed=seed, count=len(labelled) // 5)
        run.fits.append(SimpleNamespace(**names, rates=[], steps=0))
        run.fits[-1].model, prepare = fit(args, variant, pretrained, labelled, lr, seed)
        return run.fits[-1].model, prepare

    def record_training(args, *sets):
        run.old = (*sets, copy_of(originals["train"](args, *sets)))
        return run.old[-1]

    def record_sets(args, pretrained, *sets):
        run.sets = sets
        return originals["compare"](args, pretrained, *sets)

    def record_figure(accuracies, title):
        run.drawn = (accuracies, title)
        return plot_accuracies(accuracies, title)

    with pytest.MonkeyPatch.context() as patch:
        spies = [record_model, record_epoch, record_fit, record_training, record_sets, record_figure]
        names = ["make_model", "train_one_epoch", "fit", "train", "compare", "plot_accuracies"]
        for name, spy in zip(names, spies, strict=True):
            patch.setattr(lesson, name, spy)
        patch.setattr(Figure, "savefig", lambda figure, path: Path(path).touch())
        flags = ["--subset", 150, "--labels", 8, 4, 4, 5000, "--epochs", 2, "--steps", 5]
        run.output = run_lesson(lesson, folder, *flags)
    run.draws = [fit for fit in run.fits if fit.seed in DRAWS]
    return run


def test_old_and_new_classes_are_disjoint_halves_with_labels_from_0(run):
    """The old task has the digits 0 to 4 and the new one 5 to 9, of the training, validation and test images."""
    images, labels, names, _ = run.lesson.load_data("digits", run.folder, train=True)
    splits = [split.tensors for split in run.lesson.split_train_val(images, labels, 42, 150)]
    images, labels, *_ = run.lesson.load_data("digits", run.folder, train=False)
    splits.append((images[:150], labels[:150]))
    old_train, old_val, old_names, _ = run.old
    pool, new_val, new_test, counts = run.sets
    parts = [(old_train, 0, 0), (old_val, 1, 0), (pool, 0, 5), (new_val, 1, 5), (new_test, 2, 5)]
    for dataset, split, first in parts:
        images, labels = splits[split]
        chosen = (labels >= first) & (labels < first + 5)
        assert torch.equal(dataset.tensors[0], images[chosen])
        assert torch.equal(dataset.tensors[1], labels[chosen] - first)
    assert old_names == names[:5] and counts == [4, 8], "each number once, in order, and without 5,000"


def test_labelled_images_are_drawn_by_seed_with_as_many_of_each_class(lesson):
    """A draw with more images holds all images of the smaller draw. Another seed draws others."""
    pool = random_task(90)
    labels = dict(zip(images_of(pool), pool.tensors[1].tolist(), strict=True))
    draws = {count: lesson.draw_labelled(pool, count, 42) for count in [1, 10, 25]}
    for count, draw in draws.items():
        images, again = images_of(draw), lesson.draw_labelled(pool, count, 42)
        assert [labels[image] for image in images] == draw.tensors[1].tolist()
        assert Counter(draw.tensors[1].tolist()) == dict.fromkeys(range(3), count)
        assert len(set(images)) == len(images) and images_of(again) == images
    assert set(images_of(draws[1])) < set(images_of(draws[10])) < set(images_of(draws[25]))
    assert set(images_of(lesson.draw_labelled(pool, 10, 43))) != set(images_of(draws[10]))


def test_all_variants_learn_from_the_same_images_of_a_draw(run):
    """There are three draws for the accuracies, and a further one by which the learning rate is chosen."""
    draws = {}
    for fit in run.fits:
        draws.setdefault((fit.count, fit.seed), {}).setdefault(fit.variant, []).append(fit)
    assert sorted(draws) == [(count, seed) for count in [4, 8] for seed in [*DRAWS, 45]]
    different = {tuple(images_of(fits["scratch"][0].labelled)) for fits in draws.values()}
    assert len(different) == 8
    for (count, seed), fits in draws.items():
        expected = images_of(run.lesson.draw_labelled(run.sets[0], count, seed))
        assert list(fits) == list(NEW)
        for variant in NEW:
            assert [images_of(fit.labelled) for fit in fits[variant]] == [expected] * len(fits[variant])
            rates = [fit.lr for fit in fits[variant]]
            assert len(rates) == 1 if seed in DRAWS else rates == run.lesson.LEARNING_RATES


def test_old_layers_begin_with_the_pretrained_weights_and_new_layers_do_not(run):
    """A model from scratch shares no weight with them. Weights that every new model has alike are left out."""
    pretrained = run.old[-1]
    for fit in run.fits:
        assert fit.begin["fc2.weight"].shape == (5, 256)
        for name, weights in fit.begin.items():
            if layer_of(name) not in NEW[fit.variant]:
                assert torch.equal(weights, pretrained[name]), (fit.variant, name)
            elif not (layer_of(name).startswith("bn") and name.endswith(("weight", "bias"))):
                assert not torch.equal(weights, pretrained[name]), (fit.variant, name)


def test_frozen_layers_stay_as_they_are_and_all_others_learn(run):
    """They are equal bit for bit after the training, also BatchNorm's running averages, and have no gradients."""
    for fit in run.fits:
        for name, weights in fit.model.named_parameters():
            assert (weights.grad is None) == (
                fit.variant in FROZEN and layer_of(name) not in NEW[fit.variant]
            )
        for name, weights in fit.model.state_dict().items():
            frozen = fit.variant in FROZEN and layer_of(name) not in NEW[fit.variant]
            assert torch.equal(weights, fit.begin[name]) == frozen, (fit.variant, name)


def test_old_layers_learn_with_a_tenth_of_the_learning_rate_and_all_on_a_cosine(run):
    """That is so in fine_tuned. In the other variants the old layers are frozen, and no optimizer has them."""
    for fit in run.fits:
        for epoch, rates in enumerate(fit.rates):
            lr = fit.lr * (1 + math.cos(math.pi * epoch / len(fit.rates))) / 2
            for name, rate in rates.items():
                is_new = layer_of(name) in NEW[fit.variant]
                expected = lr if is_new else lr / 10 if fit.variant == "fine_tuned" else None
                assert rate == (expected and pytest.approx(expected)), (fit.variant, name)


def test_reported_accuracies_are_those_of_the_draws_on_the_test_images(run):
    """They are computed again from the models. Output, table, JSON, picture and TensorBoard agree with them."""
    images, labels = run.sets[2].tensors
    accuracies = {variant: {4: [], 8: []} for variant in NEW}
    for fit in run.draws:
        with torch.no_grad():
            correct = fit.model.eval()(run.lesson.normalize(images)).argmax(dim=1) == labels
        accuracies[fit.variant][fit.count].append(100 * correct.double().mean().item())
    file = run.folder / "artifacts" / "transfer_learning.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert list(report) == list(NEW) and file.with_suffix(".png").exists()
    assert run.drawn == (
        {v: {int(n): row for n, row in rows.items()} for v, rows in report.items()},
        run.drawn[1],
    )
    assert run.drawn[1] == f"simplecnn on {len(labels)} test images of digits"
    lines = [line.split() for line in run.output.splitlines()]
    assert ["images", "per", "class", "4", "8"] in lines
    runs = run.folder / "tensor_board" / run.lesson.LESSON
    for variant, rows in accuracies.items():
        cells = []
        for count, row in rows.items():
            assert report[variant][str(count)] == pytest.approx(row, abs=1e-4)
            words = ", ".join(f"{accuracy:.2f}" for accuracy in row)
            line = rf"^ +{count} images per class \| {variant} +\| lr (\S+) \| test acc {words} % \|"
            [lr] = re.findall(line, run.output, flags=re.MULTILINE)
            used = {fit.lr for fit in run.draws if (fit.variant, fit.count) == (variant, count)}
            assert used == {float(lr)}
            cells += [f"{statistics.mean(row):.1f}", "+-", f"{statistics.stdev(row):.1f}"]
        assert [variant, *cells] in lines
        [events] = (runs / variant).iterdir()
        steps, values = zip(*read_scalars(events)["Transfer/accuracy"], strict=True)
        assert steps == (4, 8) and values == pytest.approx([statistics.mean(row) for row in rows.values()])
    [events] = (runs / "pretraining").iterdir()
    assert [step for step, _ in read_scalars(events)["Loss/val"]] == [1, 2]
    assert {path.name for path in runs.iterdir()} == {"pretraining", *NEW}


# One function after the other


@pytest.mark.parametrize("change", ["a prefix", "a shape", "a missing name"])
def test_weights_that_do_not_fit_stop_the_run(lesson, change):
    """Ignoring names, as strict=False does, would train on random weights instead."""
    weights = old_weights(lesson)
    if change == "a prefix":
        weights |= {"module.conv1.weight": weights.pop("conv1.weight")}
    elif change == "a shape":
        weights["conv2.weight"] = torch.zeros(64, 32, 5, 5)
    else:
        del weights["bn3.running_var"]
    with pytest.raises(RuntimeError, match="Unexpected key|size mismatch|Missing key"):
        lesson.make_model(settings(), "fine_tuned", weights, 3)


@pytest.mark.parametrize("variant", FROZEN)
def test_a_frozen_network_is_a_small_model_on_features_that_never_change(lesson, variant):
    """The features are computed once here, and the new layers are trained on them by formulas written out."""
    pretrained, task = old_weights(lesson), random_task()
    model, _ = lesson.fit(settings(steps=6), variant, pretrained, task, 0.02, seed=7)
    torch.manual_seed(7)
    fresh, _ = lesson.make_model(settings(), variant, pretrained, 3)
    x = lesson.normalize(task.tensors[0])
    fresh.eval()
    with torch.no_grad():
        for conv, bn in [(fresh.conv1, fresh.bn1), (fresh.conv2, fresh.bn2), (fresh.conv3, fresh.bn3)]:
            x = F.relu(bn(F.max_pool2d(conv(x), 2)))
        features = F.relu(fresh.fc1(x.flatten(1))) if variant == "new_last_layer" else x.flatten(1)
    head = fresh.fc2 if variant == "new_last_layer" else nn.Sequential(fresh.fc1, nn.ReLU(), fresh.fc2)
    weights = list(head.parameters())
    momenta = [torch.zeros_like(weight) for weight in weights]
    order = DataLoader(torch.arange(72), 32, shuffle=True, generator=torch.Generator().manual_seed(7))
    for lr in [0.02, 0.01]:  # a cosine over two epochs of three steps
        for batch in order:
            loss = F.cross_entropy(head(features[batch]), task.tensors[1][batch])
            for weight, momentum, gradient in zip(
                weights, momenta, torch.autograd.grad(loss, weights), strict=True
            ):
                weight.data -= lr * momentum.mul_(0.9).add_(gradient)
    for name, weights in model.state_dict().items():
        assert torch.allclose(weights, fresh.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize("images", [30, 250, 1250])
def test_every_number_of_labelled_images_gets_the_same_number_of_steps(lesson, monkeypatch, images):
    """It is that of --steps, rounded up to whole passes over the images."""
    passes = []

    def train_one_epoch(model, loader, loss_fn, optimizer, *_):
        optimizer.step()  # without gradients, it changes nothing
        passes.append(len(loader))

    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    lesson.fit(settings(steps=50), "scratch", None, random_task(images, 5), 0.02, 42)
    assert 50 <= sum(passes) < 50 + passes[0] and passes[0] == math.ceil(images / 32)


def test_the_learning_rate_is_chosen_on_validation_images_only(lesson, monkeypatch):
    """Each variant has a choice of its own, by a further draw. The test images would choose others."""
    pool, val_set, test_set = random_task(60), random_task(30), random_task(33)
    best = dict(zip(NEW, [0.08, 0.005, 0.02, 0.08], strict=True))
    trained, measured = [], []

    def fit(args, variant, pretrained, labelled, lr, seed):
        trained.append((variant, images_of(labelled), lr, seed))
        return trained[-1], "its preparation"

    def evaluate(model, loader, device, prepare):
        (variant, _, lr, seed), is_test = model, loader.dataset is test_set
        assert (is_test or loader.dataset is val_set) and prepare == "its preparation"
        measured.append((variant, lr, seed, is_test))
        return 0.0, seed + lr if is_test else 50.0 - abs(lr - best[variant])

    monkeypatch.setattr(lesson, "LEARNING_RATES", sorted(set(best.values())))
    monkeypatch.setattr(lesson, "fit", fit)
    monkeypatch.setattr(lesson, "evaluate", evaluate)
    args = SimpleNamespace(seed=42, backbone="simplecnn", device="cpu")
    accuracies = lesson.compare(args, None, pool, val_set, test_set, [2])
    assert accuracies == {variant: {2: [seed + lr for seed in DRAWS]} for variant, lr in best.items()}
    for variant, lr in best.items():
        tried = [(variant, rate, 45, False) for rate in lesson.LEARNING_RATES]
        assert [m for m in measured if m[0] == variant] == tried + [
            (variant, lr, seed, True) for seed in DRAWS
        ]
    assert all(images == images_of(lesson.draw_labelled(pool, 2, seed)) for _, images, _, seed in trained)


def test_pretraining_returns_the_weights_of_its_best_epoch(lesson, tmp_path, monkeypatch):
    """Of two equal epochs it is the first, and not the last of the run."""
    accuracies, seen = iter([30.0, 50.0, 50.0, 40.0]), []

    def evaluate(model, *_):
        seen.append(copy_of(model.state_dict()))
        return 1.0, next(accuracies)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    args = lesson.parse_args(["--epochs", "4", "--device", "cpu", "--output-dir", str(tmp_path)])
    assert_same_state(dict(lesson.train(args, random_task(), random_task(), list("abc"))), seen[1])
    assert not torch.equal(seen[1]["fc2.weight"], seen[2]["fc2.weight"])


def test_the_table_has_mean_and_standard_deviation_of_the_draws(lesson, capsys):
    """The deviation is that of a sample, divided by one less than the number of draws."""
    lesson.print_table(RESULTS)
    title, head, one, other = capsys.readouterr().out.splitlines()
    assert title == "Test accuracy in percent, mean +- standard deviation of 3 draws"
    assert head.split() == ["images", "per", "class", "10", "50"]
    assert one.split() == ["one", "60.0", "+-", "10.0", "80.0", "+-", "0.0"]
    assert other.split() == ["other", "60.3", "+-", "10.1", "79.0", "+-", "1.0"]


def test_the_picture_shows_what_the_table_has(lesson):
    """Every variant has a line with error bars, by the number of labelled images on a log axis."""
    [ax] = lesson.plot_accuracies(RESULTS, "some title").axes
    assert ax.get_title() == "some title" and ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10", "50"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(RESULTS)
    for bars, rows in zip(ax.containers, RESULTS.values(), strict=True):
        segments = bars.lines[2][0].get_segments()
        for point, segment, (x, row) in zip(bars.lines[0].get_xydata(), segments, rows.items(), strict=True):
            mean, deviation = statistics.mean(row), statistics.stdev(row)
            assert point == pytest.approx([x, mean])
            assert segment.flatten() == pytest.approx([x, mean - deviation, x, mean + deviation])


# ResNet-18


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """Random weights of ResNet-18 as a file in PyTorch's cache, where the lesson finds them as if downloaded."""
    torch.manual_seed(3)
    model, home = resnet18(), tmp_path_factory.mktemp("cache")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = home / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield SimpleNamespace(path=path, weights=model.state_dict())


@pytest.mark.parametrize("variant", ["scratch", "new_last_layer", "fine_tuned"])
def test_of_resnet_only_the_last_layer_is_new(lesson, resnet, monkeypatch, variant):
    """It has the new classes. Frozen means that all other layers stay as they are, also the running averages."""
    begin, rates, make_model, train_one_epoch = {}, [], lesson.make_model, lesson.train_one_epoch

    def record_model(*args, **named):
        model, prepare = make_model(*args, **named)
        begin.update(copy_of(model.state_dict()))
        return model, prepare

    def record_epoch(model, loader, loss_fn, optimizer, device, prepare, frozen):
        rates.extend((len(group["params"]), group["lr"]) for group in optimizer.param_groups)
        small = lambda images: prepare(images)[..., ::4, ::4]  # noqa: E731  a sixteenth of the time
        return train_one_epoch(model, loader, loss_fn, optimizer, device, small, frozen)

    monkeypatch.setattr(lesson, "make_model", record_model)
    monkeypatch.setattr(lesson, "train_one_epoch", record_epoch)
    args = settings(steps=1, backbone="resnet18")
    model, _ = lesson.fit(args, variant, None, random_task(6), 0.02, 42)
    assert begin["fc.weight"].shape == (3, 512) and begin.keys() == resnet.weights.keys()
    for name, weights in model.state_dict().items():
        is_old = variant != "scratch" and layer_of(name) != "fc"
        assert torch.equal(weights, begin[name]) == (is_old and variant == "new_last_layer"), name
        if is_old:
            assert torch.equal(begin[name], resnet.weights[name]), name
        elif name.endswith("conv1.weight"):
            assert not torch.equal(begin[name], resnet.weights[name]), name
    assert (
        rates
        == {
            "scratch": [(62, 0.02)],
            "new_last_layer": [(2, 0.02)],
            "fine_tuned": [(2, 0.02), (60, pytest.approx(0.002))],
        }[variant]
    )


def test_resnet_gets_images_prepared_as_in_its_pretraining(lesson, resnet):
    """They are sized and normalized by hand here: 224 x 224 pixels, with ImageNet's mean and deviation."""
    images = random_task(3).tensors[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = F.interpolate(images.float(), (256, 256), mode="bilinear", antialias=True)[..., 16:-16, 16:-16]
    expected = (x.round() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for variant in lesson.VARIANTS["resnet18"]:
        _, prepare = lesson.make_model(settings(backbone="resnet18"), variant, None, 3)
        assert torch.allclose(prepare(images), expected, atol=0.05)


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


class Bomb:
    """An object whose pickled form runs code when it is opened."""

    def __reduce__(self):
        return print, ("the pickle ran",)


@pytest.mark.parametrize("content", ["cut off", "empty", "a web page", "code"])
def test_damaged_weights_get_a_sentence_that_names_the_file(
    lesson, resnet, tmp_path, monkeypatch, capsys, content
):
    """It says that the file has to be deleted, also if it holds pickled code, which does not run."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / resnet.path.name
    path.parent.mkdir(parents=True)
    if content == "code":
        torch.save({"conv1.weight": Bomb()}, path)
    else:
        some = resnet.path.read_bytes()[:1_000_000]
        path.write_bytes({"cut off": some, "empty": b"", "a web page": b"<html>"}[content])
    with pytest.raises(SystemExit) as error:
        lesson.download_weights()
    assert error.value.code == f"{path} is damaged. Delete this file, and it will be downloaded again."
    assert "the pickle ran" not in capsys.readouterr().out


# The command line


@pytest.mark.parametrize("flags", [["--labels", 5000], ["--labels", 1, "--subset", 3], ["--labels", 30, 40]])
def test_too_few_images_per_class_get_one_sentence_before_any_training(lesson, tmp_path, flags):
    """Nothing is written."""
    with pytest.raises(
        SystemExit, match=r"^A class has only \d+ images, fewer than --labels\. Use a larger --subset\.$"
    ):
        run_lesson(lesson, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--labels", 4, 0], ["--labels", "x"], ["--steps", 0], ["--backbone", "vgg"], ["--lr", "inf"]]
)
def test_a_bad_flag_gets_one_sentence_and_status_2(lesson, tmp_path, capsys, flags):
    """The sentence names the flag. Nothing is written."""
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, *flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and last.count("error: ") == 1 and flags[0] in last
    assert not list(tmp_path.iterdir())
