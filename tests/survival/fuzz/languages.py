"""Ways to damage the two languages that people write by hand: a recipe's TOML and a chat template's Jinja."""

from __future__ import annotations

from random import Random

TOML_VALUES = (
    "1",
    "-1",
    "1e300",
    "inf",
    "nan",
    "10" * 30,
    "9" * 5000,
    "0x" + "f" * 50,
    "true",
    '""',
    '"x"',
    '"a\\u0000b"',
    '"[/b]"',
    '"~nobody-here/x"',
    '"' + "x" * 5000 + '"',
    "'''\n\n'''",
    "[]",
    "{}",
    "[1, 'a']",
    "[[]]",
    "{a = 1}",
    "1979-05-27",
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "[" * 3000,
    "[" * 3000 + "]" * 3000,
    "{a=" * 2000 + "1" + "}" * 2000,
    ".".join("a" * 2000),
    "_",
)
TOML_TABLES = (b"[train]", b"[[quantize.rules]]", b"[a.b.c]", b"[model]", b'["\\u0000"]', b"[" * 99)


def toml(random: Random, raw: bytes) -> tuple[bytes, str]:
    """One line of a recipe: another value, another key, twice, gone; a table that is a value and the reverse."""
    lines = raw.split(b"\n")
    at = random.randrange(len(lines))
    value = random.choice(TOML_VALUES).encode()
    kind = random.randrange(8)
    key = lines[at].split(b"=")[0].strip() or b"x"
    if kind < 4:
        lines[at] = key + b" = " + value
    elif kind == 4:
        lines.insert(random.randrange(len(lines) + 1), lines[at])
    elif kind == 5:
        del lines[at]
    elif kind == 6:
        lines[at] = random.choice(TOML_TABLES)
    else:
        dotted = b".".join(random.choice((b"train", b"model", b"rank", b"a", b'""', b'"."')) for _ in range(3))
        lines.insert(at, dotted + b" = " + value)
    return b"\n".join(lines), f"toml: line {at}: {(lines + [b''])[at][:60]!r}"


JINJA = (
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3,
    "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ ('a' * 99999) * 99999 }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ [0] * 10**9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x\nx' | indent(1000000000) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ lipsum(n=100000) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ ('x' * 9999).replace('x', 'y' * 9999) | length }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception('\x1b[31m no') }}",
    "{{ undefined_name.x }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ messages | map(attribute='x') | list }}",
    "{{ messages | sort }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{% set x %}{% endset %}",
    "{% generation %}x{% endgeneration %}",
    "{% break %}",
    "{% if",
    "{{",
    "{#",
    "{% raw %}",
    "{{ '\\ud800' }}",
    "\0",
    "\x1b[2J",
    "(" * 3000,
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{% if 1 %}" * 500,
    "{{ " + "1+" * 5000 + "1 }}",
    "{{ " + "a." * 5000 + "b }}",
)


def jinja(random: Random, raw: bytes) -> tuple[bytes, str]:
    """A construct put somewhere into a template, or in place of all of it."""
    construct = random.choice(JINJA).encode("utf-8", "surrogatepass")
    edges = [0, len(raw), *(i for i in range(len(raw)) if raw[i : i + 2] in (b"{%", b"{{"))]
    if random.random() < 0.3:
        return construct, f"jinja: {construct[:70]!r} alone"
    at = random.choice(edges)
    return raw[:at] + construct + raw[at:], f"jinja: {construct[:70]!r} at {at}"
