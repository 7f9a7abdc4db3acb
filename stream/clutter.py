"""What systems and archivers leave among files of data: hidden files, thumbnails, resource forks."""

import re

CLUTTER = re.compile(
    r"(^|/)(\.{1,2}[^/.]|(__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN|lost\+found)/|(?i:(eh)?thumbs\.db|desktop\.ini)$)"
    r"|@Syno[^/]*$"
)


def is_clutter(path: str) -> bool:
    """Whether a path, with slashes and from the top of a dataset or an archive, names a file that is no data."""
    return CLUTTER.search(path) is not None
