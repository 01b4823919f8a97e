"""The plate of notebook 00: what ChatGLM3-6B needs in each precision."""

import pandas as pd

from glmlab.core.cards import cuda_context, find_card
from glmlab.core.units import MIB
from glmlab.figures.deployment import precision_chart
from glmlab.gallery.captions import caption
from glmlab.gallery.plate import Plate
from glmlab.models.checkpoints import find_config

MODEL, CARD, CONTEXT_TOKENS = "chatglm3-6b", "RTX 4060 Laptop", 8192


def bytes_by_precision() -> Plate:
    """The weights by component, the KV payload of a full context and the CUDA context, beside the chapter's card."""
    import torch

    from glmlab.models.kv_cache import cache_dtype_bytes, kv_cache_bytes
    from glmlab.models.loading import build_skeleton, load_config
    from glmlab.models.placement import FLOAT_PRECISIONS, predict_bytes

    gpu, config = find_card(CARD), load_config(find_config(MODEL))
    skeleton = build_skeleton(config)
    predicted = {
        name: predict_bytes(skeleton, name, FLOAT_PRECISIONS.get(name, torch.float16))
        for name in ("fp32", "bf16", "int8", "int4")
    }
    parts = pd.DataFrame(predicted).T
    parts["KV payload"] = [
        kv_cache_bytes(config, tokens=CONTEXT_TOKENS, dtype_bytes=cache_dtype_bytes(config, name)) for name in predicted
    ]
    context_mib, context_source = cuda_context(gpu)
    parts["CUDA context"] = round(context_mib * MIB)
    provenance = {"model": MODEL, "context_tokens": CONTEXT_TOKENS, "card": gpu.name, "source": context_source}
    return Plate(
        precision_chart(parts, card=gpu.name, card_mib=gpu.memory_mib),
        parts.rename_axis("precision").reset_index(),
        provenance,
        caption("bytes_by_precision", tokens=CONTEXT_TOKENS),
    )
