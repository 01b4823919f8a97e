"""Live class graphs agree with Python, for models of several families and for made-up classes."""

import abc

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GlmModel, PreTrainedConfig, PreTrainedModel

import glmlab
from glmlab.models.checkpoints import find_config
from glmlab.models.loading import build_skeleton, load_config
from glmlab.structure.graph import Arrow, Member, Part, StructureError
from glmlab.structure.live import class_graph

FAMILIES = {"chatglm3-6b": "ChatGLM3", "glm-4-9b-chat-hf": "Glm", "qwen2.5-7b": "Qwen2", "llama-2-7b": "Llama"}


@pytest.fixture(scope="module", params=FAMILIES)
def skeleton(request):
    return FAMILIES[request.param], build_skeleton(load_config(find_config(request.param)))


@pytest.fixture(scope="module")
def chatglm3():
    return class_graph(build_skeleton(load_config(find_config("chatglm3-6b"))))


def _name(cls: type) -> str:
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__


def _python_edges(classes) -> list[tuple[str, str]]:
    return [(_name(cls), _name(base)) for cls in classes for base in cls.__bases__ if base is not object]


def _edges(graph) -> list[tuple[str, str]]:
    return [(arrow.source, arrow.target) for arrow in graph.arrows if arrow.kind == "inherits"]


class TestFamilies:
    def test_edges_mro_and_who_answers_a_call_are_pythons(self, skeleton):
        _, model = skeleton
        graph = class_graph(model)
        held = {type(module) for module in model.modules()}
        held = {cls for cls in held if not cls.__module__.startswith(("torch.", "transformers.activations"))}
        starts = [type(model), *held, AutoModelForCausalLM, type(model).config_class, AutoConfig]
        everything = {above for cls in starts for above in cls.__mro__ if above is not object}
        assert sorted(_edges(graph)) == sorted(_python_edges(everything))
        for cls in everything:
            assert graph.classes[_name(cls)].mro == tuple(_name(above) for above in cls.__mro__[:-1])
        answers = graph.calls().set_index("call")["defined in"].to_dict()
        owners = {call: next(cls for cls in type(model).__mro__ if call in vars(cls)) for call in answers}
        assert answers == {call: _name(owner) for call, owner in owners.items()}
        assert (answers["generate"], answers["from_pretrained"]) == ("GenerationMixin", "PreTrainedModel")

    def test_layers_are_held_with_their_count(self, skeleton):
        family, model = skeleton
        family = family.removeprefix("Chat").replace("GLM3", "Glm")
        graph, n_layers = class_graph(model), model.config.num_hidden_layers
        assert Part("layers", f"{family}DecoderLayer", n_layers, n_layers) in graph.classes[f"{family}Model"].parts
        layers = [arrow.label for arrow in graph.arrows if arrow.target == f"{family}DecoderLayer"]
        assert layers == [f"layers: {n_layers} x"]

    def test_the_way_from_model_type_to_the_class(self, skeleton):
        _, model = skeleton
        config_class = type(model).config_class
        root, config, model_type = type(model).__name__, config_class.__name__, config_class.model_type
        assert AutoModelForCausalLM._model_mapping[config_class] is type(model)
        assert {
            Arrow("builds", "AutoModelForCausalLM", root, "builds"),
            Arrow("builds", config, root, f"model_type '{model_type}'"),
            Arrow("builds", "AutoConfig", config, f"'{model_type}'"),
        } <= set(class_graph(model).builds)


class TestChatGLM3:
    def test_kinds(self, chatglm3):
        kinds = {kind: {node.name for node in chatglm3.nodes if node.kind == kind} for kind in ("torch", "auto")}
        assert kinds == {"torch": {"nn.Module"}, "auto": {"AutoConfig", "AutoModelForCausalLM", "_BaseAutoModelClass"}}
        assert {node.name for node in chatglm3.nodes if node.kind == "config"} == {"GlmConfig", "PreTrainedConfig"}
        own = {node.name for node in chatglm3.nodes if node.kind == "suite"}
        assert own == {"ChatGLM3Config", "ChatGLM3ForCausalLM", "ChatGLM3RMSNorm"}
        assert all((node.kind == "mixin") == node.name.endswith("Mixin") for node in chatglm3.nodes)

    def test_forward_is_abstract_in_pytorch_and_overridden_in_the_model(self, chatglm3):
        assert [m for m in chatglm3.classes["nn.Module"].members if m.abstract] == [Member("forward", abstract=True)]
        (forward,) = [m for m in chatglm3.classes["GlmForCausalLM"].members if m.name == "forward"]
        assert forward.overrides == "nn.Module"
        assert chatglm3.definers("save_pretrained") == ("PreTrainedModel", "PushToHubMixin")

    def test_layers_of_pytorch_stay_attributes(self, chatglm3):
        parts = [part.label for part in chatglm3.classes["GlmAttention"].parts]
        assert parts == [f"{kind}_proj: nn.Linear" for kind in "qkvo"]
        assert "nn.Linear" not in chatglm3.classes

    def test_a_loaded_model_and_its_class_can_be_given(self, embedded):
        of_model, of_class = class_graph(embedded), glmlab.class_graph(type(embedded.model))
        assert set(of_class.classes) < set(of_model.classes)
        assert of_class.classes["ChatGLM3ForCausalLM"].parts == ()
        assert Part("layers", "GlmDecoderLayer", 4, 4) in of_model.classes["GlmModel"].parts

    def test_a_model_registered_without_its_config_has_no_autoconfig(self, monkeypatch):
        class OwnConfig(PreTrainedConfig):
            model_type = "own-model"

        class OwnModel(PreTrainedModel):
            config_class = OwnConfig

        monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, OwnConfig, OwnModel)
        graph = class_graph(OwnModel)
        assert [arrow.source.rpartition(".")[2] for arrow in graph.builds] == ["AutoModelForCausalLM", "OwnConfig"]
        assert "AutoConfig" not in graph.classes

    def test_a_base_model_is_built_by_automodel(self):
        assert {arrow.source for arrow in class_graph(GlmModel).builds if arrow.label == "builds"} == {"AutoModel"}


class Root:
    def __init__(self): ...

    def name(self): ...


class Left(Root):
    def name(self): ...


class Right(Root):
    @property
    def size(self): ...


class Diamond(Left, Right):
    @classmethod
    def make(cls): ...


class Loud:  # a mixin by what it is, not by name
    def shout(self): ...


class LoudDiamond(Loud, Diamond):
    @staticmethod
    def help(): ...


class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...

    def _secret(self):
        return 1


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp
        self.norms = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])


class Dense(nn.Module): ...


class Experts(nn.Module): ...


class TestMadeUpClasses:
    def test_diamond(self):
        graph = class_graph(LoudDiamond)
        assert _edges(graph) == _python_edges(LoudDiamond.__mro__)
        assert graph.classes["LoudDiamond"].mro == ("LoudDiamond", "Loud", "Diamond", "Left", "Right", "Root")
        assert {node.name for node in graph.nodes if node.kind == "mixin"} == {"Loud"}
        assert graph.builds == ()
        assert graph.definers("name") == ("Left", "Root")
        assert {m.name: m.kind for node in graph.nodes for m in node.members} == {
            "help": "static method", "shout": "method", "make": "class method", "name": "method", "size": "property",
            "__init__": "method",
        }  # fmt: skip

    def test_abstract_classes(self):
        graph = class_graph(Shape)
        assert [(m.name, m.abstract) for m in graph.classes["Shape"].members] == [("area", True), ("_secret", False)]
        assert graph.classes["ABC"].kind == "outside"

    def test_two_classes_of_one_name_are_told_apart(self):
        base = type("Twin", (), {"__module__": "first"})
        graph = class_graph(type("Twin", (base,), {"__module__": "second"}))
        assert _edges(graph) == [("second.Twin", "first.Twin")]

    def test_layers_that_differ_are_counted_from_to(self):
        model = nn.Module()
        model.layers = nn.ModuleList([Layer(Dense()), Layer(Experts()), Layer(Experts())])
        classes = class_graph(model).classes
        assert [part.label for part in classes["Layer"].parts] == [
            "mlp: 0..1 x Dense", "norms: 2 x nn.LayerNorm", "mlp: 0..1 x Experts",
        ]  # fmt: skip
        assert [part.label for part in classes["nn.Module"].parts] == ["layers: 3 x Layer"]


@pytest.mark.parametrize("thing", ["ChatGLM3ForCausalLM", 7, None, torch.ones(1)])
def test_what_is_no_class_is_refused(thing):
    with pytest.raises(StructureError, match="is neither a class nor a module. Give a class, a model, or what load_"):
        class_graph(thing)
