"""Which package may import which. A package imports only those that stand below it:

    train.py, eval.py, viz.py, track.py -> evaluation -> training -> drawing -> inference, preprocessing -> models,
    losses, loaders -> common. Packages that share a level do not import each other. third_party, which wraps other
    people's models, is below preprocessing, inference and models; configs (the options) is beside the loaders.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVERS = {"train.py", "eval.py", "viz.py", "track.py"}
BASE = {"common"}
READERS = {"models", "losses", "loaders", "third_party", "configs"} | BASE
USERS = READERS | {"inference", "preprocessing"}
ALLOWED = {  # package -> packages that it may import, besides itself
    "common": set(),
    "configs": BASE,
    "losses": BASE,
    "loaders": BASE,
    "third_party": BASE,
    "models": {"common", "third_party"},
    "inference": READERS,
    "preprocessing": READERS,
    "drawing": USERS,
    "training": USERS | {"drawing"},
    "evaluation": USERS | {"drawing", "training"},
}
FREE = {"benchmarks", "tests"}  # may import everything
OPTIONAL = {"tinycudann", "timm", "transformers", "kornia", "triton", "ray", "rerun", "playwright"}
WRAPPED = {"tinycudann", "timm", "transformers"}  # only third_party imports them
KERNELS = Path("models/kernels/triton_kernels.py")  # Triton's decorators need the import; the file is imported lazily
KNOWN = set()  # (file, package) that still break the rule


def imported(tree: ast.AST) -> list[tuple[int, str, bool]]:
    """(line, module, whether it is imported when the file is) of every import."""
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
              for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        at_once = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module, at_once))
    return found


def violations(path: Path, text: str) -> list[str]:
    """What a file, with its path relative to the repository, imports against the rules, as `file:line: rule`."""
    room = path.parts[0]
    if room in FREE:
        return []
    if len(path.parts) == 1 and path.name not in DRIVERS:
        return [f"{path}:1: only {', '.join(sorted(DRIVERS))} stand at the root"]
    found = []
    for line, module, at_once in imported(ast.parse(text)):
        top = module.split(".")[0]
        if (str(path), top) in KNOWN:
            continue
        if f"{top}.py" in DRIVERS:
            found.append(f"{path}:{line}: nothing imports a driver, {top}.py is started as a process")
        if room in ALLOWED and top in ALLOWED.keys() | FREE and top not in ALLOWED[room] | {room}:
            below = ", ".join(sorted(ALLOWED[room])) or "no other package"
            found.append(f"{path}:{line}: {room} imports {top}; it may import {below}")
        if len(path.parts) == 1 and top in FREE:
            found.append(f"{path}:{line}: a driver imports {top}")
        if top in WRAPPED and room != "third_party":
            found.append(f"{path}:{line}: only third_party imports {top}")
        if top in OPTIONAL and at_once and path != KERNELS:
            found.append(f"{path}:{line}: {top} is optional, import it in the function that uses it")
    return found


def python_files() -> list[Path]:
    """Paths of the project's Python files, relative to the repository."""
    rooms = [ROOT / name for name in sorted(ALLOWED.keys() | FREE)]
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    return [path.relative_to(ROOT) for path in files]


def test_every_package_imports_only_those_below_it():
    found = [line for path in python_files() for line in violations(path, (ROOT / path).read_text())]
    assert not found, "\n".join(["imports against the rules of tests/test_imports.py:", *found])


def test_every_folder_with_python_files_has_a_rule():
    folders = {path.parts[0] for path in (p.relative_to(ROOT) for p in ROOT.glob("*/*.py")) if path.parts[0][0] != "."}
    assert folders - ALLOWED.keys() - FREE - {"seqs", "out"} == set()


@pytest.mark.parametrize("path, text, rule", [
    ("loaders/images.py", "import os\nfrom models.coords import Grid\n", "images.py:2: loaders imports models"),
    ("models/gabor.py", "def f():\n    from training.muon import Muon\n", "gabor.py:2: models imports training"),
    ("configs/presets.py", "import loaders.images\n", "presets.py:1: configs imports loaders"),
    ("inference/tracker.py", "import preprocessing.flow\n", "tracker.py:1: inference imports preprocessing"),
    ("evaluation/runners.py", "import train\n", "runners.py:1: nothing imports a driver"),
    ("common/files.py", "from tests.launch import launch\n", "files.py:1: common imports tests"),
    ("models/hash_grid.py", "def f():\n    import tinycudann\n", "hash_grid.py:2: only third_party imports tinycudann"),
    ("evaluation/runners.py", "\nimport ray\n", "runners.py:2: ray is optional"),
    ("helpers.py", "import os\n", "helpers.py:1: only eval.py, track.py, train.py, viz.py stand at the root"),
    ("train.py", "from benchmarks.step import main\n", "train.py:1: a driver imports benchmarks")])
def test_a_forbidden_import_is_found(path, text, rule):
    (found,) = violations(Path(path), text)
    assert rule in found


@pytest.mark.parametrize("path, text", [
    ("training/trainer.py", "from losses.losses import objective\nimport torch\nfrom training.muon import Muon\n"),
    ("third_party/dino.py", "def load():\n    import transformers\n"),
    ("tests/test_x.py", "import ray\nimport train\n"),
    ("train.py", "from evaluation import metrics\n")])
def test_an_allowed_import_is_not_reported(path, text):
    assert violations(Path(path), text) == []
