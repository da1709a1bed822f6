"""The lessons repeat each other on purpose. What two neighbours share must be the same text, comments included."""

import ast
import difflib
import re

import mutants
import pytest
import torch
from conftest import CPU, NUMBERS, PATHS, parser_of
from torch import nn

# The lesson to which each adds its idea: the one before it, or, from 07 on, the one that its docstring names.
BASES = {number: f"{int(number) - 1:02d}" for number in NUMBERS[1:]} | {"07": "04", "08": "04", "09": "02"}
BASES |= {"10": "06", "11": "04", "12": "03"}
PAIRS = [(earlier, later) for later, earlier in BASES.items()]
SOURCES = {number: path.read_text(encoding="utf-8") for number, path in PATHS.items()}
DIVIDER = "\n# The lesson ends here. Below: "

# What differs between two neighbours on purpose: (name, later lesson): reason.
TEXT_EXCEPTIONS = {
    **{("main", number): "each lesson's table of contents" for number in NUMBERS[1:]},
    **{("LESSON", number): "the lesson's own name" for number in NUMBERS[2:]},
    **{("parse_args", number): "a flag is added, or a default changes" for number in NUMBERS[1:]},
    ("train_one_epoch", "02"): "a progress bar takes the place of a loss every 100 batches",
    ("train", "03"): "restores and saves checkpoints",
    ("train", "04"): "makes, steps and saves a scheduler; has arms",
    ("train", "05"): "has another recipe; augments",
    ("train", "06"): "trains one arm and cannot be resumed",
    ("HYPERPARAMETERS", "04"): "remembers --schedulers",
    ("HYPERPARAMETERS", "05"): "remembers --group-size instead",
    ("train_one_epoch", "05"): "augments the batch",
    ("train_one_epoch", "07"): "autocast and scaler",
    ("evaluate", "07"): "autocast",
    ("train", "07"): "makes and saves a scaler; stops after an epoch that it is told",
    ("HYPERPARAMETERS", "07"): "remembers --precisions instead",
    ("plot_arms", "07"): "speeds instead of rates",
    ("train", "08"): "stops early; one arm",
    ("HYPERPARAMETERS", "08"): "remembers the rule instead",
    ("SimpleCNN", "09"): "can do without BatchNorm",
    ("train_one_epoch", "09"): "measures and clips gradients; nan does not stop it",
    ("train", "09"): "has dangers and clippings",
    ("HYPERPARAMETERS", "10"): "forgets --group-size",
    ("train_one_epoch", "10"): "augments nothing: it is lesson 04's",
    ("train", "10"): "augments nothing; trains on the old classes",
    ("CHECKPOINT", "11"): "has class_to_idx",
    ("HYPERPARAMETERS", "11"): "remembers the pictures instead of --schedulers",
    ("train", "11"): "reads files; saves class_to_idx",
    ("train_one_epoch", "12"): "sums over the processes",
    ("evaluate", "12"): "sums over the processes",
    ("report_epoch", "12"): "images a second instead of a rate that never changes",
    ("train", "12"): "shares the images between the processes; one of them writes",
    ("resume_hint", "12"): "names torchrun",
}

# What differs inside train(), whose other lines are those of the lesson before: words of the lines that change.
TRAIN_LINES = {
    "03": "epoch resumed folder latest "
    "best parts generators checkpoint save history epochs purge_step run_dir not Returns",
    "04": "validation name schedul "
    "latest best folder history resumed checkpoint save run_dir hparams settings summary "
    "add_summary val_loss else NEW epoch row epochs Returns Validates",
    "05": "Loss/train augment dropout "
    "ARMS loss_fn optimizer schedul name NEW Label class Nesterov val_loss model else epoch "
    "hparams TensorBoard momentum",
    "07": "precision NEW last_epoch scheduler scaler dtype cuda memory reset_peak return train_one_epoch ) figures",
    "08": "early_stopping NEW scheduler rate cosine done run_dir break Stopped save def better",
}

# Flags that a lesson has and the next one does not: they are what that lesson is about.
DROPPED_FLAGS = {
    ("--predict", "04"): "predicting a picture is the point of lesson 03",
    ("--schedulers", "05"): "comparing schedules is the point of lesson 04; from 05 on the cosine is used",
    ("--resume", "06"): "lesson 06 is about evaluation and keeps its training short",
    ("--schedulers", "07"): "comparing schedules is the point of lesson 04",
    ("--schedulers", "08"): "comparing schedules is the point of lesson 04",
    ("--checkpoint", "10"): "evaluating other lessons' models is the point of lesson 06",
    ("--group-size", "10"): "augments nothing",
    ("--schedulers", "11"): "comparing schedules is the point of lesson 04",
    ("--predict", "12"): "predicting a picture is the point of lesson 03",
}
DEFAULT_EXCEPTIONS = {
    ("--epochs", "02"): "long enough to overfit",
    ("--epochs", "04"): "six trainings",
    ("--epochs", "05"): "augmented images take longer to learn",
    ("--lr", "04"): "a rate that falls can start higher",
    ("--lr", "05"): "after a warm-up, a higher one still",
    ("--subset", "07"): "without instructions for 16 bits, an epoch takes long",
    ("--epochs", "08"): "more than it needs",
    ("--subset", "08"): "within ten minutes on a small computer",
    ("--epochs", "09"): "21 short trainings",
    ("--subset", "09"): "21 short trainings",
    ("--lr", "09"): "high enough for trouble",
    ("--epochs", "10"): "five classes, not augmented, are learned sooner",
    ("--lr", "10"): "that of the lessons without augmentation",
    ("--epochs", "11"): "few pictures",
}
HELP_EXCEPTIONS = {
    ("--resume", "04"): "the folder of a run, since each arm has its own checkpoints",
    ("--batch-size", "12"): "of all processes",
    ("--device", "12"): "a GPU for each process",
}

# Lines that the later lesson may add to the one before and remove from it.
DIFF_BUDGET = {"02": (143, 38), "03": (181, 56), "04": (125, 82), "05": (161, 99), "06": (235, 205)}
DIFF_BUDGET |= {"07": (200, 142), "08": (127, 110), "09": (152, 91)}
DIFF_BUDGET |= {"10": (237, 243), "11": (285, 117), "12": (177, 108)}

# How long a lesson may be, blank lines and docstring included: as a whole, and above the dividing comment.
LENGTHS = {
    "01": (214, 115),
    "02": (327, 204),
    "03": (457, 306),
    "04": (497, 347),
    "05": (560, 410),
    "06": (591, 463),
    "07": (557, 391),
    "08": (513, 360),
    "09": (392, 271),
    "10": (592, 464),
    "11": (670, 481),
    "12": (524, 369),
}


def strip_marks(text):
    """Remove `# NEW in NN` comments: whole lines and ends of lines."""
    text = re.sub(r"^ *# NEW in \d\d.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"  # NEW in \d\d.*", "", text)


def parts(number):
    """Return {name: text} of a lesson's functions, classes and constants, with decorators and comments above."""
    source = SOURCES[number]
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0]).split("[")[0]
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


def test_the_network_is_the_same_in_all_lessons_but_one():
    assert len({parts(number)["SimpleCNN"] for number in NUMBERS if number != "09"}) == 1


def test_the_lines_below_main_are_the_same_in_all_lessons():
    ends = {source[source.rindex('if __name__ == "__main__":') :] for source in SOURCES.values()}
    assert len(ends) == 1


@pytest.mark.parametrize("number", NUMBERS)
def test_a_reader_who_stops_at_the_divider_has_read_the_lesson(number):
    """Docstring, imports, the network, the loops, the lesson's own functions, main(); below what never changes."""
    assert SOURCES[number].count(DIVIDER) == 1
    above, below = SOURCES[number].split(DIVIDER)
    names = re.findall(r"^(?:def|class) (\w+)", above, flags=re.MULTILINE)
    begin = ["SimpleCNN", "train_one_epoch", "evaluate", "report_epoch", "save_checkpoint", "load_checkpoint"]
    special = {"01": begin[:2], "02": begin[:4], "09": ["SimpleCNN", "clip_gradients", *begin[1:3]]}
    expected = special.get(number, begin)
    assert names[: len(expected)] == expected and names[-1] == "main"
    plumbing = re.findall(r"^(?:def|class) (\w+)", below, flags=re.MULTILINE)
    first = ["stop_if_diverged", "to_device", "to_input", "load_data"]
    first = first[1:] if number == "09" else first  # there, nan is no reason to stop
    assert plumbing[: len(first)] == first and plumbing.count("parse_args") == 1
    shared = {"split_train_val", "new_run_dirs", "find_newest", "resume_hint", "describe_processor"}
    shared |= {"make_pictures"}
    assert set(plumbing[len(first) :]) - {"parse_args"} <= shared


@pytest.mark.parametrize("number", NUMBERS)
def test_marks_are_those_of_the_lesson_itself(number):
    marks = re.findall(r"# NEW in (\d\d)", SOURCES[number])
    assert set(marks) == (set() if number == "01" else {number})


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_every_new_part_is_marked(number):
    """A function, class or constant that the lesson before lacks has a mark above it."""
    earlier = parts(BASES[number])
    settings = {
        "LESSON",
        "HYPERPARAMETERS",
        "CHECKPOINT",
        "quote",
        "os.environ",
    }  # below the divider, or imports
    for name in parts(number).keys() - earlier.keys() - settings:
        pattern = rf"# NEW in {number}.*\n(?:#.*\n|@.*\n)*(?:def |class )?{re.escape(name)}\b"
        at_its_end = rf"^{re.escape(name)} = .*  # NEW in {number}"
        assert re.search(f"{pattern}|{at_its_end}", SOURCES[number], flags=re.MULTILINE), name


@pytest.mark.parametrize("number", [*TRAIN_LINES, "06"])
def test_train_differs_from_the_lesson_before_only_where_it_must(number):
    """Every line of train() that is not in the lesson before has one of the words that the lesson is about."""
    if number == "06":
        before = {line.strip() for line in parts("05")["train"].splitlines()}
        new = [line for line in parts("06")["train"].splitlines() if line.strip() not in before]
        assert len(new) <= 9, new
        return
    before = {line.strip() for line in parts(BASES[number])["train"].splitlines()}
    for line in parts(number)["train"].splitlines():
        is_new = line.strip(' "') and line.strip() not in before
        assert not is_new or any(word in line for word in TRAIN_LINES[number].split()), line


def flags(lesson):
    """Return {flag: (default, help)} of a lesson."""
    return {action.option_strings[-1]: (action.default, action.help) for action in parser_of(lesson)._actions}


@pytest.mark.parametrize(("earlier", "later"), PAIRS)
def test_a_later_lesson_has_the_flags_of_the_earlier_one(lessons, earlier, later):
    before, after = flags(lessons[earlier]), flags(lessons[later])
    assert before.keys() - after.keys() == {flag for flag, number in DROPPED_FLAGS if number == later}
    shared = before.keys() & after.keys()
    for position, exceptions in [(0, DEFAULT_EXCEPTIONS), (1, HELP_EXCEPTIONS)]:
        different = {(flag, later) for flag in shared if before[flag][position] != after[flag][position]}
        assert different == {key for key in exceptions if key[1] == later}


def test_all_lessons_begin_with_the_same_network(lessons):
    images = torch.randint(
        0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(8)
    results = []
    for lesson in lessons.values():
        torch.manual_seed(42)
        model = lesson.SimpleCNN()
        logits = model(lesson.to_input(images, CPU))
        results.append((model.state_dict(), logits, nn.CrossEntropyLoss()(logits, labels)))
    for weights, logits, loss in results[1:]:
        assert all(torch.equal(weights[name], results[0][0][name]) for name in weights)
        assert torch.equal(logits, results[0][1]) and torch.equal(loss, results[0][2])


@pytest.mark.parametrize("number", NUMBERS)
def test_lessons_stay_short(number):
    lines = SOURCES[number].splitlines()
    above = SOURCES[number].split(DIVIDER)[0].splitlines()
    assert (len(lines) <= LENGTHS[number][0]) and (len(above) <= LENGTHS[number][1]), (len(lines), len(above))
    assert max(map(len, lines)) <= 110
    main = next(node for node in ast.parse(SOURCES[number]).body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno + 1 <= 45


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


def test_every_mistake_of_mutants_py_can_still_be_made():
    """The texts that it replaces are those of today, in every lesson that it names."""
    for mistake, (chosen, file, *edits) in mutants.MUTANTS.items():
        numbers = mutants.numbers_of(chosen)
        assert file in mutants.FILES
        assert all(text in SOURCES[number] for number in numbers for text in edits[::2]), mistake
