"""What every page shares: one self-contained file, without network, whose only scripts are those its policy names by their hashes."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from parasym.report import words


def render(template: str, *, scripts: Sequence[str], data: Any, **context: Any) -> str:
    """Fill a template of ``report/templates``.

    Args:
        template: its name.
        scripts: names of script templates, joined into one script; they find ``data`` in the element of that id.
        data: JSON-ready; ``figures`` are drawn by ``page.js``: each an ``id``, plotly ``traces`` and ``layout``, and perhaps ``choices``.
        **context: what the template names beside ``style``, ``scripts``, ``policy`` and ``data``.
    """
    environment = Environment(
        loader=PackageLoader("parasym.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=words.number, percent=words.percent)
    texts = {"plotly": get_plotlyjs().replace("\r\n", "\n"), "page": "\n".join(_text(environment, name) for name in scripts)}
    return environment.get_template(template).render(
        style=Markup(_text(environment, "audit.css")),
        scripts={name: Markup(text) for name, text in texts.items()},
        policy=" ".join(f"'sha256-{_digest(text)}'" for text in texts.values()),
        data=_embedded(data),
        **context,
    )


def label(text: Any) -> str:
    """Text for plotly, which reads a little HTML in its labels; long names lose their middle."""
    text = str(text)
    return html.escape(text if len(text) <= 48 else f"{text[:22]}…{text[-25:]}")


def _text(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Any) -> Markup:
    """JSON that can stand inside a script element: no ``<`` can end it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
