"""Fetching from a hub: the hubs' real clients against a server on this machine."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from glmlab.models.shards import reshard
from hub_server import COMMIT, MODEL, serve
from safetensors.torch import load_file, save_file

from glmlab import load_model
from glmlab.core.units import MIB
from glmlab.models.checkpoints import CheckpointError, find_checkpoint, find_config
from glmlab.models.hub import RECORD, FetchReport, fetch
from glmlab.structure.source import source_class_graph

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
NEEDED = {"config.json", "tokenizer.model", "tokenizer_config.json", INDEX, *SHARDS}
HUBS = ("huggingface", "modelscope")
CHUNK_BYTES = 10 * 2**20  # huggingface_hub writes whole chunks of this size


@pytest.fixture
def hub(checkpoint, tmp_path):
    """A hub that holds the embedded model in two shards, with pickles and code beside."""
    reshard(checkpoint, tmp_path / "sharded", 3 * MIB)
    checkpoint = tmp_path / "sharded"
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (checkpoint / "modeling_chatglm.py").write_text("import os\nclass A: ...\nclass B(A): ...\nos._exit(7)\n")
    (checkpoint / "setup.py").write_text("raise SystemExit\n")
    with serve() as hub:
        hub.hold(checkpoint)
        yield hub


@pytest.fixture
def here(hub, tmp_path, monkeypatch) -> Path:
    """A folder; this process asks the hub of the test and caches below it."""
    constants = importlib.import_module("huggingface_hub.constants")
    for name in [name for name in os.environ if name.startswith(("HF_", "MODELSCOPE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope-home"))
    return tmp_path


def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _snapshot(cache: Path) -> Path:
    return cache / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def _new(report: FetchReport) -> set[str]:
    return {file.name for file in report.files if not file.was_there}


class TestCommand:
    """In processes of their own, so that the clients read their settings anew."""

    @pytest.fixture
    def run(self, hub, tmp_path):
        def run(*command: str, fails: bool = False, **environment: str) -> str:
            kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
            settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONUTF8": "1"}
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, encoding="utf-8",
                env={**kept, **settings, **environment},
            )  # fmt: skip
            assert done.returncode == (2 if fails else 0), done.stderr
            assert "Traceback" not in done.stderr
            return done.stderr.splitlines()[-1] if fails else done.stdout

        return run

    def test_fetches_into_the_cache_where_a_model_is_found_offline(self, run, hub, tmp_path):
        report = run("-m", "glmlab", "fetch", MODEL)
        assert "6 of 6 files fetched" in report
        assert "2 hashes checked" in report
        assert report.endswith(f"use it with: --model {MODEL}\n")
        hub.paths.clear()
        find = f"from glmlab.models.checkpoints import find_checkpoint; print(find_checkpoint({MODEL!r}))"
        assert run("-c", find, HF_HUB_OFFLINE="1").strip() == str(_snapshot(tmp_path / "hub"))
        again = run("-m", "glmlab", "fetch", MODEL, HF_HUB_OFFLINE="1")
        assert "0 of 6 files fetched" in again
        assert "nothing checked" in again
        assert hub.paths == []

    def test_without_network_is_one_line(self, run, hub):
        error = run("-m", "glmlab", "fetch", MODEL, fails=True, HF_ENDPOINT="http://127.0.0.1:9")
        assert error.startswith(f"glmlab: {MODEL} is not on this machine and the hub cannot be reached (ConnectError: ")
        assert "Check the network and HF_HUB_OFFLINE, HF_ENDPOINT" in error

    def test_modelscope_out_of_reach_is_one_line(self, run, tmp_path):
        settings = {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_API_MAX_RETRIES": "0"}
        folders = {name: str(tmp_path) for name in ("MODELSCOPE_CACHE", "MODELSCOPE_HOME")}
        error = run("-m", "glmlab", "fetch", MODEL, "--from", "modelscope", fails=True, **settings, **folders)
        assert error.startswith(f"glmlab: {MODEL} is not on this machine and the hub cannot be reached (")
        assert "Check the network and MODELSCOPE_ENDPOINT" in error

    def test_a_token_opens_a_gated_model(self, run, hub):
        hub.token = "hf_open"
        error = run("-m", "glmlab", "fetch", MODEL, fails=True)
        assert "is gated: accept its licence on its hub page, then log in with 'hf auth login' or set HF_TOKEN" in error
        assert "6 of 6 files fetched" in run("-m", "glmlab", "fetch", MODEL, HF_TOKEN="hf_open")


class TestWhatComes:
    @pytest.mark.parametrize("source", HUBS)
    def test_what_is_needed_comes_and_is_checked(self, hub, here, source):
        report = fetch(MODEL, hub=source, to=here / "to")
        assert _names(here / "to") - {RECORD} == NEEDED == _new(report)
        for name in NEEDED:
            assert (here / "to" / name).read_bytes() == hub.files[name]
        assert {request.file for request in hub.requests} == NEEDED
        assert report.hashes_checked == 2
        assert report.fetched_bytes == sum(len(hub.files[name]) for name in NEEDED)
        assert find_checkpoint(str(here / "to")) == here / "to"

    @pytest.mark.parametrize("source", HUBS)
    def test_source_comes_when_asked_for_and_is_read_not_run(self, hub, here, source):
        report = fetch(MODEL, hub=source, to=here / "to", with_source=True)
        assert _new(report) == {*NEEDED, "modeling_chatglm.py"}
        graph = source_class_graph(here / "to" / "modeling_chatglm.py")
        assert {"A", "B"} <= {name.rsplit(".", 1)[-1] for name in graph.classes}
        assert load_model(str(here / "to"), device="cpu").report.parameters == 2_461_376

    @pytest.mark.parametrize("source", HUBS)
    def test_a_second_fetch_checks_and_brings_nothing(self, hub, here, source):
        first = fetch(MODEL, hub=source)
        assert first.folder.is_relative_to(here)
        n_requests = len(hub.requests)
        second = fetch(MODEL, hub=source)
        assert (_new(second), second.hashes_checked, second.fetched_bytes) == (set(), 2, 0)
        assert len(hub.requests) == n_requests

    def test_load_model_fetches_what_is_not_here(self, hub, here):
        assert load_model(MODEL, device="cpu").report.name == MODEL
        assert find_checkpoint(MODEL) == _snapshot(here / "hf")
        assert len(hub.asked_for(SHARDS[0])) == 1

    def test_a_config_comes_alone(self, hub, here):
        assert find_config(MODEL) == _snapshot(here / "hf") / "config.json"
        assert find_config(MODEL).is_file()
        assert {request.file for request in hub.requests} == {"config.json"}


class TestResume:
    def test_a_cut_connection_goes_on_where_it_was_cut(self, hub, here):
        tensors = load_file(here / "sharded" / SHARDS[0])
        save_file({**tensors, "padding": torch.zeros(4 * 2**20)}, here / "large.safetensors")
        hub.files[SHARDS[0]] = (here / "large.safetensors").read_bytes()
        hub.cut_after_bytes[SHARDS[0]] = CHUNK_BYTES
        fetch(MODEL)
        first, second = hub.asked_for(SHARDS[0])
        assert (first.range, second.range) == (None, f"bytes={CHUNK_BYTES}-")
        assert first.sent_bytes + second.sent_bytes == len(hub.files[SHARDS[0]])

    def test_a_cut_file_goes_on_in_the_next_run_of_modelscope(self, hub, here, monkeypatch):
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)
        hub.cut_after_bytes[SHARDS[0]] = cut = len(hub.files[SHARDS[0]]) // 2
        with pytest.raises(CheckpointError, match=rf"1 of 6 files of {MODEL} failed, first {SHARDS[0]} .* Fetch again"):
            fetch(MODEL, hub="modelscope", to=here / "to")
        fetch(MODEL, hub="modelscope", to=here / "to")
        first, second = hub.asked_for(SHARDS[0])
        assert (first.range, second.range) == (None, f"bytes={cut}-")
        assert len(hub.asked_for(SHARDS[1])) == 1

    @pytest.mark.parametrize("source", HUBS)
    def test_a_half_download_in_a_folder_is_named_and_completed(self, hub, here, source):
        hub.status[SHARDS[1]] = 404
        with pytest.raises(CheckpointError, match=r"came only in part|failed, first"):
            fetch(MODEL, hub=source, to=here / "to")
        chosen = "" if source == "huggingface" else " --from modelscope"
        command = f"glmlab fetch {MODEL}{chosen} --to {here / 'to'}"
        with pytest.raises(CheckpointError, match=rf"is a half-download of {MODEL}: .* Complete it with: {command}$"):
            load_model(str(here / "to"))
        hub.status.clear()
        assert SHARDS[1] in _new(fetch(MODEL, hub=source, to=here / "to"))
        assert len(hub.asked_for(SHARDS[0])) == 1
        assert find_checkpoint(str(here / "to")) == here / "to"

    def test_a_half_download_in_the_cache_is_named_offline_and_completed(self, hub, here, monkeypatch):
        hub.status[SHARDS[1]] = 500
        came = rf"{MODEL} came only in part: the hub answers with an error \(.*500.*Complete it with: glmlab fetch"
        with pytest.raises(CheckpointError, match=came):
            fetch(MODEL)
        with monkeypatch.context() as patched:
            _offline(patched)
            named = rf"{MODEL} is a half-download \(missing: .*{SHARDS[1]}.*complete it with: glmlab fetch {MODEL}$"
            with pytest.raises(CheckpointError, match=named):
                load_model(MODEL)
        hub.status.clear()
        assert find_checkpoint(MODEL) == _snapshot(here / "hf")
        assert len(hub.asked_for(SHARDS[0])) == 1

    @pytest.mark.parametrize("source", HUBS)
    def test_a_damaged_file_is_fetched_anew(self, hub, here, source):
        folder = fetch(MODEL, hub=source).folder
        damaged = (folder / SHARDS[0]).resolve()
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        assert _new(fetch(MODEL, hub=source)) == {SHARDS[0]}
        assert (folder / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]

    def test_what_was_damaged_later_is_named_with_the_command_that_mends_it(self, hub, here):
        fetch(MODEL, to=here / "to")
        (here / "to" / SHARDS[1]).unlink()
        command = f"glmlab fetch {MODEL} --to {here / 'to'}"
        with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}, which is not there. .* This does: {command}$"):
            find_checkpoint(str(here / "to"))
        shard = (fetch(MODEL).folder / SHARDS[0]).resolve()
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.raises(CheckpointError, match=rf"is truncated: .* This does: glmlab fetch {MODEL}$"):
            find_checkpoint(MODEL)

    def test_a_cache_that_cannot_be_written_is_said(self, hub, here, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "sharded" / "config.json"))
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*\) while fetching .* with --to"):
            fetch(MODEL)


class TestRefusals:
    def test_a_wrong_hash_is_said_and_the_file_removed(self, hub, here):
        hub.served[SHARDS[0]] = hub.files[SHARDS[0]][:-1] + b"?"
        with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} of {MODEL} has the sha256 .* It was removed. Fetch"):
            fetch(MODEL)
        assert not (_snapshot(here / "hf") / SHARDS[0]).exists()
        hub.served.clear()
        assert _new(fetch(MODEL)) == {SHARDS[0]}

    def test_a_wrong_size_is_said(self, hub, here):
        hub.listed["config.json"] = {"type": "file", "path": "config.json", "size": 7, "oid": "0" * 40}
        with pytest.raises(CheckpointError, match=r"config.json of .* has 1271 bytes, but the hub lists 7"):
            fetch(MODEL)

    @pytest.mark.parametrize("source", HUBS)
    @pytest.mark.parametrize(
        "name",
        [
            "../evil.json",
            "/tmp/evil.json",
            "..\\evil.json",
            "C:evil.json",
            "sub/config.json",
            RECORD,
            "\x1b[2Jevil.json",
        ],
    )
    def test_names_that_leave_the_folder_or_mislead_are_never_fetched(self, hub, here, source, name):
        hub.listed[name] = {"type": "file", "path": name, "size": 2, "oid": "0" * 40}
        fetch(MODEL, hub=source, to=here / "to")
        assert {request.file for request in hub.requests} == NEEDED
        assert not list(here.rglob("evil*"))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"path": INDEX, "size": 2**40}, f"lists {INDEX} with 1024.00 GiB, far more than such a file needs"),
            ({"path": SHARDS[0], "size": 2**60}, r"needs .* GiB more on disk, but .* free. Nothing was fetched"),
            ({"path": SHARDS[0], "size": -1}, "size -1 and sha256 None, which no file has"),
        ],
    )
    @pytest.mark.parametrize("source", HUBS)
    def test_sizes_that_cannot_be_are_refused_before_anything_comes(self, hub, here, source, line, message):
        hub.listed[line["path"]] = {"type": "file", "oid": "0" * 40, **line}
        with pytest.raises(CheckpointError, match=message):
            fetch(MODEL, hub=source)
        assert hub.requests == []

    def test_a_hash_that_is_none_is_refused(self, hub, here):
        lfs = {"oid": "../../x", "size": 5, "pointerSize": 134}
        hub.listed[SHARDS[0]] = {"type": "file", "path": SHARDS[0], "size": 5, "oid": "0" * 40, "lfs": lfs}
        with pytest.raises(CheckpointError, match=r"sha256 ../../x, which no file has"):
            fetch(MODEL)

    def test_a_repository_without_a_model_is_refused(self, hub, here):
        hub.files = {"README.md": b"hello"}
        with pytest.raises(CheckpointError, match="holds none of the files that loading needs"):
            fetch(MODEL)
        with pytest.raises(CheckpointError, match="has no config.json on the hub"):
            find_config(MODEL)

    def test_a_shard_that_the_index_names_and_the_hub_lacks_is_named(self, hub, here):
        del hub.files[SHARDS[1]]
        with pytest.raises(CheckpointError, match=f"the index names {SHARDS[1]}, which is not there"):
            fetch(MODEL)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("huggingface", "the hub knows no public repository 'some/body'"),
            ("modelscope", "knows no model 'some/body'"),
        ],
    )
    def test_an_unknown_model_is_said(self, here, source, message):
        with pytest.raises(CheckpointError, match=message):
            fetch("some/body", hub=source)

    def test_modelscope_without_its_client_says_how_to_install_it(self, here, monkeypatch):
        monkeypatch.setitem(sys.modules, "modelscope_hub", None)
        with pytest.raises(CheckpointError, match=r"pip install 'glmlab\[modelscope\]'"):
            fetch(MODEL, hub="modelscope")

    @pytest.mark.parametrize(
        ("model", "source"), [("no-owner", "huggingface"), ("../x", "modelscope"), (MODEL, "github")]
    )
    def test_names_that_no_hub_has_are_refused(self, here, model, source):
        with pytest.raises(CheckpointError, match=r"is not a hub id|hub 'github' is not known. Use one of huggingface"):
            fetch(model, hub=source)


class TestFolder:
    def test_another_models_folder_is_left_alone(self, hub, here):
        fetch(MODEL, to=here / "to")
        record = json.loads((here / "to" / RECORD).read_text())
        (here / "to" / RECORD).write_text(json.dumps({**record, "model": "some/other"}))
        before = _names(here / "to")
        with pytest.raises(CheckpointError, match="holds some/other from huggingface. Choose another folder for"):
            fetch(MODEL, to=here / "to")
        assert _names(here / "to") == before

    def test_a_folder_with_something_else_is_left_alone(self, hub, here):
        with pytest.raises(CheckpointError, match="is not empty and was not fetched by glmlab. Choose a new folder"):
            fetch(MODEL, to=here / "sharded")
        with pytest.raises(CheckpointError, match="is a file. Choose a new folder"):
            fetch(MODEL, to=here / "sharded" / "config.json")
        assert hub.requests == []

    def test_a_folder_that_cannot_be_made_is_said(self, hub, here):
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*\). Choose another folder"):
            fetch(MODEL, to=here / "sharded" / "config.json" / "below")

    @pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}', "[" * 100_000])
    def test_a_broken_record_is_said(self, here, text):
        shutil.copytree(here / "sharded", here / "to")
        (here / "to" / RECORD).write_text(text)
        with pytest.raises(
            CheckpointError, match=rf"{RECORD} cannot be read .* Remove that file if the folder is whole"
        ):
            find_checkpoint(str(here / "to"))

    def test_weights_that_the_hub_does_not_list_any_more_are_named(self, hub, here):
        fetch(MODEL, to=here / "to")
        del hub.files[INDEX]
        with pytest.raises(CheckpointError, match=f"holds {INDEX}, which the hub does not list for {MODEL} any more"):
            fetch(MODEL, to=here / "to")

    def test_offline_a_whole_folder_is_reported_and_a_half_one_named(self, hub, here, monkeypatch):
        fetch(MODEL, to=here / "to")
        _offline(monkeypatch)
        assert {file.checked for file in fetch(MODEL, to=here / "to").files} == {"nothing"}
        (here / "to" / SHARDS[1]).unlink()
        with pytest.raises(
            CheckpointError, match=rf"is a half-download \(.*{SHARDS[1]}.*complete it with: glmlab fetch"
        ):
            fetch(MODEL, to=here / "to")
        with pytest.raises(CheckpointError, match="is not on this machine and the hub cannot be reached"):
            fetch(MODEL, to=here / "elsewhere")
