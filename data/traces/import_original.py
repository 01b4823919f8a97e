"""Writes chatglm3-6b-original-int4.npz from the recorded trace of the original code (format: README.md).

python data/traces/import_original.py RECORDED.npz
"""

import sys
from pathlib import Path

import numpy as np

from glmlab.allocator.program import ALLOCATE, FREE, FREE_CARRIED, FREE_FIRST, EventProgram
from glmlab.tracing.trace import OWNERS, AllocationTrace, TraceFacts

NAME = "chatglm3-6b-original-int4"
MODES = {0: ALLOCATE, 1: FREE, 2: FREE_FIRST, 3: FREE_CARRIED}
OWNER_OF_WORD = {  # a word of a loaded tensor's label -> its owner, the first that fits
    "weight_scale": "quantisation_state",
    "word_embeddings": "weights_embedding",
    "output_layer": "weights_head",
    "norm": "weights_norms",
    "rotary": "weights_norms",
    "mlp": "weights_mlp",
    "self_attention": "weights_attention",
}


def main(recorded_file: Path) -> Path:
    """Convert the recording; return the file that was written."""
    with np.load(recorded_file, allow_pickle=False) as recorded:
        sections = recorded["segments"].tolist()
        starts = recorded["seg_start"].astype(np.int64)
        events = np.column_stack([recorded["ev"], np.zeros(len(recorded["ev"]))]).astype(np.int32)
        sizes, labels = recorded["size"], recorded["who_names"].tolist()
        label_of_event, layer_of_event = recorded["who"].astype(np.int32), recorded["layer"].astype(np.int32)
        carried = dict(zip(recorded["kv_segments"].tolist(), recorded["kv"].tolist(), strict=True))

    is_allocation = events[:, 0] == 0
    events[:, 0] = np.vectorize(MODES.get)(events[:, 0])
    for section, start, end in zip(sections, starts, starts[1:], strict=False):
        allocated = start + np.flatnonzero(is_allocation[start:end])
        if section == "load":  # what the loading does not free again is the model
            freed = set(events[start:end][~is_allocation[start:end], 2].tolist())
            for slot, event in enumerate(allocated):
                if slot not in freed:
                    label = labels[label_of_event[event]]
                    owner = next(owner for word, owner in OWNER_OF_WORD.items() if word in label)
                    events[event, 3] = OWNERS.index(owner)
        else:
            events[allocated[carried.get(section, [])], 3] = OWNERS.index("kv_cache")
            for event in allocated:
                if "cuBLAS workspace" in labels[label_of_event[event]]:
                    events[event, 3] = OWNERS.index("workspace")
    program = EventProgram(events, sizes, sections, starts, carried, OWNERS)
    facts = TraceFacts(
        model="ChatGLM3-6B, original code",
        precision="int4",
        kv_bytes_per_token=28672,
        context_limit=8192,
        description="modelling and quantisation code of December 2023, .quantize(bits=4, device='cuda').cuda(), "
        "stream_chat turns that pass past_key_values on, top-p 0.8, temperature 0.8; recorded on the meta device",
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        effects={
            "cublas-workspace": "8,519,680 B at the first matmul of the process",
            "fused-attention": "output and logsumexp; no scratch, no mask padding",
        },
    )
    pairs = [tuple([*label.split(" | "), ""][:2]) for label in labels]
    trace = AllocationTrace(program, facts, pairs, np.where(is_allocation, label_of_event, -1), layer_of_event)
    return trace.save(Path(__file__).parent / f"{NAME}.npz")


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
