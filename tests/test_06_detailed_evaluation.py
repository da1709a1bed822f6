"""Lesson 06: metrics checked against hand-worked examples, and a test set that chooses nothing."""

import contextlib
import copy
import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import assert_same_state, load, run_lesson, stop_in_epoch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

NAMES = [f"class {i}" for i in range(10)]
SMALL = ["--subset", 32, "--batch-size", 16]
quick = pytest.mark.usefixtures("no_pictures", "seconds")  # draws nothing, and no two starts share a second


@pytest.fixture
def lesson(lessons):
    yield lessons["06"]
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


def test_argmax_is_explained_with_the_right_answers(lesson, capsys):
    """They are worked out by hand."""
    lesson.explain_argmax()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "1. Of the scores [0.1 0.3 0.8 0.2 0.5], the largest is 0.8. argmax gives its index, 2."
    )
    assert lines[1] == "2. Ten logits: argmax gives 6, so the prediction is frog."
    assert lines[2].endswith("argmax with axis=1 gives [6, 1, 2]: frog, automobile, bird.")
    assert lines[3].endswith("torch.max gives the value 3.5 and the index 6.")
    assert lines[4].endswith("the values [3.5, 2.8, 3.2] and the indices [6, 1, 2].")
    assert "dim=0 gives [0, 1, 2, 2, 1, 2, 0, 2, 1, 1]," in lines[5]
    assert "without dim, argmax gives 6, an index into all 30 numbers" in lines[6]


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


def test_metrics_of_the_hand_worked_example(lesson, four):
    """Class 2 is never predicted and never recognized, which gives 0."""
    metrics = lesson.compute_metrics(*four, NAMES)
    assert metrics["images"] == 4 and metrics["accuracy"] == 0.5
    assert metrics["accuracy_95_percent_interval"] == pytest.approx(wilson(2, 4), abs=1e-6)
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


def test_calibration_error_of_the_hand_worked_example(lesson, four):
    """0.62 (wrong) and 0.82 (correct) have bins of their own; 0.92 (correct) and 0.95 (wrong) share one."""
    metrics = lesson.compute_metrics(*four, NAMES)
    assert np.allclose(metrics["calibration_bins"], [(0.62, 0, 1), (0.82, 1, 1), (0.935, 0.5, 2)], atol=1e-5)
    expected = 1 / 4 * 0.62 + 1 / 4 * abs(0.82 - 1) + 2 / 4 * abs(0.935 - 0.5)
    assert metrics["expected_calibration_error"] == pytest.approx(expected, abs=1e-5)
    _, bins = lesson.measure_calibration(torch.tensor([0.95, 1.0]), torch.tensor([0.0, 1.0]))
    assert bins == [(pytest.approx(0.975), 0.5, 2)], "a confidence of 1 belongs to the last bin"


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_a_model_without_errors_and_classes_without_images_break_nothing(lesson):
    """Neither a warning nor a division by zero."""
    labels = torch.zeros(3, dtype=torch.int64)
    logits = torch.nn.functional.one_hot(labels, 10).float() * 20
    metrics = lesson.compute_metrics(logits, labels, NAMES)
    assert metrics["accuracy"] == 1 and metrics["expected_calibration_error"] < 0.01
    figure = lesson.plot_errors(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), logits, labels, NAMES, "title")
    assert figure.get_suptitle().startswith("The 0 errors")
    lesson.plot_confidence(metrics, logits, labels, "title")
    lesson.plot_confusion_matrix(np.array(metrics["confusion_matrix"]), NAMES, "title")
    lesson.print_metrics(metrics, NAMES)


def test_logits_are_those_of_eval_mode_on_the_cpu(lesson):
    """Dropout is off, BatchNorm uses its running averages, and no gradients are kept."""
    model = lesson.SimpleCNN(dropout=0.5).train()
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    logits = lesson.compute_logits(model, DataLoader(TensorDataset(images, torch.arange(10)), 3), "cpu")
    assert torch.allclose(logits, model.eval()(lesson.normalize(images)), atol=1e-5)
    assert logits.device.type == "cpu" and not logits.requires_grad and logits.shape == (10, 10)


# The diagnosis in words


def test_the_printed_diagnosis_of_the_hand_worked_example(lesson, four, capsys):
    """The metrics, the table of the classes, the weakest of them, and the most frequent kinds of error."""
    logits, labels = torch.cat([four[0], four[0][3:]]), torch.cat([four[1], four[1][3:]])  # class 2 twice
    lesson.print_metrics(lesson.compute_metrics(logits, labels, NAMES), NAMES)
    output = capsys.readouterr().out
    loss = -sum(map(math.log, [0.92, 0.30, 0.82, 0.0001, 0.0001])) / 5
    low, high = wilson(2, 5)
    interval = f"95 % confidence interval {100 * low:.2f} to {100 * high:.2f} %"
    assert f"Test loss {loss:.4f}, accuracy 40.00 % ({interval})\n" in output
    top_k = [("1", "40.00"), ("3", "60.00"), ("5", "60.00")]
    assert re.findall(r"Top-(\d) accuracy ([\d.]+) %", output) == top_k
    table = {line[2:14].strip(): line[14:].split() for line in output.splitlines() if line.startswith("  ")}
    assert table["class"] == ["precision", "recall", "F1", "images"]
    assert table["class 0"] == ["1.0000", "0.5000", "0.6667", "2"]
    assert table["class 1"] == ["0.2500", "1.0000", "0.4000", "1"]
    assert table["macro avg"][1] == "0.1500" and table["weighted avg"][1] == "0.4000"
    assert "Weakest class: class 2 (F1 0.00)\n" in output
    pairs = re.findall(r"^  class (\d) predicted as class (\d): (\d) times$", output, flags=re.MULTILINE)
    assert pairs == [("2", "1", "2"), ("0", "1", "1")], "kinds of error that never occur are not listed"
    assert "Mean confidence 85.2 %, accuracy 40.0 %: overconfident\n" in output


def test_confidence_is_judged_by_the_interval_of_the_accuracy(lesson, capsys):
    """The accuracy is 90 %: of 200 images the interval is 85 to 93 %, of 20 images 70 to 97 %."""
    verdicts = {(0.80, 200): "underconfident", (0.92, 200): "plausible", (0.97, 200): "overconfident"}
    for (confidence, images), verdict in (verdicts | {(0.80, 20): "plausible"}).items():
        labels = (torch.arange(images) < images // 10).long()  # a tenth of the images is misclassified
        metrics = lesson.compute_metrics(logits_of((0, confidence)).repeat(images, 1), labels, NAMES)
        lesson.print_metrics(metrics, NAMES)
        assert f"accuracy 90.0 %: {verdict}\n" in capsys.readouterr().out


# The pictures


def test_confusion_matrix_has_true_classes_in_rows_and_the_errors_alone(lesson, four):
    """Left in percent of each row, right in images and without the diagonal."""
    matrix = np.array(lesson.compute_metrics(*four, NAMES)["confusion_matrix"])
    percent, errors = lesson.plot_confusion_matrix(matrix, NAMES, "title").axes[:2]
    for ax in [percent, errors]:
        assert (ax.get_ylabel(), ax.get_xlabel()) == ("true class", "predicted class")
        for labels in [ax.get_xticklabels(), ax.get_yticklabels()]:
            assert [label.get_text() for label in labels] == NAMES
    cells = np.array([text.get_text() for text in percent.texts], dtype=float).reshape(10, 10)
    expected = np.zeros((10, 10))
    expected[:3, :2] = [[50, 50], [0, 100], [0, 100]]
    assert (cells == expected).all()
    cells = np.array([text.get_text() for text in errors.texts], dtype=int).reshape(10, 10)
    assert cells.sum() == 2 and cells[0, 1] == cells[2, 1] == 1
    assert "Percent" in percent.get_title() and "Errors" in errors.get_title()


def test_confidence_picture_separates_correct_from_wrong_predictions(lesson):
    """Left a histogram of both, right the accuracy of every bin, with its number of images."""
    logits = [
        logits_of((0, 0.92)),
        logits_of((0, 0.93)),
        logits_of((1, 0.62), (0, 0.3)),
        logits_of((1, 0.65)),
    ]
    logits, labels = torch.cat(logits), torch.tensor([0, 0, 0, 1])
    metrics = lesson.compute_metrics(logits, labels, NAMES)
    histogram, calibration = lesson.plot_confidence(metrics, logits, labels, "title").axes
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


def test_error_samples_are_the_16_errors_with_the_highest_confidence(lesson):
    """Each with the true and the predicted class, and with the probabilities of both."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 10, generator=generator) * 3, torch.arange(60) % 10
    images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(60, 3, 32, 32)  # 60 shades of gray
    figure = lesson.plot_errors(images, logits, labels, NAMES, "title")
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
def test_the_report_is_printed_written_and_shown_by_tensorboard(lesson, four, tmp_path, capsys):
    """TensorBoard has the hyperparameters of the model too, and a precision-recall curve of every class."""
    written = {}
    writer = SimpleNamespace(add_figure=lambda tag, _: written.update({tag: None}))
    writer.add_scalar = writer.add_text = lambda tag, value: written.update({tag: value})
    writer.add_pr_curve = lambda tag, labels, probabilities: written.update({tag: (labels, probabilities)})
    test_set = TensorDataset(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), four[1])
    checkpoint = {"class_names": NAMES, "hyperparameters": {"epochs": 77, "data": "photographs"}}
    lesson.write_report(four[0], test_set, checkpoint, tmp_path, writer)
    metrics = lesson.compute_metrics(*four, NAMES)
    report = json.loads((tmp_path / "evaluation_report.json").read_text(encoding="utf-8"))
    assert report == json.loads(json.dumps(metrics))
    assert "accuracy 50.00 %" in capsys.readouterr().out
    assert written.pop("Hyperparameters") == "epochs: 77  \ndata: photographs"
    assert (written.pop("Test/loss"), written.pop("Test/accuracy")) == (metrics["loss"], 50.0)
    for i, name in enumerate(NAMES):
        is_class, probabilities = written.pop(f"PrecisionRecall/{name}")
        assert torch.equal(is_class, four[1] == i) and torch.equal(
            probabilities, four[0].softmax(dim=1)[:, i]
        )
    pictures = ["confusion_matrix", "confidence_analysis", "error_samples"]
    assert list(written) == [f"Evaluation/{name}" for name in pictures]
    assert all((tmp_path / f"{name}.png").exists() for name in pictures)


@quick
def test_the_saved_and_evaluated_model_is_that_of_the_best_epoch(lesson, tmp_path, monkeypatch):
    """It is chosen by the validation accuracy alone, and evaluated on --subset test images."""
    weights, accuracies = [], iter([20.0, 60.0, 60.0])

    def evaluate(model, *_):
        weights.append(copy.deepcopy(dict(model.state_dict())))
        return 1.0, next(accuracies)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    output = run_lesson(lesson, tmp_path, *SMALL, "--epochs", 3)
    best = load(model_path(tmp_path))
    assert [row["Accuracy/val"] for row in best["history"]] == [20.0, 60.0] and best["best_accuracy"] == 60.0
    assert_same_state(dict(best["model"]), weights[1])
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=False)
    model = lesson.SimpleCNN()
    model.load_state_dict(weights[1])
    logits = model.eval()(lesson.normalize(images[:32]))
    loss = torch.nn.functional.cross_entropy(logits, labels[:32]).item()
    assert f"a model trained on digits, on 32 test images\nTest loss {loss:.4f}, " in output


def test_tensorboard_shows_training_and_evaluation_in_one_run(finished, lesson):
    """One event file has the curves, the three figures, and a precision-recall curve of every class."""
    [events] = (finished("06").folder / "tensor_board" / lesson.LESSON).rglob("events*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert len(accumulator.Tags()["images"]) == 3 and len(accumulator.PluginTagToContent("pr_curves")) == 10
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
def test_a_second_run_evaluates_without_training(finished, lesson, trained):
    """It says so, leaves the model as it is, and finds the same metrics on the data that the model knows."""
    before = model_path(trained).read_bytes()
    output = evaluate_again(lesson, trained, "--subset", 256)
    hint = f"No training, because {model_path(trained)} exists. To train a new model, add --overwrite.\n"
    assert hint in output and "Epoch" not in output
    assert model_path(trained).read_bytes() == before and report_of(trained) == report_of(
        finished("06").folder
    )


@quick
def test_overwrite_trains_a_new_model(lesson, trained):
    output = run_lesson(lesson, trained, *SMALL, "--overwrite", "--seed", 7)
    assert "No training" not in output and "Epoch  1/1" in output
    assert load(model_path(trained))["hyperparameters"]["seed"] == 7


@quick
def test_a_checkpoint_of_another_lesson_is_evaluated(finished, lesson, tmp_path, monkeypatch):
    """No model is trained or saved. TensorBoard shows how the evaluated model was trained, not today's flags."""
    path, texts = next(finished("03").artifacts.rglob("best_model.pth")), []
    monkeypatch.setattr(SummaryWriter, "add_text", lambda _, tag, text: texts.append(text))
    output = evaluate_again(lesson, tmp_path, "--checkpoint", path, "--epochs", 77)
    assert f"Evaluating {path}, a model trained on digits, on 359 test images" in output
    assert report_of(tmp_path)["images"] == 359
    assert "No training" not in output and "Epoch" not in output and not list(tmp_path.rglob("*.pth"))
    [text] = texts
    settings = load(path)["hyperparameters"].items()
    assert text.split("  \n") == [f"{name}: {value}" for name, value in settings] and "epochs: 77" not in text


@quick
def test_other_data_than_the_models_is_refused_in_one_sentence(lesson, trained):
    with pytest.raises(SystemExit) as error:
        evaluate_again(lesson, trained, "--data", "cifar10")
    hint = "Leave out --data, or train a new model (--overwrite)."
    assert error.value.code == f"{model_path(trained)} was trained on digits. {hint}"


@quick
def test_a_model_that_was_named_is_never_replaced(lesson, trained):
    """Neither with --overwrite, nor if it does not exist."""
    with pytest.raises(SystemExit) as error:
        evaluate_again(lesson, trained, "--overwrite", "--checkpoint", model_path(trained))
    assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        evaluate_again(lesson, trained, "--checkpoint", trained / "none.pth")
    assert error.value.code == f"{trained / 'none.pth'} does not exist. Train a model first."
    assert list(trained.rglob("*.pth")) == [model_path(trained)]


@quick
def test_an_interrupted_training_leaves_no_model(lesson, trained, monkeypatch):
    """So the next run trains anew. With --overwrite, the model that was there stays until the new one is complete."""
    before = model_path(trained).read_bytes()
    for folder, flags in [(trained, ["--overwrite"]), (trained / "new", [])]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_in_epoch(patch, lesson, 2)
            run_lesson(lesson, folder, *SMALL, "--epochs", 3, *flags)
    files = [path for path in trained.rglob("*") if path.is_file() and "events" not in path.name]
    assert files == [model_path(trained)]
    assert model_path(trained).read_bytes() == before
