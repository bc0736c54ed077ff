"""What lives as long as the engine is kept away from the cycle collector, and given back with it."""

import gc
import json
from pathlib import Path

from polybatch import LLM

TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "dtype": "float32",
}  # fmt: skip


def test_what_an_engine_is_made_of_is_not_collected_over_and_over_and_is_given_back_when_it_closes(
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    gc.unfreeze()
    with LLM(f"random:{config}", executor="eager", memory="1MiB", max_model_len=64) as llm:
        assert gc.get_freeze_count() > 10_000
        assert llm.generate([[1, 2, 3]])[0].outputs[0].token_ids
    assert gc.get_freeze_count() == 0
