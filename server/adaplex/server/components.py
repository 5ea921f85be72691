"""Components: the objects that a server consists of, built from the configuration or by a test."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from adaplex.adapters.api import AdapterRegistry, Importer
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.config import EngineConfig
from adaplex.server.config import ServerConfig
from adaplex.server.generation_messages import ModelLimits
from adaplex.server.metrics import Metrics
from adaplex.server.services.info import ModelInfo
from adaplex.server.text import Tokenizer


@dataclass(frozen=True)
class Components:
    """The objects that app.Server wires. The server closes `engine` and `registry` at its stop."""

    config: ServerConfig
    model: ModelInfo
    limits: ModelLimits
    tokenizer: Tokenizer
    registry: AdapterRegistry
    importer: Importer
    engine_config: EngineConfig
    engine: AsyncEngine
    metrics: Metrics
    prometheus: CollectorRegistry
