"""Lesson 09: what is clipped, when, and whether what it prints is what happened."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from common import load_lesson, read_scalars
from conftest import draw_nothing, run_lesson
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

TINY = ["--subset", 24, "--batch-size", 8, "--epochs", 2]  # three batches per epoch; the third is faulty


@pytest.fixture
def lesson(lessons):
    return lessons["09"]


def flatten(model):
    """Return a copy of the parameters as one vector."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


# One step


def weights_with_gradients():
    """Return two parameters whose gradients 3, -4 and 12 have the norm 13."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1))
    first.grad, second.grad = torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])
    return [first, second]


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
    parameters = weights_with_gradients()
    norm, values = lesson.clip_gradients(parameters, clipping, limit)
    assert norm.item() == pytest.approx(13.0) and values.tolist() == [3.0]
    clipped = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert clipped.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("clipping", ["none", "norm", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_does_not_repair_nan(lesson, clipping, bad):
    """It stays and raises nothing. Only "value" turns an infinite gradient into one of the limit."""
    parameters = weights_with_gradients()
    parameters[1].grad.fill_(bad)
    norm, _ = lesson.clip_gradients(parameters, clipping, 1.0)
    assert not norm.isfinite()
    last = parameters[1].grad.item()
    assert last == 1.0 if clipping == "value" and bad == math.inf else not math.isfinite(last)
    assert parameters[0].grad.isfinite().all() == (clipping != "norm" or bad == math.inf)


def train(lesson, clipping, limit, batches=1, factor=1.0, lr=0.1):
    """Train a network without BatchNorm for an epoch of batches of 4. Return what every step did."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (4 * batches, 3, 32, 32), dtype=torch.uint8, generator=generator)
    loader = DataLoader(TensorDataset(images, torch.arange(4 * batches) % 10), 4)
    torch.manual_seed(0)
    model = lesson.SimpleCNN(batch_norm=False)
    inputs, weights = [], []
    model.register_forward_pre_hook(
        lambda _, x: weights.append(flatten(model)) or inputs.append(x[0].clone())
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss, _, norms, values = lesson.train_one_epoch(
        model, loader, nn.CrossEntropyLoss(), optimizer, "cpu", factor, clipping, limit
    )
    moves = torch.stack([*weights[1:], flatten(model)]) - torch.stack(weights)
    return SimpleNamespace(
        moves=moves, norms=norms, values=values, inputs=inputs, images=images.split(4), loss=loss
    )


def test_every_step_is_as_long_as_the_clipped_gradient(lesson):
    """So clipping stands between backward() and step(), and what is measured are the gradients before it."""
    free, by_norm = train(lesson, "none", 0.0, 4), train(lesson, "norm", 0.5, 4)
    by_value = train(lesson, "value", 0.01, 4)
    assert free.moves.norm(dim=1).tolist() == pytest.approx((0.1 * free.norms).tolist(), rel=1e-3)
    torch.testing.assert_close(free.moves[:, ::100].abs(), 0.1 * free.values, rtol=1e-3, atol=1e-6)
    assert by_norm.norms.min() > 0.5 and by_value.moves.shape == free.moves.shape
    assert by_norm.moves.norm(dim=1).tolist() == pytest.approx([0.05] * 4, rel=1e-3)
    assert by_value.moves.abs().amax(dim=1).tolist() == pytest.approx([0.001] * 4, rel=1e-3)
    assert torch.cosine_similarity(free.moves[0], by_norm.moves[0], dim=0) > 0.9999
    assert free.norms[0] == by_norm.norms[0] == by_value.norms[0]
    assert torch.equal(free.values[0], by_norm.values[0]) and torch.equal(free.values[0], by_value.values[0])


def test_only_the_first_image_of_every_20th_batch_is_faulty(lesson):
    """All others are as they were, and so are the images themselves."""
    run = train(lesson, "norm", 1.0, batches=26, factor=255.0, lr=1e-4)
    for batch, (inputs, images) in enumerate(zip(run.inputs, run.images, strict=True), start=1):
        expected = lesson.normalize(images)
        if batch in [3, 23]:
            expected[0] *= 255
        assert torch.equal(inputs, expected), batch
    assert run.norms[[2, 22]].min() > 5 * run.norms[:2].max()


def test_nan_does_not_end_the_epoch(lesson):
    """Clipping cannot help: once the weights are nan, they stay it."""
    run = train(lesson, "norm", 1.0, batches=6, factor=math.nan)
    assert math.isnan(run.loss) and run.norms.isnan().tolist() == [False] * 2 + [True] * 4


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the lesson: its output, and for every danger and remedy what was trained, measured and logged."""
    lesson, folder, runs, clips = load_lesson("09"), tmp_path_factory.mktemp("run"), {}, []
    train, train_one_epoch, clip_gradients = lesson.train, lesson.train_one_epoch, lesson.clip_gradients

    def watch_train(args, danger, remedy, *rest):
        assert (danger, remedy) not in runs
        runs[danger, remedy] = current = SimpleNamespace(epochs=[])
        clips.clear()
        current.accuracy, current.norms, current.values = result = train(args, danger, remedy, *rest)
        current.clips = list(clips)
        return result

    def watch_epoch(model, loader, loss_fn, optimizer, *rest):
        settings = {key: optimizer.param_groups[0][key] for key in ["lr", "momentum"]}
        runs[list(runs)[-1]].epochs.append(SimpleNamespace(model=model, weights=flatten(model), **settings))
        return train_one_epoch(model, loader, loss_fn, optimizer, *rest)

    def watch_clipping(parameters, clipping, limit):
        clips.append((clipping, limit))
        return clip_gradients(parameters, clipping, limit)

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch, [lesson])
        patch.setattr(lesson, "train", watch_train)
        patch.setattr(lesson, "train_one_epoch", watch_epoch)
        patch.setattr(lesson, "clip_gradients", watch_clipping)
        output = run_lesson(lesson, folder, *TINY, "--quantiles", 50, 90)
    for path in folder.rglob("events*"):
        name = path.parent.parent.relative_to(folder / "tensor_board" / lesson.LESSON).as_posix()
        [key] = [key for key in runs if re.sub(r"\W|_", "", "".join(key)) == re.sub(r"\W|_", "", name)]
        runs[key].folder, runs[key].curves = path.parent, read_scalars(path.parent)
    return SimpleNamespace(lesson=lesson, folder=folder, output=output, runs=runs)


REMEDIES = ["none", "norm 50 %", "norm 90 %", "value 50 %", "value 90 %", "lr / 4"]


def test_every_danger_meets_every_remedy(run):
    """All of them have both epochs, also where the loss is nan, with the settings that the names promise."""
    assert set(run.runs) == {(danger, remedy) for danger in run.lesson.DANGERS for remedy in REMEDIES}
    for (danger, remedy), this in run.runs.items():
        factor = run.lesson.DANGERS[danger][1] / (4 if remedy == "lr / 4" else 1)
        assert [epoch.lr for epoch in this.epochs] == pytest.approx([0.05 * factor] * 2), (danger, remedy)
        assert {epoch.momentum for epoch in this.epochs} == {0.9}
        kind = remedy.split()[0] if remedy[-1] == "%" else "none"
        assert [clipping for clipping, _ in this.clips] == [kind] * 6, "in every step, and not for lr / 4"


def test_the_limits_are_quantiles_of_the_clean_run(run):
    """Of the norms of the steps, and of all absolute values other than 0. They are used, and printed."""
    clean = run.runs["none", "none"]
    assert "Gradients of the 6 steps when nothing is wrong:\n" in run.output and len(clean.norms) == 6
    assert clean.values.shape == (6, -(-flatten(clean.epochs[0].model).numel() // 100))
    for kind, numbers in [("norm", clean.norms), ("value", clean.values[clean.values > 0])]:
        for quantile in [50, 90]:
            limit = numbers.double().quantile(quantile / 100).item()
            assert limit > 0
            for danger in run.lesson.DANGERS:
                used = [limit for _, limit in run.runs[danger, f"{kind} {quantile} %"].clips]
                assert used == pytest.approx([limit] * 6, rel=1e-5)
            assert f"  {quantile} % of the {kind}s are at most {limit:.3g}\n" in run.output


def test_all_runs_start_from_the_same_weights_and_see_the_same_batches(run):
    """Per kind of network, with and without BatchNorm. The first gradients tell, where no danger changes them."""
    for batch_norm in [False, True]:
        same = [this for (danger, _), this in run.runs.items() if run.lesson.DANGERS[danger][0] == batch_norm]
        assert len(same) == (12 if batch_norm else 24)
        assert all(torch.equal(this.epochs[0].weights, same[0].epochs[0].weights) for this in same)
        assert all(this.norms[0] == same[0].norms[0] for this in same)


def test_only_the_dangers_that_say_so_have_batchnorm(run):
    """The other networks have a bias in its place."""
    for (danger, _), this in run.runs.items():
        model, has_batch_norm = this.epochs[0].model, danger.startswith("BatchNorm")
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(nn.BatchNorm2d) == 3 * has_batch_norm
        convolutions = [model.conv1, model.conv2, model.conv3]
        assert [conv.bias is None for conv in convolutions] == [has_batch_norm] * 3


def test_tensorboard_has_one_run_per_danger_and_remedy(run):
    """With the date and time of the start. The norm before clipping is one point per step, the rest per epoch."""
    folders = {this.folder for this in run.runs.values()}
    assert len(folders) == len(run.runs) == len(list(run.folder.rglob("events*")))
    assert len({folder.name for folder in folders}) == 1
    assert {folder.parents[1] for folder in folders} == {run.folder / "tensor_board" / run.lesson.LESSON}
    for this in run.runs.values():
        steps, norms = zip(*this.curves["GradientNorm"], strict=True)
        assert steps == (1, 2, 3, 4, 5, 6)
        assert norms == pytest.approx(this.norms.tolist(), rel=1e-6, nan_ok=True)
        assert [step for step, _ in this.curves["Accuracy/val"]] == [1, 2]
        rates = [epoch.lr for epoch in this.epochs]
        assert [value for _, value in this.curves["LearningRate"]] == pytest.approx(rates)


def test_the_lines_and_the_table_say_what_happened(run):
    """The accuracy after the last epoch, and the largest norm. Norms that are not finite are counted apart."""
    lines = [line.split(" | ") for line in run.output.splitlines() if "val acc" in line]
    table = run.output[run.output.index("Validation accuracy in percent") :].splitlines()
    assert re.split(r"  +", table[1].strip()) == REMEDIES
    rows = {line[2:19].strip(): [float(number) for number in line[19:].split()] for line in table[2:8]}
    assert list(rows) == list(run.lesson.DANGERS)
    assert len(lines) == 36
    for danger, remedy, accuracy, words in lines:
        this = run.runs[danger.strip(), remedy.strip()]
        expected = this.curves["Accuracy/val"][-1][1]
        assert accuracy == f"val acc {expected:5.2f} %"
        assert rows[danger.strip()][REMEDIES.index(remedy.strip())] == pytest.approx(expected, abs=0.006)
        finite = [norm for _, norm in this.curves["GradientNorm"] if math.isfinite(norm)]
        lost = f", {6 - len(finite)} of 6 not finite" if len(finite) < 6 else ""
        assert words == f"norms up to {max(finite):.3g}{lost}"
    nan = [words for danger, _, _, words in lines if danger.strip() == "images of nan"]
    assert len(nan) == 6 and all(words.endswith(", 4 of 6 not finite") for words in nan)


def test_the_picture_is_saved_under_the_name_that_is_printed(run):
    """In artifacts/, where nothing else is, because this lesson keeps no checkpoints."""
    picture = run.folder / "artifacts" / "gradient_clipping.png"
    assert list((run.folder / "artifacts").iterdir()) == [picture] and f"Picture: {picture}\n" in run.output


@pytest.mark.usefixtures("no_pictures")
def test_a_run_without_any_finite_norm_says_so(lesson, tmp_path, monkeypatch):
    """Here the gradients are nan from the first step on, in every run, and none of them stops."""
    monkeypatch.setattr(lesson, "normalize", lambda images: images * math.nan)
    monkeypatch.setattr(lesson, "DANGERS", {"none": (False, 1, 1.0)})
    output = run_lesson(lesson, tmp_path, *TINY)
    assert output.count("| no finite norm, 6 of 6 not finite\n") == 8


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
    """Its third batch would be the faulty one. One sentence and status 1; one image more is enough."""
    monkeypatch.setattr(lesson, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit, match=r"^An epoch needs three batches, .* a smaller --batch-size\.$"):
        run_lesson(lesson, tmp_path, "--subset", 32, "--batch-size", 16)
    assert not list(tmp_path.iterdir())
    with pytest.raises(pytest.fail.Exception, match="it trains"):
        run_lesson(lesson, tmp_path, "--subset", 33, "--batch-size", 16)


@pytest.mark.parametrize("quantiles", [["101"], ["50", "-1"]])
def test_a_quantile_that_makes_no_sense_is_refused(lesson, capsys, quantiles):
    """One sentence and status 2, before anything is trained."""
    with pytest.raises(SystemExit) as error:
        lesson.parse_args(["--quantiles", *quantiles])
    assert error.value.code == 2 and "--quantiles" in capsys.readouterr().err.splitlines()[-1]
