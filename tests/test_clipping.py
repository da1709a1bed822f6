"""Lesson 09: what is clipped, when, and whether what it prints is what happened."""

import math
import re

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import CPU, run_lesson
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

TINY = ["--subset", "80", "--batch-size", "16", "--epochs", "2"]  # 5 batches an epoch, the third is faulty


@pytest.fixture
def lesson(lessons):
    return lessons["09"]


@pytest.fixture(scope="module")
def whole(lessons, tmp_path_factory):
    """A run of the lesson with faulty images: its output, and {arm: its curves}."""
    folder = tmp_path_factory.mktemp("clipping")
    output = run_lesson(lessons["09"], folder, *TINY)
    runs = folder / "tensor_board" / lessons["09"].LESSON / "digits_run_1"
    return output, {path.name: read_scalars(path) for path in runs.iterdir() if path.is_dir()}, folder


def weights_with_gradients():
    """Two parameters with gradients of norm 13: 3, 4 and 12."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1))
    first.grad, second.grad = torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])
    return [first, second]


@pytest.mark.parametrize(
    ("clipping", "limit", "first", "second"),
    [
        ("norm", 6.5, [1.5, -2.0], 6.0),  # half as long, in the same direction
        ("norm", 20.0, [3.0, -4.0], 12.0),  # short enough
        ("value", 3.5, [3.0, -3.5], 3.5),  # each number by itself
        ("none", 0.1, [3.0, -4.0], 12.0),
    ],
)
def test_gradients_are_clipped_as_worked_out_by_hand(lesson, clipping, limit, first, second):
    parameters = weights_with_gradients()
    norm = lesson.clip_gradients(parameters, clipping, limit)
    assert norm.item() == pytest.approx(13.0) and norm.shape == ()
    assert parameters[0].grad.tolist() == pytest.approx(first)
    assert parameters[1].grad.item() == pytest.approx(second)


@pytest.mark.parametrize("clipping", ["none", "norm", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_does_not_mend_a_norm_of_nan(lesson, clipping, bad):
    """It is passed on as it is, and nothing is raised. With error_if_nonfinite=True PyTorch would."""
    parameters = weights_with_gradients()
    parameters[1].grad.fill_(bad)
    if clipping != "value":  # it cuts inf off, at the limit, but leaves nan
        with pytest.raises(RuntimeError, match="non-finite"):
            nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert not lesson.clip_gradients(parameters, clipping, 1.0).isfinite()
    last = parameters[1].grad.item()
    assert last == 1.0 if clipping == "value" and bad == math.inf else not math.isfinite(last)
    assert parameters[0].grad.isfinite().all() == (clipping != "norm" or bad == math.inf)


def train(lesson, clipping, limit, batches=1, spoil=1.0, lr=0.1, momentum=0.0):
    """Train a network without BatchNorm for an epoch of batches of 4. Returns the move, the norms and the inputs."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (4 * batches, 32, 32, 3), dtype=torch.uint8, generator=generator)
    loader = DataLoader(TensorDataset(images, torch.arange(4 * batches) % 10), 4)
    torch.manual_seed(0)
    model = lesson.SimpleCNN(batch_norm=False)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    loss, accuracy, norms = lesson.train_one_epoch(
        model, loader, nn.CrossEntropyLoss(), optimizer, CPU, 1, spoil, clipping, limit
    )
    move = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    return move, norms, seen, (loss, accuracy), images


def test_a_step_is_as_long_as_the_clipped_gradient(lesson):
    """Rate 0.1, limit 0.5: the weights move by 0.05 if clipping stands between backward() and step()."""
    free, norms, *_ = train(lesson, "none", 0.5)
    clipped, same, *_ = train(lesson, "norm", 0.5)
    assert norms[0] > 0.5 and torch.equal(norms, same), "the norm before clipping, measured in both"
    assert free.norm().item() == pytest.approx(0.1 * norms[0].item(), rel=1e-4)
    assert clipped.norm().item() == pytest.approx(0.05, rel=1e-4)
    assert torch.cosine_similarity(free, clipped, dim=0) > 0.9999, "the direction is kept"
    by_value, *_ = train(lesson, "value", 0.01)
    assert by_value.abs().max().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_only_the_first_image_of_every_20th_batch_is_faulty(lesson):
    _, norms, seen, _, images = train(lesson, "norm", 1.0, batches=26, spoil=255.0, lr=1e-4)
    assert len(norms) == len(seen) == 26
    for batch, inputs in enumerate(seen, start=1):
        clean = lesson.to_input(images[4 * (batch - 1) : 4 * batch], CPU)
        if batch in [3, 23]:
            clean[0] *= 255
        assert torch.equal(inputs, clean), batch
    assert norms[[2, 22]].min() > 5 * norms[:2].max()


def test_losses_are_weighted_by_images_and_nan_does_not_end_the_epoch(lesson):
    _, norms, _, (loss, _), _ = train(lesson, "norm", 1.0, batches=6, spoil=math.nan)
    assert math.isnan(loss) and norms.isnan().tolist() == [False] * 2 + [True] * 4


def test_without_batchnorm_the_convolutions_have_a_bias(lesson):
    plain, usual = lesson.SimpleCNN(batch_norm=False), lesson.SimpleCNN()
    names = dict(plain.named_parameters())
    assert not any("bn" in name for name in names) and {"conv1.bias", "conv2.bias", "conv3.bias"} <= set(
        names
    )
    assert not any("conv" in name and "bias" in name for name, _ in usual.named_parameters())
    assert plain(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def arm(danger, clipping):
    return f"{danger} clipping {clipping}".replace(" ", "_").replace(",", "")


def test_every_danger_meets_every_clipping_from_the_same_start(lesson, whole):
    _, runs, _ = whole
    assert set(runs) == {arm(danger, clipping) for danger in lesson.DANGERS for clipping in lesson.CLIPPINGS}
    for danger, (batch_norm, factor, spoil) in lesson.DANGERS.items():
        norms = [runs[arm(danger, clipping)]["GradientNorm"] for clipping in lesson.CLIPPINGS]
        assert [step for step, _ in norms[0]] == list(range(1, 11)), "a point for each step"
        assert norms[0][0] == norms[1][0] == norms[2][0], "same weights, same batch"
        assert (norms[0][0] == runs[arm("none", "none")]["GradientNorm"][0]) == (not batch_norm)
        rates = [value for _, value in runs[arm(danger, "norm")]["LearningRate"]]
        assert rates == pytest.approx([0.05 * factor] * 2)
        lost = [not math.isfinite(value) for _, value in norms[1]]
        assert lost == [False] * 2 + [True] * 8 if math.isnan(spoil) else not any(lost)


def test_the_table_holds_the_last_accuracies_and_the_lines_the_largest_norms(lesson, whole):
    output, runs, _ = whole
    table = output[output.index("  danger ") :]
    for danger in lesson.DANGERS:
        [row] = re.findall(rf"^  {re.escape(danger)}  +([\d. %]+)$", table, flags=re.MULTILINE)
        for clipping, printed in zip(lesson.CLIPPINGS, re.findall(r"[\d.]+", row), strict=True):
            curves = runs[arm(danger, clipping)]
            assert float(printed) == pytest.approx(curves["Accuracy/val"][-1][1], abs=0.006)
            [line] = [
                line for line in output.splitlines()
                if line.startswith(f"{danger} ") and f"| clipping {clipping} " in line
            ]  # fmt: skip
            assert f"| {float(printed):5.2f} %, " in line
            norms = [value for _, value in curves["GradientNorm"]]
            lost = [step for step, norm in enumerate(norms, start=1) if not math.isfinite(norm)]
            if lost:
                assert line.endswith(f"the first norm of nan or inf in step {lost[0]}")
            else:
                assert float(line.split("norms up to ")[1]) == pytest.approx(max(norms), rel=0.01)
    assert "images of nan           | clipping norm  |" in output
    assert "after 2 epochs, with the limits norm 1.0, value 0.05. 10 % is guessing:\n" in output


def test_quantiles_are_those_of_the_arm_without_danger(whole):
    output, runs, _ = whole
    norms = [value for _, value in runs[arm("none", "none")]["GradientNorm"]]
    line = re.search(
        r"Norms of 10 steps without danger and clipping: 50 % are below ([\d.]+), 90 % are below ([\d.]+), "
        r"99 % are below ([\d.]+), the largest is ([\d.]+)\.\nA limit of 1\.0 clips (\d+) % of them",
        output,
    )
    expected = [*np.quantile(norms, [0.5, 0.9, 0.99]), max(norms)]
    assert [float(text) for text in line.groups()[:4]] == pytest.approx(expected, abs=0.006)
    assert int(line[5]) == 10 * sum(norm > 1 for norm in norms) and 0 < int(line[5]) < 100


@pytest.mark.usefixtures("no_pictures")
def test_the_limits_are_those_of_the_command_line(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "DANGERS", {"none": (False, 1, 1.0)})
    clip, seen = lesson.clip_gradients, set()

    def watch(parameters, clipping, limit):
        seen.add((clipping, limit))
        return clip(parameters, clipping, limit)

    monkeypatch.setattr(lesson, "clip_gradients", watch)
    output = run_lesson(lesson, tmp_path, *TINY, "--max-norm", 0.25, "--max-value", 0.125, "--lr", 0.01)
    assert seen == {("none", 0.25), ("norm", 0.25), ("value", 0.125)}
    assert "A limit of 0.25 clips 100 %" in output and "limits norm 0.25, value 0.125" in output


def test_the_picture_shows_norms_without_clipping_and_all_accuracies(lesson):
    results = {
        (danger, clipping): ([{"Accuracy/val": 10.0 * row + column}], [row + 1.0, 100.0 * column + 1])
        for row, danger in enumerate(lesson.DANGERS)
        for column, clipping in enumerate(lesson.CLIPPINGS)
    }
    left, right = lesson.plot_results(results, "digits").axes
    assert {line.get_label(): list(line.get_ydata()) for line in left.lines} == {
        danger: [row + 1.0, 1.0] for row, danger in enumerate(lesson.DANGERS)
    }
    assert left.get_yscale() == "log"
    bars = {(round(bar.get_y() + 0.125, 2), bar.get_width()) for bar in right.patches}
    assert bars == {(row + 0.25 * i, 10.0 * row + i) for row in range(len(lesson.DANGERS)) for i in range(3)}
    assert [text.get_text() for text in right.get_yticklabels()] == list(lesson.DANGERS)
    colors = [bar.get_facecolor() for bar in right.patches[:3]]
    legend = dict(
        zip(
            [t.get_text() for t in right.get_legend().get_texts()],
            right.get_legend().legend_handles,
            strict=True,
        )
    )
    for color, clipping in zip(colors, lesson.CLIPPINGS, strict=True):
        assert legend[f"clipping: {clipping}"].get_facecolor() == color


def test_the_picture_is_written(whole):
    _, _, folder = whole
    assert (folder / "artifacts" / "gradient_clipping.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", [["--max-norm", "0"], ["--max-norm", "nan"], ["--max-value", "-1"]])
def test_a_limit_that_makes_no_sense_is_refused(lesson, capsys, flags):
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(flags)
    assert error.value.code == 2 and "--max-norm and --max-value must be above 0" in capsys.readouterr().err
