"""Live class graphs agree with Python, for models of several families and for made-up classes."""

import abc

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, GlmModel, PreTrainedConfig, PreTrainedModel

import glmlab
from glmlab.models.checkpoints import find_config
from glmlab.models.loading import build_skeleton, load_config
from glmlab.structure.graph import Arrow, Member, Part, StructureError
from glmlab.structure.live import class_graph

FAMILIES = {"chatglm3-6b": "ChatGLM3", "glm-4-9b-chat-hf": "Glm", "qwen2.5-7b": "Qwen2", "llama-2-7b": "Llama"}


@pytest.fixture(scope="module", params=FAMILIES)
def skeleton(request):
    return request.param, build_skeleton(load_config(find_config(request.param)))


@pytest.fixture(scope="module")
def chatglm3():
    return class_graph(build_skeleton(load_config(find_config("chatglm3-6b"))))


def _name(cls: type) -> str:
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__


def _python_edges(classes) -> list[tuple[str, str]]:
    return [(_name(cls), _name(base)) for cls in classes for base in cls.__bases__ if base is not object]


def _edges(graph, kind="inherits") -> list[tuple[str, str]]:
    return [(arrow.source, arrow.target) for arrow in graph.arrows if arrow.kind == kind]


class TestFamilies:
    def test_every_edge_is_one_of_pythons_and_none_is_missing(self, skeleton):
        _, model = skeleton
        held = {type(module) for module in model.modules()}
        held = {cls for cls in held if not cls.__module__.startswith(("torch.", "transformers.activations"))}
        config_class = type(model).config_class
        starts = [type(model), *held, AutoModelForCausalLM, config_class, glmlab.structure.live.AutoConfig]
        everything = {above for cls in starts for above in cls.__mro__ if above is not object}
        edges = _edges(class_graph(model))
        assert sorted(edges) == sorted(_python_edges(everything))
        assert len(edges) == len(set(edges))

    def test_mro_bases_and_who_answers_a_call(self, skeleton):
        _, model = skeleton
        graph = class_graph(model)
        for cls in type(model).__mro__[:-1]:
            node = graph.classes[_name(cls)]
            assert node.mro == tuple(_name(above) for above in cls.__mro__[:-1])
            assert node.bases == tuple(_name(base) for base in cls.__bases__ if base is not object)
        answers = graph.calls().set_index("call")["defined in"].to_dict()
        owners = {call: next(cls for cls in type(model).__mro__ if call in vars(cls)) for call in answers}
        assert answers == {call: _name(owner) for call, owner in owners.items()}
        assert (answers["generate"], answers["from_pretrained"]) == ("GenerationMixin", "PreTrainedModel")

    def test_layers_are_held_with_their_count(self, skeleton):
        name, model = skeleton
        family = FAMILIES[name].removeprefix("Chat").replace("GLM3", "Glm")
        graph = class_graph(model)
        part = Part("layers", f"{family}DecoderLayer", model.config.num_hidden_layers, model.config.num_hidden_layers)
        assert part in graph.classes[f"{family}Model"].parts
        layers = [arrow.label for arrow in graph.arrows if arrow.target == f"{family}DecoderLayer"]
        assert layers == [f"layers: {model.config.num_hidden_layers} x"]

    def test_the_way_from_model_type_to_the_class(self, skeleton):
        _, model = skeleton
        graph = class_graph(model)
        root, config = type(model).__name__, type(model).config_class.__name__
        model_type = type(model).config_class.model_type
        assert AutoModelForCausalLM._model_mapping[type(model).config_class] is type(model)
        assert {
            Arrow("builds", "AutoModelForCausalLM", root, "builds"),
            Arrow("builds", config, root, f"model_type '{model_type}'"),
            Arrow("builds", "AutoConfig", config, f"'{model_type}'"),
        } <= set(graph.builds)
        assert ("AutoModelForCausalLM", "_BaseAutoModelClass") in _edges(graph)


class TestChatGLM3:
    def test_kinds(self, chatglm3):
        kinds = {node.name: node.kind for node in chatglm3.nodes}
        assert {name for name, kind in kinds.items() if kind == "mixin"} == {
            name for name in kinds if name.endswith("Mixin")
        }
        assert {name for name, kind in kinds.items() if kind == "torch"} == {"nn.Module"}
        assert {name for name, kind in kinds.items() if kind == "auto"} == {
            "AutoConfig", "AutoModelForCausalLM", "_BaseAutoModelClass",
        }  # fmt: skip

    def test_forward_is_abstract_in_pytorch_and_overridden_in_the_model(self, chatglm3):
        (abstract,) = [m for m in chatglm3.classes["nn.Module"].members if m.abstract]
        assert abstract == Member("forward", abstract=True)
        (forward,) = [m for m in chatglm3.classes["GlmForCausalLM"].members if m.name == "forward"]
        assert forward.overrides == "nn.Module"
        assert chatglm3.definers("save_pretrained") == ("PreTrainedModel", "PushToHubMixin")

    def test_parts_of_pytorch_stay_attributes(self, chatglm3):
        attention = chatglm3.classes["GlmAttention"]
        assert [part.label for part in chatglm3.shown_parts(attention)] == [
            f"{kind}_proj: nn.Linear" for kind in "qkvo"
        ]
        assert "nn.Linear" not in chatglm3.classes

    def test_generation_mixins_contribution_is_what_gets_lost_without_it(self, chatglm3):
        contributed = chatglm3.contributions("GenerationMixin")
        assert {"generate", "prepare_inputs_for_generation", "_sample"} <= set(contributed)
        for name in contributed:
            assert not hasattr(PreTrainedModel, name), name
            assert name in vars(GenerationMixin)

    def test_a_loaded_model_and_its_class_can_be_given(self, embedded):
        of_model, of_class = class_graph(embedded), class_graph(type(embedded.model))
        assert set(of_class.classes) < set(of_model.classes)
        assert of_class.classes["ChatGLM3ForCausalLM"].parts == ()
        assert Part("layers", "GlmDecoderLayer", 4, 4) in of_model.classes["GlmModel"].parts
        assert glmlab.class_graph is class_graph

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


class TestMadeUpLattices:
    def test_diamond(self):
        graph = class_graph(LoudDiamond)
        assert _edges(graph) == _python_edges(LoudDiamond.__mro__)
        assert graph.classes["LoudDiamond"].mro == ("LoudDiamond", "Loud", "Diamond", "Left", "Right", "Root")
        assert {node.name for node in graph.nodes if node.kind == "mixin"} == {"Loud"}
        assert graph.builds == ()
        assert graph.definers("name") == ("Left", "Root")
        assert graph.contributions("Loud") == ("shout",)
        assert graph.contributions("Root") == ("__init__",)

    def test_kinds_of_members(self):
        graph = class_graph(LoudDiamond)
        members = {m.name: m.kind for node in graph.nodes for m in node.members}
        assert members["size"] == "property"
        assert members["make"] == "class method"
        assert members["help"] == "static method"
        assert members["shout"] == "method"
        (name,) = graph.classes["Left"].members
        assert name.overrides == "Root"

    def test_abstract_classes(self):
        graph = class_graph(Shape)
        assert graph.classes["Shape"].abstract
        assert graph.classes["ABC"].kind == "outside"
        assert [m.name for m in graph.shown_members(graph.classes["Shape"])] == ["area"]
        everything = class_graph(Shape, members="all")
        assert [m.name for m in everything.shown_members(everything.classes["Shape"])] == ["area", "_secret"]

    def test_two_classes_of_one_name_are_told_apart(self):
        base = type("Twin", (), {"__module__": "first"})
        graph = class_graph(type("Twin", (base,), {"__module__": "second"}))
        assert _edges(graph) == [("second.Twin", "first.Twin")]

    def test_layers_that_differ_are_counted_from_to(self):
        class Dense(nn.Module): ...

        class Experts(nn.Module): ...

        class Layer(nn.Module):
            def __init__(self, mlp):
                super().__init__()
                self.mlp = mlp
                self.norms = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList([Layer(Dense()), Layer(Experts()), Layer(Experts())])

        prefix = "TestMadeUpLattices.test_layers_that_differ_are_counted_from_to.<locals>."
        graph = class_graph(Model())
        assert [part.label.replace(prefix, "") for part in graph.classes[f"{prefix}Layer"].parts] == [
            "mlp: 0..1 x Dense", "norms: 2 x nn.LayerNorm", "mlp: 0..1 x Experts",
        ]  # fmt: skip
        assert [part.label.replace(prefix, "") for part in graph.classes[f"{prefix}Model"].parts] == [
            "layers: 3 x Layer"
        ]


@pytest.mark.parametrize("thing", ["ChatGLM3ForCausalLM", 7, None, torch.ones(1)])
def test_what_is_no_class_is_refused(thing):
    with pytest.raises(StructureError, match="is neither a class nor a module. Give a class, a model, or what load_"):
        class_graph(thing)
