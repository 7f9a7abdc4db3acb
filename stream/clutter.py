"""What systems and archivers leave among files of data: hidden files, thumbnails, resource forks."""

FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}


def is_clutter(path: str) -> bool:
    """Whether a path, with slashes and from the top of a dataset or an archive, names a file that is no data."""
    *folders, name = (part for part in path.split("/") if part.strip("."))
    hidden = any(part.startswith(".") or part in FOLDERS for part in (*folders, name))
    return hidden or name.lower() in FILES or "@Syno" in name
