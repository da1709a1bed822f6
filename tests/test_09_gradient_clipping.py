"""Lesson 09: what is clipped, when, and whether what it prints is what happened."""

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import load_lesson, read_scalars
from conftest import assert_same_state, draw_nothing, flatten, load_quick_lesson, run_lesson
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

REMEDIES = ["none", "norm 50 %", "norm 90 %", "value 50 %", "value 90 %", "lr / 4"]
FLAGS = ["--subset", 24, "--batch-size", 8, "--epochs", 2, "--quantiles", 50, 90]  # three batches per epoch


@pytest.fixture
def lesson(lessons):
    return lessons["09"]


# One step


@pytest.mark.parametrize(
    ("clipping", "limit", "expected"),
    [
        ("norm", 6.5, [1.5, -2.0, 6.0]),  # half as long, in the same direction
        ("norm", 20.0, [3.0, -4.0, 12.0]),  # short enough
        ("value", 3.5, [3.0, -3.5, 3.5]),  # each number by itself
        ("none", 0.1, [3.0, -4.0, 12.0]),
    ],
)
def test_gradients_are_clipped_as_worked_out_by_hand(lesson, clipping, limit, expected):
    """What is returned are the norm and, here of three, the first absolute value, as before clipping."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])
    norm, values = lesson.clip_gradients(parameters, clipping, limit)
    assert norm.item() == pytest.approx(13.0) and values.tolist() == [3.0]
    clipped = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert clipped.tolist() == pytest.approx(expected)


def train(lesson, clipping, limit, images=16, factor=1.0, lr=0.1):
    """Train a network without BatchNorm for an epoch, in batches of 4. Return what every step did."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    loader = DataLoader(TensorDataset(pixels, torch.arange(images) % 10), 4)
    torch.manual_seed(0)
    model = lesson.SimpleCNN(batch_norm=False)
    inputs, weights = [], []
    model.register_forward_pre_hook(
        lambda _, x: weights.append(flatten(model)) or inputs.append(x[0].clone())
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss, accuracy, norms, values = lesson.train_one_epoch(
        model, loader, nn.CrossEntropyLoss(), optimizer, "cpu", factor, clipping, limit
    )
    return SimpleNamespace(
        model=model, loader=loader, inputs=inputs, loss=loss, accuracy=accuracy, norms=norms, values=values,
        moves=torch.stack([*weights[1:], flatten(model)]) - torch.stack(weights),
    )  # fmt: skip


def test_every_step_is_as_long_as_the_clipped_gradient(lesson):
    """So clipping stands between backward() and step(), and what is measured are the gradients before it."""
    free, by_norm, by_value = (train(lesson, *how) for how in [("none", 0), ("norm", 0.5), ("value", 0.01)])
    assert free.moves.norm(dim=1).tolist() == pytest.approx((0.1 * free.norms).tolist(), rel=1e-3)
    torch.testing.assert_close(free.moves[:, ::100].abs(), 0.1 * free.values, rtol=1e-3, atol=1e-6)
    assert by_norm.norms.min() > 0.5 and by_value.values.amax(dim=1).min() > 0.01
    assert by_norm.moves.norm(dim=1).tolist() == pytest.approx([0.05] * 4, rel=1e-3)
    assert by_value.moves.abs().amax(dim=1).tolist() == pytest.approx([0.001] * 4, rel=1e-3)


def test_metrics_are_those_of_all_images_and_norms_those_of_the_batches(lesson):
    """Without learning, so that the same network gives them again. The last batch is smaller."""
    run = train(lesson, "none", 0, images=10, lr=0.0)
    pixels, labels = run.loader.dataset.tensors
    logits = run.model(lesson.normalize(pixels))
    assert run.loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert run.accuracy == pytest.approx(100 * (logits.argmax(dim=1) == labels).double().mean().item())
    for (batch, labels), norm in zip(run.loader, run.norms, strict=True):
        loss = F.cross_entropy(run.model(lesson.normalize(batch)), labels)
        gradients = torch.autograd.grad(loss, list(run.model.parameters()))
        assert norm.item() == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-4)


def test_only_the_first_image_of_every_20th_batch_is_faulty(lesson):
    """All others are as they were, and so are the images themselves."""
    run = train(lesson, "norm", 1.0, images=4 * 24, factor=255.0, lr=1e-4)
    for number, (inputs, (images, _)) in enumerate(zip(run.inputs, run.loader, strict=True), start=1):
        expected = lesson.normalize(images)
        if number in [3, 23]:
            expected[0] *= 255
        assert torch.equal(inputs, expected), number
    assert run.norms[[2, 22]].min() > 5 * run.norms[:2].max()


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three of the dangers: the output, and for every danger and remedy its two epochs and its curves."""
    lesson, folder, epochs = load_quick_lesson("09"), tmp_path_factory.mktemp("run"), []
    train_one_epoch = lesson.train_one_epoch

    def watch(model, loader, loss_fn, optimizer, device, factor, clipping, limit):
        epoch = SimpleNamespace(model=model, factor=factor, clipping=clipping, limit=limit, labels=[])
        epoch.weights, [epoch.group] = flatten(model), [dict(group) for group in optimizer.param_groups]
        epochs.append(epoch)

        def watch_loss(logits, labels):
            epoch.labels.append(labels.tolist())
            return loss_fn(logits, labels)

        result = train_one_epoch(model, loader, watch_loss, optimizer, device, factor, clipping, limit)
        epoch.norms, epoch.values, epoch.train_mode = result[2], result[3], model.training
        return result

    (folder / "artifacts").mkdir()  # of an earlier run
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch, [lesson])
        patch.setattr(lesson, "train_one_epoch", watch)
        output = run_lesson(lesson, folder, *FLAGS)
    runs, pairs = {}, zip(epochs[::2], epochs[1::2], strict=True)
    for line, pair in zip(re.findall(r"^.* \| val acc .*$", output, flags=re.MULTILINE), pairs, strict=True):
        danger, remedy, *words = [part.strip() for part in line.split(" | ")]
        name = re.sub(r"\W+", "_", f"{danger} {remedy}").strip("_")
        [curves] = map(read_scalars, (folder / "tensor_board" / lesson.LESSON / name).iterdir())
        norms = torch.cat([epoch.norms for epoch in pair])
        runs[danger, remedy] = SimpleNamespace(epochs=pair, curves=curves, words=words, norms=norms)
    return SimpleNamespace(lesson=lesson, folder=folder, output=output, runs=runs)


def test_every_danger_meets_every_remedy(run):
    """All of them have both epochs, also where the loss is nan, with the settings that the names promise."""
    assert set(run.runs) == set(itertools.product(run.lesson.DANGERS, REMEDIES))
    for (danger, remedy), this in run.runs.items():
        lr = 0.05 * (6 if "lr x 6" in danger else 1) / (4 if remedy == "lr / 4" else 1)
        for epoch in this.epochs:
            assert (epoch.group["lr"], epoch.group["momentum"]) == (pytest.approx(lr), 0.9), (danger, remedy)
            assert epoch.clipping == (remedy.split()[0] if remedy.endswith("%") else "none"), "not for lr / 4"
            assert str(epoch.factor) == ("nan" if "nan" in danger else "1.0") and epoch.train_mode


def test_the_dangers_are_what_their_names_say():
    """As (BatchNorm, multiple of the learning rate, factor of the faulty images)."""
    for name, (batch_norm, lr, factor) in load_lesson("09").DANGERS.items():
        assert batch_norm == name.startswith("BatchNorm")
        assert lr == (int(name.split("lr x ")[1]) if "lr x" in name else 1)
        assert str(factor) == ("nan" if "nan" in name else "255.0" if "255" in name else "1.0")


def test_the_limits_are_quantiles_of_the_clean_run(run):
    """Of the norms of the steps, and of a sample of the absolute values other than 0. They are printed."""
    clean = run.runs["none", "none"]
    values = torch.cat([epoch.values for epoch in clean.epochs])
    assert "\nGradients of the 6 steps when nothing is wrong:\n" in run.output
    assert values.shape == (6, -(-len(clean.epochs[0].weights) // 100))
    for kind, numbers in [("norm", clean.norms), ("value", values[values > 0])]:
        for quantile in [50, 90]:
            limit = numbers.double().quantile(quantile / 100).item()
            assert f"  {quantile} % of the {kind}s are at most {limit:.3g}\n" in run.output
            for danger in run.lesson.DANGERS:
                for epoch in run.runs[danger, f"{kind} {quantile} %"].epochs:
                    assert epoch.limit == pytest.approx(limit, rel=1e-5)


def test_all_runs_start_from_the_same_weights_and_see_the_same_batches(run):
    """With and without BatchNorm, which the dangers that do not name it do without."""
    orders = [[epoch.labels for epoch in this.epochs] for this in run.runs.values()]
    assert all(order == orders[0] for order in orders) and orders[0][0] != orders[0][1]
    first = {}
    for (danger, _), this in run.runs.items():
        model, has_batch_norm = this.epochs[0].model, danger.startswith("BatchNorm")
        assert torch.equal(this.epochs[0].weights, first.setdefault(has_batch_norm, this.epochs[0].weights))
        for conv, norm in [(model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.bn3)]:
            assert isinstance(norm, nn.BatchNorm2d) == (conv.bias is None) == has_batch_norm
        assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last), "faster on CPUs"


def test_the_network_with_batchnorm_is_that_of_the_other_lessons(lessons, images):
    """Weights and predictions are equal bit for bit, with the same seed."""
    networks = []
    for number in ["01", "09"]:
        torch.manual_seed(42)
        model = lessons[number].SimpleCNN()
        networks.append([model(lessons[number].normalize(images.tensors[0])), dict(model.state_dict())])
    assert_same_state(*networks)


def test_tensorboard_has_the_norm_before_clipping_of_every_step(run):
    """And the other curves per epoch."""
    for this in run.runs.values():
        curves = dict(this.curves)
        steps, norms = zip(*curves.pop("GradientNorm"), strict=True)
        assert steps == (1, 2, 3, 4, 5, 6)
        assert norms == pytest.approx(this.norms.tolist(), rel=1e-6, nan_ok=True)
        assert all([step for step, _ in points] == [1, 2] for points in curves.values())
        values = {name: [value for _, value in points] for name, points in curves.items()}
        assert values["LearningRate"] == pytest.approx([epoch.group["lr"] for epoch in this.epochs])
        assert 0 <= min(values["Seconds"]) <= max(values["Seconds"]) < 1000
        differences = [a - b for a, b in zip(values["Accuracy/train"], values["Accuracy/val"], strict=True)]
        assert values["Overfitting/accuracy_gap"] == pytest.approx(differences, abs=1e-4)
        assert len(values) == 7


def test_the_lines_and_the_table_say_what_happened(run):
    """The accuracy after the last epoch, and the largest norm. Norms that are not finite are counted apart."""
    table = run.output[run.output.index("Validation accuracy in percent") :].splitlines()
    assert re.split(r"  +", table[1].strip()) == REMEDIES
    rows = {line[2:19].strip(): line[19:].split() for line in table[2:5]}
    assert list(rows) == list(run.lesson.DANGERS)
    for (danger, remedy), this in run.runs.items():
        accuracy = f"{this.curves['Accuracy/val'][-1][1]:.2f}"
        assert rows[danger][REMEDIES.index(remedy)] == accuracy
        finite = this.norms[this.norms.isfinite()]
        lost = f", {6 - len(finite)} of 6 not finite" if len(finite) < 6 else ""
        assert this.words == [f"val acc {accuracy:>5} %", f"norms up to {finite.max():.3g}{lost}"]
        assert danger != "images of nan" or len(finite) == 2, "whatever the remedy is"


@pytest.mark.usefixtures("no_pictures")
def test_a_run_without_any_finite_norm_says_so(lesson, tmp_path, monkeypatch):
    """Infinite ones are no more finite than nan. None of the runs stops."""
    monkeypatch.setattr(lesson, "clip_gradients", lambda *_: (torch.tensor(math.inf), torch.ones(1)))
    monkeypatch.setattr(lesson, "DANGERS", {"none": (False, 1, 1.0)})
    output = run_lesson(lesson, tmp_path, *FLAGS)
    assert output.count("| no finite norm, 6 of 6 not finite\n") == 6


def test_the_picture_shows_norms_without_clipping_and_all_accuracies():
    """The norms are curves on a logarithmic axis, and the accuracies are cells with their numbers."""
    lesson = load_lesson("09")
    dangers, remedies = list(lesson.DANGERS), ["none", "norm 50 %", "lr / 4"]
    accuracies = {(d, r): 10.0 * i + j for i, d in enumerate(dangers) for j, r in enumerate(remedies)}
    norms = {danger: torch.tensor([i + 1.0, 2.0]) for i, danger in enumerate(dangers)}
    left, right = lesson.plot_results(accuracies, norms, remedies, "digits").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert drawn == {danger: [[1, i + 1], [2, 2]] for i, danger in enumerate(dangers)}
    assert left.get_yscale() == "log" and "digits" in right.get_title()
    assert right.images[0].get_array().tolist() == [[10.0 * i + j for j in range(3)] for i in range(6)]
    cells = {text.get_position(): text.get_text() for text in right.texts}
    assert cells == {(x, y): f"{10 * y + x:.1f}" for y in range(6) for x in range(3)}
    assert [label.get_text() for label in right.get_yticklabels()] == dangers
    assert [label.get_text() for label in right.get_xticklabels()] == remedies


# What is refused


def test_an_epoch_of_two_batches_is_refused(lesson, tmp_path, monkeypatch):
    """Its third batch would be the faulty one. One image more is enough."""
    monkeypatch.setattr(lesson, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit, match=r"^An epoch needs three batches, .* a smaller --batch-size\.$"):
        run_lesson(lesson, tmp_path, "--subset", 32, "--batch-size", 16)
    assert not list(tmp_path.iterdir())
    with pytest.raises(pytest.fail.Exception, match="it trains"):
        run_lesson(lesson, tmp_path, "--subset", 33, "--batch-size", 16)


@pytest.mark.parametrize("quantiles", [["101"], ["50", "-1"]])
def test_a_quantile_that_makes_no_sense_is_refused(lesson, capsys, quantiles):
    """One sentence and status 2."""
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(["--quantiles", *quantiles])
    assert error.value.code == 2 and "--quantiles must be" in capsys.readouterr().err
