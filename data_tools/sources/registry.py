"""The kinds of sources that Ligature reads.

To add one, copy `flickr.py`, and add a line to `KINDS`.
Tested in tests/data_tools/sources/test_source_registry.py.
"""

from __future__ import annotations

from pathlib import Path

from data_tools.sources.albef import ALBEF
from data_tools.sources.coco import COCO
from data_tools.sources.flickr import FLICKR
from data_tools.sources.folder import FOLDER
from data_tools.sources.items import Source
from data_tools.sources.karpathy import KARPATHY
from data_tools.sources.multi30k import MULTI30K
from data_tools.sources.reading import is_pattern, read_head
from data_tools.sources.table import TABLE
from data_tools.sources.webdataset import WEBDATASET
from runtime.errors import DataError

KINDS: dict[str, Source] = {
    "flickr": FLICKR,
    "coco": COCO,
    "karpathy": KARPATHY,
    "albef": ALBEF,
    "multi30k": MULTI30K,
    "table": TABLE,
    "folder": FOLDER,
    "webdataset": WEBDATASET,
}
"""`--kind` and its source. `detect_kind` takes the first one that matches."""


def detect_kind(path: Path) -> str:
    """Return the kind of a source: a folder's by its contents, a file's by its name or its first MiB.

    Raises:
        DataError: No kind matches, or the file cannot be read.
    """
    has_no_text = path.suffix in (".tar", ".parquet") or is_pattern(path) or path.is_dir()
    head = "" if has_no_text else read_head(path).lstrip()
    for kind, source in KINDS.items():
        if source.matches(path, head):
            return kind
    raise DataError(f"cannot tell what kind of source {path} is; name it with --kind ({', '.join(KINDS)})")
