"""Cut the font of the suite's figures out of Noto Sans CJK SC: the characters of characters.txt, as TrueType.

    apt-get install fonts-noto-cjk
    python data/fonts/build_subset.py

The source is a collection of OpenType fonts with cubic outlines (CFF). Outlines become quadratic (TrueType), because
matplotlib embeds those, and only those, in a PDF as the format asks for. The same source gives the same bytes.
"""

import argparse
from pathlib import Path

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.cu2quPen import Cu2QuPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont

FOLDER = Path(__file__).resolve().parent
SOURCE = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc")
SOURCE_FAMILY = "Noto Sans CJK SC"
FAMILY = "Noto Sans SC Subset"
CREATED = 3_471_292_800  # 1 January 2014 in a font's seconds since 1904: equal inputs give equal bytes


def read_source(path: Path) -> TTFont:
    """Return the simplified Chinese font of the collection."""
    for font in TTCollection(path).fonts:
        if font["name"].getDebugName(1) == SOURCE_FAMILY:
            return font
    raise SystemExit(f"{path} holds no font named {SOURCE_FAMILY}. Install Debian's fonts-noto-cjk.")


def build(source: TTFont, characters: str) -> TTFont:
    """Return a TrueType font of the given characters, with the source's metrics, names and licence."""
    names = source.getBestCmap()
    if missing := sorted(character for character in characters if ord(character) not in names):
        raise SystemExit(f"the source has no glyph for {' '.join(missing)}; take them out of characters.txt.")
    cmap = {ord(character): names[ord(character)] for character in characters}
    order = [".notdef", *sorted(set(cmap.values()))]
    outlines = source.getGlyphSet()
    glyphs, metrics = {}, {}
    for name in order:
        pen = TTGlyphPen(None)
        outlines[name].draw(Cu2QuPen(pen, max_err=1.0, reverse_direction=True))
        glyphs[name] = pen.glyph()
        metrics[name] = source["hmtx"][name]

    builder = FontBuilder(source["head"].unitsPerEm, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(cmap)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(metrics)
    builder.setupHorizontalHeader(ascent=source["hhea"].ascent, descent=source["hhea"].descent)
    builder.setupNameTable(
        {
            "copyright": source["name"].getDebugName(0),
            "familyName": FAMILY,
            "styleName": "Regular",
            "uniqueFontIdentifier": FAMILY,
            "fullName": FAMILY,
            "psName": FAMILY.replace(" ", ""),
            "version": source["name"].getDebugName(5),
            "licenseDescription": source["name"].getDebugName(13),
            "licenseInfoURL": source["name"].getDebugName(14),
        }
    )
    builder.setupOS2(
        sTypoAscender=source["OS/2"].sTypoAscender,
        sTypoDescender=source["OS/2"].sTypoDescender,
        usWinAscent=source["OS/2"].usWinAscent,
        usWinDescent=source["OS/2"].usWinDescent,
        fsType=0,
    )
    builder.setupPost(keepGlyphNames=False)
    builder.updateHead(created=CREATED, modified=CREATED)
    builder.font.recalcTimestamp = False
    return builder.font


def main() -> None:
    """Build NotoSansSC-subset.ttf beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE, help="the collection to cut from")
    source = read_source(parser.parse_args().source)
    characters = "".join((FOLDER / "characters.txt").read_text(encoding="utf-8").split())
    target = FOLDER / "NotoSansSC-subset.ttf"
    build(source, characters).save(target)
    print(f"{target.name}: {len(characters)} characters, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
