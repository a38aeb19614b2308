"""Settings: what is refused and how it is said, where values come from, and that secrets stay secret."""

from __future__ import annotations

import logging
import pickle
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream import reference
from stream.config import HIDDEN, Config, Secret, fingerprint, topic_names, values
from stream.errors import ConfigError
from stream.loading import load

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "correct-horse-battery"


def test_without_a_file_everything_has_its_default() -> None:
    """No file, no --set: the defaults, and every value says so."""
    loaded = load()
    assert loaded.config == load(ROOT / "config.toml").config
    assert set(loaded.origins.values()) == {"default"}
    assert {key for key, _ in values(loaded.config)} == set(loaded.origins)


def test_the_template_lists_every_key_with_its_default() -> None:
    """Take the # away from every key of config.toml and nothing changes: keys, values and types are those in force."""
    text = re.sub(r"^#(?=[a-z_]+ = )", "", reference.template(), flags=re.MULTILINE)
    written = tomllib.loads(text)
    keys = {setting.key for setting in reference.every_setting()}

    def leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in table.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    assert set(leaves(written)) == keys | {"kafka.bootstrap_servers"}
    assert msgspec.convert(written, Config, dec_hook=lambda kind, value: Secret(value)) == load().config


def test_generated_files_are_up_to_date() -> None:
    """config.toml and docs/configuration.md are what `make docs` writes now."""
    assert (ROOT / "config.toml").read_text() == reference.template(), "run make docs"
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.markdown(), "run make docs"


def test_every_key_says_what_it_means() -> None:
    """A description for each key; a number that has a unit in its name says it in words or has a bound."""
    for setting in reference.every_setting():
        assert len(setting.description) > 10, setting.key
        if setting.name.endswith("_s"):
            assert "second" in setting.description, setting.key
        if "_bytes" in setting.name:
            assert "bytes" in setting.description, setting.key


def test_origins(tmp_path: Path) -> None:
    """The file overrides defaults, --set overrides the file, and each value names the last who spoke."""
    file = tmp_path / "my.toml"
    file.write_text('transport = "kafka"\n[worker]\nslot = "7"\nretries_max = 3\n[events.fields]\ninterest = "cat"\n')
    loaded = load(file, ["worker.retries_max=4"])
    assert loaded.config.worker.retries_max == 4
    assert loaded.config.events.fields == {"interest": "cat"}
    assert loaded.origins["worker.retries_max"] == "--set"
    assert loaded.origins["worker.slot"] == loaded.origins["events.fields.interest"] == str(file)
    assert loaded.origins["worker.backoff_s"] == "default"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("worker.slott=1", "did you mean worker.slot?"),
        ("wroker.slot=1", "did you mean worker?"),
        ("top_k=3", "did you mean forecast.top_k?"),
        ("forecast.emision.policy=every", "did you mean forecast.emission?"),
        ("nonsense=1", "driftline config"),
        ("app=3", "write [app]"),
        ("worker.batch_events_max=many", "worker.batch_events_max: expected `int`"),
        ("worker.batch_events_max=0", ">= 1"),
        ("transport=kafak", "transport: invalid enum value 'kafak'"),
        ("topics.alerts=forecasts", "'forecasts' is named twice"),
        ("topics.events=[]", "topics.events"),
        ("worker.poll_timeout_s=5", "a third of worker.transaction_timeout_s"),
        ("topics.retention_h=0", "-1 for ever"),
        ("network.vector_length=8", "events.vector_length"),
        ("state.hash_key=", "state.hash_key"),
        ("worker.slot", "--set section.key=value"),
        ("=1", "--set section.key=value"),
        ("worker.slot.x=1", "worker.slot"),
    ],
)
def test_refusals_say_which_key_and_what_to_do(assignment: str, words: str) -> None:
    """One line that names the key; an unknown one suggests the nearest."""
    with pytest.raises(ConfigError) as refused:
        load(None, [assignment])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.text(max_size=60))
def test_no_assignment_crashes(text: str) -> None:
    """Whatever stands after --set: it is taken, or it is a ConfigError."""
    try:
        load(None, [text])
    except ConfigError as error:
        assert str(error)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, broken TOML and bytes that are no text are told apart."""
    with pytest.raises(ConfigError, match=r"cannot read .*--template"):
        load(tmp_path / "none.toml")
    file = tmp_path / "bad.toml"
    file.write_text("worker = [\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(file)


def test_text_that_looks_like_a_number_stays_text() -> None:
    """`--set worker.slot=3` names slot "3"; a password of digits stays a text."""
    config = load(None, ["worker.slot=3", "kafka.sasl_plain_password=123456", "kafka.request_timeout_ms=7000"]).config
    assert config.worker.slot == "3"
    assert config.kafka["sasl_plain_password"].reveal() == "123456"
    assert config.kafka["request_timeout_ms"] == 7_000


def test_secrets_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what is written out, nor what comes from a variable or a file, appears in any text of the settings."""
    monkeypatch.setenv("BROKER_PASSWORD", PASSWORD)
    key_file = tmp_path / "key"
    key_file.write_text(PASSWORD + "\n")
    config = load(
        None,
        [
            f"kafka.ssl_password={PASSWORD}",
            "kafka.sasl_plain_password=env:BROKER_PASSWORD",
            f"state.hash_key=file:{key_file}",
        ],
    ).config
    caplog.set_level(logging.DEBUG)
    logging.getLogger("test").info("config=%s kafka=%r", config, config.kafka)
    shown = [reference.shown(key, value) for key, value in values(config)]
    texts = [repr(config), str(config.kafka), caplog.text, fingerprint(config.state), *shown]
    assert not any(PASSWORD in text for text in texts)
    assert HIDDEN in reference.shown("kafka.ssl_password", config.kafka["ssl_password"])
    assert "env:BROKER_PASSWORD" in shown, "where a secret comes from is no secret"
    assert {config.kafka[k].reveal() for k in ("ssl_password", "sasl_plain_password")} == {PASSWORD}
    assert config.state.hash_key.reveal() == PASSWORD
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_secret_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    """The variable or the file is named, never a value."""
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE"):
        Secret("env:NOT_SET_ANYWHERE").reveal()
    with pytest.raises(ConfigError, match="none"):
        Secret(f"file:{tmp_path / 'none'}").reveal()


def test_fingerprints_tell_settings_apart() -> None:
    """Equal settings, equal fingerprint; a changed key changes it; the hash key's value is not in it."""
    one, other = load().config, load(None, ["network.item_width=8"]).config
    assert fingerprint(one.network) == fingerprint(load().config.network) != fingerprint(other.network)
    assert fingerprint(one.state) == fingerprint(load(None, ["state.hash_key=env:OTHER"]).config.state)


def test_the_prefix_stands_before_outputs_only() -> None:
    """Topics of an application are told apart by the prefix; the input keeps its own name."""
    config = load(None, ["topics.prefix=shop."]).config
    assert topic_names(config)["alerts"] == "shop.alerts"
    assert config.topics.events == ["events"]
