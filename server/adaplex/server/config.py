"""ServerConfig: every setting of the server, from flags, environment, a YAML file or defaults."""

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
    MAX_CONNECTION_AGE,
    MIB,
    Count,
    GroupSize,
    NamedPaths,
    Names,
    Paths,
    Port,
    PositiveSeconds,
    Seconds,
    Share,
    available_cpus,
    default_store,
)
from adaplex.server.settings_file import SettingsFile

MAX_CHUNK_BYTES = MIB
"""Largest data of one upload chunk. The largest gRPC message, so also the longest prompt text, is a
little more: app.MAX_MESSAGE_BYTES."""


class ConfigError(Exception):
    """The configuration cannot be served. Names every field at fault and its limit."""


class ServerConfig(BaseSettings):
    """Frozen settings. A flag beats ADAPLEX_<FIELD>, which beats the YAML file, which beats the
    default. Byte sizes take units, such as 512MiB.
    """

    model_config = SettingsConfigDict(
        env_prefix="ADAPLEX_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    config: Path | None = Field(None, description="YAML file of settings.")

    model: str = Field(
        "smollm2-135m-instruct",
        description="Base model: hub id, directory of safetensors, or GGUF file.",
    )
    model_name: str | None = Field(None, description="Name to show for it instead of its own.")
    quantization: Literal["nf4", "int8", "int4-group", "bf16", "fp32"] = Field(
        "nf4", description="How the base is kept."
    )
    group_size: GroupSize = Field(32, description="Inputs that share a scale in int4-group.")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="Compute dtype.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    enforce_eager: bool = Field(
        False, description="Launch decoding steps kernel by kernel, not from CUDA graphs."
    )
    cache: Path | None = Field(None, description="Folder for fetched models; XDG cache if unset.")
    save_quantized: bool = Field(
        True, description="Keep weights of 4 and 8 bits in the cache for a faster next start."
    )
    threads: Literal["auto"] | Count = Field(
        "auto",
        description="Compute threads; auto leaves one of three cores or more to the network.",
    )

    host: str = Field("127.0.0.1", description="Address that gRPC binds.")
    port: Port = Field(50051, description="gRPC port; 0 picks a free one.")
    http_host: str = Field("127.0.0.1", description="Address that /metrics and /health bind.")
    http_port: Port = Field(9400, description="Their port; 0 picks a free one.")
    max_connection_age: Annotated[float, Field(ge=1, le=MAX_CONNECTION_AGE)] = Field(
        3600, description="Seconds after which a connection is asked to move on."
    )
    shutdown_timeout: Seconds = Field(30, description="Seconds that running requests get on stop.")
    stall_timeout: PositiveSeconds = Field(
        60, description="Seconds without an engine heartbeat until health says NOT_SERVING."
    )

    store_dir: Path = Field(default_factory=default_store, description="Where adapters are kept.")
    adapter_roots: Paths = Field(
        (),
        description="Folder that LoadAdapter may read from; none refuses LoadAdapter. "
        "Repeat the flag for more; ADAPLEX_ADAPTER_ROOTS takes commas.",
    )
    shared_store: str | None = Field(
        None,
        description="s3://bucket/prefix that several servers share; store_dir is then its cache. "
        "Credentials come from AWS_* variables.",
    )
    refresh_seconds: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] = Field(
        0.5, description="Age at which what is known of the shared store is looked up again."
    )
    resolve_from: Names = Field(
        (),
        description="Where an adapter that a request names is looked for on first use, such as "
        "/srv/adapters/{name}, hf://org/{name} or s3://bucket/{name}. Repeat the flag for more.",
    )
    hub_allow: Names = Field(
        (),
        description="org/repo pattern that LoadAdapter may fetch from the hub, such as my-org/*; "
        "none refuses hf:// URIs. Repeat the flag for more.",
    )
    bucket_allow: Names = Field(
        (),
        description="s3://bucket/prefix that LoadAdapter may read; none refuses s3:// URIs. "
        "Repeat the flag for more.",
    )
    base_policy: Literal["off", "warn", "refuse"] = Field(
        "warn", description="What to do about an adapter that was trained on another base."
    )
    signature_policy: Literal["off", "warn", "require"] = Field(
        "off", description="What to do about an adapter without a valid OpenSSF signature."
    )
    signature_keys: Paths = Field(
        (), description="PEM public key that may sign adapters. Repeat the flag for more."
    )
    adapters: NamedPaths = Field(
        default_factory=dict,
        description="name=path of an adapter to import at start. "
        "Repeat the flag for more; ADAPLEX_ADAPTERS takes commas.",
    )
    adapter_mode: Literal["unmerged", "merged", "auto"] = Field(
        "unmerged", description="How adapters are applied when a request does not say."
    )
    arena_bytes: ByteSize = Field(
        ByteSize(256 * MIB), gt=0, description="Bytes of adapters in device memory at once."
    )
    host_bytes: ByteSize = Field(
        ByteSize(1024 * MIB),
        ge=0,
        description="Bytes of adapters kept ready in host memory; 0 reads them from the disk.",
    )
    prefetch_ahead: Annotated[int, Field(ge=0)] = Field(
        64, description="Requests in the queue whose adapters are fetched into host memory early."
    )
    max_pinned_share: Share = Field(
        0.5, description="Share of arena_bytes that pinned adapters may take."
    )
    merged_bytes: ByteSize = Field(
        ByteSize(1024 * MIB), ge=0, description="Bytes of merged weights; 0 refuses merged mode."
    )
    max_adapter_bytes: ByteSize = Field(
        ByteSize(512 * MIB), gt=0, description="Largest adapter that is taken."
    )
    max_adapter_rank: Count = Field(256, description="Largest rank that is taken.")
    max_adapters: Count = Field(10_000, description="Adapter names in the store.")
    max_versions: Count = Field(1000, description="Versions under one name.")
    max_store_bytes: ByteSize = Field(
        ByteSize(1024**2 * MIB), gt=0, description="Bytes of all stored adapters."
    )
    cache_bytes: ByteSize = Field(
        ByteSize(16 * 1024 * MIB),
        gt=0,
        description="Bytes of the shared store's adapters kept on this disk.",
    )
    gc_interval: PositiveSeconds = Field(
        600, description="Seconds between two searches for content that nothing names."
    )
    max_uploads: Count = Field(4, description="Uploads and loads at once.")
    upload_idle_timeout: PositiveSeconds = Field(30, description="Seconds an upload may be silent.")

    kv_cache_bytes: ByteSize = Field(
        ByteSize(512 * MIB), gt=0, description="Bytes of the KV cache."
    )
    max_model_len: Count | None = Field(
        None, description="Longest prompt plus answer; the model's and the cache's limit if unset."
    )
    max_running: Count = Field(64, description="Requests in one step.")
    max_waiting: Count = Field(1024, description="Requests in the queue.")
    max_step_tokens: Count = Field(512, description="Tokens in one step.")
    max_chunk_tokens: Count = Field(512, description="Prompt tokens of one request in one step.")
    max_stretch: Annotated[float, Field(gt=1)] = Field(
        2.0,
        description="How many times as long prompts may make a step in which others generate; "
        "inf lets them fill every step.",
    )
    stream_interval: Count = Field(
        1,
        description="Tokens in a message of a streamed answer, but for its first and last; more "
        "leave the cores more time to compute.",
    )
    prefix_cache: bool = Field(True, description="Reuse the KV of equal prompt beginnings.")

    vllm_metric_names: bool = Field(
        False, description="Render the metrics under their vllm: names too."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe line that is logged."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto is console on a terminal, else json."
    )

    @property
    def compute_threads(self) -> int:
        """`threads`, resolved. Compute threads share work by tickets, so that the event loop takes
        no more from them than it uses; a core of its own is worth it from three on.
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
        """Flags, environment, then the YAML file that one of them names."""
        file = {**env_settings(), **init_settings()}.get("config")
        return init_settings, env_settings, SettingsFile(settings_cls, yaml_file=file)
