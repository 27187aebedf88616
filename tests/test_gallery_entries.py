"""Every paper of the gallery: what it declares, its checks at smoke size and by default, its JSON and its drawings.

What goes wrong on purpose, entry by entry, is in the files beside this one.
"""

from __future__ import annotations

import html
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from parasym import gallery
from parasym.core.errors import MissingExtraError
from parasym.gallery.contract import Result
from parasym.gallery.page import report
from parasym.gallery.registry import FILES, entries
from parasym.gallery.runner import seeds_of

SLUGS = tuple(FILES)
EXACT = {("equivariance-toolbox", "discovered"), ("power-law-escape", "formulas")}  # identities: one draw is as good as three
NEEDS_DATA = {("deep-gamblers", "clothes")}  # data that no package ships: in the full preset only


def ran(slug: str, preset: str) -> Result:
    """The result; skipped, with the name of the extra, where its data or a library is missing."""
    try:
        return gallery.run(slug, preset)
    except MissingExtraError as missing:
        pytest.skip(str(missing))


def missed(result: Result) -> list[tuple[object, ...]]:
    return [(c.claim, c.predicted, c.measured, c.error) for c in result.checks if not c.passed]


@pytest.mark.parametrize("slug", SLUGS)
def test_an_entry_declares_what_it_runs(slug: str) -> None:
    entry = entries()[slug]
    assert entry.slug == slug and entry.claims and set(entry.presets) == {"smoke", "default", "full"}
    for preset, config in entry.presets.items():
        assert [f.name for f in fields(config)] == list(entry.experiments) and len(seeds_of(config)) >= 3
        for name in entry.experiments:
            cell = getattr(config, name)
            assert cell is not None or preset == "smoke" or (preset == "default" and (slug, name) in NEEDS_DATA)
            if preset != "smoke" and hasattr(cell, "seeds") and (slug, name) not in EXACT:
                assert len(cell.seeds) >= 3, (preset, name)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_check_passes_at_smoke_size(slug: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    result = ran(slug, "smoke")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not missed(result) and result.passed
    assert {check.kind for check in result.checks} >= {"match", "control"}
    assert all(check.source.startswith(SLUGS) for check in result.checks)  # a paper and its result
    again = Result.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.to_dict() == result.to_dict() and again.passed
    report(tmp_path, [result])
    assert any(result.title in html.unescape(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.html"))
    assert all(len(figure.draw(figure.data).data) for figure in result.figures)


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_every_check_passes_by_default(slug: str) -> None:
    result = ran(slug, "default")
    assert not missed(result) and result.passed
