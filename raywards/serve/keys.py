"""Who may ask: one key, or a file of keys by client that is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from pathlib import Path

from starlette.datastructures import Headers

from raywards.config import API_KEY
from raywards.errors import ConfigError, RequestRefusedError

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 1.0
_LINE = re.compile(rf"([A-Za-z0-9][A-Za-z0-9._-]{{0,63}})\s+({API_KEY})")


class Keys:
    """The keys that are valid now. Without any, everybody may ask.

    Args:
        key: The key of all clients.
        file: One client a line, `NAME KEY`; lines that begin with # are comments. A client may
            stand there twice, which is how a key is replaced: add the new one, change the client,
            take the old one out.

    Raises `ConfigError` where the file cannot be read, or holds no key.
    """

    def __init__(self, key: str | None = None, file: str | None = None) -> None:
        self._own = {} if key is None else {_digest(key): "default"}
        self._file = None if file is None else Path(file)
        self._of_file: dict[bytes, str] = {}
        self._state: tuple[int, ...] | None = None
        self._looked = time.monotonic()
        if self._file is not None:
            self._state = _state(self._file)
            self._of_file = read_keys(self._file)

    @property
    def any(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._own) or self._file is not None

    def client(self, headers: Headers) -> str | None:
        """Name of the client whose key the headers hold; None where none is asked for.

        Raises `RequestRefusedError` (401). Every key is compared, in constant time.
        """
        if not self.any:
            return None
        self._look_again()
        given = headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = _digest(token.strip())
        found = None
        for known, name in (*self._own.items(), *self._of_file.items()):
            if hmac.compare_digest(digest, known):
                found = name
        if found is None or scheme.lower() != "bearer":
            raise RequestRefusedError(
                "send the server's key as one header `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return found

    def _look_again(self) -> None:
        """Take over a changed file. One that is damaged changes nothing, and is told of."""
        if self._file is None or time.monotonic() - self._looked < _LOOK_AGAIN_S:
            return
        self._looked = time.monotonic()
        state = _state(self._file)
        if state == self._state:
            return
        self._state = state
        try:
            self._of_file = read_keys(self._file)
            logger.info("api_key_file was read again: %d keys", len(self._of_file))
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)


def read_keys(file: Path) -> dict[bytes, str]:
    """Names of clients by the digest of their key. Raises `ConfigError`, which repeats no key."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file={str(file)!r}: cannot be read ({error}).") from None
    keys = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ConfigError(
                f"{file}, line {number}: expected `NAME KEY`, where KEY has 8 to 512 printable "
                "ASCII characters."
            )
        keys[_digest(found[2])] = found[1]
    if not keys:
        raise ConfigError(f"{file}: holds no key, so nobody could ask. Expected lines `NAME KEY`.")
    return keys


def _digest(key: str) -> bytes:
    """Of one length, so that a comparison tells nothing of a key's."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _state(file: Path) -> tuple[int, ...] | None:
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino
