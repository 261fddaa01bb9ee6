"""What a copy costs at the least: the same bytes through one plain TCP connection on loopback."""

from __future__ import annotations

import socket
import threading
import time

_BLOCK = 1 << 20


def tcp_seconds(data: memoryview) -> float:
    """Seconds to copy `data` through one loopback connection, from the first send to the receiver's answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = threading.Thread(target=_receive, args=(listener, len(data)))
        receiver.start()
        with socket.create_connection(listener.getsockname()) as sender:
            start = time.perf_counter()
            sender.sendall(data)
            sender.recv(1)
            seconds = time.perf_counter() - start
        receiver.join()
    return seconds


def _receive(listener: socket.socket, length: int) -> None:
    connection, _ = listener.accept()
    buffer = bytearray(_BLOCK)
    with connection:
        while length:
            length -= connection.recv_into(buffer)
        connection.send(b"x")
