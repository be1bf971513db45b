"""Looks that are held open, around an application of a dictionary: what is held, what wakes, and that nothing is lost."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fl_server.holding import MAX_LOOK_BYTES, Board, Holding, News, closing
from medhive.version import HOLD_HEADER

DEADLINE_S = 20.0
NEVER_S = 600.0  # a hold that only an event may end; `LONGEST_HOLD_S` bounds it


class Post:
    """An application that hands each message out once: `/put` takes "name message", `/get` gives a name's next one."""

    def __init__(self) -> None:
        self.messages: dict[str, list[bytes]] = defaultdict(list)
        self.looks = 0
        self.status = 200
        board = Board(
            looks={"/get": lambda body: frozenset(body.decode().split())},
            news={
                "/put": lambda body, _answer: News(told=frozenset({body.decode().split()[0]})),
                "/leave": lambda body, _answer: News(dismissed=frozenset({body.decode()})),
            },
        )
        self.board, self.door = board, Holding(self, board)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"].decode()
        assert "seen" not in scope["state"]
        scope["state"]["seen"] = True  # as Starlette does, which takes no scope twice
        answer = b""
        if scope["path"] == "/put":
            name, message = body.split()
            self.messages[name].append(message.encode())
        elif scope["path"] == "/get":
            self.looks += 1
            found = [name for name in body.split() if self.messages[name]]
            answer = self.messages[found[0]].pop() if found else b""
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": answer})


class Call:
    """One request on its way; `hang_up` ends the connection."""

    def __init__(self, post: Post, path: str, body: str, hold_s: float = 0.0, length: int | None = None) -> None:
        self.sent: list[Any] = []
        self._body = [{"type": "http.request", "body": body.encode(), "more_body": False}]
        self._gone = asyncio.Event()
        headers = [(b"content-length", str(len(body) if length is None else length).encode())]
        if hold_s:
            headers.append((HOLD_HEADER.lower().encode(), str(hold_s).encode()))
        scope = {"type": "http", "path": path, "headers": headers, "state": {}}
        self.done = asyncio.ensure_future(post.door(scope, self._receive, self._send))

    def hang_up(self) -> None:
        self._gone.set()

    async def answer(self) -> bytes:
        await asyncio.wait_for(self.done, DEADLINE_S)
        return b"".join(event.get("body", b"") for event in self.sent)

    async def _receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, event: Any) -> None:
        self.sent.append(event)


def played(scene: Callable[[Post], Awaitable[None]]) -> None:
    """Play a scene in an event loop of its own."""

    async def play() -> None:
        await asyncio.wait_for(scene(Post()), DEADLINE_S)

    asyncio.run(play())


async def looked(post: Post, count: int) -> None:
    """Wait until the application has been asked so often, and has answered."""
    while post.looks < count:
        await asyncio.sleep(0)
    for _turn in range(20):
        await asyncio.sleep(0)


def test_a_look_is_answered_when_something_comes_for_it_and_for_nothing_else() -> None:
    async def scene(post: Post) -> None:
        look = Call(post, "/get", "a b", NEVER_S)
        await looked(post, 1)
        await Call(post, "/put", "c other").answer()
        await looked(post, 1)
        assert not look.done.done()
        assert post.looks == 1, "news of others wakes nobody"
        await Call(post, "/put", "b message").answer()
        assert await look.answer() == b"message"
        assert not post.board._open, "nothing is left of it"

    played(scene)


def test_what_is_there_already_or_comes_while_one_looks_is_given_at_once() -> None:
    async def scene(post: Post) -> None:
        await Call(post, "/put", "a first").answer()
        assert await Call(post, "/get", "a", NEVER_S).answer() == b"first"
        late = Call(post, "/get", "a", NEVER_S)
        await Call(post, "/put", "a second").answer()  # before the look has had its turn, or after it
        assert await late.answer() == b"second"

    played(scene)


def test_a_look_ends_empty_when_its_time_is_up() -> None:
    async def scene(post: Post) -> None:
        assert await Call(post, "/get", "a", 0.05).answer() == b""
        assert post.looks == 1

    played(scene)


@pytest.mark.parametrize(
    ("hold_s", "length"), [(0.0, None), (-1.0, None), (float("nan"), None), (NEVER_S, MAX_LOOK_BYTES + 1)]
)
def test_who_does_not_ask_for_it_or_says_too_much_is_not_held(hold_s: float, length: int | None) -> None:
    async def scene(post: Post) -> None:
        assert await Call(post, "/get", "a", hold_s, length).answer() == b""

    played(scene)


def test_a_refusal_is_passed_on_at_once() -> None:
    async def scene(post: Post) -> None:
        post.status = 401
        look = Call(post, "/get", "a", NEVER_S)
        await look.answer()
        assert look.sent[0]["status"] == 401

    played(scene)


def test_a_request_that_failed_is_no_news() -> None:
    async def scene(post: Post) -> None:
        look = Call(post, "/get", "a", NEVER_S)
        await looked(post, 1)
        post.status = 500
        await Call(post, "/put", "a message").answer()
        await looked(post, 1)
        assert post.looks == 1
        post.board.close()
        await look.answer()

    played(scene)


def test_nothing_is_taken_for_a_caller_that_has_hung_up() -> None:
    async def scene(post: Post) -> None:
        look = Call(post, "/get", "a", NEVER_S)
        await looked(post, 1)
        look.hang_up()
        await asyncio.wait_for(look.done, DEADLINE_S)
        assert look.sent == []
        await Call(post, "/put", "a message").answer()
        assert await Call(post, "/get", "a").answer() == b"message", "it is still there for the next life"

    played(scene)


def test_nor_when_that_happens_in_the_moment_in_which_something_comes() -> None:
    async def scene(post: Post) -> None:
        look = Call(post, "/get", "a", NEVER_S)
        await looked(post, 1)
        look.hang_up()
        post.messages["a"].append(b"message")
        post.board.tell(News(told=frozenset({"a"})))
        await asyncio.wait_for(look.done, DEADLINE_S)
        assert post.messages["a"] == [b"message"]

    played(scene)


def test_a_second_look_for_the_same_ends_the_first() -> None:
    async def scene(post: Post) -> None:
        first = Call(post, "/get", "a", NEVER_S)
        await looked(post, 1)
        second = Call(post, "/get", "a", NEVER_S)
        assert await first.answer() == b""
        await Call(post, "/put", "a message").answer()
        assert await second.answer() == b"message"

    played(scene)


def test_a_look_that_is_refused_ends_nobody_elses() -> None:
    async def scene(post: Post) -> None:
        look = Call(post, "/get", "a", NEVER_S)
        await looked(post, 1)
        post.status = 401
        await Call(post, "/get", "a", NEVER_S).answer()
        post.status = 200
        assert not look.done.done()
        await Call(post, "/put", "a message").answer()
        assert await look.answer() == b"message"

    played(scene)


def test_who_leaves_has_an_empty_answer_and_takes_nothing_along() -> None:
    async def scene(post: Post) -> None:
        look = Call(post, "/get", "a", NEVER_S)
        await looked(post, 1)
        post.messages["a"].append(b"message")
        await Call(post, "/leave", "a").answer()
        assert await look.answer() == b""
        assert post.messages["a"] == [b"message"]

    played(scene)


def test_a_look_that_comes_after_the_goodbye_is_not_held_but_those_of_the_next_life_are() -> None:
    async def scene(post: Post) -> None:
        await Call(post, "/leave", "a").answer()
        assert await Call(post, "/get", "a", NEVER_S).answer() == b""
        look = Call(post, "/get", "a", NEVER_S)
        await looked(post, 2)
        assert not look.done.done()
        post.board.close()
        await look.answer()

    played(scene)


def test_nobody_is_held_when_the_service_goes_down() -> None:
    async def scene(post: Post) -> None:
        ends: list[Callable[[], object]] = []
        async with closing(post.board, ends.append):
            look = Call(post, "/get", "a", NEVER_S)
            await looked(post, 1)
            ends[0]()
            assert await look.answer() == b""
            assert await Call(post, "/get", "a", NEVER_S).answer() == b"", "nor any more after it"

    played(scene)
