"""Fetching from a hub: the hubs' real clients against a server on this machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import COMMIT, MODEL, cut_into_shards, serve
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from glmlab import load_model
from glmlab.cli import main
from glmlab.core.resources import data_path
from glmlab.models.checkpoints import fetch, find_checkpoint, find_config
from glmlab.models.hub import RECORD, CheckpointError
from glmlab.structure.source import source_class_graph

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
NEEDED = {"config.json", "tokenizer.model", "tokenizer_config.json", INDEX, *SHARDS}
CHUNK_BYTES = 10 * 2**20  # huggingface_hub writes whole chunks of this size
both_hubs = pytest.mark.parametrize("source", ["huggingface", "modelscope"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The embedded model in two shards, with a pickle and code beside; tests must not change it."""
    folder = tmp_path_factory.mktemp("hub") / "sharded"
    cut_into_shards(data_path("tiny-chatglm3"), folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "modeling_chatglm.py").write_text("import os\nclass A: ...\nclass B(A): ...\nos._exit(7)\n")
    (folder / "setup.py").write_text("raise SystemExit\n")
    return folder


@pytest.fixture
def hub(sharded):
    with serve() as hub:
        hub.files = {path.name: path.read_bytes() for path in sharded.iterdir() if path.is_file()}
        yield hub


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """A folder; this process asks the hub of the test and caches below it."""
    for name in [name for name in os.environ if name.startswith(("HF_", "MODELSCOPE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name, value in {"ENDPOINT": hub.url, "CACHE": tmp_path / "ms", "HOME": tmp_path / "ms-home"}.items():
        monkeypatch.setenv(f"MODELSCOPE_{name}", str(value))
    return tmp_path


def _snapshot(cache):
    return cache / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT


def _names(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


class TestCommand:
    def _run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own, so that the client reads its settings anew."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [sys.executable, "-m", "glmlab", "fetch", MODEL, *arguments]
        environment = {**kept, "PYTHONUTF8": "1", **environment}
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)

    def test_fetches_into_the_cache_where_a_model_is_found_offline(self, hub, tmp_path):
        report = self._run(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)).stdout
        assert "6 of 6 files fetched" in report
        assert "2 hashes checked" in report
        assert report.endswith(f"in {_snapshot(tmp_path / 'hub')}\nuse it with: --model {MODEL}\n")
        hub.paths.clear()
        again = self._run(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stdout
        assert f"{MODEL}: the hub cannot be reached, nothing checked\nin {_snapshot(tmp_path / 'hub')}" in again
        assert hub.paths == []

    def test_an_error_is_one_line(self, tmp_path):
        done = self._run(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
        assert done.returncode == 2
        assert done.stderr.startswith(f"glmlab: {MODEL} is not on this machine, or only in part, and the hub cannot")
        assert done.stderr.count("\n") == 1

    def test_an_endpoint_that_is_no_address_is_said(self, monkeypatch, capsys):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:99999")
        with pytest.raises(SystemExit, match="2"):
            main()
        assert "HF_ENDPOINT is 'http://127.0.0.1:99999', which is no address (Port out of" in capsys.readouterr().err


class TestWhatComes:
    @both_hubs
    def test_what_is_needed_comes_and_is_checked(self, hub, here, source):
        report = fetch(MODEL, hub=source, to=here / "to")
        assert _names(here / "to") - {RECORD} == NEEDED == report.fetched
        for name in NEEDED:
            assert (here / "to" / name).read_bytes() == hub.files[name]
        assert {request.file for request in hub.requests} == NEEDED
        assert {file.name for file in report.files if file.sha256} == set(SHARDS)
        assert find_checkpoint(str(here / "to")) == here / "to"

    @both_hubs
    def test_source_comes_when_asked_for_and_is_read_not_run(self, here, source):
        report = fetch(MODEL, hub=source, to=here / "to", with_source=True)
        assert report.fetched == {*NEEDED, "modeling_chatglm.py"}
        graph = source_class_graph(here / "to" / "modeling_chatglm.py")
        assert {"A", "B"} <= {name.rsplit(".", 1)[-1] for name in graph.classes}
        assert load_model(str(here / "to"), device="cpu").report.parameters == 2_461_376

    @both_hubs
    def test_a_second_fetch_brings_only_what_is_damaged(self, hub, here, source):
        folder = fetch(MODEL, hub=source).folder
        assert folder.is_relative_to(here)
        n_requests = len(hub.requests)
        assert fetch(MODEL, hub=source).fetched == set()
        assert len(hub.requests) == n_requests
        damaged = (folder / SHARDS[0]).resolve()
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        assert fetch(MODEL, hub=source).fetched == {SHARDS[0]}
        assert (folder / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]

    def test_a_token_opens_a_gated_model(self, hub, here, monkeypatch):
        hub.token = "hf_open"
        with pytest.raises(
            CheckpointError, match="gated: accept its licence .* log in with 'hf auth login' or set HF_TO"
        ):
            fetch(MODEL)
        monkeypatch.setenv("HF_TOKEN", "hf_open")
        assert fetch(MODEL).fetched == NEEDED

    def test_load_model_fetches_what_is_not_here(self, hub, here):
        assert load_model(MODEL, device="cpu").report.name == MODEL
        assert find_checkpoint(MODEL) == _snapshot(here / "hf")
        assert len(hub.asked_for(SHARDS[0])) == 1

    def test_a_config_comes_alone(self, hub, here):
        assert find_config(MODEL) == _snapshot(here / "hf") / "config.json"
        assert find_config(MODEL).is_file()
        assert {request.file for request in hub.requests} == {"config.json"}


class TestResume:
    def test_an_interrupted_connection_resumes_at_its_byte(self, hub, here):
        tensors = load_file(data_path("tiny-chatglm3", "model.safetensors"))
        weight_map = json.loads(hub.files[INDEX])["weight_map"]
        first_shard = {name: tensor for name, tensor in tensors.items() if weight_map[name] == SHARDS[0]}
        save_file({**first_shard, "padding": torch.zeros(4 * 2**20)}, here / "large.safetensors")
        hub.files[SHARDS[0]] = (here / "large.safetensors").read_bytes()
        hub.cut_after_bytes[SHARDS[0]] = CHUNK_BYTES
        fetch(MODEL)
        first, second = hub.asked_for(SHARDS[0])
        assert (first.range, second.range) == (None, f"bytes={CHUNK_BYTES}-")
        assert first.sent_bytes + second.sent_bytes == len(hub.files[SHARDS[0]])

    def test_an_interrupted_file_resumes_in_the_next_run_of_modelscope(self, hub, here, monkeypatch):
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)
        hub.cut_after_bytes[SHARDS[0]] = cut = len(hub.files[SHARDS[0]]) // 2
        with pytest.raises(
            CheckpointError, match=rf"{MODEL} came only in part: .* 1 of 2 .*{SHARDS[0]}.* Complete it with: glmlab"
        ):
            fetch(MODEL, hub="modelscope", to=here / "to")
        fetch(MODEL, hub="modelscope", to=here / "to")
        first, second = hub.asked_for(SHARDS[0])
        assert (first.range, second.range) == (None, f"bytes={cut}-")
        assert len(hub.asked_for(SHARDS[1])) == 1

    @both_hubs
    def test_a_half_download_in_a_folder_is_named_and_completed(self, hub, here, source):
        hub.status[SHARDS[1]] = 404
        with pytest.raises(CheckpointError, match=r"came only in part|lacks a file on the hub"):
            fetch(MODEL, hub=source, to=here / "to")
        chosen = "" if source == "huggingface" else " --from modelscope"
        command = f"glmlab fetch {MODEL}{chosen} --to {here / 'to'}"
        with pytest.raises(CheckpointError, match=rf"is incomplete: .*{SHARDS[1]}.* This does: {command}$"):
            load_model(str(here / "to"))
        hub.status.clear()
        assert SHARDS[1] in fetch(MODEL, hub=source, to=here / "to").fetched
        assert len(hub.asked_for(SHARDS[0])) == 1
        assert find_checkpoint(str(here / "to")) == here / "to"

    def test_a_half_download_in_the_cache_is_named_offline_and_completed(self, hub, here, monkeypatch):
        hub.status[SHARDS[1]] = 500
        came = rf"{MODEL} came only in part: the hub .* answers with an error \(.*500.*Complete it with: glmlab fetch"
        with pytest.raises(CheckpointError, match=came):
            fetch(MODEL)
        with monkeypatch.context() as patched:
            patched.setattr(constants, "HF_HUB_OFFLINE", True)
            named = rf"{MODEL} is not on this machine, or only in part, and .* fetch it with: glmlab fetch {MODEL};"
            with pytest.raises(CheckpointError, match=named):
                load_model(MODEL)
        hub.status.clear()
        assert find_checkpoint(MODEL) == _snapshot(here / "hf")
        assert len(hub.asked_for(SHARDS[0])) == 1

    def test_what_was_damaged_later_is_named_with_the_command_that_repairs_it(self, here):
        fetch(MODEL, to=here / "to")
        (here / "to" / SHARDS[1]).unlink()
        command = f"glmlab fetch {MODEL} --to {here / 'to'}"
        with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}, which is not there. .* This does: {command}$"):
            find_checkpoint(str(here / "to"))
        shard = (fetch(MODEL).folder / SHARDS[0]).resolve()
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.raises(CheckpointError, match=rf"its length is not .* This does: glmlab fetch {MODEL}$"):
            find_checkpoint(MODEL)


class TestRefusals:
    def test_a_wrong_hash_is_said_and_the_file_removed(self, hub, here):
        hub.served[SHARDS[0]] = hub.files[SHARDS[0]][:-1] + b"?"
        with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} of {MODEL} has the sha256 .*; it was removed. Fetch"):
            fetch(MODEL)
        assert not (_snapshot(here / "hf") / SHARDS[0]).exists()
        hub.served.clear()
        assert fetch(MODEL).fetched == {SHARDS[0]}

    def test_a_wrong_size_is_said(self, hub, here):
        hub.listed["config.json"] = {"type": "file", "path": "config.json", "size": 7, "oid": "0" * 40}
        with pytest.raises(CheckpointError, match=r"config.json of .* has 1271 bytes, but the hub lists 7"):
            fetch(MODEL)

    @both_hubs
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

    @both_hubs
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"path": INDEX, "size": 2**40}, f"lists {INDEX} with 1,099,511,627,776 bytes, which no such"),
            ({"path": SHARDS[0], "size": 2**60}, r"needs .* GiB more on disk, but .* free. Nothing was fetched"),
            ({"path": SHARDS[0], "size": -1}, f"lists {SHARDS[0]} with -1 bytes, which no such file has"),
        ],
    )
    def test_sizes_that_cannot_be_are_refused_before_anything_comes(self, hub, here, source, line, message):
        hub.listed[line["path"]] = {"type": "file", "oid": "0" * 40, **line}
        with pytest.raises(CheckpointError, match=message):
            fetch(MODEL, hub=source)
        assert hub.requests == []

    def test_a_repository_without_a_model_is_refused(self, hub, here):
        hub.files = {"README.md": b"hello"}
        with pytest.raises(CheckpointError, match="holds none of the files that loading needs"):
            fetch(MODEL)
        with pytest.raises(CheckpointError, match=f"{MODEL} lacks a file on the hub .*config.json"):
            find_config(MODEL)

    def test_a_shard_that_the_index_names_and_the_hub_lacks_is_named(self, hub, here):
        del hub.files[SHARDS[1]]
        with pytest.raises(CheckpointError, match=f"the index names {SHARDS[1]}, which is not there"):
            fetch(MODEL)

    @pytest.mark.parametrize(
        ("model", "source", "message"),
        [
            ("some/body", "huggingface", "the hub knows no public repository 'some/body'"),
            ("some/body", "modelscope", "ModelScope knows no model 'some/body'"),
            ("no-owner", "huggingface", "'no-owner' is not a hub id such as"),
            ("../x", "modelscope", "'../x' is not a hub id such as"),
            (MODEL, "github", "hub 'github' is not known. Use one of huggingface"),
        ],
    )
    def test_names_that_a_hub_does_not_have_are_refused(self, here, model, source, message):
        with pytest.raises(CheckpointError, match=message):
            fetch(model, hub=source)

    @pytest.mark.parametrize(
        ("source", "settings"),
        [("huggingface", "HF_HUB_OFFLINE, HF_ENDPOINT"), ("modelscope", "MODELSCOPE_ENDPOINT")],
    )
    def test_a_hub_out_of_reach_is_said(self, here, monkeypatch, source, settings):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)  # else it waits 7 s
        message = rf"{MODEL} is not on this machine, .*hub cannot be reached, .*Check the network and {settings}, try"
        with pytest.raises(CheckpointError, match=message):
            fetch(MODEL, hub=source)

    def test_modelscope_without_its_client_says_how_to_install_it(self, here, monkeypatch):
        monkeypatch.setitem(sys.modules, "modelscope_hub", None)
        with pytest.raises(CheckpointError, match=r"pip install 'glmlab\[modelscope\]'"):
            fetch(MODEL, hub="modelscope")


class TestFolder:
    def test_another_models_folder_is_left_alone(self, here):
        fetch(MODEL, to=here / "to")
        (here / "to" / RECORD).write_text("glmlab fetch some/other\n")
        before = _names(here / "to")
        with pytest.raises(CheckpointError, match="fetched with 'glmlab fetch some/other --to .*Choose another folder"):
            fetch(MODEL, to=here / "to")
        assert _names(here / "to") == before

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "is not empty and was not fetched by glmlab. Choose another folder"),
            ("config.json", r"cannot be written \(File exists\). Choose another folder"),
            ("config.json/below", r"cannot be written \(.*\). Choose another folder"),
        ],
    )
    def test_what_is_there_is_left_alone(self, hub, here, sharded, name, message):
        with pytest.raises(CheckpointError, match=message):
            fetch(MODEL, to=sharded / name)
        assert hub.requests == []

    def test_a_cache_that_cannot_be_written_is_said(self, here, sharded, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(sharded / "config.json"))
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*\) while fetching .* with --to"):
            fetch(MODEL)

    @pytest.mark.parametrize("text", ["", "rm -rf /", "glmlab fetch a/b; rm", "\x1b[2Jglmlab fetch a/b"])
    def test_a_broken_record_is_said(self, sharded, tmp_path, text):
        shutil.copytree(sharded, tmp_path / "to")
        (tmp_path / "to" / RECORD).write_text(text)
        with pytest.raises(CheckpointError, match=rf"{RECORD} cannot be read. Remove that file if the folder is"):
            find_checkpoint(str(tmp_path / "to"))

    def test_weights_that_the_hub_does_not_list_any_more_are_named(self, hub, here):
        fetch(MODEL, to=here / "to")
        del hub.files[INDEX]
        with pytest.raises(CheckpointError, match=f"holds {INDEX}, which the hub does not list for this model any"):
            fetch(MODEL, to=here / "to")

    def test_offline_a_folder_that_was_fetched_is_checked(self, here, monkeypatch):
        fetch(MODEL, to=here / "to")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        report = fetch(MODEL, to=here / "to")
        assert (report.folder, report.files) == (here / "to", ())
        (here / "to" / SHARDS[1]).unlink()
        with pytest.raises(CheckpointError, match=f"is incomplete: the index names {SHARDS[1]}, which is not there"):
            fetch(MODEL, to=here / "to")
        with pytest.raises(CheckpointError, match="is not on this machine, .*and the hub cannot be reached"):
            fetch(MODEL, to=here / "elsewhere")
