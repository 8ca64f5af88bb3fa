"""An OpenAI-compatible address per episode: any agent's calls become a token-exact trajectory.

Loopback only, and every request needs the episode's own key. The agent sends the whole conversation
each time, as its protocol wants; what it repeats is compared with what it was told, never tokenised
again. A conversation that was changed afterwards is refused: it would be another episode.

An agent that sends `tools` has them shown to the policy, and gets calls that the policy wrote as
`tool_calls`; one that sends none gets the text as it was written.
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...buffer.records import Message
from ..chats import ROLES
from .chat import ChatFormat
from .conversation import Conversation, EpisodeFull
from .tools import ToolCall, split_calls

MAX_BODY_BYTES = 8 << 20
IDLE_S = 120.0
"""A connection without a request for so long is closed."""


class Said(NamedTuple):
    """A message as the agent sees it."""

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(slots=True)
class Session:
    """One episode's door; implements `base.Endpoint`."""

    talk: Conversation
    base_url: str
    turns_left: int
    chat: Callable[[Sequence[dict]], ChatFormat]
    """How a conversation with these tools is written."""
    tools: list[dict] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    error: Exception | None = None
    """What went wrong here, which an agent would take for the model's failure."""
    api_key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    model: str = "policy"
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Rejected(Exception):
    """A request that is answered with this HTTP status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message


class EndpointServer:
    """Serves POST /v1/chat/completions on a loopback port of the system's choice."""

    def __init__(self) -> None:
        """Nothing is opened before the first episode."""
        self._sessions: dict[str, Session] = {}
        self._starting = asyncio.Lock()
        self._server: asyncio.Server | None = None

    async def open(
        self, talk: Conversation, max_turns: int, chat: Callable[[Sequence[dict]], ChatFormat]
    ) -> Session:
        """A session for one episode; `chat` makes the format of a conversation with tools."""
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        session = Session(talk, f"http://127.0.0.1:{port}/v1", max_turns, chat)
        self._sessions[session.api_key] = session
        return session

    def forget(self, session: Session) -> None:
        """End a session: its key opens nothing any more."""
        self._sessions.pop(session.api_key, None)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    request = await _read_request(reader)
                if request is None:
                    return
                writer.write(await self._respond(*request))
                await writer.drain()
        except Rejected as error:  # not HTTP as we read it: what follows cannot be either
            writer.write(_http(error.status, _error(error)))
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, ValueError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _respond(self, path: str, headers: dict[str, str], body: bytes) -> bytes:
        try:
            if path.partition("?")[0] != "/v1/chat/completions":
                raise Rejected(404, f"there is no {path}; post to /v1/chat/completions")
            key = headers.get("authorization", "").removeprefix("Bearer ").strip()
            session = self._sessions.get(key)
            if session is None:
                raise Rejected(401, "the key belongs to no episode that is being played")
            async with session.lock:
                return await self._answer(session, body)
        except Rejected as error:
            return _http(error.status, _error(error))

    async def _answer(self, session: Session, body: bytes) -> bytes:
        try:
            return _http(200, await _complete(session, body))
        except Rejected:
            raise
        except Exception as error:  # the engine, or a chat template that cannot write the messages
            session.error = error
            raise Rejected(500, f"{type(error).__name__}: {error}") from error


async def _complete(session: Session, body: bytes) -> dict[str, Any]:
    """One answer of the policy, in OpenAI's form."""
    talk = session.talk
    given, tools = _request(body)
    if not session.said:
        session.tools = tools
        talk.chat = session.chat(tools) if tools else talk.chat
    elif tools != session.tools:
        raise Rejected(409, "the tools differ from those of the episode's first request")
    new = _new_messages(given, session.said)
    if session.turns_left < 1:
        raise Rejected(429, "the episode's turns are used up (environment.max_turns)")
    session.turns_left -= 1
    try:
        output = await talk.reply([Message(role=m.role, content=m.content) for m in new])  # pyright: ignore
    except EpisodeFull:
        raise Rejected(
            400,
            "the episode's tokens are used up: the request exceeds the model's context length or "
            "rollout.sampling.max_new_tokens",
        ) from None
    if output.error:
        raise Rejected(400, output.error)
    content, calls = split_calls(output.text) if tools else (output.text, ())
    session.said += [*new, Said("assistant", content, calls)]
    num_prompt, num_new = talk.turns[-1].start, len(output.token_ids)
    return {
        "id": f"chatcmpl-{output.request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": session.model,
        "choices": [
            {
                "index": 0,
                "message": _answer(content, calls, len(talk.outputs)),
                "finish_reason": "tool_calls" if calls else output.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
        },
    }


def _answer(content: str, calls: Sequence[ToolCall], turn: int) -> dict[str, Any]:
    if not calls:
        return {"role": "assistant", "content": content}
    return {
        "role": "assistant",
        "content": content or None,
        "tool_calls": [
            {"id": f"call_{turn}_{i}", "type": "function", "function": call._asdict()}
            for i, call in enumerate(calls)
        ],
    }


def _request(body: bytes) -> tuple[list[Said], list[dict]]:
    """The conversation in a request, and its tools; sampling settings in it are not ours to change,
    and ignored.

    Raises:
        Rejected: it is not one.
    """
    try:
        request = json.loads(body)
        messages, tools = request["messages"], request.get("tools") or []
        if request.get("stream") or (request.get("n") or 1) != 1:
            raise Rejected(400, "stream and n > 1 are not supported: one sample is one episode")
        if not messages or any(m["role"] not in ROLES for m in messages):
            raise Rejected(400, f"messages need roles of {', '.join(ROLES)}")
        if any(tool["type"] != "function" or not tool["function"]["name"] for tool in tools):
            raise Rejected(400, "tools need the type `function` and a name")
        return [_said(message) for message in messages], tools
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Rejected(400, f"the body is not a chat completion request: {error!r}") from None


def _said(message: dict[str, Any]) -> Said:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = tuple(ToolCall(each["name"], each["arguments"]) for each in functions)
    return Said(message["role"], _text(message.get("content") or ""), calls)


def _text(content: Any) -> str:
    """A message's text; OpenAI allows a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _new_messages(given: list[Said], known: list[Said]) -> list[Said]:
    """What the agent adds to what was said.

    Raises:
        Rejected: it changed something, or adds nothing.
    """
    for place, (mine, theirs) in enumerate(zip(known, given, strict=False)):
        if mine != theirs:
            raise Rejected(
                409,
                f"message {place} differs from what was said: {str(theirs[1:])[:80]} was "
                f"{str(mine[1:])[:80]}. A conversation can only be continued; start from the "
                "messages as they were returned",
            )
    if len(given) <= len(known):
        raise Rejected(409, "the request adds no message to the conversation")
    return given[len(known) :]


async def _read_request(
    reader: asyncio.StreamReader,
) -> tuple[str, dict[str, str], bytes] | None:
    """Path, headers by lower-case name, and body; None when the other side is done."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise Rejected(431, "the request's headers are too long") from None
    first, *lines = head.split("\r\n")
    parts = first.split(" ")
    headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    length = headers.get("content-length", "0")
    if len(parts) != 3 or not length.isdigit() or "transfer-encoding" in headers:
        raise Rejected(400, "the request is not HTTP/1.1 with a content-length")
    if int(length) > MAX_BODY_BYTES:
        raise Rejected(413, f"the body takes {length} bytes, over {MAX_BODY_BYTES}")
    return parts[1], headers, await reader.readexactly(int(length))


def _error(error: Rejected) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": "invalid_request_error"}}


def _http(status: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\n"
    return (
        f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
