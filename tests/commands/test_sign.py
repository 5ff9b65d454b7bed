"""`backboned sign`, and what is said of keys."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.registry.signatures import Trust, read_signature

Call = Callable[..., tuple[int, str, str]]
MakeKey = Callable[..., tuple[Path, Path]]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in the working folder; what is in it doesn't matter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pt").write_bytes(b"weights")
    return tmp_path / "mine.pt"


def holds(file: Path, public: Path) -> bool:
    Trust([public]).check(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), read_signature(file))
    return True


def test_files_are_signed_by_the_key_that_is_named(call: Call, make_key: MakeKey, file: Path) -> None:
    private, public = make_key("sign")
    other = file.with_name("other.safetensors")
    other.write_bytes(b"other weights")
    code, out, err = call("sign", file, other, "--signing-key", private)
    assert (code, out) == (0, "")
    assert err.splitlines() == [f"{f}.sig: a signature of {f.name}" for f in (file, other)]
    assert holds(file, public) and holds(other, public)


def test_or_by_that_of_the_configuration(call: Call, make_key: MakeKey, file: Path) -> None:
    private, public = make_key("sign")
    file.with_name("backboned.toml").write_text(f'signing_key = "{private}"\n')
    assert call("sign", "mine.pt")[0] == 0
    assert holds(file, public)


def test_what_cannot_be_signed_is_told_in_one_line(call: Call, make_key: MakeKey, file: Path) -> None:
    private, public = make_key("sign")
    file.with_name("notes.txt").touch()
    wrong = {
        ("mine.pt",): (2, "--signing-key"),
        ("mine.pt", "--signing-key", "nowhere"): (2, "--signing-key: no such file"),
        ("mine.pt", "--signing-key", public): (1, "expected a PEM file with a private key"),
        ("nowhere.pt", "--signing-key", private): (1, "nowhere.pt: No such file or directory"),
        ("notes.txt", "--signing-key", private): (1, "must end in .pt, .pth, .safetensors"),
    }
    for arguments, (expected, said) in wrong.items():
        code, _, err = call("sign", *arguments)
        (line,) = err.splitlines()
        assert (code, said in line) == (expected, True), line
    assert read_signature(file) is None


def test_the_doctor_tells_what_is_signed_and_demanded(
    call: Call, make_key: MakeKey, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = make_key("sign")
    assert "signatures" not in call("doctor")[1]
    monkeypatch.setenv("BACKBONED_SIGNING_KEY", str(private))
    assert "checkpoints are signed; unsigned ones are served too" in call("doctor")[1]
    monkeypatch.setenv("BACKBONED_TRUSTED_KEY", str(public))
    assert "checkpoints are signed; only those signed by one of 1 key are served" in call("doctor")[1]
    monkeypatch.setenv("BACKBONED_TRUSTED_KEY", str(private))
    code, _, err = call("doctor")
    assert code == 1
    assert err.startswith(f"error: signatures: the public key {private} can't be used: expected a PEM file")
