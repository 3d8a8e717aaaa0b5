"""What crosses the wire: frames as the standard library makes them, plain data inside, and nothing else."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import socket
import struct
import threading
from multiprocessing.connection import Connection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import task_master
import task_worker

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


def load(data: bytes) -> Any:
    return task_master.PlainUnpickler(io.BytesIO(data)).load()


@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_data_of_any_protocol_comes_back_as_it_was(value: Any, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol)) == value


def test_no_opcode_that_imports_calls_or_sets_attributes_is_known() -> None:
    names = {opcode.name for opcode in pickletools.opcodes if ord(opcode.code) in task_master.PlainUnpickler.dispatch}
    calling = {"REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
    importing = {"GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    assert names == set(task_master.PLAIN_OPCODES)
    assert not names & (calling | importing)


@pytest.mark.parametrize("size", [0, 1, 100, 16_384, 65_537, 3_000_000])
def test_frames_are_those_of_multiprocessing(size: int) -> None:
    ours, theirs = socket.socketpair()
    connection = task_worker.PlainConnection(ours)
    peer = Connection(theirs.detach())
    message = b"x" * size
    sender = threading.Thread(target=peer.send_bytes, args=(message,))
    sender.start()
    assert connection.recv_bytes() == message
    sender.join()
    sender = threading.Thread(target=lambda: [connection.send_bytes(data) for data in (message, b"and more")])
    sender.start()
    assert [peer.recv_bytes() for _ in range(2)] == [message, b"and more"]
    sender.join()
    os.write(peer.fileno(), struct.pack("!i", size + 1 if size else -1))
    with pytest.raises(EOFError, match="too long"):
        connection.recv_bytes(size)
    peer.close()


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_packed_is_unpacked(word: str, text: str) -> None:
    assert task_worker.unpack(task_worker.pack(f"a {word} c", text)) == (["a", word, "c"], text)


@given(st.binary())
def test_what_is_no_call_of_a_worker_is_an_end_of_its_connection_or_a_call_with_words_alone(data: bytes) -> None:
    try:
        name, method, arguments, keywords = task_master.read_call(data)
    except ValueError:
        return
    assert {type(part) for part in (name, method, *arguments)} == {str}
    assert keywords == {}
    assert len(arguments) <= 4
