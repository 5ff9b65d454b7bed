"""A signature holds for the bytes that were signed by a trusted key, under any name, and for nothing else."""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from model_signing import signing, verifying

from backboned.registry import BackbonedError
from backboned.registry.refusal import IncompleteFile
from backboned.registry.sealed import sealed
from backboned.registry.signatures import (
    MAX_SIGNATURE_BYTES,
    Signer,
    Trust,
    read_signature,
    signature_path,
    write_signature,
)

MakeKey = Callable[..., tuple[Path, Path]]
CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def keys(make_key: MakeKey) -> tuple[Path, Path]:
    return make_key("ours")


@pytest.fixture(scope="module")
def signer(keys: tuple[Path, Path]) -> Signer:
    return Signer(keys[0])


@pytest.fixture(scope="module")
def trust(keys: tuple[Path, Path]) -> Trust:
    return Trust([keys[1]])


@pytest.fixture(scope="module")
def signature(signer: Signer) -> bytes:
    return signer.sign("mine.pt", SHA256)


def refusal(trust: Trust, signature: bytes | None, sha256: str = SHA256) -> str:
    """What is said of a signature that doesn't hold."""
    with pytest.raises(IncompleteFile) as caught:
        trust.check("mine.pt", sha256, signature)
    return caught.value.message


def test_a_signature_holds_under_any_name(trust: Trust, signature: bytes) -> None:
    trust.check("another.pt", SHA256, signature)


def test_any_of_the_trusted_keys_will_do(make_key: MakeKey, keys: tuple[Path, Path], signature: bytes) -> None:
    Trust([make_key("other")[1], keys[1]]).check("mine.pt", SHA256, signature)
    Trust([keys[1], make_key("other")[1]]).check("mine.pt", SHA256, signature)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_keys_are_on_three_curves(make_key: MakeKey, curve: ec.EllipticCurve) -> None:
    private, public = make_key(curve.name, ec.generate_private_key(curve))
    Trust([public]).check("mine.pt", SHA256, Signer(private).sign("mine.pt", SHA256))


def test_of_an_altered_file_it_says_so(trust: Trust, signature: bytes) -> None:
    said = refusal(trust, signature, hashlib.sha256(CONTENT + b".").hexdigest())
    assert said == "mine.pt is truncated or altered: it isn't the file that was signed"


def test_another_key_is_not_trusted(make_key: MakeKey, signature: bytes) -> None:
    assert "mine.pt is signed by a key that is not trusted" in refusal(Trust([make_key("other")[1]]), signature)


def test_no_signature_is_none(trust: Trust) -> None:
    assert refusal(trust, None).startswith("mine.pt is not signed")


def test_what_was_signed_cannot_be_changed(trust: Trust, signature: bytes) -> None:
    """The digest in the statement is replaced by that of another file: the signature is of another statement then."""
    bundle = json.loads(signature)
    statement = base64.b64decode(bundle["dsseEnvelope"]["payload"]).decode()
    other = hashlib.sha256(b"other").hexdigest()
    assert SHA256 in statement
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(statement.replace(SHA256, other).encode()).decode()
    assert "altered" in refusal(trust, json.dumps(bundle).encode(), other)


def test_an_attackers_signature_with_the_name_of_a_trusted_key_is_refused(
    make_key: MakeKey, trust: Trust, signature: bytes
) -> None:
    forged = json.loads(Signer(make_key("other")[0]).sign("mine.pt", SHA256))
    forged["verificationMaterial"] = json.loads(signature)["verificationMaterial"]
    assert "altered, or by a key that is not trusted" in refusal(trust, json.dumps(forged).encode())


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"{}",
        b'{"verificationMaterial": {}}',
        b"[" * MAX_SIGNATURE_BYTES,
        b'"' + b"x" * 10,
        bytes(MAX_SIGNATURE_BYTES),
    ],
    ids=["empty", "no text", "null", "no bundle", "no key", "deep", "half a text", "zeros"],
)
def test_garbage_is_no_signature(trust: Trust, garbage: bytes) -> None:
    assert refusal(trust, garbage) == "mine.pt has a signature that can't be read: 'backboned sign' makes one"


@given(st.data())
def test_of_a_signature_cut_anywhere_nothing_holds(trust: Trust, signature: bytes, data: st.DataObject) -> None:
    refusal(trust, signature[: data.draw(st.integers(0, len(signature) - 1))])


def test_model_signing_verifies_what_is_signed_here(keys: tuple[Path, Path], signature: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.pt"
    file.write_bytes(CONTENT)
    path = write_signature(file, signature)
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    verifier.verify(file, path)
    file.write_bytes(CONTENT + b".")
    with pytest.raises(ValueError, match="Signature mismatch"):
        verifier.verify(file, path)


def test_what_model_signing_signs_is_trusted_here(keys: tuple[Path, Path], trust: Trust, tmp_path: Path) -> None:
    file = tmp_path / "mine.pt"
    file.write_bytes(CONTENT)
    signing.Config().use_elliptic_key_signer(private_key=keys[0]).sign(file, signature_path(file))
    trust.check("mine.pt", SHA256, read_signature(file))


def test_a_signature_of_a_folder_with_the_file_is_none_of_the_file(
    keys: tuple[Path, Path], trust: Trust, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.pt").write_bytes(CONTENT)
    signing.Config().use_elliptic_key_signer(private_key=keys[0]).sign(tmp_path / "folder", tmp_path / "folder.sig")
    assert "isn't the file that was signed" in refusal(trust, (tmp_path / "folder.sig").read_bytes())


# Where signatures lie.


def test_a_signature_lies_beside_the_file_and_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "mine.pt"
    assert read_signature(file) is None
    assert write_signature(file, b"1") == tmp_path / "mine.pt.sig"
    write_signature(file, b"2")
    assert read_signature(file) == b"2"


def test_of_a_huge_signature_only_the_beginning_is_read(tmp_path: Path) -> None:
    with (tmp_path / "mine.pt.sig").open("wb") as file:
        file.truncate(2**40)
    read = read_signature(tmp_path / "mine.pt")
    assert read is not None and len(read) == MAX_SIGNATURE_BYTES


def test_what_is_no_file_is_no_signature(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of someone else")
    (tmp_path / "link.pt.sig").symlink_to(tmp_path / "secret")
    (tmp_path / "folder.pt.sig").mkdir()
    subprocess.run(["mkfifo", tmp_path / "pipe.pt.sig"], check=True)
    assert [read_signature(tmp_path / f"{name}.pt") for name in ("link", "folder", "pipe")] == [None, None, None]


def test_what_is_sealed_cannot_be_changed_any_more(tmp_path: Path) -> None:
    file = tmp_path / "mine.pt"
    file.write_bytes(CONTENT)
    with sealed(file) as copy:
        file.write_bytes(b"changed")
        assert copy.read_bytes() == CONTENT
        for mode in ("wb", "ab", "r+b"):
            with pytest.raises(PermissionError), copy.open(mode) as opened:
                opened.write(b".")
        assert copy.read_bytes() == CONTENT
    assert not copy.exists()


# Keys.


def test_a_key_that_cannot_be_used_is_told_in_one_line_without_what_is_in_it(
    make_key: MakeKey, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("a secret, but no key")
    password = serialization.BestAvailableEncryption(b"secret")
    unusable = {
        tmp_path / "nowhere": "No such file or directory",
        tmp_path: "Is a directory",
        tmp_path / "text": "expected a PEM file with a private key on the curve P-256, P-384 or P-521",
        keys[1]: "expected a PEM file with a private key",
        make_key("rsa", rsa.generate_private_key(65537, 2048))[0]: "expected a PEM file with a private key",
        make_key("ed", ed25519.Ed25519PrivateKey.generate())[0]: "expected a PEM file with a private key",
        make_key("k1", ec.generate_private_key(ec.SECP256K1()))[0]: "expected a PEM file with a private key",
        make_key("locked", password=password)[0]: "it is encrypted: give one without a password",
    }
    for file, reason in unusable.items():
        with pytest.raises(BackbonedError) as caught:
            Signer(file)
        assert caught.value.message.startswith(f"the private key {file} can't be used: {reason}")
        assert "secret" not in caught.value.message and "\n" not in caught.value.message
    with pytest.raises(BackbonedError, match="expected a PEM file with a public key"):
        Trust([keys[0]])


def test_without_any_key_there_is_neither(keys: tuple[Path, Path]) -> None:
    assert (Signer.of(None), Trust.of(())) == (None, None)


def test_the_library_is_imported_by_who_signs_alone_and_without_it_the_extra_is_named(keys: tuple[Path, Path]) -> None:
    script = f"""
import sys
from pathlib import Path
from backboned.registry import BackbonedError
from backboned.registry.signatures import Signer
import backboned.registry.version
print("model_signing" in sys.modules)
sys.modules["model_signing"] = None
try:
    Signer(Path({str(keys[0])!r}))
except BackbonedError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported, said = done.stdout.splitlines()
    assert imported == "False"
    assert said.endswith("install it with: pip install 'backboned[signing]'")
