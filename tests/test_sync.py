"""The lessons repeat each other on purpose. What two of them share must be the same text, comments included."""

import ast
import functools
import re
import sys

import pytest
from conftest import NUMBERS, PATHS, parser_of

# The lesson on which each one builds: the one before it, or, from 07 on, the one that its docstring names.
BASES = {number: f"{int(number) - 1:02d}" for number in NUMBERS[1:]}
BASES |= {"07": "04", "08": "04", "09": "02", "10": "06", "11": "02", "12": "03"}
SOURCES = {number: path.read_text(encoding="utf-8") for number, path in PATHS.items()}
DIVIDER = "\n# The lesson ends here. "

OWN = {"main", "train", "parse_args", "LESSON"}  # every lesson has its own
# What differs on purpose from the most recent earlier lesson that has it: (name, lesson): reason.
EXCEPTIONS = {
    ("train_one_epoch", "02"): "a progress bar replaces the loss of every 100 batches",
    ("HYPERPARAMETERS", "04"): "keeps --schedulers",
    ("HYPERPARAMETERS", "05"): "keeps --group-size instead",
    ("train_one_epoch", "05"): "augments the images",
    ("train_one_epoch", "07"): "has autocast and a scaler",
    ("evaluate", "07"): "has autocast",
    ("HYPERPARAMETERS", "08"): "keeps the rule instead of --schedulers",
    ("SimpleCNN", "09"): "can do without BatchNorm",
    ("train_one_epoch", "09"): "measures and clips gradients",
    ("train_one_epoch", "10"): "prepares the images for the model, and freezes layers",
    ("evaluate", "10"): "prepares the images for the model",
    ("VARIANTS", "10"): "are other variants",
    ("print_table", "10"): "is another table",
    ("plot_accuracies", "10"): "is another picture",
    ("normalize", "11"): "takes the mean and deviation of your own pictures",
    ("train_one_epoch", "11"): "normalizes by them",
    ("evaluate", "11"): "normalizes by them",
    ("read_picture", "11"): "reads pictures of every kind, and returns no batch",
    ("predict", "11"): "loads the model and prints the answer",
    ("train_one_epoch", "12"): "sums over the processes",
    ("evaluate", "12"): "sums over the processes",
    ("log_epoch", "12"): "prints images per second instead of the learning rate",
}

# What differs between the flags of a lesson and those of the most recent earlier lesson: (flag, lesson): reason.
DROPPED_FLAGS = {
    ("--predict", "04"): "predicting a picture is the point of lesson 03",
    ("--schedulers", "05"): "comparing schedules is the point of lesson 04",
    ("--resume", "06"): "lesson 06 is about evaluation and keeps its training short",
    ("--schedulers", "07"): "comparing schedules is the point of lesson 04",
    ("--resume", "07"): "its training is short",
    ("--overwrite", "07"): "it keeps no checkpoints",
    ("--schedulers", "08"): "comparing schedules is the point of lesson 04",
    ("--checkpoint", "10"): "evaluating other models is the point of lesson 06",
    ("--overwrite", "10"): "it keeps no checkpoints",
    ("--group-size", "10"): "it augments no images",
    ("--predict", "12"): "predicting a picture is the point of lesson 03",
}
DEFAULTS = {
    ("--epochs", "02"): "long enough to overfit",
    ("--epochs", "04"): "six training runs",
    ("--lr", "04"): "a learning rate that falls can start higher",
    ("--epochs", "05"): "augmented images take longer to learn",
    ("--lr", "05"): "after a warm-up, it can start higher still",
    ("--subset", "07"): "16 bits take long on a processor without instructions for them",
    ("--epochs", "08"): "more than it needs",
    ("--subset", "08"): "within minutes on a small computer",
    ("--epochs", "09"): "48 training runs",
    ("--lr", "09"): "high enough for trouble",
    ("--subset", "09"): "48 training runs",
    ("--epochs", "10"): "five classes, not augmented, are learned sooner",
    ("--lr", "10"): "that of the lessons without augmentation",
    ("--epochs", "11"): "few pictures",
    ("--lr", "11"): "few pictures",
}
HELP = {
    ("--overwrite", "06"): "trains a new model and keeps no other checkpoints",
    ("--batch-size", "12"): "counts the images of all processes",
    ("--device", "12"): "is one GPU for each process",
}

PACKAGES = {"matplotlib", "numpy", "PIL", "scipy", "seaborn", "sklearn", "torch", "torchvision", "tqdm"}
ABOVE = ["MEAN", "STD", "SimpleCNN", "normalize", "train_one_epoch"]
ABOVE += ["evaluate", "split_train_val", "log_epoch", "save_checkpoint", "load_checkpoint"]
BELOW = ["LESSON", "HYPERPARAMETERS", "ROOT", "MIRRORS", "load_data", "create_folder", "parse_args"]
UNMARKED = {"LESSON", "os.environ"}


def strip_marks(text):
    """Remove `# NEW in NN` comments, which are whole lines or ends of lines."""
    text = re.sub(r"^ *# NEW in \d\d.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"  # NEW in \d\d.*", "", text)


@functools.cache
def parts(number):
    """Return {name: text} of a lesson's functions, classes and constants, with the comments above them."""
    lines, found = SOURCES[number].splitlines(keepends=True), {}
    for node in ast.parse(SOURCES[number]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0]).split("[")[0]
        else:
            continue
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in [node, *decorators]) - 1
        while lines[first - 1].startswith("#"):
            first -= 1
        found[name] = found.get(name, "") + strip_marks("".join(lines[first : node.end_lineno]))
    return found


def earlier_lessons(number):
    """Return the lessons on which this one builds, the most recent first."""
    chain = []
    while number in BASES:
        number = BASES[number]
        chain.append(number)
    return chain


def most_recent(name, number):
    """Return the lesson from which this part comes: of those it builds on, or else of all earlier ones."""
    others = [other for other in reversed(NUMBERS) if other < number]
    return next((other for other in [*earlier_lessons(number), *others] if name in parts(other)), None)


def flags(lesson):
    """Return {flag: (default, help)} of a lesson."""
    return {action.option_strings[-1]: (action.default, action.help) for action in parser_of(lesson)._actions}


@pytest.mark.parametrize("number", NUMBERS)
def test_what_two_lessons_share_is_the_same_text(number):
    """Each part is compared with the most recent earlier lesson that has it."""
    different = set()
    for name, text in parts(number).items():
        earlier = most_recent(name, number)
        if name not in OWN and earlier and text != parts(earlier)[name]:
            different.add((name, number))
    assert different == {key for key in EXCEPTIONS if key[1] == number}


LOOPS = [
    (name, number) for number in NUMBERS for name in ["train_one_epoch", "train"] if most_recent(name, number)
]


@pytest.mark.parametrize(("name", "number"), LOOPS)
def test_lines_that_a_loop_shares_with_the_earlier_lesson_keep_their_order(name, number):
    """A reader who compares the two lessons sees additions, but nothing that was moved."""
    texts = [parts(other)[name] for other in [most_recent(name, number), number]]
    before, after = [[line.strip() for line in text.splitlines()] for text in texts]
    shared = {line for line in before if before.count(line) == after.count(line) == 1}
    assert len(shared) >= 12
    assert [line for line in before if line in shared] == [line for line in after if line in shared]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_parts_of_a_lesson_have_one_order(number):
    """Docstring, imports, network, loops, the lesson's own parts, main(), and below the divider what never changes."""
    imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(SOURCES[number]).body]
    assert SOURCES[number].startswith(f'"""Lesson {number}: ')
    assert all(imports[1 : sum(imports) + 1]) and sum(imports) > 10
    pattern = r"^(?:def |class )?(\w+)(?:\(.*:$| = )"
    above, below = (re.findall(pattern, text, flags=re.MULTILINE) for text in SOURCES[number].split(DIVIDER))
    assert above[-1] == "main" and above[:1] == (["SimpleCNN"] if number == "11" else ["MEAN"])
    for found, order in [(above, ABOVE), (below, BELOW)]:
        assert [name for name in found if name in order] == [name for name in order if name in found]


@pytest.mark.parametrize("number", NUMBERS)
def test_marks_are_those_of_the_lesson_itself(number):
    """Lesson 01 has none, because all of it is new."""
    marks = set(re.findall(r"# NEW in (\d\d)", SOURCES[number]))
    assert marks == (set() if number == "01" else {number})


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_every_new_part_is_marked(number):
    """A part that no earlier lesson has is marked above it or at its end."""
    earlier = {name for other in NUMBERS if other < number for name in parts(other)}
    for name in parts(number).keys() - earlier - UNMARKED:
        above = rf"# NEW in {number}.*\n(?:#.*\n|@.*\n)*(?:def |class )?{re.escape(name)}\b"
        at_the_end = rf"^{re.escape(name)} = .*  # NEW in {number}"
        assert re.search(f"{above}|{at_the_end}", SOURCES[number], flags=re.MULTILINE), name


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_a_lesson_has_the_flags_of_the_earlier_ones(lessons, number):
    """Their help and their defaults are the same, except for those that are listed."""
    before, after, previous = {}, flags(lessons[number]), flags(lessons[BASES[number]])
    for other in reversed(earlier_lessons(number)):
        before |= flags(lessons[other])
    assert previous.keys() - after.keys() == {flag for flag, lesson in DROPPED_FLAGS if lesson == number}
    for position, listed in [(0, DEFAULTS), (1, HELP)]:
        different = {
            flag for flag in before.keys() & after.keys() if before[flag][position] != after[flag][position]
        }
        assert different == {flag for flag, lesson in listed if lesson == number}


@pytest.mark.parametrize("number", NUMBERS)
def test_the_last_lines_are_the_same(number):
    """Ctrl-C ends a lesson without a traceback. Lessons that can be resumed say how."""
    hint = " Continue after the last saved epoch (--resume) or start again (--overwrite)."
    end = """

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\\nStopped.@")
"""
    assert SOURCES[number].endswith(end.replace("@", hint if "create_folder" in parts(number) else ""))


@pytest.mark.parametrize("number", NUMBERS)
def test_lessons_stay_short(number):
    """At most 550 lines of 110 characters, and 45 of them in main()."""
    lines = SOURCES[number].splitlines()
    assert len(lines) <= 550 and max(map(len, lines)) <= 110
    assert len(parts(number)["main"].splitlines()) <= 45


@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_imports_only_python_and_declared_packages(number):
    """It imports nothing of this repository, so it can be copied out of it."""
    nodes = list(ast.walk(ast.parse(SOURCES[number])))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= PACKAGES | set(sys.stdlib_module_names)
