"""Two hubs behind one face: what a model's files are, and how to bring them here.

Connections, tokens, endpoints, caches, resuming and progress bars are the hubs' own clients' (huggingface_hub,
modelscope-hub). Here their answers become one form, and their errors one that says how to mend it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any, Protocol

from glmlab.models.checkpoint_files import CheckpointError


class HubUnreachableError(CheckpointError):
    """The hub does not answer; the text is the second half of a sentence and begins in lower case."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it; ``sha256`` is None where the hub gives none (small files)."""

    name: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a model at one revision."""

    revision: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True)
class Cached:
    """What the hub's cache on this machine holds of a model."""

    folder: Path
    missing: tuple[str, ...]


class HubClient(Protocol):
    """What :mod:`glmlab.models.hub` asks of a hub."""

    name: str

    def listing(self, model: str) -> Listing:
        """Ask the hub for a model's files; :class:`HubUnreachableError` where it does not answer."""
        ...

    def folder(self, model: str, revision: str) -> Path:
        """Where the hub's cache keeps a model, whether it is there or not."""
        ...

    def cached(self, model: str, patterns: Sequence[str], without: Sequence[str]) -> Cached | None:
        """What is cached, without asking the hub."""
        ...

    def download(self, model: str, revision: str, files: Sequence[HubFile], to: Path | None) -> None:
        """Bring files into the cache, or into a folder."""
        ...


class HuggingFace:
    """The Hugging Face hub, or what HF_ENDPOINT names."""

    name = "huggingface"

    def listing(self, model: str) -> Listing:
        """List the top level of the repository's main branch."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        with _huggingface_errors(model):
            revision = api.resolve_revision(model).resolved
            entries = [entry for entry in api.list_repo_tree(model, revision=revision) if isinstance(entry, RepoFile)]
        return Listing(
            revision,
            tuple(_hub_file(model, e.path, e.size, e.lfs.sha256 if e.lfs else None) for e in entries),
        )

    def folder(self, model: str, revision: str) -> Path:
        """Return the snapshot's folder of a commit."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
        return repository / "snapshots" / revision

    def cached(self, model: str, patterns: Sequence[str], without: Sequence[str]) -> Cached | None:
        """Look up the snapshot that the main branch pointed to when it was last asked for."""
        from huggingface_hub import get_cached_repo_tree, snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        with _huggingface_errors(model):
            try:
                folder = snapshot_download(
                    model, local_files_only=True, allow_patterns=list(patterns), ignore_patterns=list(without)
                )
                return Cached(Path(folder), ())
            except IncompleteSnapshotError as error:
                snapshot = Path(error.snapshot_path)
                names = (file.path for file in get_cached_repo_tree(model))
                wanted = (name for name in names if fits(name, patterns) and not fits(name, without))
                return Cached(snapshot, tuple(name for name in wanted if not (snapshot / name).is_file()))
            except LocalEntryNotFoundError:
                return None

    def download(self, model: str, revision: str, files: Sequence[HubFile], to: Path | None) -> None:
        """Download through snapshot_download, at the commit that was listed."""
        from huggingface_hub import snapshot_download

        with _huggingface_errors(model):
            snapshot_download(
                model, revision=revision, allow_patterns=[escape(file.name) for file in files], local_dir=to
            )


class ModelScope:
    """The ModelScope hub, or what MODELSCOPE_ENDPOINT names."""

    name = "modelscope"
    _REVISION = "master"

    def __init__(self) -> None:
        try:
            from modelscope_hub import HubApi, HubConfig
        except ImportError as error:
            raise CheckpointError(
                "ModelScope's client is not installed. Install it: pip install 'glmlab[modelscope]' (in a checkout: "
                "pip install -c constraints.txt -e '.[modelscope]')."
            ) from error
        self._config: Any = HubConfig()
        self._api: Any = HubApi(self._config)

    def listing(self, model: str) -> Listing:
        """List the top level of the repository's master branch."""
        with _modelscope_errors(model):
            entries = self._api.list_repo_files(model, "model", revision=self._REVISION, recursive=False)
        files = [entry for entry in entries if entry.type != "tree"]
        return Listing(
            self._REVISION, tuple(_hub_file(model, entry.path, entry.size, entry.sha256 or None) for entry in files)
        )

    def folder(self, model: str, revision: str) -> Path:
        """Return the snapshot's folder of a branch."""
        return Path(self._config.cache_dir) / "models" / model.replace("/", "--") / "snapshots" / revision

    def cached(self, model: str, patterns: Sequence[str], without: Sequence[str]) -> Cached | None:
        """Look up the folder of the master branch; what is missing in it shows when it is checked."""
        folder = self.folder(model, self._REVISION)
        return Cached(folder, ()) if folder.is_dir() else None

    def download(self, model: str, revision: str, files: Sequence[HubFile], to: Path | None) -> None:
        """Download through download_repo, which compares hashes itself too."""
        listed = [{"Path": file.name, "Size": file.size_bytes, "Sha256": file.sha256} for file in files]
        folder = self.folder(model, revision) if to is None else to
        with _modelscope_errors(model):
            self._api.download_repo(model, "model", revision=revision, local_dir=folder, file_list=listed)


HUBS: dict[str, type[HuggingFace] | type[ModelScope]] = {"huggingface": HuggingFace, "modelscope": ModelScope}
"""Hub by name."""


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name fits one of the patterns, in which ``*`` crosses slashes as in the hubs' clients.

    Example:
        >>> fits("onnx/model.json", ("*.json",)), fits("model.bin", ("*.json",))
        (True, False)
    """
    return any(fnmatch(name, pattern) for pattern in patterns)


def _hub_file(model: str, name: object, size_bytes: object, sha256: object) -> HubFile:
    """Check one line of a listing; a hub may answer anything."""
    is_hash = sha256 is None or (isinstance(sha256, str) and len(sha256) == 64)
    if not isinstance(name, str) or not isinstance(size_bytes, int) or size_bytes < 0 or not is_hash:
        raise CheckpointError(
            f"the hub lists {str(name)[:80]!r} of {model} with size {str(size_bytes)[:80]} and sha256 "
            f"{str(sha256)[:80]}, which no file has. Use another endpoint."
        )
    return HubFile(name, size_bytes, sha256.lower() if isinstance(sha256, str) else None)


@contextmanager
def _huggingface_errors(model: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: accept its licence on its hub page, then log in with 'hf auth login' or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub knows no public repository {model!r}. Check the spelling; a private one needs 'hf auth login'."
        ) from error
    except (errors.OfflineModeIsEnabled, errors.RevisionResolutionError, errors.LocalEntryNotFoundError) as error:
        cause = error.__cause__ or error
        raise HubUnreachableError(_unreachable(cause, "HF_HUB_OFFLINE, HF_ENDPOINT")) from error
    except errors.HfHubHTTPError as error:
        raise HubUnreachableError(f"the hub answers with an error ({_first_line(error)}). Try again later.") from error
    except ValueError as error:  # a file name that leaves the folder
        raise CheckpointError(f"the hub's answer for {model} is refused: {_first_line(error)}") from error
    except Exception as error:
        raise _from_any_client(error, model, "HF_ENDPOINT") from error


@contextmanager
def _modelscope_errors(model: str) -> Iterator[None]:
    from modelscope_hub import errors

    try:
        yield
    except errors.NotExistError as error:
        raise CheckpointError(
            f"ModelScope knows no model {model!r}. Check the spelling: ChatGLM3-6B is 'ZhipuAI/chatglm3-6b' there."
        ) from error
    except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
        raise CheckpointError(
            f"ModelScope gives no access to {model}: set MODELSCOPE_API_TOKEN, or log in with 'ms-hub login'."
        ) from error
    except errors.FileDownloadError as error:
        name, cause = next(iter(error.failed_files.items()))
        raise CheckpointError(
            f"{len(error.failed_files)} of {error.total} files of {model} failed, first {name} ({_first_line(cause)}). "
            "Fetch again: what is here stays, and a cut file goes on where it was cut."
        ) from error
    except Exception as error:
        raise _from_any_client(error, model, "MODELSCOPE_ENDPOINT") from error


def _from_any_client(error: Exception, model: str, setting: str) -> CheckpointError:
    """What is left: the disk, or the client's own HTTP library, whose errors have many names."""
    if isinstance(error, OSError) and error.filename is not None:
        return CheckpointError(
            f"{error.filename} cannot be written ({error.strerror}) while fetching {model}. Choose another folder "
            "with --to."
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return CheckpointError(f"a file of {model} did not arrive whole ({_first_line(error)}). Fetch it again.")
    return HubUnreachableError(_unreachable(error, setting))


def _unreachable(error: BaseException, setting: str) -> str:
    return (
        f"the hub cannot be reached ({type(error).__name__}: {_first_line(error)}). Check the network and {setting}, "
        "or give a local folder."
    )


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "no message")[:200]
    return "".join(character if character.isprintable() else "?" for character in line)
