"""Rules for every file of the package: sizes, names, and how docstrings open."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.helpers.sources import sources

Function = ast.FunctionDef | ast.AsyncFunctionDef
FOLDERS = ("dsmoe", "launch", "docker", "benchmarks")
FILE_LINES, FUNCTION_LINES, PARAMETERS = "lines of a file", "lines of a function", "parameters"
MOST = {FILE_LINES: 400, FUNCTION_LINES: 60, PARAMETERS: 12}


class Exemption(NamedTuple):
    """A place that may be larger than others, up to `most`, and why it has to be."""

    most: int
    reason: str


EXEMPT: dict[tuple[str, str], Exemption] = {
    ("dsmoe/moe/layer.py:MoE.__init__", PARAMETERS): Exemption(
        22,
        "takes DeepSpeed's 15, as a drop-in has to, five sections, the seed, and what is done with the user's module",
    ),
}


def sizes(file: str, text: str) -> Iterator[tuple[str, str, int]]:
    """Each place of a file (itself, or FILE:FUNCTION), what is counted of it, and how many there are."""
    yield file, FILE_LINES, len(text.splitlines())
    for name, function in functions(ast.parse(text)):
        assert function.end_lineno is not None
        yield f"{file}:{name}", FUNCTION_LINES, function.end_lineno - function.lineno + 1
        if not is_kernel(function):
            yield f"{file}:{name}", PARAMETERS, parameters(function)


def functions(node: ast.AST, within: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods at any depth, by their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            name = f"{within}{child.name}"
            if isinstance(child, Function):
                yield name, child
            yield from functions(child, f"{name}.")
        else:
            yield from functions(child, within)


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles it: a kernel's pointers, sizes and strides are its interface, and it takes no objects."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def parameters(function: Function) -> int:
    """How many a caller can give; `*args` and `**kwargs` are one each."""
    taken = function.args
    positional = [*taken.posonlyargs, *taken.args]
    of_method = bool(positional) and positional[0].arg in ("self", "cls")
    rest = [each for each in (taken.vararg, taken.kwarg) if each is not None]
    return len(positional) - of_method + len(taken.kwonlyargs) + len(rest)


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], int]:
    """How large every place of the package is, the largest where a file has a name twice."""
    found: dict[tuple[str, str], int] = {}
    for name, text in sources(*FOLDERS).items():
        for place, kind, number in sizes(name, text):
            found[place, kind] = max(number, found.get((place, kind), 0))
    return found


def test_every_folder_is_measured(measured: dict[tuple[str, str], int]) -> None:
    assert {place.partition("/")[0] for place, _ in measured} == set(FOLDERS)


@pytest.mark.parametrize("kind", MOST)
def test_nothing_is_too_large(kind: str, measured: dict[tuple[str, str], int]) -> None:
    for (place, counted), number in measured.items():
        if counted == kind:
            most = EXEMPT[place, kind].most if (place, kind) in EXEMPT else MOST[kind]
            assert number <= most, f"{place} has {number} {kind}, and {most} are allowed: split it by what its parts do"


def test_every_exemption_is_needed(measured: dict[tuple[str, str], int]) -> None:
    for (place, kind), exemption in EXEMPT.items():
        number = measured.get((place, kind))
        assert number is not None, f"{place}, which is exempt, is not there"
        assert number > MOST[kind], f"{place} has {number} {kind}, and {MOST[kind]} are allowed without its exemption"
        assert exemption.reason


@pytest.mark.parametrize(
    ("text", "place", "kind", "number"),
    [
        ("\n" * 401, "x.py", FILE_LINES, 401),
        ("def f():\n" + "    pass\n" * 60, "x.py:f", FUNCTION_LINES, 61),
        ("async def f():\n" + "    pass\n" * 60, "x.py:f", FUNCTION_LINES, 61),
        ("class A:\n    def f(self):\n" + "        pass\n" * 60, "x.py:A.f", FUNCTION_LINES, 61),
        ("def f():\n    def g():\n        pass\n    return g", "x.py:f.g", FUNCTION_LINES, 2),
        ("if True:\n    def f(a, /, b, *c, d, **e): pass", "x.py:f", PARAMETERS, 5),
        ("class A:\n    def f(self, a, b): pass", "x.py:A.f", PARAMETERS, 2),
        ("class A:\n    @classmethod\n    def f(cls, *, a): pass", "x.py:A.f", PARAMETERS, 1),
        ("@jit\ndef f(a): pass", "x.py:f", PARAMETERS, 1),
        ("@triton.jit\ndef f(a): pass", "x.py:f", PARAMETERS, None),
        ("@triton.jit(debug=True)\ndef f(a): pass", "x.py:f", PARAMETERS, None),
    ],
)
def test_what_is_counted(text: str, place: str, kind: str, number: int | None) -> None:
    found = {(name, counted): many for name, counted, many in sizes("x.py", text)}
    assert found.get((place, kind)) == number


def test_kernels_import_nothing_of_the_package() -> None:
    """Not for types either, which import-linter leaves out."""
    for name, text in sources("dsmoe/kernels").items():
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                assert not re.match(r"dsmoe\b(?!\.kernels\b)", module), f"{name}:{node.lineno} imports {module}"


LOOKED_FOR_BY_NAME = {
    "dsmoe/engine/parameter_groups.py": "a step of `make_engine` that DeepSpeed users know by this name",
    "dsmoe/interop/architectures/deepseek.py": "an architecture",
    "dsmoe/interop/architectures/dense.py": "an architecture",
    "dsmoe/interop/architectures/mixtral.py": "an architecture",
    "dsmoe/metrics/console.py": "the line that a person watches",
    "dsmoe/model/init.py": "initial weights",
}
"""Small modules with one importer, and what a reader looks for in each."""


def importers() -> dict[str, set[str]]:
    """The files that import each module of the package, by the module's file."""
    texts = sources("dsmoe", "launch", "docker")
    found: dict[str, set[str]] = {file: set() for file in texts if file.startswith("dsmoe/")}
    for file, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                module = f"{name.replace('.', '/')}.py"
                if module in found:
                    found[module].add(file)
    return found


def test_a_small_module_with_one_importer_is_one_that_people_look_for() -> None:
    texts = sources("dsmoe")
    small = {file for file, text in texts.items() if len(text.splitlines()) < 60 and not file.endswith("__.py")}
    importing = importers()
    assert {file for file in small if len(importing[file]) == 1} == LOOKED_FOR_BY_NAME.keys()


def test_no_two_files_have_one_name() -> None:
    """A traceback and a search show the name alone; packages that are tables of files mirror others' names."""
    tables = ("dsmoe/config/sections/", "dsmoe/interop/architectures/")
    names = [
        file.rpartition("/")[2]
        for file in sources("dsmoe")
        if not file.endswith("__.py") and not file.startswith(tables)
    ]
    assert not sorted({name for name in names if names.count(name) > 1})


UNTELLING = {"here", "there", "of", "mine"}


def test_names_say_what_they_hold() -> None:
    found = []
    for file, text in sources(*FOLDERS).items():
        for node in ast.walk(ast.parse(text)):
            name = getattr(node, "arg", None) or getattr(node, "name", None) or getattr(node, "id", None)
            if name in UNTELLING:
                found.append(f"{file}:{getattr(node, 'lineno', '?')} {name}")
    assert not found


OPENINGS = {"What", "Which", "Whether", "How", "Let", "That", "Where", "Who"}


def test_docstrings_open_with_what_they_name_or_do() -> None:
    found = []
    for file, text in sources(*FOLDERS).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | Function):
                docstring = ast.get_docstring(node) or ""
                if docstring.split(maxsplit=1)[:1] and docstring.split(maxsplit=1)[0].strip(",:;") in OPENINGS:
                    found.append(f"{file}: {docstring.splitlines()[0]}")
    assert not found
