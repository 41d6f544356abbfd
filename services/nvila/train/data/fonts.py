"""The typefaces that text is rendered in: which are trained with, and which are held out for the test split.

Each comes from a package of its own (`fontpkg-…`, SIL Open Font License 1.1, the licence is in the package), but for
the held-out sans serif, which is Pillow's built-in one (Aileron, CC0). The packages are read as files, not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import ImageFont

from nvila.errors import NotFound

Style = Literal["sans", "serif", "slab", "mono"]


@dataclass(frozen=True)
class Face:
    """`module`: of the package; empty for Pillow's own. `file`: with {} for Regular or Bold."""

    name: str
    style: Style
    module: str = ""
    file: str = ""
    has_bold: bool = True

    def font(self, size_px: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
        """At this size in pixels per em. Raises `NotFound` naming the package that is not installed."""
        return _open(self, size_px, bold and self.has_bold)


TRAINED = (
    Face("PT Sans", "sans", "fontpkg_pt_sans", "PT_Sans-Web-{}.ttf"),
    Face("Barlow", "sans", "fontpkg_barlow", "Barlow-{}.ttf"),
    Face("Titillium Web", "sans", "fontpkg_titillium_web", "TitilliumWeb-{}.ttf"),
    Face("PT Serif", "serif", "fontpkg_pt_serif", "PT_Serif-Web-{}.ttf"),
    Face("Arvo", "slab", "fontpkg_arvo", "Arvo-{}.ttf"),
    Face("IBM Plex Mono", "mono", "fontpkg_ibm_plex_mono", "IBMPlexMono-{}.ttf"),
)

HELD_OUT = (
    Face("News Cycle", "sans", "fontpkg_news_cycle", "NewsCycle-{}.ttf"),
    Face("Aileron", "sans", has_bold=False),
    Face("Crimson Text", "serif", "fontpkg_crimson_text", "CrimsonText-{}.ttf"),
    Face("Space Mono", "mono", "fontpkg_space_mono", "SpaceMono-{}.ttf"),
)
"""Seen in the test split only."""


@lru_cache(maxsize=512)
def _open(face: Face, size_px: int, bold: bool) -> ImageFont.FreeTypeFont:
    if not face.module:
        font = ImageFont.load_default(size=size_px)
        assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
        return font
    found = find_spec(face.module)
    if found is None or found.origin is None:
        package = face.module.replace("_", "-")
        raise NotFound(f"the typeface {face.name} is not installed: pip install --no-deps {package}")
    path = Path(found.origin).parent / "files" / face.file.format("Bold" if bold else "Regular")
    # The plain layout engine: the other one is not part of every Pillow, and spaces letters differently.
    return ImageFont.truetype(path, size_px, layout_engine=ImageFont.Layout.BASIC)
