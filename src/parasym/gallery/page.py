"""The gallery page: one self-contained HTML file, prediction beside measurement, figures drawn from their data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from parasym.gallery.contract import Check, Result

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>parasym gallery</title>
<style>
:root { --ink: #1d2429; --soft: #5c6970; --line: #dde3e7; --good: #2f7d32; --bad: #b3261e; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1100px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .2rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .2rem; }
p { margin: .2rem 0 .8rem; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number { font-variant-numeric: tabular-nums; } td.short { white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 1.5rem; }
details { margin: .8rem 0; } pre { overflow-x: auto; background: #f5f7f8; padding: .8rem; font-size: .8rem; } nav a { margin-right: 1rem; }
</style>
{% if drawn %}<script>{{ plotly }}</script>{% endif %}
</head><body>
<h1>parasym gallery</h1>
<p>{{ kept }} of {{ total }} checks pass, in {{ results|length }} paper{{ "" if results|length == 1 else "s" }}.</p>
<nav>{% for item in results %}<a href="#{{ item.result.slug }}">{{ item.result.title or item.result.slug }}</a>{% endfor %}</nav>
{% for item in results %}{% set result = item.result %}
<section id="{{ result.slug }}">
<h2>{{ result.title or result.slug }}</h2>
<p class="soft">{{ result.paper }} &middot; {{ result.slug }}, preset {{ result.preset }}, {{ "%.1f"|format(result.seconds) }} s,
seeds {{ result.seeds|join(", ") or "none" }} &middot;
<span class="{{ "good" if result.passed else "bad" }}">{{ "all checks pass" if result.passed else "not all checks pass" }}</span></p>
{% if result.claims %}<ul>{% for claim in result.claims %}<li>{{ claim }}</li>{% endfor %}</ul>{% endif %}
<div class="wide"><table><thead><tr><th>Claim</th><th>Predicted</th><th>Measured</th><th>Error</th><th>Tolerance</th><th>Verdict</th>
</tr></thead>
<tbody>{% for check in result.checks %}<tr>
<td>{{ check.claim }}<br>
<span class="soft">{{ check.source }}{% if check.kind != "match" %} &middot; {{ check.kind }}{% endif %}</span></td>
<td class="number">{{ check|predicted }}</td>
<td class="number">{{ check.measured|numbers }}{% if check.spread and check.spread != check.measured %}
<br><span class="soft">seeds {{ check.spread|numbers }}</span>{% endif %}</td>
{% if check.relation == "=" %}<td class="number short">{{ check.error|number }}{{ " rel." if check.relative }}</td>
<td class="number short">{{ check.tolerance|number }}</td>{% else %}
<td class="number short">{{ "missed by " ~ (check.error|number) if check.error }}</td><td></td>{% endif %}
<td class="{{ "good" if check.passed else "bad" }}">{{ "pass" if check.passed else "FAIL" }}</td>
</tr>{% endfor %}</tbody></table></div>
<div class="figures">{% for figure in item.figures %}<figure style="margin:0"><h3>{{ figure.name }}</h3>{{ figure.html }}
<figcaption class="soft">{{ figure.caption }}</figcaption></figure>{% endfor %}</div>
<details><summary>Configuration and environment</summary><pre>{{ item.config }}</pre></details>
</section>{% endfor %}
</body></html>
"""


def report(outdir: str | os.PathLike[str], results: Iterable[Result | Mapping[str, Any]]) -> Path:
    """Write the gallery page.

    Args:
        outdir: directory to write ``index.html`` into; made if it is not there.
        results: what `parasym.gallery.run` returned, or their dicts.

    Returns:
        Path of the page: one file that loads nothing from anywhere, the plotting code in it once.
    """
    from plotly.offline import get_plotlyjs

    gathered = [result if isinstance(result, Result) else Result.from_dict(result) for result in results]
    checks = [check for result in gathered for check in result.checks]
    page = (
        _environment()
        .from_string(_TEMPLATE)
        .render(
            results=[_item(result) for result in gathered],
            plotly=Markup(get_plotlyjs()),
            drawn=any(result.figures for result in gathered),
            kept=sum(check.passed for check in checks),
            total=len(checks),
        )
    )
    path = Path(outdir) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _environment() -> Environment:
    environment = Environment(autoescape=True)
    environment.filters.update(number=_number, numbers=_numbers, predicted=_predicted)
    return environment


def _item(result: Result) -> dict[str, Any]:
    figures = [
        {"name": figure.name, "caption": figure.caption, "html": _html(figure.draw(figure.data), f"{result.slug}-{index}")}
        for index, figure in enumerate(result.figures)
    ]
    plain = {"config": result.to_dict()["config"], "environment": dict(result.environment)}
    return {"result": result, "figures": figures, "config": json.dumps(plain, indent=1)}


def _html(figure: Any, name: str) -> Markup:
    from plotly.io import to_html

    options = {"displayModeBar": False, "displaylogo": False, "responsive": True}
    return Markup(to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config=options))


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-4 else f"{value:.4g}"


def _numbers(values: tuple[float, ...]) -> str:
    shown = ", ".join(_number(value) for value in values[:8])
    return shown if len(values) <= 8 else f"{shown}, ... {len(values)} values from {_number(min(values))} to {_number(max(values))}"


def _predicted(check: Check) -> str:
    sign = {"=": "", ">=": "at least ", "<=": "at most "}[check.relation]
    return sign + _numbers(tuple(dict.fromkeys(check.predicted)) if len(set(check.predicted)) == 1 else check.predicted)
