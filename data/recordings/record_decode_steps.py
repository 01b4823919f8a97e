"""Record the decode steps of notebook 02 on the embedded model: the table whose times a figure shows.

    python data/recordings/record_decode_steps.py

Tokens, probabilities and counts are the same on every run; the times are those of the machine.
"""

import importlib.metadata
import json
import platform
from datetime import UTC, datetime
from pathlib import Path

from glmlab.gallery.decoding import RECORDING, decode_run, run_provenance
from glmlab.gallery.plate import embedded
from glmlab.generation.step_tables import steps_table

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Write the table and its provenance beside this file."""
    decode_run.__wrapped__()  # the first run pays for what is loaded late
    table = steps_table(embedded().tokenizer, decode_run())
    times = [name for name in table.columns if name.endswith("_ms")]
    table[times] = table[times].round(3)
    table.to_csv(FOLDER / f"{RECORDING}.csv", index=False, lineterminator="\n")
    provenance = {
        **run_provenance(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "glmlab": importlib.metadata.version("glmlab"),
    }
    (FOLDER / f"{RECORDING}.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    print(f"{RECORDING}: {len(table)} steps, {table['forward_ms'].median():.2f} ms a forward pass")


if __name__ == "__main__":
    main()
