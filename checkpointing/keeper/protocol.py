"""What keeper and workers say to each other: JSON with a length before it, and file descriptors beside it.

Every request has an ``id`` and an ``op``; its answer repeats the id and has ``ok``, or ``error`` and ``refused`` (true
if asking again cannot help).
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
_LENGTH = struct.Struct("<I")
_FD_BYTES = array.array("i").itemsize
_READ = 1 << 20


class KeeperError(RuntimeError):
    """The keeper failed, or cannot be reached."""


class EndOfStream(KeeperError):
    """The keeper closed the connection."""


class KeeperRefused(ValueError):
    """The keeper works but will not do this: another recipe's run, too little memory, a coordinate already taken."""


class OtherMemory(KeeperRefused):
    """The keeper holds memory of another shape: the user must stop it, or undo a change of the recipe."""


class TooLittleMemory(KeeperRefused):
    """The slots do not fit the machine or its control group; the message has both figures."""


_REFUSALS: dict[str, type[KeeperRefused]] = {c.__name__: c for c in (OtherMemory, TooLittleMemory)}


def refusal(error: KeeperRefused) -> Message:
    """The fields of an answer that has :func:`raise_if_error` raise this error again."""
    return {"error": str(error), "refused": True, "class": type(error).__name__}


def encode(message: Message, fds: Sequence[int] = ()) -> bytes:
    body = json.dumps(message | {"fds": len(fds)}, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


def send_with_fds(sock: socket.socket, data: memoryview | bytes, fds: Sequence[int]) -> int:
    """One send; descriptors travel with the first byte. Returns the bytes taken."""
    if not fds:
        return sock.send(data)
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


class Inbox:
    """Turns what arrives on a socket into messages, each with its descriptors."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    def receive(self, sock: socket.socket) -> bool:
        """Read once. False at the end of the stream; OSError as the socket gives it."""
        data, ancillary, _, _ = sock.recvmsg(_READ, socket.CMSG_SPACE(4 * _FD_BYTES), socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) // _FD_BYTES * _FD_BYTES])
                self._fds.extend(fds)
        self._bytes += data
        return bool(data)

    def pop(self) -> tuple[Message, list[int]] | None:
        """The next whole message, or None."""
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        stop = _LENGTH.size + length
        if len(self._bytes) < stop:
            return None
        message = json.loads(self._bytes[_LENGTH.size : stop])
        del self._bytes[:stop]
        return message, [self._fds.popleft() for _ in range(message.pop("fds", 0))]

    def close(self) -> None:
        """Close descriptors that no message claimed."""
        while self._fds:
            os.close(self._fds.popleft())


def send_all(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Blocking send of a whole message."""
    data = memoryview(encode(message, fds))
    data = data[send_with_fds(sock, data, fds) :]
    # Even an empty send fails if the other side has answered and left already.
    if data:
        sock.sendall(data)


def receive_one(sock: socket.socket, inbox: Inbox) -> tuple[Message, list[int]]:
    """Blocking receive of one message. Raises EndOfStream at the end of the stream."""
    while True:
        got = inbox.pop()
        if got is not None:
            return got
        if not inbox.receive(sock):
            raise EndOfStream("the keeper closed the connection")


def raise_if_error(answer: Message) -> Message:
    if "error" in answer:
        refused = _REFUSALS.get(str(answer.get("class")), KeeperRefused)
        raise (refused if answer.get("refused") else KeeperError)(answer["error"])
    return answer


def sums_of(request: Message, slot: int) -> dict[int, bytes]:
    """What a worker says of its copied record in a slot, see :func:`checkpointing.records.seal`."""
    return {int(chunk): bytes.fromhex(known) for chunk, known in request.get("sums", {}).get(str(slot), {}).items()}
