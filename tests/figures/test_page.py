"""Pages hold what they are given, as text where it is text."""

from biomass_jax.figures.page import REPORT, page, picture, read_page, table


def test_texts_are_texts_and_parts_are_html():
    rows = table(["name", "a < b"], [["x & y", "1"], ["<b>", "2"]])
    assert rows.count("<tr>") == 3
    for piece in ("<th>a &lt; b</th>", "<td>x &amp; y</td>", "<td>&lt;b&gt;</td>"):
        assert piece in rows
    found = page("Zones & more", [rows, "<p>end</p>"])
    assert found.startswith("<!DOCTYPE html><html lang='en'>") and found.endswith("<p>end</p></html>\n")
    assert "<title>Zones &amp; more</title>" in found and "<h1>Zones &amp; more</h1>" in found and rows in found


def test_a_page_is_read_with_its_pictures_within(tmp_path):
    (tmp_path / "a&b.png").write_bytes(b"\x89PNG")
    parts = ["<p><img src='a&amp;b.png' alt='one'></p>", "<img src='data:image/png;base64,AA==' alt='two'>"]
    (tmp_path / "one.html").write_text(page("Zones & more", parts), encoding="utf-8")
    title, body = read_page(tmp_path / "one.html")
    assert title == "Zones &amp; more"
    assert body == (
        "<p><img src='data:image/png;base64,iVBORw==' alt='one'></p>\n<img src='data:image/png;base64,AA==' alt='two'>"
    )
    assert picture(b"\x89PNG", "it's") == "<img src='data:image/png;base64,iVBORw==' alt='it&#x27;s'>"


def test_pages_of_others_and_pages_of_pages_are_left_alone(tmp_path):
    for text in (page("All", [], maker=REPORT), "<html><h1>Another's</h1>\n</html>", "nothing"):
        (tmp_path / "one.html").write_text(text)
        assert read_page(tmp_path / "one.html") is None
