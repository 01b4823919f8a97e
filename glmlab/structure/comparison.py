"""The published ChatGLM3 code beside today's: which class, and which method, moved where."""

from pkgutil import resolve_name

import pandas as pd

from glmlab.structure.graph import ClassGraph, StructureError

_GLM = "transformers.models.glm.modeling_glm"

CLASSES_TODAY = {  # class of modeling_chatglm.py -> (where it is now, what changed)
    "ChatGLMForConditionalGeneration": (
        "glmlab.models.chatglm3.ChatGLM3ForCausalLM",
        "GlmForCausalLM with the published tensor names; it now holds the output layer (lm_head)",
    ),
    "ChatGLMForSequenceClassification": (f"{_GLM}.GlmForSequenceClassification", "same task"),
    "ChatGLMPreTrainedModel": (f"{_GLM}.GlmPreTrainedModel", "masks and positions left it"),
    "ChatGLMModel": (f"{_GLM}.GlmModel", "its output_layer moved up to the causal language model"),
    "GLMTransformer": (f"{_GLM}.GlmModel", "merged: GlmModel holds the layers and the last norm itself"),
    "GLMBlock": (f"{_GLM}.GlmDecoderLayer", "same order of norm, attention, norm, MLP"),
    "SelfAttention": (f"{_GLM}.GlmAttention", "query_key_value split into q_proj, k_proj, v_proj"),
    "CoreAttention": (
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "a function, chosen by attn_implementation",
    ),
    "MLP": (f"{_GLM}.GlmMLP", "dense_h_to_4h is gate_up_proj, dense_4h_to_h is down_proj"),
    "RMSNorm": ("glmlab.models.chatglm3.ChatGLM3RMSNorm", "GlmRMSNorm, with the published order of scale and cast"),
    "RotaryEmbedding": (f"{_GLM}.GlmRotaryEmbedding", "cosine and sine for the positions at hand, not for all"),
    "Embedding": ("torch.nn.Embedding", "no wrapper: activations are batch first, nothing to transpose"),
    "PrefixEncoder": ("transformers.integrations.peft.PeftAdapterMixin", "prefix tuning is an adapter of PEFT"),
    "InvalidScoreLogitsProcessor": ("transformers.InfNanRemoveLogitsProcessor", "remove_invalid_values=True"),
}
"""Every class of the published file, and its home in transformers or glmlab today."""

METHODS_TODAY = {  # method of modeling_chatglm.py, where it does more than the home of its class -> the same
    "ChatGLMForConditionalGeneration.chat": ("glmlab.ChatSession", "say(): one growing answer, kept cache"),
    "ChatGLMForConditionalGeneration.stream_chat": (
        "glmlab.ChatSession",
        "say() streams; chat and stream_chat are one",
    ),
    "ChatGLMForConditionalGeneration.stream_generate": (
        "glmlab.decode_steps",
        "through generate's custom_generate hook",
    ),
    "ChatGLMForConditionalGeneration.quantize": (
        "transformers.BitsAndBytesConfig",
        "on loading, not on a loaded model",
    ),
    "ChatGLMForConditionalGeneration.process_response": (
        "glmlab.prompts.tools.parse_tool_call",
        "parsed as data; the original calls eval() on the model's words",
    ),
    "ChatGLMForConditionalGeneration.prepare_inputs_for_generation": (
        "transformers.GenerationMixin.prepare_inputs_for_generation",
        "inherited, no own version",
    ),
    "ChatGLMForConditionalGeneration.forward": (f"{_GLM}.GlmForCausalLM.forward", "inherited by ChatGLM3ForCausalLM"),
    "ChatGLMPreTrainedModel.get_masks": ("transformers.masking_utils.create_causal_mask", "one utility for all models"),
    "ChatGLMPreTrainedModel.get_position_ids": (f"{_GLM}.GlmModel.forward", "counted on from the cache's length"),
    "ChatGLMModel.quantize": ("transformers.BitsAndBytesConfig", "on loading, not on a loaded model"),
    "ChatGLMModel.get_prompt": (
        "transformers.integrations.peft.PeftAdapterMixin",
        "prefix tuning is an adapter of PEFT",
    ),
    "ChatGLMModel.get_input_embeddings": (
        "transformers.PreTrainedModel.get_input_embeddings",
        "inherited from EmbeddingAccessMixin",
    ),
    "RotaryEmbedding.forward_impl": (f"{_GLM}.GlmRotaryEmbedding.forward", "one method"),
}
"""Public methods that have a home of their own today."""


def side_by_side(original: ClassGraph) -> pd.DataFrame:
    """Lay the published classes and their public methods beside what does their work today.

    Args:
        original: graph of the published file, by :func:`~glmlab.structure.source.source_class_graph` or
            :func:`~glmlab.structure.source.read_class_facts`.

    Returns:
        One row a class, and below it one a method that moved elsewhere: original, today, what changed. Every name of
        today is looked up, so that no row outlives what it names.

    Raises:
        StructureError: the graph is not of ChatGLM3's file, or a name of today is gone.

    Example:
        >>> from glmlab.core.resources import data_path
        >>> from glmlab.structure.source import read_class_facts
        >>> table = side_by_side(read_class_facts(data_path("structure", "chatglm3-6b.json")))
        >>> table.set_index("original").loc["  stream_generate()", "today"]
        'glmlab.decode_steps'
    """
    if "ChatGLMForConditionalGeneration" not in original.classes:
        raise StructureError(
            f"{original!r} is not the graph of ChatGLM's published file. Read it with source_class_graph from the "
            "folder of a downloaded chatglm3-6b, or take the facts in data/structure."
        )
    rows = []
    for node in (original.classes[name] for name in CLASSES_TODAY if name in original.classes):
        rows.append((node.name, *CLASSES_TODAY[node.name]))
        for member in node.members:
            if moved := METHODS_TODAY.get(f"{node.name}.{member.name}"):
                rows.append((f"  {member.label}", *moved))
    for _, today, _ in rows:
        try:
            resolve_name(today)
        except (ImportError, AttributeError) as error:
            raise StructureError(f"{today} is gone ({error}): the table in comparison.py needs mending.") from error
    return pd.DataFrame(
        [(was, _short(now), change) for was, now, change in rows], columns=["original", "today", "change"]
    )


ASIDE = ("InvalidScoreLogitsProcessor", "LogitsProcessor", "PrefixEncoder", "AutoModelForSeq2SeqLM")
"""Classes of the published file, beside those for classification, that a chat does not touch."""


def chat_side(original: ClassGraph) -> ClassGraph:
    """The published classes without what a chat does not touch: classification and prefix tuning.

    Example:
        >>> from glmlab.core.resources import data_path
        >>> from glmlab.structure.source import read_class_facts
        >>> graph = read_class_facts(data_path("structure", "chatglm3-6b.json"))
        >>> "PrefixEncoder" in graph.classes, any(node.name == "PrefixEncoder" for node in chat_side(graph).nodes)
        (True, False)
    """
    kept = [name for name in original.classes if name not in ASIDE and "SequenceClassification" not in name]
    return original.select(include=kept)


def _short(path: str) -> str:
    """The last parts of a path that a reader needs: module names of transformers and PyTorch are left out."""
    library, _, _ = path.partition(".")
    if library == "torch":
        return f"nn.{path.rpartition('.')[2]}"
    parts = path.split(".")
    named = [part for index, part in enumerate(parts) if part[:1].isupper() or index == len(parts) - 1]
    return f"{library}.{'.'.join(named)}"
