"""The page of an audit: what it says, that it is self-contained and safe, and that it works in a browser."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from audit_contract import audit_of_gpt, symmetry
from parasym.report import words
from parasym.report.html import render_audit, write_audit

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;'\"{{7*7}}"


def hostile_audit() -> dict[str, Any]:
    """An audit in which every string a user can choose tries to become markup."""

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poison(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        closed = key in {"id", "source", "target", "severity", "level"} or (isinstance(value, str) and value in words.MEANING)
        return f"{value}{HOSTILE}" if isinstance(value, str) and not closed else value

    poisoned: dict[str, Any] = poison(audit_of_gpt(2, complete=False))
    return poisoned


def without_plotly(page: str) -> str:
    return page.replace(get_plotlyjs().replace("\r\n", "\n"), "")


def test_the_page_says_what_the_audit_found(tmp_path: Path) -> None:
    audit = audit_of_gpt(complete=False)
    path = write_audit(audit, tmp_path / "audit.html")
    text = html.unescape(path.read_text(encoding="utf-8"))
    for part in (
        "GPT2LMHeadModel",
        "99.9 %",
        "7,299",
        "QK GL(16) per head",
        "transformer.h.{0-2}.attn",
        "parasym fix revive --where transformer.h.0.mlp",
        "parasym.methods.syre(model, metric='random')",
        "sign flips of q",
        "eps of the norms",
        "the operator has no derivative",
        "never active on 128 samples",
        "2.1e-07",
        "small twin: widths 64 -> 6",
    ):
        assert part in text, part
    assert "Open: 1 question could not be decided" in text


def test_undecided_parameters_come_with_their_reason() -> None:
    audit = audit_of_gpt(complete=False)
    audit["reasons"] = [{"why": "no counterpart <in the twin>", "count": 400, "parameters": ["transformer.wte.weight"]}]
    page = without_plotly(render_audit(audit))
    assert "400 undecided" in page
    assert "no counterpart &lt;in the twin&gt;" in page
    del audit["reasons"]
    assert "400 undecided</b>" not in without_plotly(render_audit(audit))


def test_every_figure_has_its_numbers_as_a_table() -> None:
    page = without_plotly(render_audit(audit_of_gpt()))
    figures = re.findall(r'id="plot-(\w+)"', page)
    assert figures == ["completeness", "collapse", "certificates"]
    assert page.count("as a table") == len(figures)
    assert page.count("<tr><td>n") == len(audit_of_gpt()["graph"]["nodes"]) + len(audit_of_gpt()["graph"]["edges"])


def test_one_file_without_network() -> None:
    page = render_audit(audit_of_gpt())
    assert page.count("<script") == without_plotly(page).count("<script") + get_plotlyjs().count("<script")
    assert page.count(get_plotlyjs().replace("\r\n", "\n")) == 1
    rest = without_plotly(page)
    assert set(re.findall(r"https?://[^\"' )]+", rest)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(src|href)=[\"'](?!#|data:)|@import|url\((?!#)", rest)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', rest).group(1))  # type: ignore[union-attr]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_user_text_never_becomes_markup() -> None:
    page = without_plotly(render_audit(hostile_audit()))
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert "{{7*7}}" in html.unescape(page)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert HOSTILE in data["graph"]["nodes"][0]["label"]
    for figure in data["figures"]:  # plotly reads markup in its texts
        assert "<img" not in json.dumps(figure)
        assert "<script" not in json.dumps(figure)


def test_sparse_audits() -> None:
    audit = audit_of_gpt(1)
    audit.update(
        symmetries=[], refuted=[], undecided=[], approximate=[], collapse=[], advice=[], graph={"nodes": [], "edges": []}, classified={}
    )
    audit["completeness"] = {"parameters": 10, "rank": None, "nullity": None, "explained": None, "exact": False, "method": "", "gap": None}
    page = html.unescape(without_plotly(render_audit(audit)))
    for part in ("No symmetries were found", "were not counted", "No collapsed unit", "Nothing was left undecided"):
        assert part in page
    assert 'id="network"' not in page
    audit["completeness"] = None
    render_audit(audit)


def test_numbers_json_cannot_hold() -> None:
    audit = audit_of_gpt(1)
    audit["symmetries"][0].update(residual=float("nan"), certified=False)
    audit["symmetries"][1].update(residual=float("inf"), certified=False)
    audit["completeness"]["gap"] = [float("nan"), 0.0]
    page = without_plotly(render_audit(audit))
    assert "not a number" in page
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1)  # type: ignore[union-attr]


def test_rendering_changes_nothing() -> None:
    audit = audit_of_gpt()
    before = copy.deepcopy(audit)
    assert render_audit(audit) == render_audit(audit)
    assert audit == before


# -- words --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "pattern"),
    [
        (["h.0.mlp", "h.1.mlp", "h.2.mlp"], "h.{0-2}.mlp"),
        (["h.0.a.1", "h.2.a.1"], "h.{0,2}.a.1"),
        (["a", "b"], "a, b"),
        (["", ""], ""),
        ([], ""),
    ],
)
def test_gather(places: list[str], pattern: str) -> None:
    assert words.gather(places) == pattern


def test_fold_keeps_dimensions_and_the_worst_residual() -> None:
    audit = audit_of_gpt(12)
    rows = words.fold(audit["symmetries"])
    assert sum(row.dim for row in rows) == sum(item["dim"] for item in audit["symmetries"])
    assert sum(row.count for row in rows) == len(audit["symmetries"])
    assert next(row for row in rows if row.name.startswith("QK")).residual == pytest.approx(2.4e-13)
    loose = [symmetry("x", "h.0", "R", 1, "pure", ["a"]), symmetry("x", "h.1", "R", 1, "pure", ["b"], residual=1e-3)]
    assert [(row.count, row.certified) for row in words.fold(loose)] == [(2, False)]


def test_percent_never_rounds_up_to_all() -> None:
    assert words.percent(0.99999) == "99.9 %"
    assert words.percent(1.0) == "100 %"
    assert words.percent(None) == "–"


# -- in a browser -------------------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """Open the page with its self-check; return its final DOM and what the console said."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install Debian's package chromium (make browser)")
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=8000",
        "--enable-logging=stderr",
        *flags,
        "--dump-dom",
        f"{page.as_uri()}#selftest",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
    return done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE)


def findings(dom: str) -> dict[str, Any]:
    found = re.search(r'data-selftest="([^"]*)"', dom)
    assert found, "the page's script did not finish"
    result: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return result


@pytest.mark.browser
@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0", "--window-size=400,800")], ids=["light", "dark-narrow"])
def test_the_page_works(tmp_path: Path, flags: tuple[str, ...]) -> None:
    audit = audit_of_gpt(16, complete=False)
    dom, console = browse(write_audit(audit, tmp_path / "audit.html"), tmp_path / "profile", *flags)
    assert console == []
    result = findings(dom)
    assert result["errors"] == []
    assert result["figures"] == result["figuresExpected"] == 3
    assert result["sorted"]
    assert result["ariaSort"] == "descending"
    assert result["filtered"]
    assert result["detail"]
    assert result["boxesOpen"] == len(audit["graph"]["nodes"]) > 200
    assert result["boxesClosed"] < result["boxesAtFirst"] < 45


@pytest.mark.browser
def test_hostile_names_stay_text_in_the_browser(tmp_path: Path) -> None:
    dom, console = browse(write_audit(hostile_audit(), tmp_path / "audit.html"), tmp_path / "profile")
    assert console == []
    assert findings(dom)["errors"] == []
    assert "<title>owned" not in dom
    assert "<img" not in dom.replace(get_plotlyjs(), "")
