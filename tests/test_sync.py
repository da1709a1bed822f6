"""The lessons repeat each other on purpose. What two neighbours share must be the same text, comments included."""

import ast
import difflib
import re
from itertools import pairwise

import pytest
import torch
from conftest import NUMBERS, PATHS
from torch import nn

PAIRS = list(pairwise(NUMBERS))
SOURCES = {number: path.read_text(encoding="utf-8") for number, path in PATHS.items()}

# What differs between two neighbours on purpose: (name, later lesson): reason.
TEXT_EXCEPTIONS = {
    **{("main", number): "each lesson's table of contents" for number in NUMBERS[1:]},
    **{("build_parser", number): "a flag is added, or a default changes" for number in NUMBERS[1:]},
    ("train_one_epoch", "02"): "a progress bar takes the place of a loss every 100 batches",
    ("train", "03"): "restores and saves checkpoints",
    ("train", "04"): "makes, steps and saves a scheduler; has arms",
    ("train", "05"): "has another recipe; augments",
    ("train", "06"): "trains one arm and cannot be resumed",
    ("HYPERPARAMETERS", "04"): "remembers --schedulers",
    ("HYPERPARAMETERS", "05"): "remembers --group-size instead",
    ("CHECKPOINT_KEYS", "04"): "holds the scheduler and the arms",
    ("CHECKPOINT_KEYS", "06"): "holds only what an evaluation needs",
    ("parse_again", "04"): "--epochs cannot change any more, because the schedules depend on it",
    ("train_one_epoch", "05"): "augments the batch",
    ("run_epoch", "05"): "hands the group size on",
}

# Flags that a lesson has and the next one does not: they are what that lesson is about.
DROPPED_FLAGS = {
    ("--predict", "04"): "predicting a picture is the point of lesson 03",
    ("--schedulers", "05"): "comparing schedules is the point of lesson 04; from 05 on the cosine is used",
    ("--resume", "06"): "lesson 06 is about evaluation and keeps its training short",
}
DEFAULT_EXCEPTIONS = {
    ("--epochs", "02"): "long enough to overfit",
    ("--epochs", "04"): "two more, for the schedules to act",
    ("--epochs", "05"): "augmented images take longer to learn",
    ("--lr", "04"): "a rate that falls can start higher",
}

# Lines that the later lesson may add to the one before and remove from it.
DIFF_BUDGET = {"02": (170, 50), "03": (205, 70), "04": (118, 80), "05": (155, 70), "06": (230, 245)}


def strip_marks(text):
    """Remove `# NEW in 0N` comments: whole lines and ends of lines."""
    text = re.sub(r"^ *# NEW in 0\d.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"  # NEW in 0\d.*", "", text)


def parts(number):
    """Return {name: text} of a lesson's functions, classes and constants, with decorators and comments above."""
    source = SOURCES[number]
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        elif isinstance(node, ast.AugAssign):
            name = node.target.id
        else:
            continue
        first = (
            min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        )
        while lines[first - 1].startswith("#"):
            first -= 1
        found[name] = found.get(name, "") + strip_marks("".join(lines[first : node.end_lineno]))
    return found


@pytest.mark.parametrize(("earlier", "later"), PAIRS)
def test_shared_parts_are_the_same_text(earlier, later):
    before, after = parts(earlier), parts(later)
    different = {(name, later) for name in before.keys() & after.keys() if before[name] != after[name]}
    assert different == {key for key in TEXT_EXCEPTIONS if key[1] == later}


def test_the_network_is_the_same_in_all_six():
    assert len({parts(number)["SimpleCNN"] for number in NUMBERS}) == 1


def test_the_lines_below_main_are_the_same_in_all_six():
    """But for the line that silences TensorBoard's thread: lesson 01 has none."""
    ends = [strip_marks(source[source.rindex('if __name__ == "__main__":') :]) for source in SOURCES.values()]
    assert len(set(ends[1:])) == 1
    assert ends[0] == re.sub(r"    threading.excepthook = .*\n", "", ends[1])


@pytest.mark.parametrize("number", NUMBERS)
def test_marks_are_those_of_the_lesson_itself(number):
    marks = re.findall(r"# NEW in (0\d)", SOURCES[number])
    assert set(marks) == (set() if number == "01" else {number})


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_every_new_part_is_marked(number):
    """A function, class or constant that the lesson before lacks has a mark above it."""
    earlier = parts(f"{int(number) - 1:02d}")
    for name in parts(number).keys() - earlier.keys():
        pattern = rf"# NEW in {number}.*\n(?:#.*\n|@.*\n)*(?:def |class )?{re.escape(name)}\b"
        at_the_end_of_its_line = rf"(?m)^{re.escape(name)} .*# NEW in {number}"
        assert re.search(pattern, SOURCES[number]) or re.search(at_the_end_of_its_line, SOURCES[number]), name


def flags(lesson):
    """Return {flag: (default, help)} of a lesson."""
    actions = lesson.build_parser()._actions
    return {action.option_strings[-1]: (action.default, action.help) for action in actions}


@pytest.mark.parametrize(("earlier", "later"), PAIRS)
def test_a_later_lesson_has_the_flags_of_the_earlier_one(lessons, earlier, later):
    before, after = flags(lessons[earlier]), flags(lessons[later])
    assert before.keys() - after.keys() == {flag for flag, number in DROPPED_FLAGS if number == later}
    shared = before.keys() & after.keys()
    assert all(before[flag][1] == after[flag][1] for flag in shared), "help"
    different = {(flag, later) for flag in shared if before[flag][0] != after[flag][0]}
    assert different == {key for key in DEFAULT_EXCEPTIONS if key[1] == later}


def test_all_six_begin_with_the_same_network(lessons):
    images = torch.randint(
        0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(8)
    results = []
    for lesson in lessons.values():
        torch.manual_seed(42)
        model = lesson.SimpleCNN()
        logits = model(lesson.to_input(images, "cpu"))
        results.append((model.state_dict(), logits, nn.CrossEntropyLoss()(logits, labels)))
    for weights, logits, loss in results[1:]:
        assert all(torch.equal(weights[name], results[0][0][name]) for name in weights)
        assert torch.equal(logits, results[0][1]) and torch.equal(loss, results[0][2])


def lines_of_code(source):
    """Return how many lines are neither blank, nor a comment, nor part of a docstring."""
    lines, docstrings = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    numbered = enumerate(lines, start=1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and n not in docstrings for n, line in numbered)


def test_lessons_stay_short():
    assert lines_of_code(SOURCES["01"]) <= 200
    assert lines_of_code(SOURCES["06"]) <= 465, "45 of them guard downloads, files and numbers"
    for number in NUMBERS:
        main = next(node for node in ast.parse(SOURCES[number]).body if getattr(node, "name", "") == "main")
        assert main.end_lineno - main.lineno + 1 <= 60, number


@pytest.mark.parametrize("number", NUMBERS)
def test_comments_explain_without_drowning_the_code(number):
    lines = [line.strip() for line in SOURCES[number].splitlines() if line.strip()]
    commented = sum("# " in line for line in lines)
    assert 0.10 <= commented / len(lines) <= 0.30


@pytest.mark.parametrize(("earlier", "later"), PAIRS)
def test_a_neighbours_diff_stays_within_its_budget(earlier, later):
    diff = list(
        difflib.ndiff(strip_marks(SOURCES[earlier]).splitlines(), strip_marks(SOURCES[later]).splitlines())
    )
    added, removed = (sum(line.startswith(sign) for line in diff) for sign in ["+ ", "- "])
    assert added <= DIFF_BUDGET[later][0] and removed <= DIFF_BUDGET[later][1], (added, removed)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_imports_nothing_of_this_repository(number):
    modules = {
        node.module for node in ast.walk(ast.parse(SOURCES[number])) if isinstance(node, ast.ImportFrom)
    }
    assert not any(module is None or module.startswith(("src", "tests", "experiments")) for module in modules)
