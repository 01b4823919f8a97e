"""Record the times of notebook 06 on the embedded model: the tables that its figures show.

    OMP_NUM_THREADS=1 python data/recordings/record_latency.py

Everything is measured several times, and each row is the one of its fastest try: whatever else the machine does only
adds to times. Run it on a machine that does nothing else. The tables are those of the functions that measure.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from glmlab import load_model
from glmlab.gallery.latency import COMPILED_PRECISION, CONTEXTS, PRECISIONS, PROMPTS, RECORDING
from glmlab.latency.measure import conditions, measure_decode, measure_first_token
from glmlab.latency.polling import measure_polling
from glmlab.latency.profile import profile_token
from glmlab.latency.roofline import Rates, measure_rates, roofline
from glmlab.models.loading import LoadedModel

FOLDER = Path(__file__).resolve().parent
TRIES = 5


def best(measure: Callable[[], pd.DataFrame], key: str, time: str) -> pd.DataFrame:
    """Each row from the try in which its time was the least, in the order of the first try."""
    tries = [measure() for _ in range(TRIES)]
    fastest = pd.concat(tries).sort_values(time, kind="stable").drop_duplicates(key).set_index(key)
    return fastest.loc[tries[0][key]].reset_index()[list(tries[0].columns)]


def decode_times(loaded: LoadedModel, precision: str, rates: Rates) -> pd.DataFrame:
    """Milliseconds a token beside the floor."""
    model = loaded.model
    floor = roofline(model.config, rates, precision=precision, contexts=CONTEXTS, dtype=model.dtype)
    times = best(lambda: measure_decode(loaded, CONTEXTS), "context_tokens", "token_ms")
    return times.merge(floor, on="context_tokens")


def main() -> None:
    """Write the tables and their provenance beside this file."""
    torch.set_num_threads(1)
    models = {name: load_model("embedded", precision=name, device="cpu") for name in PRECISIONS}
    eager = models[COMPILED_PRECISION]
    compiled = load_model("embedded", precision=COMPILED_PRECISION, device="cpu", compile=True)
    unit = Rates("", 1.0, 1.0, "")
    read_bytes = roofline(eager.model.config, unit, precision=COMPILED_PRECISION, contexts=[0])["weight_bytes"].iloc[0]
    rates = measure_rates("cpu", block_bytes=int(read_bytes))

    def parts_of(loaded: LoadedModel) -> pd.DataFrame:
        return min((profile_token(loaded) for _ in range(TRIES)), key=lambda table: float(table.attrs["step_ms"]))

    decode = {name: decode_times(loaded, name, rates) for name, loaded in models.items()}
    tables = {
        "decode": pd.concat(table.assign(precision=name) for name, table in decode.items()),
        "compiled": pd.concat(
            decode_times(loaded, COMPILED_PRECISION, rates).assign(way=way)
            for way, loaded in (("eager", eager), ("compiled", compiled))
        ),
        "parts": pd.concat(parts_of(loaded).assign(precision=name) for name, loaded in models.items()),
        "first-token": pd.concat(
            best(lambda loaded=loaded: measure_first_token(loaded, PROMPTS), "prompt_tokens", "first_token_ms").assign(
                precision=name
            )
            for name, loaded in models.items()
        ),
        "polling": best(measure_polling, "way", "poll_ms"),
    }
    for name, table in tables.items():
        table.round(4).to_csv(FOLDER / f"{RECORDING}-{name}.csv", index=False, lineterminator="\n")
    told = {
        **conditions(eager),
        "precision": ", ".join(PRECISIONS),
        "compiled": f"the rows compiled of {RECORDING}-compiled.csv",
        "layers": eager.model.config.num_hidden_layers,
        "rates": {"bytes_per_s": rates.bandwidth_bytes_per_s, "operations_per_s": rates.flops_per_s},
        "rates_source": rates.source,
        "tries": f"{TRIES}; each row is that of its fastest try",
    }
    del told["dtype"]
    (FOLDER / f"{RECORDING}.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    for name, table in tables.items():
        print(f"{RECORDING}-{name}.csv: {len(table)} rows")


if __name__ == "__main__":
    main()
