"""The page: self-contained, well-formed, accessible, escaped, and the same every time."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from thermograd.errors import InputError
from thermograd.laws.sheet import LawSheet
from thermograd.report import compare_html, render_compare, render_html, write_html
from thermograd.report.page import fact_rows, summary, typeset
from thermograd.report.style import DARK, LIGHT

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page as a list of elements (tag, attributes, path of tags) and texts by innermost element with an id."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str | None]] = []
        self.words: list[tuple[tuple[str | None, ...], str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self.open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        if not any(tag in ("style", "script") for tag, _ in self.open):
            self.words.append((tuple(i for _, i in self.open), data))

    def text(self, within: str | None = None) -> str:
        """Visible text, of the whole page or of the element with that id."""
        parts = [data for ids, data in self.words if within is None or within in ids]
        return " ".join("".join(parts).split())

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if a.get("id")]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


@pytest.fixture(scope="module")
def html(sheet: LawSheet) -> str:
    return render_html(sheet)


@pytest.fixture(scope="module")
def both(sheet: LawSheet) -> str:
    other = LawSheet(sheet.comparisons[1:], {**sheet.facts, "seed": 1})
    return render_compare({"runs/<a>": sheet, "runs/b": other})


def test_the_toys_cover_every_verdict(sheet: LawSheet) -> None:
    # Interval of a 95% mean over 20 blocks with a fixed seed: the verdicts are those of this seed, no chance left.
    assert set(sheet.verdicts.values()) == {"holds", "fails", "not in its regime", "undecided"}
    assert sheet.verdicts["toy_variance"] == sheet.verdicts["toy_bounded"] == "holds"


@pytest.mark.parametrize("which", ["html", "both"])
def test_page_needs_nothing_but_itself(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    assert not page.all("iframe")
    assert "http" not in text
    assert "@import" not in text
    assert "@font-face" not in text
    assert "src=" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    for _, attributes in page.elements:
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)


@pytest.mark.parametrize("which", ["html", "both"])
def test_ids_are_unique_and_every_reference_is_met(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    page = Page(text)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.elements if a.get("href")} | set(re.findall(r"url\(#([^)]*)\)", text))
    wanted |= {a["aria-labelledby"] for _, a in page.elements if a.get("aria-labelledby")}
    assert len(wanted) > 10
    assert wanted <= set(ids)


@pytest.mark.parametrize("which", ["html", "both"])
def test_page_is_semantic(which: str, request: pytest.FixtureRequest) -> None:
    page = Page(request.getfixturevalue(which))
    assert page.all("html")[0]["lang"] == "en"
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    assert len(page.all("title")) == len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert all((a.get("aria-label") and a.get("viewbox")) or a.get("aria-hidden") == "true" for a in page.all("svg"))
    first_link = page.all("a")[0]
    assert first_link["class"] == "skip"
    assert first_link["href"] == "#main"


def test_every_law_has_a_row_and_a_section(html: str, sheet: LawSheet) -> None:
    page = Page(html)
    links = [a["href"] for a in page.all("a")]
    for comparison in sheet:
        anchor = "law-" + comparison.law.replace("_", "-")
        law = comparison.definition
        assert f"#{anchor}" in links
        assert anchor in page.ids()
        words = page.text(anchor)
        for part in (law.title, law.source, law.caveats[0], comparison.verdict, law.sentence(comparison)):
            assert part in words
        assert "Var θi = η / (hi(2 − ηhi)), hi < 2/η" in words
        for assumption in comparison.assumptions:
            assert f"{assumption.name}: {'met' if assumption.met else 'not met'}" in words
            assert assumption.detail in words
        assert comparison.note in words
    assert summary(sheet) == "Of 5 laws, 2 hold, 1 fails, 1 is not in its regime and 1 is undecided."
    assert summary(sheet) in page.text()


def test_a_law_without_a_figure_says_why(html: str, sheet: LawSheet) -> None:
    page = Page(html)
    assert len(page.all("figure")) == len(sheet) - 1
    assert "There is no figure. needs a network: no" in page.text("law-toy-absent")


def test_what_users_wrote_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "MLP &lt;64-32-10&gt;" in html
    assert "From 20 blocks &lt;each&gt;." in html
    assert "quadratic &lt;form&gt;" in html
    assert 'aria-label="Variance of a &lt;toy&gt;' in html


def test_missing_numbers_are_dashes(html: str) -> None:
    page = Page(html)
    assert not re.search(r"\b(nan|inf)\b", page.text(), re.IGNORECASE)
    assert html.count("<dt>measured</dt><dd>–</dd>") == 1
    assert html.count("<dt>95% interval</dt><dd>–</dd>") == 1
    assert html.count("<dt>the law says</dt><dd>–</dd>") == 1
    assert ("final loss", "–") in fact_rows({"final_loss": float("nan")})


def test_numbers_are_those_of_the_comparison(html: str, sheet: LawSheet) -> None:
    page = Page(html)
    c = sheet["toy_variance"]
    assert f"{c.low:.3f} to {c.high:.3f}" in page.text("law-toy-variance")
    assert "1 ± 0.2" in page.text("law-toy-variance")
    assert "≤ 1.5" in page.text("law-toy-bounded")


def test_same_sheet_same_page(sheet: LawSheet, html: str) -> None:
    assert render_html(sheet) == html


def test_page_is_small(html: str, sheet: LawSheet) -> None:
    assert len(html.encode()) / (len(sheet) - 1) < 1.5e6 / 12


def test_writing(tmp_path: Path, sheet: LawSheet) -> None:
    file = write_html(sheet, tmp_path / "new" / "page.html", title="Digits & more")
    assert "<title>Digits &amp; more</title>" in file.read_text(encoding="utf-8")
    assert compare_html({"a": sheet}, tmp_path) == tmp_path / "report.html"
    with pytest.raises(InputError, match="cannot write"):
        write_html(LawSheet(()), file / "below" / "a_file.html")
    with pytest.raises(InputError, match="LawSheet"):
        render_html([])  # type: ignore[arg-type]


def test_runs_side_by_side(both: str, sheet: LawSheet) -> None:
    page = Page(both)
    heads = [a for a in page.all("th") if a.get("scope") == "col"]
    assert len(heads) == 2 * 3  # facts and laws: one column for names, one for each run
    assert "runs/&lt;a&gt;" in both
    assert "runs/<a>" not in both
    assert "This law was not checked on this run." in page.text("law-toy-variance")
    assert len(page.all("figure")) == 1 + 2 * 3
    assert '<tr><th scope="row">seed</th><td>0</td><td>1</td></tr>' in both
    assert '<th scope="row">model' not in both  # the same in both, so said once
    with pytest.raises(InputError, match="no run"):
        render_compare({})


def test_a_sheet_without_laws_is_a_page() -> None:
    text = Page(render_html(LawSheet(()))).text()
    assert "No law was checked" in text
    assert "Nothing is recorded" in text


@pytest.mark.parametrize(
    ("plain", "set_"),
    [
        ("H_ii^γ", "H<sub>ii</sub><sup>γ</sup>"),
        ("∝ Fᵢ^(−ψ)", "∝ Fᵢ<sup>−ψ</sup>"),
        ("Tr H²/h_max², ηh_i²", "Tr H²/h<sub>max</sub>², ηh<sub>i</sub>²"),
        ("h_max+λ", "h<sub>max</sub>+λ"),
        ("batch_size of the minibatch_loss", "batch_size of the minibatch_loss"),
        ("a<b & c_1", "a&lt;b &amp; c<sub>1</sub>"),
    ],
)
def test_typesetting(plain: str, set_: str) -> None:
    assert str(typeset(plain)) == set_


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours as WCAG 2.1 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read(palette: dict[str, str]) -> None:
    text = [(name, back) for name in ("ink", "muted", "link") for back in ("page", "panel")]
    text += [(verdict, f"{verdict}-back") for verdict in ("holds", "fails", "regime", "undecided")]
    text += [("regime", "page")]
    for front, back in text:
        assert contrast(palette[front], palette[back]) >= 4.5, (front, back)
    for name in ["edge", *(f"figure-{i}" for i in range(10))]:
        assert contrast(palette[name], palette["page"]) >= 3, name
