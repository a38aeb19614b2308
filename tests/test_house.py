"""The house rules, checked: who imports whom, what is banned, what must be documented."""

from __future__ import annotations

import ast
import json
import re
import shlex
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
        of_random = r"np\.random\.(?!default_rng|Generator|SeedSequence|PCG64)"
        if "random" in imports(path):  # else it is a variable's name
            of_random += r"|random\.(?!Random)"
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called != "print" or name in MAY_PRINT, f"{name}:{node.lineno} prints"
            assert not re.match(of_random, called), f"{name}:{node.lineno} {called}: use a generator with a seed"
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
    there = {name_of(p).split("/")[0] for p in tracked()} - {".gitignore", ".dockerignore"}
    assert shown == there


def readme_commands() -> list[str]:
    lines = re.findall(r"^ +(?:\.venv/bin/)?driftline (.*)$", readme(), re.MULTILINE)
    return sorted({line.partition("#")[0].strip() for line in lines})


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme_can_be_called(line: str) -> None:
    """Each driftline command that the README shows is parsed as it stands, options and arguments included."""
    import typer

    from stream.cli import app
    from stream.reference import leaf_commands

    words = shlex.split(line)
    leaves = dict(leaf_commands(typer.main.get_command(app)))
    name = " ".join(words[:2]) if " ".join(words[:2]) in leaves else words[0]
    assert name in leaves, f"there is no command {name}"
    leaves[name].make_context(name, words[len(name.split()) :])


def test_make_targets_of_the_readme_exist() -> None:
    """Each make target that the README names is one that `make help` lists."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", readme())) <= targets


def test_every_decision_and_number_has_its_place() -> None:
    """The documents that the README points to exist."""
    for target in re.findall(r"\]\(([^)#]+)\)", readme()):
        assert (ROOT / target).exists(), f"README points to {target}"


def test_every_setting_is_read() -> None:
    """A key that nothing reads would be a promise that nobody keeps."""
    from stream.reference import every_setting

    declared = {"stream/config.py", "models/settings.py"}
    sources = [p.read_text() for p in modules() if name_of(p) not in declared]
    sources.append((ROOT / "stream" / "config.py").read_text().partition("def topic_names")[2])
    for setting in every_setting():
        topic = setting.key.startswith("topics.") and f'"{setting.name}"' in sources[-1]
        read = re.compile(rf"\.{setting.name}\b")
        assert topic or any(read.search(text) for text in sources), f"nothing reads {setting.key}"


def examples() -> dict[str, str]:
    """The worked examples of docs/topics.md by topic."""
    return dict(re.findall(r"```json ([a-z-]+)\n(.*?)```", (ROOT / "docs" / "topics.md").read_text(), re.DOTALL))


@pytest.mark.parametrize("topic", ["forecasts", "alerts", "verdicts", "dead-letters", "metrics"])
def test_examples_fit_the_types_and_the_schemas(topic: str) -> None:
    """Each worked example is complete, valid against the published schema, and read by the type without loss."""
    import jsonschema
    import msgspec

    from stream.schemas import RECORDS, schema

    published = json.loads((ROOT / "docs" / "schemas" / f"{topic}.json").read_text())
    assert published == schema(topic), "run make docs"
    example = json.loads(examples()[topic])
    jsonschema.validate(example, published)
    record = msgspec.json.decode(examples()[topic], type=RECORDS[topic], strict=True)
    assert msgspec.to_builtins(record) == example, "the example names every field"


def test_the_event_example_is_an_event() -> None:
    """The input example is decoded as it stands, and every field of an event is explained beside it."""
    from stream.events import FIELD_NAMES, EventDecoder, EventSettings
    from stream.transport import LogRecord

    value = examples()["events"].encode()
    event = json.loads(value)
    record = LogRecord("events", 0, 0, event["time"], event["user"].encode(), value)
    decoded = EventDecoder(EventSettings(), b"key").decode([record])
    assert len(decoded) == 1
    text = (ROOT / "docs" / "topics.md").read_text()
    assert all(f"| `{name}` |" in text for name in FIELD_NAMES)


def test_every_dead_letter_reason_is_documented() -> None:
    """Whoever reads a dead letter finds its reason in docs/topics.md, and nothing else stands there."""
    sources = "\n".join(p.read_text() for p in tracked("stream/*.py"))
    given = set(re.findall(r'BadEvent\(\s*"([a-z0-9_]+)"', sources)) | {"processing_failed"}
    given |= set(re.findall(r'BadEvent\("([a-z_]+)" if .*? else "([a-z_]+)"', sources)[0])
    table = (ROOT / "docs" / "topics.md").read_text().partition("| reason |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {reason for row in rows for reason in re.findall(r"`([a-z0-9_]+)`", row)} == given


def test_the_readme_names_settings_that_exist() -> None:
    """Every section.key in the README's code and text is a setting."""
    from stream.reference import every_setting, sections

    known = {s.key for s in every_setting()} | {s.name for s in sections()}
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)(?:\s*=[^`]*)?`", readme())) | set(
        re.findall(r"--set ([a-z]+\.[a-z_]+)=", readme())
    )
    files = {n for n in named if re.search(r"\.(py|toml|md|txt|yaml)$", n)}
    assert named - files - {n for n in named if n.startswith("kafka.")} <= known


def test_docker_files_call_what_exists() -> None:
    """Commands and settings in Dockerfile and compose file are ones that the command line takes; nobody is root."""
    import typer

    from stream.cli import app
    from stream.loading import load
    from stream.reference import leaf_commands

    leaves = dict(leaf_commands(typer.main.get_command(app)))
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    compose = (ROOT / "docker" / "compose.yaml").read_text()
    lists = [
        json.loads(line) for line in re.findall(r"^\s*(?:CMD|command:) (\[.*\])$", dockerfile + compose, re.MULTILINE)
    ]
    blocks = re.findall(r"command:\n((?: +- \".*\"\n)+)", compose)
    lists += [re.findall(r'- "(.*)"', block) for block in blocks]
    called = [words for words in lists if words[0] not in ("python",)]
    assert len(called) == 4
    for words in called:
        name = " ".join(words[:2]) if words[0] == "topics" else words[0]
        context = leaves[name].make_context(name, words[len(name.split()) :])
        load(None, context.params["sets"])
    assert re.search(r"^USER driftline$", dockerfile, re.MULTILINE)
    for path in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / part).exists() for part in path.split())
