"""The entry: ``python -m ochat_serve.show_prompt``, which shows a prompt token by token.

The prompt is made as the server makes it, from the same body; no engine is loaded.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

from pydantic import ValidationError

from ochat_serve.chat_request import conversation, refuse_unserved
from ochat_serve.errors import ApiError, StartupError
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.routes.body import invalid_request
from ochat_serve.settings import Settings

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from ochat_serve.tokenizer import Tokenizer

_BOLD_MAGENTA, _GREY, _PLAIN = "\x1b[1;35m", "\x1b[90m", "\x1b[0m"
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartupError(f"{message[:1].upper()}{message[1:]}.")


def parser() -> argparse.ArgumentParser:
    flags = _Parser(
        prog="python -m ochat_serve.show_prompt",
        description="Show the tokens that a model is given for a conversation.",
        epilog="Without --message and --prompt a chat request, or its messages, is read from stdin "
        "as JSON. A * and a colour mark control tokens.",
    )
    flags.add_argument("--model", default=Settings().model, help="hub id, folder, or demo")
    flags.add_argument("--model-type", metavar="TYPE", help="prompt template, as of the server")
    flags.add_argument("--revision", metavar="REV", help="revision of the model on the hub")
    flags.add_argument(
        "--message",
        action="append",
        metavar="'ROLE: TEXT'",
        help="a message; may be given several times",
    )
    flags.add_argument("--condition", help="OpenChat's role prefix")
    flags.add_argument("--prompt", metavar="TEXT", help="a text without a template")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    try:
        told = parser().parse_args(argv)
        request = None if told.prompt is not None else _request(told, sys.stdin)
        tokenizer, ids = _prompt(told, request)
    except (ApiError, StartupError) as error:
        print(f"show_prompt: {error}", file=sys.stderr)
        return 1
    for line in lines(ids, tokenizer, colour=_wants_colour(sys.stdout)):
        print(line)
    return 0


def _request(told: argparse.Namespace, stdin: TextIO) -> ChatCompletionRequest:
    """Raises ``InvalidRequest``."""
    body: object
    if told.message:
        body = {"messages": list(map(_message, told.message))}
    else:
        try:
            body = json.load(stdin)
        except ValueError as error:
            raise StartupError(f"What was read is not JSON: {error}.") from error
        if isinstance(body, list):
            body = {"messages": body}
    if isinstance(body, dict) and told.condition is not None:
        body["condition"] = told.condition
    try:
        request = ChatCompletionRequest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise invalid_request(error) from error
    refuse_unserved(request)
    return request


def _message(text: str) -> dict[str, str]:
    role, _, content = text.partition(":")
    return {"role": role.strip(), "content": content.removeprefix(" ")}


def _prompt(
    told: argparse.Namespace, request: ChatCompletionRequest | None
) -> "tuple[Tokenizer, list[int]]":
    """Raises ``StartupError`` and ``InvalidRequest``."""
    from ochat_serve.model_source import locate
    from ochat_serve.prompts import open_prompts

    source = locate(told.model, model_type=told.model_type, revision=told.revision)
    tokenizer, prompts = open_prompts(source.path, source.model_type, revision=told.revision)
    rendered = (
        prompts.encode(told.prompt) if request is None else prompts.render(conversation(request))
    )
    return tokenizer, asyncio.run(rendered)


def _wants_colour(out: TextIO) -> bool:
    return out.isatty() and not os.environ.get("NO_COLOR")


def lines(ids: Sequence[int], tokenizer: "Tokenizer", *, colour: bool) -> Iterator[str]:
    """A line for each token: its place, its id, a mark for control tokens, its text; then their
    number."""
    width = len(str(max(ids, default=0)))
    for place, (token_id, text) in enumerate(zip(ids, _texts(ids, tokenizer), strict=True)):
        control = tokenizer.is_control(token_id)
        head = f"{place:>5} {token_id:>{width}} {'*' if control else ' '} "
        if colour:
            head = _GREY + head + _PLAIN
            text = _BOLD_MAGENTA * control + text + _PLAIN * control
        yield head + text
    yield f"{len(ids)} tokens"


def _texts(ids: Iterable[int], tokenizer: "Tokenizer") -> Iterator[str]:
    """Each token's text on one line: nothing in it moves the cursor or colours anything, and
    bytes that are no whole character are told one by one."""
    for token_id in ids:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "surrogateescape")
        yield "".join(map(_shown, text))


def _shown(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    if char in _NAMED:
        return _NAMED[char]
    return char if char.isprintable() else char.encode("unicode_escape").decode()


if __name__ == "__main__":
    sys.exit(main())
