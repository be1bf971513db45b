"""Sealed streams: every length goes through, and whatever is done to one on its way is found before it is used."""

import io
import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medhive.errors import BadSignature, IncompatibleVersion, SealBroken
from medhive.sealing import (
    CHUNK_BYTES,
    TAG_BYTES,
    Opener,
    SealContext,
    Sealer,
    SealingKey,
    SealingKeyBody,
    checked_sealing_key,
    plain_length,
    request_from,
    seal_from,
    sealed_length,
    to_header,
)
from medhive.signing import Signed, SigningKey, sign

SENDER, READER = SigningKey.generate(), SealingKey.generate()
CONTEXT = SealContext(
    method="PUT", path="/api/v1/runs/RUN_1/blobs/ab", site="north", coordinator_key_id="0" * 16,
    reader_public_key=READER.public, start=0, stop=3 * CHUNK_BYTES, issued_at=datetime.now(UTC), nonce="0" * 32,
)  # fmt: skip
THREE = bytes(itertools.islice(itertools.cycle(range(251)), 3 * CHUNK_BYTES - 5))


def sealed(content: bytes, context: SealContext = CONTEXT) -> tuple[Signed[Any], list[bytes]]:
    sealer = Sealer(context, SENDER)
    return sealer.seal, list(sealer.chunks(io.BytesIO(content), len(content)))


def opened(seal: Signed[Any], chunks: list[bytes], context: SealContext = CONTEXT, key: SealingKey = READER) -> bytes:
    return b"".join(Opener(seal, context, SENDER.public, key).opened(chunks))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_every_length_goes_through(size: int) -> None:
    content = THREE[:size].ljust(size, b"x")
    seal, chunks = sealed(content)
    assert opened(seal, chunks) == content
    length = len(b"".join(chunks))
    assert (sealed_length(size), plain_length(length)) == (length, size)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 700_000), max_size=6))
def test_it_does_not_matter_in_which_pieces_it_comes(sizes: list[int]) -> None:
    seal, chunks = sealed(THREE)
    stream = io.BytesIO(b"".join(chunks))
    assert opened(seal, [*(stream.read(size) for size in sizes), stream.read()]) == THREE


TAMPERED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a bit flipped": lambda c: [c[0], bytes([c[1][0] ^ 1]) + c[1][1:], c[2]],
    "the end cut off": lambda c: c[:2],
    "cut within a chunk": lambda c: [c[0], c[1][:-7]],
    "a chunk left out": lambda c: [c[0], c[2]],
    "two chunks exchanged": lambda c: [c[1], c[0], c[2]],
    "a chunk repeated": lambda c: [c[0], c[0], c[1], c[2]],
    "something after the end": lambda c: [*c, c[2]],
    "a chunk of another stream": lambda c: [c[0], sealed(THREE)[1][1], c[2]],
    "nothing at all": lambda _: [],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_changed_stream_is_refused_and_only_what_came_before_is_given_out(how: str) -> None:
    seal, chunks = sealed(THREE)
    given_out = bytearray()
    with pytest.raises(SealBroken):
        for piece in Opener(seal, CONTEXT, SENDER.public, READER).opened(TAMPERED[how](chunks)):
            given_out += piece
    assert THREE.startswith(bytes(given_out))


OTHERS = {
    "method": "GET", "path": "/api/v1/runs/RUN_2/blobs/ab", "site": "south", "coordinator_key_id": "1" * 16,
    "reader_public_key": SealingKey.generate().public, "start": 1, "stop": 0, "nonce": "1" * 32,
    "issued_at": datetime(2026, 1, 1, tzinfo=UTC),
}  # fmt: skip


@pytest.mark.parametrize("field", [*OTHERS])
def test_a_stream_is_bound_to_everything_in_its_context(field: str) -> None:
    other = CONTEXT.model_copy(update={field: OTHERS[field]})
    seal, chunks = sealed(THREE)
    with pytest.raises(SealBroken, match="another transfer"):
        opened(seal, chunks, other)
    # Nor when whoever signs it lies about the context: the key itself is bound to it.
    moved = sign(seal.body.model_copy(update={"context": other}), SENDER)
    with pytest.raises(SealBroken, match="another reader's key"):
        opened(moved, chunks, other)


def test_only_its_reader_opens_it_and_only_from_its_sender() -> None:
    seal, chunks = sealed(THREE)
    with pytest.raises(SealBroken, match="another reader's key"):
        opened(seal, chunks, key=SealingKey.generate())
    with pytest.raises(BadSignature):
        Opener(seal, CONTEXT, SigningKey.generate().public, READER)
    assert THREE[:64] not in b"".join(chunks)


def test_no_two_streams_of_one_content_are_alike() -> None:
    (first, ones), (second, others) = sealed(THREE), sealed(THREE)
    assert first.body.sealed_key != second.body.sealed_key
    assert not {chunk[:32] for chunk in ones} & {chunk[:32] for chunk in others}


def test_headers_carry_statements_and_nothing_else_is_taken_for_one() -> None:
    seal, _ = sealed(b"x")
    assert seal_from(to_header(seal)) == seal
    for header in (None, "", "wanted", "bm90IGpzb24=", "x" * 100_000):
        for read in (seal_from, request_from):
            with pytest.raises(SealBroken):
                read(header)


@pytest.mark.parametrize("length", [0, TAG_BYTES - 1, CHUNK_BYTES + TAG_BYTES + 1])
def test_a_length_that_no_stream_has_is_refused(length: int) -> None:
    with pytest.raises(SealBroken):
        plain_length(length)


def test_the_coordinators_sealing_key_counts_under_its_signature_alone() -> None:
    statement = sign(SealingKeyBody(public_key=READER.public), SENDER)
    assert checked_sealing_key(statement, SENDER.public) == READER.public
    with pytest.raises(BadSignature):
        checked_sealing_key(statement, SigningKey.generate().public)
    with pytest.raises(IncompatibleVersion, match="upgrade the coordinator"):
        checked_sealing_key(None, SENDER.public)
