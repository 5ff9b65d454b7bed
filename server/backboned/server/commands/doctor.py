"""`backboned doctor`: what a daemon started here would have, and what it lacks."""

import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Literal, NamedTuple

import typer

from backboned.server.commands.options import ConfigFile, Json
from backboned.server.commands.output import console, fail, print_json, show, table
from backboned.server.config import Config, LoadedConfig, load_config, unknown_variables

app = typer.Typer(rich_markup_mode=None, add_completion=False)

DISTRIBUTIONS = ("backboned", "torch", "torchvision", "timm", "grpcio", "protobuf")


class Finding(NamedTuple):
    """One thing that was looked at: `level` is `ok`, `warn` (works, with less) or `fail` (`serve` won't work)."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    detail: str


@app.command()
def doctor(config: ConfigFile = None, json: Json = False) -> None:
    """Show the configuration and where it comes from, versions, the device, plugins, and what is amiss."""
    loaded = load_config(file=config)
    findings = list(_findings(loaded.config))
    if json:
        settings = loaded.config.model_dump(mode="json")
        print_json(
            {
                "settings": {name: {"value": settings[name], "source": loaded.sources[name]} for name in settings},
                "findings": [finding._asdict() for finding in findings],
            }
        )
    else:
        _show(loaded, findings)
    if failed := [finding for finding in findings if finding.level == "fail"]:
        fail(f"{failed[0].subject}: {failed[0].detail}")
        raise typer.Exit(1)


def _findings(config: Config) -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in DISTRIBUTIONS:
        yield Finding("ok", name, _version(name))
    for name in unknown_variables():
        yield Finding("warn", "environment", f"no such setting: {name}")
    for subject, folder in (("checkpoint_dir", config.checkpoint_dir), ("state_dir", config.state_dir)):
        yield _writable(subject, folder)
    if not config.data_root:
        yield Finding("warn", "data_root", "none: FineTune can read no dataset; name folders with --data-root")
    for subject, port in (("grpc_port", config.grpc_port), ("http_port", config.http_port)):
        yield _port(subject, config.host, port)
    yield from _signatures(config)
    yield _compiler()
    yield _device(config)
    yield from _plugins(config)


def _version(distribution: str) -> str:
    try:
        return distribution_version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _writable(subject: str, folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding("fail", subject, f"{existing} can't be written to: {error.strerror}")
    free_bytes = shutil.disk_usage(existing).free
    free = f"{free_bytes / 1e9:.1f} GB free"
    made = "" if existing == folder else ", will be made"
    return Finding("warn" if free_bytes < 1e9 else "ok", subject, f"{folder}: writable, {free}{made}")


def _port(subject: str, host: str, port: int) -> Finding:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return Finding(
            "warn", subject, f"{host}:{port} can't be had: {os.strerror(error.errno or 0)}; a daemon may be running"
        )
    return Finding("ok", subject, f"{host}:{port} is free" if port else "any free one")


def _signatures(config: Config) -> Iterator[Finding]:
    if config.signing_key is None and not config.trusted_key:
        return
    from backboned.registry import BackbonedError
    from backboned.registry.signatures import Signer, Trust

    yield Finding("ok", "model-signing", _version("model-signing"))
    try:
        Signer.of(config.signing_key)
        Trust.of(config.trusted_key)
    except BackbonedError as error:
        yield Finding("fail", "signatures", error.message)
        return
    made = "checkpoints are signed" if config.signing_key else "checkpoints that are written here are not signed"
    keys = f"{len(config.trusted_key)} key{'s' * (len(config.trusted_key) > 1)}"
    served = f"only those signed by one of {keys} are served" if config.trusted_key else "unsigned ones are served too"
    yield Finding("warn" if config.trusted_key and not config.signing_key else "ok", "signatures", f"{made}; {served}")


def _compiler() -> Finding:
    from backboned.server.compute.toolchain import missing_for_compiling

    missing = missing_for_compiling()
    return Finding("warn", "compiler", missing) if missing else Finding("ok", "compiler", "networks can be compiled")


def _device(config: Config) -> Finding:
    import torch

    from backboned.registry import BackbonedError
    from backboned.server.compute.device import Device

    try:
        chosen = Device.choose(config.device, config.precision)
    except BackbonedError as error:
        return Finding("fail", "device", error.message)
    name = torch.cuda.get_device_name(chosen.device) if chosen.device.type == "cuda" else f"{os.cpu_count()} cores"
    return Finding("ok", "device", f"{chosen} ({name}), {str(chosen.dtype).removeprefix('torch.')}")


def _plugins(config: Config) -> Iterator[Finding]:
    from backboned.registry import BackbonedError, Catalogue

    try:
        catalogue = Catalogue.installed(config.plugin)
    except BackbonedError as error:
        yield Finding("fail", "plugin", error.message)
        return
    yield Finding("ok", "backbones", f"{len(catalogue)}, families: {', '.join(f.prefix for f in catalogue.families)}")
    for broken in catalogue.broken:
        yield Finding("warn", "plugin", f"{broken.name} from {broken.origin} is broken: {broken.reason}")
    for name in config.weights:
        try:
            catalogue.get(name)
        except BackbonedError as error:
            yield Finding("fail", "weights", error.message)


def _show(loaded: LoadedConfig, findings: Iterable[Finding]) -> None:
    settings = loaded.config.model_dump(mode="json")
    rows = [[name, _shown(value), loaded.sources[name]] for name, value in settings.items()]
    show(table(["setting", "value", "from"], rows))
    console().print()
    show(table(["", "what", "found"], [[f.level, f.subject, f.detail] for f in findings]))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={file}" for name, file in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
