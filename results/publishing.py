"""Sending an export to the Hub, through huggingface_hub alone."""

from pathlib import Path
from typing import Any

from errors import DataError, UsageError, printable, redact


def require_repo_id(hub_id: str) -> None:
    """Refuse what cannot be the id of a repository. Raises UsageError."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise UsageError(
            f"--push_to_hub {printable(hub_id)} is no id of a repository; give one like NAME/MODEL"
        ) from error


def describe(folder: Path, hub_id: str | None) -> list[str]:
    """A line for each file that would be sent, and the card."""
    files = sorted(path for path in folder.iterdir())
    total = sum(path.stat().st_size for path in files)
    where = f"to {hub_id}" if hub_id else "with --push_to_hub ID"
    lines = [f"would send {len(files)} files of {total / 1e6:,.1f} MB {where}:"]
    lines += [f"    {path.name:<24} {path.stat().st_size:>14,} bytes" for path in files]
    return [*lines, "", (folder / "README.md").read_text(encoding="utf-8")]


def push(folder: Path, hub_id: str, private: bool) -> str:
    """Send exactly the files of an export to a repository, made if need be. Returns its address. Raises DataError."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if get_token() is None:
        raise DataError(f"sending to {hub_id} needs a token; set HF_TOKEN; the export is in {folder}")
    api = HfApi()
    disable_progress_bars()
    try:
        made = api.create_repo(hub_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(made.repo_id).private:
            raise DataError(f"{made.repo_id} is public already; make it private on the Hub, or leave out --private")
        names = sorted(path.name for path in folder.iterdir())
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=names, commit_message="Add the model"
        )
    except DataError:
        raise
    except Exception as error:  # the client's, its transport's and the disk's
        raise DataError(f"{_reason(error, hub_id)}; the export is in {folder}") from error
    return str(made.url)


def _reason(error: Exception, hub_id: str) -> str:
    """What went wrong, in a few words that hold no secret."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    response: Any = getattr(error, "response", None)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{hub_id} cannot be sent while HF_HUB_OFFLINE is set"
    code = response.status_code if response is not None else None
    if code == 401:
        return "the Hub refused the token; make a new one that may write, and set HF_TOKEN"
    if code == 403:
        return f"the Hub refuses this token to write {hub_id}; check its permissions and the name"
    text = printable(redact(" ".join(str(error).split()) or type(error).__name__))[:200]
    if code is not None:
        return f"the Hub refuses {hub_id} with status {code} ({text})"
    return f"cannot reach {hub_id} at {constants.ENDPOINT} ({text}); check the network"
