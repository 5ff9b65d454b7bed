"""Who made a checkpoint file: signatures beside files, by keys on elliptic curves, in the form of model-signing.

A signature is of a file's SHA-256 and of nothing else: it holds under any name, and a signed file can be renamed. The
library comes with the extra `signing`, and is imported by the first `Signer` or `Trust`.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from backboned.registry.atomic import write_atomically
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.refusal import IncompleteFile
from backboned.registry.sealed import in_memory

if TYPE_CHECKING:
    from model_signing.signing import Config as Signing
    from model_signing.verifying import Config as Verifying

MAX_SIGNATURE_BYTES = 2**16
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)

_Made = TypeVar("_Made")


def signature_path(checkpoint: Path) -> Path:
    """Where the signature of a checkpoint file lies: `mine.pt.sig`, beside `mine.pt`."""
    return checkpoint.with_name(f"{checkpoint.name}.sig")


def read_signature(checkpoint: Path) -> bytes | None:
    """What lies where the signature of a checkpoint file should; None if that is no file, or a link. Raises `OSError`.

    Of what is too large to be one only the beginning is read, which is none either.
    """
    try:
        descriptor = os.open(signature_path(checkpoint), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    try:
        return os.read(descriptor, MAX_SIGNATURE_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def write_signature(checkpoint: Path, signature: bytes) -> Path:
    """Put a signature beside a checkpoint file, in place of any other, atomically; where it lies. Raises `OSError`."""
    path = signature_path(checkpoint)
    write_atomically(path, lambda file: file.write(signature))
    return path


class Signer:
    """Signs by a private key, which is read once. For one thread at a time."""

    def __init__(self, key: Path) -> None:
        """Read a PEM file without a password. Raises `BackbonedError` `FAILED_PRECONDITION` in one line."""
        _need_library()
        from model_signing.signing import Config

        self._config: Signing = _read_key(
            key, "private", lambda file: Config().use_elliptic_key_signer(private_key=file)
        )

    @classmethod
    def of(cls, key: Path | None) -> "Signer | None":
        """One for a key, where there is any."""
        return None if key is None else cls(key)

    def sign(self, name: str, sha256: str) -> bytes:
        """The signature of a file with this digest, in hex. The name in it is for people, and isn't checked."""
        from backboned.registry.known_digest import KnownDigest

        with in_memory() as written:
            self._config.set_hashing_config(KnownDigest(name, sha256)).sign(name, written)
            return written.read_bytes()


class Trust:
    """Public keys, which are read once; a file counts if one of them has signed it. For one thread at a time."""

    def __init__(self, keys: Sequence[Path]) -> None:
        """Read PEM files. Raises `BackbonedError` `FAILED_PRECONDITION` in one line."""
        _need_library()
        from model_signing.verifying import Config

        def read(key: Path) -> "Verifying":
            return Config().use_elliptic_key_verifier(public_key=key)

        self._configs = [_read_key(key, "public", read) for key in keys]

    @classmethod
    def of(cls, keys: Sequence[Path]) -> "Trust | None":
        """One for some keys, where there are any."""
        return cls(keys) if keys else None

    def check(self, name: str, sha256: str, signature: bytes | None) -> None:
        """Raise `IncompleteFile` unless a trusted key has signed a file with this digest, in hex.

        The `name` is for the message. Whether what is wrong may mend itself, nobody knows: the signature, or the file,
        may be on its way.
        """
        from backboned.registry.known_digest import KnownDigest

        if signature is None:
            raise unsigned(name)
        failures: list[Exception] = []
        with in_memory() as path:
            path.write_bytes(signature)
            for config in self._configs:
                try:
                    config.set_hashing_config(KnownDigest(name, sha256)).verify(name, path)
                except Exception as error:  # it raises nearly anything on malformed bytes
                    failures.append(error)
                else:
                    return
        raise IncompleteFile(f"{name} {_told(failures)}")


def unsigned(name: str) -> IncompleteFile:
    """The error for a file that has no signature."""
    return IncompleteFile(f"{name} is not signed, and only signed files are served: 'backboned sign' signs a file")


def _told(failures: Sequence[Exception]) -> str:
    """What is wrong with a signature, by what was said of it for each key."""
    from cryptography.exceptions import InvalidSignature

    said = [str(error) for error in failures]
    if any(text.startswith("Signature mismatch") for text in said):
        return "is truncated or altered: it isn't the file that was signed"
    if any(isinstance(error, InvalidSignature) for error in failures):
        return "has a signature that is altered, or by a key that is not trusted"
    if any(text.startswith("Key mismatch") for text in said):
        return "is signed by a key that is not trusted: name its public key by --trusted-key, or sign it by another one"
    return "has a signature that can't be read: 'backboned sign' makes one"


def _need_library() -> None:
    try:
        import model_signing  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackbonedError(
            ErrorKind.FAILED_PRECONDITION,
            f"signatures need the package {error.name!r}, which is not installed here; install it with: "
            "pip install 'backboned[signing]'",
        ) from error


def _read_key(key: Path, kind: str, read: Callable[[Path], _Made]) -> _Made:
    """What is made of a key. Says nothing of what is in the file: it may be secret."""
    try:
        return read(key)
    except OSError as error:
        reason = error.strerror or "it can't be read"
    except TypeError:
        reason = "it is encrypted: give one without a password, in a file that only the daemon may read"
    except Exception:  # it raises nearly anything on what is no key
        reason = f"expected a PEM file with a {kind} key on the curve P-256, P-384 or P-521"
    raise BackbonedError(ErrorKind.FAILED_PRECONDITION, f"the {kind} key {key} can't be used: {reason}") from None
