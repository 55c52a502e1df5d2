# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_architecture.py
"""The promises about the tree itself, read from the sources: layers, empty packages, no print, the drawn tree.

The layers, low to high; a module imports its own layer and those below:
protocol, config_loading, config_checks and every config.py, utils, algorithms, models, data, single_controller,
workers, report, trainer, trainer/main.py.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import verl.utils

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["utils", "algorithms", "models", "data", "single_controller", "workers", "report", "trainer"]
LOWEST = ("verl", "verl/__init__.py", "verl/protocol.py", "verl/config_loading.py")
MODULES = sorted(path for path in (ROOT / "verl").rglob("*.py") if path.name != "__init__.py")
PACKAGES = sorted((ROOT / "verl").rglob("__init__.py"))
NEED_AN_ENGINE = {"verl.workers.rollout.vllm_rollout", "verl.models.kernels.attention_mass_triton"}
"""What imports only where more is installed than the package asks for."""
SOURCES = sorted(path for folder in ("verl", "tests", "scripts", "examples") for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: str) -> int:
    """Place of `verl/...py` or of a package folder in the order of layers; 0 is the lowest."""
    parts = path.split("/")
    if parts[-1] in ("config.py", "config_checks.py") or path in LOWEST:
        return 0
    if path == "verl/trainer/main.py":
        return len(LAYERS) + 1
    return LAYERS.index(parts[1]) + 1


def imported_files(tree: ast.AST) -> set[str]:
    """Every module or package of verl that an import statement anywhere in `tree` names, as a path."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {name.replace(".", "/") for name in names if name.split(".")[0] == "verl"}
    modules = {f"{path}.py" for path in paths if (ROOT / f"{path}.py").is_file()}
    return modules | {path for path in paths if (ROOT / path / "__init__.py").is_file() and path != "verl"}


def upward_imports(importer: str, source: str) -> list[str]:
    """The imports of `importer` that point to a higher layer. A package alone, whose file is empty, points nowhere."""
    named = [path for path in imported_files(ast.parse(source)) if path.endswith(".py")]
    return sorted(path for path in named if layer_of(path) > layer_of(importer))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_to_the_same_layer_or_lower(path):
    assert upward_imports(relative(path), path.read_text()) == []


def test_an_upward_import_is_found_wherever_it_hides():
    importer = "verl/utils/batch_plan.py"
    assert upward_imports(importer, "from verl.trainer.config import PPOConfig") == []
    found = ["verl/trainer/metrics.py"]
    assert upward_imports(importer, "from verl.trainer.metrics import reduce_metrics") == found
    assert upward_imports(importer, "def f():\n    from verl.trainer import metrics") == found
    assert upward_imports(importer, "import verl.trainer.metrics as m") == found
    assert upward_imports("verl/protocol.py", "import verl.utils.batch_plan") == ["verl/utils/batch_plan.py"]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_name_that_is_imported_from_the_package_exists(path):
    """Wherever the import stands: in a benchmark's function nothing else would notice."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "verl":
            if node.module in NEED_AN_ENGINE:
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                exists = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert exists, f"line {node.lineno}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("path", PACKAGES, ids=relative)
def test_packages_are_empty_but_for_the_version_and_what_users_call(path):
    if relative(path) == "verl/utils/__init__.py":
        for name in verl.utils._HOMES:
            function = getattr(verl.utils, name)
            assert (function.__module__, name in dir(verl.utils)) == (verl.utils._HOMES[name], True)
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = verl.utils.no_such_name
        return
    if relative(path) != "verl/__init__.py":
        assert path.read_text() == ""
        return
    docstring, version = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert ast.unparse(version.targets[0]) == "__version__"


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in MODULES}
    assert folders == {path.parent for path in PACKAGES} & folders


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_the_package_does_not_print(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printing = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert printing == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_module_pickles_as_ray_does_outside_of_rays_calls(path):
    """There, cloudpickle keeps every object whose reference it meets (an image's) as long as the process lives."""
    assert not re.search(r"cloudpickle\.(dump|load)|cloudpickle import (dump|load)", path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_begins_with_its_one_job(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "no module docstring"
    assert len(docstring.splitlines()) <= 12


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stat().st_size], ids=relative)
def test_a_source_names_its_license_and_a_test_its_command(path):
    lines = path.read_text().splitlines()
    if lines[0].startswith("#!"):
        lines = lines[1:]
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    if path.name.startswith("test_"):
        assert lines[1] == f"# python -m pytest {relative(path)}"


def files_in_tree(text: str) -> set[str]:
    """Python files of the trees drawn in a Markdown text.

    A tree is a fenced block with branches of four characters a level, as `tree` draws them. The words after a `#`
    are a comment; an entry may name several files.
    """
    files = set()
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if "── " not in block:
            continue
        folders: list[str] = []
        for line in block.splitlines():
            branches, _, entry = line.rpartition("── ")
            depth = (len(branches) - 1) // 4 + 1 if branches else 0
            names = entry.partition("#")[0].replace(",", " ").split()
            if not names or (not branches and not names[0].endswith("/")):
                continue
            folders = [*folders[:depth], names[0].rstrip("/")]
            files |= {"/".join([*folders[:depth], name]) for name in names if name.endswith(".py")}
    return files


def test_a_drawn_tree_is_read_with_its_folders():
    text = """
```
project/
├── verl/               # the package
│   ├── protocol.py     # batches, see utils.py
│   ├── utils/
│   │   ├── a.py, b.py  # 两个
│   │   └── c.py
│   └── trainer/
│       └── main.py
└── tests/
    └── test_a.py
```
"""
    names = ["protocol.py", "utils/a.py", "utils/b.py", "utils/c.py", "trainer/main.py"]
    assert files_in_tree(text) == {f"project/verl/{name}" for name in names} | {"project/tests/test_a.py"}


@pytest.mark.parametrize("page", ["docs/en/design.md", "docs/zh/design.md"])
def test_the_tree_in_the_documents_names_every_module_and_no_other(page):
    path = ROOT / page
    assert path.is_file(), f"{page} is not there"
    drawn = files_in_tree(path.read_text())
    in_package = {f"verl/{file.partition('verl/')[2]}" for file in drawn if "verl/" in file}
    assert {relative(module) for module in MODULES} == in_package
