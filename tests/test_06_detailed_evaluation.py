"""Lesson 06: metrics checked against hand-worked examples, and a test set that chooses nothing."""

import contextlib
import io
import itertools
import json
import math
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import assert_same_state, load, run_lesson, stop_in_epoch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

NAMES = [f"class {i}" for i in range(10)]
SMALL = ["--subset", 32, "--batch-size", 16]
quick = pytest.mark.usefixtures("no_pictures", "seconds")  # draws nothing, and no two starts share a second


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def evaluate_again(lesson, output_dir, *flags):
    """Start the lesson without other flags than these. Return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        lesson.main(["--output-dir", str(output_dir), "--device", "cpu", *map(str, flags)])
    return output.getvalue()


def model_path(output_dir):
    return output_dir / "artifacts" / "checkpoints" / "best_model_eval.pth"


def report_of(output_dir):
    return json.loads((output_dir / "artifacts" / "evaluation_report.json").read_text(encoding="utf-8"))


# argmax


def test_argmax_answers_are_those_of_plain_python(lessons, capsys):
    """Five scores, ten logits, a batch of three images, the same in PyTorch, and two mistakes."""
    lessons["06"].explain_argmax()
    lines = capsys.readouterr().out.splitlines()
    scores = [0.1, 0.3, 0.8, 0.2, 0.5]
    frog = [2.1, -0.5, 1.8, 0.3, -1.2, 0.8, 3.5, 1.1, 0.2, -0.8]
    automobile = [1.2, 2.8, 0.3, 0.5, 1.1, 0.2, 0.7, 0.9, 1.5, 0.4]
    bird = [0.1, 0.2, 3.2, 1.1, 0.8, 1.5, 0.9, 1.2, 0.5, 0.3]
    batch = [frog, automobile, bird]
    values, indices = [max(row) for row in batch], [row.index(max(row)) for row in batch]
    columns = [column.index(max(column)) for column in map(list, zip(*batch, strict=True))]
    assert (scores.index(max(scores)), indices, values) == (2, [6, 1, 2], [3.5, 2.8, 3.2])
    assert (
        lines[0] == "1. Of the scores [0.1 0.3 0.8 0.2 0.5], the largest is 0.8. argmax gives its index, 2."
    )
    assert lines[1] == "2. Ten logits: argmax gives 6, so the prediction is frog."
    assert lines[2].endswith("argmax with axis=1 gives [6, 1, 2]: frog, automobile, bird.")
    assert lines[3].endswith("torch.max gives the value 3.5 and the index 6.")
    assert lines[4].endswith(f"the values {values} and the indices {indices}.")
    assert f"dim=0 gives {columns}," in lines[5] and len(columns) == 10
    flat = frog + automobile + bird
    assert f"without dim, argmax gives {flat.index(max(flat))}, an index into all 30 numbers" in lines[6]


# Metrics


def logits_of(*probabilities):
    """Return logits (1, 10) whose softmax gives these classes these probabilities, and the others the same rest."""
    given = dict(probabilities)
    rest = (1 - sum(given.values())) / (10 - len(given))
    return torch.tensor([[given.get(i, rest) for i in range(10)]]).log()


def wilson(correct, n, z=1.959964):
    """Return the ends of Wilson's 95 % confidence interval of a proportion, by its formula."""
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    width = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [middle - width, middle + width]


@pytest.fixture
def four():
    """Logits and labels of four images, of which two are misclassified.

    Class 0 is recognized. Class 0 is predicted as 1, but is second. Class 1 is recognized. Class 2 is predicted as 1,
    and is last.
    """
    logits = [
        logits_of((0, 0.92)),
        logits_of((1, 0.62), (0, 0.30)),
        logits_of((1, 0.82)),
        logits_of((1, 0.95), (2, 0.0001)),
    ]
    return torch.cat(logits), torch.tensor([0, 0, 1, 2])


def test_metrics_of_the_hand_worked_example(lessons, four):
    """Class 2 is never predicted and never recognized, which gives 0."""
    metrics = lessons["06"].compute_metrics(*four, NAMES)
    assert metrics["images"] == 4 and metrics["accuracy"] == 0.5
    assert metrics["loss"] == pytest.approx(-sum(map(math.log, [0.92, 0.30, 0.82, 0.0001])) / 4, abs=1e-5)
    assert metrics["top_k"] == {1: 0.5, 3: 0.75, 5: 0.75}
    matrix = np.zeros((10, 10), dtype=int)
    matrix[0, 0] = matrix[0, 1] = matrix[1, 1] = matrix[2, 1] = 1  # [true class, predicted class]
    assert metrics["confusion_matrix"] == matrix.tolist()
    expected = [(1, 1 / 2, 2 / 3, 2), (1 / 3, 1, 1 / 2, 1), (0, 0, 0, 1)]  # precision, recall, F1, images
    for name, values in zip(NAMES, [*expected, *[(0, 0, 0, 0)] * 7], strict=True):
        assert list(metrics["classes"][name].values()) == pytest.approx(values), name
    assert metrics["classes"]["macro avg"]["recall"] == pytest.approx(1.5 / 10)
    assert metrics["classes"]["weighted avg"]["recall"] == pytest.approx(0.5)
    assert metrics["mean_confidence"] == pytest.approx((0.92 + 0.62 + 0.82 + 0.95) / 4, abs=1e-5)


def test_calibration_error_of_the_hand_worked_example(lessons, four):
    """0.62 (wrong) and 0.82 (correct) have bins of their own; 0.92 (correct) and 0.95 (wrong) share one."""
    metrics = lessons["06"].compute_metrics(*four, NAMES)
    assert np.allclose(metrics["calibration_bins"], [(0.62, 0, 1), (0.82, 1, 1), (0.935, 0.5, 2)], atol=1e-5)
    expected = 1 / 4 * 0.62 + 1 / 4 * abs(0.82 - 1) + 2 / 4 * abs(0.935 - 0.5)
    assert metrics["expected_calibration_error"] == pytest.approx(expected, abs=1e-5)


def test_metrics_agree_with_their_formulas(lessons):
    """On 1,000 random predictions, with as many images of every class."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1000, 10, generator=generator), torch.arange(1000) % 10
    logits[torch.arange(1000), labels] += 1.5
    metrics = lessons["06"].compute_metrics(logits, labels, NAMES)
    predicted, matrix = logits.argmax(dim=1), np.array(metrics["confusion_matrix"])
    for i, j in itertools.product(range(10), repeat=2):
        assert matrix[i, j] == ((labels == i) & (predicted == j)).sum()
    assert matrix.sum(axis=1).tolist() == [100] * 10, "rows are the true classes"
    recall, precision = matrix.diagonal() / matrix.sum(axis=1), matrix.diagonal() / matrix.sum(axis=0)
    f1 = 2 * precision * recall / (precision + recall)
    for key, values in [("recall", recall), ("precision", precision), ("f1-score", f1)]:
        assert [metrics["classes"][name][key] for name in NAMES] == pytest.approx(list(values))
        assert metrics["classes"]["macro avg"][key] == pytest.approx(values.mean())
    assert metrics["accuracy"] == pytest.approx(matrix.trace() / 1000)
    assert metrics["top_k"][1] <= metrics["top_k"][3] <= metrics["top_k"][5]
    for k in [1, 3, 5]:
        hits = (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
        assert metrics["top_k"][k] == pytest.approx(hits.double().mean().item())


@pytest.mark.parametrize(("correct", "images"), [(0, 4), (2, 4), (3, 4), (4, 4), (829, 1000)])
def test_the_confidence_interval_is_wilsons(lessons, correct, images):
    """It never reaches below 0 or beyond 100 %."""
    labels = (torch.arange(images) >= correct).long()  # all images are predicted as class 0
    metrics = lessons["06"].compute_metrics(logits_of((0, 0.9)).repeat(images, 1), labels, NAMES)
    low, high = metrics["accuracy_95_percent_interval"]
    assert [low, high] == pytest.approx(wilson(correct, images), abs=1e-6) and 0 <= low < high <= 1


def test_perfect_predictions_and_missing_classes_break_nothing(lessons, recwarn):
    """Neither a warning nor a division by zero comes from a model without errors, or from classes without images."""
    for labels in [torch.arange(20) % 10, torch.zeros(3, dtype=torch.int64)]:
        logits = torch.nn.functional.one_hot(labels, 10).float() * 20
        metrics = lessons["06"].compute_metrics(logits, labels, NAMES)
        assert metrics["accuracy"] == 1 and metrics["expected_calibration_error"] < 0.01
        images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
        figure = lessons["06"].plot_errors(images, logits, labels, NAMES, "title")
        assert figure.get_suptitle().startswith("The 0 errors")
        lessons["06"].plot_confidence(metrics, logits, labels, "title")
        lessons["06"].plot_confusion_matrix(np.array(metrics["confusion_matrix"]), NAMES, "title")
        lessons["06"].print_metrics(metrics, NAMES)
    assert [w for w in recwarn if issubclass(w.category, (UserWarning, RuntimeWarning))] == []


def test_logits_are_those_of_eval_mode_on_the_cpu(lessons):
    """Dropout is off, BatchNorm uses its running averages, and no gradients are kept."""
    lesson, model = lessons["06"], lessons["06"].SimpleCNN(dropout=0.5).train()
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    logits = lesson.compute_logits(model, DataLoader(TensorDataset(images, torch.arange(10)), 3), "cpu")
    assert torch.allclose(logits, model.eval()(lesson.normalize(images)), atol=1e-5)
    assert logits.device.type == "cpu" and not logits.requires_grad and logits.shape == (10, 10)


# The diagnosis in words


def test_the_printed_diagnosis_of_the_hand_worked_example(lessons, four, capsys):
    """The metrics, the table of the classes, the weakest of them, and the most frequent kinds of error."""
    logits, labels = torch.cat([four[0], four[0][3:]]), torch.cat([four[1], four[1][3:]])  # class 2 twice
    lessons["06"].print_metrics(lessons["06"].compute_metrics(logits, labels, NAMES), NAMES)
    output = capsys.readouterr().out
    loss = -sum(map(math.log, [0.92, 0.30, 0.82, 0.0001, 0.0001])) / 5
    low, high = wilson(2, 5)
    interval = f"95 % confidence interval {100 * low:.2f} to {100 * high:.2f} %"
    assert f"Test loss {loss:.4f}, accuracy 40.00 % ({interval})\n" in output
    assert re.findall(r"Top-(\d) accuracy ([\d.]+) %", output) == [
        ("1", "40.00"),
        ("3", "60.00"),
        ("5", "60.00"),
    ]
    table = {line[2:14].strip(): line[14:].split() for line in output.splitlines() if line.startswith("  ")}
    assert table["class"] == ["precision", "recall", "F1", "images"]
    assert table["class 0"] == ["1.0000", "0.5000", "0.6667", "2"]
    assert table["class 1"] == ["0.2500", "1.0000", "0.4000", "1"]
    assert table["macro avg"][1] == "0.1500" and table["weighted avg"][1] == "0.4000"
    assert "Weakest class: class 2 (F1 0.00)\n" in output
    pairs = re.findall(r"^  class (\d) predicted as class (\d): (\d) times$", output, flags=re.MULTILINE)
    assert pairs == [("2", "1", "2"), ("0", "1", "1")], "kinds of error that never occur are not listed"
    assert "Mean confidence 85.2 %, accuracy 40.0 %: " in output


@pytest.mark.parametrize(
    ("confidence", "images", "verdict"),
    [
        (0.80, 200, "underconfident"),
        (0.92, 200, "plausible"),
        (0.97, 200, "overconfident"),
        (0.80, 20, "plausible"),
        (0.97, 20, "plausible"),
    ],
)
def test_confidence_is_judged_by_the_interval_of_the_accuracy(lessons, capsys, confidence, images, verdict):
    """The accuracy is 90 %: of 200 images the interval is 85 to 93 %, of 20 images 70 to 97 %."""
    labels = (torch.arange(images) < images // 10).long()  # a tenth of the images is misclassified
    metrics = lessons["06"].compute_metrics(logits_of((0, confidence)).repeat(images, 1), labels, NAMES)
    lessons["06"].print_metrics(metrics, NAMES)
    assert f"accuracy 90.0 %: {verdict}\n" in capsys.readouterr().out


# The pictures


def test_confusion_matrix_has_true_classes_in_rows_and_the_errors_alone(lessons, four):
    """Left in percent of each row, right in images and without the diagonal."""
    matrix = np.array(lessons["06"].compute_metrics(*four, NAMES)["confusion_matrix"])
    percent, errors = lessons["06"].plot_confusion_matrix(matrix, NAMES, "title").axes[:2]
    for ax in [percent, errors]:
        assert (ax.get_ylabel(), ax.get_xlabel()) == ("true class", "predicted class")
        assert [label.get_text() for label in ax.get_yticklabels()] == NAMES
        assert [label.get_text() for label in ax.get_xticklabels()] == NAMES
    cells = np.array([text.get_text() for text in percent.texts], dtype=float).reshape(10, 10)
    expected = np.zeros((10, 10))
    expected[:3, :2] = [[50, 50], [0, 100], [0, 100]]
    assert (cells == expected).all()
    cells = np.array([text.get_text() for text in errors.texts], dtype=int).reshape(10, 10)
    assert cells.sum() == 2 and cells[0, 1] == cells[2, 1] == 1
    assert "Percent" in percent.get_title() and "Errors" in errors.get_title()


def test_confidence_picture_separates_correct_from_wrong_predictions(lessons):
    """Left a histogram of both, right the accuracy of every bin, with its number of images."""
    logits = [
        logits_of((0, 0.92)),
        logits_of((0, 0.93)),
        logits_of((1, 0.62), (0, 0.3)),
        logits_of((1, 0.65)),
    ]
    logits, labels = torch.cat(logits), torch.tensor([0, 0, 0, 1])
    metrics = lessons["06"].compute_metrics(logits, labels, NAMES)
    histogram, calibration = lessons["06"].plot_confidence(metrics, logits, labels, "title").axes
    heights = [[bar.get_height() for bar in bars] for bars in histogram.containers]
    assert heights == [[0] * 6 + [1, 0, 0, 2], [0] * 6 + [1, 0, 0, 0]]
    legend = [text.get_text() for text in histogram.get_legend().get_texts()]
    assert legend == ["correct predictions", "wrong predictions"]
    perfect, model = calibration.lines
    assert perfect.get_xydata().tolist() == [[0, 0], [1, 1]] and perfect.get_label() == "perfect calibration"
    assert np.allclose(model.get_xydata(), [(0.635, 0.5), (0.925, 1.0)], atol=1e-5)
    assert [text.get_text() for text in calibration.texts] == ["2", "2"]
    error = 100 * (2 * abs(0.635 - 0.5) + 2 * abs(0.925 - 1)) / 4
    assert f"{error:.1f} points" in calibration.get_title()


def test_error_samples_are_the_16_errors_with_the_highest_confidence(lessons):
    """Each with the true and the predicted class, and with the probabilities of both."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 10, generator=generator) * 3, torch.arange(60) % 10
    images = (
        torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(60, 3, 32, 32)
    )  # each has its own gray
    figure = lessons["06"].plot_errors(images, logits, labels, NAMES, "title")
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = [i for i in range(60) if predicted[i] != labels[i]]
    expected = sorted(wrong, key=lambda i: -confidence[i])[:16]
    assert [int(ax.images[0].get_array()[0, 0, 0]) for ax in figure.axes] == expected
    for ax, i in zip(figure.axes, expected, strict=True):
        true = f"true: {NAMES[labels[i]]}, {100 * probabilities[i, labels[i]]:.0f} %"
        assert ax.get_title() == f"{true}\npredicted: {NAMES[predicted[i]]}, {100 * confidence[i]:.0f} %"
    assert figure.get_suptitle() == "The 16 errors with the highest confidence: title"


# A run


@quick
def test_the_saved_and_evaluated_model_is_that_of_the_best_epoch(lessons, tmp_path, monkeypatch):
    """It is chosen by the validation accuracy alone, although the training accuracy keeps rising."""
    lesson, weights, evaluated = lessons["06"], [], []
    train_one_epoch, compute_logits = lesson.train_one_epoch, lesson.compute_logits
    accuracies = iter([20.0, 60.0, 60.0])

    def evaluate(model, *_):
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 1.0, next(accuracies)

    def record(model, *args):
        evaluated.append(dict(model.state_dict()))
        return compute_logits(model, *args)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    monkeypatch.setattr(
        lesson, "train_one_epoch", lambda *args: (train_one_epoch(*args)[0], 90.0 + len(weights))
    )
    monkeypatch.setattr(lesson, "compute_logits", record)
    run_lesson(lesson, tmp_path, *SMALL, "--epochs", 3)
    best = load(model_path(tmp_path))
    assert [row["Accuracy/val"] for row in best["history"]] == [20.0, 60.0] and best["best_accuracy"] == 60.0
    assert_same_state(dict(best["model"]), weights[1])
    assert_same_state(evaluated, [weights[1]])


@quick
def test_the_test_images_are_loaded_only_after_the_model_was_chosen(lessons, tmp_path, monkeypatch):
    """The order is: load training images, train, load test images."""
    lesson, calls = lessons["06"], []
    load_data, save_checkpoint = lesson.load_data, lesson.save_checkpoint
    monkeypatch.setattr(
        lesson, "load_data", lambda *args, train: (calls.append(train), load_data(*args, train=train))[1]
    )
    monkeypatch.setattr(
        lesson, "save_checkpoint", lambda *args: (calls.append("saved"), save_checkpoint(*args))
    )
    run_lesson(lesson, tmp_path, *SMALL)
    assert calls == [True, "saved", False]


@quick
@pytest.mark.parametrize("number", ["01", "02", "04", "05"])
def test_other_lessons_never_load_the_test_images(lessons, tmp_path, monkeypatch, number):
    """Only lessons 03 and 06 do."""
    lesson, splits = lessons[number], []
    load_data = lesson.load_data
    monkeypatch.setattr(
        lesson, "load_data", lambda *args, train: (splits.append(train), load_data(*args, train=train))[1]
    )
    run_lesson(lesson, tmp_path, "--subset", 64)
    assert splits == [True]


@quick
def test_the_report_agrees_with_the_checkpoint_the_output_and_tensorboard(lessons, tmp_path, monkeypatch):
    """All of it is computed again from the saved model and the test images."""
    lesson, curves = lessons["06"], {}
    monkeypatch.setattr(SummaryWriter, "add_pr_curve", lambda _, tag, *args: curves.update({tag: args}))
    output = run_lesson(lesson, tmp_path, "--epochs", 3, "--lr", 0.3, "--subset", 90, "--batch-size", 16)
    model, report = lesson.SimpleCNN(), report_of(tmp_path)
    model.load_state_dict(load(model_path(tmp_path))["model"])
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=False)
    images, labels = images[:90], labels[:90]
    with torch.no_grad():
        logits = model.eval()(lesson.normalize(images))
    expected = lesson.compute_metrics(logits, labels, list("0123456789"))
    assert report.keys() == expected.keys() and report["confusion_matrix"] == expected["confusion_matrix"]
    assert report["images"] == 90 and report["classes"] == expected["classes"]
    assert report["top_k"] == {str(k): value for k, value in expected["top_k"].items()}
    assert report["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert report["accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).double().mean().item())
    assert f"a model trained on digits, on 90 test images\nTest loss {report['loss']:.4f}, " in output
    low, high = (100 * end for end in report["accuracy_95_percent_interval"])
    interval = f"95 % confidence interval {low:.2f} to {high:.2f} %"
    assert f"accuracy {100 * report['accuracy']:.2f} % ({interval})\n" in output
    for k, value in report["top_k"].items():
        assert f"Top-{k} accuracy {100 * value:.2f} %\n" in output
    for name in [*"0123456789", "macro avg", "weighted avg"]:
        *scores, count = report["classes"][name].values()
        row = " +".join([name, *(f"{score:.4f}" for score in scores), f"{count:.0f}"])
        assert re.search(f"^  {row}$", output, flags=re.MULTILINE)
    assert report["mean_confidence"] == pytest.approx(logits.softmax(dim=1).max(dim=1).values.mean().item())
    assert f"Mean confidence {100 * report['mean_confidence']:.1f} %" in output
    [run] = (tmp_path / "tensor_board" / lesson.LESSON).iterdir()
    scalars = read_scalars(run)
    assert scalars["Test/accuracy"][0][1] == pytest.approx(100 * report["accuracy"], rel=1e-5)
    assert scalars["Test/loss"][0][1] == pytest.approx(report["loss"], rel=1e-5)
    assert len(curves) == 10
    for i in range(10):
        is_class, probabilities = curves[f"PrecisionRecall/{i}"]
        assert torch.equal(is_class, labels == i)
        assert torch.allclose(probabilities, logits.softmax(dim=1)[:, i], atol=1e-5)


def test_tensorboard_shows_training_and_evaluation_in_one_run(finished, lessons):
    """One event file has the curves, the three figures, and a precision-recall curve of every class."""
    [events] = (finished("06").folder / "tensor_board" / lessons["06"].LESSON).rglob("events*")
    assert re.fullmatch(r"\d{8}-\d{6}", events.parent.name)
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    figures = ["confidence_analysis", "confusion_matrix", "error_samples"]
    assert sorted(accumulator.Tags()["images"]) == [f"Evaluation/{name}" for name in figures]
    curves = accumulator.PluginTagToContent("pr_curves")
    assert set(curves) == {f"PrecisionRecall/{digit}" for digit in range(10)}
    assert {"Loss/train", "Loss/val", "Test/loss", "Test/accuracy"} <= set(accumulator.Tags()["scalars"])
    assert set(accumulator.PluginTagToContent("text")) == {"Hyperparameters/text_summary"}


# One model, several evaluations


@pytest.fixture
def trained(finished, tmp_path):
    """A folder in which lesson 06 finds the model that an earlier run has trained on digits."""
    model_path(tmp_path).parent.mkdir(parents=True)
    shutil.copy(model_path(finished("06").folder), model_path(tmp_path))
    return tmp_path


@quick
def test_a_second_run_evaluates_without_training(finished, lessons, trained):
    """It says so, leaves the model as it is, and finds the same metrics on the data that the model knows."""
    before = model_path(trained).read_bytes()
    output = evaluate_again(lessons["06"], trained, "--subset", 256)
    assert (
        f"No training, because {model_path(trained)} exists. To train a new model, add --overwrite.\n"
        in output
    )
    assert "Epoch" not in output and model_path(trained).read_bytes() == before
    assert report_of(trained) == report_of(finished("06").folder)


@quick
def test_overwrite_trains_a_new_model(lessons, trained):
    """The new model replaces the one that is there."""
    output = run_lesson(lessons["06"], trained, *SMALL, "--overwrite", "--seed", 7)
    assert "No training" not in output and "Epoch  1/1" in output
    assert load(model_path(trained))["hyperparameters"]["seed"] == 7


@quick
@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_checkpoint_of_another_lesson_is_evaluated(finished, lessons, tmp_path, monkeypatch, number):
    """No model is trained or saved. TensorBoard shows how the evaluated model was trained, not today's flags."""
    path, texts = sorted(finished(number).artifacts.rglob("best_model.pth"))[0], []
    monkeypatch.setattr(SummaryWriter, "add_text", lambda _, tag, text: texts.append(text))
    output = evaluate_again(lessons["06"], tmp_path, "--checkpoint", path, "--epochs", 77)
    assert f"Evaluating {path}, a model trained on digits, on 359 test images" in output
    assert report_of(tmp_path)["images"] == 359
    assert "Epoch" not in output and not list(tmp_path.rglob("*.pth"))
    [text] = texts
    trained_with = {f"{name}: {value}" for name, value in load(path)["hyperparameters"].items()}
    assert set(text.split("  \n")) == trained_with and "epochs: 77" not in trained_with


@quick
def test_other_data_than_the_models_is_refused_in_one_sentence(lessons, trained, monkeypatch):
    """No data is loaded for it."""
    monkeypatch.setattr(lessons["06"], "load_data", lambda *_, train: pytest.fail("the data is loaded"))
    with pytest.raises(SystemExit) as error:
        evaluate_again(lessons["06"], trained, "--data", "cifar10")
    hint = "Leave out --data, or train a new model (--overwrite)."
    assert error.value.code == f"{model_path(trained)} was trained on digits. {hint}"


@quick
def test_a_missing_checkpoint_is_one_sentence(lessons, tmp_path):
    """No other model is trained in its place."""
    with pytest.raises(SystemExit) as error:
        evaluate_again(lessons["06"], tmp_path, "--checkpoint", tmp_path / "none.pth")
    assert error.value.code == f"{tmp_path / 'none.pth'} does not exist. Train a model first."
    assert not list(tmp_path.rglob("*.pth"))


@quick
def test_overwrite_and_checkpoint_exclude_each_other(lessons, trained):
    """A model that was named is never overwritten; together, the flags are an error with status 2."""
    with pytest.raises(SystemExit) as error:
        evaluate_again(lessons["06"], trained, "--overwrite", "--checkpoint", model_path(trained))
    assert error.value.code == 2


@quick
def test_an_interrupted_training_leaves_no_model(lessons, trained, monkeypatch):
    """So the next run trains anew. With --overwrite, the model that was there stays until the new one is complete."""
    lesson, before = lessons["06"], model_path(trained).read_bytes()
    for folder, flags in [(trained, ["--overwrite"]), (trained / "new", [])]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_in_epoch(patch, lesson, 2)
            run_lesson(lesson, folder, *SMALL, "--epochs", 3, *flags)
    files = [path for path in trained.rglob("*") if path.is_file() and "events" not in path.name]
    assert files == [model_path(trained)]
    assert model_path(trained).read_bytes() == before
    assert "Epoch  1/1" in run_lesson(lesson, trained / "new", *SMALL)
