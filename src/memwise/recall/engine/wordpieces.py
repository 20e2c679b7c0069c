"""The WordPiece vocabulary that ships with memwise (see data/minilm_vocab.NOTICE.txt)."""

import hashlib
from importlib import resources

from memwise.errors import InvalidKnob

SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


def vocabulary() -> list[str]:
    """All 30,522 pieces by number; whole words start at 1,996 with the commonest, "the".

    Raises:
        InvalidKnob: if the file is not the one that was shipped.
    """
    file = resources.files("memwise.recall.engine") / "data" / "minilm_vocab.txt"
    return checked(file.read_bytes(), SHA256, str(file)).decode().splitlines()


def checked(content: bytes, sha256: str, where: str) -> bytes:
    """The content, if it is the pinned one.

    Raises:
        InvalidKnob: if it is not.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InvalidKnob(
            f"{where} has sha256 {found[:12]}..., not {sha256[:12]}...; vectors would not match "
            "stored ones. Reinstall: pip install --force-reinstall 'memwise[embed]'"
        )
    return content
