"""The daemon's configuration: flags over environment (`BACKBONED_*`) over `backboned.toml` over defaults.

Each setting is declared once, in `Config`; its flag, its variable and its key in the file have the same name. A
`Config` is made at the command's entry, is immutable, and nothing below reads files or the environment again.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, StringConstraints, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

ENV_PREFIX = "BACKBONED_"
FILE_NAME = "backboned.toml"
REMOTE_SCHEMES = ("s3", "gs", "http", "https")
NOT_SETTINGS = frozenset({"BACKBONED_SERVER", "BACKBONED_CONFIG"})
"""Variables that commands read and that are no settings of the daemon."""


class ConfigError(Exception):
    """A setting that can't be used: one line that names the flag, the variable or the key in the file."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Config(BaseSettings):
    """What the daemon is told. `Config(...)` itself reads neither files nor the environment: see `load_config`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", validate_default=True
    )

    checkpoint_dir: Path = Field(default=Path("checkpoints"), description="Folder of models and their checkpoints.")
    state_dir: Path = Field(default=Path(".backboned"), description="Folder for jobs, aliases and work in progress.")
    data_root: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="Folder that FineTune may read datasets below; repeatable. Without any, it may read none.",
    )
    remote_data: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="What FineTune may fetch: s3, gs, http, https, or the beginning of such a URI; repeatable.",
    )
    weights: Annotated[Mapping[str, Path], NoDecode] = Field(
        default={}, description="A backbone's pretrained weights, as BACKBONE=FILE; repeatable."
    )
    plugin: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Module with further backbone plugins; repeatable."
    )
    signing_key: Path | None = Field(
        default=None, description="Private key that checkpoints are signed by as they are written; a PEM file."
    )
    trusted_key: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="Public key; with any, only checkpoints signed by one are served. A PEM file; repeatable.",
    )
    host: Annotated[str, StringConstraints(min_length=1)] = Field(
        default="127.0.0.1", description="Address to listen on."
    )
    grpc_port: int = Field(default=8001, ge=0, le=65535, description="Port for gRPC; 0 picks a free one.")
    http_port: int = Field(default=8002, ge=0, le=65535, description="Port for metrics and health; 0 picks a free one.")
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        default="auto", description="Where networks run: auto, cpu, cuda or cuda:N."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Of the networks' arithmetic: auto, fp32, bf16 or fp16."
    )
    max_message_bytes: ByteSize = Field(
        default=ByteSize(64 * 2**20), ge=2**16, le=2**31 - 1, description="Largest gRPC message, as in 64MiB."
    )
    max_image_pixels: int = Field(default=100_000_000, ge=1, description="Largest image, in pixels.")
    max_queued_images: int = Field(default=4096, ge=1, description="Images that may wait for the device.")
    max_queued_bytes: ByteSize = Field(default=ByteSize(2**30), ge=1, description="Bytes of images that may wait.")
    engine_threads: int = Field(
        default=0, ge=0, le=256, description="Batches that run at once; 0 chooses: one a core, or two on CUDA."
    )
    compile: Literal["auto", "off"] = Field(
        default="auto", description="Whether networks are compiled, where a compiler is there: auto or off."
    )
    frontends: Annotated[str, BeforeValidator(str), StringConstraints(pattern=r"^(auto|[0-9]|[1-5][0-9]|6[0-4])$")] = (
        Field(
            default="auto", description="Processes that take calls and decode images for the daemon: auto, or 0 to 64."
        )
    )
    max_batch_size: int = Field(default=32, ge=1, le=1024, description="Largest batch of images.")
    scan_interval_seconds: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="Between looks at all of the checkpoint folder; a change is looked at at once.",
    )
    settle_seconds: float = Field(
        default=5.0, gt=0, le=3600, description="How long an incomplete file may stand still before it is quarantined."
    )
    watch: Literal["auto", "inotify", "polling"] = Field(
        default="auto", description="How changes of the checkpoint folder are noticed: auto, inotify or polling."
    )
    max_loaded_versions: int = Field(
        default=4, ge=1, description="Newest versions of each model that are kept in memory."
    )
    model_memory: ByteSize | Literal["auto"] = Field(
        default="auto",
        description="Bytes that models may take, as in 8GiB; auto: 60 % of the device's memory. Beyond it they are "
        "loaded when asked for.",
    )
    keep_versions: int = Field(
        default=0, ge=0, description="Newest versions of each model that are kept on disk; 0: any number."
    )
    keep_days: float = Field(
        default=0.0,
        ge=0,
        description="Days for which a version beyond those is kept; 0: none.",
    )
    drain_seconds: float = Field(
        default=20.0, ge=0, le=3600, description="How long a stop waits for what is under way."
    )
    training_threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of a trainer; 0 chooses.")
    trainer_standby: Literal["auto", "off"] = Field(
        default="auto",
        description="Whether a process to fork trainers from stays for ten minutes, in some 400 MB: auto or off.",
    )
    cache_size: ByteSize = Field(
        default=ByteSize(16 * 2**30), ge=0, description="Bytes of features that are kept for further jobs, as in 16GiB."
    )
    max_queued_jobs: int = Field(default=1000, ge=1, description="FineTune jobs that may wait.")
    upload_quota: ByteSize = Field(
        default=ByteSize(32 * 2**30), ge=0, description="Bytes of images that may be uploaded, as in 32GiB."
    )
    remember_answers: ByteSize = Field(
        default=ByteSize(256 * 2**20),
        ge=0,
        description="Bytes of answers that are kept for ReportOutcome, the newest, as in 256MiB; 0 keeps none.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severity that is logged: debug, info, warning or error."
    )
    ready_file: Path | None = Field(default=None, description="File to write the addresses to, as JSON, once ready.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor alone; `load_config` brings the other sources."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @field_validator("data_root", "trusted_key", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value

    @field_validator("plugin", "remote_data", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("weights", mode="before")
    @classmethod
    def _split_pairs(cls, value: object) -> object:
        if isinstance(value, str):
            value = [pair for pair in value.split(",") if pair.strip()]
        if isinstance(value, Mapping):
            return value
        if not isinstance(value, list | tuple):
            raise ValueError("expected BACKBONE=FILE")
        pairs: dict[str, str] = {}
        for pair in value:
            name, equals, file = str(pair).partition("=")
            if not equals or not name.strip() or not file.strip():
                raise ValueError(f"expected BACKBONE=FILE, got {pair!r}")
            pairs[name.strip()] = file.strip()
        return pairs

    @field_validator("checkpoint_dir", "state_dir", "ready_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return _expanded(value) if value else None

    @field_validator("data_root")
    @classmethod
    def _folders(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        folders = tuple(_expanded(path) for path in value)
        if missing := [path for path in folders if not path.is_dir()]:
            raise ValueError(f"no such folder: {missing[0]}")
        return folders

    @field_validator("remote_data")
    @classmethod
    def _remote(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            scheme, separator, rest = entry.partition("://")
            if scheme not in REMOTE_SCHEMES or (separator and (not rest.strip("/") or "@" in rest or "?" in rest)):
                raise ValueError(f"expected {', '.join(REMOTE_SCHEMES)}, or a URI such as s3://bucket/, got {entry!r}")
        return value

    @field_validator("weights")
    @classmethod
    def _files(cls, value: Mapping[str, Path]) -> Mapping[str, Path]:
        return {name: _existing(path) for name, path in value.items()}

    @field_validator("signing_key", "trusted_key")
    @classmethod
    def _keys(cls, value: Path | tuple[Path, ...] | None) -> Path | tuple[Path, ...] | None:
        if isinstance(value, tuple):
            return tuple(map(_existing, value))
        return _existing(value) if value else None


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"no such user's home folder: {path}") from error


def _existing(path: Path) -> Path:
    if not (file := _expanded(path)).is_file():
        raise ValueError(f"no such file: {file}")
    return file


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and for each of its settings where the value comes from, for people to read."""

    config: Config
    sources: Mapping[str, str]


def load_config(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> LoadedConfig:
    """The configuration of this process. `flags` are settings by name, as strings, lists of them or typed values.

    The file is `file`, or else `$BACKBONED_CONFIG`, or else `backboned.toml` in the working folder if there is one.
    Raises `ConfigError` for a file that can't be read, an unknown key or a bad value.
    """
    sources = dict.fromkeys(Config.model_fields, "default")
    path = _file(file)
    from_file = _read(path) if path else {}
    from_environment = _environment()
    sources |= {name: f"{name} in {path}" for name in from_file}
    sources |= {name: f"{ENV_PREFIX}{name.upper()}" for name in from_environment}
    sources |= {name: f"--{name.replace('_', '-')}" for name in flags or {}}
    values = {**from_file, **from_environment, **(flags or {})}
    try:
        return LoadedConfig(Config(**values), sources)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from error


def unknown_variables() -> list[str]:
    """Set variables that look like settings and are none, each with the nearest name."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Config.model_fields} | NOT_SETTINGS
    found = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)
    return [name + _nearest(name, known) for name in found]


def _environment() -> Mapping[str, Any]:
    read: Callable[[], dict[str, Any]] = EnvSettingsSource(Config)
    return read()


def _file(given: Path | None) -> Path | None:
    if given:
        return given
    if named := os.environ.get("BACKBONED_CONFIG"):
        return Path(named)
    return Path(FILE_NAME) if Path(FILE_NAME).is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {path}")
        values = TomlConfigSettingsSource(Config, path).toml_data
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    for name in values:
        if name not in Config.model_fields:
            raise ConfigError(f"unknown key {name!r} in {path}" + _nearest(name, Config.model_fields))
    return dict(values)


def _nearest(name: str, known: Mapping[str, object] | set[str] | frozenset[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(known))}"


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first problem, as one line."""
    problem = error.errors()[0]
    name = str(problem["loc"][0])
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())
    got = problem["input"]
    if problem["type"] == "string_pattern_mismatch":
        message = "expected " + str(Config.model_fields[name].description).partition(": ")[2].rstrip(".")
    shown = f", got {got!r}" if isinstance(got, str | int | float) and repr(got) not in message else ""
    message = message.replace("Input should", "should", 1)
    return f"{sources.get(name, name)}: {message[:1].lower()}{message[1:]}{shown}"
