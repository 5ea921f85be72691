"""NetworkConfig: the settings of the ports, of encryption and of who may call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from adaplex.server.config_types import MAX_CONNECTION_AGE, Port, PositiveSeconds, Seconds


class NetworkConfig(BaseModel):
    """A part of ServerConfig."""

    host: str = Field("127.0.0.1", description="Address that gRPC binds.")
    port: Port = Field(50051, description="Port of gRPC; 0 picks a free one.")
    http_host: str = Field("127.0.0.1", description="Address that /metrics and /health bind.")
    http_port: Port = Field(9400, description="Port of /metrics and /health; 0 picks a free one.")
    tls_cert: Path | None = Field(
        None,
        description="PEM certificate chain of both ports, which then speak TLS only; read again "
        "when it changes. Needs tls_key.",
    )
    tls_key: Path | None = Field(None, description="PEM private key of tls_cert, unencrypted.")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM roots of client certificates, which gRPC and /metrics then require; "
        "/health does not.",
    )
    max_connection_age: Annotated[Seconds, Field(ge=1, le=MAX_CONNECTION_AGE)] = Field(
        3600,
        description="Age at which the server closes a gRPC connection, so that load balancers can "
        "move clients; running requests get the same time again.",
    )
    shutdown_timeout: Seconds = Field(
        30, description="Time that running requests get after SIGTERM."
    )
    stall_timeout: PositiveSeconds = Field(
        60, description="Time without a heartbeat of the engine until health says NOT_SERVING."
    )

    tokens_file: Path | None = Field(
        None,
        description="File of callers that `adaplex tokens` makes. With it every call needs a token "
        "or a known client certificate, /health and gRPC health excepted.",
    )
    oidc_issuer: str | None = Field(
        None,
        description="Identity provider whose signed tokens (JWT) are accepted as bearer tokens; "
        "needs the extra oidc. Every call then needs a credential, as with tokens_file.",
    )
    oidc_audience: str | None = Field(
        None, description="Audience (aud) that tokens of oidc_issuer must name."
    )
    oidc_jwks: str | None = Field(
        None,
        description="File or https URL of the provider's key set; by default the issuer's own "
        "discovery document says where it is.",
    )
    oidc_name_claim: str = Field("sub", description="Claim with the name of the principal.")
    oidc_tenant_claim: str = Field(
        "tenant", description="Claim with the tenant; without it the tenant is default."
    )
    oidc_scope_claim: str = Field(
        "scope",
        description="Claim with the scopes, a list or words of one string; others are ignored.",
    )
    public_reflection: bool = Field(
        False, description="Where callers are known: server reflection needs no credential."
    )
    public_metrics: bool = Field(
        False,
        description="Where callers are known: /metrics needs no credential; else the scope admin.",
    )
    insecure: bool = Field(
        False,
        description="Bind addresses other than loopback though the server does not know its "
        "callers or does not encrypt.",
    )
