"""A template as `chat_template.jinja` of transformers."""

from __future__ import annotations

import re

from vlm.runtime.chat import Template, Turn
from vlm.runtime.pieces import IMAGE

_JINJA_SYSTEM = """{%- if not messages or messages[0].role != "system" -%}
{{- @SYSTEM_PREFIX@ -}}{{- @TEXT@ -}}{{- @SYSTEM_SUFFIX@ -}}
{%- endif -%}
"""
_JINJA = """{#- Pieces of text and pictures; content is text, or a list of parts of type text or image. -#}
{%- macro content(message) -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "text" -%}{{- part.text -}}{%- else -%}{{- @PICTURE@ -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro words(message) -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content if part.type == "text" -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
@BOS@
@DEFAULT@
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{- @USER_PREFIX@ -}}{{- content(message) -}}
{%- if @USER_BARE@ or words(message) -%}{{- @USER_SUFFIX@ -}}{%- endif -%}
{%- elif message.role == "system" -%}
{{- @SYSTEM_PREFIX@ -}}{{- content(message) -}}
{%- if @SYSTEM_BARE@ or words(message) -%}{{- @SYSTEM_SUFFIX@ -}}{%- endif -%}
{%- else -%}
{{- @ASSISTANT_PREFIX@ -}}{{- @LEAD@ -}}{{- words(message) -}}{{- @END@ -}}{{- @ASSISTANT_SUFFIX@ -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @ASSISTANT_PREFIX@ -}}{%- endif -%}
"""


def jinja_of(template: Template) -> str:
    """The template in that language: `messages` with texts or content parts."""
    values = {
        "BOS": "{{- bos_token -}}" if template.bos else "",
        "TEXT": _quoted(template.default_system or ""),
        "LEAD": _quoted(template.answer_lead),
        "END": "eos_token" if template.end == "eos" else _quoted(template.end),
        "PICTURE": _quoted(template.before_picture + IMAGE + template.after_picture),
    }
    for name in ("system", "user", "assistant"):
        turn: Turn = getattr(template, name)
        values[f"{name.upper()}_PREFIX"] = _quoted(turn.prefix)
        values[f"{name.upper()}_SUFFIX"] = _quoted(turn.suffix)
        values[f"{name.upper()}_BARE"] = str(turn.bare).lower()
    text = _JINJA.replace("@DEFAULT@", "" if template.default_system is None else _JINJA_SYSTEM)
    return re.sub("@([A-Z_]+)@", lambda found: values[found.group(1)], text)


def _quoted(text: str) -> str:
    """A string of the template language; it knows the escapes of Python."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
