"""Lesson 07: what is computed in how many bits, what a scaler does, and whether the printed figures are true."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import CPU, assert_same_state, folder_of, load, run_lesson
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

TINY = ["--subset", "32", "--batch-size", "16"]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def lesson(lessons):
    return lessons["07"]


def batches(count=2, size=4):
    """Random images in batches of that size."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count * size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count * size) % 10), size)


def one_epoch(lesson, dtype, scaler=None, prepare=None, loader=None, lr=0.1):
    """Train a SimpleCNN of seed 0 for an epoch. Returns it, with what the scaler is at the end."""
    torch.manual_seed(0)
    model = lesson.SimpleCNN()
    if prepare:
        prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    result = lesson.train_one_epoch(
        model, loader or batches(), nn.CrossEntropyLoss(), optimizer, CPU, 1, dtype, scaler
    )
    return SimpleNamespace(model=model, scaler=scaler, result=result)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_layers_compute_in_16_bits_and_all_else_in_32(lesson, name, monkeypatch):
    """autocast ends before backward(); weights, gradients and losses stay float32, in evaluation too."""
    seen = {"layers": set(), "losses": set(), "backward": set(), "gradients": set()}
    cross_entropy = nn.functional.cross_entropy

    def watch_loss(logits, labels, *args, **options):
        loss = cross_entropy(logits, labels, *args, **options)
        seen["losses"].add(loss.dtype)
        if loss.requires_grad:
            loss.register_hook(lambda _: seen["backward"].add(torch.is_autocast_enabled("cpu")))
        return loss

    def watch_layers(model):
        for layer in [model.conv1, model.conv3, model.fc1, model.fc2]:
            layer.register_forward_hook(lambda _, inputs, output: seen["layers"].add(output.dtype))
        model.fc2.weight.register_hook(lambda gradient: seen["gradients"].add(gradient.dtype))

    monkeypatch.setattr(nn.functional, "cross_entropy", watch_loss)
    dtype = lesson.PRECISIONS[name]
    model = one_epoch(lesson, dtype, prepare=watch_layers).model
    expected = {
        "layers": {dtype},
        "losses": {torch.float32},
        "backward": {False},
        "gradients": {torch.float32},
    }
    assert seen == expected
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for found in seen.values():
        found.clear()
    loss, _ = lesson.evaluate(model, batches(), CPU, dtype)
    assert seen["layers"] == {dtype} and seen["losses"] == {torch.float32} and math.isfinite(loss)


def test_the_formats_are_as_the_comments_say(lesson):
    """Range and digits; and PRECISIONS names what it holds."""
    assert {name: str(dtype) for name, dtype in lesson.PRECISIONS.items()} == {
        name: f"torch.{name}" for name in ["float32", "bfloat16", "float16"]
    }
    bits = {name: round(-math.log2(torch.finfo(dtype).eps)) for name, dtype in lesson.PRECISIONS.items()}
    assert bits == {"float32": 23, "bfloat16": 7, "float16": 10}
    assert torch.finfo(torch.float16).max == 65_504
    assert torch.tensor(6e-8).half() > 0 and torch.tensor(2e-8).half() == 0
    assert torch.finfo(torch.bfloat16).max > 3e38 and torch.finfo(torch.float32).max > 3e38


def test_an_infinite_gradient_moves_nothing_and_halves_the_scale(lesson):
    """The first batch's gradients are infinite: the weights after the epoch are those of the second batch alone."""
    calls = []

    def spoil(model):
        model.fc2.weight.register_hook(lambda g: calls.append(1) or (g * math.inf if len(calls) == 1 else g))
        for layer in [model.bn1, model.bn2, model.bn3]:
            layer.momentum = 0.0  # in train mode it normalizes by the batch, whatever went before

    both = one_epoch(lesson, torch.float16, prepare=spoil)
    second = TensorDataset(*batches().dataset[4:])
    alone = one_epoch(lesson, torch.float16, loader=DataLoader(second, 4))
    assert both.scaler.get_scale() == 32_768 and alone.scaler.get_scale() == 65_536
    for weight, expected in zip(both.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.allclose(weight, expected, atol=1e-6) and weight.isfinite().all()


def test_the_scale_changes_no_step_even_where_gradients_are_clipped(lesson, monkeypatch):
    """Clipped while they are still scaled, gradients of norm 65,536 times too large would all but vanish."""
    monkeypatch.setattr(lesson, "MAX_NORM", 0.5)
    one = torch.amp.GradScaler("cpu", init_scale=1.0)
    steps = []
    for scaler in [one, None]:  # None: 65,536
        run = one_epoch(lesson, torch.float16, scaler, loader=batches(1), lr=1.0)
        torch.manual_seed(0)
        first = nn.utils.parameters_to_vector(lesson.SimpleCNN().parameters())
        steps.append((nn.utils.parameters_to_vector(run.model.parameters()) - first).detach())
    assert torch.allclose(*steps, atol=2e-3)
    for step in steps:
        assert step.norm().item() == pytest.approx(0.5, rel=1e-3), "rate 1: as long as the clipped gradient"


@pytest.mark.usefixtures("no_pictures")
def test_only_float16_has_a_scaler_and_its_state_goes_on_in_the_next_epoch(lesson, tmp_path):
    run_lesson(lesson, tmp_path, *TINY, "--epochs", 2, "--precisions", "float32", "bfloat16", "float16")
    states = {}
    for name in lesson.PRECISIONS:
        checkpoint = load(folder_of(lesson, tmp_path) / name / "latest_checkpoint.pth")
        states[name] = checkpoint["scaler"]
        scales = [row["LossScale"] for row in checkpoint["history"]]
        assert scales == ([65_536] * 2 if name == "float16" else [1] * 2)
    assert states["float32"] == states["bfloat16"] == {}
    assert states["float16"]["scale"] == 65_536
    assert states["float16"]["_growth_tracker"] == 4, "2 batches in each of 2 epochs"


@pytest.mark.usefixtures("no_pictures")
def test_stopped_anywhere_it_goes_on_as_if_nothing_had_happened(lesson, tmp_path, monkeypatch, capsys):
    """In the second epoch of the first arm, and in the first of the second: scales and all."""
    flags = [*TINY, "--precisions", "float32", "float16", "--epochs", 2]
    run_lesson(lesson, tmp_path / "whole", *flags)
    whole, evaluate = folder_of(lesson, tmp_path / "whole"), lesson.evaluate
    todo = ["float16: 0", "float32: 1", "float16: 1"]
    for stop in [2, 3]:
        calls = []

        def stopped(*args, stop=stop, calls=calls):
            calls.append(args)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return evaluate(*args)

        monkeypatch.setattr(lesson, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run_lesson(lesson, tmp_path / str(stop), *flags)
        monkeypatch.setattr(lesson, "evaluate", evaluate)
        capsys.readouterr()
        lesson.main(["--resume", "--output-dir", str(tmp_path / str(stop)), "--device", "cpu"])
        said = re.findall(r"^(\w+: \d) of 2 epochs are done", capsys.readouterr().out, flags=re.MULTILINE)
        assert said == todo[stop - 2 :], "what is done already is not mentioned"
        for path in sorted(whole.rglob("*.pth")):
            resumed = load(folder_of(lesson, tmp_path / str(stop)) / path.relative_to(whole))
            expected = load(path)
            for checkpoint in [resumed, expected]:
                for row in checkpoint["history"]:
                    for key in [key for key in row if key.startswith("ImagesPerSecond")]:
                        del row[key]
            assert_same_state(resumed, expected)


@pytest.mark.usefixtures("no_pictures")
def test_arms_take_turns_with_the_same_weights_and_batches(lesson, tmp_path, monkeypatch):
    train_one_epoch, turns = lesson.train_one_epoch, []

    def watch(model, loader, loss_fn, optimizer, device, epoch, dtype, scaler):
        first = model.conv1.weight.detach().clone()
        shown = []
        hook = model.register_forward_pre_hook(
            lambda _, inputs: shown.append(inputs[0].double().sum().item())
        )
        result = train_one_epoch(model, loader, loss_fn, optimizer, device, epoch, dtype, scaler)
        hook.remove()
        turns.append((dtype, epoch, first, shown))
        return result

    monkeypatch.setattr(lesson, "train_one_epoch", watch)
    output = run_lesson(lesson, tmp_path, *TINY, "--epochs", 2)
    order = [(dtype, epoch) for dtype, epoch, _, _ in turns]
    both = [torch.float32, torch.bfloat16]
    assert order == [(dtype, epoch) for epoch in [1, 2] for dtype in both]
    assert torch.equal(turns[0][2], turns[1][2]) and not torch.equal(turns[0][2], turns[2][2])
    assert turns[0][3] == turns[1][3] != turns[2][3] == turns[3][3] and len(turns[0][3]) == 2
    names = re.findall(r"^(\w+): (\d) of 2 epochs are done\.", output, flags=re.MULTILINE)
    assert names == [(name, str(done)) for done in [0, 1] for name in ["float32", "bfloat16"]]
    rates = [row["LearningRate"] for row in history_of(lesson, tmp_path, "bfloat16")]
    assert rates == pytest.approx([0.05, 0.025]), "half a cosine over both epochs"


def history_of(lesson, output_dir, name):
    return load(folder_of(lesson, output_dir) / name / "latest_checkpoint.pth")["history"]


def test_the_printed_speeds_are_medians_of_the_recorded_ones(lesson, capsys):
    """Three epochs; ratios are taken within an epoch, so their median is not the ratio of the medians."""
    speeds = {
        "float32": [(100, 400), (200, 200), (50, 100)],
        "bfloat16": [(150, 200), (100, 400), (100, 300)],
    }
    histories = {
        name: [{"ImagesPerSecond/train": train, "ImagesPerSecond/val": val} for train, val in values]
        for name, values in speeds.items()
    }
    histories["bfloat16"][-1]["PeakMemoryGB"] = 0.123
    lesson.print_speed(histories)
    assert capsys.readouterr().out.splitlines() == [
        "Images a second, medians of 3 epochs, and ratios to float32:",
        "  float32   | train 100, 1.00 (1.00 to 1.00) | val 200, 1.00 (1.00 to 1.00)",
        "  bfloat16  | train 100, 1.50 (0.50 to 2.00) | val 300, 2.00 (0.50 to 3.00) | peak memory 0.12 GB",
    ]


@pytest.mark.usefixtures("no_pictures")
def test_speeds_are_images_by_the_seconds_of_each_phase(lesson, tmp_path, monkeypatch):
    """With a clock of our own: 2 s for training, 4 s for validation, of 32 and 32 images."""
    times = iter([0.0, 2.0, 6.0] * 2)
    monkeypatch.setattr(lesson.time, "perf_counter", lambda: next(times))
    output = run_lesson(lesson, tmp_path, *TINY)
    line = r" +\| train 16, 1\.00 \(1\.00 to 1\.00\) \| val 8, 1\.00"
    assert re.search(f"  float32{line}", output) and re.search(f"  bfloat16{line}", output)
    for name in ["float32", "bfloat16"]:
        scalars = read_scalars(tmp_path / "tensor_board" / lesson.LESSON / "digits_run_1" / name)
        assert scalars["ImagesPerSecond/train"] == [(1, 16)] and scalars["ImagesPerSecond/val"] == [(1, 8)]
        assert scalars["Seconds"] == [(1, 2)]


def to_bfloat16(values):
    """Round float32 to the nearest bfloat16, ties to even, with the bits alone."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_the_printed_shares_of_rounding_are_counted_right(lesson, capsys):
    """Against NumPy: the gradient of the logits is (softmax - truth) / images, and bfloat16 is half of the bits."""
    torch.manual_seed(1)
    model = lesson.SimpleCNN()
    model.fc2.weight.data *= 60  # answers as sure as those of a trained network
    images, labels = batches(1, 64).dataset.tensors
    lesson.print_rounding(model, images, labels, CPU, 0.002)
    output = capsys.readouterr().out
    assert output.startswith("Rounding, in one step without momentum, with 64 images and rate 0.002:\n")
    with torch.no_grad():
        logits = model.train()(lesson.to_input(images, CPU)).double().numpy()
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradients = exp / exp.sum(axis=1, keepdims=True)
    gradients[np.arange(64), labels.numpy()] -= 1
    gradients /= 64
    vanished = [100 * (np.float16(gradients * scale) == 0).mean() for scale in [1, 65_536]]
    vanished.append(100 * (to_bfloat16(gradients) == 0).mean())
    assert vanished[0] > vanished[1] > 0 or vanished[0] > 5, "the example has something to count"
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()]).numpy()
    moves = (0.002 * torch.cat([weight.grad.flatten() for weight in model.parameters()])).numpy()
    kept = to_bfloat16(weights)
    stuck = [100 * (weights - moves == weights).mean()]
    stuck.append(100 * (to_bfloat16(kept - to_bfloat16(moves)) == kept).mean())
    printed = [float(share) for share in re.findall(r"([\d.]+) %$", output, flags=re.MULTILINE)]
    assert printed == pytest.approx(vanished + stuck, abs=0.2) and stuck[1] > stuck[0] + 5
    words = re.findall(r"0 in (\w+) +at scale +([\d,]+):|they are (\w+) *:", output)
    assert words == [
        ("float16", "1", ""), ("float16", "65,536", ""), ("bfloat16", "1", ""),
        ("", "", "float32"), ("", "", "bfloat16"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"cpu_name": "X", "avx512_bf16": True, "amx_bf16": True}, "CPU X, bfloat16: avx512_bf16, amx_bf16"),
        ({"cpu_name": "M2", "bf16": True}, "CPU M2, bfloat16: bf16"),
        ({"cpu_name": "Old", "avx2": True, "bf16": False}, "CPU Old, bfloat16: no instructions for it"),
    ],
)
def test_the_first_line_says_what_the_processor_has(lesson, monkeypatch, tmp_path, found, words):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    output = run_lesson(lesson, tmp_path, *TINY, "--precisions", "float32")
    assert output.splitlines()[0] == words
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert lesson.describe_processor(CPU) == "cpu, bfloat16: unknown, the figures will tell"


def test_float16_is_trained_without_being_asked_for_on_a_gpu_only(lesson, monkeypatch, capsys):
    assert lesson.parse_args(["--device", "cpu"]).precisions == ["float32", "bfloat16"]
    assert lesson.parse_args(["--device", "cpu", "--precisions", "float16"]).precisions == ["float16"]
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # as if there were one
    assert lesson.parse_args(["--device", "cuda"]).precisions == ["float32", "bfloat16", "float16"]
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(["--precisions", "float8"])
    assert error.value.code == 2 and "invalid choice: 'float8'" in capsys.readouterr().err


def test_the_picture_shows_accuracy_and_speed_of_every_arm(lesson):
    histories = {
        "float32": [{"Accuracy/val": 40.0, "ImagesPerSecond/train": 900.0}] * 2,
        "bfloat16": [{"Accuracy/val": 41.0, "ImagesPerSecond/train": 60.0}] * 2,
    }
    figure = lesson.plot_arms(histories, "digits")
    left, right = figure.axes
    for ax, expected in [(left, {"float32": 40, "bfloat16": 41}), (right, {"float32": 900, "bfloat16": 60})]:
        drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
        assert drawn == {name: ([1, 2], [value] * 2) for name, value in expected.items()}
    assert (left.get_ylabel(), right.get_ylabel()) == ("validation accuracy (%)", "images a second")
    assert left.get_title() == "SimpleCNN on digits" and right.get_ylim()[0] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_three_arms_and_reports_its_memory(finished):
    output = finished("07", "cuda").output
    assert output.startswith("GPU ") and output.count("peak memory") == 3
