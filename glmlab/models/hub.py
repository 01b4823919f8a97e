"""Fetch a checkpoint from a hub into a folder: only what loading needs, resumable, checked.

Two hubs speak through their own clients (hub_clients.py); what is fetched and how it is checked is the same for both:

1. The hub lists the files of the model with sizes and, for large ones, their sha256. Config, tokenizer and safetensors
   are wanted; pickles and code never, but for the model's own source where it is asked for, which is read and not run.
2. What lies there already and is sound stays; what is damaged goes. The disk must hold what is missing.
3. The client downloads what is missing. A cut connection goes on at the byte where it was cut. A run that ended goes on
   at the file where it ended; only ModelScope's client keeps a part of a file for the next run.
4. Every new file is held against the listing (size, sha256), then the folder as a whole: each shard of the index
   present, safetensors headers sound.

A folder chosen by the user gets a record of its fetch, so that a half-download is known as one.
"""

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from glmlab.core.units import format_bytes
from glmlab.models.checkpoint_files import CheckpointError, check_checkpoint
from glmlab.models.hub_clients import HUBS, Cached, HubClient, HubFile, HubUnreachableError, fits

NEEDED = ("*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt", "*.jinja")
"""What loading reads."""

NOT_NEEDED = ("*/*", "*\\*", "*:*", ".*", "consolidated*.safetensors")
"""Whatever is not a plain name in the folder itself, hidden files, and Mistral's second copy of the same weights."""

SOURCE = ("modeling_*.py", "configuration_*.py", "tokenization_*.py")
"""The model's own code: for class diagrams, read by :mod:`glmlab.structure.source` and never executed."""

RECORD = ".glmlab-fetch.json"
"""File that says what a folder was fetched from, and whether the fetch ended."""

_LARGEST_TEXT_BYTES = 256 * 2**20  # far above the largest tokenizer or index published


@dataclass(frozen=True)
class FetchedFile:
    """One file of a fetch: whether it lay there before, and what was compared with the hub's listing."""

    name: str
    size_bytes: int
    was_there: bool
    checked: str  # "sha256", "size" where the hub gives no hash, "nothing" where the hub was not asked


@dataclass(frozen=True)
class FetchReport:
    """What a fetch brought and checked; its str is the table that ``glmlab fetch`` prints."""

    model: str
    hub: str
    revision: str
    folder: Path
    files: tuple[FetchedFile, ...]
    seconds: float

    @property
    def fetched_bytes(self) -> int:
        """Bytes of the files that were not there before."""
        return sum(file.size_bytes for file in self.files if not file.was_there)

    @property
    def hashes_checked(self) -> int:
        """Files whose sha256 equals the hub's; of the others the size does."""
        return sum(file.checked == "sha256" for file in self.files)

    def __str__(self) -> str:
        n_new = sum(not file.was_there for file in self.files)
        lines = [
            f"{file.name:<{max(len(file.name) for file in self.files)}}  {format_bytes(file.size_bytes):>10}  "
            f"{'was here' if file.was_there else 'fetched':8}  {file.checked} checked"
            for file in self.files
        ]
        lines += [
            f"{self.model} ({self.hub}, revision {self.revision[:12]}): {n_new} of {len(self.files)} files fetched, "
            f"{format_bytes(self.fetched_bytes)} in {self.seconds:.1f} s, {self.hashes_checked} hashes checked",
            f"in {self.folder}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Record:
    """What stands in :data:`RECORD`."""

    model: str
    hub: str
    with_source: bool
    complete: bool


def fetch(model: str, *, hub: str = "huggingface", to: Path | None = None, with_source: bool = False) -> FetchReport:
    """Fetch a model's config, tokenizer and safetensors, and check them.

    Endpoint, token, cache folder and offline mode are those of the hub's own client: HF_ENDPOINT, HF_TOKEN, HF_HOME and
    HF_HUB_OFFLINE, or MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and MODELSCOPE_CACHE.

    Args:
        model: the hub's name of the model, such as "zai-org/chatglm3-6b" (on ModelScope "ZhipuAI/chatglm3-6b").
        hub: "huggingface" or "modelscope".
        to: folder to fetch into; by default the hub's cache, where :func:`~glmlab.load_model` finds Hugging Face's.
        with_source: fetch the model's Python files too, to read them. They are never executed.

    Raises:
        CheckpointError: no such hub or model, no access, no network and no whole copy here, a full or read-only disk, a
            folder that holds something else, files that are not what the hub's listing says, an unusable checkpoint.
    """
    started = time.perf_counter()
    if hub not in HUBS:
        raise CheckpointError(f"hub {hub!r} is not known. Use one of {', '.join(HUBS)}.")
    if not is_hub_id(model):
        raise CheckpointError(f"{model!r} is not a hub id such as 'zai-org/chatglm3-6b'. Check the spelling.")
    client = HUBS[hub]()
    try:
        listing = client.listing(model)
    except HubUnreachableError as error:
        return _without_hub(client, model, to, with_source, error, started)
    wanted = choose_files(model, listing.files, with_source=with_source)
    folder = client.folder(model, listing.revision) if to is None else to
    if to is not None:
        _claim(to, model, hub, with_source)
        _refuse_leftovers(to, model, wanted)
    kept = {file.name for file in wanted if _is_sound(folder / file.name, file)}
    missing = [file for file in wanted if file.name not in kept]
    _refuse_full_disk(model, folder, sum(file.size_bytes for file in missing))
    if missing:
        try:
            client.download(model, listing.revision, missing, to)
        except HubUnreachableError as error:
            raise CheckpointError(
                f"{model} came only in part: {error} Complete it with: {fetch_command(model, hub, to, with_source)}"
            ) from error
    for file in missing:
        _verify(folder / file.name, file, model)
    check_checkpoint(folder)
    if to is not None:
        _write_record(to, _Record(model, hub, with_source, complete=True))
    files = tuple(FetchedFile(f.name, f.size_bytes, f.name in kept, "sha256" if f.sha256 else "size") for f in wanted)
    return FetchReport(model, hub, listing.revision, folder, files, time.perf_counter() - started)


def locate(model: str) -> Path:
    """Folder of a Hugging Face model: the cached one where it is whole, else fetched now.

    A whole copy is used without asking the hub; :func:`fetch` brings a newer one.

    Raises:
        CheckpointError: as :func:`fetch`.
    """
    cached = look_up(model)
    return cached.folder if cached and not cached.missing else fetch(model).folder


def look_up(model: str) -> Cached | None:
    """What Hugging Face's cache holds of a model, without asking the hub; None where it holds nothing."""
    return HUBS["huggingface"]().cached(model, NEEDED, NOT_NEEDED)


def locate_config(model: str) -> Path:
    """Path of the config.json of a Hugging Face model, fetched where it is not cached.

    Raises:
        CheckpointError: as :func:`fetch`.
    """
    client = HUBS["huggingface"]()
    cached = client.cached(model, ("config.json",), NOT_NEEDED)
    if cached and not cached.missing:
        return cached.folder / "config.json"
    listing = client.listing(model)
    files = [file for file in listing.files if file.name == "config.json"]
    if not files:
        raise CheckpointError(f"{model} has no config.json on the hub: it is not a model in transformers' format.")
    client.download(model, listing.revision, files, None)
    return client.folder(model, listing.revision) / "config.json"


def mending_command(name: str, folder: Path) -> str:
    """The command that makes a damaged checkpoint whole; empty where nobody knows where it came from."""
    if folder != Path(name).expanduser() and is_hub_id(name):
        return fetch_command(name)
    record = _read_record(folder)
    return fetch_command(record.model, record.hub, folder, record.with_source) if record else ""


def refuse_half_download(folder: Path) -> None:
    """Refuse a folder whose fetch did not end.

    Raises:
        CheckpointError: names the model and the command that completes it.
    """
    record = _read_record(folder)
    if record and not record.complete:
        raise CheckpointError(
            f"{folder} is a half-download of {record.model}: its fetch did not end. Complete it with: "
            f"{fetch_command(record.model, record.hub, folder, record.with_source)}"
        )


def fetch_command(model: str, hub: str = "huggingface", to: Path | None = None, with_source: bool = False) -> str:
    """The command line that fetches, and completes, a model.

    Example:
        >>> fetch_command("ZhipuAI/chatglm3-6b", "modelscope", Path("my models"))
        "glmlab fetch ZhipuAI/chatglm3-6b --from modelscope --to 'my models'"
    """
    words = ["glmlab", "fetch", model]
    words += ["--from", hub] if hub != "huggingface" else []
    words += ["--to", str(to)] if to is not None else []
    words += ["--with-source"] if with_source else []
    return shlex.join(words)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/model.

    Example:
        >>> is_hub_id("zai-org/chatglm3-6b"), is_hub_id("./folder"), is_hub_id("chatglm3-6b")
        (True, False, False)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))


def choose_files(model: str, files: Iterable[HubFile], *, with_source: bool = False) -> list[HubFile]:
    """Of a hub's listing, the files that loading needs, in order of their names.

    Raises:
        CheckpointError: none is there; a text file of a size that no checkpoint has.

    Example:
        >>> names = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "onnx/model.json"]
        >>> [file.name for file in choose_files("a/b", [HubFile(name, 1, None) for name in names])]
        ['config.json', 'model.safetensors']
    """
    patterns = (*NEEDED, *SOURCE) if with_source else NEEDED
    wanted = [file for file in files if fits(file.name, patterns) and not fits(file.name, NOT_NEEDED)]
    wanted = [file for file in wanted if file.name.isprintable()]  # others could steer the terminal
    if not wanted:
        raise CheckpointError(
            f"{model} holds none of the files that loading needs ({', '.join(NEEDED)}). Check that it is a model."
        )
    for file in wanted:
        if file.size_bytes > _LARGEST_TEXT_BYTES and not file.name.endswith(".safetensors"):
            raise CheckpointError(
                f"{model} lists {file.name} with {format_bytes(file.size_bytes)}, far more than such a file needs. "
                "Nothing was fetched. Use another copy of the model."
            )
    return sorted(wanted, key=lambda file: file.name)


def _without_hub(
    client: HubClient, model: str, to: Path | None, with_source: bool, error: HubUnreachableError, started: float
) -> FetchReport:
    """Report the whole copy that is here, or say what is missing."""
    cached = client.cached(model, NEEDED, NOT_NEEDED)
    folder, missing = (cached.folder, cached.missing) if cached else (None, ())
    if to is not None:
        record = _read_record(to)
        folder, missing = (to, ()) if record and (record.model, record.hub) == (model, client.name) else (None, ())
    if folder is None:
        raise CheckpointError(
            f"{model} is not on this machine and {error} A model of data/configs can be built with weights='random'."
        ) from error
    command = fetch_command(model, client.name, to, with_source)
    try:
        refuse_half_download(folder)
        if missing:
            raise CheckpointError(f"missing: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}.")
        check_checkpoint(folder)
    except CheckpointError as damage:
        raise CheckpointError(
            f"{model} is a half-download ({damage}), and {error} Once the hub answers, complete it with: {command}"
        ) from error
    names = sorted(path.name for path in folder.iterdir() if fits(path.name, NEEDED))
    files = tuple(FetchedFile(name, (folder / name).stat().st_size, True, "nothing") for name in names)
    return FetchReport(model, client.name, "as cached", folder, files, time.perf_counter() - started)


def _is_sound(path: Path, file: HubFile) -> bool:
    """Whether a file is there and is what the hub lists; one that is not goes, so that it is fetched anew."""
    if not path.is_file():
        return False
    if not _damage(path, file):
        return True
    _remove(path)
    return False


def _verify(path: Path, file: HubFile, model: str) -> None:
    """Hold a new file against the listing, and remove it where it differs."""
    if not path.is_file():
        raise CheckpointError(f"the hub's client left no {file.name} of {model}. Fetch it again.")
    if damage := _damage(path, file):
        _remove(path)
        raise CheckpointError(
            f"{file.name} of {model} {damage}. It was removed. Fetch again; if that repeats, the hub or a proxy on the "
            "way serves wrong data: use another endpoint."
        )


def _damage(path: Path, file: HubFile) -> str:
    """How a file differs from what the hub lists; empty where it does not."""
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        return f"has {size_bytes} bytes, but the hub lists {file.size_bytes}"
    if file.sha256 is not None:
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        if sha256 != file.sha256:
            return f"has the sha256 {sha256[:16]}…, but the hub lists {file.sha256[:16]}…"
    return ""


def _remove(path: Path) -> None:
    """Remove a file; in Hugging Face's cache, where it is a link, what it links to as well."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        path.resolve().unlink()
    path.unlink()


def _refuse_full_disk(model: str, folder: Path, need_bytes: int) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if need_bytes > free_bytes:
        raise CheckpointError(
            f"{model} needs {format_bytes(need_bytes)} more on disk, but {existing} has {format_bytes(free_bytes)} "
            "free. Nothing was fetched. Free some, or choose a folder on another disk with --to."
        )


def _claim(to: Path, model: str, hub: str, with_source: bool) -> None:
    """Make a folder this model's, unless something else is in it."""
    record = _read_record(to)
    if record is None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(
            f"{to} is {'not empty and was not fetched by glmlab' if to.is_dir() else 'a file'}. Choose a new folder."
        )
    if record and (record.model, record.hub) != (model, hub):
        raise CheckpointError(f"{to} holds {record.model} from {record.hub}. Choose another folder for {model}.")
    try:
        to.mkdir(parents=True, exist_ok=True)
        _write_record(to, _Record(model, hub, with_source, complete=False))
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written ({error.strerror}). Choose another folder.") from error


def _refuse_leftovers(to: Path, model: str, wanted: list[HubFile]) -> None:
    """Refuse weights that the hub does not list any more: an old index would be read in place of the new weights."""
    listed = {file.name for file in wanted}
    old = sorted(
        path.name
        for path in to.iterdir()
        if path.name not in listed and fits(path.name, ("*.safetensors", "*.safetensors.index.json"))
    )
    if old:
        raise CheckpointError(
            f"{to} holds {old[0]}, which the hub does not list for {model} any more. Remove it, or choose a new folder."
        )


def _read_record(folder: Path) -> _Record | None:
    """The record of a folder; None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = _Record(**json.loads(path.read_text(encoding="utf-8")))
        if not all(isinstance(value, str) for value in (record.model, record.hub)) or record.hub not in HUBS:
            raise ValueError("unknown hub")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Remove that file if the folder is whole, or fetch into a new folder."
        ) from error
    return record


def _write_record(folder: Path, record: _Record) -> None:
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
