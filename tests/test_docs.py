"""README.md and docs/*.md: links, anchors, and paths exist; commands have existing options."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.results import ROOT, pages
from configs import track_options
from configs.options import ALL, OPTIONS, parse
from preprocessing import cli, options

COMMAND = re.compile(r"(?:\.venv/bin/)?python +(?P<what>-m [\w.]+|\w+\.py)(?P<arguments>.*)")
NAMES = {option.name for option in OPTIONS} | {"config"}


def code_lines(text):
    """The lines of code blocks, with continued lines joined, and the code in running text."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.partition(" #")[0] for line in lines] + inline


def anchors(page):
    """Anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.name)
def test_named_files_of_the_project_exist(page):
    named = re.findall(r"(?<![\w/.])((?:configs|models|training|tests|preprocessing|losses|third_party|benchmarks|docs)"
                       r"/[\w/.-]*\w)", page.read_text())
    for name in named:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def options_of(arguments):
    """The names of the options in a command line."""
    return {word.partition("=")[0] for word in arguments if re.match(r"--[a-z]", word)}


def check(what, arguments):
    """Check a command `python WHAT ARGUMENTS`; "..." and words in capitals stand for values."""
    arguments = arguments[:arguments.index("--")] if "--" in arguments else arguments
    if what == "track.py":
        return track_options.parse(arguments)
    if what.endswith(".py"):
        driver = what.removesuffix(".py")
        assert driver in ALL and options_of(arguments) <= {f"--{name}" for name in NAMES} | {
            f"--no-{name}" for name in NAMES}, arguments
        return parse(driver, arguments)
    module = what.removeprefix("-m ")
    if module == "preprocessing" and ("--data_dir" in arguments or arguments[:1] in (["flow"], ["tapvid"])):
        return options.parse(arguments)
    if module == "preprocessing":
        known = inspect.getsource(cli) + "".join(path.read_text() for path in (ROOT / "preprocessing").rglob("*.py"))
    else:
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        if not module.startswith(("benchmarks", "tests")):
            return None
        known = Path(spec.origin).read_text() + (ROOT / "benchmarks/experiments.py").read_text()
    for option in options_of(arguments):
        assert f'"{option}"' in known or option.lstrip("-") in NAMES, option
    return None


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.name)
def test_commands_have_existing_options(page):
    for line in code_lines(page.read_text()):
        match = COMMAND.search(line)
        if match and "[" not in line and "|" not in line:
            check(match["what"], shlex.split(match["arguments"]))
