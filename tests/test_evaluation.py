"""Lesson 06 against numbers worked out by hand."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import CPU, run_lesson
from sklearn.metrics import precision_recall_fscore_support

NAMES = [f"class {i}" for i in range(10)]


def logits_of(*probabilities):
    """Return logits (1, 10) whose softmax gives these classes these probabilities, and all others the same rest."""
    given = dict(probabilities)
    rest = (1 - sum(given.values())) / (10 - len(given))
    return torch.tensor([[given.get(i, rest) for i in range(10)]]).log()


def wilson(right, n, z=1.959964):
    """Return the ends of Wilson's 95 % interval of a share, by its formula."""
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    width = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [middle - width, middle + width]


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
    assert report["accuracy_95_percent_interval"] == pytest.approx(wilson(2, 4))
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
    bins = [(0.62, 0.0, 1), (0.82, 1.0, 1), (0.935, 0.5, 2)]
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
    """Every number that is printed, worked out with plain Python."""
    lessons["06"].explain_argmax()
    output = capsys.readouterr().out
    assert "[0.1 0.3 0.8 0.2 0.5]: np.argmax gives 2, np.max 0.8" in output
    frog = [2.1, -0.5, 1.8, 0.3, -1.2, 0.8, 3.5, 1.1, 0.2, -0.8]
    rows = [
        [1.2, 2.8, 0.3, 0.5, 1.1, 0.2, 0.7, 0.9, 1.5, 0.4],
        frog,
        [0.1, 0.2, 3.2, 1.1, 0.8, 1.5, 0.9, 1.2, 0.5, 0.3],
    ]
    assert f"torch.argmax gives {frog.index(max(frog))}, so the answer is frog" in output
    assert "torch.max(dim=0) gives 3.5 at 6" in output and "argmax gives 6 again" in output
    answers = [row.index(max(row)) for row in rows]
    assert f"dim=1 gives {answers}: automobile, frog, bird" in output
    assert f"axis=1: {np.array(answers)}. The values are [2.8 3.5 3.2]" in output
    columns = [max(range(3), key=lambda i, c=c: rows[i][c]) for c in range(10)]
    assert f"dim=0 compares the images with each other: {columns}" in output
    flat = [value for row in rows for value in row]
    assert (
        f"through all 30 numbers: {flat.index(max(flat))}." in output and flat.index(max(flat)) not in answers
    )


def test_logits_are_those_of_eval_mode(lessons):
    lesson = lessons["06"]
    model = lesson.SimpleCNN(dropout=0.5).train()
    images = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(10)), 3)
    logits = lesson.compute_logits(model, loader, CPU)
    assert torch.allclose(logits, model.eval()(lesson.to_input(images, CPU)), atol=1e-5)
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
    probabilities = torch.softmax(logits, dim=1)
    for ax, i in zip(figure.axes, shown, strict=False):
        true, taken = ax.get_title().splitlines()
        assert true == f"true: {NAMES[labels[i]]}, {100 * probabilities[i, labels[i]]:.0f} %"
        assert taken == f"taken for {NAMES[predicted[i]]}, {100 * confidence[i]:.0f} %"
    assert figure.get_suptitle() == "The 16 most confident errors: title"


def test_perfect_predictions_break_no_figure(lessons, recwarn):
    labels = torch.arange(20) % 10
    logits = torch.nn.functional.one_hot(labels).float() * 20
    report = lessons["06"].measure(logits, labels, NAMES)
    assert report["accuracy"] == 1 and report["expected_calibration_error"] < 0.01
    lessons["06"].plot_errors(torch.zeros(20, 32, 32, 3, dtype=torch.uint8), logits, labels, NAMES, "title")
    lessons["06"].plot_confidence(report, logits, labels, "title")
    lessons["06"].print_report(report)
    assert not [warning for warning in recwarn if "precision" in str(warning.message).lower()]


def test_confusion_matrix_picture_has_true_classes_in_rows_and_the_errors_alone(lessons, four):
    report = lessons["06"].measure(*four, NAMES)
    figure = lessons["06"].plot_confusion_matrix(report, NAMES, "title")
    percent, errors = figure.axes[:2]
    for ax in [percent, errors]:
        assert ax.get_ylabel() == "true class" and ax.get_xlabel() == "predicted class"
        assert [label.get_text() for label in ax.get_yticklabels()] == NAMES
    cells = np.array([text.get_text() for text in percent.texts]).reshape(10, 10)
    assert cells[:3, :3].tolist() == [
        ["50.0", "50.0", "0.0"],
        ["0.0", "100.0", "0.0"],
        ["0.0", "100.0", "0.0"],
    ]
    cells = np.array([text.get_text() for text in errors.texts], dtype=int).reshape(10, 10)
    expected = np.zeros((10, 10), dtype=int)
    expected[0, 1] = expected[2, 1] = 1
    assert (cells == expected).all(), "without the right answers"
    assert "Percent" in percent.get_title() and "Errors" in errors.get_title()


def test_confidence_picture_separates_right_from_wrong_in_the_same_ten_bins(lessons):
    logits = torch.cat(
        [logits_of((0, 0.92)), logits_of((0, 0.93)), logits_of((1, 0.62), (0, 0.3)), logits_of((1, 0.65))]
    )
    labels = torch.tensor([0, 0, 0, 1])
    report = lessons["06"].measure(logits, labels, NAMES)
    histogram, reliability = lessons["06"].plot_confidence(report, logits, labels, "title").axes
    heights = [[bar.get_height() for bar in bars] for bars in histogram.containers]
    assert heights == [[0] * 6 + [1, 0, 0, 2], [0] * 6 + [1, 0, 0, 0]], "3 right, 1 wrong"
    assert [text.get_text() for text in histogram.get_legend().get_texts()] == [
        "right answers",
        "wrong answers",
    ]
    points, _, (bars,) = reliability.containers[0].lines
    assert np.allclose(points.get_xydata(), [(0.635, 0.5), (0.925, 1.0)], atol=1e-5)
    for segment, share, n in zip(bars.get_segments(), [0.5, 1.0], [2, 2], strict=True):
        p = (share * n + 1) / (n + 2)
        assert np.ptp(segment[:, 1]) == pytest.approx(2 * (p * (1 - p) / n) ** 0.5)
    assert [text.get_text() for text in reliability.texts] == ["2", "2"]
    error = 100 * (2 * abs(0.635 - 0.5) + 2 * abs(0.925 - 1)) / 4
    assert f"{error:.1f} points" in reliability.get_title()


def test_diagnosis_names_weakest_class_worst_pair_and_attitude(lessons, four, capsys):
    lessons["06"].print_report(lessons["06"].measure(*four, NAMES))
    output = capsys.readouterr().out
    assert "the worst pair is class 2 taken for class 1 1 times" in output and "as sure as right" in output
    low, high = wilson(2, 4)
    assert f"accuracy 50.00 % (95 % interval {100 * low:.2f} to {100 * high:.2f} %, 4 images)" in output
    assert "top-1 50.00 %, top-3 75.00 %, top-5 75.00 %" in output
    loss = -sum(map(math.log, [0.92, 0.30, 0.82, 0.0001])) / 4
    assert f"Loss {loss:.4f}" in output and "the weakest class is class 2 (F1 0.00)" in output
    assert re.search(r"its mean confidence is 82\.[78] %, its accuracy 50\.0 %\.", output)  # 82.75
    table = {line[2:14].strip(): line[14:].split() for line in output.splitlines() if line.startswith("  ")}
    assert table["class 0"] == ["1.0000", "0.5000", "0.6667", "2"] and table["class 1"] == [
        "0.3333",
        "1.0000",
        "0.5000",
        "1",
    ]
    assert (
        table["macro mean"][1] == "0.1500"
        and table["weighted"][1] == "0.5000"
        and table["weighted"][3] == "4"
    )


def test_small_samples_get_no_impossible_figures(lessons, four, capsys):
    """No interval that ends beyond 0 or 100 %, and no weakest class that has no image."""
    logits, labels = four
    report = lessons["06"].measure(logits[[0, 0, 0, 1]], labels[[0, 0, 0, 1]], NAMES)
    assert report["accuracy_95_percent_interval"] == pytest.approx(wilson(3, 4))
    for right in [0, 4]:
        low, high = lessons["06"].measure(logits[[0] * 4], torch.tensor([0 if right else 1] * 4), NAMES)[
            "accuracy_95_percent_interval"
        ]
        assert (low, high) == pytest.approx(wilson(right, 4), abs=1e-6) and 0 <= low < high <= 1
    lessons["06"].print_report(lessons["06"].measure(logits[[0, 2]], labels[[0, 2]], NAMES))
    assert "the weakest class is class 0 (F1 1.00)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("confidence", "attitude"),
    [(0.80, "underconfident"), (0.97, "overconfident"), (0.92, "as sure as right")],
)
def test_confidence_is_judged_by_the_interval_of_the_accuracy(lessons, capsys, confidence, attitude):
    """18 of 20 right: 90 %, but 95 % of such samples would have 70 to 97 %; of 200 with 180 right, 85 to 93 %."""
    for n, expected in [
        (20, "as sure as right" if confidence != 0.97 else "as sure as right"),
        (200, attitude),
    ]:
        logits = logits_of((0, confidence)).repeat(n, 1)
        labels = torch.zeros(n, dtype=torch.int64)
        labels[: n // 10] = 1
        low, high = wilson(n * 9 // 10, n)
        lessons["06"].print_report(lessons["06"].measure(logits, labels, NAMES))
        output = capsys.readouterr().out
        by_hand = (
            "overconfident"
            if confidence > high
            else "underconfident"
            if confidence < low
            else "as sure as right"
        )
        assert f"the network is {by_hand}:" in output
        if n == 200:
            assert by_hand == expected


def test_06_reports_the_test_images_with_the_best_model(lessons, tmp_path, monkeypatch):
    """Everything that main() prints and writes, worked out again from the checkpoint and the data."""
    lesson, curves = lessons["06"], {}
    monkeypatch.setattr(
        lesson.SummaryWriter, "add_pr_curve", lambda _, tag, *args: curves.update({tag: args})
    )
    output = run_lesson(lesson, tmp_path, "--epochs", 3, "--lr", 0.3, "--subset", 90, "--batch-size", 16)
    checkpoint = torch.load(tmp_path / "artifacts" / "checkpoints" / "best_model_eval.pth", weights_only=True)
    model = lesson.SimpleCNN()
    model.load_state_dict(checkpoint["model"])
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=False)
    images, labels = images[:90], labels[:90]
    with torch.no_grad():
        logits = model.eval()(lesson.to_input(images, CPU))
    predicted = logits.argmax(dim=1)
    accuracy = (predicted == labels).double().mean().item()
    report = json.loads((tmp_path / "artifacts" / "evaluation_report.json").read_text(encoding="utf-8"))
    assert report["images"] == 90 and report["accuracy"] == pytest.approx(accuracy)
    assert report["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    for i in range(10):
        for j in range(10):
            assert report["confusion_matrix"][i][j] == ((labels == i) & (predicted == j)).sum()
    assert f"accuracy {100 * accuracy:.2f} %" in output and "90 test images of digits" in output
    assert (
        f"(best validation accuracy of its training: {checkpoint['history'][-1]['Accuracy/val']:.2f} %)"
        in output
    )
    [evaluation] = (tmp_path / "tensor_board").rglob("evaluation")
    scalars = read_scalars(evaluation)
    assert scalars["Test/accuracy"][0][1] == pytest.approx(100 * accuracy, rel=1e-5)
    assert scalars["Test/loss"][0][1] == pytest.approx(report["loss"], rel=1e-5)
    assert len(curves) == 10
    for i in range(10):
        is_it, probabilities = curves[f"PrecisionRecall/{i}"]
        assert torch.equal(is_it, labels == i)
        assert torch.allclose(probabilities, torch.softmax(logits, dim=1)[:, i], atol=1e-5)


@pytest.mark.filterwarnings("error:.*[Gg]lyph")
def test_a_checkpoint_may_have_any_name(finished, lessons, tmp_path):
    """Its name is in no picture, where dollar signs would be mathematics and Chinese letters boxes."""
    source = finished("06").artifacts / "checkpoints" / "best_model_eval.pth"
    path = tmp_path / "\u6a21\u578b $x^$ {0} %s.pth"
    shutil.copy(source, path)
    output = run_lesson(lessons["06"], tmp_path, "--checkpoint", path)
    assert (
        "\u6a21\u578b $x^$ {0} %s.pth" in output and (tmp_path / "artifacts" / "error_samples.png").exists()
    )


@pytest.mark.usefixtures("no_pictures")
def test_06_records_how_the_model_was_trained_that_it_evaluates(finished, lessons, tmp_path, monkeypatch):
    for number in ["05", "06"]:
        path, texts = next(finished(number).artifacts.rglob("best_model*.pth")), []
        with monkeypatch.context() as context:
            context.setattr(
                lessons["06"].SummaryWriter, "add_text", lambda *args, texts=texts: texts.append(args[-1])
            )
            output = run_lesson(lessons["06"], tmp_path, "--checkpoint", path, "--epochs", 77)
        [text] = texts
        assert {"epochs: 1", "batch_size: 128", "lr: 0.1", "group_size: 16"} <= set(text.split("  \n"))
        assert str(path) in output and "'epochs': 1" in output and "delete" not in output


@pytest.mark.usefixtures("no_pictures")
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


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["01", "02", "04", "05"])
def test_other_lessons_never_load_the_test_split(lessons, tmp_path, monkeypatch, number):
    lesson, splits = lessons[number], []
    load_data = lesson.load_data
    monkeypatch.setattr(
        lesson, "load_data", lambda *args, train: (splits.append(train), load_data(*args, train=train))[1]
    )
    run_lesson(lesson, tmp_path, "--subset", 64)
    assert splits == [True]


@pytest.mark.usefixtures("no_pictures")
def test_06_evaluates_the_data_its_model_knows(finished, lessons, tmp_path, capsys):
    path = tmp_path / "artifacts" / "checkpoints" / "best_model_eval.pth"
    path.parent.mkdir(parents=True)
    shutil.copy(finished("06").artifacts / "checkpoints" / "best_model_eval.pth", path)
    with pytest.raises(
        SystemExit, match=f"^{re.escape(str(path))} was trained on digits, not on cifar10\\. .* delete it"
    ):
        lessons["06"].main(["--data", "cifar10", "--output-dir", str(tmp_path)])
    lessons["06"].main(["--output-dir", str(tmp_path), "--device", "cpu"])
    output = capsys.readouterr().out
    assert "of digits" in output and f"No training: {path} is there" in output and "delete it" in output
