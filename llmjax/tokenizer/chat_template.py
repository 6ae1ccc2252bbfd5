"""Renders chat messages with a model's own Jinja template, as Hugging Face does.

Templates are code from strangers: they run in jinja2's sandbox, which lets them change nothing.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """Messages or a template that cannot be rendered."""


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compile a template; `special_tokens` are its variables, such as bos_token."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _format_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the model's chat template does not compile (line {error.lineno}: {error}); mend "
                "it, or give the prompt as text."
            ) from None
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Write the messages as the prompt that the model was trained on.

        Raises:
            ChatTemplateError: a message has no role, or the template refuses the conversation.
        """
        _check_messages(messages)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatTemplateError(
                f"the model's chat template refuses these messages: {error}"
            ) from error


class _GenerationTag(Extension):
    """Lets `{% generation %}` through, which marks the assistant's words for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ChatTemplateError("the conversation is empty; give at least one message.")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ChatTemplateError(
                f"message {position} is {message!r}; each message is a mapping such as "
                '{"role": "user", "content": "Hello"}.'
            )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which the models have not seen.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _format_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
