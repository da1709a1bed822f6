"""What the guides and the docstrings tell people to type works, what they name exists, and both languages agree."""

import importlib
import re
import shlex

import pytest
import tables
from conftest import PATHS, ROOT

LESSONS = list(PATHS.values())
CPU_FLAGS = ["--device", "cpu"]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "src").rglob("*.md"), *LESSONS, *(ROOT / "src/benchmarks").glob("*.py")]
)
GUIDES = [path for path in DOCUMENTS if path.suffix == ".md"]
CHINESE = [path for path in GUIDES if path.name.endswith(".zh-CN.md")]
PAGES = [path for path in GUIDES if path.name[:2].isdigit()]  # one for each lesson from 07 on
LESSON_COMMAND = re.compile(
    r"python[\w.]* +(src[/\\]experiments[/\\]model_train[/\\](\d\d)_\w+\.py)([^\n`|&#]*)"
)
BENCHMARK_COMMAND = re.compile(r"python[\w.]* +src/benchmarks/(\w+)\.py([^\n`|&#]*)")


def name(path):
    """Return how a test calls a document."""
    return str(path.relative_to(ROOT))


def read(path):
    return path.read_text(encoding="utf-8")


def english_twin(path):
    return path.with_name(path.name.replace(".zh-CN.md", ".md"))


def without_code(text):
    """Return the text without its code blocks, in which a # is no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


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
    assert "JPEG copy of CIFAR-10" in docstring and "seed" in docstring, "measured figures say on what"
    assert "Exercises" in docstring or "# Exercises" in read(path)


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
        re.findall(r"^```.*?^```", read(path), flags=re.M | re.S) for path in [english_twin(chinese), chinese]
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
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", "", without_code(read(chinese)))
    assert re.findall(rf"{han} ?[,:;?!(].{{,20}}|.{{,20}}[,:;?!)] ?{han}", prose) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_key_code_of_a_page_is_the_lessons_own(page):
    """Every line of it, in that order; and the page is short, of one form, and ends with the diff."""
    number, text = page.name[:2], read(page)
    lines = iter([line.strip() for line in read(PATHS[number]).splitlines()])
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks and all(line.strip() in lines for block in blocks for line in block.splitlines() if line)
    assert len(text.splitlines()) <= 150
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    if page not in CHINESE:
        form = ["Key code", "What you learn", "Run it", "What it prints", "What it writes", "TensorBoard"]
        form += ["Measured", "Common mistakes", "Exercises"]
        assert headings[:9] == form and headings[9].startswith("Compare with lesson ")
    commands = re.findall(r"--output-dir (\S+)", text)
    assert commands == ["quick"], "the quick look leaves the results of a full run alone"
    assert PATHS[number].name in text.splitlines()[-2], "the last line is the diff"


def test_every_page_has_a_twin_and_is_linked_from_both_guides():
    assert {path.name[:2] for path in PAGES} == {number for number in PATHS if number >= "07"}
    for page in PAGES:
        guide = page.with_name("README.zh-CN.md" if page in CHINESE else "README.md")
        assert f"]({page.name})" in read(guide)
    assert {english_twin(path) for path in PAGES if path in CHINESE} == set(PAGES) - set(CHINESE)


def test_pictures_are_few_small_and_all_used():
    pictures = sorted((ROOT / "docs" / "images").glob("*"))
    assert pictures and all(path.suffix == ".png" for path in pictures)
    assert sum(path.stat().st_size for path in pictures) <= 2e6
    shown = "".join(read(path) for path in GUIDES)
    assert [path.name for path in pictures if f"docs/images/{path.name})" not in shown] == []


def test_readme_lists_every_lesson_and_the_two_commands():
    readme = read(ROOT / "README.md")
    assert all(f"`{path.name}`" in readme for path in LESSONS)
    install = (
        "python3 -m venv .venv && .venv/bin/python -m pip install -r requirements.txt && .venv/bin/python "
    )
    assert install + "src/experiments/model_train/01_basic_training.py\n" in readme
    assert install + "-m pytest\n" in readme


def test_the_two_lists_of_requirements_are_one():
    """pyproject.toml serves tools that read it, requirements.txt pip; and an old Python is refused at once."""
    project = read(ROOT / "pyproject.toml")
    listed = re.findall(r'^    "([^"]+)",$', project.split("dependencies = [")[1].split("]")[0], flags=re.M)
    assert listed == read(ROOT / "requirements.txt").split()
    assert 'requires-python = ">=3.10"' in project
    assert "tensorboard>=2.21" in listed, "older ones do not start beside a new setuptools"
    first_lines = read(ROOT / "README.md").split("## Lessons")[0]
    assert "python3 --version" in first_lines and "3.10" in first_lines
