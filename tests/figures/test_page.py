"""Pages hold what they are given, as text where it is text."""

from biomass_jax.figures.page import page, table


def test_texts_are_texts_and_parts_are_html():
    rows = table(["name", "a < b"], [["x & y", "1"], ["<b>", "2"]])
    assert rows.count("<tr>") == 3
    for piece in ("<th>a &lt; b</th>", "<td>x &amp; y</td>", "<td>&lt;b&gt;</td>"):
        assert piece in rows
    found = page("Zones & more", [rows, "<p>end</p>"])
    assert found.startswith("<!DOCTYPE html><html lang='en'>") and found.endswith("<p>end</p></html>\n")
    assert "<title>Zones &amp; more</title>" in found and "<h1>Zones &amp; more</h1>" in found and rows in found
