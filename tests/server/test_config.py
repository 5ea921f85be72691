from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.load_config import describe, load_config

MIB = 1024**2


def test_flags_beat_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1\nhost: 1.1.1.1\nmax_running: 11\nquantization: bf16\n")
    monkeypatch.setenv("ADAPLEX_HOST", "2.2.2.2")
    monkeypatch.setenv("ADAPLEX_MAX_RUNNING", "22")
    config = load_config({"config": str(file), "max_running": "33"})
    assert (config.max_running, config.host, config.port) == (33, "2.2.2.2", 1)
    assert (config.quantization, config.http_port) == ("bf16", 9400)


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.yaml").write_text("port: 7\nadapters: {a: /x}\n")
    monkeypatch.setenv("ADAPLEX_CONFIG", str(tmp_path / "s.yaml"))
    config = load_config({})
    assert (config.port, config.adapters) == (7, {"a": Path("/x")})


def test_lists_and_pairs_from_each_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPLEX_ADAPTERS", "a=/x,b=/y")
    monkeypatch.setenv("ADAPLEX_ADAPTER_ROOTS", "/r,/s")
    config = load_config({})
    assert config.adapters == {"a": Path("/x"), "b": Path("/y")}
    assert config.adapter_roots == (Path("/r"), Path("/s"))
    assert load_config({"adapters": ["c=/z=1"]}).adapters == {"c": Path("/z=1")}


def test_byte_sizes_take_units() -> None:
    config = load_config({"arena_bytes": "3MiB", "kv_cache_bytes": "1GB", "merged_bytes": "0"})
    assert (config.arena_bytes, config.kv_cache_bytes, config.merged_bytes) == (
        3 * MIB,
        10**9,
        0,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "70000"}, "port: Input should be less than or equal to 65535"),
        (
            {"quantization": "fp8"},
            "quantization: Input should be 'nf4', 'int8', 'int4-group', 'bf16' or 'fp32'",
        ),
        ({"group_size": "8"}, "group_size: Input should be 16, 32, 64 or 128"),
        ({"arena_bytes": "0"}, "arena_bytes: Input should be greater than 0"),
        ({"arena_bytes": "big"}, "arena_bytes: could not parse value"),
        ({"max_running": "0"}, "max_running: Input should be greater than or equal to 1"),
        ({"threads": "0"}, "threads: Input should be greater than or equal to 1"),
        ({"adapters": ["nopath"]}, "adapters: Value error, 'nopath' is not name=path"),
        ({"shutdown_timeout": "nan"}, "shutdown_timeout: Input should be a finite number"),
        ({"max_connection_age": "1e10"}, "max_connection_age: Input should be less than or equal"),
        ({"nonsense": "1"}, "nonsense: Extra inputs are not permitted"),
    ],
)
def test_an_error_names_the_field_and_the_limit(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["[1, 2]", "port: [", "prot: 5"])
def test_a_file_that_is_no_mapping_of_settings_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ConfigError):
        load_config({"config": str(tmp_path / "s.yaml")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1: 2", "1 is not a setting"),
        ("port: 1\nhost: x\nport: 2", "'port' is set twice"),
        ("adapters: {a: /x, a: /y}", "'a' is set twice"),
        ("config: other.yaml", "'config' cannot be set in a file"),
    ],
)
def test_a_file_with_what_would_be_ignored_is_refused_by_name(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ConfigError, match=f"config: .*{message}"):
        load_config({"config": str(tmp_path / "s.yaml")})


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("# later\n")
    assert load_config({"config": str(tmp_path / "s.yaml")}).port == 50051


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="config: no such file: /nowhere"):
        load_config({"config": "/nowhere"})


def test_settings_must_fit_together() -> None:
    with pytest.raises(ConfigError, match="adapter_mode: merged needs merged_bytes above 0"):
        load_config({"adapter_mode": "merged", "merged_bytes": "0"})


def test_threads_leave_one_of_three_cores_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, threads in ((1, 1), (2, 2), (3, 2), (16, 15)):
        monkeypatch.setattr("adaplex.server.config.available_cpus", partial(int, cpus))
        assert load_config({}).compute_threads == threads
    assert load_config({"threads": "3"}).compute_threads == 3


def test_the_description_reads_back_and_says_where_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPLEX_HTTP_PORT", "1234")
    flags = {"port": "5", "adapters": ["a=/x"], "model_name": "no"}
    config = load_config(flags)
    text = describe(config, flags)
    assert "port: 5  # flag" in text.splitlines()
    assert "http_port: 1234  # ADAPLEX_HTTP_PORT" in text.splitlines()
    assert "max_running: 64  # default" in text.splitlines()
    monkeypatch.delenv("ADAPLEX_HTTP_PORT")
    assert ServerConfig(**yaml.safe_load(text)) == config
