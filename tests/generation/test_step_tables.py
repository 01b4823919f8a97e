"""Tables of recorded steps hold what the steps hold, and the logit lens ends in the step's own logits."""

import pytest
import torch
from transformers import GenerationConfig

from glmlab.generation.decoding import DecodeError, Keep, decode_steps
from glmlab.generation.step_tables import candidates_table, logit_lens, steps_table, token_text
from glmlab.prompts.encoding import encode_chat

STAGES = ["logits", "repetition penalty", "temperature", "top-k", "top-p"]


@pytest.fixture(scope="module")
def steps(embedded):
    prompt = encode_chat(embedded.tokenizer, [{"role": "user", "content": "Tell me a long story about a fox."}])
    config = GenerationConfig(do_sample=True, temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.1)
    keep = Keep(top_k=6, logits=True, hidden_states=True)
    torch.manual_seed(0)
    return list(decode_steps(embedded, prompt, max_new_tokens=8, generation_config=config, keep=keep))


def test_a_line_a_step(embedded, steps):
    table = steps_table(embedded.tokenizer, steps)
    assert table["token_id"].tolist() == [step.token_id for step in steps]
    assert table["context_tokens"].diff().dropna().tolist() == [1] * 7
    assert table["surprisal_bits"].tolist() == pytest.approx([step.surprisal_bits[0] for step in steps])
    assert table["probability"].tolist() == pytest.approx([step.chosen_probability.item() for step in steps])
    assert table["fed_tokens"].tolist() == [steps[0].context_length, *[1] * 7]
    assert table["stop_reason"].tolist()[-1] == "length"
    columns = [name.removeprefix("survivors: ") for name in table.columns if name.startswith("survivors")]
    assert columns == STAGES
    assert set(table["survivors: top-k"]) == {20}
    # the caller's time stands at the step that it was spent on
    assert table["caller_ms"].tolist()[:-1] == [step.caller_s * 1e3 for step in steps[1:]]
    assert table["caller_ms"].isna().tolist() == [False] * 7 + [True]
    with pytest.raises(DecodeError, match="there are no steps to show"):
        steps_table(embedded.tokenizer, [])


def test_candidates_stand_best_first_without_those_that_were_cut(embedded, steps):
    for step in steps:
        table = candidates_table(embedded.tokenizer, step.stages, chosen=step.token_id)
        assert list(table["stage"].unique()) == STAGES
        assert table["chosen"].tolist() == (table["token_id"] == step.token_id).tolist()
        assert (table["probability"] > 0).all()
        for _, stage in table.groupby("stage"):
            assert stage["probability"].is_monotonic_decreasing
            assert stage["rank"].tolist() == list(range(1, min(6, stage["survivors"].iloc[0]) + 1))


class TestLogitLens:
    def test_the_last_layer_gives_the_step_s_own_logits(self, embedded, steps):
        for step in (steps[0], steps[3]):
            lens = logit_lens(embedded, step, candidates=5)
            last = lens[lens["normed"]]
            best = torch.softmax(step.logits[0], dim=-1).topk(5)
            assert last["token_id"].tolist() == best.indices.tolist()
            assert last["probability"].tolist() == pytest.approx(best.values.tolist(), rel=1e-5)
            assert lens["layer"].tolist() == [layer for layer in range(5) for _ in range(5)]
            assert lens["name"].unique().tolist() == ["embeddings", *(f"layer {i}" for i in range(1, 5))]

    def test_only_the_last_entry_is_normed_already(self, embedded, steps):
        """Norming it again would give other logits."""
        hidden = steps[0].hidden_states
        head, norm = embedded.model.get_output_embeddings(), embedded.model.base_model.norm
        with torch.no_grad():
            assert torch.allclose(head(hidden[-1][:, -1]), steps[0].logits, atol=1e-4)
            assert not torch.allclose(head(norm(hidden[-1][:, -1])), steps[0].logits, atol=0.1)
        lens = logit_lens(embedded, steps[0])
        assert set(lens[lens["normed"]]["layer"]) == {len(hidden) - 1}

    def test_needs_hidden_states(self, embedded):
        step = next(decode_steps(embedded, "Hello", max_new_tokens=1))
        with pytest.raises(DecodeError, match=r"no hidden states\. Pass keep=Keep\(hidden_states=True\)"):
            logit_lens(embedded, step)


def test_a_token_beyond_the_vocabulary_has_a_text():
    class Narrow:
        def convert_ids_to_tokens(self, token_id):
            return None

    assert token_text(Narrow(), 65000) == "id 65000"
