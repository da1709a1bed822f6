"""Lesson 07: what is computed in 16 bits, what the scaler does, and whether the printed numbers are true."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import load_lesson, read_scalars
from conftest import draw_nothing, flatten, run_lesson, use_results
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NAMES = ["float32", "bfloat16", "float16"]


@pytest.fixture
def lesson(lessons):
    return lessons["07"]


def one_step(lesson, images, dtype, loss_fn, scale=65_536.0, lr=0.1):
    """Take one step on four images. Return the model, the difference that the step made, and the scaler."""
    torch.manual_seed(0)
    model = lesson.SimpleCNN()
    before, optimizer = flatten(model), torch.optim.SGD(model.parameters(), lr=lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    loader = DataLoader(TensorDataset(*images[:4]), 4)
    lesson.train_one_epoch(model, loader, loss_fn, optimizer, "cpu", dtype, scaler)
    return model, flatten(model) - before, scaler


# One step


@pytest.mark.filterwarnings("error")  # PyTorch would warn of autocast to float32
@pytest.mark.parametrize("name", NAMES)
def test_the_forward_pass_and_the_loss_are_autocast_but_not_the_backward_pass(
    lesson, images, name, monkeypatch
):
    """Validation too. Losses are float32 in every precision."""
    forward, backward, cross_entropy = [], [], F.cross_entropy

    def watch(logits, labels):
        loss = cross_entropy(logits, labels)
        forward.append((logits.dtype, loss.dtype, torch.is_autocast_enabled("cpu")))
        if loss.requires_grad:
            loss.register_hook(lambda _: backward.append(torch.is_autocast_enabled("cpu")))
        return loss

    monkeypatch.setattr(F, "cross_entropy", watch)
    dtype = lesson.PRECISIONS[name]
    model, *_ = one_step(lesson, images, dtype, watch)
    lesson.evaluate(model, DataLoader(TensorDataset(*images[:4]), 4), "cpu", dtype)
    assert forward == [(getattr(torch, name), torch.float32, name != "float32")] * 2 and backward == [False]


def test_a_step_with_an_infinite_gradient_is_skipped_and_halves_the_scale(lesson, images):
    """The weights stay as they were."""
    _, step, scaler = one_step(lesson, images, torch.float16, lambda *args: F.cross_entropy(*args) * 1e38)
    assert step.count_nonzero() == 0 and scaler.get_scale() == 32_768


def test_gradients_are_clipped_after_the_scale_is_undone(lesson, images, monkeypatch):
    """The step is as long as the clipped gradient, whatever the scale is."""
    monkeypatch.setattr(lesson, "MAX_NORM", 0.5)
    _, unscaled, _ = one_step(lesson, images, torch.float16, F.cross_entropy, scale=1.0, lr=1.0)
    _, scaled, _ = one_step(lesson, images, torch.float16, F.cross_entropy, scale=65_536.0, lr=1.0)
    assert unscaled.norm().item() == pytest.approx(0.5, rel=1e-3) == scaled.norm().item()
    assert torch.allclose(unscaled, scaled, atol=2e-3)


def test_the_precision_is_the_only_difference_between_the_variants(lesson, images, tmp_path):
    """They start from the same weights and see the same batches."""
    args = lesson.parse_args(["--device", "cpu", "--batch-size", "4", "--output-dir", str(tmp_path)])
    args.epochs, variants = 1, []
    for name in NAMES:
        torch.seed()  # whatever was drawn before
        variants.append(lesson.make_variant(args, name, images, list("0123456789")))
        variants[-1].writer.close()
    orders = [[labels.tolist() for _, labels in variant.train_loader] for variant in variants]
    assert orders[0] == orders[1] == orders[2] and sum(orders[0], []) != images.tensors[1].tolist()
    weights = [flatten(variant.model) for variant in variants]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert [variant.dtype for variant in variants] == [getattr(torch, name) for name in NAMES]


# A run

# Seconds that the training and the validation of both epochs take, by the clock of the run below
TRAIN = {"float32": [1 / 32, 1 / 64], "bfloat16": [1 / 64, 1 / 32], "float16": [1 / 16, 1 / 16]}
VAL = {"float32": [1 / 16, 1 / 16], "bfloat16": [1 / 8, 1 / 64], "float16": [1 / 64, 1 / 64]}


def note_calls(function, calls):
    """Return the function with a list of its calls, as (arguments, result)."""
    return lambda *args: calls.append((args, function(*args))) or calls[-1][1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs of all three precisions by a clock of our own. The output, and what the lesson's functions had."""
    lesson, folder, calls = load_lesson("07"), tmp_path_factory.mktemp("run"), {}
    seconds = [phase[name][epoch] for epoch in [0, 1] for name in NAMES for phase in [TRAIN, VAL]]
    clock = iter([reading for end in seconds for reading in [0.0, end]])  # each duration is measured from 0
    (folder / "artifacts").mkdir()  # of an earlier run
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch, [lesson])
        patch.setattr(lesson, "MAX_NORM", 0.5)  # less than most norms, so that clipping matters
        patch.setattr(lesson, "time", SimpleNamespace(perf_counter=clock.__next__, strftime=time.strftime))
        for name in ["train", "train_one_epoch", "evaluate", "print_rounding"]:
            patch.setattr(lesson, name, note_calls(getattr(lesson, name), calls.setdefault(name, [])))
        flags = ["--subset", 40, "--batch-size", 16, "--epochs", 2, "--precisions", *NAMES]
        output = run_lesson(lesson, folder, *flags)
    [(_, (models, histories))] = calls["train"]
    return SimpleNamespace(
        lesson=lesson, folder=folder, output=output, calls=calls, models=models, histories=histories
    )


def test_the_precisions_train_in_turn_epoch_by_epoch(run):
    """Each trains and evaluates in its own format, and the printed lines name it."""
    lines = re.findall(r"^(\w+) +Epoch +(\d)/2 \|", run.output, flags=re.MULTILINE)
    assert lines == [(name, epoch) for epoch in "12" for name in NAMES]
    for function in ["train_one_epoch", "evaluate"]:
        dtypes = [arg for args, _ in run.calls[function] for arg in args if isinstance(arg, torch.dtype)]
        assert dtypes == [getattr(torch, name) for name in NAMES * 2]


def test_weights_and_momentum_stay_float32(run):
    """Only what is computed from them is in 16 bits. On the CPU, weights are stored as channels_last."""
    for model, (args, _) in zip(run.models.values(), run.calls["train_one_epoch"][3:], strict=True):
        momenta = [state["momentum_buffer"] for state in args[3].state.values()]
        assert len(momenta) == len(list(model.parameters()))
        assert {tensor.dtype for tensor in [*model.parameters(), *momenta]} == {torch.float32}
        assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_float32_is_plain_training(run):
    """SGD with momentum, gradient clipping and a cosine schedule. Losses and accuracies are those of all images."""
    lesson = run.lesson
    images, labels, *_ = lesson.load_data("digits", run.folder, train=True)
    train_set, val_set = lesson.split_train_val(images, labels, 42, 40)
    torch.manual_seed(42)
    model = lesson.SimpleCNN().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    loader = DataLoader(train_set, 16, shuffle=True, generator=torch.Generator().manual_seed(42))
    for lr, row in zip([0.05, 0.025], run.histories["float32"], strict=True):
        optimizer.param_groups[0]["lr"] = lr
        model.train()
        answers = []
        for images, labels in loader:
            logits = model(lesson.normalize(images))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            answers.append((logits.detach(), labels))
        val_answers = (model.eval()(lesson.normalize(val_set.tensors[0])).detach(), val_set.tensors[1])
        train_answers = map(torch.cat, zip(*answers, strict=True))
        for part, (logits, labels) in [("train", train_answers), ("val", val_answers)]:
            accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
            assert row[f"Loss/{part}"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
            assert row[f"Accuracy/{part}"] == pytest.approx(accuracy)
    assert torch.allclose(flatten(run.models["float32"]), flatten(model), atol=1e-4)


def test_only_float16_has_a_scale_which_lasts_for_the_whole_run(run):
    """Its scaler has counted the six steps of both epochs, on which the growth of the scale depends."""
    scaler = run.calls["train_one_epoch"][-1][0][-1]
    assert scaler.state_dict()["scale"] == 65_536 and scaler.state_dict()["_growth_tracker"] == 6
    scales = {name: [row["LossScale"] for row in history] for name, history in run.histories.items()}
    assert scales == {"float32": [1, 1], "bfloat16": [1, 1], "float16": [65_536, 65_536]}


def test_tensorboard_has_the_history_of_every_precision(run):
    """With speeds that are images by seconds. Memory is measured on CUDA only."""
    for name, history in run.histories.items():
        [folder] = (run.folder / "tensor_board" / "07_mixed_precision" / name).iterdir()
        curves = read_scalars(folder)
        assert curves.keys() == history[0].keys() and "PeakMemoryMB" not in curves
        for key, points in curves.items():
            values = [row[key] for row in history]
            assert points == [(i, pytest.approx(value, rel=1e-5)) for i, value in enumerate(values, start=1)]
        for i, row in enumerate(history):
            assert row["Seconds"] == TRAIN[name][i] and row["LearningRate"] == [0.05, 0.025][i]
            assert row["ImagesPerSecond/train"] == 40 / TRAIN[name][i]
            assert row["ImagesPerSecond/val"] == 40 / VAL[name][i]
            assert row["Overfitting/accuracy_gap"] == row["Accuracy/train"] - row["Accuracy/val"]


def test_printed_speeds_are_medians_and_ratios_those_of_the_same_epoch(run):
    """More than 1 is faster than the first precision."""
    lines = """
  train float32      1,920 images/s, 1.00 (1.00 to 1.00) times float32
  train bfloat16     1,920 images/s, 1.25 (0.50 to 2.00) times float32
  train float16        640 images/s, 0.38 (0.25 to 0.50) times float32
  val   float32        640 images/s, 1.00 (1.00 to 1.00) times float32
  val   bfloat16     1,440 images/s, 2.25 (0.50 to 4.00) times float32
  val   float16      2,560 images/s, 4.00 (4.00 to 4.00) times float32
Rounding in one step on 16 images with learning rate 0.05:
"""
    assert lines in run.output


def test_the_output_begins_with_the_processor_and_ends_with_the_ranking(run):
    assert run.output.splitlines()[1] == run.lesson.describe_processor("cpu")
    assert "\nBest validation accuracy on 40 images of digits:\n" in run.output


def test_the_rounding_is_that_of_the_first_precision_on_the_first_batch(run, lesson, capsys):
    """The lines are those of the trained float32 model, with the learning rate of the command line."""
    images, labels, *_ = lesson.load_data("digits", run.folder, train=True)
    train_set, _ = lesson.split_train_val(images, labels, 42, 40)
    lesson.print_rounding(run.models["float32"], *train_set[:16], "cpu", 0.05)
    assert capsys.readouterr().out in run.output
    [((model, *_), _)] = run.calls["print_rounding"]
    assert model is run.models["float32"]


def test_the_printed_shares_of_rounding_are_counted_right(lesson, images, capsys):
    """Gradients that are 0 in float32 do not count, nor do those that the training has left."""
    torch.manual_seed(1)
    model = lesson.SimpleCNN().train()
    model.fc2.weight.data *= 60  # predictions as confident as those of a trained network
    model.fc2.bias.data[9] = -1e30  # a class of probability 0
    model.fc1.bias.data[:128] = -1e30  # units that are inactive for every image
    images, labels = images.tensors[0], torch.arange(20) % 9
    logits = model(lesson.normalize(images))
    of_logits, *of_weights = torch.autograd.grad(
        F.cross_entropy(logits, labels), [logits, *model.parameters()]
    )
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)  # as the last step of the training leaves some
    lesson.print_rounding(model.eval(), images, labels, "cpu", 0.002)
    printed = re.findall(r"^ +([\d.]+) % of the (.+)$", capsys.readouterr().out, flags=re.MULTILINE)

    of_logits = of_logits[of_logits != 0]
    lost = [of_logits.half(), (of_logits * 65_536).half(), of_logits.bfloat16()]
    updates = 0.002 * torch.cat([gradient.flatten() for gradient in of_weights])
    weights, updates = flatten(model)[updates != 0], updates[updates != 0]
    lost += [(weights - updates) - weights, (weights.bfloat16() - updates.bfloat16()) - weights.bfloat16()]
    shares = [100 * (values == 0).float().mean().item() for values in lost]
    assert len(of_logits) == 20 * 9 and len(updates) < 0.6 * len(flatten(model)), "the zeros are left out"
    assert shares[0] > 5 and shares[4] > 5 + shares[3], "there is something to count"
    assert [float(share) for share, _ in printed] == pytest.approx(shares, abs=0.1)
    assert [words for _, words in printed] == [
        "gradients of the logits are 0 in float16",
        "gradients of the logits are 0 in float16, multiplied by 65,536",
        "gradients of the logits are 0 in bfloat16",
        "weights would not change if they were float32",
        "weights would not change if they were bfloat16",
    ]


# Before and after


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"cpu_name": "X", "avx512_bf16": True, "amx_bf16": True}, "X | instructions for bfloat16: True"),
        ({"cpu_name": "M2", "bf16": True}, "M2 | instructions for bfloat16: True"),
        ({"avx2": True, "bf16": False}, "CPU | instructions for bfloat16: False"),
    ],
)
def test_the_processor_is_described(lesson, monkeypatch, found, words):
    """PyTorch 2.10 cannot tell what it has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert lesson.describe_processor("cpu") == words
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert lesson.describe_processor("cpu") == "Instructions for bfloat16: unknown"


def test_float16_is_trained_on_cuda_or_if_it_is_asked_for(lesson, monkeypatch):
    """A precision that is named twice is trained once."""
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # as if there were two GPUs
    assert lesson.parse_args(["--device", "cpu"]).precisions == NAMES[:2]
    assert lesson.parse_args(["--device", "cuda:1"]).precisions == NAMES
    asked = ["--device", "cpu", "--precisions", "float16", "float32", "float16"]
    assert lesson.parse_args(asked).precisions == ["float16", "float32"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_three_precisions_and_reports_its_memory(finished):
    output = finished("07", "cuda").output
    assert output.count("MB besides the weights") == 3 and "| instructions for bfloat16: " in output


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("losses", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_loss_that_is_not_finite_ends_the_lesson(lesson, tmp_path, monkeypatch, losses):
    use_results(monkeypatch, lesson, [(losses[0], 50.0)], [(losses[1], 50.0)])
    with pytest.raises(SystemExit, match=r"^The loss is no longer a finite number\. .* \(--lr\)\.$"):
        run_lesson(lesson, tmp_path, "--subset", 32)


def test_the_picture_shows_accuracy_and_speed_of_every_precision(lesson):
    """Speeds begin at 0, so that heights compare."""
    histories = {
        "float32": [{"Accuracy/val": 40.0, "ImagesPerSecond/train": 900.0}] * 2,
        "bfloat16": [{"Accuracy/val": 41.0, "ImagesPerSecond/train": 60.0}] * 2,
    }
    left, right = lesson.plot_precisions(histories, "digits").axes
    for ax, expected in [(left, {"float32": 40, "bfloat16": 41}), (right, {"float32": 900, "bfloat16": 60})]:
        drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
        assert drawn == {name: ([1, 2], [value] * 2) for name, value in expected.items()}
    assert (left.get_ylabel(), right.get_ylabel()) == ("validation accuracy (%)", "images per second")
    assert left.get_title() == "SimpleCNN on digits" and right.get_ylim()[0] == 0
