"""TokenFile and `adaplex tokens`: what is written, what is refused, what a reader sees."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adaplex.server.access.principal import Scope
from adaplex.server.access.token_file import TokenFile
from adaplex.server.access.tokens import Token, matches
from adaplex.server.cli.tokens import app
from adaplex.server.errors import ConfigError

GENERATE = frozenset({Scope.GENERATE})


def run(path: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"ADAPLEX_TOKENS_FILE": str(path)})
    return result.exit_code, result.stdout, result.stderr


def test_the_file_holds_no_secret_and_is_its_owners_alone(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    entry, token = file.create("ci", tenant="t", scopes=GENERATE)
    assert token is not None
    assert token.secret not in file.path.read_text()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    (read,) = file.read()
    assert read == entry
    assert read.salt is not None
    assert read.hash is not None
    assert matches(token.secret, read.salt, read.hash)
    assert not matches(Token.new().secret, read.salt, read.hash)
    assert Token.parse(str(token)) == token


def test_equal_secrets_would_have_different_hashes(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    salts = {file.create(f"p{i}", tenant="t", scopes=GENERATE)[0].salt for i in range(3)}
    assert len(salts) == 3


def test_makers_at_once_lose_no_entry(tmp_path: Path) -> None:
    def make(number: int) -> str:
        file = TokenFile(tmp_path / "tokens.json")
        return file.create(f"p{number}", tenant="t", scopes=GENERATE)[0].id

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(make, range(16)))
    assert {entry.id for entry in TokenFile(tmp_path / "tokens.json").read()} == ids
    assert len(ids) == 16


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file: .*make it with `adaplex tokens create`"),
        ("{", "the document: Invalid JSON"),
        ('{"version": 2, "entries": []}', "version: "),
        ('{"version": 1, "entries": [{"id": "a"}]}', "entries.0.name: Field required"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    content: str | None, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^tokens_file: .*{told}"):
        TokenFile(path).read()


def test_the_commands_make_list_expire_and_revoke(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens.json"
    rights = ("--scope", "generate", "--scope", "adapters:read")
    code, out, _ = run(path, "create", "ci", *rights, "--tenant", "acme", "--expires", "30d")
    token = Token.parse(out.strip())
    assert (code, token is not None) == (0, True)
    assert run(path, "create", "node-1", "--scope", "admin", "--certificate")[1] == "node-1\n"

    listed = {entry["name"]: entry for entry in json.loads(run(path, "list", "--json")[1])}
    assert listed["ci"]["tenant"] == "acme"
    assert sorted(listed["ci"]["scopes"]) == ["adapters:read", "generate"]
    end = datetime.fromisoformat(listed["ci"]["expires"]) - datetime.now(UTC)
    assert timedelta(days=29) < end < timedelta(days=31)
    assert not {"salt", "hash"} & listed["ci"].keys()
    rows = [line.split() for line in run(path, "list")[1].splitlines()]
    assert ["certificate", "never", "valid"] in [row[-3:] for row in rows]

    assert run(path, "expire", "ci", "--in", "1h")[0] == 0
    assert token is not None
    assert run(path, "revoke", token.id)[1] == f"revoked {token.id}\n"
    states = {e.name: e.state(datetime.now(UTC)) for e in TokenFile(path).read()}
    assert states == {"ci": "revoked", "node-1": "valid"}
    assert run(path, "create", "ci", "--scope", "generate")[0] == 0, "the name is free again"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("create", "ci", "--scope", "everything"), "'everything' is not one of generate"),
        (("create", "c i", "--scope", "admin"), "name: 'c i'"),
        (("create", "taken", "--scope", "admin"), "taken has the valid entry"),
        (("create", "ci", "--scope", "admin", "--expires", "soon"), "no duration such as 90m"),
        (("revoke", "nobody"), "nobody: no such id or name"),
    ],
)
def test_wrong_commands_are_told_what_is_wrong(
    arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.json"
    TokenFile(path).create("taken", tenant="t", scopes=GENERATE)
    before = path.read_text()
    code, _, error = run(path, *arguments)
    assert code == 2
    assert told in " ".join(error.replace("│", " ").split())
    assert path.read_text() == before


def test_without_a_file_the_commands_say_how_to_name_one() -> None:
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 2
    assert "set --tokens-file" in result.stderr
