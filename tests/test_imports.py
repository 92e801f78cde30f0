"""The import graph: one direction, no circle, and nothing heavy at `import scoreinv`."""

import ast
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scoreinv"

# Each part of the package may import the parts before it. Noise comes before operators because the
# information A^T S^-1 A is computed by the operator that knows its own structure.
ORDER = [
    "streams",
    "digests",
    "tensors",
    "averages",
    "processes",
    "diagnostics",
    "gaussian",
    "kernels",
    "data",
    "noise",
    "operators",
    "likelihood",
    "conditioning",
    "priors",
    "posterior",
    "predictive",
    "samplers",
    "simulators",
    "training",
    "finetune",
    "npe",
    "bench",
    "cli",
    "__main__",
]
# These may import less: only what is named here.
RESTRICTED = {"diagnostics": {"streams", "tensors"}, "simulators": {"data"}}
# These may import `scoreinv` itself, that is, the public names.
USERS = {"bench", "cli"}
HEAVY = {"torchvision", "score_models", "accelerate"}


def module_files(package):
    """Name to file for every module; a package goes by the name of its folder."""
    files = {}
    for file in sorted(package.rglob("*.py")):
        parts = [package.name, *file.relative_to(package).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


class WithoutTyping(ast.NodeTransformer):
    """Removes `if TYPE_CHECKING:` blocks, which never run."""

    def visit_If(self, node):
        return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else node


def imported_names(name, file, typing):
    """Every name that a module imports, also inside functions, made absolute."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree if typing else WithoutTyping().visit(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [*(parents if node.level else []), *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def import_graph(package, typing=True):
    """For each module the modules of the package that it imports.

    Args:
        package: Folder of the package.
        typing: Count imports that only type checkers see.
    """
    files = module_files(package)
    graph = {}
    for name, file in files.items():
        graph[name] = set()
        for imported in imported_names(name, file, typing):
            # `from package.module import name`: the longest part that is a module.
            while imported and imported not in files:
                imported = imported.rpartition(".")[0]
            graph[name] |= {imported} - {name} if imported else set()
    return graph


def part(module):
    """The part of the layout to which a module belongs; "" for the public names themselves."""
    return module.partition(".")[2].partition(".")[0]


def against_the_order(graph):
    """The imports that go up the layout, as "importer -> imported"."""
    wrong = []
    for module, imports in graph.items():
        if not part(module):
            continue
        for imported in sorted(imports):
            above, below = part(module), part(imported)
            allowed = RESTRICTED.get(above, ORDER[: ORDER.index(above)])
            if below == above or below in allowed or (not below and above in USERS):
                continue
            wrong.append(f"{module} -> {imported}")
    return wrong


def test_every_module_has_a_place():
    unknown = {part(module) for module in import_graph(PACKAGE)} - {"", *ORDER}
    assert not unknown, f"{unknown} has no place in ORDER: say what it may import"


def test_no_circle():
    graphlib.TopologicalSorter(import_graph(PACKAGE, typing=False)).prepare()


def test_imports_go_down():
    assert against_the_order(import_graph(PACKAGE)) == []


def test_public_names_only_import():
    """scoreinv/__init__.py holds no code: a docstring, imports and assignments such as __all__."""
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    allowed = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    assert [ast.unparse(node) for node in body if not isinstance(node, allowed)] == []


TYPED = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from scoreinv.{} import A
"""


@pytest.fixture
def package(tmp_path):
    """A package with every fault: a circle, and imports that go up, some of them in disguise."""
    sources = {
        "__init__.py": "from scoreinv.kernels import a",
        "kernels.py": "from . import gaussian",
        "gaussian.py": "def f():\n    import scoreinv.kernels",
        "diagnostics/__init__.py": "from ..data import b",
        "data/__init__.py": "import torch",
        "noise.py": TYPED.format("operators"),
        "operators.py": "from scoreinv.noise import N",
        "simulators/fields.py": "from scoreinv.gaussian import f\nfrom ..data import b",
        "priors/base.py": "import scoreinv as si",
        "cli/__init__.py": "import scoreinv as si\nfrom .. import gaussian",
    }
    for name, source in sources.items():
        file = tmp_path / "scoreinv" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path / "scoreinv"


def test_negative_control(package):
    graph = import_graph(package)
    assert against_the_order(graph) == [
        "scoreinv.diagnostics -> scoreinv.data",
        "scoreinv.gaussian -> scoreinv.kernels",
        "scoreinv.noise -> scoreinv.operators",
        "scoreinv.priors.base -> scoreinv",
        "scoreinv.simulators.fields -> scoreinv.gaussian",
    ]
    with pytest.raises(graphlib.CycleError, match="scoreinv.kernels"):
        graphlib.TopologicalSorter(import_graph(package, typing=False)).prepare()


def test_types_do_not_make_a_circle(package):
    (package / "kernels.py").write_text(TYPED.format("gaussian"))
    graphlib.TopologicalSorter(import_graph(package, typing=False)).prepare()
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(import_graph(package)).prepare()


def python(code):
    """What a fresh interpreter prints."""
    run = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout


def test_import_loads_nothing_heavy():
    loaded = python("import sys, scoreinv; print(*sys.modules)").split()
    assert "scoreinv" in loaded
    assert HEAVY & set(loaded) == set()


def test_import_is_fast():
    """Less than a third of the processor time of `import torch`, which a slow or busy machine takes longer for, too."""
    code = """
import time
start = time.process_time()
import torch
between = time.process_time()
import scoreinv
print((time.process_time() - between) / (between - start))
"""
    assert statistics.median(float(python(code)) for _ in range(3)) < 1 / 3
