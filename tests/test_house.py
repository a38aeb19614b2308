"""The house rules, checked: who imports whom, what is banned, what must be documented."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "river", "numba", "safetensors", "captum"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
ADAPTERS = {"stream.embedded", "stream.kafka"}
MAY_PRINT = {"stream/cli.py"}


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def modules() -> list[Path]:
    return tracked("stream/*.py", "stream/**/*.py", "models/*.py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_go_one_way() -> None:
    """models imports nothing of ours; only models imports the heavy libraries; stream never imports tests."""
    for path in modules():
        roots = {name.split(".")[0] for name in imports(path)}
        if name_of(path).startswith("models/"):
            assert "stream" not in roots, f"{name_of(path)} imports stream"
        else:
            assert not roots & HEAVY, f"{name_of(path)} imports {roots & HEAVY}; only models/ may"
        assert "tests" not in roots


def test_only_the_command_line_names_an_adapter() -> None:
    """Everything else works on any log."""
    allowed = {"stream/cli.py", *(f"stream/{p}" for p in ("embedded.py", "kafka.py"))}
    for path in modules():
        if name_of(path) in allowed or re.match(r"stream/(kafka|embedded|logfile|leases)", name_of(path)):
            continue
        named = ADAPTERS & set(imports(path))
        assert not named, f"{name_of(path)} names {named}"


def test_names_say_something() -> None:
    """No module is called utils or the like."""
    for path in modules():
        assert path.stem not in VAGUE, f"{name_of(path)}: name it by what it holds"


def test_every_module_says_what_it_is_for() -> None:
    """Module docstrings exist everywhere, also in tests and benchmarks."""
    for path in [*modules(), *tracked("tests/*.py", "benchmarks/*.py", "benchmarks/**/*.py")]:
        if path.name == "__init__.py" and not path.read_text().strip():
            continue
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


def test_every_test_states_its_promise() -> None:
    """A test without a docstring is a test of which nobody knows what it promises."""
    for path in tracked("tests/test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} {node.name} has no docstring"


def test_banned_calls() -> None:
    """No print outside of the command line, no global random numbers, no wall clock in the pure core."""
    pure = {f"stream/{n}.py" for n in ("pipeline", "events", "engine", "state", "changelog", "checkpoint", "worker")}
    for path in modules():
        name = name_of(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called != "print" or name in MAY_PRINT, f"{name}:{node.lineno} prints"
            assert not re.match(
                r"(np\.random\.(?!default_rng|Generator|SeedSequence|PCG64)|random\.(?!Random))", called
            ), f"{name}:{node.lineno} {called}: use a generator with a seed"
            assert called not in ("time.time", "datetime.now", "datetime.utcnow", "time.sleep") or (
                name not in pure and not name.startswith("models/")
            ), f"{name}:{node.lineno} {called} in pure code"


def test_every_module_is_reached() -> None:
    """No file that nothing imports: from the command line, the generated docs, or the tests' own tools."""
    paths = {name_of(p)[:-3].replace("/", ".").removesuffix(".__init__"): p for p in modules()}
    todo = ["stream.cli", "stream.schemas", "stream.testing", "stream.workload", "stream.memory"]
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module in seen or module not in paths:
            continue
        seen.add(module)
        todo += list(imports(paths[module]))
    lost = sorted(set(paths) - seen - {"stream", "models"})
    assert not lost, f"nothing reaches {lost}"


def test_no_traces_of_a_machine() -> None:
    """No absolute paths of somebody's machine and no package registry's address in any tracked file."""
    place = re.compile(r"(^|[\s\"'(=])/(work|root|home/\w+)/")
    registry = re.compile(r"--index-url|--find-links|https?://[^ \"]*/(simple|maven2)(/|$)")
    for path in tracked():
        if path.suffix in (".png", ".gz", ".zip") or path.name == "test_house.py":
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not place.search(line), f"{name_of(path)}:{number} names a machine's path"
            assert not registry.search(line), f"{name_of(path)}:{number} names a registry"


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_readme_shows_the_tree_as_it_is() -> None:
    """Every top-level entry is in the README's tree, and nothing in it is missing on disk."""
    block = re.search(r"```\n(driftline/\n.*?)```", readme(), re.DOTALL)
    assert block, "README has no tree"
    shown = {line.split()[0].rstrip("/") for line in block.group(1).splitlines()[1:] if re.match(r"  \S", line)}
    there = {name_of(p).split("/")[0] for p in tracked()} - {".gitignore"}
    assert shown == there


def readme_commands() -> list[str]:
    return sorted(set(re.findall(r"^\s*(?:\.venv/bin/)?driftline ([a-z-]+)", readme(), re.MULTILINE)))


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme_exist(command: str) -> None:
    """Each driftline command that the README shows has a help page with an example."""
    from typer.testing import CliRunner

    from stream.cli import app

    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output


def test_make_targets_of_the_readme_exist() -> None:
    """Each make target that the README names is one that `make help` lists."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", readme())) <= targets


def test_every_decision_and_number_has_its_place() -> None:
    """The documents that the README points to exist."""
    for target in re.findall(r"\]\(([^)#]+)\)", readme()):
        assert (ROOT / target).exists(), f"README points to {target}"
