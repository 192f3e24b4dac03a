"""Chat templates of model families, written from the formats that their makers document."""

from __future__ import annotations

LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
  {%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system, turns = '', messages -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if (turn.role == 'user') != (loop.index0 is even) -%}
    {{- raise_exception('user and assistant must take turns, the user first') -}}
  {%- endif -%}
  {%- if turn.role == 'user' -%}
    {{- bos_token ~ '[INST] ' ~ (system if loop.first else '') ~ turn.content.strip() -}}
    {{- ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ turn['content'] | trim ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """\
{{- bos_token }}
{%- macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- set state = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set state.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- head('system') }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + (date_string or '26 Jul 2024') + '\\n\\n' + state.system + '<|eot_id|>' }}
{%- if tools is not none %}
    {{- head('user') + 'Answer with a JSON call of one of these functions.\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {{- messages[0]['content'] | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- head('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- head('ipython') }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- head(message['role']) + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}
"""

MISTRAL = """\
{%- set others = messages %}
{%- if messages[0]["role"] == "system" %}
  {%- set system, others = messages[0]["content"], messages[1:] %}
{%- endif %}
{%- set asked = others | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in others %}
  {%- if message.role == "user" %}
    {%- if tools is not none and message == asked[-1] %}
      {{- "[AVAILABLE_TOOLS] [" }}
      {%- for tool in tools %}
        {{- '{"type": "function", "function": {' }}
        {%- for key, value in tool.function.items() if key != "return" %}
          {{- '"' + key + '": ' + (value | tojson) + ("" if loop.last else ", ") }}
        {%- endfor %}
        {{- "}}" + ("" if loop.last else ", ") }}
      {%- endfor %}
      {{- "][/AVAILABLE_TOOLS]" }}
    {%- endif %}
    {{- "[INST] " + (system + "\\n\\n" if loop.last and system is defined else "") }}
    {{- message.content + "[/INST]" }}
  {%- elif message.tool_calls is defined and message.tool_calls is not none %}
    {{- "[TOOL_CALLS] [" }}
    {%- for call in message.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}
        {{- raise_exception("a call's id has nine characters") }}
      {%- endif %}
      {%- set text = call.function | tojson %}
      {{- text[:-1] + ', "id": "' + call.id + '"}' + (", " if not loop.last else "]") }}
    {%- endfor %}
    {{- eos_token }}
  {%- elif message.role == "assistant" %}
    {{- " " + message.content | trim + eos_token }}
  {%- elif message.role in ["tool", "tool_results"] %}
    {{- '[TOOL_RESULTS] {"content": ' + message.content | string | tojson }}
    {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
  {%- else %}
    {{- raise_exception("no such role: " ~ message.role) }}
  {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' -%}
  {{ raise_exception('System role not supported') }}
{%- endif %}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
  {{ raise_exception('Conversation roles must alternate') }}
{%- endif -%}
{%- set role = {'assistant': 'model'}.get(message['role'], message['role']) -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """\
{% for message in messages %}
{% if message['role'] in ('system', 'user') and message['content'] %}
{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}
{% elif message['role'] == 'assistant' %}
{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{ '\\n<tool_call>\\n' ~ (call.function | tojson) ~ '\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

# Family -> its template; the package of Qwen's tokenizer has its own.
TEMPLATES = {
    **{"llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "phi3": PHI3},
    **{"tekken": MISTRAL, "gpt2": CHATML},
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> in a 'city' & its surroundings: °C.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "größe", "parameters": {}}},
]
_SYSTEM = {"role": "system", "content": '  Be brief, "kind" & exact.\n'}
_ASKED = {"role": "user", "content": "Wie ist das Wetter in Köln? 🌦 <b>{{ x }}</b>\n\n二"}
_CALL = {"name": "weather", "arguments": {"city": 'Köln "am" Rhein', "days": 3}}
_CALLED = [
    _ASKED,
    {
        **{"role": "assistant", "content": ""},
        "tool_calls": [{"type": "function", "id": "abcde1234", "function": _CALL}],
    },
    {"role": "tool", "content": '{"temp": 21.5}', "tool_call_id": "abcde1234", "name": "weather"},
]
_ANSWERED = {"role": "assistant", "content": " It is <|im_end|> 21.5 °C.  "}

CHATS = {
    "one question": [_ASKED],
    "system": [_SYSTEM, _ASKED],
    "turns": [_ASKED, _ANSWERED, {"role": "user", "content": " And\ttomorrow? "}],
    "system and turns": [_SYSTEM, _ASKED, _ANSWERED, {"role": "user", "content": "Danke!"}],
    "call": [_SYSTEM, *_CALLED],
    "call and answer": [*_CALLED, _ANSWERED, {"role": "user", "content": "And Bonn?"}],
    "wrong order": [_ASKED, _ASKED],
    "unknown role": [_ASKED, {"role": "wizard", "content": "abracadabra"}],
}
