"""Reads the weights of a base into a model of transformers, whole or not at all.

transformers makes random numbers for a weight that is missing, ignores one that is left over, and
attaches an adapter that lies in the same folder. Here the tensors of the base's own files are
passed to it, and each of these differences is an error that names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.utils import logging

from adaplex.model.base.checkpoint_files import INDEX, weight_files
from adaplex.model.errors import ModelSourceError, errors_as_unsupported
from adaplex.model.modules import attention
from adaplex.model.progress import Progress

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of weights that are not quantized."""
RECOMPUTED = (
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)(position_ids|masked_bias|attn\.bias|attention\.bias)$",
)
"""Buffers that earlier versions of transformers saved, and that a model computes."""
OTHER_PARTS = (
    r"(^|\.)(vision_tower|vision_model|vision_encoder|visual|image_encoder|audio_tower|audio_encoder"
    r"|multi_modal_projector|mm_projector|image_newline|embed_vision|embed_audio)(\.|$)",
    r"(^|\.)(mtp|mtp_layers)\.",
)
"""Parts of a checkpoint that no text passes through: images, sounds, and drafts of later tokens."""
EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.*)")
EXPORT_AGAIN = "copy or export the checkpoint again, with the config.json that belongs to it"
"""Remedy of a folder that is not whole."""
NAMED = 3
"""Tensors that an error names; it has the number of the others."""


def read_weights(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype, progress: Progress
) -> nn.Module:
    """Returns the model with the weights of a checked folder, in `dtype`. Logs the tensors that the
    model has no use for, if they are of the known kinds.

    Raises ModelSourceError for weights that are not exactly those of the architecture, and
    UnsupportedModel for a file or architecture that cannot be read.
    """
    model, files = str(directory), weight_files(directory)
    tensors: dict[str, Any] = {}
    for path in files:
        try:
            file: Any = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise ModelSourceError(model, f"{path.name} cannot be read: {error}") from error
        tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    source = files[0].name if len(files) == 1 else f"the files of {INDEX}"
    refuse(model, _experts(tensors))
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):  # a text model with the config of a larger one
        config = config.get_text_config()
    with errors_as_unsupported(f"model {model!r}: its weights"), quiet_report():
        made, info = kind.from_pretrained(
            None,  # without a folder, transformers looks for no adapter
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=attention.IMPLEMENTATION,
            ignore_mismatched_sizes=True,  # refused below, with names
            output_loading_info=True,
        )
    unused = check_whole(model, source, made, info, tensors)
    types = {name: str(each.get_dtype()) for name, each in tensors.items() if name not in unused}
    refuse(model, _types(types, config))
    if unused:
        progress(f"not used, as the text model has no such part: {named(sorted(unused))}")
    return made  # type: ignore[no-any-return]


def check_whole(
    model: str,
    source: str,
    made: Any,
    info: Mapping[str, Any],
    tensors: Iterable[str],
    *,
    config: str = "config.json",
    remedy: str = EXPORT_AGAIN,
) -> set[str]:
    """Returns the tensors of a checkpoint that the model made of it has no use for, all of known
    kinds, given transformers' report of the loading. `source` names the weights, and `config` what
    describes the model.

    Raises ModelSourceError if a weight is missing, left over or of another shape.
    """
    allowed = _allowed(made)
    reasons = [
        *(f"{name} is missing from {source}" for name in sorted(info["missing_keys"])),
        *(
            f"{name} has shape {list(found)} in {source}, and {list(expected)} by {config}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ),
        *(
            f"{name} in {source} is no weight of {type(made).__name__} as {config} describes it"
            for name in sorted(info["unexpected_keys"])
            if not allowed(name)
        ),
        *map(str, info["error_msgs"]),
    ]
    refuse(model, [*reasons, *_twice(made.base_model_prefix, tensors)], remedy)
    own = made.state_dict().keys()
    return {name for name in tensors if name not in own and allowed(name)}


def refuse(model: str, reasons: Sequence[str], remedy: str = EXPORT_AGAIN) -> None:
    """Raises ModelSourceError if there are reasons."""
    if reasons:
        raise ModelSourceError(model, f"{named(reasons)}; {remedy}")


def named(names: Sequence[str]) -> str:
    """Returns the first names, and the number of the others."""
    more = f" (and {len(names) - NAMED} more)" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + more


@contextmanager
def quiet_report() -> Iterator[None]:
    """Suppresses transformers' table of differences, which the errors of this module replace."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _allowed(made: Any) -> Any:
    """Returns a function that is true for names of tensors that the model may leave unused: those
    that its class ignores, and those of RECOMPUTED, OTHER_PARTS and next-token-prediction layers.
    """
    patterns = [*RECOMPUTED, *OTHER_PARTS, *(made._keys_to_ignore_on_load_unexpected or ())]
    pattern = re.compile("|".join(f"({each})" for each in patterns))
    layers = int(made.config.num_hidden_layers)
    drafts = int(getattr(made.config, "num_nextn_predict_layers", 0) or 0)

    def allowed(name: str) -> bool:
        layer = re.search(r"\blayers\.(\d+)\.", name)
        beyond = layer is not None and layers <= int(layer[1]) < layers + drafts
        return beyond or pattern.search(name) is not None

    return allowed


def _experts(tensors: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with experts that are saved one by one: transformers stacks them in the
    order of their numbers, whichever numbers there are.
    """
    groups: dict[tuple[str, str], dict[int, list[int]]] = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            group = groups.setdefault((match[1], match[3]), {})
            group[int(match[2])] = list(tensor.get_shape())
    counts: dict[str, int] = {}
    for (experts, _), shapes in groups.items():
        counts[experts] = max(counts.get(experts, 0), *shapes)
    reasons = []
    for (experts, part), shapes in sorted(groups.items()):
        absent = [n for n in range(counts[experts] + 1) if n not in shapes]
        reasons += [f"{experts}.{n}.{part} is missing" for n in absent]
        first = shapes[min(shapes)]
        reasons += [
            f"{experts}.{n}.{part} has shape {shape}, and expert {min(shapes)} {first}"
            for n, shape in sorted(shapes.items())
            if shape != first
        ]
    return reasons


def _twice(prefix: str, tensors: Iterable[str]) -> list[str]:
    """Returns tensors that are there with and without the prefix of the inner model: transformers
    reads one of the two.
    """
    names = set(tensors)
    return [
        f"{name} and {prefix}.{name} are the same weight"
        for name in sorted(names)
        if prefix and f"{prefix}.{name}" in names
    ]


def _types(types: Mapping[str, str], config: PretrainedConfig) -> list[str]:
    """Returns weights of a quantized type in a checkpoint whose config does not say how."""
    if getattr(config, "quantization_config", None) is not None:
        return []
    return [
        f"{name} has type {kind}, and config.json has no quantization_config"
        for name, kind in sorted(types.items())
        if kind not in FLOATS
    ]
