"""What ends a failed video's stream: an event message box, which players pass over, that says what was wrong.

Version 1 (ISO/IEC 23009-1, 5.10.3.3); its data is the error as JSON.
"""

from __future__ import annotations

import json
import struct

_SCHEME = "urn:rushes:error:2026"
# Size, type, version and flags; then timescale, presentation time, duration and id.
_HEADER_BYTES = 32


def error_box(code: str, message: str) -> bytes:
    data = json.dumps({"code": code, "message": message}).encode()
    body = struct.pack(">BxxxIQII", 1, 1, 0, 0, 0) + f"{_SCHEME}\0{code}\0".encode() + data
    return struct.pack(">I4s", 8 + len(body), b"emsg") + body


def read_error(box: bytes) -> tuple[str, str] | None:
    """Code and message of a box that `error_box` made; None for any other event message."""
    scheme, code, data = box[_HEADER_BYTES:].split(b"\0", 2)
    return (code.decode(), str(json.loads(data)["message"])) if scheme.decode() == _SCHEME else None
