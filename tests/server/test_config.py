"""Where a setting comes from, and what is said of one that can't be used."""

from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backboned.server.config import Config, ConfigError, load_config, unknown_variables


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a configuration, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in Config.model_fields:
        monkeypatch.delenv(f"BACKBONED_{name.upper()}", raising=False)
    monkeypatch.delenv("BACKBONED_CONFIG", raising=False)
    return tmp_path


def complaint(flags: dict[str, Any] | None = None, file: Path | None = None) -> str:
    """What is said of a configuration that can't be used: always one line, for exit code 2."""
    with pytest.raises(ConfigError) as caught:
        load_config(flags, file)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value.message


def test_without_anything_the_defaults_hold(empty_folder: Path) -> None:
    loaded = load_config()
    assert (loaded.config.grpc_port, loaded.config.http_port, loaded.config.host) == (8001, 8002, "127.0.0.1")
    assert loaded.config.checkpoint_dir == empty_folder / "checkpoints"
    assert loaded.config.data_root == ()
    assert set(loaded.sources.values()) == {"default"}


def test_flags_go_before_the_environment_before_the_file_before_defaults(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / "backboned.toml").write_text("grpc_port = 1\nhttp_port = 1\nmax_batch_size = 1\n")
    monkeypatch.setenv("BACKBONED_GRPC_PORT", "2")
    monkeypatch.setenv("BACKBONED_HTTP_PORT", "2")
    loaded = load_config({"grpc_port": "3"})
    config = loaded.config
    assert (config.grpc_port, config.http_port, config.max_batch_size, config.max_queued_jobs) == (3, 2, 1, 1000)
    assert loaded.sources["grpc_port"] == "--grpc-port"
    assert loaded.sources["http_port"] == "BACKBONED_HTTP_PORT"
    assert loaded.sources["max_batch_size"] == "max_batch_size in backboned.toml"
    assert loaded.sources["max_queued_jobs"] == "default"


def test_a_named_file_is_read_in_place_of_the_one_in_the_working_folder(empty_folder: Path) -> None:
    (empty_folder / "backboned.toml").write_text("grpc_port = 1\n")
    (empty_folder / "other.toml").write_text("http_port = 2\n")
    config = load_config(file=Path("other.toml")).config
    assert (config.grpc_port, config.http_port) == (8001, 2)


def test_the_environment_can_name_the_file(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "other.toml").write_text("http_port = 2\n")
    monkeypatch.setenv("BACKBONED_CONFIG", "other.toml")
    assert load_config().config.http_port == 2


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKBONED_GRPC_PORT", "")
    assert load_config().config.grpc_port == 8001


def test_lists_and_pairs_can_be_given_everywhere(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (empty_folder / name).mkdir()
        (empty_folder / f"{name}.pth").touch()
    folders = (empty_folder / "a", empty_folder / "b")
    files = {"vgg19": empty_folder / "a.pth", "resnet50": empty_folder / "b.pth"}

    flags = load_config({"data_root": ["a", "b"], "weights": ["vgg19=a.pth", "resnet50=b.pth"], "plugin": ["x", "y.z"]})
    assert (flags.config.data_root, flags.config.weights, flags.config.plugin) == (folders, files, ("x", "y.z"))

    monkeypatch.setenv("BACKBONED_DATA_ROOT", "a:b")
    monkeypatch.setenv("BACKBONED_WEIGHTS", "vgg19=a.pth,resnet50=b.pth")
    monkeypatch.setenv("BACKBONED_PLUGIN", "x, y.z")
    assert load_config().config == flags.config

    for name in ("DATA_ROOT", "WEIGHTS", "PLUGIN"):
        monkeypatch.delenv(f"BACKBONED_{name}")
    (empty_folder / "backboned.toml").write_text(
        'data_root = ["a", "b"]\nplugin = ["x", "y.z"]\n[weights]\nvgg19 = "a.pth"\nresnet50 = "b.pth"\n'
    )
    assert load_config().config == flags.config


def test_keys_are_files_of_which_several_may_be_trusted(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pem", "b.pem"):
        (empty_folder / name).touch()
    a, b = empty_folder / "a.pem", empty_folder / "b.pem"
    config = load_config({"signing_key": "a.pem", "trusted_key": ["a.pem", "b.pem"]}).config
    assert (config.signing_key, config.trusted_key) == (a, (a, b))
    monkeypatch.setenv("BACKBONED_TRUSTED_KEY", "a.pem:b.pem")
    assert load_config().config.trusted_key == (a, b)
    assert (Config().signing_key, Config().trusted_key) == (None, ())


def test_what_may_be_fetched_is_a_list(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config({"remote_data": ["s3", "https://host/a/"]}).config.remote_data == ("s3", "https://host/a/")
    monkeypatch.setenv("BACKBONED_REMOTE_DATA", "s3, gs")
    assert load_config().config.remote_data == ("s3", "gs")


def test_sizes_are_read_with_their_unit() -> None:
    assert load_config({"max_message_bytes": "16MiB"}).config.max_message_bytes == 16 * 2**20


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("grpc_port", "70000", "--grpc-port: should be less than or equal to 65535, got '70000'"),
        ("grpc_port", "http", "--grpc-port: should be a valid integer"),
        ("device", "gpu", "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("device", "cuda:x", "--device: expected auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        ("precision", "fp8", "--precision: should be 'auto', 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("weights", ["resnet50"], "--weights: expected BACKBONE=FILE, got 'resnet50'"),
        ("weights", ["resnet50=nowhere.pth"], "nowhere.pth"),
        ("data_root", ["nowhere"], "--data-root: no such folder: "),
        ("signing_key", "nowhere.pem", "--signing-key: no such file: "),
        ("trusted_key", ["nowhere.pem"], "--trusted-key: no such file: "),
        (
            "remote_data",
            ["ftp"],
            "--remote-data: expected s3, gs, http, https, or a URI such as s3://bucket/, got",
        ),
        ("remote_data", ["file:///etc"], "--remote-data: expected s3"),
        ("remote_data", ["https://"], "--remote-data: expected s3"),
        ("remote_data", ["https://user@host/"], "--remote-data: expected s3"),
        ("max_message_bytes", "large", "--max-message-bytes: "),
        ("scan_interval_seconds", "0", "--scan-interval-seconds: should be greater than 0"),
        ("scan_interval_seconds", "nan", "--scan-interval-seconds: "),
        ("host", "", "--host: "),
    ],
)
def test_a_bad_value_is_told_with_its_flag(name: str, value: object, said: str) -> None:
    assert said in complaint({name: value})


def test_a_bad_value_is_told_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKBONED_MAX_BATCH_SIZE", "0")
    assert complaint().startswith("BACKBONED_MAX_BATCH_SIZE: ")


def test_a_bad_value_is_told_with_its_key_and_file(empty_folder: Path) -> None:
    (empty_folder / "backboned.toml").write_text("max_batch_size = 0\n")
    assert complaint().startswith("max_batch_size in backboned.toml: ")


def test_an_unknown_key_is_an_error_with_the_nearest_name(empty_folder: Path) -> None:
    (empty_folder / "backboned.toml").write_text("grpc_prot = 1\n")
    assert complaint() == "unknown key 'grpc_prot' in backboned.toml; did you mean grpc_port?"


def test_a_file_that_is_no_toml_is_told_with_the_place(empty_folder: Path) -> None:
    (empty_folder / "backboned.toml").write_text("grpc_port = \n")
    assert "can't read backboned.toml" in complaint()


def test_a_named_file_that_is_not_there_is_an_error() -> None:
    assert complaint(file=Path("nowhere.toml")) == "there is no configuration file nowhere.toml"


def test_a_misspelt_variable_is_found_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKBONED_GRPC_PROT", "1")
    monkeypatch.setenv("BACKBONED_SERVER", "127.0.0.1:1")
    (found,) = unknown_variables()
    assert found.startswith("BACKBONED_GRPC_PROT; did you mean BACKBONED_GRPC_PORT")


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(pydantic.ValidationError):
        config.grpc_port = 1


def test_a_configuration_made_directly_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKBONED_GRPC_PORT", "1")
    assert Config().grpc_port == 8001


@example("digits=~nobody-of-that-name/digits.pth")
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_whatever_weights_are_told_they_are_read_or_refused_in_one_line(text: str) -> None:
    try:
        load_config({"weights": [text]})
    except ConfigError as error:
        assert "\n" not in error.message
