"""What the guides and the docstrings tell people to type works, what they name exists, and both languages agree."""

import ast
import importlib
import json
import re
import shlex
import statistics

import pytest
import tables
import torch
from common import load_lesson
from conftest import PATHS, ROOT, TINY
from PIL import Image
from test_sync import BASES
from torch.utils.data import TensorDataset

LESSONS = list(PATHS.values())
CPU_FLAGS = ["--device", "cpu"]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "src").rglob("*.md"),
        *LESSONS,
        *(ROOT / "src/benchmarks").glob("*.py"),
    ]
)
GUIDES = [path for path in DOCUMENTS if path.suffix == ".md"]
CHINESE = [path for path in GUIDES if path.name.endswith(".zh-CN.md")]
PAGES = [path for path in GUIDES if path.name[:2].isdigit()]  # one for each lesson
HUB = ROOT / "src" / "experiments" / "model_train" / "README.md"
LESSON_COMMAND = re.compile(
    r"(?:python[\w.]*|torchrun) +(?:-m torch\.distributed\.run [^\n`]*?|--standalone [^\n`]*?)?"
    r"(src[/\\]experiments[/\\]model_train[/\\](\d\d)_\w+\.py)([^\n`|&#]*)"
)
BENCHMARK_COMMAND = re.compile(r"python[\w.]* +src/benchmarks/(\w+)\.py([^\n`|&#]*)")


def name(path):
    """Return how a test calls a document."""
    return str(path.relative_to(ROOT))


def read(path):
    return path.read_text(encoding="utf-8")


def unwrapped(path):
    """Return a document's text without its line breaks, in which a sentence can be looked for."""
    return " ".join(read(path).split())


def measured(name):
    """Return what docs/NAME.json holds."""
    return json.loads(read(ROOT / "docs" / f"{name}.json"))


def within(values, digits=0):
    """Return the least and the greatest of the values, in the words of the guides."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def english_twin(path):
    return path.with_name(path.name.replace(".zh-CN.md", ".md"))


def without_code(text):
    """Return the text without its code blocks, in which a # is no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def without_words(block):
    """Return a code block without its words: comments, what stands beside a path, and the names in a diagram."""
    if block.startswith("```mermaid"):
        return re.sub(r"(\d\d)\[.*?\]", r"\1", block)
    if block.startswith("```python"):
        return re.sub(r" *#.*$", "", block, flags=re.MULTILINE)
    return re.sub(r"^( *\S*[/.]\S*(?:, \S+)*) {2,}.*$", r"\1", block, flags=re.MULTILINE)


def anchors(path):
    """Return the anchors of a document's headings, as GitHub makes them: lower case, no punctuation, - for a space."""
    headings = re.findall(r"^#+ (.*)$", without_code(read(path)), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_command_parses_with_its_scripts_own_parser(lessons, document):
    for file, number, flags in LESSON_COMMAND.findall(read(document)):
        assert (ROOT / file.replace("\\", "/")).exists(), file
        lessons[number].parse_args([*shlex.split(flags), *CPU_FLAGS])
    for script, flags in BENCHMARK_COMMAND.findall(read(document)):
        assert (ROOT / "src" / "benchmarks" / f"{script}.py").exists(), script
        if flags.strip():
            importlib.import_module(script).build_parser().parse_args(shlex.split(flags))


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_every_lesson_says_how_to_run_it_and_what_to_expect(path):
    docstring = read(path).split('"""')[1]
    assert docstring.startswith(f"Lesson {path.stem[:2]}: ")
    commands = LESSON_COMMAND.findall(docstring)
    assert len(commands) >= 2 and all(file.endswith(path.name) for file, _, _ in commands)
    assert "--subset" in docstring, "a quick look"
    assert "JPEG copy of CIFAR-10" in " ".join(docstring.split()), "measured figures say on what"
    assert "seed" in docstring


@pytest.mark.parametrize("document", GUIDES, ids=name)
def test_links_lead_to_files_and_to_headings(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(read(document)))
    assert targets
    for target in targets:
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (document.parent / file) if file else document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("document", GUIDES, ids=name)
def test_measured_figures_are_those_of_the_result_files(document):
    """If this fails, run: python src/benchmarks/tables.py"""
    language = "zh" if document in CHINESE else "en"
    assert "<!-- table: " in read(document) or document in PAGES
    assert tables.fill(read(document), language) == read(document)


@pytest.mark.parametrize("chinese", CHINESE, ids=name)
def test_both_languages_have_the_same_structure(chinese):
    """The same headings, commands, pictures, tables and links, in the same order."""
    for pattern in [
        r"^#+ ",  # headings, by their level
        r"!\[[^\]]+\]\(([^)]+)\)",  # pictures
        r"<!-- .*? -->",  # where the measured tables stand
        r"^ *(?:-|\d\.) ",  # list items
        r"\*\*.+?(\*\*)",  # what is printed bold
    ]:
        found = [
            re.findall(pattern, without_code(read(path)), flags=re.MULTILINE)
            for path in [english_twin(chinese), chinese]
        ]
        assert found[0] == found[1], pattern
    blocks = [
        [without_words(block) for block in re.findall(r"^```.*?^```", read(path), flags=re.M | re.S)]
        for path in [english_twin(chinese), chinese]
    ]
    assert blocks[0] == blocks[1]
    rows = [
        [line.count("|") for line in without_code(read(path)).splitlines() if line.startswith("|")]
        for path in [english_twin(chinese), chinese]
    ]
    assert rows[0] == rows[1], "a table has another number of rows or columns"
    links = [
        [
            target.replace(".zh-CN", "").partition("#")[0]
            for target in re.findall(r"\]\(([^)\s]+)\)", read(path))
        ]
        for path in [english_twin(chinese), chinese]
    ]
    assert links[0] == links[1]


@pytest.mark.parametrize("chinese", CHINESE, ids=name)
def test_both_languages_have_the_same_code_and_figures(chinese):
    for pattern in [r"`[^`\n]+`", r"\d[\d.,]*\d|\d"]:
        found = [
            sorted(re.findall(pattern, without_code(read(path)))) for path in [english_twin(chinese), chinese]
        ]
        assert found[0] == found[1], pattern


@pytest.mark.parametrize("chinese", CHINESE, ids=name)
def test_chinese_sentences_have_chinese_punctuation(chinese):
    han = "[\u4e00-\u9fff]"
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>|\([N\d, ]+\)", "", without_code(read(chinese)))  # (N, 3)
    assert re.findall(rf"{han} ?[,:;?!(].{{,20}}|.{{,20}}[,:;?!)] ?{han}", prose) == []


HEADINGS = {
    ".md": [
        "New in this lesson",
        "The code",
        "How it works",
        "Run it",
        "Results",
        "Common mistakes",
        "Exercises",
        "Next",
    ],
    ".zh-CN.md": ["本课新内容", "关键代码", "原理", "运行", "结果", "常见错误", "练习", "下一课"],
}


def key_code(page):
    """Return the block of Python under a page's heading "The code"."""
    heading = HEADINGS[".zh-CN.md" if page in CHINESE else ".md"][1]
    section = re.search(rf"^## {heading}\n(.*?)^## ", read(page), flags=re.MULTILINE | re.DOTALL)[1]
    [block] = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return block


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_code_of_a_page_makes_sense_by_itself(page, monkeypatch, tmp_path):
    """It runs with the script's definitions above it, on some images; both languages have the same statements."""
    block = key_code(page)
    assert 15 <= len(block.splitlines()) <= 40
    assert ast.dump(ast.parse(block)) == ast.dump(ast.parse(key_code(english_twin(page))))
    monkeypatch.chdir(tmp_path)
    lesson = load_lesson(page.name[:2])
    images, labels, class_names, _ = lesson.load_data("digits", tmp_path, train=True)
    images, labels = images[:160], labels[:160]
    split = TensorDataset(images[:128], labels[:128]), TensorDataset(images[128:], labels[128:])
    data = {"images": images, "labels": labels, "class_names": class_names}
    exec(block, vars(lesson) | data | dict(zip(["train_set", "val_set"], split, strict=True)))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_have_one_form(page):
    number, text = page.name[:2], read(page)
    assert len(text.splitlines()) <= 220
    headings = re.findall(r"^## (.*)$", without_code(text), flags=re.MULTILINE)
    expected = HEADINGS[".zh-CN.md" if page in CHINESE else ".md"]
    assert [heading for heading in headings if heading in expected] == expected
    assert headings[-1] == expected[-1]
    assert set(re.findall(r"--output-dir ([\w/]+)", text)) == {"quick"}, "full runs are left alone"
    assert "<details>" in text, "exercises have answers"
    assert text.splitlines()[-2].startswith("git diff --no-index src/experiments/model_train/")
    if number != "01":
        stem = PATHS[number].stem
        assert f"\ntensorboard --logdir tensor_board/{stem}\n" in text
        assert f"\ntensorboard --logdir quick/tensor_board/{stem}\n" in text


@pytest.mark.parametrize("page", [page for page in PAGES if page not in CHINESE], ids=name)
def test_the_quick_commands_of_a_page_work_one_after_the_other(
    lessons, page, monkeypatch, tmp_path, no_pictures, seconds, capsys
):
    """For somebody who ran nothing else before; here on some digits, and in the folder that they are typed in."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("cat.jpg")  # "stands for its name"
    commands = [
        (number, flags) for _, number, flags in LESSON_COMMAND.findall(read(page)) if "quick" in flags
    ]
    assert commands
    for number, flags in commands:
        flags = shlex.split(flags.replace("cifar10_run", "digits_run"))
        if not {"--resume", "--predict", "--checkpoint"} & set(flags):  # those keep what the run before had
            flags += ["--data", "digits", *TINY[number]]
        lessons[number].main([*flags, "--device", "cpu"])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert {path.name for path in tmp_path.iterdir()} == {"cat.jpg", "quick"}, (
        "and nothing beside that folder"
    )
    stem = PATHS[page.name[:2]].stem
    assert page.name[:2] == "01" or list((tmp_path / "quick" / "tensor_board" / stem).rglob("events.out.*"))


@pytest.mark.parametrize("document", [*GUIDES, *LESSONS], ids=name)
def test_no_quick_look_and_no_exercise_touches_a_full_run(document):
    text = read(document)
    commands = [flags for _, _, flags in LESSON_COMMAND.findall(text)]
    exercises = re.findall(r"^## (?:Exercises|练习)\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    commands += [flags for part in exercises for flags in re.findall(r"`(--[^`]*)`", part)]
    trains = r"--(epochs|subset|lr|seed|schedulers|patience|precisions) "
    for flags in commands:
        if re.match(trains, flags.strip()):
            assert "--output-dir quick" in flags or "--subset 50000" in flags, flags


def test_what_a_docstring_promises_is_what_was_measured():
    results = measured("results")

    def values(number, arm="", key="val_accuracy"):
        return [entry["arms"][arm][key] for entry in tables.pick(results, number)]

    def mean(number, arm="", key="val_accuracy"):
        return f"{statistics.mean(values(number, arm, key)):.1f}"

    def minutes(number):
        seconds = [entry["seconds"] for entry in tables.pick(results, number) if entry["seconds"]]
        return f"{statistics.median(seconds) / 60:.0f} minutes"

    def draws(arm, count):
        found = [draw for entry in values("10", f"{arm}_{count}", "draws") for draw in entry]
        return f"{statistics.mean(found):.1f}"

    arms = tables.pick(results, "04")[0]["arms"]
    schedules = [statistics.mean(values("04", arm)) for arm in arms if arm != "Constant"]
    default = [rules["Accuracy/val 5 0.2"] for rules in values("08", key="rules")]
    reached = [best - rule["lost_points"] for best, rule in zip(values("08"), default, strict=True)]
    danger = "images_x_255"
    counts = [10, 50, 250]
    scratch = [draws("scratch", count) for count in counts]
    tuned = [draws("fine_tuned", count) for count in counts]
    promises = {
        "01": [
            f"takes {minutes('01')} on 2 CPU cores and reaches {values('01', key='train_accuracy')[0]:.0f} %"
        ],
        "02": [f"takes {minutes('02')} on 2 CPU cores, reaches about {float(mean('02')):.0f} %"],
        "03": [f"takes {minutes('03')} on 2 CPU cores and reaches about {float(mean('03')):.0f} %"],
        "04": [
            f"take {minutes('04')} on 2 CPU cores. They reach {within(schedules, 1)} % validation accuracy with "
            f"the schedules and {mean('04', 'Constant')} %",
        ],
        "05": [
            f"They reach {mean('05', 'without_augmentation')} % validation accuracy without, "
            f"{mean('05', 'with_augmentation')} % with, and {mean('05', 'strong_augmentation')} % with strong",
        ],
        "06": [
            f"trains a model for {minutes('06')} on 2 CPU cores",
            f"reaches {mean('06', key='test_accuracy')} % test accuracy",
        ],
        "07": [
            f"Expect {within(values('07', 'float32'), 1)} % validation accuracy in float32 "
            f"and {within(values('07', 'bfloat16'), 1)} % in bfloat16"
        ],
        "08": [
            f"after epoch {within([rule['stops_after'] for rule in default])} of at most 30, with "
            f"{within(reached, 1)} % validation accuracy"
        ],
        "09": [
            f"lower the validation accuracy from {mean('09', 'none_none')} to {mean('09', danger + '_none')} %; "
            f"with the norm clipped it is {mean('09', danger + '_norm_50')} %"
        ],
        "10": [
            f"{scratch[0]}, {scratch[1]} and {scratch[2]} % test accuracy from scratch, "
            f"and {tuned[0]}, {tuned[1]} and {tuned[2]} % fine-tuned",
        ],
        "11": [
            f"Split by file, validation promises {mean('11', 'by_file')} %, but new groups of pictures get "
            f"{mean('11', 'by_file', 'test_accuracy')} %. Split by group, it is {mean('11', 'by_group')} and "
            f"{mean('11', 'by_group', 'test_accuracy')} %"
        ],
        "12": [f"Expect {mean('12')} % validation accuracy in one process"],
    }
    for number, sentences in promises.items():
        docstring = unwrapped(PATHS[number]).split('"""')[1]
        for sentence in sentences:
            assert sentence in docstring, f"lesson {number}: {sentence}"


def test_page_08_quotes_the_run_of_seed_42():
    page = read(PATHS["08"].with_suffix(".md"))
    for name, rule in tables.pick(measured("results"), "08")[0]["arms"][""]["rules"].items():
        stops = f"epoch {rule['stops_after']:2}" if rule["stops_after"] else "not in 30"
        row = r"\n  {:12} {:>9} {:>10} {:>13} {:11} {:3} epochs .* {:.2f} points\n"
        row = row.format(*name.split(), stops, rule["best_epoch"], rule["saved_epochs"], rule["lost_points"])
        assert re.search(row.replace("  ", " +"), page), row


def test_common_mistakes_cost_what_was_measured():
    """Page 01, 04 and 05; the Chinese pages have the same figures as these."""
    mistakes = measured("mistakes")

    def last(lesson, mistake, curve="train_accuracy", arm=""):
        return mistakes[lesson][mistake][arm][curve][-1]

    def augmented(mistake, curve="val_accuracy"):
        return last("05", mistake, curve, "with_augmentation")

    def plain(mistake):
        return last("05", mistake, "val_accuracy", "without_augmentation")

    def cosine(mistake):
        return last("04", mistake, "val_accuracy", "CosineAnnealingLR")

    summed = mistakes["01"]["no zero_grad"][""]["train_loss"]
    expected = {
        "01": [
            f"Measured with `{mistakes['01']['flags']}`",
            f"the last epoch reaches {last('01', 'none'):.1f} % training accuracy",
            f"from {summed[0]:.2f} in the first epoch to {summed[-1]:.1f} in the fifth",
            f"accuracy reaches only {last('01', 'softmax before the loss'):.1f} %",
            f"At 0.5 it falls only to {last('01', '--lr 0.5', 'train_loss'):.2f}, "
            f"with {last('01', '--lr 0.5'):.0f} %",
            f"slow: {last('01', '--lr 0.0005'):.0f} % in the last epoch",
        ],
        "04": [
            f"ended at {cosine('T_max=epochs // 2'):.0f} % validation accuracy, "
            f"with the right one at {cosine('none'):.0f} %"
        ],
        "05": [
            f"Measured with `{mistakes['05']['flags']}`",
            f"{augmented('validation augmented'):.0f} instead of {augmented('none'):.0f} % for the network with",
            f"{plain('validation augmented'):.0f} instead of {plain('none'):.0f} % for the one without",
            f"{augmented('transformed once', 'train_accuracy'):.0f} % on training images and "
            f"{augmented('transformed once'):.0f} % on validation images",
            f"it is {augmented('none', 'train_accuracy'):.0f} and {augmented('none'):.0f} %",
        ],
    }
    for lesson, sentences in expected.items():
        [page] = [page for page in PAGES if page.name.startswith(lesson) and page not in CHINESE]
        for sentence in sentences:
            assert sentence in read(page), sentence


def test_ways_to_train_are_judged_as_they_were_measured():
    """What docs/benchmarks.md says below the table of lesson 05's recipe; the Chinese page has the same figures."""
    accuracy = {}
    for run in measured("recipes"):
        if run["best_accuracy"] and not run["recipe"].startswith(("SGD", "AdamW")):
            accuracy.setdefault(run["recipe"], {})[run["seed"]] = run["best_accuracy"]
    own = accuracy["lesson 05"]
    difference = {
        way: statistics.mean(found - own[seed] for seed, found in seeds.items())
        for way, seeds in accuracy.items()
    }
    text = unwrapped(ROOT / "docs" / "benchmarks.md")
    same, half = -difference["no warm-up"], -difference["half the learning rate, no warm-up"]
    assert f"of half of them ends {-difference['rotation always']:.2f} points lower" in text
    assert f"of 4 pixels instead of 2 ends {-difference['padding 4']:.2f} points lower" in text
    assert (
        f"without the warm-up the same learning rate ends {same:.2f} points lower, and half of it {half:.2f}"
        in text
    )
    more = ["rotation always", "padding 4", "no warm-up", "half the learning rate, no warm-up"]
    assert max(difference[way] for way in more) < -statistics.stdev(own.values())
    less = ["warm-up and linear decay", "alternating flips"]
    less += ["batches of 64, half the learning rate", "batches of 256, twice the learning rate"]
    assert max(abs(difference[way]) for way in less) < statistics.stdev(own.values())
    [longer] = [way for way in accuracy if way.startswith("30 epochs")]
    assert difference[longer] < -statistics.stdev(own.values())
    assert all(len(seeds) == 3 for seeds in accuracy.values())


def test_every_page_has_a_twin_and_is_linked_from_both_guides():
    assert {path.name[:2] for path in PAGES} == set(PATHS)
    for page in PAGES:
        guide = page.with_name("README.zh-CN.md" if page in CHINESE else "README.md")
        assert f"]({page.name})" in read(guide)
        script = PATHS[page.name[:2]].relative_to(ROOT).as_posix()
        first_page = read(ROOT / guide.name)
        assert f"]({script})" in first_page and f"]({page.relative_to(ROOT).as_posix()})" in first_page
    assert {english_twin(path) for path in PAGES if path in CHINESE} == set(PAGES) - set(CHINESE)


def test_the_hub_is_short_and_its_path_is_that_of_the_lessons():
    text = read(HUB)
    assert len(text.splitlines()) <= 300
    arrows = re.findall(r"^    (\d\d).*? --> (\d\d)\[", text, flags=re.MULTILINE)
    assert {later: earlier for earlier, later in arrows} == BASES
    tree = re.search(r"## Where everything is\n+```\n(.*?)```", text, flags=re.DOTALL)[1]
    for line in tree.splitlines():
        for path in re.split(r", ", line.split("   ")[0]):
            written = path.startswith(("data/", "quick/", "artifacts/c"))  # by the lessons
            assert written or (ROOT / path).exists(), path


def test_the_layers_of_lesson_01s_page_are_those_of_the_network(lessons):
    text = read(HUB.with_name("01_basic_training.md"))
    rows = re.findall(r"^\| `(\w+)` \| .*? \| ([\d,]+) \|", text, flags=re.MULTILINE)
    model = lessons["01"].SimpleCNN()
    expected = {
        name: sum(weights.numel() for weights in layer.parameters()) for name, layer in model.named_children()
    }
    del expected["dropout"]  # has none
    assert {name: int(count.replace(",", "")) for name, count in rows} == expected
    shapes = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: output.shape[1:]}))
    model(torch.zeros(2, 3, 32, 32))
    for name, shape in re.findall(r"^\| `(\w+)` \| \(N, ([\d, ]+)\)", text, flags=re.MULTILINE):
        assert list(shapes[name]) == [int(size) for size in shape.split(", ")], name


def test_page_06_quotes_what_the_examples_of_argmax_print(lessons, capsys):
    lessons["06"].explain_argmax()
    printed = capsys.readouterr().out
    assert printed in read(HUB.with_name("06_detailed_evaluation.md"))
    assert printed in read(HUB.with_name("06_detailed_evaluation.zh-CN.md"))


def test_the_worked_example_of_the_metrics_is_right():
    text = read(HUB.with_name("06_detailed_evaluation.md"))
    true_positives, false_negatives, false_positives = 90, 10, 30
    recall = true_positives / (true_positives + false_negatives)
    precision = true_positives / (true_positives + false_positives)
    f1 = 2 * precision * recall / (precision + recall)
    assert f"90 / 100 = {recall:.2f}" in text and f"90 / 120 = {precision:.2f}" in text
    assert f"2 · {precision:.2f} · {recall:.2f} / {precision + recall:.2f} = {f1:.2f}" in text


def test_pictures_are_few_small_and_all_used():
    pictures = sorted((ROOT / "docs" / "images").glob("*"))
    assert pictures and all(path.suffix == ".png" for path in pictures)
    assert sum(path.stat().st_size for path in pictures) <= 2e6
    shown = "".join(read(path) for path in GUIDES)
    assert [path.name for path in pictures if f"docs/images/{path.name})" not in shown] == []


def test_readme_lists_every_lesson_and_the_two_commands():
    """They create and activate the environment, so that every other command is plain python or tensorboard."""
    readme = read(ROOT / "README.md")
    assert all(f"`{path.name}`" in readme for path in LESSONS)
    install = "python3 -m venv .venv && . .venv/bin/activate && python -m pip install -r requirements.txt"
    assert f"\n{install}\npython src/experiments/model_train/01_basic_training.py\n" in readme
    assert f"\n{install} && python -m pytest\n" in readme
    for document in GUIDES:
        assert not re.search(r"\.venv\S*python|tensorboard\.main", read(document)) or document.name[:2] > "06"


def test_the_two_lists_of_requirements_are_one():
    """pyproject.toml serves tools that read it, requirements.txt pip; and an old Python is refused at once."""
    project = read(ROOT / "pyproject.toml")
    listed = re.findall(r'^    "([^"]+)",$', project.split("dependencies = [")[1].split("]")[0], flags=re.M)
    assert listed == read(ROOT / "requirements.txt").split()
    assert 'requires-python = ">=3.10"' in project
    assert "tensorboard>=2.21" in listed, "older ones do not start beside a new setuptools"
    first_lines = read(ROOT / "README.md").split("## Lessons")[0]
    assert "python3 --version" in first_lines and "3.10" in first_lines
