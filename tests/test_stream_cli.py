"""The command line: help, exit codes, one-line errors, and the commands on an embedded log."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from stream import reference
from stream.cli import EXIT_CODES, app, main
from stream.config import Config
from stream.errors import ConfigError, Corrupt, DriftlineError, Fenced, Rebalanced, Retryable
from stream.loading import load
from stream.options import Given
from stream.tail import as_json, newest_records, topic_of
from stream.transport import LogRecord, Record, TopicPartition

ROOT = Path(__file__).resolve().parent.parent
LEAVES = dict(reference.leaf_commands(typer.main.get_command(app)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test in an empty folder, without settings from outside; logging and signals are put back after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRIFTLINE_CONFIG", raising=False)
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in (None, "kafka", "numba")}  # those that `log_to` sets
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*arguments: str) -> int:
    """The exit code of `driftline ARGUMENTS`, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return 0 if ended.value.code is None else int(ended.value.code)


def apart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`driftline ARGUMENTS` in a process of its own, for what loads torch."""
    return subprocess.run(
        [sys.executable, "-m", "stream.cli", *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def shop(folder: Path) -> str:
    """A small log with a generated stream in it."""
    assert run("simulate", "--users", "20", "--events", "400") == 0
    return str(folder / "var" / "driftline.db")


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help says what it does and shows a call of this very command that can be parsed."""
    assert run(*name.split(), "--help") == 0
    assert "--set" in capsys.readouterr().out
    example = re.search(r"Example: driftline (.*)", LEAVES[name].help)
    assert example, name
    words = example.group(1).split()
    assert words[: len(name.split())] == name.split()
    LEAVES[name].make_context(name, words[len(name.split()) :])


def test_the_commands_that_are_promised_exist() -> None:
    """run, worker, learner, demo, simulate, replay, evaluate, evaluate-shifts, tail, topics, user, explain, ..."""
    promised = [
        "run",
        "worker",
        "learner",
        "demo",
        "simulate",
        "replay",
        "evaluate",
        "evaluate-shifts",
        "tail",
        "user",
        "explain",
        "config",
        "doctor",
    ]
    assert {*promised, "topics create", "topics list"} <= set(LEAVES)


def test_the_reference_of_commands_is_up_to_date() -> None:
    """docs/commands.md is what `make docs` writes now, and holds every command."""
    written = (ROOT / "docs" / "commands.md").read_text()
    assert written == reference.commands(typer.main.get_command(app)), "run make docs"
    assert all(f"## `driftline {name}`" in written for name in LEAVES)


def test_help_does_not_load_what_commands_need() -> None:
    """`driftline --help` imports neither the network nor numpy: it must be there at once."""
    code = (
        "import sys\nfrom stream.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numba', 'numpy', 'river', 'kafka')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_exit_codes_tell_errors_apart() -> None:
    """Each kind of error has a code of its own, the one that docs/commands.md names."""

    def code(error: DriftlineError) -> int:
        return next(c for kind, c in EXIT_CODES.items() if isinstance(error, kind))

    kinds = [ConfigError(""), Fenced(""), Corrupt(""), Retryable(""), Rebalanced(""), DriftlineError("")]
    assert [code(e) for e in kinds] == [2, 3, 4, 5, 5, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "--set", "wroker.slot=1"], "did you mean worker?"),
        (["config", "--config", "missing.toml"], "missing.toml"),
        (["topics", "list", "--transport", "foo"], "transport"),
        (["tail", "alerts"], "there is no log"),
        (["user", "u1"], "there is no log"),
        (["replay", "missing.csv", "--map", "user=a,interest=b,time=c"], "missing.csv"),
        (["topics", "create", "--set", "embedded.path=/proc/nothing/x.db"], "cannot create the folder"),
        (
            ["topics", "create", "--transport", "kafka", "--set", "kafka.bootstrap_servers=127.0.0.1:9",
             "--set", "kafka.bootstrap_timeout_ms=500"],
            "no Kafka broker answers at 127.0.0.1:9",
        ),
        (["topics", "create", "--transport", "kafka", "--set", "kafka.bootstrap_server=x"], "bootstrap_servers"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback: what is wrong and what to do."""
    assert run(*arguments) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert len(shown.strip().splitlines()) == 1
    assert shown.startswith("driftline: ")


def test_options_may_stand_before_or_after_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Both places count; what stands after the command wins."""
    assert run("--set", "worker.slot=a", "--transport", "kafka", "config", "--set", "worker.slot=b") == 0
    shown = capsys.readouterr().out
    assert 'worker.slot = "b"' in shown
    assert 'transport = "kafka"' in shown


def test_config_shows_values_with_their_origin_and_no_secret(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """./config.toml is read by itself; each line names where the value comes from; passwords are hidden."""
    (folder / "config.toml").write_text('[kafka]\nsasl_plain_password = "hunter2"\n[worker]\nretries_max = 3\n')
    assert run("config") == 0
    shown = capsys.readouterr().out
    assert re.search(r"worker.retries_max = 3 +# config.toml", shown)
    assert re.search(r"worker.slot = \"0\" +# default", shown)
    assert "hunter2" not in shown
    assert "kafka.sasl_plain_password = (hidden)" in shown


def test_settings_travel_to_child_processes(folder: Path) -> None:
    """What `run` was given is what its worker and learner load."""
    given = Given(config=folder / "c.toml", sets=("transport=kafka", "app.name=x y"))
    (folder / "c.toml").write_text("")
    words = given.arguments()
    assert words == ["--config", str(folder / "c.toml"), "--set", "transport=kafka", "--set", "app.name=x y"]


def test_simulate_tail_and_topics_on_an_embedded_log(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was sent comes out, as JSON and in words; partitions and records are listed."""
    shop(folder)
    assert "records in" in capsys.readouterr().out
    assert run("tail", "events", "--from", "start", "--no-follow", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    events = [json.loads(line) for line in lines if line.startswith('{"user"')]
    assert len(events) > 300
    assert run("tail", "events", "--from", "2", "--no-follow", "--user", events[0]["user"], "--limit", "1") == 0
    capsys.readouterr()
    assert run("topics", "list") == 0
    assert "events: 4 partitions" in capsys.readouterr().out
    assert run("user", "nobody") == 2
    assert "nothing is known of user 'nobody'" in capsys.readouterr().err


def test_replay_of_a_file_into_the_log(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows become records; what was found out and what was left out is said; a missing column is exit 2."""
    (folder / "e.csv").write_text("who,what,when\nu1,shoes,1700000000\nu2,socks,1700000060\nu3,,1700000061\n")
    assert run("replay", "e.csv", "--map", "user=who,interest=what,time=when") == 0
    shown = capsys.readouterr()
    assert "events: 2 records" in shown.out
    assert "time unit 's', found out" in shown.err
    assert "1 rows not used" in shown.err
    assert run("replay", "e.csv", "--map", "user=who,interest=wat,time=when") == 2
    assert "wat" in capsys.readouterr().err
    (folder / "back.csv").write_text("who,what,when\nu1,shoes,1700000060\nu2,socks,1700000000\n")
    assert run("replay", "back.csv", "--map", "user=who,interest=what,time=when") == 2
    assert "--sort" in capsys.readouterr().err
    assert run("replay", "back.csv", "--map", "user=who,interest=what,time=when", "--sort") == 0


def test_wrong_partition_count_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Topics that exist with another count: exit 2, naming the setting."""
    shop(folder)
    capsys.readouterr()
    assert run("topics", "list", "--set", "topics.partitions=3") == 2
    shown = capsys.readouterr().out
    assert "has 4 partitions, topics.partitions is 3" in shown


def test_tail_survives_what_users_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters do not reach the terminal."""
    (folder / "e.jsonl").write_text(json.dumps({"u": "u1", "i": "a\x1b[2Jb", "t": 1_700_000_000_000}) + "\n")
    assert run("replay", "e.jsonl", "--map", "user=u,interest=i,time=t") == 0
    capsys.readouterr()
    assert run("tail", "events", "--from", "start", "--no-follow") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_topics_are_found_by_role_and_by_name() -> None:
    """`dead-letters`, `dead_letters` and the full name are the same topic."""
    config: Config = load(None, ["topics.prefix=shop."]).config
    assert topic_of(config, "dead-letters") == topic_of(config, "dead_letters") == ("dead_letters", "shop.dead-letters")
    assert topic_of(config, "shop.alerts") == ("alerts", "shop.alerts")
    assert topic_of(config, "events") == ("events", "events")
    with pytest.raises(ConfigError, match="there are events"):
        topic_of(config, "alarms")


class Holes:
    """A partition as Kafka shows it: after every three records a transaction mark takes an offset."""

    def __init__(self, head: int, end: int) -> None:
        self.head, self.end = head, end

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        return self.head, self.end

    def read(self, partition: TopicPartition, offset: int, timeout_s: float, max_records: int = 1_000) -> list[Record]:
        there = [o for o in range(max(offset, self.head), self.end) if o % 4 != 3]
        return [LogRecord(*partition, o, 0, None, b"{}") for o in there[:max_records]]

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("count", "offsets"),
    [(0, []), (1, [18]), (3, [16, 17, 18]), (4, [14, 16, 17, 18]), (99, [9, 10, 12, 13, 14, 16, 17, 18])],
)
def test_the_newest_records_are_found_among_marks(count: int, offsets: list[int]) -> None:
    """`--from N` gives N records whatever else takes offsets, and never goes below the head."""
    found = newest_records(Holes(9, 20), TopicPartition("t", 0), count)
    assert [record.offset for record in found] == offsets


def test_a_wrong_beginning_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--from takes start, end or a number."""
    shop(folder)
    assert run("tail", "events", "--from", "yesterday") == 2
    assert "--from yesterday" in capsys.readouterr().err


def test_replay_writes_what_the_configuration_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With [events.fields] and a time unit, replayed records carry those names and that unit."""
    (folder / "config.toml").write_text('[events]\ntime_unit = "s"\n[events.fields]\ninterest = "category"\n')
    (folder / "e.csv").write_text("who,what,when\nu1,shoes,1700000000500\n")
    assert run("replay", "e.csv", "--map", "user=who,interest=what,time=when", "--time-unit", "ms") == 0
    capsys.readouterr()
    assert run("tail", "events", "--from", "start", "--no-follow", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"user": "u1", "category": "shoes", "time": 1_700_000_000.5}
    assert run("simulate", "--users", "20", "--events", "400") == 2, "a generated stream cannot be renamed"


def test_evaluate_reports_every_model_stratum_and_step(folder: Path) -> None:
    """Tables for a person; with --json the last line holds all rows, figures between 0 and 1."""
    assert run("simulate", "--users", "10", "--events", "300", "--out", "shop.jsonl.gz") == 0
    columns = ["shop.jsonl.gz", "--map", "user=user,interest=interest,time=time,type=type"]
    done = apart(folder, "evaluate", *columns, "--horizon", "2", "--limit", "250", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = {(row["model"], row["stratum"], row["horizon"]) for row in rows}
    assert found >= {
        (model, stratum, step)
        for model in ("driftline", "recency", "recency_markov")
        for stratum in ("all", "repeat", "non_repeat")
        for step in (1, 2)
    }
    for row in rows:
        assert row["mrr"] is None or 0 <= row["mrr"] <= row["hr@20"] + 1 / 20
    counts = {row["model"]: row["n"] for row in rows if (row["stratum"], row["horizon"]) == ("all", 1)}
    assert len(set(counts.values())) == 1, "all models are judged on the same events"
    wrong = apart(folder, "evaluate", *columns, "--models", "oracle")
    assert wrong.returncode == 2
    assert "oracle" in wrong.stderr.splitlines()[-1]


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    """`driftline tail ... | head -1` ends quietly with exit code 0."""
    shop(folder)
    command = (
        f"{sys.executable} -m stream.cli tail events --from start --no-follow --json | head -1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_long_record_is_whole_json() -> None:
    """What `tail --json` prints can be read again, however long it is and whatever characters are in it."""
    value = {"interests": [f"interest {n}" for n in range(500)], "odd": "\x85\u2028\U000e0001\u202e"}
    line = as_json(LogRecord("forecasts", 0, 0, 0, b"u", json.dumps(value, ensure_ascii=False).encode()))
    assert line.isprintable() and json.loads(line) == value
