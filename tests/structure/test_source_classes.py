"""Source is read and never run: a file of ChatGLM's class names whose every line would leave a mark."""

import json
import sys
from pkgutil import resolve_name

import pytest

import glmlab
from glmlab.core.resources import data_path
from glmlab.structure.comparison import chat_side, places_today, side_by_side
from glmlab.structure.graph import Arrow, Part, StructureError
from glmlab.structure.source import join, read_class_facts, source_class_graph, write_class_facts

ACTING = '''
"""Made up: the class names of the published file, bodies that act."""
from pathlib import Path
import a_package_that_does_not_exist
import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers.modeling_utils import PreTrainedModel
from .configuration_chatglm import ChatGLMConfig

def act(*names): Path({marker!r}).write_text("acted")

act()

class MLP(torch.nn.Module):
    act()
    def __init__(self, config, acting=act()):
        super().__init__()
        self.up, self.unseen = nn.Linear(1, 2), 3
        self.down = nn.Linear(2, 1)

class SelfAttention(nn.Module, metaclass=act()): ...

class GLMBlock(torch.nn.Module):
    def __init__(self, config):
        Norm = nn.RMSNorm if config.rms else nn.LayerNorm
        self.input_layernorm = Norm(1)
        self.self_attention: nn.Module = SelfAttention(config)
        self.mlp = MLP(config)
        self.weight = nn.Parameter(torch.ones(1))
        self.is_block = isinstance(config, MLP)

class GLMTransformer(nn.Module):
    def __init__(self, config):
        def build_layer(number):
            act()
            return GLMBlock(config)
        self.layers = torch.nn.ModuleList([build_layer(i) for i in range(config.num_layers)])

@act
class ChatGLMPreTrainedModel(PreTrainedModel):
    @act()
    def get_masks(self): ...
    def get_position_ids(self): ...

class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        make = skip_init if config.empty else act
        self.encoder = make(GLMTransformer, config)
        if config.prefix:
            self.dropout = nn.Dropout(0.1)

class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config):
        self.transformer = ChatGLMModel(config)
    @property
    def size(self): return act()
    @staticmethod
    def _reorder_cache(): act()
    @classmethod
    def make(cls): act()
    def chat(self): act()
    @torch.inference_mode()
    def stream_chat(self): act()
    def stream_generate(self): act()
    def quantize(self): act()

if __name__ != "nothing":
    class Conditional(MLP): act()

raise SystemExit(act())
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "modeling_chatglm.py").write_text(ACTING.replace("{marker!r}", repr(str(tmp_path / "marker"))))
    auto_map = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration", "AutoConfig": "other.ChatGLMConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    return tmp_path


class TestSource:
    def test_the_file_would_act_and_nothing_acted(self, folder):
        """Reading leaves no mark and imports nothing; running only its beginning leaves one."""
        before = set(sys.modules)
        source_class_graph(folder)
        source_class_graph(folder / "modeling_chatglm.py")
        assert not (folder / "marker").exists()
        assert {name for name in set(sys.modules) - before if "chatglm" in name or "does_not" in name} == set()

        beginning = (folder / "modeling_chatglm.py").read_text().split("class MLP")[0]
        harmless = "\n".join(line for line in beginning.splitlines() if not line.startswith(("import a_", "from .")))
        exec(compile(harmless, "beginning", "exec"), {})
        assert (folder / "marker").read_text() == "acted"

    def test_bases_members_and_roots(self, folder):
        graph = source_class_graph(folder)
        model = graph.classes["ChatGLMForConditionalGeneration"]
        assert model.bases == ("ChatGLMPreTrainedModel",)
        assert model.mro == ("ChatGLMForConditionalGeneration", "ChatGLMPreTrainedModel", "PreTrainedModel")
        assert {m.name: m.kind for m in model.members if m.kind != "method"} == {
            "size": "property", "_reorder_cache": "static method", "make": "class method",
        }  # fmt: skip
        assert (graph.classes["PreTrainedModel"].kind, graph.classes["nn.Module"].kind) == ("outside", "torch")
        assert graph.classes["PreTrainedModel"].module == "transformers.modeling_utils"
        assert graph.classes["Conditional"].bases == ("MLP",)
        assert graph.roots == ("ChatGLMForConditionalGeneration",)
        assert graph.builds == (Arrow("builds", "AutoModel", "ChatGLMForConditionalGeneration", "auto_map"),)

        (folder / "config.json").unlink()  # then the roots are what no class inherits from or holds
        assert set(glmlab.source_class_graph(folder).roots) == {"ChatGLMForConditionalGeneration", "Conditional"}

    def test_parts(self, folder):
        graph = source_class_graph(folder)
        parts = {name: [part.label for part in node.parts] for name, node in graph.classes.items() if node.parts}
        assert parts == {
            "MLP": ["down: nn.Linear"],
            "GLMBlock": [
                "input_layernorm: 0..1 x nn.RMSNorm", "input_layernorm: 0..1 x nn.LayerNorm",
                "self_attention: SelfAttention", "mlp: MLP",
            ],
            "GLMTransformer": ["layers: n x GLMBlock"],
            "ChatGLMModel": ["encoder: GLMTransformer", "dropout: 0..1 x nn.Dropout"],
            "ChatGLMForConditionalGeneration": ["transformer: ChatGLMModel"],
        }  # fmt: skip

    def test_what_a_branch_makes_may_be_there(self, tmp_path):
        """A byte order mark and an escape that Python warns of change nothing."""
        source = """\ufeffimport torch
class A(torch.nn.Module):
    pattern = "\\d"
    def __init__(self):
        try:
            self.norm = torch.nn.RMSNorm(8)
        except AttributeError:
            self.norm = torch.nn.LayerNorm(8)
        while more():
            self.drop = torch.nn.Dropout()
"""
        (tmp_path / "modeling_a.py").write_text(source, encoding="utf-8")
        parts = source_class_graph(tmp_path).classes["A"].parts
        assert [part.label for part in parts] == [
            "norm: nn.RMSNorm", "norm: 0..1 x nn.LayerNorm", "drop: 0..1 x nn.Dropout",
        ]  # fmt: skip

    def test_members_of_every_kind(self, tmp_path):
        source = """import abc, functools, other
class A(Base[int], other.A, metaclass=Meta):
    @property
    def size(self): ...
    @size.setter
    def size(self, value): ...
    @functools.lru_cache(maxsize=8)
    def kept(self): ...
    @property
    @abc.abstractmethod
    def width(self): ...
    if True:
        async def later(self): ...
A = decorate(A)
"""
        (tmp_path / "modeling_a.py").write_text(source, encoding="utf-8")
        node = source_class_graph(tmp_path).classes["A"]
        assert node.bases == ("Base", "other.A"), "a base of the same name from elsewhere stays apart"
        assert [(m.name, m.kind, m.abstract) for m in node.members] == [
            ("size", "property", False), ("kept", "method", False), ("width", "property", True),
            ("later", "method", False),
        ]  # fmt: skip

    def test_it_can_stand_beside_today_s_classes(self, folder):
        """What notebook 01 does with a checkpoint that brings its own source."""
        published = source_class_graph(folder)
        picture = chat_side(join(published, read_class_facts(data_path("structure", "transformers-4.38.json"))))
        assert {"GLMBlock", "GenerationMixin", "nn.Module"} <= {node.name for node in picture.nodes}
        table = side_by_side(published)
        assert table["original"].tolist()[:2] == ["ChatGLMForConditionalGeneration", "  chat()"]
        assert "Embedding" not in set(table["original"]), "not in this file"
        assert not (folder / "marker").exists()


class TestBadSource:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"class A(:\n", r"modeling_bad.py is not Python source: .*line 1.* Download it again"),
            (b"class A: ...\n  x = 1\n", r"not Python source: unexpected indent \(modeling_bad.py, line 2"),
            (b"class A: ...\0", "is not Python source: .*null bytes"),
            (b"version https://git-lfs.github.com/spec/v1\n", "modeling_bad.py is not Python source"),
            (b"# \xff\xfe\nclass A: ...", "modeling_bad.py is not Python source: 'utf-8' codec"),
            (b"x = " + b"(" * 5000 + b")" * 5000, "modeling_bad.py is not Python source"),
            (b"import os\n", "modeling_bad.py defines no class"),
            (b"class A(B): ...\nclass B(A): ...", "A -> B -> A: a class cannot inherit from itself"),
        ],
        ids=["syntax", "indent", "null", "lfs", "utf8", "deep", "no class", "circle"],
    )
    def test_a_broken_file_says_what_is_wrong(self, tmp_path, content, message):
        (tmp_path / "modeling_bad.py").write_bytes(content)
        with pytest.raises(StructureError, match=message):
            source_class_graph(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", r"has no modeling_\*.py. Checkpoints of models that transformers"),
            ("nothing.py", r"nothing.py is not there. Give a .py file, or the folder of a checkpoint"),
            ("model.bin", r"model.bin is not a .py file. Give Python source"),
        ],
    )
    def test_no_source(self, tmp_path, name, message):
        (tmp_path / "model.bin").write_bytes(b"")
        with pytest.raises(StructureError, match=message):
            source_class_graph(tmp_path / name)

    def test_a_broken_config_beside_it(self, folder):
        (folder / "config.json").write_text("[]")
        with pytest.raises(StructureError, match="config.json is not a config .* Download it again"):
            source_class_graph(folder)


class TestFacts:
    def test_what_is_written_is_read_back(self, folder, tmp_path):
        graph = source_class_graph(folder)
        write_class_facts(graph, tmp_path / "facts.json", source="made up")
        assert read_class_facts(tmp_path / "facts.json") == graph
        assert json.loads((tmp_path / "facts.json").read_text())["source"] == "made up"

    @pytest.mark.parametrize("text", ["{", "[]", '{"classes": [{}]}'])
    def test_what_is_no_facts_is_refused(self, tmp_path, text):
        (tmp_path / "facts.json").write_text(text)
        with pytest.raises(StructureError, match="facts.json holds no class facts"):
            read_class_facts(tmp_path / "facts.json")

    def test_the_chapters_picture(self):
        """Classes, methods and relations that the chapter names."""
        published = read_class_facts(data_path("structure", "chatglm3-6b.json"))
        picture = join(published, read_class_facts(data_path("structure", "transformers-4.38.json")))
        classes = picture.classes
        assert picture.roots[0] == "ChatGLMForConditionalGeneration"
        for name in ("chat", "stream_chat", "stream_generate", "quantize"):
            assert classes["ChatGLMForConditionalGeneration"].defines(name)
        assert all(classes["ChatGLMPreTrainedModel"].defines(name) for name in ("get_masks", "get_position_ids"))
        assert Part("transformer", "ChatGLMModel") in classes["ChatGLMForConditionalGeneration"].parts
        assert Part("layers", "GLMBlock", None, None) in classes["GLMTransformer"].parts
        assert classes["PreTrainedModel"].bases == (
            "nn.Module", "ModuleUtilsMixin", "GenerationMixin", "PushToHubMixin", "PeftAdapterMixin",
        )  # fmt: skip
        assert classes["AutoModelForCausalLM"].bases == ("_BaseAutoModelClass",)
        assert {node.name for node in picture.nodes if node.kind == "mixin"} == {
            name for name in classes if name.endswith("Mixin")
        }
        built = {arrow.source for arrow in picture.builds if arrow.target == "ChatGLMForConditionalGeneration"}
        assert {"AutoModel", "AutoModelForCausalLM"} <= built


class TestSideBySide:
    @pytest.fixture
    def published(self):
        return read_class_facts(data_path("structure", "chatglm3-6b.json"))

    def test_every_published_class_has_its_place_today(self, published):
        named = places_today()["original"]
        own = {name for name, node in published.classes.items() if node.module == "modeling_chatglm"}
        assert own == {name for name in named if "." not in name}
        for place in places_today()["today"]:
            assert resolve_name(place) is not None  # else ImportError or AttributeError
        table = side_by_side(published)
        assert len(table) == len(named), "every method of the list is in the published file"
        today = table.set_index("original")["today"].to_dict()
        assert today["  chat()"] == today["  stream_chat()"] == "glmlab.ChatSession"
        assert today["  quantize()"] == "transformers.BitsAndBytesConfig"
        assert today["  get_masks()"] == "transformers.create_causal_mask"
        assert today["ChatGLMForConditionalGeneration"] == "glmlab.ChatGLM3ForCausalLM"

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "modeling_a.py").write_text("class A: ...")
        with pytest.raises(StructureError, match="ClassGraph of A: .* is not the graph of ChatGLM's published file"):
            side_by_side(source_class_graph(tmp_path))
