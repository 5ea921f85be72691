"""ServerConfig: every setting of the server, with its type, default and description."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from adaplex.server.config_types import (
    MIB,
    Count,
    GroupSize,
    NamedPaths,
    Names,
    Paths,
    PositiveSeconds,
    Seconds,
    Share,
    available_cpus,
    default_store,
)
from adaplex.server.network_config import NetworkConfig

MAX_CHUNK_BYTES = MIB
"""Data of one upload chunk. The largest gRPC message, so also the longest prompt text, is a little
larger: app.MAX_MESSAGE_BYTES."""


class ServerConfig(NetworkConfig, BaseSettings):
    """Every setting of the server, frozen. A flag overrides ADAPLEX_<NAME>, which overrides the
    YAML file, which overrides the default. Byte sizes accept units, such as 512MiB.
    """

    model_config = SettingsConfigDict(
        env_prefix="ADAPLEX_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    config: Path | None = Field(None, description="YAML file of settings.")

    model: str = Field(
        "smollm2-135m-instruct",
        description="Base model: hub id, directory of safetensors, or GGUF file.",
    )
    model_name: str | None = Field(
        None, description="Name of the base model in responses and metrics, instead of its own."
    )
    quantization: Literal["nf4", "int8", "int4-group", "bf16", "fp32"] = Field(
        "nf4", description="Weight format of the base's linear layers."
    )
    group_size: GroupSize = Field(
        32, description="Inputs that share a scale and a zero point in int4-group."
    )
    head: Literal["bf16", "int8"] = Field(
        "bf16",
        description="Output layer that greedy steps read on a CPU: bf16 is the layer itself, int8 "
        "an 8-bit copy, then the few rows of the layer that can win; the tokens are the same.",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Compute dtype; auto is fp32 for quantization fp32, else bf16."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of the model; auto is cuda if there is one, else cpu."
    )
    cpu_activations: Literal["float", "int8"] = Field(
        "float",
        description="On a CPU, how activations are multiplied by 4-bit weights: float, in the "
        "compute dtype, or int8, rounded to 8 bits a block of 32 inputs, which is faster and less "
        "exact.",
    )
    enforce_eager: bool = Field(
        False,
        description="On a CUDA device, launch decode steps kernel by kernel instead of replaying "
        "CUDA graphs.",
    )
    cache: Path | None = Field(
        None,
        description="Folder of fetched models, quantized weights and built kernels; by default "
        "adaplex in the user's XDG cache folder.",
    )
    save_quantized: bool = Field(
        True,
        description="Save quantized weights in the cache, so that the next start maps them instead "
        "of quantizing again.",
    )
    max_cache_bytes: ByteSize = Field(
        ByteSize(16 * 1024 * MIB),
        ge=0,
        description="Quantized weights and built kernels in the cache; a start removes the least "
        "recently used ones beyond it, but none that is in use.",
    )
    threads: Literal["auto"] | Count = Field(
        "auto",
        description="Compute threads; auto is every core, less one for the network from three "
        "cores on.",
    )

    store_dir: Path = Field(
        default_factory=default_store,
        description="Folder of stored adapters; servers on one machine may share it.",
    )
    shared_store: str | None = Field(
        None,
        description="s3://bucket/prefix of a store that several machines share; store_dir is then "
        "its cache. Credentials come from AWS_* variables.",
    )
    refresh_seconds: Annotated[Seconds, Field(le=60)] = Field(
        0.5, description="Age at which cached names of the shared store are read again."
    )
    cache_bytes: ByteSize = Field(
        ByteSize(16 * 1024 * MIB),
        gt=0,
        description="Adapter files of the shared store that are cached on this machine.",
    )
    max_store_bytes: ByteSize = Field(
        ByteSize(1024**2 * MIB), gt=0, description="Quota of all stored adapter files."
    )
    max_adapters: Count = Field(10_000, description="Quota of adapter names in the store.")
    max_versions: Count = Field(1000, description="Quota of versions under one name.")
    gc_interval: PositiveSeconds = Field(
        600,
        description="Interval of the garbage collection that removes content without a name.",
    )

    adapters: NamedPaths = Field(
        default_factory=dict,
        description="name=path of an adapter to import at start. "
        "Repeat the flag for more; ADAPLEX_ADAPTERS separates them by commas.",
    )
    adapter_roots: Paths = Field(
        (),
        description="Folder that LoadAdapter may read; without one, LoadAdapter refuses paths. "
        "Repeat the flag for more; ADAPLEX_ADAPTER_ROOTS separates them by commas.",
    )
    hub_allow: Names = Field(
        (),
        description="org/repo pattern of hub repositories that LoadAdapter may fetch, such as "
        "my-org/*; without one, LoadAdapter refuses hf:// URIs. Repeat the flag for more.",
    )
    bucket_allow: Names = Field(
        (),
        description="s3://bucket/prefix that LoadAdapter may read; without one, LoadAdapter "
        "refuses s3:// URIs. Repeat the flag for more.",
    )
    resolve_from: Names = Field(
        (),
        description="Where to find an unknown adapter when a request first names it, such as "
        "/srv/adapters/{name}, hf://org/{name} or s3://bucket/{name}. Repeat the flag for more.",
    )
    base_policy: Literal["off", "warn", "refuse"] = Field(
        "warn",
        description="Policy for adapters that were trained on another base: warn adds a warning, "
        "refuse rejects them, off does not check.",
    )
    signature_policy: Literal["off", "warn", "require"] = Field(
        "off",
        description="Policy for adapters without a valid OpenSSF signature: warn adds a warning, "
        "require rejects them, off does not check.",
    )
    signature_keys: Paths = Field(
        (), description="PEM public key that may sign adapters. Repeat the flag for more."
    )
    max_adapter_bytes: ByteSize = Field(
        ByteSize(512 * MIB), gt=0, description="Largest adapter accepted, all files together."
    )
    max_adapter_rank: Count = Field(256, description="Largest rank accepted.")
    max_uploads: Count = Field(4, description="Uploads, loads and merges at once.")
    upload_idle_timeout: PositiveSeconds = Field(
        30, description="Time without a message after which an upload is ended."
    )

    adapter_mode: Literal["unmerged", "merged", "auto"] = Field(
        "unmerged", description="Adapter mode of requests that leave it unspecified."
    )
    arena_bytes: ByteSize = Field(
        ByteSize(256 * MIB), gt=0, description="Arena: device memory for unmerged adapters."
    )
    max_pinned_share: Share = Field(
        0.5, description="Largest fraction of the arena that pinned adapters may occupy."
    )
    host_bytes: ByteSize = Field(
        ByteSize(1024 * MIB),
        ge=0,
        description="Host cache: packed adapters in host memory; 0 reads them from the disk.",
    )
    prefetch_ahead: Annotated[int, Field(ge=0)] = Field(
        64, description="Waiting requests whose adapters are prefetched into the host cache."
    )
    merged_bytes: ByteSize = Field(
        ByteSize(1024 * MIB),
        ge=0,
        description="Memory for merged weights; 0 refuses merged mode.",
    )

    kv_cache_bytes: ByteSize = Field(ByteSize(512 * MIB), gt=0, description="Size of the KV cache.")
    max_model_len: Count | None = Field(
        None,
        description="Longest context, prompt and generated tokens together; by default the limit "
        "of the model and of the KV cache.",
    )
    max_running: Count = Field(64, description="Requests in one batch.")
    max_waiting: Count = Field(1024, description="Requests in the waiting queue.")
    max_step_tokens: Count = Field(
        512, description="Tokens in one step: one per decoding request, the rest for prompts."
    )
    max_chunk_tokens: Count = Field(
        512, description="Prompt tokens of one request in one step (chunked prefill)."
    )
    max_stretch: Annotated[float, Field(gt=1)] = Field(
        2.0,
        description="Factor by which prompt chunks may lengthen a step in which other requests "
        "decode; inf lets them fill every step. Prompts of up to 128 tokens alone may add 0.1 s or "
        "32 rows in any case.",
    )
    stream_interval: Count = Field(
        1,
        description="Tokens per message of a stream, except its first and last message; more "
        "leave the cores more time to compute.",
    )
    prefix_cache: bool = Field(True, description="Reuse the KV of equal prompt prefixes.")

    vllm_metric_names: bool = Field(
        False, description="Expose the metrics under vLLM's names too, with the prefix vllm:."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level that is logged."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="Format of log lines; auto is console on a terminal, else json."
    )

    @property
    def compute_threads(self) -> int:
        """`threads`, with auto resolved. Compute threads draw work in small units, so the event
        loop slows them only by the time it uses; a core of its own pays from three cores on.
        """
        cpus = available_cpus()
        return (cpus if cpus < 3 else cpus - 1) if self.threads == "auto" else self.threads

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns flags, environment, then the YAML file that one of them names."""
        from adaplex.server.settings_file import SettingsFile  # imports yaml, not needed by --help

        file = {**env_settings(), **init_settings()}.get("config")
        return init_settings, env_settings, SettingsFile(settings_cls, yaml_file=file)
