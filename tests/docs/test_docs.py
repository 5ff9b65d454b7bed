"""What the pages say is so: links lead somewhere, commands and code are ones that exist, tables are complete."""

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, message_factory
from pydantic import ByteSize
from typer.main import get_command

from backboned.client import Client
from backboned.server.commands.application import app
from backboned.server.config import Config
from backboned.server.ops.metrics import Metrics
from backboned.server.training.options import STAGES_LEARNING_RATE, STAGES_WEIGHT_DECAY, TrainingOptions
from backboned.v1 import model_service_pb2 as pb

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"(?<!`)`(backboned [^`]+)`(?!`)")
_METRIC = re.compile(r"backboned_[a-z_]+[a-z]")
_SUFFIXES = ("_bucket", "_sum", "_count")


def test_links_lead_to_files_and_headings_that_exist(pages: list[Path]) -> None:
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in _LINK.findall(page.read_text())
        if "://" not in target and not leads_somewhere(page, target)
    ]
    assert broken == []


def test_commands_and_their_flags_exist(root: Path, commands: list[tuple[Path, str]]) -> None:
    written = [(page, line) for page, line in commands if "backboned " in line and not line.startswith("#")]
    unit = (root / "deploy" / "backboned.service").read_text()
    written += [(Path("backboned.service"), line) for line in re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)]
    assert len(written) > 20
    wrong = {f"{page.name}: {line}": problem for page, line in written if (problem := usage_error(line))}
    assert wrong == {}


def test_commands_within_sentences_exist(pages: list[Path]) -> None:
    """They may leave out what is required: a sentence about a command is no command line."""
    written = [(page, found) for page in pages for found in _INLINE.findall(re.sub(r"(?s)```.*?```", "", text(page)))]
    assert written
    wrong = {
        f"{page.name}: {line}": problem
        for page, line in written
        if (problem := usage_error(line)) and not problem.startswith("MissingParameter")
    }
    assert wrong == {}


def test_calls_by_grpcurl_are_calls_of_the_api(commands: list[tuple[Path, str]]) -> None:
    methods = pb.DESCRIPTOR.services_by_name["ModelService"].methods_by_name
    called = set()
    for _, line in commands:
        match = re.search(r"grpcurl .*backboned\.v1\.ModelService/(\w+)", line)
        if match is None:
            continue
        method = methods[match[1]]
        body = re.search(r"-d '([^']+)'|printf '([^']+)'", line)
        content = (body[1] or body[2] or "").replace("%s", "") if body else "{}"
        json_format.Parse(content, message_factory.GetMessageClass(method.input_type)())
        called.add(match[1])
    assert {"Predict", "FineTune"} <= called


def test_python_in_the_pages_compiles_and_calls_methods_that_the_client_has(root: Path, blocks: list[Any]) -> None:
    sources = [(str(block), block.text) for block in blocks if block.language == "python"]
    sources += [(file.name, file.read_text()) for file in (root / "examples").glob("*.py")]
    assert len(sources) > 10
    for name, source in sources:
        compile(source, name, "exec")
        called = {
            node.attr
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "client"
        }
        assert {attribute for attribute in called if not hasattr(Client, attribute)} == set(), name


def test_settings_in_toml_are_settings(root: Path, blocks: list[Any]) -> None:
    texts = [b.text for b in blocks if b.language == "toml" and b.text.startswith("# backboned.toml")]
    texts.append((root / "deploy" / "backboned.toml").read_text())
    assert len(texts) > 1
    for content in texts:
        assert set(tomllib.loads(content)) <= set(Config.model_fields)


def test_the_table_of_settings_is_complete(root: Path) -> None:
    assert settings_table() in text(root / "docs" / "operations.md"), f"it should be:\n{settings_table()}"


def test_the_table_of_training_options_has_them_all_with_their_defaults(root: Path) -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]*) \| ", text(root / "docs" / "training.md").partition("## Options")[2], re.MULTILINE
    )
    told = dict(rows[: len(fields(TrainingOptions))])
    defaults = {field.name: field.default for field in fields(TrainingOptions)}
    assert set(told) == set(defaults) == {field.name for field in pb.TrainingOptions.DESCRIPTOR.fields}
    numbers = {name: default for name, default in defaults.items() if isinstance(default, int | float)}
    assert {name: float(told[name]) for name in numbers} == numbers
    assert told["learning_rate"].endswith(f"; {STAGES_LEARNING_RATE:g} where stages train")
    assert told["weight_decay"].endswith(f"; {STAGES_WEIGHT_DECAY:g} where stages train")


def test_the_table_of_metrics_is_complete(root: Path) -> None:
    rows = re.findall(r"^\| `(backboned_\w+)` \| (.*?) \|", text(root / "docs" / "operations.md"), re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == metric_labels()


def test_alerts_are_about_metrics_that_exist(root: Path) -> None:
    names = set(_METRIC.findall((root / "deploy" / "alerts.yml").read_text()))
    known = set(metric_labels())
    assert len(names) > 5
    assert {
        n for n in names if n not in known and n.removesuffix(next(filter(n.endswith, _SUFFIXES), "")) not in known
    } == set()


def test_promtool_takes_the_configuration_of_prometheus(root: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    command = [promtool, "check", "config", str(root / "deploy" / "prometheus.yml")]
    check = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path) if path else page
    return file.exists() and (not anchor or anchor in anchors(file))


def anchors(page: Path) -> set[str]:
    """Of its headings, as the usual viewers make them: lower case, spaces to hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?s)```.*?```", "", text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def usage_error(line: str) -> str:
    """What typer has against a command line, after `kind: `; empty if it takes it."""
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words) if Path(word).name == "backboned")
    end = next((i for i, word in enumerate(words) if i > start and word in ("|", ">", "&", "&&")), len(words))
    command, arguments = get_command(app), words[start + 1 : end]
    context: Any = None
    try:
        while True:
            context = command.make_context(command.name or "backboned", list(arguments), parent=context)
            rest = [*context._protected_args, *context.args]
            if not (hasattr(command, "resolve_command") and rest):
                return ""
            _, command, arguments = command.resolve_command(context, rest)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return f"{type(error).__name__}: {error.format_message()}"


def settings_table() -> str:
    lines = ["| setting | default | what |", "| --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        default = field.default
        if isinstance(default, ByteSize):
            shown = f"`{default.human_readable().replace('.0', '')}`"
        else:
            shown = "" if default in (None, (), {}) else f"`{default}`"
        lines.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(lines)


def metric_labels() -> dict[str, set[str]]:
    """Names of all metrics of ours, as Prometheus shows them, with their labels."""
    metrics = Metrics(version="1", torch_version="2", device="cpu")
    metrics.training_epoch("m", 1, 1.0, 1.0, 1.0, 1.0)
    metrics.predict_done("m", "OK")
    metrics.serving_loss("m", "serving", 1.0, True)
    metrics.shadow_answers("m", 1, 1)
    metrics.decided("m", "promoted")
    metrics.serving_version("m", 1)
    metrics.precision_deviation("m", 0.0)
    metrics.watch_drift(lambda: {"m": {"features": (0.5, 0.1)}})
    return {
        metric.name + ("_total" if metric.type == "counter" else ""): {
            label for sample in metric.samples for label in sample.labels if label != "le"
        }
        for metric in metrics.registry.collect()
        if metric.name.startswith("backboned_")
    }
