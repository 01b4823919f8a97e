"""Where each class and method of the published ChatGLM3 code is today."""

from pkgutil import resolve_name

import pandas as pd

from glmlab.structure.graph import ClassGraph, StructureError

_GLM = "transformers.models.glm.modeling_glm"

TODAY = {  # class or method of modeling_chatglm.py -> (where it is now, what changed)
    "ChatGLMForConditionalGeneration": (
        "glmlab.models.chatglm3.ChatGLM3ForCausalLM",
        "GlmForCausalLM with the published tensor names; it now holds the output layer (lm_head)",
    ),
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
    "ChatGLMForSequenceClassification": (f"{_GLM}.GlmForSequenceClassification", "same task"),
    "ChatGLMPreTrainedModel": (f"{_GLM}.GlmPreTrainedModel", "masks and positions left it"),
    "ChatGLMPreTrainedModel.get_masks": ("transformers.masking_utils.create_causal_mask", "one utility for all models"),
    "ChatGLMPreTrainedModel.get_position_ids": (f"{_GLM}.GlmModel.forward", "counted on from the cache's length"),
    "ChatGLMModel": (f"{_GLM}.GlmModel", "its output_layer moved up to the causal language model"),
    "ChatGLMModel.quantize": ("transformers.BitsAndBytesConfig", "on loading, not on a loaded model"),
    "ChatGLMModel.get_prompt": ("transformers.integrations.peft.PeftAdapterMixin", "prefix tuning is a PEFT adapter"),
    "ChatGLMModel.get_input_embeddings": (
        "transformers.PreTrainedModel.get_input_embeddings",
        "inherited from EmbeddingAccessMixin",
    ),
    "GLMTransformer": (f"{_GLM}.GlmModel", "merged: GlmModel holds the layers and the last norm itself"),
    "GLMBlock": (f"{_GLM}.GlmDecoderLayer", "same order of norm, attention, norm, MLP"),
    "SelfAttention": (f"{_GLM}.GlmAttention", "query_key_value split into q_proj, k_proj, v_proj"),
    "CoreAttention": (
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "a function, chosen by attn_implementation",
    ),
    "MLP": (f"{_GLM}.GlmMLP", "dense_h_to_4h is gate_up_proj, dense_4h_to_h is down_proj"),
    "RMSNorm": ("glmlab.models.chatglm3.ChatGLM3RMSNorm", "GlmRMSNorm, with the published order of scale and cast"),
    "RotaryEmbedding": (f"{_GLM}.GlmRotaryEmbedding", "cosine and sine of the current positions, not of all"),
    "RotaryEmbedding.forward_impl": (f"{_GLM}.GlmRotaryEmbedding.forward", "one method"),
    "Embedding": ("torch.nn.Embedding", "no wrapper: activations are batch first, nothing to transpose"),
    "PrefixEncoder": ("transformers.integrations.peft.PeftAdapterMixin", "prefix tuning is a PEFT adapter"),
    "InvalidScoreLogitsProcessor": ("transformers.InfNanRemoveLogitsProcessor", "remove_invalid_values=True"),
}
"""Every class of the published file, and each public method that moved away from its class, with its place today."""


def side_by_side(original: ClassGraph) -> pd.DataFrame:
    """List the published classes and the methods that moved, beside what does their work today.

    Args:
        original: graph of the published file, from :func:`~glmlab.structure.source.source_class_graph` or
            :func:`~glmlab.structure.source.read_class_facts`.

    Returns:
        One row a class or method: original, today, what changed. Every name of today is looked up, so that no row
        outlives what it names.

    Raises:
        StructureError: the graph is not of ChatGLM3's file, or a name of today no longer exists.

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
    for name, (today, change) in TODAY.items():
        class_name, _, method = name.partition(".")
        if class_name not in original.classes or (method and not original.classes[class_name].defines(method)):
            continue
        try:
            resolve_name(today)
        except (ImportError, AttributeError) as error:
            raise StructureError(f"{today} no longer exists ({error}): update the table in comparison.py.") from error
        rows.append((f"  {method}()" if method else class_name, _short(today), change))
    return pd.DataFrame(rows, columns=["original", "today", "change"])


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
    """A path without the modules inside transformers and PyTorch."""
    library, _, _ = path.partition(".")
    if library == "torch":
        return f"nn.{path.rpartition('.')[2]}"
    parts = path.split(".")
    named = [part for index, part in enumerate(parts) if part[:1].isupper() or index == len(parts) - 1]
    return f"{library}.{'.'.join(named)}"
