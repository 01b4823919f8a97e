"""Fetch a model from Hugging Face or ModelScope: only what loading needs, and every file checked.

Connections, tokens, endpoints, caches and resuming are the work of the hubs' own clients (huggingface_hub,
modelscope-hub). Here the files are chosen (config, tokenizer, safetensors; never pickles; the model's own code only
where it is asked for, to be read) and compared with the hub's listing (size, and sha256 where the hub gives one), and
the clients' errors become one that says what to do. Weights come last, so that a copy with whole weights is whole.
"""

import hashlib
import re
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from glmlab.core.errors import GlmlabError
from glmlab.core.units import format_bytes

NEEDED = ("*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt", "*.jinja")
"""What loading reads."""

NOT_NEEDED = ("*/*", "*\\*", "*:*", ".*", "consolidated*.safetensors")
"""Whatever is not a plain name in the folder itself, hidden files, and Mistral's second copy of the same weights."""

SOURCE = ("modeling_*.py", "configuration_*.py", "tokenization_*.py")
"""The model's own code: for class diagrams, read by :mod:`glmlab.structure.source` and never executed."""

RECORD = ".glmlab-fetch"
"""File that says by which command a folder was fetched."""

_LARGEST_TEXT_BYTES = 256 * 2**20  # far above the largest tokenizer or index published

_NO_ACCESS = "ModelScope gives no access to {model}: set MODELSCOPE_API_TOKEN, or log in with 'ms-hub login'."
_MEANINGS = {  # error of a client -> what it means, and what to do
    "GatedRepoError": "{model} is gated: accept its licence on its hub page, then log in with 'hf auth login' or set "
    "HF_TOKEN.",
    "RepositoryNotFoundError": "the hub knows no public repository '{model}'. Check the spelling; a private one needs "
    "'hf auth login'.",
    "RemoteEntryNotFoundError": "{model} lacks a file on the hub ({error}). Check that it is a model in transformers' "
    "format.",
    "NotExistError": "ModelScope knows no model '{model}'. Check the spelling: ChatGLM3-6B is 'ZhipuAI/chatglm3-6b' "
    "there.",
    "AuthenticationError": _NO_ACCESS,
    "PermissionDeniedError": _NO_ACCESS,
}


class CheckpointError(GlmlabError):
    """A checkpoint cannot be fetched or used; the text names the file or the name, what is wrong, and what to do."""


class _UnreachableError(CheckpointError):
    """The hub does not deliver; the text is the second half of a sentence and begins in lower case."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it; ``sha256`` is None where the hub gives none (small files)."""

    name: str
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class FetchReport:
    """What a fetch brought and checked; its str is what ``glmlab fetch`` prints.

    ``files`` are all that loading needs, and empty where the hub was out of reach and the whole copy here is used;
    ``fetched`` are the names of those that were not here before.
    """

    model: str
    folder: Path
    files: tuple[HubFile, ...]
    fetched: frozenset[str]
    seconds: float

    def __str__(self) -> str:
        if not self.files:
            return f"{self.model}: the hub cannot be reached, nothing checked\nin {self.folder}"
        fetched_bytes = sum(file.size_bytes for file in self.files if file.name in self.fetched)
        hashes = sum(file.sha256 is not None for file in self.files)
        return (
            f"{self.model}: {len(self.fetched)} of {len(self.files)} files fetched, {format_bytes(fetched_bytes)} in "
            f"{self.seconds:.1f} s, all sizes and {hashes} hashes checked\nin {self.folder}"
        )


class _HuggingFace:
    """The Hugging Face hub, or what HF_ENDPOINT names.

    ``listing``: a revision and the files of its top level; ``folder``: where the cache keeps it, whether there or not.
    """

    settings = "HF_HUB_OFFLINE, HF_ENDPOINT"

    def listing(self, model: str) -> tuple[str, list[HubFile]]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        commit = HfApi().resolve_revision(model).resolved
        entries = [e for e in HfApi().list_repo_tree(model, revision=commit) if isinstance(e, RepoFile)]
        return commit, [HubFile(str(e.path), int(e.size), str(e.lfs.sha256) if e.lfs else None) for e in entries]

    def folder(self, model: str, revision: str) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
        return repository / "snapshots" / revision

    def download(self, model: str, revision: str, files: Sequence[HubFile], folder: Path | None) -> None:
        from huggingface_hub import snapshot_download

        names = [escape(file.name) for file in files]
        snapshot_download(model, revision=revision, allow_patterns=names, local_dir=folder)


class _ModelScope:
    """The ModelScope hub, or what MODELSCOPE_ENDPOINT names."""

    settings = "MODELSCOPE_ENDPOINT"

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

    def listing(self, model: str) -> tuple[str, list[HubFile]]:
        entries = self._api.list_repo_files(model, "model", revision="master", recursive=False)
        files = [entry for entry in entries if entry.type != "tree"]
        return "master", [HubFile(str(e.path), int(e.size), str(e.sha256) if e.sha256 else None) for e in files]

    def folder(self, model: str, revision: str) -> Path:
        return Path(self._config.cache_dir) / "models" / model.replace("/", "--") / "snapshots" / revision

    def download(self, model: str, revision: str, files: Sequence[HubFile], folder: Path | None) -> None:
        listed = [{"Path": file.name, "Size": file.size_bytes, "Sha256": file.sha256} for file in files]
        target = folder or self.folder(model, revision)
        self._api.download_repo(model, "model", revision=revision, local_dir=target, file_list=listed)


_HUBS: dict[str, type[_HuggingFace] | type[_ModelScope]] = {"huggingface": _HuggingFace, "modelscope": _ModelScope}


@contextmanager
def _explained(client: _HuggingFace | _ModelScope, model: str) -> Iterator[None]:
    """Turn a client's errors into a CheckpointError that says what to do."""
    try:
        yield
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if meaning := next((_MEANINGS[kind] for kind in kinds if kind in _MEANINGS), ""):
            raise CheckpointError(meaning.format(model=model, error=_printable(error))) from error
        if isinstance(error, OSError) and error.filename is not None:
            raise CheckpointError(
                f"{error.filename} cannot be written ({error.strerror}) while fetching {model}. Choose another folder "
                "with --to."
            ) from error
        cause = (error.__cause__ or error) if isinstance(client, _HuggingFace) else error
        raise _UnreachableError(
            f"the hub cannot be reached, or answers with an error ({type(cause).__name__}: {_printable(cause)}). Check "
            f"the network and {client.settings}, try again later, or give a local folder."
        ) from error


def _printable(error: BaseException) -> str:
    """The beginning of an error; what a hub says could steer the terminal."""
    text = " ".join(str(error).split())[:200] or "no message"
    return "".join(character if character.isprintable() else "?" for character in text)


def download(model: str, *, hub: str, to: Path | None, with_source: bool) -> FetchReport:
    """Bring a model's files here and compare each with the hub's listing (:func:`~glmlab.models.checkpoints.fetch`)."""
    started = time.perf_counter()
    if hub not in _HUBS:
        raise CheckpointError(f"hub {hub!r} is not known. Use one of {', '.join(_HUBS)}.")
    client = _HUBS[hub]()
    command = fetch_command(model, hub, to, with_source)
    try:
        with _explained(client, model):
            revision, listed = client.listing(model)
    except _UnreachableError as error:
        whole = (to if fetched_with(to) else None) if to else find_cached(model) if hub == "huggingface" else None
        if whole is None:
            raise CheckpointError(
                f"{model} is not on this machine, or only in part, and {error} Once the hub answers, fetch it with: "
                f"{command}; a model of data/configs can be built with weights='random'."
            ) from error
        return FetchReport(model, whole, (), frozenset(), time.perf_counter() - started)
    wanted = choose_files(model, listed, with_source=with_source)
    folder = to or client.folder(model, revision)
    if to is not None:
        _claim(to, fetch_command(model, hub, to), {file.name for file in wanted})
    missing = [file for file in wanted if _remove_damaged(folder / file.name, file)]
    _refuse_full_disk(model, folder, sum(file.size_bytes for file in missing))
    weights = [file for file in missing if file.name.endswith(".safetensors")]
    for files in ([file for file in missing if file not in weights], weights):
        if files:
            try:
                with _explained(client, model):
                    client.download(model, revision, files, to)
            except _UnreachableError as error:
                raise CheckpointError(f"{model} came only in part: {error} Complete it with: {command}") from error
        for file in files:
            if damage := _remove_damaged(folder / file.name, file):
                raise CheckpointError(
                    f"{file.name} of {model} {damage}. Fetch again; if that repeats, the hub or a proxy on the way "
                    "serves wrong data: use another endpoint."
                )
    fetched = frozenset(file.name for file in missing)
    return FetchReport(model, folder, tuple(wanted), fetched, time.perf_counter() - started)


def find_cached(model: str) -> Path | None:
    """Return the folder of a model in Hugging Face's cache; None where it is not there, or only in part."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted, unwanted = list(NEEDED), list(NOT_NEEDED)
    with _explained(_HuggingFace(), model):
        try:
            found = snapshot_download(model, local_files_only=True, allow_patterns=wanted, ignore_patterns=unwanted)
        except LocalEntryNotFoundError:  # also of a half-download
            return None
    return Path(found)


def locate_config(model: str) -> Path:
    """Return the config.json of a Hugging Face model, fetched where it is not cached."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    with _explained(_HuggingFace(), model):
        return Path(hf_hub_download(model, "config.json"))


def choose_files(model: str, files: Iterable[HubFile], *, with_source: bool = False) -> list[HubFile]:
    """Of a hub's listing, the files that loading needs, in order of their names.

    Raises:
        CheckpointError: none is there, or one of a size that no checkpoint has.

    Example:
        >>> names = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "onnx/model.json"]
        >>> [file.name for file in choose_files("a/b", [HubFile(name, 1) for name in names])]
        ['config.json', 'model.safetensors']
    """
    patterns = (*NEEDED, *SOURCE) if with_source else NEEDED

    def is_wanted(name: str) -> bool:  # * crosses slashes, as in the hubs' clients; what cannot be printed misleads
        is_needed = any(fnmatch(name, pattern) for pattern in patterns) and name.isprintable()
        return is_needed and not any(fnmatch(name, pattern) for pattern in NOT_NEEDED)

    wanted = sorted((file for file in files if is_wanted(file.name)), key=lambda file: file.name)
    if not wanted:
        raise CheckpointError(
            f"{model} holds none of the files that loading needs ({', '.join(NEEDED)}). Check that it is a model."
        )
    for file in wanted:
        is_weights = file.name.endswith(".safetensors")
        if file.size_bytes < 0 or (file.size_bytes > _LARGEST_TEXT_BYTES and not is_weights):
            raise CheckpointError(
                f"{model} lists {file.name} with {file.size_bytes:,} bytes, which no such file has. Nothing was "
                "fetched. Use another copy of the model."
            )
    return wanted


def fetch_command(model: str, hub: str = "huggingface", to: Path | None = None, with_source: bool = False) -> str:
    """Return the command line that fetches, and completes, a model.

    Example:
        >>> fetch_command("ZhipuAI/chatglm3-6b", "modelscope", Path("my models"))
        "glmlab fetch ZhipuAI/chatglm3-6b --from modelscope --to 'my models'"
    """
    words = ["glmlab", "fetch", model]
    words += ["--from", hub] if hub != "huggingface" else []
    words += ["--to", str(to)] if to is not None else []
    words += ["--with-source"] if with_source else []
    return shlex.join(words)


def _remove_damaged(path: Path, file: HubFile) -> str:
    """Remove a file that differs from what the hub lists, and say how; "" where it does not."""
    if not path.is_file():
        return "did not come"
    if (size_bytes := path.stat().st_size) != file.size_bytes:
        damage = f"has {size_bytes} bytes, but the hub lists {file.size_bytes}"
    elif file.sha256 is not None and (sha256 := _sha256(path)) != file.sha256.lower():
        damage = f"has the sha256 {sha256[:16]}…, but the hub lists {file.sha256[:16]!r}…"
    else:
        return ""
    if path.is_symlink() and path.resolve().parent.name == "blobs":  # Hugging Face's cache
        path.resolve().unlink()
    path.unlink()
    return f"{damage}; it was removed"


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _refuse_full_disk(model: str, folder: Path, need_bytes: int) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if need_bytes > free_bytes:
        raise CheckpointError(
            f"{model} needs {format_bytes(need_bytes)} more on disk, but {existing} has {format_bytes(free_bytes)} "
            "free. Nothing was fetched. Free some, or choose a folder on another disk with --to."
        )


def fetched_with(folder: Path) -> str:
    """Return the command that fetched a folder, and completes it; "" where none is recorded.

    Raises:
        CheckpointError: the record is not what a fetch writes; nothing of it is run or shown.
    """
    path = folder / RECORD
    if not path.is_file():
        return ""
    command = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"glmlab fetch [\w./-]+( --from modelscope)?", command, re.ASCII):
        raise CheckpointError(
            f"{path} cannot be read. Remove that file if the folder is whole, or fetch into a new folder."
        )
    return f"{command} --to {shlex.quote(str(folder))}"


def _claim(to: Path, command: str, names: set[str]) -> None:
    """Make a folder this model's, unless something else or weights of another version are in it."""
    record = fetched_with(to)
    if record != command and to.is_dir() and any(to.iterdir()):
        raise CheckpointError(
            f"{to} is not empty and was {f'fetched with {record!r}' if record else 'not fetched by glmlab'}. Choose "
            "another folder."
        )
    try:
        to.mkdir(parents=True, exist_ok=True)
        (to / RECORD).write_text(f"{command.partition(' --to ')[0]}\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written ({error.strerror}). Choose another folder.") from error
    weights = [*to.glob("*.safetensors"), *to.glob("*.safetensors.index.json")]
    if old := sorted(path.name for path in weights if path.name not in names):
        raise CheckpointError(  # an old index would be read in place of the new weights
            f"{to} holds {old[0]}, which the hub does not list for this model any more. Remove it, or choose a new "
            "folder."
        )
