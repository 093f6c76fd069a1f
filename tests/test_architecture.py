"""Imports go one way, and nobody pays for what they do not use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gnsmon"
# What each room may import of the others, at any depth of its code.
MAY_IMPORT = {
    "estimators": set(),
    "norms": set(),
    "advice": {"estimators"},
    "config": set(),
    "pace": set(),
    "sinks": {"estimators", "plots"},
    "plots": {"advice", "estimators", "sinks"},
    "report": {"estimators", "sinks", "plots", "advice"},
    "collectors": {"norms", "estimators"},
    "methods": {"collectors", "estimators", "config"},
    "health": {"collectors", "estimators"},
    "monitor": {
        *("collectors", "estimators", "sinks", "advice", "config", "methods", "pace", "health"),
    },
    "lightning": {"monitor", "config", "sinks", "advice", "estimators"},
    "checking": {"collectors", "estimators", "norms"},
    "part_gradients": {"collectors", "norms"},
    "curvature": {"estimators", "part_gradients"},
    "halves": {"collectors", "estimators", "norms", "part_gradients"},
    "hf": {"monitor", "config", "sinks", "norms", "advice"},
    "simulation": {"estimators"},
    "figures": {"simulation", "estimators", "norms", "sinks", "plots", "demo"},
}
WITHOUT_TORCH = {"estimators", "advice", "config", "pace", "sinks", "plots", "report", "simulation"}


def imports(path):
    """Every module that a file imports, also inside functions; not for type checking alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else []
    files += (PACKAGE / room).rglob("*.py")
    assert files
    for path in files:
        for module in imports(path):
            first, *rest = module.split(".")
            if first == "gnsmon" and rest:
                assert rest[0] in MAY_IMPORT[room] | {room}, f"{path.name} imports {module}"
            if first == "torch" and room in WITHOUT_TORCH:
                assert module == "torch.utils.tensorboard", f"{path.name} imports {module}"


def test_triton_is_imported_in_one_file_that_only_its_caller_imports():
    files = {path: set(imports(path)) for path in PACKAGE.rglob("*.py")}
    assert [p.name for p, names in files.items() if "triton" in names] == ["tiles.py"]
    assert [p.name for p, names in files.items() if "gnsmon.norms.tiles" in names] == ["kernels.py"]


def loaded_after(code):
    """Top-level names of the modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


OPTIONAL = {
    "lightning",
    "pytorch_lightning",
    "transformers",
    "accelerate",
    "wandb",
    "tensorboard",
    "matplotlib",
    "triton",
}


@pytest.mark.parametrize(
    "code",
    [
        "import gnsmon; gnsmon.attach",
        "import gnsmon.report, gnsmon.sinks, gnsmon.cli",
        "from gnsmon.norms import kernels; kernels.available('cpu')",
    ],
)
def test_optional_packages_are_not_loaded(code):
    assert not loaded_after(code) & OPTIONAL


@pytest.mark.parametrize(
    "code",
    [
        "import gnsmon",
        "import gnsmon.report",
        "import gnsmon.cli",
        "from gnsmon import advise, Reading, MonitorConfig",
    ],
)
def test_reading_a_log_needs_no_torch(code):
    assert "torch" not in loaded_after(code)


def test_a_missing_package_is_named(monkeypatch):
    import gnsmon

    monkeypatch.delitem(vars(gnsmon), "hf", raising=False)  # not by name, which would load it
    for name in [name for name in sys.modules if name.startswith("gnsmon.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "gnsmon\[transformers\]"'):
        gnsmon.hf  # noqa: B018


def test_public_names_exist():
    import gnsmon

    for name in gnsmon.__all__:
        assert getattr(gnsmon, name) is not None
    assert gnsmon.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gnsmon.nothing  # noqa: B018
