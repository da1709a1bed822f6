"""Lesson 06 against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import run_lesson
from sklearn.metrics import precision_recall_fscore_support

NAMES = [f"class {i}" for i in range(10)]


def logits_of(*probabilities):
    """Return logits (1, 10) whose softmax gives these classes these probabilities, and all others the same rest."""
    given = dict(probabilities)
    rest = (1 - sum(given.values())) / (10 - len(given))
    return torch.tensor([[given.get(i, rest) for i in range(10)]]).log()


@pytest.fixture
def four():
    """Four images: class 0 found; class 0 taken for 1, but second; class 1 found; class 2 taken for 1, and last."""
    logits = torch.cat([
        logits_of((0, 0.92)),
        logits_of((1, 0.62), (0, 0.30)),
        logits_of((1, 0.82)),
        logits_of((1, 0.95), (2, 0.0001)),
    ])  # fmt: skip
    return logits, torch.tensor([0, 0, 1, 2])


def test_figures_of_the_hand_worked_example(lessons, four):
    report = lessons["06"].measure(*four, NAMES)
    assert report["images"] == 4 and report["accuracy"] == 0.5
    assert report["accuracy_95_percent_interval"] == pytest.approx([0.5 - 0.49, 0.5 + 0.49])
    assert report["loss"] == pytest.approx(-sum(map(math.log, [0.92, 0.30, 0.82, 0.0001])) / 4, abs=1e-5)
    assert report["top_k"] == {1: 0.5, 3: 0.75, 5: 0.75}
    matrix = np.zeros((10, 10), dtype=int)
    matrix[0, 0] = matrix[0, 1] = matrix[1, 1] = matrix[2, 1] = 1  # [true class, predicted class]
    assert report["confusion_matrix"] == matrix.tolist()
    zero, one, two = (report["classes"][NAMES[i]] for i in range(3))
    assert (zero["precision"], zero["recall"], zero["f1-score"]) == pytest.approx((1, 0.5, 2 / 3))
    assert (one["precision"], one["recall"], one["f1-score"]) == pytest.approx((1 / 3, 1, 0.5))
    assert (two["precision"], two["recall"], two["f1-score"], two["support"]) == (0, 0, 0, 1)
    assert report["macro_average"]["recall"] == pytest.approx(1.5 / 10)
    assert report["weighted_average"]["recall"] == pytest.approx(0.5)
    assert report["most_confused"][:2] == [(1, NAMES[2], NAMES[1]), (1, NAMES[0], NAMES[1])]
    assert report["mean_confidence"] == pytest.approx((0.92 + 0.62 + 0.82 + 0.95) / 4, abs=1e-5)
    # Bins: 0.92 (right) and 0.95 (wrong) together, 0.62 (wrong), 0.82 (right).
    expected = 2 / 4 * abs(0.935 - 0.5) + 1 / 4 * 0.62 + 1 / 4 * abs(0.82 - 1)
    assert report["expected_calibration_error"] == pytest.approx(expected, abs=1e-5)
    bins = [(0.62, 0.0), (0.82, 1.0), (0.935, 0.5)]
    assert np.allclose(report["reliability_bins"], bins, atol=1e-5)


def test_figures_agree_with_scikit_learn_and_with_each_other(lessons):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 10, generator=generator)
    labels = torch.arange(1000) % 10
    logits[torch.arange(1000), labels] += 1.5
    report = lessons["06"].measure(logits, labels, NAMES)
    predicted = logits.argmax(dim=1)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, zero_division=0)
    for key, values in [("precision", precision), ("recall", recall), ("f1-score", f1)]:
        assert [report["classes"][name][key] for name in NAMES] == pytest.approx(list(values))
    matrix = np.array(report["confusion_matrix"])
    assert report["accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
    assert report["macro_average"]["recall"] == pytest.approx(report["accuracy"]), (
        "as many images of every class"
    )
    assert matrix.sum(axis=1).tolist() == [100] * 10, "rows are the true classes"
    for k in [1, 3, 5]:
        top = logits.topk(k, dim=1).indices
        assert report["top_k"][k] == pytest.approx((top == labels[:, None]).any(dim=1).float().mean().item())
    confidence = torch.softmax(logits, dim=1).max(dim=1).values
    assert report["mean_confidence"] == pytest.approx(confidence.mean().item(), abs=1e-5)


def test_argmax_examples(lessons, capsys):
    lessons["06"].explain_argmax()
    output = capsys.readouterr().out
    assert "[0.1, 0.3, 0.8, 0.2, 0.5]" in output and "is at position 2" in output or "argmax 2" in output
    assert "4.2 and 6" in output and output.count("[6, 1, 2]") == 2
    assert "[0, 1, 2, 0, 2, 0, 0, 2, 1, 2]" in output


def test_logits_are_those_of_eval_mode(lessons):
    lesson = lessons["06"]
    model = lesson.SimpleCNN(dropout=0.5).train()
    images = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(10)), 3)
    logits = lesson.compute_logits(model, loader, "cpu")
    assert torch.allclose(logits, model.eval()(lesson.to_input(images, "cpu")), atol=1e-5)
    assert not logits.requires_grad


def test_error_samples_are_the_most_confident_errors(lessons):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 10, generator=generator) * 3
    labels = torch.randint(0, 10, (60,), generator=generator)
    images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(60, 32, 32, 3)
    figure = lessons["06"].plot_errors(images, logits, labels, NAMES, "title")
    confidence, predicted = torch.softmax(logits, dim=1).max(dim=1)
    shown = [int(ax.images[0].get_array()[0, 0, 0]) for ax in figure.axes if ax.images]
    assert len(shown) == 16 and len(set(shown)) == 16
    assert all(predicted[i] != labels[i] for i in shown)
    others = [i for i in range(60) if predicted[i] != labels[i] and i not in shown]
    assert min(confidence[shown]) >= max(confidence[others])
    for ax, i in zip(figure.axes, shown, strict=False):
        assert (
            f"true: {NAMES[labels[i]]}" in ax.get_title()
            and f"taken for {NAMES[predicted[i]]}" in ax.get_title()
        )
        assert f"{100 * confidence[i]:.0f} %" in ax.get_title()


def test_perfect_predictions_break_no_figure(lessons, recwarn):
    labels = torch.arange(20) % 10
    logits = torch.nn.functional.one_hot(labels).float() * 20
    report = lessons["06"].measure(logits, labels, NAMES)
    assert report["accuracy"] == 1 and report["expected_calibration_error"] < 0.01
    lessons["06"].plot_errors(torch.zeros(20, 32, 32, 3, dtype=torch.uint8), logits, labels, NAMES, "title")
    lessons["06"].plot_confidence(report, logits, labels, "title")
    lessons["06"].print_report(report)
    assert not [warning for warning in recwarn if "precision" in str(warning.message).lower()]


def test_confusion_matrix_picture_has_true_classes_in_rows(lessons, four):
    report = lessons["06"].measure(*four, NAMES)
    figure = lessons["06"].plot_confusion_matrix(report, NAMES, "title")
    counts, percent = figure.axes[:2]
    assert counts.get_ylabel() == percent.get_ylabel() == "true class"
    assert counts.get_xlabel() == percent.get_xlabel() == "predicted class"
    assert [text.get_text() for text in counts.texts][:2] == ["1", "1"]
    assert [text.get_text() for text in percent.texts][:2] == ["50.0", "50.0"]
    assert [text.get_text() for text in percent.texts][20:22] == ["0.0", "100.0"]


def test_confidence_picture_separates_right_from_wrong(lessons, four):
    report = lessons["06"].measure(*four, NAMES)
    figure = lessons["06"].plot_confidence(report, *four, "title")
    histogram, reliability = figure.axes
    heights = [sum(bar.get_height() for bar in bars) for bars in histogram.containers]
    assert heights == [2, 2]
    model = next(line for line in reliability.lines if line.get_label() == "this model")
    assert np.allclose(model.get_xydata(), report["reliability_bins"])


def test_diagnosis_names_weakest_class_worst_pair_and_attitude(lessons, four, capsys):
    lessons["06"].print_report(lessons["06"].measure(*four, NAMES))
    output = capsys.readouterr().out
    assert "the worst pair is class 2 taken for class 1 1 times" in output and "overconfident" in output
    assert "accuracy 50.00 %" in output and "1.00 to 99.00 %" in output and "top-3 75.00 %" in output


def test_small_samples_get_no_impossible_figures(lessons, four, capsys):
    """An interval that ends beyond 100 %, or a weakest class that has no image."""
    logits, labels = four
    report = lessons["06"].measure(logits[[0, 0, 0, 1]], labels[[0, 0, 0, 1]], NAMES)
    assert report["accuracy_95_percent_interval"] == pytest.approx([0.75 - 0.42435, 1], abs=1e-4)
    lessons["06"].print_report(lessons["06"].measure(logits[[0, 2]], labels[[0, 2]], NAMES))
    assert "the weakest class is class 0 (F1 1.00)" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_06_records_how_the_model_was_trained_that_it_evaluates(finished, lessons, tmp_path, monkeypatch):
    for number in ["05", "06"]:
        path, texts = next(finished(number).artifacts.rglob("best_*.pth")), []
        with monkeypatch.context() as context:
            context.setattr(
                lessons["06"].SummaryWriter, "add_text", lambda *args, texts=texts: texts.append(args[-1])
            )
            run_lesson(lessons["06"], tmp_path, "--checkpoint", path, "--epochs", 77)
        [text] = texts
        assert {"epochs: 1", "batch_size: 128", "lr: 0.05", "group_size: 16"} <= set(text.split("  \n"))


@pytest.mark.parametrize("number", ["03", "06"])
def test_test_images_are_loaded_after_the_choice_of_the_model(lessons, tmp_path, monkeypatch, number):
    lesson, calls = lessons[number], []
    load_data, train = lesson.load_data, lesson.train

    def load(name, data_dir, train):
        calls.append(f"load train={train}")
        return load_data(name, data_dir, train)

    def spy(*args):
        result = train(*args)
        calls.append("trained")
        return result

    monkeypatch.setattr(lesson, "load_data", load)
    monkeypatch.setattr(lesson, "train", spy)
    run_lesson(lesson, tmp_path, "--subset", 64)
    assert calls == ["load train=True", "trained", "load train=False"]


@pytest.mark.parametrize("number", ["01", "02", "04", "05"])
def test_other_lessons_never_load_the_test_split(lessons, tmp_path, monkeypatch, number):
    lesson, splits = lessons[number], []
    load_data = lesson.load_data
    monkeypatch.setattr(
        lesson, "load_data", lambda *args, train: (splits.append(train), load_data(*args, train=train))[1]
    )
    run_lesson(lesson, tmp_path, "--subset", 64)
    assert splits == [True]


def test_06_evaluates_the_data_its_model_knows(finished, lessons, tmp_path):
    path = finished("06").artifacts / "checkpoints" / "best_model_eval.pth"
    with pytest.raises(SystemExit, match="was trained on digits"):
        lessons["06"].main(["--checkpoint", str(path), "--data", "cifar10", "--output-dir", str(tmp_path)])
