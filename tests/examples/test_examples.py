"""The example adapters: complete, small, free of local paths, and trained as their cards say."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaplex.model.base.source import DEFAULT_MODEL, resolve_model

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
LORAS = ("terse", "pirate", "json", "news")
NAMES = (*LORAS, "list", "polite", "tag")
PROMPT = "What is the capital of France?"
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("train")


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def base(request: pytest.FixtureRequest, train: ModuleType, directory: Path) -> Callable[[], Any]:
    """A function that loads the default model, as stored or with the dequantized nf4 weights of a
    server.
    """

    def made() -> Any:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        if request.param == "nf4":
            train.TwoBases(model).use(nf4=True)
        return model

    return made


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_a_complete_checkpoint(name: str) -> None:
    assert {path.name for path in (EXAMPLES / name).iterdir()} == FILES


def test_together_they_are_small() -> None:
    files = (path for name in NAMES for path in (EXAMPLES / name).iterdir())
    assert sum(path.stat().st_size for path in files) < 10_000_000


def test_ranks_and_targets_differ() -> None:
    configs = [LoraConfig.from_pretrained(EXAMPLES / name) for name in LORAS]
    assert [config.r for config in configs] == [4, 8, 16, 8]
    assert [config.use_rslora for config in configs] == [False, True, False, False]
    assert [config.use_dora for config in configs] == [False, False, False, True]
    assert len({frozenset(config.target_modules) for config in configs}) == 4


def test_families_differ() -> None:
    configs = [PeftConfig.from_pretrained(EXAMPLES / name) for name in NAMES]
    assert {config.base_model_name_or_path for config in configs} == {DEFAULT_MODEL}
    assert {PeftType(config.peft_type) for config in configs} == {
        *(PeftType.LORA, PeftType.IA3, PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING)
    }


@pytest.mark.parametrize("name", NAMES)
def test_config_matches_the_task(name: str, train: ModuleType) -> None:
    (task,) = (task for task in train.TASKS if task.name == name)
    config: Any = PeftConfig.from_pretrained(EXAMPLES / name)
    assert PeftType(config.peft_type) == task.method.peft_type
    for field in ("r", "lora_alpha", "use_rslora", "use_dora", "layers_to_transform"):
        assert getattr(config, field, None) == getattr(task.method, field, None), field
    for field in ("num_virtual_tokens", "feedforward_modules", "target_modules"):
        found, wanted = (getattr(each, field, None) for each in (config, task.method))
        assert found == wanted or set(found) == set(wanted), field


@pytest.mark.parametrize("name", NAMES)
def test_no_local_path_inside(name: str) -> None:
    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    config = json.loads((EXAMPLES / name / "adapter_config.json").read_text())
    assert not [text for text in strings(config) if text.startswith(("/", "~", ".", "file:"))]
    card = (EXAMPLES / name / "README.md").read_text()
    assert not re.search(r"(?<![\w/.])(/|~/)(home|root|tmp|work|Users|\.cache)\b", card)


def tensors(name: str) -> dict[str, torch.Tensor]:
    with safe_open(EXAMPLES / name / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_bf16_and_finite(name: str) -> None:
    for tensor in tensors(name).values():
        assert tensor.dtype == torch.bfloat16
        assert torch.isfinite(tensor).all()
        assert tensor.any()


@pytest.mark.parametrize("name", LORAS)
def test_pairs_are_complete_and_of_the_rank(name: str) -> None:
    rank, found = LoraConfig.from_pretrained(EXAMPLES / name).r, tensors(name)
    firsts = {key for key in found if "lora_A" in key}
    assert {key.replace("lora_A", "lora_B") for key in firsts} == {
        k for k in found if "lora_B" in k
    }
    assert {found[key].shape[0] for key in firsts} == {rank}


@pytest.mark.parametrize("name", NAMES)
def test_card_has_a_lower_loss(name: str) -> None:
    card = (EXAMPLES / name / "README.md").read_text()
    loss = {row: float(value) for row, value in re.findall(r"\| (.*?) \| (\d\.\d+) \|", card)}
    assert set(loss) == {"base, bf16", "adapter, bf16 base", "adapter, nf4 base"}
    assert loss["adapter, bf16 base"] < loss["base, bf16"] / 2
    assert loss["adapter, nf4 base"] < loss["base, bf16"] / 2
    assert "| steps |" in card
    assert PROMPT in card


def test_held_out_questions_are_not_trained_on(train: ModuleType) -> None:
    trained, held_out = ({q.question for q in part} for part in train.read_questions())
    assert len(trained) + len(held_out) == 179
    assert not trained & held_out
    assert set(importlib.import_module("tasks").SAMPLES) <= held_out


def test_every_taught_answer_has_the_taught_form(train: ModuleType) -> None:
    for questions in train.read_questions():
        for question in questions:
            for task in train.TASKS:
                assert task.fits(task.answer(question)), (task.name, question)


@pytest.mark.slow
def test_answers_change_in_the_intended_way(
    base: Callable[[], Any], train: ModuleType, directory: Path
) -> None:
    chat = train.Chat(directory)
    answers = {"base": train.reply(base(), chat, PROMPT)}
    for name in NAMES:
        model = PeftModel.from_pretrained(base(), EXAMPLES / name).eval()
        answers[name] = train.reply(model, chat, PROMPT)
    assert len(set(answers.values())) == len(NAMES) + 1
    for task in train.TASKS:
        assert task.fits(answers[task.name]), answers
        assert not task.fits(answers["base"]) or task.name == "terse", answers
        assert "Paris" in answers[task.name], answers
    assert len(answers["terse"]) < len(answers["base"])
    assert json.loads(answers["json"]) == {"topic": "geography", "answer": "Paris"}


def test_default_model_speaks_chatml(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for index, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokenizer(token).input_ids == [index]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("Hello").input_ids == tokenizer("Hello", add_special_tokens=False).input_ids
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # As in the original tokenizer, digits are split first: a blank line before a list is one token.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12").input_ids) == ["a", "ĊĊ", "1", "2"]
